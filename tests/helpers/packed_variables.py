"""Variables as netCDF packs them: dtypes, attributes of the CF conventions, numbers stored."""

from __future__ import annotations

from typing import Any

import numpy as np

ROWS = 40
INT = {f"{kind}{size}": np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)}
F4, F8 = np.float32, np.float64


def stored(dtype: str, seed: int = 0) -> np.ndarray:
    """Return numbers that hold the ends of a dtype's range, and some in between."""
    random = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    if kind.kind == "f":
        values = (250 + 40 * random.standard_normal((ROWS, 3))).astype(kind)
        values[::7, 0], values[::5, 1], values[3, 2] = 1e20, np.nan, -999.0
        return values
    low, high = np.iinfo(kind).min, np.iinfo(kind).max
    values = random.integers(low, high, (ROWS, 3), kind, endpoint=True)
    values[::7, 0], values[::5, 1], values[3, 2], values[4] = low, high, 1, (0, 5, 17)
    return values


VARIABLES: dict[str, tuple[str, dict[str, Any]]] = {
    "era5": ("i2", {"scale_factor": 0.0015, "add_offset": 293.15, "_FillValue": np.int16(-32767)}),
    "single": ("i2", {"scale_factor": F4(0.01), "add_offset": F4(273.15), "_FillValue": -32768}),
    "single_scale": ("i2", {"scale_factor": F4(0.01)}),
    "double_scale": ("i2", {"scale_factor": 0.01}),
    "offset_alone": ("u1", {"add_offset": F4(100)}),
    "mixed": ("i2", {"scale_factor": F4(0.1), "add_offset": 3.3, "missing_value": np.int16(1)}),
    "wide": ("i4", {"scale_factor": F4(1e-5), "add_offset": F4(7)}),
    "wide_single_scale": ("i4", {"scale_factor": F4(1e-5)}),
    "widest": ("i8", {"scale_factor": F4(1e-5), "add_offset": F4(7)}),
    "whole_scale": ("i2", {"scale_factor": np.int32(2), "add_offset": np.int32(1)}),
    "bytes": ("i1", {"scale_factor": 0.5, "add_offset": 10.0, "_FillValue": np.int8(-128)}),
    "unsigned_bytes": ("u1", {"scale_factor": 1 / 255, "_FillValue": np.uint8(255)}),
    "unsigned_words": ("u2", {"scale_factor": F4(0.25), "_FillValue": np.uint16(65535)}),
    "unsigned_wide": ("u4", {"scale_factor": 0.25, "_FillValue": np.uint32(2**32 - 1)}),
    "unsigned_widest": ("u8", {"scale_factor": 0.25, "_FillValue": np.uint64(2**64 - 1)}),
    "goes": (
        "i2",
        {
            "_Unsigned": "true",
            "_FillValue": np.int16(-1),
            "scale_factor": F4(0.00241554),
            "add_offset": F4(173.15),
        },
    ),
    "as_unsigned": ("i1", {"_Unsigned": "true"}),
    "as_unsigned_filled": ("i1", {"_Unsigned": "true", "_FillValue": np.int8(-1)}),
    "as_signed": ("u1", {"_Unsigned": "false", "scale_factor": 0.5}),
    "counted": ("i2", {"_FillValue": np.int16(-32768)}),
    "counted_wide": ("i4", {"_FillValue": np.int32(-(2**31))}),
    "several": ("i2", {"missing_value": np.array([1, 5, 17], "i2"), "_FillValue": np.int16(0)}),
    "beside": ("f4", {"_FillValue": F4(1e20), "missing_value": F4(-999)}),
    "filled": ("f4", {"_FillValue": F4(1e20)}),
    "filled_by_nan": ("f4", {"_FillValue": F4(np.nan)}),
    "doubles": ("f8", {"_FillValue": 1e20}),
    "packed_doubles": ("f8", {"scale_factor": 2.0, "add_offset": 1.0, "_FillValue": 1e20}),
    "doubles_by_singles": ("f8", {"scale_factor": F4(0.01), "add_offset": F4(1)}),
    "doubles_and_nan": (
        "f8",
        {"scale_factor": F4(0.01), "add_offset": F4(1), "_FillValue": np.nan},
    ),
    "packed_singles": ("f4", {"scale_factor": 0.1, "_FillValue": F4(1e20)}),
    "another_type": ("f4", {"missing_value": 1e20}),
    "text": ("i2", {"missing_value": "1", "scale_factor": 0.5}),
    "untouched": ("i2", {"units": "K", "long_name": "temperature"}),
}
"""By name: the dtype, and the attributes as netCDF4-python writes them."""

RANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "range": ("i2", {"valid_range": np.array([0, 20000], "i2"), "scale_factor": 0.5}),
    "range_of_floats": ("f4", {"valid_range": np.array([200, 300], "f4"), "_FillValue": F4(1e20)}),
    "least": ("i2", {"valid_min": np.int16(0), "_FillValue": np.int16(1)}),
    "largest": ("u1", {"valid_max": np.uint8(100)}),
    "both": ("i4", {"valid_min": np.int32(-5), "valid_max": np.int32(10**9), "add_offset": 1.0}),
    "range_first": ("i2", {"valid_range": np.array([0, 9], "i2"), "valid_min": np.int16(5)}),
    "of_three": ("i2", {"valid_range": np.array([0, 9, 11], "i2"), "valid_max": np.int16(5)}),
    "unsigned": (
        "i2",
        {"valid_range": np.array([0, -6], "i2"), "_Unsigned": "true", "_FillValue": np.int16(-1)},
    ),
    "widest": ("u8", {"valid_range": np.array([0, 2**63 + 1], "u8"), "scale_factor": 1e-9}),
    "not_storable": ("i2", {"valid_range": np.array([0.5, 20000]), "scale_factor": 0.5}),
    "missing_and_unsigned": ("i1", {"missing_value": np.int8(-1), "_Unsigned": "true"}),
    "said_loudly": ("i1", {"_Unsigned": "True"}),
    "wide_fill": ("i4", {"_FillValue": np.int32(-(2**31) + 1), "scale_factor": F4(0.01)}),
}
