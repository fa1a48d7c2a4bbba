"""The emulator fails where a GPU hangs, refuses or is undefined, and otherwise does what a GPU does."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.emulated.build import ADDRESS, HERE, MODES, PLAIN, THREAD, Mode, Workshop, complaint, missing, workers

Programs = dict[Mode, Path]


@pytest.fixture(scope="module")
def scenarios(workshop: Workshop) -> Programs:
    source = (HERE / "scenarios.cu").read_text()
    modes = [mode for mode in MODES if missing(mode) is None]
    with workers() as pool:
        return dict(zip(modes, pool.map(lambda mode: workshop.program(mode, source, "scenarios"), modes), strict=True))


def program(scenarios: Programs, mode: Mode) -> Path:
    if mode not in scenarios:
        pytest.skip(str(missing(mode)))
    return scenarios[mode]


def output(program: Path, scenario: str) -> str:
    return subprocess.run([program, scenario], check=True, capture_output=True, text=True).stdout


INVALID = {
    "no blocks": "0 blocks, it must be from 1 to 2147483647",
    "2^31 blocks": "2147483648 blocks, it must be from 1 to 2147483647",
    "no threads": "0 threads, it must be from 1 to 1024",
    "1025 threads": "1025 threads, it must be from 1 to 1024",
    "launch bounds": "96 threads, its __launch_bounds__ allow 64",
    "dynamic shared memory": "16 bytes of dynamic shared memory, it must be from 0 to 0",
}


@pytest.mark.parametrize("scenario", INVALID)
def test_a_launch_that_no_device_accepts_fails(scenario: str, scenarios: Programs) -> None:
    assert f"invalid launch: {INVALID[scenario]}" in complaint(program(scenarios, PLAIN), scenario)


HANGS = {
    "exited": ("deadlock: thread 0 waits at the barrier in", "thread 1 has exited"),
    "deadlock": ("deadlock: thread 0 waits at the barrier in", "has exited"),
    "different barriers": ("threads 0 and 16 meet at different places",),
    "masked shuffle": ("a shuffle of part of a warp",),
    "partial warp": ("a shuffle of part of a warp",),
    "missing lane": ("deadlock: thread 0 waits at the shuffle in", "thread 3 has exited"),
}


@pytest.mark.parametrize("scenario", HANGS)
def test_threads_that_do_not_meet_fail(scenario: str, scenarios: Programs) -> None:
    found = complaint(program(scenarios, PLAIN), scenario)
    assert found.startswith("cuda_emulator: ")
    assert all(part in found for part in HANGS[scenario]), found


def test_a_stack_that_is_too_small_is_named(scenarios: Programs) -> None:
    assert "a thread needs more than" in complaint(program(scenarios, PLAIN), "stack")


def test_lanes_exchange_what_each_held_at_the_shuffle(scenarios: Programs) -> None:
    found = [int(value) for value in output(program(scenarios, PLAIN), "shuffles").split()]
    assert found == [100 * (thread ^ 5) for thread in range(64)]


def test_a_barrier_makes_shared_memory_visible(scenarios: Programs) -> None:
    found = [int(value) for value in output(program(scenarios, PLAIN), "barrier").split()]
    assert found == list(range(63, -1, -1))


def test_shared_memory_of_the_block_before_is_gone(scenarios: Programs) -> None:
    assert output(program(scenarios, PLAIN), "stale shared memory").split()[:2] == ["7", "-1"]


def test_blocks_and_threads_run_in_three_orders(scenarios: Programs) -> None:
    lines = output(program(scenarios, PLAIN), "orders").splitlines()
    forward, backward, shuffled = ([int(thread) for thread in line.split()] for line in lines)
    assert forward == list(range(3 * 40))
    assert backward == forward[::-1]
    assert sorted(shuffled) == forward
    assert shuffled not in (forward, backward)


def test_a_wide_access_off_its_alignment_fails(scenarios: Programs) -> None:
    assert complaint(program(scenarios, ADDRESS), "aligned") == ""
    assert "misaligned address" in complaint(program(scenarios, ADDRESS), "misaligned")


def test_an_index_outside_of_shared_memory_fails(scenarios: Programs) -> None:
    assert "index 4 out of bounds" in complaint(program(scenarios, ADDRESS), "shared bounds")


@pytest.mark.parametrize("scenario", ["no barrier", "shuffle as barrier"])
def test_shared_memory_without_a_barrier_is_a_race(scenario: str, scenarios: Programs) -> None:
    assert "data race" in complaint(program(scenarios, THREAD), scenario)


def test_shared_memory_with_a_barrier_is_no_race(scenarios: Programs) -> None:
    assert complaint(program(scenarios, THREAD), "barrier") == ""
