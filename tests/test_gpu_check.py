"""make gpu-check, as far as it can be tested without a GPU: parts end in time, what failed or is absent is named."""

import os
import runpy
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("no benchmarks/: not a checkout", allow_module_level=True)
sys.path.append(str(ROOT / "benchmarks"))

import gpu_check  # noqa: E402
from gpu_check import Part, python  # noqa: E402


def ran(command, limit: float = 60.0) -> Part:
    part = Part("part", command, limit)
    gpu_check.run(part, 60.0, dict(os.environ))
    return part


def test_parts_say_how_they_ended():
    assert ran(python("-c", "print('3 passed, 1 skipped in 0.5s')")).result == "ok: 3 passed, 1 skipped"
    failed = ran(python("-c", "print('= 1 failed, 3 passed in 2.00s ='); raise SystemExit(1)"))
    assert failed.result == "FAILED (exit 1): 1 failed, 3 passed"
    assert failed.failed
    assert ran(["no-such-program-anywhere"]).failed
    assert not Part("watched", [], 1.0, result="left out: no time left").failed


def test_a_part_that_overruns_ends_with_all_that_it_started(tmp_path):
    child = f"import time; time.sleep(3); open({str(tmp_path / 'alive')!r}, 'w')"
    script = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(30)"
    assert ran(python("-c", script), limit=1.0).result == "FAILED (over 1 s)"
    time.sleep(3)
    assert not (tmp_path / "alive").exists()


def test_an_optional_part_that_overruns_is_no_failure():
    part = Part("part", python("-c", "import time; time.sleep(30)"), 0.5, optional=True)
    gpu_check.run(part, 60.0, dict(os.environ))
    assert part.result == "left out (over 0 s)"
    assert not part.failed


def test_measuring_ends_in_time_for_a_compiler(monkeypatch):
    commands = []
    monkeypatch.setattr(gpu_check, "run", lambda part, limit_s, environment: commands.append((part.command, limit_s)))
    gpu_check.run_measurement(Part("part", ["run.py"], 90.0), 60.0, {})
    assert commands == [(["run.py", "--minutes", "0.50"], 60.0)]


def test_every_gpu_test_and_every_bench_is_a_part():
    assert {part.command[3] for part in gpu_check.tests()} >= {
        str(p.relative_to(ROOT)) for p in ROOT.glob("tests/gpu/test_*.py")
    }
    names = [part.name for part in gpu_check.measurements()]
    assert names[:2] == ["measure token_logprobs", "measure linear_token_logprobs"]
    assert len(names) >= len(list(ROOT.glob("kernels/*/bench.py")))
    assert all("small" in (ROOT / part.command[8]).read_text() for part in gpu_check.sanitized(gpu_check.tests()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_part_of_tests_says_how_many_passed():
    part = next(part for part in gpu_check.tests() if part.name == "tests test_gpu_tree_scan")
    gpu_check.run(part, 100.0, dict(os.environ))
    assert part.result.startswith("ok: 18 skipped")


def test_shards_have_every_test_once(monkeypatch):
    shard = runpy.run_path(str(ROOT / "tests" / "gpu" / "conftest.py"))["pytest_collection_modifyitems"]
    found = []
    for part in gpu_check.tests():
        if "attention" in part.name:
            monkeypatch.setenv("FASTPO_SHARD", part.environment["FASTPO_SHARD"])
            items = list(range(31))
            shard(items)
            found += items
    assert sorted(found) == list(range(31))


def test_cuda_is_found_behind_a_script(tmp_path):
    home = tmp_path / "cuda"
    (home / "include").mkdir(parents=True)
    (home / "include" / "cuda_runtime.h").touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch(mode=0o755)
    found = gpu_check.toolkit({"CUDA_HOME": str(home), "PATH": str(tmp_path / "bin")})
    assert found["CUDA_HOME"] == str(home)
    assert found["PATH"].split(os.pathsep)[:2] == [str(tmp_path / "bin"), str(home / "bin")]
    (home / "bin").mkdir()
    (home / "bin" / "nvcc").touch(mode=0o755)
    assert gpu_check.toolkit({"PATH": str(home / "bin")})["CUDA_HOME"] == str(home)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run(python("benchmarks/gpu_check.py"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "GPU" in done.stderr


def test_gpu_tests_need_nothing_that_only_training_needs():
    """The machine of gpu-check has no datasets, math-verify, rich, TRL. Collected, and info printed, without them."""
    script = """
import functools, importlib.machinery
absent = {"datasets", "math_verify", "rich", "tensorboard", "trl", "peft", "liger_kernel", "cut_cross_entropy"}
find = importlib.machinery.PathFinder.find_spec
def find_others(name, path=None, target=None):
    return None if name.partition(".")[0] in absent else find(name, path, target)
importlib.machinery.PathFinder.find_spec = functools.partial(find_others)  # no method when others borrow it
import fastpo.info, pytest
fastpo.info.main()
import discovery
found = discovery.benches([])
for bench in found.values():
    for case in bench.cases("small", "cpu"):
        assert "fastpo" in bench.implementations(case)
raise SystemExit(pytest.main(["tests/gpu", "--collect-only", "-q"]))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "benchmarks")))}
    done = subprocess.run(python("-c", script), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_wheels_are_used_without_being_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "peer-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("peer_of_ours.py", "name = 'peer'")
    folder = gpu_check.unpacked(tmp_path / "wheels")
    assert ran(["env", f"PYTHONPATH={folder}", *python("-c", "import peer_of_ours")]).result == "ok"
    with pytest.raises(SystemExit, match="should be a folder of"):
        gpu_check.unpacked(tmp_path)


def test_the_summary_gives_shares_of_the_measured_ceilings():
    row = {"device": "NVIDIA H100", "threads": "8", "op": "token_logprobs", "case": "c", "mode": "forward"}
    row |= {
        "dtype": "bfloat16",
        "shape": "N=8",
        "implementation": "fastpo",
        "p50_ms": "2",
        "rate": "1500",
        "unit": "GB/s",
    }
    rows = [
        row | {"op": "ceiling", "implementation": "torch", "rate": "3000"},
        row,
        row | {"implementation": "trl", "p50_ms": "5"},
    ]
    text = gpu_check.summary(rows)
    assert "50% of 3000" in text
    assert "2.50x trl" in text
