"""Where a pretrained model is asked what it says: text of its own, the new task's inputs, or any other batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kappa_lightning.arguments import as_count
from kappa_lightning.probes.generated import (
    IGNORED,
    begin_token_of,
    continue_text,
    end_tokens_of,
    generate_text,
    has_begin_token,
    language_model,
    split,
)
from kappa_lightning.probes.output import Categorical, OutputDistribution
from kappa_lightning.probes.predictions import predictions

Output = Callable[[Any, Any], "OutputDistribution | Tensor | Any"]


class ReferenceInputs:
    """Batches without labels, and what the model says of each: its output distribution.

    Pretraining data is never needed. Use a subclass, :class:`GeneratedText` or :class:`TaskInputs`, or give batches of
    your own. What the model says is taken from, in this order,

    1. ``output``, if it is given;
    2. a method ``output_distribution(self, batch)`` of the module;
    3. for batches that are mappings, the transformers model in the module, or else the module's own ``forward`` with
       the batch as keyword arguments; for others, ``forward`` of the batch's first entry: a softmax over its logits.

    Args:
        batches: an iterable that can be read again, such as a DataLoader; as the model takes them, labels or not.
        output: ``output(module, batch)`` returns an :class:`~kappa_lightning.probes.output.OutputDistribution`, or
            logits of shape (…, classes) of a softmax, as such or as an attribute.

    Raises:
        TypeError: if ``batches`` can be read only once, or ``output`` cannot be called.

    Example:
        A regression says how wide its outputs scatter around it.

        >>> from kappa_lightning.probes.output import Gaussian
        >>> inputs = ReferenceInputs([torch.zeros(4, 3)], output=lambda module, x: Gaussian(module(x), scale=0.1))
        >>> len(inputs.distribution(nn.Linear(3, 2), torch.zeros(4, 3)))
        4
    """

    def __init__(self, batches: Iterable[Any] = (), output: Output | None = None) -> None:
        if isinstance(batches, Iterator) or not isinstance(batches, Iterable):
            raise TypeError(
                f"the reference is a {type(batches).__name__}, which cannot be read again: give a DataLoader or a list "
                "of batches"
            )
        if output is not None and not callable(output):
            raise TypeError(f"output={output!r} is not callable: give a function of (module, batch)")
        self.batches = batches
        self.output = output

    def __str__(self) -> str:
        return "batches of the user"

    def prepare(
        self, module: nn.Module, task: Iterable[Any] = (), *, watch: Callable[[int], Any] | None = None
    ) -> Iterable[Any]:
        """The batches to ask the model about, on any device.

        Args:
            module: the pretrained model.
            task: some batches of the new task, on the module's device; only some kinds need them.
            watch: called with the number of steps that are done, for a progress bar.

        Raises:
            ValueError: if there is no batch, or the module is not of the kind that is needed.
        """
        return self.batches

    def require(self, task: Sequence[Any]) -> None:
        """Make sure, before any work, that these batches of the new task are of the kind that is needed.

        Raises:
            TypeError: if they are not; the message says what to use instead.
        """

    def distribution(self, module: nn.Module, batch: Any) -> OutputDistribution:
        """What the module says of a batch that is on its device.

        Raises:
            TypeError: if it cannot be told; the message says what to give.
        """
        if self.output is not None:
            found = self.output(module, batch)
        elif callable(own := getattr(module, "output_distribution", None)):
            found = own(batch)
        else:
            found = predictions(module, batch)
        if isinstance(found, OutputDistribution):
            return found
        logits = found if isinstance(found, Tensor) else getattr(found, "logits", None)
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"the reference's output is a {type(found).__name__}: return an OutputDistribution "
                "(kappa_lightning.probes.output) or the logits of a softmax"
            )
        return Categorical(logits)


class TaskInputs(ReferenceInputs):
    """The new task's own inputs: what the pretrained model says of them, whatever their labels are.

    Args:
        output: see :class:`ReferenceInputs`.
    """

    def __init__(self, output: Output | None = None) -> None:
        super().__init__((), output)

    def __str__(self) -> str:
        return "the task's own inputs"

    def prepare(
        self, module: nn.Module, task: Iterable[Any] = (), *, watch: Callable[[int], Any] | None = None
    ) -> Iterable[Any]:
        """The task's batches themselves."""
        return list(task)


