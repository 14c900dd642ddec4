"""One training script that every strategy runs unchanged, on data that two processes see as one does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from tiny import Recording, make_trainer, snapshot, trainable
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from torchmetrics import MeanMetric

from kappa_lightning import AccuracyProbe, ForgettingEval, KappaFreezeCallback, KappaMonitor, Probe, SimilarityProbe
from kappa_lightning.weights.sharded import whole

SAMPLES = 24
STRATEGIES = {
    "one": (1, lambda: "auto"),
    "ddp": (2, lambda: "ddp"),
    "fsdp2": (2, lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)),
    "tp": (2, lambda: ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)),
    "fsdp2+tp": (4, lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=2)),
}
"""For each name the number of processes and a function that makes the Trainer's strategy."""


class Net(Recording):
    """Embedding → Linear → Linear → Linear on 3 tokens of 12, into 4 classes; nothing depends on the batch size."""

    MATRICES = ("embed.weight", "up.weight", "down.weight", "head.weight")

    def __init__(self, configure: Callable[[nn.Module], Any] | None = None) -> None:
        super().__init__(configure or (lambda module: torch.optim.Adam(module.parameters(), lr=0.02)))
        torch.manual_seed(3)
        self.embed = nn.Embedding(12, 6)
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)
        self.head = nn.Linear(6, 4)
        self.double()

    def configure_model(self) -> None:
        mesh = self.device_mesh
        if mesh is None or getattr(self, "is_split", False):
            return
        self.is_split = True
        if mesh["tensor_parallel"].size() > 1:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(self, mesh["tensor_parallel"], plan)
        if mesh["data_parallel"].size() > 1:
            for layer in (self.embed, self.up, self.down):
                fully_shard(layer, mesh=mesh["data_parallel"])
            fully_shard(self, mesh=mesh["data_parallel"])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.features(tokens))

    def features(self, tokens: Tensor) -> Tensor:
        return self.down(self.up(self.embed(tokens).mean(-2)).tanh())

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of 8 samples in one process, and the same ones dealt to several; Lightning's own would shuffle."""
        shares = getattr(self.trainer.strategy, "distributed_sampler_kwargs", {"num_replicas": 1, "rank": 0})
        sampler = DistributedSampler(data(), shuffle=False, **shares)
        return DataLoader(data(), batch_size=8 // shares["num_replicas"], sampler=sampler)

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


def data() -> TensorDataset:
    numbers = torch.Generator().manual_seed(5)
    return TensorDataset(
        torch.randint(12, (SAMPLES, 3), generator=numbers), torch.randint(4, (SAMPLES,), generator=numbers)
    )


def probes() -> dict[str, Probe]:
    """Probes whose 23 samples no number of batches divides, of a sum and of a list of samples as a state."""
    tokens, labels = data()[: SAMPLES - 1]
    accuracy = DataLoader(TensorDataset(tokens, labels), batch_size=5)
    scores = torch.arange(11.0)
    pairs = [(tokens[i : i + 4], tokens[11 + i : 15 + i], scores[i : i + 4]) for i in range(0, 8, 4)]
    return {
        "classes": AccuracyProbe(accuracy, chance=None),
        "loss": Probe(accuracy, Mean(), lambda module, batch: module.loss(batch)),
        "pairs": SimilarityProbe([*pairs, (tokens[8:11], tokens[19:22], scores[8:11])], lambda module, x: module(x)),
    }


class Mean(MeanMetric):
    """The mean over batches, so that a batch that counts twice or not at all shows."""

    higher_is_better = False


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The state of each parameter by name, whole."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        names[id(parameter)]: {key: whole(value).clone() for key, value in optimizer.state[parameter].items()}
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def adapt(
    name: str,
    root: Path,
    *callbacks: Callback,
    module: Net | None = None,
    ckpt_path: Any = None,
    strategy: Strategy | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train for two epochs with the three callbacks under the strategy of that name, and tell all that came out."""
    processes, make = STRATEGIES[name]
    freeze, monitor, forgetting = (
        KappaFreezeCallback(num_tensors=2, exclude=()),
        KappaMonitor(),
        ForgettingEval(probes()),
    )
    module = module or Net()
    trainer = make_trainer(
        root,
        freeze,
        monitor,
        forgetting,
        *callbacks,
        strategy=strategy or make(),
        devices=processes,
        use_distributed_sampler=False,
        **{"max_epochs": 2, **options},
    )
    before = snapshot(Net())
    trainer.fit(module, ckpt_path=ckpt_path)
    after = {key: whole(tensor).clone() for key, tensor in module.named_parameters()}
    return {
        "trained": freeze.trained_names,
        "frozen": freeze.frozen_names,
        "profile": freeze.profile.to_dict(),
        "moved": sorted(key for key in after if not torch.equal(after[key].detach(), before[key])),
        "requires_grad": trainable(module),
        "kappa": monitor.history,
        "retention": forgetting.history,
        "weights": {key: tensor.detach() for key, tensor in after.items()},
        "steps": trainer.global_step,
        "optimizer": optimizer_state(module, trainer.optimizers[0]),
    }
