"""RetroAttention (Choi et al., ICLR 2026, arXiv 2508.09001), step by step in plain PyTorch.

Sparse decoding reads only the KV pages that matter to the newest query. RetroAttention uses these
pages once more, for the last few queries, which may not have seen them. It corrects their attention
outputs. The corrected hidden states enter the next layer, and their keys and values overwrite stale
ones. So a decode step carries W rows through every layer, the new token and W-1 past ones, and each
layer does this:

    1. write    rotate q and k, append the new row's K and V, overwrite those of the past rows,
                refresh the page bounds                                              (propagation)
    2. score    Quest's bound on q.k for each page                                     (selection)
    3. select   choose each KV head's top pages, look up when each was last loaded
                                                                               (exposure mask A)
    4. attend   one read of these pages serves all rows: the newest row attends to all,
                a past row only to those new to it                          (supplementary output)
    5. combine  merge a past row's supplement into its output so far, by log-sum-exp
                                                             (output cache: pop, update and push)

The functions of the same names below, the *ops*, are these five steps, and `RetroAttention` calls
them in this order. `kernels.py` holds a Triton twin of each, with the same signature. W=1 is Quest.
A dense layer runs ops 1, 4 (over all pages) and 5 (without the output cache).

Each decode step starts from the past rows' token ids again, so no residual stream is stored. A
correction in one layer changes the row's input to every layer above, where the new pass computes
the row's keys and values again.

`last_loaded` is the paper's exposure mask A (section 2.3), stored as a time: for each KV head and
page, the position t of the step that last loaded the page. It tells which rows have seen the page.
The row at position p, as long as it is in the window, takes part in every step from p on, and sees
each page that those steps load. So at step t it has seen a page exactly if one of the loads, hence
the last one, lies in p .. t-1. Until `select` records this step's load, no load is later than t-1,
so the page is new to the row exactly if last_loaded < p. One number per page serves all rows. (This
needs t to rise by exactly one from step to step.)

    An example: step 646 loads page 31, which step 644 loaded last. The rows of a window of four
    are 643 .. 646. Rows 643 and 644 saw the page in step 644: 644 < 643 and 644 < 644 are false.
    Row 645 came later: 644 < 645, so the page is new to it. Step 646 now sets last_loaded to 646.
    If step 647 loads the page again, it is new to no past row: 646 is not less than 644, 645 or
    646. (The first picture of the README shows these steps.)

Shapes: B batch, W window rows (the paper's w; newest last), P pages that the cache has room for
(the first t // ps + 1 are *held*, i.e. have tokens), ps page size, S number of selected pages (the
paper's k), n_head query heads, n_kv_head KV heads, G = n_head / n_kv_head, hs head size. `t` is the
position of the newest row, a 0-dim int64 tensor on the cache's device (an int in `put_rows` and in
the methods of `RetroConfig`). Row w stands at position p = t-W+1+w; j is the position of a key.
Rows before the start of the text (negative positions) write nothing and see nothing, and their
output is zero.

What a step reads, for each text and KV head, in vectors of hs numbers: a sparse layer reads the
bounds of the pages held (2 vectors per page) and K and V of the pages selected (2 ps per page); a
dense layer reads all K and V (2 (t+1)). The weights come in addition, once for all texts and rows
(paper, section 2.5). All else is small: scores and mask A are a number per page, the rows and the
output cache a few vectors per query head.
"""

import importlib.util
import os
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F


