"""A SOURCE argument is resolved to a model's files, a path or an address."""

from dataclasses import replace
from pathlib import Path

import pytest

from streamconv import NetworkError, SourceMissingError, UsageError
from streamconv.files import retries
from streamconv.files.address import Address
from streamconv.source.cache import Download, own_path
from streamconv.source.open import open_source
from streamconv.source.resolve import default_output, resolve_source


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_model_name_means_files_in_the_torch_hub_cache(kept: Path) -> None:
    (kept / "dinov2_vitb14_pretrain.pth").touch()
    (kept / "dinov2_vitb14_linear_head.pth").touch()
    found = resolve_source("dinov2_vitb14")
    assert (found.backbone, found.head) == (kept / "dinov2_vitb14_pretrain.pth", None)
    found = resolve_source("dinov2_vitb14_1layer")
    assert (found.backbone, found.head) == (kept / "dinov2_vitb14_pretrain.pth", kept / "dinov2_vitb14_linear_head.pth")


def test_model_name_means_the_authors_url_if_not_cached(kept: Path) -> None:
    address = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitg14/dinov2_vitg14_"
    assert resolve_source("dinov2_vitg14").backbone == Address(f"{address}pretrain.pth")
    (kept / "dinov2_vitg14_pretrain.pth").touch()
    found = resolve_source("dinov2_vitg14_1layer")
    assert (found.backbone, found.head) == (kept / "dinov2_vitg14_pretrain.pth", Address(f"{address}linear_head.pth"))


def test_unreachable_model_names_its_address_and_its_place_in_the_cache(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "RETRY_WAITS_SECONDS", (0, 0, 0))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(NetworkError) as caught, open_source(resolve_source("dinov2_vitg14")):
        pass
    assert "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitg14/dinov2_vitg14_pretrain.pth" in str(caught.value)
    assert str(kept / "dinov2_vitg14_pretrain.pth") in str(caught.value)


def test_word_after_a_dot_and_slash_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dinov2-small").mkdir()
    with pytest.raises(SourceMissingError, match=r"no such file\. Did you mean `dinov2-small`\?"):
        resolve_source("./dinov2-smal")


def test_mistyped_word_suggests_a_folder_beside_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dinov2-small").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"Did you mean `dinov2-small`, dinov2_vits14 or "):
        resolve_source("dinov2-smal")


def test_unknown_model_name_suggests_similar_names() -> None:
    with pytest.raises(UsageError, match="Did you mean dinov2_vitg14,"):
        resolve_source("dino2_vitg14")
    with pytest.raises(UsageError, match="streamconv models"):
        resolve_source("resnet")


@pytest.mark.parametrize("name", ["missing.pth", "some/folder/missing", Path("missing")])
def test_missing_path_is_reported_as_missing(name: str | Path) -> None:
    with pytest.raises(SourceMissingError, match="no such file"):
        resolve_source(name)


def test_empty_source_is_refused() -> None:
    with pytest.raises(UsageError, match="SOURCE is empty"):
        resolve_source("")


def test_head_is_refused_for_a_model_without_a_classifier(kept: Path) -> None:
    (kept / "dinov2_vits14_pretrain.pth").touch()
    (kept / "head.pth").touch()
    with pytest.raises(UsageError, match="dinov2_vits14_1layer"):
        resolve_source("dinov2_vits14", kept / "head.pth")
    assert resolve_source("dinov2_vits14_1layer", kept / "head.pth").head == kept / "head.pth"
    with pytest.raises(SourceMissingError):
        resolve_source(kept / "dinov2_vits14_pretrain.pth", kept / "none.pth")


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("dinov2-base", "dinov2_vitb14"),
        ("facebook/dinov2-base", "dinov2_vitb14"),
        ("dinov2-with-registers-small", "dinov2_vits14_reg"),
        ("facebook/dinov2-with-registers-giant-imagenet1k-1-layer", "dinov2_vitg14_reg_1layer"),
        ("dinov2-base-imagenet1k-1-layer", "dinov2_vitb14_1layer"),
        ("webssl-dino7b-full8b-518", "webssl_dino7b_full8b_518"),
        ("facebook/webssl-dino300m-full2b-224", "webssl_dino300m_full2b_224"),
    ],
)
def test_name_on_the_hub_means_the_model(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, model: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_source(name) == resolve_source(model)
    with pytest.raises(SourceMissingError, match="no such file"):
        resolve_source(Path(name))  # a program that gives a path means one


def test_file_or_folder_takes_precedence_over_a_name_on_the_hub(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Converted folders have these names."""
    monkeypatch.chdir(tmp_path)
    for name in ("dinov2-small", "facebook/dinov2-small"):
        (tmp_path / name).mkdir(parents=True)
        found = resolve_source(name)
        assert (found.backbone, found.model) == (Path(name), None)
        assert found.notes == (f"{name} is a path here; a model is published under this name, too",)
    (tmp_path / "dinov2_vits14").mkdir()
    found = resolve_source("dinov2_vits14")
    assert found.model is not None
    assert found.notes == ()


@pytest.mark.parametrize("output", ["dinov2-small", Path("dinov2-small"), "./dinov2-small/", "here"])
def test_output_folder_is_never_the_source(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str | Path
) -> None:
    """So `run dinov2-small` can be repeated after an interruption."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dinov2-small").mkdir()
    output = tmp_path / "dinov2-small" if output == "here" else output
    assert resolve_source("dinov2-small", output=output) == resolve_source("dinov2_vits14")
    assert resolve_source("dinov2-small", output="other").backbone == Path("dinov2-small")


def test_file_that_was_downloaded_from_the_authors_url_precedes_one_that_was_found(kept: Path) -> None:
    url = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"
    found, own = kept / "dinov2_vits14_pretrain.pth", own_path(Address(url))
    own.parent.mkdir(parents=True)
    found.write_bytes(b"found")
    own.write_bytes(b"own")
    record = Download(url, 3, "", (), True, "2026-01-31")
    record.write(own)
    assert resolve_source("dinov2_vits14").backbone == found
    replace(record, is_published=True).write(own)
    assert resolve_source("dinov2_vits14").backbone == own
    replace(record, is_published=True, size=5).write(found)
    assert resolve_source("dinov2_vits14").backbone == found
    found.write_bytes(b"changed")
    assert resolve_source("dinov2_vits14").backbone == own


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("dinov2_vits14", "dinov2-small"),
        ("dinov2-small", "dinov2-small"),
        ("facebook/dinov2-small", "dinov2-small"),
        ("./dinov2-small", None),
        (Path("dinov2-small"), None),
        ("mine.pth", None),
    ],
)
def test_model_is_converted_into_a_folder_of_its_name_on_the_hub(source: str | Path, output: str | None) -> None:
    assert default_output(source) == output


def test_name_of_another_repository_is_answered_with_the_url_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("microsoft/rad-dino", "me/model-v1.5", "me/dinov2.v2.1"):
        with pytest.raises(SourceMissingError, match=rf"no such file\. .*: hf://{name}/model\.safetensors\."):
            resolve_source(name)
    with pytest.raises(SourceMissingError, match=r"hf://facebook/dinov2-bas/.* Did you mean the model dinov2_vitb14"):
        resolve_source("facebook/dinov2-bas")
    (tmp_path / "me").mkdir()
    for name in ("me/model", "you/model.pth", "you/model.safetensors", "a/b/c", "/you/model"):
        with pytest.raises(SourceMissingError, match=r"no such file\.$"):
            resolve_source(name)
