"""Plans against what Meta's models hold and what transformers and safetensors write."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import streamconv
from streamconv import Checkpoint, MappingError, UsageError
from streamconv.families.dinov2 import FAMILY
from streamconv.families.registry import find_model
from streamconv.families.selection import find_backbone
from streamconv.files.base import ByteRange, FileRef
from streamconv.planning.make import make_plan
from streamconv.planning.plan import Plan
from streamconv.planning.shards import make_shard, parse_size, to_json
from streamconv.tensors.expressions import Record, SourceTensor
from streamconv.tensors.info import TensorInfo, contiguous_strides
from tests.conftest import make_states, seeds_mapping, tiny
from tests.engine.test_tensors import DTYPES, NAMES

MODELS = [model.name for model in FAMILY.models]
WEB_DINO = [name for name in MODELS if name.startswith("webssl")]
# Keys and shapes of Meta's modules (facebookresearch/dinov2 and facebookresearch/webssl, built on the meta
# device) and of transformers 4.57's, whose names in memory are those of the files; {i} counts layers, and
# "chunks" gives the {chunk} that each is in.
GOLDEN = json.loads(Path(__file__).parents[1].joinpath("golden").joinpath("dinov2.json").read_text())


def expanded(shapes: dict[str, list[int]], layers: int, chunks: Sequence[int] = ()) -> dict[str, tuple[int, ...]]:
    return {
        key.format(i=i, chunk=chunks[i] if chunks else None): tuple(shape)
        for key, shape in shapes.items()
        for i in (range(layers) if "{i}" in key else (0,))
    }


def plan_of_shapes(
    shapes: dict[str, tuple[int, ...]], where: Path, filename: str = "golden", **options: object
) -> Plan:
    """A plan needs no bytes, and no file."""
    tensors = {}
    for name, shape in shapes.items():
        info = TensorInfo("F32", shape)
        record = Record(FileRef(where / filename, info.nbytes), name, ByteRange(0, info.nbytes))
        tensors[name] = SourceTensor(info, record, 0, contiguous_strides(shape))
    selection = find_backbone(Checkpoint(tensors, {}, [], ""), filename)
    selected = {key: tensors[called] for key, (called,) in selection.names.items()}
    return make_plan(selected, filename, selection=selection, filename=filename, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MODELS)
def test_every_published_model_maps_metas_keys_onto_transformers(name: str, tmp_path: Path) -> None:
    golden = GOLDEN[name]
    chunks = golden.get("chunks", ())
    source, target = (expanded(golden[side], golden["layers"], chunks) for side in ("source", "target"))
    plan = plan_of_shapes(source, tmp_path, f"{name}.pth")
    assert plan.model is not None
    assert plan.model.name == name
    assert {name: tensor.info.shape for shard in plan.shards for name, tensor in shard.tensors} == target
    sources = FAMILY.sources(plan.dimensions, plan.model.block_chunks)
    assert {key: info.shape for key, info in sources.items()} == source
    assert [move.source for move in plan.mapping] == list(sources)
    assert plan.config["num_attention_heads"] == golden["heads"]


def test_licences_are_the_authors() -> None:
    """DINOv2's README says Apache 2.0, Web-SSL's CC-BY-NC."""
    for model in FAMILY.models:
        assert model.licence == ("cc-by-nc-4.0" if model.name in WEB_DINO else "apache-2.0")


def transformers_config(name: str, labels: list[str]) -> transformers.PretrainedConfig:
    """The original script's configuration, by constructor arguments; with registers, its sibling's."""
    web = re.fullmatch(r"webssl_dino(\d+\w)_\w+_(\d+)", name)
    if web:  # as facebookresearch/webssl's README and vision_transformer.py have them
        hidden, layers, heads = {
            "300m": (1024, 24, 16), "1b": (1536, 40, 24), "2b": (2688, 24, 21),
            "3b": (3072, 26, 24), "5b": (3584, 32, 28), "7b": (4096, 32, 32),
        }[web[1]]  # fmt: skip
        return transformers.Dinov2Config(
            image_size=int(web[2]), patch_size=14, hidden_size=hidden, num_hidden_layers=layers,
            num_attention_heads=heads, use_swiglu_ffn=True,
        )  # fmt: skip
    sizes = {
        "s": {"hidden_size": 384, "num_attention_heads": 6},
        "b": {},
        "l": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
        "g": {"use_swiglu_ffn": True, "hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24},
    }[name[10]]
    classes = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    kind = transformers.Dinov2WithRegistersConfig if "_reg" in name else transformers.Dinov2Config
    return kind(image_size=518, patch_size=14, **sizes, **(classes if "1layer" in name else {}))


@pytest.mark.parametrize("name", MODELS)
def test_configs_are_transformers_own_but_for_the_version(name: str, tmp_path: Path) -> None:
    labels = [f"label {i % 998}" for i in range(1000)]  # two names twice, as ImageNet has them
    golden = GOLDEN[name]
    shapes = expanded(golden["source"], golden["layers"], golden.get("chunks", ()))
    plan = plan_of_shapes(shapes, tmp_path, labels=labels if "1layer" in name else None)
    config = transformers_config(name, labels)
    kind = "Dinov2WithRegisters" if "_reg" in name else "Dinov2"
    config.architectures = [f"{kind}ForImageClassification" if "1layer" in name else f"{kind}Model"]
    config.dtype = torch.float32
    config.save_pretrained(tmp_path)
    theirs = (tmp_path / "config.json").read_text("utf-8")
    lines = [line for line in theirs.splitlines(keepends=True) if '"transformers_version"' not in line]
    assert plan.small_files["config.json"].decode() == "".join(lines)


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vitg14_reg", *WEB_DINO])
def test_image_processors_are_transformers_own(name: str, tmp_path: Path) -> None:
    """Web-DINO's takes pictures at the size that the model was trained on."""
    golden = GOLDEN[name]
    resized, size = (int(name[-3:]),) * 2 if name in WEB_DINO else (256, 224)
    processor = transformers.BitImageProcessor(
        size={"shortest_edge": resized}, crop_size={"height": size, "width": size}, resample=3,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    processor.save_pretrained(tmp_path)
    theirs = json.loads((tmp_path / "preprocessor_config.json").read_text("utf-8"))
    plan = plan_of_shapes(expanded(golden["source"], golden["layers"], golden.get("chunks", ())), tmp_path)
    assert plan.small_files["preprocessor_config.json"] == to_json(theirs)


@pytest.mark.parametrize("name", WEB_DINO)
def test_shapes_that_several_models_have_are_named_after_none(name: str, tmp_path: Path) -> None:
    """Three of Web-DINO's were trained on the whole of its pictures and on two parts of it: only names tell."""
    golden = GOLDEN[name]
    plan = plan_of_shapes(expanded(golden["source"], golden["layers"], golden["chunks"]), tmp_path, "mine.pth")
    assert (plan.model is None) == (name[:14] in ("webssl_dino2b_", "webssl_dino3b_"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        NAMES.filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.lists(st.integers(0, 4), max_size=3),
            st.sampled_from([dtype for dtype in DTYPES if dtype != torch.complex64]),
        ),
        max_size=8,
    )
)
def test_files_are_laid_out_as_safetensors_lays_them_out(
    tmp_path: Path, shapes: dict[str, tuple[list[int], torch.dtype]]
) -> None:
    state = {name: torch.randint(0, 2, shape).to(dtype) for name, (shape, dtype) in shapes.items()}
    torch.save(state, tmp_path / "x.pth")
    expected = safetensors.torch.save(state, metadata={"format": "pt"})
    with streamconv.open_checkpoint(tmp_path / "x.pth") as checkpoint:
        shard = make_shard("x.safetensors", checkpoint)
        assert shard.header + b"".join(tensor.tobytes() for _, tensor in shard.tensors) == expected
        assert shard.size == len(expected)


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 cuts shards in another order; ours is 5's")
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("classes", [None, 7])
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("limit", ["100KB", "300KB", "1MB"])
def test_shards_and_index_are_those_of_save_pretrained(
    tmp_path: Path,
    save: Callable[..., tuple[Path, Path | None]],
    swiglu: bool,
    classes: int | None,
    registers: int,
    limit: str,
) -> None:
    backbone, head = save(tiny(swiglu, classes, layers=12, registers=registers))
    plan = streamconv.plan(backbone, head=head, max_shard_size=limit)
    kind = getattr(transformers, plan.architecture)
    model = kind(kind.config_class(**plan.config))
    model.save_pretrained(tmp_path / "theirs", max_shard_size=limit)
    assert plan.index == (tmp_path / "theirs" / "model.safetensors.index.json").read_bytes()
    for shard in plan.shards:
        assert (tmp_path / "theirs" / shard.filename).read_bytes().startswith(shard.header)


