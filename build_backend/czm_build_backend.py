"""PEP 517 backend: setuptools, building against the torch that the package will run with.

An isolated build does not see the torch of the environment that asked for it, and torch named as a
build requirement would be downloaded again, in its newest version. So this backend asks the
environment's own interpreter for its torch and builds with that one; only where there is none (an
empty environment, or one with a torch too old) does it require one for the build.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import czm_build_plan as plan
from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (hooks of PEP 517 and 660 taken as they are)
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

_LOCATE_TORCH = """
import importlib.metadata, importlib.util
print(importlib.metadata.version("torch"))
print(importlib.util.find_spec("torch").origin)
"""


def _runtime_torch() -> Path | None:
    """Return the folder on the environment's path that holds a supported torch."""
    # The variables by which pip hides the environment's packages from an isolated build.
    hiding = ("PYTHONPATH", "PYTHONNOUSERSITE")
    visible = {name: value for name, value in os.environ.items() if name not in hiding}
    answer = subprocess.run(
        [sys.executable, "-c", _LOCATE_TORCH], env=visible, capture_output=True, text=True
    )
    if answer.returncode != 0:
        return None
    version, origin = answer.stdout.splitlines()
    return Path(origin).parents[1] if plan.supports_torch(version) else None


def _torch_requirement() -> list[str]:
    if plan.requested_build() == "none" or plan.find_compiler() is None:
        return []
    if importlib.util.find_spec("torch") or _runtime_torch():
        return []
    return [f"torch>={'.'.join(map(str, plan.MINIMUM_TORCH))}"]


def _make_torch_importable() -> None:
    if importlib.util.find_spec("torch") is None:
        runtime = _runtime_torch()
        if runtime is not None:
            # Last, so that the isolated build's own packages come first.
            sys.path.append(str(runtime))


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _make_torch_importable()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _make_torch_importable()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
