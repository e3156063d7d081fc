"""What must hold for extras/figures.py: which pages count as wanted, and what the picture draws."""

import importlib.util
import itertools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bench
from extras import figures
from model import Decoder
from retro_attention import OpsWrapper
from test_retro import (
    BENCH,
    TINY,
    close,
    pages_to_load,
    quest_bounds,
    random_model,
    random_tokens,
    refused_in_a_line,
    run_main,
)

# --------------------------------------------------------------------------------------------------
# exposure


def shares(now, past, k):
    """The shares of the set `now` among the first k and the next k of the list `past`."""
    return [len(now & set(past[:k])) / len(now), len(now & set(past[k : 2 * k])) / len(now)]


def test_overlap_of_page_sets():
    """Compares with sets. A page begun since the past step is in neither share."""
    rng = np.random.default_rng(0)
    ranks = []
    for i in range(6):
        pages = np.tile(np.arange(9 + i // 2), (2, 3, 1))
        ranks.append(torch.from_numpy(rng.permuted(pages, axis=-1)))
    selected = [2, 2, 3, 3, 3, 3]
    found = []
    for i in range(2, 6):
        pairs = zip(ranks[i].flatten(0, 1), ranks[i - 2].flatten(0, 1), strict=True)
        for now, past in pairs:
            taken = set(np.flatnonzero(now < selected[i]))
            found.append(shares(taken, past.argsort().tolist(), selected[i - 2]))
    close(figures.overlap(ranks, selected, 2), np.mean(found, 0), 1e-6)


@pytest.mark.parametrize("rank", range(7))
def test_top_k_and_next_k_are_k_pages_each(rank):
    """A step selects one page, which the past step ranked `rank` with k = 2; rank 6 is a page begun
    since. Guards against a next k of k + 1 pages."""
    now = torch.full((1, 1, 7), 9)
    now[..., rank] = 0
    found = figures.overlap([torch.arange(6).view(1, 1, 6), now], [2, 1], 1)
    assert found == [float(rank in (0, 1)), float(rank in (2, 3))]


class KeepQueries(OpsWrapper):
    """Keeps the position, the newest query and all keys of each step."""

    def __init__(self, ops):
        super().__init__(ops)
        self.steps = []

    def score(self, q, cache, t):
        self.steps.append((int(t), q[:, -1].clone(), cache.k.flatten(2, 3).clone()))
        return self.ops.score(q, cache, t)


def wanted_pages(t, q, k):
    """All pages in Quest's order, by its paper's bounds, for one text and KV head."""
    _, held, window = pages_to_load(BENCH, t)
    bounds = quest_bounds(q, k, t)
    return sorted(range(held), key=lambda j: (j not in window, -bounds[j]))


def test_the_pages_wanted_are_those_with_the_highest_bounds():
    """Compares with sets of pages that the queries of full attention choose. Guards against the
    worst pages instead of the best, a number of pages from another step, and a mean that leaves out
    layers."""
    retro = replace(BENCH, budget=0.4)  # 3 pages, from position 56 on 4
    model = random_model()
    tokens = random_tokens(2, 60)
    decoder = Decoder(model, 2, replace(BENCH, budget=1.0), 60)
    bench.wrap(decoder, KeepQueries)
    for _ in bench.forced(decoder, tokens, 40):
        pass
    found = []
    for layer in decoder.layers:
        for i in range(2, 19):
            for b, h in np.ndindex(2, 2):
                order = []
                for t, q, k in (layer.ops.steps[i], layer.ops.steps[i - 2]):
                    order.append(wanted_pages(t, q[b, h * 3 : h * 3 + 3], k[b, h]))
                selected = [pages_to_load(retro, 40 + j)[0] for j in (i, i - 2)]
                found.append(shares(set(order[0][: selected[0]]), order[1], selected[1]))
    args = SimpleNamespace(prefix=40, distance=2)
    overlaps = figures.page_overlaps(args, retro, model, tokens)
    assert list(overlaps) == [1, 2]
    close(overlaps[2], np.mean(found, 0), 1e-6)


def test_the_overlap_is_that_of_full_attention(monkeypatch):
    """Guards against pages that the queries of a sparse model want."""
    model = random_model()
    tokens = random_tokens(2, 60)
    seen = []
    forced = bench.forced

    def keep(*args):
        for logp in forced(*args):
            seen.append(logp)
            yield logp

    monkeypatch.setattr(bench, "forced", keep)
    figures.page_overlaps(SimpleNamespace(prefix=40, distance=2), BENCH, model, tokens)
    close(torch.stack(seen, 1), model(tokens)[:, 40:59].log_softmax(-1), 1e-5)


@pytest.fixture
def exposure(monkeypatch):
    """Runs `exposure` on a random model that writes its own text."""
    monkeypatch.setattr(bench, "load_model", lambda args: (random_model(), SimpleNamespace(bos=0)))

    def run(options):
        sizes = "--prefix 40 --length 19 --passages 2 --distance 1"
        budget = "--page_size 8 --budget 0.2 --min_tokens 16"
        args = figures.parse_args(f"exposure {sizes} {budget} {options}".split())
        return figures.exposure(args)

    return run


def test_revisions_are_those_of_the_largest_window(exposure):
    """In any order of the windows. The pages loaded are those of W=4, and its exposure comes from
    the first sights of its three past rows."""
    results = exposure("--windows 2 4 1 --dense_layers 1")
    exposures = results["effective_exposure"]
    assert list(exposures) == [1, 2, 4]
    assert exposures[1] == 1 < exposures[2] < exposures[4]
    revised = results["revised"]
    assert list(revised) == [1, 2], "the first layer is dense"
    loaded, new, mass, *_ = zip(*revised.values(), strict=True)
    counts = [pages_to_load(replace(BENCH, window=4), t)[0] for t in range(40, 59)]
    close(loaded, [np.mean(counts)] * 2, 1e-5)
    close(1 + 3 * sum(new) / sum(loaded), exposures[4], 1e-5)
    assert 0 < min(mass) <= max(mass) < 1


def test_a_window_of_one_revises_nothing(exposure):
    """Guards against means over no rows: NaN, which JSON lacks."""
    results = exposure("--windows 1 --dense_layers 0")
    assert results["revised"] == {} and results["effective_exposure"] == {1: 1}


# --------------------------------------------------------------------------------------------------
# The commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("figures")


@pytest.fixture
def saved(capsys, folder):
    """Runs quality or exposure on the shipped checkpoint, unless its output is there already.
    Returns the file of the output, and the record."""
    (folder / "book").write_text("It was a dark night, and the wind blew. " * 60)
    sizes = f"--passages 2 --prefix 150 --length 10 --windows 2 --text {folder / 'book'}"

    def run(main, command, options=""):
        path = folder / command
        if not path.exists():
            assert main([command, *sizes.split(), *options.split()]) == 0
            path.write_text(capsys.readouterr().out)
        return str(path), json.loads(path.read_text().splitlines()[-1])

    return run


def test_exposure_of_the_shipped_checkpoint(saved):
    """Tables without gaps, and numbers within their limits."""
    path, record = saved(figures.main, "exposure", "--distance 3")
    tables = Path(path).read_text()
    assert not re.search(r" -\s", tables), "a dash: a column without its value"
    assert "3 steps back" in tables and "W=2: pages loaded" in tables and "layer 9" in tables
    assert record["command"] == "exposure" and record["arguments"]["distance"] == 3
    results = record["results"]
    assert results["effective_exposure"]["1"] == 1 < results["effective_exposure"]["2"] < 2
    assert len(results["overlap"]) == 3
    assert all(0 < a + b <= 1 for a, b in results["overlap"].values())
    loaded, new, mass, output, key, value = zip(*results["revised"].values(), strict=True)
    assert len(new) == 10 and 0 < max(new) < min(loaded)
    assert 0 < max(mass) < 1 and max(output) > 0.001
    moved = max(*key[1:], *value[1:])
    assert max(key[0], value[0]) < 1e-5 < moved, "in the first sparse layer they do not move"


def test_the_picture_draws_quest_and_the_windows(saved, monkeypatch, tmp_path, capsys):
    """It has the numbers of the records, each part at its middle. Full attention has no line."""
    pytest.importorskip("matplotlib")
    quality, record = saved(bench.main, "quality", "--control")
    exposure, other = saved(figures.main, "exposure", "--distance 3")
    drawn = []
    draw = figures.draw

    def keep(*args):
        drawn.append(draw(*args))
        return drawn[0]

    monkeypatch.setattr(figures, "draw", keep)
    out = tmp_path / "x.png"
    options = ["--quality", quality, quality, "--exposure", exposure, "--out", str(out)]
    assert figures.main(["picture", *options]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["results"] == {"file": str(out)}
    assert out.read_bytes()[1:4] == b"PNG"
    *panels, last = drawn[0].axes
    assert len(panels) == 2
    ends = record["results"]["positions"]
    for axis in panels:
        assert axis.get_title() == "budget 0.15, at least 32 tokens"
        assert [line.get_label() for line in axis.lines] == ["Quest", "W=2"]
        for line, band in zip(axis.lines, axis.collections, strict=True):
            kl = record["results"]["rows"][line.get_label()]["kl"]
            assert list(line.get_ydata()) == pytest.approx(kl["by_position"])
            assert list(line.get_xdata()) == [(a + b) / 2 for a, b in itertools.pairwise(ends)]
            edge = band.get_paths()[0].vertices[:, 1].max()
            pairs = zip(kl["by_position"], kl["errors"], strict=True)
            assert edge == pytest.approx(max(x + 2 * error for x, error in pairs))
    (line,) = last.lines
    exposures = other["results"]["effective_exposure"]
    assert list(line.get_xdata()) == [1, 2]
    assert list(line.get_ydata()) == [exposures["1"], exposures["2"]]
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert legend == ["Quest", "W=2"]


def test_a_method_looks_the_same_in_all_panels():
    """Guards against colours that depend on a panel's windows, and a legend of the first panel
    alone."""
    pytest.importorskip("matplotlib")
    line = ([0.1, 0.2], [0.01, 0.01])
    first = ("", [1, 2], {"Quest": line, "W=2": line, "W=8": line})
    second = ("", [1, 2], {"Quest": line, "W=8": line, "W=16": line})
    figure = figures.draw([first, second], "x", "y", {1: 1.0, 8: 1.5})
    looks = []
    for axis in figure.axes[:2]:
        looks.append({x.get_label(): (x.get_color(), x.get_marker()) for x in axis.lines})
    assert looks[0]["W=8"] == looks[1]["W=8"] != looks[1]["W=16"]
    assert len({*looks[0].values(), *looks[1].values()}) == 4
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    assert len(figure.legends[0].get_texts()) == 4


def test_answers_draws_all_methods_of_longgen(monkeypatch, tmp_path):
    """A part is one of the 3 questions. Guards against a panel that leaves out full attention or
    the control, or a record without answers."""
    pytest.importorskip("matplotlib")
    names = ["full", "Quest", "W=8", "W=8 not looking back"]
    rows = {}
    for i, name in enumerate(names):
        rows[name] = {"right": {"by_position": [0.1 * i, 0.2, 0.3], "errors": [0.01] * 3}}
    arguments = {"n": 3, "budget": 0.15}
    record = {"command": "longgen", "arguments": arguments, "results": rows}
    path = tmp_path / "answers"
    path.write_text(json.dumps(record))
    drawn = []
    draw = figures.draw
    monkeypatch.setattr(figures, "draw", lambda *args: drawn.append(draw(*args)) or drawn[0])
    options = ["answers", "--out", str(tmp_path / "x.png"), "--answers", str(path)]
    assert figures.main(options) == 0
    (axis,) = drawn[0].axes
    assert axis.get_title() == "3 questions, budget 0.15"
    assert [line.get_label() for line in axis.lines] == names
    for i, line in enumerate(axis.lines):
        assert list(line.get_ydata()) == pytest.approx([0.1 * i, 0.2, 0.3])
        assert list(line.get_xdata()) == [1, 2, 3]
    del rows["W=8"]["right"]
    path.write_text(json.dumps(record))
    assert figures.main(options) == 2


@pytest.mark.parametrize("args, message", [
    ("nonsense", "invalid choice: 'nonsense'"), ("picture", "required: --quality, --exposure"),
    ("exposure --distance 128", "distance must be between 1 and length - 1 = 127, not 128"),
    ("exposure --distance 0", "distance: must be >= 1, not 0"),
    ("exposure --dense_layers 10", "dense_layers must be at most 9, not 10"),
    ("exposure --text LICENSE", r"LICENSE has \d+ tokens: 8 passages of 1152 need 9216"),
    ("picture --quality LICENSE --exposure x", "LICENSE: its last line is not the JSON of quality"),
    ("picture --quality nowhere --exposure LICENSE", "nowhere: No such file"),
    ("picture --quality x --exposure x --out x.txt", "out must end in .png, .svg, .pdf, not"),
    ("picture --quality x --exposure x --out no/x.png", "out no/x.png: No such file"),
])  # fmt: skip
def test_a_mistake_is_one_clear_line(capsys, monkeypatch, args, message):
    """Before anything is sampled or drawn."""
    monkeypatch.chdir(TINY.parent)
    refused_in_a_line(run_main(figures.main, args.split(), capsys), message)
    assert not Path("quality.png").exists(), "a file left behind"


def quality_record(positions=(0, 2, 4), by_position=(0.1, 0.2), errors=(0.01, 0.01), **changes):
    kl = {"by_position": by_position, "errors": errors}
    arguments = {"budget": 0.15, "min_tokens": 32}
    results = {"positions": positions, "rows": {"full": {}, "W=2": {"kl": kl}}}
    return {"command": "quality", "arguments": arguments, "results": results} | changes


BROKEN = {
    "not JSON": "[0, ",
    "no object": [],
    "another command": quality_record(command="decode"),
    "no arguments": quality_record(arguments=None),
    "no budget": quality_record(arguments={"min_tokens": 32}),
    "no results": quality_record(results={}),
    "no sparse method": quality_record(results={"positions": [0, 2], "rows": {"full": {}}}),
    "KL a number": quality_record(results={"positions": [0, 2], "rows": {"W=2": {"kl": 0.1}}}),
    "another number of parts": quality_record(positions=(0, 2, 4, 6)),
    "fewer errors": quality_record(errors=(0.01,)),
    "no numbers": quality_record(by_position=("a", None)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_incomplete_record_of_quality_is_refused(capsys, tmp_path, name):
    """With one line, and an existing picture stays."""
    record = BROKEN[name]
    text = record if isinstance(record, str) else json.dumps(record)
    (tmp_path / "quality").write_text(f"tables\n\n{text}\n")
    out = tmp_path / "x.png"
    out.write_text("old")
    options = ["--quality", str(tmp_path / "quality"), "--exposure", "x", "--out", str(out)]
    result = run_main(figures.main, ["picture", *options], capsys)
    refused_in_a_line(result, "quality: its (last line|JSON)")
    assert out.read_text() == "old"


def test_an_incomplete_record_of_exposure_is_refused(capsys, tmp_path, monkeypatch):
    """Also a record of another command. If both records are complete, only matplotlib may be
    missing."""
    (tmp_path / "quality").write_text(json.dumps(quality_record()))
    out = ["--out", str(tmp_path / "x.png")]
    exposure = str(tmp_path / "exposure")
    options = ["picture", "--quality", str(tmp_path / "quality"), *out, "--exposure"]
    result = run_main(figures.main, [*options, str(tmp_path / "quality")], capsys)
    refused_in_a_line(result, "quality: its last line is not the JSON of exposure")
    for results in ({}, {"effective_exposure": {}}, {"effective_exposure": {"1": None}}, None):
        record = {"command": "exposure", "results": results}
        Path(exposure).write_text(json.dumps(record))
        result = run_main(figures.main, [*options, exposure], capsys)
        refused_in_a_line(result, "exposure: its JSON has no effective exposure")
    record = {"command": "exposure", "results": {"effective_exposure": {"1": 1.0, "2": 1.1}}}
    Path(exposure).write_text(json.dumps(record))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run_main(figures.main, [*options, exposure], capsys)
    refused_in_a_line(result, "matplotlib is not installed: pip install matplotlib")
    monkeypatch.undo()
    if importlib.util.find_spec("matplotlib"):
        assert figures.main([*options, exposure]) == 0, "these records should be complete"


def test_a_failure_while_drawing_leaves_the_old_picture(capsys, tmp_path, monkeypatch):
    """Guards against a file that is emptied before its new content is complete."""
    pytest.importorskip("matplotlib")
    (tmp_path / "quality").write_text(json.dumps(quality_record()))
    record = {"command": "exposure", "results": {"effective_exposure": {"1": 1.0}}}
    (tmp_path / "exposure").write_text(json.dumps(record))
    out = tmp_path / "x.png"
    out.write_text("old")

    def savefig(file, format):
        file.write(b"half")
        raise ValueError("broken")

    monkeypatch.setattr(figures, "draw", lambda *args: SimpleNamespace(savefig=savefig))
    files = ["--quality", f"{tmp_path}/quality", "--exposure", f"{tmp_path}/exposure"]
    result = run_main(figures.main, ["picture", *files, "--out", str(out)], capsys)
    refused_in_a_line(result, "broken")
    assert out.read_text() == "old"
