"""What a config makes of the optimiser."""

import jax

from configs import fitnet_cifar
from kd_jax.runs import train
from kd_jax.training import optim


def test_dot_knows_what_both_gradients_reach(tmp_path, monkeypatch):
  config = fitnet_cifar.get_config("smoke")
  config.update_from_flattened_dict(
    {
      "optim.dot_delta": 0.075,
      "loss_weights.kd": 0.0,
      "optim.learning_rate": 0.1,
      "student.name": "_tiny",
      "teacher.name": "_tiny_wide",
      "data.image_size": 8,
    }
  )
  found = {}
  monkeypatch.setattr(
    optim, "dot", lambda *_, **options: found.update(options) or optim.sgd(0.1)
  )
  train.prepare(config.lock(), tmp_path / "run")
  assert found["delta"] == 0.075
  shared, decayed = found["shared"], found["decay_mask"]
  assert not any(jax.tree.leaves(shared["distiller"]))
  # The hint's layers have both gradients, those after it that of "ce" alone.
  reached = shared["student"]
  assert all(jax.tree.leaves(reached["conv1"]))
  assert not any(jax.tree.leaves(reached["fc"]))
  assert all(jax.tree.leaves(decayed))
