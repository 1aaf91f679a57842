"""The kernels, compiled without a GPU: nothing spills, and a thread reads four weights at once."""

import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from czm_fused.ops.backends import interpreting_triton

triton = pytest.importorskip("triton")

pytestmark = [
    pytest.mark.simulated,
    pytest.mark.skipif(
        interpreting_triton(), reason="TRITON_INTERPRET is set, so nothing compiles"
    ),
]

TYPES = {
    "items": "*i64",
    "arguments": "*i64",
    "tensor_count": "i32",
    "group_count": "i32",
    "first_program": "i32",
    "grad_scale": "*fp32",
    "found_inf": "*fp32",
}
SHORT, LONG = 0, 1
NOISE = {"INDEX": triton.language.int32, "BLOCK": 1024}


def compiled(dtype, length, target, split=False):
    from triton.compiler import ASTSource

    from czm_fused.ops.step.triton import kernel_constants, launch_shapes
    from czm_fused.ops.step.triton_kernel import step_kernel

    shape = launch_shapes(dtype)[length]
    constants = kernel_constants(dtype, split, shape)
    signature = TYPES | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=step_kernel, signature=signature, constexprs=constants)
    options = {"num_warps": shape.num_warps, "enable_fp_fusion": False}
    return triton.compile(source, target=target, options=options)


def resource_usage(cubin, path):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    tool = str(tool) if tool.exists() else shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("there is no cuobjdump to report resources with")
    path.write_bytes(cubin)
    report = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", report.stdout)}


@pytest.mark.parametrize("length", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize(
    ("capability", "dtype", "split"),
    [
        *((90, dtype, False) for dtype in (torch.float32, torch.float64, torch.bfloat16)),
        *((90, dtype, True) for dtype in (torch.bfloat16, torch.float16)),
        *((capability, torch.float32, False) for capability in (80, 100, 120)),
        *((capability, torch.bfloat16, True) for capability in (80, 100, 120)),
    ],
    ids=str,
)
def test_step_kernel_for_cuda(capability, dtype, split, length, tmp_path):
    from triton.backends.compiler import GPUTarget

    kernel = compiled(dtype, length, GPUTarget("cuda", capability, 32), split)
    usage = resource_usage(kernel.asm["cubin"], tmp_path / "step.cubin")
    assert usage["STACK"] == usage["LOCAL"] == 0
    # Two programs or more share the 65,536 registers of a processor.
    assert usage["REG"] * kernel.metadata.num_warps * 32 <= 65_536 // 2

    ptx = kernel.asm["ptx"]
    # Four weights a thread: 16 bytes of float32, two times 16 of float64, 8 of the halves.
    wide = {8: r"v2\.b64", 4: r"v4\.b32", 2: r"v2\.b32"}[dtype.itemsize]
    # W and m of every tile, of filters in registers and of longer ones; and dW.
    assert len(re.findall(rf"st\.global\.{wide}", ptx)) >= 2 * 5
    assert len(re.findall(rf"ld\.global\.{wide}", ptx)) >= 3 * 5
    assert not re.search(r"\b(atom|red)\.", ptx)


def test_step_kernel_for_rocm():
    from triton.backends.compiler import GPUTarget

    kernel = compiled(torch.float32, LONG, GPUTarget("hip", "gfx942", 64))
    assert re.search(r"\.(vgpr|sgpr)_spill_count:\s+[1-9]", kernel.asm["amdgcn"]) is None
    assert re.search(r"global_store_dwordx[24]", kernel.asm["amdgcn"])


@pytest.mark.parametrize(
    ("module", "name", "tensors", "numbers", "constants"),
    [
        ("add_relu_noise", "_kernel", 4, 3, {"BACKWARD": False, "CHANNELS_LAST": False, **NOISE}),
        ("add_relu_noise", "_kernel", 4, 3, {"BACKWARD": True, "CHANNELS_LAST": True, **NOISE}),
        ("exp_scale", "_forward_kernel", 3, 1, {"TILE": 512}),
        ("exp_scale", "_backward_kernel", 5, 1, {"TILE": 512}),
    ],
)
def test_other_kernels_for_cuda(module, name, tensors, numbers, constants, tmp_path):
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"czm_fused.ops.{module}.triton"), name)
    constants = {**constants, "COMPUTE_DTYPE": tl.float32}
    types = ["*fp32"] * tensors + ["i32"] * numbers + ["constexpr"] * len(constants)
    source = ASTSource(
        fn=kernel,
        signature=dict(zip(kernel.arg_names, types, strict=True)),
        constexprs=constants,
        # As a launch marks tensors from torch's allocator.
        attrs={(number,): [["tt.divisibility", 16]] for number in range(tensors)},
    )
    asm = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}
    ).asm
    usage = resource_usage(asm["cubin"], tmp_path / "kernel.cubin")
    assert usage["STACK"] == usage["LOCAL"] == 0
    assert re.search(r"ld\.global\.v4\.b32", asm["ptx"])
    assert re.search(r"st\.global\.v4\.b32", asm["ptx"])
