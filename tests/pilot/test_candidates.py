import pickle
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from outside import Plain, number_loaders

from kappa_lightning import KappaFreezeCallback
from kappa_lightning.pilot import LoraAdapters, TrainOnly, candidate
from kappa_lightning.pilot.candidates import Candidate, candidates_of, make_callback, walk_back_of


def fit(module, callbacks, steps=2):
    trainer = pl.Trainer(
        max_steps=steps, callbacks=callbacks, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, number_loaders()[0])
    return module


def moved(name, module=None):
    """The parameters that a candidate changed, after a fit."""
    module = Plain() if module is None else module
    before = {key: value.clone() for key, value in module.state_dict().items()}
    fit(module, list(candidate(name).build(module)))
    after = module.state_dict()
    return {
        key.replace(".base_layer", "")
        for key, value in after.items()
        if not torch.equal(value, before.get(key, value * 0))
    }


MATRICES = {"body.weight", "middle.weight", "head.weight"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("full", {f"{layer}.{kind}" for layer in ("body", "middle", "head") for kind in ("weight", "bias")}),
        ("matrices", MATRICES),
        ("*middle*, body.weight", {"middle.weight", "body.weight"}),
        ("last_layers 0.2", {"head.weight"}),
        ("last_layers 0.71", {"head.weight", "middle.weight"}),
    ],
)  # fmt: skip
def test_candidate_trains_what_its_name_says(name, expected):
    assert moved(name) == expected


def test_criterion_is_that_of_the_freeze_callback():
    (callback,) = candidate("reversed:kappa 0.5", always_train=("head.*",), seed=3).build(Plain())
    assert isinstance(callback, KappaFreezeCallback)
    assert (callback.budget.max_params, callback.criterion, callback.always_train) == (
        0.5,
        "reversed:kappa",
        ("head.*",),
    )
    assert callback.seed == 3


def test_sensitivity_has_its_budget_given_or_of_its_own_and_trains_matrices():
    (given,) = candidate("sensitivity 0.6", always_train=("head.*",), seed=2).build(Plain())
    assert (given.budget.max_params, given.always_train, given.seed) == (0.6, ("head.*",), 2)
    assert candidate("sensitivity:path 0.6").specs(Plain())[0].init_args["method"] == "path"
    assert candidate("sensitivity rates").specs(Plain())[0].init_args["rates"] is True
    assert moved("sensitivity 0.6") <= MATRICES
    assert moved("sensitivity") <= MATRICES


def test_additions_stand_behind_their_candidate():
    made = candidate("kappa 0.5 + anchor 10").build(Plain())
    assert [type(callback).__name__ for callback in made] == ["KappaFreezeCallback", "PretrainedAnchor"]
    assert made[1].strength == 10.0


def test_lora_trains_adapters_alone_and_begins_as_the_identity():
    module = Plain()
    x = number_loaders()[1].dataset.tensors[0]
    before, base = module(x), {n: p.clone() for n, p in module.named_parameters()}
    fit(module, [LoraAdapters(4)], steps=1)
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in n for n in trained)
    for name, parameter in module.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(parameter, base[name.replace(".base_layer", "")])
    for name, parameter in module.named_parameters():
        if ".lora_B" in name:
            parameter.data.zero_()
    torch.testing.assert_close(module(x), before)


def test_lora_on_a_choice_adapts_the_lowest_kappa_within_the_budget_and_trains_the_new_part():
    module = Plain()
    # 128, 256 and 48 parameters; head is rectangular and small, so the two lowest of three fit into 0.45.
    callback = LoraAdapters(2, include=("body*", "middle*"), max_params=0.4, always_train=("head.*",))
    fit(module, [callback])
    assert callback.adapted == ["body.weight"]
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert {"head.weight", "head.bias"} < trained
    assert not any("middle" in n for n in trained)


def test_lora_with_nothing_to_adapt_is_an_error_and_changes_nothing():
    module = Plain()
    keys = list(module.state_dict())
    with pytest.raises(ValueError, match="nothing to adapt"):
        fit(module, [LoraAdapters(2, include=("*bias",))])
    assert list(module.state_dict()) == keys
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("first", [True, False])
def test_lora_beside_averages_of_weights_is_averaged_wherever_it_stands(first):
    module, averaging = Plain(), EMAWeightAveraging(decay=0.5)
    fit(module, [averaging, LoraAdapters(2)] if first else [LoraAdapters(2), averaging], steps=4)
    average = averaging._average_model.module
    assert any(".lora_B" in name and bool(value.any()) for name, value in average.state_dict().items())
    assert module.state_dict().keys() == average.state_dict().keys()
    for name, value in module.state_dict().items():
        # What Lightning leaves in the module at the end are the averages.
        assert torch.equal(value, average.state_dict()[name])


