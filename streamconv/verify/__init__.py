"""Verification: rungs, cheapest first, each of which says what it proves.

Importing this room imports no torch; its rungs do when they run.
"""

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from streamconv.check import check_bytes
from streamconv.errors import OutputError
from streamconv.plan import Plan, make_plan
from streamconv.progress import Progress, ignore_progress
from streamconv.sources import OpenSource, locate, opened


@dataclass(frozen=True)
class Rung:
    """One rung's verdict. ``passed`` is None where it did not run, and ``proves`` then says why not."""

    name: str
    passed: bool | None
    proves: str
    problems: tuple[str, ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verification:
    """What a verification of an output against ``source`` found.

    ``predictions`` are a classifier's best labels for the image, with their shares.
    """

    rungs: tuple[Rung, ...]
    device: str
    versions: Mapping[str, str]
    source: Mapping[str, Mapping[str, object]]
    predictions: tuple[tuple[str, float], ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every rung that ran passed, and one did."""
        ran = [rung.passed for rung in self.rungs if rung.passed is not None]
        return bool(ran) and all(ran)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields and ``passed``."""
        return {"passed": self.passed, **_finite(asdict(self))}


def _finite(value: Any) -> Any:
    """JSON has no infinity: as a word."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def verify(
    output_folder: str | PathLike[str],
    source: str | PathLike[str],
    *,
    head: str | PathLike[str] | None = None,
    device: str = "auto",
    image: str | PathLike[str] | None = None,
    progress: Progress = ignore_progress,
) -> Verification:
    """Prove a converted folder against its source.

    Args:
        output_folder: What `streamconv.convert` wrote.
        source: What it was made from: a model's name or a checkpoint file.
        head: The linear head's file, for a classifier from files.
        device: "cpu", "cuda", "cuda:1"; "auto" takes a GPU where there is one.
        image: A picture to run both models on; by default one that streamconv draws.
        progress: Told of each rung's steps.

    Raises:
        UsageError: the device or the image does not exist.
        SourceError: the source cannot be read.
        OutputError: there is no such output folder.
    """
    folder = Path(output_folder)
    if not os.path.isdir(folder):
        raise OutputError(f"{folder} is no folder. Name the folder that streamconv converted into.")
    with opened(locate(source, head)) as source_files:
        plan = _plan_of(folder, source_files)
        # torch takes seconds to import: only now that the source proved to be one.
        progress("starting torch and transformers", 0, 1, "steps")
        from streamconv.verify import load, parity
        from streamconv.verify.devices import choose_device, versions
        from streamconv.verify.image import open_image

        chosen, picture = choose_device(device), open_image(image)
        bytes_rung = _bytes(folder, plan, source_files, progress)
        progress("loading with transformers", 0, 1, "steps")
        loaded = load.check_load(folder, plan)
        if not loaded.passed:
            skipped = Rung("parity", None, "not run: transformers did not load the model")
            return Verification((bytes_rung, loaded, skipped), str(chosen), versions(), source_files.describe())
        compared, predictions = parity.check_parity(folder, plan, source_files.source, picture, chosen, progress)
        rungs = (bytes_rung, loaded, compared)
        return Verification(rungs, str(chosen), versions(), source_files.describe(), predictions)


def _plan_of(folder: Path, source: OpenSource) -> Plan:
    """What the folder should hold: its own labels, which the source does not know, and all else from the source."""
    plan = make_plan(source.tensors, source.where, None, sys.maxsize, source.source.model)
    labels = _labels_in(folder / "config.json")
    if len(labels) != len(plan.config.get("id2label", ())):
        return plan  # the bytes rung will say what is wrong with config.json
    return make_plan(source.tensors, source.where, labels or None, sys.maxsize, source.source.model)


def _labels_in(config: Path) -> list[str]:
    try:
        labels = json.loads(config.read_text("utf-8"))["id2label"]
        return [labels[str(i)] for i in range(len(labels))]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def _bytes(folder: Path, plan: Plan, source: OpenSource, progress: Progress) -> Rung:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress("comparing bytes", done, plan.weights, "bytes")

    found = check_bytes(folder, plan, advance)
    crc = "every source record matches its CRC-32" if source.is_checkable else "the source carries no CRC-32s to check"
    return Rung(
        "bytes",
        not found.problems,
        f"every byte of every tensor equals its source's; {crc}",
        found.problems,
        {"tensors": found.tensors, "bytes": found.compared},
    )
