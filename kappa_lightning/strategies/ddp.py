"""Data parallel: every process holds the whole module, and gradients are averaged while they are computed."""

from __future__ import annotations

from contextlib import AbstractContextManager

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
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
