"""README.md, CONTRIBUTING.md and docs/: snippets run, links lead somewhere, command lines are taken."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

from bench.session import Plan
from elman import cli

ROOT = Path(__file__).parents[1]
README, GUIDE = ROOT / "README.md", ROOT / "docs" / "guide.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
INDENTED = re.compile(r"^(?: {4}.*\n)+", re.M)
MAKE = re.compile(r"""\bmake ([a-z-]+)(?: ARGS=(?:"([^"]*)"|(\S+)))?""")


def page_id(page):
    return page.relative_to(ROOT).as_posix()


every_page = pytest.mark.parametrize("page", PAGES, ids=page_id)


def read(page):
    return page.read_text(encoding="utf-8")


def snippets(page):
    """(line in the page, code) of every block of Python."""
    text = read(page)
    found = FENCED.finditer(text)
    return [(text.count("\n", 0, m.start(2)) + 1, m[2]) for m in found if m[1] == "python"]


def code(page):
    """Every line of code: of fenced and indented blocks, and what stands between backticks."""
    rest = FENCED.sub("", read(page))
    blocks = [m[2] for m in FENCED.finditer(read(page))] + INDENTED.findall(rest)
    blocks += re.findall(r"`([^`\n]+)`", INDENTED.sub("", rest))
    return [line for block in blocks for line in block.splitlines()]


def arguments(page, command):
    """What follows `command` on each line of code that has it, split as a shell does."""
    found = [shlex.split(line.split(command, 1)[1], comments=True) for line in code(page) if command in line]
    assert len(found) == read(page).count(command)  # none is where it is not read
    return found


def make_commands(page):
    """(target, options) of each `make` on a line of code; H of a shell's loop is 64."""
    found = [m for line in code(page) for m in MAKE.finditer(line)]
    assert sum(m[0].count(" ARGS=") for m in found) == len(re.findall(r"make [a-z-]+ ARGS=", read(page)))
    return [(m[1], shlex.split((m[2] or m[3] or "").replace("$H", "64"))) for m in found]


def anchors(page):
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", read(page)), re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@every_page
def test_snippets(page, monkeypatch):
    """In order, in one namespace, as a reader would type them."""
    monkeypatch.delenv("ELMAN_BACKEND", raising=False)
    names = {m[1] for m in FENCED.finditer(read(page))}
    assert names <= {"python", "sh"}  # no other name for Python
    assert names == {"python", "sh"} or page != GUIDE
    assert names >= {"python"} or page != README
    assert len(snippets(page)) == read(page).count("```python")
    namespace = {"__name__": "guide"}
    for line, text in snippets(page):
        try:
            # Moved down to its place, so that tracebacks have the page's lines.
            exec(compile("\n" * (line - 1) + text, str(page), "exec"), namespace)
        except Exception as failure:
            raise AssertionError(f"{page_id(page)}: the block at line {line} failed") from failure


@every_page
def test_links(page):
    links = re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", read(page)))
    assert links or page not in (README, GUIDE)
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        there = target.is_dir() if path.endswith("/") else target.is_file()
        assert there, f"{page_id(page)} links to {link}, which is not there"
        assert target.is_relative_to(ROOT), f"{page_id(page)} links to {link}, outside of the repository"
        if anchor:
            assert anchor in anchors(target), f"{page_id(page)} links to {link}, which has no such heading"


@every_page
def test_command_lines_of_the_language_model(page):
    charlm = importlib.import_module("bench.charlm")
    found = arguments(page, "-m bench.charlm")
    assert found or page != GUIDE
    for options in found:
        charlm.parser().parse_args(options)  # of a wrong option it says so and exits


@every_page
def test_command_lines_of_elman(page, capsys, monkeypatch):
    monkeypatch.setattr(cli, "tune", lambda options: print(options) or 0)  # on a GPU it would take an hour
    commands = arguments(page, "python -m elman ")
    assert {options[0] for options in commands} == {"doctor", "explain"} or page != GUIDE
    for options in commands:
        assert cli.main(options) == 0
        assert capsys.readouterr().out


@every_page
def test_command_lines_of_swapped(page):
    swapped = importlib.import_module("tests.swapped")
    for options in arguments(page, "-m tests.swapped"):
        swapped.parser().parse_args(options)


class BenchOptions(argparse.ArgumentParser):
    """bench/conftest.py's options, without pytest."""

    def __init__(self):
        super().__init__("make bench")
        importlib.import_module("bench.conftest").pytest_addoption(self)

    def getgroup(self, *names):
        return self

    addoption = argparse.ArgumentParser.add_argument


@every_page
def test_command_lines_of_make(page):
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.M))
    charlm, gpu = (importlib.import_module(f"bench.{name}") for name in ("charlm", "gpu.__main__"))
    for target, options in make_commands(page):
        assert target in targets, f"{page_id(page)}: make {target} is no target of the Makefile"
        if target == "bench":
            found = BenchOptions().parse_args(options)
            Plan.make(found.sweep, found.shapes, "cpu", found.dtype, found.passes, found.backends)
        elif target == "gpu":
            gpu.options_of(options or ["--device", "cpu"])  # without it a GPU is asked for
        elif target == "charlm":
            charlm.parser().parse_args(options)
        else:
            assert not options, f"{page_id(page)}: nothing here reads the options of make {target}"


def test_the_readme_is_short_and_begins_with_what_was_measured():
    text = read(README)
    assert len(text.split()) <= 600
    assert text.count("![") == 1
    assert re.findall(r"^## (.*)$", text, re.M)[0] == "Status"
    assert {"test", "bench"} <= {target for target, _ in make_commands(README)}
    for page in PAGES:
        if page.parent == GUIDE.parent:
            assert f"]({page_id(page)})" in text, f"README.md does not link to {page_id(page)}"


def test_nothing_is_called_the_fastest_before_a_gpu_s_table_shows_it():
    if "No GPU has been measured yet." not in read(ROOT / "results" / "README.md"):
        pytest.skip("there is a GPU's table")
    for path in [*PAGES, ROOT / "pyproject.toml", *(ROOT / "elman").glob("*.py")]:
        assert "fastest" not in read(path).lower(), page_id(path)
