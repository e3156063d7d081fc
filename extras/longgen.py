"""Counts right answers to questions with a number for an answer (GSM8K), for a real checkpoint:

    python -m extras.longgen --checkpoint Qwen --questions test.jsonl --examples train.jsonl \\
        --out answers.jsonl --n 15

With --n 1 a prompt asks one question, after worked examples as earlier turns. With more it has the
form of LongGenBench (arXiv 2410.04199; paper, table 1): it asks n questions, and the model answers
all of them in one long generation. All methods answer greedily. Each answer goes to the file --out.
Questions that the file already answers are not asked again. So a stopped run can be repeated. To
combine runs with the same settings, join their files and run once more. Tables and numbers go to
stdout, as in bench.py.
"""

import argparse
import json
import random
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import bench
import sample
from extras import check_writable
from model import Llama, Tokenizer
from retro_attention import RetroConfig, need

# --------------------------------------------------------------------------------------------------
# Questions and prompts

INSTRUCTION = (
    "Answer all of the questions, one after the other and step by step, in the form of the "
    "examples: begin each answer with Answer_ and the number of its question, and end it with "
    "'The answer is' and a number. Do not repeat the questions."
)
TRIALS = 1_000_000  # to draw examples for one prompt, before `OneLength` gives up


def read_questions(path: str, needed: int) -> list[dict]:
    """Questions, worked answers and results from JSONL as GSM8K has it, where an answer ends in
    `#### number`. Raises ValueError if a line is something else, or the file has fewer than
    `needed`."""
    pairs = []
    for i, line in enumerate(sample.read_text(path, path).rstrip("\n").split("\n"), 1):
        try:
            pair = json.loads(line)
            # GSM8K marks what a calculator should compute: <<48/2=24>>.
            work, result = re.sub(r"<<.*?>>", "", pair["answer"]).split("####")
            number = float(result.replace(",", ""))
            question = pair["question"].strip()
        except (ValueError, KeyError, TypeError, AttributeError):
            what = "is not a question and an answer that ends in '#### number'"
            raise ValueError(f"{path}: line {i} {what}") from None
        pair = {"question": question, "work": work.strip(), "result": number, "line": i - 1}
        pairs.append(pair)
    need(len(pairs) >= needed, f"{path} has {len(pairs)} questions: {needed} are needed")
    return pairs


def solution(pair: dict) -> str:
    return f"{pair['work']} The answer is {pair['result']:.12g}."


def conversation(examples: list[dict], questions: list[dict]) -> list[tuple[str, str]]:
    """The prompt as (role, text). A single question comes after the examples as earlier turns.
    Several are in LongGenBench's form: all examples, then the questions, numbered on from them."""
    if len(questions) == 1:
        turns = []
        for pair in examples:
            turns += [("user", pair["question"]), ("assistant", solution(pair))]
        return [*turns, ("user", questions[0]["question"])]
    n = len(examples)
    asked = [f"Question_{i}: {x['question']}" for i, x in enumerate(examples + questions, 1)]
    worked = [f"Answer_{i}: {solution(x)}" for i, x in enumerate(examples, 1)]
    text = "\n\n".join(["Examples", *asked[:n], *worked, "Questions", *asked[n:]])
    return [("system", INSTRUCTION), ("user", text)]


def split_questions(args: argparse.Namespace, pairs: list[dict], draw: int) -> list[list[dict]]:
    """The n questions of each prompt: those of the file in its order, or for draws 1, 2, ... in a
    random order."""
    order = list(pairs)
    if draw > 0:
        random.Random(draw).shuffle(order)
    return [order[i * args.n : (i + 1) * args.n] for i in range(args.prompts)]


