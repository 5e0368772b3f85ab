"""A verdict is recorded only for the files that were verified, and only such files are published.

No model runs here: a stand-in for them changes the folder while it is verified.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

import streamconv
from streamconv import ChangedError, OutputError, PushOptions, UsageError, Verification, VerificationOptions
from streamconv.hub.destination import Destination
from streamconv.jobs.options import SourceOptions
from streamconv.jobs.prepare import prepared_source
from streamconv.jobs.recorded import recorded_options, with_recorded_as_unproved
from streamconv.jobs.verify import verify_prepared
from streamconv.output.journal import JOURNAL_NAME
from streamconv.output.manifest import Manifest
from streamconv.output.open_journal import locked_journal
from streamconv.progress import Progress, ignore_progress
from streamconv.verification.process import ModelJob
from streamconv.verification.result import Check, ModelResults
from tests import api
from tests.checkpoints import make_states
from tests.hub_server import HubServer
from tests.support import contents, sha256_of, tiny

CONFIG, PROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"
FULL, PARTIAL = {"load": True, "parity": True, "preprocessing": True}, {"load": True, "preprocessing": True}


class Models:
    """Stands in for the models: calls ``during`` while they would run, and reports these checks."""

    is_elsewhere = False

    def __init__(self, checks: dict[str, bool], during: Callable[[], object]):
        self._checks, self._during = checks, during

    def wait_until_ready(self, progress: Progress) -> None: ...

    def check(self, job: ModelJob, progress: Progress) -> ModelResults:
        self._during()
        return ModelResults(
            tuple(Check(name, passed, "scripted") for name, passed in self._checks.items()), device="cpu"
        )

    def close(self) -> None: ...


def verified(
    folder: Path, source: Path, checks: dict[str, bool] = FULL, during: Callable[[], object] = lambda: None
) -> Verification:
    conversion = recorded_options(folder, SourceOptions())
    with prepared_source(source, conversion, ignore_progress, output=folder, labels_of=folder) as prepared:
        options = VerificationOptions(device="cpu")
        return verify_prepared(folder, prepared, options, Models(checks, during), ignore_progress)


def recorded(folder: Path) -> dict[str, Any] | None:
    verdict: dict[str, Any] | None = json.loads((folder / "streamconv.json").read_text())["verification"]
    return verdict


@pytest.fixture
def source(tmp_path: Path) -> Path:
    safetensors.torch.save_file(make_states(tiny())[0], tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


@pytest.fixture
def folder(tmp_path: Path, source: Path) -> Path:
    return api.convert(source, tmp_path / "out").output


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_and_undo(path: Path) -> None:
    data, state = path.read_bytes(), path.stat()
    edit(path, mine=1)
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def exchange(path: Path) -> None:
    """Put other weights of the same size and time in place of a file."""
    state = path.stat()
    tensors = {name: value + 1 for name, value in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(tensors, path.with_name("other"), {"format": "pt"})
    os.utime(path.with_name("other"), ns=(state.st_atime_ns, state.st_mtime_ns))
    path.with_name("other").replace(path)


def move_link(path: Path) -> None:
    path.rename(path.with_name("one.txt"))
    shutil.copy2(path.with_name("one.txt"), path.with_name("two.txt"))
    path.symlink_to("two.txt")


CHANGES: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "edit": (lambda folder, source: edit(folder / CONFIG, problem_type="regression"), CONFIG),
    "undone edit": (lambda folder, source: edit_and_undo(folder / CONFIG), CONFIG),
    "lost file": (lambda folder, source: (folder / PROCESSOR).unlink(), PROCESSOR),
    "moved link": (lambda folder, source: move_link(folder / PROCESSOR), PROCESSOR),
    "other weights": (lambda folder, source: exchange(folder / WEIGHTS), WEIGHTS),
    "an adapter": (lambda folder, source: (folder / "adapter_config.json").write_text("{}"), "adapter_config.json"),
    "other manifest": (lambda folder, source: edit(folder / "streamconv.json", notes=["mine"]), "streamconv.json"),
    "converted again": (lambda folder, source: api.convert(source, folder, force=True, dtype="float16"), CONFIG),
    "the same again": (lambda folder, source: api.convert(source, folder, force=True), CONFIG),
}


@pytest.mark.parametrize("change", CHANGES)
def test_folder_that_changes_meanwhile_gets_no_verdict(folder: Path, source: Path, change: str) -> None:
    function, name = CHANGES[change]
    with pytest.raises(OutputError, match=rf"was changed while it was verified \(.*{name}.*no verdict\. Run the same"):
        verified(folder, source, during=lambda: function(folder, source))
    assert recorded(folder) is None
    assert not (folder / JOURNAL_NAME).exists()


def in_a_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("make", [in_a_loop, a_folder])
@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, PROCESSOR])
def test_file_that_cannot_be_read_is_an_error_and_not_a_difference(
    hub: HubServer, folder: Path, source: Path, name: str, make: Callable[[Path], None]
) -> None:
    verified(folder, source)
    make(folder / name)
    for command in (lambda: api.verify(folder), lambda: verified(folder, source), lambda: api.convert(source, folder)):
        with pytest.raises(OutputError, match=rf"{name} .*, so its contents are not known\. Make it a file"):
            command()
    with pytest.raises(OutputError, match=rf"{name} (cannot be opened: Too many|is not a regular|is a link)"):
        streamconv.publish(folder)
    assert (recorded(folder) or {})["passed"] is True
    assert not (folder / JOURNAL_NAME).exists()


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_failing_disk_of_the_output_is_an_error_and_not_a_difference(
    folder: Path, source: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, inode = os.preadv, os.stat(folder / name).st_ino

    def failing(fd: int, buffers: Any, offset: int) -> int:
        if os.fstat(fd).st_ino == inode:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    for command in (lambda: api.verify(folder), lambda: verified(folder, source)):
        with pytest.raises(OutputError, match=rf"{name} cannot be read at byte 0: Input/output error, so its contents"):
            command()


def test_folder_that_cannot_be_listed_is_an_error(folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> list[str]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "listdir", refuse)
    for command in (lambda: api.verify(folder), lambda: verified(folder, source)):
        with pytest.raises(OutputError, match=r"names of the files in .*Permission denied, so it may hold other"):
            command()


@pytest.mark.parametrize("name", [CONFIG, PROCESSOR])
def test_file_that_is_too_large_is_altered_and_not_edited(folder: Path, source: Path, name: str) -> None:
    with (folder / name).open("ab") as file:
        file.write(b" " * (11 << 20))
    found = api.verify(folder)
    assert (found.passed, found.edited) == (False, ())
    assert found.conclusion.details == "Failed: files."
    assert found.checks[0].problems[0].startswith(f"{name} has 11,53")
    found = verified(folder, source)
    assert (found.passed, found.edited) == (False, ())
    assert any(f"{name} has 11,53" in problem for problem in found.check("config").problems)


def test_folder_that_changes_while_it_is_verified_alone_is_not_a_difference(folder: Path, source: Path) -> None:
    def change(step: str, done: int, total: int, unit: str) -> None:
        exchange(folder / WEIGHTS)

    with pytest.raises(OutputError, match=r"was changed while it was verified \(model\.safetensors\)"):
        api.verify(folder, progress=change)


@pytest.mark.parametrize("change", [exchange, move_link])
def test_source_that_changes_meanwhile_gets_no_verdict(
    folder: Path, source: Path, change: Callable[[Path], object]
) -> None:
    """The bytes are read from the open file, and the original model's weights by the path."""
    with pytest.raises(ChangedError, match="was changed while it was read"):
        verified(folder, source, during=lambda: change(source))
    assert recorded(folder) is None


