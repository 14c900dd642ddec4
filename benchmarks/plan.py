"""What models of 7, 47 and 235 billion parameters take, and whether the plan of the second one is right.

    python -m benchmarks.plan 7b 47b 235b
    python -m benchmarks.plan 47b --measure

Each model is a folder with the headers of its checkpoint and no values (a sparse file), as ``kappa-lightning scan
--plan`` gets it. ``--measure`` profiles one real layer of the model as well, of noise with four learned directions, and
compares its time with what the plan says of such a layer. Seconds are those of this machine. The columns of a GPU are
calculated and not measured: a profile as one QR factorization of each matrix in float32 (on a CPU it takes about that,
see README.md) at ``--gpu-tflops``, a pass of the model as 6 operations for each active parameter and token at
``--pass-tflops``, reading at ``--disk`` GB/s.
"""

from __future__ import annotations

import argparse
import json
import struct
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn

from kappa_lightning import KappaProfile
from kappa_lightning.profile.estimate import Estimate, ShapeEstimate, estimate_profile
from kappa_lightning.weights import checkpoint_weights

CONFIGS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "7b": lambda: transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    ),
    "47b": lambda: transformers.MixtralConfig(),
    "235b": lambda: transformers.Qwen3MoeConfig(
        hidden_size=4096,
        intermediate_size=12288,
        moe_intermediate_size=1536,
        num_hidden_layers=94,
        num_attention_heads=64,
        num_key_value_heads=4,
        head_dim=128,  # type: ignore[call-arg] # which its type does not declare
        num_experts=128,
        num_experts_per_tok=8,
        vocab_size=151936,
    ),
}
"""The shapes of Llama-2-7B, Mixtral-8x7B and Qwen3-235B-A22B."""

ACTIVE = {"7b": 6.7e9, "47b": 12.9e9, "235b": 22e9}
"""Parameters that a token passes."""

SHARE = 0.1
"""Of the parameters that trains."""

TOKENS = 32 * 8 * 512
"""Of a sensitivity: 16 batches for each of its two figures, of 8 sequences of 512 tokens."""


def write_headers(folder: Path, config: transformers.PreTrainedConfig) -> None:
    """A checkpoint in bfloat16 whose values are a hole in the file."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    config.save_pretrained(folder)
    header, offset = {}, 0
    for name, parameter in model.named_parameters():
        end = offset + 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)


def plan_of(config: transformers.PreTrainedConfig) -> Estimate:
    """The plan of a model from its headers, embeddings excluded."""
    with tempfile.TemporaryDirectory() as folder:
        write_headers(Path(folder), config)
        weights = [weight for weight in checkpoint_weights(folder) if "embed_tokens" not in weight.name]
        return estimate_profile(weights)


def layer_of(config: transformers.PreTrainedConfig) -> nn.Module:
    """A layer with values: noise of standard deviation 0.02, and four directions that were learned."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    layer: nn.Module = model.model.layers[0]
    layer = layer.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            for matrix in parameter if parameter.ndim == 3 else [parameter]:
                values = 0.02 * torch.randn(matrix.shape, generator=generator)
                if matrix.ndim == 2:
                    left = torch.randn(matrix.shape[0], 4, generator=generator) / matrix.shape[0] ** 0.5
                    right = torch.randn(4, matrix.shape[1], generator=generator) / matrix.shape[1] ** 0.5
                    values += left @ (torch.tensor([8.0, 6.0, 4.0, 3.0]).unsqueeze(-1) * right)
                matrix.copy_(values)
    return layer


def on_gpu(estimate: Estimate, tflops: float) -> Estimate:
    """The same with the calculated seconds of a GPU."""

    def seconds(shape: ShapeEstimate) -> float:
        cols, rows = sorted(shape.shape)
        return (2 * rows * cols**2 - 2 * cols**3 / 3) / (tflops * 1e12)

    return replace(estimate, shapes=tuple(replace(shape, seconds=seconds(shape)) for shape in estimate.shapes))


def compare(name: str, estimate: Estimate, config: transformers.PreTrainedConfig) -> str:
    """A layer's measured time and its plan, both times the number of layers."""
    layer = layer_of(config)
    start = time.perf_counter()
    rows = list(KappaProfile.from_model(layer, progress=False))
    measured = time.perf_counter() - start
    each = {shape.shape: shape.seconds for shape in estimate.shapes}
    planned = sum(each[row.matrix_shape] * len(row.kappas or (0,)) for row in rows)
    layers = config.num_hidden_layers
    return (
        f"{name}: {layers} layers of {len(rows)} tensors are planned with {layers * planned:.0f} s; one took "
        f"{measured:.1f} s, so {layers * measured:.0f} s: plan over measurement {planned / measured:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=CONFIGS)
    parser.add_argument("--measure", action="store_true", help="profile one real layer of each, too")
    parser.add_argument("--gpu-tflops", type=float, default=10.0, help="of a QR factorization in float32")
    parser.add_argument("--pass-tflops", type=float, default=300.0, help="of a pass in bfloat16")
    parser.add_argument("--disk", type=float, default=2.0, help="GB/s")
    args = parser.parse_args()
    table = Table(title=f"{SHARE:.0%} of the parameters train, bfloat16; GPU calculated")
    for heading in (
        "model", "matrices", "CPU, min", "GPU, s", "8 GPUs, s", "read, s", "a tensor GiB",
        "weights GiB", "gradients", "Adam", "anchor", "sensitivity GiB", "sensitivity, s",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    said = []
    for name in args.models:
        config = CONFIGS[name]()
        estimate = plan_of(config)
        gpu = on_gpu(estimate, args.gpu_tflops)
        memory = {key: value / 2**30 for key, value in estimate.training_bytes(SHARE).items()}
        table.add_row(
            f"{name}, {estimate.parameters / 1e9:.1f} B",
            f"{sum(shape.count for shape in estimate.shapes):,}",
            *(f"{v:.4g}" for v in (estimate.seconds() / 60, gpu.seconds(), gpu.seconds(8))),
            f"{estimate.stored_bytes / args.disk / 1e9:.4g}",
            f"{estimate.peak_bytes() / 2**30:.3g}",
            *(f"{value:.4g}" for value in memory.values()),
            f"{6 * ACTIVE[name] * TOKENS / args.pass_tflops / 1e12:.3g}",
        )
        if args.measure:
            said.append(compare(name, estimate, config))
    Console(width=200).print(table, *said, sep="\n")


if __name__ == "__main__":
    main()
