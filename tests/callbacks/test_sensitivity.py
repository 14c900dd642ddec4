"""SensitivityFreezeCallback in a Trainer: what it chooses, and that measuring leaves no trace."""

import threading
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from tiny import (
    Spy,
    TinyNet,
    adamw,
    assert_same_tensors,
    events,
    grouped_names,
    loader,
    make_trainer,
    random_state,
    snapshot,
    trainable,
)
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from kappa_lightning import KappaFreezeCallback, KappaProfile, SensitivityFreezeCallback, SensitivityProfile
from kappa_lightning.probes import Gaussian, TaskInputs


def shuffled(generator=None, **options):
    tensors = loader().dataset.tensors
    return DataLoader(TensorDataset(*tensors), batch_size=8, shuffle=True, generator=generator, **options)


def fit(root, module, *callbacks, data=None, ckpt_path=None, **options):
    trainer = make_trainer(root, *callbacks, **options)
    trainer.fit(module, loader() if data is None else data, ckpt_path=ckpt_path)
    return trainer


def everything(**options):
    return SensitivityFreezeCallback(top_p=1.0, exclude=(), train_vectors=True, **options)


def direct_profile(module, seed=0, batches=3):
    """What a user gets without a Trainer from the same batches."""
    return SensitivityProfile.from_model(
        module, list(loader())[:batches], lambda net, batch: net.loss(batch), reference="inputs", seed=seed,
        progress=False,
    )  # fmt: skip


def test_choice_is_that_of_the_profile_of_the_untrained_module(tmp_path):
    callback, module = SensitivityFreezeCallback(num_tensors=2, method="gradient"), TinyNet()
    expected = direct_profile(TinyNet())
    fit(tmp_path, module, callback)
    # The embedding is no candidate.
    assert [row.name for row in callback.profile] == ["conv.weight", "hidden.weight", "head.weight"]
    for row in expected:
        assert callback.profile[row.name].signal == pytest.approx(row.signal, rel=1e-5)
        assert callback.profile[row.name].sensitivity == pytest.approx(row.sensitivity, rel=1e-5)
    assert callback.selected_names == expected.select(num_tensors=2)
    assert sorted(callback.trained_names) == sorted(callback.selected_names) == sorted(trainable(module))
    assert sorted(*grouped_names(module, module.made[0])) == sorted(callback.trained_names)
    assert "embed.weight" in callback.frozen_names


