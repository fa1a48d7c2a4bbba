"""The page on troubleshooting quotes what the library says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Quotations and lines of prose run on over the end of a line.
PAGE = re.sub(r"\s*\n>?\s*", " ", (ROOT / "docs" / "troubleshooting.md").read_text())
FOLDERS = ("efe_kernels", "python/efe_train")
SOURCES = [ROOT / "setup.py", *(file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py")))]
# A sentence is written as several strings, one a line.
SAID = re.sub(r'"\s*\n\s*f?"', "", "\n".join(file.read_text() for file in SOURCES))


@pytest.mark.parametrize(
    "quoted",
    [
        "the C++ extension was not built",
        "does not load with torch",
        "Triton is not installed",
        "built without its CUDA sources",
        "cannot be imported here",
        "has no second derivative; call backward without create_graph=True",
        "which an optimizer or a DistributedDataParallel made before does not know and so never trains",
        "Qwen_grad was 0 over",
    ],
)
def test_a_message_is_quoted_as_it_is(quoted: str) -> None:
    assert quoted in PAGE and quoted in SAID
