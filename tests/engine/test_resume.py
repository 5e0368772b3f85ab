"""Whatever ends a conversion, the same command goes on with it, and the folder is that of an undisturbed one."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import safetensors.torch
import torch

import streamconv
from streamconv import CorruptError, OutputError, SourceError, UsageError
from streamconv.output import folder, hashing
from streamconv.output import writer as streaming
from streamconv.output.files import temporary_path
from streamconv.output.journal import JOURNAL_NAME, Journal
from tests.conftest import make_states, tiny

Save = Callable[..., tuple[Path, Path | None]]
ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("STREAMCONV_KILLS", "50"))  # in each of the six ways, and some twice


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def many_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mark after every 32 kB, so that a small model has many; what is read is ahead of the disk by that much."""
    monkeypatch.setattr(hashing, "RING_BUFFERS", 2)
    for module in (hashing, streaming):
        monkeypatch.setattr(module, "BUFFER_BYTES", 16 << 10)
    monkeypatch.setattr(streaming, "PIECE_BYTES", 8 << 10)
    monkeypatch.setattr(streaming, "SYNC_BYTES", 32 << 10)


class Interrupted(BaseException):
    pass


def interrupt_after(monkeypatch: pytest.MonkeyPatch, source: Path, out: Path, share: float, **options: object) -> None:
    """Convert, and end it as Ctrl-C does when a share of the bytes is written."""

    def progress(what: str, done: int, total: int, unit: str) -> None:
        if unit == "bytes" and done > share * total:
            raise Interrupted

    with pytest.raises(Interrupted):
        streamconv.convert(source, out, progress=progress, **options)  # type: ignore[arg-type]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds a file's name in /proc")
