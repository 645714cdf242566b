"""Runs that are killed at chosen points and resumed, in processes forked from one that has loaded what a run needs.

python killed.py FOLDER CASE POINTS SEED prints one line for each difference from the run that was never killed.
"""

import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from distgrow import RunSpec, auto, budget, constant_lr, every, exponential, fit, noise_scale_tracking, norm_threshold
from distgrow.checkpoint.spec import Checkpointing
from distgrow.checkpoint.storage import Folder
from distgrow.data.spec import Loading
from distgrow.engine.spec import Torch
from distgrow.optim.adamw import AdamW
from distgrow.optim.sgd import SGD
from distgrow.tracking.events import Evaluation, Update
from distgrow.tracking.read import history, read_events
from distgrow.training.spec import Evaluation as Evaluating

#: A point at which a run is hit: what happens how often before it, and the signal.
Point = tuple[str, int, signal.Signals]
#: Keys of a step line that are no measurement of time.
TIMED = {"time_s", "samples_per_s", "sfo", "sfo_replayed"}


def data(rows: int, seed: int) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, 6, generator=draw)
    return TensorDataset(inputs, (inputs.sum(1) > 0).long())


def network(*, plain: bool) -> nn.Module:
    torch.manual_seed(0)
    between = [nn.Tanh()] if plain else [nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(nn.Linear(6, 8), *between, nn.Linear(8, 2))


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def metrics(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    return {"loss": loss(model, batch)}


def cases() -> dict[str, dict[str, Any]]:
    """Settings of fit() that together use all state that a run has."""
    steps = {"growth": exponential(start=4, factor=2, cap=32), "stages": every(samples=120), "lr": constant_lr(0.05)}
    return {
        "momentum": {**steps, "budget": budget(samples=700), "optimizer": SGD(momentum=0.9, nesterov=True, clip=1.0)},
        "adamw": {**steps, "budget": budget(steps=50), "optimizer": AdamW(), "plain": False},
        "workers": {**steps, "budget": budget(samples=500), "optimizer": AdamW(), "loader": Loading(workers=1)},
        "auto": {"growth": auto(start=4), "lr": constant_lr(0.05), "budget": budget(epochs=5)},
        "noise": {
            "growth": noise_scale_tracking(start=4, cap=32),
            "lr": constant_lr(0.05),
            "budget": budget(sfo=700),
        },
        "norm": {
            "growth": norm_threshold(start=4, factor=2, cap=32, every=10),
            "lr": constant_lr(0.3),
            "budget": budget(sfo=2500),
        },
        "memory": {**steps, "budget": budget(sfo=800), "engine": Torch(max_micro="auto")},
    }


class Hit:
    """Send a signal to this process once something has happened for the `after`-th time."""

    def __init__(self, what: str, after: int, number: signal.Signals) -> None:
        self.what, self.left, self.number = what, after, number

    def happens(self, what: str) -> None:
        if what == self.what:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.number)

    def log(self, event: Mapping[str, Any]) -> None:
        self.happens("event")
        self.happens(event["event"])

    def close(self) -> None:
        pass


class Hits(Folder):
    """A folder of checkpoints whose writes can be hit."""

    hit: Hit

    def write(self, place: str, file: str, data: bytes) -> None:
        self.hit.happens("write")
        super().write(place, file, data)

    def commit(self, place: str, name: str, manifest: bytes) -> None:
        self.hit.happens("manifest")
        super().commit(place, name, manifest)
        self.hit.happens("checkpoint is whole")


def train(case: str, folder: Path, point: Point, *, resume: bool | None) -> None:
    from distgrow.training import train_task

    settings = cases()[case]
    plain, loader = settings.pop("plain", True), settings.pop("loader", Loading())
    hit = Hit(*point)

    def build(run: Any, storage: Any) -> Folder:
        store = Hits(run.checkpoints)
        store.hit = hit
        return store

    train_task.build_store = build
    evaluating, often = Evaluating(every_samples=110), Checkpointing(every_steps=7, keep=2)
    run = RunSpec(dir=str(folder), eval=evaluating, checkpoint=often, loader=loader)
    test = {"test": data(30, 1), "metrics": metrics}
    fit(network(plain=plain), loss, data(100, 0), **test, run=run, resume=resume, trackers=[hit], **settings)


def forked(action: Callable[[], None], output: Path) -> int:
    """Run the action in a fork of this process and return its exit code, negative if a signal ended it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        with output.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            try:
                action()
                code = 0
            except KeyboardInterrupt:
                code = 130
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def ended(run: Path) -> dict[str, Any]:
    """All that a run and its uninterrupted twin have in common."""
    newest = max((run / "checkpoints").glob("step-*"))
    progress = json.loads((newest / "progress.json").read_text())
    events = history(read_events(run / "metrics.jsonl"))
    lines = [event.to_json() for event in events if isinstance(event, Update)]
    shown = [event.to_json() for event in events if isinstance(event, Evaluation)]
    return {
        "parameters": torch.load(newest / "engine.pt", weights_only=True),
        "progress": {**progress, "ledger": {**progress["ledger"], "replayed": 0}},
        "steps": [{key: value for key, value in line.items() if key not in TIMED} for line in lines],
        "evaluations": [{key: value for key, value in line.items() if key not in TIMED} for line in shown],
    }


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def points(whole: Path, count: int, draw: random.Random) -> list[list[Point]]:
    """One or two hits for each of `count` runs: the special ones first, then at random."""
    events = list(read_events(whole / "metrics.jsonl"))
    kinds = [event.kind for event in events]
    kill, steps, saves, shown = signal.SIGKILL, kinds.count("step"), kinds.count("checkpoint"), kinds.count("eval")
    special: list[list[Point]] = [
        [("event", kinds.index("checkpoint"), kill)],  # before the first checkpoint
        [("manifest", 3, kill), ("manifest", 1, kill)],  # all lines from before it are there, and it is not
        [("checkpoint is whole", 3, kill)],
        [("checkpoint", saves, kill)],  # after the last one
        [("eval", shown, kill)],
        [("step", steps, signal.SIGTERM)],  # stops at the last update
        [("write", 2, kill), ("eval", 2, signal.SIGINT)],
        [("step", 9, signal.SIGTERM), ("step", 9, signal.SIGTERM)],
        [("end", 1, kill)],
    ]
    numbers = [kill, kill, kill, signal.SIGTERM, signal.SIGINT]
    pairs = [[("event", draw.randrange(1, len(events)), draw.choice(numbers)) for _ in range(2)] for _ in range(count)]
    return [*special, *pairs][:count]


def differences(case: str, folder: Path, count: int, seed: int) -> list[str]:
    """Return what differs between runs that were hit and the one that was not."""
    never = ("never", 1, signal.SIGKILL)
    log = folder / "output"
    whole = folder / "whole"
    if code := forked(lambda: train(case, whole, never, resume=False), log):
        return [f"{case}: exit code {code}: {log.read_text()}"]
    right, wrong = ended(whole), list[str]()
    for number, hits in enumerate(points(whole, count, random.Random(seed))):
        run = folder / f"run-{number}"
        codes = [forked(partial(train, case, run, hit, resume=None), log) for hit in [*hits, never]]
        name = f"{case} {[(what, after, sent.name) for what, after, sent in hits]} {codes}"
        if codes[-1]:
            wrong.append(f"{name}: {log.read_text()[-2000:]}")
            continue
        got = ended(run)
        differing = [key for key in right if not equal(right[key], got[key])]
        wrong += [f"{name}: {key} differ: {len(got[key])} for {len(right[key])}" for key in differing]
    return wrong


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, case, count, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    wrong = differences(case, folder, count, seed)
    print("\n".join(wrong))
    sys.exit(1 if wrong else 0)
