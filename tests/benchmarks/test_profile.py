"""The profile of a step: operations by kind, on CPUs and GPUs."""

import json
import types

import jax
import pytest

from benchmarks import profile_step

PROGRAM = """HloModule jit_train_chunk

%fused.1 (a: f32[2,8,8,3], b: f32[3,3,3,4]) -> f32[2,8,8,4] {
  %a = f32[2,8,8,3]{3,2,1,0} parameter(0)
  %b = f32[3,3,3,4]{3,2,1,0} parameter(1)
  ROOT %conv.0 = f32[2,8,8,4]{3,2,1,0} convolution(%a, %b), \
window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, \
metadata={op_name="jit(f)/jvp(Net)/conv_general_dilated"}
}

%stage.1 (a: f32[2,8,8,3], b: f32[3,3,3,4]) -> f32[2,4] {
  %dot.0 = f32[2,8,8,3]{3,2,1,0} dot(%a, %c), lhs_contracting_dims={3}
  %conv.5 = f32[2,8,8,4]{3,2,1,0} convolution(%dot.0, %b), \
window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, \
metadata={op_name="jit(f)/Net/conv_general_dilated"}
}

%gemm.1 (a: f32[2,3]) -> f32[2,4] {
  %a.1 = f32[2,3]{1,0} parameter(0)
  ROOT %call.9 = f32[2,4]{1,0} custom-call(%a.1), \
custom_call_target="__cublas$gemm"
}

ENTRY %main (x: f32[2,8,8,3]) -> f32[2] {
  %x = f32[2,8,8,3]{3,2,1,0} parameter(0)
  %ynn.1 = f32[2,8,8,4]{3,2,1,0} fusion(%x, %w), kind=kCustom, calls=%fused.1
  %conv.1 = f32[2,8,8,3]{3,2,1,0} convolution(%g, %w), \
window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, \
metadata={op_name="jit(f)/transpose(jvp(Net))/conv_general_dilated"}
  %conv.2 = f32[3,3,3,4]{3,2,1,0} convolution(%x, %g), \
window={size=8x8 pad=1_1x1_1}, dim_labels=b01f_01io->b01f
  %conv.3 = f32[3,3,3,4]{3,2,1,0} convolution(%x, %g), \
window={size=7x7 pad=1_1x1_1}, dim_labels=f01b_i01o->01bf, \
metadata={op_name="jit(f)/transpose(jvp(Net))/conv_general_dilated"}
  %conv.4 = f32[2,8,8,4]{3,2,1,0} convolution(%x, %g), \
window={size=7x7 stride=2x2}, dim_labels=b01f_01io->b01f, \
metadata={op_name="jit(f)/jvp(Net)/conv_general_dilated"}
  %cudnn.1 = (f32[2,8,8,4]{3,2,1,0}, u8[0]{0}) custom-call(%x, %w), \
custom_call_target="__cudnn$convForward"
  %ynn.2 = f32[2,4]{1,0} fusion(%x, %w), kind=kCustom, calls=%stage.1
  %triton.1 = f32[2,4]{1,0} fusion(%a), kind=kCustom, calls=%gemm.1
  %psum.1 = f32[4]{0} all-reduce(%a), channel_id=1, to_apply=%sum
  %transpose_copy_fusion = f32[4]{0} fusion(%a), kind=kLoop, calls=%fused.7
  %loop_convert_fusion = f32[4]{0} fusion(%a), kind=kLoop, calls=%fused.8
  %while.1 = (s32[], f32[4]{0}) while(%t), condition=%c, body=%d
}
"""
KINDS_OF_PROGRAM = {
  "ynn.1": "convolution",
  "conv.1": "input gradient",
  "conv.2": "kernel gradient",
  "conv.3": "kernel gradient",
  "conv.4": "convolution",
  "cudnn.1": "convolution",
  "ynn.2": "convolution",
  "triton.1": "matrix product",
  "psum.1": "collective",
  "transpose_copy_fusion": "transpose, copy",
  "loop_convert_fusion": "other",
  "while.1": None,
}


def test_profile_tells_the_kinds_of_operations():
  kinds = profile_step.kinds_of(PROGRAM)
  assert {name: kinds[name] for name in KINDS_OF_PROGRAM} == KINDS_OF_PROGRAM


