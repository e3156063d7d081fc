"""Every number of the README: python bench.py quality --text book.txt

    quality     what sparse decoding costs in fidelity and accuracy: full attention, Quest, RetroAttention, and five neighbours
    exposure    do neighbouring queries want the same pages, and how many pages does a query meet in the end (paper, figure 2)
    longgen     many questions in one prompt, all answers in one generation, as LongGenBench has it; for a real checkpoint
    kernels     each kernel of a step, one layer: microseconds, and the share of what memory could do; dense attention beside it
    decode      whole steps of a model with random weights: full attention, Quest, RetroAttention; with --long, one long run
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
import statistics
import sys
import time
import timeit
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

import retro_attention
from model import Decoder, Llama, LlamaConfig, Tokenizer
from retro_attention import LayerCache, RetroConfig, accumulator, apply_rope, attend, combine, score, select, store, write
from sample import DTYPES, Parser, choose_device, load, out_of_memory
from tiny.train import NAMES, TASKS

START = time.time()


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

    def __init__(self, cache: LayerCache):
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
        return self.cache.config.pages_selected(t) * self.cache.config.page_size

    def tokens(self, t: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of positions 0 .. t, (B, n_kv_head, t+1, hs) each."""
        return self.cache.k.flatten(2, 3)[:, :, : t + 1], self.cache.v.flatten(2, 3)[:, :, : t + 1]

    def attention(self, q, k, v, visible=None) -> tuple[torch.Tensor, torch.Tensor]:
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

    It is the scores that stay: where a page has begun since then, the page with the lowest of them makes room.
    """

    def decode(self, q, k, v, cos, sin, t):
        q = write(q, k, v, cos, sin, self.cache, t)
        if (int(t) - self.prompt_len) % 2 == 0:
            self.scores = score(q, self.cache, t)  # (B, n_kv_head, pages held); `select` sets the newest page's to infinity
        held = int(t) // self.cache.config.page_size + 1
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


def methods(retro: RetroConfig, windows: list[int], neighbours: Iterable[str] = ()) -> dict[str, RetroConfig | None]:
    """Name -> configuration, None for full attention. Quest is RetroAttention with a window of 1, and nothing else."""
    quest = replace(retro, window=1)
    out = {"full": None, "Quest": quest} | {f"Retro W={w}": replace(retro, window=w) for w in windows}
    # The neighbours read sets of tokens that the kernels do not know, or more rows at once than they can hold.
    return out | dict.fromkeys(neighbours, replace(quest, impl="torch"))


def new_decoder(name: str, retro: RetroConfig | None, model: Llama, B: int, length: int) -> Decoder:
    decoder = (ReSA if name == "ReSA" else Decoder)(model, B, retro, length)
    if name in LAYERS:
        decoder.layers[retro.dense_layers :] = [LAYERS[name](layer.cache) for layer in decoder.layers[retro.dense_layers :]]
    return decoder


def kv_share(name: str, retro: RetroConfig | None, n_layer: int, steps: range) -> float:
    """KV bytes read by the decode steps at these positions, all layers, as a share of full attention's.

    Counted in pages a KV head. A page's bounds are two vectors, one token's worth; Quest reads them for all pages held.
    """
    if retro is None or not steps:
        return 1.0
    total = read = 0
    for step, t in enumerate(steps, 1):
        selected, held = retro.pages_selected(t), t // retro.page_size + 1
        bounds, dense = held / retro.page_size, held * (step % REFRESH == 0)
        total += held
        if name in ("StreamingLLM", "TOVA"):
            read += selected
        elif name == "selection reuse":
            read += selected + bounds * (step % 2)
        elif name == "RefreshKV":
            read += dense or selected
        else:
            read += selected + bounds + dense * (name == "ReSA")
    return (read / total * (n_layer - retro.dense_layers) + retro.dense_layers) / n_layer


# ----------------------------------------------------------------------------------------------------------------------
# quality

PARTS = 8  # of the decoded text and of an answer, to report on one by one


def setup(args) -> tuple[RetroConfig, Llama, Tokenizer]:
    """What all measurements of quality need: the budget as a configuration of Quest, the model, its tokenizer."""
    device = choose_device(args.device)
    limits = {name: getattr(args, name) for name in ("page_size", "budget", "min_tokens", "dense_layers", "impl")}
    retro = RetroConfig(window=1, **limits)
    _, tok = load(args)
    dtype = DTYPES[args.dtype] if args.dtype != "auto" else torch.bfloat16 if device.type == "cuda" else torch.float32
    return retro, Llama.from_checkpoint(args.checkpoint, device=device, dtype=dtype), tok


def read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None


def passages(args, model: Llama, tok: Tokenizer) -> torch.Tensor:
    """(B, prefix + length + 1) ids: passages of the text that do not overlap, evenly spread, each after begin_of_text.

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


def feed(decoder: Decoder, idx: torch.Tensor, decoded: int) -> torch.Tensor:
    """A prompt (B, T), of which the last tokens are decoded and not prefilled -> (B, vocab)."""
    T = idx.shape[1]
    logits = decoder.prefill(idx[:, : T - decoded])
    for token in idx[:, T - decoded :].T:
        logits = decoder.step(token)
    return logits


