"""From weights to rows: tensors of one shape together on a GPU, a matrix for each thread on a CPU."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from kappa_lightning.profile.batches import batches_of_one_shape, working_bytes_of
from kappa_lightning.profile.gpu import loaded
from kappa_lightning.profile.journal import Journal
from kappa_lightning.profile.row import KappaRow
from kappa_lightning.profile.settings import EXPERTS, ProfileSettings
from kappa_lightning.profile.threads import LIGHT, Crew, decompose_threaded
from kappa_lightning.spectra import Spectrum, free_memory, spectrum
from kappa_lightning.weights import Weight

# What is counted for the smallest weights, so that an interruption costs no more than a hundred of their rows.
_SMALLEST_COST = LIGHT // 128
# Fewer tensors of one shape than this take no time that could be saved.
_WORTH_BATCHING = 16

Decompose = Callable[[Tensor], Spectrum]


def compute_rows(
    weights: Sequence[Weight],
    settings: ProfileSettings | None = None,
    *,
    device: torch.device | str | None = None,
    journal: Journal | None = None,
    neighbors: int = 1,
) -> Generator[KappaRow, None, None]:
    """Decompose weights, a batch at a time; the rows come in the order in which they are finished.

    On a GPU, tensors whose matrices have one shape go through together, as many as fit the memory budget,
    while a thread reads the next batch and copies it there. On a CPU, as many matrices as there are threads are worked
    on at a time, one thread each, within the memory budget; what does not fit goes one tensor after the other, in the
    memory of the largest, with all threads; small ones of one shape, if they are
    many, go together. Which of these it was can change κ by
    rounding, as the number of threads can. PyTorch's number of threads is put back afterwards.

    Args:
        weights: what is decomposed.
        settings: how.
        device: where; by default where each weight is.
        journal: keeps finished rows, and knows those of an interrupted pass.
        neighbors: how many processes share the memory of this machine, if they do the same now: by default each takes
            its part of the quarter on a CPU.

    Raises:
        ValueError: if a weight has NaN or infinite entries; the message names it.
    """
    if not weights:
        return
    settings = settings or ProfileSettings()
    target = _common_device(weights) if device is None else torch.device(device)
    memory = settings.memory_budget
    if target is not None and target.type == "cuda":
        # For the tensors in work, and as much again for the work on them.
        memory = free_memory(target) // 4 if memory is None else max(1, memory // 2)
    elif target is not None and memory is None:
        memory = max(1, free_memory(target) // 4 // neighbors)
    decompose = partial(spectrum, solver=settings.solver, rtol=settings.rtol, memory_budget=memory)
    finish = partial(_finish, decompose=decompose, experts=settings.combine, journal=journal)
    if target is not None and target.type == "cpu" and memory is not None:
        crew = Crew.of(weights, torch.get_num_threads(), memory)
        if crew.parallel:
            share = partial(decompose, memory_budget=max(1, memory // crew.workers))
            yield from _finish_threaded(crew, target, decompose=share, experts=settings.combine, journal=journal)
        weights = crew.serial
    for batch, tensors in _batches(weights, target, memory):
        yield from finish(batch, tensors)
        # Let go before the next batch is read, or two would be in memory.
        del tensors


def _finish(
    batch: Sequence[Weight],
    tensors: Sequence[Tensor],
    *,
    decompose: Decompose,
    experts: str,
    journal: Journal | None,
) -> Iterator[KappaRow]:
    """The rows of a batch, from the journal where it has them."""
    pending = []
    for weight, tensor in zip(batch, tensors, strict=True):
        content = weight.identifier(tensor)()
        known = journal.find(weight.name, content) if journal is not None else None
        if known is not None:
            yield known
        else:
            pending.append((weight, tensor, content))
    if not pending:
        return
    views = [weight.view(tensor) for weight, tensor, _ in pending]
    with _naming_what_is_not_finite([(weight, tensor) for weight, tensor, _ in pending]):
        spectra = decompose(views[0] if len(views) == 1 else torch.cat(views))
    start = 0
    for (weight, _, content), view in zip(pending, views, strict=True):
        row = _row(weight, spectra[start : start + len(view)], content, experts)
        if journal is not None:
            journal.append(row)
        yield row
        start += len(view)


def _finish_threaded(
    crew: Crew, device: torch.device, *, decompose: Decompose, experts: str, journal: Journal | None
) -> Iterator[KappaRow]:
    """The rows of a crew's parallel weights, from the journal where it has them."""
    known: list[KappaRow] = []

    def read(weight: Weight) -> Tensor | None:
        tensor = weight.read().to(device)
        if journal is not None and weight.name in journal:
            row = journal.find(weight.name, weight.identifier(tensor)())
            if row is not None:
                known.append(row)
                return None
        return tensor

    together = decompose_threaded(crew, read, decompose)
    # Closed at once, whatever ends this: until then the workers run, and the threads are not put back.
    with contextlib.closing(together):
        for done in together:
            if done is None:
                yield known.pop()
                continue
            with _naming_what_is_not_finite([(done.weight, done.tensor)]):
                row = _row(done.weight, done.spectrum(), done.content.result(), experts)
            del done
            if journal is not None:
                journal.append(row)
            yield row


