"""RetroAttention (Choi et al., ICLR 2026, arXiv 2508.09001), step by step in plain PyTorch.

Sparse decoding reads only the KV pages that matter to the newest query. RetroAttention uses the pages once more: for the
last few queries, which may not have seen them. Their attention outputs are corrected, the corrected hidden states travel on,
and in the next layer they overwrite stale keys and values. A decode step therefore carries W rows through every layer, the
new token and W-1 past ones, and in each layer does this:

    1. write    rotate q and k, append the new row's K and V, overwrite those of the past rows, refresh the page bounds
    2. score    Quest's bound on q.k for each page, newest query, summed over a KV head's queries (selection)
    3. select   the top pages of each KV head, and when each was last loaded                      (exposure mask A)
    4. attend   one read of those pages serves all rows: the newest sees all of them,
                a past row only what it has never seen                                            (supplementary output)
    5. combine  merge past rows with their output so far, by log-sum-exp              (output cache: pop, update, push)

The functions of the same names below are these steps; `RetroAttention` calls them in this order. `kernels.py` holds a Triton
twin of each, with the same signature. W=1 is Quest. A layer that stays dense does 1, 4 over all pages, and 5 without a cache.

The past rows start each step from their token ids again. The residual stream is stored nowhere, and a correction in one layer
changes a row's input to every layer above: only a new pass through all of them revises the row's keys and values there.

`last_loaded` is the paper's exposure mask A, stored as a time: for each KV head and page, the position t of the step that last
loaded the page. It answers which rows have seen a page. The row at position p took part in every step from p on, and saw each
page that those steps loaded. So at step t it has seen a page exactly if some load lies in p .. t-1. The latest load is at most
t-1 until `select` records this step's, so that means last_loaded >= p: the page is new to the row exactly if last_loaded < p.
One number per page serves all rows. This needs t to rise by exactly one from step to step.

Shapes: B batch, W window rows (newest last), P pages that the cache has room for (the first t // ps + 1 are *held*: they
have tokens), ps page size, S selected pages, n_head query heads, n_kv_head KV heads, G = n_head / n_kv_head, hs head size.
`t` is the position of the newest row, a 0-dim int64 tensor on the cache's device (an int in `store`, `forget`, `Step` and the
methods of `RetroConfig`); row w stands at position p = t-W+1+w; j is the position of a key. Rows before the start of the text
(negative positions) write nothing and see nothing, and their output is zero.
"""

import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F


