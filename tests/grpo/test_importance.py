"""Weights of tokens of another policy: by hand, by their laws, and that a masked token never contributes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.loss import importance as importance_module
from trl_moe_ext.grpo.loss.importance import ImportanceCorrection, log_ratio, sequence_log_ratio

NAN, INF = math.nan, math.inf
CORRECTIONS = [
    ImportanceCorrection(level, mode, cap=2.0, floor=0.5 if mode == "mis" else 0.0)
    for level in ("token", "sequence", "geometric")
    for mode in ("tis", "mis")
]
NAMES = [f"{c.level}-{c.mode}" for c in CORRECTIONS]
each_correction = pytest.mark.parametrize("correction", CORRECTIONS, ids=NAMES)

# Two sequences of ratios 4, 1/2, (masked) and 1, 1/4, 1/4. Products 2 and 1/16; geometric means 2^(1/2) and 2^(-4/3).
RATIOS = torch.tensor([[4.0, 0.5, 8.0], [1.0, 0.25, 0.25]])
MASK = torch.tensor([[True, True, False], [True, True, True]])
GENERATOR = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -1.5, -2.5]])
EXPECTED = {
    "token-tis": [[2.0, 0.5, 0.0], [1.0, 0.25, 0.25]],
    "token-mis": [[0.0, 0.5, 0.0], [1.0, 0.0, 0.0]],
    "sequence-tis": [[2.0, 2.0, 0.0], [1 / 16] * 3],
    "sequence-mis": [[2.0, 2.0, 0.0], [0.0] * 3],
    "geometric-tis": [[2**0.5, 2**0.5, 0.0], [2 ** (-4 / 3)] * 3],
    "geometric-mis": [[2**0.5, 2**0.5, 0.0], [0.0] * 3],
}


def by_hand(correction: ImportanceCorrection):
    # The ratio of the first sequence is the cap itself, up to a rounding.
    return replace(correction, cap=2.0001).correct(GENERATOR + RATIOS.log(), GENERATOR, MASK)


@each_correction
def test_weights_by_hand(correction):
    expected = torch.tensor(EXPECTED[f"{correction.level}-{correction.mode}"])
    found = by_hand(correction)
    torch.testing.assert_close(found.weights, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(found.mask, MASK if correction.mode == "tis" else expected > 0)
    assert not found.weights.requires_grad


def test_metrics_by_hand():
    """Of five tokens with the ratios 4, 1/2, 1, 1/4, 1/4, truncated at 2."""
    found = by_hand(CORRECTIONS[0]).statistics.metrics()
    k1 = [4 * math.log(4), 0.5 * math.log(0.5), 0.0, 0.25 * math.log(0.25), 0.25 * math.log(0.25)]
    expected = {
        "ratio_mean": 6 / 5,
        "ratio_max": 4.0,
        "limited_share": 1 / 5,
        "ess": 4**2 / (4 + 0.25 + 1 + 2 / 16),
        "ess_share": 4**2 / (4 + 0.25 + 1 + 2 / 16) / 5,
        "kl_k1": sum(k1) / 5,
        "kl_k3": (sum(k1) - (6 - 5)) / 5,
    }
    assert found == pytest.approx(expected, rel=1e-4)


def test_masked_tokens_of_mis_are_counted_and_weigh_nothing():
    found = by_hand(CORRECTIONS[1]).statistics.metrics()
    assert found["limited_share"] == pytest.approx(3 / 5)
    assert found["ess"] == pytest.approx((0.5 + 1) ** 2 / (0.25 + 1), rel=1e-4)


def test_the_divergence_is_that_of_the_trainer_from_the_generator():
    """Over all tokens of a small vocabulary, as often as the generator draws them."""
    generator = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    trainer = torch.tensor([0.25, 0.25, 0.3, 0.2], dtype=torch.float64)
    drawn = torch.arange(4).repeat_interleave((generator * 100).round().long())
    found = ImportanceCorrection().correct(
        trainer.log()[drawn], generator.log()[drawn], torch.ones(len(drawn), dtype=torch.bool)
    )
    expected = float((trainer * (trainer / generator).log()).sum())
    metrics = found.statistics.metrics()
    assert metrics["kl_k1"] == pytest.approx(expected, rel=1e-6)
    assert metrics["kl_k3"] == pytest.approx(expected, rel=1e-6)
    assert metrics["ratio_mean"] == pytest.approx(1, rel=1e-6)


def test_the_third_estimator_is_exact_near_one():
    """r log r - (r - 1) is about (r - 1)^2 / 2, which the plain formula loses in rounding."""
    logs = torch.full((8,), 1e-7, dtype=torch.float64)
    found = ImportanceCorrection().correct(logs, torch.zeros_like(logs), torch.ones(8, dtype=torch.bool))
    assert found.statistics.metrics()["kl_k3"] == pytest.approx(1e-14 / 2, rel=1e-5, abs=0)


def test_no_token_has_no_metrics():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    for mask in (nothing, nothing[:, :0], nothing[:0]):
        values = torch.zeros(mask.shape)
        for correction in CORRECTIONS:
            found = correction.correct(values, values, mask, torch.zeros_like(mask, dtype=torch.int64))
            assert found.statistics.metrics() == {}
            assert not found.weights.any()


def test_tokens_that_are_all_masked_by_their_ratio_have_no_sample_size():
    found = CORRECTIONS[1].correct(torch.full((3,), 5.0), torch.zeros(3), torch.ones(3, dtype=torch.bool))
    assert found.statistics.metrics()["ess"] == 0


@pytest.mark.parametrize("values", [(-INF, -1.0), (-1.0, -INF), (-1e30, -1.0), (-1.0, -1e30)])
@each_correction
def test_weights_are_finite_whatever_the_ratio(correction, values):
    """A product of a hundred ratios has no place in float32."""
    ours, theirs = (torch.full((2, 100), value) for value in values)
    found = replace(correction, cap=INF, floor=0.0).correct(ours, theirs, torch.ones(2, 100, dtype=torch.bool))
    assert found.weights.isfinite().all()
    assert all(math.isfinite(value) for value in found.statistics.metrics().values())


@each_correction
def test_a_nan_that_counts_is_not_hidden(correction):
    ours = torch.zeros(1, 3)
    ours[0, 1] = NAN
    found = correction.correct(ours, torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool))
    assert found.weights[0, 1].isnan()
    assert math.isnan(found.statistics.metrics()["ratio_mean"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_ratios_are_taken_in_float32_at_least(dtype):
    ours, theirs = torch.tensor([-5.0]).to(dtype), torch.tensor([-5.03125]).to(dtype)
    found = log_ratio(ours, theirs, torch.tensor([True]))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.double().equal(ours.double() - theirs.double())


def test_log_ratios_have_gradients_which_a_sequence_shares():
    ours = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    tokens = log_ratio(ours, torch.zeros(1, 3), mask)
    for normalised, share in ((True, 0.5), (False, 1.0)):
        found = sequence_log_ratio(tokens, mask, normalised=normalised)
        (gradient,) = torch.autograd.grad(found[0, 0], ours, retain_graph=True)
        assert gradient.tolist() == [[share, share, 0.0]]


def test_what_stands_beside_the_tokens_of_a_sequence_does_not_matter():
    """Nor does a sequence without any token, whose mean is that of nothing."""
    tokens = torch.tensor([[1.0, 2.0, NAN], [NAN, INF, -INF]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    for sequence in (None, torch.tensor([[0, 0, 0], [1, 1, 1]])):
        found = sequence_log_ratio(tokens, mask, sequence, normalised=True)
        assert found.tolist() == [[1.5, 1.5, 0.0], [0.0, 0.0, 0.0]]
        (gradient,) = torch.autograd.grad(found.sum(), tokens)
        assert gradient.tolist() == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


WRONG = {
    "level": ("level", "tokens", "did you mean token"),
    "mode": ("mode", "is", "did you mean|known"),
    "cap below one": ("cap", 0.9, "use 1 or more"),
    "cap not a number": ("cap", NAN, "use 1 or more"),
    "floor above one": ("floor", 1.1, "outside"),
    "negative floor": ("floor", -0.1, "outside"),
    "floor not a number": ("floor", NAN, "outside"),
    "floor of tis": ("floor", 0.5, "no effect"),
}


@pytest.mark.parametrize(("name", "value", "message"), WRONG.values(), ids=list(WRONG))
def test_wrong_options_are_refused(name, value, message):
    with pytest.raises(ConfigError, match=message):
        ImportanceCorrection(**{name: value})


def test_log_probabilities_of_other_tokens_are_refused():
    with pytest.raises(AssertionError, match="different tokens"):
        ImportanceCorrection().correct(torch.zeros(2, 3), torch.zeros(3), torch.ones(2, 3, dtype=torch.bool))


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of both, mask and sequence of up to 24 tokens; policies near and far from each other."""
    count = draw(st.integers(1, 24))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    theirs = -5 * torch.rand(count, generator=random)
    ours = theirs + draw(st.sampled_from([0.01, 1.0, 30.0])) * torch.randn(count, generator=random)
    mask = torch.rand(count, generator=random) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    return ours, theirs, mask, torch.randint(draw(st.integers(1, 5)), (count,), generator=random)


