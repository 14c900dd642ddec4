"""``kappa-lightning sensitivity``: what each tensor of a model would learn and change, and what would train."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from argparse import ArgumentError, ArgumentParser, Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import shtab
from rich import box
from rich.table import Table

from kappa_lightning.cli.arguments import (
    add_device,
    add_output,
    device_of,
    format_of,
    int_or_share,
    require_drawable,
    require_writable,
)
from kappa_lightning.cli.command import Command
from kappa_lightning.cli.terminal import print_table, printable, say
from kappa_lightning.files import replacing
from kappa_lightning.selection import Budget
from kappa_lightning.text import counted

if TYPE_CHECKING:
    from kappa_lightning.sensitivity import SensitivityProfile

_LEAST_WIDTH = 80
_CONFIGS = (".yaml", ".yml", ".json")


def _add_arguments(parser: ArgumentParser) -> None:
    action = parser.add_argument(
        "model", metavar="CONFIG|MODEL",
        help="configuration of a LightningCLI (.yaml), or a causal language model: folder or hub id",
    )  # fmt: skip
    action.complete = shtab.FILE  # type: ignore[attr-defined]
    text = parser.add_argument("--text", type=Path, metavar="FILE", help="of a MODEL: the new task, as plain text")
    text.complete = shtab.FILE  # type: ignore[attr-defined]
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="of a MODEL: length of an example")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="of a MODEL: examples in a batch")
    parser.add_argument("--batches", type=int, default=16, metavar="N", help="how many batches of the task are used")
    parser.add_argument(
        "--reference", default="auto", choices=["auto", "generated", "synthesized", "inputs"],
        help="what the model is asked about: text of its own, inputs that it synthesizes, or the task's inputs",
    )  # fmt: skip
    parser.add_argument("--sequences", type=int, default=64, metavar="N", help="how many sequences it generates")
    parser.add_argument("--include", nargs="+", default=["*"], metavar="GLOB", help="only tensors with these names")
    exclude = ["@embeddings"]
    parser.add_argument("--exclude", nargs="+", default=exclude, metavar="GLOB", help="but not with these")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--top-p", type=float, metavar="P", help="share of the tensors that trains")
    budget.add_argument("--num-tensors", type=int, metavar="N", help="number of tensors that train")
    budget.add_argument(
        "--max-params", type=int_or_share, metavar="N", help="number of parameters that train, or a share such as 0.25"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn")
    add_device(parser)
    add_output(parser, "--out", "save the profile")
    add_output(parser, "--figure", "draw b²/(c·n) by layer and role (.png, .pdf, .svg)")
    add_output(parser, "--scatter", "draw signal against sensitivity, a point a tensor")
    parser.add_argument("--names", action="store_true", help="print only the names of what trains, one a line")


def _run(args: Namespace) -> int:
    limits = {name: getattr(args, name) for name in ("top_p", "num_tensors", "max_params")}
    budget = Budget(**limits) if any(limit is not None for limit in limits.values()) else None
    require_writable(args.out, args.figure, args.scatter)
    require_drawable("--figure", args.figure)
    require_drawable("--scatter", args.scatter)
    for argument, value in (("--batches", args.batches), ("--sequences", args.sequences)):
        if value < 1:
            raise ValueError(f"{argument} {value} is too small: give at least 1")
    is_config = Path(args.model).suffix in _CONFIGS
    if not is_config and args.text is None:
        raise ValueError(f"{args.model} is no configuration (.yaml), so the new task is needed: give --text FILE")
    if not is_config and args.reference == "synthesized":
        raise ValueError(
            f"--reference synthesized is for classifiers, whose inputs a gradient can change, and {args.model} reads "
            "tokens: use --reference generated or inputs"
        )
    profile = _of_config(args) if is_config else _of_model(args)
    if args.out is not None:
        profile.save(args.out)
    names = profile.select_within(budget)
    title = f"{'/'.join(Path(args.model).parts[-2:])}, {budget or 'least predicted forgetting'}"
    _draw(profile, names, title, args)
    if args.names:
        for name in names:
            say(printable(name))
        return 0
    print_table(_table(profile, names), least_width=_LEAST_WIDTH)
    chosen = sum(profile[name].num_parameters for name in names)
    total = sum(row.num_parameters for row in profile)
    verb = "trains" if len(names) == 1 else "train"
    every = profile.forgetting([row.name for row in profile if row.signal > 0 and row.sensitivity > 0])
    say(
        f"{len(names)} of {counted(len(profile), 'tensor')} {verb} under {budget or 'the least predicted forgetting'}: "
        f"{chosen:,} of {counted(total, 'parameter')} ({chosen / total:.1%}). Predicted forgetting at equal "
        f"adaptation: {profile.forgetting(names) / every:.3g} of that of training all"
    )
    return 0


def _of_model(args: Namespace) -> SensitivityProfile:
    """Of a causal language model and a text."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError("a language model needs transformers: pip install transformers") from error

    from kappa_lightning.sensitivity import SensitivityProfile

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    batches = text_batches(tokenizer, args.text, args.tokens, args.batch_size, args.batches)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    model.to(device_of(args))
    return SensitivityProfile.from_model(
        model,
        batches,
        lambda model, batch: model(**batch).loss,
        reference=_reference(args),
        include=args.include,
        exclude=args.exclude,
        seed=args.seed,
    )


