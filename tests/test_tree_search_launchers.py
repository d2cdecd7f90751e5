"""The Triton launchers of tree_search as a GPU's driver would see them: tests/test_triton_launchers.py says how."""

import pytest
from test_triton_launchers import launch

from fastpo.dispatch import triton_missing

TREE_SEARCH = """
from dataclasses import fields
from fastpo.kernels.tree_search import SearchTrees, SelectRule, BackupRule
from fastpo.kernels.tree_search import triton_kernels as kernels
from fastpo.kernels.tree_search.records import BACKUPS, FORMS

def step(batch, nodes, leaves, c, start=False):
    t = SearchTrees.empty(batch, nodes)
    links = (t.parent, t.first_child, t.next_sibling, t.visits, t.pending, t.q)
    out, values = torch.zeros(batch, leaves, dtype=torch.int64), torch.zeros(batch, leaves)
    begin = torch.zeros(batch, dtype=torch.int64) if start else None
    for form in range(len(FORMS)):
        rest = (t.prior, t.expandable, t.closed, t.size, begin, form, c, 1, c, True, form % 2 == 1, c, out)
        kernels.select(*links, *rest)
    for kind in range(len(BACKUPS)):
        kernels.backup(*links, t.reward, t.expandable, t.closed, out, values, kind, c, c, True, c, True)
    kernels.process_values(t.parent, t.size, t.q, t.q, t.value)

step(16, 64, 1, 1.0)
step(16, 64, 1, 1.0, start=True)
before = len(compiled)
for batch, nodes, leaves, c in ((1, 65, 3, 0.5), (17, 512, 16, 1.25), (4096, 1, 2, 2.0)):
    step(batch, nodes, leaves, c)
print(before, len(compiled) - before)
"""


@pytest.mark.skipif(triton_missing() == "triton is not installed", reason="triton is not installed")
def test_compiles_for_any_trees_once():
    """Every form, rule and scope; then no number of trees, nodes or leaves and no constant compiles anything."""
    kinds, more = map(int, launch(TREE_SEARCH).split())
    assert kinds >= 12
    assert more == 0
