"""What training a tenth of the experts costs, beside training the whole fused tensors: memory and time of a step.

    python -m benchmarks.parts [--experts 32] [--steps 3]

Each case runs in a process of its own, so that its peak memory is its own. The layer is one of OLMoE's kind with
experts of 512 columns and 512 rows in between, in float32, computed with one grouped product for all experts.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
import transformers
from rich.console import Console
from rich.table import Table

from kappa_lightning.parts import split_into_parts, train_parts
from kappa_lightning.weights import find_weights

CASES = ("nothing", "tenth", "half", "all parts", "whole")


def measure(case: str, experts: int, steps: int) -> dict[str, float]:
    """The figures of one case, in this process."""
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        hidden_size=512, intermediate_size=512, num_experts=experts, num_experts_per_tok=8
    )
    config._experts_implementation = "grouped_mm"
    layer = transformers.models.olmoe.modeling_olmoe.OlmoeSparseMoeBlock(config)  # type: ignore[no-untyped-call]
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    layer.requires_grad_(case == "whole")
    if case not in ("whole", "nothing"):
        weights = split_into_parts(find_weights(layer), layer)
        parts = [weight.part for weight in weights if weight.part is not None]
        share = {"tenth": 0.1, "half": 0.5, "all parts": 1.0}[case]
        # The first experts' gate-up and down projections.
        chosen = [part for part in parts if int(part.label) < round(share * experts)]
        train_parts(layer, chosen)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    x = torch.randn(1, 256, config.hidden_size, requires_grad=True)
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        layer(x).square().mean().backward()
        if optimizer is not None:
            optimizer.step()
        times.append(time.perf_counter() - start)
        gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
        for parameter in trained:
            parameter.grad = None
    state = [] if optimizer is None else [v for s in optimizer.state.values() for v in s.values()]
    return {
        "trained": sum(p.numel() for p in trained) / 1e6,
        "gradient MiB": gradients / 2**20,
        "optimizer MiB": sum(value.nbytes for value in state) / 2**20,
        "peak MiB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        "s/step": min(times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.case, arguments.experts, arguments.steps)))
        return
    table = Table(title=f"One MoE layer of {arguments.experts} experts, float32, AdamW")
    for heading in (
        "trains",
        "M parameters",
        "gradient MiB",
        "optimizer MiB",
        "peak above the weights MiB",
        "s a step",
    ):
        table.add_column(heading, justify="right")
    for case in CASES:
        command = [sys.executable, "-m", "benchmarks.parts", "--case", case]
        command += ["--experts", str(arguments.experts), "--steps", str(arguments.steps)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        figures = json.loads(output.splitlines()[-1])
        table.add_row(case, *(f"{value:.4g}" for value in figures.values()))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
