"""Finds the names that a mistyped one may stand for."""

from collections.abc import Iterable, Sequence

MIN_LETTERS = 3  # shorter words are parts of too many names
MAX_COMPARED, MAX_COMPARED_LETTERS = 1_000, 100  # names that are compared to find a typing error, and their length


def near_names(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Return the ``known`` names nearest to ``name``, the likeliest first.

    A name that differs only in case and in "-" for "_" is the only one. Otherwise names that start with ``name`` come
    first, then those that contain it, shorter ones before longer ones; then those that ``name`` starts with, longer
    ones before shorter ones, and names that are spelled alike.

    >>> near_names("vit_b", ["vit_base", "deit_base", "vit_b14"])
    ['vit_b14', 'vit_base']
    """
    word, spellings = _spelling(name), {each: _spelling(each) for each in known}
    equal = [each for each, spelling in spellings.items() if spelling == word]
    if equal or len(word) < MIN_LETTERS:
        return equal[:count]
    starting = [each for each, spelling in spellings.items() if spelling.startswith(word)]
    containing = [each for each, spelling in spellings.items() if word in spelling]
    found = [*sorted(starting, key=len), *sorted(containing, key=len)]
    if not found:
        import difflib  # takes memory, which only a mistyped name should pay

        shorter = [
            each for each, spelling in spellings.items() if word.startswith(spelling) and len(spelling) >= MIN_LETTERS
        ]
        # Long words take long to compare, and there may be thousands of names. Names that people type are short.
        comparable = [each for each in spellings.values() if len(each) <= MAX_COMPARED_LETTERS]
        alike = (
            difflib.get_close_matches(word, comparable[:MAX_COMPARED], n=count, cutoff=0.7)
            if len(word) <= MAX_COMPARED_LETTERS
            else []
        )
        found = sorted(shorter, key=len, reverse=True)
        found += [each for match in alike for each, spelling in spellings.items() if spelling == match]
    return list(dict.fromkeys(found))[:count]


def did_you_mean(names: Sequence[str]) -> str:
    """Return the question for a message, "Did you mean a, b or c?"; nothing if there are no names."""
    if not names:
        return ""
    *others, last = names
    return f"Did you mean {', '.join(others)} or {last}?" if others else f"Did you mean {last}?"


def _spelling(name: str) -> str:
    return name.casefold().replace("-", "_")
