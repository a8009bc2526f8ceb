"""The train step: equal on any devices, exact in its parts."""

import functools
import importlib
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_jax import distillers, losses, models
from kd_jax.distillers import base
from kd_jax.distributed import collectives
from kd_jax.distributed import devices as devices_lib
from kd_jax.models.base import Classifier
from kd_jax.training import eval_step, loss, optim
from kd_jax.training import state as state_lib
from kd_jax.training import step as step_lib

CLASSES, EXAMPLES, SIZE = 5, 32, 8
RATE = 0.02
LABELS = np.arange(EXAMPLES, dtype=np.int32) % CLASSES
FLOAT32 = {jnp.dtype(jnp.float32)}
# SemCKD's attention amplifies rounding.
TOLERANCE = {"semckd": 1e-2}


@pytest.fixture(scope="module", autouse=True)
def _compile_fast():
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


class Mini(Classifier):
  """What the methods look at, in three convolutions."""

  width: int = 4
  head = "fc"

  @nn.compact
  def __call__(self, images, *, train=False):
    conv, norm = self.make_conv(), self.make_norm()
    x, features = self.prepare(images), {}
    for i, name in enumerate(("stem", "stage1", "stage2")):
      strides = 2 if i == 2 else 1
      x = conv(
        *(x, self.width * strides, 3),
        **{"strides": strides, "padding": 1, "name": f"conv{i}"},
      )
      x = features[f"{name}_preact"] = norm(name=f"bn{i}")(x, train=train)
      x = features[name] = nn.relu(x)
    return self.finish(features, x)


def settings(method):
  """The weights and fields of the method's config, scaled down."""
  if method == "none":
    return {"ce": 1.0}, {}
  config = importlib.import_module(f"configs.{method}_cifar").get_config()
  fields = config.distiller.to_dict()
  fields.pop("name")
  for name, value in (("k", 16), ("feat_dim", 8)):
    if name in fields:
      fields[name] = value
  return config.loss_weights.to_dict(), fields


def draw(seed, shapes):
  """Variables of some shapes, from numpy: nothing to compile."""
  rng = np.random.default_rng(seed)

  def one(path, x):
    name = path[-1].key
    if name in ("scale", "var"):
      return np.ones(x.shape, x.dtype)
    if name in ("mean", "z_s", "z_t"):
      return np.zeros(x.shape, x.dtype)
    value = rng.standard_normal(x.shape).astype(x.dtype)
    if name.startswith("bank"):
      return value / np.linalg.norm(value, axis=1, keepdims=True)
    return value / math.sqrt(max(math.prod(x.shape[:-1]), 10))

  return jax.tree_util.tree_map_with_path(one, shapes)


def normalize(key, batch):
  del key
  return batch["image"].astype(jnp.float32) / 127.5 - 1


def make_batch(size, seed=0):
  rng = np.random.default_rng(seed)
  index = rng.permutation(EXAMPLES)[:size].astype(np.int32)
  return {
    "image": rng.integers(0, 256, (size, SIZE, SIZE, 3), np.uint8),
    "label": LABELS[index],
    "index": index,
    "mask": np.ones(size, bool),
  }