GARBAGE = st.sampled_from([NAN, INF, -INF, 0.0, 1e38])
corrections = st.sampled_from(CORRECTIONS)


def value_and_gradient(correction: ImportanceCorrection, batch, loss_values: Tensor | None = None):
    """Loss and metrics, and the gradient to the trainer's log-probabilities, through the ratio as in PPO."""
    ours, theirs, mask, sequence = batch
    ours = ours.clone().requires_grad_()
    found = correction.correct(ours, theirs, mask, sequence)
    values = log_ratio(ours, theirs, mask).exp() if loss_values is None else ours * loss_values
    loss = found.apply(values).sum()
    (gradient,) = torch.autograd.grad(loss, ours)
    return found, loss.detach(), gradient


@given(batch=batches(), correction=corrections, garbage=st.tuples(GARBAGE, GARBAGE))
def test_what_stands_in_masked_positions_does_not_matter(batch, correction, garbage):
    ours, theirs, mask, sequence = batch
    dirty = (torch.where(mask, ours, garbage[0]), torch.where(mask, theirs, garbage[1]), mask)
    dirty = (*dirty, torch.where(mask, sequence, -1))
    expected, loss, gradient = value_and_gradient(correction, batch)
    found, dirty_loss, dirty_gradient = value_and_gradient(correction, dirty)
    assert torch.equal(found.weights, expected.weights)
    assert torch.equal(dirty_loss, loss)
    assert torch.equal(dirty_gradient, gradient)
    assert not gradient[~found.mask].any()
    assert not found.weights[~mask].any()
    assert found.statistics.metrics() == expected.statistics.metrics()


