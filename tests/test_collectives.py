"""Traffic between devices, counted in the text of compiled programs."""

import math

import jax
import pytest

from configs import mixer
from launch import collectives
from launch.collectives import Collective
from train.data import DatasetInfo
from train.devices.mesh import make_mesh, microbatch_size, sharded_axis
from train.state import abstract_state, make_init
from train.step import make_train_step, trace_train_step

INFO = DatasetInfo("noise", tuple(map(str, range(100))), (32, 32, 3), {"train": 45000})
SUMS = 4 * 4  # float32: loss, two kinds of hits, examples


def train_step(data: int, fsdp: int) -> tuple[list[Collective], int, int]:
  """Collectives of Mixer's step on eight devices; bytes of parameters sharded and replicated."""
  config = mixer.get_config()
  mesh = make_mesh(data, fsdp, jax.devices()[:8])
  step = make_train_step(config, INFO, microbatch_size(config, mesh), mesh)
  state = abstract_state(make_init(config, INFO, mesh), INFO)
  sharded = replicated = 0
  for x in jax.tree.leaves(state.params):
    if sharded_axis(x.shape, mesh) is None:
      replicated += 4 * math.prod(x.shape)
    else:
      sharded += 4 * math.prod(x.shape)
  assert sharded + replicated == 4 * 242_788
  hlo = trace_train_step(step, state, config, INFO, mesh).lower().compile().as_text()
  return collectives.count(hlo), sharded, replicated


def test_data_parallel_step_sums_all_gradients_once():
  rows, sharded, replicated = train_step(8, 1)
  assert (sharded, replicated) == (0, 971_152)
  sent = 2 * 7 / 8 * (replicated + SUMS)
  assert rows == [Collective("all-reduce", 8, 1, 971_168, sent)]


def test_fully_sharded_step_gathers_parameters_and_scatters_gradients():
  rows, sharded, replicated = train_step(1, 8)
  assert (sharded, replicated) == (823_296, 147_856)
  assert rows == [
    Collective("all-gather", 8, 10, sharded // 8, 7 / 8 * sharded),
    Collective("all-reduce", 8, 1, replicated + SUMS, 2 * 7 / 8 * (replicated + SUMS)),
    Collective("reduce-scatter", 8, 10, sharded, 7 / 8 * sharded),
  ]


def test_mesh_of_both_axes_also_sums_each_part_over_data():
  rows, sharded, replicated = train_step(4, 2)
  assert (sharded, replicated) == (823_296, 147_856)
  assert rows == [
    Collective("all-gather", 2, 10, sharded // 2, sharded / 2),
    Collective("all-reduce", 4, 1, sharded // 2, 2 * 3 / 4 * sharded / 2),
    Collective("all-reduce", 8, 1, replicated + SUMS, 2 * 7 / 8 * (replicated + SUMS)),
    Collective("reduce-scatter", 2, 10, sharded, sharded / 2),
  ]


def program(operation: str, shape: str = "f32[64]{0:T(128)S(1)}") -> str:
  return f"""HloModule jit_f, is_scheduled=true, num_partitions=8

ENTRY %main (x: f32[64]) -> f32[64] {{
  %x.1 = {shape} parameter(0)
  %y = bf16[3,5]{{1,0:T(8,128)(2,1)}} parameter(1)
  ROOT %op = {operation}, channel_id=1, use_global_device_ids=true
}}
"""


@pytest.mark.parametrize(
  ("groups", "size"),
  [
    ("{{0,1},{2,3},{4,5},{6,7}}", 2),
    ("{{0,1,2,3,4,5,6,7}}", 8),
    ("{}", 8),
    ("[2,4]<=[8]", 4),
    ("[4,2]<=[2,4]T(1,0)", 2),
    ("mesh['data'=4,'fsdp'=2] {'data'}", 4),
    ("mesh['a'=2,'b'=1,'c'=4], device_ids=([4,2]T(1,0)) {'a','c'}", 8),
    ("mesh['a'=8] {'a':(2)4}", 4),
  ],
)
def test_groups_are_read_in_each_of_xlas_ways(groups, size):
  hlo = program(f"f32[64]{{0}} all-reduce(%x.1), replica_groups={groups}")
  assert collectives.count(hlo) == [
    Collective("all-reduce", size, 1, 256, 2 * (size - 1) / size * 256)
  ]


def test_groups_of_one_send_nothing_and_unknown_ones_are_refused():
  hlo = program("f32[64]{0} all-reduce(%x.1), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}")
  assert collectives.count(hlo) == []
  with pytest.raises(ValueError, match="unknown groups"):
    collectives.count(program("f32[64]{0} all-reduce(%x.1), replica_groups=?"))


@pytest.mark.parametrize(
  ("operation", "expected"),
  [
    ("(f32[64], bf16[3,5]) all-reduce(%x.1, /*index=1*/%y)", ("all-reduce", 286, 429.0)),
    ("f32[256] all-gather(%x.1)", ("all-gather", 256, 768)),
    ("(f32[64], f32[256]) all-gather-start(%x.1)", ("all-gather", 256, 768)),
    ("f32[16] reduce-scatter(%x.1)", ("reduce-scatter", 256, 192.0)),
    ("f32[64] all-to-all(%x.1)", ("all-to-all", 256, 192.0)),
  ],
)
def test_each_kind_sends_what_a_ring_does(operation, expected):
  (row,) = collectives.count(program(operation + ", replica_groups=[2,4]<=[8]"))
  assert (row.kind, row.operand_bytes, row.wire_bytes) == expected
  assert (row.count, row.group_size) == (1, 4)


def test_a_permutation_sends_its_operand_and_the_end_of_a_start_counts_for_nothing():
  operation = "f32[64] collective-permute(%x.1), source_target_pairs={{0,1},{1,2},{2,0}}"
  assert collectives.count(program(operation)) == [Collective("collective-permute", 2, 1, 256, 256)]
  assert collectives.count(program("f32[256] all-gather-done(%x.1)")) == []


def test_a_part_that_a_tpu_cuts_out_of_an_all_reduce_is_a_reduce_scatter():
  text = """%all-reduce-scatter (p: f32[14,4]) -> f32[4,4] {
  %p = f32[14,4]{1,0:T(8,128)} parameter(0)
  %zero = f32[] constant(0)
  %pad = f32[16,4]{1,0:T(8,128)} pad(%p, %zero), padding=0_2x0_0
  %sum = f32[16,4]{1,0:T(8,128)} all-reduce(%pad), channel_id=3, replica_groups={{0,1,2,3}}
  %device = u32[] partition-id()
  %none = u32[] constant(0)
  ROOT %part = f32[4,4]{1,0} dynamic-slice(%sum, %device, %none), dynamic_slice_sizes={4,4}
}
"""
  assert collectives.count(text) == [Collective("reduce-scatter", 4, 1, 224, 168)]


def test_a_collective_that_a_tpu_spreads_over_fusions_counts_once():
  parts = [
    f"""%fused.{i} (p: f32[64]) -> f32[256] {{
  %p.{i} = f32[64]{{0:T(128)}} parameter(0)
  %g.{i} = f32[256]{{0:T(128)}} all-gather(%p.{i}), channel_id=3, """
    f"""replica_groups=[2,4]<=[8], frontend_attributes={{chain_id="{chain}"}}
  ROOT %c.{i} = f32[256] custom-call(%g.{i}), custom_call_target="AsyncCollectiveStart"
}}
"""
    for i, chain in enumerate((0, 0, 0, 1))
  ]
  assert collectives.count("\n".join(parts)) == [Collective("all-gather", 4, 2, 512, 1536)]
