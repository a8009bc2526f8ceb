"""The train step: equal on any devices, exact in its parts."""

import doctest
import functools
import math

import jax
import jax.numpy as jnp
import method_cases
import numpy as np
import optax
import pytest

from kd_jax import training
from kd_jax.distributed import collectives
from kd_jax.training import eval_step, loss, optim
from kd_jax.training import step as step_lib

FLOAT32 = {jnp.dtype(jnp.float32)}
# SemCKD's attention amplifies rounding.
TOLERANCE = {"semckd": 1e-2}
SEEDS = step_lib.make_seeds(0)


def noisy(key, batch):
  images = batch["image"].astype(jnp.float32) / 127.5 - 1
  return images + 0.3 * jax.random.normal(key, images.shape)


def stack(batches):
  return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


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


def assert_same(ours, theirs, tolerance=1e-5):
  worst = worst_difference(ours, theirs)
  assert worst[0] < tolerance, worst


def assert_equal_on_all_devices(state):
  for path, x in jax.tree_util.tree_leaves_with_path(state):
    copies = [np.asarray(shard.data) for shard in x.addressable_shards]
    assert len(copies) > 1
    for copy in copies:
      np.testing.assert_array_equal(copies[0], copy, jax.tree_util.keystr(path))


def is_relational(parts, monkeypatch):
  """Whether the method gathers something of every example of the batch."""
  rows, gather = set(), collectives.axis_gather

  def noted(x, axis_name):
    rows.update(leaf.shape[0] for leaf in jax.tree.leaves(x))
    return gather(x, axis_name)

  loss_fn = loss.make_loss_fn(
    axis_name=collectives.AXIS, **parts.loss_arguments(collectives.AXIS)
  )
  state = parts.state(parts.optimizer())
  with monkeypatch.context() as patch:
    patch.setattr(collectives, "axis_gather", noted)
    jax.make_jaxpr(loss_fn, axis_env=[(collectives.AXIS, 2)])(
      *(state.params, state.collections, parts.teacher_variables),
      *(parts.batch(4), state.step, SEEDS),
    )
  return 4 in rows


def on_devices():
  """(method, devices): relational methods on 4, and with `-m full` on 2."""
  for param in method_cases.stepped():
    (name,) = param.values
    relational = method_cases.method(name).relational
    yield pytest.param(name, 4 if relational else 2, marks=param.marks)
    if relational:
      yield pytest.param(name, 2, marks=pytest.mark.full)


@pytest.mark.parametrize(("method", "num_devices"), [*on_devices()])
def test_equal_on_any_devices(method, num_devices, made, monkeypatch):
  parts = made(method)
  one = state, metrics = parts.train(1)
  assert set(metrics[0]) == {"loss", "top1", "count"} | {
    name for name, weight in parts.weights.items() if weight
  }
  # Or else initial values would be compared.
  start = parts.state(parts.optimizer())
  assert int(state.step) == 3
  for (path, before), (_, now) in zip(
    *(
      jax.tree_util.tree_leaves_with_path((s.params, s.collections))
      for s in (start, state)
    )
  ):
    moved = np.abs(now - before).max() > 0
    constant = "constants" in jax.tree_util.keystr(path)
    assert moved != constant or np.issubdtype(now.dtype, np.integer)
  relational = is_relational(parts, monkeypatch)
  assert relational == method_cases.method(method).relational
  other = parts.train(num_devices)
  assert_same(one, other, TOLERANCE.get(method, 1e-4))
  assert_equal_on_all_devices(other[0])


@pytest.mark.parametrize("method", ["crd", "simkd"])
def test_pmap_is_the_same(method, made):
  parts = made(method)
  assert_same(parts.train(1), parts.train(2, mapping="pmap"), 1e-4)


@pytest.mark.parametrize("method", ["crd", "simkd"])
def test_local_statistics_train_otherwise(method, made):
  """As the references per GPU; the state is the same on every device."""
  one, other = (
    made(method).train(1),
    made(method, init_size=4).train(2, sync=False),
  )
  assert_equal_on_all_devices(other[0])
  ours, theirs = (
    np.asarray(run[0].params["student"]["conv0"]["kernel"])
    for run in (one, other)
  )
  assert np.abs(ours - theirs).max() > 1e-3


def test_dropout_is_the_same_on_any_devices(made):
  parts = made("kd", dropout=0.5)
  one = parts.train(1, steps=2)
  assert_same(one, parts.train(4, steps=2), 1e-4)
  assert worst_difference(one, made("kd").train(1, steps=2))[0] > 1e-2


