"""The bytes check: every difference between an output and its source is found and named, without torch."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

import streamconv
from tests import api
from tests.checkpoints import State, alter, make_states
from tests.support import Save, flip, problems, tiny, verdicts


@pytest.fixture(
    params=[(False, None, 0), (True, None, 0), (False, 5, 0), (False, None, 4), (True, 5, 4)],
    ids=["mlp", "swiglu", "classifier", "registers", "swiglu-registers-classifier"],
)
def converted(request: pytest.FixtureRequest, tmp_path: Path, save: Save) -> tuple[Path, Path, Path | None]:
    """A converted folder, and the two files that it was made from."""
    swiglu, classes, registers = request.param
    backbone, head = save(tiny(swiglu, classes, registers=registers))
    api.convert(backbone, tmp_path / "out", head=head)
    return tmp_path / "out", backbone, head


def key(converted: tuple[Path, Path, Path | None], name: str) -> str:
    prefix = json.loads((converted[0] / "config.json").read_text())["model_type"] + "."
    return (prefix if converted[2] else "") + name


@pytest.mark.parametrize(
    "name",
    [
        "embeddings.mask_token",
        "encoder.layer.1.attention.attention.key.weight",
        "layernorm.bias",
        "embeddings.cls_token",
    ],
)
def test_flipped_bit_anywhere_is_found_and_named(converted: tuple[Path, Path, Path | None], name: str) -> None:
    folder, backbone, head = converted

    def flip(state: State) -> None:
        state[key(converted, name)].view(torch.int32).flatten()[7] ^= 1

    alter(folder, flip)
    found = api.verify(folder, backbone, head=head, device="cpu")
    assert not found.passed
    assert f"{key(converted, name)} differs from its source from element 7 on" in problems(found)


def test_missing_and_extra_tensors_are_named(converted: tuple[Path, Path, Path | None]) -> None:
    folder, backbone, head = converted
    name = key(converted, "encoder.layer.2.norm1.bias")
    alter(folder, lambda state: state.update(extra=state.pop(name)))
    found = api.verify(folder, backbone, head=head, device="cpu")
    assert verdicts(found) == {"bytes": False, "load": False, "parity": None, "preprocessing": None}
    assert f"{name} is missing" in problems(found)
    assert "extra should not be there" in problems(found)
    assert "missing_keys" in problems(found)


def test_other_dtype_is_named(converted: tuple[Path, Path, Path | None]) -> None:
    folder, backbone, head = converted
    name = key(converted, "layernorm.weight")
    alter(folder, lambda state: state.update({name: state[name].double()}))
    found = api.verify(folder, backbone, head=head, device="cpu")
    assert f"{name} is F64 [128], not F32 [128]" in problems(found)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_attention_heads", 4),
        ("layer_norm_eps", 1e-5),
        ("image_size", 42),
        ("hidden_act", "relu"),
        ("use_swiglu_ffn", None),
        ("stage_names", []),
    ],
)
def test_wrong_config_value_is_named(converted: tuple[Path, Path, Path | None], field: str, value: object) -> None:
    folder, backbone, head = converted
    config = json.loads((folder / "config.json").read_text())
    value = not config[field] if value is None else value
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    found = api.verify(folder, backbone, head=head, device="cpu")
    assert not found.passed
    assert f"config.json: {field} is {json.dumps(value)}" in problems(found)


def test_transformers_version_in_config_is_no_difference(converted: tuple[Path, Path, Path | None]) -> None:
    folder, backbone, head = converted
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "5.0.0"}))
    assert api.verify(folder, backbone, head=head, device="cpu").passed


def test_damaged_source_is_found(converted: tuple[Path, Path, Path | None]) -> None:
    folder, backbone, head = converted
    with streamconv.open_checkpoint(backbone) as checkpoint:
        at = checkpoint["mask_token"].record.range.start
    data = bytearray(backbone.read_bytes())
    data[at] ^= 1
    backbone.write_bytes(data)
    found = api.verify(folder, backbone, head=head, device="cpu")
    assert not found.passed
    assert "does not match its CRC-32" in problems(found)


@pytest.mark.parametrize("change", ["total_size", "place", "name"])
def test_wrong_index_is_named(tmp_path: Path, save: Save, change: str) -> None:
    backbone, _ = save(tiny())
    api.convert(backbone, tmp_path / "out", max_shard_size="300KB")
    path = tmp_path / "out" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    if change == "total_size":
        index["metadata"]["total_size"] = 7
    elif change == "place":
        index["weight_map"]["layernorm.bias"] = "model-00001-of-00009.safetensors"
    else:
        del index["weight_map"]["layernorm.bias"]
    path.write_text(json.dumps(index))
    assert not api.verify(tmp_path / "out", backbone, device="cpu").passed


def test_weights_that_transformers_would_load_instead_are_found(tmp_path: Path, save: Save) -> None:
    """Beside an index, transformers takes a model.safetensors; a stray shard is taken by no one, and told."""
    backbone, _ = save(tiny())
    api.convert(backbone, tmp_path / "sharded", max_shard_size="300KB")
    api.convert(backbone, tmp_path / "single")
    (tmp_path / "sharded" / "model.safetensors").write_bytes((tmp_path / "single" / "model.safetensors").read_bytes())
    alter(tmp_path / "sharded", lambda state: state["embeddings.mask_token"].add_(1))
    found = api.verify(tmp_path / "sharded", backbone, device="cpu")
    assert "embeddings.mask_token differs" in problems(found)
    assert "model.safetensors.index.json is no part of the model" in problems(found)
    safetensors.torch.save_file({"x": torch.ones(1)}, tmp_path / "single" / "model-00001-of-00002.safetensors")
    found = api.verify(tmp_path / "single", backbone, device="cpu")
    assert problems(found) == "model-00001-of-00002.safetensors is no part of the model"


def test_swapped_labels_are_found(tmp_path: Path, save: Save) -> None:
    backbone, head = save(tiny(classes=3))
    api.convert(backbone, tmp_path / "out", head=head)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["id2label"] |= {"0": "LABEL_1", "1": "LABEL_0"}
    config["label2id"] |= {"LABEL_1": 0, "LABEL_0": 1}
    path.write_text(json.dumps(config))
    found = api.verify(tmp_path / "out", backbone, head=head, device="cpu")
    assert problems(found) == "config.json has other labels than streamconv.json says"
    del config["id2label"]["2"]
    path.write_text(json.dumps(config))
    assert "config.json: id2label.0 is" in problems(api.verify(tmp_path / "out", backbone, head=head, device="cpu"))


def test_output_that_contradicts_its_manifest_is_found(tmp_path: Path, save: Save) -> None:
    """Weights and source exchanged together agree with each other, and not with the folder's own word."""
    backbone, _ = save(tiny())
    torch.save(make_states(tiny(), seed=1)[0], tmp_path / "other.pth")
    api.convert(backbone, tmp_path / "out")
    api.convert(tmp_path / "other.pth", tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "out" / "model.safetensors")
    found = api.verify(tmp_path / "out", tmp_path / "other.pth", device="cpu")
    assert problems(found) == "model.safetensors has another sha256 than streamconv.json says"


