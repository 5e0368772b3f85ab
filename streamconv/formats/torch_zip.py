"""The index of a .pth since torch 1.6: names, dtypes, shapes and byte ranges, without reading a weight.

The file is a zip of stored records: ``<prefix>/data.pkl`` describes the tensors (`torch_pickle`),
``<prefix>/data/<key>`` holds a storage's bytes. torch's own reader takes 600 MB of memory to import and verifies no
checksum. The format is documented in
https://docs.pytorch.org/docs/stable/notes/serialization.html and in torch/serialization.py.
"""

from collections.abc import Mapping

from streamconv.display import printable
from streamconv.errors import CorruptError, NotACheckpointError, SourceError
from streamconv.files.base import File
from streamconv.formats.non_tensors import NonTensor
from streamconv.formats.pickled_tensors import find_tensors
from streamconv.formats.torch_pickle import Index
from streamconv.formats.unpickle import MAX_PICKLE_BYTES, Pickles
from streamconv.formats.unread import PickleError
from streamconv.formats.zip_record import RecordPieces, read_record
from streamconv.tensors.expressions import Read, Record
from streamconv.tensors.info import DTYPES


def read_index(file: File, records: Mapping[str, Record]) -> tuple[dict[str, Read], dict[str, NonTensor], str]:
    """Return the tensors, the classes of other objects, both by name, and the file's fingerprint.

    Keys of nested dicts are joined with dots. ``records`` are those of `read_records`.

    Raises:
        TruncatedError, CorruptError, NotACheckpointError, UnsafePickleError, SourceError
    """
    pickles = [name for name in records if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        held = f"{len(pickles)} data.pkl records" if pickles else "no data.pkl record"
        raise NotACheckpointError(f"{file.where} is a zip, but not one of torch.save: it has {held}.")
    prefix = pickles[0].removesuffix("data.pkl")
    if next(iter(records)).partition("/")[0] + "/" != prefix:  # torch looks for it there
        raise CorruptError(f"{file.where}: its {pickles[0]} is not in the folder of its first record.")
    byteorders = [name for name in records if name.lower() == f"{prefix}byteorder".lower()]  # torch ignores the case
    if byteorders and read_record(file, records[byteorders[0]], 16) != b"little":
        raise SourceError(f"{file.where} was saved on a big-endian machine. Load and save it on a little-endian one.")
    pickled = RecordPieces(file, records[pickles[0]], MAX_PICKLE_BYTES)

    def record_of(key: str, dtype: str, numel: int) -> Record:
        record = records.get(f"{prefix}data/{key}")
        if record is None:
            raise CorruptError(f"{file.where} has no record data/{printable(key)}, which its index names.")
        if record.range.length != numel * DTYPES[dtype].itemsize:
            raise CorruptError(
                f"{file.where}: its record {record.name} has {record.range.length} bytes, but its index gives it "
                f"{numel} elements of {dtype}."
            )
        return record

    index = Index(file.where, record_of)
    try:
        try:
            contents = Pickles(b"", pickled.read, len(records)).load(index.find_global, index.storage)
        finally:
            pickled.finish()  # if it is damaged, that is what is reported
    except (PickleError, TypeError) as error:  # TypeError: a function was given too few or too many values
        raise CorruptError(f"{file.where}: its data.pkl is damaged or not from torch.save: {error}.") from error
    return *find_tensors(contents, file.where), _fingerprint(records, pickled)


def _fingerprint(records: Mapping[str, Record], pickled: RecordPieces) -> str:
    """Return the sha256 of the pickle and of every record's name, size and CRC-32.

    If the file has CRC-32s, this covers every byte of every weight without reading any.
    """
    digest = pickled.digest.copy()
    for name, record in sorted(records.items()):
        digest.update(f"\0{name}\0{record.range.length}\0{record.crc32 or 0}".encode())
    return digest.hexdigest()
