"""What KappaFreezeCallback reports, and what is left of it after one fit, several fits and failed ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ModelSummary, OnExceptionCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from tiny import (
    Bank,
    Spy,
    TinyNet,
    adamw_with_schedule,
    assert_same_tensors,
    events,
    fit,
    group_ids,
    grouped_names,
    loader,
    make_trainer,
    numpy_kappa,
    numpy_ranking,
    snapshot,
    trainable,
)

from kappa_lightning import KappaFreezeCallback, KappaProfile


class Fails(Callback):
    """Raises at a hook, from the n-th call on."""

    def __init__(self, hook: str, calls: int = 1) -> None:
        self.left = calls
        setattr(self, hook, self._count)

    def _count(self, *_: Any, **__: Any) -> None:
        self.left -= 1
        if self.left <= 0:
            raise RuntimeError("power cut")


# Reports


def test_table_of_what_trains_is_logged(tmp_path: Path, lightning_log: pytest.LogCaptureFixture) -> None:
    module = Bank(a=(4, 2.0), b=(6, 3.0), c=(2, 9.0), head=(3, 4.0))
    fit(tmp_path, module, KappaFreezeCallback(num_tensors=2, always_train=["head.*"]))
    lines = [re.sub(r"\s+", " ", line).strip() for line in lightning_log.text.splitlines()]
    # 16 + 36 of 16+4 + 36+6 + 4+2 + 9+3 = 80 parameters
    assert "trains: selected by kappa 2 52 65.0% 2 – 3" in lines
    assert "trains: always_train 2 12 15.0%" in lines
    assert "frozen by kappa 1 4 5.0% 9" in lines
    assert "frozen: vectors 3 12 15.0%" in lines


def test_tensorboard_has_the_full_ranking_as_a_text_table(tmp_path: Path) -> None:
    module = Bank(a=(4, 5.0), b=(4, 2.0), c=(4, 3.0))
    fit(tmp_path, module, KappaFreezeCallback(num_tensors=2), logger=TensorBoardLogger(tmp_path, "", version=""))
    log = events(tmp_path)
    assert log.Tags()["tensors"] == ["kappa/ranking/text_summary"]
    (event,) = log.Tensors("kappa/ranking/text_summary")
    assert event.step == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in _text(event).splitlines()]
    assert [(row[0], row[1], row[2], row[3], row[5]) for row in rows[2:]] == [
        ("1", "b.weight", "4×4", "2", "yes"),
        ("2", "c.weight", "4×4", "3", "yes"),
        ("3", "a.weight", "4×4", "5", ""),
    ]


def _text(event: Any) -> str:
    return event.tensor_proto.string_val[0].decode()


def test_model_summary_shows_the_true_number_of_trainable_parameters(tmp_path: Path) -> None:
    module = Bank(a=(4, 2.0), b=(6, 3.0))
    seen: list[int] = []

    class Summary(ModelSummary):
        @staticmethod
        def summarize(summary_data: Any, total_parameters: int, trainable_parameters: int, *_: Any, **__: Any) -> None:
            seen.extend([total_parameters, trainable_parameters])

    fit(tmp_path, module, KappaFreezeCallback(num_tensors=1), Summary(), enable_model_summary=True)
    assert seen == [62, 16]


def test_default_model_summary_shows_the_true_number_of_trainable_parameters(
    tmp_path: Path, lightning_log: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    module = Bank(a=(4, 2.0), b=(6, 3.0))
    fit(tmp_path, module, KappaFreezeCallback(num_tensors=1), enable_model_summary=True)
    shown = re.sub(r"\s+", " ", lightning_log.text + capsys.readouterr().out)
    assert re.search(r"(16 Trainable params|Trainable params: 16)\b", shown), shown
    assert re.search(r"(46 Non-trainable params|Non-trainable params: 46)\b", shown), shown


# A profile from elsewhere


def test_profile_file_is_written_then_reused_without_decomposing_again(tmp_path: Path, decomposed: list[Any]) -> None:
    path = tmp_path / "profile.json"
    first, second = (KappaFreezeCallback(num_tensors=2, profile=path) for _ in range(2))
    fit(tmp_path, TinyNet(), first)
    assert KappaProfile.load(path) == first.profile
    assert len(decomposed) == 3

    fit(tmp_path, TinyNet(), second)
    assert len(decomposed) == 3
    assert second.profile == first.profile
    assert second.selected_names == first.selected_names == numpy_ranking(TinyNet(), TinyNet.CANDIDATES)[:2]


def test_profile_file_of_other_weights_is_refused(tmp_path: Path) -> None:
    path, module = tmp_path / "profile.json", TinyNet()
    fit(tmp_path, TinyNet(), KappaFreezeCallback(profile=str(path)))
    text = path.read_text()
    with torch.no_grad():
        module.hidden.weight[3, 2] += 1e-6
    with pytest.raises(ValueError, match=r"hidden\.weight"):
        fit(tmp_path, module, KappaFreezeCallback(profile=str(path)))
    assert path.read_text() == text
    assert trainable(module) == [name for name, _ in module.named_parameters()]


def test_profile_object_is_used_as_it_is(tmp_path: Path, decomposed: list[Any]) -> None:
    module = TinyNet()
    profile = KappaProfile.from_model(module, progress=False)
    decomposed.clear()
    callback = KappaFreezeCallback(num_tensors=1, include=["h*"], profile=profile)
    fit(tmp_path, module, callback)
    assert decomposed == []
    assert [row.name for row in callback.profile] == ["hidden.weight", "head.weight"]
    assert callback.selected_names == numpy_ranking(TinyNet(), ["hidden.weight", "head.weight"])[:1]


def test_profile_without_a_candidate_is_refused_by_its_name(tmp_path: Path) -> None:
    module = TinyNet()
    profile = KappaProfile.from_model(module, include=["h*"], progress=False)
    with pytest.raises(ValueError, match=r"conv\.weight"):
        fit(tmp_path, module, KappaFreezeCallback(profile=profile))
    assert trainable(module) == [name for name, _ in module.named_parameters()]


# Several fits


def test_second_fit_of_the_same_trainer_keeps_the_selection(tmp_path: Path, decomposed: list[Any]) -> None:
    module, callback = TinyNet(), KappaFreezeCallback(num_tensors=2)
    trainer = fit(tmp_path, module, callback)
    selected, before = list(callback.selected_names), snapshot(module)
    decomposed.clear()
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, loader())
    assert trainer.global_step == 9
    assert decomposed == []
    assert callback.selected_names == selected
    assert set(trainable(module)) == set(selected)
    (optimizer,) = trainer.optimizers
    assert {name for group in grouped_names(module, optimizer) for name in group} == set(selected)
    moved = {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == set(selected)


def test_new_trainer_profiles_again_and_forgets_the_callbacks_own_freeze(tmp_path: Path) -> None:
    module, callback = Bank(a=(4, 2.0), b=(4, 3.0), c=(4, 4.0)), KappaFreezeCallback(num_tensors=1)
    module.c.requires_grad_(False)
    fit(tmp_path, module, callback)
    assert callback.selected_names == ["a.weight"]
    with torch.no_grad():
        module.a.weight[0] = module.a.weight[1] + 1e-3
    fit(tmp_path, module, callback)
    assert callback.selected_names == ["b.weight"] == trainable(module)
    assert [row.name for row in callback.profile] == ["a.weight", "b.weight"]
    assert callback.profile["a.weight"].kappa > 100


def test_one_callback_serves_two_modules_one_after_the_other(tmp_path: Path) -> None:
    first, second = Bank(a=(4, 2.0), b=(4, 3.0)), Bank(a=(4, 5.0), b=(4, 3.0))
    callback = KappaFreezeCallback(num_tensors=1)
    fit(tmp_path, first, callback)
    fit(tmp_path, second, callback)
    assert (trainable(first), trainable(second)) == (["a.weight"], ["b.weight"])


def test_failure_on_a_second_module_leaves_the_first_as_it_was(tmp_path: Path) -> None:
    first, second = Bank(a=(4, 2.0), b=(4, 3.0)), Bank(a=(4, 5.0), b=(4, 3.0))
    second.b.weight.data[0, 0] = torch.nan
    callback = KappaFreezeCallback(num_tensors=1)
    trainer = fit(tmp_path, first, callback)
    with pytest.raises(ValueError, match=r"b\.weight"):
        fit(tmp_path, second, callback)
    assert trainable(first) == ["a.weight"]
    assert grouped_names(first, trainer.optimizers[0]) == [["a.weight"]]
    assert trainable(second) == [name for name, _ in second.named_parameters()]


def test_refused_new_fit_leaves_the_freeze_of_the_last_one(tmp_path: Path) -> None:
    module, callback = Bank(a=(4, 2.0), b=(4, 3.0)), KappaFreezeCallback(num_tensors=1)
    fit(tmp_path, module, callback)
    module.b.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"b\.weight"):
        fit(tmp_path, module, callback)
    assert trainable(module) == ["a.weight"]
    assert group_ids(module.made) == module.made_groups


def test_unfreeze_gives_back_exactly_what_the_callback_froze(tmp_path: Path) -> None:
    module, callback = TinyNet(), KappaFreezeCallback(num_tensors=1)
    module.conv.requires_grad_(False)
    trainer = fit(tmp_path, module, callback)
    assert group_ids(trainer.optimizers) != module.made_groups
    state_before = {id(parameter) for parameter in trainer.optimizers[0].state}
    callback.unfreeze()
    assert trainable(module) == [name for name, _ in module.named_parameters() if name != "conv.weight"]
    assert group_ids(trainer.optimizers) == module.made_groups
    assert {id(parameter) for parameter in trainer.optimizers[0].state} == state_before
    callback.unfreeze()
    assert group_ids(trainer.optimizers) == module.made_groups


def test_unfreeze_before_any_fit_does_nothing() -> None:
    KappaFreezeCallback().unfreeze()


def test_validate_and_test_alone_freeze_nothing(tmp_path: Path) -> None:
    module, callback = TinyNet(), KappaFreezeCallback()
    make_trainer(tmp_path, callback).validate(module, loader(), verbose=False)
    assert trainable(module) == [name for name, _ in module.named_parameters()]
    assert callback.profile is None


# Failed fits


@pytest.mark.parametrize("hook", ["on_fit_start", "on_sanity_check_start", "on_train_start", "on_train_batch_start"])
@pytest.mark.parametrize("first", [True, False])
def test_exception_before_the_first_step_puts_everything_back(tmp_path: Path, hook: str, first: bool) -> None:
    module, freeze, fails = TinyNet(), KappaFreezeCallback(num_tensors=1), Fails(hook)
    module.conv.requires_grad_(False)
    trainer = make_trainer(tmp_path, *([fails, freeze] if first else [freeze, fails]))
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.fit(module, loader(), loader())
    assert trainable(module) == [name for name, _ in module.named_parameters() if name != "conv.weight"]
    assert group_ids(module.made) == module.made_groups


def test_exception_in_the_middle_gives_requires_grad_back(tmp_path: Path) -> None:
    module, callback = TinyNet(), KappaFreezeCallback(num_tensors=1)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, module, callback, Fails("on_train_batch_end", 2))
    assert trainable(module) == [name for name, _ in module.named_parameters()]
    callback.unfreeze()
    assert group_ids(module.made) == module.made_groups


def _saves(kind: str, folder: Path) -> Callback:
    if kind == "ModelCheckpoint":
        return ModelCheckpoint(folder, filename="cut", save_on_exception=True, every_n_epochs=100)
    return OnExceptionCheckpoint(folder, filename="cut")


def _frozen_by_hand() -> TinyNet:
    """What two selected tensors give without the callback: an optimizer of only these."""

    def configure(module: TinyNet) -> dict[str, Any]:
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)}

    module = TinyNet(configure)
    chosen = numpy_ranking(module, TinyNet.CANDIDATES)[:2]
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in chosen)
    return module


def _cut_and_resume(folder: Path, kind: str, hook: str, call: int, by_hand: bool, freeze_first: bool = True) -> TinyNet:
    """Train with an exception at a call of a hook, and resume from the checkpoint that was saved on it."""
    for attempt, ckpt_path in (("cut", None), ("resumed", folder / "cut" / "cut.ckpt")):
        module = _frozen_by_hand() if by_hand else TinyNet(adamw_with_schedule)
        callbacks = [_saves(kind, folder / attempt)]
        if not by_hand:
            callbacks.insert(0 if freeze_first else 1, KappaFreezeCallback(num_tensors=2))
        if ckpt_path is None:
            with pytest.raises(RuntimeError, match="power cut"):
                fit(folder, module, *callbacks, Fails(hook, call), max_epochs=2)
        else:
            fit(folder, module, *callbacks, ckpt_path=ckpt_path, max_epochs=2)
    return module


@pytest.mark.parametrize(
    ("kind", "hook", "call"),
    [
        ("ModelCheckpoint", "on_train_batch_start", 5),
        ("ModelCheckpoint", "on_train_batch_end", 1),
        ("OnExceptionCheckpoint", "on_train_batch_start", 5),
        ("OnExceptionCheckpoint", "on_before_zero_grad", 1),
    ],
)
@pytest.mark.parametrize("freeze_first", [True, False])
def test_checkpoint_saved_on_an_exception_resumes_like_one_of_a_module_frozen_by_hand(
    tmp_path: Path, kind: str, hook: str, call: int, freeze_first: bool
) -> None:
    by_hand = _cut_and_resume(tmp_path / "by hand", kind, hook, call, by_hand=True)
    module = _cut_and_resume(tmp_path / "callback", kind, hook, call, by_hand=False, freeze_first=freeze_first)
    assert module.losses == by_hand.losses
    assert_same_tensors(snapshot(module), snapshot(by_hand))
    assert trainable(module) == trainable(by_hand)


@pytest.mark.parametrize("kind", ["ModelCheckpoint", "OnExceptionCheckpoint"])
def test_checkpoint_saved_on_an_exception_right_after_a_resume_resumes(tmp_path: Path, kind: str) -> None:
    def twice_resumed(folder: Path, make: Any, *freeze: type[Callback]) -> TinyNet:
        def callbacks() -> list[Any]:
            return [kind(num_tensors=2) for kind in freeze]

        fit(folder, make(), *callbacks()).save_checkpoint(folder / "one.ckpt")
        with pytest.raises(RuntimeError, match="power cut"):
            fit(
                folder,
                make(),
                *callbacks(),
                _saves(kind, folder),
                Fails("on_train_batch_start"),
                ckpt_path=folder / "one.ckpt",
                max_epochs=2,
            )
        module = make()
        fit(folder, module, *callbacks(), ckpt_path=folder / "cut.ckpt", max_epochs=2)
        return module

    by_hand = twice_resumed(tmp_path / "by hand", _frozen_by_hand)
    module = twice_resumed(tmp_path / "callback", lambda: TinyNet(adamw_with_schedule), KappaFreezeCallback)
    assert module.losses == by_hand.losses
    assert_same_tensors(snapshot(module), snapshot(by_hand))


def test_fit_after_a_failed_one_starts_afresh(tmp_path: Path) -> None:
    module, callback = TinyNet(), KappaFreezeCallback(num_tensors=2)
    expected = numpy_ranking(module, TinyNet.CANDIDATES)[:2]
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, module, callback, Fails("on_train_start"))
    fit(tmp_path, module, callback)
    assert callback.selected_names == expected
    assert set(trainable(module)) == set(expected)


# Configuration


def test_lightning_cli_yaml_holds_every_plain_argument(tmp_path: Path) -> None:
    arguments = {
        "max_params": 0.25,
        "criterion": "reversed:random",
        "within": "shape",
        "seed": 3,
        "include": ["*.weight"],
        "exclude": ["embed.*"],
        "always_train": ["head.*"],
        "train_vectors": True,
        "solver": "svd",
        "rtol": 0.01,
        "experts": "median",
        "profile": str(tmp_path / "profile.json"),
    }
    callbacks = [
        {"class_path": "kappa_lightning.KappaFreezeCallback", "init_args": arguments},
        {
            "class_path": "kappa_lightning.KappaMonitor",
            "init_args": {"every_n_epochs": 2, "tensors": ["head.*"], "figures": False},
        },
    ]
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks, "accelerator": "cpu", "logger": False}}))
    cli = LightningCLI(
        _Configurable, run=False, save_config_callback=None, args=["--config", str(config)], seed_everything_default=0
    )
    freeze, monitor = cli.trainer.callbacks[:2]
    assert isinstance(freeze, KappaFreezeCallback)
    assert str(freeze.budget) == "max_params=0.25"
    found = {
        "max_params": freeze.budget.max_params,
        "criterion": freeze.criterion,
        "within": freeze.within,
        "seed": freeze.seed,
        "include": list(freeze.include),
        "exclude": list(freeze.exclude),
        "always_train": list(freeze.always_train),
        "train_vectors": freeze.train_vectors,
        "solver": freeze.solver,
        "experts": freeze.experts,
        "rtol": freeze.rtol,
        "profile": str(freeze.profile_path),
    }
    assert found == arguments
    assert (monitor.every_n_epochs, list(monitor.tensors), monitor.figures) == (2, ["head.*"], False)


@pytest.mark.parametrize("budget", [{"top_p": 0.5}, {"num_tensors": 3}, {"max_kappa": 10.0}, {"max_params": 1000}])
def test_lightning_cli_yaml_keeps_the_type_of_each_budget(tmp_path: Path, budget: dict[str, Any]) -> None:
    callback = {"class_path": "kappa_lightning.KappaFreezeCallback", "init_args": budget}
    cli = LightningCLI(
        _Configurable,
        run=False,
        save_config_callback=None,
        args=["--config", yaml.safe_dump({"trainer": {"callbacks": [callback], "logger": False}})],
    )
    freeze = cli.trainer.callbacks[0]
    ((name, value),) = budget.items()
    assert getattr(freeze.budget, name) == value
    assert type(getattr(freeze.budget, name)) is type(value)


class _Configurable(TinyNet):
    """LightningCLI reads its arguments from the signature: none."""

    def __init__(self) -> None:
        super().__init__()


def test_freeze_in_one_hook_is_seen_by_callbacks_at_train_start_whatever_the_order(tmp_path: Path) -> None:
    seen: list[list[str]] = []
    module, spy = TinyNet(), Spy(on_train_start=lambda _, m: seen.append(trainable(m)))
    best = numpy_ranking(module, TinyNet.CANDIDATES)[0]
    fit(tmp_path, module, spy, KappaFreezeCallback(num_tensors=1))
    assert seen == [[best]]
    assert numpy_kappa(dict(TinyNet().named_parameters())[best]) == min(
        numpy_kappa(p) for n, p in TinyNet().named_parameters() if n in TinyNet.MATRICES
    )
