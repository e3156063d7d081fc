"""Compares the kernels with the reference on your own model and text: python -m extras.compare

Run this first after changing a kernel. The kernels decode the prompt and a few greedy tokens. At
every call, in every layer, the reference computes the same in float64, from the same inputs and a
copy of the cache as it was before the call. So no difference adds up, and the reference's results
are only compared. Prints where each result first differs by more than the tolerance, then the
largest differences of each function. Indices count from 0; a row is one of the window (newest last)
or of the prompt.

Exit codes: 0 no difference, 1 a difference, 2 bad arguments or checkpoint. On a machine without a
GPU set TRITON_INTERPRET=1, and choose a short prompt.
"""

import argparse
import math
import sys
from dataclasses import replace

import torch

import bench
import retro_attention
import sample
from model import Decoder, Llama, check_sampling
from retro_attention import LayerCache, OpsWrapper, RetroConfig, finite, need

# The largest relative difference, by the dtype that a result is rounded to; integers are exact.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
ROWS = ("text", "row", "head")
PAGES = ("text", "KV head", "page")


def in_float64(x):
    """A copy of a cache or tensor, floats as float64; all else as it is."""
    if isinstance(x, LayerCache):
        names = ("k", "v", "bounds", "out", "lse", "last_loaded")
        tensors = {name: getattr(x, name) for name in names}
        return replace(x, **{name: in_float64(y) for name, y in tensors.items()})
    if not isinstance(x, torch.Tensor):
        return x
    return x.double() if x.is_floating_point() else x.clone()


def defined(cache: LayerCache, t: int) -> dict[str, tuple]:
    """Name -> (values, axes) of all that is defined in the cache once position t is written."""
    held = cache.config.pages_held(t)
    axes = ("text", "KV head", "position")
    parts = {name: (getattr(cache, name).flatten(2, 3)[:, :, : t + 1], axes) for name in "kv"}
    if cache.out is not None:
        parts["bounds"] = (cache.bounds[:, :, :held], (*PAGES, "bound"))
        parts["last_loaded"] = (cache.last_loaded[:, :, :held], PAGES)
        parts["out"] = (cache.out, ("text", "slot", "head"))
        parts["lse"] = (cache.lse, ("text", "slot", "head"))
    return parts


