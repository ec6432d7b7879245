"""Every family that engines know runs the way the table says, and each request gets the tokens of `generate`."""

from __future__ import annotations

import families
import pytest
from engines import PROMPTS, alone, together

from emoe.engine.engine import Engine
from emoe.engine.families import KNOWN

WAYS = {
    **dict.fromkeys(families.FAMILIES, ("packed", False)),
    **dict.fromkeys(
        ("hy_v4", "inkling2_text", "lfm2_moe", "nemotron_h", "nemotron_h_latent", "qwen3_next", "qwen3_5_moe_text"),
        ("forked", False),
    ),
    "jamba": ("forked", True),
    "minimax": ("alone", True),
}


@pytest.mark.parametrize("family", WAYS)
def test_a_family_runs_the_fastest_right_way(family):
    model = families.build(family)
    expected = [alone(model, prompt) for prompt in PROMPTS]
    with Engine(model, chunk_rows=11, most_running=3) as engine:
        assert (engine.choice.way, engine.choice.whole) == WAYS[family]
        assert together(engine, PROMPTS) == expected
    known = KNOWN.get(model.config.get_text_config().model_type, WAYS[family])
    assert family == "nemotron_h_latent" or known == WAYS[family]
