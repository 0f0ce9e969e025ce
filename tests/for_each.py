"""`for_each`: one test out of a check of one file, for all files; thousands of tests of a millisecond cost a minute."""

from __future__ import annotations

from collections.abc import Callable, Iterable


def for_each(names: Iterable[str]) -> Callable[[Callable[[str], None]], Callable[[], None]]:
    """A test that checks every name and fails with all that is wrong."""
    names = list(names)
    assert len(names) > 20, names

    def decorate(check: Callable[[str], None]) -> Callable[[], None]:
        def test() -> None:
            wrong = []
            for name in names:
                try:
                    check(name)
                except AssertionError as error:
                    wrong.append(str(error))
            assert not wrong, "\n".join(wrong)

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate
