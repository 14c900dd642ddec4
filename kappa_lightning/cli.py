"""The command ``kappa-lightning``."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kappa_lightning.figures import profile_figure
from kappa_lightning.profile import KappaProfile, KappaRow
from kappa_lightning.profile.settings import EXPERTS
from kappa_lightning.selection import CRITERIA, DEFAULT_TOP_P, GROUPINGS, Budget, criterion_of, rank, select
from kappa_lightning.spectra import SOLVERS
from kappa_lightning.tables import format_kappa


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, 1 after an error, 2 for a wrong usage, 130 if interrupted."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        budget = _budget(args)
        _check_outputs(args)
        return _scan(args, budget)
    except BrokenPipeError:
        # The reader has what it wants, as `head` does; what is left in the buffer must not be tried again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, ValueError, TypeError, ImportError, torch.OutOfMemoryError, MemoryError) as error:
        hint = "" if args.device in (None, torch.device("cpu")) else "; --device cpu may have the memory"
        out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        reason = f"out of memory{hint} ({error})" if out_of_memory else error
        print(f"{parser.prog}: error: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        hint = "; the same command goes on from there" if args.out else ""
        print(f"{parser.prog}: interrupted{hint}", file=sys.stderr)
        return 130


def _scan(args: argparse.Namespace, budget: Budget) -> int:
    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    profile = KappaProfile.from_checkpoint(
        args.model,
        include=args.include,
        exclude=args.exclude,
        device=device,
        solver=args.solver,
        rtol=args.rtol,
        experts=args.experts,
        save_to=args.out,
        memory_budget=args.memory,
    )
    names = select(list(profile), budget, args.criterion, within=args.within, seed=args.seed)
    if args.figure is not None:
        profile_figure(profile, names, title=f"{'/'.join(Path(args.model).parts[-2:])}, {budget}").savefig(args.figure)
    if args.names:
        print("\n".join(names), flush=True)
        return 0
    console = Console()
    ranking = rank(profile, args.criterion, within=args.within, seed=args.seed)
    console.print(_table(ranking, names))
    chosen = sum(profile[name].num_parameters for name in names)
    total = sum(row.num_parameters for row in profile)
    console.print(
        f"{len(names)} of {len(profile)} tensors train under {budget}: {chosen:,} of {total:,} parameters "
        f"({chosen / total:.1%})"
    )
    return 0


def _table(ranking: Sequence[KappaRow], selected: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for header, justify in (("", "right"), ("tensor", "left"), ("shape", "right"), ("κ", "right"), ("trains", "left")):
        table.add_column(header, justify=justify, overflow="fold")  # type: ignore[arg-type]
    chosen = set(selected)
    for position, row in enumerate(ranking, start=1):
        mark = "yes" if row.name in chosen else ""
        shape = "×".join(map(str, row.shape))
        table.add_row(
            str(position), escape(row.name), shape, format_kappa(row.kappa), mark, style="bold" if mark else ""
        )
    return table


def _budget(args: argparse.Namespace) -> Budget:
    limits = {name: getattr(args, name) for name in ("top_p", "num_tensors", "max_kappa", "max_params")}
    return Budget(**(limits if any(limit is not None for limit in limits.values()) else {"top_p": DEFAULT_TOP_P}))


def _check_outputs(args: argparse.Namespace) -> None:
    """Find out before the work that its results could not be written."""
    for output in (args.out, args.figure):
        if output is not None and output.is_dir():
            raise IsADirectoryError(f"{output} is a folder: name a file")
        if output is not None and not output.parent.is_dir():
            raise FileNotFoundError(f"{output}: there is no folder {output.parent}")
    if args.figure is not None:
        known = Figure().canvas.get_supported_filetypes()
        if args.figure.suffix.lstrip(".").lower() not in known:
            raise ValueError(f"--figure {args.figure}: the ending must be one of {', '.join(sorted(known))}")


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device: use cpu, cuda, cuda:1, mps …") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{text!r} is not there: this machine, or this build of PyTorch, has no CUDA")
    return device


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([kmgt]?)i?b?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * 1024 ** " kmgt".index(match[2].lower() or " ")) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write a number of bytes, or 500M, 8G, …")
    return size


def _criterion(name: str) -> str:
    try:
        criterion_of(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def _int_or_share(text: str) -> int | float:
    return float(text) if "." in text or "e" in text.lower() else int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kappa-lightning", description="Condition numbers of a model's weights.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    scan = commands.add_parser(
        "scan",
        help="profile a checkpoint and show what would train",
        description="Profile the weight matrices of a checkpoint by condition number κ, from disk tensor by "
        "tensor, and show what would train. Without a budget, --top-p 0.2.",
    )
    scan.add_argument(
        "model", metavar="MODEL", help=".safetensors file, folder of one or of shards, .ckpt, or hub id in the cache"
    )
    budget = scan.add_mutually_exclusive_group()
    budget.add_argument("--top-p", type=float, metavar="P", help="share of the tensors that trains")
    budget.add_argument("--num-tensors", type=int, metavar="N", help="number of tensors that train")
    budget.add_argument("--max-kappa", type=float, metavar="K", help="tensors with a κ of at most K train")
    budget.add_argument(
        "--max-params", type=_int_or_share, metavar="N", help="number of parameters that train, or a share such as 0.25"
    )
    scan.add_argument(
        "--criterion", type=_criterion, default="kappa", metavar="NAME",
        help=f"what ranks the tensors: {', '.join(CRITERIA)}; reversed:kappa is the other way round",
    )  # fmt: skip
    scan.add_argument(
        "--within", default="all", choices=list(GROUPINGS), help="rank inside groups, each of which keeps its share"
    )
    scan.add_argument("--seed", type=int, default=0, metavar="N", help="of --criterion random")
    scan.add_argument("--include", nargs="+", default=["*"], metavar="GLOB", help="only tensors with these names")
    scan.add_argument("--exclude", nargs="+", default=[], metavar="GLOB", help="but not with these")
    scan.add_argument("--experts", default="mean", choices=list(EXPERTS), help="how the κ of fused experts combine")
    scan.add_argument("--device", type=_device, help="where to compute (default: cuda if there is one, else cpu)")
    scan.add_argument("--solver", default="auto", choices=list(SOLVERS), help="svd is exact and slow")
    scan.add_argument("--rtol", type=float, default=1e-3, help="relative error of κ (default: 0.001)")
    scan.add_argument(
        "--memory",
        type=_bytes,
        metavar="SIZE",
        help="working memory, such as 8G (default: a quarter of what is free, half on a GPU)",
    )
    scan.add_argument(
        "--out", type=Path, metavar="FILE", help="save the profile; an interrupted scan goes on from there"
    )
    scan.add_argument("--figure", type=Path, metavar="FILE", help="draw the profile (.png, .pdf, .svg)")
    scan.add_argument("--names", action="store_true", help="print only the names of what trains, one a line")
    return parser


if __name__ == "__main__":
    sys.exit(main())
