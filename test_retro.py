"""What must hold: the reference against oracles that share no code with it, the kernels against the reference in float64.

`oracle` decodes a whole model from the paper's text in plain numpy: no pages in memory, no output cache, no log-sum-exp.
For every row it keeps the set of key positions that the row has seen, and the sums of exp(q.k) and of exp(q.k) v over them,
taken when each key was first seen. Two outputs over disjoint key sets are then merged by adding; no step is shared with
`retro_attention.py`. The kernels run on a GPU if there is one, else in Triton's interpreter.
"""

import base64
import copy
import html
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch read it: small tensors are slower on two threads

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels then run on the CPU

import bench
import retro_attention
import sample
import tiny.train
from model import Decoder, Llama, LlamaConfig, Tokenizer, config_from_params, rope_table, sample_token
from retro_attention import RetroAttention, RetroConfig, apply_rope, attend, implementation, merge, score, store

if importlib.util.find_spec("triton"):
    import kernels  # here, before a test changes TRITON_INTERPRET: it decides what the kernels are

TINY = Path(__file__).parent / "tiny"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The smallest budget that leaves a choice of pages. Tests replace what they are about and take the rest from here.
SPARSE = RetroConfig(page_size=8, budget=0.2, min_tokens=16, window=4, dense_layers=1)


# ----------------------------------------------------------------------------------------------------------------------
# The oracle


def rope_frequencies(config):
    """Radians per token of each pair, with Llama 3.1's scaling as its three cases: short, long and middling wavelengths."""
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
    """x (B, rows, heads, hs): each pair of neighbours is a complex number, turned by position * frequency."""
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * np.outer(positions, rope_frequencies(config)))[:, None]
    return np.stack((turned.real, turned.imag), axis=-1).reshape(x.shape)


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def swiglu(x, w, name):
    gate = x @ w[name + "w1.weight"].T
    return (gate / (1 + np.exp(-gate)) * (x @ w[name + "w3.weight"].T)) @ w[name + "w2.weight"].T


