"""Verification passes correct outputs and names what is wrong in others."""

import base64
import errno
import io
import json
import os
import zipfile
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
import transformers
from PIL import Image

import streamconv
from streamconv import OutputError, UsageError, Verification
from streamconv.families.dinov2_geometry import Dimensions
from streamconv.hub.card import make_card
from streamconv.output.manifest import Manifest
from streamconv.verification.devices import choose_device
from streamconv.verification.image import make_image, open_image
from streamconv.verification.machine import refuse_machine_failure
from streamconv.verification.originals import dinov2
from streamconv.verification.pixels import crop, to_pixels
from tests import api
from tests.checkpoints import State, alter, make_states, saved
from tests.fake_cuda import no_memory_for_cublas, no_memory_for_cuda
from tests.file_server import FileServer
from tests.support import ARCHITECTURES, Save, byte_problems, flip, problems, run, sha256_of, tiny, verdicts


class Converted(NamedTuple):
    """A converted folder, and the files that it was converted from."""

    folder: Path
    backbone: Path
    head: Path | None

    def verify(self, **options: Any) -> Verification:
        return api.verify(self.folder, self.backbone, head=self.head, device="cpu", **options)


def convert(folder: Path, dimensions: Dimensions) -> Converted:
    backbone, head = make_states(dimensions)
    source = saved(backbone, folder / "source.pth")
    head_path = saved(head, folder / "head.pth") if head else None
    return Converted(api.convert(source, folder / "out", head=head_path).output, source, head_path)


@pytest.fixture
def converted(tmp_path: Path) -> Converted:
    return convert(tmp_path, tiny())


@pytest.fixture(scope="module", params=ARCHITECTURES)
def verified(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Dimensions, Verification]:
    """Convert each architecture correctly, and verify it once for all tests that use the result."""
    dimensions = ARCHITECTURES[request.param]
    return dimensions, convert(tmp_path_factory.mktemp(request.param), dimensions).verify()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """Convert a published model with random weights: only published models have the authors' code as a reference."""
    folder = tmp_path_factory.mktemp("published")
    made = streamconv.synth("dinov2_vits14", folder / "s.pth")
    return Converted(api.convert(made.backbone, folder / "out").output, made.backbone, None)


@pytest.mark.transformers
def test_correct_conversion_passes_every_check_exactly(verified: tuple[Dimensions, Verification]) -> None:
    dimensions, found = verified
    assert verdicts(found) == {"bytes": True, "config": True, "load": True, "parity": True, "preprocessing": True}
    parity = found.check("parity").numbers
    states = ["embeddings", "layer 0", "layer 1", "layer 2", "cls", *(["registers"] if dimensions.registers else [])]
    states += ["patches", *(["logits"] if dimensions.classes else [])]
    assert list(parity["differences"]) == states
    if parity["tolerance"] == 0.0:
        assert parity["differences"] == dict.fromkeys(states, 0.0)
    assert found.passed
    assert json.loads(json.dumps(found.as_dict()))["passed"] is True
    assert len(found.predictions) == (dimensions.classes or 0)


@pytest.mark.transformers
def test_image_processor_is_exact_and_the_difference_by_design_is_shown(
    verified: tuple[Dimensions, Verification],
) -> None:
    dimensions, found = verified
    pixels, parity = found.check("preprocessing").numbers, found.check("parity").numbers
    assert pixels["pil"] == 0.0
    assert 0 <= pixels["default"] < 1.01 * pixels["grey_level"]
    assert parity["size"] == 224
    assert parity["tolerance"] <= 1e-13
    if dimensions.registers:
        assert "as_published" not in parity  # there, both interpolate to the size
    else:
        assert list(parity["as_published"]) == ["cls", "patches", *(["logits"] if dimensions.classes else [])]
        assert parity["as_published"]["patches"] > 1e-4 > parity["absolute"]["patches"]


