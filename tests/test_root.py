"""The names of the package's root."""

from __future__ import annotations

import subprocess
import sys


def test_subpackages_are_attributes_and_nothing_is_imported_before() -> None:
    code = (
        "import sys, longtail\n"
        "assert 'torch' not in sys.modules\n"
        "assert {'losses', 'data', 'evaluation', 'integrations', 'gml_loss', '__version__'} <= set(dir(longtail))\n"
        "assert longtail.losses.gml_loss is longtail.gml_loss\n"
        "assert longtail.evaluation.__name__ == 'longtail.evaluation'\n"
        "assert not hasattr(longtail, 'loses')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