def need(condition, message: str) -> None:
    """Raises ValueError(message) unless `condition` holds; the message names value and range."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class RetroConfig:
    """What RetroAttention may read, and how far back it corrects.

    Raises ValueError if a value is out of range.
    """

    page_size: int = 16  # tokens per page; a power of two
    budget: float = 0.15  # fraction of the held pages that a step loads, in (0, 1] ...
    min_tokens: int = 256  # ... but at least this many tokens' worth of pages
    window: int = 2  # rows of a step, the new one included: the paper's w; 1 is Quest
    dense_layers: int = 2  # first layers that attend to all pages, as their attention is spread out
    impl: str = "auto"  # torch, triton, or auto: Triton on a GPU if it can run there

    def __post_init__(self):
        limits = {
            "page_size": (1, 1024),
            "min_tokens": (1, 2**31 - 1),
            "window": (1, 256),
            "dense_layers": (0, 2**31 - 1),
        }
        for name, (least, most) in limits.items():
            x = getattr(self, name)
            fits = type(x) is int and least <= x <= most
            need(fits, f"{name} must be an integer from {least} to {most}, not {x!r}")
        power_of_two = self.page_size & (self.page_size - 1) == 0
        need(power_of_two, f"page_size must be a power of two, not {self.page_size}")
        number = isinstance(self.budget, (int, float)) and not isinstance(self.budget, bool)
        need(number and 0 < self.budget <= 1, f"budget must be in (0, 1], not {self.budget!r}")
        known = self.impl in ("auto", "torch", "triton")
        need(known, f"impl must be auto, torch or triton, not {self.impl!r}")

    @property
    def millionths(self) -> int:
        """The budget in millionths. In floats 0.07 * 100 is 7.000000000000001, hence 8 pages."""
        return round(self.budget * 1_000_000)

    @property
    def min_pages(self) -> int:
        """min_tokens, in whole pages."""
        return -(-self.min_tokens // self.page_size)  # -(-a // b) is a / b rounded up

    def pages_held(self, t: int) -> int:
        """The number of held pages once t is written."""
        return t // self.page_size + 1

    def pages_allowed(self, held: int) -> int:
        """The larger of `budget` and `min_tokens`, in pages, if `held` pages have tokens."""
        return max(self.min_pages, -(-self.millionths * held // 1_000_000))

    def first_window_page(self, t: int) -> int:
        """The first page that the window t-W+1 .. t touches. It and all later pages are always
        loaded (our choice; the paper leaves it open), for two reasons. First, every row should see
        itself and its neighbours. Second, these pages may hold keys of positions after a past row,
        and such a key can raise the page's score. Later queries may decide which pages the row sees
        (that is the method), but later keys must not.
        """
        return max(0, t - self.window + 1) // self.page_size

    def pages_selected(self, t: int) -> int:
        """How many pages a KV head loads at position t: those allowed, plus the window's pages
        before the last page (so that they displace no others), at most all pages held."""
        held = self.pages_held(t)
        older = held - 1 - self.first_window_page(t)
        return min(held, self.pages_allowed(held) + older)

    def max_pages_selected(self, P: int) -> int:
        """An upper bound of `pages_selected` at all positions of a cache of P pages. Besides the
        newest page, W rows touch at most (W - 1) / ps pages, rounded up."""
        return min(P, self.pages_allowed(P) + -(-(self.window - 1) // self.page_size))


@dataclass
class LayerCache:
    """All that one layer remembers. In a dense layer the optional tensors are None.

    Position j is place j % ps of page j // ps. Pages lie one after the other, so flatten(2, 3)
    indexes the cache by position.
    """

    config: RetroConfig
    k: torch.Tensor  # (B, n_kv_head, P, ps, hs) rotated keys; the pages of a head lie together
    v: torch.Tensor  # (B, n_kv_head, P, ps, hs)
    bounds: torch.Tensor | None = None  # (B, n_kv_head, P, 2, hs) minimum, maximum of a page's keys
    last_loaded: torch.Tensor | None = None  # (B, n_kv_head, P) int32: mask A; -1: never loaded
    # The output cache. The row at position p has slot p % W, so no row ever moves. The paper keeps
    # W-1 rows. Ours has a slot more: step t still reads row t-W+1 while it stores row t.
    out: torch.Tensor | None = None  # (B, W, n_head, hs) outputs of the window's rows
    lse: torch.Tensor | None = None  # (B, W, n_head) natural log-sum-exp over the keys seen


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Scores, softmax and outputs are summed in float32; in float64 if the model is in float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def new_cache(
    config: RetroConfig,
    dense: bool,
    B: int,
    n_head: int,
    n_kv_head: int,
    hs: int,
    max_seq_len: int,
    device: torch.device | str,
    dtype: torch.dtype,
) -> LayerCache:
    """A cache for max_seq_len tokens. Keys, values and bounds are not initialised, because nothing
    unwritten ever reaches a result."""
    P = -(-max_seq_len // config.page_size)
    k = torch.empty(B, n_kv_head, P, config.page_size, hs, device=device, dtype=dtype)
    v = torch.empty_like(k)
    if dense:
        return LayerCache(config, k, v)
    acc = accumulator(dtype)
    return LayerCache(
        config,
        k,
        v,
        bounds=torch.empty(B, n_kv_head, P, 2, hs, device=device, dtype=dtype),
        last_loaded=torch.full((B, n_kv_head, P), -1, device=device, dtype=torch.int32),
        out=torch.zeros(B, config.window, n_head, hs, device=device, dtype=acc),
        lse=torch.full((B, config.window, n_head), -torch.inf, device=device, dtype=acc),
    )


def row_positions(t: torch.Tensor, W: int) -> torch.Tensor:
    """Positions of the window's rows, t-W+1 .. t."""
    return t - W + 1 + torch.arange(W, device=t.device)  # (W,)