def test_float32_rounding_differences_are_settled_in_float64(tmp_path: Path, save: Save) -> None:
    """transformers 5 splits SwiGLU's first layer, and some CPUs round 344 columns differently from 688."""
    backbone, _ = save(tiny(swiglu=True))
    api.convert(backbone, tmp_path / "out")
    found = api.verify(tmp_path / "out", backbone, device="cpu").check("parity")
    assert found.passed
    if "float32" in found.numbers:
        assert 0 < found.numbers["float32"]["largest"] < 1e-5
        assert found.numbers["largest"] < found.numbers["tolerance"] == 1e-13

    def nudge(state: State) -> None:  # the last bit of one weight
        state["encoder.layer.0.mlp.weights_in.weight"].view(torch.int32)[5, 5] ^= 1

    alter(tmp_path / "out", nudge)
    if "float32" in found.numbers:  # in float32 alone, such a bit can be lost: the bytes check finds it
        assert not api.verify(tmp_path / "out", backbone, device="cpu").check("parity").passed


def test_a_wrong_result_is_not_called_rounding(tmp_path: Path, save: Save) -> None:
    """A small difference is a reason to run in float64; only float64 shows what causes it."""
    backbone, _ = save(tiny())
    api.convert(backbone, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 2e-6}))
    found = api.verify(tmp_path / "out", backbone, device="cpu").check("parity")
    assert found.passed is False
    assert "(decided by a second pass in float64)" in found.proves
    assert "rounding" not in found.proves


def test_alignment_of_the_weights_makes_no_difference(tmp_path: Path, save: Save) -> None:
    """If the weights were used at their places in the two files, the logits would differ by 8e-8 with AVX-512."""
    backbone, head = save(tiny(classes=1000))
    (tmp_path / "labels.txt").write_text("\n".join(map(str, range(1000))))
    api.convert(backbone, tmp_path / "out", head=head, labels=tmp_path / "labels.txt")
    found = api.verify(tmp_path / "out", backbone, head=head, device="cpu").check("parity")
    assert found.numbers["tolerance"] == 0.0
    assert found.numbers["differences"]["logits"] == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_computed_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save({name: value.to(dtype) for name, value in make_states(tiny())[0].items()}, tmp_path / "x.pth")
    api.convert(tmp_path / "x.pth", tmp_path / "out")
    found = api.verify(tmp_path / "out", tmp_path / "x.pth", device="cpu")
    assert verdicts(found) == {"bytes": True, "config": True, "load": True, "parity": True, "preprocessing": True}


def test_swapped_query_and_key_fail_bytes_and_parity(tmp_path: Path) -> None:
    made = convert(tmp_path, ARCHITECTURES["swiglu-registers-classifier"])
    start = "dinov2_with_registers.encoder.layer.1.attention.attention"
    query, key = f"{start}.query.weight", f"{start}.key.weight"
    alter(made.folder, lambda state: state.update({query: state[key], key: state[query]}))
    found = made.verify()
    assert verdicts(found) == {"bytes": False, "config": True, "load": True, "parity": False, "preprocessing": True}
    differences = found.check("parity").numbers["differences"]
    assert max(differences["embeddings"], differences["layer 0"]) < 1e-13 < differences["layer 1"]
    assert found.check("parity").numbers["first"] == "layer 1"
    assert "the first difference is in layer 1: " in problems(found)
    states = len(differences) - 1  # except the embeddings and the first layer
    assert f"; {states - 2} of the {states} other layer outputs differ too" in problems(found)


def test_only_the_bytes_check_sees_the_mask_token(converted: Converted) -> None:
    alter(converted.folder, lambda state: state["embeddings.mask_token"].add_(1))
    found = converted.verify()
    assert verdicts(found) == {"bytes": False, "config": True, "load": True, "parity": True, "preprocessing": True}
    assert "embeddings.mask_token differs from its source" in problems(found)


@pytest.mark.transformers
def test_missing_tensor_fails_the_load_check(converted: Converted) -> None:
    alter(converted.folder, lambda state: state.update(extra=state.pop("encoder.layer.2.norm1.bias")))
    found = converted.verify()
    assert verdicts(found) == {"bytes": False, "config": True, "load": False, "parity": None, "preprocessing": True}
    assert "missing_keys" in problems(found)


@pytest.mark.transformers
def test_misshaped_tensor_is_named_by_the_load_check(converted: Converted) -> None:
    alter(converted.folder, lambda state: state.update({"layernorm.weight": torch.ones(7)}))
    found = converted.verify()
    assert verdicts(found) == {"bytes": False, "config": True, "load": False, "parity": None, "preprocessing": True}
    (problem,) = found.check("load").problems
    assert problem in ("mismatched_keys: layernorm.weight is [7], not [128]", "mismatched_keys: layernorm.weight")


