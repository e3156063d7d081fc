"""Generates text with RetroAttention: python sample.py --prompt "It was a dark night"

Streams the text to stdout; a short report goes to stderr. Exit codes: 0 success, 2 bad arguments or
checkpoint (one line says which), 130 Ctrl-C (the text so far is kept), 1 stdout was closed.
"""

import argparse
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from model import (
    Decoder,
    Llama,
    LlamaConfig,
    Tokenizer,
    check_dense,
    check_prompt,
    check_sampling,
    extra,
    read_checkpoint,
)
from retro_attention import RetroConfig, need

TINY = Path(__file__).resolve().parent / "tiny"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# --------------------------------------------------------------------------------------------------
# Shared with bench.py: options, loading, errors


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        hint = "; see --help" if "unrecognized" in message else ""
        self.exit(2, f"{self.prog}: error: {message}{hint}\n")  # one line, without the usage


def add_model_options(add: Callable, retro: RetroConfig, dtype: str = "auto") -> None:
    """Options for the model and the RetroConfig, except the window; defaults from `retro`."""
    add("--checkpoint", default=TINY, help="folder in Meta's or Hugging Face's format")
    add("--device", default="auto", help="cpu, cuda or cuda:1; auto is a GPU if there is one")
    add(
        "--dtype",
        choices=["auto", *DTYPES],
        default=dtype,
        help="auto is bfloat16 on a GPU, else float32",
    )
    add("--budget", type=float, default=retro.budget, help="fraction of the KV pages to load")
    add("--min_tokens", type=int, default=retro.min_tokens, help="load at least this many tokens")
    add("--page_size", type=int, default=retro.page_size, help="tokens per page, a power of two")
    add("--dense_layers", type=int, default=retro.dense_layers, help="first layers, dense")
    add(
        "--impl",
        choices=["auto", "torch", "triton"],
        default=retro.impl,
        help="auto is triton on a GPU, else torch",
    )


def choose_device(name: str) -> torch.device:
    """Raises ValueError if this machine has no such device."""
    gpus = torch.cuda.device_count()
    present = [f"cuda:{i}" for i in range(gpus)] + ["cpu"]
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    if name == "cuda" and gpus:
        name = f"cuda:{torch.cuda.current_device()}"
    need(name in present, f"no device {name!r}; this machine has {', '.join(present)}")
    return torch.device(name)


def skeleton(config: LlamaConfig) -> Llama:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return Llama(config)


def parameters(model: Llama) -> int:
    return sum(p.numel() for p in model.parameters())


def retro_config(args: argparse.Namespace, window: int) -> RetroConfig:
    return RetroConfig(
        page_size=args.page_size,
        budget=args.budget,
        min_tokens=args.min_tokens,
        window=window,
        dense_layers=args.dense_layers,
        impl=args.impl,
    )


def load(
    args: argparse.Namespace,
) -> tuple[LlamaConfig, dict, Tokenizer, torch.device, torch.dtype]:
    """Config, weights, tokenizer, device and dtype. The weights are memory maps, and not read yet,
    because reading takes longest and mistakes must surface first."""
    device = choose_device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if args.dtype != "auto":
        dtype = DTYPES[args.dtype]
    config, weights = read_checkpoint(args.checkpoint)
    tok = Tokenizer.from_checkpoint(args.checkpoint)
    check_dense(args.dense_layers, config)
    return config, weights, tok, device, dtype


def read_text(path: str, name: str) -> str:
    """The text of a file, or of stdin for "-". Raises ValueError with `name` if unreadable."""
    need(path != "-" or sys.stdin is not None, f"{name}: stdin is closed")
    try:
        if path == "-":
            data = sys.stdin.buffer.read()
        else:
            data = Path(path).expanduser().read_bytes()
        return data.decode("utf-8-sig")  # a byte order mark is not text
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 at byte {error.start}") from None


def exit_code(name: str, run: Callable[[], int]) -> int:
    """Runs a command. User errors and lack of memory become one line; anything else is a bug and
    keeps its traceback."""
    for stream in ("stdout", "stderr"):  # None if it is closed, e.g. in a service
        if getattr(sys, stream) is None:
            setattr(sys, stream, open(os.devnull, "w"))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not know every character
    try:
        return run()
    except BrokenPipeError:  # stdout was closed: print nothing, not even from Python at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"{name}: error:", str(error).split("\n")[0], file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def kv_share(retro: RetroConfig | None, n_layer: int, steps: range) -> float:
    """KV bytes that the decode steps at these positions read in all layers, divided by those of
    full attention."""
    if retro is None or not steps:
        return 1.0
    held = sum(map(retro.pages_held, steps))
    # A page's bounds are as large as one token's key and value, 1 / page_size of a page.
    loaded = sum(map(retro.pages_selected, steps)) + held / retro.page_size
    dense = retro.dense_layers
    return (dense * held + (n_layer - dense) * loaded) / (n_layer * held)


