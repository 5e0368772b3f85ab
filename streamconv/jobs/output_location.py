"""Where an output goes: a folder on this machine, or a URL in a store."""

from pathlib import Path

from streamconv.errors import UsageError
from streamconv.files.address import Address, Location, parse_folder
from streamconv.jobs.options import StrPath
from streamconv.jobs.prepare import refuse_own_output
from streamconv.planning.plan import Plan


def output_location(output: StrPath) -> Location:
    """Return the folder or URL that the user names.

    Raises:
        UsageError: the name is empty, or the URL is not valid.
    """
    return parse_folder(output, "output folder")


def refuse_overwriting_source(plan: Plan, location: Location, *, force: bool) -> None:
    """Refuse an output that would overwrite the files that the plan reads.

    Raises:
        UsageError, OutputError: see `refuse_own_output`.
    """
    read = [file.location for file in plan.sources()]
    if isinstance(location, Path):
        paths = [each for each in read if isinstance(each, Path)]
        refuse_own_output(paths, location, plan.filenames, force=force)
        return
    written = {f"{location.url}/{name}" for name in plan.filenames}
    for each in read:
        if isinstance(each, Address) and each.url in written:
            raise UsageError(f"{each} is the source, and the output would overwrite it. Choose another URL.")
