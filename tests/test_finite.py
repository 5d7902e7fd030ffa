"""The command stops at what is not finite, says which file it was, and leaves good results as they are."""

import functools
import shutil

import h5py
import numpy as np
import pytest
import torch
from conftest import command_here
from test_cli_errors import fails

from mri_unlearn.network.weights import new_unet, new_varnet, save_weights


@pytest.fixture
def scans(tiny_scans, tmp_path):
    return shutil.copytree(tiny_scans, tmp_path / 'data')


def hole(path, name='kspace', value=np.nan):
    "One value in the middle of slice 1 is replaced"
    with h5py.File(path, 'r+') as f:
        middle = (1, *(n // 2 for n in f[name].shape[1:]))
        f[name][middle] = value


def training_file(scans):
    return sorted((scans / 'multicoil_train').rglob('*.h5'))[0]


TRAIN = ['train', '--chans', 4, '--pools', 2, '--epochs', 1, '--batch-size', 4]


def test_training_stops_at_a_hole_and_keeps_the_old_file(scans, tmp_path):
    hole(training_file(scans))
    old = tmp_path / 'old.pt'
    save_weights(new_unet(0, chans=4, num_pool_layers=2), old)
    before = old.read_bytes()
    fails('its k-space holds numbers that are not finite', *TRAIN, '--data', scans, '--out', old)  # a look beforehand
    for out in (old, tmp_path / 'new.pt'):
        p = fails('its k-space holds 1 values that are NaN', *TRAIN, '--unchecked', '--data', scans, '--out', out)
        assert f'{training_file(scans).name}: slice 1: ' in p.stderr and 'epoch 1, step' in p.stderr
    assert old.read_bytes() == before
    assert not (tmp_path / 'new.pt').exists()


def test_a_protocol_keeps_what_was_trained_and_names_the_file(scans, tmp_path):
    hole(training_file(scans))
    fails(training_file(scans).name, 'protocol', '--preset', 'tiny', '--data', scans, '--out', tmp_path / 'run')
    assert not list((tmp_path / 'run').rglob('original.pt'))


def test_weights_that_are_not_finite_are_not_scored(scans, tmp_path):
    net = new_unet(0, chans=4, num_pool_layers=2)
    net.conv.layers[0].weight.data[0, 0, 0, 0] = float('nan')
    torch.save(net.state_dict(), tmp_path / 'nan.pt')
    out = tmp_path / 'scores.csv'
    for words in (['evaluate', '--out', out], ['unlearn', '--forget', "organ == 'knee'", '--out', out]):
        p = fails('(conv.layers.0.weight is the first)', *words, '--data', scans, '--model', tmp_path / 'nan.pt')
        assert 'nan.pt: 1 of ' in p.stderr
    assert not out.exists()


@pytest.mark.parametrize('name, value', [('kspace', np.inf), ('reconstruction_rss', np.nan)])
def test_scoring_names_the_file_and_the_slice(scans, tmp_path, name, value):
    save_weights(new_unet(0, chans=4, num_pool_layers=2), tmp_path / 'net.pt')
    path = sorted((scans / 'multicoil_val').rglob('*.h5'))[0]
    hole(path, name, value)
    out = tmp_path / 'scores.csv'
    fails(f'{path.name}: slice 1: ', 'evaluate', '--data', scans, '--model', tmp_path / 'net.pt', '--out', out)
    assert not out.exists()


def test_a_checkpoint_of_lightning_and_hydra_is_scored(scans, tmp_path):
    net = new_varnet(0, num_cascades=1, sens_chans=2, sens_pools=2, chans=4, pools=2)
    hyper = dict(
        optimizer=functools.partial(torch.optim.Adam, lr=1e-3),
        scheduler=functools.partial(torch.optim.lr_scheduler.ReduceLROnPlateau, mode='min'),
        compile=False,
    )
    state = {f'net.{name}': weight for name, weight in net.state_dict().items()}
    torch.save(dict(state_dict=state, hyper_parameters=hyper, epoch=49), tmp_path / 'epoch_049.ckpt')
    save_weights(net, tmp_path / 'plain.pt')
    p = command_here('evaluate', '--data', scans, '--model', tmp_path / 'epoch_049.ckpt', tmp_path / 'plain.pt')
    assert p.returncode == 0, p.stderr
    scores = {line.split()[0]: line.split()[1:] for line in p.stdout.splitlines()[1:] if 'brain' in line}
    assert scores['epoch_049'] == scores['plain']
