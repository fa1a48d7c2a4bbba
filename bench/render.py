"""Tables, plots, a comparison of two recordings, and the performance section of the README, all from recorded JSON.
With --readme, the tables that are not in that section go to a file beside each recording.

python -m bench.render RECORD.json               tables
python -m bench.render RECORD.json --out DIR     also as DIR/report.txt, with plots of time against T and B
python -m bench.render OLD.json --compare NEW.json
python -m bench.render RECORD.json ... --readme README.md
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.record import RESULTS, Record, Row, key_of, title_of

BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"


@dataclass(frozen=True)
class Target:
    """How many times faster than an opponent the kernel must be on a case, as op, terms, workload and pass name it.

    aim: what is hoped for beyond that.
    """

    op: str
    terms: str
    workload: str
    which: str
    opponent: str
    factor: float
    aim: float | None = None

    @property
    def goal(self) -> str:
        return f">= {self.factor:g}x" + (f", aim {self.aim:g}x" if self.aim else "")

    def verdict(self, ratio: float) -> str:
        if ratio < self.factor:
            return "MISSED"
        return "met" if self.aim is None or ratio < self.aim else "met, and the aim"


TARGETS = (
    Target("efe_loss", "all", "train", "both", "compile", 3, aim=5),
    Target("efe_loss", "all", "train", "both", "eager", 10, aim=20),
    Target("efe_loss", "core", "train", "both", "compile", 3, aim=5),
    Target("efe_loss", "core", "train", "both", "eager", 10, aim=20),
    Target("arc_efe", "", "seed", "both", "loop over cells", 10, aim=50),
    Target("arc_efe", "", "seed", "both", "compile", 1),
    Target("gae", "", "throughput", "forward", "torchrl", 10),
    Target("gae", "", "throughput", "forward", "compile", 3),
    Target("policy_gradient_loss", "", "throughput", "both", "eager", 3),
    Target("refine_and_score", "", "update", "both", "eager", 3),
    Target("masked_mean_pool", "", "train", "both", "eager", 2),
    Target("masked_mean_pool", "", "train", "both", "sum over mask", 2),
)


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


def opponents_of(cases: Iterable[dict[str, Row]]) -> list[str]:
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


def ratio_of(record: Record, target: Target) -> tuple[Row, float] | None:
    """The kernel's entry and how many times faster it is than the opponent; None where either was not recorded."""
    wanted = (target.op, target.terms, target.workload, target.which, "fp32")
    for entries in record.cases().values():
        kernel, opponent = entries.get("kernel"), entries.get(target.opponent)
        if kernel is None or opponent is None or kernel["layout"] not in ("", "channel-first"):
            continue
        if wanted == tuple(kernel[name] for name in ("op", "terms", "workload", "which", "dtype")):
            return kernel, opponent["seconds"] / kernel["seconds"]
    return None


def target_table(record: Record, markdown: bool = False) -> str:
    rows = [["case", "pass", "kernel", "against", "faster", "goal", "result"]]
    for target in TARGETS:
        found = ratio_of(record, target)
        if found is None:
            name = " ".join(part for part in (target.op, target.terms, target.workload) if part)
            rows.append([name, target.which, "", target.opponent, "", target.goal, "not recorded"])
            continue
        kernel, ratio = found
        rows.append([
            title_of(kernel), target.which, duration(kernel["seconds"]), target.opponent, f"{ratio:.1f}x", target.goal,
            target.verdict(ratio),
        ])  # fmt: skip
    return columns(rows, markdown)


def losses(record: Record) -> list[str]:
    """Where something else is faster than the kernel, by more than the spread of the rounds."""
    found = []
    for entries in record.cases().values():
        kernel = entries.get("kernel")
        for name, entry in entries.items():
            if kernel is not None and name != "kernel" and entry["high"] < kernel["low"]:
                factor = kernel["seconds"] / entry["seconds"]
                where = f"{title_of(kernel)}, {kernel['which']}"
                found.append(f"{where}: {name} is {factor:.2f}x faster ({duration(entry['seconds'])})")
    return found


def training_table(record: Record, markdown: bool = False) -> str:
    parts = list(dict.fromkeys(part for row in record.training for part in row["parts"]))
    rows = [["batch", "served by", "processes", "precision", "episodes/s", "step", "step with refresh", *parts]]
    for row in sorted(record.training, key=lambda row: row["batch"]):
        seconds = [duration(row["parts"].get(part)) for part in parts]
        rows.append([
            str(row["batch"]), row["served_by"], str(row.get("processes", 1)), row["precision"],
            f"{row['episodes_per_s']:.1f}",
            duration(row["step_seconds"]), duration(row["refresh_step_seconds"]), *seconds,
        ])  # fmt: skip
    return columns(rows, markdown)


Series = dict[tuple[str, str, str], list[dict[str, Any]]]


