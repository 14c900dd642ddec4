"""What KappaFreezeCallback selects, and that only that trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tiny import (
    Bank,
    Spy,
    TinyNet,
    adamw,
    assert_same_tensors,
    bank_loader,
    fit,
    grouped_names,
    loader,
    make_trainer,
    numpy_kappa,
    numpy_ranking,
    random_state,
    snapshot,
    trainable,
)
from torch import Tensor, nn

from kappa_lightning import KappaFreezeCallback


def test_lowest_kappa_tensors_by_numpy_train_and_everything_else_is_frozen(tmp_path: Path) -> None:
    module, callback = TinyNet(), KappaFreezeCallback(num_tensors=2)
    ranking = numpy_ranking(module, TinyNet.CANDIDATES)
    fit(tmp_path, module, callback)
    assert callback.selected_names == ranking[:2]
    assert set(trainable(module)) == set(ranking[:2])
    assert set(callback.trained_names) == set(ranking[:2])


def test_profile_has_the_kappas_of_numpy(tmp_path: Path) -> None:
    module, callback = TinyNet(), KappaFreezeCallback(num_tensors=1)
    expected = {name: numpy_kappa(dict(module.named_parameters())[name]) for name in TinyNet.CANDIDATES}
    fit(tmp_path, module, callback)
    assert {row.name for row in callback.profile} == set(TinyNet.CANDIDATES)
    for name, kappa in expected.items():
        assert callback.profile[name].kappa == pytest.approx(kappa, rel=1e-9)


def test_without_a_budget_a_fifth_of_the_tensors_trains(tmp_path: Path) -> None:
    module = Bank(**{f"layer{i}": (3, 20.0 - i) for i in range(11)})
    callback = KappaFreezeCallback()
    fit(tmp_path, module, callback)
    assert callback.selected_names == ["layer10.weight", "layer9.weight"]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        # κ: b 2, d 3, a 5, c 9; parameters: b 36, d 64, a 16, c 4, of 120 in all.
        ({"top_p": 0.5}, ["b", "d"]),
        ({"top_p": 0.74}, ["b", "d"]),
        ({"top_p": 0.01}, ["b"]),
        ({"top_p": 1.0}, ["b", "d", "a", "c"]),
        ({"num_tensors": 3}, ["b", "d", "a"]),
        ({"max_kappa": 4.0}, ["b", "d"]),
        ({"max_kappa": float("inf")}, ["b", "d", "a", "c"]),
        ({"max_params": 100}, ["b", "d"]),
        ({"max_params": 90}, ["b"]),
        ({"max_params": 60}, ["b", "a", "c"]),
        ({"max_params": 0.5}, ["b", "a", "c"]),
        ({"max_params": 1.0}, ["b", "d", "a", "c"]),
    ],
)
def test_budget_selects_what_a_hand_calculation_does(
    tmp_path: Path, budget: dict[str, Any], expected: list[str]
) -> None:
    module = Bank(a=(4, 5.0), b=(6, 2.0), c=(2, 9.0), d=(8, 3.0))
    callback = KappaFreezeCallback(**budget)
    fit(tmp_path, module, callback)
    assert callback.selected_names == [f"{name}.weight" for name in expected]
    assert set(trainable(module)) == {f"{name}.weight" for name in expected}


def test_equal_kappas_are_ranked_by_name(tmp_path: Path) -> None:
    module = Bank(c=(4, 2.0), a=(4, 2.0), b=(4, 2.0))
    callback = KappaFreezeCallback(num_tensors=2)
    fit(tmp_path, module, callback)
    assert callback.selected_names == ["a.weight", "b.weight"]


def test_rank_deficient_and_zero_matrices_train_last(tmp_path: Path) -> None:
    module = Bank(zero=(4, 2.0), deficient=(4, 2.0), steep=(4, 1e6))
    with torch.no_grad():
        module.zero.weight.zero_()
        module.deficient.weight.copy_(torch.ones(4, 4))
    callback = KappaFreezeCallback(num_tensors=1)
    fit(tmp_path, module, callback)
    assert callback.selected_names == ["steep.weight"]
    assert callback.profile["zero.weight"].kappa == callback.profile["deficient.weight"].kappa == np.inf


def test_always_train_is_outside_the_budget_and_no_candidate(tmp_path: Path) -> None:
    module = Bank(head=(4, 1.5), a=(4, 2.0), b=(4, 3.0), c=(4, 4.0))
    callback = KappaFreezeCallback(num_tensors=1, always_train=["head.*"])
    fit(tmp_path, module, callback)
    assert callback.selected_names == ["a.weight"]
    assert callback.trained_names == ["head.weight", "head.bias", "a.weight"]
    assert "head.weight" not in callback.profile


def test_share_of_the_budget_does_not_count_what_always_trains(tmp_path: Path) -> None:
    module = Bank(head=(16, 1.5), a=(4, 2.0), b=(4, 3.0))
    callback = KappaFreezeCallback(max_params=0.5, always_train=["head.weight"])
    fit(tmp_path, module, callback)
    assert callback.selected_names == ["a.weight"]


@pytest.mark.parametrize("train_vectors", [False, True])
def test_vectors_train_only_if_asked_for(tmp_path: Path, train_vectors: bool) -> None:
    module = TinyNet()
    callback = KappaFreezeCallback(num_tensors=1, train_vectors=train_vectors)
    fit(tmp_path, module, callback)
    vectors = {"norm.weight", "norm.bias", "hidden.bias", "head.bias"}
    assert set(callback.trained_names) - set(callback.selected_names) == (vectors if train_vectors else set())
    assert set(trainable(module)) == set(callback.trained_names)


def test_user_frozen_parameters_stay_frozen_and_are_no_candidates(tmp_path: Path) -> None:
    module = Bank(a=(4, 2.0), b=(4, 3.0), c=(4, 4.0))
    module.a.requires_grad_(False)
    callback = KappaFreezeCallback(top_p=0.5, train_vectors=True)
    fit(tmp_path, module, callback)
    assert callback.selected_names == ["b.weight"]
    assert {"a.weight", "a.bias"} <= set(callback.frozen_names)
    assert "a.weight" not in callback.profile
    assert set(trainable(module)) == {"b.weight", "b.bias", "c.bias"}


def test_user_frozen_parameter_stays_frozen_under_always_train_with_a_warning(tmp_path: Path) -> None:
    module = Bank(a=(4, 2.0), head=(4, 3.0))
    module.head.weight.requires_grad_(False)
    callback = KappaFreezeCallback(num_tensors=1, always_train=["head.*"])
    with pytest.warns(UserWarning, match=r"head\.weight"):
        fit(tmp_path, module, callback)
    assert trainable(module) == ["a.weight", "head.bias"] == callback.trained_names


def test_tied_weight_counts_once_under_its_first_name(tmp_path: Path) -> None:
    module = Bank(a=(4, 2.0), b=(4, 3.0), c=(4, 4.0))
    module.c.weight = module.a.weight
    callback = KappaFreezeCallback(top_p=0.5)
    before = snapshot(module)
    fit(tmp_path, module, callback)
    assert [row.name for row in callback.profile] == ["a.weight", "b.weight"]
    assert callback.selected_names == ["a.weight"]
    assert module.c.weight is module.a.weight
    assert not torch.equal(module.c.weight, before["a.weight"])


class Experts(TinyNet):
    """A TinyNet with three fused experts, of which the second is the worst conditioned."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(3)))
        self.experts.data[1, 0] = self.experts.data[1, 1] + 1e-3

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return super().loss(batch) + torch.einsum("eij->", self.experts.square())


