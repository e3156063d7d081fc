"""Splits each layer's heads and feed-forward over GPUs (or processes); model.py is unchanged.

    torchrun --nproc-per-node 2 -m extras.parallel sample.py --prompt "It was a dark night"

runs sample.py, bench.py or any other script in two processes, one per GPU; with `--device cpu` also
without GPUs. A script that torchrun starts directly must call `apply()` before it makes a model.

Each rank holds a shard: some of the KV heads, their query heads, and a share of ffn_dim.
RetroAttention works per KV head, so its code is the same. A rank's attention returns a partial sum
over heads, its feed-forward one over ffn_dim. A forward hook adds these over the ranks: 2 sums per
layer. Everything else, such as sampling, happens on every rank alike. The sums have the
same bits on all ranks, so one seed gives one text.
"""

import argparse
import gc
import inspect
import io
import os
import re
import runpy
import secrets
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from model import Decoder, Llama, LlamaConfig
from retro_attention import need

REPOSITORY = Path(__file__).resolve().parent.parent


def shard_config(config: LlamaConfig, n: int) -> LlamaConfig:
    """The config of one rank. Raises ValueError unless n divides the KV heads and ffn_dim."""
    divides = config.n_kv_head % n == config.ffn_dim % n == 0
    sizes = f"the {config.n_kv_head} KV heads and ffn_dim {config.ffn_dim}"
    need(divides, f"the number of processes must divide {sizes}, not {n}")
    return replace(
        config,
        n_head=config.n_head // n,
        n_kv_head=config.n_kv_head // n,
        ffn_dim=config.ffn_dim // n,
    )


def shard_weight(name: str, w: torch.Tensor, rank: int, n: int) -> torch.Tensor:
    """A view of the rank's rows of wq, wk, wv, w1 and w3 (weight and bias), or of its columns of wo
    and w2; any other tensor as a whole."""
    found = re.search(r"\.(?:w[qkv13]|(wo|w2))\.(?:weight|bias)$", name)
    dim = 1 if found and found[1] else 0
    if not found or w.ndim <= dim or w.shape[dim] % n:
        return w  # `Llama.from_weights` refuses a shape that cannot be split
    return w.chunk(n, dim)[rank]


def add_up(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
    """Forward hook: sums the output over the ranks, in place."""
    need(not output.requires_grad, "several processes cannot train: use torch.no_grad()")
    dist.all_reduce(output)


def apply() -> None:
    """Joins the processes that torchrun has started, and makes every `Llama` a shard.

    Raises ValueError if torchrun has started none, or if they are joined already.
    """
    need("RANK" in os.environ, "must be started by torchrun --nproc-per-node N -m extras.parallel")
    local = int(os.environ["LOCAL_RANK"])
    if local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    rank, n = dist.get_rank(), dist.get_world_size()
    build = Llama.__init__
    from_weights = Llama.from_weights.__func__
    stream = Decoder.stream

    def build_shard(self, config: LlamaConfig) -> None:
        build(self, shard_config(config, n))
        for block in self.layers:
            block.attention.register_forward_hook(add_up)
            block.feed_forward.register_forward_hook(add_up)

    def load_shard(cls, config: LlamaConfig, weights: dict, *args, **options) -> Llama:
        names = list(weights)
        shards = {name: shard_weight(name, weights.pop(name), rank, n) for name in names}
        return from_weights(cls, config, shards, *args, **options)

    def stream_with_one_seed(*args, **options) -> Iterator[torch.Tensor]:
        call = inspect.signature(stream).bind(*args, **options)
        if call.arguments.get("seed") is None:
            call.arguments["seed"] = from_rank_0(secrets.randbits(63))
        return stream(*call.args, **call.kwargs)

    Llama.__init__ = build_shard
    Llama.from_weights = classmethod(load_shard)
    Decoder.stream = stream_with_one_seed


def from_rank_0(x):
    """Rank 0's x, on every rank."""
    values = [x]
    dist.broadcast_object_list(values)
    return values[0]


# --------------------------------------------------------------------------------------------------
# The command


def check(args: list[str], n: int) -> Path:
    """The path of the script. Raises ValueError if `args`, a script and its arguments, cannot run
    in n processes of this machine."""
    need(args, "no script: torchrun --nproc-per-node N -m extras.parallel sample.py ...")
    parser = argparse.ArgumentParser(add_help=False)  # accepts abbreviations, and --device=cpu
    parser.add_argument("--device", nargs="?")
    parser.add_argument("--trace", nargs="?", const="")
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--prompt", nargs="?")
    options, _ = parser.parse_known_args(args[1:])
    need(options.trace is None, "--trace would show the heads of one process: use one process")
    talks = options.chat and options.prompt is None
    need(not talks, "a conversation needs one process: --chat without --prompt")
    gpus = torch.cuda.device_count()
    if gpus and options.device != "cpu":
        need(n <= gpus, f"at most {gpus} processes, one for each GPU of this machine, not {n}")
        own = n == 1 or ":" not in (options.device or "")
        need(own, f"each process has its own GPU: device must be cuda, not {options.device!r}")
    # Paths are relative to the current folder or to the repository.
    paths = [Path(args[0]), REPOSITORY / args[0]]
    paths = [path for path in paths if path.is_file()]
    need(paths, f"script {args[0]}: no such file")
    return paths[0]


def silence() -> None:
    """Leaves it to rank 0 to print and to handle Ctrl-C, which every process receives."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def share_stdin(rank: int) -> None:
    """Reads stdin on rank 0, and gives every rank a stdin with the same bytes."""
    data = from_rank_0(sys.stdin.buffer.read() if rank == 0 else None)
    sys.stdin = io.TextIOWrapper(io.BytesIO(data))


def main(args: list[str]) -> int:
    rank = int(os.environ.get("RANK", 0))
    if rank > 0:
        silence()
    try:
        path = check(args, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        apply()
        if any(re.fullmatch("(--[a-z_]+=)?(FILE:)?-", arg) for arg in args):  # stdin is read
            share_stdin(rank)
    except (ValueError, OSError) as error:  # OSError: stdin cannot be read
        print(f"parallel.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    n = dist.get_world_size()
    print(f"{n} processes share the model; sizes are those of one process", file=sys.stderr)
    sys.argv = [str(path), *args[1:]]
    sys.path.insert(0, str(path.parent))
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise  # torchrun ends the other processes
    gc.collect()  # NCCL waits for the script's CUDA graphs to be freed
    dist.destroy_process_group()  # else NCCL warns
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
