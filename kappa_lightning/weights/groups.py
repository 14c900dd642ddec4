"""Groups of parameters by the part of a network that they belong to: ``"@attention"``, ``"@mlp"`` and so on.

The rules follow the names that the large families use in transformers, timm, torchvision and the original releases
(Llama, Qwen, Gemma, Mistral, GPT-2, GPT-NeoX, BERT, ViT, Swin, CLIP, T5, Phi, Falcon, OPT, BLOOM, Mixtral, DeepSeek,
OLMoE, gpt-oss, Llama 4, Granite-MoE), and, where the module is at hand, what the layers are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from torch import nn
from torch.nn.modules.conv import _ConvNd

from kappa_lightning.weights.names import plain_name, tied_names
from kappa_lightning.weights.roles import start_of_layers

GROUPS: dict[str, str] = {
    "@embeddings": "tables of tokens, positions and segments, class and mask tokens, patch projections",
    "@attention": "the projections of attention, of any kind",
    "@mlp": "feed-forward layers, those of experts included",
    "@gate_up": "of the feed-forward layers, what leads into the hidden width (gate and up)",
    "@down": "of the feed-forward layers, what leads out of the hidden width",
    "@experts": "routed and shared experts, fused or separate",
    "@router": "what chooses the experts",
    "@head": "the output head; a head that is tied to the embedding counts as embedding",
}
"""What each group holds. Biases go with their weights; normalization layers are in no group but ``@head``."""


def group_members(group: str, names: Iterable[str], module: nn.Module | None = None) -> set[str]:
    """Those of some parameters that belong to a group.

    Args:
        group: a key of :data:`GROUPS`.
        names: plain parameter names.
        module: whose they are, if it is at hand; otherwise (a checkpoint) the names alone decide.

    Raises:
        ValueError: if there is no such group.

    Example:
        >>> names = ["wte.weight", "h.0.attn.c_proj.weight", "h.0.mlp.c_fc.weight", "h.0.mlp.c_proj.weight"]
        >>> {group: sorted(group_members(group, names)) for group in ("@attention", "@down")}
        {'@attention': ['h.0.attn.c_proj.weight'], '@down': ['h.0.mlp.c_proj.weight']}
    """
    require_group(group)
    names = list(names)
    places = _Places(names, module)
    return {name for name in names if group in places.groups_of(name)}


def require_group(group: str) -> None:
    """Make sure that there is a group of this name.

    Raises:
        ValueError: if there is none; the message lists the groups.
    """
    if group not in GROUPS:
        raise ValueError(f"there is no group {group!r} of parameters: the groups are {', '.join(GROUPS)}")


# Modules around others: activation checkpoints and FSDP's.
_AROUND = re.compile(r"\b_(?:fsdp_wrapped_module|checkpoint_wrapped_module)(?:\.|$)")
# What a weight is made from, by parametrizations and PEFT: it belongs where the layer does.
_MADE_FROM = re.compile(
    r"parametrizations\.(?P<made>\w+)\.(?:original\d*|\d+\.\w+)$"
    r"|\b(?P<old>weight)_[gv]$"
    r"|\b(?:base_layer|original_module)\."
    r"|\b(?:modules_to_save|lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|trainable_tokens_delta)\.\w+\.?"
)

_NORM = re.compile(r"norm|(?:^|_)ln(?:_?(?:\d+|f|pre|post))?(?:_|$)", re.IGNORECASE)
_EMBEDDING = re.compile(
    r"(?:^|_)(?:emb|embed|embeds|embedding|embeddings)(?:_|$)|^w[tp]e$|^shared$|^rel_(?:pos|embeddings)"
    r"|^(?:cls|class|dist|distillation|mask|register|reg)_tokens?$|^relative_(?:attention|position)_bias",
    re.IGNORECASE,
)
_NO_EMBEDDING = re.compile(r"proj|mapping|_out$|linear|dense|fc|model|net|norm", re.IGNORECASE)
_PATCHES = re.compile(r"^patch_?embed", re.IGNORECASE)
_LINEAR = (nn.Linear, _ConvNd, nn.Bilinear, nn.RNNBase)

_HEAD = re.compile(
    r"(?:^|_)heads?$|(?:^|_)classifier$|^(?:score|cls|qa_outputs|embed_out|vocab_projector|proj_out|logits_proj)$"
)
_SHORT_HEAD = re.compile(r"^(?:fc|output)$")

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_ATTENTION_LEAF = re.compile(r"^(?:[qkvo]_proj|qkv|qkv_proj|query_key_value|[Ww]qkv|[qkv]_lin)$")

_MLP = re.compile(
    r"(?:^|_)(?:mlp|mlps|ffn|ffns|ff|moe|experts?|feed_?forward)\d*(?:_|$)|^dense(?:gated)?(?:relu)?(?:act)?dense$",
    re.IGNORECASE,
)
_MLP_LEAF = re.compile(r"^(?:gate_up_proj|gate_proj|up_proj|down_proj|dense_h_to_4h|dense_4h_to_h|c_fc)$")
# These stand beside the attention in the repeated layer itself; elsewhere the names say nothing.
_MLP_LEAF_OF_LAYER = re.compile(r"^(?:fc[12]|linear[12]|lin[12])$")
_GATE_UP = re.compile(
    r"^(?:(?:gate|up)(?:_proj)?|gate_up(?:_proj)?|w1|w3|v1|w12|wi|wi_[01]|c_fc|fc1|fc_in|lin1|linear_?1|layer_1|dense1"
    r"|dense_h_to_4h|ffn|input_linear|intermediate_dense|weights_in|ff_proj)$",
    re.IGNORECASE,
)
_DOWN = re.compile(
    r"^(?:down(?:_proj)?|w2|wo|c_proj|fc2|fc_out|lin2|linear_?2|layer_2|dense2|dense_4h_to_h|ffn_output|output_linear|output_dense"
    r"|weights_out|ff_out)$",
    re.IGNORECASE,
)
# BERT's kind of feed-forward layer: intermediate.dense leads in, output.dense out.
_BERT = {"intermediate": "@gate_up", "intermediate_query": "@gate_up", "output": "@down", "output_query": "@down"}

_EXPERTS = re.compile(r"^(?:shared_)?experts?(?:_\d+)?$")
# Experts without a module of their own, in the MoE layer itself: the fused weights of JetMoe and Granite's older files.
_FUSED = ("input_linear", "output_linear")
# Gemma 3n's modality_router mixes the streams of a layer, and routes no token to an expert.
_ROUTER = re.compile(r"(?<!modality)(?:^|_)router$|^shared_expert_gate$")

# What leads from one modality into another: by its class a feed-forward layer in some models, but none of the layers'.
_CONNECTOR = re.compile(r"^(?:connector|multi_modal_projector|modality_projection)$")


class _Places:
    """The parameters of a model, and what tells to which groups each belongs."""

    def __init__(self, names: Sequence[str], module: nn.Module | None) -> None:
        self.layers = {} if module is None else _layers(module)
        self.aliases: dict[str, list[str]] = {}
        for alias, first in ({} if module is None else tied_names(module)).items():
            self.aliases.setdefault(first, []).append(alias)
        every = [_parts(name) for name in names]
        # What holds experts: the "gate" beside them is a router, and elsewhere a projection.
        self.moes = {tuple(parts[:index]) for parts in every for index in _named_experts(parts)}
        self.moes |= {tuple(parts[:index]) for parts in every for index, part in enumerate(parts) if part == "router"}
        self.layers_of_moes = {moe[:-1] for moe in self.moes}

    def groups_of(self, name: str) -> frozenset[str]:
        if any(_is_embedding(_parts(each), self.layers) for each in (name, *self.aliases.get(name, ()))):
            return frozenset({"@embeddings"})
        parts = _parts(name)
        if _is_head(parts):
            return frozenset({"@head"})
        if _is_norm(parts, _owner(parts, self.layers)):
            return frozenset()
        if _is_router(parts, self.moes):
            return frozenset({"@router"})
        groups = {"@experts"} if self._of_experts(parts) else set()
        kind = _kind(parts, self.layers)
        if kind == "@mlp" or (kind is None and groups):
            return frozenset({*groups, "@mlp", *_side(parts)})
        return frozenset(groups if kind is None else {*groups, kind})

    def _of_experts(self, parts: Sequence[str]) -> bool:
        if _named_experts(parts):
            return True
        for index, part in enumerate(parts[:-1]):
            outside = tuple(parts[:index])
            if part in _FUSED and outside in self.moes:
                return True
            # Granite's hybrids have it beside the MoE layer, others within it; without one it is the MLP itself.
            if part == "shared_mlp" and (outside in self.moes or outside in self.layers_of_moes):
                return True
        return False


def _layers(module: nn.Module) -> dict[str, nn.Module]:
    """The submodules by the names that :func:`_parts` gives."""
    every = module.named_modules(remove_duplicate=False)
    # Of a wrapper and what it wraps, which get one name, the wrapped one comes last.
    return {_AROUND.sub("", plain_name(f"{name}.")).strip("."): layer for name, layer in every}


def _parts(name: str) -> list[str]:
    """A name's parts, without those that say only how its layer is wrapped or its weight is made."""
    bare = _MADE_FROM.sub(lambda found: found["made"] or found["old"] or "", _AROUND.sub("", name))
    return bare.strip(".").split(".")


