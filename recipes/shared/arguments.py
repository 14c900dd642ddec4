"""The command-line options that the recipes for generative models share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from recipes.shared.comparison import FOR_ALL, FOR_EXPERTS, METHODS, Settings, towers_choices
from recipes.shared.small_models import SMALL_MOE, is_small


class DefaultsHelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one value for all models."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def add_arguments(parser: argparse.ArgumentParser, log_dir: Path, towers: bool = True) -> None:
    """Methods, budget, learning rates, length and place of the runs."""
    add = parser.add_argument
    add(
        "--method",
        nargs="+",
        choices=METHODS,
        default=None,
        help=f"what to run, in order (default: {' '.join(FOR_ALL)}; of small-moe {' '.join(FOR_EXPERTS)})",
    )
    if towers:
        add("--towers", choices=towers_choices(), default="language", help="what may train; a projector always does")
    else:
        parser.set_defaults(towers="language")
    add("--max-params", type=float, default=0.25, help="kappa and kappa-lora: share of the matrices, lowest κ first")
    add(
        "--anchor",
        type=float,
        default=None,
        metavar="STRENGTH",
        help="hold the outputs where they were, with every method (PretrainedAnchor; 1 is a beginning)",
    )
    add(
        "--walk-back",
        type=float,
        default=None,
        metavar="RETENTION",
        help="go back from the trained weights until every probe keeps this, with every method (WalkBack)",
    )
    add("--text", default=None, help="text whose perplexity is kept, in WikiText's format (default: own sentences)")
    add(
        "--lr",
        type=float,
        default=None,
        help="peak learning rate of weights (default: 2e-3 for small models, else 2e-5)",
    )
    add("--lora-lr", type=float, default=None, help="the same of adapters (default: 5e-3 for small models, else 2e-4)")
    add("--lora-rank", type=int, default=8, help="rank of the adapters")
    add("--epochs", type=int, default=4, help="evaluations come after each")
    add("--steps-per-epoch", type=int, default=None, help="0 for all data (default: 40 for small models, else 0)")
    add("--batch-size", type=int, default=None, help="samples in a batch (default: 32 for small models, else 4)")
    add(
        "--accumulate",
        type=int,
        default=None,
        help="batches whose gradients make one step (default: 1 for small models, else 4)",
    )
    add(
        "--clip",
        type=float,
        default=None,
        help="norm that gradients are clipped to, 0 for none (default: 0 for small models, else 1)",
    )
    add(
        "--max-new-tokens",
        type=int,
        default=None,
        help="length of a generated answer (default: 16 for small models, else 64)",
    )
    add("--seed", type=int, default=0, help="of adapters, data and order")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the weights; bfloat16 rounds small updates away, so it takes a --lr of about 1e-4",
    )
    add("--gradient-checkpointing", action="store_true", help="recompute activations instead of keeping them")
    add("--accelerator", default="auto", help="as Trainer takes it")
    add("--precision", default=None, help="as Trainer takes it (default: that of the weights)")
    add("--log-dir", type=Path, default=log_dir, help="of TensorBoard, for all runs")


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is loaded, and fill in which methods are compared."""
    if args.method is None:
        args.method = list(FOR_EXPERTS if args.model == SMALL_MOE else FOR_ALL)
    if args.text is not None and not Path(args.text).is_file():
        parser.error(f"--text: there is no file {args.text}")
    if args.text is not None and is_small(args.model):
        parser.error(f"--text: {args.model} knows no words but those of its own world; name another --model")
    if not 0 < args.max_params <= 1:
        parser.error(f"--max-params: {args.max_params} is not a share in (0, 1]")
    if args.anchor is not None and not 0 <= args.anchor < float("inf"):
        parser.error(f"--anchor: {args.anchor} must be a number of at least 0")
    if args.walk_back is not None and not 0 < args.walk_back <= 1:
        parser.error(f"--walk-back: {args.walk_back} is not a retention in (0, 1]")
    for name in ("epochs", "batch_size", "accumulate", "lora_rank", "max_new_tokens", "test_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: {getattr(args, name)} must be at least 1")
    if args.steps_per_epoch is not None and args.steps_per_epoch < 0:
        parser.error(f"--steps-per-epoch: {args.steps_per_epoch} is negative")


def settings_from(args: argparse.Namespace, *, images: bool) -> Settings:
    """The settings that the options stand for."""
    small = is_small(args.model)

    def choose(given: Any, for_small: Any, for_others: Any) -> Any:
        if given is not None:
            return given
        return for_small if small else for_others

    return Settings(
        model=args.model,
        images=images,
        towers=args.towers,
        max_params=args.max_params,
        lr=choose(args.lr, 2e-3, 2e-5),
        lora_lr=choose(args.lora_lr, 5e-3, 2e-4),
        lora_rank=args.lora_rank,
        epochs=args.epochs,
        batch_size=choose(args.batch_size, 32, 4),
        accumulate=choose(args.accumulate, 1, 4),
        clip=choose(args.clip, 0, 1.0) or None,
        steps_per_epoch=choose(args.steps_per_epoch, 40, 0) or None,
        max_new_tokens=choose(args.max_new_tokens, 16, 64),
        seed=args.seed,
        dtype=args.dtype,
        gradient_checkpointing=args.gradient_checkpointing,
        accelerator=args.accelerator,
        precision=args.precision or {"float32": "32-true", "bfloat16": "bf16-true"}[args.dtype],
        log_dir=args.log_dir,
        anchor=args.anchor,
        walk_back=args.walk_back,
    )
