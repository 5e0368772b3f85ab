"""The command line: options, commands, messages, the progress bar, signals and exit codes."""
