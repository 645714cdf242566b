"""How fast a run goes, how far it has come and how long it still takes, in words."""

from collections import deque


def duration(seconds: float) -> str:
    """Return a time in its two largest units, e.g. "3 h 20 min"."""
    whole = round(min(max(seconds, 0.0), 1e10))
    for size, unit, part, below in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        parts = round(whole / part)
        if parts * part >= size:
            count, rest = divmod(parts, size // part)
            return f"{count} {unit} {rest} {below}" if rest else f"{count} {unit}"
    return f"{whole} s"


class SmoothedRate:
    """Hold the samples per second of the last minute, time between updates included."""

    WINDOW_S = 60.0

    def __init__(self) -> None:
        self._points: deque[tuple[float, float]] = deque()

    def add(self, samples: float, time_s: float) -> None:
        """Take in how many samples were applied by `time_s`, seconds of the run."""
        if self._points and (samples < self._points[-1][0] or time_s <= self._points[-1][1]):
            self._points.clear()  # a resume went back
        self._points.append((samples, time_s))
        while len(self._points) > 2 and self._points[1][1] <= time_s - self.WINDOW_S:
            self._points.popleft()

    def samples_per_s(self) -> float | None:
        """Return the rate, or None before two updates are known."""
        if len(self._points) < 2:
            return None
        (first, began), (last, ended) = self._points[0], self._points[-1]
        return (last - first) / (ended - began)


def standing(applied: float, budget: float | None, samples_per_s: float | None) -> str:
    """Return what share of the budget is spent and how long the rest takes, e.g. "38 %, 30 s left"."""
    if not budget:
        return ""
    share = f"{min(100, int(100 * applied / budget))} %"
    if not samples_per_s:
        return share
    return f"{share}, {duration(max(0.0, budget - applied) / samples_per_s)} left"
