"""The best-fitting family is found in any listing order, and families that lack an aspect can be planned."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from streamconv import Checkpoint, MappingError, TensorInfo, UsageError
from streamconv.families.aspects import AttentionHeads, BlockChunks
from streamconv.families.base import ConversionSpec, Family, Model, RemoteFile
from streamconv.families.rules import Rule, count_of, drop, rename
from streamconv.families.selection import Selection, find_backbone
from streamconv.files.base import ByteRange, FileRef
from streamconv.planning.make import make_plan
from streamconv.planning.plan import Plan
from streamconv.tensors.expressions import Read, Record
from streamconv.tensors.info import contiguous_strides

Use = Callable[..., None]
SHARED = ("cls", "patch.weight", "blocks.0.norm", "norm.weight")  # 4 of the 5 keys in either signature


def family(name: str, *own: str, blocks: bool = True) -> Family:
    """Return a family with the shared keys and its ``own`` ones; the first of these is in its signature."""
    keys = (*(key.replace(".0.", ".{i}.") for key in SHARED if blocks or "0" not in key), *own)
    rules = tuple(rename(key, f"{key}.own" if key in own else f"{key}.shared", "D") for key in keys)

    def read_dimensions(infos: Mapping[str, TensorInfo]) -> int:
        return count_of("blocks.{i}.norm", infos)

    def conversion_spec(layers: int) -> ConversionSpec:
        return ConversionSpec(rules, {"D": 2}, {"i": layers}, f"{name.title()}Model", {"model_type": name})

    file = RemoteFile(f"{name}.pth", f"https://example.org/{name}.pth")
    return Family(
        name=name,
        signature=frozenset({*(key for key in SHARED if blocks or "0" not in key), own[0]}),
        models=(Model(f"{name}-small", name, 12, "mit", file),),
        read_dimensions=read_dimensions,
        conversion_spec=conversion_spec,
        organisation="example",
        pipeline_tags={},
    )


ALPHA, BETA = family("alpha", "pos", "mask"), family("beta", "store", "mask", "rope")
CHUNKS = BlockChunks(
    lambda key: key.replace("blocks.0.", "blocks.", 1) if key.count(".") == 3 else key,
    lambda key, layers, chunks: key.replace("blocks.", "blocks.0."),
)


def with_rules(base: Family, *rules: Rule) -> Family:
    """Return the family with more rules."""

    def conversion_spec(layers: int) -> ConversionSpec:
        spec = base.conversion_spec(layers)
        return replace(spec, rules=(*spec.rules, *rules))

    return replace(base, conversion_spec=conversion_spec)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    def make(*families: Family) -> None:
        for module in ("registry", "detection", "no_backbone"):
            monkeypatch.setattr(f"streamconv.families.{module}.all_families", lambda: families)

    return make


@pytest.fixture(params=[1, -1], ids=["alpha first", "beta first"])
def both(use: Use, request: pytest.FixtureRequest) -> None:
    use(*(ALPHA, BETA)[:: request.param])


def checkpoint(names: Iterable[str], shape: tuple[int, ...] = (2,)) -> Checkpoint:
    info = TensorInfo("F32", shape)
    tensors = {
        name: Read(
            info,
            Record(FileRef(Path("x.pth"), 1000), name, ByteRange(0, info.nbytes)),
            0,
            contiguous_strides(shape),
        )
        for name in names
    }
    return Checkpoint(tensors, {}, [], "")


def select(names: Iterable[str], prefix: str | None = None) -> Selection:
    return find_backbone(checkpoint(names), "x.pth", prefix)


def plan(source: Checkpoint, **options: Any) -> Plan:
    selection = find_backbone(source, "x.pth")
    tensors = {key: source[name] for key, (name,) in selection.names.items()}
    return make_plan(tensors, "x.pth", selection=selection, **options)


@pytest.mark.parametrize("prefix", ["", "teacher.", "model.backbone."])
@pytest.mark.parametrize(("name", "own"), [("alpha", ("pos", "mask")), ("beta", ("store", "mask", "rope"))])
@pytest.mark.usefixtures("both")
def test_the_most_complete_signature_wins(name: str, own: tuple[str, ...], prefix: str) -> None:
    source = checkpoint(prefix + key for key in (*SHARED, *own))
    assert find_backbone(source, "x.pth").family.name == name
    planned = plan(source)
    assert (planned.family_name, planned.architecture) == (name, f"{name.title()}Model")


@pytest.mark.usefixtures("both")
def test_each_prefix_of_a_training_checkpoint_gets_its_own_family() -> None:
    names = [f"{prefix}.{key}" for prefix, own in (("a", "pos"), ("b", "store")) for key in (*SHARED, own)]
    with pytest.raises(MappingError, match="several backbones") as caught:
        select(names)
    assert caught.value.problems == ("a. 5 tensors", "b. 5 tensors")
    assert [select(names, prefix).family.name for prefix in "ab"] == ["alpha", "beta"]


@pytest.mark.parametrize(("name", "own"), [("alpha", ("pos", "mask")), ("beta", ("store", "mask", "rope"))])
@pytest.mark.usefixtures("both")
def test_converted_models_are_told_apart_by_the_same_rule(name: str, own: tuple[str, ...]) -> None:
    found = select([*(f"{key}.shared" for key in SHARED), *(f"{key}.own" for key in own)])
    assert (found.family.name, found.is_converted) == (name, True)
    assert found.names[own[0]] == (f"{own[0]}.own",)


@pytest.mark.parametrize("prefix", ["", "teacher."])
@pytest.mark.usefixtures("both")
def test_between_equally_complete_signatures_the_number_of_known_keys_decides(prefix: str) -> None:
    """Both lack one key of their signature. Only beta's rules know "rope", and no rule knows "xrope"."""
    assert select(prefix + key for key in (*SHARED, "mask", "rope")).family.name == "beta"
    with pytest.raises(MappingError, match="equally well"):
        select(prefix + key for key in (*SHARED, "mask", "xrope", "rope.x"))


