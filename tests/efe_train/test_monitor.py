from __future__ import annotations

import math

import pytest

from efe_train.monitor import SKIPPED_STEPS, WINDOW, Monitor, RedFlag


def row(batch: int, **changes: float) -> dict[str, float]:
    healthy = {
        "batch": batch,
        "refresh": batch % 10 == 1,
        "loss": 1.0,
        "efe": 3.0 * math.exp(-batch / 300),
        "qwen_grad": 1e-3,
        "grad_norm": 1.0,
        "prompt_norm": 10.0,
        "policy_loss": -0.1,
        "policy_grad_norm": 0.5,
        "acc_after": 0.9,
        "acc_copying": 0.8,
        "agent_lr": 1e-3,
    }
    return {**healthy, **changes}


def flags(monitor: Monitor, rows: list[dict[str, float]]) -> list[RedFlag]:
    return [flag for each in rows for flag in monitor.observe(each)]


def test_a_healthy_run_raises_no_flag() -> None:
    assert flags(Monitor(), [row(batch) for batch in range(1, 1000)]) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["loss", "prompt_norm", "grad_norm", "policy_loss", "policy_grad_norm"])
def test_nan_and_inf_are_fatal_and_say_what_to_check(name: str, value: float) -> None:
    monitor = Monitor()
    assert flags(monitor, [row(1)]) == []
    (flag,) = monitor.observe(row(2, **{name: value}))
    assert flag.fatal
    assert flag.batch == 2
    assert name in flag.message and "Check" in flag.message


def test_a_gradient_that_overflows_under_loss_scaling_is_only_fatal_when_it_stays_so() -> None:
    monitor = Monitor(loss_scaling=True)
    overflows = [row(batch, grad_norm=math.inf) for batch in range(1, SKIPPED_STEPS)]
    assert flags(monitor, overflows) == []
    assert flags(monitor, [row(SKIPPED_STEPS)]) == []
    assert flags(monitor, overflows) == []
    (flag,) = monitor.observe(row(100, grad_norm=math.inf))
    assert flag.fatal


def test_a_loss_that_is_not_finite_is_fatal_under_loss_scaling_too() -> None:
    (flag,) = Monitor(loss_scaling=True).observe(row(1, loss=math.nan))
    assert flag.fatal


def test_qwen_without_gradient_is_reported_after_a_hundred_batches() -> None:
    found = flags(Monitor(), [row(batch, qwen_grad=0.0) for batch in range(1, WINDOW + 1)])
    assert [flag.batch for flag in found] == [WINDOW]
    assert not found[0].fatal
    assert "Qwen_grad was 0" in found[0].message and "--prompt_refresh" in found[0].message


def test_a_gradient_that_is_only_remembered_does_not_count() -> None:
    """Between refreshes a row repeats the norm of the last one."""
    found = flags(Monitor(), [row(batch, refresh=batch == 1) for batch in range(1, WINDOW + 2)])
    assert [flag.batch for flag in found] == [WINDOW + 1]


@pytest.mark.parametrize(("slope", "word"), [(0.0, "flat"), (0.001, "rising")])
def test_a_loss_that_does_not_fall_is_reported_once_per_window(slope: float, word: str) -> None:
    rows = [row(batch, efe=2.0 + slope * batch) for batch in range(1, 3 * WINDOW + 50)]
    found = flags(Monitor(), rows)
    assert [flag.batch for flag in found] == [2 * WINDOW, 3 * WINDOW]
    assert all(word in flag.message and "Check the learning rates" in flag.message for flag in found)
    assert not any(flag.fatal for flag in found)


def test_the_closing_phase_in_which_only_the_policy_learns_raises_no_flag() -> None:
    monitor = Monitor()
    assert flags(monitor, [row(batch) for batch in range(1, 3 * WINDOW + 1)]) == []
    closing = [row(batch, agent_lr=0.0, qwen_grad=0.0, efe=1.0) for batch in range(3 * WINDOW + 1, 6 * WINDOW + 1)]
    assert flags(monitor, closing) == []


def test_an_agent_that_only_copies_is_reported_from_the_second_window_on() -> None:
    rows = [row(batch, acc_after=0.78) for batch in range(1, 3 * WINDOW + 50)]
    found = flags(Monitor(), rows)
    assert [flag.batch for flag in found] == [2 * WINDOW, 3 * WINDOW]
    assert all("no better than copying" in flag.message and "0.0200 fewer" in flag.message for flag in found)
    assert not any(flag.fatal for flag in found)


def test_an_agent_that_copies_at_first_and_then_learns_is_not_reported() -> None:
    rows = [row(batch, acc_after=0.7 if batch <= WINDOW else 0.82) for batch in range(1, 3 * WINDOW + 1)]
    assert flags(Monitor(), rows) == []
