"""Options and parameters of ``pytest benchmarks``."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_addoption(parser):
    group = parser.getgroup("fastpo")
    group.addoption("--suite", default="small", help="suite of cases (default: small)")
    group.addoption("--ops", nargs="*", default=[], help="names of ops; all by default")


def pytest_generate_tests(metafunc):
    if "implementation" not in metafunc.fixturenames:
        return
    import torch
    from discovery import benches

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    for op, bench in benches(metafunc.config.getoption("ops")).items():
        for case in bench.cases(metafunc.config.getoption("suite"), device):
            found += [(op, bench, case, name, device) for name in bench.implementations(case)]
    ids = [f"{op}-{case.name} {case.mode}-{name}".replace(" ", "_") for op, _, case, name, _ in found]
    metafunc.parametrize(("op", "bench", "case", "implementation", "device"), found, ids=ids)
