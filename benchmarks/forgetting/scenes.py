"""The task of :mod:`recipes.image_text`: MiniLM learns two-digit scenes; what it knew are sentence similarities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.nn import functional

from benchmarks.forgetting.task import LOSS
from kappa_lightning import Probe
from recipes.image_text import (
    PAIRS,
    WORDINGS,
    ImageTextModel,
    SceneData,
    packaged_minilm,
    read_pairs,
    similarity_probe,
)

SHORT = ("{left} left of {right}", "{left} before {right}", "{left} then {right}", "{left} and {right}")
"""Wordings of a third of the tokens, in all of which the left digit comes first."""


class ScenesWithLoss(ImageTextModel):
    """The recipe's model, which also logs the held-out loss."""

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the cross-entropy of the scene among all, the mean over the wordings of the question."""
        super().validation_step(batch, batch_idx)
        similarity = torch.einsum("bd,wsd->wbs", self.embed_images(batch["images"]), self._scene_embeddings)
        logits = (similarity * self.log_temperature.exp()).flatten(0, 1)
        self.log(LOSS, functional.cross_entropy(logits, batch["scenes"].repeat(len(self._scene_embeddings))))


class TwoDigitScenes:
    """The task.

    Args:
        text_model: a folder or hub id of the text encoder, by default the MiniLM that comes as a package.
        sts: graded sentence pairs, in STS-B's format or this project's; by default those of this project.
        pairs: how many of them are evaluated, at even distances in the file; by default all.
        wordings: ``recipe`` for those of the recipe, ``short`` for :data:`SHORT`.
        digits: how many digits are shown, from zero on.
        batch_size: scenes in a batch.
        vision_lr: peak learning rate of the vision encoder, which is new.

    Raises:
        ValueError: if there are fewer pairs, or no such wordings.
    """

    pretrained = ("text.*",)
    new = ("vision.*", "log_temperature")

    def __init__(
        self,
        text_model: str = "",
        sts: str = "",
        pairs: str = "",
        wordings: str = "recipe",
        digits: str = "10",
        batch_size: str = "64",
        vision_lr: str = "2e-3",
    ) -> None:
        self.text_model = text_model
        self.all_pairs = read_pairs(Path(sts) if sts else PAIRS)
        self.pairs = spread(self.all_pairs, int(pairs) if pairs else None)
        known = {"recipe": WORDINGS, "short": SHORT}
        if wordings not in known:
            raise ValueError(f"wordings={wordings!r} is none of {', '.join(known)}")
        self.wordings = known[wordings]
        self.digits = int(digits)
        self.batch_size = int(batch_size)
        self.vision_lr = float(vision_lr)

    def model(self, seed: int, lr: float, folder: Path) -> ScenesWithLoss:
        """MiniLM beside a new vision encoder."""
        pl.seed_everything(seed, verbose=False)
        return ScenesWithLoss(
            self.text_model or packaged_minilm(),
            text_lr=lr,
            vision_lr=self.vision_lr,
            wordings=self.wordings,
            digits=self.digits,
        )

    def data(self, model: pl.LightningModule, seed: int) -> SceneData:
        """Scenes."""
        assert isinstance(model, ImageTextModel)
        return SceneData(model.tokenizer, self.batch_size, seed, self.wordings, self.digits)

    def unlabeled(self) -> list[str]:
        """The sentences of the pairs that are not evaluated, each once; a sentence of an evaluated pair is left out.

        Raises:
            ValueError: if there are none.
        """
        evaluated = {sentence for pair in self.pairs for sentence in pair[:2]}
        others = dict.fromkeys(sentence for pair in self.all_pairs for sentence in pair[:2])
        if left := [sentence for sentence in others if sentence not in evaluated]:
            return left
        raise ValueError("all pairs are evaluated: set pairs to fewer, so that sentences are left to ask about")

    def probes(self, model: pl.LightningModule, seed: int) -> dict[str, Probe]:
        """The Spearman correlation of sentence similarities with human scores."""
        assert isinstance(model, ImageTextModel)
        # Pairs of like length share a batch, which leaves less to padding; the correlation knows no order.
        pairs = sorted(self.pairs, key=lambda pair: len(pair[0]) + len(pair[1]))
        return {"sts": similarity_probe(pairs, model.tokenizer)}


def spread(pairs: Sequence[tuple[str, str, float]], count: int | None) -> list[tuple[str, str, float]]:
    """So many of the pairs, at even distances; all if ``None``.

    Raises:
        ValueError: if there are fewer.
    """
    if count is None:
        return list(pairs)
    if not 0 < count <= len(pairs):
        raise ValueError(f"pairs={count} is not between 1 and {len(pairs)}, the number in the file")
    return [pairs[index * len(pairs) // count] for index in range(count)]
