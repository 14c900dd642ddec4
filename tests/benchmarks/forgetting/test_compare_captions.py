from functools import partial

import pytest
import torch

from benchmarks.forgetting.captions import NewCaptions
from benchmarks.forgetting.methods import prepare
from benchmarks.forgetting.run import Plan, execute
from recipes.shared import small_models
from recipes.shared.pretraining import Schooling, fact_batch
from recipes.shared.world import facts

BRIEF = Schooling(steps=20, facts=32, samples=8, lr=3e-3)
PLAN = Plan(
    task="captions", method="kappa", lr=1e-3, seed=0, budget=0.25, strength=0.0, epochs=1, steps_per_epoch=2,
    options={"batch_size": "4", "test_size": "6"},
)  # fmt: skip


@pytest.fixture(autouse=True)
def _hardly_pretrained(tmp_path_factory, monkeypatch):
    """The small LLaVA after a few steps, in a folder of its own."""
    monkeypatch.setattr(small_models, "CACHE", tmp_path_factory.getbasetemp() / "compare-captions")
    brief = partial(small_models.small_llava, reading=BRIEF, eye_steps=1, seeing=BRIEF)
    monkeypatch.setattr(small_models, "small_llava", brief)


def test_run_trains_projector_and_low_kappa_matrices_and_starts_at_the_loss_of_the_captions(tmp_path):
    run = execute(PLAN, tmp_path)
    task = NewCaptions(**PLAN.options)
    module = task.model(0, 1e-3, tmp_path).eval()
    data = task.data(module, 0)
    data.setup("validate")
    total = tokens = 0
    with torch.no_grad():
        for batch in data.val_dataloader():
            inputs = batch["inputs"]
            count = int((inputs["labels"][:, 1:] != -100).sum())
            total += float(module.model(**inputs).loss) * len(batch["samples"])
            tokens += count
    assert tokens
    assert run.path[0] == (pytest.approx(total / 6, rel=1e-4), 1.0)
    towers = {name: p.numel() for name, p in module.named_parameters() if "language_model" in name and p.ndim > 1}
    projector = sum(p.numel() for name, p in module.named_parameters() if "projector" in name)
    assert run.trainable - projector == pytest.approx(0.25 * sum(towers.values()), rel=0.1)


def test_probe_is_the_perplexity_of_the_world(tmp_path):
    task = NewCaptions()
    module = task.model(0, 1e-3, tmp_path).eval()
    probe = task.probes(module, 0)["text"]
    probe.metric.reset()
    with torch.no_grad():
        for batch in probe.dataloader:
            probe.update(module, batch)
        whole = fact_batch(facts(), module.encoder.tokenizer)
        loss = module.model(**whole).loss
    assert probe.compute() == pytest.approx(float(loss.exp()), rel=1e-3)


@pytest.mark.parametrize("method", ["full", "lora_all", "kappa"])
def test_vision_tower_never_trains(method, tmp_path):
    task = NewCaptions()
    module = task.model(0, 1e-3, tmp_path)
    prepare(method, module, task, budget=0.25, strength=0.0, seed=0)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert any("projector" in name for name in trained)
    assert not any("vision_tower" in name for name in trained)
    assert any("language_model" in name for name in trained)


def test_every_learning_rate_is_the_plans(tmp_path):
    module = NewCaptions().model(0, 3e-4, tmp_path)
    assert (module.hparams["lr"], module.hparams["lora_lr"]) == (3e-4, 3e-4)
