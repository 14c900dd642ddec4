"""``kappa-lightning walk-back``: part of the way back from a trained checkpoint to the pretrained one."""

from __future__ import annotations

import importlib
import itertools
import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import shtab

from kappa_lightning.cli.arguments import add_device, device_of
from kappa_lightning.cli.command import Command
from kappa_lightning.cli.terminal import say
from kappa_lightning.text import counted

_WINDOW = 128
"""Tokens of a window of a text."""
_TOKENIZERS = ("tokenizer_config.json", "tokenizer.json")
_ALONG = ("all", "role", "depth", "singular_values")


def _add_arguments(parser: ArgumentParser) -> None:
    for name, meaning in (("base", "the pretrained checkpoint"), ("trained", "the trained one")):
        action = parser.add_argument(
            name, metavar=name.upper(), help=f"{meaning}: .safetensors, .ckpt, a folder, or a hub id in the cache"
        )
        action.complete = shtab.FILE  # type: ignore[attr-defined]
    parser.add_argument(
        "--out", type=Path, metavar="PATH", help="a new file or folder for the chosen point, as TRAINED is"
    )
    parser.add_argument("--alpha", type=_factor, metavar="A", help="go there without a search: 0 is BASE, 1 is TRAINED")
    parser.add_argument(
        "--probe",
        action="append",
        default=[],
        metavar="WHAT",
        help="what is to be kept: a text file, for its perplexity; or package.module:function, which is called with "
        "TRAINED and returns a dict of probes; may be given several times",
    )
    parser.add_argument(
        "--monitor", metavar="WHAT", help="the new task: a text file, or package.module:function that returns a probe"
    )
    parser.add_argument(
        "--model",
        metavar="FUNCTION",
        help="package.module:function, which is called with TRAINED and returns the model with the checkpoint's names "
        "(default: transformers' causal language model of the folder)",
    )
    limits = parser.add_mutually_exclusive_group()
    limits.add_argument("--min-retention", type=float, metavar="R", help="what every probe must keep, at most 1")
    limits.add_argument("--monitor-limit", type=float, metavar="X", help="or the worst value that the monitor may have")
    parser.add_argument(
        "--along",
        default="all",
        choices=_ALONG,
        help="one factor for all, for each role or for each third of depth; or drop the small singular values of each "
        "update (default: all)",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="GLOB",
        help="what is new, such as a head, and stays as trained at every point; may be given several times",
    )
    parser.add_argument("--points", type=int, default=11, metavar="N", help="factors that are tried (default: 11)")
    parser.add_argument(
        "--bisections",
        type=int,
        default=3,
        metavar="N",
        help="how often the stretch from the best of them to the next, which misses the limit, is halved (default: 3)",
    )
    parser.add_argument("--windows", type=int, default=32, metavar="N", help="windows of each text (default: 32)")
    add_device(parser)


def _walk_back(args: Namespace) -> int:
    from kappa_lightning.anchoring.checkpoints import CheckpointWalk

    if args.alpha is None and not (args.probe and args.monitor):
        raise ValueError("give --alpha, or a --probe and a --monitor to search by")
    if args.alpha is not None and (args.probe or args.monitor):
        raise ValueError("--alpha says where to go, so --probe and --monitor would have no say: leave one or the other")
    if args.alpha is not None and args.out is None:
        raise ValueError("--alpha without --out would do nothing: name where the point is written")
    _require_in_range(args)
    walk = CheckpointWalk(args.base, args.trained, args.along, exclude=args.exclude)
    if args.out is not None:
        # Not when a search of hours is over.
        walk.require_target(args.out)
    factors = dict.fromkeys(walk.groups, args.alpha) if args.alpha is not None else _search(args, walk)
    if args.out is not None:
        say(f"{walk.changed} tensors at {_shown(factors)} written to {walk.save(factors, args.out)}")
    return 0


def _search(args: Namespace, walk: Any) -> Mapping[str, float]:
    from torch import nn

    from kappa_lightning.anchoring.choice import Goal, Point, check_points, search
    from kappa_lightning.anchoring.halves import HalvedProbes
    from kappa_lightning.anchoring.table import walk_table
    from kappa_lightning.evaluation import evaluate_probe

    device = device_of(args)
    made = _function(args.model, "--model")(args.trained) if args.model else _language_model(args)
    if not isinstance(made, nn.Module):
        raise TypeError(f"--model {args.model} returned a {type(made).__name__}: return the model, a torch.nn.Module")
    model = made.to(device).eval()
    probes: dict[str, Any] = {}
    for what in args.probe:
        found = _probes(what, args, "--probe")
        if twice := probes.keys() & found.keys():
            raise ValueError(f"--probe {what}: there is a probe {min(twice)!r} already: give each another name")
        probes |= found
    monitors = _probes(args.monitor, args, "--monitor")
    if len(monitors) != 1:
        raise ValueError(f"--monitor {args.monitor} gives {len(monitors)} probes: give one")
    ((name, monitor),) = monitors.items()
    goal = Goal(args.min_retention, args.monitor_limit, monitor.higher_is_better)
    halves = HalvedProbes(probes, False, lambda _, probe: evaluate_probe(model, probe))
    walk.load_into(model, 0.0)
    halves.begin_choice()

    def measure(factors: Mapping[str, float]) -> Point:
        walk.load_into(model, factors)
        point = Point(dict(factors), evaluate_probe(model, monitor), halves.choice())
        say(f"{_shown_briefly(point)}: {name} {point.monitor:.5g}, retention {point.lowest_retention:.4f}")
        return point

    points = list(search(measure, goal, walk.groups, check_points(args.points), args.bisections))
    best = goal.best(points)
    walk.load_into(model, 0.0)
    halves.begin_report()
    reports = {}
    for label, factors in (("trained", dict.fromkeys(walk.groups, 1.0)), ("chosen", best.factors)):
        walk.load_into(model, factors)
        reports[label] = halves.report()
    say(walk_table(points, best, reports, goal, monitor=name))
    if not goal.is_met(best):
        say(f"no point has {goal}; {_shown(best.factors)} comes nearest")
    return best.factors


