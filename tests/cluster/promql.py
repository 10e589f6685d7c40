"""PromQL against the metrics that are declared: what a query reads that nobody exports."""

from collections.abc import Iterator
from typing import Any

import promql_parser

from actors.exported_metrics import declared

GRAFANA = {"$run": "x", "$__rate_interval": "5m"}
SERIES = {series: metric for metric in declared().values() for series in metric.series}


def problems(query: str) -> list[str]:
    """What is wrong with a query: it does not parse, or it reads a name or a label that is not exported."""
    for variable, value in GRAFANA.items():
        query = query.replace(variable, value)
    try:
        parsed = promql_parser.parse(query)
    except ValueError as error:
        return [f"it does not parse: {error}"]
    return [*dict.fromkeys(_problems(parsed))]


def names(query: str) -> set[str]:
    """The names of the series that a query reads."""
    for variable, value in GRAFANA.items():
        query = query.replace(variable, value)
    return {selector.name for selector in _selectors(promql_parser.parse(query))}


def _problems(expression: Any) -> Iterator[str]:
    selectors = list(_selectors(expression))
    for selector in selectors:
        if selector.name not in SERIES:
            yield f"nobody exports {selector.name}"
            continue
        for matcher in selector.matchers.matchers:
            if matcher.name not in _labels(selector.name):
                yield f"{selector.name} has no label {matcher.name}"
    for each in _walk(expression):
        if isinstance(each, promql_parser.AggregateExpr) and each.modifier is not None:
            read = [one.name for one in _selectors(each.expr) if one.name in SERIES]
            for label in each.modifier.labels:
                if any(label not in _labels(name) for name in read):
                    yield f"{', '.join(read)}: there is no label {label} to sum by"


def _labels(series: str) -> set[str]:
    return {*SERIES[series].labels, *(["le"] if series.endswith("_bucket") else [])}


def _selectors(expression: Any) -> Iterator[Any]:
    return (each for each in _walk(expression) if isinstance(each, promql_parser.VectorSelector))


def _walk(expression: Any) -> Iterator[Any]:
    yield expression
    for attribute in ("lhs", "rhs", "expr", "vector_selector"):
        inner = getattr(expression, attribute, None)
        if inner is not None:
            yield from _walk(inner)
    for inner in getattr(expression, "args", None) or ():
        yield from _walk(inner)