class Compare(OpsWrapper):
    """Runs each function of `ops`, and the reference beside it.

    `rows` collects the table, `lines` for each function and result a line on its first difference
    beyond the tolerance.
    """

    capturable = False

    def __init__(self, ops, place: str, t: torch.Tensor, rows: dict, lines: dict):
        super().__init__(ops)
        self.place = place
        self.t = t
        self.rows = rows
        self.lines = lines

    def both(self, name: str, args: tuple, reference_args: tuple | None = None) -> tuple:
        """The results of the kernel and of the reference. Compares the caches that they leave."""
        copies = [in_float64(x) for x in reference_args or args]
        expected = getattr(retro_attention, name)(*copies)
        found = getattr(self.ops, name)(*args)
        row = self.rows.setdefault(name, {"calls": 0, "absolute": 0.0, "relative": 0.0})
        row["calls"] += 1
        caches = [defined(x, int(self.t)) for x in (*args, *copies) if isinstance(x, LayerCache)]
        if caches:
            ours, theirs = caches
            for part, (x, axes) in ours.items():
                self.check(name, f"cache.{part}", x, theirs[part][0], axes)
        return found, expected

    def check(self, name, what, found, expected, axes, dtype=None, size=None) -> None:
        """Compares vectors along the last axis, or single values if `axes` name all axes.

        A difference is relative to `size`, by default the larger of the expected vector's norm and
        the root mean square of all these norms. `dtype` decides the tolerance.
        """
        tolerance = TOLERANCES.get(dtype or found.dtype, 0)
        found = found.double()
        expected = expected.double()
        same = (found == expected) | (found.isnan() & expected.isnan())
        error = (found - expected).masked_fill(same, 0).abs().nan_to_num(math.inf, math.inf)
        if found.dim() == len(axes):
            found, expected, error = (x[..., None] for x in (found, expected, error))
        if size is None:
            norms = expected.nan_to_num(0, 0, 0).norm(dim=-1)
            size = norms.maximum(norms.square().mean().sqrt())
        relative = error.norm(dim=-1) / size.clamp(min=1e-30)
        row = self.rows[name]
        row["absolute"] = max(row["absolute"], error.max().item())
        row["relative"] = max(row["relative"], relative.max().item())
        if relative.max() <= tolerance:
            return
        vector = torch.unravel_index(relative.argmax(), relative.shape)
        place = (*vector, error[vector].argmax())
        where = [f"{axis} {int(i)}" for axis, i in zip((*axes, "element"), place, strict=True)]
        line = (
            f"{name}: {what} differs at t={int(self.t)}, {self.place}, {', '.join(where)}: "
            f"{found[place]:.9g} instead of {expected[place]:.9g} "
            f"(relative {relative.max():.1e}, tolerance {tolerance:.1e})"
        )
        self.lines.setdefault((name, what), line)

    def write(self, q, k, v, cos, sin, cache, t):
        found, expected = self.both("write", (q, k, v, cos, sin, cache, t))
        first = max(0, q.shape[1] - 1 - int(t))  # rows before the start of the text are undefined
        self.check("write", "q", found[:, first:], expected[:, first:], ROWS)
        return found

    def score(self, q, cache, t):
        found, expected = self.both("score", (q, cache, t))
        # The terms of a score cancel, so rounding is measured against the sum of their sizes.
        bounds = cache.bounds.double().abs().amax(dim=3, keepdim=True).expand_as(cache.bounds)
        size = retro_attention.score(q.double().abs(), replace(cache, bounds=bounds), t)
        self.check("score", "scores", found[..., : expected.shape[2]], expected, PAGES, size=size)
        return found

    def select(self, scores, cache, t):
        held = cache.config.pages_held(int(t))
        S = cache.config.pages_selected(int(t))
        found, expected = self.both("select", (scores, cache, t), (scores[..., :held], cache, t))
        for name, ours, theirs in zip(("pages", "loaded_before"), found, expected, strict=True):
            self.check("select", name, ours[..., :S], theirs, ("text", "KV head", "place"))
        return found

    def attend(self, q, cache, pages, loaded_before, t):
        S = cache.config.pages_selected(int(t))
        lists = [x if x is None else x[..., :S] for x in (pages, loaded_before)]
        args = (q, cache, pages, loaded_before, t)
        found, expected = self.both("attend", args, (q, cache, *lists, t))
        o, lse = retro_attention.merge_by_lse(*map(in_float64, found))
        expected_o, expected_lse = (x[0] for x in expected)
        self.check("attend", "lse", lse, expected_lse, ROWS, torch.float32)
        # The tolerance also covers the rounding of float32 scores, which grows with |lse|.
        more = TOLERANCES[torch.float32] / TOLERANCES[q.dtype] * finite(expected_lse).abs()
        size = expected_o.norm(dim=-1) * (1 + more)
        self.check("attend", "o", o, expected_o, ROWS, q.dtype, size)
        return found

    def combine(self, o, lse, cache, t):
        found, expected = self.both("combine", (o, lse, cache, t))
        self.check("combine", "rows", found, expected, ROWS)
        return found

    def rms_norm(self, x, weight, eps):
        found, expected = self.both("rms_norm", (x, weight, eps))
        self.check("rms_norm", "y", found, expected, ROWS[:2])
        return found

    def swiglu(self, x):
        found, expected = self.both("swiglu", (x,))
        self.check("swiglu", "y", found, expected, ROWS[:2])
        return found


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    retro = RetroConfig(impl="triton")
    form = argparse.ArgumentDefaultsHelpFormatter
    title = __doc__.splitlines()[0]
    parser = sample.Parser(prog="extras.compare", description=title, formatter_class=form)
    parser.set_defaults(chat=False, system=None)
    add = parser.add_argument
    add("--prompt", default=None, help="text to continue; FILE:path reads a file, - reads stdin")
    add("--max_new_tokens", type=int, default=10, help="maximum new tokens")
    add("--window", type=int, default=retro.window, help="the paper's w: a step revises w-1 tokens")
    sample.add_model_options(add, retro)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    check_sampling(args.max_new_tokens, 0, None, None, None)
    retro = sample.retro_config(args, window=args.window)
    config, weights, tok, device, dtype = sample.load(args)
    _, ids = sample.read_prompt(args, config, tok)
    length = min(len(ids) + args.max_new_tokens, config.max_seq_len)
    sample.check_memory(config, retro, 1, length, device, dtype)
    decoder = Decoder(Llama.from_weights(config, weights, device, dtype), 1, retro, length)
    compared = decoder.layers[0].ops is not retro_attention
    need(compared, "impl must be triton: the reference would be compared with itself")
    rows = {}
    lines = {}
    for i, layer in enumerate(decoder.layers):
        layer.ops = Compare(layer.ops, f"layer {i}", decoder.t, rows, lines)
    idx = torch.tensor([ids], device=device)  # (1, T)
    tokens = list(decoder.stream(idx, args.max_new_tokens, temperature=0))
    print("\n".join(lines.values()) or "no difference beyond the tolerance")
    title = f"Largest differences: prompt of {len(ids)} tokens, {len(tokens) - 1} decode steps"
    bench.table(title, rows, {"calls": "d", "absolute": ".1e", "relative": ".1e"})
    return 1 if lines else 0


def main(argv: list[str] | None = None) -> int:
    return sample.exit_code("extras.compare", lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
