import itertools

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from kappa_lightning import KappaProfile
from kappa_lightning.weights import checkpoint_weights, find_weights, match_names, tied_names


class Bare(nn.Module):
    """One parameter that belongs to no known layer."""

    def __init__(self, shape, name="p"):
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.randn(shape)))


def names(module):
    return [weight.name for weight in find_weights(module)]


def only(module):
    (weight,) = find_weights(module)
    return weight


def singular_values(matrix):
    return np.linalg.svd(np.asarray(matrix, dtype=np.float64), compute_uv=False)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(5, 3), (1, 3, 5)),
        (nn.Linear(5, 1), (1, 1, 5)),
        (nn.Linear(1, 5), (1, 5, 1)),
        (nn.Bilinear(3, 4, 5), (5, 3, 4)),
        (nn.Embedding(7, 4), (1, 7, 4)),
        (nn.EmbeddingBag(7, 4), (1, 7, 4)),
        (nn.Conv1d(4, 6, 3), (1, 6, 12)),
        (nn.Conv2d(4, 6, (3, 5)), (1, 6, 60)),
        (nn.Conv3d(4, 6, (2, 3, 5)), (1, 6, 120)),
        (nn.Conv2d(4, 6, 3, groups=2), (1, 6, 18)),
        (nn.Conv2d(4, 4, 3, groups=4), (1, 4, 9)),
        (nn.Conv2d(1, 6, 1), (1, 6, 1)),
        (nn.ConvTranspose1d(4, 6, 3), (1, 6, 12)),
        (nn.ConvTranspose2d(4, 6, (3, 5)), (1, 6, 60)),
        (nn.ConvTranspose3d(4, 6, (2, 3, 5)), (1, 6, 120)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (1, 6, 18)),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_layer_weight_is_one_matrix_of_this_shape_and_its_bias_none(layer, expected):
    assert names(layer) == ["weight"]
    assert tuple(only(layer).matrices().shape) == expected


@pytest.mark.parametrize("layer", [nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, (3, 5)), nn.Conv3d(4, 6, (2, 3, 2))], ids=str)
def test_conv_matrix_is_what_multiplies_an_unfolded_patch(layer):
    patch = torch.randn(4, *layer.kernel_size)
    out = layer(patch.unsqueeze(0)).flatten() - layer.bias
    by_matrix = only(layer).matrices()[0] @ patch.flatten()
    torch.testing.assert_close(by_matrix, out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "kernel", "groups"),
    [
        (nn.ConvTranspose1d, (3,), 1),
        (nn.ConvTranspose1d, (3,), 2),
        (nn.ConvTranspose2d, (2, 3), 1),
        (nn.ConvTranspose2d, (2, 3), 2),
        (nn.ConvTranspose2d, (2, 2), 4),
        (nn.ConvTranspose3d, (2, 1, 2), 2),
    ],
)
def test_transposed_conv_has_the_singular_values_of_its_output_by_input_matrix(kind, kernel, groups):
    layer = kind(4, 8, kernel, groups=groups)
    weight = layer.weight.detach().numpy()
    per_group_in, per_group_out = 4 // groups, 8 // groups
    reference = np.zeros((8, per_group_in * int(np.prod(kernel))))
    for group, out, inp in itertools.product(range(groups), range(per_group_out), range(per_group_in)):
        for position, tap in enumerate(itertools.product(*map(range, kernel))):
            column = inp * int(np.prod(kernel)) + position
            reference[group * per_group_out + out, column] = weight[(group * per_group_in + inp, out, *tap)]
    found = only(layer).matrices()
    assert tuple(found.shape) == (1, *reference.shape)
    np.testing.assert_allclose(singular_values(found[0]), singular_values(reference), rtol=1e-6)


def test_transposed_conv_is_read_with_its_output_channels_as_rows():
    # Two identical output channels make the map rank-deficient; the stored (in, out, k) layout, flattened, would not.
    layer = nn.ConvTranspose1d(3, 2, 3)
    with torch.no_grad():
        layer.weight[:, 1] = layer.weight[:, 0]
    sigma = singular_values(only(layer).matrices()[0])
    assert sigma[-1] < 1e-6 * sigma[0]
    assert singular_values(layer.weight.detach().flatten(1))[-1] > 1e-4


def test_fused_experts_are_one_matrix_each():
    module = Bare((3, 4, 5), "gate_up_proj")
    weight = only(module)
    assert weight.is_stack
    assert torch.equal(weight.matrices(), module.gate_up_proj.detach())


def test_mixtral_experts_are_stacks_and_its_router_is_a_matrix():
    config = MixtralConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=3, vocab_size=17,
    )  # fmt: skip
    found = {weight.name.removeprefix("model.layers.0."): weight for weight in find_weights(MixtralForCausalLM(config))}
    assert {name for name, weight in found.items() if weight.is_stack} == {
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    }
    assert tuple(found["mlp.experts.gate_up_proj"].matrices().shape) == (3, 24, 8)
    assert tuple(found["mlp.gate.weight"].matrices().shape) == (1, 3, 8)
    assert not any("norm" in name for name in found)


