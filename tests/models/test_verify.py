"""Verification passes what is right, and names what is wrong."""

import base64
import functools
import hashlib
import http.server
import io
import json
import os
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from PIL import Image

import streamconv
from streamconv import OutputError, UsageError, Verification
from streamconv.verification.devices import choose_device
from streamconv.verification.image import make_image, open_image
from streamconv.verification.originals import dinov2
from streamconv.verification.preprocessing import original_pixels
from tests.conftest import make_states, tiny

Save = Callable[..., tuple[Path, Path | None]]
State = dict[str, torch.Tensor]


@pytest.fixture(
    params=[(False, None, 0), (True, None, 0), (False, 5, 0), (False, None, 4), (True, 5, 4)],
    ids=["mlp", "swiglu", "classifier", "registers", "swiglu-registers-classifier"],
)
def converted(request: pytest.FixtureRequest, tmp_path: Path, save: Save) -> tuple[Path, Path, Path | None]:
    """A converted folder, and the two files that it was made from."""
    swiglu, classes, registers = request.param
    backbone, head = save(tiny(swiglu, classes, registers=registers))
    streamconv.convert(backbone, tmp_path / "out", head=head)
    return tmp_path / "out", backbone, head


def verdicts(found: Verification) -> dict[str, bool | None]:
    return {check.name: check.passed for check in found.checks}


def problems(found: Verification) -> str:
    return "\n".join(problem for check in found.checks for problem in check.problems)


def alter(folder: Path, change: Callable[[State], object]) -> None:
    path = folder / "model.safetensors"
    state = safetensors.torch.load_file(path)
    change(state)
    safetensors.torch.save_file(state, path, metadata={"format": "pt"})


def test_a_right_conversion_passes_every_rung_exactly(converted: tuple[Path, Path, Path | None]) -> None:
    folder, backbone, head = converted
    found = streamconv.verify(folder, backbone, head=head, device="cpu")
    assert verdicts(found) == {"bytes": True, "load": True, "parity": True, "preprocessing": True}
    parity = found.checks[2].numbers
    has_registers = "registers" in json.loads((folder / "config.json").read_text())["model_type"]
    states = ["embeddings", "layer 0", "layer 1", "layer 2", "cls", *(["registers"] if has_registers else [])]
    states += ["patches", *(["logits"] if head else [])]
    assert list(parity["differences"]) == states
    if parity["tolerance"] == 0.0:
        assert parity["differences"] == dict.fromkeys(states, 0.0)
    assert found.passed
    assert json.loads(json.dumps(found.as_dict()))["passed"] is True
    assert len(found.predictions) == (5 if head else 0)


def test_a_float32_that_rounds_otherwise_is_settled_in_float64(tmp_path: Path, save: Save) -> None:
    """transformers 5 splits SwiGLU's first layer, and 344 columns are rounded otherwise than 688 on some CPUs."""
    backbone, _ = save(tiny(swiglu=True))
    streamconv.convert(backbone, tmp_path / "out")
    found = streamconv.verify(tmp_path / "out", backbone, device="cpu").checks[2]
    assert found.passed
    if "float32" in found.numbers:
        assert 0 < found.numbers["float32"]["largest"] < 1e-5
        assert found.numbers["largest"] < found.numbers["tolerance"] == 1e-13

    def nudge(state: State) -> None:  # the last bit of one weight
        state["encoder.layer.0.mlp.weights_in.weight"].view(torch.int32)[5, 5] ^= 1

    alter(tmp_path / "out", nudge)
    if "float32" in found.numbers:  # in float32 alone, such a bit can be lost: the bytes rung is there for it
        assert not streamconv.verify(tmp_path / "out", backbone, device="cpu").checks[2].passed


