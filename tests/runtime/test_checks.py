"""Whatever users hand over as an observation's values: the right numbers, or one line that says what is wrong."""

from __future__ import annotations

import array as standard_array
import fractions
import subprocess
import sys
import time
import timeit
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from duq.runtime import checks
from duq.runtime.errors import ObservationError
from duq.runtime.observations import load_observations, save_observations
from duq.runtime.preprocess import Preprocessor
from tests.support.observations import CONFIG, bare_observation

VALUES = [-1.5, 0.0, 0.25, 3.0]  # exact in every float type here


class Interface:
    """An array of another library: only __array__."""

    def __init__(self, data):
        self.data = np.asarray(data)

    def __array__(self, dtype=None, copy=None):
        return self.data


class Dlpack:
    """An array of another library: only DLPack."""

    def __init__(self, data):
        self._data = torch.tensor(data)

    def __dlpack__(self, **options):
        return self._data.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._data.__dlpack_device__()


def strided(values) -> np.ndarray:
    return np.repeat(np.array(values), 3)[::3]


FORMS = {
    "float64": np.array(VALUES),
    "float32": np.array(VALUES, np.float32),
    "float16": np.array(VALUES, np.float16),
    "longdouble": np.array(VALUES, np.longdouble),
    "big endian": np.array(VALUES, ">f4"),
    "little endian": np.array(VALUES, "<f8"),
    "strided": strided(VALUES),
    "reversed": np.array(VALUES[::-1])[::-1],
    "broadcast row": np.array([VALUES] * 2).T[:, 0],
    "unaligned": np.frombuffer(b"x" + np.array(VALUES).tobytes(), np.uint8)[1:].view("V8").view(np.float64)
    if np.lib.NumpyVersion(np.__version__) >= "1.23.0"
    else np.array(VALUES),
    "read only": np.frombuffer(np.array(VALUES, np.float32).tobytes(), np.float32),
    "unmasked": np.ma.array(VALUES, mask=False),
    "subclass": np.array(VALUES).view(type("Sub", (np.ndarray,), {})),
    "list": list(VALUES),
    "tuple": tuple(VALUES),
    "mixed list": [-1.5, 0, np.float32(0.25), np.int8(3)],
    "list of 0-d arrays": [np.array(value) for value in VALUES],
    "list of tensors": [torch.tensor(value, dtype=torch.bfloat16, requires_grad=True) for value in VALUES],
    "torch float32": torch.tensor(VALUES),
    "torch float64": torch.tensor(VALUES, dtype=torch.float64),
    "torch float16": torch.tensor(VALUES, dtype=torch.float16),
    "torch bfloat16": torch.tensor(VALUES, dtype=torch.bfloat16),
    "torch float8": torch.tensor(VALUES).to(torch.float8_e4m3fn),
    "torch with grad": torch.tensor(VALUES, requires_grad=True),
    "torch bfloat16 with grad": torch.tensor(VALUES, dtype=torch.bfloat16, requires_grad=True),
    "torch result": torch.tensor(VALUES, requires_grad=True) * 1,
    "torch parameter": torch.nn.Parameter(torch.tensor(VALUES)),
    "torch strided": torch.tensor([VALUES] * 2).T[:, 0],
    "torch negated view": torch.tensor([complex(0, -value) for value in VALUES]).conj().imag,
    "ml_dtypes bfloat16": np.array(VALUES, ml_dtypes.bfloat16),
    "ml_dtypes float8": np.array(VALUES, ml_dtypes.float8_e4m3fn),
    "__array__": Interface(VALUES),
    "__array__ of bfloat16": Interface(np.array(VALUES, ml_dtypes.bfloat16)),
    "__dlpack__": Dlpack(VALUES),
    "array.array": standard_array.array("d", VALUES),
    "memoryview": memoryview(np.array(VALUES)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_vector(form):
    found = checks.vector({"state": FORMS[form]}, "state", 4)
    assert found.dtype == np.float64 and found.dtype.isnative and found.tolist() == VALUES
    assert checks.array(FORMS[form], "state").dtype.kind == "f"


INTEGERS = {
    **{kind: np.array([0, 1, 100], kind) for kind in ("i1", "u1", "i2", ">i4", "u4", "i8", "u8")},
    "list": [0, 1, 100],
    "range": range(0, 101, 50),
    "torch": torch.tensor([0, 1, 100]),
    "torch uint8": torch.tensor([0, 1, 100], dtype=torch.uint8),
    "torch uint16": torch.tensor([0, 1, 100], dtype=torch.uint16),
}  # fmt: skip


@pytest.mark.parametrize("form", INTEGERS)
def test_integers_are_numbers(form):
    found = checks.vector({"state": INTEGERS[form]}, "state", 3)
    assert found.dtype == np.float64 and found[[0, 2]].tolist() == [0.0, 100.0]


@pytest.mark.parametrize(
    "value", [True, np.True_, [True], torch.tensor([True]), np.ones(1, bool), 1, 1.0, np.float16(1), np.array(1)]
)
def test_one_number_is_a_vector_of_one(value):
    assert checks.vector({"grip": value}, "grip", 1).tolist() == [1.0]


def test_jax_arrays():
    jax = pytest.importorskip("jax")
    for kind in (np.float32, ml_dtypes.bfloat16, np.float16):
        assert checks.vector({"state": jax.numpy.array(VALUES, kind)}, "state", 4).tolist() == VALUES
    assert checks.vector({"state": jax.numpy.arange(3)}, "state", 3).tolist() == [0, 1, 2]


SELF = []
SELF.append(SELF)
REFUSED = {
    "None": (None, "is a NoneType"),
    "text": ("1 2 3 4", "is a str"),
    "bytes": (b"1234", "is a bytes"),
    "dict": ({"a": 1}, "is a dict"),
    "set": ({1, 2}, "is a set"),
    "function": (len, "is a builtin_function_or_method"),
    "generator": ((value for value in VALUES), "is a generator"),
    "complex": (np.zeros(4, complex), "has dtype complex128"),
    "complex number": (1j, "is a complex"),
    "complex list": ([1j, 1, 1, 1], "is a complex"),
    "torch complex": (torch.zeros(4, dtype=torch.complex64), "is a Tensor of torch.complex64"),
    "objects": (np.array([1.0, 2.0, 3.0, 4.0], object), "has dtype object"),
    "fractions": ([fractions.Fraction(1, 2)] * 4, "is a Fraction"),
    "strings": (np.array(["1.0"] * 4), "has dtype <U3"),
    "list of strings": (["1.0"] * 4, "is a str"),
    "dates": (np.zeros(4, "M8[s]"), "has dtype datetime64"),
    "differences of dates": (np.zeros(4, "m8[s]"), "has dtype timedelta64"),
    "record": (np.zeros(4, [("x", "f4")]), "has dtype .*x"),
    "raw": (np.zeros(4, "V8"), "has dtype .*V8"),
    "ragged": ([[1.0], [1.0, 2.0]], "is a list that cannot be read"),
    "ragged arrays": ([np.zeros(2), np.zeros(3)], "is a list that cannot be read"),
    "list with None": ([1.0, None, 1.0, 1.0], "is a NoneType"),
    "too large": ([2**70, 0, 0, 0], "is a list, expected"),
    "itself": (SELF, "is a list that cannot be read"),
    "masked": (np.ma.array(VALUES, mask=[0, 1, 0, 0]), "1 masked values"),
    "masked in a list": ([np.ma.masked, 1.0, 1.0, 1.0], "1 masked values"),
    "no values": (torch.empty(4, device="meta"), "is a Tensor of torch.float32 that cannot be read"),
    "sparse": (torch.eye(4).to_sparse(), "is a Tensor of torch.float32 that cannot be read"),
    "array that fails": (type("Broken", (), {"__array__": lambda *a, **k: 1 / 0})(), r"is a Broken that cannot be read"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_no_number_is_refused_in_one_line(form):
    value, message = REFUSED[form]
    with pytest.raises(ObservationError, match=f"^state: .*{message}") as error:
        checks.vector({"state": value}, "state", 4)
    assert "\n" not in str(error.value) and "expected" in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("form", [list, np.array, torch.tensor, lambda v: torch.tensor(v, dtype=torch.bfloat16)])
def test_what_is_not_finite_is_refused(form, value):
    with pytest.raises(ObservationError, match="state: is not finite at index 2"):
        checks.vector({"state": form([0.0, 1.0, value])}, "state", 3)


shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
numbers = st.booleans() | st.integers() | st.floats() | st.complex_numbers()
arrays = hnp.arrays(hnp.scalar_dtypes() | st.just(np.dtype(object)), shapes)
junk = st.recursive(
    st.none() | numbers | st.text(max_size=3) | st.binary(max_size=3) | arrays,
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=6,
)
finite = hnp.arrays(hnp.floating_dtypes(endianness="?", sizes=(16, 32, 64)), 4, elements=st.floats(-4, 4, width=16))


@settings(max_examples=150, deadline=None)
@given(junk)
def test_anything_is_read_or_refused(value):
    """By every reader; nothing but an ObservationError in one line that names the key."""
    readers = {
        "state": lambda: checks.vector({"state": value}, "state", 2),
        "camera": lambda: checks.image(value, "camera", "any"),
        "prompt": lambda: checks.text(value, "prompt"),
        "mask": lambda: checks.array(value, "mask", "one bool"),
    }
    for key, read in readers.items():
        try:
            found = read()
        except ObservationError as error:
            assert str(error).startswith(f"{key}: ") and "\n" not in str(error)
        else:
            assert isinstance(found, str if key == "prompt" else np.ndarray)
            assert key != "state" or found.dtype == np.float64 and np.isfinite(found).all()


@settings(max_examples=100, deadline=None)
@given(finite, st.booleans())
def test_values_do_not_depend_on_the_form(values, backwards):
    values = values[::-1] if backwards else values
    expected = [float(value) for value in values]
    for form in (values, values.tolist(), list(values), tuple(values), torch.tensor(expected, dtype=torch.float64)):
        assert checks.vector({"state": form}, "state", 4).tolist() == expected


# --- images ----------------------------------------------------------------------------------------------------------

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


IMAGES = {
    "uint8": PIXELS,
    "fortran": np.asfortranarray(PIXELS),
    "flipped twice": PIXELS[::-1].copy()[::-1],
    "PIL": Image.fromarray(PIXELS),
    "torch": torch.from_numpy(PIXELS),
    "torch, channels last": torch.from_numpy(PIXELS.transpose(2, 0, 1).copy()).permute(1, 2, 0),
    "int64": PIXELS.astype(np.int64),
    "big endian uint16": PIXELS.astype(">u2"),
    "torch int32": torch.from_numpy(PIXELS.astype(np.int32)),
    "lists": PIXELS.tolist(),
    "list of rows": list(PIXELS),
    "__array__": Interface(PIXELS),
}


@pytest.mark.parametrize("form", IMAGES)
def test_every_form_of_an_image(form):
    for layout in ("HWC", "any"):
        found = checks.image(IMAGES[form], "camera", layout)
        assert found.dtype == np.uint8 and np.array_equal(found, PIXELS)
    observation = bare_observation(image={"base_0_rgb": IMAGES[form]}, image_mask=None)
    expected = Preprocessor(CONFIG).model_inputs(bare_observation(image={"base_0_rgb": PIXELS}, image_mask=None))
    assert np.array_equal(Preprocessor(CONFIG).model_inputs(observation).images, expected.images)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, ">f4"])
def test_floats_are_openpi_s(kind):
    values = np.linspace(0, 1, 105).reshape(5, 7, 3).astype(kind)
    native = values.astype(np.dtype(kind).newbyteorder("="))
    assert np.array_equal(checks.image(values, "camera", "HWC"), (255 * native).astype(np.uint8))
    assert np.array_equal(checks.image(torch.tensor(native), "camera", "HWC"), (255 * native).astype(np.uint8))
    moved = torch.tensor(native.transpose(2, 0, 1), requires_grad=True)
    assert np.array_equal(checks.image(moved, "camera", "CHW"), (255 * native).astype(np.uint8))


BAD_IMAGES = {
    "RGBA": (np.zeros((5, 7, 4), np.uint8), r"shape \[5, 7, 4\], expected \[H, W, 3\]; 4 channels: RGBA\?"),
    "RGBA first": (np.zeros((4, 5, 7), np.uint8), "4 channels: RGBA"),
    "gray": (np.zeros((5, 7), np.uint8), r"shape \[5, 7\], expected \[H, W, 3\]; grayscale\?"),
    "gray with an axis": (np.zeros((5, 7, 1), np.uint8), "1 channel: grayscale"),
    "batch": (np.zeros((1, 5, 7, 3), np.uint8), r"shape \[1, 5, 7, 3\], expected \[H, W, 3\]; a batch"),
    "PIL RGBA": (Image.new("RGBA", (7, 5)), r"PIL image of mode RGBA, expected RGB; pass image.convert\('RGB'\)"),
    "PIL gray": (Image.new("L", (7, 5)), "PIL image of mode L"),
    "PIL palette": (Image.new("P", (7, 5)), "PIL image of mode P"),
    "PIL HSV": (Image.new("HSV", (7, 5)), "PIL image of mode HSV"),
    "PIL YCbCr": (Image.new("YCbCr", (7, 5)), "PIL image of mode YCbCr"),
    "int16 beyond": (np.full((5, 7, 3), 256, np.int16), "dtype int16 with values from 256 to 256, expected uint8; scale"),
    "negative": (np.full((5, 7, 3), -1), "dtype int64 with values from -1 to -1"),
    "bool": (np.zeros((5, 7, 3), bool), "dtype bool, expected uint8"),
    "float beyond": (np.full((5, 7, 3), 1.5), r"floating-point image must lie in \[0, 1\]"),
    "NaN": (np.full((5, 7, 3), np.nan), "floating-point image must lie in"),
    "path": ("camera.png", "is a str"),
    "encoded": (b"\x89PNG", "is a bytes"),
    "None": (None, "is a NoneType"),
}


@pytest.mark.parametrize("form", BAD_IMAGES)
def test_what_is_no_image_is_refused_in_one_line(form):
    value, message = BAD_IMAGES[form]
    with pytest.raises(ObservationError, match=f"^camera: .*{message}") as error:
        checks.image(value, "camera", "any")
    assert "\n" not in str(error.value)
    with pytest.raises(ObservationError, match="^image/base_0_rgb: "):
        Preprocessor(CONFIG).model_inputs(bare_observation(image={"base_0_rgb": value}, image_mask=None))


# --- tokens, masks and prompts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [
    [3, 4, 5], (3, 4, 5), np.array([3, 4, 5], ">i2"), torch.tensor([3, 4, 5]), np.array([3, 4, 5], np.uint64),
])  # fmt: skip
@pytest.mark.parametrize("mask", [[True, True, False], torch.tensor([True, True, False]), np.array([1, 1, 0], bool)])
def test_tokens_in_every_form(ids, mask):
    inputs = Preprocessor(CONFIG).model_inputs(bare_observation(tokenized_prompt=ids, tokenized_prompt_mask=mask))
    assert inputs.tokens[:3].tolist() == [3, 4, 0] and inputs.token_mask[:3].tolist() == [True, True, False]


