"""The scripts and diffs of the manual's pages, as tests run them."""

import os
import re
import socket
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT


def scripts(page: str) -> dict[str, str]:
    """Return the scripts of a page below docs/, by their titles."""
    return dict(re.findall(r"```python title=\"(.*?)\"\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S))


def diffs(page: str) -> list[str]:
    """Return the diffs of a page below docs/."""
    return re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S)


def patched(script: str, diff: str) -> str:
    """Apply the hunks of a diff, which @@ divides. Each of them has to be found exactly once."""
    for hunk in diff.split("@@\n"):
        lines = [(line[:1] or " ", line[1:]) for line in hunk.splitlines()]
        old, new = ("".join(f"{text}\n" for sign, text in lines if sign in (" ", kept)) for kept in "-+")
        assert script.count(old) == 1, f"the page's script does not have\n{old}"
        script = script.replace(old, new)
    return script


def after(page: str, number: int = 0) -> str:
    """Return the page's only script after its diff of this number."""
    (script,) = scripts(page).values()
    return patched(script, diffs(page)[number])


def execute(script: str, folder: Path) -> dict[str, Any]:
    """Run a script in this process, in a folder that is made if need be. Return its names."""
    folder.mkdir(parents=True, exist_ok=True)
    names: dict[str, Any] = {"__name__": "__main__"}
    with chdir(folder), torch.random.fork_rng():
        exec(compile(script, "a page of docs/", "exec"), names)
    return names


def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the environment of a group of one rank, as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {
        "RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }.items():  # fmt: skip
        assert name not in os.environ
        monkeypatch.setenv(name, str(value))


def flat(state: dict[str, Any]) -> torch.Tensor:
    """Return all parameters of a model's state as one vector, float64."""
    return torch.cat([tensor.detach().double().flatten() for tensor in state.values()])
