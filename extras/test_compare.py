"""Runs the comparison on a small random model, whole and with broken functions."""

import importlib.util
import re
from types import SimpleNamespace

import pytest
import torch

import retro_attention
import sample
from extras import compare
from retro_attention import LayerCache
from test_retro import DEVICE, needs_triton, random_model, refused_in_a_line, run_main

if importlib.util.find_spec("triton"):
    import kernels

PROMPT = "It was a dark and storm"  # 23 tokens, so that decode steps begin at position 23


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the command on a dense and a sparse layer: its exit code, stdout, stderr."""
    model = random_model(n_head=4, hs=16, n_layer=2, seed=2)  # past rows find new pages
    tok = SimpleNamespace(encode=lambda text, bos: [ord(c) % 61 for c in text], stop_tokens=())

    def load(args):
        dtype = sample.DTYPES.get(args.dtype, torch.float32)
        return model.config, model.weights(), tok, torch.device(DEVICE), dtype

    monkeypatch.setattr(sample, "load", load)
    small = "--max_new_tokens 3 --window 4 --page_size 4 --min_tokens 8 --dense_layers 1"

    def run(options="", prompt=PROMPT):
        argv = ["--prompt", prompt, *small.split(), *options.split()]
        return run_main(compare.main, argv, capsys)

    return run


@needs_triton
def test_the_kernels_do_not_differ(run):
    """Every call is counted. Differences above 0 show that the reference runs, too."""
    code, out, error = run()
    assert (code, error) == (0, "") and "no difference" in out and "2 decode steps" in out
    # A line of the table: name, calls, absolute, relative.
    relative = {name: float(x) for name, x in re.findall(r"^(\w+) +\d.* (\S+)$", out, re.M)}
    assert relative.pop("select") == 0 and all(0 < x < 2e-6 for x in relative.values())
    calls = dict(re.findall(r"^(\w+) +(\d+) ", out, re.M))
    # 2 steps in a dense and a sparse layer; the prefill attends in the sparse one, too.
    attended = {"write": 4, "score": 2, "select": 2, "attend": 5, "combine": 5}
    wanted = attended | {"rms_norm": 12, "swiglu": 6}
    assert calls == {name: str(n) for name, n in wanted.items()}


@needs_triton
def test_rows_before_the_start_of_the_text_are_not_compared(run, monkeypatch):
    """The window is longer than the prompt, and a kernel leaves the rows of q before the text
    undefined. The dtype is float16."""
    whole = kernels.write

    def write(q, k, v, cos, sin, cache, t):
        rotated = whole(q, k, v, cos, sin, cache, t)
        rotated[:, : max(0, 7 - int(t))] = torch.nan
        return rotated

    monkeypatch.setattr(kernels, "write", write)
    code, out, _ = run("--window 8 --dtype float16", "It")
    assert code == 0 and "prompt of 2 tokens" in out


def break_reference(monkeypatch, function, change, dense, t=24):
    """Applies `change` to what a function of the reference returns, and to its cache, at position t
    in the dense or the sparse layer. Without a cache it does so in every call."""
    whole = getattr(retro_attention, function)

    def broken(*args):
        found = whole(*args)
        caches = [x for x in args if isinstance(x, LayerCache)]
        if not caches:
            change(found, None)
        elif int(args[-1]) == t and (caches[0].out is None) == dense:
            change(found, caches[0])
        return found

    monkeypatch.setattr(retro_attention, function, broken)


@needs_triton
def test_differences_are_named(run, monkeypatch):
    """Each function of the reference is broken (with a cache, at the second decode step only), and
    a kernel changes its input.

    Guards against a difference hidden by right values or by another difference, and against a wrong
    place in a line.
    """

    def bounds(q, cache):
        cache.bounds[0, 1, 5, 0] += 0.1

    def key(q, cache):
        cache.k[0, 0, 6, 0] += 0.1

    def scores(found, cache):
        found[0, 1, 4] += 0.1

    def lists(found, cache):
        found[0][0, 1, 0] += 1
        cache.last_loaded[0, 0, 3] = 5

    def lse(found, cache):
        found[1][0, 0, 3, 2] += 1e-3

    def head(found, cache):
        found[0, 2, 3, 5] += 1e-2
        cache.out[0, 1, 2] += 1e-2

    def row(found, cache):
        found[0, 1] *= 1 + 6e-6

    break_reference(monkeypatch, "write", key, dense=True)
    break_reference(monkeypatch, "write", bounds, dense=False)
    break_reference(monkeypatch, "score", scores, dense=False)
    break_reference(monkeypatch, "select", lists, dense=False)
    break_reference(monkeypatch, "attend", lse, dense=True)
    break_reference(monkeypatch, "combine", head, dense=False)
    break_reference(monkeypatch, "rms_norm", row, dense=None)
    break_reference(monkeypatch, "swiglu", row, dense=None)
    score = kernels.score

    def score_and_write(q, cache, t):
        cache.v[0, 0, 0, 0, 0] += 1
        return score(q, cache, t)

    monkeypatch.setattr(kernels, "score", score_and_write)
    code, out, _ = run()
    places = [  # result, t, layer, place
        ("rms_norm: y", 22, 0, "row 1"),
        ("swiglu: y", 22, 0, "row 1"),
        ("score: cache.v", 23, 1, "KV head 0, position 0"),
        ("write: cache.k", 24, 0, "KV head 0, position 24"),
        ("attend: lse", 24, 0, "row 3, head 2"),
        ("write: cache.bounds", 24, 1, "KV head 1, page 5, bound 0"),
        ("score: scores", 24, 1, "KV head 1, page 4"),
        ("select: cache.last_loaded", 24, 1, "KV head 0, page 3"),
        ("select: pages", 24, 1, "KV head 1, place 0"),
        ("combine: cache.out", 24, 1, "slot 1, head 2"),
        ("combine: rows", 24, 1, "row 2, head 3"),
    ]
    lines = out.split("\n\n")[0].splitlines()
    assert code == 1 and len(lines) == len(places), out
    for line, (result, t, layer, place) in zip(lines, places, strict=True):
        start = f"{result} differs at t={t}, layer {layer}, text 0, {place}, element "
        assert line.startswith(start), line
    assert "row 2, head 3, element 5: " in lines[-1]
    values = re.search(r"page 3, element 0: (\S+) instead of 5 ", out)
    assert values and values[1] != "5"


@pytest.mark.parametrize(
    "options, message",
    [
        ("--impl torch", "impl must be triton: the reference would be compared with itself"),
        ("--max_new_tokens 0", "max_new_tokens must be >= 1, not 0"),
        ("--nonsense", "unrecognized arguments: --nonsense"),
    ],
)
def test_user_errors_are_one_line(run, options, message):
    refused_in_a_line(run(options), message)
