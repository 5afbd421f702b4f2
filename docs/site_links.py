"""mkdocs hooks: add the pages at the repository's root, and make links work both on GitHub and in the site.

Pages link to each other and to files of the repository by relative paths, which GitHub resolves. For the site, a link
to a page becomes the page's path in the site, and a link to any other file becomes its URL in the repository at
`repo_url`; without `repo_url`, only the link's text is kept. A link to a missing file is unchanged, so that `--strict`
reports it.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]

#: Pages of the site that are outside docs/, by their path in the site.
OUTSIDE = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}

#: A code block or span, which is not changed, or the target of a link or an image.
LINK = re.compile(
    r"(?P<code>^```.*?^```|^( {4}|\t).*?$|`[^`\n]+`)|(?P<text>\[(?:[^\[\]`]|`[^`]*`)*\])\((?P<target>[^)\s]+)\)",
    re.S | re.M,
)


def on_files(files, config):
    for place, path in OUTSIDE.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def title(path: Path) -> str:
    """Return the first heading of a page: a link that shows a file's name on GitHub shows the title on the site."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line[2:] for line in lines if line.startswith("# ")), path.name)


def on_page_markdown(markdown, page, config, files):
    source = OUTSIDE.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def rewritten(match):
        target = match["target"]
        if match["code"] or re.match(r"[a-z+]+:|#|/", target):
            return match[0]
        path, _, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        place = {there: here for here, there in OUTSIDE.items()} | {"docs/README.md": "index.md"}
        place = place.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        anchor = f"#{anchor}" if anchor else ""
        if place and files.get_file_from_path(place):
            here = posixpath.dirname(page.file.src_uri) or "."
            text = f"[{title(ROOT / path)}]" if match["text"].endswith(".md]") else match["text"]
            return f"{text}({posixpath.relpath(place, here)}{anchor})"
        if not (ROOT / path).exists():
            return match[0]
        if not config.repo_url:
            return match["text"][1:-1]
        return f"{match['text']}({config.repo_url}/blob/main/{path}{anchor})"

    return LINK.sub(rewritten, markdown)
