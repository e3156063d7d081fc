"""The tables of the documentation: python bench.py quality --text book.txt

    quality     what sparse decoding costs in fidelity: full attention, Quest, RetroAttention, ablations of it, five neighbours
    exposure    do neighbouring queries want the same pages, and how many pages does a query meet in the end (paper, figure 2)
    longgen     questions with a number for an answer, one in a prompt, or many as LongGenBench has it; for a real checkpoint
    kernels     each kernel of a step, one layer: microseconds, and the share of what memory could do; beside it dense attention
    decode      whole steps of a model with random weights: full attention, Quest, RetroAttention
    picture     panels out of the JSON of `quality` and `exposure`

Tables go to stdout, and as its last line all numbers as one line of JSON, with versions, device and arguments. Progress goes
to stderr. Exit code 0 on success, 2 with one line on a mistake in the arguments or files, 130 after Ctrl-C, 1 if the reader of
stdout has gone.

Shapes: B passages or questions, L decode steps, T tokens; the rest as in retro_attention.py.
"""

import argparse
import copy
import functools
import importlib.util
import inspect
import itertools
import json
import math
import platform
import random
import re
import statistics
import sys
import time
import timeit
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

import retro_attention
import sample
from model import Decoder, Llama, LlamaConfig, Tokenizer, check_dense, check_finite, processes
from retro_attention import RetroConfig, Step, always_loaded, apply_rope, attend, combine, need, score, select, store, write

START = time.time()


@functools.cache  # what is said again, as that a package is missing, is said once
def progress(text: str):
    print(f"[{time.time() - START:.0f} s] {text}", file=sys.stderr, flush=True)


def table(title: str, rows: dict[str, dict], forms: dict[str, str]):
    """Prints the rows by their names: of each the values whose names are heads of columns, in the format given for them."""
    lines = [["", *forms]]
    lines += [[name, *(format(row[x], form) if x in row else "-" for x, form in forms.items())] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}\n")
    for name, *cells in lines:
        print(name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)), sep="  ")


# ----------------------------------------------------------------------------------------------------------------------
# The neighbours: five other ways to decode, each small enough to be read beside its paper
#
# All get Quest's budget at every step: as many tokens as Quest's pages hold when the last one is full. (One that evicts fills
# up a budget that grows with the text by new tokens only.) Prefill is dense for all, and so are the first `dense_layers`.
# What is read beyond the budget, page bounds and dense passes, is counted in `kv_share`.

SINKS = 4  # StreamingLLM's first tokens, which take the attention that has nowhere to go
REFRESH = 32  # steps between two dense passes of RefreshKV and of ReSA


