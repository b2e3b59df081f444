"""What the HIP backend says where it cannot run, and what its Python side refuses. Each case is a process of its own: the library looks
for the runtime once."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from amdsim.fake_runtime import environment
from amdsim.testing import require_toolchain

DETAIL = "import kvarn; print(next(b for b in kvarn.backends() if b.name == 'hip').detail)"
PLAN = """
import kvarn
try:
    kvarn.Plan("k4v2_g128", head_dim=128, num_kv_heads=1, backend="hip")
except kvarn.UnavailableError as error:
    print(error)
"""


def run(hip_build, code: str, variables: dict[str, str]) -> str:
    variables = {"KVARN_BACKEND_PATH": str(hip_build.parent / "lib"), **variables}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | variables, check=True
    ).stdout.strip()


NO_RUNTIME = "no AMD runtime (looked for libamdhip64.so.7, libamdhip64.so.6, libamdhip64.so.5, libamdhip64.so)"


def test_without_a_runtime_the_reason_names_the_libraries(hip_build, no_runtime):
    assert run(hip_build, DETAIL, no_runtime) == NO_RUNTIME
    assert run(hip_build, PLAN, no_runtime) == f"[kvarn.plan_create] backend: expected an available backend, got hip: {NO_RUNTIME}"


def test_a_runtime_that_cannot_be_loaded_is_named(hip_build, tmp_path):
    (tmp_path / "libamdhip64.so.7").write_bytes(b"not a library")
    assert "libamdhip64.so.7: file too short" in run(hip_build, DETAIL, {"LD_LIBRARY_PATH": str(tmp_path)})


def test_without_a_device_the_reason_is_the_runtimes(hip_build):
    require_toolchain()
    assert run(hip_build, DETAIL, environment(None)) == "libamdhip64.so.7: hipErrorNoDevice: no ROCm-capable device is detected"


def test_a_runtime_that_lacks_a_function_is_named(hip_build, tmp_path):
    require_toolchain()
    compiler = os.environ.get("CXX", "g++")
    (tmp_path / "old.cpp").write_text("")
    library = tmp_path / "libamdhip64.so.7"
    subprocess.run([compiler, "-shared", "-o", str(library), str(tmp_path / "old.cpp")], check=True)
    assert run(hip_build, DETAIL, {"LD_LIBRARY_PATH": str(tmp_path)}) == "libamdhip64.so.7: no function hipGetDeviceCount"


def test_a_runtime_that_the_process_has_loaded_comes_first(hip_build, tmp_path):
    """As that of ROCm's torch, which lies where the loader does not look."""
    require_toolchain()
    (tmp_path / "old.cpp").write_text("")
    library = tmp_path / "of_torch.so"
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, "-shared", "-Wl,-soname,libamdhip64.so.5", "-o", str(library), str(tmp_path / "old.cpp")], check=True)
    code = f"import ctypes; ctypes.CDLL({str(library)!r}); {DETAIL}"
    assert run(hip_build, code, environment("gfx942")) == "libamdhip64.so.5: no function hipGetDeviceCount"


TORCH_OF_ROCM = """
import sys, kvarn
try:
    kvarn.Cache("k4v2_g128", num_layers=1, num_kv_heads=1, head_dim=128, device="hip")
except kvarn.UnavailableError:
    print("torch" in sys.modules)
"""


@pytest.mark.parametrize(("version", "imported"), [("2.13.0+rocm7.0", True), ("2.13.0+cpu", False)])
def test_torch_is_imported_first_where_it_brings_a_runtime(hip_build, tmp_path, no_runtime, version, imported):
    """By what looks for the runtime without having been given a tensor. Torch is no more than a version and a module here."""
    (tmp_path / "torch.py").write_text("")
    described = tmp_path / f"torch-{version}.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    assert run(hip_build, TORCH_OF_ROCM, no_runtime | {"PYTHONPATH": path}) == str(imported)


# The stand-in writes code objects to files, which may not grow here.
FAILED_LOAD = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); {DETAIL}"


def test_a_code_object_that_does_not_load_is_the_reason(hip_build):
    require_toolchain()
    detail = run(hip_build, FAILED_LOAD, environment("gfx942"))
    assert detail == "emulated gfx942 (gfx942): 0 refused the kernels (hipErrorOutOfMemory: out of memory)"


def targets_of(hip_build) -> str:
    return re.search(r'kTargets\[\] = "(.*)"', (hip_build / "bundles.cpp").read_text())[1]


@pytest.mark.parametrize("target", ["gfx1036", "gfx906"])
def test_a_device_of_another_target_is_told_what_was_built(hip_build, target):
    require_toolchain()
    detail = f"emulated {target} ({target}): expected one of {targets_of(hip_build)}"
    assert run(hip_build, DETAIL, environment(target)) == detail
    assert run(hip_build, PLAN, environment(target)) == f"[kvarn.plan_create] backend: expected an available backend, got hip: {detail}"


SEVERAL = """
import numpy as np, kvarn
from kvarn._hip_memory import HipArray, HipRuntime
info = next(b for b in kvarn.backends() if b.name == "hip")
print(info.available, info.num_devices, info.detail)
x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float16)
config = {"head_dim": 64, "num_kv_heads": 1}
expected = kvarn.ops.hadamard(kvarn.Plan("k4v2_g32", **config), x)
for device in range(info.num_devices):
    try:
        plan = kvarn.Plan("k4v2_g32", backend="hip", device=device, **config)
    except kvarn.UnavailableError as error:
        print(error)
        continue
    runtime = HipRuntime(device)
    out, own_x = HipArray(runtime, np.zeros_like(x)), HipArray(runtime, x)
    HipRuntime((device + 1) % info.num_devices)  # makes another device current
    kvarn.ops.hadamard(plan, own_x, out=out)
    print(plan.describe, (out.numpy() == expected).all())
"""


