"""What is lost by keeping only a teacher's largest logits.

    python -m benchmarks.cache_error CACHE/seed_0 [--temperature 4]

CACHE holds all logits of an epoch or more (`config.teacher.cache` without
`cache_top_k`). For each k, over the images of its first epoch:

  bytes      an image's logits in float16, classes and rest included
  mass       probability of the k classes
  divergence KL from the teacher's softened prediction to the kept one, in nats
  gradient   distance between KD's gradients by the two, over the length of the
             right one, of a student that finds all classes equally probable
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.training import cached_logits

KEPT = (1, 2, 5, 10, 20, 50)


@jax.jit
def _errors(logits: jax.Array, kept: jax.Array, temperature: float):
  log_p = jax.nn.log_softmax(logits / temperature)
  log_q = jax.nn.log_softmax(kept / temperature)
  p, q = jnp.exp(log_p), jnp.exp(log_q)
  norm = jnp.linalg.norm
  return {
    "divergence": jnp.sum(p * (log_p - log_q), -1),
    "gradient": norm(p - q, axis=-1) / norm(p - 1 / p.shape[-1], axis=-1),
  }


def measure(
  logits: np.ndarray, top_k: int, temperature: float
) -> dict[str, float]:
  """What is lost with `top_k` logits: see the module.

  Args:
    logits: [images, C].
    top_k: how many are kept.
    temperature: of KD.
  """
  kept = cached_logits.compress(
    jnp.asarray(logits), top_k=top_k, dtype=jnp.float16
  )
  expanded = cached_logits.expand(kept, logits.shape[-1]).logits
  found = _errors(jnp.asarray(logits, jnp.float32), expanded, temperature)
  probabilities = np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float32)))
  return {
    "bytes": sum(x.nbytes for x in jax.tree.leaves(kept)) / len(logits),
    "mass": float(np.sort(probabilities)[:, -top_k:].sum(-1).mean()),
    **{name: float(jnp.mean(x)) for name, x in found.items()},
  }


def main() -> None:
  """Prints a table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("cache", type=pathlib.Path, metavar="CACHE/seed_N")
  parser.add_argument("--temperature", type=float, default=4.0)
  args = parser.parse_args()
  (part, *_) = sorted(args.cache.glob("epoch_*/part_0_of_1.npz"))
  logits = np.load(part)["logits"].astype(np.float32)
  logits = logits.reshape(-1, logits.shape[-1])
  print(
    "| k | bytes | mass | divergence | gradient |\n|---:|---:|---:|---:|---:|"
  )
  for k in (*KEPT, logits.shape[-1]):
    row = measure(logits, k, args.temperature)
    print(
      f"| {k} | {row['bytes']:.0f} | {row['mass']:.4f} |"
      f" {row['divergence']:.1e} | {row['gradient']:.1e} |"
    )


if __name__ == "__main__":
  main()
