"""Checkpoints as mappings from names to tensors that nobody has read yet."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from hashlib import sha256
from os import PathLike
from pathlib import Path
from types import TracebackType

from streamconv.errors import NotACheckpointError
from streamconv.files.address import Address, Location, parse_location
from streamconv.files.base import File
from streamconv.files.local import LocalFile
from streamconv.files.open import open_file
from streamconv.files.reader import Reader
from streamconv.formats import safetensors, torch_legacy, torch_zip
from streamconv.formats import zip_directory as zip_index
from streamconv.tensors.expressions import SourceTensor


class Checkpoint(Mapping[str, SourceTensor]):
    """The tensors of a checkpoint by name. Close it, or use it in a ``with`` statement."""

    def __init__(self, tensors: dict[str, SourceTensor], others: dict[str, str], files: list[File], fingerprint: str):
        self._tensors, self._files = tensors, files
        self.others = others  # by name, the class of what is no tensor: nothing of it was read
        self.fingerprint = fingerprint  # sha256 of the index: hexadecimal

    def __getitem__(self, name: str) -> SourceTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def paths(self) -> list[Path]:
        """Of its files on this machine."""
        return [file.path for file in self._files if isinstance(file, LocalFile)]

    @property
    def names(self) -> list[str]:
        """Of its files."""
        return [file.name for file in self._files]

    @property
    def is_remote(self) -> bool:
        return len(self.paths) < len(self._files)

    @property
    def size(self) -> int:
        """Of its files, in bytes."""
        return sum(file.size for file in self._files)

    @property
    def version(self) -> dict[str, tuple[str | int | None, ...]]:
        """Each file's version, key by key: its times in nanoseconds since 1970, or what its server calls it."""
        versions = [dict(file.ref.version) for file in self._files]
        keys = sorted({key for version in versions for key in version})
        return {key: tuple(version.get(key) for version in versions) for key in keys}

    @property
    def files(self) -> list[File]:
        """Its files, open until the checkpoint is closed."""
        return list(self._files)

    @cached_property
    def reader(self) -> Reader:
        """Reads its tensors, as long as it is open."""
        return Reader(self._files)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_checkpoint(
    place: str | PathLike[str] | Address,
    *,
    read_local_headers: bool = True,
    notify: Callable[[str], None] = lambda text: None,
) -> Checkpoint:
    """Open a .pth (of any torch's, a zip or not), a safetensors file, or a folder of sharded safetensors files.

    Only the index is read: 83 kB for ViT-g's 4.5 GB. Tensors in dicts in a .pth's dict have names with dots, as
    "teacher.backbone.cls_token". What else a .pth holds, an optimizer's settings or a configuration, is not read.

    Args:
        place: A path, or a file's address: https://, hf://, or any that fsspec has a package for.
        is_exact: False asks nothing of what stands before each of a .pth's weights, which takes a request for
            every few of them at an address: for who looks at names, dtypes and shapes only.
        notify: Told when a line breaks and is tried again.

    >>> with open_checkpoint("dinov2_vitg14_pretrain.pth") as checkpoint:  # doctest: +SKIP
    ...     checkpoint["pos_embed"].info
    TensorInfo(dtype='F32', shape=(1, 1370, 1536))

    Raises:
        UsageError: the address is of no kind that can be read.
        SourceError: one of its kinds says what is wrong with the file.
    """
    where = parse_location(place)
    with ExitStack() as opened, _no_collection():
        listed: Mapping[Location, set[str] | None] = {where: None}
        if isinstance(where, Path) and where.is_dir():
            listed = safetensors.files_of(where)
        files: list[File] = []
        tensors: dict[str, SourceTensor] = {}
        others: dict[str, str] = {}
        fingerprints: list[str] = []
        for each, names in listed.items():
            file = open_file(each, notify)
            opened.callback(file.close)
            found, unread, fingerprint = _read_index(file, read_local_headers)
            if names is not None:
                safetensors.check_weight_map(file.where, found, names)
            files.append(file)
            tensors.update(found)
            others.update(unread)
            fingerprints.append(fingerprint)
        opened.pop_all()
        return Checkpoint(tensors, others, files, sha256("".join(fingerprints).encode()).hexdigest())


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's collector, which would walk every description over and over, waits until the index is read."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _read_index(file: File, read_local_headers: bool) -> tuple[dict[str, SourceTensor], dict[str, str], str]:
    start = file.read(0, min(16, file.size))
    if start.startswith(zip_index.MAGIC):
        return torch_zip.read_index(file, read_local_headers)
    if start.startswith(torch_legacy.MAGIC):
        return torch_legacy.read_index(file, read_local_headers)
    if start[8:9] == b"{":
        tensors, fingerprint = safetensors.read_index(file)
        return tensors, {}, fingerprint
    what = "is empty" if not file.size else "is neither a checkpoint of torch.save nor a safetensors file"
    hint = " It looks like a web page: the download failed." if start.lstrip()[:1] == b"<" else ""
    raise NotACheckpointError(f"{file.where} {what}.{hint}")
