"""Bad input: the error names the culprit, and nothing has been changed when it is raised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tiny import Bank, TinyNet, Up, fit, group_ids, loader, scripted_probe, trainable
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from kappa_lightning import (
    AccuracyProbe,
    ForgettingEval,
    KappaFreezeCallback,
    KappaMonitor,
    KappaProfile,
    PerplexityProbe,
    Probe,
    SimilarityProbe,
)


def _refused(tmp_path: Path, module: Any, error: type[Exception], match: str, *callbacks: Callback, **options: Any):
    """Fit fails with the error, and requires_grad, the optimizers' groups and the weights are as they were.

    With ``ckpt_path`` Lightning has loaded the checkpoint's weights before any callback's turn.
    """
    before = trainable(module)
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(error, match=match):
        fit(tmp_path, module, *callbacks, **options)
    assert trainable(module) == before
    assert group_ids(module.made) == module.made_groups
    for name, tensor in module.state_dict().items() if "ckpt_path" not in options else ():
        assert torch.equal(tensor.nan_to_num(), weights[name].nan_to_num()), name


# Freeze: arguments


@pytest.mark.parametrize(
    ("arguments", "error", "culprit"),
    [
        ({"top_p": 0.0}, ValueError, r"top_p=0\.0"),
        ({"top_p": 1.5}, ValueError, r"top_p=1\.5"),
        ({"top_p": -0.1}, ValueError, r"top_p=-0\.1"),
        ({"top_p": float("nan")}, ValueError, "top_p=nan"),
        ({"num_tensors": 0}, ValueError, "num_tensors=0"),
        ({"num_tensors": 2.0}, TypeError, r"num_tensors=2\.0"),
        ({"num_tensors": True}, TypeError, "num_tensors=True"),
        ({"max_kappa": 0.5}, ValueError, r"max_kappa=0\.5"),
        ({"max_kappa": float("nan")}, ValueError, "max_kappa=nan"),
        ({"max_params": 0}, ValueError, "max_params=0"),
        ({"max_params": 0.0}, ValueError, r"max_params=0\.0"),
        ({"max_params": 1.5}, ValueError, r"max_params=1\.5"),
        ({"max_params": "half"}, TypeError, "max_params='half'"),
        ({"top_p": 0.2, "num_tensors": 3}, ValueError, r"top_p=0\.2, num_tensors=3"),
        ({"max_kappa": 9.0, "max_params": 3}, ValueError, r"max_kappa=9\.0, max_params=3"),
        ({"criterion": "size"}, ValueError, "criterion='size'"),
        ({"within": "layer"}, ValueError, "within='layer'"),
        ({"seed": 0.5}, TypeError, r"seed=0\.5"),
        ({"solver": "magic"}, ValueError, "solver='magic'"),
        ({"experts": "best"}, ValueError, "experts='best'"),
        ({"rtol": 0.0}, ValueError, r"rtol=0\.0"),
        ({"include": ()}, ValueError, "include"),
        ({"include": "head.*"}, TypeError, r"include='head\.\*'"),
        ({"exclude": "head.*"}, TypeError, r"exclude='head\.\*'"),
        ({"always_train": "head.*"}, TypeError, r"always_train='head\.\*'"),
    ],
)
def test_bad_argument_of_freeze_is_named(arguments: dict[str, Any], error: type[Exception], culprit: str) -> None:
    with pytest.raises(error, match=culprit):
        KappaFreezeCallback(**arguments)


# Freeze: the model


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weight_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    module = TinyNet()
    module.hidden.weight.data[2, 3] = value
    _refused(tmp_path, module, ValueError, r"hidden\.weight", KappaFreezeCallback())


@pytest.mark.parametrize("argument", ["include", "exclude", "always_train"])
def test_glob_that_matches_nothing_is_named(tmp_path: Path, argument: str) -> None:
    callback = KappaFreezeCallback(**{argument: ["h*", "decoder.*"]})
    _refused(tmp_path, TinyNet(), ValueError, rf"{argument}.*'decoder\.\*'", callback)


@pytest.mark.parametrize("argument", ["include", "exclude", "always_train"])
def test_glob_that_matches_only_a_tied_alias_names_the_first_name(tmp_path: Path, argument: str) -> None:
    module = Bank(embed=(4, 2.0), middle=(4, 3.0), head=(4, 4.0))
    module.head.weight = module.embed.weight
    callback = KappaFreezeCallback(**{argument: ["head.w*"]})
    _refused(tmp_path, module, ValueError, rf"{argument}.*head\.weight.*embed\.weight", callback)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"exclude": ["*"]}, "nothing to train"),
        ({"include": ["*.bias"]}, "nothing to train"),
        ({"always_train": ["*"]}, "nothing to train"),
        ({"max_kappa": 1.0}, "nothing to train.*max_kappa=1"),
        ({"max_params": 3}, r"nothing to train.*max_params=3.*head\.weight"),
    ],
)
def test_nothing_left_to_train_is_an_error(tmp_path: Path, arguments: dict[str, Any], match: str) -> None:
    _refused(tmp_path, TinyNet(), ValueError, match, KappaFreezeCallback(**arguments))


def test_model_that_is_frozen_already_is_named_as_the_reason(tmp_path: Path) -> None:
    module = TinyNet()
    for name in TinyNet.MATRICES:
        dict(module.named_parameters())[name].requires_grad_(False)
    _refused(tmp_path, module, ValueError, "3 .*frozen already", KappaFreezeCallback())


def test_more_tensors_than_there_are_is_an_error(tmp_path: Path) -> None:
    _refused(tmp_path, TinyNet(), ValueError, "num_tensors=9.*3", KappaFreezeCallback(num_tensors=9))


class Quantized(TinyNet):
    """A TinyNet with an int8 matrix, as weight-only quantization stores it."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.ones(4, 6, dtype=torch.int8), requires_grad=False)


