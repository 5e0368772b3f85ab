"""python -m benchmarks.ways WAY SOURCE OUT …: the ways to convert that are compared, each run as a process of its own.

Peers are called through their public API, as documented, and their output is synced at the end. Their key names come
from streamconv's plan, which takes a few hundredths of a second of their time.
"""

import argparse
import json
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

CP, DD = "cp; sync", "dd, past the cache; fsync"
CONVERT, RUN = "streamconv convert", "streamconv run"
MMAP = "torch.load(mmap) + save_torch_state_dict"
MERGEKIT = "mergekit LazyTensorLoader + TensorWriter"
ORIGINAL = "original script's way"
CONSOLIDATE = "torch.distributed.checkpoint consolidation"
KEYS = {"cp": CP, "dd": DD, "convert": CONVERT, "mmap": MMAP, "mergekit": MERGEKIT, "consolidate": CONSOLIDATE,
        "run": RUN, "original": ORIGINAL}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Options for every way that supports them."""

    max_shard_size: str = "5GB"
    dtype: str | None = None


def command(way: str, source: Path, out: Path, options: Options) -> list[str]:
    words = ["--max-shard-size", options.max_shard_size, *(["--dtype", options.dtype] if options.dtype else [])]
    if way in (CONVERT, RUN):
        return [sys.executable, "-m", "streamconv", way.split()[1], str(source), "-o", str(out), *words,
                *(["--device", "cpu"] if way == RUN else [])]  # fmt: skip
    if way == CP:  # in a shell, so that no Python start is counted
        return ["sh", "-c", f"mkdir '{out}' && cp -r '{source}' '{out}' && sync"]
    if way == DD:
        copy = f"dd if='{source}' of='{out}/x' bs=1M oflag=direct conv=fsync status=none"
        return ["sh", "-c", f"mkdir '{out}' && {copy}"]
    return [sys.executable, "-m", "benchmarks.ways", way, str(source), str(out), *words]


def names_of(source: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each source tensor's name with the names of its targets."""
    import streamconv

    for move in streamconv.plan(source).mapping:
        yield move.source, move.targets


def chunked(targets: tuple[str, ...], value: Any, dtype: Any) -> Iterable[tuple[str, Any]]:
    parts = value.chunk(len(targets))
    return zip(targets, (part.to(dtype) for part in parts) if dtype else parts, strict=True)


def torch_dtype(options: Options) -> Any:
    import torch

    return getattr(torch, options.dtype) if options.dtype else None


def mmap_save(source: Path, out: Path, options: Options) -> None:
    import torch
    from huggingface_hub import save_torch_state_dict

    # By default torch maps a file privately, which the system refuses if the file is larger than memory.
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    flags = mmap.MAP_SHARED if source.stat().st_size > memory else mmap.MAP_PRIVATE
    with torch.serialization.set_default_mmap_options(flags):
        loaded = torch.load(source, map_location="cpu", mmap=True, weights_only=True)
    state_dict = {
        # save_torch_state_dict does not accept tensors that share a storage, such as the chunks of qkv.
        target: part.clone() if len(targets) > 1 and not options.dtype else part
        for name, targets in names_of(source)
        for target, part in chunked(targets, loaded[name], torch_dtype(options))
    }
    out.mkdir()
    save_torch_state_dict(state_dict, out, max_shard_size=options.max_shard_size)


def mergekit(source: Path, out: Path, options: Options) -> None:
    from mergekit.io import LazyTensorLoader, ShardedTensorIndex, TensorWriter

    from streamconv.planning.shards import parse_size

    if source.is_dir():
        loader = LazyTensorLoader.from_disk(str(source))
        names: list[tuple[str, tuple[str, ...]]] = [(name, (name,)) for name in loader.index.tensor_paths]
    else:
        loader = LazyTensorLoader(ShardedTensorIndex.from_file(str(source)))
        names = list(names_of(source))
    with TensorWriter(str(out), max_shard_size=parse_size(options.max_shard_size)) as writer:
        for name, targets in names:
            for target, part in chunked(targets, loader.get_tensor(name), torch_dtype(options)):
                writer.save_tensor(target, part)


