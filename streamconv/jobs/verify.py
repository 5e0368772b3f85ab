"""Verification: rungs, cheapest first, each of which says what it proves.

Importing this room imports no torch; its rungs do when they run.
"""

import os
import platform
import sys
import time
from collections.abc import Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from streamconv._version import __version__
from streamconv.errors import OutputError
from streamconv.output.journal import JOURNAL_NAME
from streamconv.output.manifest import MANIFEST_NAME, is_of, read_manifest
from streamconv.planning.make import make_plan
from streamconv.planning.plan import Plan
from streamconv.progress import Progress, ignore_progress
from streamconv.source.download import downloaded
from streamconv.source.labels import labels_in
from streamconv.source.open import OpenSource, open_source, read_config
from streamconv.source.resolve import resolve_source
from streamconv.tensors.info import CastDtype
from streamconv.verification.bytes import check_bytes, check_files, check_names
from streamconv.verification.result import Check, Verification

if TYPE_CHECKING:
    from streamconv.verification.model_checks import ModelResults, ModelVerifier


def verify(
    output_folder: str | PathLike[str],
    source: str | PathLike[str] | None = None,
    *,
    head: str | PathLike[str] | None = None,
    select: str | None = None,
    num_heads: int | None = None,
    device: str = "auto",
    image: str | PathLike[str] | None = None,
    reference: str | PathLike[str] = "builtin",
    stream: bool = False,
    parity: bool = True,
    progress: Progress = ignore_progress,
) -> Verification:
    """Prove a converted folder against its source, or, without one, against its own manifest.

    Args:
        output_folder: What `streamconv.convert` wrote.
        source: What it was made from: a model's name, a checkpoint file or its address. None reads only the
            folder: each file must have the size and the sha256 that it had when it was written.
        head: The linear head's file, for a classifier from files.
        select, num_heads: As `streamconv.convert` has them; by default what the folder's manifest says that it got.
        device: "cpu", "cuda", "cuda:1"; "auto" takes a GPU where there is one.
        image: A picture to run both models on, a file or an http address; by default one that
            streamconv draws.
        reference: What computes the original: "builtin", this package's own graph; "hub", the
            authors' code, which torch.hub downloads and runs; or a folder that holds that code.
        stream: Keep no file of an address: its weights are read again for parity, layer by layer, and its bytes
            were checked when the folder was written, as its manifest says. Otherwise the file is kept in torch.hub's
            folder.
        parity: Whether to run the models.
        progress: Told of each rung's steps.

    Raises:
        UsageError: the device, the image or the reference does not exist.
        SourceError: the source cannot be read.
        OutputError: there is no such output folder, or it is unfinished, or needs a source and has none.
    """
    folder, start = Path(output_folder), time.monotonic()
    if not os.path.isdir(folder):
        raise OutputError(f"{folder} is no folder. Name the folder that streamconv converted into.")
    if os.path.exists(folder / JOURNAL_NAME):
        raise OutputError(f"{folder} holds an unfinished conversion. Run the command that began it once more.")
    if source is None:
        return _verify_alone(folder, progress)
    manifest = read_manifest(folder)
    said = manifest or {}
    located = resolve_source(
        source,
        head,
        select if select is not None else _of_type(said.get("select"), str),
        num_heads if num_heads is not None else _of_type(said.get("num_heads"), int),
    )
    if located.is_remote and not stream:
        located = downloaded(located, progress)
    with open_source(located, progress) as source_files:
        plan = _plan_of(folder, source_files)
        # torch takes seconds to import: only now that the source proved to be one.
        progress("starting torch and transformers", 0, 1, "steps")
        from streamconv.verification.model_checks import ModelVerifier

        models = ModelVerifier(plan, device, image, reference)
        is_ours = manifest is not None and is_of(manifest, source_files.describe())
        if manifest is not None and is_ours and source_files.is_remote and source_files.has_checksums:
            check, files = _bytes_as_written(folder, plan, manifest, progress)
        else:
            check, files = _bytes(folder, plan, source_files, progress)
        found = models.check(folder, source_files, progress, parity)
        return _verification(plan, source_files, (check, *found.checks), found, models, files, start)


def verify_uploaded(
    plan: Plan,
    source: OpenSource,
    manifest: Mapping[str, Any],
    outline: Path,
    *,
    device: str = "auto",
    image: str | PathLike[str] | None = None,
    reference: str | PathLike[str] = "builtin",
    parity: bool = True,
    progress: Progress = ignore_progress,
) -> Verification:
    """Prove an output that was sent elsewhere, shard by shard, and of which nothing is kept.

    Args:
        plan: Its plan, from ``source``, which is open still.
        manifest: Its own, with the sha256 that each shard had when it was written, and again when it was sent.
        outline: An empty folder for its headers.

    The others are `verify`'s.
    """
    from streamconv.verification.model_checks import ModelVerifier
    from streamconv.verification.sparse_folder import write_sparse_folder

    start = time.monotonic()
    progress("starting torch and transformers", 0, 1, "steps")
    write_sparse_folder(plan, outline)
    models = ModelVerifier(plan, device, image, reference)
    found = models.check(outline, source, progress, parity, is_sparse=True)
    numbers = {"tensors": sum(len(shard.tensors) for shard in plan.shards), "bytes": plan.weights}
    if source.has_checksums:
        proves = (
            f"when it was sent, every file was as it was copied{_cast_of(plan)}, from records that matched their CRC-32"
        )
        check = Check("bytes", True, proves, (), numbers, "what was sent was not read again")
    else:
        check = Check("bytes", None, "the source carries no CRC-32s, and nothing is kept to be compared with it")
    return _verification(plan, source, (check, *found.checks), found, models, manifest["files"], start)


