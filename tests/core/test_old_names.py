"""Every kind has one name; kinds, keys and calls of earlier versions are still read as what they are called today."""

from typing import Any, get_args

import pytest

import distgrow
from distgrow.config.load import parse
from distgrow.core.budget import Budget
from distgrow.core.errors import ConfigError
from distgrow.core.spec import as_today
from distgrow.core.stages import Every, MinStage, Stages
from distgrow.growth import Growth
from distgrow.growth.adascale import AdaScale
from distgrow.growth.auto import Auto
from distgrow.growth.base import GrowthPolicy
from distgrow.growth.constant import Constant
from distgrow.growth.critical_batch import CriticalBatch
from distgrow.growth.exponential import Exponential
from distgrow.growth.noise_scale import NoiseScale
from distgrow.growth.norm_threshold import NormThreshold
from distgrow.growth.progress_test import ProgressTest
from distgrow.growth.steps import Steps
from distgrow.growth.temperature import Temperature

POLICIES: tuple[type[GrowthPolicy], ...] = get_args(get_args(Growth)[0])
DWELL = {"epochs": 0.5, "updates": 3}
LIST = {"kind": "list", "batches": [4]}
HALF = MinStage(epochs=0.5, updates=3)


@pytest.mark.parametrize(
    ("old", "today"),
    [
        ({"kind": "list", "batches": [4, 8]}, Steps(batches=[4, 8])),
        ({"kind": "adaptive", "start": 8, "cap": 64}, NormThreshold(start=8, cap=64)),
        ({"kind": "progress", "cap": 64, "dwell": {"epochs": 0.5, "updates": 3}}, ProgressTest(cap=64, min_stage=HALF)),
        (
            {"kind": "tracking", "cap": 64, "kappa": 2.0, "rungs": 1, "dwell": {"epochs": 0.5, "updates": 3}},
            CriticalBatch(cap=64, kappa=2.0, stages_at_once=1, min_stage=HALF),
        ),
        ({"kind": "gns", "cap": 64, "rungs": 3}, NoiseScale(cap=64, stages_at_once=3)),
        ({"kind": "temperature", "cap": 64, "dwell": DWELL}, Temperature(cap=64, min_stage=HALF)),
        ({"kind": "auto", "sure": 1.5}, Auto(later_confidence=1.5)),
        ({"kind": "adascale", "ladder": LIST, "start": 2}, AdaScale(start=2, batches=Steps(batches=[4]))),
    ],
)  # fmt: skip
def test_an_old_kind_or_key_is_that_of_today(old: dict[str, Any], today: Growth) -> None:
    assert parse({"growth": old, "budget": {"epochs": 1}}).growth == today
    assert as_today(old, today) == today.model_dump(mode="json")


def test_a_key_under_both_its_names_is_refused() -> None:
    growth = {"kind": "gns", "cap": 64, "dwell": {"updates": 3}, "min_stage": {"updates": 4}}
    with pytest.raises(ConfigError, match="dwell and min_stage"):
        parse({"growth": growth, "budget": {"epochs": 1}})


def test_a_section_of_another_kind_is_left_as_it_was_written() -> None:
    assert as_today({"kind": "list", "batches": [4, 8]}, Constant(start=4)) == {"kind": "list", "batches": [4, 8]}


@pytest.mark.parametrize("policy", POLICIES)
def test_kind_class_and_function_have_one_name(policy: type[GrowthPolicy]) -> None:
    kind = policy.model_fields["kind"].default
    assert policy.__name__.lower() == kind.replace("_", "")
    name = "critical_batch_tracking" if kind == "critical_batch" else kind  # distgrow.critical_batch is a package
    required = {"smoothness": 1.0, "largest_smoothness": 2.0, "mu": 1.0, "optimum_sq": 1.0, "epsilon": 0.1}
    given: dict[str, Any] = {
        "tau_nice": {"samples": 10, **required},
        "tau_adaptive": {key: value for key, value in required.items() if key != "optimum_sq"},
        "steps": {"batches": [4]},
        "critical_batch": {"kappa": 1.0},
        "adascale": {"scale": 2},
    }.get(kind, {})
    assert getattr(distgrow, name)(**given) == policy(**given)


def test_the_old_functions_take_what_they_took() -> None:
    assert distgrow.constant(16) == distgrow.constant(batch=16) == Constant(start=16)
    assert distgrow.exponential(8, 2, 64) == Exponential(start=8, factor=2.0, cap=64)
    assert distgrow.batches([4, 8]) == distgrow.batches(sizes=[4, 8]) == Steps(batches=[4, 8])
    assert distgrow.norm_threshold(start=8, cap=64, every=10) == NormThreshold(start=8, cap=64, every=10)
    assert distgrow.norm_threshold(8, 64, updates=3).updates == 3
    assert distgrow.progress_test(8, 64, dwell=distgrow.dwell(epochs=0.5, updates=3)) == ProgressTest(
        start=8, cap=64, min_stage=HALF
    )
    assert distgrow.noise_scale_tracking(8, 64, share=2.0) == NoiseScale(start=8, cap=64, share=2.0)
    assert distgrow.at_temperature(8, 64, lr_max=1.0) == Temperature(start=8, cap=64, lr_max=1.0)
    assert distgrow.budget(epochs=3) == Budget(epochs=3)
    assert distgrow.every(epochs=1) == Stages(every=Every(epochs=1))


def test_a_call_with_too_many_or_doubled_arguments_is_refused() -> None:
    with pytest.raises(TypeError, match="at most 1 arguments by position, start"):
        distgrow.constant(8, 16)
    with pytest.raises(TypeError, match="start twice"):
        distgrow.constant(8, start=16)
