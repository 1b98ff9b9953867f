"""One table between our stacked parameters and Hugging Face's tensors, used in both directions."""

import dataclasses
from collections.abc import Iterator

import jax

from whalejax.model.config import ModelConfig
from whalejax.model.sharding import path_name

# our name inside a layer: the name inside a Hugging Face layer; {e} is the expert
LAYER = {
    "input_layernorm": "input_layernorm.weight",
    "post_attention_layernorm": "post_attention_layernorm.weight",
    "self_attn.q_proj": "self_attn.q_proj.weight",
    "self_attn.q_a_proj": "self_attn.q_a_proj.weight",
    "self_attn.q_a_layernorm": "self_attn.q_a_layernorm.weight",
    "self_attn.q_b_proj": "self_attn.q_b_proj.weight",
    "self_attn.kv_a_proj_with_mqa": "self_attn.kv_a_proj_with_mqa.weight",
    "self_attn.kv_a_layernorm": "self_attn.kv_a_layernorm.weight",
    "self_attn.kv_b_proj": "self_attn.kv_b_proj.weight",
    "self_attn.o_proj": "self_attn.o_proj.weight",
    "mlp.gate_proj": "mlp.gate_proj.weight",
    "mlp.up_proj": "mlp.up_proj.weight",
    "mlp.down_proj": "mlp.down_proj.weight",
    "mlp.gate.weight": "mlp.gate.weight",
    "mlp.gate.e_score_correction_bias": "mlp.gate.e_score_correction_bias",
    "mlp.experts.gate_proj": "mlp.experts.{e}.gate_proj.weight",
    "mlp.experts.up_proj": "mlp.experts.{e}.up_proj.weight",
    "mlp.experts.down_proj": "mlp.experts.{e}.down_proj.weight",
    "mlp.shared_experts.gate_proj": "mlp.shared_experts.gate_proj.weight",
    "mlp.shared_experts.up_proj": "mlp.shared_experts.up_proj.weight",
    "mlp.shared_experts.down_proj": "mlp.shared_experts.down_proj.weight",
}
TOP = {
    "embed_tokens": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
# inside an MTP module; the rest of it is a layer
MTP = {
    "enorm": "enorm.weight",
    "hnorm": "hnorm.weight",
    "eh_proj": "eh_proj.weight",
    "norm": "shared_head.norm.weight",
}
# published MTP modules repeat the model's embedding and head
MTP_COPIES = {"embed_tokens.weight": "embed_tokens", "shared_head.head.weight": "lm_head"}
IGNORED_ENDINGS = ("rotary_emb.inv_freq",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
    """One Hugging Face tensor's place in our parameters.

    Attributes:
      name: of the tensor.
      parameter: dotted path of ours.
      index: along the stacked leading axes: none, (layer,), or (layer, expert).
      shape: of the tensor.
    """

    name: str
    parameter: str
    index: tuple[int, ...]
    shape: tuple[int, ...]


def slots(config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> Iterator[Slot]:
    """Every tensor of a model, in the order in which files hold them.

    Args:
      config: sizes.
      shapes: of our stacked parameters by dotted path.
    """
    first = {
        "dense_layers": 0,
        "moe_layers": config.num_dense_layers,
        "mtp_layers": config.num_hidden_layers,
    }
    for parameter, shape in shapes.items():
        if parameter in TOP:
            yield Slot(name=TOP[parameter], parameter=parameter, index=(), shape=shape)
            continue
        kind, _, inside = parameter.partition(".")
        theirs = MTP.get(inside) or LAYER[inside.removeprefix("layer.")]
        for layer in range(shape[0]):
            prefix = f"model.layers.{first[kind] + layer}."
            if "{e}" not in theirs:
                yield Slot(
                    name=prefix + theirs, parameter=parameter, index=(layer,), shape=shape[1:]
                )
                continue
            for expert in range(shape[1]):
                yield Slot(
                    name=prefix + theirs.format(e=expert),
                    parameter=parameter,
                    index=(layer, expert),
                    shape=shape[2:],
                )


def takes_fp8(slot: Slot) -> bool:
    """Whether the model computes with this tensor in FP8: projections only, not norms,
    embedding, head or router."""
    return "_proj" in slot.parameter


def mtp_copies(config: ModelConfig) -> dict[str, str]:
    """Tensors that repeat one of our parameters, by name."""
    layers = range(
        config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers
    )
    return {
        f"model.layers.{layer}.{theirs}": ours
        for layer in layers
        for theirs, ours in MTP_COPIES.items()
    }


def dotted(path: tuple) -> str:
    """The dotted name of a leaf of a model's state."""
    return path_name(path)


def parameter_shapes(state: object) -> dict[str, tuple[int, ...]]:
    """Shapes of all leaves of an (abstract) state by dotted path."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {dotted(path): leaf.shape for path, leaf in leaves}
