"""The `fairlane` command.

Exit codes: 0 all is well; 1 an invariant is broken, a file to import has errors, a purchase was not confirmed, or a
process ended that should not; 2 wrong usage, a setting that cannot work, or a server that cannot be reached; 130 after
Ctrl-C, 143 after SIGTERM.
An error is one line on stderr.

What a command needs is imported when it runs, so that `fairlane --help` does not load the whole service.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from ops.catalogue import BadLine

app = typer.Typer(
    help="Sells limited stock to a crowd: accepted once, decided in order, charged once.",
    epilog="Exit codes: 0 ok; 1 an invariant is broken or an import has errors; 2 wrong usage or settings; 130 Ctrl-C.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
items_app = typer.Typer(help="Items.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(items_app, name="items")
review_app = typer.Typer(
    help="Purchases that only an operator can settle.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(review_app, name="review")

PurchaseId = Annotated[str, typer.Argument(metavar="PURCHASE", help="Its id, as the API shows it.")]


def main() -> None:
    """The entry point `fairlane`."""
    app(prog_name="fairlane")


@app.command()
def migrate() -> None:
    """Bring the database to the schema of this version; waits up to 30 s for the server."""
    with _errors_in_one_line():
        from ops.migrating import migrate_when_reachable
        from shared.settings import load_settings

        typer.echo(f"fairlane: database is at revision {migrate_when_reachable(load_settings())}")


@app.command()
def up() -> None:
    """Run every line of the Procfile, `release` first, until one ends or Ctrl-C.

    The Procfile is the one beside the installed packages, as in a checkout; else the working directory's.
    """
    with _errors_in_one_line():
        import os

        from ops import stack

        stack.checked_settings()
        code = stack.up(os.environ)
    raise typer.Exit(code)


@app.command()
def dev() -> None:
    """The same on embedded servers and a sandbox provider, with data in .fairlane/, until Ctrl-C."""
    with _errors_in_one_line():
        from ops.dev import dev as run_dev

        code = run_dev()
    raise typer.Exit(code)


@app.command()
def demo(
    buyers: Annotated[int, typer.Option(min=1, max=20_000, help="How many buyers come.")] = 2_000,
    seed: Annotated[int, typer.Option(help="Who buys what, and when: the same seed, the same crowd.")] = 1,
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything up afterwards, until Ctrl-C.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Lines instead of the live view.")] = False,
) -> None:
    """Run a whole sale on embedded servers, then the audit, then five seconds of one lock per item."""
    with _errors_in_one_line():
        from ops.demo.run import run_demo

        code = run_demo(buyers=buyers, seed=seed, keep=keep, plain=plain or not sys.stdout.isatty())
    raise typer.Exit(code)


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="One round of small numbers, in less than a minute.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything measured as JSON, instead of tables.")] = False,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it: .svg or .png.")] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="SCENARIO", help="Only this one; may be repeated.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, max=100, help="How often each contender runs.")] = None,
) -> None:
    """Measure Fairlane beside what a shop would use instead: on embedded servers, in the same rounds."""
    with _errors_in_one_line():
        from ops.bench import run

        if unknown := [name for name in only or () if name not in run.SCENARIOS]:
            _fail(f"--only {unknown[0]}: is none of {', '.join(run.SCENARIOS)}", 2)
        if picture is not None and picture.suffix not in (".svg", ".png"):
            _fail(f"--picture {picture}: must end in .svg or .png", 2)
        if picture is not None and not picture.parent.is_dir():
            _fail(f"--picture {picture}: there is no folder {picture.parent}", 2)
        code = run.run_bench(only=only or (), rounds=rounds, quick=quick, to_json=as_json, picture_file=picture)
    raise typer.Exit(code)


@app.command()
def audit(as_json: Annotated[bool, typer.Option("--json", help="The whole report as JSON.")] = False) -> None:
    """Recompute stock from the purchases and compare with the provider's books; exit 1 on drift. Only reads."""
    with _errors_in_one_line():
        import asyncio

        from ops.audit import audit as run_audit
        from ops.audit_report import as_json_text, print_report
        from shared.settings import load_settings

        report = asyncio.run(run_audit(load_settings("payment_url")))
        if as_json:
            typer.echo(as_json_text(report))
        else:
            print_report(report)
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def buy(
    item: Annotated[str, typer.Argument(help="The item's name.")],
    token: Annotated[str, typer.Option(help="The payment token.", envvar="FAIRLANE_PAYMENT_TOKEN")],
    customer: Annotated[str, typer.Option(help="Who buys.")],
    quantity: Annotated[int, typer.Option(min=1, max=1_000)] = 1,
    key: Annotated[str | None, typer.Option(help="The idempotency key; a new one if none is given.")] = None,
    url: Annotated[str, typer.Option(help="Where the API is.", envvar="FAIRLANE_URL")] = "http://127.0.0.1:8000",
    api_key: Annotated[str, typer.Option(help="The secret of an API key.", envvar="FAIRLANE_API_KEY")] = "",
    within: Annotated[float, typer.Option(min=0, help="Seconds to wait for the result.")] = 60.0,
) -> None:
    """Buy over the HTTP API and wait for the result: the purchase as one line of JSON.

    Exit code 0: confirmed. 1: refused, or it ended in another way. 2: nobody could tell; with the same --key it may be
    asked again.
    """
    if not api_key:
        _fail("--api-key or FAIRLANE_API_KEY: is not set", 2)
    with _errors_in_one_line():
        import asyncio

        from ops.buying import Wish, buy_one

        code = asyncio.run(buy_one(url, api_key, Wish(item, quantity, customer, token, key), within))
    raise typer.Exit(code)


