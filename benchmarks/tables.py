"""python -m benchmarks.tables [DIR]: the tables and plots of what side_by_side.json holds."""

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
    "models": "The models, as stored, one file",
    "variants": "Cast, and in shards",
    "formats": "Safetensors to safetensors",
    "resume": "Killed at one half, and run again",
    "where": "Where the time goes",
    "large": "A 7B-shaped checkpoint",
}
NOTES = {
    "formats": "Shards of 500 MB are made one file; the consolidation reads its own shards of the same tensors.",
    "resume": "wall, CPU and bytes of the second run. What streamconv had written it reads back from the disk, and "
    "checks; the others keep nothing that they could go on from.",
    "large": "Every run is from the disk, since the page cache need not hold the source. Those that ran once did so in "
    "a memory cgroup of 20,480 MB, and not in turns with the others: `of cp` is by its first run there. An exit 1 of "
    "torch.load(mmap) is the system's: torch maps a file privately, and the system refuses that beyond its memory.",
}
INTRODUCTION = """# streamconv beside what people use

Made by the commands below, on random weights that `streamconv synth` made; `__main__.py` says what is run, `ways.py`
the calls that each peer gets, `measure.py` how each number is taken. The ways of a table run in turns, and each ends
with its output on the disk. All outputs of a table hold the same tensors: names, dtypes, shapes and bytes, by their
sha256, taken after each way's first run.

- wall: median (least to most) in seconds. The source is in the page cache, but where it says "from the disk".
- of cp: the median, pair by pair, of wall by that of `cp; sync`.
- CPU: seconds, of all threads and processes, user and system.
- peak: the largest VmHWM of its processes, in MB of 10^6 bytes. It counts pages of files that are mapped, which the
  system can take away again (torch.load(mmap) has many). own: without these, as far as seen by looking every 5 ms.
- ends in: the smallest memory cgroup, in MB of 2^20 bytes, of 16, 24, 32, 48, 64, 96, 128, 192, … The source is not in
  the page cache before, so that its pages count, as the output's do.
- from the disk: one run after the source was dropped from the page cache: wall, MB read from and written to the disk.
- beyond: MB of disk that it took at most besides the source and its output.

`cp; sync` finds a page of memory for every page that it writes, and on a virtual machine the host may have to find it,
too: that is most of its time here. `dd` past the cache does not; it reads and writes in turn, and keeps one core idle.
streamconv checks every byte's CRC-32 and takes the output's sha256; the others check and take nothing.
"""


def row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(each) for each in cells) + " |"


def walls(found: Result) -> list[float]:
    return [each["wall"] for each in found["runs"]]


def cells(found: Result, limit: Result | None) -> list[str]:
    runs = found["runs"]
    if failed := [each["code"] for each in runs if each["code"]]:
        said = "killed" if failed[0] in (-9, 137) else f"exit {failed[0]}"
        return [said, "", "", *(f"{max(each[key] for each in runs):,.0f}" for key in ("peak_mb", "own_mb"))]
    ratios = [mine / limits for mine, limits in zip(walls(found), walls(limit), strict=False)] if limit else []
    return [
        spread(walls(found)) if len(runs) > 1 else f"{runs[0]['wall']:.2f}",
        f"{statistics.median(ratios):.2f}" if ratios else "",
        f"{statistics.median(each['cpu'] for each in runs):.2f}",
        *(f"{max(each[key] for each in runs):,.0f}" for key in ("peak_mb", "own_mb")),
    ]


def table(ways: Result, is_resumed: bool = False) -> list[str]:
    """One row a way, with the columns that any of them has; of a resumed run, what the disk had to do again."""
    columns = ["way", "runs", "wall, s", "of cp", "CPU, s", "peak, MB", "own, MB"]
    has_limit, has_cold = (any(key in found for found in ways.values()) for key in ("limit", "cold"))
    columns += ["ends in, MB"] * has_limit + ["from the disk, s"] * has_cold
    columns += ["read, MB", "written, MB"] * (has_cold or is_resumed) + ["beyond, MB"] * (not is_resumed)
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
    """In whole numbers; nothing of none."""
    return f"{statistics.median(each[key] for each in runs):,.0f}" if runs else ""


def where_lines(where: Result, cores: int) -> list[str]:
    inside, alone = where["inside"], where["alone"]
    lines = [
        f"{where['model']}, {where['bytes']:,} bytes. Seconds, medians of {len(inside)}. A step's time in the "
        "conversion includes waiting for the processor and the disk; alone, nothing else was done.",
        "",
        row(["step", "thread", "in the conversion", "alone"]),
        "|---|---|---|---|",
    ]
    threads = {"MainThread": "reads, checks", "hash": "hashes", "disk": "writes, syncs"}
    lone = {name: statistics.median(each[name] for each in alone) for name in alone[0]}
    busy = 0.0
    for thread, said in threads.items():
        for step in inside[0]["threads"].get(thread, {}):
            seconds = statistics.median(each["threads"].get(thread, {}).get(step, 0) for each in inside)
            busy += seconds if thread == "MainThread" else 0
            if seconds >= 0.005:
                by_itself = lone.get(step) if step != "write" else lone["write and sync"]
                lines.append(row([step, said, f"{seconds:.2f}", f"{by_itself:.2f}" if by_itself is not None else ""]))
    wall = statistics.median(each["wall"] for each in inside)
    lines.append(row(["Python, and waiting for the other threads", threads["MainThread"], f"{wall - busy:.2f}", ""]))
    lines.append(row(["Python's start, imports, the plan (`streamconv plan`)", "before", "",
                      f"{statistics.median(where['start']):.2f}"]))  # fmt: skip
    lines.append(row(["all of the conversion, wall", "", f"{wall:.2f}", ""]))
    cpu = statistics.median(each["cpu"] for each in inside)
    lines.append(row(["all of the conversion, CPU", "", f"{cpu:.2f}", ""]))
    checks = lone["CRC-32"] + lone["sha256"]
    return [
        *lines,
        "",
        f"{checks:.2f} s of that CPU are the CRC-32 and the sha256, which `cp` does not take: its distance to `cp` is "
        f"made of them. {cores} cores take {cpu / cores:.2f} s for all of the CPU at best, and the sha256, a chain "
        f"over a file, {lone['sha256']:.2f} s on one of any number.",
    ]


