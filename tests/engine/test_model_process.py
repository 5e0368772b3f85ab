"""The process that runs the models starts before the conversion, reports to the caller's thread, and ends with the job.

Most tests let it run a script instead of models (tests/scripted_worker.py), so that it starts in a moment.
"""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from hashlib import sha256
from pathlib import Path

import pytest
from PIL import Image

import streamconv
from streamconv import Cancelled, ConversionOptions, MappingError, NetworkError, UsageError, VerificationOptions
from streamconv.jobs.model_options import started_models
from streamconv.progress import ignore_progress
from streamconv.tensors.evaluation import read_bytes
from streamconv.verification import process
from tests.file_server import FileServer
from tests.support import ROOT, Raising, linux, run_python, save_zeros, tiny

ON_CPU = VerificationOptions(device="cpu")
SECONDS = 60  # to wait for what should happen at once


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_zeros(tmp_path / "x.pth", tiny())


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let jobs run scripts in a process; returns the file to which that process writes its id when it starts."""
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    monkeypatch.setattr(process, "WORKER", "tests.scripted_worker")
    monkeypatch.setenv("SCRIPT", "passes")
    monkeypatch.setenv("STARTED", str(tmp_path / "started"))
    return tmp_path / "started"


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def require_ended(started: Path) -> None:
    end = time.monotonic() + SECONDS
    while is_running(int(started.read_text())):
        assert time.monotonic() < end, "the process is still running"
        time.sleep(0.01)


def test_process_starts_before_the_conversion_and_ends_with_the_job(
    source: Path, tmp_path: Path, started: Path
) -> None:
    steps: list[str] = []

    def progress(step: str, done: int, total: int, unit: str) -> None:
        if step.startswith("writing"):  # the process has started if this wait ends
            end = time.monotonic() + SECONDS
            while not started.exists():
                assert time.monotonic() < end, "the process was not started"
                time.sleep(0.01)
        assert threading.current_thread() is caller
        steps.append(step)

    caller = threading.current_thread()
    found = streamconv.run(source, tmp_path / "out", verification=ON_CPU, progress=progress).verification
    assert found is not None
    assert [check.name for check in found.checks][-1] == "parity"
    assert (found.passed, found.device, found.reference) == (True, "cpu", "scripted")
    assert list(dict.fromkeys(steps)) == [
        "writing model.safetensors", "comparing bytes", "starting torch and transformers", "comparing layers"
    ]  # fmt: skip
    assert steps.count("comparing layers") == 3
    require_ended(started)


def test_what_the_user_named_is_checked_before_anything_is_written(source: Path, tmp_path: Path, started: Path) -> None:
    """An image's content only by the process that imports Pillow."""
    (tmp_path / "broken.png").write_bytes(b"")
    options = VerificationOptions(device="cpu", image=tmp_path / "broken.png")
    with pytest.raises(UsageError, match=r"The image .*broken\.png cannot be read"):
        streamconv.run(source, tmp_path / "out", verification=options)
    assert not (tmp_path / "out").exists()
    require_ended(started)
    steps = Raising()
    (tmp_path / "here.png").write_bytes(b"")
    options = VerificationOptions(device="cpu", image=tmp_path / "here.png")
    assert streamconv.run(source, tmp_path / "out", verification=options, progress=steps).passed
    assert steps.steps[0] == "starting torch and transformers"
    assert steps.steps.count("starting torch and transformers") == 1


@pytest.mark.parametrize("named", [{"image": "missing.png"}, {"reference": "missing"}])
def test_missing_files_are_refused_before_the_process_starts(
    source: Path, tmp_path: Path, started: Path, named: dict[str, str]
) -> None:
    with pytest.raises(UsageError, match=r"image missing\.png does not exist|reference missing is not builtin"):
        streamconv.run(source, tmp_path / "out", verification=VerificationOptions(**named))
    assert not started.exists()
    assert not (tmp_path / "out").exists()


def test_source_without_its_open_files_can_be_read_in_the_process(
    source: Path, tmp_path: Path, started: Path, monkeypatch: pytest.MonkeyPatch, server: FileServer
) -> None:
    """The address of the source, which may hold a password, is in no argument of the process."""
    monkeypatch.setenv("SCRIPT", "reads")
    (server.folder / "x.pth").write_bytes(source.read_bytes())
    address = server.url.replace("http://", "http://ada:secret@") + "/x.pth"
    with streamconv.open_checkpoint(source) as checkpoint:
        digest = sha256(b"".join(read_bytes(tensor) for tensor in checkpoint.values())).hexdigest()
    for place, stream in ((source, False), (address, True)):
        steps: list[str] = []

        def progress(step: str, done: int, total: int, unit: str, steps: list[str] = steps) -> None:
            steps.append(step)
            if re.fullmatch("[0-9a-f]{64}", step) and sys.platform == "linux":
                assert b"secret" not in Path(f"/proc/{started.read_text()}/cmdline").read_bytes()

        out = tmp_path / f"out {stream}"
        found = streamconv.run(place, out, ConversionOptions(stream=stream), ON_CPU, progress=progress)
        assert found.passed
        assert digest in steps


