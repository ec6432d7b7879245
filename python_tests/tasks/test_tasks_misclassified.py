"""What wrong tasks cost on public traces: a fifth of the prompts misclassified loses three points at most."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import public_traces
import pytest

import emoe
from emoe.replay import Options, mix, replay

LIMIT = 3.0  # points


def misclassified(trace, share, seed=0):
    """A share of the prompts, drawn at random, with another task drawn at random."""
    generator = np.random.default_rng(seed)
    prompts = np.unique(trace.prompt)
    task = trace.task.copy()
    N = len(trace.task_names)
    for prompt in generator.permutation(prompts)[: round(share * len(prompts))]:
        mine = trace.prompt == prompt
        task[mine] = (task[mine][0] + generator.integers(1, N)) % N
    return replace(trace, task=task)


@pytest.fixture(scope="module")
def profile_and_rest():
    traces = [emoe.load_trace(public_traces.need(f"{name}.npz")) for name in public_traces.DOMAINS]
    return mix.prepare(traces, profile=0.5, mix=0)


def test_a_fifth_of_the_prompts_gets_another_task_and_nothing_else_changes(profile_and_rest):
    _, rest = profile_and_rest
    wrong = misclassified(rest, 0.2)
    prompts = np.unique(rest.prompt)
    changed = [prompt for prompt in prompts if (wrong.task != rest.task)[rest.prompt == prompt].any()]
    assert len(changed) == round(0.2 * len(prompts))
    assert (wrong.experts == rest.experts).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("base+slack", Options(slack=0.5)),
        ("trained-next-use", Options(miss="load")),
        ("trained-next-use", Options(miss="substitute")),
    ],
)
def test_a_fifth_of_wrong_tasks_costs_at_most_three_points_of_coverage(policy, options, profile_and_rest):
    profile, rest = profile_and_rest
    right, wrong = (
        replay(trace, policy, [0.3], profile=profile, options=options)[0].hit_rate
        for trace in (rest, misclassified(rest, 0.2))
    )
    assert 100 * (right - wrong) <= LIMIT
