"""Peak memory does not grow with the model.

The large models are sparse files: their weights are holes, which cost no disk and read as zeros.
"""

import json
import os
from pathlib import Path

import pytest

from tests import api
from tests.file_server import FileServer
from tests.support import linux, peak_kb, run_python, save_zeros, tiny

pytestmark = linux
SMALL, LARGE = tiny(layers=2, hidden=512), tiny(layers=24, hidden=512)  # 29 and 300 MB
VIT_L = tiny(layers=24, hidden=1024)  # 1.2 GB


# About 10 MB of each limit are pages of mapped libraries, whose number depends on what is in the page cache.
JOBS = {
    "convert": ("streamconv.convert({source!r}, {output!r})", "F32", 36 << 10, 8 << 10),
    "cast to float16": (
        "streamconv.convert({source!r}, {output!r}, streamconv.ConversionOptions(dtype='float16'))", "F32",
        64 << 10, 8 << 10,  # numpy is 13 MB of it
    ),
    "cast to float32": (
        "streamconv.convert({source!r}, {output!r}, streamconv.ConversionOptions(dtype='float32'))", "BF16",
        64 << 10, 8 << 10,
    ),
    "stream": (
        "streamconv.convert({address!r}, {output!r}, streamconv.ConversionOptions(stream=True))", "F32",
        44 << 10, 4 << 10,  # urllib3 and its threads are 3 MB of it
    ),
    "run": (  # torch is imported into another process
        "streamconv.run({source!r}, {output!r}, verification=streamconv.VerificationOptions('cpu', parity=False))",
        "F32", 48 << 10, 8 << 10,
    ),
    "revert to .pth": ("streamconv.revert({folder!r}, {output!r} + '.pth')", "F32", 36 << 10, 4 << 10),
    "revert to .safetensors": ("streamconv.revert({folder!r}, {output!r} + '.safetensors')", "F32", 36 << 10, 4 << 10),
}  # fmt: skip


@pytest.mark.parametrize("job", JOBS)
def test_memory_does_not_grow_with_the_model(server: FileServer, tmp_path: Path, job: str) -> None:
    """``limit_kb`` bounds a large model's peak; ``growth_kb`` allows for buffers that a small model does not fill."""
    code, dtype, limit_kb, growth_kb = JOBS[job]
    peaks = []
    for name, geometry in (("small", SMALL), ("large", VIT_L if job == "convert" else LARGE)):
        source = save_zeros(server.folder / f"{name}.pth", geometry, dtype)
        places = {"source": str(source), "address": f"{server.url}/{name}.pth", "output": str(tmp_path / name)}
        if "{folder!r}" in code:
            places["folder"] = str(api.convert(source, tmp_path / f"{name} folder").output)
        peaks.append(peak_kb(f"import streamconv; {code.format(**places)}"))
    assert (server.folder / "large.pth").stat().st_size > 10 * (server.folder / "small.pth").stat().st_size
    assert peaks[1] < limit_kb
    assert peaks[1] - peaks[0] < growth_kb


def test_memory_of_making_a_synthetic_checkpoint_is_bounded(tmp_path: Path) -> None:
    assert peak_kb(f"import streamconv; streamconv.synth('dinov2_vitb14', {str(tmp_path / 'x.pth')!r})") < 100 << 10


EVALUATE = """
from pathlib import Path
from streamconv.files.base import ByteRange
from streamconv.files.local import LocalFile
from streamconv.files.reader import Reader
from streamconv.tensors.checksums import RecordChecks
from streamconv.tensors.evaluation import Evaluator
from streamconv.tensors.computed import cast, multiply
from streamconv.tensors.concatenation import concat, index_select, stack
from streamconv.tensors.expressions import Read, Record
from streamconv.tensors.info import TensorInfo
from streamconv.tensors.tiles import PIECE_BYTES, parts
file, side = LocalFile(Path({source!r})), {side}
record = Record(file.ref, "x", ByteRange(0, file.size))
x = Read(TensorInfo("F32", (side, side)), record, 0, (side, 1))
reader = Reader([file])
with Evaluator(reader, RecordChecks(reader)) as evaluator:
    buffer = memoryview(bytearray(PIECE_BYTES))
    for part in parts({tensor}):
        evaluator.evaluate("x", part, buffer[: part.values.info.nbytes])
"""


@pytest.mark.parametrize(
    "tensor",
    [
        "x.transpose(0, 1)",
        "cast(x.transpose(0, 1), 'F16')",
        "concat(x.chunk(8), 1)",
        "concat(x.chunk(8, 1), 0)",
        "stack([part.transpose(0, 1) for part in x.chunk(8)])",
        "multiply(x.transpose(0, 1), x)",
        "index_select(x, 0, [*range(0, side, 2), *range(1, side, 2)])",
        "index_select(x, 1, [(7 * i) % side for i in range(side)])",
    ],
)
def test_memory_of_evaluation_does_not_grow_with_the_tensor(tmp_path: Path, tensor: str) -> None:
    peaks = {}
    for side in (64, 1024, 8192):  # 16 kB, 4 MB, 268 MB
        (tmp_path / "x").write_bytes(b"")
        os.truncate(tmp_path / "x", 4 * side * side)
        peaks[side] = peak_kb(EVALUATE.format(source=str(tmp_path / "x"), side=side, tensor=tensor))
    plain = peak_kb(EVALUATE.format(source=str(tmp_path / "x"), side=8192, tensor="x"))
    assert peaks[8192] - plain < 64 << 10
    assert peaks[8192] - peaks[64] < 56 << 10  # a tile's sources and, for a product, its intermediate values


VERIFY = """
import json, streamconv
from streamconv import SourceOptions, VerificationOptions
found = streamconv.verify({!r}, {!r}, VerificationOptions(device="cpu"), SourceOptions(stream={}))
assert found.passed
print(json.dumps(dict(found.memory)))
"""


def test_memory_of_streamed_verification_does_not_grow_with_the_model(server: FileServer, tmp_path: Path) -> None:
    """The original's weights are read into memory that is freed again, layer by layer."""
    peaks = []
    for name, layers in (("small", 4), ("large", 28)):
        save_zeros(server.folder / f"{name}.pth", tiny(layers=layers, hidden=512))
        address = f"{server.url}/{name}.pth"
        api.convert(address, tmp_path / name, stream=True)
        peaks.append(json.loads(run_python(VERIFY.format(str(tmp_path / name), address, True)).splitlines()[-1]))
    grown = [peak["host_anonymous_peak"] - peak["host_anonymous_start"] for peak in peaks]
    assert grown[1] - grown[0] < 48 << 20, peaks


def test_memory_of_verification_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Compare anonymous and resident memory of a separate process for 29 MB and 285 MB of weights."""
    peaks = []
    for layers in (1, 10):
        source = save_zeros(tmp_path / f"{layers}.pth", tiny(layers=layers, hidden=768))
        folder = api.convert(source, tmp_path / str(layers)).output
        peaks.append(json.loads(run_python(VERIFY.format(str(folder), str(source), False)).splitlines()[-1]))
    anonymous = [peak["host_anonymous_peak"] - peak["host_anonymous_start"] for peak in peaks]
    assert abs(anonymous[1] - anonymous[0]) < 24 << 20, peaks
    # Resident memory may include the most recent pages of both files (RECENT_BYTES each), but not a whole file.
    resident = [peak["host_peak"] - peak["host_start"] for peak in peaks]
    assert resident[1] - resident[0] < 300 << 20, peaks
