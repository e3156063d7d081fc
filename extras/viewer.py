"""Records what each decode step does to the first text, as a page to step through.

    python sample.py --prompt FILE:LICENSE --min_tokens 64 --window 4 --trace run.html

`watch` calls a function with the record of each decode step in each sparse layer, and `revisions`
computes from it what the step changed of the past rows. `Recorder` writes both into viewer.html.
Watching changes no result, but the decoder runs without a CUDA graph.

Shapes as in retro_attention.py; R is the number of past rows, W-1 or fewer at the text's start.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from extras import check_writable
from model import Decoder, Tokenizer
from retro_attention import LayerCache, OpsWrapper, RetroConfig, need, row_positions
from sample import TextStream

# --------------------------------------------------------------------------------------------------
# One step in one layer


@dataclass
class PastRows:
    """A copy of what a sparse layer holds of the window's past rows, oldest first."""

    k: torch.Tensor  # (B, n_kv_head, R, hs) rotated
    v: torch.Tensor  # (B, n_kv_head, R, hs)
    out: torch.Tensor  # (B, R, n_head, hs) from the output cache
    lse: torch.Tensor  # (B, R, n_head)


@dataclass
class Step:
    """What one decode step did in one sparse layer."""

    t: int  # position of the newest row; the past rows stand at t-R .. t-1
    scores: torch.Tensor  # (B, n_kv_head, pages held)
    pages: torch.Tensor  # (B, n_kv_head, S) int32: the pages loaded, ascending
    loaded_before: torch.Tensor  # (B, n_kv_head, S) int32: the step that last loaded each of them
    before: PastRows  # what the previous step left
    after: PastRows  # with K and V overwritten and the supplementary outputs merged in


def past_rows(cache: LayerCache, t: torch.Tensor) -> PastRows:
    """Copies the past rows of the window that ends at t (indexing with a tensor copies)."""
    W = cache.config.window
    rows = row_positions(t, W)[:-1]  # (W-1,)
    rows = rows[rows >= 0]  # (R,)
    slots = rows % W  # (R,)
    k = cache.k.flatten(2, 3)[:, :, rows]  # (B, n_kv_head, R, hs)
    v = cache.v.flatten(2, 3)[:, :, rows]  # (B, n_kv_head, R, hs)
    return PastRows(k, v, cache.out[:, slots], cache.lse[:, slots])


class Watcher(OpsWrapper):
    """Calls look(step) with the `Step` of each decode step of a sparse layer."""

    capturable = False  # a Step has the position on the host

    def __init__(self, ops, look: Callable[[Step], None]):
        super().__init__(ops)
        self.look = look

    def write(self, q, k, v, cos, sin, cache, t):
        self.before = past_rows(cache, t)
        return self.ops.write(q, k, v, cos, sin, cache, t)

    def score(self, q, cache, t):
        self.scores = self.ops.score(q, cache, t)
        return self.scores

    def attend(self, q, cache, pages, loaded_before, t):
        self.pages = pages  # None in prefill, which is no step to look at
        self.loaded_before = loaded_before
        return self.ops.attend(q, cache, pages, loaded_before, t)

    def combine(self, o, lse, cache, t):
        rows = self.ops.combine(o, lse, cache, t)
        if self.pages is not None:
            position = int(t)
            # The kernels' lists end with unused elements.
            scores = self.scores[..., : cache.config.pages_held(position)]
            S = cache.config.pages_selected(position)
            pages = self.pages[..., :S]
            loaded_before = self.loaded_before[..., :S]
            after = past_rows(cache, t)
            self.look(Step(position, scores, pages, loaded_before, self.before, after))
        return rows


def watch(decoder: Decoder, look: Callable[[int, Step], None]) -> None:
    """Calls look(layer index, step) after each decode step in each sparse layer."""
    for i, layer in enumerate(decoder.layers):
        if not layer.dense:
            layer.ops = Watcher(layer.ops, partial(look, i))


# --------------------------------------------------------------------------------------------------
# What a step revises                      paper: section 2.3 (exposure), section 2.4 (propagation)


