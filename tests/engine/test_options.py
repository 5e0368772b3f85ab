"""Options are checked before a source is opened, and the name of a folder has no effect."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import streamconv
from streamconv import (
    ConversionOptions,
    Destination,
    OutputError,
    PushOptions,
    SourceOptions,
    UsageError,
    VerificationOptions,
)
from streamconv.families.dinov2 import FAMILY
from streamconv.formats.safetensors import make_header
from streamconv.jobs.options import StrPath
from tests.support import Save, run, tiny


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConversionOptions(max_shard_size="5 apples"), "5 apples"),
        (lambda: ConversionOptions(max_shard_size=0), "0"),
        (lambda: ConversionOptions(dtype="float8"), "Cannot cast to 'float8'. Choose float32, float16 or bfloat16"),  # type: ignore[arg-type]
        (lambda: ConversionOptions(num_heads=0), "0 attention heads"),
        (lambda: SourceOptions(num_heads=-1), "-1 attention heads"),
        (lambda: VerificationOptions(device="gpu"), "'gpu' is not a device"),
        (lambda: VerificationOptions(device="cuda:x"), "'cuda:x' is not a device"),
        (lambda: PushOptions(Destination(revision="")), "revision's name is empty"),
        # As read from a configuration:
        (lambda: SourceOptions(num_heads="6"), "num_heads must be a whole number or None, not '6'"),  # type: ignore[arg-type]
        (lambda: SourceOptions(num_heads=2.0), r"num_heads must be .* not 2\.0"),  # type: ignore[arg-type]
        (lambda: SourceOptions(select=3), "select must be a string or None, not 3"),  # type: ignore[arg-type]
        (lambda: VerificationOptions(device=None), "device must be a string, not None"),  # type: ignore[arg-type]
        (lambda: PushOptions("ada/x"), r"Give Destination\(repo='ada/x'\)"),  # type: ignore[arg-type]
    ],
)
def test_option_typos_are_refused_when_the_options_are_made(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize(
    "words",
    [
        ("convert", "none.pth", "-o", "out", "--dtype", "float8"),
        ("convert", "none.pth", "-o", "out", "--max-shard-size", "5 apples"),
        ("plan", "none.pth", "--num-heads", "0"),
        ("verify", ".", "none.pth", "--device", "gpu"),
        ("run", "none.pth", "--device", "gpu"),
    ],
)
def test_a_typo_is_reported_before_a_missing_source(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "no such file" not in done.stderr
    assert done.stderr.count("error:") == 1


@pytest.mark.parametrize("kind", [str, Path])
def test_every_path_may_be_a_string_or_a_path(save: Save, tmp_path: Path, kind: Callable[[Path], StrPath]) -> None:
    source, head = save(tiny(classes=5))
    assert head is not None
    (tmp_path / "labels.txt").write_text("a\nb\nc\nd\ne")
    out, page, back, other = (kind(tmp_path / name) for name in ("out", "page.html", "back.pth", "other.pth"))
    options = ConversionOptions(head=kind(head), labels=kind(tmp_path / "labels.txt"))
    done = streamconv.convert(kind(source), out, options)
    assert streamconv.plan(kind(source), options) == done.plan
    assert streamconv.verify(out, options=VerificationOptions(report=page)).passed
    assert (tmp_path / "page.html").exists()
    assert streamconv.revert(out, back, head=other).files == (tmp_path / "back.pth", tmp_path / "other.pth")
    with streamconv.open_checkpoint(kind(source)) as one, streamconv.open_checkpoint(back) as two:
        assert one.keys() == two.keys()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "name is empty. Give a path"),
        (
            "hf://ada/x.pth?token=1",
            "hf://ada/x.pth (is a URL, and .* on this machine|was given with a query, which an output cannot)",
        ),
    ],
)
def test_a_name_that_is_no_place_on_this_machine_is_refused(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    source, _ = save(tiny())
    folder = streamconv.convert(source, tmp_path / "current").output
    monkeypatch.chdir(folder)  # an empty name would mean this folder
    before = sorted(tmp_path.rglob("*"))
    jobs: list[Callable[[], object]] = [
        lambda: streamconv.convert(source, name),
        lambda: streamconv.run(source, name, verification=None),
        lambda: streamconv.run("dinov2_vits14", name, verification=None, synthetic_seed=0),
        lambda: streamconv.publish(name),
        lambda: streamconv.revert(name, tmp_path / "back.pth"),
        lambda: streamconv.revert(folder, name),
        lambda: streamconv.revert(folder, tmp_path / "back.pth", head=name),
        lambda: streamconv.synth("dinov2_vits14", name),
    ]
    if not name:  # a URL can be verified
        jobs.append(lambda: streamconv.verify(name))
    for job in jobs:
        with pytest.raises(UsageError, match=message):
            job()
    for words in (("push", name), ("revert", name, "-o", "x.pth"), ("revert", folder, "-o", name)):
        assert run(*words, cwd=folder).returncode == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_name_is_no_source(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = save(tiny())
    monkeypatch.chdir(streamconv.convert(source, tmp_path / "current").output)
    with pytest.raises(UsageError, match="name is empty"):
        streamconv.open_checkpoint("")
    with pytest.raises(UsageError, match="name is empty"):
        streamconv.plan(source, ConversionOptions(head=""))


def test_publishing_what_is_no_folder_is_refused_as_such(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("file", "none"):
        with pytest.raises(OutputError, match=f"{name} is not a folder. Give a folder that streamconv"):
            streamconv.publish(tmp_path / name)


def test_none_as_a_name_is_a_usage_error(tmp_path: Path) -> None:
    """And not, for example, a StopIteration, after which asyncio.to_thread would never return."""
    with pytest.raises(UsageError, match="output must be a string or a path, not None"):
        streamconv.revert(tmp_path, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("folder", ["models with care", "webssl_dino2b_light2b_224.pth with a head"])
def test_a_published_model_is_recognised_in_a_folder_of_any_name(tmp_path: Path, folder: str) -> None:
    """Three published models have these dimensions, so only the file's own name distinguishes them."""
    model = next(model for model in FAMILY.models if model.name == "webssl_dino2b_full2b_224")
    header, _ = make_header(FAMILY.sources(model.dimensions, model.block_chunks))
    path = tmp_path / folder / model.backbone.filename
    path.parent.mkdir()
    with open(path, "wb") as file:  # 8.6 GB of holes
        file.write(header)
        file.truncate(len(header) + sum(i.nbytes for i in FAMILY.sources(model.dimensions).values()))
    assert streamconv.plan(path).model_name == model.name
    path = path.rename(path.with_name("mine.pth"))
    assert streamconv.plan(path).model_name is None


@pytest.mark.parametrize("job", ["streamconv.run('x.pth', 'out')", "streamconv.verify('.', 'x.pth')"])
def test_job_that_verifies_without_torch_ends_before_it_opens_the_source(tmp_path: Path, job: str) -> None:
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None)\n"
        f"import streamconv\ntry:\n    {job}\nexcept streamconv.UsageError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("Verification runs the models and needs torch, transformers, which this"), done.stderr
    assert "Run `pip install torch transformers`." in done.stdout
    assert not any(tmp_path.iterdir())
