"""SmolLM2-135M learns to solve word problems; what it knew are its own next-token distributions.

The new task are short solutions of GSM8K (``--option problems=…/gsm8k``, a folder with train.jsonl and test.jsonl);
kept is the
agreement exp(−KL), KL in nats a token to the pretrained model, on WikiText-2 (``--option text=…/test.txt``) and on
text that the
pretrained model wrote itself from its begin token. Perplexity of WikiText is no measure here: it falls with every
method, since the chat model loses its chat habits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from benchmarks.forgetting.smollm2 import packaged_smollm2
from benchmarks.forgetting.state import save_state
from benchmarks.forgetting.task import LOSS
from kappa_lightning import AgreementProbe, Probe
from kappa_lightning.probes.metrics import IGNORED

SEQUENCES, SEQUENCE_TOKENS = 16, 48
"""Of the model's own text that is kept."""

WINDOWS, WINDOW = 12, 64
"""Of the text that is kept."""

Encoded = tuple[list[int], list[int]]
"""The tokens of a prompt and of its answer."""


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
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
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


class WordProblems:
    """The task.

    Args:
        problems: a folder with ``train.jsonl`` and ``test.jsonl``, each line an object with ``question`` and
            ``answer``; by default the environment variable ``GSM8K``.
        text: a file in WikiText's format; by default the environment variable ``WIKITEXT``.
        max_tokens: of a problem with its solution, so that a batch is short.
        learned: problems to learn from.
        held_out: problems to validate on.
        batch_size: of training.

    Raises:
        ValueError: if a path is not given, or there are too few problems.
    """

    pretrained = ("*",)
    new = ()

    def __init__(
        self,
        problems: str = "",
        text: str = "",
        max_tokens: str = "110",
        learned: str = "400",
        held_out: str = "16",
        batch_size: str = "4",
    ) -> None:
        self.problems = _path(problems, "problems", "GSM8K")
        self.text = _path(text, "text", "WIKITEXT")
        self.max_tokens = int(max_tokens)
        self.counts = int(learned), int(held_out)
        self.batch_size = int(batch_size)

    def model(self, seed: int, lr: float, folder: Path) -> Solver:
        """SmolLM2; seeds do not change it."""
        self.folder = packaged_smollm2(folder)
        return Solver(self.folder, lr)

    def data(self, model: pl.LightningModule, seed: int) -> Problems:
        """The first short problems of each file; the seed decides their order alone."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        learned, held_out = (
            short_problems(self.problems / name, tokenizer, self.max_tokens, count)
            for name, count in zip(("train.jsonl", "test.jsonl"), self.counts, strict=True)
        )
        return Problems(learned, held_out, self.batch_size)

    def probes(self, model: pl.LightningModule, seed: int) -> dict[str, Probe]:
        """The agreement on WikiText and on the model's own text, both the same for all seeds."""
        from transformers import AutoTokenizer

        assert isinstance(model, Solver)
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        windows = text_windows(self.text, tokenizer, WINDOWS, WINDOW)
        own = own_text(model, tokenizer.bos_token_id, self.folder.parent / "smollm2-own-text.pt")
        return {
            "wikitext": AgreementProbe([{"input_ids": part} for part in torch.split(windows, 4)]),
            "own": AgreementProbe([{"input_ids": part} for part in torch.split(own, 4)]),
        }


def short_problems(file: Path, tokenizer: Any, max_tokens: int, count: int) -> list[Encoded]:
    """The first problems of a file that are short enough, as the chat model is asked, with its end token behind.

    Raises:
        ValueError: if there are fewer.
    """
    found: list[Encoded] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        asked = [{"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        # The template's default system prompt says the same for every problem.
        prompt = "<|im_start|>user\n" + prompt.split("<|im_start|>user\n", 1)[1]
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if len(ids) + len(answer) <= max_tokens:
            found.append((ids, answer))
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
        save_state({"sequences": written}, file)
    sequences: Tensor = torch.load(file, weights_only=True)["sequences"]
    return sequences


def _path(given: str, option: str, variable: str) -> Path:
    path = given or os.environ.get(variable, "")
    if not path:
        raise ValueError(f"the task needs --option {option}=PATH, or the environment variable {variable}")
    if not Path(path).exists():
        raise ValueError(f"{option}={path!r}: there is no such file or folder")
    return Path(path)
