"""What numba lacks: bfloat16 and float32 numbers at an address, without bounds to check, so that loops over them become vector code."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

# numba's own type knows the arguments of the generator only.
_instruction: Callable[[Callable[..., Any]], Callable[..., Any]] = intrinsic
_INT16, _INT32, _FLOAT32 = ir.IntType(16), ir.IntType(32), ir.FloatType()
# The upper half of a float32 that is no number.
_NAN_BITS = 0x7FC0


def _point(builder: Any, element: ir.Type, address: Any, index: Any) -> Any:
    return builder.gep(builder.inttoptr(address, element.as_pointer()), [index])


@_instruction
def load_integer(_typing: Any, _address: Any, _index: Any) -> Any:
    """Give the 64-bit integer at an index behind an address."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.load(_point(builder, ir.IntType(64), *arguments))

    return types.int64(types.intp, types.intp), generate


@_instruction
def load(_typing: Any, _address: Any, _index: Any) -> Any:
    """Give the float32 at an index behind an address."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.load(_point(builder, _FLOAT32, *arguments), align=4)

    return types.float32(types.intp, types.intp), generate


@_instruction
def store(_typing: Any, _address: Any, _index: Any, _value: Any) -> Any:
    """Put a float32 at an index behind an address."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        address, index, value = arguments
        builder.store(value, _point(builder, _FLOAT32, address, index), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.float32), generate


@_instruction
def load_half(_typing: Any, _address: Any, _index: Any) -> Any:
    """Give the bfloat16 at an index behind an address as float32, whose upper half it is."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        bits = builder.zext(builder.load(_point(builder, _INT16, *arguments), align=2), _INT32)
        return builder.bitcast(builder.shl(bits, _INT32(16)), _FLOAT32)

    return types.float32(types.intp, types.intp), generate


@_instruction
def store_half(_typing: Any, _address: Any, _index: Any, _value: Any) -> Any:
    """Put a float32 at an index behind an address as bfloat16, rounded to the nearest, ties to even."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        address, index, value = arguments
        bits = builder.bitcast(value, _INT32)
        is_odd = builder.and_(builder.lshr(bits, _INT32(16)), _INT32(1))
        rounded = builder.lshr(builder.add(builder.add(bits, is_odd), _INT32(0x7FFF)), _INT32(16))
        is_nan = builder.fcmp_unordered("uno", value, value)
        half = builder.trunc(builder.select(is_nan, _INT32(_NAN_BITS), rounded), _INT16)
        builder.store(half, _point(builder, _INT16, address, index), align=2)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.float32), generate


@_instruction
def scale_by_power(_typing: Any, _value: Any, _exponent: Any) -> Any:
    """Give value x 2^exponent for exponents in [-126, 127]."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        value, exponent = arguments
        bits = builder.shl(builder.add(exponent, _INT32(127)), _INT32(23))
        return builder.fmul(value, builder.bitcast(bits, _FLOAT32))

    return types.float32(types.float32, types.int32), generate


def _flip(builder: Any, bits: Any) -> Any:
    """Flip the lower bits of negative numbers: then integers are ordered as their floats are. Its own inverse."""
    sign = builder.ashr(bits, _INT32(31))
    return builder.xor(bits, builder.and_(sign, _INT32(0x7FFFFFFF)))


@_instruction
def to_order(_typing: Any, _value: Any) -> Any:
    """Give the integer that is ordered among others as the float32 is; a positive NaN comes last. Its maximum is found by vector code."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return _flip(builder, builder.bitcast(arguments[0], _INT32))

    return types.int32(types.float32), generate


@_instruction
def from_order(_typing: Any, _order: Any) -> Any:
    """Give the float32 of `to_order`'s integer."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(_flip(builder, arguments[0]), _FLOAT32)

    return types.float32(types.int32), generate
