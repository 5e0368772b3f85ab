"""The config.json and preprocessor_config.json beside a model's weights: where they are found, and what they may be."""

import json
import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
import safetensors.torch
import torch
from huggingface_hub import constants, file_download

import streamconv
from streamconv import MappingError, SourceError, UsageError
from streamconv.families.registry import find_model
from streamconv.files.address import Address, parse_location
from streamconv.planning import plan_json
from tests import api
from tests.checkpoints import make_states, prefixed, saved
from tests.file_server import FileServer
from tests.support import run, tiny

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
OWN = {"image_processor_type": "BitImageProcessor", "image_mean": [0.1, 0.2, 0.3], "size": 56, "crop_size": 56}
LARGER = {
    "model_type": "depth_anything",
    "architectures": ["DepthAnythingForDepthEstimation"],
    "neck_hidden_sizes": [1],
}


def edited(path: Path, **entries: Any) -> dict[str, Any]:
    """Change entries of a JSON file, and return all of them."""
    value = {**json.loads(path.read_bytes()), **entries}
    path.write_text(json.dumps(value))
    return value


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a folder of a converted model with four heads, an epsilon and an image processor of its own."""
    source = saved(make_states(tiny())[0], tmp_path / "x.pth")
    folder = api.convert(source, tmp_path / "model", num_heads=4).output
    edited(folder / CONFIG, layer_norm_eps=1e-5, mine={"a": [1.5, None]})
    (folder / PROCESSOR).write_text(json.dumps(OWN))
    (folder / "streamconv.json").unlink()
    return folder


def served(model: Path, server: FileServer) -> str:
    for path in model.iterdir():
        (server.folder / path.name).write_bytes(path.read_bytes())
    return f"{server.url}/org/model/model.safetensors"


def small_files(folder: Path) -> dict[str, Any]:
    """Return the values of config.json, and the bytes of the image processor's file."""
    found = {path.name: path.read_bytes() for path in (folder / CONFIG, folder / PROCESSOR) if path.exists()}
    return found | {CONFIG: json.loads(found[CONFIG])}


@pytest.mark.parametrize("stream", [False, True])
def test_small_files_at_a_url_are_kept(model: Path, server: FileServer, tmp_path: Path, stream: bool) -> None:
    address = served(model, server)
    done = api.convert(address, tmp_path / "out", stream=stream)
    assert small_files(tmp_path / "out") == small_files(model)
    assert f"{CONFIG}: kept from the source" in done.plan.notes
    assert [path for path, *_ in server.requests].count("/org/model/config.json") == 1
    found = api.verify(tmp_path / "out", address, device="cpu", stream=stream)
    assert [check.passed for check in found.checks] == [True] * 5, found.checks
    assert plan_json.from_json(plan_json.to_json(done.plan)) == done.plan


def test_small_files_of_a_server_without_ranges_are_kept(model: Path, server: FileServer, tmp_path: Path) -> None:
    server.faults.ranges = False
    done = api.convert(served(model, server), tmp_path / "out")
    assert small_files(tmp_path / "out") == small_files(model)
    assert done.plan.config["num_attention_heads"] == 4


@pytest.mark.parametrize("ranges", [True, False])
def test_copy_that_is_used_without_a_network_has_its_small_files(
    model: Path, server: FileServer, tmp_path: Path, ranges: bool
) -> None:
    server.faults.ranges = ranges
    address = served(model, server)
    api.convert(address, tmp_path / "out")
    server.faults.statuses = [503] * 100
    api.convert(address, tmp_path / "again")
    assert small_files(tmp_path / "again") == small_files(tmp_path / "out") == small_files(model)
    server.faults.statuses = []
    for name in (CONFIG, PROCESSOR):
        (server.folder / name).unlink()
    assert api.convert(address, tmp_path / "third", num_heads=2).plan.config["num_attention_heads"] == 2
    server.faults.statuses = [503] * 100
    assert api.plan(address, num_heads=2).image_processor_from == "family"


