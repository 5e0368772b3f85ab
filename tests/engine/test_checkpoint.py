"""Checkpoint files: what is read equals what torch and safetensors read; everything else is refused."""

import argparse
import io
import os
import pickle
import re
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import datetime
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import streamconv
from streamconv import CorruptError, NotACheckpointError, SourceError, SourceMissingError, TruncatedError
from streamconv.errors import UnsafePickleError
from streamconv.files import local as storage
from streamconv.formats.non_tensors import Kind, NonTensor
from streamconv.tensors.evaluation import read_bytes
from tests.checkpoints import NAMES, bytes_of
from tests.support import rewrite


@pytest.fixture
def pth(tmp_path: Path) -> Path:
    torch.save({"x": torch.arange(1000.0), "y": torch.ones(2)}, tmp_path / "x.pth")
    return tmp_path / "x.pth"


def test_opening_reads_only_the_index(tmp_path: Path, read_counts: list[int]) -> None:
    torch.save({f"layer.{i}": torch.zeros(1 << 20) for i in range(8)}, tmp_path / "big.pth")
    with streamconv.open_checkpoint(tmp_path / "big.pth") as checkpoint:
        assert len(checkpoint) == 8
    assert 0 < sum(read_counts) < 10_000


def test_parameters_and_module_metadata_are_read(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    torch.save({"weight": module.weight, "bias": module.bias}, tmp_path / "parameters.pth")
    torch.save(module.state_dict(), tmp_path / "state.pth")  # an OrderedDict with a _metadata attribute
    for name in ("parameters", "state"):
        with streamconv.open_checkpoint(tmp_path / f"{name}.pth") as checkpoint:
            assert read_bytes(checkpoint["weight"]) == bytes_of(module.weight.detach())


def test_renamed_file_keeps_its_record_prefix(pth: Path) -> None:
    renamed = pth.rename(pth.with_name("other-name.pt"))
    with streamconv.open_checkpoint(renamed) as checkpoint:
        assert checkpoint["y"].record.name == "x/data/1"


def test_fingerprint_depends_on_every_weight(tmp_path: Path) -> None:
    prints = []
    for value in (0.0, 0.0, 1.0):
        torch.save({"x": torch.full((4,), value)}, tmp_path / "x.pth")
        with streamconv.open_checkpoint(tmp_path / "x.pth") as checkpoint:
            prints.append(checkpoint.fingerprint)
    assert prints[0] == prints[1] != prints[2]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        NAMES.filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.lists(st.integers(0, 4), max_size=3), st.sampled_from([torch.float32, torch.int8, torch.bfloat16])
        ),
        max_size=5,
    )
)
def test_safetensors_are_read_like_the_library_reads_them(
    tmp_path: Path, shapes: dict[str, tuple[list[int], torch.dtype]]
) -> None:
    state = {name: torch.randint(-9, 9, shape).to(dtype) for name, (shape, dtype) in shapes.items()}
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    with streamconv.open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
        assert {name: read_bytes(tensor) for name, tensor in checkpoint.items()} == {
            k: bytes_of(v) for k, v in state.items()
        }


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)


def test_unknown_global_is_named_and_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"x": torch.ones(2), "evil": Evil()}, "evil.pth")
    with pytest.raises(UnsafePickleError, match=rf"{os.mkdir.__module__}\.mkdir"):
        streamconv.open_checkpoint("evil.pth")
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    "name", ["torch._utils _rebuild_tensors", "builtins eval", "torch load", "torch.serialization load"]
)
def test_other_torch_globals_are_refused(pth: Path, name: str) -> None:
    module, _, function = name.partition(" ")
    rewrite(pth, {"data.pkl": f"\x80\x02c{module}\n{function}\n.".encode("latin1")})
    with pytest.raises(UnsafePickleError, match=function):
        streamconv.open_checkpoint(pth)