def test_other_sizes_are_read_from_the_shapes(save: Callable[..., tuple[Path, Path | None]]) -> None:
    backbone, _ = save(tiny(swiglu=True, layers=4))
    plan = streamconv.plan(backbone)
    assert plan.model is None
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "mlp_ratio", "use_swiglu_ffn")
    assert [plan.config[key] for key in sizes] == [128, 4, 2, 56, 4, True]


def test_missing_unexpected_and_misshaped_keys_are_all_listed(tmp_path: Path) -> None:
    backbone, _ = make_states(tiny())
    del backbone["blocks.1.ls1.gamma"], backbone["norm.bias"]
    backbone["register_token"] = torch.zeros(1, 4, 128)
    backbone["blocks.2.mlp.fc1.bias"] = torch.zeros(3)
    torch.save(backbone, tmp_path / "x.pth")
    with pytest.raises(MappingError) as caught:
        streamconv.plan(tmp_path / "x.pth")
    assert sorted(caught.value.problems) == [
        "misshaped: blocks.2.mlp.fc1.bias is [3], not [512]",
        "missing: blocks.1.ls1.gamma [128]",
        "missing: norm.bias [128]",
        "unexpected: register_token [1, 4, 128]",
    ]


def test_sizes_that_no_config_can_say_are_listed_with_the_rest(tmp_path: Path) -> None:
    backbone, _ = make_states(tiny())
    del backbone["norm.bias"]
    backbone["pos_embed"] = torch.zeros(1, 18, 128)
    backbone["patch_embed.proj.weight"] = torch.zeros(128, 4, 14, 14)
    torch.save(backbone, tmp_path / "x.pth")
    with pytest.raises(MappingError) as caught:
        streamconv.plan(tmp_path / "x.pth")
    assert len(caught.value.problems) == 3
    for says in ("18 positions", "4 channels", "missing: norm.bias"):
        assert says in str(caught.value)


