"""A finished folder is its user's: what they changed is kept, named and replaced only with --force."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from streamconv import ConversionOptions, UsageError
from streamconv.jobs.conversion import PreparedConversion
from streamconv.jobs.convert_to_hub import refuse_finished
from streamconv.jobs.prepare import prepared_source
from streamconv.output.journal import JOURNAL_NAME
from streamconv.progress import ignore_progress
from tests import api
from tests.support import Save, contents, interrupt_after, run, tiny

PROCESSOR = "preprocessor_config.json"


def edit(path: Path, values: dict[str, Any]) -> bytes:
    """Change values of a JSON file as a person would; return the file's new contents."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}, indent=4))
    return path.read_bytes()


@pytest.fixture
def source(save: Save) -> Path:
    return save(tiny())[0]


@pytest.fixture
def folder(tmp_path: Path, source: Path) -> Path:
    return api.convert(source, tmp_path / "out", max_shard_size="1MB").output


@pytest.mark.parametrize(
    ("name", "values"),
    [
        (PROCESSOR, {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}),  # another size
        (PROCESSOR, {"image_mean": [0.485, 0.456, 0.407]}),
        ("config.json", {"problem_type": "regression"}),
        ("model.safetensors.index.json", {"mine": 1}),
    ],
)
def test_edited_file_is_kept_and_named_and_nothing_is_written(
    tmp_path: Path, source: Path, folder: Path, name: str, values: dict[str, Any]
) -> None:
    edit(folder / name, values)
    (folder / "README.md").write_text("mine")
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    done = api.convert(source, folder, max_shard_size="1MB")
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before
    assert (done.was_finished, done.edited, dict(done.restored), done.resumed_bytes) == (True, (name,), {}, 0)
    words = ("convert", source, "-o", folder, "--max-shard-size", "1MB")
    shown = run(*words, cwd=tmp_path, COLUMNS="400")
    assert "nothing was changed" in shown.stdout
    assert f"{folder / name} was changed after the conversion; it is kept. To write it again, use --force" in (
        shown.stdout
    )
    assert "interruption" not in shown.stdout
    assert json.loads(run(*words, "--json", cwd=tmp_path).stdout)["edited"] == [name]
    preview = run(*words, "--dry-run", cwd=tmp_path, COLUMNS="400").stdout
    assert f"keep      {name}, which was changed after the conversion; --force would replace it" in preview
    assert "nothing: " in preview


def test_folder_that_nobody_edited_has_no_edits(source: Path, folder: Path) -> None:
    done = api.convert(source, folder, max_shard_size="1MB")
    assert (done.was_finished, done.edited, dict(done.restored), done.replaced) == (True, (), {}, ())


def test_force_replaces_edits_and_names_them(tmp_path: Path, source: Path, folder: Path) -> None:
    before = contents(folder)
    edit(folder / PROCESSOR, {"image_mean": [0.5, 0.5, 0.5]})
    words = ("convert", source, "-o", folder, "--max-shard-size", "1MB", "--force")
    preview = run(*words, "--dry-run", cwd=tmp_path, COLUMNS="400").stdout
    assert f"{PROCESSOR} was changed after the conversion; the changes would be lost" in preview
    shown = run(*words, cwd=tmp_path, COLUMNS="400").stdout
    assert f"{folder / PROCESSOR} had been changed after the conversion; --force replaced it" in shown
    assert contents(folder) == before
    assert api.convert(source, folder, max_shard_size="1MB", force=True).replaced == ()


