"""kvarn doctor on the CPU backend: that it passes, that each wrong result is reported as a failure, and what the reports hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvarn
from kvarn import _devices, _doctor, ops
from kvarn._doctor import checks
from kvarn._doctor.report import Finding, Report, Result

pytest.importorskip("typer")


def command(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """Runs ``kvarn doctor`` after some Python code."""
    main = "import sys; from kvarn.__main__ import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", f"{code}\n{main}", "doctor", *arguments], capture_output=True, text=True)


def test_every_check_passes(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    run = command("--output", str(report))
    assert run.returncode == 0, run.stdout + run.stderr
    data = json.loads(report.read_text())
    assert data["result"] == "passed"
    assert data["backend"] == "cpu, device 0"
    assert data["plan"].startswith("cpu/")
    assert data["library"] == f"kvarn {kvarn.__version__}"
    outcomes = {(result["group"], result["outcome"]) for result in data["results"]}
    groups = ("hadamard", "append", "encode and decode", "attend", "alone and in a batch", "long context", "cache", "refusals")
    assert {(group, "passed") for group in groups} | {("graph", "skipped")} <= outcomes
    assert not [result["name"] for result in data["results"] if result["outcome"] == "failed"]
    for result in data["results"]:
        assert result["findings"] or result["outcome"] == "skipped", result["name"]
        assert all(finding["passed"] for finding in result["findings"])
        if result["outcome"] == "skipped":
            assert result["reason"]


def test_the_cases_cover_what_the_formats_allow() -> None:
    """Every width, head dimension, tile length, element type and option has a check, in encode and in attend."""
    encodings, attentions = checks.ENCODINGS, checks.ATTENTIONS
    for dims, dtypes in (
        ({e.head_dim for e in encodings}, {e.dtype for e in encodings}),
        ({c.head_dim for c in attentions}, {c.dtype for c in attentions}),
    ):
        assert dims == set(checks.HEAD_DIMS)
        assert dtypes == set(checks.DTYPES)
    for formats in ({e.format for e in encodings if not e.fed}, {c.format for c in attentions}):
        parsed = [kvarn.Format(name) for name in formats]
        for side in ("k_bits", "v_bits"):
            assert {getattr(f, side) for f in parsed} == {2, 3, 4, 5, 6, 8}
        assert {f.tile_tokens for f in parsed} == {32, 64, 128, 256}
        assert {f.metadata_bits for f in parsed} == {8, 16}
    for bits, rounding in [(b, r) for b in (2, 3, 4, 5, 6, 8) for r in (True, False)]:
        unbiased = {"auto": bits <= 3, "unbiased": True, "minmax": False}
        for fed in (True, False):
            widths = [kvarn.Format(e.format) for e in encodings if unbiased[e.rounding] is rounding and bool(e.fed) is fed]
            assert any(bits in (f.k_bits, f.v_bits) for f in widths), (bits, rounding, fed)
    ratios = {c.q_heads // c.kv_heads for c in attentions}
    assert {1, 2, 3, 4, 5, 7, 8, 9, 16, 24, 32} <= ratios
    assert {0, 1, 2, 3, 4, 5} <= {q for c in attentions for q in c.q_lens}
    options = {name for c in attentions for name in c.options}
    assert options == {"window", "causal", "logits_soft_cap", "alibi", "sinks", "softmax_scale"}
    assert max(checks.LONG.lengths) == 65536


def spoilt(operation: str, written: str) -> str:
    """Code that makes an operation of the plans that are checked write something wrong: one bit of an output, or a row that is 0.3 % off.
    The reference's plans are of the generic instruction set."""
    return f"""
import numpy as np, inspect
from kvarn import ops
true = ops.{operation}
def wrong(plan, *args, **kwargs):
    result = true(plan, *args, **kwargs)
    if "generic" not in plan.describe:
        bound = inspect.signature(true).bind(plan, *args, **kwargs).arguments
        out = bound["{written}"]
        out = getattr(out, "host", out)
        if "{operation}" == "attend":
            if out.dtype != np.uint16: out[-1] *= out.dtype.type(1.003)
            else: out[-1] ^= 4
        else:
            out.reshape(-1).view(np.uint8)[-1] ^= 1
    return result
ops.{operation} = wrong
"""


@pytest.mark.skipif(kvarn.cpu_isas() == ["generic"], reason="the only instruction set is the reference's")
@pytest.mark.parametrize(
    ("operation", "written", "group"),
    [
        ("hadamard", "out", "hadamard"),
        ("append", "staging", "append"),
        ("encode", "records", "encode and decode"),
        ("decode", "v", "encode and decode"),
        ("attend", "out", "attend"),
        ("attend", "lse", "attend"),
    ],
)
def test_a_wrong_result_is_a_failure(tmp_path: Path, operation: str, written: str, group: str) -> None:
    report = tmp_path / "report.md"
    run = command("--quick", "--output", str(report), code=spoilt(operation, written))
    assert run.returncode == 1, run.stdout
    lines = run.stdout.splitlines()
    # Every check of the group fails, but for that in which the backend refuses the call.
    own = [line for line in lines if line.startswith((f"failed  {group}: ", f"passed  {group}: ")) and "outside the pool" not in line]
    assert len(own) >= 2
    assert not [line for line in own if line.startswith("passed")]
    assert "## Failed" in report.read_text()
    assert report.read_text().startswith("# kvarn doctor, backend cpu: failed\n")


