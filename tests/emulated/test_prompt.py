"""The kernels of csrc/prompt/cuda.cu on the emulator: sound in every mode, and a mistake in them is caught.

What the driver draws, and what it checks, stands in driver.cpp. Their values are compared with the reference by
tests/prompt, which `make emulate` runs on the same kernels.
"""

from __future__ import annotations

import pytest

from tests.emulated.build import KERNELS, MODES, PLAIN, Mode, Workshop, missing, workers
from tests.emulated.mutations import ALL, Mutation

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_the_kernels_are_sound(mode: Mode, workshop: Workshop) -> None:
    wrong = missing(mode)
    if wrong is not None:
        pytest.skip(wrong)
    assert workshop.drive(mode, KERNELS.read_text()) == ""


@pytest.fixture(scope="module")
def caught(workshop: Workshop) -> dict[Mutation, str]:
    """What the mode that is to catch a mutation says to it."""
    source = KERNELS.read_text()

    def drive(index: int) -> str:
        mutation = ALL[index]
        wrong = missing(mutation.caught_by)
        return wrong or workshop.drive(mutation.caught_by, mutation.apply(source), f"mutation{index}")

    with workers() as pool:
        return dict(zip(ALL, pool.map(drive, range(len(ALL))), strict=True))


@pytest.mark.parametrize("mutation", ALL, ids=lambda mutation: f"{mutation.name} [{mutation.caught_by.name}]")
def test_a_mistake_is_caught(mutation: Mutation, caught: dict[Mutation, str]) -> None:
    wrong = missing(mutation.caught_by)
    if wrong is not None:
        pytest.skip(wrong)
    assert caught[mutation] != ""


def test_a_mutation_whose_place_is_gone_or_ambiguous_is_refused() -> None:
    mutation = Mutation("some mistake", PLAIN, "a < b", "a <= b", before=";")
    assert mutation.apply("a < b) a < b;") == "a < b) a <= b;"
    with pytest.raises(ValueError, match="exactly once, it found 0"):
        mutation.apply("a < b)")
    with pytest.raises(ValueError, match="exactly once, it found 2"):
        mutation.apply("a < b; a < b;")