@pytest.mark.parametrize("experts", ["mean", "median", "max"])
def test_kappas_of_experts_combine_as_asked(tmp_path: Path, experts: str) -> None:
    module, callback = Experts(), KappaFreezeCallback(num_tensors=1, experts=experts)
    kappas = [numpy_kappa(expert) for expert in module.experts]
    fit(tmp_path, module, callback)
    assert callback.profile["experts"].kappa == pytest.approx(getattr(np, experts)(kappas), rel=1e-9)


def test_fused_experts_are_one_tensor_with_one_kappa_for_each_expert(tmp_path: Path) -> None:
    module, callback = Experts(), KappaFreezeCallback(num_tensors=1)
    kappas = [numpy_kappa(expert) for expert in module.experts]
    fit(tmp_path, module, callback)
    row = callback.profile["experts"]
    assert row.kappas == pytest.approx(kappas, rel=1e-9)
    assert row.kappa == pytest.approx(np.mean(kappas), rel=1e-9)
    assert "experts" in callback.frozen_names


@pytest.mark.parametrize(
    ("patterns", "candidates"),
    [
        ({"include": ["h*"]}, ["head.weight", "hidden.weight"]),
        ({"include": ["h*", "embed.weight"], "exclude": []}, ["embed.weight", "head.weight", "hidden.weight"]),
        ({"exclude": ["h*"]}, ["conv.weight", "embed.weight"]),
        ({"include": ["h*"], "exclude": ["*dden*"]}, ["head.weight"]),
        ({"include": ["*.weight"], "exclude": ["embed.?eight", "[ch]*"], "always_train": ["norm.*"]}, None),
    ],
)
def test_include_and_exclude_bound_the_candidates(
    tmp_path: Path, patterns: dict[str, Any], candidates: list[str] | None
) -> None:
    module, callback = TinyNet(), KappaFreezeCallback(top_p=1.0, **patterns)
    if candidates is None:
        with pytest.raises(ValueError, match="nothing to train"):
            fit(tmp_path, module, callback)
        return
    fit(tmp_path, module, callback)
    assert sorted(row.name for row in callback.profile) == candidates
    assert sorted(trainable(module)) == candidates


