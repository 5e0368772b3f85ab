"""Converts published checkpoints to Hugging Face's format by streaming, and verifies the result.

Importing it imports neither torch nor transformers; `verify` does when it is called.
"""

from streamconv._version import __version__
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
from streamconv.formats.checkpoint import Checkpoint, open_checkpoint
from streamconv.hub.repository import Destination
from streamconv.jobs.convert import Conversion, convert, plan
from streamconv.jobs.options import ConversionOptions, PushOptions, SourceOptions, VerificationOptions
from streamconv.jobs.publish import Published, publish
from streamconv.jobs.revert import Reverted, revert
from streamconv.jobs.run import RunResult, run
from streamconv.jobs.synth import synth
from streamconv.jobs.verify import verify
from streamconv.planning.plan import Plan
from streamconv.tensors.expressions import SourceTensor
from streamconv.tensors.info import TensorInfo
from streamconv.verification.result import Check, Verification

__all__ = [
    "ChangedError",
    "Check",
    "Checkpoint",
    "Conversion",
    "ConversionOptions",
    "CorruptError",
    "Destination",
    "MappingError",
    "NetworkError",
    "NoRangesError",
    "NotACheckpointError",
    "OutputError",
    "Plan",
    "Published",
    "PushOptions",
    "Reverted",
    "RunResult",
    "SourceError",
    "SourceMissingError",
    "SourceOptions",
    "SourceTensor",
    "StreamconvError",
    "TensorInfo",
    "TruncatedError",
    "UnsafePickleError",
    "UsageError",
    "Verification",
    "VerificationOptions",
    "__version__",
    "convert",
    "open_checkpoint",
    "plan",
    "publish",
    "revert",
    "run",
    "synth",
    "verify",
]
