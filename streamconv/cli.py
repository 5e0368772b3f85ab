"""The command line: parse the user's words, call one function, print. Nothing else prints or exits."""

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import streamconv
from streamconv._version import __version__
from streamconv.convert import Conversion, record_verification
from streamconv.errors import OutputError, StreamconvError, UsageError
from streamconv.families import all_families, find_model
from streamconv.progress import ProgressReport
from streamconv.verify import Verification

DEFAULT_MODEL = "dinov2_vitg14"
EXIT_CODES = """\b
Exit codes: 0 done, and all that was verified is right; 1 verification found a difference;
2 wrong usage; 3 the source cannot be converted; 4 the output cannot be written; 130 interrupted."""

app = typer.Typer(
    help="Converts published checkpoints to Hugging Face's format by streaming, and proves the result.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
"""rich_markup_mode None: typer then needs no rich for its help, which keeps the conversion small."""

Source = Annotated[str, typer.Argument(metavar="SOURCE", help="A model's name, or a checkpoint file.")]
Head = Annotated[Path | None, typer.Option(metavar="FILE", help="A linear head's file, for a classifier from files.")]
Labels = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="The classes' names: JSON, or a line each. [default: ImageNet's for 1000 classes]"
    ),
]
ShardSize = Annotated[str, typer.Option(metavar="SIZE", help="The largest size of one file.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]
Device = Annotated[
    str, typer.Option(metavar="auto|cpu|cuda|cuda:N", help="What to verify on; auto takes a GPU if there is one.")
]
Image = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A picture to verify on. [default: one of the project's own]")
]
Seed = Annotated[int, typer.Option(min=0, help="Of the random weights.")]


@app.command()
def run(
    source: Annotated[
        str | None,
        typer.Argument(metavar="SOURCE", help=f"A model's name, or a checkpoint file. [default: {DEFAULT_MODEL}]"),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            "--pytorch_dump_folder_path",
            metavar="DIR",
            help="The folder to write. [default: the published name]",
        ),
    ] = None,
    device: Device = "auto",
    head: Head = None,
    labels: Labels = None,
    max_shard_size: ShardSize = "5GB",
    image: Image = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Convert only.")] = False,
    as_json: Json = False,
    synthetic: Annotated[
        bool, typer.Option("--synthetic", help="Make a random checkpoint of the model, and convert that.")
    ] = False,
    seed: Seed = 0,
    model_name: Annotated[str | None, typer.Option("--model_name", metavar="NAME", help="The same as SOURCE.")] = None,
) -> None:
    """Convert a checkpoint and verify the result."""
    if source is not None and model_name is not None:
        _fail(UsageError("SOURCE and --model_name are the same. Give one of them."))
    name = next((word for word in (source, model_name) if word is not None), DEFAULT_MODEL)
    with _errors():
        if not no_verify:
            _check_ahead(device, image)
    files = _synthetic(name, output, seed, head) if synthetic else nullcontext((name, head, None))
    with _errors(), files as (path, head_path, folder):
        converted = _convert(path, folder if output is None else output, head_path, labels, max_shard_size, as_json)
        found = None if no_verify else _verify(converted.output, path, head_path, device, image, as_json)
    if as_json:
        _print_json({**converted.as_dict(), "verification": found.as_dict() if found else None})
    elif found is None:
        print("not verified: --no-verify")
    if found is not None and not found.passed:
        raise typer.Exit(1)


@app.command()
def convert(
    source: Source,
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="The folder to write.")],
    head: Head = None,
    labels: Labels = None,
    max_shard_size: ShardSize = "5GB",
    as_json: Json = False,
) -> None:
    """Convert a checkpoint into a folder that transformers loads."""
    with _errors():
        converted = _convert(source, output, head, labels, max_shard_size, as_json)
    if as_json:
        _print_json(converted.as_dict())


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that streamconv converted into.")],
    source: Source,
    head: Head = None,
    device: Device = "auto",
    image: Image = None,
    as_json: Json = False,
) -> None:
    """Prove a converted folder against its source: every byte, the loading, and what the model computes."""
    with _errors():
        found = _verify(folder, source, head, device, image, as_json)
    if as_json:
        _print_json(found.as_dict())
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def plan(source: Source, head: Head = None, max_shard_size: ShardSize = "5GB", as_json: Json = False) -> None:
    """Show what would be written: mapping, shards, bytes. No weight is read."""
    with _errors():
        planned = streamconv.plan(source, head=head, max_shard_size=max_shard_size)
    if as_json:
        _print_json(planned.as_dict())
        return
    width = max(len(move.source) for move in planned.moves)
    for move in planned.moves:
        print(f"{move.source:{width}}  {move.tensor.info!s:24}  -> {', '.join(move.targets)}")
    print()
    for shard in planned.shards:
        print(f"{shard.filename}  {len(shard.tensors)} tensors, {shard.size:,} bytes")
    print(f"{planned.title}: {planned.parameters:,} parameters, {planned.size:,} bytes to write")


@app.command()
def models() -> None:
    """List the models: names, sizes, files, published names."""
    rows = [("model", "published as", "weights", "files")]
    for family in all_families():
        for model in family.models:
            files = " + ".join(file.filename for file in (model.backbone, model.head) if file)
            weights = sum(info.nbytes for info in family.sources(model.geometry).values())
            rows.append((model.name, model.published_name, f"{weights / 1e6:,.0f} MB", files))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for name, published, size, files in rows:
        print(f"{name:{widths[0]}}  {published:{widths[1]}}  {size:>{widths[2]}}  {files}")


@app.command()
def synth(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's name.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The checkpoint to write; a head goes beside it.")],
    seed: Seed = 0,
) -> None:
    """Write a random checkpoint in the model's original layout, exact in names and shapes."""
    with _errors():
        written = streamconv.synth(model, file, seed=seed)
    for path in (written.backbone, written.head):
        if path is not None:
            print(f"{path}  {path.stat().st_size:,} bytes")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"streamconv {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def _convert(
    source: str, folder: str | Path | None, head: Path | None, labels: Path | None, max_shard_size: str, as_json: bool
) -> Conversion:
    with ProgressReport() as progress:
        done = streamconv.convert(
            source, folder, head=head, labels=labels, max_shard_size=max_shard_size, progress=progress
        )
    if not as_json:
        state = "was converted already and is left as it is" if done.was_finished else "converted"
        print(f"{done.plan.title}: {state}, {done.plan.weights:,} bytes of weights in {done.output}")
        for name, digest in done.shards.items():
            print(f"  {name}  sha256 {digest}{' as recorded' if done.was_finished else ''}")
        if not done.is_crc_checked:
            print("  the source carries no CRC-32s, so that its bytes could not be checked for damage")
        if done.labels_from:
            print(f"  labels from {done.labels_from}")
    return done


def _verify(
    folder: Path, source: str, head: Path | None, device: str, image: Path | None, as_json: bool
) -> Verification:
    with ProgressReport() as progress:
        found = streamconv.verify(folder, source, head=head, device=device, image=image, progress=progress)
    try:
        record_verification(folder, found.as_dict(), dict(found.source))
    except OutputError as error:
        print(f"note: the finding is not kept: {error}", file=sys.stderr)
    if not as_json:
        _print_verification(found)
    return found


def _check_ahead(device: str, image: Path | None) -> None:
    """Refuse a device or an image that does not exist before converting, without importing torch here."""
    if device in ("auto", "cpu") and image is None:
        return
    command = [sys.executable, "-m", "streamconv.verify.devices", device, *([str(image)] if image else [])]
    asked = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if asked.returncode:
        raise UsageError(asked.stderr.strip().splitlines()[-1])


def _print_verification(found: Verification) -> None:
    for rung in found.rungs:
        verdict = {True: "ok", False: "FAILED", None: "not run"}[rung.passed]
        print(f"{rung.name:8}{verdict:8}{rung.proves}")
        numbers = rung.numbers
        if numbers.get("largest") is not None:
            found_and_allowed = f"largest difference {numbers['largest']:.3g}, allowed {numbers['tolerance']:g}"
            print(f"{'':16}{len(numbers['differences'])} states on {found.device}: {found_and_allowed}")
        for problem in rung.problems:
            print(f"{'':16}{problem}")
    if found.predictions:
        print("Predicted class:")
        for label, share in found.predictions:
            print(f"  {share:6.1%}  {label}")
    print("Looks ok!" if found.passed else "The output is not what the source says. Do not use it.")


@contextmanager
def _synthetic(
    name: str, output: str | None, seed: int, head: Path | None
) -> Iterator[tuple[str, Path | None, Path | None]]:
    """A random checkpoint for as long as it is needed, on the disk that the output goes to."""
    if head is not None:
        raise UsageError("--synthetic makes its own head. Leave --head out.")
    try:
        _, model = find_model(name)
    except UsageError as error:
        raise UsageError(f"--synthetic makes a model by its name: {error}") from None
    folder = Path(output or model.published_name)
    near = next((path for path in folder.absolute().parents if os.path.isdir(path)), folder)
    try:
        temporary = tempfile.TemporaryDirectory(prefix=".streamconv-", dir=near)
    except OSError as error:
        raise OutputError(
            f"{near} cannot be written: {error.strerror}. Choose another place for the output."
        ) from error
    with temporary as made_in:
        print(f"making a random checkpoint of {name}, seed {seed}", file=sys.stderr)
        # The name stands in the manifest: no one shall take these weights for the published ones.
        made = streamconv.synth(name, Path(made_in, f"{name}_synthetic_seed{seed}.pth"), seed=seed)
        yield str(made.backbone), made.head, folder


@contextmanager
def _errors() -> Iterator[None]:
    """Our own errors become one message and an exit code; all others are bugs, and show their traceback."""
    try:
        yield
    except StreamconvError as error:
        _fail(error)
    except KeyboardInterrupt:
        print("interrupted; run the same command to start over", file=sys.stderr)
        raise typer.Exit(130) from None


def _fail(error: StreamconvError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise typer.Exit(error.exit_code)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2))


def main() -> None:
    """The console script. SIGTERM and a closed terminal end it as Ctrl-C does: no unfinished file stays behind."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no error
    app()