@given(batch=batches(), correction=corrections)
def test_a_loss_that_is_not_finite_does_not_pass_the_mask(batch, correction):
    found, loss, gradient = value_and_gradient(correction, batch, torch.where(batch[2], 1.0, 2.0))
    dirty = torch.where(found.mask, batch[0], NAN)
    assert torch.equal(found.apply(dirty).sum(), loss)
    assert torch.equal(gradient, found.weights)


@given(batch=batches(), correction=corrections)
def test_weights_are_within_their_limits_and_nothing_is_unmasked(batch, correction):
    found = correction.correct(*batch)
    assert ((found.weights >= 0) & (found.weights <= correction.cap)).all()
    assert not (found.mask & ~batch[2]).any()
    if correction.mode == "mis":
        assert (found.weights[found.mask] >= correction.floor).all()
    else:
        assert torch.equal(found.mask, batch[2])
    metrics = found.statistics.metrics()
    assert metrics.get("kl_k3", 0) >= 0
    assert metrics.get("ess_share", 0) <= 1 + 1e-9


@given(batch=batches(), correction=corrections)
def test_tokens_of_the_policy_itself_have_a_weight_of_exactly_one(batch, correction):
    _, theirs, mask, sequence = batch
    found = correction.correct(theirs, theirs, mask, sequence)
    assert torch.equal(found.weights, mask.float())
    assert torch.equal(found.mask, mask)
    metrics = found.statistics.metrics()
    if mask.any():
        assert metrics == {
            **dict.fromkeys(("ratio_mean", "ratio_max", "ess_share"), 1.0),
            **dict.fromkeys(("limited_share", "kl_k1", "kl_k3"), 0.0),
            "ess": float(mask.sum()),
        }


