"""The task of :mod:`recipes.captioning`: the small LLaVA learns to describe pictures; what it knew is text."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from benchmarks.forgetting.task import LOSS
from kappa_lightning import PerplexityProbe, Probe
from recipes.captioning.data import CaptionData
from recipes.shared.module import GenerativeModule, load_encoder
from recipes.shared.pretraining import fact_batch
from recipes.shared.small_models import SMALL_LLAVA
from recipes.shared.world import facts

FACTS_IN_BATCH = 64


class CaptionsWithLoss(GenerativeModule):
    """The recipe's model, which validates its loss only, without generating."""

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the mean negative log-likelihood of the captions' tokens, in nats."""
        self.log(LOSS, self.model(**batch["inputs"]).loss, batch_size=len(batch["samples"]))


class WorldText(PerplexityProbe):
    """Perplexity of the text world's statements, read without a picture."""

    def __init__(self) -> None:
        tokenizer = load_encoder(SMALL_LLAVA, images=True).tokenizer
        known = facts()
        # Statements of a kind follow each other; a pilot searches with every other batch, and reports on the rest.
        random.Random(0).shuffle(known)
        parts = [known[at : at + FACTS_IN_BATCH] for at in range(0, len(known), FACTS_IN_BATCH)]
        super().__init__([fact_batch(part, tokenizer) for part in parts])


class NewCaptions:
    """The task. As in the recipe the vision tower is frozen, and the projector trains with every method.

    Args:
        batch_size: pictures in a batch.
        test_size: pictures that are held out.
    """

    pretrained = ("*language_model*",)
    new = ("*multi_modal_projector*",)

    def __init__(self, batch_size: str = "32", test_size: str = "200") -> None:
        self.batch_size = int(batch_size)
        self.test_size = int(test_size)

    def model(self, seed: int, lr: float, folder: Path) -> CaptionsWithLoss:
        """The small LLaVA, which is pretrained the first time that any recipe asks for it; seeds do not change it."""
        return CaptionsWithLoss(SMALL_LLAVA, towers="language", lr=lr, lora_lr=lr)

    def data(self, model: pl.LightningModule, seed: int) -> CaptionData:
        """Drawn pictures."""
        return CaptionData(SMALL_LLAVA, batch_size=self.batch_size, test_size=self.test_size, seed=seed)

    def probes(self, model: pl.LightningModule, seed: int) -> dict[str, Probe]:
        """Perplexity of the text world's statements."""
        return {"text": WorldText()}
