"""Updates of some experts only: every kernel equals full factors with zeros, written out, in every gradient."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tests.kernels.cases import Chosen, interleaved, make_case, relu_squared
from tests.tolerances import RELATIVE_ERROR, assert_gradient_close, assert_output_close, relative_error
from trl_moe_ext.kernels import fused, fused_grouped, grouped, grouped_update, low_rank_rows
from trl_moe_ext.kernels.builtin import register_kernels
from trl_moe_ext.kernels.dropout import keep_mask
from trl_moe_ext.kernels.experts_mlp import experts_mlp
from trl_moe_ext.kernels.fused import fused_experts_mlp
from trl_moe_ext.kernels.fused_update import Update
from trl_moe_ext.kernels.low_rank import sets_apart
from trl_moe_ext.kernels.reference import experts_mlp_reference
from trl_moe_ext.kernels.selected import SelectedExperts

ONE = (Chosen((1, 4, 5)),)
CLASSES = (Chosen((0, 3, 6), r=2), Chosen((2, 4), r=8))
LAYOUTS = {
    "one update": {"selected": ONE},
    "classes of ranks": {"selected": CLASSES},
    "up and down different": {"selected": {"up": ONE, "down": CLASSES}},
    "up only": {"selected": {"up": ONE, "down": ()}},
    "down only": {"selected": {"up": (), "down": CLASSES}},
    "up of some, down of all": {"selected": {"up": ONE, "down": None}},
    "adapters that overlap": {"selected": (Chosen((1, 4)), Chosen((0, 4, 6), r=2, adapter=1))},
    "adapters apart": {"selected": (Chosen((1, 4)), Chosen((0, 6), r=2, adapter=1)), "dropout": 0.25},
    "one of all, one of some": {"selected": (Chosen(None), Chosen((0, 4), r=2, adapter=1))},
    "biases": {"selected": CLASSES, "bias": True},
    "gpt-oss-like": {"selected": CLASSES, "transposed": True, "bias": True, "activation": interleaved},
    "no gate": {"selected": ONE, "activation": relu_squared},
    "norm": {"selected": CLASSES, "post_norm": lambda y: F.rms_norm(y, y.shape[-1:])},
    "weights on the input": {"selected": CLASSES, "weights_on_input": True, "bias": True},
    "identity experts": {"selected": CLASSES, "identity_experts": 3},
    "slots of no expert": {"selected": CLASSES, "sentinels": True, "bias": True},
    "gate apart": {"selected": {"up": ONE, "gate": CLASSES, "down": ONE}, "gate_apart": True},
    "dropout": {"selected": CLASSES, "dropout": 0.25},
    "dropout, gate apart": {"selected": CLASSES, "dropout": 0.25, "gate_apart": True},
    "first": {"selected": (Chosen((0,)),)},
    "last": {"selected": (Chosen((6,), r=2),)},
    "all": {"selected": (Chosen(tuple(range(7))),)},
    "all in classes": {"selected": (Chosen((0, 1, 2, 5)), Chosen((3, 4, 6), r=4))},
    "one token": {"selected": (Chosen((1, 2)), Chosen((4, 5, 6), r=2)), "T": 1, "K": 5},
    "many rows": {"selected": CLASSES, "T": 300},
    "more experts than rows": {"selected": (Chosen(tuple(range(0, 40, 2))),), "T": 5, "E": 40},
}


def case_of(layout, dtype=torch.float64, **more):
    return make_case(**({"E": 7, "K": 3, "dtype": dtype} | LAYOUTS[layout] | more))


def through_grouped_products(*args, **kwargs):
    """What runs on a GPU, on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_back_end", lambda hidden: fused_grouped)
        return fused_experts_mlp(*args, **kwargs)


KERNELS = {
    "fused loop": fused_experts_mlp,
    "fused loop, recomputed": partial(fused_experts_mlp, save_activations="none"),
    "fused grouped": through_grouped_products,
    "fused grouped, recomputed": partial(through_grouped_products, save_activations="none"),
    "grouped": experts_mlp,
    "reference": experts_mlp_reference,
}


@pytest.fixture(params=KERNELS)
def kernel(request):
    return KERNELS[request.param]


