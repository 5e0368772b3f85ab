"""Detects whether a folder changed while it was read, even by an edit that was undone or a link that was moved."""

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from streamconv.files.address import Location
from streamconv.output.readable import states_in_store, weights_in

State = tuple[int | str, ...]
"""Identifies a file and its contents: device, inode, size, mtime and ctime; empty if it does not exist.

In a store, its size and version.
"""


def state_of(path: Path) -> State:
    """Return the state of a file and, if it is a link, also of what it refers to; empty if there is none."""
    states: list[int | str] = []
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

    folder: Location
    states: Mapping[str, State]

    @classmethod
    def of(cls, folder: Location, names: Iterable[str]) -> "Snapshot":
        return cls(folder, _states(folder, names))

    def changed(self) -> list[str]:
        """Return the names of the files that are not as they were."""
        now = _states(self.folder, self.states)
        return sorted(name for name, state in now.items() if state != self.states.get(name, ()))


def _states(folder: Location, names: Iterable[str]) -> dict[str, State]:
    """Return the states of these files, and of those that transformers would load as a model's."""
    if isinstance(folder, Path):
        others = (name for name in weights_in(folder) if name[:1] != ".")  # unfinished files are hidden
        return {name: state_of(folder / name) for name in {*names, *others}}
    states: dict[str, State] = {**states_in_store(folder)}
    return {name: states.get(name, ()) for name in {*names, *states}}
