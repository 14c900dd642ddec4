"""What ``kappa-lightning scan --plan`` prints: the time and the memory of a scan and of a fine-tuning."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table
from tqdm.auto import tqdm

from kappa_lightning.cli.arguments import device_of
from kappa_lightning.cli.terminal import print_table, say
from kappa_lightning.profile.estimate import Estimate, Shape, estimate_profile
from kappa_lightning.profile.settings import ProfileSettings
from kappa_lightning.text import counted
from kappa_lightning.weights import Weight, checkpoint_weights, included_by_name

_SHARES = (0.1, 0.2, 0.5, 1.0)
_LEAST_WIDTH = 60


def show_plan(args: Namespace) -> int:
    """Print the estimate for the model and the settings of a scan's arguments."""
    if args.devices < 1:
        raise ValueError(f"--devices {args.devices} must be at least 1")
    settings = ProfileSettings(args.solver, args.rtol, args.experts, args.memory)
    # Whole tensors, since the work on them is that on their experts.
    chosen = chosen_weights(args, split=False)
    device = device_of(args) or "cpu"
    estimate = estimate_profile(chosen, settings, device=device, track=_track)
    print_table(_time(estimate), least_width=_LEAST_WIDTH)
    say(
        f"{counted(len(estimate.tensors), 'tensor')} of {counted(estimate.parameters, 'parameter')}: "
        f"{_duration(estimate.seconds())} on one device like this ({device}), "
        + (f"{_duration(estimate.seconds(args.devices))} on {args.devices}, " if args.devices > 1 else "")
        + f"beside reading {_size(estimate.stored_bytes)} once; at most {_size(estimate.peak_bytes())} for one tensor "
        "in work."
    )
    print_table(_memory(estimate), least_width=_LEAST_WIDTH)
    say("In the precision of the file, without activations. The gradient for the sensitivity is gone before training.")
    return 0


def chosen_weights(args: Namespace, *, split: bool = True) -> list[Weight]:
    """The checkpoint's weights that the patterns leave, as parts where a row for each is asked for.

    Raises:
        ValueError: if none is left.
    """
    chosen = included_by_name(checkpoint_weights(args.model), args.include, args.exclude, option="--")
    if not chosen:
        raise ValueError(f"no matrix to profile: --include {args.include} and --exclude {args.exclude} leave none")
    return ProfileSettings(experts=args.experts).split(chosen) if split else chosen


def _track(shapes: Sequence[Shape]) -> Iterable[Shape]:
    return tqdm(shapes, desc="Measuring", unit="shape", leave=False)


def _time(estimate: Estimate) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("matrices", "shape", "stored as", "each", "all"):
        table.add_column(heading, justify="right", no_wrap=True)
    for shape in estimate.shapes:
        kind = str(shape.dtype).removeprefix("torch.")
        rows, cols = shape.shape
        together = _duration(shape.count * shape.seconds)
        table.add_row(f"{shape.count:,}", f"{rows}×{cols}", kind, _duration(shape.seconds), together)
    return table


def _memory(estimate: Estimate) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("trains", justify="right", no_wrap=True)
    columns = estimate.training_bytes(1.0)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for share in _SHARES:
        table.add_row(f"{share:.0%}", *(_size(value) for value in estimate.training_bytes(share).values()))
    return table


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"
