"""Reading an observation: each helper takes one key, checks it and says in one line what is wrong with it."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from duq.runtime.errors import ObservationError

MAX_NESTING = 8  # of one text
MAX_SIZE = 1 << 27  # numbers of one array: an image of 44 megapixels. A view may claim more than there is memory
MAX_LISTED = 1 << 24  # values and lists in a nested list of numbers, each of which has to be looked at
MAX_STACKED = 1 << 17  # the same of arrays, tensors and lists of them, each of which has to be converted
MAX_VECTOR = 1 << 16  # of a state, a mask, or a prompt's tokens
# Of a normalized state or a noise, which are near 1. The model squares what it makes of them, and float32 ends at 3.4e38:
# from 1e19 on a sum of squares is infinite, a norm divides by it, and finite actions come out that do not depend on them.
LARGEST = 1e15
NUMERIC = "biuf"  # kinds of numpy's dtypes
EXPECTED = "numbers in a numpy array, a torch tensor or a list"


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


def shown(value: object) -> str:
    """A key or a name as an error repeats it: its repr, 60 characters of it."""
    return _short.repr(value)


def observation(value: Any) -> dict[Any, Any]:
    """An observation as plain dicts: those in it, which hold its cameras, are copied too; its arrays are not.

    Raises ObservationError if it is no mapping, or one that cannot be read.
    """
    if not isinstance(value, Mapping):
        raise ObservationError(f"an observation is a dict, got {type(value).__name__}")
    try:
        return {key: dict(inner) if isinstance(inner, Mapping) else inner for key, inner in value.items()}
    except Exception as error:  # a mapping of the user's own has its own
        raise ObservationError(
            f"an observation is a dict, got {type(value).__name__} that cannot be read ({_reason(error)})"
        ) from error


def required(observation: Mapping[str, Any], key: str) -> Any:
    """The value of `key`; ObservationError if the observation lacks it."""
    if key not in observation:
        names = [shown(name) for name, _ in zip(observation, range(12), strict=False)]
        more = [f"{len(observation) - len(names)} more"] if len(observation) > len(names) else []
        raise ObservationError(f"observation lacks {key!r}; it has {', '.join(names + more) or 'no keys'}")
    return observation[key]


def mapping(observation: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The nested dict under `key`."""
    value = required(observation, key)
    if not isinstance(value, Mapping):
        raise ObservationError(f"{key}: is a {type(value).__name__}, expected a dict of cameras")
    return value


def array(value: Any, key: str, expected: str = EXPECTED, most: int = MAX_SIZE) -> np.ndarray:
    """Whatever a user hands over as numbers, as a numpy array of booleans, integers or floats in the machine's byte order.

    Takes numpy arrays and scalars of any layout, numbers, nested lists of anything taken here, torch tensors of any device
    and dtype (bfloat16 becomes float32), JAX arrays, PIL images, and all else that has `__array__`, `__dlpack__` or a
    buffer. No library is imported for it, and an ordinary array comes back as it is.
    Raises ObservationError that names the key, what it holds and what is expected (`expected`), for all else: text,
    objects, dates, complex numbers, records, ragged lists, masked values, tensors without values; and, before anything is
    copied, for more than `most` numbers, such as a broadcast view of one has.
    """
    if type(value) is not np.ndarray or value.dtype.kind not in NUMERIC or not value.dtype.isnative:
        try:
            _check_size(value, key, expected, most)
            value = _numbers(value, key, expected, most)
        except ObservationError:
            raise
        except Exception as error:  # each library has its own for what it cannot convert
            raise ObservationError(
                f"{key}: is a {_kind(value)} that cannot be read ({_reason(error)}), expected {expected}"
            ) from error
    _check_size(value, key, expected, most)
    return value


def _numbers(value: Any, key: str, expected: str, most: int) -> np.ndarray:
    """The value as an array of numbers in the machine's byte order; raises whatever its library does."""
    found = _converted(value, key, expected, most)
    if found.dtype.kind not in NUMERIC:
        what = (
            f"has dtype {str(found.dtype)[:60]}" if isinstance(value, (np.ndarray, np.generic)) else f"is a {_kind(value)}"
        )
        raise ObservationError(f"{key}: {what}, expected {expected}")
    return found if found.dtype.isnative else found.astype(found.dtype.newbyteorder("="))


def _converted(value: Any, key: str, expected: str, most: int) -> np.ndarray:
    """The value as a numpy array of some dtype."""
    if isinstance(value, (list, tuple)) and not _all_numbers(value, min(most, MAX_LISTED)):
        return _stacked(value, key, expected, most)
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise ObservationError(f"{key}: is an array with {value.mask.sum()} masked values, expected {expected}")
    if hasattr(value, "detach") and hasattr(value, "cpu"):
        value = _tensor(value)
    if hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
        return np.from_dlpack(value)
    found = np.asarray(value)
    if found.dtype.kind == "V" and found.dtype.type is not np.void:  # ml_dtypes' bfloat16, float8 and int4, as JAX has
        found = found.astype(np.float32)
    return found


