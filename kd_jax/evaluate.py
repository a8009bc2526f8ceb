"""Evaluates an exported model on a test set.

python -m kd_jax.evaluate --model DIR --data cifar100 --data_dir ../data
"""

import argparse
from typing import Any

import jax
import numpy as np

from kd_jax import data, export, metrics, setup, train_step


def evaluate(
  model: export.ExportedModel, source: data.Source, *, batch_size: int = 500
) -> dict[str, Any]:
  """Scores a model; every example counts once.

  Args:
    model: an exported model.
    source: the test set.
    batch_size: images at a time.

  Returns:
    "top1" and "top5" in percent, "ce" in nats, "examples".

  Raises:
    ValueError: if the images or classes are not those of the model.
  """
  card = model.card
  for what, expected, got in (
    ("classes", card["num_classes"], source.num_classes),
    ("image shape", card["image_shape"], list(source.images.shape[1:])),
  ):
    if expected != got:
      raise ValueError(
        f"{what}: the model takes {expected}, {source.name} has {got}."
        f" It was trained on {card['trained_on']}; choose data like it"
      )
  xs = data.eval_batches(source, batch_size)
  score = jax.jit(train_step.prediction_sums)
  sums = [
    jax.device_get(score(model.logits(image), label, mask))
    for image, label, mask in zip(
      xs["image"], xs["label"], xs["mask"], strict=True
    )
  ]
  stacked = {name: np.stack([s[name] for s in sums]) for name in sums[0]}
  return {**metrics.means(stacked), "examples": len(source.labels)}


def main() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="python -m kd_jax.evaluate",
    description="Prints top-1, top-5 and cross-entropy of an exported model.",
  )
  parser.add_argument(
    "--model", required=True, help="an export, or a finished run's workdir"
  )
  parser.add_argument(
    "--data", help="name of the data set (default: what it was trained on)"
  )
  parser.add_argument("--data_dir", default="../data", help="its folder")
  parser.add_argument("--split", default="test", choices=("test", "train"))
  parser.add_argument("--batch_size", type=int, default=500)
  args = parser.parse_args()
  setup.configure_logging()
  try:
    model = export.load(args.model)
    trained_on = model.card["trained_on"]
    name = args.data or trained_on
    options = model.card["data_options"] if name == trained_on else {}
    source = data.load(name, split=args.split, dir=args.data_dir, **options)
    scores = evaluate(model, source, batch_size=args.batch_size)
  except (ValueError, ImportError) as error:
    parser.exit(2, f"{error}\n")
  print(
    f"{model.card['architecture']} on {name} ({args.split},"
    f" {scores['examples']} images): top-1 {scores['top1']:.2f} %, top-5"
    f" {scores['top5']:.2f} %, cross-entropy {scores['ce']:.4f}"
  )


if __name__ == "__main__":
  main()
