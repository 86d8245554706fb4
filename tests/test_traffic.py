"""HBM traffic, counted in the text of compiled programs."""

import jax
import jax.numpy as jnp
import pytest

from launch import traffic

HBM = "f32[256]{0:T(256)}"  # 1,024 bytes
CHIP = "f32[256]{0:T(256)S(1)}"


def program(*lines: str, fused: str = "") -> str:
  body = "\n".join(f"  {line}" for line in lines)
  return f"""HloModule jit_f, is_scheduled=true, num_partitions=1
{fused}
ENTRY %main (x: f32[256]) -> f32[256] {{
  %x = {HBM} parameter(0)
  %kept = {CHIP} parameter(1)
  %i = s32[]{{:T(128)S(4)}} parameter(2)
{body}
}}
"""


@pytest.mark.parametrize(
  ("line", "expected"),
  [
    (f"ROOT %y = {HBM} add(%x, %x)", 3 * 1024),
    (f"ROOT %y = {HBM} add(%kept, %kept)", 1024),
    (f"ROOT %y = {CHIP} add(%x, %kept)", 1024),
    (f"ROOT %y = {CHIP} multiply(%kept, %kept)", 0),
    (f"ROOT %y = {HBM} bitcast(%x)", 0),
    (f"ROOT %y = ({CHIP}, {HBM}, u32[]{{:S(2)}}) copy-start(%x)", 1024),
    (f"ROOT %y = ({HBM}, {CHIP}, u32[]{{:S(2)}}) copy-start(%kept)", 1024),
    (f"ROOT %y = (({HBM}), f32[64]{{0:S(1)}}, s32[]{{:S(2)}}) slice-start(%x)", 256),
    ("ROOT %y = f32[64]{0} dynamic-slice(%x, %i)", 2 * 256),
    (f"ROOT %y = {HBM} copy-done(%x)", 0),
  ],
)
def test_only_what_lies_in_hbm_counts(line, expected):
  assert traffic.hbm_bytes(program(line + ", metadata={}")) == expected


def test_a_fusion_reads_the_slices_that_it_takes_and_writes_where_it_updates():
  fused = f"""
%fused (a: f32[256], b: f32[256], c: s32[]) -> f32[256] {{
  %a = {HBM} parameter(0)
  %b = {HBM} parameter(1)
  %c = s32[]{{:T(128)}} parameter(2)
  %flat = {HBM} bitcast(%b)
  %part = f32[16]{{0}} dynamic-slice(%flat, %c), dynamic_slice_sizes={{16}}
  %new = f32[16]{{0}} add(%part, %part), metadata={{}}
  ROOT %all = {HBM} dynamic-update-slice(%a, %new, %c), metadata={{}}
}}
"""
  line = f"ROOT %y = {HBM} fusion(%x, %x, %i), kind=kLoop, calls=%fused"
  assert traffic.hbm_bytes(program(line, fused=fused)) == 2 * 16 * 4
  # Now the fusion also reads all of %b.
  fused = fused.replace("add(%part, %part)", "add(%b, %part)")
  assert traffic.hbm_bytes(program(line, fused=fused)) == 1024 + 16 * 4


def test_a_loop_counts_as_often_as_it_runs():
  loop = f"""
%body (p: (s32[], f32[256])) -> (s32[], f32[256]) {{
  %p = (s32[], {HBM}) parameter(0)
  %k = s32[] get-tuple-element(%p), index=0
  %z = {HBM} get-tuple-element(%p), index=1
  %w = {HBM} negate(%z), metadata={{}}
  ROOT %out = (s32[], {HBM}) tuple(%k, %w)
}}

%condition (q: (s32[], f32[256])) -> pred[] {{
  %end = s32[]{{:S(4)}} constant(7), metadata={{}}
  %q = (s32[], {HBM}) parameter(0)
  %j = s32[]{{:S(4)}} get-tuple-element(%q), index=0
  ROOT %less = pred[]{{:S(4)}} compare(%j, %end), direction=LT
}}
"""
  start = f"%start = (s32[], {HBM}) tuple(%i, %x)"
  line = f"ROOT %y = (s32[], {HBM}) while(%start), condition=%condition, body=%body"
  assert traffic.hbm_bytes(program(start, line, fused=loop)) == 7 * 2 * 1024
  loop = loop.replace("constant(7)", "add(%j, %j)")
  assert traffic.hbm_bytes(program(start, line, fused=loop)) == 2 * 1024


def test_a_compiled_function_moves_its_arguments_and_results():
  compiled = jax.jit(lambda x, y: x + 2 * y).lower(jnp.ones(1000), jnp.ones(1000)).compile()
  assert traffic.hbm_bytes(compiled.as_text()) == 3 * 4000
