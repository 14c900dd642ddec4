"""A small task that a language model can do above chance: which of two sentences is the grammatical one."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from kappa_lightning import AccuracyProbe

SUBJECTS = ("key", "book", "letter", "picture", "car")
NEIGHBORS = ("table", "garden", "door", "street", "box", "river")


def grammar(tokenizer: Any) -> AccuracyProbe:
    """The share of pairs of which the grammatical sentence has the higher probability; 0.5 by chance.

    120 pairs; between subject and verb stands a noun of the other number, so that the nearest noun misleads.
    """
    return AccuracyProbe(pair_batches(tokenizer), preference, chance=0.5)


def agreement_pairs() -> list[tuple[str, str]]:
    """A grammatical sentence and the same one with the verb of the other number, which a noun or a clause suggests.

    Example:
        >>> agreement_pairs()[0]
        ('The key near the tables is', 'The key near the tables are')
        >>> agreement_pairs()[1]
        ('The key that the men near the tables like is', 'The key that the men near the tables like are')
    """
    pairs = []
    for subject, neighbor in product(SUBJECTS, NEIGHBORS):
        nearby = f"{neighbor}es" if neighbor == "box" else f"{neighbor}s"
        one = (f"The {subject} near the {nearby}", f"The {subject} that the men near the {nearby} like")
        many = (f"The {subject}s near the {neighbor}", f"The {subject}s that the man near the {neighbor} likes")
        pairs += [(f"{text} is", f"{text} are") for text in one]
        pairs += [(f"{text} are", f"{text} is") for text in many]
    return pairs


def pair_batches(tokenizer: Any, size: int = 30) -> list[dict[str, Tensor]]:
    """The pairs, as batches of ``input_ids`` and ``attention_mask`` of shape (pairs, 2, tokens); the right one is 0."""
    encoded = [
        [[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in pair]
        for pair in agreement_pairs()
    ]
    batches = []
    for at in range(0, len(encoded), size):
        rows = [row for pair in encoded[at : at + size] for row in pair]
        width = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.eos_token_id] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        shape = (len(rows) // 2, 2, width)
        labels = torch.zeros(shape[0], dtype=torch.long)
        batches.append({"input_ids": ids.view(shape), "attention_mask": mask.view(shape), "labels": labels})
    return batches


def preference(module: Any, batch: dict[str, Tensor]) -> Tensor:
    """The log-probability of each sentence of a pair, shape (pairs, 2)."""
    ids, mask = batch["input_ids"].flatten(0, 1), batch["attention_mask"].flatten(0, 1)
    logits = module(input_ids=ids, attention_mask=mask)[:, :-1].float()
    likely = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    summed: Tensor = (likely * mask[:, 1:]).sum(-1)
    return summed.view(-1, 2)
