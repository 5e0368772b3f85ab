"""Addresses as browsers show them: those of a page about a file become the file's, others are refused with advice."""

import pytest

from streamconv import UsageError
from streamconv.files.address import Address, hf_to_https, parse_location
from streamconv.source.resolve import resolve_source

HUB = "https://huggingface.co"


def url(words: str) -> str:
    address = parse_location(words)
    assert isinstance(address, Address)
    return address.url


@pytest.mark.parametrize(
    ("page", "file"),
    [
        (f"{HUB}/o/n/blob/main/x.pth", f"{HUB}/o/n/resolve/main/x.pth"),
        (f"{HUB}/o/n/blob/main/a/b/x.pth?download=true", f"{HUB}/o/n/resolve/main/a/b/x.pth?download=true"),
        (f"{HUB}/o/n/raw/v1.0/x.pth#L1", f"{HUB}/o/n/resolve/v1.0/x.pth"),
        (f"{HUB}/datasets/o/n/blob/refs%2Fpr%2F1/x.pth", f"{HUB}/datasets/o/n/resolve/refs%2Fpr%2F1/x.pth"),
        ("https://hf.co/o/n/blob/main/x.pth", "https://hf.co/o/n/resolve/main/x.pth"),
        ("https://hf-mirror.com/o/n/blob/main/x.pth", "https://hf-mirror.com/o/n/resolve/main/x.pth"),
        ("https://me:word@huggingface.co/o/n/blob/main/x", "https://me:word@huggingface.co/o/n/resolve/main/x"),
        ("hf://o/n/blob/main/a/x.pth", "hf://o/n@main/a/x.pth"),
        ("hf://datasets/o/n/resolve/v1/x.pth", "hf://datasets/o/n@v1/x.pth"),
        ("https://github.com/o/n/blob/main/a/x.pth?raw=true", "https://github.com/o/n/raw/main/a/x.pth"),
        ("https://gitlab.com/o/p/n/-/blob/main/x.pth?ref_type=heads", "https://gitlab.com/o/p/n/-/raw/main/x.pth"),
        ("https://gitlab.my.org/o/n/-/blob/main/x.pth", "https://gitlab.my.org/o/n/-/raw/main/x.pth"),
        (
            "https://modelscope.cn/models/o/n/file/view/master/x.pth?status=2",
            "https://modelscope.cn/models/o/n/resolve/master/x.pth",
        ),
        ("https://zenodo.org/record/12/preview/x.pth", "https://zenodo.org/records/12/files/x.pth"),
        ("https://www.dropbox.com/s/ab/x.pth?dl=0", "https://www.dropbox.com/s/ab/x.pth?dl=1"),
        ("https://www.dropbox.com/s/ab/x.pth", "https://www.dropbox.com/s/ab/x.pth?dl=1"),
        ("https://dropbox.com/scl/fi/a/x.pth?rlkey=k&dl=0", "https://dropbox.com/scl/fi/a/x.pth?rlkey=k&dl=1"),
        ("https://dropbox.com/scl/fi/a/x.pth?rlkey=k", "https://dropbox.com/scl/fi/a/x.pth?dl=1&rlkey=k"),
    ],
)
def test_page_about_a_file_becomes_the_file(page: str, file: str) -> None:
    assert url(page) == file
    assert url(file) == file
    (note,) = resolve_source(page).notes
    assert note == f"read from {Address(file)}, the file that the given page is about"
    assert resolve_source("dinov2_vits14_1layer", page).notes == (note,)
    assert resolve_source(file).notes == ()


