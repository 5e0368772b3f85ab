"""Command-line options that several commands share."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, get_args

import typer

from streamconv.errors import UsageError
from streamconv.families.registry import find_model
from streamconv.hub.repository import Destination
from streamconv.jobs.options import ConversionOptions, PushOptions, VerificationOptions
from streamconv.tensors.info import CastDtype

PUSH_TO_HUB = ("--push-to-hub", "--push_to_hub")
Source = Annotated[str, typer.Argument(metavar="SOURCE", help="A model's name, a checkpoint file, or its URL.")]
DEFAULT_MODEL = "dinov2_vitg14"
SourceOrDefault = Annotated[
    str | None,
    typer.Argument(metavar="SOURCE", help=f"A model's name, a checkpoint file, or its URL. [default: {DEFAULT_MODEL}]"),
]
ModelName = Annotated[str | None, typer.Option("--model_name", metavar="NAME", help="The same as SOURCE.")]
OutputOrDefault = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        "--pytorch_dump_folder_path",
        metavar="DIR",
        help="The folder to write. [default: the published name]",
    ),
]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Convert only; do not verify.")]
Synthetic = Annotated[
    bool, typer.Option("--synthetic", help="Generate a random checkpoint of the model and convert it.")
]
Head = Annotated[
    str | None, typer.Option(metavar="FILE", help="The linear head's file or URL, for a classifier from files.")
]
Stream = Annotated[
    bool, typer.Option("--stream", help="Convert a URL directly, without downloading it to a file first.")
]
Labels = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="The class names, as JSON or one per line. [default for 1000 classes: ImageNet's]"
    ),
]
ShardSize = Annotated[str, typer.Option(metavar="SIZE", help="The maximum size of one output file.")]
Dtype = Annotated[
    str | None,
    typer.Option(metavar="|".join(get_args(CastDtype)), help="Cast the weights to this dtype. [default: no cast]"),
]
Select = Annotated[
    str | None,
    typer.Option(
        metavar="PREFIX", help="Which backbone to convert if the file holds several, such as teacher.backbone."
    ),
]
NumHeads = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="The number of attention heads, which tensors do not show. [default: the family's rule]"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Device = Annotated[
    str, typer.Option(metavar="auto|cpu|cuda|cuda:N", help="The device to verify on; auto is a GPU if there is one.")
]
NoParity = Annotated[
    bool, typer.Option("--no-parity", help="Do not run the models; the output lists what was not checked.")
]
Image = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="The image to verify with, a file or URL. [default: one that streamconv draws]"),
]
Reference = Annotated[
    str,
    typer.Option(
        metavar="builtin|hub|PATH",
        help="The original model: streamconv's own code, or the authors', downloaded by torch.hub or in a folder.",
    ),
]
Report = Annotated[
    Path | None, typer.Option(metavar="FILE.html", help="Write the verification result as an HTML page.")
]
Seed = Annotated[int, typer.Option(min=0, help="The seed of the random weights.")]
PushToHub = Annotated[
    str | None,
    typer.Option(
        *PUSH_TO_HUB,
        metavar="[REPO]",
        help="Push the verified output to USER/NAME on the Hub, or to NAME in your account. [default: published name]",
    ),
]
Private = Annotated[bool, typer.Option("--private", help="Make the repository private when it is created.")]
Revision = Annotated[
    str | None, typer.Option(metavar="REV", help="The branch to push to, created if needed. [default: main]")
]
CreatePr = Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing to the branch.")]
PushUnverified = Annotated[
    bool,
    typer.Option("--push-unverified", help="Push even if verification failed or did not run; the card mentions it."),
]


def with_values(words: Sequence[str]) -> list[str]:
    """Give each --push-to-hub without a value an empty one, because typer has no options with optional values."""
    following = zip(words, [*words[1:], "-"], strict=False)
    return [f"{word}=" if word in PUSH_TO_HUB and after.startswith("-") else word for word, after in following]


def conversion_options(
    head: str | None,
    select: str | None,
    num_heads: int | None,
    max_shard_size: str,
    dtype: str | None,
    labels: Path | None = None,
    stream: bool = False,
) -> ConversionOptions:
    """Return the options of a conversion.

    Raises:
        UsageError: one of them is not valid.
    """
    return ConversionOptions(
        head=head,
        select=select,
        num_heads=num_heads,
        stream=stream,
        labels=labels,
        max_shard_size=max_shard_size,
        dtype=dtype,  # type: ignore[arg-type]  # refused there if it is not one of the literals
    )


def verification_options(
    device: str, image: str | None, reference: str, no_parity: bool, report: Path | None
) -> VerificationOptions:
    """Return the options of a verification; raise `UsageError` if the device's name is not valid."""
    return VerificationOptions(device=device, image=image, reference=reference, parity=not no_parity, report=report)


def push_options(
    push_to_hub: str | None, private: bool, revision: str | None, create_pr: bool, unverified: bool
) -> PushOptions | None:
    """Return what to push, and where; None for no push.

    Raises:
        UsageError: the options contradict each other, or --push-to-hub took the source as its value.
    """
    if push_to_hub is None:
        given = {"--private": private, "--revision": revision is not None, "--create-pr": create_pr}
        alone = [name for name, is_given in {**given, "--push-unverified": unverified}.items() if is_given]
        if alone:
            raise UsageError(f"{' and '.join(alone)} {'needs' if len(alone) == 1 else 'need'} --push-to-hub. Add it.")
        return None
    if _is_source(push_to_hub):
        raise UsageError(
            f"--push-to-hub took {push_to_hub} as the repository's name, but it is a source. Put the source first, "
            f"streamconv run {push_to_hub} --push-to-hub, or name a repository as USER/NAME."
        )
    return PushOptions(Destination(push_to_hub or None, private, revision, create_pr), unverified)


def _is_source(word: str) -> bool:
    if "://" in word or os.path.isfile(word):
        return True
    try:
        find_model(word)
    except UsageError:
        return False
    return True
