"""`trl-moe bench grpo`: the arithmetic, what is measured in which order, and what is told of it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from trl_moe_ext.bench.grpo import run as running
from trl_moe_ext.bench.grpo.bound import Costs, bound, bound_of_overlap
from trl_moe_ext.bench.grpo.clock import Measured, StepClock
from trl_moe_ext.bench.grpo.plan import Plan, Request
from trl_moe_ext.bench.grpo.process import Keep
from trl_moe_ext.bench.grpo.results import Results, step_seconds
from trl_moe_ext.bench.grpo.run import run, split_cores
from trl_moe_ext.bench.grpo.table import notes, tables, title
from trl_moe_ext.bench.grpo.task import Scorer, prompts
from trl_moe_ext.bench.process import Missing
from trl_moe_ext.cli.console import show
from trl_moe_ext.cli.main import app
from trl_moe_ext.errors import ConfigError, MoeExtError

MODEL = Path(__file__).parents[2] / "configs" / "quickstart" / "model"
FACTS = {
    "versions": {"torch": "2.13.0"},
    "device": {"name": "a processor", "cores": 2, "torch_threads": 2},
}


def request(**changes: Any) -> Request:
    sizes = {"prompts": 4, "num_generations": 8, "completion_length": 64, "rank": 16, "max_staleness": 4}
    times = {"latencies": (0.0, 1.0), "steps": 10, "warm_up": 2, "rounds": 1, "concurrency": 8}
    return replace(Request(model="model", **sizes, **times), **changes)


def sync(generation: float, training: float, wait: float = 0.0, steps: int = 10) -> Measured:
    """So many seconds a step; 32 completions each."""
    read = {"completions": 32.0 * steps, "tokens": 0.0, "generation": generation * steps, "reward_wait": wait * steps}
    return Measured(steps, (generation + training + wait) * steps, read)


def asynchronous(seconds: float, generated_steps: float = 10.0) -> Measured:
    states = {"trainer/training": 3.0, "trainer/waiting": 1.0, "generator/generating": 9.0, "generator/idle": 1.0}
    return Measured(10, 10 * seconds, {"completions": 32 * generated_steps, "tokens": 0.0, **states})


@pytest.mark.parametrize(
    ("costs", "best", "of_overlap"),
    [
        # Generation is the slowest part: the rest is free.
        (Costs(1.0, 0.5, 0.0, 1.2, 0.9, 0.7, 0.0, 8), 1.5 / 0.9, 1.5 / 1.2),
        (Costs(1.0, 0.5, 1.0, 1.2, 0.9, 0.7, 4.0, 8), 2.5 / 0.9, 2.5 / 1.2),
        # Training is.
        (Costs(1.0, 0.5, 0.0, 0.3, 0.2, 0.7, 0.0, 8), 1.5 / 0.7, 1.5 / 0.7),
        # The calls of the reward function are: four of a second, one at a time.
        (Costs(1.0, 0.5, 4.0, 1.2, 0.9, 0.7, 4.0, 1), 5.5 / 4.0, 5.5 / 4.0),
        # With nothing but shared cores there is nothing to gain: the bound may be below 1.
        (Costs(1.0, 0.2, 0.0, 2.0, 2.0, 0.4, 0.0, 8), 0.6, 0.6),
    ],
)
def test_the_bound(costs: Costs, best: float, of_overlap: float) -> None:
    assert bound(costs) == pytest.approx(best)
    assert bound_of_overlap(costs) == pytest.approx(of_overlap)


def test_what_was_generated_before_gives_no_credit() -> None:
    assert step_seconds(asynchronous(0.5), 32) == pytest.approx(0.5)
    assert step_seconds(asynchronous(0.5, generated_steps=5), 32) == pytest.approx(1.0)
    assert step_seconds(asynchronous(0.5, generated_steps=20), 32) == pytest.approx(0.5), "nor has what nobody took"


def results() -> Results:
    found = Results(request())
    found.sync = {0.0: [sync(1.0, 0.5)], 1.0: [sync(1.0, 0.5, 1.0), sync(1.0, 0.5, 1.2), sync(1.0, 0.5, 1.1)]}
    found.asynchronous = {0.0: [asynchronous(1.2)], 1.0: [asynchronous(1.25)]}
    found.generator = [asynchronous(1.0)]
    found.sync_on_generator_part = found.sync_on_trainer_part = [sync(1.1, 0.9)]
    return found


def test_a_comparison() -> None:
    without, with_latency = results().comparisons()
    assert (without.ratio, without.bound) == (pytest.approx(1.5 / 1.2), pytest.approx(1.5 / 1.0))
    assert without.share_of_bound == pytest.approx(1.0 / 1.2)
    assert (with_latency.sync.low, with_latency.sync.median, with_latency.sync.high) == pytest.approx((2.5, 2.6, 2.7))
    assert with_latency.ratio == pytest.approx(2.6 / 1.25)
    assert with_latency.costs == Costs(
        generation=pytest.approx(1.0),
        training=pytest.approx(0.5),
        reward_wait=pytest.approx(1.1),
        generation_on_part=pytest.approx(1.1),
        generator_on_part=pytest.approx(1.0),
        training_on_part=pytest.approx(0.9),
        reward_calls=pytest.approx(4.0),
        concurrency=8,
    )
    assert with_latency.bound_of_overlap == pytest.approx(2.6 / 1.1)
    assert (with_latency.sync_tokens, with_latency.async_tokens) == pytest.approx((32 * 64 / 2.6, 32 * 64 / 1.25))
    assert (with_latency.trainer_wait, with_latency.generator_idle) == pytest.approx((0.25, 0.1))


@pytest.mark.parametrize("missing", ["generator", "sync_on_generator_part", "sync_on_trainer_part"])
def test_there_is_no_comparison_without_its_bound(missing: str) -> None:
    found = results()
    setattr(found, missing, [])
    assert found.comparisons() == []


def test_a_side_that_was_not_measured_leaves_the_other_latencies() -> None:
    found = results()
    found.asynchronous[0.0] = []
    assert [comparison.latency for comparison in found.comparisons()] == [1.0]


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    found = results()
    for table in tables(found):
        show(table, is_folded=False)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [
        "1",
        "s",
        "2.600",
        "(2.500-2.700)",
        "1.250",
        "(1.250-1.250)",
        "2.08",
        "2.60",
        "80%",
        "788",
        "1,638",
        "25%",
        "10%",
    ] in lines
    assert ["0", "s", "1.000", "0.000", "0.500", "1.100", "1.000", "0.000", "0.900", "1.36"] in lines
    assert title(found) == "GRPO of model, r=16: 32 completions of 64 tokens a step, 8 for each prompt"
    told = list(notes(replace(found, failures=["async, rewards of 1 s: it died"]), FACTS))
    assert told[0] == "Not measured: async, rewards of 1 s: it died."
    assert "Median (lowest-highest) of 1 round, each side in a new process: 10 steps after 2 to warm up" in told[1]


def test_json_has_everything() -> None:
    told = json.loads(json.dumps(results().as_dict()))
    assert told["comparisons"][1]["share_of_bound"] == pytest.approx(2.08 / 2.6)
    assert len(told["sync"]["1.0"]) == 3
    assert told["command"].startswith("trl-moe bench grpo model --latency 0,1 ")


@pytest.mark.parametrize(
    ("cores", "generator", "trainer"),
    [((0, 1), (1,), (0,)), ((0, 1, 2), (2,), (0, 1)), ((2, 3, 5, 7), (5, 7), (2, 3))],
)
def test_cores_are_shared_as_by_the_trainer(cores: tuple[int, ...], generator: Any, trainer: Any) -> None:
    assert split_cores(cores) == (generator, trainer)


@pytest.mark.parametrize("cores", [(0, 1), (0, 1, 2)])
def test_rounds_are_interleaved(cores: tuple[int, ...]) -> None:
    seen: list[tuple[str, int, float]] = []
    said: list[str] = []

    def measure(plan: Plan, keep: Keep | None) -> Measured:
        seen.append((plan.side, len(plan.cores), plan.latency))
        assert (keep is not None) is (plan.side == "async")
        return asynchronous(0.5) if plan.side != "sync" else sync(0.3, 0.2)

    found = run(request(rounds=2, latencies=(1.0, 0.0)), cores, said.append, measure=measure)
    parts = [("sync", 1, 0.0)] if len(cores) == 2 else [("sync", 1, 0.0), ("sync", 2, 0.0)]
    n = len(cores)
    both = [(side, n, latency) for latency in (0.0, 1.0) for side in ("sync", "async")]
    assert seen == 2 * [("generator", 1, 0.0), *parts, *both]
    assert len(found.comparisons()) == 2
    assert len(found.sync_on_trainer_part) == 2
    assert "".join(said).splitlines()[-1] == "round 2 of 2, async, rewards of 1 s: 0.50 s a step"


def test_a_failure_is_told_and_the_rest_is_measured() -> None:
    def measure(plan: Plan, keep: Keep | None) -> Measured | Missing:
        if plan.side == "async" and plan.latency:
            return Missing("Its process was ended by signal 9", is_failure=True)
        return asynchronous(0.5) if plan.side != "sync" else sync(0.3, 0.2)

    found = run(request(), (0, 1), lambda _: None, measure=measure)
    assert found.failures == ["async, rewards of 1 s: Its process was ended by signal 9"]
    assert [comparison.latency for comparison in found.comparisons()] == [0.0]


def test_the_picture_of_the_last_run_is_kept(tmp_path: Path) -> None:
    def measure(plan: Plan, keep: Keep | None) -> Measured:
        if keep is not None:
            directory = tmp_path / f"run {plan.latency}"
            directory.mkdir()
            (directory / "async_timeline.png").write_text(f"latency {plan.latency}")
            keep(directory)
        return asynchronous(0.5) if plan.side != "sync" else sync(0.3, 0.2)

    run(request(), (0, 1), lambda _: None, plot=tmp_path / "t.png", measure=measure)
    assert (tmp_path / "t.png").read_text() == "latency 1.0"


def test_the_clock_leaves_out_what_warms_up() -> None:
    counts = iter([{"tokens": 10.0}, {"tokens": 100.0, "idle": 2.0}, {"tokens": 150.0, "idle": 3.0}])
    clock = StepClock(lambda: next(counts))
    clock.on_step_end()
    time.sleep(0.05)
    clock.on_step_end()
    clock.on_step_end()
    assert clock.measured(warm_up=1).read == {"tokens": 140.0, "idle": 3.0}
    assert clock.measured(warm_up=1).steps == 2
    assert clock.measured(warm_up=1).seconds >= 0.05 > clock.measured(warm_up=2).seconds
    with pytest.raises(MoeExtError, match="ended after 3 steps, of which 3 were to warm up"):
        clock.measured(warm_up=3)


def test_rewards_differ_within_a_group_and_are_counted() -> None:
    scorer = Scorer(latency=0.0)
    rewards = scorer.reward_function(2, concurrency=8)(completion_ids=[[1, 2], [3, 4], [5, 6]], prompts=["a"] * 3)
    assert rewards == scorer.reward_function(None, 8)(completion_ids=[[1, 2], [3, 4], [5, 6]])
    assert len(set(rewards)) == 3
    assert scorer.generated() == {"completions": 6.0, "tokens": 12.0}


@pytest.mark.parametrize(("concurrency", "calls_in_a_row"), [(3, 1), (1, 3)])
def test_both_sides_have_the_same_reward_pool(concurrency: int, calls_in_a_row: int) -> None:
    scorer = Scorer(latency=0.1)
    scorer.of_groups([[1]] * 6, size=2, concurrency=concurrency)
    assert 0.1 * calls_in_a_row <= scorer.waited < 0.1 * calls_in_a_row + 0.09


def test_prompts_are_of_one_length() -> None:
    texts = prompts()["prompt"]
    assert len({len(text) for text in texts}) == 1
    assert len(set(texts)) == len(texts)


def bench(*args: object) -> Result:
    return CliRunner().invoke(app, ["bench", "grpo", *map(str, args)], catch_exceptions=False)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """What reaches the measurements, which are not made."""
    seen: list[Request] = []

    def run(request: Request, cores: Any, say: Any, plot: Path | None) -> Results:
        seen.append(request)
        return replace(results(), request=request)

    monkeypatch.setattr(running, "run", run)
    monkeypatch.setattr(running, "usable_cores", lambda: [0, 1])
    return seen


def test_the_command_of_a_result_asks_for_the_same(asked: list[Request], tmp_path: Path) -> None:
    options = ("--latency", "0.5,2", "--prompts", 3, "--completion_length", 17, "--json", tmp_path / "bench.json")
    assert bench(MODEL, *options).exit_code == 0
    told = json.loads((tmp_path / "bench.json").read_text())
    assert bench(*shlex.split(told["command"])[3:]).exit_code == 0
    assert asked[0] == asked[1]
    assert (asked[0].latencies, asked[0].prompts, asked[0].completion_length) == ((0.5, 2.0), 3, 17)


def test_json_alone(asked: list[Request]) -> None:
    told = json.loads(bench(MODEL, "--json", "-", "--latency", "0,1").stdout)
    assert {"versions", "comparisons"} <= told.keys()
    assert told["device"]["torch_threads"] == 2, "of the processes that were measured"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--latency", "a"], "--latency 'a' is not a list of seconds, such as 0,1.0"),
        (["--latency", "-1"], "use seconds from 0 to 600"),
        (["--latency", "nan"], "use seconds from 0 to 600"),
        (["--json", "missing/bench.json"], "is not a directory: missing/bench.json cannot be written"),
        (["--plot", "/"], "/ is a directory; give the name of a file"),
    ],
)
def test_mistakes_are_one_line(options: list[str], message: str) -> None:
    found = bench(MODEL, *options)
    assert (found.exit_code, found.stdout) == (2, "")
    assert message in found.stderr
    assert len(found.stderr.splitlines()) == 1


def test_a_model_that_is_not_there() -> None:
    found = bench("no/such/model")
    assert found.exit_code == 2
    assert "no/such/model" in found.stderr


@pytest.mark.parametrize(
    ("system", "message"),
    [
        (SimpleNamespace(), "run it on Linux"),
        (SimpleNamespace(sched_setaffinity=None, sched_getaffinity=lambda _: {3}), "needs two"),
    ],
)
def test_machines_that_cannot_do_two_things(system: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "os", system)
    with pytest.raises(ConfigError, match=message):
        running.usable_cores()


def test_a_child_keeps_to_its_cores_before_torch_counts_them() -> None:
    code = "import sys, trl_moe_ext.bench.grpo.child; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_for_real(tmp_path: Path) -> None:
    files = tmp_path / "bench.json", tmp_path / "timeline.png"
    options = ("--latency", "0.3", "--prompts", 2, "--num_generations", 2, "--completion_length", 8, "--rank", 4)
    found = bench(MODEL, *options, "--steps", 3, "--rounds", 1, "--json", files[0], "--plot", files[1])
    assert found.exit_code == 0, found.output
    [comparison] = json.loads(files[0].read_text())["comparisons"]
    assert comparison["costs"]["reward_wait"] == pytest.approx(0.3, abs=0.2)
    assert comparison["sync"]["median"] > comparison["costs"]["reward_wait"]
    assert all(value > 0 for name, value in comparison["costs"].items())
    assert 0 <= comparison["trainer_wait"] <= 1
    assert "round 1 of 1, async, rewards of 0.3 s: " in found.stderr
    with Image.open(files[1]) as image:
        assert image.width > 500
