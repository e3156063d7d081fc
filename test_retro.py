"""What must hold: the reference against oracles that share no code with it, the kernels against the reference in float64.

`oracle` decodes a whole model from the paper's text in plain numpy: no pages in memory, no output cache, no log-sum-exp.
For every row it keeps the set of key positions that the row has seen, and the sums of exp(q.k) and of exp(q.k) v over them,
taken when each key was first seen. Two outputs over disjoint key sets are then merged by adding; no step is shared with
`retro_attention.py`. The kernels run on a GPU if there is one, else in Triton's interpreter.
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
import time
import zipfile
from dataclasses import replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

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
SPARSE = RetroConfig(page_size=8, budget=0.2, min_tokens=16, window=4, dense_layers=1)


# ----------------------------------------------------------------------------------------------------------------------
# The oracle


def rope_frequencies(config):
    """Radians a token of each pair, with Llama 3.1's scaling as its three cases: short, long and middling wavelengths."""
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


def oracle(model, retro, tokens, prompt_len):
    """Teacher-forced decoding of (B, T) tokens: logits after positions prompt_len-1 .. T-1, and each layer's state."""
    c, w, tokens = model.config, {n: p.double().numpy() for n, p in model.weights().items()}, tokens.numpy()
    (B, T), heads, hs = tokens.shape, (c.n_kv_head, c.n_head // c.n_kv_head), c.head_size
    layers = [
        SimpleNamespace(
            k=np.zeros((B, c.n_kv_head, T, hs)), v=np.zeros((B, c.n_kv_head, T, hs)), num=np.zeros((B, *heads, T, hs)),
            den=np.zeros((B, *heads, T)), seen=np.zeros((B, c.n_kv_head, T, T), bool), sights=np.zeros((B, c.n_kv_head), int),
        )
        for _ in range(c.n_layer)
    ]  # fmt: skip
    logits = []
    for t in range(prompt_len - 1, T):
        prefill = t < prompt_len
        rows = np.arange(0 if prefill else max(0, t - retro.window + 1), t + 1)
        x = w["tok_embeddings.weight"][tokens[:, rows]]  # (B, rows, dim): past rows start from their ids again
        for i, s in enumerate(layers):
            name = f"layers.{i}."
            y = rms_norm(x, w[name + "attention_norm.weight"], c.norm_eps)
            q, k, v = ((y @ w[f"{name}attention.w{m}.weight"].T).reshape(B, len(rows), -1, hs) for m in "qkv")
            q = rotate(q, rows, c).reshape(B, len(rows), *heads, hs).transpose(0, 2, 3, 1, 4)
            s.k[:, :, rows], s.v[:, :, rows] = rotate(k, rows, c).swapaxes(1, 2), v.swapaxes(1, 2)
            o = oracle_attend(q, s, rows, retro, prefill or i < retro.dense_layers)
            x = x + o.transpose(0, 3, 1, 2, 4).reshape(B, len(rows), -1) @ w[name + "attention.wo.weight"].T
            x = x + swiglu(rms_norm(x, w[name + "ffn_norm.weight"], c.norm_eps), w, name + "feed_forward.")
        head = w["tok_embeddings.weight" if c.tie_embeddings else "output.weight"]
        logits.append(rms_norm(x[:, -1], w["norm.weight"], c.norm_eps) @ head.T)
    return np.stack(logits, 1), layers


# ----------------------------------------------------------------------------------------------------------------------
# Helpers


def random_model(n_head=6, n_kv_head=2, hs=32, n_layer=3, max_seq_len=256, seed=0, **kwargs):
    """A small random model in float64 whose attention is sharp enough for the choice of pages to matter."""
    torch.manual_seed(seed)
    config = dict(dim=n_head * hs, n_layer=n_layer, n_head=n_head, n_kv_head=n_kv_head, vocab_size=61, ffn_dim=96)
    model = Llama(LlamaConfig(**{**config, "max_seq_len": max_seq_len, "rope_theta": 1000.0, **kwargs})).double()
    for name, p in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
        elif name.endswith(("wqkv.weight",)):
            p.data *= 3
    return model.eval().requires_grad_(False)


def random_tokens(B, T, seed=0):
    return torch.randint(61, (B, T), generator=torch.Generator().manual_seed(seed))


def start(model, retro, tokens, prompt_len, fill=math.nan):
    """A decoder after its prefill. All memory of its caches held `fill` before: nothing may depend on it."""
    decoder = Decoder(model, len(tokens), retro, max_seq_len=min(model.config.max_seq_len, tokens.shape[1] + 40))
    for layer in decoder.layers:
        for x in (layer.cache.k, layer.cache.v, layer.cache.k_min, layer.cache.k_max):
            if x is not None:
                x.fill_(fill)
    return decoder, decoder.prefill(tokens[:, :prompt_len])


def decode(model, retro, tokens, prompt_len, fill=math.nan):
    """The same as `oracle`, by the module: logits (B, T - prompt_len + 1, vocab) and the decoder."""
    decoder, first = start(model, retro, tokens, prompt_len, fill)
    return torch.stack([first] + [decoder.step(tokens[:, i]) for i in range(prompt_len, tokens.shape[1])], 1), decoder


def new_layer(retro, q, k, max_seq_len=128):
    """One sparse layer of RetroAttention for the shapes of q (B, T, n_head, hs) and k (B, T, n_kv_head, hs)."""
    return RetroAttention(
        retro, dense=False, batch_size=len(q), n_head=q.shape[2], n_kv_head=k.shape[2], head_size=q.shape[3],
        max_seq_len=max_seq_len, device="cpu", dtype=q.dtype,
    )  # fmt: skip


def random_qkv(B=2, T=75, n_head=6, n_kv_head=2, hs=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, n, hs, generator=generator, dtype=torch.float64) * 1.5 for n in (n_head, n_kv_head, n_kv_head)]


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


def close(a, b, tol):
    """Element by element, absolutely; NaN is close to nothing but NaN."""
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=tol)


# ----------------------------------------------------------------------------------------------------------------------
# Steps 1-3: bounds, score, selection