@pytest.mark.parametrize(
  ("name", "kind"),
  [
    ("sm90_xmma_fprop_implicit_gemm_bf16", "convolution"),
    ("sm80_xmma_wgrad_implicit_gemm_indexed", "kernel gradient"),
    ("cudnn::dgrad2d_grouped_direct_kernel", "input gradient"),
    ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "collective"),
    ("MemcpyD2D", "transpose, copy"),
    ("input_convert_reduce_fusion_2", "other"),
  ],
)
def test_profile_tells_the_kinds_of_kernels(name, kind):
  assert profile_step.kind_of_name(name) == kind


def test_profile_adds_up_a_step_and_device():
  ms = 1_000_000
  events = [
    profile_step.Event("ynn.1", "x", 0, 6 * ms),
    profile_step.Event("ynn.1", "x", 6 * ms, 2 * ms),
    profile_step.Event("while.1", "x", 0, 90 * ms),
    profile_step.Event("command_buffer", "ncclKernel", 9 * ms, 8 * ms),
  ]
  kinds, operations = profile_step.add_up(events, KINDS_OF_PROGRAM, times=4)
  found = {row["kind"]: row for row in kinds}
  assert tuple(found) == profile_step.KINDS
  assert found["convolution"] == {
    "kind": "convolution",
    "ms": 2.0,
    "count": 0.5,
    "share": 0.5,
  }
  assert found["collective"]["ms"] == 2.0 and found["other"]["ms"] == 0
  assert [row["operation"] for row in operations] == ["ynn.1", "ncclKernel"]


def test_idle_is_when_nothing_ran():
  spans = [(5, 1), (0, 3), (1, 1), (2, 2)]
  events = [profile_step.Event("", "", *span) for span in spans]
  assert profile_step.idle_share(events) == pytest.approx(1 / 6)
  assert profile_step.idle_share(events[1:]) == 0


def test_profile_reads_the_streams_of_a_gpu(tmp_path, monkeypatch):
  space = types.SimpleNamespace

  def line(name, *events):
    fields = ("name", "start_ns", "duration_ns", "stats")
    return space(
      name=name,
      events=[space(**dict(zip(fields, e, strict=True))) for e in events],
    )

  planes = [
    space(
      name="/host:CPU", lines=[line("python", ("f", 0, 9, {"hlo_op": "a"}))]
    ),
    space(
      name="/device:GPU:0",
      lines=[
        line(
          "Stream #13(Compute)",
          ("kernel", 1, 2, {"hlo_op": "fusion.1"}),
          ("MemcpyD2D", 3, 4, {}),
        ),
        line("XLA Modules", ("jit_train_chunk", 0, 9, {})),
      ],
    ),
  ]
  reader = space(from_file=lambda path: space(planes=planes))
  monkeypatch.setattr(jax.profiler, "ProfileData", reader)
  (tmp_path / "a.xplane.pb").touch()
  assert profile_step.events_of(tmp_path) == (
    [("fusion.1", "kernel", 1, 2), ("", "MemcpyD2D", 3, 4)],
    True,
  )
  del planes[1]
  assert profile_step.events_of(tmp_path) == ([("a", "f", 0, 9)], False)


@pytest.mark.full
def test_a_profile_of_a_step(tmp_path, capsys):
  out = tmp_path / "profile.json"
  profile_step.main(
    [
      *("--pair", "_tiny_wide:_tiny", "--method", "kd", "--batch", "8"),
      *("--examples", "32", "--image_size", "16", "--devices", "2"),
      *("--steps", "2", "--longest", "3"),
      *("--weights", str(tmp_path / "weights"), "--out", str(out)),
    ]
  )
  result = json.loads(out.read_text())
  assert (result["steps"], result["devices"]) == (2, 2)
  kinds = {row["kind"]: row for row in result["kinds"]}
  assert sum(row["share"] for row in kinds.values()) == pytest.approx(1)
  # The 3x3 ones of both networks of 8 layers; on a CPU 1x1 convolutions are
  # matrix products.
  assert kinds["convolution"]["count"] == 2 * 7
  assert capsys.readouterr().out.startswith(f"{result['ms_per_step']:.2f} ms")
