"""`EFELoss` with the constructor, the call, the parameters and the numbers of an ARC-EFE project's: change the import.

    from efe_kernels.arc_efe import EFELoss

Its docstring says where it is not what the names of its terms promise; `efe_kernels.EFELoss` is the equation.
"""

from efe_kernels.arc_efe.module import EFELoss

__all__ = ["EFELoss"]