def sweep_series(record: Record) -> Series:
    """The rows of the sweep by op, dimension and pass, in the order of the dimension."""
    found: Series = defaultdict(list)
    for row in record.sweep:
        found[row["op"], row["axis"], row["which"]].append(row)
    return {key: sorted(rows, key=swept_size) for key, rows in found.items()}


def swept_size(row: dict[str, Any]) -> int:
    size: int = row["sizes"]["BT".index(row["axis"])]
    return size


def sweep_table(record: Record, markdown: bool = False) -> str:
    """Times at the ends, and the step at which the time per element grows most: a cliff would stand out there.

    A cliff stays; a single slow point is noise. So the two points before a step are held against the two after it.
    """
    rows = [["op", "against", "pass", "at the smallest", "at the largest", "steepest step", "growth per element"]]
    for (op, axis, which), series in sweep_series(record).items():
        growth, place = 0.0, ""
        seconds = [row["seconds"] for row in series]
        for i in range(1, len(series)):
            small, large = swept_size(series[i - 1]), swept_size(series[i])
            ratio = min(seconds[i : i + 2]) / max(seconds[max(i - 2, 0) : i]) / (large / small)
            if ratio > growth:
                growth, place = ratio, f"{small} to {large}"
        first, last = series[0], series[-1]
        rows.append([
            op, axis, which, f"{duration(first['seconds'])} at {swept_size(first)}",
            f"{duration(last['seconds'])} at {swept_size(last)}", place, f"{growth:.2f}x",
        ])  # fmt: skip
    return columns(rows, markdown)


def report(record: Record, markdown: bool = False, passes: tuple[str, ...] = ("forward", "backward", "both")) -> str:
    def section(title: str, body: str) -> str:
        return f"{'### ' if markdown else ''}{title}\n\n{body}\n"

    lost = [f"- {line}" for line in losses(record)] or ["Nowhere, in this recording."]
    text = [record.about() + ".\n"]
    if record.entries:
        text.append(section("Goals", target_table(record, markdown)))
        text.append(section("Which of the others is the fastest", columns(plain_rows(record), markdown)))
        title = "Every case: time of the kernel, and how many times as long the others take"
        text.append(section(title, case_table(record, markdown, passes)))
        text.append(section("Where something else is faster", "\n".join(lost)))
    if record.sweep:
        text.append(section("From 1 to 100 000 steps and episodes", sweep_table(record, markdown)))
    if record.training:
        text.append(section("Training, and the parts of a step without refresh", training_table(record, markdown)))
    return "\n".join(text)


