"""benchmarks/gpu_acceptance.py before it meets a GPU: each step on the emulation, what keeps results and says why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from benchmark_files import BENCHMARKS, benchmark

from emoe import model as of_models

acceptance = benchmark("gpu_acceptance")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu-acceptance")


@pytest.mark.parametrize("step", acceptance.MEASURED)
def test_each_step_runs_on_the_emulation_and_its_result_is_on_disk(step, checkpoints, tmp_path, found_device):
    found_device("emulated")
    out = tmp_path / "report.json"
    words = ["--dry-run", "--step", step, "--json", str(out), "--checkpoints", str(checkpoints)]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu_acceptance.py"), *words], capture_output=True, text=True, check=False
    )
    report = json.loads(out.read_text())
    assert report["steps"][step]["state"] == "ok", report["steps"][step]
    assert done.returncode == 0 and list(report["steps"]) == [step]
    assert report["gpu"] == "emulated, a dry run"


def test_values_that_are_wrong_are_not_timed(found_device, tmp_path, monkeypatch):
    found_device("emulated")
    steps = benchmark("gpu_steps")
    bench = steps.Bench("emulated", True, tmp_path)
    monkeypatch.setattr(steps, "_reference", lambda *args: 1.1 * real(*args))
    real = benchmark("gpu_steps")._reference
    with pytest.raises(steps.WrongValueError, match="1 tokens: relative error"):
        steps.kernels(bench)


def _args(tmp_path, **values):
    args = acceptance.parsed(["--json", str(tmp_path / "report.json"), "--dry-run"])
    return SimpleNamespace(**{**vars(args), **values})


def test_a_step_that_fails_or_takes_too_long_says_so_and_the_others_run(tmp_path, monkeypatch, capsys):
    def one(name, args, until):
        if name == "transfer":
            raise RuntimeError("no such device")
        if name == "overlap":
            acceptance.run([sys.executable, "-c", "import time; time.sleep(60)"], 0.2)
        return {"figure": 1.5}

    monkeypatch.setattr(acceptance, "measured", one)
    out = tmp_path / "report.json"
    assert acceptance.main(["--dry-run", "--json", str(out)]) == 1
    steps = json.loads(out.read_text())["steps"]
    assert {name: step["state"] for name, step in steps.items()} == {
        **dict.fromkeys(acceptance.OUTSIDE, "needs a GPU"), "transfer": "failed", "overlap": "out of time",
        **dict.fromkeys(acceptance.MEASURED[2:], "ok"),
    }  # fmt: skip
    assert steps["transfer"]["why"] == "no such device" and "stopped after" in steps["overlap"]["why"]
    assert not list(tmp_path.glob(".report*")), "no half file is left"
    text = capsys.readouterr().out
    assert "no such device" in text and "1.5" in text


def test_a_run_that_was_cut_off_goes_on_and_asks_for_no_more_time_than_there_is(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(acceptance, "measured", lambda name, args, until: ran.append(name) or {})
    out = str(tmp_path / "report.json")
    assert acceptance.main(["--dry-run", "--json", out, "--step", "kernels"]) == 0
    assert acceptance.main(["--dry-run", "--json", out, "--resume"]) == 0
    assert sorted(ran) == sorted(acceptance.MEASURED), "kernels ran once"
    assert acceptance.main(["--dry-run", "--json", out, "--step", "graph"]) == 0
    assert ran[-1] == "graph" and list(json.loads((tmp_path / "report.json").read_text())["steps"]) == ["graph"]
    assert acceptance.main(["--dry-run", "--json", out, "--minutes", "0"]) == 3
    steps = json.loads((tmp_path / "report.json").read_text())["steps"]
    assert steps["graph"] == {"state": "out of time", "why": "not run: no time was left"}


def test_results_of_another_gpu_or_torch_are_not_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(acceptance, "measured", lambda name, args, until: {})
    out = tmp_path / "report.json"
    acceptance.main(["--dry-run", "--json", str(out)])
    report = json.loads(out.read_text())
    out.write_text(json.dumps({**report, "torch": "2.6.0"}))
    ran = []
    monkeypatch.setattr(acceptance, "measured", lambda name, args, until: ran.append(name) or {})
    acceptance.main(["--dry-run", "--json", str(out), "--resume"])
    assert ran == list(acceptance.MEASURED)


def test_a_mask_of_devices_that_is_in_force_is_kept():
    assert acceptance.visible(1, None) == acceptance.visible(1, "") == "1"
    assert acceptance.visible(0, "3,5") == "3" and acceptance.visible(1, "3, MIG-abc") == "MIG-abc"


def test_tests_that_skip_on_a_gpu_are_a_failure(tmp_path, monkeypatch):
    native = ["12 passed, 0 failed\n", "9 passed, 0 failed\n"]
    outputs = iter([*native, "..s\nSKIPPED [2] test_device.py:61: no CUDA part\n2 passed, 2 skipped\n"])
    monkeypatch.setattr(acceptance, "run", lambda *args, **environment: next(outputs))
    with pytest.raises(RuntimeError, match=r"were skipped:\nSKIPPED \[2\] test_device.py:61"):
        acceptance.tests(_args(tmp_path), 1e18)
    outputs = iter([*native, "4 passed in 1 s\n"])
    found = acceptance.tests(_args(tmp_path), 1e18)
    assert found == {"native": "12 passed, 0 failed; 9 passed, 0 failed", "python": "4 passed in 1 s"}


@pytest.mark.parametrize(
    ("torch", "transformers", "said"),
    [("2.11.0+cu130", "5.20.0", ""), ("2.13.0", "5.17.0", "transformers 5.17.0 is older than 5.20: pip install"),
     ("2.5.1", "5.23", "torch 2.5.1 is older than 2.6"), ("10.0", "5.3", "transformers 5.3 is older")],
)  # fmt: skip
def test_versions_that_are_too_old_are_named_with_what_helps(torch, transformers, said):
    problem = acceptance.version_problem({"torch": torch, "transformers": transformers})
    assert problem.startswith(said) and bool(problem) == bool(said)


def test_emoe_says_which_transformers_it_needs_when_it_is_imported(monkeypatch):
    of_models.require_transformers()
    monkeypatch.setattr(of_models, "version", lambda name: "5.17.0")
    with pytest.raises(ImportError, match=r"emoe needs transformers 5.20 or later, this is 5.17.0: pip install"):
        of_models.require_transformers()
    monkeypatch.setattr(of_models, "version", lambda name: "6.0.0.dev0")
    of_models.require_transformers()
    wanted = (BENCHMARKS.parent / "pyproject.toml").read_text()
    oldest = ".".join(map(str, of_models.OLDEST_TRANSFORMERS))
    assert f'"transformers>={oldest}"' in wanted
    assert acceptance.OLDEST["transformers"] == of_models.OLDEST_TRANSFORMERS


PIP = """#!/bin/sh
# A python whose pip downloads files of a given size, and whose version is 3.11.
case "$1 $2 $3" in
  "-c "*) echo 3.11 ;;
  "-m pip download")
    while [ "$1" != --dest ]; do shift; done
    head -c "$WHEEL_BYTES" /dev/zero >"$2/some-$4.whl" ;;
