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
  curves=(
    Curve(
      "hint", lambda curves: {"hint_layer": f"stage{curves['hint_layer']}"}
    ),
  ),
)
