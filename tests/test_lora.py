import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import KappaTuneSelector
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from kappa_lightning import KappaProfile, lora_targets


def mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=29, num_local_experts=4,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def profile_of(model, **patterns):
    return KappaProfile.from_model(model, progress=False, **patterns)


def adapted(model, targets):
    """The names of the tensors of the base model that PEFT gave an adapter, read off the model that it made."""
    peft = get_peft_model(model, LoraConfig(**targets, r=2))
    found = set()
    for name, module in peft.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            plain = name.replace(".base_layer", "")
            found.add(f"{plain}.{getattr(module, 'parameter_name', 'weight')}")
    return found


@pytest.mark.parametrize("budget", [{"top_p": 0.3}, {"num_tensors": 5}, {"max_params": 0.5}, {"top_p": 1.0}], ids=str)
def test_peft_adapts_exactly_the_tensors_within_the_budget(budget):
    model = mixtral()
    profile = profile_of(model)
    targets = lora_targets(profile, model=model, **budget)
    assert adapted(model, targets) == set(profile.select(**budget))


def test_fused_experts_are_target_parameters_and_train():
    model = mixtral()
    targets = lora_targets(profile_of(model, include=["*experts*"]), top_p=1.0)
    experts = [f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("down_proj", "gate_up_proj")]
    assert targets == {"target_modules": [], "target_parameters": experts}
    peft = get_peft_model(model, LoraConfig(**targets, r=2))
    peft(input_ids=torch.randint(29, (2, 5))).logits.square().sum().backward()
    # B is zero at first, so only B has a gradient; of each of the four tensors.
    moved = [name for name, p in peft.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(moved) == 4
    assert all("lora_B" in name for name in moved)


def test_experts_of_which_all_are_chosen_are_a_target_and_some_of_them_are_an_error_that_says_what_to_do():
    model = mixtral()
    with torch.no_grad():
        # All experts of one tensor have the lowest κ.
        model.model.layers[1].mlp.experts.down_proj.copy_(torch.eye(16, 24).repeat(4, 1, 1))
    profile = profile_of(model, include=["*experts*"], experts="each")
    targets = lora_targets(profile, model=model, num_tensors=4)
    assert targets == {"target_modules": [], "target_parameters": ["model.layers.1.mlp.experts.down_proj"]}
    assert adapted(mixtral(), targets) == {"model.layers.1.mlp.experts.down_proj"}
    with pytest.raises(
        ValueError, match=r"down_proj\[0\] is selected and .*down_proj\[3\] is not.*all of .*experts=\"each\""
    ):
        lora_targets(profile, num_tensors=3)


def test_heads_of_which_all_are_chosen_make_their_layer_a_target():
    model = mixtral()
    profile = profile_of(model, include=["*layers.0*q_proj*"], heads="each")
    targets = lora_targets(profile, top_p=1.0)
    assert targets == {"target_modules": ["model.layers.0.self_attn.q_proj"], "target_parameters": []}
    with pytest.raises(ValueError, match=r"q_proj.weight\[head .\] is selected"):
        lora_targets(profile, num_tensors=1)


def test_experts_that_are_layers_are_chosen_one_by_one():
    model = nn.ModuleDict({"experts": nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 5)}) for _ in range(3))})
    profile = profile_of(model, experts="each")
    (chosen,) = profile.select(num_tensors=1)
    assert adapted(model, lora_targets(profile, num_tensors=1)) == {chosen}


def test_selection_of_linear_layers_is_pefts():
    model = mixtral()
    linear = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = lora_targets(profile_of(model, include=linear), top_p=0.4)
    assert targets["target_modules"] == sorted(KappaTuneSelector(model, show_progress=False).get_best_targets(0.4))


def test_router_that_peft_cannot_wrap_as_a_module_becomes_a_parameter():
    model = mixtral()
    targets = lora_targets(profile_of(model, include=["*mlp.gate.weight"]), model=model, top_p=1.0)
    assert targets["target_parameters"] == ["model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"]


def test_convolutions_and_embeddings_are_modules():
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "conv": nn.Conv1d(4, 5, 3), "image": nn.Conv2d(3, 4, 2)})
    targets = lora_targets(profile_of(model), top_p=1.0)
    assert targets == {"target_modules": ["conv", "embed", "image"], "target_parameters": []}
    assert adapted(model, targets) == {"embed.weight", "conv.weight", "image.weight"}


