"""The CUDA module on machines without a GPU."""

import importlib.util
import subprocess
import sys

import pytest


def test_cuda_module_loads_without_a_gpu():
    if importlib.util.find_spec("czm_fused._C_cuda") is None:
        pytest.skip("the native cuda module is not built")
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
