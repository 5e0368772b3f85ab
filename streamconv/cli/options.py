"""The options that several commands of the command line share."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, get_args

import typer

from streamconv.errors import UsageError
from streamconv.families.registry import find_model
from streamconv.hub.repository import Destination
from streamconv.jobs.options import PushOptions
from streamconv.tensors.info import CastDtype

Source = Annotated[str, typer.Argument(metavar="SOURCE", help="A model's name, a checkpoint file, or its address.")]
DEFAULT_MODEL = "dinov2_vitg14"
SourceOrDefault = Annotated[
    str | None,
    typer.Argument(
        metavar="SOURCE", help=f"A model's name, a checkpoint file, or its address. [default: {DEFAULT_MODEL}]"
    ),
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
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Convert only.")]
Synthetic = Annotated[
    bool, typer.Option("--synthetic", help="Make a random checkpoint of the model, and convert that.")
]
Head = Annotated[
    str | None, typer.Option(metavar="FILE", help="A linear head's file or address, for a classifier from files.")
]
Stream = Annotated[
    bool, typer.Option("--stream", help="Read an address straight into the output, and keep no other file.")
]
Labels = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="The classes' names: JSON, or a line each. [default: ImageNet's for 1000 classes]"
    ),
]
ShardSize = Annotated[str, typer.Option(metavar="SIZE", help="The largest size of one file.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(get_args(CastDtype)), help="What to cast the weights to. [default: as they are stored]"
    ),
]
Select = Annotated[
    str | None,
    typer.Option(metavar="PREFIX", help="Of the backbone's names, where the file holds several: teacher.backbone"),
]
NumHeads = Annotated[
    int | None,
    typer.Option(metavar="N", help="Attention heads, which no tensor tells. [default: as the family's models have]"),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]
Device = Annotated[
    str, typer.Option(metavar="auto|cpu|cuda|cuda:N", help="What to verify on; auto takes a GPU if there is one.")
]
NoParity = Annotated[bool, typer.Option("--no-parity", help="Run no model; what that leaves unproved is said.")]
Image = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="A picture to verify on, or its http address. [default: one of the project's own]"
    ),
]
Reference = Annotated[
    str,
    typer.Option(
        metavar="builtin|hub|PATH",
        help="What computes the original: streamconv's graph, or the authors' code, which torch.hub fetches and runs.",
    ),
]
Report = Annotated[
    Path | None, typer.Option(metavar="FILE.html", help="Write what was found as a page to look at and to publish.")
]
Seed = Annotated[int, typer.Option(min=0, help="Of the random weights.")]
PUSH_NAMES = ("--push-to-hub", "--push_to_hub")
PushToHub = Annotated[
    str | None,
    typer.Option(
        *PUSH_NAMES,
        metavar="[REPO]",
        help="Push what was verified to the Hub, to USER/NAME or your own NAME. [default: the published name]",
    ),
]
Private = Annotated[bool, typer.Option("--private", help="Make the repository a private one.")]
Revision = Annotated[
    str | None, typer.Option(metavar="REV", help="The branch to push to; made where it is not. [default: main]")
]
CreatePr = Annotated[bool, typer.Option("--create-pr", help="Open a pull request, and commit nothing to the branch.")]
PushUnverified = Annotated[
    bool, typer.Option("--push-unverified", help="Push what was not verified, or found wrong. The model card says so.")
]


def with_values(words: Sequence[str]) -> list[str]:
    """Give --push-to-hub an empty value if the user gave none: typer has no options with an optional value."""
    following = zip(words, [*words[1:], "-"], strict=False)
    return [f"{word}=" if word in PUSH_NAMES and after.startswith("-") else word for word, after in following]


def push_options(
    push_to_hub: str | None, private: bool, revision: str | None, create_pr: bool, unverified: bool
) -> PushOptions | None:
    """What the options of `run` ask for; None for no push.

    Raises:
        UsageError: they do not go together, or --push-to-hub took the source as its value.
    """
    if push_to_hub is None:
        given = {"--private": private, "--revision": revision is not None, "--create-pr": create_pr}
        alone = [name for name, is_given in {**given, "--push-unverified": unverified}.items() if is_given]
        if alone:
            raise UsageError(
                f"{' and '.join(alone)} {'needs' if len(alone) == 1 else 'need'} --push-to-hub. Give it too."
            )
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
