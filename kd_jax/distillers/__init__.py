"""Distillers: what each method adds to the networks.

One final linen module per method, in a file of the method's name, and a line in
`DISTILLERS`. `connectors` and `exits` hold learned modules beside the two
networks, `multi_teacher` the mean over several teachers, `combination` several
methods at once. This room imports `kd_jax.losses`, `kd_jax.models.layers`,
`kd_jax.distributed.collectives` and `kd_jax.registry`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NoReturn

from kd_jax import registry
from kd_jax.distillers.ab import AB
from kd_jax.distillers.at import AT
from kd_jax.distillers.base import Distiller, DistillOutput
from kd_jax.distillers.bkd import BKD
from kd_jax.distillers.catkd import CATKD
from kd_jax.distillers.cc import CC
from kd_jax.distillers.combination import Combination
from kd_jax.distillers.crd import CRD
from kd_jax.distillers.ctkd import CTKD
from kd_jax.distillers.dist import DIST
from kd_jax.distillers.dkd import DKD
from kd_jax.distillers.fitnet import FitNet
from kd_jax.distillers.fsp import FSP
from kd_jax.distillers.ft import FT
from kd_jax.distillers.funmatch import FunMatch
from kd_jax.distillers.ickd import ICKD
from kd_jax.distillers.ikl import IKL
from kd_jax.distillers.kd import KD
from kd_jax.distillers.kdsvd import KDSVD
from kd_jax.distillers.luminet import LumiNet
from kd_jax.distillers.mgd import MGD
from kd_jax.distillers.mlkd import MLKD
from kd_jax.distillers.multi_teacher import MultiTeacher
from kd_jax.distillers.nd import ND
from kd_jax.distillers.nkd import NKD
from kd_jax.distillers.none import NoTeacher
from kd_jax.distillers.normkd import NormKD
from kd_jax.distillers.nst import NST
from kd_jax.distillers.ofa import OFA
from kd_jax.distillers.ofd import OFD
from kd_jax.distillers.pkt import PKT
from kd_jax.distillers.reviewkd import ReviewKD
from kd_jax.distillers.rkd import RKD
from kd_jax.distillers.rld import RLD
from kd_jax.distillers.sdd import SDD
from kd_jax.distillers.semckd import SemCKD
from kd_jax.distillers.simkd import SimKD
from kd_jax.distillers.sp import SP
from kd_jax.distillers.srd import SRD
from kd_jax.distillers.srrl import SRRL
from kd_jax.distillers.tfkd import TfKD
from kd_jax.distillers.ttm import TTM
from kd_jax.distillers.vid import VID
from kd_jax.distillers.vitkd import ViTKD
from kd_jax.distillers.wkd_f import WKDF
from kd_jax.distillers.wkd_l import WKDL
from kd_jax.distillers.wsld import WSLD
from kd_jax.distillers.wttm import WTTM

__all__ = [
  "DISTILLERS",
  "DistillOutput",
  "Distiller",
  "create",
  "create_for_teachers",
  "fields_of_members",
  "member_name",
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
  "ofd": OFD,
  "nd": ND,
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
  "funmatch": FunMatch,
  "ofa": OFA,
  "vitkd": ViTKD,
  "catkd": CATKD,
  "ickd": ICKD,
  "srd": SRD,
  "mgd": MGD,
  "wkd_l": WKDL,
  "wkd_f": WKDF,
  "rkd": RKD,
  "pkt": PKT,
  "mlkd": MLKD,
  "nst": NST,
  "cc": CC,
  "kdsvd": KDSVD,
  "ft": FT,
  "ab": AB,
  "fsp": FSP,
}


def names() -> list[str]:
  """Names of the methods."""
  return list(DISTILLERS)


def create(name: str, **fields: Any) -> Distiller:
  """Makes the distiller of a method, or of several: "crd+dkd".

  Args:
    name: one of `names()`, a class of yours as "package.module:Class", or
      several of them joined by "+".
    **fields: the module's fields, such as `temperature` or SimKD's `factor`. Of
      several methods, all take the fields that every method has
      (`temperature`, `standardize`), and one takes what it alone has. Any other
      field, and one for a single method, goes into a dict of the method's name:
      `create("dkd+sdd", dkd={"beta": 2.0, "temperature": 1.0})`. A class of
      yours has its own name in lower case.

  Returns:
    The module, without variables.

  Raises:
    ValueError: for an unknown method or field, with the nearest names; for
      methods that do not go together, or a field that two of them have.
  """
  return create_for_teachers(name, (), **fields)


def fields_of(name: str) -> list[str]:
  """Names of the fields that a method has, or that several have."""
  return [f for method in name.split("+") for f in _fields(_class(method))]


def create_for_teachers(
  name: str, weights: Sequence[float], **fields: Any
) -> Distiller:
  """Makes the distiller of a method for any number of teachers.

  Args:
    name: see `create`.
    weights: one per teacher, above 0; they are divided by their sum.
    **fields: see `create`.

  Returns:
    The method's own module for at most one teacher, else a `MultiTeacher`; of
    several methods a `Combination` of such modules.

  Raises:
    ValueError: see `create`; or for several teachers of a method with one.
  """
  if "+" not in name:
    return _create_one(name, weights, fields)
  parts = fields_of_members(name, **fields)
  module = Combination(
    members=tuple(
      _create_one(part.pop("name"), weights, part).clone(name=key)
      for key, part in parts.items()
    )
  )
  # Raises if two members make the prediction.
  _ = module.predictor
  return module


def member_name(method: str) -> str:
  """What a method is called among several: a class of yours in lower case."""
  return method.rpartition(":")[2].lower()


def fields_of_members(name: str, **fields: Any) -> dict[str, dict[str, Any]]:
  """Parts the fields of several methods; see `create`.

  Args:
    name: several methods, joined by "+".
    **fields: see `create`.

  Returns:
    Name of the member -> "name" and the fields of its method.
  """
  methods: dict[str, str] = {}
  known: dict[str, list[str]] = {}
  for method in name.split("+"):
    cls, key = _class(method), member_name(method)
    if key in methods:
      raise ValueError(
        f"method {name!r}: expected different methods, got {methods[key]} and"
        f" {method}"
      )
    if not cls.needs_teacher:
      raise ValueError(
        f"method {name!r}: expected methods that learn from a teacher, got"
        f" {method}. Leave it out: every method has the term 'ce'"
      )
    methods[key], known[key] = method, _fields(cls)
  made: dict[str, dict[str, Any]] = {key: {} for key in methods}
  for field, value in fields.items():
    takers = [key for key in known if field in known[key]]
    if field in made:
      if not isinstance(value, Mapping):
        raise ValueError(
          f"method {name!r}: expected the fields of {field} as a dict, got"
          f" {value!r}"
        )
    elif not takers:
      _refuse(name, field, [*made, *dict.fromkeys(chain(*known.values()))])
    elif len(takers) > 1 and field not in _fields(Distiller):
      raise ValueError(
        f"method {name!r}: {' and '.join(takers)} each have a field {field!r}."
        f" Say whose you mean: {takers[0]}={{{field!r}: {value!r}}}"
      )
    else:
      for key in takers:
        made[key][field] = value
  for key, method in methods.items():
    own = fields.get(key, {})
    for field in own:
      if field not in known[key]:
        _refuse(key, field, known[key])
    made[key] = {"name": method, **made[key], **own}
  return made


def _create_one(
  name: str, weights: Sequence[float], fields: Mapping[str, Any]
) -> Distiller:
  """The module of one method for any number of teachers."""
  cls = _class(name)
  known = _fields(cls)
  for field in fields:
    if field not in known:
      _refuse(name, field, known)
  if len(weights) <= 1:
    return cls(**fields)
  if not cls.takes_many_teachers:
    able = [n for n, cls in DISTILLERS.items() if cls.takes_many_teachers]
    raise ValueError(
      f"{name} learns from one teacher, got {len(weights)}: what it compares"
      " has no meaning as a mean over teachers. The methods that take several"
      f" are: {', '.join(able)}"
    )
  total = sum(weights)
  return MultiTeacher(
    members=tuple(cls(**fields) for _ in weights),
    weights=tuple(weight / total for weight in weights),
  )


def _class(name: str) -> type[Distiller]:
  cls = registry.resolve(name, DISTILLERS, what="method")
  if not (isinstance(cls, type) and issubclass(cls, Distiller)):
    raise ValueError(
      f"method {name!r}: expected a subclass of kd_jax.distillers.Distiller, "
      f"got {cls!r}"
    )
  return cls


def _fields(cls: type[Distiller]) -> list[str]:
  return [
    field.name
    for field in dataclasses.fields(cls)
    if field.init and field.name not in ("parent", "name")
  ]


def _refuse(name: str, field: str, known: Sequence[str]) -> NoReturn:
  raise ValueError(
    f"{name} has no field {field!r}."
    f"{registry.did_you_mean(field, known)} Its fields are: "
    f"{', '.join(known)}"
  )
