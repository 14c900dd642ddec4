import math

import numpy as np
import pytest
import torch

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
