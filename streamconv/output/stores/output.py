"""An output in an object store, written straight from the buffers: no file on this machine.

A file that is recorded as complete, and whose object still has the recorded size and version, is kept without reading
the source. Any other file is written by `writer`.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from streamconv.errors import OutputError
from streamconv.files.address import Address
from streamconv.files.reader import Reader
from streamconv.formats.safetensors import INDEX_NAME
from streamconv.logs import logger
from streamconv.output.identity import differences, is_unidentified, shown_differences
from streamconv.output.manifest import MANIFEST_NAME, Manifest, Provenance, WrittenFile, is_our_name, is_weights
from streamconv.output.planned import PlannedConversion
from streamconv.output.shared import FileState
from streamconv.output.stores.records import (
    CONVERSION,
    RECORDS,
    ConversionRecord,
    FileRecord,
    file_of,
    parse_record,
    record_name,
    to_bytes,
)
from streamconv.output.stores.store import Store, StoredObject, StoreError, UploadLostError
from streamconv.output.stores.writer import write_file
from streamconv.output.writer import Advance
from streamconv.planning.shards import Shard
from streamconv.tensors.checksums import RecordChecks

_log = logger(__name__)

MAX_STARTS = 3  # uploads of one file, if they are lost again and again
READS_AT_ONCE = 8  # records


class StoreOutput:
    """A `SharedOutput` in a store."""

    def __init__(self, store: Store):
        self._store = store

    @property
    def location(self) -> Address:
        return self._store.address

    def begin(self, planned: PlannedConversion, *, force: bool = False) -> None:
        found = self._store.list()
        manifest, begun = self._manifest(), self._conversion()
        existing = begun or manifest
        present = [name for name in planned.plan.filenames if name in found]
        if existing is None and present:
            raise OutputError(
                f"{self.location} already holds {', '.join(present)}, which streamconv did not write. Choose another "
                "URL."
            )
        if existing is not None and self._is_replaced(existing, manifest, planned.provenance, present, force=force):
            self._remove(manifest)
        # Always, because this shows whether the store can be written to.
        self._store.put(CONVERSION, to_bytes(ConversionRecord(provenance=planned.provenance)))

    def finished(self, planned: PlannedConversion) -> Manifest | None:
        found = self._store.list()
        manifest = self._manifest()
        if manifest is None or differences(manifest, planned.provenance) or self._conversion() is not None:
            return None
        is_whole = manifest.files.keys() == {*planned.plan.filenames} and all(
            name in found and found[name].size == file.size for name, file in manifest.files.items()
        )
        return manifest if is_whole else None

    def write(
        self,
        planned: PlannedConversion,
        shard: Shard,
        reader: Reader,
        checks: RecordChecks,
        advance: Advance,
        part: str = "",
    ) -> tuple[WrittenFile, int]:
        starts = 0
        while True:
            starts += 1
            record = self._record(shard.filename, planned.provenance)
            found = self._store.find(shard.filename)
            if found is not None and (written := self._complete(shard, record, found, planned.provenance)):
                advance(shard.size, True)
                return written, shard.size
            try:
                begun = FileRecord(provenance=planned.provenance, part=part)
                copies = planned.server_side_copy
                return write_file(self._store, shard, record, begun, reader, checks, advance, server_side_copy=copies)
            except UploadLostError as error:
                if starts == MAX_STARTS:
                    raise
                _log.warning("%s Trying again.", error)
                checks.forget_ranges()

    def states(self, planned: PlannedConversion) -> dict[str, FileState]:
        found, begun = self._store.list(), {file_of(name) for name in self._store.list(RECORDS)}

        def state(shard: Shard) -> FileState:
            record = self._record(shard.filename, planned.provenance) if shard.filename in begun else None
            return self._state(shard, record, found, planned)

        with ThreadPoolExecutor(READS_AT_ONCE, "records") as threads:
            shards = planned.plan.shards
            return {shard.filename: each for shard, each in zip(shards, threads.map(state, shards), strict=True)}

    def finish(self, planned: PlannedConversion, manifest: Manifest) -> None:
        store, small = self._store, dict(planned.small_files)
        index = small.pop(INDEX_NAME, None)
        for name, data in small.items():
            store.put(name, data)
        store.put(MANIFEST_NAME, manifest.to_bytes())
        if index is not None:
            store.put(INDEX_NAME, index)  # last, because it makes the output a model that can be loaded
        self._abort_uploads(shard.filename for shard in planned.plan.shards)
        self._remove_records()

    # What is there

    def _where(self, name: str) -> str:
        return f"{self.location}/{name}"

    def _manifest(self) -> Manifest | None:
        data = self._store.read(MANIFEST_NAME)
        return Manifest.parse(data, Path(self._where(MANIFEST_NAME))) if data is not None else None

    def _conversion(self) -> Provenance | None:
        record = parse_record(ConversionRecord, self._store.read(CONVERSION), self._where(CONVERSION))
        return record.provenance if record is not None else None

    def _record(self, file: str, provenance: Provenance) -> FileRecord | None:
        """Return the record of a weight file.

        Raises:
            OutputError: it belongs to another conversion.
        """
        name = record_name(file)
        record = parse_record(FileRecord, self._store.read(name), self._where(name))
        if record is not None and (other := differences(record.provenance, provenance)):
            raise OutputError(
                f"{self.location} holds parts of another conversion, of {record.provenance.title}: for {file}, the "
                f"{shown_differences(other)}. Choose another URL."
            )
        return record

    def _complete(
        self, shard: Shard, record: FileRecord | None, found: StoredObject, provenance: Provenance
    ) -> WrittenFile | None:
        """Return a weight file if its object is complete, by its record or, without one, by the manifest."""
        if record is not None:
            written, version = record.written, record.version
        else:
            manifest = self._manifest()
            is_same = manifest is not None and not differences(manifest, provenance)
            written, version = (manifest.files.get(shard.filename) if manifest and is_same else None), found.version
        is_there = written is not None and (written.size, version) == (found.size, found.version)
        return written if is_there and found.size == shard.size else None

    def _state(
        self,
        shard: Shard,
        record: FileRecord | None,
        found: Mapping[str, StoredObject],
        planned: PlannedConversion,
    ) -> FileState:
        part = record.part if record is not None else ""
        if (object_ := found.get(shard.filename)) is not None:
            written = self._complete(shard, record, object_, planned.provenance)
            if written is not None or record is None:
                return FileState(object_.size, written, part)
        if record is None or not record.upload:
            return FileState(0, None, part)
        return FileState(self._store.uploaded_bytes(shard.filename, record.upload), None, part)

    # Deleting

    def _is_replaced(
        self,
        existing: Provenance,
        manifest: Manifest | None,
        provenance: Provenance,
        present: list[str],
        *,
        force: bool,
    ) -> bool:
        """Return whether the conversion that is there must be deleted.

        Raises:
            OutputError: it is another conversion, and ``force`` is not set.
        """
        other = differences(existing, provenance)
        if not other:
            return force and existing is manifest
        is_begun = bool(present or manifest or self._store.list(RECORDS).keys() - {Path(CONVERSION).name})
        if force or not is_begun or (manifest is None and is_unidentified(existing, provenance)):
            return True
        state = "an unfinished" if manifest is None else "another"
        raise OutputError(
            f"{self.location} holds {state} conversion, of {existing.title}: its {shown_differences(other)}. "
            "Choose another URL, or replace it with --force."
        )

    def _remove(self, manifest: Manifest | None) -> None:
        """Delete a conversion's own files: the index first, so that no part of it loads, and the manifest last."""
        _log.info("deleting the conversion in %s, to start over", self.location)
        names = {file_of(name) for name in self._store.list(RECORDS)} | {*(manifest.files if manifest else ())}
        owned = sorted(filter(is_our_name, names), key=lambda name: name != INDEX_NAME)
        self._store.delete(owned)
        self._abort_uploads(filter(is_weights, owned))
        self._remove_records()
        self._store.delete([MANIFEST_NAME])

    def _abort_uploads(self, names: Iterable[str]) -> None:
        """Delete the uploads of killed processes. If that is not allowed, they only take space."""
        try:
            self._store.abort_uploads(names)
        except StoreError as error:
            _log.warning("Uploads of killed processes may be left: %s", error)

    def _remove_records(self) -> None:
        """Delete the records, and last the one of the conversion."""
        names = [f"{RECORDS}/{name}" for name in self._store.list(RECORDS) if is_our_name(file_of(name))]
        self._store.delete([*names, CONVERSION])
