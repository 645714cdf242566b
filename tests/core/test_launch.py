"""A launcher is one file and a member of the union; the scripts below launch/ say what they start."""

import runpy
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
import yaml
from conftest import ROOT
from pydantic import Field
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from typer.testing import CliRunner

from distgrow import cli
from distgrow.config import load
from distgrow.config.run import Run
from distgrow.core.errors import ConfigError
from distgrow.core.spec import default_kind
from distgrow.launch import local
from distgrow.launch.base import Job, LauncherSpec, skips_keys_of_others
from distgrow.launch.local import Local
from distgrow.launch.ray.spec import Ray
from distgrow.run.resume_mode import ResumeMode

RAY = ["launch.kind=ray", "launch.address=auto"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ([], ["train", "configs/digits.yaml", *RAY]),
        (["my.yaml", "lr.base=1"], ["train", "my.yaml", *RAY, "lr.base=1"]),
        (["lr.base=-1"], ["train", "configs/digits.yaml", *RAY, "lr.base=-1"]),
        (["--auto-resume", "my.yaml", "a=b"], ["train", "--auto-resume", "my.yaml", *RAY, "a=b"]),
        (["my.yaml", "a=b", "--resume"], ["train", "--resume", "my.yaml", *RAY, "a=b"]),
    ],
)
def test_the_ray_script_takes_a_config_overrides_and_options_in_any_order(given: list[str], meant: list[str]) -> None:
    arguments = runpy.run_path(str(ROOT / "launch/ray_train.py"))["arguments"]
    assert arguments(given) == ["distgrow", *meant]


def test_the_kubernetes_manifest_resumes_and_shares_the_folder_of_its_run() -> None:
    job, volume = yaml.safe_load_all((ROOT / "launch/kuberay.yaml").read_text())
    words, cluster = job["spec"]["entrypoint"].split(), job["spec"]["rayClusterSpec"]
    assert "--auto-resume" in words and "run.dir=/shared/runs/digits" in words
    workers = sum(group["replicas"] for group in cluster["workerGroupSpecs"])
    assert f"launch.workers={workers}" in words
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == volume["metadata"]["name"]
        assert pod["containers"][0]["volumeMounts"][0]["mountPath"] == "/shared"


class Inline(LauncherSpec):
    """All that a new launcher takes: it trains in this process, whatever the number of workers."""

    started: ClassVar[list[Sequence[str]]] = []
    kind: Literal["inline"] = "inline"
    shout: bool = False

    def train(self, job: Job, *, resume: ResumeMode, rebudget: bool, command: Sequence[str]) -> int:
        self.started.append(command)
        job.fit(resume=resume)
        return 7 if self.shout else 0


_Launcher = Local | Ray | Inline


class Wider(Run):
    """A config whose union has one member more."""

    launch: Annotated[  # pyright: ignore[reportIncompatibleVariableOverride]
        _Launcher, Field(discriminator="kind"), skips_keys_of_others(Local, Ray, Inline), default_kind("local")
    ] = Local()


DIGITS = str(ROOT / "configs/digits.yaml")
SHORT = ["budget={steps: 2}", "run.eval.every_epochs=1000"]


def test_a_launcher_of_ones_own_trains_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("distgrow.config.load"), "Run", Wider)
    monkeypatch.setattr(Inline, "started", [])
    words = ["train", DIGITS, *SHORT, f"run.dir={tmp_path / 'run'}", "launch.kind=inline"]
    assert CliRunner().invoke(cli.app, words).exit_code == 0
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()
    assert Inline.started[0][-1] == "--auto-resume"
    again = [*words, "launch.shout=true", "--auto-resume"]
    assert CliRunner().invoke(cli.app, again).exit_code == 7  # the launcher's own exit code
    assert '"event": "resume"' in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_the_kind_alone_can_be_overridden_in_both_directions() -> None:
    text = "launch={kind: ray, workers: 4, address: auto, placement: SPREAD}"
    assert load(DIGITS, [text]).launch == Ray(workers=4, address="auto", placement="SPREAD")
    assert load(DIGITS, [text, "launch.kind=local"]).launch == Local(workers=4)
    assert load(DIGITS, ["launch={address: auto, workers: 4}"]).launch == Local(workers=4)  # as earlier versions wrote


def test_keys_that_no_launcher_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="launch.adress: unknown key"):
        load(DIGITS, ["launch={kind: local, adress: auto}"])
    with pytest.raises(ConfigError, match="did you mean 'address'"):
        load(DIGITS, ["launch={kind: ray, adress: auto}"])
    with pytest.raises(ConfigError, match=r"launch.kind='rya': unknown; did you mean 'ray'"):
        load(DIGITS, ["launch.kind=rya"])


@pytest.mark.parametrize("override", ["launch.placement=FOO", "launch.resize_wait_s=minus", "launch.kind=[ray]"])
def test_a_key_that_is_skipped_must_have_a_value_that_its_own_launcher_takes(override: str) -> None:
    key, _, value = override.removeprefix("launch.").partition("=")
    with pytest.raises(ConfigError, match=rf"{key}.*{value.strip('[]')}"):
        load(ROOT / "configs/digits.yaml", [override])


@pytest.mark.parametrize(("codes", "code"), [((2, -15), 2), ((-15, 2), 2), ((1, -15), 1), ((-9, -15), 1)])
def test_a_rank_that_refuses_ends_the_command_with_2_whichever_rank_torch_takes_for_the_first(
    monkeypatch: pytest.MonkeyPatch, codes: tuple[int, ...], code: int
) -> None:
    failures = {rank: ProcessFailure(rank, 1000 + rank, exitcode, "") for rank, exitcode in enumerate(codes)}

    def fail(*_: object) -> None:
        raise ChildFailedError("distgrow", failures)

    monkeypatch.setattr(local, "_run_group", fail)
    assert local.run_groups([(2, [])], restarts=0, signals=()) == code