class Counted(IterableDataset):
    """A stream that goes on from where it was read last."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        tokens, labels = loader().dataset.tensors
        while self.at < len(tokens):
            self.at += 1
            yield tokens[self.at - 1], labels[self.at - 1]


class Wrapped(IterableDataset):
    """Counts in a dict, and draws from a generator of its own, around another stream that counts."""

    __slots__ = ("seen",)

    def __init__(self):
        self.stream, self.state, self.generator, self.seen = Counted(), {"at": 0}, torch.Generator(), []
        self.lock = threading.Lock()

    def __getstate__(self):
        raise TypeError("a live connection")

    def __iter__(self):
        for tokens, labels in self.stream:
            self.state["at"] += 1
            self.seen.append((self.state["at"], torch.rand((), generator=self.generator).item()))
            yield tokens, labels


class Held(Counted):
    def __init__(self):
        super().__init__()
        self.lines = super().__iter__()

    def __iter__(self):
        return self.lines


def loaders_of(stream):
    return DataLoader(stream(), 8)


def combined_of(stream):
    return CombinedLoader([DataLoader(stream(), 8)], "min_size")


class First(TinyNet):
    """Of what a combined loader gives it takes the first batch."""

    def loss(self, batch):
        return super().loss(batch[0] if isinstance(batch[0], list) else batch)

    def forward(self, tokens):
        return super().forward(tokens[0] if isinstance(tokens, list) else tokens)


@pytest.mark.parametrize("stream", [Counted, Wrapped])
@pytest.mark.parametrize("data_of", [loaders_of, combined_of])
def test_stream_that_counts_how_far_it_was_read_loses_nothing(tmp_path, stream, data_of):
    plain, data = First(), data_of(stream)
    steps = fit(tmp_path, plain, data=data, max_epochs=1).global_step
    callback, module, again = everything(method="gradient"), First(), data_of(stream)
    assert fit(tmp_path, module, callback, data=again, max_epochs=1).global_step == steps == 3
    assert len(callback.profile) == 4
    assert_same_tensors(snapshot(module), snapshot(plain))
    if stream is Wrapped:
        one, other = (getattr(each, "flattened", [each])[0].dataset for each in (data, again))
        assert one.seen == other.seen


def test_stream_that_cannot_be_copied_is_named(tmp_path):
    class Own(DataLoader):
        pass

    for data, message in (
        (DataLoader(Held(), 8), r"Held holds an iterator \(lines\): if it reads on from there"),
        (Own(Counted(), 8), "Own reads a stream: if it goes on from where it was read last"),
    ):
        with pytest.warns(UserWarning, match=message):
            fit(tmp_path, TinyNet(), SensitivityFreezeCallback(num_tensors=2), data=data, max_epochs=1)


def test_without_a_budget_the_set_of_least_predicted_forgetting_trains(tmp_path):
    callback = SensitivityFreezeCallback()
    fit(tmp_path, TinyNet(), callback)
    assert callback.selected_names == callback.profile.select()


@pytest.mark.parametrize("method", ["gradient", "path", "trial"])
def test_run_in_which_everything_trains_is_that_without_the_callback(tmp_path, method):
    def run(*callbacks):
        torch.manual_seed(11)
        module, generator = TinyNet(dropout=0.3), torch.Generator().manual_seed(4)
        seen = []
        spy = Spy(on_train_start=lambda trainer, module: seen.append((random_state(), snapshot(module))))
        fit(tmp_path, module, *callbacks, spy, data=shuffled(generator), max_epochs=2)
        return module, seen[0], generator.get_state()

    plain, (plain_numbers, plain_start), plain_generator = run()
    module, (numbers, start), generator = run(everything(method=method))
    assert numbers == plain_numbers
    assert_same_tensors(start, plain_start)
    assert torch.equal(generator, plain_generator)
    # Measuring itself calls the training step, which remembers its losses: those, too, are put back.
    assert module.losses == plain.losses
    assert_same_tensors(snapshot(module), snapshot(plain))


def test_optimizer_and_scheduler_are_untouched_when_everything_trains(tmp_path):
    states = {}
    for name, callbacks in {"with": [everything(method="trial")], "without": []}.items():
        module = TinyNet()
        fit(tmp_path, module, *callbacks)
        states[name] = module.made[0].state_dict()
    assert states["with"]["param_groups"] == states["without"]["param_groups"]
    for index, entries in states["without"]["state"].items():
        assert all(torch.equal(entries[key], states["with"]["state"][index][key]) for key in entries)


class Logging(TinyNet):
    """Logs, and looks at its logger, in every step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        self.log_dict({"twice": 2 * loss})
        self.logger.experiment.add_scalar("mine", loss, self.global_step)
        return loss


def test_measuring_logs_nothing(tmp_path):
    logger = pl.loggers.TensorBoardLogger(tmp_path, name="", version="")
    fit(tmp_path, Logging(), SensitivityFreezeCallback(num_tensors=1), logger=logger, log_every_n_steps=1)
    found = events(tmp_path)
    assert len(found.Scalars("loss")) == len(found.Scalars("mine")) == 3
    assert "log" not in vars(Logging())


def test_tensorboard_gets_the_ranking(tmp_path):
    logger = pl.loggers.TensorBoardLogger(tmp_path, name="", version="")
    callback = SensitivityFreezeCallback(num_tensors=1, method="gradient")
    fit(tmp_path, TinyNet(), callback, logger=logger)
    (event,) = events(tmp_path).Tensors("sensitivity/ranking/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    lines = [line for line in text.splitlines() if line.startswith("| ") and "tensor" not in line]
    assert [line.split("|")[2].strip() for line in lines] == [row.name for row in callback.profile.rank()]
    assert [line.rstrip(" |").endswith("yes") for line in lines] == [True, False, False]


def test_table_says_what_trains(tmp_path, lightning_log):
    fit(tmp_path, TinyNet(), SensitivityFreezeCallback(num_tensors=1), enable_progress_bar=False)
    assert "SensitivityFreezeCallback(num_tensors=1)" in lightning_log.text
    assert "trains: selected by signal over sensitivity" in lightning_log.text
    assert "b²/(c·n) range" in lightning_log.text
    assert "κ" not in lightning_log.text


def test_table_says_what_is_left_of_the_budget_and_the_range_of_rates(tmp_path, lightning_log):
    callback = SensitivityFreezeCallback(max_params=0.6, rates=True)
    fit(tmp_path, TinyNet(), callback, enable_progress_bar=False)
    everything = sum(row.num_parameters for row in callback.profile)
    left = int(0.6 * everything) - sum(callback.profile[name].num_parameters for name in callback.selected_names)
    assert f"max_params=0.6, rates ∝ b/c): {left:,} of {int(0.6 * everything):,} parameters" in lightning_log.text
    assert "rate range" in lightning_log.text


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1)


