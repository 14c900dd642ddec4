"""What version 0.1.0 wrote to disk, and the model that it was computed from."""

from pathlib import Path

import torch
from torch import nn

DATA = Path(__file__).parent / "data"


def net_of_version_0_1_0():
    """Its weights are small whole numbers, so that every machine and version of PyTorch has the same."""
    net = nn.Module()
    net.good, net.zero = nn.Linear(4, 3), nn.Linear(3, 3)
    net.experts = nn.Parameter(torch.zeros(3, 4, 5))
    with torch.no_grad():
        net.good.weight.copy_((torch.arange(12).view(3, 4) ** 2) % 7)
        net.zero.weight.zero_()
        net.experts.copy_((torch.arange(60).view(3, 4, 5) ** 3) % 11)
        net.experts[1] = 0
    return net