def need(condition, message: str) -> None:
    """For what a user can get wrong: ValueError with `message`, which names the value and what is allowed."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class RetroConfig:
    """What RetroAttention may read, and how far back it corrects. ValueError names a value that is out of range."""

    page_size: int = 16  # tokens per page; a power of two
    budget: float = 0.15  # share of the pages held that a step loads, in (0, 1]; the window's older pages come on top
    min_tokens: int = 256  # ... but no fewer than this many tokens' worth
    window: int = 2  # rows a step carries, the new one included: the paper's w; 1 is Quest
    dense_layers: int = 2  # the first layers attend densely, as in Quest: their attention is spread too widely for a selection
    impl: str = "auto"  # "torch", "triton", or "auto": Triton on a GPU where the kernels support the shape, else PyTorch

    def __post_init__(self):
        limits = {"page_size": (1, 1024), "min_tokens": (1, 2**31 - 1), "window": (1, 256), "dense_layers": (0, 2**31 - 1)}
        for name, (least, most) in limits.items():
            x = getattr(self, name)
            need(type(x) is int and least <= x <= most, f"{name} must be an integer from {least} to {most}, not {x!r}")
        need(self.page_size & (self.page_size - 1) == 0, f"page_size must be a power of two, not {self.page_size}")
        number = isinstance(self.budget, (int, float)) and not isinstance(self.budget, bool)
        need(number and 0 < self.budget <= 1, f"budget must be in (0, 1], not {self.budget!r}")
        need(self.impl in ("auto", "torch", "triton"), f"impl must be auto, torch or triton, not {self.impl!r}")

    @functools.cached_property
    def budget_ratio(self) -> tuple[int, int]:
        """The budget as it was written, 0.07 as 7 / 100: 0.07 of 100 pages is 7, where floats come to 7.000000000000001.

        With a denominator of at most a million, so that the kernels' 64-bit integers hold its product with any number of pages.
        """
        ratio = Fraction(str(self.budget)).limit_denominator(1_000_000)
        return ratio.numerator, ratio.denominator

    @property
    def min_pages(self) -> int:
        """Pages that hold min_tokens."""
        return -(-self.min_tokens // self.page_size)  # -(-a // b) is a / b rounded up

    def first_window_page(self, t: int) -> int:
        """The first page that the window t-W+1 .. t touches. From there on every page is always loaded: its keys are being
        rewritten, and which pages a past row meets must not depend on a later token's key. (Older pages hold no key later than
        any row of the window.)"""
        return max(0, t - self.window + 1) // self.page_size

    def pages_selected(self, t: int) -> int:
        """Pages that a KV head loads at position t: by `budget` or `min_tokens`, whichever is more, and on top the window's
        older pages, so that they displace no other page; but never more than are held."""
        held = t // self.page_size + 1
        share, whole = self.budget_ratio
        older = t // self.page_size - self.first_window_page(t)  # of the window's pages
        return min(held, max(self.min_pages, -(-share * held // whole)) + older)

    def kv_tokens(self, t: int) -> tuple[int, int, int]:
        """(held, loaded, bounds): what a layer holds after position t, what a sparse step at t loads of it, and what its
        choice of pages reads, in tokens per KV head, a key and a value each (in bench.py `layer_bytes` says it in bytes, and
        `step_bytes` adds the weights). Pages count whole, and a page's bounds are as large as one token. A dense layer keeps
        and reads `held`; a sparse layer keeps held + bounds and reads loaded + bounds.
        """
        pages = t // self.page_size + 1
        return pages * self.page_size, self.pages_selected(t) * self.page_size, pages

    def most_pages_selected(self, P: int) -> int:
        """Pages that a KV head loads at most, at any position of a cache of P pages: where the last one begins. Neither
        budget nor floor shrinks as pages are added, and within a page the window only moves off its older pages."""
        return self.pages_selected((P - 1) * self.page_size)


@dataclass
class LayerCache:
    """All that one layer remembers. A dense layer has no bounds, no exposure mask and no output cache: None.

    Position j is place j % ps of page j // ps. Pages lie one after the other, so flatten(2, 3) is the cache by position.
    """

    config: RetroConfig
    k: torch.Tensor  # (B, n_kv_head, P, ps, hs) rotated keys: one head's pages lie together
    v: torch.Tensor  # (B, n_kv_head, P, ps, hs)
    bounds: torch.Tensor | None = None  # (B, n_kv_head, P, 2, hs) element-wise minimum and maximum of a page's keys
    last_loaded: torch.Tensor | None = None  # (B, n_kv_head, P) int32: exposure mask A; -1: never loaded
    # The output cache, in the dtype that `accumulator` names: the row of position p has slot p % W.
    out: torch.Tensor | None = None  # (B, W, n_head, hs) outputs of the window's rows
    lse: torch.Tensor | None = None  # (B, W, n_head) natural-log sum of exp over the keys that a row has seen, -inf for none
    totals: torch.Tensor | None = None  # (B, n_kv_head, 2) int64: pages loaded, past rows' first sights of a page


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Scores, softmax and outputs are summed in float32; in float64 when the model is."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def new_cache(config: RetroConfig, dense: bool, B, n_head, n_kv_head, hs, max_seq_len, device, dtype) -> LayerCache:
    """A cache for max_seq_len tokens. Keys, values and bounds are not initialised: nothing unwritten ever reaches a result."""
    P, acc = -(-max_seq_len // config.page_size), accumulator(dtype)
    like = {"device": device, "dtype": dtype}
    kv = [torch.empty(B, n_kv_head, P, config.page_size, hs, **like) for _ in range(2)]
    if dense:
        return LayerCache(config, *kv)
    return LayerCache(
        config,
        *kv,
        bounds=torch.empty(B, n_kv_head, P, 2, hs, **like),
        last_loaded=torch.full((B, n_kv_head, P), -1, device=device, dtype=torch.int32),
        out=torch.zeros(B, config.window, n_head, hs, device=device, dtype=acc),
        lse=torch.full((B, config.window, n_head), -torch.inf, device=device, dtype=acc),
        totals=torch.zeros(B, n_kv_head, 2, device=device, dtype=torch.int64),
    )


def row_positions(t: torch.Tensor, W: int) -> torch.Tensor:
    """Positions of the window's rows, t-W+1 .. t."""
    return t - W + 1 + torch.arange(W, device=t.device)  # (W,)


