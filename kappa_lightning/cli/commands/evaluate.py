"""``kappa-lightning evaluate``: what a trained language model has kept of its base."""

from __future__ import annotations

import importlib.util
import json
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from kappa_lightning.cli.arguments import add_device, add_output, device_of, require_writable
from kappa_lightning.cli.command import Command
from kappa_lightning.cli.terminal import print_table, printable
from kappa_lightning.files import write_text

# Narrower, the headings would be folded into letters.
_LEAST_WIDTH = 70
_KINDS = ("perplexity", "lm_eval", "python")


def _probe(text: str) -> tuple[str, str, str]:
    name, equals, spec = text.partition("=")
    kind, colon, what = spec.partition(":")
    if not (equals and colon and name and what) or kind not in _KINDS:
        raise ArgumentTypeError(
            f"{text!r} is no probe: write NAME=perplexity:FILE.txt, NAME=lm_eval:TASK[,TASK] or NAME=python:FILE.py"
        )
    return name, kind, what


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="folder (or hub id in the cache) of the model before")
    parser.add_argument(
        "trained",
        metavar="TRAINED",
        help="folder of the model after, folder of a PEFT adapter, a Lightning .ckpt, or a "
        "file of TrainedOnlyCheckpoint",
    )
    parser.add_argument(
        "--probe", action="append", type=_probe, required=True, metavar="NAME=KIND:WHAT",
        help="may be given several times: perplexity:FILE.txt, lm_eval:TASK[,TASK], or python:FILE.py, whose function "
        "probe(tokenizer) returns a Probe",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, metavar="N", help="blocks of text or documents of a task (default: all)")
    parser.add_argument("--tokens", type=int, default=256, metavar="N", help="tokens of a block of text (default: 256)")
    parser.add_argument("--tasks", metavar="FOLDER", help="of task files for lm_eval")
    add_device(parser)
    add_output(parser, "--out", "write the figures to a JSON file")


def _run(args: Namespace) -> int:
    from transformers import AutoTokenizer

    from kappa_lightning.evaluation import Circumstances, measure_probe, retention, retention_interval

    require_writable(args.out)
    names = [name for name, _, _ in args.probe]
    if len(set(names)) < len(names):
        raise ValueError(f"--probe: two probes have one name among {', '.join(names)}")
    tokenizer = AutoTokenizer.from_pretrained(args.base, local_files_only=True)
    probes = {name: _make(kind, what, tokenizer, args) for name, kind, what in args.probe}
    device = device_of(args)
    measured = []
    for trained in (False, True):
        # One after the other: never two models in memory.
        model = _load(args.base, args.trained if trained else None).to(device).eval()
        for probe in () if trained else probes.values():
            probe.begin_baseline()
        measured.append({name: measure_probe(model, probe, Circumstances(), name) for name, probe in probes.items()})
        del model
    table = Table("probe", "metric", "before", "after", "retention", "95 % interval")
    figures: dict[str, Any] = {}
    for name, probe in probes.items():
        before, now = measured[0][name], measured[1][name]
        left = retention(before.value, now.value, probe.higher_is_better)
        pairs = (before.items, now.items)
        interval = None
        if pairs[0] is not None and pairs[1] is not None:
            interval = retention_interval(probe.metric, pairs[0], pairs[1])
        shown = "–" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
        row = (name, probe.name, f"{before.value:.4g}", f"{now.value:.4g}", f"{left:.4f}", shown)
        table.add_row(*map(printable, row))
        figures[name] = {"metric": probe.name, "before": before.value, "after": now.value, "retention": left}
        if interval is not None:
            figures[name] |= {"retention_low": interval[0], "retention_high": interval[1]}
    print_table(table, least_width=_LEAST_WIDTH)
    if args.out is not None:
        write_text(args.out, json.dumps(figures, indent=2) + "\n")
    return 0


def _make(kind: str, what: str, tokenizer: Any, args: Namespace) -> Any:
    from kappa_lightning.probes import LMEvalProbe, PerplexityProbe, Probe

    if kind == "lm_eval":
        return LMEvalProbe(what.split(","), tokenizer=tokenizer, limit=args.limit, include_path=args.tasks)
    if kind == "perplexity":
        ids = tokenizer(Path(what).read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
        blocks = list(ids.split(args.tokens))
        blocks = [block for block in blocks if len(block) > 1][: args.limit]
        if not blocks:
            raise ValueError(f"{what} has fewer than two tokens: there is nothing to predict")
        return PerplexityProbe([{"input_ids": block[None]} for block in blocks])
    spec = importlib.util.spec_from_file_location("kappa_lightning_probe", what)
    if spec is None or spec.loader is None or not Path(what).is_file():
        raise FileNotFoundError(f"{what} is no Python file")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    make = getattr(found, "probe", None)
    if not callable(make):
        raise ValueError(f"{what} has no function probe(tokenizer)")
    made = make(tokenizer)
    if not isinstance(made, Probe):
        raise TypeError(f"probe(tokenizer) of {what} returned a {type(made).__name__}, not a Probe")
    return made


def _load(base: str, trained: str | None) -> Any:
    from transformers import AutoModelForCausalLM

    path = Path(trained) if trained is not None else None
    if path is None or (path.is_dir() and not (path / "adapter_config.json").is_file()):
        return AutoModelForCausalLM.from_pretrained(trained or base, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(base, local_files_only=True)
    if path.is_dir():
        from peft import PeftModel

        return PeftModel.from_pretrained(model, path)
    return _with_state(model, path)


def _with_state(model: Any, path: Path) -> Any:
    import torch

    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    if path.suffix == ".safetensors":
        from kappa_lightning.callbacks import load_trained

        load_trained(model, path)
        return model
    state: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    state = state.get("state_dict", state)
    wanted = model.state_dict()
    for prefix in ("", *sorted({key.partition(".")[0] + "." for key in state})):
        renamed = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        tied = {key for key in wanted if key not in renamed}
        if len(tied) < len(wanted) / 2:
            missing = model.load_state_dict(renamed, strict=False).missing_keys
            untied = [key for key in missing if key not in (getattr(model, "_tied_weights_keys", None) or ())]
            if untied:
                raise ValueError(f"{path} lacks {untied[0]} of the base model: is it a checkpoint of this model?")
            model.tie_weights()
            return model
    raise ValueError(f"{path} has none of the base model's tensors, such as {next(iter(wanted))}")


COMMAND = Command(
    summary="compare what a language model could do before and after training",
    description="Measure probes on a language model and on what was trained from it, one after the other, and print "
    "what is left of each, with a 95 % interval over the samples.",
    example="kappa-lightning evaluate ./base ./run/last.ckpt --probe text=perplexity:old.txt",
    add_arguments=_add_arguments,
    run=_run,
)
