"""What must hold for extras/viewer.py: watching a step records what it did and changes nothing, and
the page holds what a run did."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import retro_attention
from extras.viewer import (
    PastRows,
    Recorder,
    Step,
    check_path,
    moved,
    revisions,
    rounded,
    steps_that_fit,
    watch,
)
from model import Decoder, Llama, Tokenizer
from retro_attention import OpsWrapper, RetroConfig
from test_retro import (
    DEVICE,
    SPARSE,
    TINY,
    by_position,
    close,
    command,
    decode,
    needs_triton,
    pages_to_load,
    random_model,
    random_tokens,
    refused,
    refused_in_a_line,
    start,
)

# --------------------------------------------------------------------------------------------------
# Watching


def past(layer, t):
    """Copies of K, V, outputs and log-sum-exps of the past rows of a window of 4 that ends at t."""
    rows = np.arange(max(0, t - 3), t)
    k, v = by_position(layer.cache)
    slots = rows % 4
    return k[:, :, rows], v[:, :, rows], layer.cache.out[:, slots], layer.cache.lse[:, slots]


def first_sights(seen, loaded, t):
    """How many of the loaded pages are new to each past row (B, n_kv_head, R). Marks them in `seen`
    (B, n_kv_head, positions, pages)."""
    rows = np.arange(max(0, t - 3), t + 1)
    begun = np.arange(loaded.shape[2]) * 8 <= rows[:, None]  # (R + 1, pages)
    new = loaded[:, :, None] & begun & ~seen[:, :, rows]
    seen[:, :, rows] |= loaded[:, :, None] & begun
    return new.sum(-1)[:, :, :-1]


def check_choice(step, loaded, last_loaded):
    """The record's pages are those loaded: the window's, then those of the highest scores. And
    `loaded_before` is what last_loaded was before the step."""
    count, held, window = pages_to_load(SPARSE, step.t)
    assert step.scores.shape == (2, 2, held) and step.pages.shape == (2, 2, count)
    for b, h in np.ndindex(2, 2):
        scores = enumerate(step.scores[b, h].tolist())
        ranks = sorted((j not in window, -score, j) for j, score in scores)
        pages = step.pages[b, h].tolist()
        assert pages == sorted(j for _, _, j in ranks[:count])
        assert pages == loaded[b, h].nonzero()[0].tolist()
        assert step.loaded_before[b, h].tolist() == last_loaded[b, h, pages].tolist()


def check_revisions(step, before, after, new):
    """The record has the past rows as they were and are; its revisions are those of the copies."""
    for rows, copies in ((step.before, before), (step.after, after)):
        assert all(map(torch.equal, (rows.k, rows.v, rows.out, rows.lse), copies))
    found = revisions(step, 8)
    close(found[0], new, 0)
    kept = np.exp((before[3] - after[3]).numpy()).reshape(2, -1, 2, 3).mean(-1)  # (B, R, n_kv_head)
    close(found[1], 1 - kept.swapaxes(1, 2), 1e-12)

    def of_heads(out):  # (B, R, n_head, hs) -> (B, n_kv_head, R, G * hs)
        return out.reshape(2, -1, 2, 96).transpose(1, 2)

    pairs = [
        (of_heads(before[2]), of_heads(after[2])),
        (before[0], after[0]),
        (before[1], after[1]),
    ]
    for (old, new), distance in zip(pairs, found[2:], strict=True):
        length = np.sqrt((old.numpy() ** 2).sum(-1))
        close(distance, np.sqrt(((new - old).numpy() ** 2).sum(-1)) / length, 1e-12)
    return found


@pytest.mark.parametrize("prompt_len", [1, 21])
def test_a_watcher_sees_what_a_step_revises_and_changes_nothing(prompt_len):
    """Guards against logits that differ in a bit, slots mixed up, rows read too late or not copied,
    heads in another order, and pages counted twice or never."""
    model = random_model()
    tokens = random_tokens(2, 40)
    wanted = decode(model, SPARSE, tokens, prompt_len)[0]
    decoder, _ = start(model, SPARSE, tokens, prompt_len)
    steps = {}
    watch(decoder, steps.__setitem__)
    assert decoder.layers[0].ops is retro_attention  # the dense layer
    P = decoder.layers[1].cache.last_loaded.shape[2]
    seen = {i: np.zeros((2, 2, 40, P), bool) for i in (1, 2)}
    for i in seen:
        seen[i][:, :, :prompt_len, : (prompt_len - 1) // 8 + 1] = True  # prefill loads everything
    furthest = 0
    for t in range(prompt_len, 40):
        before = {i: past(decoder.layers[i], t) for i in seen}
        last_loaded = {i: decoder.layers[i].cache.last_loaded.clone() for i in seen}
        logits = decoder.step(tokens[:, t])
        assert torch.equal(logits, wanted[:, t - prompt_len + 1])
        for i in seen:
            step = steps.pop(i)
            layer = decoder.layers[i]
            assert step.t == t
            loaded = (layer.cache.last_loaded == t).numpy()
            check_choice(step, loaded, last_loaded[i])
            new = first_sights(seen[i], loaded, t)
            found = check_revisions(step, before[i], past(layer, t), new)
        furthest = max(furthest, found[3:].max())  # K and V of the upper sparse layer
        assert not steps
    assert furthest > 0.01


def test_revisions_by_hand():
    """Step 33 loads pages 0, 2 and 4 of 8 tokens, last loaded at steps 10, 32 and 30. The past
    rows are 31 and 32; page 4 begins at 32. Guards against rows that see a page that begins later,
    a mass below 0 by rounding, and division by a length of 0."""
    k = torch.ones(1, 1, 2, 3)
    out = torch.ones(1, 2, 1, 3)
    before = PastRows(k, 0 * k, 0 * out, torch.tensor([[[2.0], [2.0]]]))
    after = PastRows(k * 1.5, 0 * k, out, torch.tensor([[[3.0], [1.9999999]]]))
    pages = torch.tensor([[[0, 2, 4]]])
    step = Step(33, None, pages, torch.tensor([[[10, 32, 30]]]), before, after)
    wanted = [[1, 2], [1 - np.exp(-1), 0], [1, 1], [0.5, 0.5], [0, 0]]
    close(revisions(step, 8)[:, 0, 0], wanted, 1e-12)
    close(moved(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0.0]])), [1], 0)


@needs_triton
def test_the_lists_of_the_kernels_are_trimmed():
    """The record of a step is the same through both implementations. Guards against the unused
    elements at the ends of the kernels' lists."""
    model = random_model(n_layer=2).float().to(DEVICE)
    tokens = random_tokens(1, 43).to(DEVICE)
    runs = []
    for impl in ("torch", "triton"):
        decoder = Decoder(model, 1, replace(SPARSE, window=2, impl=impl), max_seq_len=80)
        steps = []
        watch(decoder, lambda i, step, steps=steps: steps.append(step))
        assert not decoder.layers[1].ops.capturable  # no CUDA graph, which would not call `look`
        decoder.prefill(tokens[:, :41])
        for token in tokens[:, 41:].T:
            decoder.step(token)
        runs.append(steps)
    assert [step.t for step in runs[0]] == [step.t for step in runs[1]] == [41, 42]
    for wanted, found in zip(*runs, strict=True):
        assert found.pages.tolist() == wanted.pages.tolist()
        assert found.loaded_before.tolist() == wanted.loaded_before.tolist()
        close(found.scores.cpu(), wanted.scores.cpu(), 1e-3)
        close(revisions(found, 8), revisions(wanted, 8), 1e-4)


