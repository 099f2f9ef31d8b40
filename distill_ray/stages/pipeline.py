"""run: every stage that is not finished, then the results and the report."""

from __future__ import annotations

from typing import Any

from distill_ray.stages import entry, report, results
from distill_ray.stages.context import Context


@entry.Stage
def run(context: Context) -> dict[str, Any]:
    """Make what is not finished yet; returns what stands in the run's ``summary.json``: ``rows``, ``stages``, ..."""
    summary = results.write(context)
    report.write_report(context, summary)
    return summary
