"""A file is its authors' own only if streamconv downloaded it from their URL, or if its sha256 is known."""

import os
from hashlib import sha256
from pathlib import Path

import pytest

from streamconv.errors import OutputError
from streamconv.families.base import RemoteFile
from streamconv.files.address import Address
from streamconv.files.local import LocalFile
from streamconv.formats.checkpoint import Checkpoint
from streamconv.source.authors import Authorship, authorship, compute_digests
from streamconv.source.cache import Download, download_path, is_published, torch_hub_cache

NAME = "dinov2_vits14_pretrain.pth"
URL = f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/{NAME}"
DIGEST = sha256(b"weights").hexdigest()


@pytest.fixture
def torch_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch_hub_cache().mkdir(parents=True)
    return torch_hub_cache()


def write(path: Path, data: bytes = b"weights", *, is_published: bool = True) -> Path:
    """Write a file as if it had been downloaded from its authors' URL."""
    path.write_bytes(data)
    state, digest = path.stat(), sha256(data).hexdigest()
    times = {"modified_ns": state.st_mtime_ns, "changed_ns": state.st_ctime_ns}
    Download(URL, len(data), digest, (), True, "2026-01-31", is_published=is_published, **times).write(path)
    return path


def checkpoint(path: Path) -> Checkpoint:
    return Checkpoint({}, {}, [LocalFile(path)], "")


def found(path: Path) -> Authorship:
    """Return what is known about a file without reading it."""
    with checkpoint(path) as opened:
        return authorship(path, opened)


def after_reading(path: Path) -> tuple[Authorship, int]:
    """Return what is known about a file after its digest was computed if necessary, and the bytes read for that."""
    read = []
    with checkpoint(path) as opened:
        digests = compute_digests({"backbone": opened}, lambda step, done, total, unit: read.append(done))
        return authorship(path, opened, digests.get("backbone", "")), max(read, default=0)


def test_only_the_published_url_is_the_authors_own(torch_hub: Path) -> None:
    """Any other spelling could name another file, so a download from it is never put where torch.hub looks."""
    for url in (
        URL.replace("https", "http"), URL.replace("dl.fbaipublicfiles.com", "example.org"), f"{URL}?x=1",
        f"{URL}?X-Amz-Signature=1", URL.replace("https://", "https://user:word@"), f"{URL}#x",
        URL.replace("https", "HTTPS"), URL.replace("com/", "com:443/"), URL.replace("dinov2_vits14/", "/"),
        f"simplecache::{URL}",
    ):  # fmt: skip
        assert not is_published(Address(url)), url
        assert download_path(Address(url)).parent != torch_hub, url
    assert is_published(Address(URL))
    assert download_path(Address(URL)) == torch_hub / NAME


def test_file_downloaded_from_the_published_url_is_the_authors_own(torch_hub: Path, tmp_path: Path) -> None:
    path = write(torch_hub / NAME)
    assert found(path) == Authorship(True, URL, DIGEST)
    (tmp_path / "link").symlink_to(torch_hub)
    assert found(tmp_path / "link" / NAME).is_published
    assert after_reading(path) == (Authorship(True, URL, DIGEST), 0)
    assert {each.name for each in torch_hub.iterdir()} == {NAME, "streamconv"}  # the record is not among torch.hub's
    write(path, is_published=False)
    assert not found(path).is_published


def test_download_record_outside_the_cache_proves_nothing(torch_hub: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "theirs", torch_hub / "theirs"):
        folder.mkdir()
        path = write(folder / NAME)
        assert Download.read(path) is None
        assert after_reading(path) == (Authorship(), 0)
        os.utime(path, ns=(5, 5))
        assert after_reading(path) == (Authorship(), 0)


def test_file_found_in_torch_hubs_cache_may_be_another_file(torch_hub: Path, tmp_path: Path) -> None:
    for path in (torch_hub / NAME, tmp_path / NAME, torch_hub / "mine.pth"):
        path.write_bytes(b"weights")
        assert not found(path).is_published
        published = found(path).found
        assert (published is not None and published.url == URL) == (path == torch_hub / NAME)


@pytest.mark.parametrize("data", [b"weights", b"WEIGHTS", b"longer than that"])
@pytest.mark.parametrize("way", ["replaced", "written in place", "written in place with its time"])
def test_record_does_not_hold_for_a_file_that_has_changed(torch_hub: Path, data: bytes, way: str) -> None:
    """If it has the same size, its bytes are compared: it may be the same file in a cache that was moved."""
    path = write(torch_hub / NAME)
    times = path.stat().st_mtime_ns
    if way == "replaced":
        path.with_name("new").write_bytes(data)
        path.with_name("new").replace(path)
    else:
        path.write_bytes(data)
    os.utime(path, ns=(5, times if way == "written in place with its time" else 5))
    assert not found(path).is_published
    is_same = data == b"weights"
    now, read = after_reading(path)
    assert (now.is_published, now.found is None, read) == (is_same, is_same, 7 if len(data) == 7 else 0)
    assert found(path).is_published == is_same  # its record was renewed
    assert after_reading(path)[1] == (0 if is_same else read)


def test_record_in_a_cache_that_cannot_be_written_still_identifies_a_file(
    torch_hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(torch_hub / NAME)
    os.utime(path, ns=(5, 5))

    def refuse(record: Download, path: Path) -> None:
        raise OutputError(f"{path} is read-only")

    monkeypatch.setattr(Download, "write", refuse)
    assert after_reading(path)[0].is_published
    assert not found(path).is_published


def test_hash_in_a_published_name_identifies_a_file_anywhere(
    torch_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such names are torch.hub's; see its check_hash. Other files are not read for it."""
    known = RemoteFile(f"model-{DIGEST[:8]}.pth", f"https://example.org/model-{DIGEST[:8]}.pth")
    monkeypatch.setattr("streamconv.source.authors.published_files", lambda: {known})
    for folder in (torch_hub, tmp_path):
        path = folder / known.filename
        path.write_bytes(b"weights")
        assert not found(path).is_published
        assert after_reading(path) == (Authorship(True, sha256=DIGEST), 7)
        path.write_bytes(b"WEIGHTS")
        assert after_reading(path)[0] == Authorship(sha256=sha256(b"WEIGHTS").hexdigest(), contradicted=known)
        (folder / NAME).write_bytes(b"weights")
        assert after_reading(folder / NAME)[1] == 0


@pytest.mark.parametrize(
    ("name", "digits"),
    [("m-0123abcd.pth", "0123abcd"), ("m-0123abc.pth", ""), (NAME, ""), ("m-0123ABCD.pth", ""), ("m-0123abcd", "")],
)
def test_hash_is_read_from_a_name_as_torch_hub_does(name: str, digits: str) -> None:
    assert RemoteFile(name, "").sha256_start == digits
