"""python -m benchmarks.verify [MODEL] [--runs N] [--dir DIR]: time and memory of `streamconv run` on a CPU.

Each run is a process of its own, in memory cgroups of several sizes. The output also compares the
arithmetic rate of the parity check with that of this machine's matrix product.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import Cgroup, machine, made_source, parse_arguments

LIMITS_MB = (None, 1024, 768)
SETTLE_SECONDS = 4


def flops(dimensions: Any) -> float:
    """Floating-point operations of a forward pass at the native size: two per token and weight, and attention's."""
    tokens, hidden, ffn = dimensions.positions, dimensions.hidden, dimensions.ffn
    feed_forward = 3 * hidden * ffn if dimensions.swiglu else 2 * hidden * ffn
    linear = 2 * tokens * (4 * hidden**2 + feed_forward)
    attention = 4 * tokens**2 * hidden
    return float(dimensions.layers * (linear + attention))


def matmul_rate(dimensions: Any) -> dict[str, float]:
    """FLOP/s of the model's largest matrix product, with torch's default library and with oneDNN."""
    import torch
    from torch.nn import functional

    from streamconv.verification.offload import exact_layers

    rows = dimensions.ffn * 2 if dimensions.swiglu else dimensions.ffn
    x, weight = torch.randn(dimensions.positions, dimensions.hidden), torch.randn(rows, dimensions.hidden)

    def best() -> float:
        times: list[float] = []
        for _ in range(9):
            start = time.perf_counter()
            functional.linear(x, weight)
            times.append(time.perf_counter() - start)
        return float(2 * x.numel() * rows / min(times))

    own = best()
    with exact_layers():
        return {"torch's own": own, "oneDNN": best()}


def measure(source: Path, out: Path, limit_mb: int | None) -> dict[str, Any] | None:
    """Wall seconds and verification of one run; None if it was killed or the limit cannot be set."""
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run(["sync"], check=True)
    time.sleep(SETTLE_SECONDS)
    group = Cgroup(limit_mb << 20) if limit_mb else None
    command = [sys.executable, "-m", "streamconv", "run", str(source), "-o", str(out), "--device", "cpu", "--json"]
    try:
        if group is not None and group.path is None:
            return None
        start = time.monotonic()
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, preexec_fn=group.enter if group else None
        )
        wall = time.monotonic() - start
    finally:
        if group is not None:
            group.close()
    return {"wall": wall, **json.loads(done.stdout)["verification"]} if done.returncode == 0 else None


def main() -> None:
    args = parse_arguments(__doc__, runs=3)
    with made_source(args.model, args.dir) as (source, out):
        runs: dict[int | None, list[dict[str, Any] | None]] = {limit: [] for limit in LIMITS_MB}
        for _ in range(args.runs):
            for limit in LIMITS_MB:
                found = measure(source, out, limit)
                print(f"{limit}: {found['wall']:.1f} s" if found else f"{limit}: killed", file=sys.stderr)
                runs[limit].append(found)
        print(f"{args.model}, {source.stat().st_size:,} bytes; {machine()}")
        print(
            f"`python -m benchmarks.verify {args.model} --runs {args.runs}`: median (minimum to maximum), interleaved\n"
        )
        print(
            "| memory limit | run, wall s | bytes, s | parity, s | preprocessing, s "
            "| peak MB, growth after importing torch |"
        )
        print("|---|---|---|---|---|---|")
        for limit, results in runs.items():
            ended = [result for result in results if result]
            name = f"{limit} MB" if limit else "none"
            if len(ended) < len(results):
                print(f"| {name} | killed or not run: {len(results) - len(ended)} of {len(results)} | | | | |")
                continue
            walls = [result["wall"] for result in ended]
            cells = [f"{statistics.median(walls):.1f} ({min(walls):.1f} to {max(walls):.1f})"]
            for check in (0, 2, 3):
                cells.append(f"{statistics.median(r['checks'][check]['numbers']['seconds'] for r in ended):.1f}")
            peak = max(r["memory"]["host_anonymous_peak"] for r in ended)
            start = max(r["memory"]["host_anonymous_start"] for r in ended)
            print(f"| {name} | " + " | ".join(cells) + f" | {peak / 1e6:.0f}, {(peak - start) / 1e6:.0f} |")
    from streamconv.families.registry import find_model

    dimensions = find_model(args.model)[1].dimensions
    rates, work = matmul_rate(dimensions), 2 * flops(dimensions)
    ended = [result for result in runs[None] if result]
    seconds = statistics.median(r["checks"][2]["numbers"]["seconds"] for r in ended)
    print(f"\nParity: {work / 1e12:.2f} TFLOP in {seconds:.1f} s, {work / seconds / 1e9:.0f} GFLOP/s: ", end="")
    print(", ".join(f"{work / seconds / rate:.0%} of {name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items()))


if __name__ == "__main__":
    main()
