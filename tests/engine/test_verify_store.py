"""Verification of an output in a store: every difference is found by range reads, and models are not run."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest
import torch

from streamconv import OutputError, UsageError, Verification
from streamconv.formats.safetensors import INDEX_NAME
from tests import api
from tests.checkpoints import make_states
from tests.s3_server import Bucket, Fault, S3Request
from tests.support import flip, run, tiny

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@dataclass
class Stored:
    """A converted model in a bucket under ``url``, and its ``source`` and its own ``folder`` on this machine."""

    bucket: Bucket
    source: Path
    folder: Path

    @property
    def url(self) -> str:
        return f"{self.bucket.url}/a/model"

    def put(self, name: str, data: bytes) -> None:
        self.bucket.put(f"a/model/{name}", data)

    def put_again(self, name: str) -> None:
        """Put a file of the folder, which a test has changed."""
        self.put(name, (self.folder / name).read_bytes())

    def delete(self, name: str) -> None:
        self.bucket.delete(f"a/model/{name}")

    def verify(self) -> Verification:
        return api.verify(self.url, self.source)

    def problems(self) -> str:
        """Verify; return all problems as one text, "" if everything that ran passed."""
        found = self.verify()
        problems = "; ".join(problem for check in found.checks for problem in check.problems)
        assert found.passed is not bool(problems)
        return problems


@pytest.fixture
def stored(bucket: Bucket, tmp_path: Path) -> Stored:
    torch.save(make_states(tiny(layers=1))[0], tmp_path / "x.pth")
    api.convert(tmp_path / "x.pth", tmp_path / "out", max_shard_size="700KB")
    stored = Stored(bucket, tmp_path / "x.pth", tmp_path / "out")
    for path in stored.folder.iterdir():
        stored.put_again(path.name)
    return stored


def test_correct_output_passes_and_nothing_in_the_store_changes(stored: Stored) -> None:
    before = stored.bucket.objects
    done = run("verify", f"{stored.url}/", stored.source, cwd=stored.folder.parent)
    assert done.returncode == 0
    assert "every byte of every tensor equals its source's; every source record matches its CRC-32" in done.stdout
    assert "config        ok" in done.stdout
    assert done.stdout.count("not run: the output is in a store") == 3
    assert done.stdout.splitlines()[-1] == (
        "Looks ok, but not everything was checked: the models were not run, because the output is in a store: to run "
        "them, copy the folder to this machine, then `streamconv verify DIR SOURCE`."
    )
    assert "not recorded" in done.stderr
    assert stored.bucket.objects == before


def test_neither_torch_nor_a_copy_of_the_output_is_needed(stored: Stored) -> None:
    words = ["verify", stored.url, str(stored.source)]
    code = f"import sys; sys.modules['torch'] = None; from streamconv.cli.commands import app; app({words})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=stored.folder)
    assert (done.returncode, "Looks ok" in done.stdout) == (0, True), done.stderr
    assert {path.name for path in stored.folder.parent.iterdir()} == {"out", "x.pth"}


def change_weight(stored: Stored) -> None:
    flip(stored.folder / FIRST, "embeddings.patch_embeddings.projection.bias", 8)
    stored.put_again(FIRST)


def cut(stored: Stored) -> None:
    stored.put(SECOND, (stored.folder / SECOND).read_bytes()[:-4])


def change_metadata(stored: Stored) -> None:
    stored.put(FIRST, (stored.folder / FIRST).read_bytes().replace(b'"format":"pt"', b'"format":"np"', 1))


def change_config(stored: Stored) -> None:
    config = json.loads((stored.folder / "config.json").read_bytes())
    stored.put("config.json", json.dumps({**config, "patch_size": 16}).encode())


def change_index(stored: Stored) -> None:
    index = json.loads((stored.folder / INDEX_NAME).read_bytes())
    index["metadata"]["total_size"] += 1
    stored.put(INDEX_NAME, json.dumps(index).encode())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (change_weight, "embeddings.patch_embeddings.projection.bias differs from its source from element 2 on"),
        (change_weight, f"the sha256 of {FIRST} is not the one in streamconv.json"),
        (cut, f"the output cannot be read: s3://BUCKET/a/model/{SECOND} ends within"),
        (change_metadata, f'{FIRST} has the metadata {{"format": "np"}}, not {{"format": "pt"}}'),
        (lambda stored: stored.delete(SECOND), f"s3://BUCKET/a/model/{SECOND}: there is no such file"),
        (lambda stored: stored.delete(INDEX_NAME), "holds neither model.safetensors nor model.safetensors.index.json"),
        (lambda stored: stored.put("pytorch_model.bin", b"x"), "pytorch_model.bin is not part of the model"),
        (change_config, "config.json: patch_size is 16, not 14"),
        (lambda stored: stored.delete("config.json"), "config.json cannot be read"),
        (change_index, f"{INDEX_NAME}: metadata.total_size is"),
    ],
)
def test_differences_are_found_and_named(stored: Stored, change: Callable[[Stored], None], problem: str) -> None:
    change(stored)
    assert problem.replace("BUCKET", stored.bucket.name) in stored.problems()


def test_cast_output_is_compared_with_the_cast_source(stored: Stored) -> None:
    api.convert(stored.source, stored.folder.parent / "cast", dtype="bfloat16")
    for path in (stored.folder.parent / "cast").iterdir():
        stored.bucket.put(f"cast/{path.name}", path.read_bytes())
    found = api.verify(f"{stored.bucket.url}/cast", stored.source)
    assert found.check("bytes").proves.startswith("every byte of every tensor equals its source's after the cast")
    assert "the cost of the cast was not measured" in found.conclusion.details


def test_edited_labels_are_named_as_they_are_locally(bucket: Bucket, tmp_path: Path) -> None:
    state, head = make_states(tiny(layers=1, classes=3))
    torch.save(state, tmp_path / "x.pth")
    torch.save(head, tmp_path / "head.pth")
    api.convert(tmp_path / "x.pth", tmp_path / "out", head=tmp_path / "head.pth")
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    names = ["ant", "bee", "cat"]
    config |= {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {n: i for i, n in enumerate(names)},
    }
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    for path in (tmp_path / "out").iterdir():
        bucket.put(f"out/{path.name}", path.read_bytes())
    found = api.verify(f"{bucket.url}/out", tmp_path / "x.pth", head=tmp_path / "head.pth")
    assert found.passed
    assert found.edited == ("config.json",)


# Without a source


def test_unchanged_files_are_reported_as_such(stored: Stored) -> None:
    done = run("verify", stored.url, cwd=stored.folder)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "Files unchanged since they were written; not compared with a source."


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (change_weight, f"{FIRST} has changed since it was written: its sha256 is"),
        (change_config, "config.json has"),
        (cut, f"{SECOND} has"),
        (lambda stored: stored.delete(SECOND), f"{SECOND}: there is no such file."),
        (lambda stored: stored.put("other.safetensors", b"x"), "other.safetensors is not part of the model"),
    ],
)
def test_changed_and_missing_files_are_found(stored: Stored, change: Callable[[Stored], None], problem: str) -> None:
    change(stored)
    found = api.verify(stored.url)
    assert not found.passed
    assert problem in "; ".join(found.check("files").problems)
    assert run("verify", stored.url, cwd=stored.folder).returncode == 1


# What proves nothing about the output


def test_folder_without_a_finished_conversion_is_refused(stored: Stored) -> None:
    for url in (f"{stored.bucket.url}/b", "s3://there-is-no-such-bucket/a"):
        with pytest.raises(OutputError, match="no file is in it"):
            api.verify(url, stored.source)
    stored.bucket.put("b/notes.txt", b"mine")
    with pytest.raises(OutputError, match="so it holds something else"):
        api.verify(f"{stored.bucket.url}/b", stored.source)
    stored.delete("streamconv.json")
    with pytest.raises(OutputError, match=r"has no streamconv\.json to check it against"):
        api.verify(stored.url)


@pytest.mark.parametrize(("name", "source"), [(FIRST, True), (FIRST, False), ("config.json", False)])
def test_output_that_changes_while_it_is_read_gets_no_verdict(stored: Stored, name: str, source: bool) -> None:
    def replace_first(request: S3Request) -> None:
        if request.key.endswith(name):
            stored.put(name, (stored.folder / name).read_bytes() + b" ")
            fault.then = None

    fault = Fault("GetObject", times=1_000, then=replace_first)
    stored.bucket.server.faults.append(fault)
    with pytest.raises(OutputError, match=r"was changed while it was verified.*Run the same command again"):
        api.verify(stored.url, stored.source if source else None)


@pytest.mark.parametrize("operation", ["ListObjectsV2", "HeadObject"])
def test_store_that_refuses_access_is_an_error_of_the_output(stored: Stored, operation: str) -> None:
    stored.bucket.server.faults.append(Fault(operation, times=1_000, code="AccessDenied", status=403))
    done = run("verify", stored.url, stored.source, cwd=stored.folder)
    assert (done.returncode, done.stdout) == (4, "")
    assert "cannot be read: PermissionError" in done.stderr
    assert "Check the URL and your credentials" in done.stderr


def test_passing_failures_of_the_store_are_retried(stored: Stored) -> None:
    faults = [
        Fault("GetObject", skip=3, times=2, code="SlowDown", status=503),
        Fault("HeadObject", skip=5, code="InternalError"),
        Fault("ListObjectsV2", code="InternalError"),
    ]
    stored.bucket.server.faults += faults
    assert stored.problems() == ""
    assert [fault.times for fault in faults] == [0, 0, 0]


def test_unfinished_conversion_is_refused(stored: Stored) -> None:
    stored.bucket.server.faults.append(Fault("PutObject", skip=3, times=1_000, code="AccessDenied", status=403))
    with pytest.raises(OutputError, match="refuses put_object"):
        api.convert(stored.source, f"{stored.bucket.url}/b", max_shard_size="700KB")
    for source in (stored.source, None):
        with pytest.raises(OutputError, match="holds an unfinished conversion"):
            api.verify(f"{stored.bucket.url}/b", source)


# What makes no sense for a store


def test_options_that_run_models_are_refused(stored: Stored) -> None:
    done = run("verify", stored.url, stored.source, "--device", "cpu", "--thorough", cwd=stored.folder)
    assert done.returncode == 2
    assert "--device and --thorough cannot be used for an output in a store" in done.stderr
    assert stored.bucket.server.count("ListObjectsV2") == 0
    report = stored.folder.parent / "report.html"
    done = run("verify", stored.url, stored.source, "--no-parity", "--report", report, cwd=stored.folder)
    assert done.returncode == 0
    assert "Partly verified" in report.read_text()


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["push", "URL", "ada/it"], "Copy the folder to this machine, and give its path."),
        (["revert", "URL", "-o", "y.pth"], "Copy the folder to this machine, and give its path."),
        (["revert", "out", "-o", "URL/y.pth"], "Give a path."),
        (["run", "x.pth", "-o", "URL"], "then verify with `streamconv verify URL SOURCE`."),
        (["verify", "out", "--report", "URL/x.html"], "Give a path."),
    ],
)
def test_other_commands_name_what_must_be_on_this_machine(stored: Stored, words: list[str], advice: str) -> None:
    words = [word.replace("URL", stored.url) for word in words]
    done = run(*words, cwd=stored.folder.parent)
    assert done.returncode == 2
    assert f"{stored.url}" in done.stderr
    assert "must be on this machine" in done.stderr
    assert advice in done.stderr


def test_url_of_the_web_is_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be the folder"):
        api.verify("https://example.org/model", tmp_path / "x.pth")


def test_other_stores_are_read_through_fsspec(stored: Stored) -> None:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for path in stored.folder.iterdir():
        memory.pipe_file(f"/model/{path.name}", path.read_bytes())
    assert api.verify("memory://model", stored.source).passed
    memory.pipe_file(f"/model/{FIRST}", bytes(1000))
    assert not api.verify("memory://model").passed
    memory.store.clear()
