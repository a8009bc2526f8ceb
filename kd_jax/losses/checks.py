"""Argument checks of the losses.

A [B, 1] minus a [B] array broadcasts to [B, B] without an error, and trains.
The losses therefore check ranks, shapes and dtypes before they compute. Values
are checked where they are known, which they are not under `jax.jit`.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt


def float_array(
  name: str, x: jax.Array, *, rank: int | None = None
) -> jax.Array:
  """Returns `x` in float32 after checking its rank and dtype.

  Args:
    name: of the argument, for the error message.
    x: a floating-point array.
    rank: the number of axes it must have, or None for at least two.

  Returns:
    `x` as float32.

  Raises:
    ValueError: if `x` is a list or tuple (it would become a batch of one), has
      another rank, or is not floating-point.
  """
  if isinstance(x, list | tuple):
    raise ValueError(
      f"{name}: expected one array, got a {type(x).__name__} of {len(x)}; pass "
      "its array, or stack them"
    )
  x = jnp.asarray(x)
  if x.ndim != rank if rank is not None else x.ndim < 2:
    layout = {4: ", a map [B, H, W, C]", 2: ", [B, C]"}.get(rank or 0, "")
    raise ValueError(
      f"{name}: expected an array with {rank or 'at least 2'} axes{layout}, "
      f"got shape {x.shape}; add or drop an axis before calling the loss"
    )
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
      f"{name}: expected a floating-point array, got {x.dtype}; convert it "
      "with .astype(jnp.float32)"
    )
  return x.astype(jnp.float32)


def integer_array(
  name: str, x: jax.Array | int, *, rank: int, below: int | None = None
) -> jax.Array:
  """Returns `x` after checking that it holds integers and has `rank` axes.

  Args:
    name: of the argument, for the error message.
    x: an array of integers, or one.
    rank: the number of axes it must have.
    below: if given, `x` holds positions, or classes, in [0, below).

  Returns:
    `x`. With `below`, values outside are `below` itself, which is out of bounds
    for reads with mode="fill": JAX alone would count negative ones from the
    end.

  Raises:
    ValueError: for another rank or dtype, or a known value out of range.
  """
  known = known_values(x)
  x = jnp.asarray(x)
  if x.ndim != rank or not jnp.issubdtype(x.dtype, jnp.integer):
    raise ValueError(
      f"{name}: expected an integer array with {rank} axes, got {x.dtype} "
      f"of shape {x.shape}"
    )
  if below is None:
    return x
  if known is not None and known.size:
    low, high = int(known.min()), int(known.max())
    if low < 0 or high >= below:
      raise ValueError(
        f"{name}: expected values in [0, {below}), got values from {low} to "
        f"{high}; check the number of classes and the data"
      )
  x = x.astype(jnp.int32)
  return jnp.where((x >= 0) & (x < below), x, below)


def labels_of(labels: jax.Array, logits: jax.Array) -> jax.Array:
  """Returns `labels` after checking that they are classes, one per row.

  Raises:
    ValueError: if they are not integers of shape [B] in [0, C) for logits
      [B, C]. Unknown values out of range (under jit) become C.
  """
  given, labels = labels, jnp.asarray(labels)
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(
      f"labels: expected integers, got {labels.dtype}; pass class indices, "
      "not one-hot rows or probabilities"
    )
  if labels.shape != logits.shape[:1]:
    raise ValueError(
      f"labels: expected shape {logits.shape[:1]}, one class index per row "
      f"of the logits {logits.shape}, got {labels.shape}"
    )
  return integer_array("labels", given, rank=1, below=logits.shape[1])


def logits_of(
  student_logits: jax.Array, teacher_logits: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns two networks' logits in float32 after checking them.

  Raises:
    ValueError: unless both are floating-point [B, C] of one shape.
  """
  student = float_array("student_logits", student_logits, rank=2)
  teacher = float_array("teacher_logits", teacher_logits, rank=2)
  same_shape("student_logits", student, "teacher_logits", teacher)
  return student, teacher


def map_shape(name: str, x: jax.Array) -> tuple[int, int, int, int]:
  """Returns the shape (B, H, W, C) of a map.

  Raises:
    ValueError: for another rank.
  """
  if len(x.shape) != 4:
    raise ValueError(
      f"{name}: expected a map [B, H, W, C], got shape {x.shape}"
    )
  batch, height, width, channels = x.shape
  return batch, height, width, channels


