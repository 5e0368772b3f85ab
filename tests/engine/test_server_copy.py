"""Conversions within one S3: the store copies large tensors itself, and its CRC-32s prove the copies."""

import json
import logging
import zlib
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from streamconv import ChangedError, CorruptError, OutputError
from streamconv.jobs.publish import _read_files as read_files
from streamconv.output import contents as contents_module
from streamconv.output.manifest import Manifest
from streamconv.output.stores import part_layout, s3_upload
from streamconv.output.verdict import has_passed
from streamconv.progress import ignore_progress
from tests import api
from tests.checkpoints import make_states
from tests.s3_server import Bucket, Fault, S3Request
from tests.support import contents, flip, run, tiny

PART, MIN_PART = 48 << 10, 32 << 10
MODEL = tiny(layers=4, hidden=128)  # its largest matrices have 256 kB


@pytest.fixture(autouse=True)
def _small_parts(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_upload, "PART_BYTES", PART)
    monkeypatch.setattr(part_layout, "MIN_PART_BYTES", MIN_PART)
    monkeypatch.setattr(contents_module, "BUFFER_BYTES", 1 << 10)
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", MIN_PART)


@pytest.fixture
def local(bucket: Bucket, tmp_path: Path) -> Path:
    """Put a checkpoint into the bucket, as ``in/x.pth``; return the file on this machine."""
    torch.save(make_states(MODEL)[0], tmp_path / "x.pth")
    bucket.put("in/x.pth", (tmp_path / "x.pth").read_bytes())
    return tmp_path / "x.pth"


def convert(bucket: Bucket, **options: Any) -> dict[str, Any]:
    """Convert within the bucket; return the files that the manifest lists."""
    api.convert(f"{bucket.url}/in/x.pth", f"{bucket.url}/out", **options)
    files: dict[str, Any] = json.loads(bucket.objects["out/streamconv.json"])["files"]
    return files


def written(bucket: Bucket) -> dict[str, bytes]:
    found = {key.removeprefix("out/"): data for key, data in bucket.objects.items() if key.startswith("out/")}
    del found["streamconv.json"]
    return found


def expected(local: Path, **options: Any) -> dict[str, bytes]:
    found = contents(api.convert(local, local.parent / "expected", **options).output)
    del found["streamconv.json"]
    return found


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "700KB"}])
def test_copied_output_equals_a_local_one(bucket: Bucket, local: Path, options: dict[str, Any]) -> None:
    files = convert(bucket, **options)
    requests = bucket.server.requests
    ranges = [request.range for request in requests if (request.operation, request.key) == ("GetObject", "in/x.pth")]
    read = sum(
        1 + int(last) - int(first) for first, last in (each.removeprefix("bytes=").split("-") for each in ranges)
    )
    sent = sum(request.size for request in requests if request.operation in ("UploadPart", "PutObject"))
    assert bucket.server.count("UploadPartCopy") >= 8
    assert read + sent < local.stat().st_size  # not twice the size
    assert written(bucket) == expected(local, **options)
    assert not bucket.uploads
    for name, data in written(bucket).items():
        if name.endswith(".safetensors"):
            assert files[name]["sha256"] == ""
            assert files[name]["crc32"] == f"{zlib.crc32(data):08x}"


def test_result_reports_what_was_copied(bucket: Bucket, local: Path) -> None:
    words = ["convert", f"{bucket.url}/in/x.pth", "-o", f"{bucket.url}/out"]
    assert "MB  copied by its store" in run(*words, cwd=local.parent).stdout
    assert "was already converted" in run(*words, cwd=local.parent).stdout


@pytest.mark.parametrize(
    "options", [{"server_side_copy": False}, {"dtype": "bfloat16"}], ids=["not wanted", "other bytes"]
)
def test_nothing_is_copied_if_it_is_not_wanted_or_has_other_bytes(
    bucket: Bucket, local: Path, options: dict[str, Any]
) -> None:
    files = convert(bucket, **options)
    assert bucket.server.count("UploadPartCopy") == 0
    assert all(file["sha256"] for file in files.values())


def test_plan_file_decides_whether_the_store_copies(bucket: Bucket, local: Path) -> None:
    source, plan = f"{bucket.url}/in/x.pth", local.parent / "plan.json"
    run("plan", source, "--no-server-side-copy", "--save", plan, cwd=local.parent)
    assert run("convert", "--plan", plan, "-o", f"{bucket.url}/out", cwd=local.parent).returncode == 0
    assert bucket.server.count("UploadPartCopy") == 0


def test_source_without_crcs_is_not_copied(bucket: Bucket, local: Path) -> None:
    safetensors.torch.save_file(make_states(MODEL)[0], local.parent / "x.safetensors")
    bucket.put("in/x.safetensors", (local.parent / "x.safetensors").read_bytes())
    api.convert(f"{bucket.url}/in/x.safetensors", f"{bucket.url}/out")
    assert bucket.server.count("UploadPartCopy") == 0
    assert written(bucket) == expected(local)


def test_damaged_copy_is_found_and_nothing_is_kept(bucket: Bucket, local: Path) -> None:
    bucket.server.faults.append(Fault("UploadPartCopy", skip=3, damages=True))
    with pytest.raises(OutputError, match=r"copy of encoder\..* differs from s3://.*x\.pth, by its CRC-32"):
        convert(bucket)
    assert (bucket.uploads, [key for key in bucket.objects if key.endswith(".safetensors")]) == ({}, [])
    convert(bucket)
    assert written(bucket) == expected(local)


