"""Synthetic checkpoints can be loaded by torch and are the same for the same seed."""

import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import streamconv
from streamconv import OutputError, TensorInfo, UsageError
from streamconv.formats.torch_writer import write_pth
from streamconv.jobs.synth import temporary_checkpoint
from streamconv.progress import ignore_progress
from tests.checkpoints import NAMES, bytes_of


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        NAMES,
        st.tuples(st.sampled_from(["F32", "F16", "BF16", "F64"]), st.lists(st.integers(0, 5), max_size=4)),
        max_size=6,
    ),
    st.randoms(use_true_random=False),
)
def test_written_checkpoint_is_what_torch_loads(
    tmp_path: Path, shapes: dict[str, tuple[str, list[int]]], random
) -> None:  # type: ignore[no-untyped-def]
    infos = {name: TensorInfo(dtype, tuple(shape)) for name, (dtype, shape) in shapes.items()}
    data = {name: random.randbytes(info.nbytes) for name, info in infos.items()}
    with (tmp_path / "x.pth").open("wb") as file:
        write_pth(file, "x", infos, lambda name: [data[name][:3], data[name][3:]])
    for mmap in (False, True):
        loaded = torch.load(tmp_path / "x.pth", weights_only=True, mmap=mmap)
        assert {name: tuple(value.shape) for name, value in loaded.items()} == {n: i.shape for n, i in infos.items()}
        assert {name: bytes_of(value) for name, value in loaded.items()} == data
    with streamconv.open_checkpoint(tmp_path / "x.pth") as checkpoint:
        assert all(tensor.record.range.start % 64 == 0 for tensor in checkpoint.values())
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        assert archive.testzip() is None


def test_synthetic_classifier_is_two_files_of_finite_varied_values(tmp_path: Path) -> None:
    made = streamconv.synth("dinov2_vits14_1layer", tmp_path / "dinov2_vits14_pretrain.pth", seed=3)
    assert made.head == tmp_path / "dinov2_vits14_linear_head.pth"
    backbone, head = (torch.load(path, weights_only=True) for path in (made.backbone, made.head))
    assert {name: list(value.shape) for name, value in head.items()} == {"weight": [1000, 768], "bias": [1000]}
    for name, value in (backbone | head).items():
        assert value.dtype == torch.float32
        assert value.isfinite().all(), name
        assert value.std() > 0.001, name
    assert len({value.flatten()[0].item() for value in backbone.values()}) == len(backbone)


def test_seed_determines_every_byte(tmp_path: Path) -> None:
    paths = [tmp_path / str(i) / "x.pth" for i in range(3)]
    for path, seed in zip(paths, (0, 0, 1), strict=True):
        path.parent.mkdir()
        streamconv.synth("dinov2_vits14", path, seed=seed)
    one, two, other = (path.read_bytes() for path in paths)
    assert one == two != other


def test_existing_files_unknown_models_and_other_mistakes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists already"):
        streamconv.synth("dinov2_vits14", tmp_path / "x.pth")
    assert (tmp_path / "x.pth").read_bytes() == b"mine"
    with pytest.raises(UsageError, match="dinov2_vits14"):
        streamconv.synth("dinov2_vits", tmp_path / "y.pth")
    with pytest.raises(UsageError, match=r"^'x\.pth' is not a model that streamconv knows"):
        streamconv.synth("x.pth", tmp_path / "y.pth")  # which is a file
    with pytest.raises(UsageError, match="seed -1 is negative"):
        streamconv.synth("dinov2_vits14", tmp_path / "y.pth", seed=-1)
    with pytest.raises(UsageError, match=r"End its name in \.pth"):
        streamconv.synth("dinov2_vits14", tmp_path / "y.safetensors")
    with pytest.raises(OutputError, match="not a folder"):
        streamconv.synth("dinov2_vits14", tmp_path / "none" / "y.pth")


def test_temporary_checkpoint_of_a_killed_process_is_reused_by_one_process_and_deleted(tmp_path: Path) -> None:
    left = tmp_path / ".out.streamconv-synthetic" / "dinov2_vits14_synthetic_seed0.pth"
    left.parent.mkdir()
    left.write_bytes(b"left")
    with temporary_checkpoint("dinov2_vits14", tmp_path / "out", 0, ignore_progress) as made:
        assert made.backbone.read_bytes() == b"left"
        with (
            pytest.raises(OutputError, match="being written by another process"),
            temporary_checkpoint("dinov2_vits14", tmp_path / "out", 0, ignore_progress),
        ):
            pass
        assert left.exists()
    assert list(tmp_path.iterdir()) == []
