"""What a language model writes after a prompt, compared with what it should write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from kappa_lightning.arguments import as_count
from kappa_lightning.probes.generated import begin_token_of, end_tokens_of, language_model
from kappa_lightning.probes.metrics import RougeL, TextExactMatch
from kappa_lightning.probes.probe import Probe


class GenerationProbe(Probe):
    """A text metric of what a language model writes after each prompt, token by token, greedily unless told otherwise.

    A batch is a mapping with ``input_ids`` and ``attention_mask`` of shape (batch, tokens), padded on the left, the
    entry ``references``, a list of batch texts, and whatever else the model's ``generate`` takes, such as images.
    The module's own generation settings have no say and stay as they are.

    In TensorBoard the first samples stand under ``forgetting/<probe>/samples``: what was written before the first step
    beside what is written now.

    Args:
        dataloader: the batches.
        metric: ``"exact_match"`` (spaces at the ends don't count), ``"rouge"`` (ROUGE-L's F), or a torchmetrics metric
            whose ``update`` takes two lists of texts, written and wanted.
        tokenizer: decodes, with ``batch_decode``; of transformers.
        max_new_tokens: how many tokens are written at most.
        key: which entry counts of a metric that returns several, such as ``"rouge1_fmeasure"``.
        samples: how many samples are shown.
        chance: the metric of a model that guesses.
        generation: further settings of ``transformers.GenerationConfig``, such as ``{"num_beams": 4}``.

    Raises:
        TypeError: if a batch has no references, or the module holds no transformers model that generates.
        ValueError: if an argument is out of range, or ``key`` is no entry of the metric's result.
    """

    def __init__(
        self,
        dataloader: Iterable[Mapping[str, Any]],
        metric: Literal["exact_match", "rouge"] | Metric = "exact_match",
        *,
        tokenizer: Any,
        max_new_tokens: int = 64,
        key: str | None = None,
        samples: int = 4,
        chance: float | None = None,
        generation: Mapping[str, Any] | None = None,
    ) -> None:
        max_new_tokens = as_count(max_new_tokens, "max_new_tokens")
        made: Any = metric
        if isinstance(metric, str):
            if metric not in ("exact_match", "rouge"):
                raise ValueError(f'metric={metric!r} is unknown: use "exact_match", "rouge" or a torchmetrics metric')
            made = TextExactMatch() if metric == "exact_match" else RougeL()
        self.tokenizer, self.key, self.count = tokenizer, key, samples
        self.generation = {"do_sample": False, "num_beams": 1, **(generation or {}), "max_new_tokens": max_new_tokens}
        self._before: list[list[str]] = []
        self._now: list[list[str]] = []
        self._recording = False
        name = metric if isinstance(metric, str) else key
        super().__init__(dataloader, made, self._texts, name=name, chance=chance)

    def begin_baseline(self) -> None:
        """Keep the samples of the next pass as those of before."""
        self._before, self._now, self._recording = [], [], True

    def compute(self) -> float:
        """The metric over all batches so far."""
        if self._recording:
            self._before, self._recording = self._now, False
        self._shown, self._now = self._now, []
        if self.key is None:
            return super().compute()
        values = self.metric.compute()
        if not isinstance(values, Mapping) or self.key not in values:
            found = sorted(values) if isinstance(values, Mapping) else type(values).__name__
            raise ValueError(f"key={self.key!r} is no entry of what {type(self.metric).__name__} returned: {found}")
        return float(values[self.key])

    def report(self) -> str | None:
        """A table in Markdown: prompt, wanted, written before, written now."""
        if not self._before:
            return None
        before = {prompt: text for prompt, _, text in self._before}
        lines = ["| prompt | wanted | before | now |", "|---|---|---|---|"]
        for prompt, wanted, text in self._shown:
            lines.append("| " + " | ".join(map(_cell, (prompt, wanted, before.get(prompt, ""), text))) + " |")
        return "\n".join(lines)

    def state_dict(self) -> dict[str, Any]:
        """The samples of before."""
        return {"before": [list(sample) for sample in self._before]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the samples of before."""
        self._before, self._now, self._recording = [list(sample) for sample in state.get("before", [])], [], False

    def _texts(self, module: nn.Module, batch: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        if not isinstance(batch, Mapping) or not isinstance(batch.get("references"), list | tuple):
            raise TypeError("GenerationProbe needs batches that are mappings with input_ids and a list of references")
        model = language_model(module)
        if model is None:
            raise TypeError(f"{type(module).__name__} holds no model of transformers that generates text")
        written = self._generate(model, {k: v for k, v in batch.items() if k not in ("references", "labels")})
        wanted = list(batch["references"])
        if len(self._now) < self.count:
            prompts = self.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
            found = [list(sample) for sample in zip(prompts, wanted, written, strict=True)]
            self._now += found[: self.count - len(self._now)]
        return written, wanted

    def _generate(self, model: Any, inputs: Mapping[str, Any]) -> list[str]:
        from transformers import GenerationConfig

        ends = end_tokens_of(model)
        pad = getattr(self.tokenizer, "pad_token_id", None)
        settings = {"bos_token_id": begin_token_of(model), "eos_token_id": ends or None}
        settings["pad_token_id"] = pad if pad is not None else (ends[0] if ends else 0)
        # A shard needs all processes in every forward pass, though one of them may have nothing more to write.
        sharded = any(hasattr(parameter, "placements") for parameter in model.parameters())
        config: Any = GenerationConfig(**settings, **self.generation)  # type: ignore[no-untyped-call]
        ids: Tensor = model.generate(**inputs, generation_config=config, synced_gpus=sharded)
        new = ids if model.config.is_encoder_decoder else ids[:, inputs["input_ids"].shape[1] :]
        texts: list[str] = self.tokenizer.batch_decode(torch.as_tensor(new), skip_special_tokens=True)
        return texts


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