def test_signal_is_that_of_the_optimizer_that_trains(tmp_path):
    callback = SensitivityFreezeCallback(num_tensors=1, method="gradient")
    fit(tmp_path, TinyNet(sgd), callback)
    assert callback.profile.optimizer == "sgd"
    assert callback.profile["hidden.weight"].signal != pytest.approx(direct_profile(TinyNet())["hidden.weight"].signal)


def test_rates_take_the_place_of_freezing(tmp_path):
    callback, module = SensitivityFreezeCallback(rates=True, train_vectors=True, exclude=()), TinyNet(sgd)
    start = snapshot(module)
    gradients = {}

    def keep(trainer, module, *_):
        gradients.update({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})

    fit(tmp_path, module, callback, Spy(on_before_optimizer_step=keep), max_steps=1)
    assert callback.rates == pytest.approx(callback.profile.rates())
    assert sorted(callback.selected_names) == sorted(TinyNet.MATRICES)
    for name in TinyNet.MATRICES:
        expected = start[name] - 0.1 * callback.rates[name] * gradients[name]
        torch.testing.assert_close(module.get_parameter(name).detach(), expected)
    bias = start["head.bias"] - 0.1 * gradients["head.bias"]
    torch.testing.assert_close(module.head.bias.detach(), bias)


def test_resumed_run_goes_on_with_choice_and_rates_and_measures_nothing(tmp_path):
    options = {"num_tensors": 2, "rates": True}
    whole = TinyNet()
    fit(tmp_path, whole, SensitivityFreezeCallback(**options), max_epochs=2)
    first, module = SensitivityFreezeCallback(**options), TinyNet()
    trainer = fit(tmp_path, module, first, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    resumed, later = SensitivityFreezeCallback(**options), TinyNet()
    later.losses = []
    fit(tmp_path, later, resumed, max_epochs=2, ckpt_path=tmp_path / "first.ckpt")
    assert (resumed.selected_names, resumed.rates) == (first.selected_names, first.rates)
    assert resumed.profile == first.profile
    assert len(later.losses) == 3
    assert_same_tensors(snapshot(later), snapshot(whole))


def test_accumulation_and_clipping_change_nothing_of_the_choice(tmp_path):
    profiles = []
    for options in ({}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}):
        callback = SensitivityFreezeCallback(num_tensors=1)
        fit(tmp_path, TinyNet(), callback, **options)
        profiles.append(callback.profile)
    assert profiles[0] == profiles[1]


def test_mixed_precision_measures_in_that_precision(tmp_path):
    seen = []
    module = TinyNet()
    module.head.register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    callback = SensitivityFreezeCallback(num_tensors=1, method="gradient")
    fit(tmp_path, module, callback, precision="bf16-mixed")
    assert set(seen) == {torch.bfloat16}
    expected = direct_profile(TinyNet())
    for row in callback.profile:
        assert row.signal == pytest.approx(expected[row.name].signal, rel=0.05)


@pytest.mark.parametrize("method", ["path", "trial"])
def test_passes_that_are_compared_are_in_full_precision(tmp_path, method):
    seen = {True: set(), False: set()}
    module = TinyNet()
    module.head.register_forward_hook(lambda layer, inputs, output: seen[module.training].add(output.dtype))
    callback = SensitivityFreezeCallback(num_tensors=1, method=method)
    fit(tmp_path, module, callback, precision="bf16-mixed", limit_val_batches=0, limit_train_batches=1, max_epochs=1)
    # Steps of training are in the user's precision, differences between passes are not.
    assert torch.bfloat16 in seen[True]
    assert seen[False] == {torch.float32}
    exact = SensitivityFreezeCallback(num_tensors=1, method=method)
    fit(tmp_path, TinyNet(), exact, limit_val_batches=0, limit_train_batches=1, max_epochs=1)
    for row in callback.profile:
        assert row.sensitivity == pytest.approx(exact.profile[row.name].sensitivity, rel=0.1)


