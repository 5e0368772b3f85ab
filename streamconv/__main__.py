"""Runs the command line: ``streamconv`` and ``python -m streamconv``."""

import os
import sys

from streamconv.cli.start import InterruptedByUser, print_early, run_with_signals


def main() -> None:
    """Run the command line. If it is interrupted, no incomplete file is left under its final name."""
    run_with_signals(_import_and_run)


def _import_and_run() -> None:
    try:
        from streamconv.cli.commands import main as run  # takes 0.2 s

        run()
    except Exception as error:  # while importing
        if InterruptedByUser.was_raised:  # a library caught it and raised its own error
            raise
        try:
            from streamconv.cli.bugs import to_our_error
        except (OSError, MemoryError) as reason:  # the limit on open files is too low, or the disk fails
            why = getattr(reason, "strerror", None) or "there is too little memory"
            fix = "Raise the limits on open files and memory (`ulimit -n`, `ulimit -v`), or check the disk."
            print_early([f"error: streamconv cannot be started: {why}. {fix}"])
            sys.stderr.flush()
            # Not sys.exit: ending the thread that waits for signals may need a C library, which cannot be loaded now.
            os._exit(2)

        ours = to_our_error(error, sys.argv[1:])
        print_early(f"error: {ours}".splitlines())
        sys.exit(ours.exit_code)


if __name__ == "__main__":
    main()
