"""What the server counts, in Prometheus' text format. The event loop alone writes it."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

FIRST_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
BETWEEN_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """Counts of values up to each bound; the last count has the rest."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> Iterator[str]:
        """Cumulative, as Prometheus has them."""
        total = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self.sum!r}"
        yield f"{name}_count {total}"


@dataclass
class Metrics:
    """`requests` by (path, status): 499 where the client hung up before the end."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    prompt_tokens: int = 0
    generated_tokens: int = 0
    first: Histogram = field(default_factory=lambda: Histogram(FIRST_S))
    between: Histogram = field(default_factory=lambda: Histogram(BETWEEN_S))
    began: float = field(default_factory=time.monotonic)

    def text(self, *, running: int, waiting: int, weight_bytes: int) -> str:
        """All metrics. `running` and `waiting`: sequences; `weight_bytes`: read so far."""
        return "\n".join([*self._lines(running, waiting, weight_bytes), ""])

    def _lines(self, running: int, waiting: int, weight_bytes: int) -> Iterator[str]:
        yield from _head("requests_total", "counter", "HTTP requests by path and status.")
        for (path, status), count in sorted(self.requests.items()):
            yield f'layersweep_requests_total{{path="{path}",status="{status}"}} {count}'
        seconds = time.monotonic() - self.began
        for name, kind, text, value in (
            ("running", "gauge", "Sequences that get tokens.", running),
            ("waiting", "gauge", "Sequences that wait for room.", waiting),
            ("prompt_tokens_total", "counter", "Tokens of accepted prompts.", self.prompt_tokens),
            ("generated_tokens_total", "counter", "Tokens chosen.", self.generated_tokens),
            ("weight_bytes_total", "counter", "Bytes of weights read.", weight_bytes),
            ("uptime_seconds", "gauge", "Since the server started.", round(seconds, 3)),
        ):
            yield from _head(name, kind, text)
            yield f"layersweep_{name} {value}"
        for name, text, histogram in (
            ("first_token_seconds", "From a request to its first token.", self.first),
            ("token_seconds", "From one token of a sequence to the next.", self.between),
        ):
            yield from _head(name, "histogram", text)
            yield from histogram.lines(f"layersweep_{name}")


def _head(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP layersweep_{name} {text}"
    yield f"# TYPE layersweep_{name} {kind}"
