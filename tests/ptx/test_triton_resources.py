"""The step's kernel, compiled without a GPU: nothing spills, and memory moves 16 bytes a thread."""

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

SIGNATURE = {
    "rows": "*i64",
    "program_rows": "*i32",
    "arguments": "*i64",
    "row_count": "i32",
    "group_count": "i32",
    "grad_scale": "*fp32",
    "found_inf": "*fp32",
    "DTYPE": "constexpr",
    "REAL": "constexpr",
    "SPLIT": "constexpr",
    "TILE": "constexpr",
}


def compiled(dtype, program_numel, target, split=False):
    from triton.compiler import ASTSource

    from czm_fused.ops.step.triton import launch_shape
    from czm_fused.ops.step.triton_kernel import step_kernel
    from czm_fused.ops.triton_utils import TRITON_DTYPES, real_dtype

    num_warps, tile = launch_shape(program_numel, dtype, split)
    constants = {"DTYPE": TRITON_DTYPES[dtype], "REAL": real_dtype(dtype)}
    constants |= {"SPLIT": split, "TILE": tile}
    source = ASTSource(fn=step_kernel, signature=SIGNATURE, constexprs=constants)
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    return triton.compile(source, target=target, options=options)


def resource_usage(cubin, path):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    tool = str(tool) if tool.exists() else shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("there is no cuobjdump to report resources with")
    path.write_bytes(cubin)
    report = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", report.stdout)}


@pytest.mark.parametrize(
    ("capability", "dtype", "program_numel"),
    [
        (80, torch.float32, 4608),
        (90, torch.float32, 4608),
        (90, torch.float32, 144),
        (90, torch.float64, 4608),
        (90, torch.bfloat16, 4608),
        (100, torch.float32, 4608),
    ],
    ids=str,
)
def test_step_kernel_for_cuda(capability, dtype, program_numel, tmp_path):
    from triton.backends.compiler import GPUTarget

    kernel = compiled(dtype, program_numel, GPUTarget("cuda", capability, 32))
    usage = resource_usage(kernel.asm["cubin"], tmp_path / "step.cubin")
    assert usage["STACK"] == usage["LOCAL"] == 0
    if dtype == torch.float32:
        # Six programs of four warps fit the 65,536 registers of a processor.
        assert usage["REG"] <= 80

    wide = r"v2\.b64" if dtype == torch.float64 else r"v4\.b32"
    # The reductions, then the updates: without mean, channels-last and contiguous.
    assert len(re.findall(rf"st\.global\.{wide}", kernel.asm["ptx"])) >= 3 * 2
    assert len(re.findall(rf"ld\.global\.{wide}", kernel.asm["ptx"])) >= 2 + 3 * 3
    assert not re.search(r"\b(atom|red)\.", kernel.asm["ptx"])


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_step_kernel_with_remainders_for_cuda(capability, tmp_path):
    from triton.backends.compiler import GPUTarget

    kernel = compiled(torch.bfloat16, 4608, GPUTarget("cuda", capability, 32), split=True)
    usage = resource_usage(kernel.asm["cubin"], tmp_path / "step.cubin")
    assert usage["STACK"] == usage["LOCAL"] == 0


def test_step_kernel_for_rocm():
    from triton.backends.compiler import GPUTarget

    kernel = compiled(torch.float32, 4608, GPUTarget("hip", "gfx942", 64))
    assert re.search(r"\.(vgpr|sgpr)_spill_count:\s+[1-9]", kernel.asm["amdgcn"]) is None
    assert re.search(r"global_store_dwordx[24]", kernel.asm["amdgcn"])


@pytest.mark.parametrize(
    ("module", "name", "tensors", "numbers", "constants"),
    [
        ("add_relu_noise", "_forward_kernel", 4, 3, {"CHANNELS_LAST": False, "BLOCK": 1024}),
        ("add_relu_noise", "_backward_kernel", 4, 3, {"CHANNELS_LAST": True, "BLOCK": 1024}),
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
    if module == "add_relu_noise":
        constants["INDEX"] = tl.int32
    types = ["*fp32"] * tensors + ["i32"] * numbers + ["constexpr"] * len(constants)
    source = ASTSource(
        fn=kernel,
        signature=dict(zip(kernel.arg_names, types, strict=True)),
        constexprs=constants,
        # As a launch marks tensors from torch's allocator, and numbers that 16 divides.
        attrs={(number,): [["tt.divisibility", 16]] for number in range(tensors + numbers)},
    )
    asm = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}
    ).asm
    usage = resource_usage(asm["cubin"], tmp_path / "kernel.cubin")
    assert usage["STACK"] == usage["LOCAL"] == 0
    assert re.search(r"ld\.global\.v4\.b32", asm["ptx"])
    assert re.search(r"st\.global\.v4\.b32", asm["ptx"])
