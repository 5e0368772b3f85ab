"""A SOURCE argument is resolved to a model's files, a path or an address."""

from pathlib import Path

import pytest

from streamconv import NetworkError, SourceMissingError, UsageError
from streamconv.files import retries
from streamconv.files.address import Address
from streamconv.source.open import open_source
from streamconv.source.resolve import resolve_source


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
