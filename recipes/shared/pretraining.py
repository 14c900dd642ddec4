"""Small models that know the text world, trained once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from kappa_lightning.probes.metrics import IGNORED
from recipes.shared.encoding import Sample
from recipes.shared.schedule import warmup_cosine
from recipes.shared.world import Fact

Encode = Callable[[Sequence[Sample]], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Schooling:
    """How a small model is pretrained.

    Attributes:
        steps: optimizer steps.
        facts: facts of the text world in each.
        samples: samples of the old task in each.
        lr: peak learning rate.
        seed: of weights and order.
    """

    steps: int = 400
    facts: int = 64
    samples: int = 24
    lr: float = 2e-3
    seed: int = 0


def cached(cache: Path, name: str, settings: dict[str, Any], build: Callable[[], tuple[nn.Module, Any]]) -> Path:
    """The folder of a pretrained model and its processor; built if it is not there yet, and never half written.

    Args:
        cache: where such folders are.
        name: what the folder's name begins with.
        settings: everything that the result depends on.
        build: makes the model and its processor.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache / f"{name}-{digest}"
    if folder.is_dir():
        return folder
    model, processor = build()
    partial = cache / f"{folder.name}.{os.getpid()}.partial"
    partial.mkdir(parents=True)
    model.save_pretrained(partial)  # type: ignore[operator]
    processor.save_pretrained(partial)
    if folder.is_dir():  # another process was faster
        shutil.rmtree(partial)
    else:
        partial.rename(folder)
    return folder


def school(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    schooling: Schooling,
    encode: Encode | None = None,
    draw: Callable[[random.Random], Sample] | None = None,
) -> None:
    """Teach a model the facts, and beside them the old task of which ``draw`` makes samples.

    Args:
        model: a transformers model with random weights.
        tokenizer: its tokenizer.
        facts: all of them are seen equally often.
        schooling: how long and how fast.
        encode: makes a batch of samples of the old task.
        draw: makes one such sample.
    """
    rng = random.Random(schooling.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=schooling.lr, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = warmup_cosine(optimizer, schooling.steps)
    deck = _deck(facts, rng)
    model.train()
    description = "Pretraining the small model"
    # disable=None: no bar where there is no terminal, in which a line says what takes the time.
    with tqdm(range(schooling.steps), desc=description, unit="step", dynamic_ncols=True, disable=None) as steps:
        if steps.disable:
            print(f"{description}: {schooling.steps} steps, once; it is kept", flush=True)
        for _ in steps:
            loss: Tensor = model(**fact_batch([next(deck) for _ in range(schooling.facts)], tokenizer)).loss
            loss.backward()  # type: ignore[no-untyped-call]
            if encode is not None and draw is not None:
                batch = encode([draw(rng) for _ in range(schooling.samples)])
                model(**batch["inputs"]).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            steps.set_postfix(nats=f"{loss.item():.3f}", refresh=False)


def fact_batch(facts: Sequence[Fact], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Whole statements, each with the end token, as ``input_ids``, ``attention_mask`` and ``labels``."""
    texts = [f"{fact.prompt} {fact.answer}{tokenizer.eos_token}" for fact in facts]
    tokens = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}


def settings_of(schooling: Sequence[Schooling], facts: Sequence[Fact], config: dict[str, Any]) -> dict[str, Any]:
    """Everything that a small model depends on."""
    return {
        "schooling": [asdict(stage) for stage in schooling],
        "facts": [[f.prompt, f.answer] for f in facts],
        "model": config,
    }


def _deck(facts: Sequence[Fact], rng: random.Random) -> Iterator[Fact]:
    while True:
        yield from rng.sample(facts, len(facts))
