from method_cases import Curve, Golden, LossCase, Method, normal

S, T = 3 * normal(0, 2, 4, 7)
METHOD = Method(
  losses={
    "ttm_loss": LossCase(
      (S, T),
      kwargs={"exponent": 0.25},
      refused={"exponent": (0.0, -1.0)},
      minimum=(T / 4, T),
    )
  },
  fields={"exponent": 0.3},
  weights={"ce": 1, "kd": 0, "ttm": 45},
  golden=(Golden(r"ttm_0\.\d", lambda case: {"exponent": case["exponent"]}),),
  curves=(Curve("ttm", lambda curves: {"exponent": 0.1}, folder="train_2"),),
)
