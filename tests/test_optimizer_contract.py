"""What torch's own suite asks of every optimizer, on the `OptimizerInfo` that ships with torch.

torch's test_optim.py is not in its wheel; these are its questions, asked of the method's settings
that equal `torch.optim.SGD`, of the method itself, and of every backend.
"""

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    TensorTracker,
    get_error_inputs_for_all_optims,
    optim_db,
    optim_inputs_func_sgd,
    optims,
)
from torch.testing._internal.common_utils import TestCase

from czm_fused import FusedCZMSGD
from small_training import BACKENDS, PLAIN

SGD_INFO = next(info for info in optim_db if info.optim_cls is torch.optim.SGD)


class Info(OptimizerInfo):
    """The optimizer under one of its settings, which the tests are named after."""

    def __init__(self, name, backend, settings):
        super().__init__(
            FusedCZMSGD,
            optim_inputs_func=lambda device, dtype=None: [
                OptimizerInput(None, {**x.kwargs, **settings, "backend": backend}, x.desc)
                for x in optim_inputs_func_sgd(device, dtype)
            ],
            optim_error_inputs_func=error_inputs,
            scheduler_inputs=SGD_INFO.scheduler_inputs,
            supported_impls=(),
            not_og_supported_flags=("maximize", "capturable"),
            has_capturable_arg=True,
            supports_complex=False,
        )
        self._name = f"{name}_{backend}"
        self.is_sgd = settings == PLAIN

    @property
    def name(self):
        return self._name


def error_inputs(device, dtype):
    inputs = get_error_inputs_for_all_optims(device, dtype)
    for each in inputs:
        if each.optimizer_error_input.desc == "Tensor lr must be 1-element":
            each.error_regex = "lr must be a number or a 0-d tensor"
    for kwargs, error, message in (
        ({"momentum": -0.5}, ValueError, r"momentum must be a finite number >= 0, but was -0.5"),
        ({"lr": -1e-2}, ValueError, "lr must be a finite number >= 0, but was -0.01"),
        ({"weight_decay": -1}, ValueError, "weight_decay must be a finite number >= 0"),
        ({"nesterov": True}, ValueError, "nesterov needs momentum > 0"),
        ({"zmg": 2.0}, ValueError, r"zmg must be in \[0, 1\], but was 2.0"),
        ({"foreach": True}, ValueError, "foreach=True: FusedCZMSGD is fused"),
        ({"fused": False}, ValueError, "fused=False: FusedCZMSGD is fused; use backend="),
        ({"differentiable": True}, ValueError, r"use exp_scale\(conv\) with torch.optim.SGD"),
    ):
        inputs.append(
            ErrorOptimizerInput(
                OptimizerInput(None, kwargs, str(kwargs)), error_type=error, error_regex=message
            )
        )
    sparse = nn.Parameter(torch.zeros(3, device=device, dtype=dtype))
    sparse.grad = torch.ones(3, device=device, dtype=dtype).to_sparse()
    inputs.append(
        ErrorOptimizerInput(
            OptimizerInput([sparse], {}, "sparse gradient"),
            error_on=OptimizerErrorEnum.STEP_ERROR,
            error_type=RuntimeError,
            error_regex="gradient of parameter 0 is torch.sparse_coo",
        )
    )
    return inputs


INFOS = [
    Info(name, backend, settings)
    for name, settings in (("sgd", PLAIN), ("czm", {}))
    for backend in BACKENDS
]


def all_inputs(optim_info, device):
    """The inputs, each once more with lr on the device."""
    for each in optim_info.optim_inputs_func(device):
        yield each.kwargs
        yield {**each.kwargs, "capturable": True}


def conv_bias_input(device, dtype, contiguous=True):
    """A convolution's weight and bias, and what it reads."""
    weight = torch.randn(4, 3, 3, 3, 2, device=device, dtype=dtype)
    bias = torch.randn(4, 2, device=device, dtype=dtype)
    weight, bias = (
        (x[..., 0].clone() if contiguous else x[..., 0]) for x in (0.3 * weight, bias)
    )
    return nn.Parameter(weight), nn.Parameter(bias), torch.randn(
        2, 3, 5, 5, device=device, dtype=dtype
    )


def closure_of(optimizer, weight, bias, x):
    def closure():
        optimizer.zero_grad()
        loss = nn.functional.conv2d(x, weight, bias).square().mean()
        loss.backward()
        return loss

    return closure


