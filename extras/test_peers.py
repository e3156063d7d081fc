"""The rows of other libraries, and what happens without the libraries."""

import importlib.util
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import bench
import retro_attention
from extras import peers
from retro_attention import RetroConfig
from test_retro import DEVICE, close, refused_in_a_line, run_main

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="transformers is not installed (pip install -e '.[hf]'): its row is not tested",
)
needs_flashinfer = pytest.mark.skipif(
    DEVICE != "cuda" or importlib.util.find_spec("flashinfer") is None,
    reason="no GPU, or no FlashInfer (pip install flashinfer-python): it is not tested here",
)
SMALL = replace(bench.SHAPES["tiny"], n_layer=2)


class Wrapper:
    """FlashInfer's wrapper in plain PyTorch, as documented: text i has the list's pages first[i] to
    first[i + 1] - 1, the last of them with last[i] tokens."""

    def __init__(self, workspace, use_tensor_cores):
        pass

    def plan(self, first, pages, last, n_head, n_kv_head, hs, ps, q_data_type):
        assert n_kv_head == 1 and first.dtype == pages.dtype == last.dtype == torch.int32
        self.texts = []
        for i in range(len(last)):
            n = (first[i + 1] - first[i] - 1) * ps + last[i]
            self.texts.append((pages[first[i] : first[i + 1]], n))

    def run(self, q, kv):
        out = []
        for row, (pages, n) in zip(q, self.texts, strict=True):
            k, v = [x[pages].flatten(0, 1)[:n, 0] for x in kv]  # (n, hs)
            out.append((row @ k.T * k.shape[1] ** -0.5).softmax(dim=-1) @ v)
        return torch.stack(out)


@pytest.fixture
def on_cpu(capsys, monkeypatch):
    """Runs the command as on a machine without a GPU, in a small shape: its text, and the JSON of
    its last line."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(bench.SHAPES, "tiny", SMALL)
    monkeypatch.setattr(bench, "memory_rates", lambda device: {"copy": 1e10})

    def run(options):
        code, out, error = run_main(peers.main, options.split(), capsys)
        assert code == 0, error
        return out, json.loads(out.splitlines()[-1])

    return run


@needs_transformers
def test_decode_has_a_row_of_transformers(on_cpu):
    """Its row counts full attention's bytes. Guards against a library that is left out, and (by an
    assertion in the code) steps that ignore the cache."""
    out, record = on_cpu("decode --settings 256x2 --windows 2 --rounds 1")
    rows = {row["method"]: row for row in record["results"]["rows"]}
    assert list(rows) == ["full", "Quest", "W=2", "transformers"]
    theirs = rows["transformers"]
    assert theirs["bytes"] == rows["full"]["bytes"] and theirs["ms"] > 0
    assert theirs["full/this"] == pytest.approx(rows["full"]["ms"] / theirs["ms"])
    assert record["command"] == "peers decode" and "256x2 transformers" in out


def test_flashinfer_reads_the_pages_that_it_is_given(monkeypatch):
    """Its output is that of our attend, head by head. Guards against pages of another head."""
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer())
    found, expected = outputs("cpu", torch.float64)
    close(found, expected, 1e-12)


@needs_flashinfer
def test_flashinfer_itself_reads_the_pages_that_it_is_given():
    found, expected = outputs("cuda", torch.bfloat16)
    close(found.float().cpu(), expected.float().cpu(), 0.02)


def fake_flashinfer():
    return SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Wrapper, __version__="0")


def outputs(device, dtype):
    """Attention of one row over 5 pages of each of 2 * 2 KV heads, by FlashInfer and us."""
    retro = RetroConfig(window=1)
    cache = retro_attention.new_cache(retro, True, 2, 6, 2, 64, 128, device, dtype)
    bench.fill(cache, 127)
    row = torch.randn(2, 1, 6, 64, device=device, dtype=dtype)
    pages = torch.rand(2, 2, 8, device=device).topk(5).indices  # (B, n_kv_head, S)
    workspace = torch.empty(2**27, dtype=torch.uint8, device=device)
    found = peers.flashinfer_decode(row, cache, pages, workspace)()
    t = torch.tensor(127, device=device)
    unseen = torch.full_like(pages, -1)
    o, _ = retro_attention.attend(row, cache, pages, unseen, t)  # (1, B, 1, n_head, hs)
    return found, o.reshape(found.shape)


def test_kernels_sets_flashinfer_beside_attend(on_cpu, monkeypatch):
    """The table has a time for each, and the JSON the version. Guards against a stage that is left
    out."""
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer())
    monkeypatch.setattr(peers, "need", lambda condition, message: None)  # no GPU needed
    out, record = on_cpu("kernels --settings 512x2 --windows 2")
    (row,) = record["results"]["rows"]
    for name in ("attend", "combine", "ours", "FlashInfer selected", "FlashInfer all"):
        assert row[name] > 0 and name in out
    assert row["dense"] == min(row[name] for name in bench.DENSE if name in row)
    assert record["results"]["flashinfer"] == "0" and record["command"] == "peers kernels"


@needs_flashinfer
def test_kernels_with_flashinfer_itself(capsys):
    """Also in a CUDA graph."""
    code, out, error = run_main(peers.main, "kernels --settings 2048x2 --windows 2".split(), capsys)
    assert code == 0, error
    (row,) = json.loads(out.splitlines()[-1])["results"]["rows"]
    assert 0 < row["FlashInfer selected"] < row["FlashInfer all"]


@pytest.mark.parametrize(
    "command, name, message",
    [
        ("kernels", "flashinfer", r"flashinfer cannot be imported .*pip install flashinfer-python"),
        ("decode", "transformers", r"transformers cannot be imported .*pip install -e '\.\[hf\]'"),
    ],
)
def test_a_missing_library_is_one_line(capsys, monkeypatch, command, name, message):
    """Before anything is measured."""
    monkeypatch.setitem(sys.modules, name, None)
    refused_in_a_line(run_main(peers.main, [command], capsys), message)


def test_flashinfer_without_a_gpu_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused_in_a_line(run_main(peers.main, ["kernels"], capsys), "FlashInfer needs a GPU")
