"""Checks the Markdown files against the code."""

import re
import shlex
from importlib import import_module
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path

import pytest

import retro_attention
from model import Decoder, Llama
from retro_attention import RetroAttention

ROOT = Path(__file__).parent.parent
NAMES = "README.md docs/measured.md docs/own_model.md extras/README.md tiny/README.md".split()
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
# In the examples, `model` is a Llama.
OWNERS = {x.__name__: x for x in (RetroAttention, Decoder, Llama)} | {"model": Llama}


def blocks(page, language):
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", PAGES[page])


def commands():
    """(module, arguments) of each command; under extras.parallel, of the script."""
    lines = "".join("".join(blocks(page, "bash")) for page in PAGES).replace("\\\n", " ")
    for part in re.split("&&|\n", lines):
        words = list(takewhile(lambda x: x not in (">", "|"), shlex.split(part, comments=True)))
        for i, word in enumerate(words):
            if re.match(r"(sample|bench|tiny/train)\.py$|extras\.(?!parallel)", word):
                yield word.removesuffix(".py").replace("/", "."), words[i + 1 :]


@pytest.mark.parametrize("module, args", list(commands()), ids=str)
def test_commands_parse(module, args, capsys):
    """Guards against an option that was renamed in the code only."""
    try:
        import_module(module).parse_args(args)
    except SystemExit:
        pytest.fail(capsys.readouterr().err)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    # (path#anchor) of links inside the repository
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", PAGES[page]):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"(?m)^#+ (.*)", target.read_text(encoding="utf-8"))
            # GitHub's anchors
            assert anchor in [re.sub(r"[^\w -]", "", x).lower().replace(" ", "-") for x in headings]


@pytest.mark.parametrize("page", PAGES)
def test_names_exist(page):
    """Guards against a definition or test that was renamed in the code only."""
    tests = [*ROOT.glob("test_*.py"), *ROOT.glob("extras/test_*.py")]
    source = "".join(path.read_text(encoding="utf-8") for path in tests)
    for name in re.findall(r"`(test_\w+)`", PAGES[page]):
        assert f"def {name}(" in source, name
    for name in re.findall(r"\*\*`(\w+)`\*\*", PAGES[page]):  # the steps of the method
        assert hasattr(retro_attention, name), name
    for owner, name in re.findall(r"\b(\w+)\.(?!py\b)(\w+)", PAGES[page]):  # e.g. Decoder.step
        if owner in OWNERS:
            assert hasattr(OWNERS[owner], name), name
        elif (ROOT / f"{owner}.py").exists():
            assert hasattr(import_module(owner), name), name


def test_the_python_of_own_model_runs(monkeypatch):
    """It asserts that a full budget equals dense attention, also in transformers' Llama."""
    monkeypatch.chdir(ROOT)
    for block in blocks("docs/own_model.md", "python"):
        if "transformers" not in block or find_spec("transformers"):
            exec(block, {})
