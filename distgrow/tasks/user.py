"""The user's own task, by the name of a function."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from distgrow.core.errors import ConfigError
from distgrow.core.spec import PosInt, Spec
from distgrow.tasks.architectures import Model
from distgrow.tasks.named import called
from distgrow.tasks.raised import told_as
from distgrow.tasks.task import Task, test_sets


def search(*folders: Path) -> None:
    """Let `task.target` name modules in these folders. The last one is searched first."""
    for folder in map(str, folders):
        if folder not in sys.path:
            sys.path.insert(0, folder)


class Target(Spec):
    """Your own model, loss and data, from a function of yours."""

    kind: Literal["target"] = "target"
    target: str
    """package.module:function; it returns a distgrow.Task or (model, loss, train[, test]). Modules beside the config
    and in the working directory are found."""
    args: dict[str, Any] = {}
    """Keyword arguments for the function."""
    tokens: PosInt | None = None
    """Tokens of every sample, if all have as many; they can then be a unit of batches, budget, stages and intervals."""

    def tokens_per_sample(self) -> int | None:
        """Return the tokens of every sample; None: they differ, or nobody has said."""
        return self.tokens

    def train_size(self) -> int:
        """Count the samples of the training set. The function is called for it."""
        from distgrow.data.dataset import size_of

        return size_of(self.build(None).train)

    def check(self, model: Model | None) -> None:
        """Check that the task can be built with a model, as far as no data tells. Raise ConfigError if not."""
        if model is not None:
            raise ConfigError("task.kind=target brings its own model: remove model")

    def build(self, model: Model | None) -> Task:
        """Model, loss and data."""
        self.check(model)
        made = called("task.target", self.target, self.args)
        if isinstance(made, tuple) and len(made) in (3, 4):
            made = Task(model=made[0], loss=made[1], train=made[2], test=made[3] if len(made) == 4 else None)
        with told_as(f"task.target={self.target!r} raised"):
            return self._with_tokens(_checked(made, self.target))

    def _with_tokens(self, task: Task) -> Task:
        """Return the task with the tokens that the config gives. Raise ConfigError if the function gives others."""
        if self.tokens is None:
            return task
        if task.tokens not in (None, self.tokens):
            raise ConfigError(
                f"task.tokens={self.tokens}, but task.target={self.target!r} returned a Task with tokens="
                f"{task.tokens!r}; leave one out"
            )
        return replace(task, tokens=self.tokens)


def _checked(task: Any, target: str) -> Task:
    """Return the task. Raise ConfigError if the user's function returned something else."""
    from torch import nn

    from distgrow.data.dataset import check_rows_by_number, check_training_set, size_of

    made, wanted = f"task.target={target!r}", "it must return a distgrow.Task or (model, loss, train[, test])"
    if not isinstance(task, Task):
        raise ConfigError(f"{made} returned {type(task).__name__}; {wanted}")
    if not isinstance(task.model, nn.Module):
        raise ConfigError(f"{made}: model is a {type(task.model).__name__}, not a torch module; {wanted}")
    if not callable(task.loss):
        raise ConfigError(f"{made}: loss is a {type(task.loss).__name__}, not loss(model, batch); {wanted}")
    for name, data in (("train", task.train), ("probe", task.probe)):
        if data is not None:
            (check_training_set if name == "train" else check_rows_by_number)(data, f"{made}: {name}")
    _check_tests(task.test, made)
    if isinstance(task.tokens, bool) or not (
        task.tokens is None or callable(task.tokens) or (isinstance(task.tokens, int) and task.tokens > 0)
    ):
        raise ConfigError(f"{made}: tokens is {task.tokens!r}, not a number of tokens or tokens(batch); {wanted}")
    if task.items is not None and not callable(task.items):
        raise ConfigError(f"{made}: items is a {type(task.items).__name__}, not items(batch); {wanted}")
    if not size_of(task.train):
        raise ConfigError(f"{made}: the training set is empty")
    if not any(parameter.requires_grad for parameter in task.model.parameters()):
        raise ConfigError(f"{made}: model has no parameter that can be trained (requires_grad)")
    return task


def _check_tests(test: Any, made: str) -> None:
    """Check that test sets give their rows by number. Raise ConfigError if one does not."""
    from distgrow.data.dataset import check_rows_by_number

    for name, data in test_sets(test, f"{made}: test").items():
        check_rows_by_number(data, f"{made}: test{name and f'[{name!r}]'}")
