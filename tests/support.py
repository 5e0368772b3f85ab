"""Functions that several test modules share. Nothing here imports torch; checkpoints.py has the functions that do."""

import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

import streamconv
from streamconv import Cancelled, Checkpoint, CorruptError, Verification
from streamconv.cli.bugs import InternalError
from streamconv.cli.commands import app
from streamconv.families.dinov2 import FAMILY
from streamconv.families.dinov2_geometry import Dimensions, ffn_size
from streamconv.families.selection import find_backbone
from streamconv.files.base import ByteRange, FileRef
from streamconv.formats.torch_writer import write_pth
from streamconv.hub.destination import Destination
from streamconv.hub.repository import Repository
from streamconv.jobs.convert_to_hub import HubConversion, Verify, convert_to_hub
from streamconv.jobs.model_options import started_models
from streamconv.jobs.options import ConversionOptions, PushOptions, SourceOptions, VerificationOptions
from streamconv.jobs.prepare import PreparedSource, prepared_source
from streamconv.jobs.recorded import recorded_options
from streamconv.jobs.verify import verify_uploaded
from streamconv.output import contents as file_contents
from streamconv.output import hashing, writer
from streamconv.planning.make import make_plan
from streamconv.planning.plan import Plan
from streamconv.progress import Progress, ignore_progress
from streamconv.tensors import tiles
from streamconv.tensors.expressions import Read, Record
from streamconv.tensors.info import TensorInfo, contiguous_strides
from streamconv.verification import bytes as bytes_check
from streamconv.verification import output_files
from streamconv.verification.bytes import check_bytes
from streamconv.verification.config import check_config
from tests import api
from tests.file_server import FileServer
from tests.hub_server import TOKEN, HubServer

ROOT = Path(__file__).parents[1]
Save = Callable[..., tuple[Path, Path | None]]  # the fixture `save`
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports how memory is used")


PUBLISHED: dict[str, Any] = {  # what a manifest records of the authors' own file
    "file": "dinov2_vits14_pretrain.pth",
    "address": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
    "published": True,
}


def tiny(
    swiglu: bool = False, classes: int | None = None, layers: int = 3, hidden: int = 128, registers: int = 0
) -> Dimensions:
    """Return the dimensions of a model that runs in milliseconds: a 4 x 4 grid of patches, two heads."""
    ffn = ffn_size(hidden, 4, swiglu)
    return Dimensions(hidden, layers, ffn, swiglu, positions=17, registers=registers, classes=classes)


ARCHITECTURES = {
    "mlp": tiny(),
    "swiglu": tiny(swiglu=True),
    "classifier": tiny(classes=5),
    "registers": tiny(registers=4),
    "swiglu-registers-classifier": tiny(swiglu=True, classes=5, registers=4),
}


# Commands and processes


@dataclass(frozen=True)
class Ran:
    returncode: int
    stdout: str
    stderr: str


def run(*words: object, cwd: Path, **environment: str) -> Ran:
    """Run a streamconv command in this process, because a new one would take seconds to import torch."""
    before = os.getcwd()
    os.chdir(cwd)
    try:
        done = CliRunner().invoke(app, [*map(str, words)], env=environment)
    finally:
        os.chdir(before)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code != InternalError.exit_code, done.stderr
    return Ran(done.exit_code, done.stdout, done.stderr)


