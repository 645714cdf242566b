"""Built-in data, all real: digits, CIFAR-10 from Parquet, text; arrays in memory that make whole batches at once."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distgrow.core.order import Int64s, UInt64s, seeds
from distgrow.data.dataset import Batched

Example = tuple[Tensor, Tensor]
Bytes = npt.NDArray[np.uint8]
Channels = tuple[float, float, float]
#: Mean and standard deviation of each channel of CIFAR-10's training set, in 0 … 1.
CIFAR10_MEAN: Channels = (0.4914, 0.4822, 0.4465)
CIFAR10_STD: Channels = (0.2470, 0.2435, 0.2616)


class Arrays(Batched):
    """Inputs (n, …) and labels (n,) in memory."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Example:
        return self.inputs[index], self.labels[index]

    def batch(self, indices: Int64s, seeds: UInt64s) -> Example:
        """Return the collated rows `indices`."""
        rows = torch.from_numpy(indices)
        return self.inputs.index_select(0, rows), self.labels.index_select(0, rows)  # see Tensors


def digits() -> tuple[Arrays, Arrays]:
    """Return the UCI digits as (1, 8, 8) images in 0 … 1: 1,437 to train on and 360 to test on."""
    table = np.loadtxt(Path(__file__).with_name("digits.csv.gz"), delimiter=",", dtype=np.float32)
    order = np.random.RandomState(0).permutation(len(table))
    images = torch.from_numpy(table[order, :64] / 16.0).view(-1, 1, 8, 8)
    labels = torch.from_numpy(table[order, 64]).long()
    return Arrays(images[:1437], labels[:1437]), Arrays(images[1437:], labels[1437:])


class Images(Batched):
    """uint8 images (n, 3, h, w), normalised as they are drawn; augmented ones are shifted and mirrored at random."""

    pad = 4  #: pixels that an augmented image may be shifted by

    def __init__(
        self,
        pixels: Bytes,
        labels: Int64s,
        *,
        augment: bool,
        mean: Channels = CIFAR10_MEAN,
        std: Channels = CIFAR10_STD,
    ) -> None:
        self.mean, self.std = mean, std
        edges = ((0, 0), (0, 0), (self.pad, self.pad), (self.pad, self.pad))
        self.height, self.width = pixels.shape[2:]
        self.pixels, self.labels, self.augment = (np.pad(pixels, edges) if augment else pixels), labels, augment
        self._scale = 1 / (255 * torch.tensor(self.std).view(3, 1, 1))
        self._shift = -torch.tensor(self.mean).view(3, 1, 1) / torch.tensor(self.std).view(3, 1, 1)

    def plain(self) -> "Images":
        """Return the same images without augmentation, in the same memory."""
        if not self.augment:
            return self
        inside = slice(self.pad, -self.pad)
        pixels = self.pixels[:, :, inside, inside]
        return Images(pixels, self.labels, augment=False, mean=self.mean, std=self.std)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        seed = seeds(int(torch.randint(2**62, ())), [index]) if self.augment else seeds(0, [0])
        image, label = self.batch(np.array([index]), seed)
        return image[0], label[0]

    def batch(self, indices: Int64s, seeds: UInt64s) -> Example:
        """Return the collated rows `indices`, shifted by up to 4 pixels and mirrored as each row's seed says."""
        pixels = self._cut(indices, seeds) if self.augment else self.pixels[indices]
        images = torch.from_numpy(pixels).float().mul_(self._scale).add_(self._shift)
        return images, torch.from_numpy(self.labels[indices])

    def _cut(self, indices: Int64s, seeds: UInt64s) -> Bytes:
        places = np.uint64(2 * self.pad + 1)
        downs, rights, mirrored = seeds % places, seeds // places % places, (seeds >> np.uint64(63)).astype(bool)
        out = np.empty((len(indices), 3, self.height, self.width), np.uint8)
        for row, (index, down, right, mirror) in enumerate(zip(indices, downs, rights, mirrored, strict=True)):
            image = self.pixels[index, :, int(down) : int(down) + self.height, int(right) : int(right) + self.width]
            out[row] = image[:, :, ::-1] if mirror else image
        return out


class Tokens(Batched):
    """Non-overlapping windows of a token stream: inputs (length,) and the same shifted by one."""

    def __init__(self, stream: Int64s, length: int) -> None:
        self.stream, self.length = torch.from_numpy(stream), length
        self._offsets = torch.arange(length + 1)

    def __len__(self) -> int:
        return (len(self.stream) - 1) // self.length

    def __getitem__(self, index: int) -> Example:
        window = self.stream[index * self.length : (index + 1) * self.length + 1]
        return window[:-1], window[1:]

    def batch(self, indices: Int64s, seeds: UInt64s) -> Example:
        """Return the collated windows `indices`."""
        windows = self.stream[torch.from_numpy(indices)[:, None] * self.length + self._offsets]
        return windows[:, :-1], windows[:, 1:]
