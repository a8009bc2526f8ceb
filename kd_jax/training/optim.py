"""Learning-rate schedules and the optimiser, from keyword arguments."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
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


def reached_parameters(
  loss_fn: Callable[..., Any], params: Any, *arguments: Any
) -> Any:
  """Finds the parameters that some term of the loss reaches.

  SimKD's student keeps a classifier that no term reads. Weight decay would
  shrink it to nothing, and with it whatever else an export or a later stage
  may want; so decay leaves out what has no gradient by construction.

  Args:
    loss_fn: made by `make_loss_fn`, with `axis_name=None`.
    params: its first argument, arrays or `jax.ShapeDtypeStruct`s.
    *arguments: the others.

  Returns:
    A pytree of bools like `params`: whether the gradient depends on anything.
  """
  grad = jax.grad(loss_fn, has_aux=True)
  jaxpr = jax.make_jaxpr(lambda *a: grad(*a)[0])(params, *arguments).jaxpr

  def is_literal(variable: Any) -> bool:
    return isinstance(variable, core.Literal)

  # A gradient that is zero by construction is made of constants alone.
  depends = set(jaxpr.invars)
  for equation in jaxpr.eqns:
    if any(not is_literal(v) and v in depends for v in equation.invars):
      depends.update(equation.outvars)
  flags = [not is_literal(v) and v in depends for v in jaxpr.outvars]
  return jax.tree.unflatten(jax.tree.structure(params), flags)
