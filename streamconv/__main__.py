"""Runs the command line: ``streamconv`` and ``python -m streamconv``."""

import os
import sys

from streamconv.cli.start import InterruptedByUser, print_early, run_with_signals


def main() -> None:
    """Run the command line. However it is interrupted, no incomplete file gets its final name."""
    run_with_signals(_import_and_run)


def _import_and_run() -> None:
    try:
        from streamconv.cli.commands import main as run  # which takes a fifth of a second

        run()
    except Exception as error:  # while importing
        if InterruptedByUser.was_raised:  # a library has turned the interruption into an error of its own
            raise
        try:
            from streamconv.cli.bugs import to_our_error
        except (OSError, MemoryError) as reason:  # too few files can be open, or the disk fails
            print_early([f"error: streamconv cannot be started: {str(reason) or 'there is too little memory'}."])
            sys.stderr.flush()
            os._exit(2)  # Python would end the thread that waits for signals, and for that C may load a library

        ours = to_our_error(error, sys.argv[1:])
        print_early(f"error: {ours}".splitlines())
        sys.exit(ours.exit_code)


if __name__ == "__main__":
    main()
