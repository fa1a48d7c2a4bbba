"""Tables, plots, a comparison of two recordings, and the performance section of the README, all from recorded JSON.

python -m bench.render RECORD.json               tables
python -m bench.render RECORD.json --plots DIR   and time against B with the roofline drawn in
python -m bench.render OLD.json --compare NEW.json
python -m bench.render RECORD.json ... --readme README.md
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"
Entry = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """How many times faster than an opponent the kernel must be on a case, as op, terms, workload and pass name it."""

    op: str
    terms: str
    workload: str
    which: str
    opponent: str
    factor: float


TARGETS = (
    Target("efe_loss", "all", "train", "both", "compile", 3),
    Target("efe_loss", "all", "train", "both", "eager", 10),
    Target("efe_loss", "core", "train", "both", "compile", 3),
    Target("efe_loss", "core", "train", "both", "eager", 10),
    Target("gae", "", "throughput", "forward", "torchrl", 10),
    Target("gae", "", "throughput", "forward", "compile", 3),
    Target("policy_gradient_loss", "", "throughput", "both", "eager", 3),
    Target("refine_prompt", "", "update", "both", "eager", 3),
    Target("squashed_log_prob", "", "update", "both", "eager", 3),
    Target("masked_mean_pool", "", "train", "both", "sum over mask", 2),
    Target("arc_efe", "", "seed", "both", "loop over cells", 10),
)


class Record:
    """A recording: where it was made, its entries, and the training runs beside them."""

    def __init__(self, path: Path) -> None:
        found = json.loads(path.read_text())
        self.name = path.stem
        self.date = found["datetime"][:10]
        self.machine: dict[str, Any] = found["machine_info"]
        self.entries: list[Entry] = [entry["extra_info"] for entry in found["benchmarks"] if entry["extra_info"]]
        self.training: list[dict[str, Any]] = found.get("training", [])

    def cases(self) -> dict[tuple[Any, ...], dict[str, Entry]]:
        """Entries by implementation, for each case and pass in the order of the recording."""
        found: dict[tuple[Any, ...], dict[str, Entry]] = defaultdict(dict)
        for entry in self.entries:
            found[key_of(entry)][entry["implementation"]] = entry
        return found

    def about(self) -> str:
        machine = self.machine
        where = machine["cpu"] + f", {machine['threads']} threads"
        if machine["device"] == "cuda":
            where = f"{machine['gpu']} (driver {machine['driver']}, CUDA {machine['cuda']})"
        packages = ("torch", "triton", "liger-kernel", "torchrl")
        versions = ", ".join(f"{name} {machine[name]}" for name in packages if machine.get(name))
        load = f"load {machine['load']} before the run, {machine.get('load_after', 'unknown')} at its end"
        return (
            f"{where}; {self.date}; commit {machine['commit'] or 'unknown'}; {versions}; a copy moves "
            f"{machine['copy_gb_per_s']:.0f} GB/s; {load}"
        )


def key_of(entry: Entry) -> tuple[Any, ...]:
    return tuple(str(entry[name]) for name in ("op", "terms", "workload", "sizes", "dtype", "layout", "which"))


def title_of(entry: Entry) -> str:
    names = [
        entry["op"],
        entry["terms"],
        entry["workload"],
        "x".join(map(str, entry["sizes"])),
        entry["dtype"],
        entry["layout"],
    ]
    return " ".join(name for name in names if name)


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def columns(rows: Sequence[Sequence[str]], markdown: bool) -> str:
    if markdown:
        lines = [" | ".join(row) for row in rows]
        return "\n".join(f"| {line} |" for line in [lines[0], " | ".join("---" for _ in rows[0]), *lines[1:]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def opponents_of(cases: Iterable[dict[str, Entry]]) -> list[str]:
    found: dict[str, None] = {}
    for entries in cases:
        found |= dict.fromkeys(name for name in entries if name != "kernel")
    return list(found)


def case_table(
    record: Record, markdown: bool = False, passes: tuple[str, ...] = ("forward", "backward", "both")
) -> str:
    """Median time of the kernel and how many times longer the others take; below 1 they are faster."""
    cases = {key: entries for key, entries in record.cases().items() if "kernel" in entries and key[-1] in passes}
    opponents = opponents_of(cases.values())
    rows = [["case", "pass", "kernel", "20-80 %", "host", "graph", "GB/s", "of copy", "peak MB", *opponents]]
    for entries in cases.values():
        kernel = entries["kernel"]
        ratios = []
        for name in opponents:
            ratios.append(f"{entries[name]['seconds'] / kernel['seconds']:.2f}x" if name in entries else "")
        peak = kernel["peak_bytes"]
        rows.append([
            title_of(kernel), kernel["which"], duration(kernel["seconds"]),
            f"{duration(kernel['low'])} - {duration(kernel['high'])}", duration(kernel["host_seconds"]),
            duration(kernel["graph_seconds"]), f"{kernel['gb_per_s']:.1f}", f"{kernel['copy_share']:.0%}",
            "" if peak is None else f"{peak / 1e6:.1f}", *ratios,
        ])  # fmt: skip
    empty = [i for i in range(len(rows[0])) if all(not row[i] for row in rows[1:])]
    return columns([[cell for i, cell in enumerate(row) if i not in empty] for row in rows], markdown)


def target_rows(record: Record) -> list[tuple[Target, Entry, float | None]]:
    found = []
    for target in TARGETS:
        for entries in record.cases().values():
            kernel = entries.get("kernel")
            wanted = (target.op, target.terms, target.workload, target.which)
            if kernel is None or wanted != tuple(kernel[name] for name in ("op", "terms", "workload", "which")):
                continue
            if kernel["dtype"] != "fp32" or kernel["layout"] == "channel-last" or target.opponent not in entries:
                continue
            found.append((target, kernel, entries[target.opponent]["seconds"] / kernel["seconds"]))
    return found


def target_table(record: Record, markdown: bool = False) -> str:
    rows = [["case", "pass", "kernel", "against", "faster", "target", ""]]
    for target, kernel, ratio in target_rows(record):
        assert ratio is not None
        verdict = "met" if ratio >= target.factor else "MISSED"
        goal = f">= {target.factor:g}x"
        rows.append(
            [
                title_of(kernel),
                target.which,
                duration(kernel["seconds"]),
                target.opponent,
                f"{ratio:.1f}x",
                goal,
                verdict,
            ]
        )
    return columns(rows, markdown)


def losses(record: Record) -> list[str]:
    """Where something else is faster than the kernel, by more than the spread of the rounds."""
    found = []
    for entries in record.cases().values():
        kernel = entries.get("kernel")
        for name, entry in entries.items():
            if kernel is not None and name not in ("kernel", "kernel, factor known") and entry["high"] < kernel["low"]:
                factor = kernel["seconds"] / entry["seconds"]
                where = f"{title_of(kernel)}, {kernel['which']}"
                found.append(f"{where}: {name} is {factor:.2f}x faster ({duration(entry['seconds'])})")
    return found


def training_table(record: Record, markdown: bool = False) -> str:
    parts = list(dict.fromkeys(part for row in record.training for part in row["parts"]))
    rows = [["batch", "served by", "precision", "episodes/s", "step", "step with refresh", *parts]]
    for row in sorted(record.training, key=lambda row: row["batch"]):
        seconds = [duration(row["parts"].get(part)) for part in parts]
        rows.append([
            str(row["batch"]), row["served_by"], row["precision"], f"{row['episodes_per_s']:.1f}",
            duration(row["step_seconds"]), duration(row["refresh_step_seconds"]), *seconds,
        ])  # fmt: skip
    return columns(rows, markdown)


def report(record: Record, markdown: bool = False, passes: tuple[str, ...] = ("forward", "backward", "both")) -> str:
    heading = "### " if markdown else ""
    text = [record.about() + ".", "", f"{heading}Goals", "", target_table(record, markdown), ""]
    text += [f"{heading}Every case: time of the kernel, and how many times as long the others take", ""]
    text += [case_table(record, markdown, passes), "", f"{heading}Where something else is faster", ""]
    text += [f"- {line}" for line in losses(record)] or ["Nowhere, in this recording."]
    if record.training:
        text += [
            "",
            f"{heading}Training, and the parts of a step without refresh",
            "",
            training_table(record, markdown),
        ]
    return "\n".join(text)


def compare(old: Record, new: Record) -> str:
    """Kernel times of two recordings. A change inside the spread of the rounds is marked as noise."""
    rows = [["case", "pass", "implementation", old.name, new.name, "new / old", ""]]
    for key, entries in new.cases().items():
        for name, entry in entries.items():
            before = old.cases().get(key, {}).get(name)
            if before is None:
                continue
            apart = entry["low"] > before["high"] or entry["high"] < before["low"]
            ratio = entry["seconds"] / before["seconds"]
            verdict = ("slower" if ratio > 1 else "faster") if apart else "noise"
            rows.append(
                [
                    title_of(entry),
                    entry["which"],
                    name,
                    duration(before["seconds"]),
                    duration(entry["seconds"]),
                    f"{ratio:.2f}",
                    verdict,
                ]
            )
    return f"old: {old.about()}\nnew: {new.about()}\n\n{columns(rows, False)}"


def plots(record: Record, folder: Path) -> list[Path]:
    """One figure per op, terms, layout, dtype and pass that was measured for several B."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series: dict[tuple[str, ...], list[Entry]] = defaultdict(list)
    for entry in record.entries:
        if entry["workload"] != "ragged":
            key = tuple(entry[name] for name in ("op", "terms", "layout", "dtype", "which"))
            series[(*key, str(entry["sizes"][1:]))].append(entry)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for key, entries in series.items():
        lines: dict[str, dict[int, Entry]] = defaultdict(dict)
        for entry in entries:
            lines[entry["implementation"]][entry["sizes"][0]] = entry
        if len(lines["kernel"]) < 3:
            continue
        figure, axes = pyplot.subplots(figsize=(6, 4))
        for name, points in lines.items():
            batches = sorted(points)
            axes.plot(batches, [points[b]["seconds"] * 1e6 for b in batches], marker="o", label=name)
        batches = sorted(lines["kernel"])
        roofline = [lines["kernel"][b]["least_bytes"] / record.machine["copy_gb_per_s"] / 1e3 for b in batches]
        axes.plot(batches, roofline, "k--", label="roofline: least bytes at the speed of a copy")
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="B",
            ylabel="microseconds",
            title=" ".join(part for part in key[:5] if part),
        )
        axes.legend(fontsize=7)
        figure.tight_layout()
        written.append(folder / f"{'-'.join(part for part in key[:5] if part)}.svg")
        figure.savefig(written[-1], metadata={"Date": None})
        pyplot.close(figure)
    return written


