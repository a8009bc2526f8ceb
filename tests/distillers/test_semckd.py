import numpy as np
import pytest


def test_a_batch_that_four_does_not_divide(tiny, make_output):
  student = make_output(0, batch=6)
  teacher = make_output(1, batch=6)
  batch = {"label": np.zeros(6, np.int32)}
  with pytest.raises(
    ValueError, match=r"expected a batch size divisible by 4.*got 6"
  ):
    tiny.init(
      tiny.create("semckd"), student=student, teacher=teacher, batch=batch
    )


def test_the_batch_size_is_part_of_the_architecture(tiny, make_output):
  module = tiny.create("semckd")
  variables = tiny.init(module)
  kernel = variables["params"]["query1"]["linear1"]["kernel"]
  assert kernel.shape == (8, 4)
  sizes = {"widths": (8, 16), "sizes": (8, 8)}
  outputs = {
    "student": make_output(0, batch=4),
    "teacher": make_output(1, batch=4, **sizes),
    "batch": {"label": np.zeros(4, np.int32)},
  }
  with pytest.raises(ValueError, match="batches of 8 examples, got 4"):
    tiny.apply(module, variables, **outputs)
  output, _ = tiny.apply(module, variables, train=False, **outputs)
  assert set(output.terms) == {"ce", "kd"}


def test_every_pair_of_stages_has_a_projector(tiny, make_output):
  teacher = make_output(5, widths=(8, 8, 16), sizes=(8, 4, 2))
  module = tiny.create("semckd")
  variables = tiny.shapes(module, teacher=teacher)
  projectors = [k for k in variables["params"] if k.startswith("project")]
  assert len(projectors) == 2 * 3
