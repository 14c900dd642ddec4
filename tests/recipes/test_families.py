import pytest
import torch
from families import FAMILIES, PROJECTORS, data_of, fit, make
from transformers import Pix2StructConfig, Pix2StructForConditionalGeneration

from kappa_lightning import ForgettingEval, KappaFreezeCallback, KappaProfile
from recipes.shared.comparison import low_kappa
from recipes.shared.module import GenerativeModule
from recipes.shared.probes import TextAgreement, TextPerplexity
from recipes.shared.towers import parts_of


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family, tmp_path_factory):
    """The folder of a tiny model of the family, which is loaded like one of the hub."""
    return str(make(family, tmp_path_factory.mktemp("hub")))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "wiki.txt"
    file.write_text(" = a cat = \n\n" + "a red dog runs . this is a blue cat . " * 20, encoding="utf-8")
    return str(file)


def snapshot(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def moved(module, before):
    return {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}


def test_two_steps_move_what_the_profile_says_and_the_checkpoint_goes_on(family, model, pictures, text, tmp_path):
    module = GenerativeModule(model, max_new_tokens=3)
    before = snapshot(module)
    freeze = low_kappa(module, 0.3)
    probes = {"text": TextPerplexity(model, text, window=12), "agreement": TextAgreement(model, text, window=12)}
    forgetting = ForgettingEval(probes)
    trainer = fit(tmp_path, module, data_of(model, pictures), freeze, forgetting, max_epochs=1)
    assert trainer.global_step == 2
    assert forgetting.history[0]["forgetting/agreement/retention"] == 1.0

    matrices = [
        name
        for name, part in parts_of(module.model).items()
        if part != "projector" and before[f"model.{name}"].ndim > 1
    ]
    untouched = GenerativeModule(model)
    profile = KappaProfile.from_model(untouched.model, include=matrices, progress=False)
    selected = {f"model.{name}" for name in profile.select(max_params=0.3)}
    projector = {name for name in before if PROJECTORS[family] in name}
    assert projector
    assert set(freeze.selected_names) == selected
    assert set(freeze.trained_names) == selected | projector
    # Some selected tensors may have no gradient, such as position embeddings that the input does not reach.
    assert moved(module, before) <= selected | projector
    assert projector <= moved(module, before)
    assert len(moved(module, before) & selected) >= len(selected) / 2

    trainer.save_checkpoint(tmp_path / "one.ckpt")
    loaded = GenerativeModule.load_from_checkpoint(tmp_path / "one.ckpt")
    after = snapshot(module)
    assert moved(loaded, after) == set()

    resumed, again = GenerativeModule(model, max_new_tokens=3), low_kappa(untouched, 0.3)
    evaluation = ForgettingEval(probes)
    trainer = fit(
        tmp_path, resumed, data_of(model, pictures), again, evaluation, max_epochs=2, ckpt_path=tmp_path / "one.ckpt"
    )
    assert trainer.global_step == 4
    assert again.trained_names == freeze.trained_names
    assert moved(resumed, before) <= selected | projector
    assert moved(resumed, after)
    assert evaluation.baseline == forgetting.baseline


@pytest.mark.parametrize("share", [None, 0.3])
def test_adapters_and_the_projector_train_and_reload(family, model, pictures, tmp_path, share):
    module = GenerativeModule(model, lora_rank=2, lora_max_params=share, max_new_tokens=3)
    before = snapshot(module)
    trainer = fit(tmp_path, module, data_of(model, pictures), max_epochs=1)
    changed = moved(module, before)
    assert {name for name in changed if ".lora_" not in name} == {n for n in before if PROJECTORS[family] in n}
    adapted = {name.split(".lora_")[0] for name in before if ".lora_" in name}
    base = {name.split(".base_layer")[0] for name in before if ".base_layer.weight" in name}
    assert adapted == base
    if share is not None:
        linear = [
            f"{name}.weight"
            for name, layer in GenerativeModule(model).model.named_modules()
            if isinstance(layer, torch.nn.Linear) and PROJECTORS[family] not in name
        ]
        untouched = GenerativeModule(model).model
        tied = {name for name, _ in untouched.named_parameters()}
        profile = KappaProfile.from_model(untouched, include=[n for n in linear if n in tied], progress=False)
        assert adapted == {f"model.{n.removesuffix('.weight')}" for n in profile.select(max_params=share)}
    trainer.save_checkpoint(tmp_path / "lora.ckpt")
    assert moved(GenerativeModule.load_from_checkpoint(tmp_path / "lora.ckpt"), snapshot(module)) == set()


@pytest.mark.parametrize("towers", ["language", "vision"])
def test_only_the_chosen_tower_and_the_projector_train(family, model, pictures, tmp_path, towers):
    module = GenerativeModule(model, towers=towers, max_new_tokens=3)
    before = snapshot(module)
    fit(tmp_path, module, data_of(model, pictures), max_epochs=1)
    parts = {f"model.{name}": part for name, part in parts_of(module.model).items()}
    assert {parts[name] for name in moved(module, before)} == {towers, "projector"}
    vision = {name for name, part in parts.items() if part == "vision"}
    assert vision
    assert all("vision" in name for name in vision)


def test_precision_and_checkpointing_of_the_large_configurations(model, pictures, tmp_path):
    module = GenerativeModule(model, dtype="bfloat16", gradient_checkpointing=True, max_new_tokens=3)
    before = snapshot(module)
    freeze = KappaFreezeCallback(max_params=0.3)
    fit(tmp_path, module, data_of(model, pictures), freeze, max_epochs=1, precision="bf16-true")
    assert moved(module, before)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}


def test_encoder_and_decoder_are_an_error(tmp_path):
    sizes = {"num_layers": 1, "num_hidden_layers": 1, "hidden_size": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2}
    sizes |= {"num_attention_heads": 2}
    config = Pix2StructConfig(text_config={**sizes, "vocab_size": 9}, vision_config=sizes, is_encoder_decoder=True)
    Pix2StructForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has an encoder for its prompt"):
        GenerativeModule(str(tmp_path))
