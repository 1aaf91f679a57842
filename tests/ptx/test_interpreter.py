"""The interpreter on kernels of a few lines: what it computes, and what it traps."""

import numpy as np
import pytest
import torch

from ptx.parsing import Kernel, Trap
from ptx.recorder import Recorder

pytestmark = pytest.mark.simulated


def kernel(body):
    """Return a kernel: a pointer in %rd1, the lane in %r1, the address of its number in %rd3."""
    return Kernel(
        f"""
        .version 8.7
        .target sm_90
        .address_size 64
        .visible .entry tested(.param .u64 tested_param_0)
        {{
            .reg .pred %p<9>;
            .reg .b16 %rs<9>;
            .reg .b32 %r<9>;
            .reg .f32 %f<9>;
            .reg .b64 %rd<9>;
            .shared .align 16 .b8 buffer[1024];
            ld.param.u64 %rd1, [tested_param_0];
            mov.u32 %r1, %tid.x;
            mul.wide.u32 %rd2, %r1, 4;
            add.s64 %rd3, %rd1, %rd2;
            mov.u32 %r8, buffer;
            shl.b32 %r7, %r1, 2;
            add.s32 %r7, %r7, %r8;
            {body}
            ret;
        }}
        """
    )


def run(body, tensor=None, threads=64, grid=1, **options):
    """Run a kernel over a tensor of a number a thread, and return the tensor."""
    if tensor is None:
        tensor = torch.zeros(threads, dtype=torch.int32)
    recorder = Recorder(**options)
    recorder.launch(kernel(body), [tensor.data_ptr()], {"tensor": tensor}, threads, grid)
    return tensor


# Each lane puts its number into shared memory, and takes that of the lane at a distance.
EXCHANGE = """
    st.shared.b32 [%r7], %r1;
    {barrier}
    xor.b32 %r2, %r1, {distance};
    shl.b32 %r2, %r2, 2;
    add.s32 %r2, %r2, %r8;
    ld.shared.b32 %r3, [%r2];
    st.global.b32 [%rd3], %r3;
"""


@pytest.mark.parametrize(
    ("barrier", "distance"), [("bar.sync 0;", 32), ("bar.sync 0;", 1), ("bar.warp.sync -1;", 1)]
)
def test_exchange_through_shared_memory(barrier, distance):
    result = run(EXCHANGE.format(barrier=barrier, distance=distance))
    assert result.tolist() == [lane ^ distance for lane in range(64)]


@pytest.mark.parametrize(("barrier", "distance"), [("", 1), ("", 32), ("bar.warp.sync -1;", 32)])
def test_a_read_before_the_barrier_is_trapped(barrier, distance):
    with pytest.raises(Trap, match="race on shared memory.*reads after an unordered write"):
        run(EXCHANGE.format(barrier=barrier, distance=distance))


GROUPS = """
    shr.u32 %r4, %r1, 3;
    and.b32 %r4, %r4, 3;
    shl.b32 %r4, %r4, 3;
    shl.b32 %r5, 255, %r4;
"""


@pytest.mark.parametrize("distance", [4, 8])
def test_a_barrier_of_eight_lanes_orders_these_alone(distance):
    body = GROUPS + EXCHANGE.format(barrier="bar.warp.sync %r5;", distance=distance)
    if distance < 8:
        assert run(body).tolist() == [lane ^ distance for lane in range(64)]
    else:
        with pytest.raises(Trap, match="race on shared memory"):
            run(body)


def test_a_write_after_others_have_read_needs_a_barrier():
    # Lane 0's number is read by all, and then written by lane 0.
    body = """
        ld.shared.b32 %r3, [buffer];
        {barrier}
        st.shared.b32 [%r7], %r1;
    """
    run(body.format(barrier="bar.sync 0;"))
    with pytest.raises(Trap, match="writes after an unordered read"):
        run(body.format(barrier="bar.warp.sync -1;"))


def test_two_lanes_of_one_instruction_must_not_write_one_byte():
    with pytest.raises(Trap, match="two lanes write the same byte"):
        run("st.global.b32 [%rd1], %r1;")


def test_blocks_must_not_share_what_one_of_them_writes():
    with pytest.raises(Trap, match="blocks share a byte of tensor"):
        run("st.global.b32 [%rd3], %r1;", grid=2)
    with pytest.raises(Trap, match="blocks share a byte of tensor"):
        run(
            """
            mov.u32 %r2, %ctaid.x;
            setp.eq.s32 %p1, %r2, 0;
            @%p1 ld.global.b32 %r3, [%rd3];
            @%p1 bra DONE;
            st.global.b32 [%rd3], %r1;
            DONE:
            """,
            grid=2,
        )
    run("ld.global.b32 %r3, [%rd3];", grid=2)


def test_an_access_outside_every_tensor_is_trapped():
    with pytest.raises(Trap, match="access of 4 bytes at .* outside every tensor"):
        run("ld.global.b32 %r3, [%rd3+4];")
    with pytest.raises(Trap, match="outside every tensor, the nearest tensor"):
        run("ld.global.b32 %r3, [%rd3+-4];")
    with pytest.raises(Trap, match="outside 1024 bytes of shared memory"):
        run("ld.shared.b32 %r3, [%r7+1020];")


def test_an_access_must_be_aligned_to_its_vector():
    with pytest.raises(Trap, match="misaligned access of 16 bytes"):
        run("ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd1+4];")
    run("ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd1+16];")


