"""Measures fidelity and speed, for the tables of the documentation: python bench.py quality

    quality     what sparse decoding costs in fidelity: full attention, Quest, RetroAttention
    kernels     one layer of a step, kernel by kernel, beside dense attention and the byte limit
    decode      whole steps of a model with random weights: full attention, Quest, RetroAttention

Tables go to stdout, progress to stderr. The last line of stdout has all numbers as one JSON object,
with versions, device and arguments. Exit codes are those of sample.py.

Shapes: B passages, L decode steps, T tokens; the rest as in retro_attention.py.
"""

import argparse
import itertools
import json
import math
import os
import platform
import re
import statistics
import sys
import time
import timeit
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import distributions

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import retro_attention
import sample
from model import (
    Decoder,
    Llama,
    LlamaConfig,
    Tokenizer,
    check_dense,
    check_finite,
    choose_threads,
)
from retro_attention import OpsWrapper, RetroConfig, need, row_positions

START = time.time()


def progress(text: str) -> None:
    print(f"[{time.time() - START:.0f} s] {text}", file=sys.stderr, flush=True)


def table(title: str, rows: dict[str, dict], forms: dict[str, str]) -> None:
    """Prints each row's name and, for each column in `forms`, the row's value in that format, or
    a dash if it has none."""
    lines = [["", *forms]]
    for name, row in rows.items():
        cells = ["-" if row.get(x) is None else format(row[x], form) for x, form in forms.items()]
        lines.append([name, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}\n")
    for name, *cells in lines:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        print(name.ljust(widths[0]), *padded, sep="  ")


# --------------------------------------------------------------------------------------------------
# quality: the methods


class CountExposure(OpsWrapper):
    """Counts the pages that a step loads, and how often a past row sees a page for the first time.
    It counts on the device, so that a CUDA graph can record it."""

    def __init__(self, ops, device: torch.device):
        super().__init__(ops)
        self.counts = torch.zeros(2, dtype=torch.long, device=device)  # loaded, first sights

    def attend(self, q, cache, pages, loaded_before, t):
        if pages is None:  # prefill
            self.counts.zero_()
        else:
            past = row_positions(t, cache.config.window)[:-1, None, None, None]  # (W-1, 1, 1, 1)
            causal = pages * cache.config.page_size <= past  # (W-1, B, n_kv_head, S)
            # The kernels' lists end with unused elements.
            loaded = (cache.last_loaded == t).sum(dim=-1, keepdim=True)  # (B, n_kv_head, 1)
            used = torch.arange(pages.shape[-1], device=pages.device) < loaded  # (B, n_kv_head, S)
            first_sights = used & causal & (loaded_before < past)  # (W-1, B, n_kv_head, S)
            self.counts += torch.stack((loaded.sum(), first_sights.sum()))
        return self.ops.attend(q, cache, pages, loaded_before, t)


class NotLookingBack(OpsWrapper):
    """The control: no page is new to a past row. So this is Quest with as many pages as W rows
    load, chosen by the same rule. What W gains over it is not due to the additional pages.
    (RetroAttention without overwriting K and V would be the same, because a correction reaches
    later tokens in no other way.)"""

    def attend(self, q, cache, pages, loaded_before, t):
        if pages is not None:  # not in prefill
            loaded_before = torch.zeros_like(loaded_before) + (t - 1)
        return self.ops.attend(q, cache, pages, loaded_before, t)


def wrap(decoder: Decoder, wrapper: Callable) -> Decoder:
    """Wraps the ops of all sparse layers: `wrapper` takes a layer's ops and returns new ones."""
    for layer in decoder.layers:
        if not layer.dense:
            layer.ops = wrapper(layer.ops)
    return decoder


def exposure(decoder: Decoder) -> float | None:
    """Effective exposure: pages that a query has seen in the end, divided by those that its own
    step loaded. None if a layer does not count."""
    ops = [layer.ops for layer in decoder.layers if not layer.dense]
    if not ops or not all(hasattr(x, "counts") for x in ops):
        return None
    loaded, first_sights = sum(x.counts for x in ops).tolist()
    return 1 + first_sights / loaded


def counting(model: Llama, B: int, retro: RetroConfig | None, length: int) -> Decoder:
    """A decoder that counts its exposure."""
    decoder = Decoder(model, B, retro, length)
    return wrap(decoder, lambda ops: CountExposure(ops, decoder.t.device))


def not_looking_back(model: Llama, B: int, retro: RetroConfig, length: int) -> Decoder:
    return wrap(counting(model, B, retro, length), NotLookingBack)


@dataclass
class Method:
    """A row of the table: how to decode, and the share of the KV bytes read."""

    retro: RetroConfig | None  # None is full attention
    make: Callable[..., Decoder] = counting  # (model, B, retro, length) -> Decoder
    kv_share: Callable[..., float] = sample.kv_share  # (retro, n_layer, steps) -> share


def methods(retro: RetroConfig, windows: Iterable[int], control: bool = False) -> dict[str, Method]:
    """Name -> method. Quest is RetroAttention with a window of 1, and nothing else."""
    found = {"full": Method(None), "Quest": Method(replace(retro, window=1))}
    for w in windows:
        config = replace(retro, window=w)
        found[f"W={w}"] = Method(config)
        if control:
            found[f"W={w} not looking back"] = Method(config, not_looking_back)
    return found


# --------------------------------------------------------------------------------------------------
# quality: the text, the measurement, the table

PARTS = 8  # of the decoded text, to report on one by one


def load_model(args: argparse.Namespace) -> tuple[Llama, Tokenizer]:
    if args.text not in (None, "-"):
        sample.read_text(args.text, args.text)  # refuses a file before the weights are read
    config, weights, tok, device, dtype = sample.load(args)
    return Llama.from_weights(config, weights, device, dtype), tok


def passages(args: argparse.Namespace, model: Llama, tok: Tokenizer) -> torch.Tensor:
    """(B, prefix + length + 1) ids: passages of the text that do not overlap, evenly spread, each
    after begin_of_text. Without --text, texts that the checkpoint writes with full attention."""
    fits = args.decoded < args.prefix
    need(fits, f"decoded must be between 0 and prefix - 1 = {args.prefix - 1}, not {args.decoded}")
    B = args.passages
    T = args.prefix + args.length + 1
    most = model.config.max_seq_len - 1
    need(T - 1 <= most, f"prefix + length must be at most {most}, the context - 1, not {T - 1}")
    device = model.norm.weight.device
    start = [tok.bos] if tok.bos is not None else tok.encode("\n")
    n = T - len(start)
    if args.text is None:
        progress(f"no --text: sampling {B} texts of {T} tokens from the checkpoint")
        first = torch.tensor([start] * B, device=device)
        stream = Decoder(model, B, None, T).stream(first, n, 1, top_p=None, seed=args.seed)
        written = torch.stack(list(sample.counted("sampling", stream, n)), dim=1)
        return torch.cat((first, written.to(device)), dim=1)
    ids = tok.encode(sample.read_text(args.text, args.text))
    enough = len(ids) >= B * n
    need(enough, f"text {args.text} has {len(ids)} tokens: {B} passages of {n} need {B * n}")
    starts = [i * len(ids) // B for i in range(B)]
    return torch.tensor([start + ids[i : i + n] for i in starts], device=device)


def forced(
    decoder: Decoder, idx: torch.Tensor, prefix: int, decoded: int = 0
) -> Iterator[torch.Tensor]:
    """Feeds tokens prefix .. T-2 of idx (B, T) one by one, and yields after each the next token's
    log-probabilities (B, vocab). Before that it decodes the last `decoded` tokens of the prefix,
    instead of prefilling them."""
    decoder.prefill(idx[:, : prefix - decoded])
    for i in range(prefix - decoded, idx.shape[1] - 1):
        logits = decoder.step(idx[:, i])
        if i >= prefix:
            check_finite(logits)
            yield logits.float().log_softmax(dim=-1)


def fidelity(
    steps: Iterable[torch.Tensor], full: list[torch.Tensor], targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compares the steps of a method with those of full attention. Returns the KL divergence, and
    the nats lost on the text's own tokens `targets`, both (B, L)."""
    kl = []
    gap = []
    for logp, logp_full, target in zip(steps, full, targets.T, strict=True):
        kl.append((logp_full.exp() * (logp_full - logp)).sum(dim=-1))  # (B,)
        gap.append((logp_full - logp).gather(1, target[:, None])[:, 0])  # (B,)
    return torch.stack(kl, dim=1).cpu(), torch.stack(gap, dim=1).cpu()


def paired(x: torch.Tensor, y: torch.Tensor | float) -> list[float]:
    """The mean difference of two methods' values (B, L), and its standard error over passages."""
    difference = (x - y).double().mean(dim=1)  # (B,)
    return [difference.mean().item(), difference.std().item() / math.sqrt(len(difference))]


def part_ends(L: int) -> list[int]:
    """Where the parts of L steps begin and end."""
    sizes = [len(part) for part in torch.arange(L).tensor_split(min(PARTS, L))]
    return [0, *itertools.accumulate(sizes)]


def compare(values: dict[str, torch.Tensor]) -> dict[str, dict]:
    """For each method's values (B, L): their mean, the means by passage (to pair with another run)
    and by part of L, and the differences to Quest and to the control, with standard errors."""
    rows = {}
    for name, x in values.items():
        parts = [paired(part, 0.0) for part in x.tensor_split(min(PARTS, x.shape[1]), dim=1)]
        means, errors = zip(*parts, strict=True)
        row = {"mean": x.mean().item(), "by_passage": x.mean(dim=1).tolist()}
        row |= {"by_position": means, "errors": errors}
        for key, other in (("to Quest", "Quest"), ("to control", f"{name} not looking back")):
            if other in values:
                row[key] = paired(x, values[other])
        rows[name] = row
    return rows


def show_comparison(title: str, key: str, form: str, rows: dict[str, dict]) -> None:
    """Prints what `compare` found, in rows[name][key], beside what the methods read."""
    shown = {}
    for name, row in rows.items():
        shown[name] = {"KV read": row["kv_share"], "exposure": row.get("exposure")}
        shown[name]["mean"] = row[key]["mean"]
        for other in ("to Quest", "to control"):
            if other in row[key]:
                difference, error = row[key][other]
                shown[name][other] = f"{difference:+{form}} ±{error:{form}}"
    forms = {"KV read": ".1%", "exposure": ".2f", "mean": form, "to Quest": "", "to control": ""}
    used = {x: f for x, f in forms.items() if any(row.get(x) is not None for row in shown.values())}
    table(title, shown, used)


def measure_quality(args: argparse.Namespace, model: Llama, idx: torch.Tensor, found: dict) -> dict:
    """Runs the methods `found` over the passages idx (B, T), and compares them with full attention,
    which comes first. Prints tables, returns all numbers."""
    steps = range(args.prefix, idx.shape[1] - 1)
    full = []  # full attention's distributions: B * L * vocabulary numbers
    rows = {}
    kl = {}
    gap = {}
    for name, method in found.items():
        progress(name)
        decoder = method.make(model, len(idx), method.retro, idx.shape[1])
        logps = forced(decoder, idx, args.prefix, args.decoded)
        logps = sample.counted(name, logps, len(steps))
        if name == "full":
            logps = full = list(logps)
        kl[name], gap[name] = fidelity(logps, full, idx[:, args.prefix + 1 :])
        share = method.kv_share(method.retro, model.config.n_layer, steps)
        rows[name] = {"kv_share": share, "exposure": exposure(decoder)}
    for key, values in (("kl", kl), ("gap", gap)):
        for name, row in compare(values).items():
            rows[name][key] = row
    show_comparison("KL to full attention, teacher-forced", "kl", ".5f", rows)
    show_comparison("Nats lost per token", "gap", ".4f", rows)
    return {"positions": part_ends(len(steps)), "rows": rows}


def quality(args: argparse.Namespace) -> dict:
    """Fidelity on text, teacher-forced: all methods read the same tokens, and are compared with
    full attention token by token."""
    model, tok = load_model(args)
    retro = sample.retro_config(args, window=1)
    idx = passages(args, model, tok)
    return measure_quality(args, model, idx, methods(retro, args.windows, args.control))


# --------------------------------------------------------------------------------------------------
# kernels and decode: the clock and the bytes

SHAPES = {  # Llama 3.1 8B, Qwen 2.5 32B, and the checkpoint in tiny/
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
    """Microseconds per layer when all layers run one after the other: the median of 20 runs (on
    a GPU, of replays of a CUDA graph)."""

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


def memory_rates(device: str) -> dict[str, float]:
    """Bytes per second of a copy (read and write) and of two plain reads."""
    x = torch.ones(2**30 if device == "cuda" else 2**24, device=device)
    y = torch.empty_like(x)
    runs = {"copy": lambda: y.copy_(x), "amax": x.amax, "sum": x.sum}
    rates = {}
    for name, run in runs.items():
        times(run, 3)
        nbytes = 2 * x.nbytes if name == "copy" else x.nbytes
        rates[name] = nbytes / statistics.median(times(run, 10)) * 1e3
    return rates


def begin(args: argparse.Namespace) -> tuple[LlamaConfig, torch.dtype, dict[str, float]]:
    """Shape, dtype and memory rates, which it prints as the first line."""
    shape = replace(SHAPES[args.shape], max_seq_len=max(context for context, _ in args.settings))
    if args.device == "cpu":
        choose_threads(sample.parameters(sample.skeleton(shape)))
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    where = "No GPU: on the CPU, with the PyTorch reference"
    if args.device == "cuda":
        where = torch.cuda.get_device_name()
    rates = memory_rates(args.device)
    shown = [f"{name} {rate / 1e9:.0f}" for name, rate in rates.items()]
    print(f"{where}; shape {args.shape}, {dtype}; memory, GB/s:", *shown)
    return shape, dtype, rates


def fill(cache: retro_attention.LayerCache, t: int) -> None:
    """Fills a cache at random, as a step to position t finds it: the window's past rows have seen
    some of the pages, but not all."""
    for x in (cache.k, cache.v, cache.out, cache.lse):
        if x is not None:
            x.normal_()
    if cache.bounds is not None:
        valid = torch.ones((), dtype=torch.bool, device=cache.k.device)
        cache.bounds.copy_(retro_attention.page_bounds(cache.k, valid))
        cache.last_loaded.random_(t - 2 * cache.config.window, t)


def layer_bytes(
    retro: RetroConfig, shape: LlamaConfig, B: int, context: int, size: int
) -> dict[str, int]:
    """Bytes that a layer must read (paper, section 2.5, Eqs. 3-5); an element has `size` bytes.
    "four" is the limit of the kernels after `write`: the bounds of the pages held, and K and V of
    the pages selected."""
    pair = 2 * B * shape.n_kv_head * shape.head_size * size  # bytes of K and V, or of bounds
    score = retro.pages_held(context - 1) * pair
    attend = retro.pages_selected(context - 1) * retro.page_size * pair
    dense = context * pair
    return {"score": score, "attend": attend, "four": score + attend, "dense": dense}


# --------------------------------------------------------------------------------------------------
# kernels

KERNELS = ("write", "score", "select", "attend", "combine")
DENSE = ("flash", "cudnn", "ours")


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: SDPBackend) -> torch.Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, enable_gqa=True)


def stages(
    retro: RetroConfig, shape: LlamaConfig, B: int, context: int, device: str, dtype: torch.dtype
) -> dict[str, Callable]:
    """Name -> what to run, for a layer with a cache of its own."""
    W = retro.window
    n_head, n_kv_head, hs = shape.n_head, shape.n_kv_head, shape.head_size
    layer = retro_attention.RetroAttention(
        retro,
        dense=False,
        batch_size=B,
        n_head=n_head,
        n_kv_head=n_kv_head,
        head_size=hs,
        max_seq_len=context,
        device=device,
        dtype=dtype,
    )
    ops, cache = layer.ops, layer.cache
    fill(cache, context - 1)
    t = torch.tensor(context - 1, device=device)
    angles = torch.rand(context, hs // 2, device=device)
    q = torch.randn(B, W, n_head, hs, device=device, dtype=dtype)
    k, v = torch.randn(2, B, W, n_kv_head, hs, device=device, dtype=dtype)
    scores = ops.score(q, cache, t)
    chosen = ops.select(scores, cache, t)
    parts = ops.attend(q, cache, *chosen, t)
    # Dense attention has one row and no output cache.
    newest = q[:, -1:].contiguous()  # (B, 1, n_head, hs)
    alone = replace(cache, config=replace(retro, window=1), out=None, lse=None)
    rows = newest.transpose(1, 2)  # (B, n_head, 1, hs)
    keys = cache.k.flatten(2, 3)[:, :, :context]  # (B, n_kv_head, context, hs)
    values = cache.v.flatten(2, 3)[:, :, :context]

    def four():
        pages, loaded_before = ops.select(ops.score(q, cache, t), cache, t)
        ops.combine(*ops.attend(q, cache, pages, loaded_before, t), cache, t)

    return {
        "write": lambda: ops.write(q, k, v, angles, angles, cache, t),
        "score": lambda: ops.score(q, cache, t),
        "select": lambda: ops.select(scores, cache, t),
        "attend": lambda: ops.attend(q, cache, *chosen, t),
        "combine": lambda: ops.combine(*parts, cache, t),
        "four": four,
        "ours": lambda: ops.combine(*ops.attend(newest, alone, None, None, t), alone, t),
        "flash": lambda: sdpa(rows, keys, values, SDPBackend.FLASH_ATTENTION),
        "cudnn": lambda: sdpa(rows, keys, values, SDPBackend.CUDNN_ATTENTION),
    }


def kernel_row(
    layers: list[dict[str, Callable]], nbytes: dict[str, int], rate: float
) -> dict[str, float | None]:
    """Microseconds per layer of each stage of `layers` (see `stages`), and how near the kernels
    come to the byte limit; `rate` is in bytes per second."""
    us = {}
    for name in layers[0]:
        try:
            us[name] = microseconds([layer[name] for layer in layers])
        except RuntimeError as error:  # SDPA's backends do not support every device and shape
            if name not in ("flash", "cudnn"):
                raise
            progress(f"{name}: {str(error).splitlines()[0]}")
    dense = min(us[name] for name in DENSE if name in us)
    limit = nbytes["four"] / rate * 1e6  # microseconds
    ratios = {"of the limit": limit / us["four"], "dense": dense, "dense/four": dense / us["four"]}
    return us | ratios


def layers_beyond_cache(nbytes: int, device: str) -> int:
    """How many layers to time so that the bounds of all, `nbytes` each, exceed the L2 cache."""
    L2 = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0
    return max(2, -(-3 * L2 // nbytes))


@torch.inference_mode()
def kernels(args: argparse.Namespace) -> dict:
    """Microseconds of each kernel, and of dense attention."""
    retros = [RetroConfig(window=w, budget=args.budget) for w in args.windows]
    shape, dtype, rates = begin(args)
    rate = max(rates.values())
    rows = {}
    for context, B in args.settings:
        for retro in retros:
            name = f"{context}x{B} {retro.budget:.4g} W={retro.window}"
            progress(f"kernels: {name}")
            nbytes = layer_bytes(retro, shape, B, context, dtype.itemsize)
            n = layers_beyond_cache(nbytes["score"], args.device)
            layers = [stages(retro, shape, B, context, args.device, dtype) for _ in range(n)]
            row = kernel_row(layers, nbytes, rate)
            setting = {"context": context, "batch": B, "window": retro.window}
            rows[name] = setting | {"budget": retro.budget, "bytes": nbytes} | row
    forms = dict.fromkeys([*KERNELS, "four"], ".1f") | {"of the limit": ".0%"}
    forms |= dict.fromkeys([*DENSE, "dense"], ".1f") | {"dense/four": ".2f"}
    title = """Microseconds per layer. Four: score to combine; the limit is what their bytes allow.
Dense attention: SDPA with flash and cuDNN, our attend over all pages, the fastest of these."""
    table(title, rows, forms)
    return {"memory_rate": rates, "rows": list(rows.values())}


# --------------------------------------------------------------------------------------------------
# decode


def random_model(config: LlamaConfig, device: str, dtype: torch.dtype) -> Llama:
    model = sample.skeleton(config).to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for p in model.parameters():
        if p.ndim == 2:
            p.normal_(std=0.02)
        else:
            p.fill_(1)
    return model


def step_bytes(model: Llama, retro: RetroConfig | None, B: int, context: int) -> int:
    """Bytes that any implementation of a step must read: the weights, and `layer_bytes` for each
    layer."""
    config = model.config
    table = model.tok_embeddings.weight
    layer = layer_bytes(retro or RetroConfig(), config, B, context, table.itemsize)
    dense = config.n_layer if retro is None else retro.dense_layers
    weights = sum(p.nbytes for p in model.parameters())
    if not config.tie_embeddings:
        weights -= table.nbytes  # a step takes single rows of it
    return weights + dense * layer["dense"] + (config.n_layer - dense) * layer["four"]


def nearly_full(
    model: Llama, B: int, retro: RetroConfig | None, context: int, left: int
) -> Decoder:
    """A decoder with random caches, which leave `left` positions of the context free."""
    torch.cuda.empty_cache()
    decoder = Decoder(model, B, retro, context)
    decoder.position = context - 1 - left
    decoder.t.fill_(decoder.position)
    for layer in decoder.layers:
        fill(layer.cache, decoder.position)
    return decoder


def step_times(model: Llama, B: int, retro: RetroConfig | None, context: int) -> list[float]:
    """Milliseconds of the steps to the last 30 positions of the context."""
    decoder = nearly_full(model, B, retro, context, left=35)
    token = torch.randint(model.config.vocab_size, (B,), device=decoder.t.device)
    times(lambda: decoder.step(token), 5)  # the first compiles and captures the graph
    return times(lambda: decoder.step(token), 30)


def token_times(model: Llama, B: int, retro: RetroConfig | None, context: int) -> list[float]:
    """Milliseconds of the last 30 tokens of the context, sampled with the defaults of `generate`: a
    step, the sampling, and the token's copy to the host."""
    decoder = nearly_full(model, B, retro, context, left=36)
    prompt = torch.randint(model.config.vocab_size, (B, 1), device=decoder.t.device)
    stream = decoder.stream(prompt, 35, append=True)
    times(lambda: next(stream), 5)
    return times(lambda: next(stream), 30)


def step_rows(
    ms: dict[str, float], model: Llama, retros: dict, context: int, B: int, rate: float
) -> dict[str, dict]:
    """Milliseconds of each method -> its row, with bytes and ratios. A method without an entry in
    `retros` attends densely."""
    rows = {}
    for name, x in ms.items():
        contexts = range(context - 29, context + 1)
        nbytes = statistics.mean(step_bytes(model, retros.get(name), B, n) for n in contexts)
        row = {"context": context, "batch": B, "method": name, "ms": x, "bytes": nbytes}
        row |= {"full/this": ms["full"] / x, "this/Quest": x / ms["Quest"]}
        rows[f"{context}x{B} {name}"] = row | {"share": nbytes / rate / x * 1e3}
    return rows


def fitting(args: argparse.Namespace, shape: LlamaConfig, dtype: torch.dtype) -> list[tuple]:
    """The settings that fit the device's memory. Prints a line for each."""
    retro = RetroConfig(window=max(args.windows), dense_layers=args.dense_layers)
    torch.cuda.empty_cache()
    fitting = []
    for context, B in args.settings:
        try:
            print(sample.check_memory(shape, retro, B, context, torch.device(args.device), dtype))
            fitting.append((context, B))
        except ValueError as error:
            print(f"{context}x{B} is left out: {error}")
    return fitting


@torch.inference_mode()
def decode(args: argparse.Namespace, more: dict[str, Callable] | None = None) -> dict:
    """Milliseconds of whole steps, with random weights and random caches. `more` are other ways
    to decode densely: name -> (model, B, context) -> milliseconds."""
    check_dense(args.dense_layers, SHAPES[args.shape])
    shape, dtype, rates = begin(args)
    settings = fitting(args, shape, dtype)
    model = random_model(shape, args.device, dtype)
    found = methods(RetroConfig(dense_layers=args.dense_layers), args.windows)
    retros = {name: method.retro for name, method in found.items()}
    rows = {}
    for context, B in settings:
        ms = {name: [] for name in [*retros, *(more or {})]}
        ms_token = {name: [] for name in retros}
        for i in range(args.rounds):
            progress(f"decode: {context}x{B}, round {i + 1} of {args.rounds}")
            for name, retro in retros.items():
                ms[name] += step_times(model, B, retro, context)
                ms_token[name] += token_times(model, B, retro, context)
            for name, run in (more or {}).items():
                ms[name] += run(model, B, context)
        medians = {name: statistics.median(x) for name, x in ms.items()}
        found = step_rows(medians, model, retros, context, B, max(rates.values()))
        for name, x in ms_token.items():
            found[f"{context}x{B} {name}"]["ms/token"] = statistics.median(x)
        rows |= found
    forms = {"ms": ".3f", "bytes": ".3g", "share": ".0%", "full/this": ".2f", "this/Quest": ".3f"}
    title = """Milliseconds per step of the batch; ms/token: with sampling (.8, top_p .95).
Share: the part of ms that reading the step's bytes takes at best."""
    table(title, rows, {"ms": ".3f", "ms/token": ".3f"} | forms)
    return {"memory_rate": rates, "rows": list(rows.values())}


# --------------------------------------------------------------------------------------------------
# The command line


def at_least(least: int) -> Callable[[str], int]:
    """For argparse: an integer >= `least`."""

    def integer(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be >= {least}, not {text}")
        return int(text)

    return integer


def setting(text: str) -> tuple[int, int]:
    """For argparse: CONTEXTxBATCH."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found or int(found[1]) < 256 or int(found[2]) < 1:
        form = "CONTEXTxBATCH with a context >= 256 and a batch >= 1, e.g. 32768x8"
        raise argparse.ArgumentTypeError(f"must be {form}, not {text}")
    return int(found[1]), int(found[2])


def text_options(add: Callable, passages: int, least: int, length: int) -> None:
    """The defaults are for the checkpoint in tiny/ on a CPU. With the paper's floor of 256 tokens
    and two dense layers, a model of ten layers would show little in texts this short."""
    retro = RetroConfig(min_tokens=32, dense_layers=0)
    # In a small model, bfloat16's rounding is as large as what is measured.
    sample.add_model_options(add, retro, dtype="float32")
    windows = [2, 4, 8]
    add("--windows", type=at_least(1), nargs="+", default=windows, help="windows to measure")
    add("--text", default=None, help="file to cut passages from; default: the checkpoint's own")
    add("--seed", type=int, default=0, help="seed of the texts that the checkpoint writes")
    add("--passages", type=at_least(least), default=passages, help="passages, as one batch")
    add("--prefix", type=at_least(1), default=1024, help="tokens of prompt")
    add("--length", type=at_least(1), default=length, help="tokens to decode after the prompt")
    help = "how many final prompt tokens to decode instead of prefill"
    add("--decoded", type=at_least(0), default=0, help=help)


def quality_options(add: Callable) -> None:
    text_options(add, passages=8, least=2, length=96)
    help = "add, for each window, Quest with as many pages"
    add("--control", action="store_true", help=help)


def speed_options(add: Callable, settings: list[tuple[int, int]], windows: list[int]) -> None:
    """Options for a GPU; without one, for the reference, which tells little about speed."""
    gpu = torch.cuda.is_available()
    if not gpu:
        settings = [(1024, 1), (4096, 1)]
    shapes = list(SHAPES) if gpu else ["tiny"]
    add("--shape", choices=shapes, default=shapes[0], help="the model whose shape to measure")
    help = "CONTEXTxBATCH, e.g. 32768x8"
    add("--settings", type=setting, nargs="+", default=settings, help=help)
    add("--windows", type=at_least(1), nargs="+", default=windows, help="windows to measure")


def kernels_options(add: Callable) -> None:
    settings = [(k * 1024, B) for k in (8, 32, 64, 128) for B in (1, 8)]
    speed_options(add, settings, windows=[1, 2, 8])
    help = "fraction of the KV pages to load; 0.0625 is 2,048 tokens of 32k, Quest's own setting"
    add("--budget", type=float, default=RetroConfig().budget, help=help)


def decode_options(add: Callable) -> None:
    settings = [(k * 1024, B) for k, B in ((32, 1), (128, 1), (32, 8), (64, 8))]
    speed_options(add, settings, windows=[2, 4, 8])
    help = "first layers, dense; 0 gives all layers the same byte limit"
    add("--dense_layers", type=at_least(0), default=0, help=help)
    help = "rounds; each measures all methods in turn, 30 steps each"
    add("--rounds", type=at_least(1), default=3, help=help)


def add_command(commands, run: Callable, options: Callable, **fixed) -> None:
    """A subcommand with the name and the docstring of `run`."""
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = commands.add_parser(run.__name__, help=run.__doc__, formatter_class=form)
    parser.set_defaults(run=run, command=run.__name__, **fixed)
    options(parser.add_argument)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = sample.Parser(description=__doc__, formatter_class=form)
    names = "{quality,kernels,decode}"
    commands = parser.add_subparsers(dest="command", metavar=names, required=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add_command(commands, quality, quality_options)
    add_command(commands, kernels, kernels_options, device=device)
    add_command(commands, decode, decode_options, device=device)
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> int:
    """Runs the command and prints its results, with what they depend on, as the last line."""
    results = args.run(args)
    device = sample.choose_device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    named = ("torch", "triton", "numpy", "transformers", "flashinfer-python", "matplotlib")
    versions = {x.name: x.version for x in distributions() if x.name in named}
    record = {
        "command": args.command,
        "arguments": {name: x for name, x in vars(args).items() if name != "run"},
        "versions": {"python": platform.python_version()} | versions,
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "seconds": round(time.time() - START),
        "results": results,
    }
    line = json.dumps(record, allow_nan=False, default=os.fspath)  # a Path is a string
    if sys.stdout.isatty():
        line = f"(All numbers as one line of JSON, {len(line)} characters: redirect stdout.)"
    print("\n" + line, flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    return sample.exit_code("bench.py", lambda: measure(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
