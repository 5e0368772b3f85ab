"""The image to verify with: the user's, or one that is drawn here, so that no network is needed."""

import io
from contextlib import closing
from os import PathLike, fspath

import torch
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torchvision.transforms import functional

from streamconv.display import printable
from streamconv.errors import StreamconvError, UsageError
from streamconv.files.address import Address, is_valid_url
from streamconv.files.base import ByteRange
from streamconv.verification.preflight import URL_SCHEMES, check_image

WIDTH, HEIGHT = 640, 480
MAX_DOWNLOAD_BYTES = 64 << 20
MAX_PIXELS = 50_000_000  # a small file can decode to many pixels; each takes 14 bytes until the image is scaled
# Not every format that Pillow reads: it passes PostScript to Ghostscript, which runs it as a program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_ASPECT = 50  # longer side / shorter side; the image processor scales the shorter one to 256 pixels


def open_image(path: str | PathLike[str] | None) -> Image.Image:
    """Open the user's image, a file or an http(s) URL, as RGB; for None, draw one.

    An animation gives its first frame. Transparent pixels keep the colour that the file stores for them.

    Raises:
        UsageError: the image cannot be read.
    """
    if path is None:
        return make_image()
    is_url = fspath(path).lower().startswith(URL_SCHEMES)
    where = Address(fspath(path)) if is_url else path
    check_image(path)
    try:
        with Image.open(_download(where) if isinstance(where, Address) else where, formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"its values have more than 8 bits (Pillow's mode {image.mode}); save it with 8 bits")
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise ValueError(f"it is too narrow, {image.width} x {image.height} pixels; crop it")
            if "transparency" in image.info:
                image = image.convert("RGBA")  # otherwise Pillow warns about a palette with transparency
            return image.convert("RGB")
    except UnidentifiedImageError:
        formats = ", ".join(FORMATS)
        raise UsageError(
            f"{where} is not an image that can be read. Save it in one of these formats: {formats}."
        ) from None
    # Raised above, or by Pillow for a much larger image; the warning, if it is an error, for one in between.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        problem = f"it has more than {MAX_PIXELS:,} pixels; scale it down"
        raise UsageError(f"The image {where} cannot be read: {problem}.") from None
    except StreamconvError as error:
        raise UsageError(f"The image cannot be read: {error}") from error
    except Exception as error:  # anything that Pillow raises for a damaged file
        raise UsageError(f"The image {where} cannot be read: {printable(str(error))}.") from error


def _download(url: Address) -> io.BytesIO:
    from streamconv.files.http import HttpFile  # imports urllib3

    if not is_valid_url(url.url):
        raise UsageError(f"{url} is not a valid URL.")
    with closing(HttpFile(url)) as file:
        if file.size > MAX_DOWNLOAD_BYTES:
            raise ValueError(f"it is larger than {MAX_DOWNLOAD_BYTES >> 20} MB")
        file.prefetch([ByteRange(0, file.size)])
        return io.BytesIO(file.read(0, file.size))


def make_image() -> Image.Image:
    """Draw a landscape with a house, and noise over it. The image is always the same: RGB, 640 x 480."""
    image = Image.new("RGB", (WIDTH, HEIGHT))
    draw = ImageDraw.Draw(image)
    for y in range(HEIGHT):
        share = y / HEIGHT
        draw.line([(0, y), (WIDTH, y)], (int(70 + 150 * share), int(130 + 90 * share), int(215 - 40 * share)))
    draw.ellipse([455, 50, 535, 130], (255, 236, 150))
    draw.ellipse([-180, 270, 430, 760], (66, 122, 60))
    draw.ellipse([250, 310, 900, 800], (92, 148, 70))
    draw.rectangle([300, 250, 430, 350], (186, 90, 66))
    draw.polygon([(285, 250), (365, 185), (445, 250)], (96, 52, 44))
    draw.rectangle([350, 295, 382, 350], (70, 44, 30))
    for x in range(40, 280, 48):
        draw.rectangle([x + 8, 300, x + 14, 345], (84, 60, 40))
        draw.ellipse([x - 8, 240, x + 30, 312], (34, 90 + x // 6, 44))
    # Not in the caller's default dtype, in which torch would draw other numbers.
    noise = torch.randn(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float32) * 0.03
    values = functional.convert_image_dtype(functional.pil_to_tensor(image), torch.float32)
    return functional.to_pil_image((values + noise).clamp(0, 1))  # type: ignore[no-any-return]