def _stacked(values: Iterable[Any], key: str, expected: str, most: int) -> np.ndarray:
    """A list of arrays, tensors or lists of them; numpy itself would drop masks and fail at tensors."""
    arrays: list[np.ndarray] = []
    for value in values:
        arrays.append(array(value, key, expected, most))
        if sum(each.size for each in arrays[:1]) * len(arrays) > most:
            raise ObservationError(f"{key}: is a list of more than {most} numbers, expected {expected}")
    return np.stack(arrays)


def _check_size(value: Any, key: str, expected: str, most: int) -> None:
    """ObservationError if the value says that it has more than `most` numbers."""
    shape = getattr(value, "shape", None)
    if shape is None:
        shape = (len(value),) if hasattr(value, "__len__") and hasattr(value, "__getitem__") else ()
    if math.prod(shape) > most:
        raise ObservationError(f"{key}: has shape {list(shape)[:8]}, more than {most} numbers, expected {expected}")


def _tensor(value: Any) -> np.ndarray:
    """A torch tensor as a numpy array; what numpy has no type for as float32."""
    value = value.detach().cpu()
    try:
        return value.numpy(force=True)  # resolves conjugated and negated views
    except TypeError:
        return value.float().numpy()


def _all_numbers(values: list[Any] | tuple[Any, ...], most: int) -> bool:
    """Whether a nested list holds nothing but Python's and numpy's own numbers. ValueError if it holds more than `most` of
    them and of lists, or more than MAX_STACKED of all else: a list that holds one inner list many times may hold more than can
    ever be looked at."""
    count, plain = _listed(values, most, {})
    if count > (most if plain else MAX_STACKED):
        raise ValueError("too many values")
    return plain


def _listed(values: list[Any] | tuple[Any, ...], most: int, known: dict[int, tuple[int, bool]]) -> tuple[int, bool]:
    """How many values and lists a nested list holds, and whether all are numbers; or more than `most`, where it is more.

    known: of the lists that were looked at, by their id: an inner list is looked at once, and counted as often as it is held.
    """
    kinds, count, plain = set(map(type, values)), len(values), True
    if kinds & {list, tuple}:
        for each in values:
            if isinstance(each, (list, tuple)):
                if id(each) not in known:
                    known[id(each)] = _listed(each, most, known)
                inner, is_plain = known[id(each)]
                count, plain = count + inner, plain and is_plain
                if count > most:
                    break
    numbers = (bool, int, float, np.bool_, np.number)
    mixed = bool(kinds & {list, tuple}) and not kinds <= {list, tuple}
    return count, plain and not mixed and all(issubclass(kind, (list, tuple, *numbers)) for kind in kinds)


def _kind(value: object) -> str:
    """What a value is, for an error: its type, and its dtype if it has one."""
    try:
        dtype = getattr(value, "dtype", None)
        return type(value).__name__[:60] + ("" if dtype is None else f" of {str(dtype)[:60]}")
    except Exception:  # the value's own
        return type(value).__name__[:60]


def _reason(error: Exception) -> str:
    """What a library said, for a line of ours."""
    return " ".join(str(error).split())[:100] or type(error).__name__


def vector(observation: Mapping[str, Any], key: str, size: int) -> np.ndarray:
    """A finite [size] array as float64, from anything that `array` reads; a scalar counts as [1]."""
    value = np.atleast_1d(array(required(observation, key), key, f"{size} {EXPECTED}", MAX_VECTOR))
    if value.shape != (size,):
        raise ObservationError(f"{key}: has shape {list(value.shape)}, expected [{size}]")
    return finite(value.astype(np.float64), key)


def finite(value: np.ndarray, key: str) -> np.ndarray:
    """`value` itself; ObservationError if it holds a NaN or an infinity."""
    bad = np.flatnonzero(~np.isfinite(value))
    if bad.size:
        raise ObservationError(f"{key}: is not finite at index {bad[0]} ({value.flat[bad[0]]})")
    return value


