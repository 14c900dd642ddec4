"""kappa-lightning walk-back on checkpoints of every kind, against interpolation by hand."""

from __future__ import annotations

import json
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import Down, TinyNet, assert_same_tensors, fit
from torch import Tensor

from kappa_lightning import Probe
from kappa_lightning.anchoring.checkpoints import CheckpointWalk
from kappa_lightning.cli import main

BASE = {
    "layers.0.up.weight": torch.tensor([[0.0, 2.0], [4.0, 6.0]]),
    "layers.1.up.weight": torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.bfloat16),
    "norm.bias": torch.tensor([1.0, -1.0]),
    "steps": torch.tensor(3),
}
TRAINED = {
    "layers.0.up.weight": torch.tensor([[4.0, 2.0], [0.0, 6.0]]),
    "layers.1.up.weight": torch.tensor([[3.0, 1.0], [1.0, 5.0]], dtype=torch.bfloat16),
    "norm.bias": torch.tensor([3.0, -1.0]),
    "steps": torch.tensor(9),
    "head.weight": torch.tensor([[7.0]]),
}
QUARTER = {
    "layers.0.up.weight": torch.tensor([[1.0, 2.0], [3.0, 6.0]]),
    "layers.1.up.weight": torch.tensor([[1.5, 1.0], [1.0, 2.0]], dtype=torch.bfloat16),
    "norm.bias": torch.tensor([1.5, -1.0]),
    "steps": torch.tensor(9),
    "head.weight": torch.tensor([[7.0]]),
}


def write(folder: Path) -> tuple[str, str]:
    save_file(BASE, folder / "base.safetensors")
    save_file(TRAINED, folder / "trained.safetensors")
    return str(folder / "base.safetensors"), str(folder / "trained.safetensors")


def test_a_quarter_of_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["walk-back", *write(tmp_path), "--alpha", "0.25", "--out", str(tmp_path / "new.safetensors")]) == 0
    assert_same_tensors(load_file(tmp_path / "new.safetensors"), QUARTER)
    assert "3 tensors at alpha=0.25 written to" in capsys.readouterr().out


