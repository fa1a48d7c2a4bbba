"""Fused kernels for training planners with an Expected Free Energy loss."""

from efe_kernels import functional
from efe_kernels.common import extension as _extension  # noqa: F401  (its import registers the C++ kernels)
from efe_kernels.functional import *  # noqa: F403
from efe_kernels.modules import EFELoss

__version__ = "0.1.0"

__all__ = ["EFELoss"]
__all__ += functional.__all__
