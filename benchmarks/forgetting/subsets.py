"""Is the predicted forgetting of a choice the measured one? Random subsets of the matrices of the digits network.

    python -m benchmarks.forgetting.subsets             # measures what is not in the CSV yet, then the page
    python -m benchmarks.forgetting.subsets --page      # the page again, from the CSV alone

Half of the subsets are of random size, half fill a quarter of the parameters. Each trains alone, at the slowest rate
of a grid of factor two that brings the loss on held-out inverted digits to the level within the steps; there the
divergence from the pretrained network on held-out digits as they are is read, in nats a digit. That is forgetting at
equal adaptation, as ``SensitivityProfile.forgetting`` predicts it. It is predicted with each of :func:`estimators`.
The CSV grows by a line a subset, so that a run goes on after an interruption.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.forgetting.digits import DigitReader, Digits, InvertedDigits
from benchmarks.forgetting.subsets_page import write_page
from kappa_lightning import SensitivityProfile
from kappa_lightning.probes import Categorical, SynthesizedInputs, TaskInputs
from kappa_lightning.sensitivity.row import SensitivityRow
from recipes.shared.schedule import warmup_cosine

EVIDENCE = Path(__file__).parent / "evidence"
COUNT = 16
STEPS = 300
LEVEL = 1.0
EVERY = 6
QUARTER = 0.25
FASTEST = 2e-2
TRIAL_RATE = 1e-3

Predict = Callable[[list[str]], float]


@dataclass
class Start:
    """A pretrained network, what it learns, and digits as they are: held-out ones, and unlabeled ones to ask about."""

    model: DigitReader
    data: Digits
    plain: Tensor
    labels: Tensor
    unlabeled: Tensor
    seed: int

    @classmethod
    def of(cls, seed: int, cache: Path) -> Start:
        """That of a seed."""
        before = Digits(seed, inverted=False)
        plain, labels = before.held_out.tensors
        model = InvertedDigits().model(seed, TRIAL_RATE, cache).eval()
        return cls(model, Digits(seed, inverted=True), plain, labels, before.learned.tensors[0][:512], seed)

    def sizes(self) -> dict[str, int]:
        """The parameters of each matrix."""
        return {name: p.numel() for name, p in self.model.named_parameters() if p.ndim > 1}

    def batches(self) -> list[list[Tensor]]:
        """Sixteen of the new task."""
        torch.manual_seed(self.seed)
        return [batch for batch, _ in zip(self.data.train_dataloader(), range(16), strict=False)]


def loss(model: Any, batch: Any) -> Tensor:
    """Cross-entropy of a batch."""
    return functional.cross_entropy(model(batch[0]), batch[1])


def subset(sizes: dict[str, int], seed: int, number: int) -> list[str]:
    """A random subset of the matrices: of random size, or, for odd numbers, filling a quarter of the parameters."""
    numbers = np.random.default_rng(seed * 1000 + number)
    names = list(sizes)
    if number % 2 == 0:
        return sorted(numbers.choice(names, numbers.integers(2, len(names) + 1), replace=False).tolist())
    limit, chosen, used = QUARTER * sum(sizes.values()), [], 0
    for name in map(str, numbers.permutation(names)):
        if sizes[name] > limit:
            continue
        if used + sizes[name] > limit:
            break
        chosen.append(name)
        used += sizes[name]
    return chosen


def forgotten(start: Start, names: list[str], lr: float) -> tuple[float, float] | None:
    """Nats a digit and the share of the accuracy that is kept at the level; ``None`` if the loss does not reach it."""
    model = copy.deepcopy(start.model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    torch.manual_seed(start.seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True)
    schedule = warmup_cosine(optimizer, STEPS)
    images, labels = start.data.held_out.tensors
    with torch.no_grad():
        said = start.model(start.plain)
        before, first = Categorical(said).describe(), _accuracy(said, start.labels)
        last = (functional.cross_entropy(start.model(images), labels).item(), 0.0, 1.0)
    for step, batch in enumerate(_endlessly(start.data), start=1):
        optimizer.zero_grad()
        loss(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % EVERY == 0 or step == STEPS:
            with torch.no_grad():
                now, said = functional.cross_entropy(model(images), labels).item(), model(start.plain)
            nats = Categorical(said).divergence(before).mean().item()
            kept = _accuracy(said, start.labels) / first
            if now <= LEVEL:
                share = (last[0] - LEVEL) / (last[0] - now) if last[0] > now else 1.0
                return last[1] + share * (nats - last[1]), last[2] + share * (kept - last[2])
            last = (now, nats, kept)
        if step == STEPS:
            break
    return None


def at_its_rate(start: Start, names: list[str]) -> tuple[float, float, float]:
    """The slowest rate of the grid that arrives, nats and what is kept there; NaN, ∞ and 0 if none does."""
    sizes = start.sizes()
    # The smaller, the faster: only where the search begins.
    lr = 5e-4 * 2 ** round(0.5 * math.log2(0.5 * sum(sizes.values()) / sum(sizes[name] for name in names)))
    found = forgotten(start, names, lr)
    while found is None and lr < FASTEST:
        lr *= 2
        found = forgotten(start, names, lr)
        if found is not None:
            return lr, *found
    if found is None:
        return math.nan, math.inf, 0.0
    while (slower := forgotten(start, names, lr / 2)) is not None:
        lr, found = lr / 2, slower
    return lr, *found


def estimators(start: Start) -> dict[str, Predict]:
    """The predictions of a network's subsets: one for each method and reference, and for Adam's signal."""
    batches = start.batches()
    references: dict[str, Any] = {
        "inputs": TaskInputs(),
        "synthesized": SynthesizedInputs(),
        "unlabeled digits": [start.unlabeled[i : i + 32] for i in range(0, len(start.unlabeled), 32)],
    }
    found: dict[str, Predict] = {}
    profiles: dict[str, SensitivityProfile] = {}
    for reference, asked in references.items():
        for method in ("gradient", "path", "trial"):
            optimizer = torch.optim.AdamW(start.model.parameters(), lr=TRIAL_RATE, weight_decay=0.0)
            profile = SensitivityProfile.from_model(
                start.model, batches, loss, method=method, optimizers=[optimizer], steps=32, reference=asked, draws=4,
                exclude=(), progress=False,
            )  # fmt: skip
            profiles[f"{method}, {reference}"] = profile
            found[f"{method}, {reference}"] = profile.forgetting
    for reference in references:
        gradient, path = (profiles[f"{method}, {reference}"] for method in ("gradient", "path"))
        found[f"path without pairs, {reference}"] = SensitivityProfile(list(path)).forgetting
        found[f"path signal, diagonal, {reference}"] = with_signals({row.name: row.signal for row in path}, gradient)
    signals = adam_signals(start, batches)
    found["Σ ḡ²/√E g², diagonal, synthesized"] = with_signals(signals, profiles["gradient, synthesized"])
    sizes = start.sizes()
    found["fewest parameters"] = lambda names: float(sum(sizes[name] for name in names))
    found["most parameters"] = lambda names: -float(sum(sizes[name] for name in names))
    return found


def with_signals(signals: dict[str, float], profile: SensitivityProfile) -> Predict:
    """The predictions of a profile whose signals are others."""
    rows = [SensitivityRow(r.name, r.shape, signals[r.name], r.sensitivity, r.num_parameters) for r in profile]
    return SensitivityProfile(rows).forgetting


def adam_signals(start: Start, batches: list[list[Tensor]]) -> dict[str, float]:
    """b = Σ ḡ²/√E g² of the gradients g of single batches: how far Adam's steps reach."""
    names = list(start.sizes())
    parameters = [start.model.get_parameter(name) for name in names]
    each = [torch.autograd.grad(loss(start.model, batch), parameters) for batch in batches]
    found = {}
    for name, gradients in zip(names, zip(*each, strict=True), strict=True):
        g = torch.stack(gradients)
        found[name] = float((g.mean(0).square() / g.square().mean(0).sqrt().clamp_min(1e-12)).sum())
    return found


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(-1) == labels).float().mean().item()


