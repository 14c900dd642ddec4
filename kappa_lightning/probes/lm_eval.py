"""Tasks of the Language Model Evaluation Harness as a probe, on the live model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kappa_lightning.arguments import as_count
from kappa_lightning.probes.generated import language_model
from kappa_lightning.probes.metrics import MeanCorrect
from kappa_lightning.probes.probe import Probe


class LMEvalProbe(Probe):
    """The mean score of tasks of EleutherAI's lm-evaluation-harness, on the module's own transformers model.

    Needs ``pip install kappa-lightning[lm-eval]``. The model is the one that trains, without a copy, under the
    Trainer's precision. Each task counts the same; a document's score is an item of the retention's interval. Tasks of
    multiple choice know their chance level. Several processes each run all documents.

    Args:
        tasks: names of tasks, those of ``include_path`` among them.
        tokenizer: of the model, from transformers.
        limit: how many documents of each task; all if ``None``.
        metric: the score of a document, such as ``"acc"`` or ``"exact_match"``; by default the first of each task.
        num_fewshot: how many examples stand before each document; the task's own number if ``None``.
        batch_size: how many requests run at a time.
        include_path: a folder of one's own task files (YAML).
        chance: the score of guessing; by default that of the tasks, if all are multiple choice.

    Attributes:
        results: what the harness reported last, by task: metrics and their standard errors.

    Raises:
        ImportError: if lm-eval is not installed.
        ValueError: if there is no task of a name, or a metric is not one number for each document.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        tokenizer: Any,
        limit: int | None = None,
        metric: str | None = None,
        num_fewshot: int | None = None,
        batch_size: int = 8,
        include_path: str | os.PathLike[str] | None = None,
        chance: float | None = None,
    ) -> None:
        if isinstance(tasks, str) or not tasks:
            raise ValueError(f"tasks={tasks!r} must be a list of names of tasks")
        limit = None if limit is None else as_count(limit, "limit")
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ImportError("LMEvalProbe needs lm-eval: pip install kappa-lightning[lm-eval]") from error
        self.tasks = list(tasks)
        self.manager = TaskManager(include_path=None if include_path is None else str(include_path))
        unknown = [task for task in self.tasks if task not in self.manager.all_tasks]
        if unknown:
            raise ValueError(
                f"lm-eval knows no task {unknown[0]!r}: `lm-eval ls tasks` lists them; give the folder of your own as "
                "include_path"
            )
        self.tokenizer, self.limit, self.scored_by = tokenizer, limit, metric
        self.num_fewshot, self.batch_size = num_fewshot, batch_size
        self.results: dict[str, Any] = {}
        self._chances: list[float | None] = []
        # One batch of all tasks, so that processes that share a model run them together.
        super().__init__([self.tasks], MeanCorrect(), self._scores, name=metric or "score", chance=chance)

    @property
    def chance(self) -> float | None:
        """The mean chance level of the tasks; known once they have been measured."""
        given = super().chance
        known = [chance for chance in self._chances if chance is not None]
        if given is not None or not known or len(known) < len(self._chances):
            return given
        return sum(known) / len(known)

    def _scores(self, module: nn.Module, batch: Sequence[str]) -> tuple[Tensor, Tensor]:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        model = language_model(module)
        if model is None:
            raise TypeError(f"{type(module).__name__} holds no model of transformers that generates text")
        device = next(model.parameters()).device
        # The harness wraps each forward in an autocast of its own, which would turn that of the Trainer off.
        precision = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        found = simple_evaluate(
            model=HFLM(
                pretrained=model,
                tokenizer=self.tokenizer,
                batch_size=self.batch_size,
                device=str(device),
                mixed_precision_dtype=precision,
            ),
            tasks=list(batch),
            limit=self.limit,
            num_fewshot=self.num_fewshot,
            task_manager=self.manager,
            bootstrap_iters=100,
        )
        self.results = {task: dict(values) for task, values in found["results"].items()}
        scores, weights, self._chances = [], [], []
        for task, samples in found["samples"].items():
            values = torch.tensor([self._score(task, sample) for sample in samples], dtype=torch.float32)
            choices = found["configs"][task].get("output_type") == "multiple_choice"
            rates = [1 / len(sample["resps"]) for sample in samples]
            self._chances.append(sum(rates) / len(rates) if choices else None)
            scores.append(values)
            weights.append(torch.full_like(values, 1 / len(values)))
        return torch.cat(scores).to(device), torch.cat(weights).to(device)

    def _score(self, task: str, sample: dict[str, Any]) -> float:
        name = self.scored_by or next(iter(sample.get("metrics", ())), None)
        value = sample.get(name) if name is not None else None
        if isinstance(value, bool | int | float):
            return float(value)
        raise ValueError(
            f"the task {task!r} has no number {name!r} for each document, only {sorted(sample.get('metrics', ()))}: "
            "choose another metric=…, such as acc or exact_match"
        )

    def split(self, result: Any, batch: Any) -> list[Any] | None:
        """A document is an item."""
        values, weights = result
        return [[values[place : place + 1], weights[place : place + 1]] for place in range(len(values))]
