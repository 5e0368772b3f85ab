"""python -m benchmarks.kills [MODEL] [--runs KILLS] [--dir DIR]: how much work is lost if a conversion is killed.

A conversion is ended by SIGKILL, SIGTERM or SIGINT at random moments and started again, over and over. Each
time that it finishes, its folder must equal that of an undisturbed conversion, byte for byte. The bytes
written again are those that a killed process had written minus those that the journal keeps.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

from benchmarks.measure import machine, made_source, parse_arguments

SHARD_SIZES = ("5GB", "500MB")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in folder.iterdir():
        digest = sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        found[path.name] = digest.hexdigest()
    return found


def kept(folder: Path) -> int:
    """Bytes of output that the folder's journal keeps."""
    journal = folder / ".streamconv-journal"
    if not journal.exists():  # not started, or killed after the journal was deleted
        return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    return sum({entry["file"]: entry["resume_point"]["size"] for entry in entries if "file" in entry}.values())


def watch(process: "subprocess.Popen[bytes]", seconds: float) -> tuple[int, int]:
    """Wait until the process ends or the time is over; returns the bytes that it wrote and its peak memory in bytes."""
    end, written, peak = time.monotonic() + seconds, 0, 0
    while process.poll() is None and time.monotonic() < end:
        try:
            lines = Path(f"/proc/{process.pid}/io").read_text() + Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        numbers = {line.split(":")[0]: line.split()[1] for line in lines.splitlines() if len(line.split()) > 1}
        written, peak = int(numbers["wchar"]), max(peak, int(numbers.get("VmHWM", 0)) << 10)
        time.sleep(0.002)
    return written, peak


def rounds(source: Path, out: Path, shard_size: str, kills: int) -> tuple[int, int, int]:
    """Kill a conversion ``kills`` times; returns how often it finished, most bytes written again, and peak memory."""
    words = [sys.executable, "-m", "streamconv", "convert", str(source), "-o", str(out), "--max-shard-size", shard_size]
    start = time.monotonic()
    subprocess.run(words, check=True, capture_output=True)
    seconds = time.monotonic() - start
    wanted = digests(out)
    shutil.rmtree(out)
    choice = random.Random(shard_size)
    finished = most = peak = done = 0
    while done < kills or out.exists():  # the last run is not killed
        before = kept(out)
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        written, memory = watch(
            process, choice.uniform(min(0.5, seconds / 2), 1.5 * seconds) if done < kills else 10 * seconds
        )
        process.send_signal(choice.choice(SIGNALS))
        code, peak = process.wait(), max(peak, memory)
        if code == 0:
            if digests(out) != wanted:
                raise SystemExit(f"the folder differs after {done} kills")
            finished += 1
            shutil.rmtree(out)
        elif code not in (-9, -15, -2, 130):
            raise SystemExit(f"ended in {code}")
        else:
            done += 1
            most = max(most, written - (kept(out) - before))
    return finished, most, peak


def main() -> None:
    args = parse_arguments(__doc__, runs=40)
    with made_source(args.model, args.dir) as (source, out):
        size = source.stat().st_size
        print(
            f"{args.model}, {size:,} bytes; {machine()}\n`python -m benchmarks.kills {args.model} --runs {args.runs}`\n"
        )
        print("| shard size | kills | finished, all equal | most bytes written again | peak memory |")
        print("|---|---|---|---|---|")
        for shard_size in SHARD_SIZES:
            finished, most, peak = rounds(source, out, shard_size, args.runs)
            print(
                f"| {shard_size} | {args.runs} | {finished} | {most / 1e6:.0f} MB | {peak / 1e6:.0f} MB |", flush=True
            )


if __name__ == "__main__":
    main()
