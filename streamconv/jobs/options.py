"""The options of jobs. They are parsed and checked when they are created, before any source is opened."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike

from streamconv.arguments import check_fields, shown_value
from streamconv.errors import UsageError
from streamconv.families.image_processors import MAX_SIDE
from streamconv.hub.destination import Destination
from streamconv.planning.image_processor import parse_channel_numbers
from streamconv.planning.shards import parse_size
from streamconv.tensors.info import CastDtype, parse_cast_dtype

StrPath = str | PathLike[str]
MAX_HEADS = 65_536
# Without float64, a difference in float32 may be rounding or a wrong weight.
UNSUITABLE = {"mps": "Apple's GPUs have no float64.", "xpu": "Many of Intel's GPUs have no float64."}
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,4})?")


@dataclass(frozen=True)
class SourceOptions:
    """Options for reading a source.

    Args:
        head: The path or URL of a linear head, for a classifier in two files.
        select: The prefix of the backbone's names, for a file that holds several backbones or other tensors. A head in
            the same file is then left out.
        num_heads: The number of attention heads, which tensors do not show. By default, it comes from a config.json
            beside the source or from published models of the same size; for other sizes, it is assumed or required.
        stream: Read a remote file directly. Otherwise it is first downloaded into torch.hub's cache.
        head_select: The prefix of the head's two tensors in the file of ``head`` or, without it, in the source itself.

    Raises:
        UsageError: the number of heads or a prefix is not valid.
    """

    head: StrPath | None = None
    select: str | None = None
    num_heads: int | None = None
    stream: bool = False
    head_select: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, SourceOptions)
        if self.num_heads is not None and not 0 < self.num_heads <= MAX_HEADS:
            heads = shown_value(self.num_heads)
            raise UsageError(f"A model cannot have {heads} attention heads. Give a number from 1 to {MAX_HEADS:,}.")


@dataclass(frozen=True)
class ConversionOptions(SourceOptions):
    """Options for a conversion, in addition to those for reading its source.

    Args:
        labels: A file with the names of the classes; by default, ImageNet's names if there are 1000 classes.
        max_shard_size: The maximum size of one weight file: a number of bytes, or a string like "500MB", "5GB" or
            "500MiB". KB, MB, GB and TB are powers of 1000; KiB, MiB, GiB and TiB are powers of 1024.
        dtype: The dtype to cast the weights to; None leaves them as they are stored. Other tools' names are accepted,
            too ("bf16", "fp16", "half", "torch.bfloat16"), and become torch's.
        force: Replace the conversion that the output folder holds, finished or not. Only files that its manifest or
            journal lists are deleted, after the plan is made. The same conversion is resumed if it is unfinished.
        image_mean: The mean that the image processor subtracts from each channel, whose values are from 0 to 1: one
            number per channel, or one for all; also as text, such as "0.5,0.5,0.5". By default, the source's own or,
            if it has none, that of published models; so are the next ones. It becomes a tuple.
        image_std: The standard deviation that it divides each channel by, likewise.
        image_size: The height and width of its pixels: the shorter side of an image is resized to it, and the centre is
            cut out. An image processor that does not crop resizes both sides to it.
        image_processor: A preprocessor_config.json to write instead; excludes the other three.
        allow_repeats: Write an output that is much larger than the data it is made from, because tensors repeat data.
            Otherwise, `RepeatedDataError` is raised if it is more than 100 MB larger than twice that data.
        server_side_copy: If source and output are in the same S3, let it copy large tensors itself, and check its
            CRC-32s of them. The manifest then has a CRC-32 of such a file instead of a sha256.

    Raises:
        UsageError: the shard size, the dtype, the number of heads or a number for the image processor is not valid.
    """

    labels: StrPath | None = None
    max_shard_size: int | str = "5GB"
    dtype: CastDtype | None = None
    force: bool = False
    image_mean: str | float | Sequence[float] | None = None
    image_std: str | float | Sequence[float] | None = None
    image_size: int | None = None
    image_processor: StrPath | None = None
    allow_repeats: bool = False
    server_side_copy: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_size(self.max_shard_size)
        for name in ("image_mean", "image_std"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, parse_channel_numbers(name, getattr(self, name)))
        if self.dtype is not None:
            object.__setattr__(self, "dtype", parse_cast_dtype(self.dtype))
        check_fields(self, ConversionOptions)
        if self.image_size is not None and not 0 < self.image_size <= MAX_SIDE:
            size = shown_value(self.image_size)
            raise UsageError(f"{size} is not an image size. Give the height and width in pixels, up to {MAX_SIDE:,}.")
        if self.image_processor is not None and (self.image_mean, self.image_std, self.image_size) != (None,) * 3:
            raise UsageError(
                "--image-processor gives the whole image processor. Omit --image-mean, --image-std and --image-size."
            )

    @property
    def max_shard_bytes(self) -> int:
        return parse_size(self.max_shard_size)


@dataclass(frozen=True)
class VerificationOptions:
    """Options for verifying an output.

    Args:
        device: "cpu", "cuda" or "cuda:1"; "auto" uses a GPU if one works.
        image: The path or http(s) URL of an image to run both models on; by default, streamconv draws one.
        reference: The code of the original model: "builtin" for streamconv's own; "hub" for the authors', which
            torch.hub downloads and runs; or a folder that holds the authors' code.
        parity: Run both models and compare their outputs.
        report: An HTML file to write the result to.
        thorough: Also run both models at the original's native size.
        command: The command line to name in the result; empty if there is none.

    Raises:
        UsageError: the device's name is not valid. Torch checks later if the device exists.
    """

    device: str = "auto"
    image: StrPath | None = None
    reference: StrPath = "builtin"
    parity: bool = True
    report: StrPath | None = None
    thorough: bool = False
    command: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        check_fields(self, VerificationOptions)
        if not _DEVICE.fullmatch(self.device):
            kind = self.device.partition(":")[0]
            why = f" {UNSUITABLE[kind]}" if kind in UNSUITABLE else ""
            raise UsageError(f"{self.device!r} is not a device to verify on.{why} Use auto, cpu, cuda or cuda:N.")


@dataclass(frozen=True)
class PushOptions:
    """Options for publishing a model.

    Args:
        destination: The repository, in the user's account unless it names another owner; see `Destination` for its
            default name.
        unverified: Push even if the model was not verified or failed verification. The model card then says so.
        license: The licence that the model card names, by its name on the Hub, such as "cc-by-4.0". By default, the
            authors' licence if the weights are the published ones, and none otherwise.
        tags: Tags that the model card gets in addition to streamconv's own.

    ``license`` and ``tags`` do not change a card that somebody else wrote; such a combination is refused.

    Raises:
        UsageError: the destination is not a `Destination`, the revision's name is empty, or the licence or a tag is
            not valid.
    """

    destination: Destination = Destination()
    unverified: bool = False
    license: str | None = None
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "tags", _parse_tags(self.tags))
        if self.license is not None:
            object.__setattr__(self, "license", _parse_license(self.license))
        if not isinstance(self.destination, Destination):
            given = shown_value(self.destination)
            raise UsageError(f"{given} is not a Destination. Give Destination(repo={given}).")
        check_fields(self, PushOptions)
        if self.destination.revision == "":
            raise UsageError("The revision's name is empty. Give the name of a branch.")


def _parse_license(name: str) -> str:
    """Return a licence's name as the Hub spells it."""
    spelled = name.strip().lower() if isinstance(name, str) else ""
    if not spelled or not spelled.isprintable():
        raise UsageError(
            f"{shown_value(name)} is not a licence. Give its name on the Hub, such as apache-2.0 or cc-by-4.0."
        )
    if spelled == "other":
        raise UsageError(
            'The licence "other" needs a name and a link. Write a README.md of your own into the folder, with '
            "license, license_name and license_link."
        )
    return spelled


def _parse_tags(tags: object) -> tuple[str, ...]:
    """Return the tags without repetitions."""
    given = tuple(tags) if isinstance(tags, (tuple, list)) else (tags,)
    wrong = [tag for tag in given if not isinstance(tag, str) or not tag.strip() or not tag.isprintable()]
    if wrong or isinstance(tags, str):
        raise UsageError(f"{shown_value(wrong[0] if wrong else tags)} is not a list of tags. Give a tuple of words.")
    return tuple(dict.fromkeys(tag.strip() for tag in given))
