"""A slow router in plain floats, written from the families' sources and not from emoe.routing: the tests' reference."""

from __future__ import annotations

import math

import torch

# How each family scores and what it leaves unnormalised; the rest is softmax over all, normalised.
SIGMOID = {
    *(
        "deepseek_v3",
        "dots1",
        "glm4_moe",
        "glm4_moe_lite",
        "exaone_moe",
        "solar_open",
        "afmoe",
        "minimax_m2",
        "lfm2_moe",
    ),
    *("nemotron_h", "nemotron_h_latent", "minimax_m3_text", "hy_v4", "inkling2_text", "beam"),
}
SQRT_SOFTPLUS = {"deepseek_v4"}
UNNORMALISED = {"olmoe", "flex_olmo", "qwen2_moe", "qwen3_moe", "deepseek_v2", "dots1", "jamba"}
PROBABILITIES = {"gemma4_text"}  # the first output is softmax(logits)
SPARSE_MIXER = {"phimoe"}
SCALES = {
    "deepseek_v3": 2.5,
    "glm4_moe_lite": 1.8,
    "exaone_moe": 2.5,
    "hy_v4": 2.827,
    "deepseek_v4": 1.5,
    "inkling2_text": 8.0,
}


def correction(router, parent):
    """The correction bias as a list of floats, or None."""
    for owner in (router, getattr(router, "moe_statics", None), parent):
        for name in ("e_score_correction_bias", "expert_bias"):
            if isinstance(getattr(owner, name, None), torch.Tensor):
                return getattr(owner, name).flatten().tolist()
    return None


class SlowRouter:
    """One family's rule over one row of logits, and a routing mode on top of it."""

    def __init__(self, family, router, parent):
        self.family = family
        self.correction = correction(router, parent)
        self.groups = getattr(router, "num_group", None) or 1
        self.kept_groups = getattr(router, "topk_group", None) or 1
        self.jitter = getattr(router, "router_jitter_noise", 0.0)
        self.expert_scale = getattr(router, "per_expert_scale", None)

    def logits(self, output):
        return [math.log(value) for value in output] if self.family in PROBABILITIES else list(output)

    def scores(self, logits):
        if self.family in SIGMOID:
            return [1 / (1 + math.exp(-value)) for value in logits]
        if self.family in SQRT_SOFTPLUS:
            return [math.sqrt(math.log1p(math.exp(value))) for value in logits]
        top = max(logits)
        powers = [math.exp(value - top) for value in logits]
        return [power / sum(powers) for power in powers]

    def keys(self, logits):
        """(key of each expert with those outside the chosen groups put down, range)."""
        scores = self.scores(logits)
        choice = scores if self.correction is None else [s + b for s, b in zip(scores, self.correction, strict=True)]
        keys = logits if self.correction is None else choice
        spread = max(keys) - min(keys)
        if self.groups == 1:
            return list(keys), spread
        size = len(logits) // self.groups
        best = {g: sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(self.groups)}
        chosen = sorted(best, key=best.get)[-self.kept_groups :]
        return [key if e // size in chosen else key - 1.25 * spread for e, key in enumerate(keys)], spread

    def picks(self, output, resident, bias, top_k):
        """Ids of the mode's picks: bonus for residents, or residents first where the bias is infinite."""
        logits = self.logits(output)
        keys, spread = self.keys(logits)
        if bias == math.inf:
            rank = {e: (e in resident, key) for e, key in enumerate(keys)}
        else:
            rank = {e: key + (bias * spread if e in resident else 0) for e, key in enumerate(keys)}
        return set(sorted(rank, key=rank.get)[-top_k:])

    def mass(self, output, routed, final):
        """Share of the routed picks' scores that belongs to picks that were replaced."""
        scores = self.scores(self.logits(output))
        return sum(scores[e] for e in routed if e not in final) / sum(scores[e] for e in routed)

    def weights(self, output, final):
        """{expert: weight} that the router gives to these picks."""
        logits = self.logits(output)
        if self.family in SPARSE_MIXER:
            return self._sparse_mixer(logits, final)
        scores = self.scores(logits)
        total = 1.0 if self.family in UNNORMALISED else sum(scores[e] for e in final)
        scale = SCALES.get(self.family, 1.0)
        own = [1.0] * len(scores) if self.expert_scale is None else self.expert_scale.tolist()
        return {e: scores[e] / total * scale * own[e] for e in final}

    def _sparse_mixer(self, logits, final):
        passed_over = {e for e, value in enumerate(logits) if e not in final and value > min(logits[f] for f in final)}
        rivals = {e: value for e, value in enumerate(logits) if e not in passed_over}
        weights = {}
        for expert in sorted(final, key=lambda e: -logits[e]):
            best = logits[expert]
            near = [v for v in rivals.values() if (best - v) / max(abs(v), best) <= 2 * self.jitter]
            weights[expert] = math.exp(best) / sum(math.exp(v) for v in near)
            del rivals[expert]
        return weights
