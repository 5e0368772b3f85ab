"""The operations of rules give torch's results, and their inverses give the sources back."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamconv import MappingError, TensorInfo
from streamconv.families.expected import expand
from streamconv.families.mapping import Origin, invert, joined, map_tensors, origins_of
from streamconv.families.operations import (
    Chunk,
    Concat,
    Multiply,
    Omit,
    Operation,
    Permute,
    Prepend,
    Reshape,
    Stack,
    Transpose,
)
from streamconv.families.rules import (
    Rule,
    chunk,
    concat,
    convert,
    drop,
    fill,
    multiply,
    permute,
    rename,
    reshape,
    stack,
    transpose,
)
from streamconv.formats.checkpoint import open_checkpoint
from streamconv.tensors import concatenation
from streamconv.tensors.constants import literal, placeholder
from streamconv.tensors.evaluation import read_bytes
from streamconv.tensors.expressions import Expression

Tensors = Sequence[torch.Tensor]
DIMS = {"D": 4, "2D": 8, "3D": 12, "F": 6, "H": 2}
COUNTS = {"i": 2, "e": 3}

# Each rule with what torch makes of the tensors of its sources.
RULES: dict[str, tuple[Rule, Callable[[Tensors], Tensors]]] = {
    "rename": (rename("a", "x", "D F"), lambda t: t),
    "chunk": (chunk("a", ("x", "y", "z"), "3D F"), lambda t: t[0].chunk(3)),
    "chunk of dim 1": (chunk("a", ("x", "y"), "F 2D", 1), lambda t: t[0].chunk(2, 1)),
    "concat": (concat(("a", "b"), "x", ("D F", "F F")), lambda t: [torch.cat([*t])]),
    "concat of dim 1": (concat(("a", "b"), "x", ("D F", "D 3D"), 1), lambda t: [torch.cat([*t], 1)]),
    "stack": (stack(("a", "b"), "x", "D F", 1), lambda t: [torch.stack([*t], 1)]),
    "stack of experts": (stack("a.{e}", "x", "D F"), lambda t: [torch.stack([*t])]),
    "experts of two kinds": (
        convert(("a.{e}", "b.{e}"), "x", ("F D", "F D"), Stack(0, 2), Concat(1)),
        lambda t: [torch.cat([torch.stack([*t[:3]]), torch.stack([*t[3:]])], 1)],
    ),
    "experts apart": (convert("a", "x.{e}", "3D D", Chunk(3)), lambda t: t[0].chunk(3)),
    "permute": (permute("a", "x", "D F H", (2, 0, 1)), lambda t: [t[0].permute(2, 0, 1)]),
    "transpose": (transpose("a", "x", "D F"), lambda t: [t[0].T]),
    "transpose of others": (transpose("a", "x", "D F H", 1, 2), lambda t: [t[0].transpose(1, 2)]),
    "reshape": (reshape("a", "x", "D F", "2D 3"), lambda t: [t[0].reshape(8, 3)]),
    "rotary rows": (
        convert("a", "x", "2D F", Reshape(("H", "2", "2", "F")), *permute("", "", "", (0, 2, 1, 3)).operations,
                Reshape(("2D", "F"))),
        lambda t: [t[0].reshape(2, 2, 2, 6).permute(0, 2, 1, 3).reshape(8, 6)],
    ),
    "prepend": (
        convert("a", "x", "1 D F", Prepend(0.5, 2, 1)),
        lambda t: [torch.cat([torch.full((1, 2, 6), 0.5), *t], 1)],
    ),
}  # fmt: skip


@pytest.fixture(params=RULES)
def case(request: pytest.FixtureRequest) -> tuple[Rule, Callable[[Tensors], Tensors]]:
    return RULES[request.param]


def save(rule: Rule, path: Path) -> dict[str, torch.Tensor]:
    """Save random sources of two repetitions, under names that sort in another order."""
    torch.manual_seed(0)
    repeated = with_blocks(rule)
    state = {key: torch.randn(each.shape or ()) for key, each in expand([repeated], DIMS, COUNTS).items()}
    torch.save(dict(reversed(state.items())), path)
    return state


def with_blocks(rule: Rule) -> Rule:
    sources, targets = ([f"blocks.{{i}}.{name}" for name in names] for names in (rule.sources, rule.targets))
    return Rule(tuple(sources), rule.shapes, tuple(targets), rule.operations)


def test_each_rule_gives_the_result_of_torch_and_its_inverse_the_sources(
    case: tuple[Rule, Callable[[Tensors], Tensors]], tmp_path: Path
) -> None:
    rule, in_torch = with_blocks(case[0]), case[1]
    state = save(case[0], tmp_path / "x.pth")
    wanted: dict[str, torch.Tensor] = {}
    for keys, names in rule.repetitions(COUNTS):
        wanted |= zip(names, in_torch([state[key] for key in keys]), strict=True)
    with open_checkpoint(tmp_path / "x.pth") as checkpoint:
        targets = map_tensors([rule], checkpoint, DIMS, COUNTS, "x.pth")
        assert targets.keys() == wanted.keys()
        for name, tensor in targets.items():
            assert tensor.shape == wanted[name].shape
            assert read_bytes(tensor) == wanted[name].contiguous().numpy().tobytes(), name
        back = invert([rule], targets, DIMS, COUNTS, "x.pth")
        assert list(back) == list(expand([rule], DIMS, COUNTS))
        for key, tensor in back.items():
            assert tensor.shape == state[key].shape
            assert read_bytes(tensor) == state[key].numpy().tobytes(), key
        origins = origins_of([rule], {name: tensor.info for name, tensor in targets.items()})
        if case is not RULES["experts of two kinds"]:  # whose targets do not show the number of experts
            assert origins.keys() == back.keys()
            parts = {key: [targets[name] for name in origin.names] for key, origin in origins.items()}
            assert joined(origins, parts, DIMS, COUNTS, "x.pth") == back


def test_product_is_that_of_torch_and_cannot_be_reverted(tmp_path: Path) -> None:
    rule = multiply(("a", "b"), "x", "D F")
    state = {"a": torch.randn(4, 6), "b": torch.randn(4, 6)}
    torch.save(state, tmp_path / "x.pth")
    with open_checkpoint(tmp_path / "x.pth") as checkpoint:
        targets = map_tensors([rule], checkpoint, DIMS, {}, "x.pth")
        assert read_bytes(targets["x"]) == (state["a"] * state["b"]).numpy().tobytes()
        with pytest.raises(MappingError, match=r"no inverse:\n  a and b: the factors of a product cannot be recovered"):
            invert([rule], targets, DIMS, {}, "out")
        with pytest.raises(MappingError, match="cannot be read back"):
            joined(origins_of([rule], {"x": targets["x"].info}), {"a": [targets["x"]]}, DIMS, {}, "out")


def test_what_is_left_out_is_named_and_restored(tmp_path: Path) -> None:
    periods = literal([1.0, 0.5], "BF16", (2,))
    rules = [
        convert(("a", "mask"), ("q", "v"), ("3D", "3D"), Multiply(), Chunk(3), Omit(1, "the mask is 0 there")),
        drop("periods", "computed", "2", periods),
        fill("f", 1.0, "D"),
    ]
    state = {"a": torch.randn(12), "mask": torch.ones(12), "periods": torch.zeros(2)}
    torch.save(state, tmp_path / "x.pth")
    with open_checkpoint(tmp_path / "x.pth") as checkpoint:
        targets = map_tensors(rules, checkpoint, DIMS, {}, "x.pth")
        product = (state["a"] * state["mask"]).numpy()
        assert read_bytes(targets["q"]) + read_bytes(targets["v"]) == product[:4].tobytes() + product[8:].tobytes()
        ((reason, info),) = rules[0].left_out([checkpoint["a"], checkpoint["mask"]], DIMS)
        assert (reason, info.shape) == ("the mask is 0 there", (4,))
        plain = [convert("a", ("q", "v"), "3D", Chunk(3), Omit(1, "zero", -0.0)), *rules[1:]]
        back = invert(plain, targets, DIMS, {}, "out")
    assert list(back) == ["a", "periods"]
    expected = torch.from_numpy(product).clone()
    expected[4:8] = -0.0
    assert read_bytes(back["a"]) == expected.numpy().tobytes()
    assert (
        read_bytes(back["periods"])
        == torch.tensor([1.0, 0.5], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    )
    assert [each for rule in plain for each in rule.restorations()] == ["a (a part): zero", "periods: computed"]


def test_copy_of_another_source_is_dropped_and_restored(tmp_path: Path) -> None:
    rules = [rename("norm", "layer_norm", "D"), drop("norms.3", "another name", "D", copy_of="norm")]
    norm = torch.randn(4)
    for state in ({"norm": norm, "norms.3": norm}, {"norm": norm}):
        torch.save(state, tmp_path / "x.pth")
        with open_checkpoint(tmp_path / "x.pth") as checkpoint:
            targets = map_tensors(rules, checkpoint, DIMS, {}, "x.pth")
            assert list(targets) == ["layer_norm"]
            back = invert(rules, targets, DIMS, {}, "out")
            assert list(back) == ["norm", "norms.3"]
            assert back["norm"] == back["norms.3"] == checkpoint["norm"]
            origins = origins_of(rules, {"layer_norm": targets["layer_norm"].info})
            assert origins["norms.3"] == origins["norm"]
    assert not any(text for rule in rules for text in rule.restorations())  # nothing that may have been different


def test_sources_of_different_dtypes_are_cast_before_they_are_combined(tmp_path: Path) -> None:
    state = {"a": torch.randn(4, 6), "b": torch.randn(6, 6, dtype=torch.float64)}
    torch.save(state, tmp_path / "x.pth")
    rule = RULES["concat"][0]
    with open_checkpoint(tmp_path / "x.pth") as checkpoint:
        with pytest.raises(MappingError, match=r"mixed dtypes: F64 \(b\) and F32 \(a\)"):
            map_tensors([rule], checkpoint, DIMS, {}, "x.pth")
        targets = map_tensors([rule], checkpoint, DIMS, {}, "x.pth", dtype="F16")
        wanted = torch.cat([state["a"].half(), state["b"].half()])
        assert read_bytes(targets["x"]) == wanted.numpy().tobytes()


def test_incomplete_and_unequal_targets_are_their_own_sources(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(4, 6), "y": torch.zeros(3, 6), "q.0": torch.zeros(2)}, tmp_path / "x.pth")
    rules = [
        chunk("a", ("x", "y"), "2D F"),
        stack(("b", "c"), "s", "D"),
        convert("d", ("q.{e}", "r.{e}"), "D", Chunk(4)),
    ]
    with open_checkpoint(tmp_path / "x.pth") as checkpoint:
        infos = {name: tensor.info for name, tensor in checkpoint.items()}
        assert origins_of(rules, infos) == {name: Origin((name,)) for name in infos}


@pytest.mark.parametrize("shape", [(), (0,), (3,), (0, 4), (2, 3, 5), (10**12, 0)])
@pytest.mark.parametrize("operation", [
    Chunk(2), Chunk(2, 1), Concat(), Stack(), Stack(1), Permute((1, 0)), Transpose(), Reshape(("2", "2")), Prepend(0.0),
    Prepend(0.0, 1, 1), Omit(1, "a reason"),
])  # fmt: skip
def test_operations_report_shapes_that_do_not_fit_as_value_errors(operation: Operation, shape: tuple[int, ...]) -> None:
    """Any shape may be in a file, and the callers list such errors."""
    infos = [TensorInfo("F32", shape)] * 2
    results: list[Expression] = []
    for tensors in ([placeholder(info) for info in infos[:count]] for count in (1, 2)):
        for inputs in (None, infos, [TensorInfo("F32", (3,))]):
            with contextlib.suppress(ValueError):
                results += operation.undo(tensors, inputs)
        with contextlib.suppress(ValueError):
            results += operation.apply(tensors, {})
    assert all(size >= 0 for result in results for size in result.shape)


@pytest.mark.parametrize(
    ("rule", "shape"),
    [(RULES["permute"][0], (2, 4)), (RULES["transpose"][0], (4,)), (RULES["stack"][0], (4,)),
     (RULES["prepend"][0], (1, 1, 6)), (RULES["stack of experts"][0], (10**12, 0))],
)  # fmt: skip
def test_target_of_an_impossible_shape_is_its_own_source(rule: Rule, shape: tuple[int, ...]) -> None:
    assert origins_of([rule], {"x": TensorInfo("F32", shape)}) == {"x": Origin(("x",))}


def test_two_rules_with_one_source_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="two rules read a"):
        expand([rename("a", "x", "D"), rename("a", "y", "D")], DIMS, {})


def test_impossible_sizes_are_any_shape_so_that_the_family_reports_them() -> None:
    rule = reshape("a", "x", "D F", "D 5")
    assert rule.target_shapes(DIMS, {}) == {"x": None}
    sizes: Mapping[str, int] = {"D": 0, "F": 0, "H": 0, "2D": 0, "3D": 0}
    assert RULES["rotary rows"][0].target_shapes(sizes, {}) == {"x": (0, 0)}


def test_target_of_too_many_parts_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.randn(12, 6)[::2].t()}, tmp_path / "x.pth")  # rows of the view are not in one run
    monkeypatch.setattr(concatenation, "MAX_PARTS", 3)
    with open_checkpoint(tmp_path / "x.pth") as checkpoint:
        rules = [reshape("a", "x", "F F", "1 36")]
        with pytest.raises(MappingError, match=r"too many parts:\n  x: F32 \[6, 6\] would become 6 parts"):
            map_tensors(rules, checkpoint, DIMS, {}, "x.pth")


@st.composite
def chains(draw: st.DrawFn) -> tuple[Operation, ...]:
    """Draw a chain of operations on one tensor of the shape 4 x 6 x 2, after which it is one tensor again."""
    shape, operations = [4, 6, 2], []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["permute", "transpose", "reshape", "chunk and concat", "prepend"]))
        dim, other = (draw(st.integers(0, len(shape) - 1)) for _ in range(2))
        if kind == "permute":
            dims = draw(st.permutations(range(len(shape))))
            operations.append(Permute(tuple(dims)))
            shape = [shape[each] for each in dims]
        elif kind == "transpose":
            operations.append(Transpose(dim, other))
            shape[dim], shape[other] = shape[other], shape[dim]
        elif kind == "reshape":
            count = math.prod(shape)
            first = draw(st.sampled_from([n for n in range(1, count + 1) if count % n == 0]))
            shape = [first, count // first]
            operations.append(Reshape((str(first), str(count // first))))
        elif kind == "prepend":
            operations.append(Prepend(1.0, 1, dim))
            shape[dim] += 1
        else:
            parts = draw(st.sampled_from([n for n in range(1, shape[dim] + 1) if shape[dim] % n == 0]))
            operations += [Chunk(parts, dim), Concat(other)]
            shape[dim] //= parts
            shape[other] *= parts
    return tuple(operations)


@given(chains())
def test_any_chain_of_operations_is_undone(
    tmp_path_factory: pytest.TempPathFactory, chain: tuple[Operation, ...]
) -> None:
    path = tmp_path_factory.getbasetemp() / "chain.pth"
    if not path.exists():
        torch.save({"a": torch.arange(48.0).reshape(4, 6, 2)}, path)
    rule = convert("a", "x", "4 6 2", *chain)
    with open_checkpoint(path) as checkpoint:
        targets = map_tensors([rule], checkpoint, {}, {}, "x.pth")
        back = invert([rule], targets, {}, {}, "x.pth")["a"]
        assert back.shape == (4, 6, 2)
        assert read_bytes(back, checkpoint.reader) == torch.arange(48.0).numpy().tobytes()