@pytest.mark.parametrize(("num_devices", "sync"), [(2, False), (3, True)])
def test_split_memory_is_the_whole_one(num_devices, sync, made):
  """32 rows over 3 devices: one has 10, and one of zeros."""
  size = 6 if num_devices == 3 else 8
  parts = made("crd", init_size=size)
  options = {"steps": 3, "sync": sync, "size": size}
  whole = parts.train(num_devices, **options)
  split = parts.train(num_devices, split=True, **options)
  for bank in parts.distiller().memory_rows:
    memory = split[0].collections["distiller"]["memory"]
    for shard in memory[bank].addressable_shards:
      assert shard.data.shape == (-(-32 // num_devices), 8)
    assert not np.asarray(memory[bank])[32:].any()
    memory[bank] = np.asarray(memory[bank])[:32]
  assert_same(whole, split, 1e-4)


@pytest.mark.parametrize("wrong", ["gradients", "tracked"])
def test_the_comparison_sees_a_wrong_reduction(wrong, made, monkeypatch):
  """Both mistakes run without an error."""
  parts = made("sp")
  right, options = parts.train(1), {}
  if wrong == "gradients":  # each device's own
    options["axis_name"] = None
  else:  # the gradient is a sum already, and its mean that sum
    options["shared_statistics"] = False  # else JAX misses their mean
    shard_map = jax.shard_map
    monkeypatch.setattr(
      jax, "shard_map", lambda *a, check_vma, **k: shard_map(*a, **k)
    )
  assert worst_difference(right, parts.train(2, **options))[0] > 1e-2


def test_accumulation_is_equal_on_any_devices(made):
  """A part holds the same examples on one device and on two."""
  parts = made("crd")
  runs = [parts.train(n, steps=2, accumulate_steps=2) for n in (1, 2)]
  assert_same(*runs, 1e-4)


def test_accumulation_is_the_mean_of_its_parts(made):
  parts = made("crd", dropout=0.5)
  step, state = parts.step(accumulate_steps=2)
  batch = parts.batch(8)
  grad = jax.jit(
    jax.grad(loss.make_loss_fn(**parts.loss_arguments()), has_aux=True)
  )
  collections, all_grads, all_sums = state.collections, [], []
  for part in range(2):
    piece = {name: value[part::2] for name, value in batch.items()}
    grads, (collections, sums) = grad(
      *(state.params, collections, parts.teacher_variables, piece),
      *(state.step, SEEDS, part),
    )
    all_grads.append(grads)
    all_sums.append(sums)
  grads = jax.tree.map(lambda a, b: (a + b) / 2, *all_grads)
  updates, _ = parts.optimizer().update(grads, state.opt_state, state.params)
  expected = state.replace(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    collections=collections,
  )
  sums = jax.tree.map(jnp.add, *all_sums)
  got, got_sums = jax.jit(step)(state, parts.teacher_variables, batch, SEEDS)
  assert got_sums.pop("count") == 8
  assert_same((expected, [sums]), (got, [got_sums]))


def test_two_gradients_are_equal_on_any_devices(made):
  parts = made("fitnet")  # whose regressor has no gradient of "ce"

  def dot(delta):
    params = parts.state(optax.identity()).params
    optimizer = optim.dot(
      optax.constant_schedule(0.02),
      delta=delta,
      shared={
        name: jax.tree.map(lambda _, name=name: name == "student", tree)
        for name, tree in params.items()
      },
      weight_decay=5e-4,
    )
    return {"optimizer": optimizer, "split_ce": True}

  one = parts.train(1, **dot(0.075))
  assert_same(one, parts.train(2, **dot(0.075)), 1e-4)
  assert worst_difference(one, parts.train(1))[0] > 1e-3
  accumulated = [
    parts.train(1, accumulate_steps=2, **options) for options in (dot(0.0), {})
  ]
  assert_same(*accumulated, 1e-4)


@pytest.mark.parametrize("pixels", [1, 2 * 8 * 64, 10**9])
def test_steps_in_one_dispatch(pixels, made, monkeypatch):
  """The teacher sees one batch at a time, two, or all four."""
  monkeypatch.setattr(step_lib, "_TEACHER_PIXELS", pixels)
  parts = made("kd")
  step, state = parts.step(transform=noisy)
  chunk = jax.jit(
    step_lib.make_train_chunk(step, lambda extra, x: {**x, **extra})
  )
  batches = [parts.batch(8, seed=i) for i in range(4)]
  # What `load` adds from the resident data.
  extra = {"mask": [batch.pop("mask") for batch in batches].pop()}
  xs = stack(batches)
  constants = step_lib.Constants(parts.teacher_variables, SEEDS)

  def run(state, k):
    sums = []
    for i in range(0, 4, k):
      piece = jax.tree.map(lambda x, i=i: x[i : i + k], xs)
      state, piece_sums = chunk(state, constants, extra, piece)
      sums.append(piece_sums)
    return state, jax.tree.map(lambda *leaves: np.concatenate(leaves), *sums)

  one, four = (run(state, k) for k in (1, 4))
  assert one[1]["loss"].shape == (4,)
  assert_same(one, four)


@pytest.mark.parametrize(
  ("options", "added"),
  [
    ({"mixing": {"mixup": 0.4, "cutmix": 1.0}}, {"lam", "mixed_label"}),
    ({"strong_transform": noisy}, {"strong_images", "strong_teachers"}),
  ],
)
def test_a_batch_is_prepared_the_same_among_others(options, added, made):
  """With all that is random."""
  parts = made("kd")
  precompute_teacher = jax.jit(
    loss.make_precompute_teacher(
      teachers=parts.teachers, transform=noisy, **options
    )
  )
  batches = [parts.batch(8, seed=i) for i in range(3)]
  several = precompute_teacher(
    parts.teacher_variables, stack(batches), np.arange(3) + 5, SEEDS
  )
  for i, batch in enumerate(batches):
    one = precompute_teacher(parts.teacher_variables, batch, 5 + i, SEEDS)
    mine = jax.tree.map(lambda x, i=i: x[i], several)
    assert set(one) - set(batch) == {
      *("augmented_images", "teacher_outputs", *added)
    }
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
      *(mine, one),
    )


def test_each_view_has_its_own_draw_and_outputs(made):
  parts = made("kd")
  batch = parts.batch(8)
  prepared = loss.make_precompute_teacher(
    teachers=parts.teachers, transform=noisy, strong_transform=noisy
  )(parts.teacher_variables, batch, 0, SEEDS)
  for images, outputs in (
    ("augmented_images", "teacher_outputs"),
    ("strong_images", "strong_teachers"),
  ):
    (expected,), _ = loss.run_teachers(
      parts.teachers, parts.teacher_variables, prepared[images]
    )
    np.testing.assert_allclose(
      prepared[outputs][0].logits, expected.logits, rtol=1e-4, atol=1e-5
    )
  weak, strong = prepared["augmented_images"], prepared["strong_images"]
  assert np.abs(weak - strong).max() > 0.1


@pytest.mark.parametrize(
  ("method", "options", "words"),
  [
    (
      "mlkd",
      {"mixing": {"mixup": 0.2}},
      r"mixup and cutmix: expected 0 .* got {'mixup': 0\.2}",
    ),
    ("mlkd", {"strong_transform": None}, "got None for MLKD with 2"),
    ("kd", {"strong_transform": noisy}, "got .* for KD with 1"),
  ],
)
def test_views_that_do_not_fit_the_method(method, options, words, made):
  with pytest.raises(ValueError, match=words):
    loss.make_loss_fn(**made(method).loss_arguments(**options))


def test_a_teacher_sees_the_batches_of_several_steps(made, monkeypatch):
  parts, seen = made("kd"), []
  whole = loss.run_teachers
  monkeypatch.setattr(
    loss,
    "run_teachers",
    lambda t, v, images: seen.append(len(images)) or whole(t, v, images),
  )
  xs = stack([parts.batch(8, seed=i) for i in range(4)])

  def trace(**options):
    step, state = parts.step(**options)
    chunk = step_lib.make_train_chunk(step, lambda _, x: x)
    constants = step_lib.Constants(parts.teacher_variables, SEEDS)
    jax.eval_shape(chunk, state, constants, {}, xs)
    found = set(seen)
    seen.clear()
    return found

  assert trace() == {32}
  # Parts of a batch are mixed among themselves: they come as they are.
  assert trace(accumulate_steps=2) == {4}


@pytest.mark.parametrize(
  ("steps", "batch", "size", "at_once"),
  [
    *((781, 64, 32, 11), (195, 256, 32, 3), (390, 128, 32, 6)),
    *((780, 64, 32, 15), (781, 2048, 32, 1), (100, 256, 224, 1)),
  ],
)
def test_precomputed_steps(steps, batch, size, at_once):
  shape = (batch, size, size, 3)
  assert step_lib.precomputed_steps(steps, shape) == at_once


def test_seeds_are_arguments_of_the_compiled_step(made):
  parts = made("crd", dropout=0.5)
  step, state = parts.step(transform=noisy)
  step = jax.jit(step)

  def run(*seeds):
    state_, sums = step(
      *(state, parts.teacher_variables, parts.batch(8)),
      step_lib.make_seeds(*seeds),
    )
    return state_, [sums]

  first = run(3)
  assert worst_difference(first, run(3, 3))[0] == 0
  for seeds in ((4, 3), (3, 4)):
    assert worst_difference(first, run(*seeds))[0] > 0.01
  assert step._cache_size() == 1


def test_seeds_that_are_none():
  with pytest.raises(ValueError, match=r"expected seeds in .*, got \(1, -1\)"):
    step_lib.make_seeds(1, -1)


def test_bfloat16_trains_in_float32_and_decays_what_is_reached(made):
  parts, batch = made("simkd", dtype=jnp.bfloat16), made("simkd").batch(8)
  start = parts.state(parts.optimizer())
  mask = optim.parameter_uses(
    loss.make_loss_fn(**parts.loss_arguments()),
    *(start.params, start.collections, parts.teacher_variables),
    *(batch, start.step, SEEDS),
  ).reached
  optimizer = parts.optimizer(decay_mask=mask)
  state = parts.state(optimizer)

  def jit(parts):
    return jax.jit(
      step_lib.make_train_step(optimizer=optimizer, **parts.loss_arguments())
    )

  step, history = jit(parts), []
  for _ in range(12):
    state, sums = step(state, parts.teacher_variables, batch, SEEDS)
    history.append(float(sums["loss"] / sums["count"]))
  assert history[-1] < 0.8 * history[0], history
  # The student's own classifier, which nothing reads.
  jax.tree.map(
    np.testing.assert_array_equal,
    *(s.params["student"]["fc"] for s in (state, start)),
  )
  full = made("simkd")
  _, exact = jit(full)(
    full.state(optimizer), full.teacher_variables, batch, SEEDS
  )
  exact = float(exact["loss"] / exact["count"])
  assert 0 < abs(history[0] - exact) < 0.05 * exact  # bfloat16 it was


@pytest.mark.parametrize("split_ce", [False, True])
def test_copies_in_bfloat16_change_nothing(split_ce, made):
  """What the layers read is cast with the update, not by every layer."""
  parts = made("simkd", dtype=jnp.bfloat16)
  optimizer = parts.optimizer()
  if split_ce:
    alike = jax.tree.map(lambda _: True, parts.state(optimizer).params)
    optimizer = optim.dot(
      optax.constant_schedule(0.02), delta=0.05, shared=alike
    )
  weights = {"ce": 1.0, "kd": 0.0, "simkd": 1.0}
  changes = {"split_ce": split_ce, "loss_weights": weights}
  step, state = parts.step(optimizer, **changes)
  batches = [parts.batch(8, seed=i) for i in range(4)]
  xs = stack(batches)
  loss_fn = loss.make_loss_fn(**{**parts.loss_arguments(), **changes})
  if split_ce:
    pair, loss_fn = loss_fn, lambda *a: (sum(pair(*a)[0]), None)
  uses = optim.parameter_uses(
    *(loss_fn, state.params, state.collections, parts.teacher_variables),
    *(batches[0], state.step, SEEDS),
  )
  student = uses.dtypes["student"]
  assert student["conv0"]["kernel"] == jnp.bfloat16
  assert student["bn0"]["scale"] == jnp.float32
  finals = [
    jax.jit(step_lib.make_train_chunk(step, lambda _, x: x, dtypes))(
      state, step_lib.Constants(parts.teacher_variables, SEEDS), {}, xs
    )
    for dtypes in (None, uses.dtypes)
  ]
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7),
    *finals,
  )


