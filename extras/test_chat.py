"""What must hold for a conversation: the format of the whole, and caches that stay."""

import io

import torch

import sample
from extras.chat import tokens_held
from model import Decoder, Tokenizer
from test_retro import TINY, random_model, random_tokens, refused_in_a_line, run_main


def test_a_conversation(capsys, monkeypatch):
    """Turns from stdin, each in the format of the whole conversation. What the caches hold is not
    read again, so each turn reads only its own tokens, and the end of the answer before it."""
    tok = Tokenizer.from_checkpoint(TINY)
    seen = []

    def stream(decoder, idx, *args, append=False, **options):
        seen.append((append, idx[0].tolist()))
        decoder.prefill(idx) if not append else [decoder.step(token) for token in idx.T]
        answer = [*tok.encode("Quite."), tok.special["<|eot_id|>"]]
        for token in answer[:-1]:
            yield torch.tensor([token])
            decoder.step(torch.tensor([token]))
        yield torch.tensor(answer[-1:])

    monkeypatch.setattr(Decoder, "stream", stream)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello.\nWhy?\n\n"))
    args = "--chat --system Brief. --min_tokens 16 --device cpu"
    code, out, report = run_main(sample.main, args.split(), capsys)
    assert code == 0 and out == "Quite.\n" * 3
    messages = [("system", "Brief."), ("user", "Hello.")]
    whole = tok.chat(messages)
    assert seen[0] == (False, whole)
    for (append, ids), question in zip(seen[1:], ("Why?", ""), strict=True):
        held = [*whole, *tok.encode("Quite.")]
        messages += [("assistant", "Quite."), ("user", question)]
        whole = tok.chat(messages)
        assert append and held + ids == whole
        assert f"{len(ids)} of {len(whole)} prompt tokens read in" in report
    seen.clear()
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello.\nWhy?\n"))
    chat = tok.chat
    monkeypatch.setattr(Tokenizer, "chat", lambda self, said: [*chat(said), len(said)])
    run_main(sample.main, args.split(), capsys)
    assert [append for append, _ in seen] == [False, False]  # the template changes earlier turns


def test_a_conversation_is_one_text(capsys):
    result = run_main(sample.main, ["--chat", "--num_samples", "2"], capsys)
    refused_in_a_line(result, "a conversation takes no num_samples")


def test_nothing_is_held_after_an_interrupted_step():
    decoder = Decoder(random_model(), 1, None)
    idx = random_tokens(1, 9)
    ids = idx[0].tolist()
    decoder.prefill(idx)
    assert tokens_held(decoder, [*ids, 7]) == 9 and tokens_held(decoder, [7, *ids]) == 0
    decoder.position = None  # as after a call that failed
    assert tokens_held(decoder, [*ids, 7]) == 0