def _owner(parts: Sequence[str], layers: Mapping[str, nn.Module]) -> nn.Module | None:
    layer = layers.get(".".join(parts[:-1]))
    for inner in ("base_layer", "original_module"):
        layer = getattr(layer, inner, layer)
    return layer


def _leaf(parts: Sequence[str]) -> str:
    """The innermost part that is a name: the layer's, or that of a bare parameter, whose bias goes by its name."""
    part = next((part for part in reversed(parts) if part not in ("weight", "bias") and not part.isdigit()), parts[-1])
    return part if part.startswith("relative_") else part.removesuffix("_bias")


def _is_embedding(parts: Sequence[str], layers: Mapping[str, nn.Module]) -> bool:
    owner = _owner(parts, layers)
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return True
    if any(_PATCHES.match(part) for part in parts[-3:-1]) or parts[-2:-1] == ["conv_proj"]:
        return not _is_norm(parts, owner)
    if isinstance(owner, _LINEAR) or type(owner).__name__ == "Conv1D":
        return False  # GPT-2's Conv1D is a Linear
    leaf = _leaf(parts)
    is_bias_table = leaf.startswith("relative_")
    return _EMBEDDING.search(leaf) is not None and (is_bias_table or _NO_EMBEDDING.search(leaf) is None)


