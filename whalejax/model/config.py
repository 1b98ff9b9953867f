"""Sizes of a DeepSeek-V2 or V3 model: frozen dataclasses with the names of `config.json`."""

import dataclasses
import math
from typing import Literal


def check_positive(config: object, *names: str) -> None:
    """Raises a ValueError that lists every named field that is not a positive whole number."""
    values = {name: getattr(config, name) for name in names}
    wrong = [f"{name}={value!r}" for name, value in values.items() if not _is_positive(value)]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: sizes must be positive whole numbers")


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """Context extension by YaRN (arXiv 2309.00071), with DeepSeek's two magnitude scales.

    `mscale` over `mscale_all_dim` multiplies the rotary cosines and sines; `mscale_all_dim` alone
    multiplies the attention scale, squared.
    """

    factor: float
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self):
        check_positive(self, "original_max_position_embeddings")
        if self.factor < 1:
            raise ValueError(f"factor={self.factor} must be at least 1: YaRN stretches the context")
        if not self.beta_fast > self.beta_slow > 0:
            raise ValueError(
                f"beta_fast={self.beta_fast} must exceed beta_slow={self.beta_slow}, both positive"
            )

    def magnitude(self, mscale: float) -> float:
        """The magnitude `0.1 * mscale * ln(factor) + 1`, or 1 where nothing is stretched."""
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Sizes of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    num_attention_heads: int
    q_lora_rank: int | None = None  # None: queries are not compressed, as in V2-Lite
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_theta: float = 10000.0
    yarn: YarnConfig | None = None
    rms_norm_eps: float = 1e-6

    def __post_init__(self):
        check_positive(
            self,
            "num_attention_heads",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
        )
        if self.q_lora_rank is not None:
            check_positive(self, "q_lora_rank")
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"qk_rope_head_dim={self.qk_rope_head_dim} must be even: RoPE turns pairs"
            )

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's query and key: the part without position and the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_dim(self) -> int:
        """Numbers that a token leaves in the cache: latent and rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """The factor on the scores: 1/sqrt(d), times YaRN's magnitude squared where published."""
        scale = self.qk_head_dim**-0.5
        if self.yarn is not None and self.yarn.mscale_all_dim:
            scale *= self.yarn.magnitude(self.yarn.mscale_all_dim) ** 2
        return scale


TopkMethod = Literal["greedy", "group_limited_greedy", "noaux_tc"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Sizes and routing of a mixture of experts (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    `noaux_tc` is V3's choice: sigmoid or softmax scores plus a bias that only the choice sees; a
    group's score is the sum of its two best. `group_limited_greedy` is V2's (a group's score is
    its best), `greedy` V2-Lite's (no groups).
    """

    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: TopkMethod = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0

    def __post_init__(self):
        check_positive(
            self,
            "n_routed_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "n_group",
            "topk_group",
        )
        if not isinstance(self.n_shared_experts, int) or self.n_shared_experts < 0:
            raise ValueError(f"n_shared_experts={self.n_shared_experts!r} must be 0 or more")
        if self.scoring_func not in ("sigmoid", "softmax"):
            raise ValueError(f"scoring_func={self.scoring_func!r} must be 'sigmoid' or 'softmax'")
        if self.topk_method not in ("greedy", "group_limited_greedy", "noaux_tc"):
            raise ValueError(
                f"topk_method={self.topk_method!r} must be 'greedy', 'group_limited_greedy' "
                "or 'noaux_tc'"
            )
        self._check_groups()

    def _check_groups(self):
        if self.n_routed_experts % self.n_group:
            raise ValueError(
                f"n_routed_experts={self.n_routed_experts} must be a multiple of "
                f"n_group={self.n_group}"
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group={self.topk_group} exceeds n_group={self.n_group}")
        reachable = self.n_routed_experts
        if self.topk_method != "greedy":
            reachable = self.n_routed_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds the {reachable} experts "
                f"in topk_group={self.topk_group} of n_group={self.n_group} groups"
            )
        if (
            self.topk_method == "noaux_tc"
            and self.n_group > 1
            and self.n_routed_experts // self.n_group < 2
        ):
            raise ValueError(
                f"n_routed_experts={self.n_routed_experts} in n_group={self.n_group} groups leaves "
                "fewer than 2 experts a group, whose two best 'noaux_tc' adds up"
            )

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the shared experts, which are computed as one MLP."""
        return self.moe_intermediate_size * self.n_shared_experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole decoder: the first `first_k_dense_replace` layers are dense, the others MoE."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    mla: MLAConfig
    moe: MoEConfig | None = None  # None: every layer is dense
    first_k_dense_replace: int = 1
    num_nextn_predict_layers: int = 0  # MTP modules
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self):
        check_positive(
            self,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "max_position_embeddings",
        )
        for name in ("first_k_dense_replace", "num_nextn_predict_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        if self.moe is None and self.first_k_dense_replace < self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace={self.first_k_dense_replace} leaves MoE layers among "
                f"num_hidden_layers={self.num_hidden_layers}, but moe is None"
            )
        if self.num_nextn_predict_layers and self.moe is None:
            raise ValueError(
                f"num_nextn_predict_layers={self.num_nextn_predict_layers} needs moe: "
                "an MTP module holds a MoE layer"
            )

    @property
    def num_dense_layers(self) -> int:
        """Layers whose feed-forward part is one MLP."""
        return min(self.first_k_dense_replace, self.num_hidden_layers)

    @property
    def num_moe_layers(self) -> int:
        """Layers whose feed-forward part is a mixture of experts, MTP modules not counted."""
        return self.num_hidden_layers - self.num_dense_layers