def pages_to_load(retro, t):
    """How many pages a KV head loads (the ceiling exact in decimal), how many there are, which ones the window touches."""
    held = len(range(0, t + 1, retro.page_size))
    window = {position // retro.page_size for position in range(max(0, t - retro.window + 1), t + 1)}
    floor = math.ceil(retro.min_tokens / retro.page_size)
    return min(held, max(floor, math.ceil(Decimal(str(retro.budget)) * held)) + len(window) - 1), held, window


def load(q, k, retro, t):
    """Quest's choice for the newest query q (B, n_kv_head, G, hs): the keys loaded, (B, n_kv_head, t + 1) bool."""
    count, held, window = pages_to_load(retro, t)
    loaded = np.zeros(k.shape[:2] + (t + 1,), bool)
    bounds = []
    for j in range(held):
        page = k[:, :, j * retro.page_size : min((j + 1) * retro.page_size, t + 1)]
        low, high = page.min(2)[:, :, None], page.max(2)[:, :, None]  # (B, n_kv_head, 1, hs)
        bounds.append(np.maximum(q * low, q * high).sum((2, 3)))  # over the hs elements and the group's query heads
    for b, h in np.ndindex(*k.shape[:2]):
        order = sorted(range(held), key=lambda j: (j not in window, -bounds[j][b, h], j))
        for j in order[:count]:
            loaded[b, h, j * retro.page_size : (j + 1) * retro.page_size] = True
    return loaded


def oracle_attend(q, s, rows, retro, dense):
    """One layer: rows' queries q (B, n_kv_head, G, rows, hs) see the keys that are loaded, causal and new to them."""
    t = rows[-1]
    causal = np.arange(t + 1) <= rows[:, None]  # (rows, keys)
    new = np.broadcast_to(causal, s.k.shape[:2] + causal.shape).copy()
    if dense:
        s.num[:, :, :, rows], s.den[:, :, :, rows], s.seen[:, :, rows] = 0, 0, False
    else:
        new &= load(q[:, :, :, -1], s.k, retro, t)[:, :, None] & ~s.seen[:, :, rows, : t + 1]
        starts = range(0, t + 1, retro.page_size)
        s.sights += np.logical_or.reduceat(new[:, :, :-1], starts, axis=3).sum((2, 3)) if len(rows) > 1 else 0
    e = np.exp(np.einsum("bhgrd,bhkd->bhgrk", q, s.k[:, :, : t + 1]) / math.sqrt(q.shape[-1])) * new[:, :, None]
    s.num[:, :, :, rows] += e @ s.v[:, :, None, : t + 1]
    s.den[:, :, :, rows] += e.sum(-1)
    s.seen[:, :, rows, : t + 1] |= new
    return s.num[:, :, :, rows] / s.den[:, :, :, rows, None]


def oracle(model, retro, tokens, prompt_len, rewind=()):
    """Teacher-forced decoding of (B, T) tokens: logits after positions prompt_len-1 .. T-1, and each layer's state.

    With `rewind` = (a, b, text) it is `text` up to position a. Then all later than b is forgotten, the window that ends at b is
    attended to densely once more, and `tokens` go on from b + 1. The logits are those of all passes, one after the other.
    """
    c, w, tokens = model.config, {n: p.double().numpy() for n, p in model.weights().items()}, tokens.numpy()
    (B, T), heads, hs = tokens.shape, (c.n_kv_head, c.n_head // c.n_kv_head), c.head_size
    layers = [
        SimpleNamespace(
            k=np.zeros((B, c.n_kv_head, T, hs)), v=np.zeros((B, c.n_kv_head, T, hs)), num=np.zeros((B, *heads, T, hs)),
            den=np.zeros((B, *heads, T)), seen=np.zeros((B, c.n_kv_head, T, T), bool), sights=np.zeros((B, c.n_kv_head), int),
        )
        for _ in range(c.n_layer)
    ]  # fmt: skip
    logits, passes = [], [(t, t < prompt_len, tokens) for t in range(prompt_len - 1, T)]  # position, all layers dense, text
    if rewind:
        last, back, text = rewind
        passes = [(t, t < prompt_len, text.numpy()) for t in range(prompt_len - 1, last + 1)]
        passes += [(t, t == back, tokens) for t in range(back, T)]
    for n, (t, dense, text) in enumerate(passes):
        rows = np.arange(max(0, t - retro.window + 1) if n else 0, t + 1)
        x = w["tok_embeddings.weight"][text[:, rows]]  # (B, rows, dim): past rows start from their ids again
        for i, s in enumerate(layers):
            name = f"layers.{i}."
            if n and dense:  # rewound
                s.num[:, :, :, t + 1 :], s.den[:, :, :, t + 1 :], s.seen[:, :, t + 1 :] = 0, 0, False
            y = rms_norm(x, w[name + "attention_norm.weight"], c.norm_eps)
            q, k, v = ((y @ w[f"{name}attention.w{m}.weight"].T).reshape(B, len(rows), -1, hs) for m in "qkv")
            q = rotate(q, rows, c).reshape(B, len(rows), *heads, hs).transpose(0, 2, 3, 1, 4)
            s.k[:, :, rows], s.v[:, :, rows] = rotate(k, rows, c).swapaxes(1, 2), v.swapaxes(1, 2)
            o = oracle_attend(q, s, rows, retro, dense or i < retro.dense_layers)
            x = x + o.transpose(0, 3, 1, 2, 4).reshape(B, len(rows), -1) @ w[name + "attention.wo.weight"].T
            x = x + swiglu(rms_norm(x, w[name + "ffn_norm.weight"], c.norm_eps), w, name + "feed_forward.")
        head = w["tok_embeddings.weight" if c.tie_embeddings else "output.weight"]
        logits.append(rms_norm(x[:, -1], w["norm.weight"], c.norm_eps) @ head.T)
    return np.stack(logits, 1), layers


# ----------------------------------------------------------------------------------------------------------------------
# Helpers


def refused(call, message):
    """A ValueError that names what is wrong, not an error from somewhere inside PyTorch."""
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
    """Exit code 2, nothing on stdout, and on stderr a single line that matches."""
    code, out, error = result
    assert code == 2 and not out and error.count("\n") == 1 and re.search(message, error), error


def random_model(n_head=6, n_kv_head=2, hs=32, n_layer=3, max_seq_len=256, seed=0, **kwargs):
    """A small random model in float64 whose attention is sharp enough for the choice of pages to matter."""
    torch.manual_seed(seed)
    config = dict(dim=n_head * hs, n_layer=n_layer, n_head=n_head, n_kv_head=n_kv_head, vocab_size=61, ffn_dim=96)
    model = Llama(LlamaConfig(**{**config, "max_seq_len": max_seq_len, "rope_theta": 1000.0, **kwargs})).double()
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
    return [torch.randn(B, T, n, hs, generator=generator, dtype=torch.float64) * 1.5 for n in (n_head, n_kv_head, n_kv_head)]


def start(model, retro, tokens, prompt_len):
    """A decoder after its prefill, if any, and its logits. Its caches held NaN before: nothing may depend on it."""
    decoder = Decoder(model, len(tokens), retro, max_seq_len=min(model.config.max_seq_len, tokens.shape[1] + 40))
    for layer in decoder.layers:
        for x in (layer.cache.k, layer.cache.v, layer.cache.bounds):
            if x is not None:
                x.fill_(math.nan)
    return decoder, decoder.prefill(tokens[:, :prompt_len]) if prompt_len else None


def decode(model, retro, tokens, prompt_len):
    """The same as `oracle`, by the module: logits (B, T - prompt_len + 1, vocab) and the decoder; prompt_len may be 0."""
    decoder, first = start(model, retro, tokens, prompt_len)
    steps = [decoder.step(tokens[:, i]) for i in range(prompt_len, tokens.shape[1])]
    return torch.stack([first, *steps] if prompt_len else steps, 1), decoder


def by_position(cache):
    """Copies of keys and values, (B, n_kv_head, positions, hs) each."""
    return cache.k.flatten(2, 3).clone(), cache.v.flatten(2, 3).clone()


def new_layer(retro, q, k, max_seq_len=128):
    """One sparse layer of RetroAttention for the shapes of q (B, T, n_head, hs) and k (B, T, n_kv_head, hs)."""
    return RetroAttention(
        retro, dense=False, batch_size=len(q), n_head=q.shape[2], n_kv_head=k.shape[2], head_size=q.shape[3],
        max_seq_len=max_seq_len, device="cpu", dtype=q.dtype,
    )  # fmt: skip


def run_layer(retro, q, k, v, prompt_len):
    """One layer with q, k, v held fixed for each position, unrotated: yields (t, outputs (B, W, n_head, hs), layer)."""
    layer = new_layer(retro, q, k)
    cos, sin = torch.ones(128, q.shape[3] // 2).double(), torch.zeros(128, q.shape[3] // 2).double()
    layer.prefill(q[:, :prompt_len], k[:, :prompt_len], v[:, :prompt_len])
    for t in range(prompt_len, q.shape[1]):
        rows = (torch.arange(retro.window) + t - retro.window + 1).clamp(min=0)
        yield t, layer.decode(q[:, rows], k[:, rows], v[:, rows], cos, sin, torch.tensor(t)), layer


def softmax_over(q, k, v, keys):
    """Attention of one query q (hs) over the positions `keys` of k, v (T, hs): output and log of the sum of exp."""
    e = np.exp(k.numpy()[keys] @ q.numpy() / math.sqrt(len(q)))
    return e @ v.numpy()[keys] / e.sum(), math.log(e.sum())


def check_output(o, q, k, v, t, kept, tol=1e-11):
    """o (B, n_head, hs) is attention of position t's q over the positions kept(b, KV head) of k and v."""
    for b, head in np.ndindex(2, 6):
        close(o[b, head], softmax_over(q[b, t, head], k[b, :, head // 3], v[b, :, head // 3], kept(b, head // 3))[0], tol)


def quest_bounds(q, k, t):
    """Quest's bound for each page up to position t, from its paper: q (G, hs) of one KV head, k (T, hs), pages of 8."""
    pages = [k[first : min(first + 8, t + 1)] for first in range(0, t + 1, 8)]
    return [sum(torch.maximum(x * page.amin(0), x * page.amax(0)).sum().item() for x in q) for page in pages]


def close(a, b, tol):
    """Element by element, absolutely; NaN is close to nothing but NaN."""
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=tol)


# ----------------------------------------------------------------------------------------------------------------------
# Steps 1-3: bounds, score, selection


def test_bounds_hold_and_are_tight_after_every_overwriting_step():
    """Guards against running minima that cannot shrink again, and unwritten keys inside the bounds."""
    model, tokens = random_model(), random_tokens(2, 60)
    decoder, _ = start(model, SPARSE, tokens, 21)
    for t in range(21, 60):
        decoder.step(tokens[:, t])
        for layer in decoder.layers[1:]:
            cache, q = layer.cache, torch.randn(2, 1, 6, 32, dtype=torch.float64)
            keys, total = by_position(cache)[0][:, :, : t + 1].numpy(), np.zeros((2, 2, t // 8 + 1))
            for g, j in np.ndindex(3, t // 8 + 1):  # the query heads of a KV head: 0 .. 2 share the first
                one, page = q[:, 0, g::3].numpy(), keys[:, :, j * 8 : j * 8 + 8]  # (B, n_kv_head, hs)
                close(cache.bounds[:, :, j, 0], page.min(2), 0)
                close(cache.bounds[:, :, j, 1], page.max(2), 0)
                bound = np.maximum(one * page.min(2), one * page.max(2)).sum(-1)
                assert (np.einsum("bhd,bhkd->bhk", one, page) <= bound[..., None] + 1e-12).all()
                total[:, :, j] += bound
            close(score(q, cache, torch.tensor(t)), total, 1e-12)


@pytest.mark.parametrize("page_size, budget, min_tokens, W, t, pages", [
    (16, 0.07, 1, 2, 1599, 7),  # 0.07 * 100 pages; in binary floating point 8
    (16, 0.3, 1, 2, 159, 3), (16, 0.01, 256, 2, 8001, 16), (16, 0.01, 256, 2, 8000, 17),  # the window's older page on top
    (8, 0.01, 1, 8, 64, 2), (8, 0.01, 1, 1, 64, 1),
])  # fmt: skip
def test_pages_selected_is_exact_in_decimal(page_size, budget, min_tokens, W, t, pages):
    """The budget; then the floor, the window's older pages on top, all pages: by hand, and against the oracle's rule."""
    assert RetroConfig(page_size, budget, min_tokens, W).pages_selected(t) == pages
    for hundredths in range(1, 101, 3):
        retro = RetroConfig(page_size=4, budget=hundredths / 100, min_tokens=9, window=W)
        assert all(retro.pages_selected(t) == pages_to_load(retro, t)[0] for t in range(0, 400, 3))


# ----------------------------------------------------------------------------------------------------------------------
# Steps 4-5: supplementary attention, merge, output cache


@pytest.mark.parametrize("W, prompt_len", [(1, 9), (2, 20), (4, 1), (4, 24), (8, 3), (8, 30)])
def test_union(W, prompt_len):
    """A row that leaves the window holds softmax attention over the union of the pages loaded meanwhile.

    Guards against a missing causal mask, keys seen twice or never, a row that is not popped, and lse = 0 for an empty set.
    """
    (q, k, v), loads, gained = random_qkv(), {}, 0
    for t, o, layer in run_layer(replace(SPARSE, window=W), q, k, v, prompt_len):
        loads[t] = layer.cache.last_loaded == t  # (B, n_kv_head, P)
        row = t - W + 1  # leaves the window after this step
        if row < 0:
            continue
        met = torch.full_like(loads[t], row < prompt_len)  # a row of the prompt has met all
        for step in range(max(row, prompt_len), t + 1):
            met |= loads[step]
        gained += (met & ~loads[row]).sum() if row >= prompt_len else 0
        for b, head in np.ndindex(2, 6):
            keys = [j for j in range(row + 1) if met[b, head // 3, j // 8]]
            out, lse = softmax_over(q[b, row, head], k[b, :, head // 3], v[b, :, head // 3], keys)
            close(o[b, 0, head], out, 1e-12)
            close(layer.cache.lse[b, row % W, head], lse, 1e-12)
    assert W == 1 or gained > 30, "no row has learnt anything: the test is empty"


def test_merge_of_any_partition_is_the_whole():
    """Attention over the parts of a random partition, some of them empty, is attention over the whole."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        q, k, v = (x[0, :, 0] for x in random_qkv(B=1, T=40, n_head=1, n_kv_head=1, seed=int(rng.integers(1000))))
        part_of = rng.integers(0, 6, 40) * (rng.random() < 0.9)
        o, lse = torch.zeros(6, 32, dtype=torch.float64), torch.full((6,), -torch.inf, dtype=torch.float64)
        for part in set(part_of):
            out, total = softmax_over(q[0], k, v, np.flatnonzero(part_of == part))
            o[part], lse[part] = torch.from_numpy(out), total
        whole, total = softmax_over(q[0], k, v, np.arange(40))
        merged = merge(o, lse)
        close(merged[0], whole, 1e-13)
        close(merged[1], total, 1e-13)


def test_merge_with_empty_sets():
    """Nothing merged in is the identity, bit for bit; nothing with nothing is o = 0, lse = -inf, and no NaN."""
    some = torch.randn(1, 5, 32).double(), torch.tensor([[-900.0, -1, 0, 1, 900]]).double()
    none = torch.zeros_like(some[0]), torch.full_like(some[1], -torch.inf)
    for a, b, wanted in ((some, none, some), (none, some, some), (none, none, none)):
        found = merge(*map(torch.cat, zip(a, b, strict=True)))
        assert torch.equal(found[0], wanted[0][0]) and torch.equal(found[1], wanted[1][0])


def test_attend_to_nothing():
    """A past row for which no page is new, or that stands before the text, gets o = 0 and lse = -inf."""
    q, k, v = random_qkv(T=20)
    cache = new_layer(SPARSE, q, k).cache
    store(k, v, cache, 19)
    pages, t = torch.arange(3).expand(2, 2, 3), torch.tensor(19)
    o, lse = attend(q[:, -4:], cache, pages, torch.full_like(pages, 18), t)
    assert (o[0, :, :-1] == 0).all() and (lse[0, :, :-1] == -torch.inf).all()
    assert (o[0, :, -1] != 0).all() and lse[0, :, -1].isfinite().all()
    o, lse = attend(q[:, -4:], cache, pages[..., :1], torch.full_like(pages[..., :1], -1), torch.tensor(1))
    assert (o[0, :, :2] == 0).all() and (lse[0, :, :2] == -torch.inf).all()
    assert lse[0, :, 2:].isfinite().all()


def test_window_one_is_quest():
    """Against Quest written again from its paper, one head and one page at a time."""
    q, k, v = random_qkv(T=90)
    for t, o, _ in run_layer(replace(SPARSE, window=1, budget=0.35), q, k, v, prompt_len=20):
        last, chosen = t // 8, {}
        for b, h in np.ndindex(2, 2):
            bounds = quest_bounds(q[b, t, h * 3 : h * 3 + 3], k[b, :, h], t)
            ranked = sorted(range(last), key=lambda j: (-bounds[j], j))  # noqa: B023
            budget = -(-35 * (last + 1) // 100)  # 35 % of the pages, rounded up
            chosen[b, h] = [last, *ranked[: budget - 1]]  # the last page is loaded without being asked
        check_output(o[:, 0], q, k, v, t, lambda b, h: [j for j in range(t + 1) if j // 8 in chosen[b, h]], 1e-12)  # noqa: B023


@pytest.mark.parametrize("position", [30, 32, 35, 39, 40])
def test_a_past_row_never_sees_a_later_token(position):
    """Another k and v at `position` changes no earlier row, at no step, in no bit.

    The page of `position` is loaded in both runs as long as an earlier row is in the window, so both load the same pages.
    """
    (q, k, v), retro = random_qkv(T=60), replace(SPARSE, window=8)
    k2, v2 = k.clone(), v.clone()
    k2[:, position] *= -3
    v2[:, position] += 5
    for (t, a, _), (_, b, _) in zip(run_layer(retro, q, k, v, 20), run_layer(retro, q, k2, v2, 20), strict=True):
        if t - 7 >= position:
            break
        before = max(0, min(8, position - (t - 7)))  # rows of the window in front of `position`
        assert torch.equal(a[:, :before], b[:, :before])
        assert t < position or ((a - b)[:, before].abs().amax(-1) > 1e-6).all()  # but the row itself, in every head


# ----------------------------------------------------------------------------------------------------------------------
# The model: limits, overwriting, memory


@pytest.mark.parametrize(
    "budget, min_tokens", [(1.0, 1), (0.01, 1000), (None, None)], ids=["budget", "floor", "full attention"]
)
@pytest.mark.parametrize("W, prompt_len", [(1, 0), (2, 13), (4, 0), (4, 1), (8, 30), (100, 13)])
def test_all_pages_is_dense(W, prompt_len, budget, min_tokens):
    """With all pages loaded, for whatever reason, nothing is left to correct: cached decoding is the
    uncached forward pass.

    Guards against a position off by one between prefill, cache and RoPE, and one that claims a token nobody has written.
    """
    model, tokens = random_model(rope_scaling=8.0, tie_embeddings=True, qkv_bias=True), random_tokens(3, 50)
    retro = replace(SPARSE, window=W, dense_layers=0, budget=budget, min_tokens=min_tokens) if budget else None
    close(decode(model, retro, tokens, prompt_len)[0], model(tokens)[:, max(0, prompt_len - 1) :], 1e-10)


def test_a_second_prompt_starts_afresh():
    """Guards against outputs, last_loaded and counts of one text that leak into the next one of the same decoder; infinite ones
    too: 0 * inf is NaN, a weight of zero keeps it."""
    model, tokens = random_model(), random_tokens(2, 90)
    decoder, _ = start(model, SPARSE, tokens.flip(1), 70)
    decoder.step(tokens[:, 0])
    for layer in decoder.layers[1:]:
        layer.cache.out.fill_(torch.inf)
    again = [decoder.prefill(tokens[:, :30])] + [decoder.step(tokens[:, i]) for i in range(30, 89)]
    fresh, other = decode(model, SPARSE, tokens[:, :89], 30)
    assert torch.equal(torch.stack(again, 1), fresh)
    assert torch.equal(decoder.layers[-1].cache.totals, other.layers[-1].cache.totals)
    decoder.layers[1].cache.out[:, 89 % SPARSE.window] = torch.inf  # of the row that leaves at the next step
    assert decoder.step(tokens[:, 89]).isfinite().all() and decoder.layers[1].cache.out.isfinite().all()


def test_overwriting_changes_only_what_it_should():
    """The first sparse layer's K, V depend on no sparse attention: overwriting writes what was there.

    Deeper layers' change. Outside the window the cache is untouched, bit for bit.
    """
    model, tokens, W = random_model(n_layer=4), random_tokens(2, 60), SPARSE.window
    decoder, _ = start(model, SPARSE, tokens, 21)
    changed = np.zeros((4, 2))
    for t in range(21, 60):
        before = [by_position(layer.cache) for layer in decoder.layers]
        decoder.step(tokens[:, t])
        for i, kv in np.ndindex(4, 2):
            old, new = before[i][kv], by_position(decoder.layers[i].cache)[kv]
            outside = torch.ones(new.shape[2], dtype=torch.bool)
            outside[t - W + 1 : t + 1] = False
            assert torch.equal(new[:, :, outside].nan_to_num(77), old[:, :, outside].nan_to_num(77))
            changed[i, kv] = max(changed[i, kv], (new - old)[:, :, t - W + 1 : t].abs().max())
    assert (changed[:2] < 1e-12).all() and (changed[2:] > 1e-3).all(), changed


def test_output_cache_is_independent_of_the_length():
    """W rows of n_head * (hs + 1) float32 numbers per sequence, for a model in half precision too."""
    q, k, _ = (x.bfloat16() for x in random_qkv(B=3))
    for max_seq_len in (64, 8192):
        cache = new_layer(RetroConfig(window=4), q, k, max_seq_len).cache
        assert sum(x.numel() * x.element_size() for x in (cache.out, cache.lse)) == 3 * 4 * 6 * (32 + 1) * 4
    assert cache.k.shape == (3, 2, 8192 // 16, 16, 32) and cache.k.dtype == torch.bfloat16


# ----------------------------------------------------------------------------------------------------------------------
# Whole decoding against the oracle


def check_against_oracle(model, retro, tokens, prompt_len, tol):
    """Logits, all K and V, the outputs and sums of the window's rows, and the count of first sights agree."""
    expected, states = oracle(model, retro, tokens, prompt_len)
    logits, decoder = decode(model, retro, tokens, prompt_len)
    close(logits, expected, tol)
    B, T = tokens.shape
    window = np.arange(max(0, T - retro.window), T)
    for i, (layer, s) in enumerate(zip(decoder.layers, states, strict=True)):
        cache = layer.cache
        for found, wanted in zip(by_position(cache), (s.k, s.v), strict=True):
            close(found[:, :, :T], wanted, tol)
        if i < retro.dense_layers:
            continue
        num, den = (x.reshape(B, -1, *x.shape[3:])[:, :, window] for x in (s.num, s.den))  # (B, n_head, rows ...)
        close(cache.out[:, window % retro.window].transpose(1, 2), num / den[..., None], tol)
        close(cache.lse[:, window % retro.window].transpose(1, 2), np.log(den), tol)
        assert np.array_equal(cache.totals[..., 1], s.sights)
        assert retro.window == 1 or s.sights.min() > 0, "no supplementary output in the whole run: the case is empty"
        assert (cache.totals[..., 0] == sum(pages_to_load(retro, t)[0] for t in range(prompt_len, T))).all()


@pytest.mark.parametrize("n_head, n_kv_head, hs, page_size, W, B, prompt_len, T, dense_layers, budget", [
    (2, 2, 32, 8, 2, 1, 30, 81, 0, 0.15), (3, 1, 64, 8, 4, 3, 41, 90, 1, 0.2), (6, 2, 64, 16, 8, 1, 57, 120, 0, 0.15),
    (4, 1, 128, 32, 2, 1, 100, 150, 1, 0.3), (8, 2, 32, 16, 1, 3, 50, 100, 0, 0.15), (8, 1, 32, 8, 8, 3, 3, 60, 0, 0.1),
    (16, 2, 32, 16, 4, 1, 64, 110, 2, 0.2), (3, 3, 128, 8, 1, 1, 20, 60, 1, 0.2), (4, 4, 32, 32, 8, 1, 1, 120, 0, 0.3),
    (6, 2, 32, 8, 2, 1, 1, 70, 0, 0.15), (6, 2, 32, 1, 4, 2, 5, 50, 0, 0.3), (6, 2, 32, 4, 16, 2, 15, 60, 0, 0.3),
])  # fmt: skip
def test_random_models_against_the_oracle(n_head, n_kv_head, hs, page_size, W, B, prompt_len, T, dense_layers, budget):
    """GQA ratios, batches, ragged pages, windows, page and head sizes; prompts shorter than the window too."""
    retro = RetroConfig(page_size=page_size, budget=budget, min_tokens=10, window=W, dense_layers=dense_layers)
    check_against_oracle(random_model(n_head, n_kv_head, hs), retro, random_tokens(B, T), prompt_len, 1e-10)


@pytest.mark.parametrize("W", [1, 2, 8])
def test_the_shipped_checkpoint_against_the_oracle(W):
    """Guards against a checkpoint, a tokenizer and a RoPE layout that do not belong together, and against trained weights'
    large values, on which shortcuts that hold for random ones fail."""
    model, tokenizer = Llama.from_checkpoint(TINY, dtype=torch.float64), Tokenizer.from_checkpoint(TINY)
    tokens = torch.tensor([tokenizer.encode(retro_attention.__doc__, bos=True)[:233]])  # any text will do
    assert tokens.shape == (1, 233)
    check_against_oracle(model, RetroConfig(budget=0.15, min_tokens=64, window=W, dense_layers=1), tokens, 201, 1e-9)


@pytest.mark.parametrize("W, back", [(1, 1), (1, 20), (2, 1), (4, 2), (4, 20), (8, 1)])
def test_rewinding(W, back):
    """What came after a position is forgotten. Guards against lse = -inf and keys counted twice where a position is repeated.

    With W=1, or all pages, the text goes on as if nothing had come; with a longer window as the oracle says, whose window's
    rows are attended to densely once more.
    """
    model, tokens, other, T = random_model(), random_tokens(2, 75), random_tokens(2, 75, seed=1), 50
    for retro in (None, replace(SPARSE, window=W, budget=1.0), replace(SPARSE, window=W)):
        decoder, _ = start(model, retro, tokens, 21)
        t = T - 1 - back
        for i in range(21, T):  # another text from t + 1 on
            decoder.step((tokens if i <= t else other)[:, i])
        decoder.rewind(t)
        found = torch.stack([decoder.step(tokens[:, i]) for i in range(t + 1, 75)], 1)
        if retro is None or retro.budget == 1 or W == 1:
            wanted = decode(model, retro, tokens, 21)[0][:, t + 2 - 21 :]
        else:
            text = torch.cat((tokens[:, : t + 1], other[:, t + 1 : T]), dim=1)
            wanted = oracle(model, retro, tokens, 21, rewind=(T - 1, t, text))[0][:, T - 21 + 2 :]
        close(found, wanted, 1e-10)
    for bad in (-1, 75):
        refused(lambda bad=bad: decoder.rewind(bad), f"t must be between 0 and 74, the newest position, not {bad}")


# ----------------------------------------------------------------------------------------------------------------------
# The Triton kernels against their PyTorch twins: on a GPU as compiled, elsewhere in Triton's interpreter


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed (there is none for this system?): kernels.py is not tested here",
)
KERNEL_DTYPES = {torch.float32: 2e-6, torch.float16: 1e-3}  # largest relative RMS error
if DEVICE == "cuda":
    KERNEL_DTYPES[torch.bfloat16] = 1e-2  # the interpreter's bfloat16 dot is wrong


def assert_close(found, wanted, dtype, what):
    assert found.shape == wanted.shape and not found.isnan().any(), what
    assert (found.isinf() == wanted.isinf()).all(), what
    found, wanted = (x[wanted.isfinite()].double() for x in (found, wanted))
    error = (found - wanted).norm() / wanted.norm().clamp(min=1e-30)
    assert error <= KERNEL_DTYPES[dtype], f"{what}: relative error {error:.1e}"


def cache_at(config, B, n_kv_head, G, hs, t, dtype, seed):
    """A cache as a decode step to position t finds it, filled with noise; NaN stands wherever nothing was written yet.

    Returns it, t as a tensor, and the generator of the noise.
    """
    gen = torch.Generator().manual_seed(seed)
    cache = retro_attention.new_cache(config, False, B, n_kv_head * G, n_kv_head, hs, t + 20, "cpu", dtype)
    for x in (cache.k, cache.v, cache.bounds):
        x.fill_(torch.nan)
    if t > 0:
        store(*(torch.randn(B, t, n_kv_head, hs, generator=gen).to(dtype) for _ in "kv"), cache, t - 1)
        held = (t - 1) // config.page_size + 1
        # Most pages were loaded within the last few steps, so that each row finds some that it has seen and some it has not.
        recent = t - torch.randint(1, 2 * config.window + 2, (B, n_kv_head, held), generator=gen)
        cache.last_loaded[:, :, :held] = recent.clamp(min=-1)
    cache.out.normal_(generator=gen)
    cache.lse.normal_(generator=gen)
    cache.lse[:, 0] = -torch.inf  # one row has seen nothing so far
    for name in ("k", "v", "bounds", "last_loaded", "out", "lse", "totals"):
        setattr(cache, name, getattr(cache, name).to(DEVICE))
    return cache, torch.tensor(t, device=DEVICE), gen


def in_float64(cache):
    """A copy for the reference to work on: the oracle of a kernel is its twin in float64, on the kernel's own inputs."""
    cache = copy.deepcopy(cache)
    for name in ("k", "v", "bounds", "out", "lse"):
        setattr(cache, name, getattr(cache, name).double())
    return cache


PLACES = [  # B, n_kv_head, t, min_tokens: where a sequence may stand
    (1, 1, 397, 200),  # several tiles per split; the last page is ragged
    (3, 1, 127, 32),  # it is full
    (1, 1, 64, 8),  # it has just begun, and the window lies in two pages
    (1, 2, 40, 256),  # below the floor: all pages are selected
    (3, 1, 3, 8),  # fewer tokens than rows, for the larger windows
    (1, 1, 0, 8),  # the very first token
]
SHAPES = list(itertools.product((1, 3, 4, 8), (1, 2, 4, 8), (8, 16, 32), (32, 64, 128)))  # G, W, page size, hs
if DEVICE != "cuda":  # the interpreter is slow: a third of them, in which every pair of values still meets
    SHAPES = [shape for i, shape in enumerate(SHAPES) if (i // 36 + i // 9 + i // 3 + i) % 3 == 0]
ODD_SHAPES = [
    (1, 1, 1, 16), (2, 3, 2, 32), (3, 5, 4, 64), (4, 2, 8, 128), (5, 8, 16, 32), (6, 4, 64, 64),
    (7, 1, 32, 128), (8, 8, 16, 128), (1, 8, 8, 64), (4, 4, 16, 128), (2, 2, 1, 64), (3, 7, 8, 16),
]  # fmt: skip


def kernel_cases():
    """Shapes, places and dtypes: every pair of values meets, not every combination. Then budgets, floors and positions that
    nobody thought of, in a dozen odd shapes (each is compiled anew on a GPU)."""
    dtypes = list(KERNEL_DTYPES)
    for i, shape in enumerate(SHAPES):
        yield *shape, *PLACES[(i + i // 6) % 6], dtypes[i // 5 % len(dtypes)], 0.3
    for seed in range(300 if DEVICE == "cuda" else 12):
        draw = random.Random(seed).choice
        t, min_tokens = draw(range(2000 if DEVICE == "cuda" else 300)), draw((1, 10, 64, 500))
        B, n_kv_head, budget = draw((1, 2, 3)), draw((1, 2)), draw((0.01, 0.07, 0.15, 0.5, 1.0))
        yield *ODD_SHAPES[seed % 12], B, n_kv_head, t, min_tokens, dtypes[seed // 12 % len(dtypes)], budget


@needs_triton
@pytest.mark.parametrize("G, W, ps, hs, B, n_kv_head, t, min_tokens, dtype, budget", list(kernel_cases()), ids=str)
def test_kernels_equal_their_twins(G, W, ps, hs, B, n_kv_head, t, min_tokens, dtype, budget):
    """One decode step: each kernel, given what its twin is given, writes and returns the same; what was
    never written is NaN and stays out."""
    config = RetroConfig(page_size=ps, budget=budget, min_tokens=min_tokens, window=W)
    cache, position, gen = cache_at(config, B, n_kv_head, G, hs, t, dtype, seed=t)
    held, S = t // ps + 1, config.pages_selected(t)
    heads = [n_kv_head * G, n_kv_head, n_kv_head]  # slices of one product, as in the model
    q, k, v = torch.randn(B, W, sum(heads), hs, generator=gen).to(DEVICE, dtype).split(heads, dim=2)
    angles = torch.randn(t + 1, hs // 2, generator=gen).to(DEVICE)

    twin = in_float64(cache)
    wanted = retro_attention.write(*(x.double() for x in (q, k, v, angles.cos(), angles.sin())), twin, position)
    q = kernels.write(q, k, v, angles.cos(), angles.sin(), cache, position)
    real = slice(max(0, W - 1 - t), None)  # rows before the start are nobody's
    assert_close(q[:, real], wanted[:, real], dtype, "write: q")
    for name, n in (("k", t + 1), ("v", t + 1), ("bounds", 2 * held)):
        found, wanted = (getattr(c, name).flatten(2, -2) for c in (cache, twin))
        assert_close(found[:, :, :n], wanted[:, :, :n], dtype, f"write: {name}")
        assert found[:, :, n:].isnan().all(), f"write: {name} after position t"

    twin = in_float64(cache)
    scores = kernels.score(q, cache, position)
    error = (scores[:, :, :held] - retro_attention.score(q.double(), twin, position)).abs()
    # The terms of a score cancel: a rounding error is small against the sum of their sizes, not against the score.
    q_sizes = q[:, -1:].abs().view(B, n_kv_head, G, hs).sum(2, True)
    sizes = twin.bounds.abs().amax(dim=3)[:, :, :held] * q_sizes
    assert (error <= 2e-6 * sizes.sum(-1)).all(), "score"

    scores[:, :, held:] = torch.nan
    given = scores[:, :, :held].clone()
    wanted_pages, wanted_last_loaded = retro_attention.select(given, twin, position)
    assert torch.equal(given, scores[:, :, :held]), "select changed its argument"
    pages, last_loaded = kernels.select(scores, cache, position)
    assert torch.equal(pages[:, :, :S], wanted_pages) and torch.equal(last_loaded[:, :, :S], wanted_last_loaded), "select"
    assert torch.equal(cache.last_loaded, twin.last_loaded) and torch.equal(cache.totals, twin.totals), "select: tables"

    chosen = (pages, last_loaded), (wanted_pages, wanted_last_loaded)
    for what, ours, theirs in (("attend, dense", (None, None), (None, None)), ("attend", *chosen)):
        parts = kernels.attend(q, cache, *ours, position)
        o, lse = retro_attention.merge(*parts)
        wanted_o, wanted_lse = retro_attention.attend(q.double(), twin, *theirs, position)
        assert_close(o, wanted_o[0], dtype, f"{what}: o")
        assert_close(lse, wanted_lse[0], dtype, f"{what}: lse")

    wanted = retro_attention.combine(*(x.double() for x in parts), twin, position)
    assert_close(kernels.combine(*parts, cache, position), wanted, dtype, "combine")
    assert_close(cache.out, twin.out, torch.float32, "combine: out")
    assert_close(cache.lse, twin.lse, torch.float32, "combine: lse")


@needs_triton
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # NumPy's, of a gate of -200 in the interpreter
@pytest.mark.parametrize("rows, n, dtype", list(itertools.product([1, 5], [96, 1100], KERNEL_DTYPES)))
def test_kernels_beside_attention_equal_their_twins(rows, n, dtype):
    """Sizes that are no power of two and more than a block, and gates whose exp overflows."""
    gen = torch.Generator().manual_seed(n)
    x = torch.randn(2, rows, 2 * n, generator=gen).to(DEVICE, dtype) * 3
    x[0, 0, :8], weight = -200, torch.randn(2 * n, generator=gen).to(DEVICE, dtype)
    wanted = retro_attention.rms_norm(x.double(), weight.double(), 1e-5)
    assert_close(kernels.rms_norm(x, weight, 1e-5), wanted, dtype, "rms_norm")
    assert_close(kernels.swiglu(x), retro_attention.swiglu(x.double()), dtype, "swiglu")
    x = torch.full((1, 1, n), 1e-4, device=DEVICE, dtype=dtype)  # as small as eps
    wanted = retro_attention.rms_norm(x.double(), weight[:n].double(), 1e-8)
    assert_close(kernels.rms_norm(x, weight[:n], 1e-8), wanted, dtype, "rms_norm: eps")


def with_nan(scores, bits):
    scores[0, 0, 5:7] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    return scores


SCORES = {  # of random ones: what could upset a search by their bits
    "equal": lambda x: torch.full_like(x, -2.5),
    "few values": torch.round,
    "zeros of both signs": lambda x: x.sign() * 0.0,
    "negative": lambda x: -x.abs(),
    "huge": lambda x: x * torch.tensor([1e4, 1e37] * 20)[None, :, None],
    "NaN": lambda x: with_nan(x, 0x7FFFFFFF),
    "negative NaN": lambda x: with_nan(x, -1),
}


@needs_triton
@pytest.mark.parametrize("kind", SCORES)
def test_select_kernel_ties_and_extremes(kind):
    """Equal scores go to the lower pages, also when they are 0.0 and -0.0; scores of any size keep their order.

    A NaN's bits, of either sign, must not run over the ends of the search and of the list: it is taken as infinity is.
    """
    config, t, held = replace(SPARSE, budget=0.4), 101, 13
    cache, position, gen = cache_at(config, 1, 40, 1, 32, t, torch.float32, seed=1)  # 40 searches, which end in different ways
    twin, scores = copy.deepcopy(cache), SCORES[kind](torch.randn(1, 40, held, generator=gen)).to(DEVICE)
    room = torch.nn.functional.pad(scores, (0, cache.k.shape[2] - held), value=torch.nan)
    wanted = retro_attention.select(scores.nan_to_num(torch.inf, posinf=torch.inf, neginf=-torch.inf), twin, position)
    for ours, theirs in zip(kernels.select(room, cache, position), wanted, strict=True):
        assert torch.equal(ours[:, :, : config.pages_selected(t)], theirs)
    pages = wanted[0].tolist()
    assert kind != "equal" or pages == [[[0, 1, 2, 3, 4, 12]] * 40]  # 6 of 13: the window's own, and the lowest of the others
    assert "NaN" not in kind or {5, 6} <= set(pages[0][0])


@needs_triton
@pytest.mark.parametrize("t", [32_000, 40_000])
def test_select_kernel_of_many_pages(t):
    """Beyond 32,768 pages two counts no longer fit 32 bits."""
    cache, position, gen = cache_at(RetroConfig(page_size=1, budget=0.9), 1, 1, 1, 16, t, torch.float32, seed=t)
    twin, scores = copy.deepcopy(cache), torch.randn(1, 1, cache.k.shape[2], generator=gen).to(DEVICE)
    wanted, _ = retro_attention.select(scores[..., : t + 1].clone(), twin, position)
    assert torch.equal(kernels.select(scores, cache, position)[0][..., : wanted.shape[2]], wanted)


@needs_triton
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_attend_kernel_empty_supplements_and_extreme_scores(dtype):
    """Past rows for which nothing is new get o = 0 and lse = -inf; scores of 1e4 neither overflow nor lose the newest row."""
    t = 75
    cache, _, gen = cache_at(replace(SPARSE, budget=1.0), 1, 1, 2, 32, t + 1, dtype, seed=2)
    position, pages = torch.tensor(t, device=DEVICE), torch.arange(t // 8 + 1, dtype=torch.int32, device=DEVICE).view(1, 1, -1)
    q = torch.randn(1, 4, 2, 32, generator=gen).to(DEVICE, dtype) * 1e3  # scores of up to about 1e4
    for last_loaded in (torch.full_like(pages, t - 1), torch.full_like(pages, -1)):
        o, lse = retro_attention.merge(*kernels.attend(q, cache, pages, last_loaded, position))
        wanted_o, wanted_lse = retro_attention.attend(q, cache, pages, last_loaded, position)
        assert_close(o, wanted_o[0], dtype, "o")
        assert_close(lse, wanted_lse[0], dtype, "lse")
        assert (lse[:, :-1] == -torch.inf).all() == (last_loaded == t - 1).all() and lse[:, -1].isfinite().all()


@pytest.mark.skipif(DEVICE != "cuda", reason="there is no GPU: CUDA graphs are not tested here")
@pytest.mark.parametrize("retro", [None, replace(SPARSE, window=1), replace(SPARSE, window=8)], ids=["full", "quest", "retro"])
def test_a_replayed_step_is_an_eager_step(retro):
    """Guards against a graph with a position, a shape or a token in it that was right at capture only, in a second text too."""
    model, tokens = Llama.from_checkpoint(TINY, device="cuda", dtype=torch.bfloat16), random_tokens(2, 300).cuda()
    eager, graphed = (Decoder(model, 2, retro) for _ in range(2))
    eager.captures = False
    for text in (tokens, tokens.flip(1)):
        for decoder in (eager, graphed):
            decoder.prefill(text[:, :100])
        for i in range(100, 300):
            # Eager steps in the middle of replays: in the first text a hook looks at one.
            graphed.layers[-1].hook = (lambda step: None) if i == 290 and text is tokens else None
            assert torch.equal(eager.step(text[:, i]), graphed.step(text[:, i])), f"position {i}"
    assert graphed.graph is not None and eager.graph is None


@needs_triton
@pytest.mark.parametrize("dtype, head_size, rows, message", [
    (torch.float64, 32, 2, "dtype must be .* not torch.float64"), (torch.float32, 24, 2, "head_size must be .* not 24"),
    (torch.float32, 32, 129, "at most 128, not 129"), (torch.float32, 32, 2, None),
])  # fmt: skip
def test_triton_is_refused_where_it_cannot_run(monkeypatch, dtype, head_size, rows, message):
    """A ValueError that says what to do, before anything runs; auto takes the reference instead."""
    choose = lambda impl, device: implementation(impl, torch.device(device), dtype, head_size, rows)  # noqa: E731
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refused(lambda: choose("triton", "cpu"), "TRITON_INTERPRET=1")
    assert choose("auto", "cpu") is retro_attention
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if message is None:
        assert choose("triton", "cpu").__name__ == choose("auto", "cuda").__name__ == "kernels"
    else:
        refused(lambda: choose("triton", "cpu"), message)
        assert choose("auto", "cuda") is retro_attention


# ----------------------------------------------------------------------------------------------------------------------
# Parts of the model, sampling


@pytest.mark.parametrize("scaling, theta", [(None, 10_000.0), (8.0, 500_000.0), (32.0, 500_000.0)])
def test_rope(scaling, theta):
    """Neighbouring pairs turn like complex numbers; Llama 3.1's scaling in its published form of three cases."""
    config, rows = LlamaConfig(384, 1, 3, 3, 8, 8, 5000, rope_theta=theta, rope_scaling=scaling), [0, 1, 17, 4098, 4999]
    x = torch.randn(2, 5, 3, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cos, sin = rope_table(config, config.max_seq_len, "cpu", torch.float64)
    close(apply_rope(x, cos[rows], sin[rows]), rotate(x.numpy(), rows, config), 1e-10)
    # In bfloat16, 8 bits could not tell position 4098 from 4099.
    cos, sin = rope_table(config, config.max_seq_len, "cpu", torch.bfloat16)
    assert cos.dtype == torch.float32 and apply_rope(x.bfloat16(), cos[rows], sin[rows]).dtype == torch.bfloat16


def test_a_model_trains():
    """Every parameter gets a gradient, also after the model has generated in inference mode."""
    model, tokens = random_model(), random_tokens(2, 30)
    with torch.inference_mode():
        model.generate(tokens, 2, retro=SPARSE)
    logits = model.requires_grad_()(tokens[:, :-1])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("prompt_len", [1, 33, 59])
@pytest.mark.parametrize("retro", [None, SPARSE], ids=["full", "sparse"])
def test_generate_and_score(retro, prompt_len):
    """Greedy tokens and log-probabilities, dense against the uncached forward pass, sparse against the oracle.

    Guards against the log-probability of a neighbour's token.
    """
    model, prompt = random_model(), random_tokens(2, prompt_len)
    text = model.generate(prompt, 60 - prompt_len, retro=retro, temperature=0)
    logits = torch.from_numpy(oracle(model, retro, text, prompt_len)[0]) if retro else model(text)[:, prompt_len - 1 :]
    assert torch.equal(text[:, :prompt_len], prompt) and torch.equal(text[:, prompt_len:], logits[:, :-1].argmax(-1))
    for only_one in (dict(top_k=1), dict(top_p=1e-6)):
        assert torch.equal(model.generate(prompt, 60 - prompt_len, retro, temperature=3.0, seed=1, **only_one), text)
    other = random_tokens(2, 60, seed=1)
    logits = torch.from_numpy(oracle(model, retro, other, prompt_len)[0]) if retro else model(other)[:, prompt_len - 1 :]
    found = model.score(other, prompt_len, retro=retro)
    assert found.dtype == torch.float32
    close(found, logits[:, :-1].log_softmax(-1).gather(2, other[:, prompt_len:, None])[..., 0], 1e-5)


@pytest.mark.parametrize("temperature, top_k, top_p, weights", [  # of tokens with probabilities .4, .3, .2, .1
    (1, None, None, [4, 3, 2, 1]), (0.5, None, None, [16, 9, 4, 1]), (1, 3, None, [4, 3, 2, 0]), (1, 9, None, [4, 3, 2, 1]),
    (1, None, 0.65, [4, 3, 0, 0]), (1, None, 0.75, [4, 3, 2, 0]), (1, None, 1.0, [4, 3, 2, 1]), (1, 3, 0.35, [1, 0, 0, 0]),
    (1, None, 1e-46, [1, 0, 0, 0]),
])  # fmt: skip
def test_sampling_frequencies(temperature, top_k, top_p, weights):
    """temperature, top_k and top_p against their definitions, by counting; the ids do not stand in order of probability."""
    order, n = [2, 0, 3, 1], 40_000
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1])[order].log().expand(n, 4)
    drawn = sample_token(logits, temperature, top_k, top_p, torch.Generator().manual_seed(0))
    for token, i in enumerate(order):
        p = weights[i] / sum(weights)
        assert abs((drawn == token).sum().item() / n - p) <= 4 * math.sqrt(p * (1 - p) / n)  # four standard errors


def test_stop_tokens_and_the_end_of_the_context():
    """A stopped row repeats its stop token until all rows have stopped; the text never outgrows the context."""
    model, prompt = random_model(max_seq_len=64), random_tokens(3, 20)
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
    with pytest.raises(IndexError, match="position 20 is past the end of the cache of 20 tokens"):  # a GPU would just write
        decoder.step(prompt[:, 0])


def test_logits_that_are_not_finite_are_said():
    """Also at a token that the model makes itself: with temperature 0 the text would go on with token 0 for ever."""
    model, prompt = random_model(), random_tokens(2, 20)
    bad = model.generate(prompt, 1, SPARSE, temperature=0)[0, 20].item()
    model.tok_embeddings.weight[bad] = math.inf
    prompt[prompt == bad] = (bad + 1) % 61
    assert model.generate(prompt[:1], 1, SPARSE, top_k=1).isfinite().all()
    text = torch.cat((prompt, torch.full((2, 1), bad), prompt), dim=1)
    for call in (
        lambda: model.generate(text, 5, SPARSE, temperature=0), lambda: model.score(text, 10, SPARSE),
        lambda: model.score(text, 30, SPARSE), lambda: model.score(text, 10, None),
    ):  # fmt: skip
        refused(call, "logits are not finite: its weights are broken, or too large for torch.float64")


# ----------------------------------------------------------------------------------------------------------------------
# What is refused, by name: configurations and arguments


small = partial(LlamaConfig, dim=30, n_layer=1, n_head=3, n_kv_head=3, vocab_size=8, ffn_dim=8, max_seq_len=8)


def from_meta(**changes):
    """Llama 3.2 1B's params.json, in part, with changes."""
    params = dict(dim=2048, n_layers=32, n_heads=32, vocab_size=128_256, ffn_dim_multiplier=1.5, multiple_of=256)
    return config_from_params({**params, **changes})


@pytest.mark.parametrize("make, bad, message", [
    *((RetroConfig, {name: value}, f"{name} must be .+, not {value!r}$") for name, value in (
        ("page_size", 0), ("page_size", 12), ("page_size", 8.0), ("page_size", True), ("page_size", 2048),
        ("budget", 0), ("budget", 1.01), ("budget", math.nan),
        ("min_tokens", 0), ("window", 0), ("window", 1.5), ("dense_layers", -1), ("impl", "cuda"),
    )),
    *((small, {name: value}, message) for name, value, message in (
        ("n_head", 4, "n_head 4"), ("n_kv_head", 4, "n_kv_head 4"), ("dim", 21, "dim 21 must be"),
        ("n_layer", 0, "n_layer must be .* not 0"), ("max_seq_len", 1.5, "max_seq_len must be an integer .*, not 1.5"),
        ("head_size", 15, "head_size"), ("head_size", "16", "head_size"), ("norm_eps", math.inf, "number > 0 .* not inf"),
    )),
    (from_meta, dict(dim="7"), "dim must be .* not '7'"),
    (from_meta, dict(ffn_dim_multiplier=math.inf), "ffn_dim_multiplier must be a number > 0, not inf"),
    (from_meta, dict(use_scaled_rope=True, rope_scaling_factor=0), "rope_scaling must be a number > 0 and < 1e30, not 0"),
])  # fmt: skip
def test_a_configuration_out_of_range_is_named(make, bad, message):
    """The message holds the name, what is allowed, and the value. Guards against heads that silently lose a part of the
    embedding."""
    make()
    refused(lambda: make(**bad), message)


@pytest.mark.parametrize("call, message", [
    (dict(temperature=-1), "temperature must be 0 or a finite number >= 1e-6, not -1"),
    (dict(temperature=math.nan), "temperature .+ nan"), (dict(seed=-1), "seed must be between 0 and .+, not -1"),
    (dict(top_k=0), "top_k must be >= 1, not 0"), (dict(top_p=0), r"top_p must be in \(0, 1\], not 0"),
    (dict(top_p=1.5), "top_p must be in .+, not 1.5"), (dict(max_new_tokens=0), "max_new_tokens must be >= 1, not 0"),
    (dict(idx=random_tokens(1, 0)), "0 tokens: .* 1 and 63"), (dict(idx=random_tokens(1, 64)), "prompt has 64 tokens"),
    (dict(idx=random_tokens(1, 65)), "prompt has 65 tokens"), (dict(retro=RetroConfig(impl="triton")), "triton"),
    (dict(retro=RetroConfig(dense_layers=4)), "dense_layers must be between 0 and .+ 3 layers, not 4"),
    (lambda model: model.score(random_tokens(1, 60), 0), "prompt_len must be between 1 and 59, not 0"),
    (lambda model: model.score(random_tokens(1, 60), 60), "prompt_len must be between 1 and 59, not 60"),
    (dict(idx=[[1, 2]]), r"integer tensor of shape \(B, T\), not list"), (dict(idx=torch.ones(3)), r"not torch.float32 \(3,\)"),
    (lambda model: model(random_tokens(1, 20)[0]), r"of shape \(B, T\), not torch.int64 \(20,\)"),
    (lambda model: Llama.from_checkpoint(TINY, dtype="bfloat16"), "dtype must be a torch.dtype .*, not 'bfloat16'"),
    (lambda model: model(random_tokens(1, 0)), "0 tokens.* between 1 and the context of 64"),
    (lambda model: model(random_tokens(1, 65)), "65 tokens.* between 1 and the context of 64"),
    (lambda model: Decoder(model, 1).prefill(random_tokens(1, 0)), "0 tokens.* between 1 and the context of 64"),
    (lambda model: Decoder(model, 1).prefill(random_tokens(1, 65)), "65 tokens.* between 1 and the context of 64"),
    (lambda model: Decoder(model, 2).prefill(random_tokens(1, 9)), "the prompt has 1 texts: must be 2"),
    (lambda model: Decoder(model, 1, max_seq_len=65), "max_seq_len must be between 1 and the context of 64, not 65"),
])  # fmt: skip
def test_a_call_names_what_is_wrong(call, message, monkeypatch):
    """A row changes an argument of `generate`, or is another call. Guards against a slice of the RoPE table that silently ends
    early, and garbage sampled from weights that overflow."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model, usual = random_model(max_seq_len=64), {"idx": random_tokens(1, 20), "max_new_tokens": 5}
    refused(lambda: model.generate(**{**usual, **call}) if isinstance(call, dict) else call(model), message)


# ----------------------------------------------------------------------------------------------------------------------
# Files in Meta's format


def write_tokenizer(folder, change=lambda lines: lines):
    """256 bytes and four merges, in Llama 3's format."""
    tokens = [bytes([i]) for i in range(256)] + [b"th", b" th", b"the", b" the"]
    lines = [base64.b64encode(token) + b" %d" % i for i, token in enumerate(tokens)]
    (folder / "tokenizer.model").write_bytes(b"\n".join(change(lines)))
    return folder


def test_tokenizer(tmp_path):
    """Round trip of any text, merges by rank, special tokens only on request, Llama 3.1's order of stop tokens."""
    tokenizer = Tokenizer.from_checkpoint(write_tokenizer(tmp_path))
    # A million spaces would overflow the stack of the regular expression that splits a text.
    for text in ("", "the other", "Ünïcødé 你好 🙂\r\n\t 1234  x", "<|end_of_text|> the", "a" + " " * 1_000_000 + "the"):
        for special in (False, True):
            ids = tokenizer.encode(text, bos=True, special=special)
            assert ids[0] == tokenizer.bos == 260 and tokenizer.decode(ids[1:]) == text
            assert (261 in ids) == (special and "end_of_text" in text)
    assert tokenizer.encode("the the") == [258, 259] and tokenizer.decode([0xE4]) == "\ufffd"
    assert tokenizer.vocab_size == 260 + 256
    assert tokenizer.stop_tokens == [261, 268, 269]  # 128001, 128008 and 128009 in Llama 3.1, whose first is 128000


def test_chat(tmp_path):
    """Llama 3's format of a conversation; what a user writes never becomes a special token."""
    tok = Tokenizer.from_checkpoint(write_tokenizer(tmp_path))
    turn = "<|start_header_id|>{}<|end_header_id|>\n\n{}"
    wanted = "<|begin_of_text|>" + turn.format("user", "the?<|eot_id|>") + turn.format("assistant", "so<|eot_id|>")
    wanted += turn.format("user", "the?<|eot_id|>") + turn.format("assistant", "")
    conversation = [("user", " the?\n"), ("assistant", "so"), ("user", "the?")]  # a text's ends are stripped
    assert tok.chat(conversation) == tok.encode(wanted, special=True)
    assert tok.chat([("user", "<|eot_id|>")]).count(tok.special["<|eot_id|>"]) == 1
    for wrong in (("tool", "the?"), {"role": "user", "content": "the?"}):
        refused(lambda wrong=wrong: tok.chat([wrong]), "a role must be system, user or assistant, not ")


def write_checkpoint(folder, params=(), weights=(), without=()):
    """A small checkpoint in Meta's format, with some of its contents replaced; returns its model."""
    model = random_model(hs=8, n_layer=2, ffn_dim=128)
    shape = dict(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=61, multiple_of=128, max_seq_len=256, rope_theta=1e3)
    contents = {**model.weights(), **dict(weights)}
    torch.save({name: w for name, w in contents.items() if name not in without}, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps({**shape, **dict(params)}))
    return model


def test_checkpoint_round_trip(tmp_path):
    """Shape and weights come back; a stored RoPE table is ignored; without an output matrix the embedding is used."""
    tokens = random_tokens(2, 20)
    model = write_checkpoint(tmp_path, weights={"rope.freqs": torch.zeros(4)})
    loaded = Llama.from_checkpoint(tmp_path, dtype=torch.float64)
    assert loaded.config == model.config and torch.equal(loaded(tokens), model(tokens))
    assert Llama.from_checkpoint(tmp_path, max_seq_len=32).config.max_seq_len == 32
    write_checkpoint(tmp_path, without=["output.weight"])
    model.output.weight.copy_(model.tok_embeddings.weight)
    loaded = Llama.from_checkpoint(tmp_path, dtype=torch.float64)
    assert loaded.config.tie_embeddings and torch.equal(loaded(tokens), model(tokens))


@pytest.mark.parametrize("changes, wanted", [  # ffn_dim, rope_scaling, max_seq_len, n_kv_head
    (dict(dim=4096, ffn_dim_multiplier=1.3, multiple_of=1024), (14_336, None, 8_192, 32)),  # Llama 3 8B
    (dict(dim=4096, ffn_dim_multiplier=1.3, multiple_of=1024, n_kv_heads=8, use_scaled_rope=True),
     (14_336, 8.0, 131_072, 8)),  # Llama 3.1 8B
    (dict(use_scaled_rope=True), (8192, 32.0, 131_072, 32)),  # Llama 3.2 1B's width
    (dict(use_scaled_rope=True, rope_scaling_factor=16), (8192, 16, 131_072, 32)),
])  # fmt: skip
def test_params_of_a_published_model(changes, wanted):
    """What a published params.json leaves unsaid: the size inside SwiGLU, the context, and RoPE's factor."""
    config = from_meta(**changes)
    assert (config.ffn_dim, config.rope_scaling, config.max_seq_len, config.n_kv_head) == wanted


def damage(name, content=None):
    """A function that replaces a file of a folder: by bytes, by what a function makes of its bytes, or by nothing."""

    def change(folder):
        path = folder / name
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content(path.read_bytes()) if callable(content) else content)

    return change


def hostile(folder):
    """PyTorch's format, around a pickle that calls open(trap, "w")."""
    with zipfile.ZipFile(folder / "consolidated.00.pth", "w") as file:
        file.writestr("x/data.pkl", f"cbuiltins\nopen\n(V{(folder / 'trap').as_posix()}\nVw\ntR.")
        file.writestr("x/version", "3\n")


PTH, UNREADABLE = "consolidated.00.pth", "not a readable PyTorch file of weights|dictionary of tensors"


@pytest.mark.parametrize("change, message", [
    (damage("tokenizer.model"), "tokenizer.model is missing"),
    (lambda folder: write_tokenizer(folder, lambda lines: [b"\x00\xff binary"]), "must be lines of"),
    (lambda folder: write_tokenizer(folder, lambda lines: lines[:9] + [b"YQ=="]), "must be lines of"),
    (lambda folder: write_tokenizer(folder, lambda lines: lines[:9] + [b"YWE= x"]), "must be lines of"),
    (lambda folder: write_tokenizer(folder, lambda lines: lines[:255]), "256 single bytes"),
    (lambda folder: write_tokenizer(folder, lambda lines: lines[:-2] + lines[-1:]), "ranks must be 0"),
    (lambda folder: write_tokenizer(folder, lambda lines: lines + [b"YWFh 259"]), "ranks must be 0"),
    (damage("params.json"), "neither params.json"), (damage("params.json", b"{"), "not JSON"),
    (damage("params.json", b"[1]"), "a JSON object was expected, not list"),
    (damage("params.json", b"{}"), "dim must be .* not .missing"),
    (partial(write_checkpoint, params={"n_heads": 5}), "n_head 5"),
    (partial(write_checkpoint, params={"n_layers": 3}), "layers.2.* no such tensor"),
    (partial(write_checkpoint, params={"vocab_size": 60}), r"\(60, 48\), .*\(61, 48\)"),
    (partial(write_checkpoint, without=["layers.1.attention.wq.weight"]), "layers.1.attention.wq.weight .*no such tensor"),
    (partial(write_checkpoint, weights={"layers.2.norm.weight": torch.ones(48)}), "layers.2.norm.weight .*unknown name"),
    (partial(write_checkpoint, weights={"norm.weight": torch.ones(49)}), r"norm.weight .*\(48,\), the file has \(49,\)"),
    (partial(write_checkpoint, weights={"norm.weight": [1.0] * 48}), "dictionary of tensors"),
    (partial(write_checkpoint, weights={"norm.weight": Decimal(1)}), UNREADABLE),
    (damage(PTH), "consolidated.00.pth is missing"), (damage(PTH, lambda whole: whole[: len(whole) // 2]), UNREADABLE),
    (damage(PTH, lambda whole: whole[:-100]), UNREADABLE), (damage(PTH, b""), UNREADABLE), (damage(PTH, b"hello"), UNREADABLE),
    (damage(PTH, b"(lp0\nI1\na."), UNREADABLE),  # a pickled [1]
    (lambda folder: torch.save([torch.ones(3)], folder / PTH), UNREADABLE),
    (lambda folder: torch.save(torch.ones(3), folder / PTH), UNREADABLE), (hostile, UNREADABLE),
    (lambda folder: torch.save({}, folder / "consolidated.01.pth"), "split over GPUs are not supported"),
    (lambda folder: folder.rename(folder.with_name("elsewhere")), "no such folder"),
])  # fmt: skip
def test_a_damaged_folder_is_refused(tmp_path, change, message):
    """One clear ValueError. Guards against truncated downloads, strict=False, and code of a pickle that is run."""
    folder = tmp_path / "folder"
    folder.mkdir()
    write_checkpoint(folder), write_tokenizer(folder)
    load = lambda: (Tokenizer.from_checkpoint(folder), Llama.from_checkpoint(folder))  # noqa: E731
    load()
    change(folder)
    refused(load, message)
    assert not (folder / "trap").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face folders: the oracle is transformers, which also writes the files


needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="transformers is not installed (pip install -e '.[hf]'): Hugging Face folders are not tested here",
)
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192, "rope_theta": 500_000.0}  # fmt: skip
CHAT = "{% for m in messages %}<|turn|>{{ m.role }}:{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|turn|>assistant:{% endif %}"  # noqa: E501


def write_hugging_face(folder, kind="Llama", shard="1GB", **config):
    """A small random model, in float64, as transformers saves it."""
    import transformers

    shape = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, intermediate_size=64,
                 vocab_size=300, max_position_embeddings=128, bos_token_id=None, eos_token_id=None)  # fmt: skip
    make_config, make_model = (getattr(transformers, kind + part) for part in ("Config", "ForCausalLM"))
    torch.manual_seed(0)
    model = make_model(make_config(**{**shape, **config})).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.ndim == 2 else torch.nn.init.uniform_(p, 0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=shard)


def write_hugging_face_tokenizer(folder, **special):
    """256 bytes, two merges and three special tokens, with a post-processor that begins a text and a chat template."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {c: i for i, c in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"])}
    tok = tokenizers.Tokenizer(models.BPE(vocab, [("t", "h"), ("th", "e")]))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.add_special_tokens(["<|start|>", "<|turn|>", "<|end|>"])  # 258, 259, 260
    tok.post_processor = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 258)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, chat_template=CHAT, **{"eos_token": "<|end|>", **special})
    fast.save_pretrained(folder)
    return fast


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def put_head(scale, folder):
    """Beside a tied table: the table once more, or a head of its own."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * scale
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def spell_as_published(folder):
    """rope_theta beside rope_scaling, for the rope_parameters that transformers 5 writes."""
    config = json.loads((folder / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    (folder / "config.json").write_text(json.dumps({**config, "rope_scaling": scaling}))


@needs_transformers
@pytest.mark.parametrize("kind, shard, config, change", [
    ("Llama", "1GB", {}, None), ("Llama", "30KB", {"rope_parameters": LLAMA3_ROPE}, None), ("Qwen2", "30KB", {}, None),
    ("Llama", "1GB", {"rope_parameters": LLAMA3_ROPE}, spell_as_published), ("Qwen3", "30KB", {"head_dim": 16}, None),
    ("Llama", "1GB", {"head_dim": 16, "num_key_value_heads": 6, "rms_norm_eps": 1e-4}, None),
    *(("Llama", "1GB", {"tie_word_embeddings": True}, head) for head in (None, partial(put_head, 1), partial(put_head, -2))),
])  # fmt: skip
def test_a_hugging_face_folder_is_the_same_model(tmp_path, kind, shard, config, change):
    """Guards against a RoPE layout converted twice or not at all, a lost bias, rows of joint products in a wrong order, and a
    head that is read where the table counts, or the other way round."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    write_hugging_face(tmp_path, kind, shard, **config)
    if change is not None:
        change(tmp_path)
    theirs, tokens = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64), random_tokens(2, 90)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or shard == "30KB"
    save_file({"model.norm.weight": torch.ones(48)}, tmp_path / "other.safetensors")  # nobody names it
    ours = Llama.from_checkpoint(tmp_path, dtype=torch.float64)
    with torch.no_grad():
        wanted = theirs(tokens).logits
    # transformers computes norms and angles in float32, also in a float64 model.
    assert (ours(tokens) - wanted).norm() < 1e-5 * wanted.norm()
    close(decode(ours, None, tokens, 40)[0], ours(tokens)[:, 39:], 1e-10)


@needs_transformers
@pytest.mark.parametrize("change, message", [
    ({"use_sliding_window": True}, "use_sliding_window True is not supported"), ({"mlp_bias": True}, "mlp_bias True"),
    ({"attention_bias": True}, "attention_bias True"), ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"), ({"head_dim": 15}, "head_dim|head_size"),
    ({"dual_chunk_attention_config": {}}, "dual_chunk_attention_config {}"), ({"model_type": "mixtral"}, "not 'mixtral'"),
    ({"model_type": "unheard"}, "AutoConfig cannot be read"), ({"hidden_size": "wide"}, "AutoConfig cannot be read"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn.* are not supported"),
    ({"rope_parameters": {**LLAMA3_ROPE, "low_freq_factor": 2.0}}, "are not supported"),
    ({"rope_parameters": {**LLAMA3_ROPE, "factor": 0}}, "rope_scaling must be a number > 0 and < 1e30, not 0"),
    ({"rms_norm_eps": math.inf}, "norm_eps"), ({"vocab_size": 301}, r"\(301, 48\), the file has \(300, 48\)"),
    ({"num_hidden_layers": 3}, "layers.2.* no such tensor"), ({"num_hidden_layers": 1}, "layers.1.* unknown name"),
])  # fmt: skip
def test_what_a_config_asks_for_and_we_do_not_do_is_refused(tmp_path, change, message):
    """By name: a model that loads must be computed as its makers meant it."""
    write_hugging_face(tmp_path)
    edit(tmp_path / "config.json", **change)
    refused(lambda: Llama.from_checkpoint(tmp_path), message)


@needs_transformers
def test_broken_safetensors_are_refused(tmp_path):
    """Truncated and foreign files, missing shards and tensors: one ValueError each, naming the file or the tensor."""
    write_hugging_face(tmp_path, shard="30KB")
    load, index = lambda: Llama.from_checkpoint(tmp_path), tmp_path / "model.safetensors.index.json"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    whole = (tmp_path / names[0]).read_bytes()
    for content in (whole[:-1], whole[:100], b"", (2**62).to_bytes(8, "little"), whole[:8] + b"[" + whole[9:]):
        (tmp_path / names[0]).write_bytes(content)
        refused(load, f"{names[0]}: not readable as safetensors")
    (tmp_path / names[0]).write_bytes(whole.replace(b'"F64"', b'"I64"', 1))
    refused(load, "must hold floating-point numbers, not torch.int64")
    (tmp_path / names[0]).unlink()
    refused(load, f"{names[0]} is missing")
    (tmp_path / names[0]).write_bytes((tmp_path / names[1]).read_bytes())
    refused(load, f"is in {names[1]} and in another file")
    edit(index, weight_map={"model.norm.weight": names[1], "no.such": names[1]})
    refused(load, "no such tensor")
    edit(index, weight_map=[])
    refused(load, "has no weight_map")
    index.unlink()
    refused(load, "model.safetensors is missing")


@needs_transformers
def test_a_hugging_face_tokenizer_is_the_folder_s(tmp_path):
    """Ids, chat and the tokens that end a text are those of transformers; names of special tokens in a text are text."""
    write_hugging_face(tmp_path, eos_token_id=7)
    theirs = write_hugging_face_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9]}))
    ours = Tokenizer.from_checkpoint(tmp_path)
    for text in ("the other", "Ünïcødé 你好 🙂\r\n\t 1234  x \0", ""):
        assert ours.encode(text, bos=True) == theirs.encode(text) and ours.decode(ours.encode(text)) == text
    assert ours.encode("<|end|>the", special=True) == [260, 257] != ours.encode("<|end|>the")
    assert (ours.bos, ours.stop_tokens) == (258, [7, 8, 9, 260])
    said = [("system", "be"), ("user", "the?"), ("assistant", "so"), ("user", "oh")]
    wanted = (
        "<|turn|>system:be<|end|><|turn|>user:the?<|end|><|turn|>assistant:so<|end|><|turn|>user:oh<|end|><|turn|>assistant:"
    )
    assert ours.chat(said) == ours.encode(wanted, special=True) and ours.decode(ours.chat(said)) == wanted
    assert ours.decode([257, 9999, 257]) == "thethe"  # an id that only the model has is no text
    theirs.chat_template = None
    theirs.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})  # ChatML's, and no template
    theirs.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    chatml = Tokenizer.from_checkpoint(tmp_path)
    assert chatml.decode(chatml.chat(said[:2])).startswith(
        "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nthe?<|im_end|>\n"
    )
    assert chatml.encode("<|im_end|>", special=True)[0] in chatml.stop_tokens
    theirs.chat_template = "{{ raise_exception('no chat here') }}"
    theirs.save_pretrained(tmp_path)
    refused(lambda: Tokenizer.from_checkpoint(tmp_path).chat(said), "chat template: no chat here")
    (tmp_path / "tokenizer.json").write_text("{")
    refused(lambda: Tokenizer.from_checkpoint(tmp_path), "AutoTokenizer cannot be read")


@needs_transformers
def test_the_command_reads_a_hugging_face_folder(capsys, tmp_path):
    """The text is that of the ids, whole characters also where one is spread over several tokens."""
    write_hugging_face(tmp_path)
    write_hugging_face_tokenizer(tmp_path)
    args = f"--checkpoint {tmp_path} --prompt the --max_new_tokens 60 --temperature 3"
    code, text, _ = command(capsys, args)
    model, tok = Llama.from_checkpoint(tmp_path), Tokenizer.from_checkpoint(tmp_path)
    retro = RetroConfig(page_size=8, min_tokens=16, dense_layers=0)
    ids = model.generate(torch.tensor([tok.encode("the", bos=True)]), 60, retro, 3.0, top_p=0.95, seed=1337,
                         stop_tokens=tok.stop_tokens)[0, 1:].tolist()  # fmt: skip
    assert code == 0 and text == tok.decode([i for i in ids if i not in tok.stop_tokens]) + "\n" and len(text) > 20
    assert "\ufffd" in text  # random bytes are no UTF-8: each is shown, and none is held back
    assert command(capsys, args + " --chat")[0] == 0


def test_without_transformers_a_hugging_face_folder_says_what_to_install(tmp_path, monkeypatch):
    """One line, from the model and from the tokenizer; Meta's format needs none of it."""
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    for load in (Llama, Tokenizer):
        refused(lambda load=load: load.from_checkpoint(tmp_path), r"pip install -e '\.\[hf\]'")
    assert Tokenizer.from_checkpoint(TINY).encode("the")


# ----------------------------------------------------------------------------------------------------------------------
# The benchmark: neighbours of the method


BENCH = replace(SPARSE, window=1, dense_layers=0)


def neighbour(name, prompt_len=45, T=110, retro=BENCH):
    """Yields (t, output (B, n_head, hs)) of one layer of a neighbour, and what goes in: q, k, v before rotation."""
    q, k, v = random_qkv(T=T)
    config = random_model().config
    layer = bench.LAYERS[name](new_layer(retro, q, k).cache)
    cos, sin = rope_table(config, config.max_seq_len, "cpu", torch.float64)
    layer.cache.k.fill_(math.nan), layer.cache.v.fill_(math.nan)
    layer.prefill(*(apply_rope(x[:, :prompt_len], cos[:prompt_len], sin[:prompt_len]) for x in (q, k)), v[:, :prompt_len])
    inputs = lambda t: (x[:, t : t + 1] for x in (q, k, v))  # noqa: E731
    steps = ((t, layer.decode(*inputs(t), cos, sin, torch.tensor(t))[:, 0]) for t in range(prompt_len, T))
    turn = lambda x: torch.from_numpy(rotate(x.numpy(), np.arange(T), config))  # noqa: E731
    return steps, q, k, v, turn(q), turn(k)


def weights_over(q, k, keys):
    """Softmax weights of each query head of q (n_head, hs) over the positions `keys` of k (T, n_kv_head, hs)."""
    logits = np.stack([k.numpy()[keys, h // 3] @ q[h].numpy() / math.sqrt(q.shape[1]) for h in range(len(q))])
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)  # (n_head, keys)


def test_streaming_llm_keeps_sinks_and_recent_tokens_and_renumbers_them():
    """The list of what is held, the oldest but four dropped when it is too long; keys rotated by their place in the list.

    Guards against sinks at their old distance, and against tokens that come back when the budget grows.
    """
    steps, q, k, v, *_ = neighbour("StreamingLLM")
    held, config, grown = list(range(45)), random_model().config, 0
    for t, o in steps:
        held.append(t)
        while len(held) > pages_to_load(BENCH, t)[0] * 8:
            del held[4]
        grown += len(held) < pages_to_load(BENCH, t)[0] * 8
        places = np.arange(len(held))
        keys = torch.from_numpy(rotate(k[:, held].numpy(), places, config))
        query = torch.from_numpy(rotate(q[:, [t]].numpy(), places[-1:], config))
        check_output(o, query, keys, v[:, held], 0, lambda b, h: places)  # noqa: B023
    assert grown > 3, "the budget has never grown: the test is weaker than it should be"


def test_tova_evicts_the_least_attended_token_of_the_layer():
    """One list per text; after a step the tokens that its query attended to least, over all heads, make room for the next."""
    steps, _, _, v, q, k = neighbour("TOVA")
    kept = [list(range(45)), list(range(45))]

    def evict(t):
        for b in range(2):
            mean = weights_over(q[b, t], k[b], kept[b]).mean(0)
            while len(kept[b]) > pages_to_load(BENCH, t + 1)[0] * 8 - 1:
                lowest = int(mean.argmin())
                mean = np.delete(mean, lowest)
                del kept[b][lowest]

    evict(44)
    for t, o in steps:
        for b in range(2):
            kept[b].append(t)
            assert len(kept[b]) <= pages_to_load(BENCH, t)[0] * 8
        check_output(o, q, k, v, t, lambda b, h: kept[b])
        evict(t)
    assert kept[0] != kept[1] and kept[0] != list(range(110 - len(kept[0]), 110))


def test_refreshkv_alternates_all_tokens_and_the_best_of_the_last_time(monkeypatch):
    """Every 10th step reads all; in between the tokens since then, and the best of that time in the room that is left."""
    monkeypatch.setattr(bench, "REFRESH", 10)
    steps, _, _, v, q, k = neighbour("RefreshKV")
    kept, ranked, last = {}, {}, 44
    for t, o in steps:
        if t == 45 or (t - 45) % 10 == 0:  # after the prompt, and after each full step at 54, 64, ...
            last = t - 1
            for b, h in np.ndindex(2, 2):
                mean = weights_over(q[b, last], k[b], list(range(last + 1)))[h * 3 : h * 3 + 3].mean(0)
                ranked[b, h] = np.argsort(-mean).tolist()
        room = pages_to_load(BENCH, t)[0] * 8 - (t - last)
        for place, best in ranked.items():
            kept[place] = range(t + 1) if (t - 44) % 10 == 0 else [*best[:room], *range(last + 1, t + 1)]
        check_output(o, q, k, v, t, lambda b, h: kept[b, h])


@pytest.mark.parametrize("retro", [BENCH, replace(BENCH, min_tokens=1, budget=0.01)], ids=["", "one page"])
def test_selection_reuse_chooses_at_every_second_step(retro):
    """In between, the pages of the step before: with a page begun since in front, and the order of that time for the rest."""
    steps, _, _, v, q, k = neighbour("selection reuse", retro=retro)
    ranked, kept = {}, {}
    for t, o in steps:
        count, held, window = pages_to_load(retro, t)
        for b, h in np.ndindex(2, 2):
            if (t - 45) % 2 == 0:
                bounds = quest_bounds(q[b, t, h * 3 : h * 3 + 3], k[b, :, h], t)
                ranked[b, h] = sorted(range(held), key=lambda j: (j not in window, -bounds[j]))  # noqa: B023
            elif held - 1 not in ranked[b, h]:
                ranked[b, h].insert(0, held - 1)
            kept[b, h] = [j for j in range(t + 1) if j // 8 in ranked[b, h][:count]]
        check_output(o, q, k, v, t, lambda b, h: kept[b, h])


@pytest.mark.parametrize("dense_layers", [0, 1])
def test_resa_repairs_the_cache(monkeypatch, dense_layers):
    """After a dense pass, keys, values and bounds are dense decoding's; before the first one, all is Quest's.

    Guards against a pass one row short, bounds left as they were, and a repair that reads the cached sparse outputs.
    """
    monkeypatch.setattr(bench, "REFRESH", 8)
    model, tokens, quest = random_model(), random_tokens(2, 75), replace(BENCH, dense_layers=dense_layers)
    methods = (("ReSA", quest), ("Quest", quest), ("full", None))
    decoders = [bench.new_decoder(name, retro, model, 2, 75) for name, retro in methods]
    for decoder in decoders:
        decoder.prefill(tokens[:, :41])
    for t in range(41, 75):
        ours, quests, _ = (decoder.step(tokens[:, t]) for decoder in decoders)
        if t < 41 + 8:
            assert torch.equal(ours, quests)
        found, wanted = (
            torch.stack([x for layer in decoder.layers for x in by_position(layer.cache)])[:, :, :, : t + 1]
            for decoder in (decoders[0], decoders[2])
        )
        assert torch.allclose(found, wanted, rtol=0, atol=1e-10) == (t % 8 == 0)  # 48, 56, ...: eight steps each
        for layer in decoders[0].layers[dense_layers:] if t % 8 == 0 else ():
            keys = by_position(layer.cache)[0][:, :, t // 8 * 8 : t + 1]
            assert torch.equal(layer.cache.bounds[:, :, t // 8, 1], keys.amax(2))


# ----------------------------------------------------------------------------------------------------------------------
# The benchmark: quality


def test_kv_share_counts_bounds_and_dense_passes():
    """By hand: position 63 holds 8 pages of 8 tokens, a quarter is 2, the bounds of all are one page's worth of vectors."""
    retro = replace(BENCH, budget=0.25)
    share = lambda name, n, retro=retro: bench.kv_share(name, retro, 4, range(64 - n, 64))  # noqa: E731
    assert share("Quest", 1) == share("W=4", 1) == 3 / 8 and share("full", 1, None) == 1
    assert share("StreamingLLM", 1) == share("TOVA", 1) == 2 / 8
    assert share("Quest", 1, replace(retro, dense_layers=1)) == (1 + 3 * 3 / 8) / 4
    assert share("selection reuse", 2) == (3 + 2) / 16
    steps = [(max(2, -(-(t // 8 + 1) // 4)), t // 8 + 1) for t in range(32, 64)]
    held = sum(h for _, h in steps)
    assert share("RefreshKV", 32) == (sum(s for s, _ in steps[:-1]) + 8) / held
    resa = (sum(s + h / 8 for s, h in steps) + 8) / held
    assert math.isclose(share("ReSA", 32), resa)
    assert math.isclose(share("ReSA", 32, replace(retro, dense_layers=1)), (3 * resa + 1 + 8 / held) / 4)


def quality_arguments(**changes):
    sizes = dict(text=None, passages=3, prefix=50, length=30, windows=[1, 4], seed=0, decoded=0)
    sizes |= dict(neighbours=bench.NEIGHBOURS, ablations=[])
    return SimpleNamespace(**{**sizes, **changes})


@pytest.mark.parametrize("decoded", [0, 20])
def test_the_table_of_quality_is_what_it_says(monkeypatch, decoded):
    """Window 1 is Quest, in every number; KL and nats are those of the logits, over the tokens after the prompt alone, of
    which the last may have been decoded."""
    monkeypatch.setattr(bench, "REFRESH", 8)
    monkeypatch.setattr(bench, "PARTS", 4)
    model, args, tok = random_model(), quality_arguments(decoded=decoded), SimpleNamespace(bos=0)
    idx = bench.passages(args, model, tok)
    assert idx.shape == (3, 81) and torch.equal(idx, bench.passages(args, model, tok))
    monkeypatch.setattr(bench, "setup", lambda args: (BENCH, model, tok))
    table = bench.quality(args)
    rows = table["rows"]
    assert rows["W=1"] == rows["Quest"] and rows["Quest"]["kl_to_quest"] == [0, 0] and rows["full"]["kl"] == 0
    assert len({row["kl"] for row in rows.values()}) == len(rows) - 1, "two methods are one"
    dense = model(idx).log_softmax(-1)[:, 50:80]
    kl = {}
    for name, W in (("Quest", 1), ("W=4", 4)):
        sparse = decode(model, replace(BENCH, window=W), idx[:, :80], 50 - decoded)[0][:, 1 + decoded :].log_softmax(-1)
        kl[name] = (dense.exp() * (dense - sparse)).sum(-1)
        gap = (dense - sparse).gather(2, idx[:, 51:, None])[..., 0]
        close(rows[name]["kl"], kl[name].mean(), 1e-6)
        close(rows[name]["kl_by_passage"], kl[name].mean(1), 1e-6)
        close(rows[name]["gap"], gap.mean(), 1e-5)
        close(rows[name]["gap_by_position"][1], gap[:, 8:16].mean(), 1e-5)
    difference = (kl["W=4"] - kl["Quest"]).mean(1)
    close(rows["W=4"]["kl_to_quest"], [difference.mean(), difference.std() / math.sqrt(3)], 1e-6)
    assert table["positions"] == [0, 8, 16, 23, 30]
    part = kl["W=4"][:, 8:16].mean(1)
    close(rows["W=4"]["kl_errors"][1], part.std() / math.sqrt(3), 1e-6)
    args.neighbours, args.ablations, args.windows = ["ReSA"], ["not looking back"], [4]
    rows = bench.quality(args)["rows"]
    assert list(rows) == ["full", "Quest", "W=4", "W=4 not looking back", "ReSA"]
    close(rows["W=4"]["kl_to_control"][0], rows["W=4"]["kl"] - rows["W=4 not looking back"]["kl"], 1e-6)


def texts_logits(name, retro, tokens, prompt_len=20, **model):
    """(B, L, vocab) by a method of the benchmark."""
    decoder = bench.new_decoder(name, retro, random_model(**model), len(tokens), tokens.shape[1])
    return torch.stack([decoder.prefill(tokens[:, :prompt_len]), *(decoder.step(x) for x in tokens[:, prompt_len:].T)], 1)


def test_not_looking_back_is_quest_on_the_same_pages(monkeypatch):
    """The control for the window's pages on top of the budget: it loads what W=4 loads, and none of it for a past row."""
    tokens, four = random_tokens(2, 110), replace(BENCH, window=4)
    control = texts_logits("W=4 not looking back", four, tokens)
    for logits in (texts_logits("W=4", four, tokens), texts_logits("Quest", BENCH, tokens)):
        assert (control - logits).abs().max() > 0.01
    for name in ("first_window_page", "pages_selected"):  # of every RetroConfig: Quest's pages are then those of W=4
        monkeypatch.setattr(RetroConfig, name, getattr(four, name))
    close(control, texts_logits("Quest", BENCH, tokens), 1e-9)


def test_the_other_ablations():
    """One choice: all KV heads load the same pages. First query: no difference in the first of two layers, below which nothing
    was corrected; in the second of three it shows in the third."""
    tokens, four, chosen = random_tokens(2, 90), replace(BENCH, window=4), []
    decoder = bench.new_decoder("W=4 one choice", four, random_model(), 2, 90)
    decoder.layers[1].hook = lambda step: chosen.append(step.pages)
    decoder.prefill(tokens[:, :20])
    for i in range(20, 90):
        decoder.step(tokens[:, i])
    assert all(torch.equal(pages[:, 0], pages[:, 1]) for pages in chosen)
    assert "Quest one choice" in bench.methods(BENCH, [4], (), ["one choice"])
    for layers, equal in ((2, True), (3, False)):
        a, b = (texts_logits(name, four, tokens, n_layer=layers) for name in ("W=4 first query", "W=4"))
        assert ((a - b).abs().max() < 1e-9) == equal


@pytest.mark.skipif(DEVICE != "cuda", reason="there is no GPU: CUDA graphs are not tested here")
@pytest.mark.parametrize("name", list(bench.ABLATIONS))
def test_ablations_through_the_kernels(name):
    """Also in a CUDA graph: what they keep must stay at its place."""
    tokens, model = random_tokens(2, 90).cuda(), random_model().float().cuda()
    logits = []
    for impl in ("torch", "triton"):
        decoder = bench.new_decoder(f"W=4 {name}", replace(BENCH, window=4, impl=impl), model, 2, 90)
        logits.append(torch.stack([decoder.prefill(tokens[:, :20]), *(decoder.step(x) for x in tokens[:, 20:].T)]))
    assert decoder.graph is not None
    assert (logits[0] - logits[1]).abs().max() < 1e-3


def test_a_full_budget_is_full_attention_in_the_table(monkeypatch):
    """With all tokens allowed every method is full attention, except that reading has its price."""
    monkeypatch.setattr(bench, "REFRESH", 8)
    monkeypatch.setattr(bench, "setup", lambda args: (replace(BENCH, budget=1.0), random_model(), SimpleNamespace(bos=0)))
    rows = bench.quality(quality_arguments())["rows"]
    for name, row in rows.items():
        assert abs(row["kl"]) < 1e-5 and abs(row["gap"]) < 1e-5, name
    assert rows["full"]["kv_share"] == rows["TOVA"]["kv_share"] == 1 < rows["Quest"]["kv_share"] < rows["ReSA"]["kv_share"]


def test_overlap_of_page_sets():
    """Against sets: pages taken now that were among the first k, or the next k, of a past step; new pages in neither."""
    rng = np.random.default_rng(0)
    ranks = [torch.from_numpy(rng.permuted(np.tile(np.arange(9 + i // 2), (2, 3, 1)), axis=-1)) for i in range(6)]
    selected, shares = [2, 2, 3, 3, 3, 3], []
    for i in range(2, 6):
        top = beyond = 0
        for now, past in zip(ranks[i].flatten(0, 1), ranks[i - 2].flatten(0, 1), strict=True):
            taken, order, k = set(np.flatnonzero(now < selected[i])), past.argsort().tolist(), selected[i - 2]
            top += len(taken & set(order[:k]))
            beyond += len(taken & set(order[k : 2 * k]))
        shares.append([top / 6 / selected[i], beyond / 6 / selected[i]])
    close(bench.overlap(ranks, selected, 2), np.mean(shares, 0), 1e-6)


def test_the_overlap_is_that_of_full_attention(monkeypatch):
    """Guards against pages that the queries of a sparse model want."""
    model, tokens, seen, forced = random_model(), random_tokens(2, 60), [], bench.forced
    monkeypatch.setattr(bench, "forced", lambda *args: (seen.append(logp) for logp in forced(*args)))
    bench.page_overlaps(SimpleNamespace(prefix=40, distance=2), BENCH, model, tokens)
    close(torch.stack(seen, 1), model(tokens)[:, 40:59].log_softmax(-1), 1e-5)


def test_answers_are_matched_by_their_number():
    """In any order; what follows 'The answer is' before any other number; the first answer to a question counts."""
    text = (
        "Answer_2: 3 and 4 make 7. The answer is $1,007.50. It took 3 steps.\n\nAnswer_1: it is 12, so 13\n"
        "Answer_4: nothing\nAnswer_2: The answer is 8.\nAnswer_12: the answer is -5\nAnswer_4: The answer is 0."
    )
    assert bench.read_answers(text) == ({2: 1007.5, 1: 13, 12: -5, 4: 0}, [1007.5, 13, None, 8, -5, 0])
    assert bench.read_answers("The answer is 3.") == ({}, [])
    assert bench.judge("Answer_9: 1 Answer_11: 2", 9, [1, 2, 3]) == {
        "right": [True, False, False], "right by position": [True, True, False], "answered": [True, False, True]
    }  # fmt: skip
    assert bench.judge("2 + 2 = 4", 9, [4]) == {"right": [True], "right by position": [True], "answered": [True]}


def test_longgen_numbers_the_questions_on():
    """As published: in a first version the asked questions began at 1 again, and a model answered the examples once more."""
    pairs = [{"question": f"q{i}?", "work": f"w{i}.", "result": float(i)} for i in range(5)]
    system, prompt = (text for _, text in bench.conversation(pairs[:3], pairs[3:]))
    assert system == bench.INSTRUCTION
    assert re.findall(r"Question_(\d): (q\d)", prompt) == [(str(i + 1), f"q{i}") for i in range(5)]
    assert re.findall(r"Answer_(\d): w(\d)\. The answer is (\d)\.", prompt) == [(str(i + 1), str(i), str(i)) for i in range(3)]
    alone = bench.conversation(pairs[:2], pairs[4:])
    assert alone[1::2] == [("assistant", "w0. The answer is 0."), ("assistant", "w1. The answer is 1.")]
    assert alone[::2] == [("user", "q0?"), ("user", "q1?"), ("user", "q4?")]


@pytest.fixture
def longgen(capsys, monkeypatch, tmp_path):
    """Runs the command as if the model said `said` to whatever it is asked, of sums from 1000 on: results and records."""
    tok = Tokenizer.from_checkpoint(TINY)
    lines = [{"question": f"What is {i} + 1000?", "answer": f"<<{i}+1000>>\n#### {1000 + i:,}"} for i in range(20)]
    (tmp_path / "examples").write_text("".join(json.dumps(line) + "\n" for line in lines[:3]))
    (tmp_path / "questions").write_text("".join(json.dumps(line) + "\n" for line in lines[3:]))

    def run(said, args):
        def stream(decoder, idx, most, temperature, stop_tokens):
            assert temperature == 0 and stop_tokens == tok.stop_tokens and idx.shape[1] + most <= decoder.max_seq_len
            return (torch.full((len(idx),), token) for token in [*tok.encode(said), tok.stop_tokens[0]])

        model = random_model(hs=8, n_layer=2, vocab_size=tok.vocab_size, max_seq_len=2000)
        monkeypatch.setattr(bench, "setup", lambda args: (RetroConfig(window=1), model, tok))
        monkeypatch.setattr(Decoder, "stream", stream)
        files = f"--questions {tmp_path}/questions --examples {tmp_path}/examples --out {tmp_path}/out --shots 3 --windows 2"
        assert bench.main(["longgen", *files.split(), *args.split()]) == 0
        results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
        return results, [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]

    return run


def test_longgen_counts_what_is_right(longgen):
    """The questions asked are numbered on from the three examples. Of the first four the script has two right by number, skips
    one and repeats one, first wrong, and none is right at its place; of the next four none is right."""
    said = (
        "Answer_7: The answer is 1006. Answer_4: The answer is 1,003. Answer_5: The answer is 1. Answer_5: The answer is 1004."
    )
    rows, records = longgen(said, "--n 4 --prompts 2")
    assert list(rows) == ["full", "Quest", "W=2"]
    for row in rows.values():
        assert (row["right"], row["right by position"], row["answered"]) == (2 / 8, 0, 6 / 8)
        assert row["right_by_position"] == [0.5, 0, 0, 0.5] and row["right_to_quest"] == [0, 0]
    assert len(records) == 6 and all(record["text"] == said for record in records)
    assert all(record["right"] == [record["prompt"] == 0 and i in (0, 3) for i in range(4)] for record in records)


def test_longgen_asks_single_questions_side_by_side(longgen):
    """Prompts of one length in batches, each record under its own number."""
    results, records = longgen("1000 + 5 is 1005. The answer is 1,005. 7", "--n 1 --prompts 17 --batch 4")
    assert results["W=2"]["right"] == pytest.approx(1 / 17) and results["full"]["answered"] == 1
    assert sorted(record["prompt"] for record in records if record["method"] == "Quest") == list(range(17))
    assert {record["prompt"] for record in records if record["right"][0]} == {2}


def test_longgen_makes_prompts_of_one_length(tmp_path):
    """Each prompt's examples make up for the length of its questions, which stay its own."""
    tok, words = Tokenizer.from_checkpoint(TINY), "the wind blew and it was a dark night " * 9
    pairs = [{"question": words[: 7 * i % 90] + f"{i}?", "answer": words[: 11 * i % 170] + f"#### {i}"} for i in range(60)]
    for name, lines in (("examples", pairs[:40]), ("questions", pairs[40:])):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = f"--examples {tmp_path}/examples --questions {tmp_path}/questions --out x --shots 3 --prompts 5 --one_length"
    args = bench.parse_args(["longgen", *args.split()])
    for n in (1, 4):
        args.n = n
        prompts = bench.longgen_prompts(args, 3000, tok)
        assert len({len(ids) for ids, _ in prompts}) == 1
        assert [results for _, results in prompts] == [[40.0 + i * n + j for j in range(n)] for i in range(5)]
        texts = [tok.decode(ids) for ids, _ in prompts]
        assert all(f"{40 + i * n}?" in text and text.count("?") == 3 + n for i, text in enumerate(texts))
        assert len({text[: text.index("?")] for text in texts}) > 1, "the same examples for all"


def test_the_commands_and_the_picture(capsys, monkeypatch, tmp_path):
    """quality and exposure on the shipped checkpoint, and what picture makes of their saved output."""
    (tmp_path / "book").write_text("It was a dark night, and the wind blew. " * 60)
    saved = {name: str(tmp_path / name) for name in ("quality", "exposure", "x.png")}

    def run(args):
        assert bench.main([*args.split(), "--text", str(tmp_path / "book")]) == 0
        output = capsys.readouterr().out
        assert not re.search(r" -\s", output), "a dash: a column without its value"
        Path(saved[args.split()[0]]).write_text(output)
        return output, json.loads(output.splitlines()[-1])

    sizes = "--passages 2 --prefix 150 --length 10 --windows 2 --min_tokens 32 --dense_layers 0"
    output, record = run(f"quality {sizes} --neighbours ReSA TOVA")
    assert record["arguments"]["prefix"] == 150 and record["versions"]["torch"] and record["device"]
    assert list(record["results"]["rows"]) == ["full", "Quest", "W=2", "ReSA", "TOVA"] and "ReSA" in output
    results = run(f"exposure {sizes} --distance 3")[1]["results"]
    assert results["effective_exposure"]["1"] == 1 < results["effective_exposure"]["2"] < 2
    assert all(0 < a + b <= 1 for a, b in results["overlap"].values()) and len(results["overlap"]) == 3
    loaded, new, mass, output, key, value = zip(*results["revised"].values(), strict=True)
    assert len(new) == 10 and 0 < max(new) < min(loaded) and 0 < max(mass) < 1 and max(output) > 0.001
    assert max(key[0], value[0]) < 1e-5 < max(*key[1:], *value[1:]), "in the first sparse layer they do not move"
    picture = ["picture", "--out", saved["x.png"], "--quality", saved["quality"], "--exposure"]
    refused_in_a_line(run_main(bench.main, [*picture, saved["quality"]], capsys), "is not the JSON of bench.py exposure")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        refused_in_a_line(run_main(bench.main, [*picture, saved["exposure"]], capsys), "pip install matplotlib")
    if importlib.util.find_spec("matplotlib"):
        assert bench.main([*picture, saved["exposure"]]) == 0
        line, rows = sys.modules["matplotlib.pyplot"].gcf().axes[0].lines[1], record["results"]["rows"]
        assert line.get_label() == "W=2" and list(line.get_ydata()) == pytest.approx(rows["W=2"]["kl_by_position"])
        assert list(line.get_xdata()) == [(a + b) / 2 for a, b in itertools.pairwise(record["results"]["positions"])]
        assert Path(saved["x.png"]).read_bytes()[1:4] == b"PNG"


# ----------------------------------------------------------------------------------------------------------------------
# The benchmark: speed


@pytest.fixture
def measure(capsys, monkeypatch):
    """Runs a speed command as on a machine without a GPU: its first line, and the JSON of its last."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)

    def run(args):
        assert bench.main(args.split()) == 0
        lines = capsys.readouterr().out.strip().split("\n")
        assert "No GPU" in lines[0] and "PyTorch reference" in lines[0]
        dashes = [line for line in lines[:-1] if re.search(r" -( |$)", line) and "transformers" not in line]
        assert not dashes or "kernels" in args, "a column without its value; only SDPA's may have none"
        return json.loads(lines[-1])["results"]

    return run


def test_kernels_sets_the_time_beside_the_bytes(measure, monkeypatch):
    """Bytes by hand for 320 tokens in 20 pages, 16 of them (min_tokens) or, for Quest's headline setting, 18 selected."""
    monkeypatch.setattr(bench, "HEADLINE", (320, 288))
    results = measure("kernels --settings 320x2 --windows 1 8")
    rows, rate = results["rows"], max(results["memory_rate"].values())
    assert [(row["window"], row["budget"]) for row in rows] == [(1, 0.15), (8, 0.15), (1, 0.9)]
    for row in rows:
        pages, vector = 18 if row["budget"] == 0.9 else 16, 2 * 2 * 64 * 4  # batch, KV heads, head size, float32
        nbytes = row["bytes"]
        assert nbytes["score"] == 2 * 20 * vector and nbytes["attend"] == 2 * pages * 16 * vector
        assert nbytes["four"] == 2 * (20 + pages * 16) * vector and nbytes["dense"] == 2 * 320 * vector
        assert all(row[name] > 0 for name in (*bench.KERNELS, "four", "ours"))
        assert row["of the limit"] == pytest.approx(nbytes["four"] / rate * 1e6 / row["four"])
        assert row["dense/four"] == pytest.approx(min(row[x] for x in bench.DENSE if x in row) / row["four"])


def test_decode_sets_whole_steps_beside_the_bytes(measure):
    """The shape is the shipped checkpoint's, with embeddings that are the output head too: a step reads all weights."""
    config, weights = sample.read_checkpoint(TINY)
    assert bench.SHAPES["tiny"] == config
    results = measure("decode --settings 400x2 --windows 2 --rounds 1 --dense_layers 3")
    rows, rate = results["rows"], max(results["memory_rate"].values())
    if importlib.util.find_spec("transformers"):
        theirs = rows.pop()
        assert theirs["method"] == "transformers" and theirs["ms"] > 0 and theirs["bytes"] == rows[0]["bytes"]
    assert [row["method"] for row in rows] == ["full", "Quest", "W=2"]
    read, vector = 4 * sum(w.numel() for w in weights.values()), 2 * 2 * 64 * 4
    # The last 30 steps, to position 399: 371 to 400 tokens, in 24 pages 14 times, in 25 pages 16 times; W=2 lies in two once.
    tokens, held = sum(range(371, 401)), 14 * 24 + 16 * 25
    assert rows[0]["bytes"] == read + 10 * 2 * tokens * vector / 30
    for row, pages in ((rows[1], 30 * 16), (rows[2], 30 * 16 + 1)):
        assert row["bytes"] == (30 * read + (3 * 2 * tokens + 7 * 2 * (held + pages * 16)) * vector) / 30
    for row in rows:
        assert row["share"] == pytest.approx(row["bytes"] / rate / row["ms"] * 1e3)
    untied = bench.random_model(replace(config, tie_embeddings=False, max_seq_len=400), "cpu", torch.float32)
    # Of the embedding table itself a step takes single rows.
    assert bench.step_bytes(untied, None, 2, 385) == read + 10 * 2 * 385 * vector


# ----------------------------------------------------------------------------------------------------------------------
# The benchmark's command line


def test_quick_changes_what_is_not_given():
    """--quick stands for smaller sizes, each of which can still be given, also as what is usual."""
    usual, quick, both = (bench.parse_args(["quality", *x.split()]) for x in ("", "--quick", "--quick --passages 24"))
    assert (usual.passages, quick.passages, both.passages) == (16, 8, 24)
    assert usual.length > quick.length == both.length and bench.parse_args(["quality"]).passages == 16


@pytest.mark.parametrize("args, message", [  # a row for each way that a value takes
    ("nonsense", "invalid choice: 'nonsense'"), ("quality --budget much", "--budget: invalid float"),
    ("kernels --settings 1024", "invalid setting value: '1024'"),
    ("kernels --settings 64x1", "settings: must have a context >= 256 and a batch >= 1, not 64x1"),
    ("decode --settings 1024x0", "a batch >= 1, not 1024x0"), ("quality --windows 2 0", "windows: must be >= 1, not 0"),
    ("quality --passages 1", "passages: must be >= 2, not 1"), ("longgen --prompts 1", "prompts: must be >= 2, not 1"),
    ("decode --dense_layers 11 --shape tiny", "dense_layers must be between 0 and the model's 10 layers, not 11"),
    ("quality --checkpoint nowhere", "checkpoint nowhere: no such folder"), ("quality --text nowhere", "nowhere: No such file"),
    ("quality --text LICENSE", r"LICENSE has \d+ tokens: 16 passages of 3584 need 57344"),
    ("quality --prefix 4000", "prefix \\+ length must be at most 4095, not 7072"),
    ("quality --prefix 50 --decoded 50", "decoded must be between 0 and 49, not 50: less than prefix"),
    ("exposure --distance 128", "distance must be between 1 and length - 1 = 127, not 128"),
    ("longgen --questions nowhere --examples LICENSE --out x", "LICENSE: line 1 is not a question"),
    ("longgen --questions LICENSE --examples nowhere --out x", "nowhere: No such file"),
    ("longgen --questions LICENSE --examples LICENSE --out README.md", "README.md: exists"),
    ("picture --quality LICENSE --exposure LICENSE", "LICENSE: its last line is not the JSON of bench.py quality"),
])  # fmt: skip
def test_a_mistake_in_a_measurement_is_one_clear_line(capsys, monkeypatch, args, message):
    """Before anything is measured or sampled."""
    monkeypatch.chdir(TINY.parent)
    refused_in_a_line(run_main(bench.main, args.split(), capsys), message)


# ----------------------------------------------------------------------------------------------------------------------
# The command line of sample.py


def command(capsys, options="", *more):
    """A short text: exit code, stdout, stderr. Options given here win."""
    short = "--max_new_tokens 16 --min_tokens 16 --page_size 8 --dense_layers 0 --device cpu".split()
    return run_main(sample.main, ["--prompt", "It was a dark night", *short, *options.split(), *more], capsys)


def test_the_command_continues_the_prompt_and_reports_what_it_read(capsys):
    """Same seed, same text; another seed, another; the report's counts are those of the positions decoded."""
    code, text, report = command(capsys)
    assert code == 0 and text.startswith("It was a dark night") and len(text) > 30
    assert command(capsys)[1] == text != command(capsys, "--seed 1")[1]
    n = len(Tokenizer.from_checkpoint(TINY).encode("It was a dark night", bos=True))
    assert "16 tokens, " in report and f"prompt of {n} tokens" in report and f"context {n + 16} of 4096" in report
    counts = [pages_to_load(RetroConfig(page_size=8, min_tokens=16), t)[:2] for t in range(n, n + 15)]
    read, held = np.mean(counts, axis=0)
    assert read < held and f"{read:.1f} of {held:.1f} pages read" in report
    assert "full attention" in command(capsys, "--attention full")[2]
    quest = command(capsys, "--attention quest --temperature 0")
    assert "Quest, window 1" in quest[2] and "exposure 1.00x" in quest[2]
    assert command(capsys, "--window 1 --temperature 0")[1] == quest[1]
    for temperature, different in ((0.9, 3), (0, 1)):  # three samples: all different, or, greedy, all the same
        _, out, report = command(capsys, f"--num_samples 3 --temperature {temperature}")
        texts = [text.strip() for text in out.split("---------------\n")]
        assert len(texts) == 3 and len(set(texts)) == different and "48 tokens" in report


def test_prompts_from_files_and_stdin(capsys, monkeypatch, tmp_path):
    """FILE:path and - give what --prompt gives; an empty prompt starts from begin_of_text alone."""
    wanted = command(capsys)[1]
    (tmp_path / "prompt").write_text("It was a dark night")
    assert command(capsys, "", "--prompt", f"FILE:{tmp_path}/prompt")[1] == wanted
    (tmp_path / "prompt").write_bytes(b"\xef\xbb\xbfIt was a dark night")  # as editors on Windows begin a file
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command(capsys, "", "--prompt", "FILE:~/prompt")[1] == wanted
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"It was a dark night")))
    assert command(capsys, "--prompt -")[1] == wanted
    # One default for one thing: the same text from Python.
    model, tok = Llama.from_checkpoint(TINY), Tokenizer.from_checkpoint(TINY)
    idx = torch.tensor([tok.encode("It was a dark night", bos=True)])
    retro = RetroConfig(page_size=8, min_tokens=16, dense_layers=0)
    assert tok.decode(model.generate(idx, 16, retro, seed=1337)[0, 1:].tolist()) + "\n" == wanted
    assert Decoder(model, 1).retro == RetroConfig()
    assert not command(capsys, "--chat")[1].startswith("It was")
    code, text, report = command(capsys, "", "--prompt", "")
    assert code == 0 and text and "prompt of 1 tokens" in report
    monkeypatch.setattr(Tokenizer, "encode", lambda *args, **options: [])  # as Qwen's, which has no begin-of-text
    refused_in_a_line(command(capsys, "", "--prompt", ""), "prompt must not be empty")


@pytest.fixture
def unloaded(monkeypatch):
    """Weights must not be read."""
    monkeypatch.setattr(Llama, "from_checkpoint", lambda *args, **options: pytest.fail("weights were loaded"))


def test_what_does_not_fit_is_said_before_loading(capsys, monkeypatch, unloaded):
    """The line on memory counts what is allocated; a context that cannot fit is refused with the largest that would."""
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 20_150, "SC_PAGE_SIZE": 4096}[name])
    result = command(capsys, "--max_new_tokens 4000 --num_samples 9")
    refused_in_a_line(result, "more than the 82.5 MB of cpu")
    fits = int(re.search(r"at most (\d+) tokens", result[2])[1])
    shape = sample.read_checkpoint(TINY)[0], RetroConfig(page_size=8, dense_layers=0), 9
    check = lambda length: sample.check_memory(*shape, length, torch.device("cpu"), torch.float32)  # noqa: E731
    check(fits)
    refused(lambda: check(fits + 1), "more than")  # a page more
    assert fits % 8 == 0


def test_a_small_model_takes_one_thread_unless_the_user_says_otherwise(capsys, monkeypatch):
    """Guards against threads that wait for each other, and against a user's own setting that is overridden."""
    for said, wanted in (("2", []), (None, [1])):
        found = []
        monkeypatch.setattr(torch, "set_num_threads", found.append)
        monkeypatch.setenv("OMP_NUM_THREADS", "2") if said else monkeypatch.delenv("OMP_NUM_THREADS")
        assert command(capsys)[0] == 0 and found == wanted
    sample.choose_threads(bench.SHAPES["8b"], "cpu")
    assert found == [1]


@pytest.mark.parametrize("said", ["CUDA out of memory.", "can't allocate memory: x", "not enough memory: x"])
def test_only_what_is_out_of_memory_is_called_so(capsys, monkeypatch, said):
    """Guards against a broken kernel, an "illegal memory access", taken for a text that is too long."""
    monkeypatch.setattr(Decoder, "step", Mock(side_effect=[RuntimeError(said), RuntimeError("illegal memory access")]))
    assert command(capsys)[0] == 2
    with pytest.raises(RuntimeError, match="illegal memory access"):
        command(capsys)


def test_the_end_of_the_context(capsys, monkeypatch):
    """A text that fills the context stops there and says so; a prompt that leaves no room is refused."""
    config, weights = sample.read_checkpoint(TINY)
    monkeypatch.setattr(sample, "read_checkpoint", lambda folder: (replace(config, max_seq_len=64), weights))
    monkeypatch.setattr(Llama, "from_checkpoint", partial(Llama.from_checkpoint, max_seq_len=64))
    code, _, report = command(capsys, "--max_new_tokens 1000")
    assert code == 0 and "context 64 of 64" in report
    refused_in_a_line(command(capsys, "", "--prompt", "It was " * 40), "must be between 1 and 63")


@pytest.mark.parametrize("options, message", [  # a row for each way that a value takes
    ("--window two", "--window: invalid int"), ("--impl cuda", "--impl: invalid choice"),
    ("--num_samples 0", "num_samples must be >= 1"),
    ("--window 5000", "window must be .* from 1 to 256, not 5000"), ("--prompt FILE:", "prompt file : Is a directory"),
    ("--system be", "a system message needs --chat"), ("--prompt \udcff", "prompt is not UTF-8"),
    ("--max_new_token_s 3", "unrecognized arguments"), ("--top_p 0", "top_p must be"),
    ("--budget 0 --attention full", r"budget must be in \(0, 1\], not 0"),
    ("--dense_layers 99", "dense_layers must be between 0 and the model's .* not 99"),
    ("--checkpoint nowhere", "checkpoint nowhere: no such folder"), ("--prompt FILE:nowhere", "prompt file nowhere"),
    ("--prompt FILE:tiny/consolidated.00.pth", "not UTF-8 at byte"),
    ("--device abacus", "device 'abacus': not on this machine"), ("--device cuda:77", "device 'cuda:77': not on this machine"),
    *((f"--dense_layers 1 --trace {x}", f"a sparse layer between 1 and 9 and .* between 0 and 1, not '{x}'$")
      for x in ("two", "-1", "0", "10", "1:2", "1:", "1:-1", "1:0:0", "1.0")), ("--trace --attention full", "all 10 .* dense"),
    ("--trace --dense_layers 10", "all 10 layers are dense"), ("--trace nowhere/x.html", "nowhere/x.html: no such folder"),
])  # fmt: skip
def test_a_mistake_is_one_clear_line(capsys, monkeypatch, unloaded, options, message):
    """It names the value and what is allowed, before the weights are read."""
    monkeypatch.chdir(TINY.parent)
    refused_in_a_line(command(capsys, options), message)


# ----------------------------------------------------------------------------------------------------------------------
# Several processes

SHARED = """
import sys
import torch
import sample
from model import Decoder, Llama, processes
from retro_attention import RetroConfig
sample.join_processes()
torch.set_num_threads(1)
folder, device, dtype, impl = sys.argv[1:]
model = Llama.from_checkpoint(sample.TINY, device, getattr(torch, dtype))
idx = torch.load(folder + "/idx").to(device)
rank, n = processes()
retros = [RetroConfig(window=w, min_tokens=32, impl=impl) for w in (1, 2, 8)]
texts = [model.generate(idx[:, :60], 30, retro, temperature=0) for retro in retros]
drawn = model.generate(idx[:, :60], 20, temperature=1, seed=rank)
decoders = [Decoder(model, 2, retro, 100) for retro in retros]
logits = [torch.stack([d.prefill(idx[:, :60]), *(d.step(token) for token in idx[:, 60:].T)], 1) for d in decoders]
weights = {name: w.clone() for name, w in model.weights().items()}
torch.save((n, texts, drawn, logits, weights), f"{folder}/{rank}")
"""


needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")


def run_python(n, *args, gpus=""):
    """A script, in n processes by torchrun if n > 1, and in a session of its own, to which a Ctrl-C can be sent."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)] if n > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TINY.parent), "CUDA_VISIBLE_DEVICES": gpus}
    # In a shell's background job the signal is ignored, and children inherit that.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    return subprocess.Popen(
        [sys.executable, *several, *map(str, args)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=heed, start_new_session=True,
    )  # fmt: skip


@pytest.mark.parametrize("device, dtype, impl, tolerance", [
    ("cpu", "float64", "torch", 1e-10),
    pytest.param("cuda", "float32", "triton", 1e-4, marks=needs_two_gpus),
])  # fmt: skip
def test_two_processes_are_one(tmp_path, device, dtype, impl, tolerance):
    """Each holds half of the heads; texts, logits, and the weights put together again are those of a single process. The first
    one's token is everybody's, whatever the seeds. On two GPUs the steps are CUDA graphs, the sums in them too."""
    model, idx = Llama.from_checkpoint(TINY, device, getattr(torch, dtype)), torch.randint(4096, (2, 100))
    torch.save(idx, tmp_path / "idx")
    (tmp_path / "shared.py").write_text(SHARED)
    child = run_python(2, tmp_path / "shared.py", tmp_path, device, dtype, impl, gpus="0,1" if device == "cuda" else "")
    assert child.wait(timeout=200) == 0, child.stderr.read().decode()
    load = partial(torch.load, map_location=device)
    (n, texts, drawn, logits, first), (_, *others, second) = (load(tmp_path / str(rank)) for rank in (0, 1))
    assert n == 2 and torch.equal(drawn, others[1]) and all(map(torch.equal, texts, others[0]))
    idx = idx.to(device)
    for w, text, found in zip((1, 2, 8), texts, logits, strict=True):
        retro = RetroConfig(window=w, min_tokens=32, impl=impl)
        assert torch.equal(text, model.generate(idx[:, :60], 30, retro, temperature=0))
        close(found.cpu(), decode(model, retro, idx, 60)[0].cpu(), tolerance)
    for name, w in model.weights().items():
        dims = [dim for dim in range(w.ndim) if first[name].shape[dim] < w.shape[dim]]
        whole = torch.cat((first[name], second[name]), dims[0]) if dims else first[name]
        assert torch.equal(whole, w) and (dims or torch.equal(first[name], second[name])), name
        assert bool(dims) == (name.split(".")[-2] in ("wq", "wk", "wv", "wo", "w1", "w2", "w3"))


def test_processes_that_do_not_divide_the_heads_are_refused_once():
    """By the first process alone, and none hangs."""
    child = run_python(3, TINY.parent / "sample.py", "--device", "cpu")
    out, error = child.communicate(timeout=100)
    message = "sample.py: error: the number of processes must divide the 2 KV heads and ffn_dim 896, not 3"
    assert child.returncode == 1 and not out and error.decode().count(message) == 1
    assert 'sample.py", line' not in error.decode() and "exitcode  : 2" in error.decode()


@pytest.mark.parametrize("n", [1, 2])
def test_an_interrupt_keeps_the_text_and_reports(n):
    """Ctrl-C reaches every process: what was printed stays, its line is ended, the report follows, and none hangs."""
    child = run_python(n, TINY.parent / "sample.py", *"--prompt It --max_new_tokens 4000 --temperature 1".split())
    text = child.stdout.read(100)
    os.killpg(child.pid, signal.SIGINT)
    rest, report = child.communicate(timeout=60)
    assert text.startswith(b"It") and (text + rest).endswith(b"\n") and b"tokens/s" in report
    assert n > 1 or (child.returncode == 130 and b"Traceback" not in report)  # torchrun has a report of its own


def test_an_interrupt_while_torch_loads():
    """Guards against a traceback out of the imports, which take seconds."""
    child = run_python(1, TINY.parent / "sample.py")
    time.sleep(0.5)
    os.killpg(child.pid, signal.SIGINT)
    assert not child.communicate(timeout=60)[1] and child.returncode == -signal.SIGINT


# ----------------------------------------------------------------------------------------------------------------------
# The hook, and what --trace draws from it


@pytest.mark.parametrize("prompt_len", [1, 21])
def test_a_hook_sees_what_a_step_revises_and_changes_nothing(prompt_len):
    """What the step found and left of the past rows, and how far it moved them; the same logits, bit for bit. Guards against
    slots mixed up, rows read too late or not copied, and heads in another order."""
    model, tokens, steps, most = random_model(), random_tokens(2, 40), {0: [], 1: [], 2: []}, 0
    wanted = decode(model, SPARSE, tokens, prompt_len)[0]
    decoder, _ = start(model, SPARSE, tokens, prompt_len)
    for i, layer in enumerate(decoder.layers):
        assert layer.hook is None
        layer.hook = steps[i].append
    for t in range(prompt_len, 40):
        rows = np.arange(max(0, t - 3), t)

        def past(i, rows=rows):
            """Copies: K, V, outputs and log-sum-exps of the past rows, and how often a row has met a page."""
            cache = decoder.layers[i].cache
            k, v = (x[:, :, rows] for x in by_position(cache))
            return k, v, cache.out[:, rows % 4], cache.lse[:, rows % 4], cache.totals[..., 1].clone()

        found = [past(i) for i in (1, 2)]
        assert torch.equal(decoder.step(tokens[:, t]), wanted[:, t - prompt_len + 1])
        for i, before in zip((1, 2), found, strict=True):
            step, after = steps[i][-1], past(i)
            for seen, held in ((step.before, before), (step.after, after)):
                assert all(map(torch.equal, (seen.k, seen.v, seen.out, seen.lse), held))
            assert step.pages.flatten().tolist() == (decoder.layers[i].cache.last_loaded == t).nonzero()[:, 2].tolist()
            new, mass, *moved = sample.revisions(step, 8)
            assert ((before[4] + new.sum(-1)) == after[4]).all()
            lost = np.exp((before[3] - after[3]).numpy()).reshape(2, -1, 2, 3).mean(-1)  # (B, R, n_kv_head)
            close(mass, 1 - lost.swapaxes(1, 2), 1e-12)
            outputs = (x[2].reshape(2, -1, 2, 96).transpose(1, 2) for x in (before, after))
            for was, now, share in zip((next(outputs), *before[:2]), (next(outputs), *after[:2]), moved, strict=True):
                length = (was.numpy() ** 2).sum(-1)
                close(share, np.sqrt(((now - was).numpy() ** 2).sum(-1) / length), 1e-12)
            most = max(most, *(x.max() for x in moved[1:])) if i == 2 else most
    assert not steps[0] and most > 0.01


def test_marks_of_pages():
    """Five pages of 8 by hand: page 0 was loaded long ago, 2 and 4 by the step before; page 4 begins at token 32."""
    step = retro_attention.Step(33, None, torch.tensor([[[0, 2, 4]]]), torch.tensor([[[10, 32, 32]]]), None, None)
    assert ["".join(sample.mark_pages(step, 0, row, 8)) for row in (33, 32, 31)] == ["#.#.#", "+.-.-", "+.-. "]


def test_pictures_of_a_long_context_fit_the_screen(capsys):
    """131,072 tokens: no line has more than 100 characters, the strips stand below each other and lose no page; each row's
    numbers are its own, those of K and V from the layer above."""
    t, R, generator, tok = 131_071, 7, torch.Generator().manual_seed(0), Tokenizer.from_checkpoint(TINY)
    longest = max(range(4000), key=lambda i: len(repr(tok.decode([i]))))
    layers = [SimpleNamespace(dense=i < 3) for i in range(32)]
    decoder = SimpleNamespace(layers=layers, retro=RetroConfig(window=8), tokens=torch.full((1, t + 1), longest))
    trace = sample.Trace(decoder, tok, t, 9, layer=30, head=1)
    pages = torch.stack([torch.randperm(8192, generator=generator)[:50].sort().values for _ in "ab"])[None]  # (1, 2, 50)
    last_loaded = torch.randint(t - 9, t, (1, 2, 50), generator=generator)
    kv, out, lse = torch.randn(1, 2, R, 32), torch.randn(1, R, 6, 32), torch.zeros(1, R, 6)
    before, after = (retro_attention.PastRows(kv, kv, out, lse + i) for i in range(2))
    overwritten = retro_attention.PastRows(kv * (1 + torch.arange(7) / 100)[:, None], kv * 0.75, out, lse)
    for i in range(3, 32):
        layers[i].hook(retro_attention.Step(t, None, pages, last_loaded, before, overwritten if i == 31 else after))
    lines = [*trace.legend(), *capsys.readouterr().err.split("\n"), *trace.summary()]
    assert max(map(len, lines)) <= 100
    rows = [re.fullmatch(r"(t\S*) +'.{9} \|(.{44})\|(.*)", line) for line in lines if re.match(r"t(-\d)? +'", line)]
    assert [row[1] for row in rows] == ["t", *(f"t-{i}" for i in range(1, 8))]
    for back, row in enumerate(rows):
        marks = ["."] * 44  # 187 pages per character
        new = [page for page, loaded in zip(pages[0, 1].tolist(), last_loaded[0, 1].tolist(), strict=True) if loaded < t - back]
        for page in pages[0, 1].tolist():
            mark = "#" if back == 0 else "+" if page in new else "-"
            marks[page // 187] = max(marks[page // 187], mark, key=".-+#".index)
        assert row[2] == "".join(marks)
        # mass 1 - 1 / e; the output has not moved; K by 6 % in the newest past row, down to 0 in the oldest
        assert row[3].split() == ([f"{len(new)}", "63.21%", "0.00%", f"{7 - back}.00%", "25.00%"] if back else [])


def recorded(path):
    """The run that a page holds."""
    return json.loads(re.search('<script type="application/json" id="data">(.*?)</script>', path.read_text())[1])


@needs_triton
@pytest.mark.parametrize("window", [1, 3, 8])
def test_both_implementations_give_the_same_page(tmp_path, window):
    """Trained weights: the kernels together, over layers and steps, decide as the reference does, and leave
    in the cache what it leaves. Guards against the unused places of their list of pages."""
    model, tok, runs = Llama.from_checkpoint(TINY, device=DEVICE), Tokenizer.from_checkpoint(TINY), []
    if DEVICE != "cuda":  # the interpreter is slow
        model.layers, model.config.n_layer = model.layers[:3], 3
    idx = torch.tensor([tok.encode(retro_attention.__doc__, bos=True)[:150]], device=DEVICE)
    config = RetroConfig(page_size=4, budget=0.2, min_tokens=32, window=window, dense_layers=model.config.n_layer - 2)
    for impl in ("triton", "torch"):
        decoder = Decoder(model, 1, replace(config, impl=impl), max_seq_len=300)
        recorder = sample.Recorder(decoder, tok, 150, tmp_path / "run.html")
        list(decoder.stream(idx, 4, temperature=0))
        assert "3 steps" in recorder.summary()[0]
        runs.append(recorded(tmp_path / "run.html"))
    assert runs[0]["tokens"] == runs[1]["tokens"] and len(runs[0]["steps"]) == 3
    for found, wanted in zip(*(run["steps"] for run in runs), strict=True):
        for i, layer in found["layers"].items():
            for a, b in zip(layer, wanted["layers"][i], strict=True):
                assert a["pages"] == b["pages"] and a["new"] == b["new"] and a["width"].keys() == b["width"].keys()
                close(a["scores"] + list(a["width"].values()), b["scores"] + list(b["width"].values()), 0.2)  # of four digits
                close([a[x] for x in ("mass", "output", "k", "v")], [b[x] for x in ("mass", "output", "k", "v")], 1e-4)


PRESS = """<script>
const found = [];
onerror = message => found.push(message);
const text = id => document.getElementById(id).textContent, look = () => found.push(text("where") + "; " + text("chosen"));
const press = key => document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
onload = () => {
  look();
  for (const key of ["Home", "ArrowRight", "ArrowRight"]) { press(key); look(); }
  const cell = document.querySelector("#attend .row:nth-child(2) .cell.seen");
  cell.dispatchEvent(new MouseEvent("mouseenter"));
  found.push(text("reason"));
  const x = document.createElement("pre"); x.id = "found"; x.textContent = JSON.stringify(found); document.body.append(x);
};
</script>"""
BROWSER = next((path for name in ("chromium", "google-chrome", "chromium-browser") if (path := shutil.which(name))), None)


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium: the page is not opened")
def test_the_page_steps_and_explains(tmp_path, capsys):
    """In a browser: no error, it opens where something is new, the arrow key leads on, the pages shown are those that an
    independent run loads, and a cell says why it is what it is."""
    path, options = tmp_path / "run.html", "--max_new_tokens 6 --min_tokens 64 --window 3 --dense_layers 1 --temperature 0"
    args = ["--prompt", "FILE:LICENSE", *options.split(), "--trace", str(path)]
    code, _, report = run_main(sample.main, args, capsys)
    assert code == 0 and "5 steps written" in report
    path.write_text(path.read_text().replace("</head>", PRESS + "</head>"))
    quiet = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run --dump-dom".split()
    browse = [BROWSER, *quiet, f"--user-data-dir={tmp_path}/user", path.as_uri()]
    page = subprocess.run(browse, capture_output=True, timeout=120)
    opened, *found = json.loads(html.unescape(re.search('<pre id="found">(.*?)</pre>', page.stdout.decode())[1]))
    new = next(step["t"] for step in recorded(path)["steps"] if any(step["layers"]["1"][0]["new"]))
    assert opened.startswith(f"step t = {new} (")
    model, tok, loads = Llama.from_checkpoint(TINY), Tokenizer.from_checkpoint(TINY), []
    ids = tok.encode(Path("LICENSE").read_text(), bos=True)
    decoder = Decoder(model, 1, RetroConfig(min_tokens=64, window=3, dense_layers=1))
    decoder.layers[1].hook = lambda step: loads.append((step.t, step.pages[0, 0].tolist()))
    list(decoder.stream(torch.tensor([ids]), 4, temperature=0))
    assert len(loads) == 3 and len(found) == 4, found
    for i, (line, (t, pages)) in enumerate(zip(found, loads, strict=False), 1):
        assert line.startswith(f"step t = {t} ({i} of 5); loaded {len(pages)} of {t // 16 + 1} pages: ")
        assert line.endswith(": " + " ".join(map(str, pages)))
    assert re.match(r"Row t-1: last loaded at step \d+, this row stands at \d+: seen\.page \d+, positions", found[3])


def test_trace_draws_and_leaves_the_text_alone(capsys):
    """About ten pictures, an odd number of tokens apart, at the end a line for each sparse layer; on stdout only the text."""
    config, text = sample.read_checkpoint(TINY)[0], command(capsys)[1]
    code, out, report = command(capsys, "--trace 1:1 --window 3 --dense_layers 1")
    assert code == 0 and out != text  # another window, another text
    assert out == command(capsys, "--window 3 --dense_layers 1")[1]
    n = len(Tokenizer.from_checkpoint(TINY).encode("It was a dark night", bos=True))
    assert [int(t) for t in re.findall(r"\nposition (\d+), layer 1, KV head 1", report)] == list(range(n + 2, n + 15, 3))
    assert report.count("\nt-2 ") == 5 and "L2 K" in report and "means over 5 tokens" in report
    assert re.findall(r"\n +(\d+) +\d+\.\d( +\d+\.\d\d)( +\d+\.\d\d%){4}(?=\n)", report)[-1][0] == str(config.n_layer - 1)
    quest = command(capsys, "--trace --attention quest")[2]
    assert "layer 0, KV head 0, every 3" in quest and "\nt-1" not in quest and "nan" not in quest
    last = command(capsys, f"--trace {config.n_layer - 1}")[2]
    assert "\nt-1 " in last and f"L{config.n_layer}" not in last
    assert "\nposition" not in command(capsys, "--trace --max_new_tokens 1")[2]


# ----------------------------------------------------------------------------------------------------------------------
# The documentation


def pages():
    """Path and text of the pages that there are."""
    paths = (Path(__file__).parent / name for name in ("README.md", "tiny/README.md", "docs/measured.md"))
    return [(path, path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def documented_commands():
    """(file, arguments) of each command on a page, in a block marked bash, that runs one of our files."""
    for _, text in pages():
        blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        lines = "".join(blocks).replace("\\\n", " ").splitlines()
        for part in itertools.chain.from_iterable(line.split("&&") for line in lines):
            words = shlex.split(part, comments=True)
            for i, word in enumerate(words):
                if word.endswith(".py") and "python" in words[:i]:
                    yield word, list(itertools.takewhile(lambda w: w not in (">", "|"), words[i + 1 :]))


@pytest.mark.parametrize("script, args", list(documented_commands()), ids=lambda x: x if isinstance(x, str) else " ".join(x))
def test_documented_commands_parse(script, args, capsys):
    """Guards against an option that was renamed in the code and not on the page."""
    parse = {"sample.py": sample.parse_args, "bench.py": bench.parse_args, "tiny/train.py": tiny.train.parse_args}[script]
    try:
        parse(args)
    except SystemExit as stop:
        assert stop.code == 0, capsys.readouterr().err  # --help


def test_the_python_of_the_readme_runs(monkeypatch, capsys):
    """One block after the other. Its attention module, with a full budget, gives what a prompt of the whole text gives."""
    monkeypatch.chdir(TINY.parent)
    blocks, names = re.findall(r"^```python\n(.*?)^```", pages()[0][1], re.MULTILINE | re.DOTALL), {}
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    assert capsys.readouterr().out.count("torch.Size([1, 128])") == 10
    assert "min_tokens=32" in blocks[2]
    exec(blocks[2].replace("min_tokens=32", "budget=1.0"), names)
    ids, newest_output = names["ids"], names["newest_output"]
    found = newest_output(torch.cat((ids[:, -1:], ids[:, :1]), 1), torch.tensor(210))
    close(found, newest_output(torch.cat((ids, ids[:, :1]), 1)), 1e-5)


def test_names_in_the_documentation_exist():
    """Every file, every step of the method and every `name.name` that the pages point at."""
    assert {script for script, _ in documented_commands()} == {"sample.py", "bench.py", "tiny/train.py"}
    known = (retro_attention, sample, bench, retro_attention.RetroAttention, Llama, Tokenizer, Decoder)
    known = {module.__name__: module for module in known}
    readme = pages()[0][1]
    steps = re.findall(r"^\d\. \*\*`(\w+)`\*\*", readme, re.MULTILINE)
    assert steps == ["write", "score", "select", "attend", "combine"] and all(hasattr(retro_attention, s) for s in steps)
    assert "RetroAttention.decode" in readme
    for path, text in pages():
        assert not set(re.findall(r"`(test_\w+)`", text)) - globals().keys(), path
        for owner, name in re.findall(r"\b(\w+)\.(?!py\b)(\w+)", text):
            assert owner not in known or hasattr(known[owner], name), f"{path}: {owner}.{name}"
        for link in re.findall(r"\]\(([\w./-]+)\)", text):
            assert (path.parent / link).exists(), f"{path}: {link}"
