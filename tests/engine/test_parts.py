"""Parts of a plan are written independently into one folder, and joined: byte for byte what one process writes."""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import streamconv
from streamconv import Cancelled, ConversionOptions, OutputError, UsageError
from streamconv.jobs.output_location import refuse_own_output
from streamconv.output import folder, shared_folder
from streamconv.output.ownership import files_with_journals
from tests import api
from tests.checkpoints import make_states, saved
from tests.support import Faults, Save, contents, run, tiny

COUNT = 3
SHARDS = "100KB"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a source, the plan of its conversion, and "whole", the output of one process."""
    folder = tmp_path_factory.mktemp("made")
    source = saved(make_states(tiny())[0], folder / "x.pth")
    options = ConversionOptions(max_shard_size=SHARDS)
    streamconv.convert(source, folder / "whole", options)
    streamconv.plan(source, options, save=folder / "plan.json")
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    """Return a folder with the plan and "whole", for an output of the test's own."""
    shutil.copy(made / "plan.json", tmp_path)
    (tmp_path / "whole").symlink_to(made / "whole")
    return tmp_path


def write(work: Path, number: int, **options: Any) -> streamconv.Conversion:
    return streamconv.convert_plan(work / "plan.json", work / "out", part=f"{number}/{COUNT}", **options)


def finish(work: Path) -> streamconv.Conversion:
    return streamconv.finish(work / "out", work / "plan.json")


def test_parts_in_any_order_give_the_folder_of_one_process(work: Path) -> None:
    written: list[str] = []
    for number in (3, 1, 2):
        done = write(work, number)
        assert str(done.part) == f"{number}/{COUNT}"
        assert not (work / "out" / "config.json").exists()
        assert not (work / "out" / "model.safetensors.index.json").exists()
        written += done.shards
    assert sorted(written) == [shard.filename for shard in done.plan.shards]
    finished = finish(work)
    assert not finished.was_finished
    assert contents(work / "out") == contents(work / "whole")
    assert finish(work).was_finished
    assert write(work, 2).was_finished
    assert api.verify(work / "out").passed
    assert contents(work / "out") == contents(work / "whole")


def test_output_that_is_a_file_is_refused(work: Path) -> None:
    (work / "out").write_text("mine")
    for call in (lambda: write(work, 1), lambda: finish(work)):
        with pytest.raises(OutputError, match="out is a file"):
            call()
    assert (work / "out").read_text() == "mine"


def test_missing_parts_are_named(work: Path) -> None:
    with pytest.raises(OutputError, match=r"out holds none of the \d+ weight files of the plan\."):
        finish(work)
    assert not (work / "out").exists()
    write(work, 1)
    with pytest.raises(OutputError) as caught:
        finish(work)
    assert "part 2/3: model-" in str(caught.value)
    assert "part 3/3: model-" in str(caught.value)
    assert "part 1/3" not in str(caught.value)
    write(work, 3)
    with pytest.raises(OutputError) as caught:
        finish(work)
    assert "part 3/3" not in str(caught.value)


@pytest.mark.usefixtures("frequent_journal_entries")
def test_interrupted_part_is_resumed_and_its_state_is_named(work: Path) -> None:
    def stop(step: str, done: int, total: int, unit: str) -> None:
        if done > 0.7 * total:
            raise Cancelled

    with pytest.raises(Cancelled):
        write(work, 1, progress=stop)
    write(work, 2)
    write(work, 3)
    with pytest.raises(OutputError, match=r"part 1/3: model-\S+ has [\d,]+ of [\d,]+ bytes"):
        finish(work)
    assert write(work, 1).resumed_bytes > 0
    finish(work)
    assert contents(work / "out") == contents(work / "whole")


def test_other_numbers_of_parts_may_follow(work: Path) -> None:
    write(work, 1)
    for number in (1, 2):
        streamconv.convert_plan(work / "plan.json", work / "out", part=f"{number}/2")
    finish(work)
    assert contents(work / "out") == contents(work / "whole")


def test_more_parts_than_files_leave_some_without_work(work: Path) -> None:
    count = len(json.loads((work / "whole" / "streamconv.json").read_text())["files"]) + 5
    shards = [
        streamconv.convert_plan(work / "plan.json", work / "out", part=f"{number}/{count}").shards
        for number in range(1, count + 1)
    ]
    assert [] in [list(each) for each in shards]
    finish(work)
    assert contents(work / "out") == contents(work / "whole")