def write_readme(records: list[Record], readme: Path) -> None:
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{readme} must hold the lines {BEGIN} and {END}.")
    head, rest = text.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    sections = [readme_section(record) for record in records]
    readme.write_text(f"{head}{BEGIN}\n{chr(10).join(sections)}\n{END}{tail}")


def readme_section(record: Record) -> str:
    """Forward and backward together of the plain cases (forward where that is all there is), then every loss."""
    rows = [["case", "pass", "kernel", "others: how many times as long"]]
    for entries in record.cases().values():
        kernel = entries.get("kernel")
        if kernel is None or kernel["workload"] == "ragged" or kernel["layout"] == "channel-last":
            continue
        if kernel["which"] == "backward" or (kernel["which"] == "forward" and shown_in_both(record, kernel)):
            continue
        others = [(name, entry["seconds"] / kernel["seconds"]) for name, entry in entries.items() if name != "kernel"]
        told = ", ".join(f"{name} {ratio:.1f}" for name, ratio in others)
        rows.append([title_of(kernel), kernel["which"], duration(kernel["seconds"]), told])
    lost = losses(record)
    text = [f"Measured on {record.about()}.", "", columns(rows, True), ""]
    text += ["Something else is faster here:" if lost else "Nothing that was compared is faster.", ""]
    text += [f"- {line}" for line in lost]
    if record.training:
        text += ["", "Training, grids of 30 x 30 cells and the small Qwen; parts of a step without refresh:", ""]
        text += [training_table(record, True)]
    return "\n".join(text).rstrip() + "\n"


def shown_in_both(record: Record, forward: Entry) -> bool:
    """Whether all that was timed in the forward pass was timed in both passes, too."""
    both = record.cases().get((*key_of(forward)[:-1], "both"), {})
    return set(record.cases()[key_of(forward)]) <= set(both)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.render", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("records", type=Path, nargs="+", metavar="RECORD.json")
    parser.add_argument("--plots", type=Path, metavar="DIR")
    parser.add_argument("--compare", type=Path, metavar="NEW.json")
    parser.add_argument("--readme", type=Path, metavar="README.md")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--targets", action="store_true", help="only the table of goals")
    options = parser.parse_args()
    records = [Record(path) for path in options.records]
    if options.readme is not None:
        write_readme(records, options.readme)
        return 0
    for record in records:
        if options.compare is not None:
            print(compare(record, Record(options.compare)))
        elif options.targets:
            print(target_table(record, options.markdown))
        else:
            print(report(record, options.markdown))
        if options.plots is not None:
            for path in plots(record, options.plots):
                print(f"wrote {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
