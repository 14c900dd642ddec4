"""The methods of the evidence: the candidates of the pilot, and controls that separate κ from kind, size and depth.

================================  ======================================================================================
``kappa 0.25``                    the matrices that a criterion ranks first, up to a share of the parameters: until the
                                  next one does not fit, so that what is left over does not go to whatever is small
``kappa 0.5 in GLOB``             the same among the matrices that a glob or group matches
``permuted:kappa 0.25``           as many of each role and shape as ``kappa 0.25`` takes, in random layers: what κ
                                  permuted among the matrices of a kind would choose
``folded:kappa 0.25``             by κ of the same function written otherwise: the gain of each norm folded into the
                                  matrices that read it (Llama's names); the model itself trains as it is
``depth-matched:kappa 0.25``      for every layer random matrices of it, with at most as many parameters as
                                  ``kappa 0.25`` takes there
``… + light anchor 10``           any method with :class:`~kappa_lightning.PretrainedAnchor` of that strength on two
                                  sequences of at most 48 tokens at every step, of 24 that the model wrote itself; the
                                  small LLaVA, whose texts have about eight tokens, on 16 of 960
``… + longer anchor 10``          the same with sequences of 96 tokens
``sensitivity … along``           ``sensitivity:path …``: of a language model the signal along first steps of training,
                                  and what all pairs of tensors change together in what it says of a little text of its
                                  own
``sensitivity … on sentences``    by signal over sensitivity with unlabeled sentences as the reference; of the task
                                  that has sentence pairs, those that are not evaluated
================================  ======================================================================================

Every draw is of the run's seed. All other names are those of :mod:`kappa_lightning.pilot.candidates`.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

import benchmarks.forgetting.candidates  # noqa: F401 - registers its criteria
from benchmarks.forgetting.captions import NewCaptions
from benchmarks.forgetting.scenes import TwoDigitScenes
from benchmarks.forgetting.task import Task
from kappa_lightning import KappaProfile, PretrainedAnchor, SensitivityFreezeCallback
from kappa_lightning.pilot.candidates import Candidate, candidate
from kappa_lightning.pilot.train_only import TrainOnly
from kappa_lightning.profile import KappaRow
from kappa_lightning.selection import CRITERIA, rank
from kappa_lightning.weights import find_weights
from kappa_lightning.weights.patterns import included, match_parameters
from kappa_lightning.weights.roles import depth_and_role
from recipes.image_text import ImageTextModel, tokenize

_RANKED = re.compile(
    r"(?:(?P<control>permuted|depth-matched|folded):)?(?P<criterion>(?:reversed:)?\w+)\s+(?P<budget>0?\.\d+)"
    r"(?:\s+in\s+(?P<where>\S+))?"
)
_ANCHORED = re.compile(r"(?P<base>.+?)\s*\+\s*(?P<kind>light|longer) anchor\s+(?P<strength>\d+(?:\.\d+)?)")

_ALONG = re.compile(r"sensitivity\s+(?P<budget>0?\.\d+)\s+along")

_ON_SENTENCES = re.compile(r"sensitivity\s+(?P<budget>0?\.\d+)\s+on\s+sentences")

SENTENCES = 14
"""Sentences in a batch of the reference, which the model says to be like each other or not."""

_READS = re.compile(r"(?P<layer>.*\.)(?:(?P<attention>self_attn\.[qkv]_proj)|mlp\.(?:gate|up)_proj)\.weight")


def method(name: str, task: Task, seed: int, exclude: Sequence[str] = ()) -> Candidate:
    """The candidate of a name on a task.

    Args:
        name: see the module.
        task: whose new parameters train with every method.
        seed: of the method's draws.
        exclude: globs of what no choice takes.

    Raises:
        ValueError: if there is none of that name.
    """
    if found := _ANCHORED.fullmatch(name):
        base, strength = method(found["base"], task, seed, exclude), float(found["strength"])
        tokens = 48 if found["kind"] == "light" else 96

        def anchored(module: pl.LightningModule) -> list[Callback]:
            inputs, batches, size = ("inputs", 60, 16) if isinstance(task, NewCaptions) else (None, 12, 2)
            anchor = PretrainedAnchor(
                "auto", strength, batches=batches, batch_size=size, num_tokens=tokens, task_inputs=inputs
            )
            return [*base.build(module), anchor]

        return Candidate(name, anchored)
    if found := _ALONG.fullmatch(name):
        same = candidate(f"sensitivity:path {found['budget']}", always_train=task.new, exclude=exclude, seed=seed)
        return replace(same, name=name)
    if found := _ON_SENTENCES.fullmatch(name):
        if not isinstance(task, TwoDigitScenes):
            raise ValueError(f"{name!r} needs a task with sentence pairs: use it with scenes")
        budget, asked = float(found["budget"]), task

        def on_sentences(module: pl.LightningModule) -> list[Callback]:
            assert isinstance(module, ImageTextModel)
            texts = asked.unlabeled()
            parts = [texts[at : at + SENTENCES] for at in range(0, len(texts), SENTENCES)]
            reference = [{"tokens": tokenize(module.tokenizer, part)} for part in parts]
            return [
                SensitivityFreezeCallback(
                    max_params=budget, reference=reference, exclude=exclude, always_train=task.new, seed=seed
                )
            ]

        return Candidate(name, on_sentences)
    found = _RANKED.fullmatch(name)
    if found is None or found["criterion"].removeprefix("reversed:") not in CRITERIA:
        return candidate(name, always_train=task.new, exclude=exclude, seed=seed)
    budget, where = float(found["budget"]), found["where"] or "*"

    def build(module: pl.LightningModule) -> list[Callback]:
        new = match_parameters(module, task.new, argument="new")
        weights = [
            weight
            for weight in included(find_weights(module), module, (where,), exclude)
            if weight.name not in new and weight.parameter is not None and weight.parameter.requires_grad
        ]
        with folded_gains(module) if found["control"] == "folded" else nullcontext():
            profile = KappaProfile.from_weights(weights)
        ranking = rank(profile, found["criterion"], seed=seed)
        chosen = first_within(ranking, budget)
        if found["control"] in DRAWS:
            chosen = DRAWS[found["control"]](ranking, chosen, seed)
        return [TrainOnly(sorted(chosen), task.new)]

    return Candidate(name, build)


def first_within(ranking: Sequence[KappaRow], share: float) -> list[str]:
    """The first ones of a ranking until the next does not fit into a share of all parameters.

    A matrix larger than the whole share is passed over.
    """
    limit = share * sum(row.num_parameters for row in ranking)
    chosen: list[str] = []
    used = 0
    for row in ranking:
        if row.num_parameters > limit:
            continue
        if used + row.num_parameters > limit:
            break
        chosen.append(row.name)
        used += row.num_parameters
    return chosen


@contextmanager
def folded_gains(module: nn.Module) -> Iterator[None]:
    """Within it the matrices that read a norm hold its gain as well: W·diag(g), which with g = 1 is the same function.

    Raises:
        ValueError: if the module has no matrix of Llama's names behind a norm.
    """
    parameters = dict(module.named_parameters())
    folded = {}
    for name, weight in parameters.items():
        if reader := _READS.fullmatch(name):
            norm = "input_layernorm" if reader["attention"] else "post_attention_layernorm"
            folded[name] = weight.detach() * parameters[f"{reader['layer']}{norm}.weight"].detach()
    if not folded:
        raise ValueError("no matrix is named as Llama's, so there is no gain to fold")
    kept = {name: parameters[name].detach().clone() for name in folded}
    try:
        with torch.no_grad():
            for name, value in folded.items():
                parameters[name].copy_(value)
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                parameters[name].copy_(value)


def permuted(rows: Sequence[KappaRow], chosen: Sequence[str], seed: int) -> list[str]:
    """Random matrices, of each role and shape as many as were chosen.

    Args:
        rows: all candidates.
        chosen: names of them.
        seed: of the draw.
    """
    generator = random.Random(seed)
    kinds: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for row in rows:
        kinds[depth_and_role(row.name)[1], row.shape].append(row.name)
    drawn: list[str] = []
    for names in kinds.values():
        drawn += generator.sample(names, sum(name in set(chosen) for name in names))
    return drawn


def depth_matched(rows: Sequence[KappaRow], chosen: Sequence[str], seed: int) -> list[str]:
    """Random matrices, of each layer at most as many parameters as were chosen there.

    Args:
        rows: all candidates.
        chosen: names of them.
        seed: of the draw.
    """
    generator = random.Random(seed)
    layers: dict[object, list[KappaRow]] = defaultdict(list)
    for row in rows:
        depth, role = depth_and_role(row.name)
        layers[role if depth is None else depth].append(row)
    drawn: list[str] = []
    for members in layers.values():
        room = sum(row.num_parameters for row in members if row.name in set(chosen))
        if not room:
            continue
        for row in generator.sample(members, len(members)):
            if row.num_parameters <= room:
                drawn.append(row.name)
                room -= row.num_parameters
    return drawn


DRAWS = {"permuted": permuted, "depth-matched": depth_matched}
