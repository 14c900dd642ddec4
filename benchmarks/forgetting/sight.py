"""SmolLM2-135M learns to see: a small vision tower in front of it, and pictures to describe; what it knew is text.

It is a ``LlavaForConditionalGeneration`` whose text tower holds SmolLM2's weights. Its vision tower and its projector
have learned to show SmolLM2 the words for each corner of a picture, on SmolLM2 as it was; the tower is frozen from then
on. The new task are descriptions of drawn shapes. Kept is, without a picture, the agreement exp(−KL) with the
pretrained model on WikiText-2 (``--option text=…/test.txt``) and on text of its own, and the share of pairs of
sentences of which it gives the grammatical one the higher probability.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.forgetting.grammar import grammar
from benchmarks.forgetting.language import WINDOW, WINDOWS, given_path
from benchmarks.forgetting.state import save_state
from kappa_lightning import AgreementProbe, Probe
from recipes.shared.shapes import COLOURS, CORNERS, SHAPES, SIZE, Picture, random_scene
from recipes.shared.small_llava import PATCH, VISION_WIDTH, build_processor, open_eyes
from recipes.shared.smollm2 import packaged_smollm2
from recipes.word_problems import Encoded, Solver, own_text, pad, text_windows

IMAGE = "<reponame>"
"""A token of SmolLM2's that no text uses; it stands for a patch of the picture."""

