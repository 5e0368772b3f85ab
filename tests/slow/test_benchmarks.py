"""The benchmarks measure what they claim, compare only equal outputs, and hide no loss."""

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import measure, tables
from benchmarks.__main__ import Bench
from benchmarks.measure import Run, smallest_limit
from benchmarks.ways import CONVERT, CP, MMAP, ORIGINAL, RUN, Options
from tests.support import ROOT

pytestmark = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="measures by /proc")
HOLDS_AND_LEAVES = """
import os, pathlib, time
held = memoryview(b"x" * 60_000_000)
pathlib.Path("between").write_bytes(held[:30_000_000])
os.sync()
time.sleep(0.1)
os.unlink("between")
pathlib.Path("out").write_bytes(held[:5_000_000])
"""


def test_run_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def free_bytes(folder: Path) -> int:
        """Count this test's files only: other tests write to the same disk at the same time."""
        total = 10**12
        for path in tmp_path.iterdir():
            with suppress(FileNotFoundError):
                total -= path.stat().st_size
        return total

    monkeypatch.setattr(measure, "free_bytes", free_bytes)
    found = measure.run([sys.executable, "-c", HOLDS_AND_LEAVES], tmp_path / "out")
    assert found.code == 0
    assert 0.1 < found.wall < 20
    assert 60 < found.peak_mb < 100
    assert 35 <= found.written_mb < 40
    assert 20 < found.disk_mb < 40
    assert (tmp_path / "out").stat().st_size == 5_000_000


def test_memory_and_time_of_children_count(tmp_path: Path) -> None:
    script = "held = b'x' * 60_000_000; sum(range(3_000_000)); exit(7)"
    found = measure.run(["sh", "-c", f'{sys.executable} -c "{script}"; exit $?'], tmp_path / "out")
    assert found.code == 7
    assert found.peak_mb > 60
    assert found.cpu > 0.03


@pytest.mark.parametrize("peak", [1, 100, 50_000])
@pytest.mark.parametrize(
    ("needed", "expected"), [(0, "16"), (16, "16"), (100, "128"), (20480, "20,480"), (10**9, "above")]
)
def test_smallest_memory_limit_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needed: int, expected: str, peak: float
) -> None:
    def run(words: Any, out: Path, limit_mb: int, timeout: float) -> Run:
        return Run(0 if limit_mb >= needed else -9, 1, 1, 1, 1, 1, 1, 1)

    monkeypatch.setattr(measure, "run", run)
    usual = Run(code=0, wall=1, cpu=1, peak_mb=peak, own_mb=peak, read_mb=0, written_mb=0, disk_mb=0)
    assert smallest_limit(["x"], tmp_path, tmp_path / "out", usual).startswith(expected)


def test_real_cgroup_kills_a_process_above_its_limit(tmp_path: Path) -> None:
    group = measure.Cgroup(64 << 20)
    if group.path is None:
        pytest.skip("may not make a memory cgroup")
    group.close()
    for megabytes, code in ((10, 0), (200, -9)):
        words = [sys.executable, "-c", f"b'x' * {megabytes}_000_000"]
        assert measure.run(words, tmp_path / "out", limit_mb=64).code == code


def test_output_with_other_tensors_is_rejected(tmp_path: Path) -> None:
    bench = Bench(arguments(tmp_path))
    for name, shape in (("one", (2, 3)), ("same", (2, 3)), ("other", (3, 2))):
        (tmp_path / name).mkdir()
        save_file({"x": torch.arange(6.0).reshape(shape)}, tmp_path / name / "model.safetensors")
    bench.require_same(CONVERT, tmp_path / "one", Options())
    bench.require_same(MMAP, tmp_path / "same", Options())
    with pytest.raises(SystemExit, match="wrote different tensors"):
        bench.require_same(MMAP, tmp_path / "other", Options())


def arguments(folder: Path) -> Any:
    import argparse

    return argparse.Namespace(runs=1, dir=folder, no_search=True, models=["dinov2_vits14"], ways=[CP, CONVERT])


def result(wall: float, peak_mb: float, code: int = 0) -> dict[str, Any]:
    run = {"code": code, "wall": wall, "cpu": 1.0, "peak_mb": peak_mb, "own_mb": peak_mb / 2, "read_mb": 0}
    run |= {"written_mb": 88, "disk_mb": 0}
    return {"runs": [run, run], "cold": {**run, "wall": 3.0 - wall}, "limit": f"{peak_mb:,.0f}"}


