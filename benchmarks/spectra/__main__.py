"""How fast is κ, and how right? A profile against PEFT's selector, a full SVD, and the bare factorization.

Run one case, or several: ``python -m benchmarks.spectra tinyllama minilm``. All competitors run in the same process on
the same weights, by turns; the figures that matter are the ratios. PEFT's selector and ``KappaProfile`` get the same
model. Of many matrices of one shape only the first few run, and the times are scaled up by the count: such figures
carry a ~.
"""

import argparse
from pathlib import Path

from benchmarks.spectra.comparison import HEADER, compare, mixtral
from benchmarks.spectra.tables import fingerprints, floor, scaling, small
from benchmarks.spectra.weights import case_weights
from kappa_lightning.files import write_text

NAMES = (
    "minilm", "tinyllama", "deepseek-moe", "deepseek-fused", "square4096", "4096x14336", "mixtral",
    "small", "floor", "scaling", "fingerprint",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spectra", description=__doc__)
    parser.add_argument("cases", nargs="+", choices=NAMES, help="what to run")
    parser.add_argument("--full", action="store_true", help="run every matrix: no ~ figures")
    parser.add_argument("--subset", type=int, default=8, help="matrices of each shape that run (default 8)")
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="turns of every competitor, of which the fastest counts, in the case floor the median (default 3)",
    )
    parser.add_argument("--spikes", type=int, default=4, help="learned directions in generated weights (default 4)")
    parser.add_argument("--output", type=Path, help="also write the tables to this markdown file")
    arguments = parser.parse_args()

    tables = []
    for name in arguments.cases:
        if name == "scaling":
            table = scaling()
        elif name == "small":
            table = small(arguments.repeats)
        elif name == "floor":
            table = floor(arguments.repeats)
        elif name == "fingerprint":
            table = fingerprints(arguments.spikes)
        elif name == "mixtral":
            table = mixtral(arguments.spikes)
        else:
            limit = None if arguments.full or name == "minilm" else arguments.subset
            weights = case_weights(name, arguments.spikes)
            table = [*HEADER, *compare(name, weights, limit, arguments.repeats)]
        tables.append("\n".join(table))
        print(tables[-1], end="\n\n", flush=True)
    if arguments.output:
        write_text(arguments.output, "\n\n".join(tables) + "\n")


if __name__ == "__main__":
    main()
