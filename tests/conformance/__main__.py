"""Run PEFT's own tests on SeTAR: `python -m tests.conformance [pytest arguments]`.

PEFT's source distribution, of the version that is installed, is downloaded and unpacked to a temporary folder; its
tests/test_custom_models.py is run there with SeTAR's cases in place of PEFT's. The exit status is pytest's.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
SUITE = Path("tests", "test_custom_models.py")
LISTS = (
    "TEST_CASES",
    "ALL_PEFT_CONFIG_CLASSES",
    "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES",
    "MIXED_ADAPTER_TEST_CASES",
)


def source_distribution() -> Path:
    """Path of PEFT's source distribution, downloaded once into the temporary folder of this machine.

    Raises:
        SystemExit: If it cannot be downloaded.
    """
    installed = version("peft")
    cache = Path(tempfile.gettempdir(), "setar_peft-conformance")
    archive = cache / f"peft-{installed}.tar.gz"
    if archive.is_file():
        return archive
    command = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(cache), f"peft=={installed}"]
    if subprocess.run([sys.executable, "-m", "pip", *command], check=False).returncode or not archive.is_file():
        raise SystemExit(
            f"PEFT's source distribution could not be downloaded to {archive}. Connect to a package index, or give "
            "a copy of it with --sdist."
        )
    return archive


def with_our_cases(source: str) -> str:
    """PEFT's test module with the content of its lists of cases replaced by SeTAR's.

    PEFT's own cases would only be collected and left out again, which takes longer than running ours.

    Raises:
        SystemExit: If a list is not where it was; PEFT's tests have changed then.
    """
    for name in LISTS:
        definition = re.search(rf"^{name} = (\[\n.*?^\]|.*?)\n", source, re.MULTILINE | re.DOTALL)
        if definition is None:
            raise SystemExit(f"{SUITE} has no list {name}; adapt {Path(__file__).name} to this version of PEFT.")
        replacement = f"import setar_cases\n{name}[:] = setar_cases.{name}\n"
        source = source[: definition.end()] + replacement + source[definition.end() :]
    return source


def main() -> int:
    """Unpack, add the cases, run; return pytest's exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("--sdist", type=Path, help="PEFT's source distribution (.tar.gz), instead of downloading it")
    arguments, pytest_arguments = parser.parse_known_args()
    archive = arguments.sdist or source_distribution()
    with tempfile.TemporaryDirectory(prefix="setar_peft-conformance-") as folder:
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
        (root,) = Path(folder).iterdir()
        suite = root / SUITE
        suite.write_text(with_our_cases(suite.read_text(encoding="utf-8")), encoding="utf-8")
        # The distribution leaves this file out, and the suite imports its helpers from its own package.
        suite.with_name("__init__.py").touch()
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH")))),
        }
        # The suite runs against the installed PEFT, not against the unpacked one, and without PEFT's coverage options.
        options = ["-o", "addopts=", "-q", "--disable-warnings", "-k", "SeTAR"]
        options += ["-p", "setar_plugin", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", str(SUITE), *options, *pytest_arguments]
        return subprocess.run(command, cwd=root, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