@pytest.mark.parametrize(
    "name",
    ["os system", "posix system", "builtins eval", "__builtin__ open", "subprocess Popen", "importlib.util find"],
)
def test_harmful_global_is_refused_anywhere_in_the_pickle(pth: Path, name: str) -> None:
    module, _, function = name.partition(" ")
    rewrite(pth, {"data.pkl": f"\x80\x02}}X\x01\x00\x00\x00ac{module}\n{function}\ns.".encode("latin1")})
    with pytest.raises(UnsafePickleError, match=rf"names {module}.{function}, which no checkpoint needs"):
        streamconv.open_checkpoint(pth)


@pytest.mark.parametrize(
    "state", [{"offset": 1 << 40}, [None, None, 1 << 40], (None, {"offset": 1 << 40}), ({}, {"n": 1})]
)
def test_tensor_cannot_be_altered_after_it_was_checked(pth: Path, state: object) -> None:
    """BUILD sets attributes of any object on the stack; a tensor that was checked must not accept them."""
    with zipfile.ZipFile(pth) as archive:
        data = archive.read("x/data.pkl")
    end = data.index(b"X\x01\x00\x00\x00y")  # the first tensor is on the stack here
    build = pickle.dumps(state, protocol=2)[2:-1] + b"b"
    rewrite(pth, {"data.pkl": data[:end] + build + data[end:]})
    with pytest.raises(CorruptError):
        streamconv.open_checkpoint(pth)


def test_lazy_views_are_not_read_as_their_bytes(tmp_path: Path) -> None:
    lazy = {
        "conj": torch.ones(2, dtype=torch.complex64).conj(),
        "neg": torch.ones(2, dtype=torch.complex64).conj().imag,
    }
    torch.save({**lazy, "plain": torch.ones(1)}, tmp_path / "x.pth")
    with streamconv.open_checkpoint(tmp_path / "x.pth") as checkpoint:
        assert [*checkpoint] == ["plain"]
        assert {name: each.kind for name, each in checkpoint.non_tensors.items()} == dict.fromkeys(lazy, Kind.LAZY)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_truncated_file_is_reported_as_cut_short(pth: Path, share: float) -> None:
    data = pth.read_bytes()
    pth.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(TruncatedError, match=r"cut short\. Fetch it again"):
        streamconv.open_checkpoint(pth)


def test_truncated_file_is_reported_with_the_size_that_it_should_have(tmp_path: Path) -> None:
    state = {f"{i}.weight": torch.ones(100, 100) for i in range(20)}
    state["shared"] = state["0.weight"][:5]
    torch.save({"model": state, "epoch": 3}, tmp_path / "x.pth")
    data = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(data[:300_000])
    with pytest.raises(
        TruncatedError, match=r"x\.pth has 300,000 of at least [\d,]+ bytes: .* Fetch it again"
    ) as caught:
        streamconv.open_checkpoint(tmp_path / "x.pth")
    least = int(re.findall(r"at least ([\d,]+)", str(caught.value))[0].replace(",", ""))
    assert 20 * 40_000 < least <= len(data) < 1.02 * least
    (tmp_path / "x.pth").write_bytes(data + b"more")  # which the index does not explain
    with pytest.raises(TruncatedError, match="something was appended, or"):
        streamconv.open_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"no checkpoint at all", "a text file that begins 'no checkpoint at all'"),
        (b"\x00" * 64, "nothing but zeros"),
        (b"\x01\x02" * 64, "is not a torch.save checkpoint"),
    ],
)
def test_other_files_are_reported_as_not_a_checkpoint(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(NotACheckpointError, match=message):
        streamconv.open_checkpoint(tmp_path / "x.pth")


def test_torchscript_archive_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}.")
        archive.writestr("x/code/__torch__.py", b"")
    with pytest.raises(NotACheckpointError, match="TorchScript"):
        streamconv.open_checkpoint(tmp_path / "x.pt")


def test_missing_file_is_reported_as_missing(tmp_path: Path) -> None:
    for job in (streamconv.open_checkpoint, streamconv.plan):
        with pytest.raises(SourceMissingError, match="no such file") as caught:
            job(tmp_path / "x.pth")  # type: ignore[operator]
        assert caught.value.location == tmp_path / "x.pth"


