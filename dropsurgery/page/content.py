"""A page as data: sections of sentences, facts, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dropsurgery.report import Table, as_text


@dataclass(frozen=True)
class Figure:
    """A picture with what it shows in words.

    Attributes:
        caption: one line below it.
        description: what a person who does not see it has to know.
        svg: the drawing, to be put into an HTML page as it is.
        paper: whether it has colours of its own, made for a white ground, and keeps its width.
    """

    caption: str
    description: str
    svg: str
    paper: bool = False


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        title: the heading.
        anchor: its id in the page.
        lead: one paragraph.
        facts: pairs of a name and a value.
        tables: in reading order; long ones are folded in HTML.
        figures: in reading order.
        text: preformatted text, as a program printed it.
    """

    title: str
    anchor: str
    lead: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    text: str = ""

    def markdown(self) -> str:
        """Return the section as Markdown; figures are told in words."""
        parts = [f"## {self.title}", "", *((as_text(self.lead), "") if self.lead else ())]
        if self.facts:
            parts.append(Table("", ("", ""), self.facts).markdown_rows())
        parts += [f"*{f.caption}* {as_text(f.description)}\n" for f in self.figures]
        parts += [f"### {as_text(t.title)}\n\n{t.markdown_rows()}" for t in self.tables]
        if self.text:
            parts += ["```text", self.text.replace("```", "'''"), "```", ""]
        return "\n".join(parts)


@dataclass(frozen=True)
class Page:
    """What is written as HTML, Markdown or JSON.

    Attributes:
        title: the heading.
        status: the outcome in a few words: a verdict, or what was done.
        good: whether it is one to be glad of; None where there is nothing to judge.
        lead: one paragraph below the heading.
        sections: in reading order.
        facts: everything unformatted, as JSON values.
    """

    title: str
    status: str
    good: bool | None
    lead: str
    sections: tuple[Section, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def markdown(self) -> str:
        """Return the page as GitHub-flavoured Markdown."""
        head = [f"# {as_text(self.title)}", "", f"**{as_text(self.status)}**", ""]
        head += [as_text(self.lead), ""]
        return "\n".join([*head, *(section.markdown() for section in self.sections)])

    def to_json(self) -> dict[str, Any]:
        """Return the page as plain data for `json.dumps`."""
        return {"title": self.title, "status": self.status, **self.facts}
