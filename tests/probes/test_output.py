import math
from types import ModuleType

import pytest
import torch
from torch import distributions as reference

from kappa_lightning.probes.output import Bernoulli, Categorical, Gaussian, Joint, similarity


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pair(kind):
    """Two distributions of a kind, and PyTorch's own of each."""
    first, second = torch.randn(5, 4, generator=generator(1)), torch.randn(5, 4, generator=generator(2))
    if kind is Categorical:
        return [(Categorical(x), reference.Categorical(logits=x)) for x in (first, second)]
    if kind is Bernoulli:
        return [(Bernoulli(x), reference.Independent(reference.Bernoulli(logits=x), 1)) for x in (first, second)]
    return [(Gaussian(x, 0.3), reference.Independent(reference.Normal(x, 0.3), 1)) for x in (first, second)]


@pytest.mark.parametrize("kind", [Categorical, Bernoulli, Gaussian])
def test_log_prob_and_divergence_are_those_of_torch(kind):
    (p, p_torch), (q, q_torch) = pair(kind)
    drawn = p.sample(generator())
    torch.testing.assert_close(p.log_prob(drawn), p_torch.log_prob(drawn))
    torch.testing.assert_close(q.divergence(p.describe()), reference.kl_divergence(p_torch, q_torch))
    assert len(p) == 5


@pytest.mark.parametrize("kind", [Categorical, Bernoulli, Gaussian])
def test_mean_score_of_samples_is_zero_and_its_square_the_fisher_information(kind):
    # E[∇ log p] = 0 and E[(∇ log p)²] = −E[∇² log p] hold only for samples of the distribution itself.
    x = torch.randn(1, 3, generator=generator(3)).repeat(20_000, 1).requires_grad_()
    distribution = Gaussian(x, 0.5) if kind is Gaussian else kind(x)
    (score,) = torch.autograd.grad(distribution.log_prob(distribution.sample(generator())).sum(), x)
    p = x[0].detach().softmax(-1) if kind is Categorical else x[0].detach().sigmoid()
    fisher = torch.full((3,), 1 / 0.25) if kind is Gaussian else p * (1 - p)
    torch.testing.assert_close(score.mean(0), torch.zeros(3), atol=0.05, rtol=0)
    torch.testing.assert_close(score.square().mean(0), fisher, rtol=0.05, atol=0)


def test_only_positions_that_count_are_rows():
    logits = torch.randn(2, 3, 7)
    counts = torch.tensor([[1, 1, 0], [0, 1, 0]])
    assert torch.equal(Categorical(logits, counts).logits, torch.stack([logits[0, 0], logits[0, 1], logits[1, 1]]))


def test_joint_has_the_rows_of_its_parts_in_turn():
    (p, _), (q, _) = pair(Categorical)
    (gauss_p, _), (gauss_q, _) = pair(Gaussian)
    before, after = Joint([p, gauss_p]), Joint([q, gauss_q])
    drawn = before.sample(generator())
    assert torch.equal(before.log_prob(drawn), torch.cat([p.log_prob(drawn[0]), gauss_p.log_prob(drawn[1])]))
    expected = torch.cat([q.divergence(p.describe()), gauss_q.divergence(gauss_p.describe())])
    assert torch.equal(after.divergence(before.describe()), expected)
    assert len(before) == 10


def test_similarity_asks_for_the_text_of_an_image_and_the_image_of_a_text():
    logits = torch.tensor([[2.0, 0.0], [1.0, 3.0]])
    log_p = similarity(logits).log_prob([torch.tensor([0, 1]), torch.tensor([0, 1])])
    expected = [-math.log1p(math.exp(-margin)) for margin in (2, 2, 1, 3)]
    torch.testing.assert_close(log_p, torch.tensor(expected))


def test_scale_that_is_no_standard_deviation_is_refused():
    with pytest.raises(ValueError, match=r"scale=0\.0 must be positive"):
        Gaussian(torch.zeros(2, 2), 0.0)


def test_every_distribution_of_the_page_on_the_theory_is_what_it_says():
    import kappa_lightning.probes as probes

    assert len(probes.similarity(torch.zeros(2, 3))) == 5
    modules = [name for name in probes.__all__ if isinstance(getattr(probes, name), ModuleType)]
    assert modules == []