def step_schedulers(schedulers, loss):
    loss = loss.detach()
    for scheduler in schedulers:
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(loss)
        else:
            scheduler.step()


class TestContract(TestCase):
    @optims(INFOS, dtypes=[torch.float32])
    def test_errors(self, device, dtype, optim_info):
        for error in optim_info.optim_error_inputs_func(device, dtype):
            given = error.optimizer_error_input
            params = given.params
            if params is None:
                params = [nn.Parameter(torch.zeros(2, 3, device=device, dtype=dtype))]
            if error.error_on == OptimizerErrorEnum.STEP_ERROR:
                optimizer = optim_info.optim_cls(params, **given.kwargs)
                with self.assertRaisesRegex(error.error_type, error.error_regex):
                    optimizer.step()
            elif issubclass(error.error_type, Warning):
                with self.assertWarnsRegex(error.error_type, error.error_regex):
                    optim_info.optim_cls(params, **given.kwargs)
            else:
                with self.assertRaisesRegex(error.error_type, error.error_regex):
                    optim_info.optim_cls(params, **given.kwargs)

    @optims(INFOS, dtypes=[torch.float32])
    def test_goes_in_the_right_direction(self, device, dtype, optim_info):
        schedulers = itertools.cycle(([], *optim_info.scheduler_inputs))
        for kwargs, contiguous in itertools.product(all_inputs(optim_info, device), (True, False)):
            if not contiguous and kwargs["backend"] != "reference":
                kwargs = {**kwargs, "backend": "auto"}
            weight, bias, x = conv_bias_input(device, dtype, contiguous)
            self.assertEqual(weight.is_contiguous(), contiguous)
            optimizer = optim_info.optim_cls([weight, bias], **kwargs)
            closure = closure_of(optimizer, weight, bias, x)
            schedule = [make(optimizer) for make in next(schedulers)]
            initial = closure().item()
            for _ in range(10):
                loss = optimizer.step(closure)
                step_schedulers(schedule, loss)
            final = closure().item()
            (self.assertGreater if kwargs.get("maximize") else self.assertLess)(final, initial)

    @optims(INFOS, dtypes=[torch.float32])
    def test_groups_have_their_own_rate_and_schedule(self, device, dtype, optim_info):
        inputs = itertools.cycle(optim_info.optim_inputs_func(device))
        for makes in optim_info.scheduler_inputs:
            weight, bias, x = conv_bias_input(device, dtype)
            kwargs = {k: v for k, v in next(inputs).kwargs.items() if k != "lr"}
            optimizer = optim_info.optim_cls(
                [{"params": [weight]}, {"params": [bias], "lr": 0.01}], lr=1e-3, **kwargs
            )
            schedule = [make(optimizer) for make in makes]
            closure = closure_of(optimizer, weight, bias, x)
            initial = closure().item()
            for _ in range(5):
                loss = optimizer.step(closure)
                step_schedulers(schedule, loss)
                first, second = (group["lr"] for group in optimizer.param_groups)
                self.assertEqual(10 * first, second, rtol=1e-12, atol=0)
            (self.assertGreater if kwargs.get("maximize") else self.assertLess)(
                closure().item(), initial
            )

    @optims(INFOS, dtypes=[torch.float32, torch.float64])
    def test_tensor_lr_is_the_number(self, device, dtype, optim_info):
        for kwargs, dims in itertools.product(all_inputs(optim_info, device), (0, 1)):
            if "lr" in kwargs and isinstance(kwargs["lr"], torch.Tensor):
                kwargs = {**kwargs, "lr": kwargs["lr"].item()}
            kwargs = {"lr": 1e-3, **kwargs}
            weight, bias, x = conv_bias_input(device, dtype)
            twins = [p.detach().clone().requires_grad_() for p in (weight, bias)]
            lr = torch.full((1,) * dims, kwargs["lr"], dtype=torch.float64)
            ours = optim_info.optim_cls([weight, bias], **{**kwargs, "lr": lr})
            numbers = optim_info.optim_cls(twins, **{**kwargs, "capturable": False})
            for _ in range(3):
                ours.step(closure_of(ours, weight, bias, x))
                numbers.step(closure_of(numbers, *twins, x))
                self.assertEqual([weight, bias], twins, rtol=0, atol=0)

    @optims([info for info in INFOS if info.is_sgd], dtypes=[torch.float32, torch.float64])
    def test_matches_torchs_for_loop(self, device, dtype, optim_info):
        sgd_inputs = SGD_INFO.optim_inputs_func(device)
        for each, its in zip(optim_info.optim_inputs_func(device), sgd_inputs, strict=True):
            tracker = TensorTracker()
            for optim_cls, kwargs in (
                (torch.optim.SGD, {**its.kwargs, "foreach": False, "fused": False}),
                (optim_info.optim_cls, each.kwargs),
            ):
                torch.manual_seed(0)
                params = [*conv_bias_input(device, dtype)[:2], torch.ones(3, requires_grad=True)]
                # The last one has no gradient, and one of several shapes is missing in turns.
                optimizer = optim_cls(params, **kwargs)
                for step in range(6):
                    for number, param in enumerate(params[:2]):
                        param.grad = None if step % 4 == number + 1 else torch.randn_like(param)
                    optimizer.step()
                    for param in params:
                        buffer = optimizer.state[param].get("momentum_buffer")
                        for tensor in (param, buffer):
                            if tensor is None:
                                continue
                            if optim_cls is torch.optim.SGD:
                                tracker.add(tensor)
                            else:
                                tracker.pop_check_set(tensor, self)
            self.assertTrue(tracker.all_popped())

    @optims(INFOS, dtypes=[torch.complex64])
    def test_complex_parameters_are_refused(self, device, dtype, optim_info):
        param = nn.Parameter(torch.zeros(3, device=device, dtype=dtype))
        with self.assertRaisesRegex(TypeError, "parameter 0 is torch.complex64"):
            optim_info.optim_cls([param])

    @optims(INFOS, dtypes=[torch.float32])
    def test_weight_decay_of_groups(self, device, dtype, optim_info):
        for kwargs in all_inputs(optim_info, device):
            kwargs = {**kwargs, "weight_decay": 0.0, "luma": 0.0, "lr": 0.1}
            weight, bias, _ = conv_bias_input(device, dtype)
            before = [p.detach().clone() for p in (weight, bias)]
            optimizer = optim_info.optim_cls(
                [{"params": [weight], "weight_decay": 0.5}, {"params": [bias]}], **kwargs
            )
            for p in (weight, bias):
                p.grad = torch.zeros_like(p)
            optimizer.step()
            self.assertFalse(torch.equal(weight, before[0]))
            self.assertEqual(bias.detach(), before[1], rtol=0, atol=0)

    @optims(INFOS, dtypes=[torch.float32])
    def test_step_without_gradients_does_nothing(self, device, dtype, optim_info):
        for kwargs in all_inputs(optim_info, device):
            weight, bias, _ = conv_bias_input(device, dtype)
            before = [p.detach().clone() for p in (weight, bias)]
            optimizer = optim_info.optim_cls([weight, bias], **kwargs)
            optimizer.step()
            self.assertEqual([weight.detach(), bias.detach()], before, rtol=0, atol=0)
            self.assertEqual(len(optimizer.state), 0)
            # Nor where a gradient is 0, if nothing pulls at the weights.
            for group in optimizer.param_groups:
                group.update(weight_decay=0.0, luma=0.0)
            for p in (weight, bias):
                p.grad = torch.zeros_like(p)
            optimizer.step()
            # exp(0) * W / exp(g) * exp(g) rounds twice in the reference.
            eps = torch.finfo(dtype).eps
            self.assertEqual([weight.detach(), bias.detach()], before, rtol=2 * eps, atol=0)

    @optims(INFOS, dtypes=[torch.float32])
    def test_step_hooks(self, device, dtype, optim_info):
        calls = []
        weight, bias, x = conv_bias_input(device, dtype)
        optimizer = optim_info.optim_cls([weight, bias], lr=0.1)
        handles = [
            optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append("pre")),
            optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append("post")),
            register_optimizer_step_pre_hook(lambda o, args, kwargs: calls.append("all pre")),
            register_optimizer_step_post_hook(lambda o, args, kwargs: calls.append("all post")),
        ]
        optimizer.step(closure_of(optimizer, weight, bias, x))
        self.assertEqual(calls, ["all pre", "pre", "post", "all post"])
        for handle in handles:
            handle.remove()
        optimizer.step()
        self.assertEqual(len(calls), 4)

        optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: "another"), kwargs))
        self.assertEqual(optimizer.step(lambda: "this"), "another")

    @optims(INFOS, dtypes=[torch.float32])
    def test_state_dict_hooks(self, device, dtype, optim_info):
        calls = []
        weight, bias, x = conv_bias_input(device, dtype)
        optimizer = optim_info.optim_cls([weight, bias], lr=0.1)

        def halve(o, state):
            state = copy.deepcopy(state)
            state["param_groups"][0]["lr"] /= 2
            return state

        optimizer.register_state_dict_pre_hook(lambda o: calls.append("state_dict pre"))
        optimizer.register_state_dict_post_hook(lambda o, state: calls.append("state_dict post"))
        optimizer.register_load_state_dict_pre_hook(halve)
        optimizer.register_load_state_dict_post_hook(
            lambda o: calls.append(o.param_groups[0]["lr"])
        )
        state = optimizer.state_dict()
        optimizer.load_state_dict(state)
        self.assertEqual(calls, ["state_dict pre", "state_dict post", 0.05])
        self.assertEqual(state["param_groups"][0]["lr"], 0.1)
        # The optimizer's own hooks have gone again.
        self.assertEqual(len(optimizer._optimizer_load_state_dict_pre_hooks), 1)
        self.assertEqual(len(optimizer._optimizer_load_state_dict_post_hooks), 1)

    @optims(INFOS, dtypes=[torch.float32])
    def test_state_dict_is_deterministic_and_left_alone(self, device, dtype, optim_info):
        for kwargs, named in itertools.product(all_inputs(optim_info, device), (False, True)):
            weight, bias, x = conv_bias_input(device, dtype)
            twins = [p.detach().clone().requires_grad_() for p in (weight, bias)]

            def params(pair, named=named):
                return [("weight", pair[0]), ("bias", pair[1])] if named else pair

            optimizer = optim_info.optim_cls(params([weight, bias]), **kwargs)
            for _ in range(3):
                optimizer.step(closure_of(optimizer, weight, bias, x))
            for p, q in zip(twins, (weight, bias), strict=True):
                p.data.copy_(q)
            other = optim_info.optim_cls(params(twins), **kwargs)
            state = copy.deepcopy(optimizer.state_dict())
            given = copy.deepcopy(state)
            other.load_state_dict(given)
            for _ in range(3):
                optimizer.step(closure_of(optimizer, weight, bias, x))
                other.step(closure_of(other, *twins, x))
                self.assertEqual([weight, bias], twins, rtol=0, atol=0)
            self.assertEqual(given["param_groups"], state["param_groups"])
            self.assertEqual(optimizer.state_dict(), other.state_dict(), rtol=0, atol=0)

    @optims(INFOS, dtypes=[torch.float32])
    def test_older_state_dicts_load(self, device, dtype, optim_info):
        for kwargs in all_inputs(optim_info, device):
            weight, bias, x = conv_bias_input(device, dtype)
            optimizer = optim_info.optim_cls([weight, bias], **kwargs)
            optimizer.step(closure_of(optimizer, weight, bias, x))
            state = copy.deepcopy(optimizer.state_dict())
            for group in state["param_groups"]:
                for flag in optim_info.not_og_supported_flags:
                    del group[flag]
            other = optim_info.optim_cls([weight, bias], **kwargs)
            other.load_state_dict(state)
            for flag in optim_info.not_og_supported_flags:
                self.assertEqual(other.param_groups[0][flag], optimizer.param_groups[0][flag])
            other.step(closure_of(other, weight, bias, x))
            # And a count of steps that is a number yet.
            for values in state["state"].values():
                if "step" in values:
                    values["step"] = values["step"].item()
            other.load_state_dict(state)
            other.step(closure_of(other, weight, bias, x))

    @optims(INFOS, dtypes=[torch.float32])
    def test_saved_with_weights_only_and_pickled(self, device, dtype, optim_info):
        for kwargs in all_inputs(optim_info, device):
            weight, bias, x = conv_bias_input(device, dtype)
            optimizer = optim_info.optim_cls([weight, bias], **kwargs)
            optimizer.step(closure_of(optimizer, weight, bias, x))
            state = optimizer.state_dict()
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            self.assertEqual(torch.load(file, weights_only=True), state, rtol=0, atol=0)
            for other in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
                self.assertEqual(other.state_dict(), state, rtol=0, atol=0)

    @optims(INFOS, dtypes=[torch.float32])
    def test_copies_have_all_public_attributes(self, device, dtype, optim_info):
        def public(optimizer):
            return {name for name in vars(optimizer) if not name.startswith("_")}

        for kwargs in all_inputs(optim_info, device):
            weight, bias, x = conv_bias_input(device, dtype)
            optimizer = optim_info.optim_cls([weight, bias], **kwargs)
            optimizer.step(closure_of(optimizer, weight, bias, x))
            self.assertEqual(public(copy.deepcopy(optimizer)), public(optimizer))
            self.assertIn("lr", repr(optimizer))

    @optims(INFOS, dtypes=[torch.float32])
    def test_another_default_dtype(self, device, dtype, optim_info):
        try:
            torch.set_default_dtype(torch.float64)
            weight, bias, x = conv_bias_input(device, dtype)
            optimizer = optim_info.optim_cls([weight, bias], momentum=0.9, dampening=0.5)
            for _ in range(2):
                optimizer.step(closure_of(optimizer, weight, bias, x))
            for values in optimizer.state.values():
                for value in values.values():
                    self.assertEqual(value.dtype, torch.float32)
        finally:
            torch.set_default_dtype(torch.float32)

    @optims(INFOS, dtypes=[torch.float32])
    def test_step_is_profiled_and_seen_by_schedulers(self, device, dtype, optim_info):
        weight, bias, x = conv_bias_input(device, dtype)
        optimizer = optim_info.optim_cls([weight, bias], lr=0.1)
        schedule: LRScheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        with torch.profiler.profile() as profile:
            optimizer.step(closure_of(optimizer, weight, bias, x))
        names = {event.key for event in profile.key_averages()}
        self.assertIn("Optimizer.step#FusedCZMSGD.step", names)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            schedule.step()