HALF = """
    setp.lt.u32 %p1, %r1, 16;
    @%p1 bra LOW;
    {high}
    LOW:
    {low}
"""


@pytest.mark.parametrize(
    "instruction", ["shfl.sync.bfly.b32 %r3, %r1, 1, 31, {mask};", "bar.warp.sync {mask};"]
)
def test_lanes_that_are_named_must_come(instruction):
    whole, half = instruction.format(mask="-1"), instruction.format(mask="65535")
    run(whole)
    with pytest.raises(Trap, match="that 0xffff does not name"):
        run(half)
    # Threads 0 to 15 go where the others never come.
    skip = HALF.format(high="bra END;", low="{} END:")
    run(skip.format(half), threads=32)
    with pytest.raises(Trap, match="names 0xffffffff, met by 0xffff"):
        run(skip.format(whole), threads=32)


def test_threads_that_come_late_to_a_barrier_are_waited_for():
    # The lanes below 16 jump over the others' part, to an instruction further on.
    body = HALF.format(high="mov.u32 %r2, 1; bra END;", low="mov.u32 %r2, 2; END: bar.sync 0;")
    assert run(body + "st.global.b32 [%rd3], %r2;").tolist() == [2] * 16 + [1] * 48
    ended = HALF.format(high="bar.sync 0; bra END;", low="END:")
    with pytest.raises(Trap, match="met by 48 of 64 threads|ended"):
        run(ended + "bar.sync 0;")


def test_shuffles_stay_in_their_segment():
    # The limit of CUDA's functions for a width of 8.
    body = "shfl.sync.{}.b32 %r3, %r1, {}, 6175, -1; st.global.b32 [%rd3], %r3;"
    assert run(body.format("bfly", 4)).tolist() == [lane ^ 4 for lane in range(64)]
    down = [lane + 4 if lane % 8 < 4 else lane for lane in range(64)]
    assert run(body.format("down", 4)).tolist() == down
    assert run(body.format("idx", 3)).tolist() == [lane // 8 * 8 + 3 for lane in range(64)]


def test_votes():
    body = """
        setp.lt.u32 %p1, %r1, 3;
        vote.sync.ballot.b32 %r3, %p1, -1;
        vote.sync.any.pred %p2, %p1, -1;
        @%p2 add.s32 %r3, %r3, 100;
        st.global.b32 [%rd3], %r3;
    """
    assert run(body).tolist() == [107] * 32 + [0] * 32


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [
        ("prmt.b32 %r2, %r3, %r4, 0x5410;", 0x22226666),
        ("prmt.b32 %r2, %r3, %r4, 0x3210;", 0x88886666),
        ("bfe.u32 %r2, %r3, 4, 8;", 0x66),
        ("bfe.s32 %r2, %r3, 24, 8;", 0xFFFFFF88),
        ("shf.l.wrap.b32 %r2, %r3, %r4, 8;", 0x22222288),
        ("shr.s32 %r2, %r3, 40;", 0xFFFFFFFF),
        ("shr.u32 %r2, %r3, 40;", 0),
        ("mul.hi.u32 %r2, %r3, %r4;", 0x123451EB),
        ("lop3.b32 %r2, %r3, %r4, %r1, 0x3c;", 0xAAAA4444),
        ("popc.b32 %r2, %r3;", 12),
        ("clz.b32 %r2, %r4;", 2),
        ("div.s32 %r2, -7, 2;", 0xFFFFFFFD),
        ("rem.s32 %r2, -7, 2;", 0xFFFFFFFF),
    ],
)
def test_integers(instructions, expected):
    constants = "mov.b32 %r3, 0x88886666; mov.b32 %r4, 0x22222222;"
    result = run(f"{constants} {instructions} st.global.b32 [%rd3], %r2;")
    assert result[0].item() % 2**32 == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_rounded_to_even(dtype):
    kind = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    values = torch.randn(64)
    values[:4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("nan"), -0.0])
    expected = values.to(dtype).view(torch.int16).to(torch.int32)
    result = run(
        f"ld.global.f32 %f1, [%rd3]; cvt.rn.{kind}.f32 %rs1, %f1; cvt.s32.s16 %r3, %rs1; "
        "st.global.b32 [%rd3], %r3;",
        values.clone().view(torch.int32),
    )
    is_number = ~values.isnan()
    assert torch.equal(result[is_number], expected[is_number])


def test_fused_multiply_add_rounds_once():
    values = torch.tensor([1 + 2**-12] * 64)
    product = "ld.global.f32 %f1, [%rd3]; fma.rn.f32 %f2, %f1, %f1, 0fBF800000;"
    result = run(product + "st.global.f32 [%rd3], %f2;", values.clone())
    assert result[0].item() == np.float32(2**-11 + 2**-24)


def test_approximations_are_as_wrong_as_they_may_be():
    values = torch.linspace(-3, 3, 64)
    body = "ld.global.f32 %f1, [%rd3]; ex2.approx.f32 %f2, %f1; st.global.f32 [%rd3], %f2;"
    exact = run(body, values.clone())
    torch.testing.assert_close(exact, values.exp2(), rtol=2**-23, atol=0)
    error = run(body, values.clone(), approx_error=1.0) / exact - 1
    assert (error.abs() > 2**-23).all() and (error > 0).any() and (error < 0).any()
    assert (error.abs() <= 3 * 2**-23).all()
