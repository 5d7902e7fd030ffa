"""README.md is nbs/index.ipynb, rendered, and what it promises is there."""

import configparser
import importlib.util
import re
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

spec = importlib.util.spec_from_file_location('render_readme', ROOT / '.ci' / 'render_readme.py')
render_readme = importlib.util.module_from_spec(spec)
spec.loader.exec_module(render_readme)


def readme():
    return (ROOT / 'README.md').read_text(encoding='utf-8')


def test_readme_is_index_rendered():
    assert readme() == render_readme.render(ROOT), 'run  python .ci/render_readme.py'


def test_readme_gives_two_commands():
    "The first sh block installs and runs, the second installs and tests: .ci/run relies on that"
    blocks = re.findall(r'^```sh\n(.*?)^```', readme(), flags=re.S | re.M)
    assert len(blocks) >= 2
    assert 'pip install' in blocks[0] and 'mri_unlearn protocol' in blocks[0]
    assert all(word in blocks[1] for word in ("pip install -e '.[dev]'", 'nbdev_test', 'pytest'))
    assert all(len(b.strip().splitlines()) == 1 for b in blocks[:2])


def test_readme_links_lead_somewhere():
    text = re.sub(r'^```.*?^```', '', readme(), flags=re.S | re.M)
    targets = re.findall(r'\]\(([^)\s]+)', text) + re.findall(r"""(?:src|href)=["']([^"']+)""", text)
    missing = [t for t in targets if not render_readme.ELSEWHERE.match(t) and not (ROOT / t.split('#')[0]).exists()]
    assert not missing


def test_tables_of_the_readme_are_tables():
    "A line under the headings of anything but hyphens and colons, and Git hosts show bars and text"
    lines = readme().splitlines()
    first = [i for i, line in enumerate(lines) if line.startswith('|') and not lines[i - 1].startswith('|')]
    assert first
    assert [lines[i + 1] for i in first if not re.fullmatch(r'\|( :?-+:? \|)+', lines[i + 1])] == []


def small(tmp_path, *cells):
    (tmp_path / 'nbs').mkdir()
    nbformat.write(new_notebook(cells=list(cells)), tmp_path / 'nbs' / 'index.ipynb')
    return tmp_path


def test_rendering_rules(tmp_path):
    def stream(text):
        return [new_output('stream', name='stdout', text=text)]

    table = [new_output('execute_result', data={'text/html': '<style>x</style>', 'text/plain': 'plain text'})]
    text = render_readme.render(
        small(
            tmp_path,
            new_markdown_cell(
                '# Name\n\n![picture](images/a.png) [chapter](00_signal.kspace.ipynb#part) '
                '[`code`](05_signal.masks.ipynb)\n'
                '[up](../LICENSE) [out](https://example.org/x) [here](#name) `](images/no.png)`\n\n'
                '```sh\necho "](images/no.png)"\n```'
            ),
            new_code_cell('#| hide\nsecret = 1', outputs=stream('secret output')),
            new_code_cell('#| echo: false\nprint(table)', outputs=stream('only the output')),
            new_code_cell('#| eval: false\nshown = 2', outputs=table),
            new_markdown_cell('The end.'),
        )
    )
    assert (
        '![picture](nbs/images/a.png) [chapter](nbs/00_signal.kspace.ipynb#part) [`code`](nbs/05_signal.masks.ipynb)'
        in text
    )
    assert '[up](LICENSE) [out](https://example.org/x) [here](#name) `](images/no.png)`' in text
    assert 'echo "](images/no.png)"' in text
    assert 'secret' not in text and '#|' not in text and 'print(table)' not in text and '<style>' not in text
    assert 'only the output' in text and '```python\nshown = 2\n```' in text and 'plain text' in text
    assert text.endswith('The end.\n')


def test_picture_in_an_output_is_refused(tmp_path):
    picture = new_output('display_data', data={'image/png': 'AAAA', 'text/plain': '<Figure>'})
    with pytest.raises(SystemExit, match='nbs/images'):
        render_readme.render(small(tmp_path, new_code_cell('plot()', outputs=[picture])))


def test_check_notices_a_change(project):
    def check():
        return subprocess.run(
            [sys.executable, '.ci/render_readme.py', '--check'], cwd=project, capture_output=True, text=True
        )

    assert check().returncode == 0
    with open(project / 'README.md', 'a') as f:
        f.write('an edit by hand\n')
    result = check()
    assert result.returncode == 1 and 'render_readme' in result.stderr


def test_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    "The README's Python example, word for word but for the preset and the number of epochs"
    (code,) = [b for b in re.findall(r'^```python\n(.*?)^```', readme(), flags=re.S | re.M) if 'unlearn(' in b]
    lines = [line for line in code.splitlines() if line.strip()]
    assert lines[0].startswith('from mri_unlearn.all import') and len(lines) == 1 + 5
    quick = code.replace("simulate_dataset('data')", "simulate_dataset('data', preset='tiny')")
    quick = quick.replace('fit_one_cycle(16, 2e-3)', 'fit_one_cycle(1, 2e-3)')
    assert 'fit_one_cycle(1,' in quick and "'tiny'" in quick
    monkeypatch.chdir(tmp_path)
    exec(compile(quick, 'README.md', 'exec'), {})
    said = capsys.readouterr().out
    assert 'retain_test' in said and 'forget_test' in said


def test_readme_is_short_and_starts_with_a_command():
    assert len(readme().split()) <= 900
    assert readme().split('\n').index('```sh') < 30


def test_badges_say_what_settings_say():
    settings = configparser.ConfigParser(delimiters=['='])
    settings.read(ROOT / 'settings.ini')
    settings = settings['DEFAULT']
    assert f'{settings["git_url"]}/actions/workflows/test.yml/badge.svg' in readme()
    assert (
        f'python-%E2%89%A5%20{settings["min_python"]}-' in readme() and (ROOT / '.github/workflows/test.yml').exists()
    )
    assert f'licence-{settings["license"].upper()}-' in readme()
