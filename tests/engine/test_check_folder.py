"""A folder without its source: every file is compared with what the manifest records."""

import hashlib
import json
import os
import re
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from streamconv import OutputError
from tests import api
from tests.support import Save, run_python, tiny


@pytest.fixture
def folder(tmp_path: Path, save: Save) -> Path:
    backbone, _ = save(tiny())
    return api.convert(backbone, tmp_path / "out", max_shard_size="1MB").output


def problems(folder: Path) -> tuple[str, ...]:
    found = api.verify(folder)
    files, *others = found.checks
    assert [check.passed for check in others] == [None] * 5
    assert found.passed == files.passed == (not files.problems)
    return files.problems


def test_unchanged_folder_passes_and_names_the_checks_that_did_not_run(folder: Path) -> None:
    assert problems(folder) == ()
    found = api.verify(folder).as_dict()
    assert json.loads(json.dumps(found))["source"]["backbone"]["file"] == "source.pth"
    assert {check["name"] for check in found["checks"] if check["passed"] is None} == {
        "bytes", "config", "load", "parity", "preprocessing"
    }  # fmt: skip


NAMES = ["model-00002-of-*.safetensors", "config.json", "preprocessor_config.json", "model.safetensors.index.json"]


@pytest.mark.parametrize("pattern", NAMES)
def test_flipped_bit_in_any_file_is_found(folder: Path, pattern: str) -> None:
    name = next(folder.glob(pattern)).name
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    recorded, found = (hashlib.sha256(content).hexdigest()[:12] for content in ((folder / name).read_bytes(), data))
    (folder / name).write_bytes(data)
    changed = f"{name} has changed since it was written"
    assert problems(folder) == (f"{changed}: its sha256 is {found}…, not {recorded}…",)


@pytest.mark.parametrize("pattern", NAMES)
def test_missing_or_truncated_file_is_found(folder: Path, pattern: str) -> None:
    name = next(folder.glob(pattern)).name
    size = (folder / name).stat().st_size
    os.truncate(folder / name, size - 1)
    assert problems(folder) == (f"{name} has {size - 1:,} bytes, not {size:,}",)
    (folder / name).unlink()
    (problem,) = problems(folder)
    assert problem.endswith(f"{name}: there is no such file.")


def test_weights_that_the_manifest_does_not_list_are_found(folder: Path) -> None:
    """Other files that transformers would prefer to the model's own are found, too."""
    others = ("adapter_config.json", "processor_config.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    for name in (*others, "notes.txt"):
        (folder / name).touch()
    assert problems(folder) == tuple(f"{name} is not part of the model" for name in others)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"../source.pth": {"size": 1, "sha256": ""}}, "names '../source.pth', which streamconv does not write"),
        ({"config.json": {"size": "x", "sha256": ""}}, "files.config.json.size is 'x', which is not of type int"),
        ({"config.json": {"size": 1}}, "files.config.json.sha256 is missing"),
        (["config.json"], "files is not a JSON object"),
        (None, "files is not a JSON object"),
        ({}, "files is empty"),
    ],
)
def test_damaged_manifest_is_refused_and_its_field_named(folder: Path, files: object, message: str) -> None:
    manifest = json.loads((folder / "streamconv.json").read_text())
    (folder / "streamconv.json").write_text(json.dumps({**manifest, "files": files}))
    with pytest.raises(OutputError, match=rf"is damaged: its field.* {re.escape(message)}\. Move it away"):
        api.verify(folder)


@pytest.mark.parametrize("version", [None, 0, 99, "1"])
def test_manifest_of_another_version_is_refused(folder: Path, version: object) -> None:
    manifest = json.loads((folder / "streamconv.json").read_text())
    (folder / "streamconv.json").write_text(json.dumps({**manifest, "format_version": version}))
    with pytest.raises(OutputError, match="was written by another version of streamconv: convert again"):
        api.verify(folder)


def test_folder_without_manifest_or_with_a_journal_is_refused(folder: Path) -> None:
    (folder / ".streamconv-journal").write_text("{}\n")
    with pytest.raises(OutputError, match=r"unfinished conversion\. Finish it first"):
        api.verify(folder)
    (folder / ".streamconv-journal").unlink()
    (folder / "streamconv.json").unlink()
    with pytest.raises(OutputError, match=r"no streamconv\.json to check it against\. Give the source"):
        api.verify(folder)


def test_verifying_a_folder_alone_imports_no_torch_and_exits_with_1_on_differences(folder: Path) -> None:
    code = (
        "import sys\nfrom streamconv.cli.commands import app\n"
        f"app(['verify', {str(folder)!r}], standalone_mode=False)\n"
        "print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    verdict, modules = run_python(code).splitlines()[-2:]
    assert verdict == "Files unchanged since they were written; not compared with a source."
    assert modules == "[]"
    (folder / "config.json").unlink()
    verify = [sys.executable, "-m", "streamconv", "verify", folder]
    done = subprocess.run([*verify, "--report", folder.parent / "x.html"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-2] == ("Do not use these files. Failed: files.")
    assert "FAILED   files are missing, or differ from what was written" in done.stdout
    page = (folder.parent / "x.html").read_text("utf-8")
    assert "Verification failed" in page
    assert f"streamconv verify {folder} --report {folder.parent / 'x.html'}" in page
    done = subprocess.run([*verify, "--device", "cpu"], capture_output=True, text=True)
    assert (done.returncode, "Give SOURCE, too" in done.stderr) == (2, True)


def test_result_names_its_date_its_command_and_every_file_in_order(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    folder = api.convert(backbone, tmp_path / "out", max_shard_size="150KB").output
    done = subprocess.run(
        [sys.executable, "-m", "streamconv", "verify", folder, "--json"], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    files = list(found["output"]["files"])
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) >= 12
    assert shards == [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    assert files[len(shards) :] == ["config.json", "model.safetensors.index.json", "preprocessor_config.json"]
    digest = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    assert found["output"]["files"]["config.json"]["sha256"] == digest
    assert found["command"] == f"streamconv verify {folder} --json"
    age = datetime.now(timezone.utc) - datetime.fromisoformat(found["date"])
    assert timedelta(0) <= age < timedelta(minutes=10)
    assert api.verify(folder).command == ""
