"""What a model could see before it learned to describe new pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader, Subset

from kappa_lightning import PerplexityProbe
from recipes.captioning.data import open_images
from recipes.shared.encoding import Sample
from recipes.shared.module import load_encoder
from recipes.shared.probes import AnswerAccuracy, drawn
from recipes.shared.small_llava import draw_question
from recipes.shared.small_models import SMALL_LLAVA


class OldVision(AnswerAccuracy):
    """Share of the words that the model gets right when it names one or two groups: their colours, forms and counts.

    Args:
        model: hub id or folder, by default the small LLaVA.
        count: number of pictures.
        seed: of the pictures.
    """

    def __init__(self, model: str = SMALL_LLAVA, count: int = 200, seed: int = 1) -> None:
        super().__init__(load_encoder(model, images=True), drawn(draw_question, count, seed))


class CaptionPerplexity(PerplexityProbe):
    """Perplexity of the right answers about pictures of an old task, such as COCO's captions.

    The pictures are read anew each time, so that they take no memory in between.

    Args:
        model: the hub id or folder whose processor encodes them.
        data: a folder with a ``captions.jsonl``, or a hub data set.
        prompt: what the model is asked about each picture.
        count: number of pictures, the first ones.
        batch_size: pictures in a batch.
        split: of a hub data set.
        image_column: of a hub data set.
        caption_column: of a hub data set.
        subset: the configuration of a hub data set that has several.
        max_edge: longer images are shrunk to this longest edge, in pixels.
    """

    def __init__(
        self,
        model: str,
        data: str,
        prompt: str,
        count: int = 64,
        batch_size: int = 4,
        split: str = "train",
        image_column: str = "image",
        caption_column: str = "caption",
        subset: str | None = None,
        max_edge: int | None = None,
    ) -> None:
        encoder = load_encoder(model, images=True)
        images: Any = open_images(data, prompt, split, image_column, caption_column, subset, max_edge)

        def inputs(samples: Sequence[Sample]) -> dict[str, Any]:
            batch: dict[str, Any] = encoder(samples)["inputs"]
            return batch

        first = Subset(images, range(min(count, len(images))))
        super().__init__(DataLoader(first, batch_size, collate_fn=inputs))
