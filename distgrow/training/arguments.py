"""The check of fit()'s arguments: what each must be, and what to write in place of a common mistake."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.loss import _Loss

from distgrow.core.average import EMA, Tail
from distgrow.core.errors import ConfigError
from distgrow.core.extrapolate import Extrapolate
from distgrow.core.sampling import SamplingSpec
from distgrow.core.scaling import Group
from distgrow.core.sparsity import Sparsity
from distgrow.engine.asynchronous.spec import Async
from distgrow.engine.fsdp.spec import FSDP
from distgrow.engine.spec import DeepSpeed, Torch
from distgrow.growth.arguments import BUDGET, GROWTH, RATE, STAGES, Allowed, check_types, shown
from distgrow.optim import OptimizerSpec
from distgrow.training.hooks import check_hooks
from distgrow.training.init import Init
from distgrow.training.spec import RunSpec

#: What each argument may be.
_SPECS: Mapping[str, Allowed] = {
    "growth": GROWTH,
    "budget": BUDGET,
    "stages": STAGES,
    "lr": RATE,
    "optimizer": (
        (OptimizerSpec,),
        True,
        "one of distgrow's, such as SGD(momentum=0.9) or AdamW(), an optimizer over the model's parameters, or a "
        "function of the model that returns one",
    ),
    "average": ((EMA, Tail), True, "an average, such as ema(epochs=1) or tail(0.25)"),
    "sampling": ((SamplingSpec,), True, "a sampling, such as nice_sampling() or stratified_sampling(parts=4)"),
    "extrapolate": ((Extrapolate,), True, "an extrapolation, such as Extrapolate(kind='past', rate=0.05)"),
    "sparsity": ((Sparsity,), True, "a sparsity, such as sparsity(0.8)"),
    "init": ((Init, str, Path), True, "a run's folder, a file of weights, or init_from('runs/first')"),
    "engine": ((Torch, DeepSpeed, FSDP, Async), True, "an engine, such as Torch(max_micro=64)"),
    "run": ((RunSpec,), True, "a RunSpec, such as RunSpec(dir='runs/first')"),
}


def check_arguments(
    specs: Mapping[str, Any],
    model: Any,
    loss: Any,
    metrics: Any,
    collate: Any,
    items: Any = None,
    tokens: Any = None,
    *,
    beside: tuple[Any, ...] = ((), ()),
) -> None:
    """Check the types of fit()'s arguments.

    Args:
        specs: growth, budget, stages, lr, optimizer, engine and run.
        model: The model.
        loss: The loss function.
        metrics: The metrics function, or None.
        collate: The collate function, or None.
        items: The function that counts items, or None.
        tokens: Tokens of every sample, the function that counts them, or None.
        beside: Arguments of `check_beside`.

    Raises:
        ConfigError: an argument has the wrong type; the message names it, what was given and what is allowed.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model={shown(model)}: allowed is a torch.nn.Module")
    _check_function("loss", loss, "loss(model, batch), which returns the mean over the batch's rows")
    for name, function, what in (
        ("metrics", metrics, "metrics(model, batch), which returns a dict of names and values"),
        ("collate", collate, "collate(samples), which returns a batch"),
        ("items", items, "items(batch), which counts what the batch's loss is a mean over"),
    ):
        if function is not None:
            _check_function(name, function, what)
    if isinstance(tokens, bool) or not (tokens is None or callable(tokens) or (isinstance(tokens, int) and tokens > 0)):
        raise ConfigError(
            f"tokens={shown(tokens)}: allowed is a number, the tokens of every sample, or a function tokens(batch), "
            "which counts those of a batch"
        )
    check_types(specs, _SPECS)
    check_beside(*beside)


def check_beside(trackers: Any, hooks: Any, about: Any = None, group: Any = None) -> None:
    """Check trackers, hooks, about and group.

    Raises:
        ConfigError: One of them is none.
    """
    check_trackers(trackers)
    check_hooks(hooks)
    if not (about is None or isinstance(about, Mapping)):
        raise ConfigError(f"about={shown(about)}: allowed is a dict, such as {{'note': 'first try'}}")
    if not (group is None or isinstance(group, Group)):
        raise ConfigError(
            f"group={shown(group)}: allowed is a Group, from distgrow.core.scaling; it says which ranks follow"
        )


def check_trackers(trackers: Any) -> None:
    """Check that every tracker has `log` and `close`.

    Raises:
        ConfigError: one has not; the message says where the services of a config go.
    """
    for k, tracker in enumerate(trackers):
        if not (callable(getattr(tracker, "log", None)) and callable(getattr(tracker, "close", None))):
            raise ConfigError(
                f"trackers[{k}]={shown(tracker)}: allowed is an object with log(event) and close(); for a service "
                "give RunSpec(trackers=[WandB(project=…)]), from distgrow.tracking.spec"
            )


def _check_function(name: str, value: Any, what: str) -> None:
    if isinstance(value, _Loss):
        raise ConfigError(
            f"{name}={shown(value)}: allowed is a function {what}; write lambda model, batch: "
            f"criterion(model(batch[0]), batch[1]) with criterion={type(value).__name__}(…)"
        )
    if not isinstance(value, Callable):
        raise ConfigError(f"{name}={shown(value)}: allowed is a function {what}")