def test_where_the_files_put_their_weights_makes_no_difference(tmp_path: Path, save: Save) -> None:
    """Left where the two files have them, these logits differ by 8e-8 on a CPU with AVX-512."""
    backbone, head = save(tiny(classes=1000))
    (tmp_path / "labels.txt").write_text("\n".join(map(str, range(1000))))
    streamconv.convert(backbone, tmp_path / "out", head=head, labels=tmp_path / "labels.txt")
    found = streamconv.verify(tmp_path / "out", backbone, head=head, device="cpu").checks[2]
    assert found.numbers["tolerance"] == 0.0
    assert found.numbers["differences"]["logits"] == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_precisions_are_computed_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save({name: value.to(dtype) for name, value in make_states(tiny())[0].items()}, tmp_path / "x.pth")
    streamconv.convert(tmp_path / "x.pth", tmp_path / "out")
    found = streamconv.verify(tmp_path / "out", tmp_path / "x.pth", device="cpu")
    assert verdicts(found) == {"bytes": True, "load": True, "parity": True, "preprocessing": True}


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
def test_one_flipped_bit_anywhere_is_found_and_named(converted: tuple[Path, Path, Path | None], name: str) -> None:
    folder, backbone, head = converted

    def flip(state: State) -> None:
        state[key(converted, name)].view(torch.int32).flatten()[7] ^= 1

    alter(folder, flip)
    found = streamconv.verify(folder, backbone, head=head, device="cpu")
    assert not found.passed
    assert f"{key(converted, name)} differs from its source from element 7 on" in problems(found)


def test_a_swapped_query_and_key_is_seen_by_bytes_and_by_parity(converted: tuple[Path, Path, Path | None]) -> None:
    folder, backbone, head = converted
    query, other = (key(converted, f"encoder.layer.1.attention.attention.{n}.weight") for n in ("query", "key"))
    alter(folder, lambda state: state.update({query: state[other], other: state[query]}))
    found = streamconv.verify(folder, backbone, head=head, device="cpu")
    assert verdicts(found) == {"bytes": False, "load": True, "parity": False, "preprocessing": False}
    differences = found.checks[2].numbers["differences"]
    assert max(differences["embeddings"], differences["layer 0"]) < 1e-13 < differences["layer 1"]
    assert found.checks[2].numbers["first"] == "layer 1"
    assert "the first difference is in layer 1: " in problems(found)
    states = len(differences) - 1  # but for the embeddings and the first layer
    assert f"; {states - 2} of the {states} other layer outputs differ too" in problems(found)


def test_a_missing_and_an_extra_tensor_are_named(converted: tuple[Path, Path, Path | None]) -> None:
    folder, backbone, head = converted
    name = key(converted, "encoder.layer.2.norm1.bias")
    alter(folder, lambda state: state.update(extra=state.pop(name)))
    found = streamconv.verify(folder, backbone, head=head, device="cpu")
    assert verdicts(found) == {"bytes": False, "load": False, "parity": None, "preprocessing": None}
    assert f"{name} is missing" in problems(found)
    assert "extra should not be there" in problems(found)
    assert "missing_keys" in problems(found)


def test_another_dtype_is_named(converted: tuple[Path, Path, Path | None]) -> None:
    folder, backbone, head = converted
    name = key(converted, "layernorm.weight")
    alter(folder, lambda state: state.update({name: state[name].double()}))
    found = streamconv.verify(folder, backbone, head=head, device="cpu")
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
def test_a_wrong_config_value_is_named(converted: tuple[Path, Path, Path | None], field: str, value: object) -> None:
    folder, backbone, head = converted
    config = json.loads((folder / "config.json").read_text())
    value = not config[field] if value is None else value
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    found = streamconv.verify(folder, backbone, head=head, device="cpu")
    assert not found.passed
    assert f"config.json: {field} is {json.dumps(value)}" in problems(found)


def test_a_version_line_of_transformers_is_no_difference(converted: tuple[Path, Path, Path | None]) -> None:
    folder, backbone, head = converted
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "5.0.0"}))
    assert streamconv.verify(folder, backbone, head=head, device="cpu").passed


def test_a_swapped_row_of_the_classifier_shows_in_the_logits(tmp_path: Path, save: Save) -> None:
    backbone, head = save(tiny(classes=5))
    streamconv.convert(backbone, tmp_path / "out", head=head)

    def swap(state: State) -> None:
        state["classifier.weight"][[0, 1]] = state["classifier.weight"][[1, 0]]

    alter(tmp_path / "out", swap)
    found = streamconv.verify(tmp_path / "out", backbone, head=head, device="cpu")
    assert verdicts(found) == {"bytes": False, "load": True, "parity": False, "preprocessing": False}
    assert found.checks[2].problems[0].startswith("the first difference is in logits: ")