def test_what_is_read_twice_is_not_copied(made):
  """Its gradients would be added in bfloat16."""
  parts = made("mlkd", dtype=jnp.bfloat16)
  state = parts.state(parts.optimizer())
  uses = optim.parameter_uses(
    loss.make_loss_fn(**parts.loss_arguments()),
    *(state.params, state.collections, parts.teacher_variables),
    *(parts.batch(8), state.step, SEEDS),
  )
  assert {*jax.tree.leaves(uses.dtypes)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("method", method_cases.stepped())
def test_bfloat16_keeps_the_types_of_the_state(method, made):
  parts = made(method, dtype=jnp.bfloat16)
  step, state = parts.step()
  after, sums = jax.eval_shape(
    step, state, parts.teacher_variables, parts.batch(8), SEEDS
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
  own = logits[np.arange(10), labels]
  rank = (logits > own[:, None]).sum(1)
  expected = {
    "ce": (np.log(np.exp(logits).sum(1)) - own).sum(),
    "top1": (rank < 1).sum(),
    "top5": (rank < 5).sum(),
    "count": 10,
  }
  for sums in (together, apart):
    assert sums.keys() == expected.keys()
    for name, value in expected.items():
      np.testing.assert_allclose(sums[name], value, rtol=1e-5)


def test_the_documented_loop_runs():
  found = doctest.testmod(training)
  assert found.attempted > 10 and not found.failed
