"""The image to verify with is a picture of a common format; every other file ends in one message."""

import os
import stat
import warnings
from pathlib import Path

import pytest
from PIL import Image

from streamconv import UsageError
from streamconv.verification.image import open_image

NOISE = Image.effect_noise((30, 20), 50).convert("RGB")
POSTSCRIPT = """%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 30 20
%%EndComments
showpage
%%EOF
"""


@pytest.mark.parametrize("name", ["x.eps", "x.png"])
def test_postscript_is_not_given_to_ghostscript(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / name).write_text(POSTSCRIPT)
    with pytest.raises(UsageError, match=r"not an image that can be read.* BMP, GIF, JPEG"):
        open_image(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "link"])
def test_image_that_is_not_a_file_is_refused_without_waiting(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "x.png")
    with pytest.raises(UsageError, match="does not exist" if kind == "link" else "x.png is not a file"):
        open_image(path)


@pytest.mark.parametrize("suffix", ["bmp", "gif", "jpeg", "png", "ppm", "tiff", "webp"])
def test_format_is_read(tmp_path: Path, suffix: str) -> None:
    NOISE.save(tmp_path / f"x.{suffix}")
    assert open_image(tmp_path / f"x.{suffix}").size == NOISE.size


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGBA", "CMYK", "YCbCr"])
def test_picture_of_any_8_bit_mode_is_read_without_warnings(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.jpg" if mode in ("CMYK", "YCbCr") else "x.tif" if mode == "PA" else "x.png")
    options = {"transparency": bytes(range(256))} if mode == "P" else {}
    picture = NOISE.convert("P").convert("PA") if mode == "PA" else NOISE.convert(mode)
    picture.save(path, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = open_image(path)
    with Image.open(path) as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = opened.convert("RGB")
    assert (seen.mode, seen.tobytes()) == ("RGB", expected.tobytes())


def test_first_picture_of_an_animation_is_read(tmp_path: Path) -> None:
    NOISE.save(tmp_path / "x.gif", save_all=True, append_images=[NOISE.rotate(180)])
    with Image.open(tmp_path / "x.gif") as opened:
        assert open_image(tmp_path / "x.gif").tobytes() == opened.convert("RGB").tobytes()


def test_damaged_and_unsuitable_images_are_refused(tmp_path: Path) -> None:
    NOISE.save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-300])
    (tmp_path / "empty.png").touch()
    Image.new("1", (9_500, 9_500)).save(tmp_path / "large.png")  # Pillow warns of it, which is an error in tests
    for name, message in (
        ("cut.jpg", "truncated"), ("empty.png", "not an image that can be read"),
        ("large.png", "more than 50,000,000 pixels"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            open_image(tmp_path / name)
