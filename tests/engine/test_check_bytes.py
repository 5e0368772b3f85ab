"""The bytes check: every difference between an output and its source is found and named, without a forward pass."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from streamconv import CorruptError, SourceOptions
from streamconv.formats.safetensors import INDEX_NAME
from streamconv.jobs.options import ConversionOptions
from streamconv.jobs.prepare import prepared_source
from streamconv.jobs.recorded import recorded_options
from streamconv.planning.plan import Plan
from streamconv.progress import ignore_progress
from streamconv.verification.bytes import compare_with_source
from streamconv.verification.config import check_config
from tests import api
from tests.checkpoints import State, alter, make_states
from tests.support import Save, byte_problems, flip, tiny

Converted = tuple[Path, Path]  # the folder and its source


@pytest.fixture
def converted(tmp_path: Path, save: Save) -> Converted:
    backbone, _ = save(tiny())
    api.convert(backbone, tmp_path / "out")
    return tmp_path / "out", backbone


def test_correct_output_has_no_differences(converted: Converted) -> None:
    assert byte_problems(*converted) == ""


@pytest.mark.parametrize(
    "name",
    ["embeddings.mask_token", "encoder.layer.1.attention.attention.key.weight", "layernorm.bias",
     "embeddings.register_tokens", "encoder.layer.2.mlp.weights_in.weight", "classifier.weight"],
)  # fmt: skip
def test_flipped_bit_anywhere_is_found_and_named(tmp_path: Path, save: Save, name: str) -> None:
    backbone, head = save(tiny(swiglu=True, registers=4, classes=5))
    api.convert(backbone, tmp_path / "out", head=head)
    key = name if name.startswith("classifier.") else f"dinov2_with_registers.{name}"

    def flip_bit(state: State) -> None:
        state[key].view(torch.int32).flatten()[7] ^= 1

    alter(tmp_path / "out", flip_bit)
    assert f"{key} differs from its source from element 7 on" in byte_problems(tmp_path / "out", backbone, head)


def test_missing_and_extra_tensors_are_named(converted: Converted) -> None:
    alter(converted[0], lambda state: state.update(extra=state.pop("encoder.layer.2.norm1.bias")))
    found = byte_problems(*converted)
    assert "encoder.layer.2.norm1.bias is missing" in found
    assert "extra is unexpected" in found


def test_other_dtype_is_named(converted: Converted) -> None:
    alter(converted[0], lambda state: state.update({"layernorm.weight": state["layernorm.weight"].double()}))
    assert "layernorm.weight is F64 [128], not F32 [128]" in byte_problems(*converted)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_attention_heads", 4),
        ("layer_norm_eps", 1e-5),
        ("image_size", 42),
        ("hidden_act", "relu"),
        ("use_swiglu_ffn", True),
        ("stage_names", []),
    ],
)
def test_wrong_config_value_is_named(converted: Converted, field: str, value: object) -> None:
    path = converted[0] / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    assert f"config.json: {field} is {json.dumps(value)}" in byte_problems(*converted)


def test_transformers_version_in_config_is_ignored(converted: Converted) -> None:
    path = converted[0] / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "transformers_version": "5.0.0"}))
    assert byte_problems(*converted) == ""


@pytest.mark.parametrize("tensor", ["mask_token", "blocks.1.mlp.fc1.weight"])
def test_damaged_source_is_an_error_and_not_a_difference(converted: Converted, tensor: str) -> None:
    flip(converted[1], tensor, 0)
    with pytest.raises(CorruptError, match=r"is damaged: .* does not match its CRC-32\. Fetch"):
        byte_problems(*converted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("total_size", INDEX_NAME),
        ("place", "model-00001-of-00009.safetensors: there is no such file"),
        ("name", f"{INDEX_NAME} disagree on 1 tensors: 'layernorm.bias'"),
    ],
)
def test_wrong_index_is_named(tmp_path: Path, save: Save, change: str, message: str) -> None:
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
    assert message in byte_problems(tmp_path / "out", backbone)


def test_weights_that_transformers_would_load_instead_are_found(tmp_path: Path, save: Save) -> None:
    """transformers prefers model.safetensors to an index. It ignores a stray shard, which is reported all the same."""
    backbone, _ = save(tiny())
    api.convert(backbone, tmp_path / "sharded", max_shard_size="300KB")
    api.convert(backbone, tmp_path / "single")
    (tmp_path / "sharded" / "model.safetensors").write_bytes((tmp_path / "single" / "model.safetensors").read_bytes())
    alter(tmp_path / "sharded", lambda state: state["embeddings.mask_token"].add_(1))
    found = byte_problems(tmp_path / "sharded", backbone)
    assert "embeddings.mask_token differs" in found
    assert "model.safetensors.index.json is not part of the model" in found
    safetensors.torch.save_file({"x": torch.ones(1)}, tmp_path / "single" / "model-00001-of-00002.safetensors")
    found = byte_problems(tmp_path / "single", backbone)
    assert found == "model-00001-of-00002.safetensors is not part of the model"


def test_swapped_labels_are_found(tmp_path: Path, save: Save) -> None:
    backbone, head = save(tiny(classes=3))
    api.convert(backbone, tmp_path / "out", head=head)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["id2label"] |= {"0": "LABEL_1", "1": "LABEL_0"}
    config["label2id"] |= {"LABEL_1": 0, "LABEL_0": 1}
    path.write_text(json.dumps(config))
    assert (
        byte_problems(tmp_path / "out", backbone, head) == "the labels in config.json are not those in streamconv.json"
    )
    del config["id2label"]["2"]
    path.write_text(json.dumps(config))
    assert "config.json: id2label.0 is" in byte_problems(tmp_path / "out", backbone, head)


def test_output_that_contradicts_its_manifest_is_found(tmp_path: Path, save: Save) -> None:
    """If weights and source are both replaced, they match each other, but not the folder's manifest."""
    backbone, _ = save(tiny())
    torch.save(make_states(tiny(), seed=1)[0], tmp_path / "other.pth")
    api.convert(backbone, tmp_path / "out")
    api.convert(tmp_path / "other.pth", tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "out" / "model.safetensors")
    found = byte_problems(tmp_path / "out", tmp_path / "other.pth")
    assert found == "the sha256 of model.safetensors is not the one in streamconv.json"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_config.json"])
