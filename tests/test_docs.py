"""What README and documentation show is so: code runs as it stands, commands parse, names and files exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import efe_kernels
from efe_train.commands import COMMANDS, parse, parser_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: str, *languages: str) -> Iterator[tuple[int, str]]:
    """The code of a page in these languages, each with the number of its first line."""
    for found in FENCE.finditer(PAGES[page]):
        if found[1] in languages:
            yield PAGES[page].count("\n", 0, found.start(2)), found[2]


def with_blocks(*languages: str) -> list[str]:
    return [page for page in PAGES if any(True for _ in blocks(page, *languages))]


def commands(page: str) -> Iterator[list[str]]:
    """The shell commands of a page, as words."""
    for _, code in blocks(page, "sh", "bash", "console", ""):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words:
                yield words


@pytest.mark.parametrize("page", with_blocks("python"))
def test_code_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page one after the other, as a reader would try them."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for line, code in blocks(page, "python"):
        exec(compile("\n" * line + code, page, "exec"), namespace)


@pytest.mark.parametrize("page", with_blocks("sh", "bash", "console", ""))
def test_commands_are_understood(page: str) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in commands(page):
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= set(targets)
            words = [part for word in words if word.startswith("TRAIN_ARGS=") for part in shlex.split(word[11:])]
            parse(words)
        elif words[0] == "efe-train":
            parse(words[1:])
        elif "-m" in words and words[0] in ("python", "torchrun", "accelerate"):
            module, *arguments = words[words.index("-m") + 1 :]
            if module == "efe_train":
                parse(arguments)
            else:
                assert importlib.util.find_spec(module) is not None, module


@pytest.mark.parametrize("page", ["start", "training", "run-folder", "agent"])
def test_flags_exist(page: str) -> None:
    known = {name for command in ["train", *COMMANDS] for name in parser_of(command)._option_string_actions}
    prose = FENCE.sub("", PAGES[f"docs/{page}.md"])
    assert set(re.findall(r"`(?:efe-train [^`]*)?(--\w+)", prose)) <= known


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """On the site mkdocs looks after that; read as a file, a page links to files."""
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", FENCE.sub("", PAGES[page]))
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_every_public_name_is_in_the_reference() -> None:
    shown = re.findall(r"^::: [\w.]+\.(\w+)$", PAGES["docs/reference.md"], re.MULTILINE)
    assert set(efe_kernels.__all__) <= set(shown)


def pictures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "hooks" / "pictures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_show_that_each_term_falls() -> None:
    """As the captions say: the value before and after steps on that term alone."""
    drawn = pictures().PICTURES
    for term in ("risk", "ambiguity", "consistency", "agreement", "anchor", "prompt"):
        before, after = re.findall(r"(-?\d+\.\d+) → (-?\d+\.\d+)", drawn[term]())[0]
        assert float(after) < float(before) - 0.05, term


def test_pictures_are_those_that_the_page_asks_for() -> None:
    asked = re.findall(r"^<!-- picture: (\w+) -->$", PAGES["docs/loss.md"], re.MULTILINE)
    assert set(asked) == set(pictures().PICTURES)
