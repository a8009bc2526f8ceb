"""Forms of a model: folded, in bfloat16, and written by a name's ending."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax import storage
from kd_jax.interop import card as card_lib
from kd_jax.interop import files, simkd_parts, store
from kd_jax.interop import program as program_lib
from kd_jax.interop.model import Model
from kd_jax.models import base, fold

STABLEHLO = ".stablehlo"
# Endings of the files that `save` writes.
ENDINGS = (*files.WRITABLE, STABLEHLO)


def transform(
  model: Model, *, fold_batch_norm: bool = False, dtype: str | None = None
) -> Model:
  """Change a model's form, not its predictions.

  Args:
    model: to change.
    fold_batch_norm: whether to fold BatchNorm into the convolutions; the
      result predicts and teaches, but cannot be trained.
    dtype: of the arithmetic, "float32" or "bfloat16". With "bfloat16" the
      convolutions' kernels are stored so too; BatchNorm and classifiers, which
      are small or decide the logits, stay float32.

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


def check_target(to: pathlib.Path) -> None:
  """Raise ValueError unless `to` is a folder's name or a new, known file's."""
  ending = to.suffix.lower()
  if ending and ending not in ENDINGS:
    raise ValueError(
      f"{to}: expected a folder, whose name has no ending, or a file that ends"
      f" in {', '.join(ENDINGS)}, got {to.suffix!r}"
    )
  if ending:
    files.check_new(to)


def save(model: Model, to: pathlib.Path, *, weights_inside: bool = True) -> str:
  """Write a model in the form that the target's ending names.

  Args:
    model: to write.
    to: a folder, without an ending; or a new file that ends in .pth, .pt,
      .safetensors, .npz (state dicts) or .stablehlo (a program).
    weights_inside: whether a program contains its weights; else they go into a
      .safetensors file beside it.

  Returns:
    A description of what was written.

  Raises:
    ValueError: if the target is taken or has another ending. Nothing is
      written then.
    ImportError: if it needs PyTorch, which is missing.
  """
  check_target(to)
  what, ending = card_lib.describe(model.card), to.suffix.lower()
  if ending == STABLEHLO:
    where = _save_program(model, to, weights_inside)
    return f"{what}, a StableHLO program with its weights {where}"
  if not weights_inside:
    raise ValueError(
      "weights beside the program: expected a target that ends in"
      f" {STABLEHLO}, got {to}"
    )
  if ending:
    files.write(to, simkd_parts.to_parts(model), card=model.card)
    return f"{what}, a state dict"
  store.write(model, to)
  parameters = base.count_parameters(model.variables["params"])
  return f"{what}, {parameters:,} parameters"


def _save_program(model: Model, to: pathlib.Path, weights_inside: bool) -> str:
  """Write a program; says where its weights are."""
  beside = to.with_suffix(".safetensors")
  if not weights_inside:
    files.check_new(beside)
  program = program_lib.serialize(model, weights_inside=weights_inside)
  to.parent.mkdir(parents=True, exist_ok=True)
  if not weights_inside:
    files.write(beside, {"model": program_lib.flat_weights(model.variables)})
  try:
    storage.write_whole(to, program)
  except OSError:
    if not weights_inside:
      beside.unlink()
    raise
  return "inside" if weights_inside else f"in {beside.name}"