@pytest.mark.parametrize("prefix", ["", "teacher."])
@pytest.mark.usefixtures("both")
def test_a_tie_is_refused_and_names_both(prefix: str) -> None:
    with pytest.raises(MappingError, match=r"x\.pth fits several families of models equally well: alpha and beta"):
        select(prefix + key for key in SHARED)
    with pytest.raises(MappingError, match="alpha and beta"):
        select(f"{key}.shared" for key in SHARED)


@pytest.mark.usefixtures("both")
def test_half_a_signature_is_not_enough() -> None:
    with pytest.raises(MappingError, match="not a checkpoint of a model that streamconv knows") as caught:
        select(["cls", "pos", "other"])
    assert "for alpha it lacks" in str(caught.value)
    assert caught.value.problems == ("blocks.0.norm", "norm.weight", "patch.weight")


@pytest.mark.parametrize("order", [1, -1])
def test_a_chunked_key_counts_for_the_signature(use: Use, order: int) -> None:
    use(*(replace(ALPHA, block_chunks=CHUNKS), BETA)[::order])
    names = [key.replace("blocks.0.", "blocks.0.0.") for key in (*SHARED, "rope")]  # unchunked, 4 of 5 for both
    assert select(names).family.name == "alpha"
    assert select(names).names["blocks.0.norm"] == ("blocks.0.0.norm",)


def test_a_family_without_aspects_is_planned(use: Use) -> None:
    use(ALPHA)
    planned = plan(checkpoint((*SHARED, "pos", "mask", "blocks.1.norm")))
    assert planned.filenames == ["model.safetensors", "config.json"]
    assert planned.image_processor is None
    assert planned.pixel_steps is None
    assert planned.config == {"architectures": ["AlphaModel"], "dtype": "float32", "model_type": "alpha"}
    assert (planned.block_chunks, planned.notes) == (0, ())
    assert ALPHA.sources(2).keys() == {*SHARED, "pos", "mask", "blocks.1.norm"}
    with pytest.raises(UsageError, match="alpha model has no number of heads to choose"):
        plan(checkpoint((*SHARED, "pos", "mask")), num_heads=2)


def test_a_family_may_use_another_config_key_for_its_heads(use: Use) -> None:
    heads = AttentionHeads(
        lambda layers: 4, lambda layers, number: layers + number, lambda layers: True, str, config_key="n_head"
    )
    assert [heads.number_in({"n_head": number}) for number in (3, 0, True, "3")] == [3, None, None, None]
    assert heads.number_in({"num_attention_heads": 3}) is None
    use(replace(ALPHA, attention_heads=heads))
    source = checkpoint((*SHARED, "pos", "mask"))
    selection = replace(find_backbone(source, "x.pth"), config={"n_head": 1})
    with pytest.raises(MappingError, match=r"missing: blocks\.1\.norm"):  # with_number made two layers of one
        make_plan(source, "x.pth", selection=selection)


def test_a_family_without_blocks_is_planned(use: Use) -> None:
    flat = family("flat", "pos", blocks=False)
    use(flat)
    planned = plan(checkpoint([*flat.signature]))
    assert {target for move in planned.mapping for target in move.targets} == {
        "cls.shared", "norm.weight.shared", "patch.weight.shared", "pos.own"
    }  # fmt: skip


def test_dropped_tensors_are_skipped_with_their_reason(use: Use) -> None:
    rules = (drop("blocks.{i}.mask", "always zero"), drop("periods", "computed from the config", "D"))
    use(with_rules(ALPHA, *rules))
    names = [f"net.{key}" for key in (*SHARED, "pos", "mask", "blocks.1.norm")]
    dropped = [f"net.{key}" for key in ("blocks.0.mask", "blocks.1.mask", "periods")]
    planned = plan(checkpoint([*names, *dropped]))
    assert [str(each) for each in planned.skipped] == [
        "net.blocks.{i}.mask (2 tensors, 16 bytes): always zero",
        "net.periods (1 tensor, 8 bytes): computed from the config",
    ]
    assert {move.source for move in planned.mapping} == {*names}
    assert sum(len(shard.tensors) for shard in planned.shards) == len(names)
    assert plan(checkpoint(names)).skipped == ()


def test_a_dropped_tensor_must_have_the_shape_that_its_rule_states(use: Use) -> None:
    use(with_rules(ALPHA, drop("periods", "computed", "3"), drop("any", "unused")))
    with pytest.raises(MappingError) as caught:
        plan(checkpoint((*SHARED, "pos", "mask", "periods", "any")))
    assert caught.value.problems == ("wrong shape: periods is [2], not [3]",)


def test_pattern_matches_whole_keys_only(use: Use) -> None:
    """Rules match whole keys: ``blocks.{i}.norm`` matches neither ``blocks.00.norm`` nor ``x.blocks.0.norm``."""
    use(ALPHA, BETA)
    with pytest.raises(MappingError, match="alpha and beta"):
        select((*SHARED, "blocks.00.norm", "x.blocks.7.norm", "blocks.1.norm.x"))
