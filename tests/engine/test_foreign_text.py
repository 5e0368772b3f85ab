"""Text from files and servers stays data: hostile names and values in every input, and every output that shows them."""

import html.parser
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from streamconv.output.journal import JOURNAL_NAME
from tests.file_server import FileServer
from tests.hub_server import HubServer
from tests.support import Ran, Save, interrupt_after, run, tiny

MARK = "m4rk"
ATTACK = f"Looks ok!{MARK}\x1b[2J\x9b2J\x07\r\n\nLooks ok!{MARK}\u202e\u2066\u2028\u200b<script>{MARK}</script>"
NAME = ATTACK.replace("/", "") + "\udcff"  # bytes of a file's name that are not UTF-8
LONG = MARK * 2_000
SHOWN = f"{MARK}\\x1b[2J\\x9b2J\\x07\\r\\n\\nLooks ok!{MARK}\\u202e\\u2066\\u2028\\u200b<script>{MARK}<"

Attack = Callable[..., Ran]


@pytest.fixture
def attack(tmp_path: Path) -> Iterator[Attack]:
    """Return a function that runs a command with its log, and checks each line. At least one must show the mark."""

    shown: list[bool] = []

    def attack(*words: object) -> Ran:
        done = run(*words, "-vv", cwd=tmp_path)
        for line in (*done.stdout.split("\n"), *done.stderr.split("\n")):
            assert line.isprintable(), ascii(line)
            assert not re.match(rf"\s*(Looks ok!{MARK}|{MARK}|<script>)", line), ascii(line)
            assert len(line) <= 800, ascii(line[:500])
            shown.append(MARK in line)
        return done

    yield attack
    assert any(shown)


def poisoned(value: Any, text: str, kept: tuple[str, ...] = ()) -> Any:
    """Return JSON with ``text`` for each string in it, except for those of the keys ``kept``."""
    if isinstance(value, dict):
        return {key: each if key in kept else poisoned(each, text, kept) for key, each in value.items()}
    if isinstance(value, list):
        return [poisoned(each, text, kept) for each in value]
    return text if isinstance(value, str) else value


def poison(path: Path, text: str, *kept: str, **changed: Any) -> None:
    path.write_text(json.dumps({**poisoned(json.loads(path.read_bytes()), text, kept), **changed}))


