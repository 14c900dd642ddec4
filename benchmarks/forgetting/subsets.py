"""Is the predicted forgetting of a choice the measured one? Random subsets of the tensors of the digits task.

Run ``python -m benchmarks.forgetting.subsets``. Each subset trains alone, until the loss on held-out inverted digits
has fallen to the level; there the divergence from the pretrained network on held-out digits as they are is read, in
nats a digit. That is forgetting at equal adaptation, as ``SensitivityProfile.forgetting`` predicts it. Printed is the
rank correlation of the two for each method, with a bootstrap interval over the subsets, beside that of plain size.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional

from benchmarks.forgetting.digits import DigitReader, Digits, InvertedDigits
from kappa_lightning import SensitivityProfile
from kappa_lightning.probes import Categorical, TaskInputs

DRAWS = 2000


def loss(model: Any, batch: Any) -> Tensor:
    """Cross-entropy of a batch."""
    return functional.cross_entropy(model(batch[0]), batch[1])


def forgotten(start: DigitReader, names: list[str], data: Digits, plain: Tensor, args: argparse.Namespace) -> float:
    """Nats a digit where the loss reaches the level, interpolated between steps; ∞ if it does not."""
    model = copy.deepcopy(start)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    torch.manual_seed(args.seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.0)
    images, labels = data.held_out.tensors
    before = Categorical(start(plain)).describe()
    last = (math.inf, 0.0)
    step = 0
    while step < args.steps:
        for batch in data.train_dataloader():
            optimizer.zero_grad()
            loss(model, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
            if step % args.every:
                continue
            with torch.no_grad():
                now = functional.cross_entropy(model(images), labels).item()
                nats = Categorical(model(plain)).divergence(before).mean().item()
            if now <= args.level:
                share = 1.0 if math.isinf(last[0]) else (last[0] - args.level) / (last[0] - now)
                return last[1] + share * (nats - last[1])
            last = (now, nats)
            if step >= args.steps:
                break
    return math.inf


def subsets(names: list[str], count: int, seed: int) -> list[list[str]]:
    """Random subsets of random sizes, from two tensors to all."""
    numbers = np.random.default_rng(seed)
    sizes = numbers.integers(2, len(names) + 1, count)
    return [sorted(numbers.choice(names, size, replace=False).tolist()) for size in sizes]


def correlation(predicted: list[float], measured: list[float]) -> tuple[float, float, float]:
    """Spearman's, and the middle 95 % of it over resampled subsets. What does not arrive ranks last, tied."""
    # A rank correlation takes no infinity; any number above all others is the same rank.
    x, y = (np.nan_to_num(np.array(values), posinf=1e9) for values in (predicted, measured))
    numbers = np.random.default_rng(0)
    drawn = [numbers.integers(0, len(x), len(x)) for _ in range(DRAWS)]
    every = [spearmanr(x[rows], y[rows]).statistic for rows in drawn]
    low, high = np.nanpercentile(every, [2.5, 97.5])
    return float(spearmanr(x, y).statistic), float(low), float(high)


def main() -> None:
    """Train the subsets and print the correlations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=64, help="how many subsets")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--level", type=float, default=1.0, help="the loss to arrive at, in nats")
    parser.add_argument("--steps", type=int, default=200, help="how many at most")
    parser.add_argument("--every", type=int, default=4, help="steps between two looks")
    parser.add_argument("--seed", type=int, default=0, help="of the network, the subsets and the order")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"))
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = InvertedDigits().model(args.seed, args.lr, args.cache).eval()
    data = Digits(args.seed, inverted=True)
    plain = Digits(args.seed, inverted=False).held_out.tensors[0]
    torch.manual_seed(args.seed)
    batches = [batch for batch, _ in zip(data.train_dataloader(), range(16), strict=False)]
    common: dict[str, Any] = {"reference": TaskInputs(), "exclude": (), "progress": False}
    optimizer = torch.optim.AdamW(start.parameters(), lr=args.lr, weight_decay=0.0)
    profiles = {
        "gradient": SensitivityProfile.from_model(start, batches, loss, draws=4, **common),
        "trial": SensitivityProfile.from_model(
            start, batches, loss, method="trial", optimizers=[optimizer], steps=32, **common
        ),
    }
    names = [row.name for row in profiles["gradient"]]
    sizes = {row.name: row.num_parameters for row in profiles["gradient"]}
    chosen = subsets(names, args.count, args.seed)
    chosen += [profile.select() for profile in profiles.values()] + [names]
    measured = [forgotten(start, each, data, plain, args) for each in chosen]
    arrived = sum(map(math.isfinite, measured[: args.count]))
    print(f"{arrived} of {args.count} random subsets of {len(names)} tensors arrive at a loss of {args.level}")
    random = measured[: args.count]
    rows = {method: [profile.forgetting(each) for each in chosen[: args.count]] for method, profile in profiles.items()}
    rows["fewest parameters"] = [float(sum(sizes[name] for name in each)) for each in chosen[: args.count]]
    rows["most parameters"] = [-value for value in rows["fewest parameters"]]
    for method, predicted in rows.items():
        found, low, high = correlation(predicted, random)
        print(f"{method:<18} Spearman {found:+.2f} [{low:+.2f}, {high:+.2f}]")
    finite = [value for value in random if math.isfinite(value)]
    print(f"nats a digit: random subsets {np.median(finite):.3f} in the median, {min(finite):.3f} at best", end="")
    for label, value, each in zip((*profiles, "all"), measured[args.count :], chosen[args.count :], strict=True):
        print(f"; {label} ({len(each)} tensors) {value:.3f}", end="")
    print()


if __name__ == "__main__":
    main()
