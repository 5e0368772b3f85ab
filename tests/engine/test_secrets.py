"""A whole conversion from an address with secrets: nothing that is printed or written shows one, in any encoding."""

import base64
import io
import zipfile
from pathlib import Path
from urllib.parse import quote

import fsspec
import pytest
import torch
from click.testing import CliRunner

from streamconv.cli.commands import app
from streamconv.hub.card import make_card
from streamconv.output.manifest import Manifest
from tests.checkpoints import make_states
from tests.file_server import FileServer
from tests.support import tiny

USER, PASSWORD, SIGNATURE = "s0meone", "p4ss/w+rd@x", "s1gn4ture+="
SECRETS = (USER, PASSWORD, SIGNATURE, f"{USER}:{PASSWORD}")
ENCODED = [
    each.encode().lower()
    for secret in SECRETS
    for each in (secret, quote(secret, safe=""), quote(secret), base64.b64encode(secret.encode()).decode())
]
STEPS = (
    "plan {url} -vv",
    "plan {url} --json --mapping -vv",
    "run {url} -o {out} --dry-run -vv",
    "run {url} -o {out} --dry-run --json --stream",
    "convert {url} -o {out} -vv",
    "convert {url} -o {out} --json",
    "convert {url} -o {other} --stream -vv",
)


def require_no_secret(data: bytes, where: object) -> None:
    found = data.lower()
    assert not [each for each in ENCODED if each in found], where


@pytest.fixture
def http(server: FileServer) -> str:
    torch.save(make_states(tiny())[0], server.folder / "x.pth")
    user = f"{USER}:{quote(PASSWORD, safe='')}"
    server.faults.needs_authorization = f"Basic {base64.b64encode(f'{USER}:{PASSWORD}'.encode()).decode()}"
    return f"{server.url.replace('://', f'://{user}@')}/x.pth?sig={quote(SIGNATURE, safe='')}"


@pytest.fixture
def chain(server: FileServer) -> str:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file, file.open("x.pth", "w") as written:
        torch.save(make_states(tiny())[0], written)
    fsspec.filesystem("memory").pipe_file(f"/{USER}:{PASSWORD.replace('/', '')}@bucket/y.zip", data.getvalue())
    return f"zip://x.pth::memory://{USER}:{PASSWORD.replace('/', '')}@bucket/y.zip"


@pytest.mark.parametrize("form", ["http", "chain"])
def test_conversion_from_an_address_shows_no_secret(form: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    url = request.getfixturevalue(form)
    for step in STEPS:
        words = step.format(url=url, out=tmp_path / "out", other=tmp_path / "other").split()
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        require_no_secret(done.stdout_bytes + done.stderr_bytes, step)
    manifest = Manifest.read(tmp_path / "out")
    assert manifest is not None
    require_no_secret(make_card(manifest, "me/it").encode(), "card")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"streamconv.json", "x.pth", ".x.pth.streamconv-download.json"} < {path.name for path in written}
    for path in written:
        require_no_secret(str(path).encode(), path)
        require_no_secret(path.read_bytes(), path)
