"""Opens files by their `FileRef`.

A plan names files but holds none open, so that it can be stored and sent; this is what opens them when bytes are read.
"""

from collections.abc import Iterable
from types import TracebackType

from streamconv.errors import ChangedError
from streamconv.files.base import UNVERSIONED, File, FileRef, is_same_version
from streamconv.files.open import open_file


class Reader:
    """Open files by their `FileRef`. A file that is not open yet is opened on first use, and closed by `close`.

    ``files`` are open already, and their owner closes them. ``accepts_unversioned``: a file whose server names no
    version is accepted if its size is the same; the caller finds out whether its bytes are. Use a reader in a ``with``
    statement.
    """

    def __init__(self, files: Iterable[File] = (), *, accepts_unversioned: bool = False):
        self._files = {file.ref: file for file in files}
        self._accepts_unversioned = accepts_unversioned
        self._own: list[File] = []

    def open(self, ref: FileRef) -> File:
        """Return the open file that ``ref`` identifies.

        Raises:
            ChangedError: the file at its location is not the same any more.
            SourceError: it cannot be opened.
        """
        file = self._files.get(ref)
        if file is None:
            file = open_file(ref.location, expected=ref.version)
            if not self._is_same(file.ref, ref):
                file.close()
                raise ChangedError(f"{file.where} was changed after its index was read. Plan the conversion again.")
            self._own.append(file)
            self._files[ref] = file
        return file

    def _is_same(self, one: FileRef, other: FileRef) -> bool:
        versions = dict(one.version), dict(other.version)
        is_unversioned = self._accepts_unversioned and all(UNVERSIONED in version for version in versions)
        return (one.location, one.size) == (other.location, other.size) and (
            is_unversioned or is_same_version(*versions)
        )

    def close(self) -> None:
        while self._own:
            file = self._own.pop()
            self._files.pop(file.ref, None)
            file.close()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
