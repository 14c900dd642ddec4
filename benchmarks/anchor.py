"""What an anchor costs: the time and the peak memory of an optimizer step with and without one, in the same run.

    python -m benchmarks.anchor [--model small|FOLDER] [--steps 5] [--threads 1]

Each case runs in a process of its own, so that its peak memory is its own. A task batch is 4 sequences of 125 tokens,
an anchor's batch 2 sequences of 96 tokens that the model generated itself, or of 48. ``small`` is a random Llama of 7 M
parameters; a folder is any causal model's, such as the one that ``benchmarks.forgetting.smollm2`` makes. The figure on
the new task, which costs a pass at every logged step alone, is off.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from kappa_lightning import PretrainedAnchor
from kappa_lightning.weights import match_names, plain_parameters

CASES = ("none", "recorded", "recorded, 48 tokens", "recorded, 64 likeliest", "forward", "task batch")
SMALL = "small"
TRAINS = ("all", "gate and up")


class Learner(pl.LightningModule):
    """A causal language model that learns random tokens, and the time of each of its steps."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.seconds: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The next-token loss."""
        self.started = time.perf_counter()
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        """The optimizer has stepped."""
        self.seconds.append(time.perf_counter() - self.started)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on what trains."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-5)


def load(name: str) -> Any:
    """The model of a name."""
    if name != SMALL:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def measure(name: str, case: str, trains: str, steps: int) -> dict[str, float]:
    """The figures of one case, in this process."""
    model = load(name)
    if trains == "gate and up":
        wanted = match_names(plain_parameters(model), ["*gate_proj*", "*up_proj*"], argument="trains", aliases={})
        for parameter_name, parameter in plain_parameters(model).items():
            parameter.requires_grad_(parameter_name in wanted)
    module = Learner(model)
    options: dict[str, Any] = {"batch_size": 2, "batches": 4, "num_tokens": 96, "new_task_divergence": False}
    anchors: dict[str, dict[str, Any]] = {
        "recorded": {"reference": "generated", "source": "recorded"},
        "recorded, 48 tokens": {"reference": "generated", "source": "recorded", "num_tokens": 48},
        "recorded, 64 likeliest": {"reference": "generated", "source": "recorded", "top_k": 64},
        "forward": {"reference": "generated", "source": "forward"},
        "task batch": {"reference": "batch", "output": lambda module, batch: module.model(input_ids=batch).logits},
    }
    callbacks: list[pl.Callback] = [] if case == "none" else [PretrainedAnchor(**{**options, **anchors[case]})]
    tokens = torch.randint(model.config.vocab_size, (4 * steps, 125), generator=torch.Generator().manual_seed(1))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tempfile.gettempdir(),
    )
    trainer.fit(module, DataLoader(tokens, batch_size=4))  # type: ignore[arg-type]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    # The first step makes the optimizer's state.
    return {"seconds": statistics.median(module.seconds[1:]), "megabytes": peak}


def main() -> None:
    """Run every case in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description="What an anchor costs in each step.")
    parser.add_argument("--model", default=SMALL, help="small, or a folder of transformers")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--trains", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.case is not None:
        print(json.dumps(measure(args.model, args.case, args.trains, args.steps)))
        return
    table = Table(title=f"{args.model}, {args.steps} steps, {args.threads} threads, torch {torch.__version__}")
    for header in ("trains", "anchor", "s/step", "times", "peak MB", "more MB"):
        table.add_column(header, justify="left" if header in ("trains", "anchor") else "right")
    for trains in TRAINS:
        plain: dict[str, float] = {}
        for case in CASES:
            options = ["--model", args.model, "--steps", str(args.steps), "--threads", str(args.threads)]
            command = [sys.executable, "-m", "benchmarks.anchor", *options, "--case", case, "--trains", trains]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found = json.loads(output.splitlines()[-1])
            plain = plain or found
            table.add_row(
                trains,
                case,
                f"{found['seconds']:.3f}",
                f"{found['seconds'] / plain['seconds']:.2f}",
                f"{found['megabytes']:,.0f}",
                f"{found['megabytes'] - plain['megabytes']:+,.0f}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