def dense(hidden, index, routing, weights, up_updates, down_updates, gate_updates=()):
    """Slot by slot with the weights of each token's own expert, and zeros for the factors of those not selected."""
    num_experts, out = len(weights.up), torch.zeros_like(hidden)

    def whole(factor, update):
        if update.selected is None:
            return factor
        return torch.zeros(num_experts, *factor.shape[1:], dtype=factor.dtype).index_put(
            (torch.tensor(update.selected.experts),), factor
        )

    def linear(x, stack, bias, updates, expert, pairs):
        y = torch.einsum("ti,tio->to", x, stack[expert]) + (0 if bias is None else bias[expert])
        for u in updates:
            mask = 1.0 if u.seed is None else keep_mask(u.seed, pairs, x.shape[1], u.dropout).to(x.dtype)
            keep = mask / (1 - u.dropout)
            merged = torch.einsum("eor,eri->eoi", whole(u.B, u), whole(u.A, u)) * u.scaling
            y = y + torch.einsum("ti,toi->to", x * keep, merged[expert])
        return y

    for slot in range(index.shape[1]):
        weight, pairs = routing[:, slot, None], torch.arange(len(hidden)) * index.shape[1] + slot
        served, expert = index[:, slot, None] < num_experts, index[:, slot].clamp(max=num_experts - 1)
        x = hidden * weight if weights.weights_on_input else hidden
        h = linear(x, weights.up, weights.up_bias, up_updates, expert, pairs)
        if weights.gate is not None:
            h = torch.cat([linear(x, weights.gate, None, gate_updates, expert, pairs), h], dim=-1)
        y = linear(weights.activation(h), weights.down, weights.down_bias, down_updates, expert, pairs)
        y = y if weights.post_norm is None else weights.post_norm(y)
        out = out + y * served * (1 if weights.weights_on_input else weight)
        is_identity = ~served & (index[:, slot, None] < num_experts + weights.identity_experts)
        out = out + hidden * weight * is_identity
    return out


