"""A causal language model learns a new text task, and keeps what it knew.

The offline default needs no download: a small Llama that knows the facts of a text world learns to sort numbers, and
is tested on numbers that it never sorted. Any causal model of the hub learns from a file of prompts and answers.

    python -m recipes.new_task
    python -m recipes.new_task --model HuggingFaceTB/SmolLM2-135M-Instruct --data answers.jsonl --text wikitext.txt
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from torch.utils.data import DataLoader

from kappa_lightning import Probe
from recipes.shared.arguments import DefaultsHelpFormatter, add_arguments, check, settings_from
from recipes.shared.comparison import Result, run, show
from recipes.shared.encoding import Sample
from recipes.shared.epochs import keep_bars_out_of_logs, save_picture
from recipes.shared.module import load_encoder
from recipes.shared.probes import TextAgreement, TextPerplexity, WorldAccuracy, WorldAgreement
from recipes.shared.small_models import SMALL_LLAMA, SMALL_MOE
from recipes.shared.sorting import SORTING, sorting_samples
from recipes.shared.tensorboard import tensorboard


def read_answers(file: Path) -> list[Sample]:
    """The prompts and answers of a file in which every line is an object with ``prompt`` and ``answer``.

    Raises:
        ValueError: if a line has another form (the message names it), or there is none.
    """
    samples = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, answer = row["prompt"], row["answer"].strip()
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}, line {number}: not an object with prompt and answer") from error
        if not isinstance(prompt, str) or not answer:
            raise ValueError(f"{file}, line {number}: the prompt is no text, or the answer is empty")
        samples.append(Sample(prompt, answer))
    if not samples:
        raise ValueError(f"{file} has no prompts")
    return samples


class AnswerData(pl.LightningDataModule):
    """Prompts and answers, some to learn from and some to be tested on.

    Args:
        model: the hub id or folder whose tokenizer encodes them.
        data: ``sorting``, or a file for :func:`read_answers`.
        batch_size: samples in a batch.
        test_size: samples of a file that are held out, its last; of ``sorting``, how many are tested at most.
    """

    def __init__(self, model: str, data: str = SORTING, batch_size: int = 32, test_size: int = 200) -> None:
        super().__init__()
        self.model = model
        self.data = data
        self.batch_size = batch_size
        self.test_size = test_size

    def setup(self, stage: str) -> None:
        """Read the samples and split them."""
        self.encoder = load_encoder(self.model, images=False)
        if self.data == SORTING:
            self.learned, tested = sorting_samples()
            self.tested = random.Random(0).sample(tested, min(len(tested), self.test_size))
            return
        samples = read_answers(Path(self.data))
        if len(samples) <= self.test_size:
            raise ValueError(f"{self.data} has {len(samples)} prompts, and test_size={self.test_size} leaves none")
        self.learned, self.tested = samples[: -self.test_size], samples[-self.test_size :]

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches."""
        return self._loader(self.learned, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches of what is held out."""
        return self._loader(self.tested, shuffle=False)

    def _loader(self, samples: Any, *, shuffle: bool) -> DataLoader[Any]:
        return DataLoader(samples, self.batch_size, shuffle=shuffle, collate_fn=self.encoder, num_workers=0)


def probes_of(model: str, text: str | None) -> tuple[Callable[[], Mapping[str, Probe]], dict[str, str]]:
    """What the model knew: facts of the small world or text, and its own distributions; and the columns' names."""
    if model in (SMALL_LLAMA, SMALL_MOE):
        return (
            lambda: {"world": WorldAccuracy(model, images=False), "agreement": WorldAgreement(model, images=False)},
            {"world": "facts", "agreement": "agreement"},
        )
    return (
        lambda: {"text": TextPerplexity(model, text, images=False), "agreement": TextAgreement(model, text, False)},
        {"text": "text", "agreement": "agreement"},
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.new_task",
        description="Teach a causal language model a new text task, with full fine-tuning, KappaTune, LoRA, and LoRA "
        "on the low-κ matrices only, and compare what each forgets. Without options it needs no download: a small "
        "Llama is pretrained first and kept on disk.",
        formatter_class=DefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model", default=SMALL_LLAMA, help="hub id or folder; small-llama and small-moe need no download"
    )
    parser.add_argument("--data", default=SORTING, help='sorting, or a file with lines {"prompt": …, "answer": …}')
    parser.add_argument("--test-size", type=int, default=200, help="prompts that are held out")
    add_arguments(parser, log_dir=Path("runs/new_task"), towers=False)
    parser.set_defaults(epochs=8)
    args = parser.parse_args(argv)
    check(parser, args)
    if args.data != SORTING and not Path(args.data).is_file():
        parser.error(f"--data: there is no file {args.data}")
    return args


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Run every method, print the table and how to look at the runs."""
    args = parse(sys.argv[1:] if argv is None else argv)
    keep_bars_out_of_logs()
    console = Console()
    probes, notes = probes_of(args.model, args.text)
    settings = settings_from(args, images=False)
    results = []
    for method in args.method:
        console.rule(method)
        data = AnswerData(args.model, args.data, settings.batch_size, args.test_size)
        results.append(run(method, settings, data, probes))
    show(results, notes, "A new text task, and what is left of what the model knew", console)
    picture = args.log_dir / "learned-and-kept.png"
    save_picture(
        {r.method: r.points for r in results}, "A new text task", "held-out answers right to the letter", picture
    )
    console.print(f"What was learned and kept:   {picture}", highlight=False)
    console.print(f"Answers, curves, rankings:  {tensorboard()} --logdir {args.log_dir}", highlight=False)
    return results


if __name__ == "__main__":
    main()
