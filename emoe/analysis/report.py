"""Writes an analysis as one HTML file with its pictures inside and a JSON file beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from emoe import __version__
from emoe.analysis.figures import Series, curves, heat_map, lanes
from emoe.analysis.run import Analysis
from emoe.memory import format_bytes

HTML, JSON = "report.html", "report.json"

_STYLE = """
body { font: 15px/1.5 Helvetica, Arial, sans-serif; color: #222; background: #fff }
body { max-width: 900px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.6em } h2 { font-size: 1.25em; margin-top: 2.2em; border-top: 1px solid #ddd; padding-top: .8em }
figure { margin: 1em 0 } figcaption { color: #555; font-size: .92em; max-width: 760px }
table { border-collapse: collapse; font-size: .92em; margin: 1em 0 }
th, td { padding: .2em .8em; text-align: right; border-bottom: 1px solid #e4e4e4 }
th:first-child, td:first-child { text-align: left } th { background: #f4f4f4; font-weight: 600 }
svg { max-width: 100%; height: auto } code { background: #f4f4f4; padding: 0 .2em }
"""


def write(analysis: Analysis, folder: Path) -> dict[str, str]:
    """Writes report.html and report.json.

    Returns:
        Paths of the files, by kind: html, json, and timeline where there is one.

    Raises:
        OSError: the folder cannot be written.
    """
    html, data = folder / HTML, folder / JSON
    html.write_text(render(analysis), encoding="utf-8")
    data.write_text(json.dumps(analysis.to_dict(), indent=1), encoding="utf-8")
    paths = {"html": str(html), "json": str(data)}
    if analysis.timeline is not None:
        paths["timeline"] = str(folder / "timeline.json")
    return paths


def render(analysis: Analysis) -> str:
    """The whole page; it fetches nothing."""
    facts = analysis.facts
    title = f"Routing of {Path(str(facts.get('model') or 'recorded traces')).name}"
    parts = [f"<h1>{escape(title)}</h1>", _facts(facts)]
    sections: list[tuple[str, Callable[[Analysis], str]]] = [
        ("Correlation of expert use", _correlations),
        ("One base set for p requests", _periods),
        ("Sensitivity of tasks", _sensitivity),
        ("Hit rate against budget", _hit_rates),
        ("Hot sets of tasks", _overlap),
        ("Transfers against computation", _timeline),
    ]
    for name, section in sections:
        body = section(analysis)
        if body:
            parts.append(f"<h2>{escape(name)}</h2>\n{body}")
    parts.append(f"<p><small>emoe {__version__}. Definitions: docs/traces.md. All figures: {JSON}.</small></p>")
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{escape(title)}</title>"
    body = "\n".join(parts)
    return (
        f"<!doctype html>\n<html lang='en'><head>{head}<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _facts(facts: dict[str, Any]) -> str:
    rows = [("tokens", f"{facts['tokens']} of {facts['prompts']} prompts"), ("tasks", ", ".join(facts["tasks"]))]
    rows.append(("experts", f"top {facts['top_k']} of {facts['num_experts']} in each of {facts['layers']} layers"))
    rows.append(("resident", f"{facts['resident']:.0%} of the experts where nothing else is said"))
    if "perplexity" in facts:
        rows.append(("perplexity", f"{facts['perplexity']:.2f} with every expert, on these texts"))
    return _table([], rows)


def _correlations(analysis: Analysis) -> str:
    found = analysis.correlations
    numbers = [str(layer) for layer in range(len(found.layers))]
    off = found.layers[~np.eye(len(numbers), dtype=bool)]
    low = min(0.0, *found.tokens.tolist())
    layers = heat_map(
        np.where(np.eye(len(numbers), dtype=bool), np.nan, found.layers), numbers, numbers,
        row_label="layer that is known", column_label="layer that is predicted", unit="correlation",
    )  # fmt: skip
    between = list(range(1, len(numbers)))
    adjacent = curves(
        [Series("from the layer before", between, found.adjacent.tolist())],
        x_label="layer", y_label="correlation", y_range=(0.0, 1.0), height=260,
    )  # fmt: skip
    lags = list(range(1, len(found.tokens) + 1))
    tokens = curves(
        [
            Series("same prompt", lags, found.tokens.tolist()),
            Series("other prompts", lags, [found.tokens_elsewhere] * len(lags), dashed=True),
        ],
        x_label="tokens apart", y_label="correlation", y_range=(low, 1.05 * max(0.1, *found.tokens.tolist())),
        height=280,
    )  # fmt: skip
    many = len(found.prompt_tasks)
    prompts = heat_map(
        np.where(np.eye(many, dtype=bool), np.nan, found.prompts), found.prompt_tasks, found.prompt_tasks,
        row_label="prompt", column_label="prompt", unit="correlation",
    )  # fmt: skip
    same = np.array([[a == b for b in found.prompt_tasks] for a in found.prompt_tasks]) & ~np.eye(many, dtype=bool)
    other = ~same & ~np.eye(many, dtype=bool)
    rows = [
        ("a layer and the next", _mean(found.adjacent)),
        ("any two layers", _mean(off)),
        ("a token and the next, same prompt", _mean(found.tokens[:1])),
        ("two tokens of different prompts", f"{found.tokens_elsewhere:.2f}"),
        ("two prompts of one task", _mean(found.prompts[same])),
        ("two prompts of different tasks", _mean(found.prompts[other])),
    ]
    return "\n".join(
        [
            _table(["Pearson correlation, mean", ""], rows),
            _figure(layers, "How well the experts of one layer predict those of another for the same token: "
                    "correlation of predicted and actual use, each expert's mean taken out; 0 is no better than its "
                    "frequency. Fitted by ridge regression on every second prompt, shown on the others."),
            _figure(adjacent, "The same from each layer to the next."),
            _figure(tokens, "Use of experts by two tokens of one prompt, by their distance."),
            _figure(prompts, "Use of experts (all layers) by two prompts, grouped by task."),
        ]
    )  # fmt: skip


def _periods(analysis: Analysis) -> str:
    periods = analysis.periods
    measured = [each for each in periods if each.perplexity is not None and each.exact_perplexity is not None]
    x = [float(each.period) for each in periods]
    text = (
        f"<p>A workload of {analysis.facts['requests']} requests in stretches of one task. After every p of them the "
        "base set of each layer becomes the experts that recent requests used most; a routed expert outside it gives "
        "way to the router's next choice inside it (mode <code>resident</code>).</p>"
    )
    rows = []
    for each in periods:
        row = [str(each.period), f"{100 * each.coverage:.1f} %", f"{each.moves:.1f}"]
        if measured and each.perplexity is not None and each.exact_perplexity is not None:
            row += [
                f"{each.perplexity:.2f}", f"{each.perplexity / each.exact_perplexity:.3f}",
                f"{100 * (each.substituted_mass or 0):.1f} %", f"{each.forward_ms:.0f}", f"{each.refresh_ms:.1f}",
            ]  # fmt: skip
        rows.append(tuple(row))
    header = ["p", "picks covered", "moves a request"]
    if measured:
        header += ["perplexity", "times exact", "mass substituted", "ms a request", "ms of refresh"]
    pictures = [
        _figure(
            curves([Series("picks covered", x, [100 * each.coverage for each in periods])], x_label="p, requests",
                   y_label="percent of picks", x_ticks=x, height=260),
            "Share of the router's own picks that the base set has.",
        )
    ]  # fmt: skip
    if measured:
        mx = [float(each.period) for each in measured]
        total = [(each.forward_ms or 0.0) + (each.refresh_ms or 0.0) for each in measured]
        pictures.append(
            _figure(
                curves(
                    [
                        Series("resident", mx, [each.perplexity or 0.0 for each in measured]),
                        Series("every expert", mx, [each.exact_perplexity or 0.0 for each in measured], dashed=True),
                    ],
                    x_label="p, requests", y_label="perplexity", x_ticks=mx, height=260,
                ),
                "Perplexity of the requests' texts.",
            )
        )  # fmt: skip
        pictures.append(
            _figure(
                curves(
                    [
                        Series("forward and refresh", mx, total),
                        Series("refresh alone", mx, [each.refresh_ms or 0.0 for each in measured], dashed=True),
                    ],
                    x_label="p, requests", y_label="ms a request", x_ticks=mx, height=260,
                ),
                "Time of one request: one forward of its text (the shortest there was), and its share of refreshes.",
            )
        )  # fmt: skip
    return text + _table(header, rows) + "\n".join(pictures)


def _sensitivity(analysis: Analysis) -> str:
    profile = analysis.sensitivity
    if profile is None:
        return ""
    x = [float(depth) for depth in range(profile.layers + 1)]
    series = [Series(task, x, row.tolist()) for task, row in zip(profile.tasks, profile.similarity, strict=True)]
    series.append(Series("threshold", x, [profile.threshold] * len(x), dashed=True))
    rows = [
        (task, f"{profile.sensitivity(task):.3f}", str(int(profile.insensitive(task).sum()))) for task in profile.rank()
    ]
    return _table(["task", "sensitivity", "insensitive layers"], rows) + _figure(
        curves(series, x_label="first layers routed at random", y_label="similarity of outputs", y_range=(0.0, 1.0),
               points=False),
        "Overlap of the next-token distributions with the untouched model's, along its own greedy answers. Sensitivity "
        "is the mean loss of similarity over all depths.",
    )  # fmt: skip


def _hit_rates(analysis: Analysis) -> str:
    rates = analysis.hit_rates
    x = [100 * share for share in rates.shares]
    loading = curves(
        [Series(name, x, y, dashed=name == "belady") for name, y in rates.loading.items()],
        x_label="percent of the experts resident", y_label="hit rate, percent of picks",
        y_range=_percents(rates.loading),
    )  # fmt: skip
    regret = curves(
        [Series(name, x, y) for name, y in rates.regret().items()],
        x_label="percent of the experts resident", y_label="points below the optimum", height=280,
    )  # fmt: skip
    without = curves(
        [Series(name, x, y) for name, y in rates.without.items()],
        x_label="percent of the experts resident", y_label="coverage, percent of picks",
        y_range=_percents(rates.without),
    )  # fmt: skip
    shown = [place for place in range(len(x)) if place % max(1, len(x) // 6) == 0]
    header = ["policy", "misses", *(f"{x[place]:.0f} %" for place in shown), "loads a token"]
    rows = [
        (name, kind, *(f"{values[place]:.1f}" for place in shown),
         " / ".join(f"{rates.loads[name + suffix][place]:.1f}" for place in (shown[0], shown[-1])))
        for kind, suffix, group in (("loaded", "", rates.loading), ("go without", " (without)", rates.without))
        for name, values in group.items()
    ]  # fmt: skip
    return "\n".join(
        [
            f"<p>{rates.tokens} tokens of prompts in random order, slots empty at first; the first half of each task's "
            "prompts is learned from and not counted. <code>belady</code> knows the future: no policy that loads its "
            "misses hits more. Loads at the smallest and the largest budget of the table.</p>",
            _table(header, rows),
            _figure(loading, "Misses are loaded: picks found in a slot."),
            _figure(regret, "Belady regret of the same policies."),
            _figure(without, "Misses go without: picks that the resident set covers."),
        ]
    )


def _overlap(analysis: Analysis) -> str:
    found = analysis.overlap
    if len(found.tasks) < 2:
        return ""
    picture = heat_map(
        found.jaccard, found.tasks, found.tasks, row_label="task", column_label="task", unit="shared / joint experts",
        limits=(0.0, 1.0), numbers=True,
    )  # fmt: skip
    return _figure(
        picture,
        f"Jaccard index of the {found.share:.0%} of the experts that each task uses most, mean over layers. The "
        f"diagonal compares the two halves of a task's own prompts. Random sets have {found.by_chance:.2f}.",
    )


def _timeline(analysis: Analysis) -> str:
    if analysis.timeline is None:
        return ""
    sums = analysis.timeline.summary()
    rows = [
        ("recorded", f"{sums['seconds']:.2f} s"),
        ("in decoder layers", f"{sums['layer_seconds']:.2f} s"),
        ("of that, waiting for experts", f"{sums['waited_seconds']:.2f} s"),
        ("experts read", f"{sums['transfers']}, {format_bytes(sums['transferred_bytes'])}"),
        ("some transfer under way", f"{sums['transfer_seconds']:.2f} s"),
    ]
    if sums["hidden_share"] is not None:
        rows.append(("of that, while something was computed", f"{100 * sums['hidden_share']:.0f} %"))
    step = analysis.timeline.step()
    picture = "" if not step else _figure(
        lanes(step, x_label="ms"),
        "The last forward, one token: experts modules, the times they stood still, and experts read.",
    )  # fmt: skip
    return (
        _table([], rows)
        + picture
        + (
            "<p><code>timeline.json</code> has every transfer and layer; open it at https://ui.perfetto.dev or in "
            "chrome://tracing. Times are taken in Python: a transfer ends when its end was seen.</p>"
        )
    )


def _percents(curves_of: dict[str, list[float]]) -> tuple[float, float]:
    """An axis up to 100 from the ten below the lowest point."""
    return 10.0 * (min(min(values) for values in curves_of.values()) // 10), 100.0


def _mean(values: Any) -> str:
    return f"{float(np.mean(values)):.2f}" if np.size(values) else "-"


def _figure(picture: str, caption: str) -> str:
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """`header` may be empty."""
    head = "<tr>" + "".join(f"<th>{escape(name)}</th>" for name in header) + "</tr>" if header else ""
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{head}{body}</table>"