# --------------------------------------------------------------------------------------------------
# The page


class Names:
    """A tokenizer whose texts would end the page's script."""

    stop_tokens = []

    @staticmethod
    def decode(ids):
        return "".join(f"</script>{token}" for token in ids)


class Bytes:
    """A tokenizer of bytes. The letter q ends a text."""

    stop_tokens = [ord("q")]

    @staticmethod
    def decode(ids):
        return bytes(ids).decode(errors="replace")


def recorded(path):
    """The run that a page holds. NaN and Infinity, which no browser reads, are errors."""

    def refuse(constant):
        raise AssertionError(constant)

    text = path.read_text(encoding="utf-8")
    data = re.search('<script type="application/json" id="data">(.*?)</script>', text)[1]
    return json.loads(data, parse_constant=refuse)


def record(model, retro, tokens, prompt_len, path, tok=Names):
    """Decodes (B, T) tokens under a recorder; returns the line on the page, and the run in it."""
    decoder = Decoder(model, len(tokens), retro, max_seq_len=80)
    recorder = Recorder(decoder, tok, prompt_len, path)
    decoder.prefill(tokens[:, :prompt_len])
    for token in tokens[:, prompt_len:].T:
        decoder.step(token)
    line = recorder.save()
    assert f" written to {path}, {path.stat().st_size / 1e6:.3g} MB" in line
    return line, recorded(path)


