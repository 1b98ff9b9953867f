"""Turns half of a block's values from FP8 into what the tensor core multiplies, in SMEM.

Accumulators leave few registers, and what does not fit goes through memory. So a thread converts
a row's columns of one scale, 16 at a time; as the rows of eight threads in turn differ, so do the
banks of SMEM that they reach. Bits are placed, without a float32 in between: an E4M3 number whose
sign, exponent and mantissa lie where another format has them is that format's number, but for the
bias of its exponent, which a product repairs.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, vector
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from whalejax.kernels.mla.inline import array, number
from whalejax.kernels.mla.sizes import BLOCK
from whalejax.kernels.mosaic import interpreted, transforms

THREADS = 128  # of a warpgroup: two for each row
E4M3 = jnp.float8_e4m3fn
BY_THREAD = plgpu.Layout.WG_STRIDED((THREADS,), vec_size=1)
WORD, CHUNK = 4, 16  # numbers in FP8 of a register, and of the widest load


@dataclasses.dataclass(frozen=True)
class Format:
    """Where a number of 16 bits has what an E4M3 number has, in pairs.

    Attributes:
      name: of pairs, in PTX.
      shift: from an E4M3 number whose sign was extended to 16 bits.
      mask: of sign, the four exponent bits and the mantissa.
      unbias: a power of two, as bits, of what the smaller bias leaves out.
      units: another, as a number, that is left to scales.
    """

    name: str
    shift: int
    mask: int
    unbias: int
    units: float

    def scale(self, which: int) -> str:
        """PTX of two numbers of a word, the lower or the upper ones, times a scale in two parts.

        Their bytes are taken with signs extended; the product is rounded as if exact, nearly.
        """
        return f"""{{
            .reg .b32 x, y;
            prmt.b32 x, $1, 0, {("0x9180", "0xb3a2")[which]};
            shl.b32 x, x, {self.shift};
            and.b32 x, x, {self.mask};
            mov.b32 y, {self.unbias};
            mul.rn.{self.name} x, x, y;
            mul.rn.{self.name} y, x, $3;
            fma.rn.{self.name} $0, x, $2, y;
        }}"""


FORMATS = {
    "bfloat16": Format("bf16x2", 4, 0x87F087F0, 0x7B807B80, 1.0),  # 2 ** 120
    "float16": Format("f16x2", 7, 0xBF80BF80, 0x3C003C00, 256.0),  # 1
}


def load_scales(scales, tiles) -> jax.Array:
    """The scale of each thread's columns, `f32[128]`.

    Args:
      scales: in GMEM, `f32[64, tiles]`, of a block.
      tiles: of columns that the lower and the upper threads convert.
    """
    if interpreted():
        return jnp.concatenate([scales[:, tile] for tile in tiles])
    thread = _threads()
    index = lax.rem(thread, BLOCK) * scales.shape[1] + jnp.where(thread < BLOCK, *tiles)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), BY_THREAD),
        return_type=plgpu.ShapeDtypeStruct((THREADS,), jnp.float32, layout=BY_THREAD),
    )
    def load(_, scales, index):
        f32 = ir.F32Type.get()
        pointer = utils.getelementptr(utils.memref_ptr(scales), [_own(index)], f32)
        loaded = vector.broadcast(ir.VectorType.get((1,), f32), llvm.load(f32, pointer))
        return array(np.array([loaded], dtype=object), BY_THREAD.to_mgpu())

    return load(scales, index)


def convert(stage, ring, scales: jax.Array) -> None:
    """Writes values to `ring [64, columns]`: those of `stage e4m3[64, columns]` times scales."""
    width, dtype = ring.shape[1], ring.dtype
    if interpreted():
        scale = jnp.repeat(scales.reshape(2, BLOCK).T, width // 2, axis=1)
        ring[...] = (stage[...].astype(jnp.float32) * scale).astype(dtype)
        return
    form = FORMATS[jnp.dtype(dtype).name]
    scales = scales * form.units
    high = scales.astype(dtype)
    low = (scales - high.astype(jnp.float32)).astype(dtype)
    thread = _threads()
    row, column = lax.rem(thread, BLOCK), lax.div(thread, BLOCK) * (width // 2)
    refs = [plgpu.RefType(transforms(*tile)) for tile in ((128, E4M3), (64, dtype))]

    @plgpu.inline_mgpu(arg_types=(*refs, *[BY_THREAD] * 4))
    def multiply(_, stage, ring, source, target, high, low):
        source, target = (
            arith.addi(llvm.ptrtoint(_i32(), utils.memref_ptr(ref)), _own(offset))
            for ref, offset in ((stage, source), (ring, target))
        )
        factors = [_pair(high), _pair(low)]
        chunks = width // 2 // CHUNK
        words = _load(source, 0)
        for chunk in range(chunks):
            # before the store, which may not be moved behind it
            following = _load(source, chunk + 1) if chunk + 1 < chunks else None
            for half in range(2):
                pairs = [
                    utils.inline_ptx(form.scale(which), word, *factors, result_types=_i32())
                    for word in words[2 * half : 2 * half + 2]
                    for which in range(2)
                ]
                _store(target, 2 * chunk + half, pairs)
            words = following

    multiply(stage, ring, _place(row, column, width, 1), _place(row, column, width, 2), high, low)


def _threads() -> jax.Array:
    """Each thread's number in its warpgroup."""
    return plgpu.broadcasted_iota(jnp.int32, (THREADS,), 0, layout=BY_THREAD)


def _place(row, column, width, itemsize):
    """Where 16 bytes of an array `[64, width]` lie in its SMEM, which is tiled and swizzled."""
    columns = 128 // itemsize
    panel, chunk = lax.div(column, columns), lax.div(lax.rem(column, columns) * itemsize, 16)
    within = lax.rem(row, 8)
    rows = lax.div(row, 8) * (width // columns) + panel
    return rows * 1024 + within * 128 + (within ^ chunk) * 16


def _i32():
    return ir.IntegerType.get_signless(32)


def _own(values):
    """A thread's element of an array of one each."""
    [register] = values.registers.flat
    return number(register)


def _pair(values):
    """A thread's number of 16 bits, twice."""
    bits = utils.bitcast(_own(values), ir.IntegerType.get_signless(16))
    return utils.inline_ptx("mov.b32 $0, {$1, $1};", bits, result_types=_i32())


def _address(start, chunk):
    """The address of 16 bytes so many further on in a row of a swizzled array."""
    panel, within = divmod(chunk, 8)
    moved = arith.xori(start, utils.c(16 * within, _i32()))
    return arith.addi(moved, utils.c(1024 * panel, _i32()))


def _load(start, chunk):
    return utils.inline_ptx(
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];",
        _address(start, chunk),
        result_types=[_i32()] * WORD,
        has_side_effects=True,
    )


def _store(start, chunk, words):
    ptx = "st.shared.v4.b32 [$0], {$1, $2, $3, $4};"
    utils.inline_ptx(ptx, _address(start, chunk), *words, has_side_effects=True)
