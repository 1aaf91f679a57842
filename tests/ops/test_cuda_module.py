"""The CUDA module on machines without a GPU."""

import importlib.util
import re
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("czm_fused._C_cuda") is None,
    reason="the native cuda module is not built",
)


def test_cuda_module_loads_without_a_gpu():
    # In a process of its own: what it registers stays.
    code = (
        "import torch, czm_fused._C_cuda, czm_fused.ops.step.cuda, czm_fused.ops.add_relu_noise\n"
        "import czm_fused.ops.exp_scale\n"
        "for name in ('add_relu_noise_native',\n"
        "             'add_relu_noise_backward_native',\n"
        "             'exp_scale_native', 'exp_scale_backward_native'):\n"
        "    registered = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "    assert registered(f'czm_fused::{name}', 'CUDA'), name\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "schema" not in run.stderr, run.stderr


def test_cuda_module_refuses_other_arguments_than_it_takes():
    from czm_fused import _C_cuda

    nothing = (0, 0, False, 0, 0, b"", 0, b"", b"", 0, 0, 0)
    with pytest.raises(TypeError, match="takes 12 arguments, but was given 11"):
        _C_cuda.launch_step(*nothing[1:])
    with pytest.raises(TypeError, match="expected bytes, int found"):
        _C_cuda.launch_step(*nothing[:5], 3, *nothing[6:])
    with pytest.raises(TypeError, match="takes 2 arguments, but was given 1"):
        _C_cuda.keep_on_device(0)
    # No blocks ask nothing of a device.
    assert _C_cuda.launch_step(*nothing) is None


def test_cuda_module_names_the_devices_that_it_runs_on(monkeypatch, caplog):
    from czm_fused import _C_cuda
    from czm_fused.ops import backends

    for name in _C_cuda.architectures.split(","):
        assert re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name)
    monkeypatch.setattr(_C_cuda, "architectures", "9.0")
    monkeypatch.setattr(backends, "_capability", lambda device_type, index: (10, 0))
    monkeypatch.setattr(backends, "_triton_problem", lambda: None)
    backends._choose.cache_clear()
    try:
        chosen = [backends.choose(torch.device("cuda"), "auto") for _ in range(2)]
    finally:
        backends._choose.cache_clear()
    assert chosen == ["triton", "triton"]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "built for compute capability 9.0, and the device's is 10.0" in message
