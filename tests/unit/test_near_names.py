"""A mistyped name is answered with the names that it may stand for, in a sensible order."""

from pathlib import Path

import pytest

from streamconv import SourceMissingError, UsageError
from streamconv.families.near_names import did_you_mean, near_names
from streamconv.families.registry import find_model, near_models
from streamconv.source.resolve import resolve_source


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("dinov2_vitb", ["dinov2_vitb14", "dinov2_vitb14_reg", "dinov2_vitb14_1layer"]),
        ("vitg", ["dinov2_vitg14", "dinov2_vitg14_reg", "dinov2_vitg14_1layer"]),
        ("DINOv2_ViTL14", ["dinov2_vitl14"]),
        ("dinov2-vitl14-reg", ["dinov2_vitl14_reg"]),
        ("dinov2-base", ["dinov2_vitb14"]),
        ("facebook/dinov2-base", ["dinov2_vitb14"]),
        ("dinov2_vitg14_lc", ["dinov2_vitg14", "dinov2_vitg14_reg", "dinov2_vitg14_1layer"]),
        ("dinov2_vitg14_reg_lc", ["dinov2_vitg14_reg", "dinov2_vitg14", "dinov2_vits14_reg"]),
        ("webssl-dino1b", ["webssl_dino1b_full2b_224"]),
        ("resnet", []),
        ("v", []),
        ("", []),
    ],
)
def test_near_models_are_suggested_the_likeliest_first(name: str, near: list[str]) -> None:
    assert near_models(name) == near


def test_typing_error_is_answered_with_the_name_spelled_alike() -> None:
    assert near_models("dino2_vitg14")[0] == "dinov2_vitg14"
    assert near_names("techer.backbone", ["student.backbone.", "teacher.backbone."])[0] == "teacher.backbone."


def test_message_about_an_unknown_model_asks_for_the_near_ones() -> None:
    with pytest.raises(UsageError, match=r"Did you mean dinov2_vitb14, dinov2_vitb14_reg or dinov2_vitb14_1layer\?$"):
        find_model("dinov2_vitb")
    assert did_you_mean(["a", "b"]) == "Did you mean a or b?"
    assert did_you_mean(["a"]) == "Did you mean a?"
    assert did_you_mean([]) == ""


def test_message_about_a_missing_file_asks_for_a_near_file_or_model(tmp_path: Path) -> None:
    (tmp_path / "teacher_checkpoint.pth").touch()
    (tmp_path / "l.pth").touch()
    for name, question in (
        ("teacher_chekpoint.pth", rf" Did you mean `{tmp_path}/teacher_checkpoint\.pth`\?$"),
        ("teacher_checkpoint.pt", rf" Did you mean `{tmp_path}/teacher_checkpoint\.pth`\?$"),
        ("x.pth", "no such file.$"),  # its suffix makes no other file a near one
        ("dinov2_vits14_pretrain.pth", r" Did you mean the model dinov2_vits14\?$"),
        ("dinov2-base", r" Did you mean the model dinov2_vitb14\?$"),
        ("other.pth", "no such file.$"),
        ("none/other.pth", "no such file.$"),
        ("a\0b/other.pth", "no such file.$"),
    ):
        with pytest.raises(SourceMissingError, match=question):
            resolve_source(tmp_path / name)
