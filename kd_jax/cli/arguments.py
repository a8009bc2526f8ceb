"""Arguments and error handling that several commands share."""

import argparse
import contextlib
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from kd_jax import data, storage
from kd_jax.runs import logs


def add_model_arguments(
  parser: argparse.ArgumentParser, choice: Any = None
) -> None:
  """Add --model and --model_name: what to open.

  Args:
    parser: to add them to.
    choice: group of which --model is one; None: --model is required.
  """
  (choice or parser).add_argument(
    "--model",
    required=choice is None,
    type=path,
    help="an export, a finished run's workdir, or a file of weights",
  )
  parser.add_argument(
    "--model_name",
    help="network of a file of weights (default: the one that fits), or the"
    " package.module:attribute of your own network",
  )


def add_target_argument(parser: argparse.ArgumentParser) -> None:
  """Add --to: what to write."""
  parser.add_argument(
    "--to",
    required=True,
    type=path,
    help="folder to write, or new file: .pth, .safetensors, .npz (state dicts)"
    " or .stablehlo (a program)",
  )


def add_origin_arguments(parser: argparse.ArgumentParser) -> None:
  """Add --data and --image_size: what a file of weights was trained on."""
  parser.add_argument(
    "--data",
    help="data that a file of weights was trained on: cifar10, cifar100,"
    " imagenet, ... (default: as its classes suggest)",
  )
  parser.add_argument(
    "--image_size", type=positive, help="pixels (default: those of the data)"
  )


def path(text: str) -> pathlib.Path:
  """Parse a path, an argument's type; a leading `~` is the home folder."""
  try:
    return storage.user_path(text, "path")
  except ValueError as error:
    raise argparse.ArgumentTypeError(str(error)) from error


def positive(text: str) -> int:
  """Parse a number of 1 or more, an argument's type."""
  number = int(text)
  if number < 1:
    raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
  return number


@contextlib.contextmanager
def exit_on_error(parser: argparse.ArgumentParser) -> Iterator[None]:
  """Show the package's log, and errors as one line.

  The code is 1 if something could not be written, else 2.
  """
  logs.configure_logging()
  try:
    yield
    sys.stdout.flush()
  except (ValueError, ImportError, data.UnreadableError) as error:
    parser.exit(2, f"{error}\n")
  except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
    parser.exit(2, f"{error}\n")
  except BrokenPipeError:  # of `| head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)
  except OSError as error:
    parser.exit(
      1,
      f"{error}. Make room, or name another folder; the same"
      " command works then\n",
    )
