"""Kills, signals and power cuts at any moment: the same command resumes, and little is repeated."""

import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest
import torch

import streamconv
import streamconv.verification.report
from streamconv import (
    CorruptError,
)
from streamconv.files.address import Address
from streamconv.output.journal import JOURNAL_NAME, NOT_STARTED, Journal
from streamconv.source.cache import own_path
from tests import api
from tests.checkpoints import make_states, timm_state
from tests.file_server import FileServer
from tests.hub_server import TOKEN, HubServer
from tests.support import (
    HUB_SHARD_SIZE,
    ROOT,
    Interrupted,
    Save,
    contents,
    digests,
    hub_environment,
    require_uploaded_folder,
    tiny,
)

KILLS = int(os.environ.get("STREAMCONV_KILLS", "24"))  # in each of the six ways, and some twice


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds a file's name in /proc")
@pytest.mark.parametrize("how", ["kill", "power", "power-names"])
@pytest.mark.parametrize("shard_size", ["5GB", "60KB"])
def test_kill_or_power_cut_at_any_step_repeats_little(tmp_path: Path, how: str, shard_size: str) -> None:
    torch.save(make_states(tiny(layers=2, hidden=64))[0], tmp_path / "source.pth")
    words = [sys.executable, "-m", "tests.crash", tmp_path / "source.pth", tmp_path, how, shard_size, str(KILLS)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == [], done.stderr
    assert found["kills"] >= KILLS
    assert found["resumed_bytes"] > 0.8 * KILLS  # the others had no journal entry yet
    assert 0 < found["repeated"] <= found["max_repeated"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds a file's name in /proc")
@pytest.mark.parametrize("how", ["kill", "power", "power-names"])
def test_kill_or_power_cut_of_a_part_or_of_finishing_repeats_little(tmp_path: Path, how: str) -> None:
    torch.save(make_states(tiny(layers=2, hidden=64))[0], tmp_path / "source.pth")
    words = [sys.executable, "-m", "tests.crash", tmp_path / "source.pth", tmp_path, how, "60KB", str(KILLS)]
    done = subprocess.run([*words, "none", "2"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == [], done.stderr
    assert found["kills"] >= KILLS
    assert found["resumed_bytes"] > 0.5 * KILLS
    assert 0 < found["repeated"] <= found["max_repeated"]


@pytest.mark.parametrize("shard_size", ["5GB", "100MB"])
def test_signal_at_any_moment_repeats_little(tmp_path: Path, save: Save, shard_size: str) -> None:
    source, _ = save(tiny(layers=24, hidden=512))  # 300 MB
    api.convert(source, tmp_path / "whole", max_shard_size=shard_size)
    wanted = digests(tmp_path / "whole")
    words = [sys.executable, "-m", "streamconv", "convert", source, "-o", "out", "--max-shard-size", shard_size]
    choice = random.Random(shard_size)
    kills = 0
    while kills < 10:
        process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        time.sleep(choice.uniform(0.1, 0.7))
        number = choice.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        process.send_signal(number)
        _, stderr = process.communicate()
        if process.returncode == 0:  # too late: it had finished
            assert digests(tmp_path / "out") == wanted
            shutil.rmtree(tmp_path / "out")
            continue
        kills += 1
        if process.returncode == 130:
            again = re.search(r"To resume, run\n  streamconv (.*)\n", stderr)
            assert again is not None, stderr
            assert again[1] == f"convert {source} -o out --max-shard-size {shard_size}"
        for name in wanted if (tmp_path / "out").exists() else ():
            if (tmp_path / "out" / name).exists():
                assert sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == wanted[name]
    assert subprocess.run(words, cwd=tmp_path, capture_output=True).returncode == 0
    assert digests(tmp_path / "out") == wanted


def test_killed_synthetic_run_is_resumed_and_leaves_nothing_behind(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "streamconv", "run", "dinov2_vits14", "--synthetic", "--no-verify", "-o", "out"]
    code = (
        "import os, sys, streamconv.__main__ as cli, streamconv.output.writer as s\n"
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
    assert re.search(r"converted into out, 88 MB, [1-9].* of it before an interruption; ", done.stdout)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds a file's name in /proc")
@pytest.mark.parametrize(("how", "shard_size"), [("kill", "5GB"), ("power", "30KB"), ("power-names", "5GB")])
def test_kill_or_power_cut_during_a_cast_repeats_little(tmp_path: Path, how: str, shard_size: str) -> None:
    state = make_states(tiny(layers=2, hidden=64))[0]
    torch.save(state, tmp_path / "source.pth")
    words = [sys.executable, "-m", "tests.crash", tmp_path / "source.pth", tmp_path, how, shard_size, "12", "bfloat16"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == [], done.stderr
    assert found["kills"] >= 12
    assert found["resumed_bytes"] > 7
    # For each kill, the record that a resume point cuts is read once more.
    largest = max(value.nbytes for value in state.values())
    assert 0 < found["repeated"] <= found["max_repeated"] + 2 * largest


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds a file's name in /proc")
def test_power_cut_resumes_tensors_that_are_rearranged(tmp_path: Path) -> None:
    """Matrices are stored transposed, positions are cut, and registers are sums."""
    state = {key: value.t().contiguous().t() if value.dim() == 2 else value for key, value in timm_state(4, 5).items()}
    torch.save(state, tmp_path / "source.pth")
    words = [sys.executable, "-m", "tests.crash", tmp_path / "source.pth", tmp_path, "power", "5GB", "12"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == [], done.stderr
    assert found["kills"] >= 12
    assert found["resumed_bytes"] > 7


@pytest.mark.usefixtures("frequent_journal_entries")
@pytest.mark.parametrize("shard_size", ["5GB", "100KB"])
def test_cast_record_damaged_before_an_interruption_is_not_resumed(tmp_path: Path, save: Save, shard_size: str) -> None:
    """The interruption comes between the damaged bytes and the end of their record, where its CRC-32 is compared.

    The file fetched again has the same CRC-32s, so it is the same source.
    """
    source, _ = save(tiny())
    options = {"dtype": "bfloat16", "max_shard_size": shard_size}
    api.convert(source, tmp_path / "whole", **options)
    good = source.read_bytes()
    with streamconv.open_checkpoint(source) as checkpoint:
        record = checkpoint["blocks.1.mlp.fc1.weight"].record.range
    bad = bytearray(good)
    bad[record.start] ^= 1 << 7
    bad[record.start + 3] ^= 1  # one that a cast keeps
    cut = 0
    for share in (step / 30 for step in range(30)):
        source.write_bytes(bad)

        def progress(what: str, done: int, total: int, unit: str, share: float = share) -> None:
            if unit == "bytes" and done > share * total:
                raise Interrupted

        try:
            api.convert(source, tmp_path / "out", progress=progress, **options)
        except Interrupted:
            marks = Journal.read(tmp_path / "out" / JOURNAL_NAME).resume_points.values()
            cut += any(mark.unproven for mark in marks)
        except CorruptError:
            break
        source.write_bytes(good)
        api.convert(source, tmp_path / "out", **options)
        assert contents(tmp_path / "out") == contents(tmp_path / "whole"), share
        shutil.rmtree(tmp_path / "out")
    assert cut > 3
    if shard_size == "5GB":
        assert share > 0.3  # it got as far as the damage


def test_killed_conversion_to_the_hub_is_resumed(
    hub: HubServer, server: FileServer, remote_hub_model: str, tmp_path: Path
) -> None:
    """The process is killed by SIGKILL at many different moments, and the same command is run again."""
    command = [sys.executable, "-m", "streamconv", "run", remote_hub_model, "-o", "stage", "--stream"]
    command += ["--push-to-hub", "it"]
    command += ["--max-shard-size", HUB_SHARD_SIZE, "--no-parity", "--device", "cpu"]
    environment = {**os.environ, **hub_environment(hub, tmp_path)}
    server.faults.seconds_a_megabyte = 0.02
    for uploads in (1, 2, 4):
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
        while process.poll() is None and sum(hub.uploads.values()) < uploads:
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    server.faults.seconds_a_megabyte = 0
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "uploaded to ada/it, one file at a time" in done.stdout
    assert f"published: {hub.url}/ada/it/commit/" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    # A kill between the end of an upload and its journal entry may repeat that upload.
    assert sum(hub.uploads.values()) <= len(hub.uploads) + 3
    require_uploaded_folder(hub, server, tmp_path)
    assert not (tmp_path / "stage").exists()


def test_killed_download_is_resumed(server: FileServer, tmp_path: Path) -> None:
    torch.save(make_states(tiny(layers=3, hidden=512))[0], server.folder / "x.pth")  # 38 MB
    source = f"{server.url}/x.pth"
    cache = own_path(Address(source)).parent
    size, journal = (server.folder / "x.pth").stat().st_size, cache / ".x.pth.streamconv-journal"
    server.faults.seconds_a_megabyte = 0.05
    command = [sys.executable, "-m", "streamconv", "convert", source, "-o", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    kept = NOT_STARTED
    while time.monotonic() < deadline and kept.size < size // 2:
        kept = Journal.read(journal).resume_points.get("x.pth", NOT_STARTED)
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (cache / "x.pth").exists()
    server.faults.seconds_a_megabyte, server.sent = 0, 0
    api.convert(source, tmp_path / "out")
    assert server.sent < size // 2 + (8 << 20)
    assert (cache / "x.pth").read_bytes() == (server.folder / "x.pth").read_bytes()


SLOW = (
    "import sys, time, streamconv.__main__ as cli, streamconv.output.writer as s\n"
    "s.RecordChecks.add = lambda *args: print('ready', flush=True) or time.sleep(20)\n"
    "sys.argv = ['streamconv', 'convert', {source!r}, '-o', {out!r}]\n"
    "cli.main()"
)


def test_closed_terminal_interrupts(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    child, terminal = pty.fork()
    if not child:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # even if the tests run under nohup
        os.execv(sys.executable, [sys.executable, "-c", SLOW.format(source=str(backbone), out=str(tmp_path / "out"))])
    seen = b""
    while b"ready" not in seen:
        seen += os.read(terminal, 4096)
    os.close(terminal)  # as when its window is closed: SIGHUP, and output can no longer be written
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert not (tmp_path / "out").exists()


def test_nohup_is_respected(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    process = subprocess.Popen(
        ["nohup", sys.executable, "-c", SLOW.format(source=str(backbone), out=str(tmp_path / "out"))],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 130


def test_interruption_swallowed_by_an_import_still_interrupts(tmp_path: Path, save: Save) -> None:
    code = (
        "import os, signal, sys, streamconv, streamconv.__main__ as cli\n"
        "def plan(*args, **options):\n"
        "    try: os.kill(os.getpid(), signal.SIGINT)\n"
        "    except BaseException: raise RecursionError\n"
        "streamconv.plan = plan\n"
        "sys.argv = ['streamconv', 'plan', 'x']\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "Interrupted. To resume, run\n  streamconv plan x\n")
