"""Reads the small files beside the weights of a model that was converted before: its configuration and image processor.

They record what tensors do not show. They may be absent, in a folder or at a URL; but a file that is there and cannot
be read is an error, since a model without its own settings would compute something else.
"""

import os
from codecs import BOM_UTF8
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamconv.display import printable
from streamconv.errors import CorruptError, OutputError, RefusedError, SourceError, SourceMissingError
from streamconv.families.image_processors import UnknownStepsError, class_name
from streamconv.families.selection import Selection
from streamconv.files.address import Address, Location
from streamconv.files.base import ByteRange
from streamconv.files.local import read_small
from streamconv.files.open import open_file
from streamconv.formats.limits import MAX_SETTINGS_BYTES, read_settings
from streamconv.output.files import as_output_error, make_folder, write_file
from streamconv.output.manifest import Manifest
from streamconv.planning.plan import CONFIG_NAME, IMAGE_PROCESSOR_NAME
from streamconv.planning.shards import to_json
from streamconv.source.cache import torch_hub_cache
from streamconv.tensors.info import TensorInfo

MAX_DEPTH = 3  # of a backbone's configuration in that of a larger model
_OWN_KEYS = {"hidden_size", "num_hidden_layers"}  # of a configuration that lacks the model's type


def with_small_files(selection: Selection, location: Location, infos: Mapping[str, TensorInfo]) -> Selection:
    """Return the selection with the configuration and image processor beside its weights, a file or a folder.

    If they are a larger model's, the configuration is the part for the backbone, and the image processor is left out
    unless its steps are known. ``infos`` are the selected tensors. Beside a file in its authors' names, there
    may be a config.json that has nothing to do with it.

    Raises:
        SourceError: a file of a model that was converted before cannot be read, or is not a JSON object.
    """
    if not selection.is_converted:
        return _with_config_beside(selection, location, infos)
    notes: list[str] = []
    whole, _ = _read(location, CONFIG_NAME, notes)
    processor, processor_file = _read(location, IMAGE_PROCESSOR_NAME, notes)
    types = _model_types(selection)
    found = list(_parts(whole, types)) if whole is not None else []
    if whole is not None and "model_type" not in whole and whole.keys() >= _OWN_KEYS:
        found = [whole]
    config = found[0] if found and all(each == found[0] for each in found) else {}
    if whole is not None and config is not whole:
        kind = (
            f"{printable(str(whole['model_type']))} model's configuration"
            if "model_type" in whole
            else "configuration without a type"
        )
        if config:
            notes.append(f"{CONFIG_NAME}: the {selection.family.name} part of a {kind}")
        else:
            why = f"{len(found)} different parts" if found else "no part"
            notes.append(f"{CONFIG_NAME} is not used: it is a {kind}, with {why} for {selection.family.name}")
        processor = _usable(processor, selection, notes)
    return replace(
        selection,
        config=config,
        guessed_heads=_guessed_heads(location),
        image_processor=processor,
        image_processor_file=processor_file,
        small_file_notes=tuple(notes),
    )


def _guessed_heads(location: Location) -> int | None:
    """Return the number of attention heads that config.json has only because streamconv guessed it."""
    if isinstance(location, Address):
        return None
    with suppress(OutputError):  # a manifest that cannot be read matters only to those who verify the folder itself
        manifest = Manifest.read(location if os.path.isdir(location) else location.parent)
        return manifest.guessed_heads if manifest is not None else None
    return None


def _with_config_beside(selection: Selection, location: Location, infos: Mapping[str, TensorInfo]) -> Selection:
    """Add the config.json beside a file in its authors' names, which may state what tensors do not show.

    At a URL, where that takes a request, it is read only if that would otherwise be a guess.
    """
    family, sizes = selection.family, selection.family.read_dimensions(infos)
    heads, processor = family.attention_heads, family.image_processor
    is_published = any(model.dimensions == sizes for model in family.models)
    beside = None if is_published or processor is None else processor.beside
    is_guess = heads is not None and not (isinstance(location, Address) and heads.is_published(sizes))
    if beside is None and not is_guess:
        return selection
    try:
        config, _ = read_json_beside(location, CONFIG_NAME)
    except SourceError as error:
        return replace(selection, small_file_notes=(f"the {CONFIG_NAME} beside it is not used: {error}".rstrip("."),))
    config = config or {}
    return replace(selection, config_beside=config, image_processor=beside and beside(config, sizes))


