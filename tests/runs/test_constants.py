import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from configs import nd_cifar, ofd_cifar
from kd_jax import losses, models
from kd_jax.data.common import Source
from kd_jax.distributed import devices
from kd_jax.interop import model
from kd_jax.runs import evaluator, train


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


class Colours(models.Classifier):
  """Its pooled feature is the mean colour."""

  head = "fc"

  @nn.compact
  def __call__(self, images, *, train=False):
    return self.finish({}, self.prepare(images))


@pytest.mark.parametrize("num_devices", [1, 2])
def test_class_means_over_a_set(num_devices):
  """Padded batches, several devices, a class without images."""
  rng = np.random.default_rng(0)
  source = Source(
    images=rng.integers(0, 256, (11, 8, 8, 3), np.uint8),
    labels=np.array([0, 1, 1, 2, 0, 1, 4, 4, 0, 2, 2], np.int32),
    **{"num_classes": 5, "name": "made-up", "class_names": tuple("abcde")},
    **{"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)},
  )
  network = Colours(5)
  images = np.float32((source.images / 255 - source.mean) / source.std)
  variables = network.init(jax.random.key(0), images)
  scorer = evaluator.Evaluator(
    source,
    devices.make_devices(num_devices=num_devices, mapping="shard_map"),
    **{"batch_size": 4, "pipeline": "device", "decoder": "cpu"},
    **{"mean": source.mean, "std": source.std, "dtype": "float32"},
  )
  found = scorer.class_means(network, variables)
  for k in range(5):
    own = images[source.labels == k].mean((1, 2))
    expected = own.mean(0) if len(own) else np.zeros(3)
    np.testing.assert_allclose(found[k], expected, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_has_its_class_means_in_the_checkpoint(
  tmp_path, monkeypatch
):
  config = nd_cifar.get_config("smoke")
  config.student.name, config.teacher.name = "_tiny", "_tiny_wide"
  prepared = train.prepare(config, tmp_path)
  given = prepared.config, prepared.parts
  (teacher,) = prepared.parts.teachers
  teachers = (dataclasses.replace(teacher, variables={"params": {}}),)
  means = np.ones((10, 32), np.float32)
  monkeypatch.setattr(
    evaluator.Evaluator, "class_means", lambda self, *network: means
  )
  (first,) = train._with_class_means(*given, teachers, tmp_path)
  np.testing.assert_array_equal(first["class_means"]["pooled"], means)
  (tmp_path / "checkpoints" / "4").mkdir(parents=True)
  monkeypatch.delattr(evaluator.Evaluator, "class_means")
  (later,) = train._with_class_means(*given, teachers, tmp_path)
  assert later["class_means"]["pooled"].shape == means.shape
