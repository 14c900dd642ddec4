import math

import lightning.pytorch as pl
import pytest
import torch
from tiny import make_trainer, scalars
from torch import nn
from torch.utils.data import DataLoader

from kappa_lightning import AgreementProbe, ForgettingEval


class Bigrams(pl.LightningModule):
    """Logits of the next token from this one; learns to repeat."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.rows = nn.Embedding(7, 7)

    def forward(self, input_ids):
        return self.rows(input_ids)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch), batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=2.0)


def data():
    return DataLoader(torch.arange(7), batch_size=7)


def forgetting(**options):
    return ForgettingEval({"old": AgreementProbe([{"input_ids": torch.arange(7)[None]}], **options)})


def expected(module):
    """exp(−mean KL) from the untrained weights, in float64."""
    p, q = (m.rows.weight.detach().double().log_softmax(-1) for m in (Bigrams(), module))
    return math.exp(-(p.exp() * (p - q)).sum(-1).mean().item())


@pytest.mark.parametrize("on_disk", [False, True])
def test_retention_is_the_agreement_and_survives_a_resume(tmp_path, on_disk):
    options = {"directory": tmp_path / "kept"} if on_disk else {}
    whole, module = forgetting(**options), Bigrams()
    make_trainer(tmp_path, whole, max_epochs=3).fit(module, data())
    assert whole.baseline == {"old": 1.0}
    retentions = [record["forgetting/old/retention"] for record in whole.history]
    assert retentions == [record["forgetting/old/agreement"] for record in whole.history]
    assert retentions[-1] == pytest.approx(expected(module), rel=1e-5)
    assert retentions[-1] < 0.999

    first = forgetting(**options)
    trainer = make_trainer(tmp_path, first, max_epochs=1)
    trainer.fit(Bigrams(), data())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed, module = forgetting(**options), Bigrams()
    make_trainer(tmp_path, resumed, max_epochs=3).fit(module, data(), ckpt_path=tmp_path / "one.ckpt")
    assert [record["forgetting/old/retention"] for record in resumed.history] == pytest.approx(retentions, rel=1e-5)


def test_second_fit_of_the_module_compares_with_the_first_ones_start(tmp_path):
    callback, module = forgetting(), Bigrams()
    make_trainer(tmp_path, callback).fit(module, data())
    after_one = expected(module)
    assert after_one < 0.999
    make_trainer(tmp_path, callback).fit(module, data())
    assert callback.history[0]["forgetting/old/retention"] == pytest.approx(after_one, rel=1e-5)
    assert callback.history[-1]["forgetting/old/retention"] == pytest.approx(expected(module), rel=1e-5)


def test_fit_of_another_module_records_anew(tmp_path):
    callback = forgetting()
    make_trainer(tmp_path, callback).fit(Bigrams(), data())
    other = Bigrams()
    nn.init.zeros_(other.rows.weight)
    make_trainer(tmp_path, callback).fit(other, data())
    assert callback.history[0]["forgetting/old/retention"] == 1.0


def test_recording_leaves_the_training_as_it_is(tmp_path):
    with_probe, without = Bigrams(), Bigrams()
    make_trainer(tmp_path, forgetting(), max_epochs=2).fit(with_probe, data())
    make_trainer(tmp_path, max_epochs=2).fit(without, data())
    assert torch.equal(with_probe.rows.weight, without.rows.weight)


def test_too_little_room_stops_before_training_and_names_the_probe(tmp_path):
    module = Bigrams()
    before = module.rows.weight.detach().clone()
    with pytest.raises(ValueError, match=r"take 196 bytes, more than max_bytes=100") as caught:
        make_trainer(tmp_path, forgetting(max_bytes=100)).fit(module, data())
    assert "probe 'old'" in " ".join(caught.value.__notes__)
    assert torch.equal(module.rows.weight, before)


def test_agreement_goes_to_tensorboard(tmp_path):
    logger = pl.loggers.TensorBoardLogger(tmp_path, name="run", version=0)
    make_trainer(tmp_path, forgetting(), logger=logger).fit(Bigrams(), data())
    values = scalars(tmp_path / "run" / "version_0", "forgetting/old/agreement")
    assert values[0] == (0, 1.0)
    assert values[-1][1] < 1
