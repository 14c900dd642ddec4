import copy
import json
import math
import os
import signal
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
)
from outside import (
    STEPS,
    ImageData,
    Images,
    Manual,
    Plain,
    image_probe,
    number_loaders,
    number_probe,
)
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from kappa_lightning import AccuracyProbe, Probe
from kappa_lightning.pilot.candidates import Candidate, candidate
from kappa_lightning.pilot.given import probes_of
from kappa_lightning.pilot.halves import half_of
from kappa_lightning.pilot.journal import Journal
from kappa_lightning.pilot.settings import settings_of
from kappa_lightning.pilot.trial import Setup, Spec, run_trial


def setup_of(module, data=number_loaders, probes=number_probe, **options):
    settings = {"steps": STEPS, "evaluations": 3, "blends": 2, "trainer": {"accelerator": "cpu"}, **options}
    return Setup(lambda: module, data, probes, "val/loss", **settings)


@pytest.mark.parametrize(
    ("kind", "data", "probes"),
    [(Plain, number_loaders, number_probe), (Manual, number_loaders, number_probe), (Images, ImageData, image_probe)],
)
def test_module_from_outside_trains_and_is_left_as_it_was(kind, data, probes):
    module = kind()
    module.train()
    before = copy.deepcopy(module.state_dict())
    state = torch.get_rng_state()
    setup = setup_of(module, data if kind is not Images else ImageData, probes)
    run = run_trial(setup, Spec("full", 0, 5, "search"), candidate("full"))
    assert [point.position for point in run.path] == [0, 4, 8, 12]
    assert run.path[-1].loss < run.path[0].loss
    assert run.path[0].retention == {"old": 1.0}
    assert run.trainable == run.total == sum(p.numel() for p in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.training
    assert all(p.requires_grad for p in module.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_equal_seeds_give_equal_runs_and_others_do_not():
    setup = setup_of(Plain())
    run, again = (run_trial(setup, Spec("full", 0, 5, "search"), "full") for _ in range(2))
    assert (again.path, again.line) == (run.path, run.line)
    assert run_trial(setup, Spec("full", 0, 6, "search"), "full").path[-1].loss != run.path[-1].loss


def test_way_back_begins_at_the_pretrained_weights_and_ends_at_the_trained_ones():
    module = Images()
    kept = []

    def remember(trained):
        kept.append(trained)
        return []

    setup = setup_of(module, ImageData, image_probe, blends=4)
    run = run_trial(setup, Spec("mine", 0, 5, "all"), Candidate("mine", remember))
    assert [point.position for point in run.line] == [0, 0.25, 0.5, 0.75, 1.0]
    assert run.line[0].loss == run.path[0].loss
    assert (run.line[-1].loss, run.line[-1].retention) == (run.path[-1].loss, run.path[-1].retention)
    # The trained module is at the end of the way again; halfway is the mean of both, BatchNorm's statistics included.
    (trained,) = kept
    data = ImageData()
    data.setup("fit")
    images, labels = data.data.tensors
    half = Images().eval()
    half.load_state_dict({n: (v + trained.state_dict()[n]) / 2 for n, v in module.state_dict().items()})
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(half(images), labels)
    assert run.line[2].loss == pytest.approx(float(loss), rel=1e-4)


@pytest.mark.parametrize("name", ["lora r4", "kappa 0.5"])
def test_adapters_are_walked_back_by_their_product(name):
    run = run_trial(setup_of(Plain()), Spec(name, 0, 5, "all"), candidate(name))
    assert len(run.line) == 3
    assert run.line[0].loss == run.path[0].loss
    losses = [point.loss for point in run.line]
    assert losses == sorted(losses, reverse=True)


class Norm(torchmetrics.MeanMetric):
    higher_is_better = True


class Left(pl.Callback):
    """The norm of what a fit leaves in the module, and its loss on the held-out numbers."""

    def on_fit_end(self, trainer, pl_module):
        self.norm = float(norm_of(pl_module))
        with torch.no_grad():
            numbers, labels = number_loaders()[1].dataset.tensors
            self.loss = float(torch.nn.functional.cross_entropy(pl_module(numbers), labels))

    def __deepcopy__(self, memo):
        return self


def norm_of(module):
    return sum(p.detach().norm() for p in module.parameters())


@pytest.mark.parametrize("name", ["lora r4", "kappa 0.5", "full"])
@pytest.mark.parametrize(
    "averaging", [EMAWeightAveraging(decay=0.5), StochasticWeightAveraging(1e-2, swa_epoch_start=1)]
)
def test_loss_and_retention_are_of_the_averages_where_weights_are_averaged(name, averaging):
    left, probe = Left(), Probe([torch.zeros(1), torch.ones(1)], Norm(), lambda module, batch: norm_of(module))
    setup = setup_of(Plain(), probes={"norm": probe}, trainer={"accelerator": "cpu", "callbacks": [averaging, left]})
    run = run_trial(setup, Spec(name, 0, 5, "all"), candidate(name))
    kept = left.norm / run.metrics["norm"]
    # The end of the way back is what the fit leaves in the module.
    assert run.line[-1].retention["norm"] == pytest.approx(kept, rel=1e-5)
    assert run.line[-1].loss == pytest.approx(left.loss, rel=1e-4)
    averaged = isinstance(averaging, EMAWeightAveraging)
    # During a fit a StochasticWeightAveraging validates the weights that train.
    assert (run.path[-1].retention["norm"] == pytest.approx(kept, rel=1e-5)) is averaged
    assert (run.path[-1].loss == pytest.approx(left.loss, rel=1e-4)) is averaged


def test_steps_are_counted_where_accumulation_changes():
    scheduler = GradientAccumulationScheduler({0: 1, 1: 2})
    run = run_trial(
        setup_of(Plain(), trainer={"accelerator": "cpu", "callbacks": scheduler}), Spec("full", 0, 5), "full"
    )
    positions = [point.position for point in run.path]
    assert positions == sorted(set(positions))
    assert positions[-1] == STEPS


def test_run_that_diverges_is_an_outcome():
    run = run_trial(setup_of(Manual()), Spec("full", 60, 5), candidate("full"))
    assert run.path[-1].loss == math.inf or run.path[-1].loss > run.path[0].loss


def test_loss_that_is_not_a_number_ends_the_run_as_diverged(tmp_path):
    class Breaking(Plain):
        def validation_step(self, batch, batch_idx):
            done = self.trainer.global_step
            self.log("val/loss", torch.tensor(math.nan if done > 4 else 1.0))

    run = run_trial(setup_of(Breaking()), Spec("full", 0, 5), candidate("full"))
    assert [point.loss for point in run.path] == [1.0, 1.0, math.inf]
    assert run.path[-1].retention == {"old": 0.0}
    assert run.line == ()
    journal = Journal(tmp_path, {"steps": STEPS})
    journal.add(run)
    assert Journal(tmp_path, {"steps": STEPS}).find(run.spec) == run


def test_steps_are_the_optimizers_under_accumulation():
    setup = setup_of(Plain(), trainer={"accelerator": "cpu", "accumulate_grad_batches": 2})
    run = run_trial(setup, Spec("full", 0, 5), candidate("full"))
    assert [point.position for point in run.path] == [0, 4, 8, 12]


def test_names_of_what_is_logged_help_with_a_wrong_monitor():
    setup = Setup(Plain, number_loaders, number_probe, "val_loss", STEPS, 3, trainer={"accelerator": "cpu"})
    with pytest.raises(ValueError, match="validation logs val/loss"):
        run_trial(setup, Spec("full", 0, 5), candidate("full"))


def test_capability_that_is_not_there_is_named():
    def wrong(module):
        return {"old": AccuracyProbe(DataLoader(TensorDataset(torch.zeros(8, 8), torch.full((8,), 2)), 4))}

    module = Plain()
    module.head.bias.data = torch.tensor([9.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="'old' has accuracy=0 before the first step"):
        run_trial(setup_of(module, probes=wrong), Spec("full", 0, 5), candidate("full"))


def test_halves_share_no_sample_and_are_all():
    x = torch.arange(10.0).reshape(10, 1)
    probe = AccuracyProbe(DataLoader(TensorDataset(x, x[:, 0].long()), batch_size=4))
    halves = [half_of(probe, half) for half in ("search", "confirm", "all")]
    values = [sorted(float(v) for batch in half.dataloader for v in batch[0]) for half in halves]
    assert values == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9], list(range(10))]
    assert halves[0].metric is not probe.metric
    batches = [(x[:2], 0), (x[2:4], 1), (x[4:6], 2)]
    listed = [list(half_of(AccuracyProbe(batches), half).dataloader) for half in ("search", "confirm")]
    assert [[b[1] for b in part] for part in listed] == [[0, 2], [1]]
    with pytest.raises(ValueError, match="one batch"):
        half_of(AccuracyProbe(batches[:1]), "search")


def test_journal_refuses_runs_of_other_settings_and_damaged_files(tmp_path):
    Journal(tmp_path, {"steps": 3, "same": 1})
    with pytest.raises(ValueError, match="steps was 3 and is 4"):
        Journal(tmp_path, {"steps": 4, "same": 1})
    journal = Journal(tmp_path, {"steps": 3, "same": 1})
    spec = Spec("kappa 0.25", -2, 7, "confirm")
    journal.file(spec).write_text('{"format": "kappa')
    with pytest.raises(ValueError, match="is no JSON"):
        journal.find(spec)
    journal.file(spec).write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match="no finished run"):
        journal.find(spec)
    assert journal.file(Spec("kappa-0.25", -2, 7, "confirm")) != journal.file(spec)


