"""The audit for people (a table) and for programs (JSON)."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from ops.audit import AuditReport

#: A person reads the first few; `--json` has all.
_SHOWN = 50


def as_json_text(report: AuditReport) -> str:
    """The whole report, with the totals that the report computes."""
    totals = {"ok": report.ok, "sold": report.sold, "oversold": report.oversold}
    return json.dumps(totals | asdict(report), indent=2)


def print_report(report: AuditReport, console: Console | None = None) -> None:
    """The totals, then every finding with the purchase or item it is about."""
    console = console or Console(highlight=False)
    counts = ", ".join(f"{count} {status}" for status, count in report.purchases.items()) or "none"
    table = Table(title="Audit, recomputed from the purchases", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in (
        ("items", str(len(report.items))),
        ("purchases", counts),
        ("units sold", str(report.sold)),
        ("units oversold", str(report.oversold)),
        ("asked the provider about", str(report.provider.asked)),
        ("charged twice", str(len(report.provider.charged_twice))),
        ("paid but unconfirmed", str(len(report.provider.paid_but_unconfirmed))),
        ("open: call under way or in doubt", str(len(report.provider.open))),
        ("stuck", str(sum(finding.check == "stuck" for finding in report.findings))),
        ("winners lost to a fault", str(len(report.winners_lost))),
    ):
        table.add_row(name, value)
    console.print(table)
    if report.winners_lost:
        console.print("Winners lost to a fault: had stock, and were neither charged nor refused by the provider.")
        for purchase in report.winners_lost[:_SHOWN]:
            console.print(f"  {purchase}")
        _print_rest(console, len(report.winners_lost))
    if report.ok:
        console.print("Stock, purchases and the provider's books agree.")
        return
    findings = Table(title=f"{len(report.findings)} findings", title_justify="left")
    for name in ("check", "purchase or item", "seen"):
        findings.add_column(name, overflow="fold")
    for finding in report.findings[:_SHOWN]:
        findings.add_row(finding.check, finding.subject, finding.detail)
    console.print(findings)
    _print_rest(console, len(report.findings))


def _print_rest(console: Console, total: int) -> None:
    if total > _SHOWN:
        console.print(f"… and {total - _SHOWN} more: --json lists all")
