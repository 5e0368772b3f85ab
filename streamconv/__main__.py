"""Runs the command line: ``streamconv`` and ``python -m streamconv``."""

import sys

from streamconv.cli.start import run_with_signals


def main() -> None:
    """Run the command line. However it is interrupted, no incomplete file gets its final name."""
    run_with_signals(_import_and_run)


def _import_and_run() -> None:
    try:
        from streamconv.cli.commands import main as run  # which takes a fifth of a second

        run()
    except Exception as error:  # while importing
        from streamconv.cli.bugs import to_our_error

        ours = to_our_error(error, sys.argv[1:])  # whose lines are visible
        print(f"error: {ours}", file=sys.stderr)
        sys.exit(ours.exit_code)


if __name__ == "__main__":
    main()
