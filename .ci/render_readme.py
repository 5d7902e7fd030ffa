"""README.md is nbs/index.ipynb, rendered: `render(root)` gives the text, and run as a script this file writes it.

    python .ci/render_readme.py            write README.md
    python .ci/render_readme.py --check    write nothing; exit status 1 if README.md is not what the notebook gives

Rules. A cell with `#| hide` or `#| readme: false` is left out; of one with `#| echo: false` only the output stays;
other `#|` lines go. A relative link is rewritten from the notebook's folder to the repository's. An output is shown as
Markdown or as plain text, never as HTML, which Git hosts show half. A picture is a file in nbs/images with a Markdown
link, because an image inside a cell output has no place in a README.
"""

import argparse
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

HEAD = '<!-- Made from nbs/index.ipynb by .ci/render_readme.py. Edit the notebook, not this file. -->\n\n'
ELSEWHERE = re.compile(r'[a-zA-Z][a-zA-Z0-9+.-]*:|#|/')  # another scheme, a place on this page, an absolute path


def from_root(target, folder='nbs'):
    "A link target relative to `folder`, made relative to the repository's root; others as they are"
    return target if ELSEWHERE.match(target) else posixpath.normpath(posixpath.join(folder, target))


def relink(markdown):
    "`markdown` with every relative link and image rewritten, code left alone"
    parts = re.split(r'(^```.*?^```[ \t]*$|`[^`\n]+`)', markdown, flags=re.S | re.M)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r'(\]\()([^)\s]+)', lambda m: m[1] + from_root(m[2]), parts[i])
        parts[i] = re.sub(r"""((?:src|href)=["'])([^"']+)""", lambda m: m[1] + from_root(m[2]), parts[i])
    # a link whose text is code, as in [`kspace`](00_kspace.ipynb), is cut in two by the split: its target starts a part
    return ''.join(parts)


def prepare(nb):
    "The notebook as a reader of the README shall see it"
    cells = []
    for cell in nb.cells:
        directives = re.findall(r'^#\|\s*(.+?)\s*$', cell.source, flags=re.M) if cell.cell_type == 'code' else []
        if {'hide', 'readme: false'} & set(directives):
            continue
        if cell.cell_type == 'markdown':
            cell.source = relink(cell.source)
        if cell.cell_type == 'code':
            for out in cell.get('outputs', []):
                if any(k.startswith('image/') for k in out.get('data', {})):
                    raise SystemExit(
                        'nbs/index.ipynb: a cell output holds an image. '
                        'Save it in nbs/images, hide the cell, and link the file.'
                    )
            cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip('\n')
            if {'echo: false', 'hide_input'} & set(directives):
                cell.source = ''
            if not cell.source and not cell.get('outputs'):
                continue
        cells.append(cell)
    nb.cells = cells
    return nb


def render(root):
    "The text of README.md that nbs/index.ipynb under `root` gives"
    nb = prepare(nbformat.read(Path(root) / 'nbs' / 'index.ipynb', as_version=4))
    nb.metadata['language_info'] = {
        'name': 'python',
        'pygments_lexer': 'python',
    }  # fences say python, whoever saved the notebook
    config = Config({'NbConvertBase': {'display_data_priority': ['text/markdown', 'text/plain']}})
    text, _ = MarkdownExporter(config=config).from_notebook_node(nb)
    text = re.sub(r'```python\n\s*```\n', '', text)  # what is left of a cell with `#| echo: false`
    text = re.sub(r'[ \t]+$', '', text, flags=re.M)
    return HEAD + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'


def main():
    parser = argparse.ArgumentParser(description='Render nbs/index.ipynb as README.md')
    parser.add_argument('--check', action='store_true', help='write nothing; exit status 1 where README.md differs')
    check = parser.parse_args().check
    root = Path(__file__).resolve().parent.parent
    text, readme = render(root), root / 'README.md'
    if not check:
        readme.write_text(text, encoding='utf-8')
    elif not readme.exists() or readme.read_text(encoding='utf-8') != text:
        sys.exit('README.md is not what nbs/index.ipynb gives: run  python .ci/render_readme.py')


if __name__ == '__main__':
    main()
