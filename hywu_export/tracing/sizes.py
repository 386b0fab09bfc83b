"""Sizes inside a graph as the manifest writes them: what a traced size is, in terms of the axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TypeAlias

import sympy

from hywu_export.tracing.spec import Axis
from hywu_runtime.manifest import Term

_Polynomial: TypeAlias = dict[tuple[str, ...], Fraction]
"""Coefficients by the root axes whose sizes they multiply."""

MAX_ROOTS = 4
_GRID, _TRIALS = (2, 4), (3, 6, 7, 9, 12)


class Sizes:
    """Names of sizes: an axis of ``axes`` that has the size, else one that is made, named by its formula.

    Args:
        axes: what the manifest declares.
        units: root axis → torch's symbol for its size divided by its ``multiple``.
        same: other symbols of torch's → what they are in those.
    """

    def __init__(
        self,
        axes: Mapping[str, Axis],
        units: Mapping[str, sympy.Expr],
        same: Mapping[sympy.Expr, sympy.Expr],
    ):
        self._same = {str(symbol): expression for symbol, expression in same.items()}
        self.made: dict[str, Axis] = {}
        self._multiples = {name: axes[name].multiple for name in units}
        self._roots = {str(unit): name for name, unit in units.items()}
        self._axes = axes
        self._names: dict[tuple[Term, ...], str] = {}
        for name, axis in reversed(list(axes.items())):
            if axis.one_or is None:
                terms = axis.sum or (Term((axis.of or name,), divide=axis.divide if axis.of else 1),)
                self._names[terms] = name
        self._known: dict[str, int | str | None] = {}

    def name(self, size: int | str | None) -> int | str | None:
        """The size as the manifest writes it; None for one that it cannot express.

        ``size`` is a number, the name of an axis, or an expression of torch's.
        """
        if not isinstance(size, str) or size in self._axes:
            return size
        if size not in self._known:
            self._known[size] = self._find(size)
        return self._known[size]

    def _find(self, text: str) -> int | str | None:
        try:
            expression = sympy.sympify(text)
            others = {s: self._same[str(s)] for s in expression.free_symbols if str(s) in self._same}
            expression = sympy.sympify(str(expression.subs(others)))  # without torch's assumptions
            roots = [self._roots[str(symbol)] for symbol in expression.free_symbols]
        except (sympy.SympifyError, KeyError, TypeError, SyntaxError):
            return None
        if len(roots) > MAX_ROOTS:
            return None
        if not roots:
            return int(expression)
        polynomial = _fit(expression, {s: self._roots[str(s)] for s in expression.free_symbols})
        terms = None if polynomial is None else self._terms(polynomial)
        if terms is None:
            return None
        if terms not in self._names:
            name = " + ".join(map(_formula, terms))
            self._names[terms] = name
            first = terms[0]
            single = len(terms) == 1 and len(first.of) == 1 and first.times == 1
            self.made[name] = Axis(of=first.of[0], divide=first.divide) if single else Axis(sum=terms)
        return str(self._names[terms])

    def _terms(self, polynomial: _Polynomial) -> tuple[Term, ...] | None:
        """Of sizes instead of units, the largest products first."""
        terms = []
        for roots, coefficient in sorted(polynomial.items(), key=lambda item: (-len(item[0]), item[0])):
            scaled = coefficient / math.prod(self._multiples[root] for root in roots)
            if coefficient.denominator != 1 or scaled < 0:
                return None
            terms.append(Term(roots, scaled.numerator, scaled.denominator))
        return tuple(terms)


def _fit(expression: sympy.Expr, roots: Mapping[sympy.Symbol, str]) -> _Polynomial | None:
    """The polynomial, linear in each symbol, that has the values of ``expression``, or None.

    By its values and not its form: a size may be written with roundings that never round.
    """
    symbols = sorted(roots, key=lambda symbol: roots[symbol])

    def value(point: Sequence[int]) -> Fraction:
        return Fraction(str(expression.subs(dict(zip(symbols, point)))))

    low, high = _GRID
    corners = itertools.product((0, 1), repeat=len(symbols))
    grid = {corner: value([_GRID[i] for i in corner]) for corner in corners}
    found: _Polynomial = {}
    # Each corner of the grid is a product of (1, low) or (1, high); differences along an axis give its slope.
    for index in range(len(symbols)):
        for corner in list(grid):
            if corner[index] == 0:
                upper = (*corner[:index], 1, *corner[index + 1 :])
                slope = (grid[upper] - grid[corner]) / (high - low)
                grid[corner], grid[upper] = grid[corner] - slope * low, slope
    for corner, coefficient in grid.items():
        if coefficient:
            found[tuple(roots[s] for s, i in zip(symbols, corner) if i)] = coefficient
    for shift in range(len(_TRIALS)):
        point = [_TRIALS[(shift + 2 * i) % len(_TRIALS)] for i in range(len(symbols))]
        sizes = {roots[s]: p for s, p in zip(symbols, point)}
        if value(point) != sum(c * math.prod(sizes[root] for root in of) for of, c in found.items()):
            return None
    return found


def _formula(term: Term) -> str:
    factors = [str(term.times)] if term.times != 1 or not term.of else []
    return "*".join([*factors, *term.of]) + (f"/{term.divide}" if term.divide != 1 else "")