def test_changed_bit_of_a_cast_weight_fails_parity(converted: Converted, tmp_path: Path) -> None:
    cast = Converted(
        api.convert(converted.backbone, tmp_path / "cast", dtype="bfloat16").output, converted.backbone, None
    )
    flip(cast.folder / "model.safetensors", "encoder.layer.1.mlp.fc2.weight", 100)
    found = cast.verify()
    assert verdicts(found) == {"bytes": False, "config": True, "load": True, "parity": False, "preprocessing": True}
    assert "the first difference is in layer 1" in found.check("parity").problems[0]


def test_swapped_classifier_rows_fail_in_the_logits(tmp_path: Path, save: Save) -> None:
    backbone, head = save(tiny(classes=5))
    api.convert(backbone, tmp_path / "out", head=head)

    def swap(state: State) -> None:
        state["classifier.weight"][[0, 1]] = state["classifier.weight"][[1, 0]]

    alter(tmp_path / "out", swap)
    found = api.verify(tmp_path / "out", backbone, head=head, device="cpu")
    assert verdicts(found) == {"bytes": False, "config": True, "load": True, "parity": False, "preprocessing": True}
    assert found.check("parity").problems[0].startswith("the first difference is in logits: ")


def test_predictions_use_the_labels_of_the_folder(tmp_path: Path, save: Save) -> None:
    backbone, head = save(tiny(classes=3))
    (tmp_path / "labels.txt").write_text("cat\ndog\ncat\n")
    api.convert(backbone, tmp_path / "out", head=head, labels=tmp_path / "labels.txt")
    found = api.verify(tmp_path / "out", backbone, head=head, device="cpu")
    assert found.passed
    assert {label for label, _ in found.predictions} == {"cat", "dog"}
    assert sum(share for _, share in found.predictions) == pytest.approx(1)


def test_image_option_changes_the_input(tmp_path: Path, save: Save) -> None:
    backbone, head = save(tiny(classes=5))
    api.convert(backbone, tmp_path / "out", head=head)
    Image.new("L", (31, 77), 200).save(tmp_path / "grey.png")
    own, grey = (
        api.verify(tmp_path / "out", backbone, head=head, device="cpu", image=image)
        for image in (None, tmp_path / "grey.png")
    )
    assert own.passed
    assert grey.passed
    assert own.predictions != grey.predictions


