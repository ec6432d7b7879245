"""`emoe serve --ray` as a process with two replicas: OpenAI's client, who gets a request, a replica that is killed."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import signal
import subprocess
import sys

import httpx
import numpy as np
import openai
import psutil
import pytest
import serving

from emoe.predictor.table import TaskTable

pytest.importorskip("ray.serve", reason="needs emoe[ray]")

NAME = "tiny"
SECONDS = 240.0  # for what takes some seconds on an idle machine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def _environment():
    """Without a cluster of somebody else's."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


@pytest.fixture(scope="module")
def table(tmp_path_factory, tiny):
    """A predictor for which two tasks use different experts."""
    layers = len(tiny[0].emoe.residents())
    frequency = np.zeros((2, layers, tiny[0].emoe.residents()[0][0]), dtype=np.float32)
    half = frequency.shape[2] // 2
    frequency[0, :, :half], frequency[1, :, half:] = 1.0, 1.0
    path = tmp_path_factory.mktemp("table") / "table.safetensors"
    TaskTable(frequency, ("a", "b")).save(path)
    return path


class Server:
    """A server over Ray, from its start to its drain."""

    def __init__(self, folder, table):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "emoe", "serve", "--ray", "--replicas", "2", "--replica-cpus", "1",
             "--model", str(folder), "--memory-budget", "70%", "--context", "512", "--most-running", "2",
             "--predictor", str(table), "--port", "0", "--name", NAME, "--json"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=_environment(),
        )  # fmt: skip
        self.told: list[str] = []
        self._telling = serving.in_thread(lambda: self.told.extend(self.process.stderr))
        lines = []
        while not lines or lines[-1] != "}\n":
            lines.append(self.process.stdout.readline())
            assert lines[-1], "".join(self.told)
        self.url = json.loads("".join(lines))["url"]
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=SECONDS)

    def status(self):
        return httpx.get(f"{self.url}/status", timeout=SECONDS).json()

    def metric(self, name):
        text = httpx.get(f"{self.url}/metrics", timeout=SECONDS).text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.split("{")[0].split()[0] == name)

    def replicas(self):
        """Processes of engines."""
        found = []
        for each in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if each.cmdline() and each.cmdline()[0].startswith("ray::ServeReplica:emoe:Replica"):
                    found.append(each)
        return found

    def settled(self):
        serving.until(lambda: not self.status()["requests"] and len(self.status()["replicas"]) == 2, SECONDS)

    def stream(self, got, task=None, **given):
        """Takes a stream in a thread; `got` gets texts, then a finish_reason, or the error that ended it."""

        def take():
            try:
                extra = {"ignore_eos": True} | ({} if task is None else {"task": task})
                reason = None
                for piece in self.client.completions.create(
                    model=NAME, prompt="abc", stream=True, extra_body=extra, **given
                ):
                    got.append(piece.choices[0].text)
                    reason = piece.choices[0].finish_reason or reason
                got.append(("ended", reason))
            except Exception as error:
                got.append(error)

        return serving.in_thread(take)

    def end(self):
        """Whatever is left of it: Ray's processes are this process's children."""
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            for each in children:
                with contextlib.suppress(psutil.Error):
                    each.kill()
        self.process.wait()
        self._telling.join(SECONDS)
        self.process.stdout.close()
        self.process.stderr.close()


@pytest.fixture(scope="module")
def cluster(chat_folder, table):
    server = Server(chat_folder, table)
    yield server
    server.end()


def test_clients_get_what_one_server_gives_them(cluster, server):
    asked = {"model": NAME, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "logprobs": True}
    here = cluster.client.chat.completions.create(**asked, seed=5, temperature=0.8)
    there = server.client.chat.completions.create(**asked, seed=5, temperature=0.8)
    assert here.choices[0].message.content == there.choices[0].message.content
    assert here.usage.completion_tokens == there.usage.completion_tokens
    assert [each.token for each in here.choices[0].logprobs.content] == [
        each.token for each in there.choices[0].logprobs.content
    ]
    pieces = list(cluster.client.chat.completions.create(**asked, stream=True, seed=5, temperature=0.8))
    assert "".join(each.choices[0].delta.content or "" for each in pieces) == here.choices[0].message.content
    assert pieces[-1].choices[0].finish_reason == here.choices[0].finish_reason
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["ab"]}}}
    made = cluster.client.chat.completions.create(
        model=NAME, messages=asked["messages"], max_tokens=16, response_format=form
    )
    assert json.loads(made.choices[0].message.content) == "ab"