class Method:
  """One method with tiny networks: the parts that a train step is made of."""

  def __init__(self, method, *, init_size=8, dtype=jnp.float32):
    self.method, self.init_size, self.dtype = method, init_size, dtype
    self.weights, self.fields = settings(method)
    self.student = Mini(CLASSES, dtype=dtype)
    teacher = Mini(CLASSES, dtype=dtype, width=6)
    image = jax.ShapeDtypeStruct((init_size, SIZE, SIZE, 3), jnp.float32)
    shapes = [
      jax.eval_shape(model.init, jax.random.key(0), image)
      for model in (self.student, teacher)
    ]
    self.student_variables = draw(1, shapes[0])
    self.teachers, self.teacher_variables = (), ()
    if method != "none":
      self.teachers = (teacher,)
      self.teacher_variables = (draw(2, shapes[1]),)
    self.distiller_variables = self._distiller_variables(image)

  def distiller(self, **fields):
    return distillers.create(
      self.method, dtype=self.dtype, **self.fields, **fields
    )

  def _distiller_variables(self, image):
    def init(key):
      outputs, heads = loss.run_teachers(
        self.teachers, self.teacher_variables, jnp.zeros(image.shape)
      )
      return self.distiller().init(
        key,
        self.student.apply(self.student_variables, jnp.zeros(image.shape)),
        outputs,
        {**make_batch(self.init_size), "train_labels": LABELS},
        teacher_heads=heads,
        step=0,
        epoch=1,
        train=True,
        method="distill",
      )

    variables = draw(3, jax.eval_shape(init, jax.random.key(0)))
    if "memory" in variables:
      table = losses.class_table(LABELS, CLASSES)
      variables["memory"] |= jax.tree.map(np.asarray, table._asdict())
    return variables

  def loss_arguments(self, axis_name=None, sync=True):
    return {
      "student": self.student.clone(bn_axis_name=axis_name if sync else None),
      "teachers": self.teachers,
      "distiller": self.distiller(axis_name=axis_name, sync=sync),
      "loss_weights": self.weights,
      "ramp_steps": {},
      "steps_per_epoch": 2,
      "transform": normalize,
      "seed": 0,
    }

  def optimizer(self, **options):
    return optim.sgd(
      optax.constant_schedule(RATE), weight_decay=5e-4, **options
    )

  def state(self, optimizer):
    return state_lib.create(
      self.student_variables, self.distiller_variables, optimizer
    )

  def train(
    self, devices, *, steps=5, sync=True, split=False, size=8, **step_options
  ):
    """`steps` steps on the same global batches, one to a dispatch.

    With `split`, every device holds its share of the rows of the memory.
    """
    optimizer = self.optimizer()
    step = step_lib.make_train_step(
      optimizer=optimizer,
      **{"axis_name": collectives.AXIS, **step_options},
      **self.loss_arguments(collectives.AXIS, sync),
    )
    state, specs = self.state(optimizer), None
    if split:
      specs = state_lib.state_specs(state, self.distiller())
      state = devices.place(state, specs)
    else:
      state = devices.replicate(state)
    chunk = devices.map_chunk(
      step_lib.make_train_chunk(step, lambda resident, x: x),
      donate=True,
      carry_specs=specs,
    )
    teacher = devices.replicate(self.teacher_variables)
    metrics = []
    for i in range(steps):
      batch = make_batch(size, seed=i)
      xs = devices.shard({k: v[None] for k, v in batch.items()})
      state, sums = chunk(state, teacher, {}, xs)
      metrics.append(jax.device_get(sums))
    jax.tree.map(np.testing.assert_array_equal, teacher, self.teacher_variables)
    return state, metrics


@functools.lru_cache
def made(method, **options):
  return Method(method, **options)


def worst_difference(ours, theirs):
  """(relative to the tensor's largest value, its name), the worst of all."""
  parts = []
  for state, metrics in (ours, theirs):
    parts.append(
      jax.device_get((state.params, state.collections, state.step, metrics))
    )
  flat, flat_theirs = map(jax.tree_util.tree_leaves_with_path, parts)
  assert [path for path, _ in flat] == [path for path, _ in flat_theirs]
  errors = []
  for (path, a), (_, b) in zip(flat, flat_theirs):
    assert a.shape == b.shape
    error = np.abs(a.astype(np.float64) - b).max() / (np.abs(a).max() or 1)
    assert math.isfinite(error)
    errors.append((float(error), jax.tree_util.keystr(path)))
  return max(errors)


def of_student(run):
  state, metrics = run
  student = {
    part: getattr(state, part)["student"] for part in ("params", "collections")
  }
  return state.replace(**student), metrics


def assert_equal_on_all_devices(state):
  for path, x in jax.tree_util.tree_leaves_with_path(state):
    copies = [np.asarray(shard.data) for shard in x.addressable_shards]
    assert len(copies) > 1
    for copy in copies:
      np.testing.assert_array_equal(copies[0], copy, jax.tree_util.keystr(path))


def make_devices(num_devices, mapping="shard_map"):
  return devices_lib.make_devices(num_devices=num_devices, mapping=mapping)


