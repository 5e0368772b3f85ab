"""What a file is that has no format that streamconv reads."""

from streamconv.files.base import File
from streamconv.formats.foreign.binary import describe_binary
from streamconv.formats.foreign.text import describe_text
from streamconv.formats.foreign.zips import is_distributed

START_BYTES = 64 << 10  # read to recognise a file


def describe(file: File) -> str:
    """Return what an open file is and what to do, as the end of a sentence. It is read up to `START_BYTES`."""
    return describe_start(file.read(0, min(START_BYTES, file.size)), file.name)


def describe_start(start: bytes, name: str) -> str:
    """Return what a file is that begins so: see `describe`.

    Args:
        start: Its first `START_BYTES`, or all of it.
        name: Its name, which decides little: the first bytes do.
    """
    if not start:
        return "is empty: the save, copy or download was cut short. Fetch it again."
    if is_distributed(name):
        return (
            "is part of a distributed checkpoint (DCP) of torch. Put its folder into one file: "
            "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER OUT.pth`."
        )
    return (
        describe_text(start, name)
        or describe_binary(start, name)
        or "is neither a torch.save checkpoint, a safetensors file nor an .npz file."
    )
