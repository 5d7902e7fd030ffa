"""Methods from outside: on networks that are wrapped, from packages that are installed, and every method's promises."""

import json
import os
import subprocess
import sys
from functools import cache

import pandas as pd
import pytest
import torch
from conftest import ROOT
from torch import nn

from mri_unlearn.data.loaders import recon_dls
from mri_unlearn.data.request import ForgetRequest
from mri_unlearn.network.learner import recon_learner
from mri_unlearn.network.weights import new_unet, new_varnet, save_weights, unwrapped
from mri_unlearn.phantom.simulate import simulate_dataset
from mri_unlearn.unlearn.catalog import METHODS
from mri_unlearn.unlearn.core import unlearn
from mri_unlearn.unlearn.method_checks import check_method

REQUEST = ForgetRequest("organ == 'knee'", reason='a test')
NETWORKS = {
    'image': lambda: new_unet(0, chans=4, num_pool_layers=2),
    'kspace': lambda: new_varnet(0, num_cascades=1, sens_chans=2, sens_pools=1, chans=2, pools=2),
}


@pytest.fixture(scope='module')
def loaders(tmp_path_factory):
    "What the network takes -> loaders of small scans of two brains and two knees"
    size = dict(patients=(2, 1), slices=2, recon=32, coils=2, workers=1)
    splits = REQUEST.split(simulate_dataset(tmp_path_factory.mktemp('data'), 'tiny', seed=0, progress=False, **size))
    train = splits.split.str.endswith('train')
    return {kind: recon_dls(splits[train], splits[~train], bs=2, device='cpu', input=kind) for kind in NETWORKS}


class Compiled(nn.Module):
    "Keeps the network as torch.compile does"

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model

    def forward(self, *x):
        return self._orig_mod(*x)


@pytest.fixture(scope='module')
def unlearned(loaders):
    "`unlearned(kind, wrap, name)` is a network that was wrapped, and then unlearned by a method; each is made once"

    @cache
    def unlearned(kind, wrap, name, **settings):
        model = NETWORKS[kind]() if wrap is None else wrap(NETWORKS[kind]())
        few = dict(rounds=1, steps=4, bs=2)
        return unlearn(recon_learner(loaders[kind], model), REQUEST, name, 0.5, **few, **settings).model

    return unlearned


@pytest.mark.parametrize('kind', NETWORKS)
@pytest.mark.parametrize('wrap', [nn.DataParallel, Compiled])
@pytest.mark.parametrize('name, settings', [('proxy', {}), ('encoder_match', {}), ('reset_ft', dict(which='decoder'))])
def test_a_wrapped_network_ends_with_the_same_weights(unlearned, kind, wrap, name, settings):
    plain, wrapped = (unlearned(kind, w, name, **settings) for w in (None, wrap))
    assert type(wrapped) is wrap
    for (key, p), q in zip(unwrapped(wrapped).named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q), key


ORDER = """
TrainEvalCallback OneStep KeepOut SkipValidation Aim Mirror CastToTensor GradientClip Movable Teacher Teacher Twin
KeepImages ProxyMatch KeepImages MemoryMatch Recorder LossTerms StayFinite TableColumns OneCycle OneCycle SpareRetained
Settle Settle
""".split()  # of both mechanisms


@pytest.mark.filterwarnings('ignore:the level to end at is doubtful')  # a network that was never trained
def test_the_order_in_which_the_callbacks_of_proxy_act(loaders):
    "A change of this order changes results"
    learn = unlearn(
        recon_learner(loaders['image'], NETWORKS['image']()), REQUEST, 'proxy', 0.5, rounds=1, steps=2, bs=2
    )
    order = [type(cb).__name__ for cb in learn.cbs.sorted('order')]
    assert [name for name in order if name != 'ProgressCallback'] == ORDER  # fastai puts that back after the fit


@pytest.mark.filterwarnings('ignore:the level to end at is doubtful')  # of a network that was trained for a moment
@pytest.mark.parametrize('name', METHODS)
def test_every_method_keeps_its_promises(name):
    found = check_method(name)
    assert {'image', 'kspace'} == set(found) and 'passed' in set(found.loc['original'])
    follows = any(type(cb).__name__ == 'Aim' for cb in METHODS[name].make())
    assert found.loc['unchanged', 'image'] == ('passed' if follows else 'skipped: takes no level')


PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "somebodys-methods"
version = "0.1"

[project.entry-points."mri_unlearn.methods"]
somebody = "somebodys_methods"

[tool.setuptools]
py-modules = ["somebodys_methods"]
"""
MODULE = """
import os
from pathlib import Path

from mri_unlearn.unlearn.catalog import method
from mri_unlearn.unlearn.core import RetainDescent


@method('retain')
def somebodys_ft(weight=1.0):
    "Somebody's own fine-tuning"
    with Path(os.environ['SEEN']).open('a') as f:
        f.write(f'{os.getpid()}\\n')
    return [RetainDescent(weight)]
"""


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    "Folder in which a package with one method is installed"
    source, target = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('installed')
    (source / 'pyproject.toml').write_text(PROJECT)
    (source / 'somebodys_methods.py').write_text(MODULE)
    options = ['--quiet', '--no-index', '--no-deps', '--no-build-isolation', '--disable-pip-version-check']
    command = [sys.executable, '-m', 'pip', 'install', *options, '--target', str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture
def outside(installed, tmp_path):
    """`outside(*args)` runs Python where the package is installed.
    It returns what was printed, the processes that ran the method, and the first process."""

    def run(*args):
        seen = tmp_path / 'seen'
        seen.write_text('')
        path = os.pathsep.join([str(installed), str(ROOT)])
        env = os.environ | dict(PYTHONPATH=path, SEEN=str(seen), OMP_NUM_THREADS='1')
        process = subprocess.Popen(
            [sys.executable, *map(str, args)],
            cwd=tmp_path,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said
        return said, {int(pid) for pid in seen.read_text().split()}, process.pid

    return run


COMMAND = '-m', 'mri_unlearn.cli'


def test_an_installed_method_is_listed(outside):
    said, *_ = outside(*COMMAND, 'methods')
    assert 'somebodys_ft' in said and "Somebody's own fine-tuning" in said


def test_an_installed_method_unlearns(outside, loaders, tmp_path):
    data = loaders['image'].train_ds.volumes.path.iloc[0]
    save_weights(NETWORKS['image'](), tmp_path / 'network.pt')
    folder = os.path.dirname(os.path.dirname(data))
    few = ['--method', 'somebodys_ft', '--rounds', 1, '--steps', 1, '--batch-size', 2]
    files = ['--data', folder, '--model', 'network.pt', '--out', 'unlearned.pt']
    _, pids, me = outside(*COMMAND, 'unlearn', *files, '--forget', "organ == 'knee'", *few)
    assert pids == {me} and (tmp_path / 'unlearned.pt').is_file()


FEW = ['--epochs', 1, '--rounds', 1, '--steps', 1, '--oracle-seeds', 2, '--limit-volumes', 2, '--retain-fractions']


def test_an_installed_method_stands_in_the_tables_of_a_protocol(outside, tmp_path):
    methods = ['--methods', 'sub_ft', 'somebodys_ft', '--jobs', 2]
    _, pids, me = outside(*COMMAND, 'protocol', '--preset', 'tiny', '--out', 'run', *methods, *FEW)
    summary = pd.read_csv(tmp_path / 'run' / 'summary.csv').set_index('method')
    assert summary.loc['somebodys_ft', 'retain_psnr'] == summary.loc['sub_ft', 'retain_psnr']
    assert pids and me not in pids, 'the method was to run in a worker process'


TUNE = """
import json, sys
from mri_unlearn.experiment.tuning import tune

if __name__ == '__main__':
    few = dict(epochs=1, rounds=1, steps=1, limit_volumes=2, chans=4, pools=2)
    trials = {name: [{'lr': 1e-3}, {'lr': 1e-4}] for name in ('sub_ft', 'somebodys_ft')}
    table = tune('tuned', 'tiny', trials=trials, show=False, jobs=2, **few)
    print(json.dumps(sorted(table.method)))
"""


def test_an_installed_method_is_tuned(outside, tmp_path):
    (tmp_path / 'script.py').write_text(TUNE)
    said, pids, me = outside('script.py')
    found = json.loads(said.splitlines()[-1])
    assert found.count('somebodys_ft') == found.count('sub_ft') >= 2
    assert pids and me not in pids, 'the method was to run in a worker process'