@pytest.mark.parametrize(
    "words",
    [
        f"{HUB}/o/n/resolve/main/blob/main/x.pth",
        "https://raw.githubusercontent.com/o/n/main/x.pth",
        "https://github.com/o/n/releases/download/v1/x.pth",
        "https://github.com/o/n/raw/main/x.pth",
        "https://zenodo.org/records/12/files/x.pth?download=1",
        "https://dropbox.com/scl/fi/a/x.pth?rlkey=k&dl=1",
        "https://dropbox.com/s/a/x.pth?raw=1",
        "https://drive.google.com/uc?export=download&id=1",
        "https://my.sharepoint.com/:u:/g/a?e=1&download=1",
        "https://my.org/o/n/blob/main/x.pth",
        "https://my.org/file/d/1/view",
        "https://onedrive.live.com/download?id=1",
        "https://ndownloader.figshare.com/files/1",
        "s3://huggingface.co/o/n/blob/main/x.pth",
        "hf://o/n/deep/blob/x.pth",
    ],
)
def test_every_other_url_stays_unchanged(words: str) -> None:
    assert url(words) == words
    assert resolve_source(words).notes == ()


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (f"{HUB}/o/n", "such as hf://o/n/model.safetensors"),
        (f"{HUB}/o/n.1/?x=1", "such as hf://o/n.1/model.safetensors"),
        (f"{HUB}/o/n/tree/main/", "such as hf://o/n/model.safetensors"),
        (f"{HUB}/datasets/o/n/tree/main/sub", "such as hf://datasets/o/n/model.safetensors"),
        ("hf://o/n", "is a repository, not a file. Name a file in it, such as hf://o/n/model.safetensors"),
        ("hf://o/n@v1/", "such as hf://o/n/model.safetensors"),
        ("hf://o/n/tree/main", "such as hf://o/n/model.safetensors"),
        ("https://github.com/o/n", "https://github.com/o/n/raw/BRANCH/FILE"),
        ("https://github.com/o/n/tree/main/a", "https://github.com/o/n/raw/BRANCH/FILE"),
        ("https://github.com/o/n/releases/tag/v1", "an asset of a release"),
        ("https://drive.google.com/file/d/1AbC/view?usp=sharing", "gdown --fuzzy"),
        ("https://drive.google.com/open?id=1AbC", "gdown --fuzzy"),
        ("https://drive.google.com/drive/folders/1AbC", "gdown --fuzzy"),
        ("https://www.dropbox.com/sh/abc/def?dl=0", "with a browser"),
        ("https://1drv.ms/u/s!abc", "with a browser"),
        ("https://my.sharepoint.com/:u:/g/personal/a?e=1", "with a browser"),
        ("https://modelscope.cn/models/o/n/summary", "https://modelscope.cn/models/o/n/resolve/master/FILE"),
        ("https://zenodo.org/records/12", "https://zenodo.org/records/12/files/FILE"),
        ("https://figshare.com/articles/dataset/x/1", "with a browser"),
    ],
)
def test_page_without_a_file_is_refused_with_the_way_to_one(words: str, advice: str) -> None:
    with pytest.raises(UsageError, match=r"is a (page|repository), not a file") as caught:
        parse_location(words)
    assert advice in str(caught.value)


def test_mirror_of_the_hub_has_the_same_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.local:8080/hub")
    assert url("http://mirror.local:8080/o/n/blob/main/x.pth") == "http://mirror.local:8080/o/n/resolve/main/x.pth"
    assert url("http://mirror.local:8080/deep/x.pth") == "http://mirror.local:8080/deep/x.pth"
    with pytest.raises(UsageError, match=r"such as hf://o/n/model\.safetensors"):
        parse_location("http://mirror.local:8080/o/n")
    assert url("http://mirror.local/o/n") == "http://mirror.local/o/n"


def test_page_of_the_hubs_short_form_names_the_same_file() -> None:
    short = parse_location("hf://o/n/blob/v1/a/x.pth")
    assert isinstance(short, Address)
    assert hf_to_https(short).url.endswith("/o/n/resolve/v1/a/x.pth")


def test_secret_of_a_page_is_not_shown() -> None:
    with pytest.raises(UsageError) as caught:
        parse_location("https://www.dropbox.com/scl/fo/a/b?rlkey=secret&dl=0")
    (note,) = resolve_source("https://www.dropbox.com/scl/fi/a/x.pth?rlkey=secret&dl=0").notes
    assert "secret" not in f"{caught.value} {note}"
