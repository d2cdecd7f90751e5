"""The op folders of ``kernels/``, importable as ``fastpo.kernels.<op>``.

In a wheel the op folders are installed below this package. In a checkout they stand in the top-level
``kernels/``, which must not be a package itself: transformers probes for a package of that name. There, and only
there (``csrc/`` stands beside it; in a wheel that parent is site-packages), this package's path is extended to it.
"""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2]
if (_checkout / "csrc").is_dir() and (_checkout / "kernels").is_dir():
    __path__.append(str(_checkout / "kernels"))
