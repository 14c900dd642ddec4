import lightning.pytorch as pl
import pytest
import torch
from outside import Manual, Plain, number_loaders

from kappa_lightning.pilot import RateFactor


def fit(module, *callbacks, steps=6, **options):
    pl.seed_everything(1, verbose=False)
    trainer = pl.Trainer(
        max_steps=steps, callbacks=list(callbacks), accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, **options,
    )  # fmt: skip
    trainer.fit(module, number_loaders()[0])
    return trainer


def faster(kind, factor):
    """The module whose own rates are as much higher."""

    class Faster(kind):
        def configure_optimizers(self):
            configured = super().configure_optimizers()
            if isinstance(configured, dict):
                optimizers, schedules = [configured["optimizer"]], [configured["lr_scheduler"]]
            else:
                optimizers, schedules = configured
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] *= factor
                    group["initial_lr"] *= factor
            for schedule in schedules:
                schedule.base_lrs = [rate * factor for rate in schedule.base_lrs]
            return configured

    return Faster()


@pytest.mark.parametrize(("kind", "steps"), [(Plain, 6), (Manual, 12)])
def test_factor_is_a_higher_rate_of_every_optimizer_under_a_schedule(kind, steps):
    scaled, expected = kind(), faster(kind, 3.0)
    fit(scaled, RateFactor(3.0), steps=steps)
    fit(expected, steps=steps)
    for name, parameter in scaled.named_parameters():
        torch.testing.assert_close(parameter, expected.get_parameter(name))


def test_one_is_bit_identical_and_rates_are_the_modules_own_behind_the_fit():
    plain, scaled = Plain(), Plain()
    fit(plain)
    trainer = fit(scaled, RateFactor(1.0))
    assert all(torch.equal(p, scaled.get_parameter(n)) for n, p in plain.named_parameters())
    (optimizer,) = trainer.optimizers
    trainer = fit(scaled, RateFactor(5.0))
    (optimizer,) = trainer.optimizers
    rate = optimizer.param_groups[0]["lr"]
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == rate < 0.03


def test_rate_in_a_tensor_is_scaled_in_place():
    class Captured(Plain):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=torch.tensor(0.02))

    class Fast(Plain):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=torch.tensor(0.04))

    scaled, expected = Captured(), Fast()
    trainer = fit(scaled, RateFactor(2.0))
    fit(expected)
    torch.testing.assert_close(scaled.body.weight, expected.body.weight)
    assert float(trainer.optimizers[0].param_groups[0]["lr"]) == pytest.approx(0.02)


def test_step_that_fails_leaves_the_rates_as_they_were():
    class Failing(Plain):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                raise RuntimeError("boom")
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            self.optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
            return self.optimizer

    module = Failing()
    with pytest.raises(RuntimeError, match="boom"):
        fit(module, RateFactor(4.0))
    assert module.optimizer.param_groups[0]["lr"] == 0.02


@pytest.mark.parametrize("factor", [0, -1.0, float("inf"), float("nan"), True, "2"])
def test_factor_out_of_range_is_named(factor):
    with pytest.raises(ValueError, match="factor="):
        RateFactor(factor)
