"""How much of a choice by κ is the way in which the model is written down?

The gain g of a norm can be folded into the matrices that read it, W·diag(g) behind a norm without one: the same
function, the same gradients up to the scale of g, another κ. A criterion of the function would choose alike.

    python -m benchmarks.forgetting.folded FOLDER        # of a causal language model with Llama's names
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence

import torch
from scipy.stats import spearmanr

from benchmarks.forgetting.controls import first_within, folded_gains
from kappa_lightning import KappaProfile
from kappa_lightning.selection import rank
from kappa_lightning.weights import find_weights
from kappa_lightning.weights.patterns import included
from kappa_lightning.weights.roles import depth_and_role


def compare(model: torch.nn.Module, share: float) -> list[str]:
    """The choice of lowest κ within a share of the parameters, as the model is and with its gains folded, in words."""
    weights = included(find_weights(model), model, ("*",), ("@embeddings",))
    written = rank(KappaProfile.from_weights(weights), "kappa")
    with folded_gains(model):
        folded = rank(KappaProfile.from_weights(weights), "kappa")
    first, second = (first_within(ranking, share) for ranking in (written, folded))
    sizes = {row.name: row.num_parameters for row in written}
    both = set(first) & set(second)
    kappas = [{row.name: row.kappa for row in ranking} for ranking in (written, folded)]
    correlation = spearmanr([kappas[0][name] for name in sizes], [kappas[1][name] for name in sizes]).statistic
    return [
        f"{len(written)} matrices, {share:.0%} of their parameters by lowest κ",
        f"as the model is:     {len(first)} matrices: {_kinds(first)}",
        f"with gains folded:   {len(second)} matrices: {_kinds(second)}",
        f"in both:             {len(both)}, {sum(sizes[n] for n in both) / sum(sizes[n] for n in first):.1%} of the "
        "parameters of the first",
        f"κ of all, Spearman:  {correlation:.3f}",
    ]


def _kinds(names: Sequence[str]) -> str:
    counts = Counter(depth_and_role(name)[1].removesuffix(".weight").rpartition(".")[2] for name in names)
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())


def main(argv: Sequence[str] | None = None) -> None:
    """Print the comparison."""
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(prog="python -m benchmarks.forgetting.folded", description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="of the model, or its hub id")
    parser.add_argument("--share", type=float, default=0.25, help="of the parameters that is chosen (default: 0.25)")
    args = parser.parse_args(argv)
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32)
    print("\n".join(compare(model, args.share)))


if __name__ == "__main__":
    main()
