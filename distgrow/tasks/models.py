"""Built-in models: softmax regression, MLP, CIFAR ResNets and a small GPT. Knows shapes, not data."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distgrow.tasks.architectures import swiglu_width
from distgrow.tasks.experts import Active, Experts


def softmax_regression(features: int, classes: int) -> nn.Module:
    """Build one linear layer over flattened inputs, (rows, …) → (rows, classes)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(features, classes))


def mlp(features: int, hidden: list[int], classes: int) -> nn.Module:
    """Build ReLU layers over flattened inputs, (rows, …) → (rows, classes)."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width_in, width_out in zip([features, *hidden], hidden, strict=False):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden[-1] if hidden else features, classes))


Norm = Callable[[int], nn.Module]
Feed = Callable[[int], nn.Module]


def batch_norm(channels: int) -> nn.Module:
    """Normalise by the statistics of the micro-batch."""
    return nn.BatchNorm2d(channels)


def sync_batch_norm(channels: int) -> nn.Module:
    """Normalise by the statistics of one micro-batch of all ranks together. GPUs only."""
    return nn.SyncBatchNorm(channels)


def group_norm(channels: int) -> nn.Module:
    """Normalise each sample by its own statistics, in groups of 8 channels."""
    return nn.GroupNorm(max(1, channels // 8), channels)


class _Block(nn.Module):
    """Apply two 3×3 convolutions with a shortcut (He et al. 2016)."""

    def __init__(self, width_in: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = norm(width), norm(width)
        same = stride == 1 and width_in == width
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), norm(width))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet(channels: int, classes: int, *, widths: list[int], blocks: int, norm: Norm) -> nn.Module:
    """Build a CIFAR ResNet: a 3×3 stem, then one group of `blocks` blocks per width. Each group halves the image.

    Widths 16, 32, 64 with 1 or 3 blocks are ResNet-8 and ResNet-20. Widths 64, 128, 256, 512 with 2 blocks are
    ResNet-18.
    """
    layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False), norm(widths[0]), nn.ReLU()]
    width_in = widths[0]
    for group, width in enumerate(widths):
        for block in range(blocks):
            layers.append(_Block(width_in, width, 2 if group and not block else 1, norm))
            width_in = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width_in, classes))


def feed_forward(width: int) -> nn.Module:
    """Build a GELU layer of four times the width and the way back."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class SwiGLU(nn.Module):
    """Map x to W₃(silu(W₁x) ⊙ W₂x), after Shazeer 2020, arXiv 2002.05202.

    The inner width is 8/3 of the outer one, rounded up to a multiple of 8: so the layer has as many weights as one of
    GELU with 4 times the width.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = swiglu_width(width)
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def experts(width: int, make: Feed = feed_forward, **settings: Any) -> nn.Module:
    """Build several such layers, of which each token uses some: `settings` are those of Experts."""
    return Experts(width, lambda: make(width), **settings)


def turned(x: Tensor, base: float = 10_000.0) -> Tensor:
    """Turn queries or keys (…, length, width) by their places: pair j of place t by the angle t·base^(−2j/width).

    Scores of turned queries and keys depend on the difference of their places alone (RoPE, Su et al. 2021, arXiv
    2104.09864). A pair is (j, j + width/2).
    """
    half = x.shape[-1] // 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    speeds = base ** -(torch.arange(half, device=x.device, dtype=dtype) / half)
    angles = torch.arange(x.shape[-2], device=x.device, dtype=dtype).unsqueeze(1) * speeds
    cos, sin, one, other = angles.cos(), angles.sin(), x[..., :half], x[..., half:]
    return torch.cat([one * cos - other * sin, one * sin + other * cos], -1).to(x.dtype)


class _Attention(nn.Module):
    """Apply self-attention and a feed-forward layer, both pre-normalised and residual."""

    def __init__(self, width: int, heads: int, dropout: float, feed: Feed, *, causal: bool, rotary: bool) -> None:
        super().__init__()
        self.heads, self.dropout, self.causal, self.rotary = heads, dropout, causal, rotary
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = feed(width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.rotary:
            q, k = turned(q), turned(k)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, dropout_p=dropout)
        x = x + self.drop(self.out(mixed.transpose(1, 2).reshape(rows, length, width)))
        return x + self.drop(self.feed(self.norm2(x)))


#: Ends of the names of weights that add to the residual stream.
_WAYS_BACK = ("out.weight", ".2.weight", "down.weight")


class GPT(nn.Module):
    """Map tokens (rows, length) to logits (rows, length, vocabulary) by a transformer."""

    def __init__(
        self,
        vocabulary: int,
        length: int,
        *,
        layers: int,
        width: int,
        heads: int,
        dropout: float,
        causal: bool = True,
        positions: str = "learned",
        tied: bool = True,
        checkpoint_blocks: str = "none",
        feed: Feed = feed_forward,
        active: Active | None = None,
    ) -> None:
        """Build the model.

        Args:
            vocabulary: Tokens that there are.
            length: Tokens of a row, at most.
            layers: Blocks.
            width: Size of an embedding.
            heads: Attention heads.
            dropout: Dropped share of activations while training.
            causal: Whether tokens see only those before them.
            positions: How a token's place is told: learned or rotary.
            tied: Whether the output layer has the weights of the tokens' embedding.
            checkpoint_blocks: Blocks whose activations are not kept: none, all, or every second one.
            feed: Makes the feed-forward layer of a block.
            active: What the layers of experts share, if `feed` makes such.
        """
        super().__init__()
        self.tokens, self._every = (
            nn.Embedding(vocabulary, width),
            {"none": 0, "all": 1, "second": 2}[checkpoint_blocks],
        )
        self.places = nn.Embedding(length, width) if positions == "learned" else None
        settings: dict[str, Any] = {"causal": causal, "rotary": positions == "rotary"}
        blocks = (_Attention(width, heads, dropout, feed, **settings) for _ in range(layers))
        self.blocks, self._active = nn.Sequential(*blocks), active
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                scale = 1 / math.sqrt(2 * layers) if name.endswith(_WAYS_BACK) else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)

    def activate(self, experts: int) -> None:
        """Let each token use so many experts from now on."""
        assert self._active is not None
        self._active.experts = experts

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        if self.places is not None:
            x = x + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        again = self._every if self.training and torch.is_grad_enabled() else 0
        for number, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=False) if again and number % again == 0 else block(x)
        return self.head(self.norm(x))
