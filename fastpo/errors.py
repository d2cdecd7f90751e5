"""The errors a user is meant to read: one line that names the argument, what it was and what it should be.

The command line prints them without a traceback (``--debug`` shows it) and exits with their ``exit_code``.
"""


class FastpoError(ValueError):
    """Bad usage or bad input, found before or while reading it."""

    exit_code = 2


class RunError(FastpoError):
    """The input was fine but the run cannot go on: no pairs, a reward that raises, a full disk. What is done stays."""

    exit_code = 1


def suggestion(name: str, known: list[str] | tuple[str, ...]) -> str:
    """``"; did you mean beta?"`` where one of ``known`` is close to ``name``, else an empty string.

    Of equally close ones that with the same letters: most slips of the hand swap two.
    """
    from difflib import SequenceMatcher, get_close_matches

    name = name.replace("-", "_")
    near = get_close_matches(name, known, n=5)
    if not near:
        return ""
    best = max(near, key=lambda k: (SequenceMatcher(None, k, name).ratio(), sorted(k) == sorted(name)))
    return f"; did you mean {best}?"