@pytest.mark.parametrize("changes, message", [
    ({"tokenized_prompt": ["pick", "up"]}, "^tokenized_prompt: is a str, expected integers"),
    ({"tokenized_prompt": "pick up"}, "^tokenized_prompt: is a str, expected integers"),
    ({"tokenized_prompt_mask": "yes"}, "^tokenized_prompt_mask: is a str, expected bools"),
    ({"image_mask": {"base_0_rgb": "yes"}}, "^image_mask/base_0_rgb: is a str, expected one bool"),
    ({"image_mask": {"base_0_rgb": None}}, "^image_mask/base_0_rgb: is a NoneType, expected one bool"),
    ({"image_mask": {"base_0_rgb": torch.ones(2, dtype=torch.bool)}}, "^image_mask/base_0_rgb: is bool of shape .2."),
    ({"state": [[1.0], [1.0, 2.0]]}, "^state: is a list that cannot be read"),
])  # fmt: skip
def test_other_inputs_are_refused_in_one_line(changes, message):
    with pytest.raises(ObservationError, match=message):
        Preprocessor(CONFIG).model_inputs(bare_observation(**changes))


@pytest.mark.parametrize(
    "flag", [True, np.True_, np.array(True), np.array([True]), torch.tensor(True), torch.tensor([[True]]), [True]]
)
def test_masks_in_every_form(flag):
    observation = bare_observation(image_mask={"base_0_rgb": flag, "left_wrist_0_rgb": torch.tensor(False)})
    assert Preprocessor(CONFIG).model_inputs(observation).image_mask.tolist() == [True, False, True]


