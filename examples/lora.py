"""LoRA on a choice of tensors: the profile picks, PEFT adapts, and what the model knew is watched.

A small Llama that counts upwards learns to count downwards, with adapters on half of its matrices only. Run it with
``python examples/lora.py``; needs ``pip install kappa-lightning[peft] transformers``.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from kappa_lightning import AgreementProbe, ForgettingEval, KappaProfile, PerplexityProbe, lora_targets

Batches = DataLoader[dict[str, Tensor]]
NUMBERS = 24

QUIET: Any = dict.fromkeys(["enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"], False)


class Counter(pl.LightningModule):
    """A causal language model whose words are numbers."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        sizes: dict[str, Any] = {
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        self.model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=NUMBERS, max_position_embeddings=16, **sizes))

    def forward(self, **inputs: Any) -> Any:
        """What transformers returns; the probes call it."""
        return self.model(**inputs)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Nats a token."""
        loss: Tensor = self.model(**batch).loss
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on what requires a gradient: after PEFT, the adapters."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr, weight_decay=0.0)


def counting(step: int, *, shuffle: bool) -> Batches:
    """Twelve numbers in a row, from every start."""
    starts = torch.arange(NUMBERS).repeat(8)
    tokens = (starts[:, None] + step * torch.arange(12)) % NUMBERS
    rows: Any = [{"input_ids": row, "labels": row} for row in tokens]
    return DataLoader(rows, 32, shuffle=shuffle)


def main() -> tuple[dict[str, Any], ForgettingEval, float]:
    """Pretrain, choose, adapt."""
    pl.seed_everything(0, verbose=False)
    module = Counter(lr=3e-3)
    pl.Trainer(max_epochs=12, accelerator="cpu", **QUIET).fit(module, counting(step=1, shuffle=True))

    # The profile is of the transformers model, so that its names are those that PEFT sees.
    profile = KappaProfile.from_model(module.model, exclude=["*embed_tokens*", "lm_head*"], progress=False)
    targets = lora_targets(profile, top_p=0.5)
    inject_adapter_in_model(LoraConfig(**targets, r=8, lora_alpha=16), module.model)

    module.lr = 1e-2
    old = counting(step=1, shuffle=False)  # a probe reads the same batches each time
    forgetting = ForgettingEval({"up": PerplexityProbe(old), "agreement": AgreementProbe(old)})
    trainer = pl.Trainer(max_epochs=6, callbacks=[forgetting], accelerator="cpu", **QUIET)
    trainer.fit(module, counting(step=-1, shuffle=True))
    loss = float(trainer.callback_metrics["train/loss"])
    print("adapters on:", ", ".join(targets["target_modules"]))
    kept = forgetting.history[-1]["forgetting/up/retention"]
    print(f"counting down: {loss:.3f} nats; counting up: retention {kept:.3f}")
    return targets, forgetting, loss


if __name__ == "__main__":
    main()
