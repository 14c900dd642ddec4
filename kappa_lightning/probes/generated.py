"""Text that a language model writes itself: what it knows, sampled without anybody's data."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kappa_lightning.arguments import as_count
from kappa_lightning.files import replacing
from kappa_lightning.fingerprint import fingerprint
from kappa_lightning.restoring import modes_restored, random_numbers_restored

Batch = dict[str, Tensor]

FORMAT = "kappa-lightning generated text"
IGNORED = -100


def language_model(module: nn.Module) -> Any | None:
    """The outermost transformers model in a module that can generate text; ``None`` if there is none.

    Args:
        module: such as a LightningModule that holds the model, with or without PEFT's adapters.
    """
    for submodule in module.modules():
        can_generate = getattr(submodule, "can_generate", None)
        # PEFT's wrappers hand on what they do not know, and only their inner model is a module of transformers.
        if callable(can_generate) and hasattr(type(submodule), "can_generate") and can_generate():
            return submodule
    return None


def begin_token_of(model: Any) -> int | None:
    """The token that a text begins with: a model's begin token or, as for GPT-2 and Qwen, its end token."""
    configs = [getattr(model, "generation_config", None), *_configs(model)]
    for name in ("bos_token_id", "decoder_start_token_id", "eos_token_id"):
        for config in configs:
            token = getattr(config, name, None)
            if isinstance(token, list):
                token = token[0] if token else None
            if token is not None:
                return int(token)
    return None


def has_begin_token(model: Any) -> bool:
    """Whether a model has a token of its own that texts begin with, beside the one that ends them."""
    configs = [getattr(model, "generation_config", None), *_configs(model)]
    return any(getattr(config, "bos_token_id", None) is not None for config in configs)


def end_tokens_of(model: Any) -> list[int]:
    """The tokens that end a text."""
    for config in [getattr(model, "generation_config", None), *_configs(model)]:
        token = getattr(config, "eos_token_id", None)
        if token is not None:
            return [int(each) for each in (token if isinstance(token, list) else [token])]
    return []


def _configs(model: Any) -> list[Any]:
    config = getattr(model, "config", None)
    if config is None:
        return []
    inner = getattr(config, "get_text_config", None)
    return [config] if inner is None else [inner(), config]


