"""The checks that run models (load, parity, preprocessing), in order, with the predictions and pictures they yield."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path

from torch import Tensor

from streamconv.errors import UsageError
from streamconv.planning.plan import Plan
from streamconv.progress import Progress
from streamconv.source.open import OpenSource
from streamconv.verification.devices import MemoryWatch, choose_device, versions
from streamconv.verification.image import open_image
from streamconv.verification.load import check_load
from streamconv.verification.offload import OffloadedModel, StreamedWeights, torch_dtype
from streamconv.verification.parity import PROVES, Pair, check_parity
from streamconv.verification.patch_pca import draw_pictures
from streamconv.verification.preprocessing import check_pixels, check_preprocessing
from streamconv.verification.reference import BUILTIN, HUB, build_original, load_weights
from streamconv.verification.result import Check
from streamconv.verification.sparse_folder import source_tensors_of

PREDICTION_COUNT = 5


@dataclass(frozen=True)
class ModelResults:
    """The models' part of a `Verification`."""

    checks: tuple[Check, ...]
    memory: Mapping[str, int | None] = field(default_factory=dict)
    predictions: tuple[tuple[str, float], ...] = ()
    pictures: Mapping[str, str] = field(default_factory=dict)


class ModelVerifier:
    """The device, image and original model of a verification. Creating it rejects every wrong option."""

    def __init__(self, plan: Plan, device: str, image: str | PathLike[str] | None, reference: str | PathLike[str]):
        self.plan = plan
        self.device, self.image = choose_device(device), open_image(image)
        self.original, self.architecture = build_original(plan, reference)
        self.reference = reference if reference in (BUILTIN, HUB) else f"folder {Path(reference).resolve().name}"
        self.versions = versions()

    def check(
        self, folder: Path, source: OpenSource, progress: Progress, parity: bool = True, is_sparse: bool = False
    ) -> ModelResults:
        """Run the load check and, if it passes, the parity and preprocessing checks.

        Args:
            parity: Run the models. Otherwise preprocessing compares only pixels.
            is_sparse: ``folder`` was written by `write_sparse_folder`; the converted model's weights come
                from the source, too.

        A remote source is read only once: for parity, not for preprocessing.
        """
        with MemoryWatch(self.device) as memory:
            found = self._check(folder, source, progress, parity, is_sparse)
            return replace(found, memory=memory.as_dict())

    def _check(
        self, folder: Path, source: OpenSource, progress: Progress, with_parity: bool, is_sparse: bool
    ) -> ModelResults:
        start = time.monotonic()
        progress("loading with transformers", 0, 1, "steps")
        loaded, converted = check_load(folder, self.plan)
        if is_sparse:
            loaded = replace(loaded, proves=f"{loaded.proves}, from files with the uploaded files' headers")
        loaded = loaded.since(start)
        if not loaded.passed:
            why = "transformers did not load the model"
            return ModelResults((loaded, Check("parity", None, why), Check("preprocessing", None, why)))
        start = time.monotonic()
        targets = source_tensors_of(converted, self.plan, folder) if is_sparse else {}
        if not with_parity or targets is None:
            why = "this system does not report where weights are loaded from" if with_parity else "--no-parity"
            pixels = self._check_preprocessing(folder, None).since(start)
            return ModelResults((loaded, Check("parity", None, why), pixels))
        try:
            weights, why = load_weights(self.original, source, self.device, self.plan.cast_to)
        except Exception as error:  # torch rejects the file, or the model its tensors
            problem = f"{type(error).__name__}: {error}"
            if self.reference != BUILTIN:
                message = f"The reference {self.reference} does not accept the source's tensors: {problem}"
                raise UsageError(f"{message}. Use --reference builtin.") from error
            parity = Check("parity", False, PROVES, (problem,))
            why = "torch did not load the original"
            return ModelResults((loaded, parity, Check("preprocessing", None, why)))
        cast_to = torch_dtype(self.plan.cast_to) if self.plan.cast_to else None
        original = OffloadedModel(self.original, self.device, weights, cast_to)
        model = OffloadedModel(
            converted, self.device, StreamedWeights(targets, source.reader, self.device) if targets else None
        )
        pair = Pair(original, model, self.architecture, self.plan.dimensions, self.device, progress)
        parity, comparison = check_parity(pair, self.plan, self.image)
        if is_sparse:
            proves = f"{parity.proves}; transformers with the source's weights, located by the uploaded files' headers"
            parity = replace(parity, proves=proves)
        heads = self.plan.family.attention_heads
        if self.plan.model is None and heads is not None:
            number = heads.number(self.plan.dimensions)
            assumed = f"assuming {number} attention heads in both models, which tensors do not show"
            parity = replace(parity, proves=f"{parity.proves}, {assumed}")
        if why:
            parity = replace(parity, not_checked="; ".join(filter(None, [parity.not_checked, why])))
        parity, start_next = parity.since(start), time.monotonic()
        is_read_again = not source.is_remote and not is_sparse
        preprocessing = self._check_preprocessing(folder, pair if is_read_again else None).since(start_next)
        kept = comparison.kept if comparison is not None else {}
        predictions = top_predictions(kept["logits"][1], pair.config.id2label) if "logits" in kept else ()
        pictures = draw_pictures(self.image, *kept["patches"]) if "patches" in kept else {}
        return ModelResults((loaded, parity, preprocessing), {}, predictions, pictures)

    def _check_preprocessing(self, folder: Path, pair: Pair | None) -> Check:
        """Check the pixels, and what both models compute from them if there is a pair."""
        pixel_steps = self.plan.pixel_steps
        if pixel_steps is None:
            return Check("preprocessing", None, f"{self.plan.family_name} models have no image processor")
        if pair is None:
            check = check_pixels(folder, pixel_steps, self.image)
        else:
            check = check_preprocessing(pair, folder, pixel_steps, self.image)
        if self.plan.model is None:
            check = replace(check, proves=f"{check.proves}, assuming the preprocessing of the published models")
        return check


def top_predictions(logits: Tensor, labels: Mapping[int, str]) -> tuple[tuple[str, float], ...]:
    """The most probable labels of (1, K) logits, with their probabilities; none if the logits are not finite."""
    if not logits.isfinite().all():
        return ()
    probabilities, ids = logits[0].softmax(-1).topk(min(PREDICTION_COUNT, logits.shape[-1]))
    return tuple((labels[int(i)], float(probability)) for i, probability in zip(ids, probabilities, strict=True))
