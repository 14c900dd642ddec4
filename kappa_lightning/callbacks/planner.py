"""From a module and a user's patterns to the candidates, and from a choice among them to a plan."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.nn.parameter import UninitializedParameter

from kappa_lightning.callbacks.plan import AnyProfile, Choice, Plan
from kappa_lightning.weights import Weight, find_weights, included, match_parameters, plain_parameters
from kappa_lightning.weights.part import Part, split_name


@dataclass(frozen=True, slots=True)
class Patterns:
    """What a user wants to train and not to train.

    Attributes:
        include: globs and groups of the candidates.
        exclude: globs and groups of what is no candidate, and therefore frozen.
        always_train: globs of what trains outside the budget.
        train_vectors: whether all vectors train.
    """

    include: tuple[str, ...]
    exclude: tuple[str, ...]
    always_train: tuple[str, ...]
    train_vectors: bool

    def claims(self, module: nn.Module) -> set[str]:
        """The names of the parameters, matrices or not, that the patterns take charge of.

        Raises:
            ValueError: if a pattern matches none.
        """
        wanted = match_parameters(module, self.include, argument="include")
        wanted -= match_parameters(module, self.exclude, argument="exclude")
        return wanted | match_parameters(module, self.always_train, argument="always_train")


@dataclass(frozen=True, slots=True)
class Candidates:
    """What may be chosen, and what trains anyway.

    Attributes:
        weights: the candidates.
        always: the names of what trains whatever is chosen.
        vectors: the names of the vectors that train, too.
        scope: the names of all parameters that the callback decides on.
        trainable: those of them that require a gradient.
        optimized: those that an optimizer has.
        companions: for each matrix the names of further parameters that it is made of.
    """

    weights: list[Weight]
    always: set[str]
    vectors: set[str]
    scope: set[str]
    trainable: set[str]
    optimized: set[str]
    companions: dict[str, tuple[str, ...]]

    @property
    def alongside(self) -> set[str]:
        """The names of what trains whatever is chosen."""
        return (self.always | self.vectors) & self.trainable & self.optimized

    def plan(self, choice: Choice[AnyProfile]) -> Plan[AnyProfile]:
        """What a choice makes of the parameters.

        Raises:
            ValueError: if no optimizer has a tensor that is to train.
        """
        parts = tuple(choice.parts[name] for name in choice.selected if name in choice.parts)
        whole = [name for name in choice.selected if name not in choice.parts]
        made_of = {name for chosen in whole for name in self.companions[chosen]}
        trained = {*whole, *self.always, *made_of} & self.trainable
        require_optimized(trained | {part.parameter for part in parts}, self.optimized)
        trained |= self.vectors & self.trainable & self.optimized
        frozen = self.scope - trained
        rates = None if choice.rates is None else {name: float(rate) for name, rate in choice.rates.items()}
        dropped = frozen & self.trainable & self.optimized
        trained |= {part.name for part in parts}
        return Plan(trained, frozen, dropped, list(choice.selected), choice.profile, rates=rates, parts=parts)


def find_candidates(
    module: nn.Module, patterns: Patterns, *, optimized: Collection[str], claimed: Collection[str] = ()
) -> Candidates:
    """The candidates among a module's matrices: those that require a gradient and that the patterns leave.

    Args:
        module: its ``requires_grad`` is as the user left it.
        patterns: the user's.
        optimized: the names of the parameters that an optimizer has.
        claimed: names that another freeze callback of the Trainer is in charge of.

    Raises:
        TypeError: if ``always_train`` matches what is not floating point.
        ValueError: if a pattern matches no parameter, no candidate is left, or one belongs to a lazy layer.
    """
    parameters, weights = plain_parameters(module), find_weights(module)
    scope = set(parameters).difference(claimed)
    trainable = {name for name in scope if parameters[name].requires_grad}
    always = _always_trained(module, patterns, trainable)
    candidates, frozen_before = [], 0
    for weight in included(weights, module, patterns.include, patterns.exclude):
        if weight.name in always or weight.name not in scope:
            continue
        if trainable.isdisjoint((weight.name, *weight.companions)):
            frozen_before += 1
            continue
        if isinstance(weight.parameter, UninitializedParameter):
            raise ValueError(
                f"{weight.name} belongs to a lazy layer and has no shape yet, so it cannot be ranked: run a batch "
                "through the module before fit, or name it in always_train or exclude"
            )
        candidates.append(weight)
    if not candidates:
        raise ValueError(
            f"nothing to train: include={list(patterns.include)}, exclude={list(patterns.exclude)} and "
            f"always_train={list(patterns.always_train)} leave no matrix as a candidate"
            + (f"; {frozen_before} that they leave are frozen already (requires_grad=False)" if frozen_before else "")
        )
    matrices = {name for weight in weights for name in (weight.name, *weight.companions)}
    vectors = scope - matrices if patterns.train_vectors else set()
    if claimed:  # several callbacks may differ on what none of them claims, which then stays frozen
        vectors &= patterns.claims(module)
    companions = {weight.name: weight.companions for weight in weights}
    return Candidates(candidates, always, vectors, scope, trainable, set(optimized), companions)


def _always_trained(module: nn.Module, patterns: Patterns, trainable: set[str]) -> set[str]:
    parameters = plain_parameters(module)
    always = match_parameters(module, patterns.always_train, argument="always_train")
    for name in sorted(always):
        if not (parameters[name].dtype.is_floating_point or parameters[name].dtype.is_complex):
            raise TypeError(f"always_train matches {name}, which is {parameters[name].dtype} and cannot be trained")
    stay = [name for name in sorted(always) if name not in trainable]
    if stay:
        rank_zero_warn(f"always_train matches {len(stay)} parameter(s) that were frozen before and stay so: {stay[0]}")
    return always


def plan_of_state(
    module: nn.Module,
    state: Mapping[str, Any],
    profile: AnyProfile,
    *,
    optimized: Collection[str],
    claimed: Collection[str] = (),
) -> Plan[AnyProfile]:
    """The plan of an earlier run, from its ``trained_names``, ``selected_names`` and what else a state holds.

    Raises:
        ValueError: if the earlier run was of another model, or one of its tensors cannot train here.
    """
    parameters = plain_parameters(module)
    parts = tuple(Part.from_dict(part) for part in state.get("parts", ()))
    of_parts = {part.name: part.parameter for part in parts}
    trained: Sequence[str] = [name for name in state["trained_names"] if name not in of_parts]
    thawed = set(state.get("thawed_names", ()))
    for name in (*trained, *of_parts.values(), *sorted(thawed)):
        if name not in parameters:
            raise ValueError(f"the earlier run trained {name}, which this model has not: it is another model's")
    for name in (*trained, *of_parts.values()):
        if not parameters[name].requires_grad:
            raise ValueError(f"the earlier run trained {name}, which is frozen here (requires_grad=False): unfreeze it")
    shapes = {weight.name: weight.shape for weight in find_weights(module)}
    for row in profile:
        whole, label = split_name(row.name)
        shape = shapes.get(whole)
        if label is not None and shape is not None:
            continue
        if shape != row.shape:
            found = "missing here" if shape is None else f"{shape} here"
            raise ValueError(f"the earlier run was of another model: {row.name} is {row.shape} there and {found}")
    require_optimized({*trained, *of_parts.values()}, optimized)
    frozen = set(parameters).difference(claimed, trained)
    # Version 0.1 took everything that did not train out of the optimizers, whether or not it was frozen before.
    dropped = set(state["dropped_names"]) if "dropped_names" in state else frozen
    return Plan(
        {*trained, *of_parts},
        frozen,
        dropped,
        list(state["selected_names"]),
        profile,
        thawed=thawed,
        rates=state.get("rates"),
        parts=parts,
    )


def require_optimized(names: Collection[str], optimized: Collection[str]) -> None:
    """Make sure that some optimizer has each tensor that is to train.

    Raises:
        ValueError: if none has; the message names a tensor.
    """
    missing = sorted(set(names).difference(optimized))
    if missing:
        raise ValueError(
            f"{missing[0]} is to train, and no optimizer has it ({len(missing)} of {len(names)} tensors): give the "
            "optimizer in configure_optimizers every parameter that may train, such as self.parameters(), or leave "
            "the tensor out with exclude or include"
        )
