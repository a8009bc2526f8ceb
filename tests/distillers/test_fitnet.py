import pytest


def test_an_unknown_hint_layer_is_named(tiny):
  with pytest.raises(
    ValueError, match="the student has no feature 'stage9'; it has stem"
  ):
    tiny.init(tiny.create("fitnet", hint_layer="stage9"))
