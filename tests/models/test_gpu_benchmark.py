"""The benchmark for a real GPU runs; what it records of a fake one shows that its steps find what they should."""

import json
from pathlib import Path

import streamconv
from benchmarks.gpu import ALL, IN_THIS_PROCESS, SECONDS, Work, record
from tests.checkpoints import make_states, saved
from tests.fake_cuda import FakeCuda
from tests.support import tiny


def test_steps_record_findings(tmp_path: Path) -> None:
    source = saved(make_states(tiny(hidden=64))[0], tmp_path / "x.pth")
    output = streamconv.convert(source, tmp_path / "out").output
    before = (output / "model.safetensors").read_bytes()
    with FakeCuda():
        findings = list(record(Work(tmp_path, source, output, source), IN_THIS_PROCESS))
    found = {
        name: [each for each in findings if each["step"] == name] for name in ("gpu", "precision", "right", "wrong")
    }
    assert not any("failed" in each for each in findings), findings
    assert len(json.dumps(findings, default=str)) > 1000
    assert found["gpu"][0]["name"] == "Fake GPU"
    assert all(each["error"] < 1e-5 for each in found["precision"] if each["exact"])  # TF32 has 1e-4
    assert [each["passed"] for each in found["right"]] == [True, True]
    assert [each["parity"] for each in found["wrong"]][:4] == [False] * 4
    assert not any(each["passed"] for each in found["wrong"])
    assert (output / "model.safetensors").read_bytes() == before


def test_failing_step_is_a_finding_and_late_steps_are_skipped(tmp_path: Path) -> None:
    work = Work(tmp_path, tmp_path, tmp_path, tmp_path)
    assert [each["step"] for each in record(work, IN_THIS_PROCESS[2:3]) if "failed" in each] == ["right"]
    late = Work(tmp_path, tmp_path, tmp_path, tmp_path, start=work.start - SECONDS)
    assert all("skipped" in each for each in record(late, ALL))