class Neighbour:
    """Stands in for a layer's RetroAttention on the same cache. What is evicted stays in memory, and is not read again.

    A neighbour says which tokens are `visible` at a step, and may learn from the attention that they got.
    """

    ops, hook = retro_attention, None

    def __init__(self, cache: retro_attention.LayerCache):
        self.cache = cache

    def prefill(self, q, k, v):
        self.prompt_len = k.shape[1]
        store(k, v, self.cache, self.prompt_len - 1)
        self.learn(self.attention(q[:, -1:], *self.tokens(self.prompt_len - 1))[1], self.prompt_len - 1)

    def decode(self, q, k, v, cos, sin, t):
        q, t = write(q, k, v, cos, sin, self.cache, t), int(t)
        o, weight = self.attention(q, *self.tokens(t), self.visible(t))
        self.learn(weight, t)
        return o

    def learn(self, weight: torch.Tensor, t: int):
        """Told what the query at t, first the prompt's last, gave its tokens: (B, n_kv_head, G, t+1)."""

    def allowed(self, t: int) -> int:
        """Tokens that may be read at position t."""
        return self.cache.config.kv_tokens(t)[1]

    def tokens(self, t: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of positions 0 .. t, (B, n_kv_head, t+1, hs) each."""
        return self.cache.k.flatten(2, 3)[:, :, : t + 1], self.cache.v.flatten(2, 3)[:, :, : t + 1]

    def attention(self, q, k, v, visible=None) -> tuple[torch.Tensor, torch.Tensor]:
        """One row q (B, 1, n_head, hs), rotated, over T keys -> output (B, 1, n_head, hs), weights (B, n_kv_head, G, T).

        `visible` is bool and broadcasts to (B, n_kv_head, T).
        """
        acc = retro_attention.accumulator(q.dtype)
        rows = q[:, 0].unflatten(1, (k.shape[1], -1)).to(acc)  # (B, n_kv_head, G, hs)
        s = rows @ k.to(acc).mT * q.shape[-1] ** -0.5  # (B, n_kv_head, G, T)
        if visible is not None:
            s = s.masked_fill(~visible[:, :, None], -torch.inf)
        weight = s.softmax(dim=-1)
        return (weight @ v.to(acc)).flatten(1, 2)[:, None].to(q.dtype), weight


class StreamingLLM(Neighbour):
    """Keeps the first 4 tokens and the newest, numbered anew as if nothing had stood in between (Xiao et al., ICLR 2024).

    Only distances matter to RoPE, so instead of renumbering all, the sinks move forward to just before the recent tokens.
    """

    first = SINKS  # the oldest recent token; never goes back, even when the budget grows: evicted is gone

    def decode(self, q, k, v, cos, sin, t):
        q, t = write(q, k, v, cos, sin, self.cache, t), int(t)
        self.first = max(self.first, t + 1 - max(1, self.allowed(t) - SINKS))
        k, v = self.tokens(t)
        moved = slice(self.first - SINKS, self.first - SINKS + 1)
        sinks = apply_rope(k[:, :, :SINKS].transpose(1, 2), cos[moved], sin[moved]).transpose(1, 2)  # (B, n_kv_head, 4, hs)
        k = torch.cat((sinks, k[:, :, self.first :]), dim=2)
        v = torch.cat((v[:, :, :SINKS], v[:, :, self.first :]), dim=2)
        return self.attention(q, k, v)[0]


class TOVA(Neighbour):
    """Evicts the token with the least attention of the newest query, averaged over the layer's heads (Oren et al., 2024)."""

    def learn(self, weight, t):
        """Leaves what the next step may read, less the token that it brings."""
        if t < self.prompt_len:
            self.kept = torch.ones_like(weight[:, 0, 0], dtype=torch.bool)  # (B, t+1)
        mean = weight.mean(dim=(1, 2)).masked_fill(~self.kept, -1)  # (B, t+1)
        best = mean.topk(min(t + 1, self.allowed(t + 1) - 1)).indices
        self.kept &= torch.zeros_like(self.kept).scatter(1, best, True)

    def visible(self, t):
        self.kept = pad(self.kept, (0, 1), value=True)  # (B, t+1)
        return self.kept[:, None]


class RefreshKV(Neighbour):
    """Reads a small set of tokens, and every 32nd step all, by whose attention the set is chosen anew (Xu et al., 2024).

    The set is a KV head's: the tokens with the most attention of its query heads. Tokens since then are all in it.
    """

    def refreshes(self, t: int) -> bool:
        return (t - self.prompt_len + 1) % REFRESH == 0  # also at the prompt's last token

    def learn(self, weight, t):
        if self.refreshes(t):
            self.importance = weight.mean(dim=2)  # (B, n_kv_head, t+1)

    def visible(self, t):
        if self.refreshes(t):
            return None
        # Above every weight, the newest highest: as the tokens come, the least important of the set make room.
        self.importance = pad(self.importance, (0, 1), value=1 + t)
        best = self.importance.topk(min(t + 1, self.allowed(t))).indices
        return torch.zeros_like(self.importance, dtype=torch.bool).scatter(2, best, True)


class SelectionReuse(Neighbour):
    """Quest that chooses pages at every second step only; the step in between reads the pages of the one before.

    The scores are kept: if a page has begun since then, the page with the lowest score makes room for it.
    """

    def decode(self, q, k, v, cos, sin, t):
        q, config = write(q, k, v, cos, sin, self.cache, t), self.cache.config
        if (int(t) - self.prompt_len) % 2 == 0:
            # Of the pages always loaded then, none may come before one that is always loaded at the next step: no infinity.
            self.scores = always_loaded(score(q, self.cache, t), config, t).clamp(max=1e30)  # (B, n_kv_head, pages held)
        held = int(t) // config.page_size + 1
        self.scores = pad(self.scores, (0, held - self.scores.shape[2]))  # a page begun since
        return combine(*attend(q, self.cache, *select(self.scores, self.cache, t), t), self.cache, t)


class ReSA(Decoder):
    """Quest, and after every 32nd step a dense pass over the last 32 tokens that overwrites their KV (Sun et al., 2025)."""

    def prefill(self, idx):
        self.prompt_len = idx.shape[1]
        self.dense_twins = [copy.copy(layer) for layer in self.layers]
        for twin in self.dense_twins:  # the same memory, attended densely, with no output cache
            twin.dense, twin.cache = True, replace(twin.cache, out=None, lse=None)
        return super().prefill(idx)

    @torch.inference_mode()
    def step(self, token):
        logits = super().step(token)
        newest = int(self.t)
        if (newest - self.prompt_len + 1) % REFRESH == 0:
            rows = self.tokens[:, newest - REFRESH + 1 : newest + 1]  # (B, 32)
            self.model.hidden(rows, *self.rope, self.dense_twins, self.t)
        return logits


LAYERS = {"StreamingLLM": StreamingLLM, "TOVA": TOVA, "selection reuse": SelectionReuse, "RefreshKV": RefreshKV}
NEIGHBOURS = [*LAYERS, "ReSA"]


# Ablations: RetroAttention with one of its steps replaced, to see what that step is worth; through the kernels as well.


class Ablation:
    """A layer's `ops`, of which a subclass replaces one step."""

    def __init__(self, ops):
        self.ops = ops

    def __getattr__(self, name):
        return getattr(self.ops, name)


class NotLookingBack(Ablation):
    """Nothing is new to a past row. So this is Quest with as many pages as W rows load, chosen by the same rule, and what else
    W gains is not due to the pages on top of the budget. (It is also RetroAttention that corrects outputs but overwrites no K
    and V: a correction reaches later tokens in no other way.)"""

    def attend(self, q, cache, pages, last_loaded, t):
        if pages is not None:  # not in prefill
            last_loaded = torch.zeros_like(last_loaded) + (t - 1)
        return self.ops.attend(q, cache, pages, last_loaded, t)


class OneChoice(Ablation):
    """A layer chooses pages once for all its KV heads, by the sum of their scores."""

    def score(self, q, cache, t):
        scores = self.ops.score(q, cache, t)  # (B, n_kv_head, P)
        return scores.sum(dim=1, keepdim=True).expand_as(scores).contiguous()


class FirstQuery(Ablation):
    """A past row looks back with the query that it had as the newest row, and not with a fresh one."""

    def attend(self, q, cache, pages, last_loaded, t):
        if pages is None:  # prefill: the window starts with the prompt's last rows
            self.q = q.clone()  # (B, W, n_head, hs)
        else:
            q = torch.cat((self.q[:, 1:], q[:, -1:]), dim=1)
            self.q.copy_(q)
        return self.ops.attend(q, cache, pages, last_loaded, t)


ABLATIONS = {"not looking back": NotLookingBack, "one choice": OneChoice, "first query": FirstQuery}


def methods(retro: RetroConfig, windows: list[int], neighbours: Iterable[str] = (), ablations: Iterable[str] = ()) -> dict:
    """Name -> configuration, None for full attention. Quest is RetroAttention with a window of 1, and nothing else."""
    quest = replace(retro, window=1)
    out = {"full": None, "Quest": quest}
    if "one choice" in ablations:  # it changes Quest, too
        out["Quest one choice"] = quest
    for w in windows:
        out |= dict.fromkeys([f"W={w}", *(f"W={w} {name}" for name in ablations)], replace(retro, window=w))
    # The neighbours read sets of tokens that the kernels do not know, or more rows at once than they can hold.
    return out | dict.fromkeys(neighbours, replace(quest, impl="torch"))


def new_decoder(name: str, retro: RetroConfig | None, model: Llama, B: int, length: int) -> Decoder:
    decoder = (ReSA if name == "ReSA" else Decoder)(model, B, retro, length)
    if name in LAYERS:
        decoder.layers[retro.dense_layers :] = [LAYERS[name](layer.cache) for layer in decoder.layers[retro.dense_layers :]]
    ablation = ABLATIONS.get(name.partition(" ")[2])
    for layer in decoder.layers if ablation else ():
        if not layer.dense:
            layer.ops = ablation(layer.ops)
    return decoder


def kv_share(name: str, retro: RetroConfig | None, n_layer: int, steps: range) -> float:
    """KV bytes read by the decode steps at these positions, all layers, as a share of full attention's."""
    if retro is None or not steps:
        return 1.0
    total = read = 0
    for step, t in enumerate(steps, 1):
        held, loaded, bounds = retro.kv_tokens(t)
        again = held if step % REFRESH == 0 else 0
        sparse = {"StreamingLLM": loaded, "TOVA": loaded, "RefreshKV": again or loaded}
        sparse |= {"selection reuse": loaded + bounds * (step % 2), "ReSA": loaded + bounds + again}
        dense = held + (again if name == "ReSA" else 0)  # its passes go through the dense layers as well
        total += n_layer * held
        read += (n_layer - retro.dense_layers) * sparse.get(name, loaded + bounds) + retro.dense_layers * dense
    return read / total


# ----------------------------------------------------------------------------------------------------------------------
# quality

PARTS = 8  # of the decoded text and of an answer, to report on one by one


def setup(args) -> tuple[RetroConfig, Llama, Tokenizer]:
    """What all measurements of quality need: the budget as a configuration of Quest, the model, its tokenizer."""
    retro, (_, tok, device, dtype) = sample.retro_config(args, window=1), sample.load(args)
    return retro, Llama.from_checkpoint(args.checkpoint, device=device, dtype=dtype), tok


def passages(args, model: Llama, tok: Tokenizer) -> torch.Tensor:
    """(B, prefix + length + 1) ids: passages of the text that do not overlap, evenly spread, each after begin_of_text.

    Without --text, texts sampled from the checkpoint itself with full attention: always at hand, and in the model's own words.
    """
    B, T, device, most = args.passages, args.prefix + args.length + 1, model.norm.weight.device, model.config.max_seq_len
    need(T <= most, f"prefix + length must be at most {most - 1}, not {T - 1}: the context")
    start = [tok.bos] if tok.bos is not None else tok.encode("\n")
    if args.text is None:
        progress(f"no --text: sampling {B} texts of {T} tokens from the checkpoint")
        first = torch.tensor([start] * B, device=device)
        return model.generate(first, T - len(start), None, temperature=1, top_p=None, seed=args.seed)
    ids, n = tok.encode(sample.read_text(args.text, args.text)), T - len(start)
    need(len(ids) >= B * n, f"text {args.text} has {len(ids)} tokens: {B} passages of {n} need {B * n}")
    starts = [i * len(ids) // B for i in range(B)]
    return torch.tensor([start + ids[i : i + n] for i in starts], device=device)


def forced(decoder: Decoder, idx: torch.Tensor, prefix: int, decoded: int = 0) -> Iterator[torch.Tensor]:
    """Feeds tokens prefix .. T-2 of idx (B, T) one by one and yields, for each, the log-probabilities of the next (B, vocab).
    Of the prompt before them, the last `decoded` tokens are fed one by one, too, and not prefilled."""
    decoder.prefill(idx[:, : prefix - decoded])
    for i in range(prefix - decoded, idx.shape[1] - 1):
        logits = decoder.step(idx[:, i])
        if i >= prefix:
            check_finite(logits)
            yield logits.float().log_softmax(dim=-1)


def fidelity(steps, full: list, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps of a method against full attention's: KL (B, L), and nats lost on the text's own tokens `targets` (B, L)."""
    kl, gap = [], []
    for logp, logp_full, target in zip(steps, full, targets.T, strict=True):
        kl.append((logp_full.exp() * (logp_full - logp)).sum(dim=-1))  # (B,)
        gap.append((logp_full - logp).gather(1, target[:, None])[:, 0])  # (B,)
    return torch.stack(kl, 1).cpu(), torch.stack(gap, 1).cpu()


def paired(x: torch.Tensor, y: torch.Tensor) -> list[float]:
    """The mean difference of two methods' values (B, L), and its standard error over passages."""
    difference = (x - y).double().mean(dim=1)  # (B,)
    return [difference.mean().item(), difference.std().item() / math.sqrt(len(difference))]


def compare(title: str, name: str, form: str, values: dict[str, torch.Tensor], rows: dict[str, dict]) -> list[int]:
    """Adds to each method's row what there is to say of its values (B, L): their mean, its difference to Quest and to the
    control, and the means over parts of L, of which it returns the ends. Prints all but the parts."""
    n, shown, heads = min(PARTS, values["Quest"].shape[1]), {}, {"KV read": ".1%", "mean": form}
    for method, x in values.items():
        rows[method] |= {name: x.mean().item(), f"{name}_by_passage": x.mean(dim=1).tolist()}  # to pair with another run's
        parts = [paired(part, torch.zeros_like(part)) for part in x.tensor_split(n, dim=1)]
        rows[method][f"{name}_by_position"], rows[method][f"{name}_errors"] = zip(*parts, strict=True)
        shown[method] = {"KV read": rows[method]["kv_share"], "mean": rows[method][name]}
        for key, other in (("to_quest", "Quest"), ("to_control", f"{method} not looking back")):
            if other in values:
                rows[method][f"{name}_{key}"] = difference, error = paired(x, values[other])
                shown[method][key], heads[key] = f"{difference:+{form}} ±{error:{form}}", ""
    table(title, shown, heads)
    return [0, *itertools.accumulate(part.shape[1] for part in values["Quest"].tensor_split(n, dim=1))]


def quality(args) -> dict:
    """Fidelity on text, teacher-forced: every method reads the same, and is compared with full attention token by token."""
    need(args.decoded < args.prefix, f"decoded must be between 0 and {args.prefix - 1}, not {args.decoded}: less than prefix")
    retro, model, tok = setup(args)
    idx = passages(args, model, tok)
    # Full attention's distributions are kept: passages * length * vocabulary numbers.
    full, kl, gap, rows = [], {}, {}, {}
    for name, config in methods(retro, args.windows, args.neighbours, args.ablations).items():
        progress(name)
        rows[name] = {"kv_share": kv_share(name, config, model.config.n_layer, range(args.prefix, idx.shape[1] - 1))}
        steps = forced(new_decoder(name, config, model, *idx.shape), idx, args.prefix, args.decoded)
        full = full or list(steps)
        kl[name], gap[name] = fidelity(full if name == "full" else steps, full, idx[:, args.prefix + 1 :])
    compare("KL to full attention, teacher-forced", "kl", ".5f", kl, rows)
    return {"positions": compare("Nats lost per token", "gap", ".4f", gap, rows), "rows": rows}


# ----------------------------------------------------------------------------------------------------------------------
# exposure


def overlap(ranks: list[torch.Tensor], selected: list[int], distance: int) -> list[float]:
    """Of the pages that a step takes, the shares that the step `distance` before had in its top-k and in its next k.

    ranks: of each step (B, n_kv_head, pages held); selected: its k. A page begun since then is in neither.
    """
    shares = []
    for i in range(distance, len(ranks)):
        now, past, k = ranks[i] < selected[i], ranks[i - distance], selected[i - distance]
        past = pad(past, (0, now.shape[2] - past.shape[2]), value=2 * k)
        shares.append(torch.stack([(now & (past < k)).sum(), (now & (past >= k) & (past < 2 * k)).sum()]) / now.sum())
    return torch.stack(shares).mean(dim=0).tolist()


def walked(model: Llama, retro: RetroConfig, idx: torch.Tensor, prefix: int, look: Callable | None = None) -> Decoder:
    """A decoder at the end of the texts; `look` saw what each step did in each sparse layer."""
    decoder = Decoder(model, len(idx), retro, idx.shape[1])
    if look:
        sample.watch(decoder, look)
    for _ in forced(decoder, idx, prefix):
        pass
    return decoder


def page_overlaps(args, retro: RetroConfig, model: Llama, idx: torch.Tensor) -> dict[int, list[float]]:
    """Distance -> overlap with the past query's top-k and next-k, a mean over the sparse layers (paper, figure 2b)."""
    progress("pages wanted with full attention")
    ranks = {}  # sparse layer -> of each step (B, n_kv_head, pages held): 0 is the page that Quest would take first

    def look(i: int, step: Step):
        order = always_loaded(step.scores, retro, step.t).argsort(dim=-1, descending=True, stable=True)
        ranks.setdefault(i, []).append(order.argsort(dim=-1))

    walked(model, replace(retro, budget=1.0), idx, args.prefix, look)  # all pages are loaded: full attention
    selected = [retro.pages_selected(t) for t in range(args.prefix, idx.shape[1] - 1)]
    by_layer = {d: [overlap(layer, selected, d) for layer in ranks.values()] for d in range(1, args.distance + 1)}
    return {d: torch.tensor(shares).mean(dim=0).tolist() for d, shares in by_layer.items()}


def revised(args, retro: RetroConfig, model: Llama, idx: torch.Tensor) -> dict[int, list[float]]:
    """Sparse layer -> what a step changes of a past row, as in `sample.revisions`, with the largest window: means."""
    w, means = max(args.windows), {}
    progress(f"what a step revises: W={w}")

    def look(i: int, step: Step):
        revisions = sample.revisions(step, retro.page_size).mean(dim=(1, 2, 3))  # (5,)
        means.setdefault(i, []).append([step.pages.shape[2], *revisions.tolist()])

    walked(model, replace(retro, window=w), idx, args.prefix, look)
    return {i: torch.tensor(seen).mean(dim=0).tolist() for i, seen in means.items()}


def exposure(args) -> dict:
    """Which pages neighbouring queries want, and how many a query meets."""
    need(args.distance < args.length, f"distance must be between 1 and length - 1 = {args.length - 1}, not {args.distance}")
    retro, model, tok = setup(args)
    need(retro.dense_layers < model.config.n_layer, f"dense_layers {retro.dense_layers}: no layer is left that selects")
    idx = passages(args, model, tok)
    overlaps = page_overlaps(args, retro, model, idx)
    exposures = {}  # paper, figure 2c
    for w in sorted({1, *args.windows}):
        progress(f"exposure: W={w}")
        exposures[w] = sample.exposure_of(walked(model, replace(retro, window=w), idx, args.prefix))
    title = "Pages wanted now that a past query had in its top-k or next-k (full attention)"
    rows = {f"{d} steps back": {"top-k": a, "next-k": b, "both": a + b} for d, (a, b) in overlaps.items()}
    table(title, rows, {"top-k": ".1%", "next-k": ".1%", "both": ".1%"})
    title = "Pages a query meets in the end, in units of those selected for it"
    table(title, {f"W={w}": {"exposure": x} for w, x in exposures.items()}, {"exposure": ".3f"})
    revisions = revised(args, retro, model, idx)
    forms = {"loaded": ".1f", "new": ".2f"} | dict.fromkeys(("mass", "output", "K", "V"), ".2%")
    title = f"W={max(args.windows)}: pages new to a past row, their softmax mass, how far its output, K and V move in a step"
    table(title, {f"layer {i}": dict(zip(forms, x, strict=True)) for i, x in revisions.items()}, forms)
    return {"overlap": overlaps, "effective_exposure": exposures, "revised": revisions}


# ----------------------------------------------------------------------------------------------------------------------
# longgen

INSTRUCTION = (
    "Answer all of the questions, one after the other and step by step, in the form of the examples: begin each answer with "
    "Answer_ and the number of its question, and end it with 'The answer is' and a number. Do not repeat the questions."
)
NUMBER = r"-?\d[\d,]*(?:\.\d+)?"


def read_questions(path: str, needed: int) -> list[dict]:
    """Questions, worked answers and results out of GSM8K's JSONL, where an answer ends in `#### number`."""
    pairs = []
    for i, line in enumerate(sample.read_text(path, path).rstrip("\n").split("\n"), 1):
        try:
            pair = json.loads(line)
            # GSM8K marks what a calculator should do: <<48/2=24>>.
            work, result = re.sub(r"<<.*?>>", "", pair["answer"]).split("####")
            result = float(result.replace(",", ""))
            pairs.append({"question": pair["question"].strip(), "work": work.strip(), "result": result})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path}: line {i} is not a question and an answer that ends in '#### number'") from None
    need(len(pairs) >= needed, f"{path} has {len(pairs)} questions: {needed} are needed")
    return pairs


def conversation(examples: list[dict], questions: list[dict]) -> list[tuple[str, str]]:
    """What the model is told. One question comes after the examples as earlier turns. Of several, LongGenBench's form: all
    examples, then the questions, whose numbers go on from those of the examples."""
    if len(questions) == 1:
        turns = [(("user", p["question"]), ("assistant", solution(p))) for p in examples]
        return [*itertools.chain(*turns), ("user", questions[0]["question"])]
    asked = [f"Question_{i}: {p['question']}" for i, p in enumerate(examples + questions, 1)]
    worked = [f"Answer_{i}: {solution(p)}" for i, p in enumerate(examples, 1)]
    n = len(examples)
    text = "\n\n".join(["Examples", *asked[:n], *worked, "Questions", *asked[n:]])
    return [("system", INSTRUCTION), ("user", text)]


def solution(pair: dict) -> str:
    return f"{pair['work']} The answer is {pair['result']:.12g}."


def read_answers(text: str) -> tuple[dict[int, float], list[float | None]]:
    """The results in an answer to several questions, by their numbers wherever they stand, and one after the other.

    The result is the number after 'The answer is', else the last one before the next answer begins. Of several answers with
    the same number the first that holds a result counts: what follows may be another question of the model's own making.
    """
    by_number, in_order = {}, []
    pieces = re.split(r"Answer_(\d+)", text)
    for i, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        in_order.append(read_result(piece))
        if in_order[-1] is not None:
            by_number.setdefault(int(i), in_order[-1])
    return by_number, in_order


def read_result(text: str) -> float | None:
    stated = re.search(rf"[Tt]he answer is[^\d\n]*?({NUMBER})", text)
    numbers = [stated[1]] if stated else re.findall(NUMBER, text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def longgen_prompts(args, context: int, tok: Tokenizer) -> list[tuple[list[int], list[float]]]:
    """The ids of each prompt, and the results of its n questions."""
    n = args.n
    examples, pairs = read_questions(args.examples, args.shots), read_questions(args.questions, args.prompts * n)
    asked = [pairs[i * n : (i + 1) * n] for i in range(args.prompts)]
    chosen = [examples[: args.shots]] * args.prompts
    if args.one_length:  # the examples of a prompt make up for its questions
        draw = random.Random(0)
        size = {id(example): len(tok.chat(conversation([example], asked[0]))) for example in examples}  # but for a constant
        bare = [len(tok.chat(conversation([], questions))) for questions in asked]
        length = statistics.median_low(bare) + args.shots * round(statistics.mean(size.values()))
        for i in range(args.prompts):
            draws = (draw.sample(examples, args.shots) for _ in range(1_000_000))
            chosen[i] = next((own for own in draws if bare[i] + sum(size[id(x)] for x in own) == length), None)
            need(chosen[i] is not None, f"one_length: no {args.shots} examples make prompt {i} as long as the others")
    prompts = [tok.chat(conversation(own, questions)) for own, questions in zip(chosen, asked, strict=True)]
    most, longest = context - args.answer_tokens * n, max(map(len, prompts))
    need(longest <= most, f"n = {n}: the context leaves {most} tokens for a prompt of {longest}: fewer n or answer_tokens")
    return [(ids, [pair["result"] for pair in questions]) for ids, questions in zip(prompts, asked, strict=True)]


def answers(name: str, config, args, model: Llama, tok: Tokenizer, prompts: list[list[int]]) -> Iterator[tuple]:
    """Generates greedily until the model stops or the tokens are used up. Yields the number of a prompt, its ids, the new ids.
    Prompts of one length are answered side by side."""
    by_length, longest, most = {}, max(map(len, prompts)), args.answer_tokens * args.n
    for i, ids in enumerate(prompts):
        by_length.setdefault(len(ids), []).append(i)
    for same in by_length.values():
        for batch in (same[i : i + args.batch] for i in range(0, len(same), args.batch)):
            idx = torch.tensor([prompts[i] for i in batch], device=model.norm.weight.device)  # (B, T)
            decoder = new_decoder(name, config, model, len(batch), longest + most)  # of one size: compiled once
            new = torch.stack(list(decoder.stream(idx, most, temperature=0, stop_tokens=tok.stop_tokens)), dim=1)
            for i, ids in zip(batch, new.tolist(), strict=True):
                yield i, prompts[i], list(itertools.takewhile(lambda token: token not in tok.stop_tokens, ids))


def judge(text: str, first: int, results: list[float]) -> dict[str, list[bool]]:
    """Which of the questions, whose numbers begin with `first`, have an answer, and the right one."""
    if len(results) == 1:
        by_number, in_order = {first: read_result(text)}, [read_result(text)]
    else:
        by_number, in_order = read_answers(text)
    said = [by_number.get(first + i) for i in range(len(results))]
    right = [a == b for a, b in zip(said, results, strict=True)]
    in_order = [a == b for a, b in itertools.zip_longest(in_order[: len(results)], results)]
    return {"right": right, "right by position": in_order, "answered": [x is not None for x in said]}


def longgen(args) -> dict:
    """Questions with a number for an answer (GSM8K), one or many in a prompt (LongGenBench), for a real checkpoint."""
    need(not Path(args.out).exists(), f"out {args.out}: exists already")
    retro, model, tok = setup(args)
    asked = longgen_prompts(args, model.config.max_seq_len, tok)
    prompts, results = zip(*asked, strict=True)
    found = {}
    with open(args.out, "w", encoding="utf-8", newline="\n") as file:
        for name, config in methods(retro, args.windows, (), args.ablations).items():
            progress(name)
            found[name] = {}  # by the number of the prompt: they come in another order
            for i, ids, new in answers(name, config, args, model, tok, prompts):
                text = tok.decode(new)
                steps = range(len(ids), len(ids) + len(new) - 1)  # the prefill made the first
                record = {"prompt": i, "method": name, "tokens": len(new), "text": text}
                record |= {"kv_share": kv_share(name, config, model.config.n_layer, steps)}
                record |= judge(text, args.shots + 1, results[i])
                print(json.dumps(record), file=file, flush=True)
                found[name][i] = record
    return summary(found, args)


def summary(found: dict[str, dict[int, dict]], args) -> dict:
    """Prints and returns what is right, by each way to match answers and questions, and what is answered at all."""
    rows = {name: {"kv_share": statistics.mean(r["kv_share"] for r in records.values())} for name, records in found.items()}
    for key in ("right", "right by position", "answered"):
        values = {name: torch.tensor([r[i][key] for i in range(args.prompts)]).double() for name, r in found.items()}
        compare(f"{args.prompts} prompts of {args.n}: {key}; unanswered is wrong", key, ".1%", values, rows)
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# kernels and decode

SHAPES = {  # of Llama 3.1 8B, Qwen 2.5 32B, and the checkpoint in tiny/
    "8b": LlamaConfig(4096, 32, 32, 8, 128_256, 14_336, 131_072, rope_scaling=8.0),
    "32b": LlamaConfig(5120, 64, 40, 8, 152_064, 27_648, 131_072, rope_theta=1e6, qkv_bias=True),
    "tiny": LlamaConfig(384, 10, 6, 2, 4096, 896, 4096, rope_theta=50_000.0, tie_embeddings=True),
}


def times(run: Callable, n: int) -> list[float]:
    """Milliseconds of each of n calls: by events on a GPU, by the clock elsewhere."""
    if not torch.cuda.is_available():
        return [1e3 * timeit.timeit(run, number=1) for _ in range(n)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


def microseconds(layers: list[Callable]) -> float:
    """A layer's, of all one after the other: median of 20 times, on a GPU of replays of a CUDA graph."""

    def run():
        for layer in layers:
            layer()

    run()  # compiles
    replay = run
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        replay = graph.replay
    times(replay, 3)
    return 1e3 * statistics.median(times(replay, 20)) / len(layers)


def begin(args) -> tuple[LlamaConfig, torch.dtype, dict[str, float]]:
    """Shape, dtype and what memory can do, in bytes per second: of a copy, read and written, and of two plain reads (not as
    a graph, in which a copy is slower). The first line of the output says them."""
    sample.choose_device(args.device)  # refuses more processes than GPUs
    sample.choose_threads(SHAPES[args.shape], args.device)
    gpu, rates = args.device == "cuda", {}
    x = torch.ones(2**30 if gpu else 2**26, device=args.device)
    y = torch.empty_like(x)
    for name, run, nbytes in (("copy", lambda: y.copy_(x), 2 * x.nbytes), ("amax", x.amax, x.nbytes), ("sum", x.sum, x.nbytes)):
        times(run, 3)
        rates[name] = nbytes / statistics.median(times(run, 10)) * 1e3
    where = torch.cuda.get_device_name() if gpu else "No GPU: on the CPU, with the PyTorch reference"
    dtype = torch.bfloat16 if gpu else torch.float32
    print(f"{where}; shape {args.shape}, {dtype}; memory, GB/s:", *(f"{name} {x / 1e9:.0f}" for name, x in rates.items()))
    return replace(SHAPES[args.shape], max_seq_len=max(context for context, _ in args.settings)).shard(), dtype, rates


def fill(cache: retro_attention.LayerCache, t: int):
    """Random contents, as a step to position t finds them: some pages were seen by the window's past rows, some not."""
    for x in (cache.k, cache.v, cache.out, cache.lse):
        if x is not None:
            x.normal_()
    if cache.bounds is not None:
        torch.stack((cache.k.amin(dim=3), cache.k.amax(dim=3)), dim=3, out=cache.bounds)
        cache.last_loaded.random_(t - 2 * cache.config.window, t)


def layer_bytes(config: RetroConfig, shape: LlamaConfig, B: int, context: int, size: int) -> dict[str, int]:
    """Bytes that a layer must read, `size` a number of the model's. "four", the floor of the kernels after `write`, is what no
    implementation gets around: the bounds of the pages held, and K and V of the pages selected."""
    _, loaded, bounds = config.kv_tokens(context - 1)
    token = 2 * B * shape.n_kv_head * shape.head_size * size  # a key and a value
    return {"score": bounds * token, "attend": loaded * token, "four": (bounds + loaded) * token, "dense": context * token}


KERNELS = ("write", "score", "select", "attend", "combine")
DENSE = ("flash", "cudnn", "FlashInfer", "ours")
OPTIONAL = ("flash", "cudnn", "FlashInfer", "FlashInfer sparse")  # not everywhere, not for every shape
HEADLINE = (32_768, 2048)  # Quest's: context, tokens selected


@functools.cache
def workspace(device: torch.device) -> torch.Tensor:
    return torch.empty(2**27, dtype=torch.uint8, device=device)


def flashinfer_decode(newest: torch.Tensor, cache: retro_attention.LayerCache, pages: torch.Tensor) -> Callable:
    """FlashInfer's attention of one row (B, 1, n_head, hs) over pages (B, n_kv_head, S). To FlashInfer each KV head is a text
    of its own, since each has its own pages. What it plans on the host is not in the time."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    (texts, S), (P, ps, hs) = pages.flatten(0, 1).shape, cache.k.shape[2:]
    G = newest.shape[2] // pages.shape[1]
    first = torch.arange(0, (texts + 1) * S, S, dtype=torch.int32)  # of each text, in the list of pages
    listed = pages.flatten(0, 1) + torch.arange(0, texts * P, P, device=pages.device)[:, None]
    full = torch.full((texts,), ps, dtype=torch.int32)  # tokens in the last page
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace(newest.device), use_tensor_cores=True)
    wrapper.plan(first, listed.flatten().int(), full, G, 1, hs, ps, q_data_type=newest.dtype)
    kv = tuple(x.view(texts * P, ps, 1, hs) for x in (cache.k, cache.v))
    return functools.partial(wrapper.run, newest.reshape(texts, G, hs), kv)


def stages(config: RetroConfig, shape: LlamaConfig, B: int, context: int, device: str, dtype) -> dict[str, Callable]:
    """Name -> what to run, of a layer with a cache of its own."""
    W, n_head, n_kv_head, hs = config.window, shape.n_head, shape.n_kv_head, shape.head_size
    ops = retro_attention.implementation(config.impl, torch.device(device), dtype, hs, W * n_head // n_kv_head)
    t = torch.tensor(context - 1, device=device)
    cache = retro_attention.new_cache(config, False, B, n_head, n_kv_head, hs, context, device, dtype)
    fill(cache, context - 1)
    angles = torch.rand(context, hs // 2, device=device)
    q, k, v = (torch.randn(B, W, heads, hs, device=device, dtype=dtype) for heads in (n_head, n_kv_head, n_kv_head))
    scores = ops.score(q, cache, t)
    chosen = ops.select(scores, cache, t)
    parts = ops.attend(q, cache, *chosen, t)
    # Dense attention has one row and no output cache.
    newest = q[:, -1:].contiguous()  # (B, 1, n_head, hs)
    alone = replace(cache, config=replace(config, window=1), out=None, lse=None)
    key, value = (x.flatten(2, 3)[:, :, :context] for x in (cache.k, cache.v))  # (B, n_kv_head, context, hs)

    def sdpa(backend: SDPBackend):
        with sdpa_kernel(backend):
            scaled_dot_product_attention(newest.transpose(1, 2), key, value, enable_gqa=True)

    @functools.cache  # the first call plans, which a CUDA graph could not hold
    def flashinfer(pages: torch.Tensor) -> Callable:
        return flashinfer_decode(newest, cache, pages)

    every = torch.arange(cache.k.shape[2], device=device).expand(B, n_kv_head, -1)
    loaded = chosen[0][..., : config.pages_selected(context - 1)]
    return {
        "write": lambda: ops.write(q, k, v, angles, angles, cache, t),
        "score": lambda: ops.score(q, cache, t),
        "select": lambda: ops.select(scores, cache, t),
        "attend": lambda: ops.attend(q, cache, *chosen, t),
        "combine": lambda: ops.combine(*parts, cache, t),
        "four": lambda: ops.combine(*ops.attend(q, cache, *ops.select(ops.score(q, cache, t), cache, t), t), cache, t),
        "ours": lambda: ops.combine(*ops.attend(newest, alone, None, None, t), alone, t),
        "flash": lambda: sdpa(SDPBackend.FLASH_ATTENTION),
        "cudnn": lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
        "FlashInfer": lambda: flashinfer(every)(),
        "FlashInfer sparse": lambda: flashinfer(loaded)(),
    }


def kernel_row(config: RetroConfig, shape, B: int, context: int, n: int, device: str, dtype, rate: float) -> dict:
    """Microseconds per layer of each kernel and of dense attention, and the share of their byte floor that four reach."""
    us, nbytes = {}, layer_bytes(config, shape, B, context, dtype.itemsize)
    layers = [stages(config, shape, B, context, device, dtype) for _ in range(n)]
    for name in layers[0]:
        try:
            us[name] = microseconds([layer[name] for layer in layers])
        except (RuntimeError, ImportError) as error:
            if name not in OPTIONAL:
                raise
            progress(f"{name}: {str(error).splitlines()[0]}")
    dense = min(us[name] for name in DENSE if name in us)
    row = {"context": context, "batch": B, "window": config.window, "budget": config.budget, "bytes": nbytes} | us
    return row | {"of the limit": nbytes["four"] / rate * 1e6 / us["four"], "dense": dense, "dense/four": dense / us["four"]}


@torch.inference_mode()
def kernels(args) -> dict:
    """Microseconds of each kernel, and of dense attention."""
    shape, dtype, rates = begin(args)
    L2 = torch.cuda.get_device_properties(0).L2_cache_size if args.device == "cuda" else 0
    rows = []
    for context, B in args.settings:
        configs = [RetroConfig(window=w) for w in args.windows]
        if context == HEADLINE[0]:
            configs.append(RetroConfig(window=1, budget=HEADLINE[1] / context))
        bounds = layer_bytes(configs[0], shape, B, context, dtype.itemsize)["score"]
        n = max(2, -(-3 * L2 // bounds))  # even the bounds of all layers do not stay in the L2 cache
        for config in configs:
            progress(f"kernels: {context}x{B}, W={config.window}, budget {config.budget}")
            rows.append(kernel_row(config, shape, B, context, n, args.device, dtype, max(rates.values())))
    forms = dict.fromkeys([*KERNELS, "four"], ".1f") | {"of the limit": ".0%"}
    forms |= dict.fromkeys([*DENSE, "dense"], ".1f") | {"dense/four": ".2f", "FlashInfer sparse": ".1f"}
    title = """Microseconds per layer. Four: score to combine, and their share of what the bytes allow. Dense attention: SDPA
with flash and cuDNN, FlashInfer if it is installed, our attend over all pages, and the fastest of these. FlashInfer sparse: its
attention of one row over our selection, to be compared with attend and combine."""
    table(title, {f"{r['context']}x{r['batch']} {r['budget']:.4g} W={r['window']}": r for r in rows}, forms)
    return {"memory_rate": rates, "rows": rows}


def random_model(config: LlamaConfig, device: str, dtype: torch.dtype) -> Llama:
    with torch.device("meta"):
        model = Llama(config)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for p in model.parameters():
        p.normal_(std=0.02) if p.ndim == 2 else p.fill_(1)
    return model


def step_bytes(model: Llama, retro: RetroConfig | None, B: int, context: int) -> int:
    """Bytes that no implementation of a step gets around: the weights, and a layer's own as in `layer_bytes`."""
    config, table = model.config, model.tok_embeddings.weight
    layer = layer_bytes(retro or RetroConfig(), config, B, context, table.itemsize)
    dense = config.n_layer if retro is None else retro.dense_layers
    weights = sum(p.nbytes for p in model.parameters()) - (0 if config.tie_embeddings else table.nbytes)
    return weights + dense * layer["dense"] + (config.n_layer - dense) * layer["four"]


def step_times(model: Llama, B: int, retro: RetroConfig | None, context: int) -> list[float]:
    """Milliseconds of the steps to the last 30 positions of the context."""
    torch.cuda.empty_cache()
    decoder = Decoder(model, B, retro, context)
    decoder.position = context - 36
    decoder.t.fill_(decoder.position)
    for layer in decoder.layers:
        fill(layer.cache, decoder.position)
    token = torch.randint(model.config.vocab_size, (B,), device=decoder.t.device)
    times(lambda: decoder.step(token), 5)  # the first compiles and captures the graph
    return times(lambda: decoder.step(token), 30)


def step_times_of_transformers(shape: LlamaConfig, B: int, context: int, device: str, dtype) -> list[float]:
    """The same of what one would otherwise run: transformers' Llama, its own cache, its own forward pass; dense."""
    from transformers import AutoModelForCausalLM, DynamicCache
    from transformers import LlamaConfig as Config

    config = Config(
        hidden_size=shape.dim, num_hidden_layers=shape.n_layer, num_attention_heads=shape.n_head, vocab_size=shape.vocab_size,
        num_key_value_heads=shape.n_kv_head, head_dim=shape.head_size, intermediate_size=shape.ffn_dim,
        max_position_embeddings=shape.max_seq_len, tie_word_embeddings=shape.tie_embeddings,
    )  # fmt: skip
    with torch.device(device):
        model, cache = AutoModelForCausalLM.from_config(config, dtype=dtype).eval(), DynamicCache(config=config)
        for i in range(shape.n_layer):
            cache.update(*torch.randn(2, B, shape.n_kv_head, context - 35, shape.head_size, dtype=dtype), i)
        token = torch.randint(shape.vocab_size, (B, 1))
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # the older of two names
    step = functools.partial(model, input_ids=token, use_cache=True, **{name: cache})  # appends to the cache
    times(step, 5)
    return times(step, 30)


def step_rows(model: Llama, args, context: int, B: int, rate: float) -> list[dict]:
    configs = methods(RetroConfig(dense_layers=args.dense_layers), args.windows)
    ms, rows = {name: [] for name in configs}, []
    for i in range(args.rounds):
        progress(f"decode: {context}x{B}, round {i + 1} of {args.rounds}")
        for name, retro in configs.items():
            ms[name] += step_times(model, B, retro, context)
    if processes()[1] == 1:
        try:
            ms["transformers"] = step_times_of_transformers(model.config, B, context, args.device, model.norm.weight.dtype)
        except (ImportError, torch.OutOfMemoryError) as error:
            progress(f"transformers: {str(error).splitlines()[0]}")
    ms = {name: statistics.median(x) for name, x in ms.items()}
    for name in ms:
        nbytes = statistics.mean(step_bytes(model, configs.get(name), B, n) for n in range(context - 29, context + 1))
        row = {"context": context, "batch": B, "method": name, "ms": ms[name], "bytes": nbytes}
        ratios = {"full/this": ms["full"] / ms[name], "this/Quest": ms[name] / ms["Quest"]}
        rows.append(row | ratios | {"share": nbytes / rate / ms[name] * 1e3})
    return rows


@torch.inference_mode()
def decode(args) -> dict:
    """Milliseconds of whole steps, with random weights and random caches; of transformers' too, if it is installed."""
    check_dense(args.dense_layers, SHAPES[args.shape])
    shape, dtype, rates = begin(args)
    most = RetroConfig(window=max(args.windows), dense_layers=args.dense_layers)
    torch.cuda.empty_cache()  # of what `begin` measured with
    fitting = []
    for context, B in args.settings:
        try:
            print(sample.check_memory(shape, most, B, context, torch.device(args.device), dtype))
            fitting.append((context, B))
        except ValueError as error:
            print(f"{context}x{B} is left out: {error}")
    model, rows = random_model(shape, args.device, dtype), []
    for context, B in fitting:
        rows += step_rows(model, args, context, B, max(rates.values()))
    forms = {"ms": ".3f", "bytes": ".3g", "share": ".0%", "full/this": ".2f", "this/Quest": ".3f"}
    title = "A step of the batch, milliseconds; bytes that it must read, and the share that it reaches of what they allow"
    table(title, {f"{r['context']}x{r['batch']} {r['method']}": r for r in rows}, forms)
    return {"memory_rate": rates, "rows": rows}


# ----------------------------------------------------------------------------------------------------------------------
# picture


def last_line(path: str, command: str) -> dict:
    """The record of a command whose output was saved: its last line."""
    line = sample.read_text(path, path).rstrip().split("\n")[-1]
    need(line.startswith(f'{{"command": "{command}"'), f"{path}: its last line is not the JSON of bench.py {command}")
    return json.loads(line)


def picture(args) -> dict:
    """Draws the results of quality, each file in a panel, and of exposure (needs matplotlib)."""
    records = [last_line(path, "quality") for path in args.quality]
    met = last_line(args.exposure, "exposure")["results"]["effective_exposure"]
    need(importlib.util.find_spec("matplotlib"), "matplotlib is not installed: pip install matplotlib")
    from matplotlib import pyplot

    pyplot.style.use(["seaborn-v0_8-colorblind", {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}])
    n = len(records)
    figure, axes = pyplot.subplots(1, n + 1, figsize=(3.8 * n + 3, 3.8), layout="constrained", dpi=150)
    for axis, record in zip(axes, records, strict=False):
        rows, ends = record["results"]["rows"], record["results"]["positions"]
        drawn = [name for name in rows if re.fullmatch(r"Quest|W=\d+", name)]
        for name, marker in zip(drawn, itertools.cycle("osD^vP"), strict=False):
            mean, error = (torch.tensor(rows[name][key]) for key in ("kl_by_position", "kl_errors"))
            middles = [(a + b) / 2 for a, b in itertools.pairwise(ends)]
            axis.plot(middles, mean, marker=marker, label=name)
            axis.fill_between(middles, mean - 2 * error, mean + 2 * error, alpha=0.1, linewidth=0)
        axis.set(xlabel="tokens decoded", title="budget {budget:g}, at least {min_tokens} tokens".format(**record["arguments"]))
    top = max(axis.get_ylim()[1] for axis in axes[:n])
    for axis in axes[:n]:
        axis.set_ylim(0, top)
    axes[0].set_ylabel("KL to full attention, nats per token")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=8)
    axes[n].plot([int(w) for w in met], list(met.values()), marker="o")
    for w, x in met.items():
        axes[n].annotate(f"{x:.2f}", (int(w), x), xytext=(-4, 6), textcoords="offset points", ha="right")
    axes[n].margins(x=0.2, y=0.15)
    axes[n].set(xlabel="window W (1 is Quest)", title="pages met / pages selected", xticks=[int(w) for w in met])
    figure.savefig(args.out)
    print(f"{args.out} written")
    return {"file": args.out}


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def at_least(least: int) -> Callable:
    """For argparse: an integer that is no less."""

    def integer(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be >= {least}, not {text}")
        return int(text)

    return integer


def setting(text: str) -> tuple[int, int]:
    """CONTEXTxBATCH, for argparse."""
    context, batch = map(int, text.split("x"))
    if context < 256 or batch < 1:
        raise argparse.ArgumentTypeError(f"must have a context >= 256 and a batch >= 1, not {text}")
    return context, batch


def text_options(add: Callable, passages: int, least: int, prefix: int, length: int):
    sample.add_method_options(add, RetroConfig(), dtype="float32")  # bfloat16 rounds by as much as is measured in a small model
    add("--windows", type=at_least(1), nargs="+", default=[2, 4, 8, 16], help="RetroAttention's windows to measure")
    add("--text", default=None, help="file to cut passages from; without it they are sampled from the checkpoint")
    add("--seed", type=int, default=0, help="of the sampled texts")
    add("--passages", type=at_least(least), default=passages, help="passages, as one batch")
    add("--prefix", type=at_least(1), default=prefix, help="tokens of prompt")
    add("--length", type=at_least(1), default=length, help="tokens of each passage that are decoded after it")


# What `quality --quick` stands for. Two dense layers and a floor of 256 tokens would hide most of the effect in a model of ten
# layers and in texts this short.
QUICK = {"passages": 8, "prefix": 1024, "length": 96, "min_tokens": 32, "dense_layers": 0}
QUICK |= {"windows": [2, 4, 8], "neighbours": NEIGHBOURS}


def quality_options(add: Callable):
    text_options(add, passages=16, least=2, prefix=512, length=3072)
    quick = ", ".join(f"--{option} {x}" for option, x in QUICK.items())
    add("--quick", action="store_true", help=f"for the checkpoint in tiny/ on a CPU; unless given: {quick}")
    add("--decoded", type=at_least(0), default=0, help="the last tokens of the prompt to decode one by one: not prefilled")
    add("--ablations", choices=list(ABLATIONS), nargs="*", default=[], help="to add for each window")
    add("--neighbours", choices=NEIGHBOURS, nargs="*", default=[], help="to compare with")


def exposure_options(add: Callable):
    text_options(add, passages=8, least=1, prefix=1024, length=128)
    add("--distance", type=at_least(1), default=8, help="steps to look back")


def longgen_options(add: Callable):
    sample.add_method_options(add, RetroConfig())
    add("--windows", type=at_least(1), nargs="+", default=[2, 4, 8], help="RetroAttention's windows to measure")
    add("--ablations", choices=list(ABLATIONS), nargs="*", default=[], help="of each window")
    add("--questions", required=True, help="JSONL with question and answer, which ends in '#### number'")
    add("--examples", required=True, help="the same, of which the first are worked examples")
    add("--shots", type=at_least(0), default=8, help="worked examples in front")
    add("--out", required=True, help="JSONL of the answers to write, one line per prompt and method; must not exist yet")
    add("--n", type=at_least(1), default=5, help="questions per prompt")
    add("--prompts", type=at_least(2), default=20, help="prompts")
    add("--answer_tokens", type=at_least(1), default=256, help="tokens to generate at most per question")
    add("--batch", type=at_least(1), default=32, help="prompts to answer side by side, if they have the same length")
    add("--one_length", action="store_true", help="prompts have examples of their own, drawn so that all have the same length")


def speed_options(add: Callable, settings: list[tuple[int, int]], windows: list[int]):
    """On a GPU if there is one; else with the PyTorch reference on a few settings, which says little about speed."""
    gpu = torch.cuda.is_available()
    settings = settings if gpu else [(1024, 1), (4096, 1)]
    add("--shape", choices=list(SHAPES) if gpu else ["tiny"], default="8b" if gpu else "tiny", help="a Llama's, or tiny/'s")
    add("--settings", type=setting, nargs="+", default=settings, help="context x batch, as 32768x8")
    add("--windows", type=at_least(1), nargs="+", default=windows, help="W to measure; 1 is Quest")


def kernels_options(add: Callable):
    speed_options(add, [(k * 1024, B) for k in (8, 32, 64, 128) for B in (1, 8)], windows=[1, 2, 8])


def decode_options(add: Callable):
    speed_options(add, [(k * 1024, B) for k, B in ((32, 1), (128, 1), (32, 8), (64, 8))], windows=[2, 4, 8])
    add("--dense_layers", type=at_least(0), default=0, help="first layers that attend to all; 0: all have the same byte floor")
    add("--rounds", type=at_least(1), default=3, help="times that all methods are measured in turn, 30 steps each")


def picture_options(add: Callable):
    add("--quality", required=True, nargs="+", help="saved outputs of bench.py quality, a panel each")
    add("--exposure", required=True, help="saved output of bench.py exposure")
    add("--out", default="quality.png", help="file to write")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = sample.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    options = (quality_options, exposure_options, longgen_options, kernels_options, decode_options, picture_options)
    for run, add_options in zip((quality, exposure, longgen, kernels, decode, picture), options, strict=True):
        sub = commands.add_parser(run.__name__, help=run.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(run=run)
        add_options(sub.add_argument)
        if run in (kernels, decode):
            sub.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if getattr(args, "quick", False):  # what is given goes before
        commands.choices["quality"].set_defaults(**QUICK)
        args = parser.parse_args(argv)
    return args


def measure(args: argparse.Namespace) -> int:
    """Runs the command and prints its results, with what they depend on, as the last line."""
    results = args.run(args)
    device = sample.choose_device(getattr(args, "device", "cpu"))
    packages = {d.name: d.version for d in distributions() if d.name in ("torch", "triton", "numpy", "matplotlib")}
    record = {
        "command": args.command,
        "arguments": {name: str(x) if isinstance(x, Path) else x for name, x in vars(args).items() if name != "run"},
        "versions": {"python": platform.python_version()} | packages,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "seconds": round(time.time() - START),
        "results": results,
    }
    print("\n" + json.dumps(record), flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    return sample.exit_code("bench.py", lambda: measure(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
