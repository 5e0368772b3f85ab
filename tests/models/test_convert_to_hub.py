"""Verification of a conversion straight to the Hub, which keeps nothing on the disk."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from streamconv import Verification, VerificationOptions
from streamconv.jobs import prepare
from streamconv.jobs.model_options import started_models
from streamconv.jobs.prepare import PreparedSource
from streamconv.jobs.verify import verify_uploaded
from streamconv.planning.plan import Plan
from streamconv.progress import ignore_progress
from tests.checkpoints import make_states
from tests.file_server import FileServer
from tests.hub_server import HubServer
from tests.support import HUB_MODEL, require_uploaded_folder, run, tiny, to_hub, verify_on_cpu


@pytest.mark.transformers
def test_all_checks_run_although_nothing_is_kept_on_disk(hub: HubServer, remote_hub_model: str, tmp_path: Path) -> None:
    """The weights of both models are read from the source, at the places where the uploaded tensors came from."""
    done = to_hub(remote_hub_model, tmp_path / "stage", verify=verify_on_cpu, unverified=False)
    assert done.verification is not None
    found = {check.name: check.passed for check in done.verification.checks}
    assert found == {"bytes": True, "config": True, "load": True, "parity": True, "preprocessing": True}
    parity = done.verification.check("parity").numbers
    assert parity["largest"] <= parity["tolerance"]
    assert "layer 3" in parity["differences"]
    assert done.verification.check("bytes").not_checked == "the uploaded files were not read back"
    assert "with the source's weights" in done.verification.check("parity").proves
    arrived = hub.files("ada/it")
    assert json.loads(arrived["streamconv.json"])["verification"]["passed"] is True
    assert "parity" in arrived["README.md"].decode()


@pytest.mark.parametrize("classes", [None, 5])
def test_wrong_mapping_is_found_and_not_published(
    hub: HubServer, server: FileServer, tmp_path: Path, classes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan swaps queries and keys: all bytes and names are right, but the model is wrong."""
    backbone, head = make_states(tiny(classes=classes))
    torch.save(backbone, server.folder / "x.pth")
    torch.save(head, server.folder / "h.pth")
    make_plan = prepare.make_plan

    def wrong(tensors: Any, *args: Any, **options: Any) -> Plan:
        plan = make_plan(tensors, *args, **options)
        shards = []
        for shard in plan.shards:
            of = dict(shard.tensors)

            def other(name: str, of: dict[str, Any] = of) -> Any:
                swapped = name.replace("query", "*").replace("key", "query").replace("*", "key")
                return of[swapped if "layer.1." in name else name]

            shards.append(replace(shard, tensors=tuple((name, other(name)) for name in of)))
        return replace(plan, shards=tuple(shards))

    monkeypatch.setattr(prepare, "make_plan", wrong)
    place = f"{server.url}/h.pth" if classes else None
    done = to_hub(
        f"{server.url}/x.pth",
        tmp_path / "stage",
        head=place,
        max_shard_size="5GB",
        verify=verify_on_cpu,
        unverified=False,
    )
    assert done.published is None
    assert done.verification is not None
    assert "the first difference is in layer 1" in "".join(done.verification.check("parity").problems)
    assert len(hub.repos["ada/it"].branches["main"]) == 1
    sent = sum(hub.uploads.values())
    done = to_hub(f"{server.url}/x.pth", tmp_path / "stage", head=place, max_shard_size="5GB", verify=verify_on_cpu)
    assert done.published is not None
    assert sum(hub.uploads.values()) == sent
    assert "FAILED" in hub.files("ada/it")["README.md"].decode()


def test_weights_are_cast_on_the_way_to_the_hub(
    hub: HubServer, server: FileServer, remote_hub_model: str, tmp_path: Path
) -> None:
    done = to_hub(remote_hub_model, tmp_path / "stage", dtype="bfloat16", verify=verify_on_cpu, unverified=False)
    assert done.verification is not None
    assert [check.passed for check in done.verification.checks] == [True] * 5
    assert done.verification.check("parity").numbers["largest"] <= 1e-13
    assert "cast from `float32` to `bfloat16`" in hub.files("ada/it")["README.md"].decode()
    require_uploaded_folder(hub, server, tmp_path, dtype="bfloat16")


