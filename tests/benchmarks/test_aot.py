"""Counting what a compiled program does, from its text."""

import pytest

from benchmarks import aot

PROGRAM = """\
HloModule jit_chunk, is_scheduled=true

%fused (p: bf16[8,4]) -> bf16[8,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %double = bf16[8,4]{1,0} add(%p, %p)
}

%body (state: (bf16[8,4], s32[])) -> (bf16[8,4], s32[]) {
  %state = (bf16[8,4]{1,0}, s32[]) parameter(0)
  %x = bf16[8,4]{1,0} get-tuple-element(%state), index=0
  %i = s32[] get-tuple-element(%state), index=1
  %loop_fusion = bf16[8,4]{1,0} fusion(%x), kind=kLoop, calls=%fused
  %all-reduce.1 = bf16[8,4]{1,0} all-reduce(%loop_fusion), to_apply=%add
  ROOT %out = (bf16[8,4]{1,0}, s32[]) tuple(%all-reduce.1, %i)
}

%cond (state: (bf16[8,4], s32[])) -> pred[] {
  %state = (bf16[8,4]{1,0}, s32[]) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (image: f32[2,8,8,4], kernel: f32[3,3,4,16]) -> f32[2,8,8,16] {
  %image = f32[2,8,8,4]{3,2,1,0} parameter(0)
  %kernel = f32[3,3,4,16]{3,2,1,0} parameter(1)
  %start = (bf16[8,4]{1,0}, s32[]) tuple()
  %loop = (bf16[8,4]{1,0}, s32[]) while(%start), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %conv = (f32[2,8,8,16]{3,2,1,0}, u8[0]{0}) custom-call(%image, %kernel), \
window={size=3x3 pad=1_1x1_1}, custom_call_target="__cudnn$convForward"
  ROOT %y = f32[2,8,8,16]{3,2,1,0} get-tuple-element(%conv), index=0
}
"""
STEPS = 5


@pytest.fixture
def found():
  return aot.count(PROGRAM, steps=STEPS, bandwidth=1e12, peak=1e15)


def test_counts_of_a_step(found):
  """The loop turns five times; what is before it counts a fifth."""
  assert found["kernels"] == 2 + 1 / STEPS
  assert (found["fusions"], found["collectives"]) == (1, 1)
  assert found["calls"] == {"__cudnn$convForward": 1 / STEPS}
  assert found["collective bytes"] == 8 * 4 * 2


def test_bytes_flops_and_time(found):
  arrays = 2 * 8 * 8 * 4 + 3 * 3 * 4 * 16 + 2 * 8 * 8 * 16
  small = 2 * 8 * 4 * 2  # read and written
  assert found["bytes"] == pytest.approx(2 * small + 4 * arrays / STEPS)
  assert found["flops"] == 2 * (2 * 8 * 8 * 3 * 3 * 4 * 16) / STEPS
  launches = (2 + 1 / STEPS) * aot.LAUNCH
  assert found["estimated ms"] == pytest.approx(1000 * launches, rel=0.01)


@pytest.mark.parametrize(("factor", "over"), [(1.04, False), (1.06, True)])
def test_a_budget(found, factor, over):
  budget = {"cell": {"kernels": 2.2, "bytes": 1e9, "flops": 1}}
  now = {**found, "kernels": 2.2 * factor}
  problems = aot.over_budget({"cell": now}, budget)
  assert bool(problems) == over
  assert not over or "cell: kernels" in problems[0]


@pytest.mark.parametrize("name", ["h100", "h200"])
def test_targets(name):
  text = (aot.TARGETS / f"{name}.txt").read_text()
  assert text.count("{") == text.count("}") == 4
  assert "memory_bandwidth: " in text and "device_description_str: " in text
