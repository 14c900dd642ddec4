"""The command line that runs every method and prints the table."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from kappa_lightning import Probe
from recipes.captioning.data import SCENES, CaptionData
from recipes.captioning.probes import CaptionPerplexity, OldVision
from recipes.shared.arguments import DefaultsHelpFormatter, add_arguments, check, settings_from
from recipes.shared.comparison import Result, run, show
from recipes.shared.epochs import keep_bars_out_of_logs, save_picture
from recipes.shared.probes import TextAgreement, TextPerplexity, WorldAccuracy, WorldAgreement
from recipes.shared.shapes import DESCRIBE
from recipes.shared.small_models import SMALL_LLAVA
from recipes.shared.tensorboard import tensorboard


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.captioning",
        description="Teach a generative vision-language model to describe new pictures, with full fine-tuning, "
        "KappaTune, LoRA, and LoRA on the low-κ matrices only, and compare what each forgets. Without options it "
        "needs no download: a small LLaVA is pretrained first and kept on disk. For one run from a YAML use the "
        "subcommand fit of LightningCLI: python -m recipes.captioning fit --help",
        formatter_class=DefaultsHelpFormatter,
    )
    parser.add_argument("--model", default=SMALL_LLAVA, help="hub id or folder")
    parser.add_argument(
        "--data", default=SCENES, help="drawn scenes, a folder with a captions.jsonl, or a hub data set"
    )
    parser.add_argument("--prompt", default=DESCRIBE, help="what the model is asked about each picture")
    parser.add_argument("--test-size", type=int, default=200, help="pictures that are held out")
    parser.add_argument("--image-column", default="image", help="of a hub data set")
    parser.add_argument("--caption-column", default="caption", help="of a hub data set")
    parser.add_argument("--split", default="train", help="of a hub data set")
    parser.add_argument("--subset", default=None, help="of a hub data set that has several")
    parser.add_argument("--max-edge", type=int, default=None, help="shrink longer images to this, in pixels")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that read images")
    parser.add_argument(
        "--old-data", default=None, help="pictures with captions, as --data, whose perplexity is to be kept"
    )
    parser.add_argument("--old-prompt", default=None, help="what the model is asked about these (default: --prompt)")
    add_arguments(parser, log_dir=Path("runs/captioning"))
    args = parser.parse_args(argv)
    check(parser, args)
    if args.old_data is not None and args.model == SMALL_LLAVA:
        parser.error(f"--old-data: {SMALL_LLAVA} has old pictures of its own; name another --model")
    return args


def compare(argv: Sequence[str]) -> list[Result]:
    """Run every method, print the table and how to look at the runs."""
    args = parse(argv)
    keep_bars_out_of_logs()
    console = Console()
    probes, notes = small_probes() if args.model == SMALL_LLAVA else hub_probes(args)
    settings = settings_from(args, images=True)
    results = []
    for method in args.method:
        console.rule(method)
        data = CaptionData(
            args.model,
            data=args.data,
            prompt=args.prompt,
            batch_size=settings.batch_size,
            test_size=args.test_size,
            seed=args.seed,
            image_column=args.image_column,
            caption_column=args.caption_column,
            split=args.split,
            subset=args.subset,
            max_edge=args.max_edge,
            num_workers=args.num_workers,
        )
        results.append(run(method, settings, data, probes))
    show(results, notes, "New pictures described, and what is left of what the model knew", console)
    picture = args.log_dir / "learned-and-kept.png"
    save_picture(
        {r.method: r.points for r in results}, "New pictures described", "held-out answers right to the letter", picture
    )
    console.print(f"What was learned and kept:   {picture}", highlight=False)
    console.print(f"Captions, curves, rankings:  {tensorboard()} --logdir {args.log_dir}", highlight=False)
    return results


def small_probes() -> tuple[Callable[[], Mapping[str, Probe]], dict[str, str]]:
    """What the small LLaVA knew: the facts of its text world, and the names of single groups of shapes."""

    def probes() -> dict[str, Probe]:
        return {"world": WorldAccuracy(SMALL_LLAVA), "vision": OldVision(), "agreement": WorldAgreement(SMALL_LLAVA)}

    return probes, {"world": "facts", "vision": "old\nvision", "agreement": "agree-\nment"}


def hub_probes(args: argparse.Namespace) -> tuple[Callable[[], Mapping[str, Probe]], dict[str, str]]:
    """What any model knew: its perplexity and its distributions on text without images, and its old pictures."""
    model, text, old = args.model, args.text, args.old_data

    def probes() -> dict[str, Probe]:
        known: dict[str, Probe] = {"text": TextPerplexity(model, text), "agreement": TextAgreement(model, text)}
        if old is not None:
            known["vision"] = CaptionPerplexity(model, old, args.old_prompt or args.prompt, max_edge=args.max_edge)
        return known

    vision = {} if old is None else {"vision": "old\nvision"}
    return probes, {"text": "text", **vision, "agreement": "agree-\nment"}