@contextlib.contextmanager
def _naming_what_is_not_finite(pending: Sequence[tuple[Weight, Tensor]]) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        for weight, tensor in pending:
            if not tensor.isfinite().all():
                raise ValueError(
                    f"{weight.name} has entries that are NaN or infinite, so it has no condition number: load the "
                    "weights again, or exclude it"
                ) from error
        raise


def _row(weight: Weight, spectra: Spectrum, content: str, experts: str) -> KappaRow:
    kappas = tuple(spectra.kappa.tolist())
    _, rows, cols = weight.stack_shape
    return KappaRow(
        name=weight.name,
        shape=weight.shape,
        kappa=float(EXPERTS[experts](kappas)),
        sigma_max=float(spectra.sigma_max.max()),
        sigma_min=float(spectra.sigma_min.min()),
        log_volume=float(spectra.log_volume.sum()),
        frobenius_norm=float(torch.linalg.vector_norm(spectra.frobenius_norm)),
        rtol=float(spectra.rtol.max()),
        kappas=kappas if weight.is_stack else None,
        sigma_maxs=tuple(spectra.sigma_max.tolist()) if weight.is_stack else None,
        log_volumes=tuple(spectra.log_volume.tolist()) if weight.is_stack else None,
        frobenius_norms=tuple(spectra.frobenius_norm.tolist()) if weight.is_stack else None,
        matrix_shape=(rows, cols),
        experts=experts,
        dtype=str(weight.dtype).removeprefix("torch."),
        fingerprint=content,
        layout=weight.layout,
    )


def _batches(
    weights: Sequence[Weight], device: torch.device | None, budget: int | None
) -> Iterator[tuple[list[Weight], list[Tensor]]]:
    """Weights with their tensors on the device, several of one shape: as many as fit a GPU, else small ones."""
    if device is not None and device.type == "cuda" and budget is not None:
        yield from loaded(batches_of_one_shape(weights, budget, working_bytes_of), device)
        return
    alike = Counter(weight.stack_shape for weight in weights)

    def size(weight: Weight) -> int:
        return max(weight.cost, _SMALLEST_COST) if alike[weight.stack_shape] >= _WORTH_BATCHING else LIGHT

    for batch in batches_of_one_shape(weights, LIGHT, size):
        yield batch, [weight.read() if device is None else weight.read().to(device) for weight in batch]


def _common_device(weights: Sequence[Weight]) -> torch.device | None:
    devices = {weight.parameter.device for weight in weights if weight.parameter is not None}
    return devices.pop() if len(devices) == 1 else None
