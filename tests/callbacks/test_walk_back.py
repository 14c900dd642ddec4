"""The way back, against interpolation by hand, and what stays in the module afterwards."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tiny import Down, Spy, TinyNet, assert_same_tensors, events, loader, make_trainer, random_state, scalars, snapshot
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kappa_lightning import ForgettingEval, Probe, WalkBack


class Line(pl.LightningModule):
    """One weight that goes from 0 to 4; the old task is at 0, the new one at 4."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.weight - 4).square().sum() / 2

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", (self.weight - 4).square().sum())
        self.log("val/other", self.weight.sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.zeros(2)), batch_size=2)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.zeros(4)), batch_size=2)


def cost_probe(first: float = 1.0, second: float = 1.0) -> Probe:
    """1 + factor · weight², with one factor on even batches and one on odd ones; retention is 1 / that."""
    batches = [torch.tensor(value) for value in (first, second, first, second)]
    return Probe(batches, Down(), lambda module, batch: 1 + batch * module.weight.square().sum(), name="cost")


def walked(root: Path, walk_back: WalkBack, *callbacks: Any, module: Any = None, **options: Any) -> Any:
    module = module or Line()
    trainer = make_trainer(root, *callbacks, walk_back, **{"max_epochs": 1, **options})
    trainer.fit(module)
    return module, trainer


def test_the_best_monitor_that_keeps_the_retention_stays_in_the_module(tmp_path: Path) -> None:
    walk_back = WalkBack(min_retention=0.4, probes={"old": cost_probe()}, points=[0.1, 0.25, 0.3, 0.4], save=False)
    module, trainer = walked(tmp_path, walk_back)
    # Retention is 1 / (1 + (4α)²): 0.410 at 0.3, 0.281 at 0.4.
    assert walk_back.alpha == 0.3
    assert module.weight.item() == pytest.approx(1.2)
    assert module.frozen.item() == 1
    assert [point["alpha"] for point in walk_back.path] == [0.0, 0.1, 0.25, 0.3, 0.4, 1.0]
    for point in walk_back.path:
        weight = 4 * point["alpha"]
        assert point["monitor"] == pytest.approx((weight - 4) ** 2, abs=1e-6)
        assert point["retention"] == pytest.approx(1 / (1 + weight**2))
        assert point["chosen"] is (point["alpha"] == 0.3)
    assert trainer.callback_metrics["val_loss"].item() == pytest.approx(2.8**2)
    assert trainer.callback_metrics["walk_back/alpha"].item() == pytest.approx(0.3)


def test_the_last_stretch_is_halved_so_that_as_much_is_learned_as_the_limit_allows(tmp_path: Path) -> None:
    walk_back = WalkBack(min_retention=0.4, probes={"old": cost_probe()}, points=5, save=False)
    module, _ = walked(tmp_path, walk_back)
    # Retention is 0.4 at 0.306: 0.375 and 0.3125 keep too little, 0.28125 enough.
    assert [point["alpha"] for point in walk_back.path] == [0.0, 0.25, 0.28125, 0.3125, 0.375, 0.5, 0.75, 1.0]
    assert walk_back.alpha == 0.28125
    assert module.weight.item() == 4 * 0.28125
    assert [point["alpha"] for point in walk_back.path if point["chosen"]] == [0.28125]


def test_halving_goes_back_where_the_monitor_is_what_is_limited(tmp_path: Path) -> None:
    walk_back = WalkBack(monitor_limit=5.0, probes={"old": cost_probe()}, points=3, bisections=2, save=False)
    walked(tmp_path, walk_back)
    # (4α − 4)² is 5 at 0.441: 0.25 is too far back, and so is 0.375.
    assert [point["alpha"] for point in walk_back.path] == [0.0, 0.25, 0.375, 0.5, 1.0]
    assert walk_back.alpha == 0.5


def test_each_stretch_of_layers_goes_as_far_as_it_may(tmp_path: Path) -> None:
    probe = Probe([0, 0], Down(), lambda m, b: 1 + m.layers[0].weight.square().sum())
    walk_back = WalkBack(min_retention=0.99, probes={"old": probe}, along="depth", points=3, bisections=4, save=False)
    walked(tmp_path, walk_back, module=Layers())
    # 1 / (1 + α²) is 0.99 at 0.1005; between there and 1, where all is trained, are 0.5, 0.25, 0.125 and 0.0625.
    assert walk_back.alpha == {"layer 0": 0.0625, "layer 1": 1.0}


