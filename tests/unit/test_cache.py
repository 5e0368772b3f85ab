"""The places of downloaded files in torch.hub's cache, and the records beside them."""

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from streamconv.files.address import Address, parse_location
from streamconv.source.cache import Download, download_path, forget_download, own_path

PUBLISHED = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"


@pytest.fixture
def torch_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("TORCH_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "torch" / "hub" / "checkpoints"


def place(words: str) -> Path:
    address = parse_location(words)
    assert isinstance(address, Address)
    return own_path(address)


def test_published_model_is_kept_where_torch_hub_looks_for_it_unless_another_file_is_there(torch_hub: Path) -> None:
    path = torch_hub / "dinov2_vits14_pretrain.pth"
    assert download_path(Address(PUBLISHED)) == path
    assert download_path(Address(f"{PUBLISHED}?x=1")) != path
    path.parent.mkdir(parents=True)
    path.touch()
    assert download_path(Address(PUBLISHED)) == own_path(Address(PUBLISHED))


def test_files_at_other_urls_have_a_folder_each_and_keep_their_names(torch_hub: Path) -> None:
    words = ["https://h.org/a/x.pth", "https://h.org/b/x.pth", "http://h.org/a/x.pth", "https://h.org:8443/a/x.pth"]
    words += ["https://h.org/a/x.pth?id=1", "https://h.org/a/x.pth?id=2", "s3://h.org/a/x.pth", "https://h.org/A/x.pth"]
    words += ["https://h.org/a/x.pth?key=1", "https://h.org/a/x.pth?key=2"]
    words += ["https://h.org/a/x.pth?id=3&token=word", "https://h.org/a/x.pth?id=4&token=word"]
    words += ["s3://h.org/a#/x.pth?versionId=1", "s3://h.org/a#/x.pth?versionId=2"]
    words += ["ftp://u:1#?2@h.org/a/x.pth", "ftp://u:1#?2@i.org/a/x.pth"]  # whose hosts are not shown
    paths = {place(each) for each in words}
    assert len(paths) == len(words)
    assert {path.name for path in paths} == {"x.pth"}
    assert {path.parents[1] for path in paths} == {torch_hub / "streamconv"}
    assert place("https://h.org/a/x.pth?id=1&token=word") == place("https://h.org/a/x.pth?token=other&id=1")
    assert place(words[0]).parent.name.startswith("h.org-")


@pytest.mark.parametrize(
    "words",
    [
        "https://someone:word@h.org/a/x.pth",
        "https://h.org/a/x.pth#part",
        "https://h.org/a/x.pth?download=true",
        "https://h.org/a/x.pth?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Signature=word",
        "https://h.org/a/x.pth?Expires=1&Signature=word&Key-Pair-Id=K",
        "https://h.org/a/x.pth?se=2024&sp=r&sig=word",
        "https://h.org/a/x.pth?X-Goog-Signature=word&X-Goog-Date=1",
        "https://h.org/a/x.pth?token=word",
    ],
)
def test_secrets_and_ways_to_download_do_not_change_the_place(torch_hub: Path, words: str) -> None:
    assert place(words) == place("https://h.org/a/x.pth")


def test_query_of_a_store_is_not_part_of_a_name() -> None:
    assert Address("abfs://c@h/a/x.pth?sv=1&sig=wo/rd").name == "x.pth"
    assert Address("simplecache::s3://b/a/x.pth?token=word").name == "x.pth"
    assert Address("s3://b/a#1/what?%20.pth").name == "what?%20.pth"


def test_hub_url_and_its_short_form_have_one_place(torch_hub: Path) -> None:
    assert place("hf://o/n@v1/x.pth") == place(f"{constants.ENDPOINT}/o/n/resolve/v1/x.pth")


def test_long_name_is_cut_at_its_beginning(torch_hub: Path) -> None:
    path = place(f"https://h.org/{'n' * 400}.safetensors")
    assert path.name.endswith("nnn.safetensors")
    assert len(path.name) == 150


RECORD = Download("https://h.org/x.pth", 4, "ab", ({"etag": '"1"'}, {"key": None}), True, "2026-01-31")


def test_record_is_read_only_for_a_file_of_its_size_and_format(torch_hub: Path) -> None:
    path = torch_hub / "streamconv" / "h.org-0" / "x.pth"
    RECORD.write(path)
    (record,) = path.parent.iterdir()
    assert Download.read(path) is None
    path.write_bytes(b"1234")
    assert Download.read(path) == RECORD
    path.write_bytes(b"12345")
    assert Download.read(path) is None
    path.write_bytes(b"1234")
    text = record.read_text()
    for wrong in ("", "[]", "[" * 100_000, text[:-9], text.replace("4", '"4"'), text.replace(": 1,", ": 2,", 1)):
        record.write_text(wrong)
        assert Download.read(path) is None, wrong
    record.write_text(json.dumps({**json.loads(text), "of_a_later_version": 1}))
    assert Download.read(path) == RECORD
    forget_download(path)
    forget_download(path)
    assert Download.read(path) is None
