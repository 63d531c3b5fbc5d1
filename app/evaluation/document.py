"""The page for a browser: one HTML file that needs no other. Pure."""

from __future__ import annotations

import re
from html import escape

from markdown_it import MarkdownIt

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2328; background: #fff; max-width: 72rem; margin: 2rem auto;
  padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #c8ccd1; }
blockquote { margin: 1rem 0; padding: .5rem 1rem; border-left: 4px solid #bf8700; background: #fff8e5; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid #c8ccd1; text-align: left; vertical-align: top; }
th { background: #f6f8fa; }
td:first-child, .interval { white-space: nowrap; }
.interval { display: block; font-size: .75rem; color: #59636e; }
svg { max-width: 100%; height: auto; }
"""
INTERVAL = re.compile(r"(?<=\d )\([\d.e-]+–[\d.e-]+\)(?=</td>)")


def document(markdown: str, picture_name: str, picture: str) -> str:
    """HTML of `markdown`, in which the image called `picture_name` is the SVG `picture` itself.

    What the page quotes, such as an engine's words, is text and never markup.
    """
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    body = re.sub(rf'<img src="{re.escape(picture_name)}"[^>]*>', lambda _: picture, body)
    body = INTERVAL.sub(lambda found: f'<span class="interval">{found.group()}</span>', body)
    body = body.replace("<table>", '<div class="wide" tabindex="0"><table>').replace("</table>", "</table></div>")
    title = markdown.partition("\n")[0].lstrip("# ")
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n<main>\n{body}</main>\n</html>\n"
    )