def test_the_other_way_round_keeps_most_at_a_monitor_that_is_good_enough(tmp_path: Path) -> None:
    walk_back = WalkBack(monitor_limit=4.1, probes={"old": cost_probe()}, points=5, save=False)
    module, _ = walked(tmp_path, walk_back)
    assert walk_back.alpha == 0.5
    assert module.weight.item() == 2.0


def test_a_monitor_of_which_more_is_better(tmp_path: Path) -> None:
    walk_back = WalkBack(0.4, "val/other", "max", probes={"old": cost_probe()}, points=[0.1, 0.25], save=False)
    walked(tmp_path, walk_back)
    assert walk_back.alpha == 0.25


def test_the_point_is_chosen_on_one_half_and_reported_on_the_other(tmp_path: Path) -> None:
    """What the even batches allow costs much more on the odd ones, and only the report says so."""
    walk_back = WalkBack(min_retention=0.9, probes={"old": cost_probe(0.0, 1.0)}, points=5, save=False)
    _, trainer = walked(tmp_path, walk_back)
    assert walk_back.alpha == 1.0
    assert walk_back.path[-1]["retention"] == 1.0
    assert walk_back.report["chosen"]["old"] == pytest.approx(1 / 17)
    assert trainer.callback_metrics["walk_back/retention"].item() == pytest.approx(1 / 17)
    assert trainer.callback_metrics["walk_back/old/retention"].item() == pytest.approx(1 / 17)


def test_where_nothing_keeps_enough_the_nearest_point_is_taken_with_a_warning(tmp_path: Path) -> None:
    gone = Probe([torch.tensor(0.0)] * 2, Down(), lambda m, b: 1 + (m.weight.square() > 0).sum() * 2 + m.weight[0])
    walk_back = WalkBack(monitor_limit=-1.0, probes={"old": gone}, points=3, save=False)
    with pytest.warns(UserWarning, match=r"no point of the way has monitor_limit=-1.*alpha=1"):
        walked(tmp_path, walk_back)
    assert walk_back.alpha == 1.0


def test_probes_of_forgetting_eval_are_taken(tmp_path: Path) -> None:
    forgetting = ForgettingEval({"old": cost_probe()})
    walk_back = WalkBack(min_retention=0.4, points=[0.25], save=False)
    walked(tmp_path, walk_back, forgetting)
    assert walk_back.alpha == 0.25
    assert len(forgetting.history) == 2  # the walk is out of its sight


