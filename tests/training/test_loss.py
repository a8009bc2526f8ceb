"""The total of one batch: weights, ramps, random streams, what is reached."""

import functools

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import distillers, models
from kd_jax.distillers import base
from kd_jax.distributed import collectives
from kd_jax.distributed import devices as devices_lib
from kd_jax.training import loss, optim
from kd_jax.training import state as state_lib
from kd_jax.training import step as step_lib

TERMS = {
  "ce": jnp.array([1.0, 3.0]),
  "kd": jnp.array(5.0, jnp.bfloat16),
  "bad": jnp.array([jnp.nan, 1.0]),
}
SEEDS = step_lib.make_seeds(0)


def test_weighted_sum_averages_examples():
  total = loss.weighted_sum(TERMS, {"ce": 2, "kd": 0.5, "bad": 0.0, "x": 0})
  assert total.dtype == jnp.float32
  assert float(total) == 2 * 2.0 + 0.5 * 5.0


def test_weights_that_fit_no_term():
  with pytest.raises(ValueError, match=r"'simkd' is not a term.*bad, ce, kd"):
    loss.weighted_sum(TERMS, {"simkd": 1.0})
  with pytest.raises(ValueError, match="at least one weight other than 0"):
    loss.weighted_sum(TERMS, {"ce": 0.0})


class Linear(nn.Module):
  """A student of one layer, with noise of its own."""

  @nn.compact
  def __call__(self, images, *, train=False):
    x = images.reshape(len(images), -1)
    if train:
      x = x + jax.random.normal(self.make_rng("dropout"), x.shape)
    logits = nn.Dense(5, name="fc")(x)
    return models.ModelOutputs(logits, {"pooled": x})


class Terms(base.Distiller):
  """Terms to weigh: one plain, one that is no number, one to be found."""

  @nn.compact
  def distill(self, student, teachers, batch, **_):
    terms = {"ce": self.cross_entropy(student.logits, batch)}
    width = student.features["pooled"].shape[-1]
    scale = self.param("scale", nn.initializers.ones, (width,))
    terms["square"] = jnp.sum(jnp.square(scale * student.logits[:, :1]), axis=1)
    terms["nan"] = jnp.full(len(batch["label"]), jnp.nan) * scale[0]
    terms["sine"] = jnp.sin(student.logits[:, 0])
    return base.DistillOutput(student.logits, terms)


BATCH = {
  "image": np.random.default_rng(0).random((4, 8, 8, 3), np.float32),
  "label": np.arange(4),
}


def make_loss(weights, **options):
  """A loss, its parameters and the arguments up to the step."""
  student, distiller = Linear(), Terms()
  variables = student.init(jax.random.key(0), BATCH["image"])
  distilled = loss.init_distiller(
    *(distiller, jax.random.key(1)),
    **{"student": student, "student_variables": variables, "teachers": ()},
    **{"teacher_variables": (), "images": BATCH["image"], "batch": BATCH},
  )
  loss_fn = loss.make_loss_fn(
    student=student,
    teachers=(),
    distiller=distiller,
    loss_weights=weights,
    **{
      "steps_per_epoch": 1,
      "transform": lambda key, batch: batch["image"],
      **options,
    },
  )
  params = {"student": variables["params"], "distiller": distilled["params"]}
  return loss_fn, params, ({"student": {}, "distiller": {}}, (), BATCH)


class Reads(base.Distiller):
  """Reads its teacher's classifier once; it may try to change what it read."""

  width: int = 5
  moves: bool = False

  @nn.nowrap
  def teacher_constants(self, teachers, variables):
    return {"bias": self.only(variables)["params"]["fc"]["bias"]}

  @nn.compact
  def distill(self, student, teachers, batch, **_):
    bias = self.constant("bias", (self.width,))
    if self.moves and not self.is_initializing():
      self.put_variable(base.CONSTANTS, "bias", bias + 1)
    return base.DistillOutput(student.logits, {"bias": jnp.sum(bias)})


def init_reads(distiller, teacher_variables):
  student = Linear()
  variables = student.init(jax.random.key(0), BATCH["image"])
  return loss.init_distiller(
    *(distiller, jax.random.key(1)),
    **{"student": student, "student_variables": variables},
    **{"teachers": (student,), "teacher_variables": (teacher_variables,)},
    **{"images": BATCH["image"], "batch": BATCH},
  )