@items_app.command("import")
def import_items(file: Annotated[Path, typer.Argument(metavar="FILE.csv", help="UTF-8, with a header.")]) -> None:
    """Create or change the items of a CSV file: all of them, or none when a line is bad.

    Columns: sku, name, stock, price (minor units), currency; and, if wanted, per_customer, opens_at, closes_at,
    hold_seconds, waitlist.
    """
    with _errors_in_one_line():
        import asyncio

        from ops.catalogue import import_catalogue, read_catalogue
        from shared.settings import load_settings

        settings = load_settings()
        try:
            catalogue = read_catalogue(file)
        except OSError as error:
            _fail(f"{file}: {error.strerror}", 2)
        _fail_for_bad_lines(file, catalogue.bad)
        imported = asyncio.run(import_catalogue(catalogue.lines, settings))
        _fail_for_bad_lines(file, imported.bad)
        typer.echo(f"fairlane: {imported.created} items created, {imported.changed} changed")


@review_app.command("list")
def list_reviews() -> None:
    """Show every purchase in needs_review, oldest first, with what the provider has of it."""
    with _errors_in_one_line():
        import asyncio

        from ops.review import open_review
        from shared.settings import load_settings

        async def show() -> None:
            async with open_review(load_settings("payment_url")) as review:
                waiting = await review.waiting()
            for each in waiting:
                record = each.record
                has = "no answer" if each.charges is None else ", ".join(f"{c.id} {c.status}" for c in each.charges)
                typer.echo(
                    f"{record.id}  {record.quantity} x {record.item}  {record.amount} {record.currency}"
                    f"  {record.customer}  {record.reason}  at the provider: {has or 'nothing'}"
                )
            typer.echo(f"fairlane: {len(waiting)} in review")

        asyncio.run(show())


@review_app.command("confirm")
def confirm_review(
    purchase: PurchaseId, charge: Annotated[str, typer.Argument(help="The provider's id of the charge that paid it.")]
) -> None:
    """Say that this charge paid for it. The provider must have the charge as succeeded."""
    with _errors_in_one_line():
        import asyncio

        from ops.review import open_review
        from shared.settings import load_settings

        async def confirm() -> None:
            async with open_review(load_settings("payment_url")) as review:
                await review.confirm(_purchase_id(purchase), charge)

        asyncio.run(confirm())
        typer.echo(f"fairlane: {purchase} is confirmed")


@review_app.command("decline")
def decline_review(purchase: PurchaseId) -> None:
    """Say that nothing paid for it; its stock returns. The provider must have no succeeded charge of it."""
    with _errors_in_one_line():
        import asyncio

        from ops.review import open_review
        from shared.settings import load_settings

        async def decline() -> None:
            async with open_review(load_settings("payment_url")) as review:
                await review.decline(_purchase_id(purchase))

        asyncio.run(decline())
        typer.echo(f"fairlane: {purchase} is declined")


def _purchase_id(text: str) -> str:
    from uuid import UUID

    try:
        return UUID(text).hex
    except ValueError:
        _fail(f"{text} is not the id of a purchase", 2)


def _fail_for_bad_lines(file: Path, bad: Sequence[BadLine]) -> None:
    if bad:
        for one in bad:
            typer.echo(f"{file}: {one}", err=True)
        _fail(f"{file}: nothing imported, {len(bad)} error{'s' * (len(bad) > 1)}", 1)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"fairlane: {message}", err=True)
    raise typer.Exit(code)


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Turn what a user can put right into one line on stderr and exit code 2; the rest is a defect and shows itself."""
    from shared.errors import FairlaneError

    try:
        yield
    except typer.Exit:
        raise
    except FairlaneError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except Exception as error:
        # Modules of the embedded extra and of SQLAlchemy are looked at only when something failed: they load slowly.
        if (message := _explained(error)) is None:
            raise
        _fail(message, 2)


def _explained(error: Exception) -> str | None:
    from sqlalchemy.exc import OperationalError

    from ops.embedded import EmbeddedError
    from ops.sandbox import ProviderError

    if isinstance(error, OperationalError):
        return f"FAIRLANE_DATABASE_URL: {str(error.orig).splitlines()[0]}"
    if isinstance(error, EmbeddedError | ProviderError):
        return " ".join(str(error).split())
    return None
