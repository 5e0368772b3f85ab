"""Outputs on S3: moto's server stands in for it, with the faults that real ones have."""

import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import s3fs
import torch

import streamconv
from streamconv import ConversionOptions, CorruptError, OutputError
from streamconv.files import slow
from streamconv.output.stores import s3_upload
from streamconv.progress import Progress
from tests import api
from tests.checkpoints import make_states
from tests.s3_server import Bucket, Fault, S3Request
from tests.support import Save, contents, flip, require_cancellable, run, tiny

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
    """Convert until this number of parts has arrived."""
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
@pytest.mark.parametrize(
    "kept", [0, 1, "all but one", *(pytest.param(kept, marks=pytest.mark.slow) for kept in range(2, 6))]
)
def test_resume_sends_only_the_parts_that_are_missing(
    bucket: Bucket, source: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, kept: int | str
) -> None:
    monkeypatch.setattr(s3_upload, "PARTS_AT_ONCE", 1)  # so that they arrive in order
    count = parts_of(whole["model.safetensors"])
    kept = kept if isinstance(kept, int) else count - 1
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


FAULTS = {
    "500": {"code": "InternalError", "status": 500},
    "throttled": {"code": "SlowDown", "status": 503},
    "cut": {"cut": True},
    "lost": {"lost": True},
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    "operation",
    ["ListObjectsV2", "GetObject", "PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload",
     "ListMultipartUploads", "DeleteObject"],
)  # fmt: skip
def test_failed_requests_are_repeated(
    bucket: Bucket, source: Path, whole: dict[str, bytes], operation: str, fault: str
) -> None:
    bucket.server.faults.append(
        Fault(operation, 1 if operation in ("GetObject", "PutObject", "UploadPart") else 0, 2, **FAULTS[fault])
    )
    api.convert(source, f"{bucket.url}/a/b")
    assert objects(bucket) == whole
    assert not bucket.uploads
    assert bucket.server.faults[0].times == 0


def test_part_that_is_damaged_on_the_way_is_refused_by_the_store_and_sent_again(
    bucket: Bucket, source: Path, whole: dict[str, bytes]
) -> None:
    bucket.server.faults = [Fault("UploadPart", 2, damages=True), Fault("PutObject", 2, damages=True)]
    api.convert(source, f"{bucket.url}/a/b")
    assert objects(bucket) == whole
    assert bucket.server.count("UploadPart") == parts_of(whole["model.safetensors"]) + 1


@pytest.mark.parametrize(
    ("operation", "fault", "message"),
    [
        ("any", {"code": "NoSuchBucket", "status": 404}, r"there is no bucket bucket-\d+\. Create it"),
        ("PutObject", {"code": "AccessDenied", "status": 403}, r"refuses put_object \(AccessDenied"),
        ("UploadPart", {"code": "AccessDenied", "status": 403}, r"refuses upload_part"),
        ("any", {"code": "RequestTimeTooSkewed", "status": 403}, "the clock of this machine differs .* Set the clock"),
        ("any", {"code": "InvalidAccessKeyId", "status": 403}, "does not accept your credentials"),
        ("UploadPart", {"code": "SlowDown", "status": 503}, r"asks for fewer requests: .*\(tried 9 times\).*later"),
        ("UploadPart", {"cut": True}, r"Check the network and the store, and run the same command again; it resumes"),
        ("UploadPart", {"code": "EntityTooLarge", "status": 400}, "EntityTooLarge"),
    ],
)
def test_store_that_refuses_is_one_message(
    bucket: Bucket, source: Path, tmp_path: Path, operation: str, fault: dict[str, Any], message: str
) -> None:
    bucket.server.faults.append(Fault(operation, times=10_000, **fault))
    done = run("convert", source, "-o", f"{bucket.url}/a/b", cwd=tmp_path)
    assert done.returncode == 4
    assert re.search(message, " ".join(done.stderr.split())), done.stderr
    assert done.stderr.count("cannot be written") == 1
    if operation != "UploadPart":
        assert bucket.server.count("CreateMultipartUpload") == 0, "found only after weights were read"
    assert "testing-secret" not in done.stderr


