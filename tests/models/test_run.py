"""The run command, from a source to a verified and published folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import streamconv
import streamconv.verification.report
from tests import api
from tests.checkpoints import make_states
from tests.hub_server import TOKEN, HubServer
from tests.support import Save, hub_environment, run, run_process, sha256_of, tiny


def test_run_makes_converts_and_verifies_a_synthetic_model(tmp_path: Path) -> None:
    """A complete ViT-S is made, converted, verified and recorded; then the same again into the finished folder."""
    done = run_process("run", "dinov2_vits14", "--synthetic", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "Looks ok!"
    assert "17 layer outputs on cpu: largest difference 0, allowed 0" not in done.stdout  # 12 layers and four more
    assert "15 layer outputs on cpu: largest difference 0, allowed 0" in done.stdout
    assert "\r" not in done.stderr
    assert "Traceback" not in done.stderr
    folder = tmp_path / "dinov2-small"
    assert [path.name for path in tmp_path.iterdir()] == ["dinov2-small"]  # the random checkpoint is gone
    assert {p.name for p in folder.iterdir()} == {
        "model.safetensors", "config.json", "preprocessor_config.json", "streamconv.json"
    }  # fmt: skip
    assert json.loads((folder / "streamconv.json").read_text())["verification"]["passed"] is True
    again = run("run", "--model_name", "dinov2_vits14", "--synthetic", "--no-verify", cwd=tmp_path)
    assert again.returncode == 0
    assert "was already converted" in again.stdout
    source = json.loads((folder / "streamconv.json").read_text())["source"]["backbone"]["file"]
    assert source == "dinov2_vits14_synthetic_seed0.pth"
    other = run("run", "dinov2_vits14", "--synthetic", "--seed", 1, "--no-verify", cwd=tmp_path)
    assert other.returncode == 4
    assert "holds another conversion" in other.stderr


def test_run_accepts_the_flags_of_the_original_script(tmp_path: Path) -> None:
    kept = tmp_path / "hub" / "checkpoints"
    kept.mkdir(parents=True)
    streamconv.synth("dinov2_vits14_1layer", kept / "dinov2_vits14_pretrain.pth")
    done = run(
        "run", "--model_name", "dinov2_vits14_1layer", "--pytorch_dump_folder_path", "out", "--device", "cpu",
        cwd=tmp_path, TORCH_HOME=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any("labels from torchvision's list, since" in line for line in lines)
    at = lines.index("Predicted classes:")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert lines[at + 1].split("%  ")[1] in config["label2id"]
    assert config["id2label"]["0"] == "tench"
    assert config["architectures"] == ["Dinov2ForImageClassification"]


def test_json_output_is_a_single_object(tmp_path: Path, save: Save) -> None:
    backbone, head = save(tiny(classes=3))
    for words in (
        ("plan", backbone, "--head", head),
        ("convert", backbone, "--head", head, "-o", "out"),
        ("verify", "out", backbone, "--head", head),
        ("run", backbone, "--head", head, "-o", "out"),
    ):
        done = run(*words, "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert isinstance(json.loads(done.stdout), dict)
    assert json.loads(done.stdout)["verification"]["passed"] is True


def test_report_shows_what_the_json_contains(tmp_path: Path, save: Save) -> None:
    backbone, head = save(tiny(classes=5))
    words = ("-o", "out", "--head", head, "--device", "cpu", "--report", "found.html", "--json")
    done = run("run", backbone, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "report: found.html" in done.stderr
    found = json.loads(done.stdout)["verification"]
    page = (tmp_path / "found.html").read_text("utf-8")
    assert page == streamconv.verification.report.render(found)
    assert found["output"]["files"]["model.safetensors"]["sha256"] in page
    assert found["pictures"]["converted"] in page
    assert json.loads((tmp_path / "out" / "streamconv.json").read_text())["verification"]["pictures"] == {}
    (tmp_path / "out" / "model.safetensors").write_bytes(b"")
    done = run("verify", "out", backbone, "--head", head, "--report", "found.html", cwd=tmp_path)
    assert done.returncode == 1
    assert "report: found.html" in done.stdout
    assert "Verification failed" in (tmp_path / "found.html").read_text("utf-8")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_run_on_a_gpu(tmp_path: Path) -> None:
    done = run_process("run", "dinov2_vits14", "--synthetic", "--device", "cuda", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["verification"]
    assert found["device"] == "cuda:0"
    assert found["gpu"]["driver"]
    assert 0 < found["memory"]["gpu_peak"] < 1 << 30
    assert found["memory"]["host_anonymous_peak"] is not None


def test_verify_exits_with_1_on_a_wrong_output(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    api.convert(backbone, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = run("verify", "out", backbone, cwd=tmp_path)
    assert done.returncode == 1
    assert "bytes         FAILED" in done.stdout
    assert done.stdout.endswith("Do not use this output. Failed: bytes, parity.\n")
    assert json.loads((tmp_path / "out" / "streamconv.json").read_text())["verification"]["passed"] is False


def test_verdict_is_recorded_only_for_the_source_of_the_folder(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    torch.save(make_states(tiny(), seed=1)[0], tmp_path / "other.pth")
    api.convert(backbone, tmp_path / "out")
    assert run("verify", "out", backbone, cwd=tmp_path).returncode == 0
    assert run("verify", "out", "other.pth", cwd=tmp_path).returncode == 1
    assert json.loads((tmp_path / "out" / "streamconv.json").read_text())["verification"]["passed"] is True


@pytest.mark.transformers
def test_verified_model_is_published_and_loads_from_the_hub(hub: HubServer, tmp_path: Path, save: Save) -> None:
    backbone, head = save(tiny(classes=5))
    words = ("run", backbone, "--head", head, "-o", "out", "--device", "cpu", "--max-shard-size", "1MB")
    done = run(*words, "--push-to-hub", "it", "--private", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    name = hub.repos["ada/it"].branches["main"][-1][0]
    assert done.stdout.splitlines()[-1] == f"published: {hub.url}/ada/it/commit/{name}"
    assert "uploading model-00001-of-" in done.stderr
    arrived = hub.files("ada/it")
    assert all(arrived[path.name] == path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert "| parity | passed |" in arrived["README.md"].decode()
    again = run(*words, "--push_to_hub", "it", "--json", cwd=tmp_path)
    name = hub.repos["ada/it"].branches["main"][-1][0]
    assert json.loads(again.stdout)["published"] == f"{hub.url}/ada/it/commit/{name}"
    assert set(hub.uploads.values()) == {1}
    code = (
        "import sys, torch\nfrom transformers import AutoModel, AutoImageProcessor\n"
        "pair = [AutoModel.from_pretrained(name).eval() for name in ('ada/it', sys.argv[1])]\n"
        "AutoImageProcessor.from_pretrained('ada/it')\n"
        "states = [model.state_dict() for model in pair]\n"
        "print(all(torch.equal(states[0][key], states[1][key]) for key in states[1]), len(states[0]) > 20)"
    )
    environment = {"TRANSFORMERS_OFFLINE": "0", "DISABLE_SAFETENSORS_CONVERSION": "1"}
    loaded = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        capture_output=True, text=True, env={**os.environ, **hub_environment(hub, tmp_path), **environment},
    )  # fmt: skip
    assert loaded.stdout == "True True\n", loaded.stderr
    assert {token for part, _, token in hub.log if part == "cdn"} == {None}
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_failed_verification_is_published_only_on_request(hub: HubServer, tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    api.convert(backbone, tmp_path / "out")
    changed = tmp_path / "out" / "preprocessor_config.json"
    changed.write_text(changed.read_text().replace("256", "257"))  # and its digest in the manifest, too
    manifest = json.loads((tmp_path / "out" / "streamconv.json").read_text())
    manifest["files"][changed.name]["sha256"] = sha256_of(changed)
    (tmp_path / "out" / "streamconv.json").write_text(json.dumps(manifest))
    words = ("run", backbone, "-o", "out", "--device", "cpu", "--push-to-hub", "it")
    done = run(*words, "--json", cwd=tmp_path)
    assert done.returncode == 1
    assert json.loads(done.stdout)["published"] is None
    assert "Not pushed, because verification failed" in done.stderr
    assert not hub.repos
    done = run(*words, "--push-unverified", cwd=tmp_path)
    assert done.returncode == 1
    assert "published: " in done.stdout
    card = hub.files("ada/it")["README.md"].decode()
    assert "Verification failed" in card
    assert "257" in card
