"""What a user's SOURCE means: a model's name, whose files torch.hub keeps, or a checkpoint file."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from streamconv.checkpoint import Checkpoint, open_checkpoint
from streamconv.errors import MappingError, SourceMissingError, UsageError
from streamconv.families import HEAD_PREFIX, Model, RemoteFile, find_model
from streamconv.tensors import SourceTensor


@dataclass(frozen=True)
class Source:
    """A backbone's file, perhaps a head's, and the model that they are said to be."""

    backbone: Path
    head: Path | None = None
    model: Model | None = None


def hub_folder() -> Path:
    """Where torch.hub keeps checkpoints (https://docs.pytorch.org/docs/stable/hub.html), torch unimported."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("TORCH_HOME") or f"{cache}/torch"
    return Path(home).expanduser() / "hub" / "checkpoints"


def locate(source: str | os.PathLike[str], head: str | os.PathLike[str] | None = None) -> Source:
    """Find the files that ``source`` means. A model's name wins over a file of that name.

    Raises:
        SourceMissingError: the file is not there; for a model, says where it is had.
        UsageError: ``source`` is neither a file nor a known model, or has a head that it needs not.
    """
    name = os.fspath(source)
    given_head = None if head is None else Path(head)
    if not name:
        raise UsageError("SOURCE is empty. Give a model's name or a checkpoint file.")
    if given_head is not None and not os.path.exists(given_head):
        raise SourceMissingError(f"{given_head}: there is no such file.")
    try:
        _, model = find_model(name)
    except UsageError:
        path = Path(name)
        if not os.path.exists(path):
            if isinstance(source, str) and len(path.parts) == 1 and not path.suffix:
                raise
            raise SourceMissingError(f"{path}: there is no such file.") from None
        return Source(path, given_head)
    if given_head is not None and model.head is None:
        raise UsageError(f"{name} has no head. The model with a linear head is {name}_1layer.")
    backbone = _kept(model.backbone, name)
    if model.head is not None and given_head is None:
        given_head = _kept(model.head, name)
    return Source(backbone, given_head, model)


def _kept(file: RemoteFile, name: str) -> Path:
    path = hub_folder() / file.filename
    if not os.path.exists(path):
        raise SourceMissingError(
            f"{name} needs {file.filename}, which torch.hub has not downloaded yet. "
            f"Fetch it from\n  {file.url}\nand put it at\n  {path}"
        )
    return path


def _is_checkable(tensors: Mapping[str, SourceTensor]) -> bool:
    return all(tensor.record.crc32 is not None for tensor in tensors.values())


@dataclass(frozen=True)
class OpenSource:
    """A source's tensors, a head's under `HEAD_PREFIX`, and the checkpoints they come from by role."""

    source: Source
    tensors: Mapping[str, SourceTensor]
    checkpoints: Mapping[str, Checkpoint]

    @property
    def where(self) -> str:
        return " with ".join(str(path) for path in (self.source.backbone, self.source.head) if path)

    @property
    def is_checkable(self) -> bool:
        """Whether every tensor has a CRC-32 in its file."""
        return _is_checkable(self.tensors)

    def describe(self) -> dict[str, dict[str, object]]:
        """For the manifest: file names, sizes in bytes, and fingerprints (see `torch_zip.read_index`).

        A fingerprint stands for the weights only where they carry CRC-32s. Elsewhere the files' times
        go with it, so that another file of the same names and shapes is noticed.
        """
        return {
            role: {
                "file": checkpoint.paths[0].name if len(checkpoint.paths) == 1 else self.source.backbone.name,
                "size": checkpoint.size,
                "fingerprint": checkpoint.fingerprint,
                **({} if _is_checkable(checkpoint) else checkpoint.times),
            }
            for role, checkpoint in self.checkpoints.items()
        }


@contextmanager
def opened(source: Source) -> Iterator[OpenSource]:
    """The source's indexes, read; errors as `open_checkpoint`'s."""
    with ExitStack() as stack:
        checkpoints = {"backbone": stack.enter_context(open_checkpoint(source.backbone))}
        tensors = dict(checkpoints["backbone"])
        heads = [f"unexpected: {key}" for key in tensors if key.startswith(HEAD_PREFIX)]
        if heads:
            raise MappingError(f"{source.backbone} is no backbone alone. Save the head's weight and bias apart:", heads)
        if source.head is not None:
            head = checkpoints["head"] = stack.enter_context(open_checkpoint(source.head))
            if head.keys() != {"weight", "bias"}:
                raise MappingError(
                    f"{source.head} is no linear head, which holds weight and bias. It holds:",
                    [f"{key} {list(tensor.info.shape)}" for key, tensor in head.items()],
                )
            tensors |= {HEAD_PREFIX + key: tensor for key, tensor in head.items()}
        yield OpenSource(source, tensors, checkpoints)
