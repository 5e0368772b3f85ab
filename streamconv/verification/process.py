"""Runs the models of a verification in a process of their own, started before the conversion.

Importing torch and transformers takes seconds. The child process imports them while this one converts, and runs the
models while this one compares bytes, which needs neither of them. `worker` is the child's program.

If this process has imported transformers already, as a notebook may have, the models run here: a second import would
cost time and memory. So they do if no other Python can be started. A conversion alone imports this module, too, so
subprocess and pickle are imported only on use.
"""

import logging
import os
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from streamconv.child_python import python_command
from streamconv.errors import UsageError
from streamconv.planning.plan import Plan
from streamconv.progress import Progress, ignore_progress
from streamconv.source.open import OpenSource
from streamconv.verification.machine import AGAIN, OUT_OF_MEMORY
from streamconv.verification.result import ModelResults

WORKER = "streamconv.verification.worker"
# By default, threads that wait for others keep a CPU busy. If other programs need the CPUs, the models then take 5 to
# 10 times as long.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
# transformers needs docstrings to load a model, which `python -OO` and PYTHONOPTIMIZE=2 remove.
WITH_DOCSTRINGS = {"PYTHONOPTIMIZE": ""}
NO_DOCSTRINGS = 2  # the value of sys.flags.optimize


@dataclass(frozen=True)
class ModelOptions:
    """The device, image and reference: see `VerificationOptions`."""

    device: str
    image: str | None
    reference: str


@dataclass(frozen=True)
class ModelJob:
    """The folder to verify, and its source: see `ModelVerifier.check`."""

    plan: Plan
    folder: Path
    source: OpenSource
    parity: bool
    thorough: bool
    is_sparse: bool = False


class ModelRunner(Protocol):
    """Runs the checks that need models, once. It must be closed, even after an error.

    ``is_elsewhere``: they run in another process, so this one can do something else meanwhile.
    """

    is_elsewhere: bool

    def wait_until_ready(self, progress: Progress) -> None:
        """Wait until torch is imported, and the device, the image and the reference exist.

        Raises:
            UsageError: one of them does not, or torch cannot be imported.
        """

    def check(self, job: ModelJob, progress: Progress) -> ModelResults:
        """Run the checks.

        Raises:
            UsageError: see `wait_until_ready`; or the models could not run, which proves nothing about the output.
        """

    def close(self) -> None: ...


def start_models(options: ModelOptions) -> ModelRunner:
    """Start importing torch in a process of its own, unless this one has done so or cannot start another.

    Raises:
        UsageError: the process cannot be started.
    """
    # Where Python is embedded in another program, sys.executable is empty.
    is_here = ("transformers" in sys.modules and sys.flags.optimize < NO_DOCSTRINGS) or not sys.executable
    return ModelsHere(options) if is_here else _ModelsInChild(options)


class ModelsHere:
    """Runs the models in this process."""

    is_elsewhere = False

    def __init__(self, options: ModelOptions):
        self._options = options

    def wait_until_ready(self, progress: Progress = ignore_progress) -> None:
        import torch

        from streamconv.verification.devices import check_arguments_here

        with torch.device("cpu"):  # not the caller's default device
            check_arguments_here(self._options.device, self._options.reference, self._options.image)

    def check(self, job: ModelJob, progress: Progress) -> ModelResults:
        import torch

        from streamconv.verification.model_checks import ModelVerifier

        options = self._options
        with torch.device("cpu"):  # not the caller's default device
            models = ModelVerifier(job.plan, options.device, options.image, options.reference)
            return models.check(job.folder, job.source, progress, job.parity, job.is_sparse, job.thorough)

    def close(self) -> None: ...


class _ModelsInChild:
    """Runs the models in a child process.

    Pickled messages go to the child's stdin, and (kind, value) pairs come from its stdout. Nothing is passed in the
    arguments, which every user of the system can read: URLs may contain passwords. The child ends when its stdin is
    closed, so it does not outlive this process, even if that is killed.
    """

    is_elsewhere = True

    def __init__(self, options: ModelOptions):
        import subprocess

        self._is_ready = False
        try:
            self._process = subprocess.Popen(
                python_command(f"from {WORKER} import main; main()"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=ENVIRONMENT | os.environ | WITH_DOCSTRINGS,
                start_new_session=True,  # Ctrl-C in a terminal interrupts this process, which then ends the child
            )
        except OSError as error:
            raise UsageError(
                f"The Python process that runs the models cannot be started: {error}. In a program, import "
                "transformers first: then the models run in the program's own process."
            ) from error
        self._send((options, logging.getLogger("streamconv").getEffectiveLevel()))

    def wait_until_ready(self, progress: Progress) -> None:
        if not self._is_ready:
            progress("starting torch and transformers", 0, 1, "steps")
            self._receive(progress)
            self._is_ready = True

    def check(self, job: ModelJob, progress: Progress) -> ModelResults:
        self.wait_until_ready(progress)
        self._send(replace(job, source=replace(job.source, checkpoints={})))
        results: ModelResults = self._receive(progress)
        return results

    def close(self) -> None:
        """End the child at once, whatever it is doing."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):  # the child did not read everything
                pipe.close()
        self._process.wait()

    def _send(self, message: object) -> None:
        import pickle

        assert self._process.stdin is not None
        data = pickle.dumps(message)
        with suppress(OSError):  # the child has ended; `_receive` finds out why
            self._process.stdin.write(data)
            self._process.stdin.flush()

    def _receive(self, progress: Progress) -> Any:
        """Return the value of the child's next message that is not about progress and not to be logged."""
        import pickle

        assert self._process.stdout is not None
        while True:
            try:
                kind, value = pickle.load(self._process.stdout)
            except (EOFError, pickle.UnpicklingError):  # it ended between two messages, or within one
                raise UsageError(_end_message(self._process.wait())) from None
            if kind == "progress":
                progress(*value)
                self._send("continue")
            elif kind == "log":
                if logging.getLogger(value.name).isEnabledFor(value.levelno):
                    logging.getLogger(value.name).handle(value)
            elif kind == "error":
                error, trace = value
                raise error from (RuntimeError(trace) if trace else None)
            else:
                return value


def _end_message(code: int) -> str:
    """Describe why the child ended without a result; ``code`` is `Popen.returncode`."""
    if code == -signal.SIGKILL:
        return f"The process that runs the models was killed, probably because memory ran out. {OUT_OF_MEMORY}"
    if code == -signal.SIGPROF:
        return f"Importing torch and transformers did not end, probably because memory is limited. {OUT_OF_MEMORY}"
    how = f"was ended by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"ended with exit code {code}"
    return (
        f"The process that runs the models {how}. Check that `python -c 'import torch, transformers'` works, "
        f"and reinstall them if it does not. {AGAIN}"
    )
