"""A checkpoint that version 0.1.0 wrote is resumed: what trains, the optimizer, and every figure go on."""

import pytest
import torch
from saved_checkpoints import CHECKPOINT, Net, batches, trainer

from kappa_lightning import ForgettingEval, KappaFreezeCallback, KappaMonitor


def test_training_goes_on_with_what_was_chosen_and_measured(tmp_path):
    stored = torch.load(CHECKPOINT, weights_only=True)
    figures = stored["callbacks"]
    assert not any("{" in key for key in figures)  # as 0.1.0 names them
    before, measured = (figures["ForgettingEval"][part] for part in ("baseline", "history"))
    net, fit = Net(), trainer(tmp_path, 2)
    fit.fit(net, batches(), ckpt_path=CHECKPOINT)

    freeze, monitor, retention = (
        next(callback for callback in fit.callbacks if type(callback) is kind)
        for kind in (KappaFreezeCallback, KappaMonitor, ForgettingEval)
    )
    assert freeze.trained_names == ["layers.0.weight"]
    assert freeze.profile["layers.1.weight"].kappa == pytest.approx(100)
    assert [name for name, parameter in net.named_parameters() if parameter.requires_grad] == freeze.trained_names
    for name in ("layers.1.weight", "layers.2.weight"):
        assert torch.equal(net.get_parameter(name), stored["state_dict"][name])
    assert not torch.equal(net.layers[0].weight, stored["state_dict"]["layers.0.weight"])
    # The optimizer goes on: two steps before, two in this epoch.
    (state,) = fit.optimizers[0].state.values()
    assert state["step"] == 4

    assert retention.baseline == before
    assert [entry["epoch"] for entry in retention.history] == [0, 1, 2]
    assert retention.history[1]["forgetting/retention"] == measured[1]["forgetting/retention"]
    now = retention.history[2]
    error = now["forgetting/identity/mean_squared_error"]
    assert now["forgetting/identity/retention"] == pytest.approx(before["identity"] / error)
    assert dict(monitor.baseline) == {"layers.0.weight": 2.0}
    assert [entry["epoch"] for entry in monitor.history] == [0, 1, 2]
