"""The command line's own behaviour: help, --quiet, --verbose, --json, --dry-run, completion, questions."""

import json
import logging
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

import streamconv
from streamconv import SourceMissingError
from streamconv.errors import HubError
from tests import api
from tests.checkpoints import make_states
from tests.file_server import FileServer
from tests.hub_server import HubServer
from tests.support import ROOT, Ran, Save, read_terminal, run, run_process, run_python, tiny

COMMANDS = ["run", "convert", "verify", "push", "plan", "finish", "revert", "models", "synth", "completion"]


def document(done: Ran) -> dict[str, Any]:
    """Return the one JSON document on stdout."""
    value = json.loads(done.stdout)
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize("columns", [80, 200])
def test_help_shows_options_in_groups_within_the_terminal(tmp_path: Path, columns: int) -> None:
    lines = run_process("run", "-h", cwd=tmp_path, COLUMNS=str(columns)).stdout.splitlines()
    groups = [line for line in lines if re.fullmatch(r"\w+:", line)]
    assert groups == ["Source:", "Output:", "Verification:", "Hub:", "General:"]
    assert lines.index("Hub:") < next(i for i, line in enumerate(lines) if "--push-to-hub [REPO]" in line)
    assert "[default: 5GB]" in re.sub(r"\s+", " ", "\n".join(lines))
    assert "[default: the published name]" in re.sub(r"\s+", " ", "\n".join(lines))
    assert not re.search(r"--push_to_hub|--pytorch_dump", "\n".join(lines))
    select = next(line for line in lines if "--select PREFIX" in line)
    assert select.endswith("teacher.backbone.") == (columns == 200)
    assert max(map(len, lines)) <= columns


