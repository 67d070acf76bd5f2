"""HTML pages that need no network: one template, one inline style, one inline script, pictures as data.

The page's policy allows that style and that script, by their hashes, and nothing else. So whatever a model wrote
cannot run, even if it came into the page as markup; and it does not: templates escape, and the script sets text.
"""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"
LIBRARY = Environment(
    loader=FileSystemLoader(TEMPLATES),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **content: Any) -> str:
    """A whole page.

    Args:
        template: File in `templates/`.
        content: What the template shows.
    """
    style, script = (
        (TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js")
    )
    # Both are files of this package.
    return LIBRARY.get_template(template).render(
        policy=policy(style, script),
        style=Markup(style),  # nosec B704
        script=Markup(script),  # nosec B704
        **content,
    )


def policy(style: str, script: str) -> str:
    """The Content-Security-Policy under which the page runs."""
    return "; ".join(
        [
            "default-src 'none'",
            "img-src data:",
            f"style-src {_source(style)}",
            f"script-src {_source(script)}",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )


def _source(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def as_json(content: Any) -> Markup:
    """Data within a script element. No `<` is left in it, so it can neither end the element nor open another."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))  # nosec B704


def as_data(picture: Path) -> str:
    """A PNG as a URL that holds it."""
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