def test_a_backbone_with_a_head_inside_is_refused(tmp_path: Path) -> None:
    backbone, _ = make_states(tiny())
    torch.save({**backbone, "linear_head.weight": torch.zeros(3, 256)}, tmp_path / "x.pth")
    with pytest.raises(MappingError, match=r"unexpected: linear_head\.weight"):
        streamconv.plan(tmp_path / "x.pth")


def test_another_kind_of_checkpoint_is_called_that(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "x.pth")
    with pytest.raises(MappingError, match=r"It holds weight, bias; for dinov2 it lacks"):
        streamconv.plan(tmp_path / "x.pth")


def test_sizes_that_no_config_can_say_are_refused(tmp_path: Path) -> None:
    backbone, _ = make_states(tiny())
    backbone["pos_embed"] = torch.zeros(1, 18, 128)
    torch.save(backbone, tmp_path / "x.pth")
    with pytest.raises(MappingError, match="18 positions"):
        streamconv.plan(tmp_path / "x.pth")


def test_a_name_whose_file_holds_another_model_is_refused(tmp_path: Path) -> None:
    shapes = expanded(GOLDEN["dinov2_vitb14"]["source"], 12)
    with pytest.raises(MappingError, match="its shapes are those of dinov2_vitb14"):
        plan_of_shapes(shapes, tmp_path, model=find_model("dinov2_vits14")[1])


@pytest.mark.parametrize(
    ("size", "count"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("20KB", 20_000), ("2TB", 2 * 10**12), (300, 300)]
)
def test_shard_sizes_are_huggingface_hubs(size: int | str, count: int) -> None:
    assert parse_size(size) == count


@pytest.mark.parametrize("size", ["five", "5XB", "-1GB", "0MB", ""])
def test_a_shard_size_that_is_none_is_refused(save: Callable[..., tuple[Path, Path | None]], size: str) -> None:
    backbone, _ = save(tiny())
    with pytest.raises(UsageError, match="500MB or 5GB"):
        streamconv.plan(backbone, max_shard_size=size)


def test_labels_are_one_a_class(tmp_path: Path, save: Callable[..., tuple[Path, Path | None]]) -> None:
    backbone, head = save(tiny(classes=3))
    (tmp_path / "labels.txt").write_text("a\nb\n")
    with pytest.raises(UsageError, match="2 labels for 3 classes"):
        streamconv.plan(backbone, head=head, labels=tmp_path / "labels.txt")
    (tmp_path / "labels.txt").write_text("a\nb\na\n")
    config = streamconv.plan(backbone, head=head, labels=tmp_path / "labels.txt").config
    assert config["id2label"] == {0: "a", 1: "b", 2: "a"}
    assert config["label2id"] == {"a": 2, "b": 1}


def test_the_seeds_names_are_the_rules_names() -> None:
    for geometry in (tiny(), tiny(swiglu=True)):
        backbone, _ = make_states(geometry)
        layout = FAMILY.layout(geometry)
        targets = {t.format(i=i) for rule in layout.rules for t in rule.targets for i in range(layout.count)}
        assert targets == set(seeds_mapping(backbone))
