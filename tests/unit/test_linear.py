"""Selecting and planning take time and memory in proportion to the tensors, whatever their names are.

The limits: a file may take `TIMES_HONEST` times as long as a model of as many tensors, 8 times as many tensors may take
11 times as long, and each tensor may take `BYTES_PER_TENSOR` in addition to its name. Seconds are CPU time. The best of
several attempts counts, since other programs can only add to it.
"""

import gc
import itertools
import time
import tracemalloc
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamconv.cli.messages import plan_lines
from streamconv.errors import MappingError, StreamconvError, UsageError
from streamconv.families.dinov2 import FAMILY
from streamconv.families.layout import Layout
from streamconv.families.left_out import left_out_beside_head
from streamconv.families.near_names import near_names
from streamconv.families.patterns import ExpandedNames
from streamconv.families.selection import find_backbone
from streamconv.formats.limits import MAX_NAME_LENGTH
from streamconv.planning import shards
from streamconv.planning.make import make_plan
from streamconv.planning.plan import Plan
from streamconv.tensors.info import TensorInfo
from tests.support import checkpoint_of_shapes, plan_of_shapes, tiny

TIMES_HONEST = 5
BYTES_PER_TENSOR = 4_000
MESSAGE_LENGTH = 20_000

Shapes = Mapping[str, tuple[int, ...]]
BACKBONE: Shapes = {key: info.shape for key, info in FAMILY.sources(tiny()).items()}
AROUND = {key: shape for key, shape in BACKBONE.items() if not key.startswith("blocks.")}
BLOCK = {key: shape for key, shape in BACKBONE.items() if key.startswith("blocks.0.")}
FEW_KEYS = ("cls_token", "pos_embed", "patch_embed.proj.weight")  # of the signature, but more than half of it
HIDDEN = BACKBONE["norm.weight"][0]
HEAD = {"weight": (5, 2 * HIDDEN), "bias": (5,)}
NORM = (HIDDEN,)
DEEP = "a." * 480


