"""python -m benchmarks.report_picture REPORT.html OUT.png: the README's picture of a report.

Two parts of the page side by side: its top, and its section on parity. Needs playwright and chromium.
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

PART, SCALE = 720, 8 / 9  # the width of a part in the page's pixels, and the picture's pixels for each: 1280 in all


def main(report: Path, out: Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": PART, "height": 900}, device_scale_factor=SCALE, color_scheme="light"
        )
        page.goto(report.absolute().as_uri())
        middle, end = (
            round(SCALE * page.evaluate(f"document.querySelector({part!r}).getBoundingClientRect().{edge}"))
            for part, edge in (("#parity", "top"), ("#parity .seen", "bottom"))
        )
        whole = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
        browser.close()
    picture = Image.new("RGB", (2 * whole.width, max(middle, end - middle) + 16), whole.getpixel((0, 0)))
    picture.paste(whole.crop((0, 0, whole.width, middle)), (0, 0))
    picture.paste(whole.crop((0, middle, whole.width, end)), (whole.width, 0))
    picture.quantize(128, dither=Image.Dither.NONE).save(out, optimize=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
