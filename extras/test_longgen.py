"""What must hold for extras/longgen.py: the prompts, how answers are read, and what is counted."""

import json
import re

import pytest
import torch

from extras import longgen
from model import Decoder, Llama, Tokenizer
from retro_attention import RetroConfig
from test_retro import TINY, pages_to_load, random_model, refused_in_a_line, run_main

# --------------------------------------------------------------------------------------------------
# Prompts


def write_jsonl(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_questions_are_numbered_on_from_the_examples():
    """As published. Guards against questions that begin at 1 again: a model then answered the
    examples once more."""
    pairs = [{"question": f"q{i}?", "work": f"w{i}.", "result": float(i)} for i in range(5)]
    system, user = longgen.conversation(pairs[:3], pairs[3:])
    assert system == ("system", longgen.INSTRUCTION) and user[0] == "user"
    asked = re.findall(r"Question_(\d): (q\d)\?", user[1])
    assert asked == [(str(i + 1), f"q{i}") for i in range(5)]
    worked = re.findall(r"Answer_(\d): w(\d)\. The answer is (\d)\.", user[1])
    assert worked == [(str(i + 1), str(i), str(i)) for i in range(3)]
    last_example = user[1].index("Answer_3")
    assert user[1].index("Question_3") < last_example < user[1].index("Question_4")
    alone = longgen.conversation(pairs[:2], pairs[4:])
    answers = [("assistant", "w0. The answer is 0."), ("assistant", "w1. The answer is 1.")]
    assert alone[1::2] == answers
    assert alone[::2] == [("user", "q0?"), ("user", "q1?"), ("user", "q4?")]


def test_questions_are_read_as_gsm8k_has_them(tmp_path):
    """Without the marks for a calculator, which no model should learn to write; results with
    commas and signs."""
    answer = "She has 1,000 * 2 = <<1000*2=2000>>2,000.\n#### -2,000"
    write_jsonl(tmp_path / "x", [{"question": " How many?\n", "answer": answer}])
    pair = longgen.read_questions(str(tmp_path / "x"), 1)[0]
    work = "She has 1,000 * 2 = 2,000."
    assert pair == {"question": "How many?", "work": work, "result": -2000, "line": 0}
    assert longgen.solution(pair) == f"{work} The answer is -2000."


def some_pairs(tmp_path):
    """Writes 40 examples and 20 questions of different lengths; returns the options."""
    words = "the wind blew and it was a dark night " * 9
    pairs = []
    for i in range(60):
        question = words[: 7 * i % 90] + f"{i}?"
        pairs.append({"question": question, "answer": words[: 11 * i % 170] + f"#### {i}"})
    write_jsonl(tmp_path / "examples", pairs[:40])
    write_jsonl(tmp_path / "questions", pairs[40:])
    return f"--examples {tmp_path}/examples --questions {tmp_path}/questions --out x"


def test_prompts_of_one_length(tmp_path):
    """The examples make up for the length of each prompt's own questions, in every draw."""
    tok = Tokenizer.from_checkpoint(TINY)
    options = f"{some_pairs(tmp_path)} --shots 3 --prompts 5 --one_length --draws 0 1"
    args = longgen.parse_args(options.split())
    for n in (1, 4):
        args.n = n
        prompts = longgen.make_prompts(args, 3000, tok)
        assert len({len(prompt.ids) for prompt in prompts}) == 1
        texts = [tok.decode(prompt.ids) for prompt in prompts]
        for prompt, text in zip(prompts, texts, strict=True):
            numbers = re.findall(r"(\d+)\?", text)
            assert len(numbers) == 3 + n
            assert numbers[3:] == [f"{result:g}" for result in prompt.results]
            assert prompt.results == [40.0 + line for line in prompt.questions]
        examples = {text[: text.index("?")] for text in texts}
        assert len(examples) > 1, "all prompts have the same examples"


def test_a_draw_is_another_order_of_the_same_questions(tmp_path):
    """Draw 0 has the file's order. The prompts of a draw don't depend on the other draws."""
    tok = Tokenizer.from_checkpoint(TINY)
    options = f"{some_pairs(tmp_path)} --shots 3 --prompts 5 --one_length --n 4".split()
    draws = {}
    for chosen in ("0", "1", "2", "2 0"):
        args = longgen.parse_args([*options, "--draws", *chosen.split()])
        draws[chosen] = longgen.make_prompts(args, 3000, tok)
    orders = []
    for draw in "012":
        assert {prompt.draw for prompt in draws[draw]} == {int(draw)}
        assert [prompt.number for prompt in draws[draw]] == list(range(5))
        orders.append([line for prompt in draws[draw] for line in prompt.questions])
    assert orders[0] == list(range(20)) == sorted(orders[1]) == sorted(orders[2])
    assert orders[0] != orders[1] != orders[2]
    assert draws["2 0"] == draws["2"] + draws["0"]


# --------------------------------------------------------------------------------------------------
# Answers


@pytest.mark.parametrize("text, number", [
    ("The answer is 72, in total.", 72), ("The answer is -5", -5), ("The answer is: -5.", -5),
    ("The answer is -$5.", -5), ("The answer is $-5.", -5), ("The answer is .5", 0.5),
    ("The answer is -\\$1,234.50.", -1234.5), ("The answer is -$.5 or so", -0.5), ("It is No.5", 5),
    ("The answer is... 5", 5), ("The answer is...5", 5), ("The answer is \u22125.", -5),
    ("The answer is 15%.", 15), ("The answer is -7.5 percent.", -7.5), ("\u20ac5", 5),
    ("The answer is USD 1,000,000", 1e6), ("The answer is -\u00a35", -5),
    ("The answer is **7**", 7), ("**The answer is -7.**", -7), ("The answer is -**7**.", -7),
    ("The answer is $\\boxed{-7}$", -7), ("The answer is 3/4.", 0.75), ("so -3 / 4 of it", -0.75),
    ("The answer is $1,000/8 each", 125), ("The answer is 5/0", 5), ("$5/hour", 5),
    ("20-5", 5), ("It is 9 - 2 = 7", 7), ("from 5-10", 10), ("GPT-4", 4), ("", None),
    ("none", None), ("The answer is 3. It took 2 steps.", 3),
    ("The answer is unclear\n4, I think", 4),
])  # fmt: skip
def test_the_number_of_an_answer(text, number):
    """Guards against a sign or a point that is lost with the unit, and a hyphen read as a sign."""
    assert longgen.read_result(text) == number


def test_answers_are_matched_by_their_number():
    """In any order. The number after 'The answer is' comes before any other, and the first answer
    to a question counts."""
    text = (
        "Answer_2: 3 and 4 make 7. The answer is $1,007.50. It took 3 steps.\n\n"
        "Answer_1: it is 12, so 13\nAnswer_4: nothing\nAnswer_2: The answer is 8.\n"
        "Answer_12: the answer is -5\nAnswer_4: The answer is 0."
    )
    by_number, in_order = longgen.read_answers(text)
    assert by_number == {2: 1007.5, 1: 13, 12: -5, 4: 0}
    assert in_order == [1007.5, 13, None, 8, -5, 0]
    assert longgen.read_answers("The answer is 3.") == ({}, [])
    assert longgen.read_answers("**Answer_3**: **5**") == ({3: 5}, [5])
    # Python refuses to read so long an integer, which a model that repeats itself may write.
    assert longgen.read_answers("Answer_" + "7" * 5000 + ": 5")[1] == [5]
    assert longgen.judge("Answer_9: 1 Answer_11: 2", 9, [1, 2, 3]) == {
        "right": [True, False, False],
        "right by position": [True, True, False],
        "answered": [True, False, True],
    }
    single = {"right": [True], "right by position": [True], "answered": [True]}
    assert longgen.judge("2 + 2 = 4", 9, [4]) == single


# --------------------------------------------------------------------------------------------------
# The measurement


def question(i):
    """Questions of different lengths."""
    return "Well? " * (i % 3) + f"What is {i} + 1000?"


@pytest.fixture
def measure(capsys, monkeypatch, tmp_path):
    """Runs the command as if the model answered said(prompt). The questions asked are 3, 4, ...
    Returns the results and the records."""
    tok = Tokenizer.from_checkpoint(TINY)
    lines = []
    for i in range(20):
        answer = f"<<{i}+1000>>\n#### {1000 + i:,}"
        lines.append({"question": question(i), "answer": answer})
    write_jsonl(tmp_path / "examples", lines[:3])
    write_jsonl(tmp_path / "questions", lines[3:])
    model = random_model(hs=8, n_layer=2, vocab_size=tok.vocab_size, max_seq_len=4096)
    monkeypatch.setattr(Llama, "from_weights", lambda *args: model)

    def run(said, options):
        def stream(decoder, idx, most, temperature, stop_tokens):
            assert temperature == 0 and stop_tokens == tok.stop_tokens
            assert idx.shape[1] + most <= decoder.max_seq_len
            stop = stop_tokens[-1]
            texts = [[*tok.encode(said(tok.decode(ids))), stop] for ids in idx.tolist()]
            for i in range(min(most, max(map(len, texts)))):
                yield torch.tensor([ids[i] if i < len(ids) else stop for ids in texts])

        monkeypatch.setattr(Decoder, "stream", stream)
        files = f"--questions {tmp_path}/questions --examples {tmp_path}/examples"
        usual = f"{files} --out {tmp_path}/out --shots 3 --windows 2 --device cpu --dtype float32"
        assert longgen.main([*usual.split(), *options.split()]) == 0
        record = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert record["command"] == "longgen"
        lines = (tmp_path / "out").read_text().splitlines()
        assert json.loads(lines[0])["settings"]["shots"] == 3
        return record["results"], [json.loads(line) for line in lines[1:]]

    return run


def test_right_answers_are_counted(measure):
    """The prompts ask Question_4 .. Question_7. In the first, 4 and 7 are right by number, 5 is
    first wrong, and 6 is missing; none is right by position. In the second, none is right."""
    said = (
        "Answer_7: The answer is 1006. Answer_4: The answer is 1,003. Answer_5: The answer is 1. "
        "Answer_5: The answer is 1004."
    )
    rows, records = measure(lambda prompt: said, "--n 4 --prompts 2")
    assert list(rows) == ["full", "Quest", "W=2"]
    for row in rows.values():
        assert row["right"]["mean"] == 2 / 8
        assert row["right by position"]["mean"] == 0
        assert row["answered"]["mean"] == 6 / 8
        assert row["right"]["by_passage"] == [0.5, 0]
        assert row["right"]["by_position"] == [0.5, 0, 0, 0.5]
        assert row["right"]["to Quest"] == [0, 0]
    assert len(records) == 6
    for record in records:
        assert record["text"] == said
        assert record["right"] == [record["prompt"] == 0 and i in (0, 3) for i in range(4)]


def test_the_control_is_compared(measure):
    """Guards against a flag without effect."""
    rows, _ = measure(lambda prompt: "The answer is 1003.", "--n 1 --prompts 2 --control")
    assert list(rows) == ["full", "Quest", "W=2", "W=2 not looking back"]
    assert rows["W=2"]["answered"]["to control"] == [0, 0]


def test_single_questions_are_asked_side_by_side(measure):
    """The answer is right unless the sum is odd. Guards against records and rows in the order of
    the batches, where prompts of one length come together, and against KV reads that count the
    steps of a longer answer in the batch."""
    tok = Tokenizer.from_checkpoint(TINY)

    def said(prompt):
        i = int(re.findall(r"What is (\d+)", prompt)[-1])
        return (
            f"1000 + {i}? " + "Well, well. " * (i % 4) + f"The answer is {(1000 + i) // 2 * 2}. 7"
        )

    sparse = "--dense_layers 0 --min_tokens 32 --budget 0.1 --page_size 8"
    rows, records = measure(said, f"--n 1 --prompts 17 --batch 4 {sparse}")
    even = [i % 2 == 0 for i in range(3, 20)]
    for name in ("full", "Quest", "W=2"):
        assert rows[name]["right"]["by_passage"] == even
        assert rows[name]["answered"]["mean"] == 1
        own = [record for record in records if record["method"] == name]
        assert [record["prompt"] for record in own] != list(range(17))
        found = {record["prompt"]: (record["text"], record["right"]) for record in own}
        assert found == {i: (said(question(i + 3)), [even[i]]) for i in range(17)}
        for record in own if name == "Quest" else ():
            first = first_position(tok, question(record["prompt"] + 3))
            steps = range(first, first + record["tokens"] - 1)
            assert record["kv_share"] == pytest.approx(quest_share(steps))


def first_position(tok, asked):
    """The first position decoded after a prompt that asks one question."""
    turns = []
    for i in range(3):
        turns += [("user", question(i)), ("assistant", f" The answer is {1000 + i}.")]
    return len(tok.chat([*turns, ("user", asked)]))


def quest_share(steps):
    """What Quest reads in these steps, as a share of full attention's bytes: a budget of a tenth,
    at least 32 tokens, in pages of 8."""
    retro = RetroConfig(page_size=8, budget=0.1, min_tokens=32, window=1)
    counts = [pages_to_load(retro, t)[:2] for t in steps]
    loaded, held = map(sum, zip(*counts, strict=True))
    return (loaded + held / 8) / held


@pytest.mark.parametrize("stops", [True, False])
def test_kv_read_counts_the_positions_decoded(measure, stops):
    """By hand for one record. The prompt's last position gives the first token, and each further
    token takes a step, also the stop token. The last step is the first of a page if it gives the
    stop token, else the last of a page, so that one step more or less changes what is read."""
    tok = Tokenizer.from_checkpoint(TINY)
    first = first_position(tok, question(3))
    texts = ["so " * i + "the answer is 1,003." for i in range(8, 40)]
    said = next(x for x in texts if (first + len(tok.encode(x))) % 8 == 1)
    end = first + len(tok.encode(said))
    most = 256
    if not stops:
        end = first + 8 - first % 8
        most = end - first + 1
    sparse = "--dense_layers 0 --min_tokens 32 --budget 0.1 --page_size 8"
    options = f"--n 1 --prompts 2 {sparse} --answer_tokens {most}"
    rows, records = measure(lambda prompt: said, options)
    record = next(x for x in records if x["method"] == "Quest" and x["prompt"] == 0)
    assert record["tokens"] == (len(tok.encode(said)) + 1 if stops else most)  # with the stop
    # A key and a value in two layers of two KV heads of size 8, in float64.
    held = sum(t // 8 + 1 for t in range(first, end)) * 8
    assert record["kv_bytes"] == pytest.approx(record["kv_share"] * held * 2 * 2 * 2 * 8 * 8)
    assert record["kv_share"] == pytest.approx(quest_share(range(first, end)), rel=1e-9)
    shares = [x["kv_share"] for x in records if x["method"] == "Quest"]
    assert rows["Quest"]["kv_share"] == pytest.approx(sum(shares) / 2)
    assert rows["full"]["kv_share"] == 1 > rows["W=2"]["kv_share"]
    nbytes, tokens = 0, 0
    for x in records:
        if x["method"] == "Quest":
            nbytes += x["kv_bytes"]
            tokens += x["tokens"]
    assert rows["Quest"]["tokens"] == tokens / 2
    assert rows["Quest"]["MB/token"] == pytest.approx(nbytes / tokens / 1e6)


def test_a_run_that_was_stopped_goes_on(measure, tmp_path):
    """Asks again only what the file lacks, a truncated last line included. The rest and the results
    stay the same."""
    asked = []

    def said(prompt):
        asked.append(prompt)
        return "The answer is 1003."

    options = "--n 1 --prompts 4 --draws 0 1"
    rows, records = measure(said, options)
    assert len(asked) == len(records) == 3 * 8
    out = tmp_path / "out"
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:20]) + lines[20][:30])
    asked.clear()
    again, records_again = measure(said, options)
    assert again == rows and len(asked) == 24 - 19
    key = lambda x: (x["method"], x["draw"], x["prompt"])  # noqa: E731
    assert sorted(records_again, key=key) == sorted(records, key=key)


