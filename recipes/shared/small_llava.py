"""A LLaVA of a few million parameters, of transformers' own classes, with a tokenizer and a processor."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    SiglipVisionConfig,
)
from transformers.utils.import_utils import is_torchvision_available

from recipes.shared.encoding import Encoder, Sample
from recipes.shared.pretraining import Schooling, cached, school, settings_of
from recipes.shared.shapes import (
    COLOURS,
    CORNER,
    COUNTS,
    NAME,
    SHAPES,
    SIZE,
    random_clutter,
    random_scene,
    random_single,
    words,
)
from recipes.shared.small_llama import language_config
from recipes.shared.world import facts, word_tokenizer

IMAGE = "<image>"
PATCH = CORNER
"""The vision tower makes one token of each corner."""

VISION_WIDTH = 128

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %} ? "
    "{% else %}answer : {{ message['content'][0]['text'] }}</s>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}answer :{% endif %}"
)


READING = Schooling(steps=250, facts=80, samples=0, lr=3e-3)
EYE_STEPS = 150
EYE_BATCH = 32
SEEING = Schooling(steps=180, facts=32, samples=32, lr=2.5e-3)


def small_llava(
    cache: Path, reading: Schooling = READING, eye_steps: int = EYE_STEPS, seeing: Schooling = SEEING
) -> Path:
    """The folder of the pretrained small LLaVA; it is trained the first time, for a minute or so.

    Its language model learns the facts of the text world; then its vision tower and projector learn to show the
    language model the words for each corner of a picture; then the whole learns to name one or two groups of shapes,
    while it goes on reading.

    Args:
        cache: where it is kept.
        reading: how the language model learns.
        eye_steps: steps in which the vision tower and the projector learn.
        seeing: how the whole learns.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(reading.seed)
        processor = build_processor()
        model = build_model(processor.tokenizer)

        def build() -> tuple[nn.Module, Any]:
            school(model, processor.tokenizer, facts(), reading)
            open_eyes(model.model, processor, eye_steps, reading.seed)
            school(model, processor.tokenizer, facts(), seeing, Encoder(processor), draw_question)
            return model, processor

        config = {"config": model.config.to_diff_dict(), "words": words(), "template": TEMPLATE}
        settings = settings_of([reading, seeing], facts(), {**config, "eye_steps": eye_steps})
        return cached(cache, "small-llava", settings, build)


def open_eyes(
    model: nn.Module, processor: Any, steps: int, seed: int, choices: Sequence[Sequence[int]] | None = None
) -> None:
    """Teach vision tower and projector to show the language model the words for each corner of a picture.

    Each projected patch is read as the language model reads its own last layer, by its norm and its word embeddings:
    for a corner with shapes the likeliest colour, form and count must be the right words, and the end token for an
    empty one.

    Args:
        model: with ``vision_tower``, ``multi_modal_projector`` and ``language_model``, which stays as it is.
        processor: its image processor and its tokenizer are used.
        steps: how long.
        seed: of the pictures.
        choices: the tokens for an empty corner and each colour, for one and each form, and for one and each count; by
            default those of the processor's tokenizer.
    """
    rng = random.Random(seed)
    if choices is None:
        vocabulary, end = processor.tokenizer.get_vocab(), processor.tokenizer.eos_token_id
        choices = [[end, *(vocabulary[word] for word in part)] for part in (COLOURS, SHAPES, COUNTS)]
    vision: Any = model.vision_tower
    projector: Any = model.multi_modal_projector
    language: Any = model.language_model
    optimizer = torch.optim.AdamW([*vision.parameters(), *projector.parameters()], lr=2e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1, pct_start=0.1)
    for _ in tqdm(range(steps), desc="Pretraining its eyes", unit="step", dynamic_ncols=True, disable=None):
        clutter = [random_clutter(rng) for _ in range(EYE_BATCH)]
        pictures = processor.image_processor([one.draw(rng) for one in clutter], return_tensors="pt")
        shown = projector(vision(pictures["pixel_values"]).last_hidden_state).flatten(0, 1)
        logits = language.norm(shown) @ language.embed_tokens.weight.T
        labels = torch.tensor([one.labels for one in clutter]).flatten(0, 1)
        losses = [functional.cross_entropy(logits[:, ids], labels[:, part]) for part, ids in enumerate(choices)]
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
        model.zero_grad()


def draw_question(rng: random.Random) -> Sample:
    """A picture of one or two groups, to be named without their corners: the old vision task.

    Of two groups, the combination is never one that is kept for the test of the captions.
    """
    picture = random_single(rng) if rng.random() < 0.4 else random_scene(rng, unseen=False)
    return Sample(NAME, picture.names, picture.draw(rng))


def build_processor() -> LlavaProcessor:
    """Tokenizer, image processor and chat template in one."""
    texts = [*(f"{fact.prompt} {fact.answer}" for fact in facts()), *words(), "answer : ?"]
    # Without torchvision transformers has the same processor under another name.
    name = "SiglipImageProcessor" if is_torchvision_available() else "SiglipImageProcessorPil"
    # White becomes 0, so that empty parts say nothing.
    images = getattr(transformers, name)(
        size={"height": SIZE, "width": SIZE}, image_mean=[1.0] * 3, image_std=[0.25] * 3
    )
    return LlavaProcessor(  # type: ignore[no-untyped-call]
        image_processor=images,
        tokenizer=word_tokenizer(texts, special=[IMAGE]),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerBase) -> LlavaForConditionalGeneration:
    """The model with random weights, drawn from torch's generator."""
    vision = SiglipVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=language_config(tokenizer),
        image_token_index=tokenizer.get_vocab()[IMAGE],
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_seq_length=(SIZE // PATCH) ** 2,
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)