@given(batch=batches(), correction=corrections, seed=st.integers(0, 2**31))
def test_the_order_of_tokens_does_not_matter(batch, correction, seed):
    order = torch.randperm(len(batch[0]), generator=torch.Generator().manual_seed(seed))
    expected = correction.correct(*(part.double() if part.is_floating_point() else part for part in batch))
    found = correction.correct(*(p[order].double() if p.is_floating_point() else p[order] for p in batch))
    torch.testing.assert_close(found.weights, expected.weights[order])
    assert found.statistics.metrics() == pytest.approx(expected.statistics.metrics(), rel=1e-9)


@given(batch=batches(), correction=corrections, seed=st.integers(0, 2**31))
def test_rows_with_padding_are_the_same_as_packed_tokens(batch, correction, seed):
    """Each sequence in a row of its own, with padding anywhere between its tokens."""
    ours, theirs, mask, sequence = (part.double() if part.is_floating_point() else part for part in batch)
    expected = correction.correct(ours, theirs, mask, sequence)
    columns = 2 * len(ours)
    row, column = sequence, torch.randperm(columns, generator=torch.Generator().manual_seed(seed))[: len(ours)]
    shape = (int(sequence.max()) + 1, columns)
    padded = [torch.full(shape, NAN, dtype=torch.float64) for _ in range(2)]
    padded[0][row, column], padded[1][row, column] = ours, theirs
    kept = torch.zeros(shape, dtype=torch.bool)
    kept[row, column] = mask
    found = correction.correct(*padded, kept)
    torch.testing.assert_close(found.weights[row, column], expected.weights)
    assert found.weights.count_nonzero() == expected.weights.count_nonzero()
    assert found.statistics.metrics() == pytest.approx(expected.statistics.metrics(), rel=1e-9)


@given(batch=batches(), correction=corrections)
def test_statistics_of_micro_batches_add_up(batch, correction):
    """Sequences are never split; tokens are, where each is for itself."""
    whole = correction.correct(*batch).statistics
    parts = [correction.correct(*(part[batch[3] == n] for part in batch)).statistics for n in range(5)]
    total = parts[0] + parts[1] + parts[2] + parts[3] + parts[4]
    assert total.metrics() == pytest.approx(whole.metrics(), rel=1e-6)


MUTATIONS = {
    "masked by a product": lambda mask, values, other: mask * values + ~mask * other,
    "not masked": lambda mask, values, other: values,
}


def check_masked_nan() -> None:
    batch = (torch.tensor([-1.0, NAN]), torch.tensor([-1.0, -1.0]), torch.tensor([True, False]))
    assert torch.equal(ImportanceCorrection().correct(*batch).weights, torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mask_that_lets_through_does_not_pass(mutation, monkeypatch):
    class Mutant:
        where = staticmethod(MUTATIONS[mutation])

        def __getattr__(self, name: str) -> object:
            return getattr(torch, name)

    check_masked_nan()
    monkeypatch.setattr(importance_module, "torch", Mutant())
    with pytest.raises(AssertionError):
        check_masked_nan()


def check_limits() -> None:
    for correction in CORRECTIONS:
        test_weights_are_finite_whatever_the_ratio(correction, (-1.0, -INF))
        test_weights_by_hand(correction)


@pytest.mark.parametrize("limit", [1.0, 200.0], ids=["too low", "beyond float32"])
def test_another_limit_of_log_ratios_does_not_pass(limit, monkeypatch):
    monkeypatch.setattr(importance_module, "MAX_LOG_RATIO", limit)
    with pytest.raises(AssertionError):
        check_limits()
