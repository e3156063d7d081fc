"""Counts right answers to questions with a number for an answer (GSM8K), for a real checkpoint:

    python -m extras.longgen --checkpoint Qwen --questions test.jsonl --examples train.jsonl \\
        --out answers.jsonl --n 15

With --n 1 a prompt asks one question, after worked examples as earlier turns. With more it has the
form of LongGenBench (arXiv 2410.04199; paper, table 1): it asks n questions, and the model answers
all of them in one long generation. All methods answer greedily. Each answer goes to the file --out;
tables and numbers go to stdout, as in bench.py.
"""

import argparse
import json
import random
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import bench
import sample
from model import Llama, Tokenizer
from retro_attention import RetroConfig, need

# --------------------------------------------------------------------------------------------------
# Questions and prompts

INSTRUCTION = (
    "Answer all of the questions, one after the other and step by step, in the form of the "
    "examples: begin each answer with Answer_ and the number of its question, and end it with "
    "'The answer is' and a number. Do not repeat the questions."
)
DRAWS = 1_000_000  # of examples for one prompt, before `examples_for_one_length` gives up


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
        pairs.append({"question": question, "work": work.strip(), "result": number})
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


def examples_for_one_length(
    examples: list[dict], asked: list[list[dict]], shots: int, tok: Tokenizer
) -> list[list[dict]]:
    """Draws `shots` examples for the questions of each prompt, so that all prompts get the same
    length. Raises ValueError if no draw does."""
    # The tokens that each example and each prompt's questions add, up to a constant.
    sizes = [len(tok.chat(conversation([example], asked[0]))) for example in examples]
    bare = [len(tok.chat(conversation([], questions))) for questions in asked]
    length = statistics.median_low(bare) + shots * round(statistics.mean(sizes))
    generator = random.Random(0)
    chosen = []
    for i, own in enumerate(bare):
        for _ in range(DRAWS):
            drawn = generator.sample(range(len(examples)), shots)
            if own + sum(sizes[j] for j in drawn) == length:
                chosen.append([examples[j] for j in drawn])
                break
        found = len(chosen) > i
        need(found, f"one_length: no {shots} examples make prompt {i} as long as the others")
    return chosen


def make_prompts(
    args: argparse.Namespace, context: int, tok: Tokenizer
) -> tuple[list[list[int]], list[list[float]]]:
    """The ids of each prompt, and the results of its n questions. Raises ValueError if a prompt and
    its answers exceed the context."""
    n = args.n
    examples = read_questions(args.examples, args.shots)
    pairs = read_questions(args.questions, args.prompts * n)
    asked = [pairs[i * n : (i + 1) * n] for i in range(args.prompts)]
    chosen = [examples[: args.shots]] * args.prompts
    if args.one_length:
        chosen = examples_for_one_length(examples, asked, args.shots, tok)
    prompts = [tok.chat(conversation(*x)) for x in zip(chosen, asked, strict=True)]
    longest = max(map(len, prompts))
    most = context - args.answer_tokens * n
    message = f"n = {n}: the context leaves {most} tokens for a prompt of {longest}"
    need(longest <= most, f"{message}: choose a smaller n or answer_tokens")
    return prompts, [[pair["result"] for pair in questions] for questions in asked]


# --------------------------------------------------------------------------------------------------
# Answers

