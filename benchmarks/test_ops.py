"""``pytest benchmarks``: every op against its peers under pytest-benchmark, a group per case.

The cases are those of a suite, "small" unless ``--suite`` names another; outputs are checked first. ``run.py`` times
implementations in turn and knows the floor: figures that are quoted come from there.
"""

import pytest
import torch
from discovery import identity, refresher
from verify import gate


def test_op(benchmark, op, bench, case, implementation, device):
    inputs, runs = bench.setup(case, device), bench.implementations(case)
    run, refresh = runs[implementation], refresher(bench, case)
    failed = gate(bench, case, inputs, {"fastpo": runs["fastpo"], implementation: run})
    if failed:
        pytest.skip(failed[implementation])
    benchmark.group = " ".join(identity(op, case).values())

    def setup():
        refresh(inputs)
        return (inputs,), {}

    def synchronized(inputs):
        run(inputs)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(synchronized, setup=setup, rounds=20, warmup_rounds=2)
