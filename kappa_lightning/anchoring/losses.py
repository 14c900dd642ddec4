"""How far a model's outputs are from those of the pretrained one, with a gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

_ROWS = 1024
"""Rows at a time, since a vocabulary of 100,000 makes a float32 copy of a batch's logits many gigabytes."""

Reference = dict[str, Tensor]


def kl_from_logits(pretrained: Tensor, logits: Tensor, excluded: Tensor | None = None) -> Tensor:
    """KL(p ‖ q) = Σ p ln(p/q) of each present distribution q from the pretrained p, with a gradient for q.

    Args:
        pretrained: logits of p, shape (n, classes).
        logits: those of q, same shape.
        excluded: shape (n,): a class for each row that is taken out of both distributions, which are normalized over
            the rest, so that a target may become as likely as the task wants; −1 for none.

    Returns:
        Shape (n,), nats, float32 or better.

    Example:
        >>> import torch
        >>> p, q = torch.tensor([[0.25, 0.25, 0.5]]).log(), torch.tensor([[0.05, 0.05, 0.9]]).log()
        >>> kl_from_logits(p, q).item() > 0.3, abs(kl_from_logits(p, q, torch.tensor([2])).item()) < 1e-6
        (True, True)
    """
    if excluded is None:
        return _by_rows(_kl, pretrained, logits)
    return _by_rows(_kl_without, pretrained, logits, excluded)


def kl_from_reference(reference: Reference, logits: Tensor) -> Tensor:
    """The same from recorded distributions, whole or of their likeliest classes, with a gradient for q.

    It is the quantity of :func:`kappa_lightning.probes.distributions.divergence`, whose reference this takes.

    Args:
        reference: n distributions: ``log_p`` of shape (n, classes), or ``log_p`` and ``tokens`` of shape (n, k) and
            ``log_rest`` of shape (n,).
        logits: shape (n, classes).

    Returns:
        Shape (n,), nats, float32.
    """
    kept = {name: tensor.to(logits.device, non_blocking=True) for name, tensor in reference.items()}
    if "tokens" not in kept:
        return _by_rows(_kl_from_log, kept["log_p"], logits)
    return _by_rows(_kl_of_likeliest, kept["log_p"], logits, kept["tokens"], kept["log_rest"])


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """−ln q(target) of each row, in nats.

    Args:
        logits: shape (n, classes).
        targets: shape (n,).
    """
    return _by_rows(_cross_entropy, logits, logits, targets)


def _by_rows(function: object, first: Tensor, logits: Tensor, *rest: Tensor) -> Tensor:
    """Apply a function of rows to some rows at a time, and compute the pass anew for the gradient of each part."""
    assert callable(function)
    if len(logits) <= _ROWS:
        return function(first, logits, *rest)  # type: ignore[no-any-return]
    parts = zip(*(torch.split(tensor, _ROWS) for tensor in (first, logits, *rest)), strict=True)
    if torch.is_grad_enabled() and logits.requires_grad:
        return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts])
    return torch.cat([function(*part) for part in parts])


def _kl(pretrained: Tensor, logits: Tensor) -> Tensor:
    return _kl_from_log(_wide(pretrained).log_softmax(-1), logits)


def _kl_from_log(log_p: Tensor, logits: Tensor) -> Tensor:
    return _sum(log_p, _wide(logits).log_softmax(-1))


def _kl_without(pretrained: Tensor, logits: Tensor, excluded: Tensor) -> Tensor:
    mask = functional.one_hot(excluded.clamp_min(0).long(), logits.shape[-1]).bool() & (excluded >= 0)[:, None]
    p, q = (_wide(scores).masked_fill(mask, -torch.inf).log_softmax(-1) for scores in (pretrained, logits))
    # What is excluded has no part in the sum, and −∞ − (−∞) would have no gradient.
    return _sum(p.masked_fill(mask, 0), q.masked_fill(mask, 0), mask)


def _kl_of_likeliest(log_p: Tensor, logits: Tensor, tokens: Tensor, log_rest: Tensor) -> Tensor:
    log_q = _wide(logits).log_softmax(-1)
    tokens = tokens.long()
    rest = log_q.scatter(-1, tokens, -torch.inf).logsumexp(-1)
    return _sum(log_p, log_q.gather(-1, tokens)) + _sum(log_rest[:, None], rest[:, None])


def _sum(log_p: Tensor, log_q: Tensor, without: Tensor | None = None) -> Tensor:
    impossible = log_p == -torch.inf
    if without is not None:
        impossible = impossible | without
    # 0 · ln 0 is 0 by continuity; filled before the product, where an infinity would spoil the gradient.
    return (
        (log_p.exp() * (log_p.masked_fill(impossible, 0) - log_q.masked_fill(impossible, 0)))
        .masked_fill(impossible, 0)
        .sum(-1)
    )


def _cross_entropy(_: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(_wide(logits), targets.long(), reduction="none")


def _wide(logits: Tensor) -> Tensor:
    """In float32 or better."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
