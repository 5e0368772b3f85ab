"""Converts published checkpoints to the Hugging Face format by streaming, and verifies the result.

Importing this package imports neither torch nor transformers. `run` and `verify` start a process that does; if the
calling process has imported transformers already, they use that.

Every job reports to a `Progress` callback, which can end the job by raising `Cancelled`. Options, results and errors
can be copied, pickled and sent to other processes. Events such as a retried connection, a resumed file or a finished
check are logged to the logger "streamconv", which has no handler of its own.
"""

import logging

from streamconv._version import __version__
from streamconv.errors import (
    Cancelled,
    ChangedError,
    CorruptError,
    HubError,
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
from streamconv.hub.destination import Destination, PushTarget
from streamconv.jobs.conversion import Conversion
from streamconv.jobs.convert import convert, plan
from streamconv.jobs.options import ConversionOptions, PushOptions, SourceOptions, VerificationOptions
from streamconv.jobs.publish import Published, publish
from streamconv.jobs.revert import Reverted, revert
from streamconv.jobs.run import RunResult, run
from streamconv.jobs.synth import SyntheticFiles, synth
from streamconv.jobs.verify import verify
from streamconv.planning.plan import Plan
from streamconv.progress import Progress, ProgressUnit
from streamconv.tensors.expressions import SourceTensor
from streamconv.tensors.info import CastDtype, DtypeCode, TensorInfo
from streamconv.verification.result import CastCost, Check, Conclusion, Verification

logging.getLogger(__name__).addHandler(logging.NullHandler())

__all__ = [
    "Cancelled",
    "CastCost",
    "CastDtype",
    "ChangedError",
    "Check",
    "Checkpoint",
    "Conclusion",
    "Conversion",
    "ConversionOptions",
    "CorruptError",
    "Destination",
    "DtypeCode",
    "HubError",
    "MappingError",
    "NetworkError",
    "NoRangesError",
    "NotACheckpointError",
    "OutputError",
    "Plan",
    "Progress",
    "ProgressUnit",
    "Published",
    "PushOptions",
    "PushTarget",
    "Reverted",
    "RunResult",
    "SourceError",
    "SourceMissingError",
    "SourceOptions",
    "SourceTensor",
    "StreamconvError",
    "SyntheticFiles",
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