def test_train_only_gives_back_what_it_froze_and_leaves_what_was_frozen():
    module = Plain()
    module.body.weight.requires_grad_(False)
    seen = []

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.extend(n for n, p in pl_module.named_parameters() if p.requires_grad)

    fit(module, [TrainOnly(["middle.weight", "body.weight"], ["head.bias"]), Look()])
    assert seen == ["middle.weight", "head.bias"]
    assert [n for n, p in module.named_parameters() if not p.requires_grad] == ["body.weight"]
    with pytest.raises(ValueError, match="nothing to train"):
        fit(module, [TrainOnly(["body.weight"])])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kapa 0.25", "'kapa 0.25' is unknown"),
        ("kappa", "'kappa' needs a budget"),
        ("@gates", "@gates"),
        ("lora r0", "rank=0"),
        ("lora r4 on kappa", "no criterion with a budget"),
        ("full + walk_back", "read off every run"),
        ("full + magic", "'magic' is unknown behind a plus"),
    ],
)
def test_unknown_name_says_what_there_is(name, message):
    with pytest.raises(ValueError, match=message):
        candidate(name)


def test_functions_mappings_and_duplicates():
    def mine(module):
        return []

    found = candidates_of(["full", mine])
    assert [one.name for one in found] == ["full", "mine"]
    assert found[1].specs is None
    named = candidates_of({"small": "kappa 0.1", "own": mine})
    assert [(one.name, one.source) for one in named] == [("small", "kappa 0.1"), ("own", None)]
    assert candidates_of([Candidate("x", mine)])[0].name == "x"
    with pytest.raises(ValueError, match="'full' is there more than once"):
        candidates_of(["full", "full"])
    with pytest.raises(TypeError, match="3 is a int"):
        candidates_of([3])
    with pytest.raises(TypeError, match="one string"):
        candidates_of("full")
    with pytest.raises(ValueError, match="empty"):
        candidates_of([])


@pytest.mark.parametrize(
    "name",
    ["kappa 0.25", "sensitivity 0.5 + anchor 2", "lora r4 a8 on reversed:kappa 0.5", "matrices", "last_layers 0.3"],
)
def test_configuration_of_a_candidate_makes_its_callbacks_again(name):
    module = Plain()
    for spec, made in zip(candidate(name).specs(module), candidate(name).build(module), strict=True):
        entry = spec.to_dict()
        assert entry["class_path"].split(".")[0] == "kappa_lightning"
        again = make_callback(entry)
        assert type(again) is type(made)
        plain = (int, float, str, tuple, bool)
        values = [{k: v for k, v in vars(one).items() if isinstance(v, plain)} for one in (again, made)]
        assert values[0] == values[1]
        assert values[0]


def test_candidate_arrives_in_another_process_as_it_was_made():
    made = candidate("reversed:kappa 0.5", always_train=("head.*",), seed=3)
    again = pickle.loads(pickle.dumps(replace(made, name="mine")))  # noqa: S301 - made here
    assert again.name == "mine"
    assert again.specs(None)[0].to_dict() == made.specs(None)[0].to_dict()
    assert again.build(Plain())[0].always_train == ("head.*",)


def test_choice_by_a_glob_leaves_what_is_excluded():
    (callback,) = candidate("*weight", exclude=("body.*",)).build(Plain())
    module = Plain()
    before = module.body.weight.clone()
    fit(module, [callback])
    assert torch.equal(module.body.weight, before)
    assert not torch.equal(module.middle.weight, Plain().middle.weight)


def test_walk_back_leaves_what_is_new_as_trained():
    spec = walk_back_of("val/loss", 1.5, ("head.*",)).to_dict()
    back = make_callback(spec)
    assert (back.exclude, back.monitor) == (("head.*",), "val/loss")
    assert make_callback(walk_back_of("val/loss", 1.5, ()).to_dict()).exclude == ()
