"""What the site holds beside the pages as they are written.

A page asks for it with a comment, which nobody sees who reads the file itself:

    <!-- picture: risk -->      what a term of the loss does, see pictures.py
    <!-- flags: evaluate -->    the flags of a command of efe-train, from its parser
    <!-- recordings -->         every recording in bench/results
    <!-- goals -->              the performance section of the README
    <!-- examples -->           a list of the examples, each of which gets a page
    <!-- formulas -->           the policy losses of other libraries beside ours, as bench.formulas finds them

CONTRIBUTING.md and CHANGELOG.md are pages, too. Links between files of the repository lead to their pages.
"""

from __future__ import annotations

import argparse
import ast
import html
import posixpath
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from pictures import PICTURES

from efe_train.commands import COMMANDS, parser_of
from efe_train.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
RECORDINGS = sorted(ROOT.glob("bench/results/*.md"))

PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files of the repository outside docs/ and the pages made of them as they are."""

PLACES = PAGES | {
    "README.md": "index.md",
    "examples": "examples.md",
    "bench/results": "benchmark.md",
    **{f"examples/{path.name}": f"examples/{path.stem}.md" for path in EXAMPLES},
    **{f"bench/results/{path.name}": "benchmark.md" for path in RECORDINGS},
}
"""Where the site shows what lies elsewhere in the repository."""

MARKER = re.compile(r"^<!-- (\w+)(?:: (\w+))? -->$", re.MULTILINE)
GOALS = re.compile(r"<!-- performance: begin -->\n(.*?)<!-- performance: end -->", re.DOTALL)
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)")


def on_files(files: Files, config: Any) -> Files:
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    for path in EXAMPLES:
        files.append(File.generated(config, PLACES[f"examples/{path.name}"], content=example_page(path)))
    for path in ROOT.glob("bench/results/*.png"):
        files.append(File.generated(config, f"recordings/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    uri: str = page.file.src_uri
    makers = {
        "picture": lambda name: PICTURES[name](),
        "flags": flags,
        "recordings": lambda _: recordings(),
        "goals": lambda _: goals(uri),
        "examples": lambda _: examples(),
        "formulas": lambda _: formulas(),
    }
    origin = next((path for path, made in PLACES.items() if made == uri and path in PAGES), f"docs/{uri}")
    markdown = LINK.sub(lambda found: site_link(found[0], origin, uri), markdown)
    return MARKER.sub(lambda found: makers[found[1]](found[2]), markdown)


def site_link(link: str, origin: str, uri: str) -> str:
    """A link in the file `origin` of the repository, as it is in the page `uri` that the site makes of it."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))
    if not (ROOT / path).exists() or (origin.startswith("docs/") and path.startswith("docs/")):
        return link
    place = path.removeprefix("docs/") if path.startswith("docs/") else PLACES[path]
    return posixpath.relpath(place, posixpath.dirname(uri) or ".")


def flags(command: str) -> str:
    """A table of what a command takes."""
    kept = {each.name for each in fields(TrainConfig) if each.metadata["fixed"]} if command not in COMMANDS else set()
    lines = ["| argument | what it does |", "|---|---|"]
    for action in parser_of(command)._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        told = html.escape(action.help or "").replace("|", "\\|")
        if action.dest in kept:
            told += " †"
        lines.append(f"| {spelled(action)} | {told} |")
    if kept:
        lines += ["", "† A resumed run keeps what it began with."]
    return "\n".join(lines)


def spelled(action: argparse.Action) -> str:
    """As it is typed: `--schedule constant`, each choice on its own."""
    if not action.option_strings:
        return f"`{action.metavar}`"
    name = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction):
        return f"`{name}`"
    if action.choices:
        return f"`{name}` " + " or ".join(f"`{choice}`" for choice in action.choices)
    return f"`{name} {action.metavar or 'N'}`"


def recordings() -> str:
    """Every recording, a section each."""
    found = []
    for path in RECORDINGS:
        text = path.read_text().replace("# ", "## ", 1)
        found.append(text.replace(f"({path.stem}-sweep.png)", f"(recordings/{path.stem}-sweep.png)"))
    return "\n".join(found)


def goals(uri: str) -> str:
    """What bench.render writes into the README, for the page `uri`."""
    found = GOALS.search((ROOT / "README.md").read_text())
    if found is None:
        raise ValueError("README.md must hold the lines between which bench.render writes.")
    return LINK.sub(lambda link: site_link(link[0], "README.md", uri), found[1])


def examples() -> str:
    lines = [f"- [{path.name}](examples/{path.stem}.md): {docstring(path).splitlines()[0]}" for path in EXAMPLES]
    return "\n".join(lines)


def formulas() -> str:
    """In a process of its own: bench is no part of what is installed."""
    command = [sys.executable, "-m", "bench.formulas"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def example_page(path: Path) -> str:
    """The docstring as text and the rest as code."""
    code = path.read_text().split('"""', 2)[2].lstrip()
    return f"# {path.name}\n\n{docstring(path)}\n\n```python\n{code}```\n"


def docstring(path: Path) -> str:
    found = ast.get_docstring(ast.parse(path.read_text()))
    if not found:
        raise ValueError(f"{path} must begin with a docstring: it is what the site says about it.")
    return found
