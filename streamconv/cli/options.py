"""The options that several commands of the command line share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, get_args

import typer

from streamconv.jobs import run as pushing
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
PushToHub = Annotated[str | None, typer.Option(*pushing.OPTIONS, metavar="[REPO]", help=pushing.HELP)]
Private = Annotated[bool, typer.Option("--private", help="Make the repository a private one.")]
Revision = Annotated[
    str | None, typer.Option(metavar="REV", help="The branch to push to; made where it is not. [default: main]")
]
CreatePr = Annotated[bool, typer.Option("--create-pr", help="Open a pull request, and commit nothing to the branch.")]
PushUnverified = Annotated[
    bool, typer.Option("--push-unverified", help="Push what was not verified, or found wrong. The model card says so.")
]


OPTIONS = ("--push-to-hub", "--push_to_hub")


HELP = "Push what was verified to the Hub, to USER/NAME or your own NAME. [default: the published name]"


def with_values(words: Sequence[str]) -> list[str]:
    """A command line in which --push-to-hub always has a value, an empty one where the user gave none.

    typer has no options whose value may be left out.
    """
    following = zip(words, [*words[1:], "-"], strict=False)
    return [f"{word}=" if word in OPTIONS and after.startswith("-") else word for word, after in following]
