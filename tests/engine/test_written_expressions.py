"""Files of all kinds of expressions: interrupted anywhere, resumed, read over a network, compared with torch's values.

Sizes are scaled down, so that a small file has many pieces, tiles, and resume points.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

import streamconv
from streamconv import CorruptError
from streamconv.formats.checkpoint import Checkpoint
from streamconv.output.folder import open_output_folder
from streamconv.output.journal import JOURNAL_NAME
from streamconv.output.manifest import Provenance, WrittenFile
from streamconv.output.writer import write_shard
from streamconv.planning.shards import Shard, make_shard
from streamconv.tensors import evaluation, runs, tiles
from streamconv.tensors.checksums import RecordChecks
from streamconv.tensors.computed import cast, multiply
from streamconv.tensors.concatenation import concat, index_select, reshape, stack
from streamconv.tensors.constants import filled
from streamconv.tensors.expressions import Expression
from streamconv.tensors.info import TensorInfo
from streamconv.verification.bytes import check_bytes
from tests.file_server import FileServer
from tests.support import flip

NAME = "model.safetensors"
EVERY = int(os.environ.get("STREAMCONV_INTERRUPTED_EVERY", "6"))  # pieces
State = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _small_sizes(frequent_journal_entries: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "PIECE_BYTES", tiles.PIECE_BYTES)
    monkeypatch.setattr(tiles, "MAX_TILE_BYTES", 40 << 10)
    monkeypatch.setattr(runs, "_DENSE_BYTES", 8 << 10)
    runs.runs_of.cache_clear()


def make_state() -> State:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(96, 128, generator=generator) * 30_000 for name in "abcdefg"}


def targets_of(source: Mapping[str, Expression]) -> dict[str, Expression]:
    a, b, c, d, e, f, g = (source[name] for name in "abcdefg")
    columns = g.chunk(2, 1)
    row = filled(0.0, TensorInfo("F32", (1, 128)))
    return {
        "joined": concat([a, b.narrow(1, 0, 40)], 1),
        "rest": concat([row, reshape(b.narrow(1, 40, 88), (66, 128))]),
        "cast": cast(c, "F16"),
        "transposed": d.transpose(0, 1),
        "again": d.transpose(0, 1).narrow(0, 64, 64),
        "stacked": stack([e, index_select(e, 0, [*range(1, 96), 0])]),
        "multiplied": multiply(cast(f, "BF16"), cast(index_select(f, 0, [*range(1, 96), 0]), "BF16")),
        "chunk 0": columns[0],
        "chunk 1": columns[1],
    }


def values_of(state: State) -> State:
    a, b, c, d, e, f, g = state.values()
    return {
        "joined": torch.cat([a, b[:, :40]], 1),
        "rest": torch.cat([torch.zeros(1, 128), b[:, 40:].reshape(66, 128)]),
        "cast": c.half(),
        "transposed": d.T.contiguous(),
        "again": d.T[64:].contiguous(),
        "stacked": torch.stack([e, e.roll(-1, 0)]),
        "multiplied": f.bfloat16() * f.roll(-1, 0).bfloat16(),
        "chunk 0": g[:, :64].contiguous(),
        "chunk 1": g[:, 64:].contiguous(),
    }


def save_source(kind: str, folder: Path, state: State) -> Path:
    path = folder / f"x.{kind}"
    torch.save(state, path) if kind == "pth" else safetensors.torch.save_file(state, path)
    return path


def shard_of(checkpoint: Checkpoint) -> Shard:
    return make_shard(NAME, targets_of(checkpoint))


def write(
    source: object, folder: Path, advance: Callable[[int, bool], None] = lambda position, is_kept: None
) -> tuple[WrittenFile, int]:
    with (
        streamconv.open_checkpoint(str(source)) as checkpoint,
        open_output_folder(folder, Provenance(source={}, plan=""), [NAME], 0) as output,
    ):
        shard = shard_of(checkpoint)
        return write_shard(shard, output, checkpoint.reader, RecordChecks(checkpoint.reader), advance)


class StoppedError(Exception):
    pass


def interrupted_at(position: int) -> Callable[[int, bool], None]:
    def advance(at: int, is_kept: bool) -> None:
        if at >= position and not is_kept:
            raise StoppedError

    return advance


@pytest.mark.parametrize(("kind", "place"), [("pth", "local"), ("safetensors", "remote")])
def test_file_interrupted_anywhere_is_resumed_and_equals_torch(
    tmp_path: Path, server: FileServer, kind: str, place: str
) -> None:
    state = make_state()
    path = save_source(kind, server.folder, state)
    source = path if place == "local" else f"{server.url}/{path.name}"
    wanted = values_of(state)
    reached: list[int] = []
    write(source, tmp_path / "whole", lambda position, is_kept: reached.append(position))
    kept = 0
    for position in reached[:-1:EVERY]:
        folder = tmp_path / f"{position}"
        with pytest.raises(StoppedError):
            write(source, folder, interrupted_at(position))
        with suppress(StoppedError):  # a second time
            write(source, folder, interrupted_at(position + 50_000))
        written, resumed = write(source, folder)
        kept += resumed
        assert {each.name for each in folder.iterdir()} == {NAME, JOURNAL_NAME}
        assert (folder / NAME).read_bytes() == (tmp_path / "whole" / NAME).read_bytes()
        assert written.sha256 == sha256((folder / NAME).read_bytes()).hexdigest()
    assert kept > 0
    have = safetensors.torch.load_file(folder / NAME)
    assert have.keys() == wanted.keys()
    assert all(torch.equal(have[name].view(torch.uint8), wanted[name].view(torch.uint8)) for name in wanted)


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_each_byte_is_fetched_once_in_any_order(tmp_path: Path, server: FileServer, kind: str) -> None:
    path = save_source(kind, server.folder, make_state())
    with streamconv.open_checkpoint(f"{server.url}/{path.name}") as checkpoint:
        needed = sum(checkpoint[name].record.range.length for name in "abcdeefg")  # one is stacked with itself
        shard, before = shard_of(checkpoint), server.sent
        with open_output_folder(tmp_path / "out", Provenance(source={}, plan=""), [NAME], 0) as output:
            write_shard(shard, output, checkpoint.reader, RecordChecks(checkpoint.reader), lambda at, is_kept: None)
        assert needed <= server.sent - before < 1.02 * needed  # with gaps between records
        before = server.sent
        assert problems_of(tmp_path / "out", shard, checkpoint) == ""
        assert needed <= server.sent - before < 1.02 * needed


def problems_of(folder: Path, shard: Shard, checkpoint: Checkpoint) -> str:
    plan: Any = SimpleNamespace(shards=(shard,))
    return "\n".join(check_bytes(folder, plan, checkpoint.reader, lambda count: None).problems)


@pytest.mark.parametrize("name", ["joined", "rest", "cast", "transposed", "stacked", "multiplied", "chunk 1"])
def test_flipped_byte_of_any_expression_is_found_in_the_output(tmp_path: Path, name: str) -> None:
    source = save_source("pth", tmp_path, make_state())
    write(source, tmp_path / "out")
    with streamconv.open_checkpoint(source) as checkpoint:
        assert problems_of(tmp_path / "out", shard_of(checkpoint), checkpoint) == ""
        flip(tmp_path / "out" / NAME, name, 1_000)
        element = 1_000 // values_of(make_state())[name].element_size()
        found = problems_of(tmp_path / "out", shard_of(checkpoint), checkpoint)
        assert f"{name} differs from its source" in found
        assert f"from element {element:,} on" in found


@pytest.mark.parametrize("key", "abcdefg")
@pytest.mark.parametrize("place", ["local", "remote"])
def test_flipped_byte_of_a_source_with_checksums_is_found(
    tmp_path: Path, server: FileServer, key: str, place: str
) -> None:
    path = save_source("pth", server.folder, make_state())
    flip(path, key, 20_000)
    with pytest.raises(CorruptError, match="does not match its CRC-32"):
        write(path if place == "local" else f"{server.url}/{path.name}", tmp_path / "out")
    assert not (tmp_path / "out" / NAME).exists()


def test_source_that_was_damaged_before_an_interruption_is_found_after_it(tmp_path: Path) -> None:
    """Scattered values are compared with their CRC-32 at the end, so a resumed process must do it."""
    source = save_source("pth", tmp_path, make_state())
    reached: list[int] = []
    write(source, tmp_path / "whole", lambda position, is_kept: reached.append(position))
    flip(source, "d", 20_000)
    with pytest.raises(StoppedError):
        write(source, tmp_path / "out", interrupted_at(reached[-2]))
    with pytest.raises(CorruptError, match="does not match its CRC-32"):
        write(source, tmp_path / "out")
