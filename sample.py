"""Generates text with RetroAttention: python sample.py --prompt "It was a dark night"

The text goes to stdout as it is made, a short report to stderr; with --trace also pictures of single steps. Exit code 0 on
success, 2 with one line on a mistake in the arguments or the checkpoint, 130 after Ctrl-C, which keeps the text made so far,
1 if the reader of stdout has gone.
"""

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

heed = signal.getsignal(signal.SIGINT)
if __name__ == "__main__" and heed is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until torch is loaded, which takes seconds: Ctrl-C ends without a traceback

import torch
import torch.distributed as dist

from model import Decoder, Llama, LlamaConfig, Tokenizer, check_dense, check_prompt, check_sampling, processes, read_checkpoint
from retro_attention import RetroConfig, Step, need

# ----------------------------------------------------------------------------------------------------------------------
# Shared with bench.py: options, loading, errors

TINY = Path(__file__).resolve().parent / "tiny"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")  # one line, without the usage


def add_method_options(add: Callable, retro: RetroConfig, dtype: str = "auto"):
    """What a model and a RetroConfig are made of, but the window; the defaults are those of `retro`."""
    add("--checkpoint", default=TINY, help="folder in Meta's format or Hugging Face's")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto is a GPU if there is one")
    add("--dtype", choices=["auto", *DTYPES], default=dtype, help="auto is bfloat16 on a GPU, float32 elsewhere")
    add("--budget", type=float, default=retro.budget, help="share of the KV pages that a step loads")
    add("--min_tokens", type=int, default=retro.min_tokens, help="a step loads at least this many tokens' worth of pages")
    add("--page_size", type=int, default=retro.page_size, help="tokens per page, a power of two")
    add("--dense_layers", type=int, default=retro.dense_layers, help="first layers that attend to everything")
    add("--impl", choices=["auto", "torch", "triton"], default=retro.impl, help="auto is triton on a GPU, torch elsewhere")


def choose_device(name: str) -> torch.device:
    gpus, n = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes that torchrun has started here
    present = [f"cuda:{i}" for i in range(gpus)]
    present += ["mps", "cpu"] if torch.backends.mps.is_available() else ["cpu"]
    if name in ("auto", "cuda") and gpus:
        name = f"cuda:{torch.cuda.current_device()}"
    elif name == "auto":
        name = present[0]
    need(name in present, f"device {name!r}: not on this machine, which has {', '.join(present)}")
    need(name in ("mps", "cpu") or n <= gpus, f"processes: at most {gpus}, one for each GPU of this machine, not {n}")
    return torch.device(name)


def parameters(config: LlamaConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Llama(config).parameters())


def choose_threads(config: LlamaConfig, device: str):
    """One on a CPU for a small model, unless the user has set their number: threads wait for each other in products too small
    to share, and most of a step where another process is busy (docs/measured.md)."""
    if device == "cpu" and "OMP_NUM_THREADS" not in os.environ and parameters(config) < 100_000_000:
        torch.set_num_threads(1)


def retro_config(args: argparse.Namespace, window: int) -> RetroConfig:
    names = ("page_size", "budget", "min_tokens", "dense_layers", "impl")
    return RetroConfig(window=window, **{name: getattr(args, name) for name in names})


def load(args: argparse.Namespace) -> tuple[LlamaConfig, Tokenizer, torch.device, torch.dtype]:
    """All about the model but its weights, which take the longest: a mistake is said before they are read."""
    device = choose_device(args.device)
    dtype = DTYPES[args.dtype] if args.dtype != "auto" else torch.bfloat16 if device.type == "cuda" else torch.float32
    config, tok = read_checkpoint(args.checkpoint)[0].shard(), Tokenizer.from_checkpoint(args.checkpoint)
    check_dense(args.dense_layers, config)
    choose_threads(config, device.type)
    return config, tok, device, dtype


