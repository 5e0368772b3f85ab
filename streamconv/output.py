"""Files that are whole or absent, in a folder that belongs to one conversion.

A file is written under a temporary name, synced, renamed, and its folder synced. A folder's
``streamconv.json`` says whose conversion it holds, so that nothing is overwritten by mistake.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from streamconv.errors import OutputError

MANIFEST_NAME = "streamconv.json"


class OutputFile:
    """A file of known size that is being written, at offsets."""

    def __init__(self, fd: int, path: Path):
        self._fd, self._path = fd, path

    def allocate(self, size: int) -> None:
        """Reserve the disk's blocks, so that a full disk is noticed now and writing is fast."""
        with _explained(self._path):
            if hasattr(os, "posix_fallocate") and size:
                os.posix_fallocate(self._fd, 0, size)
            else:
                os.ftruncate(self._fd, size)

    def write_at(self, offset: int, data: memoryview) -> None:
        with _explained(self._path):
            while data:
                count = os.pwrite(self._fd, data, offset)
                data, offset = data[count:], offset + count

    @contextmanager
    def stream(self) -> Iterator[BinaryIO]:
        """The file as a Python file object, for those who write one after another."""
        with _explained(self._path), os.fdopen(os.dup(self._fd), "r+b") as stream:
            yield stream

    def sync(self, offset: int, length: int) -> None:
        """Bring everything written so far to the disk, and let go of this range's cached pages.

        Syncing on the way keeps the disk busy; letting go keeps a small machine's cache for others
        and writes the next range into the same, warm pages.
        """
        with _explained(self._path):
            getattr(os, "fdatasync", os.fsync)(self._fd)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_DONTNEED)


def temporary_path(path: Path) -> Path:
    """Where ``path`` is written before it is whole: a hidden name that no one else gives."""
    return path.with_name(f".{path.name}.streamconv-incomplete")


def _open_alone(path: Path, temporary: Path) -> int:
    """The temporary file, empty and locked. The system lets go of a dead process's lock by itself."""
    with _explained(path):
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.exists(temporary) or os.stat(temporary).st_ino != os.fstat(fd).st_ino:
            raise BlockingIOError  # its writer finished between our opening and our locking
        os.ftruncate(fd, 0)
    except BlockingIOError:
        os.close(fd)
        raise OutputError(f"{path} is being written by another process. Let it finish, or end it.") from None
    except OSError as error:
        os.close(fd)
        raise OutputError(f"{temporary} cannot be locked: {error.strerror}. Choose another disk.") from error
    return fd


@contextmanager
def whole_file(path: Path) -> Iterator[OutputFile]:
    """A new file that gets its name when the block ends well, and vanishes when it does not.

    Its mode is the umask's choice, as for any file that a user makes.

    Raises:
        OutputError: the disk is full, or does not let us write.
    """
    temporary = temporary_path(path)
    fd = _open_alone(path, temporary)
    try:
        yield OutputFile(fd, path)
        with _explained(path):
            os.fsync(fd)
            os.replace(temporary, path)
            sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def write_file(path: Path, data: bytes) -> None:
    """A small file, whole or absent; errors as `whole_file`'s."""
    with whole_file(path) as file:
        file.write_at(0, memoryview(data))


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` last; where a folder cannot be opened (Windows), they last anyway."""
    if hasattr(os, "O_DIRECTORY"):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        mend = "Make room and run the same command again." if full else "Choose another place for the output."
        raise OutputError(f"{path} cannot be written: {error.strerror}. {mend}") from error


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What streamconv.json says, or None where there is none.

    Raises:
        OutputError: there is one that cannot be read.
    """
    path = folder / MANIFEST_NAME
    if not os.path.exists(path):
        return None
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OutputError(f"{path} cannot be read ({error}). Move it away, or write to another folder.") from error
    if not isinstance(manifest, dict):
        raise OutputError(f"{path} is not streamconv's. Move it away, or write to another folder.")
    return manifest


def is_finished(folder: Path, manifest: Mapping[str, Any], names: list[str]) -> bool:
    """Whether a conversion ended here and its files are still there, shards at their full size."""
    try:
        return (
            manifest["complete"] is True
            and all((folder / name).is_file() for name in names)
            and all((folder / name).stat().st_size == shard["size"] for name, shard in manifest["shards"].items())
        )
    except (KeyError, TypeError, AttributeError):  # not as we write it
        return False


def claim(folder: Path, manifest: Mapping[str, Any], names: list[str], size: int) -> dict[str, Any] | None:
    """Make sure that ``folder`` can take this conversion's files, before any is written.

    ``manifest`` is what this conversion will say of its source and plan. Returns the manifest of the
    same conversion where one is finished here; otherwise the folder exists and has an unfinished one.

    Raises:
        OutputError: the folder holds something else, cannot be written, or its disk is too full.
    """
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise OutputError(f"{folder} is a file. Name a folder for the output.")
    existing = read_manifest(folder)
    present = [folder / name for name in names if os.path.exists(folder / name)]
    leftovers = [temporary_path(folder / name) for name in names if os.path.exists(temporary_path(folder / name))]
    if existing is None:
        if present:
            raise OutputError(
                f"{folder} already holds {', '.join(path.name for path in present)}, which streamconv did not write. "
                "Choose another folder."
            )
    elif (other := _differences(existing, manifest)) and (present or existing.get("complete")):
        raise OutputError(
            f"{folder} holds another conversion, of {existing.get('model') or 'an unnamed model'}: its "
            f"{' and '.join(other)} is another. Choose another folder, or delete this one."
        )
    elif is_finished(folder, existing, names):
        return existing
    require_space(folder, size - sum(path.stat().st_size for path in (*present, *leftovers)))
    is_new = not os.path.exists(folder)
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        write_manifest(folder, {**manifest, "complete": False})
    except OutputError:
        if is_new:
            folder.rmdir()
        raise
    return None


def is_of(manifest: Mapping[str, Any], source: Mapping[str, Any]) -> bool:
    """Whether a manifest says that its output was made from these files."""
    said = manifest.get("source")
    try:
        return said is not None and {r: s["fingerprint"] for r, s in said.items()} == {
            role: file["fingerprint"] for role, file in source.items()
        }
    except (KeyError, TypeError, AttributeError):
        return False


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Which of the files and decisions that make up a conversion are not the same in two manifests."""

    def parts(manifest: Mapping[str, Any]) -> dict[str, str]:
        sources = {role: source["fingerprint"] for role, source in manifest["source"].items()}
        labels = manifest["labels"]
        # Where they come from by default can change with the network; that is no other conversion.
        named = labels["sha256"] if labels and not labels["is_default"] else "default"
        return {**sources, "plan (its names, its shard size)": manifest["plan"], "list of labels": named}

    try:
        mine, theirs = parts(one), parts(other)
    except (KeyError, TypeError, AttributeError):
        return [MANIFEST_NAME]
    return sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))


def release(folder: Path, names: list[str], is_new: bool) -> None:
    """After a failure: leave no manifest, and no folder of ours, where not one file was finished."""
    if not any(os.path.exists(folder / name) for name in names):
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    write_file(folder / MANIFEST_NAME, (json.dumps(manifest, indent=2) + "\n").encode())


def require_space(folder: Path, size: int) -> None:
    """Refuse now what would not fit.

    Raises:
        OutputError: the disk of ``folder``, which need not exist yet, has fewer than ``size`` bytes free.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    free = shutil.disk_usage(there).free
    if free < size:
        raise OutputError(
            f"{folder} needs {size:,} bytes and its disk has {free:,} free. "
            "Make room, or choose a folder on another disk."
        )
