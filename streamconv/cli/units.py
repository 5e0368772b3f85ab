"""Sizes, speeds and times as a person reads them. JSON has the full numbers."""


def size(count: float) -> str:
    """Return a number of bytes in decimal units, as disks and the Hub do: "4.5 GB".

    >>> size(88_249_960), size(4_546_000_000), size(999_999)
    ('88 MB', '4.5 GB', '1.0 MB')
    """
    if count < 1000:
        return f"{count:.0f} bytes"
    for unit in ("kB", "MB", "GB", "TB"):  # noqa: B007 - the last one is used
        count /= 1000
        if count < 999.5:
            break
    return f"{count:.1f} {unit}" if count < 9.95 else f"{count:,.0f} {unit}"


def speed(count: float, seconds: float) -> str:
    """Return bytes per second in MB/s, which can be compared between runs."""
    rate = count / max(seconds, 1e-3) / 1e6
    return f"{rate:,.0f} MB/s" if rate >= 9.95 else f"{rate:.1f} MB/s"


def duration(seconds: float) -> str:
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
