"""Runs the demonstration on the shipped checkpoint, with a few tokens."""

import re

import torch

from extras import demo
from model import Llama, Tokenizer
from retro_attention import RetroConfig
from test_retro import TINY, decode, refused_in_a_line, run_main


def test_the_texts_are_those_of_independent_decoding(capsys):
    """What is printed as common is common, each text goes on as `generate` does, and the divergence
    is that of a teacher-forced decoder."""
    options = "--prompt Once --max_new_tokens 40 --min_tokens 8 --page_size 4 --window 4"
    code, out, _ = run_main(demo.main, [*options.split(), "--device", "cpu"], capsys)
    assert code == 0
    model = Llama.from_checkpoint(TINY)
    tok = Tokenizer.from_checkpoint(TINY)
    idx = torch.tensor([tok.encode("Once", bos=True)])
    T = idx.shape[1]
    retro = RetroConfig(4, min_tokens=8, window=4, dense_layers=0)
    full, ours = (model.generate(idx, 40, x, seed=1337) for x in (None, retro))
    same = (full == ours)[0, T:].long().cumprod(0).sum().item()
    expected, found = (decode(model, x, full[:, :-1], T)[0][:, 1:] for x in (None, retro))
    expected, found = (x.log_softmax(-1) for x in (expected, found))
    kl = (expected.exp() * (expected - found)).sum(-1).mean().item()
    line = re.search(r"--- W=4: \d+% of the KV bytes, (\d+) tokens equal .*, KL (\S+)\n", out)
    assert int(line[1]) == same < 40 and abs(float(line[2]) - kl) < 2e-4
    common, *rests = re.split(r"\n--- .*\n\n", "\n" + out)[1:]
    n = int(re.match(r"--- all: (\d+) tokens", out)[1])
    assert n <= same and common.rstrip("\n") == tok.decode(full[0, T : T + n].tolist()).rstrip("\n")
    text = common.removesuffix("\n") + rests[2].removesuffix("\n")
    assert text == tok.decode(ours[0, T:].tolist())


def test_a_mistake_is_one_line(capsys):
    result = run_main(demo.main, ["--window", "0"], capsys)
    refused_in_a_line(result, "window must be an integer from 1 to 256, not 0")
