"""Each layer includes only what lies below it; CONTRIBUTING.md has the table."""

import ast
import re

import pytest
from project_files import relative, source_files

# Vendor and host-language headers by the name inside the quotes or brackets of an #include.
GPU = r"cuda|hip/|nv_|cub/|cute/|cutlass|mma\.h|rocwmma"
TORCH = r"torch/|ATen/|c10/"
PYTHON = r"Python\.h|nanobind|pybind"
SIMD = r"\w*intrin\.h|arm_neon"
THREADS = r"thread|mutex|atomic|future|condition_variable|stop_token|barrier|latch|semaphore|pthread\.h|omp\.h"
BACKENDS = r"(\.\./)*(cpu|cuda|hip)/|\w+\.cuh"
CORE_HEADERS = r"(\.\./)*(cpp/)?core/(?!backend\.h)"

# (files as a regular expression on the path, includes that they must not have)
INCLUDE_RULES = [
    (r"cpp/include/", rf"({GPU}|{TORCH}|{PYTHON}|{SIMD}|core/|cpu/|ref/)"),
    (r"cpp/core/", rf"({GPU}|{TORCH}|{PYTHON}|{SIMD}|{BACKENDS}|(\.\./)*ref/)"),
    (r"cpp/ref/", rf"({GPU}|{TORCH}|{PYTHON}|{SIMD}|{THREADS}|{BACKENDS}|{CORE_HEADERS})"),
    (r"cpp/cpu/", rf"({GPU}|{TORCH}|{PYTHON}|(\.\./)*ref/|{CORE_HEADERS})"),
    (r"cpp/gpu/", rf"({GPU}|{TORCH}|{PYTHON}|(\.\./)*(cpp/)?(ref|cpu)/|{CORE_HEADERS})"),
    (r"(cuda|hip)/", rf"({TORCH}|{PYTHON}|(\.\./)*(cpp/)?(ref|cpu)/|{CORE_HEADERS})"),
    (r"python/bindings/", rf"({GPU}|{TORCH}|(\.\./)*(cpp/)?(core|cpu|ref)/|(\.\./)*cuda/)"),
]
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)

# Code compiled for one instruction set must not emit weak definitions of standard-library templates: the linker may keep
# that copy for the whole program, which then fails on a machine without the instruction set.
ISA_FILE = re.compile(r"cpp/cpu/.*(_avx2|_avx512\w*|-inl|simd\w*|kernels)\.(cpp|h)$")
ISA_FORBIDDEN = re.compile(
    r"#\s*include\s*<(string|vector|iostream|sstream|ostream|map|unordered_map|memory|functional|stdexcept|algorithm)>"
    r"|\bthrow\b|\bstd::(string|vector|cout|cerr|function)\b"
)


def strip_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def forbidden_includes(path_name: str, text: str) -> list[str]:
    found = []
    for files, pattern in INCLUDE_RULES:
        if re.match(files, path_name):
            found += [header for header in INCLUDE.findall(text) if re.match(pattern, header)]
    return found


def test_includes_point_downwards():
    files = [path for path in source_files("cpp", "cuda", "hip", "python/bindings") if path.suffix != ".py"]
    assert files
    bad = {relative(path): found for path in files if (found := forbidden_includes(relative(path), path.read_text()))}
    assert not bad


@pytest.mark.parametrize(
    ("path_name", "line"),
    [
        ("cpp/include/kvarn/kvarn.h", "#include <cuda_runtime.h>"),
        ("cpp/core/registry.cpp", '#include "cpu/isa.h"'),
        ("cpp/ref/attend.cpp", "#include <immintrin.h>"),
        ("cpp/ref/attend.cpp", "#include <thread>"),
        ("cpp/cpu/attend.cpp", '#include "core/plan.h"'),
        ("cpp/gpu/plan.h", "#include <cuda_runtime_api.h>"),
        ("cuda/attend.cu", "#include <torch/extension.h>"),
        ("cuda/encode.cu", '#include "cpp/ref/ref.h"'),
        ("python/bindings/module.cpp", '#include "core/plan.h"'),
    ],
)
def test_the_include_rules_catch_a_violation(path_name, line):
    assert forbidden_includes(path_name, line)


def test_instruction_set_files_use_no_library_templates():
    files = [path for path in source_files("cpp/cpu") if ISA_FILE.search(relative(path))]
    assert files
    bad = {relative(path): found.group(0) for path in files if (found := ISA_FORBIDDEN.search(strip_comments(path.read_text())))}
    assert not bad


def imported_at_module_level(text: str) -> set[str]:
    """Top-level packages that executing the module imports; imports inside functions and under TYPE_CHECKING do not count."""
    names = set()

    def visit(statements):
        for node in statements:
            if isinstance(node, ast.Import):
                names.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.split(".")[0])
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                visit(node.orelse)
            elif isinstance(node, (ast.If, ast.Try, ast.With)):
                for part in ("body", "orelse", "finalbody"):
                    visit(getattr(node, part, []))
                for handler in getattr(node, "handlers", []):
                    visit(handler.body)

    visit(ast.parse(text).body)
    return names


def test_frameworks_are_imported_only_where_they_are_used():
    # Modules that exist for torch import it at their top; everything else does so inside the functions that need it.
    torch_modules = re.compile(r"python/kvarn/(integrations/|_?torch_ops\.py|demo|eval)")
    frameworks = {"torch", "transformers", "vllm", "sglang", "matplotlib"}
    files = [path for path in source_files("python/kvarn") if path.suffix == ".py" and not torch_modules.match(relative(path))]
    assert files
    bad = {relative(path): found for path in files if (found := imported_at_module_level(path.read_text()) & frameworks)}
    assert not bad


def test_shipped_code_does_not_import_tests_or_benchmarks():
    bad = {}
    for path in source_files("cpp", "cuda", "hip", "python"):
        text = strip_comments(path.read_text()) if path.suffix != ".py" else path.read_text()
        if re.search(r'#\s*include\s*"(\.\./)*(tests|benchmarks)/|^\s*(from|import) (tests|benchmarks)\b', text, re.MULTILINE):
            bad[relative(path)] = "includes tests or benchmarks"
    assert not bad


def test_integrations_are_not_imported_by_the_package():
    """A module of python/kvarn/integrations is loaded by its user or its entry point alone."""
    users = ("/integrations/", "/demo/", "/eval/")
    files = [path for path in source_files("python/kvarn") if path.suffix == ".py" and not any(user in relative(path) for user in users)]
    bad = [
        relative(path)
        for path in files
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ImportFrom) and "integrations" in (node.module or "")
    ]
    assert not bad
