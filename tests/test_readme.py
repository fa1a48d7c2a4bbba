"""What the README shows runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.splitlines()[1])
def test_a_snippet_runs(snippet: str) -> None:
    exec(compile(snippet, README.name, "exec"), {})


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 2
