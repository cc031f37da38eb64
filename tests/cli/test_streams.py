"""Standard streams that are closed, that nobody reads any more, or that are full: a run goes on, and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from longtail.inference.model_config import read_model_config
from tests.conftest import TINY
from tests.processes import run_longtail

# run before the command: a pipe whose reader has gone
BROKEN_PIPE = "import os\nr, w = os.pipe()\nos.close(r)\n"


def run_python(
    code: str, stdout: int = subprocess.PIPE, stderr: int = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    """Run code in a new Python, with its standard streams on pipes unless given."""
    return subprocess.run([sys.executable, "-c", code], stdout=stdout, stderr=stderr, text=True, check=False)


@pytest.mark.parametrize(("arguments", "code"), [(["--version"], 0), (["recipes"], 0), (["trian"], 2)])
@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_closed_streams(arguments: list[str], code: int, closed: tuple[int, ...]) -> None:
    def close() -> None:
        for number in closed:
            os.close(number)

    done = subprocess.run(
        [sys.executable, "-m", "longtail", *arguments],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=close,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert bool(done.stdout) == (1 not in closed and code == 0)


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    file = tmp_path / "file"
    code = f"""
import os
os.close(2)
import sys
sys.stderr = sys.__stderr__ = None
from longtail.cli import app
def command(arguments):
    with open({str(file)!r}, "w") as opened:
        os.write(2, b"what a library prints")
        print("a message", file=sys.stderr)
app.load_command = lambda name: command
app.main(["train"])
"""
    assert run_python(code).returncode == 0
    assert file.read_text() == ""


# a command that says something, draws a bar, and prints a result
TALKS = """
import logging, sys
from tqdm import tqdm
from longtail.cli import app
from longtail.cli.console import show_messages
def command(arguments):
    show_messages(quiet=False)
    for number in tqdm(range(5), mininterval=0):
        logging.getLogger("longtail").info("message %d", number)
        print("and more", file=sys.stderr)
    print("result")
app.load_command = lambda name: command
app.main(["train"])
"""


def test_messages_that_nobody_reads_end_nothing() -> None:
    done = run_python(BROKEN_PIPE + "os.dup2(w, 2)\n" + TALKS)
    assert (done.returncode, done.stdout) == (0, "result\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_messages_on_a_full_disk_end_nothing() -> None:
    with Path("/dev/full").open("w") as full:
        done = run_python(TALKS, stderr=full.fileno())
        assert (done.returncode, done.stdout) == (0, "result\n")
        assert run_python(TALKS, stdout=full.fileno()).returncode == 2  # a result that is lost is an error


def test_results_that_nobody_reads_are_no_error() -> None:
    done = run_python(BROKEN_PIPE + "os.dup2(w, 1)\n" + TALKS)
    assert done.returncode == 0
    assert "message 4" in done.stderr
    assert "error" not in done.stderr
    assert run_python(BROKEN_PIPE + "os.dup2(w, 1); os.dup2(w, 2)\n" + TALKS).returncode == 0


def test_a_broken_pipe_of_another_kind_is_an_error() -> None:
    code = (
        BROKEN_PIPE
        + """
from longtail.cli import app
app.load_command = lambda name: lambda arguments: os.write(w, b"x")
app.main(["train"])
"""
    )
    done = run_python(code)
    assert (done.returncode, done.stderr) == (2, "longtail: error: Broken pipe\n")


def test_a_training_that_nobody_watches_finishes(tmp_path: Path) -> None:
    arguments = [argument for argument in TINY if argument != "--quiet"]
    # streams that are made anew: those of the fork server's process take the pipe for a file
    prelude = BROKEN_PIPE + (
        "import sys\nos.dup2(w, 1); os.dup2(w, 2)\nsys.stdout = open(1, 'w', closefd=False)\n"
        "sys.stderr = sys.__stderr__ = open(2, 'w', 1, closefd=False)\n"
    )
    done = run_longtail("train", "digits-lt", *arguments, "--method", "la", "--out", tmp_path / "run", prelude=prelude)
    assert done.returncode == 0
    assert read_model_config(tmp_path / "run").metrics
    assert (tmp_path / "run" / "report.html").is_file()