def test_only_the_backbone_of_a_training_checkpoint_is_uploaded(
    hub: HubServer, server: FileServer, tmp_path: Path
) -> None:
    """It is wrapped, in chunks and without a LayerScale: constant tensors are uploaded like those that are read."""
    state, _ = make_states(replace(tiny(), has_layer_scale=False))
    named = {re.sub(r"^blocks\.", "teacher.backbone.blocks.0.", key): value for key, value in state.items()}
    named = {key if key.startswith("t") else f"teacher.backbone.{key}": value for key, value in named.items()}
    torch.save({**named, "teacher.dino_head.norm.bias": torch.ones(3)}, server.folder / "x.pth")
    done = to_hub(f"{server.url}/x.pth", tmp_path / "stage", verify=verify_on_cpu, unverified=False)
    assert done.verification is not None
    assert [check.passed for check in done.verification.checks] == [True] * 5, done.verification.checks
    assert done.verification.check("parity").numbers["largest"] == 0.0
    card = hub.files("ada/it")["README.md"].decode()
    assert "the source has no LayerScale: ones are written, which have no effect." in card
    assert "Skipped: `teacher.dino_head.* (1 tensor, 12 bytes): a head for training only" in card
    require_uploaded_folder(hub, server, tmp_path)


def test_local_file_is_converted_to_the_hub(
    hub: HubServer, server: FileServer, remote_hub_model: str, tmp_path: Path
) -> None:
    done = to_hub(str(server.folder / "x.pth"), tmp_path / "stage", verify=verify_on_cpu, unverified=False)
    assert done.verification is not None
    assert done.verification.passed
    require_uploaded_folder(hub, server, tmp_path)
    assert (server.folder / "x.pth").exists()


def test_json_reports_what_was_published(hub: HubServer, remote_hub_model: str, tmp_path: Path) -> None:
    words = ("run", remote_hub_model, "-o", "stage", "--stream", "--push-to-hub", "it", "--json", "--device", "cpu")
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["output"] is None
    assert found["verification"]["passed"] is True
    assert found["published"].startswith(f"{hub.url}/ada/it/commit/")


def test_source_without_checksums_leaves_the_bytes_check_open(
    hub: HubServer, server: FileServer, tmp_path: Path
) -> None:
    safetensors.torch.save_file(make_states(HUB_MODEL)[0], server.folder / "x.safetensors")
    done = to_hub(f"{server.url}/x.safetensors", tmp_path / "stage", verify=verify_on_cpu)
    assert done.verification is not None
    assert [check.passed for check in done.verification.checks] == [None, True, True, True, True]
    assert "| bytes | not run |" in hub.files("ada/it")["README.md"].decode()


def test_run_interrupted_during_verification_uploads_no_shard_twice(
    hub: HubServer, remote_hub_model: str, tmp_path: Path
) -> None:
    def interrupt(what: str, done: int, total: int, unit: str) -> None:
        if what.startswith("loading"):
            raise KeyboardInterrupt

    def verify(prepared: PreparedSource, manifest: Mapping[str, Any], folder: Path) -> Verification:
        options = VerificationOptions(device="cpu")
        with started_models(options, ignore_progress) as models:
            return verify_uploaded(prepared, manifest, folder, options, models, interrupt)

    with pytest.raises(KeyboardInterrupt):
        to_hub(remote_hub_model, tmp_path / "stage", verify=verify)
    assert len(hub.repos["ada/it"].branches["main"]) == 1
    done = to_hub(remote_hub_model, tmp_path / "stage", verify=verify_on_cpu, unverified=False)
    assert done.published is not None
    assert set(hub.uploads.values()) == {1}
