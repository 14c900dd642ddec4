import weakref
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import yaml
from families import make

from recipes.captioning.__main__ import main
from recipes.captioning.cli import lightning_cli
from recipes.captioning.compare import compare, parse
from recipes.shared import small_models
from recipes.shared.arguments import settings_from
from recipes.shared.pretraining import Schooling

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
BRIEF = Schooling(steps=40, facts=32, samples=8, lr=3e-3)


@pytest.fixture
def _hardly_pretrained(tmp_path, monkeypatch):
    """The small LLaVA after a few steps, in a folder of its own."""
    monkeypatch.setattr(small_models, "CACHE", tmp_path / "cache")
    brief = partial(small_models.small_llava, reading=BRIEF, eye_steps=1, seeing=BRIEF)
    monkeypatch.setattr(small_models, "small_llava", brief)


def replaced(value, names):
    """A YAML document with some of its plain values replaced."""
    if isinstance(value, dict):
        return {key: replaced(part, names) for key, part in value.items()}
    if isinstance(value, list):
        return [replaced(part, names) for part in value]
    return names.get(value, value) if isinstance(value, str) else value


def short(config, tmp_path):
    """The configuration with two steps on a CPU, and its files in a temporary folder."""
    config["trainer"] |= {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1, "accelerator": "cpu"}
    config["trainer"] |= {"enable_progress_bar": False, "default_root_dir": str(tmp_path)}
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path / "runs")
    for callback in config["trainer"]["callbacks"]:
        if "profile" in callback.get("init_args", {}):
            callback["init_args"]["profile"] = str(tmp_path / "kappa.json")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return str(file)


def callbacks_of(cli):
    return {type(callback).__name__: callback for callback in cli.trainer.callbacks}


@pytest.mark.slow
@pytest.mark.usefixtures("_hardly_pretrained")
def test_offline_configuration_runs_with_the_three_callbacks(tmp_path):
    config = yaml.safe_load((CONFIGS / "captioning.yaml").read_text(encoding="utf-8"))
    cli = lightning_cli(["fit", "--config", short(config, tmp_path)])
    callbacks = callbacks_of(cli)
    assert cli.trainer.global_step == 2
    assert {"KappaFreezeCallback", "KappaMonitor", "ForgettingEval"} <= callbacks.keys()
    assert set(callbacks["ForgettingEval"].history[-1]) >= {
        f"forgetting/{probe}/retention" for probe in ("world", "vision", "agreement")
    }
    assert any("multi_modal_projector" in name for name in callbacks["KappaFreezeCallback"].trained_names)


@pytest.mark.parametrize(
    ("config", "family", "hub"),
    [
        ("captioning_smolvlm.yaml", "idefics3", "HuggingFaceTB/SmolVLM-256M-Instruct"),
        ("captioning_llava.yaml", "llava", "llava-hf/llava-1.5-7b-hf"),
    ],
)
def test_configurations_of_hub_models_run_on_a_tiny_checkpoint_of_the_family(
    tmp_path,
    pictures,
    config,
    family,
    hub,
):
    folder = str(make(family, tmp_path))
    document = yaml.safe_load((CONFIGS / config).read_text(encoding="utf-8"))
    document = replaced(document, {hub: folder, "pictures": pictures})
    document["data"] |= {"batch_size": 2, "test_size": 2, "num_workers": 0, "prompt": "what is this ?"}
    for probe in document["trainer"]["callbacks"][2]["init_args"]["probes"].values():
        probe["init_args"] |= {"windows": 2, "window": 12}
    cli = lightning_cli(["fit", "--config", short(document, tmp_path)])
    callbacks = callbacks_of(cli)
    assert cli.trainer.current_epoch == 1
    assert callbacks["KappaFreezeCallback"].trained_names
    assert callbacks["ForgettingEval"].baseline["agreement"] == 1.0
    kept = callbacks["ForgettingEval"].history[-1]["forgetting/retention"]
    assert callbacks["ModelCheckpoint"].best_model_path.endswith(f"-kept={kept:.3f}.ckpt")


def test_help_of_both_command_lines_names_what_matters(capsys):
    for arguments, words in (
        (["--help"], ["--method", "--towers", "--max-params", "--text", "captions.jsonl", "kappa-lora"]),
        (["fit", "--help"], ["--model.towers", "--data.data", "--config"]),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
        shown = capsys.readouterr().out
        assert all(word in shown for word in words)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "nowhere.txt"], "--text: there is no file nowhere.txt"),
        (["--max-params", "1.5"], "--max-params: 1.5 is not a share"),
        (["--epochs", "0"], "--epochs: 0 must be at least 1"),
        (["--test-size", "0"], "--test-size: 0 must be at least 1"),
        (["--text", __file__], "--text: small-llava knows no words"),
        (["--old-data", "pictures"], "--old-data: small-llava has old pictures"),
        (["--method", "half"], "invalid choice"),
    ],
)
def test_bad_option_is_a_usage_error(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_comparison_of_a_hub_model_keeps_text_and_old_pictures_and_one_model_at_a_time(
    tmp_path, pictures, monkeypatch, capsys
):
    folder = str(make("llava", tmp_path))
    modules, alive, fit = [], [], pl.Trainer.fit

    def counted(trainer, module, *args, **kwargs):
        alive.append(sum(reference() is not None for reference in modules))
        modules.append(weakref.ref(module))
        return fit(trainer, module, *args, **kwargs)

    monkeypatch.setattr(pl.Trainer, "fit", counted)
    text = tmp_path / "wiki.txt"
    text.write_text("a red dog runs . this is a blue cat . " * 400, encoding="utf-8")
    options = ["--model", folder, "--data", pictures, "--old-data", pictures, "--prompt", "what is this ?"]
    options += ["--text", str(text), "--log-dir", str(tmp_path / "runs"), "--accelerator", "cpu"]
    options += ["--epochs", "1", "--batch-size", "2", "--test-size", "2", "--max-new-tokens", "3"]
    results = compare([*options, "--method", "full", "kappa"])
    assert alive == [0, 0]
    for result in results:
        assert result.retention.keys() == {"text", "vision", "agreement"}
        assert result.loss > 0
    # The old pictures are the new ones here.
    assert results[0].retention["vision"] > 1
    assert "nats" in capsys.readouterr().out


def test_large_models_get_small_batches_and_long_answers(tmp_path):
    small, large = (settings_from(parse(arguments), images=True) for arguments in ([], ["--model", "a/b"]))
    assert (small.batch_size, small.accumulate, small.clip, small.max_new_tokens, small.steps_per_epoch) == (
        32, 1, None, 16, 40,
    )  # fmt: skip
    assert (large.batch_size, large.accumulate, large.clip, large.max_new_tokens, large.steps_per_epoch) == (
        4, 4, 1.0, 64, None,
    )  # fmt: skip
    assert settings_from(parse(["--model", "a/b", "--clip", "0"]), images=True).clip is None
