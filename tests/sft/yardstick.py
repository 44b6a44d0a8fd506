"""The loss of a batch with router losses, and its gradients, computed another way than the trainer does.

One forward of the whole batch. What the routers do is read by hooks on the families' own classes, and every formula is
written out again in loops over layers, tokens and experts, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.sft.runs import Batch, gradients

# How a family's logits become scores, and what its router is called.
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "Qwen3MoeTopKRouter": lambda logits: logits.double().softmax(-1),
    "DeepseekV3TopkRouter": lambda logits: logits.double().sigmoid(),
}


# Class of the router, logits ``(T, E)``, chosen experts ``(T, K)``.
Seen = tuple[str, Tensor, Tensor]


def expected(model: Any, batch: Batch, coefficients: Mapping[str, float]) -> tuple[float, Batch]:
    """Loss and gradients of one batch.

    Args:
        model: with its adapter; without dropout, or nothing could be compared.
        batch: with padding.
        coefficients: of ``load_balancing``, ``z_loss`` and ``drift_kl``.
    """
    model.zero_grad()
    with torch.no_grad(), model.disable_adapter():
        _, base = _forward(model, batch)
    logits, now = _forward(model, batch)
    loss = _cross_entropy(logits, batch["labels"])
    kept = batch["attention_mask"].flatten().bool()
    for name, coefficient in coefficients.items():
        layers = [_LOSSES[name](*routing, kept, before[1]) for routing, before in zip(now, base, strict=True)]
        loss = loss + coefficient * torch.stack(layers).mean()
    loss.backward()
    found = gradients(model)
    model.zero_grad()
    return loss.item(), found


def _forward(model: Any, batch: Batch) -> tuple[Tensor, list[Seen]]:
    seen: list[Seen] = []

    def record(module: Any, args: Any, output: Any) -> None:
        seen.append((_name(module), output[0], output[2]))

    handles = [module.register_forward_hook(record) for module in model.modules() if _name(module) in SCORES]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    for handle in handles:
        handle.remove()
    # A router that is trained in full stands there twice, and one of the two runs.
    assert len(seen) == model.config.num_hidden_layers - getattr(model.config, "first_k_dense_replace", 0)
    return logits, seen


def _name(module: Any) -> str:
    # torch derives a class of its own from one whose weight PEFT has parametrized.
    return type(module).__name__.removeprefix("Parametrized")


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    predicted, wanted = logits[:, :-1].double().flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(predicted, wanted, ignore_index=-100)


def _load_balancing(router: str, logits: Tensor, index: Tensor, kept: Tensor, base: Tensor) -> Tensor:
    num_experts = logits.shape[-1]
    shares = [0.0] * num_experts
    mean = [torch.zeros((), dtype=torch.float64)] * num_experts
    tokens = int(kept.sum())
    for token in kept.nonzero().flatten().tolist():
        scores = SCORES[router](logits[token])
        for expert in range(num_experts):
            mean[expert] = mean[expert] + scores[expert] / scores.sum() / tokens
        for expert in index[token].tolist():
            shares[expert] += 1 / tokens
    return num_experts * torch.stack([share * part for share, part in zip(shares, mean, strict=True)]).sum()


def _z_loss(router: str, logits: Tensor, index: Tensor, kept: Tensor, base: Tensor) -> Tensor:
    return torch.stack([row.double().exp().sum().log() ** 2 for row in logits[kept]]).mean()


def _drift_kl(router: str, logits: Tensor, index: Tensor, kept: Tensor, base: Tensor) -> Tensor:
    terms = []
    for token in kept.nonzero().flatten().tolist():
        before, now = SCORES[router](base[token]), SCORES[router](logits[token])
        before, now = before / before.sum(), now / now.sum()
        terms.append(sum(p * (p.log() - q.log()) for p, q in zip(before, now, strict=True)))
    return torch.stack(terms).mean()


_LOSSES = {"load_balancing": _load_balancing, "z_loss": _z_loss, "drift_kl": _drift_kl}
