"""Run a model over data and see how much each of its experts is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.profiles.fingerprint import fingerprint
from trl_moe_ext.profiles.profile import ExpertProfile, LayerUse
from trl_moe_ext.profiles.use import UseStatistics
from trl_moe_ext.router.passes import as_it_was, forked_rng, routing_options
from trl_moe_ext.router.places import read_places
from trl_moe_ext.router.routers import Router, find_routers, routers_left_out
from trl_moe_ext.router.statistics import added
from trl_moe_ext.router.trace import RouterTrace, Routing

__all__ = ["NOT_REACHED", "measure_profile", "require_routers"]

NOT_REACHED = "no token of the data reached their router"


def measure_profile(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    tokens: int | None = None,
    *,
    name: str = "",
    dataset: str = "",
    on_batch: Callable[[int], None] | None = None,
) -> ExpertProfile:
    """How much each expert of a model is used on some batches.

    The model runs in evaluation mode, with the adapters that are active. Afterwards it is as it was: modes, hooks,
    and the state of the random number generators.

    Args:
        model: with or without adapters.
        batches: arguments of its forward, on the CPU. ``attention_mask`` ``(B, L)`` tells padding; in an
            encoder-decoder, ``decoder_attention_mask`` that of the decoder. Batches that are not needed are not asked
            for.
        tokens: how many tokens count at most. Of the last batch the first ones do, row by row.
        name: of the model, for the profile.
        dataset: what the batches are of, for the profile.
        on_batch: called after each batch with the number of tokens so far.

    Raises:
        ConfigError: the model has no routed experts, or the batches have no tokens.
        LayoutError: the routing of the model cannot be read.
    """
    routers = require_routers(model, name)
    counted = 0
    with _Meter(model, routers) as meter, _evaluating(model):
        for batch in batches:
            counted += meter.run(batch, None if tokens is None else tokens - counted)
            if on_batch is not None:
                on_batch(counted)
            if tokens is not None and counted >= tokens:
                break
    return _profile(model, routers, meter.sums, name=name, dataset=dataset, tokens=counted)


def require_routers(model: nn.Module, name: str) -> list[Router]:
    """The routers of a model, which may be on the meta device.

    Raises:
        ConfigError: it has none.
    """
    routers = find_routers(model)
    if routers:
        return routers
    what = f"{name} ({type(read_places(model)[''].module).__name__})"
    reasons = "; ".join(sorted({*routers_left_out(model).values()}))
    if reasons:
        raise ConfigError(f"the model {what} has no router whose choice could be measured: {reasons}")
    raise ConfigError(f"the model {what} is dense: it has no routed experts to profile. Give a mixture of experts")


class _Meter:
    """Forwards of a model, and what its routers did in them.

    Attributes:
        sums: by the labels of the routers.
    """

    def __init__(self, model: nn.Module, routers: Sequence[Router]) -> None:
        self.sums: dict[str, UseStatistics] = {}
        self._model = model
        self._device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
        is_decoder = {router.name: _is_in_decoder(model, router) for router in routers}
        self._trace = RouterTrace([r for r in routers if not is_decoder[r.name]], self._add)
        # Of an encoder-decoder: its tokens are others, with padding of their own.
        self._decoder_trace = RouterTrace([r for r in routers if is_decoder[r.name]], self._add)

    def __enter__(self) -> _Meter:
        self._trace.attach()
        self._decoder_trace.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        self._trace.remove()
        self._decoder_trace.remove()

    @torch.no_grad()
    def run(self, batch: Mapping[str, Tensor], limit: int | None) -> int:
        """One forward; how many tokens of it counted, `limit` at most. Zero if the batch is not one of texts."""
        kept = _kept(batch, limit)
        self._trace.kept = None if kept is None else kept.to(self._device)
        self._decoder_trace.kept = batch.get("decoder_attention_mask")
        self._model(
            **{key: value.to(self._device) for key, value in batch.items()}, **routing_options(self._model, batch)
        )
        return 0 if kept is None else int(kept.sum())

    def _add(self, routing: Routing) -> None:
        self.sums = added(self.sums, {routing.router.label: UseStatistics.of(routing)})


def _kept(batch: Mapping[str, Tensor], limit: int | None) -> Tensor | None:
    """``(B, L)`` bool: the tokens that count; None for a batch without token ids or a mask."""
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if mask is None and ids is None:
        return None
    kept = mask.bool() if mask is not None else torch.ones_like(ids, dtype=torch.bool)  # type: ignore[arg-type]
    return kept if limit is None else kept & (kept.flatten().cumsum(0).view_as(kept) <= limit)


def _is_in_decoder(model: Any, router: Router) -> bool:
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) and "decoder" in router.name.split(".")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and a fixed seed inside; modes and random number generators are the same afterwards."""
    with forked_rng(model), as_it_was(model):
        torch.manual_seed(0)
        model.eval()
        yield


def _profile(
    model: nn.Module, routers: Sequence[Router], sums: Mapping[str, UseStatistics], **facts: Any
) -> ExpertProfile:
    places = read_places(model)
    reached = [router for router in routers if router.label in sums and sums[router.label].tokens > 0]
    if not reached:
        raise ConfigError(f"no router of the model saw a token; {facts['dataset'] or 'the data'} is empty")
    layers = tuple(_layer(router, sums[router.label], fingerprint(places, router.name)) for router in reached)
    unreached = {experts: NOT_REACHED for router in routers if router not in reached for experts in router.all_experts}
    facts["tokens"] = facts["tokens"] or max(layer.tokens for layer in layers)
    return ExpertProfile(
        model=facts.pop("name"),
        architecture=type(places[""].module).__name__,
        layers=layers,
        left_out=routers_left_out(model) | unreached,
        **facts,
    )


def _layer(router: Router, sums: UseStatistics, numbers: tuple[float, ...]) -> LayerUse:
    tokens, counts, weights = sums.tokens.item(), sums.counts.tolist(), sums.weights.tolist()
    if not all(map(math.isfinite, weights)):
        raise ConfigError(
            f"the weights that the router {router.name} gives to its experts are not finite; run the model in "
            "float32 or bfloat16"
        )
    choices = sum(counts)
    return LayerUse(
        label=router.label,
        router=router.name,
        experts=router.all_experts,
        top_k=router.top_k,
        tokens=int(tokens),
        token_share=tuple(count / choices if choices else 0.0 for count in counts),
        gate_score=tuple(weight / tokens for weight in weights),
        fingerprint=numbers,
    )
