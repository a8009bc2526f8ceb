"""Writes a model as a folder, a state dict or a StableHLO program."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.interop import card as card_lib
from kd_jax.interop import files, simkd_parts, store
from kd_jax.interop import program as program_lib
from kd_jax.interop.model import Model
from kd_jax.models import base, fold

STABLEHLO = ".stablehlo"


def transform(
  model: Model, *, fold_batch_norm: bool = False, dtype: str | None = None
) -> Model:
  """A model that predicts the same, in another form.

  Args:
    model: to change.
    fold_batch_norm: whether to fold BatchNorm into the convolutions; the
      result predicts and teaches, but cannot be trained.
    dtype: "float32" or "bfloat16", of the arithmetic as `config.dtype` is;
      with "bfloat16" the convolutions' kernels are stored so too, and what
      is small or decides the logits (BatchNorm, classifiers) stays float32.

  Returns:
    The model.

  Raises:
    ValueError: if it is folded already, or for another dtype.
  """
  card, variables = dict(model.card), model.variables
  if fold_batch_norm:
    variables = fold.fold(model.network, variables, card["image_shape"])
    card["batch_norm_folded"] = True
  if dtype is not None:
    if dtype not in ("float32", "bfloat16"):
      raise ValueError(
        f"dtype: expected 'float32' or 'bfloat16', got {dtype!r}"
      )
    card["dtype"] = dtype
    variables = jax.tree.map(
      lambda x: np.asarray(x, jnp.dtype(dtype if x.ndim == 4 else x.dtype)),
      variables,
    )
  return Model(card, variables)


def save(model: Model, to: pathlib.Path, *, weights_inside: bool = True) -> str:
  """Writes a model in the form that the target's ending names.

  Args:
    model: to write.
    to: a folder; or a new file that ends in .pth, .pt, .safetensors, .npz
      (state dicts) or .stablehlo (a program).
    weights_inside: of a program: whether the weights are in it, or beside it
      in a .safetensors file.

  Returns:
    What was written, in words.

  Raises:
    ValueError: if the target is taken. Nothing is written then.
    ImportError: if it takes PyTorch and there is none.
  """
  if to.suffix.lower() == STABLEHLO:
    return _save_program(model, to, weights_inside)
  if not weights_inside:
    raise ValueError(
      f"--weights_beside: expected a --to that ends in {STABLEHLO}, got {to}"
    )
  if to.suffix.lower() in files.SUFFIXES:
    files.check_new(to)
    files.write(to, simkd_parts.to_parts(model), card=model.card)
    return f"{card_lib.describe(model.card)}, a state dict"
  store.write(model, to)
  parameters = base.count_parameters(model.variables["params"])
  return f"{card_lib.describe(model.card)}, {parameters:,} parameters"


def _save_program(model: Model, to: pathlib.Path, weights_inside: bool) -> str:
  beside = to.with_suffix(".safetensors")
  targets = [to] if weights_inside else [to, beside]
  for target in targets:
    if target.exists() or target.is_symlink():
      raise ValueError(
        f"{target}: expected a file that does not exist yet. It was not"
        " changed; give another --to"
      )
  program = program_lib.serialize(model, weights_inside=weights_inside)
  to.parent.mkdir(parents=True, exist_ok=True)
  if not weights_inside:
    files.write(beside, {"model": program_lib.flatten(model.variables)})
  temporary = to.with_name(f".{to.name}.tmp")
  temporary.write_bytes(program)
  temporary.rename(to)
  where = "inside" if weights_inside else f"in {beside.name}"
  return (
    f"{card_lib.describe(model.card)}, a StableHLO program with its weights"
    f" {where}"
  )
