"""``FASTPO_SHARD=i/n`` runs the i-th of n parts of the tests: what Triton compiles for minutes takes n processes."""

import os


def pytest_collection_modifyitems(items):
    part, _, parts = os.environ.get("FASTPO_SHARD", "0/1").partition("/")
    items[:] = items[int(part) :: int(parts)]