def model(count: int, block: str = "blocks.{i}.", prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Return a complete backbone of about ``count`` tensors."""
    blocks = {
        key.replace("blocks.0.", block.format(i=i, chunk=i // 10)): shape
        for i in range(count // len(BLOCK))
        for key, shape in BLOCK.items()
    }
    return {prefix + key: shape for key, shape in {**AROUND, **blocks}.items()}


def converted(count: int) -> dict[str, tuple[int, ...]]:
    names = {name: tensor.info.shape for name, tensor in plan_of(BACKBONE).shards[0].tensors}
    layer = {name: shape for name, shape in names.items() if name.startswith("encoder.layer.0.")}
    more = range(count // len(layer))
    return {**names, **{name.replace(".0.", f".{i}.", 1): shape for i in more for name, shape in layer.items()}}


def beside(*names: str, shape: tuple[int, ...] = (2, 2)) -> Callable[[int], Shapes]:
    """Return a function that returns a backbone with many more tensors, named by their numbers."""
    return lambda count: {**BACKBONE, **{name.format(i=i): shape for i in range(count // len(names)) for name in names}}


def backbones(prefix: str) -> Callable[[int], Shapes]:
    return lambda count: {prefix.format(i=i) + key: BACKBONE[key] for i in range(count // 3) for key in FEW_KEYS}


def plan_of(shapes: Shapes, **options: str) -> Plan:
    checkpoint = checkpoint_of_shapes(shapes)
    selection = find_backbone(checkpoint, "x.pth", **options)
    tensors = selection.tensors(checkpoint, "x.pth")
    return make_plan(tensors, "x.pth", selection=selection)


# Files by what is odd about them, with the options of `find_backbone`.
ATTACKS: dict[str, tuple[Callable[[int], Shapes], dict[str, str]]] = {
    "every second block": (beside("blocks.{i}0.norm1.weight", "blocks.{i}2.norm1.weight", shape=NORM), {}),
    "blocks of one tensor": (beside("blocks.{i}.norm1.weight", shape=NORM), {}),
    "blocks of one tensor, converted": (
        lambda count: {**converted(0), **{f"encoder.layer.{i}.norm1.weight": NORM for i in range(count)}}, {}),
    "backbones": (backbones("p{i}."), {}),
    "backbones, one selected": (backbones("p{i}."), {"prefix": "p7"}),
    "backbones, one mistyped": (backbones("prefix{i}."), {"prefix": "prefx3"}),
    "backbones with long prefixes, one mistyped": (backbones("a" * 900 + "{i}."), {"prefix": "b" * 900}),
    "backbones beside a head": (
        lambda count: {**{f"t.{key}": shape for key, shape in BACKBONE.items()}, **backbones("p{i}.")(count),
                       **{f"head.{key}": shape for key, shape in HEAD.items()}},
        {"prefix": "t", "head_prefix": "head"},
    ),
    "lists of blocks, the last one wrong": (
        lambda count: {**AROUND, **{f"blocks.{i}.{i}.norm1.weight": NORM for i in range(count)},
                       f"blocks.7.{count}.norm1.weight": NORM}, {}),
    "lists of ten blocks": (lambda count: model(count, "blocks.{chunk}.{i}."), {}),
    "a deep prefix": (lambda count: {DEEP + name: shape for name, shape in beside("x{i}")(count).items()}, {}),
    "a deep prefix, selected": (
        lambda count: {**{DEEP + key: shape for key, shape in BACKBONE.items()},
                       **{f"{DEEP[:-2]}x{i}.w": (2, 2) for i in range(count)}}, {"prefix": DEEP}),
    "a prefix of dots": (
        lambda count: {"." * 480 + name: shape for name, shape in beside("x{i}")(count).items()}, {}),
    "heads under deep prefixes": (
        lambda count: {**{DEEP + key: shape for key, shape in BACKBONE.items()},
                       **{f"{'a.' * (i % 480)}x{i}.{key}": shape
                          for i in range(count // 2) for key, shape in HEAD.items()}}, {}),
    "heads, one mistyped": (beside("head{i}.weight", "head{i}.bias"), {"prefix": "", "head_prefix": "hed"}),
    "names of dots": (beside("." * 900 + "{i}"), {}),
    "names of zeros": (beside("0." * 480 + "{i}"), {}),
    "blocks of zeros": (beside("blocks." + "0." * 480 + "{i}"), {}),
    "blocks of digits": (beside("blocks." + "1" * 900 + "{i}.x"), {}),
    "states of digits": (beside("state." * 100 + "9" * 300 + "{i}"), {}),
    "names of wrappers": (beside("module." * 135 + "{i}"), {}),
    "copies of modules": (beside("modules_to_save." * 60 + "{i}"), {}),
    "modules that were replaced": (beside("{i}." + "a." * 400 + "original_module.w"), {}),
    "names that mean the same": (
        lambda count: {**AROUND, **{f"blocks.{i}.{'module.' * n}norm1.weight": NORM
                                    for i in range(count // 50) for n in range(50)}}, {}),
    "long names": (beside("x{i}." + "a" * 960), {}),
    "no backbone": (lambda count: {f"x{i}.{'a.' * 450}w": (2, 2) for i in range(count)}, {}),
    "another head": (lambda count: {f"decode_head.{i}{'a' * 900}": (2, 2) for i in range(count)}, {}),
    "many dimensions": (lambda count: dict.fromkeys(model(count), (1,) * 64), {}),
}  # fmt: skip


def refusal(name: str, count: int) -> str:
    """Return the message about a file, "" if it can be planned."""
    make, options = ATTACKS[name]
    try:
        plan_of(make(count), **options)
    except StreamconvError as error:
        return str(error)
    return ""


def seconds_of(run: Callable[[], object]) -> float:
    """Return the CPU time without garbage collection, which also visits whatever other tests have left."""
    gc.disable()
    try:
        start = time.process_time()
        run()
        return time.process_time() - start
    finally:
        gc.enable()


@cache
def honest_seconds(count: int) -> float:
    return min(seconds_of(lambda: plan_of(model(count))) for _ in range(3))


def attack(name: str, count: int) -> float:
    """Return the seconds for a file, measured up to three times if they are many more than an honest file's."""
    assert max(map(len, ATTACKS[name][0](count))) <= MAX_NAME_LENGTH
    for _ in range(3):
        seconds = seconds_of(lambda: refusal(name, count))
        if seconds < TIMES_HONEST * honest_seconds(count):
            break
    return seconds


@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_names_take_no_longer_than_those_of_a_model(name: str) -> None:
    assert attack(name, 1_500) < TIMES_HONEST * honest_seconds(1_500)


@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_names_take_little_memory_and_fill_no_screen(name: str) -> None:
    shapes = ATTACKS[name][0](200)
    checkpoint_of_shapes(shapes)
    refusal(name, 200)  # imports and caches
    tracemalloc.start()
    try:
        message = refusal(name, 200)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(message) < MESSAGE_LENGTH
    # A name may be kept in a few forms: as it is in the file, as a key, and in the text that is searched for marks.
    assert peak < sum(BYTES_PER_TENSOR + 4 * len(each) for each in shapes), f"{peak:,} bytes"


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_time_is_in_proportion_to_the_tensors(name: str) -> None:
    # Other programs can only add to one of the times. A quadratic part of 45% of the longest one is noticed.
    for few, many in ((1_000, 8_000), (8_000, 64_000)):
        assert any(attack(name, many) < 11 * attack(name, few) for _ in range(3))


def test_plan_of_many_blocks_is_shown_completely_and_without_filling_a_screen() -> None:
    deep = f"blocks.0.{'module.' * 130}norm1.weight"
    plan = plan_of({deep if key == "blocks.0.norm1.weight" else key: shape for key, shape in model(2_000).items()})
    lines = [str(line) for line in plan_lines(plan, with_mapping=True)]
    assert sum(" -> " in line for line in lines) == len(plan.mapping) == len(model(2_000))
    assert sum(map(len, lines)) < 400 * len(plan.mapping)
    assert len(plan.as_dict()["mapping"]) == len(plan.mapping)


def test_head_of_too_many_classes_is_refused_before_its_labels_are_made() -> None:
    with pytest.raises(MappingError, match="the head has 1,000,000,000 classes"):
        plan_of({**BACKBONE, "linear_head.weight": (10**9, 2 * HIDDEN), "linear_head.bias": (10**9,)})


def test_plan_of_too_many_files_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_SHARDS", 2)
    with pytest.raises(UsageError, match=r"up to 2 can be written\. Give a larger --max-shard-size"):
        plan_of_shapes(dict(BACKBONE), Path(), max_shard_bytes=1)


# What is fast gives what is simple.

PARTS = st.sampled_from(
    ["", "a", "b", "module", "head", "weight", "optimizer", "state", "0", "12", "dino_head", "modules_to_save"]
)
NAMES = st.lists(PARTS, min_size=1, max_size=6).map(".".join)
PREFIXES = st.lists(PARTS, max_size=4).map(lambda parts: "".join(f"{part}." for part in parts))


@given(PREFIXES, PREFIXES, NAMES)
@settings(deadline=None)
def test_parent_of_a_name_is_what_it_shares_with_the_prefix(prefix: str, start: str, rest: str) -> None:
    layout = Layout(FAMILY, prefix, is_converted=False)
    parents = ["", *(prefix[: i + 1] for i, letter in enumerate(prefix) if letter == ".")]
    for name in (start + rest, prefix + rest):
        parent = max((each for each in parents if name.startswith(each)), key=len)
        assert layout.parent_of(name) == parent
        assert layout.start(name) == parent + "".join(name[len(parent) :].partition(".")[:2])
        found = layout.extra(name, TensorInfo("F32", (2,)))
        wanted = next(
            (
                (each + extra.start, extra)
                for each in parents
                for extra in FAMILY.extra_prefixes
                if name.startswith(each + extra.start)
            ),
            None,
        )
        if wanted is not None:
            assert found == wanted
        elif found is not None:
            assert found[1] not in FAMILY.extra_prefixes


@given(st.lists(st.sampled_from(["x", "b.{i}.x", "b.{i}.y.z", "c.{i}", "norm.w"]), unique=True), st.integers(0, 12))
@settings(deadline=None)
def test_expanded_names_are_those_of_every_block(patterns: list[str], count: int) -> None:
    values = {each: lambda indexes, each=each: (each, indexes.get("i", 0)) for each in patterns}
    names = ExpandedNames(values, {"i": count})  # type: ignore[var-annotated]
    wanted: dict[str, tuple[str, int]] = {}
    for is_block, group in itertools.groupby(patterns, lambda each: "{i}" in each):
        block = list(group)
        for i in range(count if is_block else 1):
            wanted |= {each.replace("{i}", str(i)): (each, i) for each in block}
    assert list(names.items()) == list(wanted.items())
    assert len(names) == len(wanted)
    for other in ("b.00.x", "b.-1.x", "b.x", "b.12.x", "b.1.1.x", "b.{i}.x", "b.١.x", "c.", "b." + "9" * 900 + ".x"):
        assert (other in names) == (other in wanted)


@given(PREFIXES, st.dictionaries(NAMES, st.just((2, 2)), max_size=8))
@settings(max_examples=20, deadline=None)
def test_every_tensor_is_used_or_named_as_skipped(prefix: str, others: Shapes) -> None:
    ours = {prefix + key: shape for key, shape in BACKBONE.items()}
    checkpoint = checkpoint_of_shapes({**others, **ours})
    try:
        selection = find_backbone(checkpoint, "x.pth", prefix)
    except StreamconvError:
        return
    used = {name for names in selection.names.values() for name in names}
    assert len(used) + sum(each.tensors for each in selection.skipped) == len(checkpoint)


def test_backbones_beside_a_head_cause_no_assumption() -> None:
    infos = {f"{prefix}{key}": TensorInfo("F32", BACKBONE[key]) for prefix in ("m.b.", "m.a.", "m.a.c.", "m.d.")
             for key in FEW_KEYS}  # fmt: skip
    infos |= {f"m.head.{key}": TensorInfo("F32", shape) for key, shape in HEAD.items()}
    infos |= {f"m.{name}": TensorInfo("F32", NORM) for name in ("a", "b2.w", "norm.w")}
    chosen = {key: f"m.head.{key}" for key in HEAD}
    text = left_out_beside_head(chosen, infos, [chosen], FAMILY)
    assert text.startswith("m.a, m.b2., m.norm.: left out")


def test_typing_errors_are_searched_in_few_names() -> None:
    words = [f"{'ab' * 45}{i}" for i in range(3_000)]
    assert seconds_of(lambda: near_names("ba" * 45, words)) < TIMES_HONEST * honest_seconds(3_000)
    assert near_names("ba" * 450, words * 2) == []
