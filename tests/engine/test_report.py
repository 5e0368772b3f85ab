"""The HTML report: its contents, the escaping of hostile text, and its display in a browser."""

import base64
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from streamconv.verification import report
from tests.support import run_python

STATES = ("embeddings", *(f"layer {i}" for i in range(12)), "cls", "patches")
HOSTILE = "$x$ <b> & \"'<script>console.error('ran')</script>"


def picture(colour: str) -> str:
    out = io.BytesIO()
    Image.new("RGB", (37, 37), colour).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def passing() -> dict[str, Any]:
    def check(name: str, proves: str, **numbers: Any) -> dict[str, Any]:
        return {"name": name, "passed": True, "proves": proves, "problems": [], "numbers": numbers}

    return {
        "passed": True,
        "conclusion": {"kind": "passed", "title": "Looks ok!", "details": "", "cast_cost": ""},
        "date": "2026-11-26T02:20:03+00:00",
        "command": "streamconv run dinov2_vits14 --report report.html",
        "output": {
            "model": "dinov2_vits14",
            "architecture": "Dinov2Model",
            "dtype": "float32",
            "files": {"model.safetensors": {"size": 88_248_016, "sha256": "8be1" * 16}},
        },
        "source": {"backbone": {"file": "vits14.pth", "size": 88_283_115, "fingerprint": "sha256:" + "c0de" * 16}},
        "device": "cpu",
        "reference": "builtin",
        "checks": [
            check("bytes", "every byte equals its source's", tensors=223, bytes=88_226_304, seconds=0.1),
            check("load", "transformers loads every tensor", parameters=22_056_576, seconds=1.2),
            check(
                "parity", "both compute the same", size=224, native_size=518, tolerance=0.0, largest=0.0, first=None,
                differences=dict.fromkeys(STATES, 0.0), absolute=dict.fromkeys(STATES, 0.0), seconds=4.0,
                as_published={"cls": 0.012, "patches": 0.071},
                known_difference={"explanation": "Meta's code scales them by (n + 0.1) / N, and so on."},
            ),
            check(
                "preprocessing", "the saved processor is the original's", pil=0.0,
                default=0.0175, default_backend="BitImageProcessor", grey_level=0.0171,
            ),
        ],
        "predictions": [],
        "memory": {"host_start": 700_000_000, "host_peak": 900_000_000, "host_anonymous_peak": None, "gpu_peak": None},
        "seconds": 61.2,
        "versions": {"streamconv": "0.1.0", "torch": "2.15.0"},
        "pictures": {"image": picture("green"), "original": picture("red"), "converted": picture("red")},
    }  # fmt: skip


def failing() -> dict[str, Any]:
    found = passing()
    found["passed"] = False
    title = "Do not use this output."
    found["conclusion"] = {"kind": "failed", "title": title, "details": "Failed: parity.", "cast_cost": ""}
    loaded, parity, preprocessing = found["checks"][1:]
    loaded["problems"] = []
    parity |= {
        "passed": False,
        "finding": "7 of 15 layer outputs differ",
        "problems": [f"layer {i} differs by 0.0123" for i in range(7, 12)] * 5,
    }
    parity["numbers"]["differences"] |= {f"layer {i}": 0.0123 for i in range(7, 12)} | {"cls": "inf", "patches": "nan"}
    parity["numbers"] |= {"largest": "inf", "first": "layer 7"}
    preprocessing |= {"passed": None, "proves": "not run: parity failed", "numbers": {}}
    return found