# ----------------------------------------------------------------------------------------------------------------------
# 1. write


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates neighbouring pairs of x (..., T, heads, hs) by the angles of its T positions; cos, sin (T, hs / 2)."""
    cos, sin = cos[:, None], sin[:, None]  # (T, 1, hs / 2)
    x1, x2 = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)  # (..., T, heads, hs / 2)
    return torch.stack((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1).flatten(-2).to(x.dtype)


def write(q, k, v, cos, sin, cache: LayerCache, t: torch.Tensor) -> torch.Tensor:
    """Rotates q (B, W, n_head, hs) and k (B, W, n_kv_head, hs), each row at its own position, and puts k and v (both
    (B, W, n_kv_head, hs)) into the cache. cos, sin (max_seq_len, hs / 2).

    The newest row is appended. The past rows overwrite what the step before wrote (the paper's propagation): same token, same
    position, better hidden state. Returns the rotated q.
    """
    W = q.shape[1]
    rows = row_positions(t, W).clamp(min=0)  # (W,)
    q, k = apply_rope(q, cos[rows], sin[rows]), apply_rope(k, cos[rows], sin[rows])
    real = min(W, int(t) + 1)  # without the rows before the start
    store(k[:, -real:], v[:, -real:], cache, int(t))
    return q


def store(k: torch.Tensor, v: torch.Tensor, cache: LayerCache, t: int) -> None:
    """Puts keys and values (B, T, n_kv_head, hs) of positions t-T+1 .. t into their pages and refreshes those pages' bounds."""
    first, ps = t + 1 - k.shape[1], cache.k.shape[3]
    cache.k.flatten(2, 3)[:, :, first : t + 1] = k.transpose(1, 2)
    cache.v.flatten(2, 3)[:, :, first : t + 1] = v.transpose(1, 2)
    if cache.bounds is not None:
        # Over all keys of the page again. A running minimum would stay a bound, but no longer a tight one: it cannot rise when
        # the key that set it is overwritten.
        touched = slice(first // ps, t // ps + 1)
        keys = cache.k[:, :, touched]  # (B, n_kv_head, pages, ps, hs)
        j = torch.arange(touched.start * ps, touched.stop * ps, device=k.device).view(-1, ps, 1)
        cache.bounds[:, :, touched, 0] = keys.masked_fill(j > t, torch.inf).amin(dim=3)
        cache.bounds[:, :, touched, 1] = keys.masked_fill(j > t, -torch.inf).amax(dim=3)


# ----------------------------------------------------------------------------------------------------------------------
# 2. score


def score(q: torch.Tensor, cache: LayerCache, t: torch.Tensor) -> torch.Tensor:
    """Quest's bound sum_i max(q_i * min_i, q_i * max_i) of the newest row, summed over the query heads of a KV head.

    A head's own bound is never below its largest q.k in the page; the sum only ranks the pages. A positive q_i picks the
    maximum and a negative one the minimum, so the sum over the group moves inside: one dot product per page, 2 * hs long. Only
    the newest row chooses: its logits are what the step is for, and pages chosen by past rows would be read in addition.
    q (B, W, n_head, hs), rotated -> (B, n_kv_head, pages held) float.
    """
    held, acc = int(t) // cache.k.shape[3] + 1, accumulator(q.dtype)
    newest = q[:, -1].unflatten(1, (cache.k.shape[1], -1)).to(acc)  # (B, n_kv_head, G, hs)
    picks = torch.stack((newest.clamp(max=0).sum(2), newest.clamp(min=0).sum(2)), dim=2)  # (B, n_kv_head, 2, hs)
    return (cache.bounds[:, :, :held].to(acc).flatten(3) @ picks.flatten(2)[..., None]).squeeze(-1)


# ----------------------------------------------------------------------------------------------------------------------
# 3. select


def always_loaded(scores: torch.Tensor, config: RetroConfig, t: torch.Tensor) -> torch.Tensor:
    """A copy of scores (B, n_kv_head, pages held) in which the pages that are always loaded come first: they score infinity."""
    scores = scores.clone()
    scores[..., config.first_window_page(int(t)) :] = torch.inf
    return scores


def select(scores: torch.Tensor, cache: LayerCache, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pages that this step loads, ascending, and when each was last loaded before: two of (B, n_kv_head, S) int32.

    `scores` (B, n_kv_head, pages held) must be finite. Ties go to the lower page. Then cache.last_loaded says t for the pages
    selected.
    """
    config, S = cache.config, cache.config.pages_selected(int(t))
    # sort and not topk, which may return any of several equal pages
    ranked = always_loaded(scores, config, t).sort(dim=-1, descending=True, stable=True).indices  # (B, n_kv_head, pages held)
    pages = ranked[..., :S].sort(dim=-1).values  # (B, n_kv_head, S)
    last_loaded = cache.last_loaded.gather(2, pages)  # (B, n_kv_head, S)
    cache.last_loaded.scatter_(2, pages, int(t))

    # For the report of effective exposure; `attend` applies the same rule to the keys. A past row sees a page for the first
    # time if the page does not begin after the row, and was not loaded since the row's own step.
    past = row_positions(t, config.window)[:-1, None]  # (W-1, 1)
    new = (pages[..., None, :] * config.page_size <= past) & (last_loaded[..., None, :] < past)  # (B, n_kv_head, W-1, S)
    cache.totals[..., 0] += S
    cache.totals[..., 1] += new.sum((2, 3))
    return pages.int(), last_loaded


# ----------------------------------------------------------------------------------------------------------------------
# 4. attend


def attend(q, cache: LayerCache, pages: torch.Tensor | None, last_loaded: torch.Tensor | None, t: torch.Tensor):
    """Softmax attention of all rows over the pages loaded: the row at position p sees the key at position j if

        j <= p             it is causal, also inside a page that a past row meets for the first time
        last_loaded < p    the row has not seen the page: neither at its own step nor at one since (proof at the top)

    For the newest row, p = t, the second holds for every page: original output and supplementary outputs are one rule.
    Without `pages` all pages held are loaded and new to every row (a dense layer, and the end of the prompt).

    q (B, W, n_head, hs), rotated -> o (1, B, W, n_head, hs), lse (1, B, W, n_head) float: a single part where the kernel
    returns one for each of its splits. A row that sees nothing has o = 0 and lse = -inf.
    """
    B, W, n_head, hs = q.shape
    n_kv_head, ps, acc = cache.k.shape[1], cache.k.shape[3], accumulator(q.dtype)
    if pages is None:
        held = int(t) // ps + 1
        pages = torch.arange(held, device=q.device).expand(B, n_kv_head, held)
        last_loaded = torch.full_like(pages, -1)
        k, v = cache.k[:, :, :held], cache.v[:, :, :held]
    else:
        b = torch.arange(B, device=q.device)[:, None, None]
        h = torch.arange(n_kv_head, device=q.device)[:, None]
        k, v = cache.k[b, h, pages], cache.v[b, h, pages]  # (B, n_kv_head, S, ps, hs)
    j = pages[..., None] * ps + torch.arange(ps, device=q.device)  # (B, n_kv_head, S, ps)
    p = row_positions(t, W)[:, None, None]  # (W, 1, 1)
    visible = (j[:, :, None] <= p) & (last_loaded[:, :, None, :, None] < p)  # (B, n_kv_head, W, S, ps)
    visible = visible.flatten(3)[..., None, :]  # (B, n_kv_head, W, 1, S * ps)

    k = k.flatten(2, 3).to(acc)  # (B, n_kv_head, S * ps, hs)
    # What lies after position t was never written and may be NaN, which a weight of zero would not remove.
    v = v.masked_fill((j > t)[..., None], 0).flatten(2, 3).to(acc)
    # The W * G rows that share a KV head, one below the other.
    q = q.to(acc).unflatten(2, (n_kv_head, -1)).transpose(1, 2).flatten(2, 3)  # (B, n_kv_head, W * G, hs)
    s = (q @ k.mT * hs**-0.5).unflatten(2, (W, -1)).masked_fill(~visible, -torch.inf)  # (B, n_kv_head, W, G, S * ps)
    lse = s.logsumexp(dim=-1)  # (B, n_kv_head, W, G)
    # Where nothing is visible, exp(-inf - lowest) = 0 and not exp(-inf + inf) = NaN.
    weight = (s - lse.clamp(min=torch.finfo(acc).min)[..., None]).exp()
    o = (weight.flatten(2, 3) @ v).unflatten(2, (W, -1))  # (B, n_kv_head, W, G, hs)
    return o.transpose(1, 2).reshape(1, B, W, n_head, hs), lse.transpose(1, 2).reshape(1, B, W, n_head)


# ----------------------------------------------------------------------------------------------------------------------
# 5. combine


def merge(o: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention outputs over N disjoint sets of keys -> the output over all of them: the same as softmax over the union.

    o (N, ..., hs), lse (N, ...) -> o (..., hs), lse (...). An empty set, o = 0 and lse = -inf, changes nothing;
    it is what `attend` returns for a row to which nothing is new. (In the kernels: `seen` in attend, `finite` in combine.)
    """
    total = lse.logsumexp(dim=0)
    weight = (lse - total.clamp(min=torch.finfo(lse.dtype).min)).exp()  # (N, ...) 0, not NaN, where all sets are empty
    return (weight[..., None] * o).sum(dim=0), total


def combine(o: torch.Tensor, lse: torch.Tensor, cache: LayerCache, t: torch.Tensor) -> torch.Tensor:
    """Merges the parts o (N, B, W, n_head, hs), lse (N, B, W, n_head) with each other and with the output cache, in place. In
    the first sparse layer a row's output is then exact attention over the union of the pages it has seen; above, it
    approximates that, as q, K and V change meanwhile.

    The cache has a slot for each row of the window, position p in slot p % W, so that no row ever moves. Returns the merged
    rows (B, W, n_head, hs) in the dtype of the model.
    """
    if cache.out is None:
        return merge(o, lse)[0].to(cache.k.dtype)
    slots = row_positions(t, o.shape[2]) % o.shape[2]  # (W,)
    # Pop: the row of t-W has left the window; the newest row takes its slot. Zero the output, too: 0 times inf is NaN.
    cache.lse[:, slots[-1]], cache.out[:, slots[-1]] = -torch.inf, 0
    o, lse = merge(torch.cat((o, cache.out[None, :, slots])), torch.cat((lse, cache.lse[None, :, slots])))
    cache.out[:, slots], cache.lse[:, slots] = o, lse  # update the past rows, push the newest
    return o.to(cache.k.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# The module that the model calls


def implementation(impl: str, device: torch.device, dtype: torch.dtype, head_size: int, query_rows: int):
    """The module whose `write` ... `combine` run: this one, or kernels.py. "auto" takes Triton on a GPU if it can do the shape.

    `query_rows` is W * G. ValueError if Triton is asked for and cannot run, or would run wrongly.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    reason = None
    if importlib.util.find_spec("triton") is None:
        reason = "Triton is not installed on this machine (there are builds for Linux: pip install triton)"
    elif device.type != "cuda" and not interpreted:
        reason = f"on {device.type} set TRITON_INTERPRET=1, which runs the kernels in Triton's interpreter"
    elif dtype not in (torch.float32, torch.float16, torch.bfloat16) or (interpreted and dtype == torch.bfloat16):
        reason = f"dtype must be float32, float16 or, outside of the interpreter, bfloat16, not {dtype}"
    elif head_size not in (16, 32, 64, 128):
        reason = f"head_size must be 16, 32, 64 or 128, not {head_size}"
    elif query_rows > 128:
        reason = f"window * n_head / n_kv_head must be at most 128, not {query_rows}: more rows do not fit the registers"
    if impl == "torch" or (impl == "auto" and (device.type != "cuda" or reason)):
        return sys.modules[__name__]
    need(reason is None, f"impl triton: {reason}")
    import kernels

    return kernels


class RetroAttention:
    """One layer's cache and its attention: `prefill` starts a text, each `decode` adds a position; the caller counts them."""

    def __init__(
        self, config: RetroConfig, *, dense: bool, batch_size: int, n_head: int, n_kv_head: int, head_size: int,
        max_seq_len: int, device: torch.device | str, dtype: torch.dtype,
    ):  # fmt: skip
        self.dense = dense
        query_rows = config.window * n_head // n_kv_head
        self.ops = implementation(config.impl, torch.device(device), dtype, head_size, query_rows)
        self.cache = new_cache(config, dense, batch_size, n_head, n_kv_head, head_size, max_seq_len, device, dtype)
        # Called after each decode step of a sparse layer. It reads the position on the host: a step with a hook cannot be part
        # of a CUDA graph.
        self.hook: Callable[[Step], None] | None = None

    def prefill(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Starts a text: stores the prompt's rotated keys and values. The prompt itself attends densely, outside of here.

        Prefill loaded everything: each page counts as loaded at the last prompt position, and the window starts filled with
        the prompt's last rows, as if a dense step had ended it. q (B, T, n_head, hs), k and v (B, T, n_kv_head, hs); T may
        not be more than the cache was made for.
        """
        T, W, cache = q.shape[1], self.cache.config.window, self.cache
        store(k, v, cache, T - 1)
        if self.dense:
            return
        self.forget(T - 1)
        cache.totals.zero_()
        q = F.pad(q[:, -W:], (0, 0, 0, 0, max(0, W - T), 0)).contiguous()  # (B, W, n_head, hs)
        t = torch.tensor(T - 1, device=q.device)
        self.ops.combine(*self.ops.attend(q, cache, None, None, t), cache, t)

    def forget(self, t: int) -> None:
        """Forgets the rows' outputs; every page held at position t counts as loaded at t."""
        if not self.dense:
            self.cache.last_loaded.fill_(-1)
            self.cache.last_loaded[:, :, : t // self.cache.config.page_size + 1] = t
            self.cache.lse.fill_(-torch.inf)
            self.cache.out.zero_()

    def decode(self, q, k, v, cos, sin, t: torch.Tensor) -> torch.Tensor:
        """One step of all W rows: q (B, W, n_head, hs), k and v (B, W, n_kv_head, hs), not yet rotated, the newest row at
        position t, inside the cache; cos and sin (max_seq_len, hs / 2). Returns the attention outputs (B, W, n_head, hs)."""
        cache, ops = self.cache, self.ops
        scores = pages = last_loaded = None
        watched = self.hook is not None and not self.dense
        before = past_rows(cache, t) if watched else None
        q = ops.write(q, k, v, cos, sin, cache, t)
        if not self.dense:
            scores = ops.score(q, cache, t)
            pages, last_loaded = ops.select(scores, cache, t)
        o, lse = ops.attend(q, cache, pages, last_loaded, t)
        o = ops.combine(o, lse, cache, t)
        if watched:
            # The kernels' lists have unused places at their ends.
            S, held = cache.config.pages_selected(int(t)), int(t) // cache.config.page_size + 1
            after = past_rows(cache, t)
            self.hook(Step(int(t), scores[..., :held], pages[..., :S], last_loaded[..., :S], before, after))
        return o


# ----------------------------------------------------------------------------------------------------------------------
# Beside attention: what a layer computes between its matrix products


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x * x) + eps) * weight over the last axis; x (..., dim), weight (dim,)."""
    return F.rms_norm(x, weight.shape, weight, eps)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * value; x (..., 2 * ffn_dim), the gates first -> (..., ffn_dim)."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


# ----------------------------------------------------------------------------------------------------------------------
# For tracing: what a step changed


@dataclass
class PastRows:
    """A copy of what a layer holds of the window's past rows, oldest first: R = W-1 of them, fewer where the text starts."""

    k: torch.Tensor  # (B, n_kv_head, R, hs) rotated
    v: torch.Tensor  # (B, n_kv_head, R, hs)
    out: torch.Tensor  # (B, R, n_head, hs) the output cache's
    lse: torch.Tensor  # (B, R, n_head)


@dataclass
class Step:
    """What one decode step did in one sparse layer. `RetroAttention.hook` is called with it; `sample.py --trace` draws it."""

    t: int  # position of the newest row; those of the past rows are t-R .. t-1
    scores: torch.Tensor  # (B, n_kv_head, pages held)
    pages: torch.Tensor  # (B, n_kv_head, S) int32: the pages loaded, ascending
    last_loaded: torch.Tensor  # (B, n_kv_head, S) int32: the step that loaded each before, as `select` found it
    before: PastRows  # as the step before left them
    after: PastRows  # K and V overwritten, supplementary outputs merged in


def past_rows(cache: LayerCache, t: torch.Tensor) -> PastRows:
    """Of a sparse layer. Indexing with a tensor copies: what the layer does next does not change them."""
    rows = row_positions(t, cache.config.window)[:-1]  # (W-1,)
    rows = rows[rows >= 0]  # (R,)
    slots = rows % cache.config.window
    return PastRows(
        cache.k.flatten(2, 3)[:, :, rows], cache.v.flatten(2, 3)[:, :, rows], cache.out[:, slots], cache.lse[:, slots]
    )
