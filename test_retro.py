"""Checks what must hold: first the reference against oracles that share no code with it, then the
kernels against the reference in float64, then the model, its files and the commands.

`oracle` decodes a whole model from the paper's text in plain NumPy, without pages in memory, output
cache or log-sum-exp. For every row it keeps the set of key positions that the row has seen, and the
sums of exp(q.k) and exp(q.k) v over them, taken when each key was first seen. So it merges outputs
over disjoint sets of keys by adding, and no step is shared with `retro_attention.py`. The kernels
run on a GPU if there is one, else in Triton's interpreter.
"""

import base64
import copy
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

# Before NumPy and PyTorch read it: small tensors are slower on two threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import bench
import retro_attention
import sample
import tiny.train
from model import (
    Decoder,
    FeedForward,
    Llama,
    LlamaConfig,
    Tokenizer,
    choose_threads,
    config_from_params,
    read_checkpoint,
    rope_table,
    sample_token,
    sum_before,
)
from retro_attention import (
    OpsWrapper,
    RetroAttention,
    RetroConfig,
    apply_rope,
    attend,
    implementation,
    merge_by_lse,
    put_rows,
    score,
)

if importlib.util.find_spec("triton"):
    import kernels  # here, because TRITON_INTERPRET, which tests change, decides what kernels are

TINY = Path(__file__).parent / "tiny"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The smallest budget that leaves a choice of pages. Each test overrides only what it is about.
SPARSE = RetroConfig(page_size=8, budget=0.2, min_tokens=16, window=4, dense_layers=1)
BENCH = replace(SPARSE, window=1, dense_layers=0)


# --------------------------------------------------------------------------------------------------
# The oracle


def rope_frequencies(config):
    """Radians per token of each pair, with Llama 3.1's scaling as its three cases: short, long and
    medium wavelengths."""
    result = []
    for i in range(0, config.head_size, 2):
        freq = config.rope_theta ** (-i / config.head_size)
        wavelength = 2 * math.pi / freq
        if config.rope_scaling is not None and wavelength > 8192 / 4:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            long = freq / config.rope_scaling
            freq = long if wavelength > 8192 else (1 - smooth) * long + smooth * freq
        result.append(freq)
    return np.array(result)


def rotate(x, positions, config):
    """x (B, rows, heads, hs): each pair of neighbours is a complex number, turned by
    position * frequency."""
    turn = np.exp(1j * np.outer(positions, rope_frequencies(config)))[:, None]
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    return np.stack((turned.real, turned.imag), axis=-1).reshape(x.shape)


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def swiglu(x, w, name):
    gate = x @ w[name + "w1.weight"].T
    value = x @ w[name + "w3.weight"].T
    return (gate / (1 + np.exp(-gate)) * value) @ w[name + "w2.weight"].T