def generate_text(
    model: nn.Module,
    *,
    num_sequences: int = 64,
    num_tokens: int = 96,
    batch_size: int = 16,
    begin_token: int | Literal["random"] | None = None,
    seed: int = 0,
    watch: Callable[[int], Any] | None = None,
) -> Batch:
    """Sequences that a causal language model samples from its own begin token, at temperature 1.

    They are drawn from the model's distribution itself: none of the settings with which it would chat or generate
    (temperature, top-k, penalties) has a say. Batch k is drawn with a generator of its own, seeded by ``seed`` and k,
    so the text depends on the model and these arguments alone. Nothing of the model is changed: its modes, its
    generation settings and all global random numbers stay as they are.

    Args:
        model: takes ``input_ids`` of shape (batch, tokens) and returns logits of shape (batch, tokens, vocabulary), as
            such or as an attribute; if it returns ``past_key_values``, they spare it the tokens so far. It is where its
            first parameter is.
        num_sequences: how many; many short ones tell more than few long ones.
        num_tokens: their length at most, the begin token included.
        batch_size: how many are sampled at a time.
        begin_token: what they begin with; the model's own begin token (or end token, if it has no other) if ``None``.
            ``"random"`` begins each with a token drawn uniformly from the vocabulary, for a model that was never taught
            how a text begins (LLM-QAT, Liu et al., arXiv 2305.17888, section 3.1).
        seed: of the samples.
        watch: called with the number of tokens (positions) of each step, for a progress bar.

    Returns:
        On the CPU, ``input_ids`` and ``attention_mask`` of shape (num_sequences, num_tokens), int64. A sequence that
        the model ended sooner is padded on the right with its end token; the mask is 1 where a distribution counts, up
        to and with the token before the end token.

    Raises:
        ValueError: if an argument is out of range, the model has no begin token and none is given, or its vocabulary
            is not known from its configuration and the begin is to be random.

    Example:
        >>> from torch import nn
        >>> bigrams = nn.Embedding(10, 10)
        >>> text = generate_text(bigrams, num_sequences=2, num_tokens=5, begin_token=3)
        >>> text["input_ids"].shape, text["input_ids"][:, 0].tolist()
        (torch.Size([2, 5]), [3, 3])
    """
    for argument, value in (("num_sequences", num_sequences), ("num_tokens", num_tokens), ("batch_size", batch_size)):
        as_count(value, argument)
    if isinstance(begin_token, str) and begin_token != "random":
        raise ValueError(f"begin_token={begin_token!r} is unknown: give the number of a token, 'random' or None")
    begin = begin_token_of(model) if begin_token is None else begin_token
    if begin is None:
        raise ValueError(
            f"{type(model).__name__} has neither a begin nor an end token in its configuration: give begin_token=…, "
            "the number of a token that texts begin with, or 'random'"
        )
    beginnings = _beginnings(model) if isinstance(begin, str) else torch.tensor([begin])
    device = next(model.parameters()).device
    parts = []
    for number, start in enumerate(range(0, num_sequences, batch_size)):
        count = min(batch_size, num_sequences - start)
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + number)
        first = (
            torch.zeros(count, dtype=torch.int64, device=device)
            if len(beginnings) == 1
            else torch.randint(len(beginnings), (count,), generator=generator, device=device)
        )
        prompt = {
            "input_ids": beginnings.to(device)[first][:, None],
            "attention_mask": torch.ones(count, 1, dtype=torch.int64, device=device),
        }
        ids = continue_text(model, prompt, num_tokens - 1, generator, watch)
        parts.append(ids.cpu())
    ids = torch.cat(parts)
    return {"input_ids": ids, "attention_mask": _before_the_end(ids, 1, end_tokens_of(model)).long()}


def continue_text(
    model: nn.Module,
    prompt: Mapping[str, Any],
    num_tokens: int,
    generator: torch.Generator,
    watch: Callable[[int], Any] | None = None,
) -> Tensor:
    """Prompts and what the model writes after them, at temperature 1.

    Every sequence gets ``num_tokens`` new tokens; after an end token these are end tokens. A token that stands for a
    picture, a sound or a film is never drawn: what it stands for would be missing.

    Args:
        model: see :func:`generate_text`.
        prompt: ``input_ids`` and ``attention_mask`` of shape (batch, tokens), padded on the left, and whatever else the
            model takes with them, such as images; on the model's device.
        num_tokens: how many are added.
        generator: on the model's device.
        watch: see :func:`generate_text`.

    Returns:
        Shape (batch, tokens + num_tokens).
    """
    ends = end_tokens_of(model)
    ids: Tensor = prompt["input_ids"]
    mask: Tensor = prompt["attention_mask"]
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    takes = _accepted(model)
    barred = torch.tensor(_placeholders(model), dtype=torch.int64, device=ids.device)
    past = None
    with _asleep(model):
        for _ in range(num_tokens):
            inputs = _inputs_of_step(prompt, ids, mask, past, takes)
            output = model(**inputs) if takes is not None else model(ids)
            logits = output if isinstance(output, Tensor) else output.logits
            past = None if isinstance(output, Tensor) else getattr(output, "past_key_values", None)
            likely = logits[:, -1].float()
            if len(barred):
                likely = likely.index_fill(-1, barred[barred < likely.shape[-1]], -torch.inf)
            drawn = torch.multinomial(likely.softmax(-1), 1, generator=generator)
            if ends:
                drawn = torch.where(ended[:, None], ends[0], drawn)
                ended |= torch.isin(drawn[:, 0], torch.tensor(ends, device=ids.device))
            ids = torch.cat([ids, drawn], dim=1)
            mask = torch.cat([mask, mask.new_ones(len(ids), 1)], dim=1)
            if watch is not None:
                watch(1)
    return ids


