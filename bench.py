"""Measures: every number of the README comes out of here.

    python bench.py kernels      # each kernel of a decode step, one layer: microseconds, share of what the bytes allow
    python bench.py decode       # whole steps of a model with random weights: full attention, Quest, RetroAttention

Each prints a short table and ends with one line of JSON. `--quick` takes a minute.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import retro_attention
from model import Decoder, Llama, LlamaConfig
from retro_attention import LayerCache, RetroAttention, RetroConfig

TINY = Path(__file__).resolve().parent / "tiny"
SHAPES = {  # of Llama 3.1 8B and Llama 3.2 1B
    "8b": LlamaConfig(4096, 32, 32, 8, 128_256, 14_336, 131_072, rope_scaling=8.0),
    "1b": LlamaConfig(2048, 16, 32, 8, 128_256, 8_192, 131_072, rope_scaling=32.0, tie_embeddings=True),
}


# ----------------------------------------------------------------------------------------------------------------------
# Clocks and contents


def captured(run) -> torch.cuda.CUDAGraph:
    """`run()` as a CUDA graph: its launches cost next to nothing, so that a replay shows the kernels alone."""
    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def times(run, n: int) -> list[float]:
    """Milliseconds of each of `n` calls, by events on a GPU, by the clock elsewhere."""
    if not torch.cuda.is_available():
        marks = [time.perf_counter()]
        for _ in range(n):
            run()
            marks.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in zip(marks, marks[1:], strict=False)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]


def replay_us(run, n: int = 20) -> float:
    """Median microseconds of a replay of `run()`."""
    graph = captured(run)
    times(graph.replay, 3)
    return 1e3 * statistics.median(times(graph.replay, n))


def copy_bandwidth() -> float:
    """Bytes a second of a device-to-device copy, read and written: what memory gives."""
    a = torch.randn(2**30, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.nbytes / (replay_us(lambda: b.copy_(a)) * 1e-6)


def fill(cache: LayerCache, t: int) -> None:
    """Random contents, as a decode step to position t finds them: some pages seen by the window's rows, some not."""
    for x in (cache.k, cache.v):
        x.normal_()
    if cache.k_min is not None:
        torch.amin(cache.k, dim=3, out=cache.k_min)
        torch.amax(cache.k, dim=3, out=cache.k_max)
        cache.last_loaded.random_(t - 2 * cache.config.window, t)
        cache.out.normal_()
        cache.lse.normal_()


# ----------------------------------------------------------------------------------------------------------------------
# bench.py kernels


def kernel_times(config: RetroConfig, model: LlamaConfig, B: int, context: int, dtype=torch.bfloat16) -> dict[str, float]:
    """Microseconds a layer of each stage, of the four after `write` together, and of dense attention two ways.

    A graph runs through several layers with caches of their own, more than the L2 cache holds.
    """
    import kernels as ops

    W, n_head, n_kv_head, hs = config.window, model.n_head, model.n_kv_head, model.head_size
    t = torch.tensor(context - 1, device="cuda")
    layer_bytes = 2 * B * context * n_kv_head * hs * dtype.itemsize
    n = max(2, min(16, round(8e9 / layer_bytes)))
    shape = (B, n_head, n_kv_head, hs, context, "cuda", dtype)
    caches = [retro_attention.new_cache(config, False, *shape) for _ in range(n)]
    for cache in caches:
        fill(cache, context - 1)
    cos = sin = torch.rand(context, hs // 2, device="cuda")
    q, k, v = (torch.randn(n, B, W, h, hs, device="cuda", dtype=dtype) for h in (n_head, n_kv_head, n_kv_head))
    scores = [ops.score(q[i], c, t) for i, c in enumerate(caches)]
    lists = [ops.select(s, c, t) for s, c in zip(scores, caches, strict=True)]
    parts = [ops.attend(q[i], c, *lists[i], t) for i, c in enumerate(caches)]

    # Dense attention has one row and no output cache.
    alone = [replace(c, config=replace(config, window=1), out=None) for c in caches]
    newest = q[:, :, -1:].contiguous()

    def four(i, c):
        ops.combine(*ops.attend(q[i], c, *ops.select(ops.score(q[i], c, t), c, t), t), c, t)

    stages = {
        "write": lambda i, c: ops.write(q[i], k[i], v[i], cos, sin, c, t),
        "score": lambda i, c: ops.score(q[i], c, t),
        "select": lambda i, c: ops.select(scores[i], c, t),
        "attend": lambda i, c: ops.attend(q[i], c, *lists[i], t),
        "combine": lambda i, c: ops.combine(*parts[i], c, t),
        "four": four,
        "dense": lambda i, c: ops.combine(*ops.attend(newest[i], alone[i], None, None, t), alone[i], t),
    }
    result = {}
    for name, stage in stages.items():
        result[name] = replay_us(lambda stage=stage: [stage(i, c) for i, c in enumerate(caches)]) / n
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):

        def sdpa(backend=backend):
            with sdpa_kernel(backend):
                for i, c in enumerate(caches):
                    F.scaled_dot_product_attention(
                        newest[i].transpose(1, 2), c.k.flatten(2, 3), c.v.flatten(2, 3), enable_gqa=True
                    )

        try:
            result[name] = replay_us(sdpa) / n
        except RuntimeError as error:
            print(name, str(error)[:200], file=sys.stderr)
    return result