def check_head(found, step, cache, h):
    """Compares the page's values for KV head h with the step and the cache, to four digits."""
    t = step.t
    window = cache.config.window
    keys = by_position(cache)[0][0, h, : t + 1].numpy()
    width = {}
    for j in range(max(0, t - window + 1) // 8, t // 8 + 1):
        width[str(j)] = np.ptp(keys[j * 8 : j * 8 + 8], axis=0).mean()
    names = ("new", "mass", "output", "k", "v")
    assert list(found) == [*names, "pages", "scores", "width"]
    assert found["pages"] == (cache.last_loaded[0, h] == t).nonzero()[:, 0].tolist()
    assert found["width"].keys() == width.keys() and len(found["k"]) == window - 1
    pairs = [(found["width"][j], width[j]) for j in width]
    pairs.append((found["scores"], step.scores[0, h]))
    pairs += zip((found[name] for name in names), revisions(step, 8)[:, 0, h], strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("window", [1, 4])
def test_the_page_holds_what_a_run_did(tmp_path, window):
    """Compares the first text of two with a run of its own. Guards against another text's numbers,
    a layer or head in another's place, and a token that ends the script."""
    model = random_model()
    tokens = random_tokens(2, 26)
    retro = replace(SPARSE, window=window)
    line, run = record(model, retro, tokens, 21, tmp_path / "run.html")
    assert re.fullmatch(r"--trace: 5 steps written to \S+, \S+ MB", line)
    steps = run.pop("steps")
    assert run == {
        "window": window,
        "page_size": 8,
        "budget": 0.2,
        "min_tokens": 16,
        "prompt_len": 21,
        "layers": [1, 2],
        "tokens": [f"</script>{token}" for token in tokens[0].tolist()],
    }
    decoder, _ = start(model, retro, tokens[:1], 21)
    seen = {}
    watch(decoder, seen.__setitem__)
    assert [step["t"] for step in steps] == list(range(21, 26))
    for step in steps:
        decoder.step(tokens[:1, step["t"]])
        assert list(step["layers"]) == ["1", "2"]
        for i, h in ((1, 0), (1, 1), (2, 0), (2, 1)):
            check_head(step["layers"][str(i)][h], seen[i], decoder.layers[i].cache, h)


def test_a_head_of_zeros_has_not_moved(tmp_path):
    """Guards against NaN, which would lose the whole page: 0 / 0 where a key, value or output has
    no length, or another number that is not finite."""
    model = random_model()
    for name, w in model.weights().items():
        if name in ("layers.2.attention.wk.weight", "layers.2.attention.wv.weight"):
            w[32:] = 0  # the second KV head
    run = record(model, SPARSE, random_tokens(1, 30), 21, tmp_path / "run.html")[1]
    heads = [step["layers"]["2"] for step in run["steps"]]
    zeros = [head[1][name] for head in heads for name in ("output", "k", "v")]
    assert not np.any(zeros) and np.any([head[0]["k"] for head in heads])
    x = torch.tensor([1.23456, torch.nan, torch.inf, -torch.inf], dtype=torch.float64)
    assert rounded(x) == [1.235, None, None, None]


class Interrupted(OpsWrapper):
    def combine(self, o, lse, cache, t):
        raise KeyboardInterrupt


def test_an_interrupted_step_is_left_out_and_a_new_text_starts_afresh(tmp_path):
    """Guards against half a step in the page, and against remains of an interrupted step or of an
    earlier text in the record of the next one."""
    path = tmp_path / "run.html"
    model = random_model()
    tokens = random_tokens(2, 24)
    decoder = Decoder(model, 1, SPARSE, max_seq_len=80)
    recorder = Recorder(decoder, Names, 21, path)
    looks = []
    watch(decoder, lambda i, step: looks.append((i, step.t)))
    decoder.prefill(tokens[:1, :21])
    wanted = f"--trace: nothing to write to {path}, there was no decode step"
    assert recorder.save() == wanted and not path.exists() and not looks
    decoder.step(tokens[:1, 21])
    decoder.step(tokens[:1, 22])
    layer = decoder.layers[2]
    outer = layer.ops
    inner = outer.ops
    inner.ops = Interrupted(inner.ops)
    with pytest.raises(KeyboardInterrupt):
        decoder.step(tokens[:1, 23])
    inner.ops = inner.ops.ops
    assert recorder.save().startswith("--trace: 2 steps written to ")
    assert [step["t"] for step in recorded(path)["steps"]] == [21, 22]

    looks.clear()
    decoder.prefill(tokens[1:, :21])
    assert not looks
    decoder.step(tokens[1:, 21])
    assert recorder.save().startswith("--trace: 1 steps written to ") and looks == [
        (1, 21),
        (2, 21),
    ]
    other = record(model, SPARSE, tokens[1:, :22], 21, tmp_path / "other.html")[1]
    assert recorded(path) == other


def test_a_character_is_shown_by_the_token_that_completes_it(tmp_path):
    """Guards against U+FFFD for each part of a character, in the prompt, across its end, and after
    it. A broken byte stays broken."""
    model = random_model(vocab_size=256)
    text = "é 日本 </script> שלום 🙂".encode() + b"\xff!"
    tokens = torch.tensor([list(text)])
    for prompt_len in (8, 30):  # inside 本; after ש
        run = record(model, SPARSE, tokens, prompt_len, tmp_path / "run.html", Bytes)[1]
        assert len(run["tokens"]) == len(text)
        assert "".join(run["tokens"]) == text.decode(errors="replace")
        assert run["tokens"][:7] == ["", "é", " ", "", "", "日", ""]
        assert run["tokens"][-6:] == ["", "", "", "🙂", "", "\ufffd!"]


def test_a_text_ends_before_its_stop_token(tmp_path):
    """Guards against steps of the padding behind the first text's end, and against an end at a stop
    token of the prompt or of another text."""
    model = random_model(vocab_size=256)
    texts = (b"a qualm, and then: quick", b"another text with no end")
    tokens = torch.tensor([list(text) for text in texts])
    path = tmp_path / "run.html"
    line, run = record(model, SPARSE, tokens, 12, path, Bytes)
    assert line.startswith("--trace: 7 steps written to ")
    assert "".join(run["tokens"]) == "a qualm, and then: "
    assert [step["t"] for step in run["steps"]] == list(range(12, 19))
    line, run = record(model, SPARSE, tokens.flip(0), 12, path, Bytes)
    assert "".join(run["tokens"]) == texts[1].decode() and len(run["steps"]) == 12
    decoder, _ = start(model, SPARSE, tokens, 19)
    recorder = Recorder(decoder, Bytes, 19, tmp_path / "none.html")
    decoder.step(tokens[:, 19])
    assert "there was no decode step" in recorder.save()


def test_the_page_has_a_limit_of_steps(tmp_path, monkeypatch):
    """Guards against a page that grows with the text, steps left out at its start, and a line that
    does not say what is missing."""
    monkeypatch.setattr(Recorder, "max_steps", 2)
    decoder = Decoder(random_model(), 1, SPARSE, max_seq_len=80)
    recorder = Recorder(decoder, Names, 21, tmp_path / "run.html")
    list(decoder.stream(random_tokens(1, 21), 6, temperature=0))
    line = recorder.save()
    assert line.startswith("--trace: the first 2 of 5 steps written to ")
    assert line.endswith(" MB: the page is limited to 2 steps")
    run = recorded(tmp_path / "run.html")
    assert [step["t"] for step in run["steps"]] == [21, 22] and len(run["tokens"]) == 23


@pytest.mark.parametrize("window, page_size", [(1, 1), (4, 8), (40, 2)])
def test_the_page_has_a_limit_of_size(tmp_path, monkeypatch, window, page_size):
    """Guards against a page that no browser opens, and an estimate that leaves much of it empty."""
    model = random_model()
    retro = replace(SPARSE, window=window, page_size=page_size)
    monkeypatch.setattr(Recorder, "max_bytes", 40_000)
    path = tmp_path / "run.html"
    line, run = record(model, retro, random_tokens(1, 45), 21, path)
    n = len(run["steps"])
    assert 1 < n < 24 and 30_000 < path.stat().st_size < 40_000
    assert line.startswith(f"--trace: the first {n} of 24 steps written to ")
    assert line.endswith(" MB: the page is limited to 0.04 MB")
    monkeypatch.setattr(Recorder, "max_bytes", 1)
    line, run = record(model, retro, random_tokens(1, 24), 21, path)
    assert "the first 1 of 3 steps" in line and len(run["steps"]) == 1


def test_how_many_steps_fit_into_the_page():
    """Sparse KV heads, position, steps: an 8B model at 32k and at 128k, and one of 30 layers at 318
    pages, where 20 steps took 3.9 MB."""
    for heads, t, most in ((240, 2**15, 12), (240, 2**17, 3), (84, 5088, 200)):
        assert steps_that_fit(RetroConfig(), heads, range(t, t + 200), 50_000_000) == most
    assert 15 <= steps_that_fit(RetroConfig(), 84, range(5088, 5288), 3_900_000) <= 20


def test_a_page_that_cannot_be_written_is_a_line(tmp_path):
    """Guards against the loss of the report that contains the line."""
    folder = tmp_path / "folder"
    folder.mkdir()
    decoder = Decoder(random_model(), 1, SPARSE, max_seq_len=80)
    recorder = Recorder(decoder, Names, 21, folder / "run.html")
    list(decoder.stream(random_tokens(1, 21), 3, temperature=0))
    folder.rmdir()
    wanted = f"--trace: {folder / 'run.html'} could not be written: No such file or directory"
    assert recorder.save() == wanted
    folder.mkdir()
    assert recorder.save().startswith("--trace: 2 steps written to ")


# --------------------------------------------------------------------------------------------------
# Paths, and the command


def test_a_path_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    """Guards against an error after the text is made, and one that does not name the path."""
    monkeypatch.chdir(tmp_path)
    Path("folder.html").mkdir()
    for path, message in (
        ("run.txt", "^trace must be a file that ends in .html, not 'run.txt'$"),
        ("", "^trace must be a file that ends in .html, not ''$"),
        ("nowhere/run.html", "^trace nowhere/run.html: no such folder$"),
        ("folder.html", "^trace folder.html: [^\n]+$"),
        ("n" * 300 + ".html", "^trace n+.html: [^\n]+$"),
    ):
        refused(partial(check_path, path), message)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.html"]


def test_checking_a_path_changes_no_file(tmp_path):
    """Guards against a file or link that the check destroys, and an empty file left behind."""
    path = tmp_path / "run.html"
    link = tmp_path / "link.html"
    link.symlink_to(path)
    for checked in (path, link):
        assert check_path(str(checked)) == checked and link.is_symlink() and not path.exists()
    path.write_text("an earlier run")
    for checked in (path, link):
        assert check_path(str(checked)) == checked and path.read_text() == "an earlier run"


def test_a_recorder_checks_its_path_first():
    decoder = Decoder(random_model(), 1, SPARSE)
    refused(lambda: Recorder(decoder, Names, 21, "nowhere/x.html"), "no such folder")
    assert all(layer.ops is retro_attention for layer in decoder.layers)


def test_trace_leaves_the_text_alone(capsys, tmp_path):
    """Stdout has only the text, and the report a line on the page. The page shows the first of two
    texts."""
    path = tmp_path / "run.html"
    options = "--window 3 --dense_layers 1 --num_samples 2 --max_new_tokens 8"
    code, text, report = command(capsys, options, "--trace", str(path))
    assert code == 0 and text == command(capsys, options)[1]
    assert f"\n--trace: 7 steps written to {path}, " in report
    run = recorded(path)
    assert "".join(run["tokens"]) in "<|begin_of_text|>" + text and run["window"] == 3
    assert run["layers"] == list(range(1, 10)) and len(run["steps"]) == 7
    path.unlink()
    code, _, report = command(capsys, "--max_new_tokens 1", "--trace", str(path))
    assert code == 0 and f"nothing to write to {path}" in report and not path.exists()


def test_a_mistake_in_trace_is_one_clear_line(capsys, monkeypatch, tmp_path):
    """Guards against a mistake that surfaces after the weights are read, or the text is made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Llama, "from_weights", None)  # it is not called
    for options in ("--attention full", "--dense_layers 10"):
        result = command(capsys, options, "--trace", "run.html")
        refused_in_a_line(result, "trace: nothing to show, all 10 layers are dense")
    refused_in_a_line(command(capsys, "--trace 1:1"), "ends in .html, not '1:1'")
    refused_in_a_line(command(capsys, "--trace nowhere/x.html"), "nowhere/x.html: no such folder")
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# In a browser

# Collects what the page shows at its start and after keys and a new address. `faults` are numbers
# cut or with uneven decimals, dots outside of their drawing, and panels with overflow.
PRESS = """<script>
const found = [], faults = [];
onerror = message => faults.push(message);
const text = id => document.getElementById(id).textContent;
const widths = x => {
  const range = document.createRange();
  range.selectNodeContents(x);
  return [range.getBoundingClientRect().width, x.getBoundingClientRect().width];
};
const look = () => {
  found.push(text("where") + "; " + text("chosen"));
  const ages = [...document.querySelectorAll("#ages .cell")];
  for (const x of ages.filter(x => widths(x)[0] > widths(x)[1])) faults.push("cut: " + x.title);
  const empty = ages.filter(x => !x.textContent).length;
  const all = ages.length;
  if (text("aged").includes(`${empty} of ${all} do not fit`) !== empty > 0) faults.push("caption");
  found.push(empty === 0 ? "no number" : empty === all ? "all numbers" : "some numbers");
  const columns = [...document.querySelectorAll("#touched td:nth-child(n+3)")];
  const decimals = columns.map(x => x.textContent.split(".")[1]?.length);
  if (new Set(decimals.filter(n => n)).size > 1) faults.push("decimals: " + decimals);
  const edge = document.querySelector("svg").viewBox.baseVal.width;
  for (const dot of document.querySelectorAll("circle")) {
    const [x, r] = ["cx", "r"].map(name => +dot.getAttribute(name));
    if (!(r > 0 && x - r >= 0 && x + r <= edge)) faults.push(`dot at ${x}, radius ${r}`);
  }
  for (const panel of document.querySelectorAll("section"))
    if (panel.scrollWidth > panel.clientWidth) faults.push("wide: " + panel.textContent);
};
const press = key =>
  document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
onload = () => {
  look();
  for (const key of ["Home", "ArrowRight", "ArrowRight", "End"]) { press(key); look(); }
  const cell = document.querySelector("#attend .row:nth-child(2) .cell.seen");
  cell.dispatchEvent(new MouseEvent("mouseenter"));
  found.push(text("reason"), text("wrote"), text("text"));
  document.body.style.width = "260px";
  dispatchEvent(new Event("resize"));
  look();
  document.body.style.width = "";
  addEventListener("hashchange", () => {
    look();
    const x = document.createElement("pre");
    x.id = "found"; x.textContent = JSON.stringify([found, faults]); document.body.append(x);
  });
  location.hash = "#2";
};
</script>"""
NAMES = ("chromium", "google-chrome", "chromium-browser")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
# What breaks a page: markup, another direction, parts of characters, control characters.
ODD = "</script><b> שלום 🙂 \x00\x1b[31m \u202etxet " + "_" * 40 + "🙂"


def found_in_browser(path, profile):
    """What PRESS finds in the page: texts, and faults."""
    text = path.read_text(encoding="utf-8").replace("</head>", PRESS + "</head>")
    path.write_text(text, encoding="utf-8")
    quiet = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run"
    options = [*quiet.split(), "--window-size=1280,900", "--virtual-time-budget=20000"]
    options += ["--dump-dom", f"--user-data-dir={profile}"]
    page = subprocess.run([BROWSER, *options, path.as_uri()], capture_output=True, timeout=120)
    return json.loads(
        html.unescape(re.search('<pre id="found">(.*?)</pre>', page.stdout.decode(), re.S)[1])
    )


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium: the page is not opened")
def test_the_page_steps_and_explains(tmp_path):
    """It opens without an error where something is new. Keys and the address change the step. The
    pages shown are those that an independent run loads, and a cell explains what it shows. Guards
    against a window that leaves no room for the dots, ages with digits cut off, and odd text."""
    path = tmp_path / "run.html"
    model = Llama.from_checkpoint(TINY)
    tok = Tokenizer.from_checkpoint(TINY)
    prompt = (TINY.parent / "LICENSE").read_text() + ODD
    ids = tok.encode(prompt, bos=True)
    idx = torch.tensor([ids])
    retro = RetroConfig(min_tokens=64, window=48, page_size=8, dense_layers=7)
    decoder = Decoder(model, 1, retro)
    recorder = Recorder(decoder, tok, len(ids), path)
    list(decoder.stream(idx, 13, temperature=0))
    assert "12 steps written" in recorder.save()
    run = recorded(path)
    new = next(step["t"] for step in run["steps"] if any(step["layers"]["7"][0]["new"]))
    found, faults = found_in_browser(path, tmp_path / "user")
    assert not faults
    assert found.pop(0).startswith(f"step t = {new} (") and found.pop(0) == "no number"
    shown = {}
    decoder = Decoder(model, 1, retro)
    token = decoder.prefill(idx).argmax(-1)
    for i in range(1, 13):
        token = decoder.step(token).argmax(-1)
        t = decoder.position
        pages = (decoder.layers[7].cache.last_loaded[0, 0] == t).nonzero()[:, 0].tolist()
        loaded = f"loaded {len(pages)} of {t // 8 + 1} pages: {' '.join(map(str, pages))}"
        shown[i] = f"step t = {t} ({i} of 12); {loaded}"
    empty = ["no number", "no number", "no number", "some numbers"]
    for i, count in zip((1, 2, 3, 12), empty, strict=True):
        assert (found.pop(0), found.pop(0)) == (shown[i], count)
    reason = r"Row t-1: last loaded at step \d+, this row stands at \d+: seen\.page \d+, positions"
    assert re.match(reason, found.pop(0))
    rows = found.pop(0)  # labelled by their tokens
    assert "'◌'" in rows and "'🙂'" in rows
    wanted = "".join(run["tokens"]).replace("\0", r"\u0000").replace("\x1b", r"\u001b")
    text = found.pop(0)
    assert text.replace("◌", "") == wanted.replace("\u202e", r"\u202e")
    assert "</script><b> שלום 🙂 " in text and "◌🙂" in text
    assert found == [shown[12], "all numbers", shown[2], "no number"]