def test_default_image_is_reproducible_and_detailed() -> None:
    one, two = make_image(), make_image()
    assert one.size == (640, 480)
    assert one.tobytes() == two.tobytes()
    assert len(set(one.getdata() if not hasattr(one, "get_flattened_data") else one.get_flattened_data())) > 10_000


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:x", ""])
def test_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(UsageError, match=r"not a device|cannot verify on the device"):
        choose_device(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_refused_and_auto_uses_the_cpu() -> None:
    with pytest.raises(UsageError, match=r"cuda cannot be used: torch .*, or use --device cpu"):
        choose_device("cuda")
    assert choose_device("auto").device.type == "cpu"


def test_invalid_image_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("no image")
    for path in (tmp_path / "x.png", tmp_path / "none.png"):
        with pytest.raises(UsageError, match=r"does not exist|not an image that"):
            open_image(path)


def test_missing_or_empty_output_folder_is_reported(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    with pytest.raises(OutputError, match="is not a folder"):
        api.verify(tmp_path / "none", backbone)
    (tmp_path / "empty").mkdir()
    found = api.verify(tmp_path / "empty", backbone, device="cpu")
    assert verdicts(found) == {"bytes": False, "config": False, "load": False, "parity": None, "preprocessing": False}
    assert "holds neither model.safetensors nor model.safetensors.index.json" in problems(found)


def test_source_of_another_model_fails(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    api.convert(backbone, tmp_path / "out")
    state, _ = make_states(tiny(), seed=1)
    torch.save(state, tmp_path / "other.pth")
    found = api.verify(tmp_path / "out", tmp_path / "other.pth", device="cpu")
    assert verdicts(found) == {"bytes": False, "config": True, "load": True, "parity": False, "preprocessing": True}


def test_sharded_folder_is_verified_and_a_missing_shard_is_found(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    api.convert(backbone, tmp_path / "out", max_shard_size="300KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert api.verify(tmp_path / "out", backbone, device="cpu").passed
    gone = min((tmp_path / "out").glob("*.safetensors"))
    data = gone.read_bytes()
    gone.unlink()
    found = api.verify(tmp_path / "out", backbone, device="cpu")
    assert verdicts(found) == {"bytes": False, "config": True, "load": False, "parity": None, "preprocessing": True}
    assert "the output cannot be read" in problems(found)
    gone.write_bytes(data[:-1])
    assert "cut short" in byte_problems(tmp_path / "out", backbone)


def test_source_of_another_depth_fails(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny(layers=3))
    shallow, _ = save(tiny(layers=2), "shallow")
    api.convert(backbone, tmp_path / "out")
    found = api.verify(tmp_path / "out", shallow, device="cpu")
    assert verdicts(found) == {"bytes": False, "config": False, "load": True, "parity": False, "preprocessing": True}
    assert "layer 2 is not in the original" in problems(found)


def test_nan_equals_itself_and_nothing_else(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    state["norm.bias"][3] = float("nan")
    torch.save(state, tmp_path / "x.pth")
    api.convert(tmp_path / "x.pth", tmp_path / "out")
    assert api.verify(tmp_path / "out", tmp_path / "x.pth", device="cpu").passed
    alter(tmp_path / "out", lambda state: state["layernorm.bias"].fill_(0))
    found = api.verify(tmp_path / "out", tmp_path / "x.pth", device="cpu")
    assert "the first difference is in cls: inf" in problems(found)
    assert "Infinity" not in json.dumps(found.as_dict())


def test_source_that_torch_cannot_load_fails_parity(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    with zipfile.ZipFile(backbone) as old:
        records = {name: old.read(name) for name in old.namelist() if not name.endswith("/version")}
    with zipfile.ZipFile(backbone, "w") as new:
        for name, data in records.items():
            new.writestr(name, data)
    api.convert(backbone, tmp_path / "out")
    found = api.verify(tmp_path / "out", backbone, device="cpu")
    assert verdicts(found) == {"bytes": True, "config": True, "load": True, "parity": False, "preprocessing": True}


def test_reported_difference_at_224_is_that_of_the_original_script(tmp_path: Path, save: Save) -> None:
    """The same difference results from Meta's interpolation, implemented from its formula, and transformers' own."""
    backbone, _ = save(tiny())
    api.convert(backbone, tmp_path / "out")
    shown = api.verify(tmp_path / "out", backbone, device="cpu").check("parity").numbers["as_published"]["patches"]
    model = transformers.AutoModel.from_pretrained(tmp_path / "out", local_files_only=True).eval()
    pixel_steps = api.plan(backbone).pixel_steps
    assert pixel_steps is not None
    pixels = to_pixels(crop(make_image(), pixel_steps), pixel_steps)
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
def test_wrong_image_processor_is_named_and_gives_other_pixels(
    tmp_path: Path, save: Save, field: str, value: object
) -> None:
    backbone, _ = save(tiny())
    api.convert(backbone, tmp_path / "out")
    path = tmp_path / "out" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    manifest = json.loads((tmp_path / "out" / "streamconv.json").read_text())
    written = {"size": path.stat().st_size, "sha256": sha256(path.read_bytes()).hexdigest(), "overflow_count": 0}
    manifest["files"][path.name] = written  # as if the conversion had written it: it is no edit of the user's
    (tmp_path / "out" / "streamconv.json").write_text(json.dumps(manifest))
    found = api.verify(tmp_path / "out", backbone, device="cpu", parity=False)
    assert verdicts(found) == {"bytes": True, "config": False, "load": True, "parity": None, "preprocessing": False}
    assert f"preprocessor_config.json: {field}" in problems(found)
    assert any(
        "pixels differ" in problem or "pixels of shape [1, 3, 196, 196]" in problem
        for problem in found.check("preprocessing").problems
    )


def test_changed_interpolation_fails_at_the_sizes_that_need_it(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both models must agree when they interpolate in the same way: any other difference at 224 is an error."""
    backbone, _ = save(tiny())
    api.convert(backbone, tmp_path / "out")
    real = dinov2.VisionTransformer.interpolate_pos_encoding

    def shifted(self: dinov2.VisionTransformer, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        positions = real(self, x, height, width)
        return positions if x.shape[1] == 17 else positions + 1e-3

    monkeypatch.setattr(dinov2.VisionTransformer, "interpolate_pos_encoding", shifted)
    found = api.verify(tmp_path / "out", backbone, device="cpu")
    assert found.check("parity").passed is False
    assert "the first difference is in embeddings: " in problems(found)


@pytest.mark.transformers
def test_thorough_verification_runs_the_native_size_too(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    api.convert(backbone, tmp_path / "out")
    assert "native" not in verdicts(api.verify(tmp_path / "out", backbone, device="cpu"))

    found = api.verify(tmp_path / "out", backbone, device="cpu", thorough=True)
    names = ["parity", "native", "preprocessing"]
    assert [name for name in verdicts(found) if name in names] == names
    native = found.check("native")
    assert native.passed
    assert (native.numbers["size"], native.numbers["largest"]) == (56, 0.0)
    assert "as_published" not in native.numbers
    assert "at 56x56" in native.proves


@pytest.mark.transformers
def test_cost_of_a_cast_is_that_of_loading_and_running_the_output(tmp_path: Path, save: Save) -> None:
    """The original in float32, against what transformers' users get: the default dtype, and float32 if they ask."""
    backbone, head = save(tiny(classes=5))
    for name, dtype in (("cast", "bfloat16"), ("stored", None)):
        api.convert(backbone, tmp_path / name, head=head, dtype=dtype)
    assert api.verify(tmp_path / "stored", backbone, head=head, device="cpu").cast_cost is None
    cost = api.verify(tmp_path / "cast", backbone, head=head, device="cpu").cast_cost
    assert cost is not None
    pixel_steps = api.plan(backbone).pixel_steps
    assert pixel_steps is not None
    pixels = to_pixels(crop(make_image(), pixel_steps), pixel_steps)

    def outputs(folder: str, **options: Any) -> tuple[torch.dtype, list[torch.Tensor]]:
        load: Any = transformers.AutoModelForImageClassification.from_pretrained
        model = load(tmp_path / folder, local_files_only=True, **options).eval()
        with torch.no_grad():
            found = model(pixels.to(model.dtype), output_hidden_states=True)
            normed = model.dinov2.layernorm(found.hidden_states[-1])
        return model.dtype, [normed.float(), found.logits.float()]

    stored = outputs("stored", dtype=torch.float32)[1]

    def largest(found: list[torch.Tensor]) -> float:
        return max(float((a - b).abs().max()) for a, b in zip(found, stored, strict=True))

    dtype, default = outputs("cast")
    assert cost.dtype == str(dtype).removeprefix("torch.")
    assert cost.largest == pytest.approx(largest(default), rel=1e-3)
    assert cost.largest_in_float32 == pytest.approx(largest(outputs("cast", dtype=torch.float32)[1]), rel=1e-3)
    assert cost.magnitude == pytest.approx(max(float(value.abs().max()) for value in stored), rel=1e-5)
    assert cost.largest > 1e-3
    if dtype == torch.bfloat16:
        assert cost.largest > cost.largest_in_float32 > 1e-3


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("tried to allocate"), MemoryError(), None])
def test_too_little_memory_for_float64_is_a_gap_and_not_a_failure(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    backbone, _ = save(tiny())
    api.convert(backbone, tmp_path / "out")
    real = dinov2.VisionTransformer.prepare_tokens_with_masks

    def rounded(self: dinov2.VisionTransformer, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.dtype == torch.float64:
            raise error or RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return real(self, pixels) * (1 + 1e-6)

    monkeypatch.setattr(dinov2.VisionTransformer, "prepare_tokens_with_masks", rounded)
    parity = api.verify(tmp_path / "out", backbone, device="cpu").check("parity")
    assert parity.passed
    assert parity.numbers["tolerance"] == 1e-3
    assert parity.numbers["float32_only"] == "cpu has too little memory for float64"
    assert "too little memory for float64, so errors below 0.001 of a layer's largest value" in parity.not_checked


def test_pictures_show_the_patches_of_both_models(converted: Converted) -> None:
    pictures = converted.verify().pictures
    assert list(pictures) == ["image", "original", "converted"]
    opened = {}
    for what, address in pictures.items():
        assert address.startswith("data:image/png;base64,")
        opened[what] = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGB")
    assert opened["image"].size == (518, 518)
    assert opened["original"].size == (16, 16)
    assert pictures["original"] == pictures["converted"]
    assert len(opened["original"].getcolors()) > 8

    def change(state: State) -> None:
        state["encoder.layer.0.mlp.fc2.weight"] = 30 * state["encoder.layer.0.mlp.fc2.weight"].flip(0)

    alter(converted.folder, change)
    pictures = converted.verify().pictures
    assert pictures["original"] != pictures["converted"]


def test_result_names_the_output_files_and_their_digests(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    api.convert(backbone, tmp_path / "out", max_shard_size="1MB")
    found = api.verify(tmp_path / "out", backbone, device="cpu")
    assert found.output["architecture"] == "Dinov2Model"
    paths = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(paths) > 1
    small = ("config.json", "model.safetensors.index.json", "preprocessor_config.json")
    paths += [tmp_path / "out" / name for name in small]
    assert [*found.output["files"]] == [path.name for path in paths]
    assert {name: (file.size, file.sha256) for name, file in found.output["files"].items()} == {
        path.name: (path.stat().st_size, sha256_of(path)) for path in paths
    }
    assert found.seconds > sum(check.numbers["seconds"] for check in found.checks) > 0


def test_image_can_be_loaded_from_a_url(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    make_image().save(server.folder / "x.png")
    (server.folder / "page.html").write_text("<html>no image</html>")
    assert open_image(f"{server.url}/x.png").tobytes() == make_image().tobytes()
    with pytest.raises(UsageError, match="404"):
        open_image(f"{server.url}/none.png")
    with pytest.raises(UsageError, match="not an image that can be read"):
        open_image(f"{server.url}/page.html")
    with pytest.raises(UsageError, match="refused"):
        open_image("http://127.0.0.1:1/x.png")
    monkeypatch.setitem(open_image.__globals__, "MAX_DOWNLOAD_BYTES", 1000)
    with pytest.raises(UsageError, match="is larger than"):
        open_image(f"{server.url}/x.png")


HUBCONF = """
from streamconv.families.registry import find_model
from streamconv.verification.originals import dinov2

def dinov2_vits14(**arguments):
    assert arguments == {"pretrained": False}, arguments
    model = dinov2.build(find_model("dinov2_vits14")[1].dimensions)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    model.blocks[3].ls1.forward = lambda x: FACTOR * x * model.blocks[3].ls1.gamma
    return model
"""


def test_folder_with_the_authors_code_is_used_as_reference(tmp_path: Path, published: Converted) -> None:
    """Two substitutes for the authors' code have packages of the same name; the second one's differs in layer 3."""
    for folder, factor in (("one", "1.0"), ("two", "1.5")):
        (tmp_path / folder / "authors_package").mkdir(parents=True)
        (tmp_path / folder / "authors_package" / "__init__.py").write_text(HUBCONF.replace("FACTOR", factor))
        (tmp_path / folder / "hubconf.py").write_text("from authors_package import dinov2_vits14")
    for folder, passed in (("one", True), ("two", False)):
        found = published.verify(reference=tmp_path / folder)
        assert verdicts(found) == {"bytes": True, "config": True, "load": True, "parity": passed, "preprocessing": True}
        assert found.reference == f"folder {folder}"
        assert passed or found.check("parity").numbers["first"] == "layer 3"


WITH_XFORMERS = """
from torch.nn import functional
from streamconv.families.registry import find_model
from streamconv.verification.originals import dinov2, dinov2_layers, layers

XFORMERS_AVAILABLE = True

class MemEffAttention(dinov2_layers.Attention):
    def forward(self, x):
        assert not XFORMERS_AVAILABLE, "no operator for the CPU, nor for float64"
        return super().forward(x)

class FusedMlp(layers.Mlp):
    def forward(self, x):
        hidden = functional.gelu(functional.linear(x, self.fc1.weight, self.fc1.bias))
        return functional.linear(hidden, self.fc2.weight, self.fc2.bias)

def dinov2_vits14(**arguments):
    model = dinov2.build(find_model("dinov2_vits14")[1].dimensions)
    for block in model.blocks:
        block.attn.__class__, block.mlp.__class__ = MemEffAttention, FusedMlp
    return model
"""


def test_authors_code_with_xformers_is_used_as_reference(tmp_path: Path, published: Converted) -> None:
    """xFormers' attention needs a GPU, and its feed-forward module reads weights of modules that it does not call."""
    (tmp_path / "hubconf.py").write_text(WITH_XFORMERS)
    found = published.verify(reference=tmp_path)
    assert found.passed, problems(found)
    assert found.check("parity").numbers["largest"] <= found.check("parity").numbers["tolerance"]


@pytest.mark.skipif("DINOV2_REPOSITORY" not in os.environ, reason="DINOV2_REPOSITORY names no checkout of Meta's code")
@pytest.mark.parametrize("model", ["dinov2_vits14", "dinov2_vits14_1layer"])
def test_authors_own_code_computes_the_same(tmp_path: Path, model: str) -> None:
    made = streamconv.synth(model, tmp_path / "s.pth")
    api.convert(made.backbone, tmp_path / "out", head=made.head)
    found = api.verify(
        tmp_path / "out", made.backbone, head=made.head, device="cpu", reference=os.environ["DINOV2_REPOSITORY"]
    )
    assert found.passed
    assert found.check("parity").numbers["largest"] == 0.0


def test_unavailable_reference_is_refused(
    tmp_path: Path, converted: Converted, published: Converted, monkeypatch: pytest.MonkeyPatch
) -> None:
    for reference, message in (
        (tmp_path, "hubconf.py"),
        ("meta", "not builtin, hub or a folder"),
        ("hub", "published models"),
    ):
        with pytest.raises(UsageError, match=message):
            converted.verify(reference=reference)

    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load", offline)
    with pytest.raises(UsageError, match="could not be loaded from facebookresearch/dinov2: OSError: no network"):
        published.verify(reference="hub")


def test_safetensors_source_is_verified(tmp_path: Path) -> None:
    safetensors.torch.save_file(make_states(tiny())[0], tmp_path / "x.safetensors")
    api.convert(tmp_path / "x.safetensors", tmp_path / "out")
    found = api.verify(tmp_path / "out", tmp_path / "x.safetensors", device="cpu")
    assert found.passed
    assert "has no CRC-32s" in found.check("bytes").proves


def test_differences_of_large_states_are_relative(tmp_path: Path) -> None:
    """The difference that is shown is the one that is compared with the tolerance; the absolute one is there, too."""
    state, _ = make_states(tiny())
    state = {name: 300 * value if "gamma" in name else value for name, value in state.items()}
    torch.save(state, tmp_path / "x.pth")
    api.convert(tmp_path / "x.pth", tmp_path / "out")
    alter(tmp_path / "out", lambda state: state["encoder.layer.1.layer_scale1.lambda1"].mul_(1.5))
    found = api.verify(tmp_path / "out", tmp_path / "x.pth", device="cpu")
    numbers = found.check("parity").numbers
    assert numbers["first"] == "layer 1"
    assert numbers["largest"] == max(numbers["differences"].values())
    assert numbers["absolute"]["layer 1"] > 10 * numbers["differences"]["layer 1"] > 1e-2
    by = f"{numbers['differences']['layer 1']:.3g} (absolute: {numbers['absolute']['layer 1']:.3g})"
    assert f"the first difference is in layer 1: {by}" in problems(found)


@pytest.mark.parametrize("value", [float("inf"), 1e37])
def test_source_that_is_not_finite_is_verified_and_reported(tmp_path: Path, value: float) -> None:
    state, _ = make_states(tiny())
    state["norm.weight"][:] = value
    torch.save(state, tmp_path / "x.pth")
    api.convert(tmp_path / "x.pth", tmp_path / "out")
    found = api.verify(tmp_path / "out", tmp_path / "x.pth", device="cpu")
    assert found.passed
    assert ("from cls on, prove nothing" in found.check("parity").not_checked) == (value == float("inf"))
    assert ("converted" in found.pictures) == (value == 1e37)


@pytest.mark.parametrize(
    "code", ["return None", "import sys; sys.exit(3)", "import torch; return torch.nn.Linear(1, 1)"]
)
def test_reference_without_a_model_is_a_usage_error(tmp_path: Path, published: Converted, code: str) -> None:
    (tmp_path / "hubconf.py").write_text(f"def dinov2_vits14(**arguments):\n    {code}\n")
    with pytest.raises(UsageError, match="could not be loaded from"):
        published.verify(reference=tmp_path)


@pytest.mark.parametrize(
    "place",
    [
        "streamconv.verification.load._load_model",
        "streamconv.verification.preprocessing._compare_images",
        "streamconv.verification.model_checks.load_weights",
        "streamconv.verification.originals.dinov2.VisionTransformer.prepare_tokens_with_masks",
    ],
)
def test_failure_of_the_machine_is_an_error_and_not_a_failed_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def fail(*given: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    converted = convert(tmp_path, tiny())
    monkeypatch.setattr(place, fail)
    with pytest.raises(UsageError, match="system limit was reached: Too many open files"):
        converted.verify()


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("x"),
        no_memory_for_cuda(),
        no_memory_for_cublas(),
        MemoryError(),
        OSError(errno.ENOMEM, "x"),
        None,
    ],
    ids=["gpu", "cuda", "cublas", "python", "system", "torch"],
)
def test_too_little_memory_is_a_failure_of_the_machine(error: Exception | None) -> None:
    if error is None:
        with pytest.raises(RuntimeError) as caught:
            torch.empty(10**15)
        error = caught.value
    with pytest.raises(UsageError, match="cpu has too little memory to run the models"):
        refuse_machine_failure(error)
    refuse_machine_failure(RuntimeError("x"))
    refuse_machine_failure(FileNotFoundError(errno.ENOENT, "x"))


def test_images_are_rotated_by_exif_and_unsuitable_ones_are_refused(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (40, 30), (9, 9, 9)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (30, 40)
    Image.new("I;16", (40, 30)).save(tmp_path / "deep.png")
    Image.new("RGB", (1, 60)).save(tmp_path / "line.png")
    Image.new("1", (8_000, 8_000)).save(tmp_path / "large.png")  # 8 kB
    Image.new("1", (20_000, 20_000)).save(tmp_path / "larger.png")  # which Pillow itself refuses
    too_large = "large.* more than 50,000,000 pixels; scale it down"
    for name, message in (
        ("deep.png", "more than 8 bits"), ("line.png", "too narrow"),
        ("large.png", too_large), ("larger.png", too_large),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            open_image(tmp_path / name)


def test_verification_reports_what_it_assumes_about_a_model_that_was_not_published(tmp_path: Path) -> None:
    source = saved(make_states(tiny())[0], tmp_path / "x.pth")
    api.convert(source, tmp_path / "out", num_heads=4)
    found = api.verify(tmp_path / "out", source, device="cpu", num_heads=4)
    assert "assuming 4 attention heads in both models, which tensors do not show" in found.check("parity").proves
    assert "assuming the preprocessing of the published models" in found.check("preprocessing").proves
    assert found.conclusion.title == "Looks ok!"
    alone = api.verify(tmp_path / "out", source, device="cpu", parity=False).check("preprocessing")
    assert "assuming the preprocessing of the published models" in alone.proves


def test_guessed_number_of_heads_is_named_in_every_verdict(tmp_path: Path) -> None:
    """Both models use the guess, so that parity cannot find a wrong one."""
    saved(make_states(tiny())[0], tmp_path / "x.pth")
    gap = "the number of attention heads (2) is assumed: give --num-heads if you know it"
    done = run("run", "x.pth", "-o", "out", "--report", "report.html", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2] == f"Looks ok, but not everything was checked: {gap}."
    manifest = Manifest.read(tmp_path / "out")
    assert manifest is not None
    assert manifest.verification is not None
    assert manifest.verification["conclusion"]["details"] == f"{gap}."
    assert gap in (tmp_path / "report.html").read_text("utf-8")
    assert f"But {gap}." in make_card(manifest, "me/mine")
    thorough = api.verify(tmp_path / "out", tmp_path / "x.pth", device="cpu", thorough=True)
    assert thorough.conclusion.details == f"{gap}."
    assert api.verify(tmp_path / "out", tmp_path / "x.pth", device="cpu", num_heads=2).conclusion.title == "Looks ok!"


def test_manifest_with_a_field_of_another_type_is_refused(tmp_path: Path) -> None:
    state, _ = make_states(tiny())
    source = saved(state, tmp_path / "x.pth")
    api.convert(source, tmp_path / "out")
    path = tmp_path / "out" / "streamconv.json"
    manifest = json.loads(path.read_bytes())
    path.write_text(json.dumps({**manifest, "select": ["x"], "num_heads": "4"}))
    with pytest.raises(OutputError, match=r"streamconv\.json is damaged: its field select is"):
        api.verify(tmp_path / "out", source, device="cpu", parity=False)