def maps(name: str, x: jax.Array | Sequence[jax.Array]) -> list[jax.Array]:
  """Returns one map or several as a list of float32 maps [B, H, W, C].

  Raises:
    ValueError: for an empty sequence, or maps of another rank or dtype.
  """
  several = list(x) if isinstance(x, list | tuple) else [jnp.asarray(x)]
  if not several:
    raise ValueError(f"{name}: expected at least one map, got none")
  return [float_array(f"{name}[{i}]", x, rank=4) for i, x in enumerate(several)]


def same_shape(name_a: str, a: jax.Array, name_b: str, b: jax.Array) -> None:
  """Raises ValueError unless two arrays have one shape."""
  if a.shape != b.shape:
    raise ValueError(
      f"{name_a} and {name_b}: expected equal shapes, got {a.shape} and "
      f"{b.shape}; project or pool one of them first"
    )


def same_batch(name_a: str, a: jax.Array, name_b: str, b: jax.Array) -> None:
  """Raises ValueError unless two arrays hold equally many examples."""
  if a.shape[0] != b.shape[0]:
    raise ValueError(
      f"{name_a} and {name_b}: expected one batch size, got {a.shape[0]} "
      f"and {b.shape[0]}; pass the same examples to both networks"
    )


def same_width(name_a: str, a: jax.Array, name_b: str, b: jax.Array) -> None:
  """Raises ValueError unless the last axes of two arrays are equally long."""
  if a.shape[-1] != b.shape[-1]:
    raise ValueError(
      f"{name_a} and {name_b}: expected one width, got {a.shape[-1]} and "
      f"{b.shape[-1]}"
    )


def same_number(
  name_a: str, a: Sequence[Any], name_b: str, b: Sequence[Any]
) -> None:
  """Raises ValueError unless two sequences have one length."""
  if len(a) != len(b):
    raise ValueError(
      f"{name_a} and {name_b}: expected equally many maps, got {len(a)} "
      f"and {len(b)}; choose which layers form pairs"
    )


def number(
  name: str,
  value: float | jax.Array,
  *,
  above: float = -math.inf,
  least: float = -math.inf,
  below: float = math.inf,
  most: float = math.inf,
  examples: int | None = None,
) -> float | jax.Array:
  """Returns a hyper-parameter after checking it.

  Args:
    name: of the hyper-parameter, for the error message.
    value: a number, or an array without axes.
    above: a known value must exceed it.
    least: the smallest known value allowed.
    below: a known value must stay under it.
    most: the largest known value allowed.
    examples: B, if the value may differ between examples. Then `value` may
      also be [B] or [B, 1].

  Returns:
    `value` itself if it is a Python number, else float32 without axes, or
    [B, 1] if there is one value per example.

  Raises:
    ValueError: for another shape or dtype, and for a known value that is NaN,
      infinite or out of range.
  """
  shapes = [] if examples is None else [(examples,), (examples, 1)]
  dtype = jnp.result_type(value)
  real = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(
    dtype, jnp.integer
  )
  if not real or np.shape(value) not in [(), *shapes]:
    raise ValueError(
      f"{name}: expected {' or '.join(['a number', *map(str, shapes)])}, got "
      f"{dtype} of shape {np.shape(value)}"
    )
  known = known_values(value)
  if known is not None:
    # NaN and infinities are outside of the open default limits.
    inside = (known > above) & (known >= least)
    inside &= (known < below) & (known <= most)
    if not inside.all():
      limits = {
        "above": above,
        "of at least": least,
        "below": below,
        "of at most": most,
      }
      words = [f" {w} {x:g}" for w, x in limits.items() if math.isfinite(x)]
      raise ValueError(
        f"{name}: expected a finite number{' and'.join(words)}, got {value}"
      )
  if isinstance(value, int | float):
    return value
  x = jnp.asarray(value, jnp.float32)
  return x.reshape(x.shape[0], 1) if x.ndim else x


def count(name: str, value: int, *, least: int = 1) -> int:
  """Returns a whole number after checking that it is at least `least`."""
  whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
  if not whole or value < least:
    raise ValueError(
      f"{name}: expected a whole number of at least {least}, got {value!r}"
    )
  return int(value)


def positive_array(name: str, x: jax.Array, *, rank: int) -> jax.Array:
  """`float_array` whose known values must be finite and above 0."""
  known = known_values(x)
  x = float_array(name, x, rank=rank)
  if known is not None and not (np.isfinite(known) & (known > 0)).all():
    raise ValueError(
      f"{name}: expected finite values above 0, got values from "
      f"{known.min()} to {known.max()}"
    )
  return x


def known_values(x: Any) -> npt.NDArray[Any] | None:
  """The values of an argument, or None while JAX traces it."""
  return None if isinstance(x, jax.core.Tracer) else np.asarray(x)
