"""Rules for every tracked file: sizes, line ends, and words that do not belong in the project."""

import re

from project_files import SOURCE_SUFFIXES, relative, source_files, text_files, tracked_files

MAX_SOURCE_LINES = 800
MAX_FILE_BYTES = 20 << 20
MAX_LINE_LENGTH = 160  # formatters keep code at 140; the rest covers what they cannot break
GENERATED = {"python/kvarn/_core.pyi"}

# Spelled in parts so that this file does not contain them.
MACHINE_PATH = re.compile(r"(?<![\w.])/(root|home|work|farm|Users)/\w")
LEFTOVER = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b|\bissue #?\d+\b", re.IGNORECASE)
PACKAGE_HOST = re.compile(r"index" + r"-url|--find" + r"-links|https?://[^ )]*/simp" + r"le(/|\b)")


def offending_lines(files, pattern):
    found = []
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{relative(path)}:{number}: {line.strip()[:120]}")
    return found


def test_no_machine_paths():
    assert not offending_lines(text_files(), MACHINE_PATH)


def test_no_package_hosts():
    assert not offending_lines(text_files(), PACKAGE_HOST)


def test_no_leftover_notes():
    assert not offending_lines([path for path in text_files() if path.name != "LICENSE"], LEFTOVER)


def test_the_patterns_match_what_they_are_for():
    assert MACHINE_PATH.search("see /" + "home/someone/build")
    assert LEFTOVER.search("// TO" + "DO: later")
    assert LEFTOVER.search("as issue " + "#12 says")
    assert PACKAGE_HOST.search("pip --extra-index" + "-url x")


def test_source_files_are_short():
    lines = {relative(path): path.read_text(encoding="utf-8").count("\n") for path in source_files()}
    assert lines
    assert not {name: count for name, count in lines.items() if count > MAX_SOURCE_LINES}


def test_files_are_small():
    assert not {relative(path): path.stat().st_size for path in tracked_files() if path.stat().st_size > MAX_FILE_BYTES}


def test_text_files_are_utf8_with_unix_line_ends_and_a_final_newline():
    bad = []
    for path in text_files():
        data = path.read_bytes()
        data.decode("utf-8")
        if b"\r" in data or (data and not data.endswith(b"\n")):
            bad.append(relative(path))
    assert not bad


def test_source_lines_are_not_too_long():
    bad = []
    for path in text_files():
        if path.suffix in SOURCE_SUFFIXES and relative(path) not in GENERATED:
            bad += [f"{relative(path)}:{i}" for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > MAX_LINE_LENGTH]
    assert not bad
