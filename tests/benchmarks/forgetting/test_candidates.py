import numpy as np
import pytest
import torch
from torch import nn

import benchmarks.forgetting.candidates  # noqa: F401 - registers its criteria
from kappa_lightning import KappaProfile
from kappa_lightning.selection import criterion_of, rank


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 24), "down": nn.Linear(24, 6)}) for _ in range(3))
    for scale, block in zip((1.0, 0.1, 3.0), blocks, strict=True):
        for layer in block.values():
            layer.weight.data.mul_(scale)
    return nn.ModuleDict({"stem": nn.Conv2d(2, 6, 3), "blocks": blocks})


def by_hand(name, values):
    """The criteria again, from NumPy's singular values of the matrix."""
    matrix = values.reshape(len(values), -1).astype(np.float64)
    sigma = np.linalg.svd(matrix, compute_uv=False)
    rows, cols = matrix.shape
    return {
        "rms": np.sqrt((matrix**2).mean()),
        "sigma_max": sigma[0],
        "kappa_norm": sigma[0] / sigma[-1] * np.linalg.norm(matrix),
        "mean_log_sigma": np.log(sigma).mean(),
        "aspect": min(rows, cols) / max(rows, cols),
        "fan_out": rows / cols,
    }[name]


@pytest.mark.parametrize("name", ["rms", "sigma_max", "kappa_norm", "mean_log_sigma", "aspect", "fan_out"])
def test_criterion_is_that_of_the_singular_values(name, net):
    profile = KappaProfile.from_model(net, progress=False, rtol=1e-6)
    weights = dict(net.named_parameters())
    scores = {row.name: criterion_of(name)(row) for row in profile}
    assert len(scores) == 7
    for matrix, score in scores.items():
        assert score == pytest.approx(by_hand(name, weights[matrix].detach().numpy()), rel=1e-4)


def test_depth_ranks_what_has_none_first_and_then_layer_by_layer(net):
    names = [row.name.removesuffix(".weight") for row in rank(KappaProfile.from_model(net, progress=False), "depth")]
    assert names == ["stem", *(f"blocks.{depth}.{part}" for depth in range(3) for part in ("down", "up"))]


def test_kappa_without_embeddings_is_kappa_with_the_embeddings_last():
    torch.manual_seed(0)
    net = nn.ModuleDict({"embed_tokens": nn.Embedding(40, 6), "wide": nn.Linear(6, 30), "square": nn.Linear(6, 6)})
    profile = KappaProfile.from_model(net, progress=False)
    plain = [row.name for row in rank(profile, "kappa")]
    assert plain.index("embed_tokens.weight") < 2
    expected = [name for name in plain if "embed" not in name] + ["embed_tokens.weight"]
    assert [row.name for row in rank(profile, "kappa_without_embeddings")] == expected