def test_interrupted_run_says_so_and_leaves_the_signal_and_the_environment_as_they_were(monkeypatch):
    class Interrupted(Plain):
        def training_step(self, batch, batch_idx):
            raise KeyboardInterrupt

    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run_trial(setup_of(Interrupted()), Spec("full", 0, 5), "full")
    assert signal.getsignal(signal.SIGINT) is handler
    assert "PL_GLOBAL_SEED" not in os.environ
    assert os.environ["PL_SEED_WORKERS"] == "0"


def test_module_with_a_monitored_schedule_its_own_logging_and_the_users_callbacks_goes_through(tmp_path):
    class Usual(Plain):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.logger.experiment.add_scalar("batch", batch_idx, self.global_step)
            folders.append(Path(self.trainer.log_dir))
            (folders[-1] / "batch.txt").write_text(str(batch_idx))

        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val/loss"}}

    epochs, folders = [], []

    class Counting(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            epochs.append(trainer.current_epoch)

        def __deepcopy__(self, memo):
            return self

    callbacks = [ModelCheckpoint(tmp_path), LearningRateMonitor(), RichProgressBar(), Counting()]
    # The first epoch, of six batches, ends before the only validation.
    setup = setup_of(Usual(), evaluations=1, trainer={"accelerator": "cpu", "callbacks": callbacks})
    run = run_trial(setup, Spec("full", 0, 5), "full")
    assert [point.position for point in run.path] == [0, STEPS]
    assert epochs[0] == 0
    assert list(tmp_path.iterdir()) == []
    assert len(set(folders)) == 1
    assert not folders[0].exists()


@pytest.mark.parametrize(
    ("probes", "message"),
    [
        ({}, "probes is a dict of nothing"),
        ([1], "probes is a list"),
        ({"old": 3}, "probes is a dict of int"),
        (lambda module: None, "probes gave a NoneType"),
    ],
)
def test_probes_that_are_none_are_named(probes, message):
    with pytest.raises(TypeError, match=message):
        probes_of(probes, Plain())


def test_error_of_a_run_names_the_candidate_and_the_probe():
    with pytest.raises(ValueError, match="the probe 'old' has one batch") as caught:
        run_trial(setup_of(Plain(), probes={"old": AccuracyProbe([1])}), Spec("mine", 0, 5, "search"), "full")
    assert caught.value.__notes__ == ["in a run of the candidate 'mine'"]


def asked(module, data=None, probes=None, **options):
    return settings_of(setup_of(Plain(), **options), module, data or number_loaders(), probes or number_probe(module))


def test_settings_know_hyperparameters_data_and_probes():
    changed = Plain()
    changed.lr = 0.5
    small = DataLoader(TensorDataset(torch.zeros(9, 8), torch.zeros(9).long()), 8)
    assert asked(Plain()) == asked(Plain())
    assert asked(changed)["hyperparameters"] != asked(Plain())["hyperparameters"]
    assert asked(Plain(), data=(small, small))["data"] != asked(Plain())["data"]
    assert asked(Plain(), probes={"old": AccuracyProbe(small)})["probes"] != asked(Plain())["probes"]
    # The same numbers of samples with other labels are other data.
    relabeled = DataLoader(TensorDataset(torch.zeros(9, 8), torch.ones(9).long()), 8)
    assert asked(Plain(), data=(relabeled, small))["data"] != asked(Plain(), data=(small, small))["data"]
    one, other = ({"old": AccuracyProbe([(torch.zeros(2, 8), torch.full((2,), label))])} for label in (0, 1))
    assert asked(Plain(), probes=one)["probes"] != asked(Plain(), probes=other)["probes"]


def test_settings_of_equal_callbacks_are_equal_and_of_others_differ():
    def told(patience):
        callbacks = [EarlyStopping("val/loss", patience=patience)]
        return asked(Plain(), trainer={"callbacks": callbacks, "precision": 32})

    assert told(2) == told(2)
    assert told(2) != told(3)
    changed = Plain()
    changed.body.bias.data[0] += 1e-3
    assert asked(changed)["weights"] != asked(Plain())["weights"]


def test_journal_refuses_another_candidate_of_the_same_name(tmp_path):
    journal = Journal(tmp_path, {"steps": 3})
    journal.require({"a": [{"max_params": 0.25}], "function": None})
    journal.require({"b": [], "a": [{"max_params": 0.25}]})
    with pytest.raises(ValueError, match=r"another candidate 'a', which was .*0\.25.* and is .*0\.5"):
        journal.require({"a": [{"max_params": 0.5}]})
    assert list(journal.runs()) == []


def test_compiled_module_trains_as_itself():
    module = Plain()
    run = run_trial(setup_of(module), Spec("full", 0, 5), "full")
    module.compile(backend="eager")
    assert run_trial(setup_of(module), Spec("full", 0, 5), "full").path == run.path
    assert all(p.grad is None for p in module.parameters())


def test_function_that_holds_on_to_the_original_is_refused_and_leaves_no_gradient():
    module = Plain()
    body = module.forward
    module.forward = lambda x: body(x)
    with pytest.raises(ValueError, match="training a copy of the module reached"):
        run_trial(setup_of(module), Spec("full", 0, 5), "full")
    assert all(p.grad is None for p in module.parameters())


def test_generator_of_a_loader_begins_from_the_seed_of_the_run():
    generator = torch.Generator().manual_seed(9)
    train, held_out = number_loaders()
    train = DataLoader(train.dataset, train.batch_size, shuffle=True, generator=generator)
    setup = setup_of(Plain(), lambda: (train, held_out))
    state = generator.get_state()
    run = run_trial(setup, Spec("full", 0, 5), "full")
    assert torch.equal(generator.get_state(), state)
    torch.rand(3, generator=generator)
    assert run_trial(setup, Spec("full", 0, 5), "full").path == run.path
    assert run_trial(setup, Spec("full", 0, 6), "full").path != run.path


class Once(IterableDataset):
    """Samples that are gone when they have been read."""

    def __init__(self, samples):
        self.samples = iter(samples)

    def __iter__(self):
        return self.samples


def test_data_that_does_not_suffice_is_refused():
    train, held_out = number_loaders()
    short = DataLoader(Once([train.dataset[i] for i in range(2 * train.batch_size)]), train.batch_size)
    with pytest.raises(ValueError, match=f"gave 2 batches and gives no more when it is read again, and {STEPS} steps"):
        run_trial(setup_of(Plain(), lambda: (short, held_out)), Spec("full", 0, 5), "full")
    none = DataLoader(train.dataset, len(train.dataset) + 1, drop_last=True)
    with pytest.raises(ValueError, match="train dataloader gives no batch"):
        run_trial(setup_of(Plain(), lambda: (none, held_out)), Spec("full", 0, 5), "full")
    with pytest.raises(ValueError, match="ran no batch"):
        run_trial(setup_of(Plain(), trainer={"accelerator": "cpu", "limit_val_batches": 0}), Spec("full", 0, 5), "full")
    with pytest.raises(TypeError, match="gave 3 dataloaders"):
        run_trial(setup_of(Plain(), lambda: (train, held_out, held_out)), Spec("full", 0, 5), "full")


class Late(Plain):
    """Its layers are made when Lightning asks for them."""

    def __init__(self):
        super().__init__()
        self.made = dict(self.named_children())
        for name in self.made:
            delattr(self, name)

    def configure_model(self):
        for name, layer in self.made.items():
            if not hasattr(self, name):
                setattr(self, name, copy.deepcopy(layer))


def test_module_that_makes_its_layers_late_is_walked_back_too():
    module = Late()
    run = run_trial(setup_of(module), Spec("full", 0, 5), "full")
    assert not list(module.parameters())
    assert run.total == sum(p.numel() for p in Plain().parameters())
    assert [point.position for point in run.line] == [0.0, 0.5, 1.0]


def test_probe_that_shuffles_cannot_be_halved():
    probe = AccuracyProbe(
        DataLoader(TensorDataset(torch.arange(12.0)[:, None], torch.zeros(12).long()), 2, shuffle=True)
    )
    with pytest.raises(ValueError, match="the probe 'old' has a DataLoader that shuffles"):
        half_of(probe, "search", "old")


def test_results_beside_the_runs_are_left_alone(tmp_path):
    journal = Journal(tmp_path, {"steps": STEPS})
    journal.add(run_trial(setup_of(Plain()), Spec("full", -2, 5), "full"))
    (tmp_path / "result.json").write_text("{}")
    assert [run.spec for run in journal.runs()] == [Spec("full", -2, 5)]
