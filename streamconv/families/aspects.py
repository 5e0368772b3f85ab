"""The aspects of a family: features that only some architectures have, each described by a dataclass."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamconv.families.image_processors import PixelSteps, class_name, read_pixel_steps


@dataclass(frozen=True)
class ExtraPrefix:
    """A prefix of names that are not part of the backbone.

    ``is_skipped``: such tensors are skipped automatically; otherwise the user must pass --select.
    """

    start: str
    reason: str
    is_skipped: bool = True


@dataclass(frozen=True)
class ClassifierHead:
    """A classifier's head, which the authors publish in a separate file.

    Its tensors are ``keys`` in that file, and ``prefix`` + key among a family's source keys. In a backbone's file, a
    head may also have one of the prefixes ``starts``. ``classes`` is the symbol in `ConversionSpec.dims` for the number
    of classes, 0 without a head; ``reads`` names the backbone's outputs that it reads. A head of ``imagenet_classes``
    classes gets ImageNet's labels, unless the user gives others.
    """

    prefix: str
    classes: str
    keys: frozenset[str] = frozenset({"weight", "bias"})
    imagenet_classes: int | None = None
    starts: frozenset[str] = frozenset()
    reads: str = ""


@dataclass(frozen=True)
class ImageProcessor:
    """The image processor of a family's models.

    ``default`` is its config for a model that was never published; a config of another class may take its place.
    ``beside`` returns the image processor that is described by a config.json next to a file in its authors' names; None
    unless the config clearly belongs to a model of these dimensions. ``authors_round``: the authors' own transform
    rounds resized images to whole grey levels, although the class of ``default`` does not.
    """

    default: Mapping[str, Any]
    beside: Callable[[Mapping[str, Any], Any], Mapping[str, Any] | None] | None = None
    authors_round: bool = False

    def pixel_steps(self, processor: Mapping[str, Any]) -> PixelSteps:
        """Return the steps that a preprocessor_config.json of such a model describes.

        Raises:
            UnknownStepsError: they are not known.
        """
        name = class_name(processor)  # without one, transformers takes the class that belongs to the model
        return read_pixel_steps(processor if name else {**processor, "image_processor_type": class_name(self.default)})


@dataclass(frozen=True)
class BlockChunks:
    """The keys of sources that keep their blocks in several lists, and so contain the number of the list, too.

    ``index`` is the index of the blocks in the rules. ``unchunked_key`` converts such a key to the key in the rules;
    ``chunked_key`` converts (key in the rules, number of blocks, number of lists) to the key in such a file.
    """

    unchunked_key: Callable[[str], str]
    chunked_key: Callable[[str, int, int], str]
    index: str = "i"


@dataclass(frozen=True)
class AttentionHeads:
    """The number of attention heads, which tensors do not show.

    ``number`` returns it for dimensions, 0 if it is not known; ``with_number`` returns the dimensions with another
    number, or equal ones if published models of their size have this number. ``is_published`` returns whether there are
    published models of this size, whose number is assumed; otherwise, the number is a guess. ``reason`` returns the
    reason for it. ``config_key`` is its name in config.json; transformers uses ``config_default`` if a model's own
    config.json does not have it.

    ``are_shown`` returns whether the tensors of this file show the number after all; it is then a fact.
    ``number_beside`` returns the number in a config.json next to a file in its authors' names; None unless the config
    clearly belongs to a model of these dimensions.
    """

    number: Callable[[Any], int]
    with_number: Callable[[Any, int], Any]
    is_published: Callable[[Any], bool]
    reason: Callable[[Any], str]
    number_beside: Callable[[Mapping[str, Any], Any], int | None] = lambda config, dimensions: None
    config_key: str = "num_attention_heads"
    config_default: int | None = None
    are_shown: Callable[[Any], bool] = lambda dimensions: False

    def number_in(self, config: Mapping[str, Any]) -> int | None:
        """Return the number that a model's config.json states; None if it states none."""
        number = config.get(self.config_key, self.config_default if "model_type" in config else None)
        return number if type(number) is int and number > 0 else None


@dataclass(frozen=True)
class DecidingValues:
    """Small tensors whose values, not only their shapes, decide how a checkpoint is converted.

    They are read while the plan is made. ``is_read`` selects them by their keys in the rules. ``summarise`` takes a key
    and the tensor's values, in row-major order, and returns a small summary of them, which can be compared;
    ``with_summaries`` returns the dimensions, changed by the summaries of all of them, by key.
    """

    is_read: Callable[[str], bool]
    summarise: Callable[[str, Sequence[float]], Any]
    with_summaries: Callable[[Any, Mapping[str, Any]], Any]
