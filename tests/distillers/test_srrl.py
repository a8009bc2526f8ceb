from method_cases import Curve, Golden, LossCase, Method, normal

(F_S, F_T), (Z_S, Z_T) = normal(0, 2, 4, 6), normal(1, 2, 4, 7)
METHOD = Method(
  losses={"srrl_loss": LossCase((F_S, Z_S, F_T, Z_T), minimum=2 * (F_T, Z_T))},
  reference=(("transfer/conv", "transfer.0"), ("transfer/bn", "transfer.1")),
  weights={"ce": 1, "kd": 1, "srrl": 1},
  golden=(Golden("srrl", prefix=lambda case: "srrl."),),
  curves=(Curve("srrl"),),
)
