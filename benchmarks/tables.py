"""python -m benchmarks.tables [DIR]: make the tables and plots from side_by_side.json."""

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import spread
from benchmarks.ways import CONVERT, CP, DD, ORIGINAL, RUN

Result = dict[str, Any]
GB, MB = 1e9, 1e6
TITLES = {
    "models": "Models, as stored, in one file",
    "variants": "With a cast, and in several shards",
    "formats": "Safetensors to safetensors",
    "resume": "Killed halfway, and run again",
    "where": "Where the time goes",
    "large": "A 7B-shaped checkpoint",
}
NOTES = {
    "formats": "Shards of 500 MB are merged into one file; the consolidation reads its own shards of the same tensors.",
    "resume": "The columns are those of the second run. streamconv reads its unfinished output back and checks "
    "it; the others cannot resume.",
    "large": "Every run is cold, because the page cache may not hold the source. Converters with one run ran in a "
    "memory cgroup of 20,480 MB and not in turns with the others; `vs cp` uses the first run of cp. Exit code 1 of "
    "torch.load(mmap) is the system's: torch maps a file privately, which the system refuses beyond its memory.",
}
INTRODUCTION = """# streamconv compared with other converters

Made with the commands below, on random weights from `streamconv synth`. `__main__.py` defines the runs, `ways.py` the
calls of each converter, and `measure.py` the measurements. The converters of a table run in turns, and a run ends when
its output is on the disk. All outputs of a table hold the same tensors (names, dtypes, shapes, bytes), which is checked
by sha256 after each converter's first run.

- wall: seconds, median (minimum to maximum). The source is in the page cache unless the run is cold.
- vs cp: wall divided by that of `cp; sync` in the same turn; the median of all turns.
- CPU: seconds of all threads and processes, user and system.
- peak: the largest VmHWM of the converter's processes, in MB of 10^6 bytes. It includes pages of mapped files, which
  the system can reclaim (torch.load(mmap) has many). anonymous: without these pages, sampled every 5 ms.
- minimum limit: the smallest memory cgroup in which the converter succeeds, in MB of 2^20 bytes, out of 16, 24, 32, 48,
  64, 96, 128, 192, … The source is dropped from the page cache first, so that its pages count like the output's.
- cold: one run after the source was dropped from the page cache; wall time, MB read from and written to the disk.
- extra disk: the most disk space used besides the source and the output, in MB.

`cp; sync` allocates a page of memory for every page that it writes. On a virtual machine, the host may have to do so,
too: that is most of its time here. `dd` bypasses the cache; it reads and writes in turn, and leaves one core idle.
streamconv checks every byte's CRC-32 and computes the output's sha256; the others do neither.
`streamconv run` and the original script, with the share of each step and newer numbers: [verify.md](verify.md).
"""


def row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(each) for each in cells) + " |"


def walls(found: Result) -> list[float]:
    return [each["wall"] for each in found["runs"]]


def cells(found: Result, limit: Result | None) -> list[str]:
    runs = found["runs"]
    if failed := [each["code"] for each in runs if each["code"]]:
        outcome = "killed" if failed[0] in (-9, 137) else f"exit {failed[0]}"
        return [outcome, "", "", *(f"{max(each[key] for each in runs):,.0f}" for key in ("peak_mb", "own_mb"))]
    ratios = [mine / limits for mine, limits in zip(walls(found), walls(limit), strict=False)] if limit else []
    return [
        spread(walls(found)) if len(runs) > 1 else f"{runs[0]['wall']:.2f}",
        f"{statistics.median(ratios):.2f}" if ratios else "",
        f"{statistics.median(each['cpu'] for each in runs):.2f}",
        *(f"{max(each[key] for each in runs):,.0f}" for key in ("peak_mb", "own_mb")),
    ]