def test_verdict_lists_every_file_and_allows_unrelated_changes(folder: Path, source: Path) -> None:
    found = verified(folder, source, during=lambda: (folder / "README.md").write_text("mine"))
    assert found.passed
    assert not found.not_recorded
    verdict = recorded(folder)
    assert verdict is not None
    names = {CONFIG, PROCESSOR, WEIGHTS}
    assert {name: file["sha256"] for name, file in verdict["output"]["files"].items()} == {
        name: sha256_of(folder / name) for name in names
    }
    assert {path.name for path in folder.iterdir()} == {*names, "README.md", "streamconv.json"}


def test_two_verifications_at_once_both_record(folder: Path, source: Path) -> None:
    found = verified(folder, source, during=lambda: verified(folder, source))
    assert found.passed
    assert not found.not_recorded


def test_verdict_is_shown_and_not_recorded_while_another_process_holds_the_folder(folder: Path, source: Path) -> None:
    with locked_journal(folder / JOURNAL_NAME, folder):
        found = verified(folder, source)
        assert (folder / JOURNAL_NAME).exists()
    assert found.passed
    assert "is being written by" in found.not_recorded
    (folder / JOURNAL_NAME).unlink()
    shutil.copytree(folder, folder.with_name("begun"))
    manifest = Manifest.read(folder)
    assert manifest is not None

    def begin_to_convert() -> None:
        with locked_journal(folder / JOURNAL_NAME, folder) as journal:
            journal.start(replace(manifest, plan="other"), {})

    found = verified(folder, source, during=begin_to_convert)
    assert "another process has begun to convert into" in found.not_recorded
    assert (folder / JOURNAL_NAME).exists()
    assert recorded(folder) is None