@pytest.mark.parametrize("how", ["kill", "power", "power-names"])
@pytest.mark.parametrize("shard_size", ["5GB", "60KB"])
def test_a_kill_or_a_power_cut_at_any_step_costs_little(tmp_path: Path, how: str, shard_size: str) -> None:
    torch.save(make_states(tiny(layers=2, hidden=64))[0], tmp_path / "source.pth")
    words = [sys.executable, "-m", "tests.crash", tmp_path / "source.pth", tmp_path, how, shard_size, str(KILLS)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == [], done.stderr
    assert found["kills"] >= KILLS
    assert found["resumed_bytes"] > 0.8 * KILLS  # the others had no mark yet
    assert 0 < found["repeated"] <= found["max_repeated"]


@pytest.mark.parametrize("shard_size", ["5GB", "100MB"])
def test_signals_at_any_moment_cost_little(tmp_path: Path, save: Save, shard_size: str) -> None:
    source, _ = save(tiny(layers=24, hidden=512))  # 300 MB
    streamconv.convert(source, tmp_path / "whole", max_shard_size=shard_size)
    wanted = digests(tmp_path / "whole")
    words = [sys.executable, "-m", "streamconv", "convert", source, "-o", "out", "--max-shard-size", shard_size]
    choice = random.Random(shard_size)
    kills = 0
    while kills < 10:
        process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        time.sleep(choice.uniform(0.1, 0.7))
        number = choice.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        process.send_signal(number)
        _, said = process.communicate()
        if process.returncode == 0:  # too late: it was done
            assert digests(tmp_path / "out") == wanted
            shutil.rmtree(tmp_path / "out")
            continue
        kills += 1
        if process.returncode == 130:
            again = re.search(r"To resume, run\n  streamconv (.*)\n", said)
            assert again is not None, said
            assert again[1] == f"convert {source} -o out --max-shard-size {shard_size}"
        for name in wanted if (tmp_path / "out").exists() else ():
            if (tmp_path / "out" / name).exists():
                assert sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == wanted[name]
    assert subprocess.run(words, cwd=tmp_path, capture_output=True).returncode == 0
    assert digests(tmp_path / "out") == wanted


@pytest.mark.usefixtures("many_marks")
def test_what_was_written_is_said_and_checked_and_not_written_again(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = save(tiny())
    streamconv.convert(source, tmp_path / "whole")
    interrupt_after(monkeypatch, source, tmp_path / "out", 0.5)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    kept = Journal.read(tmp_path / "out").marks["model.safetensors"].size
    size = (tmp_path / "whole" / "model.safetensors").stat().st_size
    assert 0.5 * size - 3 * (32 << 10) <= kept <= 0.52 * size
    seen: list[str] = []
    done = streamconv.convert(source, tmp_path / "out", progress=lambda what, *rest: seen.append(what))
    assert done.resumed_bytes == kept
    assert list(dict.fromkeys(seen)) == ["checking model.safetensors", "writing model.safetensors"]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("many_marks")
@pytest.mark.parametrize("shard_size", ["5GB", "300KB"])
@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        *((kind, damage) for kind in ("pth", "safetensors") for damage in ("a bit", "the header", "its end", "all")),
        ("pth", "a bit, and the mark"),
    ],
)
def test_what_was_written_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_size: str, kind: str, damage: str
) -> None:
    """The disk kept something else than was written: found by the mark's sha256, or by the source's CRC-32."""
    source = tmp_path / f"source.{kind}"
    (torch.save if kind == "pth" else safetensors.torch.save_file)(make_states(tiny())[0], source)
    streamconv.convert(source, tmp_path / "whole", max_shard_size=shard_size)
    out = tmp_path / "out"
    interrupt_after(monkeypatch, source, out, 0.6, max_shard_size=shard_size)
    (temporary,) = out.glob("*-incomplete") if shard_size == "5GB" else [next(iter(sorted(out.glob("*.safetensors"))))]
    data = bytearray(temporary.read_bytes())
    if damage == "its end":
        data = data[: len(data) // 4]
    elif damage == "all":
        data = bytearray(len(data))
    elif damage == "the header":
        data[20] ^= 1
    else:
        data[len(data) // 3] ^= 1
    temporary.write_bytes(data)
    if damage.endswith("mark"):  # whoever changes the mark too is still found by the CRC-32
        lines = (out / JOURNAL_NAME).read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        for entry in entries:
            if "file" in entry and entry["file"] in temporary.name:
                entry["sha256"] = sha256(data[: entry["bytes"]]).hexdigest()
        (out / JOURNAL_NAME).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    done = streamconv.convert(source, out, max_shard_size=shard_size)
    assert contents(out) == contents(tmp_path / "whole")
    assert done.resumed_bytes < 0.6 * done.plan.size or damage == "the header"  # which is written again anyway


@pytest.mark.usefixtures("many_marks")
@pytest.mark.parametrize(
    "damage", [b"", b"\x00" * 5000, b'{"file": "model.sa', b"[1]\n", b'{"file": 1, "bytes": "x"}\n', b"\xff\n"]
)
def test_a_journal_with_a_damaged_end_is_taken_as_far_as_it_is_whole(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch, damage: bytes
) -> None:
    source, _ = save(tiny())
    streamconv.convert(source, tmp_path / "whole")
    interrupt_after(monkeypatch, source, tmp_path / "out", 0.5)
    before = Journal.read(tmp_path / "out").marks
    with (tmp_path / "out" / JOURNAL_NAME).open("ab") as journal:
        journal.write(damage)
    assert Journal.read(tmp_path / "out").marks == before
    interrupt_after(monkeypatch, source, tmp_path / "out", 0.7)  # writes behind what is whole
    assert Journal.read(tmp_path / "out").length == (tmp_path / "out" / JOURNAL_NAME).stat().st_size
    assert Journal.read(tmp_path / "out").marks["model.safetensors"].size > before["model.safetensors"].size
    streamconv.convert(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("many_marks")
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_another_source_of_the_same_size_and_names_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    write = torch.save if kind == "pth" else safetensors.torch.save_file
    path = tmp_path / f"source.{kind}"
    write(make_states(tiny())[0], path)
    size = path.stat().st_size
    streamconv.convert(path, tmp_path / "done")
    interrupt_after(monkeypatch, path, tmp_path / "out", 0.5)
    write(make_states(tiny(), seed=1)[0], path)
    assert path.stat().st_size == size
    before = contents(tmp_path / "out")
    with pytest.raises(OutputError, match=r"unfinished conversion.*its backbone is another\. Choose .* or delete this"):
        streamconv.convert(path, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    with pytest.raises(OutputError, match="another conversion"):
        streamconv.convert(path, tmp_path / "done")


@pytest.mark.usefixtures("many_marks")
def test_other_options_are_refused_and_leave_what_is_there(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, head = save(tiny(classes=3))
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    interrupt_after(monkeypatch, source, tmp_path / "out", 0.5, head=head)
    before = contents(tmp_path / "out")
    for options, says in (
        ({"head": head, "max_shard_size": "300KB"}, "shard size"),
        ({"head": head, "labels": tmp_path / "labels.txt"}, "list of labels"),
        ({}, "head and plan"),
    ):
        with pytest.raises(OutputError, match=rf"unfinished conversion.*{says}.*Choose another folder, or delete this"):
            streamconv.convert(source, tmp_path / "out", **options)  # type: ignore[arg-type]
        assert contents(tmp_path / "out") == before
    streamconv.convert(source, tmp_path / "out", head=head)


def test_other_options_may_follow_a_start_that_wrote_nothing(tmp_path: Path, save: Save) -> None:
    source, _ = save(tiny())
    streamconv.convert(source, tmp_path / "whole", max_shard_size="300KB")
    code = (  # killed before the first mark
        "import os, streamconv, streamconv.output.writer as s\n"
        "s.RecordChecks.add = lambda *args: os._exit(9)\n"
        f"streamconv.convert({str(source)!r}, {str(tmp_path / 'out')!r})"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert temporary_path(tmp_path / "out" / "model.safetensors").exists()
    streamconv.convert(source, tmp_path / "out", max_shard_size="300KB")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_lost_file_of_a_finished_folder_is_made_again(tmp_path: Path, save: Save) -> None:
    source, _ = save(tiny())
    streamconv.convert(source, tmp_path / "out", max_shard_size="300KB")
    whole = contents(tmp_path / "out")
    lost = sorted(whole)[2]
    assert lost.startswith("model-00002-of-")
    for name in (lost, "config.json", "model.safetensors.index.json"):
        (tmp_path / "out" / name).unlink()
        done = streamconv.convert(source, tmp_path / "out", max_shard_size="300KB")
        assert not done.was_finished
        shards = sum(len(data) for each, data in whole.items() if each.endswith(".safetensors"))
        assert done.resumed_bytes == shards - (len(whole[lost]) if name == lost else 0)
        assert contents(tmp_path / "out") == whole


def test_a_source_damaged_at_first_is_converted_when_it_was_fetched_again(
    tmp_path: Path, save: Save, many_marks: None
) -> None:
    """The same fingerprint, since it is of the CRC-32s: nothing of the damaged bytes may be gone on from."""
    source, _ = save(tiny())
    streamconv.convert(source, tmp_path / "whole")
    good = source.read_bytes()
    bad = bytearray(good)
    with streamconv.open_checkpoint(source) as checkpoint:
        bad[checkpoint["norm.weight"].record.range.start] ^= 1
    source.write_bytes(bad)
    with pytest.raises(CorruptError, match=r"layernorm\.weight .*CRC-32"):
        streamconv.convert(source, tmp_path / "out")
    source.write_bytes(good)
    streamconv.convert(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_source_that_changes_while_it_is_read_is_noticed(tmp_path: Path, kind: str, many_marks: None) -> None:
    write = torch.save if kind == "pth" else safetensors.torch.save_file
    path = tmp_path / f"source.{kind}"
    write(make_states(tiny())[0], path)
    other = tmp_path / f"other.{kind}"
    write(make_states(tiny(), seed=1)[0], other)

    def progress(what: str, done: int, total: int, unit: str) -> None:
        if unit == "bytes" and 0.4 * total < done < 0.5 * total:
            path.write_bytes(other.read_bytes())  # the same file, other contents

    with pytest.raises(CorruptError, match=r"was changed while it was read\. Run again when it is whole"):
        streamconv.convert(path, tmp_path / "out", progress=progress)
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_cut_while_it_is_read_is_gone_on_with(tmp_path: Path, save: Save, many_marks: None) -> None:
    source, _ = save(tiny())
    streamconv.convert(source, tmp_path / "whole")
    data, times = source.read_bytes(), source.stat()

    def progress(what: str, done: int, total: int, unit: str) -> None:
        if unit == "bytes" and done > 0.5 * total:
            os.truncate(source, len(data) // 3)

    with pytest.raises(SourceError, match=r"cut short or is being changed\. Fetch it again"):
        streamconv.convert(source, tmp_path / "out", progress=progress)
    source.write_bytes(data)
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert streamconv.convert(source, tmp_path / "out").resumed_bytes > 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_at_once_are_one_too_many(tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = save(tiny())
    code = (
        "import time, streamconv, streamconv.output.writer as s\n"
        "s.RecordChecks.add = lambda *args: print('writing', flush=True) or time.sleep(60)\n"
        f"streamconv.convert({str(source)!r}, {str(tmp_path / 'out')!r})"
    )
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "writing\n"
    words = [sys.executable, "-m", "streamconv", "convert", source, "-o", tmp_path / "out"]
    second = subprocess.run(words, capture_output=True, text=True)
    assert second.returncode == 4
    assert re.fullmatch(
        rf"error: .*/out is being written by process {first.pid} on \S+, since 20\S+\. Let it finish, or end it\.\n",
        second.stderr,
    )
    assert first.poll() is None
    first.kill()  # a lock that a dead process left is no obstacle
    first.communicate()
    assert not streamconv.convert(source, tmp_path / "out").was_finished


def step_by_step(source: Path, out: Path) -> "subprocess.Popen[str]":
    """A conversion that stops at half of its pieces, until it is told to go on by a line."""
    code = (
        "import sys, streamconv, streamconv.output.writer as s\n"
        "real, seen = s.RecordChecks.add, []\n"
        "def add(*args):\n"
        "    seen.append(1)\n"
        "    if len(seen) == 25: print('half', flush=True); sys.stdin.readline()\n"
        "    real(*args)\n"
        "s.RecordChecks.add = add\n"
        f"streamconv.convert({str(source)!r}, {str(out)!r})"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    return process


@pytest.mark.parametrize("how", ["goes on", "is interrupted"])
def test_a_folder_that_was_removed_and_made_anew_by_another_is_left_to_it(tmp_path: Path, save: Save, how: str) -> None:
    source, _ = save(tiny())
    streamconv.convert(source, tmp_path / "whole")
    first = step_by_step(source, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    second = step_by_step(source, tmp_path / "out")
    if how == "is interrupted":
        first.send_signal(signal.SIGINT)
    _, said = first.communicate("\n")
    assert first.returncode != 0
    assert how == "is interrupted" or "Run the same command again" in said
    assert not (tmp_path / "out" / "model.safetensors").exists()
    with pytest.raises(OutputError, match=f"is being written by process {second.pid}"):
        streamconv.convert(source, tmp_path / "out")
    second.communicate("\n")
    assert second.returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("many_marks")
@pytest.mark.parametrize("is_resumed", [False, True])
def test_tensors_that_share_a_storage_are_checked_in_every_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_resumed: bool
) -> None:
    """Their record is never complete from the pieces of one shard, nor in order, nor without gaps."""
    state = make_states(tiny())[0]
    flat, at, views = torch.zeros(sum(v.numel() + 5 for v in state.values())), 0, {}
    for name, value in reversed(state.items()):
        views[name] = flat[at : at + value.numel()].view(value.shape).copy_(value)
        at += value.numel() + 5
    source = tmp_path / "source.pth"
    torch.save({name: views[name] for name in state}, source)
    good = source.read_bytes()

    def damage() -> None:
        bad = bytearray(good)
        with streamconv.open_checkpoint(source) as checkpoint:
            for tensor in checkpoint.values():
                bad[tensor.record.range.start + tensor.offset] ^= 1
        source.write_bytes(bad)

    def progress(what: str, done: int, total: int, unit: str) -> None:
        if unit == "bytes" and done > 0.5 * total and source.read_bytes() == good:
            damage()

    if is_resumed:
        interrupt_after(monkeypatch, source, tmp_path / "out", 0.5, max_shard_size="300KB")
        damage()
    with pytest.raises(CorruptError, match=r"CRC-32|was changed while it was read"):
        streamconv.convert(
            source, tmp_path / "out", max_shard_size="300KB", **({} if is_resumed else {"progress": progress})
        )
    source.write_bytes(good)
    streamconv.convert(source, tmp_path / "out", max_shard_size="300KB")
    streamconv.convert(source, tmp_path / "whole", max_shard_size="300KB")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("many_marks")
def test_a_source_whose_time_was_set_back_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "source.safetensors"
    safetensors.torch.save_file(make_states(tiny())[0], path)
    times = path.stat()
    interrupt_after(monkeypatch, path, tmp_path / "out", 0.5)
    safetensors.torch.save_file(make_states(tiny(), seed=1)[0], path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(OutputError, match="its backbone is another"):
        streamconv.convert(path, tmp_path / "out")


def test_a_finished_folder_stays_finished_when_its_source_has_another_owner_or_mode(tmp_path: Path) -> None:
    path = tmp_path / "source.safetensors"
    safetensors.torch.save_file(make_states(tiny())[0], path)
    streamconv.convert(path, tmp_path / "out")
    path.chmod(0o640)
    assert streamconv.convert(path, tmp_path / "out").was_finished


@pytest.mark.usefixtures("many_marks")
@pytest.mark.parametrize("size", [10**12, -5, 1, float("inf")])
def test_a_mark_that_cannot_be_is_no_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    path = tmp_path / "source.safetensors"
    safetensors.torch.save_file(make_states(tiny())[0], path)
    streamconv.convert(path, tmp_path / "whole")
    interrupt_after(monkeypatch, path, tmp_path / "out", 0.5)
    temporary = temporary_path(tmp_path / "out" / "model.safetensors")
    temporary.write_bytes(b"\xff" * 1000)
    with (tmp_path / "out" / JOURNAL_NAME).open("a") as journal:
        journal.write(json.dumps({"file": "model.safetensors", "bytes": size, "sha256": "0" * 64}) + "\n")
    assert streamconv.convert(path, tmp_path / "out").resumed_bytes == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "streamconv.json"])
def test_a_link_in_a_temporary_files_place_costs_no_other_file(tmp_path: Path, save: Save, name: str) -> None:
    source, _ = save(tiny())
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "out").mkdir()
    planted = temporary_path(tmp_path / "out" / name)
    planted.hardlink_to(tmp_path / "precious")
    with pytest.raises(OutputError, match="is a link to another file"):
        streamconv.convert(source, tmp_path / "out")
    assert (tmp_path / "precious").read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["model.safetensors", ".model.safetensors.streamconv-incomplete"])
def test_a_source_in_its_outputs_place_is_not_written_over(tmp_path: Path, save: Save, name: str) -> None:
    source, _ = save(tiny())
    (tmp_path / "out").mkdir()
    shutil.copy(source, tmp_path / "out" / name)
    with pytest.raises(UsageError, match=r"is the source, and .* would write over it"):
        streamconv.convert(tmp_path / "out" / name, tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == source.read_bytes()


def test_what_comes_into_the_folder_before_the_lock_is_not_written_over(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = save(tiny())
    lock = folder._lock

    def late(path: Path) -> int:
        (path / "model.safetensors").write_bytes(b"another's")
        return lock(path)

    monkeypatch.setattr(folder, "_lock", late)
    with pytest.raises(OutputError, match="which streamconv did not write"):
        streamconv.convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"another's"


def test_a_killed_synthetic_run_goes_on_and_leaves_nothing_beside(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "streamconv", "run", "dinov2_vits14", "--synthetic", "--no-verify", "-o", "out"]
    code = (
        "import os, sys, streamconv.cli.commands as cli, streamconv.output.writer as s\n"
        "real, seen = s.RecordChecks.add, []\n"
        "def add(*args):\n"
        "    seen.append(1)\n"
        "    if len(seen) == 320: os._exit(9)\n"
        "    real(*args)\n"
        "s.RecordChecks.add = add\n"
        f"sys.argv = {['streamconv', *words[3:]]!r}\n"
        "cli.main()"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True).returncode == 9
    assert (tmp_path / ".out.streamconv-synthetic" / "dinov2_vits14_synthetic_seed0.pth").exists()
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"converted, 88,226,304 bytes .*, [1-9][0-9,]* of them before an interruption", done.stdout)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", [JOURNAL_NAME, "streamconv.json"])
@pytest.mark.parametrize("what", ["endless", "a pipe", "large"])
def test_what_lies_in_the_place_of_our_own_files_is_refused(tmp_path: Path, save: Save, name: str, what: str) -> None:
    source, _ = save(tiny())
    (tmp_path / "out").mkdir()
    if what == "endless":
        (tmp_path / "out" / name).symlink_to("/dev/zero")
    elif what == "a pipe":
        os.mkfifo(tmp_path / "out" / name)
    else:
        (tmp_path / "out" / name).touch()
        os.truncate(tmp_path / "out" / name, 1 << 40)
    with pytest.raises(OutputError, match=r"no regular file|1,099,511,627,776 bytes"):
        streamconv.convert(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