def forced(decoder: Decoder, idx: torch.Tensor, prefix: int, decoded: int = 0):
    """Feeds tokens prefix .. T-2 of idx (B, T) one by one, after the prompt. Yields, for each, the log-probabilities of the
    next (B, vocab) and the attention outputs of the newest row, before `wo` (n_layer, B, n_head * hs)."""
    feed(decoder, idx[:, :prefix], decoded)
    outputs = []
    decoder.captures = False  # the replay of a CUDA graph calls no hooks
    hooks = [
        layer.attention.register_forward_hook(lambda module, args, x: outputs.append(x[:, -1].float()))
        for layer in decoder.model.layers
    ]
    try:
        for i in range(prefix, idx.shape[1] - 1):
            outputs.clear()
            logits = decoder.step(idx[:, i])
            # After the step's own layers, a dense pass of ReSA's may have left more.
            yield logits.float().log_softmax(dim=-1), torch.stack(outputs[: len(hooks)])
    finally:
        for hook in hooks:
            hook.remove()


def fidelity(steps, full: list, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Steps of a method against full attention's: KL (B, L), nats lost on the text's own tokens `targets` (B, L), and the error
    of each layer's attention output relative to its length (n_layer), a mean over steps and passages."""
    kl, gap, error = [], [], []
    for (logp, out), (logp_full, out_full), target in zip(steps, full, targets.T, strict=True):
        kl.append((logp_full.exp() * (logp_full - logp)).sum(dim=-1))  # (B,)
        gap.append((logp_full - logp).gather(1, target[:, None])[:, 0])  # (B,)
        error.append((out - out_full).norm(dim=-1) / out_full.norm(dim=-1))  # (n_layer, B)
    return torch.stack(kl, 1).cpu(), torch.stack(gap, 1).cpu(), torch.stack(error).mean(dim=0).mean(dim=1).cpu()


def task_questions(name: str, args, model: Llama, tok: Tokenizer) -> tuple[torch.Tensor, list[str], int]:
    """Questions (B, prefix), their answers' texts, and the tokens of the longest. In front of each question, other tasks with
    their answers fill the prompt up."""
    rng, rows, answers, start = random.Random(args.seed), [], [], [tok.bos] * (tok.bos is not None)
    while len(rows) < args.questions:
        question, answer = TASKS[name](rng, args.entries)
        ids, before = tok.encode(question), []
        least = len(start) + len(ids)
        if args.prefix < least:
            raise ValueError(f"prefix must be at least {least} for {args.entries} entries of {name}, not {args.prefix}")
        while len(before) < args.prefix - least:
            before = tok.encode("".join(rng.choice(list(TASKS.values()))(rng, min(32, args.entries)))) + before
        rows.append(start + before[len(before) - (args.prefix - least) :] + ids)
        answers.append(answer)
    steps = max(len(tok.encode(answer)) for answer in answers)
    most = model.config.max_seq_len - steps
    if args.prefix > most:
        raise ValueError(f"prefix must be at most {most} for answers of {steps} tokens in {name}, not {args.prefix}")
    return torch.tensor(rows, device=model.norm.weight.device), answers, steps


def lines_right(decoder, idx: torch.Tensor, decoded: int, answers: list[str], tok: Tokenizer, steps: int) -> torch.Tensor:
    """Answers idx (B, T), of which the last tokens are decoded and not prefilled, greedily and free-running: which lines are
    right, to the letter (B, lines); NaN after the last."""
    T, right = idx.shape[1], []
    last = greedy(decoder, feed(decoder, idx, decoded), steps - 1).argmax(dim=-1)[:, None]
    out = torch.cat((decoder.tokens[:, T : T + steps - 1], last), dim=1)
    for ids, answer in zip(out.tolist(), answers, strict=True):
        wanted, got = answer.strip("\n").split("\n"), tok.decode(ids).split("\n")
        right.append(torch.tensor([a == b for a, b in itertools.zip_longest(wanted, got[: len(wanted)])]).double())
    return torch.nn.utils.rnn.pad_sequence(right, batch_first=True, padding_value=torch.nan)


def compare(title: str, name: str, form: str, values: dict[str, torch.Tensor], rows: dict[str, dict]) -> list[int]:
    """Adds to each method's row what there is to say of its values (B, L), and prints it: their mean; the difference to Quest,
    with a standard error over passages, each paired with itself; the means over parts of L, of which it returns the ends."""
    L, shown = values["Quest"].shape[1], {}
    ends = [0, *itertools.accumulate(len(part) for part in torch.arange(L).tensor_split(min(PARTS, L)))]
    spans = [f"{a + 1}-{b}" for a, b in itertools.pairwise(ends)]
    for method, x in values.items():
        difference, mean = (x - values["Quest"]).double().nanmean(dim=1), x.nanmean().item()  # (B,)
        to_quest = [difference.mean().item(), difference.std().item() / math.sqrt(len(difference))]
        parts = [part.nanmean().item() for part in x.double().tensor_split(ends[1:-1], dim=1)]
        rows[method] |= {name: mean, f"{name}_to_quest": to_quest, f"{name}_by_position": parts}
        shown[method] = {"KV read": rows[method]["kv_share"], "mean": mean} | dict(zip(spans, parts, strict=True))
        shown[method]["to Quest"] = f"{to_quest[0]:+{form}} ±{to_quest[1]:{form}}"
    table(title, shown, {"KV read": ".1%", "mean": form, "to Quest": ""} | dict.fromkeys(spans, form))
    return ends


def each_method(what: str, args, retro: RetroConfig, model: Llama, rows: dict[str, dict], B: int, T: int):
    """Yields each method's name and a fresh decoder; notes the share of KV bytes that it reads at positions prefix .. T-2."""
    for name, config in methods(retro, args.windows, args.neighbours).items():
        progress(f"{what}: {name}")
        rows[name] = {"kv_share": kv_share(name, config, model.config.n_layer, range(args.prefix, T - 1))}
        yield name, new_decoder(name, config, model, B, T)


def prompt_of(args) -> str:
    return f"{args.prefix - args.decoded} tokens prefilled" + (f" and {args.decoded} decoded" if args.decoded else "")


def text_quality(idx: torch.Tensor, args, retro: RetroConfig, model: Llama) -> dict:
    """Teacher-forced: every method reads the same text, and is compared with full attention token by token.

    Full attention's distributions are kept for that: passages * length * vocabulary numbers.
    """
    full, kl, gap, rows = [], {}, {}, {}
    for name, decoder in each_method("text", args, retro, model, rows, *idx.shape):
        steps = forced(decoder, idx, args.prefix, args.decoded)
        full = full or list(steps)
        kl[name], gap[name], error = fidelity(full if name == "full" else steps, full, idx[:, args.prefix + 1 :])
        rows[name]["attention_error"] = error.tolist()
    source = args.text or "text sampled from the checkpoint"
    print(f"\n{args.passages} passages of {source}: {prompt_of(args)}, {args.length} measured, teacher-forced")
    compare("KL to full attention, by position after the prompt", "kl", ".5f", kl, rows)
    ends = compare("Nats a token lost, by position after the prompt", "gap", ".4f", gap, rows)
    errors = {name: {f"layer {i}": x for i, x in enumerate(row["attention_error"])} for name, row in rows.items()}
    title = "Attention outputs: distance to full attention's, relative to their length"
    table(title, errors, dict.fromkeys(errors["full"], ".3f"))
    return {"positions": ends, "rows": rows}


def task_quality(task: str, questions: tuple, args, retro: RetroConfig, model: Llama, tok: Tokenizer) -> dict:
    """Free-running: every method answers the same questions by itself."""
    idx, answers, steps = questions
    right, rows = {}, {}
    for name, decoder in each_method(task, args, retro, model, rows, len(idx), args.prefix + steps):
        right[name] = lines_right(decoder, idx, args.decoded, answers, tok, steps)
    title = f"{task}: {args.questions} questions of {args.entries} entries, {prompt_of(args)}; lines exactly right, greedy"
    compare(title, "right", ".1%", right, rows)
    return rows


def quality(args) -> dict:
    if args.entries > len(NAMES):
        raise ValueError(f"entries must be at most {len(NAMES)}, not {args.entries}")
    if args.decoded >= args.prefix:
        raise ValueError(f"decoded must be between 0 and {args.prefix - 1}, not {args.decoded}: less than prefix")
    retro, model, tok = setup(args)
    questions = {task: task_questions(task, args, model, tok) for task in args.tasks}  # names a mistake before the long work
    text = text_quality(passages(args, model, tok), args, retro, model)
    return {"text": text, "tasks": {task: task_quality(task, questions[task], args, retro, model, tok) for task in questions}}


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
        past = pad(past, (0, now.shape[2] - past.shape[2]), value=2 * k)
        shares.append(torch.stack([(now & (past < k)).sum(), (now & (past >= k) & (past < 2 * k)).sum()]) / now.sum())
    return torch.stack(shares).mean(dim=0).tolist()


def page_overlaps(args, retro: RetroConfig, model: Llama, idx: torch.Tensor) -> dict[int, list[float]]:
    """Distance -> overlap with the past query's top-k and next-k, a mean over the sparse layers (paper, figure 2b)."""
    progress("pages wanted with full attention")
    decoder = Decoder(model, len(idx), replace(retro, impl="torch"), idx.shape[1])
    layers = [PageRanks(layer.cache) for layer in decoder.layers[retro.dense_layers :]]
    decoder.layers[retro.dense_layers :] = layers
    for _ in forced(decoder, idx, args.prefix):
        pass
    selected = [retro.pages_selected(t) for t in range(args.prefix, idx.shape[1] - 1)]
    by_layer = {d: [overlap(layer.ranks, selected, d) for layer in layers] for d in range(1, args.distance + 1)}
    return {d: torch.tensor(shares).mean(dim=0).tolist() for d, shares in by_layer.items()}


def effective_exposure(retro: RetroConfig, args, model: Llama, idx: torch.Tensor) -> float:
    """Pages that a query is exposed to in the end, in a unit of those selected for it (paper, figure 2c)."""
    progress(f"exposure: W={retro.window}")
    decoder = Decoder(model, len(idx), retro, idx.shape[1])
    for _ in forced(decoder, idx, args.prefix):
        pass
    loaded, first_seen = sum(layer.cache.totals.sum((0, 1)) for layer in decoder.layers if not layer.dense).tolist()
    return 1 + first_seen / loaded


def exposure(args) -> dict:
    if args.distance >= args.length:
        raise ValueError(f"distance must be between 1 and length - 1 = {args.length - 1}, not {args.distance}")
    retro, model, tok = setup(args)
    if retro.dense_layers == model.config.n_layer:
        raise ValueError(f"dense_layers must be at most {model.config.n_layer - 1}, not {retro.dense_layers}: no layer selects")
    idx = passages(args, model, tok)
    overlaps = page_overlaps(args, retro, model, idx)
    exposures = {w: effective_exposure(replace(retro, window=w), args, model, idx) for w in sorted({1, *args.windows})}
    title = "Pages wanted now that a past query had in its top-k or next-k (full attention)"
    rows = {f"{d} steps back": {"top-k": a, "next-k": b, "both": a + b} for d, (a, b) in overlaps.items()}
    table(title, rows, {"top-k": ".1%", "next-k": ".1%", "both": ".1%"})
    title = "Pages a query meets in the end, in units of those selected for it"
    table(title, {f"W={w}": {"exposure": x} for w, x in exposures.items()}, {"exposure": ".3f"})
    return {"overlap": overlaps, "effective_exposure": exposures}


# ----------------------------------------------------------------------------------------------------------------------
# longgen

INSTRUCTION = (
    "Answer all of the questions below, one after the other and step by step, in the form of the examples: begin each answer "
    "with Answer_ and the number of its question, and end it with 'The answer is' and a number. Do not repeat the questions."
)
NUMBER = r"-?\d[\d,]*(?:\.\d+)?"


def read_questions(path: str, needed: int) -> list[dict]:
    """Questions, worked answers and results out of GSM8K's JSONL, where an answer ends in `#### number`."""
    pairs = []
    for i, line in enumerate(read_text(path).rstrip("\n").split("\n"), 1):
        try:
            pair = json.loads(line)
            # GSM8K marks what a calculator should do: <<48/2=24>>.
            work, result = re.sub(r"<<.*?>>", "", pair["answer"]).split("####")
            result = float(result.replace(",", ""))
            pairs.append({"question": pair["question"].strip(), "work": work.strip(), "result": result})
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

    The result is the number after 'The answer is', else the last one before the next answer begins. Of several answers with
    the same number the first that holds a result counts: what follows may be another question of the model's own making.
    """
    found = {}
    pieces = re.split(r"Answer_(\d+)", text)
    for i, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        stated = re.search(rf"[Tt]he answer is[^\d\n]*?({NUMBER})", piece)
        numbers = [stated[1]] if stated else re.findall(NUMBER, piece)
        if numbers:
            found.setdefault(int(i), float(numbers[-1].replace(",", "")))
    return found


def finished_runs(out: Path) -> dict[str, dict]:
    """The records in the file. A last line without its end was cut off by an interruption: it is dropped from the file."""
    text = read_text(out) if out.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    try:
        if text and not text.startswith('{"run"'):
            raise ValueError
        records = {json.dumps(record["run"]): record for record in map(json.loads, whole.splitlines())}
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
    for n, i in itertools.product(sorted(set(args.n)), range(args.prompts)):
        questions = pairs[args.examples + i * n : args.examples + (i + 1) * n]
        prompt = longgen_prompt(pairs[: args.examples], questions)
        ids = tok.chat([("user", prompt)]) if args.chat else tok.encode(prompt, bos=True)
        most = model.config.max_seq_len - args.answer_tokens * n
        if len(ids) > most:
            raise ValueError(f"n = {n}: the context leaves {most} tokens for a prompt of {len(ids)}: fewer n or answer_tokens")
        for name, config in methods(retro, args.windows).items():
            run = settings | {"n": n, "prompt": i, "method": name, "retro": asdict(config) if config else None}
            yield run, config, ids, questions


def answer_prompt(config, max_new_tokens: int, model, tok, ids: list[int], questions: list[dict]) -> dict:
    """One generation, greedy, until the model stops or has made `max_new_tokens`; and what of it is right."""
    prompt = torch.tensor([ids], device=model.norm.weight.device)  # (1, T)
    decoder = Decoder(model, 1, config, len(ids) + max_new_tokens)
    new = torch.cat(list(decoder.stream(prompt, max_new_tokens, temperature=0, stop_tokens=tok.stop_tokens))).tolist()
    text = tok.decode([token for token in new if token not in tok.stop_tokens])
    found = read_answers(text)
    right = [found.get(i) == pair["result"] for i, pair in enumerate(questions, 1)]
    answered = [i in found for i in range(1, len(questions) + 1)]
    share = kv_share("", config, model.config.n_layer, range(len(ids), len(ids) + len(new) - 1))  # the prefill made the first
    return {"right": right, "answered": answered, "tokens": len(new), "kv_share": share, "text": text}


def longgen(args) -> dict:
    retro, model, tok = setup(args)
    finished, groups = finished_runs(Path(args.out)), {}
    jobs = list(longgen_jobs(args, retro, model, tok))
    with open(args.out, "a", encoding="utf-8", newline="\n") as file:
        for run, config, ids, questions in jobs:
            record = finished.get(json.dumps(run))
            if record is None:
                progress(f"n={run['n']}, prompt {run['prompt'] + 1} of {args.prompts}: {run['method']}")
                record = {"run": run} | answer_prompt(config, args.answer_tokens * run["n"], model, tok, ids, questions)
                print(json.dumps(record), file=file, flush=True)
            groups.setdefault((run["n"], run["method"]), []).append(record)
    rows = {}
    for (n, method), group in groups.items():
        means = {x: np.mean([record[x] for record in group]).item() for x in ("kv_share", "right", "answered", "tokens")}
        rows[f"n={n} {method}"] = {"n": n, "method": method} | means
    title = f"{args.prompts} prompts of n questions each; an unanswered question counts as wrong"
    table(title, rows, {"kv_share": ".1%", "right": ".1%", "answered": ".1%", "tokens": ".0f"})
    return {"rows": list(rows.values())}


# ----------------------------------------------------------------------------------------------------------------------
# kernels and decode

SHAPES = {  # of Llama 3.1 8B, Llama 3.2 1B, and the checkpoint in tiny/
    "8b": LlamaConfig(4096, 32, 32, 8, 128_256, 14_336, 131_072, rope_scaling=8.0),
    "1b": LlamaConfig(2048, 16, 32, 8, 128_256, 8_192, 131_072, rope_scaling=32.0, tie_embeddings=True),
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
    """Shape, dtype and what memory can do, in bytes a second: of a copy, read and written, and of two plain reads (not as a
    graph, in which a copy is slower). The first line of the output says them."""
    gpu, rates = args.device == "cuda", {}
    x = torch.ones(2**30 if gpu else 2**26, device=args.device)
    y = torch.empty_like(x)
    for name, run, nbytes in (("copy", lambda: y.copy_(x), 2 * x.nbytes), ("amax", x.amax, x.nbytes), ("sum", x.sum, x.nbytes)):
        times(run, 3)
        rates[name] = nbytes / statistics.median(times(run, 10)) * 1e3
    where = torch.cuda.get_device_name() if gpu else "No GPU: on the CPU, with the PyTorch reference"
    dtype = torch.bfloat16 if gpu else torch.float32
    print(f"{where}; shape {args.shape}, {dtype}; memory, GB/s:", *(f"{name} {x / 1e9:.0f}" for name, x in rates.items()))
    return replace(SHAPES[args.shape], max_seq_len=max(context for context, _ in args.settings)), dtype, rates


def fits(needed: float, what: str) -> bool:
    """Whether that many bytes are free. A line says so if not."""
    if not torch.cuda.is_available():
        return True
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if needed > free:
        print(f"{what}: skipped, it needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free")
    return needed <= free


def fill(cache: LayerCache, t: int):
    """Random contents, as a step to position t finds them: some pages were seen by the window's past rows, some not."""
    for x in (cache.k, cache.v, cache.out, cache.lse):
        if x is not None:
            x.normal_()
    if cache.k_min is not None:
        torch.amin(cache.k, dim=3, out=cache.k_min)
        torch.amax(cache.k, dim=3, out=cache.k_max)
        cache.last_loaded.random_(t - 2 * cache.config.window, t)


def layer_bytes(config: RetroConfig, shape: LlamaConfig, B: int, context: int, size: int) -> dict[str, int]:
    """Bytes that a layer must read, `size` a number of the model's. "four", the floor of the kernels after `write`, is what no
    implementation gets around: the bounds of the pages held, and K and V of the pages selected."""
    held, selected = (context - 1) // config.page_size + 1, config.pages_selected(context - 1)
    vector = B * shape.n_kv_head * shape.head_size * size  # a token's keys
    score, attend = 2 * held * vector, 2 * selected * config.page_size * vector
    return {"score": score, "attend": attend, "four": score + attend, "dense": 2 * context * vector}


KERNELS = ("write", "score", "select", "attend", "combine")
DENSE = ("flash", "cudnn", "ours")
HEADLINE = (32_768, 2048)  # Quest's: context, tokens selected


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
    }


