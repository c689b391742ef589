"""Plain text of documentation pages: the main part of the page, one block per paragraph, listings verbatim."""

import re
from typing import Any

import lxml.html

_MAIN_PARTS = (
    "//*[@id='main-content']",
    "//main",
    "//*[@id='apicontent']",
    "//div[@id='content']//div[@class='innertube']",
    "//div[@class='body']",
    "//*[@role='main']",
    "//body",
)
_DROPPED_TAGS = frozenset(
    {"script", "style", "nav", "header", "footer", "head", "svg", "img", "form", "button", "select", "noscript"}
)
_DROPPED_CLASSES = frozenset(
    [
        "navheader",
        "navfooter",
        "sphinxsidebar",
        "related",
        "headerlink",
        "nosearch",
        "fancy_toc",
        "toc",
        "sidebar",
        "footer",
        "topbar",
        "menu",
        "picker",
        "searchmenu",
        "version_picker",
        "tooltip",
        "api_metadata",
        "src",
        "srclink",
        "sidebar-elems",
        "anchor",
        "mark",
        "title-anchors",
        "since",
        "code-attribute",
        "rightside",
        "out-of-band",
        "mobile-nav",
    ]
)
_BLOCK_TAGS = frozenset(
    [
        "p",
        "div",
        "section",
        "article",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "ul",
        "ol",
        "li",
        "dl",
        "dt",
        "dd",
        "table",
        "tr",
        "blockquote",
        "details",
        "summary",
        "pre",
        "figure",
        "center",
        "hr",
        "main",
        "body",
    ]
)
_SPACE = re.compile(r"\s+")
_XML_DECLARATION = re.compile(r"^\s*<\?xml[^>]*\?>")


def _dropped(element: Any) -> bool:
    if not isinstance(element.tag, str) or element.tag in _DROPPED_TAGS:
        return True
    return not _DROPPED_CLASSES.isdisjoint((element.get("class") or "").split())


def _append(element: Any, pieces: list[str]) -> None:
    """Append the text of `element`: collapsed inline text, a blank line around blocks, listings as they are."""
    tag = element.tag
    if tag == "pre":
        pieces.append("\n\n" + element.text_content().strip("\n") + "\n\n")
        return
    block = tag in _BLOCK_TAGS
    if block:
        pieces.append("\n\n- " if tag == "li" else "\n\n")
    if element.text:
        pieces.append(_SPACE.sub(" ", element.text))
    for child in element:
        if not _dropped(child):
            _append(child, pieces)
        if child.tail:
            pieces.append(_SPACE.sub(" ", child.tail))
    if tag == "br":
        pieces.append("\n")
    elif tag in ("td", "th"):
        pieces.append("  ")
    if block:
        pieces.append("\n\n")


def html_to_text(html: str) -> str:
    """Readable text of one page, empty when the page does not parse."""
    try:
        tree = lxml.html.document_fromstring(_XML_DECLARATION.sub("", html))
    except (lxml.etree.ParserError, ValueError):
        return ""
    for path in _MAIN_PARTS:
        found = tree.xpath(path)
        if found:
            pieces: list[str] = []
            _append(found[0], pieces)
            text = re.sub(r"\n\s*\n", "\n\n", "".join(pieces))
            return re.sub(r"\n\n- \s*", "\n\n- ", text)
    return ""
