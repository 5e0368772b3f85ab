"""--force replaces what streamconv wrote, and nothing else."""

import json
from pathlib import Path

import pytest
import torch

import streamconv
from streamconv import MappingError, OutputError, UsageError
from streamconv.output.journal import JOURNAL_NAME
from tests import api
from tests.support import Save, interrupt_after, model_files, run, tiny


def test_force_replaces_a_finished_conversion_with_another_one(tmp_path: Path, save: Save) -> None:
    first, _ = save(tiny(layers=4), "first")
    second, _ = save(tiny(), "second")
    out, wanted = tmp_path / "out", tmp_path / "wanted"
    api.convert(first, out, max_shard_size="300KB")
    (out / "notes.txt").write_text("mine")
    assert (out / "model.safetensors.index.json").exists()
    with pytest.raises(OutputError, match=r"replace it with --force"):
        api.convert(second, out)
    api.convert(second, out, force=True)
    api.convert(second, wanted)
    assert model_files(out) == {**model_files(wanted), "notes.txt": b"mine"}
    assert api.convert(second, out).was_finished


def test_force_replaces_an_unfinished_conversion_of_another_source(
    tmp_path: Path, save: Save, frequent_journal_entries: None
) -> None:
    first, _ = save(tiny(layers=4), "first")
    second, _ = save(tiny(), "second")
    interrupt_after(first, tmp_path / "out", 0.6, max_shard_size="300KB")
    assert len(list((tmp_path / "out").iterdir())) > 2
    with pytest.raises(OutputError, match=r"unfinished conversion.*--force"):
        api.convert(second, tmp_path / "out")
    (tmp_path / "out" / ".model-00004-of-00004.safetensors.streamconv-incomplete").touch()  # a killed process left it
    api.convert(second, tmp_path / "out", force=True)
    api.convert(second, tmp_path / "wanted")
    assert model_files(tmp_path / "out") == model_files(tmp_path / "wanted")


def test_force_writes_the_same_conversion_again_but_resumes_it_if_unfinished(
    tmp_path: Path, save: Save, frequent_journal_entries: None
) -> None:
    source, _ = save(tiny(layers=4))
    api.convert(source, tmp_path / "out")
    before = model_files(tmp_path / "out")
    damaged = bytearray(before["model.safetensors"])
    damaged[-1] ^= 1
    (tmp_path / "out" / "model.safetensors").write_bytes(damaged)
    assert not api.convert(source, tmp_path / "out", force=True).was_finished
    assert model_files(tmp_path / "out") == before
    interrupt_after(source, tmp_path / "out", 0.6, force=True)
    assert (tmp_path / "out" / JOURNAL_NAME).exists()
    assert api.convert(source, tmp_path / "out", force=True).resumed_bytes > 0
    assert model_files(tmp_path / "out") == before


def test_force_deletes_no_user_file_that_a_foreign_manifest_or_journal_names(tmp_path: Path, save: Save) -> None:
    source, _ = save(tiny())
    out, outside = api.convert(source, tmp_path / "out").output, tmp_path / ".out.streamconv-incomplete"
    for path in (out / "thesis.txt", outside):
        path.write_text("mine")
    manifest = json.loads((out / "streamconv.json").read_bytes())
    for name in ("thesis.txt", ".ssh", "x.safetensors", "streamconv.json", "", "."):
        files = {**manifest["files"], name: {"size": 4, "sha256": ""}}
        (out / "streamconv.json").write_text(json.dumps({**manifest, "files": files}))
        with pytest.raises(OutputError, match=f"files names '{name}', which streamconv does not write"):
            api.convert(source, out, force=True, dtype="float16")
    for name in model_files(out).keys() - {"thesis.txt"}:
        (out / name).unlink()
    (out / "streamconv.json").unlink()
    entries = [{"format_version": 1, "provenance": {"source": {}, "plan": "other"}}]
    entries += [{"file": name, "resume_point": {"size": 4, "sha256": ""}} for name in ("thesis.txt", "", ".")]
    (out / JOURNAL_NAME).write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    api.convert(source, out, force=True)
    assert [path.read_text() for path in (out / "thesis.txt", outside)] == ["mine", "mine"]


def test_force_deletes_nothing_before_the_plan_is_made(tmp_path: Path, save: Save) -> None:
    source, _ = save(tiny())
    state = torch.load(source)
    torch.save({**state, "more": torch.zeros(1)}, tmp_path / "wrong.pth")
    api.convert(source, tmp_path / "out")
    before = model_files(tmp_path / "out")
    with pytest.raises(MappingError):
        api.convert(tmp_path / "wrong.pth", tmp_path / "out", force=True)
    with pytest.raises(UsageError, match="would overwrite it"):  # its old shards are this source
        api.convert(tmp_path / "out", tmp_path / "out", max_shard_size="100KB", force=True)
    assert model_files(tmp_path / "out") == before


