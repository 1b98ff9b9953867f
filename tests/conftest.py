"""Eight CPU devices, and implicit promotions as errors, for every test."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# threads of XLA's pool: the interpreter of GPU kernels needs one for each warpgroup at a time
os.environ.setdefault("NPROC", "48")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
