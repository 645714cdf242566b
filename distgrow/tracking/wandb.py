"""A run at Weights & Biases; the only file that imports wandb."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import wandb

from distgrow.tracking.spec import KINDS, Ending, Opening, Point, WandB


class WandBRun:
    """Send points as rows at the update that they belong to, with names such as step/loss and eval/accuracy.

    Weights & Biases takes rows in the order of updates only: it knows how far it has come, and earlier rows cannot be
    added. Offline, a file beside its own holds what was sent.
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
        self._file = opening.folder / "wandb" / "distgrow.json"
        self._sent: dict[str, int] = dict.fromkeys(KINDS, int(self._run.step) - 1)
        if spec.mode == "offline" and self._file.is_file():
            self._sent.update(json.loads(self._file.read_text(encoding="utf-8")))
        self.seen: Mapping[str, int] = dict(self._sent)

    def publish(self, points: Sequence[Point]) -> None:
        """See Service."""
        for point in points:
            self._run.log({f"{point.kind}/{name}": value for name, value in point.figures.items()}, step=point.step)
            self._sent[point.kind] = point.step
        partial = self._file.with_suffix(".tmp")
        partial.write_text(json.dumps(self._sent), encoding="utf-8")
        partial.replace(self._file)

    def finish(self, ending: Ending) -> None:
        """See Service."""
        self._run.finish(exit_code=1 if ending == "failed" else 0)
