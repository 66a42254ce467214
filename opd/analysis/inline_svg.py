"""SVG figures inside a page, in the page's colours, so that they follow its light or dark mode."""

import html
import re

NAMES = re.compile(r' id="(?:figure|axes|patch|line2d|text|matplotlib|xtick|ytick|legend)[^"]*"')
"""Ids that matplotlib gives in every figure and refers to nowhere."""


def inline_svg(svg: str, title: str, colours: dict[str, str]) -> str:
    """The <svg> element of a file that matplotlib wrote, with ``title`` for screen readers.

    colours: from a colour in the file to the CSS value that takes its place.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="([^"]*)pt"', r'\1 style="max-width: \2pt"', svg, count=1)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
    svg = NAMES.sub("", svg)
    for colour, value in colours.items():
        svg = re.sub(rf"(?<=[:\s\"]){colour}\b", value, svg)
    return svg.strip()
