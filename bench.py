"""Every number of the README: python bench.py quality --text book.txt

    quality     what sparse decoding costs in fidelity and accuracy: full attention, Quest, RetroAttention, and five neighbours
    exposure    do neighbouring queries want the same pages, and how many pages does a query meet in the end (paper, figure 2)
    longgen     many questions in one prompt, all answers in one generation, as LongGenBench has it; for a real checkpoint
    picture     two panels out of the JSON of `quality` and `exposure`

Tables go to stdout, and as its last line all numbers as one line of JSON, with versions, device and arguments. Progress goes to
stderr. Exit code 0 on success, 2 with one line on a mistake in the arguments or files, 130 after Ctrl-C, 1 if the reader has gone.

Shapes: B passages or questions, L decode steps, T tokens; the rest as in retro_attention.py.
"""

import argparse
import copy
import json
import math
import os
import platform
import random
import re
import sys
import time
from collections import deque
from dataclasses import replace
from pathlib import Path

import torch

from model import Decoder, Llama, Tokenizer
from retro_attention import RetroAttention, RetroConfig, accumulator, apply_rope, attend, combine, merge, score, select, write
from sample import DTYPES, choose_device, load
from tiny.train import TASKS

START = time.time()


def progress(text: str):
    print(f"[{time.time() - START:.0f} s] {text}", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# The neighbours: five other ways to decode, each small enough to be read beside its paper
#
# All get Quest's budget at every step: as many tokens as Quest's pages would hold. Prefill is dense for all of them, and the
# first `dense_layers` stay dense. What they read beyond the budget (page bounds, dense passes) is in `pages_read`.

SINKS = 4  # StreamingLLM's first tokens, which take the attention that has nowhere to go
REFRESH = 32  # steps between two dense passes of RefreshKV and of ReSA


class TokenPolicy(RetroAttention):
    """A layer that chooses single tokens and not pages. Nothing is moved in memory: what is evicted is just not read again."""

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
    """Evicts the token with the least attention of the newest query, meant over all heads of the layer (Oren et al., 2024)."""

    def prefill(self, q, k, v):
        super().prefill(q, k, v)
        t = k.shape[1] - 1
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
        self.prompt_len = k.shape[1]
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


class SelectionReuse(RetroAttention):
    """Quest that chooses pages at every second step only; the step in between reads the pages of the one before."""

    def prefill(self, q, k, v):
        super().prefill(q, k, v)
        self.prompt_len = k.shape[1]

    def decode(self, q, k, v, cos, sin, t):
        q = write(q, k, v, cos, sin, self.cache, t)
        if (int(t) - self.prompt_len) % 2 == 0:
            self.scores = score(q, self.cache, t)  # (B, n_kv_head, pages held); `select` sets the newest page's to infinity
        held = int(t) // self.cache.config.page_size + 1
        self.scores = torch.nn.functional.pad(self.scores, (0, held - self.scores.shape[2]))  # a page begun since
        o, lse = attend(q, self.cache, *select(self.scores, self.cache, t), t)
        return combine(o, lse, self.cache, t)


class ReSA(Decoder):
    """Quest, and after every 32nd step a dense pass over the last 32 tokens that overwrites their K and V (Sun et al., 2025)."""

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
        for layer in decoder.layers[retro.dense_layers :]:
            layer.__class__ = LAYERS[name]
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
    if retro is None:
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
        raise ValueError(f"text {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"text {path}: not UTF-8 at byte {error.start}") from None


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
    """Feeds tokens prefix .. T-2 of idx (B, T) one by one. Yields, for each, the log-probabilities of the next (B, vocab) and the
    attention outputs of the newest row (n_layer, B, dim). The prompt's own are left out: they are dense for all methods."""
    outputs = []
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
    return {"kl": torch.stack(kl, 1), "gap": torch.stack(gap, 1), "error": torch.stack(error).mean(dim=0).T}


def task_questions(name: str, args, model: Llama, tok: Tokenizer) -> tuple[torch.Tensor, list[str]]:
    """Questions (B, prefix) and their answers' texts. In front of each, other tasks with their answers fill the prompt up."""
    rng, rows, answers = random.Random(args.seed), [], []
    while len(rows) < args.questions:
        question, answer = TASKS[name](rng, args.entries)
        ids, before = tok.encode(question), []
        room = args.prefix - len(ids) - (tok.bos is not None)
        if room < 0:
            raise ValueError(f"prefix must be at least {args.prefix - room} for {args.entries} entries of {name}, not {args.prefix}")
        while len(before) < room:
            before = tok.encode("".join(rng.choice(list(TASKS.values()))(rng, min(32, args.entries)))) + before
        rows.append([tok.bos] * (tok.bos is not None) + before[len(before) - room :] + ids)
        answers.append(answer)
    return torch.tensor(rows, device=model.norm.weight.device), answers


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


def text_quality(args, retro: RetroConfig, model: Llama, tok: Tokenizer) -> dict:
    """Teacher-forced: every method reads the same text, and is compared with full attention token by token."""
    idx = passages(args, model, tok)
    B, T = idx.shape
    full, rows, seen = [], {}, {}
    for name, config in methods(retro, args.windows, neighbours=True).items():
        progress(f"text: {name}")
        steps = forced(new_decoder(name, config, model, B, T), idx, args.prefix)
        full = full or list(steps)
        seen[name] = x = fidelity(full if config is None else steps, full, idx[:, args.prefix + 1 :])
        quest = seen.get("Quest", x)
        rows[name] = {
            "kv_share": kv_share(name, config, model.config.n_layer, range(args.prefix, T - 1)),
            "kl": x["kl"].mean().item(),
            "kl_to_quest": against(x["kl"], quest["kl"]),
            "gap": x["gap"].mean().item(),
            "gap_to_quest": against(x["gap"], quest["gap"]),
            "gap_by_position": parts(x["gap"], args.buckets),
            "attention_error": x["error"].mean(dim=0).tolist(),
        }
    edges = [0] + [len(part) for part in torch.arange(args.length).tensor_split(min(args.buckets, args.length))]
    return {"positions": torch.tensor(edges).cumsum(0).tolist(), "rows": rows}


def task_quality(task: str, args, retro: RetroConfig, model: Llama, tok: Tokenizer) -> dict:
    """Free-running: every method answers the same questions by itself."""
    idx, answers = task_questions(task, args, model, tok)
    steps = max(len(tok.encode(answer)) for answer in answers)
    T = args.prefix + steps
    if T > model.config.max_seq_len:
        raise ValueError(f"prefix must be at most {model.config.max_seq_len - steps} for answers of {steps} tokens, not {args.prefix}")
    rows, seen = {}, {}
    for name, config in methods(retro, args.windows, neighbours=True).items():
        progress(f"{task}: {name}")
        seen[name] = x = lines_right(new_decoder(name, config, model, len(idx), T), idx, answers, tok, steps)
        rows[name] = {
            "kv_share": kv_share(name, config, model.config.n_layer, range(args.prefix, T - 1)),
            "right": x.mean().item(),
            "right_to_quest": against(x, seen.get("Quest", x)),
            "right_by_quarter": parts(x, 4),
        }
    return {"rows": rows}
