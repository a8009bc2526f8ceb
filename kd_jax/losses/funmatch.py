"""FunMatch: function matching by a patient, consistent teacher."""

import jax
import jax.numpy as jnp

from kd_jax.losses import checks
from kd_jax.losses.kd import kd_loss

DISTANCES = ("kl", "l2", "euclidean", "logsoftmax_euclidean", "hard")
# Under the root of a distance, whose gradient is then finite at 0.
_EPS = 1e-12


def funmatch_loss(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  *,
  distance: str = "kl",
  temperature: float | jax.Array = 1.0,
  teacher_smoothing: float | jax.Array = 0.0,
) -> jax.Array:
  """A distance between two networks' predictions of one image.

  - "kl": T^2 * KL(softmax(teacher / T), softmax(student / T)), as KD;
  - "l2": sum over classes of (student - teacher)^2;
  - "euclidean": sqrt(that + 1e-12);
  - "logsoftmax_euclidean": the same of the log-probabilities;
  - "hard": KL from h, which has 1 - `teacher_smoothing` at the teacher's most
    likely class and the rest spread evenly over the others.

  Args:
    student_logits: [B, C], floating-point.
    teacher_logits: [B, C], floating-point.
    distance: one of these names.
    temperature: T of "kl", above 0.
    teacher_smoothing: of "hard", at least 0 and below 1.

  Returns:
    [B] float32; "kl" and "hard" in nats, the others in units of logits.

  Raises:
    ValueError: for other ranks, unequal shapes or another distance.

  Source: Beyer et al., "Knowledge Distillation: A Good Teacher Is Patient and
  Consistent", CVPR 2022, section 3; the distances as in the authors' code.

  >>> import jax.numpy as jnp
  >>> z = jnp.array([[1.0, 4.0]])
  >>> funmatch_loss(z, z + jnp.array([[2.0, 0.0]]), distance="l2").tolist()
  [4.0]
  """
  student, teacher = checks.logits_of(student_logits, teacher_logits)
  t = checks.number("temperature", temperature, above=0)
  smoothing = checks.number(
    "teacher_smoothing", teacher_smoothing, least=0, below=1
  )
  if distance not in DISTANCES:
    raise ValueError(
      f"distance: expected one of {', '.join(DISTANCES)}, got {distance!r}"
    )
  if distance == "kl":
    return kd_loss(student, teacher, temperature=t)
  if distance == "hard":
    others = smoothing / max(student.shape[1] - 1, 1)
    best = jax.nn.one_hot(jnp.argmax(teacher, axis=1), student.shape[1])
    target = jnp.where(best > 0, 1 - smoothing, others)
    surprise = jax.nn.log_softmax(student)
    return jnp.sum(jax.scipy.special.xlogy(target, target), axis=1) - jnp.sum(
      target * surprise, axis=1
    )
  if distance == "logsoftmax_euclidean":
    student, teacher = map(jax.nn.log_softmax, (student, teacher))
  squares = jnp.sum(jnp.square(student - teacher), axis=1)
  return squares if distance == "l2" else jnp.sqrt(squares + _EPS)
