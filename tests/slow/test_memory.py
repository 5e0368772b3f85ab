"""Peak memory does not grow with the model."""

import json
from pathlib import Path

import pytest
import torch

from tests import api
from tests.checkpoints import TORCH_DTYPES, converted_folder, make_states
from tests.file_server import FileServer
from tests.support import Save, linux, peak_kb, run_python, tiny


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="VmHWM is Linux's")
def test_memory_of_converting_does_not_grow_with_the_model(tmp_path: Path, save: Save) -> None:
    small, _ = save(tiny(), "small")
    large, _ = save(tiny(layers=24, hidden=1024), "large")  # 1.2 GB, as ViT-L
    assert large.stat().st_size > 1000 * 2**20 > 100 * small.stat().st_size
    peaks = [
        peak_kb(f"import streamconv; streamconv.convert({str(source)!r}, {str(tmp_path / source.stem)!r})")
        for source in (small, large)
    ]
    assert peaks[1] < 32 * 1024
    # The buffers that a small model does not fill, and 20 times the keys.
    assert peaks[1] - peaks[0] < 8 * 1024


PEAK = "\nprint(*(l.split()[1] for l in open('/proc/self/status') if l[:5] == 'VmHWM'))"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="VmHWM is Linux's")
@pytest.mark.parametrize(("stored", "dtype"), [("float32", "float16"), ("bfloat16", "float32")])
def test_memory_of_casting_does_not_grow_with_the_model(tmp_path: Path, stored: str, dtype: str) -> None:
    peaks = []
    for name, geometry in (("small", tiny()), ("large", tiny(layers=24, hidden=512))):
        state = {key: value.to(TORCH_DTYPES[stored]) for key, value in make_states(geometry)[0].items()}
        torch.save(state, tmp_path / f"{name}.pth")
        words = f"{str(tmp_path / name)!r} + '.pth', {str(tmp_path / name)!r}, dtype={dtype!r}"
        peaks.append(int(run_python(f"import streamconv; streamconv.convert({words})" + PEAK)))
    assert peaks[1] < 64 * 1024  # numpy is 13 MB of it
    assert peaks[1] - peaks[0] < 8 * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="VmHWM is Linux's")
def test_memory_of_streaming_does_not_grow_with_the_model(server: FileServer, tmp_path: Path) -> None:
    peaks = []
    for name, layers in (("small", 2), ("large", 24)):
        torch.save(make_states(tiny(layers=layers, hidden=512))[0], server.folder / f"{name}.pth")
        code = (
            f"import streamconv; streamconv.convert('{server.url}/{name}.pth', {str(tmp_path / name)!r}, stream=True)"
        )
        code += "\nprint(*(l.split()[1] for l in open('/proc/self/status') if l[:5] == 'VmHWM'))"
        peaks.append(int(run_python(code)))
    assert (server.folder / "large.pth").stat().st_size > 250 << 20
    assert peaks[1] < 36 * 1024
    assert peaks[1] - peaks[0] < 4 * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="VmHWM is Linux's")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_memory_of_reverting_does_not_grow_with_the_model(tmp_path: Path, suffix: str) -> None:
    peaks = []
    for name, geometry in (("small", tiny()), ("large", tiny(layers=24, hidden=640))):  # 3 and 480 MB
        (tmp_path / name).mkdir()
        folder = converted_folder(tmp_path / name, geometry)
        path = tmp_path / f"{name}{suffix}"
        peaks.append(peak_kb(f"import streamconv; streamconv.revert({str(folder)!r}, {str(path)!r})"))
        assert path.stat().st_size >= (folder / "model.safetensors").stat().st_size - 100_000
    assert peaks[1] < 32 * 1024
    assert peaks[1] - peaks[0] < 4 * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="VmHWM is Linux's")
def test_memory_of_making_a_synthetic_checkpoint_is_bounded(tmp_path: Path) -> None:
    code = (
        f"import streamconv; streamconv.synth('dinov2_vitb14', {str(tmp_path / 'x.pth')!r})\n"
        "print(*(l.split()[1] for l in open('/proc/self/status') if l[:5] == 'VmHWM'))"
    )
    assert int(run_python(code)) < 100 * 1024


def test_memory_of_streamed_verification_does_not_grow_with_the_model(server: FileServer, tmp_path: Path) -> None:
    """The original's weights are read into memory that is given back, layer by layer."""
    peaks = []
    code = "import streamconv, json; found = streamconv.verify({!r}, {!r}, device='cpu', stream=True);"
    code += "print(json.dumps(dict(found.memory)))"
    for name, layers in (("small", 4), ("large", 28)):
        torch.save(make_states(tiny(layers=layers, hidden=512))[0], server.folder / f"{name}.pth")
        place = f"{server.url}/{name}.pth"
        api.convert(place, tmp_path / name, stream=True)
        peaks.append(json.loads(run_python(code.format(str(tmp_path / name), place)).splitlines()[-1]))
    grown = [peak["host_anonymous_peak"] - peak["host_anonymous_start"] for peak in peaks]
    assert grown[1] - grown[0] < 48 << 20, peaks


@linux
def test_memory_of_verification_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Anonymous and resident memory of a process of its own, for 29 MB and 285 MB of weights."""
    code = f"""
import json, sys
from pathlib import Path
import streamconv, torch
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.checkpoints import make_states
from tests.support import tiny
layers, folder = int({{}}), Path({str(tmp_path)!r}, "{{}}")
folder.mkdir()
torch.save(make_states(tiny(layers=layers, hidden=768))[0], folder / "x.pth")
api.convert(folder / "x.pth", folder / "out")
"""
    verify = """
import json, streamconv
found = streamconv.verify({!r}, {!r}, device="cpu")
assert found.passed
print(json.dumps(found.memory))
"""
    peaks = []
    for layers in (1, 10):
        run_python(code.format(layers, layers))
        folder = tmp_path / str(layers)
        peaks.append(json.loads(run_python(verify.format(str(folder / "out"), str(folder / "x.pth")))))
    anonymous = [peak["host_anonymous_peak"] - peak["host_anonymous_start"] for peak in peaks]
    assert abs(anonymous[1] - anonymous[0]) < 24 << 20, peaks
    # Resident memory may hold what was used last of both files (RECENT_BYTES each), and neither of them whole.
    resident = [peak["host_peak"] - peak["host_start"] for peak in peaks]
    assert resident[1] - resident[0] < 300 << 20, peaks
