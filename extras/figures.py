"""What neighbouring queries want (paper, figures 2b and 2c), and the pictures of the README:

    python -m extras.figures exposure --text book.txt > exposure.txt
    python bench.py quality --text book.txt > quality.txt
    python -m extras.figures picture --quality quality.txt --exposure exposure.txt
    python -m extras.figures answers --answers longgen-15.txt longgen-30.txt

`exposure` prints tables, and all numbers as JSON in the last line, as bench.py does; `picture` and
`answers` draw from such saved outputs, and need matplotlib.

A page's rank at a step is its place, from 0, in the order in which Quest would take the pages.
Shapes as in bench.py.
"""

import argparse
import importlib.util
import io
import itertools
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.functional import pad

import bench
import sample
from extras import check_writable
from extras.viewer import Step, revisions, watch
from model import Decoder, Llama
from retro_attention import RetroConfig, need, with_window_first

# --------------------------------------------------------------------------------------------------
# exposure


def decode(decoder: Decoder, idx: torch.Tensor, prefix: int) -> None:
    """Feeds the passages idx (B, T) to the decoder."""
    for _ in bench.forced(decoder, idx, prefix):
        pass


def overlap(ranks: list[torch.Tensor], selected: list[int], distance: int) -> list[float]:
    """The shares of a step's pages that the step `distance` before had in its top-k and in its next
    k; means over the steps. A page begun since then is in neither.

    For each step, `ranks` has (B, n_kv_head, pages held), and `selected` has k.
    """
    shares = []
    for i in range(distance, len(ranks)):
        now = ranks[i] < selected[i]  # (B, n_kv_head, pages held)
        k = selected[i - distance]
        begun = now.shape[2] - ranks[i - distance].shape[2]
        past = pad(ranks[i - distance], (0, begun), value=2 * k)  # (B, n_kv_head, pages held)
        top = (now & (past < k)).sum()
        beyond = (now & (past >= k) & (past < 2 * k)).sum()
        shares.append(torch.stack((top, beyond)) / now.sum())
    return torch.stack(shares).mean(dim=0).tolist()


def page_overlaps(
    args: argparse.Namespace, retro: RetroConfig, model: Llama, idx: torch.Tensor
) -> dict[int, list[float]]:
    """Distance -> overlap with the past query's top-k and next k, for full attention; a mean over
    the sparse layers (paper, figure 2b)."""
    ranks = {}  # sparse layer -> the ranks of each step

    def look(i: int, step: Step) -> None:
        scores = with_window_first(step.scores, retro, step.t)  # (B, n_kv_head, pages held)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        ranks.setdefault(i, []).append(order.argsort(dim=-1))

    # With a budget of 1, a step loads all pages: this is full attention, with scores.
    decoder = Decoder(model, len(idx), replace(retro, budget=1.0), idx.shape[1])
    watch(decoder, look)
    decode(decoder, idx, args.prefix)
    selected = [retro.pages_selected(t) for t in range(args.prefix, idx.shape[1] - 1)]
    overlaps = {}
    for distance in range(1, args.distance + 1):
        by_layer = [overlap(layer, selected, distance) for layer in ranks.values()]
        overlaps[distance] = torch.tensor(by_layer).mean(dim=0).tolist()
    return overlaps


def revised(
    args: argparse.Namespace, retro: RetroConfig, model: Llama, idx: torch.Tensor
) -> dict[int, list[float]]:
    """Sparse layer -> pages loaded, and what a step changes of a past row (the five numbers of
    `viewer.revisions`); means over steps, KV heads and rows."""
    seen = {}

    def look(i: int, step: Step) -> None:
        means = revisions(step, retro.page_size).mean(dim=(1, 2, 3))  # (5,)
        seen.setdefault(i, []).append([step.pages.shape[2], *means.tolist()])

    decoder = Decoder(model, len(idx), retro, idx.shape[1])
    watch(decoder, look)
    decode(decoder, idx, args.prefix)
    return {i: torch.tensor(steps).mean(dim=0).tolist() for i, steps in seen.items()}


def show_overlaps(overlaps: dict[int, list[float]]) -> None:
    rows = {}
    for d, (top, beyond) in overlaps.items():
        rows[f"{d} steps back"] = {"top-k": top, "next-k": beyond, "both": top + beyond}
    title = "Pages selected now that a past query had in its top-k or next-k (full attention)"
    bench.table(title, rows, dict.fromkeys(("top-k", "next-k", "both"), ".1%"))


