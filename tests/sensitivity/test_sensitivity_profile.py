"""The profile of a model: how it is measured, saved and bound to its weights."""

import json

import pytest
import torch
from tiny import random_state, snapshot
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from kappa_lightning.probes import GeneratedText
from kappa_lightning.sensitivity import SensitivityProfile, SensitivityRow


def llama():
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.3, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def task(count=3):
    torch.manual_seed(5)
    ids = torch.randint(11, (count, 4, 9))
    return [{"input_ids": each, "labels": each} for each in ids]


def loss(model, batch):
    return model(**batch).loss


TEXT = GeneratedText(num_sequences=6, num_tokens=12, batch_size=2)


TASK = task()


def profile_of(model, **options):
    return SensitivityProfile.from_model(model, TASK, loss, reference=TEXT, progress=False, **options)


def test_language_model_is_measured_on_text_of_its_own_without_its_embedding():
    profile = profile_of(llama())
    assert len(profile) == 14
    assert "model.embed_tokens.weight" not in profile
    assert all(row.signal > 0 and row.sensitivity > 0 for row in profile)
    assert profile["model.layers.0.self_attn.q_proj.weight"].shape == (16, 16)
    assert profile.settings.batches == 3
    assert 6 * 2 < profile.settings.rows <= 6 * 12


def test_measuring_changes_nothing_of_the_model():
    model = llama().train()
    before, numbers = snapshot(model), random_state()
    profile_of(model)
    assert random_state() == numbers
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert model.training


def test_figures_are_the_same_every_time():
    assert profile_of(llama()) == profile_of(llama())


def test_vectors_are_measured_where_they_are_to_train():
    names = [row.name for row in profile_of(llama(), train_vectors=True)]
    assert "model.norm.weight" in names
    assert len(names) == 14 + 5


def test_gradient_checkpointing_changes_no_figure():
    model = llama()
    plain = profile_of(model)
    model.train()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        checkpointed = profile_of(model)
        for row in plain:
            assert checkpointed[row.name].signal == pytest.approx(row.signal, rel=1e-4)
            assert checkpointed[row.name].sensitivity == pytest.approx(row.sensitivity, rel=1e-4)


def test_file_gives_back_the_profile(tmp_path):
    profile = profile_of(llama())
    profile.save(tmp_path / "profile.json")
    assert SensitivityProfile.load(tmp_path / "profile.json") == profile


def test_file_that_was_changed_is_refused(tmp_path):
    path = tmp_path / "profile.json"
    profile_of(llama()).save(path)
    document = json.loads(path.read_text())
    document["rows"][0]["signal"] *= 2
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="does not fit its checksum"):
        SensitivityProfile.load(path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match="truncated"):
        SensitivityProfile.load(path)
    path.write_text(json.dumps({"format": "kappa-lightning profile"}))
    with pytest.raises(ValueError, match="no sensitivity profile"):
        SensitivityProfile.load(path)


def test_profile_of_other_weights_is_refused():
    model = llama()
    profile = profile_of(model)
    profile.check(model)
    name = "model.layers.1.mlp.up_proj.weight"
    model.get_parameter(name).data[0, 0] += 1
    with pytest.raises(ValueError, match=f"other weights: the content of {name} differs"):
        profile.check(model)
    with pytest.raises(ValueError, match="measured on a different model"):
        profile.check(nn.Linear(2, 2))


def test_patterns_that_leave_nothing_are_refused():
    with pytest.raises(ValueError, match="no tensor to measure"):
        profile_of(llama(), exclude=("*",))


def test_frozen_tensors_are_not_measured():
    model = llama()
    model.model.layers[0].requires_grad_(False)
    assert {row.name.split(".")[2] for row in profile_of(model)} == {"1"}


def small():
    return SensitivityProfile(
        [SensitivityRow(name, (4, 4), 1.0, 2.0, 16) for name in ("net.fc.weight", "net.conv.weight")]
    )


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda p: p.forgetting("net.fc.weight"), TypeError, r"names='net\.fc\.weight' is one string: give a list"),
        (lambda p: p.among("net.fc.weight"), TypeError, r"names='net\.fc\.weight' is one string: give a list"),
        (lambda p: p.forgetting(3), TypeError, "names=3 is a int: give a list of names"),
        (lambda p: p["fc.weight"], KeyError, r"no row for fc\.weight; near names: net\.fc\.weight"),
        (lambda p: p.value("net.cnv.weight"), KeyError, r"no row for net\.cnv\.weight; near names: net\.conv\.weight"),
        (lambda p: p.forgetting(["nope"]), KeyError, r"no row for nope; the names are like net\.fc\.weight, net\.conv"),
        (lambda p: p.among(["nope"]), KeyError, "no row for nope; the names are like"),
        (lambda p: p.check("x"), TypeError, "module='x' is a str: give the model itself, a torch.nn.Module"),
    ],
)
def test_wrong_argument_is_named_with_what_to_do(use, error, message):
    with pytest.raises(error, match=message):
        use(small())


def test_file_that_cannot_be_read_or_written_is_named(tmp_path):
    with pytest.raises(IsADirectoryError, match=rf"{tmp_path} is a folder: name the file of the sensitivity profile"):
        SensitivityProfile.load(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"none/p\.json cannot be written: there is no folder .*none; create it"
    ):
        small().save(tmp_path / "none" / "p.json")


def test_synthesized_inputs_of_tokens_are_refused_before_any_work():
    def none(model, batch):
        raise AssertionError("a loss was computed")

    with pytest.raises(TypeError, match=r'must be a floating-point tensor.*use reference="inputs"'):
        SensitivityProfile.from_model(llama(), TASK, none, reference="synthesized", progress=False)
