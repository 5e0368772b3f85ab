"""python -m benchmarks.gpu [MODEL] [--dir DIR]: what there is to know about `streamconv run --device cuda`.

Needs a CUDA GPU, the packages of the extra `test`, and disk for MODEL (dinov2_vitg14 by default) twice. Prints one JSON
object per finding, at most for ten minutes: a step that fails is a finding, too, and one that would not end in time is
skipped. `pytest` runs the steps of `IN_THIS_PROCESS` on a fake GPU.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

import streamconv
from benchmarks.measure import machine
from streamconv import Verification, VerificationOptions
from streamconv.verification.devices import choose_device, describe_gpu
from streamconv.verification.precision import exact_float32

SECONDS = 570
Finding = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """A folder for outputs, a small converted model, and the path of a large checkpoint. ``start`` is a time."""

    folder: Path
    small: Path
    small_output: Path
    large: Path
    start: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float:
        return SECONDS - (time.monotonic() - self.start)


def summary(found: Verification) -> Finding:
    numbers = {check.name: check.numbers for check in found.checks}
    parity = numbers["parity"]
    return {
        "passed": found.passed, "parity": found.check("parity").passed, "device": found.device,
        "device_note": found.device_note, "seconds": found.seconds,
        "seconds_of_checks": {name: each.get("seconds") for name, each in numbers.items()},
        "largest": parity.get("largest"), "tolerance": parity.get("tolerance"),
        "largest_in_float32": parity.get("float32", {}).get("largest"), "float32_only": parity.get("float32_only"),
        "problems": [problem[:200] for check in found.checks for problem in check.problems][:3], "memory": found.memory,
    }  # fmt: skip


def verify(output: Path, source: Path) -> Finding:
    return summary(streamconv.verify(output, source, VerificationOptions(device="cuda")))


def command(work: Work, *words: object, **environment: str) -> Finding:
    """Run streamconv in a process of its own."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "streamconv", *map(str, words)],
        capture_output=True, text=True, env={**os.environ, **environment}, timeout=work.seconds_left,
    )  # fmt: skip
    last = (done.stdout + done.stderr).strip().splitlines()[-6:]
    return {"code": done.returncode, "seconds": time.monotonic() - start, "last_lines": last}


def gpu(work: Work) -> Iterator[Finding]:
    """The machine, the GPU and the libraries."""
    start = time.monotonic()
    device = choose_device("cuda").device
    seconds = time.monotonic() - start
    kernels = torch.cuda.get_arch_list()
    yield {"machine": machine(), **describe_gpu(device), "kernels": kernels, "seconds_to_prove_it": seconds}


def precision(work: Work) -> Iterator[Finding]:
    """Errors of float32 with the caller's TF32, and with what a verification makes of it: 1e-4 and 1e-7, relatively."""
    device = choose_device("cuda").device
    caller = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        for is_exact in (False, True):
            x, weight = torch.randn(512, 768, device=device), torch.randn(768, 768, device=device)
            image, filters = torch.randn(1, 3, 224, 224, device=device), torch.randn(384, 3, 14, 14, device=device)
            with exact_float32(device) if is_exact else nullcontext():
                product, patches = x @ weight, functional.conv2d(image, filters, stride=14)
            for name, found, right in (
                ("product", product, x.double() @ weight.double()),
                ("convolution", patches, functional.conv2d(image.double(), filters.double(), stride=14)),
            ):
                yield {"of": name, "exact": is_exact, "error": float((found - right).abs().max() / right.abs().max())}
    finally:
        torch.set_float32_matmul_precision(caller)


def right(work: Work) -> Iterator[Finding]:
    """A correct output, twice: the first run starts CUDA's libraries."""
    for _ in range(2):
        yield verify(work.small_output, work.small)


def wrong(work: Work) -> Iterator[Finding]:
    """Outputs that are slightly wrong. All but the last must fail parity, and that one fails the bytes check."""
    query, key = (f"encoder.layer.1.attention.attention.{name}.weight" for name in ("query", "key"))
    scale, dense = "encoder.layer.1.layer_scale1.lambda1", "encoder.layer.1.attention.output.dense.weight"
    changes: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
        "every tensor in float16": lambda state: [value.copy_(value.half()) for value in state.values()],
        "one tensor in bfloat16": lambda state: state[dense].copy_(state[dense].bfloat16()),
        "one LayerScale value off by 1 %": lambda state: state[scale][3:4].mul_(1.01),
        "query and key swapped": lambda state: state.update({query: state[key], key: state[query]}),
        "last bit of one weight": lambda state: state[query].view(torch.int32)[5, 5].bitwise_xor_(1),
    }
    path = work.small_output / "model.safetensors"
    data = path.read_bytes()
    try:
        for name, change in changes.items():
            state = {each: value.clone() for each, value in load_file(path).items()}
            change(state)
            save_file(state, path, metadata={"format": "pt"})
            yield {"change": name, **verify(work.small_output, work.small)}
            path.write_bytes(data)
    finally:
        path.write_bytes(data)


