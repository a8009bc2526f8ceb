from method_cases import STRAYING, Curve, Golden, LossCase, Method, normal

S, T = 3 * normal(0, 2, 4, 7)
METHOD = Method(
  losses={
    "wttm_loss": LossCase(
      (S, T),
      kwargs={"exponent": 0.25},
      refused={"exponent": (0.0, -1.0)},
      minimum=(T / 4, T),
    )
  },
  fields={"exponent": 0.3},
  weights={"ce": 1, "kd": 0, "wttm": 4},
  golden=(Golden(r"wttm_0\.\d", lambda case: {"exponent": case["exponent"]}),),
  curves=(
    Curve(
      "wttm",
      lambda curves: {"exponent": 0.1},
      folder="train_2",
      tolerance=STRAYING,
    ),
  ),
)
