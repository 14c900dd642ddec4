import time

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from outside import Plain, number_loaders, number_probe

from kappa_lightning.pilot.candidates import candidate
from kappa_lightning.pilot.rehearsal import seconds_of_a_run
from kappa_lightning.pilot.trial import Setup


class Slow(Plain):
    """A step takes 20 ms and a validation 50 ms at least."""

    def training_step(self, batch, batch_idx):
        time.sleep(0.02)
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_start(self):
        time.sleep(0.05)


class Keeping(Callback):
    def __init__(self):
        self.fits = []

    def __deepcopy__(self, memo):
        return self

    def on_fit_start(self, trainer, pl_module):
        self.fits.append(trainer.max_steps)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_rehearsal_takes_few_steps_and_counts_all_of_a_run(accumulate):
    module, keeping = Slow(), Keeping()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = {"accelerator": "cpu", "callbacks": keeping, "accumulate_grad_batches": accumulate}
    setup = Setup(lambda: module, number_loaders, number_probe, "val/loss", 500, 20, 5, trainer=trainer)
    seconds = seconds_of_a_run(setup, candidate("full"), 0)
    assert keeping.fits == [4]
    assert seconds >= 500 * 0.02 * accumulate + 25 * 0.05
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
