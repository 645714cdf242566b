"""Event: what every kind of line of metrics.jsonl has, and how a line is checked; knows no kind."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from operator import attrgetter
from typing import Annotated, Any, ClassVar, Self, TypedDict, get_args, get_origin, get_type_hints

from distgrow.tracking.fields import Amount, Count, OldCount, Optional, count, figure

#: An event as trackers see it: what its line in metrics.jsonl holds.
Line = Mapping[str, Any]
#: Keys that every line has.
PLACE = ("event", "step", "samples", "time_s")
#: What gradient evaluations were for, as in `core.progress.Ledger`; `sfo_` before it makes the key.
PARTS = ("applied", "skipped", "replayed", "discarded", "probe", "extrapolated")


#: Keys of the parts of the ledger.
SPENT = frozenset(f"sfo_{part}" for part in PARTS)


class Place(TypedDict):
    """Hold what every event of a run has."""

    step: int
    samples: int
    sfo: int
    time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Hold a line of a kind that this version does not know, or what every kind of line has."""

    kind: ClassVar[str] = ""

    step: Count  #: applied updates
    samples: Count  #: positions of the sample stream consumed
    sfo: OldCount = None  #: gradient evaluations so far
    time_s: Amount  #: seconds of the run
    more: Mapping[str, Any] = field(default_factory=dict)  #: keys of no field: metrics, figures, a newer version's

    def to_json(self) -> dict[str, Any]:
        """Return the line's keys and values."""
        names, values, droppable = _reader(type(self))
        line: dict[str, Any] = {"event": self.kind} if self.kind else {}
        line.update(zip(names, values(self), strict=False))
        for name in droppable:
            if line[name] is None:
                del line[name]
        if self.more:
            line.update(self.more)
        return line

    @classmethod
    def from_json(cls, line: Line) -> Self:
        """Return the event of a line, any key that no field has in `more`.

        Raises:
            ValueError: the line lacks a key, or holds a value of another kind.
        """
        values, readers = dict(line), fields_of(cls)
        if cls.kind:
            values.pop("event", None)
        if missing := [name for name, _, optional in readers if name not in values and not optional]:
            raise ValueError(f"lacks {', '.join(missing)}")
        own: dict[str, Any] = {
            name: _checked(name, read, values.pop(name)) if name in values else None for name, read, _ in readers
        }
        for name in SPENT & values.keys():
            _checked(name, count, values[name])
        return cls(**own, more=values)


def _checked(name: str, read: Callable[[Any], Any], value: Any) -> Any:
    try:
        return read(value)
    except ValueError as error:
        raise ValueError(f"holds {name}={_short(value)}, which {error}") from None


def _short(value: Any) -> str:
    """Show a value of any length."""
    try:
        shown = repr(value)
    except ValueError:  # a whole number of more digits than Python prints
        return "a number of thousands of digits"
    return shown if len(shown) <= 40 else shown[:40] + " …"


@cache
def _reader(kind: type[Event]) -> tuple[tuple[str, ...], Callable[[Event], tuple[Any, ...]], tuple[str, ...]]:
    """Return the keys of a kind, what reads their values, and the keys that a line lacks if they are None."""
    names = tuple(name for name, _, _ in fields_of(kind))
    droppable = tuple(name for name, check, optional in fields_of(kind) if optional and check is not figure)
    return names, attrgetter(*names), droppable


@cache
def fields_of(kind: type[Event]) -> tuple[tuple[str, Callable[[Any], Any], bool], ...]:
    """Return the key, the check of its value, and whether it may be lacking, of each field, as lines have them."""
    hints, order = get_type_hints(kind, include_extras=True), dict[str, None]()
    for parent in reversed(kind.__mro__):
        own = [name for name in vars(parent).get("__annotations__", {}) if get_origin(hints[name]) is Annotated]
        for name in own if any(name not in order for name in own) else ():  # a class that adds keys orders them anew
            order.pop(name, None)
            order[name] = None
    checks = {name: get_args(hints[name])[1:] for name in order}
    return tuple((name, check[0], any(isinstance(mark, Optional) for mark in check)) for name, check in checks.items())