def test_always_train_that_matches_a_non_float_parameter_names_it(tmp_path: Path) -> None:
    callback = KappaFreezeCallback(always_train=["head.*", "code*"])
    _refused(tmp_path, Quantized(), TypeError, "codes.*int8", callback)


def test_frozen_quantized_weight_is_no_candidate_and_does_not_disturb(tmp_path: Path) -> None:
    module, callback = Quantized(), KappaFreezeCallback(top_p=1.0)
    fit(tmp_path, module, callback)
    assert trainable(module) == list(TinyNet.CANDIDATES)
    assert "codes" in callback.frozen_names


def test_quantized_weight_that_cannot_be_read_is_named() -> None:
    with pytest.raises(TypeError, match=r"codes.*int8"):
        KappaProfile.from_model(Quantized(), progress=False)
    assert len(KappaProfile.from_model(Quantized(), exclude=["codes"], progress=False)) == 4


# Freeze: the checkpoint


def test_checkpoint_whose_selection_names_other_tensors_names_one(tmp_path: Path) -> None:
    trainer = fit(tmp_path, Bank(old=(4, 2.0), b=(4, 3.0)), KappaFreezeCallback(num_tensors=1))
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    module = Bank(new=(4, 2.0), b=(4, 3.0))
    module.strict_loading = False
    _refused(
        tmp_path,
        module,
        ValueError,
        r"old\.weight",
        KappaFreezeCallback(num_tensors=1),
        ckpt_path=tmp_path / "other.ckpt",
        max_epochs=2,
    )


def test_checkpoint_whose_selection_is_frozen_here_names_it(tmp_path: Path) -> None:
    trainer = fit(tmp_path, Bank(a=(4, 2.0), b=(4, 3.0)), KappaFreezeCallback(num_tensors=1))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    module = Bank(a=(4, 2.0), b=(4, 3.0))
    module.a.requires_grad_(False)
    callback = KappaFreezeCallback(num_tensors=1)
    _refused(tmp_path, module, ValueError, r"a\.weight", callback, ckpt_path=tmp_path / "one.ckpt", max_epochs=2)


