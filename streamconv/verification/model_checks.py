"""The checks that run models (load, parity, preprocessing), in order, with the predictions and pictures they yield."""

import time
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from streamconv.errors import StreamconvError, UsageError
from streamconv.files.local import MAX_JSON_BYTES
from streamconv.planning.plan import Plan
from streamconv.progress import Progress
from streamconv.source.open import OpenSource
from streamconv.verification.devices import (
    CPU,
    GpuFailure,
    choose_device,
    describe_gpu,
    failure_behind,
    versions,
)
from streamconv.verification.image import open_image
from streamconv.verification.load import check_load, default_dtype_of
from streamconv.verification.lockstep import Pair
from streamconv.verification.machine import refuse_machine_failure
from streamconv.verification.memory import MemoryWatch
from streamconv.verification.offload import OffloadedModel, WeightBuffer
from streamconv.verification.parity import PROVES, check_parity
from streamconv.verification.patch_pca import draw_pictures
from streamconv.verification.pixels import crop, resize, to_pixels
from streamconv.verification.preflight import BUILTIN, HUB
from streamconv.verification.preprocessing import check_preprocessing
from streamconv.verification.reference import build_original, load_weights
from streamconv.verification.result import Check, ModelResults
from streamconv.verification.sparse_folder import source_tensors_of
from streamconv.verification.weights import MappedWeights, StreamedWeights, torch_dtype

PREDICTION_COUNT = 5
MAX_PATCHES = 80  # along one side of an image, 1,120 pixels in patches of 14; memory grows with the fourth power


