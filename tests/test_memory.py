"""Page faults of memory that is taken again, counted in a process of its own, for malloc has no way back."""

import subprocess
import sys

import pytest

from fastpo.memory import default_freed_memory, keep_freed_memory, return_freed_memory

_PROGRAM = """
import resource, sys, torch
from fastpo.memory import default_freed_memory, keep_freed_memory, return_freed_memory

assert sys.argv[1] == "untouched" or keep_freed_memory()
assert sys.argv[1] != "default" or default_freed_memory()
assert sys.argv[1] != "returned" or return_freed_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    before = faults()
    kept = [torch.ones(12 << 20) for _ in range(3)]  # 48 MiB each: above what malloc keeps by itself
    return faults() - before

print(min(step() for _ in range(6)))  # malloc may need some steps to find places that fit
"""


def _faults(way: str) -> int:
    done = subprocess.run([sys.executable, "-c", _PROGRAM, way], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_later_steps_find_the_memory_of_the_first():
    pages = 3 * 48 * 256
    assert _faults("kept") < pages / 20
    if "always" not in _huge_pages():
        assert _faults("untouched") > pages / 2
        assert _faults("default") > pages / 2
        assert _faults("returned") > pages / 2  # kept first, then given back


def _huge_pages() -> str:
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled", encoding="ascii") as file:
            text = file.read()
    except OSError:
        return ""
    return text[text.find("[") : text.find("]")]


def test_without_glibc_nothing_is_done(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory() and not default_freed_memory() and not return_freed_memory()
