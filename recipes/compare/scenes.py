"""The task of :mod:`recipes.image_text`: MiniLM learns two-digit scenes; what it knew are sentence similarities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.nn import functional

from kappa_lightning import Probe
from recipes.compare.task import LOSS
from recipes.image_text import PAIRS, ImageTextModel, SceneData, packaged_minilm, read_pairs, similarity_probe


class ScenesWithLoss(ImageTextModel):
    """The recipe's model, which also logs the held-out loss."""

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the cross-entropy of the scene among all 100, the mean over the wordings of the question."""
        super().validation_step(batch, batch_idx)
        similarity = torch.einsum("bd,wsd->wbs", self.embed_images(batch["images"]), self._scene_embeddings)
        logits = (similarity * self.log_temperature.exp()).flatten(0, 1)
        self.log(LOSS, functional.cross_entropy(logits, batch["scenes"].repeat(len(self._scene_embeddings))))


class TwoDigitScenes:
    """The task.

    Args:
        text_model: a folder or hub id of the text encoder, by default the MiniLM that comes as a package.
        sts: graded sentence pairs, in STS-B's format or this project's; by default those of this project.
        batch_size: scenes in a batch.
        vision_lr: peak learning rate of the vision encoder, which is new.
    """

    pretrained = ("text.*",)
    new = ("vision.*", "log_temperature")

    def __init__(self, text_model: str = "", sts: str = "", batch_size: str = "64", vision_lr: str = "2e-3") -> None:
        self.text_model = text_model
        self.pairs = read_pairs(Path(sts) if sts else PAIRS)
        self.batch_size = int(batch_size)
        self.vision_lr = float(vision_lr)

    def model(self, seed: int, lr: float, folder: Path) -> ScenesWithLoss:
        """MiniLM beside a new vision encoder."""
        pl.seed_everything(seed, verbose=False)
        return ScenesWithLoss(self.text_model or packaged_minilm(), text_lr=lr, vision_lr=self.vision_lr)

    def data(self, model: pl.LightningModule, seed: int) -> SceneData:
        """Scenes."""
        assert isinstance(model, ImageTextModel)
        return SceneData(model.tokenizer, self.batch_size, seed)

    def probes(self, model: pl.LightningModule, seed: int) -> dict[str, Probe]:
        """The Spearman correlation of sentence similarities with human scores."""
        assert isinstance(model, ImageTextModel)
        return {"sts": similarity_probe(self.pairs, model.tokenizer)}