def large(work: Work) -> Iterator[Finding]:
    """The large model: convert and verify in a process of its own; then verify here, and count allocations."""
    output = work.folder / "large"
    yield command(work, "run", work.large, "-o", output, "--device", "cuda")
    for _ in range(2):
        before = torch.cuda.memory_stats().get("num_device_alloc", 0)
        found = verify(output, work.large)
        yield {**found, "allocations": torch.cuda.memory_stats().get("num_device_alloc", 0) - before}


def commands(work: Work) -> Iterator[Finding]:
    """GPUs by index in a fresh process, one that does not exist, and hidden ones."""
    for device, environment in (
        ("cuda:0", {}), ("cuda:99", {}), ("cuda", {"CUDA_VISIBLE_DEVICES": ""}), ("auto", {"CUDA_VISIBLE_DEVICES": ""}),
    ):  # fmt: skip
        ran = command(work, "verify", work.small_output, work.small, "--device", device, **environment)
        yield {"device": device, **environment, **ran}


def small_memory(work: Work) -> Iterator[Finding]:
    """How much memory float64 and float32 need, and what is reported if it is not there."""
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        for megabytes in (2000, 200, 100, 50, 20):
            gc.collect()  # earlier models are in reference cycles
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(megabytes * 1e6 / total)
            try:
                yield {"megabytes": megabytes, **verify(work.small_output, work.small)}
            except streamconv.UsageError as error:
                yield {"megabytes": megabytes, "error": str(error)}
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def attention(work: Work) -> Iterator[Finding]:
    """The kernel that torch chooses (2: memory-efficient, 0: the formula), and whether strides change the result."""
    for dtype in (torch.float32, torch.float64):
        for heads in (6, 24):
            fused = torch.randn(1, 257, 3, heads, 64, device="cuda", dtype=dtype).permute(2, 0, 3, 1, 4)
            apart = [each.contiguous() for each in fused]
            one, other = (functional.scaled_dot_product_attention(*each) for each in (fused, apart))
            choices = [torch._fused_sdp_choice(*each) for each in (fused, apart)]
            yield {"dtype": str(dtype), "heads": heads, "choices": choices, "equal": torch.equal(one, other)}


def copies(work: Work) -> Iterator[Finding]:
    """Bytes per second from the CPU to the GPU."""
    weights = torch.randn(64 << 20)
    for name, source in (("pageable", weights), ("pinned", weights.pin_memory())):
        for _ in range(2):
            torch.cuda.synchronize()
            start = time.perf_counter()
            source.to("cuda")
            torch.cuda.synchronize()
            rate = source.nbytes / (time.perf_counter() - start)
        yield {"memory": name, "bytes_per_second": rate}


def kernels(work: Work) -> Iterator[Finding]:
    """Which kernels take the GPU's time in a verification, and whether one has TF32 in its name."""
    from torch.profiler import ProfilerActivity, profile

    start = time.monotonic()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        verify(work.small_output, work.small)
    events = sorted(seen.key_averages(), key=lambda event: -event.self_device_time_total)
    yield {
        "seconds": time.monotonic() - start,
        "seconds_of_gpu": sum(event.self_device_time_total for event in events) / 1e6,
        "longest": [(event.key[:100], event.count, event.self_device_time_total / 1e3) for event in events[:20]],
        "tf32": [event.key[:100] for event in events if "tf32" in event.key.lower()],
    }


def tests(work: Work) -> Iterator[Finding]:
    """The tests that need a GPU."""
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=work.seconds_left)
    yield {"code": done.returncode, "last_lines": done.stdout.strip().splitlines()[-8:]}


Step = Callable[[Work], Iterator[Finding]]
# With the seconds that a step may need. The most important ones come first.
IN_THIS_PROCESS: list[tuple[Step, int]] = [(gpu, 5), (precision, 5), (right, 20), (wrong, 30)]
ALL: list[tuple[Step, int]] = [
    *IN_THIS_PROCESS, (large, 150), (commands, 60), (small_memory, 30), (attention, 10), (copies, 10), (kernels, 20),
    (tests, 90),
]  # fmt: skip


def record(work: Work, steps: list[tuple[Step, int]]) -> Iterator[Finding]:
    """Run steps and yield their findings."""
    for step, seconds in steps:
        if seconds > work.seconds_left:
            yield {"step": step.__name__, "skipped": "too little time is left"}
            continue
        try:
            for finding in step(work):
                yield {"step": step.__name__, "at": round(time.monotonic() - work.start, 1), **finding}
        except Exception as error:
            trace = traceback.format_exc().splitlines()[-6:]
            yield {"step": step.__name__, "failed": f"{type(error).__name__}: {error}"[:500], "trace": trace}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="dinov2_vitg14")
    parser.add_argument("--dir", type=Path, help="folder for the source and outputs")
    args = parser.parse_args()
    choose_device("cuda")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=args.dir) as place:
        folder = Path(place)
        small = streamconv.synth("dinov2_vits14", folder / "small.pth").backbone
        output = streamconv.convert(small, folder / "small").output
        large_source = streamconv.synth(args.model, folder / "large.pth").backbone
        for finding in record(Work(folder, small, Path(output), large_source, start), ALL):
            print(json.dumps({"model": args.model, **finding}, default=str), flush=True)


if __name__ == "__main__":
    try:
        main()
    except streamconv.StreamconvError as error:
        sys.exit(str(error))
