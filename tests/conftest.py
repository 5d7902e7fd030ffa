"""What the tests share: where the project is, and how to get a copy of it that a test may change."""
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config):
    config.addinivalue_line('markers', "wheel: builds the wheel and installs it into a second environment (minutes); leave out with -m 'not wheel'")


def project_files():
    "Files of the project, relative to its root: what git tracks or would track; without git, all but what builds leave"
    git = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=ROOT, capture_output=True, text=True)
    if git.returncode == 0: return [Path(f) for f in git.stdout.split('\0') if f and (ROOT/f).is_file()]
    skip = {'__pycache__', '.venv', 'build', 'dist', 'runs', 'data', '.ipynb_checkpoints'}
    files = (p.relative_to(ROOT) for p in ROOT.rglob('*') if p.is_file())
    return [f for f in files if not skip & set(f.parts) and not any(part.endswith('.egg-info') for part in f.parts)]


@pytest.fixture
def project(tmp_path):
    "A copy of the project in a temporary folder"
    copy = tmp_path/'project'
    for f in project_files():
        (copy/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/f, copy/f)
    return copy
