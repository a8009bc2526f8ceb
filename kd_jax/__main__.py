"""The command line: `python -m kd_jax COMMAND ...`, installed as `kd_jax`."""

import importlib
import os
import sys

from kd_jax.registry import did_you_mean

# Command -> what it does; each is a module of `kd_jax.cli` with a `main`.
COMMANDS = {
  "evaluate": "score a model on a test set",
  "predict": "name the most probable classes of images",
  "export": "write a student as a model that stands alone",
  "convert": "turn foreign weights into an export",
  "report": "write tables and figures of finished runs",
  "results": "gather what is worth keeping of finished runs",
}


def main() -> None:
  """Runs the command that the first argument names."""
  command, *rest = sys.argv[1:] or ["--help"]
  if command in ("-h", "--help"):
    print("usage: kd_jax COMMAND ...\n")
    for name, what in COMMANDS.items():
      print(f"  {name:<10}{what}")
    print("\n`kd_jax COMMAND --help` lists the command's options.")
    return
  if command not in COMMANDS:
    hint = did_you_mean(command, COMMANDS)
    print(
      f"kd_jax: no command {command!r}.{hint} The commands are:"
      f" {', '.join(COMMANDS)}",
      file=sys.stderr,
    )
    sys.exit(2)
  sys.argv = [f"{sys.argv[0]} {command}", *rest]
  # Flax promotes ranks, which the user's environment may forbid.
  os.environ["JAX_NUMPY_RANK_PROMOTION"] = "allow"
  importlib.import_module(f"kd_jax.cli.{command}").main()


if __name__ == "__main__":
  main()