def test_constants_are_those_of_the_weights_and_never_move():
  """One compiled program serves whichever teacher is trained later."""
  teacher = Linear().init(jax.random.key(2), BATCH["image"])
  init = jax.jit(functools.partial(init_reads, Reads()))
  for seed in range(2):
    bias = np.random.default_rng(seed).standard_normal(5).astype(np.float32)
    teacher["params"]["fc"]["bias"] = bias
    variables = init(teacher)
    np.testing.assert_array_equal(variables["constants"]["bias"], bias)
  assert init._cache_size() == 1

  def loss_of(distiller):
    loss_fn = loss.make_loss_fn(
      **{"student": Linear(), "teachers": (Linear(),), "distiller": distiller},
      **{"loss_weights": {"bias": 1.0}, "steps_per_epoch": 1},
      transform=lambda key, batch: batch["image"],
    )
    params = {"student": teacher["params"], "distiller": {}}
    collections = {"student": {}, "distiller": variables}
    arguments = params, collections, (teacher,), BATCH, jnp.int32(0), SEEDS
    return loss_fn(*arguments)

  total, (collections, _) = loss_of(Reads())
  np.testing.assert_allclose(total, bias.sum(), rtol=1e-6)
  moved = collections["distiller"]["constants"]
  np.testing.assert_array_equal(moved["bias"], bias)
  with pytest.raises(flax.errors.ModifyScopeVariableError):
    loss_of(Reads(moves=True))


def test_constants_that_the_method_does_not_read():
  teacher = Linear().init(jax.random.key(2), BATCH["image"])
  words = r"Reads: expected.*'bias': \(4,\).*got.*'bias': \(5,\)"
  with pytest.raises(ValueError, match=words):
    init_reads(Reads(width=4), teacher)


def test_a_ramp_grows_over_its_steps():
  loss_fn, params, arguments = make_loss(
    {"ce": 2.0, "square": 3.0}, ramp_steps={"square": 4, "sine": 2}
  )
  loss_fn = jax.jit(loss_fn)
  for step, weight in enumerate((0.25, 0.5, 0.75, 1.0, 1.0, 1.0)):
    total, (_, sums) = loss_fn(params, *arguments, jnp.int32(step), SEEDS)
    ce, square = (float(sums[name]) / 4 for name in ("ce", "square"))
    np.testing.assert_allclose(total, 2 * ce + 3 * weight * square, rtol=1e-5)
    assert square > 0.01
    np.testing.assert_allclose(sums["loss"], 4 * total, rtol=1e-6)


def test_two_gradients_take_one_forward_pass():
  weights = {"square": 3.0, "ce": 2.0, "sine": 1.0}
  loss_fn, params, arguments = make_loss(weights, split_ce=True)
  whole, *_ = make_loss(weights)
  arguments = *arguments, jnp.int32(0), SEEDS
  (ce, rest), (_, sums) = loss_fn(params, *arguments)
  total, (_, expected) = whole(params, *arguments)
  np.testing.assert_allclose(ce, sums["ce"] / 2, rtol=1e-6)
  np.testing.assert_allclose(ce + rest, total, rtol=1e-6)
  assert sums.keys() == expected.keys()
  np.testing.assert_allclose(sums["loss"], expected["loss"], rtol=1e-6)
  with pytest.raises(ValueError, match="at least one weight other than 0"):
    make_loss({"ce": 1.0}, split_ce=True)[0](params, *arguments)


def test_a_term_of_weight_0_is_absent():
  def compiled(weights):
    loss_fn, params, arguments = make_loss(weights)
    grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    arguments = params, *arguments, jnp.int32(0), SEEDS
    (_, (_, sums)), grads = grad(*arguments)
    return grad.lower(*arguments).compile().as_text(), sums, grads

  text, sums, grads = compiled({"ce": 1.0, "sine": 0.0, "nan": 0.0})
  assert set(sums) == {"loss", "top1", "ce"}
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
  assert "sine(" not in text
  text, sums, grads = compiled({"ce": 1.0, "sine": 1.0})
  assert "sine(" in text and "sine" in sums


def test_augmentation_draws_from_the_data_seed_and_the_step():
  """Whatever the method, the run's seed and the part of the batch."""
  seen = []

  def transform(key, batch):
    seen.append(key)
    return batch["image"]

  for weights, seeds, step, part in (
    ({"ce": 1.0}, (0, 7), 0, None),
    ({"square": 1.0}, (5, 7), 0, 1),
    ({"ce": 1.0}, (0, 7), 3, None),
    ({"ce": 1.0}, (0, 8), 0, None),
  ):
    loss_fn, params, arguments = make_loss(weights, transform=transform)
    seeds = step_lib.make_seeds(*seeds)
    loss_fn(params, *arguments, jnp.int32(step), seeds, part)
  expected = [
    jax.random.split(jax.random.fold_in(jax.random.key(seed), step), 3)[0]
    for seed, step in ((7, 0), (7, 0), (7, 3), (8, 0))
  ]
  assert seen == expected


