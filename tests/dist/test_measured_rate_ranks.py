"""lr.base=auto on two ranks: both go by one choice, and the run is that of the number."""

from conftest import Commands, events, ledger, parameters

LONGER = "budget={samples: 2400}"


def test_two_ranks_train_to_the_bit_as_with_the_number_and_go_on_without_measuring(distgrow: Commands) -> None:
    auto = ("lr.base=auto", "lr.test={updates: 20, start: 0.2}")
    assert distgrow.train("auto", *auto, workers=2).code == 0
    (found,) = events(distgrow.folder / "auto", "lr_choice")
    assert distgrow.train("given", f"lr.base={found['base']}", workers=2).code == 0
    one, other = distgrow.folder / "auto", distgrow.folder / "given"
    assert (parameters(one) == parameters(other)).all()
    assert ledger(one) == {**ledger(other), "probe": found["evaluations"]}
    assert found["evaluations"] == 64 + 20 * 8 * len(found["lrs"])
    assert distgrow.train("auto", *auto, LONGER, workers=2, resume=True).code == 0
    assert distgrow.train("given", f"lr.base={found['base']}", LONGER, workers=2, resume=True).code == 0
    assert (parameters(one) == parameters(other)).all()
    assert len(events(one, "lr_choice")) == 1
