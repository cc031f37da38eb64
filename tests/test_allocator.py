"""Memory that is freed is reused: counted in page faults, not in seconds."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from longtail.allocator import reuse_freed_memory

_PROGRAM = """
import resource, sys
from longtail.allocator import reuse_freed_memory
import numpy as np
if sys.argv[1] == "reuse":
    assert reuse_freed_memory()
np.ones(8_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(8_000_000)  # 64 MB, freed at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_not_mapped_again() -> None:
    def faults(mode: str) -> int:
        command = [sys.executable, "-c", _PROGRAM, mode]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert faults("reuse") < 0.1 * faults("default")


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not reuse_freed_memory()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    assert not reuse_freed_memory()
