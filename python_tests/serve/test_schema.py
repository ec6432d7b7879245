"""Whatever fits the server's own schema, or does not, is no failure of the server."""

from __future__ import annotations

import pytest
import serving
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")


@pytest.fixture(scope="module")
def schema(tiny):
    """Answers are short, so that many examples take no time."""
    with serving.running(
        serving.engine_of(*tiny), tiny[1], output_default=2, output_tokens=4, choices=2, request_seconds=20
    ) as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


OPERATIONS = [
    ("/v1/chat/completions", "POST"),
    ("/v1/completions", "POST"),
    ("/v1/models/{name}", "GET"),
    ("/v1/models", "GET"),
    ("/status", "GET"),
    ("/metrics", "GET"),
    ("/health", "GET"),
    ("/", "GET"),
]


# schemathesis' own way into pytest needs names that pytest does not promise; its cases are plain Hypothesis.
@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_no_request_of_the_schema_is_a_failure_of_the_server(schema, path, method, mode):
    cases = schema[path][method].as_strategy(generation_mode=schemathesis.GenerationMode(mode))

    @given(case=cases)
    @settings(max_examples=50 if method == "POST" else 5, suppress_health_check=list(HealthCheck))
    def holds(case):
        answer = case.call(timeout=60)
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"} and error["message"]

    try:
        holds()
    except Unsatisfiable:
        assert mode == "negative" and method == "GET", "nothing of it can be wrong"


def test_the_schema_names_every_path_and_has_no_loose_ends(schema):
    raw = schema.raw_schema
    assert set(raw["paths"]) == {
        "/", "/status", "/health", "/metrics", "/v1/models", "/v1/models/{name}", "/v1/chat/completions",
        "/v1/completions",
    }  # fmt: skip
    names = set(raw["components"]["schemas"])
    assert {"ChatRequest", "CompletionRequest", "Message", "TextPart"} <= names
    chat = raw["components"]["schemas"]["ChatRequest"]
    assert chat["additionalProperties"] is False and "ttft_slo_ms" in chat["properties"]
    headers = {each["name"] for each in raw["paths"]["/v1/chat/completions"]["post"]["parameters"]}
    assert headers == {"x-emoe-task", "x-slo-ttft-ms", "x-slo-tpot-ms", "x-slo-ttlt-ms"}