@pytest.mark.parametrize("method", distillers.names())
def test_equal_on_any_devices(method):
  """One worker makes all runs of a method: the first is compared with all."""
  parts = made(method)
  one = parts.train(make_devices(1))
  state, metrics = one
  assert set(metrics[0]) == {"loss", "top1", "count"} | {
    name for name, weight in parts.weights.items() if weight
  }
  # Or else initial values would be compared.
  start = parts.state(parts.optimizer())
  assert int(state.step) == 5
  for part in ("params", "collections"):
    for path, before in jax.tree_util.tree_leaves_with_path(
      getattr(start, part)
    ):
      now = functools.reduce(lambda x, k: x[k.key], path, getattr(state, part))
      name = jax.tree_util.keystr(path)
      moved = np.abs(now - before).max() > 0
      assert moved or np.issubdtype(now.dtype, np.integer), name

  tolerance = TOLERANCE.get(method, 1e-4)
  for num_devices, mapping in ((2, "shard_map"), (4, "shard_map"), (2, "pmap")):
    other = parts.train(make_devices(num_devices, mapping))
    worst = worst_difference(one, other)
    assert worst[0] < tolerance, (num_devices, mapping, worst)
    if mapping == "shard_map":
      assert_equal_on_all_devices(other[0])

  # As the references per GPU: another training, the same on every device.
  local = Method(method, init_size=4)
  other = local.train(make_devices(2), sync=False)
  assert_equal_on_all_devices(other[0])
  assert worst_difference(of_student(one), of_student(other))[0] > 1e-2