def run_process(*words: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a streamconv command in a separate process."""
    command = [sys.executable, "-m", "streamconv", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment})


def hub_environment(hub: HubServer, cwd: Path) -> dict[str, str]:
    """Return environment variables that make a process use ``hub`` and keep its caches in ``cwd``."""
    return {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(cwd / "hf"), "TORCH_HOME": str(cwd / "torch"),
    }  # fmt: skip


def run_with_hub(hub: HubServer, cwd: Path, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a streamconv command that uses ``hub``."""
    return run_process(*words, cwd=cwd, **{**hub_environment(hub, cwd), **environment})


def run_python(code: str) -> str:
    """Return the output of ``code`` in a separate Python process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def peak_kb(code: str) -> int:
    """Return the VmHWM of a new Python process that runs ``code``."""
    return int(run_python(code + "\nprint(*(l.split()[1] for l in open('/proc/self/status') if l[:5] == 'VmHWM'))"))


# Files


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def model_files(folder: Path) -> dict[str, bytes]:
    """Return all files except the manifest, which records where the source was."""
    return {name: data for name, data in contents(folder).items() if name != "streamconv.json"}


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in folder.iterdir()}


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def flip(path: Path, tensor: str, byte: int) -> None:
    """Flip a bit of a tensor in a checkpoint file."""
    with streamconv.open_checkpoint(path) as checkpoint:
        at = checkpoint[tensor].record.range.start + byte
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def rewrite(path: Path, change: dict[str, bytes], **options: object) -> None:
    """Write the same zip with some records' contents replaced."""
    with zipfile.ZipFile(path) as old:
        records = {name: old.read(name) for name in old.namelist()}
    records |= {next(n for n in records if n.endswith(key)): value for key, value in change.items()}
    with zipfile.ZipFile(path, "w", **options) as new:  # type: ignore[call-overload]
        for name, data in records.items():
            new.writestr(name, data)


# Plans and published models

# Keys and shapes of Meta's modules (facebookresearch/dinov2 and facebookresearch/webssl, built on the meta
# device) and of transformers 4.57's, whose names in memory are those of the files; {i} counts layers, and
# "chunks" gives the {chunk} that each is in. One file per family.
GOLDEN: dict[str, Any] = {}
for _path in sorted((ROOT / "tests" / "golden").glob("*.json")):
    GOLDEN |= json.loads(_path.read_text())
MODELS = [model.name for model in FAMILY.models]
WEB_DINO = [name for name in MODELS if name.startswith("webssl")]


def expanded(
    shapes: dict[str, list[int]], layers: int | dict[str, int], chunks: Sequence[int] = ()
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all layers. ``layers`` is the number of values of {i}, or that of each index."""
    counts = {"i": layers} if isinstance(layers, int) else layers
    return {
        key.format(**dict.fromkeys(counts, i), chunk=chunks[i] if chunks else None): tuple(shape)
        for key, shape in shapes.items()
        for i in range(next((count for index, count in counts.items() if f"{{{index}}}" in key), 1))
    }


def plan_of_shapes(
    shapes: dict[str, tuple[int, ...]], where: Path, filename: str = "golden", **options: object
) -> Plan:
    """Make a plan from shapes alone: it needs neither bytes nor files."""
    tensors = checkpoint_of_shapes(shapes, where / filename)
    selection = find_backbone(tensors, filename)
    selected = {key: tensors[called] for key, (called,) in selection.names.items()}
    return make_plan(selected, filename, selection=selection, filename=filename, **options)  # type: ignore[arg-type]


def checkpoint_of_shapes(shapes: Mapping[str, tuple[int, ...]], path: Path = Path("x.pth")) -> Checkpoint:
    """Return a checkpoint of float32 tensors that exist in no file."""
    tensors = {}
    for name, shape in shapes.items():
        info = TensorInfo("F32", shape)
        record = Record(FileRef(path, info.nbytes), name, ByteRange(0, info.nbytes))
        tensors[name] = Read(info, record, 0, contiguous_strides(shape))
    return Checkpoint(tensors, {}, [], "")


# Conversions straight to the Hub

HUB_MODEL = tiny(swiglu=True, layers=4, hidden=256)
HUB_SHARD_SIZE = "3MB"


def verify_on_cpu(prepared: PreparedSource, manifest: Mapping[str, Any], folder: Path) -> Verification:
    options = VerificationOptions(device="cpu")
    with started_models(options, ignore_progress) as models:
        return verify_uploaded(prepared, manifest, folder, options, models)


def to_hub(
    source: str,
    folder: Path,
    *,
    repository: str = "it",
    verify: Verify | None = None,
    unverified: bool = True,
    progress: Progress = ignore_progress,
    **options: Any,
) -> HubConversion:
    """Convert ``source`` to a repository of the test's Hub, by default without verification."""
    conversion = ConversionOptions(stream=True, **{"max_shard_size": HUB_SHARD_SIZE, **options})
    with prepared_source(source, conversion, progress) as prepared:
        destination = Repository(Destination(repository), None)
        push = PushOptions(unverified=unverified)
        return convert_to_hub(prepared, folder, destination, verify, push=push, force=False, progress=progress)


def require_uploaded_folder(hub: HubServer, server: FileServer, tmp_path: Path, dtype: str | None = None) -> None:
    """Require that the uploaded files equal a local conversion, except for the recorded places and times."""
    api.convert(server.folder / "x.pth", tmp_path / "expected", max_shard_size=HUB_SHARD_SIZE, dtype=dtype)
    arrived = hub.files("ada/it")
    expected = contents(tmp_path / "expected")
    assert arrived.keys() == {*expected, "README.md", ".gitattributes"}
    del expected["streamconv.json"]
    assert {name: arrived[name] for name in expected} == expected
    manifest = json.loads(arrived["streamconv.json"])
    for name, file in manifest["files"].items():
        sha256 = hashlib.sha256(arrived[name]).hexdigest()
        assert file == {"size": len(arrived[name]), "sha256": sha256, "overflow_count": 0, "crc32": ""}


class SparseFile(io.BufferedRandom):
    """A file that leaves holes instead of writing zeros."""

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if len(data) > 4096 and not any(data[:64]):
            self.seek(len(data), os.SEEK_CUR)
            return len(data)
        return super().write(data)


def save_zeros(path: Path, geometry: Dimensions, dtype: str = "F32", block_chunks: int = 0) -> Path:
    """Write a .pth of zeros, with correct CRC-32s, that takes almost no disk space."""
    infos = {name: TensorInfo(dtype, info.shape) for name, info in FAMILY.sources(geometry, block_chunks).items()}
    zeros = bytes(1 << 20)

    def data(name: str) -> Iterator[bytes]:
        for start in range(0, infos[name].nbytes, len(zeros)):
            yield zeros[: infos[name].nbytes - start]

    with SparseFile(io.FileIO(path, "w+")) as file:
        write_pth(file, path.stem, infos, data)  # type: ignore[arg-type]
    return path


# Interruptions and failing disks

SMALL_STEPS: list[tuple[ModuleType, str, int]] = [  # see the fixture frequent_journal_entries
    (hashing, "RING_BUFFERS", 2),
    *((module, "BUFFER_BYTES", 16 << 10) for module in (hashing, file_contents, bytes_check, output_files)),
    *((module, "PIECE_BYTES", 8 << 10) for module in (file_contents, tiles)),
    (writer, "SYNC_BYTES", 32 << 10),
]


class Interrupted(BaseException):
    pass


def interrupt_after(source: Path, out: Path, share: float, **options: object) -> None:
    """Convert, and interrupt the conversion as Ctrl-C does, once a share of the bytes is written."""

    def progress(what: str, done: int, total: int, unit: str) -> None:
        if unit == "bytes" and done > share * total:
            raise Interrupted

    with pytest.raises(Interrupted):
        api.convert(source, out, progress=progress, **options)


CALLS = ("open", "pwrite", "write", "fsync", "fdatasync", "replace", "ftruncate", "posix_fallocate", "mkdir", "unlink")


class Faults:
    """Makes disk calls fail: only call number ``at``, or every call of these names."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, calls: tuple[str, ...], number: int, at: int | None = None):
        self.seen = 0
        for name in calls:
            monkeypatch.setattr(os, name, self._failing(getattr(os, name), number, at))

    def _failing(self, real: Callable[..., Any], number: int, at: int | None) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.seen += 1
            if at is None or self.seen == at:
                raise OSError(number, os.strerror(number))
            return real(*args, **options)

        return call


def no_half_files(out: Path, whole: dict[str, bytes]) -> bool:
    return not out.exists() or all(
        whole[path.name] == path.read_bytes() for path in out.iterdir() if path.name in whole
    )


# Verifications


def verdicts(found: Verification) -> dict[str, bool | None]:
    return {check.name: check.passed for check in found.checks}


def byte_problems(folder: Path, source: Path, head: Path | None = None) -> str:
    """Return the problems that the bytes and config checks find. No model is built and no forward pass runs."""
    options = recorded_options(folder, SourceOptions(head=head))
    with prepared_source(source, options, ignore_progress, labels_of=folder) as prepared:
        found = check_bytes(folder, prepared.plan, prepared.source.reader, lambda count: None)
        return "\n".join([*found.problems, *check_config(folder, prepared.plan).problems])


def problems(found: Verification) -> str:
    return "\n".join(problem for check in found.checks for problem in check.problems)


# Callbacks that raise


class Raising:
    """A callback that raises ``error`` in call number ``at``, from 0. ``steps`` are the calls' first arguments."""

    def __init__(self, error: BaseException | None = None, at: int = 0):
        self._error, self._at = error, at
        self.steps: list[object] = []

    def __call__(self, step: object, *rest: object) -> None:
        self.steps.append(step)
        if self._error is not None and len(self.steps) > self._at:
            raise self._error


def errors_of_callbacks() -> list[BaseException]:
    """Return exceptions that other code could take for its own: a failing disk, a damaged source, an iterator's end."""
    return [Cancelled(), OSError(28, "no space"), CorruptError("damaged"), StopIteration(), ConnectionError("reset")]


def require_cancellable(
    job: Callable[[Path, Progress], object], folder: Path, outputs: Callable[[Path], Mapping[str, bytes]]
) -> list[object]:
    """Require that any exception of a callback ends a job, reaches its caller, and lets the same call resume.

    Args:
        job: Works in an empty folder, and reports to a callback.
        outputs: Returns the files that the job has completed in a folder, by name.

    Returns:
        The steps that the job reports, in order.
    """
    counting = Raising()
    (folder / "whole").mkdir(parents=True)
    job(folder / "whole", counting)
    whole, steps = outputs(folder / "whole"), counting.steps
    places = sorted({steps.index(step) for step in steps} | {len(steps) // 2, len(steps) - 1})
    errors = errors_of_callbacks()
    for i, error in enumerate(errors):
        at = places[i * (len(places) - 1) // (len(errors) - 1)]
        place = folder / str(i)
        place.mkdir()
        raising = Raising(error, at)
        with pytest.raises(type(error)) as caught:
            job(place, raising)
        assert caught.value is error
        assert error.__context__ is None
        assert len(raising.steps) == at + 1, "the callback was called again"
        assert outputs(place).items() <= whole.items()
        job(place, ignore_progress)
        assert outputs(place) == whole
    return steps


def read_terminal(main: int) -> str:
    """Return what processes write to a pseudo-terminal until the last of them ends, and close its ``main`` side."""
    seen = b""
    try:
        while chunk := os.read(main, 4096):
            seen += chunk
    except OSError:  # as a closed terminal ends it
        pass
    os.close(main)
    return seen.decode()