def moved(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """|new - old| / |old| over the last axis. Where old is zero, it is 0 if new is too, else 1."""
    length = old.norm(dim=-1)
    length = torch.where(length > 0, length, new.norm(dim=-1))
    return (new - old).norm(dim=-1) / length.masked_fill(length == 0, 1)


def revisions(step: Step, page_size: int) -> torch.Tensor:
    """What a step changed of the past rows -> (5, B, n_kv_head, R) float64, on the CPU: pages that
    are new to a row, the softmax mass that they add, and how far the row's output, key and value
    moved, as a fraction of their length."""
    n_kv_head, R = step.before.k.shape[1:3]

    def by_head(x):  # (B, R, n_head, ...) -> (B, n_kv_head, R, G * ...)
        return x.cpu().double().unflatten(2, (n_kv_head, -1)).flatten(3).transpose(1, 2)

    pages = step.pages[:, :, None].cpu()  # (B, n_kv_head, 1, S)
    loaded_before = step.loaded_before[:, :, None].cpu()  # (B, n_kv_head, 1, S)
    rows = torch.arange(step.t - R, step.t)[:, None]  # (R, 1)
    new = (pages * page_size <= rows) & (loaded_before < rows)  # (B, n_kv_head, R, S)
    # The row's sum of exp was exp(lse before) and is exp(lse after). It only grows, so a mass below
    # 0 is rounding.
    kept = (by_head(step.before.lse) - by_head(step.after.lse)).exp()  # (B, n_kv_head, R, G)
    mass = (1 - kept).clamp(min=0).mean(dim=-1)  # (B, n_kv_head, R)
    output = moved(by_head(step.before.out), by_head(step.after.out))
    key = moved(step.before.k.cpu().double(), step.after.k.cpu().double())
    value = moved(step.before.v.cpu().double(), step.after.v.cpu().double())
    return torch.stack((new.sum(dim=-1).double(), mass, output, key, value))


# --------------------------------------------------------------------------------------------------
# The page


def check_path(path: str | Path) -> Path:
    """The path of the page to write. Raises ValueError if it does not end in .html, its folder does
    not exist, or it cannot be written. An existing file keeps its content."""
    need(str(path).endswith(".html"), f"trace must be a file that ends in .html, not {str(path)!r}")
    need(Path(path).parent.is_dir(), f"trace {path}: no such folder")
    check_writable("trace", str(path))
    return Path(path)


def steps_that_fit(retro: RetroConfig, heads: int, steps: range, max_bytes: int) -> int:
    """How many of these steps, given by their positions, fit into about `max_bytes` of the page,
    with the tokens before them; at least 1. `heads` counts the KV heads of all sparse layers."""
    page = 8 * steps.start  # bytes: 8 a token, 7 a number, 100 a head
    for n, t in enumerate(steps):
        held = retro.pages_held(t)
        touched = held - retro.first_window_page(t)
        rows = min(t, retro.window - 1)
        numbers = held + retro.pages_selected(t) + 2 * touched + 5 * rows
        page += heads * (100 + 7 * numbers)
        if page > max_bytes:
            return max(1, n)
    return len(steps)


class Recorder:
    """Records the decode steps of a decoder's first text in all sparse layers, and writes the page.

    Create it before any step. A new prompt of the same length restarts the record. The page
    has the first steps, as many as `max_steps` and `max_bytes` allow.
    """

    max_steps = 200  # the page of tiny/ stays below 5 MB
    max_bytes = 50_000_000  # more would make a browser slow

    def __init__(self, decoder: Decoder, tok: Tokenizer, prompt_len: int, path: str | Path):
        """Raises ValueError if `path` is refused by `check_path`, OSError if viewer.html cannot be
        read."""
        self.layers = [i for i, layer in enumerate(decoder.layers) if not layer.dense]
        self.path = check_path(path)
        self.template = Path(__file__).with_name("viewer.html").read_text(encoding="utf-8")
        self.decoder = decoder
        self.tok = tok
        self.prompt_len = prompt_len
        self.end = prompt_len  # the first position without a step
        self.steps = {}  # position -> layer -> what `look` makes of each KV head
        heads = len(self.layers) * decoder.model.config.n_kv_head
        steps = range(prompt_len, min(prompt_len + self.max_steps, decoder.max_seq_len))
        max_bytes = self.max_bytes - len(self.template)
        self.limit = steps_that_fit(decoder.retro, heads, steps, max_bytes)
        watch(decoder, self.look)

    def look(self, i: int, step: Step) -> None:
        if i == self.layers[0] and step.t == self.prompt_len:  # a text begins
            self.steps.clear()
            self.end = self.prompt_len
        if i == self.layers[-1]:
            self.end = step.t + 1
        if step.t >= self.prompt_len + self.limit:
            return
        config = self.decoder.retro
        first = config.first_window_page(step.t)
        touched = slice(first, config.pages_held(step.t))  # pages that the step rewrote
        bounds = self.decoder.layers[i].cache.bounds[0, :, touched]  # (n_kv_head, pages, 2, hs)
        width = bounds.cpu().double().diff(dim=2).mean(dim=(2, 3))  # (n_kv_head, pages)
        revised = revisions(step, config.page_size)[:, 0]  # (5, n_kv_head, R)
        heads = []
        for h in range(len(width)):
            names = ("new", "mass", "output", "k", "v")
            head = {name: rounded(x) for name, x in zip(names, revised[:, h], strict=True)}
            head["pages"] = step.pages[0, h].tolist()
            head["scores"] = rounded(step.scores[0, h])
            head["width"] = dict(enumerate(rounded(width[h]), first))
            heads.append(head)
        self.steps.setdefault(step.t, {})[i] = heads

    def ids(self) -> list[int]:
        """The first text up to its newest token, or up to the token before its stop token. (A text
        that ends before the others is padded, and its steps go on.)"""
        ids = self.decoder.tokens[0, : self.end].tolist()
        for i in range(self.prompt_len, len(ids)):
            if ids[i] in self.tok.stop_tokens:
                return ids[:i]
        return ids

    def save(self) -> str:
        """Writes the page and returns a line about it, or about why it cannot be written. An
        interrupted step is left out."""
        ids = self.ids()
        made = len(ids) - self.prompt_len
        n = min(made, self.limit)
        if n <= 0:
            return f"--trace: nothing to write to {self.path}, there was no decode step"
        page = self.page(ids[: self.prompt_len + n])
        try:
            self.path.write_bytes(page)
        except OSError as error:
            return f"--trace: {self.path} could not be written: {error.strerror or error}"
        size = f"{len(page) / 1e6:.3g} MB"
        if n == made:
            return f"--trace: {n} steps written to {self.path}, {size}"
        most = f"{self.max_steps} steps"
        if n < self.max_steps:
            most = f"{self.max_bytes / 1e6:.3g} MB"
        reason = f"the page is limited to {most}"
        return f"--trace: the first {n} of {made} steps written to {self.path}, {size}: {reason}"

    def page(self, ids: list[int]) -> bytes:
        """The HTML of `ids` and of the steps after the prompt."""
        retro = self.decoder.retro
        # A token that holds only a part of a character adds no text; the last part adds all of it.
        text = TextStream(self.tok, [])
        run = {
            "window": retro.window,
            "page_size": retro.page_size,
            "budget": retro.budget,
            "min_tokens": retro.min_tokens,
            "prompt_len": self.prompt_len,
            "layers": self.layers,
            "tokens": [text.add(token) for token in ids],
            "steps": [{"t": t, "layers": x} for t, x in self.steps.items() if t < len(ids)],
        }
        data = json.dumps(run, separators=(",", ":"), allow_nan=False)
        data = data.replace("<", "\\u003c")  # so that no text of a model ends the script
        return self.template.replace(">RUN<", f">{data}<").encode()


def rounded(x: torch.Tensor) -> list[float | None]:
    """The values with four digits, because all digits make the page ten times as large; None for
    those that are not finite, which JSON lacks."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in x.tolist()]
