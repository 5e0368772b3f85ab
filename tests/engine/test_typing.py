"""The library passes mypy in strict mode, in a program that uses it as an installed package, and mistakes are found."""

import subprocess
import sys
import venv
from pathlib import Path

import pytest

import streamconv

PROGRAM = """
from collections.abc import Callable
from pathlib import Path
from typing import assert_type

import streamconv
from streamconv import (
    Cancelled, CastDtype, Conversion, ConversionOptions, Progress, ProgressUnit, RunResult, StreamconvError,
    Verification, VerificationOptions,
)


def show(step: str, done: int, total: int, unit: str) -> None:
    print(step, done, total, unit)


def stop(what: str, done: int, total: int, unit: ProgressUnit) -> None:
    raise Cancelled


class Bar:
    def __call__(self, step: str, done: int, total: int, unit: str) -> None: ...


def work(dtype: CastDtype, report: Path) -> RunResult:
    options = ConversionOptions(dtype=dtype, max_shard_size=10**9)
    callbacks: list[Progress] = [show, stop, Bar(), lambda step, *rest: print(step)]
    converted = streamconv.convert("x.pth", Path("out"), options, progress=show)
    assert_type(converted, Conversion)
    if converted.plan.cast is not None:
        assert_type(converted.plan.cast["to"], CastDtype)
    verified = streamconv.verify("out", "x.pth", VerificationOptions(report=report), progress=callbacks[0])
    assert_type(verified, Verification)
    assert_type([check.passed for check in verified.checks], list[bool | None])
    streamconv.revert(Path("out"), "back.pth", progress=Bar())
    assert_type(streamconv.synth("dinov2_vits14", "x.pth", progress=stop), streamconv.SyntheticFiles)
    streamconv.publish("out", progress=show)
    with streamconv.open_checkpoint("x.pth") as checkpoint:
        assert checkpoint["pos_embed"].info.dtype == "F32"
    try:
        return streamconv.run("x.pth", verification=VerificationOptions(report="a.html"), on_result=print)
    except streamconv.MappingError as error:
        assert_type(error.problems, tuple[str, ...])
        raise
    except StreamconvError as error:
        assert_type(error.exit_code, int)
        raise
"""
MISTAKES = {
    'streamconv.ConversionOptions(dtype="fp16")': "arg-type",
    'streamconv.convert("x.pth", progress=lambda done: None)': "arg-type",
    'streamconv.TensorInfo("float32", (1,))': "arg-type",
    'streamconv.convert("x.pth", show=print)': "call-arg",
}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the interpreter of an environment in which the package, and nothing else, is installed."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "streamconv").symlink_to(Path(streamconv.__file__).parent, target_is_directory=True)
    return folder / "bin" / "python"


def complaints(python: Path, program: str, folder: Path) -> str:
    (folder / "program.py").write_text(program)
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", python, "program.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env={})
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_program_that_uses_every_job_passes_and_mistakes_are_found(python: Path, tmp_path: Path) -> None:
    assert complaints(python, PROGRAM, tmp_path) == ""
    lines = complaints(python, "import streamconv\n" + "\n".join(MISTAKES), tmp_path).splitlines()
    for number, kind in enumerate(MISTAKES.values(), start=2):
        assert any(line.startswith(f"program.py:{number}: error:") and f"[{kind}]" in line for line in lines), lines