@pytest.mark.parametrize("prompt", [
    "öffne", "öffne".encode(), bytearray("öffne".encode()), memoryview("öffne".encode()), np.bytes_("öffne".encode()),
    np.str_("öffne"), np.array("öffne"), np.array(["öffne"]), np.array([["öffne"]], object), ["öffne"], ("öffne",),
    [np.array("öffne".encode())],
])  # fmt: skip
def test_prompts_in_every_form(prompt):
    found = checks.text(prompt, "prompt")
    assert found == "öffne" and type(found) is str


@pytest.mark.parametrize("prompt, message", [
    (3, "is a int, expected a str"), (None, "is a NoneType"), ([], "is a list of 0, expected one str"),
    (["a", "b"], "is a list of 2"), (np.array(["a", "b"]), "is a ndarray of 2"), (np.zeros(1), "is a float"),
    (b"\xff\xfe", "is no UTF-8 text"), ("\ud800", "is no UTF-8"),
    ({"text": "a"}, "is a dict"), (SELF, "is a list"), (np.array("2020", "M8[s]"), "is a datetime"),
])  # fmt: skip
def test_what_is_no_prompt_is_refused_in_one_line(prompt, message):
    with pytest.raises(ObservationError, match=f"^prompt: {message}") as error:
        checks.text(prompt, "prompt")
    assert "\n" not in str(error.value)


