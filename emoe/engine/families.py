"""How families run, by `model_type` of the text config: what a trial in 16 bits is too coarse to tell.

Each row was compared with `generate` in fp32 (python_tests/engine/test_families.py does it again). A family that is not
here is tried in every way.
"""

from __future__ import annotations

from emoe.engine.runner import Way

PACKED = (
    "afmoe", "aria_text", "beam", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo",
    "gemma4_text", "glm4_moe", "glm4_moe_lite", "gpt_oss", "granitemoe", "granitemoeshared", "hunyuan_v1_moe",
    "minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_vl_moe_text", "solar_open",
)  # fmt: skip
FORKED = (
    "deepseek_v32", "glm_moe_dsa", "granitemoehybrid", "hy_v4", "inkling2_text", "lfm2_moe", "llama4_text",
    "nemotron_h", "qwen3_5_moe_text", "qwen3_next", "zaya",
)  # fmt: skip
# A multi-token continuation ignores the recurrent state (jamba), or fails (minimax): prompts run whole.
WHOLE: dict[str, Way] = {"jamba": "forked", "minimax": "alone"}

KNOWN: dict[str, tuple[Way, bool]] = {
    **dict.fromkeys(PACKED, ("packed", False)),
    **dict.fromkeys(FORKED, ("forked", False)),
    **{family: (way, True) for family, way in WHOLE.items()},
}