@pytest.mark.parametrize(
    ("script", "kind", "message"),
    [
        ("refuses", UsageError, "cuda:0 has too little memory"),
        ("loses_the_connection", NetworkError, "The connection broke"),
        ("has_problems", MappingError, "Several problems:\n  one\n  two"),
        ("has_no_memory", UsageError, "There is too little memory to run the models"),
        ("has_a_bug", RuntimeError, "_LibraryError: this and <function"),
        ("exits", RuntimeError, "SystemExit: 3"),
        ("is_killed", UsageError, "was killed, probably because memory ran out"),
        ("aborts", UsageError, r"ended by signal 6 \(Aborted\)"),
        ("ends", UsageError, "ended with exit code 3"),
        ("is_never_imported", UsageError, "Importing torch and transformers did not end"),
    ],
)
def test_errors_reach_the_caller_and_the_conversion_is_kept(
    source: Path, tmp_path: Path, started: Path, monkeypatch: pytest.MonkeyPatch,
    script: str, kind: type[Exception], message: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("SCRIPT", script)
    with pytest.raises(kind, match=message) as caught:
        streamconv.run(source, tmp_path / "out", verification=ON_CPU)
    assert type(caught.value) is kind
    assert ("in has_a_bug" in str(caught.value.__cause__)) == (script == "has_a_bug")
    assert getattr(caught.value, "problems", ("one", "two")) == ("one", "two")
    require_ended(started)
    assert streamconv.convert(source, tmp_path / "out").was_finished


@pytest.mark.parametrize("step", ["writing model.safetensors", "comparing bytes", "waiting", "computing"])
@pytest.mark.parametrize("kind", [Cancelled, KeyboardInterrupt])
def test_exception_of_a_callback_ends_the_process(
    source: Path, tmp_path: Path, started: Path, monkeypatch: pytest.MonkeyPatch, step: str, kind: type[BaseException]
) -> None:
    monkeypatch.setenv("SCRIPT", "computes" if step == "computing" else "waits")
    error = kind()

    def progress(*report: object) -> None:
        if report[0] == step:
            raise error

    with pytest.raises(kind) as caught:
        streamconv.run(source, tmp_path / "out", verification=ON_CPU, progress=progress)
    assert caught.value is error
    if started.exists():
        require_ended(started)


@pytest.mark.parametrize(
    ("script", "number", "code"),
    [
        ("waits", signal.SIGKILL, -signal.SIGKILL),
        ("computes", signal.SIGKILL, -signal.SIGKILL),
        ("waits", signal.SIGINT, 130),
        ("computes", signal.SIGTERM, 130),
    ],
)
def test_process_ends_when_the_command_is_killed_or_interrupted(
    source: Path, tmp_path: Path, started: Path, monkeypatch: pytest.MonkeyPatch, script: str, number: int, code: int
) -> None:
    monkeypatch.setenv("SCRIPT", script)
    arguments = ["streamconv", "run", str(source), "-o", str(tmp_path / "out"), "--device", "cpu"]
    program = (
        "import sys\nfrom streamconv.__main__ import main\nfrom streamconv.verification import process\n"
        f"process.WORKER = 'tests.scripted_worker'\nsys.argv = {arguments}\nmain()"
    )
    words = [sys.executable, "-c", program]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True) as command:
        try:
            assert command.stderr is not None
            while command.stderr.readline() not in ("waiting\n", "computing\n"):
                assert command.poll() is None
            child = int(started.read_text())
            assert is_running(child)
            assert os.getsid(child) == child  # a terminal's Ctrl-C does not reach it
            (os.kill if number == signal.SIGKILL else os.killpg)(command.pid, number)
            assert command.wait(SECONDS) == code
            require_ended(started)
            printed = command.stderr.read()
            assert ("To resume, run" in printed) == (code == 130)
            assert "Traceback" not in printed
        finally:
            command.kill()


