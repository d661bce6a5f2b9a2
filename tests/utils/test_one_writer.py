"""One run writes to a folder at a time, whatever ended the one before it."""

import errno
import os
import signal
import sys
import time

import pytest
import torch

from sgfast.utils import locks
from sgfast.utils.one_writer import one_writer
from tests.processes import forked, in_processes, kill

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes that are forked and killed")


def holding(folder, worker=None):
    """A process that holds the folder; with ``worker``, a fork of it writes its number there and goes on for long."""

    def hold(begun):
        with one_writer(folder):
            if worker is not None and (pid := os.fork()):
                worker.write_text(str(pid))
            begun()
            time.sleep(60)

    return forked(hold)


def refused(folder):
    with pytest.raises(BlockingIOError) as caught, one_writer(folder):
        pass
    assert str(caught.value) == f"{folder} is being written by another run: wait for it, or give another folder"


def test_a_second_writer_is_refused_here_and_elsewhere(tmp_path):
    folder = tmp_path / "out"
    with one_writer(folder):
        refused(folder)
        (tmp_path / "link").symlink_to(folder)
        refused_by_link = pytest.raises(BlockingIOError, match="is being written by another run")
        with refused_by_link, one_writer(tmp_path / "link"):
            pass
        with one_writer(tmp_path), one_writer(folder / "inside"):  # other folders are free
            pass
        assert os.listdir(folder) == ["inside"]  # no file tells of the lock
    with one_writer(folder):
        pass
    assert locks._held == set()


@pytest.mark.parametrize("ended", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_dies_with_its_process(tmp_path, ended):
    with holding(tmp_path) as pid:
        refused(tmp_path)
        os.kill(pid, ended)
        os.waitpid(pid, 0)
        with one_writer(tmp_path):
            pass


def test_a_dead_writers_children_do_not_keep_the_folder(tmp_path):
    folder, worker = tmp_path / "out", tmp_path / "worker"
    with holding(folder, worker) as pid:
        child = int(worker.read_text())
        kill(pid)
        try:
            os.kill(child, 0)  # alive
            with one_writer(folder):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def fail_with_a_file(folder, error):
    with one_writer(folder):
        (folder / "file").write_text("")
        raise error


def test_a_folder_made_for_a_run_that_failed_goes_again(tmp_path):
    for error in (ValueError(), KeyboardInterrupt(), SystemExit(2)):
        with pytest.raises(type(error)), one_writer(tmp_path / "new" / "deep"):
            raise error
        assert os.listdir(tmp_path) == []
        with pytest.raises(type(error)):
            fail_with_a_file(tmp_path / "new" / "deep", error)
        assert os.listdir(tmp_path / "new" / "deep") == ["file"]
        (tmp_path / "new" / "deep" / "file").unlink()
        (tmp_path / "new" / "deep").rmdir()
        (tmp_path / "new").rmdir()
    (tmp_path / "there").mkdir()
    with pytest.raises(FileNotFoundError), one_writer(tmp_path / "there"):
        os.rmdir(tmp_path / "absent")
    assert os.listdir(tmp_path) == ["there"]


def test_what_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file must be a folder; it is a file"), one_writer(tmp_path / "file"):
        pass


def test_folders_without_locks_have_a_lock_file(tmp_path, monkeypatch):
    lock = locks.try_lock

    def of_files(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EBADF, "as NFS does")
        return lock(descriptor)

    monkeypatch.setattr(locks, "try_lock", of_files)
    with one_writer(tmp_path):
        refused(tmp_path)
    with one_writer(tmp_path):
        assert os.listdir(tmp_path) == [".sgfast-lock"]
    monkeypatch.setattr(locks, "try_lock", lambda _: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks")))
    with one_writer(tmp_path), one_writer(tmp_path):  # where there are none, work goes on
        pass


def _first_holds_for_all(rank, folder):
    with one_writer(folder):
        descriptor = os.open(folder, os.O_RDONLY)
        assert not locks.try_lock(descriptor)
        os.close(descriptor)
        torch.distributed.barrier()
    if rank == 1:
        open(f"{folder}/told", "w").close()
    _refused_everywhere(folder)


def _refused_everywhere(folder):
    other, descriptor = f"{folder}/other", None
    if torch.distributed.get_rank() == 0:
        os.mkdir(other)
        descriptor = os.open(other, os.O_RDONLY)
        assert locks.try_lock(descriptor)
    torch.distributed.barrier()
    with pytest.raises(BlockingIOError, match="other is being written by another run"), one_writer(other):
        pass
    if descriptor is not None:
        locks.release(descriptor)


def test_several_processes_of_one_run_share_a_folder(tmp_path):
    in_processes(2, _first_holds_for_all, str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["other", "told"]