def test_conv1d_kernel_is_no_stack_although_it_has_three_dimensions():
    assert not only(nn.Conv1d(4, 6, 3)).is_stack


def test_four_dimensional_bare_parameter_is_viewed_like_a_conv_kernel():
    module = Bare((4, 3, 2, 2))
    weight = only(module)
    assert not weight.is_stack
    assert torch.equal(weight.matrices(), module.p.detach().reshape(1, 4, 12))


@pytest.mark.parametrize("shape", [(6,), (), (1, 1, 6), (1, 6), (6, 1), (1, 1, 1), (1, 6, 1, 1)])
def test_bare_parameter_with_fewer_than_two_dimensions_above_one_is_a_vector(shape):
    assert names(Bare(shape)) == []


def test_position_embedding_with_a_batch_dimension_of_one_is_one_matrix():
    weight = only(Bare((1, 9, 6), "pos_embed"))
    assert not weight.is_stack
    assert tuple(weight.matrices().shape) == (1, 9, 6)


def test_normalization_layers_hold_no_matrix_whatever_their_shape():
    norms = [
        nn.LayerNorm((3, 4)),
        nn.RMSNorm((3, 4)),
        nn.GroupNorm(2, 4),
        nn.BatchNorm2d(4),
        nn.InstanceNorm1d(4, affine=True),
        nn.SyncBatchNorm(4),
    ]
    assert names(nn.Sequential(*norms)) == []


def test_stacked_expert_biases_are_vectors():
    assert names(Bare((3, 8), "gate_up_proj_bias")) == []
    assert names(Bare((3, 8), "bias")) == []
    assert names(Bare((3, 8), "gate_up_proj")) == ["gate_up_proj"]


def test_multihead_attention_has_its_joint_projection_and_its_output_projection():
    attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    shapes = {weight.name: tuple(weight.matrices().shape) for weight in find_weights(attention)}
    assert shapes == {"in_proj_weight": (1, 24, 8), "out_proj.weight": (1, 8, 8)}


def test_multihead_attention_with_separate_projections_has_each_of_them():
    attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    shapes = {weight.name: tuple(weight.matrices().shape) for weight in find_weights(attention)}
    assert shapes == {
        "q_proj_weight": (1, 8, 8),
        "k_proj_weight": (1, 8, 6),
        "v_proj_weight": (1, 8, 4),
        "out_proj.weight": (1, 8, 8),
    }


def test_order_is_that_of_named_parameters():
    net = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Embedding(3, 3), nn.Linear(3, 3)), nn.Conv1d(3, 3, 1))
    order = [name for name, parameter in net.named_parameters() if parameter.ndim > 1]
    assert names(net) == order == ["0.weight", "1.0.weight", "1.1.weight", "2.weight"]


def test_frozen_parameters_count_too():
    net = nn.Linear(3, 3).requires_grad_(False)
    assert names(net) == ["weight"]


def test_tied_weight_appears_once_under_its_first_name():
    net = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    net["head"].weight = net["embed"].weight
    assert names(net) == ["embed.weight"]
    assert tied_names(net) == {"head.weight": "embed.weight"}


def test_shared_module_appears_once_under_its_first_name():
    layer = nn.Linear(3, 3)
    net = nn.Sequential(layer, nn.ReLU(), layer)
    assert names(net) == ["0.weight"]
    assert tied_names(net) == {"2.weight": "0.weight", "2.bias": "0.bias"}


def test_gpt2_head_is_its_token_embedding():
    gpt = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=31, n_positions=8))
    assert names(gpt) == [
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.0.attn.c_proj.weight",
        "transformer.h.0.mlp.c_fc.weight",
        "transformer.h.0.mlp.c_proj.weight",
    ]
    assert tied_names(gpt) == {"lm_head.weight": "transformer.wte.weight"}


def test_matrices_share_memory_with_the_weight_and_carry_no_gradient():
    layer = nn.Conv2d(3, 4, 2)
    view = only(layer).matrices()
    assert view.data_ptr() == layer.weight.data_ptr()
    assert not view.requires_grad
    assert layer.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype):
    assert only(nn.Linear(3, 2).to(dtype)).matrices().dtype == dtype


def test_meta_tensor_error_names_the_tensor():
    net = nn.Sequential(nn.Linear(3, 2, device="meta"))
    with pytest.raises(ValueError, match=r"0\.weight.*meta"):
        only(net).matrices()


@pytest.mark.parametrize("layer", [nn.LazyLinear(4), nn.LazyConv2d(4, 3), nn.LazyConvTranspose2d(4, 3)], ids=repr)
def test_lazy_layer_error_names_the_tensor(layer):
    net = nn.ModuleDict({"first": layer})
    with pytest.raises(ValueError, match=r"first\.weight.*lazy"):
        only(net).matrices()


