"""A file may describe data, and nothing else."""

import io
import os
import pickle

import numpy as np
import pytest

from kd_jax.data import safe_pickle

ARRAY = np.arange(24, dtype=np.uint8).reshape(4, 6)


def read(content: bytes) -> dict:
  return safe_pickle.load(content, "some/file")


@pytest.mark.parametrize("protocol", [0, 2, 3, 4])
def test_reads_plain_data_of_every_protocol(protocol):
  value = {b"data": ARRAY, "labels": [1, 2], "text": ["a", b"b"], "x": 0.5}
  got = read(pickle.dumps(value, protocol))
  array = got.pop("data")
  np.testing.assert_array_equal(array, ARRAY)
  assert array.dtype == np.uint8
  assert got == {"labels": [1, 2], "text": ["a", b"b"], "x": 0.5}


@pytest.mark.parametrize("core", [b"core", b"_core"])
def test_reads_strings_and_arrays_as_python_2_wrote_them(core):
  """numpy's module was renamed with numpy 2."""
  raw = ARRAY.tobytes()
  content = (
    b"\x80\x02}(U\x04datacnumpy." + core + b".multiarray\n_reconstruct\n"
    b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    b"(K\x01K\x04K\x06\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
    b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    b"\x89U" + bytes([len(raw)]) + raw + b"tb"
    b"U\x06labels](K\x05K\x06eU\x04nameU\x03\xe9tau."
  )
  got = read(content)
  np.testing.assert_array_equal(got["data"], ARRAY)
  assert got["labels"] == [5, 6] and got["name"] == b"\xe9ta"


@pytest.mark.parametrize(
  "array",
  [
    np.asfortranarray(ARRAY),
    np.arange(3, dtype=">i4"),
    np.linspace(0, 1, 5),
    np.array([True, False]),
  ],
  ids=["fortran", "big-endian", "float64", "bool"],
)
def test_arrays_keep_order_and_type(array):
  got = read(pickle.dumps({"a": array}, 2))["a"]
  np.testing.assert_array_equal(got, array)
  assert got.dtype == array.dtype


class Call:
  def __init__(self, function, *arguments):
    self.call = (function, arguments)

  def __reduce__(self):
    return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_file_that_calls_a_function_is_refused_and_not_run(
  tmp_path, protocol
):
  target = tmp_path / "made"
  content = pickle.dumps({"data": Call(os.mkdir, str(target))}, protocol)
  with pytest.raises(
    safe_pickle.UnsafePickleError,
    match=rf"some/file is refused: .* {os.mkdir.__module__}\.mkdir,",
  ):
    read(content)
  assert not target.exists()
  pickle.loads(content)  # the attack is a working one
  assert target.exists()


@pytest.mark.parametrize(
  "name", ["builtins.eval", "numpy.load", "numpy.frombuffer", "_codecs.decode"]
)
def test_every_other_global_is_refused(name):
  module, function = name.rsplit(".", 1)
  content = f"c{module}\n{function}\n.".encode()
  with pytest.raises(ValueError, match=rf"refused.*{name}"):
    read(content)


@pytest.mark.parametrize(
  "value",
  [
    # numpy makes an array of object pointers from these bytes.
    Call(np.ndarray, (1,), np.dtype("O"), b"A" * 8),
    np.array([None, {}], object),
    np.zeros(2, [("a", "u1"), ("b", "u1")]),
    np.array(["text"]),
  ],
  ids=["pointers", "objects", "record", "text"],
)
def test_arrays_of_anything_but_numbers_are_refused(value):
  with pytest.raises(ValueError, match=r"cut short or damaged.*TypeError"):
    read(pickle.dumps({"data": value}, 2))


def test_only_latin1_is_decoded():
  content = b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00zip"
  with pytest.raises(ValueError, match="'zip', not 'latin1'"):
    read(content + b"\x86R.")


def test_one_text_encoded_again_and_again_is_refused():
  text = b"\x80\x02X\x00\x10\x00\x00" + b"a" * 4096 + b"q\x00"
  again = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R"
  with pytest.raises(ValueError, match="more text than the file has"):
    read(text + b"](" + again * 100 + b"e.")


def test_damage_is_reported():
  content = pickle.dumps({"data": ARRAY, "labels": [1, 2, 3]}, 2)
  for length in range(len(content)):
    with pytest.raises(ValueError, match="some/file is cut short or damaged"):
      read(content[:length])
  shape, wrong = b"K\x04K\x06\x86", b"K\x07K\x06\x86"
  assert content.count(shape) == 1
  with pytest.raises(ValueError, match=r"damaged.*cannot reshape"):
    read(content.replace(shape, wrong))
  with pytest.raises(ValueError, match="must hold a dict, got list"):
    read(pickle.dumps([1, 2], 2))


def nested(levels):
  return b"]" * levels + b"a" * (levels - 1) + b"."


SHARED = b"}q\x00." + b"".join(
  b"}q" + bytes([i]) + b"(K\x00h" + bytes([i - 1]) + b"K\x01h" + bytes([i - 1])
  + b"u" for i in range(1, 30)
) + b"."  # fmt: skip


@pytest.mark.parametrize(
  ("content", "words"),
  [
    (nested(100_000), "more than 64 levels"),
    (b"]r\x00\x00\x00\x10.", "puts to place 268,435,456 of its memo"),
    (SHARED.replace(b"q\x00.", b"q\x00", 1), "more than 10,000,000 objects"),
    (b"N0" * 2_000_001 + b".", "more than 2,000,000 steps"),
    (b"]q\x00h\x00]a.", "changes an object that is shared"),
    (b"h\x00.", "gets from place 0"),
    (b"a.", "takes from an empty stack"),
    (b"t.", "without the mark"),
    (b"X\xff\xff\xff\x7fa.", "remain"),
    (b"]", "exhausted"),
  ],
)
def test_scan_refuses_what_an_unpickler_would_choke_on(content, words):
  with pytest.raises(ValueError, match=words):
    safe_pickle.scan(io.BytesIO(content))


@pytest.mark.parametrize("protocol", range(6))
def test_scan_passes_what_picklers_write(protocol):
  shared = [1.5, "a", b"b", {1, 2}, frozenset((3,)), None, 2**80]
  content = {"a": shared, "b": (shared, np.float64(1)), "c": list(range(3000))}
  file = io.BytesIO(pickle.dumps(content, protocol) + b"rest")
  found = safe_pickle.scan(file)
  assert any(name.endswith("multiarray.scalar") for name in found.globals)
  assert file.read() == b"rest"
