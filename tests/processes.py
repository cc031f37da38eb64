"""The command line in processes of its own that start in milliseconds, to be stopped or killed by a test.

A new Python needs seconds to import torch and the rest. Here one process, the fork server, imports everything once and
is forked for each command, so that a command still has a process id, exit code, standard streams, working directory and
environment of its own:

    done = run_longtail("train", "digits-lt", "--out", out)  # like subprocess.run: returncode, stdout, stderr
    with start_longtail("train", "digits-lt", "--out", out) as process:  # like subprocess.Popen
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
    assert "stopped by SIGTERM" in process.stderr

Every command runs in a session of its own, so ``os.killpg(process.pid, ...)`` signals it and all that it has started.
It computes with one thread. What Python and its libraries read when they start has no effect on it (``PYTHON...``,
``OMP_NUM_THREADS``, the locale), and everything is imported already: start ``python -m longtail`` to test such things.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

_PRELOAD = (
    *("lightning_fabric", "timm", "timm.utils", "torchvision", "sklearn.datasets", "safetensors.torch", "tqdm"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg", "jinja2"),
    *("longtail.cli.data", "longtail.cli.models", "longtail.cli.training", "longtail.cli.completion"),
    *("longtail.report", "longtail.serve", "longtail.training.trainer", "longtail.inference.export"),
    *("longtail.experiments.compare", "longtail.experiments.embed", "longtail.experiments.evaluate"),
    *("longtail.experiments.rebalance", "longtail.tasks.classification.report", "longtail.tasks.segmentation.report"),
)
# read by OpenMP, OpenBLAS, MKL and Arrow while they are loaded: their threads would not survive a fork
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_ONE_THREAD |= {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
_INT = struct.Struct("!i")


class LongtailProcess:
    """A running command, with the interface of :class:`subprocess.Popen`; left as a context manager, it is killed.

    Attributes:
        args: of the command.
        pid: of its process, and of its process group.
        returncode: exit code, −n when killed by signal n; None while it runs.
    """

    def __init__(self, args: list[str], cwd: Path, env: Mapping[str, str], prelude: str) -> None:
        self.args = args
        self.returncode: int | None = None
        # open as long as this object is
        self._stdout, self._stderr = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self._status, status = os.pipe()
        request = {"args": args, "cwd": str(cwd), "env": dict(env), "prelude": prelude}
        try:
            _server().request(request, [self._stdout.fileno(), self._stderr.fileno(), status])
        finally:
            os.close(status)
        self.pid = self._read()

    def _read(self) -> int:
        data = os.read(self._status, _INT.size)
        if len(data) < _INT.size:
            raise RuntimeError("the fork server of tests/processes.py has ended")
        return int(_INT.unpack(data)[0])

    def poll(self) -> int | None:
        """Return the exit code, or None while the command runs."""
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.returncode = self._read()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code.

        Raises:
            subprocess.TimeoutExpired: the command still runs after ``timeout`` seconds.
        """
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0, self.stdout.encode(), self.stderr.encode())
            self.returncode = self._read()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait, and return what the command has written to standard output and standard error."""
        self.wait(timeout)
        return self.stdout, self.stderr

    @property
    def stdout(self) -> str:
        """What the command has written to standard output so far."""
        return _content(self._stdout)

    @property
    def stderr(self) -> str:
        """What the command has written to standard error so far."""
        return _content(self._stderr)

    def send_signal(self, number: int) -> None:
        """Send a signal; nothing happens if the command has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> LongtailProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait()

    def __del__(self) -> None:
        os.close(self._status)
        self._stdout.close()
        self._stderr.close()


def start_longtail(
    *arguments: str | Path,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    prelude: str = "",
) -> LongtailProcess:
    """Start ``longtail`` in a process of its own and return it.

    Args:
        arguments: of the command line, without the program's name.
        cwd: working directory; the present one if not given.
        env: the whole environment; the present one if not given.
        prelude: Python code to run before the command, to replace a function for example.
    """
    args = [str(argument) for argument in arguments]
    return LongtailProcess(args, Path.cwd() if cwd is None else Path(cwd), os.environ if env is None else env, prelude)