SIGN = r"(?<!\w)-[^\w\s.,-]*"  # of -5, -$5 and -**5**; the hyphen of 20-5 is none
VALUE = r"\d[\d,]*(?:\.\d+)?|(?<![\w.])\.\d+"
NUMBER = rf"({SIGN})?({VALUE})(?: ?/ ?(0*[1-9]\d*))?"


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
    """The results in an answer to several questions: by the number of the question, wherever it
    stands, and in their order.

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


def batches(prompts: list[list[int]], most: int) -> Iterator[list[int]]:
    """The indices of all prompts: those of one length together, at most `most` at a time."""
    by_length = {}
    for i, ids in enumerate(prompts):
        by_length.setdefault(len(ids), []).append(i)
    for same in by_length.values():
        for first in range(0, len(same), most):
            yield same[first : first + most]


def answers(
    method: bench.Method,
    args: argparse.Namespace,
    model: Llama,
    tok: Tokenizer,
    prompts: list[list[int]],
) -> Iterator[tuple[int, list[int], range]]:
    """Answers all prompts greedily, each until the model stops or its tokens are used up. Yields
    the index of a prompt, the new ids, and the positions of the decode steps."""
    most = args.answer_tokens * args.n
    length = max(map(len, prompts)) + most  # the same for all batches, so that kernels compile once
    for batch in batches(prompts, args.batch):
        idx = torch.tensor([prompts[i] for i in batch], device=model.norm.weight.device)  # (B, T)
        decoder = method.make(model, len(batch), method.retro, length)
        steps = decoder.stream(idx, most, temperature=0, stop_tokens=tok.stop_tokens)
        new = torch.stack(list(steps), dim=1)  # (B, n)
        for i, ids in zip(batch, new.tolist(), strict=True):
            ends = [j for j, token in enumerate(ids) if token in tok.stop_tokens]
            n = ends[0] if ends else len(ids)
            made = min(n + 1, len(ids))  # with the stop token; the prefill made the first
            yield i, ids[:n], range(idx.shape[1], idx.shape[1] + made - 1)


# --------------------------------------------------------------------------------------------------
# The measurement


def longgen(args: argparse.Namespace) -> dict:
    """Asks the questions with each method, and counts the right answers."""
    need(not Path(args.out).exists(), f"out {args.out}: exists already")
    sample.check_writable("out", args.out)
    retro = sample.retro_config(args, window=1)
    config, weights, tok, device, dtype = sample.load(args)
    prompts, results = make_prompts(args, config.max_seq_len, tok)
    model = Llama.from_weights(config, weights, device, dtype)
    found = {}  # name -> index of the prompt -> record
    with open(args.out, "x", encoding="utf-8", newline="\n") as file:
        for name, method in bench.methods(retro, args.windows, args.control).items():
            bench.progress(name)
            found[name] = {}
            for i, new, steps in answers(method, args, model, tok, prompts):
                text = tok.decode(new)
                share = method.kv_share(method.retro, model.config.n_layer, steps)
                record = {"prompt": i, "method": name, "tokens": len(new), "text": text}
                record |= {"kv_share": share} | judge(text, args.shots + 1, results[i])
                print(json.dumps(record), file=file, flush=True)
                found[name][i] = record
    return summary(found, args)


def summary(found: dict[str, dict[int, dict]], args: argparse.Namespace) -> dict:
    """Prints and returns the shares of questions that are right, under their number or at their
    place, and answered."""
    rows = {}
    for name, records in found.items():
        rows[name] = {"kv_share": statistics.mean(x["kv_share"] for x in records.values())}
    for key in ("right", "right by position", "answered"):
        values = {}
        for name, records in found.items():
            by_prompt = [records[i][key] for i in range(args.prompts)]
            values[name] = torch.tensor(by_prompt).double()  # (prompts, n)
        for name, row in bench.compare(values).items():
            rows[name][key] = row
        title = f"{args.prompts} prompts of {args.n}: {key}; unanswered is wrong"
        bench.show_comparison(title, key, ".1%", rows)
    return rows


# --------------------------------------------------------------------------------------------------
# The command line


def add_options(add: Callable) -> None:
    sample.add_model_options(add, RetroConfig())
    integer = bench.at_least
    add("--windows", type=integer(1), nargs="+", default=[2, 4, 8], help="windows to measure")
    help = "add to each window as many pages without looking back"
    add("--control", action="store_true", help=help)
    help = "JSONL with question and answer, which ends in '#### number'"
    add("--questions", required=True, help=help)
    add("--examples", required=True, help="likewise; its first lines are the worked examples")
    add("--shots", type=integer(0), default=8, help="worked examples per prompt")
    help = "JSONL file of the answers, one line per prompt and method; must not exist yet"
    add("--out", required=True, help=help)
    add("--n", type=integer(1), default=5, help="questions per prompt")
    add("--prompts", type=integer(2), default=20, help="prompts")
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
