from __future__ import annotations

from pathlib import Path

import pytest

from tests.emulated.build import MODES, PLAIN, Workshop, missing


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    wrong = missing(PLAIN)
    if wrong is not None:
        pytest.skip(wrong)
    return Workshop(Path(tmp_path_factory.mktemp("emulated")), [mode for mode in MODES if missing(mode) is None])
