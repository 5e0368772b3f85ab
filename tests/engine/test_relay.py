"""From an address to the Hub with one shard on the disk, over real HTTP on both sides (see hub_server, file_server)."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import streamconv
from streamconv import OutputError, UsageError, Verification, errors
from streamconv.hub.repository import Destination, Repository
from streamconv.jobs.convert_to_hub import HubConversion, convert_to_hub
from streamconv.jobs.verify import verify_uploaded
from streamconv.planning.plan import Plan
from streamconv.progress import ignore_progress
from tests.conftest import make_states, tiny
from tests.engine.test_hub import hub
from tests.file_server import FileServer
from tests.hub_server import TOKEN, HubServer

__all__ = ["hub"]  # the fixture

MODEL = tiny(swiglu=True, layers=4, hidden=256)
SHARD = "3MB"


@pytest.fixture
def source(server: FileServer) -> str:
    torch.save(make_states(MODEL)[0], server.folder / "x.pth")
    return f"{server.url}/x.pth"


def verify(plan: Plan, *args: Any) -> Verification:
    return verify_uploaded(plan, *args, device="cpu")


def relayed(source: str, folder: Path, **changed: Any) -> HubConversion:
    options: dict[str, Any] = {
        "head": None, "labels": None, "max_shard_size": SHARD, "dtype": None, "select": None, "num_heads": None,
        "unverified": False, "progress": ignore_progress,
    }  # fmt: skip
    given = {"verify": verify, **changed}
    checked = given.pop("verify")
    return convert_to_hub(source, folder, Repository(Destination("it"), None), checked, **{**options, **given})


def require_the_folders_files(hub: HubServer, server: FileServer, tmp_path: Path, dtype: str | None = None) -> None:
    """What arrived is what a conversion of the file writes, but for what is said of where and when."""
    streamconv.convert(server.folder / "x.pth", tmp_path / "expected", max_shard_size=SHARD, dtype=dtype)
    arrived = hub.files("ada/it")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "expected").iterdir()}
    assert arrived.keys() == {*expected, "README.md", ".gitattributes"}
    del expected["streamconv.json"]
    assert {name: arrived[name] for name in expected} == expected
    manifest = json.loads(arrived["streamconv.json"])
    for name, file in manifest["files"].items():
        assert file == {"size": len(arrived[name]), "sha256": hashlib.sha256(arrived[name]).hexdigest()}


def on_disk(folder: Path) -> int:
    """Bytes that files take."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(path, name)).st_blocks * 512
    return total


class Watch(threading.Thread):
    """The most that a folder took on the disk while the block ran."""

    def __init__(self, folder: Path):
        super().__init__(daemon=True)
        self.folder, self.most, self.is_over = folder, 0, False

    def run(self) -> None:
        while not self.is_over:
            self.most = max(self.most, on_disk(self.folder))

    def __enter__(self) -> "Watch":
        self.start()
        return self

    def __exit__(self, *args: object) -> None:
        self.is_over = True
        self.join()


def test_the_hub_gets_the_folder_and_the_disk_holds_one_shard(
    hub: HubServer, server: FileServer, source: str, tmp_path: Path
) -> None:
    with Watch(tmp_path / "stage") as watch:
        done = relayed(source, tmp_path / "stage")
    largest = max(shard.size for shard in done.conversion.plan.shards)
    assert len(done.conversion.plan.shards) > 3
    assert largest <= watch.most < largest + (256 << 10)
    assert not (tmp_path / "stage").exists()
    assert not (tmp_path / "torch").exists()
    assert len(hub.repos["ada/it"].branches["main"]) == 2  # the first is the repository's own
    assert done.published is not None
    require_the_folders_files(hub, server, tmp_path)