@pytest.mark.parametrize("options", [{}, {"train_vectors": True}, {"always_train": ["head.*"], "exclude": ["conv.*"]}])
def test_trained_and_frozen_names_partition_the_parameters_in_the_models_order(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    module, callback = TinyNet(), KappaFreezeCallback(**options)
    fit(tmp_path, module, callback)
    names = [name for name, _ in module.named_parameters()]
    assert callback.trained_names == [name for name in names if name in set(callback.trained_names)]
    assert callback.frozen_names == [name for name in names if name not in set(callback.trained_names)]
    assert trainable(module) == callback.trained_names


def test_frozen_parameters_leave_every_group_and_an_empty_group_stays(tmp_path: Path) -> None:
    def configure(module: TinyNet) -> torch.optim.Optimizer:
        decayed = [module.embed.weight, module.conv.weight, module.head.weight]
        return torch.optim.AdamW(
            [
                {"params": [module.hidden.weight, module.hidden.bias], "lr": 0.01},
                {"params": [*module.norm.parameters(), module.head.bias], "lr": 0.02},
                {"params": decayed, "weight_decay": 0.1},
            ]
        )

    module, callback = TinyNet(configure), KappaFreezeCallback(include=["hidden.*", "conv.*"], top_p=1.0)
    trainer = fit(tmp_path, module, callback)
    (optimizer,) = trainer.optimizers
    assert grouped_names(module, optimizer) == [["hidden.weight"], [], ["conv.weight"]]
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.02, 1e-3]
    assert {id(parameter) for parameter in optimizer.state} == {id(module.hidden.weight), id(module.conv.weight)}


def test_names_in_an_optimizers_groups_stay_aligned_with_its_parameters(tmp_path: Path) -> None:
    module = TinyNet(lambda module: torch.optim.SGD(module.named_parameters(), lr=0.1))
    trainer = fit(tmp_path, module, KappaFreezeCallback(num_tensors=2))
    (optimizer,) = trainer.optimizers
    assert [group["param_names"] for group in optimizer.param_groups] == grouped_names(module, optimizer)


class TwoOptimizers(Bank):
    def __init__(self, **layers: tuple[int, float]) -> None:
        super().__init__(self._two, **layers)
        self.automatic_optimization = False

    @staticmethod
    def _two(module: Bank) -> list[torch.optim.Optimizer]:
        first, *rest = module.layers()
        return [
            torch.optim.AdamW(first.parameters(), lr=0.1),
            torch.optim.SGD([p for layer in rest for p in layer.parameters()], lr=0.1, momentum=0.9),
        ]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()


def test_frozen_parameters_leave_both_optimizers_of_manual_optimization(tmp_path: Path) -> None:
    module, callback = TwoOptimizers(a=(4, 2.0), b=(4, 3.0), c=(4, 9.0)), KappaFreezeCallback(num_tensors=2)
    before = snapshot(module)
    trainer = fit(tmp_path, module, callback)
    assert [grouped_names(module, optimizer) for optimizer in trainer.optimizers] == [[["a.weight"]], [["b.weight"]]]
    _assert_only_these_moved(module, before, ["a.weight", "b.weight"])


def _sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)


def _foreach(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.05, weight_decay=0.1, foreach=True)


def _fused(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.05, weight_decay=0.1, fused=True)


def _one_cycle(module: nn.Module) -> dict[str, Any]:
    optimizer = _sgd(module)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=6)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("configure", [_sgd, adamw, _foreach, _fused, _one_cycle])
@pytest.mark.parametrize("clip", [{}, {"gradient_clip_val": 0.1}])
def test_frozen_tensors_are_bit_identical_and_every_selected_one_has_moved(
    tmp_path: Path, configure: Any, clip: dict[str, Any]
) -> None:
    module, callback = TinyNet(configure), KappaFreezeCallback(num_tensors=2)
    before = snapshot(module)
    fit(tmp_path, module, callback, max_epochs=2, **clip)
    assert len(callback.trained_names) == 2
    _assert_only_these_moved(module, before, callback.trained_names)


def _assert_only_these_moved(module: nn.Module, before: dict[str, Tensor], names: list[str]) -> None:
    moved = [name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])]
    assert moved == names


