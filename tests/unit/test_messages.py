"""The results of commands as a person reads them: the summary first, short hashes, coloured verdicts."""

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import click
import pytest

from streamconv.cli.layout import Line, laid_out
from streamconv.cli.messages import (
    FEW,
    conversion_lines,
    model_lines,
    models_as_dict,
    plan_lines,
    reverted_lines,
    synth_lines,
)
from streamconv.cli.verification_messages import verification_lines
from streamconv.families.selection import Skipped
from streamconv.jobs.conversion import Conversion
from streamconv.jobs.revert import Reverted
from streamconv.jobs.synth import SyntheticFiles
from streamconv.output.manifest import WrittenFile
from streamconv.planning.plan import Plan
from streamconv.verification.result import CastCost, Check, Verification
from tests.support import GOLDEN, expanded, plan_of_shapes

DIGEST = "0123456789abcdef" * 4


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return plan_of_shapes(expanded(GOLDEN["dinov2_vits14"]["source"], 12), tmp_path, "dinov2_vits14_pretrain.pth")


def styled(lines: Iterable[Line | str], columns: int | None = None) -> list[str]:
    return [laid_out(line, columns) for line in lines]


def plain(lines: Iterable[Line | str], columns: int | None = None) -> list[str]:
    return click.unstyle("\n".join(styled(lines, columns))).split("\n")


def conversion(plan: Plan, resumed_bytes: int = 0, **changes: object) -> Conversion:
    shards = {shard.filename: DIGEST for shard in plan.shards}
    done = Conversion(Path("out"), plan, shards, False, resumed_bytes, True, None, seconds=0.5)
    return replace(done, **changes)  # type: ignore[arg-type]


def many_files(plan: Plan, count: int) -> Plan:
    return replace(plan, shards=tuple(replace(plan.shards[0], filename=f"{i}.safetensors") for i in range(count)))


def test_conversion_ends_with_size_time_speed_and_short_hashes(plan: Plan) -> None:
    assert plain(conversion_lines(conversion(plan))) == [
        "dinov2_vits14: converted into out, 88 MB in 0.5 s, 176 MB/s",
        "  model.safetensors  88 MB  sha256 0123456789ab",
    ]
    finished = plain(conversion_lines(conversion(plan, was_finished=True, seconds=0)))
    assert finished == [
        "dinov2_vits14: was already converted into out; nothing was changed",
        "  model.safetensors  88 MB  sha256 0123456789ab as recorded",
    ]
    assert conversion(plan).as_dict()["seconds"] == 0.5
    assert conversion(plan).as_dict()["shards"][0] == {
        "file": "model.safetensors", "bytes": plan.shards[0].size, "sha256": DIGEST,
    }  # fmt: skip


def test_bytes_of_an_interrupted_run_do_not_count_as_speed(plan: Plan) -> None:
    first = plain(conversion_lines(conversion(plan, plan.weights - 10_000_000)))[0]
    assert first.endswith("out, 88 MB, 78 MB of it before an interruption; the other 10 MB in 0.5 s, 20 MB/s")
    assert plain(conversion_lines(conversion(plan, plan.weights)))[0].endswith(
        "out, 88 MB, all of it before an interruption"
    )
    reverted = Reverted(
        "dinov2", "dinov2_vits14", {Path("x.pth"): WrittenFile(90_000_000, DIGEST)}, 88_000_000, 44_000_000, 2
    )
    assert plain(reverted_lines(reverted))[:2] == [
        "a model shaped like dinov2_vits14: reverted into x.pth, 88 MB, 44 MB of it before an interruption; "
        "the other 44 MB in 2.0 s, 22 MB/s",
        "  x.pth  90 MB  sha256 0123456789ab",
    ]


def test_upload_is_reported_with_its_repository(plan: Plan) -> None:
    first = plain(conversion_lines(conversion(plan, sent_to="ada/it")))[0]
    assert first.startswith("dinov2_vits14: converted and uploaded to ada/it, one file at a time, 88 MB in")


