"""Distillers: one final linen module per method, looked up by its word."""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

from kd_jax.distillers.at import AT
from kd_jax.distillers.base import Distiller, DistillOutput, weighted_sum
from kd_jax.distillers.crd import CRD
from kd_jax.distillers.fitnet import FitNet
from kd_jax.distillers.kd import KD
from kd_jax.distillers.multi_teacher import MultiTeacher
from kd_jax.distillers.none import NoTeacher
from kd_jax.distillers.reviewkd import ReviewKD
from kd_jax.distillers.semckd import SemCKD
from kd_jax.distillers.simkd import SimKD
from kd_jax.distillers.sp import SP
from kd_jax.distillers.srrl import SRRL
from kd_jax.distillers.vid import VID

__all__ = [
  "DISTILLERS",
  "DistillOutput",
  "Distiller",
  "create",
  "create_for_teachers",
  "names",
  "weighted_sum",
]

DISTILLERS: dict[str, type[Distiller]] = {
  "none": NoTeacher,
  "kd": KD,
  "fitnet": FitNet,
  "at": AT,
  "sp": SP,
  "vid": VID,
  "crd": CRD,
  "srrl": SRRL,
  "semckd": SemCKD,
  "simkd": SimKD,
  "reviewkd": ReviewKD,
}


def names() -> list[str]:
  """The methods' words."""
  return list(DISTILLERS)


def _nearest(word: str, known: list[str]) -> str:
  close = difflib.get_close_matches(word.lower(), known, n=3, cutoff=0.4)
  return f" Did you mean {' or '.join(close)}?" if close else ""


def create(name: str, **fields: Any) -> Distiller:
  """Makes the distiller of a method.

  Args:
    name: the method's word, one of `names()`.
    **fields: the module's fields, such as `temperature` or SimKD's `factor`.

  Returns:
    The module, without variables.

  Raises:
    ValueError: for an unknown method or field, with the nearest names.
  """
  if name not in DISTILLERS:
    raise ValueError(
      f"unknown method {name!r}.{_nearest(name, names())} The methods are: "
      f"{', '.join(names())}"
    )
  cls = DISTILLERS[name]
  known = [
    field.name
    for field in dataclasses.fields(cls)
    if field.init and field.name not in ("parent", "name")
  ]
  for field in fields:
    if field not in known:
      raise ValueError(
        f"{name} has no field {field!r}.{_nearest(field, known)} Its fields "
        f"are: {', '.join(known)}"
      )
  return cls(**fields)


def create_for_teachers(
  name: str, weights: Sequence[float], **fields: Any
) -> MultiTeacher:
  """Makes the distiller of a method with several teachers.

  Args:
    name: the method's word.
    weights: of the teachers, above 0; they are divided by their sum.
    **fields: see `create`.

  Returns:
    The module; it takes tuples of the teachers' outputs and classifiers.

  Raises:
    ValueError: see `create`; or if the method is one for a single teacher.
  """
  members = tuple(create(name, **fields) for _ in weights)
  if not members[0].takes_many_teachers:
    able = [n for n, cls in DISTILLERS.items() if cls.takes_many_teachers]
    raise ValueError(
      f"{name} learns from one teacher, got {len(weights)}: what it compares"
      " has no meaning as a mean over teachers. The methods that take several"
      f" are: {', '.join(able)}"
    )
  total = sum(weights)
  return MultiTeacher(
    members=members, weights=tuple(weight / total for weight in weights)
  )
