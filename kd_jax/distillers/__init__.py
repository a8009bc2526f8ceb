"""Distillers: what each method adds to the networks.

One final linen module per method, in a file of the method's name, and a line in
`DISTILLERS`. `connectors` holds the learned modules between the two networks,
`multi_teacher` the mean over several teachers. This room imports
`kd_jax.losses`, `kd_jax.models.layers`, `kd_jax.distributed.collectives` and
`kd_jax.registry`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from kd_jax import registry
from kd_jax.distillers.at import AT
from kd_jax.distillers.base import Distiller, DistillOutput
from kd_jax.distillers.bkd import BKD
from kd_jax.distillers.catkd import CATKD
from kd_jax.distillers.crd import CRD
from kd_jax.distillers.ctkd import CTKD
from kd_jax.distillers.dist import DIST
from kd_jax.distillers.dkd import DKD
from kd_jax.distillers.fitnet import FitNet
from kd_jax.distillers.ikl import IKL
from kd_jax.distillers.kd import KD
from kd_jax.distillers.luminet import LumiNet
from kd_jax.distillers.multi_teacher import MultiTeacher
from kd_jax.distillers.nkd import NKD
from kd_jax.distillers.none import NoTeacher
from kd_jax.distillers.normkd import NormKD
from kd_jax.distillers.reviewkd import ReviewKD
from kd_jax.distillers.rld import RLD
from kd_jax.distillers.sdd import SDD
from kd_jax.distillers.semckd import SemCKD
from kd_jax.distillers.simkd import SimKD
from kd_jax.distillers.sp import SP
from kd_jax.distillers.srrl import SRRL
from kd_jax.distillers.tfkd import TfKD
from kd_jax.distillers.ttm import TTM
from kd_jax.distillers.vid import VID
from kd_jax.distillers.wsld import WSLD
from kd_jax.distillers.wttm import WTTM

__all__ = [
  "DISTILLERS",
  "DistillOutput",
  "Distiller",
  "create",
  "create_for_teachers",
  "names",
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
  "dkd": DKD,
  "dist": DIST,
  "nkd": NKD,
  "wsld": WSLD,
  "tfkd": TfKD,
  "ttm": TTM,
  "wttm": WTTM,
  "rld": RLD,
  "luminet": LumiNet,
  "ikl": IKL,
  "normkd": NormKD,
  "bkd": BKD,
  "ctkd": CTKD,
  "sdd": SDD,
  "catkd": CATKD,
}


def names() -> list[str]:
  """Names of the methods."""
  return list(DISTILLERS)


def create(name: str, **fields: Any) -> Distiller:
  """Makes the distiller of a method.

  Args:
    name: one of `names()`, or a class of yours as "package.module:Class".
    **fields: the module's fields, such as `temperature` or SimKD's `factor`.

  Returns:
    The module, without variables.

  Raises:
    ValueError: for an unknown method or field, with the nearest names.
  """
  cls = registry.resolve(name, DISTILLERS, what="method")
  if not (isinstance(cls, type) and issubclass(cls, Distiller)):
    raise ValueError(
      f"method {name!r}: expected a subclass of kd_jax.distillers.Distiller, "
      f"got {cls!r}"
    )
  known = [
    field.name
    for field in dataclasses.fields(cls)
    if field.init and field.name not in ("parent", "name")
  ]
  for field in fields:
    if field not in known:
      raise ValueError(
        f"{name} has no field {field!r}."
        f"{registry.did_you_mean(field, known)} Its fields are: "
        f"{', '.join(known)}"
      )
  return cls(**fields)


def create_for_teachers(
  name: str, weights: Sequence[float], **fields: Any
) -> Distiller:
  """Makes the distiller of a method for any number of teachers.

  Args:
    name: see `create`.
    weights: one per teacher, above 0; they are divided by their sum.
    **fields: see `create`.

  Returns:
    The method's own module for at most one teacher, else a `MultiTeacher`.

  Raises:
    ValueError: see `create`; or for several teachers of a method with one.
  """
  if len(weights) <= 1:
    return create(name, **fields)
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