def save_text(path: str | os.PathLike[str], text: Mapping[str, Tensor]) -> None:
    """Write what :func:`generate_text` returned to a safetensors file, atomically."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in text.items()}
    marks = {name: fingerprint(tensor) for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": FORMAT, **{f"mark.{k}": v for k, v in marks.items()}})


def load_text(path: str | os.PathLike[str]) -> Batch:
    """Read what :func:`save_text` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is something else, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            marks = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or a truncated one ({error}): generate it again") from error
    if marks.get("format") != FORMAT or "input_ids" not in tensors:
        raise ValueError(f"{path} holds no generated text: it lacks the mark format={FORMAT!r} or input_ids")
    for name, tensor in tensors.items():
        if fingerprint(tensor) != marks.get(f"mark.{name}"):
            raise ValueError(f"{path} is damaged: the content of {name} has changed since it was written")
    return tensors


def split(text: Mapping[str, Tensor], batch_size: int) -> Iterator[Batch]:
    """A text in batches of some sequences, the last one smaller."""
    count = len(text["input_ids"])
    for start in range(0, count, batch_size):
        yield {name: tensor[start : start + batch_size] for name, tensor in text.items()}


def _beginnings(model: Any) -> Tensor:
    """The tokens of a vocabulary that stand for text: all but those that end one and those of images and the like."""
    configs = _configs(model)
    size = next((found for config in configs if (found := getattr(config, "vocab_size", None)) is not None), None)
    if size is None:
        raise ValueError(
            f"{type(model).__name__} has no vocab_size in its configuration to draw a random token from: give "
            "begin_token=…, the number of a token that texts begin with"
        )
    special = set(end_tokens_of(model))
    for config in configs:
        names = [name for name in vars(config) if name.endswith(("_token_id", "_token_index"))]
        special |= {value for name in names if isinstance(value := getattr(config, name), int)}
    return torch.tensor([token for token in range(size) if token not in special])


def _placeholders(model: Any) -> list[int]:
    """The tokens that stand for what is no text, such as the patches of an image."""
    found = set()
    for config in _configs(model):
        for name, value in vars(config).items():
            of_something = name.startswith(("image", "video", "vision", "audio"))
            if of_something and name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= 0:
                found.add(value)
    return sorted(found)


def _before_the_end(ids: Tensor, prompt: int, ends: list[int]) -> Tensor:
    """Which positions are followed by a sampled token, or would be: up to the one before the first end token."""
    counts = torch.ones_like(ids, dtype=torch.bool)
    if ends:
        is_end = torch.isin(ids, torch.tensor(ends, device=ids.device))
        is_end[:, :prompt] = False
        counts = is_end.cumsum(1) == 0
    return counts


def _accepted(model: nn.Module) -> frozenset[str] | None:
    """The keyword arguments that a model takes, all of them as ``"*"``; ``None`` if it takes ids by position only."""
    parameters = inspect.signature(model.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return frozenset({"*", *parameters})
    return frozenset(parameters) if "input_ids" in parameters else None


def _inputs_of_step(
    prompt: Mapping[str, Any], ids: Tensor, mask: Tensor, past: Any, takes: frozenset[str] | None
) -> dict[str, Any]:
    if takes is None:
        return {}
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    if past is not None:
        inputs = {"input_ids": ids[:, -1:], "position_ids": positions[:, -1:], "past_key_values": past}
    else:
        inputs = {**prompt, "input_ids": ids, "position_ids": positions}
    # A model that names what it takes is given no more; **kwargs alone do not say that it knows positions.
    inputs |= {"attention_mask": mask, "use_cache": True}
    known = {"input_ids", "attention_mask", *(() if past is None else ("past_key_values",)), *prompt}
    return {k: v for k, v in inputs.items() if k in takes or ("*" in takes and k in known)}


@contextmanager
def _asleep(model: nn.Module) -> Iterator[None]:
    """In eval mode without gradients, and afterwards as before, random numbers included."""
    # Lightning validates in inference mode; tensors that a model caches there could not be used in training.
    with random_numbers_restored(), modes_restored(model), torch.inference_mode(False), torch.no_grad():
        model.eval()
        yield