def test_what_is_excluded_stays_as_trained_in_whatever_shape(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, trained = write(tmp_path)
    save_file({**BASE, "head.weight": torch.zeros(3, 1)}, base)
    out = ["--alpha", "0.25", "--out", str(tmp_path / "new.safetensors")]
    assert main(["walk-back", base, trained, *out]) == 1
    assert "head.weight is (3, 1) in" in capsys.readouterr().err
    assert main(["walk-back", base, trained, *out, "--exclude", "head.*", "--exclude", "norm.*"]) == 0
    expected = {**QUARTER, "norm.bias": TRAINED["norm.bias"]}
    assert_same_tensors(load_file(tmp_path / "new.safetensors"), expected)
    assert main(["walk-back", base, trained, *out, "--exclude", "neck.*"]) == 1
    assert "exclude: the pattern 'neck.*' matches no parameter" in capsys.readouterr().err


@pytest.mark.parametrize("alpha", [0, 1])
def test_both_ends_are_exact(tmp_path: Path, alpha: int) -> None:
    main(["walk-back", *write(tmp_path), "--alpha", str(alpha), "--out", str(tmp_path / "new.safetensors")])
    expected = TRAINED if alpha else {**TRAINED, **{name: BASE[name] for name in BASE if name != "steps"}}
    assert_same_tensors(load_file(tmp_path / "new.safetensors"), expected)


def test_a_lightning_checkpoint_keeps_all_else(tmp_path: Path) -> None:
    module = TinyNet()
    torch.save(module.state_dict(), tmp_path / "base.pt")
    trainer = fit(tmp_path, module)
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    command = ["walk-back", str(tmp_path / "base.pt"), str(tmp_path / "trained.ckpt"), "--alpha", "0.5"]
    assert main([*command, "--out", str(tmp_path / "new.ckpt")]) == 0
    new, trained = (torch.load(tmp_path / name, weights_only=True) for name in ("new.ckpt", "trained.ckpt"))
    base = torch.load(tmp_path / "base.pt", weights_only=True)
    assert new.keys() == trained.keys()
    assert new["optimizer_states"][0]["state"].keys() == trained["optimizer_states"][0]["state"].keys()
    for name, tensor in new["state_dict"].items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, (base[name] + trained["state_dict"][name]) / 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.pt", "new.ckpt", "trained.ckpt"]


def test_sharded_folder_becomes_a_folder_with_one_file(tmp_path: Path) -> None:
    for name, tensors in (("base", BASE), ("trained", TRAINED)):
        folder = tmp_path / name
        folder.mkdir()
        shards = {}
        for number, (key, tensor) in enumerate(tensors.items()):
            save_file({key: tensor}, folder / f"model-{number}.safetensors")
            shards[key] = f"model-{number}.safetensors"
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
        (folder / "tokenizer.json").write_text("{}")
    out = tmp_path / "new"
    assert (
        main(["walk-back", str(tmp_path / "base"), str(tmp_path / "trained"), "--alpha", "0.25", "--out", str(out)])
        == 0
    )
    assert_same_tensors(load_file(out / "model.safetensors"), QUARTER)
    assert sorted(path.name for path in out.iterdir()) == ["model.safetensors", "tokenizer.json"]


def test_an_adapter_is_scaled(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    a, b = torch.ones(2, 3), torch.full((3, 2), 4.0)
    save_file({"m.lora_A.weight": a, "m.lora_B.weight": b}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text("{}")
    out = tmp_path / "new"
    base = write(tmp_path)[0]
    assert main(["walk-back", base, str(adapter), "--alpha", "0.25", "--out", str(out)]) == 0
    new = load_file(out / "adapter_model.safetensors")
    assert torch.equal(new["m.lora_A.weight"], a)
    assert torch.equal(new["m.lora_B.weight"], b / 4)
    assert (out / "adapter_config.json").is_file()


class Pair(torch.nn.Module):
    def __init__(self, _: str) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            [torch.nn.ModuleDict({"up": torch.nn.Linear(2, 2, bias=False)}) for _ in "ab"]
        )
        self.norm = torch.nn.Linear(1, 2)

    def moved(self) -> Tensor:
        return (self.layers[0]["up"].weight - BASE["layers.0.up.weight"]).square().sum()


def old(_: str) -> dict[str, Probe]:
    return {"old": Probe([0, 0], Down(), lambda module, batch: 1 + module.moved())}


def new(_: str) -> Probe:
    return Probe([0], Down(), lambda module, batch: (module.layers[1]["up"].weight[1, 1] - 5).square(), name="gap")


def search(tmp_path: Path, *more: str) -> int:
    here = "test_walk_back_functions"
    sys.modules[here] = sys.modules[__name__]
    functions = ["--probe", f"{here}:old", "--monitor", f"{here}:new", "--model", f"{here}:Pair"]
    return main(["walk-back", *write(tmp_path), *functions, "--device", "cpu", "--points", "5", *more])


def test_a_search_takes_the_point_that_keeps_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # ‖α·Δ‖² = 32α²: retention is 1/3 at a quarter, 1/9 at a half.
    assert search(tmp_path, "--min-retention", "0.3", "--out", str(tmp_path / "new.safetensors")) == 0
    printed = capsys.readouterr().out
    assert "alpha=0.25: new 9, retention 0.3333" in printed
    assert "chosen, on the other half" in printed
    assert_same_tensors(load_file(tmp_path / "new.safetensors"), QUARTER)


def test_a_search_along_depth_keeps_the_layer_that_costs_nothing(tmp_path: Path) -> None:
    out = tmp_path / "new.safetensors"
    assert search(tmp_path, "--min-retention", "0.99", "--along", "depth", "--out", str(out)) == 0
    found = load_file(out)
    assert torch.equal(found["layers.0.up.weight"], BASE["layers.0.up.weight"])
    assert torch.equal(found["layers.1.up.weight"], TRAINED["layers.1.up.weight"])


def test_texts_of_a_language_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["old", "new", "text", "task", "a", "b"]
    model = tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="a")
    fast = tokenizers.Tokenizer(model)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    for name, seed in (("base", 0), ("trained", 1)):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=6, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="a").save_pretrained(tmp_path / name)
    (tmp_path / "wiki.txt").write_text("old text a b " * 40)
    (tmp_path / "task.txt").write_text("new task b a " * 40)
    command = ["walk-back", str(tmp_path / "base"), str(tmp_path / "trained"), "--device", "cpu", "--points", "3"]
    texts = ["--probe", str(tmp_path / "wiki.txt"), "--monitor", str(tmp_path / "task.txt")]
    assert main([*command, *texts, "--min-retention", "0.01", "--out", str(tmp_path / "new")]) == 0
    assert "wiki" in capsys.readouterr().out
    assert LlamaForCausalLM.from_pretrained(tmp_path / "new") is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --alpha, or a --probe and a --monitor"),
        (["--alpha", "0.5"], "--alpha without --out would do nothing"),
        (["--alpha", "0.5", "--out", "nowhere/new.safetensors"], "there is no folder nowhere"),
        (["--alpha", "0.5", "--out", "new.ckpt"], "must end in .safetensors"),
        (["--alpha", "0.5", "--out", "x.safetensors", "--probe", "a:b"], "would have no say"),
        (["--probe", "nothing.txt", "--monitor", "x:y", "--min-retention", "0.5"], "is no folder that transformers"),
    ],
)
def test_wrong_usage_is_said_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["walk-back", *write(tmp_path), *arguments]) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_checkpoints_of_different_models_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, trained = write(tmp_path)
    out = ["--alpha", "0.5", "--out", str(tmp_path / "new.safetensors")]
    save_file({**TRAINED, "norm.bias": torch.zeros(3)}, trained)
    assert main(["walk-back", base, trained, *out]) == 1
    assert "norm.bias is (2,) in" in capsys.readouterr().err
    save_file({"other": torch.zeros(3)}, trained)
    assert main(["walk-back", base, trained, *out]) == 1
    assert "lacks layers.0.up.weight" in capsys.readouterr().err
    assert not (tmp_path / "new.safetensors").exists()


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    walk = CheckpointWalk(*write(tmp_path))
    seen: list[weakref.ref[Tensor]] = []
    for _, tensor in walk.tensors(0.5):
        assert [reference for reference in seen if reference() is not None] == []
        seen.append(weakref.ref(tensor))
        del tensor
    assert len(seen) == len(TRAINED)