def test_output_of_libraries_is_logged(
    source: Path, tmp_path: Path, started: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv("SCRIPT", "prints")
    assert streamconv.run(source, tmp_path / "out", verification=ON_CPU).passed
    assert capfd.readouterr() == ("", "written by a C library\n")
    assert caplog.messages == [
        "torch or transformers: printed by a library",
        r"torch or transformers: \x1b[2J\x9b2J\u202eof a config.json",
        "torch or transformers: Looks ok!",
    ]


def test_threads_of_the_process_wait_without_using_a_cpu_unless_the_user_wants_that(
    source: Path, tmp_path: Path, started: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("SCRIPT", "shows_how_threads_wait")
    steps = Raising()
    streamconv.run(source, tmp_path / "out", verification=ON_CPU, progress=steps)
    assert "PASSIVE" in steps.steps
    assert "OMP_WAIT_POLICY" not in os.environ
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    steps = Raising()
    streamconv.verify(tmp_path / "out", source, ON_CPU, progress=steps)
    assert "ACTIVE" in steps.steps


def test_log_records_reach_the_callers_handlers(
    source: Path, tmp_path: Path, started: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SCRIPT", "logs")
    with caplog.at_level(logging.WARNING, "streamconv"):
        assert streamconv.run(source, tmp_path / "out", verification=ON_CPU).passed
    records = [record for record in caplog.records if record.process != os.getpid()]
    assert [record.name for record in records] == ["streamconv.files"] * 2
    assert records[0].getMessage() == "one is 1"
    assert re.search(r"trying again\\nTraceback.*OSError: broken$", records[1].getMessage())


def test_python_that_cannot_be_started_is_named(
    source: Path, tmp_path: Path, started: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no python"))
    with pytest.raises(UsageError, match=r"cannot be started: .*no python"):
        streamconv.run(source, tmp_path / "out", verification=ON_CPU)


def test_broken_torch_is_named_and_none_is_imported_from_the_current_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, error in (("here", "the wrong one"), ("path", "libcudart.so.12: cannot open shared object file")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "torch.py").write_text(f"raise OSError({error!r})")
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    monkeypatch.syspath_prepend(tmp_path / "path")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UsageError, match="cannot be imported") as caught:
        streamconv.run(source, tmp_path / "out", verification=ON_CPU)
    assert str(caught.value).endswith(": OSError: libcudart.so.12: cannot open shared object file")
    assert streamconv.convert(source, tmp_path / "out").was_finished


def test_models_run_here_if_transformers_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", sys.modules[__name__])
    monkeypatch.setattr(sys, "executable", "no python")
    with started_models(ON_CPU, ignore_progress) as models:
        assert isinstance(models, process.ModelsHere)


def test_process_has_the_docstrings_that_transformers_reads(
    source: Path, tmp_path: Path, started: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRIPT", "has_docstrings")
    monkeypatch.setenv("PYTHONOPTIMIZE", "2")
    assert streamconv.run(source, tmp_path / "out", verification=ON_CPU).passed


ISOLATED = """
import sys
sys.path.insert(0, {root!r})
from streamconv.verification import process
process.WORKER = "tests.scripted_worker"
models = process.start_models(process.ModelOptions("cpu", None, "builtin"))
models.wait_until_ready(lambda *given: None)
models.close()
"""


@pytest.mark.parametrize("option", ["-I", "-E"])
def test_process_runs_no_code_of_an_environment_that_this_one_ignores(
    tmp_path: Path, started: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    subprocess.run([sys.executable, option, "-c", ISOLATED.format(root=str(ROOT))], check=True)
    assert started.exists()
    assert not (tmp_path / "ran").exists()


def test_models_run_in_a_process_if_this_one_has_no_docstrings(started: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", sys.modules[__name__])
    monkeypatch.setattr(process, "NO_DOCSTRINGS", sys.flags.optimize)
    with started_models(ON_CPU, ignore_progress) as models:
        assert not isinstance(models, process.ModelsHere)


@pytest.mark.parametrize("executable", ["", None])
def test_models_run_here_if_python_is_embedded(monkeypatch: pytest.MonkeyPatch, executable: str | None) -> None:
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    monkeypatch.setattr(sys, "executable", executable)
    assert isinstance(process.start_models(process.ModelOptions("cpu", None, "builtin")), process.ModelsHere)


REAL = """
import os, subprocess, sys, time
from pathlib import Path
import streamconv

os.dup2(1, 2)  # the caller looks at both

class Counted(subprocess.Popen):
    started = []
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.started.append(self.pid)

def progress(step, done, total, unit):
    if step == "writing model.safetensors":
        end = time.monotonic() + 60
        while "libtorch" not in Path(f"/proc/{{Counted.started[0]}}/maps").read_text():
            assert time.monotonic() < end
            time.sleep(0.01)

subprocess.Popen = Counted
for image in (None, {image!r}):
    options = streamconv.VerificationOptions(device="cpu", image=image)
    assert streamconv.run({source!r}, {out!r}, verification=options, progress=progress).passed
assert streamconv.verify({out!r}, {source!r}, options).passed
print(len(Counted.started), [name for name in ("torch", "transformers", "numpy") if name in sys.modules])
"""


@linux
def test_each_job_imports_torch_once_during_the_conversion_and_not_into_the_caller(tmp_path: Path) -> None:
    source = save_zeros(tmp_path / "x.pth", tiny())
    Image.new("RGB", (300, 300), (90, 120, 30)).save(tmp_path / "x.png")
    places = {"source": str(source), "out": str(tmp_path / "out"), "image": str(tmp_path / "x.png")}
    printed = run_python(REAL.format(**places))
    assert printed.splitlines()[-1] == "3 []"
    assert "Loading weights" not in printed  # transformers' progress bar
