"""Python as it is where a package is not installed; `python -m tests.efe_train.without PACKAGE ...` is efe-train there.

It imports nothing that could be the package.
"""

from __future__ import annotations

import sys
from typing import Any


class Without:
    """A finder of modules that does not find a package."""

    def __init__(self, package: str, finder: Any) -> None:
        self.package = package
        self.finder = finder

    def find_spec(self, name: str, *arguments: Any) -> Any:
        return None if name.partition(".")[0] == self.package else self.finder.find_spec(name, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def finders_without(package: str) -> list[Any]:
    return [Without(package, finder) for finder in sys.meta_path]


if __name__ == "__main__":
    sys.meta_path[:] = finders_without(sys.argv.pop(1))
    from efe_train.__main__ import main

    sys.exit(main())