@pytest.mark.parametrize(
    ("name", "says"),
    [("pytorch_model.bin", "no part of the model"), ("adapter_config.json", "no part of the model")],
)
def test_files_that_transformers_might_load_instead_are_named(tmp_path: Path, save: Save, name: str, says: str) -> None:
    backbone, _ = save(tiny())
    api.convert(backbone, tmp_path / "out")
    (tmp_path / "out" / name).write_text("{}")
    assert f"{name} is {says}" in problems(api.verify(tmp_path / "out", backbone, device="cpu"))


def test_trailing_bytes_and_other_metadata_are_named(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    api.convert(backbone, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data + b"123456789")
    found = api.verify(tmp_path / "out", backbone, device="cpu")
    assert "model.safetensors has 9 bytes at its end that belong to no tensor" in problems(found)
    path.write_bytes(data.replace(b'{"format":"pt"}', b'{"format":"tf"}', 1))
    found = api.verify(tmp_path / "out", backbone, device="cpu")
    assert not found.checks[0].passed
    assert 'model.safetensors has the metadata {"format": "tf"}' in problems(found)


def test_json_values_of_another_type_are_differences(tmp_path: Path, save: Save) -> None:
    """True equals 1 and 56 equals 56.0 in Python; in JSON they do not."""
    backbone, _ = save(tiny())
    api.convert(backbone, tmp_path / "out")
    path = tmp_path / "out" / "preprocessor_config.json"
    path.write_text(path.read_text().replace('"do_resize": true', '"do_resize": 1'))
    found = api.verify(tmp_path / "out", backbone, device="cpu")
    assert "preprocessor_config.json: do_resize is 1, not true" in problems(found)


def test_shards_that_contradict_the_index_are_named(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    api.convert(backbone, tmp_path / "out", max_shard_size="1MB")
    path = tmp_path / "out" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = min(index["weight_map"])
    index["weight_map"][name] = next(v for v in index["weight_map"].values() if v != index["weight_map"][name])
    path.write_text(json.dumps(index))
    text = problems(api.verify(tmp_path / "out", backbone, device="cpu"))
    assert f"{path.name} disagree on 1 tensors: '{name}'" in text


def test_many_differing_labels_are_named_and_counted(tmp_path: Path, save: Save) -> None:
    backbone, head = save(tiny(classes=8))
    api.convert(backbone, tmp_path / "out", head=head)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["id2label"] = dict.fromkeys(config["id2label"], "x")
    path.write_text(json.dumps(config))
    text = problems(api.verify(tmp_path / "out", backbone, head=head, device="cpu"))
    assert "config.json: label2id.LABEL_0 is 0, not absent" in text
    assert "config.json: label2id differs in 4 more" in text


@pytest.mark.parametrize("tensor", ["embeddings.mask_token", "encoder.layer.1.mlp.fc2.weight"])
def test_flipped_bit_in_a_cast_output_is_found(tmp_path: Path, save: Save, tensor: str) -> None:
    source, _ = save(tiny())
    api.convert(source, tmp_path / "out", dtype="bfloat16")
    flip(tmp_path / "out" / "model.safetensors", tensor, 100)
    found = api.verify(tmp_path / "out", source, device="cpu", parity=False)
    assert found.checks[0].passed is False
    assert f"{tensor} differs from its source, cast to BF16, from element 50 on" in found.checks[0].problems
    if "weight" in tensor:
        parity = api.verify(tmp_path / "out", source, device="cpu").checks[2]
        assert parity.passed is False
        assert "the first difference is in layer 1" in parity.problems[0]


def test_dtype_in_config_that_contradicts_the_tensors_is_found(tmp_path: Path, save: Save) -> None:
    source, _ = save(tiny())
    api.convert(source, tmp_path / "out", dtype="bfloat16")
    path = tmp_path / "out" / "config.json"
    good = json.loads(path.read_bytes())
    for dtype in ("float16", "float32", "float64", ["bfloat16"], None):
        path.write_text(json.dumps({**good, "dtype": dtype}))
        bytes_rung = api.verify(tmp_path / "out", source, device="cpu", parity=False).checks[0]
        assert bytes_rung.passed is False, dtype
