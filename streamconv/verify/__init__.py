"""Verification: rungs, cheapest first, each of which says what it proves.

Importing this room imports no torch; its rungs do when they run.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from streamconv.check import check_bytes
from streamconv.errors import OutputError, SourceError
from streamconv.families import HEAD_PREFIX
from streamconv.plan import INDEX_NAME, Plan, make_plan
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
    """What a verification found. ``predictions`` are a classifier's best labels for the image, with shares."""

    rungs: tuple[Rung, ...]
    device: str
    versions: Mapping[str, str]
    predictions: tuple[tuple[str, float], ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every rung that ran passed, and one did."""
        ran = [rung.passed for rung in self.rungs if rung.passed is not None]
        return bool(ran) and all(ran)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields and ``passed``."""
        return {"passed": self.passed, **asdict(self)}


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
        SourceError: the source, or the output as a source of tensors, cannot be read.
    """
    folder = Path(output_folder)
    if not folder.is_dir():
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
            return Verification((bytes_rung, loaded, skipped), str(chosen), versions())
        compared, predictions = parity.check_parity(folder, plan, source_files.source, picture, chosen, progress)
        return Verification((bytes_rung, loaded, compared), str(chosen), versions(), predictions)


def _plan_of(folder: Path, source: OpenSource) -> Plan:
    """The plan that the folder should fulfil: its own labels and shard files, all else from the source."""
    labels = None
    config = folder / "config.json"
    if HEAD_PREFIX + "weight" in source.tensors:
        labels = _labels_in(config)
    plan = make_plan(source.tensors, source.where, labels, sys.maxsize, source.source.model)
    if not (folder / INDEX_NAME).exists() and not (folder / plan.shards[0].filename).exists():
        raise SourceError(f"{folder} holds neither {plan.shards[0].filename} nor {INDEX_NAME}: no model is there.")
    return plan


def _labels_in(config: Path) -> list[str] | None:
    try:
        labels = json.loads(config.read_text("utf-8"))["id2label"]
        return [labels[str(i)] for i in range(len(labels))]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # the bytes rung will say what is wrong with config.json


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
