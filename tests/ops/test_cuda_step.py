"""How the CUDA step deals out its work, and what it keeps for graphs; no GPU is needed."""

import gc
import weakref

import numpy as np
import pytest
import torch

from czm_fused.models import cifar_resnet
from czm_fused.ops.step import cuda, device_table
from czm_fused.ops.step.descriptors import Hyperparameters, StepTensor
from czm_fused.ops.step.device_table import DeviceTable
from czm_fused.ops.step.spec import StepFlag
from czm_fused.ops.step.tensors import TensorReader
from helpers.cases import Options

CPU = torch.device("cpu")
FILTER = StepFlag.MOMENTUM | StepFlag.EXP_SCALE | StepFlag.ZERO_MEAN | StepFlag.ANCHOR
HYPERPARAMETERS = Hyperparameters([Options().row()])


class StubbedStep(cuda.CudaStep):
    """Does everything but the launch."""

    is_capturing = False

    def _run(self, launch, arguments):
        self.launched.append((launch, np.frombuffer(arguments.grads, dtype=np.int64)))

    def _is_capturing(self):
        return self.is_capturing

    def _most_words(self):
        return cuda.MANY_WORDS


def planned(params):
    tensors = [
        StepTensor.of(param, FILTER if param.dim() > 2 else StepFlag.MOMENTUM, 0)
        for param in params
    ]
    step = StubbedStep(tensors, CPU)
    step.launched = []
    states = []
    for param in params:
        state = {"momentum_buffer": torch.zeros_like(param)}
        if param.dim() > 2:
            real = torch.promote_types(param.dtype, torch.float32)
            state |= {
                name: torch.zeros(len(param), dtype=real)
                for name in ("log_scale", "log_scale_momentum_buffer")
            }
        states.append(state)
    reader = TensorReader(tensors, step.descriptors, CPU)
    grads = [torch.zeros_like(param) for param in params]
    return step, reader.read(params, grads, states)


def launches(params):
    step, inputs = planned(params)
    step(inputs, HYPERPARAMETERS, None, None)
    return [launch for launch, *_ in step.launched]