def _is_head(parts: Sequence[str]) -> bool:
    modules = parts[:-1]
    start = start_of_layers(".".join(parts))
    for index, part in enumerate(modules):
        if _HEAD.search(part):
            return start is None or len(".".join(parts[:index])) < start
    alone = not any(part.isdigit() or _ATTENTION.search(part) or _MLP.search(part) for part in modules)
    return alone and bool(modules) and _SHORT_HEAD.match(modules[-1]) is not None


def _is_norm(parts: Sequence[str], owner: nn.Module | None) -> bool:
    if isinstance(owner, _LINEAR):
        return False
    return "norm" in type(owner).__name__.lower() or any(_NORM.search(part) for part in parts[-2:-1])


def _named_experts(parts: Sequence[str]) -> list[int]:
    """Where the parts name experts."""
    found = [index for index, part in enumerate(parts) if _EXPERTS.match(part)]
    inside = [index + 1 for index, part in enumerate(parts[:-1]) if part.endswith("_moe")]
    return found + [index for index in inside if parts[index] in _FUSED]


def _is_router(parts: Sequence[str], moes: set[tuple[str, ...]]) -> bool:
    if parts[-1] == "e_score_correction_bias":
        return True
    for index, part in enumerate(parts[:-1]):
        beside_experts = tuple(parts[:index]) in moes or (index > 0 and parts[index - 1].endswith("moe"))
        if _ROUTER.search(part) or (part == "gate" and beside_experts):
            return True
    return False


def _kind(parts: Sequence[str], layers: Mapping[str, nn.Module]) -> str | None:
    """``"@attention"`` or ``"@mlp"``, as the innermost part says that says either."""
    leaf = _leaf(parts)
    if _ATTENTION_LEAF.match(leaf):
        return "@attention"
    if any(_CONNECTOR.match(part) for part in parts):
        return None
    in_layer = start_of_layers(".".join(parts)) is not None
    if _MLP_LEAF.match(leaf) or (in_layer and _MLP_LEAF_OF_LAYER.match(leaf)):
        return "@mlp"
    for index in range(len(parts) - 2, -1, -1):
        part, layer = parts[index], layers.get(".".join(parts[: index + 1]))
        if _EXPERTS.match(part) and index > 0 and _ATTENTION.search(parts[index - 1]):
            return "@attention"  # experts of attention, as JetMoe has them
        kind = type(layer).__name__.lower()
        if _ATTENTION.search(part) or isinstance(layer, nn.MultiheadAttention) or kind.endswith("attention"):
            return "@attention"
        if _MLP.search(part) or kind.endswith(("mlp", "feedforward")):
            return "@mlp"
        if part in _BERT and parts[index + 1] == "dense" and index > 0 and parts[index - 1].isdigit():
            return "@mlp"
    return None


def _side(parts: Sequence[str]) -> set[str]:
    """The side of the hidden width on which a projection of a feed-forward layer is."""
    leaf = _leaf(parts)
    if _GATE_UP.match(leaf):
        return {"@gate_up"}
    if _DOWN.match(leaf):
        return {"@down"}
    for part, inner in pairwise(parts):
        if part in _BERT and inner == "dense":
            return {_BERT[part]}
    # A sequence of projection, activation, perhaps dropout, and projection, as torchvision and diffusers have it.
    at = max(index for index, part in enumerate(parts) if part.removesuffix("_bias") == leaf)
    place = parts[at - 1] if leaf == "proj" else next(iter(parts[at + 1 :]), "")
    if _MLP.search(leaf) or leaf in ("net", "proj"):
        return {"0": {"@gate_up"}, "2": {"@down"}, "3": {"@down"}}.get(place, set())
    return set()
