"""center_ and uncenter_: outputs stay, gradients lose what only shifts the mean."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from czm_fused import (
    CZMConv2d,
    FusedCZMSGD,
    center_,
    convert,
    czm_init_,
    czm_param_groups,
    exp_scale,
    uncenter_,
)

CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(4, 6, 3), (8, 4, 9)),
    "2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, dilation=2), (8, 4, 9, 9)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), (8, 4, 5, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, (1, 3), groups=2), (8, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (8, 4, 5, 5)),
    "two_filters_a_channel": (lambda: nn.Conv2d(4, 8, 3, groups=4), (8, 4, 5, 5)),
    "one_channel": (lambda: nn.Conv2d(1, 1, 3), (8, 1, 5, 5)),
    "3d": (lambda: nn.Conv3d(4, 6, 2), (8, 4, 4, 4, 4)),
    "czm": (lambda: CZMConv2d(4, 6, 3), (8, 4, 5, 5)),
}
pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture
def seeded():
    torch.manual_seed(0)


def network():
    """A network of float64 with padding, groups and a branch."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 1),
    ).double()


def images(samples=16):
    return torch.rand(samples, 3, 6, 6, dtype=torch.float64)


def bound(*tensors):
    """64 roundings of the largest magnitude: sums of up to 72 products, rounded pairwise."""
    return 64 * torch.finfo(torch.float64).eps * max(x.abs().max().item() for x in tensors)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_gradients_are_those_of_the_centered_input(kind):
    make, shape = CONVOLUTIONS[kind]
    convolution = make().double()
    x = 1 + torch.randn(shape, dtype=torch.float64)
    before = convolution(x)
    assert center_(convolution, x) == 1
    mean = x.transpose(0, 1).flatten(1).mean(dim=1)
    assert (convolution.input_mean - mean).abs().max() <= bound(mean)
    after = convolution(x)
    assert (after - before).abs().max() <= bound(before)

    cotangent = torch.randn_like(after)
    after.backward(cotangent)
    weight = convolution.weight.detach().clone().requires_grad_()
    relative = x - mean.view(1, -1, *[1] * (x.dim() - 2))
    settings = (convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
    literal = getattr(F, f"conv{x.dim() - 2}d")(relative, weight, None, *settings)
    literal.backward(cotangent)
    # Without padding, the two are the same function of the weight.
    assert (convolution.weight.grad - weight.grad).abs().max() <= bound(after, weight.grad) * 64


def test_outputs_stay_through_measuring_again_and_folding():
    model, x = network(), images()
    before = model(x)
    for example in (x, 2 * images(), images(1)):
        assert center_(model, example) == 3
        assert (model(x) - before).abs().max() <= bound(before)
    names = {*model.state_dict()}
    uncenter_(model)
    assert (model(x) - before).abs().max() <= bound(before)
    assert {name for name in names if "input_mean" in name} == names - {*model.state_dict()}
    assert {*model.state_dict()} == {*network().state_dict()}
    uncenter_(model)


def test_a_step_leaves_the_mean_of_the_output():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1)).double(), 5 + images()
    for centered in (False, True):
        trained = copy.deepcopy(model)
        if centered:
            center_(trained, x)
        before = trained(x).mean(dim=(0, 2, 3))
        trained(x).square().mean().backward()
        with torch.no_grad():
            trained[0].weight.sub_(trained[0].weight.grad)
        moved = (trained(x).mean(dim=(0, 2, 3)) - before).abs().max()
        assert moved <= bound(5 * trained[0].weight) if centered else moved > 0.1


def test_modules_stay_themselves():
    model = network()
    modules, parameters = [*model.modules()], [*model.parameters()]
    hooked = []
    model[0].register_forward_hook(lambda *_: hooked.append(1))
    model.train()
    model[4].weight.requires_grad_(False)
    center_(model, images())
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.training and len(hooked) == 1
    assert [type(model[i]) for i in (0, 2, 4)] == [CZMConv2d] * 3
    assert "stem" not in repr(model)
    group = czm_param_groups(model)
    assert [each["name"] for each in group] == ["stem", "depthwise", "pointwise", "rest"]


def test_copies_and_checkpoints():
    model, x = network(), images()
    center_(model, x)
    copies = [copy.deepcopy(model)]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies.append(torch.load(file, weights_only=False))
    fresh = network()
    center_(fresh, images())
    fresh.load_state_dict(model.state_dict())
    copies.append(fresh)
    for each in copies:
        assert torch.equal(each(x), model(x))
        each[0].input_mean.zero_()
    assert model[0].input_mean.abs().min() > 0


def test_a_state_with_means_loads_into_modules_without():
    model = nn.Sequential(CZMConv2d(3, 8, 3), nn.ReLU(), CZMConv2d(8, 8, 3)).double()
    twin = copy.deepcopy(model)
    center_(model, images())
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(images(2) * 0 + 1), model(images(2) * 0 + 1))
    # And back: a state without means forgets those that are there.
    uncentered = copy.deepcopy(model)
    uncenter_(uncentered)
    model.load_state_dict(uncentered.state_dict())
    assert model[0].input_mean is None


