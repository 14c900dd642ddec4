"""Next-token distributions: what is kept of them, and the divergence from them."""

from __future__ import annotations

import torch
from torch import Tensor

_TOKENS = 1024
"""Rows at a time, since a vocabulary of 100,000 makes a float32 copy of a batch's logits many gigabytes."""


def describe(logits: Tensor, top_k: int | None = None) -> dict[str, Tensor]:
    """The distributions of some logits, whole or only their likeliest tokens.

    Args:
        logits: shape (n, vocabulary).
        top_k: how many tokens are kept of each; all of them if ``None`` or not less than the vocabulary.

    Returns:
        On the CPU, natural logarithms in float32: ``log_p`` of shape (n, vocabulary), or ``log_p`` and ``tokens``
        (int32) of shape (n, top_k) and ``log_rest`` of shape (n,), the mass of all other tokens.
    """
    if top_k is None or top_k >= logits.shape[-1]:
        return {"log_p": torch.cat([part.float().log_softmax(-1).cpu() for part in torch.split(logits, _TOKENS)])}
    parts = []
    for part in torch.split(logits, _TOKENS):
        log_p = part.float().log_softmax(-1)
        top, tokens = log_p.topk(top_k, dim=-1)
        parts.append((top.cpu(), tokens.to(torch.int32).cpu(), _log_rest(log_p, tokens).cpu()))
    top, tokens, rest = (torch.cat(kept) for kept in zip(*parts, strict=True))
    return {"log_p": top, "tokens": tokens, "log_rest": rest}


def divergence(reference: dict[str, Tensor], logits: Tensor) -> Tensor:
    """The Kullback–Leibler divergence KL(p ‖ q) = Σ p ln(p/q) of each distribution q from its reference p.

    From a reference of the likeliest tokens it is the divergence between distributions in which all other tokens
    count as one. That is exact for these, and at most the divergence of the whole ones (the log-sum inequality: Cover
    & Thomas, Elements of Information Theory, theorem 2.7.1).

    Args:
        reference: n distributions p, from :func:`describe`.
        logits: those of q, shape (n, vocabulary).

    Returns:
        Shape (n,), in nats, float32, where the logits are; ∞ if q excludes what p allows.

    Example:
        >>> import torch
        >>> p = describe(torch.tensor([[0.5, 0.25, 0.25]]).log())
        >>> divergence(p, torch.tensor([[0.25, 0.5, 0.25]]).log()).item() / torch.log(torch.tensor(2.0)).item()
        0.25
    """
    nats = []
    kept = {name: torch.split(tensor, _TOKENS) for name, tensor in reference.items()}
    for number, part in enumerate(torch.split(logits, _TOKENS)):
        log_q = part.float().log_softmax(-1)
        log_p = kept["log_p"][number].to(log_q.device)
        if "tokens" not in kept:
            nats.append(_sum_over_tokens(log_p, log_q))
            continue
        tokens = kept["tokens"][number].to(log_q.device, torch.int64)
        rest = kept["log_rest"][number].to(log_q.device)
        total = _sum_over_tokens(log_p, log_q.gather(-1, tokens))
        nats.append(total + _sum_over_tokens(rest[:, None], _log_rest(log_q, tokens)[:, None]))
    # Rounding takes the divergence of equal distributions a little below zero.
    return torch.cat(nats).clamp_min(0)


def _sum_over_tokens(log_p: Tensor, log_q: Tensor) -> Tensor:
    terms = log_p.exp() * (log_p - log_q)
    # 0 · ln 0 is 0 by continuity.
    return terms.masked_fill(log_p == -torch.inf, 0).sum(-1)


def _log_rest(log_p: Tensor, tokens: Tensor) -> Tensor:
    return log_p.scatter(-1, tokens, -torch.inf).logsumexp(-1)