def table(ways: Result, is_resumed: bool = False) -> list[str]:
    """A table with one row per way and the columns that any of them has; for resumed runs, with the disk's work."""
    columns = ["converter", "runs", "wall, s", "vs cp", "CPU, s", "peak, MB", "anonymous, MB"]
    has_limit, has_cold = (any(key in found for found in ways.values()) for key in ("limit", "cold"))
    columns += ["minimum limit, MB"] * has_limit + ["cold, s"] * has_cold
    columns += ["read, MB", "written, MB"] * (has_cold or is_resumed) + ["extra disk, MB"] * (not is_resumed)
    lines = [row(columns), "|" + "---|" * len(columns)]
    for way, found in ways.items():
        line = [f"**{way}**" if way.startswith("streamconv") else way, len(found["runs"])]
        line += cells(found, ways.get(CP))
        line += [found.get("limit", "")] * has_limit
        cold = [found["cold"]] if "cold" in found else []
        line += [f"{cold[0]['wall']:.2f}" if cold else ""] * has_cold
        if has_cold or is_resumed:
            moved = found["runs"] if is_resumed else cold
            line += [median(moved, key) for key in ("read_mb", "written_mb")]
        if not is_resumed:
            line.append(median([each for each in found["runs"] if not each["code"]], "disk_mb"))
        lines.append(row(line))
    return lines


def median(runs: Sequence[Result], key: str) -> str:
    """The median as a whole number; empty if there are no runs."""
    return f"{statistics.median(each[key] for each in runs):,.0f}" if runs else ""


def where_lines(where: Result, cores: int) -> list[str]:
    inside, alone = where["inside"], where["alone"]
    lines = [
        f"{where['model']}, {where['bytes']:,} bytes. Seconds, medians of {len(inside)}. In the conversion, a "
        "step's time includes waiting for a core and for the disk; alone, the step ran by itself.",
        "",
        row(["step", "thread", "in the conversion", "alone"]),
        "|---|---|---|---|",
    ]
    threads = {"MainThread": "reads, checks", "hash": "hashes", "disk": "writes, syncs"}
    lone = {name: statistics.median(each[name] for each in alone) for name in alone[0]}
    busy = 0.0
    for thread, task in threads.items():
        for step in inside[0]["threads"].get(thread, {}):
            seconds = statistics.median(each["threads"].get(thread, {}).get(step, 0) for each in inside)
            busy += seconds if thread == "MainThread" else 0
            if seconds >= 0.005:
                by_itself = lone.get(step) if step != "write" else lone["write and sync"]
                lines.append(row([step, task, f"{seconds:.2f}", f"{by_itself:.2f}" if by_itself is not None else ""]))
    wall = statistics.median(each["wall"] for each in inside)
    lines.append(row(["Python, and waiting for other threads", threads["MainThread"], f"{wall - busy:.2f}", ""]))
    lines.append(row(["start of Python, imports, the plan (`streamconv plan`)", "before", "",
                      f"{statistics.median(where['start']):.2f}"]))  # fmt: skip
    lines.append(row(["whole conversion, wall", "", f"{wall:.2f}", ""]))
    cpu = statistics.median(each["cpu"] for each in inside)
    lines.append(row(["whole conversion, CPU", "", f"{cpu:.2f}", ""]))
    checks = lone["CRC-32"] + lone["sha256"]
    return [
        *lines,
        "",
        f"{checks:.2f} s of this CPU time are the CRC-32 and the sha256, which `cp` does not compute; they are the "
        f"difference to `cp`. At best, {cores} cores need {cpu / cores:.2f} s for all of the CPU time. The sha256 "
        f"cannot be computed in parallel and needs {lone['sha256']:.2f} s on any number of cores.",
    ]


