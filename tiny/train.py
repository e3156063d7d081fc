"""Trains the checkpoint that ships in this folder, and measures it.

    python tiny/train.py tokenizer --data DIR     # -> tokenizer.model
    python tiny/train.py train --data DIR         # -> params.json, consolidated.00.pth
    python tiny/train.py evaluate --data DIR

`tokenizer` learns 3,840 byte-pair tokens and writes them in Llama 3's file format. `train`
continues a run if it is called again. `evaluate` prints the bits per byte of held-out books, and
the share of task lines that are exactly right.

DIR holds `train*.txt.xz` and `heldout.txt.xz`: books as plain text, joined by a line
"<|endoftext|>". The tokenizer learns from `train.txt.xz` and samples of ledger and chain (votes is
younger than the tokenizer that ships). `tokenizer` needs `pip install tokenizers`; the others need
only the project's own packages.

A window of training text is either book text, or tasks, with or without book text in front. Tasks
are made on the fly:

ledger    lines "name: number", then an order of names, then the answer: the same lines in that
          order.
chain     shuffled lines "X wrote to Y.", then a start, then the answer: the letters followed from
          there, each line's end the next line's beginning. One slip derails the rest.
votes     committees of one, three or five members, then every member's vote, then the answer: each
          committee and the vote of its majority. Whoever reports it has looked up each member in
          passing, without writing down what was found.
"""

import argparse
import base64
import hashlib
import json
import lzma
import math
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import Llama, Tokenizer, config_from_params  # noqa: E402

NAMES = (
    "Ada Adam Agnes Alan Albert Alfred Alice Alma Amos Amy Andrew Anna Anne Anton Arthur Ashley "
    "Barbara Basil Beatrice Ben Bernard Bertha Bess Blake Boris Bruce Bruno Carl Carmen Carol "
    "Caspar Cecil Celia Charles Chester Clara Claude Clement Colin Conrad Cora Cyril Cyrus Daisy "
    "Daniel Daphne David Dean Della Denis Diana Dora Doris Douglas Duncan Dwight Earl Edgar Edith "
    "Edmund Edna Edward Edwin Eileen Elaine Eleanor Elias Elinor Eliza Ella Ellen Elmer Elsa Emil "
    "Emily Emma Enoch Eric Ernest Esther Ethan Ethel Eugene Eva Evan Faith Fanny Felix Flora "
    "Frances Frank Fred Gail George Gerald Gertrude Gilbert Gladys Gloria Grace Graham Greta Guy "
    "Hannah Harold Harriet Harry Harvey Hazel Hector Heidi Helen Henry Herbert Herman Hilda Homer "
    "Horace Howard Hubert Hugh Hugo Ida Ingrid Irene Iris Irma Isaac Isabel Ivan Ivor Jack Jacob "
    "James Jane Janet Jasper Jean Jeremy Jerome Jesse Joan Joel John Jonas Joseph Josephine Joyce "
    "Judith Julia Julian June Justin Karen Karl Kate Kenneth Kurt Laura Laurence Leah Leo Leon "
    "Leonard Leslie Lester Lewis Lily Linda Lionel Lois Lorna Louis Louise Lucas Lucy Luke Luther "
    "Lydia Mabel Magnus Malcolm Marcus Margaret Maria Marian Mark Martha Martin Mary Matilda Maud "
    "Maurice Max May Melvin Mercy Milton Mina Minnie Miriam Molly Morris Moses Muriel Myra Nancy "
    "Naomi Nathan Nelly Neville Nicholas Nigel Noel Nora Norman Olga Oliver Olive Oscar Otto Owen "
    "Patrick Paul Pauline Pearl Percy Perry Peter Philip Phoebe Phyllis Polly Quentin Rachel Ralph "
    "Ray Rebecca Reuben Rhoda Richard Rita Robert Roger Roland Rosa Rose Ross Roy Rufus Rupert "
    "Ruth Sally Samson Samuel Sarah Saul Selma Seth Sidney Silas Simon Sophia Stanley Stella "
    "Stephen Susan Sybil Sylvia Thelma Theodore Thomas Timothy Tobias Tom Ursula Vera Vernon "
    "Victor Vincent Viola Violet Virgil Vivian Wallace Walter Wanda Warren Wilbur William Willis "
    "Winifred Xavier Yvonne Zelda"
).split()


def ledger(rng: random.Random, n: int) -> tuple[str, str]:
    """Question and answer of `n` lines (1 to len(NAMES))."""
    names = rng.sample(NAMES, n)
    lines = {name: f"{name}: {rng.randrange(100, 1000)}\n" for name in names}
    order = rng.sample(names, n)
    question = f"Ledger\n{''.join(lines.values())}Order: {', '.join(order)}\nReport\n"
    return question, "".join(lines[x] for x in order) + "\n"


