"""The tables beside the comparison: against the floor, by size, fingerprints, and models of a few hundred columns."""

import math
import sys
import time
from statistics import median

import torch

from benchmarks.spectra.competitors import (
    run_fingerprint,
    run_floor,
    run_floor64,
    run_peft,
    run_profile,
    run_qr,
    run_qr64,
    run_spectrum,
)
from benchmarks.spectra.measuring import measure, warm_up
from benchmarks.spectra.weights import case_weights, minilm_weights, smollm2_weights, weight


def floor(repeats: int) -> list[str]:
    """``spectrum`` against the bare factorizations, one large matrix at a time: a learned spectrum, and plain noise."""
    rows = [
        "| shape | weights | seconds | ÷ LU float32 | ÷ LU float64 | ÷ QR float32 | ÷ QR float64 | κ |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    generator = torch.Generator().manual_seed(0)
    run_spectrum([weight((512, 500), generator)])
    for shape in [(2048, 2048), (4096, 4096), (2048, 5632), (5632, 2048), (8192, 2048), (4096, 14336)]:
        for label, spikes in (("learned", 4), ("noise", 0)):
            matrix = weight(shape, generator, spikes)
            runs = {"ours": run_spectrum, "QR float32": run_qr, "QR float64": run_qr64}
            if shape[0] == shape[1]:
                runs |= {"LU float32": run_floor, "LU float64": run_floor64}
            turns: list[dict[str, float]] = []
            kappa = math.nan
            # In turn, and the ratio within a turn: a slow spell of the machine then falls on both, or on few turns.
            for _ in range(repeats):
                seconds = {}
                for name, run in runs.items():
                    start = time.perf_counter()
                    kappa = (run([matrix]) or [kappa])[0]
                    seconds[name] = time.perf_counter() - start
                turns.append(seconds)
            ours = median(turn["ours"] for turn in turns)
            ratios = [
                f"{median(turn['ours'] / turn[name] for turn in turns):.2f}" if name in runs else ""
                for name in ("LU float32", "LU float64", "QR float32", "QR float64")
            ]
            rows.append(f"| {'×'.join(map(str, shape))} | {label} | {ours:.3f} | {' | '.join(ratios)} | {kappa:.3g} |")
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def scaling() -> list[str]:
    """Time and memory against the size of a square matrix, the length of a tall one, and the number of small ones."""
    rows = ["| shape | seconds | peak extra MiB | matrix MiB |", "| --- | ---: | ---: | ---: |"]
    generator = torch.Generator().manual_seed(0)
    shapes = [(n, n) for n in (128, 256, 512, 1024, 2048, 4096)]
    shapes += [(m, 1024) for m in (4096, 16384, 65536)]
    for shape in [*shapes, (1, 128, 128), (16, 128, 128), (256, 128, 128)]:
        matrix = weight(shape, generator)
        m = measure(run_spectrum, [matrix])
        size = matrix.numel() * matrix.itemsize / 2**20
        rows.append(f"| {'×'.join(map(str, shape))} | {m.seconds:.3f} | {m.peak_bytes / 2**20:.0f} | {size:.0f} |")
    return rows


def fingerprints(spikes: int) -> list[str]:
    """What the fingerprints of a profile cost, the first weights of each shape, with one thread as the workers have."""
    rows = ["| case | spectrum, seconds | fingerprint, seconds | share |", "| --- | ---: | ---: | ---: |"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in ("minilm", "tinyllama", "deepseek-moe"):
        tensors = list({tuple(tensor.shape): tensor for tensor in case_weights(name, spikes)}.values())
        turns = []
        for _ in range(3):
            solving = measure(run_spectrum, tensors).seconds
            turns.append((solving, measure(run_fingerprint, tensors).seconds))
        solving, identifying = map(min, zip(*turns, strict=True))
        share = identifying / (solving + identifying)
        rows.append(f"| {name}, one of each shape | {solving:.3f} | {identifying:.4f} | {share:.1%} |")
    torch.set_num_threads(threads)
    return rows


def small(repeats: int) -> list[str]:
    """Models of a few hundred columns with one thread, by the time of the processor: this machine may be shared."""
    rows = [
        "| model | matrices | KappaProfile, CPU seconds | PEFT selector | ratio within a turn, median (range) |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, weights in (("all-MiniLM-L6-v2", minilm_weights()), ("SmolLM2-135M, 5 of 30 layers", smollm2_weights())):
        turns: list[tuple[float, float]] = []
        for run in (run_profile, run_peft):
            warm_up(run, weights)
        for turn in range(repeats):
            seconds = []
            for run in (run_profile, run_peft) if turn % 2 else (run_peft, run_profile):
                start = time.process_time()
                run(weights)
                seconds.append(time.process_time() - start)
            ours, theirs = seconds if turn % 2 else reversed(seconds)
            turns.append((ours, theirs))
        ratios = sorted(theirs / ours for ours, theirs in turns)
        ours, theirs = map(min, zip(*turns, strict=True))
        rows.append(
            f"| {name} | {len(weights)} | {ours:.3f} | {theirs:.3f} | {median(ratios):.2f} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f}) |"
        )
        print(rows[-1], file=sys.stderr, flush=True)
    torch.set_num_threads(threads)
    return rows
