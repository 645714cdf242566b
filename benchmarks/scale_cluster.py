"""The cluster of the benchmark of time at scale: what an update takes on so many workers."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from distgrow.core.pace import Pace

WORKERS = (1, 8, 64, 512, 4096)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What updates cost; by default about a ResNet-18 in float32 with one accelerator a worker."""

    samples_per_s: float = 2500.0  #: of one worker
    latency_s: float = 0.004  #: of an update, whatever its size
    megabytes: float = 45.0  #: of gradients
    gigabytes_per_s: float = 10.0  #: of a worker's link
    hop_us: float = 20.0  #: of a message

    def all_reduce_s(self, workers: int) -> float:
        """Seconds of averaging the gradients."""
        if workers == 1:
            return 0.0
        moved = 2 * (workers - 1) / workers * self.megabytes / 1e3 / self.gigabytes_per_s
        return 2 * math.log2(workers) * self.hop_us / 1e6 + moved

    def pace(self, workers: int) -> Pace:
        """How fast so many workers go that all have samples."""
        return Pace(samples_per_s=self.samples_per_s, latency_s=self.latency_s + self.all_reduce_s(workers))

    def seconds(self, stretches: Iterable[tuple[int, int]], workers: int) -> float:
        """Of (batch, updates) runs in order."""
        total = 0.0
        for batch, updates in stretches:
            busy = min(batch, workers)
            total += updates * self.pace(busy).update_s(batch, busy)
        return total

    def __str__(self) -> str:
        return (
            f"{self.samples_per_s:,.0f} samples/s a worker, {self.latency_s * 1e3:.3g} ms latency an update, "
            f"{self.megabytes:g} MB of gradients over {self.gigabytes_per_s:g} GB/s links, {self.hop_us:g} µs a message"
        )
