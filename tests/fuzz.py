"""Fuzzes the checkpoint readers for a given time. Each finding becomes a test in test_hostile.py.

    python -m tests.fuzz pickle --seconds 600        a .pth's data.pkl, in a valid zip
    python -m tests.fuzz zip --seconds 600           a .pth's bytes
    python -m tests.fuzz legacy --seconds 600        a .pth's bytes in the format from before torch 1.6
    python -m tests.fuzz safetensors --seconds 600   a header, followed by data
    python -m tests.fuzz mutate --seconds 600        all of them, by random changes to small real checkpoints

The first four are guided by the readers' coverage (atheris: pip install 'streamconv[fuzz]') and begin
with real checkpoints. Every input must be opened or refused with a SourceError within a second; what
is opened and what torch.load(weights_only=True) or the safetensors library takes too must be equal.
A finding stops the run, and its input lies in --artifacts.
"""

import argparse
import random
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamconv.tensors.evaluation import read_bytes

MAX_SECONDS = 1.0
MAX_TENSOR_BYTES = 1 << 20  # a view may be expanded to any size; only its description matters here


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=["pickle", "zip", "legacy", "safetensors", "mutate"])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, help="keep what reaches new code here, and begin with it next time")
    parser.add_argument("--artifacts", type=Path, default=Path("."))
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        options.corpus = options.corpus or Path(place) / "corpus"
        options.corpus.mkdir(parents=True, exist_ok=True)
        (mutate if options.target == "mutate" else guided)(options, Path(place))


def guided(options: argparse.Namespace, place: Path) -> None:
    """Does not return: libFuzzer ends the process, and prints the number of executions."""
    import atheris

    with atheris.instrument_imports(include=["streamconv.files", "streamconv.formats", "streamconv.tensors"]):
        import streamconv  # noqa: F401 - before anything else imports it
    seeds = real_checkpoints(place)
    for i, (pickled, pth, old, header) in enumerate(seeds):
        data = {"pickle": pickled, "zip": pth, "legacy": old, "safetensors": header}[options.target]
        (options.corpus / f"real-{i}").write_bytes(data)
    writer: Callable[[Path, bytes], None] = {
        "pickle": write_pickle,
        "zip": Path.write_bytes,
        "legacy": Path.write_bytes,
        "safetensors": write_header,
    }[options.target]
    path = place / ("x.safetensors" if options.target == "safetensors" else "x.pth")
    check = checker()

    def one(data: bytes) -> None:
        writer(path, data)
        check(path)

    seed = [f"-seed={options.seed}"] if options.seed else []
    words = [f"-max_total_time={options.seconds}", "-timeout=10", "-rss_limit_mb=4000", "-max_len=8192", *seed]
    atheris.Setup([sys.argv[0], *words, f"-artifact_prefix={options.artifacts}/", str(options.corpus)], one)
    atheris.Fuzz()


def mutate(options: argparse.Namespace, place: Path) -> None:
    check, seeds = checker(), real_checkpoints(place)
    chance = random.Random(options.seed or None)
    count = opened = both = 0
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        pickled, pth, old, header = chance.choice(seeds)
        kind = chance.choice(["pickle", "pickle", "zip", "legacy", "header", "safetensors"])
        path = place / ("x.pth" if kind in ("pickle", "zip", "legacy") else "x.safetensors")
        if kind == "pickle":
            write_pickle(path, mutated(pickled, chance))
        elif kind == "zip":
            path.write_bytes(mutated(pth, chance))
        elif kind == "legacy":
            path.write_bytes(mutated(old, chance))
        elif kind == "header":
            write_header(path, mutated(header, chance))
        else:
            write_header(path, header)
            path.write_bytes(mutated(path.read_bytes(), chance))
        count += 1
        try:
            result = check(path)
        except Exception:
            (options.artifacts / f"finding-{path.name}").write_bytes(path.read_bytes())
            raise
        opened, both = opened + (result is not None), both + (result is True)
    print(f"{count:,} checkpoints, {opened:,} of them opened, {both:,} by the library too, and all of these were equal")


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, taken away, put in, or doubled."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        at = chance.randrange(len(changed))
        what = chance.randrange(5)
        if what == 0:
            changed[at] ^= 1 << chance.randrange(8)
        elif what == 1:
            changed[at] = chance.choice(b"\0\1\2\x7f\x80\xff.()tRQqhjrKMJXbu}]")
        elif what == 2:
            del changed[at : at + chance.choice((1, 1, 2, 5))]
        elif what == 3:
            changed[at:at] = bytes([chance.randrange(256)])
        else:
            size = chance.choice((1, 4, 20, 60))
            to = chance.randrange(len(changed))
            changed[to:to] = changed[at : at + size]
        changed = changed or bytearray(b"\0")
    return bytes(changed)


