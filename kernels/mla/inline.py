"""What Pallas has no operation for: done with the registers of Mosaic GPU's arrays."""

import functools

import jax
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, scf, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from whalejax.kernels.mla.worker import BY_ROW, F32
from whalejax.kernels.mosaic import interpreted


def number(register: ir.Value) -> ir.Value:
    """The number of a register that has one."""
    return vector.extract(register, dynamic_position=[], static_position=[0])


def array(registers: np.ndarray, layout) -> mgpu.FragmentedArray:
    """The array of floats that lie in registers."""
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def scaled(acc: jax.Array, factor: jax.Array) -> jax.Array:
    """acc `f32[rows, columns]`, its rows times factors: threads skip it whose factors are all 1."""
    if interpreted():
        return acc * lax.broadcast_in_dim(factor, acc.shape, [0])
    wgmma = plgpu.Layout.WGMMA
    result = plgpu.ShapeDtypeStruct(acc.shape, F32, layout=wgmma)

    @plgpu.inline_mgpu(arg_types=(wgmma, BY_ROW), return_type=result)
    def scale(_, acc, factor):
        one = utils.c(1.0, ir.F32Type.get())
        changed = [
            arith.cmpf(arith.CmpFPredicate.UNE, number(register), one)
            for register in factor.registers.flat
        ]
        types = [register.type for register in acc.registers.flat]
        branch = scf.IfOp(functools.reduce(arith.ori, changed), types, has_else=True)
        with ir.InsertionPoint(branch.then_block):
            product = acc * factor.broadcast_in_dim(acc.shape, (0,), acc.layout)
            scf.yield_([*product.registers.flat])
        with ir.InsertionPoint(branch.else_block):
            scf.yield_([*acc.registers.flat])
        registers = np.array(branch.results, dtype=object)
        return array(registers.reshape(acc.registers.shape), acc.layout)

    return scale(acc, factor)
