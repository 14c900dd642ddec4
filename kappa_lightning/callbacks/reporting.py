"""Figures and texts to the Trainer's loggers, and figures to the callbacks that monitor them."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from kappa_lightning.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LAYOUTS: WeakKeyDictionary[Logger, dict[str, dict[str, list[Any]]]] = WeakKeyDictionary()


def log_scalars(trainer: pl.Trainer, scalars: Mapping[str, float], *, shown: Mapping[str, float] | None = None) -> None:
    """Write scalars to every logger at the global step, and show them to ``ModelCheckpoint`` and ``EarlyStopping``.

    ``LightningModule.log`` would write at the number of batches and only in some hooks; here the step is the
    optimizer's, in every hook.

    Args:
        trainer: has the loggers.
        scalars: by tag.
        shown: what goes to loggers that show a card for every tag, in place of ``scalars``; a CSV file keeps all.
    """
    publish(trainer, scalars)
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        written = scalars if shown is None or isinstance(logger, CSVLogger) else shown
        # Lightning adds the epoch to whatever it logs; a table of figures is joined by it.
        logger.log_metrics({**written, "epoch": trainer.current_epoch}, step=trainer.global_step)
        logger.save()


def publish(trainer: pl.Trainer, scalars: Mapping[str, float]) -> None:
    """Show scalars to the callbacks that monitor a metric, without logging them."""
    tensors = {key: torch.tensor(value) for key, value in scalars.items()}
    # Both properties return the Trainer's own dictionaries, to which Lightning adds and from which it removes nothing
    # until the next run.
    trainer.callback_metrics.update(tensors)
    trainer.logged_metrics.update(tensors)


def log_text(trainer: pl.Trainer, tag: str, markdown: str) -> None:
    """Write a text to every logger that takes texts: TensorBoard, W&B, MLflow and Comet."""
    for logger in _with_media(trainer):
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(tag, markdown, trainer.global_step)
        elif isinstance(logger, WandbLogger):
            logger.log_text(key=tag, columns=["text"], data=[[markdown]], step=trainer.global_step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_text(logger.run_id, markdown, _artifact(trainer, tag, "md"))
        elif isinstance(logger, CometLogger):
            logger.experiment.log_text(markdown, step=trainer.global_step, metadata={"tag": tag})


def log_figure(trainer: pl.Trainer, tag: str, figure: Figure) -> None:
    """Write a picture to every logger that takes pictures: TensorBoard, W&B, MLflow and Comet."""
    for logger in _with_media(trainer):
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(tag, figure, trainer.global_step, close=False)
        elif isinstance(logger, WandbLogger):
            logger.log_image(key=tag, images=[_image(figure)], step=trainer.global_step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_figure(logger.run_id, figure, _artifact(trainer, tag, "png"))
        elif isinstance(logger, CometLogger):
            logger.experiment.log_figure(tag, figure, step=trainer.global_step)


def shows_pictures(trainer: pl.Trainer) -> bool:
    """Whether any of the Trainer's loggers takes pictures, so that one is worth drawing."""
    return any(True for _ in _with_media(trainer))


def log_layout(trainer: pl.Trainer, category: str, charts: Mapping[str, list[Any]]) -> None:
    """Group tags into charts on TensorBoard's page of custom scalars; the callbacks' categories stand side by side.

    Args:
        trainer: has the loggers.
        category: the heading.
        charts: by title ``["Multiline", tags]``, or ``["Margin", [tag, lower, upper]]``.
    """
    # TensorBoard takes the tags of lines, not those of margins, for regular expressions that may match anywhere.
    charts = {
        title: [kind, [f"^{re.escape(tag)}$" for tag in tags] if kind == "Multiline" else tags]
        for title, (kind, tags) in charts.items()
    }
    for logger in _with_media(trainer):
        if isinstance(logger, TensorBoardLogger):
            layout = _LAYOUTS.setdefault(logger, {})
            layout[category] = {**layout.get(category, {}), **charts}
            # One layout holds for a run: the last that is written.
            logger.experiment.add_custom_scalars(layout)


def save_figure(trainer: pl.Trainer, name: str, figure: Figure) -> Path | None:
    """Write a picture as PNG into the folder of the Trainer's logger, if there is one; on rank zero only."""
    folder = trainer.logger.log_dir if trainer.is_global_zero and trainer.logger is not None else None
    if not isinstance(folder, str) or not Path(folder).is_dir():
        return None
    path = Path(folder, f"{name}.png")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    return path


def has_folder(trainer: pl.Trainer) -> bool:
    """Whether the Trainer's logger writes into a folder of its own."""
    return trainer.logger is not None and isinstance(trainer.logger.log_dir, str)


def _with_media(trainer: pl.Trainer) -> Iterator[Logger]:
    kinds = (TensorBoardLogger, WandbLogger, MLFlowLogger, CometLogger)
    if trainer.is_global_zero:
        yield from (logger for logger in trainer.loggers if isinstance(logger, kinds))


def _artifact(trainer: pl.Trainer, tag: str, ending: str) -> str:
    return f"{tag}/step={trainer.global_step}.{ending}"


def _image(figure: Figure) -> Any:
    # W&B takes PIL's images; Matplotlib depends on it.
    from PIL import Image

    content = io.BytesIO()
    figure.savefig(content, format="png")
    content.seek(0)
    image = Image.open(content)
    image.load()
    return image
