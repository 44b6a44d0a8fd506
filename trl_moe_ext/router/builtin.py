"""The router losses that come with the package, registered through the hook that third parties use."""

from __future__ import annotations

from collections.abc import Sequence

from trl_moe_ext.hookspecs import hookimpl
from trl_moe_ext.router.losses import RouterLoss, drift_kl, load_balancing, z_loss


@hookimpl
def register_router_losses() -> Sequence[RouterLoss]:
    """Balance of the experts, size of the logits, distance from the routing of the base model."""
    return (
        RouterLoss(
            "load_balancing",
            "equal use of the experts, per layer over the global batch",
            load_balancing,
            needs_counts=True,
        ),
        RouterLoss("z_loss", "small logits: the mean of their squared logsumexp", z_loss, needs_logits=True),
        RouterLoss(
            "drift_kl", "KL divergence from the routing of the model without its adapters", drift_kl, needs_base=True
        ),
    )