def test_force_refuses_files_that_streamconv_did_not_write(
    tmp_path: Path, save: Save, frequent_journal_entries: None
) -> None:
    first, _ = save(tiny(layers=4), "first")
    second, _ = save(tiny(), "second")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    with pytest.raises(OutputError, match=r"config\.json, which streamconv did not write"):
        api.convert(second, foreign, force=True)
    assert model_files(foreign) == {"config.json": b"{}"}
    api.convert(first, tmp_path / "finished", max_shard_size="300KB")
    interrupt_after(first, tmp_path / "unfinished", 0.6, max_shard_size="300KB")
    for folder in (tmp_path / "finished", tmp_path / "unfinished"):
        (folder / "model.safetensors").write_text("mine")
        before = model_files(folder)
        with pytest.raises(OutputError, match=r"holds model\.safetensors, which streamconv did not write"):
            api.convert(second, folder, force=True)
        assert model_files(folder) == before


def test_force_follows_no_names_out_of_the_folder(tmp_path: Path, save: Save) -> None:
    source, _ = save(tiny())
    api.convert(source, tmp_path / "out")
    (tmp_path / "mine").write_text("mine")
    entry = '{"file": "../mine", "resume_point": {"size": 4, "sha256": ""}}\n'
    (tmp_path / "out" / JOURNAL_NAME).write_text(entry.replace("{", '{"format_version": 1, ', 1))
    api.convert(source, tmp_path / "out", force=True)
    assert (tmp_path / "mine").read_text() == "mine"


def test_killed_replacement_is_continued_by_the_same_command(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = save(tiny(layers=4), "first")
    second, _ = save(tiny(), "second")
    api.convert(first, tmp_path / "out", max_shard_size="300KB")
    deleted: list[Path] = []
    unlink = Path.unlink

    def stop_after_three(path: Path, missing_ok: bool = False) -> None:
        if len(deleted) == 3:
            raise KeyboardInterrupt
        deleted.extend([path] if path.exists() else [])
        unlink(path, missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", stop_after_three)
        with pytest.raises(KeyboardInterrupt):
            api.convert(second, tmp_path / "out", force=True)
    assert deleted[0].name == "model.safetensors.index.json"
    with pytest.raises(OutputError, match="another conversion"):
        api.convert(second, tmp_path / "out")
    api.convert(second, tmp_path / "out", force=True)
    api.convert(second, tmp_path / "wanted")
    assert model_files(tmp_path / "out") == model_files(tmp_path / "wanted")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_revert_replaces_a_file_with_force_once_the_new_one_is_complete(
    tmp_path: Path, save: Save, suffix: str
) -> None:
    source, _ = save(tiny())
    api.convert(source, tmp_path / "out")
    file = tmp_path / f"back{suffix}"
    file.write_text("before")
    with pytest.raises(OutputError, match=r"exists already.*--force"):
        streamconv.revert(tmp_path / "out", file)
    before = {path.name for path in tmp_path.iterdir()}

    class Stop(BaseException):
        pass

    def stop(*report: object) -> None:
        raise Stop

    with pytest.raises(Stop):
        streamconv.revert(tmp_path / "out", file, force=True, progress=stop)
    assert file.read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == before
    streamconv.revert(tmp_path / "out", file, force=True)

    again = api.convert(file, tmp_path / "again").shards
    assert again == api.convert(source, tmp_path / "wanted").shards


def test_synth_and_run_replace_with_force(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_text("before")
    refused = run("synth", "dinov2_vits14", "x.pth", cwd=tmp_path)
    assert (refused.returncode, "--force" in refused.stderr) == (4, True)
    assert run("synth", "dinov2_vits14", "x.pth", "--force", cwd=tmp_path).returncode == 0
    (tmp_path / "folder.pth").mkdir()
    refused = run("synth", "dinov2_vits14", "folder.pth", "--force", cwd=tmp_path)
    assert (refused.returncode, refused.stderr) == (4, "error: folder.pth is a folder. Choose another name.\n")
    words = ("run", "x.pth", "--no-verify", "-o", "out")
    assert run(*words, cwd=tmp_path).returncode == 0
    refused = run(*words, "--dtype", "float16", cwd=tmp_path)
    assert (refused.returncode, "--force" in refused.stderr) == (4, True)
    assert run(*words, "--dtype", "float16", "--force", cwd=tmp_path).returncode == 0