class GeneratedText(ReferenceInputs):
    """Text that a causal or image-text language model samples itself, from its begin token.

    An image-text model writes without a picture, from random tokens if it has no begin token of its own: that is what
    it knows of language. With ``images=True`` it gets the images and prompts of the new task's batches (the tokens
    before the first label, or up to the last token that stands for an image) and writes on from there; only what it
    writes counts. Such a batch is a mapping with ``input_ids``, or has one as an entry. What it says there is just what
    the new task changes, so to keep it is to learn less; pictures of your own, with other prompts, are the better
    reference for what it saw.

    Args:
        num_sequences: how many; of an image-text model at most as many samples of the task as this.
        num_tokens: their length at most; of an image-text model, how many tokens it writes.
        batch_size: sequences in a batch.
        begin_token: what they begin with, or ``"random"``, as in
            :func:`~kappa_lightning.probes.generated.generate_text`; the model's own begin token if ``None``.
        images: whether an image-text model writes on the new task's images instead.
        text: text that was generated before (:func:`~kappa_lightning.probes.generated.load_text`), used as it is.
        seed: of the samples.
    """

    def __init__(
        self,
        num_sequences: int = 64,
        num_tokens: int = 96,
        batch_size: int = 4,
        begin_token: int | Literal["random"] | None = None,
        text: Mapping[str, Tensor] | None = None,
        seed: int = 0,
        images: bool = False,
    ) -> None:
        super().__init__(())
        for argument, value in (
            ("num_sequences", num_sequences),
            ("num_tokens", num_tokens),
            ("batch_size", batch_size),
        ):
            as_count(value, argument)
        self.num_sequences = num_sequences
        self.num_tokens = num_tokens
        self.batch_size = batch_size
        self.begin_token = begin_token
        self.text = text
        self.seed = seed
        self.images = images

    def __str__(self) -> str:
        return f"{self.num_sequences} generated sequences of up to {self.num_tokens} tokens"

    def prepare(
        self, module: nn.Module, task: Iterable[Any] = (), *, watch: Callable[[int], Any] | None = None
    ) -> Iterable[Any]:
        """The generated text in batches, on the CPU."""
        if self.text is not None:
            return list(split(self.text, self.batch_size))
        model = require_language_model(module)
        begin_token = self.begin_token
        if takes_images(model):
            if self.images:
                return list(self._for_images(model, task, watch))
            if begin_token is None and not has_begin_token(model):
                begin_token = "random"
        text = generate_text(
            model,
            num_sequences=self.num_sequences,
            num_tokens=self.num_tokens,
            batch_size=max(self.batch_size, 16),
            begin_token=begin_token,
            seed=self.seed,
            watch=watch,
        )
        return list(split(text, self.batch_size))

    def distribution(self, module: nn.Module, batch: Any) -> OutputDistribution:
        """The next-token distributions of what the model wrote."""
        model = require_language_model(module)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs).logits
        labels = batch.get("labels")
        counts = batch["attention_mask"].bool()
        if labels is not None:
            following = torch.cat([labels[:, 1:] != IGNORED, torch.zeros_like(counts[:, :1])], dim=1)
            counts = counts & following
        return Categorical(logits, counts)

    def _for_images(self, model: Any, task: Iterable[Any], watch: Callable[[int], Any] | None) -> Iterator[Any]:
        done = 0
        for number, batch in enumerate(task):
            if done >= self.num_sequences:
                break
            inputs = _model_inputs(batch)
            if inputs is None:
                raise ValueError(
                    f"{type(model).__name__} takes images, and the train dataloader's batches hold no mapping with "
                    "input_ids (or several) to take them from: give a dataloader of images and prompts as the reference"
                )
            batch = inputs
            generator = torch.Generator(batch["input_ids"].device).manual_seed(self.seed * 1_000_003 + number)
            yield _written_on(model, batch, self.num_tokens, generator, watch)
            done += len(batch["input_ids"])
        if done == 0:
            raise ValueError(
                f"{type(model).__name__} takes images, and there is no batch of the task to take them from: "
                "give a dataloader of images and prompts as the reference"
            )