def test_number_of_heads_is_found_beside_a_file_at_a_url(server: FileServer, tmp_path: Path) -> None:
    """In the authors' names, too, unless it has the shapes of a published model, of which everything is known."""
    saved(make_states(tiny())[0], server.folder / "x.pth")
    (server.folder / CONFIG).write_text(
        json.dumps({"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4})
    )
    planned = api.plan(f"{server.url}/x.pth")
    assert (planned.config["num_attention_heads"], planned.unproved) == (4, ())
    assert "4 attention heads, as stated by the config.json beside it" in planned.notes
    family, small = find_model("dinov2_vits14")
    infos = family.sources(small.dimensions)
    saved({key: torch.zeros(1).expand(info.shape) for key, info in infos.items()}, server.folder / "y.pth")
    server.requests.clear()
    assert api.plan(f"{server.url}/y.pth").config["num_attention_heads"] == 6
    assert {path for path, *_ in server.requests} == {"/y.pth"}


def test_small_files_in_a_store_are_kept(model: Path, tmp_path: Path) -> None:
    memory: Any = fsspec.filesystem("memory")
    memory.store.clear()
    for path in model.iterdir():
        memory.pipe_file(f"/bucket/m/{path.name}", path.read_bytes())
    api.convert("memory://bucket/m/model.safetensors", tmp_path / "out", stream=True)
    assert small_files(tmp_path / "out") == small_files(model)
    memory.store.clear()


def test_small_files_of_a_repository_on_the_hub_are_kept(
    model: Path, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served(model, server)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    api.convert("hf://o/n@v1/sub/model.safetensors", tmp_path / "out", stream=True)
    assert small_files(tmp_path / "out") == small_files(model)
    assert "/o/n/resolve/v1/sub/config.json" in [path for path, *_ in server.requests]


@pytest.mark.parametrize(
    ("address", "beside"),
    [
        ("https://h/a/model.safetensors", "https://h/a/config.json"),
        ("https://h/a/model.safetensors?token=1/2#x", "https://h/a/config.json?token=1/2#x"),
        ("hf://o/n@v/model.safetensors", "hf://o/n@v/config.json"),
        ("s3://b/a%20c/m?x.safetensors", "s3://b/a%20c/config.json"),
        ("tar://a/m.safetensors::https://h/b.tar?q", "tar://a/config.json::https://h/b.tar?q"),
    ],
)  # fmt: skip
def test_address_of_a_file_beside_another(address: str, beside: str) -> None:
    location = parse_location(address)
    assert isinstance(location, Address)
    assert location.beside(CONFIG) == Address(beside)


def test_missing_files_at_a_url_are_noted(model: Path, server: FileServer, tmp_path: Path) -> None:
    (model / PROCESSOR).unlink()
    (model / CONFIG).unlink()
    notes = api.plan(served(model, server)).notes
    assert "config.json: generated, since the source has none that can be used" in notes
    assert any("preprocessor_config.json: that of published dinov2 models" in note for note in notes)
    assert any("tensors do not show the number" in note for note in notes)


def test_a_web_page_instead_of_a_config_counts_as_none(model: Path, server: FileServer) -> None:
    address = served(model, server)
    (server.folder / CONFIG).write_text("\n<!DOCTYPE html><html>not found</html>")
    assert "config.json: generated, since the source has none that can be used" in api.plan(address).notes


def test_refused_files_are_noted_since_they_may_not_exist(
    model: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stores answer 403 for missing files to users who may not list them."""
    address = served(model, server)
    plain = api.plan(address)
    server.faults.statuses = [0, 403, 403]
    planned = api.plan(address)
    assert planned.config["num_attention_heads"] == 2 != plain.config["num_attention_heads"]
    for name in (CONFIG, PROCESSOR):
        assert f"the server refuses to send {name}, which may therefore exist" in planned.notes
    assert planned.unproved


def test_failing_server_is_an_error(model: Path, server: FileServer) -> None:
    address = served(model, server)
    server.faults.statuses = [0, *[500] * 20]
    with pytest.raises(SourceError, match=r"The config\.json beside the weights, which describes the model, cannot be"):
        api.plan(address)


@pytest.mark.parametrize("name", [CONFIG, PROCESSOR])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "is not valid JSON: .* It describes the model beside it. Fetch it again"),
        ("[1]", "is not a JSON object"),
        ("", "is not valid JSON"),
        ("\xff\xfe", "is not valid JSON"),
        ('{"a": ' * 5000, "is not valid JSON"),
        ('{"a": [' + "[]," * 200_000 + "[]]}", "holds more than the settings of any model"),
        (" " * (9 << 20) + "{}", "holds more than the settings of any model"),
    ],
    ids=["half", "list", "empty", "binary", "deep", "wide", "large"],
)  # fmt: skip
def test_broken_file_is_an_error(model: Path, tmp_path: Path, name: str, text: str, message: str) -> None:
    (model / name).write_bytes(text.encode("latin-1"))
    for place in (model, model / "model.safetensors"):
        with pytest.raises(SourceError, match=message):
            api.plan(place)
    done = run("convert", model, "-o", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 3
    assert name in done.stderr
    assert len(done.stderr) < 1000


def test_broken_config_beside_a_file_in_the_authors_names_is_noted(tmp_path: Path) -> None:
    source = saved(make_states(tiny())[0], tmp_path / "x.pth")
    (tmp_path / CONFIG).write_text("{")
    assert any(note.startswith("the config.json beside it is not used: ") for note in api.plan(source).notes)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_unreadable_config_is_an_error(model: Path) -> None:
    (model / CONFIG).chmod(0)
    with pytest.raises(SourceError, match="cannot be opened"):
        api.plan(model)


def test_config_that_is_no_file_is_an_error(model: Path) -> None:
    (model / CONFIG).unlink()
    os.mkfifo(model / CONFIG)
    with pytest.raises(SourceError, match=r"not a regular file\.$"):
        api.plan(model)


def test_differences_are_listed(model: Path, tmp_path: Path) -> None:
    edited(
        model / CONFIG, transformers_version="4.1", _name_or_path="/home/me", auto_map={"AutoModel": "x.Y"},
        transformers_weights="a",
        torch_dtype="float16", architectures=["Mine"], use_mask_token=False,
    )  # fmt: skip
    done = api.convert(model, tmp_path / "out", dtype="bfloat16")
    assert done.plan.notes[0] == (
        "config.json: kept from the source; changed: use_mask_token False → True, architectures Mine → Dinov2Model, "
        "dtype float32 → bfloat16; left out: transformers_version, _name_or_path, auto_map, transformers_weights"
    )
    config = small_files(tmp_path / "out")[CONFIG]
    assert config["mine"] == {"a": [1.5, None]}
    assert not config.keys() & {
        "transformers_version",
        "_name_or_path",
        "auto_map",
        "torch_dtype",
        "transformers_weights",
    }
    shown = run("plan", model, cwd=tmp_path, COLUMNS="300").stdout
    assert "config.json: kept from the source; changed: use_mask_token" in shown


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_code_that_a_config_chooses_is_left_out(model: Path, tmp_path: Path, key: str) -> None:
    """from_pretrained would download and run it; verification chooses its own."""
    edited(model / CONFIG, **{key: "kernels-community/other"})
    done = api.convert(model, tmp_path / "out")
    assert done.plan.notes[0].endswith(f"; left out: {key}")
    assert key not in small_files(tmp_path / "out")[CONFIG]


def test_entries_that_a_config_leaves_to_transformers_are_those_of_transformers(model: Path, tmp_path: Path) -> None:
    """Without a number of heads, transformers takes 12, which do not divide 128; epsilon is the authors' own."""
    config = json.loads((model / CONFIG).read_bytes())
    few = {key: config[key] for key in ("model_type", "hidden_size", "image_size")}
    (model / CONFIG).write_text(json.dumps({**few, "num_attention_heads": 8}))
    planned = api.plan(model)
    assert (planned.dimensions.num_heads, planned.dimensions.epsilon) == (8, 1e-6)
    assert "out_indices" not in planned.config
    assert planned.config["num_hidden_layers"] == 3
    added = planned.notes[0].partition("; added: ")[2]
    assert "num_hidden_layers 3" in added
    assert "hidden_size" not in added
    (model / CONFIG).write_text(json.dumps(few))
    with pytest.raises(MappingError, match="hidden size 128 is not divisible by 12 attention heads"):
        api.plan(model)


def test_sizes_may_be_lists(model: Path, tmp_path: Path) -> None:
    edited(model / CONFIG, image_size=[56, 56], patch_size=[14, 14])
    done = api.convert(model, tmp_path / "out")
    assert small_files(tmp_path / "out")[CONFIG]["image_size"] == [56, 56]
    found = api.verify(tmp_path / "out", model, device="cpu")
    assert [check.passed for check in found.checks] == [True] * 5, found.checks
    assert (done.plan.native_size, done.plan.patch_size) == (56, 14)
    edited(model / CONFIG, image_size=[56, 70])
    with pytest.raises(MappingError, match=r"sets image_size to \[56, 70\], but the tensors show 56"):
        api.plan(model)


# Labels


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    backbone, head = make_states(tiny(classes=3))
    source, head_path = saved(backbone, tmp_path / "c.pth"), saved(head, tmp_path / "h.pth")
    folder = api.convert(source, tmp_path / "classifier", head=head_path).output
    edited(
        folder / CONFIG, problem_type="multi_label_classification", id2label={"0": "a", "1": "b", "2": "a"},
        label2id={"a": 0, "b": 1},
    )  # fmt: skip
    return folder


def test_labels_of_the_source_are_kept_as_they_are(classifier: Path, tmp_path: Path) -> None:
    done = api.convert(classifier, tmp_path / "out", dtype="float16")
    theirs, ours = small_files(classifier)[CONFIG], small_files(tmp_path / "out")[CONFIG]
    assert ours == {**theirs, "dtype": "float16"}
    assert done.labels_from == "the source's config.json"
    found = api.verify(tmp_path / "out", classifier, device="cpu", parity=False)
    assert found.check("config").passed
    assert found.edited == ()


def test_labels_that_are_given_win_and_the_task_stays(classifier: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("x\ny\nz\n")
    done = api.convert(classifier, tmp_path / "out", labels=tmp_path / "labels.txt")
    config = small_files(tmp_path / "out")[CONFIG]
    assert config["id2label"] == {"0": "x", "1": "y", "2": "z"}
    assert config["label2id"] == {"x": 0, "y": 1, "z": 2}
    assert config["problem_type"] == "multi_label_classification"
    assert done.labels_from == "labels.txt"
    kept = "config.json: kept from the source; changed: id2label 3 entries → 3 entries, label2id 2 entries → 3 entries"
    assert kept in done.plan.notes
    found = api.verify(tmp_path / "out", classifier, device="cpu", parity=False)
    assert found.check("config").passed


@pytest.mark.parametrize("ids", [{"0": "a"}, {}, "none"])
def test_labels_of_another_number_contradict_the_tensors(classifier: Path, ids: Any) -> None:
    edited(classifier / CONFIG, id2label=ids)
    with pytest.raises(MappingError, match=r"its config\.json sets id2label to .*, but the tensors show 3"):
        api.plan(classifier)


# Parts of larger models


def larger(tmp_path: Path, model: Path, config: dict[str, Any], processor: dict[str, Any] | None) -> Path:
    """Return a folder of a model that has the other one under ``backbone.``, with other tensors beside it."""
    folder = tmp_path / "larger"
    folder.mkdir()
    state = prefixed(safetensors.torch.load_file(model / "model.safetensors"), "backbone.")
    others = {"neck.weight": torch.ones(2), "head.conv.bias": torch.ones(3)}
    safetensors.torch.save_file({**state, **others}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config))
    if processor is not None:
        (folder / PROCESSOR).write_text(json.dumps(processor))
    return folder


@pytest.mark.parametrize("path", [("backbone_config",), ("vision_config",), ("a", "b", "c")], ids=".".join)
def test_part_of_a_larger_models_config_is_kept(model: Path, tmp_path: Path, path: tuple[str, ...]) -> None:
    own = json.loads((model / CONFIG).read_bytes())
    config: dict[str, Any] = {**own, "out_indices": [1, 2], "out_features": ["stage1", "stage2"], "torch_dtype": None}
    for key in reversed(path):
        config = {key: config}
    source = larger(tmp_path, model, {**LARGER, "text_config": {"model_type": "gpt2"}, **config}, OWN)
    done = api.convert(source, tmp_path / "out", select="backbone")
    kept = small_files(tmp_path / "out")
    assert kept[CONFIG] == {**own, "out_indices": [1, 2], "out_features": ["stage1", "stage2"]}
    assert json.loads(kept[PROCESSOR]) == OWN
    assert "config.json: the dinov2 part of a depth_anything model's configuration" in done.plan.notes
    found = api.verify(tmp_path / "out", source, device="cpu")
    assert [check.passed for check in found.checks] == [True] * 5, found.checks


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"backbone_config": {"model_type": "swin"}}, "no part"),
        ({"a": {"b": {"c": {"d": {"model_type": "dinov2"}}}}}, "no part"),
        ({"a": {"model_type": "dinov2"}, "b": {"model_type": "dinov2", "hidden_size": 5}}, "2 different parts"),
    ],
)  # fmt: skip
def test_config_without_one_part_is_not_used(model: Path, tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    source = larger(tmp_path, model, {**LARGER, **config}, None)
    planned = api.plan(source, select="backbone", num_heads=4)
    assert (
        f"config.json is not used: it is a depth_anything model's configuration, with {reason} for dinov2"
        in planned.notes
    )
    assert "config.json: generated, since the source has none that can be used" in planned.notes


def test_image_processor_that_only_the_larger_model_can_use_is_not_kept(model: Path, tmp_path: Path) -> None:
    own = json.loads((model / CONFIG).read_bytes())
    processor = {"image_processor_type": "DPTImageProcessor", "keep_aspect_ratio": True, "size": {"height": 518}}
    planned = api.plan(larger(tmp_path, model, {**LARGER, "backbone_config": own}, processor), select="backbone")
    assert planned.image_processor_from == "family"
    assert "the larger model's image processor, a DPTImageProcessor, is not used" in planned.notes
    with pytest.raises(UsageError):
        streamconv.plan(model, streamconv.ConversionOptions(image_mean="0.5,0.5"))


@pytest.mark.parametrize("entries", [{"model_type": ["dinov2"]}, {"model_type": {"a": 1}}, {"model_type": 7}])
def test_model_type_that_is_no_string_is_that_of_another_model(model: Path, entries: dict[str, Any]) -> None:
    edited(model / CONFIG, **entries)
    assert any("config.json is not used" in note for note in api.plan(model).notes)