def words(page: str) -> str:
    """Return the visible text of a page as one line."""
    return " ".join(html.unescape(re.sub(r"<style.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)).split())


def test_report_shows_what_is_known_about_the_source() -> None:
    verification = passing()
    file = verification["source"]["backbone"]
    for known, expected in (
        ({}, "Source, backbone vits14.pth Device"),
        (
            {"published": True, "address": "https://h/x"},
            "vits14.pth, as its authors published it, downloaded from",
        ),
        (
            {"found_in_cache": True},
            "vits14.pth, found in torch.hub's cache, not downloaded by streamconv: it may",
        ),
    ):
        verification["source"]["backbone"] = {**file, **known}
        assert expected in words(report.render(verification))


def test_report_of_a_passed_verification_shows_every_number() -> None:
    page = report.render(passing())
    assert "<title>dinov2_vits14: verified · streamconv</title>" in page
    text = words(page)
    for expected in (
        "✓ Verified All 4 checks passed.", "Device cpu", "Original model's code streamconv's own (builtin)",
        "Bytes compared 88,226,304", "Parameters loaded 22,056,576", "Image 224 × 224 pixels",
        "0.0 in all 15 layer outputs",
        "Tolerance 0.0 (bit for bit)", "dtype float32, as in the source", "Date 2026-11-26 02:20:03 UTC",
        "Command streamconv run dinov2_vits14 --report report.html",
        "224 × 224 pixels is the size that the saved image processor produces.",
        "The bytes check covers every value of the position embeddings; --thorough also runs the models at the native",
        "A difference by design, at 224 × 224 This is not an error of the conversion.",
        "Words in this report Layer output The numbers that a layer",
        "0.0 with Pillow, 0.0175 with transformers' default, BitImageProcessor (one grey level is 0.0171).",
        "cls 0.012 0.0", "patches 0.071 0.0",
        "scales them by (n + 0.1) / N, ", "Peak memory 900 MB", "Time 1 min 1 s", "torch 2.15.0", "8be1" * 16,
        "backbone: vits14.pth 88.3 MB sha256:" + "c0de" * 16, "It is not the sha256 of the file.",
    ):  # fmt: skip
        assert expected in text
    assert "failed" not in text
    assert "None" not in text


def test_report_of_models_that_interpolate_alike_announces_no_difference() -> None:
    """Meta's models with registers scale positions as transformers does."""
    found = passing()
    found["checks"][2]["numbers"]["as_published"] = {}
    text = words(report.render(found))
    assert "A difference by design" not in text
    assert "as its own code does" not in text


def test_report_shows_the_cost_of_a_cast_in_its_header() -> None:
    found = passing()
    found["output"] |= {"dtype": "bfloat16", "cast": {"from": "float32", "to": "bfloat16"}}
    found["cast_cost"] = {"dtype": "bfloat16", "largest": 0.057, "largest_in_float32": 0.024, "magnitude": 4.1}
    found["conclusion"]["cast_cost"] = "Cost of the cast: 0.057."
    page = report.render(found)
    assert "Cost of the cast: 0.057." in words(page[: page.index("</header>")])
    text = words(page)
    assert "dtype bfloat16, cast from float32" in text
    assert "Largest difference in bfloat16, from_pretrained's default 0.057" in text
    assert "dtype=torch.float32) 0.024 Largest output value of the original 4.1" in text
    assert "torch cast the original's weights to bfloat16, and both models computed in float32" in text
    assert "cost of the cast" not in words(report.render(passing()))


def test_report_title_of_an_unpublished_model_names_the_one_with_equal_shapes() -> None:
    found = passing()
    found["output"] |= {"model": None, "shaped_like": "dinov2_vits14"}
    page = report.render(found)
    assert "<h1>A model shaped like dinov2_vits14</h1>" in page
    assert "Shapes equal to those of dinov2_vits14, but the file has another name" in words(page)


def test_report_names_the_gpu_and_its_memory() -> None:
    gpu = {"name": "NVIDIA H100", "memory": 80_000_000_000, "driver": "550.54", "runtime": "CUDA 12.8"}
    found = passing() | {"device": "cuda:0", "gpu": gpu}
    found["memory"] = {"gpu_peak": 1_300_000_000, "gpu_reserved_peak": 1_500_000_000, "gpu_used_peak": 2_000_000_000}
    text = words(report.render(found))
    assert "Device cuda:0, NVIDIA H100, 80 GB, driver 550.54, CUDA 12.8" in text
    assert "Peak GPU memory, tensors 1.3 GB Peak GPU memory, reserved by torch 1.5 GB" in text
    assert "Peak GPU memory, with CUDA and other processes 2 GB" in text
    unused = words(report.render(passing() | {"gpu": {}, "device_note": "the GPU is too old"}))
    assert "Device cpu GPU not used The GPU is too old." in unused


def test_report_of_files_alone_is_not_called_verified() -> None:
    title = "Files unchanged since they were written; not compared with a source."
    checks = [{"name": "files", "passed": True, "proves": "every file is as it was written", "numbers": {}}]
    conclusion = {"kind": "incomplete", "title": title, "details": ""}
    found = {**passing(), "device": None, "checks": checks, "conclusion": conclusion}
    page = report.render(found)
    assert "– Not compared with a source " + title in words(page)
    assert "✓ Verified" not in words(page)


def test_report_of_a_run_at_the_native_size_shows_both_sizes() -> None:
    found = passing()
    numbers = found["checks"][2]["numbers"]
    native = {"name": "native", "passed": True, "proves": "the same", "numbers": {**numbers, "size": 518}}
    del native["numbers"]["as_published"]
    found["checks"].insert(3, native)
    page = report.render(found)
    assert "518 × 518 pixels is the original's native size" in words(page)
    assert "--thorough" not in page
    assert page.count("<summary>The difference in every layer output") == 2


def test_report_of_a_failed_verification_names_checks_problems_and_first_difference() -> None:
    text = words(report.render(failing()))
    assert "✗ Verification failed Do not use this output. 1 of 4 checks failed: parity." in text
    assert "Not run: preprocessing." in text
    assert "7 of 15 layer outputs differ." in text
    assert "both compute the same" not in text.lower()
    assert "A difference by design" not in text  # of a wrong model, it means nothing
    assert text.count("layer 7 differs by 0.0123") == 5
    assert "5 more problems" in text
    assert "First difference in layer 7" in text
    assert "first: layer 7" in text
    assert "– not run Not run: parity failed." in text


def test_report_shows_infinite_and_undefined_differences() -> None:
    text = words(report.render(failing()))
    assert "exactly 0 in 8 of 15 layer outputs" in text
    assert "cls infinite patches not a number" in text
    assert text.count("not finite") == 1
    assert "not finite" not in words(report.render(passing()))


def marks(found: dict[str, Any]) -> dict[str, list[str]]:
    """Return the drawn marks by kind, each as "x y text"."""
    mark = r'<(?:use|circle) class="(\w+)" (?:href="#cross" )?c?x="(.*?)%" c?y="(.*?)".*?><title>(.*?)</title>'
    drawn: dict[str, list[str]] = {}
    for kind, *rest in re.findall(mark, report.render(found)):
        drawn.setdefault(kind, []).append(" ".join(rest))
    return drawn


def test_every_state_is_drawn_once_in_the_color_of_its_result() -> None:
    assert {kind: len(drawn) for kind, drawn in marks(passing()).items()} == {"good": 15}
    # An undefined difference does not count as good.
    assert {kind: len(drawn) for kind, drawn in marks(failing()).items()} == {"good": 8, "bad": 7}


def test_marks_are_drawn_at_their_differences() -> None:
    found = passing()
    numbers = found["checks"][2]["numbers"] = {
        "tolerance": 1e-5,
        "differences": {"embeddings": 0.0, "layer 0": 1e-6, "layer 1": 1e-4, "cls": "nan"},
        "float32": {"differences": {"layer 0": 1e-4}},
    }
    page, drawn = report.render(found), marks(found)
    rows = {
        text: float(y) for y, text in re.findall(r'<text class="end" x="-8" y="(.*?)" dy=".32em">(.*?)</text>', page)
    }
    assert list(rows) == ["1e-3", "1e-4", "1e-5", "1e-6", "exactly 0", "not finite"]
    assert rows["not finite"] < rows["1e-3"] < rows["1e-4"] < rows["1e-5"] < rows["1e-6"] < rows["exactly 0"]
    assert [mark.split()[1:] for mark in drawn["good"]] == [
        [str(rows["exactly 0"]), "embeddings", "in", "float64:", "0.0"],
        [str(rows["1e-6"]), "layer", "0", "in", "float64:", "1e-06"],
    ]
    assert [mark.split()[1:] for mark in drawn["bad"]] == [
        [str(rows["1e-4"]), "layer", "1", "in", "float64:", "0.0001"],
        [str(rows["not finite"]), "cls", "in", "float64:", "not", "a", "number"],
    ]
    assert drawn["float32"] == [f"{drawn['good'][1].split()[0]} {rows['1e-4']} layer 0 in float32: 0.0001"]
    assert f'class="tolerance" x2="100%" y1="{rows["1e-5"]}"' in page
    xs = [float(mark.split()[0]) for mark in (*drawn["good"], *drawn["bad"])]
    assert xs == sorted(xs)
    assert 0 < xs[0] < xs[-1] < 100
    assert numbers["tolerance"] == 1e-5  # the page does not change what it shows


@pytest.mark.parametrize("lacks", [{}, {"checks": []}, {"memory": {"gpu_peak": None}, "output": {"model": None}}])
def test_report_leaves_out_missing_fields(lacks: dict[str, Any]) -> None:
    text = words(report.render({"passed": False, **lacks}))
    assert "– Not verified" in text
    assert "checks" not in text
    assert "None" not in text


def test_report_lists_checks_without_numbers() -> None:
    found = passing()
    for check in found["checks"]:
        check["numbers"] = {}
    found |= {"pictures": {}, "predictions": []}
    page = report.render(found)
    assert "All 4 checks passed." in words(page)
    assert "Difference by layer" not in page


def test_report_names_checks_that_did_not_run() -> None:
    found = passing()
    found["checks"][3] |= {"passed": None, "numbers": {}}
    title, details = "Looks ok, but not everything was checked:", "the preprocessing check did not run."
    found["conclusion"] = {"kind": "incomplete", "title": title, "details": details}
    assert f"– Partly verified {title} {details}" in words(report.render(found))


def test_report_of_a_classifier_shows_its_best_labels() -> None:
    page = report.render(passing() | {"predictions": [["tabby, tabby cat", 0.9312], ["tub", 0.0004]]})
    assert "tabby, tabby cat 93.1 % tub 0.0 %" in words(page)
    assert 'style="width: 93.1%"' in page
    long = report.render(passing() | {"predictions": [["x" * 10_000, 0.5]]})
    assert f"{'x' * 79}… 50.0 %" in words(long)


def test_report_shows_float64_and_float32_side_by_side() -> None:
    found = passing()
    found["checks"][2]["numbers"] |= {
        "tolerance": 1e-13, "largest": 2e-15, "differences": dict.fromkeys(STATES, 2e-15),
        "float32": {"largest": 3e-6, "differences": dict.fromkeys(STATES, 3e-6)},
    }  # fmt: skip
    text = words(report.render(found))
    assert "Layer output float64, second pass float32 embeddings 2e-15 3e-06" in text
    assert "where they differ; then in a second pass in float64 ( ● ), which decides." in text
    assert "layer 0 in float64: 2e-15" in text
    assert "Largest difference 2e-15; exactly 0 in none of 15 layer outputs." in text
    assert text.count("tolerance in float64 1e-13") == 1
    assert "in all 15 layer outputs" not in text
    assert {kind: len(drawn) for kind, drawn in marks(found).items()} == {"good": 15, "float32": 15}


def test_hostile_text_is_escaped_and_only_data_images_are_shown() -> None:
    found = failing()
    found["output"]["model"] = found["checks"][2]["problems"][0] = HOSTILE
    found["output"]["files"][HOSTILE] = found["source"][HOSTILE] = {"file": "\udcff" + HOSTILE, "sha256": HOSTILE}
    found["checks"][2]["numbers"]["differences"][HOSTILE] = 0.5
    found["checks"][2]["numbers"]["first"] = HOSTILE
    found["predictions"] = [[HOSTILE, 0.5]]
    found["pictures"] = {
        "image": "https://example.com/x.png",
        "original": 'data:image/png;base64,"onerror="x',
        "converted": "javascript:1",
    }
    page = report.render(found)
    assert "<script" not in page
    assert words(page).count("<script>console.error('ran')</script>") >= 9
    drawn = page[page.index('class="plot"') : page.index("</figure>")]
    assert words(drawn).count("$x$ <b> &") == 3  # below the axis, as the first to differ, and as the mark's own text
    assert "What both models see" not in page
    assert "onerror" not in page
    assert "example.com" not in page
    page.encode("utf-8")


def test_no_text_controls_or_reorders_the_page() -> None:
    attack = "\x1b[2J\x9b2J\u202e\u2066\u2028\u200b\x00\n</title><script>x</script>\" onload=\"x' onload='x"

    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: each if key in ("kind", "name") else poisoned(each) for key, each in value.items()}
        if isinstance(value, list):
            return [poisoned(each) for each in value]
        return attack if isinstance(value, str) and not re.fullmatch(r"[0-9.e+-]+|inf|nan", value) else value

    for found in (passing(), failing()):
        poison = poisoned({**found, "pictures": {}, "versions": {attack: attack}})
        poison["source"] = {attack: {"file": attack, "size": 1, "fingerprint": attack}}
        page = report.render({**poison, "date": attack, "command": attack, "device": attack})
        assert all(line.isprintable() for line in page.replace("\xa0", " ").split("\n"))
        assert page.count("\\x1b[2J") > 10
        tags, attributes = set(re.findall(r"<(\w+)", page)), set(re.findall(r"<[^>]*?\s(\w+)=", page))
        assert not {"script", "iframe", "object"} & tags
        assert "onload" not in attributes
        assert page.count("</title>") == len(re.findall(r"<title\b", page))


def test_report_is_reproducible_in_another_process(tmp_path: Path) -> None:
    found = failing()
    found["checks"][2]["numbers"]["differences"] |= dict.fromkeys("abcdef", 0.0)  # enough to reveal the order of a set
    (tmp_path / "found.json").write_text(json.dumps(found))
    code = (
        "import json, sys\nfrom streamconv.verification import report\n"
        "print(report.render(json.load(open('found.json'))), end='')"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=tmp_path, env=environment)
    assert done.stdout.decode() == report.render(found), done.stderr.decode()


def test_rendering_a_report_imports_nothing_large() -> None:
    code = (
        "import sys\nfrom tests.engine.test_report import passing\nbefore = set(sys.modules)\n"
        "from streamconv.verification import report\nassert 'jinja2' not in sys.modules\nreport.render(passing())\n"
        "print(sorted({'matplotlib', 'numpy', 'torch'} & (set(sys.modules) - before)))"
    )
    assert run_python(code) == "[]\n"


@pytest.fixture(scope="module")
def window() -> Iterator[Page]:
    """Yield one page for all documents: to open a page takes longer than to show a document."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium here")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield launched.new_page()
        launched.close()


def faults(window: Page, file: Path, width: int, scheme: Any) -> list[str]:
    """List the faults of the page in a window of ``width`` pixels: errors, requests, broken images, excess width."""
    found: list[str] = []
    listeners: dict[Any, Callable[[Any], None]] = {
        "console": lambda message: found.append(message.text) if message.type == "error" else None,
        "pageerror": lambda error: found.append(str(error)),
        "requestfailed": lambda request: found.append(f"failed: {request.url[:80]}"),
        "request": lambda r: None if r.url.startswith(("file:", "data:")) else found.append(f"asks for {r.url}"),
    }
    window.set_viewport_size({"width": width, "height": 800})
    window.emulate_media(color_scheme=scheme)
    for event, listener in listeners.items():
        window.on(event, listener)
    window.goto(file.as_uri())
    found += window.evaluate(
        """async () => {
            const faults = [];
            if (document.documentElement.scrollWidth > innerWidth) faults.push("scrolls sideways");
            for (const img of document.images) if (!img.naturalWidth) faults.push("no picture in an img");
            for (const image of document.querySelectorAll("svg image")) {
                const img = new Image();
                img.src = image.getAttribute("href");
                await img.decode().catch(() => faults.push("no picture in an svg"));
            }
            // Half a pixel, and what a line's box has above and below its letters, is not an overlap.
            const overlap = (a, b) => a.left < b.right - 0.5 && b.left < a.right - 0.5 &&
                a.top < b.bottom - 2 && b.top < a.bottom - 2;
            const texts = [...document.querySelectorAll(".plot text")];
            const boxes = texts.map(text => text.getBoundingClientRect());
            texts.forEach((text, i) => {
                if (boxes[i].left < 0 || boxes[i].right > innerWidth) faults.push(`${text.textContent} is cut off`);
                for (let j = 0; j < i; j++)
                    if (overlap(boxes[j], boxes[i]))
                        faults.push(`${texts[j].textContent} overlaps ${text.textContent}`);
            });
            for (const number of document.querySelectorAll("td.number")) {
                const range = document.createRange();
                range.selectNodeContents(number);
                if (new Set([...range.getClientRects()].map(box => Math.round(box.top))).size > 1)
                    faults.push(`${number.textContent} is on two lines`);
            }
            return faults;
        }"""
    )
    for words in (".verdict strong", "h1", ".plot > svg"):
        if window.locator(words).count() != 1 or not window.locator(words).is_visible():
            found.append(f"{words} is not seen")
    for event, listener in listeners.items():
        window.remove_listener(event, listener)
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_browser_reports_no_fault(window: Page, tmp_path: Path, width: int, scheme: str) -> None:
    labelled = {"predictions": [["tabby, tabby cat", 0.93], ["x" * 200, 0.07]]}
    for found in (passing() | labelled, failing() | labelled):
        (tmp_path / "report.html").write_text(report.render(found), "utf-8")
        assert faults(window, tmp_path / "report.html", width, scheme) == []


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("layers", [14, 26, 42, 66])
def test_chart_of_any_depth_has_no_overlapping_text(window: Page, tmp_path: Path, layers: int, width: int) -> None:
    names = ("embeddings", *(f"layer {i}" for i in range(layers)), "cls", "registers", "patches", "logits")
    float64: dict[str, Any] = {
        "tolerance": 1e-13, "differences": dict.fromkeys(names, 1e-15),
        "float32": {"differences": dict.fromkeys(names, 1e-6)},
    }  # fmt: skip
    failed = {
        "tolerance": 1e-4, "differences": {**dict.fromkeys(names, 0.0), "patches": "nan", "cls": 9.0},
        "first": f"layer {layers - 1}",
    }  # fmt: skip
    for numbers in (
        {"tolerance": 0.0, "differences": dict.fromkeys(names, 0.0)},
        float64,
        failed,
    ):
        found = passing()
        found["checks"][2]["numbers"] = numbers
        (tmp_path / "report.html").write_text(report.render(found), "utf-8")
        assert faults(window, tmp_path / "report.html", width, "light") == []


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        ("<script>console.error(1)</script>", "Executing inline script violates"),  # it does not even run
        ('<img src="data:image/png;base64,AAAA" alt="">', "no picture in an img"),
        ('<svg><image href="data:image/png;base64,AAAA"/></svg>', "no picture in an svg"),
        ('<img src="http://127.0.0.1:9/x.png" alt="">', "violates the following Content Security Policy"),
        ('<div style="width: 1300px">wide</div>', "scrolls sideways"),
        ("<style>.verdict { display: none }</style>", ".verdict strong is not seen"),
        ("<style>.plot text { font-size: 40px }</style>", "exactly 0 overlaps layer"),
        ("<style>.plot > svg { margin-left: -900px }</style>", "exactly 0 is cut off"),
    ],
)
def test_browser_test_detects_broken_pages(window: Page, tmp_path: Path, broken: str, fault: str) -> None:
    page = report.render(passing()).replace("</body>", broken + "</body>")
    (tmp_path / "report.html").write_text(page, "utf-8")
    assert fault in "\n".join(faults(window, tmp_path / "report.html", 1280, "light"))
