"""The library's jobs with their options as keyword arguments, since tests call them so often."""

from dataclasses import fields
from typing import Any

import streamconv
from streamconv import Conversion, ConversionOptions, Plan, SourceOptions, Verification, VerificationOptions
from streamconv.jobs.options import StrPath
from streamconv.progress import Progress, ignore_progress

_VERIFICATION = {field.name for field in fields(VerificationOptions)}


def plan(source: StrPath, **options: Any) -> Plan:
    return streamconv.plan(source, ConversionOptions(**options))


def convert(
    source: StrPath, output: StrPath | None = None, *, progress: Progress = ignore_progress, **options: Any
) -> Conversion:
    return streamconv.convert(source, output, ConversionOptions(**options), progress=progress)


def verify(
    folder: StrPath, source: StrPath | None = None, *, progress: Progress = ignore_progress, **options: Any
) -> Verification:
    ours = VerificationOptions(**{name: value for name, value in options.items() if name in _VERIFICATION})
    others = SourceOptions(**{name: value for name, value in options.items() if name not in _VERIFICATION})
    return streamconv.verify(folder, source, ours, others, progress=progress)
