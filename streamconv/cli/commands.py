"""The command line: parse what the user typed, call one job, print its result. Nothing else prints."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

import streamconv
from streamconv import SourceOptions, VerificationOptions
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
    conversion_options,
    push_options,
    with_values,
)
from streamconv.cli.progress_bar import ProgressReport
from streamconv.cli.results import Results, print_notes, print_report_path
from streamconv.cli.terminal import fail, print_json, print_lines, report_errors, run_with_signals
from streamconv.errors import UsageError

EXIT_CODES = """\b
Exit codes: 0 success, and everything verified is correct; 1 verification found a difference;
2 wrong usage; 3 the source cannot be converted; 4 the output cannot be written; 130 interrupted."""

app = typer.Typer(
    help="Converts published checkpoints to Hugging Face's format by streaming, and verifies the result.",
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
        fail(UsageError("SOURCE and --model_name mean the same. Give only one of them."))
    name = next((word for word in (source, model_name) if word is not None), DEFAULT_MODEL)
    results = Results(as_json)
    with report_errors(results.finish):
        conversion = conversion_options(head, select, num_heads, max_shard_size, dtype, labels, stream)
        verification = (
            None
            if no_verify
            else VerificationOptions(
                device=device, image=image, reference=reference, parity=not no_parity, report=report
            )
        )
        push = push_options(push_to_hub, private, revision, create_pr, push_unverified)
        if synthetic:
            print(f"making a random checkpoint of {name}, seed {seed}", file=sys.stderr)
        with ProgressReport() as progress:
            done = streamconv.run(
                name,
                output,
                conversion,
                verification,
                push,
                synthetic_seed=seed if synthetic else None,
                progress=progress,
                on_result=results.printer(progress),
            )
        results.published = done.published.url if done.published is not None else None
    results.finish()
    if verification is None:
        return
    print_report_path(report, as_json)
    if not done.passed:
        if push is not None and done.published is None:
            print("Not pushed, because verification failed. --push-unverified pushes anyway.", file=sys.stderr)
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
        options = conversion_options(head, select, num_heads, max_shard_size, dtype, labels, stream)
        with ProgressReport() as progress:
            converted = streamconv.convert(source, output, options, progress=progress)
    if as_json:
        print_json(converted.as_dict())
    else:
        print_lines(conversion_lines(converted))


@app.command()
def revert(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of transformers' safetensors files.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The file to write, .pth, .pt, .bin or .safetensors.")
    ],
    head: Annotated[Path | None, typer.Option(metavar="FILE", help="The file for a classifier's linear head.")] = None,
    block_chunks: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="The number of chunks for the blocks, 0 for one plain list. [default: as before the conversion]",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert a folder back to its authors' format."""
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
            help="A model's name, a checkpoint file, or its URL. [default: check the files without a source]",
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
    """Verify a converted folder against its source: every byte, loading, and the outputs of every layer.

    Without SOURCE, each file is checked against the size and sha256 in the folder's streamconv.json.
    """
    with report_errors():
        source_options = SourceOptions(head=head, select=select, num_heads=num_heads, stream=stream)
        options = VerificationOptions(
            device=device, image=image, reference=reference, parity=not no_parity, report=report
        )
        if source is None and (source_options, options) != (SourceOptions(), VerificationOptions(report=report)):
            raise UsageError(
                "--head, --select, --num-heads, --device, --image, --reference, --no-parity and --stream only apply to "
                "a comparison with the source. Give SOURCE, too."
            )
        with ProgressReport() as progress:
            verified = streamconv.verify(folder, source, options, source_options, progress=progress)
    if as_json:
        print_json(verified.as_dict())
    else:
        print_lines(verification_lines(verified))
    print_notes(verified)
    print_report_path(report, as_json)
    if not verified.passed:
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
    """Show what convert would write: mapping, shards, bytes. No weight is read."""
    with report_errors():
        options = conversion_options(head, select, num_heads, max_shard_size, dtype)
        planned = streamconv.plan(source, options)
    if as_json:
        print_json(planned.as_dict())
    else:
        print_lines(plan_lines(planned))


@app.command()
def models() -> None:
    """List the known models with their published names, sizes and files."""
    print_lines(model_lines())


@app.command()
def synth(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's name.")],
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The checkpoint to write; a head is written next to it.")
    ],
    seed: Seed = 0,
) -> None:
    """Write a random checkpoint with the model's original names and shapes."""
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
            raise UsageError("The current folder no longer exists. Change to another one.") from None


def main() -> None:
    """Run the console script. However it is interrupted, no incomplete file gets its final name."""
    run_with_signals(lambda: app(with_values(sys.argv[1:])))
