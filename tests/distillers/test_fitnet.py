import pytest
from method_cases import Curve, Golden, LossCase, Method, normal

S, T = normal(0, 2, 4, 4, 4, 3)
METHOD = Method(
  losses={"fitnet_loss": LossCase((S, T), minimum=(T, T))},
  fields={"hint_layer": "stage2"},
  reference=((r"regressor/(de)?conv", "conv"), (r"regressor/bn", "bn")),
  weights={"ce": 1, "kd": 1, "fitnet": 100},
  golden=(
    Golden(
      r"hint_layer\d+",
      lambda case: {"hint_layer": f"stage{case['layer']}"},
      prefix=lambda case: "regressor.",
    ),
  ),
  curve=Curve(
    "hint", lambda curves: {"hint_layer": f"stage{curves['hint_layer']}"}
  ),
)


def test_an_unknown_hint_layer_is_named(tiny):
  with pytest.raises(
    ValueError, match="the student has no feature 'stage9'; it has stem"
  ):
    tiny.init(tiny.create("fitnet", hint_layer="stage9"))
