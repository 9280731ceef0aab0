"""Processes on one machine: workers that make results ahead, and one process at a time where two would collide."""
import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator

import torch

from support.cli import Progress, UserError

try:
    import fcntl
except ImportError:  # Windows: no lock, so two processes may do the same work; temporary names keep them apart
    fcntl = None

PAUSE = 0.5  # seconds between two looks at a lock

warnings.filterwarnings("ignore", message="This DataLoader will create")  # two decoders beside one core do as well


# ------------------------------------------------------------------------------------------ worker processes
class _Calls(torch.utils.data.Dataset):
    """Lets a DataLoader compute work(x).

    A UserError comes back as a value: raised in a worker, it would bring two tracebacks along.
    """

    def __init__(self, work):
        self.work = work

    def __getitem__(self, x):
        try:
            return self.work(x)
        except UserError as error:
            return error


def _start_worker(_):
    # Both may reach the whole process group: the main process saves, then ends its workers.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def in_workers(work, todo, workers: int) -> Iterator:
    """work(x), or the UserError it raised, for x in `todo` (maybe endless), in order, made ahead by worker processes.

    workers 0: here, on demand. A worker that dies is a UserError within seconds.
    Workers are forked where that is at home (Linux): they start at once and share `work` without pickling it. That is
    safe beside training threads and CUDA because they compute on one thread (DataLoader sees to it) and touch no GPU.
    """
    if not workers:
        yield from map(_Calls(work).__getitem__, todo)
        return
    how = {"multiprocessing_context": "fork" if sys.platform == "linux" else None, "worker_init_fn": _start_worker}
    others = multiprocessing.active_children()
    child_signal = getattr(signal, "SIGCHLD", None)  # Windows has none
    before = child_signal and signal.getsignal(child_signal)
    try:
        loader = torch.utils.data.DataLoader(_Calls(work), batch_size=None, sampler=todo, num_workers=workers, **how)
        results = iter(loader)
        for worker in _children_but(others):
            atexit.register(worker.kill)  # Python would send SIGTERM and wait for ever
        if child_signal and threading.current_thread() is threading.main_thread():
            # DataLoader's handler would raise wherever training is, even in a save; without it, next() finds a dead
            # worker within 5 seconds.
            signal.signal(child_signal, before or signal.SIG_DFL)
        yield from results
    except (RuntimeError, OSError, EOFError) as error:
        why = str(error).split("\n")[0] or type(error).__name__
        if why.startswith("Caught "):
            raise  # a bug in `work`, with its traceback
        advice = "was it killed, or is memory or /dev/shm full? Try fewer --workers, then --resume"
        raise UserError(f"a data worker ended ({why}): {advice}") from None
    finally:
        for worker in _children_but(others):
            worker.kill()
            worker.join(1)


def _children_but(others: list) -> list:
    return [child for child in multiprocessing.active_children() if child not in others]


# ------------------------------------------------------------------------------------------ one process at a time
class Turn:
    """What `one_at_a_time` gives: report how far the work is, for those who wait."""

    def __init__(self, handle: int | None):
        self.handle, self.told = handle, 0.0

    def report(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.handle is not None and now > self.told + 1:
            self.told = now
            os.pwrite(self.handle, f"{done:12} {total:12}".encode(), 0)


@contextlib.contextmanager
def one_at_a_time(path: str, what: str) -> Iterator[Turn]:
    """One process at a time is inside; the others wait and show `what` and how far it is.

    The lock goes with the process that holds it, however that ends; `path` is its file, removed at the end.
    Needs no process group, so ranks can wait here for hours before they join one.
    """
    if fcntl is None:
        yield Turn(None)
        return
    handle = _lock(path, what)
    try:
        yield Turn(handle)
    finally:
        with contextlib.suppress(OSError):
            os.remove(path)
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # forked workers may have the file open too
        os.close(handle)


def _lock(path: str, what: str) -> int:
    """The open and locked file `path`, once no other process has it."""
    progress = None
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            while not _locked(handle):
                numbers = os.pread(handle, 32, 0).split()
                if len(numbers) == 2:
                    done, total = int(numbers[0]), int(numbers[1])
                    progress = progress or Progress(what, total)
                    progress(min(done, total - 1))
                time.sleep(PAUSE)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    os.ftruncate(handle, 0)
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its last holder has removed it: others may have made a new one


def _locked(handle: int) -> bool:
    """Whether the lock was free; True on a file system without locks, where temporary names keep processes apart."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