def test_errors_have_openais_shape(cluster):
    with pytest.raises(openai.BadRequestError, match="at most") as raised:
        cluster.client.completions.create(model=NAME, prompt="abc", max_tokens=5000)
    assert raised.value.param == "max_tokens" and raised.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        cluster.client.completions.create(model="other", prompt="abc")
    answer = httpx.post(f"{cluster.url}/v1/completions", content=b"{", headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_json"


def test_reports_are_of_both_replicas(cluster, tiny):
    assert httpx.get(f"{cluster.url}/health").json() == {"status": "ok"}
    cluster.client.completions.create(model=NAME, prompt="abc", max_tokens=4)
    serving.until(lambda: cluster.status()["experts"]["misses"] > 0, SECONDS)
    assert cluster.metric("emoe_replicas") == 2 and cluster.metric("emoe_up") == 1
    seen = cluster.status()
    assert len(seen["replicas"]) == 2 and len(seen["layers"]) == 2 * len(tiny[0].emoe.residents())
    assert seen["scheduler"]["policy"] == "slo+affinity" and seen["way"] == "packed"


def test_a_client_that_leaves_cancels_its_request_on_the_replica(cluster):
    cluster.settled()
    with httpx.stream(
        "POST", f"{cluster.url}/v1/completions", timeout=SECONDS,
        json={"prompt": "abc", "max_tokens": 500, "stream": True, "ignore_eos": True},
    ) as response:  # fmt: skip
        next(response.iter_lines())
    cluster.settled()
    serving.until(lambda: cluster.status()["scheduler"]["running"] == 0, SECONDS)
    serving.until(lambda: cluster.metric("emoe_answers_total") > 0, SECONDS)
    text = httpx.get(f"{cluster.url}/metrics", timeout=SECONDS).text
    assert 'emoe_answers_total{reason="cancelled",task="unknown"}' in text


def served(cluster):
    """Requests so far, by replica and task."""
    return {each["name"]: collections.Counter(each["served"]) for each in cluster.status()["replicas"]}


def shares_beside_their_kind(cluster):
    """How many requests of each task every replica got: of each a long one, and three short ones while that ran.

    None where the long ones ended too early to tell. Counts may be a second old, so it may be wrong once.
    """
    cluster.settled()
    before = served(cluster)
    long = {"a": [], "b": []}
    threads = []
    for task, got in long.items():
        threads.append(cluster.stream(got, task, max_tokens=480))
        serving.until(lambda got=got: got, SECONDS)
    for _ in range(3):
        for task in "ab":
            short = []
            cluster.stream(short, task, max_tokens=2).join(SECONDS)
            assert short[-1] == ("ended", "length")
    early = any(isinstance(each[-1], tuple) for each in long.values())
    for thread in threads:
        thread.join(SECONDS)
    got = []

    def counted():
        got[:] = [counts - before[name] for name, counts in served(cluster).items()]
        return sum(each.total() for each in got) >= 8

    serving.until(counted, SECONDS)
    return None if early else [dict(each) for each in got]


def test_replicas_have_the_priority_of_the_server(cluster):
    own = os.getpriority(os.PRIO_PROCESS, cluster.process.pid)
    assert [os.getpriority(os.PRIO_PROCESS, each.pid) for each in cluster.replicas()] == [own, own]


def test_requests_go_to_the_replica_that_runs_their_kind(cluster):
    expected = [{"a": 4}, {"b": 4}]  # as soon as the router has heard which experts the tasks use
    serving.until(lambda: sorted(shares_beside_their_kind(cluster) or (), key=str) == expected, SECONDS)


def test_a_killed_replica_loses_no_request_that_had_not_begun(cluster):
    cluster.settled()
    before = cluster.metric("emoe_retried_answers_total")
    got = [[] for _ in range(12)]  # of which two run on each replica, and four wait there
    threads = [cluster.stream(each, max_tokens=300) for each in got]
    # Both replicas are at work, and both have others that wait: whichever is killed, some have not begun.
    serving.until(lambda: sum(map(bool, got)) >= 4 and cluster.metric("emoe_waiting_requests") >= 6, SECONDS)
    victim = cluster.replicas()[0]
    victim.send_signal(signal.SIGKILL)
    for thread in threads:
        thread.join(SECONDS)
    ends = [each[-1] for each in got]
    lost = [each for each in got if isinstance(each[-1], Exception)]
    assert all(each[-1] == ("ended", "length") for each in got if each not in lost), ends
    assert all("in the middle of the answer" in str(each[-1]) for each in lost), ends
    assert all(len(each) > 1 for each in lost), "each of these had begun"
    assert len(lost) <= 2 and len([each for each in got if each not in lost]) >= 10
    assert cluster.metric("emoe_retried_answers_total") > before
    cluster.settled()  # Ray has replaced it
    assert victim.pid not in [each.pid for each in cluster.replicas()]


def test_the_first_signal_finishes_what_runs_and_takes_nothing_new(cluster):
    got = []
    thread = cluster.stream(got, max_tokens=400)
    serving.until(lambda: got, SECONDS)
    cluster.process.send_signal(signal.SIGTERM)
    thread.join(SECONDS)
    assert got[-1] == ("ended", "length")
    assert cluster.process.wait(SECONDS) == 0
    assert any("another Ctrl-C ends at once" in line for line in cluster.told)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{cluster.url}/health")


def test_what_ray_cannot_start_is_said_with_its_reason(chat_folder):
    words = ["--model", str(chat_folder), "--memory-budget", "70%", "--port", "0", "--replicas", "1"]
    ended = subprocess.run(
        [sys.executable, "-m", "emoe", "serve", "--ray", *words, "--scheduler", "lifo"],
        capture_output=True, text=True, timeout=SECONDS, check=False, env=_environment(),
    )  # fmt: skip
    assert ended.returncode == 2 and ended.stdout == ""
    assert "emoe: Ray does not run the replicas: " in ended.stderr and "'lifo' is not one of" in ended.stderr