@pytest.mark.parametrize("targets", ["gfx1100,gfx1036", "gfx1036,gfx1100"])
def test_a_device_of_another_target_beside_one_that_will_do_is_refused_alone(hip_build, targets):
    """A graphics card and the graphics of a processor, in either order."""
    require_toolchain()
    listed, *plans = run(hip_build, SEVERAL, environment(targets)).splitlines()
    names = targets.split(",")
    described = (f"{i}: emulated {name} ({name})" + ", no kernels for it" * (name == "gfx1036") for i, name in enumerate(names))
    assert listed == "True 2 " + "; ".join(described)
    refused, right = names.index("gfx1036"), names.index("gfx1100")
    assert plans[refused].startswith("[kvarn.plan_create] device: expected one of gfx90a, ")
    assert plans[refused].endswith(f", got {refused}: emulated gfx1036 (gfx1036)")
    assert plans[right] == f"hip:{right}, emulated gfx1100 (gfx1100) True"


def test_devices_of_different_targets_each_run_their_own_kernels(hip_build):
    require_toolchain()
    listed, *plans = run(hip_build, SEVERAL, environment("gfx942,gfx1200,gfx1201,gfx942")).splitlines()
    assert listed.startswith("True 4 0: emulated gfx942 (gfx942); 1: emulated gfx1200 (gfx1200); 2: emulated gfx1201 (gfx1201); 3: ")
    targets = ("gfx942", "gfx1200", "gfx1201", "gfx942")
    assert plans == [f"hip:{i}, emulated {name} ({name}) True" for i, name in enumerate(targets)]


def test_several_devices_of_one_target_are_named_once(hip_build):
    require_toolchain()
    assert run(hip_build, SEVERAL, environment("gfx942,gfx942")).splitlines()[0] == "True 2 emulated gfx942 (gfx942)"


def test_a_device_is_listed_with_its_target(hip_build):
    require_toolchain()
    assert run(hip_build, DETAIL, environment("gfx1100")) == "emulated gfx1100 (gfx1100)"


ATTENTION = """
import itertools, kvarn
bits, dims = (2, 3, 4, 5, 6, 8), (64, 80, 96, 112, 128, 160, 192, 256, 512)
tokens, dtypes = (32, 64, 128, 256), ("float16", "bfloat16", "float32")
cases = [(f"k{k}v{v}_g128", dim, "float16") for k, v in zip(bits + bits, bits + bits[::-1]) for dim in dims]
cases += [(f"k4v2_g{g}{m}", 128, dtype) for g in tokens for m in ("", "_m8") for dtype in dtypes]
for name, dim, dtype in cases:
    config = {"head_dim": dim, "num_kv_heads": 1, "num_q_heads": 4, "dtype": dtype, "max_num_seqs": 1, "max_q_tokens": 1, "max_tiles": 1}
    plan = kvarn.Plan(name, backend="hip", **config)
    print(name, dim, dtype, plan.describe.rsplit(", ", 1)[1], sep="|")
"""


@pytest.mark.parametrize("target", ["gfx942", "gfx1100"])
def test_every_format_has_attention_and_the_plan_says_which(hip_build, target):
    """README.md says the same: matrix instructions for the formats of a rule, vector instructions for all others."""
    require_toolchain()
    lines = [line.split("|") for line in run(hip_build, ATTENTION, environment(target)).splitlines()]
    assert len(lines) == 12 * 9 + 24
    for name, dim, dtype, attention in lines:
        widths = set(name[1:4:2]) <= set("2348")
        dims = (64, 128, 256) if target == "gfx942" else (64, 128)
        matrix = widths and name.endswith("_g128") and int(dim) in dims and dtype != "float32"
        assert attention == ("matrix cores" if matrix else "generic attention"), name


HOST_ARRAY = """
import numpy as np, kvarn
plan = kvarn.Plan("k4v2_g128", head_dim=128, num_kv_heads=1, backend="hip")
try:
    kvarn.ops.hadamard(plan, np.zeros((1, 128), np.float16))
except kvarn.InvalidArgumentError as error:
    print(error)
"""


def test_host_arrays_are_refused(hip_build):
    require_toolchain()
    message = run(hip_build, HOST_ARRAY, environment("gfx942"))
    assert message == "[kvarn.hadamard] x: expected float32|float16|bfloat16 [..., 128] on rocm:0, got float16 [1, 128] on cpu"


CUDA_ARRAY = HOST_ARRAY.replace("np.zeros((1, 128), np.float16)", "array").replace(
    "try:",
    """from kvarn._hip_memory import HipArray, HipRuntime
array = HipArray(HipRuntime(), np.zeros((1, 128), np.float16))
array.managed.tensor.device.type = 2
try:""",
)


def test_arrays_of_cuda_devices_are_refused(hip_build):
    require_toolchain()
    assert "on rocm:0, got float16 [1, 128] on cuda:0" in run(hip_build, CUDA_ARRAY, environment("gfx942"))
