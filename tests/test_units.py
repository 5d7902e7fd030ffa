"""Multiplying all data by 1e-4 changes no table: nothing in the program knows the unit of the images."""
import shutil

import h5py
import numpy as np
import pandas as pd
import pytest

from mri_unlearn.protocol import run_protocol
from mri_unlearn.simulate import simulate_dataset

FACTOR = 1e-4
METHODS = ('sub_ft', 'ga', 'ga_l1', 'nl', 'ga_l1_ft', 'nl_ft_amortized')


@pytest.fixture(scope='module')
def summaries(tmp_path_factory):
    folder = tmp_path_factory.mktemp('units')
    simulate_dataset(folder/'one', 'tiny', progress=False)
    shutil.copytree(folder/'one', folder/'other')
    for path in (folder/'other').rglob('*.h5'):
        with h5py.File(path, 'r+') as f:
            for name in ('kspace', 'reconstruction_rss'): f[name][...] = f[name][...]*np.float32(FACTOR)
            for name in ('max', 'norm'): f.attrs[name] = f.attrs[name]*FACTOR
    run = lambda name: run_protocol('tiny', folder/f'run_{name}', data=folder/name, show=False, epochs=1, rounds=1, methods=METHODS)
    return run('one'), run('other')


def test_the_data_really_differ(summaries, tmp_path_factory):
    one, other = (pd.read_csv(tmp_path_factory.getbasetemp()/'units0'/f'run_{n}'/'volumes.csv')['max'] for n in ('one', 'other'))
    np.testing.assert_allclose(other/one, FACTOR, rtol=1e-5)


@pytest.mark.parametrize('column', ['retain_psnr', 'forget_psnr', 'gap_retain_db', 'gap_forget_db', 'agree_retain_db', 'agree_forget_db'])
def test_same_decibels(summaries, column):
    one, other = summaries
    assert list(one.method) == list(other.method)
    np.testing.assert_allclose(other[column], one[column], atol=.05)


def test_same_ssim_cost_and_flags(summaries):
    one, other = summaries
    for c in ('retain_ssim', 'forget_ssim'): np.testing.assert_allclose(other[c], one[c], atol=2e-3)
    assert list(one.cost_ratio.fillna(0)) == list(other.cost_ratio.fillna(0))
    assert list(one.flag) == list(other.flag)
