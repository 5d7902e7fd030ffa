"""Methods from outside: on networks that are wrapped, from packages that are installed, and every method's promises."""

import pytest
import torch
from torch import nn

from mri_unlearn.data.loaders import recon_dls
from mri_unlearn.data.request import ForgetRequest
from mri_unlearn.network.learner import recon_learner
from mri_unlearn.network.weights import new_unet, new_varnet, unwrapped
from mri_unlearn.phantom.simulate import simulate_dataset
from mri_unlearn.unlearn.core import unlearn

REQUEST = ForgetRequest("organ == 'knee'", reason='a test')
NETWORKS = {
    'image': lambda: new_unet(0, chans=4, num_pool_layers=2),
    'kspace': lambda: new_varnet(0, num_cascades=1, sens_chans=2, sens_pools=1, chans=2, pools=2),
}


@pytest.fixture(scope='module')
def loaders(tmp_path_factory):
    "What the network takes -> loaders of the smallest simulated data set"
    splits = REQUEST.split(simulate_dataset(tmp_path_factory.mktemp('data'), 'tiny', seed=0, progress=False))
    train = splits.split.str.endswith('train')
    return {kind: recon_dls(splits[train], splits[~train], bs=2, device='cpu', input=kind) for kind in NETWORKS}


class Compiled(nn.Module):
    "Keeps the network as torch.compile does"

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model

    def forward(self, *x):
        return self._orig_mod(*x)


@pytest.mark.parametrize('kind', NETWORKS)
@pytest.mark.parametrize('wrap', [nn.DataParallel, Compiled])
@pytest.mark.parametrize('name, settings', [('proxy', {}), ('encoder_match', {}), ('reset_ft', dict(which='decoder'))])
def test_a_wrapped_network_ends_with_the_same_weights(loaders, kind, wrap, name, settings):
    plain, wrapped = (
        unlearn(recon_learner(loaders[kind], model), REQUEST, name, 0.5, epochs=1, steps=4, bs=2, **settings).model
        for model in (NETWORKS[kind](), wrap(NETWORKS[kind]()))
    )
    assert type(wrapped) is wrap
    for (key, p), q in zip(unwrapped(wrapped).named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q), key
