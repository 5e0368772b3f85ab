"""python -m benchmarks [SECTION …] [--models …] [--runs N] [--dir DIR] [--to DIR]: streamconv and other converters.

Generates its inputs in DIR with `streamconv synth` and deletes them afterwards. Every run is a process of its own.
The converters take turns, so that changes of the machine's speed affect all of them alike. The tables state whether
the source was in the page cache. Results go to side_by_side.json, .md and .png; running a section again replaces it.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.measure import (
    Run,
    as_json,
    files_in,
    forget_cached,
    machine,
    remove,
    run,
    size_on_disk,
    smallest_limit,
    synthesize,
)
from benchmarks.ways import (
    CONSOLIDATE,
    CONVERT,
    CP,
    DD,
    KEYS,
    MERGEKIT,
    MMAP,
    ORIGINAL,
    RUN,
    Options,
    command,
)

MODELS = ("dinov2_vits14", "dinov2_vitb14", "dinov2_vitl14", "dinov2_vitg14")
LARGE = "webssl_dino7b_full8b_518"
WAYS = (CP, DD, CONVERT, MMAP, MERGEKIT, RUN, ORIGINAL)
SLOW = {RUN, ORIGINAL}
FEW_RUNS = 2  # for slow converters with a source above 2 GB, and for the large model
MAX_MB = 20480  # memory limit of runs that could exhaust the machine
Result = dict[str, Any]


class Bench:
    """The sections of the benchmark. "Way" is a way to convert, as in `benchmarks.ways`."""

    def __init__(self, args: argparse.Namespace):
        self.runs, self.folder, self.search = args.runs, args.dir, not args.no_search
        self.models, self.all_ways = args.models, args.ways
        self.ways = [way for way in WAYS if way in args.ways]
        self.digests: dict[tuple[str, str | None], str] = {}

    def sections(self) -> dict[str, Callable[[Result], Iterator[Result]]]:
        """The sections by name. Each is given its earlier result and yields its new one, complete or not yet."""
        return {
            "models": self.each_model,
            "variants": lambda _: iter([self.variants()]),
            "formats": lambda _: iter([self.formats()]),
            "resume": lambda _: iter([self.resume()]),
            "where": lambda _: iter([self.where()]),
            "large": lambda _: iter([self.large()]),
        }

    def each_model(self, before: Result) -> Iterator[Result]:
        for model in self.models:
            before = {**before, model: self.one_model(model)}
            yield before

    def one_model(self, model: str) -> Result:
        with self.place() as place:
            source = synthesize(model, place / f"{model}_pretrain.pth")
            is_large = source.stat().st_size > 2 * 10**9
            counts = {way: min(self.runs, FEW_RUNS) if is_large and way in SLOW else self.runs for way in self.ways}
            ways = dict.fromkeys(self.ways, (source, Options()))
            found = self.compare(ways, place / "out", counts)
            self.look_closer(found, ways, place / "out")
            return {"bytes": source.stat().st_size, "ways": found}

    def variants(self) -> Result:
        """Conversions without and with a cast, to one shard and to several."""
        model, found = self.models[-1], {}
        with self.place() as place:
            source = synthesize(model, place / f"{model}_pretrain.pth")
            for dtype in (None, "bfloat16"):
                for shard_size in ("5GB", "500MB")[not dtype :]:  # "as stored, one file" is in the section "models"
                    ways = [way for way in self.ways if way in (CP, CONVERT, MMAP, MERGEKIT)]
                    options = Options(shard_size, dtype)
                    found[f"{dtype or 'float32, as stored'}, shards of {shard_size}"] = self.compare(
                        dict.fromkeys(ways, (source, options)), place / "out", dict.fromkeys(ways, self.runs)
                    )
            return {"model": model, "bytes": source.stat().st_size, "tables": found}

    def formats(self) -> Result:
        """Safetensors to safetensors: merge shards of 500 MB into one file."""
        model = self.models[-1]
        with self.place() as place:
            source = synthesize(model, place / f"{model}_pretrain.pth")
            sharded, distributed = place / "sharded", place / "distributed"
            subprocess.run(command(CONVERT, source, sharded, Options("500MB")), check=True, stdout=sys.stderr)
            subprocess.run(command("save_distributed", sharded, distributed, Options()), check=True, stdout=sys.stderr)
            source.unlink()
            ways = [way for way in (CP, CONVERT, MERGEKIT, CONSOLIDATE) if way in self.all_ways]
            sources = {way: (distributed if way == CONSOLIDATE else sharded, Options("500GB")) for way in ways}
            found = self.compare(sources, place / "out", dict.fromkeys(ways, self.runs))
            self.look_closer(found, sources, place / "out")
            return {"model": model, "bytes": size_on_disk(sharded), "ways": found}

    def resume(self) -> Result:
        """Cost of the second run after the first was killed at half of its output."""
        model, found = self.models[-1], {}
        with self.place() as place:
            source, out = synthesize(model, place / f"{model}_pretrain.pth"), place / "out"
            for way in [way for way in self.ways if way in (CONVERT, MMAP, MERGEKIT)]:
                words, runs = command(way, source, out, Options()), []
                for _ in range(self.runs):
                    kill_at_half(words, out, source.stat().st_size)
                    unfinished = None
                    if way == CONVERT:
                        unfinished = out.rename(out.with_name("unfinished"))
                    else:
                        remove(out)  # it cannot resume, and may refuse a folder that is not empty
                    runs.append(run(words, out, unfinished=unfinished))
                    self.show(way, runs[-1])
                    if runs[-1].code:
                        raise SystemExit(f"{way} failed")
                self.require_same(way, out, Options())
                found[way] = {"runs": as_json(runs)}
            return {"model": model, "bytes": source.stat().st_size, "ways": found}

    def where(self) -> Result:
        model = self.models[-1]
        with self.place() as place:
            source, out = synthesize(model, place / f"{model}_pretrain.pth"), place / "out"
            found: dict[str, list[Any]] = {"inside": [], "alone": [], "start": []}
            for _ in range(self.runs):
                for word in ("inside", "alone"):
                    os.sync()
                    time.sleep(3)
                    words = [sys.executable, "-m", "benchmarks.inside", str(source), str(out), word]
                    done = subprocess.run(words, check=True, stdout=subprocess.PIPE)
                    found[word].append(json.loads(done.stdout)[word])
                    remove(out)
                planned = run([sys.executable, "-m", "streamconv", "plan", str(source)], out)
                found["start"].append(planned.wall)
            return {"model": model, "bytes": source.stat().st_size, **found}

    def large(self) -> Result:
        """A source that the page cache may not hold: always read from disk, and with a memory limit for the peers."""
        with self.place() as place:
            source, out = synthesize(LARGE, place / f"{LARGE}.pth"), place / "out"
            fast = {way: (source, Options()) for way in self.ways if way in (CP, DD, CONVERT)}
            counts = dict.fromkeys(fast, min(self.runs, FEW_RUNS))
            found = self.compare(fast, out, counts, warm_up=False, cold=True)
            if self.search and CONVERT in fast:
                words, usual = command(CONVERT, source, out, Options()), run_of(found[CONVERT]["runs"][-1])
                found[CONVERT]["limit"] = smallest_limit(words, source, out, usual)
            cast = Options(dtype="bfloat16")
            once = {f"{CONVERT} --dtype bfloat16": (CONVERT, cast)} if CONVERT in fast else {}
            once |= {way: (way, Options()) for way in self.ways if way in (MMAP, MERGEKIT, ORIGINAL)}
            for name, (way, options) in once.items():
                remove(out)
                os.sync()
                forget_cached([source])
                done = run(command(way, source, out, options), out, limit_mb=MAX_MB)
                self.show(name, done)
                if not done.code:
                    self.require_same(name, out, options)
                found[name] = {"runs": as_json([done])}
            return {"bytes": source.stat().st_size, "ways": found}

    def compare(
        self,
        ways: dict[str, tuple[Path, Options]],
        out: Path,
        counts: dict[str, int],
        warm_up: bool = True,
        cold: bool = False,
    ) -> dict[str, Result]:
        """Run the ways in turns, each ``counts`` times, after one turn that is not counted."""
        runs: dict[str, list[Run]] = {way: [] for way in ways}
        seen: set[str] = set()
        for turn in range(-1 if warm_up else 0, max(counts.values())):
            for way, (source, options) in ways.items():
                if turn >= counts[way] or (turn < 0 and counts[way] < self.runs):
                    continue
                if cold:
                    os.sync()
                    forget_cached(files_in(source))
                done = run(command(way, source, out, options), out)
                self.show(way, done)
                if done.code:
                    raise SystemExit(f"{way} failed")
                if way not in seen:
                    self.require_same(way, out, options)
                    seen.add(way)
                if turn >= 0:
                    runs[way].append(done)
        remove(out)
        return {way: {"runs": as_json(each)} for way, each in runs.items()}

    def look_closer(self, found: dict[str, Result], ways: dict[str, tuple[Path, Options]], out: Path) -> None:
        """Add a run with an empty page cache, and the smallest memory limit in which each way succeeds."""
        for way, (source, options) in ways.items():
            words = command(way, source, out, options)
            os.sync()
            forget_cached(files_in(source))
            cold = run(words, out)
            self.show(f"{way}, from the disk", cold)
            if cold.code:
                raise SystemExit(f"{way} failed")
            found[way]["cold"] = asdict(cold)
            if self.search:
                found[way]["limit"] = smallest_limit(words, source, out, run_of(found[way]["runs"][-1]))
        remove(out)

    def require_same(self, way: str, out: Path, options: Options) -> None:
        """Exit if the output does not hold the same tensors as the other ways' outputs: only equal work is compared."""
        if way in (CP, DD):
            return
        words = [sys.executable, "-m", "benchmarks.ways", "digest", str(out)]
        digest = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
        key = (str(out.parent), options.dtype)
        if self.digests.setdefault(key, digest) != digest:
            raise SystemExit(f"{way} wrote different tensors than the ways before it")

    def place(self) -> "Place":
        return Place(self.folder)

    def show(self, way: str, done: Run) -> None:
        print(f"  {way}: {done.wall:.2f} s, {done.peak_mb:.0f} MB, exit {done.code}", file=sys.stderr, flush=True)


