"""The byte mover: buffers are not reused before they were hashed."""

import hashlib
import time
from pathlib import Path

import pytest
import torch

import streamconv
from streamconv import hashing, streaming
from streamconv.crc import RecordChecks
from streamconv.folder import claimed
from streamconv.shards import make_shard


class SlowDigest:
    """A sha256 that falls behind the writer."""

    def __init__(self, data: bytes = b""):
        self._digest = hashlib.sha256(data)

    def update(self, data: memoryview) -> None:
        time.sleep(0.01)
        self._digest.update(data)

    def copy(self) -> "SlowDigest":
        copied = SlowDigest()
        copied._digest = self._digest.copy()
        return copied

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


@pytest.mark.parametrize("ring", [1, 2, hashing.RING_BUFFERS])
def test_a_hash_that_falls_behind_is_still_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ring: int
) -> None:
    torch.save({f"x{i}": torch.randn(1000, 577) for i in range(10)}, tmp_path / "x.pth")  # 23 MB
    monkeypatch.setattr(hashing, "hashlib", type("slow", (), {"sha256": SlowDigest}))
    monkeypatch.setattr(hashing, "RING_BUFFERS", ring)
    with streamconv.open_checkpoint(tmp_path / "x.pth") as checkpoint:
        shard = make_shard("x.safetensors", checkpoint)
        with claimed(tmp_path, {}, [], 0) as folder:
            written, _ = streaming.write_shard(shard, folder, RecordChecks(), lambda position, is_kept: None)
        data = (tmp_path / "x.safetensors").read_bytes()
        assert data == shard.header + b"".join(tensor.tobytes() for _, tensor in shard.tensors)
        assert written.sha256 == hashlib.sha256(data).hexdigest()
