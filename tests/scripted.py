"""Run folders written by hand, line by line, for tests of what reads them."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EPOCH = 100  # samples
PARTS = ("applied", "skipped", "replayed", "discarded", "probe")


@dataclass
class Script:
    """Writes the events of a run, keeping step, samples, seconds and the ledger as a run would."""

    events: list[dict[str, Any]] = field(default_factory=list)
    step: int = 0
    samples: int = 0
    time_s: float = 0.0
    stage_now: int = 0
    batch: int = 0
    samples_per_s: float | None = None
    sfo: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))

    def event(self, kind: str, **values: Any) -> "Script":
        place = {"event": kind, "step": self.step, "samples": self.samples, "time_s": self.time_s}
        self.events.append({**place, **values})
        return self

    def stage(self, stage: int, batch: int, micro: int) -> "Script":
        self.stage_now, self.batch = stage, batch
        shape = {"batch": batch, "world": 1, "micro": micro, "accum": batch // micro, "lr": batch / 100}
        return self.event("stage", epoch=self.samples / EPOCH, stage=stage, **shape)

    def updates(self, *losses: float | None, kind: str = "step") -> "Script":
        for loss in losses:
            self.step += kind == "step"
            self.samples, self.time_s = self.samples + self.batch, self.time_s + 0.5
            self.sfo["applied" if kind == "step" else "skipped"] += self.batch
            ledger = {"sfo": sum(self.sfo.values()), **{f"sfo_{part}": self.sfo[part] for part in PARTS}}
            shape = {"stage": self.stage_now, "batch": self.batch, "lr": self.batch / 100, "world": 1}
            shape |= {"samples_per_s": self.samples_per_s} if self.samples_per_s else {}
            own = {"epoch": self.samples / EPOCH, "loss": loss, "grad_norm": loss and 2 * loss}
            self.event(kind, **shape, **own, **ledger)
        return self

    def skip(self) -> "Script":
        return self.updates(None, kind="skip")

    def evaluate(self, **metrics: float) -> "Script":
        return self.event("eval", epoch=self.samples / EPOCH, sfo=sum(self.sfo.values()), **metrics)

    def end(self, reason: str = "done") -> "Script":
        return self.event("end", reason=reason, sfo=sum(self.sfo.values()))

    def save(self, folder: Path, config: str = "run: {seed: 0}\n") -> str:
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(config)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in self.events))
        return str(folder)


def short() -> Script:
    """Two stages and an evaluation."""
    script = Script().event("start").stage(0, 8, 8).updates(2.0, 1.0)
    return script.stage(1, 16, 4).updates(0.5, 0.25, 0.2).evaluate(accuracy=0.75, loss=0.5).end()


def crashed() -> Script:
    """Lost two of its three updates (at 16 and 24 samples) and did them again."""
    script = Script().stage(0, 8, 8).updates(2.0).event("checkpoint", path="step-00000001")
    script.updates(66.0, 77.0).evaluate(accuracy=0.1)
    script.step, script.samples, script.sfo = 1, 8, {**script.sfo, "applied": 8, "replayed": 16}
    script.event("resume", checkpoint="step-00000001", damaged=[], sfo_replayed=16)
    return script.stage(0, 8, 8).updates(1.0, 0.5).end()