def test_weights_in_half_precision_are_warned_of_where_a_movement_is_measured(tmp_path):
    with pytest.warns(UserWarning, match="is stored as bfloat16"):
        fit(tmp_path, TinyNet(), SensitivityFreezeCallback(num_tensors=1, method="path"), precision="bf16-true")


class Manual(TinyNet):
    def __init__(self, configure=adamw):
        super().__init__(configure)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        loss = self.loss(batch)
        self.manual_backward(loss)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.step()
            optimizer.zero_grad()


def two(module):
    matrices = [p for p in module.parameters() if p.ndim > 1]
    return [
        torch.optim.AdamW(matrices, lr=0.01),
        torch.optim.SGD([p for p in module.parameters() if p.ndim < 2], lr=0.1),
    ]


def test_manual_optimization_is_refused_before_anything_happens(tmp_path):
    module = Manual(two)
    before = snapshot(module)
    with pytest.raises(ValueError, match=r"automatic_optimization=False.*adaptation_loss\(self, batch\)"):
        fit(tmp_path, module, SensitivityFreezeCallback())
    assert module.made == []
    assert_same_tensors(snapshot(module), before)


def test_several_optimizers_are_supported_where_the_module_says_its_loss(tmp_path):
    class Says(Manual):
        def adaptation_loss(self, batch):
            return self.loss(batch)

    callback, module = SensitivityFreezeCallback(num_tensors=1, method="gradient"), Says(two)
    fit(tmp_path, module, callback)
    assert callback.selected_names == direct_profile(TinyNet()).select(num_tensors=1)
    assert callback.profile.optimizer == "adam"
    assert [len(group["params"]) for optimizer in module.made for group in optimizer.param_groups] == [1, 0]


class Regression(TinyNet):
    def loss(self, batch):
        return (self(batch[0]) - batch[1][:, None]).square().mean()


def regression_data():
    tokens, labels = loader().dataset.tensors
    return DataLoader(TensorDataset(tokens, labels.float()), batch_size=8)


def test_module_whose_outputs_may_be_anything_is_an_error_that_leaves_it_alone(tmp_path):
    module = Regression()
    before, callback = snapshot(module), SensitivityFreezeCallback()
    with pytest.raises(TypeError, match=r"output_distribution\(self, batch\)"):
        fit(tmp_path, module, callback, data=regression_data())
    assert trainable(module) == [name for name, _ in module.named_parameters()]
    assert grouped_names(module, module.made[0]) == [trainable(module)]
    assert_same_tensors(snapshot(module), before)
    assert callback.profile is None


def test_regression_trains_once_its_outputs_are_said(tmp_path):
    reference = TaskInputs(output=lambda module, batch: Gaussian(module(batch[0]), scale=0.5))
    callback = SensitivityFreezeCallback(num_tensors=1, reference=reference)
    fit(tmp_path, Regression(), callback, data=regression_data())
    assert len(callback.trained_names) == 1


def test_dataloader_of_the_user_is_the_reference(tmp_path):
    tokens = torch.randint(11, (4, 5, 7))
    callback = SensitivityFreezeCallback(num_tensors=1, reference=[[each] for each in tokens])
    fit(tmp_path, TinyNet(), callback)
    assert callback.profile.settings.rows == 20


def test_path_of_the_callback_trains_what_always_trains(tmp_path):
    def signals(**patterns):
        callback = SensitivityFreezeCallback(num_tensors=1, method="path", include=["hidden.weight"], **patterns)
        fit(tmp_path, TinyNet(), callback)
        return callback.profile["hidden.weight"].signal

    assert signals(always_train=["head.*"]) != signals()
    assert signals(train_vectors=True) not in (signals(), signals(always_train=["head.*"]))


