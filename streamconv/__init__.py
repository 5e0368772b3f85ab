"""Converts published checkpoints to Hugging Face's format by streaming, and proves the result.

Importing it imports neither torch nor transformers; `verify` does when it is called.
"""

from streamconv._version import __version__
from streamconv.checkpoint import Checkpoint, open_checkpoint
from streamconv.convert import Conversion, convert, plan
from streamconv.errors import (
    ChangedError,
    CorruptError,
    MappingError,
    NetworkError,
    NoRangesError,
    NotACheckpointError,
    OutputError,
    SourceError,
    SourceMissingError,
    StreamconvError,
    TruncatedError,
    UnsafePickleError,
    UsageError,
)
from streamconv.plan import Plan
from streamconv.revert import Reverted, revert
from streamconv.synth import synth
from streamconv.tensors import SourceTensor, TensorInfo
from streamconv.verify import Rung, Verification, verify

__all__ = [
    "ChangedError",
    "Checkpoint",
    "Conversion",
    "CorruptError",
    "MappingError",
    "NetworkError",
    "NoRangesError",
    "NotACheckpointError",
    "OutputError",
    "Plan",
    "Reverted",
    "Rung",
    "SourceError",
    "SourceMissingError",
    "SourceTensor",
    "StreamconvError",
    "TensorInfo",
    "TruncatedError",
    "UnsafePickleError",
    "UsageError",
    "Verification",
    "__version__",
    "convert",
    "open_checkpoint",
    "plan",
    "revert",
    "synth",
    "verify",
]
