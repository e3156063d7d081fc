"""The Triton twin of each step of RetroAttention: same names, same signatures, same order as in `retro_attention.py`.

    1. write    grid (B, n_head + n_kv_head)         a program rotates one head's rows; a KV head also stores and bounds them
    2. score    grid (B * n_kv_head, blocks of P)    a scan of the page bounds
    3. select   grid (B * n_kv_head,)                all scores of a KV head in registers: exact top-k, exposure mask
    4. attend   grid (splits, B * n_kv_head)         flash attention of W * G rows over a share of the selected pages
    5. combine  grid (B * W * n_head,)               merges the splits and the output cache

and of what a layer computes beside attention, rms_norm and swiglu. Launch timing, which no result depends on, is at the end.

For a reader new to Triton: a kernel runs once for each *program* of its grid, and `tl.program_id` says which. Arguments named
like tensors are pointers to their first element; a pointer plus a block of offsets is a block of addresses, of which those
whose mask is false read `other` and write nothing. `tl.constexpr` arguments are compiled in. The threads of a program share
its blocks. A thread sees what other threads of its program stored to memory only after a barrier, and what other programs
stored only once their kernel has ended. The sides of a block are powers of two: ROWS, N, SPLITS and DIM are sizes rounded up,
and masks cut off what is too much. `num_warps` says how many groups of 32 threads share a program, `num_stages` how many tiles
of a loop are on their way at once. Where a pointer is None, the branch that would use it is not compiled.

Each function here, as `write`, checks, allocates and launches; below it stands its kernel, `write_kernel`. `cache` is a
LayerCache, CONFIG its RetroConfig. Grids and shapes depend on the sizes of the cache and never on the position: `t` is loaded
inside, so the host never waits for the device and a whole step can become a CUDA graph. What is stored after position t is
never read into a result.

Bytes are those of one layer and one step; e is the element size, heads = B * n_kv_head.

On a machine without a GPU, TRITON_INTERPRET=1 (set before Python starts) runs every kernel line by line in NumPy, with
breakpoint() and print where you like. There, tl.dot is right in float32 and float16 and wrong in bfloat16.
"""

import os

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2E), and exp2 is what the hardware has


# ----------------------------------------------------------------------------------------------------------------------
# 1. write


def write(q, k, v, cos, sin, cache, t: torch.Tensor) -> torch.Tensor:
    """Rotates q and k, puts the window's rows of k and v into the cache, refreshes the touched bounds; returns rotated q."""
    B, W, n_head, hs = q.shape
    assert all(x.is_contiguous() for x in (cos, sin, cache.k, cache.v)), "angles and cache must be contiguous"
    # Rows may be slices of one product: consecutive rows of (B, W) lie `stride` elements apart.
    strides = [x.stride(1) if W > 1 else x.stride(0) for x in (q, k, v)]
    for x, stride in zip((q, k, v), strides, strict=True):
        assert x.stride()[2:] == (hs, 1) and (B == 1 or x.stride(0) == W * stride), "rows must be evenly spaced"
    n_kv_head, P = cache.k.shape[1:3]
    q_rotated = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    write_kernel[(B, n_head + n_kv_head)](
        q, k, v, cos, sin, q_rotated, cache.k, cache.v, cache.bounds, t, *strides, P, n_head, n_kv_head,
        CONFIG=cache.config, ROWS=triton.next_power_of_2(W), HS=hs,
        num_warps=1 if W <= 8 else 4,  # a few rows: more warps would only wait
    )  # fmt: skip
    return q_rotated


