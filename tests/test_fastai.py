"""What users of fastai try first: its callbacks, any loss, pictures, and a Learner in a file, also an unlearned one."""

import subprocess
import sys
import warnings

import matplotlib
import pandas as pd
import pytest
import torch
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import CSVLogger, ShowGraphCallback
from fastai.callback.schedule import *  # noqa: F403, patches lr_find onto Learner
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.learner import Learner, load_learner
from torch import nn

from mri_unlearn.data.loaders import recon_dls
from mri_unlearn.data.request import ForgetRequest
from mri_unlearn.data.volumes import index_volumes
from mri_unlearn.machinery.disk import DataError
from mri_unlearn.network.learner import recon_learner
from mri_unlearn.network.weights import new_unet
from mri_unlearn.unlearn.core import unlearn

matplotlib.use('Agg')


@pytest.fixture(scope='module')
def sides(tiny_scans):
    splits = ForgetRequest("organ == 'knee'").split(index_volumes(tiny_scans, cache=False))
    return splits[splits.split.str.endswith('train')], splits[splits.split.str.endswith('test')]


@pytest.fixture
def dls(sides):
    return recon_dls(*sides, bs=4, device='cpu')


@pytest.fixture
def learn(dls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some of fastai's callbacks write where they are
    return recon_learner(dls, new_unet(0, chans=2, num_pool_layers=1), path=tmp_path)


def forget(learn, sides, *cbs, method='nl_ft', **settings):
    return unlearn(learn, sides[0], method, rounds=2, steps=1, bs=4, cbs=list(cbs), **settings)


def test_a_table_of_unlearning_has_the_terms_of_the_loss(learn, sides, tmp_path):
    done = forget(learn, sides, CSVLogger(tmp_path / 'log.csv'))
    table = pd.read_csv(tmp_path / 'log.csv')
    assert list(table) == ['epoch', 'train_loss', 'ForgetDescent', 'RetainDescent', 'time']
    assert table.ForgetDescent.tolist() == [terms['ForgetDescent'] for terms in done.loss_terms.history]
    forget(learn, sides, CSVLogger(tmp_path / 'seen.csv'), EarlyStoppingCallback(patience=5))
    names = 'epoch train_loss valid_loss nmse psnr ssim ForgetDescent RetainDescent time'.split()
    assert list(pd.read_csv(tmp_path / 'seen.csv')) == names  # fastai looks for the second loss in the second place


@pytest.mark.parametrize('cb', [SaveModelCallback, EarlyStoppingCallback, ReduceLROnPlateau, MixedPrecision])
def test_callbacks_of_fastai(learn, sides, cb):
    learn.fit(1, 1e-3, cbs=cb())
    assert len(forget(learn, sides, cb()).loss_terms.history) == 2


def test_a_graph_without_a_bar_is_refused_in_words(learn, sides):
    with pytest.raises(DataError, match='take CSVLogger'):
        forget(learn, sides, ShowGraphCallback())


def corner(pred, target):
    return (pred - target)[..., :8, :8].abs().mean()


@pytest.mark.parametrize('loss', [nn.L1Loss(), nn.MSELoss(reduction='sum'), nn.functional.l1_loss, corner])
@pytest.mark.parametrize('method', ['nl_ft', 'ga', 'proxy'])
def test_any_loss_of_two_images_unlearns(dls, sides, loss, method):
    net = new_unet(0, chans=2, num_pool_layers=1)
    for learn in (recon_learner(dls, net, loss=loss), Learner(dls, net, loss_func=loss)):
        history = forget(learn, sides, method=method).loss_terms.history
        assert all(value is not None for terms in history for value in terms.values())


def test_a_plain_loss_is_the_same_as_ours(dls, sides):
    nets = [
        forget(recon_learner(dls, new_unet(0, chans=2, num_pool_layers=1), loss=loss), sides).model
        for loss in ('l1', nn.L1Loss())
    ]
    for p, q in zip(*(net.parameters() for net in nets)):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('loss, says', [(nn.L1Loss, r'make one, L1Loss\(\)'), (3, 'found 3'), (abs, 'takes 1 argum')])
def test_what_is_no_loss_is_refused(dls, sides, loss, says):
    with pytest.raises(DataError, match=says):
        recon_learner(dls, new_unet(0, chans=2, num_pool_layers=1), loss=loss)


FRESH = """
import warnings
warnings.simplefilter('ignore')
import torch
from fastai.learner import load_learner
model = load_learner('learner.pkl').model.eval()
torch.save(model(torch.linspace(-2, 2, 24 * 24).reshape(1, 1, 24, 24)), 'answer.pt')
"""


@pytest.mark.parametrize('method', ['nl_ft', 'proxy', 'bad_teacher'])
def test_an_unlearned_learner_is_exported(learn, sides, tmp_path, method):
    done = forget(learn, sides, method=method)
    done.export(tmp_path / 'learner.pkl')
    run = subprocess.run([sys.executable, '-c', FRESH], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    x = torch.linspace(-2, 2, 24 * 24).reshape(1, 1, 24, 24)
    assert torch.equal(done.model(x), torch.load(tmp_path / 'answer.pt'))


def test_a_learner_from_a_file_looks_at_new_volumes(learn, sides, tmp_path):
    learn.export(tmp_path / 'learner.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        back = load_learner(tmp_path / 'learner.pkl')
    new = back.dls.test_dl(sides[1])
    with back.no_bar():
        preds, _ = back.get_preds(dl=new)
        want, _ = learn.get_preds()
    torch.testing.assert_close(preds, want)
    for ask in (lambda: back.predict(0), lambda: back.dls.test_dl(['scan.h5'])):
        with pytest.raises(DataError, match='a loader takes volumes'):
            ask()


def test_pictures(learn, sides):
    import matplotlib.pyplot as plt

    for draw, rows in ((lambda: learn.dls.show_batch(max_n=3), 2), (lambda: learn.show_results(max_n=3), 3)):
        draw()
        assert sum(bool(ax.images) for ax in plt.gcf().axes) == 3 * rows
        plt.close('all')


def test_what_else_is_asked_of_a_learner(learn):
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=4, show_plot=False)
        assert len(learn.validate()) == 4 and 'Total params' in str(learn.summary())
        losses = learn.get_preds(with_loss=True)[2]
        assert losses.shape == (sum(learn.dls.valid_ds.volumes.slices),)
        learn.save('here')
        learn.load('here')
