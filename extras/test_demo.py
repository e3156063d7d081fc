"""Runs the demonstration on the shipped checkpoint, with a few tokens."""

import re

import pytest
import torch

from extras import demo
from model import Llama, Tokenizer
from retro_attention import RetroConfig
from sample import kv_share
from test_retro import TINY, decode, refused_in_a_line, run_main


def test_the_texts_are_those_of_independent_decoding(capsys):
    """What is printed as common is common, each text goes on as `generate` does, and the divergence
    is that of a teacher-forced decoder."""
    options = "--prompt Once --max_new_tokens 24 --min_tokens 8 --page_size 4 --window 4"
    code, out, _ = run_main(demo.main, [*options.split(), "--device", "cpu"], capsys)
    assert code == 0
    model = Llama.from_checkpoint(TINY)
    tok = Tokenizer.from_checkpoint(TINY)
    idx = torch.tensor([tok.encode("Once", bos=True)])
    T = idx.shape[1]
    retro = RetroConfig(4, min_tokens=8, window=4, dense_layers=0)
    full, ours = (model.generate(idx, 24, x, seed=1337) for x in (None, retro))
    start = (full == ours)[0, T:].long().cumprod(0).sum().item()  # equal first tokens
    expected, found = (decode(model, x, full[:, :-1], T)[0][:, 1:] for x in (None, retro))
    expected, found = (x.log_softmax(-1) for x in (expected, found))
    kl = (expected.exp() * (expected - found)).sum(-1).mean().item()
    share = f"{kv_share(retro, model.config.n_layer, range(T, T + 23)):.0%}"
    line = re.search(rf"--- W=4: {share} of the KV bytes, (\d+) tokens equal .*, KL (\S+)\n", out)
    assert int(line[1]) == start < 24 and abs(float(line[2]) - kl) < 2e-4
    common, _, _, rest = re.split(r"\n--- .*\n\n", "\n" + out)[1:]  # full, Quest, W=4
    n = int(re.match(r"--- same: (\d+) tokens", out)[1])
    shared = tok.decode(full[0, T : T + n].tolist())
    assert n <= start and common.rstrip("\n") == shared.rstrip("\n")
    text = common.removesuffix("\n") + rest.removesuffix("\n")
    assert text == tok.decode(ours[0, T:].tolist())


def test_a_text_is_split_between_whole_characters():
    """Guards against half a character at the end of the common part, a lost space in front of the
    rest, and the name of a stop token as text."""
    tok = Tokenizer.from_checkpoint(TINY)
    new = [*tok.encode(" the \u4f60 sea"), tok.stop_tokens[0]]
    found = [demo.split(tok, [tok.bos], new, n) for n in range(len(new) + 1)]
    assert {start + rest for start, rest in found} == {" the \u4f60 sea"}
    assert "\ufffd" not in "".join(start for start, _ in found)
    assert found[1] == (" the", " \u4f60 sea") and found[-1][1] == ""


@pytest.mark.parametrize("option, message", [
    ("--window 0", "window must be an integer from 1 to 256, not 0"),
    ("--max_new_tokens 0", "max_new_tokens must be >= 1, not 0"),
    ("--max_new_tokens 1", "the text has one token only: nothing to compare"),
])  # fmt: skip
def test_a_mistake_is_one_line(capsys, option, message):
    code, out, error = run_main(demo.main, [*option.split(), "--device", "cpu"], capsys)
    refused_in_a_line((code, out, error.splitlines(keepends=True)[-1]), message)
