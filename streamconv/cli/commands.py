"""The command line: parse the user's words, call one function, print as `terminal` does. Nothing else prints."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

import streamconv
from streamconv._version import __version__
from streamconv.cli.messages import conversion_lines, model_lines, plan_lines, reverted_lines, verification_lines
from streamconv.cli.options import (
    DEFAULT_MODEL,
    CreatePr,
    Device,
    Dtype,
    Head,
    Image,
    Json,
    Labels,
    ModelName,
    NoParity,
    NoVerify,
    NumHeads,
    OutputOrDefault,
    Private,
    PushToHub,
    PushUnverified,
    Reference,
    Report,
    Revision,
    Seed,
    Select,
    ShardSize,
    Source,
    SourceOrDefault,
    Stream,
    Synthetic,
    with_values,
)
from streamconv.cli.progress_bar import ProgressReport
from streamconv.cli.terminal import fail, print_json, print_lines, report_errors, run_with_signals
from streamconv.errors import StreamconvError, UsageError
from streamconv.hub.repository import Repository
from streamconv.jobs.convert import Conversion
from streamconv.jobs.convert_to_hub import HubConversion, convert_to_hub
from streamconv.jobs.run import read_options
from streamconv.jobs.synth import temporary_checkpoint
from streamconv.jobs.verifying_tmp import Verifying
from streamconv.verification.result import Verification

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


@app.command()
def run(
    source: SourceOrDefault = None,
    output: OutputOrDefault = None,
    device: Device = "auto",
    head: Head = None,
    labels: Labels = None,
    max_shard_size: ShardSize = "5GB",
    dtype: Dtype = None,
    select: Select = None,
    num_heads: NumHeads = None,
    stream: Stream = False,
    image: Image = None,
    reference: Reference = "builtin",
    no_parity: NoParity = False,
    report: Report = None,
    no_verify: NoVerify = False,
    as_json: Json = False,
    synthetic: Synthetic = False,
    seed: Seed = 0,
    model_name: ModelName = None,
    push_to_hub: PushToHub = None,
    private: Private = False,
    revision: Revision = None,
    create_pr: CreatePr = False,
    push_unverified: PushUnverified = False,
) -> None:
    """Convert a checkpoint and verify the result."""
    if source is not None and model_name is not None:
        fail(UsageError("SOURCE and --model_name are the same. Give one of them."))
    name = next((word for word in (source, model_name) if word is not None), DEFAULT_MODEL)
    with report_errors():
        if synthetic and head is not None:
            raise UsageError("--synthetic makes its own head. Leave --head out.")
        pushing = read_options(push_to_hub, private, revision, create_pr, push_unverified, not no_verify)
        verifying = None if no_verify else Verifying(device, image, reference, not no_parity, stream, report)
        if verifying is not None:
            verifying.check_ahead()
        options: dict[str, Any] = {"head": head, "labels": labels, "max_shard_size": max_shard_size, "dtype": dtype}
        options |= {"select": select, "num_heads": num_heads}
        repository = pushing.open(name, synthetic, **options) if pushing is not None else None
    with report_errors():
        published, failure, found = None, None, None
        with _synthetic(name, output, seed) if synthetic else nullcontext((name, head)) as (path, options["head"]):
            if stream and pushing is not None and repository is not None:
                relayed = _relay(path, output, repository, verifying, as_json, unverified=pushing.unverified, **options)
                converted, found, published = relayed.conversion, relayed.verification, relayed.published
            else:
                converted = _convert(path, output, as_json, stream=stream, **options)
                if verifying is not None:
                    said = {name: options[name] for name in ("head", "select", "num_heads")}
                    found = _verify(verifying, converted.output, path, as_json, **said)
    passed = found is not None and found.passed
    if pushing is not None and repository is not None and not stream and (passed or pushing.unverified):
        try:
            published = pushing.push(converted.output, repository)
        except StreamconvError as error:
            failure = error  # said when all that was done is
    if as_json:
        verification = found.as_dict() if found else None
        print_json({**converted.as_dict(), "verification": verification, "published": published})
    elif found is None:
        print_lines(["not verified: --no-verify"])
    with report_errors():
        if verifying is not None and found is not None:
            _write_report(verifying, found, as_json)
        if failure is not None:
            raise failure
    if published is not None and not as_json:
        print_lines([f"published: {published}"])
    if found is not None and not passed:
        if pushing is not None and published is None:
            print("not pushed, since verification failed; --push-unverified would insist", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def convert(
    source: Source,
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="The folder to write.")],
    head: Head = None,
    labels: Labels = None,
    max_shard_size: ShardSize = "5GB",
    dtype: Dtype = None,
    select: Select = None,
    num_heads: NumHeads = None,
    stream: Stream = False,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint into a folder that transformers loads."""
    with report_errors():
        options: dict[str, Any] = {"head": head, "labels": labels, "max_shard_size": max_shard_size, "dtype": dtype}
        options |= {"select": select, "num_heads": num_heads, "stream": stream}
        converted = _convert(source, output, as_json, **options)
    if as_json:
        print_json(converted.as_dict())


