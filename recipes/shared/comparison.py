"""Full fine-tuning, KappaTune, LoRA and both together on one task, and the table of what each learned and kept."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kappa_lightning import ForgettingEval, KappaFreezeCallback, KappaMonitor, PretrainedAnchor, Probe, WalkBack
from recipes.shared.epochs import EpochLines, Point, draws_bars
from recipes.shared.memory import PeakMemory
from recipes.shared.module import GenerativeModule
from recipes.shared.towers import Towers, parts_of

METHODS = ("full", "kappa", "kappa-experts", "lora", "kappa-lora")
"""``kappa-experts`` is for mixtures of experts: single experts of low κ train, and nothing else of the towers."""

FOR_ALL = ("full", "kappa", "lora", "kappa-lora")
FOR_EXPERTS = ("full", "kappa", "kappa-experts", "lora")
"""What is compared if nothing is chosen; adapters on single experts are not to be had."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the methods of a comparison have in common.

    Attributes:
        model: hub id or folder.
        images: whether the model sees.
        towers: what may train beside the projector.
        max_params: the share of the towers' matrices that the low-κ ones make up, for ``kappa`` and ``kappa-lora``.
        lr: peak learning rate of weights.
        lora_lr: peak learning rate of adapters.
        lora_rank: rank of the adapters.
        epochs: evaluations come after each.
        batch_size: samples in a batch.
        accumulate: batches whose gradients make one optimizer step.
        clip: the norm that gradients are clipped to; not if ``None``.
        steps_per_epoch: optimizer steps in an epoch; ``None`` for all data.
        max_new_tokens: length of a generated answer.
        seed: of adapters and order.
        dtype: of the weights.
        gradient_checkpointing: recompute activations instead of keeping them.
        accelerator: as the Trainer takes it.
        precision: as the Trainer takes it.
        log_dir: of TensorBoard, one folder a method.
        anchor: the strength with which the outputs are held where they were; not at all if ``None``.
        walk_back: the retention that the weights go back to after training; not at all if ``None``.
    """

    model: str
    images: bool
    towers: Towers
    max_params: float
    lr: float
    lora_lr: float
    lora_rank: int
    epochs: int
    batch_size: int
    accumulate: int
    clip: float | None
    steps_per_epoch: int | None
    max_new_tokens: int
    seed: int
    dtype: str
    gradient_checkpointing: bool
    accelerator: str
    precision: Any
    log_dir: Path
    anchor: float | None = None
    walk_back: float | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """A row of the table.

    Attributes:
        method: what was run.
        exact_match: the share of held-out prompts that are answered right to the letter.
        loss: mean negative log-likelihood of the held-out answers' tokens, in nats.
        retention: of each probe, by its name; after walking back, on the half of its batches that did not choose.
        trainable: number of parameters that train.
        memory: peak in bytes, as :class:`~recipes.shared.memory.PeakMemory` measures it.
        seconds: from fit start to fit end, evaluations included.
        points: what was learned (the share of answers right to the letter) and kept after each epoch.
    """

    method: str
    exact_match: float
    loss: float
    retention: dict[str, float]
    trainable: int
    memory: int
    seconds: float
    points: list[Point]


def run(
    method: str, settings: Settings, data: pl.LightningDataModule, probes: Callable[[], Mapping[str, Probe]]
) -> Result:
    """Adapt the model with one method, and measure what it learned and what it kept."""
    # A trainer and its module refer to each other, so the last method's are still there.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    pl.seed_everything(settings.seed, verbose=False)
    module = GenerativeModule(
        settings.model,
        images=settings.images,
        towers=settings.towers,
        lr=settings.lr,
        lora_rank=settings.lora_rank if method in ("lora", "kappa-lora") else 0,
        lora_max_params=settings.max_params if method == "kappa-lora" else None,
        lora_lr=settings.lora_lr,
        max_new_tokens=settings.max_new_tokens,
        dtype=settings.dtype,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    forgetting, memory = ForgettingEval(probes()), PeakMemory()
    lines = EpochLines(method, "val/exact_match")
    callbacks: list[pl.Callback] = [KappaMonitor(), forgetting, memory, lines]
    if settings.anchor is not None:
        # Text of the model's own where it can write, and with images the task's own batches.
        callbacks.append(PretrainedAnchor(strength=settings.anchor, task_inputs="inputs", num_tokens=32))
    walk_back = None
    if settings.walk_back is not None:
        walk_back = WalkBack(settings.walk_back, monitor="val/loss", points=6, save=False)
        callbacks.append(walk_back)
    if method == "kappa":
        callbacks.insert(0, low_kappa(module, settings.max_params))
    if method == "kappa-experts":
        callbacks.insert(0, low_kappa_experts(settings.max_params))
    trainer = pl.Trainer(
        callbacks=callbacks,
        logger=TensorBoardLogger(settings.log_dir, name=method),
        max_epochs=settings.epochs,
        limit_train_batches=settings.steps_per_epoch and settings.steps_per_epoch * settings.accumulate,
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=settings.clip,
        accelerator=settings.accelerator,
        devices=1,
        precision=settings.precision,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=draws_bars(),
        num_sanity_val_steps=0,
        log_every_n_steps=10,
    )
    started = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - started
    retention = {name: forgetting.history[-1][f"forgetting/{name}/retention"] for name in forgetting.probes}
    if walk_back is not None:
        retention = walk_back.report["chosen"]
    # Single experts that trained are one with their tensors again, and only the optimizer still has them.
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return Result(
        method=method,
        exact_match=float(trainer.callback_metrics["val/exact_match"]),
        loss=float(trainer.callback_metrics["val/loss"]),
        retention=retention,
        trainable=sum(p.numel() for group in groups for p in group["params"] if p.requires_grad),
        memory=memory.bytes,
        seconds=seconds,
        points=lines.points,
    )


def low_kappa(module: GenerativeModule, max_params: float) -> KappaFreezeCallback:
    """Train the matrices of lowest κ within the towers, and the projector in any case."""
    projector = [f"model.{name}" for name, part in parts_of(module.model).items() if part == "projector"]
    return KappaFreezeCallback(max_params=max_params, exclude=(), always_train=projector)


def low_kappa_experts(share: float) -> KappaFreezeCallback:
    """Train the single experts of lowest κ, by tensor: an expert's gate and up projection, or its down projection."""
    return KappaFreezeCallback(top_p=share, include=["@experts"], experts="each")


def show(results: Sequence[Result], headers: Mapping[str, str], title: str, console: Console) -> None:
    """Print the table.

    Args:
        results: its rows.
        headers: for each probe, the header of its column.
        title: what was learned.
        console: where to.
    """
    names = ", ".join(header.replace("-\n", "").replace("\n", " ") for header in headers.values())
    caption = f"test nats: loss a token; {names}: retention, of which 1 means that nothing is lost"
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("method", no_wrap=True)
    table.add_column("exact\nmatch", justify="right")
    for header in ("test\nnats", *headers.values(), "trainable\nparameters", "peak\nMB", "seconds"):
        table.add_column(header, justify="right")
    for result in results:
        table.add_row(
            result.method,
            f"{result.exact_match:.3f}",
            f"{result.loss:.3f}",
            *(f"{result.retention[name]:.3f}" for name in headers),
            f"{result.trainable / 1e6:,.3g} M",
            f"{result.memory / 1e6:,.0f}",
            f"{result.seconds:.0f}",
        )
    console.print(table)


def towers_choices() -> tuple[str, ...]:
    """The values of ``--towers``."""
    return get_args(Towers)
