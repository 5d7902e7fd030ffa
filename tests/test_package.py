"""The wheel, in an environment that has nothing of this checkout: every module imports, the command answers."""

import json
import os
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.wheel
COMMANDS = 'simulate index check train methods unlearn evaluate reconstruct request protocol tune report purge'.split()


def run(*args, cwd, timeout=900):
    "Run a command that knows nothing of this checkout; returns its stdout, or fails with all that it said"
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'VIRTUAL_ENV', 'PYTHONHOME')}
    done = subprocess.run([str(a) for a in args], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f'{args}\n{done.stdout}\n{done.stderr}'
    return done.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    import shutil

    from conftest import ROOT, project_files

    copy, out = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('wheel')
    for f in project_files():
        (copy / f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / f, copy / f)
    run(sys.executable, '-m', 'build', '--wheel', '--outdir', out, copy, cwd=out)
    made = list(out.glob('*.whl'))
    assert len(made) == 1
    return made[0]


@pytest.fixture(scope='module')
def other(wheel, tmp_path_factory):
    "Python of a second environment that holds the wheel and what it asks for"
    env = tmp_path_factory.mktemp('second') / 'venv'
    run(sys.executable, '-m', 'venv', env, cwd=env.parent)
    bin = env / ('Scripts' if os.name == 'nt' else 'bin')
    run(
        bin / 'python',
        '-m',
        'pip',
        'install',
        '--quiet',
        '--disable-pip-version-check',
        '--no-compile',
        wheel,
        cwd=env.parent,
    )
    return bin


def test_every_module_imports_without_the_developers_tools(other, tmp_path):
    code = """
import importlib, importlib.util, json, pkgutil, mri_unlearn
names = [m.name for m in pkgutil.walk_packages(mri_unlearn.__path__, 'mri_unlearn.')]
for name in names: importlib.import_module(name)
tools = [t for t in ('nbdev', 'pytest', 'nbconvert') if importlib.util.find_spec(t)]
print(json.dumps([mri_unlearn.__file__, names, tools]))"""
    file, names, tools = json.loads(run(other / 'python', '-c', code, cwd=tmp_path).splitlines()[-1])
    assert str(other.parent) in file, f'imported from {file}, not from the second environment'
    assert not tools, f'{tools} are there, so this proves less than it should'
    from conftest import ROOT

    files = (p.relative_to(ROOT).with_suffix('') for p in (ROOT / 'mri_unlearn').rglob('*.py'))
    expected = {'.'.join(p.parts).removesuffix('.__init__') for p in files} - {'mri_unlearn'}
    assert set(names) == expected


def test_version_is_the_one_in_settings(other, tmp_path):
    from configparser import ConfigParser

    from conftest import ROOT

    settings = ConfigParser(delimiters=['='])
    settings.read(ROOT / 'settings.ini', encoding='utf-8')
    code = "import importlib.metadata as m, mri_unlearn; print(m.version('mri_unlearn'), mri_unlearn.__version__)"
    assert run(other / 'python', '-c', code, cwd=tmp_path).split() == [settings['DEFAULT']['version']] * 2


@pytest.mark.parametrize('command', [None, *COMMANDS])
def test_command_has_help(other, tmp_path, command):
    said = run(other / 'mri_unlearn', *([command] if command else []), '--help', cwd=tmp_path)
    assert 'usage' in said.lower()
    assert all(c in said for c in COMMANDS) if command is None else '--' in said
    assert not list(tmp_path.iterdir()), 'asking for help wrote files'


def test_methods_are_found_by_the_installed_command(other, tmp_path):
    "Nothing has been imported but what the command imports: all methods are there, the recommended one among them"
    said = run(other / 'mri_unlearn', 'methods', cwd=tmp_path).splitlines()
    names = [line.split()[0] for line in said]
    assert len(names) == len(set(names)) >= 25 and {'full_ft', 'neggrad_hinge', 'ssd', 'proxy', 'retrain'} <= set(names)
    assert [line.split()[0] for line in said if '(recommended)' in line] == ['proxy']


def test_all_gathers_every_part():
    from conftest import ROOT

    text = (ROOT / 'mri_unlearn' / 'all.py').read_text(encoding='utf-8')
    gathered = set(re.findall(r'^from \.([\w.]+) import \*$', text, flags=re.M))
    files = (p.relative_to(ROOT / 'mri_unlearn').with_suffix('') for p in (ROOT / 'mri_unlearn').glob('*/*.py'))
    modules = {'.'.join(p.parts) for p in files if p.name != '__init__' and p.parts[0] != 'command'}
    assert gathered == modules


def test_no_data_are_among_the_files():
    "Scans, networks and runs are made by whoever needs them; the largest thing here is a notebook or a picture"
    from conftest import ROOT, project_files

    found = project_files()
    assert len(found) > 300
    assert [str(f) for f in found if (ROOT / f).stat().st_size > 600_000] == []
    assert [str(f) for f in found if f.suffix in ('.h5', '.pt', '.ckpt', '.safetensors')] == []