def read_text(path: str, name: str) -> str:
    """The text of a file, of stdin for -. ValueError by `name` if it cannot be read."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).expanduser().read_bytes()
        return data.decode("utf-8-sig")  # a byte order mark is not text
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 at byte {error.start}") from None


def join_processes():
    """If torchrun has started this process: joins the others, and takes a GPU of its own. Only the first speaks, and only the
    first heeds Ctrl-C, which every one receives: it has a text to end. torchrun ends the others when one has ended."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return
    if int(os.environ["RANK"]) > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def exit_code(name: str, run: Callable[[], int]) -> int:
    """Runs a command. A mistake of the user's and a lack of memory become one line; other errors are ours: a traceback."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not know every character
    try:
        join_processes()
        code = run()
        if code == 0 and dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()  # NCCL would complain
        return code
    except BrokenPipeError:  # the reader of our stdout has gone: nothing is left to say, not even by Python at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, RuntimeError) as error:  # OSError: a file that may not be read
        if isinstance(error, RuntimeError) and not re.search("out of memory|(allocate|enough) memory", str(error)):
            raise
        print(f"{name}: error:", str(error).split("\n")[0], file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def exposure_of(decoder: Decoder) -> float:
    """Effective exposure: pages that a query has met in the end, in units of those that its own step loaded."""
    loaded, first_seen = sum(layer.cache.totals.sum((0, 1)) for layer in decoder.layers if not layer.dense).tolist()
    return 1 + first_seen / loaded


# ----------------------------------------------------------------------------------------------------------------------
# The text, and the report on it


class TextStream:
    """Ids, one after the other -> the text that each adds, by the tokenizer's `decode` alone.

    The text of one token cannot be printed by itself: a character may be spread over several tokens (byte-level BPE), and
    decoding may drop the space in front of the first token (SentencePiece). So a token is decoded together with those before
    it, ids[a:b], whose text is printed already, and what is new is the difference. As long as the end is U+FFFD the character
    is not complete, and nothing is printed. Only the latest few tokens are decoded, however long the text is.
    """

    def __init__(self, tok: Tokenizer, prompt: list[int]):
        self.decode, self.ids, self.text = tok.decode, prompt[-8:], ""
        self.a, self.b = 0, len(self.ids)

    def add(self, token: int) -> str:
        self.ids.append(token)
        return "" if self.decode(self.ids[self.a :]).endswith("\ufffd") else self.flush()

    def flush(self) -> str:
        """What is not printed yet, complete or not."""
        new = self.decode(self.ids[self.a :])[len(self.decode(self.ids[self.a : self.b])) :]
        if new:
            self.a, self.b = self.b, len(self.ids)
        self.text += new
        return new


def report(decoder: Decoder, prompt_len: int, start: float, made: list[tuple[float, int]]) -> list[str]:
    """What to say at the end. `made`: of each step that made tokens, the prompt's first, its time and the number of tokens."""
    if not made:
        return ["no tokens"]
    times, tokens = zip(*made, strict=True)
    warm = 3 if len(made) > 2 else 1  # the pace is that after the first two decode steps, in which a GPU compiles and captures
    seconds = times[-1] - times[warm - 1]
    pace = f"{sum(tokens[warm:]) / seconds:.1f} tokens/s" if seconds else "too few for a pace"
    out = [
        f"{sum(tokens)} tokens, {pace}, prompt of {prompt_len} tokens read in {times[0] - start:.2f} s; "
        f"context {prompt_len + len(made)} of {decoder.model.config.max_seq_len}"
    ]
    # The first token comes out of the prefill, so n tokens took n - 1 decode steps.
    steps = range(prompt_len, prompt_len + len(made) - 1)
    return out + sparsity(decoder, steps) if steps else out


def sparsity(decoder: Decoder, steps: range) -> list[str]:
    """Pages and bytes that the steps read, from the positions alone; exposure as the layers counted it."""
    retro, layers, dense = decoder.retro, len(decoder.layers), decoder.retro.dense_layers
    held, loaded, bounds = (sum(counts) for counts in zip(*map(retro.kv_tokens, steps), strict=True))
    pages_held, pages_loaded = (tokens / retro.page_size / len(steps) for tokens in (held, loaded))
    if dense == layers:
        return [f"full attention: all of {pages_held:.1f} pages read"]
    share, exposure = (loaded + bounds) / held, exposure_of(decoder)
    overall = (share * (layers - dense) + dense) / layers
    return [
        f"{'RetroAttention' if retro.window > 1 else 'Quest'}, window {retro.window}: {pages_loaded:.1f} of {pages_held:.1f} "
        f"pages read per step and KV head in {layers - dense} sparse layers, {dense} dense",
        f"KV bytes read {overall:.0%} of full attention's (sparse layers {share:.0%}, page bounds included); "
        f"effective exposure {exposure:.2f}x of the pages a query loaded itself",
    ]


def size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 0.9995e9 else f"{nbytes / 1e6:.3g} MB"


