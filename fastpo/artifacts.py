"""Files that are either whole or absent.

Each writer puts its bytes in a temporary file of the same directory, fsyncs it, renames it over the target and fsyncs
the directory. A reader, or a run restarted after SIGKILL or power loss, sees the old file, the new file, or none. A
write that fails (a full disk) removes its temporary file, leaves what was there, and raises one line that says so.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from fastpo.errors import FastpoError, RunError

StrPath = str | os.PathLike[str]


def temporary(path: Path) -> Path:
    """Where ``path`` is built. Fixed, so that what a killed run left behind is overwritten and never piles up."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def atomic_file(path: StrPath) -> Iterator[IO[bytes]]:
    """A binary file that becomes ``path`` when the block ends without an error."""
    path = Path(path)
    partial = temporary(path)
    with _reported(path, partial):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_directory(path.parent)


@contextmanager
def atomic_directory(path: StrPath) -> Iterator[Path]:
    """An empty directory that becomes ``path`` when the block ends without an error; an old ``path`` is replaced.

    Replacing is a removal and a rename; a kill between them leaves no ``path``, and the stage that makes it runs again.
    """
    path = Path(path)
    partial = temporary(path)
    with _reported(path, partial):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for file in sorted(p for p in partial.rglob("*") if p.is_file()):
            _sync_file(file)
        _sync_directory(partial)
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)
        _sync_directory(path.parent)


@contextmanager
def _reported(path: Path, partial: Path) -> Iterator[None]:
    """Removes ``partial`` on any error and turns those of the file system into one line."""
    try:
        yield
    except BaseException as error:
        free = shutil.disk_usage(next(p for p in path.parents if p.is_dir())).free
        _remove(partial)
        if not _disk_is_full(error):
            raise
        raise RunError(
            f"disk full: {path} could not be written ({free / 2**20:.0f} MiB free); the temporary file is removed and "
            "everything finished before is intact: free some space and run the same command again"
        ) from error


def _disk_is_full(error: BaseException) -> bool:
    """ENOSPC and EDQUOT, also as safetensors ("os error 28") and torch.save (its zip writer lost its place) say it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return isinstance(error, Exception) and any(sign in str(error) for sign in ("os error 28", "inline_container.cc"))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: StrPath, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


def write_json(path: StrPath, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: StrPath, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object per line, keys in their given order (the file is a pure function of the rows)."""
    with atomic_file(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def write_tensors(path: StrPath, tensors: dict[str, Tensor]) -> None:
    """A safetensors file. ``tensors`` of any shape and device; they are copied to the CPU."""
    from safetensors.torch import save

    with atomic_file(path) as file:
        file.write(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def read_json(path: StrPath) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FastpoError(f"{path}: not JSON ({error})") from error


def read_tensors(path: StrPath) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def read_jsonl(path: StrPath) -> list[dict[str, Any]]:
    """Every row of a JSONL file; the first malformed line raises with file and line."""
    rows = []
    for number, row in iter_jsonl(path):
        if isinstance(row, str):
            raise FastpoError(f"{path}:{number}: {row}")
        rows.append(row)
    return rows


def iter_jsonl(path: StrPath) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line number from 1, the object) of each line that is not blank; a string in its place says what is wrong."""
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed below; opened apart so that only its own errors are translated)
    except OSError as error:
        raise FastpoError(f"cannot read {path}: {error.strerror}") from error
    with file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parse_line(line)


def _parse_line(line: bytes) -> dict[str, Any] | str:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"not UTF-8 ({error.reason} at byte {error.start})"
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg} at column {error.colno})"
    if not isinstance(row, dict):
        return f"a {type(row).__name__}, it should be a JSON object"
    return row


def file_digest(path: StrPath) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FastpoError(f"cannot read {path}: {error.strerror}") from error
