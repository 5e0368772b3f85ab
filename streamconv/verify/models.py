"""The rungs that run models, in their order, and what they leave to look at."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from torch import Tensor

from streamconv.plan import Plan
from streamconv.progress import Progress
from streamconv.sources import OpenSource
from streamconv.verify import Rung
from streamconv.verify.devices import MemoryWatch, choose_device, versions
from streamconv.verify.image import open_image
from streamconv.verify.load import check_load
from streamconv.verify.mapped import return_freed_buffers
from streamconv.verify.offload import OffloadedModel
from streamconv.verify.parity import PROVES, Pair, check_parity
from streamconv.verify.pictures import draw_pictures
from streamconv.verify.preprocessing import check_preprocessing
from streamconv.verify.reference import BUILTIN, HUB, build_original, load_weights

TOP = 5


@dataclass(frozen=True)
class Found:
    """The models' part of a `Verification`."""

    rungs: tuple[Rung, ...]
    memory: Mapping[str, int | None]
    predictions: tuple[tuple[str, float], ...] = ()
    pictures: Mapping[str, str] = field(default_factory=dict)


class Models:
    """What a verification runs on; all that a user can get wrong is refused when it is made."""

    def __init__(self, plan: Plan, device: str, image: str | PathLike[str] | None, reference: str | PathLike[str]):
        self.plan = plan
        self.device, self.image = choose_device(device), open_image(image)
        self.original, self.states = build_original(plan, reference)
        self.reference = reference if reference in (BUILTIN, HUB) else f"folder {Path(reference).resolve().name}"
        self.versions = versions()

    def check(self, folder: Path, source: OpenSource, progress: Progress) -> Found:
        """Load, parity and preprocessing; the latter two only with a model that transformers loads."""
        return_freed_buffers()
        memory, start = MemoryWatch(self.device), time.monotonic()
        progress("loading with transformers", 0, 1, "steps")
        loaded, converted = check_load(folder, self.plan)
        loaded = loaded.since(start)
        if not loaded.passed:
            why = "transformers did not load the model"
            return Found((loaded, Rung("parity", None, why), Rung("preprocessing", None, why)), memory.as_dict())
        start = time.monotonic()
        try:
            load_weights(self.original, source)
        except Exception as error:  # torch refuses the source, or the graph its tensors
            parity = Rung("parity", False, PROVES, (f"{type(error).__name__}: {error}",))
            why = "torch did not load the original"
            return Found((loaded, parity, Rung("preprocessing", None, why)), memory.as_dict())
        pair = Pair(
            OffloadedModel(self.original, self.device),
            self.states,
            OffloadedModel(converted, self.device),
            self.device,
            progress,
            memory,
        )
        parity, comparison = check_parity(pair, self.plan, self.image)
        parity, start_next = parity.since(start), time.monotonic()
        preprocessing = check_preprocessing(pair, folder, self.plan, self.image).since(start_next)
        rungs = (loaded, parity, preprocessing)
        if comparison is None:
            return Found(rungs, memory.as_dict())
        predictions: tuple[tuple[str, float], ...] = ()
        if "logits" in comparison.kept:
            predictions = best(comparison.kept["logits"][1], pair.config.id2label)
        pictures = draw_pictures(self.image, *comparison.kept["patches"]) if "patches" in comparison.kept else {}
        return Found(rungs, memory.as_dict(), predictions, pictures)


def best(logits: Tensor, labels: Mapping[int, str]) -> tuple[tuple[str, float], ...]:
    """The best `TOP` labels of (1, K) logits, with their shares."""
    shares, ids = logits[0].softmax(-1).topk(min(TOP, logits.shape[-1]))
    return tuple((labels[int(i)], float(share)) for i, share in zip(ids, shares, strict=True))
