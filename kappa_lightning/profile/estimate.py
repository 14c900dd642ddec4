"""What a profile and a fine-tuning of a model will take, from the shapes of its weights and a short measurement."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kappa_lightning.profile.compute import compute_rows
from kappa_lightning.profile.settings import ProfileSettings
from kappa_lightning.spectra import working_bytes
from kappa_lightning.weights import Weight
from kappa_lightning.weights.weight import as_stack

Shape = tuple[tuple[int, int], torch.dtype]

# Enough matrices of one shape to keep all threads busy to the end, few enough to wait for.
_MOST_SAMPLES = 4
_LEAST_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class ShapeEstimate:
    """All matrices of one shape and precision.

    Attributes:
        shape: (rows, cols).
        dtype: the stored precision.
        tensors: how many tensors have such matrices.
        count: how many matrices those are.
        seconds: what one of them takes, measured on noise of this shape with the device as busy as in a profile.
        working_bytes: what one of them needs beside itself while it is decomposed.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    tensors: int
    count: int
    seconds: float
    working_bytes: int

    @property
    def parameters(self) -> int:
        """Number of entries of all of them."""
        return self.count * math.prod(self.shape)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all of them as they are stored."""
        return self.parameters * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a model's profile and its fine-tuning take.

    Attributes:
        shapes: the weights by shape, the most time first.
        tensors: for each tensor its number of matrices and the place of its shape in ``shapes``.
    """

    shapes: tuple[ShapeEstimate, ...]
    tensors: tuple[tuple[int, int], ...]

    @property
    def parameters(self) -> int:
        """Number of entries of all matrices."""
        return sum(shape.parameters for shape in self.shapes)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all matrices as they are stored, each of which is read once."""
        return sum(shape.stored_bytes for shape in self.shapes)

    def seconds(self, devices: int = 1) -> float:
        """How long the decompositions take on equal devices: the longest of the shares that they get.

        The shares are those of several processes: whole tensors, the expensive ones first, each to whoever has least.

        Raises:
            ValueError: if ``devices`` is below one.
        """
        if devices < 1:
            raise ValueError(f"devices={devices} must be at least 1")
        loads = [0.0] * devices
        for cost in sorted((count * self.shapes[place].seconds for count, place in self.tensors), reverse=True):
            loads[loads.index(min(loads))] += cost
        return max(loads)

    def peak_bytes(self) -> int:
        """The largest tensor as it is stored, and what one of its matrices needs while it is decomposed."""
        return max(
            count * math.prod(self.shapes[place].shape) * self.shapes[place].dtype.itemsize
            + self.shapes[place].working_bytes
            for count, place in self.tensors
        )

    def training_bytes(self, share: float) -> dict[str, int]:
        """What a fine-tuning keeps in memory beside activations if a share of the parameters trains.

        Args:
            share: of the parameters of the matrices, in [0, 1].

        Returns:
            Bytes of ``"weights"``, ``"gradients"`` and the two moments of ``"Adam"`` (each in the precision of the
            weights, as PyTorch has them), of the ``"anchor"``'s copy of what trains before it trained, and of the
            ``"sensitivity"``'s one gradient of all candidates, which is gone before training begins.
        """
        trained = round(share * self.stored_bytes)
        return {
            "weights": self.stored_bytes,
            "gradients": trained,
            "Adam": 2 * trained,
            "anchor": trained,
            "sensitivity": self.stored_bytes,
        }


def estimate_profile(
    weights: Sequence[Weight],
    settings: ProfileSettings | None = None,
    *,
    device: torch.device | str = "cpu",
    track: Callable[[Sequence[Shape]], Iterable[Shape]] = iter,
) -> Estimate:
    """Measure one decomposition of every shape, on noise, and add up.

    No weight is read: their names, shapes and precisions come from a model on the meta device, or from the headers of a
    checkpoint. Learned weights take up to some tens of percent more or less than noise.

    Args:
        weights: of a model or a checkpoint.
        settings: how they would be decomposed.
        device: where.
        track: passes on the shapes that are measured, one after the other, to show progress.

    Raises:
        ValueError: if there are no weights.

    Example:
        >>> from torch import nn
        >>> from kappa_lightning.weights import find_weights
        >>> with torch.device("meta"):
        ...     net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 8))
        >>> estimate = estimate_profile(find_weights(net))
        >>> sorted((shape.shape, shape.count) for shape in estimate.shapes)
        [((8, 64), 1), ((64, 64), 2)]
        >>> estimate.parameters, estimate.stored_bytes
        (8704, 34816)
        >>> estimate.seconds(devices=2) <= estimate.seconds()
        True
    """
    if not weights:
        raise ValueError("there is no weight to estimate the profile of")
    groups: dict[Shape, list[int]] = {}
    for weight in weights:
        count, rows, cols = weight.stack_shape
        groups.setdefault(((rows, cols), weight.dtype), []).append(count)
    settings = settings or ProfileSettings()
    shapes = []
    for shape, dtype in track(list(groups)):
        counts = groups[shape, dtype]
        seconds = _measure(shape, dtype, sum(counts), settings, torch.device(device))
        needed = working_bytes(*shape)
        shapes.append(ShapeEstimate(shape, dtype, len(counts), sum(counts), seconds, needed))
    shapes.sort(key=lambda each: -each.count * each.seconds)
    places = {(each.shape, each.dtype): place for place, each in enumerate(shapes)}
    tensors = tuple((count, places[key]) for key, counts in groups.items() for count in counts)
    return Estimate(tuple(shapes), tensors)


def _measure(
    shape: tuple[int, int], dtype: torch.dtype, count: int, settings: ProfileSettings, device: torch.device
) -> float:
    """Seconds for one matrix of a shape, when as many are worked on as in a profile."""
    generator = torch.Generator().manual_seed(0)
    samples = min(count, max(_MOST_SAMPLES, 2 * torch.get_num_threads()))
    noise = torch.randn(samples, *shape, generator=generator).to(dtype)
    while True:
        weights = [_weight(str(index), matrix) for index, matrix in enumerate(torch.split(noise, 1))]
        start = time.perf_counter()
        done = sum(1 for _ in compute_rows(weights, settings, device=device))
        seconds = time.perf_counter() - start
        # Short work is measured until the clock and the first call's preparations do not matter.
        if seconds >= _LEAST_SECONDS or done >= count:
            return seconds / done
        noise = noise.repeat(min(4, math.ceil(count / done)), 1, 1)[:count]


def _weight(name: str, matrix: Tensor) -> Weight:
    return Weight(name, tuple(matrix.shape), matrix.dtype, lambda: matrix, as_stack)
