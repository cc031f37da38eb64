"""The command line: which command runs, and how its errors are shown. Imports no torch before a command needs it."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from longtail.allocator import reuse_freed_memory
from longtail.cli.parsing import load_plugins
from longtail.cli.streams import discard, is_read, prepare_streams
from longtail.data.paths import printable
from longtail.errors import LongtailError, StoppedError, did_you_mean

DESCRIPTION = """usage: longtail COMMAND [OPTIONS]

Training and use of image models on long-tailed data, where classes differ widely in their number of images.

commands:
  inspect SOURCE         class distribution and problems of a data set
  split SOURCE           split a data set into train, val and test
  embed SOURCE           embeddings of the images of a data set, by any network
  train [RECIPE]         train, evaluate and save a model; every field of the recipe is a flag
  evaluate RUN           metrics of a run on its test set
  rebalance RUN          train a new classifier on a run's encoder: cRT, learnable weight scaling, τ-normalisation
  predict RUN IMAGES…    classes and probabilities of image files, labels of their pixels, or objects in them
  export RUN             an ONNX file with preprocessing, labels and prior inside
  calibrate-detector MODEL
                         a trained detector corrected for rare classes, without training
  serve RUN              a local web page that classifies images, or finds the objects in them
  compare [RECIPE]       several methods × seeds under one recipe: table, differences, plot
  report RUN…            write the report of a run again, or one that compares several runs
  recipes                list the recipes
  completion SHELL       a script for command completion in bash, zsh or fish

options of every command:
  --plugin FILE          a Python file that registers methods, tasks, data sources or augmentations

longtail --version       print the version

`longtail COMMAND --help` lists a command's options. First steps: longtail train digits-lt
Your own images (a folder with one sub-folder per class, a list, a table): longtail train photos/
"""

COMMANDS = {
    "inspect": "longtail.cli.data:inspect",
    "split": "longtail.cli.data:split",
    "embed": "longtail.cli.data:embed",
    "train": "longtail.cli.training:train",
    "evaluate": "longtail.cli.models:evaluate",
    "rebalance": "longtail.cli.training:rebalance",
    "predict": "longtail.cli.predict:predict",
    "export": "longtail.cli.models:export",
    "calibrate-detector": "longtail.cli.detectors:calibrate_detector",
    "serve": "longtail.cli.models:serve",
    "compare": "longtail.cli.training:compare",
    "report": "longtail.cli.models:report",
    "recipes": "longtail.cli.training:recipes",
    "completion": "longtail.cli.completion:completion",
}
"""Where the commands are."""

_FOR_TRAINING = (
    "lower --batch_size, --network_size or --accelerator.memory, or raise --optimizer.grad_accumulation_steps"
)
_LESS_MEMORY = {
    "train": _FOR_TRAINING,
    "compare": f"lower --jobs; or {_FOR_TRAINING}",
    "embed": "lower --batch_size",
}
"""What makes a command need less memory of its device; the others have no such option."""


def load_command(name: str) -> Callable[[list[str]], None]:
    """Return the function of a command, which takes its arguments."""
    module, _, attribute = COMMANDS[name].partition(":")
    command: Callable[[list[str]], None] = getattr(importlib.import_module(module), attribute)
    return command


def _raises_on_interrupt() -> bool:
    return signal.getsignal(signal.SIGINT) is signal.default_int_handler


@contextlib.contextmanager
def _quiet_interrupts() -> Iterator[None]:
    """Return a context in which Ctrl-C ends the process at once: imports turn its exception into other errors."""
    if threading.current_thread() is not threading.main_thread() or not _raises_on_interrupt():
        yield
        return

    def stop(*_: object) -> None:
        with contextlib.suppress(OSError):
            os.write(2, b"longtail: interrupted\n")
        os._exit(130)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _out_of_memory(error: RuntimeError, command: str) -> str:
    """Return what to say of an error if a device had too little memory; empty if it is another one."""
    torch = sys.modules.get("torch")  # no such error without it
    if torch is None or not isinstance(error, torch.OutOfMemoryError):
        return ""
    advice = _LESS_MEMORY.get(command, "set CUDA_VISIBLE_DEVICES= to run on the CPU")
    return f"the device is out of memory; end other programs that use it, or {advice}"


def _exit_for(message: str) -> NoReturn:
    """Print an error in one line, with the number of the process if there are several, and exit."""
    process = os.environ.get("RANK") if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    prefix = "" if process is None else f"process {process}: "
    print(f"longtail: error: {prefix}{printable(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 when done, 2 for an unusable input, 128 + n when stopped by signal n."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    prepare_streams()
    try:
        if any("\0" in argument for argument in args):
            raise LongtailError("the arguments contain a null byte, which no name or value can have; leave it out")
        with _quiet_interrupts():
            args = load_plugins(args)
        if not args or args[0] in {"-h", "--help"}:
            print(DESCRIPTION, end="")
        elif args[0] == "--version":
            import longtail

            print(longtail.__version__)
        elif args[0] not in COMMANDS:
            raise LongtailError(f"'{args[0]}' is not a command{did_you_mean(args[0], COMMANDS)}")
        else:
            reuse_freed_memory()
            with _quiet_interrupts():
                command = load_command(args[0])
            command(args[1:])
        sys.stdout.flush()
    except LongtailError as error:
        _exit_for(str(error))
    except RuntimeError as error:
        if message := _out_of_memory(error, args[0]):
            _exit_for(message)
        raise
    except StoppedError as stop:
        hint = (
            "use --resume to continue" if args[0] == "train" else "repeat the command without --overwrite to continue"
        )
        print(f"longtail: {stop}; {hint}", file=sys.stderr)
        sys.exit(stop.code)
    except KeyboardInterrupt:
        resumes = args[:1] == ["train"]
        hint = "; use --resume to continue from the last checkpoint" if resumes else ""
        print(f"longtail: interrupted{hint}", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and not is_read(sys.stdout):
            discard(sys.stdout)  # its reader has gone (head, for one), which is not an error
            return
        # a name that is too long, or a full disk under the output
        reason = error.strerror or " ".join(str(error).split())
        place = "" if error.filename is None else f"{printable(str(error.filename))}: "
        print(f"longtail: error: {place}{reason}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            discard(sys.stdout)
        sys.exit(2)