class Layers(pl.LightningModule):
    """Two layers that are trained by fiat: the first costs the old task, the second serves the new one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(1, 1, bias=False) for _ in range(2)])
        for layer in self.layers:
            nn.init.zeros_(layer.weight)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum((layer.weight - 1).square().sum() / 2 for layer in self.layers)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", (self.layers[1].weight - 1).square().sum() + 0.01 * (self.layers[0].weight - 1).sum() ** 2)

    configure_optimizers = Line.configure_optimizers
    train_dataloader = Line.train_dataloader
    val_dataloader = Line.val_dataloader


def test_one_factor_for_each_stretch_of_layers(tmp_path: Path) -> None:
    probe = Probe([0, 0], Down(), lambda m, b: 1 + m.layers[0].weight.square().sum())
    walk_back = WalkBack(min_retention=0.99, probes={"old": probe}, along="depth", points=3, bisections=0, save=False)
    module, trainer = walked(tmp_path, walk_back, module=Layers())
    assert walk_back.alpha == {"layer 0": 0.0, "layer 1": 1.0}
    assert [layer.weight.item() for layer in module.layers] == [0.0, 1.0]
    assert trainer.callback_metrics["walk_back/alpha"].item() == 0.5
    one = WalkBack(min_retention=0.99, probes={"old": probe}, points=3, bisections=0, save=False)
    walked(tmp_path, one, module=Layers())
    assert one.alpha == 0.0  # a single factor must give up the new task


def test_what_is_new_stays_as_trained_at_every_point(tmp_path: Path) -> None:
    seen = []

    def watched(module: Any, _: Any) -> Tensor:
        seen.append(module.layers[1].weight.item())
        return 1 + module.layers[0].weight.square().sum()

    probe = Probe([0, 0], Down(), watched)
    walk_back = WalkBack(min_retention=0.99, probes={"old": probe}, points=[0.5], exclude=["layers.1.*"], save=False)
    module, _ = walked(tmp_path, walk_back, module=Layers())
    assert walk_back.alpha == 0.0
    assert [layer.weight.item() for layer in module.layers] == [0.0, 1.0]
    assert set(seen) == {1.0}


def test_statistics_of_what_is_new_stay_too(tmp_path: Path) -> None:
    plain, _ = fitted(tmp_path)
    probe = Probe([0, 0], Down(), lambda m, b: 1 + (m.hidden.weight - TinyNet().hidden.weight).abs().sum())
    back = WalkBack(monitor_limit=1e9, probes={"old": probe}, points=2, exclude=["norm.*"], save=False)
    module, _ = fitted(tmp_path, back)
    assert back.alpha == 0.0
    for name in ("norm.weight", "norm.running_mean", "norm.running_var"):
        assert torch.equal(module.state_dict()[name], plain.state_dict()[name])
    assert torch.equal(module.hidden.weight, TinyNet().hidden.weight)


def tiny_probe() -> Probe:
    tokens = torch.randint(11, (8, 7), generator=torch.Generator().manual_seed(3))
    return Probe(
        [tokens[:4], tokens[4:]], Down(), lambda module, batch: 10 + module(batch).square().mean(), name="size"
    )


def fitted(root: Path, *callbacks: Any, **options: Any) -> tuple[TinyNet, pl.Trainer]:
    module = TinyNet(dropout=0.2)
    trainer = make_trainer(root, *callbacks, **{"max_epochs": 2, **options})
    trainer.fit(module, loader(), loader())
    return module, trainer


@pytest.mark.parametrize("along", ["all", "role", "depth", "singular_values"])
def test_both_ends_are_exact_and_statistics_go_along(tmp_path: Path, along: Any) -> None:
    start = snapshot(TinyNet())
    plain, _ = fitted(tmp_path)
    stay = WalkBack(min_retention=1e-6, probes={"old": tiny_probe()}, along=along, points=2, save=False)
    module, _ = fitted(tmp_path, stay)
    if along in ("all", "singular_values"):
        assert stay.alpha == 1.0
        assert_same_tensors(snapshot(module), snapshot(plain))
    back = WalkBack(monitor_limit=1e9, probes={"old": pretrained_only()}, along=along, points=2, save=False)
    module, _ = fitted(tmp_path, back)
    moved = {name: tensor for name, tensor in snapshot(module).items() if name != "norm.num_batches_tracked"}
    assert_same_tensors(moved, {name: start[name] for name in moved})
    assert not torch.equal(snapshot(plain)["norm.running_mean"], start["norm.running_mean"])


def pretrained_only() -> Probe:
    """Keeps anything only where every tensor is what it was."""
    start = TinyNet().state_dict()

    def distance(module: nn.Module, _: Any) -> Tensor:
        state = module.state_dict()
        return 1 + sum((state[name] - start[name]).abs().sum() for name in start if "tracked" not in name)

    return Probe([0, 0], Down(), distance)


def test_statistics_go_with_the_weight_of_their_layer(tmp_path: Path) -> None:
    probes = {"old": Probe([0, 0], Down(), lambda module, batch: torch.tensor(1.0))}
    walk_back = WalkBack(0.5, probes=probes, along="role", points=2, save=False)
    fitted(tmp_path, walk_back, max_epochs=1)
    assert isinstance(walk_back.alpha, dict)
    assert "norm.weight" in walk_back.alpha
    assert not [group for group in walk_back.alpha if "running" in group]


def test_a_walk_during_training_only_looks(tmp_path: Path) -> None:
    plain, _ = fitted(tmp_path, max_epochs=3)
    numbers = random_state()
    torch.manual_seed(0)
    looks: list[float] = []
    spy = Spy(on_train_epoch_start=lambda t, _: looks.append(t.callback_metrics.get("walk_back/alpha")))
    walk_back = WalkBack(min_retention=1e-6, probes={"old": tiny_probe()}, points=3, every_n_epochs=1, save=False)
    module, _ = fitted(tmp_path, spy, walk_back, max_epochs=3)
    assert walk_back.alpha == 1.0
    assert module.losses[:3] == plain.losses[:3]
    assert module.losses[-1] == plain.losses[-1]
    assert_same_tensors(snapshot(module), snapshot(plain))
    assert looks[0] is None
    assert looks[1] is not None
    del numbers


def test_a_walk_draws_no_random_numbers_and_shows_nothing_of_itself(tmp_path: Path) -> None:
    torch.manual_seed(4)
    fitted(tmp_path)
    numbers = random_state()
    torch.manual_seed(4)
    seen: list[str] = []
    spy = Spy(on_validation_epoch_end=lambda t, _: seen.append("validation"))
    logger = TensorBoardLogger(tmp_path)
    walk_back = WalkBack(min_retention=1e-6, probes={"old": tiny_probe()}, points=3, save=False)
    fitted(tmp_path, spy, walk_back, logger=logger, num_sanity_val_steps=0)
    assert random_state() == numbers
    assert seen == ["validation"] * 2
    assert len(scalars(Path(logger.log_dir), "val_loss")) == 2


def test_the_chosen_point_is_saved_and_the_picture_drawn(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path / "logs")
    keep = ModelCheckpoint(tmp_path / "kept", monitor="val_loss")
    walk_back = WalkBack(min_retention=0.4, probes={"old": cost_probe()}, points=[0.3])
    module, _ = walked(tmp_path, walk_back, keep, logger=logger)
    assert walk_back.checkpoint_path == tmp_path / "kept" / "walk_back.ckpt"
    saved = torch.load(walk_back.checkpoint_path, weights_only=True)
    assert saved["state_dict"]["weight"].item() == module.weight.item() == pytest.approx(1.2)
    kept = torch.load(keep.best_model_path, weights_only=True)
    assert kept["state_dict"]["weight"].item() == 4.0
    folder = Path(logger.log_dir)
    assert events(folder).Tags()["images"] == ["walk_back/path"]
    assert scalars(folder, "walk_back/alpha") == [(1, pytest.approx(0.3))]


@pytest.mark.parametrize("folder", [False, True])
def test_a_resumed_run_walks_to_the_first_start(tmp_path: Path, folder: bool) -> None:
    def make() -> WalkBack:
        directory = tmp_path / "start" if folder else None
        return WalkBack(monitor_limit=1e9, probes={"old": pretrained_only()}, points=2, save=False, directory=directory)

    checkpoint = ModelCheckpoint(tmp_path / "kept", save_top_k=-1)
    fitted(tmp_path, make(), checkpoint, max_epochs=1)
    module = TinyNet()
    trainer = make_trainer(tmp_path, make(), max_epochs=2)
    trainer.fit(module, loader(), loader(), ckpt_path=checkpoint.best_model_path)
    start = snapshot(TinyNet())
    assert_same_tensors(
        {name: tensor for name, tensor in snapshot(module).items() if "tracked" not in name},
        {name: tensor for name, tensor in start.items() if "tracked" not in name},
    )


def test_a_fit_with_nothing_left_to_train_says_that_it_does_not_walk(tmp_path: Path) -> None:
    def make() -> WalkBack:
        return WalkBack(min_retention=0.4, probes={"old": cost_probe()}, points=[0.0, 0.3, 1.0], save=False)

    end = ModelCheckpoint(tmp_path / "kept", save_on_train_epoch_end=True)
    module, _ = walked(tmp_path, make(), end)
    assert module.weight.item() == pytest.approx(1.2)
    again, walk_back = Line(), make()
    with pytest.warns(UserWarning, match="WalkBack: this fit had nothing left to train, so it did not look"):
        make_trainer(tmp_path, walk_back, max_epochs=1).fit(again, ckpt_path=end.best_model_path)
    assert again.weight.item() == 4.0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="WalkBack")
        make_trainer(tmp_path, walk_back, max_epochs=2).fit(again, ckpt_path=end.best_model_path)
    assert again.weight.item() == pytest.approx(1.2)


class Slow(Line):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def test_averaged_weights_are_walked_back_from(tmp_path: Path) -> None:
    walk_back = WalkBack(min_retention=0.01, probes={"old": cost_probe()}, points=2, save=False)
    averaging = EMAWeightAveraging(decay=0.5)
    module, _ = walked(tmp_path, walk_back, averaging, module=Slow(), max_epochs=2)
    assert walk_back.alpha == 1.0
    # The weight was 2 and then 3, and their average with a decay of a half is 2.5.
    assert module.weight.item() == 2.5
    behind = WalkBack(min_retention=0.01, probes={"old": cost_probe()}, save=False)
    trainer = make_trainer(tmp_path, behind, EMAWeightAveraging(decay=0.5))
    with pytest.raises(ValueError, match="stands behind WalkBack"):
        trainer.fit(Line())


def test_a_monitor_that_is_not_logged_leaves_the_trained_weights(tmp_path: Path) -> None:
    module = Line()
    with pytest.raises(ValueError, match=r"logs no metric 'val_los', but .*val_loss"):
        walked(tmp_path, WalkBack(0.5, "val_los", probes={"old": cost_probe()}), module=module)
    assert module.weight.item() == 4.0


def test_a_monitor_that_is_not_logged_stops_the_run_after_its_first_validation(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, WalkBack(0.5, "val_los", probes={"old": cost_probe()}), max_epochs=3)
    with pytest.raises(ValueError, match="logs no metric 'val_los'"):
        trainer.fit(Line())
    assert trainer.global_step == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give exactly one of the"),
        ({"min_retention": 0.5, "monitor_limit": 1.0}, "give exactly one of the"),
        ({"min_retention": 1.5}, "must be in"),
        ({"min_retention": 0.5, "mode": "least"}, "mode='least'"),
        ({"min_retention": 0.5, "points": 1}, "points=1 must be"),
        ({"min_retention": 0.5, "points": [2.0]}, "the factor 2.0"),
        ({"min_retention": 0.5, "bisections": -1}, "bisections=-1 must not be negative"),
        ({"min_retention": 0.5, "depth_groups": 0}, "depth_groups=0"),
        ({"min_retention": 0.5, "along": "path"}, "along='path' is unknown"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WalkBack(**arguments)


@pytest.mark.parametrize("bisections", [1.5, True, "3"])
def test_bisections_of_another_type_are_named(bisections: Any) -> None:
    with pytest.raises(TypeError, match=r"bisections=.* must be an integer"):
        WalkBack(min_retention=0.5, bisections=bisections)


def test_what_cannot_work_is_said_before_training(tmp_path: Path) -> None:
    one_batch = Probe([0], Down(), lambda m, b: m.weight)
    shuffled = Probe(DataLoader([1, 2, 3], shuffle=True), Down(), lambda m, b: m.weight)
    for walk_back, message, options in (
        (WalkBack(0.5), "has no probes", {}),
        (WalkBack(0.5, probes={"one": one_batch}), "'one' has one batch", {}),
        (WalkBack(0.5, probes={"mixed": shuffled}), "'mixed' shuffles its data", {}),
        (WalkBack(0.5, probes={"old": cost_probe()}), "none runs", {"limit_val_batches": 0}),
        (WalkBack(0.5, probes={"old": cost_probe()}, exclude=["head.*"]), "exclude: the pattern 'head", {}),
        (WalkBack(0.5, probes={"old": cost_probe()}, exclude=["weight"]), "matches all that trains", {}),
    ):
        module = Line()
        with pytest.raises(ValueError, match=message):
            walked(tmp_path, walk_back, module=module, **options)
        assert module.weight.item() == 0.0


def test_update_of_a_filtered_matrix_is_its_truncated_svd(tmp_path: Path) -> None:
    start = TinyNet().state_dict()
    plain, _ = fitted(tmp_path)
    walk_back = WalkBack(
        monitor_limit=1e9, probes={"old": pretrained_only()}, along="singular_values", points=[0.6], save=False
    )
    found: dict[str, Tensor] = {}

    def remember(module: nn.Module, _: Any) -> Tensor:
        found.update({name: tensor.clone() for name, tensor in module.state_dict().items()})
        return torch.tensor(1.0)

    walk_back.probes = {"old": Probe([0, 0], Down(), lambda m, b: 1 + 0 * remember(m, b))}
    walk_back.points = (0.6,)
    fitted(tmp_path, walk_back)
    for name in ("hidden.weight", "conv.weight", "embed.weight"):
        update = (plain.state_dict()[name] - start[name]).double().numpy()
        matrix = update.reshape(len(update), -1)
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        kept = np.where(s >= 0.4 * s[0], s, 0)
        assert 0 < (kept == 0).sum() < len(s)
        expected = start[name].double().numpy() + ((u * kept) @ vt).reshape(update.shape)
        np.testing.assert_allclose(found[name].double().numpy(), expected, atol=1e-5)
