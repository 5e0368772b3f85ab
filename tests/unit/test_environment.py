"""Settings of the environment that cannot be used end in one message, never in a traceback."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from streamconv.cli.commands import app
from streamconv.errors import UsageError
from streamconv.files.address import Address, parse_location
from streamconv.files.hub_settings import hub_endpoint, hub_token
from streamconv.source.cache import download_path, torch_hub_cache


@pytest.mark.parametrize("url", ["http://h:99999", "http://h:bad", "http://[", "nonsense", "https://", "http://h:0"])
def test_hub_address_that_is_no_url_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", url)
    done = CliRunner().invoke(app, ["plan", "https://host.invalid/x.pth"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("error: HF_ENDPOINT is ")
    assert done.stderr.count("\n") == 1
    assert CliRunner().invoke(app, ["plan", "--help"]).exit_code == 0
    with pytest.raises(UsageError, match="HF_ENDPOINT"):
        parse_location("https://host.invalid/x.pth")


def test_hub_address_is_the_usual_one_if_it_is_empty_and_hides_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "")
    assert hub_endpoint().hostname == "huggingface.co"
    monkeypatch.setenv("HF_ENDPOINT", "ftp://me:passw0rd@host")
    with pytest.raises(UsageError, match="ftp://host") as caught:
        hub_endpoint()
    assert "passw0rd" not in str(caught.value)


@pytest.mark.parametrize("token", ["tökén", "hf_€", "a\x1bb", "a b", "\udcff"])
def test_token_that_no_header_can_hold_is_refused_unseen(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UsageError, match="holds characters that no token has") as caught:
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
