"""Every module can be reached by its dotted name: no function of a package hides one."""

import importlib
import pkgutil
from types import ModuleType

import streamconv


def hidden_modules(package: ModuleType) -> list[str]:
    hidden = []
    for each in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        if each.name == "streamconv.__main__":
            continue
        module = importlib.import_module(each.name)
        if getattr(package, each.name.rpartition(".")[2]) is not module:
            hidden.append(each.name)
        if each.ispkg:
            hidden += hidden_modules(module)
    return hidden


def test_no_name_of_a_package_hides_a_module_of_it() -> None:
    assert hidden_modules(streamconv) == []


def test_a_hidden_module_is_found() -> None:
    real = streamconv.jobs
    streamconv.jobs = lambda: None  # type: ignore[assignment, attr-defined]
    try:
        assert "streamconv.jobs" in hidden_modules(streamconv)
    finally:
        streamconv.jobs = real  # type: ignore[attr-defined]
