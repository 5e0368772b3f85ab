"""The model card: what it claims, what it does not, and that what it shows runs."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from PIL import Image

import streamconv
from streamconv.families.registry import all_families
from streamconv.hub.card import is_ours, make_card
from streamconv.output.manifest import read_manifest
from tests.conftest import tiny

Save = Callable[..., tuple[Path, Path | None]]


def check(name: str, passed: bool | None, proves: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "passed": passed, "proves": proves, "problems": (), "numbers": {}, **more}


def manifest(**changed: Any) -> dict[str, Any]:
    """A verified ViT-S of Meta's own file."""
    return {
        "model": "dinov2_vits14",
        "architecture": "Dinov2Model",
        "source": {"backbone": {"file": "dinov2_vits14_pretrain.pth", "size": 88283115, "fingerprint": "f00d"}},
        "files": {"model.safetensors": {"size": 88249960, "sha256": "abcd"}},
        "is_crc_checked": True,
        "versions": {"streamconv": "0.1.0"},
        "verification": {
            "passed": True,
            "device": "cpu",
            "versions": {"torch": "2.9", "transformers": "5.0"},
            "checks": [
                check("bytes", True, "every byte is right"),
                check("parity", True, "both compute the same", numbers={"largest": 2.5e-7, "tolerance": 1e-3}),
            ],
        },
        **changed,
    }


def test_the_card_of_a_published_model_says_whose_it_is_and_what_was_proven() -> None:
    source = {
        "backbone": {**manifest()["source"]["backbone"], "address": "https://example.org/dinov2_vits14_pretrain.pth"}
    }
    text = make_card(manifest(source=source), "ada/dinov2-small")
    assert ModelCard(text).data.to_dict() == {
        "license": "apache-2.0",
        "base_model": "facebook/dinov2-small",
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["dinov2", "streamconv"],
    }
    for said in (
        "`dinov2_vits14_pretrain.pth`, `https://example.org/dinov2_vits14_pretrain.pth`", "88,283,115", "`f00d`",
        "streamconv 0.1.0", "`abcd`", "| parity | passed | both compute the same |",
        "Largest difference in any layer: 2.5e-07; allowed: 0.001.", "Run on cpu with torch 2.9, transformers 5.0.",
        "Every byte that was read matched its CRC-32",
    ):  # fmt: skip
        assert said in text
    assert "> **" not in text


@pytest.mark.parametrize(
    "changed",
    [
        {"source": {"backbone": {"file": "mine.pth"}}},
        {"model": None},
        {"model": "dinov2_vits14_1layer"},  # whose head's file is not there
        {"source": {"backbone": {"file": "dinov2_vits14_synthetic_seed0.pth"}}},
    ],
)
def test_of_other_files_neither_licence_nor_origin_is_claimed(changed: dict[str, Any]) -> None:
    """Shapes alone make a fine-tuned file "dinov2_vits14"."""
    text = make_card(manifest(**changed), "ada/it")
    data = ModelCard(text).data.to_dict()
    assert not data.keys() & {"license", "base_model"}
    assert "does not know its licence" in text


def test_what_must_be_known_is_said_first() -> None:
    def first(**changed: Any) -> str:
        return make_card(manifest(**changed), "ada/it").split("# it\n\n")[1].partition("-->\n\n")[2]

    failed = check("parity", False, "both compute the same", problems=["the first difference is in layer 3"])
    found = {"passed": False, "checks": [failed, check("preprocessing", None, "it was left out")]}
    assert first(verification=None).startswith("> **Not verified.**")
    assert first(verification=found).startswith("> **Verification failed. Do not use this model.**")
    assert "| parity | **FAILED** | both compute the same |" in first(verification=found)
    assert "- the first difference is in layer 3" in first(verification=found)
    assert "| preprocessing | not run | it was left out |" in first(verification=found)
    random = first(source={"backbone": {"file": "dinov2_vits14_synthetic_seed12.pth"}})
    assert random.startswith("> **Random weights.**")
    assert "has no CRC-32s" in first(is_crc_checked=False)
    assert "> **" not in first()


def test_names_and_problems_of_whichever_shape_stay_in_their_place() -> None:
    file = "a`b|c\n## mine\ud800<script>.pth"
    problem = "x | y\n# z <img> [a](b)"
    found = {"passed": False, "checks": [check("bytes", False, "p", problems=[problem])]}
    text = make_card(manifest(source={"backbone": {"file": file}}, verification=found), "ada/it")
    text.encode()
    assert "\n## mine" not in text
    assert "`a b c ## mine?<script>.pth`" in text
    assert r"x \| y \# z \<img\> \[a\](b)" in text
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# it", "## Usage", "## Provenance", "## Verification"
    ]  # fmt: skip


def test_a_generated_card_is_recognised_by_its_marker_alone() -> None:
    text = make_card(manifest(), "ada/it")
    (marker,) = (line for line in text.splitlines() if line.startswith("<!--"))
    assert is_ours(text)
    assert is_ours(f"# Other words\n\n{marker}\n")
    assert not is_ours(text.replace(f"{marker}\n", ""))  # a user deletes the line to keep the card
    assert not is_ours(f"A card that quotes `{marker}`.")


def test_every_architecture_has_its_task() -> None:
    for family in all_families():
        made = {family.layout(model.geometry).architecture for model in family.models}
        assert made == family.pipeline_tags.keys()


@pytest.mark.parametrize("classes", [None, 3])
def test_the_five_lines_run(tmp_path: Path, save: Save, classes: int | None) -> None:
    backbone, head = save(tiny(classes=classes))
    done = streamconv.convert(backbone, tmp_path / "out", head=head)
    text = make_card(read_manifest(done.output) or {}, "ada/it")
    (code,) = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    assert code.count("\n") == 4
    shutil.move(done.output, tmp_path / "ada" / "it")  # a folder of the repository's name is what transformers takes
    Image.new("RGB", (64, 48), "teal").save(tmp_path / "picture.jpg")
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() in (
        ["torch.Size([1, 257, 128])"] if classes is None else ["LABEL_0", "LABEL_1", "LABEL_2"]
    )
