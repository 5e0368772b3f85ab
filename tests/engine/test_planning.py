"""Plans against what transformers, huggingface_hub and safetensors write."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import streamconv
from streamconv import MappingError, UsageError
from streamconv.families.dinov2 import FAMILY
from streamconv.planning.shards import make_shard, to_json
from streamconv.source.cache import torch_hub_cache
from streamconv.source.labels import imagenet_labels
from streamconv.tensors.evaluation import read_bytes
from tests import api
from tests.checkpoints import DTYPES, NAMES, make_states, original_mapping
from tests.support import GOLDEN, MODELS, WEB_DINO, Save, expanded, plan_of_shapes, tiny


def transformers_config(name: str, labels: list[str]) -> transformers.PretrainedConfig:
    """Return the configuration that the original script makes, or with registers, its sister script."""
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


def repeated(names: list[str], *several: str) -> list[Any]:
    """Return parameters of which ``several`` are tested again with another version of transformers."""
    return [pytest.param(name, marks=[pytest.mark.transformers] if name in several else []) for name in names]


@pytest.mark.parametrize(
    "name", repeated(MODELS, "dinov2_vits14", "dinov2_vitb14_reg", "dinov2_vitl14_1layer", "dinov2_vitg14_reg_1layer")
)
def test_configs_equal_those_of_transformers_except_for_the_version(name: str, tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    "name", repeated(["dinov2_vits14", "dinov2_vitg14_reg", *WEB_DINO], "dinov2_vits14", WEB_DINO[0])
)
def test_image_processors_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Web-DINO's image processors use the size that each model was trained on."""
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
def test_shard_layout_equals_that_of_safetensors(
    tmp_path: Path, shapes: dict[str, tuple[list[int], torch.dtype]]
) -> None:
    state = {name: torch.randint(0, 2, shape).to(dtype) for name, (shape, dtype) in shapes.items()}
    torch.save(state, tmp_path / "x.pth")
    expected = safetensors.torch.save(state, metadata={"format": "pt"})
    with streamconv.open_checkpoint(tmp_path / "x.pth") as checkpoint:
        shard = make_shard("x.safetensors", checkpoint)
        assert shard.header + b"".join(read_bytes(tensor) for _, tensor in shard.tensors) == expected
        assert shard.size == len(expected)


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 cuts shards in another order; ours is 5's")
@pytest.mark.parametrize(
    ("swiglu", "classes", "registers", "limit"),
    [(False, None, 0, "100KB"), (True, 7, 4, "100KB"), (False, 7, 0, "300KB"), (True, None, 4, "300KB"),
     (True, None, 0, "1MB"), (False, 7, 4, "1MB")],
)  # fmt: skip
def test_shards_and_index_equal_those_of_save_pretrained(
    tmp_path: Path,
    save: Callable[..., tuple[Path, Path | None]],
    swiglu: bool,
    classes: int | None,
    registers: int,
    limit: str,
) -> None:
    backbone, head = save(tiny(swiglu, classes, layers=12, registers=registers))
    plan = api.plan(backbone, head=head, max_shard_size=limit)
    kind = getattr(transformers, plan.architecture)
    model = kind(kind.config_class(**plan.config))
    model.save_pretrained(tmp_path / "theirs", max_shard_size=limit)
    assert plan.index == (tmp_path / "theirs" / "model.safetensors.index.json").read_bytes()
    for shard in plan.shards:
        assert (tmp_path / "theirs" / shard.filename).read_bytes().startswith(shard.header)


def test_unpublished_sizes_are_read_from_the_shapes(save: Callable[..., tuple[Path, Path | None]]) -> None:
    backbone, _ = save(tiny(swiglu=True, layers=4))
    plan = api.plan(backbone)
    assert plan.model is None
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "mlp_ratio", "use_swiglu_ffn")
    assert [plan.config[key] for key in sizes] == [128, 4, 2, 56, 4, True]


def test_missing_unexpected_and_mismatched_keys_are_all_listed(tmp_path: Path) -> None:
    backbone, _ = make_states(tiny())
    del backbone["blocks.1.ls1.gamma"], backbone["norm.bias"]
    backbone["register_token"] = torch.zeros(1, 4, 128)
    backbone["blocks.2.mlp.fc1.bias"] = torch.zeros(3)
    torch.save(backbone, tmp_path / "x.pth")
    with pytest.raises(MappingError) as caught:
        api.plan(tmp_path / "x.pth")
    assert sorted(caught.value.problems) == [
        "missing: blocks.1.ls1.gamma [128]",
        "missing: norm.bias [128]",
        "unexpected: register_token [1, 4, 128]",
        "wrong shape: blocks.2.mlp.fc1.bias is [3], not [512]",
    ]


