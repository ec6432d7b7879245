"""`emoe serve` as a process: it starts, says where it is, drains, and ends at once when told twice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import commands
import httpx
import openai
import pytest
import serving

from emoe.cli import serve

KEY = "a-key-of-tests"


@contextlib.contextmanager
def _started(folder, *more, **environment):
    """(process, url) of a server of a model."""
    words = [sys.executable, "-m", "emoe", "serve", "--model", str(folder), "--memory-budget", "50%", "--port", "0"]
    process = subprocess.Popen(
        [*words, "--context", "512", "--name", "tiny", "--json", *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment,
    )  # fmt: skip
    try:
        lines = []
        while not lines or lines[-1] != "}\n":
            lines.append(process.stdout.readline())
            assert lines[-1], process.stderr.read()
        yield process, json.loads("".join(lines))["url"]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def _stream(url, got, **given):
    """Takes a stream in a thread; `got` gets its pieces, then None, or the error that ended it."""

    def take():
        try:
            with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
                for piece in client.completions.create(
                    model="tiny", prompt="abc", stream=True, extra_body={"ignore_eos": True}, **given
                ):
                    got.append(piece.choices[0])
            got.append(None)
        except Exception as error:
            got.append(error)

    thread = threading.Thread(target=take)
    thread.start()
    serving.until(lambda: got)
    return thread


@pytest.mark.slow
def test_the_first_signal_finishes_what_runs_and_takes_nothing_new(chat_folder):
    with _started(chat_folder) as (process, url):
        got = []
        thread = _stream(url, got, max_tokens=200)
        process.send_signal(signal.SIGTERM)
        serving.until(lambda: not _reachable(url))
        thread.join(60)
        assert got[-1] is None and got[-2].finish_reason == "length" and len(got) > 2
        assert process.wait(30) == 0
        assert "another Ctrl-C ends at once" in process.stderr.read()


def _reachable(url):
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
def test_what_is_not_finished_in_the_time_to_drain_ends_with_an_error_of_openai(chat_folder):
    with _started(chat_folder, "--limit-drain-seconds", "1") as (process, url):
        body = {"prompt": "abc", "max_tokens": 500, "ignore_eos": True, "n": 16}
        lines, whole = [], []

        def stream():
            with httpx.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}, timeout=60) as answer:
                lines.extend(line for line in answer.iter_lines() if line)

        threads = [
            threading.Thread(target=stream),
            threading.Thread(target=lambda: whole.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60))),
        ]
        for thread in threads:
            thread.start()
        serving.until(lambda: httpx.get(f"{url}/status").json()["output_tokens"])
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "unavailable", lines[-3:]
        assert (whole[0].status_code, whole[0].json()["error"]["code"]) == (503, "unavailable")
        assert process.wait(30) == 0
        assert "not finished in time" in process.stderr.read()


@pytest.mark.slow
def test_the_second_signal_ends_at_once(chat_folder):
    with _started(chat_folder, EMOE_API_KEY=KEY) as (process, url):
        got = []
        threads = [_stream(url, got, max_tokens=500, n=8, temperature=1.0) for _ in range(2)]
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert time.monotonic() - began < 10
        for thread in threads:
            thread.join(30)
        assert any(isinstance(each, Exception) for each in got), "a stream that was cut says so"


@pytest.mark.slow
def test_a_signal_while_nothing_runs_ends_it(chat_folder, tmp_path):
    key = tmp_path / "key"
    key.write_text(f"{KEY}\n")
    with _started(chat_folder, "--api-key-file", str(key)) as (process, url):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        answer = httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {KEY}"})
        assert answer.json()["data"][0]["id"] == "tiny"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


def _fails(capsys, monkeypatch, folder, *words):
    monkeypatch.delenv("EMOE_API_KEY", raising=False)
    status, _, err = commands.run(capsys, "serve", "--model", folder, *words)
    assert status == 2
    return err


def test_a_port_in_use_is_said_before_the_model_is_loaded(capsys, monkeypatch, chat_folder):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        err = _fails(capsys, monkeypatch, chat_folder, "--port", taken.getsockname()[1])
    assert "choose another --host or --port" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "70000"], "no"),
        (["--limit-requests", "0"], "whole number"),
        (["--limit-send-seconds", "nan"], "seconds over 0"),
        (["--api-key-file", "/nowhere/key"], "cannot be read"),
        (["--scheduler", "lifo", "--port", "0"], "lifo"),
        (["--kv-budget", "much", "--port", "0"], "much"),
        (["--context", "1"], "--context 1 leaves no room for an answer"),
        (["--replicas", "3"], "--replicas is for --ray alone"),
        (["--router", "least"], "--router is for --ray alone"),
        (["--replica-cpus", "1"], "--replica-cpus is for --ray alone"),
        (["--ray", "--router", "sideways"], "affinity"),
        (["--ray", "--limit-send-seconds", "3"], "--limit-send-seconds is not for --ray: Ray's proxy has the sockets"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(capsys, monkeypatch, chat_folder, words, said):
    assert said in _fails(capsys, monkeypatch, chat_folder, *words)


@pytest.mark.parametrize("key", ["short", "with a blank", "schlüssel-lang"])
def test_keys_that_a_header_cannot_carry_are_refused(monkeypatch, key):
    monkeypatch.setenv("EMOE_API_KEY", key)
    with pytest.raises(serve.ConfigError, match="API key"):
        serve._key(None)


def test_a_key_that_is_given_twice_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("EMOE_API_KEY", KEY)
    with pytest.raises(serve.ConfigError, match="both give a key"):
        serve._key(str(tmp_path / "key"))


def test_without_the_extra_it_says_what_to_install(capsys, monkeypatch, chat_folder):
    for name in [
        each for each in sys.modules if each.startswith("emoe.serve.") and not each.endswith((".limits", ".setup"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert "pip install 'emoe[serve]'" in _fails(capsys, monkeypatch, chat_folder)


def test_without_ray_it_says_what_to_install(capsys, monkeypatch, chat_folder):
    for name in [each for each in sys.modules if each.startswith("emoe.serve.on_ray")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'emoe[ray]'" in _fails(capsys, monkeypatch, chat_folder, "--ray", "--port", "0")


def test_help_and_the_package_load_no_server():
    code = (
        "import sys, emoe, emoe.cli\n"
        "for words in (['--help'], ['serve', '--help']):\n"
        "    try: emoe.cli.main(words)\n"
        "    except SystemExit: pass\n"
        "found = {'fastapi', 'uvicorn', 'torch', 'pydantic', 'ray'} & set(sys.modules)\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
