"""python -m benchmarks.scale_worker PLAN OUTPUT I/N: a worker that waits for its start, so that imports are not timed.

Prints "ready", waits for a line of input, writes its part, and prints when it began and ended, and its CPU seconds.
"""

import json
import sys
import time
from pathlib import Path

import streamconv
import streamconv.files.http  # which is only imported when a URL is opened
from streamconv.output import plan_file


def main() -> None:
    plan, output, part = sys.argv[1:]
    planned = plan_file.read(Path(plan))  # imports what the plan needs
    locations = [output, *(str(file.location) for file in planned.plan.sources())]
    if any(location.startswith("s3://") for location in locations):
        import s3fs  # noqa: F401
    print("ready", flush=True)
    sys.stdin.readline()
    begin, cpu = time.monotonic(), time.process_time()
    streamconv.convert_plan(plan, output, part=part)
    print(json.dumps({"begin": begin, "end": time.monotonic(), "cpu": time.process_time() - cpu}), flush=True)


if __name__ == "__main__":
    main()
