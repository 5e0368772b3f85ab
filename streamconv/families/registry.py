"""The known families and their published models. Every module of this package with a ``FAMILY`` adds one."""

import copyreg
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from functools import cache

from streamconv import families
from streamconv.errors import UsageError
from streamconv.families.base import Family, Model, RemoteFile
from streamconv.families.near_names import did_you_mean, near_names


@cache
def all_families() -> Sequence[Family]:
    names = (f"{families.__name__}.{each.name}" for each in pkgutil.iter_modules(families.__path__))
    modules = (importlib.import_module(name) for name in names)
    return tuple(module.FAMILY for module in modules if hasattr(module, "FAMILY"))


def family_named(name: str) -> Family:
    """Return the family of that name.

    Raises:
        KeyError: there is no such family.
    """
    return {family.name: family for family in all_families()}[name]


def _reduced(family: Family) -> tuple[Callable[[str], Family], tuple[str]]:
    return family_named, (family.name,)


copyreg.pickle(Family, _reduced)  # by its name: a family's functions cannot be pickled


def is_model(name: str) -> bool:
    """Return whether a published model has this name; its name on the Hub does not count."""
    return any(model.name == name for family in all_families() for model in family.models)


def is_hub_name(name: str) -> bool:
    """Return whether a model was published on the Hub under this name, such as dinov2-base or facebook/dinov2-base."""
    return name in _by_hub_name()


def find_model(name: str) -> tuple[Family, Model]:
    """Return the model of that name, or the one that was published on the Hub under it, and its family.

    Raises:
        UsageError: there is no such model; suggests the nearest names.
    """
    models = _by_hub_name() | {model.name: (family, model) for family in all_families() for model in family.models}
    if name in models:
        return models[name]
    raise UsageError(f"{name!r} is not a model that streamconv knows. {suggest_models(name)}")


def published_files() -> frozenset[RemoteFile]:
    """Return the files of all published models."""
    models = [model for family in all_families() for model in family.models]
    return frozenset(file for model in models for file in (model.backbone, model.head) if file is not None)


def _by_hub_name() -> dict[str, tuple[Family, Model]]:
    """Return every model by its names on the Hub: with and without its organisation."""
    return {
        owner + model.published_name: (family, model)
        for family in all_families()
        for model in family.models
        for owner in ("", f"{family.organisation}/")
    }


def suggest_models(name: str) -> str:
    """Return a sentence with the models that ``name`` may stand for, or else how to list all."""
    return did_you_mean(near_models(name)) or "`streamconv models` lists them."


def near_models(name: str) -> list[str]:
    """Return the names of models that ``name`` may stand for; it may be like a published name, with its owner."""
    models = [model for family in all_families() for model in family.models]
    names = {model.published_name: model.name for model in models} | {model.name: model.name for model in models}
    return list(dict.fromkeys(names[each] for each in near_names(name.rpartition("/")[2], names)))