def test_read_only_folder_is_verified(folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def read_only(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_CREAT and folder in Path(path).parents:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", read_only)
    found = verified(folder, source)
    assert found.passed
    assert "Read-only file system" in found.not_recorded


def test_lock_of_a_killed_verification_is_ignored(folder: Path, source: Path) -> None:
    (folder / JOURNAL_NAME).touch()
    assert api.verify(folder).passed
    assert api.convert(source, folder).was_finished
    assert not verified(folder, source).not_recorded
    assert not (folder / JOURNAL_NAME).exists()


def test_comparison_with_another_file_is_not_recorded(tmp_path: Path, folder: Path, source: Path) -> None:
    """Without checksums, other weights with the same names and shapes have the same fingerprint."""
    verified(folder, source)
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file(make_states(tiny(), seed=1)[0], other)
    found = verified(folder, other)
    assert not found.passed
    assert "names another file as the source" in found.not_recorded
    assert (recorded(folder) or {})["passed"] is True
    shutil.copy(source, other)  # the same bytes at another time
    assert not verified(folder, other).not_recorded
    exchange(folder / WEIGHTS)
    found = verified(folder, source)
    assert not found.passed
    assert not found.not_recorded
    assert (recorded(folder) or {})["passed"] is False


@pytest.mark.parametrize("parity", [True, False])
def test_partial_verification_neither_upgrades_nor_downgrades_a_fuller_one(
    folder: Path, source: Path, parity: bool
) -> None:
    verified(folder, source, {**FULL, "parity": parity})
    found = verified(folder, source, PARTIAL)
    assert found.passed
    assert found.not_recorded == "the recorded one, on the same files, ran more checks (parity)."
    assert (recorded(folder) or {})["passed"] is parity
    edit(folder / CONFIG, mine=1)
    assert not verified(folder, source, PARTIAL).not_recorded  # about other files
    assert not verified(folder, source, {**PARTIAL, "load": False}).not_recorded
    assert (recorded(folder) or {})["passed"] is False


@pytest.mark.parametrize(
    "verdict", [{"passed": True}, {"passed": True, "output": []}, {"passed": True, "output": {"files": 1}}]
)
def test_verdict_about_other_files_is_not_trusted(folder: Path, source: Path, verdict: dict[str, Any]) -> None:
    """An older version recorded no files; or the manifest's verdict was copied from another folder."""
    edit(folder / "streamconv.json", verification=verdict)
    with pytest.raises(UsageError, match=r"recorded verification, but of other files\. Verify it first"):
        streamconv.publish(folder)
    assert not verified(folder, source, PARTIAL).not_recorded


def test_verdict_of_another_folder_is_not_trusted(tmp_path: Path, folder: Path, source: Path) -> None:
    verified(folder, source)
    other = api.convert(source, tmp_path / "other", dtype="float16").output
    edit(other / "streamconv.json", verification=recorded(folder))
    with pytest.raises(UsageError, match="recorded verification, but of other files"):
        streamconv.publish(other)


def test_edits_of_a_failed_verification_are_not_accepted_later(folder: Path, source: Path) -> None:
    edit(folder / CONFIG, mine=1)
    verified(folder, source, {**FULL, "parity": False})
    assert api.verify(folder).conclusion.kind == "failed"
    verified(folder, source)
    assert "(config.json had been edited)" in api.verify(folder).conclusion.title


def test_bytes_of_every_small_file_are_compared_with_the_manifest(folder: Path, source: Path) -> None:
    (folder / CONFIG).write_text((folder / CONFIG).read_text() + " ")
    found = verified(folder, source)
    assert (found.passed, found.edited) == (True, (CONFIG,))
    assert (
        "config.json has other bytes than streamconv.json records, but the same values" in found.check("config").proves
    )


def test_decisions_that_are_taken_from_the_manifest_are_named(tmp_path: Path, folder: Path, source: Path) -> None:
    """The author of a wrong config.json could also have written that the user gave these values."""
    backbone, head = make_states(tiny(classes=3))
    safetensors.torch.save_file(
        {f"teacher.{key}": value for key, value in backbone.items()}, tmp_path / "c.safetensors"
    )
    safetensors.torch.save_file(head, tmp_path / "head.safetensors")
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    files = {"head": tmp_path / "head.safetensors"}
    decided = {"labels": tmp_path / "labels.txt", "num_heads": 4, "image_mean": 0.1, "select": "teacher"}
    theirs = api.convert(tmp_path / "c.safetensors", tmp_path / "theirs", **files, **decided).output

    def unproved(folder: Path, source: Path, given: SourceOptions) -> list[str]:
        options = recorded_options(folder, given)
        with prepared_source(source, options, ignore_progress, output=folder, labels_of=folder) as prepared:
            found = with_recorded_as_unproved(prepared, folder, given).plan.unproved
            return [each for each in found if each not in prepared.plan.unproved]

    assert unproved(theirs, tmp_path / "c.safetensors", SourceOptions(**files)) == [
        "the number of attention heads (4) is taken from streamconv.json: give --num-heads if you know it",
        "the prefix teacher is taken from streamconv.json: give --select if you know it",
        "the image processor is taken from streamconv.json",
        "the labels are taken from streamconv.json",
    ]
    given = SourceOptions(**files, num_heads=4, select="teacher")
    assert len(unproved(theirs, tmp_path / "c.safetensors", given)) == 2
    assert not unproved(folder, source, SourceOptions())
    assert not unproved(api.convert(theirs, tmp_path / "again").output, theirs, SourceOptions())


def test_small_file_that_only_the_manifest_names_is_reported(tmp_path: Path) -> None:
    """Without three channels, no image processor is planned."""
    source = tmp_path / "x.safetensors"
    safetensors.torch.save_file(make_states(replace(tiny(), channels=4))[0], source)
    folder = api.convert(source, tmp_path / "out").output
    files = json.loads((folder / "streamconv.json").read_text())["files"]
    edit(folder / "streamconv.json", files={**files, PROCESSOR: {"size": 2, "sha256": "0" * 64}})
    assert f"{PROCESSOR} is missing, but streamconv.json lists it" in verified(folder, source).check("config").problems
    (folder / PROCESSOR).write_text("{}")
    details = verified(folder, source).conclusion.details
    assert f"{PROCESSOR} was edited after the conversion (which was not compared with the source)" in details


@pytest.mark.parametrize("name", [WEIGHTS, "streamconv.json"])
def test_file_that_changes_while_it_is_uploaded_is_not_published(
    hub: HubServer, folder: Path, source: Path, name: str
) -> None:
    verified(folder, source)
    before = contents(folder)

    def change(step: str, done: int, total: int, unit: str) -> None:
        if step.startswith("uploading" if name == WEIGHTS else "checking"):
            exchange(folder / name) if name == WEIGHTS else edit(folder / name, notes=["mine"])

    push = PushOptions(Destination("it"))
    with pytest.raises(OutputError, match=rf"{name} was changed while it was"):
        streamconv.publish(folder, push, progress=change)
    assert "ada/it" not in hub.repos or WEIGHTS not in hub.files("ada/it")
    for file, data in before.items():
        (folder / file).write_bytes(data)
    streamconv.publish(folder, push)
    assert hub.files("ada/it").items() >= before.items()
