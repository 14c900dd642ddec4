from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, Subset

from recipes.compare.methods import prepare
from recipes.compare.scenes import ScenesWithLoss, TwoDigitScenes
from recipes.compare.task import LOSS
from recipes.image_text import WORDINGS, caption, tokenize


@pytest.fixture
def model(tmp_path: Path) -> ScenesWithLoss:
    return TwoDigitScenes().model(0, 1e-4, tmp_path)


def test_loss_is_the_mean_cross_entropy_over_scenes_and_wordings(model: ScenesWithLoss) -> None:
    data = TwoDigitScenes().data(model, 0)
    data.setup("validate")
    loader = DataLoader(Subset(data.test_scenes, range(6)), 6, collate_fn=data._collate)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    (logged,) = trainer.validate(model, loader, verbose=False)
    (batch,) = loader
    model.eval()
    losses = []
    with torch.no_grad():
        images = model.embed_images(batch["images"])
        for wording in range(len(WORDINGS)):
            texts = model.embed_text(tokenize(model.tokenizer, [caption(scene, wording) for scene in range(100)]))
            losses.append(functional.cross_entropy(images @ texts.T / 0.07, batch["scenes"]))
    assert logged[LOSS] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)


@pytest.mark.parametrize("method", ["lora_all", "osf"])
def test_adapters_take_the_text_encoder_and_leave_the_new_parts_to_train(method: str, model: ScenesWithLoss) -> None:
    matrices = sum(p.numel() for name, p in model.named_parameters() if name.startswith("text.") and p.ndim > 1)
    new = {name for name, _ in model.named_parameters() if not name.startswith("text.")}
    prepare(method, model, TwoDigitScenes(), budget=0.25, strength=0.0, seed=0)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert new <= trained.keys()
    adapters = sum(size for name, size in trained.items() if name not in new)
    assert adapters == pytest.approx(0.25 * matrices, rel=0.05)