def show_revisions(w: int, changes: dict[int, list[float]]) -> None:
    forms = {"loaded": ".1f", "new": ".2f"}
    forms |= dict.fromkeys(("mass", "output", "K", "V"), ".2%")
    rows = {f"layer {i}": dict(zip(forms, x, strict=True)) for i, x in changes.items()}
    title = f"""W={w}: pages loaded by a step, pages new to a past row, their softmax mass,
how far the row's output, K and V move in the step"""
    bench.table(title, rows, forms)


def exposure(args: argparse.Namespace) -> dict:
    """Which pages neighbouring queries want, how many pages a query sees in the end, and what a
    step revises."""
    most = args.length - 1
    fits = args.distance <= most
    need(fits, f"distance must be between 1 and length - 1 = {most}, not {args.distance}")
    retro = sample.retro_config(args, window=1)
    model, tok = bench.load_model(args)
    layers = model.config.n_layer
    message = f"dense_layers must be at most {layers - 1}, not {retro.dense_layers}"
    need(retro.dense_layers < layers, f"{message}: no layer would select pages")
    idx = bench.passages(args, model, tok)
    bench.progress("overlap of the pages that full attention wants")
    overlaps = page_overlaps(args, retro, model, idx)
    exposures = {}  # paper, figure 2c
    for w in sorted({1, *args.windows}):
        bench.progress(f"exposure: W={w}")
        decoder = bench.counting(model, len(idx), replace(retro, window=w), idx.shape[1])
        decode(decoder, idx, args.prefix)
        exposures[w] = bench.exposure(decoder)
    w = max(args.windows)
    changes = {}
    if w > 1:
        bench.progress(f"what a step revises: W={w}")
        changes = revised(args, replace(retro, window=w), model, idx)
    show_overlaps(overlaps)
    rows = {f"W={w}": {"exposure": x} for w, x in exposures.items()}
    title = "Effective exposure: pages seen by a query in the end / pages selected for it"
    bench.table(title, rows, {"exposure": ".3f"})
    if changes:
        show_revisions(w, changes)
    return {"overlap": overlaps, "effective_exposure": exposures, "revised": changes}


# --------------------------------------------------------------------------------------------------
# picture


def read_record(path: str, command: str) -> dict:
    """The JSON in the last line of a saved output of `command`. Raises ValueError if it is not
    there."""
    line = sample.read_text(path, path).rstrip().split("\n")[-1]
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    fits = isinstance(record, dict) and record.get("command") == command
    need(fits, f"{path}: its last line is not the JSON of {command}")
    return record


def read_panel(path: str, command: str) -> tuple[str, list[float], dict[str, tuple]]:
    """A saved output of quality, or of longgen: a title, the middles of the text's parts, and for
    each method that is drawn, its means by part and their standard errors. They are the KL of
    Quest and each window, or the share of right answers. Raises ValueError if the file lacks any
    of it."""
    record = read_record(path, command)
    lines = {}
    try:
        arguments, results = record["arguments"], record["results"]
        if command == "quality":
            title = "budget {budget:g}, at least {min_tokens} tokens".format(**arguments)
            ends, key = results["positions"], "kl"
            drawn = re.compile(r"Quest|W=\d+")  # not full attention, not the control
            rows = {name: x for name, x in results["rows"].items() if drawn.fullmatch(name)}
        else:
            title = "{n} questions, budget {budget:g}".format(**arguments)
            ends = [x + 0.5 for x in bench.part_ends(arguments["n"])]  # question 1 is at 1
            rows, key = results, "right"
        middles = [(a + b) / 2 for a, b in itertools.pairwise(ends)]
        for name, row in rows.items():
            mean = [float(x) for x in row[key]["by_position"]]
            error = [float(x) for x in row[key]["errors"]]
            lines[name] = (mean, error)
        complete = all(len(x) == len(middles) for line in lines.values() for x in line)
    except (KeyError, TypeError, ValueError, AttributeError):
        complete = False
    need(lines and complete, f"{path}: its JSON lacks the methods' values by position")
    return title, middles, lines


def read_exposure(path: str) -> dict[int, float]:
    """Window -> effective exposure. Raises ValueError if the file lacks it."""
    record = read_record(path, "exposure")
    try:
        exposures = record["results"]["effective_exposure"].items()
        found = {int(w): float(x) for w, x in exposures}
    except (KeyError, TypeError, ValueError, AttributeError):
        found = {}
    need(found, f"{path}: its JSON has no effective exposure")
    return found


def check_out(path: str) -> None:
    """Raises ValueError unless the picture can be written. An existing file keeps its content."""
    suffixes = (".png", ".svg", ".pdf")
    need(path.endswith(suffixes), f"out must end in {', '.join(suffixes)}, not {path!r}")
    check_writable("out", path)


