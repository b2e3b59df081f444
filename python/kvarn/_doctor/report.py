"""What the checks found, as a file to attach to an issue: Markdown, or JSON where the name ends in .json."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvarn import _core
from kvarn._report import environment_report


@dataclass(frozen=True)
class Finding:
    """One comparison: the largest error, or the number of bytes that differ, and what is allowed."""

    what: str
    worst: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.worst <= self.allowed  # NaN is not

    def __str__(self) -> str:
        if self.allowed == 0:
            return f"{self.what}: {self.worst:,.0f}"
        return f"{self.what}: {self.worst:.2e} of {self.allowed:.2e}"


@dataclass(frozen=True)
class Result:
    """What one check gave. reason: why it was skipped, or the error that ended it."""

    group: str
    name: str
    outcome: str  # "passed", "failed", "skipped"
    findings: tuple[Finding, ...]
    seconds: float
    reason: str = ""

    def text(self) -> str:
        """The findings that decide, in one line: those that failed, else the largest of each kind, which is what stands before a comma."""
        failed = [finding for finding in self.findings if not finding.passed]
        kinds: dict[tuple[str, float], Finding] = {}
        for finding in self.findings:
            kind = Finding(finding.what.partition(",")[0], finding.worst, finding.allowed)
            key = kind.what, kind.allowed
            if key not in kinds or kind.worst > kinds[key].worst:
                kinds[key] = kind
        return "; ".join([*map(str, failed or kinds.values()), *([self.reason] if self.reason else [])])


@dataclass
class Report:
    """Written to its file whenever something is added: what a fault of the device leaves is how far it came.

    Args:
        path: the file.
        backend, device: what is checked.
        facts: about the device and its runtime, by name.
        size: "full" or "quick".
    """

    path: Path
    backend: str
    device: int
    size: str
    facts: dict[str, str] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    started: datetime.datetime = field(default_factory=lambda: datetime.datetime.now(datetime.timezone.utc))
    environment: str = field(default_factory=environment_report)

    def write(self, running: str = "", reason: str = "") -> None:
        """Args: running: the check that begins now; reason: why none could be made."""
        verdict = f"not finished: died in {running}" if running else reason or ("failed" if self.count("failed") else "passed")
        text = self._json(verdict) if self.path.suffix == ".json" else "\n".join(self._markdown(verdict)) + "\n"
        self.path.write_text(text)

    def count(self, outcome: str) -> int:
        return sum(result.outcome == outcome for result in self.results)

    @property
    def summary(self) -> str:
        skipped = f", {self.count('skipped')} skipped" if self.count("skipped") else ""
        return f"{self.count('passed')} of {len(self.results)} checks passed, {self.count('failed')} failed{skipped}"

    def _head(self, verdict: str) -> dict[str, str]:
        return {
            "result": verdict,
            "backend": f"{self.backend}, device {self.device}",
            **self.facts,
            "library": f"kvarn {_core.version()}",
            "date": f"{self.started:%Y-%m-%d %H:%M} UTC",
            "size": self.size,
            "checks": self.summary,
            "seconds": f"{sum(result.seconds for result in self.results):.1f}",
        }

    def _json(self, verdict: str) -> str:
        checks: list[dict[str, Any]] = [
            {
                "group": result.group,
                "name": result.name,
                "outcome": result.outcome,
                "seconds": round(result.seconds, 3),
                "reason": result.reason,
                "findings": [
                    # JSON has no NaN.
                    {"what": f.what, "worst": f.worst if f.worst == f.worst else "nan", "allowed": f.allowed, "passed": f.passed}
                    for f in result.findings
                ],
            }
            for result in self.results
        ]
        return json.dumps({**self._head(verdict), "results": checks, "environment": self.environment.splitlines()}, indent=1) + "\n"

    def _markdown(self, verdict: str) -> Iterator[str]:
        yield f"# kvarn doctor, backend {self.backend}: {verdict}"
        yield ""
        yield "| | |"
        yield "|---|---|"
        yield from (f"| {name} | {_cell(value)} |" for name, value in self._head(verdict).items())
        for heading, outcomes in (("Failed", ("failed",)), ("Skipped", ("skipped",)), ("All checks", ("passed", "failed", "skipped"))):
            chosen = [result for result in self.results if result.outcome in outcomes]
            if not chosen:
                continue
            yield ""
            yield f"## {heading}"
            yield ""
            yield "| outcome | check | found | seconds |"
            yield "|---|---|---|---:|"
            for result in chosen:
                yield f"| {result.outcome} | {result.group}: {_cell(result.name)} | {_cell(result.text())} | {result.seconds:.2f} |"
        yield ""
        yield "## Environment"
        yield ""
        yield "```"
        yield self.environment
        yield "```"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
