"""Check a built site: every link, anchor and file exists, and no page loads anything from another host.

    python tools/check_site.py build/site

zensical checks links between pages while it builds. This looks at the finished HTML and CSS: images, links to other files,
scripts, styles and fonts too. Ordinary links to other hosts (<a href>) are allowed and not followed.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {"script", "img", "iframe", "source", "video", "audio", "embed", "object"}  # tags that fetch what they name
LINKS_WITHOUT_FETCH = {"canonical", "next", "prev", "alternate", "author", "license"}  # <link rel>


class Page(HTMLParser):
    """The ids of a page, what it links to and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values and (name == "id" or tag == "a")}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and not set(values.get("rel", "").split()) & LINKS_WITHOUT_FETCH:
            self.loads.append(values.get("href", ""))
        if tag in LOADS:
            self.loads += [values[name] for name in ("src", "data") if name in values]


def loads_of_style(text: str) -> list[str]:
    """What a style sheet fetches."""
    named = re.findall(r"url\(\s*[\"']?([^\"')]+)|@import\s+[\"']([^\"']+)", text)
    return [first or second for first, second in named]


def is_elsewhere(address: str) -> bool:
    """Whether an address names another host."""
    return address.startswith("//") or urlsplit(address).scheme in ("http", "https")


def problems(site: Path) -> list[str]:
    """One line for each problem of a built site."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = [] if pages else [f"{site}: no pages"]
    for path, page in pages.items():
        name = path.relative_to(site)
        found += [f"{name}: loads {address}" for address in page.loads if is_elsewhere(address)]
        # 404.html is served at any depth: its addresses begin at the site's root.
        for address in [] if path.name == "404.html" else [*page.links, *page.loads]:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if site.resolve() not in target.parents and target != path:
                found.append(f"{name}: {address} leads out of the site")
            elif not target.is_file():
                found.append(f"{name}: {address} does not exist")
            elif parts.fragment and target.suffix == ".html":
                other = next(page for path, page in pages.items() if path.resolve() == target.resolve())
                if unquote(parts.fragment) not in other.ids:
                    found.append(f"{name}: {address} has no such anchor")
    for path in sorted(site.rglob("*.css")):
        loads = loads_of_style(path.read_text(encoding="utf-8"))
        found += [f"{path.relative_to(site)}: loads {address}" for address in loads if is_elsewhere(address)]
    return found


def main() -> int:
    found = problems(Path(sys.argv[1]))
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
