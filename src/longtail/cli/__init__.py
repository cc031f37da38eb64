"""The command line."""

from longtail.cli.app import main

__all__ = ["main"]