@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("num_devices", [2, 3])
def test_split_memory_is_the_whole_one(num_devices, sync):
  """32 rows over 3 devices: one has 10, and one of zeros."""
  parts = Method("crd", init_size=6) if num_devices == 3 else made("crd")
  options = {"steps": 3, "sync": sync, "size": 6 if num_devices == 3 else 8}
  whole = parts.train(make_devices(num_devices), **options)
  split = parts.train(make_devices(num_devices), split=True, **options)
  for bank in parts.distiller().memory_rows:
    memory = split[0].collections["distiller"]["memory"]
    rows = -(-EXAMPLES // num_devices)
    for shard in memory[bank].addressable_shards:
      assert shard.data.shape == (rows, 8)
    assert not np.asarray(memory[bank])[EXAMPLES:].any()
    memory[bank] = np.asarray(memory[bank])[:EXAMPLES]
  worst = worst_difference(whole, split)
  assert worst[0] < 1e-4, worst


@pytest.mark.parametrize("wrong", ["gradients", "tracked"])
def test_the_comparison_sees_a_wrong_reduction(wrong, monkeypatch):
  """Both mistakes run without an error."""
  parts = made("sp")
  right = parts.train(make_devices(1))
  options = {}
  if wrong == "gradients":  # each device's own
    options["axis_name"] = None
  else:  # the gradient is a sum already, and its mean that sum
    monkeypatch.setattr(jax, "shard_map", _tracked(jax.shard_map))
  worst = worst_difference(right, parts.train(make_devices(2), **options))
  assert worst[0] > 1e-2, worst


def _tracked(shard_map):
  return lambda *args, check_vma, **options: shard_map(*args, **options)


def test_accumulation_is_equal_on_any_devices():
  """A part holds the same examples on one device and on two."""
  parts = made("crd")
  runs = [
    parts.train(make_devices(n), steps=2, accumulate_steps=2) for n in (1, 2)
  ]
  worst = worst_difference(*runs)
  assert worst[0] < 1e-4, worst


def _noisy(key, batch):
  images = normalize(key, batch)
  return images + 0.3 * jax.random.normal(key, images.shape)


def test_accumulation_is_the_mean_of_its_parts():
  parts = made("crd")
  optimizer = parts.optimizer()
  state = parts.state(optimizer)
  batch = make_batch(8)
  loss_fn = loss.make_loss_fn(axis_name=None, **parts.loss_arguments())
  grad = jax.jit(jax.grad(loss_fn, has_aux=True))
  collections, all_grads, all_sums = state.collections, [], []
  for part in range(2):
    piece = {name: value[part::2] for name, value in batch.items()}
    grads, (collections, sums) = grad(
      state.params, collections, parts.teacher_variables, piece, 0
    )
    all_grads.append(grads)
    all_sums.append(sums)
  grads = jax.tree.map(lambda a, b: (a + b) / 2, *all_grads)
  updates, _ = optimizer.update(grads, state.opt_state, state.params)
  expected = state.replace(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    collections=collections,
  )
  sums = jax.tree.map(jnp.add, *all_sums)

  step = step_lib.make_train_step(
    optimizer=optimizer, accumulate_steps=2, **parts.loss_arguments()
  )
  got, got_sums = jax.jit(step)(state, parts.teacher_variables, batch)
  assert got_sums.pop("count") == 8
  worst = worst_difference((expected, [sums]), (got, [got_sums]))
  assert worst[0] < 1e-5, worst


@pytest.mark.parametrize("pixels", [1, 2 * 8 * SIZE**2, 10**9])
def test_steps_in_one_dispatch(pixels, monkeypatch):
  """Whether the teacher is shown the batches of one, two or all at once."""
  monkeypatch.setattr(step_lib, "_SHOWN_PIXELS", pixels)
  parts = made("crd")
  optimizer = parts.optimizer()
  step = step_lib.make_train_step(optimizer=optimizer, **parts.loss_arguments())
  chunk = jax.jit(
    step_lib.make_train_chunk(step, lambda extra, x: {**x, **extra})
  )
  batches = [make_batch(8, seed=i) for i in range(4)]
  masks = [batch.pop("mask") for batch in batches]
  xs = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
  extra = {"mask": masks[0]}  # what `load` adds from the resident data

  def run(state, k):
    sums = []
    for i in range(0, 4, k):
      piece = jax.tree.map(lambda x, i=i: x[i : i + k], xs)
      state, piece_sums = chunk(state, parts.teacher_variables, extra, piece)
      sums.append(piece_sums)
    return state, jax.tree.map(lambda *leaves: np.concatenate(leaves), *sums)

  one, four = (run(parts.state(optimizer), k) for k in (1, 4))
  assert one[1]["loss"].shape == (4,)
  worst = worst_difference(one, four)
  assert worst[0] < 1e-5, worst


@pytest.mark.parametrize("seed", [0, (0, 3)])
def test_a_batch_is_shown_the_same_among_others(seed):
  """With all that is random, and to the teacher of several trials."""
  parts = made("kd")
  arguments = {
    "teachers": parts.teachers,
    "transform": _noisy,
    "mixing": {"mixup": 0.4, "cutmix": 1.0},
    "seed": seed,
    "data_seed": 7,
  }
  look = jax.jit(loss.make_precompute_teacher(**arguments))
  batches = [make_batch(8, seed=i) for i in range(3)]
  several = look(
    parts.teacher_variables,
    jax.tree.map(lambda *leaves: np.stack(leaves), *batches),
    np.arange(3) + 5,
  )
  for i, batch in enumerate(batches):
    one = look(parts.teacher_variables, batch, 5 + i)
    mine = jax.tree.map(lambda x, i=i: x[i], several)
    assert set(one) > {"shown", "taught", "lam", "mixed_label"}
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
      *(mine, one),
    )


def test_a_teacher_is_asked_once_for_several_steps(monkeypatch):
  parts, shown = made("kd"), []
  whole = loss.run_teachers
  monkeypatch.setattr(
    loss,
    "run_teachers",
    lambda t, v, images: shown.append(images.shape) or whole(t, v, images),
  )
  batches = [make_batch(8, seed=i) for i in range(4)]
  xs = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)

  def trace(**options):
    optimizer = parts.optimizer()
    step = step_lib.make_train_step(
      optimizer=optimizer, **parts.loss_arguments(), **options
    )
    chunk = step_lib.make_train_chunk(step, lambda _, x: x)
    jax.eval_shape(
      chunk, parts.state(optimizer), parts.teacher_variables, {}, xs
    )
    found = set(shown)
    shown.clear()
    return found

  image = (SIZE, SIZE, 3)
  assert trace() == {(32, *image)}
  # Parts of a batch are mixed among themselves: they come as they are.
  assert trace(accumulate_steps=2) == {(4, *image)}


