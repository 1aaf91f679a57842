"""The optimizer step: its specification, its plan, and the backends that run it.

Importing this defines the operator `czm_fused::step_`.
"""

from czm_fused.ops.step import operator as operator
