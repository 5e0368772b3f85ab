"""Opens files by their `FileRef`.

A plan names files but holds none open, so that it can be stored and sent; this is what opens them when bytes are read.
"""

from collections.abc import Iterable
from types import TracebackType

from streamconv.errors import ChangedError
from streamconv.files.base import File, FileRef, is_same_version
from streamconv.files.open import open_file


class Reader:
    """Open files by their `FileRef`. A file that is not open yet is opened on first use, and closed by `close`.

    ``files`` are open already, and their owner closes them. Use a reader in a ``with`` statement.
    """

    def __init__(self, files: Iterable[File] = ()):
        self._files = {file.ref: file for file in files}
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
            is_same = is_same_version(dict(file.ref.version), dict(ref.version))
            if (file.ref.location, file.size, is_same) != (ref.location, ref.size, True):
                file.close()
                raise ChangedError(f"{file.where} was changed after its index was read. Plan the conversion again.")
            self._own.append(file)
            self._files[ref] = file
        return file

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
