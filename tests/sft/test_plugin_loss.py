"""A router loss that a plug-in registers is used by its name like our own."""

from __future__ import annotations

import importlib
import sys
from textwrap import dedent

import pytest
import torch

from tests.sft.runs import logged, sft, train
from trl_moe_ext import MoeSFTConfig
from trl_moe_ext.errors import PluginError
from trl_moe_ext.plugins import host

PLUGIN = """
    from trl_moe_ext.hookspecs import hookimpl
    from trl_moe_ext.router.losses import RouterLoss

    TOLD = set()

    def decided(routed):
        TOLD.add((routed.num_tokens, float(routed.tokens_per_expert.sum()), routed.top_k))
        return routed.mean_over_tokens(1 - routed.probabilities.max(-1).values)

    @hookimpl
    def register_router_losses():
        return [RouterLoss("decided", "routers that are sure of their choice", decided, needs_counts=True)]
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The module of the plug-in, installed as a distribution is."""
    site = tmp_path / "site"
    info = site / "decided_routers-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: decided-routers\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[trl_moe_ext]\ndecided = decided_routers\n")
    (site / "decided_routers.py").write_text(dedent(PLUGIN))
    monkeypatch.syspath_prepend(site)
    host.cache_clear()
    yield importlib.import_module("decided_routers")
    host.cache_clear()
    del sys.modules["decided_routers"]


def test_it_is_added_and_logged(tmp_path, plugin):
    run = {"gradient_accumulation_steps": 2, "router_metrics": "summary", "router_aux_loss_coef": 0.0}
    without, *_ = train(sft(tmp_path, **run))
    trainer = sft(tmp_path, router_losses={"decided": 0.5}, **run)
    losses, gradients = train(trainer)
    added = logged(trainer, "router/loss/decided")
    assert [loss - less for loss, less in zip(losses, without, strict=True)] == pytest.approx(added, rel=1e-4)
    assert all(0 < value < 0.5 for value in added)
    assert all(torch.isfinite(gradient).all() for step in gradients for gradient in step.values())
    # What it is told is of both micro-batches of each of two steps.
    assert {tokens for tokens, _, _ in plugin.TOLD} == {35, 33}
    assert all(choices == tokens * top_k for tokens, choices, top_k in plugin.TOLD)


@pytest.mark.parametrize("name", ["decidet", "z_los"])
def test_a_name_that_is_nearly_right(tmp_path, plugin, name):
    with pytest.raises(PluginError, match=f"did you mean {'decided' if name == 'decidet' else 'z_loss'}"):
        MoeSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, router_losses={name: 0.1})