esac
"""


@pytest.fixture
def bundle(tmp_path):
    python = tmp_path / "python"
    python.write_text(PIP)
    python.chmod(0o755)

    def run(*words, wheel_bytes=1000):
        script = BENCHMARKS.parent / "scripts" / "gpu_bundle.sh"
        environment = {**os.environ, "PYTHON": str(python), "WHEEL_BYTES": str(wheel_bytes)}
        return subprocess.run(
            ["bash", str(script), *map(str, words)], capture_output=True, text=True, check=False, env=environment
        )

    return run


def test_the_bundle_holds_the_committed_sources_the_wheels_and_how_to_run_it(bundle, tmp_path):
    out = tmp_path / "out"
    done = bundle(out)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == {"emoe", "wheels", "run.sh", "packages.txt"}
    assert {path.name for path in (out / "wheels").iterdir()} == {"some-3.12.whl", "some-3.11.whl"}
    assert (out / "emoe/benchmarks/gpu_steps.py").is_file() and (out / "emoe/csrc/cuda/gather_mlp.cu").is_file()
    assert not list(out.glob("emoe/emoe/demo/*.safetensors"))
    assert "transformers" in (out / "packages.txt").read_text().split()
    assert subprocess.run(["bash", "-n", str(out / "run.sh")], check=False).returncode == 0
    assert bundle(tmp_path / "one", "3.13").returncode == 0
    assert [path.name for path in (tmp_path / "one/wheels").iterdir()] == ["some-3.13.whl"]


def test_a_bundle_that_is_too_large_is_refused_with_its_size_and_nothing_is_left(bundle, tmp_path):
    done = bundle(tmp_path / "out", wheel_bytes=64 << 20)
    assert done.returncode == 1 and "and 64 are allowed" in done.stderr and "some-3.12.whl" in done.stderr
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".gpu-bundle*"))


def test_a_bundle_is_not_written_over_what_is_there(bundle, tmp_path):
    assert "usage" in bundle().stderr
    done = bundle(tmp_path)
    assert done.returncode == 2 and "is there already" in done.stderr
