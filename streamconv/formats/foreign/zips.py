"""Recognises zips of other formats by the names of their records."""

from collections.abc import Collection

from streamconv.display import first_few, printable
from streamconv.formats.foreign.advice import save_for_torch

WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pth", ".pth.tar", ".pt", ".ckpt", ".npz")
NPY_SUFFIX = ".npy"
# By the end of a record's name that no other kind of zip has. The first kind that fits counts.
_KINDS = {
    "MAR-INF/MANIFEST.json": "is a TorchServe archive. Unpack it with `unzip`, and give the weights file in it",
    "archive_format": "is a .pt2 file of torch.export. Save the weights: "
    "torch.save(torch.export.load(FILE).state_dict, OUT)",
    "serialized_exported_program.json": "is a .pt2 file of torch.export. Save the weights: "
    "torch.save(torch.export.load(FILE).state_dict, OUT)",
    ".data/extern_modules": "was written by torch.package and holds code. Load the model with the code that made it, "
    "and save its state_dict() with torch.save",
    "model.weights.h5": f"is a Keras model. {save_for_torch('Keras')}",
}


def describe_zip(names: Collection[str]) -> str:
    """Describe a zip by the names of its records; "" if torch.save or numpy.savez may have written it."""
    pickles = [name for name in names if name.endswith("/data.pkl")]
    if any("/code/" in name for name in names) and (pickles or any(name.endswith("/constants.pkl") for name in names)):
        return "is a TorchScript program. Save its weights: torch.save(torch.jit.load(FILE).state_dict(), OUT)."
    for end, kind in _KINDS.items():
        if any(name == end or name.endswith(f"/{end}") for name in names):
            return f"{kind}."
    if pickles or is_npz(names):
        return ""
    if "data.pkl" in names:
        return (
            "has the contents of a .pth, but was zipped without their folder. Unzip it into FOLDER, and zip that: "
            "`zip -0 -r -D OUT.pth FOLDER`."
        )
    inside = next((name for name in names if name.lower().endswith(WEIGHTS_SUFFIXES)), None)
    if inside is not None:
        return f"is a zip that contains {printable(inside)}. Unpack it with `unzip`, and give that file."
    return f"is a zip without weights: it holds {first_few(names, 3)}. Give a checkpoint." if names else ""


def is_npz(names: Collection[str]) -> bool:
    return bool(names) and all(name.endswith(NPY_SUFFIX) for name in names)


def is_distributed(name: str) -> bool:
    """Return whether a file of this name is part of a distributed checkpoint: many zips, one after another."""
    return name.endswith(".distcp")


def repack_advice(names: Collection[str]) -> str:
    """Return how to get a readable file from a zip whose records are compressed or packed in another way."""
    if is_npz(names):
        return "np.savez_compressed wrote it. Save it uncompressed: np.savez(OUT, **np.load(FILE))."
    return (
        "Another program packed it again. Save it as torch does: torch.save(torch.load(FILE, weights_only=True), OUT)."
    )
