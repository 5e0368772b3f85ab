"""A plan that was saved is executed exactly, by any process, and refused if anything has changed."""

import json
import os
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

import streamconv
from streamconv import ChangedError, ConversionOptions, OutputError, UsageError
from streamconv.files.address import Address
from streamconv.files.base import UNVERSIONED, FileRef
from streamconv.output import plan_file
from streamconv.planning import plan_json
from tests import api
from tests.checkpoints import make_states
from tests.file_server import FileServer
from tests.support import Save, contents, run, tiny

OPTIONS = ConversionOptions(dtype="bfloat16", max_shard_size="100KB")


@pytest.mark.parametrize("kind", ["pth with a head", "safetensors"])
def test_saved_plan_gives_the_same_folder_as_the_options(tmp_path: Path, save: Save, kind: str) -> None:
    source, head = save(tiny(classes=5))
    options: dict[str, Any] = {"max_shard_size": "100KB", "dtype": "bfloat16"}
    if kind == "safetensors":
        api.convert(source, tmp_path / "model")
        source = tmp_path / "model" / "model.safetensors"
    else:
        (tmp_path / "labels.txt").write_text("\n".join("abcde"))
        options |= {"head": head, "labels": tmp_path / "labels.txt"}
    planned = streamconv.plan(source, ConversionOptions(**options), save=tmp_path / "plan.json")
    api.convert(source, tmp_path / "by_options", **options)
    done = streamconv.convert_plan(tmp_path / "plan.json", tmp_path / "by_plan")
    assert done.plan == planned
    assert len(done.shards) == len(planned.shards) > 2
    assert contents(tmp_path / "by_plan") == contents(tmp_path / "by_options")
    assert streamconv.convert_plan(tmp_path / "plan.json", tmp_path / "by_options").was_finished
    assert api.convert(source, tmp_path / "by_plan", **options).was_finished


