"""The tests' own way to start the command line."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.processes import run_longtail, start_longtail


def test_a_command_has_its_own_exit_code_streams_folder_and_environment(tmp_path: Path) -> None:
    done = run_longtail("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("0.")
    done = run_longtail("trian")
    assert (done.returncode, done.stdout) == (2, "")
    assert "'trian' is not a command" in done.stderr
    code = "import os, pathlib; print(pathlib.Path.cwd(), os.environ['A'], len(os.environ))"
    done = run_longtail("--version", cwd=tmp_path, env={"A": "b"}, prelude=code)
    assert done.stdout.startswith(f"{tmp_path} b 1\n")
    done = run_longtail("--version", prelude="raise ValueError('broken')")
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: broken\n")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_command_can_be_killed(number: signal.Signals) -> None:
    with start_longtail("--version", prelude="import time; print('here', flush=True); time.sleep(600)") as process:
        while not process.stdout:
            time.sleep(0.001)
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.01)
        process.send_signal(number)
        assert process.wait(timeout=60) == -number
        process.kill()  # of no effect any more
    assert process.stdout == "here\n"
