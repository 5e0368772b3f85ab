"""The model card claims only what the manifest proves."""

import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from streamconv.errors import OutputError
from streamconv.families.base import RemoteFile
from streamconv.families.registry import all_families, find_model
from streamconv.hub.card import is_ours, kept_metadata, make_card
from streamconv.output.manifest import FORMAT_VERSION, Manifest, WrittenFile

PUBLISHED = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"


def check(name: str, passed: bool | None, proves: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "passed": passed, "proves": proves, "problems": (), "numbers": {}, **more}


def source(file: str, **more: Any) -> dict[str, dict[str, Any]]:
    return {"backbone": {"file": file, "size": 88283115, "fingerprint": "f00d", **more}}


def manifest(**changed: Any) -> Manifest:
    """Return the manifest of a verified ViT-S from Meta's own file."""
    value = {
        "format_version": FORMAT_VERSION,
        "plan": "cafe",
        "cast": None,
        "model": "dinov2_vits14",
        "architecture": "Dinov2Model",
        "source": source("dinov2_vits14_pretrain.pth", published=True, address=PUBLISHED),
        "files": {"model.safetensors": {"size": 88249960, "sha256": "abcd"}},
        "is_crc_checked": True,
        "versions": {"streamconv": "0.1.0"},
        "verification": {
            "passed": True,
            "device": "cpu",
            "reference": "builtin",
            "versions": {"torch": "2.9", "transformers": "5.0"},
            "checks": [
                check("bytes", True, "every byte is right"),
                check("parity", True, "both compute the same", numbers={"largest": 2.5e-7, "tolerance": 1e-3}),
            ],
        },
        **changed,
    }
    return Manifest.from_json(value, Path("streamconv.json"))


def test_card_of_a_published_model_names_origin_license_and_checks() -> None:
    found = source("dinov2_vits14_pretrain.pth", published=True, address=PUBLISHED, sha256="beef")
    text = make_card(manifest(source=found), "ada/dinov2-small")
    assert ModelCard(text).data.to_dict() == {
        "license": "apache-2.0",
        "base_model": "facebook/dinov2-small",
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["dinov2", "streamconv"],
    }
    for expected in (
        f"`dinov2_vits14_pretrain.pth`, `{PUBLISHED}`, sha256 `beef`", "88,283,115", "`f00d`",
        "dinov2_vits14, as its authors published it.",
        "streamconv 0.1.0", "`abcd`", "| parity | passed | both compute the same |",
        "Largest difference in any layer: 2.5e-07 (allowed: 0.001).", "Run on cpu with torch 2.9, transformers 5.0.",
        "Original model's code: streamconv's own.",
        "Every byte that was read matched its CRC-32",
    ):  # fmt: skip
        assert expected in text
    assert "> **" not in text


@pytest.mark.parametrize(
    "changed",
    [
        {"source": source("mine.pth")},
        {"source": source("dinov2_vits14_pretrain.pth")},  # a file of this name that is not the authors' own
        {"source": source("dinov2_vits14_pretrain.pth", found_in_cache=True)},
        {"source": source("dinov2_vits14_pretrain.pth", address=PUBLISHED)},
        {"source": source("dinov2_vits14_pretrain.pth", published=True)},  # 0.2.0 wrote so of a file that it found
        {"source": source("dinov2_vits14_pretrain.pth", published=True, sha256="beef")},
        {"source": source("dinov2_vits14_pretrain.pth", published=True, address=PUBLISHED.replace("https", "http"))},
        {"source": source("dinov2_vits14_pretrain.pth", published=True, address="https://example.org/x.pth")},
        {"source": source("mine.pth", published=True, address=PUBLISHED)},
        {"model": None},
        {"model": "dinov2_vits14_1layer"},  # without the head's file
        {"source": source("dinov2_vits14_synthetic_seed0.pth")},
    ],
)
def test_card_claims_no_license_or_origin_for_unknown_files(changed: dict[str, Any]) -> None:
    """By its shapes alone, a fine-tuned file is a "dinov2_vits14", too."""
    text = make_card(manifest(**changed), "ada/it")
    data = ModelCard(text).data.to_dict()
    assert not data.keys() & {"license", "base_model"}
    assert "does not know its licence" in text


def test_hash_in_a_published_name_is_named_as_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    known = find_model("dinov2_vits14")
    file = RemoteFile("dinov2_vits14-0123abcd.pth", PUBLISHED)
    monkeypatch.setattr("streamconv.hub.names.find_model", lambda name: (known[0], replace(known[1], backbone=file)))
    for digest, is_known in (("0123abcd" + "0" * 56, True), ("0123abce" + "0" * 56, False), ("", False)):
        text = make_card(manifest(source=source(file.filename, published=True, sha256=digest)), "ada/it")
        assert ("whose published name holds the first digits of its sha256" in text) == is_known
        assert "as its authors published it" not in text
        assert ("license: apache-2.0" in text) == is_known


