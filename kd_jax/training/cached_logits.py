"""A teacher's logits as they are cached: all of them, or the largest few."""

from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.models.layers import ModelOutputs


def compress(logits: jax.Array, *, top_k: int, dtype: Any) -> dict[str, Any]:
  """Makes logits small enough to keep for every image and epoch.

  Args:
    logits: [..., C].
    top_k: how many of the largest are kept; 0, or C and more, keeps all.
    dtype: of what is kept, float32 or float16.

  Returns:
    {"logits": [..., C]}, or {"logits": [..., k], "classes": [..., k], uint16
    unless C is larger, "rest": [...]}. "rest" is the logit that each other
    class gets, so that all of them together keep their probability.
  """
  logits = logits.astype(jnp.float32)
  others = logits.shape[-1] - top_k
  if not top_k or others <= 0:
    return {"logits": logits.astype(dtype)}
  largest, classes = jax.lax.top_k(logits, top_k)
  left = jnp.put_along_axis(logits, classes, -jnp.inf, -1, inplace=False)
  rest = jax.nn.logsumexp(left, axis=-1) - jnp.log(float(others))
  small = logits.shape[-1] <= 2**16
  return {
    "logits": largest.astype(dtype),
    "classes": classes.astype(jnp.uint16) if small else classes,
    "rest": rest.astype(dtype),
  }


def expand(kept: dict[str, Any], num_classes: int) -> ModelOutputs:
  """The output of a teacher from what `compress` kept.

  Args:
    kept: of `compress`.
    num_classes: C.

  Returns:
    Float32 logits [..., C], and no features.
  """
  logits = kept["logits"].astype(jnp.float32)
  if "classes" in kept:
    rest = kept["rest"].astype(jnp.float32)[..., None]
    rest = jnp.broadcast_to(rest, (*rest.shape[:-1], num_classes))
    classes = kept["classes"].astype(jnp.int32)
    logits = jnp.put_along_axis(rest, classes, logits, -1, inplace=False)
  return ModelOutputs(logits, {})