def test_profile_of_a_lazy_layer_says_what_to_do_and_passes_over_it_if_it_is_excluded():
    net = nn.ModuleDict({"first": nn.LazyLinear(4), "second": nn.Linear(3, 3)})
    with pytest.raises(ValueError, match=r"first\.weight belongs to a lazy layer.*run a batch"):
        KappaProfile.from_model(net, progress=False)
    assert [row.name for row in KappaProfile.from_model(net, progress=False, exclude=["first.*"])] == ["second.weight"]


def test_lazy_layer_is_an_ordinary_one_after_its_first_batch():
    net = nn.LazyLinear(4)
    net(torch.zeros(1, 3))
    assert tuple(only(net).matrices().shape) == (1, 4, 3)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_quantized_weight_error_names_tensor_dtype_and_shape(dtype):
    net = nn.ModuleDict({"first": nn.Linear(3, 2, bias=False)})
    net["first"].weight = nn.Parameter(torch.ones(2, 3, dtype=dtype), requires_grad=False)
    with pytest.raises(TypeError) as caught:
        only(net).matrices()
    for part in ("first.weight", str(dtype), "(2, 3)", "quantized"):
        assert part in str(caught.value)


NAMES = ["body.0.weight", "body.0.bias", "body.10.weight", "head.weight"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["*"], set(NAMES)),
        (["body.*"], set(NAMES[:3])),
        (["body.?.weight"], {"body.0.weight"}),
        (["*.bias", "head.*"], {"body.0.bias", "head.weight"}),
        (["body.[01].weight"], {"body.0.weight"}),
        (["head.weight"], {"head.weight"}),
        ([], set()),
    ],
)
def test_globs_match_whole_names(patterns, expected):
    assert match_names(NAMES, patterns, argument="include", aliases={}) == expected


@pytest.mark.parametrize("pattern", ["Body.*", "body", "body.0.weights"])
def test_glob_without_a_match_is_an_error_that_shows_what_names_look_like(pattern):
    with pytest.raises(ValueError) as caught:
        match_names(NAMES, ["*", pattern], argument="exclude", aliases={})
    for part in ("exclude", repr(pattern), "body.0.weight", "4 in all"):
        assert part in str(caught.value)


def test_glob_that_matches_the_end_of_names_is_told_so():
    with pytest.raises(ValueError, match=r"exclude: the pattern 'weight' .*'\*\.weight' would match body\.0\.weight"):
        match_names(NAMES, ["*", "weight"], argument="exclude", aliases={})


def test_glob_that_matches_only_a_tied_name_is_told_the_first_name():
    with pytest.raises(ValueError, match=r"lm_head\.weight, which is tied to wte\.weight"):
        match_names(["wte.weight"], ["lm_head.*"], argument="include", aliases={"lm_head.weight": "wte.weight"})


def test_bare_string_is_not_taken_as_a_list_of_letters():
    with pytest.raises(TypeError, match=r"include='head\.\*'.*\['head\.\*'\]"):
        match_names(NAMES, "head.*", argument="include", aliases={})


def test_names_may_be_an_iterator_with_several_patterns():
    assert match_names(iter(NAMES), ["body.0.*", "head.*"], argument="include", aliases={}) == {
        "body.0.weight",
        "body.0.bias",
        "head.weight",
    }


def test_names_have_no_prefix_of_torch_compile():
    net = nn.Sequential(nn.Linear(3, 3), torch.compile(nn.Sequential(nn.Linear(3, 2))))
    assert names(torch.compile(net)) == ["0.weight", "1.0.weight"]


def test_weight_normalized_layer_is_read_as_it_acts():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3, bias=False))
    with torch.no_grad():
        layer.parametrizations.weight.original0.copy_(torch.tensor([[1.0], [10.0], [100.0]]))
    weight = only(layer)
    assert weight.name == "parametrizations.weight.original1"
    assert weight.parameter is layer.parametrizations.weight.original1
    torch.testing.assert_close(weight.matrices()[0], layer(torch.eye(4)).T.detach())


def test_reading_a_spectrally_normalized_layer_changes_neither_its_buffers_nor_its_mode():
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)).train()
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    first, second = only(layer).matrices(), only(layer).matrices()
    assert torch.equal(first, second)
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
    assert all(submodule.training for submodule in layer.modules())


@pytest.mark.parametrize("family", ["Mamba", "Jamba"])
def test_decay_rates_and_skips_of_state_space_layers_are_no_matrices(family, tmp_path):
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "eos_token_id": 2, "bos_token_id": 1}
    extra = {
        "Mamba": {"state_size": 4},
        "Jamba": {
            "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 2,
            "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
            "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_d_conv": 2, "mamba_dt_rank": 4,
        },
    }[family]  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**sizes, **extra)
    model = transformers.AutoModelForCausalLM.from_config(config)
    decays = [name for name, parameter in model.named_parameters() if name.endswith(".A_log") and parameter.ndim == 2]
    assert decays
    matrices = {weight.name for weight in find_weights(model)}
    assert not {name for name in matrices if name.endswith((".A_log", ".D"))}
    assert any(name.endswith("in_proj.weight") for name in matrices)
    model.save_pretrained(tmp_path)
    assert {weight.name for weight in checkpoint_weights(tmp_path)} == matrices
