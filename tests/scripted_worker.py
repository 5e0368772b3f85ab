"""A stand-in for the process that runs models. It does what the environment variable SCRIPT names, without torch."""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from streamconv.errors import MappingError, NetworkError, UsageError
from streamconv.files.address import Address
from streamconv.progress import Progress
from streamconv.source.open import OpenSource
from streamconv.tensors.evaluation import read_bytes
from streamconv.verification import worker
from streamconv.verification.result import Check, ModelResults


def passes(progress: Progress, source: OpenSource) -> None:
    for step in range(3):
        progress("comparing layers", step + 1, 3, "steps")


def prints(progress: Progress, source: OpenSource) -> None:
    print("printed by a library")
    print("\x1b[2J\x9b2J\u202eof a config.json\nLooks ok!", file=sys.stderr)
    os.write(1, b"written by a C library\n")
    assert sys.stdin.read() == ""


def shows_how_threads_wait(progress: Progress, source: OpenSource) -> None:
    progress(os.environ["OMP_WAIT_POLICY"], 0, 1, "steps")


def has_docstrings(progress: Progress, source: OpenSource) -> None:
    if not Path.__doc__:  # no assert, which Python leaves out then, too
        raise UsageError("There are no docstrings.")


def logs(progress: Progress, source: OpenSource) -> None:
    logging.getLogger("streamconv.files").info("not shown")
    logging.getLogger("streamconv.files").warning("%s is %d", "one", 1)
    try:
        raise OSError("broken")
    except OSError:
        logging.getLogger("streamconv.files").warning("trying again", exc_info=True)


def reads(progress: Progress, source: OpenSource) -> None:
    assert not source.checkpoints
    assert source.selection.family.name
    digest = sha256()
    for tensor in source.tensors.values():
        digest.update(read_bytes(tensor, source.reader))
    progress(digest.hexdigest(), 0, 1, "steps")


def refuses(progress: Progress, source: OpenSource) -> None:
    raise UsageError("cuda:0 has too little memory.")


def loses_the_connection(progress: Progress, source: OpenSource) -> None:
    error = NetworkError("The connection broke.")
    error.location = Address("https://host/x.pth?secret")
    raise error


def has_problems(progress: Progress, source: OpenSource) -> None:
    raise MappingError("Several problems:", ["one", "two"])


class _LibraryError(Exception):
    def __init__(self, one: object, two: object):
        super().__init__(f"{one} and {two}")


def has_a_bug(progress: Progress, source: OpenSource) -> None:
    raise _LibraryError("this", lambda: None)


def exits(progress: Progress, source: OpenSource) -> None:
    sys.exit(3)


def has_no_memory(progress: Progress, source: OpenSource) -> None:
    raise MemoryError


def is_killed(progress: Progress, source: OpenSource) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def aborts(progress: Progress, source: OpenSource) -> None:
    os.kill(os.getpid(), signal.SIGABRT)


def ends(progress: Progress, source: OpenSource) -> None:
    os._exit(3)


def waits(progress: Progress, source: OpenSource) -> None:
    progress("waiting", 0, 1, "steps")
    time.sleep(600)


def computes(progress: Progress, source: OpenSource) -> None:
    progress("computing", 0, 1, "steps")
    while True:
        pass


def is_never_imported(progress: Progress, source: OpenSource) -> None:
    """See `main`."""


class _EndlessFinder:
    def find_spec(self, *args: object) -> None:
        while True:
            pass


class ModelVerifier:
    def __init__(self, plan: object, device: str, image: str | None, reference: str):
        self.device = device

    def check(self, folder: Path, source: OpenSource, progress: Progress, *options: bool) -> ModelResults:
        script: Callable[[Progress, OpenSource], None] = globals()[os.environ["SCRIPT"]]
        script(progress, source)
        return ModelResults((Check("parity", True, "scripted"),), device=self.device, reference="scripted")


def check_arguments_here(device: str, reference: str, image: str | None) -> None:
    if image is not None and Path(image).name == "broken.png":
        raise UsageError(f"The image {image} cannot be read.")


def main() -> None:
    if "STARTED" in os.environ:
        Path(os.environ["STARTED"]).write_text(str(os.getpid()))
    functions: dict[str, Any] = {"ModelVerifier": ModelVerifier, "check_arguments_here": check_arguments_here}
    for name in ("model_checks", "devices"):
        module = sys.modules[f"streamconv.verification.{name}"] = ModuleType(name)
        vars(module).update(functions)
    if os.environ["SCRIPT"] == is_never_imported.__name__:
        worker.MAX_IMPORT_SECONDS = 0.1
        del sys.modules["streamconv.verification.model_checks"]
        sys.meta_path.insert(0, _EndlessFinder())
    worker.main()
