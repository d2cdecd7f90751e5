"""Each backend of an op by itself: what the tests on a GPU run on."""

import pytest

from fastpo.dispatch import Op


def one_backend(op: Op, *names: str):
    """A fixture that forces each backend in turn, which raises where it cannot run: nothing else stands in for it."""

    @pytest.fixture(params=names, autouse=True)
    def backend(request, monkeypatch) -> str:
        (found,) = (b for b in op.backends if b.name == request.param)
        reason = found.missing()
        if reason is not None:
            pytest.skip(reason)
        monkeypatch.setenv("FASTPO_BACKEND", request.param)
        return request.param

    return backend