@pytest.mark.parametrize(
  ("steps", "batch", "size", "together"),
  [
    *((781, 64, 32, 11), (195, 256, 32, 3), (390, 128, 32, 6)),
    *((780, 64, 32, 15), (781, 2048, 32, 1), (100, 256, 224, 1)),
  ],
)
def test_steps_together(steps, batch, size, together):
  shape = (batch, size, size, 3)
  assert step_lib.steps_together(steps, shape) == together


class Linear(nn.Module):
  """A student of one layer, with noise of its own."""

  @nn.compact
  def __call__(self, images, *, train=False):
    x = images.reshape(len(images), -1)
    if train:
      x = x + jax.random.normal(self.make_rng("dropout"), x.shape)
    logits = nn.Dense(CLASSES, name="fc")(x)
    return models.ModelOutputs(logits, {"pooled": x})


class Terms(base.Distiller):
  """Terms to weigh: one plain, one that is no number, one to be found."""

  @nn.compact
  def distill(
    self, student, teachers, batch, *, teacher_heads, step, epoch, train
  ):
    terms = {"ce": self.cross_entropy(student.logits, batch)}
    width = student.features["pooled"].shape[-1]
    scale = self.param("scale", nn.initializers.ones, (width,))
    terms["square"] = jnp.sum(jnp.square(scale * student.logits[:, :1]), axis=1)
    terms["nan"] = jnp.full(len(batch["label"]), jnp.nan) * scale[0]
    terms["sine"] = jnp.sin(student.logits[:, 0])
    return base.DistillOutput(student.logits, terms)


def simple_loss(weights, *, ramp_steps=None, transform=normalize, **options):
  student, distiller = Linear(), Terms()
  batch = make_batch(4)
  images = normalize(None, batch)
  variables = student.init(jax.random.key(0), images)
  distilled = distiller.init(
    *(jax.random.key(1), student.apply(variables, images), (), batch),
    **{"teacher_heads": (), "step": 0, "epoch": 1, "train": False},
    method="distill",
  )
  loss_fn = loss.make_loss_fn(
    student=student,
    teachers=(),
    distiller=distiller,
    loss_weights=weights,
    ramp_steps=ramp_steps or {},
    steps_per_epoch=2,
    transform=transform,
    **{"seed": 0, "axis_name": None, **options},
  )
  params = {"student": variables["params"], "distiller": distilled["params"]}
  collections = {"student": {}, "distiller": {}}
  return loss_fn, params, (collections, (), batch)


def test_a_ramp_grows_over_its_steps():
  loss_fn, params, arguments = simple_loss(
    {"ce": 2.0, "square": 3.0}, ramp_steps={"square": 4}
  )
  loss_fn = jax.jit(loss_fn)
  for step, weight in enumerate((0.25, 0.5, 0.75, 1.0, 1.0, 1.0)):
    total, (_, sums) = loss_fn(params, *arguments, jnp.int32(step))
    ce, square = (float(sums[name]) / 4 for name in ("ce", "square"))
    np.testing.assert_allclose(total, 2 * ce + 3 * weight * square, rtol=1e-5)
    assert square > 0.01
    np.testing.assert_allclose(sums["loss"], 4 * total, rtol=1e-6)


def test_a_term_of_weight_0_is_absent():
  def compiled(weights):
    loss_fn, params, arguments = simple_loss(weights)
    grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    lowered = grad.lower(params, *arguments, jnp.int32(0))
    (_, (_, sums)), grads = grad(params, *arguments, jnp.int32(0))
    return lowered.compile().as_text(), sums, grads

  text, sums, grads = compiled({"ce": 1.0, "sine": 0.0, "nan": 0.0})
  assert set(sums) == {"loss", "top1", "ce"}
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
  assert "sine(" not in text
  text, sums, grads = compiled({"ce": 1.0, "sine": 1.0})
  assert "sine(" in text and "sine" in sums


