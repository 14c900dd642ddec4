"""The noise of a plain rerun: the same runs from two places, or from two numbers of threads, side by side.

``python -m benchmarks.forgetting.rerun PROTOCOL.toml ONE-runs.csv OTHER-runs.csv`` compares the runs that both files
have, of the same method, rate and seed: what each loses where it first comes down to the protocol's level.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.forgetting.comparison import compare, looking_up
from benchmarks.forgetting.protocol import Protocol
from benchmarks.forgetting.table import read_runs
from kappa_lightning.pilot.adaptation import read_at


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each method, and one for all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forgetting.rerun", description=__doc__)
    parser.add_argument("protocol", type=Path)
    parser.add_argument("one", type=Path)
    parser.add_argument("other", type=Path)
    args = parser.parse_args(argv)
    protocol = Protocol.read(args.protocol)
    one, other = ({run.spec: run for run in read_runs(file, protocol.mark())} for file in (args.one, args.other))
    level = protocol.level or compare(protocol, looking_up(one.values())).level
    assert level is not None
    both = [spec for spec in one if spec in other]
    print(f"read at a loss of {level:.4g}\n")
    print("| method | runs | equal to the last digit | one alone arrives | nats lost | difference, root mean square |")
    print("|---|---:|---:|---:|---:|---:|")
    for method in [*dict.fromkeys(spec.candidate for spec in both), "all"]:
        chosen = [spec for spec in both if method in (spec.candidate, "all")]
        read = [(read_at(one[spec].path, level), read_at(other[spec].path, level)) for spec in chosen]
        nats = [(a.nats, b.nats) for a, b in read if a is not None and b is not None]
        equal = sum(one[spec].path == other[spec].path for spec in chosen)
        alone = sum((a is None) != (b is None) for a, b in read)
        mean = float(np.mean([a for a, _ in nats])) if nats else math.nan
        noise = math.sqrt(float(np.mean([(a - b) ** 2 for a, b in nats]))) if nats else math.nan
        print(f"| {method} | {len(chosen)} | {equal} | {alone} | {mean:.4f} | {noise:.4f} |")


if __name__ == "__main__":
    main()
