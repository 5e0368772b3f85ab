"""Runs the command line: ``python -m streamconv``."""

from streamconv.cli.commands import main

if __name__ == "__main__":
    main()
