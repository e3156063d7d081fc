"""Every number of the README: python bench.py quality --text book.txt

    quality     what sparse decoding costs in fidelity and accuracy: full attention, Quest, RetroAttention, and five neighbours
    exposure    do neighbouring queries want the same pages, and how many pages does a query meet in the end (paper, figure 2)
    longgen     many questions in one prompt, all answers in one generation, as LongGenBench has it; for a real checkpoint
    picture     two panels out of the JSON of `quality` and `exposure`

Tables go to stdout, and as its last line all numbers as one line of JSON, with versions, device and arguments. Progress goes
to stderr. Exit code 0 on success, 2 with one line on a mistake in the arguments or files, 130 after Ctrl-C, 1 if the reader of
stdout has gone.

Shapes: B passages or questions, L decode steps, T tokens; the rest as in retro_attention.py.
"""

import argparse
import copy
import itertools
import json
import math
import os
import platform
import random
import re
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import torch

from model import Decoder, Llama, Tokenizer
from retro_attention import LayerCache, RetroConfig, accumulator, apply_rope, attend, combine, score, select, store, write
from sample import DTYPES, choose_device, load
from tiny.train import NAMES, TASKS

START = time.time()


def progress(text: str):
    print(f"[{time.time() - START:.0f} s] {text}", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# The neighbours: five other ways to decode, each small enough to be read beside its paper
#
# All get Quest's budget at every step: as many tokens as Quest's pages hold when the last one is full. (One that evicts fills
# up a budget that grows with the text by new tokens only.) Prefill is dense for all, and so are the first `dense_layers`.
# What is read beyond the budget, page bounds and dense passes, is counted in `pages_read`.

SINKS = 4  # StreamingLLM's first tokens, which take the attention that has nowhere to go
REFRESH = 32  # steps between two dense passes of RefreshKV and of ReSA


class Neighbour:
    """Stands in for a layer's RetroAttention, with the same two methods, on the same cache."""

    def __init__(self, cache: LayerCache):
        self.cache = cache

    def prefill(self, q, k, v):
        self.prompt_len = k.shape[1]
        store(k, v, self.cache, self.prompt_len - 1)


class TokenPolicy(Neighbour):
    """Chooses single tokens and not pages. Nothing is moved in memory: what is evicted is just not read again."""

    def allowed(self, t: int) -> int:
        """Tokens that may be read at position t."""
        return self.cache.config.pages_selected(t) * self.cache.config.page_size

    def keys_and_values(self, t: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cache.k.flatten(2, 3)[:, :, : t + 1], self.cache.v.flatten(2, 3)[:, :, : t + 1]  # (B, n_kv_head, t+1, hs)

    def softmax(self, q, k, v, visible=None) -> tuple[torch.Tensor, torch.Tensor]:
        """One row q (B, 1, n_head, hs), rotated, over T keys -> output (B, 1, n_head, hs), weights (B, n_kv_head, G, T).

        `visible` is bool and broadcasts to (B, n_kv_head, T).
        """
        acc = accumulator(q.dtype)
        rows = q[:, 0].unflatten(1, (k.shape[1], -1)).to(acc)  # (B, n_kv_head, G, hs)
        s = rows @ k.to(acc).mT * q.shape[-1] ** -0.5  # (B, n_kv_head, G, T)
        if visible is not None:
            s = s.masked_fill(~visible[:, :, None], -torch.inf)
        weight = s.softmax(dim=-1)
        return (weight @ v.to(acc)).flatten(1, 2)[:, None].to(q.dtype), weight


class StreamingLLM(TokenPolicy):
    """Keeps the first 4 tokens and the newest, numbered anew as if nothing had stood in between (Xiao et al., ICLR 2024).

    Only distances matter to RoPE, so instead of renumbering all, the sinks move forward to just before the recent tokens.
    """

    def prefill(self, q, k, v):
        super().prefill(q, k, v)
        self.first = SINKS  # the oldest recent token; never goes back, even when the budget grows: evicted is gone

    def decode(self, q, k, v, cos, sin, t):
        q, t = write(q, k, v, cos, sin, self.cache, t), int(t)
        self.first = max(self.first, t + 1 - max(1, self.allowed(t) - SINKS))
        k, v = self.keys_and_values(t)
        moved = slice(self.first - SINKS, self.first - SINKS + 1)
        sinks = apply_rope(k[:, :, :SINKS].transpose(1, 2), cos[moved], sin[moved]).transpose(1, 2)  # (B, n_kv_head, 4, hs)
        k = torch.cat((sinks, k[:, :, self.first :]), dim=2)
        v = torch.cat((v[:, :, :SINKS], v[:, :, self.first :]), dim=2)
        return self.softmax(q, k, v)[0]


class TOVA(TokenPolicy):
    """Evicts the token with the least attention of the newest query, averaged over the layer's heads (Oren et al., 2024)."""

    def prefill(self, q, k, v):
        super().prefill(q, k, v)
        t = self.prompt_len - 1
        self.kept = torch.ones(len(k), t + 1, dtype=torch.bool, device=k.device)  # (B, t+1)
        self.evict(self.softmax(q[:, -1:], *self.keys_and_values(t))[1], t)

    def evict(self, weight: torch.Tensor, t: int):
        """Leaves what the next step may read, less the token that it brings. weight (B, n_kv_head, G, t+1)."""
        mean = weight.mean(dim=(1, 2)).masked_fill(~self.kept, -1)  # (B, t+1)
        best = mean.topk(min(t + 1, self.allowed(t + 1) - 1)).indices
        self.kept &= torch.zeros_like(self.kept).scatter(1, best, True)

    def decode(self, q, k, v, cos, sin, t):
        q, t = write(q, k, v, cos, sin, self.cache, t), int(t)
        self.kept = torch.nn.functional.pad(self.kept, (0, 1), value=True)  # (B, t+1)
        o, weight = self.softmax(q, *self.keys_and_values(t), self.kept[:, None])
        self.evict(weight, t)
        return o


class RefreshKV(TokenPolicy):
    """Reads a small set of tokens, and every 32nd step all, by whose attention the set is chosen anew (Xu et al., 2024).

    The set is a KV head's: the tokens with the most attention of its query heads. Tokens since then are all in it.
    """

    def prefill(self, q, k, v):
        super().prefill(q, k, v)
        self.importance = self.softmax(q[:, -1:], *self.keys_and_values(self.prompt_len - 1))[1].mean(dim=2)

    def decode(self, q, k, v, cos, sin, t):
        q, t = write(q, k, v, cos, sin, self.cache, t), int(t)
        if (t - self.prompt_len + 1) % REFRESH == 0:
            o, weight = self.softmax(q, *self.keys_and_values(t))
            self.importance = weight.mean(dim=2)  # (B, n_kv_head, t+1)
            return o
        # Above every weight, the newest highest: as the tokens come, the least important of the set make room.
        self.importance = torch.nn.functional.pad(self.importance, (0, 1), value=1 + t)
        best = self.importance.topk(min(t + 1, self.allowed(t))).indices
        visible = torch.zeros_like(self.importance, dtype=torch.bool).scatter(2, best, True)
        return self.softmax(q, *self.keys_and_values(t), visible)[0]


class SelectionReuse(Neighbour):
    """Quest that chooses pages at every second step only; the step in between reads the pages of the one before.

    It is the scores that stay: where a page has begun since then, the page with the lowest of them makes room.
    """

    def decode(self, q, k, v, cos, sin, t):
        q = write(q, k, v, cos, sin, self.cache, t)
        if (int(t) - self.prompt_len) % 2 == 0:
            self.scores = score(q, self.cache, t)  # (B, n_kv_head, pages held); `select` sets the newest page's to infinity
        held = int(t) // self.cache.config.page_size + 1
        self.scores = torch.nn.functional.pad(self.scores, (0, held - self.scores.shape[2]))  # a page begun since
        o, lse = attend(q, self.cache, *select(self.scores, self.cache, t), t)
        return combine(o, lse, self.cache, t)


class ReSA(Decoder):
    """Quest, and after every 32nd step a dense pass over the last 32 tokens that overwrites their KV (Sun et al., 2025)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.dense_twins = []  # the same memory, attended densely, with no output cache
        for layer in self.layers:
            twin = copy.copy(layer)
            twin.dense, twin.cache = True, replace(layer.cache, out=None, lse=None)
            self.dense_twins.append(twin)

    def prefill(self, idx):
        self.prompt_len = idx.shape[1]
        return super().prefill(idx)

    @torch.inference_mode()
    def step(self, token):
        logits = super().step(token)
        newest = int(self.t)
        if (newest - self.prompt_len + 1) % REFRESH == 0:
            rows = self.tokens[:, newest - REFRESH + 1 : newest + 1]  # (B, 32)
            self.model.hidden(rows, *self.model.rope, self.dense_twins, self.t)
        return logits


LAYERS = {"StreamingLLM": StreamingLLM, "TOVA": TOVA, "selection reuse": SelectionReuse, "RefreshKV": RefreshKV}


def methods(retro: RetroConfig, windows: list[int], neighbours: bool = False) -> dict[str, RetroConfig | None]:
    """Name -> configuration, None for full attention. Quest is RetroAttention with a window of 1, and nothing else."""
    quest = replace(retro, window=1)
    out = {"full": None, "Quest": quest} | {f"Retro W={w}": replace(retro, window=w) for w in windows}
    # The neighbours read sets of tokens that the kernels do not know, or more rows at once than they can hold.
    return out | (dict.fromkeys([*LAYERS, "ReSA"], replace(quest, impl="torch")) if neighbours else {})


def new_decoder(name: str, retro: RetroConfig | None, model: Llama, B: int, length: int) -> Decoder:
    decoder = (ReSA if name == "ReSA" else Decoder)(model, B, retro, length)
    if name in LAYERS:
        decoder.layers[retro.dense_layers :] = [LAYERS[name](layer.cache) for layer in decoder.layers[retro.dense_layers :]]
    return decoder


def pages_read(name: str, retro: RetroConfig, t: int, step: int) -> float:
    """Pages' worth of K and V that a sparse layer reads per KV head at position t, the step-th behind the prompt (from 1).

    A page's bounds are two vectors, one token's worth; Quest reads them for all pages held.
    """
    selected, held = retro.pages_selected(t), t // retro.page_size + 1
    bounds, refresh = held / retro.page_size, step % REFRESH == 0
    if name in ("StreamingLLM", "TOVA"):
        return selected
    if name == "selection reuse":
        return selected + bounds * (step % 2)
    if name == "RefreshKV":
        return held if refresh else selected
    return selected + bounds + held * (name == "ReSA" and refresh)


def kv_share(name: str, retro: RetroConfig | None, n_layer: int, steps: range) -> float:
    """KV bytes read by the decode steps at these positions, all layers, as a share of full attention's."""
    if retro is None or not steps:
        return 1.0
    held = sum(t // retro.page_size + 1 for t in steps)
    share = sum(pages_read(name, retro, t, i + 1) for i, t in enumerate(steps)) / held
    return (share * (n_layer - retro.dense_layers) + retro.dense_layers) / n_layer


# ----------------------------------------------------------------------------------------------------------------------
# Text


def read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None


def passages(args, model: Llama, tok: Tokenizer) -> torch.Tensor:
    """(B, prefix + length + 1) ids: passages of the text that do not overlap, evenly spread, each behind begin_of_text.

    Without --text, texts sampled from the checkpoint itself with full attention: always at hand, and in the model's own words.
    """
    B, T, device = args.passages, args.prefix + args.length + 1, model.norm.weight.device
    if T > model.config.max_seq_len:
        raise ValueError(f"prefix + length must be at most {model.config.max_seq_len - 1}, not {T - 1}: the context")
    start = [tok.bos] if tok.bos is not None else tok.encode("\n")
    if args.text is None:
        progress(f"no --text: sampling {B} texts of {T} tokens from the checkpoint")
        return model.generate(torch.tensor([start] * B, device=device), T - len(start), None, temperature=1, seed=args.seed)
    ids, n = tok.encode(read_text(args.text)), T - len(start)
    if len(ids) < B * n:
        raise ValueError(f"text {args.text} has {len(ids)} tokens: {B} passages of {n} need {B * n}")
    starts = [i * len(ids) // B for i in range(B)]
    return torch.tensor([start + ids[i : i + n] for i in starts], device=device)


# ----------------------------------------------------------------------------------------------------------------------
# quality


def forced(decoder: Decoder, idx: torch.Tensor, prefix: int):
    """Feeds tokens prefix .. T-2 of idx (B, T) one by one. Yields, for each, the log-probabilities of the next (B, vocab) and
    the attention outputs of the newest row (n_layer, B, dim). The prompt's own are left out: all methods' prefill is dense."""
    outputs = []
    decoder.captures = False  # the replay of a CUDA graph calls no hooks
    hooks = [
        layer.attention.register_forward_hook(lambda module, args, x: outputs.append(x[:, -1].float()))
        for layer in decoder.model.layers
    ]
    try:
        decoder.prefill(idx[:, :prefix])
        for i in range(prefix, idx.shape[1] - 1):
            outputs.clear()
            logits = decoder.step(idx[:, i])
            # Behind the step's own layers, a dense pass of ReSA's may have left more.
            yield logits.float().log_softmax(dim=-1), torch.stack(outputs[: len(hooks)])
    finally:
        for hook in hooks:
            hook.remove()


def fidelity(steps, full: list, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Steps of a method against full attention's: KL (B, L), nats lost on the text's own tokens `targets` (B, L), and the error
    of each layer's attention output relative to its length (B, n_layer), a mean over steps."""
    kl, gap, error = [], [], []
    for (logp, out), (logp_full, out_full), target in zip(steps, full, targets.T, strict=True):
        kl.append((logp_full.exp() * (logp_full - logp)).sum(dim=-1))  # (B,)
        gap.append((logp_full - logp).gather(1, target[:, None])[:, 0])  # (B,)
        error.append((out - out_full).norm(dim=-1) / out_full.norm(dim=-1))  # (n_layer, B)
    return {"kl": torch.stack(kl, 1).cpu(), "gap": torch.stack(gap, 1).cpu(), "error": torch.stack(error).mean(dim=0).T.cpu()}


def task_questions(name: str, args, model: Llama, tok: Tokenizer) -> tuple[torch.Tensor, list[str], int]:
    """Questions (B, prefix), their answers' texts, and the tokens of the longest. In front of each question, other tasks with
    their answers fill the prompt up."""
    rng, rows, answers = random.Random(args.seed), [], []
    while len(rows) < args.questions:
        question, answer = TASKS[name](rng, args.entries)
        ids, before = tok.encode(question), []
        room = args.prefix - len(ids) - (tok.bos is not None)
        if room < 0:
            raise ValueError(
                f"prefix must be at least {args.prefix - room} for {args.entries} entries of {name}, not {args.prefix}"
            )
        while len(before) < room:
            before = tok.encode("".join(rng.choice(list(TASKS.values()))(rng, min(32, args.entries)))) + before
        rows.append([tok.bos] * (tok.bos is not None) + before[len(before) - room :] + ids)
        answers.append(answer)
    steps = max(len(tok.encode(answer)) for answer in answers)
    most = model.config.max_seq_len - steps
    if args.prefix > most:
        raise ValueError(f"prefix must be at most {most} for answers of {steps} tokens in {name}, not {args.prefix}")
    return torch.tensor(rows, device=model.norm.weight.device), answers, steps


def lines_right(decoder: Decoder, idx: torch.Tensor, answers: list[str], tok: Tokenizer, steps: int) -> torch.Tensor:
    """Answers idx (B, T) greedily, free-running: which lines are exactly right, at their place (B, lines)."""
    out = torch.stack(list(decoder.stream(idx, steps, temperature=0)), dim=1).tolist()
    right = []
    for ids, answer in zip(out, answers, strict=True):
        wanted = answer.strip("\n").split("\n")
        got = tok.decode(ids).split("\n") + [None] * len(wanted)
        right.append([a == b for a, b in zip(got[: len(wanted)], wanted, strict=True)])
    return torch.tensor(right).double()


def parts(x: torch.Tensor, n: int) -> list[float]:
    """Means of x (B, L) over n parts of its length, as equal as they can be."""
    return [part.mean().item() for part in x.double().tensor_split(min(n, x.shape[1]), dim=1)]


def against(x: torch.Tensor, quest: torch.Tensor) -> list[float]:
    """Mean difference to Quest, and its standard error over passages: paired, each passage with itself."""
    difference = (x - quest).double().mean(dim=1)  # (B,)
    return [difference.mean().item(), difference.std().item() / math.sqrt(len(difference))]


def each_method(what: str, args, retro: RetroConfig, model: Llama, B: int, T: int):
    """Yields each method's name, a fresh decoder, and the share of KV bytes that it reads at the positions prefix .. T-2."""
    for name, config in methods(retro, args.windows, neighbours=True).items():
        progress(f"{what}: {name}")
        share = kv_share(name, config, model.config.n_layer, range(args.prefix, T - 1))
        yield name, new_decoder(name, config, model, B, T), share


def text_quality(idx: torch.Tensor, args, retro: RetroConfig, model: Llama) -> dict:
    """Teacher-forced: every method reads the same text, and is compared with full attention token by token.

    Full attention's distributions are kept for that: passages * length * vocabulary numbers.
    """
    B, T = idx.shape
    full, seen, shares = [], {}, {}
    for name, decoder, shares[name] in each_method("text", args, retro, model, B, T):
        steps = forced(decoder, idx, args.prefix)
        full = full or list(steps)
        seen[name] = fidelity(full if name == "full" else steps, full, idx[:, args.prefix + 1 :])
    rows = {
        name: {
            "kv_share": shares[name],
            "kl": x["kl"].mean().item(),
            "kl_to_quest": against(x["kl"], seen["Quest"]["kl"]),
            "gap": x["gap"].mean().item(),
            "gap_to_quest": against(x["gap"], seen["Quest"]["gap"]),
            "kl_by_position": parts(x["kl"], args.buckets),
            "gap_by_position": parts(x["gap"], args.buckets),
            "attention_error": x["error"].mean(dim=0).tolist(),
        }
        for name, x in seen.items()
    }
    edges = [0] + [len(part) for part in torch.arange(args.length).tensor_split(min(args.buckets, args.length))]
    return {"positions": torch.tensor(edges).cumsum(0).tolist(), "rows": rows}


def task_quality(task: str, questions: tuple, args, retro: RetroConfig, model: Llama, tok: Tokenizer) -> dict:
    """Free-running: every method answers the same questions by itself."""
    idx, answers, steps = questions
    seen, shares = {}, {}
    for name, decoder, shares[name] in each_method(task, args, retro, model, len(idx), args.prefix + steps):
        seen[name] = lines_right(decoder, idx, answers, tok, steps)
    return {
        name: {
            "kv_share": shares[name],
            "right": x.mean().item(),
            "right_to_quest": against(x, seen["Quest"]),
            "right_by_quarter": parts(x, 4),
        }
        for name, x in seen.items()
    }


def table(title: str, head: list[str], rows: list[list[str]]):
    """Prints columns as wide as they need to be: names to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    print(f"\n{title}\n")
    for row in [head, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())


def signed(pair: list[float], digits: int) -> str:
    return f"{pair[0]:+.{digits}f} ±{pair[1]:.{digits}f}"


def show_text(text: dict, args):
    rows = text["rows"].items()
    head = ["method", "KV read", "KL", "to Quest", "nats/token lost", "to Quest"]
    figures = [
        [name, f"{r['kv_share']:.1%}", f"{r['kl']:.5f}", signed(r["kl_to_quest"], 5), f"{r['gap']:+.4f}",
         signed(r["gap_to_quest"], 4)]
        for name, r in rows
    ]  # fmt: skip
    source = args.text or "text sampled from the checkpoint"
    title = f"{args.passages} passages of {source}: {args.prefix} tokens of prompt, {args.length} decoded, teacher-forced"
    table(title, head, figures)
    spans = [f"{a + 1}-{b}" for a, b in zip(text["positions"], text["positions"][1:], strict=False)]
    kl = [[name, *(f"{x:.5f}" for x in r["kl_by_position"])] for name, r in rows]
    table("KL by position behind the prompt", ["method", *spans], kl)
    gap = [[name, *(f"{x:+.4f}" for x in r["gap_by_position"])] for name, r in rows]
    table("Nats a token lost, by position behind the prompt", ["method", *spans], gap)
    layers = [f"layer {i}" for i in range(len(text["rows"]["full"]["attention_error"]))]
    errors = [[name, *(f"{x:.3f}" for x in r["attention_error"])] for name, r in rows]
    table("Attention outputs: distance to full attention's, relative to their length", ["method", *layers], errors)


def show_task(task: str, rows: dict, args):
    figures = [
        [name, f"{r['kv_share']:.1%}", f"{r['right']:.1%}", signed([100 * x for x in r["right_to_quest"]], 1),
         *(f"{x:.0%}" for x in r["right_by_quarter"])]
        for name, r in rows.items()
    ]  # fmt: skip
    title = f"{task}: {args.questions} questions of {args.entries} entries, answers free-running, lines exactly right"
    quarters = [f"quarter {i + 1}" for i in range(len(rows["full"]["right_by_quarter"]))]
    table(title, ["method", "KV read", "right", "to Quest (points)", *quarters], figures)


# A few minutes on two CPU cores, in place of the defaults; what is given on the command line goes before.
QUICK = {"passages": 8, "prefix": 1024, "length": 96, "questions": 8, "entries": 12}


def quality(args) -> dict:
    at_least(args, passages=2, prefix=1, length=1, questions=0, entries=1, buckets=1)
    if args.questions == 1 or args.entries > len(NAMES):
        raise ValueError(f"questions must not be 1 and entries at most {len(NAMES)}, not {args.questions} and {args.entries}")
    retro, model, tok = setup(args)
    questions = {task: task_questions(task, args, model, tok) for task in TASKS} if args.questions else {}
    results = {"text": text_quality(passages(args, model, tok), args, retro, model), "tasks": {}}
    show_text(results["text"], args)
    for task in questions:
        results["tasks"][task] = task_quality(task, questions[task], args, retro, model, tok)
        show_task(task, results["tasks"][task], args)
    return results


# ----------------------------------------------------------------------------------------------------------------------
# exposure


class PageRanks(Neighbour):
    """Attends to everything, and notes at each step in which order Quest would have taken the pages."""

    def prefill(self, q, k, v):
        super().prefill(q, k, v)
        self.ranks = []

    def decode(self, q, k, v, cos, sin, t):
        q = write(q, k, v, cos, sin, self.cache, t)
        scores = score(q, self.cache, t)
        scores[..., -1] = torch.inf  # the newest page is always loaded
        order = scores.argsort(dim=-1, descending=True, stable=True)
        self.ranks.append(order.argsort(dim=-1))  # (B, n_kv_head, pages held): 0 is the page taken first
        return combine(*attend(q, self.cache, None, None, t), self.cache, t)


def overlap(ranks: list[torch.Tensor], selected: list[int], distance: int) -> list[float]:
    """Of the pages that a step takes, the shares that the step `distance` before had in its top-k and in its next k.

    ranks: of each step (B, n_kv_head, pages held); selected: its k. A page begun since then is in neither.
    """
    shares = []
    for i in range(distance, len(ranks)):
        now, past, k = ranks[i] < selected[i], ranks[i - distance], selected[i - distance]
        past = torch.nn.functional.pad(past, (0, now.shape[2] - past.shape[2]), value=2 * k)
        shares.append(torch.stack([(now & (past < k)).sum(), (now & (past >= k) & (past < 2 * k)).sum()]) / now.sum())
    return torch.stack(shares).mean(dim=0).tolist()


def page_overlaps(args, retro: RetroConfig, model: Llama, idx: torch.Tensor) -> dict[int, list[float]]:
    """Distance -> overlap with the past query's top-k and next-k, a mean over the sparse layers (paper, figure 2b)."""
    progress("pages wanted with full attention")
    decoder = Decoder(model, len(idx), replace(retro, impl="torch"), idx.shape[1])
    layers = [PageRanks(layer.cache) for layer in decoder.layers[retro.dense_layers :]]
    decoder.layers[retro.dense_layers :] = layers
    deque(forced(decoder, idx, args.prefix), maxlen=0)
    selected = [retro.pages_selected(t) for t in range(args.prefix, idx.shape[1] - 1)]
    return {
        d: torch.tensor([overlap(layer.ranks, selected, d) for layer in layers]).mean(dim=0).tolist()
        for d in range(1, args.distance + 1)
    }


def effective_budget(retro: RetroConfig, args, model: Llama, idx: torch.Tensor) -> float:
    """Pages that a query is exposed to in the end, in a unit of those selected for it (paper, figure 2c)."""
    progress(f"exposure: W={retro.window}")
    decoder = Decoder(model, len(idx), retro, idx.shape[1])
    deque(forced(decoder, idx, args.prefix), maxlen=0)
    counts = sum(layer.cache.exposure.sum((0, 1)) for layer in decoder.layers if not layer.dense)
    loaded, first_seen = counts.tolist()
    return 1 + first_seen / loaded


def exposure(args) -> dict:
    at_least(args, passages=1, prefix=1, length=2, distance=1)
    if args.distance >= args.length:
        raise ValueError(f"distance must be between 1 and length - 1 = {args.length - 1}, not {args.distance}")
    retro, model, tok = setup(args)
    if retro.dense_layers == model.config.n_layer:
        raise ValueError(f"dense_layers must be at most {model.config.n_layer - 1}, not {retro.dense_layers}: no layer selects")
    idx = passages(args, model, tok)
    overlaps = page_overlaps(args, retro, model, idx)
    windows = sorted({1, *args.windows})
    budgets = {w: effective_budget(replace(retro, window=w), args, model, idx) for w in windows}
    rows = [[str(d), f"{top:.1%}", f"{beyond:.1%}", f"{top + beyond:.1%}"] for d, (top, beyond) in overlaps.items()]
    title = "Pages wanted now that a past query had in its top-k or next-k (full attention)"
    table(title, ["steps back", "top-k", "next-k", "both"], rows)
    rows = [[str(w), f"{x:.3f}x"] for w, x in budgets.items()]
    table("Pages a query meets in the end, in units of those selected for it", ["W", "exposure"], rows)
    return {"overlap": overlaps, "effective_budget": budgets}


# ----------------------------------------------------------------------------------------------------------------------
# longgen

INSTRUCTION = (
    "Answer all of the questions below, one after the other and step by step, in the form of the examples: begin each answer "
    "with Answer_ and the number of its question, and end it with 'The answer is' and a number. Do not repeat the questions."
)
NUMBER = r"-?\d[\d,]*(?:\.\d+)?"


def to_number(text: str) -> float:
    return float(text.replace(",", ""))


def read_questions(path: str, needed: int) -> list[dict]:
    """Questions, worked answers and results out of GSM8K's JSONL, where an answer ends in `#### number`."""
    pairs = []
    for i, line in enumerate(read_text(path).rstrip("\n").split("\n"), 1):
        try:
            pair = json.loads(line)
            # GSM8K marks what a calculator should do: <<48/2=24>>.
            work, result = re.sub(r"<<.*?>>", "", pair["answer"]).split("####")
            pairs.append({"question": pair["question"].strip(), "work": work.strip(), "result": to_number(result)})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path}: line {i} is not a question and an answer that ends in '#### number'") from None
    if len(pairs) < needed:
        raise ValueError(f"{path} has {len(pairs)} questions: examples + prompts * the largest n need {needed}")
    return pairs


def longgen_prompt(examples: list[dict], questions: list[dict]) -> str:
    """Worked examples in the form that the answer shall have, then the questions; all answers are to follow in one text."""
    asked = lambda pairs: [f"Question_{i}: {p['question']}" for i, p in enumerate(pairs, 1)]  # noqa: E731
    worked = [f"Answer_{i}: {p['work']} The answer is {p['result']:.12g}." for i, p in enumerate(examples, 1)]
    return "\n\n".join([INSTRUCTION, "Examples", *asked(examples), *worked, "Questions", *asked(questions), "Answers\n"])


def read_answers(text: str) -> dict[int, float]:
    """Number of the question -> result, wherever in the text the answer stands.

    The result is the number behind 'The answer is', else the last one before the next answer begins. Of several answers with
    the same number the first that holds a result counts: what follows may be another question of the model's own making.
    """
    found = {}
    pieces = re.split(r"Answer_(\d+)", text)
    for i, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        stated = re.search(rf"[Tt]he answer is[^\d\n]*?({NUMBER})", piece)
        numbers = [stated[1]] if stated else re.findall(NUMBER, piece)
        if numbers:
            found.setdefault(int(i), to_number(numbers[-1]))
    return found


def finished_runs(out: Path) -> list[dict]:
    """The records in the file. A last line without its end was cut off by an interruption: it is dropped from the file."""
    if not out.exists():
        return []
    text = read_text(out)
    whole = text[: text.rfind("\n") + 1]
    try:
        records = [json.loads(line) for line in whole.splitlines()]
        if not all(record["run"] and "right" in record for record in records):
            raise KeyError
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"out {out}: exists, and is not a file of this command's results") from None
    if whole != text:
        os.truncate(out, len(whole.encode()))
    return records


def longgen_jobs(args, retro: RetroConfig, model: Llama, tok: Tokenizer):
    """Yields what decides a result (and so tells it apart in the file), the configuration, the prompt's ids, the questions."""
    pairs = read_questions(args.questions, args.examples + args.prompts * max(args.n))
    settings = {"checkpoint": str(args.checkpoint), "questions": args.questions, "dtype": str(model.norm.weight.dtype)}
    settings |= {name: getattr(args, name) for name in ("examples", "answer_tokens", "chat")}
    for n, i in itertools.product(args.n, range(args.prompts)):
        questions = pairs[args.examples + i * n : args.examples + (i + 1) * n]
        prompt = longgen_prompt(pairs[: args.examples], questions)
        ids = tok.chat([("user", prompt)]) if args.chat else tok.encode(prompt, bos=True)
        length = len(ids) + args.answer_tokens * n
        if length > model.config.max_seq_len:
            raise ValueError(
                f"n = {n}: a prompt of {len(ids)} tokens and {args.answer_tokens} answer_tokens for each question "
                f"make {length}, the context is {model.config.max_seq_len}"
            )
        for name, config in methods(retro, args.windows).items():
            run = settings | {"n": n, "prompt": i, "method": name, "retro": asdict(config) if config else None}
            yield run, config, ids, questions


def answer_prompt(name, config, max_new_tokens: int, model, tok, ids: list[int], questions: list[dict]) -> dict:
    """One generation, greedy, until the model stops or has made `max_new_tokens`; and what of it is right."""
    prompt = torch.tensor([ids], device=model.norm.weight.device)  # (1, T)
    decoder = new_decoder(name, config, model, 1, len(ids) + max_new_tokens)
    new = torch.cat(list(decoder.stream(prompt, max_new_tokens, temperature=0, stop_tokens=tok.stop_tokens))).tolist()
    text = tok.decode([token for token in new if token not in tok.stop_tokens])
    found = read_answers(text)
    return {
        "right": [found.get(i) == pair["result"] for i, pair in enumerate(questions, 1)],
        "answered": [i in found for i in range(1, len(questions) + 1)],
        "tokens": len(new),
        # The first token comes out of the prefill.
        "kv_share": kv_share(name, config, model.config.n_layer, range(len(ids), len(ids) + len(new) - 1)),
        "text": text,
    }


def longgen_records(args, retro: RetroConfig, model: Llama, tok: Tokenizer):
    """Yields a record for each prompt and method: from the file, or made now and put into the file at once."""
    out = Path(args.out)
    finished = finished_runs(out)
    jobs = list(longgen_jobs(args, retro, model, tok))
    with open(out, "a", encoding="utf-8") as file:
        for run, config, ids, questions in jobs:
            record = next((record for record in finished if record["run"] == run), None)
            if record is None:
                progress(f"n={run['n']}, prompt {run['prompt'] + 1} of {args.prompts}: {run['method']}")
                new_tokens = args.answer_tokens * run["n"]
                record = {"run": run} | answer_prompt(run["method"], config, new_tokens, model, tok, ids, questions)
                file.write(json.dumps(record) + "\n")
                file.flush()
            yield record


def longgen(args) -> dict:
    at_least(args, prompts=1, examples=1, answer_tokens=1)
    args.n = sorted(set(args.n))
    if args.n[0] < 1:
        raise ValueError(f"n must be >= 1, not {args.n[0]}")
    groups = {}
    for record in longgen_records(args, *setup(args)):
        groups.setdefault((record["run"]["n"], record["run"]["method"]), []).append(record)
    results = [
        {"n": n, "method": method}
        | {x: np.mean([r[x] for r in group]).item() for x in ("right", "answered", "tokens", "kv_share")}
        for (n, method), group in groups.items()
    ]
    rows = [
        [f"n={r['n']} {r['method']}", f"{r['kv_share']:.1%}", f"{r['right']:.1%}", f"{r['answered']:.1%}", f"{r['tokens']:.0f}"]
        for r in results
    ]
    title = f"{args.prompts} prompts of n questions each; an unanswered question counts as wrong"
    table(title, ["", "KV read", "right", "answered", "tokens"], rows)
    return {"rows": results}


# ----------------------------------------------------------------------------------------------------------------------
# picture

COLORS = ["#D55E00", "#56B4E9", "#0072B2", "#009E73", "#CC79A7", "#E69F00"]  # Okabe and Ito's, which the color-blind tell apart


def last_line(path: str, command: str) -> dict:
    """The results of a command whose output was saved: its last line is the JSON."""
    try:
        record = json.loads(read_text(path).rstrip().split("\n")[-1])
        return {command: record["results"]}[record["command"]]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{path}: its last line is not the JSON of bench.py {command}") from None


def picture(args) -> dict:
    text, met = last_line(args.quality, "quality")["text"], last_line(args.exposure, "exposure")["effective_budget"]
    try:
        import matplotlib
    except ImportError:
        raise ValueError("matplotlib is not installed: pip install matplotlib") from None
    matplotlib.use("Agg")  # draws into a file, needs no display
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained", dpi=150)
    ends = text["positions"]
    middles = [(a + b) / 2 for a, b in zip(ends, ends[1:], strict=False)]
    drawn = {name: row["kl_by_position"] for name, row in text["rows"].items() if name.startswith(("Quest", "Retro"))}
    for (name, kl), color, marker in zip(drawn.items(), itertools.cycle(COLORS), itertools.cycle("osD^vP"), strict=False):
        left.plot(middles, kl, color=color, marker=marker, label=name)
    left.set(xlabel="tokens generated", ylabel="KL to full attention, nats a token", ylim=(0, None))
    figure.legend(frameon=False, loc="outside lower center", ncols=len(drawn))
    right.plot([int(w) for w in met], list(met.values()), color=COLORS[2], marker="o")
    for w, x in met.items():
        right.annotate(f"{x:.2f}", (int(w), x), xytext=(0, 8), textcoords="offset points", ha="center")
    right.margins(y=0.15)
    right.set(xlabel="window W (1 is Quest)", ylabel="pages met / pages selected", xticks=[int(w) for w in met])
    figure.savefig(args.out)
    print(f"{args.out} written")
    return {"file": args.out}


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def at_least(args, **least: int):
    for name, value in least.items():
        if getattr(args, name) < value:
            raise ValueError(f"{name} must be >= {value}, not {getattr(args, name)}")


def setup(args) -> tuple[RetroConfig, Llama, Tokenizer]:
    """What all measurements need: the budget as a configuration of Quest, the model, its tokenizer."""
    device = choose_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton launches on the current device
    limits = {name: getattr(args, name) for name in ("page_size", "budget", "min_tokens", "dense_layers", "impl")}
    retro = RetroConfig(window=1, **limits)
    methods(retro, args.windows)  # refuses a window before anything is loaded
    _, tok = load(args)
    dtype = DTYPES[args.dtype] if args.dtype != "auto" else torch.bfloat16 if device.type == "cuda" else torch.float32
    return retro, Llama.from_checkpoint(args.checkpoint, device=device, dtype=dtype), tok


def add_method_options(add, min_tokens: int, dense_layers: int, dtype: str):
    add("--checkpoint", default=Path(__file__).resolve().parent / "tiny", help="folder in Meta's format or Hugging Face's")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto is a GPU if there is one")
    add("--dtype", choices=["auto", *DTYPES], default=dtype, help="auto is bfloat16 on a GPU, float32 elsewhere")
    add("--impl", choices=["auto", "torch", "triton"], default="auto", help="auto is triton on a GPU, torch elsewhere")
    add("--windows", type=int, nargs="+", default=[2, 4, 8], help="RetroAttention's windows to measure")
    add("--budget", type=float, default=0.15, help="share of the KV pages that a step loads")
    add("--min_tokens", type=int, default=min_tokens, help="a step never loads less than this many tokens' worth of pages")
    add("--page_size", type=int, default=16, help="tokens a page, a power of two")
    add("--dense_layers", type=int, default=dense_layers, help="first layers that attend to everything")


def add_text_options(add, passages: int, prefix: int, length: int):
    add("--text", default=None, help="file to cut passages from; without it they are sampled from the checkpoint")
    add("--seed", type=int, default=0, help="of the sampled texts and of the tasks' questions")
    add("--passages", type=int, default=passages, help="passages, as one batch")
    add("--prefix", type=int, default=prefix, help="tokens of prompt")
    add("--length", type=int, default=length, help="tokens decoded behind it, a passage")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(run: Callable, help: str):
        sub = commands.add_parser(run.__name__, help=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(run=run)
        return sub.add_argument

    add = command(quality, "fidelity on text and accuracy on the tasks, against full attention")
    # The paper's floor and dense layers would hide all in a small model; bfloat16 rounds by as much as is measured.
    small = {"min_tokens": 32, "dense_layers": 0, "dtype": "float32"}
    add_method_options(add, **small)
    add_text_options(add, passages=24, prefix=2048, length=384)
    add("--questions", type=int, default=24, help="questions of each task; 0 leaves the tasks out")
    add("--entries", type=int, default=32, help="lines to remember, a question")
    add("--buckets", type=int, default=8, help="parts of the decoded text to report on")
    add("--quick", action="store_true", help=", ".join(f"--{name} {value}" for name, value in QUICK.items()))
    add = command(exposure, "which pages neighbouring queries want, and how many a query meets")
    add_method_options(add, **small)
    add_text_options(add, passages=8, prefix=2048, length=256)
    add("--distance", type=int, default=8, help="steps to look back")
    add = command(longgen, "many questions in one prompt (GSM8K's format), for a real checkpoint")
    add_method_options(add, min_tokens=256, dense_layers=2, dtype="auto")
    add("--questions", required=True, help="JSONL with question and answer, which ends in '#### number'")
    add("--out", required=True, help="JSONL of results, one line a finished prompt; what is in it is not run again")
    add("--n", type=int, nargs="+", default=[15, 30, 45], help="questions a prompt")
    add("--prompts", type=int, default=10, help="prompts of each n")
    add("--examples", type=int, default=8, help="worked examples in front, the first questions of the file")
    add("--answer_tokens", type=int, default=256, help="tokens to generate at most, a question")
    add("--chat", action="store_true", help="the prompt is a user's message, in the format of the checkpoint's tokenizer")
    add = command(picture, "draws the results of quality and exposure (needs matplotlib)")
    add("--quality", required=True, help="saved output of bench.py quality")
    add("--exposure", required=True, help="saved output of bench.py exposure")
    add("--out", default="quality.png", help="file to write")
    args = parser.parse_args(argv)
    if args.command == "quality" and args.quick:
        commands.choices["quality"].set_defaults(**QUICK)
        args = parser.parse_args(argv)
    return args


PACKAGES = ("torch", "triton", "numpy", "matplotlib")


def as_json(args: argparse.Namespace, results: dict) -> str:
    device = choose_device(getattr(args, "device", "cpu"))
    record = {
        "command": args.command,
        "arguments": {name: str(x) if isinstance(x, Path) else x for name, x in vars(args).items() if name != "run"},
        "versions": {"python": platform.python_version()} | {d.name: d.version for d in distributions() if d.name in PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "seconds": round(time.time() - START),
        "results": results,
    }
    return json.dumps(record)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        print("\n" + as_json(args, args.run(args)), flush=True)
        return 0
    except BrokenPipeError:  # the reader of our stdout has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        print(f"bench.py: error: {str(error).split(chr(10))[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