def _reference(args: Namespace) -> Any:
    from kappa_lightning.probes.inputs import GeneratedText

    return (
        args.reference if args.reference in ("synthesized", "inputs") else GeneratedText(args.sequences, seed=args.seed)
    )


def text_batches(tokenizer: Any, file: Path, tokens: int, batch_size: int, count: int) -> list[dict[str, Any]]:
    """The first pieces of a text of equal length, in batches with labels.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is too short for one batch, or a number is out of range.
    """
    import torch

    for argument, value in (("--tokens", tokens), ("--batch-size", batch_size), ("--batches", count)):
        if value < 1 + (argument == "--tokens"):
            raise ValueError(f"{argument} {value} is too small")
    if not file.is_file():
        raise FileNotFoundError(f"--text {file}: there is no such file")
    # No more than is needed is read; no token has more than some dozen characters on average.
    try:
        with file.open(encoding="utf-8") as opened:
            text = opened.read(tokens * batch_size * count * 16)
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {file} is no text in UTF-8 ({error}): give plain text") from error
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    pieces = torch.tensor(ids[: len(ids) // tokens * tokens]).view(-1, tokens)[: batch_size * count]
    if len(pieces) < batch_size:
        raise ValueError(f"{file} has {len(ids):,} tokens, fewer than one batch of {batch_size} × {tokens}")
    return [{"input_ids": part, "labels": part} for part in torch.split(pieces, batch_size) if len(part) == batch_size]


def _of_config(args: Namespace) -> SensitivityProfile:
    """Of the module and the data of a LightningCLI configuration.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no configuration of a model and data.
    """
    from lightning.pytorch.cli import LightningCLI

    from kappa_lightning.callbacks import SensitivityFreezeCallback
    from kappa_lightning.pilot.trial import quiet

    if not Path(args.model).is_file():
        raise FileNotFoundError(f"{args.model}: there is no such configuration")

    callback = SensitivityFreezeCallback(
        top_p=1.0,
        reference=args.reference,
        batches=args.batches,
        include=args.include,
        exclude=args.exclude,
        seed=args.seed,
    )
    # As a script of the user's own would find its modules.
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        with quiet():
            cli = LightningCLI(
                run=False,
                save_config_callback=None,
                subclass_mode_model=True,
                subclass_mode_data=True,
                parser_kwargs={"exit_on_error": False},
                args=["--config", args.model],
            )
    except ArgumentError as error:
        raise ValueError(f"{args.model} is no configuration of a model and data for LightningCLI: {error}") from error
    trainer: Any = cli.trainer
    # Only what measures and what shows its progress; nothing is trained, saved or logged.
    trainer.callbacks = [callback, *_progress(trainer.callbacks)]
    trainer.loggers = []
    trainer.fit_loop.max_epochs = 0
    with _without_remarks():
        trainer.fit(cli.model, datamodule=cli.datamodule)
    assert callback.profile is not None
    return callback.profile


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Without what Lightning says of a fit, of which this is none; warnings are shown."""
    from lightning_utilities.core import rank_zero

    # Where pytorch_lightning was imported as well, Lightning speaks through a logger of that name.
    loggers = (logging.getLogger("lightning.pytorch"), rank_zero.log)
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning):
                warnings.filterwarnings("ignore", category=category, module=r"lightning\.")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _progress(callbacks: Iterable[Any]) -> list[Any]:
    from lightning.pytorch.callbacks import ProgressBar

    return [callback for callback in callbacks if isinstance(callback, ProgressBar)]


def _draw(profile: SensitivityProfile, names: list[str], title: str, args: Namespace) -> None:
    if args.figure is None and args.scatter is None:
        return
    from kappa_lightning.figures import sensitivity_figure, signal_figure

    for file, draw in ((args.figure, sensitivity_figure), (args.scatter, signal_figure)):
        if file is not None:
            with replacing(file) as temporary:
                draw(profile, names, title=title).savefig(temporary, format=format_of(file))


def _table(profile: SensitivityProfile, selected: Iterable[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("tensor", overflow="fold")
    for header in ("shape", "signal b", "sensitivity c", "b²/(c·n)"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("trains", no_wrap=True)
    chosen = set(selected)
    for position, row in enumerate(profile.rank(), start=1):
        mark = "yes" if row.name in chosen else ""
        shape = "×".join(map(str, row.shape))
        figures = [f"{value:.3g}" for value in (row.signal, row.sensitivity, profile.value(row.name))]
        table.add_row(str(position), printable(row.name), shape, *figures, mark, style="bold" if mark else "")
    return table


COMMAND = Command(
    summary="measure what each tensor would learn and change, and show what would train",
    description="Measure signal and sensitivity of each tensor by gradients: of the module and the data of a\n"
    "LightningCLI configuration, or of a causal language model and a text. No pretraining data is needed. Without a\n"
    "budget, the set of tensors of least predicted forgetting.",
    example="kappa-lightning sensitivity HuggingFaceTB/SmolLM2-135M --text task.txt --max-params 0.25",
    add_arguments=_add_arguments,
    run=_run,
)
