"""What do two processes gain? The time of a profile on 1 and on 2 of one thread each, and the bytes DDP reduces.

Run ``python -m benchmarks.strategies``. Each process count is a run of its own, with real processes (gloo, CPU).
"""

import argparse
import os
import socket
import tempfile
import time

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from typing_extensions import override

from kappa_lightning import KappaFreezeCallback

STEPS = 2


class Encoder(pl.LightningModule):
    """A Transformer encoder of BERT-base's width on random features."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)
        for parameter in self.parameters():  # which PyTorch makes as copies of one layer
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        encoded: Tensor = self.encoder(batch)
        return encoded.square().mean()

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Reducing(DDPStrategy):
    """DDP that counts the bytes of the gradients that it reduces."""

    reduced = 0

    @override
    def _register_ddp_hooks(self) -> None:
        assert isinstance(self.model, DistributedDataParallel)
        self.model.register_comm_hook(self, _count_and_reduce)


def _count_and_reduce(strategy: Reducing, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    strategy.reduced += bucket.buffer().nbytes
    return allreduce_hook(None, bucket)  # type: ignore[arg-type] # the default group


class Timed(KappaFreezeCallback):
    """Times the decompositions together with the freeze."""

    seconds = 0.0

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.strategy.barrier()
        begun = time.perf_counter()
        super().on_fit_start(trainer, pl_module)
        self.seconds = time.perf_counter() - begun


def measure(processes: int, layers: int, width: int, freezes: bool) -> tuple[float, float]:
    """Seconds of ``on_fit_start`` on the slowest process, and mebibytes that one process reduces a step."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        arguments = (processes, port, layers, width, freezes, folder)
        spawn(_train, arguments, nprocs=processes)  # type: ignore[no-untyped-call]
        results = [torch.load(f"{folder}/{rank}", weights_only=True) for rank in range(processes)]
    return max(result["seconds"] for result in results), results[0]["reduced"] / STEPS / 2**20


def _train(rank: int, processes: int, port: int, layers: int, width: int, freezes: bool, folder: str) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(processes),
        LOCAL_WORLD_SIZE=str(processes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="benchmark",
    )
    torch.set_num_threads(1)
    strategy, freeze = Reducing(), Timed(top_p=0.2)
    callbacks: list[Callback] = [freeze] if freezes else []
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy=strategy,
        devices=processes,
        max_steps=STEPS,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    features = torch.randn(STEPS * processes, 16, width)
    trainer.fit(Encoder(layers, width), DataLoader(features, batch_size=1))  # type: ignore[arg-type]
    torch.save({"seconds": freeze.seconds, "reduced": strategy.reduced}, f"{folder}/{rank}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="encoder layers, of four matrices each")
    parser.add_argument("--width", type=int, default=768, help="width of the encoder")
    options = parser.parse_args()
    one, _ = measure(1, options.layers, options.width, freezes=True)
    two, reduced = measure(2, options.layers, options.width, freezes=True)
    _, everything = measure(2, options.layers, options.width, freezes=False)
    print("\n| | 1 process | 2 processes | ratio |\n| --- | ---: | ---: | ---: |")
    print(f"| profile and freeze, seconds | {one:.1f} | {two:.1f} | {one / two:.2f} |")
    print("\n| | all train | top_p=0.2 | ratio |\n| --- | ---: | ---: | ---: |")
    print(f"| gradients reduced a step, MiB | {everything:.1f} | {reduced:.1f} | {everything / reduced:.2f} |")


if __name__ == "__main__":
    main()