def floor_bytes(config: RetroConfig, model: LlamaConfig, B: int, context: int, size: int = 2) -> dict[str, int]:
    """Bytes a layer that no implementation gets around: the bounds of all pages, the selected pages' K and V; all K and V."""
    vector = B * model.n_kv_head * model.head_size * size
    held, ps = -(-context // config.page_size), config.page_size
    selected = config.pages_selected(context - 1)
    return {"score": 2 * held * vector, "attend": 2 * selected * ps * vector, "dense": 2 * context * vector}


def bench_kernels(args) -> dict:
    peak = copy_bandwidth()
    print(f"copy {peak / 1e12:.2f} TB/s")
    rows = []
    for context, B, budget in [
        (32768, 1, 0.15),
        (131072, 1, 0.15),
        (32768, 8, 0.15),
        (65536, 8, 0.15),
        (32768, 1, 0.0625),
        (32768, 8, 0.0625),
    ]:
        for W in args.windows:
            config = RetroConfig(window=W, budget=budget)
            us = kernel_times(config, SHAPES[args.shape], B, context)
            floors = {k: v / peak * 1e6 for k, v in floor_bytes(config, SHAPES[args.shape], B, context).items()}
            floor = floors["score"] + floors["attend"]
            rows.append({"context": context, "batch": B, "budget": budget, "window": W, "us": us, "floor": floors})
            print(
                f"{context // 1024}k B{B} b{budget} W{W}: "
                + " ".join(f"{k} {v:.1f}" for k, v in us.items())
                + f" | floor4 {floor:.1f} share {floor / us['four']:.2f} dense share {floors['dense'] / us['dense']:.2f}",
                flush=True,
            )
    return {"rows": rows}


# ----------------------------------------------------------------------------------------------------------------------
# bench.py decode


def random_model(config: LlamaConfig) -> Llama:
    with torch.device("meta"):
        model = Llama(config)
    model = model.to(torch.bfloat16).to_empty(device="cuda").eval().requires_grad_(False)
    for p in model.parameters():
        p.normal_(std=0.02) if p.ndim == 2 else p.fill_(1.0)
    model.set_rope()
    return model


def bench_decode(args) -> dict:
    model = random_model(SHAPES[args.shape])
    c = model.config
    weights = sum(p.nbytes for p in model.parameters()) - (0 if c.tie_embeddings else model.tok_embeddings.weight.nbytes)
    peak = copy_bandwidth()
    methods = {"full": None} | {f"W{W}": RetroConfig(window=W, dense_layers=args.dense_layers) for W in (1, 2, 4, 8)}
    rows = []
    for context, B in args.settings:
        ms = {name: [] for name in methods}
        torch.cuda.reset_peak_memory_stats()
        for _ in range(args.rounds):
            for name, retro in methods.items():
                decoder = Decoder(model, B, retro, max_seq_len=context)
                for layer in decoder.layers:
                    fill(layer.cache, context - 64)
                decoder.t.fill_(context - 64)
                decoder.position = context - 64
                token = torch.randint(c.vocab_size, (B,), device="cuda")
                times(lambda: decoder.step(token), 5)
                ms[name] += times(lambda: decoder.step(token), 30)
                del decoder
        med = {name: statistics.median(x) for name, x in ms.items()}
        floors = {}
        for name, retro in methods.items():
            f = floor_bytes(retro or RetroConfig(), c, B, context)
            dense = c.n_layer if retro is None else args.dense_layers
            floors[name] = (weights + dense * f["dense"] + (c.n_layer - dense) * (f["score"] + f["attend"])) / peak * 1e3
        for name in methods:
            print(
                f"{context // 1024}k B{B} {name}: {med[name]:.3f} ms floor {floors[name]:.2f} share {floors[name] / med[name]:.2f} "
                f"vs full {med['full'] / med[name]:.2f} vs quest {med[name] / med['W1']:.3f} "
                f"iqr {statistics.quantiles(ms[name], n=4)[0]:.3f}-{statistics.quantiles(ms[name], n=4)[2]:.3f}",
                flush=True,
            )
        print(f"peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB", flush=True)
        rows.append({"context": context, "batch": B, "ms": med, "floor_ms": floors})
    return {"rows": rows}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["kernels", "decode"])
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--dense_layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--settings", type=json.loads, default=[[32768, 1], [131072, 1], [32768, 8], [65536, 8]])
    args = parser.parse_args()
    with torch.inference_mode():
        print(json.dumps({"kernels": bench_kernels, "decode": bench_decode}[args.command](args)))


if __name__ == "__main__":
    main()