def test_files_of_several_runs_can_be_joined(measure, tmp_path):
    """Two joined files, of a draw each, give the results of one run; no question is asked."""
    out = tmp_path / "out"
    both, _ = measure(lambda prompt: "The answer is 1003.", "--n 1 --prompts 4 --draws 0 1")
    parts = []
    for draw in (1, 0):
        out.unlink()
        measure(lambda prompt: "The answer is 1003.", f"--n 1 --prompts 4 --draws {draw}")
        parts.append(out.read_text())
    out.write_text("".join(parts))
    joined, _ = measure(lambda prompt: 1 / 0, "--n 1 --prompts 4 --draws 0 1")
    assert joined == both
    assert len(joined["full"]["right"]["by_passage"]) == 8
    with pytest.raises(AssertionError):  # exit code 2
        measure(lambda prompt: "", "--n 1 --prompts 4 --budget 0.5")


@pytest.mark.parametrize("options, message", [
    ("", "required: --questions, --examples, --out"),
    ("--prompts 1", "prompts: must be >= 2, not 1"),
    ("--questions nowhere --examples LICENSE --out x", "LICENSE: line 1 is not a question"),
    ("--questions LICENSE --examples nowhere --out x", "nowhere: No such file"),
    ("--questions {0} --examples {0} --out x", "{0} has 3 questions: 8 are needed"),
    ("--questions {0} --examples {0} --out x --shots 1 --prompts 2",
     "has 3 questions: 10 are needed"),
    ("--questions {0} --examples {0} --out x --shots 1 --prompts 2 --n 1 --answer_tokens 4090",
     r"n = 1: the context leaves 6 tokens for a prompt of \d+: choose a smaller n"),
    ("--questions {0} --examples {0} --out x --shots 2 --prompts 3 --n 1 --one_length",
     "one_length: no 2 examples make prompt 0 of draw 0 as long as the others"),
    ("--questions LICENSE --examples LICENSE --out README.md",
     "out README.md: exists, but not from this command"),
    ("--questions {0} --examples {0} --out {0}.answers",
     "out {0}.answers: exists, with n 7 instead of 5"),
    ("--questions LICENSE --examples LICENSE --out no/x", "out no/x: No such file"),
    ("--questions {0} --examples {0} --out x --budget 2", "budget must be in \\(0, 1\\], not 2.0"),
])  # fmt: skip
def test_a_mistake_is_one_clear_line(capsys, monkeypatch, tmp_path, options, message):
    """Before the weights are read, and without a file left behind."""
    monkeypatch.chdir(TINY.parent)
    monkeypatch.setattr(Llama, "from_weights", None)
    readme = (TINY.parent / "README.md").read_bytes()
    pairs = []
    for i, question in enumerate(("?", "Who? " * 9, "Who knows? " * 99)):
        pairs.append({"question": question, "answer": f"#### {i}"})
    write_jsonl(tmp_path / "pairs", pairs)
    args = longgen.parse_args("--questions pairs --examples pairs --out x --n 7".split())
    write_jsonl(tmp_path / "pairs.answers", [{"settings": longgen.settings(args)}])
    monkeypatch.setattr(longgen, "TRIALS", 100)
    options = options.format(tmp_path / "pairs").split()
    result = run_main(longgen.main, options, capsys)
    refused_in_a_line(result, message.format(re.escape(str(tmp_path / "pairs"))))
    assert not (TINY.parent / "x").exists()
    assert (TINY.parent / "README.md").read_bytes() == readme
