"""Recognises binary files of other formats by their first bytes."""

import re

from streamconv.formats.foreign.advice import save_for_torch

_ARCHIVES = (
    (b"\x1f\x8b", "gzip", "gunzip -k FILE"),
    (b"\xfd7zXZ\0", "xz", "unxz -k FILE"),
    (b"BZh91AY&SY", "bzip2", "bunzip2 -k FILE"),
    (b"\x28\xb5\x2f\xfd", "Zstandard", "unzstd FILE"),
    (b"\x04\x22\x4d\x18", "LZ4", "unlz4 FILE"),
    (b"LZIP", "lzip", "lzip -dk FILE"),
    (b"7z\xbc\xaf\x27\x1c", "7-Zip", "7z x FILE"),
    (b"Rar!\x1a\x07", "RAR", "unrar x FILE"),
)
_COMPRESSED_TAR = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
_TAR_MAGIC_AT = 257
_UNTAR = "Unpack it with `tar xf FILE`, and give the weights file in it"

_KINDS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"GGUF", "is a GGUF file of llama.cpp, whose weights are often quantised. Use the checkpoint it was made from"),
    (0, b"PK\5\6", "is an empty zip. Fetch it again"),
    (0, b"\x89HDF\r\n\x1a\n", f"is an HDF5 file, as Keras and TensorFlow write. {save_for_torch('Keras')}"),
    (0, b"\x93NUMPY", "is a single numpy array. Save a whole state dict: np.savez(FILE, **state_dict)"),
    (4, b"ET12", "is an ExecuTorch program. Use the checkpoint that it was exported from"),
    (4, b"TFL3", "is a TensorFlow Lite model. Use the checkpoint that it was converted from"),
    (4, b"ORTM", "is an ONNX Runtime model. Use the checkpoint that it was exported from"),
    (4, b"PTMF", "is a PyTorch Mobile program. Use the checkpoint that it was exported from"),
    (0, b"ptrt", "is a TensorRT engine. Use the checkpoint that it was built from"),
    (0, b"ftrt", "is a TensorRT engine. Use the checkpoint that it was built from"),
    (0, b"MATLAB 5.0", "is a MATLAB file. Save the arrays in a state dict with torch.save"),
    (
        0,
        b"\0\5\x16\7",
        "is the metadata that macOS keeps beside a file. Give the file itself, whose name has no ._ before it",
    ),
    (0, b"\x89PNG\r\n", "is a PNG image, not a checkpoint"),
    (0, b"\xff\xd8\xff", "is a JPEG image, not a checkpoint"),
    (0, b"GIF8", "is a GIF image, not a checkpoint"),
    (8, b"WEBP", "is a WebP image, not a checkpoint"),
    (0, b"II*\0", "is a TIFF image, not a checkpoint"),
    (0, b"MM\0*", "is a TIFF image, not a checkpoint"),
    (4, b"ftyp", "is a video or an image, not a checkpoint"),
    (0, b"%PDF", "is a PDF document, not a checkpoint"),
    (0, b"PAR1", "is a Parquet table, not a checkpoint"),
    (0, b"ARROW1", "is an Arrow table, not a checkpoint"),
    (0, b"SQLite format 3\0", "is an SQLite database, not a checkpoint"),
    (0, b"\x7fELF", "is a program, not a checkpoint"),
    (0, b"MZ\x90", "is a Windows program, not a checkpoint"),
)
# Protocol buffers: ONNX's IR version (field 1), then the producer's name (2) or the graph (7).
_ONNX = re.compile(rb"\x08[\x01-\x1f](\x12[\x01-\x40][\x20-\x7e]+[\x1a\x22\x28\x32\x3a\x42]|\x3a)", re.DOTALL)
_SAVED_MODEL = re.compile(rb"\x08\x01\x12[\x80-\xff]", re.DOTALL)  # schema version 1, then a long meta graph
_GRAPH_DEF = re.compile(rb"\x0a.{1,5}\x0a.{1,70}\x12.(Placeholder|Const|VarHandleOp)", re.DOTALL)
_MSGPACK = re.compile(rb"[\x81-\x8f\xde\xdf].{0,4}?[\xa1-\xbf\xd9][\x20-\x7e]{2}", re.DOTALL)  # a map with text keys
_OTHER_PICKLE = "is a pickle that torch.save did not write. Load it with pickle"
_PICKLES = (
    (b"StructuredToParameterName@@", "is a Paddle state dict. Convert its arrays to torch tensors"),
    (b"paddle", "is a Paddle pickle. Convert its arrays to torch tensors"),
    (b"sklearn", "is a pickled scikit-learn model, not a PyTorch state dict"),
    (b"xgboost", "is a pickled XGBoost model, not a PyTorch state dict"),
    (b"joblib", "is a joblib pickle, not a PyTorch state dict"),
    (b"numpy", "is a pickle of numpy arrays. Convert them to torch tensors"),
    (b"torch", _OTHER_PICKLE),
)
# Formats that have no first bytes of their own.
_SUFFIXES = {
    ".mlmodel": "is a Core ML model",
    ".engine": "is a TensorRT engine",
    ".plan": "is a TensorRT engine",
    ".pdiparams": "is a Paddle model for inference",
    ".caffemodel": "is a Caffe model",
    ".params": "is an MXNet model",
}


def describe_binary(start: bytes, name: str) -> str:
    """Return what a file with these first bytes and this name is, or "" if it is not known."""
    for magic, kind, command in _ARCHIVES:
        if start.startswith(magic):
            if _COMPRESSED_TAR.search(name):
                return f"is a tar archive compressed with {kind}. {_UNTAR}."
            return f"is compressed with {kind}. Unpack it first: `{command}`."
    if start[_TAR_MAGIC_AT : _TAR_MAGIC_AT + 5] == b"ustar":
        return f"is a tar archive. {_UNTAR}."
    for offset, magic, kind in _KINDS:
        if start.startswith(magic, offset):
            return f"{kind}."
    if _SAVED_MODEL.match(start) or _GRAPH_DEF.match(start):
        return f"is a TensorFlow graph. {save_for_torch('TensorFlow')}."
    if _ONNX.match(start):
        return "is an ONNX model, whose weights have lost their names. Use the checkpoint that it was exported from."
    if b"_CHECKPOINTABLE_OBJECT_GRAPH" in start or re.search(r"\.data-\d{5}-of-\d{5}$", name):
        return f"is part of a TensorFlow checkpoint. {save_for_torch('TensorFlow')}."
    if re.match(rb"\x80[\x02-\x05]", start):
        kind = next((kind for mark, kind in _PICKLES if mark in start), _OTHER_PICKLE)
        return f"{kind}, and save a dict of tensors with torch.save."
    if _MSGPACK.match(start):
        return f"is a msgpack file, as Flax writes. {save_for_torch('Flax')}."
    if start and not any(start):
        return "begins with nothing but zeros: its download did not finish. Fetch it again."
    kind = next((kind for suffix, kind in _SUFFIXES.items() if name.lower().endswith(suffix)), "")
    return f"{kind}. Use a PyTorch checkpoint." if kind else ""
