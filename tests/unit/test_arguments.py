"""A value of a wrong type, wherever a program passes it to the library, is one error that names it; nothing is done."""

import inspect
import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import streamconv
from streamconv import (
    ConversionOptions,
    Destination,
    PushOptions,
    SourceOptions,
    UsageError,
    VerificationOptions,
)

JOBS = ("plan", "convert", "run", "verify", "revert", "synth", "publish", "open_checkpoint")
OPTIONS = (SourceOptions, ConversionOptions, VerificationOptions, PushOptions, Destination)


class Anything:
    pass


class BytesPath:
    def __fspath__(self) -> bytes:
        return b"x"


WRONG = (Anything(), b"x", 1.5j, {}, BytesPath(), (each for each in "ab"))
LARGE = 10**5_000  # Python does not write it
HAVE_WORDS_OF_THEIR_OWN = ("image_mean", "image_std", "max_shard_size", "dtype", "destination", "license", "tags")


@pytest.mark.parametrize("name", JOBS)
def test_argument_of_a_wrong_type_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job: Any = getattr(streamconv, name)
    parameters = inspect.signature(job).parameters.values()
    needed = {each.name: "x" for each in parameters if each.default is each.empty}
    for parameter in parameters:
        for value in WRONG:
            with pytest.raises(UsageError, match=f"^{parameter.name} must be .*, not "):
                job(**{**needed, parameter.name: value})
    with pytest.raises(TypeError, match="'nothing'"):
        job(**needed, nothing=1)
    assert not os.listdir()


@pytest.mark.parametrize("options", OPTIONS)
def test_option_of_a_wrong_type_is_named(options: Any) -> None:
    for field in fields(options):
        for value in (*WRONG, -LARGE, LARGE):
            message = (
                "not|must"
                if field.name in HAVE_WORDS_OF_THEIR_OWN
                else rf"^{field.name} must be|attention heads|image s"
            )
            with pytest.raises(UsageError, match=message) as caught:
                options(**{field.name: value})
            assert len(str(caught.value)) < 400


@pytest.mark.parametrize("flag", ["stream", "force", "allow_repeats"])
@pytest.mark.parametrize("value", ["no", 0, 1, None, []])
def test_flag_is_true_or_false(flag: str, value: Any) -> None:
    with pytest.raises(UsageError, match=re.escape(f"{flag} must be True or False, not {value!r}.")):
        ConversionOptions(**{flag: value})


def test_paths_and_callbacks_may_be_of_any_class(tmp_path: Path) -> None:
    class Name(str):
        pass

    with pytest.raises(streamconv.SourceMissingError):
        streamconv.convert(tmp_path / "x.pth", Name("out"), progress=Anything)  # type: ignore[arg-type]
