"""python -m benchmarks.expressions [--pairs N] [--mb MB] [--dir DIR] [KIND …]: rearranged tensors against a plain copy.

Each kind of tensor is written from the page cache by the program's writer, in turns with a plain copy of as many bytes,
each in a process of its own. Their outputs are compared with torch's, which does the same in memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import ENVIRONMENT, machine, memory_of, remove, spread
from streamconv.formats.checkpoint import open_checkpoint
from streamconv.output.folder import open_output_folder
from streamconv.output.manifest import Provenance
from streamconv.output.writer import write_shard
from streamconv.planning.shards import make_shard
from streamconv.tensors.checksums import RecordChecks
from streamconv.tensors.concatenation import concat, reshape, stack
from streamconv.tensors.expressions import Expression
from streamconv.tensors.tiles import is_gathered

if TYPE_CHECKING:
    import torch

HIDDEN, HEAD, PARTS = 1536, 64, 8  # of ViT-g
NAME = "model.safetensors"
Tensors = Mapping[str, Expression]


def joined(tensors: Tensors) -> dict[str, Expression]:
    """Concatenate eight tensors along dim 1."""
    return {name: concat(each, 1) for name, each in groups_of(tensors).items()}


def rope(tensors: Tensors) -> dict[str, Expression]:
    """Reorder each head's rows from pairs of neighbours to two halves."""
    halves = (HIDDEN // HEAD, HEAD // 2, 2, HIDDEN)
    return {name: reshape(reshape(each, halves).transpose(1, 2), each.shape) for name, each in small(tensors).items()}


def stacked(tensors: Tensors) -> dict[str, Expression]:
    """Stack eight experts."""
    return {name: stack(each) for name, each in groups_of(tensors).items()}


def transposed(tensors: Tensors) -> dict[str, Expression]:
    return {"large": tensors["large"].transpose(0, 1)}


def small(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: each for name, each in tensors.items() if name != "large"}


def groups_of(tensors: Mapping[str, Any]) -> dict[str, list[Any]]:
    names = [*small(tensors)]
    return {names[at]: [tensors[name] for name in names[at : at + PARTS]] for at in range(0, len(names), PARTS)}


KINDS: dict[str, Callable[[Tensors], Mapping[str, Expression]]] = {
    "joined": joined,
    "rope": rope,
    "stacked": stacked,
    "transposed": transposed,
    "copy": small,
    "copy of the large one": lambda tensors: {"large": tensors["large"]},
}


def with_torch(kind: str, state: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    import torch

    if kind == "joined":
        return {name: torch.cat(each, 1) for name, each in groups_of(state).items()}
    if kind == "stacked":
        return {name: torch.stack(each) for name, each in groups_of(state).items()}
    if kind == "rope":
        halves = (HIDDEN // HEAD, HEAD // 2, 2, HIDDEN)
        return {
            name: each.view(halves).transpose(1, 2).reshape(each.shape).contiguous()
            for name, each in small(state).items()
        }
    return {"large": state["large"].T.contiguous()}


def write(kind: str, source: Path, out: Path) -> None:
    """Write a file, and print the seconds, the CPU seconds and the peak memory of this process in MB.

    Planning and the import of numpy, which takes as long for any size, are not timed.
    """
    with (
        open_checkpoint(source) as checkpoint,
        open_output_folder(out, Provenance(source={}, plan=""), [NAME], 0) as folder,
    ):
        shard = make_shard(NAME, KINDS[kind](checkpoint))
        if any(is_gathered(tensor) for _, tensor in shard.tensors):
            import numpy  # noqa: F401 - so that its import is not timed
        start, cpu = time.perf_counter(), time.process_time()
        write_shard(shard, folder, checkpoint.reader, RecordChecks(checkpoint.reader), lambda at, is_kept: None)
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(json.dumps([wall, cpu, memory_of(os.getpid())["VmHWM"]]))


def measured(kind: str, source: Path, out: Path) -> tuple[float, float, float]:
    """Return the seconds, the CPU seconds and the peak memory in MB of a new process that writes ``out``."""
    words = [sys.executable, "-m", "benchmarks.expressions", "--write", kind, str(source), str(out)]
    remove(out)
    os.sync()
    time.sleep(1)  # the pages of the file before are freed
    found = subprocess.run(words, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    wall, cpu, peak = json.loads(found.stdout)
    return wall, cpu, peak


def make_source(path: Path, size: int) -> "dict[str, torch.Tensor]":
    """Save random tensors of ViT-g's shapes in float32, and a large matrix in bfloat16; return them."""
    import torch

    count = max(PARTS, size // (4 * HIDDEN * HIDDEN) // PARTS * PARTS)
    side = int((size / 2) ** 0.5) // 512 * 512
    generator = torch.Generator().manual_seed(0)
    state = {f"{i}": torch.randn(HIDDEN, HIDDEN, generator=generator) for i in range(count)}
    state["large"] = torch.randn(side, side, generator=generator, dtype=torch.bfloat16)
    torch.save(state, path)
    return state


def compare(kind: str, source: Path, out: Path, state: "dict[str, torch.Tensor]", pairs: int) -> str:
    """Measure a kind in turns with a plain copy; return a row of a table."""
    from safetensors.torch import load_file
    from torch import equal, set_num_threads

    copy = "copy of the large one" if kind == "transposed" else "copy"
    runs = [(measured(copy, source, out), measured(kind, source, out)) for _ in range(pairs)]
    seconds = []
    for threads in (1, os.cpu_count() or 1):
        set_num_threads(threads)
        each = []
        for _ in range(pairs):
            start = time.perf_counter()
            wanted = with_torch(kind, state)
            each.append(time.perf_counter() - start)
        seconds.append(min(each))
    found = load_file(out / NAME)
    if found.keys() != wanted.keys() or not all(equal(found[name], value) for name, value in wanted.items()):
        raise SystemExit(f"{kind}: the output is not torch's")
    size = (out / NAME).stat().st_size
    speed = spread(a[0] / b[0] for a, b in runs)
    cpu = spread(a[1] / b[1] for a, b in runs)
    more = statistics.median(b[2] - a[2] for a, b in runs)
    medians = " | ".join(f"{statistics.median(run[i][j] for run in runs):.2f}" for j in (0, 1) for i in (0, 1))
    torch_seconds = ", ".join(f"{each:.2f}" for each in seconds)
    return f"| {kind} | {size / 1e6:,.0f} | {medians} | {speed} | {cpu} | {more:+.0f} | {torch_seconds} |"


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(prog="python -m benchmarks.expressions", description=__doc__.partition("\n\n")[2])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="; ".join(KINDS))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--mb", type=int, default=512, help="size of each kind in MiB")
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="folder for the source and outputs")
    parser.add_argument("--write", nargs=3, metavar=("KIND", "SOURCE", "OUT"), help="one run, as the others do it")
    args = parser.parse_args()
    if args.write:
        write(args.write[0], *map(Path, args.write[1:]))
        return
    print(f"{machine()}, load {os.getloadavg()[0]:.1f}\n")
    print(
        "| kind | MB | copy, s | kind, s | copy, CPU s | kind, CPU s | speed / copy's | CPU, copy / kind | MB more | "
        "torch, s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=args.dir) as place:
        source = Path(place, "source.pth")
        state = make_source(source, args.mb << 20)
        for kind in args.kinds or [kind for kind in KINDS if not kind.startswith("copy")]:
            print(compare(kind, source, Path(place, "out"), state, args.pairs), flush=True)
    print(f"\nload {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