@pytest.mark.parametrize("text", [ATTACK, LONG])
def test_text_in_configuration_and_labels_stays_data(tmp_path: Path, save: Save, attack: Attack, text: str) -> None:
    backbone, head = save(tiny(classes=5))
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps([f"{text} {i}" for i in range(5)]))
    attack("convert", backbone, "--head", head, "--labels", labels, "-o", "theirs")
    theirs = tmp_path / "theirs"
    (theirs / "streamconv.json").unlink()
    config = json.loads((theirs / "config.json").read_bytes())
    config |= {text: text, "transformers_version": text, "problem_type": text, "architectures": [text]}
    (theirs / "config.json").write_text(json.dumps(config))
    poison(theirs / "preprocessor_config.json", text)
    for words in (["plan", "theirs"], ["plan", "theirs", "--mapping"], ["convert", "theirs", "-o", "out"]):
        attack(*words)
    for key in ("layer_norm_eps", "num_attention_heads", "image_size", "id2label", "hidden_act", "model_type"):
        (theirs / "config.json").write_text(json.dumps({**config, key: text}))
        attack("plan", "theirs")
        attack("convert", "theirs", "-o", "out2", "--dry-run")
    (theirs / "config.json").write_text(json.dumps({"model_type": text, "x": {**config, "model_type": "dinov2"}}))
    (theirs / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": text, "do_resize": text}))
    assert attack("plan", "theirs").returncode == 0


@pytest.mark.parametrize("name", [NAME, MARK * 20])
def test_file_names_stay_data(tmp_path: Path, attack: Attack, save: Save, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / f"{name}.pth").write_bytes(b"")
    attack("plan", "folder")
    attack("convert", "folder", "-o", "out")
    attack("convert", f"folder/{name}.pth", "-o", "out")
    (folder / f"{name}.pth").write_text(ATTACK)
    attack("plan", "folder")
    (folder / f"{name}2.pth").write_bytes(b"x")
    attack("plan", "folder")
    attack("plan", f"{name}.pth")
    attack("convert", name, "-o", "out")
    attack(name)
    attack("plan", "x", f"--{name}")
    source, _ = save(tiny())
    source.rename(tmp_path / f"{name}.pth")
    assert attack("convert", f"{name}.pth", "-o", name).returncode == 0
    assert attack("convert", f"{name}.pth", "-o", name).returncode == 0
    attack("verify", name)
    attack("revert", name, "-o", f"{name}/{name}.pth")
    attack("revert", name, "-o", f"{name}/{name}.pth")
    attack("push", name, "--dry-run")


@pytest.mark.parametrize("text", [ATTACK, LONG])
def test_text_in_a_manifest_stays_data(tmp_path: Path, save: Save, hub: HubServer, attack: Attack, text: str) -> None:
    source, _ = save(tiny())
    attack("convert", source, "-o", "out")
    folder = tmp_path / "out"
    manifest = json.loads((folder / "streamconv.json").read_bytes())
    name = text.replace("/", "")

    def write(**changed: Any) -> None:
        value = poisoned({**manifest, "verification": None}, text, ("files", "architecture", "plan"))
        (folder / "streamconv.json").write_text(json.dumps({**value, **changed}))

    write()
    attack("verify", "out")
    attack("verify", "out", "--report", "report.html")
    require_plain_page(tmp_path / "report.html")
    attack("push", "out", "ada/it")
    attack("push", "out", "ada/it", "--unverified")
    card = hub.files("ada/it")["README.md"].decode()
    assert all(line.isprintable() for line in card.split("\n"))
    attack("revert", "out", "-o", "reverted.pth")
    attack("convert", source, "-o", "out")
    attack("convert", source, "-o", "out", "--dry-run")
    written = {"size": 1, "sha256": text}
    write(files={**manifest["files"], "model-00001-of-00002.safetensors": written})
    attack("verify", "out")
    attack("verify", "out", "--report", "report.html")
    require_plain_page(tmp_path / "report.html")
    attack("push", "out", "ada/other", "--unverified")
    attack("push", "out", "ada/other", "--unverified", "--dry-run")
    attack("convert", source, "-o", "out")
    attack("revert", "out", "-o", "again.pth")
    wrong = [{"files": {name: written}}, {"edited": {name: written}}, {"format_version": text}, {"cast": text}]
    for changed in wrong:
        write(**changed)
        attack("verify", "out")
    (folder / "streamconv.json").write_text(f"{text}{{")
    attack("verify", "out")


@pytest.mark.usefixtures("frequent_journal_entries")
def test_text_in_a_journal_and_a_lock_stays_data(tmp_path: Path, save: Save, attack: Attack) -> None:
    source, _ = save(tiny())
    interrupt_after(source, tmp_path / "out", 0.9)
    journal = tmp_path / "out" / JOURNAL_NAME
    entries = [poisoned(json.loads(line), ATTACK, ("file",)) for line in journal.read_bytes().splitlines()]
    for each in ("".join(f"{json.dumps(each)}\n" for each in entries), json.dumps({"format_version": ATTACK}), ATTACK):
        journal.write_text(f"{each}\n")
        attack("convert", source, "-o", "out", "--dry-run")
    lock = {"pid": 1, "host": ATTACK, "since": ATTACK, "system": ATTACK, "start": ATTACK}
    journal.with_name(f"{journal.name}.lock").write_text(json.dumps(lock))
    done = attack("convert", source, "-o", "out")
    assert (done.returncode, f"process 1 on Looks ok!{MARK}" in done.stderr) == (4, True)


@pytest.mark.parametrize("text", [ATTACK, LONG])
def test_text_of_a_server_stays_data(
    tmp_path: Path, save: Save, server: FileServer, attack: Attack, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    source, _ = save(tiny())
    shutil.copy(source, server.folder / "x.pth")
    header = re.sub(r"[\r\n]+", "\r\n\t", text).encode().decode("latin-1")
    url = f"{server.url}/x.pth"
    bodies = (text, json.dumps({"error": text}), f"<message>{text}</message>", f"<html><title>{text}</title>")
    for status, body in [*((403, body) for body in bodies), (401, ""), (404, ""), (416, "")]:
        for headers in ({"X-Error-Message": header}, {"X-Error-Code": header}, {}):
            server.faults.statuses, server.faults.refusal = [status] * 10, (body.encode(), headers)
            attack("plan", url)
    server.faults.statuses = []
    server.faults.redirects = {"/x.pth": f"https://127.0.0.1:1/{header}"}
    attack("plan", url)
    server.faults.redirects = {}
    server.faults.headers = {"ETag": f'"{header}"', "Content-Type": header, "Last-Modified": header}
    server.faults.etag = server.faults.last_modified = False
    attack("plan", url)
    attack("convert", url, "-o", "out")
    server.faults.headers = {"ETag": f'"{header}2"'}
    attack("convert", url, "-o", "out")
    (server.folder / "page.pth").write_text(f"<html><title>{text}</title><p>{text}")
    assert attack("plan", f"{server.url}/page.pth").returncode == 3
    assert attack("plan", f"{server.url}/%1b%5b2J%e2%80%ae{MARK}.pth").returncode == 2


@pytest.mark.parametrize("text", [ATTACK, LONG])
def test_text_of_the_hub_stays_data(tmp_path: Path, save: Save, hub: HubServer, attack: Attack, text: str) -> None:
    source, _ = save(tiny())
    attack("convert", source, "-o", "out")
    header = re.sub(r"[\r\n]+", "\r\n\t", text).encode().decode("latin-1")
    for pattern in ("GET /api/whoami", "POST /api/repos/create", "POST /api/models/.*/commit", "GET /api/models/"):
        hub.fail(pattern, status=400, body={"error": text}, headers={"X-Error-Message": header})
        assert attack("push", "out", "ada/it", "--unverified").returncode != 0
        hub.faults.clear()


class _Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)
        assert all(MARK not in name for name, _ in attrs)


def require_plain_page(path: Path) -> None:
    page = path.read_text()
    tags = _Tags()
    tags.feed(page)
    assert not tags.found & {"script", "a href", "iframe", "object"}
    assert all(line.isprintable() or not line.strip() for line in page.replace("\t", " ").split("\n"))
