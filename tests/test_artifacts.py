"""Files are whole or absent: a write that fails or is killed leaves what was there."""

import errno
import os
import subprocess
import sys

import pytest
import torch

from fastpo import artifacts
from fastpo.artifacts import (
    atomic_directory,
    atomic_file,
    iter_jsonl,
    read_json,
    read_jsonl,
    read_tensors,
    write_json,
    write_jsonl,
    write_tensors,
)
from fastpo.errors import FastpoError, RunError


def test_round_trips(tmp_path):
    rows = [{"text": "naïve\u2028 line", "n": 1}, {"x": [1.5, None]}]
    write_jsonl(tmp_path / "deep" / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "deep" / "rows.jsonl") == rows
    write_json(tmp_path / "value.json", {"a": [1, 2]})
    assert read_json(tmp_path / "value.json") == {"a": [1, 2]}
    tensors = {"logps": torch.arange(6.0)[::2], "cu_seqlens": torch.tensor([0, 3])}  # a strided view too
    write_tensors(tmp_path / "t.safetensors", tensors)
    loaded = read_tensors(tmp_path / "t.safetensors")
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("error", [RuntimeError("reward"), KeyboardInterrupt()])
def test_a_failing_block_leaves_the_old_file_and_no_temporary(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(type(error)), atomic_file(path) as file:
        file.write(b"half")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch, code):
    write_json(tmp_path / "samples.json", "old")
    write_json(tmp_path / "other.json", "kept")

    def full(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(artifacts.os, "fsync", full)
    with pytest.raises(RunError, match=r"disk full: .*samples\.json could not be written.*intact") as caught:
        write_json(tmp_path / "samples.json", "new")
    assert "\n" not in str(caught.value)
    assert read_json(tmp_path / "samples.json") == "old"
    assert sorted(os.listdir(tmp_path)) == ["other.json", "samples.json"]


@pytest.mark.parametrize(
    "text",
    [
        "Error while serializing: I/O error: No space left on device (os error 28)",  # safetensors
        "[enforce fail at inline_container.cc:672] . unexpected pos 3095616 vs 3095504",  # torch.save
    ],
)
def test_a_full_disk_inside_a_directory(tmp_path, text):
    """What libraries write into an atomic directory fails without a code: these texts were met on a full tmpfs."""
    with pytest.raises(RunError, match="disk full"), atomic_directory(tmp_path / "model") as folder:
        (folder / "weights").write_bytes(b"half")
        raise RuntimeError(text)
    assert os.listdir(tmp_path) == []


def test_other_os_errors_pass(tmp_path):
    with pytest.raises(PermissionError), atomic_file(tmp_path / "file"):
        raise PermissionError(errno.EACCES, "no")


def test_directory_replaces_the_old_one(tmp_path):
    for text in ("one", "two"):
        with atomic_directory(tmp_path / "model") as folder:
            (folder / text).write_text(text)
    assert os.listdir(tmp_path / "model") == ["two"]
    assert os.listdir(tmp_path) == ["model"]


def test_sigkill_in_a_write_leaves_the_old_file(tmp_path):
    """The process dies in the middle of the second write; the next write also clears what it left behind."""
    script = (
        "import os, signal, sys\n"
        "from fastpo.artifacts import atomic_file, write_text\n"
        "write_text(sys.argv[1], 'old')\n"
        "with atomic_file(sys.argv[1]) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "file"
    killed = subprocess.run([sys.executable, "-c", script, path], cwd=os.getcwd())
    assert killed.returncode == -9
    assert path.read_text() == "old"
    artifacts.write_text(path, "new")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1', "not JSON"),
        (b"[1, 2]", "a list, it should be a JSON object"),
        (b'{"a": "\xff"}', "not UTF-8"),
    ],
)
def test_malformed_lines_name_file_and_line(tmp_path, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b"\n" + b'{"a": 2}\n')
    with pytest.raises(FastpoError, match=rf"rows\.jsonl:3: .*{reason}"):
        read_jsonl(path)
    found = list(iter_jsonl(path))
    assert [number for number, _ in found] == [1, 3, 4]
    assert reason in found[1][1]


def test_missing_file():
    with pytest.raises(FastpoError, match=r"cannot read absent\.jsonl: No such file"):
        read_jsonl("absent.jsonl")
