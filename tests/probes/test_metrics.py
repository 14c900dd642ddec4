from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TinyNet, fit
from torch import Tensor, nn

from kappa_lightning import ForgettingEval
from kappa_lightning.probes import SimilarityProbe
from kappa_lightning.probes.metrics import IGNORED, MeanCorrect, TokenPerplexity


def reference(logits, labels):
    """exp of the mean nats a predicted token, in float64."""
    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    nats = []
    for row, label in zip(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), strict=True):
        if label != -100:
            peak = row.max()
            nats.append(peak + np.log(np.exp(row - peak).sum()) - row[label])
    return math.exp(np.mean(nats))


def perplexity(*batches):
    metric = TokenPerplexity()
    for logits, labels in batches:
        metric.update(logits, labels)
    return metric.compute().item()


def test_perplexity_agrees_with_a_hand_loop_in_float64():
    logits, labels = 3 * torch.randn(4, 9, 13), torch.randint(13, (4, 9))
    labels[1, 3:] = IGNORED
    assert perplexity((logits, labels)) == pytest.approx(reference(logits, labels), rel=1e-6)


def test_perplexity_weighs_tokens_and_not_batches():
    logits, labels = torch.randn(3, 8, 5), torch.randint(5, (3, 8))
    labels[0, 1:] = IGNORED
    batches = [(logits[:1], labels[:1]), (logits[1:], labels[1:])]
    assert perplexity(*batches) == pytest.approx(reference(logits, labels), rel=1e-6)
    assert perplexity(*batches) == pytest.approx(perplexity((logits, labels)), rel=1e-12)


def test_uniform_logits_give_the_size_of_the_vocabulary():
    assert perplexity((torch.zeros(2, 3, 17), torch.zeros(2, 3, dtype=torch.int64))) == pytest.approx(17.0)


def test_certain_predictions_give_one():
    logits = torch.full((1, 4, 6), -1e4)
    logits[..., 2] = 0
    assert perplexity((logits, torch.full((1, 4), 2))) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [90.0, 200.0, 700.0])
def test_unlikely_tokens_cost_their_true_nats(dtype, size):
    # exp(−90) is 0 in float32, and exp(200) is infinite there; float64 holds both.
    logits = torch.zeros(1, 2, 3, dtype=dtype)
    logits[..., 0] = size
    labels = torch.tensor([[1, 2]])
    expected = reference(logits.double(), labels)
    assert math.isfinite(expected)
    assert perplexity((logits, labels)) == pytest.approx(expected, rel=1e-5)


def test_bfloat16_logits_lose_nothing_more():
    logits, labels = (4 * torch.randn(2, 50, 11)).bfloat16(), torch.randint(11, (2, 50))
    assert perplexity((logits, labels)) == pytest.approx(reference(logits.double(), labels), rel=1e-6)


def test_sum_of_many_tokens_stays_exact():
    logits, labels = torch.randn(1, 400, 7), torch.randint(7, (1, 400))
    assert perplexity(*[(logits, labels)] * 500) == pytest.approx(reference(logits, labels), rel=1e-7)


def test_no_predicted_token_is_nan():
    assert math.isnan(perplexity((torch.randn(2, 3, 5), torch.full((2, 3), IGNORED))))
    assert math.isnan(perplexity((torch.randn(2, 0, 5), torch.zeros(2, 0, dtype=torch.int64))))


def test_fully_masked_batch_does_not_disturb_another():
    logits, labels = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    masked = (torch.full((2, 3, 5), math.nan), torch.full((2, 3), IGNORED))
    assert perplexity(masked, (logits, labels), masked) == pytest.approx(reference(logits, labels), rel=1e-6)


def test_reset_forgets_everything():
    metric = TokenPerplexity()
    metric.update(torch.zeros(1, 2, 9), torch.zeros(1, 2, dtype=torch.int64))
    metric.reset()
    metric.update(torch.zeros(1, 1, 4), torch.zeros(1, 1, dtype=torch.int64))
    assert metric.compute().item() == pytest.approx(4.0)


def test_directions_are_known():
    assert TokenPerplexity().higher_is_better is False
    assert MeanCorrect().higher_is_better is True


def test_mean_correct_weighs_samples_and_not_batches():
    metric = MeanCorrect()
    metric.update(torch.tensor([1.0]))
    metric.update(torch.tensor([0.0, 0.0, 1.0]))
    assert metric.compute().item() == 0.5


# Human scores


def test_human_scores_keep_their_precision_in_a_module_of_lower_precision(tmp_path: Path) -> None:
    first, second = torch.eye(3), torch.tensor([[1.0, 0, 0], [1, 1, 0], [1, 0, 0]])  # cosines 1, 0.7 and 0
    scores = torch.tensor([3.81, 3.805, 0.0])
    assert scores.bfloat16()[0] == scores.bfloat16()[1]
    seen = set()

    def embed(module: nn.Module, x: Tensor) -> Tensor:
        seen.add(x.dtype)
        return x

    callback = ForgettingEval({"pairs": SimilarityProbe([(first, second, scores)], embed)})
    fit(tmp_path, TinyNet(), callback, precision="bf16-true")
    assert seen == {torch.bfloat16}
    assert callback.baseline["pairs"] == pytest.approx(1.0, abs=1e-4)  # with a tie, 0.87


# Many tokens


@pytest.mark.parametrize("shape", [(1, 1024), (1, 1025), (3, 1100), (5, 417)], ids=str)
def test_perplexity_over_many_tokens_is_that_in_float64(shape: tuple[int, int]) -> None:
    random_numbers = torch.Generator().manual_seed(5)
    logits = 4 * torch.randn(*shape, 17, generator=random_numbers)
    labels = torch.randint(17, shape, generator=random_numbers)
    labels[torch.rand(shape, generator=random_numbers) < 0.2] = -100
    metric = TokenPerplexity()
    metric.update(logits, labels)
    counts = labels != -100
    nats = -logits.double().log_softmax(-1)[counts].gather(-1, labels[counts].unsqueeze(-1))
    assert metric.compute().item() == pytest.approx(nats.mean().exp().item(), rel=1e-6)
    assert metric.tokens.item() == counts.sum().item()


def test_perplexity_never_copies_more_than_a_part_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = nn.functional.cross_entropy

    def cross_entropy(logits: Tensor, *arguments: Any, **options: Any) -> Tensor:
        sizes.append(len(logits))
        return original(logits, *arguments, **options)

    monkeypatch.setattr(nn.functional, "cross_entropy", cross_entropy)
    TokenPerplexity().update(torch.zeros(2, 1500, 3), torch.zeros(2, 1500, dtype=torch.int64))
    assert sum(sizes) == 3000
    assert max(sizes) <= 1024