def test_uncenter_refuses_a_bias_that_came_to_be_shared():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)).double()
    center_(model, images())
    model[1].bias = model[0].bias
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="the bias of '0' must be its own"):
        uncenter_(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_uncenter_forgets_the_mean_of_a_convolution_whose_bias_is_gone():
    model, x = nn.Sequential(nn.Conv2d(3, 3, 3)).double(), images()
    center_(model, x)
    model[0].bias = None
    expected = model(x)
    uncenter_(model)
    assert torch.equal(model(x), expected) and "0.input_mean" not in model.state_dict()


def test_uncenter_gives_torchs_class_back():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), CZMConv2d(4, 4, 3)).double()
    before = [vars(module).keys() for module in model]
    center_(model, images())
    assert type(model[0]) is CZMConv2d
    pickled = io.BytesIO()
    torch.save(model, pickled)
    pickled.seek(0)
    for each in (model, torch.load(pickled, weights_only=False)):
        uncenter_(each)
        assert [type(module) for module in each] == [nn.Conv2d, CZMConv2d]
        assert [vars(module).keys() for module in each] == before
    assert center_(model, images()) == 2


@pytest.mark.parametrize("initialise", [czm_init_, lambda model: model[0].reset_parameters()])
def test_initialisation_forgets_the_mean(initialise):
    model = nn.Sequential(CZMConv2d(3, 4, 3)).double()
    center_(model, images())
    initialise(model)
    assert model[0].input_mean is None
    assert model(torch.zeros(1, 3, 5, 5, dtype=torch.float64)).count_nonzero() == 0


def test_uncenter_takes_a_module():
    with pytest.raises(TypeError, match="must be a torch.nn.Module, but was of type list"):
        uncenter_([network()])


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnCZMForward(CZMConv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias)


def test_what_cannot_be_centered_is_left():
    left = [
        nn.Conv2d(3, 3, 1, bias=False),
        OwnForward(3, 3, 1),
        OwnCZMForward(3, 3, 1),
        exp_scale(nn.Conv2d(3, 3, 1)),
        nn.ConvTranspose2d(3, 3, 1),
        nn.Conv2d(3, 3, 1),
        nn.Conv2d(3, 3, 1),
    ]
    left[-1].bias = left[-2].bias
    model = nn.Sequential(*left, nn.Conv2d(3, 3, 1)).double()
    model.never = nn.Sequential()
    kinds = [type(each) for each in left]
    x = images()
    before = model(x)
    assert center_(model, x) == 1
    assert [type(each) for each in left] == kinds
    assert (model(x) - before).abs().max() <= bound(before)
    assert parametrize.is_parametrized(left[3])


def test_a_convolution_that_runs_twice_gets_the_mean_of_both():
    convolution = nn.Conv2d(3, 3, 1, padding=0).double()
    model = nn.Sequential(convolution, convolution)
    x = images()
    means = [x.mean(dim=(0, 2, 3)), convolution(x).mean(dim=(0, 2, 3))]
    center_(model, x)
    expected = torch.stack(means).mean(dim=0)
    assert (convolution.input_mean - expected).abs().max() <= bound(*means)


class CalledByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.convolution(input=x)


def test_input_given_by_keyword():
    model, x = CalledByKeyword().double(), images()
    before = model(x)
    center_(model, x)
    assert (model(x) - before).abs().max() <= bound(before)
    mean = model.convolution.input_mean
    assert (mean - x.mean(dim=(0, 2, 3))).abs().max() <= bound(x)


class Regions(nn.Module):
    """A detector's head, which looks at those regions alone that may hold something."""

    def __init__(self):
        super().__init__()
        self.all = nn.Conv2d(3, 3, 1)
        self.found = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        x = self.all(x)
        return self.found(x[x.amax(dim=(1, 2, 3)) > 1e3])


def test_what_reads_no_samples_is_left():
    model = Regions().double()
    assert center_(model, images()) == 1
    assert type(model.found) is nn.Conv2d


