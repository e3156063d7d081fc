"""Measures rivals and ablations in the table of bench.py quality: python -m extras.rivals

A rival is another way to decode, written to be read beside its paper. An ablation is RetroAttention
with one of its steps replaced, which shows what that step is worth. Options, tables and the JSON
line are those of `bench.py quality`; --rivals and --ablations choose the rows.

All rivals have Quest's budget at every step: as many tokens as Quest's pages hold when the last
page is full. (If the budget grows with the text, a rival that evicts tokens can add only new ones.)
Prefill is dense for all, and so are the first `dense_layers`. `kv_share` also counts what a rival
reads beyond the budget: page bounds and dense passes.

Shapes as in retro_attention.py; T is a number of keys.
"""

import argparse
import copy
import sys
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

import bench
import retro_attention
import sample
from bench import Method
from model import Decoder, Llama
from retro_attention import LayerCache, OpsWrapper, RetroConfig, apply_rope, with_window_first

SINKS = 4  # first tokens that StreamingLLM keeps, because they absorb excess attention
REFRESH = 32  # steps from one dense pass of RefreshKV or ReSA to the next
RECENT = 32  # newest tokens that MorphKV always keeps, and whose queries rank the older ones

# --------------------------------------------------------------------------------------------------
# Rivals that read tokens