@triton.jit
def rotate(x, cos, sin, ROWS: tl.constexpr, HS: tl.constexpr):
    """RoPE of neighbouring pairs: x (ROWS, HS), cos and sin (ROWS, HS / 2)."""
    x1, x2 = tl.split(x.to(tl.float32).reshape(ROWS, HS // 2, 2))
    return tl.join(x1 * cos - x2 * sin, x1 * sin + x2 * cos).reshape(ROWS, HS)


@triton.jit
def write_kernel(
    q, k, v, cos, sin, q_rotated, cache_k, cache_v, bounds, t_ptr, q_stride, k_stride, v_stride, P, n_head, n_kv_head,
    CONFIG: tl.constexpr, ROWS: tl.constexpr, HS: tl.constexpr,
):  # fmt: skip
    """q, k = rope(q), rope(k); K[rows], V[rows] = k, v; bounds[touched pages] = min, max of their keys

    Grid (B, n_head + n_kv_head): a program has one head and its W rows. Reads and writes B * W * (n_head + 2 n_kv_head) * hs
    * e bytes each way; each program reads the angles, W * hs * 4 bytes, which the L2 cache holds. For the bounds reads the keys
    before the window in its first page, heads * ((t-W+1) % ps) * hs * e, and writes heads * touched pages * 2 * hs * e.
    """
    let_the_next_kernel_in()
    W: tl.constexpr = CONFIG.window
    PS: tl.constexpr = CONFIG.page_size
    b, head = tl.program_id(0), tl.program_id(1)
    t = tl.load(t_ptr)
    w = tl.arange(0, ROWS)  # (ROWS,) W of them are rows
    i, half = tl.arange(0, HS), tl.arange(0, HS // 2)
    p = t - W + 1 + w  # (ROWS,) their positions
    real = (w < W) & (p >= 0)  # (ROWS,)
    angles = p[:, None] * (HS // 2) + half[None, :]  # (ROWS, HS / 2)
    cos_rows = tl.load(cos + angles, mask=real[:, None], other=1.0).to(tl.float32)  # (ROWS, HS / 2)
    sin_rows = tl.load(sin + angles, mask=real[:, None], other=0.0).to(tl.float32)  # (ROWS, HS / 2)

    if head < n_head:
        row = (b * W + w)[:, None]  # (ROWS, 1)
        x = tl.load(q + row * q_stride + head * HS + i[None, :], mask=(w < W)[:, None], other=0.0)  # (ROWS, HS)
        rows = (row * n_head + head) * HS + i[None, :]  # (ROWS, HS)
        tl.store(q_rotated + rows, rotate(x, cos_rows, sin_rows, ROWS, HS).to(x.dtype), mask=(w < W)[:, None])
    else:
        h = head - n_head
        row, rest = (b * W + w)[:, None], h * HS + i[None, :]
        x = tl.load(k + row * k_stride + rest, mask=real[:, None], other=0.0)
        x = rotate(x, cos_rows, sin_rows, ROWS, HS).to(x.dtype)  # (ROWS, HS)
        first_page = (b * n_kv_head + h).to(tl.int64) * P  # of this head
        place = first_page * PS * HS + p[:, None] * HS + i[None, :]  # (ROWS, HS) pages lie one after the other
        tl.store(cache_k + place, x, mask=real[:, None])
        tl.store(cache_v + place, tl.load(v + row * v_stride + rest, mask=real[:, None], other=0.0), mask=real[:, None])

        # Bounds: the window's keys are in registers, only the page's earlier ones are read: no barrier is needed.
        if bounds is not None:
            for page in range(tl.maximum(t - W + 1, 0) // PS, t // PS + 1):
                j = page * PS + tl.arange(0, PS)  # (PS,) positions
                earlier = (j < t - W + 1)[:, None]  # (PS, 1) before the window
                keys = tl.load(cache_k + first_page * PS * HS + j[:, None] * HS + i[None, :], mask=earlier, other=0.0)
                inside = (real & (p // PS == page))[:, None]  # (ROWS, 1)
                low = tl.min(tl.where(earlier, keys, float("inf")).to(tl.float32), axis=0)  # (HS,)
                low = tl.minimum(low, tl.min(tl.where(inside, x, float("inf")).to(tl.float32), axis=0))
                high = tl.max(tl.where(earlier, keys, float("-inf")).to(tl.float32), axis=0)  # (HS,)
                high = tl.maximum(high, tl.max(tl.where(inside, x, float("-inf")).to(tl.float32), axis=0))
                bound = (first_page + page) * 2 * HS + i  # (HS,)
                tl.store(bounds + bound, low.to(x.dtype))
                tl.store(bounds + bound + HS, high.to(x.dtype))


# ----------------------------------------------------------------------------------------------------------------------
# 2. score


def score(q: torch.Tensor, cache, t: torch.Tensor) -> torch.Tensor:
    """Quest's bounds of the newest row, summed over the group -> (B, n_kv_head, P) float32; only pages held are written."""
    B, W, n_head, hs = q.shape
    assert q.is_contiguous(), "q must be contiguous"
    n_kv_head, P = cache.k.shape[1:3]
    scores = torch.empty(B, n_kv_head, P, device=q.device, dtype=torch.float32)
    PAGES = 32  # small blocks: at batch 1 there must be enough of them to keep every multiprocessor reading
    score_kernel[(B * n_kv_head, triton.cdiv(P, PAGES))](
        q, cache.bounds, scores, t, P, n_kv_head,
        CONFIG=cache.config, G=n_head // n_kv_head, HS=hs, PAGES=PAGES, **LAUNCH_EARLY,
    )  # fmt: skip
    return scores


@triton.jit
def score_kernel(
    q, bounds, scores, t_ptr, P, n_kv_head,
    CONFIG: tl.constexpr, G: tl.constexpr, HS: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    """score_j = sum over the group's q and all i of max(q_i * min_ji, q_i * max_ji)

    Grid (B * n_kv_head, blocks of PAGES pages); blocks beyond the pages held return at once. Reads the bounds of the pages
    held, heads * held * 2 * hs * e bytes; writes heads * held * 4.
    """
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // n_kv_head, bh % n_kv_head
    held = tl.load(t_ptr) // CONFIG.page_size + 1
    wait_for_the_kernel_before()
    let_the_next_kernel_in()
    page = tl.program_id(1) * PAGES + tl.arange(0, PAGES)  # (PAGES,)
    if tl.program_id(1) * PAGES < held:
        i = tl.arange(0, 2 * HS)  # of the minima, then of the maxima
        picks = tl.zeros([2 * HS], dtype=tl.float32)  # what meets them: negative, then positive parts of the group's queries
        newest = b * CONFIG.window + CONFIG.window - 1  # row in (B, W)
        for g in tl.static_range(G):
            x = tl.load(q + ((newest * n_kv_head + h) * G + g) * HS + i % HS).to(tl.float32)  # (2 * HS,)
            picks += tl.where(i < HS, tl.minimum(x, 0.0), tl.maximum(x, 0.0))
        tile = (bh * P + page[:, None]) * 2 * HS + i[None, :]  # (PAGES, 2 * HS)
        x = tl.load(bounds + tile, mask=(page < held)[:, None], other=0.0).to(tl.float32)
        total = tl.sum(x * picks[None, :], axis=1)  # (PAGES,)
        tl.store(scores + bh * P + page, total, mask=page < held)


# ----------------------------------------------------------------------------------------------------------------------
# 3. select


@triton.jit
def first_window_page(t, CONFIG: tl.constexpr):
    """`RetroConfig.first_window_page` on the device: from this page on, all are loaded always."""
    return tl.maximum(t - CONFIG.window + 1, 0) // CONFIG.page_size


@triton.jit
def pages_selected(t, CONFIG: tl.constexpr):
    """`RetroConfig.pages_selected` on the device; t in 64 bits."""
    held = t // CONFIG.page_size + 1
    share = (held * CONFIG.budget_ratio[0] + CONFIG.budget_ratio[1] - 1) // CONFIG.budget_ratio[1]
    older = t // CONFIG.page_size - first_window_page(t, CONFIG)  # of the window's pages
    return tl.minimum(held, tl.maximum(share, CONFIG.min_pages) + older)


def select(scores: torch.Tensor, cache, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Top pages and the steps that last loaded them, two of (B, n_kv_head, S) int32. S is the most that any position needs;
    only the first `pages_selected(t)` are written. Then cache.last_loaded says t. Scores may be infinite or NaN here."""
    B, n_kv_head, P = scores.shape
    S = cache.config.most_pages_selected(P)
    pages, last_loaded = (torch.empty(B, n_kv_head, S, device=scores.device, dtype=torch.int32) for _ in range(2))
    N = triton.next_power_of_2(P)
    select_kernel[(B * n_kv_head,)](
        scores, cache.last_loaded, cache.totals, pages, last_loaded, t, P, S,
        CONFIG=cache.config, N=N, num_warps=min(32, max(4, N // 512)), **LAUNCH_EARLY,  # 16 pages per thread
    )  # fmt: skip
    return pages, last_loaded


@triton.jit
def select_kernel(
    scores, cache_last_loaded, totals, pages, last_loaded, t_ptr, P, S,
    CONFIG: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """pages = top-k(score); last_loaded = A[pages]; A[pages] = t

    Grid (B * n_kv_head,): a program has all scores of one KV head. Reads at most heads * held * 4 bytes each of scores and
    of A, writes heads * count * 12, with count = pages_selected(t).

    An example with six pages held, of which count = 3 are to be chosen. Page 5 is the window's own and always loaded: it ranks
    above all others.

        page      0    1    2    3    4    5
        score   1.5  0.2  7.0  1.5 -3.0    *
        rank     40   30   50   40   10   99      integers in the order of the scores (small ones here; they have 32 bits)

    At least 3 ranks reach low = 10, fewer reach high = 51. Between them a = 23 and b = 36 are reached by 5 and 4 ranks: now
    low = 36. Then a = 41 and b = 46 are reached by 2 and 2: high = 41. Two more rounds raise low to 40, where the search ends.
    Four ranks reach 40, one too many, and no threshold can part the two that are equal. 2 ranks reach 41, so there is room for
    one of the two: page 0, the lower. Chosen are pages 0, 2 and 5. A page's slot in the list is the number of chosen pages
    before it: 0, 1, 2.
    """
    PS: tl.constexpr = CONFIG.page_size
    bh = tl.program_id(0).to(tl.int64)
    t64 = tl.load(t_ptr)
    count = pages_selected(t64, CONFIG).to(tl.int32)
    t = t64.to(tl.int32)  # all that follows fits 32 bits, in which a GPU computes fastest
    held, first = t // PS + 1, first_window_page(t, CONFIG)
    page = tl.arange(0, N)  # (N,)
    # These tables were last written by the step before; the scores by the kernel before.
    before = tl.load(cache_last_loaded + bh * P + page, mask=page < held, other=0)  # (N,) the last load of each page
    loaded, sights = tl.load(totals + bh * 2), tl.load(totals + bh * 2 + 1)
    wait_for_the_kernel_before()
    x = tl.load(scores + bh * P + page, mask=page < first, other=0.0)  # (N,)
    x = tl.where(x == x, x, float("inf"))  # a NaN score, as of an infinite key times 0, ranks first
    # A positive float's bits, read as an integer, rise with it, a negative one's fall. -0.0 counts as 0.0.
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)  # (N,)
    rank = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)  # (N,)
    rank = tl.where(page < first, rank, tl.where(page < held, 0xFFFFFFFF, 0)).to(tl.uint32)

    # `reached` counts the ranks >= low and is never less than `count`; `above` counts those >= high and is less than `count`
    # (or equal to it, where only the window's pages are chosen). Two thresholds between them are tried at once, their counts
    # side by side in one integer, so that one sum over the threads narrows the gap to a third (13.2 us at 8,192 pages, where
    # halving takes 15.2: one H100). The counts fit, as the smallest rank reaches neither threshold. Done when exactly `count`
    # ranks reach `low`, or only equal ones are left.
    BITS: tl.constexpr = 16 if N < 65536 else 32
    BOTH: tl.constexpr = tl.int32 if N < 65536 else tl.int64
    low = tl.min(tl.where(page < held, rank, 0xFFFFFFFF).to(tl.uint32), axis=0)
    high = tl.max(tl.where(page < first, rank, 0).to(tl.uint32), axis=0) + 1
    reached, above = held, held - first
    while (reached != count) & (high > low + 1):
        third = tl.maximum((high - low) // 3, 1)
        a, b = low + third, low + 2 * third
        both = tl.sum((rank >= a).to(BOTH) + ((rank >= b).to(BOTH) << BITS), axis=0)
        at_a, at_b = (both & ((1 << BITS) - 1)).to(tl.int32), (both >> BITS).to(tl.int32)
        if at_b >= count:
            low, reached = b, at_b
        elif at_a >= count:
            low, reached, high, above = a, at_a, b, at_b
        else:
            high, above = a, at_a
    chosen = rank >= low
    if reached > count:  # of equal ranks, the lower pages
        tied = rank == low
        chosen = (rank > low) | (tied & (tl.cumsum(tied.to(tl.int32), axis=0) <= count - above))
    # A page's slot is the number of chosen pages before it: those in its own row of LANES pages and those of the rows above.
    # One cumsum over all N would hand partial sums from thread to thread through the whole program.
    LANES: tl.constexpr = 32 if N >= 32 else N
    lanes = chosen.to(tl.int32).reshape(N // LANES, LANES)
    in_row = tl.sum(lanes, axis=1)  # (N / LANES,)
    above = tl.cumsum(in_row, axis=0) - in_row  # (N / LANES,)
    slot = (tl.cumsum(lanes, axis=1) - 1 + above[:, None]).reshape(N)

    tl.store(pages + bh * S + slot, page, mask=chosen)
    tl.store(last_loaded + bh * S + slot, before, mask=chosen)
    tl.store(cache_last_loaded + bh * P + page, t, mask=chosen)

    # The past rows that see a page for the first time: at or after its first token and after its last load, oldest .. t-1.
    oldest = tl.maximum(tl.maximum(before + 1, page * PS), t - CONFIG.window + 1)  # (N,)
    first_sights = tl.sum(tl.where(chosen, tl.maximum(t - oldest, 0), 0), axis=0)
    tl.store(totals + bh * 2, loaded + count)
    tl.store(totals + bh * 2 + 1, sights + first_sights)


# ----------------------------------------------------------------------------------------------------------------------
# 4. attend


def attend(q, cache, pages: torch.Tensor | None, last_loaded: torch.Tensor | None, t: torch.Tensor):
    """Attention of all rows over the selected pages, each row over what it may see and has not seen; without `pages` over all
    that are held. One part per split: o (splits, B, W, n_head, hs), lse (splits, B, W, n_head) float32."""
    B, W, n_head, hs = q.shape
    assert W == cache.config.window, f"q has {W} rows, the window {cache.config.window}"
    assert q.is_contiguous(), "q must be contiguous"
    n_kv_head, P, ps = cache.k.shape[1:4]
    S, G = P if pages is None else pages.shape[2], n_head // n_kv_head
    # A tile of keys is what a program has in flight; in float32 a larger one does not fit the registers.
    KEYS = 128 if q.element_size() == 2 else 32
    # About two programs per multiprocessor, but none with less than a tile of keys to read.
    programs = 256 if q.is_cuda else 3  # in the interpreter enough for parts to merge
    splits = max(1, min(programs // (B * n_kv_head), triton.cdiv(S * ps, KEYS), 64))
    o = torch.empty(splits, B, W, n_head, hs, device=q.device, dtype=torch.float32)
    lse = torch.empty(splits, B, W, n_head, device=q.device, dtype=torch.float32)
    attend_kernel[(splits, B * n_kv_head)](
        q, cache.k, cache.v, pages, last_loaded, o, lse, t, P, S, n_kv_head, hs**-0.5,
        CONFIG=cache.config, G=G, ROWS=max(16, triton.next_power_of_2(W * G)),  # tl.dot wants 16 rows at least
        HS=hs, KEYS=KEYS, num_stages=2,
    )  # fmt: skip
    return o, lse


@triton.jit
def attend_kernel(
    q, cache_k, cache_v, pages, last_loaded, o, lse, t_ptr, P, S, n_kv_head, scale,
    CONFIG: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, HS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """o = softmax(q . K / sqrt(hs)) V and its lse, for the row at p over the keys at j <= p in pages with last_loaded < p

    Grid (splits, B * n_kv_head): a program has all W * G rows of a KV head and a share of its pages. Reads each selected page
    once, heads * count * ps * 2 * hs * e bytes with count = pages_selected(t); writes splits * B * W * n_head * (hs + 1) * 4.
    """
    let_the_next_kernel_in()
    W: tl.constexpr = CONFIG.window
    PS: tl.constexpr = CONFIG.page_size
    split, splits = tl.program_id(0), tl.num_programs(0)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // n_kv_head, bh % n_kv_head
    head_k, head_v = cache_k + bh * P * PS * HS, cache_v + bh * P * PS * HS
    t64 = tl.load(t_ptr)
    t = t64.to(tl.int32)  # all that follows fits 32 bits, and takes half the registers of 64
    r, i, n = tl.arange(0, ROWS), tl.arange(0, HS), tl.arange(0, KEYS)
    w = r // G  # (ROWS,) window row w and query head h * G + r % G
    row = (b * W + w) * n_kv_head * G + h * G + r % G  # (ROWS,) in (B, W, n_head)
    p = t - W + 1 + w  # (ROWS,) its position
    queries = tl.load(q + row[:, None] * HS + i[None, :], mask=(w < W)[:, None], other=0.0)  # (ROWS, HS)

    # This split's share of the page list, in whole pages.
    count = t // PS + 1 if pages is None else pages_selected(t64, CONFIG).to(tl.int32)
    per_split = (count + splits - 1) // splits
    start, end = split * per_split, tl.minimum((split + 1) * per_split, count)
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)  # running maximum of the scores, base 2
    norm = tl.zeros([ROWS], dtype=tl.float32)  # running sum of exp2(score - top)
    acc = tl.zeros([ROWS, HS], dtype=tl.float32)  # running sum of exp2(score - top) * v
    for first in range(start * PS, end * PS, KEYS):
        slot = (first + n) // PS  # (KEYS,) places in the page list
        if pages is None:
            page = slot
            before = tl.full([KEYS], -1, dtype=tl.int32)
        else:
            page = tl.load(pages + bh * S + slot, mask=slot < end, other=0)  # (KEYS,)
            before = tl.load(last_loaded + bh * S + slot, mask=slot < end, other=0)  # (KEYS,)
        j = page * PS + (first + n) % PS  # (KEYS,) positions of the keys
        written = (slot < end) & (j <= t)
        tile = j[:, None] * HS + i[None, :]  # (KEYS, HS)
        keys = tl.load(head_k + tile, mask=written[:, None], other=0.0)  # (KEYS, HS)
        scores = tl.dot(queries, keys.T, input_precision="ieee") * (scale * LOG2E)  # (ROWS, KEYS)
        visible = written[None, :] & (j[None, :] <= p[:, None]) & (before[None, :] < p[:, None])  # (ROWS, KEYS)
        scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))  # (ROWS,)
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing yet: exp2(-inf - 0) = 0
        weight = tl.exp2(scores - finite[:, None])  # (ROWS, KEYS)
        rescale = tl.exp2(top - finite)  # (ROWS,)
        norm = norm * rescale + tl.sum(weight, axis=1)
        values = tl.load(head_v + tile, mask=written[:, None], other=0.0)  # (KEYS, HS)
        acc = acc * rescale[:, None] + tl.dot(weight.to(values.dtype), values, input_precision="ieee")
        top = new_top

    seen = norm > 0  # where nothing is new to a row: o = 0, lse = -inf, which weighs exp(-inf - lse) = 0 in combine
    part = split.to(tl.int64) * tl.num_programs(1) * W * G + row  # (ROWS,) in (splits, B, W, n_head)
    result = acc / tl.where(seen, norm, 1.0)[:, None]  # (ROWS, HS)
    total_lse = tl.where(seen, (top + tl.log2(tl.where(seen, norm, 1.0))) / LOG2E, float("-inf"))  # (ROWS,)
    tl.store(o + part[:, None] * HS + i[None, :], result, mask=(w < W)[:, None])
    tl.store(lse + part, total_lse, mask=w < W)


# ----------------------------------------------------------------------------------------------------------------------
# 5. combine


def combine(o: torch.Tensor, lse: torch.Tensor, cache, t: torch.Tensor) -> torch.Tensor:
    """Merges the splits with each other and with the output cache, in place -> (B, W, n_head, hs) in the model's dtype."""
    splits, B, W, n_head, hs = o.shape
    merged = torch.empty(B, W, n_head, hs, device=o.device, dtype=cache.k.dtype)
    combine_kernel[(B * W * n_head,)](
        o, lse, cache.out, cache.lse, merged, t, splits, n_head,
        W=W, SPLITS=triton.next_power_of_2(splits), HS=hs, num_warps=max(1, splits // 32),
        # After a sum over threads each of them holds the result and stores it. Fused multiply-adds would make these copies
        # differ in their last bits.
        enable_fp_fusion=False, **LAUNCH_EARLY,
    )  # fmt: skip
    return merged


@triton.jit
def combine_kernel(
    o, lse, cache_out, cache_lse, merged, t_ptr, splits, n_head,
    W: tl.constexpr, SPLITS: tl.constexpr, HS: tl.constexpr,
):  # fmt: skip
    """lse = log(sum of exp(lse_i)); o = sum of exp(lse_i - lse) * o_i, over the splits and the output cache

    Grid (B * W * n_head,): a program has one row of one head. Reads (splits + 1) * B * W * n_head * (hs + 1) * 4 bytes, writes
    B * W * n_head * ((hs + 1) * 4 + hs * e).
    """
    row = tl.program_id(0).to(tl.int64)  # in (B, W, n_head)
    head, w, b = row % n_head, row // n_head % W, row // (n_head * W)
    i, split = tl.arange(0, HS), tl.arange(0, SPLITS)
    part = split * tl.num_programs(0) + row  # (SPLITS,) in (splits, B, W, n_head)
    if cache_out is not None:
        # Position p = t - W + 1 + w has slot p % W, which is (t + 1 + w) % W also where p is negative. The newest row takes
        # the slot of the one that leaves: pop. What the cache holds was written by the step before.
        slot = (b * W + (tl.load(t_ptr) + 1 + w) % W) * n_head + head
        cached_lse = tl.where(w < W - 1, tl.load(cache_lse + slot), float("-inf"))
        cached_out = tl.where(w < W - 1, tl.load(cache_out + slot * HS + i), 0.0)  # (HS,)
    wait_for_the_kernel_before()
    part_lse = tl.load(lse + part, mask=split < splits, other=float("-inf"))  # (SPLITS,)
    top = tl.max(part_lse, axis=0)
    if cache_out is not None:
        top = tl.maximum(top, cached_lse)
    finite = tl.where(top == float("-inf"), 0.0, top)  # nothing seen at all: every weight is exp(-inf - 0) = 0

    weight = tl.exp2((part_lse - finite) * LOG2E)  # (SPLITS,)
    parts = tl.load(o + part[:, None] * HS + i[None, :], mask=(split < splits)[:, None], other=0.0)  # (SPLITS, HS)
    norm = tl.sum(weight, axis=0)
    result = tl.sum(weight[:, None] * parts, axis=0)  # (HS,)
    if cache_out is not None:
        cached_weight = tl.exp2((cached_lse - finite) * LOG2E)
        norm += cached_weight
        result += cached_weight * cached_out
    seen = norm > 0
    result = result / tl.where(seen, norm, 1.0)
    tl.store(merged + row * HS + i, result.to(merged.dtype.element_ty))
    if cache_out is not None:  # update the past rows, push the newest
        tl.debug_barrier()  # all threads of the program have read the old lse before one replaces it
        total = tl.where(seen, finite + tl.log2(tl.where(seen, norm, 1.0)) / LOG2E, float("-inf"))
        tl.store(cache_lse + slot, total)
        tl.store(cache_out + slot * HS + i, result)


# ----------------------------------------------------------------------------------------------------------------------
# Beside attention. With PyTorch's own functions a whole W=2 step is 2.8 to 3.7 % (RMSNorm) and 2.0 to 2.6 % (SwiGLU, whose two
# halves are not contiguous) slower: one H100, Llama-3.1-8B's shape, 32k x 1, 128k x 1 and 32k x 8.


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x * x) + eps) * weight over the last axis; x (..., dim), weight (dim,)."""
    assert x.is_contiguous() and weight.is_contiguous(), "x and weight must be contiguous"
    y, dim = torch.empty_like(x), x.shape[-1]
    rms_norm_kernel[(x.numel() // dim,)](x, weight, y, dim, eps, DIM=triton.next_power_of_2(dim))
    return y


@triton.jit
def rms_norm_kernel(x, weight, y, dim, eps, DIM: tl.constexpr):
    """y = x / sqrt(mean(x * x) + eps) * weight

    Grid (rows,): a program has one row. Reads and writes rows * dim * e bytes each way, and reads the weights.
    """
    i = tl.arange(0, DIM)
    row = tl.program_id(0).to(tl.int64) * dim
    values = tl.load(x + row + i, mask=i < dim, other=0.0).to(tl.float32)  # (DIM,)
    w = tl.load(weight + i, mask=i < dim, other=0.0).to(tl.float32)  # (DIM,)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / dim + eps)
    tl.store(y + row + i, (values * scale * w).to(y.dtype.element_ty), mask=i < dim)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * value; x (..., 2 * ffn_dim), the gates first -> (..., ffn_dim)."""
    assert x.is_contiguous(), "x must be contiguous"
    n, BLOCK = x.shape[-1] // 2, 1024
    y = torch.empty(*x.shape[:-1], n, device=x.device, dtype=x.dtype)
    swiglu_kernel[(y.numel() // n, triton.cdiv(n, BLOCK))](x, y, n, BLOCK=BLOCK)
    return y


@triton.jit
def swiglu_kernel(x, y, n, BLOCK: tl.constexpr):
    """y = gate / (1 + exp(-gate)) * value

    Grid (rows, blocks of n). Reads rows * 2 * n * e bytes, writes half of that.
    """
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    gate = tl.load(x + row * 2 * n + i, mask=i < n, other=0.0).to(tl.float32)  # (BLOCK,)
    value = tl.load(x + row * 2 * n + n + i, mask=i < n, other=0.0).to(tl.float32)  # (BLOCK,)
    tl.store(y + row * n + i, (gate / (1 + tl.exp2(-gate * LOG2E)) * value).to(y.dtype.element_ty), mask=i < n)


# ----------------------------------------------------------------------------------------------------------------------
# Launch timing
#
# From Hopper on, a kernel can be launched before the one ahead of it has ended (programmatic dependent launch). score, select
# and combine are: each loads what no running kernel writes, t and tables that the step before left, and then waits. That hides
# the launches and the first reads: score to combine take 25.0 us instead of 27.4 at 32k x 1, 93.6 instead of 96.3 at 32k x 8
# (one H100). write is launched normally, for what stands before it is PyTorch's. So is attend: it fills the multiprocessors
# evenly only if it finds them all empty, so select lets nobody in.

EARLY = tl.constexpr(
    os.environ.get("TRITON_INTERPRET") != "1"
    and torch.version.cuda is not None
    and torch.cuda.is_available()
    and torch.cuda.get_device_capability() >= (9, 0)
)
LAUNCH_EARLY = {"launch_pdl": True} if EARLY.value else {}


@triton.jit
def let_the_next_kernel_in():
    """Allows the next kernel to start. To be called only where all older kernels have ended: after the wait, or first thing in
    a kernel that is launched normally."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def wait_for_the_kernel_before():
    """Returns when all older kernels have ended. Before it nothing is stored, and nothing read that the kernel ahead writes."""
    if EARLY:
        gdc_wait()
