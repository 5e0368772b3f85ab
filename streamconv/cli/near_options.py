"""Finds the options that a mistyped one, or one that another program has, may stand for."""

import click

from streamconv.families.near_names import near_names

# What other programs call an option, where the names are not alike.
OTHER_NAMES = {
    "--branch": "--revision",
    "--destination": "--output",
    "--hub-model-id": "--push-to-hub",
    "--num-attention-heads": "--num-heads",
    "--outtype": "--dtype",
    "--overwrite": "--force",
    "--overwrite-output-dir": "--force",
    "--precision": "--dtype",
    "--prefix": "--select",
    "--replace": "--force",
    "--repo-id": "--push-to-hub",
    "--save-dir": "--output",
    "--save-directory": "--output",
    "--silent": "--quiet",
    "--skip-verification": "--no-verify",
    "--split-max-size": "--max-shard-size",
    "--torch-dtype": "--dtype",
}


def near_options(name: str, command: click.Command) -> list[str]:
    """Return the options of ``command`` that ``name`` may stand for, the likeliest first."""
    known = {long.lstrip("-"): long for long in map(_long_name, command.params) if long is not None}
    if other := OTHER_NAMES.get(name):
        return [other] if other in known.values() else []
    return [known[each] for each in near_names(name.lstrip("-"), known)]


def _long_name(parameter: click.Parameter) -> str | None:
    """Return the name that the help shows: the first long one."""
    names = parameter.opts if isinstance(parameter, click.Option) else []
    return next((name for name in names if name.startswith("--")), None)