# Around what a thread, a warp, two warps and a block hold, and tensors without filters.
SHAPES = [
    (64, 1, 3, 3), (33, 2, 3, 3), (7, 3, 3, 3), (9, 3, 7, 7), (5, 16, 3, 3), (3, 64, 3, 3),
    (2, 72, 3, 3), (3, 200, 3, 3), (2, 512, 3, 3), (3, 600, 3, 3), (1, 1024, 3, 3),
    (1, 2000, 3, 3), (1, 3000, 3, 3), (1,), (641,), (5, 128),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_work_items_have_every_weight_once_and_their_addresses(dtype):
    params = [torch.zeros(shape, dtype=dtype) for shape in SHAPES]
    counts = [np.zeros(param.numel(), dtype=int) for param in params]
    for launch in launches(params):
        assert len(launch.items) == launch.blocks * cuda.CudaStep.block_threads // 32
        position = 0
        while position < len(launch.items):
            item = launch.items[position]
            group_threads = 1 << (int(item["flags"]) >> 3)
            warps = max(group_threads // 32, 1)
            # A thread group's warps are neighbours, and in one block.
            assert position % warps == 0
            assert (launch.items[position : position + warps] == item).all()
            position += warps
            if item["numel"] == 0:
                continue
            number = launch.tensors[item["tensor"]]
            begin, end = item["first"], item["first"] + item["numel"]
            counts[number][begin:end] += 1
            assert item["param"] == params[number].data_ptr() + begin * dtype.itemsize
            filters = -(-int(item["numel"]) // int(item["filter_numel"]))
            assert filters * group_threads <= max(32, group_threads)
            held = group_threads * cuda.SIZES[launch.dtype].held(launch.has_large_blocks)
            assert item["filter_numel"] <= held or group_threads == cuda.CudaStep.block_threads
    for count in counts:
        assert (count == 1).all()


def test_few_blocks_are_under_half_full():
    params = list(cifar_resnet(110).parameters())
    (launch,) = launches(params)
    warps = cuda.CudaStep.block_threads // 32
    log_threads = launch.items["flags"] >> 3
    weights = launch.items["numel"] / np.maximum((1 << log_threads) // 32, 1)
    full = weights.reshape(-1, warps).sum(axis=1) / (
        cuda.CudaStep.block_threads * cuda.SIZES[launch.dtype].weights
    )
    assert (full < 0.5).mean() <= 0.1
    assert full.mean() > 0.8


def test_launches_in_a_capture_have_small_arguments():
    step, inputs = planned([torch.zeros(3) for _ in range(600)])
    step(inputs, HYPERPARAMETERS, None, None)
    assert len(step.launched) == 1
    step.launched.clear()
    step.is_capturing = True
    step(inputs, HYPERPARAMETERS, None, None)
    words = [
        len(launch.tensors) + cuda._WORDS_A_GROUP * len(launch.groups)
        for launch, *_ in step.launched
    ]
    assert len(words) == 2 and max(words) <= cuda.FEW_WORDS
    found = np.concatenate([grads for *_, grads in step.launched])
    assert sorted(found) == sorted(grad.data_ptr() for grad in inputs.grads)


def test_launches_have_small_arguments_where_the_driver_takes_no_others(monkeypatch):
    monkeypatch.setattr(StubbedStep, "_most_words", lambda self: cuda.FEW_WORDS)
    assert len(launches([torch.zeros(3) for _ in range(600)])) == 2


def test_the_device_of_the_plan_is_asked_not_the_current_one(monkeypatch):
    asked = []

    class Native:
        def stream_of(self, device):
            asked.append(device)
            return 0, True

    monkeypatch.setattr(cuda, "_native", Native)
    step = cuda.CudaStep([], torch.device("cuda", 3))
    assert step._is_capturing()
    assert asked == [3]


def test_state_of_a_captured_step_is_kept(monkeypatch):
    monkeypatch.setattr(device_table, "_KEPT_FOR_REPLAYS", [])
    step, inputs = planned([torch.zeros(4, 3, 3, 3)])
    captured = weakref.ref(inputs.states[0]["momentum_buffer"])
    step.is_capturing = True
    step(inputs, HYPERPARAMETERS, None, None)
    del inputs
    gc.collect()
    assert captured() is not None
    device_table._KEPT_FOR_REPLAYS.clear()
    gc.collect()
    assert captured() is None


class CapturableTable(DeviceTable):
    """Counts the memory that it would pin on a GPU."""

    stream = 0
    is_capturing = False
    pinned_in_capture = 0

    def _stream(self):
        return self.stream, self.is_capturing

    def _pinned(self):
        self.pinned_in_capture += self.is_capturing
        return super()._pinned()


def test_each_stream_has_a_table_of_its_own():
    table = CapturableTable(3, CPU)
    words = np.array([1, 2, 3])
    first = table.send(words)
    table.stream = 1
    second = table.send(words)
    assert second is not first
    assert table.send(words) is second
    table.stream = 0
    assert table.send(words) is first


def test_captures_follow_one_another_without_pinning_memory():
    table = CapturableTable(3, CPU)
    words = np.array([1, 2, 3])
    table.is_capturing = True
    first, second = table.send(words), table.send(words.copy())
    assert first.tolist() == second.tolist() == [1, 2, 3]
    assert table.pinned_in_capture == 0


class Native:
    """Stands in for the native module, whose memory lives as long as the process."""

    def __init__(self):
        self.kept = []

    def keep_on_device(self, device, data):
        self.kept.append(torch.frombuffer(bytearray(data), dtype=torch.int64))
        return self.kept[-1].data_ptr()


def test_a_table_sent_in_a_capture_is_complete_for_every_later_step(monkeypatch):
    native = Native()
    monkeypatch.setattr(device_table, "_native", lambda device: native)
    monkeypatch.setattr(torch, "as_tensor", lambda memory, device: native.kept[-1])
    table = CapturableTable(3, CPU)
    words = np.array([1, 2, 3])
    table.is_capturing = True
    captured = table.send(words)
    assert table.send(words) is captured
    table.is_capturing, table.stream = False, 5
    assert table.send(words) is captured
    assert table.send(words + 1).tolist() == [2, 3, 4]
    assert captured.tolist() == [1, 2, 3]
    assert len(native.kept) == 1 and table.pinned_in_capture == 0
