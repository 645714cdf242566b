"""Run: a whole config as one typed value."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from distgrow.checkpoint.remote import build_store
from distgrow.config.batch_tokens import with_batches_in_samples
from distgrow.config.megatron import with_schedule_as_stages
from distgrow.core.active_experts import ActiveExperts, ExpertWeights
from distgrow.core.errors import ConfigError
from distgrow.core.progress import Progress
from distgrow.core.scaling import Group, scaling_policy
from distgrow.core.spec import PosFloat, Spec
from distgrow.distributed.environment import in_ray_package
from distgrow.engine.ability import Can
from distgrow.engine.spec import most_rows
from distgrow.growth import Growth
from distgrow.growth.auto import Auto
from distgrow.growth.branching import Branching
from distgrow.growth.controller import Controller
from distgrow.launch import Launch
from distgrow.launch.local import Local
from distgrow.optim import Optimizer
from distgrow.optim.sgd import SGD
from distgrow.run.folder import RunFolder, numbered
from distgrow.run.resume_mode import Resume, ResumeMode
from distgrow.tasks import TaskSpec
from distgrow.tasks.architectures import GPT, Model
from distgrow.tasks.builtin import Digits
from distgrow.theory.noise import noise_scale
from distgrow.theory.sgd import Constants
from distgrow.training.first_rate import recorded_rate
from distgrow.training.settings import Settings

if TYPE_CHECKING:
    from distgrow.tracking.base import Tracker
    from distgrow.training.result import Result


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

    @property
    def noise_scale(self) -> float:
        """Return B = σ²/ε² at the target, samples."""
        return noise_scale(self.variance, self.epsilon**2)

    def constants(self) -> Constants:
        """Return L, σ² and Δ."""
        return Constants(smoothness=self.smoothness, variance=self.variance, gap=self.gap)


class Run(Settings):
    """A whole config: what is trained, the settings of the training, and how its ranks are started."""

    task: TaskSpec = Digits()
    """Data and loss."""
    model: Model | None = None
    """The model. Default: mlp for digits, resnet8 for cifar10, gpt for text, corpus and raven; hf brings its own."""
    growth: Growth = Auto()  # pyright: ignore[reportIncompatibleVariableOverride]  # narrower, and frozen
    """How the batch grows. Default: auto."""
    optimizer: Optimizer = SGD()  # pyright: ignore[reportIncompatibleVariableOverride]
    """The optimizer."""
    launch: Launch = Local()
    """How the ranks are started. Keys that only another kind has are skipped, so the kind alone can be overridden."""
    theory: Theory | None = None
    """Constants of the problem, if known. `plan` then makes predictions."""

    def active_experts(self) -> ActiveExperts | None:
        """Return how the number of active experts changes; None: it does not."""
        active = self.model.active if isinstance(self.model, GPT) else None
        return active if isinstance(active, ActiveExperts) else None

    def expert_weights(self) -> ExpertWeights | None:
        """Return the weights of a model with experts; None: it has none."""
        return self.model.expert_weights() if isinstance(self.model, GPT) else None

    def applicable_theory(self) -> Theory | None:
        """Return the constants if the bound of theory/sgd.py holds for optimizer and gradients, else None."""
        return self.theory if self.optimizer.plain_sgd and self.extrapolate is None else None

    @model_validator(mode="before")
    @classmethod
    def _batches_in_samples(cls, values: Any) -> Any:
        return with_batches_in_samples(with_schedule_as_stages(values)) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _growth_suits_what_computes(self) -> "Run":
        self.check()
        return self

    @model_validator(mode="after")
    def _blocks_are_computed_again_once(self) -> "Run":
        own = self.model.checkpoint_blocks if isinstance(self.model, GPT) else "none"
        engines = getattr(self.engine, "checkpoint_blocks", "none")
        if own != "none" != engines:
            raise ConfigError(
                f"model.checkpoint_blocks={own} and engine.checkpoint_blocks={engines} would compute blocks again "
                "twice: leave one out"
            )
        return self

    @model_validator(mode="after")
    def _workers_can_follow_the_stages(self) -> "Run":
        workers, launch = self.launch.workers, self.launch
        self.engine.check_workers(workers)
        if isinstance(workers, list) and self.engine.max_micro == "auto":
            raise ConfigError(
                f"launch.workers={workers} follows engine.max_micro, which auto finds out later: "
                "give engine.max_micro a number, or launch.workers stages, {0: 1, 3: 4}"
            )
        if launch.elastic and isinstance(self.growth, Branching):
            raise ConfigError(
                f"launch.workers={workers} changes with the stage, and growth.kind={self.growth.name} tries stages by "
                "branches in one group of ranks: give launch.workers one number"
            )
        if launch.elastic and self.lr.unknown and self.growth.goes_by_rate:
            raise ConfigError(
                f"launch.workers={workers} follows the stages, of which growth.kind={self.growth.name} knows nothing "
                "before lr.base=auto is measured: give lr.base or launch.workers a number"
            )
        if launch.elastic and not self.engine.resizes(self.optimizer):
            raise ConfigError(
                f"launch.workers={workers} changes with the stage, for which DeepSpeed's checkpoints need "
                f"optimizer.kind=adamw; with {self.optimizer.kind} give launch.workers one number, or engine.kind=torch"
            )
        if launch.elastic and self.average is not None and Can.RESIZE_AVERAGE not in self.engine.can:
            raise ConfigError(
                f"launch.workers={workers} changes with the stage, but engine.kind={self.engine.kind} cuts "
                "the average into as many shards as there are ranks; leave out average, give launch.workers one "
                "number, or use engine.kind=torch"
            )
        return self

    def specs(self) -> dict[str, Spec]:
        """See Settings; with task and model, whose keys of older runs are read through them, too."""
        own = {"task": self.task, "model": self.model}
        return {**super().specs(), **{name: spec for name, spec in own.items() if spec is not None}}

    def group(self, asked: int) -> Group:
        """Return the rule by which groups of other sizes follow one that was started with `asked` ranks."""
        return Group(scaling_policy=scaling_policy(self.launch.workers), asked=asked)

    def controller(self, world: int | None = None) -> Controller:
        """Return the schedule on `world` ranks, or on those that each stage wants.

        If lr.base is still to be measured, rates are multiples of it.

        Raises:
            ConfigError: the schedule cannot be, or depends on what is still to be measured.
        """
        epoch = self.task.train_size()
        first = scaling_policy(self.launch.workers)(
            0, self.growth.stage_batch(0), most_rows(self.engine.max_micro, epoch)
        )
        group = self.group(first) if world is None else None
        settings = self.in_samples(self.task.tokens_per_sample())
        if self.lr.unknown:
            settings = settings.with_rate(self._foreseen_rate())
        return settings.controller_of(epoch, first if world is None else world, group)

    @property
    def open_rate(self) -> bool:
        """Return whether lr.base is still to be measured, and no run in run.dir has done so."""
        return self.lr.unknown and recorded_rate(RunFolder(self.run.dir)) is None

    def _foreseen_rate(self) -> float:
        """Return the rate that the run in run.dir has measured, or 1 for multiples of one that is not known."""
        rate = recorded_rate(RunFolder(self.run.dir))
        if rate is None and self.growth.goes_by_rate:
            raise ConfigError(
                f"growth.kind={self.growth.name} decides by the learning rate, and lr.base=auto is measured as the run "
                "begins: nothing is known of its stages before; give lr.base a number to see them"
            )
        return rate or 1.0

    def folder(self, *, resume: Resume) -> RunFolder:
        """Return the run's folder. If it is lost, it is filled with what launch.storage_path holds of the run."""
        if in_ray_package() and not Path(self.run.dir).is_absolute() and self.launch.storage_path is None:
            raise ConfigError(
                f"run.dir={self.run.dir} is relative, and this Ray job works in a copy of the submitted folder, which "
                "Ray deletes: give an absolute run.dir that every host sees, or launch.storage_path"
            )
        mode = ResumeMode.of(resume)
        folder = RunFolder(numbered(self.run.dir, resume=mode, name=self.task.kind))
        if not folder.begun():
            build_store(folder, self.launch.storage_path).pull(folder, resume=mode)
        return folder

    def stands_at(self, *, resume: Resume) -> Progress:
        """Return where the run would be resumed, a new run's progress if it would be begun."""
        from distgrow.checkpoint.manager import stands_at

        folder = self.folder(resume=resume)
        resumes = ResumeMode.of(resume) is not ResumeMode.START and folder.begun()
        return stands_at(build_store(folder, self.launch.storage_path)) if resumes else Progress()

    def fit(
        self,
        *,
        resume: Resume = False,
        rebudget: bool = False,
        asked: int | None = None,
        trackers: "Sequence[Tracker]" = (),
    ) -> "Result":
        """Build the task and train it. Collective: every rank must call.

        Args:
            resume: True: resume. False: begin. None: resume if `run.dir` holds a run, else begin.
            rebudget: Whether a run that goes on with another budget may change what it has planned.
            asked: Ranks that this group was started with, if groups of other sizes may follow it.
            trackers: Trackers of rank 0's events, beside those of the config.
        """
        from distgrow.checkpoint.manager import back_off
        from distgrow.data.seeding import seed_generators
        from distgrow.distributed.world import joined
        from distgrow.training.train_task import train_task

        if ResumeMode.of(resume) is ResumeMode.EITHER:
            back_off(RunFolder(self.run.dir), self.launch.backoff_s)
        with joined(self.engine.device, self.launch.timeout_s, alone=self.engine.needs_group) as world:
            seed_generators(self.run.seed, world.device)
            task = world.on_all_ranks(lambda: self.task.build(self.model))
            recorded = self.model_dump(mode="json")
            about = {key: recorded[key] for key in ("task", "model", "launch", "theory")}
            return train_task(
                task,
                self,
                resume=ResumeMode.of(resume),
                rebudget=rebudget,
                group=None if asked is None else self.group(asked),
                storage=self.launch.storage_path,
                world=world,
                about=about,
                trackers=trackers,
            )
