"""The anchor and the way back on language models: text of their own, adapters, recomputed activations."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from peft import LoraConfig, get_peft_model
from tiny import Down, events, make_trainer, snapshot
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from kappa_lightning import AgreementProbe, PretrainedAnchor, Probe, WalkBack
from kappa_lightning.anchoring.batches import save_batches

VOCABULARY = 19


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=0, eos_token_id=1, pad_token_id=1, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


class Writer(pl.LightningModule):
    def __init__(self, model: Any = None) -> None:
        super().__init__()
        self.model = model or llama()
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02, weight_decay=0.0)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(samples(), batch_size=4)

    val_dataloader = train_dataloader


def samples() -> list[dict[str, Tensor]]:
    """A task that the model does not know: counting up, after a prompt of two tokens."""
    rows = [torch.arange(start, start + 8) % VOCABULARY for start in range(2, 14)]
    labels = [torch.where(torch.arange(8) < 2, -100, row) for row in rows]
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": label}
        for row, label in zip(rows, labels, strict=True)
    ]


def trained(root: Path, anchor: Any, model: Any = None, **options: Any) -> tuple[Writer, pl.Trainer]:
    module = Writer(model)
    trainer = make_trainer(root, *([] if anchor is None else [anchor]), **{"max_epochs": 4, **options})
    trainer.fit(module)
    return module, trainer


def own_text(model: nn.Module) -> dict[str, Tensor]:
    """Text of the pretrained model that no anchor has seen."""
    from kappa_lightning.probes.generated import generate_text

    return generate_text(model, num_sequences=32, num_tokens=12, seed=99)


def divergence(now: nn.Module, was: nn.Module, text: dict[str, Tensor]) -> float:
    with torch.no_grad():
        p, q = (model.eval()(**text).logits[text["attention_mask"].bool()].log_softmax(-1) for model in (was, now))
    return float((p.exp() * (p - q)).sum(-1).mean())


ANCHORS: dict[str, dict[str, Any]] = {
    "auto": {},
    "few": {"top_k": 5},
    "forward": {"source": "forward"},
    "cross_entropy": {"divergence": "cross_entropy"},
    "batch": {"reference": "batch"},
    "batch without target": {"reference": "batch", "exclude_target": True},
    "inputs": {"reference": "inputs", "batches": 2},
}


def test_every_kind_holds_the_outputs_where_they_were(tmp_path: Path) -> None:
    was = llama()
    text = own_text(was)
    plain, _ = trained(tmp_path, None)
    lost = divergence(plain.model, was, text)
    for name, options in ANCHORS.items():
        anchor = PretrainedAnchor(**{"strength": 5.0, "num_tokens": 12, "batches": 4, **options})
        module, trainer = trained(tmp_path, anchor, log_every_n_steps=1)
        assert divergence(module.model, was, text) < (0.75 if "batch" in name else 0.5) * lost, name
        assert module.losses[0] == plain.losses[0], name
        assert trainer.callback_metrics["anchor/new_task_divergence"] > 0


def test_cross_entropy_on_its_own_text_estimates_the_same_divergence(tmp_path: Path) -> None:
    """At strength 0, on the same references, of a model that has moved."""
    found = {}
    for kind in ("kl", "cross_entropy"):
        anchor = PretrainedAnchor(
            "generated", 0.0, divergence=kind, num_tokens=24, batches=1, batch_size=256, new_task_divergence=False
        )
        _, trainer = trained(tmp_path, anchor, log_every_n_steps=1, max_epochs=2)
        found[kind] = trainer.callback_metrics["anchor/divergence"].item()
    assert found["kl"] > 0.02
    assert found["cross_entropy"] == pytest.approx(found["kl"], rel=0.25)


def test_generated_references_are_shown_once(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    anchor = PretrainedAnchor(num_tokens=6, batches=2, batch_size=2)
    trained(tmp_path, anchor, logger=logger)
    (text,) = events(Path(logger.log_dir)).Tensors("anchor/references/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    first = anchor.references[0]
    tokens = first["input_ids"][0][first["attention_mask"][0].bool()].tolist()
    assert f"| 1 | {' '.join(map(str, tokens))} |" in shown
    assert len(anchor.references) == 2


def adapted() -> Any:
    torch.manual_seed(12)
    return get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "up_proj"], lora_alpha=4))


@pytest.mark.parametrize("source", ["recorded", "forward"])
def test_lora_is_held_to_the_base_and_keeps_a_copy_of_its_adapters_only(tmp_path: Path, source: Any) -> None:
    anchor = PretrainedAnchor("generated", 0.0, source=source, num_tokens=12, batches=1, batch_size=16)
    module, trainer = trained(tmp_path, anchor, adapted(), log_every_n_steps=1, max_epochs=3)
    kept = anchor.state_dict()["pretrained"]["tensors"]
    assert kept
    assert all("lora_" in name for name in kept)
    # The last figure is of the weights before the last step.
    (references,) = anchor.references
    with module.model.disable_adapter(), torch.no_grad():
        base = module.model(**references).logits
    assert torch.allclose(base, llama().eval()(**references).logits, atol=1e-6)
    assert trainer.callback_metrics["anchor/divergence"] > 0


def test_recomputed_activations_give_the_same_steps(tmp_path: Path) -> None:
    anchor = {"reference": "generated", "strength": 3.0, "num_tokens": 12, "batches": 2}
    plain, _ = trained(tmp_path, PretrainedAnchor(**anchor))
    for reentrant in (False, True):
        model = llama()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        module, _ = trained(tmp_path, PretrainedAnchor(**anchor), model)
        for name, tensor in snapshot(plain).items():
            torch.testing.assert_close(snapshot(module)[name], tensor, rtol=1e-4, atol=1e-5)


def test_bf16_autocast_is_followed(tmp_path: Path) -> None:
    anchor = lambda: PretrainedAnchor("generated", 3.0, num_tokens=12, batches=2, source="forward")  # noqa: E731
    full, _ = trained(tmp_path, anchor())
    half, trainer = trained(tmp_path, anchor(), precision="bf16-mixed")
    assert trainer.callback_metrics["anchor/divergence"] >= 0
    assert half.losses == pytest.approx(full.losses, rel=0.1)
    assert half.losses != full.losses


def test_compiled_model_is_held(tmp_path: Path) -> None:
    module = Writer()
    module.model = torch.compile(module.model, backend="eager")
    anchor = PretrainedAnchor([{"input_ids": torch.arange(8)[None]}], 3.0, source="forward")
    make_trainer(tmp_path, anchor, max_epochs=2, log_every_n_steps=1).fit(module)
    plain, _ = trained(
        tmp_path, PretrainedAnchor([{"input_ids": torch.arange(8)[None]}], 3.0, source="forward"), max_epochs=2
    )
    assert module.losses == pytest.approx(plain.losses, rel=1e-4)


def test_an_adapter_is_walked_back_by_its_scale(tmp_path: Path) -> None:
    """At α the model is the base with α times the adapter's update."""
    keeps = Probe([0, 0], Down(), lambda module, _: torch.tensor(1.0))
    plain, _ = trained(tmp_path, None, adapted())
    walk_back = WalkBack(min_retention=0.5, probes={"old": keeps}, points=[0.5], save=False)
    seen: dict[float, Tensor] = {}
    ids = torch.arange(8)[None]
    layer = "model.base_model.model.model.layers.0.mlp.up_proj"

    def remember(module: nn.Module, _: Any) -> Tensor:
        part = module.get_submodule(layer)
        delta = (part.lora_B["default"].weight @ part.lora_A["default"].weight) * part.scaling["default"]
        seen[len(seen)] = delta.detach().clone()
        return torch.tensor(1.0)

    walk_back.probes = {"old": Probe([0, 0], Down(), remember)}
    trained(tmp_path, walk_back, adapted())
    part = plain.get_submodule(layer)
    whole = (part.lora_B["default"].weight @ part.lora_A["default"].weight) * part.scaling["default"]
    # At the start, then along 0, ½ and 1.
    halves = [delta for delta in seen.values() if torch.allclose(delta, whole / 2, rtol=1e-4, atol=1e-7)]
    assert halves
    assert any(torch.equal(delta, torch.zeros_like(whole)) for delta in seen.values())
    assert walk_back.alpha == 1.0
    assert torch.isfinite(plain.model(input_ids=ids).logits).all()


