"""The labels of a classifier: read from the user's file, a config.json, the Hub, or torchvision.

A head's tensors do not contain the names of its classes, but config.json needs them.
"""

import importlib.util
import os
import sys
from collections.abc import Mapping
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from streamconv.errors import SourceError, UsageError
from streamconv.files.hub_settings import hub_endpoint
from streamconv.files.local import read_small
from streamconv.formats.limits import MAX_SETTINGS_BYTES, TooLargeError, parse_small_json

_MAX_LABELS = 100_000  # the largest classifiers have 22,000
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # where `str.splitlines` splits
HUB_DATASET, HUB_FILE = "huggingface/label-files", "imagenet-1k-id2label.json"


def read_labels(path: Path) -> list[str]:
    """Read labels in class order: from a JSON list, a JSON object of ids to labels, or text with one label per line.

    Raises:
        UsageError: the file cannot be read, or is none of these.
    """
    try:
        data = read_small(path)
        text = data.decode("utf-8-sig") if path.suffix.lower() != ".json" else ""
    except (SourceError, ValueError) as error:
        raise UsageError(f"The labels in {path} cannot be read: {str(error).rstrip('.')}.") from error
    if path.suffix.lower() != ".json":
        if len(data) > MAX_SETTINGS_BYTES or sum(map(text.count, _LINE_ENDS)) > _MAX_LABELS:
            raise UsageError(f"{path} holds more than the labels of any model. Give one label per line.")
        return text.rstrip().splitlines()
    try:
        labels = parse_small_json(data)
        if isinstance(labels, dict):
            labels = [labels[str(i)] for i in range(len(labels))]
    except TooLargeError as error:
        raise UsageError(f"{path} {error} than the labels of any model.") from None
    except (ValueError, KeyError) as error:
        raise UsageError(
            f'{path} is not a JSON file of labels ({error}). Write {{"0": …, "1": …}} or a list of strings.'
        ) from error
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise UsageError(f'{path} is not a JSON file of labels. Write {{"0": …, "1": …}} or a list of strings.')
    return labels


def labels_in(config: Mapping[str, Any]) -> list[str]:
    """Return the labels in a config.json, in class order; an empty list if it has none, or some are not strings."""
    try:
        ids = config["id2label"]
        labels = [ids[str(i)] for i in range(len(ids))]
    except (KeyError, TypeError):
        return []
    return labels if all(isinstance(label, str) for label in labels) else []


def imagenet_labels() -> tuple[list[str], str]:
    """Return ImageNet's 1000 labels and where they came from.

    They are those of the Hub's file, which the original script uses. If the Hub cannot be reached, they are
    torchvision's, which are shorter ("tench" for "tench, Tinca tinca").

    Raises:
        UsageError: neither is available, or HF_ENDPOINT is not a URL.
    """
    hub = _hub_labels()
    if hub is not None:
        return hub, f"{HUB_DATASET} on the Hub"
    return _torchvision_labels(), f"torchvision's list, since {HUB_DATASET} on the Hub cannot be reached"


def _hub_labels() -> list[str] | None:
    """Download the Hub's file or find it in the cache, in a separate process: an HTTP client costs 20 MB."""
    environment = {**os.environ, "HF_ENDPOINT": hub_endpoint().geturl()}
    import subprocess  # only classifiers need it

    command = [sys.executable, "-m", "streamconv.source.labels"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    return read_labels(Path(done.stdout.strip())) if done.returncode == 0 else None


def _print_hub_path() -> None:
    """Print the path of the Hub's file: the job of that process. Without a network, it fails at once."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    path = try_to_load_from_cache(HUB_DATASET, HUB_FILE, repo_type="dataset")
    if not isinstance(path, str):
        # One request with a short timeout: without a network, the download would retry for half a minute.
        get_hf_file_metadata(hf_hub_url(HUB_DATASET, HUB_FILE, repo_type="dataset"), timeout=5)
        path = hf_hub_download(HUB_DATASET, HUB_FILE, repo_type="dataset")
    print(path)


def _torchvision_labels() -> list[str]:
    """Load the module with torchvision's labels by its path: importing torchvision would import torch."""
    package = importlib.util.find_spec("torchvision")
    if package is None or not package.submodule_search_locations:
        raise UsageError("No labels found: the Hub cannot be reached and torchvision is missing. Give --labels.")
    path = Path(package.submodule_search_locations[0], "models", "_meta.py")  # which imports nothing
    module = ModuleType("torchvision_meta")
    try:
        SourceFileLoader(module.__name__, str(path)).exec_module(module)
        return list(module._IMAGENET_CATEGORIES)
    except (OSError, AttributeError) as error:
        raise UsageError(
            f"No labels found: the Hub cannot be reached and torchvision has none ({error}). Give --labels."
        ) from error


if __name__ == "__main__":
    _print_hub_path()
