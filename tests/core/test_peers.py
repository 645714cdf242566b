"""What is said of peers' trainings, against trainings that are written by hand, and against real ones."""

import json
from pathlib import Path

import peers
import pytest
import torch
from peer_checks import Check, Resumption, Update, read, times_seen
from peer_loops.work import Work, checked
from torch import nn


def updates(work: Work, epochs: int, size: int) -> list[Update]:
    """Each sample once an epoch, in order, in updates of `size` samples, one a second."""
    order = [sample for _ in range(epochs) for sample in range(len(work.data))]
    parts = [tuple(order[first : first + size]) for first in range(0, len(order), size)]
    return [Update(moment=float(n), rows=len(part), lr=0.1, samples=part) for n, part in enumerate(parts)]


def test_a_training_as_asked_for_has_nothing_wrong(tmp_path: Path) -> None:
    work = checked(tmp_path)
    first, rest = updates(work, 2, 8), updates(work, 4, 16)
    found = Check.of(work, first, 0)
    assert (found.batches, found.gradients) == ("1 of 6", "none")
    assert found.evaluations == 2 * 203
    assert times_seen(work, first + rest) == "none"


def test_samples_that_were_left_out_or_repeated_are_counted(tmp_path: Path) -> None:
    work = checked(tmp_path)
    whole = updates(work, work.epochs, 203)
    short = [*whole[:-1], Update(moment=9.0, rows=203, lr=0.1, samples=(0, 0, *range(2, 203)))]
    assert times_seen(work, short) == "2, 5 to 7 times"


def test_samples_that_have_changed_their_epochs_are_counted(tmp_path: Path) -> None:
    work = checked(tmp_path)
    done = updates(work, work.epochs, 29)  # seven updates are an epoch
    done[0], done[7] = done[7], done[0]
    assert times_seen(work, done) == "none"
    done[0], done[8] = done[8], done[0]
    assert times_seen(work, done) == "58 in another epoch"


def test_a_resume_that_takes_another_rate_or_repeats_updates_is_told(tmp_path: Path) -> None:
    work = checked(tmp_path)
    whole = updates(work, work.epochs, 203)
    good = Resumption.of(work, whole, [*whole[:4], *whole[3:]], died=4)
    assert good == Resumption(rates="none", seen="none", lost=1)
    wrong = [Update(moment=0.0, rows=203, lr=0.2, samples=update.samples) for update in whole[4:]]
    assert Resumption.of(work, whole, [*whole[:4], *wrong], died=4).rates == "2 updates"
    twice = Resumption.of(work, whole, [*whole[:4], *whole[2:4], *whole[2:4]], died=4)
    assert twice.seen == "none"  # as many updates: which ones they are does not matter where all have all samples


def test_seconds_of_a_stage_leave_out_what_the_transition_took(tmp_path: Path) -> None:
    work = checked(tmp_path)
    done = updates(work, 2, 203)
    moments = [0.0, 1.0, 6.0, 7.0, 9.5, 10.5]  # two updates a stage: one second each, and four and 1.5 lost
    done = [Update(moment=m, rows=203, lr=0.1, samples=done[0].samples) for m in moments]
    found = peers.timing(work, done)
    assert found.stages == pytest.approx({8: 1e4 / 203, 16: 1e4 / 203, 32: 1e4 / 203})
    assert found.transition == pytest.approx((4 + 1.5) / 2)
    assert found.seconds == 10.5


def test_a_gradient_that_is_no_mean_over_its_samples_is_told(tmp_path: Path) -> None:
    work = checked(tmp_path)
    model: nn.Module = work.make()
    inputs, labels = work.data.tensors
    before = torch.cat([part.detach().flatten() for part in model.parameters()])
    for factor, rank in ((1.0, 0), (1.0, 1)):
        loss = work.loss(model, (inputs[:6], labels[:6])) * factor
        gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])
        own = inputs[3 * rank : 3 * rank + 3].flatten(1)[:, 0].tolist()
        line = {"moment": 0.0, "rows": 3, "beside": 2, "lr": 0.1, "seen": own, "before": before.tolist()}
        lines = [{**line, "gradient": gradient.tolist()}, {**line, "gradient": (1.5 * gradient).tolist()}]
        (tmp_path / f"seen-{rank}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done, beside = read(work, 2)
    assert [update.samples for update in done] == [(0, 1, 2, 3, 4, 5)] * 2
    assert (done[0].distance, done[1].distance) == (pytest.approx(0.0, abs=1e-6), pytest.approx(0.5, rel=1e-5))
    assert beside == 8


def test_lines_are_those_with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "peer_loops").mkdir()
    (tmp_path / "peer_loops" / "some_loop.py").write_text(
        '"""Words.\n\nmore"""\n\nimport os\n\n\n# why\nx = (\n    1\n)\n'
    )
    monkeypatch.setattr(peers, "HERE", tmp_path)
    assert peers.lines_of("some") == 4


@pytest.mark.slow
def test_distgrow_does_nothing_wrong_where_a_loop_by_hand_does() -> None:
    ours, bare = (peers.judge(name, resuming=True) for name in ("distgrow", "bare"))
    assert (ours.check.gradients, ours.check.seen, ours.check.beside) == ("none", "none", 0)
    assert ours.check.batches == "1 of 10"  # the rest of the budget
    assert ours.resumption in [
        Resumption(rates="none", seen="none", lost=lost) for lost in (4, 11)
    ]  # 11: not yet written
    assert bare.check.gradients.startswith("4, off by")
    assert bare.check.seen != "none"