def check_memory(config: LlamaConfig, retro: RetroConfig, B: int, length: int, device: torch.device, dtype: torch.dtype) -> str:
    """A line on what the weights and the caches of B texts of `length` tokens take. ValueError if the device has less."""
    n, sparse, (held, _, bounds) = parameters(config), config.n_layer - retro.dense_layers, retro.kv_tokens(length - 1)
    token = 2 * B * config.n_kv_head * config.head_size * dtype.itemsize  # a key and a value in one layer
    weights, kv, bounds = n * dtype.itemsize, config.n_layer * held * token, sparse * bounds * token
    outputs = sparse * B * retro.window * config.n_head * (config.head_size + 1) * 4
    line = (
        f"{n / 1e6:.1f} M parameters in {str(dtype).removeprefix('torch.')}, {size(weights)}; "
        f"for {B} x {length} tokens {size(kv)} of KV, {size(bounds)} of page bounds, {size(outputs)} of output cache"
    )
    if processes()[1] > 1:
        line = f"each of {processes()[1]} processes has: {line}"
    if device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[0]
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return line
    if weights + kv + bounds + outputs > available:
        pages = max(0, available - weights - outputs) * (held // retro.page_size) // (kv + bounds)
        fits = pages * retro.page_size
        raise ValueError(f"{line}: more than the {size(available)} of {device}, where at most {fits} tokens each would fit")
    return line


# ----------------------------------------------------------------------------------------------------------------------
# --trace


def trace_target(value: str, config: LlamaConfig, retro: RetroConfig) -> tuple[int, int]:
    """LAYER[:HEAD] -> layer and KV head; empty is the first sparse layer. ValueError unless the model has it, and sparse."""
    need(retro.dense_layers < config.n_layer, f"trace: nothing to draw, all {config.n_layer} layers are dense")
    match = re.fullmatch(r"(\d+)(?::(\d+))?", value or str(retro.dense_layers))
    layer, head = (int(number or 0) for number in match.groups()) if match else (-1, -1)
    need(
        retro.dense_layers <= layer < config.n_layer and 0 <= head < config.n_kv_head,
        f"trace must be LAYER or LAYER:HEAD, a sparse layer between {retro.dense_layers} and {config.n_layer - 1} "
        f"and a KV head between 0 and {config.n_kv_head - 1}, not {value!r}",
    )
    return layer, head


def mark_pages(step: Step, head: int, row: int, page_size: int) -> list[str]:
    """A character for each page held: what this step's load of it means to the row at position `row` of the first text."""
    marks = [" " if first > row else "." for first in range(0, step.t + 1, page_size)]
    for page, loaded in zip(step.pages[0, head].tolist(), step.last_loaded[0, head].tolist(), strict=True):
        if marks[page] == ".":
            marks[page] = "#" if row == step.t else "+" if loaded < row else "-"
    return marks


def revisions(step: Step, page_size: int) -> torch.Tensor:
    """What a step changed of the past rows -> (5, B, n_kv_head, R): pages that a row meets for the first time, the softmax mass
    that they add, and how far its output, key and value moved, as a share of their length."""
    n_kv_head, R = step.before.k.shape[1:3]

    def by_head(x):  # (B, R, n_head, ...) -> (B, n_kv_head, R, G * ...)
        return x.cpu().double().unflatten(2, (n_kv_head, -1)).flatten(3).transpose(1, 2)

    def moved(old, new):  # (B, n_kv_head, R, size) -> (B, n_kv_head, R)
        old, new = old.cpu().double(), new.cpu().double()
        return (new - old).norm(dim=-1) / old.norm(dim=-1)

    pages, last_loaded = step.pages[:, :, None].cpu(), step.last_loaded[:, :, None].cpu()  # (B, n_kv_head, 1, S)
    rows = torch.arange(step.t - R, step.t)[:, None]  # (R, 1)
    new = ((pages * page_size <= rows) & (last_loaded < rows)).sum(dim=-1)  # (B, n_kv_head, R)
    # exp(lse_before) of exp(lse_after) was there before. A row only gains keys: below 0 there is but rounding.
    before, after = by_head(step.before.lse), by_head(step.after.lse)  # (B, n_kv_head, R, G)
    mass = (1 - (before - after).exp()).clamp(min=0).mean(dim=-1)
    output = moved(by_head(step.before.out), by_head(step.after.out))
    key, value = moved(step.before.k, step.after.k), moved(step.before.v, step.after.v)
    return torch.stack((new.double(), mass, output, key, value))


def watch(decoder: Decoder, look: Callable[[int, Step], None]):
    """`look` becomes the hook of the sparse layers: called with a layer's number and what a step did there."""
    for i, module in enumerate(decoder.layers):
        if not module.dense:
            module.hook = partial(look, i)


class Trace:
    """Pictures of what single steps do in one layer and KV head of the first text, and at the end means over all sparse layers.

    It is the hook of the sparse layers, and draws about ten times in a run: no flood. On stderr: stdout stays the text.
    """

    strip = 44  # characters: with the numbers beside it, a line has 100

    def __init__(self, decoder: Decoder, tok: Tokenizer, prompt_len: int, steps: int, layer: int, head: int):
        self.decoder, self.tok, self.prompt_len, self.layer, self.head = decoder, tok, prompt_len, layer, head
        # Odd, and pages are powers of two: the traced tokens stand at all places in their pages, not always at the same.
        self.every, self.last = -(-steps // 10) | 1, len(decoder.layers) - 1
        self.page_size, self.window = decoder.retro.page_size, decoder.retro.window
        self.step, self.revised = None, {}  # of the token being traced: the Step of `layer`, and all sparse layers' revisions
        self.means = []  # of each traced token: (layers, 6) pages loaded, then the means of the revisions
        watch(decoder, self.look)

    def look(self, i: int, step: Step) -> None:
        """The hook of layer i. Draws after the last layer: what a correction does to K and V shows in the layer above."""
        if (step.t - self.prompt_len + 1) % self.every or self.decoder.tokens[0, step.t].item() in self.tok.stop_tokens:
            return
        self.revised[i] = revisions(step, self.page_size)[:, 0]
        if i == self.layer:
            self.step = step
        if i == self.last:
            print("\n".join(["", *self.picture()]), file=sys.stderr, flush=True)
            means = [[step.pages.shape[2], *x.mean(dim=(1, 2)).tolist()] for x in self.revised.values()]
            self.means.append(torch.tensor(means))

    def picture(self) -> list[str]:
        """A heading, the strip of the newest row, and for each past row its strip and its numbers."""
        t, held, loaded = self.step.t, self.step.t // self.page_size + 1, self.step.pages.shape[2]
        scale = -(-held // self.strip)  # pages per character
        names, numbers = ["mass", "output"], self.revised[self.layer][:3, self.head]  # (3, R)
        if self.layer < self.last:
            above = self.layer + 1
            names += [f"L{above} K", f"L{above} V"]
            numbers = torch.cat((numbers, self.revised[above][3:].mean(dim=1)))  # (5, R)
        columns = "  new" + "".join(f"{name:>8}" for name in names) if self.window > 1 else ""
        pages = "1 page per character" if scale == 1 else f"{scale} pages per character"
        lines = [
            f"position {t}, layer {self.layer}, KV head {self.head}: {loaded} of {held} pages loaded, {pages}",
            f"{'row':5} {'token':10} |{'context':{self.strip}}|{columns}",
        ]
        for back in range(numbers.shape[1] + 1):
            marks = mark_pages(self.step, self.head, t - back, self.page_size)
            strip = "".join(max(marks[i : i + scale], key=" .-+#".index) for i in range(0, held, scale))
            token = repr(self.tok.decode([self.decoder.tokens[0, t - back].item()]))[:10]
            values = ""
            if back:
                new, *shares = numbers[:, -back].tolist()
                values = f"{new:5.0f}" + "".join(f"{x:8.2%}" for x in shares)
            lines.append(f"{f't-{back}' if back else 't':5} {token:10} |{strip:{self.strip}}|{values}")
        return lines

    def legend(self) -> list[str]:
        pace = f"{self.every} tokens" if self.every > 1 else "token"
        return [
            f"--trace: layer {self.layer}, KV head {self.head}, every {pace}. The strips: the context in pages, oldest first.",
            "  t, the newest token       # loaded                   . not loaded",
            "  t-1 ..., the past rows    + loaded, new to the row   - loaded, seen before   . not loaded",
            "  blank: the page begins after the row; of several pages in a character the foremost of # + - .",
            "  new      pages that the row meets for the first time; they were loaded for t in any case",
            "  mass     their share of the row's softmax over all that it has seen by now",
            "  output   how far its attention output moves by them: |after - before| / |before|",
            "  K, V     the same of its key and value in the layer above, overwritten; all heads play a part",
        ]

    def summary(self) -> list[str]:
        if not self.means or self.window == 1:
            return []
        lines = [
            "",
            f"--trace: means over {len(self.means)} tokens and all KV heads; K and V of a layer as those below it move them",
            "layer" + "".join(f"{name:>14}" for name in ("pages loaded", "new", "mass", "output", "K", "V")),
        ]
        for i, (loaded, new, *shares) in zip(self.revised, torch.stack(self.means).mean(dim=0).tolist(), strict=True):
            lines.append(f"{i:5}{loaded:14.1f}{new:14.2f}" + "".join(f"{x:14.2%}" for x in shares))
        return lines


class Recorder:
    """What each step does to the first text in all sparse layers, as a page to step through: assets/viewer.html with the run
    written into it. It is the hook of these layers."""

    most = 200  # steps, so that the page of tiny/ stays below 5 MB

    def __init__(self, decoder: Decoder, tok: Tokenizer, prompt_len: int, path: Path):
        self.decoder, self.tok, self.prompt_len, self.path, self.steps = decoder, tok, prompt_len, path, {}
        watch(decoder, self.look)

    def look(self, i: int, step: Step) -> None:
        if step.t >= self.prompt_len + self.most:
            return
        cache, ps = self.decoder.layers[i].cache, self.decoder.retro.page_size
        first = self.decoder.retro.first_window_page(step.t)
        touched = slice(first, step.t // ps + 1)  # by `write`
        width = cache.bounds[0, :, touched].double().diff(dim=2).mean(dim=(2, 3))  # (n_kv_head, pages)
        heads = []
        for h, changes in enumerate(revisions(step, ps)[:, 0].transpose(0, 1)):  # (5, R)
            head = dict(zip(("new", "mass", "output", "k", "v"), map(rounded, changes), strict=True))
            head |= {"pages": step.pages[0, h].tolist(), "scores": rounded(step.scores[0, h])}
            heads.append(head | {"width": dict(enumerate(rounded(width[h]), first))})
        self.steps.setdefault(step.t, {})[i] = heads

    def legend(self) -> list[str]:
        return []  # the page has its own

    def summary(self) -> list[str]:
        """Writes the page, and returns what to say of it. A step that was broken off is left out."""
        layers = [i for i, module in enumerate(self.decoder.layers) if not module.dense]
        steps = [{"t": t, "layers": step} for t, step in self.steps.items() if len(step) == len(layers)]
        if not steps:
            return [f"--trace: nothing to write to {self.path}, there was no decode step"]
        retro = self.decoder.retro
        run = {"window": retro.window, "page_size": retro.page_size, "budget": retro.budget, "min_tokens": retro.min_tokens}
        tokens = [self.tok.decode([x]) for x in self.decoder.tokens[0, : steps[-1]["t"] + 1].tolist()]
        run |= {"prompt_len": self.prompt_len, "layers": layers, "tokens": tokens, "steps": steps}
        data = json.dumps(run, separators=(",", ":")).replace("<", "\\u003c")  # no text of a model ends the script
        template = (TINY.parent / "assets/viewer.html").read_text(encoding="utf-8")
        page = template.replace(">RUN<", f">{data}<")
        self.path.write_text(page, encoding="utf-8")
        return [f"--trace: {len(steps)} steps written to {self.path}, {size(len(page))}"]


def rounded(x: torch.Tensor) -> list[float]:
    """With four digits: the page of a run is a tenth as large."""
    return [float(f"{value:.4g}") for value in x.tolist()]


# ----------------------------------------------------------------------------------------------------------------------
# The command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    retro = RetroConfig()
    parser = Parser(description="Generate text with RetroAttention.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--prompt", default="", help="text to continue; FILE:path reads a file, - reads stdin, empty starts from nothing")
    add("--chat", action="store_true", help="the prompt is a user's message, the text the assistant's answer")
    add("--system", default=None, metavar="TEXT", help="with --chat: a system message in front")
    add("--max_new_tokens", type=int, default=500, help="length of the text at most")
    add("--num_samples", type=int, default=1, help="texts to make side by side, as one batch")
    add("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    add("--top_k", type=int, default=None, help="sample from the k likeliest tokens only")
    add("--top_p", type=float, default=0.95, help="sample from the likeliest tokens that together have this probability")
    add("--seed", type=int, default=1337, help="same seed, same text")
    add("--attention", choices=["retro", "quest", "full"], default="retro", help="quest is retro with a window of 1")
    add("--window", type=int, default=retro.window, help="rows that a step carries, the new token included: the paper's w")
    add_method_options(add, retro)
    what = "draw what a step loads and revises in one layer and KV head, both from 0, about ten times in a run"
    page = f"FILE.html: write a page to look at each of the first {Recorder.most} steps, in a browser"
    trace = f"{what}; alone: the first sparse layer, head 0; {page}"
    add("--trace", nargs="?", const="", metavar="LAYER[:HEAD]|FILE.html", help=trace)
    return parser.parse_args(argv)


def show(decoder: Decoder, stream, prompt: str, texts: list[TextStream], stop_tokens: list[int]):
    """Prints the text while it grows; of several, the first, and the others when all are done. Returns the exit code, and the
    time of each step and how many tokens it made; a text that has ended makes none."""
    code, made = 0, []
    try:
        print(prompt, end="", flush=True)
        for tokens in stream:
            going = [(text, token) for text, token in zip(texts, tokens.tolist(), strict=True) if token not in stop_tokens]
            made.append((time.perf_counter(), len(going)))
            for text, token in going:
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


def prompt_ids(args: argparse.Namespace, config: LlamaConfig, tok: Tokenizer) -> tuple[str, list[int]]:
    """The prompt's text, as it is to be shown, and its ids."""
    prompt = args.prompt
    if prompt == "-" or prompt.startswith("FILE:"):
        path = prompt.removeprefix("FILE:")
        prompt = read_text(path, f"prompt file {path}")
    for name, text in (("prompt", prompt), ("system", args.system or "")):
        need(not re.search("[\ud800-\udfff]", text), f"{name} is not UTF-8")  # as Python keeps bytes that are not
    need(args.chat or args.system is None, "system: a system message needs --chat")
    said = [("system", args.system), ("user", prompt)] if args.system is not None else [("user", prompt)]
    ids = tok.chat(said) if args.chat else tok.encode(prompt, bos=True)
    need(ids, "prompt must not be empty: this tokenizer has no begin-of-text token to start from")
    need(max(ids) < config.vocab_size, f"prompt has token {max(ids)}: the model knows {config.vocab_size} tokens only")
    check_prompt(len(ids), config.max_seq_len)
    return "" if args.chat else prompt, ids


def run(args: argparse.Namespace) -> int:
    need(args.num_samples >= 1, f"num_samples must be >= 1, not {args.num_samples}")
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed}
    check_sampling(args.max_new_tokens, **sampling)  # here and not only in `stream`: before the weights are read
    retro = retro_config(args, window=1 if args.attention == "quest" else args.window)
    config, tok, device, dtype = load(args)
    if args.attention == "full":
        retro = replace(retro, window=1, dense_layers=config.n_layer)
    page = args.trace is not None and args.trace.endswith(".html")
    target = trace_target("" if page else args.trace, config, retro) if args.trace is not None else None
    need(not page or Path(args.trace).parent.is_dir(), f"trace {args.trace}: no such folder")
    prompt, ids = prompt_ids(args, config, tok)
    # The cache is made for what is asked for, not for the whole context, which can be many gigabytes.
    length = min(len(ids) + args.max_new_tokens, config.max_seq_len)
    memory = check_memory(config, retro, args.num_samples, length, device, dtype)
    model = Llama.from_checkpoint(args.checkpoint, device=device, dtype=dtype)
    decoder = Decoder(model, args.num_samples, retro, max_seq_len=length)
    idx = torch.tensor([ids] * args.num_samples, device=device)  # (B, T)
    stream = decoder.stream(idx, args.max_new_tokens, **sampling, stop_tokens=tok.stop_tokens)
    trace = None
    if page and processes()[0] == 0:
        trace = Recorder(decoder, tok, len(ids), Path(args.trace))
    elif target and not page:
        trace = Trace(decoder, tok, len(ids), length - len(ids), *target)
    print("\n".join([memory, *(trace.legend() if trace else [])]), file=sys.stderr)
    texts, start = [TextStream(tok, ids) for _ in range(args.num_samples)], time.perf_counter()
    code, made = show(decoder, stream, prompt, texts, tok.stop_tokens)
    print("\n".join((trace.summary() if trace else []) + report(decoder, len(ids), start, made)), file=sys.stderr)
    return code


def main(argv: list[str] | None = None) -> int:
    return exit_code("sample.py", lambda: run(parse_args(argv)))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, heed)
    sys.exit(main())
