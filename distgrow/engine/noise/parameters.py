"""ParameterNoise: |G|² and tr Σ of each parameter, from the norms of micro-batch gradients; knows no engine."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from distgrow.optim.direction import real


class ParameterNoise:
    """Keep forgetting means over samples of |G_k|² and tr Σ_k of every parameter k, as McCandlish's estimator has them.

    With P parts of a batch of B samples and Q = Σ n_i|g_i|²/B, tr Σ = B(Q − |g|²)/(P − 1) and |G|² = |g|² − tr Σ/B,
    both without bias for parts of any sizes (theory: arXiv 1812.06162, appendix A).
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        """Begin with nothing known of `parameters`."""
        self._parameters = list(parameters)
        self._sums: Tensor | None = None  # Σ w·|G|², Σ w·tr Σ and Σ w, a column a parameter

    def see(self, parts_sq: Mapping[Tensor, Tensor], *, batch: int, parts: int, keep: float, clipped: float) -> None:
        """Learn of the gradients of a batch's parts.

        Args:
            parts_sq: Q of each parameter that has a gradient.
            batch: Samples of the batch.
            parts: How many; at least 2.
            keep: What the weights of earlier batches are multiplied by.
            clipped: What the gradients that the parameters have now were multiplied by.
        """
        new = {p: self._column(p, square, batch, parts, clipped) for p, square in parts_sq.items()}
        nothing = torch.zeros_like(next(iter(new.values())))
        columns = torch.stack([new.get(parameter, nothing) for parameter in self._parameters], 1)
        self._sums = columns if self._sums is None else self._sums.mul_(keep).add_(columns)

    def _column(self, parameter: Tensor, parts_sq: Tensor, batch: int, parts: int, clipped: float) -> Tensor:
        assert parameter.grad is not None
        whole = torch.linalg.vector_norm(real(parameter.grad), dtype=parts_sq.dtype).div_(clipped).square_()
        variance = (parts_sq - whole).mul_(batch / (parts - 1))
        return torch.stack([batch * whole - variance, batch * variance, torch.full_like(whole, batch)])

    def figures(self) -> list[tuple[float, float]]:
        """Return |G|² and tr Σ of each parameter, NaN where nothing is known. Waits for a GPU."""
        if self._sums is None:
            return [(float("nan"), float("nan"))] * len(self._parameters)
        grad_sq, variance, weight = self._sums.unbind()
        return list(zip((grad_sq / weight).tolist(), (variance / weight).tolist(), strict=True))

    def state(self) -> Tensor | None:
        """Return what is kept, for a checkpoint; None if nothing is."""
        return self._sums

    def load(self, state: Tensor | None) -> None:
        """Take over what `state` returned.

        Raises:
            ValueError: It is of other parameters.
        """
        if state is not None and state.shape[1] != len(self._parameters):
            raise ValueError(f"it holds the noise of {state.shape[1]} parameters")
        self._sums = state
