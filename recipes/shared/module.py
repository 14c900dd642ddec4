"""A generative transformers model as a LightningModule: trained on answers, scored by what it generates."""

from __future__ import annotations

import inspect
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from kappa_lightning import KappaProfile, lora_targets
from recipes.shared.encoding import Encoder, prompt_of
from recipes.shared.pictures import answers_figure, answers_markdown
from recipes.shared.schedule import warmup_cosine
from recipes.shared.small_models import locate
from recipes.shared.towers import Towers, parts_of, trained_parts

SHOWN = 12
"""Answers that go to TensorBoard after each epoch."""


class GenerativeModule(pl.LightningModule):
    """Learns to answer prompts, with or without images.

    Args:
        model: a hub id, a folder, or one of :mod:`~recipes.shared.small_models`.
        images: whether the model sees (``AutoModelForImageTextToText``) or only reads (``AutoModelForCausalLM``).
        towers: what may train: the language tower, the vision tower or both; the projector always does.
        lr: peak learning rate of the model's own weights.
        lora_rank: the rank of LoRA adapters, which then train instead of the towers' weights; none if 0.
        lora_max_params: adapters go only on the matrices of lowest κ that make up this share of the towers' matrices;
            on every linear layer of the towers if ``None``.
        lora_lr: peak learning rate of the adapters.
        max_new_tokens: how long a generated answer may get.
        dtype: the precision of the weights: ``float32`` or ``bfloat16``. In bfloat16 an update of less than about
            1/512 of a weight is rounded away, so it takes a higher learning rate. In float16 AdamW would divide by
            zero.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.

    Raises:
        ValueError: if an argument is out of range, or the model does not continue its prompt (encoder and decoder).
    """

    def __init__(
        self,
        model: str,
        images: bool = True,
        towers: Towers = "both",
        lr: float = 1e-3,
        lora_rank: int = 0,
        lora_max_params: float | None = None,
        lora_lr: float = 5e-3,
        max_new_tokens: int = 24,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if lora_rank < 0:
            raise ValueError(f"lora_rank={lora_rank} is negative: give 0 for none")
        if lora_max_params is not None and lora_rank == 0:
            raise ValueError(f"lora_max_params={lora_max_params} needs adapters: give a lora_rank of at least 1")
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={dtype!r} cannot be trained in: use 'float32' or 'bfloat16'")
        self.save_hyperparameters()
        loader = AutoModelForImageTextToText if images else AutoModelForCausalLM
        self.model: Any = loader.from_pretrained(locate(model), dtype=getattr(torch, dtype)).train()
        if self.model.config.is_encoder_decoder:
            raise ValueError(f"model={model!r} has an encoder for its prompt: choose one that continues the prompt")
        self.encoder = load_encoder(model, images)
        forward = inspect.signature(self.model.forward).parameters
        self._takes_positions = not images and "position_ids" in forward
        if gradient_checkpointing:
            # The reentrant kind finds no gradient behind a frozen prefix.
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        parts, wanted = parts_of(self.model), trained_parts(towers)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(parts[name] in wanted)
        if lora_rank:
            add_adapters(self.model, towers, lora_rank, lora_max_params)
        self._right: list[bool] = []

    def forward(self, **inputs: Any) -> Any:
        """The model's output for what its processor makes; probes call it."""
        return self.model(**inputs)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The mean negative log-likelihood of the answers' tokens, in nats."""
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["samples"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Loss, and the share of prompts whose generated answer is the right one to the letter."""
        samples = batch["samples"]
        self.log("val/loss", self.loss(batch), batch_size=len(samples))
        answers = self.generate(batch)
        right = [answer == sample.answer.strip() for answer, sample in zip(answers, samples, strict=True)]
        self.log("val/exact_match", sum(right) / len(right), prog_bar=True, batch_size=len(samples))
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self._show(samples, answers)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """The mean negative log-likelihood of the answers' tokens of a batch, in nats."""
        inputs = batch["inputs"]
        if self._takes_positions:
            # As in generation, the first token is at 0; GPT-2 would count the padding before it.
            positions = inputs["attention_mask"].cumsum(1) - 1
            inputs = {**inputs, "position_ids": positions.clamp_min(0)}
        loss: Tensor = self.model(**inputs).loss
        return loss

    def generate(self, batch: dict[str, Any]) -> list[str]:
        """The likeliest answer, token by token, to each prompt of a batch."""
        tokens = self.model.generate(
            **prompt_of(batch),
            max_new_tokens=self.hparams["max_new_tokens"],
            do_sample=False,
            pad_token_id=self.encoder.tokenizer.pad_token_id,
        )
        return self.encoder.decode(tokens[:, batch["prompt_length"] :])

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW on what may train, with one learning rate for weights and one for adapters, warmed up and decayed."""
        trained = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        adapters = [parameter for name, parameter in trained if ".lora_" in name]
        weights = [parameter for name, parameter in trained if ".lora_" not in name]
        groups = [
            {"params": weights, "lr": self.hparams["lr"], "name": "weights"},
            {"params": adapters, "lr": self.hparams["lora_lr"], "name": "adapters"},
        ]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
        schedule = warmup_cosine(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _show(self, samples: list[Any], answers: list[str]) -> None:
        for logger in self.loggers:
            if not isinstance(logger, TensorBoardLogger):
                continue
            if all(sample.image is not None for sample in samples):
                figure = answers_figure(samples[:SHOWN], answers[:SHOWN])
                logger.experiment.add_figure("captions held out", figure, self.global_step, close=False)
            else:
                text = answers_markdown(samples[:SHOWN], answers[:SHOWN])
                logger.experiment.add_text("answers held out", text, self.global_step)


def load_encoder(model: str, images: bool) -> Encoder:
    """The encoder that belongs to a hub id or folder."""
    return Encoder((AutoProcessor if images else AutoTokenizer).from_pretrained(locate(model)))


def add_adapters(model: nn.Module, towers: Towers, rank: int, max_params: float | None) -> None:
    """Put LoRA adapters on a model in place; then these and the projector train, and nothing else.

    Args:
        model: the transformers model.
        towers: where adapters may go.
        rank: of the adapters.
        max_params: the share of the towers' matrices that the ones of lowest κ with adapters make up; if ``None``,
            every linear layer gets one.
    """
    from peft import LoraConfig, inject_adapter_in_model

    parts = parts_of(model)
    wanted = trained_parts(towers) - {"projector"}
    names = [name for name, parameter in model.named_parameters() if parts[name] in wanted and parameter.ndim >= 2]
    if max_params is None:
        linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        modules = sorted({name.removesuffix(".weight") for name in names} & linear)
        targets: dict[str, Any] = {"target_modules": modules, "target_parameters": []}
    else:
        profile = KappaProfile.from_model(model, include=_adaptable(model, names))
        targets = lora_targets(profile, model=model, max_params=max_params)
    projector = [name for name, part in parts.items() if part == "projector"]
    inject_adapter_in_model(LoraConfig(**targets, r=rank, lora_alpha=2 * rank), model)
    for name, parameter in model.named_parameters():
        if name in projector:
            parameter.requires_grad_(True)


def _adaptable(model: nn.Module, names: list[str]) -> list[str]:
    """The tensors that an adapter can be put on: weights of linear layers, and stacks of experts.

    A bare parameter of shape (1, rows, cols), such as the position embeddings of a vision tower, is no such stack.
    """
    layers = dict(model.named_modules())
    return [
        name
        for name in names
        if isinstance(layers[name.rpartition(".")[0]], nn.Linear)
        or (not name.endswith(".weight") and model.get_parameter(name).ndim == 3 and len(model.get_parameter(name)) > 1)
    ]