class Rival:
    """Stands in for the RetroAttention of a sparse layer, on the same cache. Evicted tokens stay in
    memory, but are not read again.

    A subclass decides which tokens are `visible` to a step, and may `learn` from their weights.
    """

    ops = retro_attention
    dense = False

    def __init__(self, cache: LayerCache):
        self.cache = cache

    @classmethod
    def decoder(cls, model: Llama, B: int, retro: RetroConfig, length: int) -> Decoder:
        """A decoder whose sparse layers are of this class."""
        decoder = Decoder(model, B, retro, length)
        layers = decoder.layers
        decoder.layers = [layer if layer.dense else cls(layer.cache) for layer in layers]
        return decoder

    @staticmethod
    def kv_share(retro: RetroConfig, n_layer: int, steps: range) -> float:
        """What the decode steps at these positions read, as a share of full attention's bytes."""
        return share(retro, n_layer, steps, sum(map(retro.pages_selected, steps)))

    def prefill(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self.prompt_len = k.shape[1]
        t = self.prompt_len - 1
        retro_attention.put_rows(k, v, self.cache, t)
        _, weight = attention(q[:, -1:], *self.tokens(t))
        self.learn(weight, t)

    def decode(self, q, k, v, cos, sin, t: torch.Tensor) -> torch.Tensor:
        q = retro_attention.write(q, k, v, cos, sin, self.cache, t)
        t = int(t)
        o, weight = attention(q, *self.tokens(t), self.visible(t))
        self.learn(weight, t)
        return o

    def visible(self, t: int) -> torch.Tensor | None:
        """What the query at t may read: bool, broadcastable to (B, n_kv_head, t+1). None is all."""

    def learn(self, weight: torch.Tensor, t: int) -> None:
        """Receives the weights of the query at t, (B, n_kv_head, G, t+1). A text's first weights
        are those of the prompt's last query."""

    def allowed(self, t: int) -> int:
        """Tokens that may be read at position t."""
        config = self.cache.config
        return config.pages_selected(t) * config.page_size

    def tokens(self, t: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of positions 0 .. t, (B, n_kv_head, t+1, hs) each."""
        k = self.cache.k.flatten(2, 3)
        v = self.cache.v.flatten(2, 3)
        return k[:, :, : t + 1], v[:, :, : t + 1]


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of one rotated row q (B, 1, n_head, hs) over k and v (B, n_kv_head, T, hs),
    without the keys that are not `visible` (bool, broadcastable to (B, n_kv_head, T)).

    Returns the output (B, 1, n_head, hs) and the weights (B, n_kv_head, G, T).
    """
    acc = retro_attention.accumulator(q.dtype)
    rows = q[:, 0].unflatten(1, (k.shape[1], -1)).to(acc)  # (B, n_kv_head, G, hs)
    s = rows @ k.to(acc).mT * q.shape[-1] ** -0.5  # (B, n_kv_head, G, T)
    if visible is not None:
        s = s.masked_fill(~visible[:, :, None], -torch.inf)
    weight = s.softmax(dim=-1)  # (B, n_kv_head, G, T)
    o = weight @ v.to(acc)  # (B, n_kv_head, G, hs)
    return o.flatten(1, 2)[:, None].to(q.dtype), weight


def share(retro: RetroConfig, n_layer: int, steps: range, pages: float) -> float:
    """`Rival.kv_share`, given the pages that a KV head of a sparse layer reads in all `steps`."""
    held = sum(map(retro.pages_held, steps))
    dense = retro.dense_layers
    return (dense * held + (n_layer - dense) * pages) / (n_layer * held)


def dense_steps(steps: range) -> range:
    """The steps with a dense pass."""
    return steps[REFRESH - 1 :: REFRESH]


class StreamingLLM(Rival):
    """Keeps the first 4 tokens and the newest, renumbered as if nothing had stood in between (Xiao
    et al., ICLR 2024, arXiv 2309.17453).

    Only distances matter to RoPE. So instead of renumbering all tokens, the first 4, the sinks,
    move forward to just before the recent ones.
    """

    def prefill(self, q, k, v):
        super().prefill(q, k, v)
        self.first = SINKS  # start of recent tokens

    def decode(self, q, k, v, cos, sin, t):
        q = retro_attention.write(q, k, v, cos, sin, self.cache, t)
        t = int(t)
        # It never goes back, even if the budget grows, because evicted tokens are gone.
        self.first = max(self.first, t + 1 - max(1, self.allowed(t) - SINKS))
        k, v = self.tokens(t)
        moved = slice(self.first - SINKS, self.first - SINKS + 1)
        sinks = k[:, :, :SINKS].transpose(1, 2)  # (B, 4, n_kv_head, hs)
        sinks = apply_rope(sinks, cos[moved], sin[moved]).transpose(1, 2)  # (B, n_kv_head, 4, hs)
        k = torch.cat((sinks, k[:, :, self.first :]), dim=2)  # (B, n_kv_head, T, hs)
        v = torch.cat((v[:, :, :SINKS], v[:, :, self.first :]), dim=2)  # (B, n_kv_head, T, hs)
        return attention(q, k, v)[0]


class Evicting(Rival):
    """Evicts tokens after each step. `kept`, (B, n_kv_head or 1, t+1) bool, tells which remain."""

    def visible(self, t):
        self.kept = F.pad(self.kept, (0, 1), value=True)
        return self.kept

    def keep_best(self, importance: torch.Tensor, t: int) -> None:
        """Keeps as many of the kept tokens as the next step may read, minus one for the token that
        it adds. `importance`, (B, n_kv_head or 1, t+1), is at least 0."""
        if t < self.prompt_len:
            self.kept = torch.ones_like(importance, dtype=torch.bool)
        importance = importance.masked_fill(~self.kept, -1)
        best = importance.topk(min(t + 1, self.allowed(t + 1) - 1)).indices
        self.kept &= torch.zeros_like(self.kept).scatter(2, best, True)


class TOVA(Evicting):
    """Evicts the token with the lowest attention of the newest query, averaged over the layer's
    heads (Oren et al., EMNLP 2024, arXiv 2401.06104)."""

    def learn(self, weight, t):
        self.keep_best(weight.mean(dim=(1, 2))[:, None], t)


class MorphKV(Evicting):
    """Keeps the last 32 tokens and, of the older ones, those with the most attention of the last 32
    queries (Ghadia et al., ICML 2025, arXiv 2503.00979).

    The paper offers the sum or the maximum over these queries. Here it is the sum, also over the
    query heads of a KV head, which has its own set. Our choices: a query's weights are those of
    its own step, over all that it read; an evicted token no longer counts; if the budget is smaller
    than the window, the newest tokens remain.
    """

    def prefill(self, q, k, v):
        T = k.shape[1]
        k_by_head = k.transpose(1, 2)  # (B, n_kv_head, T, hs)
        v_by_head = v.transpose(1, 2)  # (B, n_kv_head, T, hs)
        self.recent = deque(maxlen=RECENT)  # weights per query: (B, n_kv_head, t+1)
        for t in range(max(0, T - RECENT), T - 1):
            row = q[:, t : t + 1]
            _, weight = attention(row, k_by_head[:, :, : t + 1], v_by_head[:, :, : t + 1])
            self.recent.append(weight.sum(dim=2))
        super().prefill(q, k, v)  # it learns from the last query

    def learn(self, weight, t):
        self.recent.append(weight.sum(dim=2))
        importance = sum(F.pad(x, (0, t + 1 - x.shape[2])) for x in self.recent)
        n = min(RECENT, t + 1)
        # Larger than any sum of weights, and largest for the newest.
        importance[..., -n:] = 1e6 + torch.arange(n, device=weight.device)
        self.keep_best(importance, t)


class RefreshKV(Rival):
    """Reads a small set of tokens; every 32nd step reads all, and their attention determines the
    next set (Xu et al., ACL 2025, arXiv 2411.05787).

    Each KV head has its own set: the tokens with the most attention of its query heads, and all
    tokens since that step.
    """

    @staticmethod
    def kv_share(retro, n_layer, steps):
        full = dense_steps(steps)
        small = sum(map(retro.pages_selected, steps)) - sum(map(retro.pages_selected, full))
        return share(retro, n_layer, steps, small + sum(map(retro.pages_held, full)))

    def refreshes(self, t: int) -> bool:
        return (t - self.prompt_len + 1) % REFRESH == 0  # also at the prompt's last token

    def visible(self, t):
        if self.refreshes(t):
            return None
        # Larger than any weight, and largest for the newest. So as tokens arrive, the least
        # important of the set make room.
        self.importance = F.pad(self.importance, (0, 1), value=1 + t)  # (B, n_kv_head, t+1)
        best = self.importance.topk(min(t + 1, self.allowed(t))).indices
        return torch.zeros_like(self.importance, dtype=torch.bool).scatter(2, best, True)

    def learn(self, weight, t):
        if self.refreshes(t):
            self.importance = weight.mean(dim=2)  # (B, n_kv_head, t+1)


# --------------------------------------------------------------------------------------------------
# Rivals that change Quest


class SelectionReuse(OpsWrapper):
    """Quest that chooses pages only at every second step; the step in between loads the pages of
    the step before (a baseline of the RetroAttention paper).

    The scores are kept. A page begun since then displaces the page with the lowest score.
    """

    capturable = False

    @staticmethod
    def decoder(model: Llama, B: int, retro: RetroConfig, length: int) -> Decoder:
        return bench.wrap(Decoder(model, B, retro, length), SelectionReuse)

    @staticmethod
    def kv_share(retro, n_layer, steps):
        bounds = sum(map(retro.pages_held, steps[::2])) / retro.page_size  # as large as one token
        return share(retro, n_layer, steps, sum(map(retro.pages_selected, steps)) + bounds)

    def attend(self, q, cache, pages, loaded_before, t):
        if pages is None:  # prefill
            self.prompt_len = int(t) + 1
        return self.ops.attend(q, cache, pages, loaded_before, t)

    def score(self, q, cache, t):
        if (int(t) - self.prompt_len) % 2 == 0:
            scores = with_window_first(self.ops.score(q, cache, t), cache.config, t)
            # No infinity: a page always loaded now must not outrank one that is always loaded at
            # the next step.
            self.scores = scores.clamp(max=1e30)  # (B, n_kv_head, pages held)
        begun = cache.config.pages_held(int(t)) - self.scores.shape[2]
        return F.pad(self.scores, (0, begun))  # `select` always loads a page begun since


class ReSA(Decoder):
    """Quest, and every 32 steps a dense pass over the last 32 tokens that overwrites their keys and
    values (Sun et al., Rectified Sparse Attention, 2025, arXiv 2506.04108)."""

    @staticmethod
    def kv_share(retro, n_layer, steps):
        again = sum(map(retro.pages_held, dense_steps(steps)))  # in all layers
        return sample.kv_share(retro, n_layer, steps) + again / sum(map(retro.pages_held, steps))

    def prefill(self, idx):
        self.prompt_len = idx.shape[1]
        self.twins = [copy.copy(layer) for layer in self.layers]
        for twin in self.twins:  # the same memory, attended to densely, without an output cache
            twin.dense = True
            config = replace(twin.cache.config, window=REFRESH)
            twin.cache = replace(twin.cache, config=config, out=None, lse=None)
        return super().prefill(idx)

    @torch.inference_mode()
    def step(self, token):
        logits = super().step(token)
        end = self.position + 1
        if (end - self.prompt_len) % REFRESH == 0:
            rows = self.tokens[:, end - REFRESH : end]  # (B, 32)
            self.model.hidden(rows, *self.rope, self.twins, self.t)
        return logits


RIVALS = {  # name -> the `make` and `kv_share` of its Method
    "StreamingLLM": (StreamingLLM.decoder, StreamingLLM.kv_share),
    "TOVA": (TOVA.decoder, TOVA.kv_share),
    "MorphKV": (MorphKV.decoder, MorphKV.kv_share),
    "selection reuse": (SelectionReuse.decoder, SelectionReuse.kv_share),
    "RefreshKV": (RefreshKV.decoder, RefreshKV.kv_share),
    "ReSA": (ReSA, ReSA.kv_share),
}


# --------------------------------------------------------------------------------------------------
# Ablations, which run through the kernels, too


class OneChoice(OpsWrapper):
    """A layer chooses the same pages for all its KV heads, by the sum of their scores."""

    def score(self, q, cache, t):
        scores = self.ops.score(q, cache, t)  # (B, n_kv_head, P)
        return scores.sum(dim=1, keepdim=True).expand_as(scores).contiguous()


class FirstQuery(OpsWrapper):
    """A past row's supplement uses the query that it had as the newest row, not a fresh one."""

    q = None  # (B, W, n_head, hs); its memory stays the same, because a CUDA graph records it

    def attend(self, q, cache, pages, loaded_before, t):
        if self.q is None:
            self.q = torch.empty_like(q)
        if pages is not None:  # not prefill, which starts the window with the prompt's last rows
            q = torch.cat((self.q[:, 1:], q[:, -1:]), dim=1)  # (B, W, n_head, hs)
        self.q.copy_(q)
        return self.ops.attend(q, cache, pages, loaded_before, t)


ABLATIONS = {"one choice": OneChoice, "first query": FirstQuery}


def ablated(wrapper: Callable, model: Llama, B: int, retro: RetroConfig, length: int) -> Decoder:
    return bench.wrap(bench.counting(model, B, retro, length), wrapper)


# --------------------------------------------------------------------------------------------------
# The command


def methods(
    retro: RetroConfig, windows: Iterable[int], rivals: Iterable[str], ablations: Iterable[str]
) -> dict[str, Method]:
    """Name -> method: each ablation for each window, then the rivals."""
    found = {}
    quest = replace(retro, window=1)
    for name in ablations:
        make = partial(ablated, ABLATIONS[name])
        if name == "one choice":  # it changes Quest, too
            found["Quest one choice"] = Method(quest, make)
        for w in windows:
            found[f"W={w} {name}"] = Method(replace(retro, window=w), make)
    # The kernels cannot read sets of tokens, nor as many rows at once as ReSA's dense pass has.
    quest = replace(quest, impl="torch")
    return found | {name: Method(quest, *RIVALS[name]) for name in rivals}


def rivals(args: argparse.Namespace) -> dict:
    """The same as `bench.quality`, with more methods."""
    model, tok = bench.load_model(args)
    retro = sample.retro_config(args, window=1)
    idx = bench.passages(args, model, tok)
    found = bench.methods(retro, args.windows, args.control)
    found |= methods(retro, args.windows, args.rivals, args.ablations)
    return bench.measure_quality(args, model, idx, found)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    form = argparse.ArgumentDefaultsHelpFormatter
    title = __doc__.splitlines()[0]
    parser = sample.Parser(prog="extras.rivals", description=title, formatter_class=form)
    parser.set_defaults(run=rivals, command="rivals")
    add = parser.add_argument
    bench.quality_options(add)
    add("--rivals", choices=RIVALS, nargs="*", default=list(RIVALS), help="rivals to measure")
    help = "ablations to add to each window"
    add("--ablations", choices=ABLATIONS, nargs="*", default=[], help=help)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return sample.exit_code("extras.rivals", lambda: bench.measure(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
