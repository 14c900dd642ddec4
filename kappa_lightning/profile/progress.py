"""The progress bar of a profile outside of a Trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tqdm.auto import tqdm

from kappa_lightning.profile.row import KappaRow
from kappa_lightning.text import counted
from kappa_lightning.weights import Weight


def progress_bar(weights: Sequence[Weight], rows: Iterator[KappaRow]) -> Iterator[KappaRow]:
    """A progress bar on standard error whose estimate of the time left knows that large matrices take longer."""
    costs = {weight.name: weight.cost for weight in weights}
    layout = "{desc}: {percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]"
    with tqdm(desc="Condition numbers", total=sum(costs.values()), bar_format=layout, leave=False) as bar:
        for finished, row in enumerate(rows, start=1):
            bar.set_postfix_str(f"{finished}/{counted(len(costs), 'tensor')}", refresh=False)
            bar.update(costs[row.name])
            yield row
