"""A record is small, takes any selection of its tokens, and survives its travels or says that it did not."""

from __future__ import annotations

import zlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from tests.families import build, inputs
from tests.router.replayed import recorded
from trl_moe_ext.errors import ConfigError, MoeExtError
from trl_moe_ext.router.record import RoutingRecord
from trl_moe_ext.router.record_bytes import record_from_bytes, record_to_bytes
from trl_moe_ext.router.recorder import RoutingRecorder
from trl_moe_ext.router.routers import find_routers
from trl_moe_ext.router.trace import RouterTrace

SIZES = {"0": (8, 2), "encoder.3": (128, 8), "10": (129, 1), "11.self_attention": (70_000, 3)}


def record(num_tokens: int, seed: int = 0) -> RoutingRecord:
    generator = torch.Generator().manual_seed(seed)
    experts = {label: torch.randint(-1, E, (num_tokens, K), generator=generator) for label, (E, K) in SIZES.items()}
    return RoutingRecord.of(experts, {label: E for label, (E, _) in SIZES.items()})


def assert_same(found: RoutingRecord, expected: RoutingRecord) -> None:
    assert found.num_experts == expected.num_experts
    assert found.experts.keys() == expected.experts.keys()
    for label, index in expected.experts.items():
        assert found.experts[label].dtype == index.dtype
        assert torch.equal(found.experts[label], index)


records = st.builds(record, st.integers(0, 9), st.integers(0, 2**31))


@pytest.mark.parametrize(
    ("num_experts", "dtype"),
    [(1, torch.int8), (128, torch.int8), (129, torch.int16), (32_768, torch.int16), (32_769, torch.int32)],
)
def test_indices_are_as_small_as_they_can_be(num_experts, dtype):
    index = torch.tensor([[-1], [num_experts - 1]])
    found = RoutingRecord.of({"3": index}, {"3": num_experts})
    assert found.experts["3"].dtype == dtype
    assert torch.equal(found.experts["3"].long(), index)
    assert found.nbytes == 2 * dtype.itemsize


WRONG = {
    "one dimension": (torch.tensor([1, 2]), 8, "should be integers"),
    "floats": (torch.tensor([[1.0]]), 8, "should be integers"),
    "a mask": (torch.tensor([[True]]), 8, "should be integers"),
    "an expert that is not there": (torch.tensor([[8]]), 8, "should be from -1 to 7; found 8 to 8"),
    "below -1": (torch.tensor([[3], [-2]]), 8, "should be from -1 to 7; found -2 to 3"),
    "no experts": (torch.tensor([[0]]), 0, "its number of experts known"),
}


@pytest.mark.parametrize(("index", "num_experts", "message"), WRONG.values(), ids=list(WRONG))
def test_routes_that_cannot_be_are_refused(index, num_experts, message):
    with pytest.raises(ConfigError, match=message):
        RoutingRecord.of({"3": index}, {"3": num_experts})


def test_routers_of_different_tokens_are_refused():
    with pytest.raises(ConfigError, match=r"same tokens; found so many of each: {'0': 2, '1': 3}"):
        RoutingRecord.of({"0": torch.zeros(2, 1).int(), "1": torch.zeros(3, 1).int()}, {"0": 4, "1": 4})


@given(parts=st.lists(records, min_size=1, max_size=4))
def test_parts_of_records_that_were_put_together_are_those_records(parts):
    whole = RoutingRecord.cat(parts)
    assert len(whole) == sum(map(len, parts))
    start = 0
    for part in parts:
        assert_same(whole.rows(slice(start, start + len(part))), part)
        start += len(part)


@given(whole=records, rows=st.lists(st.integers(-1, 8), max_size=12))
def test_rows_are_those_of_the_tokens_and_blank_for_none(whole, rows):
    rows = [row for row in rows if row < len(whole)]
    found = whole.rows(torch.tensor(rows, dtype=torch.int64))
    for label, index in whole.experts.items():
        expected = [index[row].tolist() if row >= 0 else [-1] * index.shape[1] for row in rows]
        assert found.experts[label].tolist() == expected
        assert found.experts[label].dtype == index.dtype


