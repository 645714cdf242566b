"""Run: the whole YAML as one typed value, `a.b=c` overrides, and errors that say what to write instead."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError, model_validator

from distgrow.checkpoint.remote import build_store
from distgrow.config.errors import explain
from distgrow.config.launch import Launch
from distgrow.core.lr import LR
from distgrow.core.scaling import Group, workforce
from distgrow.core.spec import ConfigError, PosFloat, Spec
from distgrow.core.stages import Budget, Stages
from distgrow.engine.spec import SGD, EngineSpec, Optimizer, Torch, check_suits, most_rows, plain_sgd
from distgrow.growth.controller import Controller
from distgrow.growth.schedule import Auto, Growth
from distgrow.run.folder import RunFolder, RunSpec
from distgrow.tasks.architectures import Model
from distgrow.tasks.tasks import Digits, TaskSpec
from distgrow.theory.sgd import Constants

if TYPE_CHECKING:
    from distgrow.tracking.track import Tracker
    from distgrow.training.fit import Result


class Theory(Spec):
    """Constants of the problem, if known: `plan` then predicts SFO and refuses unstable learning rates."""

    smoothness: PosFloat
    """L, loss / parameter²."""
    variance: PosFloat
    """σ², trace of the covariance of one sample's gradient."""
    gap: PosFloat
    """Δ = f(θ₀) − f*, loss."""
    epsilon: PosFloat
    """ε, the target of ‖∇f‖."""

    def constants(self) -> Constants:
        """As theory.py wants them."""
        return Constants(smoothness=self.smoothness, variance=self.variance, gap=self.gap)


class Run(Spec):
    """A run, whole."""

    task: TaskSpec = Digits()
    """What is trained, on what data."""
    model: Model | None = None
    """The model; default: mlp for digits, resnet8 for cifar10, gpt for text."""
    growth: Growth = Auto()
    """How the batch grows; default: auto."""
    stages: Stages = Stages()
    """How long stages are."""
    lr: LR = LR()
    """The learning rate."""
    optimizer: Optimizer = SGD()
    """The optimizer."""
    engine: EngineSpec = Torch()
    """What computes."""
    budget: Budget
    """When the run is over."""
    launch: Launch = Launch()
    """How processes are started."""
    run: RunSpec = RunSpec()
    """Where the run is kept, and its habits."""
    theory: Theory | None = None
    """Constants of the problem, if known."""

    def applicable_theory(self) -> Theory | None:
        """The constants, where the optimizer is the one that theory.py's bound is of."""
        return self.theory if plain_sgd(self.optimizer) else None

    @model_validator(mode="after")
    def _growth_suits_what_computes(self) -> "Run":
        check_suits(self.growth, self.optimizer, self.engine)
        return self

    @model_validator(mode="after")
    def _workers_can_follow_the_stages(self) -> "Run":
        workers, launch = self.launch.workers, self.launch
        if isinstance(workers, list) and self.engine.max_micro == "auto":
            raise ConfigError(
                f"launch.workers={workers} follows engine.max_micro, which auto finds out later: "
                "give engine.max_micro a number, or launch.workers stages, {0: 1, 3: 4}"
            )
        if launch.elastic and self.engine.kind == "deepspeed" and self.optimizer.kind != "adamw":
            raise ConfigError(
                f"launch.workers={workers} changes with the stage, for which DeepSpeed's checkpoints need "
                f"optimizer.kind=adamw; with {self.optimizer.kind} give launch.workers one number, or engine.kind=torch"
            )
        if launch.elastic and launch.kind == "ray" and launch.storage_path is not None:
            raise ConfigError(
                f"launch.workers={workers} changes with the stage, for which all hosts must see run.dir: "
                "leave launch.storage_path out, or give launch.workers one number"
            )
        return self

    def controller(self, world: int | None = None) -> Controller:
        """The schedule on `world` ranks, or on those that each stage wants. ValueError where it cannot be."""
        wants, most = workforce(self.launch.workers), most_rows(self.engine.max_micro, self.task.train_size())
        first = wants(0, self.growth(0), most)
        return Controller(
            growth=self.growth,
            stages=self.stages,
            lr=self.lr,
            budget=self.budget,
            epoch=self.task.train_size(),
            world=first if world is None else world,
            group=Group(workforce=wants, asked=first) if world is None else None,
            max_micro=most,
            measuring=self.run.noise,
            seed=self.run.seed,
        )

    def folder(self, *, resume: bool | None) -> RunFolder:
        """The run's folder; one that is lost comes back with what launch.storage_path holds of the run."""
        folder = RunFolder(self.run.dir)
        if not folder.begun():
            build_store(folder, self.launch.storage_path).pull(folder, resume=resume)
        return folder

    def fit(
        self, *, resume: bool | None = False, asked: int | None = None, trackers: "Sequence[Tracker]" = ()
    ) -> "Result":
        """Build the task and train it, in one of several groups of ranks where it is told how many `asked` for.

        Collective: every rank must call.
        """
        import torch

        from distgrow.checkpoint.manager import back_off
        from distgrow.distributed.world import joined
        from distgrow.training.fit import fit

        if resume is None:
            back_off(RunFolder(self.run.dir), self.launch.backoff_s)
        with joined(self.engine.device, self.launch.timeout_s, alone=self.engine.needs_group) as world:
            torch.manual_seed(self.run.seed)
            task = world.all(lambda: self.task.build(self.model))
            parts = self.model_dump(mode="json")
            return fit(
                task.model,
                task.loss,
                task.train,
                test=task.test,
                probe=task.probe,
                metrics=task.metrics,
                collate=task.collate,
                growth=self.growth,
                stages=self.stages,
                lr=self.lr,
                budget=self.budget,
                optimizer=self.optimizer,
                engine=self.engine,
                run=self.run,
                resume=resume,
                group=Group(workforce=workforce(self.launch.workers), asked=asked) if asked is not None else None,
                storage=self.launch.storage_path,
                world=world,
                trackers=trackers,
                about={key: parts[key] for key in ("task", "model", "launch", "theory")},
            )


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: 1e-3 is a number, not a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """A config file with `a.b=c` overrides as a Run. ConfigError where anything is wrong with it."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)  # a subclass of SafeLoader
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys, this is {type(values).__name__}")
    for override in overrides:
        values = apply(values, override)
    return parse(values)


def parse(values: Mapping[str, Any]) -> Run:
    """Nested mappings as a Run. ConfigError where anything is wrong with them."""
    try:
        return Run.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error, Run))) from None


def apply(values: dict[str, Any], override: str) -> dict[str, Any]:
    """`values` with one `a.b=c` override; c is YAML. A new `kind` drops the old kind's other keys."""
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(f"override {override!r} must read key.subkey=value")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from None
    return _placed(values, path, value, key)


def _placed(values: Mapping[str, Any], path: list[str], value: Any, key: str) -> dict[str, Any]:
    head, *rest = path
    if not rest:
        union = key != "launch.kind"  # one spec whatever the kind
        changes_kind = union and head == "kind" and values.get("kind") not in (None, value)
        return {"kind": value} if changes_kind else {**values, head: value}
    inner = values.get(head)
    if inner is not None and not isinstance(inner, Mapping):
        raise ConfigError(f"override {key}: {head} is the value {inner!r} in the config, not a mapping")
    return {**values, head: _placed(inner or {}, rest, value, key)}
