"""The command line as people and scripts use it."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import torch

from tests import api
from tests.checkpoints import make_states
from tests.support import ROOT, Save, read_terminal, run, tiny


def test_plan_reads_no_weights_and_writes_nothing(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    done = run("plan", backbone, "--max-shard-size", "1MB", "--json", cwd=tmp_path)
    plan = json.loads(done.stdout)
    assert [path.name for path in tmp_path.iterdir()] == ["source.pth"]
    assert sum(len(shard["tensors"]) for shard in plan["shards"]) == sum(len(m["targets"]) for m in plan["mapping"])
    api.convert(backbone, tmp_path / "out", max_shard_size="1MB")
    assert {s["file"]: s["bytes"] for s in plan["shards"]} == {
        path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")
    }
    assert "blocks.0.attn.qkv.weight" not in run("plan", backbone, cwd=tmp_path).stdout
    text = run("plan", backbone, "--mapping", cwd=tmp_path).stdout
    assert "blocks.0.attn.qkv.weight" in text
    assert "encoder.layer.0.attention.attention.query.weight, encoder.layer.0.attention.attention.key.weight" in text


def test_models_lists_every_published_model(tmp_path: Path) -> None:
    shown = run("models", cwd=tmp_path).stdout.splitlines()
    start = shown.index("dinov2, licence apache-2.0")
    lines = shown[start : start + 2 + 16 + 12]
    names = [
        f"dinov2_vit{letter}14{registers}{head}"
        for registers in ("", "_reg")
        for head in ("", "_1layer")
        for letter in "sblg"
    ]
    assert [line.split()[0] for line in lines[1:17]] == names
    assert "dinov2-giant-imagenet1k-1-layer" in lines[8]
    assert "dinov2-with-registers-small " in lines[9]
    assert lines[17] == "dinov2, licence cc-by-nc-4.0"
    assert lines[-1].split() == ["webssl_dino7b_full8b_518", "webssl-dino7b-full8b-518", "26", "GB"]
    every = json.loads(run("models", "--json", cwd=tmp_path).stdout)["models"]
    assert [each["name"] for each in every] == [line.split()[0] for line in shown if ", licence " not in line]
    models = [each for each in every if each["name"] in names]
    assert [each["name"] for each in models] == names
    assert models[3]["bytes"] == 4 * 1_136_480_768


def test_mistakes_end_in_one_message_and_an_exit_code(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    (tmp_path / "cut.pth").write_bytes(backbone.read_bytes()[:-1000])
    state, _ = make_states(tiny())
    torch.save({**state, "more": torch.zeros(1)}, tmp_path / "more.pth")
    (tmp_path / "file").touch()
    before = {path.name for path in tmp_path.iterdir()}
    nowhere = {"https_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"}  # with or without a network
    for code, message, words in (
        (2, "Did you mean dinov2_vitb14, dinov2_vitb14_reg or dinov2_vitb14_1layer?", ("run", "dinov2_vitb")),
        (2, "SOURCE is empty", ("run", "", "--no-verify")),
        (2, "name is empty", ("convert", backbone, "-o", "")),
        (2, "needs the name of a model", ("run", backbone, "--synthetic", "--no-verify")),
        (4, "cannot be written", ("run", "dinov2_vits14", "--synthetic", "--no-verify", "-o", "x" * 300)),
        (2, "give only one of them", ("run", "dinov2_vits14", "--model_name", "dinov2_vits14")),
        (2, "Give -o DIR", ("run", backbone, "--no-verify")),
        (2, "is not a device", ("run", backbone, "-o", "out", "--device", "gpu")),
        (2, "The image none.png does not exist", ("run", backbone, "-o", "out", "--image", "none.png")),
        (2, "cannot be read", ("run", backbone, "-o", "out", "--image", "http://127.0.0.1:1/x.png")),
        (2, "not builtin, hub or a folder", ("run", backbone, "-o", "out", "--reference", "facebook")),
        (4, "folder that exists and is writable", ("run", backbone, "-o", "out", "--report", "none/x.html")),
        (2, "must be an HTML file", ("run", backbone, "-o", "out", "--report", "out/model.safetensors")),
        (2, "500MB or 5GB", ("convert", backbone, "-o", "out", "--max-shard-size", "much")),
        (2, "No such option", ("convert", backbone, "--outptu", "out")),
        (3, "dinov2_vitg14_pretrain.pth, put it at", ("run",)),
        (3, "put it at", ("convert", "dinov2_vits14", "-o", "out", "--stream")),
        (3, "cannot be opened", ("plan", "http://127.0.0.1:9/x.pth")),
        (2, "does not name a file", ("plan", "https://host.invalid/")),
        (2, "is not a valid URL", ("plan", "https://host:port/x.pth")),
        (2, "Give SOURCE, too", ("verify", "out", "--stream")),
        (2, "Give SOURCE, too", ("verify", "out", "--no-parity")),
        (3, "no such file", ("convert", "none.pth", "-o", "out")),
        (3, "web page", ("convert", "page.pth", "-o", "out")),
        (3, "cut short", ("convert", "cut.pth", "-o", "out")),
        (3, "more [1]", ("convert", "more.pth", "-o", "out")),
        (4, "is a file", ("convert", backbone, "-o", "file")),
        (4, "is a file", ("convert", backbone, "-o", "file", "--force")),
        (4, "is not a folder", ("verify", "none", backbone)),
    ):
        done = run(*words, cwd=tmp_path, TORCH_HOME=str(tmp_path / "none"), **nowhere)
        assert done.returncode == code, (words, done.stderr)
        assert message.lower() in done.stderr.lower(), words
        assert "Traceback" not in done.stderr, words
        assert done.stdout == ""
    assert {path.name for path in tmp_path.iterdir()} == before


def test_progress_bar_appears_only_on_a_terminal(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny(layers=24, hidden=512))
    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "streamconv", "convert", str(backbone), "-o", "out"]
    environment = {**os.environ, "COLUMNS": "120", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(command, stderr=terminal, stdout=subprocess.PIPE, cwd=tmp_path, env=environment)
    os.close(terminal)
    seen = read_terminal(main)
    process.communicate()
    assert process.returncode == 0
    assert "━" in seen
    assert "writing model.safetensors" in seen
    assert re.search(rf"[0-9]/{backbone.stat().st_size / 1e6:.0f} MB", seen)
    quiet = run("convert", backbone, "-o", "out2", cwd=tmp_path)
    assert quiet.stderr == "writing model.safetensors\n"


def test_closed_or_full_output_streams_change_nothing(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    streamconv_ = f"{sys.executable} -m streamconv"
    for i, (code, words) in enumerate((
        (0, f"convert {backbone} -o OUT 2>&-"),
        (0, f"convert {backbone} -o OUT >&- 2>&-"),
        (0, f"convert {backbone} -o OUT 2>/dev/full"),
        (0, f"convert {backbone} -o OUT --max-shard-size 100KB 2>&1 >/dev/null | true; exit ${{PIPESTATUS[0]}}"),
        (0, f"plan {backbone} | true; exit ${{PIPESTATUS[0]}}"),
        (2, "convert nothing -o OUT 2>&-"),
        (4, f"plan {backbone} >/dev/full"),
        (4, f"convert {backbone} -o OUT --json >/dev/full"),
    )):  # fmt: skip
        words = words.replace("OUT", f"out{i}")
        done = subprocess.run(
            ["bash", "-c", f"{streamconv_} {words}"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, (words, done.stderr)
        assert "Traceback" not in done.stderr, words
        assert code == 0 or "2>&-" in words or "error: " in done.stderr
        assert " -o " not in words or code == 2 or (tmp_path / f"out{i}" / "streamconv.json").exists(), words


def test_deleted_current_folder_is_reported(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    words = f"mkdir gone; cd gone; rmdir ../gone; {sys.executable} -m streamconv convert {backbone} -o out"
    done = subprocess.run(
        ["bash", "-c", words], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stderr) == (2, "error: The current folder no longer exists. Change to another one.\n")
