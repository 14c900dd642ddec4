"""What a module keeps is put back, whatever mode it was made in."""

from __future__ import annotations

import torch
from torch import nn

from kappa_lightning.restoring import state_restored


def test_what_validation_kept_in_inference_mode_is_put_back():
    module = nn.Linear(2, 2)
    with torch.inference_mode():
        module.embedded = torch.arange(3.0)
    module.counted = torch.zeros(2)
    with state_restored(module):
        with torch.inference_mode():
            module.embedded.mul_(2)
        module.counted += 1
    assert module.embedded.tolist() == [0.0, 1.0, 2.0]
    assert module.counted.tolist() == [0.0, 0.0]
    with torch.inference_mode(), state_restored(module):
        module.embedded.mul_(2)
    assert module.embedded.tolist() == [0.0, 1.0, 2.0]