def test_all_rungs_run_although_nothing_is_kept(hub: HubServer, source: str, tmp_path: Path) -> None:
    """The weights of both models are read from the source, at the places where what was sent has them from."""
    done = relayed(source, tmp_path / "stage")
    assert done.verification is not None
    found = {check.name: check.passed for check in done.verification.checks}
    assert found == {"bytes": True, "load": True, "parity": True, "preprocessing": True}
    parity = done.verification.checks[2].numbers
    assert parity["largest"] <= parity["tolerance"]
    assert "layer 3" in parity["differences"]
    assert done.verification.checks[0].not_checked == "what was sent was not read again"
    assert "with the source's weights" in done.verification.checks[2].proves
    arrived = hub.files("ada/it")
    assert json.loads(arrived["streamconv.json"])["verification"]["passed"] is True
    assert "parity" in arrived["README.md"].decode()


@pytest.mark.parametrize("classes", [None, 5])
def test_a_wrong_mapping_does_not_become_visible(
    hub: HubServer, server: FileServer, tmp_path: Path, classes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries and keys change places in the plan: bytes and names are all right, the model is not."""
    backbone, head = make_states(tiny(classes=classes))
    torch.save(backbone, server.folder / "x.pth")
    torch.save(head, server.folder / "h.pth")
    from streamconv import convert as _  # noqa: F401

    module = sys.modules["streamconv.jobs.convert"]
    make_plan = module.make_plan  # type: ignore[attr-defined]

    def wrong(tensors: Any, *args: Any, **said: Any) -> Plan:
        import dataclasses

        plan = make_plan(tensors, *args, **said)
        shards = []
        for shard in plan.shards:
            of = dict(shard.tensors)

            def other(name: str, of: dict[str, Any] = of) -> Any:
                swapped = name.replace("query", "*").replace("key", "query").replace("*", "key")
                return of[swapped if "layer.1." in name else name]

            shards.append(dataclasses.replace(shard, tensors=tuple((name, other(name)) for name in of)))
        return dataclasses.replace(plan, shards=tuple(shards))

    monkeypatch.setattr(module, "make_plan", wrong)
    place = f"{server.url}/h.pth" if classes else None
    done = relayed(f"{server.url}/x.pth", tmp_path / "stage", head=place, max_shard_size="5GB")
    assert done.published is None
    assert done.verification is not None
    assert "the first difference is in layer 1" in "".join(done.verification.checks[2].problems)
    assert len(hub.repos["ada/it"].branches["main"]) == 1
    sent = sum(hub.uploads.values())
    done = relayed(f"{server.url}/x.pth", tmp_path / "stage", head=place, max_shard_size="5GB", unverified=True)
    assert done.published is not None
    assert sum(hub.uploads.values()) == sent
    assert "FAILED" in hub.files("ada/it")["README.md"].decode()


@pytest.mark.parametrize("at", ["uploading", "writing", "loading", "committing"])
def test_an_interrupted_run_sends_no_shard_again(
    hub: HubServer, server: FileServer, source: str, tmp_path: Path, at: str
) -> None:
    seen: list[str] = []

    def interrupt(what: str, done: int, total: int, unit: str) -> None:
        if what.startswith(at) and (at not in ("uploading", "writing") or "00003-of" in what):
            raise KeyboardInterrupt
        seen.append(what)

    def checked(*args: Any) -> Verification:
        return verify_uploaded(*args, device="cpu", progress=interrupt)

    with pytest.raises(KeyboardInterrupt):
        relayed(source, tmp_path / "stage", progress=interrupt, verify=checked)
    assert len(hub.repos["ada/it"].branches["main"]) == 1
    sent = dict(hub.uploads)
    assert len(sent) >= 2
    server.sent = 0
    done = relayed(source, tmp_path / "stage")
    assert set(hub.uploads.values()) == {1}
    assert done.conversion.resumed_bytes >= 2 * 2_000_000
    require_the_folders_files(hub, server, tmp_path)
    assert not (tmp_path / "stage").exists()


def test_a_killed_run_goes_on(hub: HubServer, server: FileServer, source: str, tmp_path: Path) -> None:
    """By SIGKILL in a process of its own, at moments all over; the command line's own words."""
    command = [sys.executable, "-m", "streamconv", "run", source, "-o", "stage", "--stream", "--push-to-hub", "it"]
    command += ["--max-shard-size", SHARD, "--no-parity", "--device", "cpu"]
    environment = {**os.environ, "HF_TOKEN": TOKEN, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    environment["HF_HUB_OFFLINE"] = "0"
    server.faults.seconds_a_megabyte = 0.02
    for uploads in (1, 2, 4):
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
        while process.poll() is None and sum(hub.uploads.values()) < uploads:
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    server.faults.seconds_a_megabyte = 0
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "uploaded to ada/it, one file at a time" in done.stdout
    assert f"published: {hub.url}/ada/it/commit/" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    # A kill between the end of a sending and its mark may cost this one once more.
    assert sum(hub.uploads.values()) <= len(hub.uploads) + 3
    require_the_folders_files(hub, server, tmp_path)
    assert not (tmp_path / "stage").exists()


def test_what_the_hub_lost_is_sent_again(hub: HubServer, server: FileServer, source: str, tmp_path: Path) -> None:
    def stop(what: str, *rest: Any) -> None:
        if what.startswith("committing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        relayed(source, tmp_path / "stage", progress=stop, verify=None, unverified=True)
    lost = next(iter(hub.blobs))
    del hub.blobs[lost]
    with pytest.raises(errors.MissingUploadError, match="Run the same command again"):
        relayed(source, tmp_path / "stage", verify=None, unverified=True)
    relayed(source, tmp_path / "stage", verify=None, unverified=True)
    require_the_folders_files(hub, server, tmp_path)


def test_a_shard_that_changed_on_the_disk_is_not_sent(
    hub: HubServer, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["streamconv.jobs.convert_to_hub"]
    write_shard = module.write_shard  # type: ignore[attr-defined]

    def write_and_rot(shard: Any, work: Any, *args: Any) -> Any:
        found = write_shard(shard, work, *args)
        with open(work.path / shard.filename, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 1]))
        return found

    monkeypatch.setattr(module, "write_shard", write_and_rot)
    with pytest.raises(OutputError, match="has changed since it was written"):
        relayed(source, tmp_path / "stage")
    assert not hub.uploads


def test_a_finished_folder_is_not_taken_for_a_stage(hub: HubServer, source: str, tmp_path: Path) -> None:
    streamconv.convert(source, tmp_path / "out", stream=True, max_shard_size=SHARD)
    before = {path.name for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UsageError, match="holds the finished model, which is not to be deleted"):
        relayed(source, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == before


def test_what_else_lies_in_the_folder_stays(hub: HubServer, source: str, tmp_path: Path) -> None:
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "notes.txt").write_text("mine")
    relayed(source, tmp_path / "stage", verify=None, unverified=True)
    assert [path.name for path in (tmp_path / "stage").iterdir()] == ["notes.txt"]


def test_another_repository_gets_all_of_it(hub: HubServer, server: FileServer, source: str, tmp_path: Path) -> None:
    def stop(what: str, *rest: Any) -> None:
        if what.startswith("committing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        relayed(source, tmp_path / "stage", progress=stop, verify=None, unverified=True)
    shards = len(hub.uploads)
    hub.uploads.clear()
    hub.blobs.clear()
    other = Repository(Destination("other"), None)
    convert_to_hub(
        source, tmp_path / "stage", other, None, head=None, labels=None, max_shard_size=SHARD, dtype=None, select=None,
        num_heads=None, unverified=True, progress=ignore_progress,
    )  # fmt: skip
    assert len(hub.uploads) == shards
    assert hub.files("ada/other").keys() > {"model.safetensors.index.json"}


def test_weights_are_cast_on_their_way(hub: HubServer, server: FileServer, source: str, tmp_path: Path) -> None:
    done = relayed(source, tmp_path / "stage", dtype="bfloat16")
    assert done.verification is not None
    assert [check.passed for check in done.verification.checks] == [True] * 4
    assert done.verification.checks[2].numbers["largest"] <= 1e-13
    assert "cast from `float32` to `bfloat16`" in hub.files("ada/it")["README.md"].decode()
    require_the_folders_files(hub, server, tmp_path, dtype="bfloat16")


def test_a_training_checkpoints_backbone_is_sent_only(hub: HubServer, server: FileServer, tmp_path: Path) -> None:
    """Wrapped, in chunks and without a LayerScale: what is filled in is sent as what is read."""
    state, _ = make_states(replace(tiny(), has_layer_scale=False))
    named = {re.sub(r"^blocks\.", "teacher.backbone.blocks.0.", key): value for key, value in state.items()}
    named = {key if key.startswith("t") else f"teacher.backbone.{key}": value for key, value in named.items()}
    torch.save({**named, "teacher.dino_head.norm.bias": torch.ones(3)}, server.folder / "x.pth")
    done = relayed(f"{server.url}/x.pth", tmp_path / "stage", verify=verify)
    assert done.verification is not None
    assert [check.passed for check in done.verification.checks] == [True] * 4, done.verification.checks
    assert done.verification.checks[2].numbers["largest"] == 0.0
    card = hub.files("ada/it")["README.md"].decode()
    assert "the source has no LayerScale: ones are written, which change nothing." in card
    assert "Left out: `teacher.dino_head.* (1 tensor, 12 bytes): a head of the training" in card
    require_the_folders_files(hub, server, tmp_path)


def test_a_file_of_this_machine_is_relayed_too(hub: HubServer, server: FileServer, source: str, tmp_path: Path) -> None:
    done = relayed(str(server.folder / "x.pth"), tmp_path / "stage")
    assert done.verification is not None
    assert done.verification.passed
    require_the_folders_files(hub, server, tmp_path)
    assert (server.folder / "x.pth").exists()


def test_without_checksums_no_claim_is_made_of_the_bytes(hub: HubServer, server: FileServer, tmp_path: Path) -> None:
    safetensors.torch.save_file(make_states(MODEL)[0], server.folder / "x.safetensors")
    done = relayed(f"{server.url}/x.safetensors", tmp_path / "stage")
    assert done.verification is not None
    assert [check.passed for check in done.verification.checks] == [None, True, True, True]
    assert "| bytes | not run |" in hub.files("ada/it")["README.md"].decode()


def test_a_card_of_the_users_own_is_taken_and_one_that_is_there_stays(
    hub: HubServer, source: str, tmp_path: Path
) -> None:
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "README.md").write_text("mine")
    relayed(source, tmp_path / "stage", verify=None, unverified=True)
    assert hub.files("ada/it")["README.md"] == b"mine"
    assert (tmp_path / "stage" / "README.md").read_text() == "mine"
    (tmp_path / "stage" / "README.md").unlink()
    relayed(source, tmp_path / "stage", verify=None, unverified=True)
    assert hub.files("ada/it")["README.md"] == b"mine"
    hub.put("ada/it", {"README.md": b"Converted to Hugging Face's format by streamconv 0 from x\n"})
    relayed(source, tmp_path / "stage", verify=None, unverified=True)
    assert b"Not verified" in hub.files("ada/it")["README.md"]


def test_json_says_what_was_sent(hub: HubServer, source: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "streamconv", "run", source, "-o", "stage", "--stream", "--push-to-hub", "it"]
    environment = {**os.environ, "HF_TOKEN": TOKEN, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    environment["HF_HUB_OFFLINE"] = "0"
    words = [*command, "--json", "--device", "cpu"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["output"] is None
    assert found["verification"]["passed"] is True
    assert found["published"].startswith(f"{hub.url}/ada/it/commit/")
