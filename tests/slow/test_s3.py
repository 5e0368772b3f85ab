"""Outputs on S3: kills at any request, forked processes, and memory."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from streamconv.output.stores import s3_upload
from tests import api
from tests.s3_server import Bucket, Fault, S3Request
from tests.support import ROOT, Save, contents, linux, peak_kb, run_python, save_zeros, tiny

PART = 64 << 10
KILLS = int(os.environ.get("STREAMCONV_KILLS", "12"))
CONVERT = """
import sys, streamconv
from streamconv.output.stores import s3_upload
s3_upload.PART_BYTES = {part}
streamconv.convert({source!r}, {url!r}, streamconv.ConversionOptions(max_shard_size={size!r}))
"""


@pytest.mark.parametrize("size", ["5GB", "300KB"])
def test_kill_at_any_request_leaves_an_output_that_is_resumed(
    bucket: Bucket, tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    monkeypatch.setattr(s3_upload, "PART_BYTES", PART)
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", PART)
    source, _ = save(tiny(layers=2, hidden=64))
    whole = contents(api.convert(source, tmp_path / "whole", max_shard_size=size).output)
    api.convert(source, f"{bucket.url}/whole", max_shard_size=size)
    count, sent = len(bucket.server.requests), sum(request.size for request in bucket.server.requests)
    choice = random.Random(size)
    for at in sorted(choice.sample(range(count), min(KILLS, count))):
        url = f"{bucket.url}/{at}"
        bucket.server.reset()
        # The process is killed before or after the request is carried out; others may be in flight.
        process: list[subprocess.Popen[bytes]] = []
        is_before = choice.random() < 0.5

        def kill(request: S3Request, process: list[subprocess.Popen[bytes]] = process) -> None:
            process[0].send_signal(signal.SIGKILL)
            process[0].wait()

        bucket.server.faults.append(Fault("any", at, then=kill, hangs=is_before))
        code = CONVERT.format(part=PART, source=str(source), url=url, size=size)
        process.append(subprocess.Popen([sys.executable, "-c", code], cwd=ROOT))
        assert process[0].wait() == -signal.SIGKILL
        found = objects(bucket, at)
        assert {name: data for name, data in found.items() if name in whole}.items() <= whole.items()
        done_before = sum(request.size for request in bucket.server.requests)
        bucket.server.reset()
        api.convert(source, url, max_shard_size=size)
        assert objects(bucket, at) == whole
        assert not bucket.uploads
        done = done_before + sum(request.size for request in bucket.server.requests)
        assert done < sent + (s3_upload.PARTS_AT_ONCE + 2) * PART + 50_000


def objects(bucket: Bucket, at: int) -> dict[str, bytes]:
    prefix = f"{at}/"
    return {key.removeprefix(prefix): data for key, data in bucket.objects.items() if key.startswith(prefix)}


@linux
def test_memory_does_not_grow_with_the_model(bucket: Bucket, tmp_path: Path) -> None:
    """The memory is that of s3fs and of five parts of 8 MiB."""
    peaks = []
    for name, layers in (("small", 5), ("large", 24)):  # 63 and 303 MB
        source = save_zeros(tmp_path / f"{name}.pth", tiny(layers=layers, hidden=512))
        peaks.append(peak_kb(f"import streamconv; streamconv.convert({str(source)!r}, '{bucket.url}/{name}')"))
    assert bucket.server.count("UploadPart") > 40
    assert peaks[1] < 150 << 10
    assert peaks[1] - peaks[0] < 20 << 10


def test_forked_process_connects_again(bucket: Bucket) -> None:
    bucket.put("a/x", b"1")
    code = f"""
import os
from streamconv.files.address import Address
from streamconv.output.open_shared import open_shared_output
output = open_shared_output(Address("{bucket.url}/a"))
print(*output._store.list(), flush=True)
child = os.fork()
print(*output._store.list(), flush=True)
if not child:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    assert run_python(code).split() == ["x", "x", "x"]
