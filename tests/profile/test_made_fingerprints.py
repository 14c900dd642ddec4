"""A weight that its layer makes is known by what it is made of, since what comes out is rounded by the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from kappa_lightning import KappaProfile
from kappa_lightning.fingerprint import fingerprint
from kappa_lightning.weights import find_weights


class Rounded(nn.Module):
    """Multiplies as another device might."""

    factor: ClassVar[float] = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(4, 4))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask * self.factor


def rounded() -> nn.Sequential:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 4))
    parametrize.register_parametrization(net[0], "weight", Rounded())
    return net


def test_profile_holds_where_the_weight_is_rounded_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    profile, net = KappaProfile.from_model(rounded(), progress=False), rounded()
    monkeypatch.setattr(Rounded, "factor", 1 + 2**-20)
    assert not torch.equal(net[0].weight, rounded()[0].parametrizations.weight.original)
    profile.check(net)


@pytest.mark.parametrize("part", ["original", "0.mask"])
def test_profile_does_not_hold_where_a_part_of_it_differs(part: str) -> None:
    profile, net = KappaProfile.from_model(rounded(), progress=False), rounded()
    changed = dict(net[0].parametrizations.weight.state_dict(keep_vars=True))[part]
    with torch.no_grad():
        changed[0, 0] = 0.5
    with pytest.raises(ValueError, match=r"content of 0\.parametrizations\.weight\.original differs"):
        profile.check(net)


def test_profile_of_earlier_versions_holds() -> None:
    net = rounded()
    (row,) = KappaProfile.from_model(net, progress=False)
    (weight,) = find_weights(net)
    content = fingerprint(weight.read())
    assert content != row.fingerprint
    earlier = KappaProfile([replace(row, fingerprint=content)])
    earlier.check(net)
    with torch.no_grad():
        net[0].parametrizations.weight.original[0, 0] += 1
    with pytest.raises(ValueError, match="differs"):
        earlier.check(net)


def test_same_stored_numbers_used_plainly_are_another_weight() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    made = rounded()
    with torch.no_grad():
        made[0].parametrizations.weight.original.copy_(net[0].weight)
    assert find_weights(net)[0].fingerprint() != find_weights(made)[0].fingerprint()


@pytest.mark.parametrize(
    "make",
    [
        weight_norm,
        spectral_norm,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda layer: prune.random_unstructured(layer, "weight", 0.3),
    ],
    ids=["older weight norm", "older spectral norm", "weight norm", "spectral norm", "pruning"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_scan_of_the_file_serves_the_model(tmp_path: Path, make: Callable[[nn.Module], Any]) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(make(nn.Conv1d(6, 8, 3)))
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="config.json"):
        profile = KappaProfile.from_checkpoint(tmp_path / "model.safetensors", progress=False)
    profile.check(net)
    assert [row.fingerprint for row in profile] == [weight.fingerprint() for weight in find_weights(net)]