def growth(results: Result) -> dict[str, list[tuple[float, float, float]]]:
    """Points for each way, ordered by size: source bytes, cold seconds (the median for the large model), peak MB."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    sizes = [*results.get("models", {}).values(), *([results["large"]] if "large" in results else [])]
    for one in sorted(sizes, key=lambda each: each["bytes"]):
        for way, result in one["ways"].items():
            if not any(each["code"] for each in result["runs"]):
                peak = max(each["peak_mb"] for each in result["runs"])
                seconds = result["cold"]["wall"] if "cold" in result else statistics.median(walls(result))
                found.setdefault(way, []).append((one["bytes"], seconds, peak))
    return found


def growth_lines(points: list[tuple[float, float, float]]) -> list[str]:
    """Describe how peak memory and time of streamconv convert grow with the source."""
    import numpy as np

    if len(points) < 3:
        return []
    sizes, seconds, peaks = (np.array(each) for each in zip(*points, strict=True))
    # Weighted by 1 / seconds, so that relative errors count and small models matter.
    slope, start = np.polyfit(sizes, seconds, 1, w=1 / seconds)
    off = np.max(np.abs(slope * sizes + start - seconds) / seconds)
    return [
        f"`{CONVERT}` from {sizes[0] / MB:,.0f} MB to {sizes[-1] / GB:,.1f} GB: peak memory from {peaks.min():.1f} to "
        f"{peaks.max():.1f} MB; cold runs take {start:.2f} s + {slope * GB:.2f} s per GB, with a deviation of up to "
        f"{off:.0%}.",
        "",
    ]


def plot_growth(found: dict[str, list[tuple[float, float, float]]], path: Path) -> None:
    pyplot = _pyplot()
    figure, (times, peaks) = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for way, points in found.items():
        sizes = [size / GB for size, _, _ in points]
        style: Any = {"color": "black", "linestyle": "--"} if way == CP else {}
        style |= {"color": "tab:gray", "linestyle": ":"} if way == DD else {}
        style |= {"color": "tab:red", "linewidth": 2.5} if way == CONVERT else {}
        style |= {"color": "tab:brown"} if way == ORIGINAL else {}
        times.plot(sizes, [seconds for _, seconds, _ in points], marker="o", markersize=4, label=way, **style)
        peaks.plot(sizes, [peak for _, _, peak in points], marker="o", markersize=4, label=way, **style)
    for axes, label in ((times, "cold run, s"), (peaks, "peak memory, MB")):
        axes.set(xscale="log", yscale="log", xlabel="checkpoint, GB", ylabel=label)
        axes.grid(alpha=0.3)
    figure.legend(*times.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def plot_ways(ways: Result, title: str, path: Path) -> None:
    """Plot wall time and peak memory as bars."""
    pyplot = _pyplot()
    succeeded = {way: found for way, found in ways.items() if not any(each["code"] for each in found["runs"])}
    figure, (times, peaks) = pyplot.subplots(1, 2, figsize=(11, 3.6), sharey=True, layout="constrained")
    colors = ["tab:red" if way.startswith("streamconv") else "tab:gray" for way in succeeded]
    for axes, values, label, digits in (
        (times, [statistics.median(walls(found)) for found in succeeded.values()], "wall, s", 1),
        (peaks, [max(e["peak_mb"] for e in found["runs"]) for found in succeeded.values()], "peak memory, MB", 0),
    ):
        bars = axes.barh(list(succeeded), values, color=colors)
        axes.bar_label(bars, [f"{value:,.{digits}f}" for value in values], padding=3, fontsize=9)
        axes.set(xlabel=label, xlim=(0, max(values) * 1.15))
        axes.spines[["top", "right"]].set_visible(False)
    times.invert_yaxis()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def plot_where(where: Result, path: Path) -> None:
    """Plot the steps of each thread as one bar."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(11, 2.8), layout="constrained")
    wall = statistics.median(each["wall"] for each in where["inside"])
    for thread in ("MainThread", "hash", "disk"):
        left = 0.0
        for step in where["inside"][0]["threads"].get(thread, {}):
            seconds = statistics.median(each["threads"].get(thread, {}).get(step, 0) for each in where["inside"])
            bar = axes.barh([thread], [seconds], left=left, edgecolor="white")
            if seconds > wall / 40:
                axes.bar_label(bar, [f"{step}\n{seconds:.2f} s"], label_type="center", fontsize=8)
            left += seconds
    axes.axvline(wall, color="black", linestyle="--", label=f"total, {wall:.2f} s")
    axes.set(xlabel=f"s, {where['model']}", xlim=(0, wall * 1.1))
    axes.invert_yaxis()
    axes.legend(loc="upper right", frameon=False)
    figure.savefig(path, dpi=110)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _median(key: str) -> Callable[[Result], float | None]:
    return lambda found: statistics.median(each[key] for each in found["runs"])


def _limit(found: Result) -> float | None:
    limit = found.get("limit", "above")
    return None if limit.startswith("above") else float(limit.replace(",", ""))