def test_name_that_no_file_can_have_is_a_source_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="File name too long"):
        streamconv.open_checkpoint(tmp_path / ("x" * 300))


def test_checkpoint_that_is_not_a_dict_is_described(tmp_path: Path) -> None:
    for value, message in (([torch.ones(1)], "holds a list"), (torch.ones(1), "holds a tensor")):
        torch.save(value, tmp_path / "x.pth")
        with pytest.raises(NotACheckpointError, match=message):
            streamconv.open_checkpoint(tmp_path / "x.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pth")
    with pytest.raises(UnsafePickleError, match=r"a whole model, a torch.*Linear, whose code .*\.state_dict\(\)"):
        streamconv.open_checkpoint(tmp_path / "x.pth")


class Stage(Enum):
    LATE = 2


class Settings(argparse.Namespace):
    """A class from a module that streamconv never imports."""


@pytest.mark.parametrize("is_zip", [True, False])
def test_values_beside_the_tensors_are_skipped(tmp_path: Path, is_zip: bool) -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    training = {
        "model": layer.state_dict(),
        "teacher": {"backbone": OrderedDict(layer.state_dict()), "center": torch.ones(1, 4)},
        "optimizer": optimizer.state_dict(),
        "scheduler": {"milestones": Counter([3, 3]), "T_max": 10, "by": {(1, 2): 0.5, None: 1, 0.5: torch.ones(3)}},
        "epoch": 3,
        "args": Settings(lr=1e-3, betas=(0.9, 0.95), path=Path("a")),
        "history": [torch.ones(1), {"loss": np.float64(0.5)}],
        "seen": {"a", "b"},
        "stage": Stage.LATE,
        "recent": deque([1, 2, torch.ones(1)]),
        "sums": defaultdict(list, {"a": [1], "b": [torch.ones(1)]}),
        "rng": np.random.default_rng(0).bit_generator.state,
        "when": datetime(2026, 1, 2),
        "dtype": torch.float32,
        "size": torch.Size([2, 3]),
        "blob": bytes(range(256)),
        "loss": float("nan"),
        "name": "vit",
        "sparse": torch.eye(3).to_sparse(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    training["parameter"].extra = 1
    torch.save(training, tmp_path / "x.pth", _use_new_zipfile_serialization=is_zip)
    wanted = {"teacher.center": torch.ones(1, 4), "parameter": torch.ones(2), "scheduler.by.0.5": torch.ones(3)}
    for name in ("model", "teacher.backbone"):
        wanted |= {f"{name}.{key}": value for key, value in layer.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        wanted |= {f"optimizer.state.{i}.{key}": value for key, value in state.items()}
    with streamconv.open_checkpoint(tmp_path / "x.pth") as checkpoint:
        assert {name: read_bytes(tensor) for name, tensor in checkpoint.items()} == {
            name: bytes_of(value) for name, value in wanted.items()
        }
        assert list(checkpoint)[:5] == ["model.weight", "model.bias", *list(wanted)[5:7], "teacher.center"]
        assert checkpoint.non_tensors["args"] == NonTensor(f"{Settings.__module__}.Settings")
        assert checkpoint.non_tensors["sparse"] == NonTensor("sparse tensor", Kind.SPARSE)
        assert checkpoint.non_tensors["history"] == NonTensor("list", Kind.LIST)
        assert {"seen", "when", "rng.state", "blob"} & checkpoint.non_tensors.keys() >= {"seen", "when", "blob"}
        assert checkpoint.non_tensors["epoch"].kind is Kind.VALUE


def test_records_that_contradict_the_index_are_refused(pth: Path) -> None:
    whole = pth.read_bytes()
    for size in (3996, 4004):
        rewrite(pth, {"data/0": bytes(size)})
        with pytest.raises(CorruptError, match=f"{size} bytes, but its index gives it 1000 elements of F32"):
            streamconv.open_checkpoint(pth)
        pth.write_bytes(whole)
    rewrite(pth, {}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(NotACheckpointError, match="compressed"):
        streamconv.open_checkpoint(pth)
    pth.write_bytes(whole.replace(b"little", b"big---"))
    with pytest.raises(CorruptError, match="CRC-32"):
        streamconv.open_checkpoint(pth)


def test_view_beyond_its_storage_is_refused(pth: Path) -> None:
    with zipfile.ZipFile(pth) as archive:
        data = archive.read("x/data.pkl")
    number = b"M" + (1000).to_bytes(2, "little")
    assert data.count(number) == 2  # the storage's element count, then the tensor's shape
    at = data.rindex(number)
    rewrite(pth, {"data.pkl": data[:at] + b"M" + (1001).to_bytes(2, "little") + data[at + 3 :]})
    with pytest.raises(CorruptError, match="beyond its storage"):
        streamconv.open_checkpoint(pth)


def test_flipped_bit_in_the_index_is_found(pth: Path) -> None:
    data = bytearray(pth.read_bytes())
    data[data.index(b"FloatStorage") + 2] ^= 1
    pth.write_bytes(data)
    with pytest.raises(CorruptError, match="CRC-32"):
        streamconv.open_checkpoint(pth)


def test_damaged_zip_directory_is_not_reported_as_cut_short(pth: Path) -> None:
    data = bytearray(pth.read_bytes())
    data[data.rindex(b"PK\x01\x02")] ^= 1  # the last entry's magic number
    pth.write_bytes(data)
    with pytest.raises(CorruptError, match="damaged zip directory"):
        streamconv.open_checkpoint(pth)


def test_duplicate_record_names_are_refused(pth: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(pth, "a") as archive:
        archive.writestr("x/data/0", b"")
    with pytest.raises(CorruptError, match="two records"):
        streamconv.open_checkpoint(pth)


def test_inconsistent_safetensors_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for header, error in (
        (b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', CorruptError),
        (b'{"x":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}', CorruptError),
        (b'{"x":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}', SourceError),
        (b'{"x":{"dtype":"F32","shape":[200],"data_offsets":[0,800]}}', TruncatedError),
        (b'{"x":7}', CorruptError),
        (b'{"x":', CorruptError),
    ):
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        with pytest.raises(error):
            streamconv.open_checkpoint(path)


def test_index_cannot_name_files_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../secret.safetensors"}}')
    with pytest.raises(CorruptError, match="not a safetensors file in its folder"):
        streamconv.open_checkpoint(tmp_path)


def test_files_are_closed_when_opening_fails(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(b"not a checkpoint")
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    for _ in range(5):
        with pytest.raises(SourceError):
            streamconv.open_checkpoint(tmp_path / "x.pth")
    after = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    assert after == before


def test_file_saved_without_crcs_is_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    options = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        torch.save({"x": torch.arange(4.0)}, buffer)
    finally:
        torch.serialization.set_crc32_options(options)
    (tmp_path / "x.pth").write_bytes(buffer.getvalue())
    with streamconv.open_checkpoint(tmp_path / "x.pth") as checkpoint:
        assert checkpoint["x"].record.crc32 is None
        assert read_bytes(checkpoint["x"]) == bytes_of(torch.arange(4.0))


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="macOS has no such call")
@pytest.mark.parametrize(("memory", "wanted"), [(130 << 20, []), (100 << 20, [31 << 20, 63 << 20])])
def test_pages_of_a_file_larger_than_memory_are_dropped_after_they_were_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int, wanted: list[int]
) -> None:
    path = tmp_path / "x"
    path.touch()
    os.truncate(path, 65 << 20)
    advised: list[object] = []
    monkeypatch.setattr(storage, "_memory_bytes", lambda: memory)
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *arguments: advised.append(arguments))
    file, buffer = storage.LocalFile(path), memoryview(bytearray(1 << 20))
    for at in range(65):
        file.read_at(at << 20, buffer)
    file.close()
    assert advised == [(0, end, os.POSIX_FADV_DONTNEED) for end in wanted]
