"""pyproject.toml holds the version; everything that states one agrees with it."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from project_files import ROOT


def declared_version() -> str:
    match = re.search(r'^version *= *"(\d+\.\d+\.\d+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert match, 'pyproject.toml has no line version = "major.minor.patch"'
    return match.group(1)


def test_changelog_has_the_version():
    headings = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings
    assert headings[0] == declared_version()


def test_python_package_has_the_version():
    kvarn = pytest.importorskip("kvarn")
    assert kvarn.__version__ == declared_version()
    assert metadata.version("kvarn") == declared_version()


def test_command_line_prints_the_version():
    pytest.importorskip("kvarn")
    command = Path(sys.executable).with_name("kvarn")
    report = subprocess.run([command, "--version"], check=True, capture_output=True, text=True).stdout
    assert declared_version() in report
