"""A callback that raises while models run ends the verification as cancelled; no check takes it for a difference."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.dinov2.modeling_dinov2 import Dinov2Layer

import streamconv
from streamconv import Cancelled, ConversionOptions, Destination, Progress, PushOptions, VerificationOptions
from streamconv.verification.originals.layers import Block
from tests import api
from tests.file_server import FileServer
from tests.hub_server import HubServer
from tests.support import Raising, Save, model_files, tiny

ON_CPU = VerificationOptions(device="cpu")


def require_every_step_cancellable(job: Callable[[Progress], object], *, after: Callable[[], object]) -> list[object]:
    """Require that an exception in each step's last call reaches the caller of a job; ``after`` checks what is left."""
    counting = Raising()
    job(counting)
    last = {step: at for at, step in enumerate(counting.steps)}
    errors = [Cancelled(), MemoryError(), torch.cuda.OutOfMemoryError(), RuntimeError("its own"), ValueError("its own")]
    for i, at in enumerate(last.values()):
        error = errors[i % len(errors)]
        raising = Raising(error, at)
        with pytest.raises(type(error)) as caught:
            job(raising)
        assert caught.value is error
        assert len(raising.steps) == at + 1
        after()
    return list(last)


def test_verify(save: Save, tmp_path: Path) -> None:
    source, _ = save(tiny())
    folder = api.convert(source, tmp_path / "out").output

    def job(progress: Progress) -> None:
        (folder / "streamconv.json").write_bytes(unverified)
        assert streamconv.verify(folder, source, ON_CPU, progress=progress).passed

    def nothing_is_recorded() -> None:
        assert (folder / "streamconv.json").read_bytes() == unverified

    unverified = (folder / "streamconv.json").read_bytes()
    steps = require_every_step_cancellable(job, after=nothing_is_recorded)
    assert steps == [
        "comparing bytes", "loading with transformers", "comparing both models at 224x224",
        "checking the image processor",
    ]  # fmt: skip


def test_verify_of_a_folder_alone(save: Save, tmp_path: Path) -> None:
    folder = api.convert(save(tiny())[0], tmp_path / "out").output
    error = OSError("its own")
    with pytest.raises(OSError, match="its own") as caught:
        streamconv.verify(folder, progress=Raising(error))
    assert caught.value is error


@pytest.mark.parametrize("at", [0, 1])
def test_run_keeps_the_conversion_that_a_callback_was_given(save: Save, tmp_path: Path, at: int) -> None:
    source, _ = save(tiny())
    raising = Raising(Cancelled(), at)
    with pytest.raises(Cancelled):
        streamconv.run(source, tmp_path / "out", verification=ON_CPU, on_result=raising)
    recorded = json.loads((tmp_path / "out" / "streamconv.json").read_text())["verification"]
    assert (recorded is not None) == (at == 1)
    again = streamconv.run(source, tmp_path / "out", verification=ON_CPU)
    assert again.conversion.was_finished
    assert again.passed
    api.convert(source, tmp_path / "whole")
    assert model_files(tmp_path / "out") == model_files(tmp_path / "whole")


def test_verification_of_uploaded_files(hub: HubServer, server: FileServer, save: Save, tmp_path: Path) -> None:
    save(tiny(), "served/x")
    options, push = ConversionOptions(stream=True, max_shard_size="1MB"), PushOptions(Destination("it"))
    error = Cancelled()

    def cancel(step: str, done: int, total: int, unit: str) -> None:
        if step == "comparing both models at 224x224" and done == total // 2:
            raise error

    def job(progress: Progress) -> bool:
        source = f"{server.url}/x.pth"
        return streamconv.run(source, tmp_path / "out", options, ON_CPU, push, progress=progress).passed

    with pytest.raises(Cancelled) as caught:
        job(cancel)
    assert caught.value is error
    assert not any(name.startswith("model") for name in hub.files("ada/it"))
    steps = Raising()
    assert job(steps)
    assert not any(str(step).startswith(("writing", "uploading")) for step in steps.steps)
    assert any(name.startswith("model") for name in hub.files("ada/it"))


def test_progress_is_reported_between_any_two_layers(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a verification ends within the time of one layer, at every size and precision."""
    source, _ = save(tiny(layers=6))
    folder = api.convert(source, tmp_path / "out").output
    events: list[str] = []

    def recorded(kind: Any) -> Any:
        forward = kind.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            events.append("layer")
            return forward(*args, **kwargs)

        return call

    for kind in (Block, Dinov2Layer):
        monkeypatch.setattr(kind, "forward", recorded(kind))
    assert streamconv.verify(folder, source, ON_CPU, progress=lambda *report: events.append("report")).passed
    assert events.count("layer") >= 3 * 6  # the converted model, and the original with either interpolation
    pairs = set(pairwise(events))
    assert ("layer", "layer") not in pairs
