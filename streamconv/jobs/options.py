"""The options of jobs: parsed and checked here, before a source is opened."""

import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import get_args

from streamconv.errors import UsageError
from streamconv.hub.repository import Destination
from streamconv.planning.shards import parse_size
from streamconv.tensors.info import CastDtype

StrPath = str | PathLike[str]
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,4})?")


@dataclass(frozen=True)
class SourceOptions:
    """How to read a source.

    Args:
        head: A linear head's file or address, for a classifier made of two files.
        select: The prefix of the backbone's names, for a file that holds several backbones.
        num_heads: The number of attention heads, which no tensor shows; by default the family's.
        stream: Read an address straight into the output. Otherwise its file is kept in torch.hub's cache.

    Raises:
        UsageError: the number of heads is not valid.
    """

    head: StrPath | None = None
    select: str | None = None
    num_heads: int | None = None
    stream: bool = False

    def __post_init__(self) -> None:
        if self.num_heads is not None and self.num_heads < 1:
            raise UsageError(f"A model cannot have {self.num_heads} attention heads. Give a number from 1 on.")


@dataclass(frozen=True)
class ConversionOptions(SourceOptions):
    """How to read a source, as `SourceOptions`, and what to write.

    Args:
        labels: A file of the classes' names; by default ImageNet's for 1000 classes.
        max_shard_size: The largest size of one file of weights: bytes, or "500MB", "5GB".
        dtype: The dtype to cast the weights to; None leaves them as they are stored.

    Raises:
        UsageError: the shard size, the dtype or the number of heads is not valid.
    """

    labels: StrPath | None = None
    max_shard_size: int | str = "5GB"
    dtype: CastDtype | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_size(self.max_shard_size)
        if self.dtype is not None and self.dtype not in get_args(CastDtype):
            raise UsageError(f"Cannot cast to {self.dtype!r}. Choose {', '.join(get_args(CastDtype))}.")

    @property
    def max_shard_bytes(self) -> int:
        return parse_size(self.max_shard_size)


@dataclass(frozen=True)
class VerificationOptions:
    """How to verify an output.

    Args:
        device: "cpu", "cuda" or "cuda:1"; "auto" takes a GPU if there is one.
        image: A picture to run both models on, a file or an http address; by default streamconv's own.
        reference: What computes the original: "builtin", streamconv's own graph; "hub", the authors' code, which
            torch.hub downloads and runs; or a folder that holds that code.
        parity: Whether to run the models.
        report: An HTML file to write the result to.

    Raises:
        UsageError: the device's name is not valid. Whether the device exists is seen later, by torch.
    """

    device: str = "auto"
    image: StrPath | None = None
    reference: StrPath = "builtin"
    parity: bool = True
    report: Path | None = None

    def __post_init__(self) -> None:
        if not _DEVICE.fullmatch(self.device):
            raise UsageError(f"{self.device!r} is not a device to verify on. Use auto, cpu, cuda or cuda:N.")


@dataclass(frozen=True)
class PushOptions:
    """How to publish a model.

    Args:
        destination: The repository; without a name, the model's published name in the user's account.
        unverified: Push a model, too, that was not verified or failed verification. The model card says so.

    Raises:
        UsageError: the revision's name is empty.
    """

    destination: Destination = Destination()
    unverified: bool = False

    def __post_init__(self) -> None:
        if self.destination.revision == "":
            raise UsageError("The revision's name is empty. Give the name of a branch.")
