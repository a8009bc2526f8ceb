"""Small inputs, and float64 transcriptions of the papers' formulas."""

import jax.numpy as jnp
import numpy as np
import pytest


def softmax(z):
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def mean_rest(x):
  return x.reshape(len(x), -1).mean(1)


def pool(x, height, width):
  """Adaptive average pool, one output pixel at a time."""
  rows, columns = x.shape[1:3]
  out = np.zeros((len(x), height, width, x.shape[-1]))
  for i in range(height):
    for j in range(width):
      top, bottom = i * rows // height, -(-(i + 1) * rows // height)
      left, right = j * columns // width, -(-(j + 1) * columns // width)
      out[:, i, j] = x[:, top:bottom, left:right].mean((1, 2))
  return out


def cross_entropy(z, y, label_smoothing=0.0):
  q = np.full(z.shape, label_smoothing / z.shape[1])
  q[np.arange(len(y)), y] += 1 - label_smoothing
  return -(q * np.log(softmax(z))).sum(1)


def kd(s, t, temperature):
  p, q = softmax(t / temperature), softmax(s / temperature)
  return temperature**2 * (p * np.log(p / q)).sum(1)


def mse(s, t):
  return mean_rest((s - t) ** 2)


def at(students, teachers):
  total = 0.0
  for s, t in zip(students, teachers):
    if s.shape[1] > t.shape[1]:
      s = pool(s, *t.shape[1:3])
    elif t.shape[1] > s.shape[1]:
      t = pool(t, *s.shape[1:3])
    maps = []
    for x in (s, t):
      a = (x**2).mean(-1).reshape(len(x), -1)
      maps.append(a / np.linalg.norm(a, axis=1, keepdims=True))
    total = total + mse(*maps)
  return total


def sp(s, t):
  grams = []
  for x in (s, t):
    f = x.reshape(len(x), -1)
    g = f @ f.T
    grams.append(g / np.linalg.norm(g, axis=1, keepdims=True))
  return ((grams[0] - grams[1]) ** 2).sum() / len(s) ** 2


def vid(mean, variance, t):
  if mean.shape[1] > t.shape[1]:
    mean = pool(mean, *t.shape[1:3])
  else:
    t = pool(t, *mean.shape[1:3])
  return mean_rest(0.5 * ((mean - t) ** 2 / variance + np.log(variance)))


def crd(scores_s, scores_t, z_s, z_t, num_examples):
  total = 0.0
  noise = (scores_s.shape[1] - 1) / num_examples
  for scores, z in ((scores_s, z_s), (scores_t, z_t)):
    x = np.exp(scores) / z
    total = total - np.log(x[:, 0] / (x[:, 0] + noise + 1e-7))
    total = total - np.log(noise / (x[:, 1:] + noise + 1e-7)).sum(1)
  return total


def srrl(x, z_s, f_t, z_t):
  return mse(x, f_t) + mse(z_s, z_t)


def semckd(projections, targets, attention):
  total = 0.0
  for i, row in enumerate(projections):
    for j, p in enumerate(row):
      total = total + attention[:, i, j] * mse(p, targets[i][j])
  return total / len(projections)


def semckd_attention(queries, keys, soft):
  return softmax(np.einsum("bsd,btd->bst", queries, keys) / soft)


def reviewkd(students, teachers):
  total = 0.0
  for s, t in zip(students, teachers):
    s, t = (x[:, None, None] if x.ndim == 2 else x for x in (s, t))
    level, weight, weights = mse(s, t), 1.0, 1.0
    for size in (4, 2, 1):
      if size < s.shape[1]:
        weight /= 2
        weights += weight
        level = level + weight * mse(pool(s, size, size), pool(t, size, size))
    total = total + level / weights
  return total


class Case:
  """One loss on small inputs.

  Attributes:
    args: positional arguments as the loss takes them.
    kwargs: hyper-parameters.
    reference: the transcription.
    trained: positions of the arguments that have gradients.
    minimum: the arguments of a student that equals its teacher, or None.
    per_example: whether it returns one value per example.
  """

  def __init__(
    self,
    args,
    reference,
    *,
    kwargs=None,
    trained=(0,),
    minimum=None,
    per_example=True,
  ):
    self.args, self.reference = args, reference
    self.kwargs, self.trained = kwargs or {}, trained
    self.minimum, self.per_example = minimum, per_example


def make_cases():
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  b = 4
  z_s, z_t = 3 * normal(b, 7), 3 * normal(b, 7)
  labels = jnp.asarray([0, 6, 2, 2], jnp.int32)
  m_s, m_t = normal(b, 4, 4, 3), normal(b, 4, 4, 3)
  big, wide = normal(b, 8, 8, 5), normal(b, 5, 5, 3)
  f_s, f_t = normal(b, 6), normal(b, 6)
  variance = jnp.asarray([0.5, 1.0, 4.0])
  scores_s, scores_t = 5 * normal(b, 9), 5 * normal(b, 9)
  attention = jnp.asarray(rng.dirichlet([1, 1], (b, 2)), jnp.float32)
  pairs_s = [[m_s, m_t], [wide, wide]]
  pairs_t = [[m_t, wide[:, :4, :4]], [2 * wide, wide + 1]]
  levels_s, levels_t = [big, m_s, wide, f_s], [2 * big, m_t, -wide, f_t]
  return {
    "cross_entropy_loss": Case(
      (z_s, labels), cross_entropy, kwargs={"label_smoothing": 0.1}
    ),
    "kd_loss": Case(
      (z_s, z_t),
      kd,
      kwargs={"temperature": 4.0},
      trained=(0, 1),
      minimum=(z_t, z_t),
    ),
    "fitnet_loss": Case((m_s, m_t), mse, trained=(0, 1), minimum=(m_t, m_t)),
    "at_loss": Case(
      ([big, m_s], [m_t, wide]),
      at,
      trained=(0, 1),
      minimum=([big, m_s], [2 * big, 3 * m_s]),
    ),
    "sp_loss": Case(
      (m_s, wide), sp, trained=(0, 1), minimum=(m_t, 2 * m_t), per_example=False
    ),
    "vid_loss": Case((m_s, variance, big[..., :3]), vid, trained=(0, 1, 2)),
    "crd_loss": Case(
      (scores_s, scores_t, 30.0, 50.0),
      crd,
      kwargs={"num_examples": 20},
      trained=(0, 1),
    ),
    "srrl_loss": Case(
      (f_s, z_s, f_t, z_t), srrl, trained=(0, 1), minimum=(f_t, z_t, f_t, z_t)
    ),
    "semckd_loss": Case(
      (pairs_s, pairs_t, attention),
      semckd,
      trained=(0, 2),
      minimum=(pairs_t, pairs_t, attention),
    ),
    "simkd_loss": Case((m_s, m_t), mse, trained=(0, 1), minimum=(m_t, m_t)),
    "reviewkd_loss": Case(
      (levels_s, levels_t),
      reviewkd,
      trained=(0, 1),
      minimum=(levels_t, levels_t),
    ),
  }


CASES = make_cases()


def pytest_generate_tests(metafunc):
  if "case" in metafunc.fixturenames:
    metafunc.parametrize("name, case", CASES.items(), ids=list(CASES))


@pytest.fixture(scope="session")
def cases():
  """The cases by the name of their loss."""
  return CASES


@pytest.fixture(scope="session")
def numpy_losses():
  """The transcriptions, for tests of one loss."""
  return {
    "pool": pool,
    "semckd_attention": semckd_attention,
    "cross_entropy": cross_entropy,
    "at": at,
  }
