"""The sensitivity profile of a model: its rows, and what is done with them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from kappa_lightning.arguments import as_module, as_names
from kappa_lightning.fingerprint import fingerprint
from kappa_lightning.parts import split_into_parts
from kappa_lightning.selection import Budget
from kappa_lightning.sensitivity.choice import choose, learning_rates, predicted_forgetting, ranked, value
from kappa_lightning.sensitivity.file import read_sensitivity_file, write_sensitivity_file
from kappa_lightning.sensitivity.interactions import Matrix
from kappa_lightning.sensitivity.measure import Measurement
from kappa_lightning.sensitivity.progress import progress_bar
from kappa_lightning.sensitivity.row import SensitivityRow
from kappa_lightning.sensitivity.settings import METHODS, SensitivitySettings
from kappa_lightning.sensitivity.together import forgetting_together, least_together
from kappa_lightning.text import near_names
from kappa_lightning.weights import Weight, find_weights, included, plain_parameters
from kappa_lightning.weights.patterns import match_parameters


class SensitivityProfile:
    """Signal and sensitivity of a model's tensors for one new task, in the model's order.

    Each candidate tensor has a *signal* b, how much moving it lowers the new task's loss, and a *sensitivity* c, how
    much moving it changes what the pretrained model itself says. Tensors that learn much for what they change are worth
    training. The theory, its assumptions and what it neglects are on the page ``docs/sensitivity.md``.

    ``len(profile)``, ``for row in profile``, ``profile[name]`` and ``name in profile`` do what they say.

    Args:
        rows: the rows, with distinct names.
        settings: what they were measured with.
        interactions: of all pairs of rows what they change together,
            :func:`~kappa_lightning.sensitivity.interactions.interactions`; a choice then takes it into account.

    Raises:
        ValueError: if two rows have one name, or the pairs are not those of the rows.

    Example:
        >>> rows = [
        ...     SensitivityRow("quiet", (4, 4), signal=4.0, sensitivity=1.0, num_parameters=16),
        ...     SensitivityRow("loud", (4, 4), signal=4.0, sensitivity=9.0, num_parameters=16),
        ... ]
        >>> profile = SensitivityProfile(rows)
        >>> profile.select(num_tensors=1), profile.select()
        (['quiet'], ['quiet'])
        >>> profile.forgetting(["quiet"]), profile.forgetting(["quiet", "loud"])
        (0.0625, 0.15625)
        >>> {name: round(rate, 2) for name, rate in profile.rates().items()}
        {'quiet': 1.8, 'loud': 0.2}
    """

    def __init__(
        self,
        rows: Iterable[SensitivityRow],
        settings: SensitivitySettings | None = None,
        interactions: Matrix | None = None,
    ) -> None:
        self._rows: dict[str, SensitivityRow] = {}
        for row in rows:
            if row.name in self._rows:
                raise ValueError(f"two rows are called {row.name}")
            self._rows[row.name] = row
        self.settings = settings or SensitivitySettings()
        self.interactions = interactions
        if interactions is not None and interactions.shape != (len(self._rows), len(self._rows)):
            raise ValueError(f"interactions have shape {interactions.shape} for {len(self._rows)} rows: give all pairs")

    @classmethod
    def from_model(
        cls,
        module: nn.Module,
        batches: Iterable[Any],
        loss: Callable[[Any, Any], Tensor],
        *,
        reference: Any = "auto",
        optimizer: str = "adam",
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = ("@embeddings",),
        always_train: Sequence[str] = (),
        train_vectors: bool = False,
        draws: int = 1,
        method: str = "gradient",
        optimizers: Sequence[Optimizer] | None = None,
        steps: int = 32,
        seed: int = 0,
        progress: bool = True,
    ) -> SensitivityProfile:
        """Measure a model, which is left as it was, bit for bit.

        Args:
            module: the pretrained model; its modes are those in which it will train.
            batches: some batches of the new task (16 are enough for most), on any device.
            loss: ``loss(module, batch)`` returns the new task's loss, a scalar mean, with a graph.
            reference: what the model is asked about: ``"generated"``, ``"synthesized"``, ``"inputs"``, ``"auto"``, any
                batches, or :class:`~kappa_lightning.probes.ReferenceInputs`.
            optimizer: what will train: ``"adam"`` (and all that scale each entry's step) or ``"sgd"``.
            include: globs and groups of what is measured.
            exclude: globs and groups of what is left out of that.
            always_train: globs and groups of what will train whatever is chosen, such as a new head. It is not
                measured, and trains along on a path or in a trial.
            train_vectors: whether biases, norms and other vectors are measured, too, each by itself.
            draws: how often labels are drawn for each batch of the reference, with gradients.
            method: ``"gradient"``; ``"path"``: the signal is summed along a step of training for each batch
                (:func:`~kappa_lightning.sensitivity.path.signals_along`), and sensitivity is that along what the
                steps have moved, with what tensors change together
                (:func:`~kappa_lightning.sensitivity.interactions.interactions`); or ``"trial"``: all candidates train
                for some steps, and each one's movement is taken back in turn
                (:func:`~kappa_lightning.sensitivity.trial.margins`).
            optimizers: of a path or a trial, those that will train, with their rates; they are left as they were, too.
            steps: of a trial.
            seed: of the labels that are drawn, and of the text that the model generates.
            progress: whether to show a progress bar on standard error.

        Raises:
            TypeError: if what the model says cannot be told; the message says what to give.
            ValueError: if a pattern matches no parameter, nothing that trains is left, there is no batch, or a loss is
                no finite scalar.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
            >>> batches = [(torch.randn(16, 3), torch.randint(4, (16,))) for _ in range(4)]
            >>> def loss(net, batch):
            ...     return nn.functional.cross_entropy(net(batch[0]), batch[1])
            >>> profile = SensitivityProfile.from_model(net, batches, loss, progress=False)
            >>> [row.name for row in profile]
            ['0.weight', '2.weight']
        """
        as_module(module, "module")
        always = match_parameters(module, always_train, argument="always_train")
        candidates = included(find_weights(module), module, include, exclude)
        weights = [weight for weight in candidates if weight.is_trainable and weight.name not in always]
        if train_vectors:
            weights += [weight for weight in vectors_of(module) if weight.name not in always]
        if not weights:
            raise ValueError(
                f"no tensor to measure: include={list(include)} and exclude={list(exclude)} leave none that requires a "
                "gradient"
            )
        if method not in METHODS:
            raise ValueError(f"method={method!r} is unknown: use one of {', '.join(map(repr, METHODS))}")
        measurement = Measurement(module, weights, list(batches), loss, reference, seed)
        measured = {id(parameter) for weight in weights for parameter in weight.parameters}
        trainable = [p for name, p in plain_parameters(module).items() if name in always and p.requires_grad]
        measurement.alongside = [parameter for parameter in trainable if id(parameter) not in measured]
        if progress:
            measurement.watch = progress_bar
        if method == "gradient":
            return cls(*measurement.by_gradients(optimizer, draws))
        if optimizers is None:
            raise ValueError(f'method="{method}" trains for some steps: give optimizers=[…], those that will train')
        if method == "path":
            return cls(*measurement.by_path(optimizers))
        return cls(*measurement.by_trial(optimizers, steps))

    @property
    def optimizer(self) -> str:
        """What the signal is of: ``"adam"`` or ``"sgd"``."""
        return self.settings.optimizer

    def select(
        self,
        top_p: float | None = None,
        num_tensors: int | None = None,
        max_params: int | float | None = None,
    ) -> list[str]:
        """The names that train, the first to train first; ties are broken by name.

        Under a budget those of the largest b²/(c·n). Without one the set that minimizes Σc/(Σb)², of all sets; how many
        it holds is part of the answer. A tensor that the reference does not reach (c = 0) comes last, since nothing is
        known of what it would cost. Under gradient descent c is weighted by how much the tensor moves
        (:func:`~kappa_lightning.sensitivity.choice.mean_square_step`).

        Args:
            top_p: a share of the tensors in (0, 1].
            num_tensors: a number of tensors.
            max_params: a number of parameters if an int, a share of the measured parameters if a float.

        Raises:
            TypeError: if an argument has the wrong type.
            ValueError: if several budgets are given, one selects nothing, or nothing has a signal and a sensitivity.
        """
        given = any(limit is not None for limit in (top_p, num_tensors, max_params))
        budget = Budget(top_p=top_p, num_tensors=num_tensors, max_params=max_params) if given else None
        return self.select_within(budget)

    def select_within(self, budget: Budget | None) -> list[str]:
        """:meth:`select` under a budget that is made already."""
        if self.interactions is not None:
            return least_together(list(self), self.interactions, budget)
        return choose(list(self), budget, self.optimizer)

    def value(self, name: str) -> float:
        """b²/(c·n) of a tensor: how little each of its parameters forgets for what it learns."""
        return value(self[name], self.optimizer)

    def rank(self) -> list[SensitivityRow]:
        """The rows by falling b²/(c·n)."""
        return ranked(self, self.optimizer)

    def rates(self) -> dict[str, float]:
        """The factor of each tensor's learning rate, ∝ b/c, if all of them train.

        With these the outputs change least for what is learned, to first order, and adding tensors never hurts. A
        uniform rate and these lower the task's loss alike in the first step, so a tuned rate stays near its optimum.

        Raises:
            ValueError: if nothing has a signal and a sensitivity.
        """
        return learning_rates(list(self), self.optimizer)

    def forgetting(self, names: Iterable[str]) -> float:
        """The predicted Σc/(Σb)² of any choice, such as one by κ: what it forgets at a unit of adaptation.

        Only ratios between choices mean something: they are compared at equal adaptation, each at its own rate.

        Args:
            names: of rows.

        Returns:
            ∞ for a choice that learns nothing, or that holds a tensor that the reference does not reach.

        Raises:
            TypeError: if ``names`` is one string.
            KeyError: if a name has no row.
        """
        chosen = as_names(names, "names")
        rows = [self[name] for name in chosen]
        if self.interactions is not None:
            return forgetting_together(list(self), self.interactions, chosen)
        return predicted_forgetting(rows, self.optimizer)

    def among(self, names: Sequence[str]) -> SensitivityProfile:
        """The profile of some of the rows, in the order of their names here.

        Raises:
            TypeError: if ``names`` is one string.
            KeyError: if a name has no row.
        """
        names = as_names(names, "names")
        rows = [self[name] for name in names]
        places = {name: place for place, name in enumerate(self._rows)}
        matrix = self.interactions
        if matrix is not None:
            chosen = [places[name] for name in names]
            matrix = matrix[np.ix_(chosen, chosen)]
        return SensitivityProfile(rows, self.settings, matrix)

    def check(self, module: nn.Module) -> None:
        """Make sure that this is the profile of a module's present weights.

        Raises:
            TypeError: if ``module`` is none.
            ValueError: if a tensor is missing from the module or its content is another; the message names the first.
        """
        as_module(module, "module")
        for difference in self.differences(module):
            raise ValueError(difference)

    def differences(self, module: nn.Module) -> Iterator[str]:
        """What :meth:`check` would complain of, tensor by tensor."""
        found = find_weights(module)
        known = [*found, *split_into_parts(found, module), *vectors_of(module, trainable=False)]
        weights = {weight.name: weight for weight in known}
        for row in self:
            weight = weights.get(row.name)
            if weight is None:
                yield f"the profile was measured on a different model: it has {row.name}, which this model has not"
                continue
            dtype = str(weight.dtype).removeprefix("torch.")
            if (weight.shape, dtype) != (row.shape, row.dtype):
                yield (
                    f"the profile was measured on a different model: {row.name} is {dtype} of shape {weight.shape} "
                    f"here and {row.dtype} of shape {row.shape} in the profile"
                )
            elif row.fingerprint and row.fingerprint not in (weight.fingerprint(), fingerprint(weight.read())):
                yield f"the profile is of other weights: the content of {row.name} differs; measure a new profile"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile to a JSON file, atomically and with a checksum."""
        write_sensitivity_file(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SensitivityProfile:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            IsADirectoryError: if it is a folder.
            ValueError: if the file is truncated, was changed, is no such profile, or comes from another version.
        """
        content = read_sensitivity_file(path)
        try:
            return cls.from_dict(content)
        except ValueError as error:
            raise ValueError(f"{path} is a damaged profile: {error}; measure it again") from error

    def to_dict(self) -> dict[str, Any]:
        """The profile as plain lists, numbers and strings, for a checkpoint or a file."""
        state: dict[str, Any] = {"settings": self.settings.to_dict(), "rows": [row.to_dict() for row in self]}
        if self.interactions is not None:
            state["interactions"] = self.interactions.tolist()
        return state

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> SensitivityProfile:
        """The inverse of :meth:`to_dict`."""
        if not isinstance(state["rows"], list):
            raise ValueError(f"its rows are a {type(state['rows']).__name__}, not a list")
        rows = [SensitivityRow.from_dict(entry) for entry in state["rows"]]
        return cls(
            rows, SensitivitySettings.from_dict(state["settings"]), _matrix_of(state.get("interactions"), len(rows))
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[SensitivityRow]:
        return iter(self._rows.values())

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __getitem__(self, name: str) -> SensitivityRow:
        if name not in self._rows:
            raise KeyError(f"the profile has no row for {name}{near_names(name, self._rows)}")
        return self._rows[name]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SensitivityProfile) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"SensitivityProfile({len(self)} tensors, {self.settings.optimizer}, {self.settings.method})"


def _matrix_of(entries: Any, count: int) -> Matrix | None:
    if entries is None:
        return None
    try:
        matrix = np.array(entries, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError("its interactions are no matrix of numbers") from error
    if matrix.shape != (count, count) or not np.isfinite(matrix).all():
        raise ValueError(f"its interactions are no finite matrix of {count} by {count}")
    return matrix


def vectors_of(module: nn.Module, *, trainable: bool = True) -> list[Weight]:
    """The parameters of a module that are no matrices (biases, norms), each as a weight.

    Args:
        module: any module.
        trainable: whether only those that require a gradient.
    """
    taken = {id(parameter) for weight in find_weights(module) for parameter in weight.parameters}
    found = []
    for name, parameter in plain_parameters(module).items():
        if id(parameter) not in taken and parameter.is_floating_point() and (parameter.requires_grad or not trainable):
            read = parameter.detach
            found.append(Weight(name, tuple(parameter.shape), parameter.dtype, read, _as_row, parameter))
    return found


def _as_row(weight: Tensor) -> Tensor:
    return weight.reshape(1, 1, -1)
