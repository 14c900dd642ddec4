"""``kappa-lightning walk-back``: part of the way back from a trained checkpoint to the pretrained one."""

from __future__ import annotations

import importlib
import itertools
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import shtab

from kappa_lightning.cli.arguments import add_device, device_of
from kappa_lightning.cli.command import Command
from kappa_lightning.cli.terminal import say

_WINDOW = 128
"""Tokens of a window of a text."""
_ALONG = ("all", "role", "depth", "singular_values")


def _add_arguments(parser: ArgumentParser) -> None:
    for name, meaning in (("base", "the pretrained checkpoint"), ("trained", "the trained one")):
        action = parser.add_argument(
            name, metavar=name.upper(), help=f"{meaning}: .safetensors, .ckpt, a folder, or a hub id in the cache"
        )
        action.complete = shtab.FILE  # type: ignore[attr-defined]
    parser.add_argument("--out", type=Path, metavar="PATH", help="where the chosen point is written, as TRAINED is")
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
    parser.add_argument("--along", default="all", choices=_ALONG, help="one factor for all, for each role or for depth")
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="GLOB",
        help="what is new, such as a head, and stays as trained at every point; may be given several times",
    )
    parser.add_argument("--points", type=int, default=11, metavar="N", help="factors that are tried (default: 11)")
    parser.add_argument("--windows", type=int, default=32, metavar="N", help="windows of each text (default: 32)")
    add_device(parser)


def _walk_back(args: Namespace) -> int:
    from kappa_lightning.anchoring.checkpoints import CheckpointWalk

    if args.alpha is None and not (args.probe and args.monitor):
        raise ValueError("give --alpha, or a --probe and a --monitor to search by")
    if args.alpha is not None and (args.probe or args.monitor):
        raise ValueError("--alpha says where to go, so --probe and --monitor would have no say: leave one or the other")
    if args.out is not None and not args.out.parent.is_dir():
        raise FileNotFoundError(f"{args.out}: there is no folder {args.out.parent}")
    if args.alpha is not None and args.out is None:
        raise ValueError("--alpha without --out would do nothing: name where the point is written")
    walk = CheckpointWalk(args.base, args.trained, args.along, exclude=args.exclude)
    factors = dict.fromkeys(walk.groups, args.alpha) if args.alpha is not None else _search(args, walk)
    if args.out is not None:
        say(f"{walk.changed} tensors at {_shown(factors)} written to {walk.save(factors, args.out)}")
    return 0


def _search(args: Namespace, walk: Any) -> Mapping[str, float]:
    from kappa_lightning.anchoring.choice import Goal, Point, check_points, search
    from kappa_lightning.anchoring.halves import HalvedProbes
    from kappa_lightning.anchoring.table import walk_table
    from kappa_lightning.evaluation import evaluate_probe

    device = device_of(args)
    model = (_called(args.model, "--model") if args.model else _language_model)(args.trained).to(device).eval()
    probes = {name: probe for what in args.probe for name, probe in _probes(what, args).items()}
    monitors = _probes(args.monitor, args)
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
        say(f"{_shown(factors)}: {name} {point.monitor:.5g}, retention {point.lowest_retention:.4f}")
        return point

    points = list(search(measure, goal, walk.groups, check_points(args.points)))
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


def _probes(what: str, args: Namespace) -> dict[str, Any]:
    if Path(what).is_file():
        return {Path(what).stem: _text_probe(Path(what), args)}
    if ":" not in what:
        raise ValueError(f"{what} is no text file and no package.module:function")
    found = _called(what, "--probe")(args.trained)
    return dict(found) if isinstance(found, Mapping) else {what.rpartition(":")[2]: found}


def _text_probe(file: Path, args: Namespace) -> Any:
    import torch
    from transformers import AutoTokenizer

    from kappa_lightning.probes import PerplexityProbe

    tokenizer = AutoTokenizer.from_pretrained(args.trained)
    text = file.read_text(encoding="utf-8")[: _WINDOW * args.windows * 12]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = min(_WINDOW - len(first), max(1, len(ids) // 2))
    windows = [first + ids[at : at + body] for at in range(0, len(ids) - body + 1, body)][: args.windows]
    if len(windows) < 2 or len(windows[0]) < 2:
        raise ValueError(f"{file} has {len(ids)} tokens, too few for two windows")
    return PerplexityProbe([{"input_ids": torch.tensor([window])} for window in windows])


def _language_model(path: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    if not Path(path).is_dir():
        raise ValueError(
            f"{path} is no folder that transformers can load: say with --model package.module:function how its model "
            "is made"
        )
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def _called(what: str, flag: str) -> Callable[..., Any]:
    module, _, name = what.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except AttributeError as error:
        raise ValueError(f"{flag} {what}: {module} has no {name}") from error
    if not callable(found):
        raise TypeError(f"{flag} {what} is a {type(found).__name__}, which cannot be called")
    function: Callable[..., Any] = found
    return function


def _shown(factors: Mapping[str, float]) -> str:
    if len(set(factors.values())) == 1:
        return f"alpha={next(iter(factors.values())):.3g}"
    return ", ".join(f"{group}: {factor:.3g}" for group, factor in itertools.islice(factors.items(), 40))


def _factor(text: str) -> float:
    value = float(text)
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
