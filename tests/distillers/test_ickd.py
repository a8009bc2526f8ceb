import pytest
from method_cases import Curve, Golden, LossCase, Method, normal

S, T = normal(0, 4, 4, 4, 3), normal(1, 4, 5, 5, 3)
METHOD = Method(
  losses={"ickd_loss": LossCase((S, T), minimum=(S, 2 * S), scale_free=True)},
  fields={"kernel_size": 3},
  weights={"ce": 1, "kd": 0, "ickd": 2.5},
  reference=(("conv", "conv2d"), ("bn", "l2norm")),
  golden=(
    Golden("ickd", prefix=lambda case: "ickd.embed_s.", unused=r"^embed_t\."),
    Golden(
      "ickd_imagenet",
      lambda case: {"kernel_size": 3},
      prefix=lambda case: "embed.",
      # It divides by the batch size twice.
      weights=lambda case: {"ickd": 1 / case["batch"]},
    ),
  ),
  curves=(
    Curve("ickd", folder="train_2", prefix="distiller.embed_s."),
    Curve("ickd", folder="train_2", prefix="distiller.embed_s.", pair=0),
  ),
)


def test_an_even_kernel_would_shift_the_map(tiny):
  with pytest.raises(ValueError, match="expected an odd number, got 2"):
    tiny.shapes(tiny.create("ickd", kernel_size=2))