MEASURES: tuple[tuple[str, int, Callable[[Result], float | None]], ...] = (
    ("s", 2, _median("wall")),
    ("s cold", 2, lambda found: found["cold"]["wall"] if "cold" in found else None),
    ("s of CPU", 2, _median("cpu")),
    ("MB peak", 0, lambda found: max(float(each["peak_mb"]) for each in found["runs"])),
    ("MB anonymous", 0, lambda found: max(float(each["own_mb"]) for each in found["runs"])),
    ("MB minimum limit", 0, _limit),
    ("MB extra disk", 0, _median("disk_mb")),
)


def losses(results: Result) -> list[str]:
    """Numbers in which another way is better than streamconv convert or, if it compares models, than run."""
    tables = {model: one["ways"] for model, one in results.get("models", {}).items()}
    tables |= {f"{name}": ways for name, ways in results.get("variants", {}).get("tables", {}).items()}
    for section in ("formats", "large"):
        if section in results:
            tables[TITLES[section]] = results[section]["ways"]
    pairs = [
        (title, ours, ways[ours], way, found)
        for title, ways in tables.items()
        for way, found in ways.items()
        for ours in ((CONVERT, RUN) if way == ORIGINAL else (CONVERT,))
        if ours in ways and not way.startswith("streamconv") and not any(each["code"] for each in found["runs"])
    ]
    lines = []
    for title, ours, our_found, way, found in pairs:
        better = []
        for what, digits, value in MEASURES:
            mine, theirs = value(our_found), value(found)
            if mine is not None and theirs is not None and round(theirs, digits) < round(mine, digits):
                better.append(f"{theirs:,.{digits}f} {what} ({ours.removesuffix(' convert')}: {mine:,.{digits}f})")
        if better:
            lines.append(f"- {title}: {way} needs {', '.join(better)}")
    return lines


def text(results: Result, made: Sequence[str]) -> str:
    lines = [INTRODUCTION, results["machine"], ""]
    for section, title in TITLES.items():
        if section not in results:
            continue
        found = results[section]
        lines += [f"## {title}", "", *(f"`{each}`" for each in results["commands"][section]), ""]
        if section == "models":
            lines += [f"![time and memory by size]({name})\n" for name in made if "growth" in name]
            lines += growth_lines(growth(results).get(CONVERT, []))
            for model, one in sorted(found.items(), key=lambda each: each[1]["bytes"]):
                lines += [f"### {model}, {one['bytes']:,} bytes", "", *table(one["ways"]), ""]
            lines += [f"![the largest model]({name})\n" for name in made if "ways" in name]
        elif section == "variants":
            lines += [f"{found['model']}, {found['bytes']:,} bytes; `cp; sync` copies the source as it is.", ""]
            for name, ways in found["tables"].items():
                lines += [f"### {name}", "", *table(ways), ""]
        elif section == "where":
            lines += [f"![what each thread did]({name})\n" for name in made if "where" in name]
            lines += [*where_lines(found, int(results["machine"].split()[0])), ""]
        else:
            lines += [f"{found['bytes']:,} bytes. {NOTES[section]}", ""]
            lines += [*table(found["ways"], section == "resume"), ""]
    lines += [
        "## Where streamconv is worse",
        "",
        "`streamconv convert` compared with every other row of the tables above. `streamconv run` is compared with the "
        "original script's way, which also compares the two models' outputs; run compares every layer and every byte.",
        "",
    ]
    return "\n".join(lines + (losses(results) or ["Nowhere."])) + "\n"


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    results = json.loads((folder / "side_by_side.json").read_text())
    made = []
    if len(growth(results).get(CONVERT, [])) > 1:
        made.append("side_by_side_growth.png")
        plot_growth(growth(results), folder / made[-1])
    if "models" in results:
        model, largest = max(results["models"].items(), key=lambda each: each[1]["bytes"])
        made.append("side_by_side_ways.png")
        plot_ways(largest["ways"], f"{model}, {largest['bytes'] / GB:.2g} GB", folder / made[-1])
    if "where" in results:
        made.append("side_by_side_where.png")
        plot_where(results["where"], folder / made[-1])
    (folder / "side_by_side.md").write_text(text(results, made))
    print((folder / "side_by_side.md").read_text())


if __name__ == "__main__":
    main()
