import jax
import numpy as np

from configs import ofd_cifar
from kd_jax import losses
from kd_jax.interop import model
from kd_jax.runs import train


def test_constants_of_teachers_trained_after_compiling(tmp_path):
  """Trials share the programs; each may have a teacher of its own."""
  config = ofd_cifar.get_config("smoke")
  config.student.name, config.teacher.name = "_tiny", "_tiny_wide"
  parts = train.prepare(config, tmp_path / "run").parts
  teacher = parts.teachers[0]
  assert teacher.variables is None
  shapes = model.variable_shapes(teacher.network, (16, 16, 3))
  for seed in range(2):
    rng = np.random.default_rng(seed)
    variables = jax.tree.map(
      lambda x, rng=rng: rng.uniform(0.5, 1, x.shape).astype(x.dtype), shapes
    )
    placed = parts.devices.replicate((variables,))
    state = parts.programs.initialize(np.uint32(0), placed)
    state = parts.devices.place(state, parts.programs.specs)
    found = state.collections["distiller"]["constants"]
    norms = teacher.network.stage_norms(variables["params"])
    assert len(found) == len(norms) == 3
    for i, (scale, bias) in enumerate(norms, start=1):
      margin = losses.ofd_margin(scale, bias)
      np.testing.assert_allclose(found[f"margin{i}"], margin, rtol=1e-5)
      assert found[f"margin{i}"].sharding.is_fully_replicated