def test_sizes_that_no_config_can_express_are_listed_with_other_problems(tmp_path: Path) -> None:
    backbone, _ = make_states(tiny())
    del backbone["norm.bias"]
    backbone["pos_embed"] = torch.zeros(1, 18, 128)
    torch.save(backbone, tmp_path / "x.pth")
    with pytest.raises(MappingError) as caught:
        api.plan(tmp_path / "x.pth")
    assert len(caught.value.problems) == 2
    for message in ("18 positions", "missing: norm.bias"):
        assert message in str(caught.value)


def test_backbone_with_half_a_head_inside_is_refused(tmp_path: Path) -> None:
    backbone, _ = make_states(tiny())
    torch.save({**backbone, "linear_head.weight": torch.zeros(3, 256)}, tmp_path / "x.pth")
    with pytest.raises(MappingError, match=r"(?s)more than a backbone\..*linear_head\.weight \[3, 256\]"):
        api.plan(tmp_path / "x.pth")


def test_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)).state_dict(), tmp_path / "x.pth")
    with pytest.raises(MappingError, match=r"It holds 0\.weight, 0\.bias; for dinov2 it lacks"):
        api.plan(tmp_path / "x.pth")


def test_sizes_that_no_config_can_express_are_refused(tmp_path: Path) -> None:
    backbone, _ = make_states(tiny())
    backbone["pos_embed"] = torch.zeros(1, 18, 128)
    torch.save(backbone, tmp_path / "x.pth")
    with pytest.raises(MappingError, match="18 positions"):
        api.plan(tmp_path / "x.pth")


@pytest.mark.parametrize("size", ["five", "5XB", "-1GB", "0MB", ""])
def test_invalid_shard_size_is_refused(save: Callable[..., tuple[Path, Path | None]], size: str) -> None:
    backbone, _ = save(tiny())
    with pytest.raises(UsageError, match="500MB or 5GB"):
        api.plan(backbone, max_shard_size=size)


def test_one_label_per_class_is_required(tmp_path: Path, save: Callable[..., tuple[Path, Path | None]]) -> None:
    backbone, head = save(tiny(classes=3))
    (tmp_path / "labels.txt").write_text("a\nb\n")
    with pytest.raises(UsageError, match="2 labels for 3 classes"):
        api.plan(backbone, head=head, labels=tmp_path / "labels.txt")
    (tmp_path / "labels.txt").write_text("a\nb\na\n")
    config = api.plan(backbone, head=head, labels=tmp_path / "labels.txt").config
    assert config["id2label"] == {0: "a", 1: "b", 2: "a"}
    assert config["label2id"] == {"a": 2, "b": 1}


def test_rules_use_the_names_of_the_original_script() -> None:
    for geometry in (tiny(), tiny(swiglu=True)):
        backbone, _ = make_states(geometry)
        spec = FAMILY.conversion_spec(geometry)
        targets = {t.format(i=i) for rule in spec.rules for t in rule.targets for i in range(spec.counts["i"])}
        assert targets == set(original_mapping(backbone))


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 cuts shards in another order; ours is 5's")
@pytest.mark.parametrize("limit", ["150KB", "1MB", "5GB"])
@pytest.mark.parametrize("swiglu", [False, True])
def test_folder_equals_what_save_pretrained_writes(tmp_path: Path, save: Save, limit: str, swiglu: bool) -> None:
    backbone, _ = save(tiny(swiglu, layers=11))
    done = api.convert(backbone, tmp_path / "ours", max_shard_size=limit)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**done.plan.config))
    state = original_mapping(torch.load(backbone, weights_only=True))
    model = transformers.Dinov2Model.from_pretrained(None, config=model.config, state_dict=state)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=limit)
    names = {path.name for path in (tmp_path / "theirs").iterdir()} - {"config.json"}
    ours = {path.name for path in (tmp_path / "ours").iterdir()}
    assert ours == names | {"config.json", "preprocessor_config.json", "streamconv.json"}
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name


def test_labels_fall_back_to_torchvision_without_a_network() -> None:
    labels, origin = imagenet_labels()
    assert labels == torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]
    assert origin.startswith("torchvision")


@pytest.mark.parametrize(
    "variables",
    [{}, {"TORCH_HOME": "/tmp/torch-home"}, {"XDG_CACHE_HOME": "/tmp/cache"}, {"TORCH_HOME": "~/x"}],
    ids=str,
)
def test_cache_folder_is_that_of_torch_hub(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(torch_hub_cache()) == f"{torch.hub.get_dir()}/checkpoints"
