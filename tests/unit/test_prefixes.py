"""The prefixes of names: which one a user means, and what wrappers insert into the names after it."""

import time

import pytest

from streamconv.errors import MappingError, UsageError
from streamconv.families.dinov2 import FAMILY
from streamconv.families.prefixes import complete_prefix, matching_prefixes, several_backbones
from streamconv.families.registry import all_families
from streamconv.families.selection import find_backbone
from streamconv.families.wrapped_names import prefix_before, unwrapped
from tests.support import checkpoint_of_shapes, tiny

DINO = ["student.module.backbone.", "teacher.backbone."]
BACKBONE = {key: info.shape for key, info in FAMILY.sources(tiny()).items()}


@pytest.mark.parametrize(
    ("given", "found", "meant"),
    [
        ("teacher", DINO, DINO[1:]),
        ("teacher.", DINO, DINO[1:]),
        ("student", DINO, DINO[:1]),
        ("student.backbone", DINO, DINO[:1]),
        ("module.backbone", DINO, DINO[:1]),
        ("backbone", DINO, DINO),
        ("teach", DINO, []),
        ("teacher", ["model.teacher.backbone.", "teacher.backbone."], ["teacher.backbone."]),
        ("teacher", ["model.teacher.backbone.", "model.student.backbone."], ["model.teacher.backbone."]),
        ("", DINO, []),
        ("", ["", "ema."], [""]),
        ("", ["module."], ["module."]),
        ("module", ["", "module."], ["module."]),
        ("model", ["model.", "model.ema."], ["model."]),
        ("vision_tower", ["model.vision_tower.vision_model."], ["model.vision_tower.vision_model."]),
        ("vision_model", ["model.vision_tower.vision_model."], ["model.vision_tower.vision_model."]),
    ],
)
def test_a_prefix_may_be_given_by_a_part_of_it(given: str, found: list[str], meant: list[str]) -> None:
    assert matching_prefixes(given, found) == meant
    if len(meant) == 1:
        assert complete_prefix(given, found, "x.pth") == meant[0]


def test_an_ambiguous_prefix_is_refused_with_what_it_may_mean() -> None:
    with pytest.raises(UsageError, match=r"Use --select student\.module\.backbone or --select teacher\.backbone\.$"):
        complete_prefix("backbone", DINO, "x.pth")
    with pytest.raises(UsageError, match=r"x\.pth holds no head\.$"):
        complete_prefix("backbone", [], "x.pth", "--head-select", "head")


@pytest.mark.parametrize(
    ("found", "usual"),
    [
        (DINO, ", usually teacher.backbone:"),
        (["model.", "model_ema."], ", usually model_ema:"),
        (["state_dict.", "state_dict_ema."], ", usually state_dict_ema:"),
        (["teacher.", "ema."], ":"),
        (["schema.", "model."], ":"),
        (["", "ema."], ", usually ema:"),
    ],
)
def test_the_copy_that_training_evaluates_is_suggested(found: list[str], usual: str) -> None:
    names = [f"{prefix}{key}" for prefix in found for key in ("a", "b")]
    error = several_backbones(found, names, "x.pth")
    assert str(error).splitlines()[0] == f"x.pth holds several backbones. Choose one with --select PREFIX{usual}"
    counts = [sum(name.startswith(prefix) for name in names) for prefix in found]
    assert [problem.split()[1] for problem in error.problems] == [str(count) for count in counts]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("blocks.0._checkpoint_wrapped_module.norm1.weight", "blocks.0.norm1.weight"),
        ("_fsdp_wrapped_module.blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.x", "blocks.0.x"),
        ("module._orig_mod.cls_token", "cls_token"),
        ("x.modules_to_save.default.weight", "x.weight"),
        ("x.base_layer.weight", "x.weight"),
        ("modules.module_list.my_module.0", "modules.module_list.my_module.0"),
    ],
)
def test_parts_that_wrappers_insert_are_dropped_as_wholes(name: str, key: str) -> None:
    assert unwrapped(name) == key


def test_a_key_is_found_after_any_prefix() -> None:
    for name, key, prefix in (
        ("a.module.blocks.0._orig_mod.w", "blocks.0.w", "a.module."),
        ("blocks.0.module.w", "blocks.0.w", ""),
        ("ablocks.0.module.w", "blocks.0.w", None),
        ("w", "blocks.0.w", None),
        ("module.w", "w", "module."),
    ):
        assert prefix_before(name, unwrapped(name), key) == prefix


def test_no_family_has_a_name_that_a_wrapper_inserts() -> None:
    for family in all_families():
        for rule in family.rules:
            for key in (*rule.sources, *rule.targets):
                assert unwrapped(key) == key


@pytest.mark.parametrize(
    "others",
    [
        {f"head.{i}.{key}": shape for i in range(20_000) for key, shape in (("weight", (5, 256)), ("bias", (5,)))},
        {f"p{i}.{key}": shape for i in range(1000) for key, shape in BACKBONE.items()},
        {f"{'module.' * (i % 100)}head.{'module.' * (i // 100)}{key}": shape
         for i in range(5000) for key, shape in (("weight", (5, 128)), ("bias", (5,)))},
    ],
    ids=["heads", "backbones", "wrapped heads"],
)  # fmt: skip
def test_no_file_is_searched_for_long(others: dict[str, tuple[int, ...]]) -> None:
    checkpoint = checkpoint_of_shapes({**{f"a.b.{key}": shape for key, shape in BACKBONE.items()}, **others})
    start = time.process_time()
    with pytest.raises(MappingError):
        find_backbone(checkpoint, "x.pth")
    assert time.process_time() - start < 4


def test_a_deep_prefix_is_searched_once() -> None:
    names = {f"{'a.' * 450}{key}": shape for key, shape in BACKBONE.items()}
    checkpoint = checkpoint_of_shapes({**names, **{f"x{i}.weight": (5, 5) for i in range(40_000)}})
    start = time.process_time()
    with pytest.raises(MappingError, match="more than a backbone"):
        find_backbone(checkpoint, "x.pth")
    assert time.process_time() - start < 4