def _endlessly(data: Digits) -> Iterator[Any]:
    while True:
        yield from data.train_dataloader()


def main() -> None:
    """Measure what is missing, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[200, 201, 202, 203])
    parser.add_argument("--count", type=int, default=COUNT, help="how many subsets of each network")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"))
    parser.add_argument("--csv", type=Path, default=EVIDENCE / "digits_subsets.csv")
    parser.add_argument("--page", action="store_true", help="measure nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.page:
        measure(args)
    print(write_page(args.csv))


def measure(args: argparse.Namespace) -> None:
    """Add a line for each subset that is not there."""
    done = set()
    if args.csv.exists():
        with args.csv.open(encoding="utf-8", newline="") as stream:
            done = {(int(row["seed"]), int(row["number"])) for row in csv.DictReader(stream)}
    for seed in args.seeds:
        missing = [number for number in range(args.count) if (seed, number) not in done]
        if not missing:
            continue
        start = Start.of(seed, args.cache)
        predictions = estimators(start)
        sizes = start.sizes()
        for number in missing:
            names = subset(sizes, seed, number)
            lr, nats, kept = at_its_rate(start, names)
            row = {
                "seed": seed, "number": number, "kind": "quarter" if number % 2 else "any",
                "parameters": sum(sizes[name] for name in names), "rate": f"{lr:.4g}", "nats": f"{nats:.6g}",
                "kept": f"{kept:.6g}", **{label: f"{predict(names):.6g}" for label, predict in predictions.items()},
                "tensors": " ".join(names),
            }  # fmt: skip
            with args.csv.open("a", encoding="utf-8", newline="") as stream:
                writer = csv.DictWriter(stream, list(row), lineterminator="\n")
                if stream.tell() == 0:
                    writer.writeheader()
                writer.writerow(row)


if __name__ == "__main__":
    main()
