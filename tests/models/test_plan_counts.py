"""The run command resolves its arguments once, opens each index once and makes one plan."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import streamconv
from streamconv import ConversionOptions, VerificationOptions
from streamconv.files.address import Address
from streamconv.jobs import prepare
from streamconv.source import copies, download
from streamconv.source import open as source_open
from streamconv.source.cache import own_path
from tests.checkpoints import make_states
from tests.file_server import FileServer
from tests.support import tiny


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often arguments were resolved, the index at each location was read, and a plan was made."""
    counted: Counter[str] = Counter()

    def count(module: Any, name: str, label: Any) -> None:
        real = getattr(module, name)

        def counting(*args: Any, **options: Any) -> Any:
            counted[label(args[0])] += 1
            return real(*args, **options)

        monkeypatch.setattr(module, name, counting)

    count(prepare, "resolve_source", lambda source: "resolved")
    count(prepare, "make_plan", lambda tensors: "plans")
    for module in (source_open, download, copies):
        count(module, "open_checkpoint", lambda location: f"opened {Path(str(location)).parent.name}/{location.name}")
    return counted


def test_run_opens_each_index_once_and_makes_one_plan(tmp_path: Path, counts: Counter[str]) -> None:
    torch.save(make_states(tiny())[0], tmp_path / "x.pth")
    done = streamconv.run(tmp_path / "x.pth", tmp_path / "out", verification=VerificationOptions(device="cpu"))
    assert done.passed
    assert counts == {"resolved": 1, "plans": 1, f"opened {tmp_path.name}/x.pth": 1}


@pytest.mark.parametrize("stream", [False, True])
def test_run_from_an_address_opens_each_index_once(
    server: FileServer, tmp_path: Path, counts: Counter[str], stream: bool
) -> None:
    """The address and, unless it is streamed, the copy: when it is complete, and after it was renamed into place."""
    torch.save(make_states(tiny())[0], server.folder / "x.pth")
    options = ConversionOptions(stream=stream)
    done = streamconv.run(f"{server.url}/x.pth", tmp_path / "out", options, VerificationOptions(device="cpu"))
    assert done.passed
    assert counts.pop("resolved") == 1
    assert counts.pop("plans") == 1
    assert set(counts.values()) == {1}, counts
    assert len(counts) == (1 if stream else 3)


def test_a_file_in_torch_hubs_cache_is_opened_once(server: FileServer, tmp_path: Path, counts: Counter[str]) -> None:
    torch.save(make_states(tiny())[0], server.folder / "x.pth")
    streamconv.convert(f"{server.url}/x.pth", tmp_path / "first")  # which downloads it
    counts.clear()
    streamconv.convert(f"{server.url}/x.pth", tmp_path / "second", ConversionOptions(dtype="float16"))
    assert counts.pop("resolved") == 1
    assert counts.pop("plans") == 1
    source = Address(f"{server.url}/x.pth")
    assert set(counts) == {f"opened {source.url.split('/')[2]}/x.pth", f"opened {own_path(source).parent.name}/x.pth"}
    assert set(counts.values()) == {1}


def test_verify_makes_one_plan(tmp_path: Path, counts: Counter[str]) -> None:
    backbone, head = make_states(tiny(classes=5))
    torch.save(backbone, tmp_path / "x.pth")
    torch.save(head, tmp_path / "head.pth")
    options = ConversionOptions(head=tmp_path / "head.pth")
    streamconv.convert(tmp_path / "x.pth", tmp_path / "out", options)
    counts.clear()
    found = streamconv.verify(
        tmp_path / "out",
        tmp_path / "x.pth",
        VerificationOptions(device="cpu", parity=False),
        streamconv.SourceOptions(head=tmp_path / "head.pth"),
    )
    assert found.passed
    assert counts == {
        "resolved": 1,
        "plans": 1,
        f"opened {tmp_path.name}/x.pth": 1,
        f"opened {tmp_path.name}/head.pth": 1,
    }
    assert json.loads((tmp_path / "out" / "streamconv.json").read_text())["verification"]["passed"]
