"""The settings of torch's parameter groups as an OptimizerPlan wants them; knows no engine, and loads no torch."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from distgrow.core.errors import ConfigError
from distgrow.core.optimizer_plan import AtGrowth, OptimizerPlan
from distgrow.core.plan import Plan
from distgrow.optim.groups import Group, assign_lr

if TYPE_CHECKING:
    import torch

#: Keys of AtGrowth, and what specs call the settings.
KEYS = {"momentum": ("beta1", "momentum"), "beta2": ("beta2", "alpha", "rho"), "weight_decay": ("weight_decay",)}
L2_FAULT = "its weight decay is an L2 penalty, part of the objective, which the batch must not change"
#: Key of a parameter group: what its settings are at b₀. The group itself has those of the last update.
INITIAL = "initial"
#: Key of a parameter group: the last update's learning rate over what the plan and `lr_scale` make it.
CORRECTION = "correction"
#: Optimizers that divide by 1 − β₂ᵗ, and those that also divide by 1 − β₁ᵗ. NAdam keeps the product of its momenta.
_CORRECTS_ROOT = frozenset({"Adam", "AdamW", "NAdam", "DeepSpeedCPUAdam", "FusedAdam"})
_CORRECTS_MEAN = _CORRECTS_ROOT - {"NAdam"}
#: Optimizers of torch's that add λθ to the gradient, unless they have decoupled_weight_decay.
L2 = frozenset({"SGD", "Adam", "Adagrad", "Adadelta", "RMSprop", "NAdam", "RAdam", "Adamax", "ASGD"})
#: First moments by their names in torch's states, and what they begin with; mu_product belongs to NAdam's.
_BEGINNING = {"exp_avg": 0.0, "momentum_buffer": 0.0, "mu_product": 1.0}


def refuse(
    spec: AtGrowth, decays: Mapping[str, float] | None, name: str, *, fault: Callable[[str], str | None]
) -> None:
    """Check that an optimizer has what is to follow the batch.

    Args:
        spec: What is to follow it.
        decays: What the optimizer has, by the keys of `spec`. None: it is not known yet.
        name: The optimizer's, for the message.
        fault: Tells why a setting cannot follow the batch.

    Raises:
        ConfigError: It has not, or it cannot.
    """
    if decays is None:
        return
    asked = [(key, "samples", key) for key in spec.asked()]
    asked += [("moments", "reset", "momentum")] if spec.moments == "reset" else []
    can = [key for key in decays if decays[key] and fault(key) is None]
    for key, value, needed in asked:
        reason = fault(needed) if key != "moments" and needed in decays else None
        if reason is None and not decays.get(needed):
            reason = f"it has no {needed}" if needed not in decays else f"its {needed} is 0"
        if reason is not None:
            way = f"what can follow the batch is its {', '.join(can)}" if can else "nothing of it can follow the batch"
            raise ConfigError(f"at_growth.{key}={value} with optimizer {name}: {reason}; {way}")


def remember(optimizer: "torch.optim.Optimizer", spec: AtGrowth, name: str) -> None:
    """Keep in each group what its settings are at b₀, if anything is to follow the batch.

    Raises:
        ConfigError: No group has what is to follow it, or it cannot.
    """
    if not spec.changes:
        return
    found: dict[str, float] = {}
    faults: dict[str, str] = {}
    for one in getattr(optimizer, "optimizers", [optimizer]):
        for group in one.param_groups:
            group[INITIAL] = _initial(group, type(one).__name__)
            for key, value in _decays(group).items():
                found[key] = max(value, found.get(key, 0.0))
            faults.update(_faults(group, one))
    refuse(spec, found, name, fault=faults.get)


def _initial(group: Group, kind: str) -> dict[str, Any]:
    """Return what a group's settings are now, and how its optimizer divides its moments."""
    names = ("betas", "momentum", "dampening", "alpha", "rho", "weight_decay", "eps")
    kept = {name: group[name] for name in names if name in group}
    corrects = [kind in _CORRECTS_ROOT, kind in _CORRECTS_MEAN] if _has_betas(group) else [False, False]
    return {**kept, "corrects_root": corrects[0], "corrects_mean": corrects[1], "l2": _penalises(group, kind)}


