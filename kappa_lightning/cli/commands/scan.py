"""``kappa-lightning scan``: the condition numbers of a checkpoint, and what would train."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from kappa_lightning.cli.arguments import (
    add_budget,
    add_device,
    add_model,
    add_output,
    add_patterns,
    add_ranking,
    budget_of,
    device_of,
    format_of,
    require_drawable,
    require_writable,
    size_in_bytes,
)
from kappa_lightning.cli.command import Command
from kappa_lightning.cli.plan import chosen_weights, show_plan
from kappa_lightning.cli.terminal import print_table, printable, say
from kappa_lightning.files import replacing
from kappa_lightning.profile import KappaProfile, KappaRow
from kappa_lightning.profile.progress import progress_bar
from kappa_lightning.profile.settings import EACH, EXPERTS, ProfileSettings
from kappa_lightning.profile.shares import profile_share, rank_of_launcher
from kappa_lightning.selection import rank, select
from kappa_lightning.spectra import SOLVERS
from kappa_lightning.tables import format_kappa
from kappa_lightning.text import counted

# Narrower, the headings would be folded into letters.
_LEAST_WIDTH = 60


def _add_arguments(parser: ArgumentParser) -> None:
    add_model(parser)
    add_budget(parser)
    add_ranking(parser)
    add_patterns(parser)
    parser.add_argument(
        "--experts",
        default="mean",
        choices=[*EXPERTS, EACH],
        help="how the κ of fused experts combine; each: a row for every expert",
    )
    add_device(parser)
    parser.add_argument("--solver", default="auto", choices=list(SOLVERS), help="svd is exact and slow")
    parser.add_argument("--rtol", type=float, default=1e-3, help="relative error of κ (default: 0.001)")
    parser.add_argument(
        "--memory",
        type=size_in_bytes,
        metavar="SIZE",
        help="working memory, such as 8G (default: a quarter of what is free, half on a GPU)",
    )
    add_output(parser, "--out", "save the profile; an interrupted scan goes on from there")
    add_output(parser, "--figure", "draw the profile (.png, .pdf, .svg)")
    parser.add_argument(
        "--plan",
        action="store_true",
        help="decompose nothing: print what this scan and a fine-tuning would take, from the shapes alone",
    )
    parser.add_argument(
        "--devices", type=int, default=1, metavar="N", help="with --plan: how many devices like this one share the work"
    )
    parser.add_argument(
        "--rank", type=int, metavar="R", help="do only this share of the work, from 0; the last one writes --out"
    )
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="how many shares there are, on machines with a folder in common"
    )
    parser.add_argument(
        "--shared", action="store_true", help="take rank and world size from torchrun, a Slurm array or srun"
    )
    parser.add_argument("--names", action="store_true", help="print only the names of what trains, one a line")


def _scan(args: Namespace) -> int:
    budget = budget_of(args)
    if args.plan:
        return show_plan(args)
    require_writable(args.out, args.figure)
    require_drawable("--figure", args.figure)
    profile = _profile(args)
    if profile is None:
        return 0
    names = select(list(profile), budget, args.criterion, within=args.within, seed=args.seed)
    if args.figure is not None:
        _draw(profile, names, f"{'/'.join(Path(args.model).parts[-2:])}, {budget}", args.figure)
    if args.names:
        for name in names:
            # A name on two lines would be taken for two names.
            say(printable(name))
        return 0
    ranking = rank(profile, args.criterion, within=args.within, seed=args.seed)
    print_table(_table(ranking, names), least_width=_LEAST_WIDTH)
    chosen = sum(profile[name].num_parameters for name in names)
    total = sum(row.num_parameters for row in profile)
    verb = "trains" if len(names) == 1 else "train"
    say(
        f"{len(names)} of {counted(len(profile), 'tensor')} {verb} under {budget}: {chosen:,} of "
        f"{counted(total, 'parameter')} ({chosen / total:.1%})"
    )
    return 0


def _profile(args: Namespace) -> KappaProfile | None:
    """The profile; ``None`` if this was one share of it and others are missing."""
    if args.rank is None and args.world_size is None and not args.shared:
        return KappaProfile.from_checkpoint(
            args.model,
            include=args.include,
            exclude=args.exclude,
            device=device_of(args),
            solver=args.solver,
            rtol=args.rtol,
            experts=args.experts,
            save_to=args.out,
            memory_budget=args.memory,
        )
    if not args.shared and (args.rank is None or args.world_size is None):
        raise ValueError("--rank and --world-size go together; --shared takes both from torchrun or Slurm")
    if args.out is None:
        raise ValueError("a scan in shares needs --out, beside which the shares are kept")
    rank, world_size = rank_of_launcher(os.environ) if args.shared else (args.rank, args.world_size)
    profile, missing = profile_share(
        chosen_weights(args),
        ProfileSettings(args.solver, args.rtol, args.experts, args.memory),
        rank=rank,
        world_size=world_size,
        source=args.model,
        save_to=args.out,
        device=device_of(args) or "cpu",
        watch=progress_bar,
    )
    if profile is None:
        ranks = ", ".join(map(str, missing))
        say(f"The share of rank {rank} is done. Missing: rank {ranks} of {world_size}; the last writes {args.out}.")
    return profile


def _table(ranking: Sequence[KappaRow], selected: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("tensor", overflow="fold")
    table.add_column("shape", justify="right", no_wrap=True)
    table.add_column("κ", justify="right", no_wrap=True)
    table.add_column("trains", no_wrap=True)
    chosen = set(selected)
    for position, row in enumerate(ranking, start=1):
        mark = "yes" if row.name in chosen else ""
        shape = "×".join(map(str, row.shape))
        name, kappa = printable(row.name), format_kappa(row.kappa)
        table.add_row(str(position), name, shape, kappa, mark, style="bold" if mark else "")
    return table


def _draw(profile: KappaProfile, names: Sequence[str], title: str, file: Path) -> None:
    from kappa_lightning.figures import profile_figure

    with replacing(file) as temporary:
        profile_figure(profile, names, title=title).savefig(temporary, format=format_of(file))


COMMAND = Command(
    summary="profile a checkpoint and show what would train",
    description="Profile the weight matrices of a checkpoint by condition number κ, from disk tensor by\n"
    "tensor, and show what would train. Without a budget, --top-p 0.2.",
    example="kappa-lightning scan model.safetensors --top-p 0.2 --out kappa.json --figure kappa.png",
    add_arguments=_add_arguments,
    run=_scan,
    resumes=lambda args: args.out is not None,
)