def finite(lse: torch.Tensor) -> torch.Tensor:
    """Replaces -inf, the lse of an empty set of keys, by 0, because exp(-inf - 0) is 0, but
    exp(-inf - -inf) is NaN."""
    return lse.masked_fill(lse == -torch.inf, 0)


# --------------------------------------------------------------------------------------------------
# 1. write                     paper: section 2.1 (page bounds), section 2.4, Fig. 4 (propagation)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates neighbouring pairs of x (..., T, heads, hs) by the angles of its T positions; cos and
    sin (T, hs / 2)."""
    cos, sin = cos[:, None], sin[:, None]  # (T, 1, hs / 2)
    x1, x2 = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)  # (..., T, heads, hs / 2)
    return torch.stack((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1).flatten(-2).to(x.dtype)


def write(q, k, v, cos, sin, cache: LayerCache, t: torch.Tensor) -> torch.Tensor:
    """Rotates q and k, each row at its own position, and puts k and v into the cache.

    The newest row is appended. The past rows overwrite what the previous step wrote (the paper's
    propagation, section 2.4): same token, same position, better hidden state.
    q (B, W, n_head, hs), k and v (B, W, n_kv_head, hs), cos and sin (max_seq_len, hs / 2).
    Returns the rotated q.
    """
    W = q.shape[1]
    rows = row_positions(t, W).clamp(min=0)  # (W,)
    q = apply_rope(q, cos[rows], sin[rows])
    k = apply_rope(k, cos[rows], sin[rows])
    n = min(W, int(t) + 1)  # the rows that are not before the start of the text
    put_rows(k[:, -n:], v[:, -n:], cache, int(t))
    return q


def put_rows(k: torch.Tensor, v: torch.Tensor, cache: LayerCache, t: int) -> None:
    """Puts keys and values (B, T, n_kv_head, hs) of positions t-T+1 .. t into their pages, and
    recomputes the bounds of these pages."""
    ps = cache.config.page_size
    first = t + 1 - k.shape[1]
    cache.k.flatten(2, 3)[:, :, first : t + 1] = k.transpose(1, 2)
    cache.v.flatten(2, 3)[:, :, first : t + 1] = v.transpose(1, 2)
    if cache.bounds is not None:
        pages = slice(first // ps, t // ps + 1)
        j = torch.arange(pages.start * ps, pages.stop * ps, device=k.device).view(-1, ps, 1)
        cache.bounds[:, :, pages] = page_bounds(cache.k[:, :, pages], j <= t)


def page_bounds(keys: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The element-wise minimum and maximum of each page's valid keys: keys (..., ps, hs), valid
    (..., ps, 1) bool -> (..., 2, hs).

    Reads all keys of a page. A running minimum would stay a bound, but not a tight one, because it
    cannot rise when its key is overwritten. (Our choice.)
    """
    low = keys.masked_fill(~valid, torch.inf).amin(dim=-2)  # (..., hs)
    high = keys.masked_fill(~valid, -torch.inf).amax(dim=-2)  # (..., hs)
    return torch.stack((low, high), dim=-2)