def _has_betas(group: Group) -> bool:
    return len(group.get("betas", ())) == 2


def _second(group: Group) -> str | None:
    """Return the key of the second moment's decay beside `betas`; ASGD's alpha and others' rho are other things."""
    return "alpha" if "centered" in group else "rho" if "rho" in group and "momentum" not in group else None


def _decays(group: Group) -> dict[str, float]:
    """Return a group's settings that can follow the batch, by the keys of AtGrowth."""
    found: dict[str, float] = {}
    if _has_betas(group):
        found["momentum"], found["beta2"] = map(float, group["betas"])
    elif "momentum" in group:
        found["momentum"] = float(group["momentum"])
    if (name := _second(group)) is not None:
        found["beta2"] = float(group[name])
    return {**found, "weight_decay": float(group["weight_decay"])} if "weight_decay" in group else found


def _faults(group: Group, optimizer: "torch.optim.Optimizer") -> dict[str, str]:
    """Return why settings of a group cannot follow the batch, by the keys of AtGrowth."""
    faults: dict[str, str] = {}
    if _penalises(group, type(optimizer).__name__):
        faults["weight_decay"] = L2_FAULT
    if group.get("momentum") and (group.get("nesterov") and "dampening" in group):
        faults["momentum"] = NESTEROV_FAULT
    if group.get("momentum") and "centered" in group:
        faults["momentum"] = NO_DAMPENING_FAULT
    return faults


NESTEROV_FAULT = "nesterov's steps have no dampening, and would become shorter with less momentum"
NO_DAMPENING_FAULT = "its momentum has no dampening, so its steps would become shorter with less momentum"


def _penalises(group: Group, kind: str) -> bool:
    """Return whether a group's weight decay is an L2 penalty."""
    return kind in L2 and not group.get("decoupled_weight_decay")


def assign(groups: Iterable[Group], plan: Plan) -> None:
    """Set the learning rate of all groups, and what follows the batch, from what they were at b₀."""
    groups, how = list(groups), plan.optimizer
    assign_lr(groups, plan.lr)
    if how is not None:
        for group in groups:
            _assign(group, group[INITIAL], how)


def _assign(group: Group, initial: Mapping[str, Any], plan: OptimizerPlan) -> None:
    if _has_betas(group):
        beta1, beta2 = initial["betas"]
        group["betas"] = (plan.momentum(beta1), plan.beta2(beta2))
        root = plan.root_factor(beta2) if initial["corrects_root"] else 1.0
        group[CORRECTION] = root * (plan.moment_factor(beta1) if initial["corrects_mean"] else 1.0)
        group["lr"] = group["lr"] * group[CORRECTION]
        if initial["corrects_root"]:
            group["eps"] = initial["eps"] * root
    elif "momentum" in group:
        first = initial["momentum"]
        group["momentum"] = now = plan.momentum(first)
        if "dampening" in group:  # the buffer stays the gradients' mean over 1 − μ of b₀
            group["dampening"] = 1 - (1 - initial["dampening"]) * (1 - now) / (1 - first)
    if (name := _second(group)) is not None:
        group[name] = plan.beta2(initial[name])
    if "weight_decay" in group and not initial["l2"]:
        group["weight_decay"] = plan.weight_decay(initial["weight_decay"]) / group.get(CORRECTION, 1.0)


def reset_moments(optimizer: "torch.optim.Optimizer") -> None:
    """Make the first moments of all parameters what they are before a first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for name, value in _BEGINNING.items():
                if state.get(name) is not None:
                    state[name].fill_(value)