@pytest.mark.parametrize("patterns", [{}, {"always_train": ["head.*"]}, {"train_vectors": True}])
def test_what_trains_alongside_is_all_that_trains_beside_the_choice(tmp_path, patterns):
    class Told(SensitivityFreezeCallback):
        def choose(self, trainer, module, candidates, alongside, processes):
            self.told = set(alongside)
            return super().choose(trainer, module, candidates, alongside, processes)

    # The bias of a layer that the other callback is in charge of is not this one's.
    other = KappaFreezeCallback(num_tensors=1, include=["conv.*"])
    callback = Told(num_tensors=1, include=["hidden.*", "norm.*"], **patterns)
    trainer = make_trainer(tmp_path, callback, other, max_epochs=1)
    trainer.fit(TinyNet(), loader())
    assert callback.told == set(callback.trained_names) - set(callback.selected_names) - set(other.trained_names)


def test_asking_about_the_tasks_own_inputs_is_said_unless_it_was_asked_for(tmp_path):
    with pytest.warns(UserWarning, match="asked it about the new task's own inputs"):
        fit(tmp_path, TinyNet(), SensitivityFreezeCallback(num_tensors=1))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*own inputs")
        fit(tmp_path, TinyNet(), SensitivityFreezeCallback(num_tensors=1, reference="inputs"))


def test_profile_is_saved_and_read_again(tmp_path):
    path = tmp_path / "sensitivity.json"
    first = SensitivityFreezeCallback(num_tensors=1, profile=path)
    fit(tmp_path, TinyNet(), first)
    again, module = SensitivityFreezeCallback(num_tensors=1, profile=path), TinyNet()
    fit(tmp_path, module, again)
    assert again.profile == first.profile == SensitivityProfile.load(path)
    assert len(module.losses) == 3  # of training alone
    other = TinyNet()
    other.hidden.weight.data += 1
    with pytest.raises(ValueError, match=r"the content of hidden\.weight differs"):
        fit(tmp_path, other, SensitivityFreezeCallback(profile=path))


def test_number_of_batches_is_limited_by_the_trainer(tmp_path):
    for options, expected in (({}, 3), ({"limit_train_batches": 2}, 2), ({"fast_dev_run": 1}, 1)):
        callback = SensitivityFreezeCallback(num_tensors=1)
        fit(tmp_path, TinyNet(), callback, **options)
        assert callback.profile.settings.batches == expected


def test_tensor_that_the_reference_does_not_reach_is_warned_of(tmp_path):
    class Extra(TinyNet):
        def __init__(self):
            super().__init__()
            self.aside = nn.Linear(5, 5)

        def loss(self, batch):
            return super().loss(batch) + self.aside(torch.ones(5)).square().mean()

    callback = SensitivityFreezeCallback()
    with pytest.warns(UserWarning, match=r"does not reach 1 candidate\(s\), aside\.weight first"):
        fit(tmp_path, Extra(), callback)
    assert "aside.weight" not in callback.trained_names


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_p": 0.5, "num_tensors": 2}, ValueError, "exactly one budget"),
        ({"method": "guess"}, ValueError, "method='guess' is unknown"),
        ({"batches": 0}, ValueError, "batches=0 must be at least 1"),
        ({"batches": 1.5}, TypeError, "batches=1.5"),
        ({"reference": "wikitext"}, ValueError, "reference='wikitext' is unknown"),
        ({"exclude": "@embeddings"}, TypeError, "exclude='@embeddings' is one string"),
        ({"profile": KappaProfile([])}, TypeError, "profile is a KappaProfile: give a SensitivityProfile, or the path"),
    ],
)
def test_argument_that_is_none_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        SensitivityFreezeCallback(**options)


def test_failed_measurement_leaves_everything_as_it_was(tmp_path):
    class Failing(TinyNet):
        def loss(self, batch):
            return super().loss(batch) * float("nan")

    module, callback = Failing(), everything()
    callback_before = random_state()
    before = snapshot(module)
    with pytest.raises(ValueError, match="the loss is nan"):
        fit(tmp_path, module, callback)
    assert random_state() == callback_before
    assert_same_tensors(snapshot(module), before)
    assert all(p.grad is None and p.requires_grad for p in module.parameters())


def test_two_callbacks_choose_for_parts_of_a_model(tmp_path):
    one = SensitivityFreezeCallback(num_tensors=1, include=("hidden.*", "head.*"))
    other = KappaFreezeCallback(num_tensors=1, include=("embed.*", "conv.*"), exclude=())
    fit(tmp_path, TinyNet(), one, other)
    assert len(one.trained_names) == len(other.trained_names) == 1