def test_checkpoint_without_a_selection_is_named(tmp_path: Path) -> None:
    fit(tmp_path, TinyNet()).save_checkpoint(tmp_path / "plain.ckpt")
    callback = KappaFreezeCallback()
    _refused(tmp_path, TinyNet(), ValueError, r"plain\.ckpt.*selection", callback, ckpt_path=tmp_path / "plain.ckpt")


# Monitor


@pytest.mark.parametrize(
    ("arguments", "error", "culprit"),
    [
        ({"every_n_epochs": 0}, ValueError, "every_n_epochs=0"),
        ({"every_n_epochs": 1.5}, ValueError, r"every_n_epochs=1\.5"),
        ({"tensors": "head.*"}, ValueError, r"tensors='head\.\*'"),
    ],
)
def test_bad_argument_of_monitor_is_named(arguments: dict[str, Any], error: type[Exception], culprit: str) -> None:
    with pytest.raises(error, match=culprit):
        KappaMonitor(**arguments)


def test_monitor_glob_that_matches_nothing_is_named(tmp_path: Path) -> None:
    callbacks = [KappaFreezeCallback(), KappaMonitor(tensors=["decoder.*"])]
    _refused(tmp_path, TinyNet(), ValueError, r"tensors.*decoder\.\*", *callbacks)


def test_monitor_with_no_matrix_to_watch_says_so(tmp_path: Path) -> None:
    _refused(tmp_path, TinyNet(), ValueError, r"no matrix", KappaFreezeCallback(), KappaMonitor(tensors=["*.bias"]))


def test_monitor_names_a_weight_that_is_not_finite(tmp_path: Path) -> None:
    module = TinyNet()
    module.conv.weight.data[0] = torch.nan
    _refused(tmp_path, module, ValueError, r"conv\.weight", KappaMonitor())


# Forgetting: arguments


