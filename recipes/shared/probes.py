"""Probes of what a generative model could do before, made from plain values, so that a YAML can hold them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kappa_lightning import AccuracyProbe, AgreementProbe, PerplexityProbe
from kappa_lightning.probes.metrics import IGNORED
from recipes.shared.encoding import Encoder, Sample
from recipes.shared.module import load_encoder
from recipes.shared.pretraining import fact_batch
from recipes.shared.world import facts

SENTENCES = Path(__file__).parents[1] / "data" / "sentence_pairs.tsv"
"""Text of this project's own, where no other is given."""


def read_text(file: Path) -> str:
    """The text of a file in WikiText's format, or the sentences of this project's sentence pairs.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty.
    """
    if not file.is_file():
        raise FileNotFoundError(f"text={str(file)!r}: there is no such file")
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".tsv":
        text = "\n".join(sentence for line in text.splitlines()[1:] for sentence in line.split("\t")[1:])
    if not text.strip():
        raise ValueError(f"text={str(file)!r} is empty")
    return text


def text_windows(encoder: Encoder, file: Path, window: int, count: int, batch_size: int) -> list[dict[str, Tensor]]:
    """The first windows of a text, of equal length and without overlap.

    Args:
        encoder: its tokenizer is used.
        file: see :func:`read_text`.
        window: tokens in each.
        count: number of windows; fewer if the text is shorter.
        batch_size: windows in a batch.

    Returns:
        Batches with ``input_ids`` of shape (windows, window).

    Raises:
        ValueError: if the text is shorter than a window.
    """
    tokenizer = encoder.tokenizer
    # More characters than tokens are never needed; a tokenizer warns about a text that is longer than its model's.
    ids = tokenizer(read_text(file)[: window * count * 12], add_special_tokens=False, verbose=False)["input_ids"]
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = window - len(first)
    windows = [[*first, *ids[at : at + body]] for at in range(0, min(len(ids), body * count) - body + 1, body)]
    if not windows:
        raise ValueError(f"text={str(file)!r} has {len(ids)} tokens, not one window of {window}")
    return [{"input_ids": torch.tensor(windows[at : at + batch_size])} for at in range(0, len(windows), batch_size)]


class TextPerplexity(PerplexityProbe):
    """Perplexity of text without images.

    Args:
        model: the hub id or folder whose tokenizer is used.
        text: a file in WikiText's format; by default this project's own sentences.
        images: whether the model sees.
        window: tokens in each window.
        windows: number of windows at most.
        batch_size: windows in a batch.
    """

    def __init__(
        self,
        model: str,
        text: str | None = None,
        images: bool = True,
        window: int = 128,
        windows: int = 64,
        batch_size: int = 8,
    ) -> None:
        encoder = load_encoder(model, images)
        super().__init__(text_windows(encoder, Path(text or SENTENCES), window, windows, batch_size))


class TextAgreement(AgreementProbe):
    """Agreement with the pretrained model's next-token distributions on text without images.

    Args:
        model: the hub id or folder whose tokenizer is used.
        text: a file in WikiText's format; by default this project's own sentences.
        images: whether the model sees.
        window: tokens in each window.
        windows: number of windows at most.
        batch_size: windows in a batch.
        top_k: see :class:`~kappa_lightning.AgreementProbe`.
        max_bytes: see :class:`~kappa_lightning.AgreementProbe`.
        directory: see :class:`~kappa_lightning.AgreementProbe`.
    """

    def __init__(
        self,
        model: str,
        text: str | None = None,
        images: bool = True,
        window: int = 128,
        windows: int = 16,
        batch_size: int = 8,
        top_k: int | None = 256,
        max_bytes: int = 2**28,
        directory: str | None = None,
    ) -> None:
        encoder = load_encoder(model, images)
        batches = text_windows(encoder, Path(text or SENTENCES), window, windows, batch_size)
        super().__init__(batches, top_k=top_k, max_bytes=max_bytes, directory=directory)


class WorldAccuracy(AccuracyProbe):
    """Share of the text world's facts that the model completes with the right word.

    Args:
        model: the folder of a model that was taught the world.
        images: whether the model sees.
        batch_size: facts in a batch.
    """

    def __init__(self, model: str, images: bool = True, batch_size: int = 128) -> None:
        tokenizer = load_encoder(model, images).tokenizer
        batches = [shifted(fact_batch(part, tokenizer), words=1) for part in _parts(facts(), batch_size)]
        super().__init__(batches, logits=next_token_logits)


class WorldAgreement(AgreementProbe):
    """Agreement with the pretrained model's next-token distributions on the text world's statements.

    Args:
        model: the folder of a model that was taught the world.
        images: whether the model sees.
        batch_size: facts in a batch.
    """

    def __init__(self, model: str, images: bool = True, batch_size: int = 128) -> None:
        tokenizer = load_encoder(model, images).tokenizer
        super().__init__([fact_batch(part, tokenizer) for part in _parts(facts(), batch_size)])


class AnswerAccuracy(AccuracyProbe):
    """Share of the tokens of answers that get the highest logit after the right ones before them.

    Args:
        encoder: makes the batches.
        samples: the prompts with their answers.
        batch_size: samples in a batch.
    """

    def __init__(self, encoder: Encoder, samples: Sequence[Sample], batch_size: int = 100) -> None:
        batches = [shifted(encoder(part)["inputs"]) for part in _parts(samples, batch_size)]
        super().__init__(batches, logits=next_token_logits)


def drawn(draw: Callable[[random.Random], Sample], count: int, seed: int) -> list[Sample]:
    """Samples that are the same each time."""
    rng = random.Random(seed)
    return [draw(rng) for _ in range(count)]


def shifted(inputs: dict[str, Tensor], words: int | None = None) -> dict[str, Tensor]:
    """The same inputs with labels for the token after each, shape (batch, tokens − 1).

    Args:
        inputs: with ``labels`` of shape (batch, tokens).
        words: how many of a row's labels count, the last ones before the end token; all before it if ``None``.
    """
    labels = inputs["labels"]
    counted = labels != IGNORED
    from_end = counted.sum(1, keepdim=True) - counted.cumsum(1)
    counted &= from_end > 0
    if words is not None:
        counted &= from_end <= words
    return {**inputs, "labels": labels.masked_fill(~counted, IGNORED)[:, 1:]}


def next_token_logits(module: Any, batch: dict[str, Tensor]) -> Tensor:
    """The logits of every position but the last, shape (batch, tokens − 1, vocabulary)."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits: Tensor = module(**inputs).logits
    return logits[:, :-1]


def _parts(items: Sequence[Any], size: int) -> Iterable[Any]:
    return (items[at : at + size] for at in range(0, len(items), size))