class OneLength:
    """Draws examples for each prompt, so that all prompts get the same length, in all draws."""

    def __init__(
        self, args: argparse.Namespace, examples: list[dict], pairs: list[dict], tok: Tokenizer
    ):
        self.examples = examples
        self.shots = args.shots
        self.tok = tok
        asked = split_questions(args, pairs, draw=0)
        # Tokens: bare + sizes of the examples + constant. (A size: prompt 0 with one example.)
        self.sizes = [len(self.ids([x], asked[0])) for x in examples]
        first = examples[: args.shots]
        sizes = self.sizes[: args.shots]
        self.constant = len(self.ids(first, asked[0])) - sum(sizes) - len(self.ids([], asked[0]))
        bare = statistics.median_low(len(self.ids([], questions)) for questions in asked)
        self.length = bare + args.shots * round(statistics.mean(self.sizes)) + self.constant

    def ids(self, examples: list[dict], questions: list[dict]) -> list[int]:
        return self.tok.chat(conversation(examples, questions))

    def prompt(self, questions: list[dict], draw: int, i: int) -> list[int]:
        """The ids of prompt i. Raises ValueError if no examples fit."""
        wanted = self.length - self.constant - len(self.ids([], questions))
        generator = random.Random(f"{draw}, {i}")
        for _ in range(TRIALS):
            drawn = generator.sample(range(len(self.examples)), self.shots)
            if sum(self.sizes[j] for j in drawn) != wanted:
                continue
            ids = self.ids([self.examples[j] for j in drawn], questions)
            if len(ids) == self.length:  # tokens may have merged where examples meet
                return ids
        what = f"no {self.shots} examples make prompt {i} of draw {draw} as long as the others"
        raise ValueError(f"one_length: {what}")


@dataclass
class Prompt:
    draw: int
    number: int  # in its draw
    ids: list[int]
    questions: list[int]  # their lines in the file, from 0
    results: list[float]


def make_prompts(args: argparse.Namespace, context: int, tok: Tokenizer) -> list[Prompt]:
    """The prompts of all draws. Raises ValueError if one and its answers exceed the context."""
    examples = read_questions(args.examples, args.shots)
    pairs = read_questions(args.questions, args.prompts * args.n)
    one_length = OneLength(args, examples, pairs, tok) if args.one_length else None
    prompts = []
    for draw in args.draws:
        for i, questions in enumerate(split_questions(args, pairs, draw)):
            if one_length:
                ids = one_length.prompt(questions, draw, i)
            else:
                ids = tok.chat(conversation(examples[: args.shots], questions))
            lines = [pair["line"] for pair in questions]
            results = [pair["result"] for pair in questions]
            prompts.append(Prompt(draw, i, ids, lines, results))
    longest = max(len(prompt.ids) for prompt in prompts)
    most = context - args.answer_tokens * args.n
    message = f"n = {args.n}: the context leaves {most} tokens for a prompt of {longest}"
    need(longest <= most, f"{message}: choose a smaller n or answer_tokens")
    return prompts


# --------------------------------------------------------------------------------------------------
# Answers

SIGN = r"(?<!\w)-[^\w\s.,-]*"  # a minus and e.g. $ or **; not the hyphen of 20-5
VALUE = r"\d[\d,]*(?:\.\d+)?|(?<![\w.])\.\d+"  # 1,234.5 or .5
NUMBER = rf"({SIGN})?({VALUE})(?: ?/ ?(0*[1-9]\d*))?"  # sign, value, divisor


def read_result(text: str) -> float | None:
    """The number after 'The answer is' in the same line, else the last number of the text; None
    without one. Units and bold markers around it do not matter, and 3/4 is 0.75."""
    text = text.replace("\u2212", "-")  # the typographic minus
    stated = re.search(rf"[Tt]he answer is[^\d\n]*?{NUMBER}", text)
    numbers = [stated.groups()] if stated else re.findall(NUMBER, text)
    if not numbers:
        return None
    sign, value, divisor = numbers[-1]
    result = float(value.replace(",", "")) / float(divisor or 1)
    return -result if sign else result


def read_answers(text: str) -> tuple[dict[int, float], list[float | None]]:
    """The results in an answer to several questions, in two readings: {number of the question:
    result}, and a list in the order of the text.

    Of several answers to one question, the first with a result counts. What follows may answer a
    question that the model has made up.
    """
    by_number = {}
    in_order = []
    pieces = re.split(r"Answer_(\d{1,9})", text)
    for i, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        result = read_result(piece)
        in_order.append(result)
        if result is not None:
            by_number.setdefault(int(i), result)
    return by_number, in_order