def original(source: Path, out: Path, options: Options) -> None:
    """Do what the original script does, with local files instead of its downloads.

    It initializes both models at random before it loads their weights, which takes long and is not repeated here. Its
    assertions are computed, but nothing depends on them: some fail with random weights or with transformers 5.
    """
    import torch
    import transformers
    from PIL import Image
    from torchvision import transforms
    from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    import streamconv
    from streamconv.verification.originals import dinov2

    plan = streamconv.plan(source)
    model: Any = dinov2.build(plan.dimensions)
    model.eval()
    model.load_state_dict(torch.load(source, map_location="cpu", weights_only=True))
    config = transformers.Dinov2Config(**plan.config)
    loaded = model.state_dict()
    state_dict = dict(pair for name, targets in names_of(source) for pair in chunked(targets, loaded[name], None))
    # The original script's load_state_dict does not work with transformers 5's names; this works with 4 and 5.
    converted: Any = transformers.Dinov2Model.from_pretrained(None, config=config, state_dict=state_dict)
    image = Image.effect_noise((640, 480), 64).convert("RGB")
    steps = [
        transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    ]
    processor: Any = transformers.BitImageProcessor(
        size={"shortest_edge": 256},
        resample=Image.Resampling.BICUBIC,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )
    pixels = processor(image, return_tensors="pt").pixel_values
    torch.allclose(transforms.Compose(steps)(image).unsqueeze(0), pixels)
    with torch.no_grad():
        cls = next(output for name, output in dinov2.states(model, pixels) if name == "cls")
        outputs = converted(pixels, output_hidden_states=True)
    torch.allclose(outputs.last_hidden_state[:, :1], cls, atol=1e-3)
    converted.save_pretrained(out, max_shard_size=options.max_shard_size)
    processor.save_pretrained(out)


def consolidate(source: Path, out: Path, options: Options) -> None:
    """Merge the shards in ``source``, a folder written by `save_distributed`."""
    # There is no public name for this function; torchtitan imports it from here, too.
    from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

    out.mkdir()
    consolidate_safetensors_files(str(source), str(out), dict.fromkeys(_tensors_in(source), 1), num_threads=2)


def save_distributed(source: Path, out: Path, options: Options) -> None:
    """Save a folder of safetensors again as torch.distributed.checkpoint does, in as many files."""
    import torch.distributed.checkpoint
    from safetensors import safe_open

    dcp: Any = torch.distributed.checkpoint

    state_dict, index = {}, {}
    for number, path in enumerate(sorted(source.glob("*.safetensors")), start=1):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                state_dict[name], index[name] = file.get_tensor(name), number
    writer = dcp.HuggingFaceStorageWriter(str(out), fqn_to_index_mapping=index, save_distributed=True)
    dcp.save(state_dict, storage_writer=writer, no_dist=True)


def _tensors_in(folder: Path) -> dict[str, Path]:
    from safetensors import safe_open

    found: dict[str, Path] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def digest(folder: Path) -> str:
    """The sha256 of all tensors in a folder: names, dtypes, shapes and bytes, read with safetensors itself."""
    import torch
    from safetensors import safe_open

    found, paths = sha256(), _tensors_in(folder)
    for name in sorted(paths):
        with safe_open(paths[name], "pt") as file:
            tensor = file.get_tensor(name).contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


PEERS: dict[str, Callable[[Path, Path, Options], None]] = {
    MMAP: mmap_save,
    MERGEKIT: mergekit,
    ORIGINAL: original,
    CONSOLIDATE: consolidate,
    "save_distributed": save_distributed,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=[*PEERS, "digest"])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--max-shard-size", default="5GB")
    parser.add_argument("--dtype")
    args = parser.parse_args()
    if args.way == "digest":
        print(json.dumps(digest(args.source)))
    else:
        PEERS[args.way](args.source, args.out, Options(args.max_shard_size, args.dtype))
        os.sync()  # as for cp and streamconv: the output must be on the disk


if __name__ == "__main__":
    main()