def test_unbatched_input():
    convolution, x = nn.Conv2d(3, 3, 1).double(), images(1)[0]
    center_(convolution, x)
    assert (convolution.input_mean - x.mean(dim=(1, 2))).abs().max() <= bound(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    model, x = network().to(dtype), images().to(dtype)
    before = model(x)
    center_(model, x)
    assert model[0].input_mean.dtype == torch.float32
    assert model(x).dtype == dtype
    # The bias and what is taken from it are rounded at each of three layers.
    magnitude = max(before.abs().max().item(), 1)
    assert (model(x) - before).abs().max() <= 16 * torch.finfo(dtype).eps * magnitude
    model(x).sum().backward()
    assert all(p.grad.dtype == dtype for p in model.parameters())


def test_autocast_keeps_the_mean_in_full_precision():
    model = nn.Sequential(nn.Conv2d(3, 8, 1))
    center_(model, 100 + images().float())
    with torch.autocast("cpu", torch.bfloat16):
        x = (100 + images()).bfloat16().float()
        # W x rounds to bfloat16 at a level of about 100; the bias takes that level away again.
        assert model(x).isfinite().all()
        model(x).float().sum().backward()
    assert model[0].weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_buffers_of_half_precision_do_not_drift(dtype):
    model, x = nn.Sequential(nn.Conv2d(3, 64, 3)), 3.1 + images().float()
    center_(model, x)
    model, x = model.to(dtype), x.to(dtype)
    center_(model, x)
    before = copy.deepcopy(model.state_dict())
    for _ in range(5):
        center_(model, x)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_centered_in_inference_mode_trains():
    model, x = network(), images()
    before = model(x).detach()
    with torch.inference_mode():
        for _ in range(2):
            center_(model, x)
    after = model(x)
    assert (after - before).abs().max() <= bound(before)
    after.sum().backward()
    assert not any(each.is_inference() for each in model.state_dict().values())


def test_means_loaded_in_inference_mode_train():
    model, x = network(), images()
    center_(model, x)
    fresh = nn.Sequential(CZMConv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    state = {f"0.{name}": value for name, value in model[0].state_dict().items()}
    with torch.inference_mode():
        fresh.load_state_dict(state, strict=False)
    fresh(x.to(fresh[2].weight.dtype)).sum().backward()
    assert not fresh[0].input_mean.is_inference()


def test_not_finite_means_change_nothing():
    model = network()
    before = copy.deepcopy(model.state_dict())
    x = images()
    x[0, 0, 0, 0] = math.inf
    with pytest.raises(ValueError, match="mean of what '0' reads is not"):
        center_(model, x)
    assert type(model[0]) is nn.Conv2d
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "example", "error", "message"),
    [
        (nn.Conv2d(3, 3, 1, bias=False), images(), ValueError, "with a bias of its own"),
        (nn.Linear(3, 3), images(), ValueError, "with a bias of its own"),
        (nn.Conv2d(3, 3, 1, dtype=torch.cfloat), images().cfloat(), ValueError, "real numbers"),
        ([nn.Conv2d(3, 3, 1)], images(), TypeError, "nn.Module"),
        (network(), images()[:, :2], ValueError, "but the model raised RuntimeError"),
        (network(), images().float(), ValueError, "but the model raised RuntimeError"),
        (network(), images(0), ValueError, "must have samples that reach a convolution"),
        (nn.ModuleDict({"a": nn.Conv2d(3, 3, 1)}), images(), ValueError, "but the model raised"),
    ],
    ids=[
        "no bias",
        "no convolution",
        "complex",
        "no module",
        "channels",
        "dtype",
        "no samples",
        "no forward pass",
    ],
)
def test_bad_input_is_named(model, example, error, message):
    before = copy.deepcopy(model.state_dict()) if isinstance(model, nn.Module) else {}
    with pytest.raises(error, match=message):
        center_(model, example)
    after = model.state_dict() if isinstance(model, nn.Module) else {}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_compiled_model_sees_new_means():
    model, x = network(), images()
    center_(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = model(x)
    assert (compiled(x) - before).abs().max() <= bound(before)
    center_(model, 3 * images())
    assert (compiled(x) - before).abs().max() <= bound(before)
    compiled(x).square().sum().backward()


def test_scripted_and_exported():
    model, x = network().eval(), images()
    center_(model, x)
    for other in (
        torch.jit.script(model),
        torch.export.export(model, (x,)).module(),
        torch.fx.symbolic_trace(model),
    ):
        assert (other(x) - model(x)).abs().max() <= bound(model(x))


def test_it_trains_a_converted_network():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    x = images(64).float()
    labels = (x[:, 0].mean(dim=(1, 2)) > x[:, 1].mean(dim=(1, 2))).long()
    convert(model, example_input=x)
    optimizer = FusedCZMSGD(czm_param_groups(model), lr=0.3, momentum=0.9)
    losses = []
    for step in range(60):
        if step % 20 == 0:
            center_(model, x)
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "by layer"])
def test_sharded_models_keep_outputs_and_parameters(fully_shard, whole):
    model, x = network(), images()
    center_(model, x)
    if not whole:
        fully_shard(model[2])
    fully_shard(model)
    before = model(x).detach()
    # Each call follows a pass without backward, which leaves the parameters gathered.
    for example in (x, 2 * images()):
        center_(model, example)
        assert all(hasattr(each, "full_tensor") for each in model.parameters())
        assert (model(x) - before).abs().max() <= bound(before)
    uncenter_(model)
    assert not any("input_mean" in name for name in model.state_dict())
    assert (model(x) - before).abs().max() <= bound(before)


def test_averaged_copies_average_the_means_with_the_biases():
    model, x = network(), images()
    center_(model, x)
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for factor in (1, 2, 3):
        center_(model, factor * images())
        averaged.update_parameters(model)
    assert (averaged(x) - model(x)).abs().max() <= bound(model(x))
