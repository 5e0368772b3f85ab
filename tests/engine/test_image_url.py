"""The image to verify with is read from a URL like a checkpoint: through proxies, with credentials and retries."""

import base64

import pytest

from streamconv import UsageError
from streamconv.verification import image
from streamconv.verification.image import make_image, open_image
from tests.file_server import FileServer


@pytest.fixture
def url(server: FileServer) -> str:
    """Return the URL of an image of 900 kB."""
    make_image().save(server.folder / "x.bmp")
    return f"{server.url}/x.bmp"


@pytest.mark.parametrize("has_ranges", [True, False])
def test_image_is_read_whatever_the_connection_does(server: FileServer, url: str, has_ranges: bool) -> None:
    server.faults.ranges = has_ranges
    server.faults.cut_after, server.faults.cuts = 300_000, 1
    server.faults.statuses = [503]
    assert open_image(url).tobytes() == make_image().tobytes()
    assert server.faults.cuts == 0


def test_image_is_read_through_a_proxy_with_credentials(
    server: FileServer, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.faults.needs_authorization = "Basic " + base64.b64encode(b"someone:secret").decode()
    monkeypatch.setenv("http_proxy", server.url.replace("http://", "http://user:word@"))
    assert open_image("http://someone:secret@images.invalid/x.bmp").tobytes() == make_image().tobytes()
    secret = "Basic " + base64.b64encode(b"user:word").decode()
    assert {headers["Proxy-Authorization"] for _, _, headers in server.requests} == {secret}
    server.faults.needs_authorization = "other"
    with pytest.raises(UsageError, match="401") as caught:
        open_image("http://someone:secret@images.invalid/x.bmp?signature=secret")
    assert "secret" not in str(caught.value)


def test_image_that_is_too_large_is_refused_before_it_is_fetched(
    server: FileServer, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image, "MAX_DOWNLOAD_BYTES", 600_000)
    with pytest.raises(UsageError, match="is larger than"):
        open_image(url)
    assert server.sent < 600_000


@pytest.mark.parametrize("words", ["https://", "http://h:port/x.png", "http://[::1/x.png"])
def test_image_url_that_is_not_valid_is_refused_at_once(words: str) -> None:
    with pytest.raises(UsageError, match="is not a valid URL"):
        open_image(words)


def test_image_may_have_any_path(server: FileServer) -> None:
    make_image().save(server.folder / "x.png")
    server.faults.redirects = {"/": "/x.png"}
    assert open_image(f"{server.url}/?id=5").size == make_image().size