def test_damage_that_could_not_be_seen_is_a_warning(plan: Plan) -> None:
    lines = styled(conversion_lines(conversion(plan, is_crc_checked=False, overflow_count=1234)))
    assert [click.unstyle(line) for line in lines[-2:]] == [
        "  warning: 1,234 finite values are outside the range of float32 and are now infinite",
        "  warning: the source has no CRC-32s, so its bytes could not be checked for damage",
    ]
    assert click.style("warning:", fg="yellow") in lines[-1]


def test_many_files_and_skipped_parts_are_counted(plan: Plan) -> None:
    plan = replace(many_files(plan, 1000), skipped=tuple(Skipped(f"x{i}.", 2, 1500, "not selected") for i in range(50)))
    lines = plain(conversion_lines(conversion(plan)))
    assert lines[FEW : FEW + 4] == [
        "  4.safetensors  88 MB  sha256 0123456789ab",
        "  … and 995 more files; --json shows them all",
        "  skipped: x0.* (2 tensors, 1.5 kB): not selected",
        "  skipped: x1.* (2 tensors, 1.5 kB): not selected",
    ]
    assert lines[-1] == "  … and 45 more skipped parts; --json shows them all"
    planned = plain(plan_lines(plan))
    assert "              … and 995 more files; --mapping shows them all" in planned
    assert len(planned) < 25
    assert len(plain(plan_lines(plan, with_mapping=True))) > 1000 + 50 + len(plan.mapping)
    assert len(plain(conversion_lines(conversion(many_files(plan, FEW + 1))))[1 : FEW + 2]) == FEW + 1
    assert "more files" not in "".join(plain(conversion_lines(conversion(many_files(plan, FEW + 1)))))


def test_plan_begins_with_the_summary_and_shows_the_mapping_on_request(plan: Plan) -> None:
    plan = replace(plan, notes=("2 attention heads",), skipped=(Skipped("head.", 1, 40, "optimizer state"),))
    summary = plain(plan_lines(plan))
    assert summary == [
        "dinov2_vits14, as Dinov2Model",
        "  parameters  22,056,576 in float32",
        "  size        88 MB",
        "  model       hidden size 384, 12 layers, 6 attention heads, patches of 14 x 14, "
        "positions for 518 x 518 pixels",
        "  files       model.safetensors  88 MB, 223 tensors",
        "              config.json, preprocessor_config.json",
        "  skipped     head.* (1 tensor, 40 bytes): optimizer state",
        "  assumed     2 attention heads",
        "",
        "175 source tensors become 223; --mapping shows how.",
    ]
    mapped = plain(plan_lines(plan, with_mapping=True))
    assert mapped[:-176] == summary[:-1]
    assert mapped[-176] == "175 source tensors become 223:"
    assert mapped[-175] == "cls_token                   F32 [1, 1, 384]           -> embeddings.cls_token"


def test_plan_and_conversion_fit_into_80_columns(plan: Plan) -> None:
    reason = "a head for depth or segmentation, which no transformers class has"
    plan = replace(
        plan, skipped=(Skipped("model.teacher.decode_head.", 1, 40, reason),), notes=(f"{reason}, {reason}",)
    )
    assert plain(plan_lines(plan), 80)[7:11] == [
        "  skipped     model.teacher.decode_head.* (1 tensor, 40 bytes): a head for depth",
        "              or segmentation, which no transformers class has",
        "  assumed     a head for depth or segmentation, which no transformers class has,",
        "              a head for depth or segmentation, which no transformers class has",
    ]
    for lines in (plan_lines(plan, with_mapping=True), conversion_lines(conversion(plan))):
        assert all(len(line) <= 80 or " " not in line.strip() for line in plain(lines, 80))


def test_models_fit_into_80_columns_and_json_has_their_files() -> None:
    lines = plain(model_lines())
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if " licence " not in line]
    models = models_as_dict()["models"]
    assert sorted(row[:2] for row in rows) == sorted([each["name"], each["published_name"]] for each in models)
    assert lines[0] == "dinov2, licence apache-2.0"
    assert rows[3] == ["dinov2_vitg14", "dinov2-giant", "4.5", "GB"]
    classifier = next(each for each in models if each["name"] == "dinov2_vits14_reg_1layer")
    assert (classifier["family"], classifier["licence"], classifier["bytes"]) == ("dinov2", "apache-2.0", 91_308_448)
    assert [each["file"] for each in classifier["files"]] == [
        "dinov2_vits14_reg4_pretrain.pth", "dinov2_vits14_reg4_linear_head.pth",
    ]  # fmt: skip
    assert classifier["files"][0]["url"].startswith("https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/")


