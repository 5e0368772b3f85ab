"""Settings of the environment that cannot be used end in one message, never in a traceback."""

from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner
from huggingface_hub import constants

from streamconv.cli.commands import app
from streamconv.errors import UsageError
from streamconv.files.address import Address, hf_to_https, parse_location
from streamconv.files.client import Client, _authorization
from streamconv.files.hub_settings import hub_endpoint, hub_token
from streamconv.files.open import open_file
from streamconv.hub.client import HubClient
from streamconv.hub.transport import configure_process
from streamconv.source.cache import download_path, torch_hub_cache
from streamconv.source.labels import imagenet_labels
from tests.support import run_python

BAD_ENDPOINTS = ["http://h.org:99999", "http://h.org:bad", "http://[h.org", "h.org", "https://", "http://h.org:0"]
ON_THE_HUB: dict[str, Callable[[], object]] = {
    "a short URL": lambda: open_file(Address("hf://owner/name/x.pth")),
    "a URL": lambda: Client("").get("https://huggingface.co/owner/name/resolve/main/x.pth", {}),
    "labels": imagenet_labels,
    "a push": HubClient,
    "settings for a push": configure_process,
}


@pytest.mark.parametrize("url", BAD_ENDPOINTS)
def test_invalid_hub_address_is_refused_only_if_the_hub_is_used(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("HF_TOKEN", "hf_t0ken")
    for act in ON_THE_HUB.values():
        with pytest.raises(UsageError, match=r"HF_ENDPOINT is .*, which is not a URL"):
            act()
    if "h.org" in url:
        with pytest.raises(UsageError, match="HF_ENDPOINT"):
            parse_location("https://h.org/x.pth")
    location = parse_location("https://host.invalid/x.pth")
    assert _authorization(urlsplit(location.url), urlsplit(location.url)) == {}


def test_invalid_hub_address_ends_a_command_in_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://h:bad")
    done = CliRunner().invoke(app, ["plan", "hf://owner/name/x.pth"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("error: HF_ENDPOINT is ")
    assert done.stderr.count("\n") == 1


def test_huggingface_hub_is_imported_with_valid_settings_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other libraries import it without HF_ENDPOINT; they do not use the Hub."""
    monkeypatch.setenv("HF_ENDPOINT", "http://h:bad")
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "soon")
    code = """
import os
from streamconv.errors import UsageError
from streamconv.files.hub_settings import hub_url, without_invalid_endpoint
with without_invalid_endpoint():
    try:
        hub_url()
    except UsageError as error:
        print(error)
    del os.environ["HF_HUB_ETAG_TIMEOUT"]
    from huggingface_hub import hf_hub_url
print(os.environ["HF_ENDPOINT"])
"""
    error, endpoint = run_python(code).splitlines()
    assert error.startswith("An environment variable of huggingface_hub is not valid: invalid literal for int()")
    assert "'soon'. Correct or unset the variable, whose name begins with HF_." in error
    assert endpoint == "http://h:bad"


@pytest.mark.parametrize("url", ["", " ", "https://huggingface.co/", " https://huggingface.co\n"])
def test_huggingface_hub_is_given_the_address_without_spaces_and_never_an_empty_one(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("HF_TOKEN", "hf_t0ken")
    assert hf_to_https(Address("hf://a/b/x.pth")).url == "https://huggingface.co/a/b/resolve/main/x.pth"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    client = HubClient()
    assert (client.endpoint, client.api.endpoint) == ("https://huggingface.co",) * 2


def test_hub_address_is_the_usual_one_if_it_is_empty_and_hides_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "")
    assert hub_endpoint().hostname == "huggingface.co"
    monkeypatch.setenv("HF_ENDPOINT", "ftp://me:passw0rd@host")
    with pytest.raises(UsageError, match="ftp://host") as caught:
        hub_endpoint()
    assert "passw0rd" not in str(caught.value)


@pytest.mark.parametrize("token", ["tökén", "hf_€", "a\x1bb", "a b", "\udcff"])
def test_token_that_no_header_can_hold_is_refused_and_not_shown(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UsageError, match="contains characters that no token has") as caught:
        hub_token()
    assert token not in str(caught.value)


def test_token_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path))
    with pytest.raises(UsageError, match="token cannot be read: Is a directory"):
        hub_token()
    (tmp_path / "token").write_bytes(b"\xff\xfe")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(UsageError, match="token cannot be read: it is not text"):
        hub_token()


def test_without_a_home_folder_only_downloads_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # as for a user id that a container was given
    assert not torch_hub_cache().exists()
    with pytest.raises(UsageError, match="set HOME or TORCH_HOME"):
        download_path(Address("https://host.invalid/x.pth"))
    monkeypatch.setenv("TORCH_HOME", "/torch")
    assert download_path(Address("https://host.invalid/x.pth")).is_absolute()
