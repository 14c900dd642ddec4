"""What the small LLaVA could see before it learned to describe scenes."""

from __future__ import annotations

from recipes.captioning.small_llava import draw_question
from recipes.generative.module import load_encoder
from recipes.generative.probes import AnswerAccuracy, drawn
from recipes.generative.small_models import SMALL_LLAVA


class OldVision(AnswerAccuracy):
    """Share of the words that the model gets right when it names one or two groups: their colours, forms and counts.

    Args:
        model: hub id or folder, by default the small LLaVA.
        count: number of pictures.
        seed: of the pictures.
    """

    def __init__(self, model: str = SMALL_LLAVA, count: int = 200, seed: int = 1) -> None:
        super().__init__(load_encoder(model, images=True), drawn(draw_question, count, seed))
