"""The pages of reports: one style and a few shared parts, in templates beside the code."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

__all__ = ["render_page"]

_HERE = "diffkit.evaluation"


def render_page(name: str, content: Mapping[str, Any], package: str = _HERE) -> str:
    """The page of a template; it holds everything that it shows.

    Arguments:
        name: of the template, which may extend page_base.html and import from page_macros.html.
        content: everything that the template names; a missing name is an error.
        package: where the template lies.
    """
    return _environment(package).get_template(name).render(**content)


@cache
def _environment(package: str) -> Environment:
    def load(name: str) -> str:
        place = _HERE if name.startswith("page_") else package
        return files(place).joinpath(name).read_text(encoding="utf-8")

    return Environment(
        loader=FunctionLoader(load),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