def test_synthetic_files_are_listed_with_their_sizes(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(bytes(1500))
    assert [*synth_lines(SyntheticFiles(tmp_path / "x.pth", None))] == [f"{tmp_path / 'x.pth'}  1.5 kB"]


def verification(*checks: Check, device: str | None = "cpu") -> Verification:
    return Verification(checks, device, "builtin", {}, {}, {}, {}, 12.0)


@pytest.mark.parametrize(
    ("checks", "colours", "verdict", "colour"),
    [
        ([Check("bytes", True, "a")], ["green"], "Looks ok!", "green"),
        ([Check("bytes", True, "a"), Check("load", False, "b", ("c",))], ["green", "red"],
         "Do not use this output. Failed: load.", "red"),
        ([Check("bytes", True, "a"), Check("parity", None, "--no-parity")], ["green", "yellow"],
         "Looks ok, but not everything was checked: the parity check did not run.", "yellow"),
        ([Check("bytes", True, "a", not_checked="the source was not read")], ["yellow"],
         "Looks ok, but not everything was checked: the source was not read.", "yellow"),
        ([Check("parity", True, "a", (), {"float32_only": "cuda:0 is full"}, "only float32 was compared")], ["yellow"],
         "Looks ok (float32 only), but not everything was checked: only float32 was compared.", "yellow"),
        ([Check("parity", None, "no")], ["yellow"], "Nothing was checked.", "yellow"),
    ],
)  # fmt: skip
def test_verdicts_are_green_yellow_or_red(checks: list[Check], colours: list[str], verdict: str, colour: str) -> None:
    lines = styled(verification_lines(verification(*checks)))
    words = {"green": "ok       ", "yellow": "ok       ", "red": "FAILED   "}
    heads = [line for line in lines if line.startswith(("bytes", "load", "parity"))]
    for check, head, expected in zip(checks, heads, colours, strict=True):
        word = "not run: " if check.passed is None else words[expected]
        assert head == f"{check.name:14}{click.style(word, fg=expected)}{check.finding}"
    assert click.unstyle(lines[-1]) == verdict
    assert lines[-1].startswith(click.style("", fg=colour, bold=True, reset=False))


def test_peak_memory_is_reported_without_mapped_files() -> None:
    """The system can reclaim their pages, which other tools and the report count as well."""
    memory = {"host_peak": 9 * 10**8, "host_anonymous_start": 4 * 10**8, "host_anonymous_peak": 5 * 10**8}
    lines = plain(verification_lines(replace(verification(Check("bytes", True, "a")), memory=memory)))
    peak = "500 MB peak memory without mapped files, 400 MB of it from importing torch and transformers"
    assert lines[-2].partition(", ")[2] == peak
    memory = {"gpu_peak": 10**9, "gpu_reserved_peak": 2 * 10**9, "gpu_used_peak": 3 * 10**9}
    lines = plain(verification_lines(replace(verification(Check("bytes", True, "a")), memory=memory)))
    assert lines[-2].endswith("1.0 GB peak GPU memory (2.0 GB reserved, 3.0 GB used by all processes)")


def test_verdict_without_a_source_names_what_was_checked() -> None:
    others = Check("bytes", None, "no source was given")
    lines = plain(verification_lines(verification(Check("files", True, "a"), others, device=None)))
    assert lines[-1] == "Files unchanged since they were written; not compared with a source."


def test_details_of_a_check_are_wrapped_under_its_text() -> None:
    proves, problem = (
        "every byte of every tensor equals its source's " * 2,
        "norm.weight differs from element 0 on " * 3,
    )
    lines = plain(verification_lines(verification(Check("bytes", None, proves.strip(), (problem.strip(),)))), 80)
    assert lines[0].startswith("bytes         not run: every byte")
    assert all(len(line) <= 80 and line.startswith(" " * 23 + line.strip()[0]) for line in lines[1:-2])
    assert len(lines) == 6


@pytest.mark.parametrize(
    ("check", "finding"),
    [
        (Check("bytes", False, "", (), {"tensors": 175, "wrong": 2}), "2 of 175 tensors do not match their source"),
        (Check("bytes", False, "", (), {"tensors": 175, "wrong": 1}), "1 of 175 tensors does not match its source"),
        (Check("bytes", False, "", (), {"tensors": 175, "wrong": 0}), "weight files or checksums are not as expected"),
        (Check("config", False, ""), "values in config.json or another small file are not as planned"),
        (Check("parity", False, "", (), {"differences": {"cls": 2.0, "patches": 0.0, "logits": math.nan},
                                         "tolerance": 0.0, "size": 224}), "2 of 3 layer outputs differ at 224x224"),
        (Check("parity", False, "", (), {"differences": {"cls": 0.0}, "tolerance": 0.0}),
         "the two models do not have the same layers"),
        (Check("parity", False, ""), "the models could not be compared"),
    ],
)  # fmt: skip
def test_failed_check_says_what_failed_not_what_it_would_have_proved(check: Check, finding: str) -> None:
    found = replace(check, proves="every tensor equals its source's")
    assert plain(verification_lines(verification(found)))[0] == f"{check.name:14}FAILED   {finding}"
    assert verification(found).as_dict()["checks"][0]["finding"] == finding


def test_long_label_does_not_fill_the_screen() -> None:
    found = replace(verification(), predictions=(("x" * 10_000, 0.5),))
    assert f"   50.0%  {'x' * 79}…" in plain(verification_lines(found))


def test_verdict_states_the_cost_of_a_cast() -> None:
    found = replace(
        verification(Check("bytes", True, "a")), cast_cost=CastCost("bfloat16", 0.0571, 0.0242, 4.1),
        output={"cast": {"from": "float32", "to": "bfloat16"}},
    )  # fmt: skip
    assert plain(verification_lines(found))[-1] == (
        "Looks ok! Cost of the cast: in bfloat16, from_pretrained's default, outputs differ from the float32 "
        "original's by up to 0.057 (in float32, by up to 0.024). The original's largest output value is 4.1."
    )
    gap = "Looks ok, but not everything was checked: the cost of the cast was not measured."
    assert plain(verification_lines(replace(found, cast_cost=None)))[-1] == gap
    overflown = replace(found, cast_cost=CastCost("float32", math.inf, math.inf, 4.1))
    assert plain(verification_lines(overflown))[-1].endswith(
        "in float32, from_pretrained's default, outputs differ from the float32 original's by infinity or NaN. The "
        "original's largest output value is 4.1."
    )


def test_parity_row_states_its_size_and_the_difference_by_design() -> None:
    numbers = {
        "size": 224, "native_size": 518, "tolerance": 1e-13, "largest": 2e-15, "differences": {"cls": 2e-15},
        "float32": {"largest": 1e-6}, "as_published": {"cls": 0.0125, "patches": 0.071},
        "known_difference": {
            "changes": "the original resizes position embeddings differently, which changes outputs",
            "for_check": "it resized them like transformers",
        },
    }  # fmt: skip
    parity = Check("parity", True, "both compute the same, at 224x224", (), numbers)
    lines = [line.strip() for line in plain(verification_lines(verification(parity)))[1:-2]]
    assert lines == [
        "1 layer outputs on cpu, second pass in float64: largest difference 2e-15, allowed 1e-13; first pass in "
        "float32: 1e-06",
        "by design, not an error: the original resizes position embeddings differently, which changes outputs by up to "
        "0.0125 (cls), 0.071 (patches); for this check, it resized them like transformers",
        "224x224 is the image processor's size; --thorough adds the native size, 518x518; the bytes check covers every "
        "position embedding",
    ]
    native = Check("native", True, "both compute the same, at 518x518", (), {**numbers, "size": 518})
    assert "--thorough" not in "".join(plain(verification_lines(verification(parity, native))))


def test_record_for_the_manifest_names_no_command_and_has_no_pictures() -> None:
    """The manifest may be published, and a command names folders of the user's machine."""
    found = replace(
        verification(Check("bytes", True, "a")), command="streamconv verify /home/ada/x", pictures={"image": "data:x"}
    )
    assert found.as_dict()["command"] == "streamconv verify /home/ada/x"
    assert "ada" not in str(found.as_record())
    assert found.as_record()["pictures"] == {}
