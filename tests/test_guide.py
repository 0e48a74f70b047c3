"""docs/guide.md: its snippets run, its links lead somewhere, its command lines are taken."""

import importlib
import re
import shlex
from pathlib import Path

from elman import cli

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "guide.md"
PAGE = GUIDE.read_text(encoding="utf-8")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def snippets():
    """(line in the page, code) of every block of Python."""
    found = FENCED.finditer(PAGE)
    return [(PAGE.count("\n", 0, m.start(2)) + 1, m[2]) for m in found if m[1] == "python"]


def arguments(command):
    """What follows `command` on each line of code that has it, split as a shell does."""
    code = [m[2] for m in FENCED.finditer(PAGE)] + re.findall(r"`([^`\n]+)`", FENCED.sub("", PAGE))
    lines = [line for block in code for line in block.splitlines()]
    found = [shlex.split(line.split(command, 1)[1], comments=True) for line in lines if command in line]
    assert len(found) == PAGE.count(command) > 0  # none is where it is not read
    return found


def anchors(page):
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_snippets(monkeypatch):
    """In order, in one namespace, as a reader would type them."""
    monkeypatch.delenv("ELMAN_BACKEND", raising=False)
    assert {m[1] for m in FENCED.finditer(PAGE)} == {"python", "sh"}  # no other name for Python
    assert len(snippets()) == PAGE.count("```python") > 0
    namespace = {"__name__": "guide"}
    for line, code in snippets():
        try:
            # Moved down to its place, so that tracebacks have the page's lines.
            exec(compile("\n" * (line - 1) + code, str(GUIDE), "exec"), namespace)
        except Exception as failure:
            raise AssertionError(f"docs/guide.md: the block at line {line} failed") from failure


def test_links():
    links = re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", PAGE))
    assert links
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        page = (GUIDE.parent / path).resolve() if path else GUIDE
        assert page.is_file(), f"docs/guide.md links to {link}, which is not there"
        assert page.is_relative_to(ROOT), f"docs/guide.md links to {link}, outside of the repository"
        if anchor:
            assert anchor in anchors(page), f"docs/guide.md links to {link}, which has no such heading"


def test_command_lines_of_the_language_model():
    charlm = importlib.import_module("bench.charlm")
    for options in arguments("-m bench.charlm"):
        charlm.parser().parse_args(options)  # of a wrong option it says so and exits


def test_command_lines_of_elman(capsys):
    commands = arguments("python -m elman ")
    assert {options[0] for options in commands} == {"doctor", "explain"}
    for options in commands:
        assert cli.main(options) == 0
        assert capsys.readouterr().out
