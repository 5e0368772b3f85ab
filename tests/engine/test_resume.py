"""An interrupted conversion is resumed by the same command, and the folder equals that of an uninterrupted one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import safetensors.torch
import torch

import streamconv
from streamconv import CorruptError, OutputError, SourceError, UsageError
from streamconv.output import folder
from streamconv.output.files import temporary_path
from streamconv.output.journal import JOURNAL_NAME, Journal
from streamconv.output.open_journal import OpenJournal
from tests import api
from tests.checkpoints import make_states, saved, teacher
from tests.support import Save, contents, interrupt_after, tiny


def journal_of(folder: Path) -> Journal:
    return Journal.read(folder / JOURNAL_NAME)


@pytest.mark.usefixtures("frequent_journal_entries")
def test_resuming_checks_and_reports_what_was_written_without_writing_it_again(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = save(tiny())
    api.convert(source, tmp_path / "whole")
    interrupt_after(source, tmp_path / "out", 0.5)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    kept = journal_of(tmp_path / "out").resume_points["model.safetensors"].size
    size = (tmp_path / "whole" / "model.safetensors").stat().st_size
    assert 0.5 * size - 3 * (32 << 10) <= kept <= 0.52 * size
    seen: list[str] = []
    done = api.convert(source, tmp_path / "out", progress=lambda what, *rest: seen.append(what))
    assert done.resumed_bytes == kept
    assert list(dict.fromkeys(seen)) == ["checking model.safetensors", "writing model.safetensors"]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("frequent_journal_entries")
@pytest.mark.parametrize("shard_size", ["5GB", "300KB"])
@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        *((kind, damage) for kind in ("pth", "safetensors") for damage in ("a bit", "the header", "its end", "all")),
        ("pth", "a bit, and the mark"),
    ],
)
def test_damaged_partial_output_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_size: str, kind: str, damage: str
) -> None:
    """The disk holds other bytes than were written: found by the journal's sha256, or by the source's CRC-32."""
    source = tmp_path / f"source.{kind}"
    (torch.save if kind == "pth" else safetensors.torch.save_file)(make_states(tiny())[0], source)
    api.convert(source, tmp_path / "whole", max_shard_size=shard_size)
    out = tmp_path / "out"
    interrupt_after(source, out, 0.6, max_shard_size=shard_size)
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
    if damage.endswith("mark"):  # if the journal is changed as well, the CRC-32 still finds it
        lines = (out / JOURNAL_NAME).read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        for entry in entries:
            if "file" in entry and entry["file"] in temporary.name:
                point = entry["resume_point"]
                point["sha256"] = sha256(data[: point["size"]]).hexdigest()
        (out / JOURNAL_NAME).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    done = api.convert(source, out, max_shard_size=shard_size)
    assert contents(out) == contents(tmp_path / "whole")
    assert done.resumed_bytes < 0.6 * done.plan.size


@pytest.mark.usefixtures("frequent_journal_entries")
@pytest.mark.parametrize(
    "damage",
    [b"", b"\0" * 5000, b'{"file": "model.sa', b"[1]\n", b'{"file": "x"}\n', b'{"resume_point": {}}\n', b"\xff\n"],
)
def test_journal_with_a_damaged_end_is_used_up_to_the_damage(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch, damage: bytes
) -> None:
    source, _ = save(tiny())
    api.convert(source, tmp_path / "whole")
    interrupt_after(source, tmp_path / "out", 0.5)
    before = journal_of(tmp_path / "out").resume_points
    with (tmp_path / "out" / JOURNAL_NAME).open("ab") as journal:
        journal.write(damage)
    assert journal_of(tmp_path / "out").resume_points == before
    interrupt_after(source, tmp_path / "out", 0.7)  # appends after the last complete line
    assert journal_of(tmp_path / "out").length == (tmp_path / "out" / JOURNAL_NAME).stat().st_size
    assert journal_of(tmp_path / "out").resume_points["model.safetensors"].size > before["model.safetensors"].size
    api.convert(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("frequent_journal_entries")
@pytest.mark.parametrize("first_line", [{"conversion": {}}, {"format_version": 0}, {"format_version": 2}])
def test_resume_rejects_a_journal_of_another_version(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch, first_line: dict[str, object]
) -> None:
    source, _ = save(tiny())
    interrupt_after(source, tmp_path / "out", 0.5)
    path = tmp_path / "out" / JOURNAL_NAME
    path.write_text("\n".join([json.dumps(first_line), *path.read_text().splitlines()[1:]]) + "\n")
    before = contents(tmp_path / "out")
    with pytest.raises(OutputError, match="journal was written by another version of streamconv: delete it"):
        api.convert(source, tmp_path / "out")
    assert contents(tmp_path / "out") == before


@pytest.mark.usefixtures("frequent_journal_entries")
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_resume_rejects_another_source_of_the_same_size_and_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    write = torch.save if kind == "pth" else safetensors.torch.save_file
    path = tmp_path / f"source.{kind}"
    write(make_states(tiny())[0], path)
    size = path.stat().st_size
    api.convert(path, tmp_path / "done")
    interrupt_after(path, tmp_path / "out", 0.5)
    write(make_states(tiny(), seed=1)[0], path)
    assert path.stat().st_size == size
    before = contents(tmp_path / "out")
    with pytest.raises(OutputError, match=r"unfinished conversion.*its backbone differs\. Choose .* or replace it"):
        api.convert(path, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    with pytest.raises(OutputError, match="another conversion"):
        api.convert(path, tmp_path / "done")


@pytest.mark.usefixtures("frequent_journal_entries")
def test_resume_rejects_other_options_and_keeps_the_folder(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, head = save(tiny(classes=3))
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    interrupt_after(source, tmp_path / "out", 0.5, head=head)
    before = contents(tmp_path / "out")
    for options, message in (
        ({"head": head, "max_shard_size": "300KB"}, "shard size"),
        ({"head": head, "labels": tmp_path / "labels.txt"}, "list of labels"),
        ({}, "head and plan"),
    ):
        with pytest.raises(
            OutputError, match=rf"unfinished conversion.*{message}.*Choose another folder, or replace it with --force"
        ):
            api.convert(source, tmp_path / "out", **options)
        assert contents(tmp_path / "out") == before
    api.convert(source, tmp_path / "out", head=head)


def test_other_options_are_accepted_if_nothing_was_written(tmp_path: Path, save: Save) -> None:
    source, _ = save(tiny())
    api.convert(source, tmp_path / "whole", max_shard_size="300KB")
    code = (  # killed before the first mark
        "import os, streamconv, streamconv.output.writer as s\n"
        "s.RecordChecks.add = lambda *args: os._exit(9)\n"
        f"streamconv.convert({str(source)!r}, {str(tmp_path / 'out')!r})"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert temporary_path(tmp_path / "out" / "model.safetensors").exists()
    api.convert(source, tmp_path / "out", max_shard_size="300KB")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_missing_file_of_a_finished_folder_is_written_again(tmp_path: Path, save: Save) -> None:
    source, _ = save(tiny())
    api.convert(source, tmp_path / "out", max_shard_size="300KB")
    whole = contents(tmp_path / "out")
    lost = sorted(whole)[2]
    assert lost.startswith("model-00002-of-")
    for name in (lost, "config.json", "model.safetensors.index.json"):
        (tmp_path / "out" / name).unlink()
        done = api.convert(source, tmp_path / "out", max_shard_size="300KB")
        assert not done.was_finished
        shards = sum(len(data) for each, data in whole.items() if each.endswith(".safetensors"))
        assert done.resumed_bytes == shards - (len(whole[lost]) if name == lost else 0)
        assert contents(tmp_path / "out") == whole


def test_source_downloaded_again_after_damage_is_converted(
    tmp_path: Path, save: Save, frequent_journal_entries: None
) -> None:
    """The fingerprint is the same, since it depends on the CRC-32s. No damaged byte may be kept when resuming."""
    source, _ = save(tiny())
    api.convert(source, tmp_path / "whole")
    good = source.read_bytes()
    bad = bytearray(good)
    with streamconv.open_checkpoint(source) as checkpoint:
        bad[checkpoint["norm.weight"].record.range.start] ^= 1
    source.write_bytes(bad)
    with pytest.raises(CorruptError, match=r"layernorm\.weight .*CRC-32"):
        api.convert(source, tmp_path / "out")
    source.write_bytes(good)
    api.convert(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_source_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, kind: str, frequent_journal_entries: None
) -> None:
    write = torch.save if kind == "pth" else safetensors.torch.save_file
    path = tmp_path / f"source.{kind}"
    write(make_states(tiny())[0], path)
    other = tmp_path / f"other.{kind}"
    write(make_states(tiny(), seed=1)[0], other)

    def progress(what: str, done: int, total: int, unit: str) -> None:
        if unit == "bytes" and 0.4 * total < done < 0.5 * total:
            path.write_bytes(other.read_bytes())  # the same file, other contents

    with pytest.raises(CorruptError, match=r"was changed while it was read\. Run again when it is complete"):
        api.convert(path, tmp_path / "out", progress=progress)
    assert not (tmp_path / "out").exists()


def test_conversion_is_resumed_after_the_source_was_truncated_and_restored(
    tmp_path: Path, save: Save, frequent_journal_entries: None
) -> None:
    source, _ = save(tiny())
    api.convert(source, tmp_path / "whole")
    data, times = source.read_bytes(), source.stat()

    def progress(what: str, done: int, total: int, unit: str) -> None:
        if unit == "bytes" and done > 0.5 * total:
            os.truncate(source, len(data) // 3)

    with pytest.raises(SourceError, match=r"cut short or is being changed\. Fetch it again"):
        api.convert(source, tmp_path / "out", progress=progress)
    source.write_bytes(data)
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert api.convert(source, tmp_path / "out").resumed_bytes > 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_second_process_is_refused_but_a_lock_of_a_dead_process_is_not(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert not api.convert(source, tmp_path / "out").was_finished


def step_by_step(source: Path, out: Path) -> "subprocess.Popen[str]":
    """Start a conversion that stops half-way until it receives a line."""
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


@pytest.mark.parametrize("how", ["continues", "is interrupted"])
def test_folder_recreated_by_another_process_is_left_to_it(tmp_path: Path, save: Save, how: str) -> None:
    source, _ = save(tiny())
    api.convert(source, tmp_path / "whole")
    first = step_by_step(source, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    second = step_by_step(source, tmp_path / "out")
    if how == "is interrupted":
        first.send_signal(signal.SIGINT)
    _, stderr = first.communicate("\n")
    assert first.returncode != 0
    assert how == "is interrupted" or "Run the same command again" in stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()
    with pytest.raises(OutputError, match=f"is being written by process {second.pid}"):
        api.convert(source, tmp_path / "out")
    second.communicate("\n")
    assert second.returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("frequent_journal_entries")
@pytest.mark.parametrize("is_resumed", [False, True])
def test_tensors_sharing_a_storage_are_checked_in_every_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_resumed: bool
) -> None:
    """Within one shard, the pieces of their record are neither complete nor in order nor without gaps."""
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
        interrupt_after(source, tmp_path / "out", 0.5, max_shard_size="300KB")
        damage()
    with pytest.raises(CorruptError, match=r"CRC-32|was changed while it was read"):
        api.convert(source, tmp_path / "out", max_shard_size="300KB", **({} if is_resumed else {"progress": progress}))
    source.write_bytes(good)
    api.convert(source, tmp_path / "out", max_shard_size="300KB")
    api.convert(source, tmp_path / "whole", max_shard_size="300KB")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("frequent_journal_entries")
def test_resume_rejects_a_changed_source_whose_time_was_reset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "source.safetensors"
    safetensors.torch.save_file(make_states(tiny())[0], path)
    times = path.stat()
    interrupt_after(path, tmp_path / "out", 0.5)
    safetensors.torch.save_file(make_states(tiny(), seed=1)[0], path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(OutputError, match="its backbone differs"):
        api.convert(path, tmp_path / "out")


def test_finished_folder_accepts_a_source_with_another_mode(tmp_path: Path) -> None:
    path = tmp_path / "source.safetensors"
    safetensors.torch.save_file(make_states(tiny())[0], path)
    api.convert(path, tmp_path / "out")
    path.chmod(0o640)
    assert api.convert(path, tmp_path / "out").was_finished


@pytest.mark.usefixtures("frequent_journal_entries")
@pytest.mark.parametrize("size", [10**12, -5, 1, float("inf")])
def test_impossible_journal_entry_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    path = tmp_path / "source.safetensors"
    safetensors.torch.save_file(make_states(tiny())[0], path)
    api.convert(path, tmp_path / "whole")
    interrupt_after(path, tmp_path / "out", 0.5)
    temporary = temporary_path(tmp_path / "out" / "model.safetensors")
    temporary.write_bytes(b"\xff" * 1000)
    with (tmp_path / "out" / JOURNAL_NAME).open("a") as journal:
        point = {"size": size, "sha256": "0" * 64}
        journal.write(json.dumps({"file": "model.safetensors", "resume_point": point}) + "\n")
    assert api.convert(path, tmp_path / "out").resumed_bytes == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "streamconv.json"])
def test_hard_link_at_a_temporary_path_is_refused(tmp_path: Path, save: Save, name: str) -> None:
    source, _ = save(tiny())
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "out").mkdir()
    planted = temporary_path(tmp_path / "out" / name)
    planted.hardlink_to(tmp_path / "precious")
    with pytest.raises(OutputError, match="it has several names, or is not a file; remove it"):
        api.convert(source, tmp_path / "out")
    assert (tmp_path / "precious").read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["model.safetensors", ".model.safetensors.streamconv-incomplete"])
def test_source_at_the_output_path_is_not_overwritten(tmp_path: Path, save: Save, name: str) -> None:
    source, _ = save(tiny())
    (tmp_path / "out").mkdir()
    shutil.copy(source, tmp_path / "out" / name)
    with pytest.raises(UsageError, match=r"is the source, and .* would overwrite it"):
        api.convert(tmp_path / "out" / name, tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == source.read_bytes()


def test_file_created_before_the_lock_is_not_overwritten(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = save(tiny())
    lock = folder.locked_journal

    def late(path: Path, output: Path) -> AbstractContextManager[OpenJournal]:
        (output / "model.safetensors").write_bytes(b"another's")
        return lock(path, output)

    monkeypatch.setattr(folder, "locked_journal", late)
    with pytest.raises(OutputError, match="which streamconv did not write"):
        api.convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"another's"


@pytest.mark.parametrize("name", [JOURNAL_NAME, "streamconv.json"])
@pytest.mark.parametrize("what", ["endless", "a pipe", "large"])
def test_special_and_oversized_files_in_place_of_journal_or_manifest_are_refused(
    tmp_path: Path, save: Save, name: str, what: str
) -> None:
    source, _ = save(tiny())
    (tmp_path / "out").mkdir()
    if what == "endless":
        (tmp_path / "out" / name).symlink_to("/dev/zero")
    elif what == "a pipe":
        os.mkfifo(tmp_path / "out" / name)
    else:
        (tmp_path / "out" / name).touch()
        os.truncate(tmp_path / "out" / name, 1 << 40)
    with pytest.raises(OutputError, match=r"not a regular file|1,099,511,627,776 bytes"):
        api.convert(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


def test_conversion_with_constant_tensors_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamconv.output.writer.SYNC_BYTES", 20_000)
    state, _ = make_states(replace(tiny(), has_layer_scale=False))
    source = saved(teacher(state), tmp_path / "x.pth")
    api.convert(source, tmp_path / "whole")
    interrupt_after(source, tmp_path / "out", 0.5)
    assert api.convert(source, tmp_path / "out").resumed_bytes > 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
