"""Options are accepted as people spell them in other tools, and results name them in one way."""

from pathlib import Path
from typing import Any

import click
import pytest
from huggingface_hub.serialization._base import parse_size_to_int

from streamconv import ConversionOptions, UsageError
from streamconv.cli.commands import app
from streamconv.files import retries
from streamconv.planning.shards import parse_size
from tests.support import run


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("300kb", 300_000), ("1 GB", 10**9), ("2TB", 2 * 10**12), ("1g", 10**9), ("1G", 10**9), ("500m", 5 * 10**8),
        ("500MiB", 500 << 20), ("1.5GiB", 3 << 29), ("2 gib", 2 << 30), ("64Ki", 64 << 10), ("300000 B", 300_000),
        ("5000000000", 5 * 10**9), (" 5GB ", 5 * 10**9), (5 * 10**9, 5 * 10**9), (10**6, 10**6),
    ],
)  # fmt: skip
def test_shard_sizes_are_decimal_or_binary_as_they_are_written(size: int | str, count: int) -> None:
    assert parse_size(size) == count
    assert ConversionOptions(max_shard_size=size).max_shard_bytes == count


@pytest.mark.parametrize("size", ["5GB", "1.5 mb", "0.5GB", "20KB", "300kb", "2TB", "2.7gb"])
def test_shard_sizes_are_parsed_as_huggingface_hub_parses_them(size: str) -> None:
    assert parse_size(size) == parse_size_to_int(size)


@pytest.mark.parametrize(
    "size", ["0", 0, "0GB", "5iB", "5 apples", "GB", "1e9", "-5GB", "5GBB", "9" * 400 + "GB", "٥GB"]
)
def test_invalid_size_is_refused(size: int | str) -> None:
    with pytest.raises(UsageError, match=r"is not a shard size\. Write it as 500MB or 5GB\.$"):
        parse_size(size)


@pytest.mark.parametrize("size", [5, "5", " 5 ", "5.0", "99999"])
def test_small_number_without_a_unit_is_refused_with_the_unit_that_was_meant(size: int | str) -> None:
    with pytest.raises(
        UsageError, match=rf"too small\. Add its unit: {str(size).strip()}GB or {str(size).strip()}MB\.$"
    ):
        parse_size(size)


@pytest.mark.parametrize(
    ("spellings", "dtype"),
    [
        (("bf16", "BF16", "bfloat16", "torch.bfloat16", "Bfloat16"), "bfloat16"),
        (("fp16", "f16", "half", "float16", "torch.half", "FP16", " fp16"), "float16"),
        (("fp32", "f32", "float", "float32", "torch.float32", "F32"), "float32"),
    ],
)
def test_dtypes_have_the_names_of_other_tools_and_become_torchs(spellings: tuple[Any, ...], dtype: str) -> None:
    for spelling in spellings:
        assert ConversionOptions(dtype=spelling) == ConversionOptions(dtype=dtype)  # type: ignore[arg-type]
        assert ConversionOptions(dtype=spelling).dtype == dtype


@pytest.mark.parametrize("dtype", ["float8", "int8", "double", "", "torch.", "torch", 16])
def test_other_dtypes_are_refused_with_the_choices(dtype: Any) -> None:
    with pytest.raises(UsageError, match=r"^Cannot cast to .*\. Choose float32, float16 or bfloat16\.$"):
        ConversionOptions(dtype=dtype)


def _long_names() -> list[tuple[str, str]]:
    return [
        (name, option)
        for name, command in app.commands.items()
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for option in parameter.opts
        if "-" in option.lstrip("-")
    ]


@pytest.mark.parametrize(("command", "option"), _long_names())
def test_every_option_is_accepted_with_underscores(
    command: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two spellings are parsed alike, whatever the command then says of the rest of the line."""
    monkeypatch.setattr(retries, "RETRY_WAITS_SECONDS", (0,) * 8)
    underscored = "--" + option[2:].replace("-", "_")
    results = [run(command, "missing.pth", word, cwd=tmp_path).stderr for word in (option, underscored)]
    assert results[0] == results[1]
    assert "No such option" not in results[0]


def test_help_shows_one_spelling_of_each_option(tmp_path: Path) -> None:
    for command in app.commands:
        text = run(command, "--help", cwd=tmp_path).stdout
        assert "_" not in "".join(word for word in text.split() if word.startswith("--")).replace("--model_name", "")


def test_values_keep_their_underscores(tmp_path: Path) -> None:
    for words in (("--max_shard_size=5_apples",), ("--max_shard_size", "5_apples")):
        assert "'5_apples'" in run("plan", "x_y.pth", *words, cwd=tmp_path).stderr
    assert "x_y.pth: there is no such file" in run("plan", "x_y.pth", cwd=tmp_path).stderr