def remember_small_files(selection: Selection, copy: Path) -> None:
    """Keep the small files found at a URL beside the ``copy`` of its weights, for `with_small_files` without a network.

    Raises:
        OutputError: a file cannot be written.
    """
    if copy.parent == torch_hub_cache():  # which is the folder of many models
        return
    config = selection.config if selection.is_converted else selection.config_beside
    processor = selection.image_processor_file if selection.image_processor is not None else b""
    for name, data in ((CONFIG_NAME, to_json(config) if config else b""), (IMAGE_PROCESSOR_NAME, processor)):
        path = copy.with_name(name)
        if not data:
            with as_output_error(path):
                path.unlink(missing_ok=True)
            continue
        with as_output_error(path):
            make_folder(path.parent)
        if not (path.is_file() and path.stat().st_size == len(data) and read_small(path) == data):
            write_file(path, data)


def read_json_beside(location: Location, name: str) -> tuple[dict[str, Any] | None, bytes]:
    """Read a JSON file in a folder, or beside a file. Return its contents and its bytes; None and b"" without one.

    Raises:
        RefusedError: the server refuses access, as some do to files that do not exist.
        SourceError: the file cannot be read, or is not a JSON object.
    """
    if isinstance(location, Address):
        address = location.beside(name)
        return (None, b"") if address is None else _read_address(address)
    path = (location if os.path.isdir(location) else location.parent) / name
    try:
        data = read_small(path)
    except SourceMissingError:
        return None, b""
    return read_settings(data, str(path)), data.removeprefix(BOM_UTF8)


def _read_address(address: Address) -> tuple[dict[str, Any] | None, bytes]:
    from streamconv.files.remote import WINDOW_BYTES  # only now, as a local conversion does not need it

    try:
        with closing(open_file(address)) as file:
            if file.size > MAX_SETTINGS_BYTES:
                raise SourceError(f"{address} has {file.size:,} bytes, more than the settings of any model.")
            if file.size > WINDOW_BYTES:  # which were read when it was opened
                file.prefetch([ByteRange(0, file.size)])
            data = file.read(0, file.size)
    except SourceMissingError:
        return None, b""
    if data.lstrip()[:1] == b"<":  # a web page, which some servers send instead of a 404
        return None, b""
    return read_settings(data, str(address)), data.removeprefix(BOM_UTF8)


def _read(location: Location, name: str, notes: list[str]) -> tuple[dict[str, Any] | None, bytes]:
    try:
        return read_json_beside(location, name)
    except RefusedError:
        notes.append(f"the server refuses to send {name}, which may therefore exist")
        return None, b""
    except CorruptError as error:
        fix = "Fetch it again" if isinstance(location, Address) else "Fetch it again, or correct it"
        raise CorruptError(f"{error} It describes the model beside it. {fix}.") from error
    except SourceError as error:
        raise type(error)(
            f"The {name} beside the weights, which describes the model, cannot be read: {error}"
        ) from error


def _model_types(selection: Selection) -> set[str]:
    family = selection.family
    return {str(family.conversion_spec(model.dimensions).config.get("model_type")) for model in family.models}


def _parts(config: dict[str, Any], types: Collection[str], depth: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the outermost configurations of these model types in a config.json."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in types:
        yield config
        return
    if depth < MAX_DEPTH:
        for value in config.values():
            if isinstance(value, dict):
                yield from _parts(value, types, depth + 1)


def _usable(processor: dict[str, Any] | None, selection: Selection, notes: list[str]) -> dict[str, Any] | None:
    """Return a larger model's image processor if the backbone can use it: if its steps are known."""
    aspect = selection.family.image_processor
    if processor is None or aspect is None:
        return None
    try:
        aspect.pixel_steps(processor)
    except UnknownStepsError:
        notes.append(f"the larger model's image processor, a {printable(class_name(processor))}, is not used")
        return None
    return processor
