"""The interface of an output into which several processes write, on one machine or many.

Each weight file has a record of its own (a journal in a folder, a small object in a store), so that each can be
written, interrupted and resumed independently. Then one process checks that all are there, and writes what makes them a
model: the small files, the manifest and the index.
"""

from dataclasses import dataclass
from typing import Protocol

from streamconv.files.address import Location
from streamconv.files.reader import Reader
from streamconv.output.manifest import Manifest, WrittenFile
from streamconv.output.planned import PlannedConversion
from streamconv.output.writer import Advance
from streamconv.planning.shards import Shard
from streamconv.tensors.checksums import RecordChecks


@dataclass(frozen=True, slots=True)
class FileState:
    """What an output holds of a weight file.

    ``size`` counts the bytes that are there. ``written`` describes the file if it is complete; otherwise it is None.
    ``part`` is the part that its process was given, such as "3/16"; empty if it was given none, or has not begun.
    """

    size: int = 0
    written: WrittenFile | None = None
    part: str = ""


class SharedOutput(Protocol):
    """An output that several processes may write. All errors are `OutputError`, except those of reading the source."""

    @property
    def location(self) -> Location: ...

    def begin(self, planned: PlannedConversion, *, force: bool = False) -> None:
        """Refuse an output that holds anything else, or cannot be written. Every process calls this first.

        Args:
            force: Delete an earlier conversion, finished or not. Only one process may do so, before the others begin.
        """

    def finished(self, planned: PlannedConversion) -> Manifest | None:
        """Return the manifest, if the output holds this very conversion, with every file; otherwise None."""

    def write(
        self,
        planned: PlannedConversion,
        shard: Shard,
        reader: Reader,
        checks: RecordChecks,
        advance: Advance,
        part: str = "",
    ) -> tuple[WrittenFile, int]:
        """Write a weight file, or the rest of it.

        Returns:
            The complete file, and how many of its bytes an interrupted process had written.
        """

    def states(self, planned: PlannedConversion) -> dict[str, FileState]:
        """Return what is there of each weight file, by name.

        A complete file has the size that is recorded and, in a store, the recorded version (ETag).
        """

    def finish(self, planned: PlannedConversion, manifest: Manifest) -> None:
        """Write the small files, the manifest, and the index last; then delete the records."""