class Progress:
    """Counts steps, and prints the count and an estimate of the time left to stderr, every two
    seconds on a terminal, else every ten. Prints nothing if all is done sooner."""

    def __init__(self, what: str, total: int):
        self.what = what
        self.total = total
        self.done = 0
        self.start = time.perf_counter()
        self.interval = 2 if sys.stderr.isatty() else 10
        self.next = self.start + self.interval

    def step(self, *_) -> None:
        self.done += 1
        now = time.perf_counter()
        if now < self.next or self.done >= self.total:
            return
        self.next = now + self.interval
        left = (now - self.start) / self.done * (self.total - self.done)
        line = f"{self.what}: {self.done} of {self.total}, about {left:.0f} s left"
        print(line, file=sys.stderr, flush=True)


def counted(what: str, steps: Iterable, total: int) -> Iterator:
    """Yields the steps, with `Progress`."""
    progress = Progress(what, total)
    for step in steps:
        progress.step()
        yield step


@contextmanager
def said_if_slow(text: str) -> Iterator[None]:
    """Prints `text` to stderr if the `with` block takes longer than two seconds."""
    line = f"[{text} ...]"
    timer = threading.Timer(2, print, args=[line], kwargs={"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 0.9995e9 else f"{nbytes / 1e6:.3g} MB"


def check_memory(
    config: LlamaConfig,
    retro: RetroConfig,
    B: int,
    length: int,
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    """A line on the memory of the weights and of the caches for B texts of `length` tokens. Raises
    ValueError if the device has less."""
    model = skeleton(config)
    n = parameters(model)
    config = model.config
    sparse = config.n_layer - retro.dense_layers
    token = 2 * B * config.n_kv_head * config.head_size * dtype.itemsize  # bytes of K and V
    pages = -(-length // retro.page_size)
    weights = n * dtype.itemsize
    kv = config.n_layer * pages * retro.page_size * token
    bounds = sparse * pages * token
    outputs = sparse * B * retro.window * config.n_head * (config.head_size + 1) * 4
    line = (
        f"{n / 1e6:.1f} M parameters in {str(dtype).removeprefix('torch.')}, {size(weights)}; "
        f"for {B} x {length} tokens {size(kv)} of KV, {size(bounds)} of page bounds, "
        f"{size(outputs)} of output cache"
    )
    available = float("inf")
    if device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[0]
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fits = weights + kv + bounds + outputs <= available
    need(fits, f"{device} has only {size(available)} for {line}")
    return line


# --------------------------------------------------------------------------------------------------
# The text, and the report on it


class TextStream:
    """Turns ids, one after the other, into the text that each adds, by the tokenizer's `decode`.

    A token cannot be decoded by itself, because a character may be spread over several tokens
    (byte-level BPE), and decoding may drop the space in front of the first token (SentencePiece).
    So a token is decoded together with those before it, ids[a:b], whose text was returned,
    and the difference is new. While the end is U+FFFD the character is incomplete, and nothing is
    returned. Only the latest few tokens are decoded, however long the text is.
    """

    def __init__(self, tok: Tokenizer, prompt: list[int]):
        self.decode = tok.decode
        # A few ids of the prompt, which must not begin inside a character.
        starts = [prompt[-n:] for n in range(8, 12)]
        whole = [ids for ids in starts if not self.decode(ids).startswith("\ufffd")]
        self.ids = (whole or starts)[0]
        self.text = ""
        self.a = 0
        self.b = len(self.ids)

    def add(self, token: int) -> str:
        """The new text, which may be empty."""
        self.ids.append(token)
        incomplete = self.decode(self.ids[self.a :]).endswith("\ufffd")
        return "" if incomplete else self.flush()

    def flush(self) -> str:
        """What is not returned yet, complete or not."""
        before = self.decode(self.ids[self.a : self.b])
        new = self.decode(self.ids[self.a :])[len(before) :]
        if new:
            self.a = self.b
            self.b = len(self.ids)
        self.text += new
        return new


def show(
    prompt: str, stream: Iterator[torch.Tensor], texts: list[TextStream], stop_tokens: list[int]
) -> tuple[int, list[tuple[float, int]]]:
    """Prints the first text while it grows, and any others at the end.

    Returns the exit code, and for each step when it ended and how many tokens it made. (A text
    that has ended makes none.)
    """
    code = 0
    made = []
    try:
        print(prompt, end="", flush=True)
        for tokens in stream:
            pairs = zip(texts, tokens.tolist(), strict=True)
            growing = [(text, token) for text, token in pairs if token not in stop_tokens]
            made.append((time.perf_counter(), len(growing)))
            for text, token in growing:
                new = text.add(token)
                if text is texts[0]:
                    print(new, end="", flush=True)
    except KeyboardInterrupt:
        code = 130
    print(texts[0].flush(), flush=True)
    for text in texts[1:]:
        text.flush()
        print(f"---------------\n{prompt}{text.text}", flush=True)
    return code, made


def explained(stream: Iterator[torch.Tensor], device: torch.device) -> Iterator[torch.Tensor]:
    """Yields `stream`, and on a GPU prints why step 1 or 2 is slow."""
    reasons = []
    if device.type == "cuda":
        reasons = ["reading the prompt", "compiling the kernels, which Triton keeps on disk"]
    for reason in reasons:
        with said_if_slow(reason):
            tokens = next(stream, None)
        if tokens is None:
            return
        yield tokens
    yield from stream


def report(
    decoder: Decoder, prompt_len: int, start: float, made: list[tuple[float, int]], cached: int = 0
) -> list[str]:
    """The lines at the end: tokens, pace, pages and KV bytes read. `made`: see `show`; its first
    step is the prefill. The first `cached` prompt tokens were in the caches before."""
    if not made:
        return ["no tokens"]
    times, tokens = zip(*made, strict=True)
    # On a GPU the first decode step compiles and captures, and the second may overlap it. So the
    # pace is that of the rest.
    warm = 3 if len(made) > 2 else 1
    seconds = times[-1] - times[warm - 1]
    pace = "too few to measure the pace"
    if seconds:
        pace = f"{sum(tokens[warm:]) / seconds:.1f} tokens/s"
    context = decoder.model.config.max_seq_len
    length = prompt_len + len(made)
    full = ": it is full" if length == context else ""
    prompt = f"prompt of {prompt_len} tokens"
    if cached:
        prompt = f"{prompt_len - cached} of {prompt_len} prompt tokens"
    line = (
        f"{sum(tokens)} tokens, {pace}, {prompt} read in {times[0] - start:.2f} s; "
        f"context {length} of {context}{full}"
    )
    # The first token comes out of the prefill, so n tokens took n - 1 decode steps.
    steps = range(prompt_len, prompt_len + len(made) - 1)
    return [line, *kv_lines(decoder, steps)]


def kv_lines(decoder: Decoder, steps: range) -> list[str]:
    """The lines on the pages and KV bytes that the decode steps at these positions read."""
    if not steps:
        return []
    retro = decoder.retro
    held = sum(map(retro.pages_held, steps)) / len(steps)
    loaded = sum(map(retro.pages_selected, steps)) / len(steps)
    layers = len(decoder.layers)
    dense = retro.dense_layers
    if dense == layers:
        return [f"full attention: all of {held:.1f} pages read"]
    overall = kv_share(retro, layers, steps)
    share = kv_share(replace(retro, dense_layers=0), layers, steps)
    name = "RetroAttention" if retro.window > 1 else "Quest"
    return [
        f"{name}, window {retro.window}: {loaded:.1f} of {held:.1f} pages read per step and KV "
        f"head in {layers - dense} sparse layers, {dense} dense",
        f"KV bytes read {overall:.0%} of full attention's "
        f"(sparse layers {share:.0%}, page bounds included)",
    ]


# --------------------------------------------------------------------------------------------------
# The command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    retro = RetroConfig()
    parser = Parser(
        description="Generate text with RetroAttention.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--prompt", default=None, help="text to continue; FILE:path reads a file, - reads stdin")
    help = "the prompt is a message to answer; without --prompt, a conversation"
    add("--chat", action="store_true", help=help)
    add("--system", default=None, metavar="TEXT", help="with --chat: a system message in front")
    add("--max_new_tokens", type=int, default=500, help="maximum new tokens")
    add("--num_samples", type=int, default=1, help="texts to generate, as one batch")
    add("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    add("--top_k", type=int, default=None, help="sample from the k likeliest tokens only")
    add("--top_p", type=float, default=0.95, help="... from the likeliest that together reach p")
    add("--seed", type=int, default=1337, help="same seed, same text")
    methods = ["retro", "quest", "full"]
    add("--attention", choices=methods, default="retro", help="quest is retro with a window of 1")
    add("--window", type=int, default=retro.window, help="the paper's w: a step revises w-1 tokens")
    add_model_options(add, retro)
    add("--trace", default=None, metavar="FILE.html", help="HTML file that shows each step")
    return parser.parse_args(argv)


def read_prompt(
    args: argparse.Namespace, config: LlamaConfig, tok: Tokenizer
) -> tuple[str, list[int]]:
    """The prompt as it is echoed, and its token ids."""
    prompt = resolve("prompt", args.prompt or "")
    need(args.chat or args.system is None, "system: a system message needs --chat")
    if args.chat:
        ids = tok.chat([*system_message(args), ("user", prompt)])
    else:
        ids = tok.encode(prompt, bos=True)
    need(ids, "prompt must not be empty: this tokenizer has no begin-of-text token")
    known = max(ids) < config.vocab_size
    need(known, f"prompt has token {max(ids)}: the vocabulary has only {config.vocab_size}")
    check_prompt(len(ids), config.max_seq_len)
    return "" if args.chat else prompt, ids


def resolve(name: str, text: str) -> str:
    """The text of an option that may be FILE:path or "-"."""
    if text == "-" or text.startswith("FILE:"):
        path = text.removeprefix("FILE:")
        text = read_text(path, f"{name} file {path}")
    invalid = re.search("[\ud800-\udfff]", text)  # Python's marks of invalid bytes
    need(not invalid, f"{name} is not UTF-8")
    return text


def system_message(args: argparse.Namespace) -> list[tuple[str, str]]:
    return [] if args.system is None else [("system", resolve("system", args.system))]


def run(args: argparse.Namespace) -> int:
    # The arguments: all mistakes surface before the weights are read.
    B = args.num_samples
    need(B >= 1, f"num_samples must be >= 1, not {B}")
    sampling = {name: vars(args)[name] for name in ("temperature", "top_k", "top_p", "seed")}
    check_sampling(args.max_new_tokens, **sampling)
    retro = retro_config(args, window=1 if args.attention == "quest" else args.window)
    viewer = extra("viewer", "--trace") if args.trace is not None else None
    trace = viewer.check_path(args.trace) if viewer else None
    config, weights, tok, device, dtype = load(args)
    if args.attention == "full":
        retro = replace(retro, window=1, dense_layers=config.n_layer)
    sparse = config.n_layer - retro.dense_layers
    need(sparse or not trace, f"trace: nothing to show, all {config.n_layer} layers are dense")
    if args.chat and args.prompt is None:
        need(B == 1 and not trace, "a conversation takes no num_samples and no trace")
        chat = extra("chat", "--chat without --prompt")
        return chat.converse(args, sampling, retro, config, weights, tok, device, dtype)
    prompt, ids = read_prompt(args, config, tok)
    # The caches fit this text, not the whole context, which can take many gigabytes.
    length = min(len(ids) + args.max_new_tokens, config.max_seq_len)
    memory = check_memory(config, retro, B, length, device, dtype)

    # The model
    with said_if_slow("reading the weights"):
        model = Llama.from_weights(config, weights, device, dtype)
    watch_layers(model)
    decoder = Decoder(model, B, retro, max_seq_len=length)
    recorder = viewer.Recorder(decoder, tok, len(ids), trace) if viewer else None
    print(memory, file=sys.stderr)

    # The text
    idx = torch.tensor([ids] * B, device=device)  # (B, T)
    stream = decoder.stream(idx, args.max_new_tokens, **sampling, stop_tokens=tok.stop_tokens)
    texts = [TextStream(tok, ids) for _ in range(B)]
    start = time.perf_counter()
    code, made = show(prompt, explained(stream, device), texts, tok.stop_tokens)

    # The report
    lines = report(decoder, len(ids), start, made)
    if recorder:
        lines.append(recorder.save())
    print("\n".join(lines), file=sys.stderr)
    return code


def watch_layers(model: Llama) -> None:
    """Prints progress while a long prompt passes through the layers."""
    progress = Progress("prompt, layers", len(model.layers))

    def count(block, args, x):
        if x.is_cuda and progress.done < progress.total:
            torch.cuda.synchronize(x.device)  # else the layers would only be launched
        progress.step()

    for block in model.layers:
        block.register_forward_hook(count)


def main(argv: list[str] | None = None) -> int:
    return exit_code("sample.py", lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
