"""``kvarn doctor``: whether a backend computes on this machine what it should. Needs numpy alone; a CUDA device also needs PyTorch."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvarn._devices import Device, open_device
from kvarn._doctor.checks import Check, SkippedError, all_checks
from kvarn._doctor.report import Finding, Report, Result
from kvarn._plan import Plan


def run(
    backend: str, output: Path, device: int = 0, *, quick: bool = False, progress: Callable[[Result], None] = lambda result: None
) -> Report:
    """Compares every operation of a backend with the generic CPU kernels (bytes) and with float64 arithmetic (attend); writes a report.

    Args:
        backend: "cpu", "cuda" or "hip".
        output: The report's file, written whatever happens: JSON where its name ends in .json, else Markdown.
        device: Index of the GPU.
        quick: A small choice of the checks.
        progress: Called with each result.

    Returns:
        The report.

    Raises:
        UnavailableError: The backend cannot run here; the report says so too.
    """
    report = Report(output, backend, device, "quick" if quick else "full")
    try:
        opened = open_device("doctor", backend, device)
        limits: dict[str, Any] = {"num_q_heads": 1, "max_num_seqs": 1, "max_q_tokens": 1, "max_tiles": 1}
        described = Plan("k4v2_g128", head_dim=128, num_kv_heads=1, backend=backend, device=device, **limits)
        report.facts = {"plan": described.describe, **opened.facts()}
    except Exception as error:
        report.write(reason=f"nothing could be checked: {error}")
        raise
    for check in all_checks():
        if quick and not check.quick:
            continue
        report.write(running=f"{check.group}: {check.name}")
        report.results.append(_result(check, opened))
        progress(report.results[-1])
    report.write()
    return report


def _result(check: Check, device: Device) -> Result:
    findings: list[Finding] = []
    reason, began = "", time.perf_counter()
    try:
        findings += check.run(device)
        outcome = "passed" if all(finding.passed for finding in findings) else "failed"
    except SkippedError as skipped:
        outcome, reason = "skipped", str(skipped)
    except Exception as error:
        outcome, reason = "failed", "".join(traceback.format_exception_only(error)).strip()
    return Result(check.group, check.name, outcome, tuple(findings), time.perf_counter() - began, reason)
