"""Advice that several descriptions of other formats give."""

from shlex import quote

_DCP = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch {} OUT.pth"
_ZERO = "python -m deepspeed.utils.zero_to_fp32 {} OUT"


def save_for_torch(program: str) -> str:
    """Return how to save the weights of another program's model, which have its names and layout."""
    return f"Load it in {program}, and save the weights with PyTorch's names and layout: torch.save(state_dict, OUT)"


def merge_distributed(folder: str = "") -> str:
    """Return how to make one file of a distributed checkpoint (DCP); without ``folder``, the user has to insert it."""
    return f"Merge its folder into one file: `{_DCP.format(quote(folder) if folder else 'FOLDER')}`"


def merge_zero(folder: str = "") -> str:
    """Return how to make one file of a DeepSpeed checkpoint; without ``folder``, the user has to insert it."""
    return f"Merge its folder into one file: `{_ZERO.format(quote(folder) if folder else 'FOLDER')}`"
