"""The processes that work on one model together: what each hears from the others, and how they fail together."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import torch.distributed

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Processes:
    """The default process group, seen from this process; without one, this process alone.

    Every method is collective: all processes call it, in the same order. What is exchanged is small (names, numbers,
    rows of a profile) and is pickled by ``torch.distributed`` between processes of one run, never from a file.

    Attributes:
        rank: the number of this process, from 0.
        world_size: how many there are.

    Example:
        >>> alone = Processes()
        >>> alone.gather("a"), alone.broadcast("b")
        (['a'], 'b')
    """

    rank: int = 0
    world_size: int = 1

    @classmethod
    def of_this_run(cls) -> Processes:
        """All processes of the default group, if there is one."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())
        return cls()

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Value | None] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def local_world_size(self) -> int:
        """How many of the processes run on the machine of this one, itself included."""
        if self.world_size == 1:
            return 1
        name = socket.gethostname()
        return self.gather(name).count(name)

    def broadcast(self, value: Value) -> Value:
        """The value of rank 0."""
        if self.world_size == 1:
            return value
        box: list[Value] = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def failing_together(self) -> FailingTogether:
        """A context in which an error of one process becomes an error of all, instead of a wait for it.

        Inside it no process may wait for another: the one that failed would not come.
        """
        return FailingTogether(self)


class FailingTogether:
    """See :meth:`Processes.failing_together`."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Ctrl+C and an exit do not wait for the others, who may be long in coming.
        if self.processes.world_size == 1 or (error is not None and not isinstance(error, Exception)):
            return
        messages = self.processes.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is None:
            failed = [(rank, message) for rank, message in enumerate(messages) if message is not None]
            if failed:
                rank, message = failed[0]
                raise RuntimeError(f"the process of rank {rank} failed, so this one stops, too: {message}")