def test_lightning_cli_yaml_holds_every_plain_argument(tmp_path):
    import yaml
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.demos.boring_classes import BoringModel

    arguments = {
        "max_params": 0.5, "reference": "inputs", "method": "trial", "batches": 4, "rates": True, "include": ["*"],
        "exclude": ["@embeddings", "@head"], "always_train": ["@head"], "train_vectors": True, "seed": 3,
        "profile": str(tmp_path / "profile.json"), "draws": 2,
    }  # fmt: skip
    callbacks = [{"class_path": "kappa_lightning.SensitivityFreezeCallback", "init_args": arguments}]
    text = {
        "class_path": "kappa_lightning.SensitivityFreezeCallback",
        "init_args": {
            "num_tensors": 3,
            "include": ["layer.*"],
            "reference": {"class_path": "kappa_lightning.probes.GeneratedText", "init_args": {"num_sequences": 5}},
        },
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"trainer": {"callbacks": [*callbacks, text], "logger": False}}))
    cli = LightningCLI(BoringModel, run=False, save_config_callback=None, args=["--config", str(config)])
    one, other = (c for c in cli.trainer.callbacks if isinstance(c, SensitivityFreezeCallback))
    expected = SensitivityFreezeCallback(**arguments)
    assert one.all_arguments() == expected.all_arguments()
    assert other.reference.num_sequences == 5
    assert other.budget.num_tensors == 3


class Mixture(TinyNet):
    """With three experts in one tensor, each used to another degree."""

    def __init__(self, configure=adamw):
        super().__init__(configure)
        self.experts = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, tokens):
        features = self.norm(self.conv(self.embed(tokens).mT)).relu().mean(-1)
        hidden = self.hidden(features).tanh()
        mixed = sum(
            weight * (hidden @ expert).tanh() for weight, expert in zip((0.1, 1.0, 3.0), self.experts, strict=True)
        )
        return self.head(mixed)


@pytest.mark.parametrize("method", ["gradient", "path", "trial"])
def test_single_experts_train_and_the_others_stay(tmp_path, method):
    callback, module = (
        SensitivityFreezeCallback(num_tensors=2, include=("experts",), experts="each", method=method),
        Mixture(),
    )
    before = module.experts.detach().clone()
    fit(tmp_path, module, callback)
    assert [row.name for row in callback.profile] == ["experts[0]", "experts[1]", "experts[2]"]
    assert [row.num_parameters for row in callback.profile] == [64] * 3
    moved = [f"experts[{i}]" for i in range(3) if not torch.equal(module.experts[i], before[i])]
    assert moved == sorted(callback.selected_names)
    assert len(moved) == 2
    whole = SensitivityFreezeCallback(num_tensors=1, include=("experts",), method=method)
    fit(tmp_path, Mixture(), whole)
    parts = {figure: sum(getattr(row, figure) for row in callback.profile) for figure in ("signal", "sensitivity")}
    if method == "path":  # which knows what the experts change together
        parts["sensitivity"] = callback.profile.interactions.sum()
    if method != "trial":
        for figure, value in parts.items():
            assert getattr(whole.profile["experts"], figure) == pytest.approx(value, rel=5e-2)
    callback.profile.check(Mixture().requires_grad_(True))


class Seeing(pl.LightningModule):
    """A classifier of images, which are what it can change."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def test_classifier_of_images_is_asked_on_what_it_synthesizes_along_what_it_moves(tmp_path):
    numbers = torch.Generator().manual_seed(1)
    images, labels = torch.rand(16, 1, 4, 4, generator=numbers), torch.randint(3, (16,), generator=numbers)
    data = DataLoader(TensorDataset(images, labels), batch_size=8)
    callback, module = SensitivityFreezeCallback(num_tensors=1), Seeing()
    fit(tmp_path, module, callback, data=data)
    other = Seeing()
    expected = SensitivityProfile.from_model(
        other, list(data), lambda net, batch: net.training_step(batch, 0), reference="synthesized", method="path",
        optimizers=[other.configure_optimizers()], progress=False,
    )  # fmt: skip
    assert callback.profile.settings == expected.settings
    assert callback.profile.interactions == pytest.approx(expected.interactions, rel=1e-4)
    assert callback.selected_names == expected.select(num_tensors=1)
    moved = [name for name, p in module.named_parameters() if not torch.equal(p, Seeing().get_parameter(name))]
    assert moved == callback.trained_names