def test_bounds_hold_and_are_tight_after_every_overwriting_step():
    """Invariant 1. Guards against running minima that cannot shrink again, and unwritten keys inside the bounds."""
    model, tokens = random_model(), random_tokens(2, 60)
    decoder, _ = start(model, SPARSE, tokens, 21)
    for t in range(21, 60):
        decoder.step(tokens[:, t])
        for layer in decoder.layers[1:]:
            cache, q = layer.cache, torch.randn(2, 1, 6, 32, dtype=torch.float64)
            keys = cache.k.flatten(2, 3)[:, :, : t + 1].numpy()
            bounds = score(q, cache, torch.tensor(t))
            total = np.zeros(bounds.shape)
            for g in range(3):  # the query heads of a KV head: 0 .. 2 share the first
                one = q[:, 0, g::3].numpy()  # (B, n_kv_head, hs)
                for j in range(t // 8 + 1):
                    page = keys[:, :, j * 8 : j * 8 + 8]
                    close(cache.k_min[:, :, j], page.min(2), 0)
                    close(cache.k_max[:, :, j], page.max(2), 0)
                    bound = np.maximum(one * page.min(2), one * page.max(2)).sum(-1)
                    assert (np.einsum("bhd,bhkd->bhk", one, page) <= bound[..., None] + 1e-12).all()
                    total[:, :, j] += bound
            close(bounds, total, 1e-12)


def test_store_shrinks_the_bounds_when_a_key_is_overwritten():
    """Invariant 1. A key of 100 is replaced by 1: the page's bounds must forget the 100, and other pages keep theirs."""
    q, k, v = random_qkv(T=20)
    cache = new_layer(SPARSE, q, k).cache
    k[:, 17] = 100
    store(k, v, cache, 19)
    before = cache.k_max[:, :, :2].clone()
    k[:, 17:] = 1
    store(k[:, 17:], v[:, 17:], cache, 19)
    close(cache.k_max[:, :, 2], k[:, 16:].amax(1), 0)
    close(cache.k_min[:, :, 2], k[:, 16:].amin(1), 0)
    assert torch.equal(cache.k_max[:, :, :2], before)


def test_ties_go_to_the_lower_page_and_the_window_is_always_loaded():
    """Guards against topk's free choice among equals, and an off-by-one in the pages that the window touches."""
    q, k, v = random_qkv(T=100)
    retro = RetroConfig(page_size=8, budget=0.3, min_tokens=16, window=4)
    for t, _, layer in run_layer(retro, q, torch.zeros_like(k), v, prompt_len=30):
        count, held, window = pages_to_load(retro, t)
        others = [j for j in range(held) if j not in window]
        expected = sorted(window) + others[: count - len(window)]
        for loaded in layer.cache.last_loaded.flatten(0, 1) == t:
            assert loaded.nonzero().flatten().tolist() == sorted(expected)


def test_pages_selected_is_exact_in_decimal():
    """0.07 * 100 pages is 7; in binary floating point 8. Then the floor, the window's older pages on top, all pages."""
    assert RetroConfig(page_size=16, budget=0.07, min_tokens=1).pages_selected(1599) == 7
    assert RetroConfig(page_size=16, budget=0.3, min_tokens=1).pages_selected(159) == 3
    assert RetroConfig(page_size=16, budget=0.01, min_tokens=256).pages_selected(16 * 500 + 1) == 16
    assert RetroConfig(page_size=16, budget=0.01, min_tokens=256).pages_selected(16 * 500) == 17
    assert RetroConfig(page_size=8, budget=0.01, min_tokens=1, window=8).pages_selected(64) == 2
    assert RetroConfig(page_size=8, budget=0.01, min_tokens=1, window=1).pages_selected(64) == 1
    for hundredths in range(1, 101, 3):
        for W in (1, 2, 8):
            retro = RetroConfig(page_size=4, budget=hundredths / 100, min_tokens=9, window=W)
            assert all(retro.pages_selected(t) == pages_to_load(retro, t)[0] for t in range(0, 400, 3))


# ----------------------------------------------------------------------------------------------------------------------
# Steps 4-5: supplementary attention, merge, output cache


@pytest.mark.parametrize("W, prompt_len", [(1, 9), (2, 20), (4, 1), (4, 24), (8, 3), (8, 30)])
def test_union(W, prompt_len):
    """Invariant 2. A row that leaves the window holds softmax attention over the union of the pages loaded meanwhile.

    Guards against a missing causal mask, keys seen twice or never, a row that is not popped, and lse = 0 for an empty set.
    """
    q, k, v = random_qkv()
    retro, loads, gained = RetroConfig(page_size=8, budget=0.2, min_tokens=8, window=W), {}, 0
    for t, o, layer in run_layer(retro, q, k, v, prompt_len):
        loads[t] = layer.cache.last_loaded == t  # (B, n_kv_head, P): what the module says it loaded, whatever it is
        row = t - W + 1  # leaves the window after this step
        for b, head in np.ndindex(2, 6) if row >= 0 else ():
            union = range(len(loads[t][0, 0])) if row < prompt_len else set()
            own = set() if row < prompt_len else set(loads[row][b, head // 3].nonzero().flatten().tolist())
            for step in range(max(row, prompt_len), t + 1):
                union = {*union, *loads[step][b, head // 3].nonzero().flatten().tolist()}
            out, lse = softmax_over(q[b, row, head], k[b, :, head // 3], v[b, :, head // 3],
                                    [j for j in range(row + 1) if j // 8 in union])  # fmt: skip
            close(o[b, 0, head], out, 1e-12)
            close(layer.cache.lse[b, row % W, head], lse, 1e-12)
            gained += len(union - own) if own else 0
    assert W == 1 or gained > 100, "no row has learnt anything: the test is empty"


def test_merge_of_any_partition_is_the_whole():
    """Invariant 3. Attention over the parts of a random partition, some of them empty, is attention over the whole."""
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
    """Invariant 3. Nothing merged in is the identity, bit for bit; nothing with nothing is o = 0, lse = -inf, and no NaN."""
    o, lse = torch.randn(1, 5, 32).double(), torch.tensor([[-900.0, -1, 0, 1, 900]]).double()
    none = torch.zeros_like(o), torch.full_like(lse, -torch.inf)
    for pair in ((torch.cat((o, none[0])), torch.cat((lse, none[1]))), (torch.cat((none[0], o)), torch.cat((none[1], lse)))):
        assert torch.equal(merge(*pair)[0], o[0]) and torch.equal(merge(*pair)[1], lse[0])
    empty = merge(torch.cat((none[0], none[0])), torch.cat((none[1], none[1])))
    assert (empty[0] == 0).all() and (empty[1] == -torch.inf).all()


def test_attend_to_nothing():
    """Invariant 3. A past row for which no page is new, or that stands before the text, gets o = 0 and lse = -inf."""
    q, k, v = random_qkv(T=20)
    cache = new_layer(RetroConfig(page_size=8, window=4), q, k).cache
    store(k, v, cache, 19)
    pages, t = torch.arange(3).expand(2, 2, 3), torch.tensor(19)
    o, lse = attend(q[:, -4:], cache, pages, torch.full_like(pages, 18), t)
    assert (o[0, :, :-1] == 0).all() and (lse[0, :, :-1] == -torch.inf).all()
    assert (o[0, :, -1] != 0).all() and lse[0, :, -1].isfinite().all()
    o, lse = attend(q[:, -4:], cache, pages[..., :1], torch.full_like(pages[..., :1], -1), torch.tensor(1))
    assert (o[0, :, :2] == 0).all() and (lse[0, :, :2] == -torch.inf).all()
    assert lse[0, :, 2:].isfinite().all()


def test_window_one_is_quest():
    """Invariant 5. Against Quest written again from its paper, one head and one page at a time."""
    q, k, v = random_qkv(T=90)
    for t, o, _ in run_layer(RetroConfig(page_size=8, budget=0.35, min_tokens=8, window=1), q, k, v, prompt_len=20):
        last = t // 8
        for b, h in np.ndindex(2, 2):
            ranked = []
            for page in range(last):  # the last page is loaded without being asked
                keys, bound = k[b, page * 8 : page * 8 + 8, h], 0.0
                for x in q[b, t, h * 3 : h * 3 + 3]:
                    bound += torch.maximum(x * keys.amin(0), x * keys.amax(0)).sum().item()
                ranked.append((-bound, page))
            budget = -(-35 * (last + 1) // 100)  # 35 % of the pages, rounded up
            chosen = [last] + [page for _, page in sorted(ranked)[: budget - 1]]
            keys = [j for j in range(t + 1) if j // 8 in chosen]
            for head in range(h * 3, h * 3 + 3):
                close(o[b, 0, head], softmax_over(q[b, t, head], k[b, :, h], v[b, :, h], keys)[0], 1e-12)


@pytest.mark.parametrize("position", [30, 32, 35, 39, 40])
def test_a_past_row_never_sees_a_later_token(position):
    """Invariant 6, in one layer: another k and v at `position` changes no earlier row, at no step, in no bit.

    The page of `position` is loaded in both runs as long as an earlier row is in the window, so both load the same pages.
    """
    q, k, v = random_qkv(T=60)
    retro = RetroConfig(page_size=8, budget=0.2, min_tokens=8, window=8)
    k2, v2 = k.clone(), v.clone()
    k2[:, position] *= -3
    v2[:, position] += 5
    for (t, a, _), (_, b, _) in zip(run_layer(retro, q, k, v, 20), run_layer(retro, q, k2, v2, 20), strict=True):
        if t - 7 >= position:
            break
        before = max(0, min(8, position - (t - 7)))  # rows of the window in front of `position`
        assert torch.equal(a[:, :before], b[:, :before])
        assert t < position or ((a - b)[:, before].abs().amax(-1) > 1e-6).all()  # but the row itself, in every head


def test_a_past_row_of_the_model_never_sees_a_later_token():
    """Invariant 6, through all layers; with all pages loaded, since the choice of pages does depend on the newest token."""
    model, tokens, position = random_model(), random_tokens(2, 40), 26
    other = tokens.clone()
    other[:, position] = (tokens[:, position] + 1) % 61
    recorded = []
    model.layers[-1].attention.register_forward_hook(lambda module, args, x: recorded[-1].append(x.clone()))
    for run in (tokens, other):
        recorded.append([])
        decode(model, RetroConfig(page_size=8, budget=1.0, window=4, dense_layers=0), run, 20)
    for t, a, b in zip([19, *range(20, 40)], *recorded, strict=True):
        rows = torch.arange(20) if t == 19 else torch.arange(t - 3, t + 1)
        assert torch.equal(a[:, rows < position], b[:, rows < position])
        assert not (t == position and torch.equal(a[:, -1], b[:, -1]))


# ----------------------------------------------------------------------------------------------------------------------
# The model: limits, overwriting, memory


@pytest.mark.parametrize("W", [1, 2, 4, 8, 100])
@pytest.mark.parametrize("limits", [dict(budget=1.0, min_tokens=1), dict(budget=0.01, min_tokens=1000)])
def test_all_pages_is_dense(W, limits):
    """Invariant 4. With all pages loaded, for either reason, nothing is left to correct: the logits are dense attention's."""
    model, tokens = random_model(), random_tokens(2, 50)
    logits, _ = decode(model, RetroConfig(page_size=8, window=W, dense_layers=0, **limits), tokens, 13)
    close(logits, model(tokens)[:, 12:], 1e-10)


@pytest.mark.parametrize("prompt_len", [1, 30])
def test_dense_decoding_is_the_uncached_forward(prompt_len):
    """Invariant 8. Guards against a position off by one between prefill, cache and RoPE."""
    model, tokens = random_model(rope_scaling=8.0, tie_embeddings=True), random_tokens(3, 50)
    close(decode(model, None, tokens, prompt_len)[0], model(tokens)[:, prompt_len - 1 :], 1e-10)


def test_overwriting_changes_only_what_it_should():
    """Invariant 7. The first sparse layer's K, V depend on no sparse attention: overwriting writes what was there.

    Deeper layers' change. Outside the window the cache is untouched, bit for bit.
    """
    model, tokens, W = random_model(n_layer=4), random_tokens(2, 60), SPARSE.window
    decoder, _ = start(model, SPARSE, tokens, 21)
    changed = np.zeros((4, 2))
    for t in range(21, 60):
        before = [[x.flatten(2, 3).clone() for x in (layer.cache.k, layer.cache.v)] for layer in decoder.layers]
        decoder.step(tokens[:, t])
        for i, layer in enumerate(decoder.layers):
            for kv, x in enumerate((layer.cache.k.flatten(2, 3), layer.cache.v.flatten(2, 3))):
                outside = torch.ones(x.shape[2], dtype=torch.bool)
                outside[t - W + 1 : t + 1] = False
                assert torch.equal(x[:, :, outside].nan_to_num(77), before[i][kv][:, :, outside].nan_to_num(77))
                past = slice(t - W + 1, t)
                changed[i, kv] = max(changed[i, kv], (x[:, :, past] - before[i][kv][:, :, past]).abs().max())
    assert (changed[:2] < 1e-12).all() and (changed[2:] > 1e-3).all(), changed


@pytest.mark.parametrize("W, prompt_len", [(1, 20), (4, 2), (8, 21)])
def test_what_was_never_written_is_never_read(W, prompt_len):
    """Invariant 7. Fresh memory may hold anything, also NaN, which a weight of zero would not remove."""
    model, tokens = random_model(), random_tokens(2, 50)
    retro = RetroConfig(page_size=8, budget=0.2, min_tokens=16, window=W, dense_layers=1)
    clean, _ = decode(model, retro, tokens, prompt_len, fill=0.0)
    assert clean.isfinite().all()
    for fill in (math.nan, math.inf, 1e30):
        assert torch.equal(decode(model, retro, tokens, prompt_len, fill)[0], clean)


def test_a_second_prompt_starts_afresh():
    """Guards against outputs, last_loaded and counts of one text that leak into the next one of the same decoder."""
    model, retro, tokens = random_model(), SPARSE, random_tokens(2, 90)
    decoder, _ = start(model, retro, tokens.flip(1), 70)
    decoder.step(tokens[:, 0])
    again = [decoder.prefill(tokens[:, :30])] + [decoder.step(tokens[:, i]) for i in range(30, 90)]
    fresh, other = decode(model, retro, tokens, 30)
    assert torch.equal(torch.stack(again, 1), fresh)
    assert torch.equal(decoder.layers[-1].cache.totals, other.layers[-1].cache.totals)


def test_a_second_prompt_forgets_what_overflowed():
    """An infinite value in one text's output cache must not reach the next one: 0 * inf is NaN, a weight of zero keeps it."""
    model, tokens = random_model(), random_tokens(2, 40)
    decoder, _ = start(model, SPARSE, tokens, 30)
    for layer in decoder.layers[1:]:
        layer.cache.out.fill_(torch.inf)
    decoder.prefill(tokens[:, :30])
    assert all(layer.cache.out.isfinite().all() for layer in decoder.layers[1:])
    decoder.layers[1].cache.out[:, 30 % SPARSE.window] = torch.inf  # of the row that leaves at the next step
    assert decoder.step(tokens[:, 30]).isfinite().all() and decoder.layers[1].cache.out.isfinite().all()


@pytest.mark.parametrize("W", [1, 4])
def test_a_text_may_begin_without_a_prompt(W):
    """Guards against a position that claims a token which nobody has written."""
    model, tokens = random_model(), random_tokens(2, 20)
    decoder = Decoder(model, 2, RetroConfig(page_size=8, window=W, dense_layers=0), max_seq_len=20)
    close(torch.stack([decoder.step(tokens[:, i]) for i in range(20)], 1), model(tokens), 1e-10)
    with pytest.raises(ValueError, match="the prompt has 1 texts: must be 2"):
        decoder.prefill(tokens[:1])


def test_a_step_past_the_end_of_the_cache_is_refused():
    """Guards against a write outside of the cache, which a GPU would not notice."""
    decoder, _ = start(random_model(max_seq_len=64), SPARSE, random_tokens(1, 63), 63)
    decoder.step(torch.tensor([1]))
    with pytest.raises(IndexError, match="position 64 is past the end of the cache of 64 tokens"):
        decoder.step(torch.tensor([1]))


def test_output_cache_is_independent_of_the_length():
    """Invariant 9. W rows of n_head * (hs + 1) float32 numbers a sequence, for a model in half precision too."""
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
        close(cache.k.flatten(2, 3)[:, :, :T], s.k, tol)
        close(cache.v.flatten(2, 3)[:, :, :T], s.v, tol)
        if i < retro.dense_layers:
            continue
        num, den = (x.reshape(B, -1, *x.shape[3:])[:, :, window] for x in (s.num, s.den))  # (B, n_head, rows ...)
        close(cache.out[:, window % retro.window].transpose(1, 2), num / den[..., None], tol)
        close(cache.lse[:, window % retro.window].transpose(1, 2), np.log(den), tol)
        assert np.array_equal(cache.totals[..., 1], s.sights)
        assert retro.window == 1 or s.sights.min() > 0, "no supplementary output in the whole run: the case is empty"
        assert (cache.totals[..., 0] == sum(pages_to_load(retro, t)[0] for t in range(prompt_len, T))).all()


CASES = [  # n_head, n_kv_head, hs, page_size, W, B, prompt_len, T, dense_layers, budget
    (2, 2, 32, 8, 2, 1, 30, 81, 0, 0.15),
    (3, 1, 64, 8, 4, 3, 41, 90, 1, 0.2),
    (6, 2, 64, 16, 8, 1, 57, 120, 0, 0.15),
    (4, 1, 128, 32, 2, 1, 100, 150, 1, 0.3),
    (8, 2, 32, 16, 1, 3, 50, 100, 0, 0.15),
    (8, 1, 32, 8, 8, 3, 3, 60, 0, 0.1),
    (16, 2, 32, 16, 4, 1, 64, 110, 2, 0.2),
    (3, 3, 128, 8, 1, 1, 20, 60, 1, 0.2),
    (4, 4, 32, 32, 8, 1, 1, 120, 0, 0.3),
    (6, 2, 32, 8, 2, 1, 1, 70, 0, 0.15),
    (6, 2, 32, 1, 4, 2, 5, 50, 0, 0.3),
    (6, 2, 32, 4, 16, 2, 15, 60, 0, 0.3),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_random_models_against_the_oracle(case):
    """Invariant 11. GQA ratios, batches, ragged pages, windows, page and head sizes; prompts shorter than the window too."""
    n_head, n_kv_head, hs, page_size, W, B, prompt_len, T, dense_layers, budget = case
    model = random_model(n_head, n_kv_head, hs)
    retro = RetroConfig(page_size=page_size, budget=budget, min_tokens=10, window=W, dense_layers=dense_layers)
    check_against_oracle(model, retro, random_tokens(B, T), prompt_len, 1e-10)


@pytest.mark.parametrize("W", [1, 2, 8])
def test_the_shipped_checkpoint_against_the_oracle(W):
    """Guards against a checkpoint, a tokenizer and a RoPE layout that do not belong together, and against trained weights'
    large values, on which shortcuts that hold for random ones fail."""
    model, tokenizer = Llama.from_checkpoint(TINY, dtype=torch.float64), Tokenizer.from_checkpoint(TINY)
    tokens = torch.tensor([tokenizer.encode(retro_attention.__doc__, bos=True)[:265]])  # any text will do
    assert tokens.shape == (1, 265)
    retro = RetroConfig(page_size=16, budget=0.15, min_tokens=64, window=W, dense_layers=1)
    check_against_oracle(model, retro, tokens, 201, 1e-9)


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
    """A cache as a decode step to position t finds it, filled with noise; NaN stands wherever nothing was written yet."""
    gen = torch.Generator().manual_seed(seed)
    cache = retro_attention.new_cache(config, False, B, n_kv_head * G, n_kv_head, hs, t + 20, "cpu", dtype)
    for x in (cache.k, cache.v, cache.k_min, cache.k_max):
        x.fill_(torch.nan)
    if t > 0:
        k, v = (torch.randn(B, t, n_kv_head, hs, generator=gen).to(dtype) for _ in range(2))
        retro_attention.store(k, v, cache, t - 1)
        held = (t - 1) // config.page_size + 1
        # Most pages were loaded within the last few steps, so that each row finds some that it has seen and some it has not.
        recent = t - torch.randint(1, 2 * config.window + 2, (B, n_kv_head, held), generator=gen)
        cache.last_loaded[:, :, :held] = recent.clamp(min=-1)
    cache.out.normal_(generator=gen)
    cache.lse.normal_(generator=gen)
    cache.lse[:, 0] = -torch.inf  # one row has seen nothing so far
    for name in ("k", "v", "k_min", "k_max", "last_loaded", "out", "lse", "totals"):
        setattr(cache, name, getattr(cache, name).to(DEVICE))
    return cache, gen


# B, n_kv_head, t, min_tokens: where a sequence may stand
PLACES = [
    (1, 1, 397, 200),  # several tiles a split; the last page is ragged
    (3, 1, 127, 32),  # it is full
    (1, 1, 64, 8),  # it has just begun, and the window lies in two pages
    (1, 2, 40, 256),  # below the floor: all pages are selected
    (3, 1, 3, 8),  # fewer tokens than rows, for the larger windows
    (1, 1, 0, 8),  # the very first token
]
SHAPES = list(itertools.product((1, 3, 4, 8), (1, 2, 4, 8), (8, 16, 32), (32, 64, 128)))  # G, W, page size, hs


@pytest.mark.parametrize(
    "i, shape", list(enumerate(SHAPES)), ids=lambda x: "-".join(map(str, x)) if isinstance(x, tuple) else ""
)
def test_kernels_equal_their_twins(i, shape):
    """Each kernel, given what its twin is given, writes and returns the same; what was never written is NaN and stays out."""
    # 144 shapes, 6 places and 2 or 3 dtypes: every pair of values meets, not every combination.
    check_kernels(*shape, *PLACES[(i + i // 6) % 6], list(KERNEL_DTYPES)[(i + i // 3) % len(KERNEL_DTYPES)])


def in_float64(cache):
    """A copy for the reference to work on: the oracle of a kernel is its twin in float64, on the kernel's own inputs."""
    cache = copy.deepcopy(cache)
    for name in ("k", "v", "k_min", "k_max", "out", "lse"):
        setattr(cache, name, getattr(cache, name).double())
    return cache


def check_kernels(G, W, ps, hs, B, n_kv_head, t, min_tokens, dtype, budget=0.3):
    """One decode step, kernel by kernel."""
    config = RetroConfig(page_size=ps, budget=budget, min_tokens=min_tokens, window=W)
    cache, gen = cache_at(config, B, n_kv_head, G, hs, t, dtype, seed=t)
    position, held, S = torch.tensor(t, device=DEVICE), t // ps + 1, config.pages_selected(t)
    heads = [n_kv_head * G, n_kv_head, n_kv_head]  # slices of one product, as in the model
    q, k, v = torch.randn(B, W, sum(heads), hs, generator=gen).to(DEVICE, dtype).split(heads, dim=2)
    angles = torch.randn(t + 1, hs // 2, generator=gen).to(DEVICE)
    cos, sin = angles.cos(), angles.sin()

    twin = in_float64(cache)
    wanted = retro_attention.write(q.double(), k.double(), v.double(), cos.double(), sin.double(), twin, position)
    q = kernels.write(q, k, v, cos, sin, cache, position)
    real = slice(max(0, W - 1 - t), None)  # rows before the start are nobody's
    assert_close(q[:, real], wanted[:, real], dtype, "write: q")
    for name, n in (("k", t + 1), ("v", t + 1), ("k_min", held), ("k_max", held)):
        found, wanted = (getattr(c, name).flatten(2, -2) for c in (cache, twin))
        assert_close(found[:, :, :n], wanted[:, :, :n], dtype, f"write: {name}")
        assert found[:, :, n:].isnan().all(), f"write: {name} after position t"

    twin = in_float64(cache)
    scores = kernels.score(q, cache, position)
    error = (scores[:, :, :held] - retro_attention.score(q.double(), twin, position)).abs()
    # The terms of a score cancel: a rounding error is small against the sum of their sizes, not against the score.
    sizes = torch.maximum(twin.k_min.abs(), twin.k_max.abs())[:, :, :held] * q[:, -1:].abs().view(B, n_kv_head, G, hs).sum(
        2, True
    )
    assert (error <= 2e-6 * sizes.sum(-1)).all(), "score"

    scores[:, :, held:] = torch.nan
    wanted_pages, wanted_last_loaded = retro_attention.select(scores[:, :, :held].clone(), twin, position)
    pages, last_loaded = kernels.select(scores, cache, position)
    assert torch.equal(pages[:, :, :S], wanted_pages) and torch.equal(last_loaded[:, :, :S], wanted_last_loaded), "select"
    assert torch.equal(cache.last_loaded, twin.last_loaded) and torch.equal(cache.totals, twin.totals), "select: tables"

    for what, lists, wanted_lists in (
        ("attend, dense", (None, None), (None, None)),
        ("attend", (pages, last_loaded), (wanted_pages, wanted_last_loaded)),
    ):
        parts = kernels.attend(q, cache, *lists, position)
        o, lse = retro_attention.merge(*parts)
        wanted_o, wanted_lse = retro_attention.attend(q.double(), twin, *wanted_lists, position)
        assert_close(o, wanted_o[0], dtype, f"{what}: o")
        assert_close(lse, wanted_lse[0], dtype, f"{what}: lse")

    wanted = retro_attention.combine(*(x.double() for x in parts), twin, position)
    assert_close(kernels.combine(*parts, cache, position), wanted, dtype, "combine")
    assert_close(cache.out, twin.out, torch.float32, "combine: out")
    assert_close(cache.lse, twin.lse, torch.float32, "combine: lse")


@needs_triton
@pytest.mark.parametrize("seed", range(300 if DEVICE == "cuda" else 12))
def test_kernels_in_random_configurations(seed):
    """Budgets, floors and positions that nobody thought of, in a dozen odd shapes (each is compiled anew on a GPU)."""
    G, W, ps, hs = [
        (1, 1, 1, 16), (2, 3, 2, 32), (3, 5, 4, 64), (4, 2, 8, 128), (5, 8, 16, 32), (6, 4, 64, 64),
        (7, 1, 32, 128), (8, 8, 16, 128), (1, 8, 8, 64), (4, 4, 16, 128), (2, 2, 1, 64), (3, 7, 8, 16),
    ][seed % 12]  # fmt: skip
    draw = random.Random(seed).choice
    t, min_tokens, B = draw(range(2000 if DEVICE == "cuda" else 300)), draw((1, 10, 64, 500)), draw((1, 2, 3))
    dtype = list(KERNEL_DTYPES)[seed // 12 % len(KERNEL_DTYPES)]
    check_kernels(G, W, ps, hs, B, draw((1, 2)), t, min_tokens, dtype, budget=draw((0.01, 0.07, 0.15, 0.5, 1.0)))


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


@needs_triton
@pytest.mark.parametrize("kind", ["equal", "few values", "zeros of both signs", "negative", "huge"])
def test_select_kernel_ties_and_extremes(kind):
    """Equal scores go to the lower pages, also when they are 0.0 and -0.0; scores of any size keep their order."""
    config = RetroConfig(page_size=8, budget=0.4, min_tokens=8, window=4)
    t, held = 101, 13
    cache, gen = cache_at(config, 1, 2, 1, 32, t, torch.float32, seed=1)
    twin, position = copy.deepcopy(cache), torch.tensor(t, device=DEVICE)
    scores = torch.randn(1, 2, held, generator=gen)
    scores = {
        "equal": torch.full_like(scores, -2.5),
        "few values": scores.round(),
        "zeros of both signs": scores.sign() * 0.0,
        "negative": -scores.abs(),
        "huge": scores * torch.tensor([1e4, 1e37])[None, :, None],
    }[kind].to(DEVICE)
    room = torch.nn.functional.pad(scores, (0, cache.k.shape[2] - held), value=torch.nan)
    pages, last_loaded = retro_attention.select(scores, twin, position)
    S = config.pages_selected(t)
    for found, wanted in zip(kernels.select(room, cache, position), (pages, last_loaded), strict=True):
        assert torch.equal(found[:, :, :S], wanted)
    if kind == "equal":  # 6 of 13 pages: the window's own, and the lowest of the others
        assert pages.tolist() == [[[0, 1, 2, 3, 4, 12]] * 2]


@needs_triton
@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1])
def test_select_kernel_takes_nan_as_the_largest(bits):
    """A NaN's bits, of either sign, must not run over the ends of the search and of the list: it is taken as infinity is."""
    cache, gen = cache_at(RetroConfig(page_size=8, budget=0.4, min_tokens=8), 1, 2, 1, 32, 101, torch.float32, seed=1)
    twin, position = copy.deepcopy(cache), torch.tensor(101, device=DEVICE)
    scores = torch.randn(1, 2, cache.k.shape[2], generator=gen)
    scores[0, 0, 5:7] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    wanted, _ = retro_attention.select(scores[..., :13].nan_to_num(torch.inf).to(DEVICE), twin, position)
    found, _ = kernels.select(scores.to(DEVICE), cache, position)
    assert torch.equal(found[..., : wanted.shape[2]], wanted) and {5, 6} <= set(wanted[0, 0].tolist())


@needs_triton
@pytest.mark.parametrize("t", [32_000, 40_000])
def test_select_kernel_of_many_pages(t):
    """Beyond 32,768 pages two counts no longer fit 32 bits."""
    cache, gen = cache_at(RetroConfig(page_size=1, budget=0.9), 1, 1, 1, 16, t, torch.float32, seed=t)
    twin, position = copy.deepcopy(cache), torch.tensor(t, device=DEVICE)
    scores = torch.randn(1, 1, cache.k.shape[2], generator=gen).to(DEVICE)
    wanted, _ = retro_attention.select(scores[..., : t + 1].clone(), twin, position)
    assert torch.equal(kernels.select(scores, cache, position)[0][..., : wanted.shape[2]], wanted)


@needs_triton
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_attend_kernel_empty_supplements_and_extreme_scores(dtype):
    """Past rows for which nothing is new get o = 0 and lse = -inf; scores of 1e4 neither overflow nor lose the newest row."""
    config = RetroConfig(page_size=8, budget=1.0, window=4)
    t = 75
    cache, gen = cache_at(config, 1, 1, 2, 32, t + 1, dtype, seed=2)
    position = torch.tensor(t, device=DEVICE)
    pages = torch.arange(t // 8 + 1, dtype=torch.int32, device=DEVICE).view(1, 1, -1)
    q = torch.randn(1, 4, 2, 32, generator=gen).to(DEVICE, dtype) * 1e3  # scores of up to about 1e4
    for last_loaded in (torch.full_like(pages, t - 1), torch.full_like(pages, -1)):
        o, lse = retro_attention.merge(*kernels.attend(q, cache, pages, last_loaded, position))
        wanted_o, wanted_lse = retro_attention.attend(q, cache, pages, last_loaded, position)
        assert_close(o, wanted_o[0], dtype, "o")
        assert_close(lse, wanted_lse[0], dtype, "lse")
        assert (lse[:, :-1] == -torch.inf).all() == (last_loaded == t - 1).all() and lse[:, -1].isfinite().all()


@needs_triton
@pytest.mark.parametrize("window", [1, 2, 8])
def test_same_greedy_tokens_through_triton_and_torch(window):
    """The shipped checkpoint, float32: the kernels together, over several layers and steps, decide as the reference does."""
    model, tok = Llama.from_checkpoint(TINY, device=DEVICE), Tokenizer.from_checkpoint(TINY)
    idx = torch.tensor(tok.encode(retro_attention.__doc__, bos=True)[:200], device=DEVICE).view(2, 100)
    n = 256 if DEVICE == "cuda" else 6  # the interpreter is slow
    config = {"page_size": 8, "budget": 0.2, "min_tokens": 32, "window": window, "dense_layers": 1}
    found, wanted = (
        model.generate(idx, n, retro=RetroConfig(impl=impl, **config), temperature=0).tolist() for impl in ("triton", "torch")
    )
    assert found == wanted


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
        for i in range(100, 290):
            assert torch.equal(eager.step(text[:, i]), graphed.step(text[:, i])), f"position {i}"
        graphed.layers[-1].hook = (lambda step: None) if text is tokens else None  # eager steps in the middle of replays
        for i in range(290, 300):
            assert torch.equal(eager.step(text[:, i]), graphed.step(text[:, i])), f"position {i}"
            graphed.layers[-1].hook = None
    assert graphed.graph is not None and eager.graph is None


@needs_triton
@pytest.mark.parametrize("dtype, head_size, rows, message", [
    (torch.float64, 32, 2, "dtype must be .* not torch.float64"), (torch.float32, 24, 2, "head_size must be .* not 24"),
    (torch.float32, 32, 129, "at most 128, not 129"), (torch.float32, 32, 2, None),
])  # fmt: skip
def test_triton_is_refused_where_it_cannot_run(monkeypatch, dtype, head_size, rows, message):
    """A ValueError that says what to do, before anything runs; auto takes the reference instead."""
    cpu = torch.device("cpu")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        implementation("triton", cpu, dtype, head_size, rows)
    assert implementation("auto", cpu, dtype, head_size, rows) is retro_attention
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if message is None:
        assert implementation("triton", cpu, dtype, head_size, rows).__name__ == "kernels"
        assert implementation("auto", torch.device("cuda"), dtype, head_size, rows).__name__ == "kernels"
        return
    with pytest.raises(ValueError, match=message):
        implementation("triton", cpu, dtype, head_size, rows)
    assert implementation("auto", torch.device("cuda"), dtype, head_size, rows) is retro_attention


# ----------------------------------------------------------------------------------------------------------------------
# Parts of the model


@pytest.mark.parametrize("name, value", [
    ("page_size", 0), ("page_size", 12), ("page_size", 8.0), ("budget", 0), ("budget", 1.01), ("budget", math.nan),
    ("min_tokens", 0), ("window", 0), ("window", 1.5), ("dense_layers", -1), ("impl", "cuda"),
])  # fmt: skip
def test_a_config_out_of_range_is_named(name, value):
    """The message holds the name, what is allowed, and the value."""
    with pytest.raises(ValueError, match=f"{name} must be .+, not {value!r}$"):
        RetroConfig(**{name: value})


@pytest.mark.parametrize("bad", [dict(n_head=4), dict(n_kv_head=4), dict(dim=21), dict(n_layer=0), dict(max_seq_len=1.5)])
def test_an_impossible_model_is_refused(bad):
    """Guards against heads that silently lose a part of the embedding."""
    shape = dict(dim=30, n_layer=1, n_head=3, n_kv_head=3, vocab_size=8, ffn_dim=8, max_seq_len=8)
    LlamaConfig(**shape)
    with pytest.raises(ValueError, match=next(iter(bad))):
        LlamaConfig(**{**shape, **bad})


@pytest.mark.parametrize("scaling, theta", [(None, 10_000.0), (8.0, 500_000.0), (32.0, 500_000.0)])
def test_rope(scaling, theta):
    """Neighbouring pairs turn like complex numbers; Llama 3.1's scaling in its published form of three cases."""
    config, rows = LlamaConfig(384, 1, 3, 3, 8, 8, 5000, rope_theta=theta, rope_scaling=scaling), [0, 1, 17, 4098, 4999]
    x = torch.randn(2, 5, 3, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cos, sin = rope_table(config, config.max_seq_len, "cpu", torch.float64)
    close(apply_rope(x, cos[rows], sin[rows]), rotate(x.numpy(), rows, config), 1e-10)
    cos, sin = rope_table(config, config.max_seq_len, "cpu", torch.bfloat16)  # whose 8 bits could not tell position 4098 from 4099
    assert cos.dtype == torch.float32 and apply_rope(x.bfloat16(), cos[rows], sin[rows]).dtype == torch.bfloat16


@pytest.mark.parametrize("prompt_len", [1, 33, 59])
def test_score(prompt_len):
    """Guards against log-probabilities of a neighbour's token: dense against the forward pass, sparse against the oracle."""
    model, tokens = random_model(), random_tokens(2, 60)
    sparse = torch.from_numpy(oracle(model, SPARSE, tokens, prompt_len)[0])  # after positions prompt_len-1 .. 59
    for retro, logits in ((None, model(tokens)[:, prompt_len - 1 :]), (SPARSE, sparse)):
        expected = logits[:, :-1].log_softmax(-1).gather(2, tokens[:, prompt_len:, None]).squeeze(2)
        found = model.score(tokens, prompt_len, retro=retro)
        assert found.dtype == torch.float32
        close(found, expected, 1e-5)
    for bad in (0, 60):
        with pytest.raises(ValueError, match=f"prompt_len must be between 1 and 59, not {bad}"):
            model.score(tokens, bad)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


def assert_decodes_its_own_forward(model, tokens):
    wanted = model(tokens)[:, 9:-1].log_softmax(dim=-1).gather(2, tokens[:, 10:, None])[..., 0]
    assert (model.score(tokens, 10, retro=None) - wanted).abs().max() < 1e-5


def test_decoding_follows_the_weights():
    """Decode steps read copies of the weights laid side by side: not those of before, and a model can still be trained."""
    model, tokens = random_model().float(), random_tokens(2, 30)
    with torch.inference_mode():
        model.generate(tokens, 2, retro=SPARSE)
    model.requires_grad_()(tokens).sum().backward()
    with torch.no_grad():
        model.layers[1].attention.wv.weight.data = torch.randn_like(model.layers[1].attention.wv.weight) * 0.1
        assert_decodes_its_own_forward(model, tokens)
        model.layers[2].feed_forward.w3.weight.mul_(-2)
        assert_decodes_its_own_forward(model, tokens)
        model.double()
        assert_decodes_its_own_forward(model, tokens)
        biased = random_model(qkv_bias=True).float()
        biased.generate(tokens, 2, retro=SPARSE)
        biased.layers[1].attention.wv.bias.data = torch.randn_like(biased.layers[1].attention.wv.bias)
        assert_decodes_its_own_forward(biased, tokens)


def test_a_model_loaded_in_inference_mode_decodes():
    """Its weights were inference tensors once, and no longer usable after they had been laid side by side."""
    tokens, wanted = random_tokens(1, 12), Llama.from_checkpoint(TINY)
    with torch.inference_mode():
        model = Llama.from_checkpoint(TINY)
        assert torch.equal(model.score(tokens, 5), wanted.score(tokens, 5)) and torch.equal(model(tokens), wanted(tokens))


@pytest.mark.parametrize("retro", [None, SPARSE])
def test_greedy_generation_takes_the_likeliest(retro):
    """Dense against the uncached forward pass, sparse against the oracle, each fed with the text that came out."""
    model, prompt = random_model(), random_tokens(2, 30)
    text = model.generate(prompt, 20, retro=retro, temperature=0)
    logits = oracle(model, retro, text, 30)[0] if retro else model(text)[:, 29:].numpy()
    assert torch.equal(text[:, :30], prompt) and np.array_equal(text[:, 30:], logits[:, :-1].argmax(-1))
    for only_one in (dict(top_k=1), dict(top_p=1e-6)):
        assert torch.equal(model.generate(prompt, 20, retro=retro, temperature=3.0, seed=1, **only_one), text)


def test_seed():
    """Same seed, same text; another seed, another text; rows of a batch draw on their own, and are equal when greedy."""
    model, prompt = random_model(), random_tokens(1, 20).expand(2, 20)
    first, again, other = (model.generate(prompt, 30, retro=SPARSE, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first[0], first[1])
    greedy = model.generate(prompt, 30, retro=SPARSE, temperature=0)
    assert torch.equal(greedy[0], greedy[1])


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


@pytest.mark.parametrize("change, message", [
    (dict(temperature=-1), "temperature must be 0 or a finite number >= 1e-6, not -1"),
    (dict(temperature=math.nan), "temperature .+ nan"),
    (dict(top_k=0), "top_k must be >= 1, not 0"), (dict(top_p=0), "top_p must be in .+, not 0"),
    (dict(top_p=1.5), "top_p must be in .+, not 1.5"), (dict(max_new_tokens=0), "max_new_tokens must be >= 1, not 0"),
    (dict(idx=random_tokens(1, 0)), "prompt has 0 tokens"), (dict(idx=random_tokens(1, 64)), "prompt has 64 tokens"),
    (dict(idx=random_tokens(1, 65)), "prompt has 65 tokens"), (dict(retro=RetroConfig(impl="triton")), "triton"),
    (dict(retro=RetroConfig(dense_layers=4)), "dense_layers must be between 0 and .+ 3 layers, not 4"),
])  # fmt: skip
def test_generate_names_what_is_wrong(change, message, monkeypatch):
    """One clear ValueError for what a user can get wrong, not an error from inside PyTorch."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=message):
        random_model(max_seq_len=64).generate(**{"idx": random_tokens(1, 20), "max_new_tokens": 5, **change})


def test_weights_that_overflow_are_said():
    """In the prompt, and not sampled from: with temperature 0 the text would be garbage, else an error from inside PyTorch."""
    model = random_model()
    model.layers[1].feed_forward.w2.weight[0, 0] = math.inf
    with pytest.raises(ValueError, match="logits are not finite"):
        model.generate(random_tokens(1, 20), 5, temperature=0)


@pytest.mark.parametrize("T", [0, 65])
def test_the_forward_pass_refuses_what_is_not_in_the_context(T):
    """Guards against a slice of the RoPE table that silently ends early."""
    model = random_model(max_seq_len=64)
    for call in (model, Decoder(model, 1).prefill):
        with pytest.raises(ValueError, match=f"{T} tokens.* between 1 and the context of 64"):
            call(random_tokens(1, T))


# ----------------------------------------------------------------------------------------------------------------------
# Files


def write_tokenizer(folder, change=lambda lines: lines):
    """256 bytes and four merges, in Llama 3's format."""
    tokens = [bytes([i]) for i in range(256)] + [b"th", b" th", b"the", b" the"]
    lines = [base64.b64encode(token) + b" %d" % i for i, token in enumerate(tokens)]
    (folder / "tokenizer.model").write_bytes(b"\n".join(change(lines)))


def test_tokenizer(tmp_path):
    """Round trip of any text, merges by rank, special tokens only on request, Llama 3.1's order of stop tokens."""
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_checkpoint(tmp_path)
    for text in ("", "the other", "Ünïcødé 你好 🙂\r\n\t 1234  x", "<|end_of_text|> the"):
        for special in (False, True):
            ids = tokenizer.encode(text, bos=True, special=special)
            assert ids[0] == tokenizer.bos == 260 and tokenizer.decode(ids[1:]) == text
            assert b"".join(map(tokenizer.token_bytes, ids[1:])) == text.encode()
            assert (261 in ids) == (special and "end_of_text" in text)
    assert tokenizer.encode("the the") == [258, 259] and tokenizer.decode([0xE4]) == "\ufffd"
    assert tokenizer.vocab_size == 260 + 256
    assert tokenizer.stop_tokens == [261, 268, 269]  # 128001, 128008 and 128009 in Llama 3.1, whose first is 128000


@pytest.mark.parametrize("change, message", [
    (lambda lines: [b"\x00\xff binary"], "line 1 is not"), (lambda lines: lines[:9] + [b"YQ=="], "line 10 is not"),
    (lambda lines: lines[:9] + [b"YWE= x"], "line 10 is not"), (lambda lines: lines[:255], "256 single bytes"),
    (lambda lines: lines[:-2] + lines[-1:], "ranks must be 0"), (lambda lines: lines + [b"YWFh 259"], "ranks must be 0"),
])  # fmt: skip
def test_a_broken_tokenizer_file_is_refused(tmp_path, change, message):
    """Guards against a truncated download, which would decode to nonsense."""
    with pytest.raises(ValueError, match="tokenizer.model is missing"):
        Tokenizer.from_checkpoint(tmp_path)
    write_tokenizer(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_checkpoint(tmp_path)


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


def test_params_of_a_published_model():
    """Llama 3.1 8B's params.json means 14,336 inside SwiGLU and scaled RoPE over 131,072 tokens; Llama 3's means 8,192."""
    params = dict(dim=4096, n_layers=32, n_heads=32, vocab_size=128_256, ffn_dim_multiplier=1.3, multiple_of=1024)
    config = config_from_params({**params, "n_kv_heads": 8, "use_scaled_rope": True})
    assert (config.ffn_dim, config.rope_scaling, config.max_seq_len, config.n_kv_head) == (14_336, 8.0, 131_072, 8)
    config = config_from_params(params)
    assert (config.rope_scaling, config.max_seq_len, config.n_kv_head) == (None, 8_192, 32)
    small = {**params, "dim": 2048, "ffn_dim_multiplier": 1.5, "multiple_of": 256, "use_scaled_rope": True}  # Llama 3.2 1B
    assert [getattr(config_from_params(small), name) for name in ("ffn_dim", "rope_scaling")] == [8192, 32.0]
    assert config_from_params({**small, "rope_scaling_factor": 16}).rope_scaling == 16
    with pytest.raises(ValueError, match="rope_scaling must be a number > 0, not 0"):
        config_from_params({**small, "rope_scaling_factor": 0})
    with pytest.raises(ValueError, match="ffn_dim_multiplier must be a number > 0, not inf"):
        config_from_params({**params, "ffn_dim_multiplier": math.inf})


@pytest.mark.parametrize("change, message", [
    (dict(without=["layers.1.attention.wq.weight"]), "layers.1.attention.wq.weight .*no such tensor"),
    (dict(weights={"layers.2.ffn_norm.weight": torch.ones(48)}), "layers.2.ffn_norm.weight .*unknown name"),
    (dict(weights={"norm.weight": torch.ones(49)}), r"norm.weight should have shape \(48,\), the file has \(49,\)"),
    (dict(weights={"norm.weight": [1.0] * 48}), "dictionary of tensors"), (dict(params={"n_heads": 5}), "n_head 5"),
    (dict(params={"n_layers": 3}), "layers.2.* no such tensor"), (dict(params={"vocab_size": 60}), r"\(60, 48\), .*\(61, 48\)"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_named(tmp_path, change, message):
    """Guards against strict=False: a tensor left out, of another shape, or of another model, is an error with its name."""
    write_checkpoint(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        Llama.from_checkpoint(tmp_path)


def test_a_missing_or_broken_params_file_is_named(tmp_path):
    """One clear ValueError for a folder or a file that is not there, and for a params.json that is something else."""
    write_checkpoint(tmp_path)
    for text, message in (
        ("{", "not JSON"),
        ("[1]", "a JSON object was expected, not list"),
        ("{}", "dim must be .* not .missing"),
    ):
        (tmp_path / "params.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Llama.from_checkpoint(tmp_path)
    for name, message in (("consolidated.00.pth", "consolidated.00.pth is missing"), ("params.json", "neither params.json")):
        (tmp_path / name).unlink()
        with pytest.raises(ValueError, match=message):
            Llama.from_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        Llama.from_checkpoint(tmp_path / "nowhere")


def test_a_file_that_is_not_weights_is_refused_and_not_run(tmp_path):
    """Truncated, empty, foreign and hostile files: one ValueError, and no code out of the file is executed."""
    write_checkpoint(tmp_path)
    path, trap = tmp_path / "consolidated.00.pth", tmp_path / "trap"
    whole = path.read_bytes()

    def refused():
        with pytest.raises(ValueError, match="not a readable PyTorch file of weights|dictionary of tensors"):
            Llama.from_checkpoint(tmp_path)

    for content in (whole[: len(whole) // 2], whole[:-100], b"", b"hello", b"(lp0\nI1\na."):  # the last is a pickled [1]
        path.write_bytes(content)
        refused()
    for value in ([torch.ones(3)], torch.ones(3), {"norm.weight": Decimal(1)}):
        torch.save(value, path)
        refused()
    with zipfile.ZipFile(path, "w") as file:  # PyTorch's format, around a pickle that calls open(trap, "w")
        file.writestr("x/data.pkl", f"cbuiltins\nopen\n(V{trap.as_posix()}\nVw\ntR.")
        file.writestr("x/version", "3\n")
    refused()
    assert not trap.exists()


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face folders


@pytest.mark.parametrize("names, wanted", [
    (["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"],
     "<|begin_of_text|>[user]\n\nthe?<|eot_id|>[assistant]\n\nso<|eot_id|>[user]\n\nthe?<|eot_id|>[assistant]\n\n"),
    (["<|im_start|>", "<|im_end|>"], "<|im_start|>user\nthe?<|im_end|>\n<|im_start|>assistant\nso<|im_end|>\n"
     "<|im_start|>user\nthe?<|im_end|>\n<|im_start|>assistant\n"),
    (["<|begin_of_text|>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<|start_header_id|>"],
     "<|begin_of_text|><｜User｜>the?<｜Assistant｜>so<｜end▁of▁sentence｜><｜User｜>the?<｜Assistant｜><think>\n"),
])  # fmt: skip
def test_chat_formats(names, wanted):
    """The three published formats; what a user writes never becomes a special token."""
    special = {name: 256 + i for i, name in enumerate(names)}
    tok = Tokenizer({bytes([b]): b for b in range(256)}, special, bos=special.get("<|begin_of_text|>"))
    wanted = wanted.replace("[", "<|start_header_id|>").replace("]", "<|end_header_id|>")
    said = "<think>hm</think>so" if "<｜User｜>" in names else "so"
    assert tok.chat([("user", "the?"), ("assistant", said), ("user", "the?")]) == tok.encode(wanted, special=True)
    assert tok.chat([("user", names[0])]).count(256) == tok.chat([("user", "the?")]).count(256)
    if "<|eot_id|>" in names:
        assert tok.chat([("user", " the?\n")]) == tok.chat([("user", "the?")])  # Llama's is stripped
    for wrong in (("tool", "the?"), {"role": "user", "content": "the?"}):
        with pytest.raises(ValueError, match="a role, system, user or assistant"):
            tok.chat([wrong])
    with pytest.raises(ValueError, match="no special tokens for a conversation"):
        Tokenizer({bytes([b]): b for b in range(256)}, {}).chat([("user", "the?")])


def save_safetensors(path, weights, header=None):
    """The format by its description: 8 bytes of length, a JSON header, the tensors one after the other."""
    entries, data = {"__metadata__": {"format": "pt"}}, b""
    for name, w in weights.items():
        raw = w.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        dtype = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16"}[w.dtype]
        entries[name] = {"dtype": dtype, "shape": list(w.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    header = json.dumps(entries).encode() if header is None else header
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def write_hugging_face(folder, qkv_bias=False, config=(), shards=1):
    """`random_model` as Hugging Face stores it, under their names, a head's two halves RoPE's pairs; returns the model."""
    model = random_model(hs=16, n_layer=2, ffn_dim=128, rope_scaling=8.0, rope_theta=500_000.0, qkv_bias=qkv_bias)
    names = {
        "tok_embeddings": "model.embed_tokens", "layers": "model.layers", "norm": "model.norm", "output": "lm_head",
        "attention": "self_attn", "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj",
        "feed_forward": "mlp", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj",
        "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    weights = {}
    for name, w in model.state_dict().items():
        if ".wq." in name or ".wk." in name:
            heads = w.view(-1, 16, *w.shape[1:])
            w = torch.cat((heads[:, 0::2], heads[:, 1::2]), dim=1).view(w.shape)
        weights[".".join(names.get(part, part) for part in name.split("."))] = w
    files = [f"model-{i + 1}.safetensors" for i in range(shards)] if shards > 1 else ["model.safetensors"]
    for i, file in enumerate(files):
        save_safetensors(folder / file, dict(list(weights.items())[i::shards]))
    if shards > 1:
        index = {name: files[i % shards] for i, name in enumerate(weights)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    scaling = dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    contents = dict(
        model_type="qwen2" if qkv_bias else "llama", hidden_size=96, num_hidden_layers=2, num_attention_heads=6, vocab_size=61,
        num_key_value_heads=2, intermediate_size=128, rms_norm_eps=1e-5, max_position_embeddings=256, rope_theta=500_000.0,
        rope_scaling=scaling, hidden_act="silu",
    ) | dict(config)  # fmt: skip
    (folder / "config.json").write_text(json.dumps({k: v for k, v in contents.items() if v != "left out"}))
    return model


@pytest.mark.parametrize("qkv_bias, shards", [(False, 1), (False, 3), (True, 2)])
def test_a_hugging_face_folder_is_the_same_model(tmp_path, qkv_bias, shards):
    """Guards against a RoPE layout converted twice or not at all: the logits are those of Meta's layout, bit for bit."""
    model, tokens = write_hugging_face(tmp_path, qkv_bias, shards=shards), random_tokens(2, 40)
    save_safetensors(tmp_path / "other.safetensors", {"model.norm.weight": torch.ones(96)})  # nobody names it
    loaded = Llama.from_checkpoint(tmp_path, dtype=torch.float64)
    assert loaded.config == model.config and torch.equal(loaded(tokens), model(tokens))
    assert_decodes_its_own_forward(loaded, tokens)  # with its biases
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), **config.pop("rope_scaling")}  # transformers 5
    config.update(tie_word_embeddings=True, head_dim=16)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model.output.weight.copy_(model.tok_embeddings.weight)
    assert torch.equal(Llama.from_checkpoint(tmp_path, dtype=torch.float64)(tokens), model(tokens))


@pytest.mark.parametrize("config, message", [
    ({"hidden_size": "left out"}, "hidden_size is missing"), ({"use_sliding_window": True}, "use_sliding_window True"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type must be"), ({"mlp_bias": True}, "mlp_bias True"),
    ({"quantization_config": {}}, "quantised"), ({"head_dim": 15}, "head_size"), ({"attention_bias": True}, "attention_bias"),
    ({"head_dim": "16"}, "head_size"), ({"rope_scaling": "linear"}, "rope 'linear'"), ({"rms_norm_eps": math.inf}, "norm_eps"),
    ({"dual_chunk_attention_config": {}}, "dual_chunk_attention_config {}"),
    ({"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 1, "high_freq_factor": 4,
                       "original_max_position_embeddings": 8192}}, "rope_scaling must be a number > 0"),
])  # fmt: skip
def test_what_a_config_asks_for_and_we_do_not_do_is_refused(tmp_path, config, message):
    """By name, before any weight is read: a model that loads must be computed as its makers meant it."""
    write_hugging_face(tmp_path, config=config)
    with pytest.raises(ValueError, match=message):
        Llama.from_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    with pytest.raises(ValueError, match="model_type must be llama or qwen2, not 'mixtral'"):
        Llama.from_checkpoint(tmp_path)


def test_broken_safetensors_are_refused(tmp_path):
    """Truncated files, absurd headers, missing shards and tensors: one ValueError each, naming the file or tensor."""
    write_hugging_face(tmp_path, shards=2)
    file = tmp_path / "model-1.safetensors"
    whole = file.read_bytes()

    def refused(message):
        with pytest.raises(ValueError, match=message):
            Llama.from_checkpoint(tmp_path)

    for content, message in (
        (whole[:-1], "truncated"), (whole[:100], "truncated"), (b"", "truncated"),
        ((2**62).to_bytes(8, "little"), "a header of 4611"),
        (whole.replace(b'"F64"', b'"I64"', 1), "dtype I64"), (whole[:8] + b"[" + whole[9:], "header is not"),
        (whole.replace(b"[0, ", b"[-1,", 1), "header is not"), (whole.replace(b'"F64"', b"[123]", 1), "dtype"),
    ):  # fmt: skip
        file.write_bytes(content)
        refused(message)
    save_safetensors(file, {})
    refused("the index names model.embed_tokens.weight, which model-1.safetensors does not hold")
    file.unlink()
    refused("model-1.safetensors is missing")
    (tmp_path / "model.safetensors.index.json").unlink()
    refused("model.safetensors is missing")
    (tmp_path / "model-2.safetensors").rename(tmp_path / "model.safetensors")
    refused("no such tensor")


def write_tokenizer_json(folder, **changes):
    """The tokenizer of `write_tokenizer` as Hugging Face writes it; returns both."""
    write_tokenizer(folder)
    ours = Tokenizer._from_ranks(folder)
    shown = {b: chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))}
    shown |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in shown)}
    spell = lambda token: "".join(shown[b] for b in token)  # noqa: E731
    split = {"type": "Split", "pattern": {"Regex": Tokenizer.pattern}}
    file = {
        "added_tokens": [{"id": 260, "content": "<|start|>"}, {"id": 261, "content": "<|stop|>"}],
        "pre_tokenizer": {"pretokenizers": [split, {"type": "ByteLevel", "use_regex": False}]},
        "model": {
            "vocab": {spell(t): i for t, i in ours.bpe._mergeable_ranks.items()},
            "merges": ["t h", "Ġ th", "th e", "Ġ the"],
        },
        "post_processor": {"single": ["<|start|>", "A"]},
    } | changes
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 260, "eos_token_id": 261}))
    (folder / "tokenizer.json").write_text(json.dumps(file))
    return ours, file


def test_a_tokenizer_from_json(tmp_path):
    """The same ids from tokenizer.json as from ranks, and special tokens; ids that only the model has are no text."""
    ours, _ = write_tokenizer_json(tmp_path)
    theirs = Tokenizer.from_checkpoint(tmp_path)
    for text in ("the other", "Ünïcødé 你好 🙂\r\n\t 1234  x \0", "<|stop|> the"):
        assert theirs.encode(text) == ours.encode(text) and theirs.decode(theirs.encode(text)) == text
    assert theirs.encode("<|stop|>", bos=True, special=True) == [260, 261]
    assert theirs.decode([258, 9999, 258]) == "thethe"  # Qwen's models have ids that their tokenizers do not know


def test_first_and_last_tokens_are_as_the_folder_says(tmp_path):
    """Begin of text from the post-processor or the options, of several files the later one, and null says nothing."""
    write_tokenizer_json(tmp_path)
    theirs = Tokenizer.from_checkpoint(tmp_path)
    assert (theirs.bos, theirs.stop_tokens) == (260, [261])
    write_tokenizer_json(tmp_path, post_processor=None)  # Qwen names a first token that no text begins with
    assert Tokenizer.from_checkpoint(tmp_path).encode("the", bos=True) == [258]
    for said, start in ((False, []), (True, [260])):  # Qwen and DeepSeek say it here
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": said}))
        assert Tokenizer.from_checkpoint(tmp_path).encode("the", bos=True) == [*start, 258]
    for said, bos, stops in (
        ({"bos_token_id": 261, "eos_token_id": 0}, 261, [0]),
        ({"eos_token_id": None}, 260, [261]),  # not said
    ):
        (tmp_path / "generation_config.json").write_text(json.dumps(said))
        tokenizer = Tokenizer.from_checkpoint(tmp_path)
        assert (tokenizer.bos, tokenizer.stop_tokens) == (bos, stops)


def test_another_tokenizer_is_refused(tmp_path):
    """Another kind of BPE, or none: ids that only look right would be worse."""
    _, file = write_tokenizer_json(tmp_path)
    split, to_bytes = file["pre_tokenizer"]["pretokenizers"]
    for change, message in (
        ({"pre_tokenizer": {"pretokenizers": [split, {**to_bytes, "use_regex": True}]}}, "of another kind"),
        ({"normalizer": {"type": "Lowercase"}}, "of another kind"),
        ({"model": {**file["model"], "merges": ["th e", "t h"]}}, "tokenizer.json is"),
        ({"model": {**file["model"], "vocab": {"a": 0}}}, "tokenizer.json is"),
        ({"model": {**file["model"], "merges": [1]}}, "tokenizer.json is"),
    ):
        write_tokenizer_json(tmp_path, **change)
        with pytest.raises(ValueError, match=message):
            Tokenizer.from_checkpoint(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# The benchmark


BENCH = RetroConfig(page_size=8, budget=0.2, min_tokens=16, window=1, dense_layers=0, impl="torch")


def neighbour(name, retro, prompt_len=45, T=110):
    """Yields (t, output (B, 1, n_head, hs)) of one layer of a neighbour, and what goes in: q, k, v before rotation."""
    q, k, v = random_qkv(T=T)
    config = random_model().config
    layer = bench.LAYERS[name](new_layer(retro, q, k).cache)
    cos, sin = rope_table(config, config.max_seq_len, "cpu", torch.float64)
    layer.cache.k.fill_(math.nan), layer.cache.v.fill_(math.nan)
    rotated = [apply_rope(x[:, :prompt_len], cos[:prompt_len], sin[:prompt_len]) for x in (q, k)]
    layer.prefill(*rotated, v[:, :prompt_len])
    steps = ((t, layer.decode(*(x[:, t : t + 1] for x in (q, k, v)), cos, sin, torch.tensor(t))) for t in range(prompt_len, T))
    turn = lambda x: torch.from_numpy(rotate(x.numpy(), np.arange(T), config))  # noqa: E731
    return steps, q, k, v, turn(q), turn(k)


def weights_over(q, k, keys):
    """Softmax weights of each query head of q (n_head, hs) over the positions `keys` of k (T, n_kv_head, hs)."""
    logits = np.stack([k.numpy()[keys, h // 3] @ q[h].numpy() / math.sqrt(q.shape[1]) for h in range(len(q))])
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)  # (n_head, keys)


def check_output(o, q, k, v, t, kept_of):
    """o (B, n_head, hs) is attention of the rotated q over the positions kept_of(b, KV head)."""
    for b, h in np.ndindex(2, 6):
        close(o[b, h], softmax_over(q[b, t, h], k[b, :, h // 3], v[b, :, h // 3], kept_of(b, h // 3))[0], 1e-11)


def test_streaming_llm_keeps_sinks_and_recent_tokens_and_renumbers_them():
    """The list of what is held, the oldest but four dropped when it is too long; keys rotated by their place in the list.

    Guards against sinks at their old distance, and against tokens that come back when the budget grows.
    """
    steps, q, k, v, *_ = neighbour("StreamingLLM", BENCH)
    held, config, grown = list(range(45)), random_model().config, 0
    for t, o in steps:
        held.append(t)
        while len(held) > pages_to_load(BENCH, t)[0] * 8:
            del held[4]
        grown += len(held) < pages_to_load(BENCH, t)[0] * 8
        places = np.arange(len(held))
        keys = torch.from_numpy(rotate(k[:, held].numpy(), places, config))
        query = torch.from_numpy(rotate(q[:, [t]].numpy(), places[-1:], config))
        check_output(o[:, 0], query, keys, v[:, held], 0, lambda b, h, places=places: places)
    assert grown > 3, "the budget has never grown: the test is weaker than it should be"


def test_tova_evicts_the_least_attended_token_of_the_layer():
    """One list a text; after a step the tokens that its query attended to least, over all heads, make room for the next."""
    steps, _, _, v, q, k = neighbour("TOVA", BENCH)
    kept = [list(range(45)), list(range(45))]

    def evict(b, t):
        mean = weights_over(q[b, t], k[b], kept[b]).mean(0)
        while len(kept[b]) > pages_to_load(BENCH, t + 1)[0] * 8 - 1:
            lowest = int(mean.argmin())
            mean = np.delete(mean, lowest)
            del kept[b][lowest]

    for b in range(2):
        evict(b, 44)
    for t, o in steps:
        for b in range(2):
            kept[b].append(t)
            assert len(kept[b]) <= pages_to_load(BENCH, t)[0] * 8
        check_output(o[:, 0], q, k, v, t, lambda b, h: kept[b])
        for b in range(2):
            evict(b, t)
    assert kept[0] != kept[1] and kept[0] != list(range(110 - len(kept[0]), 110))


def test_refreshkv_alternates_all_tokens_and_the_best_of_the_last_time(monkeypatch):
    """Every 10th step reads all; in between the tokens since then, and the best of that time in the room that is left."""
    monkeypatch.setattr(bench, "REFRESH", 10)
    steps, _, _, v, q, k = neighbour("RefreshKV", BENCH)
    ranked, last = {}, 44
    for t, o in steps:
        if t == 45 or (t - 45) % 10 == 0:  # after the prompt, and after each full step at 54, 64, ...
            last = t - 1
            for b, h in np.ndindex(2, 2):
                mean = weights_over(q[b, last], k[b], list(range(last + 1)))[h * 3 : h * 3 + 3].mean(0)
                ranked[b, h] = np.argsort(-mean).tolist()
        room = pages_to_load(BENCH, t)[0] * 8 - (t - last)
        full = (t - 44) % 10 == 0
        recent = range(last + 1, t + 1)
        check_output(
            o[:, 0],
            q,
            k,
            v,
            t,
            lambda b, h: range(t + 1) if full else [*ranked[b, h][:room], *recent],  # noqa: B023
        )


def test_selection_reuse_chooses_at_every_second_step():
    """In between, the pages of the step before: with a page begun since in front, and the order of that time for the rest."""
    steps, _, _, v, q, k = neighbour("selection reuse", BENCH)
    ranked = {}
    for t, o in steps:
        count, held, window = pages_to_load(BENCH, t)
        for b, h in np.ndindex(2, 2):
            if (t - 45) % 2 == 0:
                bounds = []
                for j in range(held):
                    page = k[b, j * 8 : min(j * 8 + 8, t + 1), h].numpy()
                    query = q[b, t, h * 3 : h * 3 + 3].numpy()
                    bounds.append(np.maximum(query * page.min(0), query * page.max(0)).sum())
                ranked[b, h] = sorted(range(held), key=lambda j: (j not in window, -bounds[j]))  # noqa: B023
            elif held - 1 not in ranked[b, h]:
                ranked[b, h].insert(0, held - 1)
        chosen = {key: set(pages[:count]) for key, pages in ranked.items()}
        check_output(o[:, 0], q, k, v, t, lambda b, h: [j for j in range(t + 1) if j // 8 in chosen[b, h]])  # noqa: B023


@pytest.mark.parametrize("dense_layers", [0, 1])
def test_resa_repairs_the_cache(monkeypatch, dense_layers):
    """After a dense pass, keys, values and bounds are dense decoding's; before the first one, all is Quest's.

    Guards against a pass one row short, bounds left as they were, and a repair that reads the cached sparse outputs.
    """
    monkeypatch.setattr(bench, "REFRESH", 8)
    model, tokens, quest = random_model(), random_tokens(2, 75), replace(BENCH, dense_layers=dense_layers)
    decoders = [
        bench.new_decoder(name, retro, model, 2, 75) for name, retro in (("ReSA", quest), ("Quest", quest), ("full", None))
    ]
    for decoder in decoders:
        decoder.prefill(tokens[:, :41])
    for t in range(41, 75):
        ours, quests, dense = (decoder.step(tokens[:, t]) for decoder in decoders)
        if t < 41 + 8:
            assert torch.equal(ours, quests)
        elif (t - 41) % 8 == 5:
            assert (ours - quests).abs().max() > 1e-6 and (ours - dense).abs().max() > 1e-6
        same = [
            torch.allclose(getattr(a.cache, x).flatten(2, 3)[:, :, : t + 1], getattr(b.cache, x).flatten(2, 3)[:, :, : t + 1],
                           rtol=0, atol=1e-10)
            for a, b in zip(decoders[0].layers, decoders[2].layers, strict=True) for x in "kv"
        ]  # fmt: skip
        assert all(same) == (t % 8 == 0)  # 48, 56, ...: eight steps each
        if t % 8 == 0:
            for layer in decoders[0].layers[dense_layers:]:
                keys = layer.cache.k.flatten(2, 3)[:, :, t // 8 * 8 : t + 1]
                assert torch.equal(layer.cache.k_max[:, :, t // 8], keys.amax(2))


def test_kv_share_counts_bounds_and_dense_passes():
    """By hand: position 63 holds 8 pages of 8 tokens, a quarter is 2, the bounds of all are one page's worth of vectors."""
    retro = RetroConfig(page_size=8, budget=0.25, min_tokens=8, window=1, dense_layers=0)
    share = lambda name, n, retro=retro: bench.kv_share(name, retro, 4, range(64 - n, 64))  # noqa: E731
    assert share("Quest", 1) == share("Retro W=4", 1) == 3 / 8 and share("full", 1, None) == 1
    assert share("StreamingLLM", 1) == share("TOVA", 1) == 2 / 8
    assert share("Quest", 1, replace(retro, dense_layers=1)) == (1 + 3 * 3 / 8) / 4
    assert share("selection reuse", 2) == (3 + 2) / 16
    steps = [(min(t // 8 + 1, -(-(t // 8 + 1) // 4)), t // 8 + 1) for t in range(32, 64)]
    held = sum(h for _, h in steps)
    assert share("RefreshKV", 32) == (sum(s for s, _ in steps[:-1]) + 8) / held
    assert math.isclose(share("ReSA", 32), (sum(s + h / 8 for s, h in steps) + 8) / held)


def quality_arguments(**changes):
    sizes = dict(text=None, passages=3, prefix=50, length=30, windows=[1, 4], seed=0, decoded=0, neighbours=bench.NEIGHBOURS)
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
    table = bench.text_quality(idx, args, BENCH, model)
    rows = table["rows"]
    assert rows["Retro W=1"] == rows["Quest"] and rows["Quest"]["kl_to_quest"] == [0, 0] and rows["full"]["kl"] == 0
    assert len({row["kl"] for row in rows.values()}) == len(rows) - 1, "two methods are one"
    dense = model(idx).log_softmax(-1)[:, 50:80]
    kl = {}
    for name, W in (("Quest", 1), ("Retro W=4", 4)):
        sparse = decode(model, replace(BENCH, window=W), idx[:, :80], 50 - decoded)[0][:, 1 + decoded :].log_softmax(-1)
        kl[name] = (dense.exp() * (dense - sparse)).sum(-1)
        gap = (dense - sparse).gather(2, idx[:, 51:, None])[..., 0]
        close(rows[name]["kl"], kl[name].mean(), 1e-6)
        close(rows[name]["gap"], gap.mean(), 1e-5)
        close(rows[name]["gap_by_position"][1], gap[:, 8:16].mean(), 1e-5)
    difference = (kl["Retro W=4"] - kl["Quest"]).mean(1)
    close(rows["Retro W=4"]["kl_to_quest"], [difference.mean(), difference.std() / math.sqrt(3)], 1e-6)
    assert table["positions"] == [0, 8, 16, 23, 30]
    args.neighbours = ["ReSA"]
    assert list(bench.text_quality(idx, args, BENCH, model)["rows"]) == ["full", "Quest", "Retro W=1", "Retro W=4", "ReSA"]


def test_a_full_budget_is_full_attention_in_the_table(monkeypatch):
    """With all tokens allowed every method is full attention, except that reading has its price."""
    monkeypatch.setattr(bench, "REFRESH", 8)
    rows = bench.text_quality(random_tokens(3, 81), quality_arguments(), replace(BENCH, budget=1.0), random_model())["rows"]
    for name, row in rows.items():
        assert abs(row["kl"]) < 1e-5 and abs(row["gap"]) < 1e-5 and max(row["attention_error"]) < 1e-5, name
    assert rows["full"]["kv_share"] == rows["TOVA"]["kv_share"] == 1 < rows["Quest"]["kv_share"] < rows["ReSA"]["kv_share"]


def test_the_outputs_compared_are_the_steps_own(monkeypatch):
    """Those of the newest row, through the output projection: not an older row's, nor those of ReSA's pass after the step."""
    monkeypatch.setattr(bench, "REFRESH", 4)
    model, tokens = random_model(), random_tokens(2, 60)
    steps = {
        name: [outputs for _, outputs in bench.forced(bench.new_decoder(name, retro, model, 2, 60), tokens, 55)]
        for name, retro in (("ReSA", BENCH), ("Quest", BENCH), ("Retro W=4", replace(BENCH, budget=1.0, window=4)))
    }
    assert all(torch.equal(a, b) for a, b in zip(steps["ReSA"], steps["Quest"], strict=True)) and len(steps["Quest"]) == 4
    dense = []
    for layer in model.layers:
        layer.attention.register_forward_hook(lambda module, args, x: dense.append(x))
    model(tokens)
    for i, outputs in enumerate(steps["Retro W=4"]):
        close(outputs, torch.stack([x[:, 55 + i] for x in dense]), 1e-5)


def test_overlap_of_page_sets():
    """Against sets: pages taken now that were among the first k, or the next k, of a past step; new pages in neither."""
    rng = np.random.default_rng(0)
    ranks = [torch.from_numpy(rng.permuted(np.tile(np.arange(9 + i // 2), (2, 3, 1)), axis=-1)) for i in range(6)]
    selected, shares = [2, 2, 3, 3, 3, 3], []
    for i in range(2, 6):
        top = beyond = 0
        for now, past in zip(ranks[i].flatten(0, 1), ranks[i - 2].flatten(0, 1), strict=True):
            taken = set(np.flatnonzero(now < selected[i]))
            order = past.argsort().tolist()
            top += len(taken & set(order[: selected[i - 2]]))
            beyond += len(taken & set(order[selected[i - 2] : 2 * selected[i - 2]]))
        shares.append([top / 6 / selected[i], beyond / 6 / selected[i]])
    close(bench.overlap(ranks, selected, 2), np.mean(shares, 0), 1e-6)


def test_answers_are_matched_by_their_number():
    """In any order; what follows 'The answer is' before any other number; the first answer to a question counts."""
    text = (
        "Answer_2: 3 and 4 make 7. The answer is $1,007.50. It took 3 steps.\n\nAnswer_1: it is 12, so 13\n"
        "Answer_4: nothing\nAnswer_2: The answer is 8.\nAnswer_12: the answer is -5\nAnswer_4: The answer is 0."
    )
    assert bench.read_answers(text) == {2: 1007.5, 1: 13, 12: -5, 4: 0}
    assert bench.read_answers("The answer is 3.") == {}


class Scripted(Llama):
    """Says `script`, whatever it is asked: the hidden state is the id of the token that comes next."""

    def hidden(self, idx, cos, sin, retro=None, t=None):
        if t is None:
            self.prompt_len = idx.shape[1]
        place = 0 if t is None else int(t) - self.prompt_len + 1
        return torch.full((*idx.shape, 1), self.script[place], dtype=torch.double)

    def logits(self, x):
        return torch.nn.functional.one_hot(x[..., 0].long(), self.config.vocab_size).double()


def scripted(tok, script):
    config = dict(dim=64, n_layer=2, n_head=2, n_kv_head=2, vocab_size=tok.vocab_size, ffn_dim=16, max_seq_len=2000)
    model = Scripted(LlamaConfig(**config, rope_theta=1e4)).eval().requires_grad_(False)
    model.script = script
    return model


@pytest.fixture
def exam(monkeypatch, tmp_path):
    """20 questions in GSM8K's form and a scripted model: `run(answers)` -> exit code, last line of stdout, the records."""
    tok = Tokenizer.from_checkpoint(TINY)
    model = scripted(tok, [])
    lines = [{"question": f"What is {i} + 1000?", "answer": f"<<{i}+1000>>\n#### {1000 + i:,}"} for i in range(20)]
    (tmp_path / "questions").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(bench, "setup", lambda args: (RetroConfig(window=1), model, tok))

    def run(text, *args):
        model.script = [*tok.encode(text), tok.stop_tokens[0]] if text else []
        paths = ["--questions", str(tmp_path / "questions"), "--out", str(tmp_path / "out")]
        code = bench.main(["longgen", *paths, "--n", "4", "--prompts", "2", "--examples", "3", "--windows", "2", *args])
        return code, [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]

    return run


@pytest.mark.parametrize("decoded", [0, 7])
def test_lines_are_right_at_their_place(decoded):
    """A line counts where it belongs, whole: one too early, a wrong number or one that is cut off is wrong; also after a
    question whose end was decoded."""
    tok, said = Tokenizer.from_checkpoint(TINY), "Ada: 1\nBen: 2\nCarl: 33\nDora: 4\nEa"
    steps = len(tok.encode(said))
    model = scripted(tok, [5] * decoded + tok.encode(said))
    idx, answers = torch.arange(60).view(3, 20), ["Ada: 1\nBen: 2\nCarl: 3\nDora: 4\nEarl: 5\n\n", "Ben: 2\n" * 5, said]
    decoder = Decoder(model, 3)
    right = bench.lines_right(decoder, idx, decoded, answers, tok, steps)
    assert torch.equal(decoder.tokens[:, :20], idx)
    assert right.tolist() == [[1, 1, 0, 1, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    right = bench.lines_right(Decoder(model, 2), idx[:2], decoded, ["Ada: 1\nBen: 3\n", said], tok, steps)
    close(right, [[1, 0, math.nan, math.nan, math.nan], [1] * 5], 0)


@pytest.mark.parametrize("task", bench.TASKS)
def test_task_questions_fill_the_prompt_up(task):
    """All of one length, begin_of_text first, the question last; the same seed asks the same."""
    tok, model = Tokenizer.from_checkpoint(TINY), random_model()
    args = SimpleNamespace(seed=3, questions=4, entries=5, prefix=300)
    model.config.max_seq_len = 400
    idx, answers, steps = bench.task_questions(task, args, model, tok)
    question, answer = bench.TASKS[task](random.Random(3), 5)
    assert (
        idx.shape == (4, 300)
        and steps == max(len(tok.encode(answer)) for answer in answers)
        and (idx[:, 0] == tok.bos).all()
        and len(set(answers)) == 4
    )
    assert tok.decode(idx[0].tolist()).endswith(question) and answers[0] == answer
    assert torch.equal(idx, bench.task_questions(task, args, model, tok)[0])
    with pytest.raises(ValueError, match=f"for 90 entries of {task}, not 300"):
        bench.task_questions(task, SimpleNamespace(**{**vars(args), "entries": 90}), model, tok)


def test_longgen_counts_what_is_right(exam, capsys):
    """Of questions 3 .. 6 the script has two right, skips one and repeats one, first wrong; of 7 .. 10 none is right."""
    script = (
        "Answer_4: The answer is 1006. Answer_1: The answer is 1,003. Answer_2: The answer is 1. Answer_2: The answer is 1004."
    )
    code, records = exam(script)
    assert code == 0 and len(records) == 6
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]["rows"]
    assert [row["method"] for row in results] == ["full", "Quest", "Retro W=2"]
    assert all(row["right"] == 2 / 8 and row["answered"] == 6 / 8 for row in results)
    assert all(record["right"] == [record["run"]["prompt"] == 0 and i in (0, 3) for i in range(4)] for record in records)
    assert all(record["text"] == script for record in records)


def test_longgen_goes_on_where_it_was_interrupted(exam, capsys, tmp_path):
    """What is finished is not run again, a half-written line is; other settings are other runs; a foreign file stays whole."""
    exam("Answer_1: The answer is 1003.")
    whole = (tmp_path / "out").read_text()
    (tmp_path / "out").write_text(whole[:-40])
    code, records = exam("Answer_1: The answer is 5.")
    assert code == 0 and len(records) == 6 and records[:5] == [json.loads(line) for line in whole.splitlines()[:5]]
    assert "The answer is 5" in records[5]["text"]
    assert exam("")[0] == 0, "a finished run asked the model again"
    assert len(exam("x", "--answer_tokens", "9")[1]) == 12
    for diary in ("my diary\nno end", "no line's end"):
        (tmp_path / "out").write_text(diary)
        capsys.readouterr()
        with pytest.raises(json.JSONDecodeError):
            exam("x")
        assert (tmp_path / "out").read_text() == diary and "is not a file of this command" in capsys.readouterr().err


def test_the_commands_and_the_picture(capsys, monkeypatch, tmp_path):
    """quality and exposure on the shipped checkpoint, and what picture makes of their saved output."""
    text = tmp_path / "book"
    text.write_text("It was a dark night, and the wind blew. " * 60)
    sizes = ["--text", str(text), "--passages", "2", "--prefix", "150", "--length", "10", "--windows", "2"]
    assert bench.main(["quality", *sizes, "--questions", "2", "--entries", "4"]) == 0
    output = capsys.readouterr().out
    (tmp_path / "quality").write_text(output)
    record = json.loads(output.splitlines()[-1])
    assert record["arguments"]["prefix"] == 150 and record["versions"]["torch"] and record["device"]
    assert set(record["results"]["tasks"]) == set(bench.TASKS) and "Retro W=2" in output and "ReSA" in output
    assert not re.search(r" -\s", output), "a dash: a column without its value"
    assert bench.main(["exposure", *sizes, "--distance", "3"]) == 0
    output = capsys.readouterr().out
    (tmp_path / "exposure").write_text(output)
    results = json.loads(output.splitlines()[-1])["results"]
    assert not re.search(r" -\s", output)
    assert results["effective_exposure"]["1"] == 1 < results["effective_exposure"]["2"] < 2
    assert all(0 < a + b <= 1 for a, b in results["overlap"].values()) and len(results["overlap"]) == 3
    files = ["--quality", str(tmp_path / "quality"), "--exposure", str(tmp_path / "exposure")]
    assert bench.main(["picture", "--quality", files[3], "--exposure", files[1]]) == 2
    assert "is not the JSON of bench.py quality" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench.main(["picture", *files, "--out", str(tmp_path / "x.png")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    monkeypatch.undo()
    if importlib.util.find_spec("matplotlib"):
        assert bench.main(["picture", *files, "--out", str(tmp_path / "x.png")]) == 0
        assert (tmp_path / "x.png").read_bytes()[1:4] == b"PNG"


def test_the_picture_joins_runs_that_differ_in_decoded_alone(capsys, tmp_path):
    """A point for each run, in the order of `decoded` and not of the files; other runs than these are no line."""

    def save(name, command, decoded, prefix, results):
        arguments = {"decoded": decoded, "prefix": prefix}
        (tmp_path / name).write_text(json.dumps({"command": command, "arguments": arguments, "results": results}))
        return str(tmp_path / name)

    late, early, other = (
        save(name, "quality", decoded, prefix, {"text": {"rows": {"full": {"kl": 0}, "Quest": {"kl": kl}}}})
        for name, decoded, prefix, kl in (("late", 99, 150, 0.3), ("early", 0, 150, 0.2), ("other", 50, 149, 0.1))
    )
    exposure = save("exposure", "exposure", 0, 150, {"effective_exposure": {"1": 1, "2": 1.2}})
    options = ["--exposure", exposure, "--out", str(tmp_path / "x.png")]
    for wrong in ([late, other], [late, early, late]):
        assert bench.main(["picture", "--quality", *wrong, *options]) == 2
        assert "must differ in their --decoded, and in no other argument" in capsys.readouterr().err
    if importlib.util.find_spec("matplotlib"):
        assert bench.main(["picture", "--quality", late, early, *options]) == 0
        line = sys.modules["matplotlib.pyplot"].gcf().axes[0].lines[0]
        assert list(line.get_xdata()) == [0, 99] and list(line.get_ydata()) == [0.2, 0.3]


@pytest.fixture
def measure(capsys, monkeypatch):
    """Runs a speed command as on a machine without a GPU: its first line, and the JSON of its last."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)

    def run(args):
        assert bench.main(args.split()) == 0
        lines = capsys.readouterr().out.strip().split("\n")
        assert "No GPU" in lines[0] and "PyTorch reference" in lines[0]
        dashes = [line for line in lines[:-1] if re.search(r" -( |$)", line)]
        assert not dashes or "kernels" in args, "a column without its value; only SDPA's may have none"
        return json.loads(lines[-1])["results"]

    return run


def test_kernels_sets_the_time_beside_the_bytes(measure, monkeypatch):
    """Bytes by hand for 320 tokens in 20 pages, 16 of them (min_tokens) or, for Quest's headline setting, 16 selected."""
    monkeypatch.setattr(bench, "HEADLINE", (320, 288))
    results = measure("kernels --settings 320x2 --windows 1 8")
    rows, rate = results["rows"], max(results["memory_rate"].values())
    assert [(row["window"], row["budget"]) for row in rows] == [(1, 0.15), (8, 0.15), (1, 0.9)]
    for row in rows:
        pages, vector = 18 if row["budget"] == 0.9 else 16, 2 * 2 * 64 * 4  # batch, KV heads, head size, float32
        assert row["bytes"]["score"] == 2 * 20 * vector and row["bytes"]["attend"] == 2 * pages * 16 * vector
        assert row["bytes"]["four"] == 2 * (20 + pages * 16) * vector and row["bytes"]["dense"] == 2 * 320 * vector
        assert {*bench.KERNELS, "four", "ours"} <= set(row["us"]) and all(x > 0 for x in row["us"].values())
        assert row["share"]["four"] == pytest.approx(row["bytes"]["four"] / rate * 1e6 / row["us"]["four"])
        assert row["share"]["ours"] == pytest.approx(row["bytes"]["dense"] / rate * 1e6 / row["us"]["ours"])
        assert row["ours/four"] == pytest.approx(row["us"]["ours"] / row["us"]["four"])


def test_decode_sets_whole_steps_beside_the_bytes(measure):
    """The shape is the shipped checkpoint's, with embeddings that are the output head too: a step reads all weights."""
    config, weights = sample.read_checkpoint(TINY)
    assert bench.SHAPES["tiny"] == config
    results = measure("decode --settings 400x2 --windows 2 --rounds 1 --dense_layers 3")
    rows, rate = results["rows"], max(results["memory_rate"].values())
    assert [row["method"] for row in rows] == ["full", "Quest", "Retro W=2"]
    read = 4 * sum(w.numel() for w in weights.values())
    vector = 2 * 2 * 64 * 4
    # The last 30 steps, to position 399: 371 to 400 tokens, in 24 pages 14 times, in 25 pages 16 times; W=2 lies in two once.
    tokens, held = sum(range(371, 401)), 14 * 24 + 16 * 25
    assert rows[0]["bytes"] == read + 10 * 2 * tokens * vector / 30
    for row, pages in ((rows[1], 30 * 16), (rows[2], 30 * 16 + 1)):
        assert row["bytes"] == (30 * read + (3 * 2 * tokens + 7 * 2 * (held + pages * 16)) * vector) / 30
    for row in rows:
        assert row["share"] == pytest.approx(row["bytes"] / rate / row["ms"] * 1e3)
        assert row["tokens/s"] == pytest.approx(2e3 / row["ms"])
        assert row["kv MB"] == 10 * 2 * 400 * vector / 1e6
    untied = bench.random_model(replace(config, tie_embeddings=False, max_seq_len=400), "cpu", torch.float32)
    # Of the embedding table itself a step takes single rows.
    assert bench.step_bytes(untied, None, 2, 385) == read + 10 * 2 * 385 * vector
    bounds = [row["bounds MB"] for row in rows]
    assert bounds == [0, 7 * 2 * 25 * vector / 1e6, 7 * 2 * 25 * vector / 1e6]
    assert [row["outputs MB"] for row in rows] == [0, *(7 * 2 * W * 6 * 65 * 4 / 1e6 for W in (1, 2))]


def test_a_long_run_is_measured_by_quarters(measure, monkeypatch):
    """All logits finite; what the bytes explain grows with the text."""
    monkeypatch.setitem(bench.SHAPES, "tiny", LlamaConfig(32, 1, 2, 1, 64, 64, 4096))
    rows = measure("decode --long 120")["rows"]
    assert list(rows) == ["4-30", "31-60", "61-90", "91-120"]
    assert all(row["finite"] and row["ms"] > row["ms by bytes"] > 0 for row in rows.values())
    assert rows["4-30"]["ms by bytes"] < rows["91-120"]["ms by bytes"]


def test_quick_changes_what_is_not_given():
    """--quick stands for smaller sizes, each of which can still be given, also as what is usual."""
    usual, quick, both = (bench.parse_args(["quality", *x.split()]) for x in ("", "--quick", "--quick --passages 24"))
    assert (usual.passages, quick.passages, both.passages) == (24, 8, 24)
    assert usual.length > quick.length == both.length and bench.parse_args(["quality"]).passages == 24


@pytest.mark.parametrize(
    "args, message",
    [
        ("quality --text nowhere", "nowhere: No such file"),
        (f"quality --text {TINY}/consolidated.00.pth", "not UTF-8 at byte"),
        ("quality --text LICENSE", r"LICENSE has \d+ tokens: 24 passages of 2432 need 58368"),
        ("quality --prefix 50 --decoded 50", "decoded must be between 0 and 49, not 50: less than prefix"),
        ("quality --prefix 4000 --tasks", "prefix \\+ length must be at most 4095, not 4384"),
        ("quality --budget 0", r"budget must be in \(0, 1\], not 0"),
        ("quality --windows 2 0", "windows: must be >= 1, not 0"),
        ("quality --passages 1", "passages: must be >= 2, not 1"),
        ("quality --length 0", "length: must be >= 1, not 0"),
        ("quality --questions 1", "questions: must be >= 2, not 1"),
        ("quality --entries 9999", "entries must be at most [0-9]+, not 9999"),
        ("quality --dense_layers 99", "dense_layers must be between 0"),
        ("quality --checkpoint nowhere", "checkpoint nowhere: no such folder"),
        ("quality --device abacus", "device 'abacus': unknown"),
        ("exposure --distance 256", "distance must be between 1 and length - 1 = 255, not 256"),
        ("longgen --questions nowhere --out x", "nowhere: No such file"),
        ("longgen --questions LICENSE --out x", "LICENSE: line 1 is not a question"),
        ("longgen --questions LICENSE --out README.md", "README.md: exists, and is not"),
        ("longgen --questions LICENSE --out x --n 3 0", "n: must be >= 1, not 0"),
        ("quality --prefix 300", "prefix must be at least .* for 32 entries of ledger, not 300"),
        ("quality --prefix 4000 --length 1", "prefix must be at most 3.* in ledger, not 4000"),
        ("picture --quality LICENSE --exposure LICENSE", "LICENSE: its last line is not the JSON of bench.py quality"),
        ("kernels --shape 70b", "invalid choice: '70b'"),
        ("kernels --settings 64x1", "settings: must have a context >= 256 and a batch >= 1, not 64x1"),
        ("kernels --settings 1024", "invalid setting value: '1024'"),
        ("kernels --windows 0", "windows: must be >= 1, not 0"),
        ("decode --settings 1024x0", "a batch >= 1, not 1024x0"),
        ("decode --rounds 0", "rounds: must be >= 1, not 0"),
        ("decode --dense_layers 11 --shape tiny", "dense_layers must be between 0 and 10, not 11"),
        ("decode --long 5", "long: must be >= 100, not 5"),
        ("nonsense", "invalid choice: 'nonsense'"),
        ("quality --budget much", "--budget: invalid float"),
    ],
)
def test_a_mistake_in_a_measurement_is_one_clear_line(capsys, monkeypatch, args, message):
    """Exit code 2, nothing on stdout, on stderr nothing else."""
    monkeypatch.chdir(TINY.parent)
    try:
        code = bench.main(args.split())
    except SystemExit as stop:  # argparse
        code = stop.code
    out, error = capsys.readouterr()
    assert code == 2 and not out and error.count("\n") == 1 and re.search(message, error)


# ----------------------------------------------------------------------------------------------------------------------
# The command line


SHORT = [
    "--prompt",
    "It was a dark night",
    "--max_new_tokens",
    "40",
    "--min_tokens",
    "16",
    "--page_size",
    "8",
    "--dense_layers",
    "0",
]


def command(capsys, *args):
    """Runs sample.py's main: exit code, stdout, stderr. Options repeated in args win over SHORT's."""
    try:
        code = sample.main([*SHORT, "--device", "cpu", *args])
    except SystemExit as stop:  # argparse
        code = stop.code
    return code, *capsys.readouterr()


def test_the_command_continues_the_prompt_and_reports_what_it_read(capsys):
    """Same seed, same text; another seed, another; the report's counts are those of the positions decoded."""
    code, text, report = command(capsys)
    assert code == 0 and text.startswith("It was a dark night") and len(text) > 60
    assert command(capsys)[1] == text != command(capsys, "--seed", "1")[1]
    n = len(Tokenizer.from_checkpoint(TINY).encode("It was a dark night", bos=True))
    assert "40 tokens, " in report and f"prompt of {n} tokens" in report and f"context {n + 40} of 4096" in report
    counts = [pages_to_load(RetroConfig(page_size=8, min_tokens=16), t)[:2] for t in range(n, n + 39)]
    read, held = np.mean(counts, axis=0)
    assert read < held and f"{read:.1f} of {held:.1f} pages read" in report
    assert "full attention" in command(capsys, "--attention", "full")[2]
    quest = command(capsys, "--attention", "quest", "--temperature", "0")
    assert "Quest, window 1" in quest[2] and "exposure 1.00x" in quest[2]
    assert command(capsys, "--window", "1", "--temperature", "0")[1] == quest[1]


def test_several_samples_differ_and_are_equal_when_greedy(capsys):
    """A batch is as many texts: three different ones when sampling, three equal ones at temperature 0."""
    for temperature, different in (("0.9", 3), ("0", 1)):
        _, out, report = command(capsys, "--num_samples", "3", "--temperature", temperature)
        texts = [text.strip() for text in out.split("---------------\n")]
        assert len(texts) == 3 and len(set(texts)) == different and "120 tokens" in report


def test_prompts_from_files_and_stdin(capsys, monkeypatch, tmp_path):
    """FILE:path and - give what --prompt gives; an empty prompt starts from begin_of_text alone."""
    wanted = command(capsys)[1]
    (tmp_path / "prompt").write_text("It was a dark night")
    assert command(capsys, "--prompt", f"FILE:{tmp_path}/prompt")[1] == wanted
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"It was a dark night")))
    assert command(capsys, "--prompt", "-")[1] == wanted
    assert not command(capsys, "--chat")[1].startswith("It was")
    code, text, report = command(capsys, "--prompt", "")
    assert code == 0 and text and "prompt of 1 tokens" in report


def test_what_does_not_fit_is_said_before_loading(capsys, monkeypatch):
    """The line on memory counts what is allocated; a context that cannot fit is refused with the largest that would."""
    monkeypatch.setattr(Llama, "from_checkpoint", lambda *a, **k: pytest.fail("weights were loaded"))
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 20_150, "SC_PAGE_SIZE": 4096}[name])
    code, out, error = command(capsys, "--max_new_tokens", "4000", "--num_samples", "9")
    config = sample.read_checkpoint(TINY)[0]
    assert code == 2 and not out and "more than the 82.5 MB of cpu" in error
    fits = int(re.search(r"at most (\d+) tokens", error)[1])
    args = RetroConfig(page_size=8, dense_layers=0), 9
    sample.check_memory(config, *args, fits, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="more than"):
        sample.check_memory(config, *args, fits + 1, torch.device("cpu"), torch.float32)  # a page more
    assert fits % 8 == 0
    assert "more than" in command(capsys, "--page_size", "262144")[2]  # a page takes its room, however little is in it


@pytest.mark.parametrize(
    "said, code",
    [
        ("CUDA out of memory.", 2),
        ("can't allocate memory: you tried", 2),
        ("not enough memory: you tried", 2),
        ("illegal memory", None),
    ],
)
def test_only_what_is_out_of_memory_is_called_so(capsys, monkeypatch, said, code):
    """Guards against a broken kernel, an "illegal memory access", taken for a text that is too long."""

    def step(*args):
        raise RuntimeError(said)

    monkeypatch.setattr(Decoder, "step", step)
    if code is None:
        with pytest.raises(RuntimeError, match=said):
            command(capsys)
    else:
        assert command(capsys)[0] == code


def test_an_empty_prompt_needs_a_token_to_start_from(capsys, monkeypatch):
    monkeypatch.setattr(Tokenizer, "encode", lambda *args, **options: [])  # as Qwen's, which has no begin-of-text
    code, out, error = command(capsys, "--prompt", "")
    assert code == 2 and not out and "prompt must not be empty" in error


def test_the_end_of_the_context(capsys, monkeypatch):
    """A text that fills the context stops there and says so; a prompt that leaves no room is refused."""
    config, weights = sample.read_checkpoint(TINY)
    monkeypatch.setattr(sample, "read_checkpoint", lambda folder: (replace(config, max_seq_len=64), weights))
    monkeypatch.setattr(Llama, "from_checkpoint", partial(Llama.from_checkpoint, max_seq_len=64))
    code, _, report = command(capsys, "--max_new_tokens", "1000")
    assert code == 0 and "The context of 64 tokens is full." in report and "context 64 of 64" in report
    code, out, error = command(capsys, "--prompt", "It was " * 40)
    assert code == 2 and not out and "must be between 1 and 63" in error


@pytest.mark.parametrize(
    "args, message",
    [
        (["--checkpoint", "nowhere"], "checkpoint nowhere: no such folder"),
        (["--prompt", "FILE:nowhere"], "prompt file nowhere"),
        (["--prompt", f"FILE:{TINY}/consolidated.00.pth"], "not UTF-8 at byte"),
        (["--window", "0"], "window must be an integer >= 1"),
        (["--window", "0", "--attention", "quest"], "window must be"),
        (["--budget", "0", "--attention", "full"], r"in \(0, 1\], not 0"),
        (["--budget", "1.5"], r"in \(0, 1\], not 1.5"),
        (["--budget", "nan"], "not nan"),
        (["--page_size", "12"], "power of two, not 12"),
        (["--min_tokens", "0"], "min_tokens must be .* not 0"),
        (["--dense_layers", "-1"], "dense_layers must be .* not -1"),
        (["--dense_layers", "99"], "dense_layers must be between 0 and the model's .* not 99"),
        (["--top_k", "0"], "top_k must be >= 1"),
        (["--temperature", "-1"], "temperature must be 0 or a finite number >= 1e-6, not -1"),
        (["--top_p", "0"], r"top_p must be in \(0, 1\], not 0"),
        (["--device", "abacus"], "device 'abacus': unknown"),
        (["--device", "cuda:77"], "device 'cuda:77': not on this machine"),
        (["--num_samples", "0"], "num_samples must be >= 1"),
        (["--max_new_tokens", "0"], "max_new_tokens must be >= 1"),
        (["--seed", "-1"], "seed must be"),
        (["--impl", "cuda"], "--impl: invalid choice"),
        (["--window", "two"], "--window: invalid int"),
    ],
)
def test_a_mistake_is_one_clear_line(capsys, args, message):
    """Exit code 2, nothing on stdout, on stderr nothing else: it names the value and what is allowed."""
    code, out, error = command(capsys, *args)
    assert code == 2 and not out and error.count("\n") == 1 and re.search(message, error)


def test_interrupt_keeps_the_text_and_reports(tmp_path):
    """Ctrl-C: what was printed stays, the report follows, exit code 130."""
    args = ["--prompt", "It was", "--max_new_tokens", "4000", "--temperature", "1"]
    with open(tmp_path / "out", "wb") as out:
        child = subprocess.Popen([sys.executable, TINY.parent / "sample.py", *args], stdout=out, stderr=subprocess.PIPE)
        while child.poll() is None and (tmp_path / "out").stat().st_size < 100:
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        report = child.communicate(timeout=60)[1].decode()
    text = (tmp_path / "out").read_text()
    assert child.returncode == 130 and "tokens/s" in report and "Traceback" not in report
    assert text.startswith("It was") and text.endswith("\n") and len(text) >= 100


def test_a_long_text_in_one_go():
    """3,500 tokens: no error at any page's end, every logit finite, and not a byte more in the output cache."""
    model = Llama.from_checkpoint(TINY)
    decoder = Decoder(model, 1, RetroConfig(budget=0.05, min_tokens=32, window=8, dense_layers=1))
    size = lambda: sum(x.numel() for layer in decoder.layers[1:] for x in (layer.cache.out, layer.cache.lse))  # noqa: E731
    before, generator = size(), torch.Generator().manual_seed(0)
    logits = decoder.prefill(torch.tensor([[0]]))
    for _ in range(3500):
        logits = decoder.step(sample_token(logits, 1.0, None, None, generator))
    assert logits.isfinite().all() and size() == before and decoder.t == 3500
    assert all(x.isfinite().all() for layer in decoder.layers[1:] for x in (layer.cache.out, layer.cache.lse))


# ----------------------------------------------------------------------------------------------------------------------
# The hook, and what --trace draws from it


def test_the_revisions_of_a_step_against_brute_force():
    """A row's new pages, their mass and how far the output moves: softmax over the keys of all pages loaded until the step
    before, and until this one. Guards against slots mixed up, rows read too late or not copied, and heads in another order."""
    q, k, v = random_qkv()
    retro, loads, steps, gained = RetroConfig(page_size=8, budget=0.2, min_tokens=8, window=4), {}, [], 0
    for t, _, layer in run_layer(retro, q, k, v, prompt_len=20):
        loads[t] = layer.cache.last_loaded == t  # (B, n_kv_head, P)
        layer.hook = steps.append
        if t == 20:  # the first step went unseen
            continue
        revised = sample.revisions(steps[-1], 8)  # (5, n_kv_head, 3)
        assert steps[-1].t == t and (revised[3:] == 0).all()  # this layer's K and V are held fixed
        for h, row in itertools.product(range(2), range(t - 3, t)):
            states = []
            for until in (t - 1, t):
                pages = set(range(3)) if row < 20 else set()
                for step in range(max(row, 20), until + 1):
                    pages |= set(loads[step][0, h].nonzero().flatten().tolist())
                pages = {j for j in pages if j * 8 <= row}
                keys = [j for j in range(row + 1) if j // 8 in pages]
                outs = [softmax_over(q[0, row, head], k[0, :, h], v[0, :, h], keys) for head in range(3 * h, 3 * h + 3)]
                states.append((len(pages), np.stack([o for o, _ in outs]), np.exp([lse for _, lse in outs])))
            (n0, o0, sum0), (n1, o1, sum1) = states
            wanted = n1 - n0, (1 - sum0 / sum1).mean(), np.linalg.norm(o1 - o0) / np.linalg.norm(o0)
            close(revised[:3, h, row - t + 3], wanted, 1e-12)
            gained += n1 - n0
        for head in np.ndindex(2, 2):
            assert steps[-1].pages[head].tolist() == loads[t][head].nonzero().flatten().tolist()
    assert gained > 50, "no row has learnt anything: the test is empty"


@pytest.mark.parametrize("prompt_len", [1, 21])
def test_a_hook_sees_what_is_overwritten_and_changes_nothing(prompt_len):
    """K and V of the past rows as the step found and left them; the same logits, bit for bit; a dense layer has no step."""
    model, tokens, steps = random_model(), random_tokens(2, 40), {0: [], 1: [], 2: []}
    wanted = decode(model, SPARSE, tokens, prompt_len)[0]
    decoder, _ = start(model, SPARSE, tokens, prompt_len)
    for i, layer in enumerate(decoder.layers):
        assert layer.hook is None
        layer.hook = steps[i].append
    for t in range(prompt_len, 40):
        rows = slice(max(0, t - 3), t)
        kept = [[x.flatten(2, 3)[:, :, rows].clone() for x in (layer.cache.k, layer.cache.v)] for layer in decoder.layers]
        assert torch.equal(decoder.step(tokens[:, t]), wanted[:, t - prompt_len + 1])
        for i in (1, 2):
            cache, step = decoder.layers[i].cache, steps[i][-1]
            assert torch.equal(step.before.k, kept[i][0]) and torch.equal(step.before.v, kept[i][1])
            assert torch.equal(step.after.k, cache.k.flatten(2, 3)[:, :, rows])
            assert torch.equal(step.after.v, cache.v.flatten(2, 3)[:, :, rows])
            for before, after, moved in zip(kept[i], (step.after.k, step.after.v), sample.revisions(step, 8)[3:], strict=True):
                length = (before[0].numpy() ** 2).sum(-1)
                close(moved, np.sqrt(((after - before)[0].numpy() ** 2).sum(-1) / length), 1e-12)
    assert not steps[0] and max(sample.revisions(step, 8)[3:].max() for step in steps[2]) > 0.01


def test_marks_of_pages():
    """Five pages of 8 by hand: page 0 was loaded long ago, 2 and 4 by the step before; page 4 begins at token 32."""
    step = retro_attention.Step(33, torch.tensor([[[0, 2, 4]]]), torch.tensor([[[10, 32, 32]]]), None, None)
    assert ["".join(sample.mark_pages(step, 0, row, 8)) for row in (33, 32, 31)] == ["#.#.#", "+.-.-", "+.-. "]


def test_pictures_of_a_long_context_fit_the_screen(capsys):
    """131,072 tokens: no line has more than 100 characters, the strips stand below each other and lose no page; each row's
    numbers are its own, those of K and V from the layer above."""
    t, R, generator, tok = 131_071, 7, torch.Generator().manual_seed(0), Tokenizer.from_checkpoint(TINY)
    longest = max(range(4000), key=lambda i: len(repr(tok.decode([i]))))
    sparse, dense = SimpleNamespace(dense=False), SimpleNamespace(dense=True)
    layers = [copy.copy(dense if i < 3 else sparse) for i in range(32)]
    decoder = SimpleNamespace(layers=layers, retro=RetroConfig(window=8), tokens=torch.full((1, t + 1), longest))
    trace = sample.Trace(decoder, tok, t, 9, layer=30, head=1)
    pages = torch.stack([torch.randperm(8192, generator=generator)[:50].sort().values for _ in "ab"])[None]  # (1, 2, 50)
    last_loaded = torch.randint(t - 9, t, (1, 2, 50), generator=generator)
    kv, out, lse = torch.randn(1, 2, R, 32), torch.randn(1, R, 6, 32), torch.zeros(1, R, 6)
    before, after = (retro_attention.PastRows(kv, kv, out, lse + i) for i in range(2))
    overwritten = retro_attention.PastRows(kv * (1 + torch.arange(7) / 100)[:, None], kv * 0.75, out, lse)
    for i in range(3, 32):
        layers[i].hook(retro_attention.Step(t, pages, last_loaded, before, overwritten if i == 31 else after))
    lines = [*trace.legend(), *capsys.readouterr().err.split("\n"), *trace.summary()]
    assert max(map(len, lines)) <= 100
    rows = [re.fullmatch(r"(t\S*) +'.{9} \|(.{44})\|(.*)", line) for line in lines if re.match(r"t(-\d)? +'", line)]
    assert [row[1] for row in rows] == ["t", *(f"t-{i}" for i in range(1, 8))]
    for back, row in enumerate(rows):
        marks = ["."] * 44  # 187 pages a character
        new = [page for page, stamp in zip(pages[0, 1].tolist(), last_loaded[0, 1].tolist(), strict=True) if stamp < t - back]
        for page in pages[0, 1].tolist():
            mark = "#" if back == 0 else "+" if page in new else "-"
            marks[page // 187] = max(marks[page // 187], mark, key=".-+#".index)
        assert row[2] == "".join(marks)
        # mass 1 - 1 / e; the output has not moved; K by 6 % in the newest past row, down to 0 in the oldest
        assert row[3].split() == ([f"{len(new)}", "63.21%", "0.00%", f"{7 - back}.00%", "25.00%"] if back else [])


@needs_triton
def test_both_implementations_give_the_same_picture(capsys):
    """The kernels leave in the cache what the reference leaves, and their list of pages has room for more than are valid."""
    model, tok, seen = Llama.from_checkpoint(TINY, device=DEVICE), Tokenizer.from_checkpoint(TINY), []
    idx = torch.tensor([tok.encode(retro_attention.__doc__, bos=True)[:150]], device=DEVICE)
    for impl in ("triton", "torch"):
        config = RetroConfig(page_size=4, budget=0.2, min_tokens=32, window=3, dense_layers=model.config.n_layer - 2, impl=impl)
        decoder = Decoder(model, 1, config, max_seq_len=300)
        trace = sample.Trace(decoder, tok, 150, 4, layer=config.dense_layers, head=0)
        list(decoder.stream(idx, 4, temperature=0))
        seen.append(capsys.readouterr().err + "\n".join(trace.summary()))
    assert seen[0] == seen[1] and seen[0].count("\nposition ") == 3 and "+" in seen[0]


def test_trace_draws_and_leaves_the_text_alone(capsys):
    """About ten pictures, an odd number of tokens apart, at the end a line a sparse layer; on stdout nothing but the text."""
    config, text = sample.read_checkpoint(TINY)[0], command(capsys)[1]
    code, out, report = command(capsys, "--trace", "1:1", "--window", "3", "--dense_layers", "1")
    assert code == 0 and out != text  # another window, another text
    assert out == command(capsys, "--window", "3", "--dense_layers", "1")[1]
    n = len(Tokenizer.from_checkpoint(TINY).encode("It was a dark night", bos=True))
    assert [int(t) for t in re.findall(r"\nposition (\d+), layer 1, KV head 1", report)] == list(range(n + 4, n + 39, 5))
    assert report.count("\nt-2 ") == 7 and "L2 K" in report and "means over 7 tokens" in report
    assert re.findall(r"\n +(\d+) +\d+\.\d( +\d+\.\d\d)( +\d+\.\d\d%){4}(?=\n)", report)[-1][0] == str(config.n_layer - 1)
    quest = command(capsys, "--trace", "--attention", "quest")[2]
    assert "layer 0, KV head 0, every 5" in quest and "no past rows" in quest and "\nt-1" not in quest and "nan" not in quest
    last = command(capsys, "--trace", str(config.n_layer - 1))[2]
    assert "\nt-1 " in last and f"L{config.n_layer}" not in last
    assert "nothing drawn" in command(capsys, "--trace", "--max_new_tokens", "1")[2]


def test_trace_refuses_what_it_cannot_draw(capsys, monkeypatch):
    """One line that names the value and the range, before the weights are read."""
    monkeypatch.setattr(Llama, "from_checkpoint", lambda *a, **k: pytest.fail("weights were loaded"))
    config = sample.read_checkpoint(TINY)[0]
    layers, heads = config.n_layer, config.n_kv_head
    for value in ("two", "-1", "0", str(layers), f"1:{heads}", "1:", "1:-1", "1:0:0", "1.0"):
        code, out, error = command(capsys, "--dense_layers", "1", "--trace", value)
        assert code == 2 and not out and error.count("\n") == 1 and repr(value) in error
        assert f"between 1 and {layers - 1}" in error and f"between 0 and {heads - 1}" in error
    for dense in (["--attention", "full"], ["--dense_layers", str(layers)]):
        code, out, error = command(capsys, "--trace", *dense)
        assert code == 2 and not out and error.count("\n") == 1 and f"all {layers} layers are dense" in error


# ----------------------------------------------------------------------------------------------------------------------
# The README


def readme_commands():
    """(file, command) of each indented line of a README or model card that runs one of our files; comments cut off."""
    root = Path(__file__).parent
    for page in (root / "README.md", root / "tiny" / "README.md"):
        for line in page.read_text(encoding="utf-8").splitlines():
            for words in [shlex.split(part, comments=True) for part in line.split("&&") if line.startswith("    ")]:
                for i, word in enumerate(words):
                    if word.endswith(".py") and "python" in words[:i]:
                        yield pytest.param(
                            word, list(itertools.takewhile(lambda w: w != ">", words[i + 1 :])), id=" ".join(words[i:])
                        )


@pytest.mark.parametrize("script, args", list(readme_commands()))
def test_commands_of_the_readme_parse(script, args, capsys):
    """Guards against an option that was renamed in the code and not on the page."""
    parse = {"sample.py": sample.parse_args, "bench.py": bench.parse_args, "tiny/train.py": tiny.train.parse_args}[script]
    try:
        parse(args)
    except SystemExit as stop:
        assert stop.code == 0, capsys.readouterr().err  # --help


def test_names_in_the_readme_exist():
    """Every file, every step of the method and every `name.name` that the README points at."""
    root, known = Path(__file__).parent, {}
    text = (root / "README.md").read_text(encoding="utf-8")
    for module in (retro_attention, sample, bench, retro_attention.RetroAttention, Llama, Tokenizer, Decoder):
        known[module.__name__] = module
    steps = re.findall(r"^\d\. \*\*`(\w+)`\*\*", text, re.MULTILINE)
    assert steps == ["write", "score", "select", "attend", "combine"] and all(hasattr(retro_attention, s) for s in steps)
    if importlib.util.find_spec("triton"):
        assert all(hasattr(kernels, s) and hasattr(kernels, f"{s}_kernel") for s in steps)
    dotted = [m for m in re.findall(r"\b(\w+)\.(?!py\b)(\w+)", text) if m[0] in known]
    assert ("RetroAttention", "decode") in dotted and all(hasattr(known[a], b) for a, b in dotted)
    for link in re.findall(r"\]\(([\w./]+)\)", text):
        assert (root / link).exists(), link
