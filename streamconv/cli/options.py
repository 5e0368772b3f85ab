"""Command-line options that several commands share, in the groups that the help shows them in."""

import os
import sys
from typing import Any, get_args

import click
from click.shell_completion import CompletionItem

from streamconv.cli.command import Argument, Option
from streamconv.cli.shown import shown_command
from streamconv.errors import UsageError
from streamconv.families.registry import all_families, is_model
from streamconv.hub.destination import Destination
from streamconv.jobs.options import PushOptions, VerificationOptions
from streamconv.redaction import shown_argument
from streamconv.tensors.info import CastDtype

DEFAULT_MODEL = "dinov2_vitg14"
FILE = click.Path(readable=False)  # these types complete names, and leave all checks to the jobs


def _models(ctx: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    models = [model for family in all_families() for model in family.models]
    names = [model.name for model in models if model.name.startswith(begun)]
    on_the_hub = [model.published_name for model in models if model.published_name.startswith(begun)]
    return [CompletionItem(name) for name in names or on_the_hub]


def _models_and_files(ctx: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    # The file is first, because click's script for bash drops all items before it. bash offers files if no model fits.
    return [CompletionItem(begun, type="file"), *_models(ctx, parameter, begun)]


def _devices(ctx: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in ("auto", "cpu", "cuda", "cuda:0") if name.startswith(begun)]


def _dtypes(ctx: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in get_args(CastDtype) if name.startswith(begun)]


def _folders(ctx: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    return [CompletionItem(begun, type="dir")]


def _references(ctx: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    names = [CompletionItem(name) for name in ("builtin", "hub") if name.startswith(begun)]
    return names or [CompletionItem(begun, type="dir")]


def source_argument(default: str | None = None, *, required: bool = True) -> Argument:
    """Return the argument SOURCE; ``default`` describes what it means to leave it out."""
    text = "A model's name, or the path or URL of a checkpoint."
    return Argument(
        "source", metavar="SOURCE" if required else "[SOURCE]", required=required, group="Source",
        text=f"{text}  [default: {default}]" if default else text, shell_complete=_models_and_files,
    )  # fmt: skip


def model_argument() -> Argument:
    return Argument("model", metavar="MODEL", group="Source", text="A model's name.", shell_complete=_models)


def output_option(default: str | None = None, *aliases: str, may_be_url: bool = False) -> Option:
    """Return the option --output; ``default`` describes the folder if none is given."""
    url = ", or its URL in a store, such as s3://BUCKET/FOLDER" if may_be_url else ""
    return Option(
        "-o", "--output", *aliases, metavar="DIR", shell_complete=_folders, required=default is None, group="Output",
        help=f"The folder to write to{url}.", show_default=default or False,
    )  # fmt: skip


# Of the source
HEAD = Option(
    "--head", metavar="FILE", type=FILE, group="Source",
    help="The path or URL of the linear head, for a classifier in two files.",
)  # fmt: skip
SELECT = Option(
    "--select", metavar="PREFIX", group="Source",
    help="The backbone to convert if the file holds several, or other tensors, such as teacher.backbone.",
)  # fmt: skip
HEAD_SELECT = Option(
    "--head-select", metavar="PREFIX", group="Source",
    help="The head to convert if the file of --head, or else SOURCE, holds several or other tensors.",
)  # fmt: skip
NUM_HEADS = Option(
    "--num-heads", metavar="N", type=int, group="Source", show_default="the model family's rule",
    help="The number of attention heads, which the tensors do not show.",
)  # fmt: skip
STREAM = Option(
    "--stream", is_flag=True, group="Source", help="Read a URL directly, without downloading it to a file first."
)
SEED = Option(
    "--seed", metavar="N", type=click.IntRange(min=0), default=0, group="Source", help="The seed for random weights."
)

# Of the output
LABELS = Option(
    "--labels", metavar="FILE", type=FILE, group="Output", show_default="ImageNet's, for 1000 classes",
    help="A file of class names, as JSON or one per line.",
)  # fmt: skip
SHARD_SIZE = Option(
    "--max-shard-size", metavar="SIZE", default="5GB", group="Output", help="The maximum size of one weight file."
)
DTYPE = Option(
    "--dtype", metavar="DTYPE", group="Output", show_default="no cast", shell_complete=_dtypes,
    help="Cast the weights to {}, {} or {}.".format(*get_args(CastDtype)),
)  # fmt: skip
IMAGE_PROCESSOR_OPTIONS = (
    Option(
        "--image-mean", metavar="X,…", group="Output", show_default="the source's own, or that of published models",
        help="The image processor's mean, for values from 0 to 1: one per channel, or one for all.",
    ),
    Option(
        "--image-std", metavar="X,…", group="Output", show_default="likewise",
        help="The image processor's standard deviation, likewise.",
    ),
    Option(
        "--image-size", metavar="N", type=int, group="Output", show_default="likewise",
        help="Resize an image's shorter side to N pixels, and cut N x N from the centre.",
    ),
    Option(
        "--image-processor", metavar="FILE", type=FILE, group="Output",
        help="A preprocessor_config.json to write, instead of the three options above.",
    ),
)  # fmt: skip
FORCE = Option(
    "--force", is_flag=True, group="Output",
    help="Replace files that streamconv wrote to DIR earlier. Other files are never replaced.",
)  # fmt: skip
NO_SERVER_SIDE_COPY = Option(
    "--no-server-side-copy", is_flag=True, group="Output",
    help="From S3 to S3, read all bytes, for the sha256 of each file; by default, S3 copies large tensors itself.",
)  # fmt: skip
REPLACE = Option("--force", is_flag=True, group="Output", help="Replace files that exist already.")
YES = Option(
    "-y", "--yes", is_flag=True, group="General",
    help="Do not ask before the default model is downloaded, or before much more is written than is read.",
)  # fmt: skip
DRY_RUN = Option(
    "--dry-run", is_flag=True, group="Output", help="Check everything and show what would be done; write nothing."
)

SOURCE_OPTIONS = (HEAD, HEAD_SELECT, SELECT, NUM_HEADS, STREAM)
CONVERSION_OPTIONS = (*SOURCE_OPTIONS, LABELS, *IMAGE_PROCESSOR_OPTIONS, SHARD_SIZE, DTYPE, FORCE)
"""Their names are the fields of `SourceOptions` and `ConversionOptions`."""

VERIFICATION_OPTIONS = (
    Option(
        "--device", metavar="DEVICE", default="auto", group="Verification", shell_complete=_devices,
        help="The device to verify on: cpu, cuda or cuda:N; auto uses a GPU if one works.",
    ),
    Option(
        "--image", metavar="FILE", type=FILE, group="Verification", show_default="one that streamconv draws",
        help="The path or URL of the image to verify with.",
    ),
    Option(
        "--reference", metavar="builtin|hub|DIR", default="builtin", group="Verification", shell_complete=_references,
        help="The original model's code: streamconv's own, or the authors', from torch.hub or from a folder.",
    ),
    Option(
        "--no-parity", is_flag=True, group="Verification",
        help="Do not run the models. The verdict names what was not checked.",
    ),
    Option(
        "--thorough", is_flag=True, group="Verification",
        help="Also run the models at the original's native size. Takes several times as long.",
    ),
    Option(
        "--report", metavar="FILE.html", type=FILE, group="Verification",
        help="Write the verification result as an HTML page.",
    ),
)  # fmt: skip
REPOSITORY_OPTIONS = (
    Option(
        "--private", is_flag=True, group="Hub",
        help="Create a private repository. An existing public one is refused.",
    ),
    Option(
        "--revision", metavar="REV", group="Hub", show_default="main",
        help="The branch to push to, created if needed.",
    ),
    Option("--create-pr", is_flag=True, group="Hub", help="Open a pull request instead of committing to the branch."),
    Option(
        "--license", metavar="ID", group="Hub", show_default="the authors', for their own weights",
        help="The licence that the model card names, such as cc-by-4.0.",
    ),
    Option(
        "--tag", "tags", metavar="TAG", multiple=True, group="Hub",
        help="A tag to add to the model card; may be repeated.",
    ),
)  # fmt: skip
PUSH_OPTIONS = (
    Option(
        "--push-to-hub", metavar="[REPO]", is_flag=False, flag_value="", group="Hub",
        help="Push the verified output to USER/NAME on the Hub, or to NAME in your account.",
        show_default="the published name, or DIR's",
    ),
    *REPOSITORY_OPTIONS,
    Option(
        "--push-unverified", is_flag=True, group="Hub",
        help="Push even if verification failed or did not run; the model card says so.",
    ),
)  # fmt: skip


def verification_options(no_parity: bool, **given: Any) -> VerificationOptions:
    """Return the options of a verification.

    Raises:
        UsageError: the device's name is not valid.
    """
    return VerificationOptions(parity=not no_parity, command=shown_command(sys.argv[1:]), **given)


def push_options(push_to_hub: str | None, push_unverified: bool, **given: Any) -> PushOptions | None:
    """Return the options for pushing, or None if nothing is pushed.

    Args:
        given: The values of `REPOSITORY_OPTIONS`.

    Raises:
        UsageError: the options contradict each other, or --push-to-hub took the source as its value.
    """
    if push_to_hub is None:
        names = {option.name: option.opts[0] for option in REPOSITORY_OPTIONS}
        alone = [names[name] for name, value in given.items() if value or value == ""]
        alone += ["--push-unverified"] if push_unverified else []
        if alone:
            raise UsageError(f"{' and '.join(alone)} {'needs' if len(alone) == 1 else 'need'} --push-to-hub. Add it.")
        return None
    if _is_source(push_to_hub):
        source = shown_argument(push_to_hub)
        raise UsageError(
            f"--push-to-hub took {source} as the repository's name, but it is a source. Put the source first, "
            f"`streamconv run {source} --push-to-hub`, or name a repository as USER/NAME."
        )
    return repository_options(push_to_hub or None, push_unverified, **given)


def repository_options(
    repo: str | None,
    unverified: bool,
    private: bool,
    revision: str | None,
    create_pr: bool,
    license: str | None,
    tags: tuple[str, ...],
) -> PushOptions:
    """Return the options for pushing to ``repo``.

    Raises:
        UsageError: the revision's name, the licence or a tag is not valid.
    """
    return PushOptions(Destination(repo, private, revision, create_pr), unverified, license, tags)


def _is_source(word: str) -> bool:
    return "://" in word or os.path.isfile(word) or is_model(word)
