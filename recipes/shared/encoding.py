"""Prompts, images and answers as a batch whose labels are the answers and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import PaliGemmaProcessor

from kappa_lightning.probes.metrics import IGNORED

SHOWN_EDGE = 384
"""Longest edge, in pixels, of a batch's images for TensorBoard: photos are slow to pass on and to draw."""


class Sample(NamedTuple):
    """One thing to learn or to be asked: a prompt, its answer, and the image that it is about, if any."""

    prompt: str
    answer: str
    image: Image.Image | None = None


class Encoder:
    """Batches for a model that continues a prompt with an answer.

    The prompt is encoded exactly as it will be when the model is asked, padded on the left; the tokens of the answer
    follow. So what is trained is what is generated, whichever tokenizer, chat template or image processor there is,
    and the column where the answers begin is the same in all rows.

    Args:
        processor: a transformers processor, or a tokenizer for a model without images.

    Raises:
        ValueError: if the tokenizer has no end token.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"{type(self.tokenizer).__name__} has no end token: set its eos_token")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Encode samples.

        Returns:
            ``inputs``: what the model takes, of shape (batch, tokens) and whatever shape images have, and ``labels``
            of shape (batch, tokens), −100 everywhere but at the tokens of the answer and the end token after it;
            ``prompt_length``: the number of columns before the answers; ``samples``: with images that are small enough
            to be shown.

        Raises:
            ValueError: if the model's kind of input is not supported, or only some of the samples have an image.
        """
        prompts = [self.prompt_text(sample) for sample in samples]
        encoded = self._encode_prompts(prompts, [sample.image for sample in samples])
        # PaliGemma's processor makes labels of its own, from the prompt.
        encoded.pop("labels", None)
        if "cross_attention_mask" in encoded:
            raise ValueError(
                f"{type(self.processor).__name__} is of a model that sees by cross-attention, whose masks do not fit "
                "padding on the left: choose a model that takes images as tokens"
            )
        answers = [self.answer_ids(sample, prompt) for sample, prompt in zip(samples, prompts, strict=True)]
        width = max(map(len, answers))
        padding = [width - len(answer) for answer in answers]
        ids = torch.tensor([[*a, *[self.tokenizer.pad_token_id] * n] for a, n in zip(answers, padding, strict=True)])
        mask = torch.tensor([[1] * len(a) + [0] * n for a, n in zip(answers, padding, strict=True)])
        tails = {
            "input_ids": ids,
            "attention_mask": mask,
            # In PaliGemma 1 is what attends to the past only, which is what it generates; in Gemma 3 it is an image,
            # whose tokens attend to each other, and 0 is text.
            "token_type_ids": torch.full_like(ids, isinstance(self.processor, PaliGemmaProcessor)),
            # In Qwen-VL 0 is text.
            "mm_token_type_ids": torch.zeros_like(ids),
        }
        shape = encoded["input_ids"].shape
        inputs = {name: tensor for name, tensor in encoded.items() if isinstance(tensor, Tensor)}
        for name in sequence_keys(inputs):
            if name not in tails:
                raise ValueError(
                    f"{type(self.processor).__name__} gives {name} for every token: unknown to this recipe"
                )
            inputs[name] = torch.cat([inputs[name], tails[name].to(inputs[name].dtype)], dim=1)
        nothing = torch.full(shape, IGNORED)
        inputs["labels"] = torch.cat([nothing, ids.masked_fill(mask == 0, IGNORED)], dim=1)
        return {"inputs": inputs, "prompt_length": shape[1], "samples": [_shown(sample) for sample in samples]}

    def prompt_text(self, sample: Sample) -> str:
        """The prompt as text, in the chat template if there is one, up to where the answer begins."""
        if self._has_template:
            return str(self._apply_template([self._question(sample)], add_generation_prompt=True))
        if sample.image is None:
            return sample.prompt
        image_token = getattr(self.processor, "image_token", None)
        if image_token is None:
            raise ValueError(
                f"{type(self.processor).__name__} has neither a chat template nor an image_token, so that nothing says "
                "where the image goes: set its chat_template and save it with the model"
            )
        return f"{image_token}{sample.prompt}"

    def answer_ids(self, sample: Sample, prompt: str) -> list[int]:
        """The tokens of an answer and the end token.

        Raises:
            ValueError: if the chat template does not put the answer behind the prompt.
        """
        answer = sample.answer
        if self._has_template:
            reply = {"role": "assistant", "content": self._text_content(sample.answer)}
            whole = str(self._apply_template([self._question(sample), reply], add_generation_prompt=False))
            if not whole.startswith(prompt):
                raise ValueError(
                    f"the chat template asks with {prompt[-40:]!r}, which is not how a conversation with the answer "
                    "goes on: give a processor with another template"
                )
            # A line break after the end token belongs to the next turn.
            answer = whole[len(prompt) :].rstrip()
        elif not sample.prompt.endswith(("\n", " ")) and not hasattr(self.processor, "image_processor"):
            answer = f" {answer}"
        ids: list[int] = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        return ids if ids[-1:] == [self.tokenizer.eos_token_id] else [*ids, self.tokenizer.eos_token_id]

    def decode(self, tokens: Tensor) -> list[str]:
        """The texts of generated tokens, shape (batch, tokens), up to the end token."""
        rows = []
        for row in tokens.tolist():
            end = row.index(self.tokenizer.eos_token_id) if self.tokenizer.eos_token_id in row else len(row)
            rows.append(row[:end])
        return [str(text).strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]

    @property
    def _has_template(self) -> bool:
        return bool(getattr(self.processor, "chat_template", None))

    def _apply_template(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> Any:
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

    def _question(self, sample: Sample) -> dict[str, Any]:
        content = self._text_content(sample.prompt)
        if sample.image is not None:
            content = [{"type": "image"}, *content]
        return {"role": "user", "content": content}

    def _text_content(self, text: str) -> Any:
        # Templates of models without images take plain text.
        return [{"type": "text", "text": text}] if hasattr(self.processor, "image_processor") else text

    def _encode_prompts(self, prompts: list[str], images: list[Image.Image | None]) -> dict[str, Any]:
        options: dict[str, Any] = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        first = self.tokenizer.bos_token
        if first is not None and self._has_template and prompts[0].startswith(first):
            options["add_special_tokens"] = False
        if all(image is None for image in images):
            return dict(self.tokenizer(prompts, **options))
        missing = [number for number, image in enumerate(images) if image is None]
        if missing:
            raise ValueError(
                f"sample {missing[0]} of the batch has no image and others have: put them into batches apart"
            )
        return dict(self.processor(images=[[image] for image in images], text=prompts, **options))


def _shown(sample: Sample) -> Sample:
    if sample.image is None or max(sample.image.size) <= SHOWN_EDGE:
        return sample
    image = sample.image.copy()
    image.thumbnail((SHOWN_EDGE, SHOWN_EDGE), reducing_gap=2.0)
    return sample._replace(image=image)


def sequence_keys(inputs: dict[str, Tensor]) -> list[str]:
    """The names of the tensors with one entry a token."""
    shape = inputs["input_ids"].shape
    return [name for name, tensor in inputs.items() if tensor.shape == shape]


def prompt_of(batch: dict[str, Any]) -> dict[str, Tensor]:
    """What the model is asked with: the inputs of a batch without the answers."""
    inputs = {name: tensor for name, tensor in batch["inputs"].items() if name != "labels"}
    per_token = sequence_keys(inputs)
    return {name: t[:, : batch["prompt_length"]] if name in per_token else t for name, t in inputs.items()}