def test_records_of_different_routers_are_not_put_together():
    ours = record(2)
    fewer = RoutingRecord.of({"0": ours.experts["0"]}, ours.num_experts)
    for other in (fewer, replace(ours, num_experts={**ours.num_experts, "0": 9})):
        with pytest.raises(ConfigError, match="records of one kind can be put together; found 2"):
            RoutingRecord.cat([ours, other])
    with pytest.raises(ConfigError, match="found 0"):
        RoutingRecord.cat([])


def test_a_blank_record_is_of_the_routers():
    model = build("jetmoe")
    blank, real = RoutingRecord.blank(find_routers(model), 3), recorded(model, "jetmoe")
    assert all(torch.equal(index, torch.full((3, 2), -1, dtype=torch.int8)) for index in blank.experts.values())
    assert len(RoutingRecord.cat([blank, real, blank])) == 30


@given(sent=records)
def test_bytes_bring_the_same_record(sent):
    assert_same(record_from_bytes(record_to_bytes(sent)), sent)


def test_bytes_of_a_selection_bring_the_selection():
    sent = record(8).rows(slice(1, None, 3))
    assert_same(record_from_bytes(record_to_bytes(sent)), sent)


def test_bytes_are_little_more_than_the_indices():
    sent = record(1000)
    assert sent.nbytes < len(record_to_bytes(sent)) < sent.nbytes + 1000


@given(sent=records, data=st.data())
def test_damaged_bytes_are_noticed(sent, data):
    good = record_to_bytes(sent)
    position = data.draw(st.integers(0, len(good) - 1))
    flipped = good[:position] + bytes([good[position] ^ 1 << data.draw(st.integers(0, 7))]) + good[position + 1 :]
    for bad in (flipped, good[:position], good + b"\0"):
        with pytest.raises(MoeExtError, match="damaged"):
            record_from_bytes(bad)


def checked(payload: bytes) -> bytes:
    return zlib.crc32(payload).to_bytes(4, "little") + payload


def saved(tensors: dict[str, Tensor]) -> bytes:
    return checked(save(tensors))


FOREIGN = {
    "no safetensors": checked(b"routes"),
    "no label": saved({"weight": torch.zeros(2, 2, dtype=torch.int8)}),
    "other values": saved({"3/8": torch.full((2, 2), 9, dtype=torch.int8)}),
    "floats": saved({"3/8": torch.zeros(2, 2)}),
}


@pytest.mark.parametrize("data", FOREIGN.values(), ids=list(FOREIGN))
def test_bytes_that_are_no_record_are_refused(data):
    with pytest.raises(MoeExtError, match="are no routing record"):
        record_from_bytes(data)


def test_a_recorder_joins_forwards_and_leaves_out_what_does_not_count():
    model, tokens = build("qwen3_moe"), inputs("qwen3_moe")["input_ids"]
    kept = torch.arange(12).expand(2, 12) < torch.tensor([[12], [7]])
    recorder = RoutingRecorder()
    seen: list[Tensor] = []
    routers = find_routers(model)
    with (
        torch.no_grad(),
        RouterTrace(routers[:1], lambda routing: seen.append(routing.top_k_index)),
        RouterTrace(routers, recorder) as trace,
    ):
        model(input_ids=tokens)
        trace.kept = kept
        model(input_ids=tokens)
        found = recorder.take()
        trace.kept = None
        model(input_ids=tokens[:, :3])
        assert len(recorder.take()) == 6
    assert torch.equal(found.experts["0"][:24].long(), seen[0])
    expected = torch.where(kept.flatten().unsqueeze(1), seen[1], -1)
    assert torch.equal(found.experts["0"][24:].long(), expected)
    assert found.num_experts == {"0": 8, "1": 8}
