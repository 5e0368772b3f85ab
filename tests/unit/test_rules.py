"""Rules: every key is used once, every target is made once, and all problems are listed at once."""

from pathlib import Path

import pytest

from streamconv import MappingError, TensorInfo
from streamconv.families.mapping import Origin, invert, map_tensors, origins_of
from streamconv.families.rules import chunk, count_of, rename
from streamconv.files.base import ByteRange, FileRef
from streamconv.tensors.expressions import Read, Record
from streamconv.tensors.info import contiguous_strides

RULES = (
    rename("cls", "embeddings.cls", "1 D"),
    chunk("blocks.{i}.qkv", ("layer.{i}.q", "layer.{i}.k", "layer.{i}.v"), "3D D"),
)
DIMS = {"D": 2, "3D": 6}


@pytest.fixture
def make(tmp_path: Path):  # type: ignore[no-untyped-def]
    file = FileRef(tmp_path / "x", 1000)

    def tensor(*shape: int, dtype: str = "F32") -> Read:
        info = TensorInfo(dtype, shape)
        return Read(info, Record(file, "r", ByteRange(100, 500)), 0, contiguous_strides(shape))

    return tensor


def test_chunk_splits_rows_in_order(make) -> None:  # type: ignore[no-untyped-def]
    targets = map_tensors(RULES, {"cls": make(1, 2), "blocks.0.qkv": make(6, 2)}, DIMS, {"i": 1}, "x")
    assert {name: (t.info.shape, t.offset) for name, t in targets.items()} == {
        "embeddings.cls": ((1, 2), 0),
        "layer.0.q": ((2, 2), 0),
        "layer.0.k": ((2, 2), 16),
        "layer.0.v": ((2, 2), 32),
    }


def test_mapping_lists_all_problems_at_once(make) -> None:  # type: ignore[no-untyped-def]
    source = {"blocks.0.qkv": make(6, 3), "blocks.00.qkv": make(6, 2), "extra": make(1), "blocks.1.qkv.x": make(6, 2)}
    with pytest.raises(MappingError) as caught:
        map_tensors(RULES, source, DIMS, {"i": 2}, "x.pth")
    assert sorted(caught.value.problems) == [
        "missing: blocks.1.qkv [6, 2]",
        "missing: cls [1, 2]",
        "unexpected: blocks.00.qkv [6, 2]",
        "unexpected: blocks.1.qkv.x [6, 2]",
        "unexpected: extra [1]",
        "wrong shape: blocks.0.qkv is [6, 3], not [6, 2]",
    ]
    assert all(problem in str(caught.value) for problem in caught.value.problems)


def test_error_counts_the_problems(make) -> None:  # type: ignore[no-untyped-def]
    tensors = {"cls": make(1, 2), "blocks.0.qkv": make(6, 2)}
    with pytest.raises(MappingError, match=r"^x does not fit \(1 problem\):\n  unexpected: other"):
        map_tensors(RULES, {**tensors, "other": make(1)}, DIMS, {"i": 1}, "x")


def test_mixed_dtypes_are_refused(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(MappingError, match=r"mixed dtypes: F32 \(cls\) and BF16 \(blocks.0.qkv\)"):
        map_tensors(RULES, {"cls": make(1, 2), "blocks.0.qkv": make(6, 2, dtype="BF16")}, DIMS, {"i": 1}, "x")


def test_two_rules_with_the_same_target_raise_value_error(make) -> None:  # type: ignore[no-untyped-def]
    rules = (*RULES, rename("other", "embeddings.cls", "1 D"))
    with pytest.raises(ValueError, match="two rules"):
        map_tensors(rules, {"cls": make(1, 2), "other": make(1, 2), "blocks.0.qkv": make(6, 2)}, DIMS, {"i": 1}, "x")


def test_inverted_rules_restore_the_source_tensors_in_order(make) -> None:  # type: ignore[no-untyped-def]
    rules = (RULES[0], *(rename(f"blocks.{{i}}.{name}", f"layer.{{i}}.{name}", "D") for name in "ab"), *RULES[1:])
    sources = {"cls": make(1, 2), **{f"blocks.{i}.{name}": make(2) for i in range(11) for name in "ab"}}
    sources |= {f"blocks.{i}.qkv": make(6, 2) for i in range(11)}
    targets = map_tensors(rules, sources, DIMS, {"i": 11}, "x")
    back = invert(rules, dict(reversed(targets.items())), DIMS, {"i": 11}, "x")
    assert list(back) == ["cls", *(f"blocks.{i}.{name}" for i in range(11) for name in ("a", "b", "qkv"))]
    assert {key: tensor.info for key, tensor in back.items()} == {key: t.info for key, t in sources.items()}
    assert back == sources
    infos = {name: target.info for name, target in targets.items()}
    guessed = origins_of(rules, infos)
    assert guessed["blocks.10.qkv"].names == ("layer.10.q", "layer.10.k", "layer.10.v")
    assert {key: each.join([targets[n] for n in each.names], {}, {}) for key, each in guessed.items()} == back
    assert map_tensors(rules, back, DIMS, {"i": 11}, "x") == targets


def test_inverting_lists_all_problems_at_once(make) -> None:  # type: ignore[no-untyped-def]
    targets = {"layer.0.q": make(2, 2), "layer.0.k": make(3, 2), "layer.00.v": make(2, 2), "cls": make(1, 2)}
    with pytest.raises(MappingError) as caught:
        invert(RULES, targets | {"embeddings.cls": make(1, 2, dtype="F16")}, DIMS, {"i": 1}, "x", ["known"])
    assert sorted(caught.value.problems) == [
        "known",
        "missing: layer.0.v [2, 2]",
        "mixed dtypes: F32 (layer.0.q and 1 more) and F16 (embeddings.cls); a model has one",
        "unexpected: cls [1, 2]",
        "unexpected: layer.00.v [2, 2]",
        "wrong shape: layer.0.k is [3, 2], not [2, 2]",
    ]


def test_incomplete_chunks_are_not_concatenated(make) -> None:  # type: ignore[no-untyped-def]
    info = TensorInfo("F32", (2,))
    strays = ("layer.00.q", "layer.0.1.q", "layer.x.q", "xlayer.0.q", "layer.0.q.weight", "layer.{i}.q", "layer.1.q")
    assert origins_of(RULES, dict.fromkeys(strays, info)) == {name: Origin((name,)) for name in strays}
    for odd in (TensorInfo("F16", (2,)), TensorInfo("F32", (3,))):
        parts = {"layer.0.q": info, "layer.0.k": odd, "layer.0.v": info}
        assert origins_of(RULES, parts) == {name: Origin((name,)) for name in parts}


def test_block_count_allows_gaps_but_ignores_outliers() -> None:
    pattern = "blocks.{i}.norm"
    assert count_of(pattern, []) == 0
    assert count_of(pattern, ["blocks.0.norm", "blocks.1.norm", "blocks.3.norm"]) == 4
    assert count_of(pattern, ["blocks.0.norm", "blocks.99999.norm"]) == 1
    assert count_of(pattern, ["blocks.00.norm", "xblocks.0.norm", "blocks.0.norms"]) == 0