def test_another_process_converts_by_the_plan_without_torch(tmp_path: Path, save: Save) -> None:
    source, _ = save(tiny())
    api.convert(source, tmp_path / "whole")
    streamconv.plan(os.path.relpath(source), save=tmp_path / "plan.json")  # a relative path is saved as absolute
    code = (
        "import sys, streamconv; streamconv.convert_plan('plan.json', 'out')\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_remote_source_is_streamed_by_its_plan(tmp_path: Path, server: FileServer) -> None:
    torch.save(make_states(tiny())[0], server.folder / "x.pth")
    streamconv.plan(f"{server.url}/x.pth", save=tmp_path / "plan.json")
    api.convert(f"{server.url}/x.pth", tmp_path / "whole", stream=True)
    streamconv.convert_plan(tmp_path / "plan.json", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list(Path(os.environ["TORCH_HOME"]).rglob("x*.pth"))  # nothing was downloaded


def test_source_that_was_changed_since_is_refused(tmp_path: Path, save: Save, server: FileServer) -> None:
    source, _ = save(tiny())
    shutil.copy(source, server.folder / "x.pth")
    for where in (source, f"{server.url}/x.pth"):
        streamconv.plan(where, save=tmp_path / "plan.json")
        torch.save(make_states(tiny(), seed=1)[0], source)  # the same size
        shutil.copy(source, server.folder / "x.pth")
        with pytest.raises(ChangedError, match=r"was changed after its index was read. Plan the conversion again"):
            streamconv.convert_plan(tmp_path / "plan.json", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def edited(data: bytes, change: Any) -> bytes:
    """Return a plan file with another header, but the right sha256 of the rest."""
    first, rest = data.split(b"\n", 1)
    header = json.loads(first)
    change(header)
    return json.dumps(header).encode() + b"\n" + rest


def test_changed_plan_and_plan_of_another_version_are_refused(tmp_path: Path, save: Save) -> None:
    source, _ = save(tiny())
    path = tmp_path / "plan.json"
    streamconv.plan(source, save=path)
    whole = path.read_bytes()
    cases: list[tuple[bytes, str]] = [
        (whole.replace(b'"layer_norm_eps": 1e-06', b'"layer_norm_eps": 1e-05'), "was changed after it was written"),
        (whole[:-10], "was changed after it was written, or is incomplete"),
        (whole + b"\n", "was changed after it was written"),
        (edited(whole, lambda h: h.update(format_version=99)), "written by streamconv .* and this is"),
        (edited(whole, lambda h: h.update(streamconv="0.0.1")), "written by streamconv 0.0.1, and this is"),
        (edited(whole, lambda h: h.update(format="a map")), "is not a plan"),
        (edited(whole, lambda h: h.pop("sha256")), "is not a plan"),
        (b"", "is not a plan"),
        (b"[" * 10**6, "is not a plan"),
        (source.read_bytes(), "is not a plan"),
    ]
    for data, message in cases:
        assert data != whole
        path.write_bytes(data)
        with pytest.raises(UsageError, match=message):
            streamconv.convert_plan(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def signed(first: bytes, recorded: bytes, plan: bytes) -> bytes:
    """Return a plan file with the right sha256 of these lines."""
    rest = b"\n".join([recorded, plan, b""])
    return json.dumps({**json.loads(first), "sha256": sha256(rest).hexdigest()}).encode() + b"\n" + rest


def test_plan_with_a_right_digest_and_wrong_contents_is_refused(tmp_path: Path, save: Save) -> None:
    """The digest finds mistakes only: a plan with a digest that was computed again is checked, too."""
    source, _ = save(tiny())
    path = tmp_path / "plan.json"
    streamconv.plan(source, save=path)
    first, recorded, plan, _ = path.read_bytes().split(b"\n")
    value = json.loads(plan)
    value["shards"][0][1][0][1][4] = 4  # the offset of a tensor that has a part of a record
    value["shards"][0][1][0][1][2] = [1]
    value["shards"][0][1][0][1][5] = [1]
    for lines in (
        (recorded, json.dumps(value).encode()),  # another fingerprint
        (recorded, b"{}"),
        (b"{}", plan),
        (plan, recorded),
        (recorded, b"\xff"),
        (recorded, b"[" * 100_000),
        (recorded, b'{"a":' * 100_000),
        (recorded, b""),
    ):
        path.write_bytes(signed(first, *lines))
        with pytest.raises(UsageError, match=r"is damaged: .*\. Make the plan again"):
            streamconv.convert_plan(path, tmp_path / "out")


RECORD, TENSOR = ("records", 0), ("shards", 0, 1, 0, 1)
NOT_SIZES = (-1, 1.5, True, "1", None, 10**30)
HOSTILE: list[tuple[tuple[str | int, ...], Any]] = [
    *((("shards", 0, 0), name) for name in (
        "../../x.safetensors", "/tmp/x.safetensors", "a/x.safetensors", "config.json", "streamconv.json", "..", "",
        "a\0b", "\x1b[31m", "run.py", 5, None, ["x"], "model-00002-of-00002.safetensors",
    )),
    *((("other_files", name), "{}") for name in (
        "../../x.json", "/tmp/x.json", "streamconv.json", ".bashrc", "modeling.py", "", "a\0b", "model.safetensors",
    )),
    (("other_files", "preprocessor_config.json"), "x" * 10**7),
    (("other_files", "preprocessor_config.json"), 5),
    (("config", "auto_map"), {"AutoModel": "x.py"}),
    *(((*RECORD, i), value) for i in (0, 2, 3) for value in (*NOT_SIZES, 2**62)),
    *(((*RECORD, 4), value) for value in (-1, 1.5, True, "1")),
    *(((*TENSOR, i), value) for i in (3, 4) for value in (*NOT_SIZES, 2**62)),
    *(((*TENSOR, i), [value] * 4) for i in (2, 5) for value in (*NOT_SIZES, 2**50)),
    ((*TENSOR, 5), [1]),
    *(((*TENSOR, 1), dtype) for dtype in ("F99", "F64", "", 5, None)),
    *(((*TENSOR, 0), kind) for kind in ("exec", "cast", "concat", "multiply", "", None)),
    *((("shards", 0, 1, 0, 0), name) for name in ("\x1b[2J", "a\nb", "x" * 2000, "", 5)),
    *((("files", 0, 0), kind) for kind in ("inline", None)),
    *((("files", 0, 1), path) for path in ("x.pth", "/a\0b", 5)),
    *((("files", 0, 2), size) for size in NOT_SIZES),
    (("files", 0, 3), [["etag", 1.5]]),
    (("shards",), []),
    (("dimensions", "hidden"), 1.5),
    *(((name,), 1.5) for name in (
        "family", "model", "is_published", "assumed_heads", "architecture", "mapping", "shards", "config", "notes",
        "image_processor", "image_processor_from", "other_files", "unproved", "skipped", "filled", "block_chunks",
        "files", "records", "dimensions", "format_version",
    )),
]  # fmt: skip


def test_hostile_plan_is_refused(tmp_path: Path, save: Save) -> None:
    """Each entry of a plan is replaced by one that no plan has; the digests are right."""
    source, _ = save(tiny())
    path = tmp_path / "plan.json"
    streamconv.plan(source, save=path)
    first, recorded, plan, _ = path.read_bytes().split(b"\n")
    for where, wrong in HOSTILE:
        value = json.loads(plan)
        entry = value
        for key in where[:-1]:
            entry = entry[key]
        entry[where[-1]] = wrong
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - each has its own message
            plan_json.from_json(json.dumps(value))
        assert "fingerprint" not in str(caught.value), where
        path.write_bytes(signed(first, recorded, json.dumps(value).encode()))
        with pytest.raises(UsageError, match="is damaged") as refused:
            streamconv.convert_plan(path, tmp_path / "out")
        assert len(str(refused.value)) < 1000, where
    assert not (tmp_path / "out").exists()


def test_plan_that_would_take_much_memory_is_refused_before_it_is_parsed(tmp_path: Path, save: Save) -> None:
    source, _ = save(tiny())
    plan = json.loads(plan_json.to_json(streamconv.plan(source)))
    deep = tensor = plan["shards"][0][1][0][1]
    for _ in range(100):
        deep = ["concat", 0, deep]
    changes: list[dict[str, Any]] = [
        {"shards": [["model.safetensors", [["x", tensor]] * 300_000]]},
        {"shards": [["model.safetensors", [["x", deep]]]]},
        {"files": [["path", "/x", 1, []]] * 20_000},
    ]
    for text in ("[" * 3_000_000, "," * 7_000_000, ":" * 600_000, *(json.dumps({**plan, **each}) for each in changes)):
        with pytest.raises(ValueError, match=r"than 65,536 tensors need|300,000 tensors|20,000 files|nested too deep"):
            plan_json.from_json(text)


def test_secrets_are_never_saved(tmp_path: Path, server: FileServer) -> None:
    torch.save(make_states(tiny())[0], server.folder / "x.pth")
    for url in (f"{server.url}/x.pth?sig=passw0rd", f"{server.url.replace('://', '://me:passw0rd@')}/x.pth"):
        with pytest.raises(UsageError, match="holds a user, a password or a query") as caught:
            streamconv.plan(url, save=tmp_path / "plan.json")
        assert "passw0rd" not in str(caught.value)
        assert not (tmp_path / "plan.json").exists()


def test_source_that_nothing_identifies_is_not_saved(tmp_path: Path, save: Save) -> None:
    source, _ = save(tiny())
    streamconv.plan(source, save=tmp_path / "plan.json")
    planned = plan_file.read(tmp_path / "plan.json")
    unversioned = FileRef(Address("https://host/x.safetensors"), 1, ((UNVERSIONED, 1),))
    moved = {leaf.record: None for shard in planned.plan.shards for _, each in shard.tensors for leaf in each.leaves()}
    from dataclasses import replace

    plan = planned.plan.with_records({record: replace(record, file=unversioned) for record in moved})
    assert plan_file.to_bytes(replace(planned, plan=plan))  # CRC-32s identify the bytes
    with pytest.raises(UsageError, match="names no version of the file"):
        plan_file.to_bytes(replace(planned, plan=plan, has_checksums=False))


def test_plan_file_is_complete_or_absent(tmp_path: Path, save: Save) -> None:
    source, _ = save(tiny())
    streamconv.plan(source, OPTIONS, save=tmp_path / "plan.json")
    with pytest.raises(OutputError, match=r"its folder does not exist\. Create it"):
        streamconv.plan(source, save=tmp_path / "none" / "plan.json")
    with pytest.raises(UsageError, match="no path contains a null byte"):
        streamconv.plan(source, save="plan\0.json")
    with pytest.raises(UsageError, match="must be on this machine"):
        streamconv.plan(source, save="s3://bucket/plan.json")
    streamconv.plan(source, save=tmp_path / "plan.json")
    assert sorted(os.listdir(tmp_path)) == sorted({*os.listdir(tmp_path)} - {".plan.json.streamconv-incomplete"})
    assert plan_file.read(tmp_path / "plan.json").plan.shards


def test_plan_replaces_only_a_plan(tmp_path: Path, save: Save) -> None:
    source, _ = save(tiny())
    before = source.read_bytes()
    (tmp_path / "link.json").symlink_to(source)
    for path in (source, tmp_path, tmp_path / "link.json"):
        with pytest.raises(OutputError, match="is not a plan, and is not replaced"):
            streamconv.plan(source, save=path)
    assert source.read_bytes() == before
    (tmp_path / "empty.json").touch()  # by mktemp
    streamconv.plan(source, save=tmp_path / "empty.json")


def test_large_plan_is_compact(tmp_path: Path) -> None:
    """15,000 tensors take a few megabytes."""
    from tests.support import plan_of_shapes  # shapes alone: no weights

    layers = 1_070  # 14 tensors each
    state = {name: tuple(value.shape) for name, value in make_states(tiny())[0].items()}
    block = {name: shape for name, shape in state.items() if name.startswith("blocks.0.")}
    state = {name: shape for name, shape in state.items() if not name.startswith("blocks.")}
    state |= {
        f"blocks.{i}.{name.removeprefix('blocks.0.')}": shape for i in range(layers) for name, shape in block.items()
    }
    plan = plan_of_shapes(state, tmp_path, num_heads=2, max_shard_bytes=10**7)
    text = plan_json.to_json(plan)
    targets = sum(len(shard.tensors) for shard in plan.shards)
    assert targets > 15_000
    assert len(text) < 300 * targets
    assert plan_json.from_json(text) == plan


def test_options_that_the_plan_has_decided_are_refused(tmp_path: Path, save: Save) -> None:
    source, _ = save(tiny())
    done = run("plan", source, "--save", "plan.json", "--max-shard-size", "100KB", cwd=tmp_path)
    assert done.returncode == 0
    size = (tmp_path / "plan.json").stat().st_size
    assert done.stdout.splitlines()[-1] == f"saved as plan.json, {size / 1000:.0f} kB"
    for words, message in (
        (("convert", "--plan", "plan.json", "-o", "out", "--dtype", "bfloat16"), "--plan decides"),
        (("convert", source, "--plan", "plan.json", "-o", "out"), "--plan decides"),
        (("convert", "--plan", "plan.json", "-o", "out", "--dry-run"), "--dry-run needs SOURCE"),
        (("convert", "-o", "out"), "There is no SOURCE"),
        (("convert", source, "-o", "out", "--part", "1/2"), "--part needs --plan"),
        (("convert", "--plan", "plan.json", "-o", "out", "--part", "1/2", "--force"), "cannot be combined"),
        (("convert", "--plan", "plan.json", "-o", "out", "--part", "1/2", "--workers", "2"), "cannot be combined"),
        (("convert", source, "-o", "out", "--scheduler", "tcp://h:1", "--workers", "2"), "Give only one"),
        (("convert", "--plan", "none.json", "-o", "out"), "Make the plan first"),
        (("finish", "out", "--plan", source), "is not a plan"),
    ):
        refused = run(*words, cwd=tmp_path)
        assert (refused.returncode, refused.stdout) == (2, ""), words
        assert message in " ".join(refused.stderr.split()), words
    assert not (tmp_path / "out").exists()