def require_language_model(module: nn.Module) -> Any:
    """The causal or image-text transformers model in a module.

    Raises:
        ValueError: if there is none.
    """
    model = language_model(module)
    if model is None or not writes(model):
        found = "no transformers model that generates text" if model is None else f"only {type(model).__name__}"
        raise ValueError(
            "text of the model's own needs a causal or image-text model of transformers, and the module holds "
            f'{found}: use reference="inputs" or a dataloader'
        )
    return model


def takes_images(model: Any) -> bool:
    """Whether a transformers model takes images beside tokens."""
    return getattr(model.config, "vision_config", None) is not None


def _model_inputs(batch: Any) -> Mapping[str, Any] | None:
    """The mapping with ``input_ids`` that a batch is, or the only one that is an entry of it."""
    if isinstance(batch, Mapping) and "input_ids" in batch:
        return batch
    entries = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    found = [entry for entry in entries if isinstance(entry, Mapping) and "input_ids" in entry]
    return found[0] if len(found) == 1 else None


def writes(model: Any) -> bool:
    """Whether something is a transformers model that can generate text from its begin token."""
    return model is not None and not model.config.is_encoder_decoder and begin_token_of(model) is not None


def _written_on(
    model: Any,
    batch: Mapping[str, Any],
    num_tokens: int,
    generator: torch.Generator,
    watch: Callable[[int], Any] | None,
) -> dict[str, Any]:
    """A batch of the task with, in place of its labels, what the model writes after its prompts."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    attended = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    lengths = _prompt_lengths(model, ids, attended, batch.get("labels"))
    prompts = [row[kept][:length] for row, kept, length in zip(ids, attended, lengths, strict=True)]
    pad = (end_tokens_of(model) or [0])[0]
    # What has an entry for each token (types, positions) belongs to the old tokens.
    others = {
        k: v
        for k, v in batch.items()
        if k not in ("input_ids", "attention_mask", "labels") and not (isinstance(v, Tensor) and v.shape == ids.shape)
    }
    before, before_mask = _padded(prompts, pad, left=True)
    prompt = {**others, "input_ids": before, "attention_mask": before_mask}
    whole = continue_text(model, prompt, num_tokens, generator, watch)
    width = before.shape[1]
    texts, labels = [], []
    for row, new in zip(prompts, whole[:, width:], strict=True):
        ends = torch.isin(new, torch.tensor(end_tokens_of(model), device=new.device)).nonzero()
        written = new[: int(ends[0]) + 1] if len(ends) else new
        texts.append(torch.cat([row, written]))
        labels.append(torch.cat([torch.full_like(row, IGNORED), written]))
    after, after_mask = _padded(texts, pad, left=False)
    return {
        **others,
        "input_ids": after,
        "attention_mask": after_mask,
        "labels": _padded(labels, IGNORED, left=False)[0],
    }


def _prompt_lengths(model: Any, ids: Tensor, attended: Tensor, labels: Tensor | None) -> list[int]:
    """How many of the attended tokens of each sample are its prompt."""
    images = [getattr(model.config, name, None) for name in ("image_token_id", "image_token_index")]
    tokens = torch.tensor([token for token in images if token is not None], device=ids.device)
    lengths = []
    for number, (row, kept) in enumerate(zip(ids, attended, strict=True)):
        marks = (labels[number] != IGNORED)[kept] if labels is not None else None
        if marks is not None and bool(marks.any()) and not bool(marks[0]):
            lengths.append(int(marks.nonzero()[0]))
            continue
        shown = torch.isin(row[kept], tokens).nonzero()
        lengths.append(int(shown[-1]) + 1 if len(shown) else 1)
    return lengths


def _padded(rows: Sequence[Tensor], value: int, *, left: bool) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    filled = [(row, row.new_full((width - len(row),), value)) for row in rows]
    ids = torch.stack([torch.cat([filling, row] if left else [row, filling]) for row, filling in filled])
    places = torch.arange(width, device=ids.device)
    sizes = torch.tensor([len(r) for r in rows], device=ids.device)[:, None]
    mask = places >= width - sizes if left else places < sizes
    return ids, mask.long()
