"""The Triton twin of each op of RetroAttention: same names, signatures and order as in
`retro_attention.py`.

    1. write    grid (B, n_head + n_kv_head)       a program rotates the rows of one head; for a KV
                                                   head it also stores k, v and updates the bounds
    2. score    grid (B * n_kv_head, page blocks)  a scan of the page bounds
    3. select   grid (B * n_kv_head,)              exact top-k in registers, and the exposure mask
    4. attend   grid (splits, B * n_kv_head)       flash attention of W * G rows over a share of the
                                                   selected pages
    5. combine  grid (B * W * n_head,)             merges the splits and the output cache

Then come rms_norm and swiglu, which a layer computes beside attention.

For a reader new to Triton: `kernel[grid](arguments)` runs the kernel once per *program* of the
grid, and `tl.program_id` tells the programs apart. They compute with blocks of values whose sides
are powers of two. A tensor argument is a pointer to its first element, and a pointer plus a block
of offsets is a block of addresses; where the mask is false, loads give `other` and stores do
nothing. `tl.constexpr` arguments and `x is None` are resolved when the kernel is compiled. A
program runs on `num_warps` warps of 32 threads, which keep its blocks in registers; `num_stages`
sets how many tiles a loop has in flight. The tutorials "Fused Softmax" and "Fused Attention"
explain the rest: https://triton-lang.org/main/getting-started/tutorials

A comment "in (B, W)" marks flat indices into a tensor of that shape.

Each function, e.g. `write`, checks, allocates and launches the kernel below it, `write_kernel`.
`cache` is a LayerCache and CONFIG its RetroConfig. Grids and shapes depend on the size of the cache
and never on the position. `t` is loaded inside the kernel, so the host never waits for the device
and a whole step can become a CUDA graph. What lies at positions > t never reaches a result.

The headers of the kernels count the bytes of one sparse layer and one step; e is the element size,
and heads = B * n_kv_head.

On a machine without a GPU, TRITON_INTERPRET=1 (set before Python starts) runs every kernel line by
line in NumPy, with breakpoint() and print. There tl.dot is right in float32 and float16, but wrong
in bfloat16.
"""

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2E); the hardware has exp2

capturable = True  # a CUDA graph can record these ops


@triton.jit
def finite(lse):
    """`retro_attention.finite`: -inf, the lse of an empty set of keys, becomes 0."""
    return tl.where(lse == float("-inf"), 0.0, lse)


# --------------------------------------------------------------------------------------------------
# 1. write                     paper: section 2.1 (page bounds), section 2.4, Fig. 4 (propagation)


def write(q, k, v, cos, sin, cache, t: torch.Tensor) -> torch.Tensor:
    """Rotates q and k, puts the rows of k and v into the cache, recomputes the touched pages'
    bounds. Returns the rotated q."""
    B, W, n_head, hs = q.shape
    n_kv_head, P = cache.k.shape[1:3]
    for x in (cos, sin, cache.k, cache.v):
        assert x.is_contiguous(), "angles and cache must be contiguous"
    # q, k and v may be slices of the output of wqkv: row n = b * W + w begins at n * stride.
    # The kernel takes one stride per tensor. (If W = 1, stride(1) is arbitrary.)
    strides = []
    for x in (q, k, v):
        stride = x.stride(1) if W > 1 else x.stride(0)
        even = x.stride()[2:] == (hs, 1) and (B == 1 or x.stride(0) == W * stride)
        assert even, "rows must be evenly spaced"
        strides.append(stride)
    q_rotated = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    write_kernel[(B, n_head + n_kv_head)](
        q, k, v, cos, sin, q_rotated, cache.k, cache.v, cache.bounds, t,
        *strides, P, n_head, n_kv_head,
        CONFIG=cache.config, ROWS=triton.next_power_of_2(W), HS=hs,
        num_warps=1 if W <= 8 else 4,  # with few rows, more warps would idle
    )  # fmt: skip
    return q_rotated


