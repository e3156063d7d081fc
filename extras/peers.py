"""Measures other libraries beside bench.py: python -m extras.peers kernels

    kernels     FlashInfer's attention of one row, over the pages that we select and over all pages,
                beside our attend and combine and the dense attention of PyTorch
    decode      a whole step of transformers' Llama with its DynamicCache, beside ours

Options and JSON line are those of bench.py's commands of the same names. Each library must be
installed: pip install flashinfer-python, or pip install -e '.[hf]'
"""

import argparse
import inspect
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch

import bench
import retro_attention
import sample
from model import Llama, LlamaConfig
from retro_attention import LayerCache, RetroConfig, need


def library(name: str, install: str):
    """The module `name`. Raises ValueError if it cannot be imported."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(f"{name} cannot be imported ({error}): {install}") from None


# --------------------------------------------------------------------------------------------------
# kernels: FlashInfer


def flashinfer_decode(
    row: torch.Tensor, cache: LayerCache, pages: torch.Tensor, workspace: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """Plans FlashInfer's attention of one row (B, 1, n_head, hs) over full pages (B, n_kv_head, S),
    and returns what runs it, with output (B * n_kv_head, G, hs).

    Each KV head has its own pages, so FlashInfer gets it as a separate text.
    """
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    B, n_kv_head, S = pages.shape
    P, ps, hs = cache.k.shape[2:]
    texts = B * n_kv_head
    G = row.shape[2] // n_kv_head
    starts = torch.arange(0, (texts + 1) * S, S, dtype=torch.int32)  # (texts + 1,) in `listed`
    offsets = torch.arange(0, texts * P, P, device=pages.device)[:, None]  # (texts, 1)
    listed = (pages.flatten(0, 1) + offsets).flatten().int()  # (texts * S,)
    tokens = torch.full((texts,), ps, dtype=torch.int32)  # in the last page of each text
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, use_tensor_cores=True)
    wrapper.plan(starts, listed, tokens, G, 1, hs, ps, q_data_type=row.dtype)
    kv = (cache.k.view(texts * P, ps, 1, hs), cache.v.view(texts * P, ps, 1, hs))
    return partial(wrapper.run, row.reshape(texts, G, hs), kv)


def flashinfer_stages(
    workspace: torch.Tensor,
    retro: RetroConfig,
    shape: LlamaConfig,
    B: int,
    context: int,
    device: str,
    dtype: torch.dtype,
) -> dict[str, Callable]:
    """Name -> what to run, for a cache of its own. The plans are made here, untimed."""
    sizes = (B, shape.n_head, shape.n_kv_head, shape.head_size, context)
    cache = retro_attention.new_cache(retro, False, *sizes, device, dtype)
    bench.fill(cache, context - 1)
    t = torch.tensor(context - 1, device=device)
    row = torch.randn(B, 1, shape.n_head, shape.head_size, device=device, dtype=dtype)
    scores = retro_attention.score(row, cache, t)  # (B, n_kv_head, P)
    selected, _ = retro_attention.select(scores, cache, t)  # (B, n_kv_head, S)
    every = torch.arange(scores.shape[2], device=device).expand_as(scores)  # (B, n_kv_head, P)
    return {
        "FlashInfer selected": flashinfer_decode(row, cache, selected, workspace),
        "FlashInfer all": flashinfer_decode(row, cache, every, workspace),
    }


@torch.inference_mode()
def kernels(args: argparse.Namespace) -> dict:
    """Microseconds per layer of FlashInfer's attention, ours, and PyTorch's."""
    flashinfer = library("flashinfer", "pip install flashinfer-python")
    need(args.device == "cuda", "FlashInfer needs a GPU, and this machine has none")
    retros = [RetroConfig(window=w, budget=args.budget) for w in args.windows]
    shape, dtype, rates = bench.begin(args)
    ours = ("attend", "combine", "four", *bench.DENSE)
    workspace = torch.empty(2**27, dtype=torch.uint8, device=args.device)  # for all layers
    rows = {}
    for context, B in args.settings:
        for retro in retros:
            name = f"{context}x{B} {retro.budget:.4g} W={retro.window}"
            bench.progress(f"kernels: {name}")
            setting = (retro, shape, B, context, args.device, dtype)
            nbytes = bench.layer_bytes(retro, shape, B, context, dtype.itemsize)
            layers = []
            for _ in range(bench.layers_beyond_cache(nbytes["score"], args.device)):
                found = bench.stages(*setting)
                layers.append({x: found[x] for x in ours} | flashinfer_stages(workspace, *setting))
            row = bench.kernel_row(layers, nbytes, max(rates.values()))
            fixed = {"context": context, "batch": B, "window": retro.window, "budget": retro.budget}
            rows[name] = fixed | {"bytes": nbytes} | row
    columns = ("attend", "combine", "FlashInfer selected", *bench.DENSE, "FlashInfer all")
    title = """Microseconds per layer. Selected pages: attend, combine (W rows), FlashInfer (1 row).
All pages, 1 row: SDPA with flash and cuDNN, our attend (ours), FlashInfer."""
    bench.table(title, rows, dict.fromkeys(columns, ".1f"))
    version = flashinfer.__version__
    return {"memory_rate": rates, "flashinfer": version, "rows": list(rows.values())}


# --------------------------------------------------------------------------------------------------
# decode: transformers


def step_times(model: Llama, B: int, context: int) -> list[float]:
    """The same as `bench.step_times`, for transformers' Llama in the shape of `model`, dense."""
    from transformers import AutoModelForCausalLM, DynamicCache
    from transformers import LlamaConfig as Config

    shape = model.config
    dtype = model.norm.weight.dtype
    config = Config(
        hidden_size=shape.dim,
        num_hidden_layers=shape.n_layer,
        num_attention_heads=shape.n_head,
        num_key_value_heads=shape.n_kv_head,
        head_dim=shape.head_size,
        vocab_size=shape.vocab_size,
        intermediate_size=shape.ffn_dim,
        max_position_embeddings=shape.max_seq_len,
        tie_word_embeddings=shape.tie_embeddings,
    )
    with torch.device(model.norm.weight.device):
        theirs = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        cache = DynamicCache(config=config)
        for i in range(shape.n_layer):
            k, v = torch.randn(2, B, shape.n_kv_head, context - 35, shape.head_size, dtype=dtype)
            cache.update(k, v, i)
        token = torch.randint(shape.vocab_size, (B, 1))
    # The name depends on the version; an unknown name is ignored.
    names = inspect.signature(theirs.forward).parameters
    name = "cache" if "cache" in names else "past_key_values"
    step = partial(theirs, input_ids=token, use_cache=True, **{name: cache})  # appends to the cache
    bench.times(step, 5)
    times = bench.times(step, 30)
    assert cache.get_seq_length() == context, "the steps have not used the cache"
    return times


def decode(args: argparse.Namespace) -> dict:
    """Milliseconds of whole steps, ours and transformers'."""
    library("transformers", "pip install -e '.[hf]'")
    return bench.decode(args, more={"transformers": step_times})


# --------------------------------------------------------------------------------------------------
# The command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = sample.Parser(prog="extras.peers", description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(dest="command", required=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bench.add_command(commands, kernels, bench.kernels_options, device=device)
    bench.add_command(commands, decode, bench.decode_options, device=device)
    args = parser.parse_args(argv)
    args.command = f"peers {args.command}"  # in the JSON: not bench.py's command
    return args


def main(argv: list[str] | None = None) -> int:
    return sample.exit_code("extras.peers", lambda: bench.measure(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