def test_a_source_that_rots_is_found(converted: tuple[Path, Path, Path | None]) -> None:
    folder, backbone, head = converted
    with streamconv.open_checkpoint(backbone) as checkpoint:
        at = checkpoint["mask_token"].record.range.start
    data = bytearray(backbone.read_bytes())
    data[at] ^= 1
    backbone.write_bytes(data)
    found = streamconv.verify(folder, backbone, head=head, device="cpu")
    assert not found.passed
    assert "does not match its CRC-32" in problems(found)


def test_predictions_carry_the_folders_labels(tmp_path: Path, save: Save) -> None:
    backbone, head = save(tiny(classes=3))
    (tmp_path / "labels.txt").write_text("cat\ndog\ncat\n")
    streamconv.convert(backbone, tmp_path / "out", head=head, labels=tmp_path / "labels.txt")
    found = streamconv.verify(tmp_path / "out", backbone, head=head, device="cpu")
    assert found.passed
    assert {label for label, _ in found.predictions} == {"cat", "dog"}
    assert sum(share for _, share in found.predictions) == pytest.approx(1)


def test_the_image_decides_what_is_computed_on(tmp_path: Path, save: Save) -> None:
    backbone, head = save(tiny(classes=5))
    streamconv.convert(backbone, tmp_path / "out", head=head)
    Image.new("L", (31, 77), 200).save(tmp_path / "grey.png")
    own, grey = (
        streamconv.verify(tmp_path / "out", backbone, head=head, device="cpu", image=image)
        for image in (None, tmp_path / "grey.png")
    )
    assert own.passed
    assert grey.passed
    assert own.predictions != grey.predictions


