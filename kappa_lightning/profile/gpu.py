"""The pipeline of a GPU: tensors whose matrices have one shape go there together, the next while one is worked on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from kappa_lightning.weights import Weight


def loaded(batches: Sequence[list[Weight]], device: torch.device) -> Iterator[tuple[list[Weight], list[Tensor]]]:
    """Each batch with its tensors on a GPU; the next batch is on its way meanwhile."""
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: Future[list[Tensor]] = pool.submit(_copy, batches[0], device, stream)
        for index, batch in enumerate(batches):
            tensors = waiting.result()
            if index + 1 < len(batches):
                waiting = pool.submit(_copy, batches[index + 1], device, stream)
            for tensor in tensors:
                # The allocator must not hand this memory to the copying stream while the arithmetic still reads it.
                tensor.record_stream(torch.cuda.current_stream(device))
            yield batch, tensors


def _copy(batch: Sequence[Weight], device: torch.device, stream: torch.cuda.Stream) -> list[Tensor]:
    with torch.cuda.stream(stream), torch.no_grad():
        tensors = []
        for weight in batch:
            tensor = weight.read()
            # Only pinned memory is copied without holding up the thread that feeds the GPU.
            pinned = tensor if tensor.is_cuda else tensor.contiguous().pin_memory()
            tensors.append(pinned.to(device, non_blocking=True))
        stream.synchronize()
    return tensors
