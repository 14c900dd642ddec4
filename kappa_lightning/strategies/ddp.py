"""Data parallel: every process holds the whole module, and gradients are averaged while they are computed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import lightning.pytorch as pl
import torch
import torch.distributed
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from kappa_lightning.evaluation import Share
from kappa_lightning.processes import Processes
from kappa_lightning.strategies.adapter import StrategyAdapter
from kappa_lightning.strategies.buffers import those_of_the_first


class DDPAdapter(StrategyAdapter):
    """:class:`~lightning.pytorch.strategies.DDPStrategy`, with its spawn, fork and notebook forms."""

    @override
    def processes(self, trainer: pl.Trainer) -> Processes:
        return Processes.of_this_run()

    @override
    def evaluating(self, module: pl.LightningModule) -> AbstractContextManager[None]:
        return those_of_the_first(module)

    @override
    def share(self, trainer: pl.Trainer) -> Share:
        processes = self.processes(trainer)
        return Share(processes.rank, processes.world_size)

    @property
    @override
    def averages_in_backward(self) -> bool:
        return False  # the wrapper does, around its own forward

    @override
    def average_gradients(self, trainer: pl.Trainer, parameters: Sequence[nn.Parameter]) -> None:
        if not parameters:
            return
        # A parameter that only some processes used, such as an expert's, counts as zero on the others.
        used = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
        used = used.to(trainer.strategy.root_device)
        torch.distributed.all_reduce(used, torch.distributed.ReduceOp.MAX)
        processes = self.processes(trainer).world_size
        waiting = []
        for parameter, is_used in zip(parameters, used.tolist(), strict=True):
            if is_used:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                waiting.append(torch.distributed.all_reduce(parameter.grad, async_op=True))
        for work in waiting:
            work.wait()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if gradients:
            torch._foreach_div_(gradients, processes)

    @override
    def requires_grad_changed(self, trainer: pl.Trainer) -> None:
        """Wrap the module anew: DDP decides when it is made which gradients it waits for and reduces."""
        strategy = trainer.strategy
        assert isinstance(strategy, DDPStrategy)
        if not isinstance(strategy.model, DistributedDataParallel):
            return  # after the fit
        # The old wrapper goes first, and its buckets, as large as all gradients, with it.
        strategy.model = trainer.lightning_module
        strategy.configure_ddp()
        # With a static graph and manual optimization the first backward pass is special, and the wrapper is new.
        strategy._pl_static_graph_delay_done = False
