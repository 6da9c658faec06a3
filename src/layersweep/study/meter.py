"""What a run takes: host memory at its peak, and where the time goes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

STATUS = Path("/proc/self/status")
SAMPLE_S = 0.05


def host_bytes() -> int:
    """Anonymous and shared memory of this process (pinned memory included, page cache not)."""
    if not STATUS.is_file():
        return int(psutil.Process().memory_info().rss)
    fields = (line.split() for line in STATUS.read_text("utf-8").splitlines())
    kib = {words[0]: int(words[1]) for words in fields if words and words[0].startswith("Rss")}
    return 1024 * (kib["RssAnon:"] + kib["RssShmem:"])


class Meter:
    """Samples host memory on a thread while it is open; `phase` times named parts."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self.start_bytes = self.peak_bytes = host_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-meter", daemon=True)

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._done.set()
        self._thread.join()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.phases[name] = self.phases.get(name, 0.0) + spent

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_S):
            self.peak_bytes = max(self.peak_bytes, host_bytes())
