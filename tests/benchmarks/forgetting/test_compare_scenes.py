from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, Subset

from benchmarks.forgetting.methods import prepare
from benchmarks.forgetting.scenes import SHORT, ScenesWithLoss, TwoDigitScenes, spread
from benchmarks.forgetting.task import LOSS
from recipes.image_text import WORDINGS, caption, tokenize


def test_pairs_are_taken_at_even_distances() -> None:
    pairs = [(str(index), "", 0.0) for index in range(10)]
    assert [pair[0] for pair in spread(pairs, 4)] == ["0", "2", "5", "7"]
    assert spread(pairs, None) == pairs
    with pytest.raises(ValueError, match="pairs=11"):
        spread(pairs, 11)


def test_short_wordings_say_which_is_left() -> None:
    assert [caption(38, wording, SHORT) for wording in range(4)] == [
        "three left of eight", "three before eight", "three then eight", "three and eight"
    ]  # fmt: skip
    assert caption(13, 0, SHORT, digits=5) == "two left of three"
    with pytest.raises(ValueError, match="wordings='long'"):
        TwoDigitScenes(wordings="long")


def test_probe_has_every_pair_once_and_like_lengths_together(model: ScenesWithLoss) -> None:
    task = TwoDigitScenes(pairs="130")
    batches = list(task.probes(model, 0)["sts"].dataloader)
    assert sorted(score for *_, scores in batches for score in scores.tolist()) == pytest.approx(
        sorted(score for *_, score in task.pairs)
    )
    widths = [first["input_ids"].shape[1] + second["input_ids"].shape[1] for first, second, _ in batches]
    assert len(widths) == 3
    assert widths[0] < widths[-1]


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
