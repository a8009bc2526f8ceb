"""Learning-rate schedules and the optimiser, from keyword arguments."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend import core


def scaled_learning_rate(
  rate: float, *, batch_size: int, reference_batch_size: int
) -> float:
  """A rate in proportion to the batch (Goyal et al., 2017, section 2.1).

  Args:
    rate: for `reference_batch_size`.
    batch_size: images per update.
    reference_batch_size: that of the recipe; 0 leaves the rate as it is.
  """
  if not reference_batch_size:
    return rate
  return rate * batch_size / reference_batch_size


def learning_rate_schedule(
  base: float,
  *,
  schedule: str,
  epochs: int,
  steps_per_epoch: int,
  milestones: Sequence[int] = (),
  decay_rate: float = 0.1,
  warmup_epochs: float = 0.0,
) -> optax.Schedule:
  """Learning rate as a function of the step.

  Args:
    base: the rate after warm-up.
    schedule: "step" multiplies it by `decay_rate` from the first step after
      `milestones` epochs on (the 1-based epoch exceeds the milestone);
      "cosine" takes it to 0 over the steps; "constant" keeps it.
    epochs: length of the run.
    steps_per_epoch: optimiser updates in an epoch.
    milestones: epochs, ascending.
    decay_rate: factor at each milestone.
    warmup_epochs: epochs over which the rate grows linearly from 0.

  Returns:
    A function from the step (0-based) to the rate.

  Raises:
    ValueError: for an unknown schedule.
  """
  total = epochs * steps_per_epoch
  warmup = round(warmup_epochs * steps_per_epoch)
  if schedule == "step":
    # Milestones count from the start of the run; join_schedules restarts the
    # count after the warm-up.
    boundaries: dict[int, float] = {}
    for milestone in milestones:
      step = max(round(milestone * steps_per_epoch) - warmup, 0)
      boundaries[step] = boundaries.get(step, 1.0) * decay_rate
    main = optax.piecewise_constant_schedule(base, boundaries)
  elif schedule == "cosine":
    main = optax.cosine_decay_schedule(base, max(total - warmup, 1))
  elif schedule == "constant":
    main = optax.constant_schedule(base)
  else:
    raise ValueError(
      "config.optim.schedule: expected one of 'step', 'cosine',"
      f" 'constant', got {schedule!r}"
    )
  if not warmup:
    return main
  ramp = optax.linear_schedule(0.0, base, warmup)
  return optax.join_schedules([ramp, main], [warmup])


def sgd(
  learning_rate: optax.Schedule,
  *,
  momentum: float = 0.9,
  nesterov: bool = False,
  weight_decay: float = 0.0,
  decay_mask: Any = None,
  gradient_clip: float = 0.0,
) -> optax.GradientTransformation:
  """SGD as the reference toolboxes' PyTorch optimiser computes it.

  g <- clip(g) + weight_decay * p;  v <- momentum * v + g;  p <- p - rate * v
  (Nesterov: p <- p - rate * (g + momentum * v)). Weight decay is coupled and
  acts on every parameter, BatchNorm's and biases included.

  Args:
    learning_rate: a schedule.
    momentum: of the velocity v, which has no dampening.
    nesterov: whether to look ahead.
    weight_decay: coefficient of p in the gradient.
    decay_mask: pytree of bools like the parameters; False leaves one out.
    gradient_clip: largest global norm of the gradient; 0 does not clip.

  Returns:
    The optax transformation.
  """
  clip = (
    optax.clip_by_global_norm(gradient_clip)
    if gradient_clip
    else optax.identity()
  )
  return optax.chain(
    clip,
    optax.add_decayed_weights(weight_decay, mask=decay_mask),
    optax.trace(decay=momentum, nesterov=nesterov),
    optax.scale_by_learning_rate(learning_rate),
  )


class DotState(NamedTuple):
  """Velocities of `dot`.

  Attributes:
    ce: of the gradient of the term "ce" and of weight decay.
    rest: of the gradient of all other terms.
  """

  ce: Any
  rest: Any


def dot(
  learning_rate: optax.Schedule,
  *,
  delta: float,
  shared: Any,
  momentum: float = 0.9,
  nesterov: bool = False,
  weight_decay: float = 0.0,
  decay_mask: Any = None,
  gradient_clip: float = 0.0,
) -> optax.GradientTransformation:
  """SGD that remembers distillation for longer than the labels.

  DOT (Zhao et al., "DOT: A Distillation-Oriented Trainer", ICCV 2023):
  g_ce <- g_ce + weight_decay * p;
  v_ce <- (momentum - delta) * v_ce + g_ce;
  v_rest <- (momentum + delta) * v_rest + g_rest;
  p <- p - rate * (v_ce + v_rest). With delta 0 this is `sgd`.

  The gradient is a pair of pytrees like the parameters: of the term "ce", and
  of all others (`step.make_train_step` with `split_ce`).

  Args:
    learning_rate: see `sgd`.
    delta: the paper has 0.075 for CIFAR-100 and 0.09 for ImageNet.
    shared: pytree of bools like the parameters: whether both gradients reach
      one. Otherwise it keeps `momentum`.
    momentum: see `sgd`.
    nesterov: see `sgd`.
    weight_decay: see `sgd`.
    decay_mask: see `sgd`.
    gradient_clip: largest global norm of the gradients' sum; 0 does not clip.

  Returns:
    The optax transformation.

  Raises:
    ValueError: if a momentum would leave 0..1.
  """
  if not 0 <= momentum - delta <= momentum + delta < 1:
    raise ValueError(
      "config.optim.dot_delta: expected momenta of at least 0 and below 1, got"
      f" {momentum} -+ {delta}. Lower it"
    )
  decay = optax.add_decayed_weights(weight_decay, mask=decay_mask)

  def trace(change: float, velocity: Any, gradient: Any) -> tuple[Any, Any]:
    def add(both: bool, v: jax.Array, g: jax.Array) -> jax.Array:
      return g + (momentum + change * both) * v

    velocity = jax.tree.map(add, shared, velocity, gradient)
    if not nesterov:
      return velocity, velocity
    return velocity, jax.tree.map(add, shared, velocity, gradient)

  def init(params: Any) -> DotState:
    zeros = jax.tree.map(jnp.zeros_like, params)
    return DotState(zeros, jax.tree.map(jnp.zeros_like, params))

  def update(
    gradients: Any, state: Any, params: Any = None
  ) -> tuple[Any, DotState]:
    if gradient_clip:
      norm = optax.tree.norm(jax.tree.map(jnp.add, *gradients))
      factor = gradient_clip / jnp.maximum(norm, gradient_clip)
      gradients = jax.tree.map(lambda g: factor * g, gradients)
    ce, rest = gradients
    ce, _ = decay.update(ce, decay.init(params), params)
    v_ce, moved_ce = trace(-delta, state.ce, ce)
    v_rest, moved_rest = trace(delta, state.rest, rest)
    return jax.tree.map(jnp.add, moved_ce, moved_rest), DotState(v_ce, v_rest)

  return optax.chain(
    optax.GradientTransformation(init, update),
    optax.scale_by_learning_rate(learning_rate),
  )


class ParameterUses(NamedTuple):
  """What a loss does with its parameters; pytrees like them.

  SimKD's student keeps a classifier that no term reads. Weight decay would
  shrink it to nothing, and with it whatever else an export or a later stage
  may want; so decay leaves out what has no gradient by construction.

  Attributes:
    reached: bools, whether the gradient depends on anything.
    dtypes: that to which its only use casts the parameter, as a layer in
      bfloat16 does; else its own. (The gradients of several uses are added in
      its own.)
  """

  reached: Any
  dtypes: Any


def parameter_uses(
  loss_fn: Callable[..., Any], params: Any, *arguments: Any
) -> ParameterUses:
  """Finds out what a loss does with its parameters.

  Args:
    loss_fn: made by `make_loss_fn`, with `axis_name=None`.
    params: its first argument, arrays or `jax.ShapeDtypeStruct`s.
    *arguments: the others.

  Returns:
    Its uses, traced from the gradient.
  """
  grad = jax.grad(loss_fn, has_aux=True)
  jaxpr = jax.make_jaxpr(lambda *a: grad(*a)[0])(params, *arguments).jaxpr
  leaves, structure = jax.tree.flatten(params)

  def is_literal(variable: Any) -> bool:
    return isinstance(variable, core.Literal)

  # A gradient that is zero by construction is made of constants alone.
  depends = set(jaxpr.invars)
  dtypes: dict[Any, list[Any]] = {v: [] for v in jaxpr.invars[: len(leaves)]}
  for equation in jaxpr.eqns:
    variables = [v for v in equation.invars if not is_literal(v)]
    if any(v in depends for v in variables):
      depends.update(equation.outvars)
    for v in variables:
      if v in dtypes:
        dtypes[v].append(equation.params.get("new_dtype", v.aval.dtype))
  flags = [not is_literal(v) and v in depends for v in jaxpr.outvars]
  return ParameterUses(
    jax.tree.unflatten(structure, flags),
    jax.tree.unflatten(
      structure,
      [
        found[0] if len(found) == 1 else leaf.dtype
        for leaf, found in zip(leaves, dtypes.values(), strict=True)
      ],
    ),
  )


def idle_parts(reached: Any) -> tuple[str, ...]:
  """Names the parts with parameters of which no term reaches any.

  Args:
    reached: of `parameter_uses`, by part.
  """
  flags = {part: jax.tree.leaves(tree) for part, tree in reached.items()}
  return tuple(p for p, found in flags.items() if found and not any(found))