def test_only_what_moves_of_an_adapter_has_a_factor(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    kept = Probe([0, 0], Down(), lambda module, batch: torch.tensor(1.0))
    walk_back = WalkBack(0.5, probes={"old": kept}, along="role", points=2, save=False)
    trained(tmp_path, walk_back, get_peft_model(llama(), config), max_epochs=1)
    assert isinstance(walk_back.alpha, dict)
    assert [name.split(".")[-4:-1] for name in walk_back.alpha] == [
        ["q_proj", "lora_B", "default"],
        ["v_proj", "lora_B", "default"],
    ]


def test_references_of_a_model_with_more_tokens_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "references.safetensors"
    ids = torch.full((2, 4), VOCABULARY)
    save_batches(file, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    with pytest.raises(ValueError, match=f"has the token {VOCABULARY} in input_ids of its batch 0"):
        trained(tmp_path, PretrainedAnchor(file))


def test_an_adapter_that_was_there_before_is_refused_by_name(tmp_path: Path) -> None:
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.ones_(parameter)
    walk_back = WalkBack(min_retention=0.5, probes={"old": Probe([0, 0], Down(), lambda m, _: torch.tensor(1.0))})
    with pytest.raises(ValueError, match=r"lora_B\.default\.weight was not zero"):
        trained(tmp_path, walk_back, model)


def test_agreement_is_the_retention_along_the_way(tmp_path: Path) -> None:
    """A probe that records the pretrained model does so at the pretrained end of the way."""
    text = own_text(llama())
    batches = [{name: tensor[at : at + 8] for name, tensor in text.items()} for at in range(0, 32, 8)]
    probe = AgreementProbe(batches, logits=lambda module, batch: module.model(**batch).logits)
    walk_back = WalkBack(min_retention=0.97, probes={"own text": probe}, points=5, save=False)
    module, _ = trained(tmp_path, walk_back)
    assert walk_back.path[0]["retention"] == pytest.approx(1, abs=1e-5)
    retentions = [point["retention"] for point in walk_back.path]
    assert retentions == sorted(retentions, reverse=True)
    assert 0 < walk_back.alpha < 1
    was = llama()
    assert divergence(module.model, was, text) < 0.05


def test_image_text_model_is_held_to_text_that_it_writes_without_a_picture(tmp_path):
    # It trains on captions, with pictures; what is held is what it says where there is none.
    torch.manual_seed(5)
    text, vision = llama().config, {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, num_attention_heads=2, image_size=8, patch_size=4, projection_dim=8),
        text_config=LlamaConfig(**{**text.to_dict(), "vocab_size": VOCABULARY + 1}), image_token_index=VOCABULARY,
    )  # fmt: skip
    pictures = [
        {
            "input_ids": torch.cat([torch.full((4,), VOCABULARY), row["input_ids"]]),
            "attention_mask": torch.ones(12, dtype=torch.long),
            "labels": torch.cat([torch.full((4,), -100), row["labels"]]),
            "pixel_values": torch.randn(3, 8, 8),
        }
        for row in samples()
    ]

    class Captioner(Writer):
        def train_dataloader(self):
            return DataLoader(pictures, batch_size=4)

        val_dataloader = train_dataloader

    divergences = {}
    for strength in (0.0, 20.0):
        torch.manual_seed(6)
        module = Captioner(LlavaForConditionalGeneration(config).train())
        was, own = copy.deepcopy(module.model), own_text(module.model)
        anchor = PretrainedAnchor(strength=strength, batches=4, batch_size=8, num_tokens=12)
        make_trainer(tmp_path / str(strength), anchor, max_epochs=4).fit(module)
        divergences[strength] = divergence(module.model, was, own)
        assert all(set(batch) == {"input_ids", "attention_mask"} for batch in anchor.references)
        # A token of a picture without its picture would break the pass.
        assert all((batch["input_ids"] != VOCABULARY).all() for batch in anchor.references)
    assert divergences[20.0] < divergences[0.0] / 2
