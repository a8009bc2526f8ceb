"""Presets: the settings that a toolbox or a paper gives to a method.

A config file takes one after its colon: `configs/dkd_cifar.py:mdistiller`. The
table is `presets.toml`. Fields that depend on the two networks stay open (None)
in the config, since flags may still name others. They are filled in when the
run starts, logged, and written to `config.json`. A field that a flag has set
keeps the flag's value.
"""

import functools
import pathlib
import tomllib
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

_BY_PAIR = ("by_pair", "default", "pairs")


@functools.cache
def table() -> dict[str, dict[str, dict[str, Any]]]:
  """Preset -> method -> its settings, see `presets.toml`."""
  path = pathlib.Path(__file__).with_name("presets.toml")
  return tomllib.loads(path.read_text(encoding="utf-8"))


def of_method(method: str) -> list[str]:
  """The presets that have settings for a method."""
  return [name for name, methods in table().items() if method in methods]


def apply(config: ConfigDict, name: str) -> None:
  """Sets the fields of a preset; those that depend on the pair stay open.

  Args:
    config: as its file makes it; changed in place.
    name: one of `of_method`.
  """
  config.preset = name
  config.loss_weights, config.loss_ramp_epochs = ConfigDict(), ConfigDict()
  row = table()[name][config.distiller.name]
  for field, value in _fixed(row).items():
    section, last = _place(config, field)
    section[last] = value
  for field, value in zip(row.get("by_pair", ()), row.get("default", ())):
    section, last = _place(config, field)
    if section.get(last) is not None:
      del section[last]  # its type does not take None
    section[last] = placeholder(type(value))


def fill(config: ConfigDict) -> str:
  """Fills in the fields of a config's preset that are open.

  Args:
    config: with its networks named; changed in place.

  Returns:
    What the preset has set, to be logged; "" without a preset.

  Raises:
    ValueError: if there is no such preset for the method.
  """
  if not config.preset:
    return ""
  method = config.distiller.name
  row = table().get(config.preset, {}).get(method)
  if row is None:
    raise ValueError(
      f"config.preset: expected a preset of {method}"
      f" ({', '.join(of_method(method)) or 'there is none'}), got"
      f" {config.preset!r}. Name it after the colon of the config file"
    )
  teacher, student = config.teacher.name, config.student.name
  by_pair, values = row.get("by_pair", []), row.get("default", [])
  own = row.get("pairs", {}).get(f"{teacher} {student}")
  filled, others = [], []
  fields = {**_fixed(row), **dict(zip(by_pair, own or values))}
  for field, value in fields.items():
    section, last = _place(config, field)
    if section.get(last) is None:
      with section.unlocked():
        section[last] = value
      filled.append(f"{last} {_text(value)}")
    elif section[last] != value:
      others.append(f"{field} is {_text(section[last])}, not {_text(value)}")
  if filled and own is None:
    filled.append("by default, as it does not list this pair")
  return (
    f"preset {config.preset} for {teacher or 'no teacher'} -> {student}"
    f": {'; '.join(filter(None, [', '.join(filled), *others])) or 'set'}"
  )


def _text(value: Any) -> str:
  return f"{value:g}" if isinstance(value, float) else str(value)


def _fixed(row: dict[str, Any]) -> dict[str, Any]:
  """The fields of a row that hold for every pair, by dotted name."""
  fields: dict[str, Any] = {}
  for name, value in row.items():
    if name in _BY_PAIR:
      continue
    if isinstance(value, dict):
      fields |= {f"{name}.{field}": each for field, each in value.items()}
    else:
      fields[name] = value
  return fields


def _place(config: ConfigDict, field: str) -> tuple[ConfigDict, str]:
  """The section of a dotted field, and its name there."""
  section, _, last = field.rpartition(".")
  return (config[section] if section else config), last