def nested(inner_kappa):
    """Two layers of which one's name ends in the other's."""
    model = nn.ModuleDict({"layer": nn.Linear(2, 2), "tower": nn.ModuleDict({"layer": nn.Linear(2, 2)})})
    with torch.no_grad():
        model["layer"].weight.copy_(torch.eye(2))
        model["tower"]["layer"].weight.copy_(torch.diag(torch.tensor([1.0, 1 / inner_kappa])))
    return model


def test_layer_whose_name_ends_in_a_selected_one_gets_no_adapter():
    model = nested(inner_kappa=50.0)
    targets = lora_targets(profile_of(model), num_tensors=1)
    assert adapted(model, targets) == {"layer.weight"}


def test_parameter_whose_name_ends_in_a_selected_one_is_an_error_that_names_both():
    class Experts(nn.Module):
        def __init__(self, kappa):
            super().__init__()
            self.up = nn.Parameter(torch.diag(torch.tensor([1.0, 1 / kappa])).repeat(2, 1, 1))

    model = nn.ModuleDict({"moe": Experts(1.0), "tower": nn.ModuleDict({"moe": Experts(50.0)})})
    with pytest.raises(ValueError, match=r"also adapt tower\.moe\.up, whose name ends in \.moe\.up"):
        lora_targets(profile_of(model), num_tensors=1)


def test_parameter_of_four_dimensions_is_an_error_that_says_what_to_do():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(3, 2, 2, 2))

    with pytest.raises(
        ValueError, match=r"cannot adapt odd\.kernel of shape \(3, 2, 2, 2\).*exclude=\['odd\.kernel'\]"
    ):
        lora_targets(profile_of(nn.ModuleDict({"odd": Odd()})), top_p=1.0)


def test_another_model_is_an_error():
    with pytest.raises(KeyError, match=r"has no layer\.weight"):
        lora_targets(profile_of(nested(2.0)), model=nn.ModuleDict({"other": nn.Linear(2, 2)}), top_p=1.0)


@pytest.mark.parametrize("budget", [{}, {"top_p": 0.5, "num_tensors": 1}], ids=str)
def test_exactly_one_budget_must_be_given(budget):
    with pytest.raises(ValueError, match="exactly one budget"):
        lora_targets(profile_of(nested(2.0)), **budget)


def test_sensitivity_profile_gives_targets_too():
    from kappa_lightning.sensitivity import SensitivityProfile, SensitivityRow

    rows = [
        SensitivityRow("layers.0.up.weight", (8, 4), signal=4.0, sensitivity=1.0, num_parameters=32),
        SensitivityRow("layers.0.down.weight", (4, 8), signal=1.0, sensitivity=9.0, num_parameters=32),
        SensitivityRow("layers.0.experts.up_proj", (2, 4, 4), signal=3.0, sensitivity=1.0, num_parameters=32),
    ]
    found = lora_targets(SensitivityProfile(rows), num_tensors=2)
    assert found == {"target_modules": ["layers.0.up"], "target_parameters": ["layers.0.experts.up_proj"]}
    assert lora_targets(SensitivityProfile(rows[:2]))["target_modules"] == ["layers.0.up"]


@pytest.mark.parametrize("budget", [{"criterion": "kappa"}, {"max_kappa": 3.0}], ids=str)
def test_budget_that_a_sensitivity_profile_has_not_is_named(budget):
    from kappa_lightning.sensitivity import SensitivityProfile, SensitivityRow

    profile = SensitivityProfile([SensitivityRow("up.weight", (8, 4), 4.0, 1.0, 32)])
    (name,) = budget
    with pytest.raises(
        TypeError, match=rf"{name}=.* is no budget of a SensitivityProfile, which takes top_p, num_tensors, max_params:"
    ):
        lora_targets(profile, **budget)


def test_what_is_no_profile_is_refused():
    with pytest.raises(TypeError, match="profile is a str: give a KappaProfile or a SensitivityProfile"):
        lora_targets("profile.json", top_p=1.0)
