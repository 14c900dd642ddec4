"""Real processes for the tests: a function runs on several ranks at once, and a deadlock is a failure."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

# A fresh interpreter takes seconds to import PyTorch and Lightning; a fork of one that has them takes none. A fork of
# the test process itself would inherit its OpenMP threads, which do not survive it.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "lightning.pytorch", "kappa_lightning"])


class RankFailed(AssertionError):
    """A rank raised, or did not come to its end; the message has its traceback."""


def on_ranks(
    function: Callable[..., Any],
    *arguments: Any,
    ranks: int = 2,
    timeout: float = 60,
    expect: Sequence[str] = (),
    **options: Any,
) -> list[Any]:
    """Call a function of a test module on every rank, as ``torchrun`` would, and return what each rank returned.

    Args:
        function: is sent by name, so it stands at the top of its module; its result is pickled.
        arguments: the same for all.
        ranks: the number of processes.
        timeout: seconds after which whatever still runs is killed.
        expect: ``"error"`` and ``"killed"`` let a rank end so instead of failing the test, and its text is returned.
        options: keyword arguments for the function.

    Raises:
        RankFailed: if a rank raised, was killed or did not end in time.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    pipes = [_context.Pipe(duplex=False) for _ in range(ranks)]
    processes = [
        _context.Process(
            target=_rank, args=(rank, ranks, port, partial(function, *arguments, **options), sender), daemon=False
        )
        for rank, (_, sender) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for _, sender in pipes:
        sender.close()
    deadline = time.monotonic() + timeout
    outcomes: list[tuple[str, Any]] = []
    for process, (receiver, _) in zip(processes, pipes, strict=True):
        try:
            ready = receiver.poll(max(0.0, deadline - time.monotonic()))
            if ready:
                outcomes.append(pickle.loads(receiver.recv_bytes()))  # noqa: S301 - from our own child
            else:
                outcomes.append(("timeout", "no end in time"))
        except EOFError:
            process.join(5)
            outcomes.append(("killed", f"ended with exit code {process.exitcode}"))
        if outcomes[-1][0] != "returned":
            # Whoever has no error of its own by now waits for one that will not come.
            deadline = min(deadline, time.monotonic() + 3)
    for process, (kind, _) in zip(processes, outcomes, strict=True):
        process.join(0 if kind == "timeout" else 5)
        if process.is_alive():
            process.kill()
            process.join()
    failed = [f"rank {rank}: {text}" for rank, (kind, text) in enumerate(outcomes) if kind not in ("returned", *expect)]
    if failed:
        raise RankFailed("\n".join(failed))
    return [value for _, value in outcomes]


def _rank(rank: int, ranks: int, port: int, function: Callable[[], Any], sender: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="tests",
    )
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        outcome = ("returned", function())
    except BaseException as error:  # noqa: BLE001 - sent to the test, which raises it
        outcome = ("error", "".join(traceback.format_exception(error)))
    # Pickled here, since PyTorch would send a tensor as a handle to memory that goes with this process.
    sender.send_bytes(pickle.dumps(outcome))
    sender.close()
    sys.stdout.flush()
    # Without the goodbyes of the process group, for which a rank that failed would wait.
    os._exit(0)