def test_damaged_source_is_found_though_its_bytes_are_only_copied(bucket: Bucket, local: Path) -> None:
    flip(local, "blocks.1.mlp.fc1.weight", PART + 5_000)
    bucket.put("in/x.pth", local.read_bytes())
    with pytest.raises(CorruptError, match=r"blocks|layer\.1\.mlp\.fc1\.weight.*does not match its CRC-32"):
        convert(bucket)
    assert (bucket.uploads, "out/model.safetensors" in bucket.objects) == ({}, False)


def test_source_that_changes_meanwhile_is_not_copied(bucket: Bucket, local: Path) -> None:
    def change(request: S3Request) -> None:
        bucket.put("in/x.pth", local.read_bytes()[:-1] + b"\1")

    bucket.server.faults.append(Fault("UploadPartCopy", skip=2, then=change))
    with pytest.raises(ChangedError, match="was changed while it was copied"):
        convert(bucket)
    assert "out/model.safetensors" not in bucket.objects


@pytest.mark.parametrize("reason", ["no CRC-32s", "NotImplemented", "AccessDenied"])
def test_store_that_cannot_copy_receives_uploads(
    bucket: Bucket, local: Path, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    status = {"NotImplemented": 501, "AccessDenied": 403}
    bucket.server.reports_copied_crcs = reason in status
    if reason in status:
        bucket.server.faults.append(Fault("UploadPartCopy", times=1000, code=reason, status=status[reason]))
    with caplog.at_level(logging.WARNING, "streamconv"):
        files = convert(bucket, max_shard_size="700KB")
    assert written(bucket) == expected(local, max_shard_size="700KB")
    assert (bucket.server.count("UploadPartCopy"), len(caplog.messages), bucket.uploads) == (1, 1, {})
    assert "its store cannot copy from the source" in caplog.text
    assert all(file["sha256"] for file in files.values())


def test_passing_failures_are_retried(bucket: Bucket, local: Path) -> None:
    bucket.server.faults += [
        Fault("UploadPartCopy", skip=1, times=2, code="SlowDown", status=503),
        Fault("UploadPartCopy", skip=4, cut=True),
        Fault("UploadPart", skip=1, code="InternalError"),
    ]
    convert(bucket)
    assert written(bucket) == expected(local)


def test_interrupted_copies_are_resumed(bucket: Bucket, local: Path) -> None:
    stopping = Fault("UploadPartCopy", skip=5, times=1000, code="AccessDenied", status=403)
    bucket.server.faults.append(stopping)
    with pytest.raises(OutputError, match="AccessDenied"):
        convert(bucket)
    [begun] = bucket.uploads
    bucket.server.reset()
    convert(bucket)
    assert bucket.server.count("CreateMultipartUpload") == 0
    assert (written(bucket), bucket.uploads) == (expected(local), {}), begun


@pytest.mark.parametrize("first", [True, False])
def test_interrupted_upload_may_be_finished_with_or_without_copies(bucket: Bucket, local: Path, first: bool) -> None:
    stopping = Fault("UploadPart", skip=1, times=1000, code="AccessDenied", status=403)
    bucket.server.faults.append(stopping)
    with pytest.raises(OutputError):
        convert(bucket, server_side_copy=first)
    bucket.server.reset()
    files = convert(bucket, server_side_copy=not first)
    assert (written(bucket), bucket.uploads) == (expected(local), {})
    assert bool(files["model.safetensors"]["sha256"]) is first


# Files without a sha256


def test_copied_output_is_verified_in_its_store(bucket: Bucket, local: Path) -> None:
    convert(bucket)
    assert api.verify(f"{bucket.url}/out").passed
    assert api.verify(f"{bucket.url}/out", f"{bucket.url}/in/x.pth", stream=True).passed
    changed = bytearray(bucket.objects["out/model.safetensors"])
    changed[-1] ^= 1
    bucket.put("out/model.safetensors", bytes(changed))
    found = api.verify(f"{bucket.url}/out")
    assert "model.safetensors has changed since it was written: its CRC-32 is" in found.check("files").problems[0]
    assert not api.verify(f"{bucket.url}/out", local).passed


def test_verification_of_a_local_copy_records_the_sha256_that_a_push_needs(bucket: Bucket, local: Path) -> None:
    convert(bucket)
    folder = local.parent / "copy"
    folder.mkdir()
    for key, data in bucket.objects.items():
        if key.startswith("out/"):
            (folder / key.removeprefix("out/")).write_bytes(data)
    manifest = Manifest.read(folder)
    assert manifest is not None
    with pytest.raises(OutputError, match=r"no sha256 of model\.safetensors.*`streamconv verify"):
        read_files(folder, manifest, ignore_progress)
    assert api.verify(folder).passed
    assert api.verify(folder, local, parity=False).passed
    manifest = Manifest.read(folder)
    assert manifest is not None
    assert has_passed(manifest)
    _, large = read_files(folder, manifest, ignore_progress)
    assert manifest.files["model.safetensors"].sha256 == large["model.safetensors"].sha256
    assert api.verify(folder).passed
