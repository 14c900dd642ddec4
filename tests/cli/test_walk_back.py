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


def nothing(_: str) -> int:
    return 3


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
    # 0.3 are kept at 0.27; halved are 0.5, 0.375 and 0.3125.
    assert [line.split(":")[0] for line in printed.splitlines() if line.startswith("alpha=")] == [
        f"alpha={alpha}" for alpha in ("0", "0.25", "0.5", "0.75", "1", "0.375", "0.3125", "0.28125")
    ]


def test_a_search_along_depth_keeps_the_layer_that_costs_nothing(tmp_path: Path) -> None:
    out = tmp_path / "new.safetensors"
    limits = ("--min-retention", "0.99", "--along", "depth", "--bisections", "0")
    assert search(tmp_path, *limits, "--out", str(out)) == 0
    found = load_file(out)
    assert torch.equal(found["layers.0.up.weight"], BASE["layers.0.up.weight"])
    assert torch.equal(found["layers.1.up.weight"], TRAINED["layers.1.up.weight"])


def language_models(tmp_path: Path) -> list[str]:
    """Two folders of a model, and what is to be kept and the new task as texts."""
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
    return ["--probe", str(tmp_path / "wiki.txt"), "--monitor", str(tmp_path / "task.txt")]


def test_texts_of_a_language_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaForCausalLM

    texts = language_models(tmp_path)
    command = ["walk-back", str(tmp_path / "base"), str(tmp_path / "trained"), "--device", "cpu", "--points", "3"]
    assert main([*command, *texts, "--min-retention", "0.01", "--out", str(tmp_path / "new")]) == 0
    assert "wiki" in capsys.readouterr().out
    assert LlamaForCausalLM.from_pretrained(tmp_path / "new") is not None


def test_names_that_differ_by_a_prefix_are_matched(tmp_path: Path) -> None:
    """A LightningModule holds the base as one of its attributes, so its checkpoint has longer names."""
    base, _ = write(tmp_path)
    longer = {f"model.{name}": tensor for name, tensor in TRAINED.items()}
    torch.save({"state_dict": longer, "epoch": 2}, tmp_path / "trained.ckpt")
    out = tmp_path / "new.ckpt"
    assert main(["walk-back", base, str(tmp_path / "trained.ckpt"), "--alpha", "0.25", "--out", str(out)]) == 0
    found = torch.load(out, weights_only=True)
    assert_same_tensors(found["state_dict"], {f"model.{name}": tensor for name, tensor in QUARTER.items()})
    torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in BASE.items()}}, tmp_path / "base.ckpt")
    out, (_, trained) = tmp_path / "new.safetensors", write(tmp_path)
    assert main(["walk-back", str(tmp_path / "base.ckpt"), trained, "--alpha", "0.25", "--out", str(out)]) == 0
    assert_same_tensors(load_file(out), QUARTER)


@pytest.mark.parametrize("place", ["trained.safetensors", "base.safetensors", "other.safetensors"])
def test_a_file_that_is_there_stays_and_is_named_before_the_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    write(tmp_path)
    out = tmp_path / place
    if not out.exists():
        out.write_bytes(b"mine")
    before = out.read_bytes()
    assert search(tmp_path, "--min-retention", "0.3", "--out", str(out)) == 1
    printed = capsys.readouterr()
    assert "is there already: name a new file" in printed.err
    assert "retention" not in printed.out
    assert out.read_bytes() == before


def test_what_stays_as_trained_is_put_into_the_model(tmp_path: Path) -> None:
    class Headed(Pair):
        def __init__(self, _: str) -> None:
            super().__init__(_)
            self.head = torch.nn.Linear(1, 1, bias=False)

    model = Headed("")
    walk = CheckpointWalk(*write(tmp_path))
    walk.load_into(model, 0.0)
    assert torch.equal(model.head.weight, TRAINED["head.weight"])
    assert torch.equal(model.norm.bias, BASE["norm.bias"])


def test_an_adapter_in_a_folder_is_searched_as_it_was_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    texts = language_models(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    command = ["walk-back", str(tmp_path / "base"), str(tmp_path / "adapter"), "--device", "cpu", "--points", "2"]
    # The text needs a tokenizer, which lies with the base alone.
    assert main([*command, *texts, "--min-retention", "0.01", "--along", "role"]) == 0
    printed = capsys.readouterr().out
    assert "alpha=1:" in printed
    assert "lora_A" not in printed
    walk = CheckpointWalk(tmp_path / "base", tmp_path / "adapter", "role")
    assert walk.groups == ("base_model.model.model.layers.*.self_attn.q_proj.lora_B.default.weight",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--probe", "{here}:old", "--probe", "{here}:old"], "there is a probe 'old' already"),
        (["--probe", "{here}:nothing"], "nothing returned a int as nothing: return a kappa_lightning.Probe"),
        (["--probe", "{here}:old", "--monitor", "{here}:nothing"], "--monitor {here}:nothing returned a int"),
        (["--probe", "{here}:old", "--model", "{here}:nothing"], "--model {here}:nothing returned a int"),
        (["--probe", "{here}:old", "--model", "Pair"], "--model Pair is no package.module:function"),
        (["--probe", "no_such_module:old"], "--probe no_such_module:old: No module named"),
        (["--probe", "text.txt"], "neither"),
        (["--probe", "{here}:old", "--windows", "1"], "--windows 1 is too small"),
        (["--probe", "{here}:old", "--points", "1"], "--points 1 is too small"),
        (["--probe", "{here}:old", "--bisections", "-1"], "--bisections -1 must not be negative"),
        (["--probe", "{here}:old", "--min-retention", "2"], "--min-retention 2.0 must be in"),
        (["--probe", "{here}:old", "--min-retention", ""], "give --min-retention or --monitor-limit"),
    ],
)
def test_a_search_that_cannot_be_names_its_argument(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    here = "test_walk_back_functions"
    sys.modules[here] = sys.modules[__name__]
    (tmp_path / "text.txt").write_text("a text")
    given = [each.format(here=here).replace("text.txt", str(tmp_path / "text.txt")) for each in arguments]
    if given[-2:] == ["--min-retention", ""]:
        given = given[:-2]
    elif "--min-retention" not in given:
        given += ["--min-retention", "0.5"]
    defaults = {"--monitor": f"{here}:new", "--model": f"{here}:Pair"}
    given += [each for flag, value in defaults.items() if flag not in given for each in (flag, value)]
    assert main(["walk-back", *write(tmp_path), "--device", "cpu", *given]) == 1
    printed = capsys.readouterr().err
    assert message.format(here=here) in printed
    assert printed.count("\n") == 1


def test_a_factor_that_is_no_number_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["walk-back", *write(tmp_path), "--alpha", "half", "--out", str(tmp_path / "new.safetensors")])
    assert "'half' is no number in [0, 1]" in capsys.readouterr().err


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
