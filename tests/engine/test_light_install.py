"""streamconv without torch: with the packages that README.md names, and what it says if one is missing."""

import os
import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch

from tests.file_server import FileServer
from tests.support import ROOT, Save, contents, tiny


def packages_in_readme(first: str) -> list[str]:
    """Return the packages of the README's command ``pip install FIRST …``."""
    ((names),) = re.findall(rf"pip install ({first}[\w ]*)", (ROOT / "README.md").read_text("utf-8"))
    return str(names).split()


class Light:
    """A folder of packages that a new Python process sees instead of the environment's."""

    def __init__(self, site: Path, *packages: str):
        self.site = site
        site.mkdir()
        (site / "streamconv").symlink_to(ROOT / "streamconv")
        for package in packages:
            files = distribution(package).files or ()
            for name in {file.parts[0] for file in files} - {"..", "__pycache__"}:
                (site / name).symlink_to(distribution(package).locate_file(name))  # type: ignore[arg-type]

    def run(self, *words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
        # -S: without the environment's own packages
        command = [sys.executable, "-S", "-m", "streamconv", *map(str, words)]
        environment = {**os.environ, "PYTHONPATH": str(self.site), "HF_TOKEN": "x"}
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


@pytest.fixture
def light(tmp_path: Path) -> Light:
    return Light(tmp_path / "site", *packages_in_readme("click"))


def test_light_install_converts_reverts_and_checks_a_folder(
    tmp_path: Path, save: Save, light: Light, server: FileServer
) -> None:
    backbone, _ = save(tiny())
    (server.folder / "x.pth").write_bytes(backbone.read_bytes())
    for words in (
        ["plan", backbone],
        ["convert", backbone, "-o", "out"],
        ["run", backbone, "-o", "run", "--no-verify"],
        ["convert", f"{server.url}/x.pth", "-o", "streamed", "--stream"],
        ["convert", f"{server.url}/x.pth", "-o", "downloaded"],
        ["verify", "out"],
        ["revert", "out", "-o", "back.pth"],
        ["models"],
    ):
        done = light.run(*words, cwd=tmp_path)
        assert done.returncode == 0, (words, done.stderr)
    weights = {
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "run", "streamed", "downloaded")
    }
    assert len(weights) == 1


def test_light_install_casts_with_the_packages_for_casts(tmp_path: Path, save: Save) -> None:
    backbone, _ = save(tiny())
    light = Light(tmp_path / "site", *packages_in_readme("click"), *packages_in_readme("numpy"))
    for words in (["convert", backbone, "-o", "out", "--dtype", "bfloat16"], ["synth", "dinov2_vits14", "x.pth"]):
        done = light.run(*words, cwd=tmp_path)
        assert done.returncode == 0, (words, done.stderr)
    (tmp_path / "x.pth").unlink()
    assert "model.safetensors" in contents(tmp_path / "out")


def test_verification_without_torch_is_refused_before_the_conversion(tmp_path: Path, save: Save, light: Light) -> None:
    backbone, _ = save(tiny())
    done = light.run("run", backbone, "-o", "out", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Verification runs the models and needs torch, " in done.stderr
    assert "Run `pip install torch torchvision transformers accelerate Pillow`." in done.stderr
    assert not (tmp_path / "out").exists()
    light.run("convert", backbone, "-o", "out", cwd=tmp_path)
    assert light.run("verify", "out", backbone, cwd=tmp_path).returncode == 2


def test_cast_without_its_packages_is_refused_before_the_download(
    tmp_path: Path, save: Save, light: Light, server: FileServer
) -> None:
    backbone, _ = save(tiny())
    (server.folder / "x.pth").write_bytes(backbone.read_bytes())
    words = ["convert", f"{server.url}/x.pth", "-o", "out", "--dtype", "float16"]
    for more in ([], ["--dry-run"]):
        done = light.run(*words, *more, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.splitlines() == [
            "error: Casting needs numpy and ml_dtypes, which this Python does not have. "
            "Run `pip install numpy ml_dtypes`."
        ]


def test_rearranged_tensors_without_numpy_are_refused_before_anything_is_written(
    tmp_path: Path, save: Save, light: Light
) -> None:
    backbone, _ = save(tiny())
    state = torch.load(backbone)
    name = "blocks.1.mlp.fc1.weight"
    torch.save({**state, name: state[name].T.contiguous().T}, backbone)
    done = light.run("convert", backbone, "-o", "out", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: Putting the values of encoder.layer.1.mlp.fc1.weight in order needs numpy, which this Python does not "
        "have. Run `pip install numpy`."
    ]
    assert not (tmp_path / "out").exists()


def test_store_without_fsspec_is_refused_with_the_packages_to_install(tmp_path: Path, light: Light) -> None:
    done = light.run("convert", "s3://bucket/x.pth", "-o", "out", "--stream", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: s3://bucket/x.pth needs the Python package fsspec")


@pytest.mark.parametrize(
    ("words", "package"),
    [
        (["convert", "hf://a/b/c.pth", "-o", "out"], "huggingface_hub"),
        (["run", "source.pth", "--no-verify", "--push-to-hub", "a/b", "--push-unverified"], "huggingface_hub"),
    ],
)  # fmt: skip
def test_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path: Path, save: Save, light: Light, words: list[str], package: str
) -> None:
    save(tiny())
    done = light.run(*words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == (
        f"error: This needs the Python package {package}, which is not installed. Run `pip install {package}`."
    )
    assert not list(tmp_path.glob("out/*.safetensors"))