# --------------------------------------------------------------------------------------------------
# 2. score                                                           paper: section 2.1, Eq. 1


def score(q: torch.Tensor, cache: LayerCache, t: torch.Tensor) -> torch.Tensor:
    """Quest's score sum_i max(q_i * min_i, q_i * max_i) of the newest row for each page, summed
    over the query heads g of a KV head.

    A head's score is an upper bound on its q.k in the page. The sum (our choice) bounds no head's
    q.k; it only orders the pages. With a = min_i <= b = max_i, the queries can be summed first:

        sum_g max(q_g a, q_g b) = a sum_g min(q_g, 0) + b sum_g max(q_g, 0)

    So a page costs one dot product of length 2 * hs. Only the newest row chooses: the step exists
    for its logits, and pages chosen for past rows would be extra reads.
    q (B, W, n_head, hs), rotated -> (B, n_kv_head, pages held) float.
    """
    held = cache.config.pages_held(int(t))
    acc = accumulator(q.dtype)
    newest = q[:, -1].unflatten(1, (cache.k.shape[1], -1)).to(acc)  # (B, n_kv_head, G, hs)
    negative = newest.clamp(max=0).sum(dim=2)  # (B, n_kv_head, hs) multiplies minima
    positive = newest.clamp(min=0).sum(dim=2)  # (B, n_kv_head, hs) multiplies maxima
    weights = torch.cat((negative, positive), dim=-1)  # (B, n_kv_head, 2 * hs)
    bounds = cache.bounds[:, :, :held].to(acc).flatten(3)  # (B, n_kv_head, pages held, 2 * hs)
    return (bounds @ weights[..., None]).squeeze(-1)


# --------------------------------------------------------------------------------------------------
# 3. select                               paper: section 2.1 (selection), section 2.3 (mask A)


def with_window_first(scores: torch.Tensor, config: RetroConfig, t: torch.Tensor) -> torch.Tensor:
    """A copy of scores (B, n_kv_head, pages held) where the pages that are always loaded score
    infinity."""
    scores = scores.clone()
    scores[..., config.first_window_page(int(t)) :] = torch.inf
    return scores