def test_training_equals_a_hand_written_loop_over_the_selected_tensors(tmp_path: Path) -> None:
    module, callback = TinyNet(), KappaFreezeCallback(num_tensors=2)
    fit(tmp_path, module, callback, gradient_clip_val=0.1, max_epochs=2)

    reference = TinyNet()
    names = numpy_ranking(reference, TinyNet.CANDIDATES)[:2]
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_(name in names)
    chosen = [parameter for parameter in reference.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=0.05, weight_decay=0.1)
    for _ in range(2):
        for batch in loader():
            optimizer.zero_grad()
            reference.loss(batch).backward()
            nn.utils.clip_grad_norm_(chosen, 0.1)
            optimizer.step()
    assert_same_tensors(snapshot(module), snapshot(reference))


def test_frozen_parameters_get_no_gradient(tmp_path: Path) -> None:
    module, callback = TinyNet(), KappaFreezeCallback(num_tensors=1)
    having: list[set[str]] = []

    class Look(Callback):
        def on_after_backward(self, trainer: Any, pl_module: nn.Module) -> None:
            having.append({name for name, p in pl_module.named_parameters() if p.grad is not None})

    fit(tmp_path, module, callback, Look())
    assert having == [set(callback.selected_names)] * 3


def test_gradients_left_over_on_frozen_parameters_are_dropped(tmp_path: Path) -> None:
    module, callback = TinyNet(), KappaFreezeCallback(num_tensors=1)
    module.loss(next(iter(loader()))).backward()
    fit(tmp_path, module, callback, limit_train_batches=1)
    assert all(dict(module.named_parameters())[name].grad is None for name in callback.frozen_names)


def test_with_everything_selected_training_is_bit_identical_to_training_without_the_callback(tmp_path: Path) -> None:
    states: list[Any] = []
    modules = [TinyNet(dropout=0.5), TinyNet(dropout=0.5)]
    for module, callbacks in zip(
        modules, ([], [KappaFreezeCallback(top_p=1.0, exclude=(), train_vectors=True)]), strict=True
    ):
        torch.manual_seed(5)
        fit(tmp_path, module, *callbacks, Spy(on_train_start=lambda *_: states.append(random_state())), max_epochs=2)
    assert states[0] == states[1]
    assert modules[0].losses == modules[1].losses
    assert_same_tensors(snapshot(modules[0]), snapshot(modules[1]))


def test_profile_changes_no_weight_and_draws_no_random_number(tmp_path: Path) -> None:
    module, callback = TinyNet(), KappaFreezeCallback(num_tensors=1)
    seen: list[Any] = []
    before = snapshot(module)
    trainer = make_trainer(
        tmp_path,
        Spy(on_fit_start=lambda *_: seen.append(random_state())),
        callback,
        Spy(on_fit_start=lambda t, m: seen.extend([random_state(), snapshot(m)])),
    )
    trainer.fit(module, loader())
    assert seen[0] == seen[1]
    assert_same_tensors(seen[2], before)


def test_one_tensor_at_a_time_is_decomposed_on_the_trainers_device(tmp_path: Path, decomposed: list[Any]) -> None:
    trainer = fit(tmp_path, TinyNet(), KappaFreezeCallback())
    device = trainer.strategy.root_device
    assert decomposed == [(device, shape) for shape in [(1, 5, 18), (1, 8, 5), (1, 4, 8)]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_profile_is_computed_on_the_gpu(tmp_path: Path, decomposed: list[Any]) -> None:
    module, callback = TinyNet(), KappaFreezeCallback(num_tensors=2)
    expected = numpy_ranking(module, TinyNet.CANDIDATES)[:2]
    fit(tmp_path, module, callback, accelerator="gpu")
    assert {device.type for device, _ in decomposed} == {"cuda"}
    assert callback.selected_names == expected


def test_weights_from_load_state_dict_decide_not_the_initial_ones(tmp_path: Path) -> None:
    module, pretrained = Bank(a=(4, 2.0), b=(4, 3.0)), Bank(a=(4, 9.0), b=(4, 3.0))
    callback = KappaFreezeCallback(num_tensors=1)
    module.load_state_dict(pretrained.state_dict())
    make_trainer(tmp_path, callback).fit(module, bank_loader())
    assert callback.selected_names == ["b.weight"]


@pytest.mark.parametrize(
    "options", [{"criterion": "reversed:kappa"}, {"criterion": "random", "seed": 5}, {"within": "shape"}]
)
def test_criterion_seed_and_groups_choose_as_the_profile_does(tmp_path: Path, options: dict[str, Any]) -> None:
    module = Bank(a=(4, 2.0), b=(4, 3.0), c=(4, 9.0), d=(5, 20.0), e=(5, 30.0), f=(6, 7.0))
    callback = KappaFreezeCallback(num_tensors=3, include=["*.weight"], **options)
    fit(tmp_path, module, callback)
    assert callback.profile is not None
    assert callback.selected_names == callback.profile.select(num_tensors=3, **options)
    assert set(callback.trained_names) == set(callback.selected_names)
    if "within" in options:
        assert callback.selected_names == ["a.weight", "d.weight", "b.weight"]
