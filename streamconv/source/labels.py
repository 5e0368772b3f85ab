"""The names of a classifier's classes: from the user, from the Hub, or from torchvision."""

import ast
import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamconv.errors import SourceError, UsageError
from streamconv.files.local import read_small

HUB_DATASET, HUB_FILE = "huggingface/label-files", "imagenet-1k-id2label.json"


def read_labels(path: Path) -> list[str]:
    """Labels in class order: a JSON list or object of id to label, or a text with one label a line.

    Raises:
        UsageError: the file is not there, or is none of these.
    """
    try:
        text = read_small(path).decode("utf-8-sig")
    except (SourceError, ValueError) as error:
        raise UsageError(f"The labels in {path} cannot be read: {error}.") from error
    if path.suffix.lower() != ".json":
        return text.rstrip().splitlines()
    try:
        labels = json.loads(text)
        if isinstance(labels, dict):
            labels = [labels[str(i)] for i in range(len(labels))]
    except (ValueError, KeyError, RecursionError) as error:
        raise UsageError(f'{path} is no JSON of labels ({error}): {{"0": …, "1": …}} or a list.') from error
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise UsageError(f'{path} is no JSON of labels: {{"0": …, "1": …}} or a list of strings.')
    return labels


def labels_in(config: Mapping[str, Any]) -> list[str]:
    """Those of a config.json in class order; none where it says none."""
    try:
        labels = config["id2label"]
        return [labels[str(i)] for i in range(len(labels))]
    except (KeyError, TypeError):
        return []


def imagenet_labels() -> tuple[list[str], str]:
    """ImageNet's 1000 labels and where they came from.

    The Hub's file, as the original script has it; without a network, torchvision's list, whose
    names are shorter ("tench" for "tench, Tinca tinca").
    """
    hub = _hub_labels()
    if hub is not None:
        return hub, f"{HUB_DATASET} on the Hub"
    return _torchvision_labels(), f"torchvision's list, since {HUB_DATASET} on the Hub cannot be reached"


def _hub_labels() -> list[str] | None:
    """Fetched or found in the Hub's cache by a process of its own: an HTTP client costs 20 MB."""
    import subprocess  # for classifiers only

    command = [sys.executable, "-m", "streamconv.source.labels"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return read_labels(Path(done.stdout.strip())) if done.returncode == 0 else None


def _print_hub_path() -> None:
    """What that process does; without a network it ends with an error at once."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    path = try_to_load_from_cache(HUB_DATASET, HUB_FILE, repo_type="dataset")
    if not isinstance(path, str):
        # Asks once, where the download would ask without a network for half a minute.
        get_hf_file_metadata(hf_hub_url(HUB_DATASET, HUB_FILE, repo_type="dataset"), timeout=5)
        path = hf_hub_download(HUB_DATASET, HUB_FILE, repo_type="dataset")
    print(path)


def _torchvision_labels() -> list[str]:
    """Read from torchvision's source: importing torchvision would import torch."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError("There are no labels: the Hub cannot be reached and torchvision is missing. Give --labels.")
    source = Path(spec.submodule_search_locations[0], "models", "_meta.py").read_text("utf-8")
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "_IMAGENET_CATEGORIES":
            return list(ast.literal_eval(statement.value))
    raise UsageError("There are no labels: the Hub cannot be reached and torchvision has none. Give --labels.")


if __name__ == "__main__":
    _print_hub_path()