class ModelVerifier:
    """The device, image and original model of a verification. Creating it rejects every wrong option."""

    def __init__(self, plan: Plan, device: str, image: str | PathLike[str] | None, reference: str | PathLike[str]):
        self.plan = plan
        choice = choose_device(device)
        self.device, self.device_note = choice.device, choice.note
        self._is_automatic = device == "auto"
        self.image = open_image(image)
        self._reference = reference
        self.original, self.architecture = build_original(plan, reference)
        self.reference = reference if reference in (BUILTIN, HUB) else f"folder {Path(reference).resolve().name}"
        self.versions = versions()

    def check(
        self,
        folder: Path,
        source: OpenSource,
        progress: Progress,
        parity: bool = True,
        is_sparse: bool = False,
        thorough: bool = False,
    ) -> ModelResults:
        """Run the load check, if it passes the comparison of outputs, and the check of the image processor.

        Args:
            parity: Run the models.
            is_sparse: ``folder`` was written by `write_sparse_folder`; the converted model's weights come
                from the source, too.
            thorough: Run the models at the native size, too. A remote source is then read twice.

        Raises:
            UsageError: the device has too little memory; or it is a GPU that fails, and was not chosen automatically.
        """

        def checked() -> ModelResults:
            with MemoryWatch(self.device) as memory:
                found = self._check(folder, source, progress, parity, is_sparse, thorough)
                return replace(
                    found,
                    memory=memory.as_dict(),
                    device=str(self.device),
                    device_note=self.device_note,
                    gpu=describe_gpu(self.device),
                    reference=self.reference,
                    versions=self.versions,
                )

        try:
            return checked()
        except StreamconvError:
            raise
        except Exception as error:
            if self.device == CPU:
                raise
            name, problem = str(self.device), f"{type(error).__name__}: {error}"
            failure = failure_behind(error, self.device)
        if failure is not None and not self._is_automatic:
            raise failure.as_usage_error(name)
        # A CPU computes the same. If the models fail there, too, they are wrong; otherwise the GPU is.
        self.device = CPU
        self.original, self.architecture = build_original(self.plan, self._reference)  # without what is on the GPU
        found = checked()
        if failure is None and any("error" in check.numbers for check in found.checks):
            return found
        failure = failure or GpuFailure(f"it fails where a CPU does not ({problem})")
        if not self._is_automatic:
            raise failure.as_usage_error(name)
        return replace(found, device_note=failure.as_note())

    def _check(
        self, folder: Path, source: OpenSource, progress: Progress, with_parity: bool, is_sparse: bool, thorough: bool
    ) -> ModelResults:
        if too_large := _too_large_files(folder):
            why = "transformers was not run, because it would read the whole of a very large file"
            load = Check("load", False, "transformers loads every tensor", too_large)
            return ModelResults((load, Check("parity", None, why), Check("preprocessing", None, why)))
        start = time.monotonic()
        progress("loading with transformers", 0, 1, "steps")
        loaded, converted = check_load(folder, self.plan)
        if is_sparse:
            loaded = replace(loaded, proves=f"{loaded.proves}, from files with the uploaded files' headers")
        loaded = loaded.since(start)
        if not loaded.passed:
            found = ModelResults((Check("parity", None, "transformers did not load the model"),))
        elif not with_parity:
            found = ModelResults((Check("parity", None, "--no-parity"),))
        else:
            found = self._compare(folder, source, progress, converted, is_sparse, thorough)
        start = time.monotonic()
        progress("checking the image processor", 0, 1, "steps")
        preprocessing = check_preprocessing(folder, self.plan, self.image).since(start)
        return replace(found, checks=(loaded, *found.checks, preprocessing))

    def _compare(
        self, folder: Path, source: OpenSource, progress: Progress, converted: Any, is_sparse: bool, thorough: bool
    ) -> ModelResults:
        """Run both models and compare their outputs."""
        start = time.monotonic()
        targets = source_tensors_of(converted, self.plan, folder) if is_sparse else {}
        if targets is None:
            why = "this system does not report where weights are loaded from"
            return ModelResults((Check("parity", None, why),))
        try:
            weights, why_streamed = load_weights(self.original, source)
        except Exception as error:  # torch rejects the file, or the model its tensors
            refuse_machine_failure(error)
            problem = f"{type(error).__name__}: {error}"
            if self.reference != BUILTIN:
                message = f"The reference {self.reference} does not accept the source's tensors: {problem}"
                raise UsageError(f"{message}. Use --reference builtin.") from error
            return ModelResults((Check("parity", False, PROVES, (problem,)),))
        cast_to = torch_dtype(self.plan.cast_to) if self.plan.cast_to else None
        buffer = WeightBuffer(self.device)
        original = OffloadedModel(self.original, self.device, buffer, weights, cast_to)
        own = StreamedWeights(targets, source.reader) if targets else MappedWeights(converted.state_dict())
        model = OffloadedModel(converted, self.device, buffer, own)
        is_read_once, native_size = source.is_remote or is_sparse, self.plan.native_size
        pair = Pair(
            original,
            model,
            self.architecture,
            self.plan.dimensions,
            native_size,
            self.device,
            progress,
            cast_to,
            is_read_once,
        )
        default_dtype = default_dtype_of(converted.config)
        image, parity_pixels = self._parity_input()
        check, verdict = check_parity(pair, "parity", parity_pixels, default_dtype)
        checks = [self._described(check, is_sparse, why_streamed).since(start)]
        if thorough and check.passed and native_size > self._max_size:
            why = f"images of {native_size:,} pixels a side would take too much memory"
            checks.append(Check("native", None, why))
        elif thorough and check.passed and parity_pixels.shape[-1] != native_size:
            start = time.monotonic()
            pixels = to_pixels(resize(self.image, native_size), self.plan.pixel_steps, self.plan.channels)
            native, _ = check_parity(replace(pair, is_read_once=True), "native", pixels, default_dtype)
            checks.append(self._described(native, is_sparse, why_streamed).since(start))
        outputs = verdict.outputs if verdict is not None else {}
        return ModelResults(
            tuple(checks),
            predictions=top_predictions(outputs["logits"][1], pair.config) if "logits" in outputs else (),
            pictures=draw_pictures(image, *outputs["patches"]) if "patches" in outputs else {},
            cast_cost=verdict.cast_cost if verdict is not None else None,
        )

    def _parity_input(self) -> tuple[Image.Image, Tensor]:
        """The image as both models see it, and its pixels: at the image processor's size if that is a square.

        Without an image processor, it is the native size. A larger image than `_max_size` is made smaller.
        """
        steps, patch = self.plan.pixel_steps, self.plan.patch_size
        height, width = steps.size or (0, 1) if steps is not None else (0, 1)
        if steps is not None and height == width <= self._max_size and height % patch == 0:
            image = crop(self.image, steps)
        else:
            image = resize(self.image, min(self.plan.native_size, self._max_size))
        return image, to_pixels(image, steps, self.plan.channels)

    @property
    def _max_size(self) -> int:
        return self.plan.patch_size * MAX_PATCHES

    def _described(self, check: Check, is_sparse: bool, why_streamed: str) -> Check:
        """Add to what a comparison of outputs proves how the weights were read, and what was assumed."""
        proves = check.proves
        if is_sparse:
            proves += "; transformers with the source's weights, located by the uploaded files' headers"
        if self.plan.assumed_heads is not None:
            proves += f", assuming {self.plan.assumed_heads} attention heads in both models, which tensors do not show"
        # What applies to every size is stated once.
        unproved = self.plan.unproved if check.name == "parity" else ()
        gaps = filter(None, [check.not_checked, why_streamed, *unproved])
        return replace(check, proves=proves, not_checked="; ".join(gaps))


def top_predictions(logits: Tensor, config: Any) -> tuple[tuple[str, float], ...]:
    """The most probable labels of (1, K) logits, with their probabilities; none if the logits are not finite."""
    if not logits.isfinite().all():
        return ()
    is_multi_label = getattr(config, "problem_type", None) == "multi_label_classification"  # as transformers' pipeline
    probabilities = logits[0].sigmoid() if is_multi_label else logits[0].softmax(-1)
    values, ids = probabilities.topk(min(PREDICTION_COUNT, logits.shape[-1]))
    return tuple((config.id2label[int(i)], float(value)) for i, value in zip(ids, values, strict=True))


def _too_large_files(folder: Path) -> tuple[str, ...]:
    """List the JSON files in a folder that are larger than any that streamconv writes."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.json")) if path.is_file()}
    return tuple(f"{name} has {size:,} bytes" for name, size in sizes.items() if size > MAX_JSON_BYTES)
