"""Checks at the door of every loss.

A [B, 1] minus a [B] array broadcasts to [B, B] without a word and trains; the
losses therefore look at ranks, shapes and dtypes before they compute.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def float_array(
  name: str, x: jax.Array, *, rank: int | None = None
) -> jax.Array:
  """Returns `x` in float32 after checking its rank and dtype.

  Args:
    name: what the error message calls the array.
    x: a floating-point array.
    rank: the number of axes it must have, or None for any.

  Returns:
    `x` as float32.

  Raises:
    ValueError: if `x` has another rank, or is not floating-point.
  """
  x = jnp.asarray(x)
  if rank is not None and x.ndim != rank:
    raise ValueError(
      f"{name}: expected an array with {rank} axes, got shape {x.shape}; "
      "add or drop an axis before calling the loss"
    )
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
      f"{name}: expected a floating-point array, got {x.dtype}; convert it "
      "with .astype(jnp.float32)"
    )
  return x.astype(jnp.float32)


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


def labels_of(labels: jax.Array, logits: jax.Array) -> jax.Array:
  """Returns `labels` after checking that they are integers, one per row.

  Raises:
    ValueError: if they are not integers of shape [B] for logits [B, C].
  """
  labels = jnp.asarray(labels)
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
  return labels


def integer_array(name: str, x: jax.Array, *, rank: int) -> jax.Array:
  """Returns `x` after checking that it holds integers and has `rank` axes."""
  x = jnp.asarray(x)
  if x.ndim != rank or not jnp.issubdtype(x.dtype, jnp.integer):
    raise ValueError(
      f"{name}: expected an integer array with {rank} axes, got {x.dtype} "
      f"of shape {x.shape}"
    )
  return x


def positive(name: str, value: float | jax.Array) -> None:
  """Raises ValueError if a hyper-parameter is a number and not above 0."""
  if isinstance(value, int | float) and not value > 0:
    raise ValueError(
      f"{name}: expected a number above 0, got {value}; 4 is the usual "
      "temperature of the logits, 0.07 that of contrast"
    )


def as_list(
  name: str, maps: jax.Array | Sequence[jax.Array]
) -> list[jax.Array]:
  """Returns one map or several as a list of float32 maps [B, H, W, C].

  Raises:
    ValueError: for an empty sequence, or maps of another rank or dtype.
  """
  several: list[jax.Array] = (
    list(maps) if isinstance(maps, list | tuple) else [jnp.asarray(maps)]
  )
  if not several:
    raise ValueError(f"{name}: expected at least one map, got none")
  return [float_array(f"{name}[{i}]", x, rank=4) for i, x in enumerate(several)]


def same_number(name_a: str, a: Sequence, name_b: str, b: Sequence) -> None:
  """Raises ValueError unless two sequences have one length."""
  if len(a) != len(b):
    raise ValueError(
      f"{name_a} and {name_b}: expected equally many maps, got {len(a)} "
      f"and {len(b)}; choose which layers form pairs"
    )