def growth(results: Result) -> dict[str, list[tuple[float, float, float]]]:
    """Of each way: bytes of the source, seconds from the disk (the large one's median), peak MB, by size."""
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
    """How far peak memory is from flat, and time from a straight line, for streamconv convert."""
    import numpy as np

    if len(points) < 3:
        return []
    sizes, seconds, peaks = (np.array(each) for each in zip(*points, strict=True))
    # Relative errors count, so that small models do.
    slope, start = np.polyfit(sizes, seconds, 1, w=1 / seconds)
    off = np.max(np.abs(slope * sizes + start - seconds) / seconds)
    return [
        f"`{CONVERT}` from {sizes[0] / MB:,.0f} MB to {sizes[-1] / GB:,.1f} GB: peak memory from {peaks.min():.1f} to "
        f"{peaks.max():.1f} MB; from the disk {start:.2f} s + {slope * GB:.2f} s a GB, the farthest point {off:.0%} "
        "off that line.",
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
    for axes, label in ((times, "from the disk, s"), (peaks, "peak memory, MB")):
        axes.set(xscale="log", yscale="log", xlabel="checkpoint, GB", ylabel=label)
        axes.grid(alpha=0.3)
    figure.legend(*times.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def plot_ways(ways: Result, title: str, path: Path) -> None:
    """Wall and peak memory as bars."""
    pyplot = _pyplot()
    ended = {way: found for way, found in ways.items() if not any(each["code"] for each in found["runs"])}
    figure, (times, peaks) = pyplot.subplots(1, 2, figsize=(11, 3.6), sharey=True, layout="constrained")
    colors = ["tab:red" if way.startswith("streamconv") else "tab:gray" for way in ended]
    for axes, values, label, digits in (
        (times, [statistics.median(walls(found)) for found in ended.values()], "wall, s", 1),
        (peaks, [max(e["peak_mb"] for e in found["runs"]) for found in ended.values()], "peak memory, MB", 0),
    ):
        bars = axes.barh(list(ended), values, color=colors)
        axes.bar_label(bars, [f"{value:,.{digits}f}" for value in values], padding=3, fontsize=9)
        axes.set(xlabel=label, xlim=(0, max(values) * 1.15))
        axes.spines[["top", "right"]].set_visible(False)
    times.invert_yaxis()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def plot_where(where: Result, path: Path) -> None:
    """What each thread did, as one bar a thread."""
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
    axes.axvline(wall, color="black", linestyle="--", label=f"all, {wall:.2f} s")
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
    said = found.get("limit", "above")
    return None if said.startswith("above") else float(said.replace(",", ""))


MEASURES: tuple[tuple[str, int, Callable[[Result], float | None]], ...] = (
    ("s", 2, _median("wall")),
    ("s from the disk", 2, lambda found: found["cold"]["wall"] if "cold" in found else None),
    ("s of CPU", 2, _median("cpu")),
    ("MB at peak", 0, lambda found: max(float(each["peak_mb"]) for each in found["runs"])),
    ("MB of its own", 0, lambda found: max(float(each["own_mb"]) for each in found["runs"])),
    ("MB to end in", 0, _limit),
    ("MB of disk beyond", 0, _median("disk_mb")),
)


def losses(results: Result) -> list[str]:
    """Where streamconv convert has not the best number of those that convert, or run of those that compare, too."""
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
                better.append(f"{theirs:,.{digits}f} {what} ({ours.removesuffix(' convert')} {mine:,.{digits}f})")
        if better:
            lines.append(f"- {title}: {way} takes {', '.join(better)}")
    return lines


def text(results: Result, made: Sequence[str]) -> str:
    lines = [INTRODUCTION, results["machine"], ""]
    for section, title in TITLES.items():
        if section not in results:
            continue
        found = results[section]
        lines += [f"## {title}", "", *(f"`{each}`" for each in results["commands"][section]), ""]
        if section == "models":
            lines += [f"![time and memory against size]({name})\n" for name in made if "growth" in name]
            lines += growth_lines(growth(results).get(CONVERT, []))
            for model, one in sorted(found.items(), key=lambda each: each[1]["bytes"]):
                lines += [f"### {model}, {one['bytes']:,} bytes", "", *table(one["ways"]), ""]
            lines += [f"![the largest]({name})\n" for name in made if "ways" in name]
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
        "## Where streamconv loses",
        "",
        "`streamconv convert` beside every other row, by the tables above, and `streamconv run` beside the original "
        "script's way, which compares two models' outputs, too: run does so in every layer, and compares all bytes.",
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