def checker() -> Callable[[Path], bool | None]:
    """None where a file is refused, whether the library took it too where it is opened; raises what is a finding."""
    import safetensors.torch
    import torch

    import streamconv
    from tests.checkpoints import described

    warnings.simplefilter("ignore")  # torch's, on other protocols

    def check(path: Path) -> bool | None:
        start, message = time.perf_counter(), ""
        try:
            checkpoint = streamconv.open_checkpoint(path)
        except streamconv.SourceError as error:
            message = str(error)
        seconds = time.perf_counter() - start
        assert seconds < MAX_SECONDS, f"{seconds} s"
        assert message.isprintable(), repr(message)
        if message:
            return None
        with checkpoint:
            try:
                loaded: Any = (
                    safetensors.torch.load_file(path)
                    if path.suffix == ".safetensors"
                    else torch.load(path, weights_only=True)
                )
            except Exception:
                return False
            assert {name: (tensor.info.shape) for name, tensor in checkpoint.items()} == {
                name: tuple(value.shape) for name, value in loaded.items()
            }
            small = {name: tensor for name, tensor in checkpoint.items() if tensor.info.nbytes <= MAX_TENSOR_BYTES}
            ours = {name: (tensor.info.dtype, tensor.info.shape, read_bytes(tensor)) for name, tensor in small.items()}
            assert ours == described({name: loaded[name] for name in small})
        return True

    return check


def real_checkpoints(place: Path) -> list[tuple[bytes, bytes, bytes, bytes]]:
    """A pickle, its .pth, one in the format from before torch 1.6, a safetensors header: of several checkpoints."""
    import safetensors.torch
    import torch

    from tests.checkpoints import EVERY_KIND

    linear = torch.nn.Linear(2, 2)
    shared = torch.arange(6.0)
    states: list[Any] = [
        EVERY_KIND,
        linear.state_dict(),
        dict(linear.named_parameters()),
        {"a": shared[:4], "b": shared[2:], "c": shared.reshape(2, 3).t()},
        {"a": torch.nn.Buffer(torch.ones(2)), "b": torch.nn.Buffer(torch.ones(1))},  # with attributes
    ]
    found = []
    for state in states:
        torch.save(state, place / "real.pth")
        with zipfile.ZipFile(place / "real.pth") as archive:
            pickled = archive.read("real/data.pkl")
        apart = {name: value.detach().clone().contiguous() for name, value in state.items()}
        data = safetensors.torch.save(apart)
        zipped = (place / "real.pth").read_bytes()
        old = {name: value for name, value in state.items() if name != "fp8"}  # which torch cannot load from there
        torch.save(old, place / "real.pth", _use_new_zipfile_serialization=False)
        found.append(
            (pickled, zipped, (place / "real.pth").read_bytes(), data[8 : 8 + int.from_bytes(data[:8], "little")])
        )
    return found


def write_pickle(path: Path, pickled: bytes) -> None:
    """A .pth with this pickle, and storages of the sizes that the real ones have."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("real/data.pkl", pickled)
        archive.writestr("real/byteorder", b"little")
        for key, size in enumerate((48, 48, 8, 5, 3, 8, 0, 16, 24)):
            archive.writestr(f"real/data/{key}", bytes(range(size)))


def write_header(path: Path, header: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(range(128)))


if __name__ == "__main__":
    main()
