"""Changed files are read as they are, or refused in one line that names it."""

import hypothesis
import pytest
from hypothesis import strategies as st

from scripts import fuzz


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_a_changed_file_is_read_or_refused_in_one_line(name, tmp_path):
  target = fuzz.TARGETS[name]
  content, path = target.make(), tmp_path / target.file
  valid = fuzz.expected(target, tmp_path)
  assert fuzz.outcome(target, path, valid) == ("same", "")

  @hypothesis.settings(max_examples=target.examples)
  @hypothesis.given(st.randoms(use_true_random=False))
  def check(rng):
    path.write_bytes(fuzz.MUTATIONS[target.kind](rng, content))
    result, text = fuzz.outcome(target, path, valid)
    assert result != "crash", text

  check()