def write_report(record: Record, folder: Path) -> str:
    """The tables, which also go to a file in the folder, and the plots beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = report(record)
    (folder / "report.txt").write_text(text)
    try:
        batch_plots(record, folder)
        sweep_plot(record, folder / "sweep.png")
        if record.figure.parent == RESULTS:
            sweep_plot(record, record.figure)
    except ModuleNotFoundError as error:
        print(f"No plots: {error}.", file=sys.stderr)
    return text


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


def pyplot_module() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    # The same recording gives the same file, whose text stays text.
    matplotlib.rcParams.update({"svg.hashsalt": "bench", "svg.fonttype": "none"})
    from matplotlib import pyplot

    return pyplot


def batch_plots(record: Record, folder: Path) -> None:
    """One figure per op, terms, layout, dtype and pass that was measured for several B."""
    pyplot = pyplot_module()
    series: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for entry in record.entries:
        if entry["workload"] != "ragged":
            key = tuple(entry[name] for name in ("op", "terms", "layout", "dtype", "which"))
            series[(*key, str(entry["sizes"][1:]))].append(entry)
    for key, entries in series.items():
        lines: dict[str, dict[int, Row]] = defaultdict(dict)
        for entry in entries:
            lines[entry["implementation"]][entry["sizes"][0]] = entry
        if len(lines["kernel"]) < 3:
            continue
        name = [part for part in key[:5] if part]
        figure, axes = pyplot.subplots(figsize=(6, 4))
        for implementation, points in lines.items():
            batches = sorted(points)
            axes.plot(batches, [points[b]["seconds"] * 1e6 for b in batches], marker="o", label=implementation)
        batches = sorted(lines["kernel"])
        draw_roofline(axes, record, batches, [lines["kernel"][b]["least_bytes"] for b in batches], "k")
        axes.set(xscale="log", yscale="log", xlabel="B", ylabel="microseconds", title=" ".join(name))
        axes.legend(fontsize=7)
        save(figure, folder / f"{'-'.join(name)}.svg")


def draw_roofline(axes: Any, record: Record, sizes: list[int], least_bytes: list[int], colour: str) -> None:
    microseconds = [moved / record.machine["copy_gb_per_s"] / 1e3 for moved in least_bytes]
    axes.plot(sizes, microseconds, f"{colour}--", label="roofline: least bytes at the speed of a copy")


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
    pyplot_module().close(figure)


def sweep_plot(record: Record, path: Path) -> None:
    """Time against T and against B of every op of the sweep, with the rooflines drawn in."""
    series = sweep_series(record)
    if not series:
        return
    pyplot = pyplot_module()
    ops = list(dict.fromkeys(op for op, _, _ in series))
    figure, grid = pyplot.subplots(2, len(ops), figsize=(4 * len(ops), 6), squeeze=False)
    for (op, axis, which), rows in series.items():
        axes = grid["TB".index(axis)][ops.index(op)]
        colour = "C0" if which == "forward" else "C1"
        sizes = [swept_size(row) for row in rows]
        microseconds = [row["seconds"] * 1e6 for row in rows]
        label = "forward" if which == "forward" else "forward and backward"
        axes.plot(sizes, microseconds, color=colour, marker=".", label=label)
        axes.fill_between(
            sizes, [row["low"] * 1e6 for row in rows], [row["high"] * 1e6 for row in rows], color=colour, alpha=0.2
        )
        draw_roofline(axes, record, sizes, [row["least_bytes"] for row in rows], colour)
        other, fixed = ("B", rows[0]["sizes"][0]) if axis == "T" else ("T", rows[0]["sizes"][1])
        axes.set(xscale="log", yscale="log", xlabel=f"{axis}, at {other} = {fixed}", ylabel="microseconds", title=op)
        if which == "forward":  # the roofline of a few bytes lies far below every time
            axes.set_ylim(bottom=min(microseconds) / 10)
    grid[0][0].legend(fontsize=7, loc="upper left")
    save(figure, path)


def write_readme(records: list[Record], readme: Path) -> None:
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{readme} must hold the lines {BEGIN} and {END}.")
    head, rest = text.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    sections = [readme_section(record, readme.resolve()) for record in records]
    readme.write_text(f"{head}{BEGIN}\n{chr(10).join(sections)}\n{END}{tail}")
    for record in records:
        record.details.write_text(details(record))


def readme_section(record: Record, readme: Path) -> str:
    """The goals; everything else is in the file that it names."""
    where = os.path.relpath(record.details, readme.parent)
    told = [f"Measured on {record.about()}.", "", target_table(record, True), ""]
    told.append(f"Every op, what is faster than its kernel, the sweep and the training: [{where}]({where}).")
    return "\n".join(told) + "\n"


def details(record: Record) -> str:
    """Forward and backward together of the plain cases (forward where that is all there is), every loss, the rest."""
    lost = losses(record)
    text = [f"# {record.name}", "", f"Measured on {record.about()}.", ""]
    text += ["Forward and backward together where an op has both:", "", columns(plain_rows(record), True), ""]
    text += ["Something else is faster here:" if lost else "Nothing that was compared is faster.", ""]
    text += [f"- {line}" for line in lost]
    if record.sweep:
        text += ["", "From one step and one episode to 100 000 of them; growth is that of the time per element at the"]
        text += ["steepest step:", "", sweep_table(record, True)]
    if record.sweep and record.figure.exists():
        text += ["", f"![Time against T and B]({record.figure.name})"]
    if record.training:
        text += ["", "Training, grids of 30 x 30 cells and the small Qwen; parts of a step without refresh:", ""]
        text += [training_table(record, True)]
    return "\n".join(text).rstrip() + "\n"


def plain_rows(record: Record) -> list[list[str]]:
    rows = [["case", "pass", "kernel", "of a copy", "fastest of the others", "the others: how many times as long"]]
    for entries in record.cases().values():
        kernel = entries.get("kernel")
        if kernel is None or kernel["workload"] == "ragged" or kernel["layout"] not in ("", "channel-first"):
            continue
        if kernel["dtype"] != "fp32" and kernel["op"] not in ("efe_loss", "masked_mean_pool"):
            continue
        if kernel["which"] == "backward" or (kernel["which"] == "forward" and shown_in_both(record, kernel)):
            continue
        others = [(name, entry["seconds"] / kernel["seconds"]) for name, entry in entries.items() if name != "kernel"]
        told = ", ".join(f"{name} {ratio:.1f}" for name, ratio in others)
        fastest = min(others, key=lambda other: other[1])[0] if others else ""
        share = f"{kernel['copy_share']:.0%}"
        rows.append([title_of(kernel), kernel["which"], duration(kernel["seconds"]), share, fastest, told])
    return rows


def shown_in_both(record: Record, forward: Row) -> bool:
    """Whether all that was timed in the forward pass was timed in both passes, too."""
    both = record.cases().get((*key_of(forward)[:-1], "both"), {})
    return set(record.cases()[key_of(forward)]) <= set(both)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.render", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("records", type=Path, nargs="+", metavar="RECORD.json")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the tables and plots there, too")
    parser.add_argument("--compare", type=Path, metavar="NEW.json")
    parser.add_argument("--readme", type=Path, metavar="README.md", help="write the goals there")
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
        elif options.out is not None:
            print(write_report(record, options.out))
        else:
            print(report(record, options.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
