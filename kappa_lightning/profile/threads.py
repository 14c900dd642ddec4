"""Several matrices at a time on a CPU, since a decomposition has too little in it to keep many threads busy."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from kappa_lightning.spectra import Spectrum, full_precision_products, working_bytes
from kappa_lightning.weights import Weight

LIGHT = 256**3
"""Work below this cost is over before another thread has taken it up; in the unit of Weight.cost, 2 ms or so."""

# A little below glibc's DEFAULT_MMAP_THRESHOLD_MAX.
_LARGEST_KEPT = (32 << 20) - (8 << 10)


@dataclass(frozen=True, slots=True)
class Crew:
    """How the threads of a CPU share work: one matrix with all of them scales worse than one matrix for each.

    Attributes:
        workers: how many matrices are worked on at a time.
        threads: how many threads work on each of them.
        serial: weights that one worker would still be busy with when the others have finished, or that are so small
            that handing them over is not worth it; for all threads, one after the other.
        parallel: the others, the expensive ones first.
    """

    workers: int
    threads: int
    serial: tuple[Weight, ...]
    parallel: tuple[Weight, ...]

    @classmethod
    def of(cls, weights: Sequence[Weight], threads: int, memory: int) -> Crew:
        """Choose as many workers as there are threads, or fewer if their matrices would not fit the memory.

        Args:
            weights: what is to be decomposed on the CPU.
            threads: how many there are.
            memory: the bytes that weights in work, and the work on them, may take.
        """
        # A sharded weight is read by all its processes together, so in an order that is the same on each of them.
        heavy = [weight for weight in weights if weight.cost >= LIGHT and not weight.is_sharded]
        # Without the few that are too large, as long as most of the work is left to the workers.
        fitting = [weight for weight in heavy if _bytes_in_work(weight) * (threads + 1) <= memory]
        if 2 * sum(weight.cost for weight in fitting) >= sum(weight.cost for weight in heavy):
            heavy = fitting
        largest = max(map(_bytes_in_work, heavy), default=1)
        # One weight more than there are workers is read ahead.
        workers = min(threads, memory // largest - 1)
        parallel = heavy if workers > 1 else []
        while parallel and _longest(parallel) * workers > sum(weight.cost for weight in parallel):
            parallel = [weight for weight in parallel if _cost_of_one(weight) < _longest(parallel)]
        if sum(weight.stack_shape[0] for weight in parallel) < 2:
            parallel = []
        names = {weight.name for weight in parallel}
        return cls(
            workers=workers if parallel else 1,
            threads=threads // workers if parallel else threads,
            serial=tuple(weight for weight in weights if weight.name not in names),
            parallel=tuple(sorted(parallel, key=lambda weight: (-weight.cost, weight.name))),
        )

    @contextmanager
    def at_work(self) -> Iterator[ThreadPoolExecutor]:
        """A pool of the workers; whatever ends the block, the threads of this process are as they were afterwards.

        What stays is that glibc keeps more freed memory than before, up to 64 MiB for each thread.
        """
        before = torch.get_num_threads()
        # glibc keeps freed memory, instead of giving it back and having it zeroed anew, in blocks up to the largest
        # that was ever freed, at most 32 MiB; untouched, such a block costs nothing. A profile takes a tenth less.
        torch.empty(_LARGEST_KEPT, dtype=torch.uint8, device="cpu")
        # Set once for all: a worker that set and reset it would do so in the middle of another's product.
        with full_precision_products(torch.float32):
            pool = ThreadPoolExecutor(self.workers, "kappa", torch.set_num_threads, (self.threads,))
            try:
                yield pool
            finally:
                try:
                    pool.shutdown(cancel_futures=True)
                finally:
                    # What a worker sets becomes the number of every thread that uses PyTorch for the first time.
                    torch.set_num_threads(before)


@dataclass(slots=True, eq=False)
class Decomposed:
    """A weight whose work is done.

    Attributes:
        weight: the weight.
        tensor: what was read.
        content: its fingerprint.
        parts: the spectra of its matrices, some at a time.
    """

    weight: Weight
    tensor: Tensor
    content: Future[str]
    parts: list[Future[Spectrum]]

    def spectrum(self) -> Spectrum:
        """The spectra of all matrices, or what decomposing one of them raised."""
        spectra = [part.result() for part in self.parts]
        return Spectrum(*(torch.cat([getattr(one, field.name) for one in spectra]) for field in fields(Spectrum)))


def decompose_threaded(
    crew: Crew,
    read: Callable[[Weight], Tensor | None],
    decompose: Callable[[Tensor], Spectrum],
) -> Generator[Decomposed | None, None, None]:
    """Decompose the parallel weights of a crew, in the order in which they are finished.

    This thread reads, one weight ahead of the workers, since reading may need what only one thread can do.

    Args:
        crew: who works on what.
        read: is called in this thread, weight by weight; ``None`` if there is nothing to do for one.
        decompose: (count, rows, cols) → spectrum; is called by the workers.

    Yields:
        Each weight with what was found, ``None`` for one that had nothing to do.
    """
    waiting = iter(crew.parallel)
    running: dict[Future[Any], Decomposed] = {}
    with crew.at_work() as pool:
        while True:
            while _wants_more(running, crew.workers) and (weight := next(waiting, None)) is not None:
                tensor = read(weight)
                if tensor is None:
                    yield None
                    continue
                parts = [pool.submit(decompose, part) for part in _parts(weight, tensor)]
                work = Decomposed(weight, tensor, pool.submit(weight.identifier(tensor)), parts)
                running |= dict.fromkeys([*parts, work.content], work)
                # What stays named here would stay in memory until the next is read.
                del tensor, parts, work
            if not running:
                return
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            # In the order in which they were begun: a set has none.
            for future in [future for future in running if future in finished]:
                done = running.pop(future)
                if not any(other in running for other in (*done.parts, done.content)):
                    yield done
                del done


def _wants_more(running: Mapping[Future[Any], Decomposed], workers: int) -> bool:
    """Whether a worker might soon have nothing to do, and no more weights are in memory than workers."""
    matrices = sum(future is not work.content for future, work in running.items())
    return matrices <= workers and len({id(work) for work in running.values()}) <= workers


def _parts(weight: Weight, tensor: Tensor) -> Sequence[Tensor]:
    """The matrices of a weight one by one, or so many at a time that they are worth handing over."""
    count = weight.stack_shape[0]
    return torch.split(weight.view(tensor), max(1, LIGHT * count // weight.cost))


def _cost_of_one(weight: Weight) -> float:
    return weight.cost / weight.stack_shape[0]


def _longest(weights: Sequence[Weight]) -> float:
    return max(map(_cost_of_one, weights))


def _bytes_in_work(weight: Weight) -> int:
    count, rows, cols = weight.stack_shape
    # What is stored in less than four bytes may be dequantized when it is read.
    return count * rows * cols * max(4, weight.dtype.itemsize) + working_bytes(rows, cols)
