"""Folders without a checkpoint that streamconv reads, recognised by the names in them, and links to missing files."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from streamconv.errors import NotACheckpointError, printable

_DCP = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch {} OUT.pth"
_ZERO = "python -m deepspeed.utils.zero_to_fp32 {} OUT"
_RANK_FILE = re.compile(r"(.*\D)??(rank[._-]?|mp_rank_)\d+(\D.*)?\.(pth|pt)")
_KINDS = (  # the folder holds a file or folder of each of these names
    (
        ("saved_model.pb",),
        "is a SavedModel of TensorFlow. Load it there, and save a state dict of PyTorch's names with torch.save.",
    ),
    (
        ("checkpoint", r".*\.index"),
        "is a checkpoint of TensorFlow. Load it there, and save a state dict of PyTorch's names with torch.save.",
    ),
    (
        ("_METADATA|_CHECKPOINT_METADATA|manifest.ocdbt",),
        "is a checkpoint of Orbax (JAX). Load it there, and save a state dict of PyTorch's names with torch.save.",
    ),
    (
        (r"model\.weights\.h5", "config.json"),
        "is a Keras model. Load it there, and save a state dict of PyTorch's names with torch.save.",
    ),
    ((r"openvino_model\.xml",), "is an OpenVINO model. Use the checkpoint that it was converted from."),
    (("Manifest.json", "Data"), "is a Core ML package. Use the checkpoint that it was converted from."),
)


def describe_folder(folder: Path, names: Sequence[str]) -> str:
    """Return what a folder with these names is and what to do, as the end of a sentence; "" if it is not known."""
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        return f"is a distributed checkpoint (DCP) of torch. Put it into one file: `{_DCP.format(quote(str(folder)))}`."
    if "data.pkl" in names:
        parent, name = map(quote, (str(folder.absolute().parent), folder.absolute().name))
        return f"is a .pth that was unpacked. Pack it again: `cd {parent} && zip -0 -r -D OUT.pth {name}`."
    if "zero_to_fp32.py" in names or ("latest" in names and any(map(re.compile("global_step").match, names))):
        return f"is a checkpoint of DeepSpeed (ZeRO). Put it into one file: `{_ZERO.format(quote(str(folder)))}`."
    if any(re.fullmatch(r".*_(model|optim)_states\.pt", name) for name in names):
        whole = quote(str(folder.parent))
        return f"is part of a checkpoint of DeepSpeed (ZeRO). Put it into one file: `{_ZERO.format(whole)}`."
    if "latest_checkpointed_iteration.txt" in names or any(map(re.compile(r"mp_rank_\d\d(_\d+)*$").match, names)):
        return "is a checkpoint of Megatron. Convert it to one file with Megatron's own tools first."
    models = [name for name in names if name.startswith("models--")]
    if models:
        return f"is the Hub's cache. Give one of its folders, such as {printable(models[0])}."
    ranks = [name for name in names if _RANK_FILE.fullmatch(name)]
    if len(ranks) > 1:
        return (
            f"holds {len(ranks):,} files of single processes, such as {printable(ranks[0])}. If FSDP sharded the "
            "model, each has only a part of it: give the teacher_checkpoint.pth that training writes at each "
            "evaluation. Otherwise, give one of these files."
        )
    for wanted, kind in _KINDS:
        if all(any(re.fullmatch(each, name) for name in names) for each in wanted):
            return kind
    return ""


def snapshot_of(folder: Path) -> Path | None:
    """Return the only snapshot in a repository's folder of the Hub's cache; None if it is no such folder.

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
    """Return what a link leads to if that is missing, and what to do; "" if the path is no such link."""
    if not os.path.islink(path) or os.path.exists(path):
        return ""
    target = os.readlink(path)
    if ".git/annex/objects" in target:
        return f"is a link of git-annex whose file is not here. Run `git annex get {path.name}` in its folder."
    return f"is a link to {printable(target)}, which does not exist. Fetch the file again, or fix the link."
