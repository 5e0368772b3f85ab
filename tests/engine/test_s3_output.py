"""Outputs on S3: moto's server stands in for it, with the faults that real ones have."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from streamconv import OutputError
from streamconv.output import s3_upload
from tests import api
from tests.s3_server import Bucket, Fault
from tests.support import Save, contents, tiny

PART = 64 << 10
MODEL = tiny(layers=2, hidden=64)  # 0.5 MB


@pytest.fixture(autouse=True)
def _small_parts(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small models have many parts, which the server allows."""
    monkeypatch.setattr(s3_upload, "PART_BYTES", PART)
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", PART)


@pytest.fixture
def source(save: Save) -> Path:
    return save(MODEL)[0]


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> dict[str, bytes]:
    """The files that a conversion into a folder writes."""
    return contents(api.convert(source, tmp_path / "whole").output)


def objects(bucket: Bucket, prefix: str = "a/b/") -> dict[str, bytes]:
    return {key.removeprefix(prefix): data for key, data in bucket.objects.items() if key.startswith(prefix)}


def note(seen: list[str], step: str, *rest: object) -> None:
    seen.append(step)


def parts_of(data: bytes) -> int:
    return -(-len(data) // PART)


def interrupted(source: Path, bucket: Bucket, parts: int, **options: Any) -> None:
    """Convert until so many parts have arrived, and no further one."""
    fault = Fault("UploadPart", parts, 1000, code="AccessDenied", status=403)
    bucket.server.faults.append(fault)
    with pytest.raises(OutputError, match="refuses upload_part"):
        api.convert(source, f"{bucket.url}/a/b", **options)
    bucket.server.reset()


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "300KB"}, {"dtype": "bfloat16"}])
def test_bucket_holds_the_same_objects_as_a_folder(
    bucket: Bucket, source: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    done = api.convert(source, f"{bucket.url}/a/b", **options)
    whole = contents(api.convert(source, tmp_path / "whole", **options).output)
    assert objects(bucket) == whole
    assert not bucket.uploads
    assert done.output == f"{bucket.url}/a/b"
    weights = [data for name, data in whole.items() if name.endswith(".safetensors")]
    assert bucket.server.count("UploadPart") == sum(parts_of(data) for data in weights if len(data) > PART)
    names = [request.key for request in bucket.server.requests if request.operation == "PutObject"]
    assert [name for name in names if ".streamconv" not in name][-1] == (
        "a/b/model.safetensors.index.json" if "max_shard_size" in options else "a/b/streamconv.json"
    )


@pytest.mark.parametrize("prefix", ["", "/", "/x", "/x/"])
def test_prefix_may_be_empty_or_end_in_a_slash(
    bucket: Bucket, source: Path, whole: dict[str, bytes], prefix: str
) -> None:
    api.convert(source, f"{bucket.url}{prefix}")
    assert objects(bucket, "x/" if "x" in prefix else "") == whole


@pytest.mark.usefixtures("frequent_journal_entries")  # small buffers
def test_resume_sends_only_the_parts_that_are_missing(
    bucket: Bucket, source: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_upload, "PARTS_AT_ONCE", 1)  # so that they arrive in order
    count = parts_of(whole["model.safetensors"])
    for kept in range(count):
        for key in bucket.objects:
            bucket.delete(key)
        interrupted(source, bucket, kept)
        assert "model.safetensors" not in objects(bucket)
        seen: list[str] = []
        done = api.convert(source, f"{bucket.url}/a/b", progress=partial(note, seen))
        assert objects(bucket) == whole
        assert done.resumed_bytes == kept * PART
        assert bucket.server.count("UploadPart") == count - kept
        assert bucket.server.count("CreateMultipartUpload") == 0
        assert list(dict.fromkeys(seen)) == [*["checking model.safetensors"][:kept], "writing model.safetensors"]
        assert not bucket.uploads
