"""Dtypes, and the dtype and shape of a tensor.

`DTYPES` is the only dtype table: the names of a dtype in files, in torch and in numpy are looked up here.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from streamconv.arguments import shown_value
from streamconv.errors import UsageError

CastDtype = Literal["float32", "float16", "bfloat16"]
"""The dtypes that weights can be cast to, by torch's names."""

CAST_SPELLINGS: dict[str, CastDtype] = {
    **dict.fromkeys(("float32", "fp32", "f32", "float"), "float32"),
    **dict.fromkeys(("float16", "fp16", "f16", "half"), "float16"),
    **dict.fromkeys(("bfloat16", "bf16"), "bfloat16"),
}
"""The names that other tools give to these dtypes, in lower case."""


DtypeCode = Literal[
    "BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64",
    "I64", "U64",
]  # fmt: skip
"""The dtypes of tensors, by safetensors' codes."""


@dataclass(frozen=True, slots=True)
class DType:
    """One dtype. ``itemsize`` is in bytes.

    ``storage`` is torch's typed storage class, empty for dtypes that are newer than those classes. ``numpy`` is the
    numpy dtype that `casts` uses; ``"bfloat16"`` is one after ml_dtypes is imported.
    """

    code: DtypeCode
    itemsize: int
    torch: str
    storage: str = ""
    numpy: str = ""

    @property
    def is_weight(self) -> bool:
        """Return whether a model's weights can have this dtype: floating point of at least 16 bits."""
        return bool(self.numpy)


# By safetensors' code, in safetensors' order; in its files, tensors are sorted in the reverse of this order.
DTYPES: dict[str, DType] = {
    dtype.code: dtype
    for dtype in (
        DType("BOOL", 1, "bool", "BoolStorage"),
        DType("U8", 1, "uint8", "ByteStorage"),
        DType("I8", 1, "int8", "CharStorage"),
        DType("F8_E5M2", 1, "float8_e5m2"),
        DType("F8_E4M3", 1, "float8_e4m3fn"),
        DType("F8_E8M0", 1, "float8_e8m0fnu"),
        DType("I16", 2, "int16", "ShortStorage"),
        DType("U16", 2, "uint16"),
        DType("F16", 2, "float16", "HalfStorage", "<f2"),
        DType("BF16", 2, "bfloat16", "BFloat16Storage", "bfloat16"),
        DType("I32", 4, "int32", "IntStorage"),
        DType("U32", 4, "uint32"),
        DType("F32", 4, "float32", "FloatStorage", "<f4"),
        DType("C64", 8, "complex64", "ComplexFloatStorage"),
        DType("F64", 8, "float64", "DoubleStorage", "<f8"),
        DType("I64", 8, "int64", "LongStorage"),
        DType("U64", 8, "uint64"),
    )
}
BY_TORCH_NAME = {dtype.torch: dtype for dtype in DTYPES.values()}
# Codes by numpy's name in files: "<f4", and "|u1" for a single byte. numpy has no name for bfloat16 and float8.
BY_NUMPY_NAME: dict[str, DtypeCode] = {
    f"{'<' if dtype.itemsize > 1 else '|'}{dtype.code[0].lower()}{dtype.itemsize}": dtype.code
    for dtype in DTYPES.values()
    if dtype.code[:2] not in ("BF", "F8")
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The dtype, a safetensors code such as ``"F32"``, and the shape of a tensor."""

    dtype: DtypeCode
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def parse_cast_dtype(name: object) -> CastDtype:
    """Return torch's name of a dtype to cast to, from any spelling: "BF16", "half", "torch.float32", `torch.float32`.

    Raises:
        UsageError: it is not one of the dtypes that weights can be cast to.
    """
    dtype = CAST_SPELLINGS.get("" if isinstance(name, int) else str(name).strip().lower().removeprefix("torch."))
    if dtype is None:
        raise UsageError("Cannot cast to {}. Choose {}, {} or {}.".format(shown_value(name), *get_args(CastDtype)))
    return dtype


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the row-major strides in elements: (12, 4, 1) for the shape (2, 3, 4)."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