def test_files_that_transformers_might_load_instead_are_named(converted: Converted, name: str) -> None:
    (converted[0] / name).write_text("{}")
    assert f"{name} is not part of the model" in byte_problems(*converted)


def test_trailing_bytes_and_other_metadata_are_named(converted: Converted) -> None:
    path = converted[0] / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data + b"123456789")
    assert "model.safetensors has 9 bytes at its end that belong to no tensor" in byte_problems(*converted)
    path.write_bytes(data.replace(b'{"format":"pt"}', b'{"format":"xy"}', 1))
    assert 'model.safetensors has the metadata {"format": "xy"}' in byte_problems(*converted)


def test_json_values_of_another_type_are_differences(converted: Converted) -> None:
    """True equals 1 and 56 equals 56.0 in Python, but not in JSON."""
    path = converted[0] / "preprocessor_config.json"
    path.write_text(path.read_text().replace('"do_resize": true', '"do_resize": 1'))
    assert "preprocessor_config.json: do_resize is 1, not true" in byte_problems(*converted)


def test_shards_that_contradict_the_index_are_named(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    api.convert(backbone, tmp_path / "out", max_shard_size="1MB")
    path = tmp_path / "out" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = min(index["weight_map"])
    index["weight_map"][name] = next(v for v in index["weight_map"].values() if v != index["weight_map"][name])
    path.write_text(json.dumps(index))
    text = byte_problems(tmp_path / "out", backbone)
    assert f"{path.name} disagree on 1 tensors: '{name}'" in text


def test_many_differing_labels_are_named_and_counted(tmp_path: Path, save: Save) -> None:
    backbone, head = save(tiny(classes=8))
    api.convert(backbone, tmp_path / "out", head=head)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["id2label"] = dict.fromkeys(config["id2label"], "x")
    path.write_text(json.dumps(config))
    text = byte_problems(tmp_path / "out", backbone, head)
    assert "config.json: label2id.LABEL_0 is 0, not absent" in text
    assert "config.json: label2id has 4 more differences" in text


@pytest.mark.parametrize("tensor", ["embeddings.mask_token", "encoder.layer.1.mlp.fc2.weight"])
def test_flipped_bit_in_a_cast_output_is_found(tmp_path: Path, save: Save, tensor: str) -> None:
    source, _ = save(tiny())
    api.convert(source, tmp_path / "out", dtype="bfloat16")
    flip(tmp_path / "out" / "model.safetensors", tensor, 100)
    found = byte_problems(tmp_path / "out", source)
    assert found.splitlines()[0] == f"{tensor} differs from its source, cast to bfloat16, from element 50 on"


def test_dtype_in_config_that_contradicts_the_tensors_is_found(tmp_path: Path, save: Save) -> None:
    source, _ = save(tiny())
    api.convert(source, tmp_path / "out", dtype="bfloat16")
    path = tmp_path / "out" / "config.json"
    good = json.loads(path.read_bytes())
    for dtype in ("float16", "float32", "float64", ["bfloat16"], None):
        path.write_text(json.dumps({**good, "dtype": dtype}))
        assert byte_problems(tmp_path / "out", source), dtype


def test_size_of_all_tensors_is_computed_once(converted: Converted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Summing it for each progress report of ViT-g took almost as long as comparing its bytes."""
    folder, source = converted
    with prepared_source(source, ConversionOptions(), ignore_progress) as prepared:
        plan = prepared.plan
        calls, weights = [], plan.weights
        monkeypatch.setattr(Plan, "weights", property(lambda _: calls.append("sum") or weights))
        reports: list[tuple[str, int, int, str]] = []
        compare_with_source(folder, plan, prepared.source.reader, True, lambda *report: reports.append(report))
    assert reports[-1] == ("comparing bytes", weights, weights, "bytes")
    assert len(reports) > len(calls) == 1


def test_bytes_check_covers_tensors_and_config_check_the_small_files(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    folder = api.convert(backbone, tmp_path / "out", max_shard_size="300KB").output
    options = recorded_options(folder, SourceOptions())

    def found() -> tuple[bool | None, bool | None, int]:
        with prepared_source(backbone, options, ignore_progress) as prepared:
            plan, reader = prepared.plan, prepared.source.reader
            check, _ = compare_with_source(folder, plan, reader, True, ignore_progress)
            return check.passed, check_config(folder, plan).passed, check.numbers["wrong"]

    assert found() == (True, True, 0)
    for name in ("config.json", "preprocessor_config.json", INDEX_NAME):
        text = (folder / name).read_text()
        (folder / name).write_text(json.dumps({**json.loads(text), "extra": 1}))
        assert found() == (True, False, 0)
        (folder / name).write_text(text)
    (folder / "streamconv.json").unlink()  # which has the sha256 of the weights
    (shard,) = (path for path in folder.glob("*.safetensors") if "layernorm.bias" in safetensors.torch.load_file(path))
    flip(shard, "layernorm.bias", 1)
    assert found() == (False, True, 1)
