"""Holds a conversation: python sample.py --checkpoint Qwen --chat

Each line of stdin is a message. Its answer goes to stdout, and a line on its pace to stderr. The
caches stay between the turns, so each turn reads only its own tokens.
"""

import argparse
import sys
import time
from dataclasses import replace

import torch

from model import Decoder, Llama, LlamaConfig, Tokenizer
from retro_attention import RetroConfig, need
from sample import (
    TextStream,
    check_memory,
    explained,
    report,
    said_if_slow,
    show,
    system_message,
)

CHAT_TOKENS = 16_384  # the longest conversation; its caches are allocated at the start


def converse(
    args: argparse.Namespace,
    sampling: dict,
    retro: RetroConfig,
    config: LlamaConfig,
    weights: dict[str, torch.Tensor],
    tok: Tokenizer,
    device: torch.device,
    dtype: torch.dtype,
) -> int:
    """Answers stdin line by line. Ctrl-C ends an answer or, if there is none, the program."""
    need(sys.stdin is not None, "chat: stdin is closed")
    messages = system_message(args)
    length = min(config.max_seq_len, CHAT_TOKENS)
    config = replace(config, max_seq_len=length)  # the report shows it as the context
    print(check_memory(config, retro, 1, length, device, dtype), file=sys.stderr)
    with said_if_slow("reading the weights"):
        model = Llama.from_weights(config, weights, device, dtype)
    decoder = Decoder(model, 1, retro, length)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        messages.append(("user", line))
        ids = tok.chat(messages)
        held = tokens_held(decoder, ids)
        idx = torch.tensor([ids[held:]], device=device)  # (1, T)
        stream = decoder.stream(
            idx, args.max_new_tokens, **sampling, stop_tokens=tok.stop_tokens, append=held > 0
        )
        text = TextStream(tok, ids)
        start = time.perf_counter()
        _, made = show("", explained(stream, device), [text], tok.stop_tokens)
        messages.append(("assistant", text.text))
        line = report(decoder, len(ids), start, made, held)[0]
        print(f"[{line}]", file=sys.stderr)


def tokens_held(decoder: Decoder, ids: list[int]) -> int:
    """How many of the first `ids` need not be read again: all that the caches hold, or 0 if `ids`
    begins differently (the template may change earlier turns), or after an interrupted step."""
    if decoder.position is None:
        return 0
    held = decoder.tokens[0, : decoder.position + 1].tolist()
    return len(held) if ids[: len(held)] == held else 0
