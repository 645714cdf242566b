"""A run at Weights & Biases; the only file that imports wandb."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from distgrow.tracking.record_log import records
from distgrow.tracking.spec import KINDS, Ending, Opening, Point, WandB

#: What a .wandb file begins with: its name, a magic number, the version of its format.
HEADER = b":W&B\xe1\xbe\x00"


class WandBRun:
    """Send points as rows at the update that they belong to, with names such as step/loss and eval/accuracy.

    Weights & Biases takes rows in the order of updates only: it knows how far it has come, and earlier rows cannot be
    added.

    Offline, Weights & Biases' own process writes the rows into a .wandb file. It keeps them in memory before that, and
    a killed run takes that process along. So a resumed run reads from these files how far it has come.
    """

    def __init__(self, spec: WandB, opening: Opening) -> None:
        self._run: Any = wandb.init(
            project=spec.project,
            entity=spec.entity,
            name=spec.name or opening.folder.resolve().name,
            dir=str(opening.folder),
            id=opening.id,
            resume="allow",
            mode=spec.mode,
            config={**opening.settings},
            allow_val_change=True,
            reinit="create_new",
            settings=wandb.Settings(console="off"),
        )
        self._sent: dict[str, int] = dict.fromkeys(KINDS, int(self._run.step) - 1)
        self._handed = HandedOver(opening.folder / "wandb", opening.id) if spec.mode == "offline" else None
        if self._handed is not None:
            self._sent.update(self._handed.held)
        self.seen: Mapping[str, int] = dict(self._sent)

    def publish(self, points: Sequence[Point]) -> None:
        """See Service."""
        for point in points:
            self._run.log({f"{point.kind}/{name}": value for name, value in point.figures.items()}, step=point.step)
            self._sent[point.kind] = point.step
        if self._handed is not None:
            self._handed.write(self._sent)

    def finish(self, ending: Ending) -> None:
        """See Service."""
        self._run.finish(exit_code=1 if ending == "failed" else 0)


class HandedOver:
    """Find what an offline run holds, and keep beside it what was handed over.

    The .wandb files in the folder say what is held. What was handed over counts if there are none any more (they were
    synced and deleted), or if this version of wandb writes another format.

    Args:
        folder: RUN/wandb.
        id: the run's id.
    """

    def __init__(self, folder: Path, id: str) -> None:
        self._file = folder / "distgrow.json"
        known = self._known()
        self.held: Mapping[str, int] = steps_of(known)
        if files := sorted(folder.glob(f"offline-run-*/run-{id}.wandb")):
            try:
                self.held = latest([steps_of(known.get("held")), *map(rows, files)])
            except (ImportError, AttributeError, ValueError, OSError) as error:
                print(
                    f"run.trackers: wandb: {files[-1]} cannot be read ({error}); if the run was killed, it may lack "
                    "its last updates, which metrics.jsonl holds",
                    file=sys.stderr,
                )

    def _known(self) -> Mapping[str, Any]:
        """Return what the file says; nothing if it is damaged."""
        try:
            known = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def write(self, sent: Mapping[str, int]) -> None:
        """Write the last update of each kind that was handed over, and what is held for certain."""
        partial = self._file.with_suffix(".tmp")
        partial.write_text(json.dumps({**sent, "held": dict(self.held)}), encoding="utf-8")
        partial.replace(self._file)


def steps_of(known: Any) -> dict[str, int]:
    """Return the last update of each kind that `known` has a whole number for."""
    return {kind: known[kind] for kind in KINDS if type(known.get(kind)) is int} if isinstance(known, dict) else {}


def rows(file: Path) -> dict[str, int]:
    """Return the last update of each kind of point that a .wandb file holds.

    Raises:
        ValueError: the file has another format.
        ImportError: this version of wandb keeps its messages elsewhere.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2 as messages

    found: dict[str, int] = {}
    record: Any = messages.Record()  # pyright: ignore[reportAttributeAccessIssue]
    for data in records(file, HEADER):
        try:
            record.ParseFromString(data)
        except DecodeError as error:
            raise ValueError("its records have another format") from error
        if record.HasField("history"):
            row = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            found.update({name.partition("/")[0]: int(row["_step"]) for name in row if "/" in name})
    return found


def latest(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return the last update of each kind in any of the parts."""
    found: dict[str, int] = {}
    for part in parts:
        found.update({kind: max(step, found.get(kind, -1)) for kind, step in part.items()})
    return found
