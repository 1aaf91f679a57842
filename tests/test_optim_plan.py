"""What the cached plan of a step must notice between two steps, however rare."""

import pytest
import torch
from torch import nn

from czm_fused import FusedCZMSGD, czm_param_groups
from small_training import assert_equal


def stepped(*shapes, **options):
    """Return parameters and their optimizer after one step with momentum."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = FusedCZMSGD(params, lr=0.1, momentum=0.9, **options)
    set_grads(params)
    optimizer.step()
    return params, optimizer


def set_grads(params):
    for p in params:
        p.grad = torch.randn(p.shape, dtype=p.dtype)


def test_a_later_gradient_of_another_dtype_is_refused():
    params, optimizer = stepped((8, 4, 3, 3), (8, 4, 3, 3))
    set_grads(params)
    before = [p.detach().clone() for p in params]
    params[1].grad_dtype = None
    params[1].grad = params[1].grad.bfloat16()
    with pytest.raises(RuntimeError, match="gradient of parameter 1 is torch.bfloat16"):
        optimizer.step()
    assert_equal([p.detach() for p in params], before)


def test_a_parameter_cut_where_it_lies_is_noticed():
    (param,), optimizer = stepped((16, 4, 3, 3))
    whole = param.data
    param.grad = None
    param.data = whole[:8]
    set_grads([param])
    rest = whole[8:].clone()
    with pytest.raises(ValueError, match="momentum_buffer must have shape"):
        optimizer.step()
    assert_equal(whole[8:], rest)


def test_a_parameter_transposed_where_it_lies_is_noticed():
    (param,), optimizer = stepped((5, 5), zmg=0, luma=0, exp_scale=False)
    twin = nn.Parameter(param.detach().clone().t().contiguous())
    other = torch.optim.SGD([twin], lr=0.1, momentum=0.9)
    twin.grad = torch.zeros_like(twin)
    other.step()
    other.state[twin]["momentum_buffer"].copy_(optimizer.state[param]["momentum_buffer"])
    param.grad = None
    param.data = param.data.t()
    # As autograd lays it out.
    param.grad = torch.randn_like(param)
    twin.grad = param.grad.contiguous()
    optimizer.step()
    other.step()
    # One step of a few roundings on numbers of size 1.
    torch.testing.assert_close(param.detach(), twin.detach(), rtol=0, atol=1e-6)


def test_state_of_one_element_is_told_apart_by_identity():
    (param,), optimizer = stepped((1, 1, 1, 1))
    state = optimizer.state[param]
    for name, value in state.items():
        state[name] = value.clone()
    old = state["momentum_buffer"].clone()
    set_grads([param])
    optimizer.step()
    assert not torch.equal(state["momentum_buffer"], old)


def test_another_backend_takes_over_at_the_next_step():
    (param,), optimizer = stepped((4, 2, 3, 3))
    optimizer.backend = "cuda"
    set_grads([param])
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run on cpu"):
        optimizer.step()


def test_a_tensor_subclass_with_tensors_of_its_own_is_refused():
    from torch.testing._internal.two_tensor import TwoTensor

    param = nn.Parameter(TwoTensor(torch.randn(3), torch.randn(3)))
    with pytest.raises(TypeError, match="parameter 0 is a .*FusedCZMSGD takes plain tensors"):
        FusedCZMSGD([param], lr=0.1)


def test_luma_on_the_rest_leaves_transposed_convolutions_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 5, 3))
    groups = czm_param_groups(model, overrides={"rest": {"luma": 10.0}})
    optimizer = FusedCZMSGD(groups, lr=0.1)
    before = model[1].weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_equal(model[1].weight.detach(), before)


def test_a_parameter_reshaped_where_it_lies_is_noticed():
    (param,), optimizer = stepped((8, 4, 3, 3))
    param.grad = None
    param.data = param.data.view(4, 8, 3, 3)
    set_grads([param])
    before = param.detach().clone()
    with pytest.raises(ValueError, match="momentum_buffer must have shape"):
        optimizer.step()
    assert_equal([param.detach()], [before])


def test_what_was_refused_is_refused_again():
    (param,), optimizer = stepped((4, 6))
    # Of the size that the plan wants, but not of the shape.
    param.data = torch.randn(6, 4)
    before = param.detach().clone()
    for _ in range(2):
        with pytest.raises((RuntimeError, ValueError)):
            optimizer.step()
    assert_equal([param.detach()], [before])
