"""Tiny checkpoints of three families of vision-language models, saved like any model of the hub."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    GemmaConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.utils.import_utils import is_torchvision_available

from recipes.captioning.data import CaptionData

FAMILIES = ("llava", "idefics3", "paligemma")
PROJECTORS = {"llava": "multi_modal_projector", "idefics3": "connector", "paligemma": "multi_modal_projector"}

WORDS = [
    *("a", "red", "blue", "cat", "dog", "sits", "runs", "what", "is", "this", "?", "."),
    *("USER:", "ASSISTANT:", "User:", "Assistant:"),
]

# Those of llava-hf/llava-1.5-7b-hf (without its generation tags) and of HuggingFaceTB/SmolVLM-256M-Instruct.
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
IDEFICS3_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def make(family: str, folder: Path) -> Path:
    """Save a model with random weights and its processor, and return their folder."""
    torch.manual_seed(0)
    model, processor = {"llava": _llava, "idefics3": _idefics3, "paligemma": _paligemma}[family]()
    folder = folder / family
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def tokenizer_of(special, *, bos, eos, first=False, **named):
    reserved = ["<pad>", "<unk>", bos, eos, *special]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*reserved, *WORDS]))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if first:
        tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token=bos, eos_token=eos,
        additional_special_tokens=list(special), **named,
    )  # fmt: skip


def image_processor(name, **options):
    return getattr(transformers, name if is_torchvision_available() else f"{name}Pil")(**options)


def _text(vocabulary, config=LlamaConfig, **options):
    return config(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, **options,
    )  # fmt: skip


def _vision(image_size, patch_size, **options):
    return SiglipVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=image_size,
        patch_size=patch_size, vision_use_head=False, **options,
    )  # fmt: skip


def _llava():
    tokenizer = tokenizer_of(["<image>"], bos="<s>", eos="</s>", first=True)
    processor = LlavaProcessor(
        image_processor("SiglipImageProcessor", size={"height": 16, "width": 16}), tokenizer, patch_size=8,
        vision_feature_select_strategy="full", chat_template=LLAVA_TEMPLATE,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=_vision(16, 8), text_config=_text(len(tokenizer)), vision_feature_layer=-1,
        vision_feature_select_strategy="full", image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config), processor


def _idefics3():
    special = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    special += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer = tokenizer_of(special, bos="<|im_start|>", eos="<end_of_utterance>")
    images = image_processor(
        "Idefics3ImageProcessor",
        size={"longest_edge": 32},
        max_image_size={"longest_edge": 16},
        do_image_splitting=True,
    )
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=IDEFICS3_TEMPLATE)
    config = Idefics3Config(
        vision_config=Idefics3VisionConfig(
            hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=16,
            patch_size=4,
        ),
        text_config=_text(len(tokenizer), pad_token_id=0), scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), pad_token_id=0,
    )  # fmt: skip
    return Idefics3ForConditionalGeneration(config), processor


def _paligemma():
    tokenizer = tokenizer_of(["<image>"], bos="<bos>", eos="<eos>", extra_special_tokens={"image_token": "<image>"})
    images = image_processor("SiglipImageProcessor", size={"height": 16, "width": 16})
    images.image_seq_length = 4
    processor = PaliGemmaProcessor(images, tokenizer)
    config = PaliGemmaConfig(
        vision_config=_vision(16, 8, projection_dim=32),
        text_config=_text(len(tokenizer), GemmaConfig, head_dim=16),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), projection_dim=32, hidden_size=32,
    )  # fmt: skip
    return PaliGemmaForConditionalGeneration(config), processor


def data_of(model, pictures):
    return CaptionData(model, data=pictures, prompt="what is this ?", batch_size=2, test_size=2)


def fit(root, module, data, *callbacks, ckpt_path=None, **options):
    trainer = pl.Trainer(
        callbacks=list(callbacks), default_root_dir=root, accelerator="cpu", devices=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
        **options,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer
