"""Compares several processes with one. They use gloo on a CPU, and NCCL on two GPUs."""

import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch

from extras import parallel
from model import Llama
from test_retro import (
    SPARSE,
    TINY,
    close,
    decode,
    random_model,
    random_tokens,
    refused_in_a_line,
    run_main,
)

# Runs in two processes; `test_two_processes_equal_one` compares the results.
SCRIPT = """
import sys
import torch
from model import Decoder, Llama, LlamaConfig

folder, device, dtype = sys.argv[1:]
config, weights, idx, retros = torch.load(folder + "/input", weights_only=False)
model = Llama.from_weights(LlamaConfig(**config), weights, device, getattr(torch, dtype))
idx = idx.to(device)
result = {"weights": model.weights(), "left": len(weights), "texts": [], "logits": []}
for retro in retros:
    greedy = model.generate(idx[:, :60], 6, retro, temperature=0)
    drawn = model.generate(idx[:, :60], 6, retro, temperature=1, seed=3)
    result["texts"].append((greedy, drawn))
    decoder = Decoder(model, 2, retro, 72)
    logits = [decoder.prefill(idx[:, :60])]
    logits += [decoder.step(token) for token in idx[:, 60:].T]
    result["logits"].append(torch.stack(logits, 1))
result["unseeded"] = [model.generate(idx[:, :60], 6, retros[0], temperature=1) for _ in range(2)]
try:
    Llama(LlamaConfig(**config)).to(device)(idx)
except ValueError as error:
    result["training"] = str(error)
torch.save(result, f"{folder}/{torch.distributed.get_rank()}")
"""

needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def start_python(args, gpus="", **options):
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TINY.parent)}
    environment |= {"CUDA_VISIBLE_DEVICES": gpus, **options.pop("env", {})}
    return subprocess.Popen(
        [sys.executable, *map(str, args)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def run_processes(n, args, gpus=""):
    """Starts the n processes that torchrun would start, but seconds faster. Yields the exit code,
    stdout and stderr of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(n)}
    children = []
    for i in range(n):
        own = {"RANK": str(i), "LOCAL_RANK": str(i), "LOCAL_WORLD_SIZE": str(n)}
        children.append(start_python(args, gpus, env={**shared, **own}))
    for child in children:
        out, error = child.communicate(timeout=200)
        yield child.returncode, out.decode(), error.decode()


def same(a, b):
    return a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize("device, dtype, impl, tolerance", [
    ("cpu", "float64", "torch", 1e-10),
    pytest.param("cuda", "float32", "triton", 1e-4, marks=needs_two_gpus),
])  # fmt: skip
def test_two_processes_equal_one(tmp_path, device, dtype, impl, tolerance):
    """Texts, logits and the joined weights are those of one process. On two GPUs the steps are CUDA
    graphs that contain the sums.

    Guards against heads on the wrong rank, a tensor that is split and should not be (or the other
    way round), and ranks that draw different tokens.
    """
    source = random_model(qkv_bias=True, qk_norm=True)
    idx = random_tokens(2, 72)
    retros = [replace(SPARSE, window=w, impl=impl) for w in (1, 8)]
    inputs = asdict(source.config), source.weights(), idx, retros
    torch.save(inputs, tmp_path / "input")
    (tmp_path / "script.py").write_text(SCRIPT)
    args = ["-m", "extras.parallel", tmp_path / "script.py", tmp_path, device, dtype]
    for code, _, error in run_processes(2, args, gpus="0,1" if device == "cuda" else ""):
        assert code == 0, error
    first, second = (torch.load(tmp_path / str(rank), map_location=device) for rank in (0, 1))

    model = Llama.from_weights(source.config, source.weights(), device, getattr(torch, dtype))
    idx = idx.to(device)
    assert first["left"] == second["left"] == 0  # `from_weights` empties its dictionary
    for i, retro in enumerate(retros):
        generate = partial(model.generate, idx[:, :60], 6, retro)
        wanted = generate(temperature=0), generate(temperature=1, seed=3)
        for result in (first, second):
            assert all(map(same, result["texts"][i], wanted))
            close(result["logits"][i].cpu(), decode(model, retro, idx, 60)[0].cpu(), tolerance)
        assert same(first["logits"][i], second["logits"][i])  # bit for bit
    assert all(map(same, first["unseeded"], second["unseeded"]))
    assert not same(*first["unseeded"])
    assert "cannot train" in first["training"]

    for name, w in model.weights().items():
        a, b = first["weights"][name], second["weights"][name]
        split = name.split(".")[-2] in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
        dim = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
        assert same(torch.cat((a, b), dim) if split else a, w), name
        assert split or same(a, b), name


def test_processes_that_do_not_divide_the_heads_are_refused_once():
    """Rank 0 alone prints one line, and no process hangs."""
    args = ["-m", "extras.parallel", TINY.parent / "sample.py", "--device", "cpu"]
    codes, outs, errors = zip(*run_processes(3, args), strict=True)
    assert codes == (2, 2, 2)
    assert not "".join(outs)
    error = "".join(errors)
    message = "the number of processes must divide the 2 KV heads and ffn_dim 896, not 3\n"
    assert error.count("sample.py: error: " + message) == 1
    assert "Traceback" not in error


def test_interrupt_keeps_the_text_and_reports(tmp_path):
    """Through torchrun, from another folder, with the prompt from stdin. Ctrl-C reaches every
    process: the printed text stays, its line ends, the report follows, and no process hangs."""
    (tmp_path / "prompt").write_text("Ünder", encoding="utf-8")
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 -m extras.parallel"
    sample = "sample.py --prompt - --max_new_tokens 4000 --temperature 1 --device cpu"

    def accept_interrupts():  # a shell's background job ignores them, and children inherit that
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with (tmp_path / "prompt").open() as stdin:
        options = {"preexec_fn": accept_interrupts, "start_new_session": True, "cwd": tmp_path}
        child = start_python([*torchrun.split(), *sample.split()], stdin=stdin, **options)
    text = child.stdout.read(30)
    os.killpg(child.pid, signal.SIGINT)
    rest, report = child.communicate(timeout=60)
    text = (text + rest).decode()
    report = report.decode()
    assert text.startswith("Ünder") and text.count("Ünder") == 1
    assert text.endswith("\n")
    assert report.count("2 processes share the model") == report.count("tokens/s") == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_only_rank_0_prints_and_handles_an_interrupt(capsys, monkeypatch, rank):
    """Guards against a Ctrl-C that ends another rank; rank 0 would wait for its sums."""
    monkeypatch.setenv("RANK", str(rank))
    for name in ("stdout", "stderr"):  # restored after the test
        monkeypatch.setattr(sys, name, getattr(sys, name))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert parallel.main([]) == 2
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert ignored == (rank > 0)
    assert ("no script" in capsys.readouterr().err) == (rank == 0)


@pytest.mark.parametrize("args, n, message", [
    ("", 1, "no script: torchrun"),
    ("nowhere.py", 1, "script nowhere.py: no such file"),
    ("sample.py --trace run.html", 1, "--trace would show the heads of one process"),
    ("sample.py --trace=run.html", 1, "--trace would show the heads of one process"),
    ("sample.py", 3, "at most 2 processes, one for each GPU of this machine, not 3"),
    ("sample.py --device cuda", 3, "at most 2 processes"),
    ("sample.py --device cuda:1", 2, "own GPU: device must be cuda, not 'cuda:1'"),
    ("sample.py", 2, "must be started by torchrun"),
    ("sample.py --device=cpu", 3, "must be started by torchrun"),
    ("sample.py --dev cpu", 3, "must be started by torchrun"),
])  # fmt: skip
def test_mistake_is_one_clear_line(capsys, monkeypatch, tmp_path, args, n, message):
    """On a machine with two GPUs; a script's path may be relative to the repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(n))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refused_in_a_line(run_main(parallel.main, args.split(), capsys), message)


@pytest.mark.parametrize("name, shape", [
    ("layers.0.attention.wq.weight", (191, 192)),
    ("layers.0.attention.wo.weight", (192,)),
    ("layers.0.feed_forward.w1.weight", ()),
    ("wq", (2, 2)),  # not a model's name
])  # fmt: skip
def test_tensor_that_cannot_be_split_stays_whole(name, shape):
    """`Llama.from_weights` then refuses it by name on every rank; an error of one rank alone would
    leave the others waiting for it."""
    w = torch.zeros(shape)
    assert parallel.shard_weight(name, w, 0, 2) is parallel.shard_weight(name, w, 1, 2) is w
