"""Each rank's own past gradient: against a loop of two workers by hand, the plain run, one rank, and after resumes."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import in_ranks, ledger
from own_past import BATCHES, LOCAL, OPTIMIZERS, ROWS, collated, count, flat, loss, network, plans, positive, trained
from torch import Tensor

from distgrow import SGD, Torch
from distgrow.core.extrapolate import Extrapolate
from distgrow.core.plan import Plan
from distgrow.distributed.world import World
from distgrow.engine.extrapolated import ExtrapolatingEngine

BY_HAND: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], float | None]] = {
    "sgd": (lambda given: torch.optim.SGD(given, lr=0.1, momentum=0.9), 0.3),
    "adamw": (lambda given: torch.optim.AdamW(given, lr=0.1), 0.3),
    "unclipped": (lambda given: torch.optim.SGD(given, lr=0.1, weight_decay=0.01), None),
    "items": (lambda given: torch.optim.SGD(given, lr=0.1, momentum=0.9), 0.3),
}


def clipped(gradients: list[Tensor], clip: float | None) -> list[Tensor]:
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    return gradients if clip is None or norm <= clip else [g * clip / (norm + 1e-6) for g in gradients]


def scaled(optimizer: torch.optim.Optimizer, p: Any, gradient: Tensor) -> Tensor | float:
    """Return the gradient, or over √v̂ + ε of AdamW's state."""
    if isinstance(optimizer, torch.optim.SGD):
        return gradient
    if not (state := optimizer.state[p]):
        return 0.0
    return gradient / ((state["exp_avg_sq"] / (1 - 0.999 ** state["step"].item())).sqrt() + 1e-8)


def two_workers(name: str) -> list[Tensor]:
    """The parameters after each update of a loop by hand: worker k evaluates at θ − γ̂·v_k."""
    make, clip = BY_HAND[name]
    model, found = network(), list[Tensor]()
    given, past = list(model.parameters()), [[torch.zeros_like(p) for p in network().parameters()]] * 2
    optimizer = make(given)
    for (first, _), batch in zip(plans(), BATCHES, strict=True):
        theta, own, shares = [p.detach().clone() for p in given], list[list[Tensor]](), list[int]()
        cuts = [first, first + batch // 2, first + batch]
        for worker in (0, 1):
            with torch.no_grad():
                for p, value, gradient in zip(given, theta, past[worker], strict=True):
                    p.copy_(value - 0.4 * scaled(optimizer, p, gradient))
            rows = collated(ROWS[cuts[worker] : cuts[worker + 1]])
            mean_loss = (positive if name == "items" else loss)(model, rows)
            own.append([g.clone() for g in torch.autograd.grad(mean_loss, given)])
            shares.append(count(rows) if name == "items" else len(rows[1]))
        past = [clipped(gradients, clip) for gradients in own]
        mean = clipped([(shares[0] * a + shares[1] * b) / sum(shares) for a, b in zip(*own, strict=True)], clip)
        with torch.no_grad():
            for p, value, gradient in zip(given, theta, mean, strict=True):
                p.copy_(value)
                p.grad = gradient
        optimizer.step()
        found.append(flat(model))
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of two ranks, and what each has kept."""
    folder = tmp_path_factory.mktemp("two")
    in_ranks("own_past.py", str(folder), workers=2)
    return folder, [torch.load(folder / f"kept-{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_ranks_are_a_loop_of_two_workers_by_hand(name: str, two: tuple[Path, list[dict[str, Any]]]) -> None:
    _, kept = two
    for rank in (0, 1):
        for found, expected in zip(kept[rank][name], two_workers(name), strict=True):
            assert float((found - expected).norm() / expected.norm()) < 1e-11
    whole = two_workers(name)[-1] - kept[0]["plain"]
    assert float(whole.norm()) > 1e-3  # the shifts matter


def test_parameters_come_back_to_the_bit_and_a_rate_of_0_is_the_plain_run(
    two: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, kept = two
    for values in kept:
        assert all(torch.equal(value, flat(network())) for value in values["still"])
        assert torch.equal(values["zero"], values["plain"])
        assert not torch.equal(values["local"], values["plain"])
    assert torch.equal(kept[0]["local"], kept[1]["local"])
    assert ledger(folder / "local") == ledger(folder / "plain")  # no evaluation more
    assert ledger(folder / "local")["applied"] == 320


def test_on_one_rank_the_own_gradient_is_that_of_the_batch(tmp_path: Path) -> None:
    own = trained(tmp_path / "own", World(), LOCAL)
    assert torch.equal(own, trained(tmp_path / "whole", World(), Extrapolate(kind="past", rate=0.4)))


def test_as_many_ranks_resume_to_the_bit_and_others_begin_without_a_past_gradient(
    two: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, kept = two
    checkpoints = sorted((folder / "local/checkpoints").iterdir())
    for checkpoint in checkpoints[len(checkpoints) // 2 :]:
        shutil.rmtree(checkpoint)  # as if it had been killed
    last = checkpoints[len(checkpoints) // 2 - 1]
    assert {file.name for file in last.glob("extrapolation*")} == {"extrapolation-0.pt", "extrapolation-1.pt"}
    shutil.copytree(folder / "local", tmp_path / "moved")
    in_ranks("own_past.py", str(folder), "resume", workers=2)
    for rank in (0, 1):
        again = torch.load(folder / f"kept-{rank}.pt", weights_only=True)["local"]
        assert torch.equal(again, kept[rank]["local"])
    place, steps = tmp_path / "moved/checkpoints" / last.name, list[Tensor]()
    assert torch.load(place / "extrapolation-1.pt", weights_only=True)["past"][0].any()
    for spec in (LOCAL, LOCAL.model_copy(update={"rate": 0.0})):
        model = network()
        engine = ExtrapolatingEngine(
            model, loss, extrapolate=spec, spec=Torch(precision="float64"), optimizer=SGD(momentum=0.9)
        )
        engine.load(place)
        engine.update(Plan(batch=8, world=1, micro=8, accum=1, lr=0.1, stage=0), [collated(ROWS[:8])])
        steps.append(flat(model))
    assert torch.equal(*steps)  # nothing shifted the first update
    trained(tmp_path / "moved", World(), LOCAL, resume=True)
    assert ledger(tmp_path / "moved")["applied"] == 320
