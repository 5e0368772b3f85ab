"""A checkpoint as a mapping from names to tensors that are not read yet.

The first bytes of a file tell its format; the module of that format then reads the index.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import cached_property
from hashlib import sha256
from os import PathLike
from pathlib import Path
from types import TracebackType

from streamconv.arguments import checked
from streamconv.display import printable
from streamconv.errors import CorruptError, NotACheckpointError, SourceMissingError, TruncatedError, located
from streamconv.files.address import Address, Location, parse_location
from streamconv.files.base import File
from streamconv.files.local import LocalFile
from streamconv.files.open import open_file
from streamconv.files.reader import Reader
from streamconv.files.remote import RemoteFile
from streamconv.formats import safetensors, torch_legacy, torch_zip, zip_directory
from streamconv.formats.folder import find_weights, standard_weights
from streamconv.formats.foreign.zips import is_distributed, is_npz
from streamconv.formats.non_tensors import NonTensor
from streamconv.formats.shards import WeightFiles, check_weight_map, is_index, read_weights_index
from streamconv.tensors.expressions import Read


class Checkpoint(Mapping[str, Read]):
    """The tensors of a checkpoint by name. Close it, or use it in a ``with`` statement.

    ``non_tensors`` maps the names of other values to what they are; the values themselves are not read.
    ``fingerprint`` is the sha256 of the index, in hexadecimal. ``note`` names the files of a folder that were chosen,
    if transformers looks for other names.
    """

    def __init__(
        self,
        tensors: dict[str, Read],
        non_tensors: dict[str, NonTensor],
        files: list[File],
        fingerprint: str,
        note: str = "",
    ):
        self._tensors, self._files = tensors, files
        self.non_tensors = non_tensors
        self.fingerprint = fingerprint
        self.note = note

    def __getitem__(self, name: str) -> Read:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def paths(self) -> list[Path]:
        """Paths of the files that are on this machine, without those at URLs."""
        return [file.path for file in self._files if isinstance(file, LocalFile)]

    @property
    def folder(self) -> Path | None:
        """The folder of the files, where their config.json is; None if they are at a URL."""
        return self.paths[0].parent if self.paths else None

    @property
    def names(self) -> list[str]:
        """Names of the files."""
        return [file.name for file in self._files]

    @property
    def is_remote(self) -> bool:
        return len(self.paths) < len(self._files)

    @property
    def size(self) -> int:
        """Total size of the files in bytes."""
        return sum(file.size for file in self._files)

    @property
    def version(self) -> dict[str, tuple[str | int | None, ...]]:
        """Versions of the files, a tuple per key; see `streamconv.files.base.Version`."""
        versions = [dict(file.ref.version) for file in self._files]
        keys = sorted({key for version in versions for key in version})
        return {key: tuple(version.get(key) for version in versions) for key in keys}

    @property
    def files(self) -> list[File]:
        """The files, open until the checkpoint is closed."""
        return list(self._files)

    @cached_property
    def reader(self) -> Reader:
        """A reader for the tensors. It can be used until the checkpoint is closed."""
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


@checked
def open_checkpoint(
    place: str | PathLike[str] | Address,
    *,
    read_local_headers: bool = True,
    origin: Address | None = None,
) -> Checkpoint:
    """Open a .pth of any torch release, a safetensors file, an .npz of numpy.savez, or a folder with such files.

    Only the index is read: 83 kB of ViT-g's 4.5 GB. Tensors in nested dicts of a .pth get dotted names, such as
    "teacher.backbone.cls_token". Anything else in a .pth, such as optimizer settings or a configuration, is not read.

    Of a folder, the files are opened that transformers would load, or else the only weights that are there.

    Args:
        place: The path or URL of a file: https://, hf://, or a scheme that fsspec has a package for. Or the path of a
            folder, or of an index that lists the files of a checkpoint.
        read_local_headers: False skips the header before each weight of a .pth. At a URL, reading these headers takes a
            request for every few weights. Names, dtypes and shapes do not need them; the offsets of weights are then
            computed.
        origin: The address that a local file was downloaded from. Messages name it instead of the path.

    >>> with open_checkpoint("dinov2_vitg14_pretrain.pth") as checkpoint:  # doctest: +SKIP
    ...     checkpoint["pos_embed"].info
    TensorInfo(dtype='F32', shape=(1, 1370, 1536))

    Raises:
        UsageError: streamconv cannot read URLs of this kind.
        SourceError: a file cannot be read, is damaged, or is not a checkpoint; there is a subclass for each case.
    """
    location = parse_location(place)
    if isinstance(location, Path) and os.path.isdir(location):
        return _open_files(find_weights(location), read_local_headers)
    if isinstance(location, Path) and is_index(location.name):
        return _open_files(read_weights_index(location), read_local_headers)
    return _open_files(WeightFiles({location: None}), read_local_headers, origin)


def open_output(folder: Location) -> Checkpoint:
    """Open the safetensors files of a folder that was converted, and no files of other formats or names.

    Its ``files`` are closed if they are in a store, where each takes memory and threads while it is open: a `Reader`
    opens them again.

    Raises:
        SourceError: as for `open_checkpoint`.
    """
    weights = standard_weights(folder, (safetensors.SINGLE_NAME, safetensors.INDEX_NAME))
    if weights is None:
        raise SourceMissingError(f"{folder} holds neither {safetensors.SINGLE_NAME} nor {safetensors.INDEX_NAME}.")
    return _open_files(weights, keeps_remote_open=False)


def _open_files(
    weights: WeightFiles,
    read_local_headers: bool = True,
    origin: Address | None = None,
    *,
    keeps_remote_open: bool = True,
) -> Checkpoint:
    with ExitStack() as opened:
        files: list[File] = []
        tensors: dict[str, Read] = {}
        non_tensors: dict[str, NonTensor] = {}
        fingerprints: list[str] = []
        for each, names in weights.names_by_location.items():
            with located(each):
                file = open_file(each, origin)
                opened.callback(file.close)
                if isinstance(file, RemoteFile):
                    file.proved_by = "records"  # an index with CRC-32s that was mixed matches no record
                found, other, fingerprint = _read_index(file, read_local_headers)
                if isinstance(file, RemoteFile):
                    file.proved_by = "version"
                    if any(tensor.record.crc32 is None for tensor in found.values()):
                        file.require_one_version()
                    if not keeps_remote_open:
                        file.close()
                if names is not None:
                    check_weight_map(file.where, weights.index, found, names)
                elif twice := tensors.keys() & found.keys():
                    name = min(twice)
                    raise CorruptError(
                        f"{tensors[name].record.file.location} and {file.where} both have '{printable(name)}'. Remove "
                        "the file that does not belong to this model."
                    )
            files.append(file)
            tensors.update(found)
            non_tensors.update(other)
            fingerprints.append(fingerprint)
        opened.pop_all()
        fingerprint = sha256("".join(fingerprints).encode()).hexdigest()
        return Checkpoint(tensors, non_tensors, files, fingerprint, weights.note)


def _read_index(file: File, read_local_headers: bool) -> tuple[dict[str, Read], dict[str, NonTensor], str]:
    """Return the tensors, other objects, both by name, and the fingerprint of one file."""
    start = file.read(0, min(torch_legacy.HEAD_BYTES, file.size))
    if start.startswith(zip_directory.MAGIC) and not is_distributed(file.name):
        try:
            records = zip_directory.read_records(file, read_local_headers)
        except TruncatedError as error:
            from streamconv.formats.cut_short import least_size  # which only this error needs

            if file.size >= (least := least_size(file)):
                raise
            raise TruncatedError(
                f"{file.where} has {file.size:,} of at least {least:,} bytes: the save, copy or download was cut "
                "short. Fetch it again."
            ) from error
        if not is_npz(records):
            return torch_zip.read_index(file, records)
        from streamconv.formats import npz  # only now, as other formats do not need it

        return npz.read_index(file, records)
    if torch_legacy.is_legacy(start):
        return torch_legacy.read_index(file, read_local_headers)
    if safetensors.is_header(start):
        tensors, fingerprint = safetensors.read_index(file)
        return tensors, {}, fingerprint
    from streamconv.formats.foreign.files import describe  # with tables that only this error needs

    raise NotACheckpointError(f"{file.where} {describe(file)}")