PATCHES = (SIZE // PATCH) ** 2
QUESTION = "Describe the picture."
COUNTS = ("one", "two", "three")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
EYE_STEPS, EYE_SEED = 200, 4242
LAYERS = 3


def describe(picture: Picture) -> str:
    """What a picture shows, in English.

    Example:
        >>> from recipes.shared.shapes import Group
        >>> describe(Picture((None, Group(2, "red", "cross"), Group(1, "blue", "circle"), None)))
        'two red crosses at the top right, one blue circle at the bottom left'
    """
    groups = [(place, group) for place, group in zip(CORNERS, picture.corners, strict=True) if group]
    return ", ".join(
        f"{COUNTS[group.count - 1]} {group.colour} {group.shape if group.count == 1 else PLURALS[group.shape]} "
        f"at the {place}"
        for place, group in groups
    )


class Seer(Solver):
    """SmolLM2 behind a vision tower and a projector; trained on the tokens of descriptions.

    Args:
        folder: of SmolLM2.
        eyes: the weights of the vision tower and the projector, which are learned and written there the first time.
        lr: learning rate of AdamW.
    """

    def __init__(self, folder: Path, eyes: Path, lr: float) -> None:
        super().__init__(folder, lr)
        from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

        text, tokenizer = self.model, tokenizer_of(folder)
        vision = SiglipVisionConfig(
            hidden_size=VISION_WIDTH, intermediate_size=384, num_hidden_layers=LAYERS, num_attention_heads=4,
            image_size=SIZE, patch_size=PATCH, vision_use_head=False,
        )  # fmt: skip
        config = LlavaConfig(
            vision_config=vision, text_config=text.config, image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
            vision_feature_select_strategy="full", vision_feature_layer=-1, image_seq_length=PATCHES,
            tie_word_embeddings=True,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(EYE_SEED)
            model: Any = LlavaForConditionalGeneration(config)
        model.model.language_model.load_state_dict(text.model.state_dict())
        model.tie_weights()
        seen = {"vision_tower.": model.model.vision_tower, "multi_modal_projector.": model.model.multi_modal_projector}
        if not eyes.is_file():
            model.requires_grad_(False)
            for part in seen.values():
                part.requires_grad_(True)
            with torch.random.fork_rng(devices=[]):
                open_eyes(model.model, build_processor(), EYE_STEPS, EYE_SEED, corner_tokens(tokenizer))
            save_state({k + name: v for k, part in seen.items() for name, v in part.state_dict().items()}, eyes)
        learned = torch.load(eyes, weights_only=True)
        for prefix, part in seen.items():
            part.load_state_dict({k.removeprefix(prefix): v for k, v in learned.items() if k.startswith(prefix)})
        model.requires_grad_(True)
        model.model.vision_tower.requires_grad_(False)
        self.model = model.train()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, pixel_values: Tensor | None = None
    ) -> Tensor:
        """Logits of shape (batch, tokens, vocabulary), with a picture or without."""
        hidden = self.model.model(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values)
        return self._scores(hidden.last_hidden_state)


class Pictures(pl.LightningDataModule):
    """Drawn pictures with their descriptions, others of combinations that are kept for validation.

    Args:
        tokenizer: SmolLM2's.
        learned: pictures to learn from.
        held_out: pictures to validate on.
        batch_size: of both.
        seed: of the pictures.
    """

    def __init__(self, tokenizer: Any, learned: int, held_out: int, batch_size: int, seed: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.learned = _drawn(tokenizer, learned, random.Random(f"{seed} learned"), unseen=False)
        # What is validated on is the same for all seeds.
        self.held_out = _drawn(tokenizer, held_out, random.Random("held out"), unseen=True)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches."""
        return DataLoader(self.learned, self.batch_size, shuffle=True, collate_fn=collate, drop_last=True)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        """The pictures that are held out, always in this order."""
        return DataLoader(self.held_out, self.batch_size, collate_fn=collate)  # type: ignore[arg-type]


class Sight:
    """The task. The vision tower is frozen, and the projector trains with every method.

    Args:
        text: a file in WikiText's format; by default the environment variable ``WIKITEXT``.
        learned: pictures to learn from.
        held_out: pictures to validate on.
        batch_size: of training.

    Raises:
        ValueError: if the path is not given.
    """

    pretrained = ("*language_model*",)
    new = ("*multi_modal_projector*",)

    def __init__(self, text: str = "", learned: str = "480", held_out: str = "32", batch_size: str = "8") -> None:
        self.text = given_path(text, "text", "WIKITEXT")
        self.counts = int(learned), int(held_out)
        self.batch_size = int(batch_size)

    def model(self, seed: int, lr: float, folder: Path) -> Seer:
        """SmolLM2 that can look; seeds do not change it."""
        self.folder = packaged_smollm2(folder)
        return Seer(self.folder, folder / "smollm2-eyes.pt", lr)

    def data(self, model: pl.LightningModule, seed: int) -> Pictures:
        """Drawn pictures; the seed decides which are learned from."""
        return Pictures(tokenizer_of(self.folder), *self.counts, self.batch_size, seed)

    def probes(self, model: pl.LightningModule, seed: int) -> dict[str, Probe]:
        """What it knew of text, the same for all seeds."""
        assert isinstance(model, Seer)
        tokenizer = tokenizer_of(self.folder)
        windows = text_windows(self.text, tokenizer, WINDOWS, WINDOW)
        own = own_text(model, tokenizer.bos_token_id, self.folder.parent / "smollm2-own-text.pt")
        return {
            "wikitext": AgreementProbe([{"input_ids": part} for part in torch.split(windows, 4)]),
            "own": AgreementProbe([{"input_ids": part} for part in torch.split(own, 4)]),
            "grammar": grammar(tokenizer),
        }


def tokenizer_of(folder: Path) -> Any:
    """SmolLM2's."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def corner_tokens(tokenizer: Any) -> list[list[int]]:
    """The tokens that the eyes learn to show: for nothing and each colour, form and count."""
    end = tokenizer.eos_token_id
    choices = []
    for words in (COLOURS, SHAPES, COUNTS):
        tokens = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
        choices.append([end, *(token for (token,) in tokens)])
    return choices


def collate(samples: Sequence[tuple[Encoded, Tensor]]) -> dict[str, Tensor]:
    """What :func:`~recipes.word_problems.pad` makes, and ``pixel_values`` of shape (batch, 3, height, width)."""
    return {**pad([text for text, _ in samples]), "pixel_values": torch.stack([picture for _, picture in samples])}


def _drawn(tokenizer: Any, count: int, rng: random.Random, *, unseen: bool) -> list[tuple[Encoded, Tensor]]:
    processor: Any = build_processor().image_processor
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    prompt = [
        start, *encode("user\n"), *[tokenizer.convert_tokens_to_ids(IMAGE)] * PATCHES, *encode(QUESTION), end,
        *encode("\n"), start, *encode("assistant\n"),
    ]  # fmt: skip
    samples = []
    for _ in range(count):
        picture = random_scene(rng, unseen=unseen)
        pixels = processor([picture.draw(rng)], return_tensors="pt")["pixel_values"][0]
        samples.append(((prompt, [*encode(describe(picture)), end]), torch.as_tensor(pixels)))
    return samples
