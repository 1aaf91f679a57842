"""What a step asks of its gradients before it follows their addresses, natively and in Python."""

import pytest
import torch
from cases import AVAILABLE, DTYPES

from czm_fused.ops.step import _layouts, _read_gradients

READERS = [pytest.param(_read_gradients, id="python")]
if ("cpu", "cpu") in AVAILABLE:
    READERS.append(pytest.param(torch.ops.czm_fused.read_gradients.default, id="native"))

on_every_reader = pytest.mark.parametrize("read", READERS)


def read_one(read, param, grad):
    """Read a gradient between two others, so that layouts of several lengths stand in a row."""
    others = [torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.ones(3)]
    grads = [others[0], grad, others[1]]
    addresses = torch.zeros(3, dtype=torch.int64)
    is_read = read(_layouts([others[0], param, others[1]]), grads, addresses)
    assert not is_read or addresses.tolist() == [grad.data_ptr() for grad in grads]
    return is_read


@on_every_reader
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "param",
    [
        torch.ones(4, 3, 3, 3),
        torch.ones(4, 3, 3, 3).to(memory_format=torch.channels_last),
        torch.ones(2, 3, 2, 2, 2).to(memory_format=torch.channels_last_3d),
        torch.ones(5, 4).t(),
        torch.ones(()),
        torch.ones(0, 3, 3, 3),
    ],
    ids=lambda param: str(param.stride()),
)
def test_gradients_like_their_parameters(read, param, dtype):
    param = param.to(dtype)
    assert read_one(read, param, torch.ones_like(param))


PARAM = torch.ones(4, 3, 3, 3)


@on_every_reader
@pytest.mark.parametrize(
    "grad",
    [
        PARAM.double(),
        PARAM.int(),
        PARAM[:3],
        PARAM.to(memory_format=torch.channels_last),
        PARAM.expand(4, 3, 3, 3)[:1].expand(4, 3, 3, 3),
        PARAM.to_sparse(),
    ],
    ids=["float64", "int32", "cut", "channels_last", "expanded", "sparse"],
)
def test_gradients_unlike_their_parameter(read, grad):
    assert not read_one(read, PARAM, grad)


@on_every_reader
@pytest.mark.parametrize("shape", [(4, 1, 3, 3), (1, 3, 3, 3), (4, 3, 1, 1)], ids=str)
def test_strides_of_single_elements_do_not_matter(read, shape):
    param = torch.ones(shape)
    dimensions = zip(shape, param.stride(), strict=True)
    strides = [1 if size == 1 else stride for size, stride in dimensions]
    assert read_one(read, param, torch.empty_strided(shape, strides))
    assert read_one(read, torch.empty_strided(shape, strides), param)


@on_every_reader
def test_channels_last_parameter_of_a_contiguous_gradient(read):
    assert not read_one(read, PARAM.to(memory_format=torch.channels_last), PARAM)


@pytest.mark.skipif(("cpu", "cpu") not in AVAILABLE, reason="the native cpu module is not built")
@pytest.mark.parametrize("grads", [[PARAM], [PARAM, PARAM]], ids=["addresses", "layouts"])
def test_lists_that_do_not_fit_are_refused(grads):
    read = torch.ops.czm_fused.read_gradients.default
    with pytest.raises(RuntimeError, match=f"{len(grads)} gradients"):
        read(_layouts([PARAM]), grads, torch.zeros(2, dtype=torch.int64))


@pytest.mark.skipif(("cpu", "cpu") not in AVAILABLE, reason="the native cpu module is not built")
def test_read_gradients_passes_opcheck():
    torch.library.opcheck(
        torch.ops.czm_fused.read_gradients,
        (_layouts([PARAM]), [PARAM.clone()], torch.zeros(1, dtype=torch.int64)),
        # Addresses keep it out of graphs.
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