class Place(tempfile.TemporaryDirectory[str]):
    """A temporary folder, as a Path."""

    def __init__(self, parent: Path):
        super().__init__(dir=parent)

    def __enter__(self) -> Path:  # type: ignore[override]
        return Path(super().__enter__())


def run_of(kept: Result) -> Run:
    return Run(**kept)


def kill_at_half(words: Sequence[str], out: Path, size: int) -> None:
    """Kill a command once it has written half of ``size`` bytes."""
    remove(out)
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            with suppress(OSError, IndexError):  # the process may have ended
                if int(Path(f"/proc/{process.pid}/io").read_text().split("wchar: ")[1].split()[0]) > size // 2:
                    break
            time.sleep(0.002)
        else:
            raise SystemExit("The command ended before it could be killed.")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def command_line(section: str, args: argparse.Namespace) -> str:
    """The command that reproduces a section; folders are omitted."""
    words = ["python -m benchmarks", section, f"--runs {args.runs}"]
    if args.models != list(MODELS):
        words.append(f"--models {','.join(args.models)}")
    if set(args.ways) != set(KEYS.values()):
        words.append(f"--ways {' '.join(key for key, way in KEYS.items() if way in args.ways)}")
    return " ".join(words + ["--no-search"] * args.no_search)


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n\n")[2])
    parser.add_argument("section", nargs="*", help="models, variants, formats, resume, where, large; default: all")
    parser.add_argument("--models", type=lambda words: words.split(","), default=list(MODELS), metavar="A,B")
    parser.add_argument("--ways", nargs="+", choices=KEYS, default=list(KEYS))
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each way, after one warm-up")
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="folder for sources and outputs")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="folder for the results")
    parser.add_argument("--no-search", action="store_true", help="do not search for the smallest memory limit")
    args = parser.parse_args()
    args.ways = [KEYS[key] for key in args.ways]
    subprocess.run([sys.executable, "-m", "compileall", "-q", "streamconv", "benchmarks"], check=True)
    bench = Bench(args)
    sections = bench.sections()
    if unknown := [name for name in args.section if name not in sections]:
        parser.error(f"there is no section {', '.join(unknown)}; there are {', '.join(sections)}")
    kept = args.to / "side_by_side.json"
    results: Result = json.loads(kept.read_text()) if kept.exists() else {}
    for name in args.section or sections:
        print(f"{name}:", file=sys.stderr)
        for found in sections[name](results.get(name, {})):
            results |= {name: found, "machine": machine()}
            results.setdefault("commands", {}).setdefault(name, [])
            if (line := command_line(name, args)) not in results["commands"][name]:
                results["commands"][name].append(line)
            kept.write_text(json.dumps(results, indent=1) + "\n")
    # In a process of its own: matplotlib is large, and a child's peak memory includes its parent's at the fork.
    subprocess.run([sys.executable, "-m", "benchmarks.tables", str(args.to)], check=True)


if __name__ == "__main__":
    main()
