"""The public names of the package. `streamconv` imports them from here when one is first used."""

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
    RepeatedDataError,
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
from streamconv.jobs.convert_plan import convert_plan, finish
from streamconv.jobs.options import ConversionOptions, PushOptions, SourceOptions, VerificationOptions
from streamconv.jobs.publish import Published, publish
from streamconv.jobs.revert import Reverted, revert
from streamconv.jobs.run import RunResult, run
from streamconv.jobs.synth import SyntheticFiles, synth
from streamconv.jobs.verify import verify
from streamconv.planning.plan import Plan
from streamconv.progress import Progress, ProgressUnit
from streamconv.tensors.expressions import Expression
from streamconv.tensors.info import CastDtype, DtypeCode, TensorInfo
from streamconv.verification.result import CastCost, Check, Conclusion, Verification

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
    "Expression",
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
    "RepeatedDataError",
    "Reverted",
    "RunResult",
    "SourceError",
    "SourceMissingError",
    "SourceOptions",
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
    "convert_plan",
    "finish",
    "open_checkpoint",
    "plan",
    "publish",
    "revert",
    "run",
    "synth",
    "verify",
]