def _require_in_range(args: Namespace) -> None:
    """Find out before anything is read or loaded what cannot be."""
    if args.alpha is None and args.min_retention is None and args.monitor_limit is None:
        raise ValueError("give --min-retention or --monitor-limit: the other figure is then as good as it can be")
    if args.min_retention is not None and not 0 < args.min_retention <= 1:
        raise ValueError(f"--min-retention {args.min_retention} must be in (0, 1], 1 being all")
    for flag, value, reason in (
        ("--points", args.points, "the two ends"),
        ("--windows", args.windows, "one to choose a point by and one to report on it"),
    ):
        if value < 2:
            raise ValueError(f"{flag} {value} is too small: give at least 2, {reason}")
    if args.bisections < 0:
        raise ValueError(f"--bisections {args.bisections} must not be negative; 0 is for the points alone")


def _probes(what: str, args: Namespace, flag: str) -> dict[str, Any]:
    from kappa_lightning.probes import Probe

    if Path(what).is_file():
        return {Path(what).stem: _text_probe(Path(what), args, flag)}
    if ":" not in what:
        raise ValueError(f"{flag} {what} is no text file and no package.module:function")
    found = _function(what, flag)(args.trained)
    probes = dict(found) if isinstance(found, Mapping) else {what.rpartition(":")[2]: found}
    for name, probe in probes.items():
        if not isinstance(probe, Probe):
            raise TypeError(
                f"{flag} {what} returned a {type(probe).__name__} as {name}: return a kappa_lightning.Probe"
            )
    if not probes:
        raise ValueError(f"{flag} {what} returned no probes")
    return probes


def _text_probe(file: Path, args: Namespace, flag: str) -> Any:
    import torch
    from transformers import AutoTokenizer

    from kappa_lightning.probes import PerplexityProbe

    # A trained model is often saved without the tokenizer that it shares with its base.
    folders = [path for path in (args.trained, args.base) if not Path(path).is_file()]
    own = (path for path in folders if any((Path(path) / name).is_file() for name in _TOKENIZERS))
    folder = next(own, folders[-1] if folders else None)
    if folder is None:
        raise ValueError(
            f"{flag} {file} is a text, and neither {args.trained} nor {args.base} is a folder with a tokenizer: give "
            "package.module:function, which returns a probe with the text as tokens"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    try:
        with file.open(encoding="utf-8") as opened:
            text = opened.read(_WINDOW * args.windows * 12)
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} {file} is no text in UTF-8 ({error}): give plain text") from error
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = min(_WINDOW - len(first), max(1, len(ids) // 2))
    windows = [first + ids[at : at + body] for at in range(0, len(ids) - body + 1, body)][: args.windows]
    if len(windows) < 2 or len(windows[0]) < 2:
        raise ValueError(f"{flag} {file} has {counted(len(ids), 'token')}, too few for two windows: give a longer text")
    return PerplexityProbe([{"input_ids": torch.tensor([window])} for window in windows])


def _language_model(args: Namespace) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    source = Path(args.trained)
    if source.is_file():
        raise ValueError(
            f"{source} is no folder that transformers can load: say with --model package.module:function how its model "
            "is made"
        )
    if (source / "adapter_config.json").is_file():
        # transformers puts an adapter's layers into the base under other names than the adapter's file has.
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
        return PeftModel.from_pretrained(base, args.trained)
    return AutoModelForCausalLM.from_pretrained(args.trained, dtype=torch.float32)


def _function(what: str, flag: str) -> Callable[..., Any]:
    module, _, name = what.partition(":")
    if not (module and name):
        raise ValueError(f"{flag} {what} is no package.module:function")
    # As a script of the user's own would find its modules.
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{flag} {what}: {error}") from error
    except AttributeError as error:
        raise ValueError(f"{flag} {what}: {module} has no {name}") from error
    if not callable(found):
        raise TypeError(f"{flag} {what} is a {type(found).__name__}, which cannot be called")
    function: Callable[..., Any] = found
    return function


def _shown_briefly(point: Any) -> str:
    """On one line, however many groups there are."""
    several = len(set(point.factors.values())) > 1
    return f"mean alpha={point.alpha:.6g}" if several else _shown(point.factors)


def _shown(factors: Mapping[str, float]) -> str:
    if len(set(factors.values())) == 1:
        return f"alpha={next(iter(factors.values())):.6g}"
    return ", ".join(f"{group}: {factor:.6g}" for group, factor in itertools.islice(factors.items(), 40))


def _factor(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is no number in [0, 1]") from error
    if not 0 <= value <= 1:
        raise ArgumentTypeError(f"{text} is not in [0, 1]")
    return value


COMMAND = Command(
    summary="go part of the way back from a trained checkpoint to the pretrained one",
    description="Set the weights to points between two checkpoints, tensor by tensor from disk, measure probes and\n"
    "the new task there, and write the point that keeps enough. A point is chosen on every other\n"
    "batch and reported on the others. With --alpha nothing is measured.",
    example="kappa-lightning walk-back base/ tuned/ --probe wiki.txt --monitor task.txt --min-retention 0.95 --out w/",
    add_arguments=_add_arguments,
    run=_walk_back,
)
