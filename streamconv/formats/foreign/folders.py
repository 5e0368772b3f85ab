"""Recognises folders of other formats by the names in them, and links to missing files."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from streamconv.display import printable
from streamconv.errors import NotACheckpointError
from streamconv.formats.foreign.advice import merge_distributed, merge_zero, save_for_torch

_RANK_FILE = re.compile(r"(.*\D)??(rank[._-]?|mp_rank_)\d+(\D.*)?\.(pth|pt)")
_KINDS = (  # the folder holds a file or folder of each of these names
    (("saved_model.pb",), f"is a TensorFlow SavedModel. {save_for_torch('TensorFlow')}."),
    (("checkpoint", r".*\.index"), f"is a TensorFlow checkpoint. {save_for_torch('TensorFlow')}."),
    (
        ("_METADATA|_CHECKPOINT_METADATA|manifest.ocdbt",),
        f"is an Orbax checkpoint. {save_for_torch('JAX')}.",
    ),
    ((r"model\.weights\.h5", "config.json"), f"is a Keras model. {save_for_torch('Keras')}."),
    ((r"openvino_model\.xml",), "is an OpenVINO model. Use the checkpoint that it was converted from."),
    (("Manifest.json", "Data"), "is a Core ML package. Use the checkpoint that it was converted from."),
)


def describe_folder(folder: Path, names: Sequence[str]) -> str:
    """Return what a folder with these names is and what to do, as the end of a sentence; "" if it is not known."""
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        return f"is a distributed checkpoint (DCP) of torch. {merge_distributed(str(folder))}."
    if "data.pkl" in names:
        parent, name = map(quote, (str(folder.absolute().parent), folder.absolute().name))
        return f"is an unpacked .pth. Pack it again: `cd {parent} && zip -0 -r -D OUT.pth {name}`."
    if "zero_to_fp32.py" in names or ("latest" in names and any(map(re.compile("global_step").match, names))):
        return f"is a DeepSpeed (ZeRO) checkpoint. {merge_zero(str(folder))}."
    if any(re.fullmatch(r".*_(model|optim)_states\.pt", name) for name in names):
        return f"is part of a DeepSpeed (ZeRO) checkpoint. {merge_zero(str(folder.parent))}."
    if "latest_checkpointed_iteration.txt" in names or any(map(re.compile(r"mp_rank_\d\d(_\d+)*$").match, names)):
        return "is a Megatron checkpoint. Convert it to one file with Megatron's own tools first."
    models = [name for name in names if name.startswith("models--")]
    if models:
        return f"is the Hub's cache. Give one of its folders, such as {printable(models[0])}."
    ranks = [name for name in names if _RANK_FILE.fullmatch(name)]
    if len(ranks) > 1:
        return (
            f"holds {len(ranks):,} files, each written by one process, such as {printable(ranks[0])}. If FSDP sharded "
            "the model, each has only a part of it: give the teacher_checkpoint.pth that training writes at each "
            "evaluation. Otherwise, give one of these files."
        )
    for wanted, kind in _KINDS:
        if all(any(re.fullmatch(each, name) for name in names) for each in wanted):
            return kind
    return ""


def snapshot_of(folder: Path) -> Path | None:
    """Return the only snapshot in a repository's folder of the Hub's cache; None if the folder is not one.

    Raises:
        NotACheckpointError: there are several or none.
    """
    if not os.path.isdir(folder / "snapshots") or not any(os.path.isdir(folder / name) for name in ("blobs", "refs")):
        return None
    names = sorted(name for name in os.listdir(folder / "snapshots") if os.path.isdir(folder / "snapshots" / name))
    if len(names) == 1:
        return folder / "snapshots" / names[0]
    which = " or ".join(str(folder / "snapshots" / name) for name in names[:3]) or "none: fetch one with `hf download`"
    raise NotACheckpointError(f"{folder} holds {len(names):,} snapshots of a repository. Give one of them: {which}.")


def missing_link(path: Path) -> str:
    """Describe a link to a file that does not exist, and say what to do; "" if the path is not one."""
    if not os.path.islink(path) or os.path.exists(path):
        return ""
    target = os.readlink(path)
    if ".git/annex/objects" in target:
        return f"is a git-annex link, and its file is not here. Run `git annex get {path.name}` in its folder."
    return f"is a link to {printable(target)}, which does not exist. Fetch the file again, or fix the link."
