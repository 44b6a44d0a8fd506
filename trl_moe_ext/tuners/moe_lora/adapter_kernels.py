"""The kernel of each adapter of a module of experts, and which adapters can run together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.kernels.registry import Kernel
from trl_moe_ext.plugins import host
from trl_moe_ext.tuners.moe_lora.config import MoeLoraConfig
from trl_moe_ext.tuners.moe_lora.factors import rank_classes
from trl_moe_ext.tuners.targets.resolve import Targets


def kernel_of(config: MoeLoraConfig, selects: bool) -> Callable[..., Tensor]:
    """The function that runs an adapter.

    Args:
        config: of the adapter.
        selects: whether it leaves experts out, or has several ranks.

    Raises:
        ConfigError: the kernel cannot do what the config asks for.
        PluginError: there is no such kernel.
    """
    kernel: Kernel = host().lookup("register_kernels", config.kernel)
    if selects and not kernel.takes_selection:
        raise ConfigError(
            f"kernel {config.kernel!r} runs updates of all experts only; leave expert_selection and expert_rank out, "
            "or use kernel 'fused'"
        )
    if kernel.chooses_activations:
        return partial(kernel.experts_mlp, save_activations=config.save_activations)
    if config.save_activations != "gate_up":
        raise ConfigError(
            f"save_activations={config.save_activations!r} has no effect with kernel {config.kernel!r}, which does "
            "not offer the choice; leave it out, or use kernel 'fused'"
        )
    return kernel.experts_mlp


def check_kernel(config: MoeLoraConfig, targets: Targets) -> None:
    """Raise what `kernel_of` would, and what is wrong with a rank, before anything of the model is replaced."""
    for name in targets.experts:
        layout = targets.anatomy.layouts[name]
        classes = rank_classes(config.expert_r or config.r, targets.expert_ranks.get(name), layout.num_experts)
        if not layout.takes_rows:
            kernel_of(config, any(each.selected is not None for each in classes))


def words_of(config: MoeLoraConfig) -> str:
    """What a config says of its kernel, for comparing and telling."""
    saving = "" if config.save_activations == "gate_up" else f", save_activations={config.save_activations!r}"
    return f"kernel={config.kernel!r}{saving}"


def check_together(words: Mapping[str, str], adapters: Sequence[str]) -> None:
    """Refuse adapters that one call would have to run on several kernels: they are one product over all updates.

    That their kernel takes the selection of each was checked when each was made.

    Args:
        words: adapter -> what its config says, see `words_of`; others than these are not in the module.
        adapters: that are to be active.

    Raises:
        ConfigError: see above.
    """
    said = {name: words[name] for name in adapters if name in words}
    if len({*said.values()}) > 1:
        told = "; ".join(f"{name!r} has {each}" for name, each in said.items())
        raise ConfigError(
            f"adapters on different kernels cannot be active together on routed experts: {told}. Give their configs "
            "the same kernel and save_activations (neither is saved, so loaded adapters have the defaults), or "
            "activate one of them at a time"
        )
