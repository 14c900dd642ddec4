"""What every freeze callback does, whatever it chooses by: freezing, optimizers, strategies, resume, reports."""

from __future__ import annotations

import os
import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Generic

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from kappa_lightning.arguments import as_bool, as_globs, describe
from kappa_lightning.callbacks.frozen import Freeze, frozen_earlier, thawed
from kappa_lightning.callbacks.keyed import Keyed
from kappa_lightning.callbacks.order import move_before
from kappa_lightning.callbacks.plan import AnyProfile, Choice, Plan
from kappa_lightning.callbacks.planner import Patterns, find_candidates, plan_of_state
from kappa_lightning.callbacks.reporting import log_text
from kappa_lightning.callbacks.resume import Runs, Start
from kappa_lightning.callbacks.trainer import callbacks_of, saves_on_exception
from kappa_lightning.processes import Processes
from kappa_lightning.strategies import adapter_for, optimized
from kappa_lightning.tables import training_table
from kappa_lightning.weights import Weight, check_patterns, plain_parameters

# What most leave out, which keeps the keys of checkpoints short.
_EMBEDDINGS = ("@embeddings",)


class FreezeCallback(Keyed, Generic[AnyProfile]):
    """Choose tensors when fit starts, train only these, and freeze all others. A base: a subclass says how to choose.

    A subclass defines

    - :meth:`choose`, which gets the candidates and returns a :class:`~kappa_lightning.callbacks.plan.Choice`: the
      selected names, a profile of all candidates (whatever it was chosen by) and, if tensors are to train at rates of
      their own, a factor for each;
    - :meth:`profile_from_dict`, which makes that profile from what its ``to_dict()`` gave, plain Python values that a
      checkpoint holds;
    - :meth:`arguments`, the plain values that the choice depends on; a resume compares them and says what it ignores;
    - :meth:`ranking`, the Markdown table that TensorBoard gets, and its tag;
    - ``label``, what the candidates were ranked by, for the table, and :meth:`figures`, what it gives a range of;
      :meth:`title`, if it says more.

    Everything else is done here. Whatever :meth:`choose` raises is raised by ``fit``, with the module, the optimizers
    and the callback's attributes as they were. It is not called on a resume or if ``fit`` is called once more: then the
    earlier choice holds.

    Several freeze callbacks may work in one Trainer if no parameter is claimed by two: each claims what ``include``
    matches and ``exclude`` does not, and what ``always_train`` matches. What none claims is frozen.

    Args:
        include: globs of the candidates.
        exclude: globs of what is no candidate, and therefore frozen.
        always_train: globs of what trains whatever is chosen.
        train_vectors: whether all vectors train, too.

    Attributes:
        profile: what the subclass chose by, after fit start.
        trained_names: the names of all parameters that train, in the model's order.
        frozen_names: the names of all other parameters (but what another freeze callback is in charge of).
        selected_names: the candidates that were selected, the first to train first.
        rates: factors of learning rates by name, or ``None``.
    """

    def __init__(
        self,
        *,
        include: Sequence[str],
        exclude: Sequence[str],
        always_train: Sequence[str],
        train_vectors: bool,
    ) -> None:
        super().__init__()
        self.include = check_patterns(as_globs(include, "include"), argument="include")
        self.exclude = check_patterns(as_globs(exclude, "exclude"), argument="exclude")
        self.always_train = check_patterns(as_globs(always_train, "always_train"), argument="always_train")
        self.train_vectors = as_bool(train_vectors, "train_vectors")
        if not self.include:
            raise ValueError("include=() leaves nothing to train: give at least one glob")
        self.profile: AnyProfile | None = None
        self.trained_names: list[str] = []
        self.frozen_names: list[str] = []
        self.selected_names: list[str] = []
        self.rates: dict[str, float] | None = None
        self._runs = Runs()
        self._freeze: Freeze | None = None
        self._plan: Plan[AnyProfile] | None = None
        self._names: list[str] = []
        self._released = False
        self._fit: weakref.ref[pl.Trainer] | None = None
        self._first_step = 0
        self._numbering = "optimizer"
        self._without_gradient: dict[str, nn.Parameter] = {}
        self._saw_gradients = False
        self._warned = False

    # What a subclass says

    def choose(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        candidates: Sequence[Weight],
        alongside: Collection[str],
        processes: Processes,
    ) -> Choice[AnyProfile]:
        """Choose what trains. Called in ``on_fit_start``, by all processes together, before anything is changed.

        The weights are on their device and a checkpoint's are loaded, the optimizers exist, and DDP or FSDP2 has
        wrapped or sharded the module. ``requires_grad`` is as the user left it: what a freeze callback froze in an
        earlier fit requires a gradient again (and no longer if this raises). Leave the module, the optimizers, the
        random numbers and the dataloaders as they are. The choice must be the same on all processes, which is checked.

        Args:
            trainer: whose fit begins.
            module: what it trains.
            candidates: the matrices that may be chosen, at least one; each requires a gradient.
            alongside: the names of the parameters that train whatever is chosen.
            processes: who takes part.
        """
        raise NotImplementedError

    def profile_from_dict(self, state: dict[str, Any]) -> AnyProfile:
        """The profile whose ``to_dict()`` gave this."""
        raise NotImplementedError

    def arguments(self) -> dict[str, Any]:
        """The arguments of the subclass that the choice depends on, as plain values."""
        raise NotImplementedError

    def ranking(self, plan: Plan[AnyProfile]) -> tuple[str, str]:
        """The tag of a text in TensorBoard, and the text: the candidates from the first to train to the last."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """What the candidates are ranked by, as the table says it."""
        raise NotImplementedError

    def figures(self, plan: Plan[AnyProfile]) -> tuple[str, dict[str, float]]:
        """What the table gives a range of, and that of each candidate by name; by default nothing."""
        return "", {}

    def title(self, plan: Plan[AnyProfile]) -> str:
        """What stands over the table of what trains."""
        return repr(self)

    # What it does, in the order of Lightning's hooks

    @property
    @override
    def own_key(self) -> str:
        """The key of the callback's state in a checkpoint; it tells those apart that train parts of one model."""
        kind = type(self).__qualname__
        given = {} if self.include == ("*",) else {"include": list(self.include)}
        if self.exclude not in ((), _EMBEDDINGS):
            given["exclude"] = list(self.exclude)
        return f"{kind}{given!r}" if given else kind

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        adapter_for(trainer)  # which refuses a strategy before it has moved or wrapped anything
        move_before(trainer, self, ModelSummary)
        self._runs.announced()

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Called before load_state_dict, and also if the checkpoint has no state of this callback.
        self._runs.opened(checkpoint)
        states = checkpoint.get("callbacks", {})
        if self.state_key in states:
            return
        # Of a run with another ``include`` or ``exclude``, or of version 0.1, which had one key for all.
        kind, ours = type(self).__qualname__, {other.state_key for other in callbacks_of(trainer, FreezeCallback)}
        keys = [key for key in states if str(key).partition("{")[0] == kind and key not in ours]
        if len(keys) == 1:
            self.load_state_dict(states[keys[0]])

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._runs.loaded(state_dict)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        adapter = adapter_for(trainer)
        processes = adapter.processes(trainer)
        checkpoint = adapter.checkpoint_path(trainer, self)
        start = self._runs.start(trainer, pl_module, checkpoint)
        claimed = self._claims_of_others(trainer, pl_module)
        parameters = plain_parameters(pl_module)
        running = [callback for callback in callbacks_of(trainer, FreezeCallback) if callback._fit is not None]
        earlier = frozen_earlier(pl_module, [name for name in parameters if name not in claimed], running)
        with thawed(earlier):
            plan = self._make_plan(trainer, pl_module, start, checkpoint, claimed, processes)
            plan.require_same(processes)
            if start is Start.RESUMED:
                saved = (self._runs.state or {}).get("optimizer_numbering", "optimizer")
                adapter.require_numbering(trainer, saved, set(parameters) - plan.dropped)
            self._freeze = Freeze(trainer, pl_module, adapter, plan, self)
        if earlier and start in (Start.FRESH, Start.AGAIN) and not self._runs.is_of(pl_module):
            rank_zero_info(
                f"{type(self).__name__}: an earlier freeze callback had frozen {len(earlier)} parameter(s) of this "
                "module, which count as trainable again"
            )
        parameters = plain_parameters(pl_module)  # with those of parts that train
        self._plan, self._names, self._released = plan, list(parameters), False
        self.profile, self.selected_names, self.rates = plan.profile, plan.selected, plan.rates
        self.trained_names = [name for name in parameters if name in plan.trained | plan.thawed]
        self.frozen_names = [name for name in parameters if name in plan.frozen - plan.thawed]
        self._without_gradient = {name: parameters[name] for name in plan.selected if name in plan.trained}
        self._saw_gradients = self._warned = False
        self._runs.begun(pl_module)
        self._first_step = trainer.global_step
        self._numbering = adapter.numbering(trainer)
        self._fit = weakref.ref(trainer)
        self._report(trainer, pl_module, plan)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self._follow()

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if not loss.requires_grad:
            if not self.trained_names:
                raise ValueError(
                    f"the loss has no gradient: every tensor that {type(self).__name__} let train "
                    f"({next(iter(self.selected_names), 'what always_train names')} first) has been frozen since, by "
                    "the module or by another callback"
                )
            raise ValueError(
                f"the loss has no gradient: none of the {len(self.trained_names)} tensors that train takes part in it "
                f"({self.trained_names[0]} first). Choose others with include, or name in always_train what does"
            )

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saw_gradients = True
        if self._without_gradient:
            self._without_gradient = {name: p for name, p in self._without_gradient.items() if p.grad is None}

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._without_gradient and self._saw_gradients:
            rank_zero_warn(
                f"{len(self._without_gradient)} of the {len(self.selected_names)} selected tensors got no gradient in "
                f"an epoch, {next(iter(self._without_gradient))} first, and did not train: the module does not use "
                "them for its loss, or under torch.no_grad()"
            )
        self._without_gradient = {}

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._follow()
        self._end_fit()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        fitting = self._fit is not None
        # What wraps the module is about to go, and the other processes may not be there to make it anew.
        self._end_fit()
        if not fitting or self._freeze is None:
            return
        if trainer.global_step == self._first_step and not saves_on_exception(trainer):
            self._freeze.undo()
            self._freeze = self._plan = None
        else:
            # A checkpoint that is saved on this exception needs the optimizers as they trained.
            self._freeze.thaw()

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._runs.announced_only or self._plan is None:
            return self._runs.to_save()
        self._follow()
        return {
            "arguments": self.all_arguments(),
            "optimizer_numbering": self._numbering,
            "profile": self._plan.profile.to_dict(),
            **self._decided(self._plan, self._released),
            "thawed_names": [name for name in self.trained_names if name not in self._plan.trained],
        }

    def unfreeze(self) -> None:
        """Give every parameter that this callback froze its ``requires_grad`` back, and its place in the optimizers."""
        if self._freeze is None:
            return
        self._freeze.undo()
        self._freeze.rewrap()
        self._released = True
        self._follow()

    @override
    def __repr__(self) -> str:
        return describe(self, self.all_arguments())

    def __getstate__(self) -> dict[str, Any]:
        # What refers to one process' objects stays out of a copy and of what a spawned process gets.
        return self.__dict__ | {"_freeze": None, "_fit": None, "_without_gradient": {}}

    # Parts of the hooks

    def all_arguments(self) -> dict[str, Any]:
        """The arguments that the choice depends on, the patterns among them, as plain values."""
        patterns = {"include": self.include, "exclude": self.exclude, "always_train": self.always_train}
        return {
            **self.arguments(),
            **{name: list(globs) for name, globs in patterns.items()},
            "train_vectors": self.train_vectors,
        }

    @property
    def _patterns(self) -> Patterns:
        return Patterns(self.include, self.exclude, self.always_train, self.train_vectors)

    def _claims_of_others(self, trainer: pl.Trainer, module: nn.Module) -> set[str]:
        """The names of the parameters that other freeze callbacks of the Trainer are in charge of."""
        others = [callback for callback in callbacks_of(trainer, FreezeCallback) if callback is not self]
        claimed: set[str] = set()
        for other in others:
            theirs = other._patterns.claims(module)
            both = self._patterns.claims(module) & theirs
            if both:
                raise ValueError(
                    f"two freeze callbacks, {self!r} and {other!r}, both decide on {min(both)} ({len(both)} parameters "
                    "in all): give them patterns of include and exclude that share none"
                )
            claimed |= theirs
        return claimed

    def _make_plan(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        start: Start,
        checkpoint: str | os.PathLike[str] | None,
        claimed: set[str],
        processes: Processes,
    ) -> Plan[AnyProfile]:
        ids = optimized(trainer.optimizers)
        names = {name for name, parameter in plain_parameters(module).items() if id(parameter) in ids}
        if start is Start.WITHOUT_STATE:
            raise ValueError(
                f"{checkpoint} was saved without {type(self).__name__} and holds no selection. To go on with that "
                "run, leave the callback out; to start a new one from its weights, load them into the module "
                "(load_state_dict) and call fit without ckpt_path"
            )
        if start is Start.RESUMED:
            state = self._runs.state
            assert state is not None
            self._warn_of_ignored(state["arguments"])
            profile = self.profile_from_dict(state["profile"])
            return plan_of_state(module, state, profile, optimized=names, claimed=claimed)
        if start is Start.CONTINUED and self._plan is not None:
            # The weights are trained by now and have no say any longer.
            earlier = self._decided(self._plan, released=False)
            return plan_of_state(module, earlier, self._plan.profile, optimized=names, claimed=claimed)
        candidates = find_candidates(module, self._patterns, optimized=names, claimed=claimed)
        return candidates.plan(self.choose(trainer, module, candidates.weights, candidates.alongside, processes))

    def _decided(self, plan: Plan[AnyProfile], released: bool) -> dict[str, Any]:
        """What a plan decided, as plain values; once released, everything that it took out trains."""
        trained = plan.trained | plan.dropped if released else plan.trained
        if released:
            trained = trained - {part.name for part in plan.parts}
        return {
            "trained_names": [name for name in self._names if name in trained],
            "selected_names": list(plan.selected),
            "dropped_names": [] if released else [name for name in self._names if name in plan.dropped],
            "parts": [] if released else [part.to_dict() for part in plan.parts],
            "rates": None if released or plan.rates is None else dict(plan.rates),
        }

    def _warn_of_ignored(self, saved: Mapping[str, Any]) -> None:
        now = self.all_arguments()
        ignored = [key for key in now if key in saved and now[key] != saved[key]]
        if ignored:
            differences = ", ".join(f"{key}={now[key]!r} (checkpoint: {saved[key]!r})" for key in ignored)
            rank_zero_warn(
                f"{type(self).__name__} resumes with the selection of the checkpoint; ignored: {differences}"
            )

    def _follow(self) -> None:
        """Take in what somebody else has thawed or frozen since the fit began."""
        trainer = None if self._fit is None else self._fit()
        if trainer is None or self._plan is None:
            return
        parameters, ids = plain_parameters(trainer.lightning_module), optimized(trainer.optimizers)
        scope = self._plan.trained | self._plan.frozen
        needing = [name for name in parameters if name in scope and parameters[name].requires_grad]
        trained = {name for name in needing if id(parameters[name]) in ids}
        self.trained_names = [name for name in parameters if name in trained]
        self.frozen_names = [name for name in parameters if name in scope - trained]
        homeless = [name for name in needing if name in self._plan.dropped - trained]
        if homeless and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"{homeless[0]} requires a gradient again ({len(homeless)} tensors), and no optimizer has it since "
                f"{type(self).__name__} took it out: call the callback's unfreeze(), or add it to an optimizer"
            )

    def _end_fit(self) -> None:
        self._runs.ended()
        self._fit = None
        self._without_gradient = {}
        if self._freeze is not None:
            self._freeze.fit_ended()

    def _report(self, trainer: pl.Trainer, module: pl.LightningModule, plan: Plan[AnyProfile]) -> None:
        if not trainer.barebones:
            figure, each = self.figures(plan)
            groups = plan.groups(module, label=self.label, train_vectors=self.train_vectors, figures=each)
            rank_zero_info(training_table(groups, title=self.title(plan), figure=figure))
        log_text(trainer, *self.ranking(plan))
