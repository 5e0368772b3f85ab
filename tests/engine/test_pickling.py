"""Errors, options and results cross to other processes, and are copied, with all their attributes."""

import copy
import importlib
import inspect
import pickle
import pkgutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import is_dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

import streamconv
from streamconv import (
    Cancelled,
    ConversionOptions,
    Destination,
    MappingError,
    PushOptions,
    SourceOptions,
    StreamconvError,
    VerificationOptions,
)
from streamconv.files.address import Address
from tests import api
from tests.checkpoints import make_states, original_states
from tests.support import run_python, tiny


def all_errors() -> list[type[StreamconvError]]:
    for module in pkgutil.walk_packages(streamconv.__path__, "streamconv."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)

    def below(kind: type[StreamconvError]) -> Iterator[type[StreamconvError]]:
        for each in kind.__subclasses__():
            yield each
            yield from below(each)

    return [StreamconvError, *below(StreamconvError)]


def made(kind: type[StreamconvError]) -> StreamconvError:
    """Make an error with an argument for each parameter, and with attributes that are set later."""
    takes_message = kind.__init__ is Exception.__init__
    parameters = [] if takes_message else inspect.signature(kind).parameters.values()
    samples = {str: "text", int | None: 7}
    error = kind(*(["text"] if takes_message else [samples.get(p.annotation, ["one", "two"]) for p in parameters]))
    error.location = Address("https://host/x.pth?signature=secret")  # type: ignore[attr-defined]
    error.__notes__ = ["a note"]
    return error


def copies(value: Any) -> list[Any]:
    pickled = [pickle.loads(pickle.dumps(value, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    return [*pickled, copy.copy(value), copy.deepcopy(value)]


def test_every_error_keeps_its_message_and_attributes() -> None:
    kinds = all_errors()
    assert {MappingError, Cancelled, streamconv.HubError} < set(kinds)
    for kind in kinds:
        error = made(kind)
        for other in copies(error):
            assert type(other) is kind
            assert (str(other), other.args, vars(other)) == (str(error), error.args, vars(error))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.save(make_states(tiny())[0], tmp_path / "x.pth")
    return tmp_path / "x.pth"


def test_every_exported_dataclass_can_be_copied_and_pickled(source: Path, tmp_path: Path) -> None:
    conversion = streamconv.convert(source, tmp_path / "out", ConversionOptions(dtype="float16"))
    verification = api.verify(tmp_path / "out", source, device="cpu")
    values = [
        conversion,
        conversion.plan,
        verification,
        *verification.checks,
        verification.conclusion,
        verification.cast_cost,
        streamconv.RunResult(conversion, verification, streamconv.Published("ada/it", "https://host/ada/it")),
        streamconv.Published("ada/it", "https://host/ada/it"),
        streamconv.revert(tmp_path / "out", tmp_path / "back.pth"),
        streamconv.synth("dinov2_vits14", tmp_path / "synthetic.pth"),
        SourceOptions(head=Path("head.pth")),
        ConversionOptions(dtype="bfloat16", labels="labels.txt"),
        VerificationOptions(report=tmp_path / "report.html"),
        PushOptions(Destination("ada/it", revision="dev")),
        Destination("ada/it"),
        streamconv.PushTarget("ada/it", "https://host/ada/it", exists=True, private=None),
    ]
    with streamconv.open_checkpoint(source) as checkpoint:
        values.append(checkpoint["pos_embed"].info)
        expression = checkpoint["pos_embed"]
    exported = {each for name in streamconv.__all__ if is_dataclass(each := getattr(streamconv, name))}
    assert exported == {type(value) for value in values}
    for value in (*values, expression):
        assert all(other == value for other in copies(value))
    (tmp_path / "pickled").write_bytes(pickle.dumps(verification))
    code = f"import pickle, sys; pickle.load(open({str(tmp_path / 'pickled')!r}, 'rb')); print('torch' in sys.modules)"
    assert run_python(code) == "False\n"


def test_results_and_errors_come_back_from_a_process_pool(source: Path, tmp_path: Path) -> None:
    state = original_states(tiny())[0]
    torch.save({**state, "blocks.0.norm1.weight": state["norm.weight"][:5]}, tmp_path / "wrong.pth")
    with pytest.raises(MappingError) as here:
        streamconv.convert(tmp_path / "wrong.pth", tmp_path / "wrong")
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        with pytest.raises(MappingError) as there:
            pool.submit(streamconv.convert, tmp_path / "wrong.pth", tmp_path / "wrong").result(60)
        assert there.value.problems == here.value.problems != ()
        with pytest.raises(streamconv.SourceError) as missing:
            pool.submit(streamconv.plan, tmp_path / "missing.pth").result(60)
        assert type(missing.value) is streamconv.SourceMissingError
        assert pool.submit(streamconv.plan, source).result(60) == streamconv.plan(source)
        done = pool.submit(streamconv.convert, source, tmp_path / "out").result(60)
        assert done.shards == streamconv.convert(source, tmp_path / "out").shards
        back = pool.submit(streamconv.revert, tmp_path / "out", tmp_path / "back.pth").result(60)
        assert back.files == (tmp_path / "back.pth",)
