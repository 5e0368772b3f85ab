"""Chooses the number of attention heads, which tensors do not show, and records where it comes from.

The user's number comes first, then that of the model's own config.json, then that of a config.json beside a file in its
authors' names. Without these it is the family's: a fact for a published model, an inference for other tensors of the
same size, and a guess for any other size.
"""

from dataclasses import dataclass, replace
from typing import Any

from streamconv.errors import UsageError
from streamconv.families.selection import Selection


@dataclass(frozen=True)
class ChosenHeads:
    """The dimensions with the number of heads that was chosen.

    ``assumed`` is the number if no config.json confirms it. ``note`` states its origin;
    ``unproved`` states what verification cannot prove because of it. Both may be empty.
    """

    dimensions: Any
    assumed: int | None = None
    note: str = ""
    unproved: str = ""


def choose_heads(dimensions: Any, selection: Selection, num_heads: int | None) -> ChosenHeads:
    """Apply the number that the user gave, or else a config.json.

    Raises:
        UsageError: ``num_heads`` is given for a family that does not have this aspect, or contradicts a config.json.
    """
    family, heads = selection.family, selection.family.attention_heads
    if heads is None:
        if num_heads is not None:
            raise UsageError(f"A {family.name} model has no number of heads to choose. Omit --num-heads.")
        return ChosenHeads(dimensions)
    number = heads.number_in(selection.config)
    is_guess = number is not None and number == selection.guessed_heads
    if num_heads is not None:
        if number not in (None, num_heads) and not is_guess:
            raise UsageError(
                f"The config.json of the source gives {number} attention heads. Omit --num-heads, or correct the file."
            )
        chosen = heads.with_number(dimensions, num_heads)
        if heads.are_shown(dimensions):  # the family lists another number as a problem
            return ChosenHeads(chosen)
        return ChosenHeads(chosen, num_heads, f"{num_heads} attention heads, as given by --num-heads")
    if heads.are_shown(dimensions):
        return ChosenHeads(dimensions)
    if number is not None:
        chosen = heads.with_number(dimensions, number)
        if not is_guess:
            return ChosenHeads(chosen)
        note = f"{number} attention heads, assumed earlier: tensors do not show the number (--num-heads)"
        return ChosenHeads(chosen, number, note, _unproved(number))
    if (number := heads.number_beside(selection.config_beside, dimensions)) is not None:
        note = f"{number} attention heads, as stated by the config.json beside it"
        return ChosenHeads(heads.with_number(dimensions, number), note=note)
    number = heads.number(dimensions)
    if not number:  # which the family lists as a problem
        return ChosenHeads(dimensions)
    note = f"{number} attention heads of {heads.reason(dimensions)}: tensors do not show the number (--num-heads)"
    is_guess = not heads.is_published(dimensions)
    return ChosenHeads(dimensions, number, note, _unproved(number) if is_guess else "")


def with_given_heads(selection: Selection, num_heads: int | None) -> Selection:
    """Replace a guess in the source's config.json by the number that the user gave, which `choose_heads` accepted."""
    heads = selection.family.attention_heads
    if heads is None or num_heads is None or heads.number_in(selection.config) in (None, num_heads):
        return selection
    return replace(selection, config={**selection.config, heads.config_key: num_heads})


def _unproved(number: int) -> str:
    return f"the number of attention heads ({number}) is assumed: give --num-heads if you know it"