def draw_panel(axis, title: str, middles: list[float], lines: dict, styles: dict) -> dict:
    """Draws each method's means with a band of two standard errors. Returns name -> line."""
    axis.set_title(title)
    handles = {}
    for name, (mean, error) in lines.items():
        colour, marker = styles[name]
        handles[name] = axis.plot(middles, mean, marker=marker, color=colour, label=name)[0]
        low = [x - 2 * e for x, e in zip(mean, error, strict=True)]
        high = [x + 2 * e for x, e in zip(mean, error, strict=True)]
        axis.fill_between(middles, low, high, color=colour, alpha=0.1, linewidth=0)
    return handles


def draw_exposure(axis, exposures: dict[int, float]) -> None:
    windows = list(exposures)
    axis.plot(windows, list(exposures.values()), marker="o")
    for w, x in exposures.items():
        place = {"xytext": (-4, 6), "textcoords": "offset points", "ha": "right"}
        axis.annotate(f"{x:.2f}", (w, x), **place)
    axis.margins(x=0.2, y=0.15)
    axis.set(xlabel="window W (1 is Quest)", title="pages seen / pages selected", xticks=windows)


def draw(panels: list[tuple], xlabel: str, ylabel: str, exposures: dict | None = None):
    """The figure: a panel for each file, all on one scale, and one for the exposure, if given."""
    from matplotlib import style
    from matplotlib.figure import Figure

    plain = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    style.use(["seaborn-v0_8-colorblind", plain])
    n = len(panels) + (exposures is not None)
    figure = Figure(figsize=(3.8 * n, 3.8), layout="constrained", dpi=150)
    axes = figure.subplots(1, n, squeeze=False)[0]
    scaled = axes[: len(panels)]
    # A method looks the same in all panels.
    names = list(dict.fromkeys(name for _, _, lines in panels for name in lines))
    markers = itertools.cycle("osD^vPX")
    styles = {name: (f"C{i}", next(markers)) for i, name in enumerate(names)}
    handles = {}
    for axis, panel in zip(scaled, panels, strict=True):
        handles |= draw_panel(axis, *panel, styles)
    top = max(axis.get_ylim()[1] for axis in scaled)
    for axis in scaled:
        axis.set(xlabel=xlabel, ylim=(0, top))
        axis.locator_params(axis="x", integer=True)
    axes[0].set_ylabel(ylabel)
    if exposures is not None:
        draw_exposure(axes[-1], exposures)
    options = {"frameon": False, "loc": "outside lower center", "ncols": 8}
    figure.legend([handles[name] for name in names], names, **options)
    return figure


def save(path: str, *drawn) -> dict:
    """Draws, and writes the figure. A failure leaves an existing file as it is."""
    installed = importlib.util.find_spec("matplotlib")
    need(installed, "matplotlib is not installed: pip install matplotlib")
    image = io.BytesIO()
    draw(*drawn).savefig(image, format=Path(path).suffix[1:])
    Path(path).write_bytes(image.getvalue())
    print(f"{path} written")
    return {"file": path}


def picture(args: argparse.Namespace) -> dict:
    """Draws a panel per saved output of quality, and one of exposure (needs matplotlib)."""
    check_out(args.out)
    panels = [read_panel(path, "quality") for path in args.quality]
    exposures = read_exposure(args.exposure)
    ylabel = "KL to full attention, nats per token"
    return save(args.out, panels, "tokens decoded", ylabel, exposures)


def answers(args: argparse.Namespace) -> dict:
    """Draws a panel per saved output of extras.longgen (needs matplotlib)."""
    check_out(args.out)
    panels = [read_panel(path, "longgen") for path in args.answers]
    return save(args.out, panels, "question", "share of right answers")


# --------------------------------------------------------------------------------------------------
# The command line


def exposure_options(add: Callable) -> None:
    bench.text_options(add, passages=8, least=1, length=128)
    add("--distance", type=bench.at_least(1), default=8, help="steps to look back")


def picture_options(add: Callable) -> None:
    help = "saved outputs of bench.py quality, one panel each"
    add("--quality", required=True, nargs="+", metavar="FILE", help=help)
    add("--exposure", required=True, metavar="FILE", help="saved output of exposure")
    add("--out", default="quality.png", help="file to write, .png, .svg or .pdf")


def answers_options(add: Callable) -> None:
    help = "saved outputs of extras.longgen, one panel each"
    add("--answers", required=True, nargs="+", metavar="FILE", help=help)
    add("--out", default="answers.png", help="file to write, .png, .svg or .pdf")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = sample.Parser(prog="extras.figures", description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(dest="command", required=True)
    bench.add_command(commands, exposure, exposure_options)
    bench.add_command(commands, picture, picture_options, device="cpu")
    bench.add_command(commands, answers, answers_options, device="cpu")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return sample.exit_code("extras.figures", lambda: bench.measure(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
