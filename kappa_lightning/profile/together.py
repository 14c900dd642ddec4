"""Several matrices at a time on a CPU, since a decomposition has too little in it to keep many threads busy."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from kappa_lightning.spectra import Spectrum, full_precision_products, working_bytes
from kappa_lightning.weights import Weight

# Work below this cost is over before another thread has taken it up; in the unit of Weight.cost, 2 ms or so.
_LIGHT = 256**3
# A little below glibc's DEFAULT_MMAP_THRESHOLD_MAX.
_LARGEST_KEPT = (32 << 20) - (8 << 10)


@dataclass(frozen=True, slots=True)
class Crew:
    """How the threads of a CPU share work: one matrix with all of them scales worse than one matrix for each.

    Attributes:
        workers: how many matrices are worked on at a time.
        threads: how many threads work on each of them.
        alone: weights that one worker would still be busy with when the others have finished, or that are so small
            that handing them over is not worth it; for all threads, one after the other.
        shared: the others, the expensive ones first.
    """

    workers: int
    threads: int
    alone: tuple[Weight, ...]
    shared: tuple[Weight, ...]

    @classmethod
    def of(cls, weights: Sequence[Weight], threads: int, memory: int) -> Crew:
        """Choose as many workers as there are threads, or fewer if their matrices would not fit the memory.

        Args:
            weights: what is to be decomposed on the CPU.
            threads: how many there are.
            memory: the bytes that weights in work, and the work on them, may take.
        """
        heavy = [weight for weight in weights if weight.cost >= _LIGHT]
        largest = max(map(_bytes_in_work, heavy), default=1)
        # One weight more than there are workers is read ahead.
        workers = min(threads, memory // largest - 1)
        share = sum(weight.cost for weight in heavy) / max(workers, 1)
        shared = [weight for weight in heavy if weight.cost / weight.stack_shape[0] <= share] if workers > 1 else []
        if sum(weight.stack_shape[0] for weight in shared) < 2:
            shared = []
        names = {weight.name for weight in shared}
        return cls(
            workers=workers if shared else 1,
            threads=threads // workers if shared else threads,
            alone=tuple(weight for weight in weights if weight.name not in names),
            shared=tuple(sorted(shared, key=lambda weight: (-weight.cost, weight.name))),
        )

    @contextmanager
    def at_work(self) -> Iterator[ThreadPoolExecutor]:
        """A pool of the workers; whatever ends the block, the threads of this process are as they were afterwards."""
        before = torch.get_num_threads()
        # glibc keeps freed memory, instead of giving it back and having it zeroed anew, in blocks up to the largest
        # that was ever freed, at most 32 MiB; untouched, such a block costs nothing. A profile takes a tenth less.
        torch.empty(_LARGEST_KEPT, dtype=torch.uint8)
        # Set once for all: a worker that set and reset it would do so in the middle of another's product.
        with full_precision_products(torch.float32):
            pool = ThreadPoolExecutor(self.workers, "kappa", torch.set_num_threads, (self.threads,))
            try:
                yield pool
            finally:
                pool.shutdown(cancel_futures=True)
                # Setting the threads of a worker changes those of MKL for the whole process.
                torch.set_num_threads(before)


@dataclass(slots=True, eq=False)
class _InWork:
    weight: Weight
    tensor: Tensor
    content: str
    parts: list[Future[Spectrum]]


Start = Callable[[Weight], tuple[Tensor, str] | None]
"""Reads a weight: the tensor and its fingerprint, or ``None`` if its row is known already."""


def decompose_together(
    crew: Crew, start: Start, decompose: Callable[[Tensor], Spectrum]
) -> Generator[tuple[Weight, Tensor, str, Callable[[], Spectrum]], None, None]:
    """Decompose the shared weights of a crew, in the order in which they are finished.

    This thread reads, one weight ahead of the workers, since reading may need what only one thread can do.

    Args:
        crew: who works on what.
        start: is called in this thread, weight by weight.
        decompose: (count, rows, cols) → spectrum; is called by the workers.

    Yields:
        Each weight with its tensor, its fingerprint and what gives its spectrum, or raises what decomposing it raised.
    """
    waiting = iter(crew.shared)
    running: dict[Future[Spectrum], _InWork] = {}
    with crew.at_work() as pool:
        while True:
            while len(running) <= crew.workers and (weight := next(waiting, None)) is not None:
                read = start(weight)
                if read is not None:
                    parts = [pool.submit(decompose, part) for part in _parts(weight, read[0])]
                    running |= dict.fromkeys(parts, _InWork(weight, *read, parts))
            if not running:
                return
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            # In the order in which they were begun: a set has none.
            for part in [part for part in running if part in finished]:
                work = running.pop(part)
                if not any(other in running for other in work.parts):
                    yield work.weight, work.tensor, work.content, partial(_joined, work.parts)
                del work


def _parts(weight: Weight, tensor: Tensor) -> Sequence[Tensor]:
    """The matrices of a weight one by one, or so many at a time that they are worth handing over."""
    count = weight.stack_shape[0]
    return torch.split(weight.view(tensor), max(1, _LIGHT * count // weight.cost))


def _joined(parts: Sequence[Future[Spectrum]]) -> Spectrum:
    spectra = [part.result() for part in parts]
    return Spectrum(*(torch.cat([getattr(one, field.name) for one in spectra]) for field in fields(Spectrum)))


def _bytes_in_work(weight: Weight) -> int:
    count, rows, cols = weight.stack_shape
    # What is stored in less than four bytes may be dequantised when it is read.
    return count * rows * cols * max(4, weight.dtype.itemsize) + working_bytes(rows, cols)