def kernel_row(config: RetroConfig, shape, B: int, context: int, n: int, device: str, dtype, rate: float) -> dict:
    """Microseconds a layer, bytes, and the share of its byte floor that each kernel reaches."""
    us, nbytes = {}, layer_bytes(config, shape, B, context, dtype.itemsize)
    layers = [stages(config, shape, B, context, device, dtype) for _ in range(n)]
    for name in layers[0]:
        try:
            us[name] = microseconds([layer[name] for layer in layers])
        except RuntimeError as error:  # SDPA names backends that cannot do it
            if name not in DENSE:
                raise
            progress(f"{name}: {str(error).splitlines()[0]}")
    floors = {name: nbytes[name] for name in ("score", "attend", "four")} | dict.fromkeys(DENSE, nbytes["dense"])
    share = {name: floors[name] / rate * 1e6 / us[name] for name in floors if name in us}
    best = min(us[name] for name in DENSE if name in us)
    row = {"context": context, "batch": B, "window": config.window, "budget": config.budget, "us": us, "bytes": nbytes}
    return row | {"share": share, "best/four": best / us["four"], "ours/four": us["ours"] / us["four"]}


@torch.inference_mode()
def kernels(args) -> dict:
    shape, dtype, rates = begin(args)
    L2 = torch.cuda.get_device_properties(0).L2_cache_size if args.device == "cuda" else 0
    rows = []
    for context, B in args.settings:
        configs = [RetroConfig(window=w) for w in args.windows]
        if context == HEADLINE[0]:
            configs.append(RetroConfig(window=1, budget=HEADLINE[1] / context))
        nbytes = layer_bytes(configs[0], shape, B, context, dtype.itemsize)
        n = max(2, -(-3 * L2 // nbytes["score"]))  # even the bounds of all layers do not stay in the L2 cache
        if fits(1.1 * n * (nbytes["dense"] + nbytes["score"]) + 1e9, f"{context}x{B}"):
            for config in configs:
                progress(f"kernels: {context}x{B}, W={config.window}, budget {config.budget}")
                rows.append(kernel_row(config, shape, B, context, n, args.device, dtype, max(rates.values())))
    shown = {}
    for r in rows:
        shares = {f"{name} %": 100 * share for name, share in r["share"].items()}
        shown[f"{r['context']}x{r['batch']} {r['budget']:.4g} W={r['window']}"] = (
            r | r["us"] | shares | {"MB": r["bytes"]["four"] / 1e6}
        )
    forms = dict.fromkeys([*KERNELS, "four", *DENSE], ".1f") | dict.fromkeys(["score %", "attend %", "four %", "ours %"], ".0f")
    title = """Microseconds a layer, and % of what the bytes allow; four: score to combine, with their MB. Dense attention:
SDPA with flash and cuDNN, and our attend over all pages; the best of these, and ours, in units of four."""
    table(title, shown, forms | {"MB": ".1f", "best/four": ".2f", "ours/four": ".2f"})
    return {"memory_rate": rates, "rows": rows}


@torch.inference_mode(False)  # ordinary tensors, which a decoder can lay side by side
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


def megabytes(decoder: Decoder) -> dict[str, float]:
    """What is in memory: the weights, the parts of the caches, and the GPU's peak since the counter was reset."""
    parts = {"kv": ("k", "v"), "bounds": ("k_min", "k_max"), "outputs": ("out", "lse")}
    held = {name: [getattr(layer.cache, x) for layer in decoder.layers for x in xs] for name, xs in parts.items()}
    held["weights"] = decoder.model.parameters()
    sizes = {f"{name} MB": sum(x.nbytes for x in tensors if x is not None) / 1e6 for name, tensors in held.items()}
    return sizes | {"GPU peak MB": torch.cuda.max_memory_allocated() / 1e6}


def step_times(model: Llama, B: int, retro: RetroConfig | None, context: int) -> tuple[list[float], dict]:
    """Milliseconds of the steps to the last 30 positions of the context, and what is in memory."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    decoder = Decoder(model, B, retro, context)
    decoder.position = context - 36
    decoder.t.fill_(decoder.position)
    for layer in decoder.layers:
        fill(layer.cache, decoder.position)
    token = torch.randint(model.config.vocab_size, (B,), device=decoder.t.device)
    times(lambda: decoder.step(token), 5)  # the first compiles, the second captures the graph
    return times(lambda: decoder.step(token), 30), megabytes(decoder)


def step_rows(model: Llama, args, context: int, B: int, rate: float) -> list[dict]:
    configs = methods(RetroConfig(dense_layers=args.dense_layers), args.windows)
    ms, memory, rows = {name: [] for name in configs}, {}, []
    for i in range(args.rounds):
        progress(f"decode: {context}x{B}, round {i + 1} of {args.rounds}")
        for name, retro in configs.items():
            new, memory[name] = step_times(model, B, retro, context)
            ms[name] += new
    ms = {name: statistics.median(x) for name, x in ms.items()}
    for name, retro in configs.items():
        nbytes = statistics.mean(step_bytes(model, retro, B, n) for n in range(context - 29, context + 1))
        seconds = ms[name] / 1e3
        row = {"context": context, "batch": B, "method": name, "ms": ms[name], "tokens/s": B / seconds, "bytes": nbytes}
        row |= {"GB/s": nbytes / seconds / 1e9, "share": nbytes / rate / seconds}
        rows.append(row | {"full/this": ms["full"] / ms[name], "this/Quest": ms[name] / ms["Quest"]} | memory[name])
    return rows


@torch.inference_mode()
def decode(args) -> dict:
    if args.dense_layers > SHAPES[args.shape].n_layer:
        raise ValueError(f"dense_layers must be between 0 and {SHAPES[args.shape].n_layer}, not {args.dense_layers}")
    if args.long:
        return long_run(args)
    shape, dtype, rates = begin(args)
    model, rows = random_model(shape, args.device, dtype), []
    for context, B in args.settings:
        nbytes = layer_bytes(RetroConfig(), shape, B, context, dtype.itemsize)
        if fits(1.02 * shape.n_layer * (nbytes["dense"] + nbytes["score"]) + 1e9, f"{context}x{B}"):
            rows += step_rows(model, args, context, B, max(rates.values()))
    forms = {"ms": ".3f", "tokens/s": ".1f", "GB/s": ".1f", "share": ".0%", "full/this": ".2f", "this/Quest": ".3f"}
    forms |= dict.fromkeys([f"{part} MB" for part in ("kv", "bounds", "outputs", "weights", "GPU peak")], ".2f")
    title = "A step of the batch; share: of what the bytes allow; outputs: the output cache"
    table(title, {f"{r['context']}x{r['batch']} {r['method']}": r for r in rows}, forms)
    return {"memory_rate": rates, "rows": rows}


def greedy(decoder: Decoder, logits: torch.Tensor, n: int) -> torch.Tensor:
    for _ in range(n):
        logits = decoder.step(logits.argmax(dim=-1))
    return logits


def long_run(args) -> dict:
    """One generation of many tokens: does a step take longer than its bytes explain, does memory grow, do NaN appear?"""
    n, gpu, prompt_len, compared = args.long, args.device == "cuda", 1000, min(args.long, 300)
    args.shape, args.settings = "tiny", [(n + prompt_len, 1)]
    shape, dtype, rates = begin(args)
    model, retro = random_model(shape, args.device, dtype), RetroConfig(window=8, dense_layers=args.dense_layers)
    prompt = torch.randint(shape.vocab_size, (1, prompt_len), device=args.device)
    decoder, eager, rows = Decoder(model, 1, retro), Decoder(model, 1, retro), {}
    eager.captures = False
    greedy(eager, eager.prefill(prompt), compared)
    logits = greedy(decoder, decoder.prefill(prompt), 3)  # captures the graph, off the clock
    for first, last in itertools.pairwise((3, n // 4, n // 2, 3 * n // 4, n)):
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        logits = greedy(decoder, logits, last - first)
        finite = logits.isfinite().all().item()  # waits for the device
        ms = 1e3 * (time.perf_counter() - start) / (last - first)
        floor_ms = 1e3 * step_bytes(model, retro, 1, prompt_len + (first + last) // 2) / max(rates.values())
        row = {"ms": ms, "ms by bytes": floor_ms, "finite": finite, "GPU bytes before": before}
        rows[f"{first + 1}-{last}"] = row | {"GPU bytes after": torch.cuda.memory_allocated()}
        progress(f"long: {last} of {n} tokens")
    same = torch.equal(*(x.tokens[:, prompt_len : prompt_len + compared] for x in (decoder, eager))) if gpu else "no graph here"
    title = f"A token of one generation, W=8. First {compared} the same with and without a graph: {same}"
    table(title, rows, {"ms": ".3f", "ms by bytes": ".3f", "finite": "", "GPU bytes before": "", "GPU bytes after": ""})
    return {"memory_rate": rates, "rows": rows, "graph_equals_eager": same}


# ----------------------------------------------------------------------------------------------------------------------
# picture


def last_line(path: str, command: str) -> dict:
    """The record of a command whose output was saved: its last line."""
    try:
        record = json.loads(read_text(path).rstrip().split("\n")[-1])
        return {command: record}[record["command"]]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{path}: its last line is not the JSON of bench.py {command}") from None


def picture(args) -> dict:
    records = [last_line(path, "quality") for path in args.quality]
    decoded = [record["arguments"].pop("decoded", 0) for record in records]
    if len(set(decoded)) < len(decoded) or any(record["arguments"] != records[0]["arguments"] for record in records):
        raise ValueError(f"quality {' '.join(args.quality)}: must differ in their --decoded, and in no other argument")
    runs = {n: record["results"]["text"]["rows"] for n, record in sorted(zip(decoded, records, strict=True))}
    met = last_line(args.exposure, "exposure")["results"]["effective_exposure"]
    try:
        import matplotlib
    except ImportError:
        raise ValueError("matplotlib is not installed: pip install matplotlib") from None
    matplotlib.use("Agg")  # draws into a file, needs no display
    from matplotlib import pyplot

    pyplot.style.use(["seaborn-v0_8-colorblind", {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}])
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained", dpi=150)
    drawn = [name for name in runs[decoded[0]] if name.startswith(("Quest", "Retro"))]
    for name, marker in zip(drawn, itertools.cycle("osD^vP"), strict=False):
        left.plot(list(runs), [rows[name]["kl"] for rows in runs.values()], marker=marker, label=name)
    left.set(xlabel="tokens of the context that were decoded", ylabel="KL to full attention, nats a token")
    figure.legend(frameon=False, loc="outside lower center", ncols=len(drawn))
    right.plot([int(w) for w in met], list(met.values()), marker="o")
    for w, x in met.items():
        right.annotate(f"{x:.2f}", (int(w), x), xytext=(-4, 6), textcoords="offset points", ha="right")
    right.margins(x=0.16, y=0.15)
    right.set(xlabel="window W (1 is Quest)", ylabel="pages met / pages selected", xticks=[int(w) for w in met])
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
    context, batch = map(int, text.split("x"))
    if context < 256 or batch < 1:
        raise argparse.ArgumentTypeError(f"must have a context >= 256 and a batch >= 1, not {text}")
    return context, batch


def add_method_options(add: Callable, retro: RetroConfig, dtype: str):
    add("--checkpoint", default=Path(__file__).resolve().parent / "tiny", help="folder in Meta's format or Hugging Face's")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto is a GPU if there is one")
    add("--dtype", choices=["auto", *DTYPES], default=dtype, help="auto is bfloat16 on a GPU, float32 elsewhere")
    add("--impl", choices=["auto", "torch", "triton"], default=retro.impl, help="auto is triton on a GPU, torch elsewhere")
    add("--windows", type=at_least(1), nargs="+", default=[2, 4, 8], help="RetroAttention's windows to measure")
    add("--budget", type=float, default=retro.budget, help="share of the KV pages that a step loads")
    add("--min_tokens", type=int, default=retro.min_tokens, help="a step loads at least this many tokens' worth of pages")
    add("--page_size", type=int, default=retro.page_size, help="tokens a page, a power of two")
    add("--dense_layers", type=int, default=retro.dense_layers, help="first layers that attend to everything")


def add_text_options(add: Callable, passages: int, least: int, length: int):
    # RetroAttention's own floor and dense layers would hide all in a small model; bfloat16 rounds by as much as is measured.
    add_method_options(add, RetroConfig(min_tokens=32, dense_layers=0), dtype="float32")
    add("--text", default=None, help="file to cut passages from; without it they are sampled from the checkpoint")
    add("--seed", type=int, default=0, help="of the sampled texts and of the tasks' questions")
    add("--passages", type=at_least(least), default=passages, help="passages, as one batch")
    add("--prefix", type=at_least(1), default=2048, help="tokens of prompt")
    add("--length", type=at_least(1), default=length, help="tokens decoded after it, a passage")


def add_quality_options(add: Callable):
    add_text_options(add, passages=24, least=2, length=384)
    add("--tasks", choices=list(TASKS), nargs="*", default=list(TASKS), help="of tiny/train.py; none leaves the tasks out")
    add("--decoded", type=at_least(0), default=0, help="the last tokens of the prompt to decode one by one: not prefilled")
    add("--neighbours", choices=NEIGHBOURS, nargs="*", default=NEIGHBOURS, help="to compare with; none leaves them out")
    add("--questions", type=at_least(2), default=24, help="questions of each task")
    add("--entries", type=at_least(1), default=32, help="lines to remember, a question")


def add_longgen_options(add: Callable):
    add_method_options(add, RetroConfig(), dtype="auto")
    add("--questions", required=True, help="JSONL with question and answer, which ends in '#### number'")
    add("--out", required=True, help="JSONL of results, one line a finished prompt; what is in it is not run again")
    add("--n", type=at_least(1), nargs="+", default=[15, 30, 45], help="questions a prompt")
    add("--prompts", type=at_least(1), default=10, help="prompts of each n")
    add("--examples", type=at_least(1), default=8, help="worked examples in front, the first questions of the file")
    add("--answer_tokens", type=at_least(1), default=256, help="tokens to generate at most, a question")
    add("--chat", action="store_true", help="the prompt is a user's message, in the format of the checkpoint's tokenizer")


def add_speed_options(add: Callable, settings: list[tuple[int, int]], windows: list[int]):
    """On a GPU if there is one; else with the PyTorch reference on a few settings, which says little about speed."""
    gpu = torch.cuda.is_available()
    add("--shape", choices=list(SHAPES) if gpu else ["tiny"], default="8b" if gpu else "tiny", help="a Llama's, or tiny/'s")
    settings = settings if gpu else [(1024, 1), (4096, 1)]
    add("--settings", type=setting, nargs="+", default=settings, help="context x batch, as 32768x8")
    add("--windows", type=at_least(1), nargs="+", default=windows, help="W to measure; 1 is Quest")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = [(32_768, 1), (32_768, 8)] if device == "cuda" else [(1024, 1)]
    quick = {
        "quality": {"passages": 8, "prefix": 1024, "length": 96, "questions": 8, "entries": 12},
        "kernels": {"settings": settings, "windows": [1, 2]},
        "decode": {"settings": settings, "rounds": 1},
    }

    def command(run: Callable, help: str, **fixed):
        name = run.__name__
        sub = commands.add_parser(name, help=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(run=run, **fixed)
        if name in quick:
            smaller = ", ".join(f"--{option} {x}" for option, x in quick[name].items())
            sub.add_argument("--quick", action="store_true", help=f"unless given: {smaller}")
        return sub.add_argument

    add_quality_options(command(quality, "fidelity on text and accuracy on the tasks, against full attention"))
    add = command(exposure, "which pages neighbouring queries want, and how many a query meets")
    add_text_options(add, passages=8, least=1, length=256)
    add("--distance", type=at_least(1), default=8, help="steps to look back")
    add_longgen_options(command(longgen, "many questions in one prompt (GSM8K's format), for a real checkpoint"))
    add = command(kernels, "microseconds of each kernel, and of dense attention", device=device)
    add_speed_options(add, [(k * 1024, B) for k in (8, 32, 64, 128) for B in (1, 8)], windows=[1, 2, 8])
    add = command(decode, "milliseconds of whole steps, with random weights and random caches", device=device)
    add_speed_options(add, [(32_768, 1), (131_072, 1), (32_768, 8), (65_536, 8)], windows=[2, 4, 8])
    add("--dense_layers", type=at_least(0), default=0, help="first layers that attend to all; 0: all have the same byte floor")
    add("--rounds", type=at_least(1), default=3, help="times that all methods are measured in turn, 30 steps each")
    add("--long", type=at_least(100), default=0, help="instead, generate so many tokens in one go: tiny/'s shape, W=8")
    add = command(picture, "draws the results of quality and exposure (needs matplotlib)")
    add("--quality", required=True, nargs="+", help="saved outputs of bench.py quality, one for each --decoded")
    add("--exposure", required=True, help="saved output of bench.py exposure")
    add("--out", default="quality.png", help="file to write")

    args = parser.parse_args(argv)
    if getattr(args, "quick", False):  # what is given goes before
        commands.choices[args.command].set_defaults(**quick[args.command])
        args = parser.parse_args(argv)
    return args


def record(args: argparse.Namespace, results: dict) -> dict:
    """The results, and what they depend on."""
    device = choose_device(getattr(args, "device", "cpu"))
    packages = {d.name: d.version for d in distributions() if d.name in ("torch", "triton", "numpy", "matplotlib")}
    return {
        "command": args.command,
        "arguments": {name: str(x) if isinstance(x, Path) else x for name, x in vars(args).items() if name != "run"},
        "versions": {"python": platform.python_version()} | packages,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "seconds": round(time.time() - START),
        "results": results,
    }


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        print("\n" + json.dumps(record(args, args.run(args))), flush=True)
        return 0
    except BrokenPipeError:  # the reader of our stdout has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            raise
        print("bench.py: error:", str(error).split("\n")[0], file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
