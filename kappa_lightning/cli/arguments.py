"""Arguments that several commands share, and how their texts become values."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import shtab
import torch

from kappa_lightning.selection import CRITERIA, DEFAULT_TOP_P, GROUPINGS, Budget, criterion_of


def add_model(parser: argparse.ArgumentParser) -> None:
    """The checkpoint that is read, as ``model``."""
    action = parser.add_argument(
        "model", metavar="MODEL", help=".safetensors file, folder of one or of shards, .ckpt, or hub id in the cache"
    )
    action.complete = shtab.FILE  # type: ignore[attr-defined]


def add_budget(parser: argparse.ArgumentParser) -> None:
    """The budgets, of which at most one is given; see :func:`budget_of`."""
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--top-p", type=float, metavar="P", help="share of the tensors that trains")
    budget.add_argument("--num-tensors", type=int, metavar="N", help="number of tensors that train")
    budget.add_argument("--max-kappa", type=float, metavar="K", help="tensors with a κ of at most K train")
    budget.add_argument(
        "--max-params", type=int_or_share, metavar="N", help="number of parameters that train, or a share such as 0.25"
    )


def budget_of(args: argparse.Namespace) -> Budget:
    """The budget that was given, or else the default share."""
    limits = {name: getattr(args, name) for name in ("top_p", "num_tensors", "max_kappa", "max_params")}
    return Budget(**(limits if any(limit is not None for limit in limits.values()) else {"top_p": DEFAULT_TOP_P}))


def add_ranking(parser: argparse.ArgumentParser) -> None:
    """What ranks the tensors: ``criterion``, ``within`` and ``seed``."""
    parser.add_argument(
        "--criterion", type=criterion, default="kappa", metavar="NAME",
        help=f"what ranks the tensors: {', '.join(CRITERIA)}; reversed:kappa is the other way round",
    )  # fmt: skip
    parser.add_argument(
        "--within", default="all", choices=list(GROUPINGS), help="rank inside groups, each of which keeps its share"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of --criterion random")


def add_patterns(parser: argparse.ArgumentParser) -> None:
    """Which tensors are looked at: ``include`` and ``exclude``."""
    parser.add_argument("--include", nargs="+", default=["*"], metavar="GLOB", help="only tensors with these names")
    parser.add_argument("--exclude", nargs="+", default=[], metavar="GLOB", help="but not with these")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where to compute, as ``device``; see :func:`device_of`."""
    parser.add_argument("--device", type=device, help="where to compute (default: cuda if there is one, else cpu)")


def device_of(args: argparse.Namespace) -> torch.device:
    """The device that was given, or else the GPU if there is one."""
    given: torch.device | None = args.device
    return given or torch.device("cuda" if torch.cuda.is_available() else "cpu")


def add_output(parser: argparse.ArgumentParser, flag: str, help: str) -> None:
    """A file that is written; see :func:`require_writable`."""
    action = parser.add_argument(flag, type=Path, metavar="FILE", help=help)
    action.complete = shtab.FILE  # type: ignore[attr-defined]


def require_writable(*outputs: Path | None) -> None:
    """Find out before the work that its results could not be written.

    Raises:
        OSError: if a file is a folder, or its folder is not there.
    """
    for output in outputs:
        if output is not None and output.is_dir():
            raise IsADirectoryError(f"{output} is a folder: name a file")
        if output is not None and not output.parent.is_dir():
            raise FileNotFoundError(f"{output}: there is no folder {output.parent}")


def require_drawable(flag: str, figure: Path | None) -> None:
    """Find out before the work that a picture could not be drawn in the format that its name asks for.

    Raises:
        ValueError: if the ending is that of no format.
    """
    if figure is None:
        return
    from matplotlib.figure import Figure  # which takes a second to import

    known = Figure().canvas.get_supported_filetypes()
    if format_of(figure) not in known:
        raise ValueError(f"{flag} {figure}: the ending must be one of {', '.join(sorted(known))}")


def format_of(figure: Path) -> str:
    """The format that a picture's name asks for."""
    return figure.suffix.lstrip(".").lower()


def device(text: str) -> torch.device:
    """A device that is there, for ``type=``."""
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device: use cpu, cuda, cuda:1, mps …") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{text!r} is not there: this machine, or this build of PyTorch, has no CUDA")
    return device


def size_in_bytes(text: str) -> int:
    """A number of bytes such as ``8G``, for ``type=``."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([kmgt]?)i?b?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * 1024 ** " kmgt".index(match[2].lower() or " ")) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write a number of bytes, or 500M, 8G, …")
    return size


def criterion(name: str) -> str:
    """The name of a criterion that is there, for ``type=``."""
    try:
        criterion_of(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def int_or_share(text: str) -> int | float:
    """A count if it is written as a whole number, else a share, for ``type=``."""
    return float(text) if "." in text or "e" in text.lower() else int(text)
