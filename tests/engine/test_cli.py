"""The command line as people and scripts meet it."""

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import streamconv
import streamconv.verification.report
from streamconv.cli import progress_bar, terminal
from tests.conftest import make_states, tiny

Save = Callable[..., tuple[Path, Path | None]]
ROOT = Path(__file__).parents[2]


def run(*words: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "streamconv", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment})


def test_the_whole_job_on_a_machine_with_nothing_on_it(tmp_path: Path) -> None:
    """ViT-S whole: made, converted, verified, recorded; and again over what is there."""
    done = run("run", "dinov2_vits14", "--synthetic", "--device", "cpu", cwd=tmp_path)
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


def test_a_classifier_by_name_with_the_original_scripts_flags(tmp_path: Path) -> None:
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


def test_json_is_one_object_and_nothing_else(tmp_path: Path, save: Save) -> None:
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


def test_a_report_shows_what_the_json_has(tmp_path: Path, save: Save) -> None:
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
def test_the_whole_job_on_a_gpu(tmp_path: Path) -> None:
    done = run("run", "dinov2_vits14", "--synthetic", "--device", "cuda", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["verification"]
    assert found["device"] == "cuda"
    assert "TF32 off" in found["checks"][2]["proves"]
    assert 0 < found["memory"]["gpu_peak"] < 1 << 30
    assert found["memory"]["host_anonymous_peak"] is not None


def test_plan_reads_no_weight_and_writes_nothing(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    done = run("plan", backbone, "--max-shard-size", "1MB", "--json", cwd=tmp_path)
    plan = json.loads(done.stdout)
    assert [path.name for path in tmp_path.iterdir()] == ["source.pth"]
    assert sum(len(shard["tensors"]) for shard in plan["shards"]) == sum(len(m["targets"]) for m in plan["mapping"])
    streamconv.convert(backbone, tmp_path / "out", max_shard_size="1MB")
    assert {s["file"]: s["bytes"] for s in plan["shards"]} == {
        path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")
    }
    text = run("plan", backbone, cwd=tmp_path).stdout
    assert "blocks.0.attn.qkv.weight" in text
    assert "encoder.layer.0.attention.attention.query.weight, encoder.layer.0.attention.attention.key.weight" in text


def test_models_lists_all_that_were_published(tmp_path: Path) -> None:
    lines = run("models", cwd=tmp_path).stdout.splitlines()
    assert [line.split()[0] for line in lines[1:17]] == [
        f"dinov2_vit{letter}14{registers}{head}"
        for registers in ("", "_reg")
        for head in ("", "_1layer")
        for letter in "sblg"
    ]
    assert "dinov2-giant-imagenet1k-1-layer" in lines[8]
    assert "4,546 MB" in lines[4]
    assert "dinov2-with-registers-small " in lines[9]
    assert "dinov2_vits14_reg4_pretrain.pth + dinov2_vits14_reg4_linear_head.pth" in lines[13]
    assert len(lines) == 1 + 16 + 12
    assert lines[-1].split() == [
        "webssl_dino7b_full8b_518", "webssl-dino7b-full8b-518", "25,819", "MB", "webssl_dino7b_full8b_518.pth"
    ]  # fmt: skip


def test_wrong_output_ends_in_1(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    streamconv.convert(backbone, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = run("verify", "out", backbone, cwd=tmp_path)
    assert done.returncode == 1
    assert "bytes         FAILED" in done.stdout
    assert "Do not use it" in done.stdout
    assert json.loads((tmp_path / "out" / "streamconv.json").read_text())["verification"]["passed"] is False


def test_a_verdict_is_kept_only_for_the_source_that_the_folder_names(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    torch.save(make_states(tiny(), seed=1)[0], tmp_path / "other.pth")
    streamconv.convert(backbone, tmp_path / "out")
    assert run("verify", "out", backbone, cwd=tmp_path).returncode == 0
    assert run("verify", "out", "other.pth", cwd=tmp_path).returncode == 1
    assert json.loads((tmp_path / "out" / "streamconv.json").read_text())["verification"]["passed"] is True


def test_mistakes_end_in_one_message_and_their_code(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    (tmp_path / "cut.pth").write_bytes(backbone.read_bytes()[:-1000])
    state, _ = make_states(tiny())
    torch.save({**state, "more": torch.zeros(1)}, tmp_path / "more.pth")
    (tmp_path / "file").touch()
    before = {path.name for path in tmp_path.iterdir()}
    nowhere = {"https_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"}  # whatever network there is
    for code, says, words in (
        (2, "Did you mean dinov2_vitb14", ("run", "dinov2_vitb")),
        (2, "SOURCE is empty", ("run", "", "--no-verify")),
        (2, "name is empty", ("convert", backbone, "-o", "")),
        (2, "by its name", ("run", backbone, "--synthetic", "--no-verify")),
        (4, "cannot be written", ("run", "dinov2_vits14", "--synthetic", "--no-verify", "-o", "x" * 300)),
        (2, "give one of them", ("run", "dinov2_vits14", "--model_name", "dinov2_vits14")),
        (2, "Give -o DIR", ("run", backbone, "--no-verify")),
        (2, "is not a device", ("run", backbone, "-o", "out", "--device", "gpu")),
        (2, "cannot be read", ("run", backbone, "-o", "out", "--image", "none.png")),
        (2, "cannot be read", ("run", backbone, "-o", "out", "--image", "http://127.0.0.1:1/x.png")),
        (2, "not builtin, hub or a folder", ("run", backbone, "-o", "out", "--reference", "facebook")),
        (4, "folder that exists and is writable", ("run", backbone, "-o", "out", "--report", "none/x.html")),
        (2, "must be an HTML file", ("run", backbone, "-o", "out", "--report", "out/model.safetensors")),
        (2, "500MB or 5GB", ("convert", backbone, "-o", "out", "--max-shard-size", "much")),
        (2, "No such option", ("convert", backbone, "--outptu", "out")),
        (3, "dinov2_vitg14_pretrain.pth, put it at", ("run",)),
        (3, "put it at", ("convert", "dinov2_vits14", "-o", "out", "--stream")),
        (3, "cannot be read from the beginning", ("plan", "http://127.0.0.1:9/x.pth")),
        (2, "names no file", ("plan", "https://host.invalid/")),
        (2, "is no valid address", ("plan", "https://host:port/x.pth")),
        (2, "Name the SOURCE too", ("verify", "out", "--stream")),
        (2, "Name the SOURCE too", ("verify", "out", "--no-parity")),
        (3, "no such file", ("convert", "none.pth", "-o", "out")),
        (3, "web page", ("convert", "page.pth", "-o", "out")),
        (3, "cut short", ("convert", "cut.pth", "-o", "out")),
        (3, "unexpected: more [1]", ("convert", "more.pth", "-o", "out")),
        (4, "is a file", ("convert", backbone, "-o", "file")),
        (4, "is no folder", ("verify", "none", backbone)),
    ):
        done = run(*words, cwd=tmp_path, TORCH_HOME=str(tmp_path / "none"), **nowhere)
        assert done.returncode == code, (words, done.stderr)
        assert says.lower() in done.stderr.lower(), words
        assert "Traceback" not in done.stderr, words
        assert done.stdout == ""
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_person_sees_a_bar_and_a_log_does_not(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny(layers=24, hidden=512))
    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "streamconv", "convert", str(backbone), "-o", "out"]
    process = subprocess.Popen(
        command, stderr=terminal, stdout=subprocess.PIPE, cwd=tmp_path, env={**os.environ, "COLUMNS": "120"}
    )
    os.close(terminal)
    seen = b""
    try:
        while chunk := os.read(main, 4096):
            seen += chunk
    except OSError:  # how a closed terminal ends
        pass
    os.close(main)
    process.communicate()
    assert process.returncode == 0
    assert "━" in seen.decode()
    assert "writing model.safetensors" in seen.decode()
    assert f"/{backbone.stat().st_size / 1e6:.0f} MB" in seen.decode()
    quiet = run("convert", backbone, "-o", "out2", cwd=tmp_path)
    assert quiet.stderr == "writing model.safetensors\n"


def test_whether_someone_listens_changes_nothing(tmp_path: Path, save: Save) -> None:
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


def test_a_folder_that_is_gone_is_said(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    words = f"mkdir gone; cd gone; rmdir ../gone; {sys.executable} -m streamconv convert {backbone} -o out"
    done = subprocess.run(
        ["bash", "-c", words], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stderr) == (2, "error: The current folder is gone. Change to another one.\n")


SLOW = (
    "import sys, time, streamconv.cli.commands as cli, streamconv.output.writer as s\n"
    "s.RecordChecks.add = lambda *args: print('ready', flush=True) or time.sleep(20)\n"
    "sys.argv = ['streamconv', 'convert', {source!r}, '-o', {out!r}]\n"
    "cli.main()"
)


def test_an_interruption_shows_the_command_without_its_secrets() -> None:
    words = ["run", "https://me:word@h/x.pth?sig=word", "--image=http://me:word@h/y.png", "-o", "a b"]
    shown = terminal._redacted_command(words)
    assert shown.startswith("streamconv run https://h/x.pth --image=http://h/y.png -o 'a b'  (with the full URLs")
    assert "word" not in shown
    assert terminal._redacted_command(["run", "x.pth"]) == "streamconv run x.pth"


def test_no_text_of_a_server_is_taken_for_markup() -> None:
    bar = progress_bar._bar()
    bar.add_task("503 [/bold] [red]", amount="[/x]")
    with bar.console.capture() as shown:
        bar.console.print(bar.get_renderable())
    assert "503 [/bold] [red]" in shown.get()


def test_a_closed_terminal_interrupts(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    child, terminal = pty.fork()
    if not child:
        os.execv(sys.executable, [sys.executable, "-c", SLOW.format(source=str(backbone), out=str(tmp_path / "out"))])
    seen = b""
    while b"ready" not in seen:
        seen += os.read(terminal, 4096)
    os.close(terminal)  # as when its window is closed: SIGHUP, and no one to write to any more
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


def test_an_interruption_that_an_import_swallows_is_one_still(tmp_path: Path, save: Save) -> None:
    code = (
        "import os, signal, sys, streamconv, streamconv.cli.commands as cli\n"
        "def plan(*args, **options):\n"
        "    try: os.kill(os.getpid(), signal.SIGINT)\n"
        "    except BaseException: raise RecursionError\n"
        "streamconv.plan = plan\n"
        "sys.argv = ['streamconv', 'plan', 'x']\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "Interrupted. To resume, run\n  streamconv plan x\n")
