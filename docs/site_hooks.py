"""What the site has besides the pages of this folder, for ``mkdocs build``.

The pages at the top of the repository lie where a forge looks for them and are pages of the site
too; their links lead to the site's pages. Every finding has an anchor, ``findings.html#LT012``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
OUTSIDE = {
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
    "benchmarks/README.md": "benchmarks.md",
}
"""Pages outside this folder, and what they are called on the site."""
FINDING = re.compile(r"^## (LT\d+)(:.*)$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere."""
    for path, name in OUTSIDE.items():
        text = (ROOT / path).read_text()
        files.append(File.generated(config, name, content=text.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> str:
    """Give findings the anchors that their codes are."""
    if page.file.src_uri == "findings.md":
        return FINDING.sub(r"## \1\2 { #\1 }", markdown)
    return markdown
