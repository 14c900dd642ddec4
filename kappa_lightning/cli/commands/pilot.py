"""``kappa-lightning pilot``: which candidate keeps most of what a configuration's model knew."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from kappa_lightning.cli.command import Command


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML of a LightningCLI run, with a ForgettingEval")
    parser.add_argument(
        "--out", type=Path, default=Path("pilot"), metavar="FOLDER", help="runs and page (default: pilot)"
    )
    parser.add_argument(
        "--candidates", nargs="+", metavar="NAME", help='such as full "kappa 0.25" @gate_up "lora r16 + anchor"'
    )
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps of a run (default: 300)")
    parser.add_argument("--hours", type=float, metavar="H", help="what all runs together may take")
    parser.add_argument("--monitor", metavar="KEY", help="the held-out loss of the new task (default: val/loss)")
    parser.add_argument(
        "--target", type=float, metavar="P", help="share of full fine-tuning's adaptation (default: 0.8)"
    )
    parser.add_argument("--min-retention", type=float, metavar="R", help="what is to be kept (default: 0.95)")
    parser.add_argument(
        "--margin", type=float, metavar="D", help="a difference in retention that does not count (default: 0.01)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="the first of the seeds (default: 0)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that make runs at a time (default: 1)")


_OPTIONS = ("candidates", "steps", "hours", "monitor", "target", "min_retention", "margin", "seed", "workers")


def _run(args: Namespace) -> int:
    from kappa_lightning.pilot import OutOfTimeError, pilot
    from kappa_lightning.pilot.configured import Configured
    from kappa_lightning.pilot.journal import Journal

    configured = Configured(args.config)
    # Which refuses to go on with runs of another configuration.
    Journal(args.out / "runs" / "configuration", configured.settings())
    options = {**configured.options}
    options |= {name: value for name in _OPTIONS if (value := getattr(args, name)) is not None}
    try:
        result = pilot(
            configured.make_module,
            configured.make_data,
            configured.probes,
            trainer=configured.trainer(),
            folder=args.out / "runs",
            **options,
        )
    except (OutOfTimeError, BrokenProcessPool) as error:
        raise ValueError(str(error)) from error
    except TypeError as error:
        if not any(words in str(error) for words in ("unexpected keyword argument", "multiple values for")):
            raise
        raise ValueError(f"{args.config}: the section pilot: {error}") from error
    page = result.report(args.out)
    result.save(args.out / "pilot.toml")
    # The table has been shown on the way.
    print(result.answer)
    print(f"Page: {page}")
    return 0


COMMAND = Command(
    summary="try candidates on your own model and say which keeps most of what it knew",
    description="Train the model of a LightningCLI configuration with several candidates (all weights, the lowest κ, "
    "groups of tensors, LoRA, …), compare them where the held-out loss has come down to the same level, and say which "
    "cannot be told from the best. The probes are those of the ForgettingEval in the configuration; "
    "a section 'pilot' in it has further arguments. Every finished run is kept.",
    example='kappa-lightning pilot config.yaml --candidates full "kappa 0.25" @attention "lora r16" --hours 2',
    add_arguments=_add_arguments,
    run=_run,
    resumes=lambda _: True,
)