def test_second_process_on_the_same_part_is_refused(work: Path) -> None:
    refusals: list[str] = []

    def again(*report: object) -> None:
        if not refusals:
            with pytest.raises(OutputError) as caught:
                write(work, 1)
            refusals.append(str(caught.value))
        with suppress(OutputError):
            write(work, 2)  # another part may be written meanwhile

    write(work, 1, progress=again)
    assert "is being written by process" in refusals[0]
    write(work, 2)
    write(work, 3)
    finish(work)
    assert contents(work / "out") == contents(work / "whole")


def test_part_may_begin_at_the_moment_when_another_begins(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = shared_folder.files_with_journals

    def begins_after_listing(folder: Path) -> list[str]:
        found = listed(folder)
        monkeypatch.setattr(shared_folder, "files_with_journals", listed)
        write(work, 2)
        return found

    monkeypatch.setattr(shared_folder, "files_with_journals", begins_after_listing)
    for number in (1, 3):
        write(work, number)
    finish(work)
    assert contents(work / "out") == contents(work / "whole")


def stop_halfway(step: str, done: int, total: int, unit: str) -> None:
    if done > 0.5 * total:
        raise Cancelled


def test_part_and_one_process_that_begin_at_one_moment_never_both_write(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, begin = folder._start, shared_folder.SharedFolder.begin

    def part_begins_after_check(*args: Any) -> None:
        write(work, 1)
        start(*args)

    def process_begins_after_check(*args: Any, **options: Any) -> None:
        begin(*args, **options)
        with pytest.raises(Cancelled):
            streamconv.convert_plan(work / "plan.json", work / "out", progress=stop_halfway)

    with monkeypatch.context() as patch:
        patch.setattr(folder, "_start", part_begins_after_check)
        with pytest.raises(OutputError, match="is being written in parts"):
            streamconv.convert_plan(work / "plan.json", work / "out")
    for number in (1, 2, 3):
        write(work, number)
    finish(work)
    assert contents(work / "out") == contents(work / "whole")

    shutil.rmtree(work / "out")
    with monkeypatch.context() as patch:
        patch.setattr(shared_folder.SharedFolder, "begin", process_begins_after_check)
        with pytest.raises(OutputError, match="one process began"):
            write(work, 1)
    streamconv.convert_plan(work / "plan.json", work / "out")
    assert contents(work / "out") == contents(work / "whole")


def test_file_that_another_part_completes_is_not_taken_for_the_source(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its temporary name is gone once it was renamed, although it was there a moment before."""
    monkeypatch.setattr(os.path, "exists", lambda path: True)
    refuse_own_output([work / "plan.json"], work, ["none.safetensors"], force=False)
    with pytest.raises(UsageError, match="is the source"):
        refuse_own_output([work / "plan.json"], work, ["none.safetensors", "plan.json"], force=False)


def test_parts_of_another_plan_are_refused(work: Path) -> None:
    write(work, 1)
    before = contents(work / "out")
    other = make_states(tiny(), seed=1)[0]
    torch.save(other, work / "other.pth")
    streamconv.plan(work / "other.pth", ConversionOptions(max_shard_size=SHARDS), save=work / "other.json")
    with pytest.raises(OutputError, match="holds parts of another conversion"):
        streamconv.convert_plan(work / "other.json", work / "out", part="2/3")
    with pytest.raises(OutputError, match="holds parts of another conversion"):
        streamconv.finish(work / "out", work / "other.json")
    assert contents(work / "out") == before


def test_finished_folder_of_another_conversion_is_refused(work: Path) -> None:
    api.convert(work / "whole", work / "out", dtype="bfloat16")
    before = contents(work / "out")
    with pytest.raises(OutputError, match="holds another conversion"):
        write(work, 1)
    with pytest.raises(OutputError, match="holds another conversion"):
        finish(work)
    assert contents(work / "out") == before


def test_foreign_weights_are_not_replaced(work: Path) -> None:
    (work / "out").mkdir()
    name = sorted(path.name for path in (work / "whole").glob("*.safetensors"))[1]
    (work / "out" / name).write_bytes(b"mine")
    with pytest.raises(OutputError, match="which streamconv did not write"):
        write(work, 1)
    assert contents(work / "out") == {name: b"mine"}


def test_weights_that_appear_while_a_part_is_written_are_not_replaced(work: Path) -> None:
    last = sorted(path.name for path in (work / "whole").glob("*.safetensors"))[-1]

    def put(*report: object) -> None:
        (work / "out" / last).write_bytes(b"mine")

    with pytest.raises(OutputError, match="was not written by streamconv"):
        streamconv.convert_plan(work / "plan.json", work / "out", part="1/1", progress=put)
    assert (work / "out" / last).read_bytes() == b"mine"


def test_changed_file_of_a_part_is_found_before_the_model_can_be_loaded(work: Path) -> None:
    for number in (1, 2, 3):
        write(work, number)
    path = sorted((work / "out").glob("model-*.safetensors"))[1]
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(OutputError, match=f"{path.name} has changed since it was written: its sha256"):
        finish(work)
    assert not (work / "out" / "model.safetensors.index.json").exists()
    path.unlink()
    for number in (1, 2, 3):
        write(work, number)
    finish(work)
    assert contents(work / "out") == contents(work / "whole")


def test_parts_and_one_process_do_not_continue_each_other(work: Path, save: Save) -> None:
    write(work, 1)
    source = work / "whole"
    with pytest.raises(OutputError, match="is being written in parts"):
        streamconv.convert_plan(work / "plan.json", work / "out")
    with pytest.raises(OutputError, match="is being written in parts"):
        api.convert(source, work / "out")
    shutil.rmtree(work / "out")

    def stop(step: str, done: int, total: int, unit: str) -> None:
        if done > 0.5 * total:
            raise Cancelled

    with pytest.raises(Cancelled):
        streamconv.convert_plan(work / "plan.json", work / "out", progress=stop)
    with pytest.raises(OutputError, match="one process began"):
        write(work, 1)
    streamconv.convert_plan(work / "plan.json", work / "out")
    assert contents(work / "out") == contents(work / "whole")


def test_interrupted_finish_is_repeated(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every disk operation, finishing fails; the same call ends in the same folder."""
    for number in (1, 2, 3):
        write(work, number)
    shutil.copytree(work / "out", work / "parts")
    for at in range(1, 200):  # each fails at a later operation, until none is left
        shutil.rmtree(work / "out")
        shutil.copytree(work / "parts", work / "out")
        with monkeypatch.context() as patch:
            failing = Faults(patch, ("replace", "fsync", "unlink", "write", "pwrite"), 28, at)
            try:
                finish(work)
            except OutputError:
                index = work / "out" / "model.safetensors.index.json"
                assert not index.exists() or (work / "out" / "streamconv.json").exists()
            else:
                break
        finish(work)
        assert contents(work / "out") == contents(work / "whole"), at
    assert at > 10
    assert failing.seen > 10


def test_edited_small_files_are_kept(work: Path) -> None:
    for number in (1, 2, 3):
        write(work, number)
    (work / "out" / "config.json").write_text("{}")
    finish(work)
    assert (work / "out" / "config.json").read_text() == "{}"


def test_arguments_that_contradict_each_other_are_refused(work: Path) -> None:
    for options in ({"force": True}, {"client": object()}):
        with pytest.raises(UsageError):
            write(work, 1, **options)
    assert not (work / "out").exists()


def test_commands_name_the_next_step(work: Path) -> None:
    for number in range(1, COUNT + 1):
        done = run("convert", "--plan", "plan.json", "-o", "out", "--part", f"{number}/{COUNT}", cwd=work)
        assert done.returncode == 0
        assert done.stdout.splitlines()[-1].strip() == "streamconv finish out --plan plan.json"
        document = json.loads(
            run("convert", "--plan", "plan.json", "-o", "out", "--part", f"{number}/{COUNT}", "--json", cwd=work).stdout
        )
        assert document["part"] == f"{number}/{COUNT}"
    for words, code in (
        (("verify", "out"), 4),
        (("verify", "out", "plan.json"), 4),
        (("push", "out", "me/it"), 4),
        (("convert", "out", "-o", "other"), 3),
        (("plan", "out"), 3),
    ):
        refused = run(*words, cwd=work)
        assert refused.returncode == code
        assert "is being written in parts" in refused.stderr
    assert run("finish", "out", "--plan", "plan.json", cwd=work).returncode == 0
    assert contents(work / "out") == contents(work / "whole")
    assert files_with_journals(work / "out") == []
    assert not [name for name in os.listdir(work / "out") if name.startswith(".")]
