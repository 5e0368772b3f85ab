"""Files and folders of other formats are recognised by what is in them, and each message says what to do."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import tarfile
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest

from streamconv import NotACheckpointError, SourceError, TruncatedError
from streamconv.formats.checkpoint import open_checkpoint
from streamconv.formats.foreign.files import START_BYTES, describe_start
from streamconv.formats.foreign.folders import describe_folder
from streamconv.formats.foreign.zips import describe_zip


def tar(mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        info = tarfile.TarInfo("w.pth")
        info.size = 1000
        archive.addfile(info, io.BytesIO(bytes(1000)))
    return buffer.getvalue()


def page(title: str, more: str = "") -> bytes:
    return f"\n<!DOCTYPE html>\n<html><head>{more}<title>\n {title} </title></head></html>".encode()


BINARY: dict[str, tuple[bytes, str]] = {
    "w.pth.tar": (tar("w"), r"is a tar archive\. Unpack it with `tar xf FILE`"),
    "w.tar.gz": (tar("w:gz"), r"is a tar archive compressed with gzip\. Unpack it with `tar xf FILE`"),
    "w.tgz": (tar("w:gz"), "tar archive compressed with gzip"),
    "w.tar.xz": (tar("w:xz"), "tar archive compressed with xz"),
    "w.pth.gz": (gzip.compress(b"x"), r"compressed with gzip\. Unpack it first: `gunzip -k FILE`"),
    "w.pth.xz": (lzma.compress(b"x"), "compressed with xz.*unxz"),
    "w.pth.bz2": (bz2.compress(b"x" * 100), "compressed with bzip2.*bunzip2"),
    "w.pth.zst": (bytes.fromhex("28b52ffd") + bytes(64), "Zstandard.*unzstd"),
    "w.7z": (bytes.fromhex("377abcaf271c") + bytes(64), "7-Zip.*7z x"),
    "w.rar": (b"Rar!\x1a\x07\x01\0" + bytes(64), "RAR.*unrar x"),
    "w.gguf": (b"GGUF" + struct.pack("<IQQ", 3, 1, 1), "is a GGUF file"),
    "w.h5": (b"\x89HDF\r\n\x1a\n" + bytes(64), "is an HDF5 file, as Keras and TensorFlow write"),
    "w.npy": (b"\x93NUMPY\1\0v\0{", "is a single numpy array"),
    "w.pte": (struct.pack("<I4s", 32, b"ET12") + bytes(64), "is an ExecuTorch program"),
    "w.tflite": (struct.pack("<I4s", 28, b"TFL3") + bytes(64), "TensorFlow Lite"),
    "w.onnx": (b"\x08\x08\x12\x07pytorch\x1a\x052.4.0:\xff\xff", "is an ONNX model"),
    "without_producer.onnx": (b"\x08\x07\x3a\xff\xff\x01\x0a\x40", "is an ONNX model"),
    "saved_model.pb": (b"\x08\x01\x12\x96\xe9\x22\x0a\x2b", "is a TensorFlow graph"),
    "frozen.pb": (b"\x0a\x3e\x0a\x05input\x12\x0bPlaceholder*\x0b", "is a TensorFlow graph"),
    "x.ckpt.index": (b"\0\0\x1b_CHECKPOINTABLE_OBJECT_GRAPH\x08\x07", "part of a TensorFlow checkpoint"),
    "x.ckpt.data-00000-of-00001": (b"\x01\x02\x03\xff" * 99, "part of a TensorFlow checkpoint"),
    "flax_model.msgpack": (b"\x82\xa6params\x81\xa5dense" + bytes(64), "is a msgpack file, as Flax writes"),
    "x.pdparams": (
        pickle.dumps({"conv.weight": b"\xff" * 99, "StructuredToParameterName@@": {}}, protocol=2), "Paddle state dict",
    ),
    "x.joblib": (b"\x80\x04\x95\x1f\0\0\0\0\0\0\0\x8c\x18sklearn.linear_model._base\x94", "scikit-learn"),
    "x.pkl": (b"\x80\x03cnumpy.core.multiarray\n_reconstruct\n", "is a pickle of numpy arrays"),
    "y.pkl": (pickle.dumps(OrderedDict(a=1)), "is a pickle that torch.save did not write"),
    "x.mlmodel": (b"\x08\x05\x12\x96\x01\x0a\x2b\xff", "is a Core ML model"),
    "._x.pth": (b"\0\5\x16\7\0\2\0\0Mac OS X", "is the metadata that macOS keeps beside a file"),
    "allocated.pth": (b"PK\3\4" + b"\1" * 99 + bytes(4096), "ends with nothing but zeros: its download"),
    "x.png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is a PNG image"),
    "x.jpg": (b"\xff\xd8\xff\xe0\0\x10JFIF", "is a JPEG image"),
    "zeros.pth": (bytes(1 << 10), "nothing but zeros.*Fetch it again"),
    "empty.pth": (b"", "is empty"),
    "empty.zip": (b"PK\5\6" + bytes(18), "is an empty zip"),
    "noise.pth": (bytes(range(256)) * 9, "is not a torch.save checkpoint, a safetensors file or an .npz file"),
}  # fmt: skip
LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 346378731\n".encode()
S3 = '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code><Message>Request has expired</Message>'
TEXT: dict[str, tuple[bytes, str]] = {
    "lfs.pth": (LFS, r"Git LFS pointer to a file of 346,378,731 bytes, .* run `git lfs pull`"),
    "windows-lfs.pth": (LFS.replace(b"\n", b"\r\n"), "Git LFS pointer"),
    "old-lfs.pth": (LFS.replace(b"git-lfs", b"hawser"), "Git LFS pointer"),
    "moment.pth": (page("Just a moment..."), "The server asks for a browser"),
    "xet.pth": (b"# xet version 0\nfilesize = 346378731\nhash = 'cdcd'\n", "Xet pointer.*346,378,731.*hf download"),
    "annex.pth": (b"/annex/objects/SHA256E-s346--ab.pth\n", "git-annex pointer.*git annex get"),
    "x.pth.dvc": (b"outs:\n- md5: abab\n  size: 12\n  path: x.pth\n", "DVC pointer.*dvc pull"),
    "page.pth": (page("Sign in"), "web page \\('Sign in'\\), .* the download failed. Log in with a browser"),
    "no-title.pth": (b"<html><body>404</body></html>", "is a web page, not a checkpoint: the download failed"),
    "drive.pth": (page("Google Drive - Virus scan warning"), "Virus scan warning.*gdown"),
    "quota.pth": (page("Google Drive - Quota exceeded"), "Quota exceeded.*try again in a day"),
    "dropbox.pth": (page("Dropbox - x.pth"), "Replace dl=0 .* dl=1"),
    "hub.pth": (
        page("x.pth · me/x at main", '<meta content="https://huggingface.co/me/x/blob/main/x.pth">'), "/resolve/"
    ),
    "github.pth": (page("x/y.pth at main · me/x · GitHub"), "on GitHub, /raw/"),
    "escapes.pth": (page("a&lt;b\x1b[2J"), r"web page"),
    "s3.xml": (S3.encode(), "XML file.*the server answered 'AccessDenied: Request has expired'"),
    "azure.pth": ("\ufeff".encode() + S3.encode(), "AccessDenied: Request has expired"),
    "config.xml": (b"<?xml version='1.0'?><a/>", "is an XML file"),
    "err.pth": (b'{"error":"Repository not found"}', "the server answered 'Repository not found'"),
    "nested.pth": (b'{"error": {"code": 403, "message": "No access"}}', "the server answered 'No access'"),
    "github.json": (b'{\n  "message": "Bad credentials",\n  "status": "401"\n}', "answered 'Bad credentials'"),
    "list.pth": (b"[1, 2]", r"JSON file that begins '\[1, 2\]'"),
    "deep.pth": (b"[" * 60_000, "JSON file that begins"),
    "config.json": (b'{"model_type": "dinov2", "hidden_size": 384}', "is the config.json of a model"),
    "model.safetensors.index.renamed": (b'{"metadata": {}, "weight_map": {"a": "b"}}', "is an index"),
    "plain.pth": (b"Entry not found", "text file that begins 'Entry not found'. If it was downloaded"),
    "utf16.pth": ("Nicht gefunden".encode("utf-16"), "begins 'Nicht gefunden'"),
    "long.pth": (b"word " * 20_000, "text file that begins 'word word"),
    "umlaut.pth": ("ü".encode() * 40_000, "text file that begins"),
    "model.py": (b"class X: pass", "is Python source code.* Give the weights file"),
    "model.pth": (b"# A model\nimport torch\n", "is Python source code"),
    "config.yaml": (b"model:\n  depth: 12\n", "is a YAML file"),
    "terminal.pth": (b"hello \x1b[2J", r"hello \\x1b\[2J"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*BINARY, *TEXT])
def test_file_is_named_with_what_to_do(tmp_path: Path, name: str) -> None:
    data, message = {**BINARY, **TEXT}[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises((NotACheckpointError, TruncatedError), match=message) as caught:
        open_checkpoint(tmp_path / name)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / name} ")
    assert text.isprintable()
    assert text.endswith(".")
    assert len(text) < len(str(tmp_path)) + 400


@pytest.mark.parametrize(("kind", "library"), [("tf", "TensorFlow"), ("flax", "Flax")])
def test_safetensors_of_another_library_are_named(tmp_path: Path, kind: str, library: str) -> None:
    header = json.dumps({"__metadata__": {"format": kind}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(NotACheckpointError, match=f"was saved for {library}, .* for PyTorch"):
        open_checkpoint(tmp_path / "x.safetensors")


SLOW = {
    "titles": b"<" + b"<title" * 10_000,
    "closed titles": b"<" + b"<title>" * 9_000,
    "codes": b"<?xml" + b"<Code>" * 10_000,
    "pages": b"<title>x</title>" + b"huggingface.co/" * 4_000,
    "brackets": b"{" * 65_000,
    "producers": b"\x08\x08\x12\x20" + b"a" * 65_000,
    "maps": b"\x82" * 65_000,
    "white space": b"a" + b" " * 65_000 + b"a",
    "imports": b"from " + b"a." * 32_000,
}


@pytest.mark.parametrize("name", SLOW)
def test_no_text_takes_long_to_recognise(name: str) -> None:
    start = time.process_time()
    describe_start(SLOW[name][:START_BYTES], "x.pth")
    assert time.process_time() - start < 0.5


ZIPS = {
    "TorchScript program": ["m/data.pkl", "m/code/__torch__.py", "m/constants.pkl"],
    r"\.pt2 file of torch\.export": ["m/archive_format", "m/models/model.json", "m/data/weights/weight_0"],
    r"torch\.export\.load": ["version", "serialized_exported_program.json", "serialized_state_dict.pt"],
    r"torch\.package": ["m/.data/extern_modules", "m/model/model.pkl", "m/.data/version"],
    "TorchServe": ["MAR-INF/MANIFEST.json", "model.pth"],
    "Keras model": ["metadata.json", "config.json", "model.weights.h5"],
    r"zip that contains release/w\.pth\. Unpack it with `unzip`": ["release/", "release/README.md", "release/w.pth"],
    r"zipped without their folder.*zip -0 -r -D OUT\.pth FOLDER": ["data.pkl", "data/0", "version"],
    r"without weights: it holds a\.png, b\.png, c\.png and 1 more": ["a.png", "b.png", "c.png", "d.png"],
}


@pytest.mark.parametrize("message", ZIPS)
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_is_named_by_its_records(tmp_path: Path, message: str, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as archive:
        for name in ZIPS[message]:
            archive.writestr(name, b"x")
    with pytest.raises(NotACheckpointError, match=message):
        open_checkpoint(tmp_path / "x.zip")


def test_records_of_torch_and_numpy_are_not_taken_for_others() -> None:
    assert describe_zip(["a/data.pkl", "a/data/0", "a/version", "a/.data/serialization_id"]) == ""
    assert describe_zip(["cls_token.npy", "blocks/0/w.npy"]) == ""


def zero(folder: Path) -> None:
    (folder / "global_step5").mkdir()
    (folder / "global_step5" / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    (folder / "latest").write_text("global_step5")


def touch(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()

    return make


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "DCP": (touch(".metadata", "__0_0.distcp"), r"DCP.*dcp_to_torch \S*/DCP OUT\.pth`"),
    "DCP of rank 1 alone": (touch("__1_0.distcp"), r"DCP.*dcp_to_torch '\S*/DCP of rank 1 alone' OUT\.pth`"),
    "accelerate": (
        touch("pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata", "scheduler.bin"),
        r"DCP.*dcp_to_torch \S*/accelerate/pytorch_model_fsdp_0 OUT\.pth`",
    ),
    "DeepSpeed": (zero, r"DeepSpeed \(ZeRO\).*zero_to_fp32 \S*/DeepSpeed OUT`"),
    "script": (touch("zero_to_fp32.py"), r"DeepSpeed \(ZeRO\)"),
    "Megatron": (touch("latest_checkpointed_iteration.txt", "iter_0000001/x"), "Megatron"),
    "FSDP": (
        touch("model_final.rank_0.pth", "model_final.rank_1.pth"), r"2 files, each written by.*teacher_checkpoint",
    ),
    "verl": (touch("model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"), "2 files, each written by one"),
    "SavedModel": (touch("saved_model.pb", "variables/variables.index"), "TensorFlow SavedModel"),
    "TensorFlow": (touch("checkpoint", "x.ckpt-1.index", "x.ckpt-1.data-00000-of-00001"), "is a TensorFlow checkpoint"),
    "Orbax": (touch("_METADATA", "d/x", "manifest.ocdbt"), "Orbax"),
    "Keras": (touch("model.weights.h5", "config.json", "metadata.json"), "Keras"),
    "OpenVINO": (touch("openvino_model.xml", "openvino_model.bin"), "OpenVINO"),
    "Hub": (touch("models--a--b/blobs/x", "models--a--c/blobs/x"), "Hub's cache.*such as models--a--b"),
    "Flax": (
        lambda folder: (folder / "flax_model.msgpack").write_bytes(b"\x82\xa6params"), "msgpack is a msgpack file"
    ),
    "unpacked": (touch("data.pkl", "data/0", "version"), r"unpacked.*cd \S+ && zip -0 -r -D OUT\.pth unpacked`"),
    "pulled": (touch("model.safetensors.dvc", "config.json"), "model.safetensors.dvc.*dvc pull"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_is_named_with_what_to_do(tmp_path: Path, name: str) -> None:
    make, message = FOLDERS[name]
    folder = tmp_path / name
    folder.mkdir()
    make(folder)
    with pytest.raises(SourceError, match=message) as caught:
        open_checkpoint(folder)
    assert str(caught.value).startswith(f"{folder} ")


def test_part_of_a_folder_names_the_whole(tmp_path: Path) -> None:
    zero(tmp_path)
    with pytest.raises(NotACheckpointError, match=f"part of .*zero_to_fp32 {tmp_path} OUT"):
        open_checkpoint(tmp_path / "global_step5")


def test_ordinary_folder_is_not_taken_for_another(tmp_path: Path) -> None:
    assert describe_folder(tmp_path, ["config.json", "model.pth", "README.md", "latest", "logs"]) == ""


def test_listing_of_a_huge_folder_is_bounded(tmp_path: Path) -> None:
    for i in range(3_000):
        (tmp_path / f"{i}.json").write_text(json.dumps(i))
    with pytest.raises(SourceError, match=r"and 995 more|and \d+ more"):
        open_checkpoint(tmp_path)