@triton.jit
def rotate(x, cos, sin, ROWS: tl.constexpr, HS: tl.constexpr):
    """RoPE of neighbouring pairs: x (ROWS, HS), cos and sin (ROWS, HS / 2)."""
    x1, x2 = tl.split(x.to(tl.float32).reshape(ROWS, HS // 2, 2))
    return tl.join(x1 * cos - x2 * sin, x1 * sin + x2 * cos).reshape(ROWS, HS)


@triton.jit
def write_kernel(
    q, k, v, cos, sin, q_rotated, cache_k, cache_v, bounds, t_ptr,
    q_stride, k_stride, v_stride, P, n_head, n_kv_head,
    CONFIG: tl.constexpr, ROWS: tl.constexpr, HS: tl.constexpr,
):  # fmt: skip
    """q, k = rope(q), rope(k); K[rows], V[rows] = k, v; bounds[touched pages] = min, max of keys

    Grid (B, n_head + n_kv_head): a program has one head and its W rows. Reads and writes
    B * W * (n_head + 2 n_kv_head) * hs * e bytes each way. Each program reads the angles,
    W * hs * 4 bytes, which the L2 cache holds. For the bounds, reads the keys before the window in
    its first page, heads * (max(0, t-W+1) % ps) * hs * e, and writes
    heads * touched pages * 2 * hs * e.
    """
    W: tl.constexpr = CONFIG.window
    PS: tl.constexpr = CONFIG.page_size
    b = tl.program_id(0)
    head = tl.program_id(1)
    t = tl.load(t_ptr)
    w = tl.arange(0, ROWS)  # (ROWS,) of which W are rows
    i = tl.arange(0, HS)
    half = tl.arange(0, HS // 2)
    p = t - W + 1 + w  # (ROWS,) positions of the rows
    real = ((w < W) & (p >= 0))[:, None]  # (ROWS, 1)
    row = (b * W + w)[:, None]  # (ROWS, 1) in (B, W)
    angles = p[:, None] * (HS // 2) + half[None, :]  # (ROWS, HS / 2)
    cos_rows = tl.load(cos + angles, mask=real, other=1.0).to(tl.float32)  # (ROWS, HS / 2)
    sin_rows = tl.load(sin + angles, mask=real, other=0.0).to(tl.float32)  # (ROWS, HS / 2)

    if head < n_head:
        # Rows before the start are rotated too, because all of q_rotated must be defined.
        inside = (w < W)[:, None]  # (ROWS, 1)
        x = tl.load(q + row * q_stride + head * HS + i[None, :], mask=inside, other=0.0)
        x = rotate(x, cos_rows, sin_rows, ROWS, HS).to(x.dtype)  # (ROWS, HS)
        tl.store(q_rotated + (row * n_head + head) * HS + i[None, :], x, mask=inside)
    else:
        h = head - n_head
        element = h * HS + i[None, :]  # (1, HS) in a row of k or v
        x = tl.load(k + row * k_stride + element, mask=real, other=0.0)
        x = rotate(x, cos_rows, sin_rows, ROWS, HS).to(x.dtype)  # (ROWS, HS)
        value = tl.load(v + row * v_stride + element, mask=real, other=0.0)  # (ROWS, HS)
        head_page = (b * n_kv_head + h).to(tl.int64) * P  # where this head's pages begin
        # Pages lie one after the other, so a row's offset follows from its position.
        offset = head_page * PS * HS + p[:, None] * HS + i[None, :]  # (ROWS, HS)
        tl.store(cache_k + offset, x, mask=real)
        tl.store(cache_v + offset, value, mask=real)

        # The window's keys are in registers. Only the page's earlier keys are read. This kernel
        # does not write them, so no barrier is needed.
        if bounds is not None:
            for page in range(tl.maximum(t - W + 1, 0) // PS, t // PS + 1):
                j = page * PS + tl.arange(0, PS)  # (PS,) positions
                earlier = (j < t - W + 1)[:, None]  # (PS, 1)
                key_offset = head_page * PS * HS + j[:, None] * HS + i[None, :]  # (PS, HS)
                keys = tl.load(cache_k + key_offset, mask=earlier, other=0.0)  # (PS, HS)
                here = real & (p // PS == page)[:, None]  # (ROWS, 1) rows in this page
                low = tl.min(tl.where(earlier, keys, float("inf")).to(tl.float32), axis=0)
                low_x = tl.min(tl.where(here, x, float("inf")).to(tl.float32), axis=0)
                high = tl.max(tl.where(earlier, keys, float("-inf")).to(tl.float32), axis=0)
                high_x = tl.max(tl.where(here, x, float("-inf")).to(tl.float32), axis=0)
                entry = (head_page + page) * 2 * HS + i  # (HS,)
                tl.store(bounds + entry, tl.minimum(low, low_x).to(x.dtype))
                tl.store(bounds + entry + HS, tl.maximum(high, high_x).to(x.dtype))


# --------------------------------------------------------------------------------------------------
# 2. score                                                           paper: section 2.1, Eq. 1


def score(q: torch.Tensor, cache, t: torch.Tensor) -> torch.Tensor:
    """Quest's scores of the newest row, summed over the group -> (B, n_kv_head, P) float32, of
    which only the pages held are written."""
    B, W, n_head, hs = q.shape
    assert q.is_contiguous(), "q must be contiguous"
    n_kv_head, P = cache.k.shape[1:3]
    scores = torch.empty(B, n_kv_head, P, device=q.device, dtype=torch.float32)
    PAGES = 32  # small blocks, so that every multiprocessor reads even at batch 1
    score_kernel[(B * n_kv_head, triton.cdiv(P, PAGES))](
        q, cache.bounds, scores, t, P, n_kv_head,
        CONFIG=cache.config, G=n_head // n_kv_head, HS=hs, PAGES=PAGES,
    )  # fmt: skip
    return scores


@triton.jit
def score_kernel(
    q, bounds, scores, t_ptr, P, n_kv_head,
    CONFIG: tl.constexpr, G: tl.constexpr, HS: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    """score_j = sum over the group's q and all i of max(q_i * min_ji, q_i * max_ji)

    Grid (B * n_kv_head, blocks of PAGES pages); blocks beyond the pages held return at once. Reads
    the bounds of the pages held, heads * held * 2 * hs * e bytes; writes heads * held * 4.
    """
    W: tl.constexpr = CONFIG.window
    bh = tl.program_id(0).to(tl.int64)
    b = bh // n_kv_head
    h = bh % n_kv_head
    held = tl.load(t_ptr) // CONFIG.page_size + 1
    page = tl.program_id(1) * PAGES + tl.arange(0, PAGES)  # (PAGES,)
    if tl.program_id(1) * PAGES < held:
        i = tl.arange(0, 2 * HS)  # over the minima, then the maxima
        # Their weights: the summed negative, then the summed positive parts of the queries.
        weights = tl.zeros([2 * HS], dtype=tl.float32)
        newest = b * W + W - 1  # row in (B, W)
        for g in tl.static_range(G):
            x = tl.load(q + ((newest * n_kv_head + h) * G + g) * HS + i % HS).to(tl.float32)
            weights += tl.where(i < HS, tl.minimum(x, 0.0), tl.maximum(x, 0.0))
        tile = (bh * P + page[:, None]) * 2 * HS + i[None, :]  # (PAGES, 2 * HS)
        x = tl.load(bounds + tile, mask=(page < held)[:, None], other=0.0).to(tl.float32)
        total = tl.sum(x * weights[None, :], axis=1)  # (PAGES,)
        tl.store(scores + bh * P + page, total, mask=page < held)


# --------------------------------------------------------------------------------------------------
# 3. select                               paper: section 2.1 (selection), section 2.3 (mask A)


@triton.jit
def first_window_page(t, CONFIG: tl.constexpr):
    """`RetroConfig.first_window_page` on the device."""
    return tl.maximum(t - CONFIG.window + 1, 0) // CONFIG.page_size


@triton.jit
def pages_selected(t, CONFIG: tl.constexpr):
    """`RetroConfig.pages_selected` on the device; t is int64, because millionths * held overflows
    32 bits."""
    held = t // CONFIG.page_size + 1
    allowed = (CONFIG.millionths * held + 999_999) // 1_000_000
    older = held - 1 - first_window_page(t, CONFIG)
    return tl.minimum(held, tl.maximum(allowed, CONFIG.min_pages) + older)


def select(scores: torch.Tensor, cache, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The top pages, and when each was last loaded before this step, both
    (B, n_kv_head, MAX_PAGES) int32, of which only the first `pages_selected(t)` are written.
    Records the load in cache.last_loaded. Scores may be infinite or NaN here."""
    B, n_kv_head, P = scores.shape
    MAX_PAGES = cache.config.max_pages_selected(P)
    pages = torch.empty(B, n_kv_head, MAX_PAGES, device=scores.device, dtype=torch.int32)
    loaded_before = torch.empty_like(pages)
    N = triton.next_power_of_2(P)
    select_kernel[(B * n_kv_head,)](
        scores, cache.last_loaded, pages, loaded_before, t, P, MAX_PAGES,
        CONFIG=cache.config, N=N,
        num_warps=min(32, max(4, N // 512)),  # 16 pages per thread, for N from 2,048 to 16,384
    )  # fmt: skip
    return pages, loaded_before


@triton.jit
def select_kernel(
    scores, last_loaded, pages, loaded_before, t_ptr, P, MAX_PAGES,
    CONFIG: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """pages = top-k(score); loaded_before = A[pages]; A[pages] = t

    Grid (B * n_kv_head,): a program has all scores of one KV head. Reads heads * held * 4 bytes
    each of scores and of A, writes heads * count * 12, with count = pages_selected(t).

    An example with six pages held, of which count = 3 are to be chosen. Page 5 is the window's and
    always loaded, so it ranks above all others.

        page      0    1    2    3    4    5
        score   1.5  0.2  7.0  1.5 -3.0    *
        rank     40   30   50   40   10   99     integers in the order of the scores (32-bit numbers
                                                 in the kernel, small ones here)

    A rank reaches x if it is >= x. The search keeps a threshold `low` that at least `count` ranks
    reach, and `high` that at most `count` reach. They begin at the smallest rank, and one above the
    largest that is not the window's:

        low  high  middle  reached by
         10    51      30           5   low = 30
         30    51      40           4   low = 40
         40    51      45           2   high = 45
         40    45      42           2   high = 42
         40    42      41           2   high = 41: the end

    Four ranks reach 40, one too many, and no threshold can separate the two that are equal. Two
    ranks reach 41, so one of the equal pages fits: page 0, the lower. Pages 0, 2 and 5 are chosen.
    """
    PS: tl.constexpr = CONFIG.page_size
    bh = tl.program_id(0).to(tl.int64)
    t64 = tl.load(t_ptr)
    count = pages_selected(t64, CONFIG).to(tl.int32)
    t = t64.to(tl.int32)  # positions and pages fit 32 bits, in which a GPU computes fastest
    page = tl.arange(0, N)  # (N,)
    is_held = page < t // PS + 1  # (N,)
    always = is_held & (page >= first_window_page(t, CONFIG))  # (N,) always loaded
    before = tl.load(last_loaded + bh * P + page, mask=is_held, other=0)  # (N,)
    x = tl.load(scores + bh * P + page, mask=is_held, other=0.0)  # (N,)
    x = tl.where(x == x, x, float("inf"))  # a NaN score, e.g. of an infinite key, becomes inf
    # As integers, the bits of positive floats rise with the float, those of negative floats fall.
    # So set the top bit of a positive float, and invert all bits of a negative one. -0.0 counts as
    # 0.0; pages not held get rank 0 (lowest).
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)  # (N,)
    rank = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)  # (N,)
    rank = tl.where(is_held, tl.where(always, 0xFFFFFFFF, rank), 0).to(tl.uint32)

    # Bisection. `reach_low` >= count ranks reach low, and `reach_high` <= count ranks reach high.
    # It ends when exactly `count` ranks reach low, or when only equal ranks are left.
    low = tl.min(tl.where(is_held, rank, 0xFFFFFFFF).to(tl.uint32), axis=0)
    high = tl.max(tl.where(always, 0, rank).to(tl.uint32), axis=0) + 1
    reach_low = t // PS + 1
    reach_high = tl.sum(always.to(tl.int32), axis=0)
    while (reach_low != count) & (high > low + 1):
        middle = low + (high - low) // 2
        reach_middle = tl.sum((rank >= middle).to(tl.int32), axis=0)
        if reach_middle >= count:
            low = middle
            reach_low = reach_middle
        else:
            high = middle
            reach_high = reach_middle
    chosen = rank >= low  # (N,)
    if reach_low > count:  # of ranks = low, take the lower pages
        tied = rank == low
        room = count - reach_high
        chosen = (rank > low) | (tied & (tl.cumsum(tied.to(tl.int32), axis=0) <= room))

    # A page's place in the list is the number of chosen pages before it: those in its own chunk of
    # CHUNK pages, plus those in earlier chunks. One cumsum over all N would pass partial sums
    # through every thread.
    CHUNK: tl.constexpr = 32 if N >= 32 else N
    flags = chosen.to(tl.int32).reshape(N // CHUNK, CHUNK)
    in_chunk = tl.sum(flags, axis=1)  # (N / CHUNK,)
    in_earlier_chunks = tl.cumsum(in_chunk, axis=0) - in_chunk  # (N / CHUNK,)
    place = (tl.cumsum(flags, axis=1) - 1 + in_earlier_chunks[:, None]).reshape(N)

    tl.store(pages + bh * MAX_PAGES + place, page, mask=chosen)
    tl.store(loaded_before + bh * MAX_PAGES + place, before, mask=chosen)
    tl.store(last_loaded + bh * P + page, t, mask=chosen)


# --------------------------------------------------------------------------------------------------
# 4. attend                              paper: section 2.3, Eq. 2 (original, supplementary output)


def attend(
    q: torch.Tensor,
    cache,
    pages: torch.Tensor | None,
    loaded_before: torch.Tensor | None,
    t: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of all rows over the loaded pages, each row over the causal keys of pages new to
    it; without `pages` over all pages held. One part per split: o (splits, B, W, n_head, hs),
    lse (splits, B, W, n_head), both float32."""
    B, W, n_head, hs = q.shape
    assert W == cache.config.window, f"q has {W} rows, but the window is {cache.config.window}"
    assert q.is_contiguous(), "q must be contiguous"
    n_kv_head, P, ps = cache.k.shape[1:4]
    G = n_head // n_kv_head
    MAX_PAGES = P if pages is None else pages.shape[2]
    # A tile of keys is what a program works on at a time. In float32, a larger one does not fit the
    # registers.
    KEYS = 128 if q.element_size() == 2 else 32
    # The list of pages is split, so that a GPU has about two programs for each multiprocessor
    # (an H100 has 132). There are no more splits than a full list has tiles, and at most 64,
    # because `combine` holds all parts of a row in registers.
    programs = 256 if q.is_cuda else 3  # the interpreter splits only if B * n_kv_head = 1
    splits = max(1, min(programs // (B * n_kv_head), triton.cdiv(MAX_PAGES * ps, KEYS), 64))
    o = torch.empty(splits, B, W, n_head, hs, device=q.device, dtype=torch.float32)
    lse = torch.empty(splits, B, W, n_head, device=q.device, dtype=torch.float32)
    attend_kernel[(splits, B * n_kv_head)](
        q, cache.k, cache.v, pages, loaded_before, o, lse, t, P, MAX_PAGES, n_kv_head, hs**-0.5,
        CONFIG=cache.config, G=G, ROWS=max(16, triton.next_power_of_2(W * G)),  # tl.dot needs 16
        HS=hs, KEYS=KEYS, num_stages=2,
    )  # fmt: skip
    return o, lse


@triton.jit
def attend_kernel(
    q, cache_k, cache_v, pages, loaded_before, o, lse, t_ptr, P, MAX_PAGES, n_kv_head, scale,
    CONFIG: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, HS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """o = softmax(q . K / sqrt(hs)) V and its lse, for the row at p over the keys at j <= p in
    pages new to it (loaded_before < p)

    Grid (splits, B * n_kv_head): a program has all W * G rows of a KV head and a share of its
    pages. Reads each selected page once, heads * count * ps * 2 * hs * e bytes with
    count = pages_selected(t); writes splits * B * W * n_head * (hs + 1) * 4.
    """
    W: tl.constexpr = CONFIG.window
    PS: tl.constexpr = CONFIG.page_size
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    bh = tl.program_id(1).to(tl.int64)
    b = bh // n_kv_head
    h = bh % n_kv_head
    head_k = cache_k + bh * P * PS * HS
    head_v = cache_v + bh * P * PS * HS
    t64 = tl.load(t_ptr)
    t = t64.to(tl.int32)  # positions, and offsets within a head, fit 32 bits: half the registers
    r = tl.arange(0, ROWS)
    i = tl.arange(0, HS)
    n = tl.arange(0, KEYS)
    w = r // G  # (ROWS,) window row; query head h * G + r % G
    row = (b * W + w) * n_kv_head * G + h * G + r % G  # (ROWS,) in (B, W, n_head)
    p = t - W + 1 + w  # (ROWS,) position of w
    inside = w < W  # (ROWS,)
    queries = tl.load(q + row[:, None] * HS + i[None, :], mask=inside[:, None], other=0.0)

    # This split's share of the list, in whole pages.
    count = t // PS + 1 if pages is None else pages_selected(t64, CONFIG).to(tl.int32)
    per_split = (count + splits - 1) // splits
    start = split * per_split
    end = tl.minimum(start + per_split, count)
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)  # running maximum of the scores, base 2
    norm = tl.zeros([ROWS], dtype=tl.float32)  # running sum of exp2(score - top)
    acc = tl.zeros([ROWS, HS], dtype=tl.float32)  # running sum of exp2(score - top) * v
    for first in range(start * PS, end * PS, KEYS):
        place = (first + n) // PS  # (KEYS,) in the list
        if pages is None:
            page = place
            before = tl.full([KEYS], -1, dtype=tl.int32)
        else:
            entry = bh * MAX_PAGES + place
            page = tl.load(pages + entry, mask=place < end, other=0)  # (KEYS,)
            before = tl.load(loaded_before + entry, mask=place < end, other=0)  # (KEYS,)
        j = page * PS + (first + n) % PS  # (KEYS,) positions of the keys
        in_text = (place < end) & (j <= t)  # (KEYS,)
        tile = j[:, None] * HS + i[None, :]  # (KEYS, HS)
        keys = tl.load(head_k + tile, mask=in_text[:, None], other=0.0)  # (KEYS, HS)
        scores = tl.dot(queries, keys.T, input_precision="ieee") * (scale * LOG2E)  # (ROWS, KEYS)
        causal = in_text[None, :] & (j[None, :] <= p[:, None])  # (ROWS, KEYS)
        new = before[None, :] < p[:, None]  # (ROWS, KEYS)
        scores = tl.where(causal & new, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))  # (ROWS,)
        weight = tl.exp2(scores - finite(new_top)[:, None])  # (ROWS, KEYS)
        rescale = tl.exp2(top - finite(new_top))  # (ROWS,)
        norm = norm * rescale + tl.sum(weight, axis=1)
        values = tl.load(head_v + tile, mask=in_text[:, None], other=0.0)  # (KEYS, HS)
        weighted = tl.dot(weight.to(values.dtype), values, input_precision="ieee")  # (ROWS, HS)
        acc = acc * rescale[:, None] + weighted
        top = new_top

    # A row to which nothing is new has acc = 0 and top = -inf, so o = 0 and lse = -inf.
    norm = tl.where(norm > 0, norm, 1.0)
    # (ROWS,) in (splits, B, W, n_head): num_programs(1) * W * G is B * W * n_head
    part = split.to(tl.int64) * tl.num_programs(1) * W * G + row
    tl.store(o + part[:, None] * HS + i[None, :], acc / norm[:, None], mask=inside[:, None])
    tl.store(lse + part, (top + tl.log2(norm)) / LOG2E, mask=inside)


# --------------------------------------------------------------------------------------------------
# 5. combine                      paper: section 2.3 (output cache), appendix C.2 (merged outputs)


def combine(o: torch.Tensor, lse: torch.Tensor, cache, t: torch.Tensor) -> torch.Tensor:
    """Merges the splits with each other and with the cached outputs, and updates the cache. Returns
    the rows (B, W, n_head, hs) in the model's dtype."""
    splits, B, W, n_head, hs = o.shape
    merged = torch.empty(B, W, n_head, hs, device=o.device, dtype=cache.k.dtype)
    combine_kernel[(B * W * n_head,)](
        o, lse, cache.out, cache.lse, merged, t, splits, n_head,
        W=W, SPLITS=triton.next_power_of_2(splits), HS=hs, num_warps=max(1, splits // 32),
        # After a reduction every thread holds a copy of the result, and several store theirs to one
        # address. Fused multiply-adds would make the copies differ in their last bits, so two runs
        # could differ.
        enable_fp_fusion=False,
    )  # fmt: skip
    return merged


@triton.jit
def combine_kernel(
    o, lse, cache_out, cache_lse, merged, t_ptr, splits, n_head,
    W: tl.constexpr, SPLITS: tl.constexpr, HS: tl.constexpr,
):  # fmt: skip
    """lse = log(sum of exp(lse_n)); o = sum of exp(lse_n - lse) * o_n, over the splits and the
    output cache

    Grid (B * W * n_head,): a program has one row of one head. Reads
    (splits + 1) * B * W * n_head * (hs + 1) * 4 bytes, writes
    B * W * n_head * ((hs + 1) * 4 + hs * e).
    """
    row = tl.program_id(0).to(tl.int64)  # in (B, W, n_head)
    head = row % n_head
    w = row // n_head % W
    b = row // (n_head * W)
    i = tl.arange(0, HS)
    split = tl.arange(0, SPLITS)
    part = split * tl.num_programs(0) + row  # (SPLITS,) in (splits, B, W, n_head): B*W*n_head apart
    some = split < splits  # (SPLITS,)
    part_lse = tl.load(lse + part, mask=some, other=float("-inf"))  # (SPLITS,)
    parts = tl.load(o + part[:, None] * HS + i[None, :], mask=some[:, None], other=0.0)
    top = tl.max(part_lse, axis=0)
    if cache_out is not None:
        # The row at p = t - W + 1 + w has slot p % W, which is (t + 1 + w) % W also for negative p.
        # Pop: the newest row takes the slot of row t - W, and ignores what it holds.
        slot = (b * W + (tl.load(t_ptr) + 1 + w) % W) * n_head + head
        cached_lse = tl.where(w < W - 1, tl.load(cache_lse + slot), float("-inf"))
        cached_out = tl.where(w < W - 1, tl.load(cache_out + slot * HS + i), 0.0)  # (HS,)
        top = tl.maximum(top, cached_lse)

    weight = tl.exp2((part_lse - finite(top)) * LOG2E)  # (SPLITS,)
    norm = tl.sum(weight, axis=0)
    result = tl.sum(weight[:, None] * parts, axis=0)  # (HS,)
    if cache_out is not None:
        cached_weight = tl.exp2((cached_lse - finite(top)) * LOG2E)
        norm += cached_weight
        result += cached_weight * cached_out
    norm = tl.where(norm > 0, norm, 1.0)  # a row that has seen nothing: o = 0, lse = -inf
    result = result / norm
    tl.store(merged + row * HS + i, result.to(merged.dtype.element_ty))
    if cache_out is not None:  # update the past rows, push the newest
        tl.debug_barrier()  # wait until every thread has read the old lse
        tl.store(cache_lse + slot, top + tl.log2(norm) / LOG2E)
        tl.store(cache_out + slot * HS + i, result)


# --------------------------------------------------------------------------------------------------
# Beside attention. PyTorch's RMSNorm would slow a W=2 step by 2.8 to 3.7 %, its SwiGLU by 2.0 to
# 2.6 % (the two halves are not contiguous).


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x * x) + eps) * weight over the last axis; x (..., dim), weight (dim,)."""
    assert x.is_contiguous() and weight.is_contiguous(), "x and weight must be contiguous"
    y = torch.empty_like(x)
    dim = x.shape[-1]
    rms_norm_kernel[(x.numel() // dim,)](x, weight, y, dim, eps, DIM=triton.next_power_of_2(dim))
    return y


@triton.jit
def rms_norm_kernel(x, weight, y, dim, eps, DIM: tl.constexpr):
    """y = x / sqrt(mean(x * x) + eps) * weight

    Grid (rows,): a program has one row. Reads and writes rows * dim * e bytes each way, and reads
    the weights.
    """
    i = tl.arange(0, DIM)
    base = tl.program_id(0).to(tl.int64) * dim
    values = tl.load(x + base + i, mask=i < dim, other=0.0).to(tl.float32)  # (DIM,)
    w = tl.load(weight + i, mask=i < dim, other=0.0).to(tl.float32)  # (DIM,)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / dim + eps)
    tl.store(y + base + i, (values * scale * w).to(y.dtype.element_ty), mask=i < dim)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * value; x (..., 2 * ffn_dim), the gates first -> (..., ffn_dim)."""
    assert x.is_contiguous(), "x must be contiguous"
    n = x.shape[-1] // 2
    BLOCK = 1024
    y = torch.empty(*x.shape[:-1], n, device=x.device, dtype=x.dtype)
    swiglu_kernel[(y.numel() // n, triton.cdiv(n, BLOCK))](x, y, n, BLOCK=BLOCK)
    return y


@triton.jit
def swiglu_kernel(x, y, n, BLOCK: tl.constexpr):
    """y = gate / (1 + exp(-gate)) * value

    Grid (rows, cdiv(n, BLOCK)). Reads rows * 2 * n * e bytes, writes half.
    """
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    gate = tl.load(x + row * 2 * n + i, mask=i < n, other=0.0).to(tl.float32)  # (BLOCK,)
    value = tl.load(x + row * 2 * n + n + i, mask=i < n, other=0.0).to(tl.float32)  # (BLOCK,)
    silu = gate / (1 + tl.exp2(-gate * LOG2E))
    tl.store(y + row * n + i, (silu * value).to(y.dtype.element_ty), mask=i < n)
