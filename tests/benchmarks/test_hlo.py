"""What a compiled program costs, counted in its text."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from benchmarks.costs._hlo import Array, Program, count_taps

PROGRAM = """HloModule jit_step, is_scheduled=true

%fused (p: f32[70,8,128], q: s32[]) -> f32[8,128] {
  %p = f32[70,8,128]{2,1,0:T(8,128)} parameter(0)
  %q = s32[]{:T(128)} parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%p, %q, %zero, %zero)
  %flat = f32[8,128]{1,0:T(8,128)} bitcast(%slice)
  ROOT %sum = f32[8,128]{1,0:T(8,128)} add(%flat, %flat)
}

%body (state: (s32[], f32[70,8,128])) -> (s32[], f32[70,8,128]) {
  %state = (s32[], f32[70,8,128]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %xs = f32[70,8,128]{2,1,0:T(8,128)} get-tuple-element(%state), index=1
  %row = f32[8,128]{1,0:T(8,128)S(1)} fusion(%xs, %i), kind=kLoop, calls=%fused, \
backend_config={"estimated_cycles":"100"}
  ROOT %next = (s32[], f32[70,8,128]{2,1,0:T(8,128)}) tuple(%i, %xs)
}

%turns (state: (s32[], f32[70,8,128])) -> pred[] {
  %state.1 = (s32[], f32[70,8,128]{2,1,0:T(8,128)}) parameter(0)
  %limit = s32[] constant(70)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

%again (x: f32[10,3]) -> f32[10,3] {
  %x.1 = f32[10,3]{1,0:T(8,128)} parameter(0)
  ROOT %wrong = f32[10,3]{1,0:T(8,128)} multiply(%x.1, %x.1)
}

%usual (x: f32[10,3]) -> f32[10,3] {
  ROOT %x.2 = f32[10,3]{1,0:T(8,128)} parameter(0)
}

ENTRY %main (a: f32[10,3], b: f32[70,8,128], c: pred[]) -> (f32[10,3], f32[10,3]) {
  %a = f32[10,3]{1,0:T(8,128)} parameter(0)
  %b = f32[70,8,128]{2,1,0:T(8,128)} parameter(1)
  %c = s32[] parameter(2)
  %start = (s32[], f32[70,8,128]{2,1,0:T(8,128)}) tuple(%c, %b)
  %loop = (s32[], f32[70,8,128]{2,1,0:T(8,128)}) while(%start), \
condition=%turns, body=%body
  %branch = f32[10,3]{1,0:T(8,128)} conditional(%c, %a, %a), \
branch_computations={%again, %usual}
  %reduced = (f32[10,3]{1,0:T(8,128)}, /*index=1*/bf16[4]{0:T(256)}) \
all-reduce(%branch, %branch), to_apply=%again
  %first = (f32[10,3]{1,0:T(8,128)S(1)}, f32[10,3]{1,0:T(8,128)}, u32[]{:S(2)}) \
copy-start(%a), cross_program_prefetch_index=0
  %done = f32[10,3]{1,0:T(8,128)S(1)} copy-done(%first)
  ROOT %out = (f32[10,3]{1,0:T(8,128)}, f32[10,3]{1,0:T(8,128)S(1)}) \
tuple(%branch, %done)
}
"""


def test_loops_conditions_and_memory_are_counted_as_they_run():
  counts = Program(PROGRAM).counts()
  assert counts.operations == 70 * 8 * 128  # the loop's sums; not the other branch
  assert counts.cycles == 7000
  assert counts.kernels == 70
  assert counts.collectives == {"all-reduce": (1, 10 * 3 * 4 + 4 * 2)}
  reduced = 3 * 16 * 128 * 4 + 256 * 2  # two operands and two results, as stored
  # A turn reads one of the 70 slices; what stays on the chip is not written anywhere.
  counter = 4
  assert counts.traffic == 70 * (8 * 128 * 4 + counter) + reduced + 16 * 128 * 4


def test_arrays_are_stored_in_whole_tiles():
  assert Array("f32", (10, 512, 10), "1,2,0:T(8,128)").stored_bytes == 10 * 16 * 512 * 4
  assert Array("bf16", (3, 100), "0,1:T(8,128)(2,1)").stored_bytes == 104 * 128 * 2
  assert Array("f32", (10,), "0:T(128)S(1)").stored_bytes == 512
  assert Array("f32", (), ":T(128)").stored_bytes == 4
  assert Array("pred", (10, 3), "1,0").stored_bytes == 30
  assert Program(PROGRAM).stored_arguments() == (
    120 + 70 * 8 * 128 * 4 + 4,
    16 * 128 * 4 + 70 * 8 * 128 * 4 + 4,
  )


def test_a_loop_without_a_constant_number_of_turns_is_refused():
  text = PROGRAM.replace("%limit = s32[] constant(70)", "%limit = s32[] iota()")
  with pytest.raises(ValueError, match="loop has no constant number of turns"):
    Program(text).counts()
  with pytest.raises(ValueError, match="must be compiled HLO"):
    Program("nothing")


@pytest.mark.parametrize(
  ("size", "taps", "outputs", "options"),
  [
    (5, 3, 5, {"before": 1}),
    (7, 3, 4, {"stride": 2, "before": 1}),
    (4, 3, 9, {"before": 2, "dilation": 2}),
    (9, 3, 5, {"kernel_dilation": 2}),
    (1, 10, 10, {"before": 9}),
  ],
)
def test_taps_are_those_of_a_convolution_of_ones(size, taps, outputs, options):
  stride, before = options.get("stride", 1), options.get("before", 0)
  dilation = options.get("dilation", 1)
  spread, reach = (
    (size - 1) * dilation + 1,
    (taps - 1) * options.get("kernel_dilation", 1),
  )
  after = (outputs - 1) * stride + reach + 1 - before - spread
  found = lax.conv_general_dilated(
    jnp.ones((1, 1, size)),
    jnp.ones((1, 1, taps)),
    (stride,),
    [(before, after)],
    lhs_dilation=(dilation,),
    rhs_dilation=(options.get("kernel_dilation", 1),),
  )
  assert found.shape[-1] == outputs
  assert count_taps(size, taps, outputs, **options) == found.sum()


def test_operations_are_xlas_own():
  """Of a program without loops, on the backend that there is."""

  def run(a, b):
    return jnp.where(a @ b > 0, a @ b, -b[:5].sum()).sum(axis=0)

  compiled = jax.jit(run).lower(jnp.ones((5, 6)), jnp.ones((6, 7))).compile()
  found: object = compiled.cost_analysis()
  assert isinstance(found, dict)
  counted = Program(compiled.as_text() or "").counts().operations
  assert math.isclose(counted, found["flops"], rel_tol=0.05)
