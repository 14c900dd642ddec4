import os
import signal
import stat
import subprocess
import sys

import pytest

from kappa_lightning.files import replacing, write_bytes, write_text


def names(folder):
    return sorted(os.listdir(folder))


def test_text_is_written_in_utf8_with_its_line_ends(tmp_path):
    write_text(tmp_path / "a.txt", "κ\r\n\n")
    assert (tmp_path / "a.txt").read_bytes() == "κ\r\n\n".encode()


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    write_bytes(tmp_path / "a", b"old")
    monkeypatch.setattr(os, failing, lambda *given, **options: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "a", "old")

    def half():
        with replacing(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path):
    write_text(tmp_path / "a", "old")
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "a").read_text() == "old"
        assert temporary.parent == tmp_path
    assert (tmp_path / "a").read_text() == "new"


def test_others_may_read_the_file_as_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_symbolic_link_stays_one_and_its_target_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    write_text(tmp_path / "elsewhere" / "a", "old")
    (tmp_path / "link").symlink_to("elsewhere/a")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "a").read_text() == "new"


def test_folder_in_the_place_of_the_file_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError, match="name a file"):
        write_text(tmp_path / "a", "new")
    assert names(tmp_path) == ["a"]


WRITER = """
import sys
from kappa_lightning.files import replacing
with replacing(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def writing(tmp_path):
    """Another process in the middle of writing ``a``."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "a")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"writing\n"
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate()


def test_what_a_killed_write_left_is_deleted_by_the_next(tmp_path, writing):
    writing.send_signal(signal.SIGKILL)
    writing.wait()
    (left,) = names(tmp_path)
    for bystander in (f"{left}x", ".b.12345678.tmp", ".a.notes.tmp"):
        (tmp_path / bystander).write_text("somebody's")
    write_text(tmp_path / "a", "new")
    assert names(tmp_path) == sorted(["a", f"{left}x", ".b.12345678.tmp", ".a.notes.tmp"])


def test_what_another_process_is_writing_is_left_alone(tmp_path, writing):
    write_text(tmp_path / "a", "new")
    assert len(names(tmp_path)) == 2
    writing.communicate()
    assert writing.returncode == 0
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "half"


def test_error_names_the_file_that_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^none/a cannot be written: there is no folder none; create it"):
        write_text("none/a", "new")
    long = "a" * 300
    with pytest.raises(OSError, match="too long") as caught:
        write_text(long, "new")
    assert caught.value.filename == long
    os.symlink(tmp_path / "gone" / "b", "link")
    with pytest.raises(FileNotFoundError, match=rf"^link cannot be written: there is no folder {tmp_path}/gone"):
        write_text("link", "new")