def run_longtail(
    *arguments: str | Path,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    prelude: str = "",
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run ``longtail`` in a process of its own and return exit code, standard output and standard error.

    Args:
        arguments: of the command line, without the program's name.
        cwd: working directory; the present one if not given.
        env: the whole environment; the present one if not given.
        prelude: Python code to run before the command, to replace a function for example.
        timeout: seconds after which the command is killed.

    Raises:
        subprocess.TimeoutExpired: the command was killed.
    """
    with start_longtail(*arguments, cwd=cwd, env=env, prelude=prelude) as process:
        stdout, stderr = process.communicate(timeout)
    assert process.returncode is not None
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def start_ranks(world: int, *arguments: str | Path, prelude: str = "") -> list[LongtailProcess]:
    """Start ``longtail`` in several processes that train together, as torchrun would start them, and return them.

    Args:
        world: number of processes.
        arguments: of the command line, without the program's name.
        prelude: Python code to run before the command.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0"}
    together |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        start_longtail(
            *arguments, env={**os.environ, **together, "RANK": str(rank), "LOCAL_RANK": str(rank)}, prelude=prelude
        )
        for rank in range(world)
    ]


def _content(file: Any) -> str:
    # at a position of its own: the offset of the file is the command's
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="backslashreplace")


class _Server:
    """The fork server: started with the first command, ended with this process."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                cwd=ROOT,
                env={**os.environ, **_ONE_THREAD},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        atexit.register(self.close)

    def request(self, request: dict[str, Any], files: list[int]) -> None:
        data = json.dumps(request).encode()
        socket.send_fds(self._channel, [_INT.pack(len(data))], files)
        self._channel.sendall(data)

    def close(self) -> None:
        self._channel.close()
        self._process.wait(timeout=60)


@functools.cache
def _server() -> _Server:
    return _Server()


def _serve(channel: socket.socket) -> dict[str, Any] | None:
    """Fork for every request; return the request in the forked process, and None in this one when it has to end."""
    # a byte arrives on this pipe whenever a child has ended
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at the terminal is for the tests, which then end this process
    statuses: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([channel.fileno(), ended], [], [])
        if ended in ready:
            os.read(ended, 4096)
            for child in list(statuses):
                child, status = os.waitpid(child, os.WNOHANG)
                if child:
                    _write(statuses.pop(child), os.waitstatus_to_exitcode(status))
        if channel.fileno() not in ready:
            continue
        header, files, _, _ = socket.recv_fds(channel, _INT.size, 3)
        if not header:  # the tests have ended
            for child in statuses:
                os.killpg(child, signal.SIGKILL)
            return None
        request: dict[str, Any] = json.loads(_receive(channel, _INT.unpack(header)[0]))
        stdout, stderr, report = files
        # a signal that comes at once waits until the child can handle it
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        child = os.fork()
        if child == 0:
            os.setsid()
            os.dup2(stdout, 1)
            os.dup2(stderr, 2)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for descriptor in (stdout, stderr, report, ended, wake, *statuses.values()):
                os.close(descriptor)
            channel.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            return request
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        os.close(stdout)
        os.close(stderr)
        statuses[child] = report
        os.write(report, _INT.pack(child))


def _write(report: int, code: int) -> None:
    try:
        os.write(report, _INT.pack(code))
    except BrokenPipeError:  # nobody waits for it
        pass
    finally:
        os.close(report)


def _receive(channel: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += channel.recv(size - len(data))
    return data


def _preload() -> None:
    """Import everything, and start no thread: a forked process would lack it."""
    for module in _PRELOAD:
        importlib.import_module(module)
    import torch

    from longtail.cli import main
    from longtail.registry import METHODS, SAMPLERS, SOURCES, TASKS, TRANSFORMS

    for registry in (METHODS, SAMPLERS, SOURCES, TASKS, TRANSFORMS):
        for name in registry:
            registry[name]
    with contextlib.suppress(SystemExit):  # the first parser is slow to build
        main(["train", "digits-lt", "--help"])
    sys.stdout.flush()
    torch.set_num_threads(1)
    threads = len(list(Path("/proc/self/task").iterdir())) if sys.platform == "linux" else threading.active_count()
    if threads > 1:
        sys.exit(f"{__file__}: an import has started {threads - 1} threads, which a forked process would lack")
    gc.collect()
    gc.freeze()


def _main() -> None:
    code: int | None = None

    # registered first, so called last: taking the interpreter down with all that is imported takes a second
    @atexit.register
    def leave() -> None:
        if code is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            if code < 0:
                signal.signal(-code, signal.SIG_DFL)
                os.kill(os.getpid(), -code)
            os._exit(code)

    _preload()
    request = _serve(socket.socket(fileno=int(sys.argv[1])))
    if request is None:
        os._exit(0)
    from longtail.cli import main

    code = 1
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = ["longtail", *request["args"]]
    try:
        exec(request["prelude"], {"__name__": "__prelude__"})
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        raise
    except KeyboardInterrupt:
        code = -signal.SIGINT
        raise


if __name__ == "__main__":
    _main()