@pytest.mark.parametrize(
    ("pattern", "loss"),
    [
        (PROCESSOR, "missing"),
        ("config.json", "missing"),
        ("*.index.json", "missing"),
        ("model-00001*", "missing"),
        ("model-00001*", "incomplete"),
    ],
)
def test_lost_file_is_written_again_beside_an_edited_one_and_no_interruption_is_claimed(
    tmp_path: Path, source: Path, folder: Path, pattern: str, loss: str
) -> None:
    before = contents(folder)
    edited = "config.json" if pattern == PROCESSOR else PROCESSOR
    wanted = {**before, edited: edit(folder / edited, {"mine": 1})}
    (lost,) = folder.glob(pattern)
    lost.unlink() if loss == "missing" else os.truncate(lost, 1000)
    words = ("convert", source, "-o", folder, "--max-shard-size", "1MB")
    preview = run(*words, "--dry-run", cwd=tmp_path, COLUMNS="400").stdout
    assert f"{lost.name} is {loss}" in preview
    assert f"keep      {edited}" in preview
    planned = json.loads(run(*words, "--dry-run", "--json", cwd=tmp_path).stdout)
    assert [each["file"] for each in planned["write"]] == [lost.name]
    assert planned["restored"] == {lost.name: loss}
    shown = run(*words, cwd=tmp_path, COLUMNS="400").stdout
    assert f"{lost.name} was {loss}, and was written again" in shown
    assert f"{edited} was changed after the conversion; it is kept" in shown
    assert "interruption" not in shown
    assert contents(folder) == wanted  # the manifest, too: it records what was written
    done = api.convert(source, folder, max_shard_size="1MB")
    assert (done.was_finished, done.edited) == (True, (edited,))


@pytest.mark.parametrize("left", [b"", bytes(300)])
def test_small_file_that_a_power_cut_emptied_is_not_an_edit(source: Path, folder: Path, left: bytes) -> None:
    before = contents(folder)
    (folder / PROCESSOR).write_bytes(left)
    done = api.convert(source, folder, max_shard_size="1MB")
    assert (done.edited, dict(done.restored)) == ((), {PROCESSOR: "incomplete"})
    assert contents(folder) == before


def test_file_that_appeared_in_an_unfinished_conversion_is_kept(
    tmp_path: Path, source: Path, frequent_journal_entries: None
) -> None:
    out = tmp_path / "unfinished"
    interrupt_after(source, out, 0.5)
    (out / PROCESSOR).write_text('{"mine": 1}')
    done = api.convert(source, out)
    assert done.resumed_bytes > 0
    assert done.edited == (PROCESSOR,)
    assert (out / PROCESSOR).read_text() == '{"mine": 1}'
    again = api.convert(source, out)
    assert (again.was_finished, again.edited) == (True, (PROCESSOR,))


def test_edits_survive_an_interrupted_repair(tmp_path: Path, source: Path, frequent_journal_entries: None) -> None:
    out = api.convert(source, tmp_path / "out").output
    before = contents(out)
    mine = edit(out / PROCESSOR, {"image_mean": [0.5, 0.5, 0.5]})
    (out / "model.safetensors").unlink()
    interrupt_after(source, out, 0.5)
    assert (out / JOURNAL_NAME).exists()
    assert api.convert(source, out).edited == (PROCESSOR,)
    assert contents(out) == {**before, PROCESSOR: mine}


def test_labels_that_were_edited_are_kept_and_the_manifest_records_the_given_ones(tmp_path: Path, save: Save) -> None:
    backbone, head = save(tiny(classes=3))
    out = api.convert(backbone, tmp_path / "out", head=head).output
    before = contents(out)
    mine = edit(out / "config.json", {"id2label": {"0": "a", "1": "b", "2": "c"}})
    (out / PROCESSOR).unlink()
    done = api.convert(backbone, out, head=head)
    assert (done.edited, dict(done.restored)) == (("config.json",), {PROCESSOR: "missing"})
    assert contents(out) == {**before, "config.json": mine}


def test_larger_or_unreadable_edit_is_kept_too(source: Path, folder: Path) -> None:
    (folder / PROCESSOR).write_bytes(b" " * (11 << 20))
    assert api.convert(source, folder, max_shard_size="1MB").edited == (PROCESSOR,)
    assert (folder / PROCESSOR).stat().st_size == 11 << 20


def test_edits_in_a_staging_folder_are_not_deleted(tmp_path: Path, source: Path, folder: Path) -> None:
    edit(folder / PROCESSOR, {"mine": 1})
    next(folder.glob("model-00001*")).unlink()  # so it is not finished
    options = ConversionOptions(max_shard_size="1MB")
    with prepared_source(source, options, ignore_progress) as prepared:
        with pytest.raises(UsageError, match=f"{PROCESSOR} was not written by streamconv, or changed since"):
            refuse_finished(PreparedConversion.of(prepared, folder, force=False))
        refuse_finished(PreparedConversion.of(prepared, folder, force=True))
