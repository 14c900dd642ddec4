"""A LLaVA of a few million parameters, of transformers' own classes, with a tokenizer and a processor."""

from __future__ import annotations

import random
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

from recipes.captioning.scenes import CELL, COLOURS, COUNTS, PLURALS, SIZE, random_clutter, random_question, words
from recipes.generative.encoding import Encoder, Sample
from recipes.generative.pretraining import Schooling, cached, school, settings_of
from recipes.generative.small_llama import language_config
from recipes.generative.world import facts, word_tokenizer

IMAGE = "<image>"
PATCH = CELL
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


EYE_STEPS = 250
EYE_BATCH = 32
SCHOOLING = Schooling(steps=450, facts=80, samples=24, lr=3e-3)


def small_llava(cache: Path, schooling: Schooling = SCHOOLING, eye_steps: int = EYE_STEPS) -> Path:
    """The folder of the pretrained small LLaVA; it is trained the first time, for a minute or two.

    Its vision tower first learns to tell what each part of a picture shows. Then the whole learns the facts of the
    text world, and to answer questions about pictures with a single group of shapes.

    Args:
        cache: where it is kept.
        schooling: how long and how fast it learns.
        eye_steps: steps in which the vision tower learns alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(schooling.seed)
        processor = build_processor()
        model = build_model(processor.tokenizer)

        def build() -> tuple[nn.Module, Any]:
            open_eyes(model.model.vision_tower, processor, eye_steps, schooling.seed)
            school(model, processor.tokenizer, facts(), schooling, Encoder(processor), draw_question)
            return model, processor

        config = {"config": model.config.to_diff_dict(), "eye_steps": eye_steps, "words": words(), "template": TEMPLATE}
        return cached(cache, "small-llava", settings_of(schooling, facts(), config), build)


def open_eyes(vision_tower: nn.Module, processor: Any, steps: int, seed: int) -> None:
    """Teach a vision tower to tell what is in the corner of each patch, by linear layers that are thrown away."""
    rng = random.Random(seed)
    heads = nn.ModuleList(nn.Linear(VISION_WIDTH, 1 + len(names)) for names in (COLOURS, PLURALS, COUNTS))
    optimizer = torch.optim.AdamW([*vision_tower.parameters(), *heads.parameters()], lr=2e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1, pct_start=0.1)
    vision_tower.train()
    for _ in tqdm(range(steps), desc="Pretraining its eyes", unit="step", dynamic_ncols=True):
        clutter = [random_clutter(rng) for _ in range(EYE_BATCH)]
        pictures = processor.image_processor([one.draw(rng) for one in clutter], return_tensors="pt")
        seen = vision_tower(pictures["pixel_values"]).last_hidden_state.flatten(0, 1)
        labels = torch.tensor([one.labels for one in clutter]).flatten(0, 1)
        losses = [functional.cross_entropy(head(seen), labels[:, part]) for part, head in enumerate(heads)]
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def draw_question(rng: random.Random) -> Sample:
    """A question about a picture of one group: the old vision task."""
    question = random_question(rng)
    return Sample(question.text, question.answer, question.picture.draw(rng))


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
