"""Opens the files that plans name."""

from collections.abc import Callable, Iterable
from types import TracebackType

from streamconv.errors import ChangedError
from streamconv.files.base import File, FileRef
from streamconv.files.open import open_file


class Reader:
    """The open files behind `FileRef`\\ s. What is not open yet is opened when it is first asked for.

    ``files`` are open already and stay their owner's to close. Use it in a ``with`` statement.
    """

    def __init__(self, files: Iterable[File] = (), notify: Callable[[str], None] = lambda text: None):
        self._files = {file.ref: file for file in files}
        self._own: list[File] = []
        self._notify = notify

    def open(self, ref: FileRef) -> File:
        """Return the file that ``ref`` names.

        Raises:
            ChangedError: another file is at its location by now.
            SourceError: it cannot be opened.
        """
        file = self._files.get(ref)
        if file is None:
            file = open_file(ref.location, self._notify)
            if file.ref != ref:
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