def moderate(values: np.ndarray, key: str) -> np.ndarray:
    """What the model gets, as float32. Raises ObservationError if one of the values is not finite there, or so large that
    the model's own sums of squares would not be (`LARGEST`)."""
    with np.errstate(over="ignore", invalid="ignore"):
        cast = values.astype(np.float32, copy=False)
    if not np.abs(cast).max(initial=0.0) <= LARGEST:  # a NaN fails, too
        index = np.argmin(np.abs(cast) <= LARGEST)
        place = ", ".join(map(str, np.unravel_index(index, cast.shape)))
        raise ObservationError(
            f"{key}: is {values.flat[index]:.3g} at index {place}; the model takes finite numbers of at most {LARGEST:.0e}"
        )
    return cast


def text(value: Any, key: str) -> str:
    """A str, UTF-8 bytes, or one of either in a numpy array, list or tuple."""
    for _ in range(MAX_NESTING):
        if isinstance(value, (str, bytes)) or not isinstance(value, (list, tuple, np.ndarray, np.generic)):
            break
        count = value.size if hasattr(value, "size") else len(value)
        if count != 1:
            raise ObservationError(f"{key}: is a {type(value).__name__} of {count}, expected one str")
        value = value.item() if hasattr(value, "item") else value[0]
    try:
        found = bytes(value).decode() if isinstance(value, (bytes, bytearray, memoryview)) else value
        if isinstance(found, str):
            found.encode()
            return str(found)
    except UnicodeError as error:
        raise ObservationError(f"{key}: is no UTF-8 text ({error})") from error
    raise ObservationError(f"{key}: is a {type(value).__name__}, expected a str")


def image(value: Any, key: str, layout: str, keep_float: bool = False) -> np.ndarray:
    """A camera image as uint8 [H, W, 3], from anything that `array` reads.

    `layout` is "HWC", "CHW", or "any" (channels first if the first axis is 3, as openpi's policies decide). Floating
    point images hold 0..1 and are truncated to 0..255, as openpi does; integers of other widths hold 0..255.
    With `keep_float` floating point images stay, as float32.
    """
    if (mode := pil_mode(value)) not in (None, "RGB"):
        raise ObservationError(f"{key}: is a PIL image of mode {mode}, expected RGB; pass image.convert('RGB')")
    value = array(value, key)
    value = _unit_floats(value, key) if keep_float and value.dtype.kind == "f" else bytes_of(value, key)
    shape = list(value.shape)
    if value.ndim == 3 and (layout == "CHW" or layout == "any" and shape[0] == 3):
        value = value.transpose(1, 2, 0)
    if value.ndim != 3 or value.shape[2] != 3 or 0 in shape:
        expected = "[3, H, W]" if layout == "CHW" else "[H, W, 3]"
        raise ObservationError(f"{key}: has shape {shape}, expected {expected}{_likely(value, layout)}")
    return value


def pil_mode(value: Any) -> str | None:
    """The mode of a PIL image, as its text says it; None for all else."""
    try:
        return str(value.mode) if hasattr(value, "getbands") else None
    except Exception:  # the value's own
        return None


def _unit_floats(value: np.ndarray, key: str) -> np.ndarray:
    return _checked_unit(value, key).astype(np.float32, copy=False)


def _checked_unit(value: np.ndarray, key: str) -> np.ndarray:
    """`value` itself; ObservationError unless all of it lies in [0, 1]."""
    if value.size and not (value.min() >= 0 and value.max() <= 1):  # a NaN fails both
        raise ObservationError(f"{key}: a floating-point image must lie in [0, 1]; pass uint8 for 0..255")
    return value


def bytes_of(value: np.ndarray, key: str) -> np.ndarray:
    """Pixels of any real dtype as uint8."""
    if value.dtype == np.uint8:
        return value
    if value.dtype.kind == "f":
        return (255 * _checked_unit(value, key)).astype(np.uint8)
    if value.dtype.kind == "b":
        raise ObservationError(f"{key}: has dtype bool, expected uint8; a mask is no image")
    if value.size and not (value.min() >= 0 and value.max() <= 255):
        raise ObservationError(
            f"{key}: has dtype {value.dtype} with values from {value.min()} to {value.max()}, expected uint8; scale them "
            "to 0..255 and pass .astype(numpy.uint8)"
        )
    return value.astype(np.uint8)


def _likely(value: np.ndarray, layout: str) -> str:
    """What an image of a wrong shape may be, and what to do."""
    if value.ndim == 2 and 0 not in value.shape:
        return "; grayscale? pass it three times, once a channel"
    if value.ndim == 4:
        return "; a batch? pass one image"
    if value.ndim == 3:
        channels = value.shape[2] if layout == "CHW" else (value.shape[2], value.shape[0])
        for count, fix in ((4, "4 channels: RGBA? drop the last"), (1, "1 channel: grayscale? repeat it to three")):
            if count in np.atleast_1d(channels):
                return f"; {fix}"
        if layout == "HWC" and value.shape[0] == 3:
            return "; channels first? transpose it"
    return ""
