"""Products of FP8 tiles on Hopper's tensor core, as PTX: started here, awaited there.

Pallas' own `wgmma` adds to an accumulator that holds zeros, in registers of its own for each
product. Here the first instruction of a product overwrites what the registers of the product before
hold. That one is promoted by then, and ptxas knows it: it cannot put off the promotion until after
the next product's start, for which there would be registers missing, and so is free to mix all
else. Addresses of the next product are computed between the multiply-adds, and no barrier has to
stand between two products of a block to keep it from spilling. With the next block awaited late,
which this allows, a matmul with tiles of 256 rows takes 8 % less time on an H100.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir.dialects import llvm  # JAX has no public name for this dialect
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.utils import memref_ptr
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector

from whalejax.kernels.fp8_gemm.tuning import BLOCK_K, WARPGROUP_ROWS
from whalejax.kernels.mosaic import interpreted, transforms

ROW_CHUNKS = BLOCK_K // 16  # of a row of a slot, in the descriptors' units of 16 bytes
K_CHUNKS = 2  # of the 32 elements that one instruction multiplies
# Upper half of a descriptor: 8 rows are 1024 bytes away from the next 8, swizzled by 128 bytes.
DESCRIPTOR = 1024 // 16 | 1 << 30


def zeros(columns: int) -> jax.Array:
    """A warpgroup's registers for a product, or for a sum of them: f32[64, columns]."""
    return plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, columns), jnp.float32), plgpu.Layout.WGMMA)


def start(product: jax.Array | None, x: Any, w: Any, slot: jax.Array, row: jax.Array) -> jax.Array:
    """Starts `x[slot, row : row + 64] @ w[slot].T` in the registers of a product before it.

    Args:
      product: f32 `[64, n]`, promoted already; None takes registers of their own.
      x, w: rings in SMEM, e4m3 `[stages, rows, 128]` and `[stages, n, 128]`.
      slot: of both rings.
      row: multiple of 64.

    Returns:
      The product, not to be read before `wait`.
    """
    if interpreted():
        return _interpret(x.at[slot, pl.ds(row, WARPGROUP_ROWS)], w.at[slot].transpose((1, 0)))
    (_, rows, _), (_, columns, _) = x.shape, w.shape
    ring, scalar = plgpu.RefType(transforms(BLOCK_K, x.dtype)), plgpu.Layout.WG_SPLAT(())

    before = () if product is None else (product,)

    @plgpu.inline_mgpu(
        arg_types=(ring, ring, scalar, scalar, *[plgpu.Layout.WGMMA] * len(before)),
        return_type=_registers(columns),
    )
    def multiply(_, x, w, x_offset, w_offset, *before):
        addresses = _address(x, x_offset), _address(w, w_offset)
        return _asm(_product(columns), columns, *before, operands=addresses)

    x_offset, w_offset = (slot * rows + row) * ROW_CHUNKS, slot * (columns * ROW_CHUNKS)
    return multiply(x, w, x_offset, w_offset, *before)


def wait(product: jax.Array) -> jax.Array:
    """The product, once the tensor core is done with it."""
    if interpreted():
        return product
    columns = product.shape[1]

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=_registers(columns))
    def settle(_, product):
        return _asm("wgmma.wait_group.sync.aligned 0;", columns, product)

    return settle(product)


def _interpret(x, w):
    """The same by Pallas' means."""

    def multiply(acc):
        plgpu.wgmma(acc, x, w)
        return plgpu.wgmma_accumulator_load(acc)

    return pl.run_scoped(multiply, plgpu.ACC((WARPGROUP_ROWS, w.shape[1]), jnp.float32))


def _registers(columns):
    shape = WARPGROUP_ROWS, columns
    return plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=plgpu.Layout.WGMMA)


def _product(columns: int) -> str:
    """PTX of a product: its first instruction overwrites the accumulators, three add to them."""
    count = WARPGROUP_ROWS * columns // 128  # accumulators of a thread, the first operands
    accumulators = ", ".join(f"${i}" for i in range(count))
    x, w = f"${count}", f"${count + 1}"
    lines = [
        ".reg .pred overwrite, add;",
        "setp.ne.b32 overwrite, 0, 0;",
        "setp.eq.b32 add, 0, 0;",
        "wgmma.fence.sync.aligned;",
    ]
    for i in range(BLOCK_K // 32):
        lines += [
            f".reg .b32 x{i}, w{i};",
            f".reg .b64 x_tile{i}, w_tile{i};",
            f"add.s32 x{i}, {x}, {i * K_CHUNKS};",
            f"add.s32 w{i}, {w}, {i * K_CHUNKS};",
            f"mov.b64 x_tile{i}, {{x{i}, {DESCRIPTOR}}};",
            f"mov.b64 w_tile{i}, {{w{i}, {DESCRIPTOR}}};",
            f"wgmma.mma_async.sync.aligned.m64n{columns}k32.f32.e4m3.e4m3 {{{accumulators}}}, "
            f"x_tile{i}, w_tile{i}, {'add' if i else 'overwrite'}, 1, 1;",
        ]
    return "{\n" + "\n".join([*lines, "wgmma.commit_group.sync.aligned;"]) + "\n}"


def _address(ref, offset):
    """The lower half of a descriptor: an address in SMEM, in 16 bytes."""
    i32 = ir.IntegerType.get_signless(32)
    base = arith.shrui(llvm.ptrtoint(i32, memref_ptr(ref)), mgpu.c(4, i32))
    return arith.addi(base, offset.registers.item())


def _asm(text, columns, before=None, operands=()):
    """Emits PTX that writes a product's registers, those of the product `before` if there is one.

    `operands` are int32, numbered in the text from the number of a thread's accumulators on.
    """
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
    layout = mgpu.WGMMA_LAYOUT
    pair, width = layout.registers_element_type(f32), layout.vector_length
    out = np.empty(layout.registers_shape((WARPGROUP_ROWS, columns)), dtype=object)
    count = out.size * width

    def element(value, i):
        static = ir.DenseI64ArrayAttr.get([i])
        return vector.extract(value, dynamic_position=[], static_position=static)

    def joined(elements):
        value = llvm.mlir_undef(pair)
        for i, one in enumerate(elements):
            value = llvm.insertelement(value, one, arith.constant(i32, i))
        return value

    inputs, constraints = [*operands], ["=f"] * count + ["r"] * len(operands)
    if before is not None:
        inputs += [element(value, i) for value in before.registers.flat for i in range(width)]
        constraints += [str(i) for i in range(count)]  # the same registers, in and out
    result = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * count),
        inputs,
        text,
        ",".join(constraints),
        has_side_effects=True,
        asm_dialect=0,
    )
    written = [llvm.extractvalue(f32, result, [i]) for i in range(count)]
    for n in range(out.size):
        out.flat[n] = joined(written[n * width : (n + 1) * width])
    return mgpu.FragmentedArray(_registers=out, _layout=layout, _is_signed=None)
