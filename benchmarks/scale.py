"""python -m benchmarks.scale [SECTION …] [--runs N] [--dir DIR]: throughput of 1 to 8 workers over slow networks.

Slow servers on the loopback stand for the network (`benchmarks.slow_server`). Each worker is a process that writes one
part of a saved plan. Beside each measured number is the one that a formula predicts (`benchmarks.scale_model`), from
what one worker does without limits. The cases take turns; ratios are medians of pairs in one turn. Outputs are written
to memory (/dev/shm), because the workers of this machine would share its disk; one section writes them to --dir.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks import scale_paper
from benchmarks.measure import machine, spread
from benchmarks.scale_cases import BLOCKS, CALIBRATION, SECTIONS, TENSORS, Case, Scale, rates
from benchmarks.slow_server import Limits

MEMORY = Path("/dev/shm")
HEADER = ("workers", "network", "latency", "files", "MB/s", "times the first row", "predicted MB/s",
          "measured / predicted", "predicted limit", "cores that others used")  # fmt: skip


def row(scale: Scale, case: Case, first: Case) -> str:
    prediction, found = scale.predict(case), rates(scale, case)
    predicted = scale.bytes_of(case) / 1e6 / prediction.seconds
    ratios = [own / one for one, own in zip(rates(scale, first), found, strict=True)]
    cells = (case.workers, network_text(case.limits), f"{case.limits.latency * 1e3:g} ms", files_text(scale, case),
             spread(found, 1), f"{statistics.median(ratios):.2f}", f"{predicted:.1f}",
             f"{statistics.median(found) / predicted:.2f}", prediction.limit, f"{scale.others(case):.1f}")  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def network_text(limits: Limits) -> str:
    if limits.connection_rate:
        return f"{limits.connection_rate / 1e6:g} MB/s for each request"
    return f"{limits.links} x {limits.link_rate / 1e6:g} MB/s" if limits.link_rate else "no limit"


def files_text(scale: Scale, case: Case) -> str:
    return f"{len(scale.plan(case)[1].shards)}{', large tensors' if case.is_large else ''}"


def report(scale: Scale, sections: Sequence[str], runs: int) -> None:
    print(f"{machine()}\n`python -m benchmarks.scale --runs {runs}`: median (minimum to maximum)")
    others = spread(each.others for case in scale.found.values() for each in case)
    print(f"Cores that other processes used meanwhile, and that are not counted on in predictions: {others}\n")
    print("| one worker without limits, from | MB/s in a file | ms more for a file | CPU to start, s | CPU, s/GB "
          "| MB in a request |\n|---|---|---|---|---|---|")  # fmt: skip
    for (scheme, is_large), worker in scale.workers.items():
        ranges = scale.ranges(scheme, is_large)
        print(
            f"| {scheme}{', large tensors' if is_large else ''} | {worker.rate / 1e6:.0f} "
            f"| {worker.file_seconds * 1e3:.0f} | {worker.cpu_to_start:.2f} | {worker.cpu_per_byte * 1e9:.1f} "
            f"| {sum(ranges) / len(ranges) / 1e6:.2f} |"
        )
    for title in sections:
        print(f"\n### {title}\n\n| {' | '.join(HEADER)} |\n{'|---' * len(HEADER)}|")
        for case in SECTIONS[title]:
            print(row(scale, case, SECTIONS[title][0]), flush=True)
    print("\n### Finishing a folder\n\n| files | bytes | s |\n|---|---|---|")
    for shard_size in (BLOCKS, TENSORS):
        case = Case(1, shard_size=shard_size, output="disk")
        seconds = spread([scale.finish(case) for _ in range(runs)])
        print(f"| {files_text(scale, case)} | {scale.bytes_of(case):,} | {seconds} |", flush=True)
    print(f"\n### On paper\n\n| {' | '.join(scale_paper.HEADER)} |\n{'|---' * len(scale_paper.HEADER)}|")
    print("\n".join(scale_paper.rows(scale.workers["s3", True])))


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.partition("\n\n")[2])
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), help="such as 'From S3'; all if none is given")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="folder for the source and outputs")
    parser.add_argument("--layers", type=int, default=16, help="equal blocks of the checkpoint, 9.6 MB each")
    args = parser.parse_args()
    if unknown := set(args.sections) - SECTIONS.keys():
        parser.error(f"no section {', '.join(unknown)}; the sections are: {', '.join(SECTIONS)}")
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=args.dir)))
        memory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=MEMORY))) if MEMORY.is_dir() else place
        scale = Scale(place, memory, args.layers)
        for turn in range(args.runs):
            for case in dict.fromkeys([*CALIBRATION, *(case for title in args.sections for case in SECTIONS[title])]):
                print(f"turn {turn + 1}: {case}: {scale.measure(case).seconds:.2f} s", file=sys.stderr)
        scale.calibrate()
        report(scale, args.sections, args.runs)


if __name__ == "__main__":
    main()
