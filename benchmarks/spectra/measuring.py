"""Seconds and peak memory of one competitor."""

import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.spectra.competitors import COMPETITORS, Competitor


@dataclass
class Measurement:
    """Seconds, and the peak of extra bytes."""

    seconds: float
    peak_bytes: int


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def peak_memory(device: torch.device, peak: list[int]) -> Iterator[None]:
    """Append the peak memory above that at entry: of the allocator on CUDA, of the resident set, sampled, on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield
        torch.cuda.synchronize(device)
        peak.append(torch.cuda.max_memory_allocated(device) - before)
        return
    before, highest, stop = resident_bytes(), [0], threading.Event()

    def sample() -> None:
        while not stop.wait(0.005):
            highest[0] = max(highest[0], resident_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield
    finally:
        stop.set()
        sampler.join()
        peak.append(max(0, highest[0] - before))


def measure(run: Competitor, matrices: Sequence[Tensor]) -> Measurement:
    """Time a competitor on some tensors."""
    peak: list[int] = []
    with peak_memory(matrices[0].device, peak):
        start = time.perf_counter()
        run(matrices)
        if matrices[0].is_cuda:
            torch.cuda.synchronize(matrices[0].device)
        seconds = time.perf_counter() - start
    return Measurement(seconds, peak[0])


def warm_up(run: Competitor, tensors: Sequence[Tensor]) -> None:
    """Run on a part of the first tensor, so that what is made once for all is made."""
    run([tensors[0][..., : min(512, tensors[0].shape[-2]), :]])


def peak_of(label: str, tensors: Sequence[Tensor]) -> int:
    """The peak of extra bytes on a CPU, in a process of its own: to no other's does it count what one has freed."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_here, label, [tensor.numpy() for tensor in tensors], torch.get_num_threads()).result()


def _peak_here(label: str, arrays: Sequence[np.ndarray], threads: int) -> int:
    torch.set_num_threads(threads)
    tensors = [torch.from_numpy(array) for array in arrays]
    warm_up(COMPETITORS[label], tensors)
    return measure(COMPETITORS[label], tensors).peak_bytes
