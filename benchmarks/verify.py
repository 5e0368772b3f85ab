"""python -m benchmarks.verify [MODEL] [--runs N] [--dir DIR]: `streamconv run` beside the original script, on a CPU.

Whole commands, in turns; `streamconv run` also in memory cgroups. The source is random and in the page cache.
"""

import json
import statistics
import sys
from typing import Any

from benchmarks.measure import Cgroup, Run, machine, made_source, parse_arguments, run, spread
from benchmarks.ways import ORIGINAL, RUN, Options, command

LIMITS_MB = (1024, 768)
# Not by `python -m benchmarks.ways`, which syncs the output at the end: the original script does not.
CALL_ORIGINAL = """
import sys
from pathlib import Path
from benchmarks import ways
ways.original(Path(sys.argv[1]), Path(sys.argv[2]), ways.Options())
"""
REST = "Python's start, imports, and the rest"


def limits() -> tuple[int, ...]:
    """Return the limits to run in: none if this process may not create a memory cgroup."""
    group = Cgroup(LIMITS_MB[0] << 20)
    group.close()
    return LIMITS_MB if group.path is not None else ()


def steps(result: dict[str, Any], wall: float) -> dict[str, float]:
    """Return the seconds of each step from the command's JSON, and those of ``wall`` that no step took."""
    checks = {each["name"]: each["numbers"].get("seconds", 0.0) for each in result["verification"]["checks"]}
    found = {"convert": result["seconds"], **checks}
    return {**found, REST: wall - sum(found.values())}


def row(name: str, runs: list[Run], original: list[Run]) -> str:
    if failed := [each.code for each in runs if each.code]:
        return f"| {name} | exit code {failed[0]} in {len(failed)} of {len(runs)} runs | | |"
    walls = [each.wall for each in runs]
    ratio = statistics.median(walls) / statistics.median(each.wall for each in original)
    return f"| {name} | {spread(walls, 1)} | {ratio:.2f} | {max(each.peak_mb for each in runs):,.0f} |"


def main() -> None:
    args = parse_arguments(__doc__, runs=3)
    with made_source(args.model, args.dir) as (source, out):
        answer = out.with_name("run.json")
        ours = ["sh", "-c", 'exec "$@" --json >"$0"', str(answer), *command(RUN, source, out, Options())]
        theirs = [sys.executable, "-c", CALL_ORIGINAL, str(source), str(out)]
        ways = {ORIGINAL: (theirs, None), RUN: (ours, None)} | {f"{RUN}, {mb} MB": (ours, mb) for mb in limits()}
        runs: dict[str, list[Run]] = {name: [] for name in ways}
        taken: list[dict[str, float]] = []
        for _ in range(args.runs):
            for name, (words, limit) in ways.items():
                runs[name].append(run(words, out, limit))
                print(f"{name}: exit code {runs[name][-1].code}, {runs[name][-1].wall:.1f} s", file=sys.stderr)
                if name == RUN and not runs[name][-1].code:
                    taken.append(steps(json.loads(answer.read_bytes()), runs[name][-1].wall))
        print(f"{args.model}, {source.stat().st_size:,} bytes; {machine()}")
    print(f"`python -m benchmarks.verify {args.model} --runs {args.runs}`, in turns\n")
    print("| command | wall, s: median (minimum to maximum) | ratio of medians | peak of the largest process, MB |")
    print("|---|---|---|---|")
    for name, found in runs.items():
        print(row(name, found, runs[ORIGINAL]))
    if taken:
        wall = statistics.median(sum(each.values()) for each in taken)
        print(f"\n| step of `{RUN}` without a limit | s | share |\n|---|---|---|")
        for step in taken[0]:
            seconds = statistics.median(each[step] for each in taken)
            print(f"| {step} | {seconds:.1f} | {seconds / wall:.0%} |")


if __name__ == "__main__":
    main()
