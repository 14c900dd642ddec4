"""Known benchmarks and written text as probes: a task of lm-eval, and answers that the model writes.

A small Llama that continues a counting learns to count downwards. Run it with ``python examples/language_probes.py``;
needs ``pip install kappa-lightning[lm-eval] transformers``.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kappa_lightning import ForgettingEval, GenerationProbe, LMEvalProbe

NUMBERS = 10
QUIET: Any = dict.fromkeys(["enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"], False)
# A task file as lm-eval documents it; one of its own tasks needs only its name.
TASK = """task: what_comes_next
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


class Counter(pl.LightningModule):
    """A causal language model whose words are digits."""

    def __init__(self) -> None:
        super().__init__()
        sizes: Any = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=NUMBERS + 2, bos_token_id=NUMBERS, eos_token_id=NUMBERS + 1, **sizes)
        self.model: Any = LlamaForCausalLM(config)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Nats a token."""
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def counting(step: int, count: int) -> DataLoader[dict[str, Tensor]]:
    """Six digits in a row, from every start."""
    tokens = (torch.arange(count)[:, None] + step * torch.arange(6)) % NUMBERS
    rows: Any = [{"input_ids": row, "labels": row} for row in tokens]
    return DataLoader(rows, 10, shuffle=True)


def main() -> ForgettingEval:
    """Pretrain, fine-tune, and watch a benchmark and what is written."""
    pl.seed_everything(0, verbose=False)
    digits = {str(digit): digit for digit in range(NUMBERS)} | {"<s>": NUMBERS, "</s>": NUMBERS + 1}
    words = Tokenizer(models.WordLevel(digits, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    fast: Any = PreTrainedTokenizerFast
    tokenizer = fast(tokenizer_object=words, padding_side="left", **names)
    module = Counter()
    pl.Trainer(max_epochs=30, accelerator="cpu", **QUIET).fit(module, counting(1, 100))

    folder = Path(tempfile.mkdtemp())
    starts = [" ".join(str((start + place) % NUMBERS) for place in range(3)) for start in range(NUMBERS)]
    choices = [[str((start + 3) % NUMBERS), str((start + 1) % NUMBERS)] for start in range(NUMBERS)]
    documents = [{"text": t, "choices": c, "answer": 0} for t, c in zip(starts, choices, strict=True)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, documents)), encoding="utf-8")
    (folder / "task.yaml").write_text(TASK.format(file=folder / "data.jsonl"), encoding="utf-8")

    prompts = dict(tokenizer(starts, return_tensors="pt", return_token_type_ids=False))
    prompts["references"] = [" ".join(str((start + 3 + place) % NUMBERS) for place in range(2)) for start in range(10)]
    probes = {
        "benchmark": LMEvalProbe(["what_comes_next"], tokenizer=tokenizer, include_path=folder),
        "written": GenerationProbe([prompts], tokenizer=tokenizer, max_new_tokens=2),
    }
    # One epoch, watched by steps; it stops once the lower end of an interval falls below a half.
    forgetting = ForgettingEval(probes, every_n_train_steps=10, min_retention=0.5, judged_by="retention_low")
    pl.Trainer(max_epochs=1, callbacks=[forgetting], accelerator="cpu", **QUIET).fit(module, counting(-1, 400))
    for record in forgetting.history:
        kept = ", ".join(f"{name} {record[f'forgetting/{name}/retention']:.2f}" for name in probes)
        print(f"step {record['step']}: {kept}")
    print(probes["written"].report())
    return forgetting


if __name__ == "__main__":
    main()