def judge(text: str, first: int, results: list[float]) -> dict[str, list[bool]]:
    """Which of the questions, numbered from `first`, have the right answer under their number, the
    right answer at their place, and an answer at all."""
    n = len(results)
    if n == 1:
        in_order = [read_result(text)]
        by_number = {first: in_order[0]}
    else:
        by_number, in_order = read_answers(text)
    said = [by_number.get(first + i) for i in range(n)]
    placed = [*in_order, *[None] * n][:n]
    return {
        "right": [a == b for a, b in zip(said, results, strict=True)],
        "right by position": [a == b for a, b in zip(placed, results, strict=True)],
        "answered": [a is not None for a in said],
    }


def batches(prompts: list[Prompt], most: int) -> Iterator[list[Prompt]]:
    """All prompts: those of one length together, at most `most` at a time."""
    by_length = {}
    for prompt in prompts:
        by_length.setdefault(len(prompt.ids), []).append(prompt)
    for same in by_length.values():
        for first in range(0, len(same), most):
            yield same[first : first + most]


def ask(
    method: bench.Method,
    args: argparse.Namespace,
    model: Llama,
    tok: Tokenizer,
    prompts: list[Prompt],
    length: int,
) -> Iterator[tuple[Prompt, list[int]]]:
    """Asks all prompts greedily. Yields each with its new ids, which include a stop token. The
    caches have room for `length` tokens in all batches, so the kernels compile only once."""
    most = args.answer_tokens * args.n
    for batch in batches(prompts, args.batch):
        idx = torch.tensor([prompt.ids for prompt in batch], device=model.norm.weight.device)
        decoder = method.make(model, len(batch), method.retro, length)
        steps = decoder.stream(idx, most, temperature=0, stop_tokens=tok.stop_tokens)
        steps = sample.counted("tokens, at most", steps, most)
        new = torch.stack(list(steps), dim=1).tolist()  # (B, new tokens)
        del decoder, steps  # their memory is for the next batch
        for prompt, ids in zip(batch, new, strict=True):
            ends = [j for j, token in enumerate(ids) if token in tok.stop_tokens]
            yield prompt, ids[: ends[0] + 1] if ends else ids


def record_of(
    prompt: Prompt,
    name: str,
    method: bench.Method,
    args: argparse.Namespace,
    model: Llama,
    tok: Tokenizer,
    ids: list[int],
) -> dict:
    """A line of the file: the answer to a prompt, which questions are right, and what it cost."""
    config = model.config
    first = len(prompt.ids)
    steps = range(first, first + len(ids) - 1)  # the prefill made the first token
    share = method.kv_share(method.retro, config.n_layer, steps)
    retro = sample.retro_config(args, window=1)
    pages = sum(map(retro.pages_held, steps))  # that full attention reads
    numbers = 2 * config.n_layer * config.n_kv_head * config.head_size  # K and V of a token
    nbytes = pages * retro.page_size * numbers * model.norm.weight.itemsize
    text = tok.decode([x for x in ids if x not in tok.stop_tokens])
    return {
        "draw": prompt.draw,
        "prompt": prompt.number,
        "method": name,
        "questions": prompt.questions,
        "tokens": len(ids),
        "kv_share": share,
        "kv_bytes": share * nbytes,
        "text": text,
    } | judge(text, args.shots + 1, prompt.results)


# --------------------------------------------------------------------------------------------------
# The measurement


def read_records(args: argparse.Namespace) -> tuple[list[dict], int]:
    """The answers that the file `out` has already, and their bytes in it. A last line that was cut
    off does not count. Raises ValueError if other settings made them."""
    if not Path(args.out).exists():
        return [], 0
    data = Path(args.out).read_bytes()
    end = data.rfind(b"\n") + 1
    lines = data[:end].splitlines()
    fits = bool(lines) and b'"settings"' in lines[0]
    need(fits, f"out {args.out}: exists, but not from this command; choose another name")
    records = []
    for line in map(json.loads, lines):
        if "settings" not in line:
            records.append(line)
            continue
        for name, x in settings(args).items():
            what = f"exists, with {name} {line['settings'].get(name)!r} instead of {x!r}"
            need(line["settings"].get(name) == x, f"out {args.out}: {what}")
    return records, end


def settings(args: argparse.Namespace) -> dict:
    """What the answers depend on. Of files and folders only the names, as they may move."""
    names = ["checkpoint", "questions", "examples"]
    found = {name: Path(vars(args)[name]).name for name in names}
    names = ["shots", "n", "prompts", "answer_tokens", "one_length", "dtype"]
    names += ["budget", "min_tokens", "page_size", "dense_layers"]
    return found | {name: vars(args)[name] for name in names}


