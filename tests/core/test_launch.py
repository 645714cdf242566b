"""The scripts below launch/ say what they start."""

import runpy

import pytest
import yaml
from conftest import ROOT

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
