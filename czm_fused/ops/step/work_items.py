"""Where the work items of a GPU step have their memory: what the CUDA and Triton tables share."""

from __future__ import annotations

from typing import Any

import numpy as np

from czm_fused.ops.step.spec import ADDRESSES, DTYPES, FIELD, compute_dtype

_FILTER_ADDRESSES = ("log_scale", "log_scale_momentum_buffer")
_REMAINDER_BYTES = 2
_ITEMSIZES = np.array([dtype.itemsize for dtype in DTYPES])
_COMPUTE_ITEMSIZES = np.array([compute_dtype(dtype).itemsize for dtype in DTYPES])


def with_addresses(items: np.ndarray, descriptors: np.ndarray) -> np.ndarray:
    """Return the items with the addresses of their first weights and filters; 0 for no memory.

    Args:
        items: have fields for `ADDRESSES`, for `first`, the weights of the tensor before the item,
            for `numel`, its own, and for `tensor`, a row of `descriptors`.
        descriptors: of all tensors, with addresses.
    """
    items = items.copy()
    rows = descriptors[items["tensor"]]
    dtypes = rows[:, FIELD["dtype"]]
    filters = items["first"] // rows[:, FIELD["filter_numel"]]
    for name in ADDRESSES:
        base = rows[:, FIELD[name]]
        offset: Any = items["first"] * _ITEMSIZES[dtypes]
        if name == "param_remainder":
            offset = items["first"] * _REMAINDER_BYTES
        elif name in _FILTER_ADDRESSES:
            offset = filters * _COMPUTE_ITEMSIZES[dtypes]
        elif name == "step":
            offset = 0
        items[name] = np.where((base != 0) & (items["numel"] > 0), base + offset, 0)
    return items
