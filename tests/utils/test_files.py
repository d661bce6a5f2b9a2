"""Output files: what they may replace, what stays of the old one, and what is left of saves that were killed."""

import errno
import os
import signal
import socket
import sys
import time

import pytest

from sgfast.utils import files, locks
from sgfast.utils.files import check_output_file, check_output_folder, replacing
from tests.processes import forked, kill

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kinds of files and locks of POSIX")


def writing(path, worker=None):
    """A process in the middle of a save; with ``worker``, a fork of it writes its number there and goes on for long."""

    def hold(begun):
        with replacing(path) as temporary:
            temporary.write_bytes(b"x" * 1000)
            if worker is not None:
                if (pid := os.fork()) == 0:
                    time.sleep(60)
                    os._exit(0)
                worker.write_text(str(pid))
            begun()
            time.sleep(60)

    return forked(hold)


def unfinished(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(files._UNFINISHED))


def write_half(path, error):
    with replacing(path) as temporary:
        temporary.write_text("half")
        raise error


def save(path, content="new"):
    with replacing(path) as temporary:
        temporary.write_text(content)


@pytest.fixture
def special(tmp_path):
    """Paths that are no files, by what the error calls them."""
    made = {name: tmp_path / name for name in ("a folder", "a pipe", "a socket", "a device")}
    made["a folder"].mkdir()
    os.mkfifo(made["a pipe"])
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(tmp_path)  # names of sockets are short
        server.bind("a socket")
    try:
        os.mknod(made["a device"], 0o600 | 0o020000, os.makedev(1, 3))
    except PermissionError:
        del made["a device"]
    return made


@pytest.fixture(autouse=True)
def back(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("through", ["itself", "a link", "a link to a link"])
def test_only_regular_files_are_replaced(special, tmp_path, through):
    for kind, path in special.items():
        given = path
        for step in range(["itself", "a link", "a link to a link"].index(through)):
            link = tmp_path / f"{kind} {step}"
            link.symlink_to(given)
            given = link
        before = os.lstat(path)
        entered = False
        with pytest.raises(OSError, match=f"{given} cannot be written: it is {kind}, not a"):  # noqa: SIM117
            with replacing(given):
                entered = True
        assert not entered
        assert os.path.samestat(os.lstat(path), before)
    assert unfinished(tmp_path) == []


def test_links_that_lead_nowhere_and_paths_through_files(tmp_path):
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    (tmp_path / "file").write_text("old")
    for path, message in (
        ("one", "one cannot be written: Too many levels of symbolic links"),
        ("file/inside", "inside cannot be written: Not a directory"),
        ("absent/new", "new cannot be written: there is no folder"),
        (".", "cannot be written: it is a folder"),
    ):
        with pytest.raises(OSError, match=message):
            save(tmp_path / path)
    assert (tmp_path / "one").is_symlink()
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("relative", [True, False])
def test_a_link_stays_and_its_file_is_replaced(tmp_path, there, relative):
    target = tmp_path / "elsewhere" / "real"
    target.parent.mkdir()
    if there:
        target.write_text("old")
    link = tmp_path / "link"
    link.symlink_to("elsewhere/real" if relative else target)
    assert check_output_file(link) == target
    save(link)
    assert link.is_symlink()
    assert target.read_text() == link.read_text() == "new"
    assert os.listdir(target.parent) == ["real"]


def test_what_becomes_a_folder_meanwhile_is_refused(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(IsADirectoryError, match="it is a folder"), replacing(path):
        path.mkdir()
    assert os.listdir(tmp_path) == ["file"]


def test_a_block_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    for error in (ValueError("x"), KeyboardInterrupt(), SystemExit(1)):
        with pytest.raises(type(error)):
            write_half(path, error)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_told_with_the_files_name(tmp_path, number):
    with pytest.raises(OSError, match=f"{os.strerror(number)}: '{tmp_path / 'file'}'"), replacing(tmp_path / "file"):
        raise OSError(number, "no name here")
    with pytest.raises(FileNotFoundError, match="another") as caught, replacing(tmp_path / "file"):
        raise FileNotFoundError(errno.ENOENT, "absent", "another")
    assert caught.value.filename == "another"
    assert os.listdir(tmp_path) == []


def test_the_next_save_removes_what_killed_ones_left(tmp_path):
    hidden = tmp_path / ".one.original"
    hidden.write_text("a user's own")
    (tmp_path / f".folder{files._UNFINISHED}").mkdir()
    (tmp_path / f".link{files._UNFINISHED}").symlink_to(hidden)
    with writing(tmp_path / "three"):
        with writing(tmp_path / "one"), writing(tmp_path / "two"), writing(tmp_path / "two"):
            pass
        before = set(unfinished(tmp_path))
        save(tmp_path / "four")
        left = set(unfinished(tmp_path))
        assert len(before - left) == 3
        assert any(name.startswith(".three.") for name in left)
        assert hidden.read_text() == "a user's own"
        assert {name for name in left if not name.startswith(".three.")} == {
            f".folder{files._UNFINISHED}",
            f".link{files._UNFINISHED}",
        }


def test_a_dead_saves_children_do_not_keep_its_file(tmp_path):
    worker = tmp_path / "worker"
    with writing(tmp_path / "file", worker) as pid:
        child = int(worker.read_text())
        kill(pid)
        try:
            os.kill(child, 0)  # alive
            save(worker)
            assert os.listdir(tmp_path) == ["worker"]
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="root alone gives files away")
def test_other_users_files_stay(tmp_path):
    with writing(tmp_path / "file"):
        pass
    (name,) = unfinished(tmp_path)
    os.chown(tmp_path / name, 12345, -1)
    save(tmp_path / "file")
    assert unfinished(tmp_path) == [name]


def test_alone(tmp_path):
    path = tmp_path / "file"
    with writing(path):
        with pytest.raises(BlockingIOError, match=f"{path} is being written by another process"):  # noqa: SIM117
            with replacing(path, alone=True):
                pass
        with replacing(tmp_path / "other", alone=True) as temporary:
            temporary.write_text("new")
        save(path)  # without it the last one wins
    with replacing(path, alone=True) as temporary:
        temporary.write_text("newest")
    assert path.read_text() == "newest"
    assert sorted(os.listdir(tmp_path)) == ["file", "other"]


def test_without_locks_nothing_is_swept(tmp_path, monkeypatch):
    with writing(tmp_path / "file"):
        pass

    def refuse(descriptor):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(locks, "try_lock", refuse)
    save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "new"
    assert len(unfinished(tmp_path)) == 1


def test_no_open_file_is_kept(tmp_path):
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(20):
        save(tmp_path / "file")
    assert locks._held == set()
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


def test_output_folders(special, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("absent")
    (tmp_path / "link").symlink_to("a folder")
    for path in (special["a folder"], tmp_path / "link", tmp_path / "new" / "deep"):
        check_output_folder(path)
    for path, message in (
        (tmp_path / "file", "file must be a folder; it is a file"),
        (special["a pipe"], "must be a folder; it is a pipe"),
        (tmp_path / "file" / "inside", "inside must be a folder: Not a directory"),
        (tmp_path / "dangling", "must be a folder; it is a link to nothing"),
    ):
        with pytest.raises(OSError, match=message):
            check_output_folder(path)
