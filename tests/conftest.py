"""README's tables of what works are made from the tests that ran, and compared with README whenever all of them ran.

`@pytest.mark.way("beams")` names what users do and the test proves. The families that it does so with are rows of
tests/models.py: those the test is parametrized with, or those the marker names, `way("beams", "llama", "opt")`.
`pytest tests/integrations --write-tables` (`make tables`) puts the tables into README.
"""

import signal
from collections import defaultdict
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests import models

README = Path(__file__).parents[1] / "README.md"
HERE = Path(__file__).parent / "integrations"
Row = tuple[str, str]  # its text, and a family that it was tested with
_rows: pytest.StashKey[dict[str, dict[Row, bool]]] = pytest.StashKey()
_is_whole: pytest.StashKey[bool] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-tables", action="store_true", help="put the tables of what passed into README.md")


def pytest_configure(config: pytest.Config) -> None:
    # What a shell runs in the background ignores SIGINT, and so do its children: tests of Ctrl-C would wait forever.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "way(text, *families): a row of README's table of ways, proved by this test")
    config.addinivalue_line("markers", "family(name): a row of README's table of families, proved by this test")
    config.addinivalue_line("markers", "refused(name, why): a family that README says is refused, proved by this test")
    rows: dict[str, dict[Row, bool]] = {"families": {}, "ways": {}, "refused": {}}
    config.stash[_rows] = rows


def pytest_collection_finish(session: pytest.Session) -> None:
    """Tables can be told from a run of every integration test, no less."""
    collected = {item.path for item in session.items if item.path.parent == HERE}
    chosen = (
        session.config.option.keyword or session.config.option.markexpr or getattr(session.config.option, "lf", False)
    )
    single = any("::" in argument for argument in session.config.args)
    session.config.stash[_is_whole] = collected == set(HERE.glob("test_*.py")) and not chosen and not single


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note whether a test of a row passed."""
    report = yield
    ended = report.when == "call" or report.failed
    for table, row in _rows_of(item) if ended else ():
        rows = item.config.stash[_rows][table]
        rows[row] = rows.get(row, True) and report.passed
    return report


def pytest_itemcollected(item: pytest.Item) -> None:
    """What a way was tested with is told by the test, not guessed."""
    for table, (text, family) in _rows_of(item):
        if table == "ways" and family not in models.FAMILIES:
            raise pytest.UsageError(f"{item.nodeid} names no family of tests/models.py for {text!r}: got {family!r}")


def _rows_of(item: pytest.Item) -> Iterator[tuple[str, Row]]:
    params = item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
    families = [param for param in params if isinstance(param, str) and param in models.FAMILIES]
    for marker in item.iter_markers():
        if marker.name == "way":
            text, *named = marker.args
            yield from (("ways", (text, family)) for family in [*families, *named] or [""])
        elif marker.name == "family":
            yield "families", (models.FAMILIES[marker.args[0]].note, marker.args[0])
        elif marker.name == "refused":
            yield "refused", (marker.args[1], marker.args[0])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where everything ran: write README's tables, or fail where they say something else."""
    config = session.config
    if not config.stash.get(_is_whole, False) or session.testsfailed or config.option.collectonly:
        return
    before = README.read_text()
    after = put_tables(before, config.stash[_rows])
    if config.option.write_tables:
        README.write_text(after)
    elif after != before:
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        assert reporter is not None
        reporter.write_line("README's tables are not what the tests that ran tell: make tables", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def put_tables(readme: str, rows: dict[str, dict[Row, bool]]) -> str:
    """The text with each table between its marks replaced; a row counts where every test of it passed."""
    for table, head in (
        ("families", "| their layers | families |"),
        ("ways", "| way of generating | tested with |"),
        ("refused", "| refused, for it | families |"),
    ):
        gathered: defaultdict[str, set[str]] = defaultdict(set)
        for (text, family), passed in rows[table].items():
            if passed:
                gathered[text].add(title_of(family))
        body = "\n".join(
            f"| {text} | {', '.join(sorted(gathered[text], key=str.lower))} |" for text in sorted(gathered)
        )
        before, mark, rest = readme.partition(f"<!-- {table}: made by make tables -->\n")
        assert mark, f"README.md has no place for the table of {table}"
        readme = f"{before}{mark}{head}\n|---|---|\n{body}\n{rest[rest.index('<!-- end -->') :]}"
    return readme


def title_of(family: str) -> str:
    """What people call a family."""
    return models.FAMILIES[family].title if family in models.FAMILIES else f"`{family}`"