@app.command()
def revert(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of transformers' safetensors files.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The file to write, .pth, .pt, .bin or .safetensors.")
    ],
    head: Annotated[Path | None, typer.Option(metavar="FILE", help="The file for a classifier's linear head.")] = None,
    block_chunks: Annotated[
        int | None,
        typer.Option(metavar="N", help="Lists that the blocks are in, 0 for one. [default: as they were converted]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a folder's model in its authors' layout: what convert does, backwards."""
    with report_errors(), ProgressReport() as progress:
        reverted = streamconv.revert(folder, output, head=head, block_chunks=block_chunks, progress=progress)
    if as_json:
        print_json(reverted.as_dict())
    else:
        print_lines(reverted_lines(reverted))


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that streamconv converted into.")],
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="SOURCE",
            help="A model's name, a checkpoint file, or its address. Without it, the files are checked by themselves.",
            show_default=False,
        ),
    ] = None,
    head: Head = None,
    select: Select = None,
    num_heads: NumHeads = None,
    device: Device = "auto",
    image: Image = None,
    reference: Reference = "builtin",
    no_parity: NoParity = False,
    stream: Stream = False,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Prove a converted folder against its source: every byte, the loading, and what the model computes.

    Without SOURCE, each file is checked against the size and sha256 in the folder's streamconv.json.
    """
    with report_errors():
        given = (head, select, num_heads, device, image, reference, no_parity, stream)
        if source is None and given != (None, None, None, "auto", None, "builtin", False, False):
            raise UsageError(
                "--head, --select, --num-heads, --device, --image, --reference, --no-parity and --stream are for a "
                "comparison. Name the SOURCE too."
            )
        verifying = Verifying(device, image, reference, not no_parity, stream, report)
        verifying.check_ahead()
        found = _verify(verifying, folder, source, as_json, head=head, select=select, num_heads=num_heads)
    if as_json:
        print_json(found.as_dict())
    with report_errors():
        _write_report(verifying, found, as_json)
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def plan(
    source: Source,
    head: Head = None,
    max_shard_size: ShardSize = "5GB",
    dtype: Dtype = None,
    select: Select = None,
    num_heads: NumHeads = None,
    as_json: Json = False,
) -> None:
    """Show what would be written: mapping, shards, bytes. No weight is read."""
    with report_errors():
        said: dict[str, Any] = {"head": head, "select": select, "num_heads": num_heads}
        planned = streamconv.plan(source, max_shard_size=max_shard_size, dtype=dtype, **said)
    if as_json:
        print_json(planned.as_dict())
        return
    print_lines(plan_lines(planned))


@app.command()
def models() -> None:
    """List the models: names, sizes, files, published names."""
    print_lines(model_lines())


@app.command()
def synth(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's name.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The checkpoint to write; a head goes beside it.")],
    seed: Seed = 0,
) -> None:
    """Write a random checkpoint in the model's original layout, exact in names and shapes."""
    with report_errors():
        written = streamconv.synth(model, file, seed=seed)
    print_lines(
        f"{path}  {path.stat().st_size:,} bytes" for path in (written.backbone, written.head) if path is not None
    )


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
    with report_errors():
        try:
            os.getcwd()
        except FileNotFoundError:
            raise UsageError("The current folder is gone. Change to another one.") from None


def _convert(source: str, folder: str | Path | None, as_json: bool, **options: Any) -> Conversion:
    with ProgressReport() as progress:
        done = streamconv.convert(source, folder, progress=progress, **options)
    if not as_json:
        print_lines(conversion_lines(done))
    return done


def _relay(
    source: str,
    folder: str | None,
    repository: Repository,
    verifying: Verifying | None,
    as_json: bool,
    **options: Any,
) -> HubConversion:
    with ProgressReport() as progress:
        verify = verifying.of_what_was_sent(progress) if verifying is not None else None
        done = convert_to_hub(source, folder, repository, verify, progress=progress, **options)
    if not as_json:
        print_lines(conversion_lines(done.conversion))
        if done.verification is not None:
            print_lines(verification_lines(done.verification))
    return done


def _verify(verifying: Verifying, folder: Path, source: str | None, as_json: bool, **said: Any) -> Verification:
    found, why_not_kept = verifying.verify(folder, source, **said)
    if not as_json:
        print_lines(verification_lines(found))
    if why_not_kept is not None:
        print(f"note: the finding is not kept: {why_not_kept}", file=sys.stderr)
    return found


def _write_report(verifying: Verifying, found: Verification, as_json: bool) -> None:
    verifying.write_report(found)
    if verifying.report is not None:
        if as_json:
            print(f"report: {verifying.report}", file=sys.stderr)
        else:
            print_lines([f"report: {verifying.report}"])


@contextmanager
def _synthetic(name: str, output: str | None, seed: int) -> Iterator[tuple[str, str | None]]:
    print(f"making a random checkpoint of {name}, seed {seed}", file=sys.stderr)
    with temporary_checkpoint(name, None if output is None else Path(output), seed=seed) as made:
        yield str(made.backbone), str(made.head) if made.head else None


def main() -> None:
    """The console script. However it is interrupted, no unfinished file gets its name."""
    run_with_signals(lambda: app(with_values(sys.argv[1:])))
