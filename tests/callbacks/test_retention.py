"""Against chance, with intervals, and from a base model below its adapters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import Recording, TinyNet, Up, fit, loader, scripted_probe
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kappa_lightning import AccuracyProbe, ForgettingEval, PerplexityProbe, Probe
from kappa_lightning.evaluation import adapters_off, has_adapters


def _known(accuracy: float, total: int = 24) -> Probe:
    """Accuracy on labels of which TinyNet's own answers give that share."""
    module = TinyNet().eval()
    batch = next(iter(loader(24)))
    with torch.no_grad():
        labels = module(batch[0]).argmax(-1)
    wrong = torch.arange(total) >= round(accuracy * total)
    return AccuracyProbe([(batch[0], torch.where(wrong, (labels + 1) % 4, labels))])


def test_above_chance_by_hand(tmp_path: Path) -> None:
    scripted = scripted_probe([0.75, 0.5, 0.25])
    probe = Probe([0], scripted.metric, scripted.step, name="score", chance=0.25)
    callback = ForgettingEval({"a": probe})
    fit(tmp_path, TinyNet(), callback, max_epochs=2)
    assert [r["forgetting/a/above_chance"] for r in callback.history] == pytest.approx([1.0, 0.5, 0.0])


def test_accuracy_knows_its_chance(tmp_path: Path) -> None:
    callback = ForgettingEval({"old": _known(0.75)})
    fit(tmp_path, TinyNet(), callback)
    now = callback.history[-1]
    assert now["forgetting/old/above_chance"] == pytest.approx((now["forgetting/old/accuracy"] - 0.25) / 0.5)


@pytest.mark.parametrize("higher", [True, False])
def test_baseline_at_chance_is_an_error_that_says_so(tmp_path: Path, higher: bool) -> None:
    probe = Probe([0], scripted_probe([1.0], higher).metric, lambda *_: torch.tensor(0.5), name="score", chance=0.5)
    with pytest.raises(ValueError, match=r"'a' has score=0\.5 before the first step, no better than chance \(0\.5\)"):
        fit(tmp_path, TinyNet(), ForgettingEval({"a": probe}))
    with pytest.raises(ValueError, match=r"accuracy=0\.25 .* chance"):
        fit(tmp_path, TinyNet(), ForgettingEval({"a": _known(0.25)}))


class _Bigrams(Recording):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(11, 11)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.rows(input_ids)

    def loss(self, batch: Any) -> Tensor:
        return self(batch[0]).flatten(0, 1)[:, 0].mean()


def test_loss_of_nats_a_token_beside_the_ratio(tmp_path: Path) -> None:
    callback = ForgettingEval({"text": PerplexityProbe([{"input_ids": next(iter(loader(24)))[0]}])})
    fit(tmp_path, _Bigrams(), callback)
    first, last = (record["forgetting/text/perplexity"] for record in callback.history)
    assert callback.history[-1]["forgetting/text/nats"] == pytest.approx(math.log(last / first), rel=1e-6)
    assert callback.history[-1]["forgetting/text/nats"] != 0
    assert callback.history[-1]["forgetting/text/retention"] == pytest.approx(
        math.exp(-callback.history[-1]["forgetting/text/nats"])
    )


def test_interval_surrounds_the_retention_and_survives_a_resume(tmp_path: Path) -> None:
    first = ForgettingEval({"old": _known(0.75)})
    fit(tmp_path, TinyNet(), first, max_epochs=2).save_checkpoint(tmp_path / "one.ckpt")
    torch.load(tmp_path / "one.ckpt", weights_only=True)
    second = ForgettingEval({"old": _known(0.75)})
    fit(tmp_path, TinyNet(), second, ckpt_path=tmp_path / "one.ckpt", max_epochs=3)
    whole = ForgettingEval({"old": _known(0.75)})
    fit(tmp_path, TinyNet(), whole, max_epochs=3)
    assert second.history[-1] == whole.history[-1]
    low, value, high = (whole.history[-1][f"forgetting/old/retention{end}"] for end in ("_low", "", "_high"))
    assert low < value < high
    assert whole.history[0]["forgetting/old/retention_low"] == whole.history[0]["forgetting/old/retention_high"] == 1


def test_lower_end_may_be_what_is_judged(tmp_path: Path) -> None:
    def make(judged_by: Any) -> ForgettingEval:
        values = iter([1.0] * 6 + [1.0, 1.0, 0.4, 1.0, 0.6, 1.0])
        probe = Probe(range(6), Up(), lambda *_: torch.tensor(next(values)))
        return ForgettingEval({"a": probe}, None, 0.8, "raise", judged_by=judged_by)

    plain = make("retention")
    fit(tmp_path, TinyNet(), plain)
    assert plain.history[-1]["forgetting/a/retention"] == pytest.approx(5 / 6)
    assert plain.history[-1]["forgetting/a/retention_low"] < 0.8
    with pytest.raises(RuntimeError, match="retention_low fell below"):
        fit(tmp_path, TinyNet(), make("retention_low"))