def test_observations_of_any_form_are_saved(tmp_path):
    state = torch.tensor(VALUES, dtype=torch.bfloat16, requires_grad=True)
    observation = {"state": state, "image": {"base": Image.fromarray(PIXELS)}, "prompt": "öffne"}
    save_observations(tmp_path / "set.npz", [observation])
    (found,) = load_observations(tmp_path / "set.npz")
    assert found["state"].tolist() == VALUES and np.array_equal(found["image"]["base"], PIXELS)
    assert found["prompt"] == "öffne"


# --- cost ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [PIXELS, np.zeros(8, np.float32)])
def test_ordinary_arrays_come_back_as_they_are_in_no_time(value):
    assert checks.array(value, "key") is value
    calls = 2000
    assert min(timeit.repeat(lambda: checks.array(value, "key"), number=calls, repeat=5)) / calls < 2e-6


def test_no_library_is_imported(tmp_path):
    code = (
        "import numpy as np, sys; from runtime import checks; checks.array([1, 2.0], 'x'); "
        "checks.vector({'x': np.zeros(2)}, 'x', 2); checks.image(np.zeros((2, 2, 3), 'u1'), 'x', 'HWC'); "
        "print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "duq.runtime.checks" in loaded and not {"torch", "jax"} & set(loaded)


# --- values that claim more than there is, and values that fight back --------------------------------------------------


class Hostile:
    """Fails wherever it is asked."""

    shape = dtype = getbands = mode = property(lambda self: 1 / 0)

    def __array__(self, dtype=None, copy=None):
        raise OSError("the camera is gone")


class Endless:
    """A sequence of a length that nobody waits for."""

    def __len__(self):
        return 1 << 50

    def __getitem__(self, index):
        return 1.0


def shared(levels: int, width: int = 1000, value: object = 0.0) -> list:
    """A list of one inner list many times, and so on: width ** levels values in no memory."""
    for _ in range(levels):
        value = [value] * width
    return value


HUGE = {
    "float32": np.broadcast_to(np.float32(1), (1 << 20, 1 << 20)),
    "big endian": np.broadcast_to(np.array(1, ">f4"), (1 << 20, 1 << 20)),
    "bfloat16": np.broadcast_to(np.array(1, ml_dtypes.bfloat16), (1 << 20, 1 << 20)),
    "zero strides by hand": np.lib.stride_tricks.as_strided(np.zeros(1), (1 << 40,), (0,)),
    "torch": torch.ones(1).expand(1 << 20, 1 << 20),
    "torch bfloat16": torch.ones(1, dtype=torch.bfloat16).expand(1 << 20, 1 << 20),
    "range": range(1 << 50),
    "sequence": Endless(),
    "list of views": [np.broadcast_to(np.float32(1), (1 << 16,))] * 100000,
    "list of a view": [np.broadcast_to(np.float32(1), (1 << 20, 1 << 20))],
    "list of lists": shared(6),
    "list of lists and arrays": [shared(3), [np.zeros(1)]],
    "list of pairs of pairs": shared(60, 2),
    "pairs of arrays": shared(60, 2, np.zeros(2)),
    "pairs of lists of numbers and arrays": shared(60, 2, (1, np.zeros(2))),
}


@pytest.mark.parametrize("form", HUGE)
def test_what_claims_more_numbers_than_can_be_is_refused_before_it_is_copied(form):
    start = time.perf_counter()
    for read in (
        lambda: checks.vector({"state": HUGE[form]}, "state", 32),
        lambda: checks.image(HUGE[form], "state", "any"),
        lambda: checks.array(HUGE[form], "state", "one bool", 1),
    ):
        tracemalloc.start()
        try:
            with pytest.raises(ObservationError, match="^state: .*(more than|too many)") as error:
                read()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 600 << 20 and len(str(error.value)) < 300
    assert time.perf_counter() - start < 5  # in all: a value is looked at once, however often it is there


@pytest.mark.parametrize("value", [Hostile(), [Hostile()], [1.0, Hostile()], (Hostile(), np.zeros(3))])
def test_a_value_that_raises_is_refused_in_one_line(value):
    for read in (lambda: checks.vector({"x": value}, "x", 3), lambda: checks.image(value, "x", "HWC")):
        with pytest.raises(ObservationError, match="^x: is a .* that cannot be read") as error:
            read()
        assert "\n" not in str(error.value)


class Locked(dict):
    """A mapping of the user's own that fails when it is read."""

    def items(self):
        raise RuntimeError("locked")

    keys = __iter__ = items


@pytest.mark.parametrize("value", [None, [], "image", np.array([{}], object), 3, Locked(), {"image": Locked(a=1)}])
def test_what_is_no_observation_is_refused(value):
    with pytest.raises(ObservationError, match="^an observation is a dict, got"):
        Preprocessor(CONFIG).model_inputs(value)


@pytest.mark.parametrize("key", [3, ("a", "b"), None, "\ud800", "\0" * (1 << 20), b"base", np.str_("x"), float("nan")])
@pytest.mark.parametrize("outer", ["image", "image_mask"])
def test_keys_of_any_type_are_named_briefly(key, outer):
    observation = bare_observation()
    with pytest.raises(ObservationError, match="^image: unknown slot") as error:
        Preprocessor(CONFIG).model_inputs(
            observation | {outer: observation[outer] | {key: observation["image"]["base_0_rgb"]}}
        )
    str(error.value).encode()
    assert len(str(error.value)) < 250
    with pytest.raises(ObservationError, match="^observation lacks 'state'; it has ") as error:
        Preprocessor(CONFIG).model_inputs(
            {**{f"{i}" * 1000: 0 for i in range(1000)}, key: 0, "image": observation["image"]}
        )
    assert len(str(error.value)) < 1200


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300, -1e300, 1e16, np.longdouble("1e4000"), -1e16])
def test_numbers_that_float32_arithmetic_does_not_survive_are_none(value):
    values = np.zeros((2, 3), type(value) if isinstance(value, np.longdouble) else np.float64)
    values[1, 2] = value
    with pytest.raises(
        ObservationError, match=r"^x: is .* at index 1, 2; the model takes finite numbers of at most 1e\+15"
    ):
        checks.moderate(values, "x")
    assert np.array_equal(checks.moderate(np.array([1e15, -1e15, 0]), "x"), np.array([1e15, -1e15, 0], np.float32))
