"""SmolLM2-135M learns to solve word problems; what it knew are its own next-token distributions.

The new task are short solutions of GSM8K (``--option problems=…/gsm8k``, a folder with train.jsonl and test.jsonl).
Kept is the agreement exp(−KL), KL in nats a token to the pretrained model, on WikiText-2 (``--option text=…/test.txt``)
and on text that the pretrained model wrote itself from its begin token; with ``--option skills=grammar`` also the share
of sentence pairs of which the grammatical one is likelier. Perplexity of WikiText is no measure here: it falls with
every method, since the chat model loses its chat habits.
"""

from __future__ import annotations

import os
from pathlib import Path

import lightning.pytorch as pl
import torch

from benchmarks.forgetting.grammar import grammar
from kappa_lightning import AgreementProbe, Probe
from recipes.shared.smollm2 import packaged_smollm2
from recipes.word_problems import Problems, Solver, own_text, read_problems, text_windows

WINDOWS, WINDOW = 12, 64
"""Of the text that is kept."""


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
        skills: ``"grammar"`` to keep a small task as well, of two sentences to take the grammatical one.

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
        skills: str = "",
    ) -> None:
        if skills not in ("", "grammar"):
            raise ValueError(f"skills={skills!r} is unknown: use 'grammar', or leave it out")
        self.skills = skills
        self.problems = given_path(problems, "problems", "GSM8K")
        self.text = given_path(text, "text", "WIKITEXT")
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
            read_problems(self.problems / name, tokenizer, self.max_tokens, count)
            for name, count in zip(("train.jsonl", "test.jsonl"), self.counts, strict=True)
        )
        return Problems(learned, held_out, self.batch_size)

    def probes(self, model: pl.LightningModule, seed: int) -> dict[str, Probe]:
        """The agreement on WikiText and on the model's own text, and the skills asked for, the same for all seeds."""
        from transformers import AutoTokenizer

        assert isinstance(model, Solver)
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        windows = text_windows(self.text, tokenizer, WINDOWS, WINDOW)
        own = own_text(model, tokenizer.bos_token_id, self.folder.parent / "smollm2-own-text.pt")
        probes: dict[str, Probe] = {
            "wikitext": AgreementProbe([{"input_ids": part} for part in torch.split(windows, 4)]),
            "own": AgreementProbe([{"input_ids": part} for part in torch.split(own, 4)]),
        }
        return {**probes, "grammar": grammar(tokenizer)} if self.skills else probes


def given_path(given: str, option: str, variable: str) -> Path:
    """The path that an option or, without it, an environment variable names.

    Raises:
        ValueError: if neither does, or there is nothing.
    """
    path = given or os.environ.get(variable, "")
    if not path:
        raise ValueError(f"the task needs --option {option}=PATH, or the environment variable {variable}")
    if not Path(path).exists():
        raise ValueError(f"{option}={path!r}: there is no such file or folder")
    return Path(path)