OWN_LICENCE = {"license": "other", "license_name": "its-own", "license_link": "https://example.org/licence"}


@pytest.mark.parametrize("given", [None, {"license": "its-own"}])
def test_licence_that_the_hub_does_not_know_has_its_name_and_link(
    given: dict[str, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, model = find_model("dinov2_vits14")
    model = replace(model, licence="its-own", licence_link="https://example.org/licence")
    monkeypatch.setattr("streamconv.hub.names.find_model", lambda name: (family, model))
    found = source("dinov2_vits14_pretrain.pth", published=True, address=PUBLISHED, sha256="beef")
    card = make_card(manifest(source=found), "ada/it", given)
    data = ModelCard(card).data.to_dict()
    assert data.items() >= OWN_LICENCE.items()
    assert kept_metadata(card) == ({}, [])  # the authors' licence is not the next model's


def test_name_and_link_of_a_licence_that_was_added_are_kept() -> None:
    card = make_card(manifest(source=source("mine.pth")), "ada/it", OWN_LICENCE, ["x"])
    assert kept_metadata(card) == (OWN_LICENCE, ["x"])
    assert "does not know its licence" not in card


def test_card_starts_with_warnings() -> None:
    def first(**changed: Any) -> str:
        return make_card(manifest(**changed), "ada/it").split("# it\n\n")[1].partition("-->\n\n")[2]

    failed = check("parity", False, "both compute the same", problems=["the first difference is in layer 3"])
    found = {"passed": False, "checks": [failed, check("preprocessing", None, "it was left out")]}
    assert first(verification=None).startswith("> **Not verified.**")
    assert first(verification=found).startswith("> **Verification failed. Do not use this model.**")
    assert "| parity | **FAILED** | both compute the same |" in first(verification=found)
    assert "- the first difference is in layer 3" in first(verification=found)
    assert "| preprocessing | not run | it was left out |" in first(verification=found)
    assert first(source=source("x.pth", synthetic=True)).startswith("> **Random weights.**")
    assert "the fingerprint does not cover its weights" in first(is_crc_checked=False)
    assert "the fingerprint does not cover" not in first()
    assert "> **" not in first()


def test_card_states_the_cost_of_a_cast_and_the_difference_by_design() -> None:
    numbers = {
        "size": 224, "largest": 2e-15, "tolerance": 1e-13, "float32": {"largest": 1e-6},
        "as_published": {"cls": 0.0125, "patches": "inf"},
        "known_difference": {"changes": "the original's periods change it"},
    }  # fmt: skip
    found = {
        "passed": True,
        "conclusion": {"cast_cost": "Cost of the cast: 0.06."},
        "date": "2026-11-26T02:20:03+00:00",
        "device": "cpu",
        "checks": [check("parity", True, "both compute the same", numbers=numbers)],
    }
    text = make_card(manifest(verification=found), "ada/it")
    for expected in (
        "\nCost of the cast: 0.06.\n", "\nBy design, not an error: ",
        "the original's periods change it by up to 0.0125 (cls), inf (patches).",
        "in any layer at 224x224, in a second pass in float64: 2e-15 (allowed: 1e-13).", ", 2026-11-26 02:20:03 UTC.",
    ):  # fmt: skip
        assert expected in text
    mine = make_card(manifest(model=None, shaped_like="dinov2_vits14", source=source("mine.pth")), "ada/it")
    assert ", a model shaped like dinov2_vits14." in mine
    assert "authors" not in mine  # it may be a folder that transformers wrote
    failed = {"passed": False, "checks": [check("bytes", False, "all bytes are equal", finding="1 of 2 differs")]}
    assert "| bytes | **FAILED** | 1 of 2 differs |" in make_card(manifest(verification=failed), "ada/it")


@pytest.mark.parametrize(
    "wrong",
    [
        {"checks": 5}, {"checks": ["x"]}, {"versions": ["x"]}, {"conclusion": 1.5},
        {"checks": [check("x", True, "y", numbers=5)]}, {"checks": [check("x", True, "y", numbers={"largest": "y"})]},
        {"checks": [check("x", True, "y", numbers={"largest": 10**400, "tolerance": 1})]},
        {"checks": [check("x", True, "y", numbers={"as_published": {"cls": {}}})]},
        {"checks": [check("x", True, "y", numbers={"as_published": {"cls": 1}, "known_difference": "x"})]},
    ],
)  # fmt: skip
def test_malformed_verdict_is_reported_as_damage(wrong: dict[str, Any]) -> None:
    with pytest.raises(OutputError, match=r"streamconv\.json is damaged: its field verification is not the record"):
        make_card(manifest(verification={"passed": True, "device": "cpu", **wrong}), "ada/x")


def test_card_escapes_names_and_problems() -> None:
    file = "a`b|c\n## mine\ud800<script>.pth"
    problem = "x | y\n# z <img> [a](b)"
    found = {"passed": False, "checks": [check("bytes", False, "p", problems=[problem])]}
    text = make_card(manifest(source=source(file), verification=found), "ada/it")
    text.encode()
    assert "\n## mine" not in text
    assert r"`a b c\n## mine\ud800<script>.pth`" in text
    assert r"x \| y\\n\# z \<img\> \[a\](b)" in text
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# it", "## Usage", "## Provenance", "## Verification"
    ]  # fmt: skip


HOSTILE = (
    "\x1b[2J\u202e\n\n---\nlicense: mit\n---\n\n# Looks ok!\n```\n~~~\n| a | b |\n|---|---|\n- x\n> y\n1. z\n=====\n"
    "<script>alert(1)</script><img src=x><!-- [a](b) ![a](b) [a]: b https:&#47;&#47;evil.example www.evil.example "
    "ada@evil.example @ada #1 $$x$$ ~~x~~ __x__ *x* `x` {{x}} \\"
)
LINES = (
    "# Looks ok!", "- Looks ok!", "+ x", "1. x", "2) x", "=====", "---", "> x", "```", "    x", "| x |", "`",
    "www.evil.example", "https://evil.example",
)  # fmt: skip


def poisoned(value: Any, text: str) -> Any:
    """Return ``value`` with ``text`` for each string in it, and for each key of numbers."""
    if isinstance(value, dict):
        return {(text if key == "cls" else key): poisoned(each, text) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [poisoned(each, text) for each in value]
    return text if isinstance(value, str) else value


@pytest.mark.parametrize("text", [HOSTILE, *LINES, "x" * 100_000])
@pytest.mark.parametrize("is_finished", [True, False])
def test_no_text_in_a_manifest_becomes_markup_or_metadata(text: str, is_finished: bool) -> None:
    numbers = {
        "size": "x",
        "largest": 2e-15,
        "tolerance": 1e-13,
        "float32": {"largest": 1e-6},
        "as_published": {"cls": 1},
        "known_difference": {"changes": "x"},
    }
    found = {
        "passed": is_finished,
        "conclusion": {"cast_cost": "x"},
        "date": "x",
        "device": "x",
        "reference": "x",
        "versions": {"torch": "x"},
        "checks": [
            check("parity", is_finished, "x", numbers=numbers, finding="x", not_checked="x", problems=["x"] * 2)
        ],
    }
    name = text.replace("/", "")
    written = WrittenFile(1, text)
    value = {
        **poisoned({
            "plan": "x", "cast": {"from": "x", "to": "x"}, "model": "x", "notes": ["x", "x"], "skipped": ["x", "x"],
            "source": source("x", address="x"), "versions": {"streamconv": "x"}, "verification": found,
        }, text),
        "format_version": FORMAT_VERSION, "is_crc_checked": True, "architecture": "Dinov2Model",
        "files": {"model.safetensors": {"size": 1, "sha256": text}},
    }  # fmt: skip
    read = Manifest.from_json(value, Path("streamconv.json"))
    card = make_card(
        replace(read, files={name: written, "model.safetensors": written}, edited={name: written}), "ada/it"
    )
    assert len(card) < 50_000
    assert all(line.isprintable() for line in card.split("\n"))
    assert ModelCard(card).data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}
    assert not re.search(r"(?<![`\w])(https?://|www\.|\w+@)", re.sub(r"(?<!\\)`[^`\n]*`", "", card))
    body = card.split("\n---\n", 1)[1]
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body)
    inline = [each for token in tokens for each in token.children or ()]
    kinds = Counter(token.type for token in [*tokens, *inline])
    headings = [token.content for before, token in pairwise(tokens) if before.type == "heading_open"]
    assert headings == ["it", "Usage", "Provenance", "Verification"]
    assert [kinds[each] for each in ("html_block", "fence", "table_open", "tr_open")] == [1, 1, 3, 3 + 1 + 2 + 1]
    assert kinds["bullet_list_open"] == 1
    unwanted = {
        "html_inline", "link_open", "image", "s_open", "em_open", "hr", "code_block", "ordered_list_open", "lheading",
    }  # fmt: skip
    assert not unwanted & kinds.keys()
    assert kinds["blockquote_open"] == (not is_finished)


def test_generated_card_is_recognized_by_its_marker_only() -> None:
    text = make_card(manifest(), "ada/it")
    (marker,) = (line for line in text.splitlines() if line.startswith("<!--"))
    assert is_ours(text)
    assert is_ours(f"# Other words\n\n{marker}\n")
    assert not is_ours(text.replace(f"{marker}\n", ""))  # a user deletes the line to keep the card
    assert not is_ours(f"A card that quotes `{marker}`.")


def test_every_architecture_has_a_pipeline_tag() -> None:
    for family in all_families():
        made = {family.conversion_spec(model.dimensions).architecture for model in family.models}
        assert made <= family.pipeline_tags.keys(), family.name