def _verify_alone(folder: Path, progress: Progress) -> Verification:
    start, manifest = time.monotonic(), read_manifest(folder)
    if manifest is None:
        raise OutputError(f"{folder} has no {MANIFEST_NAME} to check it against. Name the source: verify DIR SOURCE.")
    problems = check_files(folder, manifest, lambda done, total: progress("reading files", done, total, "bytes"))
    files = Check("files", not problems, f"every file is as it was written, by {MANIFEST_NAME}", tuple(problems))
    others = [Check(name, None, "no source was named") for name in ("bytes", "load", "parity", "preprocessing")]
    return Verification(
        checks=(files.since(start), *others),
        device=None,
        reference=None,
        versions={"streamconv": __version__, "python": platform.python_version()},
        source=manifest.get("source", {}),
        output={key: manifest.get(key) for key in ("model", "architecture", "files")},
        memory={},
        seconds=time.monotonic() - start,
    )


def _cast_of(plan: Plan) -> str:
    return ", cast from {from} to {to}".format_map(plan.cast) if plan.cast else ""


def _bytes_as_written(
    folder: Path, plan: Plan, manifest: Mapping[str, Any], progress: Progress
) -> tuple[Check, Mapping[str, Mapping[str, Any]]]:
    """For a source with CRC-32s that is not read a second time: the manifest's word on the files, which are read."""
    start = time.monotonic()
    problems = check_files(folder, manifest, lambda done, total: progress("reading files", done, total, "bytes"))
    problems += check_names(folder, plan)
    if manifest.get("is_crc_checked") is not True:
        problems.append(f"{MANIFEST_NAME} does not say that the source's CRC-32s were checked")
    proves = (
        f"every file is as it was copied{_cast_of(plan)}, by {MANIFEST_NAME}, from records that matched their CRC-32"
    )
    numbers = {"tensors": sum(len(shard.tensors) for shard in plan.shards), "bytes": plan.weights}
    not_checked = "the source's bytes were not read again"
    check = Check("bytes", not problems, proves, tuple(problems), numbers, not_checked)
    return check.since(start), {} if problems else manifest["files"]


def _verification(
    plan: Plan,
    source: OpenSource,
    checks: tuple[Check, ...],
    found: "ModelResults",
    models: "ModelVerifier",
    files: Mapping[str, Any],
    start: float,
) -> Verification:
    return Verification(
        checks=checks,
        device=str(models.device),
        reference=models.reference,
        versions=models.versions,
        source=source.describe(),
        output={
            "model": plan.model.name if plan.model else None,
            "architecture": plan.architecture,
            "files": {name: file for name, file in files.items() if name.endswith(".safetensors")},
        },
        memory=found.memory,
        seconds=time.monotonic() - start,
        predictions=found.predictions,
        pictures=found.pictures,
    )


def _plan_of(folder: Path, source: OpenSource) -> Plan:
    """What the folder should hold: its own labels and dtype, which the source does not know, and all else from it."""
    config = read_config(folder)
    dtype = next((known for known in get_args(CastDtype) if known == config.get("dtype")), None)
    planned = partial(
        make_plan,
        source.tensors,
        source.where,
        max_shard_bytes=sys.maxsize,
        filename=source.source.backbone.name,
        **source.said,
    )
    plan, labels = planned(dtype=dtype), labels_in(config)
    if len(labels) != len(plan.config.get("id2label", ())):
        return plan  # the bytes rung will say what is wrong with config.json
    return planned(dtype=dtype, labels=labels or None)


def _of_type(value: Any, kind: type) -> Any:
    """A value of the manifest, which anyone may have written, or None where it is of another type."""
    return value if type(value) is kind else None


def _bytes(
    folder: Path, plan: Plan, source: OpenSource, progress: Progress
) -> tuple[Check, Mapping[str, Mapping[str, Any]]]:
    start, done = time.monotonic(), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress("comparing bytes", done, plan.weights, "bytes")

    found = check_bytes(folder, plan, source.reader, advance)
    crc = "every source record matches its CRC-32" if source.has_checksums else "the source carries no CRC-32s to check"
    proves = f"every byte of every tensor equals its source's{_cast_of(plan)}; {crc}"
    numbers = {"tensors": found.tensors, "bytes": found.compared}
    return Check("bytes", not found.problems, proves, found.problems, numbers).since(start), found.files
