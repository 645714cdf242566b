"""What is seen of a peer from outside: rows that go through its model with gradients, and its optimizer's steps."""

import atexit
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class Watch:
    """Writes a line for every update of a rank: moment, rows, learning rate, evaluations beside; more where `exact`.

    Exact lines also hold the rows' first features, by which samples are told apart, the parameters that the gradient
    was taken at, and the gradient. All vectors are flat, in the order of model.parameters().
    """

    def __init__(self, model: nn.Module, folder: Path, *, exact: bool, stop_after: int) -> None:
        self._model, self._exact, self._left = model, exact, stop_after
        self._rows, self._beside = 0, 0
        self._seen: list[float] = []
        self._before: list[float] | None = None
        self._file = (folder / f"seen-{os.environ['RANK']}.jsonl").open("a", buffering=1)
        model.register_forward_pre_hook(self._forward)
        model.register_forward_hook(self._forwarded)
        register_optimizer_step_post_hook(self._stepped)
        atexit.register(self._end)

    def _forward(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not torch.is_grad_enabled() or not model.training:
            return
        rows = inputs[0]
        self._rows += len(rows)
        if self._exact:
            self._seen += rows.flatten(1)[:, 0].tolist()
            self._before = self._before or self._flat([p.detach() for p in self._model.parameters()])

    def _forwarded(self, model: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Count rows that no update is made of, once a gradient is taken of them."""
        if not model.training and output.requires_grad:
            rows = len(inputs[0])
            output.register_hook(lambda _: self._besides(rows))

    def _besides(self, rows: int) -> None:
        self._beside += rows

    def _stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        line: dict[str, Any] = {"moment": time.perf_counter(), "rows": self._rows, "beside": self._beside}
        line["lr"] = float(optimizer.param_groups[0]["lr"])
        if self._exact:
            gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
            line |= {"seen": self._seen, "before": self._before, "gradient": self._flat(gradients)}
        self._write(line)
        self._rows, self._beside, self._seen, self._before = 0, 0, [], None
        self._left -= 1
        if self._left == 0:
            os._exit(13)

    def _end(self) -> None:
        """What came after the last update."""
        self._write({"rows": 0, "beside": self._beside})

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")

    @staticmethod
    def _flat(tensors: list[Tensor]) -> list[float]:
        return torch.cat([tensor.detach().flatten() for tensor in tensors]).tolist()