def assert_equal(case, kernel, dtype, expected):
    out, gradients = case.run(kernel)
    assert_output_close(out, expected[0], dtype)
    assert gradients.keys() == expected[1].keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        assert_gradient_close(gradient, expected[1][name], dtype, name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_full_factors_with_zeros(layout, kernel):
    case = case_of(layout)
    assert_equal(case, kernel, torch.float64, case.run(dense))


@pytest.mark.parametrize("layout", ["one update", "classes of ranks", "dropout", "biases", "adapters that overlap"])
@pytest.mark.parametrize("name", ["fused loop", "fused grouped", "grouped"])
def test_equals_them_in_bfloat16(layout, name):
    case = case_of(layout, torch.bfloat16, T=120)
    assert_equal(case, KERNELS[name], torch.bfloat16, case.double().run(dense))


@pytest.fixture
def native_products(monkeypatch):
    """The branch that a GPU takes, on the CPU: torch's own grouped product and padded ranks."""
    monkeypatch.setattr(grouped, "_native", lambda x, other: True)
    monkeypatch.setattr(grouped_update, "aligned_rank", lambda rank, like: -(-rank // 8) * 8)


@pytest.mark.parametrize("name", ["fused grouped", "grouped"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "last"])
def test_the_native_products_do_as_well(layout, name, native_products):
    # grouped_mm asks for strides of 16 bytes: sizes are multiples of 8, the ranks are what gets padded.
    case = case_of(layout, torch.float32, I=24)
    assert_equal(case, KERNELS[name], torch.float32, case.double().run(dense))


@pytest.mark.parametrize("mutation", ["the experts after them", "one class only", "the scaling of the other class"])
def test_a_wrong_selection_would_be_noticed(mutation, kernel):
    """The test of the tests above: far beyond the tolerance of every dtype."""
    case, wrong = case_of("classes of ranks", E=8), case_of("classes of ranks", E=8)
    low, high = wrong.up
    if mutation == "the experts after them":
        wrong.up = tuple(
            u._replace(selected=SelectedExperts(tuple(e + 1 for e in u.selected.experts), 8)) for u in wrong.up
        )
    elif mutation == "one class only":
        wrong.up = (low,)
    else:
        wrong.up = low, high._replace(scaling=low.scaling)
    assert relative_error(wrong.run(kernel)[0], case.run(dense)[0]) > 2 * RELATIVE_ERROR[torch.bfloat16][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [{}, {"dropout": 0.25, "bias": True}, {"adapters": 2}], ids=str)
def test_all_experts_selected_are_as_none_given(layout, dtype, kernel):
    """Bit for bit."""
    plain = make_case(dtype=dtype, T=60, **layout)
    chosen = make_case(dtype=dtype, T=60, **layout)
    everyone = SelectedExperts(tuple(range(5)), 5)
    chosen.up, chosen.down = (tuple(u._replace(selected=everyone) for u in us) for us in (chosen.up, chosen.down))
    (out, gradients), (expected, expected_gradients) = chosen.run(kernel), plain.run(kernel)
    assert torch.equal(out, expected)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected_gradients[name]), name


def test_experts_without_rows_get_gradients_of_zero(kernel):
    case = case_of("more experts than rows", seed=1)
    _, gradients = case.run(kernel)
    busy = torch.isin(torch.arange(0, 40, 2), case.top_k_index)
    assert busy.any()
    assert not busy.all()
    for name in ("up[0].A", "up[0].B", "down[0].A", "down[0].B"):
        assert (gradients[name][~busy] == 0).all()
        assert (gradients[name][busy] != 0).flatten(1).any(1).all()


def test_tokens_of_experts_that_are_not_selected_are_as_if_frozen(kernel):
    case, frozen = case_of("one update", K=1), case_of("one update", K=1)
    frozen.up = frozen.down = ()
    (out, gradients), (plain, plain_gradients) = case.run(kernel), frozen.run(kernel)
    others = ~torch.isin(case.top_k_index, torch.tensor(ONE[0].experts)).squeeze(1)
    assert torch.equal(out[others], plain[others])
    assert torch.equal(gradients["hidden_states"][others], plain_gradients["hidden_states"][others])
    assert (out[~others] != plain[~others]).any(1).all()


def test_the_loop_spends_nothing_on_rows_without_an_update(monkeypatch):
    """Rank-sized products are made for the rows of selected experts alone."""
    case, rows = case_of("classes of ranks", T=120), []
    project = Update.project

    def counted(self, x, group):
        rows.append(int(group.is_own.sum()))
        return project(self, x, group)

    monkeypatch.setattr(Update, "project", counted)
    case.run(fused_experts_mlp)
    assert sum(rows) == 2 * int(torch.isin(case.top_k_index, torch.tensor([0, 2, 3, 4, 6])).sum())


def test_classes_of_ranks_take_as_many_products_as_one_update(monkeypatch):
    """Of all rows, on a GPU: each is a pass over them."""
    calls, product = [], grouped.grouped_mm
    for module in (fused_grouped, low_rank_rows):
        monkeypatch.setattr(module, "grouped_mm", lambda *a, **k: calls.append(len(calls)) or product(*a, **k))
    counts = []
    for layout in ("all", "one update", "classes of ranks"):
        calls.clear()
        case_of(layout).run(through_grouped_products)
        counts.append(len(calls))
    assert counts[0] == counts[1] == counts[2] == 12


@pytest.mark.parametrize("layout", ["one update", "down only", "adapters that overlap", "weights on the input"])
def test_a_gradient_of_tokens_that_nobody_needs_changes_no_other(layout, kernel):
    """Then nothing at all is left to do for rows without an update."""
    case = case_of(layout)
    _, expected = case.run(kernel)
    leaves = {name: leaf.requires_grad_() for name, leaf in case.leaves.items() if name != "hidden_states"}
    kernel(case.hidden_states, case.top_k_index, case.top_k_weights, case.weights, case.up, case.down).backward(
        case.grad
    )
    for name, leaf in leaves.items():
        assert_gradient_close(leaf.grad, expected[name], torch.float64, name)


@pytest.mark.parametrize("layout", ["classes of ranks", "dropout", "adapters that overlap", "gate apart"])
@pytest.mark.parametrize("name", ["fused loop", "grouped"])
def test_compiles_without_a_graph_break(layout, name):
    case = case_of(layout, torch.float32)
    compiled = torch.compile(KERNELS[name], fullgraph=True, backend="aot_eager")
    for _ in range(2):  # what the first call leaves must suit the second
        assert_equal(case, compiled, torch.float32, case.double().run(dense))
    assert_equal(case, KERNELS[name], torch.float32, case.double().run(dense))


@pytest.mark.parametrize("kernel", register_kernels(), ids=lambda kernel: kernel.name)
def test_built_in_kernels_say_that_they_take_selections(kernel):
    assert kernel.takes_selection
    case = case_of("classes of ranks")
    assert_equal(case, kernel.experts_mlp, torch.float64, case.run(dense))


def test_updates_that_no_expert_has_two_of_are_taken_together():
    """The ranks of each of two adapters, where the adapters overlap."""
    chosen = (Chosen((0, 1)), Chosen((4,)), Chosen((1, 2), adapter=1), Chosen((3,), adapter=1))
    updates = case_of("one update", selected=chosen, dropout=0.25).up
    assert sets_apart(updates) == [updates[:2], updates[2:]]
    alone = case_of("one update", selected=(*chosen, Chosen(None))).up
    assert sets_apart(alone) == [(alone[0], alone[1], alone[3]), (alone[2],), (alone[4],)]
    assert sets_apart(()) == [()]


CPU = torch.device("cpu")


def test_slots_and_runs():
    some = SelectedExperts((1, 2, 6), 9)
    assert some.slots(CPU).tolist() == [3, 0, 1, 3, 3, 3, 2, 3, 3]
    last, of_selected, is_alone = some.runs(CPU)
    assert last.tolist() == [0, 1, 2, 5, 6, 8]
    assert of_selected.tolist() == [1, 2, 4]
    assert is_alone.tolist() == [False, True, True, False, True, False]
    everyone = SelectedExperts((0, 1, 2), 3)
    assert [t.tolist() for t in everyone.runs(CPU)] == [[0, 1, 2], [0, 1, 2], [True, True, True]]


def test_runs_beside_other_experts():
    some, other = SelectedExperts((1, 6), 9), SelectedExperts((4, 8), 9)
    (last, mine, alone), (same, theirs, _) = some.runs(CPU, [other]), other.runs(CPU, [some])
    assert last.tolist() == same.tolist() == [0, 1, 3, 4, 5, 6, 7, 8]
    assert [last[mine].tolist(), last[theirs].tolist()] == [[1, 6], [4, 8]]
    assert last[alone].tolist() == [1, 4, 6, 8]


def test_a_device_is_sent_a_selection_once():
    some, other = SelectedExperts((1, 6), 9), SelectedExperts((4, 8), 9)
    assert some.slots(CPU) is some.slots(CPU)
    assert some.runs(CPU, [other]) is some.runs(CPU, [other])
    assert some.runs(CPU, [other]) is not some.runs(CPU)


def test_what_is_made_in_inference_mode_serves_a_later_step():
    """Autograd keeps no inference tensor."""
    some = SelectedExperts((1, 6), 9)
    with torch.inference_mode():
        made = some.slots(CPU), some.indices(CPU), *some.runs(CPU)
    assert not any(tensor.is_inference() for tensor in made)
    assert some.slots(CPU) is made[0]


def test_tensors_of_a_trace_are_not_kept():
    """A fake tensor that stayed would be met by the first real step."""
    some = SelectedExperts((1, 6), 9)
    with FakeTensorMode():
        assert all(isinstance(t, FakeTensor) for t in (some.slots(CPU), *some.runs(CPU)))
    kept = some.slots(CPU), *some.runs(CPU)
    assert not any(isinstance(t, FakeTensor) for t in kept)
    with FakeTensorMode():
        assert all(isinstance(t, FakeTensor) for t in (some.slots(CPU), *some.runs(CPU)))


@pytest.mark.parametrize("experts", [(), (2, 1), (1, 1), (-1, 0), (3, 9)], ids=str)
def test_what_is_no_selection_is_refused(experts):
    with pytest.raises(ValueError, match="not ascending indices of 9 experts"):
        SelectedExperts(experts, 9)
