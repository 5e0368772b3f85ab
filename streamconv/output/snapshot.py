"""Detects whether a folder changed while it was read, even by an edit that was undone or a link that was moved."""

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from streamconv.output.readable import weights_in

State = tuple[int, ...]
"""Identifies a file and its contents: device, inode, size, mtime and ctime; empty if it does not exist."""


def state_of(path: Path) -> State:
    """Return the state of a file and, if it is a link, also of what it refers to; empty if there is none."""
    states: list[int] = []
    with suppress(OSError):
        for follows in (False, True):
            found = os.stat(path, follow_symlinks=follows)
            states += found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    return tuple(states)


@dataclass(frozen=True)
class Snapshot:
    """The states of a folder's files at one time: those with given names, and all that could be loaded as weights.

    ``states`` maps names to states, also of files that do not exist.
    """

    folder: Path
    states: Mapping[str, State]

    @classmethod
    def of(cls, folder: Path, names: Iterable[str]) -> "Snapshot":
        return cls(folder, {name: state_of(folder / name) for name in {*names, *_other_weights(folder)}})

    def changed(self) -> list[str]:
        """Return the names of the files that are not as they were."""
        names = {*self.states, *_other_weights(self.folder)}
        return sorted(name for name in names if state_of(self.folder / name) != self.states.get(name, ()))


def _other_weights(folder: Path) -> set[str]:
    """Return the names of the files that transformers would load as a model's; unfinished files are hidden."""
    return {name for name in weights_in(folder) if name[:1] != "."}
