"""The kernels of csrc/prompt on the emulator: sound in every mode, and a mistake in them is caught.

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
    assert workshop.drive(mode, KERNELS) == ""


def test_every_mistake_is_caught(workshop: Workshop) -> None:
    tried = [mutation for mutation in ALL if missing(mutation.caught_by) is None]

    def drive(index: int) -> str:
        return workshop.drive(tried[index].caught_by, tried[index].apply(KERNELS), f"mutation{index}")

    with workers() as pool:
        complaints = list(pool.map(drive, range(len(tried))))
    missed = [f"{m.name} [{m.caught_by.name}]" for m, said in zip(tried, complaints, strict=True) if not said]
    assert not missed
    if len(tried) < len(ALL):
        pytest.skip(f"{len(ALL) - len(tried)} mutations are not tried, a sanitizer is missing here")


def test_a_mutation_whose_place_is_gone_or_ambiguous_is_refused() -> None:
    mutation = Mutation("some mistake", PLAIN, "a < b", "a <= b", before=";")
    assert mutation.apply("a < b) a < b;") == "a < b) a <= b;"
    with pytest.raises(ValueError, match="exactly once, it found 0"):
        mutation.apply("a < b)")
    with pytest.raises(ValueError, match="exactly once, it found 2"):
        mutation.apply("a < b; a < b;")
