import pytest
import torch

from czm_fused.training.chance import draws_from


def test_draws_go_on_from_the_generator_and_leave_the_default_one_alone():
    torch.manual_seed(0)
    expected_outside = torch.rand(6)
    alone = torch.Generator().manual_seed(1)
    expected_inside = [torch.rand(n, generator=alone) for n in (3, 2, 1)]

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    outside, inside = [], []
    for n in (3, 2):
        outside.append(torch.rand(2))
        with draws_from(generator):
            inside.append(torch.rand(n))
    outside.append(torch.rand(2))
    inside.append(torch.rand(1, generator=generator))
    assert torch.equal(torch.cat(outside), expected_outside)
    assert all(map(torch.equal, inside, expected_inside))


def test_default_generator_comes_back_after_an_error():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    with pytest.raises(KeyboardInterrupt), draws_from(generator):
        torch.rand(5)
        raise KeyboardInterrupt
    assert torch.equal(torch.rand(1), expected)
