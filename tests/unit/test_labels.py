"""Class labels from a file or from the Hub's cache."""

import json
from pathlib import Path

import pytest

from streamconv import UsageError
from streamconv.source.labels import HUB_DATASET, read_labels
from tests.support import run_python


def test_labels_are_read_in_class_order(tmp_path: Path) -> None:
    labels = [f"label {i}" for i in range(12)]
    (tmp_path / "a.json").write_text(json.dumps({str(i): labels[i] for i in reversed(range(12))}))
    (tmp_path / "b.json").write_text(json.dumps(labels))
    (tmp_path / "c.txt").write_text("\n".join(labels))
    for name in ("a.json", "b.json", "c.txt"):
        assert read_labels(tmp_path / name) == labels


@pytest.mark.parametrize("text", ["{", '{"1": "a"}', "[1]", "7", '{"0": 1}'])
def test_invalid_label_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UsageError, match=r"x\.json"):
        read_labels(tmp_path / "x.json")
    with pytest.raises(UsageError, match=r"cannot be read: .*missing\.json: there is no such file\.$"):
        read_labels(tmp_path / "missing.json")


def test_torchvision_labels_are_read_without_importing_torchvision() -> None:
    code = (
        "import sys, streamconv.source.labels as l; l.imagenet_labels(); "
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    assert run_python(code) == "False False\n"


def test_cached_hub_labels_take_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0" * 40
    folder = tmp_path / f"datasets--{HUB_DATASET.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "snapshots" / commit / "imagenet-1k-id2label.json").write_text('{"0": "tench, Tinca tinca"}')
    code = "import streamconv.source.labels as l; print(l.imagenet_labels())"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert run_python(code) == f"(['tench, Tinca tinca'], '{HUB_DATASET} on the Hub')\n"
