"""fastpo's fused head inside trainers that people already use: ``integrations.trl``, ``integrations.transformers``.

Nothing is patched at import; each module says in its docstring what its one line changes and what it refuses.
"""