def test_a_call_that_should_be_refused_and_is_not_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = ops.attend

    def lenient(plan: kvarn.Plan, q: Any, **arguments: Any) -> Any:
        return true(plan, q, **{**arguments, "window": max(0, arguments.get("window", 0))})

    monkeypatch.setattr(ops, "attend", lenient)
    report = _doctor.run("cpu", tmp_path / "report.md", quick=True)
    (failed,) = [result for result in report.results if result.outcome == "failed"]
    assert failed.group == "refusals"
    assert "a negative window" in failed.text()


def test_an_error_is_a_failure_and_the_rest_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_arguments: Any, **_named: Any) -> None:
        raise kvarn.LaunchError("the device is gone")

    monkeypatch.setattr(ops, "append", fails)
    seen: list[Result] = []
    report = _doctor.run("cpu", tmp_path / "report.md", quick=True, progress=seen.append)
    assert seen == report.results
    assert {result.outcome for result in seen if result.group == "append"} == {"failed"}
    assert "the device is gone" in next(result for result in seen if result.group == "append").text()
    assert {result.outcome for result in seen if result.group == "hadamard"} == {"passed"}


def test_a_process_that_dies_leaves_what_it_found(tmp_path: Path) -> None:
    """As a memory fault on a GPU ends it."""
    report = tmp_path / "report.md"
    run = command("--quick", "--output", str(report), code="from kvarn import ops; import os; ops.encode = lambda *a, **k: os.abort()")
    assert run.returncode < 0
    text = report.read_text()
    assert "not finished: died in encode and decode: k4v2_g128 head_dim 128" in text
    assert "| passed | append: head_dim 64 |" in text


@pytest.mark.parametrize(("arguments", "message"), [(("--backend", "nonsense"), "nonsense"), (("--device", "7"), "expected 0 to 0, got 7")])
def test_a_backend_that_cannot_run_is_an_error_and_the_report_says_so(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    report = tmp_path / "report.md"
    run = command("--output", str(report), *arguments)
    assert run.returncode == 1
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert "nothing could be checked" in report.read_text()
    assert message in report.read_text()


def test_findings_decide() -> None:
    assert Finding("bytes that differ", 0, 0).passed
    assert not Finding("bytes that differ", 1, 0).passed
    assert Finding("error", 1e-4, 5e-4).passed
    assert not Finding("error", np.nan, 5e-4).passed


def test_reports_name_what_failed_and_what_was_skipped(tmp_path: Path) -> None:
    for name in ("report.md", "report.json"):
        report = Report(tmp_path / name, "hip", 1, "full", {"plan": "hip:1, a GPU (gfx942)", "runtime": "HIP 7.0.0"})
        report.results.append(Result("attend", "a | b", "failed", (Finding("error", float("nan"), 1e-3), Finding("bytes", 0, 0)), 0.5))
        report.results.append(Result("graph", "c", "skipped", (), 0, "none here"))
        report.write()
    text = (tmp_path / "report.md").read_text()
    assert "| plan | hip:1, a GPU (gfx942) |" in text
    assert "| failed | attend: a \\| b | error: nan of 1.00e-03 | 0.50 |" in text
    assert "| skipped | graph: c | none here | 0.00 |" in text
    assert f"  CPUs        {len(os.sched_getaffinity(0))} usable" in text
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["result"] == "failed"
    assert data["results"][0]["findings"][0] == {"what": "error", "worst": "nan", "allowed": 1e-3, "passed": False}


def test_arrays_of_torch_serve_as_well() -> None:
    """As on a CUDA device, here in host memory: what is put there comes back, and the checks hold."""
    torch = pytest.importorskip("torch")

    class HostTorch(_devices.TorchDevice):
        backend, asynchronous = "cpu", False

        def __init__(self) -> None:
            self._torch, self._device, self.index = torch, "cpu", 0

        def synchronize(self) -> None:
            pass

        def free_bytes(self) -> int:
            return 0

        def capture(self, work: Any) -> Any:
            return None

    device = HostTorch()
    for check in checks.all_checks():
        if check.quick:
            result = _doctor._result(check, device)
            assert result.outcome == ("skipped" if check.group == "graph" else "passed"), (check.name, result.text())
    values = np.arange(12, dtype=np.uint16).reshape(4, 3)
    for kind in ("", "bfloat16"):
        array = device.put(values, kind)
        assert (array.dtype == torch.bfloat16) == bool(kind)
        np.testing.assert_array_equal(device.get(array), values)
        np.testing.assert_array_equal(device.part(array, 1, 2), values[1:3])
        other = device.empty((4, 3), np.uint16, kind)
        device.copy(other, array)
        np.testing.assert_array_equal(device.get(other), values)
    array = device.put(values.astype(np.int32))
    device.set_part(array, 2, np.full((2, 3), 7, np.int32))
    assert device.get(array).tolist() == [[0, 1, 2], [3, 4, 5], [7, 7, 7], [7, 7, 7]]
