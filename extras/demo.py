"""Shows full attention, Quest and RetroAttention side by side: python -m extras.demo

Each method continues the prompt, with the same seed. The output shows where the texts are equal and
how each goes on. For each method it shows the KV bytes read, the number of first tokens that equal
full attention's, and the mean KL divergence from full attention on its text, in nats. The control
loads as many pages as W rows, but does not look back.

On average over 16 texts of the shipped checkpoint, the KL is .043 with Quest, .028 with W=8 and
.032 with the control. A real model, e.g. HuggingFaceTB/SmolLM2-135M-Instruct, needs --checkpoint
and --chat.
"""

import argparse
import sys

import torch

import bench
import sample
from model import Llama, Tokenizer, check_sampling
from retro_attention import RetroConfig, need


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    title = "Show full attention, Quest and RetroAttention side by side."
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = sample.Parser(prog="extras.demo", description=title, formatter_class=form)
    add = parser.add_argument
    add("--prompt", default="It was a dark night", help="text, FILE:path, or - for stdin")
    add("--chat", action="store_true", help="the prompt is a message to answer")
    add("--system", default=None, metavar="TEXT", help="with --chat: a system message in front")
    add("--max_new_tokens", type=int, default=200, help="maximum new tokens")
    add("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    add("--seed", type=int, default=1337, help="the same for all texts")
    add("--window", type=int, default=8, help="the paper's w: a step revises w-1 tokens")
    add("--control", action="store_true", help="also Quest with as many pages")
    sample.add_model_options(add, RetroConfig(page_size=8, min_tokens=48, dense_layers=0))
    return parser.parse_args(argv)


def common(a: list[int], b: list[int]) -> int:
    """The number of first tokens that texts share."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


def split(tok: Tokenizer, prompt: list[int], new: list[int], n: int) -> tuple[str, str]:
    """The text of new[:n], as far as its characters are complete, and the rest."""
    new = [token for token in new if token not in tok.stop_tokens]  # the last may be one
    stream = sample.TextStream(tok, prompt)
    start = "".join(stream.add(token) for token in new[:n])
    for token in new[n:]:
        stream.add(token)
    stream.flush()
    return start, stream.text[len(start) :]


def measure(
    model: Llama, ids: list[int], length: int, found: dict[str, bench.Method], **sampling
) -> tuple[dict[str, list[int]], dict[str, float]]:
    """Each method's new tokens, and its mean KL divergence. Full attention comes first in `found`.

    Raises ValueError if full attention's text ends at once.
    """
    T = len(ids)
    prompt = torch.tensor([ids], device=model.norm.weight.device)  # (1, T)
    new = {}
    kl = {}
    for name, method in found.items():
        bench.progress(name)
        decoder = method.make(model, 1, method.retro, length)
        new[name] = [token.item() for token in decoder.stream(prompt, length - T, **sampling)]
        text = torch.tensor([ids + new["full"]], device=prompt.device)  # (1, T + n)
        need(text.shape[1] > T + 1, "the text has one token only: nothing to compare")
        logps = bench.forced(decoder, text, T)
        if name == "full":
            logps = full = list(logps)
        kl[name] = bench.fidelity(logps, full, text[:, T + 1 :])[0].mean().item()
    return new, kl


def run(args: argparse.Namespace) -> int:
    sampling = {"temperature": args.temperature, "top_k": None, "top_p": 0.95, "seed": args.seed}
    check_sampling(args.max_new_tokens, **sampling)
    retro = sample.retro_config(args, window=args.window)
    found = bench.methods(retro, [args.window], args.control)
    config, weights, tok, device, dtype = sample.load(args)
    ids = sample.read_prompt(args, config, tok)[1]
    T = len(ids)
    length = min(T + args.max_new_tokens, config.max_seq_len)
    print(sample.check_memory(config, retro, 1, length, device, dtype), file=sys.stderr)
    model = Llama.from_weights(config, weights, device, dtype)
    new, kl = measure(model, ids, length, found, **sampling, stop_tokens=tok.stop_tokens)

    same = {name: common(x, new["full"]) for name, x in new.items()}
    first = min(same.values())
    print(f"--- same: {first} tokens\n\n{split(tok, ids, new['full'], first)[0]}")
    for name, method in found.items():
        steps = range(T, T + len(new[name]) - 1)
        share = method.kv_share(method.retro, config.n_layer, steps)
        print(
            f"\n--- {name}: {share:.0%} of the KV bytes, {same[name]} tokens equal full "
            f"attention's, KL {kl[name]:.4f}\n\n{split(tok, ids, new[name], first)[1]}"
        )
    return 0


def main(argv: list[str] | None = None) -> int:
    return sample.exit_code("extras.demo", lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