def test_losses_are_listed() -> None:
    ways = {CP: result(1, 2), CONVERT: result(2, 45), MMAP: result(1.5, 700), "killed": result(0.1, 1, code=-9)}
    losses = tables.losses({"models": {"m": {"bytes": 10**9, "ways": ways}}})
    assert losses == [
        f"- m: {CP} needs 1.00 s (streamconv: 2.00), 2 MB peak (streamconv: 45), 1 MB anonymous (streamconv: 22), "
        "2 MB minimum limit (streamconv: 45)",
        f"- m: {MMAP} needs 1.50 s (streamconv: 2.00)",
    ]
    assert tables.losses({"models": {"m": {"bytes": 1, "ways": {CONVERT: result(1, 45), MMAP: result(2, 700)}}}}) == [
        f"- m: {MMAP} needs 1.00 s cold (streamconv: 2.00)"
    ]
    ways = {CONVERT: result(1, 45), RUN: result(3, 900), ORIGINAL: result(2, 1000)}
    assert tables.losses({"models": {"m": {"bytes": 1, "ways": ways}}}) == [
        f"- m: {ORIGINAL} needs 1.00 s cold (streamconv: 2.00)",
        f"- m: {ORIGINAL} needs 2.00 s (streamconv run: 3.00)",
    ]


def test_killed_runs_are_shown() -> None:
    lines = tables.table({CP: result(1, 2), CONVERT: result(2, 45), "killed": result(0.1, 1, code=-9)})
    assert (
        "| **streamconv convert** | 2 | 2.00 (2.00 to 2.00) | 2.00 | 1.00 | 45 | 22 | 45 | 1.00 | 0 | 88 | 0 |" in lines
    )
    assert "| killed | 2 | killed |  |  | 1 | 0 | 1 | 2.90 | 0 | 88 |  |" in lines


def test_growth_is_fitted_by_a_straight_line() -> None:
    points = [(1e9, 3.0, 45.0), (2e9, 5.0, 45.5), (10e9, 21.0, 46.0)]  # 1 s, and 2 s a GB
    (line, _) = tables.growth_lines(points)
    assert (
        "peak memory from 45.0 to 46.0 MB; cold runs take 1.00 s + 2.00 s per GB, with a deviation of up to 0%." in line
    )
    assert "up to 0%" not in tables.growth_lines([*points, (20e9, 60.0, 46.0)])[0]


def test_benchmarks_run_on_the_smallest_model(tmp_path: Path) -> None:
    usual = ["--models", "dinov2_vits14", "--runs", "1", "--no-search", "--dir", tmp_path, "--to", tmp_path]
    sections = (
        ["variants", "--ways", "cp", "convert"],
        ["models", "resume", "where", "--ways", "cp", "convert", "mmap"],
    )
    for section in sections:  # the second run keeps the results of the first
        words = [sys.executable, "-m", "benchmarks", *section, *usual]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "side_by_side.json").read_text())
    assert results["models"]["dinov2_vits14"]["bytes"] == 88_292_048
    cold = results["models"]["dinov2_vits14"]["ways"][CONVERT]["cold"]
    assert 88 < cold["written_mb"] < 95
    resumed = results["resume"]["ways"][CONVERT]["runs"][0]
    assert 30 < resumed["written_mb"] < 70  # half of it existed
    inside = results["where"]["inside"][0]
    assert {"MainThread", "hash", "disk"} <= inside["threads"].keys()
    assert sum(inside["threads"]["MainThread"].values()) < inside["wall"]
    text = (tmp_path / "side_by_side.md").read_text()
    assert text in done.stdout
    for heading in ("models", "variants", "resume", "where"):
        assert tables.TITLES[heading] in text
    assert "Where streamconv is worse" in text
    for name in ("side_by_side_ways.png", "side_by_side_where.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == []  # its own inputs are deleted


def test_run_is_compared_with_the_original_script(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.verify", "dinov2_vits14", "--runs", "1", "--dir", tmp_path]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "exit code" not in done.stdout
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    found = {cells[0]: cells[1:] for cells in rows if len(cells) > 1}
    assert found[ORIGINAL][1] == "1.00"
    wall = float(found[RUN][0].split()[0])
    taken = {name: float(found[name][0]) for name in ("convert", "bytes", "load", "parity", "preprocessing")}
    assert 0 < sum(taken.values()) < wall
    assert list(tmp_path.iterdir()) == []


def test_scale_is_predicted_and_measured_on_a_small_source(tmp_path: Path) -> None:
    section = "One link for all workers"
    words = [sys.executable, "-m", "benchmarks.scale", section, "--runs", "1", "--layers", "2", "--dir", tmp_path]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sections = dict(part.split("\n", 1) for part in done.stdout.split("\n### "))
    assert {section, "Finishing a folder", "On paper"} < sections.keys()
    shared = [line.strip("| ").split(" | ") for line in sections[section].splitlines()[3:]]
    assert [cells[0] for cells in shared] == ["1", "2", "4", "8"]
    for cells in shared:  # no faster than the link, and predicted to be as fast
        assert 0 < float(cells[4].split()[0]) < 85
        assert 60 < float(cells[6]) < 81 or cells[8] != "link"
    assert list(tmp_path.iterdir()) == []
