"""Muon for matrices, with AdamW for the rest."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from distgrow.core.errors import ConfigError
from distgrow.core.spec import PosFloat, PosInt
from distgrow.optim.base import OptimizerSpec, fused
from distgrow.optim.groups import Group, Grouped, Parameters, check_named

if TYPE_CHECKING:
    import torch
    from torch import nn


class Muon(OptimizerSpec):
    """torch.optim.Muon for matrices. AdamW trains vectors, convolutions, embeddings and what `exclude` names."""

    per_tensor: ClassVar[bool] = True
    joins: ClassVar[bool] = True
    joins_flat: ClassVar[bool] = True
    always_shown: ClassVar[bool] = True
    skips_on_device: ClassVar[bool] = True

    kind: Literal["muon"] = "muon"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Muon's momentum."""
    nesterov: bool = True
    """Nesterov's momentum."""
    ns_steps: PosInt = 5
    """Newton-Schulz steps that make a matrix's momentum orthogonal."""
    ns_precision: Literal["bfloat16", "float32"] = "bfloat16"
    """What these steps are computed in. torch has bfloat16, which is faster on a GPU. There other last bits of a
    gradient become other digits, so runs on unlike numbers of ranks differ by some 10⁻³; in float32 by some 10⁻⁶."""
    adjust: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """How Muon's learning rate follows a matrix's shape. match_rms_adamw gives steps the size of AdamW's, so that one
    learning rate suits both; original is Keller Jordan's."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay, of both; it is no part of the objective."""
    exclude: list[Parameters] = []
    """Matrices that AdamW trains too, such as an output layer: [{match: "head"}]."""
    adamw_lr_scale: PosFloat = 1.0
    """Factor of AdamW's learning rate."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """AdamW's decay of the second moment."""
    eps: PosFloat = 1e-8
    """Added to AdamW's denominator."""

    @property
    def state_copies(self) -> int:
        """See OptimizerSpec."""
        return 2

    def build(self, groups: list[Group]) -> "torch.optim.Optimizer":
        """Build AdamW for the groups, as for parameters that are no matrices."""
        import torch

        betas = (self.beta1, self.beta2)
        return torch.optim.AdamW(
            groups, lr=0.0, betas=betas, eps=self.eps, weight_decay=self.weight_decay, fused=fused(groups)
        )

    def made(self, named: "Mapping[str, nn.Parameter]", model: "nn.Module") -> "torch.optim.Optimizer":
        """See OptimizerSpec.

        Raises:
            ConfigError: No matrix is left for Muon, or a group, or a name that is excluded, has no parameter. Or torch
                has no Muon.
        """
        import torch

        if not hasattr(torch.optim, "Muon"):
            raise ConfigError(
                f"optimizer.kind=muon needs torch 2.9 or later, and this is {torch.__version__}: install a later one, "
                "or use optimizer.kind=adamw"
            )
        from distgrow.optim import joined
        from distgrow.optim.composite import Composite

        matrices, others = self._parted(named, model)
        if not matrices:
            raise ConfigError(
                "optimizer.kind=muon finds no matrix to train: all parameters are vectors, convolutions, embeddings "
                "or named by optimizer.exclude; use optimizer.kind=adamw"
            )
        muon = joined.Muon(
            [group.for_torch() for group in matrices], lr=0.0, weight_decay=self.weight_decay, momentum=self.momentum,
            nesterov=self.nesterov, ns_steps=self.ns_steps, adjust_lr_fn=self.adjust,
        )  # fmt: skip
        muon.exact = self.ns_precision == "float32"
        return Composite([muon, self.build([group.for_torch() for group in others])]) if others else muon

    def shown(self, named: "Mapping[str, nn.Parameter]", model: "nn.Module") -> list[str]:
        """Return a line for each group of Muon's and of AdamW's."""
        return [group.shown() for side in self._parted(named, model) for group in side]

    def _parted(self, named: "Mapping[str, nn.Parameter]", model: "nn.Module") -> tuple[list[Grouped], list[Grouped]]:
        """Return Muon's groups, and AdamW's."""
        check_named("optimizer.exclude", self.exclude, named)
        lookup = {id(parameter) for parameter in _embeddings(model)}
        matrices, others = [], []
        for group in self.grouped(named):
            muons, adamws = group.parted(lambda name, p: id(p) not in lookup and self._is_muons(name, p))
            if muons is not None:
                matrices.append(replace(muons, label=f"{group.label}, by Muon"))
            if adamws is not None:
                scale = self.adamw_lr_scale * group.own.get("lr_scale", 1.0)
                own = group.own if scale == 1 else {**group.own, "lr_scale": scale}
                others.append(replace(adamws, label=f"{group.label}, by AdamW", own=own))
        return matrices, others

    def _is_muons(self, name: str, parameter: "nn.Parameter") -> bool:
        matrix = parameter.dim() == 2 and not parameter.is_complex()
        return matrix and not any(each.has(name, parameter) for each in self.exclude)


def _embeddings(model: "nn.Module") -> "Iterator[nn.Parameter]":
    """Yield the tables of a model's embeddings, whose rows are no matrix to be made orthogonal."""
    from torch import nn

    kinds = (nn.Embedding, nn.EmbeddingBag)
    return (parameter for part in model.modules() if isinstance(part, kinds) for parameter in part.parameters(False))
