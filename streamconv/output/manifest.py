"""``streamconv.json``, the manifest of a finished folder: its source, and each file's size and sha256."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from streamconv.display import printable
from streamconv.errors import OutputError, SourceError, SourceMissingError
from streamconv.files.address import Location
from streamconv.files.folders import file_in, read_small
from streamconv.formats.limits import TooLargeError, parse_small_json
from streamconv.formats.typed_json import parse
from streamconv.output.readable import reading_output
from streamconv.planning.plan import CONFIG_NAME, IMAGE_PROCESSOR_NAME

MANIFEST_NAME = "streamconv.json"
FORMAT_VERSION = 1  # of manifests and journals; those of 0.1.0 had none
OUR_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
CHANGE_TIME = "changed_ns"


@dataclass(frozen=True)
class SourceFile:
    """A checkpoint that was read.

    ``fingerprint`` is the sha256 of its index. It stands for the weights only if they carry CRC-32s; otherwise
    ``version`` distinguishes the checkpoint's files from others with the same names and shapes: each file's times in
    nanoseconds since 1970, or its server's name for this version. ``address`` is the URL that it was read or downloaded
    from, without secrets. ``sha256`` is that of the whole file, empty if it was not computed. ``published``: it is the
    authors' own file, read from their URL or recognised by its sha256. ``found_in_cache``: it was in torch.hub's cache
    under the name of a published file, but streamconv did not download it, so it may be another file.
    """

    file: str
    size: int
    fingerprint: str
    address: str | None = None
    synthetic: bool = False
    published: bool = False
    found_in_cache: bool = False
    sha256: str = ""
    version: Mapping[str, tuple[str | int | None, ...]] = field(default_factory=dict)

    def is_same(self, other: "SourceFile") -> bool:
        """Return whether both are the same file, as far as they record it.

        The time at which its owner, mode or name last changed is compared only if both record it: a finished folder
        does not, since only resuming must be as careful.
        """
        keys = self.version.keys() | other.version.keys()
        if not {CHANGE_TIME} <= self.version.keys() & other.version.keys():
            keys -= {CHANGE_TIME}
        return self.fingerprint == other.fingerprint and all(self.version.get(k) == other.version.get(k) for k in keys)


@dataclass(frozen=True)
class Labels:
    """A classifier's labels: their origin, whether they are the default ones, and the sha256 of the list."""

    origin: str | None
    is_default: bool
    sha256: str


@dataclass(frozen=True)
class GivenImageProcessor:
    """The image processor that the user gave: the options or the file that it came from, and its config as written."""

    origin: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class WrittenFile:
    """A complete file. ``overflow_count`` counts the values that were finite in the source and are infinite in it.

    If a store copied some of its bytes, which therefore were not hashed here, ``sha256`` is empty, and ``crc32`` is the
    CRC-32 of the whole file as 8 hexadecimal digits.
    """

    size: int
    sha256: str
    overflow_count: int = 0
    crc32: str = ""


def is_our_name(name: str) -> bool:
    """Return whether streamconv gives this name to a file of an output.

    A manifest or a journal from elsewhere may name other files. --force must not delete them, nor a push publish them.
    """
    return name in (CONFIG_NAME, IMAGE_PROCESSOR_NAME) or bool(OUR_WEIGHTS.fullmatch(name))


def is_weights(name: str) -> bool:
    """Return whether a file of an output holds weights; all others are small."""
    return name.endswith(".safetensors")