instantiate_device_type_tests(TestContract, globals(), only_for="cpu")


@pytest.mark.parametrize("settings", [PLAIN, {}])
def test_state_returns_to_torch_sgd(settings):
    weight, bias, x = conv_bias_input("cpu", torch.float32)
    optimizer = FusedCZMSGD([weight, bias], lr=0.1, momentum=0.9, **settings)
    optimizer.step(closure_of(optimizer, weight, bias, x))
    sgd = torch.optim.SGD([weight, bias])
    sgd.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert (sgd.param_groups[0]["lr"], sgd.param_groups[0]["momentum"]) == (0.1, 0.9)
    sgd.step(closure_of(sgd, weight, bias, x))
    momentum = optimizer.state[weight]["momentum_buffer"]
    assert sgd.state[weight]["momentum_buffer"].shape == momentum.shape


def test_capturable_keeps_the_rate_in_one_tensor():
    weight, bias, _ = conv_bias_input("cpu", torch.float32)
    optimizer = FusedCZMSGD(
        [{"params": [weight]}, {"params": [bias], "lr": 0.25}], lr=0.5, capturable=True
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    assert [rate.item() for rate in rates] == [0.5, 0.25]
    assert all((rate.dtype, rate.device) == (torch.float32, weight.device) for rate in rates)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for p in (weight, bias):
        p.grad = torch.ones_like(p)
    optimizer.step()
    schedule.step()
    assert [rate.item() for rate in rates] == [0.25, 0.125]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        assert group["lr"] is rate

    # A state of numbers becomes tensors again, and one of tensors numbers of who wants them.
    numbers = FusedCZMSGD([{"params": [weight]}, {"params": [bias]}], lr=0.5)
    state = numbers.state_dict()
    for group in state["param_groups"]:
        del group["capturable"]
    optimizer.load_state_dict(state)
    assert all(isinstance(group["lr"], torch.Tensor) for group in optimizer.param_groups)
    # A group can ask for it alone.
    numbers.add_param_group({"params": [nn.Parameter(torch.ones(3))], "capturable": True})
    kinds = [type(group["lr"]) for group in numbers.param_groups]
    assert kinds == [float, float, torch.Tensor]
    state = numbers.state_dict()
    for group in state["param_groups"]:
        group["lr"] = 0.5
        del group["capturable"]
    numbers.load_state_dict(state)
    assert [type(group["lr"]) for group in numbers.param_groups] == kinds