def test_the_projects_image_is_always_the_same_and_no_plain_area() -> None:
    one, two = make_image(), make_image()
    assert one.size == (640, 480)
    assert one.tobytes() == two.tobytes()
    assert len(set(one.getdata() if not hasattr(one, "get_flattened_data") else one.get_flattened_data())) > 10_000


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:x", ""])
def test_what_is_no_device_is_refused(device: str) -> None:
    with pytest.raises(UsageError, match="no device"):
        choose_device(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_and_auto_does_without() -> None:
    with pytest.raises(UsageError, match="no CUDA GPU"):
        choose_device("cuda")
    assert choose_device("auto").type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_agrees_within_the_originals_tolerance(converted: tuple[Path, Path, Path | None]) -> None:
    folder, backbone, head = converted
    found = streamconv.verify(folder, backbone, head=head, device="cuda")
    assert found.passed
    assert found.checks[2].numbers["tolerance"] == 1e-3


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("no image")
    for path in (tmp_path / "x.png", tmp_path / "none.png"):
        with pytest.raises(UsageError, match=r"cannot be read|not an image that"):
            open_image(path)


def test_what_is_no_output_is_refused(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    with pytest.raises(OutputError, match="no folder"):
        streamconv.verify(tmp_path / "none", backbone)
    (tmp_path / "empty").mkdir()
    found = streamconv.verify(tmp_path / "empty", backbone, device="cpu")
    assert verdicts(found) == {"bytes": False, "load": False, "parity": None, "preprocessing": None}
    assert "holds neither model.safetensors nor model.safetensors.index.json" in problems(found)


def test_another_models_source_is_refused_or_fails(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    streamconv.convert(backbone, tmp_path / "out")
    state, _ = make_states(tiny(), seed=1)
    torch.save(state, tmp_path / "other.pth")
    found = streamconv.verify(tmp_path / "out", tmp_path / "other.pth", device="cpu")
    assert verdicts(found) == {"bytes": False, "load": True, "parity": False, "preprocessing": False}


def test_sharded_folders_are_verified_too(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    streamconv.convert(backbone, tmp_path / "out", max_shard_size="300KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert streamconv.verify(tmp_path / "out", backbone, device="cpu").passed
    gone = min((tmp_path / "out").glob("*.safetensors"))
    data = gone.read_bytes()
    gone.unlink()
    found = streamconv.verify(tmp_path / "out", backbone, device="cpu")
    assert verdicts(found) == {"bytes": False, "load": False, "parity": None, "preprocessing": None}
    assert "the output cannot be read" in problems(found)
    gone.write_bytes(data[:-1])
    assert not streamconv.verify(tmp_path / "out", backbone, device="cpu").passed


@pytest.mark.parametrize("change", ["total_size", "place", "name"])
def test_a_wrong_index_is_named(tmp_path: Path, save: Save, change: str) -> None:
    backbone, _ = save(tiny())
    streamconv.convert(backbone, tmp_path / "out", max_shard_size="300KB")
    path = tmp_path / "out" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    if change == "total_size":
        index["metadata"]["total_size"] = 7
    elif change == "place":
        index["weight_map"]["layernorm.bias"] = "model-00001-of-00009.safetensors"
    else:
        del index["weight_map"]["layernorm.bias"]
    path.write_text(json.dumps(index))
    assert not streamconv.verify(tmp_path / "out", backbone, device="cpu").passed


def test_weights_that_transformers_would_load_instead_are_seen(tmp_path: Path, save: Save) -> None:
    """Beside an index, transformers takes a model.safetensors; a stray shard is taken by no one, and told."""
    backbone, _ = save(tiny())
    streamconv.convert(backbone, tmp_path / "sharded", max_shard_size="300KB")
    streamconv.convert(backbone, tmp_path / "single")
    (tmp_path / "sharded" / "model.safetensors").write_bytes((tmp_path / "single" / "model.safetensors").read_bytes())
    alter(tmp_path / "sharded", lambda state: state["embeddings.mask_token"].add_(1))
    found = streamconv.verify(tmp_path / "sharded", backbone, device="cpu")
    assert "embeddings.mask_token differs" in problems(found)
    assert "model.safetensors.index.json is no part of the model" in problems(found)
    safetensors.torch.save_file({"x": torch.ones(1)}, tmp_path / "single" / "model-00001-of-00002.safetensors")
    found = streamconv.verify(tmp_path / "single", backbone, device="cpu")
    assert problems(found) == "model-00001-of-00002.safetensors is no part of the model"


def test_swapped_labels_are_seen(tmp_path: Path, save: Save) -> None:
    backbone, head = save(tiny(classes=3))
    streamconv.convert(backbone, tmp_path / "out", head=head)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["id2label"] |= {"0": "LABEL_1", "1": "LABEL_0"}
    config["label2id"] |= {"LABEL_1": 0, "LABEL_0": 1}
    path.write_text(json.dumps(config))
    found = streamconv.verify(tmp_path / "out", backbone, head=head, device="cpu")
    assert problems(found) == "config.json has other labels than streamconv.json says"
    del config["id2label"]["2"]
    path.write_text(json.dumps(config))
    assert "config.json: id2label.0 is" in problems(
        streamconv.verify(tmp_path / "out", backbone, head=head, device="cpu")
    )


def test_an_output_that_is_not_the_manifests_is_seen(tmp_path: Path, save: Save) -> None:
    """Weights and source exchanged together agree with each other, and not with the folder's own word."""
    backbone, _ = save(tiny())
    torch.save(make_states(tiny(), seed=1)[0], tmp_path / "other.pth")
    streamconv.convert(backbone, tmp_path / "out")
    streamconv.convert(tmp_path / "other.pth", tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "out" / "model.safetensors")
    found = streamconv.verify(tmp_path / "out", tmp_path / "other.pth", device="cpu")
    assert problems(found) == "model.safetensors has another sha256 than streamconv.json says"


def test_a_source_of_other_depth_is_a_finding(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny(layers=3))
    shallow, _ = save(tiny(layers=2), "shallow")
    streamconv.convert(backbone, tmp_path / "out")
    found = streamconv.verify(tmp_path / "out", shallow, device="cpu")
    assert verdicts(found) == {"bytes": False, "load": True, "parity": False, "preprocessing": False}
    assert "layer 2 is not in the original" in problems(found)


def test_not_a_number_equals_itself_and_nothing_else(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    state["norm.bias"][3] = float("nan")
    torch.save(state, tmp_path / "x.pth")
    streamconv.convert(tmp_path / "x.pth", tmp_path / "out")
    assert streamconv.verify(tmp_path / "out", tmp_path / "x.pth", device="cpu").passed
    alter(tmp_path / "out", lambda state: state["layernorm.bias"].fill_(0))
    found = streamconv.verify(tmp_path / "out", tmp_path / "x.pth", device="cpu")
    assert "the first difference is in cls: inf" in problems(found)
    assert "Infinity" not in json.dumps(found.as_dict())


def test_what_torch_refuses_is_a_finding(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    with zipfile.ZipFile(backbone) as old:
        records = {name: old.read(name) for name in old.namelist() if not name.endswith("/version")}
    with zipfile.ZipFile(backbone, "w") as new:
        for name, data in records.items():
            new.writestr(name, data)
    streamconv.convert(backbone, tmp_path / "out")
    found = streamconv.verify(tmp_path / "out", backbone, device="cpu")
    assert verdicts(found) == {"bytes": True, "load": True, "parity": False, "preprocessing": None}


def test_the_image_processor_is_exact_on_pillow_and_the_interpolation_explains_the_rest(
    converted: tuple[Path, Path, Path | None],
) -> None:
    folder, backbone, head = converted
    numbers = streamconv.verify(folder, backbone, head=head, device="cpu").checks[3].numbers
    assert numbers["pil"] == 0.0
    assert 0 <= numbers["default"] < 1.01 * numbers["grey_level"]
    assert numbers["size"] == 224
    states = ["cls", "patches", *(["logits"] if head else [])]
    assert list(numbers["same_interpolation"]) == states
    if key((folder, backbone, backbone), "").startswith("dinov2_with_registers."):
        assert numbers["as_published"] == {}  # there, both interpolate to the size
    else:
        assert list(numbers["as_published"]) == states
        assert numbers["as_published"]["patches"] > 1e-4 > numbers["same_interpolation"]["patches"]
    assert max(numbers["same_interpolation"].values()) <= numbers["tolerance"] <= 1e-13


def test_what_the_original_script_saw_at_224_is_what_is_shown(tmp_path: Path, save: Save) -> None:
    """Meta's interpolation, written down from its formula, against transformers' own: the same difference."""
    backbone, _ = save(tiny())
    streamconv.convert(backbone, tmp_path / "out")
    shown = streamconv.verify(tmp_path / "out", backbone, device="cpu").checks[3].numbers["as_published"]["patches"]
    model = transformers.AutoModel.from_pretrained(tmp_path / "out", local_files_only=True).eval()
    pixels = original_pixels(make_image(), streamconv.plan(backbone))
    with torch.no_grad():
        own = model(pixels).last_hidden_state[:, 1:]

        def scaled(embeddings: torch.Tensor, height: int, width: int) -> torch.Tensor:
            positions = model.embeddings.position_embeddings
            grid = positions[:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
            grid = torch.nn.functional.interpolate(grid, scale_factor=((16 + 0.1) / 4,) * 2, mode="bicubic")
            return torch.cat((positions[:, :1], grid.flatten(2).transpose(1, 2)), dim=1)

        model.embeddings.interpolate_pos_encoding = scaled
        published = model(pixels).last_hidden_state[:, 1:]
    assert shown == pytest.approx(float((own - published).abs().max()), rel=1e-3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_mean", [0.5, 0.5, 0.5]),
        ("resample", 2),
        ("size", {"shortest_edge": 224}),
        ("crop_size", {"height": 196, "width": 196}),
        ("do_normalize", False),
        ("rescale_factor", 1 / 256),
    ],
)
def test_a_wrong_image_processor_is_named_and_gives_other_pixels(
    tmp_path: Path, save: Save, field: str, value: object
) -> None:
    backbone, _ = save(tiny())
    streamconv.convert(backbone, tmp_path / "out")
    path = tmp_path / "out" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    found = streamconv.verify(tmp_path / "out", backbone, device="cpu")
    assert verdicts(found) == {"bytes": False, "load": True, "parity": True, "preprocessing": False}
    assert f"preprocessor_config.json: {field}" in problems(found)
    assert any(
        "pixels differ" in problem or "makes [1, 3, 196, 196]" in problem for problem in found.checks[3].problems
    )


def test_a_changed_interpolation_is_no_explanation(tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two must agree once they interpolate the same way: another difference at 224 is an error."""
    backbone, _ = save(tiny())
    streamconv.convert(backbone, tmp_path / "out")
    real = dinov2.VisionTransformer.interpolate_pos_encoding

    def shifted(self: dinov2.VisionTransformer, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        positions = real(self, x, height, width)
        return positions if x.shape[1] == 17 else positions + 1e-3

    monkeypatch.setattr(dinov2.VisionTransformer, "interpolate_pos_encoding", shifted)
    found = streamconv.verify(tmp_path / "out", backbone, device="cpu")
    assert verdicts(found) == {"bytes": True, "load": True, "parity": True, "preprocessing": False}
    assert "the first difference is in embeddings: " in problems(found)


def test_pictures_show_both_models_patches(converted: tuple[Path, Path, Path | None]) -> None:
    folder, backbone, head = converted
    name = key(converted, "encoder.layer.0.mlp.fc2.weight")
    pictures = streamconv.verify(folder, backbone, head=head, device="cpu").pictures
    assert list(pictures) == ["image", "original", "converted"]
    opened = {}
    for what, address in pictures.items():
        assert address.startswith("data:image/png;base64,")
        opened[what] = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGB")
    assert opened["image"].size == (518, 518)
    assert opened["original"].size == (4, 4)
    assert pictures["original"] == pictures["converted"]
    assert len(opened["original"].getcolors()) > 8

    def change(state: State) -> None:
        changed = name if name in state else name.replace("fc2", "weights_out")
        state[changed] = 30 * state[changed].flip(0)

    alter(folder, change)
    pictures = streamconv.verify(folder, backbone, head=head, device="cpu").pictures
    assert pictures["original"] != pictures["converted"]


def test_the_output_is_named_with_its_files_digests(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    streamconv.convert(backbone, tmp_path / "out", max_shard_size="1MB")
    found = streamconv.verify(tmp_path / "out", backbone, device="cpu")
    assert found.output["architecture"] == "Dinov2Model"
    paths = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(paths) > 1
    assert found.output["files"] == {
        path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in paths
    }
    assert found.seconds > sum(check.numbers["seconds"] for check in found.checks) > 0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a loopback server that serves ``tmp_path``."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_an_image_may_have_an_address(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_image().save(tmp_path / "x.png")
    (tmp_path / "page.html").write_text("<html>no image</html>")
    assert open_image(f"{server}/x.png").tobytes() == make_image().tobytes()
    with pytest.raises(UsageError, match="404"):
        open_image(f"{server}/none.png")
    with pytest.raises(UsageError, match="not an image that Pillow can read"):
        open_image(f"{server}/page.html")
    with pytest.raises(UsageError, match="refused"):
        open_image("http://127.0.0.1:1/x.png")
    monkeypatch.setitem(open_image.__globals__, "MAX_DOWNLOAD_BYTES", 1000)
    with pytest.raises(UsageError, match="more than"):
        open_image(f"{server}/x.png")


HUBCONF = """
from streamconv.families import find_model
from streamconv.verification.originals import dinov2

def dinov2_vits14(**arguments):
    assert arguments == {"pretrained": False}, arguments
    model = dinov2.build(find_model("dinov2_vits14")[1].geometry)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    model.blocks[3].ls1.forward = lambda x: FACTOR * x * model.blocks[3].ls1.gamma
    return model
"""


@pytest.mark.parametrize(("factor", "passed"), [("1.0", True), ("1.5", False)])
def test_a_folder_with_the_authors_code_is_the_reference(tmp_path: Path, factor: str, passed: bool) -> None:
    """A stand-in for the authors' code, which does another thing in layer 3 if it is told to: so it did run."""
    (tmp_path / "authors").mkdir()
    (tmp_path / "authors" / "hubconf.py").write_text(HUBCONF.replace("FACTOR", factor))
    made = streamconv.synth("dinov2_vits14", tmp_path / "s.pth")
    streamconv.convert(made.backbone, tmp_path / "out")
    found = streamconv.verify(tmp_path / "out", made.backbone, device="cpu", reference=tmp_path / "authors")
    assert verdicts(found) == {"bytes": True, "load": True, "parity": passed, "preprocessing": passed}
    assert found.reference == "folder authors"
    assert passed or found.checks[2].numbers["first"] == "layer 3"


@pytest.mark.skipif("DINOV2_REPOSITORY" not in os.environ, reason="DINOV2_REPOSITORY names no checkout of Meta's code")
@pytest.mark.parametrize("model", ["dinov2_vits14", "dinov2_vits14_1layer"])
def test_metas_own_code_computes_the_same(tmp_path: Path, model: str) -> None:
    made = streamconv.synth(model, tmp_path / "s.pth")
    streamconv.convert(made.backbone, tmp_path / "out", head=made.head)
    found = streamconv.verify(
        tmp_path / "out", made.backbone, head=made.head, device="cpu", reference=os.environ["DINOV2_REPOSITORY"]
    )
    assert found.passed
    assert found.checks[2].numbers["largest"] == 0.0


def test_a_reference_that_cannot_be_had_is_refused(tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, _ = save(tiny())
    streamconv.convert(backbone, tmp_path / "out")
    for reference, says in (
        (tmp_path, "hubconf.py"),
        ("meta", "neither builtin, hub nor"),
        ("hub", "published models"),
    ):
        with pytest.raises(UsageError, match=says):
            streamconv.verify(tmp_path / "out", backbone, device="cpu", reference=reference)
    made = streamconv.synth("dinov2_vits14", tmp_path / "s.pth")
    streamconv.convert(made.backbone, tmp_path / "published")

    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load", offline)
    with pytest.raises(UsageError, match="could not be loaded from facebookresearch/dinov2: OSError: no network"):
        streamconv.verify(tmp_path / "published", made.backbone, device="cpu", reference="hub")


def test_a_safetensors_source_is_verified_too(tmp_path: Path) -> None:
    safetensors.torch.save_file(make_states(tiny())[0], tmp_path / "x.safetensors")
    streamconv.convert(tmp_path / "x.safetensors", tmp_path / "out")
    found = streamconv.verify(tmp_path / "out", tmp_path / "x.safetensors", device="cpu")
    assert found.passed
    assert "carries no CRC-32s" in found.checks[0].proves


def test_differences_are_judged_and_shown_as_shares_of_a_large_state(tmp_path: Path) -> None:
    """What is shown is what is compared with the tolerance, and both measures are there."""
    state, _ = make_states(tiny())
    state = {name: 300 * value if "gamma" in name else value for name, value in state.items()}
    torch.save(state, tmp_path / "x.pth")
    streamconv.convert(tmp_path / "x.pth", tmp_path / "out")
    alter(tmp_path / "out", lambda state: state["encoder.layer.1.layer_scale1.lambda1"].mul_(1.5))
    found = streamconv.verify(tmp_path / "out", tmp_path / "x.pth", device="cpu")
    numbers = found.checks[2].numbers
    assert numbers["first"] == "layer 1"
    assert numbers["largest"] == max(numbers["differences"].values())
    assert numbers["absolute"]["layer 1"] > 10 * numbers["differences"]["layer 1"] > 1e-2
    by = f"{numbers['differences']['layer 1']:.3g} (absolute: {numbers['absolute']['layer 1']:.3g})"
    assert f"the first difference is in layer 1: {by}" in problems(found)


@pytest.mark.parametrize("value", [float("inf"), 1e37])
def test_a_source_that_is_not_finite_is_verified_and_said_to_be_so(tmp_path: Path, value: float) -> None:
    state, _ = make_states(tiny())
    state["norm.weight"][:] = value
    torch.save(state, tmp_path / "x.pth")
    streamconv.convert(tmp_path / "x.pth", tmp_path / "out")
    found = streamconv.verify(tmp_path / "out", tmp_path / "x.pth", device="cpu")
    assert found.passed
    assert ("from cls on, values that are not finite" in found.checks[2].proves) == (value == float("inf"))
    assert ("converted" in found.pictures) == (value == 1e37)


@pytest.mark.parametrize(
    ("name", "says"),
    [("pytorch_model.bin", "no part of the model"), ("adapter_config.json", "no part of the model")],
)
def test_what_transformers_might_load_instead_is_named(tmp_path: Path, save: Save, name: str, says: str) -> None:
    backbone, _ = save(tiny())
    streamconv.convert(backbone, tmp_path / "out")
    (tmp_path / "out" / name).write_text("{}")
    assert f"{name} is {says}" in problems(streamconv.verify(tmp_path / "out", backbone, device="cpu"))


def test_bytes_that_belong_to_no_tensor_and_other_metadata_are_named(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    streamconv.convert(backbone, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data + b"123456789")
    found = streamconv.verify(tmp_path / "out", backbone, device="cpu")
    assert "model.safetensors has 9 bytes at its end that belong to no tensor" in problems(found)
    path.write_bytes(data.replace(b'{"format":"pt"}', b'{"format":"tf"}', 1))
    found = streamconv.verify(tmp_path / "out", backbone, device="cpu")
    assert not found.checks[0].passed
    assert 'model.safetensors has the metadata {"format": "tf"}' in problems(found)


def test_values_of_another_type_are_differences(tmp_path: Path, save: Save) -> None:
    """True equals 1 and 56 equals 56.0 in Python; in JSON they do not."""
    backbone, _ = save(tiny())
    streamconv.convert(backbone, tmp_path / "out")
    path = tmp_path / "out" / "preprocessor_config.json"
    path.write_text(path.read_text().replace('"do_resize": true', '"do_resize": 1'))
    found = streamconv.verify(tmp_path / "out", backbone, device="cpu")
    assert "preprocessor_config.json: do_resize is 1, not true" in problems(found)


def test_shards_that_do_not_hold_what_the_index_says_are_named(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    streamconv.convert(backbone, tmp_path / "out", max_shard_size="1MB")
    path = tmp_path / "out" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = min(index["weight_map"])
    index["weight_map"][name] = next(v for v in index["weight_map"].values() if v != index["weight_map"][name])
    path.write_text(json.dumps(index))
    text = problems(streamconv.verify(tmp_path / "out", backbone, device="cpu"))
    assert f"{path.name} disagree on 1 tensors: '{name}'" in text


def test_a_mapping_names_the_entries_that_differ_and_counts_the_rest(tmp_path: Path, save: Save) -> None:
    backbone, head = save(tiny(classes=8))
    streamconv.convert(backbone, tmp_path / "out", head=head)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["id2label"] = dict.fromkeys(config["id2label"], "x")
    path.write_text(json.dumps(config))
    text = problems(streamconv.verify(tmp_path / "out", backbone, head=head, device="cpu"))
    assert "config.json: label2id.LABEL_0 is 0, not absent" in text
    assert "config.json: label2id differs in 4 more" in text


def test_two_references_in_one_process_are_two(tmp_path: Path) -> None:
    """Both folders have a module of the same name, which only the second one's breaks."""
    for folder, factor in (("one", "1.0"), ("two", "1.5")):
        (tmp_path / folder / "authors_package").mkdir(parents=True)
        (tmp_path / folder / "authors_package" / "__init__.py").write_text(HUBCONF.replace("FACTOR", factor))
        (tmp_path / folder / "hubconf.py").write_text("from authors_package import dinov2_vits14")
    made = streamconv.synth("dinov2_vits14", tmp_path / "s.pth")
    streamconv.convert(made.backbone, tmp_path / "out")
    for folder, passed in (("one", True), ("two", False)):
        found = streamconv.verify(tmp_path / "out", made.backbone, device="cpu", reference=tmp_path / folder)
        assert found.passed is passed


@pytest.mark.parametrize(
    "code", ["return None", "import sys; sys.exit(3)", "import torch; return torch.nn.Linear(1, 1)"]
)
def test_a_reference_that_gives_no_model_is_the_users_mistake(tmp_path: Path, code: str) -> None:
    (tmp_path / "hubconf.py").write_text(f"def dinov2_vits14(**arguments):\n    {code}\n")
    made = streamconv.synth("dinov2_vits14", tmp_path / "s.pth")
    streamconv.convert(made.backbone, tmp_path / "out")
    with pytest.raises(UsageError, match="could not be loaded from"):
        streamconv.verify(tmp_path / "out", made.backbone, device="cpu", reference=tmp_path)


def test_too_little_memory_says_nothing_of_the_output(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, _ = save(tiny())
    streamconv.convert(backbone, tmp_path / "out")

    def full(self: object, pixels: torch.Tensor) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(dinov2.VisionTransformer, "prepare_tokens_with_masks", full)
    with pytest.raises(UsageError, match="cpu has too little memory"):
        streamconv.verify(tmp_path / "out", backbone, device="cpu")


def test_pictures_are_turned_upright_and_what_cannot_be_shown_is_refused(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (40, 30), (9, 9, 9)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (30, 40)
    Image.new("I;16", (40, 30)).save(tmp_path / "deep.png")
    Image.new("RGB", (1, 60)).save(tmp_path / "line.png")
    for name, says in (("deep.png", "more than 8 bits"), ("line.png", "a line")):
        with pytest.raises(UsageError, match=says):
            open_image(tmp_path / name)