def select(
    scores: torch.Tensor, cache: LayerCache, t: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses the pages that this step loads, and records the load in cache.last_loaded.

    `scores` (B, n_kv_head, pages held) must be finite. Ties go to the lower page. Returns `pages`,
    ascending, and `loaded_before`, the last_loaded of each before this step; both
    (B, n_kv_head, S) int32.
    """
    S = cache.config.pages_selected(int(t))
    scores = with_window_first(scores, cache.config, t)
    # sort, because topk may return any of several equal pages
    ranked = scores.sort(dim=-1, descending=True, stable=True).indices  # (B, n_kv_head, pages held)
    pages = ranked[..., :S].sort(dim=-1).values  # (B, n_kv_head, S)
    loaded_before = cache.last_loaded.gather(2, pages)  # (B, n_kv_head, S)
    cache.last_loaded.scatter_(2, pages, int(t))
    return pages.int(), loaded_before


# --------------------------------------------------------------------------------------------------
# 4. attend                              paper: section 2.3, Eq. 2 (original, supplementary output)


def attend(
    q: torch.Tensor,
    cache: LayerCache,
    pages: torch.Tensor | None,
    loaded_before: torch.Tensor | None,
    t: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of all rows over the loaded pages. The row at p sees the key at j if

        j <= p               causal, also inside a page that a past row sees late (our choice)
        loaded_before < p    the row has not seen the page yet (proof at the top of this file)

    For the newest row, p = t, the second condition always holds. So one rule gives the original
    output of the newest row and the supplementary outputs of the past rows. Without `pages`, all
    pages held are loaded and new to every row (a dense layer; the prompt's last rows).

    q (B, W, n_head, hs), rotated -> o (1, B, W, n_head, hs), lse (1, B, W, n_head) float: one part;
    the kernel returns one per split. A row that sees nothing has o = 0 and lse = -inf.
    """
    B, W, n_head, hs = q.shape
    n_kv_head = cache.k.shape[1]
    ps = cache.config.page_size
    acc = accumulator(q.dtype)
    if pages is None:
        held = cache.config.pages_held(int(t))
        pages = torch.arange(held, device=q.device).expand(B, n_kv_head, held)
        loaded_before = torch.full_like(pages, -1)
        k = cache.k[:, :, :held]  # (B, n_kv_head, S, ps, hs)
        v = cache.v[:, :, :held]
    else:
        b = torch.arange(B, device=q.device)[:, None, None]
        h = torch.arange(n_kv_head, device=q.device)[:, None]
        k = cache.k[b, h, pages]  # (B, n_kv_head, S, ps, hs)
        v = cache.v[b, h, pages]

    j = pages[..., None] * ps + torch.arange(ps, device=q.device)  # (B, n_kv_head, S, ps)
    p = row_positions(t, W)[:, None, None]  # (W, 1, 1)
    causal = j[:, :, None] <= p  # (B, n_kv_head, W, S, ps)
    new = loaded_before[:, :, None, :, None] < p  # (B, n_kv_head, W, S, 1)
    visible = (causal & new).flatten(3)[..., None, :]  # (B, n_kv_head, W, 1, S * ps)

    # Places after t are not initialised and may be NaN, and 0 * NaN is NaN.
    v = v.masked_fill((j > t)[..., None], 0).flatten(2, 3).to(acc)  # (B, n_kv_head, S * ps, hs)
    k = k.flatten(2, 3).to(acc)  # (B, n_kv_head, S * ps, hs)
    # The W * G rows that share a KV head form one matrix.
    q = q.to(acc).unflatten(2, (n_kv_head, -1)).transpose(1, 2)  # (B, n_kv_head, W, G, hs)
    s = q.flatten(2, 3) @ k.mT * hs**-0.5  # (B, n_kv_head, W * G, S * ps)
    s = s.unflatten(2, (W, -1)).masked_fill(~visible, -torch.inf)  # (B, n_kv_head, W, G, S * ps)
    lse = s.logsumexp(dim=-1)  # (B, n_kv_head, W, G)
    weight = (s - finite(lse)[..., None]).exp()  # (B, n_kv_head, W, G, S * ps)
    o = (weight.flatten(2, 3) @ v).unflatten(2, (W, -1))  # (B, n_kv_head, W, G, hs)
    o = o.transpose(1, 2).reshape(1, B, W, n_head, hs)
    lse = lse.transpose(1, 2).reshape(1, B, W, n_head)
    return o, lse


# --------------------------------------------------------------------------------------------------
# 5. combine                      paper: section 2.3 (output cache), appendix C.2 (merged outputs)


def merge_by_lse(o: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges attention outputs over N disjoint sets of keys into the output over their union, which
    equals softmax attention over the union.

    o (N, ..., hs), lse (N, ...) -> o (..., hs), lse (...). An empty set, o = 0 and lse = -inf,
    changes nothing. It is what `attend` returns for a row to which no page is new.
    """
    total = lse.logsumexp(dim=0)  # (...)
    weight = (lse - finite(total)).exp()  # (N, ...)
    return (weight[..., None] * o).sum(dim=0), total


def combine(o: torch.Tensor, lse: torch.Tensor, cache: LayerCache, t: torch.Tensor) -> torch.Tensor:
    """Merges the parts o (N, B, W, n_head, hs), lse (N, B, W, n_head) with each other and with the
    cached outputs, and updates the cache. Returns the rows (B, W, n_head, hs) in the model's dtype.

    In the first sparse layer a row's q, k and v stay (but for rounding), so the result is exact
    attention over the union of the pages that the row has seen. In the layers above, a supplement
    uses the row's corrected query (our choice), but the cached output is from its earlier queries.
    Parts of different queries can still be merged, because each is normalised over its own keys
    and its lse is its weight.
    """
    if cache.out is None:
        return merge_by_lse(o, lse)[0].to(cache.k.dtype)
    W = o.shape[2]
    slots = row_positions(t, W) % W  # (W,)
    # Pop: the row at t-W has left the window, and the newest row takes its slot. The old
    # output is zeroed too: if infinite, a weight of 0 would not remove it, as 0 * inf is NaN.
    cache.lse[:, slots[-1]] = -torch.inf
    cache.out[:, slots[-1]] = 0
    o = torch.cat((o, cache.out[None, :, slots]))  # (N + 1, B, W, n_head, hs)
    lse = torch.cat((lse, cache.lse[None, :, slots]))  # (N + 1, B, W, n_head)
    o, lse = merge_by_lse(o, lse)
    cache.out[:, slots] = o  # update the past rows, push the newest
    cache.lse[:, slots] = lse
    return o.to(cache.k.dtype)


# --------------------------------------------------------------------------------------------------
# The module that the model calls


class RetroAttention:
    """One layer's cache and its attention. `prefill` starts a text, and each `decode` adds one
    position; the caller counts the positions. `ops` is the module whose functions run."""

    def __init__(
        self,
        config: RetroConfig,
        *,
        dense: bool,
        batch_size: int,
        n_head: int,
        n_kv_head: int,
        head_size: int,
        max_seq_len: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ):
        self.dense = dense
        self.n_head = n_head
        query_rows = config.window * n_head // n_kv_head
        self.ops = implementation(config.impl, torch.device(device), dtype, head_size, query_rows)
        self.cache = new_cache(
            config, dense, batch_size, n_head, n_kv_head, head_size, max_seq_len, device, dtype
        )

    def prefill(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Starts a text: stores the prompt's rotated keys and values. The caller computes the
        prompt's dense attention. q (B, T, n_head, hs), k and v (B, T, n_kv_head, hs), with T at
        most max_seq_len.

        Prefill loaded everything (our choice; the paper leaves it open). Each page counts as loaded
        at the last prompt position, and the output cache holds the prompt's last rows.
        """
        T = q.shape[1]
        W = self.cache.config.window
        cache = self.cache
        put_rows(k, v, cache, T - 1)
        if self.dense:
            return
        cache.last_loaded.fill_(-1)
        cache.last_loaded[:, :, : cache.config.pages_held(T - 1)] = T - 1
        cache.lse.fill_(-torch.inf)
        cache.out.zero_()
        # The last rows attend once more, because SDPA returns no log-sum-exp.
        q = F.pad(q[:, -W:], (0, 0, 0, 0, max(0, W - T), 0)).contiguous()  # (B, W, n_head, hs)
        t = torch.tensor(T - 1, device=q.device)
        o, lse = self.ops.attend(q, cache, None, None, t)
        self.ops.combine(o, lse, cache, t)

    def decode(self, q, k, v, cos, sin, t: torch.Tensor) -> torch.Tensor:
        """One step of all W rows, the newest at position t, which lies inside the cache.

        q (B, W, n_head, hs), k and v (B, W, n_kv_head, hs), not yet rotated; cos and sin
        (max_seq_len, hs / 2). Returns the attention outputs (B, W, n_head, hs). Raises ValueError
        for other shapes.
        """
        self.check_rows(q, k, v, t)
        ops, cache = self.ops, self.cache
        q = ops.write(q, k, v, cos, sin, cache, t)
        pages = loaded_before = None  # a dense layer attends to all pages
        if not self.dense:
            pages, loaded_before = ops.select(ops.score(q, cache, t), cache, t)
        o, lse = ops.attend(q, cache, pages, loaded_before, t)
        return ops.combine(o, lse, cache, t)

    def check_rows(self, q, k, v, t) -> None:
        """Guards against a decode loop that passes only the newest row, and so revises none."""
        B, n_kv_head, _, _, hs = self.cache.k.shape
        rows = {"q": (q, self.n_head), "k": (k, n_kv_head), "v": (v, n_kv_head)}
        for name, (x, heads) in rows.items():
            found = tuple(x.shape)
            shape = (B, self.cache.config.window, heads, hs)
            what = "(batch, window, heads, head size)"
            need(found == shape, f"{name} must have shape {shape}, {what}, not {found}")
        need(isinstance(t, torch.Tensor), f"t must be a 0-dim int64 tensor, not {type(t)}")


class OpsWrapper:
    """Wraps the ops of a sparse layer to watch, count or replace them:

        layer.ops = MyWrapper(layer.ops)

    A subclass overrides some ops and calls the originals in `self.ops`; everything else passes
    through. Prefill calls `attend` with pages=None; a subclass with a state resets it there. A
    subclass that reads the position on the host, e.g. by int(t), sets `capturable = False`; the
    decoder then steps without a CUDA graph. Wrap before the first step, because a captured graph
    keeps the ops that it was captured with.
    """

    def __init__(self, ops):
        self.ops = ops

    def __getattr__(self, name: str):
        return getattr(self.ops, name)


# --------------------------------------------------------------------------------------------------
# Beside attention: what a layer computes between its matrix products


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x * x) + eps) * weight over the last axis; x (..., dim), weight (dim,)."""
    return F.rms_norm(x, weight.shape, weight, eps)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * value; x (..., 2 * ffn_dim), the gates first -> (..., ffn_dim)."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


# --------------------------------------------------------------------------------------------------
# Which implementation runs

capturable = False  # the ops above read t on the host, which a CUDA graph cannot record


def implementation(
    impl: str, device: torch.device, dtype: torch.dtype, head_size: int, query_rows: int
):
    """The module whose functions run: this one, or kernels.py. "auto" chooses Triton on
    a GPU if it can run there. `query_rows` is W * G.

    Raises ValueError if Triton is requested but cannot run correctly.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    reason = None
    if importlib.util.find_spec("triton") is None:
        reason = "Triton is not installed (on Linux: pip install triton)"
    elif device.type != "cuda" and not interpreted:
        reason = f"on {device.type} set TRITON_INTERPRET=1 to run the kernels in the interpreter"
    elif dtype not in (torch.float32, torch.float16, torch.bfloat16):
        reason = f"dtype must be float32, float16 or bfloat16, not {dtype}"
    elif interpreted and dtype == torch.bfloat16:
        reason = "dtype must be float32 or float16 in the interpreter, not torch.bfloat16"
    elif head_size not in (16, 32, 64, 128):
        reason = f"head_size must be 16, 32, 64 or 128, not {head_size}"
    elif query_rows > 128:
        reason = f"window * n_head / n_kv_head must be at most 128, not {query_rows}"
    if impl == "torch" or (impl == "auto" and (device.type != "cuda" or reason)):
        return sys.modules[__name__]
    need(reason is None, f"impl triton: {reason}")
    import kernels

    return kernels