def test_every_command_has_the_general_options(tmp_path: Path) -> None:
    for name in COMMANDS:
        done = run(name, "--help", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == run(name, "-h", cwd=tmp_path).stdout
        options = {line.strip().partition("  ")[0] for line in done.stdout.splitlines()}
        assert {"-q, --quiet", "-v, --verbose", "-h, --help"} <= options


def test_help_of_the_program_lists_commands_in_order_and_exit_codes(tmp_path: Path) -> None:
    done = run("-h", cwd=tmp_path, COLUMNS="80")
    listed = re.findall(r"^  ([a-z]+)  +\w", done.stdout, re.MULTILINE)
    assert listed == COMMANDS
    assert re.findall(r"^ +(\d+)  ", done.stdout, re.MULTILINE) == ["0", "1", "2", "3", "4", "70", "130"]
    assert "..." not in done.stdout.partition("Commands:")[2]
    bare = run(cwd=tmp_path, COLUMNS="80")
    assert (bare.returncode, bare.stdout, bare.stderr) == (2, "", done.stdout)
    assert run("--version", cwd=tmp_path).stdout == f"streamconv {streamconv.__version__}\n"


def test_options_reach_the_job_under_all_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []

    def fake(*given: Any, **options: Any) -> None:
        seen.append(given)
        raise SourceMissingError("enough")

    monkeypatch.setattr(streamconv, "run", fake)
    for words, repository in (
        ("x.pth --push-to-hub", None),
        ("x.pth --push_to_hub --json", None),
        ("x.pth --push-to-hub me/it -q", "me/it"),
        ("--push-to-hub=it x.pth", "it"),
        ("--model_name x.pth --push_to_hub it --pytorch_dump_folder_path out", "it"),
    ):
        assert run("run", *words.split(), cwd=tmp_path).returncode == 3
        name, output, _, _, push = seen.pop()
        assert (name, push.destination.repo) == ("x.pth", repository)
        assert output == ("out" if "pytorch" in words else None)
    words = (
        "x.pth -o out --head h.pth --head-select b. --select a. --num-heads 3 --stream --labels l.txt --force "
        "--max-shard-size 1MB --dtype float16 --device cpu --image i.png --reference hub --no-parity --report r.html "
        "--thorough --push-to-hub me/it --private --revision dev --create-pr --push-unverified"
    )
    run("run", *words.split(), cwd=tmp_path)
    assert seen.pop() == (
        "x.pth",
        "out",
        streamconv.ConversionOptions("h.pth", "a.", 3, True, "b.", "l.txt", "1MB", "float16", True),
        streamconv.VerificationOptions("cpu", "i.png", "hub", False, "r.html", True),
        streamconv.PushOptions(streamconv.Destination("me/it", True, "dev", True), True),
    )
    run("run", "x.pth", "--no-verify", cwd=tmp_path)
    assert seen.pop() == ("x.pth", None, streamconv.ConversionOptions(), None, None)
    run("run", "x.pth", cwd=tmp_path)
    assert seen.pop()[3] == streamconv.VerificationOptions()


def test_quiet_prints_errors_and_differences_only(tmp_path: Path, save: Save) -> None:
    source, _ = save(tiny())
    done = run("run", source, "-o", "out", "--no-verify", "-q", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for words in (("convert", source, "-o", "out"), ("verify", "out"), ("plan", source), ("models",)):
        done = run(*words, "--quiet", cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = run("convert", source, "-o", "out", "--json", "-q", cwd=tmp_path)
    assert document(done)["was_finished"]
    assert done.stderr == ""
    (tmp_path / "out" / "config.json").unlink()
    done = run("verify", "out", "-q", cwd=tmp_path)
    assert done.returncode == 1
    assert "config.json" in done.stdout
    done = run("plan", "none.pth", "-q", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "error: none.pth: there is no such file.\n")


def test_verbose_logs_what_the_library_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(*given: Any, **named: Any) -> None:
        logging.getLogger("streamconv.x").info("a step")
        logging.getLogger("streamconv.x").debug("a detail")
        raise SourceMissingError("enough")

    monkeypatch.setattr(streamconv, "plan", fake)
    for words, shown in (((), ""), (("-v",), "a step"), (("-vv",), "a detail"), ((), "")):
        stderr = run("plan", "x.pth", *words, cwd=tmp_path).stderr
        assert stderr.endswith("error: enough\n")
        assert ("INFO streamconv.x: a step" in stderr) == (shown != "")
        assert ("DEBUG streamconv.x: a detail" in stderr) == (shown == "a detail")
    assert logging.getLogger("streamconv").level == logging.NOTSET


def test_errors_under_json_are_one_document(tmp_path: Path, save: Save) -> None:
    source, _ = save(tiny())
    make_more(tmp_path)
    for words, code, kind in (
        (("convert", "none.pth", "-o", "out"), 3, "SourceMissingError"),
        (("convert", "more.pth", "-o", "out"), 3, "MappingError"),
        (("convert", source, "-o", source), 4, "OutputError"),
        (("verify", "none"), 4, "OutputError"),
        (("convert", source, "--outptu", "out"), 2, "UsageError"),
        (("convert", source), 2, "UsageError"),
        (("convrt", source), 2, "UsageError"),
        (("plan", source, "--num-heads", "many"), 2, "UsageError"),
    ):
        done = run(*words, "--json", cwd=tmp_path)
        error = document(done)["error"]
        assert (done.returncode, error["exit_code"], error["type"]) == (code, code, kind), words
        assert done.stderr == f"error: {error['message']}\n"
        assert ("problems" in error) == (kind == "MappingError")
        assert document(done).keys() == {"error"}
        assert run(*words, cwd=tmp_path).stdout == ""
    assert document(run("convert", "more.pth", "-o", "out", "--json", cwd=tmp_path))["error"]["problems"] == [
        "more [1]"
    ]


def make_more(folder: Path) -> None:
    torch.save({**make_states(tiny())[0], "more": torch.zeros(1)}, folder / "more.pth")


def test_error_under_json_stands_beside_the_results_so_far(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = save(tiny())
    real = streamconv.run

    def failing(*given: Any, **options: Any) -> None:
        real(*given, **options)
        raise HubError("the Hub is down")

    monkeypatch.setattr(streamconv, "run", failing)
    done = run("run", source, "-o", "out", "--no-verify", "--json", cwd=tmp_path)
    found = document(done)
    assert done.returncode == 4
    assert found["error"] == {"type": "HubError", "message": "the Hub is down", "exit_code": 4}
    assert (found["bytes"], found["verification"]) == (api.plan(source).size, None)
    done = run("run", source, "-o", "out", "--no-verify", cwd=tmp_path)
    assert "not verified" in done.stdout


def test_failed_verification_under_json_is_a_result(tmp_path: Path, save: Save) -> None:
    source, _ = save(tiny())
    api.convert(source, tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text("{}")
    done = run("verify", "out", "--json", cwd=tmp_path)
    assert done.returncode == 1
    assert document(done)["passed"] is False
    assert "error" not in document(done)


def test_interruption_under_json_is_one_document(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, streamconv, streamconv.__main__ as cli\n"
        "streamconv.plan = lambda *given, **named: os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.argv = ['streamconv', 'plan', 'x', '--json']\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130
    assert json.loads(done.stdout)["error"]["exit_code"] == 130
    assert done.stderr == "Interrupted. To resume, run\n  streamconv plan x --json\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("convert x.pth --outptu out", "error: No such option --outptu. Did you mean --output?\n"),
        ("run x.pth --push-to-hb", "error: No such option --push-to-hb. Did you mean --push-to-hub?\n"),
        ("convert x.pth --output out --overwrite", "error: No such option --overwrite. Did you mean --force?\n"),
        ("convert x.pth --output_dir out", "error: No such option --output-dir. Did you mean --output?\n"),
        ("convert x.pth --out out", "error: No such option --out. Did you mean --output?\n"),
        ("plan x.pth --torch_dtype=bf16", "error: No such option --torch-dtype. Did you mean --dtype?\n"),
        ("plan x.pth --overwrite", "error: No such option --overwrite. See streamconv plan --help.\n"),
        ("plan x.pth --xyzzy", "error: No such option --xyzzy. See streamconv plan --help.\n"),
        ("plan", "error: Missing argument 'SOURCE'. See streamconv plan --help.\n"),
        (
            "completion",
            "error: Missing argument 'bash|zsh|fish'. Choose from: bash, zsh, fish. "
            "See streamconv completion --help.\n",
        ),
        ("convert x.pth", "error: Missing option '-o' / '--output'. See streamconv convert --help.\n"),
        ("plan x.pth y.pth", "error: Got unexpected extra argument (y.pth). See streamconv plan --help.\n"),
        (
            "plan x.pth --dtype float8",
            "error: Cannot cast to 'float8'. Choose float32, float16 or bfloat16.\n",
        ),
        (
            "plan x.pth https://me:word@host/y.pth?signature=word",
            "error: Got unexpected extra argument (https://host/y.pth). See streamconv plan --help.\n",
        ),
        (
            "run --push-to-hub https://me:word@host/y.pth?signature=word",
            "error: --push-to-hub took https://host/y.pth as the repository's name, but it is a source. Put the source "
            "first, `streamconv run https://host/y.pth --push-to-hub`, or name a repository as USER/NAME.\n",
        ),
    ],
)
def test_wrong_usage_is_one_message_with_the_fix(tmp_path: Path, words: str, message: str) -> None:
    done = run(*words.split(), cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def complete(folder: Path, *words: str) -> list[str]:
    """Return what bash is offered for the last word."""
    environment = {"COMP_WORDS": " ".join(["streamconv", *words]), "COMP_CWORD": str(len(words))}
    done = run_process(cwd=folder, _STREAMCONV_COMPLETE="bash_complete", **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_shells_complete_commands_options_models_and_files(tmp_path: Path) -> None:
    assert complete(tmp_path, "co") == ["plain,convert", "plain,completion"]
    assert complete(tmp_path, "plan", "dinov2_vitb14_r") == [
        "file,dinov2_vitb14_r", "plain,dinov2_vitb14_reg", "plain,dinov2_vitb14_reg_1layer",
    ]  # fmt: skip
    assert complete(tmp_path, "synth", "dinov2_vitg14_reg_") == ["plain,dinov2_vitg14_reg_1layer"]
    assert complete(tmp_path, "synth", "dinov2-b") == ["plain,dinov2-base", "plain,dinov2-base-imagenet1k-1-layer"]
    assert complete(tmp_path, "plan", "x.pth", "--dtype", "f") == ["plain,float32", "plain,float16"]
    assert complete(tmp_path, "run", "x.pth", "--device", "c") == ["plain,cpu", "plain,cuda", "plain,cuda:0"]
    assert complete(tmp_path, "convert", "x.pth", "-o", "o") == ["dir,o"]
    assert complete(tmp_path, "run", "x.pth", "--head", "o") == ["file,o"]
    assert complete(tmp_path, "run", "x.pth", "--pus") == [
        "plain,--push-to-hub", "plain,--push-unverified",
    ]  # fmt: skip


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_offers_models_for_a_source(tmp_path: Path) -> None:
    program = tmp_path / "streamconv"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m streamconv "$@"\n')
    program.chmod(0o755)
    script = run("completion", "bash", cwd=tmp_path).stdout + (
        "COMP_WORDS=(streamconv plan dinov2_vitb14_r) COMP_CWORD=2\n"
        "_streamconv_completion ./streamconv 2>&-\n"  # outside a completion, compopt complains
        'echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash"],
        input=script,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.split() == ["dinov2_vitb14_reg", "dinov2_vitb14_reg_1layer"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_the_script_of_a_shell(tmp_path: Path, shell: str) -> None:
    done = run("completion", shell, cwd=tmp_path)
    assert done.returncode == 0
    assert f"_STREAMCONV_COMPLETE={shell}_complete" in done.stdout
    if shell == "bash":
        assert subprocess.run(["bash", "-n"], input=done.stdout, text=True).returncode == 0


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_dry_run_shows_what_would_be_written_and_writes_nothing(
    tmp_path: Path, save: Save, read_counts: list[int]
) -> None:
    source, _ = save(tiny(layers=24, hidden=256))
    before = files_in(tmp_path)
    read_counts.clear()
    found = document(run("run", source, "-o", "a/out", "--dry-run", "--json", cwd=tmp_path))
    assert sum(read_counts) < source.stat().st_size / 10
    assert files_in(tmp_path) == before
    assert found["read"] == [{"file": str(source), "bytes": source.stat().st_size}]
    assert (found["download"], found["push"], found["verify"]["device"]) == ([], None, "auto")
    text = run("convert", source, "-o", "a/out", "--dry-run", cwd=tmp_path).stdout
    assert "dry run, nothing was written" in text
    assert "verify" not in text
    assert files_in(tmp_path) == before
    api.convert(source, tmp_path / "a" / "out")
    written = {path.name: path.stat().st_size for path in (tmp_path / "a" / "out").iterdir()}
    assert {each["file"]: each["bytes"] for each in found["write"]} == {
        name: size for name, size in written.items() if name != "streamconv.json"
    }
    before = files_in(tmp_path)
    finished = document(run("convert", source, "-o", "a/out", "--dry-run", "--json", cwd=tmp_path))
    assert (finished["write"], finished["replace"]) == ([], [])
    forced = document(run("convert", source, "-o", "a/out", "--dry-run", "--force", "--json", cwd=tmp_path))
    assert forced["replace"] == sorted(written.keys() - {"streamconv.json"})
    assert files_in(tmp_path) == before


def test_dry_run_is_refused_as_the_job_would_be(tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = save(tiny())
    other, _ = save(tiny(layers=4), "other")
    api.convert(other, tmp_path / "taken")
    (tmp_path / "file").touch()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text("{}")
    before = files_in(tmp_path)
    for code, words in (
        (3, ("convert", "none.pth", "-o", "out")),
        (2, ("run", source)),
        (4, ("convert", source, "-o", "file")),
        (4, ("convert", source, "-o", "file/out")),
        (4, ("convert", source, "-o", "x" * 300)),
        (4, ("convert", source, "-o", "taken")),
        (0, ("convert", source, "-o", "taken", "--force")),
        (4, ("convert", source, "-o", "foreign", "--force")),
        (2, ("run", source, "-o", "out", "--image", "none.png")),
        (2, ("run", "dinov2_vits14", "--synthetic")),
    ):
        done = run(*words, "--dry-run", "--json", cwd=tmp_path)
        assert done.returncode == code, (words, done.stderr)
        assert ("error" in document(done)) == (code != 0)
    assert files_in(tmp_path) == before
    monkeypatch.setattr("os.statvfs", lambda path: SimpleNamespace(f_blocks=1000, f_bavail=1000, f_frsize=1))
    done = run("convert", source, "-o", "out", "--dry-run", cwd=tmp_path)
    assert (done.returncode, "has 1,000 free" in done.stderr) == (4, True)
    monkeypatch.undo()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    done = run("convert", source, "-o", "out", "--dry-run", cwd=tmp_path)
    assert (done.returncode, "Permission denied" in done.stderr) == (4, True)


def test_dry_run_downloads_nothing(server: FileServer, tmp_path: Path, save: Save) -> None:
    source, _ = save(tiny(layers=24, hidden=256))
    source.rename(server.folder / "x.pth")
    size = (server.folder / "x.pth").stat().st_size
    before = files_in(tmp_path)
    found = document(run("convert", f"{server.url}/x.pth", "-o", "out", "--dry-run", "--json", cwd=tmp_path))
    (download,) = found["download"]
    assert download["bytes"] == size
    assert Path(download["file"]).parents[1] == tmp_path / "torch" / "hub" / "checkpoints" / "streamconv"
    assert server.sent < size / 4
    assert files_in(tmp_path) == before
    streamed = run("convert", f"{server.url}/x.pth", "-o", "out", "--stream", "--dry-run", "--json", cwd=tmp_path)
    assert document(streamed)["download"] == []


def test_dry_run_reads_a_copy_in_the_cache_as_the_job_does(server: FileServer, tmp_path: Path, save: Save) -> None:
    """Only the copy's times tell one safetensors file from another, so a conversion records those."""
    source, _ = save(tiny())
    safetensors.torch.save_file(torch.load(source), server.folder / "x.safetensors")
    words = ("convert", f"{server.url}/x.safetensors", "-o", "out", "--json")
    run(*words, cwd=tmp_path)
    before = files_in(tmp_path)
    found = document(run(*words, "--dry-run", cwd=tmp_path))
    assert (found["download"], found["write"]) == ([], [])
    read = Path(found["read"][0]["file"])
    assert (read.name, read.parents[1]) == ("x.safetensors", tmp_path / "torch/hub/checkpoints/streamconv")
    assert document(run(*words, cwd=tmp_path))["was_finished"]
    assert files_in(tmp_path) == before


def test_dry_run_of_a_push_is_refused_as_the_job_would_be(
    server: FileServer, hub: HubServer, tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    configured: list[None] = []
    monkeypatch.setattr("streamconv.cli.commands.run.configure_process", lambda: configured.append(None))
    source, _ = save(tiny())
    source.rename(server.folder / "x.pth")
    api.convert(server.folder / "x.pth", tmp_path / "taken")
    words = ("run", f"{server.url}/x.pth", "--stream", "--push-to-hub", "it", "--no-verify", "--dry-run")
    unverified = run(*words, "-o", "out", cwd=tmp_path)
    assert (unverified.returncode, "Unverified models are not pushed" in unverified.stderr) == (2, True)
    finished = run(*words, "-o", "taken", "--push-unverified", cwd=tmp_path)
    assert (finished.returncode, "holds the finished model" in finished.stderr) == (2, True)
    done = run(*words, "-o", "out", "--push-unverified", cwd=tmp_path)
    assert (done.returncode, f"push      to {hub.url}/ada/it, a new repository: public" in done.stdout) == (0, True)
    assert hub.repos == {}
    assert len(configured) == 3  # requests to the Hub have a timeout, and print nothing
    words = (*words[:-2], "--dry-run", "-o", "out")
    assert ", if verification passes\n" in run(*words, cwd=tmp_path, COLUMNS="200").stdout
    assert "if verification" not in run(*words, "--push-unverified", cwd=tmp_path, COLUMNS="200").stdout


def type_into_run(folder: Path, answer: bytes, *words: str) -> tuple[int, str]:
    """Run `streamconv run` in a terminal where a user types ``answer``; there is no network."""
    main, terminal = pty.openpty()
    environment = {**os.environ, "TORCH_HOME": str(folder), "https_proxy": "http://127.0.0.1:9", "COLUMNS": "200"}
    environment["NO_COLOR"] = "1"
    process = subprocess.Popen(
        [sys.executable, "-m", "streamconv", "run", *words],
        stdin=terminal, stderr=terminal, stdout=subprocess.DEVNULL, cwd=folder, env=environment,
    )  # fmt: skip
    os.close(terminal)
    os.write(main, answer)
    seen = read_terminal(main)
    return process.wait(), seen


def test_bare_run_asks_before_it_downloads(tmp_path: Path) -> None:
    question = "Download dinov2_vitg14 (4.5 GB)"
    code, seen = type_into_run(tmp_path, b"n\n")
    assert (code, question in seen, "Nothing was downloaded" in seen) == (2, True, True)
    code, seen = type_into_run(tmp_path, b"y\n")
    assert (code, question in seen, "put it at" in seen) == (3, True, True)
    code, seen = type_into_run(tmp_path, b"", "--yes")
    assert (code, question in seen) == (3, False)


def test_bare_run_without_a_terminal_announces_the_download(tmp_path: Path) -> None:
    nowhere = {"https_proxy": "http://127.0.0.1:9", "TORCH_HOME": str(tmp_path)}
    done = run("run", cwd=tmp_path, **nowhere)
    assert done.returncode == 3
    assert done.stderr.startswith("No SOURCE was given: downloading dinov2_vitg14 (4.5 GB) from https://")
    assert "No SOURCE" not in run("run", "-q", cwd=tmp_path, **nowhere).stderr
    cached = tmp_path / "hub" / "checkpoints" / "dinov2_vitg14_pretrain.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"x")
    done = run("run", cwd=tmp_path, **nowhere)
    assert (done.returncode, "No SOURCE" in done.stderr) == (3, False)


def test_library_imports_nothing_large_that_few_need() -> None:
    """Each of these takes a hundred kilobytes or more of a process that takes 31 MB; click needs some of them."""
    found = run_python("import sys, streamconv; print(*sys.modules)").split()
    assert {"bz2", "datetime", "email", "lzma", "platform", "shutil", "streamconv.formats.npz"} & {*found} == set()


def test_file_names_and_contents_cannot_control_the_terminal(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "\x1b[2J\u202e.pth").touch()
    done = run("plan", "folder", cwd=tmp_path)
    assert (done.returncode, r"\x1b[2J\u202e.pth is empty" in done.stderr) == (3, True)
    assert all(line.isprintable() for line in done.stderr.splitlines())


def test_local_conversion_imports_only_what_it_needs(tmp_path: Path, save: Save) -> None:
    source, _ = save(tiny())
    code = (
        "import sys\nfrom streamconv.cli.commands import app\n"
        f"app(['convert', {str(source)!r}, '-o', {str(tmp_path / 'out')!r}], standalone_mode=False)\n"
        "print(*{name.partition('.')[0] for name in sys.modules}, *sys.modules)"
    )
    needless = {
        "torch", "numpy", "transformers", "accelerate", "torchvision", "PIL", "pydantic", "rich", "typer", "urllib3",
        "huggingface_hub", "requests", "httpx", "fsspec", "ml_dtypes", "jinja2", "tqdm", "asyncio", "email", "http",
        "http.client", "ssl", "socket", "subprocess", "tempfile", "importlib.metadata", "multiprocessing",
        "zipfile", "tarfile", "random", "argparse", "unittest", "pickle",
    }  # fmt: skip
    needless |= {  # readers of other files, and tables for messages
        "streamconv.cli.near_options", "streamconv.formats.foreign.binary", "streamconv.formats.foreign.text",
        "streamconv.formats.npz",
    }  # fmt: skip
    assert needless & set(run_python(code).splitlines()[-1].split()) == set()
