"""A model on paper: 1.3 TB from S3 to S3 by the formula of `benchmarks.scale_model`. Nothing here is measured.

What is assumed, beside a worker as `benchmarks.scale` measured it:
- 25 Gbit/s for each machine, in both directions at once, and 16 cores.
- 85 MB/s for each request: AWS recommends one request in flight for each 85 to 90 MB/s
  (docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance-design-patterns.html).
- 100 ms until a response begins: the same guide expects 100 to 200 ms.
- S3 gives all machines together what they ask for; Azure limits a storage account by default to 60 Gbit/s of uploads
  (learn.microsoft.com/azure/storage/common/scalability-targets-standard-account).
- The tensors are so large that a request has the full size, and nothing fails or is throttled.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.scale_cases import UPLOAD
from benchmarks.scale_model import NO_LIMIT, File, Network, Worker, predict
from streamconv.files.fsspec import FsspecFile

BYTES, MACHINES, CORES = 1.3e12, 32, 16
LINK, CONNECTION, LATENCY = 25e9 / 8, 85e6, 0.1
AZURE_UPLOADS = 60e9 / 8
HEADER = ("machines", "processes on each", "files", "store", "largest part / average", "GB/s", "minutes", "limit")


@dataclass(frozen=True)
class Scenario:
    machines: int
    processes: int
    file_bytes: float
    store_rate: float = NO_LIMIT


SCENARIOS = (
    Scenario(1, 1, 5e9),
    Scenario(MACHINES, 1, 5e9),
    Scenario(MACHINES, 8, 5e9),
    Scenario(MACHINES, 8, 1e9),
    Scenario(MACHINES, 32, 1e9),
    Scenario(MACHINES, 32, 0.25e9),
    Scenario(MACHINES, 8, 1e9, AZURE_UPLOADS),
)


def rows(measured: Worker) -> Iterator[str]:
    """Yield the rows of a table; ``measured`` is a worker that reads large tensors from S3."""
    worker = replace(measured, upload=UPLOAD)
    for each in SCENARIOS:
        count, parts = round(BYTES / each.file_bytes), each.machines * each.processes
        size = int(BYTES / count)
        request = FsspecFile.request_bytes
        file = File(size, (request,) * (size // request) + (size % request,))
        network = Network(each.machines, LINK, each.store_rate, CONNECTION, LATENCY)
        found = predict(_divided(file, count, parts), worker, network, each.machines * CORES)
        balance = -(-count // parts) * parts / count
        store = f"{each.store_rate / 1e9:g} GB/s" if each.store_rate < NO_LIMIT else "no limit"
        cells = (each.machines, each.processes, f"{count:,} of {size / 1e9:.2f} GB", store, f"{balance:.2f}",
                 f"{BYTES / found.seconds / 1e9:.1f}", f"{found.seconds / 60:.1f}", found.limit)  # fmt: skip
        yield f"| {' | '.join(map(str, cells))} |"


def _divided(file: File, count: int, parts: int) -> list[list[File]]:
    """Divide equal files over parts."""
    return [[file] * (count // parts + (number < count % parts)) for number in range(parts)]
