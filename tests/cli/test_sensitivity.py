"""``kappa-lightning sensitivity`` on a language model in a folder and on a LightningCLI configuration."""

import lightning.pytorch as pl
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kappa_lightning import SensitivityProfile
from kappa_lightning.cli import main

WORDS = ["<s>", "</s>", "?", "a", "b", "c", "d"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=0, eos_token_id=1, initializer_range=0.3, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "task.txt"
    file.write_text("a b c d " * 60)
    return file


SMALL = ["--tokens", "6", "--batch-size", "2", "--batches", "3", "--sequences", "4"]


def test_language_model_and_text_give_profile_table_and_pictures(model, text, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # or names would be folded
    files = [tmp_path / "profile.json", tmp_path / "layers.png", tmp_path / "points.png"]
    outputs = ["--out", files[0], "--figure", files[1], "--scatter", files[2]]
    assert (
        main(["sensitivity", str(model), "--text", str(text), *SMALL, "--max-params", "0.5", *map(str, outputs)]) == 0
    )
    profile = SensitivityProfile.load(files[0])
    assert len(profile) == 15  # the matrices of two layers and the head
    assert profile.settings.batches == 3
    printed = capsys.readouterr().out
    chosen = profile.select(max_params=0.5)
    assert f"{len(chosen)} of 15 tensors" in printed
    assert "Predicted forgetting at equal adaptation" in printed
    lines = [line.split() for line in printed.splitlines() if ".weight" in line]
    assert [line[1] for line in lines] == [row.name for row in profile.rank()]
    assert {line[1] for line in lines if line[-1] == "yes"} == set(chosen)
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files[1:])


def test_names_alone_are_those_of_least_predicted_forgetting(model, text, tmp_path, capsys):
    out = tmp_path / "profile.json"
    assert main(["sensitivity", str(model), "--text", str(text), *SMALL, "--names", "--out", str(out)]) == 0
    assert capsys.readouterr().out.split() == SensitivityProfile.load(out).select()


def test_model_without_a_text_and_text_that_is_too_short_are_errors(model, tmp_path, capsys):
    assert main(["sensitivity", str(model)]) == 1
    assert "give --text FILE" in capsys.readouterr().err
    short = tmp_path / "short.txt"
    short.write_text("a b c")
    assert main(["sensitivity", str(model), "--text", str(short)]) == 1
    assert "has 3 tokens, fewer than one batch of 4 × 128" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "nothing.txt"], "error: --text nothing.txt: there is no such file"),
        (["--text", "binary.txt"], "error: --text binary.txt is no text in UTF-8"),
        (["--text", "text.txt", "--sequences", "0"], "error: --sequences 0 is too small: give at least 1"),
        (["--text", "text.txt", "--reference", "synthesized"], "error: --reference synthesized is for classifiers"),
        (["--text", "text.txt", "--figure", "a.foo"], "error: --figure a.foo: the ending must be one of"),
        (["--text", "text.txt", "--scatter", "a"], "error: --scatter a: the ending must be one of"),
    ],
)
def test_wrong_usage_is_said_in_one_line_before_the_work(model, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a b c")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00a")
    assert main(["sensitivity", str(model), *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.yaml: there is no such configuration"),
        ("model: {class_path: nothing.Here}\n", "config.yaml is no configuration of a model and data for LightningCLI"),
        ("modle: 3\n", "config.yaml is no configuration of a model and data for LightningCLI"),
    ],
)
def test_configuration_that_is_none_is_said_in_one_line(tmp_path, capsys, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    assert main(["sensitivity", "config.yaml"]) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert "usage" not in shown


class Classes(pl.LightningModule):
    """What a configuration names."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


class Data(pl.LightningDataModule):
    """What a configuration names."""

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(24, 4), torch.randint(3, (24,))), batch_size=8)


def test_configuration_of_a_lightning_cli_is_measured_and_nothing_is_trained_or_written(
    tmp_path, capsys, monkeypatch, lightning_log
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["kappa-lightning", "sensitivity", "config.yaml"])
    config = tmp_path / "config.yaml"
    here = __name__
    config.write_text(
        yaml.safe_dump(
            {
                "seed_everything": 1,
                "trainer": {"accelerator": "cpu", "max_epochs": 3},
                "model": {"class_path": f"{here}.Classes", "init_args": {"width": 6}},
                "data": {"class_path": f"{here}.Data"},
            }
        )
    )
    assert main(["sensitivity", str(config), "--out", "profile.json", "--num-tensors", "1", "--names"]) == 0
    profile = SensitivityProfile.load("profile.json")
    assert [(row.name, row.shape) for row in profile] == [("net.0.weight", (6, 4)), ("net.2.weight", (3, 6))]
    assert profile.settings.batches == 3
    shown = capsys.readouterr()
    assert shown.out.split()[-1] == profile.select(num_tensors=1)[0]
    # What LightningCLI thinks of the command line, and the table of a fit that there is none of.
    assert "intended to run from within Python" not in shown.err
    assert "trains: selected" not in lightning_log.text
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.yaml", "profile.json"]
