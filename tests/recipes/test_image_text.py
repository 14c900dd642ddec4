import csv
from argparse import Namespace
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from sklearn.datasets import load_digits

from kappa_lightning import ForgettingEval, KappaFreezeCallback
from recipes import image_text
from recipes.image_text import ImageTextModel, SceneData, Scenes, caption, packaged_minilm, read_pairs, similarity_probe

TOLD = {
    0: "a three to the left of a seven",
    1: "a seven to the right of a three",
    2: "a three on the left and a seven on the right",
    3: "on the right there is a seven, on the left a three",
    4: "first a three, then a seven",
    5: "a seven that comes after a three",
}


@pytest.fixture(scope="module")
def model() -> ImageTextModel:
    pl.seed_everything(0, verbose=False)
    return ImageTextModel(packaged_minilm(), text_lr=4e-4, vision_lr=2e-3)


@pytest.mark.parametrize(("wording", "told"), TOLD.items())
def test_every_wording_tells_left_from_right(wording: int, told: str) -> None:
    assert caption(37, wording) == told


def test_the_hundred_scenes_have_different_captions_in_all_wordings() -> None:
    captions = {caption(scene, wording) for scene in range(100) for wording in range(6)}
    assert len(captions) == 600


def test_scenes_show_what_they_say_and_occur_equally_often() -> None:
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32), torch.tensor(digits.target)
    scenes = Scenes(images, labels, count=300, seed=3)
    assert torch.bincount(scenes.scenes, minlength=100).tolist() == [3] * 100
    for index in range(300):
        image, scene, _ = scenes[index]
        left, right = scenes.sides[index]
        assert (int(labels[left]), int(labels[right])) == divmod(scene, 10)
        assert torch.equal(image[0, :, :8], images[left])
        assert torch.equal(image[0, :, 8:], images[right])


def test_no_digit_is_both_learned_from_and_tested_on(model: ImageTextModel) -> None:
    data = SceneData(model.tokenizer)
    data.setup("fit")
    learned = {image.numpy().tobytes() for image in data.train_scenes.images}
    tested = {image.numpy().tobytes() for image in data.test_scenes.images}
    assert len(learned) + len(tested) == 1797
    assert not learned & tested


def test_shipped_pairs_cover_the_scale_and_stsb_files_are_read_alike(tmp_path: Path) -> None:
    pairs = read_pairs(image_text.PAIRS)
    assert len(pairs) >= 200
    assert {round(score) for _, _, score in pairs} == {0, 1, 2, 3, 4, 5}
    sts = tmp_path / "sts.csv"
    with sts.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None)
        writer.writerows(["genre", "file", "2012", "7", score, a, b] for a, b, score in pairs)
    assert read_pairs(sts) == pairs


@pytest.mark.parametrize("line", ["2.5\tonly one sentence", "high\ta\tb", "a\tb\tc\td\te"])
def test_line_of_neither_form_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "pairs.tsv"
    file.write_text(f"score\tsentence1\tsentence2\n3.0\ta\tb\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 3"):
        read_pairs(file)


def test_missing_sts_file_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        image_text.parse(["--sts", "nowhere.tsv"])
    assert caught.value.code == 2
    assert "nowhere.tsv" in capsys.readouterr().err


@pytest.mark.slow
def test_kappatune_on_the_real_encoder_moves_what_it_selected_and_nothing_else(
    model: ImageTextModel, tmp_path: Path
) -> None:
    freeze = KappaFreezeCallback(
        max_params=0.25, include=["text.*"], exclude=(), always_train=["vision.*", "log_temperature"]
    )
    forgetting = ForgettingEval({"sts": similarity_probe(read_pairs(image_text.PAIRS), model.tokenizer)})
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = pl.Trainer(
        callbacks=[freeze, forgetting],
        max_epochs=1,
        limit_train_batches=3,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, SceneData(model.tokenizer, batch_size=8))
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == set(freeze.trained_names)
    text = [parameter for name, parameter in before.items() if name.startswith("text.") and parameter.ndim > 1]
    chosen = sum(before[name].numel() for name in freeze.selected_names)
    assert 0.2 * sum(p.numel() for p in text) < chosen <= 0.25 * sum(p.numel() for p in text)
    assert forgetting.baseline["sts"] == pytest.approx(0.6889, abs=5e-4)


@pytest.mark.slow
def test_a_short_run_of_every_method_gives_its_row_and_leaves_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "pairs.tsv"
    lines = image_text.PAIRS.read_text(encoding="utf-8").splitlines()[:70]
    pairs.write_text("\n".join(lines) + "\n", encoding="utf-8")
    options = ["--epochs", "1", "--steps-per-epoch", "2", "--batch-size", "8", "--sts", str(pairs)]
    options += ["--log-dir", str(tmp_path / "runs"), "--accelerator", "cpu"]
    monkeypatch.setattr(image_text.SceneData, "val_dataloader", _one_batch)
    full, walked, kappa = image_text.main(options)
    assert (full.method, walked.method, kappa.method) == ("full", "full, walked back", "kappa")
    assert walked.seconds > full.seconds
    assert walked.spearman is None
    assert walked.retention >= 0.97
    assert kappa.trainable < full.trainable / 3
    assert 0 <= full.accuracy <= 1
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["full", "kappa", "learned-and-kept.png"]
    assert (tmp_path / "runs" / "learned-and-kept.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    # Not a terminal: a line an epoch, and no bar that would fill a log file.
    line = f"full: epoch 1 of 1, step 2, val/accuracy {full.accuracy:.3f}, retention {full.retention:.3f}"
    assert line in printed.out
    assert "kappa: epoch 1 of 1" in printed.out
    assert "walked" in printed.out
    assert "it/s" not in printed.out + printed.err
    # Without blanks, since lines are wrapped at the width of the console.
    assert f"tensorboard--logdir{tmp_path / 'runs'}" in "".join(printed.out.split())


def _one_batch(data: SceneData) -> torch.utils.data.DataLoader[object]:
    scenes = torch.utils.data.Subset(data.test_scenes, range(20))
    return torch.utils.data.DataLoader(scenes, 20, collate_fn=data._collate)


def test_arguments_have_their_help() -> None:
    args = image_text.parse([])
    assert isinstance(args, Namespace)
    assert args.methods == ["full", "kappa"]
    assert Path(args.text_model, "model.safetensors").is_file()