def _score() -> Probe:
    return scripted_probe([1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("arguments", "error", "culprit"),
    [
        ({"probes": {}}, ValueError, "probes is empty"),
        ({"probes": [_score()]}, TypeError, "probes is a list"),
        ({"probes": {"text": lambda: 1.0}}, TypeError, r"probes\['text'\] is a function"),
        ({"probes": {3: _score()}}, TypeError, "3"),
        ({"probes": {"": _score()}}, TypeError, "''"),
        ({"probes": {"text": _score()}, "every_n_epochs": 0}, ValueError, "every_n_epochs=0"),
        ({"probes": {"text": _score()}, "min_retention": 1.2}, ValueError, r"min_retention=1\.2"),
        ({"probes": {"text": _score()}, "min_retention": 0.0}, ValueError, r"min_retention=0\.0"),
        ({"probes": {"text": _score()}, "min_retention": "0.9"}, ValueError, r"min_retention='0\.9'"),
        ({"probes": {"text": _score()}, "on_breach": "cry"}, ValueError, "on_breach='cry'"),
    ],
)
def test_bad_argument_of_forgetting_is_named(arguments: dict[str, Any], error: type[Exception], culprit: str) -> None:
    with pytest.raises(error, match=culprit):
        ForgettingEval(**arguments)


class Undecided(MeanMetric):
    higher_is_better = None


@pytest.mark.parametrize(
    ("make", "error", "culprit"),
    [
        (lambda: Probe([1], "accuracy", print), TypeError, "metric is a str"),
        (lambda: Probe([1], MetricCollection([MeanMetric()]), print), TypeError, "metric is a MetricCollection"),
        (lambda: Probe([1], Undecided(), print), ValueError, "Undecided"),
        (lambda: Probe([1], Up(), "forward"), TypeError, "step='forward'"),
        (lambda: Probe([], Up(), print), ValueError, "dataloader is empty"),
        (lambda: Probe(DataLoader([]), Up(), print), ValueError, "dataloader is empty"),
        (lambda: Probe((batch for batch in [1]), Up(), print), ValueError, "dataloader is a generator"),
        (lambda: Probe(iter([1]), Up(), print), ValueError, "dataloader is a list_iterator"),
        (lambda: Probe(None, Up(), print), ValueError, "dataloader is a NoneType"),
        (lambda: AccuracyProbe([]), ValueError, "dataloader is empty"),
        (lambda: PerplexityProbe([]), ValueError, "dataloader is empty"),
        (lambda: SimilarityProbe([], embed=print), ValueError, "dataloader is empty"),
    ],
)
def test_bad_argument_of_a_probe_is_named(make: Callable[[], Probe], error: type[Exception], culprit: str) -> None:
    with pytest.raises(error, match=culprit):
        make()


# Forgetting: what only shows when it is measured


class Emptied:
    """An iterable that does not tell its length, and has none."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class Stream(IterableDataset):
    """A dataset that does not tell its length."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        return iter(range(self.count))


class NoScalar(Up):
    def compute(self) -> Any:
        return {"mean": super().compute()}


def _probe(metric: Metric | None = None, result: Any = None, data: Any = (0,)) -> Probe:
    return Probe(data, metric or Up(), lambda module, batch: torch.tensor(1.0) if result is None else result[0])


@pytest.mark.parametrize(
    ("probe", "error", "culprit"),
    [
        (_probe(data=Emptied()), ValueError, "no batch"),
        (_probe(result=[torch.tensor(torch.nan)]), ValueError, "nan"),
        (_probe(result=[torch.tensor(torch.inf)]), ValueError, "inf"),
        (_probe(result=[torch.tensor(0.0)]), ValueError, "0 before the first step"),
        (_probe(result=[torch.tensor(-0.3)]), ValueError, r"-0\.3 before the first step"),
        (
            Probe([0], MulticlassAccuracy(3, average=None), lambda *_: (torch.arange(3), torch.arange(3))),
            ValueError,
            r"shape \(3,\)",
        ),
        (_probe(metric=NoScalar()), ValueError, "returned a dict"),
        (_probe(result=[None]), TypeError, "step returned a NoneType"),
        (_probe(result=["fine"]), TypeError, "step returned a str"),
        (_probe(result=[0.5]), TypeError, "step returned a float"),
    ],
)
# The mean metric warns of the NaN that it is given.
@pytest.mark.filterwarnings("ignore:Encountered `nan` values")
def test_probe_that_cannot_be_measured_is_named_and_nothing_is_frozen(
    tmp_path: Path, probe: Probe, error: type[Exception], culprit: str
) -> None:
    callbacks = [KappaFreezeCallback(), ForgettingEval({"fine": _score(), "broken": probe})]
    _refused(tmp_path, TinyNet(), error, culprit, *callbacks)
    with pytest.raises(error, match="broken"):
        fit(tmp_path, TinyNet(), ForgettingEval({"fine": _score(), "broken": probe}))


def test_error_inside_a_step_keeps_its_type_and_names_the_probe(tmp_path: Path) -> None:
    def step(module: nn.Module, batch: Any) -> Any:
        return {}["scores"]

    module = TinyNet()
    _refused(
        tmp_path, module, KeyError, "broken", KappaFreezeCallback(), ForgettingEval({"broken": Probe([0], Up(), step)})
    )
    assert module.training


def test_wrong_batch_of_a_ready_made_probe_says_what_it_needs(tmp_path: Path) -> None:
    tokens = next(iter(loader()))[0]
    _refused(tmp_path, TinyNet(), TypeError, "input_ids", ForgettingEval({"text": PerplexityProbe([(tokens,)])}))
    probe = SimilarityProbe([(tokens, tokens)], embed=lambda module, x: module(x))
    _refused(tmp_path, TinyNet(), TypeError, r"first, second, score", ForgettingEval({"text": probe}))


def test_stream_without_a_length_is_measured_and_an_empty_one_refused(tmp_path: Path) -> None:
    def probe(count: int) -> Probe:
        return Probe(DataLoader(Stream(count), batch_size=2), Up(), lambda module, batch: batch.float() + 1)

    callback = ForgettingEval({"stream": probe(5)})
    fit(tmp_path, TinyNet(), callback)
    assert callback.baseline == {"stream": 3.0}
    _refused(tmp_path, TinyNet(), ValueError, "stream|no batch", ForgettingEval({"stream": probe(0)}))
