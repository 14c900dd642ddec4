"""Does every rung of the solver earn its place, and are its tuned constants at a good value?

``python -m benchmarks.ablation rungs`` leaves out one rung at a time; ``python -m benchmarks.ablation constants
TOP_SHARE PATIENCE`` sets the named constants to other values (without names: all of them). Both print the time of the
processor with one thread over that of the solver as it is, measured by turns on the same matrices: above 1 is slower.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.spectra.weights import weight
from kappa_lightning.spectra import (
    certificate,
    deflation,
    dense,
    factors,
    few_columns,
    ladder,
    lanczos,
    memory,
    rotation,
    rungs,
    spectrum,
)

SHAPES = [(256, 256), (1536, 384), (512, 512), (1024, 1024), (1024, 4096)]
RUNGS = ("deflate64", "eig64", "gram32", "gram64", "lu64", "qr64")
CONSTANTS: dict[str, tuple[ModuleType, Sequence[Any]]] = {
    "LANCZOS_FROM": (ladder, ({"cpu": 256}, {"cpu": 640})),
    "EIGEN_FROM": (ladder, (128, 400)),
    "EIGEN_BELOW": (ladder, (448, 1280)),
    "ROWS": (memory, ({"cpu": 128}, {"cpu": 2048})),
    "DEFLATE_FROM": (ladder, (256, 544)),
    "DEFLATE_BELOW": (ladder, (448, 1280)),
    "FACTOR_SHARE": (rungs, (0.4, 0.8)),
    "GOOD_FACTOR": (rungs, (0.3, 0.59)),
    "TOP_SHARE": (rungs, (0.5, 0.97)),
    "EASY_TOP": (rungs, (0.25, 1.0)),
    "VERY_TALL": (dense, (1.0, 3.0)),
    "REFINED_SHARE": (rungs, (0.0, 0.4)),
    "PATIENCE": (lanczos, (0.4, 1.0)),
    "WORTH_MEASURING": (lanczos, (0.6, 0.95)),
    "MEASUREMENTS": (lanczos, (1, 6)),
    "GROWTH": (certificate, (0.35, 0.9)),
    "STEPS": (rotation, (2, 5)),
    "GRAM_BLOCKS": (factors, (4, 16)),
    "LARGEST_SHARE": (few_columns, (0.3, 0.8)),
    "RESIDUAL_SHARE": (deflation, (1e-5, 0.1)),
}
"""Of each tuned constant: its module, and a lower and a higher value."""


@contextmanager
def changed(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """Set a name of a module for a while."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def ratios(matrices: Sequence[Tensor], change: Callable[[], Any], repeats: int) -> list[float]:
    """The time of each matrix under a change over that without it, the median over the turns."""
    with change():
        for matrix in matrices:
            spectrum(matrix)
    turns = []
    for _ in range(repeats):
        as_it_is = [seconds(matrix) for matrix in matrices]
        with change():
            turns.append([seconds(matrix) / plain for matrix, plain in zip(matrices, as_it_is, strict=True)])
    return [median(turn[index] for turn in turns) for index in range(len(matrices))]


def seconds(matrix: Tensor) -> float:
    """What a matrix takes of the processor."""
    start = time.process_time()
    spectrum(matrix)
    return time.process_time() - start


def without(rung: str) -> Callable[[], Any]:
    """The ladder without one of its rungs."""
    original = ladder.choose_rungs

    def shorter(device: torch.device, rows: int, cols: int) -> tuple[str, ...]:
        return tuple(name for name in original(device, rows, cols) if name != rung)

    return lambda: changed(ladder, "choose_rungs", shorter)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__)
    parser.add_argument("what", choices=("rungs", "constants"))
    parser.add_argument("names", nargs="*", help="of the rungs or constants (default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="turns, of which the median counts (default 3)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    cases = [(shape, spikes) for shape in SHAPES for spikes in (4, 0)]
    matrices = [weight(shape, generator, spikes) for shape, spikes in cases]
    labels = [f"{'×'.join(map(str, shape))} {'learned' if spikes else 'noise'}" for shape, spikes in cases]
    changes: list[tuple[str, Callable[[], Any]]] = []
    if arguments.what == "rungs":
        changes = [(f"without {rung}", without(rung)) for rung in arguments.names or RUNGS]
    else:
        for name in arguments.names or CONSTANTS:
            module, values = CONSTANTS[name]
            for value in values:
                shown = value["cpu"] if isinstance(value, dict) else value
                changes.append((f"{name} = {shown}", lambda m=module, n=f"_{name}", v=value: changed(m, n, v)))  # type: ignore[misc]
    print(f"| change | {' | '.join(labels)} |", f"| --- |{' ---: |' * len(labels)}", sep="\n", flush=True)
    for label, change in changes:
        print(
            f"| {label} | {' | '.join(f'{r:.2f}' for r in ratios(matrices, change, arguments.repeats))} |", flush=True
        )


if __name__ == "__main__":
    main()
