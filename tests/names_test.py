"""Every name in the packages is defined: ruff and mypy take shapes of arrays for names."""

import builtins
import pathlib
import symtable
from collections.abc import Iterator

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_FILES = sorted(
    path for name in ("nanoflow_jax", "pallas_kernels") for path in (_ROOT / name).rglob("*.py")
)
# Of a module, beside what it assigns.
_GIVEN = {"__file__", "__name__", "__doc__", "__path__", *vars(builtins)}


def _scopes(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for child in table.get_children():
        yield from _scopes(child)


def _is_bound(symbol: symtable.Symbol) -> bool:
    return symbol.is_assigned() or symbol.is_imported() or symbol.is_parameter()


def _undefined(text: str, name: str) -> set[str]:
    module = symtable.symtable(text, name, "exec")
    symbols = [one for scope in _scopes(module) for one in scope.get_symbols()]
    defined = {one.get_name() for one in module.get_symbols() if _is_bound(one)}
    # Python takes a function with the name top for a module, whose own names are global.
    used = {one.get_name() for one in symbols if one.is_global() and not _is_bound(one)}
    return used - defined - _GIVEN


@pytest.mark.parametrize("path", _FILES, ids=lambda path: str(path.relative_to(_ROOT)))
def test_every_name_of_a_module_is_defined(path):
    assert _undefined(path.read_text(), str(path)) == set()


def test_a_name_that_nothing_defines_is_found():
    text = "import os\ndef f(x: 'T D') -> None:\n    y = os\n    return [y, z, len(x), f]\n"
    assert _undefined(text, "some.py") == {"z"}