def test_randomness_is_of_the_seed_and_the_step():
  """The augmentation's key is the same whatever the method and the replica."""
  seen = []

  def transform(key, batch):
    seen.append(tuple(jax.random.key_data(key).tolist()))
    return normalize(key, batch)

  for seed, step, weights in (
    (0, 0, {"ce": 1.0}),
    (0, 0, {"square": 1.0}),
    (0, 1, {"ce": 1.0}),
    (1, 0, {"ce": 1.0}),
  ):
    loss_fn, params, arguments = simple_loss(
      weights, seed=seed, transform=transform
    )
    loss_fn(params, *arguments, jnp.int32(step))
  assert seen[0] == seen[1]
  assert len(set(seen)) == 3


def test_replicas_draw_their_own_noise():
  loss_fn, params, (collections, _, batch) = simple_loss(
    {"ce": 1.0}, axis_name=collectives.AXIS
  )
  same = {k: np.concatenate([v, v])[None] for k, v in batch.items()}

  def losses_of_devices(params, constants, resident, xs):
    piece = jax.tree.map(lambda x: x[0], xs)
    total, _ = loss_fn(params, collections, {}, piece, jnp.int32(0))
    return collectives.axis_gather(total[None], collectives.AXIS)

  devices = make_devices(2)
  first, second = devices.map_chunk(losses_of_devices)(
    devices.replicate(params), {}, {}, devices.shard(same)
  )
  assert abs(first - second) > 1e-3


def reached(student, teacher, method, weights, **fields):
  """Names of the student's top-level modules, and all, that a loss reaches."""
  student, teacher = (models.create(name, 5) for name in (student, teacher))
  distiller = distillers.create(method, **fields)
  size = 32
  batch = {
    "image": jax.ShapeDtypeStruct((4, size, size, 3), jnp.uint8),
    "label": jax.ShapeDtypeStruct((4,), jnp.int32),
  }
  image = jnp.zeros((4, size, size, 3))

  def init(key):
    variables = student.init(key, image)
    teacher_variables = (teacher.init(key, image),)
    outputs, heads = loss.run_teachers((teacher,), teacher_variables, image)
    distilled = distiller.init(
      *(key, student.apply(variables, image), outputs),
      {"label": jnp.zeros(4, jnp.int32)},
      **{"teacher_heads": heads, "step": 0, "epoch": 1, "train": True},
      method="distill",
    )
    parts = state_lib.split_params(variables), state_lib.split_params(distilled)
    params, rest = (
      dict(zip(("student", "distiller"), both)) for both in zip(*parts)
    )
    return params, rest, teacher_variables

  params, rest, teacher_variables = jax.eval_shape(init, jax.random.key(0))
  loss_fn = loss.make_loss_fn(
    student=student,
    teachers=(teacher,),
    distiller=distiller,
    loss_weights=weights,
    ramp_steps={},
    steps_per_epoch=2,
    transform=normalize,
    seed=0,
    axis_name=None,
  )
  flags = optim.reached_parameters(
    loss_fn,
    *(params, rest, teacher_variables, batch),
    jax.ShapeDtypeStruct((), jnp.int32),
  )
  assert jax.tree.structure(flags) == jax.tree.structure(params)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, flag in jax.tree_util.tree_leaves_with_path(flags)
    if not flag
  }


SIMKD = {"ce": 0.0, "kd": 0.0, "simkd": 1.0}


@pytest.mark.parametrize(
  ("student", "method", "weights", "unreached"),
  [
    ("_tiny", "kd", {"ce": 1.0, "kd": 1.0}, ()),
    ("_tiny", "simkd", SIMKD, ("fc",)),
    ("_tiny", "simkd", {**SIMKD, "ce": 1.0}, ()),
    # Its last stage is projected: the layer after it is not reached either.
    ("MobileNetV2", "simkd", SIMKD, ("classifier_0", "conv2_0", "conv2_1")),
  ],
)
def test_reached_parameters(student, method, weights, unreached):
  found = reached(student, "_tiny_wide", method, weights)
  assert {name.split("/")[1] for name in found} == set(unreached)
  assert all(name.startswith("student/") for name in found)
  leaves = {name.split("/")[2] for name in found}
  assert leaves <= {"kernel", "bias", "scale"}
  assert not unreached or {"kernel", "bias"} <= leaves


def test_an_unweighted_projector_is_not_reached():
  found = reached("_tiny", "_tiny_wide", "simkd", {"ce": 1.0, "simkd": 0.0})
  assert found and all(name.startswith("distiller/proj") for name in found)


def test_bfloat16_trains_in_float32_and_decays_what_is_reached():
  parts = made("simkd", dtype=jnp.bfloat16)
  start = parts.state(parts.optimizer())
  loss_fn = loss.make_loss_fn(axis_name=None, **parts.loss_arguments())
  mask = optim.reached_parameters(
    loss_fn,
    *(start.params, start.collections, parts.teacher_variables),
    *(make_batch(8), jnp.int32(0)),
  )
  optimizer = parts.optimizer(decay_mask=mask)
  state = parts.state(optimizer)
  step = jax.jit(
    step_lib.make_train_step(optimizer=optimizer, **parts.loss_arguments())
  )
  batch, history = make_batch(8), []
  for _ in range(12):
    state, sums = step(state, parts.teacher_variables, batch)
    history.append(float(sums["loss"] / sums["count"]))
  assert history[-1] < 0.8 * history[0], history
  for path, leaf in jax.tree_util.tree_leaves_with_path((state, sums)):
    name = jax.tree_util.keystr(path)
    counts = name.endswith((".step", ".count"))
    assert leaf.dtype == (jnp.int32 if counts else jnp.float32), name
  # The student's own classifier, which nothing reads.
  jax.tree.map(
    np.testing.assert_array_equal,
    state.params["student"]["fc"],
    start.params["student"]["fc"],
  )
  full = made("simkd")
  step = step_lib.make_train_step(optimizer=optimizer, **full.loss_arguments())
  _, exact = jax.jit(step)(full.state(optimizer), full.teacher_variables, batch)
  exact = float(exact["loss"] / exact["count"])
  assert 0 < abs(history[0] - exact) < 0.05 * exact  # bfloat16 it was


@pytest.mark.parametrize("method", distillers.names())
def test_bfloat16_keeps_the_types_of_the_state(method):
  parts = made(method, dtype=jnp.bfloat16)
  optimizer = parts.optimizer()
  step = step_lib.make_train_step(optimizer=optimizer, **parts.loss_arguments())
  state = parts.state(optimizer)
  after, sums = jax.eval_shape(
    step, state, parts.teacher_variables, make_batch(8)
  )

  def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

  assert types(after) == types(state)
  assert {x.dtype for x in jax.tree.leaves(state.params)} == FLOAT32
  assert {x.dtype for x in sums.values()} == FLOAT32


def test_evaluation_counts_real_examples_once():
  rng = np.random.default_rng(0)
  logits = rng.standard_normal((10, 7)).astype(np.float32)
  labels = rng.integers(0, 7, 10).astype(np.int32)
  padded = np.concatenate([logits, np.full((6, 7), np.nan, np.float32)])
  xs = {
    "logits": padded.reshape(4, 4, 7),
    "labels": np.concatenate([labels, np.zeros(6, np.int32)]).reshape(4, 4),
    "mask": (np.arange(16) < 10).reshape(4, 4),
  }

  def step(variables, teacher_variables, batch):
    return eval_step.prediction_sums(
      *(batch[name] for name in ("logits", "labels", "mask"))
    )

  chunk = eval_step.make_eval_chunk(step)
  together = chunk({}, {}, {}, xs)
  single = [
    chunk({}, {}, {}, jax.tree.map(lambda x, i=i: x[i : i + 1], xs))
    for i in range(4)
  ]
  apart = jax.tree.map(lambda *leaves: sum(leaves), *single)
  shifted = logits - logits.max(1, keepdims=True)
  log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
  rank = (logits > logits[np.arange(10), labels][:, None]).sum(1)
  expected = {
    "ce": -log_p[np.arange(10), labels].sum(),
    "top1": (rank < 1).sum(),
    "top5": (rank < 5).sum(),
    "count": 10,
  }
  for sums in (together, apart):
    assert sums.keys() == expected.keys()
    for name, value in expected.items():
      np.testing.assert_allclose(sums[name], value, rtol=1e-6)