def in_order(files: Mapping[str, WrittenFile]) -> dict[str, WrittenFile]:
    """Return the weight files, then the others, each with numbers in names in the order of numbers."""

    def key(name: str) -> tuple[bool, list[tuple[str, int]]]:
        parts = re.findall(r"(\D*)(\d*)", name)
        return not is_weights(name), [(text, int(number or 0)) for text, number in parts]

    return {name: files[name] for name in sorted(files, key=key)}


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The sources of an output by role, and the decisions that were made before anything is written.

    ``model`` is the published model that the user or the file's name refers to, ``shaped_like`` one that only has the
    same shapes. ``select``, ``head_select`` and ``num_heads`` are the user's. ``guessed_heads`` is the number of
    attention heads if it was guessed. ``plan`` is the plan's fingerprint, and the others are what the plan says under
    the same names.
    """

    source: Mapping[str, SourceFile]
    plan: str
    model: str | None = None
    shaped_like: str | None = None
    select: str | None = None
    head_select: str | None = None
    num_heads: int | None = None
    guessed_heads: int | None = None
    filled: Mapping[str, float] = field(default_factory=dict)
    block_chunks: int = 0
    notes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    labels: Labels | None = None
    image_processor: GivenImageProcessor | None = None

    @property
    def title(self) -> str:
        """A name for the checkpoint in messages."""
        return self.model or (f"a model shaped like {self.shaped_like}" if self.shaped_like else "an unnamed model")

    def is_from(self, source: Mapping[str, SourceFile]) -> bool:
        """Return whether these are the files that it is made from, by their fingerprints."""
        return {role: file.fingerprint for role, file in self.source.items()} == {
            role: file.fingerprint for role, file in source.items()
        }


@dataclass(frozen=True, kw_only=True)
class Manifest(Provenance):
    """The record of a finished folder. ``files`` are all of its files except the manifest.

    ``is_crc_checked`` records whether every byte was compared with a CRC-32 of the source. ``cast`` are torch's names
    of the dtypes that tensors were cast "from" and "to". ``verification`` is a `Verification` as JSON, to be shown.
    ``edited`` are small files that the user had changed when the folder was verified, as they were then.
    """

    architecture: str
    files: Mapping[str, WrittenFile]
    is_crc_checked: bool
    cast: Mapping[str, str] | None
    versions: Mapping[str, str]
    verification: Mapping[str, Any] | None = None
    edited: Mapping[str, WrittenFile] = field(default_factory=dict)

    @property
    def current_files(self) -> dict[str, WrittenFile]:
        """The files as they were written or, if they were edited before the last verification, as it found them."""
        return {**self.files, **self.edited}

    @classmethod
    def of(
        cls,
        provenance: Provenance,
        architecture: str,
        files: Mapping[str, WrittenFile],
        is_crc_checked: bool,
        cast: Mapping[str, str] | None,
        versions: Mapping[str, str],
    ) -> "Manifest":
        """Make the manifest of an output that is complete."""
        source = {
            role: replace(file, version={k: value for k, value in file.version.items() if k != CHANGE_TIME})
            for role, file in provenance.source.items()
        }
        return cls(
            **{**vars(provenance), "source": source},
            architecture=architecture,
            files=files,
            is_crc_checked=is_crc_checked,
            cast=cast,
            versions=versions,
        )

    @classmethod
    def read(cls, folder: Location) -> "Manifest | None":
        """Read a folder's manifest; None if it has none.

        Raises:
            OutputError: it cannot be read, is damaged, or was written by another version of streamconv.
        """
        path = file_in(folder, MANIFEST_NAME)
        try:
            if isinstance(path, Path):
                return cls.parse(read_small(path), path)
            with reading_output():
                return cls.parse(read_small(path), path)
        except SourceMissingError:
            return None
        except SourceError as error:
            raise _unreadable(path, error) from error

    @classmethod
    def parse(cls, data: bytes, path: Location) -> "Manifest":
        """Parse the contents of the manifest at ``path``; errors as for `read`."""
        try:
            return _parsed(data, path)
        except TooLargeError as error:
            raise _unreadable(path, f"it {error} than any manifest") from None
        except ValueError as error:
            raise _unreadable(path, error) from error

    @classmethod
    def from_json(cls, value: object, path: Location) -> "Manifest":
        """Check and convert parsed JSON; ``path`` and errors as for `read`."""
        if isinstance(value, dict) and value.get("format_version") != FORMAT_VERSION:
            raise OutputError(f"{path} was written by another version of streamconv: convert again, to another folder.")
        try:
            manifest: Manifest = parse(cls, value)
            if not manifest.files:
                raise ValueError("its field files is empty")
            for name in manifest.files:
                if not is_our_name(name):
                    raise ValueError(f"its field files names '{printable(name)}', which streamconv does not write")
            for name in manifest.edited:
                if name not in manifest.files or is_weights(name):
                    raise ValueError(f"its field edited names '{printable(name)}', which is not one of its small files")
        except ValueError as error:
            raise OutputError(f"{path} is damaged: {error}. Move it away, or write to another folder.") from error
        return manifest

    def to_bytes(self) -> bytes:
        """Return the contents of its file."""
        return (json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=2) + "\n").encode()


@lru_cache(maxsize=1)  # a job reads the same manifest more than ten times, which may list thousands of files
def _parsed(data: bytes, path: Location) -> Manifest:
    return Manifest.from_json(parse_small_json(data), path)


def _unreadable(path: Location, error: object) -> OutputError:
    return OutputError(f"{path} cannot be read ({error}). Move it away, or write to another folder.")