@pytest.mark.parametrize("operation", ["ListObjectsV2", "UploadPart"])
def test_store_that_does_not_answer_is_given_up(
    bucket: Bucket, source: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    monkeypatch.setattr(slow, "RESPONSE_SECONDS", 0.8)
    bucket.server.faults.append(Fault(operation, times=1000, hangs=True))
    with pytest.raises(OutputError, match=r"did not respond to .* within 0 s .tried 2 times"):
        api.convert(source, f"{bucket.url}/a/b")


def test_request_that_hangs_once_is_sent_again(
    bucket: Bucket, source: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slow, "RESPONSE_SECONDS", 0.8)
    bucket.server.faults.append(Fault("UploadPart", 2, hangs=True))
    api.convert(source, f"{bucket.url}/a/b")
    assert objects(bucket) == whole


def test_store_that_cannot_be_reached_is_one_message(
    bucket: Bucket, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(OutputError, match=r"EndpointConnectionError.*127\.0\.0\.1:9.*tried 4 times.*Check the network"):
        api.convert(source, f"{bucket.url}/a/b")
    s3fs.S3FileSystem.clear_instance_cache()


def test_missing_package_is_named(bucket: Bucket, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(OutputError, match="needs the Python package s3fs"):
        api.convert(source, f"{bucket.url}/a/b")


def test_missing_credentials_are_one_message(bucket: Bucket, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(OutputError, match=r"does not accept your credentials .NoCredentialsError"):
        api.convert(source, f"{bucket.url}/a/b")
    s3fs.S3FileSystem.clear_instance_cache()


# Other conversions, and other objects


def test_foreign_objects_are_neither_replaced_nor_touched(bucket: Bucket, source: Path) -> None:
    bucket.put("a/b/model.safetensors", b"foreign")
    bucket.put("a/b/notes.txt", b"foreign")
    bucket.put("a/bc/config.json", b"foreign")
    for force in (False, True):
        with pytest.raises(OutputError, match=r"already holds model\.safetensors, which streamconv did not write"):
            api.convert(source, f"{bucket.url}/a/b", force=force)
    assert set(bucket.objects.values()) == {b"foreign"}
    bucket.delete("a/b/model.safetensors")
    api.convert(source, f"{bucket.url}/a/b")
    api.convert(source, f"{bucket.url}/a/b", force=True, dtype="bfloat16")
    kept = {key for key, data in bucket.objects.items() if data == b"foreign"}
    assert kept == {"a/b/notes.txt", "a/bc/config.json"}


@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_another_conversion_is_refused_and_replaced_with_force(
    bucket: Bucket, source: Path, tmp_path: Path, state: str
) -> None:
    if state == "finished":
        api.convert(source, f"{bucket.url}/a/b", max_shard_size="100KB")
    else:
        interrupted(source, bucket, 1, max_shard_size="100KB")
        assert bucket.uploads
    before, uploads = bucket.objects, bucket.uploads
    bucket.server.reset()
    with pytest.raises(OutputError, match=r"holds an.* conversion, of .*: its plan .* differs.* URL, or .*--force"):
        api.convert(source, f"{bucket.url}/a/b", dtype="bfloat16")
    assert (bucket.objects, bucket.uploads) == (before, uploads)
    assert bucket.server.count("PutObject", "CreateMultipartUpload") == 0
    api.convert(source, f"{bucket.url}/a/b", dtype="bfloat16", force=True)
    assert objects(bucket) == contents(api.convert(source, tmp_path / "whole", dtype="bfloat16").output)
    assert not bucket.uploads


def test_force_deletes_the_index_first_and_the_manifest_last(bucket: Bucket, source: Path) -> None:
    api.convert(source, f"{bucket.url}/a/b", max_shard_size="100KB")
    bucket.server.reset()
    api.convert(source, f"{bucket.url}/a/b", force=True)
    deleted = [request.key for request in bucket.server.requests if request.operation == "DeleteObject"]
    before = deleted[: deleted.index("a/b/streamconv.json") + 1]
    assert before[0] == "a/b/model.safetensors.index.json"
    assert len(before) > 5


def test_finished_output_is_not_changed(bucket: Bucket, source: Path) -> None:
    api.convert(source, f"{bucket.url}/a/b")
    bucket.server.reset()
    assert api.convert(source, f"{bucket.url}/a/b").was_finished
    assert {request.operation for request in bucket.server.requests} == {"ListObjectsV2", "GetObject"}


def test_lost_object_of_a_finished_output_is_written_again(
    bucket: Bucket, source: Path, whole: dict[str, bytes], read_counts: list[int]
) -> None:
    api.convert(source, f"{bucket.url}/a/b", max_shard_size="100KB")
    before = objects(bucket)
    lost = sorted(name for name in before if name.endswith(".safetensors"))[1]
    bucket.delete(f"a/b/{lost}")
    bucket.server.reset()
    read_counts.clear()
    done = api.convert(source, f"{bucket.url}/a/b", max_shard_size="100KB")
    assert objects(bucket) == before
    assert done.resumed_bytes == sum(len(data) for name, data in before.items() if "model-" in name and name != lost)
    assert sum(read_counts) < 2 * len(before[lost]) + 100_000


# Several processes


def test_complete_file_is_kept_without_reading_the_source(bucket: Bucket, source: Path, read_counts: list[int]) -> None:
    bucket.server.faults.append(Fault("PutObject", 3, 1000, code="AccessDenied", status=403))  # the first small file
    with pytest.raises(OutputError):
        api.convert(source, f"{bucket.url}/a/b")
    assert "model.safetensors" in objects(bucket)
    bucket.server.reset()
    read_counts.clear()
    done = api.convert(source, f"{bucket.url}/a/b")
    assert done.resumed_bytes == len(objects(bucket)["model.safetensors"])
    assert sum(read_counts) < 50_000
    assert bucket.server.count("UploadPart", "CreateMultipartUpload") == 0


def test_object_that_was_replaced_is_written_again(bucket: Bucket, source: Path, whole: dict[str, bytes]) -> None:
    """It has the recorded size, but another ETag."""
    bucket.server.faults.append(Fault("PutObject", 3, 1000, code="AccessDenied", status=403))
    with pytest.raises(OutputError):
        api.convert(source, f"{bucket.url}/a/b")
    bucket.server.reset()
    bucket.put("a/b/model.safetensors", bytes(len(whole["model.safetensors"])))
    api.convert(source, f"{bucket.url}/a/b")
    assert objects(bucket) == whole


def test_part_of_other_bytes_is_sent_again(bucket: Bucket, source: Path, whole: dict[str, bytes]) -> None:
    interrupted(source, bucket, 4)
    (upload,) = bucket.uploads
    bucket.put_part(upload, 2, bytes(PART))
    bucket.put_part(upload, 3, b"short")
    done = api.convert(source, f"{bucket.url}/a/b")
    assert objects(bucket) == whole
    assert done.resumed_bytes <= 2 * PART


@pytest.mark.parametrize("when", ["between", "meanwhile"])
def test_upload_that_was_aborted_is_begun_again(
    bucket: Bucket, source: Path, whole: dict[str, bytes], when: str
) -> None:
    interrupted(source, bucket, 2)
    (upload,) = bucket.uploads
    if when == "between":
        bucket.abort(upload)
    else:
        bucket.server.faults.append(Fault("UploadPart", 1, then=lambda request: bucket.abort(upload)))
    api.convert(source, f"{bucket.url}/a/b")
    assert objects(bucket) == whole
    assert bucket.server.count("CreateMultipartUpload") == 1
    assert not bucket.uploads


def test_lost_response_to_the_completion_repeats_nothing(bucket: Bucket, source: Path, whole: dict[str, bytes]) -> None:
    gone = Fault("CompleteMultipartUpload", code="NoSuchUpload", status=404)  # as some stores say the second time
    bucket.server.faults = [Fault("CompleteMultipartUpload", lost=True), gone]
    api.convert(source, f"{bucket.url}/a/b")
    assert objects(bucket) == whole
    assert bucket.server.count("UploadPart") == parts_of(whole["model.safetensors"])


def test_upload_that_vanishes_before_it_is_complete_is_begun_again(
    bucket: Bucket, source: Path, whole: dict[str, bytes]
) -> None:
    """There is another object of the same size, so it must not be taken for this one."""

    def abort(request: S3Request) -> None:
        bucket.abort(*bucket.uploads)
        bucket.put("a/b/model.safetensors", bytes(len(whole["model.safetensors"])))

    gone = Fault("CompleteMultipartUpload", code="NoSuchUpload", status=404, then=abort)
    bucket.server.faults.append(gone)
    api.convert(source, f"{bucket.url}/a/b")
    assert objects(bucket) == whole
    assert bucket.server.count("UploadPart") == 2 * parts_of(whole["model.safetensors"])


@pytest.mark.parametrize("operation", ["UploadPart", "CompleteMultipartUpload", "CreateMultipartUpload"])
def test_two_processes_on_one_file_end_in_the_same_bytes(
    bucket: Bucket, source: Path, whole: dict[str, bytes], operation: str
) -> None:
    """The second converts from beginning to end, while the first waits in a request."""
    other: list[streamconv.Conversion] = []

    def convert(request: S3Request) -> None:
        other.append(api.convert(source, f"{bucket.url}/a/b"))

    bucket.server.faults.append(Fault(operation, then=convert))
    done = api.convert(source, f"{bucket.url}/a/b")
    assert objects(bucket) == whole
    assert done.shards == other[0].shards
    assert not bucket.uploads


def test_exceptions_of_callbacks_leave_an_output_that_is_resumed(bucket: Bucket, source: Path, tmp_path: Path) -> None:
    def job(folder: Path, progress: Progress) -> None:
        api.convert(source, f"{bucket.url}/{folder.name}", progress=progress)

    def outputs(folder: Path) -> dict[str, bytes]:
        return {name: data for name, data in objects(bucket, f"{folder.name}/").items() if ".streamconv" not in name}

    require_cancellable(job, tmp_path / "jobs", outputs)
    assert not bucket.uploads


def test_damaged_source_leaves_nothing(bucket: Bucket, source: Path) -> None:
    flip(source, "norm.weight", 5)
    with pytest.raises(CorruptError, match="does not match its CRC-32"):
        api.convert(source, f"{bucket.url}/a/b")
    assert objects(bucket).keys() == {".streamconv/conversion.json"}
    assert not bucket.uploads


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"format_version": 1}', b"\xff"])
def test_damaged_record_is_ignored(bucket: Bucket, source: Path, whole: dict[str, bytes], data: bytes) -> None:
    interrupted(source, bucket, 2)
    bucket.put("a/b/.streamconv/model.safetensors.json", data)
    api.convert(source, f"{bucket.url}/a/b")
    assert objects(bucket) == whole
    assert not bucket.uploads


def test_record_of_another_version_is_refused(bucket: Bucket, source: Path) -> None:
    interrupted(source, bucket, 2)
    bucket.put("a/b/.streamconv/conversion.json", b'{"format_version": 2}')
    with pytest.raises(OutputError, match="written by another version of streamconv"):
        api.convert(source, f"{bucket.url}/a/b")


@pytest.mark.parametrize(("size", "part_bytes"), [(1, 8 << 20), (80 << 30, 9 << 20), (5 << 40, 525 << 20)])
def test_parts_grow_only_with_the_limit_on_their_number(
    size: int, part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_upload, "PART_BYTES", 8 << 20)
    assert s3_upload.part_bytes_for(size) == part_bytes
    assert -(-size // part_bytes) <= 10_000


# Parts


def test_parts_are_written_and_joined_in_a_bucket(bucket: Bucket, source: Path, tmp_path: Path) -> None:
    options = ConversionOptions(max_shard_size="100KB")
    plan, url = tmp_path / "plan.json", f"{bucket.url}/a/b"
    streamconv.plan(source, options, save=plan)
    with pytest.raises(OutputError, match="holds none of the 7 weight files"):
        streamconv.finish(url, plan)
    streamconv.convert_plan(plan, url, part="3/3")
    streamconv.convert_plan(plan, url, part="1/3")
    bucket.server.faults.append(Fault("UploadPart", 1, 1000, code="AccessDenied", status=403))
    with pytest.raises(OutputError, match="refuses upload_part"):
        streamconv.convert_plan(plan, url, part="2/3")
    bucket.server.reset()
    with pytest.raises(OutputError, match=r"is not complete\. part 2/3: model-\S+ has [\d,]+ of [\d,]+ bytes"):
        streamconv.finish(url, plan)
    assert not {"config.json", "streamconv.json", "model.safetensors.index.json"} & objects(bucket).keys()
    assert streamconv.convert_plan(plan, url, part="2/3").resumed_bytes > 0
    assert not streamconv.finish(url, plan).was_finished
    assert objects(bucket) == contents(streamconv.convert(source, tmp_path / "whole", options).output)
    assert streamconv.finish(url, plan).was_finished


def test_finish_detects_an_object_that_was_replaced(bucket: Bucket, source: Path, tmp_path: Path) -> None:
    plan, url = tmp_path / "plan.json", f"{bucket.url}/a/b"
    streamconv.plan(source, save=plan)
    streamconv.convert_plan(plan, url, part="1/1")
    bucket.put("a/b/model.safetensors", bytes(len(objects(bucket)["model.safetensors"])))
    with pytest.raises(OutputError, match=r"is not complete.*model\.safetensors"):
        streamconv.finish(url, plan)


def test_part_of_another_plan_is_refused(bucket: Bucket, source: Path, tmp_path: Path) -> None:
    """Both plans have files of the same names and sizes."""
    url = f"{bucket.url}/a/b"
    torch.save(make_states(MODEL, seed=1)[0], tmp_path / "other.pth")
    for name, path in (("one", source), ("two", tmp_path / "other.pth")):
        streamconv.plan(path, ConversionOptions(max_shard_size="100KB"), save=tmp_path / name)
    streamconv.convert_plan(tmp_path / "one", url, part="1/1")
    before = objects(bucket)
    with pytest.raises(OutputError, match="holds an unfinished conversion"):
        streamconv.convert_plan(tmp_path / "two", url, part="2/2")
    with pytest.raises(OutputError, match="holds parts of another conversion"):
        streamconv.finish(url, tmp_path / "two")
    assert objects(bucket) == before


def test_commands_write_a_bucket_and_parts_of_it(bucket: Bucket, source: Path, tmp_path: Path) -> None:
    url = f"{bucket.url}/a/b"
    words = ["plan", source, "--max-shard-size", "100KB", "--save", "plan.json"]
    assert run(*words, cwd=tmp_path).returncode == 0
    for number in (1, 2):
        done = run("convert", "--plan", "plan.json", "-o", url, "--part", f"{number}/2", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    done = run("finish", url, "--plan", "plan.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert url in done.stdout
    words = ["convert", source, "-o", url, "--max-shard-size", "100KB"]
    assert "already" in run(*words, cwd=tmp_path).stdout


def test_uploads_that_may_not_be_listed_are_left(
    bucket: Bucket, source: Path, whole: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    bucket.server.faults.append(Fault("ListMultipartUploads", code="AccessDenied", status=403))
    api.convert(source, f"{bucket.url}/a/b")
    assert objects(bucket) == whole
    assert "Uploads of killed processes may be left" in caplog.text
