"""What the files around the code say agrees with pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import efe_kernels

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def project(field: str) -> str:
    found = re.search(rf'^{field} = "(.*)"$', PROJECT, re.MULTILINE)
    assert found is not None
    return found[1]


def pinned(package: str) -> str:
    """The requirement of the extra `dev`."""
    found = re.search(rf'"({package}==[\d.]+)"', PROJECT)
    assert found is not None
    return found[1]


def test_the_citation_is_of_this_version() -> None:
    citation = read("CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["title"] == project("name") and citation["version"] == efe_kernels.__version__
    assert citation["message"] and all(author["name"] for author in citation["authors"])


def test_the_changelog_knows_this_version() -> None:
    assert efe_kernels.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_commits_are_checked_by_the_tools_of_make_lint() -> None:
    hooks = {hook["id"]: hook for hook in read(".pre-commit-config.yaml")["repos"][0]["hooks"]}
    for name in ("ruff-check", "ruff-format"):
        assert hooks[name]["additional_dependencies"] == [pinned("ruff")]
    # mypy is the one of the environment, which `make` installs.
    assert hooks["mypy"]["language"] == "system" and pinned("mypy")


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_an_issue_form_is_one_that_github_shows(form: Path) -> None:
    """A form without these is left out of the list, without a word."""
    found = read(str(form.relative_to(ROOT)))
    if form.stem == "config":
        assert found["blank_issues_enabled"] is True
        return
    assert found["name"] and found["description"]
    names = [field["id"] for field in found["body"]]
    assert len(set(names)) == len(names)
    for field in found["body"]:
        assert field["type"] in ("textarea", "input", "dropdown", "checkboxes") and field["attributes"]["label"]