def pages_to_load(retro, t):
    """How many pages a KV head loads (the ceiling exact in decimal), how many there are, and which
    ones the window touches."""
    held = len(range(0, t + 1, retro.page_size))
    positions = range(max(0, t - retro.window + 1), t + 1)
    window = {position // retro.page_size for position in positions}
    floor = math.ceil(retro.min_tokens / retro.page_size)
    allowed = max(floor, math.ceil(Decimal(str(retro.budget)) * held))
    return min(held, allowed + len(window) - 1), held, window


def load(q, k, retro, t):
    """Quest's choice for the newest query q (B, n_kv_head, G, hs): the keys loaded, as
    (B, n_kv_head, t + 1) bool."""
    count, held, window = pages_to_load(retro, t)
    loaded = np.zeros(k.shape[:2] + (t + 1,), bool)
    bounds = []
    for j in range(held):
        page = k[:, :, j * retro.page_size : min((j + 1) * retro.page_size, t + 1)]
        low = page.min(2)[:, :, None]  # (B, n_kv_head, 1, hs)
        high = page.max(2)[:, :, None]
        # the sum is over the hs elements and the query heads of the group
        bounds.append(np.maximum(q * low, q * high).sum((2, 3)))
    for b, h in np.ndindex(*k.shape[:2]):
        order = sorted(range(held), key=lambda j: (j not in window, -bounds[j][b, h], j))
        for j in order[:count]:
            loaded[b, h, j * retro.page_size : (j + 1) * retro.page_size] = True
    return loaded


def oracle_attend(q, s, rows, retro, dense):
    """One layer: the rows' queries q (B, n_kv_head, G, rows, hs) see the keys that are loaded,
    causal and new to them."""
    t = rows[-1]
    causal = np.arange(t + 1) <= rows[:, None]  # (rows, keys)
    new = np.broadcast_to(causal, s.k.shape[:2] + causal.shape).copy()
    if dense:
        s.num[:, :, :, rows] = 0
        s.den[:, :, :, rows] = 0
        s.seen[:, :, rows] = False
    else:
        new &= load(q[:, :, :, -1], s.k, retro, t)[:, :, None] & ~s.seen[:, :, rows, : t + 1]
        starts = range(0, t + 1, retro.page_size)
        if len(rows) > 1:
            s.sights += np.logical_or.reduceat(new[:, :, :-1], starts, axis=3).sum()
    e = np.einsum("bhgrd,bhkd->bhgrk", q, s.k[:, :, : t + 1]) / math.sqrt(q.shape[-1])
    e = np.exp(e) * new[:, :, None]
    s.num[:, :, :, rows] += e @ s.v[:, :, None, : t + 1]
    s.den[:, :, :, rows] += e.sum(-1)
    s.seen[:, :, rows, : t + 1] |= new
    return s.num[:, :, :, rows] / s.den[:, :, :, rows, None]


def oracle(model, retro, tokens, prompt_len):
    """Decodes (B, T) tokens one by one: the logits after positions prompt_len-1 .. T-1, and each
    layer's state."""
    c = model.config
    w = {name: p.double().numpy() for name, p in model.weights().items()}
    tokens = tokens.numpy()
    B, T = tokens.shape
    heads = (c.n_kv_head, c.n_head // c.n_kv_head)
    hs = c.head_size
    layers = [
        SimpleNamespace(
            k=np.zeros((B, c.n_kv_head, T, hs)),
            v=np.zeros((B, c.n_kv_head, T, hs)),
            num=np.zeros((B, *heads, T, hs)),
            den=np.zeros((B, *heads, T)),
            seen=np.zeros((B, c.n_kv_head, T, T), bool),
            sights=0,
        )
        for _ in range(c.n_layer)
    ]
    logits = []
    for t in range(prompt_len - 1, T):
        first = t == prompt_len - 1  # the prompt: all rows, all layers dense
        rows = np.arange(0 if first else max(0, t - retro.window + 1), t + 1)
        x = w["tok_embeddings.weight"][tokens[:, rows]]  # (B, rows, dim): from their ids again
        for i, s in enumerate(layers):
            name = f"layers.{i}."
            dense = i < retro.dense_layers or (first and prompt_len > 0)
            y = rms_norm(x, w[name + "attention_norm.weight"], c.norm_eps)
            q, k, v = (
                (y @ w[f"{name}attention.w{m}.weight"].T).reshape(B, len(rows), -1, hs)
                for m in "qkv"
            )
            q = rotate(q, rows, c).reshape(B, len(rows), *heads, hs).transpose(0, 2, 3, 1, 4)
            s.k[:, :, rows] = rotate(k, rows, c).swapaxes(1, 2)
            s.v[:, :, rows] = v.swapaxes(1, 2)
            o = oracle_attend(q, s, rows, retro, dense)
            o = o.transpose(0, 3, 1, 2, 4).reshape(B, len(rows), -1)
            x = x + o @ w[name + "attention.wo.weight"].T
            y = rms_norm(x, w[name + "ffn_norm.weight"], c.norm_eps)
            x = x + swiglu(y, w, name + "feed_forward.")
        head = w["tok_embeddings.weight" if c.tie_embeddings else "output.weight"]
        logits.append(rms_norm(x[:, -1], w["norm.weight"], c.norm_eps) @ head.T)
    return np.stack(logits, 1), layers


# --------------------------------------------------------------------------------------------------
# Helpers


def refused(call, message):
    """Expects a ValueError that matches, not an error from somewhere inside PyTorch."""
    with pytest.raises(ValueError, match=message):
        call()


def run_main(main, args, capsys):
    """Runs a command line: exit code, stdout, stderr."""
    try:
        code = main(args)
    except SystemExit as stop:  # argparse
        code = stop.code
    return code, *capsys.readouterr()


def refused_in_a_line(result, message):
    """Expects exit code 2, nothing on stdout, and on stderr a single line that matches."""
    code, out, error = result
    assert code == 2 and not out and error.count("\n") == 1 and re.search(message, error), error


def random_model(n_head=6, n_kv_head=2, hs=32, n_layer=3, max_seq_len=256, seed=0, **kwargs):
    """A small random model in float64 whose attention is sharp enough for the choice of pages to
    matter."""
    torch.manual_seed(seed)
    config = {
        "dim": n_head * hs,
        "n_layer": n_layer,
        "n_head": n_head,
        "n_kv_head": n_kv_head,
        "vocab_size": 61,
        "ffn_dim": 96,
        "max_seq_len": max_seq_len,
        "rope_theta": 1000.0,
    }
    model = Llama(LlamaConfig(**{**config, **kwargs})).double()
    for name, p in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
        elif name.endswith("wqkv.weight"):
            p.data *= 3
    return model.eval().requires_grad_(False)


def random_tokens(B, T, seed=0):
    return torch.randint(61, (B, T), generator=torch.Generator().manual_seed(seed))


def random_qkv(B=2, T=75, n_head=6, n_kv_head=2, hs=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(B, T, n, hs, generator=generator, dtype=torch.float64) * 1.5
        for n in (n_head, n_kv_head, n_kv_head)
    ]


def start(model, retro, tokens, prompt_len, make=Decoder):
    """A decoder after its prefill, if any, and its logits. Its caches held NaN before, because
    nothing may depend on what was never written."""
    length = min(model.config.max_seq_len, tokens.shape[1] + 40)
    decoder = make(model, len(tokens), retro, length)
    for layer in decoder.layers:
        for x in (layer.cache.k, layer.cache.v, layer.cache.bounds):
            if x is not None:
                x.fill_(math.nan)
    return decoder, decoder.prefill(tokens[:, :prompt_len]) if prompt_len else None


def decode(model, retro, tokens, prompt_len, make=Decoder):
    """Does what `oracle` does, with the module: logits (B, T - prompt_len + 1, vocab) and the
    decoder. prompt_len may be 0."""
    decoder, first = start(model, retro, tokens, prompt_len, make)
    steps = [decoder.step(tokens[:, i]) for i in range(prompt_len, tokens.shape[1])]
    return torch.stack([first, *steps] if prompt_len else steps, 1), decoder


def by_position(cache):
    """Copies of keys and values, (B, n_kv_head, positions, hs) each."""
    return cache.k.flatten(2, 3).clone(), cache.v.flatten(2, 3).clone()


def new_layer(retro, q, k, max_seq_len=128):
    """One sparse layer of RetroAttention for the shapes of q (B, T, n_head, hs) and
    k (B, T, n_kv_head, hs)."""
    return RetroAttention(
        retro,
        dense=False,
        batch_size=len(q),
        n_head=q.shape[2],
        n_kv_head=k.shape[2],
        head_size=q.shape[3],
        max_seq_len=max_seq_len,
        device="cpu",
        dtype=q.dtype,
    )


def run_layer(retro, q, k, v, prompt_len):
    """One layer with q, k, v held fixed for each position, unrotated. Yields t, the outputs
    (B, W, n_head, hs) and the layer."""
    layer = new_layer(retro, q, k)
    cos = torch.ones(128, q.shape[3] // 2).double()
    sin = torch.zeros(128, q.shape[3] // 2).double()
    layer.prefill(q[:, :prompt_len], k[:, :prompt_len], v[:, :prompt_len])
    for t in range(prompt_len, q.shape[1]):
        rows = (torch.arange(retro.window) + t - retro.window + 1).clamp(min=0)
        o = layer.decode(q[:, rows], k[:, rows], v[:, rows], cos, sin, torch.tensor(t))
        yield t, o, layer


def softmax_over(q, k, v, keys):
    """Attention of one query q (hs) over the positions `keys` of k, v (T, hs): the output, and the
    log of the sum of exp."""
    e = np.exp(k.numpy()[keys] @ q.numpy() / math.sqrt(len(q)))
    return e @ v.numpy()[keys] / e.sum(), math.log(e.sum())


def check_output(o, q, k, v, t, kept, tol=1e-11):
    """Checks that o (B, n_head, hs) is attention of position t's q over the positions kept(b, KV
    head) of k and v."""
    for b, head in np.ndindex(2, 6):
        h = head // 3
        expected, _ = softmax_over(q[b, t, head], k[b, :, h], v[b, :, h], kept(b, h))
        close(o[b, head], expected, tol)


def quest_bounds(q, k, t):
    """Quest's bound for each page up to position t, from its paper: q (G, hs) of one KV head,
    k (T, hs), pages of 8."""
    bounds = []
    for first in range(0, t + 1, 8):
        page = k[first : min(first + 8, t + 1)]
        low, high = page.amin(0), page.amax(0)
        bounds.append(sum(torch.maximum(x * low, x * high).sum().item() for x in q))
    return bounds


def close(a, b, tol):
    """Compares element by element, absolutely. NaN is close only to NaN."""
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=tol)


# --------------------------------------------------------------------------------------------------
# Steps 1-3: bounds, score, selection


def test_bounds_hold_and_are_tight_after_every_overwrite():
    """Guards against running minima that cannot shrink again, and unwritten keys in the bounds."""
    model = random_model()
    tokens = random_tokens(2, 60)
    decoder, _ = start(model, SPARSE, tokens, 21)
    for t in range(21, 60):
        decoder.step(tokens[:, t])
        for layer in decoder.layers[1:]:
            cache = layer.cache
            q = torch.randn(2, 1, 6, 32, dtype=torch.float64)
            keys = by_position(cache)[0][:, :, : t + 1].numpy()
            total = np.zeros((2, 2, t // 8 + 1))
            for g, j in np.ndindex(3, t // 8 + 1):  # query heads 0 .. 2 share KV head 0
                one = q[:, 0, g::3].numpy()  # (B, n_kv_head, hs)
                page = keys[:, :, j * 8 : j * 8 + 8]
                close(cache.bounds[:, :, j, 0], page.min(2), 0)
                close(cache.bounds[:, :, j, 1], page.max(2), 0)
                bound = np.maximum(one * page.min(2), one * page.max(2)).sum(-1)
                products = np.einsum("bhd,bhkd->bhk", one, page)
                assert (products <= bound[..., None] + 1e-12).all()
                total[:, :, j] += bound
            close(score(q, cache, torch.tensor(t)), total, 1e-12)


@pytest.mark.parametrize("page_size, budget, min_tokens, W, t, pages", [
    (16, 0.07, 1, 2, 1599, 7),  # 0.07 * 100 pages; in binary floating point 8
    (16, 0.3, 1, 2, 159, 3),
    (16, 0.01, 256, 2, 8001, 16),
    (16, 0.01, 256, 2, 8000, 17),  # the window's older page is extra
    (8, 0.01, 1, 8, 64, 2),
    (8, 0.01, 1, 1, 64, 1),
])  # fmt: skip
def test_pages_selected_is_exact_in_decimal(page_size, budget, min_tokens, W, t, pages):
    """The budget, the floor, the window's older pages and the cap of all pages held, by hand and by
    the oracle's rule. The count never exceeds the lists' capacity."""
    assert RetroConfig(page_size, budget, min_tokens, W).pages_selected(t) == pages
    for hundredths in range(1, 101, 3):
        retro = RetroConfig(page_size=4, budget=hundredths / 100, min_tokens=9, window=W)
        for t in range(0, 400, 3):
            assert retro.pages_selected(t) == pages_to_load(retro, t)[0]
            assert retro.pages_selected(t) <= retro.max_pages_selected(t // 4 + 1)


# --------------------------------------------------------------------------------------------------
# Steps 4-5: supplementary attention, merge, output cache


@pytest.mark.parametrize("W, prompt_len", [(1, 9), (2, 20), (4, 1), (4, 24), (8, 3), (8, 30)])
def test_union(W, prompt_len):
    """A row that leaves the window holds softmax attention over the union of the pages loaded while
    it was inside.

    Guards against a missing causal mask, keys seen twice or never, a row that is not popped, and
    lse = 0 for an empty set.
    """
    q, k, v = random_qkv()
    loads = {}
    gained = 0
    for t, o, layer in run_layer(replace(SPARSE, window=W), q, k, v, prompt_len):
        loads[t] = layer.cache.last_loaded == t  # (B, n_kv_head, P)
        row = t - W + 1  # leaves the window after this step
        if row < 0:
            continue
        seen = torch.full_like(loads[t], row < prompt_len)  # a row of the prompt has seen all
        for step in range(max(row, prompt_len), t + 1):
            seen |= loads[step]
        if row >= prompt_len:
            gained += (seen & ~loads[row]).sum()
        for b, head in np.ndindex(2, 6):
            h = head // 3
            keys = [j for j in range(row + 1) if seen[b, h, j // 8]]
            out, lse = softmax_over(q[b, row, head], k[b, :, h], v[b, :, h], keys)
            close(o[b, 0, head], out, 1e-12)
            close(layer.cache.lse[b, row % W, head], lse, 1e-12)
    assert W == 1 or gained > 30, "no row has seen a page late: the test is empty"


def test_merge_of_any_partition_is_the_whole():
    """Attention over the parts of a random partition, some of them empty, merges to attention over
    the whole."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        seed = int(rng.integers(1000))
        q, k, v = (x[0, :, 0] for x in random_qkv(B=1, T=40, n_head=1, n_kv_head=1, seed=seed))
        part_of = rng.integers(0, 6, 40) * (rng.random() < 0.9)
        o = torch.zeros(6, 32, dtype=torch.float64)
        lse = torch.full((6,), -torch.inf, dtype=torch.float64)
        for part in set(part_of):
            out, total = softmax_over(q[0], k, v, np.flatnonzero(part_of == part))
            o[part] = torch.from_numpy(out)
            lse[part] = total
        whole, total = softmax_over(q[0], k, v, np.arange(40))
        merged = merge_by_lse(o, lse)
        close(merged[0], whole, 1e-13)
        close(merged[1], total, 1e-13)


def test_merge_with_empty_sets():
    """Merging with an empty set is the identity, bit for bit; two empty sets give o = 0 and
    lse = -inf, and no NaN."""
    some = torch.randn(1, 5, 32).double(), torch.tensor([[-900.0, -1, 0, 1, 900]]).double()
    none = torch.zeros_like(some[0]), torch.full_like(some[1], -torch.inf)
    for a, b, expected in ((some, none, some), (none, some, some), (none, none, none)):
        o, lse = merge_by_lse(torch.cat((a[0], b[0])), torch.cat((a[1], b[1])))
        assert torch.equal(o, expected[0][0]) and torch.equal(lse, expected[1][0])


def test_attend_to_nothing():
    """A past row for which no page is new, or that stands before the text, gets o = 0 and
    lse = -inf."""
    q, k, v = random_qkv(T=20)
    cache = new_layer(SPARSE, q, k).cache
    put_rows(k, v, cache, 19)
    pages = torch.arange(3).expand(2, 2, 3)
    o, lse = attend(q[:, -4:], cache, pages, torch.full_like(pages, 18), torch.tensor(19))
    assert (o[0, :, :-1] == 0).all() and (lse[0, :, :-1] == -torch.inf).all()
    assert (o[0, :, -1] != 0).all() and lse[0, :, -1].isfinite().all()
    pages = pages[..., :1]
    o, lse = attend(q[:, -4:], cache, pages, torch.full_like(pages, -1), torch.tensor(1))
    assert (o[0, :, :2] == 0).all() and (lse[0, :, :2] == -torch.inf).all()
    assert lse[0, :, 2:].isfinite().all()


def test_window_one_is_quest():
    """Compares with Quest, written again from its paper, one head and one page at a time."""
    q, k, v = random_qkv(T=90)
    for t, o, _ in run_layer(replace(SPARSE, window=1, budget=0.35), q, k, v, prompt_len=20):
        last = t // 8
        budget = -(-35 * (last + 1) // 100)  # 35 % of the pages, rounded up
        positions = {}
        for b, h in np.ndindex(2, 2):
            bounds = quest_bounds(q[b, t, h * 3 : h * 3 + 3], k[b, :, h], t)
            ranked = np.argsort(-np.array(bounds[:last]), kind="stable").tolist()
            chosen = [last, *ranked[: budget - 1]]  # the last page is always loaded
            positions[b, h] = [j for j in range(t + 1) if j // 8 in chosen]
        check_output(o[:, 0], q, k, v, t, lambda b, h, found=positions: found[b, h], 1e-12)


@pytest.mark.parametrize("position", [30, 32, 35, 39, 40])
def test_a_past_row_never_sees_a_later_token(position):
    """Another k and v at `position` changes no bit of an earlier row at any step.

    The page of `position` is loaded in both runs as long as an earlier row is in the window, so
    both load the same pages.
    """
    q, k, v = random_qkv(T=60)
    retro = replace(SPARSE, window=8)
    k2 = k.clone()
    v2 = v.clone()
    k2[:, position] *= -3
    v2[:, position] += 5
    runs = zip(run_layer(retro, q, k, v, 20), run_layer(retro, q, k2, v2, 20), strict=True)
    for (t, a, _), (_, b, _) in runs:
        if t - 7 >= position:
            break
        before = max(0, min(8, position - (t - 7)))  # rows of the window in front of `position`
        assert torch.equal(a[:, :before], b[:, :before])
        changed = ((a - b)[:, before:][:, :1].abs().amax(-1) > 1e-6).all()  # the row itself
        assert t < position or changed


# --------------------------------------------------------------------------------------------------
# The model: limits, overwriting, memory


@pytest.mark.parametrize(
    "budget, min_tokens",
    [(1.0, 1), (0.01, 1000), (None, None)],
    ids=["budget", "floor", "full attention"],
)
@pytest.mark.parametrize("W, prompt_len", [(1, 0), (2, 13), (4, 0), (4, 1), (8, 30), (60, 13)])
def test_all_pages_is_dense(W, prompt_len, budget, min_tokens):
    """If all pages are loaded, for whatever reason, nothing is left to correct, so cached decoding
    equals the uncached forward pass.

    Guards against a position off by one between prefill, cache and RoPE, and a row that sees a
    position not yet written.
    """
    model = random_model(rope_scaling=8.0, tie_embeddings=True, qkv_bias=True)
    tokens = random_tokens(3, 50)
    retro = None
    if budget is not None:
        retro = RetroConfig(8, budget, min_tokens, window=W, dense_layers=0)
    found, _ = decode(model, retro, tokens, prompt_len)
    close(found, model(tokens)[:, max(0, prompt_len - 1) :], 1e-10)


def test_a_second_prompt_starts_afresh():
    """Guards against outputs, last_loaded and a wrapper's counts that leak from one text into the
    next. Infinite outputs leak even with a weight of zero, because 0 * inf is NaN."""
    model = random_model()
    tokens = random_tokens(2, 90)
    decoder, _ = start(model, SPARSE, tokens.flip(1), 70, bench.counting)
    decoder.step(tokens[:, 0])
    for layer in decoder.layers[1:]:
        layer.cache.out.fill_(torch.inf)
    again = [decoder.prefill(tokens[:, :30])]
    again += [decoder.step(tokens[:, i]) for i in range(30, 89)]
    fresh, other = decode(model, SPARSE, tokens[:, :89], 30, bench.counting)
    assert torch.equal(torch.stack(again, 1), fresh)
    assert bench.exposure(decoder) == bench.exposure(other) > 1
    # The output of the row that leaves at the next step:
    decoder.layers[1].cache.out[:, 89 % SPARSE.window] = torch.inf
    assert decoder.step(tokens[:, 89]).isfinite().all()
    assert decoder.layers[1].cache.out.isfinite().all()


def test_a_failed_step_needs_prefill():
    """An id out of range changes nothing. A step that fails inside may have written into some
    layers, so the decoder refuses to go on until the next prefill."""
    model = random_model()
    tokens = random_tokens(1, 40)
    expected, _ = decode(model, SPARSE, tokens, 20)
    decoder, _ = start(model, SPARSE, tokens, 20)
    refused(lambda: decoder.step(torch.tensor([61])), "token id 61 must be between 0 and 60")
    refused(lambda: decoder.prefill(torch.full((1, 30), 61)), "token id 61")
    assert torch.equal(decoder.step(tokens[:, 20]), expected[:, 1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder.layers[1], "ops", OpsWrapper(None))  # fails in the second layer
        with pytest.raises(AttributeError):
            decoder.step(tokens[:, 21])
    for call in (decoder.step, partial(next, decoder.stream(tokens, 5, append=True))):
        refused(partial(call, tokens[:, 21]), "the last call failed: start afresh")
    decoder.prefill(tokens[:, :20])
    assert torch.equal(decoder.step(tokens[:, 20]), expected[:, 1])


@pytest.mark.parametrize("name, message", [
    ("rows", r"q must have shape \(2, 4, 6, 32\), .* not \(2, 1, 6, 32\)"),
    ("batch", r"q must have shape .* not \(1, 4, 6, 32\)"),
    ("heads", r"k must have shape \(2, 4, 2, 32\), .* not \(2, 4, 6, 32\)"),
    ("t", "t must be a 0-dim int64 tensor, not <class 'int'>"),
])  # fmt: skip
def test_rows_that_do_not_fit_the_cache_are_refused(name, message):
    """Guards against an ordinary decode loop, which feeds one row, so that no row is revised."""
    q, k, v = random_qkv(T=30)
    layer = new_layer(SPARSE, q, k)
    layer.prefill(q[:, :20], k[:, :20], v[:, :20])
    q, k, v = (x[:, 17:21] for x in (q, k, v))
    t = torch.tensor(20)
    if name == "rows":
        q, k, v = (x[:, -1:] for x in (q, k, v))
    elif name == "batch":
        q, k, v = (x[:1] for x in (q, k, v))
    elif name == "heads":
        k = q
    else:
        t = 20
    angles = torch.ones(128, 16).double()
    refused(lambda: layer.decode(q, k, v, angles, angles, t), message)


def test_checking_the_rows_reads_no_value(monkeypatch):
    """Guards against a message that shows t, which has no value while a CUDA graph records."""
    q, k, v = random_qkv(T=4)
    layer = new_layer(SPARSE, q, k)
    for name in ("item", "__repr__"):
        monkeypatch.setattr(torch.Tensor, name, None)
    layer.check_rows(q, k, v, torch.tensor(20))


def test_overwriting_changes_only_what_it_should():
    """The first sparse layer's K and V depend on no sparse attention, so overwriting writes what
    was there. Those of deeper layers change. Outside the window the cache is untouched, bit for
    bit."""
    model = random_model(n_layer=4)
    tokens = random_tokens(2, 60)
    W = SPARSE.window
    decoder, _ = start(model, SPARSE, tokens, 21)
    changed = np.zeros((4, 2))
    for t in range(21, 60):
        before = [by_position(layer.cache) for layer in decoder.layers]
        decoder.step(tokens[:, t])
        for i, kv in np.ndindex(4, 2):
            old = before[i][kv]
            new = by_position(decoder.layers[i].cache)[kv]
            outside = torch.ones(new.shape[2], dtype=torch.bool)
            outside[t - W + 1 : t + 1] = False
            assert torch.equal(new[:, :, outside].nan_to_num(77), old[:, :, outside].nan_to_num(77))
            moved = (new - old)[:, :, t - W + 1 : t].abs().max()
            changed[i, kv] = max(changed[i, kv], moved)
    assert (changed[:2] < 1e-12).all() and (changed[2:] > 1e-3).all(), changed


def test_output_cache_is_independent_of_the_length():
    """W rows of n_head * (hs + 1) float32 numbers per text, for a model in half precision too."""
    q, k, _ = (x.bfloat16() for x in random_qkv(B=3))
    for max_seq_len in (64, 8192):
        cache = new_layer(RetroConfig(window=4), q, k, max_seq_len).cache
        nbytes = sum(x.numel() * x.element_size() for x in (cache.out, cache.lse))
        assert nbytes == 3 * 4 * 6 * (32 + 1) * 4
    assert cache.k.shape == (3, 2, 8192 // 16, 16, 32) and cache.k.dtype == torch.bfloat16


# --------------------------------------------------------------------------------------------------
# Whole decoding against the oracle


def check_against_oracle(model, retro, tokens, prompt_len, tol):
    """Logits, all K and V, outputs and log-sum-exps of the window's rows, and page counts agree."""
    expected, states = oracle(model, retro, tokens, prompt_len)
    logits, decoder = decode(model, retro, tokens, prompt_len, bench.counting)
    close(logits, expected, tol)
    B, T = tokens.shape
    window = np.arange(max(0, T - retro.window), T)
    loads = B * model.config.n_kv_head
    loads *= sum(pages_to_load(retro, t)[0] for t in range(prompt_len, T))
    for i, (layer, s) in enumerate(zip(decoder.layers, states, strict=True)):
        cache = layer.cache
        keys, values = by_position(cache)
        close(keys[:, :, :T], s.k, tol)
        close(values[:, :, :T], s.v, tol)
        if i < retro.dense_layers:
            continue
        num = s.num.reshape(B, -1, *s.num.shape[3:])[:, :, window]  # (B, n_head, rows, hs)
        den = s.den.reshape(B, -1, s.den.shape[3])[:, :, window]  # (B, n_head, rows)
        slots = window % retro.window
        close(cache.out[:, slots].transpose(1, 2), num / den[..., None], tol)
        close(cache.lse[:, slots].transpose(1, 2), np.log(den), tol)
        assert layer.ops.counts.tolist() == [loads, s.sights]
        assert retro.window == 1 or s.sights > 0, "no supplementary output: the case is empty"


@pytest.mark.parametrize(
    "n_head, n_kv_head, hs, page_size, W, B, prompt_len, T, dense_layers, budget", [
    (2, 2, 32, 8, 2, 1, 30, 81, 0, 0.15), (3, 1, 64, 8, 4, 3, 41, 90, 1, 0.2),
    (6, 2, 64, 16, 8, 1, 57, 120, 0, 0.15), (4, 1, 128, 32, 2, 1, 100, 150, 1, 0.3),
    (8, 2, 32, 16, 1, 3, 50, 100, 0, 0.15), (8, 1, 32, 8, 8, 3, 3, 60, 0, 0.1),
    (16, 2, 32, 16, 4, 1, 64, 110, 2, 0.2), (3, 3, 128, 8, 1, 1, 20, 60, 1, 0.2),
    (4, 4, 32, 32, 8, 1, 1, 120, 0, 0.3), (6, 2, 32, 8, 2, 1, 1, 70, 0, 0.15),
    (6, 2, 32, 1, 4, 2, 5, 50, 0, 0.3), (6, 2, 32, 4, 16, 2, 15, 60, 0, 0.3),
])  # fmt: skip
def test_random_models_against_the_oracle(
    n_head, n_kv_head, hs, page_size, W, B, prompt_len, T, dense_layers, budget
):
    """GQA ratios, batches, ragged pages, windows, page and head sizes; also prompts shorter than
    the window."""
    retro = RetroConfig(page_size, budget, min_tokens=10, window=W, dense_layers=dense_layers)
    model = random_model(n_head, n_kv_head, hs)
    check_against_oracle(model, retro, random_tokens(B, T), prompt_len, 1e-10)


@pytest.mark.parametrize("W", [1, 2, 8])
def test_the_shipped_checkpoint_against_the_oracle(W):
    """Guards against a checkpoint, a tokenizer and a RoPE layout that do not belong together, and
    against shortcuts that hold for random weights but fail on the large values of trained ones."""
    model = Llama.from_checkpoint(TINY, dtype=torch.float64)
    tok = Tokenizer.from_checkpoint(TINY)
    tokens = torch.tensor([tok.encode(retro_attention.__doc__, bos=True)[:145]])  # any text will do
    assert tokens.shape == (1, 145)
    retro = RetroConfig(budget=0.15, min_tokens=64, window=W, dense_layers=1)
    check_against_oracle(model, retro, tokens, 121, 1e-9)


# --------------------------------------------------------------------------------------------------
# The Triton kernels against their PyTorch twins: compiled on a GPU, else in Triton's interpreter


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed: kernels.py is not tested here",
)
needs_gpu = pytest.mark.skipif(
    DEVICE != "cuda", reason="there is no GPU: CUDA graphs are not tested here"
)
KERNEL_DTYPES = {torch.float32: 2e-6, torch.float16: 1e-3}  # largest relative RMS error
if DEVICE == "cuda":
    KERNEL_DTYPES[torch.bfloat16] = 1e-2  # the interpreter's bfloat16 dot is wrong


def assert_close(found, expected, dtype, what):
    assert found.shape == expected.shape and not found.isnan().any(), what
    assert (found.isinf() == expected.isinf()).all(), what
    finite = expected.isfinite()
    found = found[finite].double()
    expected = expected[finite].double()
    error = (found - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error <= KERNEL_DTYPES[dtype], f"{what}: relative error {error:.1e}"


def cache_at(config, B, n_kv_head, G, hs, t, dtype, seed):
    """Returns a cache as a decode step to position t finds it, t as a tensor, and a generator. The
    cache is filled with noise, and with NaN where nothing was written yet."""
    gen = torch.Generator().manual_seed(seed)
    n_head = n_kv_head * G
    cache = retro_attention.new_cache(config, False, B, n_head, n_kv_head, hs, t + 20, "cpu", dtype)
    for x in (cache.k, cache.v, cache.bounds):
        x.fill_(torch.nan)
    if t > 0:
        k, v = (torch.randn(B, t, n_kv_head, hs, generator=gen).to(dtype) for _ in "kv")
        put_rows(k, v, cache, t - 1)
        held = config.pages_held(t - 1)
        # Most pages were loaded within the last few steps, so that each row finds some that it has
        # seen and some that it has not.
        ago = torch.randint(1, 2 * config.window + 2, (B, n_kv_head, held), generator=gen)
        cache.last_loaded[:, :, :held] = (t - ago).clamp(min=-1)
    cache.out.normal_(generator=gen)
    cache.lse.normal_(generator=gen)
    cache.lse[:, 0] = -torch.inf  # one row has seen nothing so far
    cache.out[:, t % config.window] = torch.inf  # the row that leaves; 0 * inf would be NaN
    for name in ("k", "v", "bounds", "last_loaded", "out", "lse"):
        setattr(cache, name, getattr(cache, name).to(DEVICE))
    return cache, torch.tensor(t, device=DEVICE), gen


def in_float64(cache):
    """A copy for the reference. The oracle of a kernel is its twin in float64, on the same
    inputs."""
    cache = copy.deepcopy(cache)
    for name in ("k", "v", "bounds", "out", "lse"):
        setattr(cache, name, getattr(cache, name).double())
    return cache


PLACES = [  # B, n_kv_head, t, min_tokens: where a text may stand
    (1, 1, 269, 200),  # several tiles per split; the last page is ragged
    (2, 1, 127, 32),  # the last page is full
    (1, 1, 64, 8),  # the last page has just begun, and the window lies in two pages
    (1, 2, 40, 256),  # below the floor: all pages are selected
    (2, 1, 3, 8),  # fewer tokens than rows, for the larger windows
    (1, 1, 0, 8),  # the very first token
]
# G, W, page size, head size. The interpreter is slow, so it gets 16 shapes, in which every pair of
# values still occurs.
SIZES = (1, 3, 4, 8), (1, 2, 4, 8), (8, 16, 32), (32, 64, 128)
SHAPES = list(itertools.product(*SIZES))
if DEVICE != "cuda":
    SHAPES = [
        (SIZES[0][i], SIZES[1][j], SIZES[2][(i + j) % 3], SIZES[3][(i + 2 * j) % 3])
        for i, j in np.ndindex(4, 4)
    ]
ODD_SHAPES = [
    (1, 1, 1, 16), (2, 3, 2, 32), (3, 5, 4, 64), (4, 2, 8, 128), (5, 8, 16, 32), (6, 4, 64, 64),
    (7, 1, 32, 128), (8, 8, 16, 128), (1, 8, 8, 64), (4, 4, 16, 128), (2, 2, 1, 64), (3, 7, 8, 16),
]  # fmt: skip


def kernel_cases():
    """Yields `SHAPES` at changing places and dtypes, then random budgets, floors and positions in a
    dozen odd shapes (a GPU compiles each anew)."""
    dtypes = list(KERNEL_DTYPES)
    for i, shape in enumerate(SHAPES):
        yield *shape, *PLACES[(i + i // 6) % 6], dtypes[i // 5 % len(dtypes)], 0.3
    for seed in range(300 if DEVICE == "cuda" else 12):
        draw = random.Random(seed).choice
        t = draw(range(2000 if DEVICE == "cuda" else 300))
        min_tokens = draw((1, 10, 64, 500))
        B = draw((1, 2, 3))
        n_kv_head = draw((1, 2))
        budget = draw((0.01, 0.07, 0.15, 0.5, 1.0))
        dtype = dtypes[seed // 12 % len(dtypes)]
        yield *ODD_SHAPES[seed % 12], B, n_kv_head, t, min_tokens, dtype, budget


def check_write(config, cache, position, q, k, v, angles, dtype):
    """Compares `write` with its twin. Returns the kernel's rotated q."""
    t = position.item()
    twin = in_float64(cache)
    rows = [x.double() for x in (q, k, v, angles.cos(), angles.sin())]
    expected = retro_attention.write(*rows, twin, position)
    q = kernels.write(q, k, v, angles.cos(), angles.sin(), cache, position)
    first = max(0, config.window - 1 - t)  # rows before the start do not exist
    assert_close(q[:, first:], expected[:, first:], dtype, "write: q")
    for name, n in (("k", t + 1), ("v", t + 1), ("bounds", 2 * config.pages_held(t))):
        found, expected = (getattr(c, name).flatten(2, -2) for c in (cache, twin))
        assert_close(found[:, :, :n], expected[:, :, :n], dtype, f"write: {name}")
        assert found[:, :, n:].isnan().all(), f"write: {name} after position t"
    return q


def check_score(config, cache, position, q):
    """Compares `score` with its twin. Returns the kernel's scores, NaN after the pages held."""
    held = config.pages_held(position.item())
    twin = in_float64(cache)
    scores = kernels.score(q, cache, position)
    error = (scores[:, :, :held] - retro_attention.score(q.double(), twin, position)).abs()
    # The terms of a score cancel, so a rounding error is small against the sum of their sizes, not
    # against the score.
    q_sizes = q[:, -1:].abs().unflatten(2, (cache.k.shape[1], -1)).sum(3).transpose(1, 2)
    sizes = twin.bounds.abs().amax(dim=3)[:, :, :held] * q_sizes
    assert (error <= 2e-6 * sizes.sum(-1)).all(), "score"
    scores[:, :, held:] = torch.nan
    return scores


def check_select(config, cache, position, scores):
    """Compares `select` with its twin. Returns both results."""
    t = position.item()
    S = config.pages_selected(t)
    twin = in_float64(cache)
    given = scores[:, :, : config.pages_held(t)].clone()
    before = given.clone()
    expected = retro_attention.select(given, twin, position)
    assert torch.equal(given, before), "select changed its argument"
    found = kernels.select(scores, cache, position)
    for what, a, b in zip(("pages", "loaded_before"), found, expected, strict=True):
        assert torch.equal(a[:, :, :S], b), f"select: {what}"
    assert torch.equal(cache.last_loaded, twin.last_loaded), "select: last_loaded"
    return found, expected


@needs_triton
@pytest.mark.parametrize(
    "G, W, ps, hs, B, n_kv_head, t, min_tokens, dtype, budget", list(kernel_cases()), ids=str
)
def test_kernels_equal_their_twins(G, W, ps, hs, B, n_kv_head, t, min_tokens, dtype, budget):
    """In one decode step each kernel, given its twin's inputs, writes and returns the same. What
    was never written is NaN, and no result depends on it."""
    config = RetroConfig(page_size=ps, budget=budget, min_tokens=min_tokens, window=W)
    cache, position, gen = cache_at(config, B, n_kv_head, G, hs, t, dtype, seed=t)
    heads = [n_kv_head * G, n_kv_head, n_kv_head]  # slices of one product, as in the model
    qkv = torch.randn(B, W, sum(heads), hs, generator=gen).to(DEVICE, dtype)
    angles = torch.randn(t + 1, hs // 2, generator=gen).to(DEVICE)
    q = check_write(config, cache, position, *qkv.split(heads, dim=2), angles, dtype)
    scores = check_score(config, cache, position, q)
    chosen, expected_chosen = check_select(config, cache, position, scores)

    twin = in_float64(cache)
    cases = ("attend, dense", (None, None), (None, None)), ("attend", chosen, expected_chosen)
    for what, ours, theirs in cases:
        parts = kernels.attend(q, cache, *ours, position)
        o, lse = merge_by_lse(*parts)
        expected_o, expected_lse = attend(q.double(), twin, *theirs, position)
        assert_close(o, expected_o[0], dtype, f"{what}: o")
        assert_close(lse, expected_lse[0], dtype, f"{what}: lse")

    expected = retro_attention.combine(*(x.double() for x in parts), twin, position)
    assert_close(kernels.combine(*parts, cache, position), expected, dtype, "combine")
    assert_close(cache.out, twin.out, torch.float32, "combine: out")
    assert_close(cache.lse, twin.lse, torch.float32, "combine: lse")


@needs_triton
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # NumPy, for a gate of -200
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("rows, n", [(1, 96), (5, 1100)])
def test_kernels_beside_attention_equal_their_twins(rows, n, dtype):
    """Sizes that are no power of two and more than a block, and gates whose exp overflows."""
    gen = torch.Generator().manual_seed(n)
    x = torch.randn(2, rows, 2 * n, generator=gen).to(DEVICE, dtype) * 3
    x[0, 0, :8] = -200
    weight = torch.randn(2 * n, generator=gen).to(DEVICE, dtype)
    expected = retro_attention.rms_norm(x.double(), weight.double(), 1e-5)
    assert_close(kernels.rms_norm(x, weight, 1e-5), expected, dtype, "rms_norm")
    assert_close(kernels.swiglu(x), retro_attention.swiglu(x.double()), dtype, "swiglu")
    x = torch.full((1, 1, n), 1e-4, device=DEVICE, dtype=dtype)  # as small as eps
    expected = retro_attention.rms_norm(x.double(), weight[:n].double(), 1e-8)
    assert_close(kernels.rms_norm(x, weight[:n], 1e-8), expected, dtype, "rms_norm: eps")


def with_nan(scores, bits):
    scores[0, 0, 5:7] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    return scores


SCORES = {  # random scores, changed to values that could break a search by bits
    "equal": lambda x: torch.full_like(x, -2.5),
    "few values": torch.round,
    "zeros of both signs": lambda x: x.sign() * 0.0,
    "negative": lambda x: -x.abs(),
    "huge": lambda x: x * torch.tensor([1e4, 1e37] * 8)[None, :, None],
    "NaN": lambda x: with_nan(x, 0x7FFFFFFF),
    "negative NaN": lambda x: with_nan(x, -1),
}


@needs_triton
@pytest.mark.parametrize("kind", SCORES)
def test_select_kernel_ties_and_extremes(kind):
    """Of pages with equal scores, also 0.0 and -0.0, the lower ones win; scores of any size keep
    their order. A NaN of either sign ranks as infinity does, and leads no search or list past its
    end."""
    config = replace(SPARSE, budget=0.4)
    t = 101
    held = 13
    # 16 searches, which end in different ways
    cache, position, gen = cache_at(config, 1, 16, 1, 32, t, torch.float32, seed=1)
    twin = copy.deepcopy(cache)
    scores = SCORES[kind](torch.randn(1, 16, held, generator=gen)).to(DEVICE)
    unused = cache.k.shape[2] - held
    padded = torch.nn.functional.pad(scores, (0, unused), value=torch.nan)
    ranked = scores.nan_to_num(torch.inf, posinf=torch.inf, neginf=-torch.inf)
    expected = retro_attention.select(ranked, twin, position)
    for found, twins in zip(kernels.select(padded, cache, position), expected, strict=True):
        assert torch.equal(found[:, :, : config.pages_selected(t)], twins)
    pages = expected[0].tolist()
    # 6 of 13: the window's own, and the lowest of the others
    assert kind != "equal" or pages == [[[0, 1, 2, 3, 4, 12]] * 16]
    assert "NaN" not in kind or {5, 6} <= set(pages[0][0])


@needs_triton
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_attend_kernel_empty_supplements_and_extreme_scores(dtype):
    """Past rows for which no page is new get o = 0 and lse = -inf; scores of 1e4 neither overflow
    nor lose the newest row."""
    t = 75
    config = replace(SPARSE, budget=1.0)
    cache, _, gen = cache_at(config, 1, 1, 2, 32, t + 1, dtype, seed=2)
    position = torch.tensor(t, device=DEVICE)
    pages = torch.arange(t // 8 + 1, dtype=torch.int32, device=DEVICE).view(1, 1, -1)
    q = torch.randn(1, 4, 2, 32, generator=gen).to(DEVICE, dtype) * 1e3  # scores of up to about 1e4
    for last in (t - 1, -1):
        loaded_before = torch.full_like(pages, last)
        o, lse = merge_by_lse(*kernels.attend(q, cache, pages, loaded_before, position))
        expected_o, expected_lse = attend(q, cache, pages, loaded_before, position)
        assert_close(o, expected_o[0], dtype, "o")
        assert_close(lse, expected_lse[0], dtype, "lse")
        assert (lse[:, :-1] == -torch.inf).all() == (last == t - 1)
        assert lse[:, -1].isfinite().all()


@needs_triton
@pytest.mark.parametrize("window", [1, 4])
def test_both_implementations_decode_the_same(window):
    """With trained weights, over several layers and steps, the kernels load the same pages as the
    reference, leave the same in the caches, and give the same greedy tokens. Guards against the
    unused elements at the end of the kernels' lists of pages."""
    model = Llama.from_checkpoint(TINY, device=DEVICE)
    if DEVICE != "cuda":  # the interpreter is slow
        model.layers = model.layers[:2]
        model.config.n_layer = 2
    retro = RetroConfig(4, budget=0.2, min_tokens=16, window=window, dense_layers=0)
    tok = Tokenizer.from_checkpoint(TINY)
    idx = torch.tensor([tok.encode(retro_attention.__doc__, bos=True)[:45]], device=DEVICE)
    decoders = [
        bench.counting(model, 1, replace(retro, impl=impl), 50) for impl in ("torch", "triton")
    ]
    expected, found = (decoder.prefill(idx) for decoder in decoders)
    for _ in range(3):
        token = expected.argmax(-1)
        assert torch.equal(found.argmax(-1), token)
        expected, found = (decoder.step(token) for decoder in decoders)
        assert_close(found, expected, torch.float16, "logits")
        for theirs, ours in zip(*(decoder.layers for decoder in decoders), strict=True):
            assert torch.equal(theirs.cache.last_loaded, ours.cache.last_loaded)
            assert torch.equal(theirs.ops.counts, ours.ops.counts)
            for name in ("out", "lse"):
                close(getattr(ours.cache, name).cpu(), getattr(theirs.cache, name).cpu(), 1e-3)
            for a, b in zip(by_position(ours.cache), by_position(theirs.cache), strict=True):
                n = decoders[0].position + 1
                close(a[:, :, :n].cpu(), b[:, :, :n].cpu(), 1e-3)
    assert window == 1 or bench.exposure(decoders[0]) > 1


class ReadsPosition(OpsWrapper):
    """A wrapper that a CUDA graph cannot record."""

    capturable = False

    def write(self, q, k, v, cos, sin, cache, t):
        self.t = int(t)
        return self.ops.write(q, k, v, cos, sin, cache, t)


@needs_gpu
@pytest.mark.parametrize("window", [None, 1, 8])
def test_a_replayed_step_is_an_eager_step(window):
    """Guards against a graph that keeps a position, a shape or a token of its capture, also in a
    second text, and against a replay that leaves out a wrapper."""
    model = Llama.from_checkpoint(TINY, device="cuda", dtype=torch.bfloat16)
    tokens = random_tokens(2, 300).cuda()
    retro = replace(SPARSE, window=window) if window else None
    eager, graphed = (Decoder(model, 2, retro) for _ in range(2))
    eager.layers[0].ops = ReadsPosition(eager.layers[0].ops)
    last = graphed.layers[-1]
    ops = last.ops
    for text in (tokens, tokens.flip(1)):
        for decoder in (eager, graphed):
            decoder.prefill(text[:, :100])
        for i in range(100, 300):
            # An eager step in the middle of replays.
            last.ops = ReadsPosition(ops) if i == 290 and text is tokens else ops
            found = graphed.step(text[:, i])
            assert torch.equal(eager.step(text[:, i]), found), f"position {i}"
            assert last.ops is ops or last.ops.t == 290
    assert graphed.graph is not None and eager.graph is None


@needs_gpu
@pytest.mark.parametrize("sampling", [(0, None, None), (0.8, None, 0.95), (1, 9, 1)])
def test_a_token_waits_for_the_device_once(sampling):
    """Only `copy_to_host` waits, for the token and what comes with it. No other call hides a
    wait."""
    model = random_model().float().cuda()
    decoder = Decoder(model, 2, SPARSE)
    stream = decoder.stream(random_tokens(2, 20).cuda(), 20, *sampling, stop_tokens=[5])
    for _ in range(3):  # prefill, and the steps that compile and capture
        next(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            next(stream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_step_launched_ahead_changes_no_text():
    """With a CUDA graph, steps run before the host has read their token. The texts are those
    without a graph: to the end of the context, with a stop token in one row, and in both."""
    model = random_model(max_seq_len=64).float().cuda()
    prompt = random_tokens(2, 20).cuda()
    free = model.generate(prompt, 100, SPARSE, temperature=0)
    assert free.shape == (2, 64)
    stops = [free[0, 30].item(), free[1, 50].item()]
    for stop_tokens in ([], stops[:1], stops):
        texts = []
        for wrap in (lambda ops: ops, ReadsPosition):
            decoder = Decoder(model, 2, SPARSE)
            decoder.layers[0].ops = wrap(decoder.layers[0].ops)
            stream = decoder.stream(prompt, 100, temperature=0, stop_tokens=stop_tokens)
            texts.append(torch.stack(list(stream), dim=1))
            assert (decoder.graph is None) == (wrap is ReadsPosition)
        assert torch.equal(*texts)


@needs_gpu
def test_a_wrapper_through_the_kernels():
    """The control and the count of exposure give the same with a CUDA graph and without."""
    tokens = random_tokens(2, 90).cuda()
    model = random_model().float().cuda()
    logits = []
    exposures = []
    for make in (bench.not_looking_back, bench.counting):
        for impl in ("torch", "triton"):
            retro = replace(SPARSE, impl=impl)
            decoder = make(model, 2, retro, 90)
            steps = [decoder.prefill(tokens[:, :20])]
            steps += [decoder.step(token) for token in tokens[:, 20:].T]
            logits.append(torch.stack(steps))
            exposures.append(bench.exposure(decoder))
        assert decoder.graph is not None
        assert (logits[-2] - logits[-1]).abs().max() < 1e-3
        assert exposures[-2] == exposures[-1]
    assert exposures[0] == 1 < exposures[2]


@needs_triton
@pytest.mark.parametrize("dtype, head_size, rows, message", [
    (torch.float64, 32, 2, "dtype must be .* not torch.float64"),
    (torch.bfloat16, 32, 2, "in the interpreter, not torch.bfloat16"),
    (torch.float32, 24, 2, "head_size must be .* not 24"),
    (torch.float32, 256, 2, "head_size must be .* not 256"),
    (torch.float32, 32, 129, "at most 128, not 129"),
    (torch.float32, 16, 128, None),
])  # fmt: skip
def test_triton_is_refused_if_it_cannot_run(monkeypatch, dtype, head_size, rows, message):
    """A ValueError before anything runs; auto takes the reference instead."""

    def choose(impl, device):
        return implementation(impl, torch.device(device), dtype, head_size, rows)

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refused(lambda: choose("triton", "cpu"), "TRITON_INTERPRET=1")
    assert choose("auto", "cpu") is retro_attention
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if message is None:
        assert choose("triton", "cpu") is choose("auto", "cuda") is kernels
    else:
        refused(lambda: choose("triton", "cpu"), message)
        assert choose("auto", "cuda") is retro_attention


@needs_triton
def test_budget_times_pages_does_not_overflow_32_bits():
    """A budget of 990,000 millionths times 2,301 held pages does not fit 32 bits. Guards against a
    step that then loads only the window."""
    config = RetroConfig(page_size=1, budget=0.99, min_tokens=1, window=2)
    t = 2300
    dtype = torch.half
    cache, position, gen = cache_at(config, 1, 1, 1, 16, t, dtype, seed=1)
    qkv = torch.randn(1, 2, 3, 16, generator=gen).to(DEVICE, dtype)
    angles = torch.randn(t + 1, 8, generator=gen).to(DEVICE)
    q = check_write(config, cache, position, *qkv.split(1, dim=2), angles, dtype)
    scores = torch.randn(1, 1, cache.k.shape[2], generator=gen).to(DEVICE)
    chosen, expected_chosen = check_select(config, cache, position, scores)
    assert expected_chosen[0].shape[2] == 2279  # 99 % rounded up, and the window's older page
    o, lse = merge_by_lse(*kernels.attend(q, cache, *chosen, position))
    expected_o, expected_lse = attend(q.double(), in_float64(cache), *expected_chosen, position)
    assert_close(o, expected_o[0], dtype, "o")
    assert_close(lse, expected_lse[0], dtype, "lse")


def big(*shape):
    """A tensor in half precision with 2**31 unused elements before it, where an overflowing 32-bit
    offset would point. On a CPU, memory that is not touched costs nothing."""
    unused = 2**31
    try:
        memory = torch.empty(unused + torch.Size(shape).numel(), dtype=torch.half, device=DEVICE)
    except RuntimeError:
        pytest.skip("there is not enough address space: large caches are not tested here")
    return memory[unused:].view(shape)


@needs_triton
@pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_properties(0).total_memory < 40e9,
    reason="the GPU has less than 40 GB: large caches are not tested here",
)
def test_a_cache_beyond_32_bit_offsets(monkeypatch):
    """For the last of five texts, whose keys, values and bounds begin at element 2**31, the kernels
    do what their twins do in a small cache. Guards against offsets in 32 bits."""
    t = 6  # the window's first page has an earlier key
    config = RetroConfig(page_size=2, window=2)
    small, position, gen = cache_at(config, 1, 1, 2, 128, t, torch.half, seed=1)
    P = 2**31 // 4 // (2 * 128)
    k, v, bounds = (big(5, 1, P, 2, 128) for _ in range(3))
    cache = retro_attention.LayerCache(config, k, v, bounds)
    for name in ("k", "v", "bounds"):
        getattr(cache, name)[-1, :, :4] = getattr(small, name)[0, :, :4]
    # Only the first block of pages has tokens. In the interpreter the empty ones take minutes.
    monkeypatch.setattr(kernels.triton, "cdiv", lambda a, b: 1)
    qkv = torch.randn(5, 2, 4, 128, generator=gen).to(DEVICE, torch.half)
    angles = torch.randn(t + 1, 64, generator=gen).to(DEVICE)
    rows = qkv.split([2, 1, 1], dim=2)
    q = kernels.write(*rows, angles.cos(), angles.sin(), cache, position)
    twin = in_float64(small)
    rows = [x[-1:].double() for x in rows]
    retro_attention.write(*rows, angles.cos().double(), angles.sin().double(), twin, position)
    for name, n in (("k", t + 1), ("v", t + 1), ("bounds", 8)):
        found, expected = (getattr(x, name)[-1:, :, :4].flatten(2, 3) for x in (cache, twin))
        assert_close(found[:, :, :n], expected[:, :, :n], torch.half, name)
    last = q[-1:].double()
    scores = kernels.score(q, cache, position)[-1:, :, :4]
    assert_close(scores, retro_attention.score(last, twin, position), torch.half, "scores")
    o, lse = merge_by_lse(*kernels.attend(q, cache, None, None, position))
    expected_o, expected_lse = attend(last, twin, None, None, position)
    assert_close(o[-1:], expected_o[0], torch.half, "o")
    assert_close(lse[-1:], expected_lse[0], torch.half, "lse")


@needs_triton
@pytest.mark.parametrize("window, n_head, message", [
    (32, 8, None), (43, 6, "at most 128, not 129"), (129, 2, "at most 128, not 129"),
])  # fmt: skip
def test_triton_counts_all_query_rows_of_a_kv_head(monkeypatch, window, n_head, message):
    """Triton takes at most 128 query rows: the window times the query heads of a KV head. There are
    two KV heads here. Guards against a group that is left out, or all heads instead."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    make = partial(
        RetroAttention,
        RetroConfig(window=window, impl="triton"),
        dense=False,
        batch_size=1,
        n_head=n_head,
        n_kv_head=2,
        head_size=16,
        max_seq_len=16,
        device="cpu",
        dtype=torch.float32,
    )
    if message:
        refused(make, message)
    else:
        assert make().ops is kernels


# --------------------------------------------------------------------------------------------------
# Parts of the model, sampling


@pytest.mark.parametrize("scaling, theta", [(None, 10_000.0), (8.0, 500_000.0), (32.0, 500_000.0)])
def test_rope(scaling, theta):
    """Neighbouring pairs turn like complex numbers; Llama 3.1's scaling in its published form of
    three cases."""
    config = LlamaConfig(384, 1, 3, 3, 8, 8, 5000, rope_theta=theta, rope_scaling=scaling)
    rows = [0, 1, 17, 4098, 4999]
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 128, dtype=torch.float64, generator=gen)
    cos, sin = rope_table(config, config.max_seq_len, "cpu", torch.float64)
    close(apply_rope(x, cos[rows], sin[rows]), rotate(x.numpy(), rows, config), 1e-10)
    # In bfloat16, 8 bits could not tell position 4098 from 4099.
    cos, sin = rope_table(config, config.max_seq_len, "cpu", torch.bfloat16)
    assert cos.dtype == torch.float32
    assert apply_rope(x.bfloat16(), cos[rows], sin[rows]).dtype == torch.bfloat16


def test_a_model_trains():
    """Every parameter gets a gradient, also after the model has generated in inference mode."""
    model = random_model()
    tokens = random_tokens(2, 30)
    with torch.inference_mode():
        model.generate(tokens, 2, retro=SPARSE)
    logits = model.requires_grad_()(tokens[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_a_long_prompt_in_pieces_is_the_whole():
    """Guards against pieces that are lost or change places, and against a prompt in one piece."""
    feed_forward = FeedForward(LlamaConfig(4, 1, 1, 1, 8, 6, 8)).double()
    x = torch.randn(2, 2 * 8192 + 3, 4, dtype=torch.float64)
    expected = feed_forward.w2(retro_attention.swiglu(feed_forward.w13(x)))
    sizes = []
    feed_forward.w13.register_forward_hook(lambda module, args, y: sizes.append(y.shape[1]))
    close(feed_forward(x, retro_attention).detach(), expected.detach(), 1e-12)
    assert sizes == [4096, 4096, 4096, 4096, 3]  # of each of two texts


@pytest.mark.parametrize("prompt_len", [1, 33, 59])
@pytest.mark.parametrize("retro", [None, SPARSE], ids=["full", "sparse"])
def test_generate_and_score(retro, prompt_len):
    """Greedy tokens and log-probabilities, dense against the uncached forward pass, sparse against
    the oracle. Guards against the log-probability of a neighbouring token."""
    model = random_model()
    prompt = random_tokens(2, prompt_len)

    def expected_logits(text):
        if retro is None:
            return model(text)[:, prompt_len - 1 : -1]
        return torch.from_numpy(oracle(model, retro, text, prompt_len)[0])[:, :-1]

    n = 60 - prompt_len
    text = model.generate(prompt, n, retro=retro, temperature=0)
    assert torch.equal(text[:, :prompt_len], prompt)
    assert torch.equal(text[:, prompt_len:], expected_logits(text).argmax(-1))
    for only_one in ({"top_k": 1}, {"top_p": 1e-6}):
        found = model.generate(prompt, n, retro, temperature=3.0, seed=1, **only_one)
        assert torch.equal(found, text)
    other = random_tokens(2, 60, seed=1)
    logps = expected_logits(other).log_softmax(-1).gather(2, other[:, prompt_len:, None])[..., 0]
    found = model.score(other, prompt_len, retro=retro)
    assert found.dtype == torch.float32
    close(found, logps, 1e-5)


def test_appended_tokens_follow_the_text():
    """`stream` with append goes on where the last one ended, with the same tokens as steps by hand.
    The context counts the whole text."""
    model = random_model()
    tokens = random_tokens(2, 50)
    decoder, _ = start(model, SPARSE, tokens, 20)
    new = list(decoder.stream(tokens[:, 20:30], 5, temperature=0, append=True))
    logits, other = decode(model, SPARSE, tokens[:, :30], 20)
    expected = [logits[:, -1].argmax(-1)]
    for _ in range(4):
        expected.append(other.step(expected[-1]).argmax(-1))
    assert torch.equal(torch.stack(new), torch.stack(expected))
    decoder, _ = start(random_model(max_seq_len=40), SPARSE, tokens, 20)
    message = "the prompt must have 1 to 39 tokens, not 40"
    refused(partial(next, decoder.stream(tokens[:, 20:40], 5, append=True)), message)
    assert len(list(decoder.stream(tokens[:, 20:30], 50, append=True))) == 10


def test_generation_under_autocast():
    """A text's scores stay within bfloat16's rounding of those without autocast."""
    model = random_model().float()
    tokens = random_tokens(1, 40)
    for retro in (None, SPARSE):
        expected = model.score(tokens, 20, retro)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (model.score(tokens, 20, retro) - expected).abs().max() < 0.5


@pytest.mark.parametrize("temperature, top_k, top_p, weights", [  # of probabilities .4 .3 .2 .1
    (1, None, None, [4, 3, 2, 1]), (0.5, None, None, [16, 9, 4, 1]), (1, 3, None, [4, 3, 2, 0]),
    (1, 9, None, [4, 3, 2, 1]), (1, None, 0.65, [4, 3, 0, 0]), (1, None, 0.75, [4, 3, 2, 0]),
    (1, None, 1.0, [4, 3, 2, 1]), (1, 3, 0.75, [4, 3, 0, 0]), (1, None, 1e-46, [1, 0, 0, 0]),
])  # fmt: skip
def test_sampling_frequencies(temperature, top_k, top_p, weights):
    """temperature, top_k and top_p against their definitions, by counting; the ids are not in order
    of probability."""
    order = [2, 0, 3, 1]
    n = 40_000
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1])[order].log().expand(n, 4)
    drawn = sample_token(logits, temperature, top_k, top_p, torch.Generator().manual_seed(0))
    for token, i in enumerate(order):
        p = weights[i] / sum(weights)
        error = abs((drawn == token).sum().item() / n - p)
        assert error <= 4 * math.sqrt(p * (1 - p) / n)  # four standard errors


@pytest.mark.parametrize("stops", [0, 1, 2])
def test_steps_launched_ahead_write_the_same_text(stops):
    """With a fake `graph`, the next step runs before the host has read a token. The text ends with
    the context, or once both rows have stopped, and the caches then hold the last stop token."""
    model = random_model(max_seq_len=64)
    prompt = random_tokens(2, 20)
    free = model.generate(prompt, 100, SPARSE, temperature=0)
    stop_tokens = [free[0, 30].item(), free[1, 50].item()][:stops]
    texts = []
    positions = []
    for graph in (None, "any"):
        decoder = Decoder(model, 2, SPARSE)
        decoder.graph = graph
        stream = decoder.stream(prompt, 100, temperature=0, stop_tokens=stop_tokens)
        texts.append(torch.stack(list(stream), dim=1))
        positions.append(decoder.position)
    assert torch.equal(*texts)
    n = 20 + texts[0].shape[1]
    ended = n < 64
    assert ended == (stops > 0) and positions == [n - 2, n - 2 + ended]


@pytest.mark.parametrize("n", [1, 511, 512, 513, 128_256])
def test_the_sum_before_each_token(n):
    x = torch.rand(2, n, generator=torch.Generator().manual_seed(n))
    expected = x.double().cumsum(dim=1) - x.double()
    assert torch.allclose(sum_before(x).double(), expected, rtol=1e-6, atol=1e-6)


def test_top_p_of_a_flat_distribution():
    """Of 128,256 equally likely tokens a quarter is kept, exactly. Each of these is equally likely
    to be drawn."""
    logits = torch.full((128, 128_256), -7.0)
    drawn = sample_token(logits, 1, None, 0.25, torch.Generator().manual_seed(0))  # (128,)
    ranks = logits[0].sort(descending=True)[1].argsort()[drawn]
    assert len(set(drawn.tolist())) > 120
    assert 31_000 < ranks.max() < 32_064 and ranks.min() < 1000


def test_stop_tokens_and_the_end_of_the_context():
    """A stopped row repeats its stop token until all rows have stopped; the text never outgrows the
    context."""
    model = random_model(max_seq_len=64)
    prompt = random_tokens(3, 20)
    free = model.generate(prompt, 1000, retro=SPARSE, temperature=0)
    assert free.shape == (3, 64)
    stop = free[0, 25].item()
    ends = [next((i for i in range(20, 64) if row[i] == stop), 64) for row in free]
    text = model.generate(prompt, 1000, retro=SPARSE, temperature=0, stop_tokens=[stop])
    assert text.shape[1] == min(64, max(ends) + 1) and min(ends) < max(ends)
    for row, expected, end in zip(text, free, ends, strict=True):
        assert torch.equal(row[:end], expected[:end]) and (row[end:] == stop).all()
    decoder = Decoder(model, 3, SPARSE, max_seq_len=20)
    decoder.prefill(prompt)
    # On a GPU the write itself would not fail.
    with pytest.raises(IndexError, match="position 20 is past the end of the cache, 20"):
        decoder.step(prompt[:, 0])


def test_logits_that_are_not_finite_are_refused():
    """Also after a token that the model generates itself. Else, with temperature 0, the text would
    go on with token 0 for ever."""
    model = random_model()
    prompt = random_tokens(2, 20)
    bad = model.generate(prompt, 1, SPARSE, temperature=0)[0, 20].item()
    model.tok_embeddings.weight[bad] = math.inf
    prompt[prompt == bad] = (bad + 1) % 61
    assert model.generate(prompt[:1], 1, SPARSE, top_k=1).isfinite().all()
    text = torch.cat((prompt, torch.full((2, 1), bad), prompt), dim=1)
    message = "logits are not finite: its weights are broken, or too large for torch.float64"
    refused(lambda: model.generate(text, 5, SPARSE, temperature=0), message)
    refused(lambda: model.score(text, 10, SPARSE), message)
    refused(lambda: model.score(text, 30, SPARSE), message)
    refused(lambda: model.score(text, 10, None), message)


# --------------------------------------------------------------------------------------------------
# Configurations and arguments that are refused


def small_config(**changes):
    shape = {"dim": 30, "n_layer": 1, "n_head": 3, "n_kv_head": 3, "vocab_size": 8, "ffn_dim": 8}
    return LlamaConfig(**{**shape, "max_seq_len": 8, **changes})


def from_meta(**changes):
    """Llama 3.2 1B's params.json, in part, with changes."""
    params = {"dim": 2048, "n_layers": 32, "n_heads": 32, "vocab_size": 128_256}
    params |= {"ffn_dim_multiplier": 1.5, "multiple_of": 256}
    return config_from_params({**params, **changes})


@pytest.mark.parametrize("make, name, value, message", [
    (RetroConfig, "page_size", 0, "an integer from 1 to 1024"),
    (RetroConfig, "page_size", 12, "a power of two"),
    (RetroConfig, "page_size", 8.0, "an integer from 1 to 1024"),
    (RetroConfig, "page_size", True, "an integer from 1 to 1024"),
    (RetroConfig, "page_size", 2048, "an integer from 1 to 1024"),
    (RetroConfig, "budget", 0, r"in \(0, 1\]"),
    (RetroConfig, "budget", 1.01, r"in \(0, 1\]"),
    (RetroConfig, "budget", math.nan, r"in \(0, 1\]"),
    (RetroConfig, "min_tokens", 0, "an integer from 1 to"),
    (RetroConfig, "window", 0, "an integer from 1 to 256"),
    (RetroConfig, "window", 1.5, "an integer from 1 to 256"),
    (RetroConfig, "dense_layers", -1, "an integer from 0 to"),
    (RetroConfig, "impl", "cuda", "auto, torch or triton"),
    (small_config, "n_head", 4, "head_size .by default dim / n_head = 30 / 4. must be even"),
    (small_config, "n_kv_head", 4, "multiple of n_kv_head 4"),
    (small_config, "dim", 21, "21 / 3. must be even and >= 2, not 7"),
    (small_config, "n_layer", 0, "an integer >= 1 and < 2.* not 0"),
    (small_config, "max_seq_len", 1.5, "an integer .*, not 1.5"),
    (small_config, "head_size", 15, "must be even and >= 2"),
    (small_config, "head_size", "16", "must be even and >= 2"),
    (small_config, "norm_eps", math.inf, "a number > 0 .* not inf"),
    (from_meta, "dim", "7", "an integer >= 1, not '7'"),
    (from_meta, "ffn_dim_multiplier", math.inf, "a number > 0, not inf"),
])  # fmt: skip
def test_a_value_out_of_range_is_named(make, name, value, message):
    """The message holds the name, what is allowed, and the value. Guards against heads that
    silently lose a part of the embedding."""
    make()
    with pytest.raises(ValueError, match=message) as error:
        make(**{name: value})
    assert name in str(error.value) and str(value) in str(error.value)


def test_a_rope_factor_of_zero_is_refused():
    message = "rope_scaling must be a number > 0 and < 1e30, not 0"
    refused(lambda: from_meta(use_scaled_rope=True, rope_scaling_factor=0), message)


@pytest.mark.parametrize("arguments, message", [
    ({"temperature": -1}, "temperature must be 0 or a finite number >= 1e-6, not -1"),
    ({"temperature": math.nan}, "temperature .+ nan"),
    ({"seed": -1}, "seed must be between 0 and .+, not -1"),
    ({"top_k": 0}, "top_k must be >= 1, not 0"),
    ({"top_p": 0}, r"top_p must be in \(0, 1\], not 0"),
    ({"top_p": 1.5}, "top_p must be in .+, not 1.5"),
    ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, not 0"),
    ({"idx": random_tokens(1, 0)}, "must have 1 to 63 tokens, not 0"),
    ({"idx": random_tokens(1, 64)}, "must have 1 to 63 tokens, not 64"),
    ({"idx": [[1, 2]]}, r"integer tensor of shape \(B, T\), not list"),
    ({"idx": torch.ones(3)}, r"not torch.float32 \(3,\)"),
    ({"retro": RetroConfig(impl="triton")}, "impl triton: on cpu set TRITON_INTERPRET=1"),
    ({"retro": RetroConfig(dense_layers=4)}, "dense_layers must be between 0 and .+ 3 layers"),
    ({"retro": "quest"}, "retro must be a RetroConfig, or None for full attention, not 'quest'"),
    ({"idx": torch.tensor([[3, 61]])}, "token id 61 must be between 0 and 60"),
    ({"idx": torch.tensor([[3, -1]])}, "token id -1 must be between 0 and 60"),
])  # fmt: skip
def test_generate_refuses_what_is_out_of_range(arguments, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    usual = {"idx": random_tokens(1, 20), "max_new_tokens": 5}
    model = random_model(max_seq_len=64)
    refused(lambda: model.generate(**{**usual, **arguments}), message)


@pytest.mark.parametrize("call, message", [
    (lambda model: model.score(random_tokens(1, 60), 0), "between 1 and 59, not 0"),
    (lambda model: model.score(random_tokens(1, 60), 60), "between 1 and 59, not 60"),
    (lambda model: model(random_tokens(1, 20)[0]), r"\(B, T\), not torch.int64 \(20,\)"),
    (lambda model: model(random_tokens(1, 0)), "0 tokens.* between 1 and the context of 64"),
    (lambda model: model(random_tokens(1, 65)), "65 tokens.* between 1 and the context of 64"),
    (lambda model: Decoder(model, 1).prefill(random_tokens(1, 0)), "1 to 64 tokens, not 0"),
    (lambda model: Decoder(model, 1).prefill(random_tokens(1, 65)), "1 to 64 tokens, not 65"),
    (lambda model: Decoder(model, 2).prefill(random_tokens(1, 9)), "1 texts, .* made for 2"),
    (lambda model: Decoder(model, 1, max_seq_len=65), "between 1 and the context, 64, not 65"),
    (lambda model: Llama.from_checkpoint(TINY, dtype="bfloat16"), "dtype must be .*, not 'bfloat1"),
])  # fmt: skip
def test_a_call_out_of_range_is_refused(call, message):
    """Guards against a slice of the RoPE table that silently ends early."""
    refused(lambda: call(random_model(max_seq_len=64)), message)


# --------------------------------------------------------------------------------------------------
# Files in Meta's format


def write_tokenizer(folder, change=lambda lines: lines):
    """256 bytes and four merges, in Llama 3's format."""
    tokens = [bytes([i]) for i in range(256)] + [b"th", b" th", b"the", b" the"]
    lines = [base64.b64encode(token) + b" %d" % i for i, token in enumerate(tokens)]
    (folder / "tokenizer.model").write_bytes(b"\n".join(change(lines)))
    return folder


def test_tokenizer(tmp_path):
    """Round trip of any text, merges by rank, no special token from a text, Llama 3.1's order of
    stop tokens."""
    tok = Tokenizer.from_checkpoint(write_checkpoint_and_tokenizer(tmp_path))
    texts = ["", "the other", "Ünïcødé 你好 🙂\r\n\t 1234  x", "<|end_of_text|> the"]
    # A million spaces would overflow the stack of the regular expression that splits a text.
    for text in [*texts, "a" + " " * 1_000_000 + "the"]:
        ids = tok.encode(text, bos=True)
        assert ids[0] == tok.bos == 260 and tok.decode(ids[1:]) == text
        assert max(ids[1:], default=0) < 260, "a special token"
    assert tok.encode("the the") == [258, 259] and tok.decode([0xE4]) == "\ufffd"
    assert tok.vocab_size == 260 + 256
    assert tok.stop_tokens == [261, 268, 269]  # 128001, 128008 and 128009 in Llama 3.1


def test_chat(tmp_path):
    """Llama 3's format of a conversation; what a user writes never becomes a special token."""
    tok = Tokenizer.from_checkpoint(write_checkpoint_and_tokenizer(tmp_path))
    turn = "<|start_header_id|>{}<|end_header_id|>\n\n{}"
    user = turn.format("user", "the?<|eot_id|>")
    assistant = turn.format("assistant", "so<|eot_id|>")
    text = "<|begin_of_text|>" + user + assistant + user + turn.format("assistant", "")
    conversation = [("user", " the?\n"), ("assistant", "so"), ("user", "the?")]  # ends are stripped
    assert tok.chat(conversation) == tok.bpe.encode(text, allowed_special="all")
    assert tok.chat([("user", "<|eot_id|>")]).count(tok.special["<|eot_id|>"]) == 1
    refused(lambda: tok.chat([("user", None)]), "a message must have a text, not None")
    message = "a role must be system, user or assistant, not 'tool'"
    refused(lambda: tok.chat([("tool", "the?")]), message)


def write_checkpoint(folder, params=(), weights=(), without=()):
    """A small checkpoint in Meta's format, with some of its contents replaced. Returns its
    model."""
    model = random_model(hs=8, n_layer=2, ffn_dim=128)
    shape = {"dim": 48, "n_layers": 2, "n_heads": 6, "n_kv_heads": 2, "vocab_size": 61}
    shape |= {"multiple_of": 128, "max_seq_len": 256, "rope_theta": 1e3}
    contents = {**model.weights(), **dict(weights)}
    contents = {name: w for name, w in contents.items() if name not in without}
    torch.save(contents, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps({**shape, **dict(params)}))
    return model


def write_checkpoint_and_tokenizer(folder):
    write_checkpoint(folder)
    return write_tokenizer(folder)


def test_checkpoint_round_trip(tmp_path):
    """Shape and weights come back; a stored RoPE table is ignored; without an output matrix the
    embedding is used."""
    tokens = random_tokens(2, 20)
    model = write_checkpoint(tmp_path, weights={"rope.freqs": torch.zeros(4)})
    # Editors on Windows begin a file with a byte order mark.
    params = (tmp_path / "params.json").read_bytes()
    (tmp_path / "params.json").write_bytes(b"\xef\xbb\xbf" + params)
    loaded = Llama.from_checkpoint(tmp_path, dtype=torch.float64)
    assert loaded.config == model.config and torch.equal(loaded(tokens), model(tokens))
    assert Llama.from_checkpoint(tmp_path, max_seq_len=32).config.max_seq_len == 32
    write_checkpoint(tmp_path, without=["output.weight"])
    model.output.weight.copy_(model.tok_embeddings.weight)
    loaded = Llama.from_checkpoint(tmp_path, dtype=torch.float64)
    assert loaded.config.tie_embeddings and torch.equal(loaded(tokens), model(tokens))


def test_special_tokens_have_the_published_numbers(monkeypatch):
    """Those of Llama 3.1, which has 128,000 byte pairs. Guards against names in another order."""
    monkeypatch.setattr("tiktoken.Encoding", lambda *args, **options: SimpleNamespace(n_vocab=0))
    tok = Tokenizer(dict.fromkeys(range(128_000)))
    numbers = {
        "<|begin_of_text|>": 128_000,
        "<|end_of_text|>": 128_001,
        "<|reserved_special_token_0|>": 128_002,
        "<|finetune_right_pad_id|>": 128_004,
        "<|reserved_special_token_2|>": 128_005,
        "<|start_header_id|>": 128_006,
        "<|end_header_id|>": 128_007,
        "<|eom_id|>": 128_008,
        "<|eot_id|>": 128_009,
        "<|python_tag|>": 128_010,
        "<|reserved_special_token_3|>": 128_011,
        "<|reserved_special_token_247|>": 128_255,
    }
    assert tok.special | numbers == tok.special and len(tok.special) == 256


LLAMA3_8B = {"dim": 4096, "ffn_dim_multiplier": 1.3, "multiple_of": 1024}


@pytest.mark.parametrize("changes, expected", [  # ffn_dim, rope_scaling, max_seq_len, n_kv_head
    (LLAMA3_8B, (14_336, None, 8_192, 32)),
    (LLAMA3_8B | {"n_kv_heads": 8, "use_scaled_rope": True}, (14_336, 8.0, 131_072, 8)),  # 3.1
    ({"use_scaled_rope": True}, (8192, 32.0, 131_072, 32)),  # the width of Llama 3.2 1B
    ({"use_scaled_rope": True, "rope_scaling_factor": 16}, (8192, 16, 131_072, 32)),
    ({"n_kv_heads": None, "ffn_dim_multiplier": 1, "multiple_of": 1024}, (6144, None, 8_192, 32)),
])  # fmt: skip
def test_params_of_a_published_model(changes, expected):
    """What a published params.json leaves open: the inner size of SwiGLU, which is rounded up, the
    context, the KV heads, and RoPE's base and factor."""
    config = from_meta(**changes)
    found = config.ffn_dim, config.rope_scaling, config.max_seq_len, config.n_kv_head
    assert found == expected
    assert config.rope_theta == 500_000


PTH = "consolidated.00.pth"
UNREADABLE = "not a readable PyTorch file of weights|must be a dictionary of tensors"


def remove(name):
    return lambda folder: (folder / name).unlink()


def replace_by(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def truncate(name, keep):
    """Keeps the fraction `keep` of a file."""

    def change(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return change


def lines_of_tokenizer(change):
    return lambda folder: write_tokenizer(folder, change)


def hostile(folder):
    """PyTorch's format, around a pickle that calls open(trap, "w")."""
    with zipfile.ZipFile(folder / PTH, "w") as file:
        trap = (folder / "trap").as_posix()
        file.writestr("x/data.pkl", f"cbuiltins\nopen\n(V{trap}\nVw\ntR.")
        file.writestr("x/version", "3\n")


@pytest.mark.parametrize("change, message", [
    (remove("tokenizer.model"), "tokenizer.model is missing"),
    (lines_of_tokenizer(lambda lines: [b"\x00\xff binary"]), "must be lines of"),
    (lines_of_tokenizer(lambda lines: lines[:9] + [b"YQ=="]), "must be lines of"),
    (lines_of_tokenizer(lambda lines: lines[:9] + [b"YWE= x"]), "must be lines of"),
    (lines_of_tokenizer(lambda lines: lines[:255]), "256 single bytes"),
    (lines_of_tokenizer(lambda lines: lines[:-2] + lines[-1:]), "must have ranks 0"),
    (lines_of_tokenizer(lambda lines: lines + [b"YWFh 259"]), "must have ranks 0"),
    (remove("params.json"), "neither params.json"),
    (replace_by("params.json", b"{"), "not JSON"),
    (replace_by("params.json", b"[1]"), "must be a JSON object, not list"),
    (replace_by("params.json", b"{}"), "dim must be .* not .missing"),
    (partial(write_checkpoint, params={"n_heads": 5}), "n_head = 48 / 5"),
    (partial(write_checkpoint, params={"n_layers": 3}), "layers.2.* is missing"),
    (partial(write_checkpoint, params={"vocab_size": 60}), r"\(60, 48\), not \(61, 48\)"),
    (partial(write_checkpoint, without=["layers.1.attention.wq.weight"]),
     "layers.1.attention.wq.weight is missing"),
    (partial(write_checkpoint, weights={"layers.2.norm.weight": torch.ones(48)}),
     "layers.2.norm.weight is unknown"),
    (partial(write_checkpoint, weights={"norm.weight": torch.ones(49)}),
     r"norm.weight must have shape \(48,\), not \(49,\)"),
    (partial(write_checkpoint, weights={"norm.weight": torch.ones(48).int()}),
     "norm.weight must be floating-point, not torch.int32"),
    (partial(write_checkpoint, weights={"norm.weight": [1.0] * 48}), "dictionary of tensors"),
    (partial(write_checkpoint, weights={"norm.weight": Decimal(1)}), UNREADABLE),
    (remove(PTH), "consolidated.00.pth is missing"),
    (truncate(PTH, 0.5), UNREADABLE),
    (truncate(PTH, 0.999), UNREADABLE),
    (truncate(PTH, 0), UNREADABLE),
    (replace_by(PTH, b"(lp0\nI1\na."), UNREADABLE),  # a pickled [1]
    (lambda folder: torch.save([torch.ones(3)], folder / PTH), UNREADABLE),
    (lambda folder: torch.save(torch.ones(3), folder / PTH), UNREADABLE),
    (hostile, UNREADABLE),
    (lambda folder: torch.save({}, folder / "consolidated.01.pth"), "several consolidated"),
    (lambda folder: folder.rename(folder.with_name("elsewhere")), "no such folder"),
])  # fmt: skip
def test_a_damaged_folder_is_refused(tmp_path, change, message):
    """One clear ValueError. Guards against truncated downloads, unknown tensors, and code in a
    pickle that runs."""
    folder = tmp_path / "folder"
    folder.mkdir()
    write_checkpoint_and_tokenizer(folder)

    def load():
        Tokenizer.from_checkpoint(folder)
        Llama.from_checkpoint(folder)

    load()
    change(folder)
    refused(load, message)
    assert not (folder / "trap").exists()


def test_lack_of_memory_is_not_called_a_broken_file(monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("unable to mmap 1 bytes from file <x>: Cannot allocate memory (12)")

    monkeypatch.setattr(torch, "load", fail)
    refused(lambda: read_checkpoint(TINY), "not enough memory to map it")


def test_hugging_face_needs_extras(tmp_path, monkeypatch):
    """One line where extras/ is missing, from the model and from the tokenizer."""
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "extras.hugging_face", None)  # None: the import fails
    for cls in (Llama, Tokenizer):
        refused(partial(cls.from_checkpoint, tmp_path), "needs extras/hugging_face.py, which is mi")


# --------------------------------------------------------------------------------------------------
# bench.py quality


def test_kv_share_counts_page_bounds():
    """By hand: at position 63 there are 8 pages of 8 tokens, a quarter is 2, and the bounds of all
    pages are as large as one page."""
    retro = replace(BENCH, budget=0.25)
    assert sample.kv_share(retro, 4, range(63, 64)) == 3 / 8
    assert sample.kv_share(replace(retro, dense_layers=1), 4, range(63, 64)) == (1 + 3 * 3 / 8) / 4
    assert sample.kv_share(None, 4, range(63, 64)) == sample.kv_share(retro, 4, range(63, 63)) == 1


def quality_args(**changes):
    args = bench.parse_args(["quality"])
    sizes = {"passages": 3, "prefix": 50, "length": 30, "windows": [1, 4]}
    vars(args).update({**sizes, **changes})
    return args


@pytest.mark.parametrize("decoded", [0, 20])
def test_the_table_of_quality(monkeypatch, capsys, decoded):
    """Window 1 is Quest in every number. KL and nats are those of the logits, only over tokens
    after the prompt, even if some of the prompt is decoded. The control loses what looking back
    gains."""
    monkeypatch.setattr(bench, "PARTS", 4)
    model = random_model()
    args = quality_args(decoded=decoded)
    idx = bench.passages(args, model, SimpleNamespace(bos=0))
    assert idx.shape == (3, 81)
    assert torch.equal(idx, bench.passages(args, model, SimpleNamespace(bos=0)))
    found = bench.measure_quality(args, model, idx, bench.methods(BENCH, [1, 4], control=True))
    rows = found["rows"]
    names = ["full", "Quest", "W=1", "W=1 not looking back", "W=4", "W=4 not looking back"]
    assert list(rows) == names
    assert rows["W=1"] == rows["Quest"] | {"kl": rows["W=1"]["kl"], "gap": rows["W=1"]["gap"]}
    assert rows["W=1"]["kl"]["mean"] == rows["Quest"]["kl"]["mean"]
    assert rows["Quest"]["kl"]["to Quest"] == [0, 0] and rows["full"]["kl"]["mean"] == 0
    assert rows["Quest"]["exposure"] == rows["W=4 not looking back"]["exposure"] == 1
    assert rows["W=4"]["exposure"] > 1.05 and rows["full"]["exposure"] is None
    dense = model(idx).log_softmax(-1)[:, 50:80]
    kl = {}
    for name, W in (("Quest", 1), ("W=4", 4)):
        sparse, _ = decode(model, replace(BENCH, window=W), idx[:, :80], 50 - decoded)
        sparse = sparse[:, 1 + decoded :].log_softmax(-1)
        kl[name] = (dense.exp() * (dense - sparse)).sum(-1)
        gap = (dense - sparse).gather(2, idx[:, 51:, None])[..., 0]
        close(rows[name]["kl"]["mean"], kl[name].mean(), 1e-6)
        close(rows[name]["kl"]["by_passage"], kl[name].mean(1), 1e-6)
        close(rows[name]["gap"]["mean"], gap.mean(), 1e-5)
        close(rows[name]["gap"]["by_position"][1], gap[:, 8:16].mean(), 1e-5)
    difference = (kl["W=4"] - kl["Quest"]).mean(1)
    expected = [difference.mean(), difference.std() / math.sqrt(3)]
    close(rows["W=4"]["kl"]["to Quest"], expected, 1e-6)
    assert found["positions"] == [0, 8, 16, 23, 30]
    part = kl["W=4"][:, 8:16].mean(1)
    close(rows["W=4"]["kl"]["errors"][1], part.std() / math.sqrt(3), 1e-6)
    control = rows["W=4 not looking back"]["kl"]["mean"]
    close(rows["W=4"]["kl"]["to control"][0], rows["W=4"]["kl"]["mean"] - control, 1e-6)
    out = capsys.readouterr().out
    assert f"{rows['W=4']['exposure']:.2f}" in out and f"{control:.5f}" in out


@pytest.mark.parametrize("n, starts", [(31, (0, 7, 15, 23)), (24, (0, 6, 12, 18)), (23, None)])
def test_passages_are_spread_evenly_and_do_not_overlap(monkeypatch, n, starts):
    """Four passages of six tokens, from a text of n. Guards against passages from the beginning
    alone. A tokenizer without begin_of_text begins them with a new line."""
    monkeypatch.setattr(sample, "read_text", lambda path, name: "text")
    args = quality_args(text="book", passages=4, prefix=4, length=2)
    for bos in (7, None):
        tok = SimpleNamespace(bos=bos, encode={"text": list(range(100, 100 + n)), "\n": [8]}.get)
        cut = partial(bench.passages, args, random_model(), tok)
        if starts is None:
            refused(cut, "text book has 23 tokens: 4 passages of 6 need 24")
        else:
            expected = [[bos or 8, *range(100 + i, 106 + i)] for i in starts]
            assert cut().tolist() == expected


def test_not_looking_back_is_quest_on_the_same_pages(monkeypatch):
    """The control loads the pages that W=4 loads, and uses none of them for a past row."""
    tokens = random_tokens(2, 110)
    four = replace(BENCH, window=4)
    model = random_model()
    control, _ = decode(model, four, tokens, 20, bench.not_looking_back)
    quest, _ = decode(model, BENCH, tokens, 20)
    assert (control - decode(model, four, tokens, 20)[0]).abs().max() > 0.01
    assert (control - quest).abs().max() > 0.01
    # This patches every RetroConfig, so Quest now loads the pages of W=4.
    monkeypatch.setattr(RetroConfig, "first_window_page", four.first_window_page)
    monkeypatch.setattr(RetroConfig, "pages_selected", four.pages_selected)
    close(control, decode(model, BENCH, tokens, 20)[0], 1e-9)


def test_a_full_budget_is_full_attention_in_the_table():
    """With all pages loaded every method is full attention, and reads the bounds in addition."""
    model = random_model()
    args = quality_args()
    idx = bench.passages(args, model, SimpleNamespace(bos=0))
    found = bench.methods(replace(BENCH, budget=1.0), [4], control=True)
    rows = bench.measure_quality(args, model, idx, found)["rows"]
    for name, row in rows.items():
        assert abs(row["kl"]["mean"]) < 1e-5 and abs(row["gap"]["mean"]) < 1e-5, name
        assert row["kv_share"] == (1 if name == "full" else 9 / 8)


# --------------------------------------------------------------------------------------------------
# bench.py kernels and decode


@pytest.fixture
def measure(capsys, monkeypatch):
    """Runs a speed command as on a machine without a GPU. Returns the JSON of its last line."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(args):
        assert bench.main(args.split()) == 0
        lines = capsys.readouterr().out.strip().split("\n")
        assert "No GPU" in lines[0] and "PyTorch reference" in lines[0]
        return json.loads(lines[-1])["results"]

    return run


def test_kernels_shows_the_times_beside_the_bytes(measure):
    """Bytes by hand for 320 tokens in 20 pages, of which 90 % are selected."""
    results = measure("kernels --settings 320x2 --windows 1 8 --budget 0.9")
    rows = results["rows"]
    rate = max(results["memory_rate"].values())
    assert [(row["window"], row["budget"]) for row in rows] == [(1, 0.9), (8, 0.9)]
    for row in rows:
        pages = 18
        vector = 2 * 2 * 64 * 4  # batch, KV heads, head size, float32
        nbytes = row["bytes"]
        assert nbytes["score"] == 2 * 20 * vector and nbytes["attend"] == 2 * pages * 16 * vector
        assert nbytes["four"] == 2 * (20 + pages * 16) * vector
        assert nbytes["dense"] == 2 * 320 * vector
        assert all(row[name] > 0 for name in (*bench.KERNELS, "four", "ours"))
        assert row["of the limit"] == pytest.approx(nbytes["four"] / rate * 1e6 / row["four"])
        dense = min(row[name] for name in bench.DENSE if name in row)
        assert row["dense/four"] == pytest.approx(dense / row["four"])


def test_decode_shows_whole_steps_beside_the_bytes(measure):
    """The shape is the shipped checkpoint's, whose embeddings are the output head too, so a step
    reads all weights."""
    config, weights = read_checkpoint(TINY)
    assert bench.SHAPES["tiny"] == config
    results = measure("decode --settings 400x2 --windows 2 --rounds 1 --dense_layers 3")
    rows = results["rows"]
    rate = max(results["memory_rate"].values())
    assert [row["method"] for row in rows] == ["full", "Quest", "W=2"]
    read = 4 * sum(w.numel() for w in weights.values())
    vector = 2 * 2 * 64 * 4
    # The last 30 steps, to position 399, have 371 to 400 tokens, in 24 pages 14 times, in 25 pages
    # 16 times. The window of W=2 touches two pages once.
    tokens = sum(range(371, 401))
    held = 14 * 24 + 16 * 25
    assert rows[0]["bytes"] == read + 10 * 2 * tokens * vector / 30
    for row, pages in ((rows[1], 30 * 16), (rows[2], 30 * 16 + 1)):
        kv = (3 * 2 * tokens + 7 * 2 * (held + pages * 16)) * vector
        assert row["bytes"] == (30 * read + kv) / 30
    for row in rows:
        assert row["share"] == pytest.approx(row["bytes"] / rate / row["ms"] * 1e3)
    untied = replace(config, tie_embeddings=False, max_seq_len=400)
    untied = bench.random_model(untied, "cpu", torch.float32)
    # A step reads only single rows of the embedding table itself.
    assert bench.step_bytes(untied, None, 2, 385) == read + 10 * 2 * 385 * vector


def set_clock(monkeypatch, ms):
    """Makes each call that bench.py times take the next of `ms`, as on a machine without a GPU."""
    left = iter(ms)

    def timeit(run, number):
        assert number == 1
        run()
        return next(left) / 1e3

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("timeit.timeit", timeit)


def test_a_time_is_the_median_per_layer_after_the_warm_up(monkeypatch):
    """Four layers, which together take 1 to 19 ms and once 100 ms, so the median is 10.5 ms. Guards
    against the minimum, the mean, and the time of all layers."""
    set_clock(monkeypatch, [9000, 9000, 9000, 100, *range(1, 20)])
    calls = []
    layers = [partial(calls.append, i) for i in range(4)]
    assert bench.microseconds(layers) == pytest.approx(10_500 / 4)
    assert calls == [0, 1, 2, 3] * (1 + 3 + 20)  # the first compiles


def test_a_copy_reads_and_writes(monkeypatch):
    """Bytes per second, for medians of 5.5 ms after the warm-up."""
    set_clock(monkeypatch, [9000, 9000, 9000, 100, *range(1, 10)] * 3)
    read = 4 * 2**24 / 5.5e-3
    found = bench.memory_rates("cpu")
    assert found == pytest.approx({"copy": 2 * read, "amax": read, "sum": read})


def test_warm_up_steps_are_left_out(monkeypatch):
    """Of the 35 steps to the end of the context, the last 30 are timed."""
    set_clock(monkeypatch, [9000] * 5 + list(range(1, 31)))
    positions = []
    step = Decoder.step

    def keep(decoder, token):
        positions.append(decoder.position + 1)
        return step(decoder, token)

    monkeypatch.setattr(Decoder, "step", keep)
    found = bench.step_times(random_model(n_layer=2), 2, SPARSE, 100)
    assert found == pytest.approx(range(1, 31)) and positions == list(range(65, 100))
    set_clock(monkeypatch, [9000] * 5 + list(range(1, 31)))
    positions.clear()
    found = bench.token_times(random_model(n_layer=2), 2, SPARSE, 100)
    # The last token is not read.
    assert found == pytest.approx(range(1, 31)) and positions == list(range(64, 99))


def test_steps_are_compared_by_their_medians(monkeypatch, capsys):
    """The medians over both rounds are 15, 5 and 6 ms. Guards against a minimum, the last round
    alone, and inverted ratios."""
    ms = {"full": ([1, 10, 10], [20, 20, 90]), "Quest": ([1, 4, 4], [6, 6, 90])}
    ms |= {"W=2": ([1, 5, 5], [7, 7, 90])}
    ms = [x[i] for i in range(2) for x in ms.values()]
    steps = iter(ms)
    copies = iter(ms)
    monkeypatch.setattr(bench, "step_times", lambda *args: next(steps))
    monkeypatch.setattr(bench, "token_times", lambda *args: [3 * x for x in next(copies)])
    monkeypatch.setattr(bench, "memory_rates", lambda device: {"copy": 1e9, "sum": 5e8})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(bench.SHAPES, "tiny", random_model().config)
    args = bench.parse_args("decode --settings 300x2 --windows 2 --rounds 2".split())
    rows = bench.decode(args)["rows"]
    assert [row["ms"] for row in rows] == [15, 5, 6]
    assert [row["ms/token"] for row in rows] == [45, 15, 18]
    assert [row["full/this"] for row in rows] == [1, 3, 2.5]
    assert [row["this/Quest"] for row in rows] == [3, 1, 1.2]
    for row in rows:
        assert row["share"] == pytest.approx(row["bytes"] / 1e9 / (row["ms"] / 1e3))


@pytest.mark.parametrize("args, message", [  # a row for each way that a value is checked
    ("nonsense", "invalid choice: 'nonsense'"),
    ("quality --budget much", "--budget: invalid float"),
    ("kernels --settings 1024", "must be CONTEXTxBATCH .* e.g. 32768x8, not 1024"),
    ("kernels --settings 64x1", "a context >= 256 and a batch >= 1, e.g. 32768x8, not 64x1"),
    ("decode --settings 1024x0", "a batch >= 1, .* not 1024x0"),
    ("", "the following arguments are required: {quality,kernels,decode}"),
    ("quality --windows 2 0", "windows: must be >= 1, not 0"),
    ("quality --passages 1", "passages: must be >= 2, not 1"),
    ("decode --dense_layers 11 --shape tiny", "between 0 and the model's 10 layers, not 11"),
    ("quality --checkpoint nowhere", "checkpoint nowhere: no such folder"),
    ("quality --text nowhere", "nowhere: No such file"),
    ("quality --text LICENSE", r"LICENSE has \d+ tokens: 8 passages of 1120 need 8960"),
    ("quality --prefix 4000", "prefix \\+ length must be at most 4095, .* not 4096"),
    ("quality --prefix 50 --decoded 50", "decoded must be between 0 and prefix - 1 = 49, not 50"),
])  # fmt: skip
def test_a_mistake_in_a_measurement_is_one_line(capsys, monkeypatch, args, message):
    """Before anything is measured or sampled."""
    monkeypatch.chdir(TINY.parent)
    refused_in_a_line(run_main(bench.main, args.split(), capsys), message)


# --------------------------------------------------------------------------------------------------
# sample.py


def command(capsys, options="", *more):
    """Runs sample.py for a short text: exit code, stdout, stderr. `options` override `short`."""
    short = "--max_new_tokens 16 --min_tokens 16 --page_size 8 --dense_layers 0 --device cpu"
    args = ["--prompt", "It was a dark night", *short.split(), *options.split(), *more]
    return run_main(sample.main, args, capsys)


def test_the_command_continues_the_prompt_and_reports_what_it_read(capsys):
    """Same seed, same text; another seed, another text. The report's counts are those of the
    positions decoded."""
    code, text, report = command(capsys)
    assert code == 0 and text.startswith("It was a dark night") and len(text) > 30
    assert command(capsys)[1] == text != command(capsys, "--seed 1")[1]
    n = len(Tokenizer.from_checkpoint(TINY).encode("It was a dark night", bos=True))
    assert "16 tokens, " in report and f"prompt of {n} tokens" in report
    assert f"context {n + 16} of 4096" in report
    retro = RetroConfig(page_size=8, min_tokens=16)
    read, held = np.mean([pages_to_load(retro, t)[:2] for t in range(n, n + 15)], axis=0)
    assert read < held and f"{read:.1f} of {held:.1f} pages read" in report
    share = (read + held / 8) / held
    assert f"KV bytes read {share:.0%} of full attention's" in report
    assert "full attention" in command(capsys, "--attention full")[2]
    quest = command(capsys, "--attention quest --temperature 0")
    assert "Quest, window 1" in quest[2]
    assert command(capsys, "--window 1 --temperature 0")[1] == quest[1]


@pytest.mark.parametrize("temperature, different", [(0.9, 3), (0, 1)])
def test_several_samples(capsys, temperature, different):
    """Three samples are all different or, with greedy decoding, all the same."""
    _, out, report = command(capsys, f"--num_samples 3 --temperature {temperature}")
    texts = [text.strip() for text in out.split("---------------\n")]
    assert len(texts) == 3 and len(set(texts)) == different and "48 tokens" in report


def test_prompts_from_files_and_stdin(capsys, monkeypatch, tmp_path):
    """FILE:path and - give what --prompt gives; an empty prompt starts from begin_of_text alone."""
    expected = command(capsys)[1]
    (tmp_path / "prompt").write_text("It was a dark night")
    assert command(capsys, "", "--prompt", f"FILE:{tmp_path}/prompt")[1] == expected
    # Editors on Windows begin a file with a byte order mark.
    (tmp_path / "prompt").write_bytes(b"\xef\xbb\xbfIt was a dark night")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command(capsys, "", "--prompt", "FILE:~/prompt")[1] == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"It was a dark night")))
    assert command(capsys, "--prompt -")[1] == expected
    # The defaults in Python are those of the command: the same text.
    model = Llama.from_checkpoint(TINY)
    tok = Tokenizer.from_checkpoint(TINY)
    idx = torch.tensor([tok.encode("It was a dark night", bos=True)])
    retro = RetroConfig(page_size=8, min_tokens=16, dense_layers=0)
    text = model.generate(idx, 16, retro, seed=1337)[0, 1:].tolist()
    assert tok.decode(text) + "\n" == expected
    assert Decoder(model, 1).retro == RetroConfig()
    assert not command(capsys, "--chat")[1].startswith("It was")
    code, text, report = command(capsys, "", "--prompt", "")
    assert code == 0 and text and "prompt of 1 tokens" in report
    # Qwen's tokenizer has no begin-of-text token.
    monkeypatch.setattr(Tokenizer, "encode", lambda *args, **options: [])
    refused_in_a_line(command(capsys, "", "--prompt", ""), "prompt must not be empty")


@pytest.fixture
def unloaded(monkeypatch):
    """Fails a test that reads weights."""

    def fail(*args, **options):
        pytest.fail("weights were read")

    monkeypatch.setattr(Llama, "from_weights", fail)


def test_what_does_not_fit_is_refused_before_loading(capsys, monkeypatch, unloaded):
    """The line on memory counts what is allocated."""
    config, _ = read_checkpoint(TINY)
    retro = RetroConfig(page_size=8, window=3, dense_layers=4)
    check = partial(sample.check_memory, config, retro, 2, 100, torch.device("cpu"), torch.float32)
    line = check()
    decoder = Decoder(sample.skeleton(config), 2, retro, 100)
    caches = [layer.cache for layer in decoder.layers]
    total = 4 * sample.parameters(decoder.model)
    for name, tensors in (
        ("KV", [x for cache in caches for x in (cache.k, cache.v)]),
        ("page bounds", [cache.bounds for cache in caches[4:]]),
        ("output cache", [x for cache in caches[4:] for x in (cache.out, cache.lse)]),
    ):
        assert f"{sample.size(sum(x.nbytes for x in tensors))} of {name}" in line
        total += sum(x.nbytes for x in tensors)
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": total, "SC_PAGE_SIZE": 1}.get)
    check()
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": total - 1, "SC_PAGE_SIZE": 1}.get)
    refused(check, "cpu has only .* for")
    pages = {"SC_PHYS_PAGES": 20_150, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", pages.get)
    result = command(capsys, "--max_new_tokens 4000 --num_samples 9")
    refused_in_a_line(result, "cpu has only 82.5 MB for")


def test_a_small_model_takes_one_thread_unless_the_user_sets_the_number(monkeypatch):
    """Guards against threads that wait for each other, and against a user's setting that is
    overridden."""
    found = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: os.cpu_count())
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    Llama.from_checkpoint(TINY)
    monkeypatch.delenv("OMP_NUM_THREADS")
    choose_threads(200_000_000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: os.cpu_count() + 1)
    Llama.from_checkpoint(TINY)
    assert found == []
    monkeypatch.setattr(torch, "get_num_threads", lambda: os.cpu_count())
    Llama.from_checkpoint(TINY)
    assert found == [1]


def test_lack_of_memory_is_one_line(capsys, monkeypatch):
    """Guards against a broken kernel's "illegal memory access" that is reported as lack of
    memory."""

    def fail(error):
        def step(self, token):
            raise error

        monkeypatch.setattr(Decoder, "step", step)

    fail(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"))
    code, _, report = command(capsys)
    assert code == 2 and report.endswith("sample.py: error: CUDA out of memory.\n")
    fail(RuntimeError("illegal memory access"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        command(capsys)


def test_the_end_of_the_context(capsys, monkeypatch):
    """A text that fills the context stops there and reports it; a prompt that leaves no room is
    refused."""
    config, weights = read_checkpoint(TINY)
    short = replace(config, max_seq_len=64)
    monkeypatch.setattr(sample, "read_checkpoint", lambda folder: (short, dict(weights)))
    code, _, report = command(capsys, "--max_new_tokens 1000")
    assert code == 0 and "context 64 of 64" in report
    refused_in_a_line(command(capsys, "", "--prompt", "It was " * 40), "must have 1 to 63")


@pytest.mark.parametrize("options, message", [  # a row for each way that a value is checked
    ("--window two", "--window: invalid int"),
    ("--impl cuda", "--impl: invalid choice"),
    ("--max-new-tokens 3", "unrecognized arguments: --max-new-tokens 3; see --help"),
    ("--chat --system FILE:nowhere", "system file nowhere: No such file"),
    ("--checkpoint README.md", "README.md: must be a folder; download"),
    ("--num_samples 0", "num_samples must be >= 1"),
    ("--window 5000", "window must be .* from 1 to 256, not 5000"),
    ("--top_p 0", "top_p must be"),
    ("--budget 0 --attention full", r"budget must be in \(0, 1\], not 0"),
    ("--dense_layers 99", "dense_layers must be between 0 and the model's .* not 99"),
    ("--prompt FILE:", "prompt file : Is a directory"),
    ("--prompt FILE:nowhere", "prompt file nowhere: No such file"),
    ("--prompt FILE:tiny/consolidated.00.pth", "not UTF-8 at byte"),
    ("--prompt \udcff", "prompt is not UTF-8"),
    ("--system be", "a system message needs --chat"),
    ("--checkpoint org/nowhere", "checkpoint org/nowhere: no such folder; download a model's"),
    ("--device abacus", "no device 'abacus'; this machine has .*cpu"),
    ("--device cuda:77", "no device 'cuda:77'; this machine has .*cpu"),
])  # fmt: skip
def test_a_mistake_is_one_line(capsys, monkeypatch, unloaded, options, message):
    """It names the value and what is allowed, before the weights are read."""
    monkeypatch.chdir(TINY.parent)
    refused_in_a_line(command(capsys, options), message)


@pytest.mark.parametrize("name, option, args", [
    ("viewer", "--trace", ["--trace", "x.html"]),
    ("chat", "--chat without --prompt", ["--chat"]),
])  # fmt: skip
def test_an_option_needs_extras(capsys, monkeypatch, unloaded, name, option, args):
    monkeypatch.setitem(sys.modules, f"extras.{name}", None)
    refused_in_a_line(run_main(sample.main, args, capsys), f"{option} needs extras/{name}.py")


def test_progress_has_a_count_and_an_estimate(capsys, monkeypatch):
    """Prints a line every ten seconds if stderr is no terminal, and nothing on a fast run."""
    clock = iter([0, *range(4, 100, 4)])
    monkeypatch.setattr(sample.time, "perf_counter", lambda: next(clock))
    assert list(sample.counted("x", "abcdefgh", 8)) == list("abcdefgh")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["x: 3 of 8, about 20 s left", "x: 6 of 8, about 8 s left"]
    model = Llama.from_checkpoint(TINY)
    clock = iter([0, *range(4, 400, 4)])
    sample.watch_layers(model)
    model.generate(random_tokens(1, 9), 3)
    assert capsys.readouterr().err.count("prompt, layers: ") == 3


def test_closed_streams(monkeypatch, capsys):
    """Closed streams are None, and print(file=None) writes to stdout. Guards against a report among
    the text."""
    text = command(capsys)[1]
    monkeypatch.setattr("sys.stderr", None)
    assert command(capsys) == (0, text, "")
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(f"sys.{name}", None)
    assert command(capsys)[0] == 0
    assert command(capsys, "--prompt -")[0] == 2


def run_python(*args):
    """Starts Python in a process group of its own, to which a Ctrl-C can be sent."""
    # With PYTHONUNBUFFERED, Python would have nothing left to print when it exits.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": ""}
    return subprocess.Popen(
        [sys.executable, *map(str, args)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell's background job ignores the signal, and children inherit that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
        start_new_session=True,
    )


def test_an_interrupt_keeps_the_text_and_reports():
    """After Ctrl-C the printed text stays, its line ends, and the report follows."""
    options = "--prompt It --max_new_tokens 4000 --temperature 1"
    child = run_python(TINY.parent / "sample.py", *options.split())
    text = child.stdout.read(30)
    os.killpg(child.pid, signal.SIGINT)
    rest, report = child.communicate(timeout=60)
    assert text.startswith(b"It") and (text + rest).endswith(b"\n") and b"tokens/s" in report
    assert child.returncode == 130 and b"Traceback" not in report


def test_the_report_by_hand():
    """Three texts, of which two end. At positions 60 to 63 there are 8 pages of 8 tokens, a quarter
    is 2, and the bounds of all pages are as large as one page. The pace is that of the steps after
    the first two, which compile."""
    retro = RetroConfig(page_size=8, budget=0.25, min_tokens=8, window=1, dense_layers=1)
    model = SimpleNamespace(config=SimpleNamespace(max_seq_len=100))
    decoder = SimpleNamespace(model=model, retro=retro, layers=[None] * 4)
    made = [(12, 3), (20, 3), (21, 3), (21.5, 2), (23, 1)]
    text = "\n".join(sample.report(decoder, 60, 10, made))
    assert "12 tokens, 1.5 tokens/s, prompt of 60 tokens read in 2.00 s; context 65 of 100" in text
    assert "Quest, window 1: 2.0 of 8.0 pages read" in text
    assert "in 3 sparse layers, 1 dense" in text
    # 3/8 in the sparse layers; (1 + 3 * 3/8) / 4 in all
    assert "KV bytes read 53% of full attention's (sparse layers 38%, page bounds" in text
    assert "9 tokens, too few to measure the pace" in sample.report(decoder, 60, 10, made[:3])[0]
    assert len(sample.report(decoder, 60, 10, made[:1])) == 1
    assert sample.report(decoder, 60, 10, []) == ["no tokens"]


def test_a_text_that_has_ended_makes_no_tokens(capsys):
    """The second text ends after one token, which must not count toward the pace."""
    tok = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))
    texts = [sample.TextStream(tok, [ord("x")]) for _ in range(2)]
    steps = [torch.tensor([ord(a), ord(b)]) for a, b in zip("abc", "d..", strict=True)]
    code, made = sample.show("x", iter(steps), texts, [ord(".")])
    assert code == 0 and [n for _, n in made] == [2, 1, 1]
    assert capsys.readouterr().out == "xabc\n---------------\nxd\n"


def test_the_text_of_each_token_is_printed_once():
    """As in SentencePiece, decoding drops the first space, id 0 has no text, and a character takes
    two tokens. Guards against a space lost after a token without text, half a character, and
    decoding the whole text again for each token."""
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        words = {0: "", 1: " the", 2: " end", 3: "\ufffd", 4: "\ufffd"}
        return "".join(words[i] for i in ids).replace("\ufffd\ufffd", "é").lstrip(" ")

    stream = sample.TextStream(SimpleNamespace(decode=decode), [1] * 50)
    tokens = [2, 0, 2, 3, 4, 1, 0, 0, 1, 3] * 20
    new = [" end", "", " end", "", "é", " the", "", "", " the", ""]
    first = [stream.add(token) for token in tokens[:10]]
    assert first == new and stream.flush() == "\ufffd"
    assert stream.text == " end endé the the\ufffd"
    for token in [1, 2, 0] * 50:
        stream.add(token)
    assert stream.text.endswith("\ufffd" + " the end" * 50) and longest < 16


def test_a_prompt_that_is_cut_inside_a_character():
    """As in SentencePiece, bytes in a row are decoded together, and are U+FFFD if they are not
    UTF-8. Guards against keeping ids of the prompt that begin inside a character, because what
    follows would never become a character."""

    def decode(ids):
        try:
            return bytes(ids).decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(ids)

    stream = sample.TextStream(SimpleNamespace(decode=decode), list("你好你好".encode()))
    assert [stream.add(byte) for byte in "们!".encode()] == ["", "", "们", "!"]


def test_a_closed_pipe_ends_quietly():
    """Like `python sample.py ... | head -c 5`, with exit code 1. Guards against a traceback, and an
    error that Python prints at exit."""
    options = "--prompt It --max_new_tokens 4000 --temperature 1"
    child = run_python(TINY.parent / "sample.py", *options.split())
    child.stdout.read(5)
    child.stdout.close()
    report = child.stderr.read().decode()
    assert child.wait(timeout=60) == 1
    assert report.count("\n") == 1 and "parameters in float32" in report  # the line at the start


# --------------------------------------------------------------------------------------------------
# The documentation


def blocks(language):
    """The README's code blocks in a language."""
    readme = (TINY.parent / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)


def readme_commands():
    """(file, arguments) of each command in the README that runs a file of the core."""
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    for part in itertools.chain.from_iterable(line.split("&&") for line in lines):
        words = shlex.split(part, comments=True)
        for i, word in enumerate(words):
            if word in ("sample.py", "bench.py", "tiny/train.py") and "python" in words[:i]:
                arguments = itertools.takewhile(lambda x: x not in (">", "|"), words[i + 1 :])
                yield word, list(arguments)


@pytest.mark.parametrize("script, args", list(readme_commands()), ids=str)
def test_the_commands_of_the_readme_parse(script, args, capsys):
    """Guards against an option that was renamed in the code and not in the README."""
    parsers = {"sample.py": sample, "bench.py": bench, "tiny/train.py": tiny.train}
    try:
        parsers[script].parse_args(args)
    except SystemExit as stop:
        assert stop.code == 0, capsys.readouterr().err  # --help


def test_the_python_of_the_readme_runs(monkeypatch, capsys):
    """Runs one block after the other. The output has the prompt."""
    monkeypatch.chdir(TINY.parent)
    names = {}
    for block in blocks("python"):
        exec(block, names)
    assert "It was a dark night" in capsys.readouterr().out
