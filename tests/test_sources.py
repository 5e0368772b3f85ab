"""What SOURCE means."""

from pathlib import Path

import pytest
import torch

from streamconv import SourceMissingError, UsageError
from streamconv.sources import hub_folder, locate


@pytest.mark.parametrize(
    "variables",
    [{}, {"TORCH_HOME": "/tmp/torch-home"}, {"XDG_CACHE_HOME": "/tmp/cache"}, {"TORCH_HOME": "~/x"}],
    ids=str,
)
def test_the_folder_is_torch_hubs_own(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(hub_folder()) == f"{torch.hub.get_dir()}/checkpoints"


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_a_name_is_the_files_that_torch_hub_keeps(kept: Path) -> None:
    (kept / "dinov2_vitb14_pretrain.pth").touch()
    (kept / "dinov2_vitb14_linear_head.pth").touch()
    found = locate("dinov2_vitb14")
    assert (found.backbone, found.head) == (kept / "dinov2_vitb14_pretrain.pth", None)
    found = locate("dinov2_vitb14_1layer")
    assert (found.backbone, found.head) == (kept / "dinov2_vitb14_pretrain.pth", kept / "dinov2_vitb14_linear_head.pth")


def test_a_missing_file_says_where_it_is_had_and_where_it_goes(kept: Path) -> None:
    with pytest.raises(SourceMissingError) as caught:
        locate("dinov2_vitg14")
    assert "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitg14/dinov2_vitg14_pretrain.pth" in str(caught.value)
    assert str(kept / "dinov2_vitg14_pretrain.pth") in str(caught.value)
    (kept / "dinov2_vitg14_pretrain.pth").touch()
    with pytest.raises(SourceMissingError, match=r"dinov2_vitg14/dinov2_vitg14_linear_head\.pth"):
        locate("dinov2_vitg14_1layer")


def test_near_names_are_offered() -> None:
    with pytest.raises(UsageError, match="Did you mean dinov2_vitg14 "):
        locate("dino2_vitg14")
    with pytest.raises(UsageError, match="streamconv models"):
        locate("resnet")


@pytest.mark.parametrize("name", ["missing.pth", "some/folder/missing", Path("missing")])
def test_a_path_that_is_not_there_is_called_missing(name: str | Path) -> None:
    with pytest.raises(SourceMissingError, match="no such file"):
        locate(name)


def test_an_empty_word_is_no_model() -> None:
    with pytest.raises(UsageError, match="SOURCE is empty"):
        locate("")


def test_heads_belong_to_classifiers(kept: Path) -> None:
    (kept / "dinov2_vits14_pretrain.pth").touch()
    (kept / "head.pth").touch()
    with pytest.raises(UsageError, match="dinov2_vits14_1layer"):
        locate("dinov2_vits14", kept / "head.pth")
    assert locate("dinov2_vits14_1layer", kept / "head.pth").head == kept / "head.pth"
    with pytest.raises(SourceMissingError):
        locate(kept / "dinov2_vits14_pretrain.pth", kept / "none.pth")
