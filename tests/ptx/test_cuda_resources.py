"""What the compiler makes of the CUDA kernels: registers only, and 128 bits at a time."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ptx import nvcc
from ptx.bounds import REGISTERS

pytestmark = pytest.mark.simulated

KERNELS = """
#include "cuda/add_relu_noise_kernel.cuh"
#include "cuda/exp_scale_kernel.cuh"
#include "cuda/step_kernel.cuh"

namespace czm {
#define CZM_INSTANTIATE_STEP(words, Stored, block) \\
  template __global__ void step_kernel<words, Stored, BlockSize::block>( \\
      const __grid_constant__ StepArguments<words>);
CZM_INSTANTIATE_STEP(kManyWords, float, small)

#define CZM_INSTANTIATE(Stored) \\
  template __global__ void add_relu_noise_kernel<kWidest<Stored>, Stored, Divider>( \\
      Stored*, const Stored*, const Stored*, const Noise<opmath_type<Stored>, Divider>, int64_t); \\
  template __global__ void add_relu_noise_backward_kernel<kWidest<Stored>, Stored, Divider>( \\
      Stored*, const Stored*, const Stored*, const Noise<opmath_type<Stored>, Divider>, int64_t); \\
  template __global__ void exp_scale_kernel<kWidest<Stored>, Stored>( \\
      Stored*, const Stored*, const opmath_type<Stored>*, int64_t); \\
  template __global__ void exp_scale_backward_kernel<kWidest<Stored>, Stored>( \\
      Stored*, opmath_type<Stored>*, const Stored*, const Stored*, \\
      const opmath_type<Stored>*, int64_t); \\
  CZM_INSTANTIATE_STEP(kFewWords, Stored, small) \\
  CZM_INSTANTIATE_STEP(kFewWords, Stored, large)
CZM_INSTANTIATE(float)
CZM_INSTANTIATE(double)
CZM_INSTANTIATE(__nv_bfloat16)
CZM_INSTANTIATE(__half)
}  // namespace czm
"""


def find_disassembler():
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        beside_triton = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        found = str(beside_triton) if beside_triton.exists() else None
    return found


# Half a minute of a processor each.
ARCHITECTURES = [
    "sm_80",
    pytest.param("sm_90", marks=pytest.mark.exhaustive),
    pytest.param("sm_100", marks=pytest.mark.exhaustive),
    "sm_120",
]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compiled(request, tmp_path_factory):
    """The cubin of every kernel, and the assembler's report."""
    if nvcc.obstacle() is not None:
        pytest.skip(nvcc.obstacle())
    compiler = nvcc.nvcc()
    known = subprocess.run([compiler, "--list-gpu-code"], capture_output=True, text=True).stdout
    if request.param not in known.split():
        pytest.skip(f"this nvcc does not know {request.param}")
    folder = tmp_path_factory.mktemp(request.param)
    source, cubin = folder / "kernels.cu", folder / "kernels.cubin"
    source.write_text(KERNELS)
    run = subprocess.run(
        [
            compiler,
            "-std=c++17",
            "-O3",
            "-fmad=false",
            f"-arch={request.param}",
            "-Xptxas",
            "-v",
            "-cubin",
            "-I",
            str(nvcc.CSRC),
            "-o",
            str(cubin),
            str(source),
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return cubin, run.stderr


def test_kernels_keep_everything_in_registers(compiled):
    _, report = compiled
    used = re.findall(r"entry function '(\w+)'.*?Used (\d+) registers", report, re.S)
    for block, most in REGISTERS.items():
        registers = [int(count) for name, count in used if f"LNS_9BlockSizeE{block}E" in name]
        # A kernel for each dtype.
        assert len(registers) >= 4 and max(registers) <= most, block
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
    )
    # Nine of the step, and four of each dtype.
    assert len(frames) == 9 + 4 * 4
    assert set(frames) == {("0", "0", "0")}, report


def test_step_moves_128_bits_at_a_time_and_has_no_atomics(compiled):
    cubin, _ = compiled
    disassembler = find_disassembler()
    if disassembler is None:
        pytest.skip("there is no cuobjdump")
    text = subprocess.run(
        [disassembler, "--dump-sass", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    functions = re.split(r"Function : (\S+)", text)[1:]
    steps = 0
    for name, body in zip(functions[::2], functions[1::2], strict=True):
        instructions = re.findall(r"\b(?:LDG|STG|LDL|STL|ATOM\w*|RED)\b[A-Z0-9_.]*", body)
        local = [x for x in instructions if x.startswith(("LDL", "STL", "ATOM", "RED"))]
        assert not local, (name, local)
        loads = sum(x.startswith("LDG") and ".128" in x for x in instructions)
        stores = sum(x.startswith("STG") and ".128" in x for x in instructions)
        if "step_kernel" in name:
            steps += 1
            # What a thread holds: packs of W, dW and momentum, and of W and momentum again.
            dtype, block = re.search(r"ILi\d+E(\w+?)LNS_9BlockSizeE(\d)", name).groups()
            packs = ({"f": 5, "d": 4}.get(dtype, 3), {"f": 20, "d": 20}.get(dtype, 10))[int(block)]
            assert loads >= 3 * packs and stores >= 2 * packs, (name, loads, stores)
        else:
            assert loads >= 1 and stores >= 1, name
    assert steps == 9
