"""What a file is that has no format that streamconv reads."""

from streamconv.formats.foreign.binary import describe_binary
from streamconv.formats.foreign.text import describe_text

START_BYTES = 64 << 10  # read to recognise a file


def is_distributed(name: str) -> bool:
    """Return whether a file of this name is part of a distributed checkpoint: many zips, one after another."""
    return name.endswith(".distcp")


def describe_file(start: bytes, name: str) -> str:
    """Return what a file is and what to do, as the end of a sentence.

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
