"""What does it cost to choose by sensitivity? Time and memory of a profile, and how they grow.

Run ``python -m benchmarks.sensitivity --model FOLDER --problems gsm8k``, where FOLDER holds a causal language model of
transformers and ``gsm8k`` has a ``train.jsonl``, or ``python -m benchmarks.sensitivity --pictures 224`` for a
classifier of pictures of that many pixels a side. Each line is a process of its own: the seconds of text (or inputs),
signal and sensitivity, what the process took at its peak beyond what it had with the model loaded, and, for comparison,
that of one training step with AdamW.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kappa_lightning import SensitivityProfile
from kappa_lightning.probes import GeneratedText, SynthesizedInputs
from kappa_lightning.sensitivity.measure import Measurement, Watch
from kappa_lightning.weights import find_weights, included

MEBIBYTE = 2**20


def encode(tokenizer: Any, file: Path, count: int, batch_size: int) -> list[dict[str, torch.Tensor]]:
    """The first problems of up to 125 tokens with their solutions, padded; labels are the solutions' tokens."""
    samples = []
    for line in file.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        prompt = tokenizer(entry["question"] + "\n").input_ids
        answer = [*tokenizer(entry["answer"]).input_ids, tokenizer.eos_token_id]
        if len(prompt) + len(answer) <= 125:
            samples.append((prompt, answer))
        if len(samples) == count:
            break
    batches = []
    for start in range(0, count, batch_size):
        part = samples[start : start + batch_size]
        width = max(len(prompt) + len(answer) for prompt, answer in part)
        ids = torch.full((len(part), width), tokenizer.eos_token_id)
        labels = torch.full((len(part), width), -100)
        for row, (prompt, answer) in enumerate(part):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : end] = torch.tensor(answer)
        batches.append({"input_ids": ids, "labels": labels, "attention_mask": (ids != -1).long()})
    return batches


def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of the solutions."""
    found: torch.Tensor = model(**batch).loss
    return found


def peak() -> int:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(
    folder: Path, problems: Path, sequences: int, examples: int, layers: int | None, autocast: bool
) -> dict[str, float]:
    """One profile in this process."""
    model, tokenizer = load(folder, layers)
    batches = encode(tokenizer, problems / "train.jsonl", examples, 4)
    before = peak()
    seconds: dict[str, float] = {}
    weights = included(find_weights(model), model, ("*",), ("@embeddings",))
    measurement = Measurement(model, weights, batches, loss, GeneratedText(sequences, 96, batch_size=4))
    if autocast:
        measurement.precision = partial(torch.autocast, "cpu", torch.bfloat16)
    measurement.watch = timing(seconds)
    start = time.perf_counter()
    profile = SensitivityProfile(*measurement.by_gradients())
    total = time.perf_counter() - start
    candidates = sum(row.num_parameters for row in profile) * 4
    return {
        **seconds,
        "total": total,
        "beyond": (peak() - before) / MEBIBYTE,
        "gradient": candidates / MEBIBYTE,
        "model": sum(p.numel() * 4 for p in model.parameters()) / MEBIBYTE,
    }


def timing(seconds: dict[str, float]) -> Watch:
    """In place of a progress bar: what each part takes."""

    @contextmanager
    def watch(description: str, total: int) -> Iterator[Callable[[int], None]]:
        start = time.perf_counter()
        yield lambda steps: None
        seconds[description] = time.perf_counter() - start

    return watch


def pictures(size: int, batch_size: int) -> dict[str, float]:
    """A profile along the first steps of a network of ResNet-18's size, on inputs that it synthesizes."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(layer_type="basic", hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2])
    config.num_labels = 100
    model: Any = ResNetForImageClassification(config)
    batches = [
        {"pixel_values": torch.randn(batch_size, 3, size, size), "labels": torch.randint(100, (batch_size,))}
        for _ in range(16)
    ]
    before, seconds = peak(), dict[str, float]()
    weights = included(find_weights(model), model, ("*",), ("@embeddings",))
    measurement = Measurement(model, weights, batches, loss, SynthesizedInputs(), watch=timing(seconds))
    start = time.perf_counter()
    SensitivityProfile(*measurement.by_path([torch.optim.AdamW(model.parameters(), lr=1e-4)]))
    total = time.perf_counter() - start
    return {**seconds, "total": total, "beyond": (peak() - before) / MEBIBYTE}


def step(folder: Path, problems: Path, layers: int | None) -> dict[str, float]:
    """A training step of everything with AdamW in this process."""
    model, tokenizer = load(folder, layers)
    (batch,) = encode(tokenizer, problems / "train.jsonl", 4, 4)
    before = peak()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    start = time.perf_counter()
    loss(model, batch).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return {"total": time.perf_counter() - start, "beyond": (peak() - before) / MEBIBYTE}


def load(folder: Path, layers: int | None) -> tuple[Any, Any]:
    """Model and tokenizer; the model has only its first layers if their number is given."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {} if layers is None else {"num_hidden_layers": layers}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return model, AutoTokenizer.from_pretrained(folder)


def alone(function: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Call a function in a fresh process, whose peak is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--problems", type=Path)
    parser.add_argument("--pictures", type=int, metavar="PIXELS", help="a classifier of pictures instead, 16 batches")
    parser.add_argument("--batch-size", type=int, default=8, help="of pictures")
    parser.add_argument("--autocast", action="store_true", help="under bfloat16 autocast, as precision='bf16-mixed'")
    parser.add_argument("--quick", action="store_true", help="only the first line")
    args = parser.parse_args()
    if args.pictures is not None:
        found = alone(partial(pictures, args.pictures, args.batch_size))
        print(", ".join(f"{name} {value:.1f} s" for name, value in found.items() if name != "beyond"), end="")
        print(f"; {found['beyond']:,.0f} MiB more")
        return
    if args.model is None or args.problems is None:
        parser.error("give --model and --problems, or --pictures")
    line = "{:<34} {:>6} {:>7} {:>12} {:>7}   {:>8} {:>9} {:>7}"
    print(line.format("", "text", "signal", "sensitivity", "total", "MiB more", "gradient", "model"))
    runs = [(24, 32, None), (12, 32, None), (24, 16, None), (24, 32, 15)]
    for sequences, examples, layers in runs[:1] if args.quick else runs:
        found = alone(partial(measured, args.model, args.problems, sequences, examples, layers, args.autocast))
        name = f"{sequences} sequences, {examples} examples" + ("" if layers is None else f", {layers} layers")
        times = [f"{found[key]:.1f}" for key in ("Generating text", "Signal", "Sensitivity", "total")]
        print(line.format(name, *times, *(f"{found[key]:,.0f}" for key in ("beyond", "gradient", "model"))), flush=True)
    found = alone(partial(step, args.model, args.problems, None))
    print(f"a training step of 4 examples with AdamW takes {found['total']:.1f} s and {found['beyond']:,.0f} MiB more")


if __name__ == "__main__":
    main()
