"""The DeepSeek-V2/V3 decoder: flax.nnx modules hold the parameters, pure functions compute."""
