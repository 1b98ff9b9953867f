"""`config.json` to ModelConfig and back, in DeepSeek's published spelling and transformers 5's."""

import json
from pathlib import Path
from typing import Any

from whalejax.model.config import MLAConfig, ModelConfig, MoEConfig, YarnConfig

REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
)  # fmt: skip
REQUIRED_MOE = ("num_experts_per_tok", "moe_intermediate_size")
# what a model type means where its config.json is silent
DEFAULTS = {
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True},
    "deepseek_v2": {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False},
}
# what this library computes in one way only; null and silence mean the same
FIXED = {
    "moe_layer_freq": 1,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "rope_interleave": True,
}
# keys whose values the sizes' own checks do not cover
NUMBERS = ("rope_theta", "rms_norm_eps", "initializer_range", "routed_scaling_factor")
WHOLE = ("first_k_dense_replace", "num_nextn_predict_layers", "bos_token_id", "eos_token_id")
YARN_NUMBERS = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
# they change YaRN in ways that DeepSeek's own code does not know
YARN_FIXED = {"attention_factor": None, "truncate": True}
FP8_QUANTIZATION = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def read_config(path: Path | str) -> ModelConfig:
    """Reads the `config.json` of a Hugging Face directory.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is not JSON, or describes a model that cannot be built; lists every fault.
    """
    file = Path(path) / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist")
    try:
        values = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}, not an object")
    try:
        return parse_config(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None


def parse_config(values: dict[str, Any]) -> ModelConfig:
    """The config that the keys of a `config.json` describe.

    Raises:
      ValueError: keys are missing or hold what cannot be built; lists every fault.
    """
    values = {name: value for name, value in values.items() if value is not None}
    faults = _faults(values)
    if faults:
        raise ValueError("; ".join(faults))
    experts, model_type = values.get("n_routed_experts"), values["model_type"]
    theta, yarn = _rope(values)
    return ModelConfig(
        **{name: values[name] for name in REQUIRED[:4]},
        mla=MLAConfig(
            **{name: values[name] for name in REQUIRED[4:]},
            q_lora_rank=values.get("q_lora_rank"),
            rope_theta=theta,
            yarn=yarn,
        ),
        moe=_moe(values, DEFAULTS[model_type]) if experts else None,
        first_k_dense_replace=(
            values.get("first_k_dense_replace", 0) if experts else values["num_hidden_layers"]
        ),
        num_nextn_predict_layers=values.get("num_nextn_predict_layers", 0),
        max_position_embeddings=values.get("max_position_embeddings", 4096),
        rms_norm_eps=values.get("rms_norm_eps", 1e-6),
        initializer_range=values.get("initializer_range", 0.02),
        bos_token_id=values.get("bos_token_id"),
        eos_token_id=values.get("eos_token_id"),
    )


def _faults(values: dict[str, Any]) -> list[str]:
    """All that stops `values`, which hold no null, from being a config of ours."""
    faults = []
    if not isinstance(model := values.get("model_type"), str) or model not in DEFAULTS:
        faults.append(f"model_type={model!r} must be one of {', '.join(DEFAULTS)}")
    required = REQUIRED + (REQUIRED_MOE if values.get("n_routed_experts") else ())
    faults += [f"{name} is missing" for name in required if name not in values]
    faults += _other_than(FIXED, values)
    faults += _not_numbers(NUMBERS, values)
    faults += [
        f"{name}={values[name]!r} must be a whole number"
        for name in WHOLE
        if name in values and type(values[name]) is not int
    ]
    if not isinstance(normalised := values.get("norm_topk_prob", True), bool):
        faults.append(f"norm_topk_prob={normalised!r} must be true or false")
    for name in ("rope_parameters", "rope_scaling", "quantization_config"):
        if not isinstance(value := values.get(name, {}), dict):
            faults.append(f"{name}={value!r} must be an object or null")
        elif name == "quantization_config" and value:
            faults += _other_than(FP8_QUANTIZATION, value, f"{name}: ")
        elif value:
            faults += [f"{name}: {fault}" for fault in _rope_faults(value)]
    return faults


def _rope_faults(scaling: dict[str, Any]) -> list[str]:
    if (kind := _rope_type(scaling)) == "default":
        return _not_numbers(("rope_theta",), scaling)
    if kind != "yarn":
        return [f"type {kind!r} is not supported, only 'yarn'"]
    missing = [] if scaling.get("factor") is not None else ["factor is missing"]
    numbers = _not_numbers((*YARN_NUMBERS, "rope_theta"), scaling)
    return missing + numbers + _other_than(YARN_FIXED, scaling)


def _not_numbers(names: tuple[str, ...], values: dict[str, Any]) -> list[str]:
    return [
        f"{name}={values[name]!r} must be a number"
        for name in names
        if values.get(name) is not None and type(values[name]) not in (int, float)
    ]


def _other_than(fixed: dict[str, Any], values: dict[str, Any], where: str = "") -> list[str]:
    return [
        f"{where}{name}={values[name]!r} is not supported, only {value!r}"
        for name, value in fixed.items()
        if values.get(name) is not None and values[name] != value
    ]


def _moe(values: dict[str, Any], defaults: dict[str, Any]) -> MoEConfig:
    chosen = {name: values.get(name, default) for name, default in defaults.items()}
    return MoEConfig(
        n_routed_experts=values["n_routed_experts"],
        num_experts_per_tok=values["num_experts_per_tok"],
        moe_intermediate_size=values["moe_intermediate_size"],
        n_shared_experts=values.get("n_shared_experts", 0),
        n_group=values.get("n_group", 1),
        topk_group=values.get("topk_group", 1),
        routed_scaling_factor=values.get("routed_scaling_factor", 1.0),
        **chosen,
    )


def _rope(values: dict[str, Any]) -> tuple[float, YarnConfig | None]:
    """The base and the scaling, from `rope_theta` and `rope_scaling` or from `rope_parameters`."""
    scaling = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = scaling.get("rope_theta") or values.get("rope_theta", 10000.0)
    if _rope_type(scaling) == "default":
        return theta, None
    names = ("original_max_position_embeddings", *YARN_NUMBERS)
    return theta, YarnConfig(**{n: scaling[n] for n in names if scaling.get(n) is not None})


def _rope_type(scaling: dict[str, Any]) -> Any:
    return scaling.get("rope_type", scaling.get("type", "default"))


def model_type(config: ModelConfig) -> str:
    """`deepseek_v3` for models with V3's routing, `deepseek_v2` otherwise."""
    v3 = config.moe is not None and config.moe.topk_method == "noaux_tc"
    return "deepseek_v3" if v3 else "deepseek_v2"


def write_config(config: ModelConfig, *, dtype: str, fp8: bool) -> dict[str, Any]:
    """The keys of a `config.json`, in the published spelling.

    Args:
      config: sizes.
      dtype: name of the weights' dtype, `bfloat16`.
      fp8: whether matrices are stored as FP8 with 128 x 128 scales.
    """
    kind = model_type(config)
    version = kind[-1]
    values: dict[str, Any] = {
        "architectures": [f"DeepseekV{version}ForCausalLM"],
        "model_type": kind,
        "torch_dtype": dtype,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "num_key_value_heads": config.mla.num_attention_heads,
        "q_lora_rank": config.mla.q_lora_rank,
        "rope_theta": config.mla.rope_theta,
        "rope_scaling": _yarn_json(config.mla.yarn),
    }
    for name in REQUIRED[:4]:
        values[name] = getattr(config, name)
    for name in REQUIRED[4:]:
        values[name] = getattr(config.mla, name)
    for name in (
        "first_k_dense_replace",
        "num_nextn_predict_layers",
        "max_position_embeddings",
        "rms_norm_eps",
        "initializer_range",
        "bos_token_id",
        "eos_token_id",
    ):
        values[name] = getattr(config, name)
    if config.moe is not None:
        values["moe_layer_freq"] = 1
        for name in (
            "n_routed_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "n_shared_experts",
            "n_group",
            "topk_group",
            "scoring_func",
            "topk_method",
            "norm_topk_prob",
            "routed_scaling_factor",
        ):
            values[name] = getattr(config.moe, name)
    if fp8:
        values["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            **FP8_QUANTIZATION,
        }
    return values


def _yarn_json(yarn: YarnConfig | None) -> dict[str, Any] | None:
    if yarn is None:
        return None
    return {
        "type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_position_embeddings,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }
