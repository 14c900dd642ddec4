"""All competitors on the weights of one case, by turns, with the errors of κ."""

import math
import sys

import torch
from torch import Tensor

from benchmarks.spectra.competitors import COMPETITORS, run_profile
from benchmarks.spectra.measuring import Measurement, measure, peak_of, warm_up
from benchmarks.spectra.weights import weight


def largest_errors(weights: list[Tensor], limit: int | None) -> dict[str, float]:
    """The largest relative errors of κ, ours and PEFT's, against float64 singular values of the tall matrix."""
    runs = {label: COMPETITORS[label] for label in ("KappaProfile", "PEFT selector")}
    worst = dict.fromkeys(runs, 0.0)
    seen: dict[tuple[int, ...], int] = {}
    for tensor in weights:
        for matrix in tensor.reshape(-1, *tensor.shape[-2:]):
            shape = tuple(matrix.shape)
            seen[shape] = seen.get(shape, 0) + 1
            if limit is not None and seen[shape] > limit:
                continue
            tall = matrix if shape[0] >= shape[1] else matrix.mT
            sigma = torch.linalg.svdvals(tall.double())
            true = float(sigma[0] / sigma[-1])
            for label, run in runs.items():
                worst[label] = max(worst[label], abs(run([matrix])[0] - true) / true)
    return worst


def compare(name: str, weights: list[Tensor], limit: int | None, repeats: int) -> list[str]:
    """Run all competitors on a case; rows of a markdown table.

    They take turns on the same matrices, and of each the fastest turn counts: a slow spell of the machine then falls on
    all of them, or on none.
    """
    for run in COMPETITORS.values():
        warm_up(run, weights)
    by_shape: dict[tuple[int, ...], list[Tensor]] = {}
    for tensor in weights:
        by_shape.setdefault(tuple(tensor.shape), []).append(tensor)
    total = {label: Measurement(0.0, 0) for label in COMPETITORS}
    ran: list[Tensor] = []
    scaled = False
    for shape, same in by_shape.items():
        chosen = same if limit is None else [same[0][:limit]] if len(shape) == 3 else same[:limit]
        factor = len(same) * math.prod(shape[:-2]) / sum(math.prod(tensor.shape[:-2]) for tensor in chosen)
        scaled |= factor > 1
        turns = [{label: measure(run, chosen) for label, run in COMPETITORS.items()} for _ in range(repeats)]
        for label in COMPETITORS:
            fastest = min((turn[label] for turn in turns), key=lambda m: m.seconds)
            total[label].seconds += factor * fastest.seconds
            print(f"{name} {shape}: {label} {fastest.seconds:.3f} s", file=sys.stderr, flush=True)
        ran += chosen
    for label in COMPETITORS:
        total[label].peak_bytes = peak_of(label, ran)
    errors = largest_errors(weights, limit)
    ours = total["KappaProfile"].seconds
    about = "~" if scaled else ""
    return [
        f"| {name} | {label} | {about}{m.seconds:.3g} | {m.seconds / ours:.2f} | {m.peak_bytes / 2**20:.0f} "
        f"| {f'{errors[label]:.1e}' if label in errors else ''} |"
        for label, m in total.items()
    ]


HEADER = [
    "| case | competitor | seconds | times KappaProfile | peak extra MiB | largest error of κ |",
    "| --- | --- | ---: | ---: | ---: | ---: |",
]


def mixtral(spikes: int) -> list[str]:
    """All of Mixtral-8x7B's matrices, generated on the GPU one layer at a time; only the profiles are timed."""
    if not torch.cuda.is_available():
        raise SystemExit("the case mixtral needs a CUDA device: 800 matrices of up to 4096×14336 take hours on a CPU")
    generator = torch.Generator("cuda").manual_seed(0)
    attention = [(4096, 4096), (4096, 4096), (1024, 4096), (1024, 4096)]
    experts = [(8, 14336, 4096), (8, 14336, 4096), (8, 4096, 14336)]
    run_profile([weight((1024, 1024), generator)])
    seconds, peak = 0.0, 0
    for _ in range(32):
        layer = [weight(shape, generator, spikes).bfloat16() for shape in attention + experts]
        m = measure(run_profile, layer)
        seconds, peak = seconds + m.seconds, max(peak, m.peak_bytes)
    device = torch.cuda.get_device_name()
    return [
        *HEADER,
        f"| mixtral on {device} | KappaProfile | {seconds:.1f} | 1.00 | {peak / 2**20:.0f} | |",
        f"| mixtral on an H200, its author's figure | PEFT selector | 983 | {983 / seconds:.1f} | | |",
    ]