def chain(rng: random.Random, n: int) -> tuple[str, str]:
    """Question and answer of `n` lines (1 to len(NAMES))."""
    names = rng.sample(NAMES, n)  # who writes to whom: each to the next, the last to the first
    lines = [f"{a} wrote to {b}.\n" for a, b in zip(names, names[1:] + names[:1], strict=True)]
    shuffled = "".join(rng.sample(lines, n))
    question = f"Letters\n{shuffled}Follow the letters from {names[0]}\n"
    return question, "".join(lines) + "\n"


def votes(rng: random.Random, n: int) -> tuple[str, str]:
    """Question and answer of `n` people (1 to len(NAMES)), in committees of one, three or five."""
    names = rng.sample(NAMES, n)
    vote = {name: rng.choice(["yes", "no"]) for name in names}
    sizes = []
    while sum(sizes) < n:
        size = (1, 3, 5)[len(sizes) % 3]
        sizes.append(size if sum(sizes) + size <= n else 1)
    committees = [[names.pop() for _ in range(size)] for size in rng.sample(sizes, len(sizes))]
    asked = "".join(", ".join(members) + "\n" for members in committees)
    lines = "".join(f"{name}: {vote[name]}\n" for name in rng.sample(list(vote), n))
    results = []
    for members in committees:
        majority = sorted(vote[name] for name in members)[len(members) // 2]
        results.append(f"{', '.join(members)}: {majority}\n")
    return f"Committees\n{asked}Votes\n{lines}Report\n", "".join(results) + "\n"


TASKS = {"ledger": ledger, "chain": chain, "votes": votes}


# --------------------------------------------------------------------------------------------------
# Data


def read_books(path: Path) -> list[str]:
    return lzma.open(path, "rt", encoding="utf-8").read().split("\n\n<|endoftext|>\n\n")


def book_tokens(data: Path, tok: Tokenizer) -> np.ndarray:
    """All training books as one array of ids, each between begin_of_text and end_of_text. The file
    ./tokens-*.npy keeps it."""
    paths = sorted(data.glob("train*.txt.xz"))
    known = repr([(path.name, path.stat().st_size) for path in paths])
    known += repr(sorted(tok.bpe._mergeable_ranks.items()))
    cache = Path(f"tokens-{hashlib.sha256(known.encode()).hexdigest()[:12]}.npy")
    if not cache.exists():
        end = tok.special["<|end_of_text|>"]
        books = [book for path in paths for book in read_books(path)]
        random.Random(0).shuffle(books)
        ids = tok.bpe.encode_ordinary_batch(books, num_threads=16)
        np.save(cache, np.concatenate([np.array([tok.bos, *x, end], dtype=np.uint16) for x in ids]))
    return np.load(cache, mmap_mode="r")


class Windows(torch.utils.data.IterableDataset):
    """Endless (ids, targets) windows of `context` tokens; a target of -100 is not trained on."""

    def __init__(
        self,
        books: np.ndarray,
        tok: Tokenizer,
        context: int,
        task_share: float,
        sizes: tuple[int, int],
        seed: int,
    ):
        self.books = books
        self.tok = tok
        self.context = context
        self.task_share = task_share
        self.sizes = sizes
        self.seed = seed

    def book_text(self, rng: random.Random, n: int) -> list[int]:
        start = rng.randrange(len(self.books) - n)
        return self.books[start : start + n].tolist()

    def task_text(self, rng: random.Random) -> tuple[list[int], list[int]]:
        """Ids and targets of the same length. The question is random, so only its answer is trained
        on."""
        low, high = self.sizes
        n = round(math.exp(rng.uniform(math.log(low), math.log(high))))
        task = rng.choice(list(TASKS.values()))
        question, answer = (self.tok.encode(text) for text in task(rng, n))
        return question + answer, [-100] * len(question) + answer

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        rng = random.Random(self.seed * 1009 + (info.id if info else 0))
        while True:
            n = self.context
            if rng.random() >= self.task_share:
                ids = targets = [self.tok.bos, *self.book_text(rng, n)]
            else:
                # Book text precedes half of the task windows, because questions come after it, too.
                front = self.book_text(rng, rng.randrange(n // 2)) if rng.random() < 0.5 else []
                ids, targets = [self.tok.bos, *front], [-100, *front]
                while len(ids) <= n:
                    task, wanted = self.task_text(rng)
                    ids, targets = ids + task, targets + wanted
            yield torch.tensor(ids[:n]), torch.tensor(targets[1 : n + 1])


# --------------------------------------------------------------------------------------------------
# The three commands


def byte_table() -> dict[str, int]:
    """How byte-level BPE writes bytes as characters: printable ones as themselves, the others from
    256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def train_tokenizer(args):
    import tokenizers
    from tokenizers import Regex, models, pre_tokenizers, trainers

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(Tokenizer.pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    rng = random.Random(0)
    tasks = ["".join(TASKS[name](rng, 64)) for name in ("ledger", "chain") for _ in range(200)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size - 256, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(read_books(args.data / "train.txt.xz") + tasks, trainer)
    byte_of = byte_table()
    by_rank = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    lines = []
    for token, rank in by_rank:
        lines.append(base64.b64encode(bytes(byte_of[c] for c in token)) + b" %d\n" % rank)
    (args.out / "tokenizer.model").write_bytes(b"".join(lines))
    print(f"{len(lines)} tokens -> {args.out / 'tokenizer.model'}")


def learning_rate(step: int, args) -> float:
    """Share of the peak: a short warm-up, flat, and down to zero over the last `decay` of the
    run."""
    return min((step + 1) / args.warmup, 1.0, (args.steps - step) / (args.decay * args.steps))


def optimizers(model: Llama, args) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    muon = torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adamw]


def initialise(model: Llama):
    for name, p in model.named_parameters():
        if p.ndim == 2:
            # The two matrices that write to the residual stream start smaller, as in GPT-2.
            writes = name.endswith(("wo.weight", "w2.weight"))
            scale = 1 / math.sqrt(2 * model.config.n_layer) if writes else 1.0
            torch.nn.init.normal_(p, std=0.02 * scale)


def params_of(args, vocab_size: int) -> dict:
    """What goes into params.json, in Meta's words; `max_seq_len` is our addition."""
    return {
        "dim": args.dim,
        "n_layers": args.n_layer,
        "n_heads": args.n_head,
        "n_kv_heads": args.n_kv_head,
        "vocab_size": vocab_size,
        "multiple_of": 128,
        "ffn_dim_multiplier": 0.875,  # 896 at dim 384: ten layers of it stay below 32 MB
        "norm_eps": 1e-5,
        "rope_theta": 50_000.0,
        "max_seq_len": 4096,
    }


def train(args):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tok = Tokenizer.from_checkpoint(args.out)
    params = params_of(args, tok.vocab_size)
    torch.manual_seed(args.seed)
    model = Llama(config_from_params(params, tie_embeddings=True)).to(device)
    initialise(model)
    if args.start is not None:
        path = args.start / "consolidated.00.pth"
        started = torch.load(path, map_location=device, weights_only=True)
        for name, w in model.weights().items():
            w.copy_(started[name])
    opts = optimizers(model, args)
    step = 0
    if args.state.exists():
        state = torch.load(args.state, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["opts"], strict=True):
            opt.load_state_dict(saved)
        step = state["step"]
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{millions:.2f} M parameters on {device}, step {step} of {args.steps}")

    books = book_tokens(args.data, tok)
    windows = Windows(books, tok, args.context, args.task_share, args.sizes, args.seed + step)
    batches = torch.utils.data.DataLoader(
        windows, args.batch, num_workers=args.workers, pin_memory=device == "cuda"
    )
    step = run(model, opts, iter(batches), step, device, args)
    states = [opt.state_dict() for opt in opts]
    torch.save({"model": model.state_dict(), "opts": states, "step": step}, args.state)
    weights = {name: w.to("cpu", torch.bfloat16) for name, w in model.weights().items()}
    torch.save(weights, args.out / "consolidated.00.pth")
    (args.out / "params.json").write_text(json.dumps(params) + "\n")


def run(model, opts, batches, step: int, device: str, args) -> int:
    """Trains until the last step or the end of the piece's minutes. Returns the step reached."""

    def loss_of(idx, targets):
        with torch.autocast(device, dtype=torch.bfloat16):
            return F.cross_entropy(model(idx).float().flatten(0, 1), targets.flatten())

    if device == "cuda":
        # The loss together with the model, because the logits are the largest tensor.
        loss_of = torch.compile(loss_of)
    start = mark = time.time()
    while step < args.steps and time.time() - start < args.minutes * 60:
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = args.lr * learning_rate(step, args)
        idx, targets = (x.to(device, non_blocking=True) for x in next(batches))
        loss = loss_of(idx, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        step += 1
        if step % args.log_every == 0:
            loss = loss.item()  # waits for the GPU
            now = time.time()
            rate = args.log_every * idx.numel() / (now - mark)
            mark = now
            print(
                f"step {step} loss {loss:.3f} {rate:.0f} tokens/s {now - start:.0f} s", flush=True
            )
    return step


def bits_per_byte(model: Llama, tok: Tokenizer, books: list[str], device: str) -> float:
    """Log-likelihood of each book's tokens in windows of the whole context, each window after
    begin_of_text."""
    context = model.config.max_seq_len
    nats = 0.0
    for book in books:
        ids = tok.encode(book)
        for start in range(0, len(ids), context - 1):
            window = torch.tensor([[tok.bos, *ids[start : start + context - 1]]], device=device)
            logits = model(window)[0, :-1].float()
            nats += F.cross_entropy(logits, window[0, 1:], reduction="sum").item()
    return nats / math.log(2) / sum(len(book.encode()) for book in books)


def task_lines(
    model: Llama, tok: Tokenizer, name: str, book: str, device: str, args
) -> tuple[int, int]:
    """Lines exactly right and lines asked for, greedy and free-running with full attention. Book
    text precedes every question, and between it and every second question there is another task
    with its answer."""
    rng = random.Random(args.seed)
    text = tok.encode(book)
    prompts = []
    answers = []
    for i in range(args.questions):
        question, answer = TASKS[name](rng, args.entries)
        other = rng.choice(list(TASKS.values()))(rng, args.entries // 2)
        prompts.append(tok.encode("".join(other) * (i % 2) + question))
        answers.append(answer)
    # Book text fills all up to one length, so that they make one batch.
    length = max(map(len, prompts)) + 512
    for i, prompt in enumerate(prompts):
        start = rng.randrange(len(text) - length)
        prompts[i] = [tok.bos, *text[start : start + length - len(prompt)], *prompt]
    n = max(len(tok.encode(answer)) for answer in answers)
    idx = torch.tensor(prompts, device=device)
    out = model.generate(idx, max_new_tokens=n, retro=None, temperature=0)
    right = total = 0
    for ids, answer in zip(out[:, length + 1 :].tolist(), answers, strict=True):
        wanted = answer.split("\n")[:-2]
        right += sum(a == b for a, b in zip(tok.decode(ids).split("\n"), wanted, strict=False))
        total += len(wanted)
    return right, total


@torch.inference_mode()
def evaluate(args):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Llama.from_checkpoint(args.out, device=device)
    tok = Tokenizer.from_checkpoint(args.out)
    books = read_books(args.data / "heldout.txt.xz")
    print(
        f"held-out books: {bits_per_byte(model, tok, books, device):.4f} bits per byte", flush=True
    )
    for name in TASKS:
        right, total = task_lines(model, tok, name, books[0], device, args)
        share = f"{right} of {total} lines exactly right ({right / total:.1%})"
        print(f"{name}: {share}, {args.entries} entries", flush=True)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("command", choices=["tokenizer", "train", "evaluate"])
    add("--data", type=Path, required=True, help="folder of train*.txt.xz and heldout.txt.xz")
    add("--out", type=Path, default=Path(__file__).parent, help="the checkpoint's folder")
    add("--start", type=Path, help="folder of a checkpoint whose weights a new run begins with")
    state = Path("train_state.pt")
    add("--state", type=Path, default=state, help="a run's weights, optimizers and step")
    add("--vocab_size", type=int, default=4096, help="with the 256 special tokens")
    add("--dim", type=int, default=384)
    add("--n_layer", type=int, default=10)
    add("--n_head", type=int, default=6)
    add("--n_kv_head", type=int, default=2)
    add("--context", type=int, default=4096, help="tokens per window, at most 4096")
    add("--batch", type=int, default=48, help="windows per step")
    add("--steps", type=int, default=4761, help="steps of the whole run, over all its pieces")
    help = "stop this piece after so long; the same command continues"
    add("--minutes", type=float, default=1e9, help=help)
    add("--lr", type=float, default=4e-3)
    add("--warmup", type=int, default=100, help="steps of rising rate")
    help = "share of the run over which the rate falls to zero"
    add("--decay", type=float, default=0.4537, help=help)
    add("--task_share", type=float, default=0.3, help="share of windows with tasks")
    add("--sizes", type=int, nargs=2, default=(8, 128), help="entries of a task")
    add("--workers", type=int, default=8, help="processes that make windows")
    add("--log_every", type=int, default=50)
    add("--seed", type=int, default=0)
    add("--questions", type=int, default=20, help="evaluate: questions per task")
    add("--entries", type=int, default=64, help="evaluate: entries per question")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    {"tokenizer": train_tokenizer, "train": train, "evaluate": evaluate}[args.command](args)


if __name__ == "__main__":
    main()