def test_noise_is_of_the_seed_the_step_and_the_part():
  loss_fn, params, arguments = make_loss({"ce": 1.0})

  def total(seed, step, part):
    seeds = step_lib.make_seeds(seed, 0)
    return float(loss_fn(params, *arguments, step, seeds, part)[0])

  draws = ((0, 0, None), (1, 0, None), (0, 1, None), (0, 0, 0), (0, 0, 1))
  assert len({total(*draw) for draw in draws}) == len(draws)
  assert total(0, 0, None) == total(0, 0, None)


def test_replicas_draw_their_own_noise():
  loss_fn, params, (collections, _, batch) = make_loss(
    {"ce": 1.0}, axis_name=collectives.AXIS
  )
  same = {k: np.concatenate([v, v])[None] for k, v in batch.items()}

  def losses_of_devices(params, constants, resident, xs):
    piece = jax.tree.map(lambda x: x[0], xs)
    total, _ = loss_fn(params, collections, (), piece, jnp.int32(0), SEEDS)
    return collectives.axis_gather(total[None], collectives.AXIS)

  devices = devices_lib.make_devices(num_devices=2)
  first, second = devices.map_chunk(losses_of_devices)(
    devices.replicate(params), {}, {}, devices.shard(same)
  )
  assert abs(first - second) > 1e-3


def unreached(student, method, weights):
  """Names of the parameters that no term of the loss reaches."""
  student, teacher = (models.create(n, 5) for n in (student, "_tiny_wide"))
  distiller = distillers.create(method)
  images = jnp.zeros((4, 32, 32, 3))
  batch = {"image": images, "label": jnp.zeros(4, jnp.int32)}

  def init(key):
    variables = student.init(key, images)
    teacher_variables = (teacher.init(key, images),)
    distilled = loss.init_distiller(
      *(distiller, key),
      **{"student": student, "student_variables": variables},
      **{"teachers": (teacher,), "teacher_variables": teacher_variables},
      **{"images": images, "batch": batch},
    )
    parts = map(state_lib.split_params, (variables, distilled))
    params, rest = (
      dict(zip(("student", "distiller"), both)) for both in zip(*parts)
    )
    return params, rest, teacher_variables

  params, *rest = jax.eval_shape(init, jax.random.key(0))
  loss_fn = loss.make_loss_fn(
    student=student,
    teachers=(teacher,),
    distiller=distiller,
    loss_weights=weights,
    steps_per_epoch=1,
    transform=lambda key, batch: batch["image"],
  )
  flags = optim.parameter_uses(
    loss_fn, params, *rest, batch, jnp.int32(0), SEEDS
  ).reached
  assert jax.tree.structure(flags) == jax.tree.structure(params)
  keystr = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
  leaves = jax.tree_util.tree_leaves_with_path(flags)
  return {keystr(path) for path, flag in leaves if not flag}


SIMKD = {"ce": 0.0, "kd": 0.0, "simkd": 1.0}


@pytest.mark.parametrize(
  ("student", "method", "weights", "modules"),
  [
    ("_tiny", "kd", {"ce": 1.0, "kd": 1.0}, set()),
    ("_tiny", "simkd", SIMKD, {"student/fc"}),
    ("_tiny", "simkd", {**SIMKD, "ce": 1.0}, set()),
    # Its last stage is projected: the layer after it is not reached either.
    (
      *("MobileNetV2", "simkd", SIMKD),
      {"student/classifier_0", "student/conv2_0", "student/conv2_1"},
    ),
    ("_tiny", "simkd", {"ce": 1.0, "simkd": 0.0}, {"distiller/projector"}),
    ("_tiny", "simkd+dkd", {"dkd": 1.0}, {"distiller/simkd"}),
  ],
)
def test_reached_parameters(student, method, weights, modules):
  found = unreached(student, method, weights)
  assert {"/".join(name.split("/")[:2]) for name in found} == modules
  assert not modules or {"kernel", "bias"} <= {
    name.rpartition("/")[2] for name in found
  }