def test_probe_without_items_cannot_be_judged_by_its_lower_end(tmp_path: Path) -> None:
    callback = ForgettingEval({"a": scripted_probe([1.0])}, min_retention=0.5, judged_by="retention_low")
    with pytest.raises(ValueError, match="'a' has no items"):
        fit(tmp_path, TinyNet(), callback)


# The base below adapters


class _LoRA(nn.Module):
    def __init__(self, start: float) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.ones(1, 8))
        self.up = nn.Parameter(torch.full((4, 1), start))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.tensor([[1.0], [-1], [2], [0]]) * (self.up @ self.down)


def _parametrized(start: float) -> TinyNet:
    module = TinyNet()
    module.requires_grad_(False)
    parametrize.register_parametrization(module.head, "weight", _LoRA(start))
    module.head.parametrizations.weight.original.requires_grad_(False)
    return module


def _with_peft(start: float) -> TinyNet:
    module = TinyNet()
    config = peft.LoraConfig(r=2, target_modules=["head"], init_lora_weights=True)
    peft.inject_adapter_in_model(config, module)
    if start:
        torch.manual_seed(0)
        nn.init.normal_(module.head.lora_B["default"].weight, std=5 * start)
    return module


def _old() -> Probe:
    step = lambda module, batch: nn.functional.cross_entropy(module(batch[0]), batch[1]).neg().exp()  # noqa: E731
    return Probe(loader(24), Up(), step, name="likelihood")


@pytest.mark.parametrize("adapt", [_parametrized, _with_peft])
def test_baseline_is_that_of_the_base_model(tmp_path: Path, adapt: Any) -> None:
    plain = ForgettingEval({"old": _old()})
    fit(tmp_path, TinyNet(), plain)
    module, callback = adapt(3.0), ForgettingEval({"old": _old()})
    trains = [name for name, p in module.named_parameters() if p.requires_grad]
    with pytest.warns(UserWarning, match="adapters are not the identity before the first step: the probe 'old'"):
        fit(tmp_path, module, callback)
    assert callback.baseline == pytest.approx(plain.baseline)
    assert abs(callback.history[0]["forgetting/old/retention"] - 1) > 0.01
    assert [name for name, p in module.named_parameters() if p.requires_grad] == trains


@pytest.mark.parametrize("adapt", [_parametrized, _with_peft])
def test_adapters_that_begin_as_the_identity_are_not_warned_of(
    tmp_path: Path, adapt: Any, recwarn: pytest.WarningsRecorder
) -> None:
    callback = ForgettingEval({"old": _old()})
    fit(tmp_path, adapt(0.0), callback)
    assert callback.history[0]["forgetting/old/retention"] == pytest.approx(1.0)
    assert not [w for w in recwarn if "identity" in str(w.message)]


def test_merged_adapters_are_taken_out_and_put_back() -> None:
    module, base = _with_peft(3.0), TinyNet().eval()
    tokens = next(iter(loader()))[0]
    module.eval()
    module.head.merge()
    before = module(tokens)
    with adapters_off(module):
        assert torch.allclose(module(tokens), base(tokens), atol=1e-5)
    assert torch.allclose(module(tokens), before, atol=1e-5)
    assert module.head.merged


def test_plain_modules_and_weight_norm_have_no_adapters() -> None:
    assert not has_adapters(TinyNet())
    assert not has_adapters(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3).requires_grad_(False)))
    assert has_adapters(_with_peft(0.0))


# Infinite figures


def _column(callback: ForgettingEval, tag: str) -> list[float]:
    return [record[tag] for record in callback.history]


def test_infinite_perplexity_is_a_retention_of_zero(tmp_path: Path) -> None:
    probe = scripted_probe([20.0, math.inf, 16.0], higher_is_better=False)
    callback = ForgettingEval({"text": probe}, min_retention=0.5, on_breach="warn")
    with pytest.warns(UserWarning, match=r"after epoch 1: text 0\.0000"):
        fit(tmp_path, TinyNet(), callback, max_epochs=2)
    assert _column(callback, "forgetting/text/score") == [20.0, math.inf, 16.0]
    assert _column(callback, "forgetting/text/retention") == [1.0, 0.0, 1.25]


@pytest.mark.filterwarnings("ignore:Encountered `nan` values")
@pytest.mark.parametrize(
    ("values", "higher_is_better"), [([20.0, math.nan], False), ([math.inf], False), ([0.5, math.inf], True)]
)
def test_figure_without_a_ratio_is_an_error(tmp_path: Path, values: list[float], higher_is_better: bool) -> None:
    callback = ForgettingEval({"text": scripted_probe(values, higher_is_better)}, min_retention=0.5, on_breach="warn")
    with pytest.raises(ValueError, match=rf"'text' returned score={values[-1]} at step {3 * (len(values) - 1)}"):
        fit(tmp_path, TinyNet(), callback)
