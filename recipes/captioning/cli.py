"""One run from a YAML, by LightningCLI."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from recipes.captioning.data import CaptionData
from recipes.shared.module import GenerativeModule

SUBCOMMANDS = ("fit", "validate", "test", "predict")


class CaptioningCLI(LightningCLI):
    """LightningCLI that gives the data the processor of the model."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The model is named once."""
        parser.link_arguments("model.model", "data.model")


def lightning_cli(arguments: Sequence[str]) -> LightningCLI:
    """Run a subcommand of LightningCLI; the three callbacks are configured in the YAML."""
    return CaptioningCLI(
        GenerativeModule,
        CaptionData,
        args=list(arguments),
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
    )
