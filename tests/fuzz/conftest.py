"""How many calls of each function were made, at the end of the run; those of all processes together."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for key, value in getattr(report, "user_properties", []):
                if key == "fuzz":
                    name, found = value
                    counts[name].update(found)
    if counts:
        terminalreporter.section("calls drawn")
        for name, found in sorted(counts.items()):
            told = ", ".join(f"{found[what]} {what}" for what in ("calls", "in contract", "refused"))
            terminalreporter.write_line(f"{name}: {told}")