def longgen(args: argparse.Namespace) -> dict:
    """Asks the questions with each method, and counts the right answers."""
    known, end = read_records(args)
    check_writable("out", args.out)
    retro = sample.retro_config(args, window=1)
    config, weights, tok, device, dtype = sample.load(args)
    prompts = make_prompts(args, config.max_seq_len, tok)
    model = Llama.from_weights(config, weights, device, dtype)
    longest = max(len(prompt.ids) for prompt in prompts)
    length = longest + args.answer_tokens * args.n
    found = {}  # method -> one record per prompt
    with open(args.out, "a", encoding="utf-8", newline="\n") as file:
        file.truncate(end)
        if end == 0:
            print(json.dumps({"settings": settings(args)}), file=file, flush=True)
        for name, method in bench.methods(retro, args.windows, args.control).items():
            own = {(x["draw"], x["prompt"]): x for x in known if x["method"] == name}
            left = [prompt for prompt in prompts if (prompt.draw, prompt.number) not in own]
            bench.progress(f"{name}: {len(left)} prompts")
            for prompt, ids in ask(method, args, model, tok, left, length):
                answer = record_of(prompt, name, method, args, model, tok, ids)
                print(json.dumps(answer), file=file, flush=True)
                own[prompt.draw, prompt.number] = answer
            found[name] = [own[prompt.draw, prompt.number] for prompt in prompts]
    return summary(found, args)


def summary(found: dict[str, list[dict]], args: argparse.Namespace) -> dict:
    """Prints and returns the shares of questions that are right, under their number or at their
    place, and answered. Standard errors are over prompts, those of all draws."""
    rows = {}
    for name, records in found.items():
        tokens = sum(x["tokens"] for x in records)
        rows[name] = {
            "kv_share": statistics.mean(x["kv_share"] for x in records),
            "tokens": tokens / len(records),
            "MB/token": sum(x["kv_bytes"] for x in records) / tokens / 1e6,
        }
    for key in ("right", "right by position", "answered"):
        values = {}
        for name, records in found.items():
            values[name] = torch.tensor([x[key] for x in records]).double()  # (prompts, n)
        for name, row in bench.compare(values).items():
            rows[name][key] = row
        count = f"{len(args.draws)} draws x {args.prompts} prompts x {args.n} questions"
        bench.show_comparison(f"{count}: {key}", key, ".1%", rows)
    title = "Tokens written per prompt, and KV megabytes read per token"
    bench.table(title, rows, {"tokens": ".0f", "MB/token": ".1f"})
    return rows


# --------------------------------------------------------------------------------------------------
# The command line


def add_options(add: Callable) -> None:
    sample.add_model_options(add, RetroConfig())
    integer = bench.at_least
    add("--windows", type=integer(1), nargs="+", default=[2, 4, 8], help="windows to measure")
    help = "add, for each window, Quest with as many pages"
    add("--control", action="store_true", help=help)
    help = "JSONL with question and answer, which ends in '#### number'"
    add("--questions", required=True, help=help)
    help = "likewise; its first lines are the worked examples, or with --one_length any lines"
    add("--examples", required=True, help=help)
    add("--shots", type=integer(0), default=8, help="worked examples per prompt")
    help = "JSONL file of the answers, one line per prompt and method; it may have some already"
    add("--out", required=True, help=help)
    add("--n", type=integer(1), default=5, help="questions per prompt")
    add("--prompts", type=integer(2), default=20, help="prompts")
    help = "orders of the questions: 0 is the file's, others are random, seeded by their number"
    add("--draws", type=integer(0), nargs="+", default=[0], help=help)
    add("--answer_tokens", type=integer(1), default=256, help="maximum new tokens per question")
    help = "prompts of one length to answer as one batch"
    add("--batch", type=integer(1), default=32, help=help)
    help = "draw examples for each prompt, so that all prompts have the same length"
    add("--one_length", action="store_true", help=help)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = sample.Parser(prog="extras.longgen", description=longgen.__doc__, formatter_class=form)
    parser.set_defaults(run=longgen, command="longgen")
    add_options(parser.add_argument)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return sample.exit_code("extras.longgen", lambda: bench.measure(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
