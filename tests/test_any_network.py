"""Every method on networks that nobody here made: it works or says what it cannot do, and never less in silence."""

import warnings
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mri_unlearn.machinery.disk import DataError
from mri_unlearn.network.adapter import adapted
from mri_unlearn.network.learner import recon_learner
from mri_unlearn.network.parts import parts_of, shape_of
from mri_unlearn.network.unet import UNet
from mri_unlearn.network.weights import seeded, unwrapped
from mri_unlearn.signal.kspace import fft2c, ifft2c, rss
from mri_unlearn.unlearn.by_hand import REQUEST, practice
from mri_unlearn.unlearn.catalog import METHODS
from mri_unlearn.unlearn.core import unlearn


def convs(*widths, **more):
    "Convolutions with a rectifier between"
    pairs = zip(widths, widths[1:])
    layers = [
        m for a, b in pairs for m in (nn.Conv2d(a, b, 3, padding=1, **(more if a > 1 and b > 1 else {})), nn.ReLU())
    ]
    return nn.Sequential(*layers[:-1])


class Residual(nn.Module):
    "A plain residual network"

    def __init__(self, **more):
        super().__init__()
        self.body = convs(1, 4, 4, 4, 1, **more)

    def forward(self, x):
        return x + self.body(x)


class Tokens(nn.Module):
    "Attention over patches, with weights of its own that stand beside its layers"

    def __init__(self, width=8, norm=nn.LayerNorm):
        super().__init__()
        self.read, self.write = nn.Linear(64, width), nn.Linear(width, 64)
        self.place = nn.Parameter(0.1 * torch.randn(16, width))
        self.layers = nn.Sequential(
            *(nn.TransformerEncoderLayer(width, 2, 16, 0.0, batch_first=True) for _ in range(2))
        )

    def forward(self, x):
        patches = F.unfold(x, 8, stride=8).mT
        change = self.write(self.layers(self.read(patches) + self.place))
        return x + F.fold(change.mT, x.shape[-2:], 8, stride=8)


class MadeAgain(Tokens):
    "The same, which knows how it is made"

    def made_again(self, seed):
        return MadeAgain()


class Unrolled(nn.Module):
    "Blocks of a network between steps of data consistency, on the k-space of all coils"

    input = 'kspace'

    def __init__(self):
        super().__init__()
        self.blocks, self.step = nn.ModuleList(convs(2, 6, 6, 2) for _ in range(2)), nn.Parameter(torch.ones(2))

    def forward(self, kspace, mask, num_low=None):
        x = kspace
        for block, step in zip(self.blocks, self.step):
            images = torch.view_as_real(ifft2c(x).flatten(0, 1)).permute(0, 3, 1, 2)
            scale = images.std((1, 2, 3), keepdim=True).clamp_min(1e-30)
            change = (block(images / scale) * scale).permute(0, 2, 3, 1).contiguous()
            x = x - step * torch.where(mask, x - kspace, 0) - fft2c(torch.view_as_complex(change).view_as(kspace))
        return rss(ifft2c(x), dim=1)


class OtherDecoder(UNet):
    "fastMRI's encoder, by its names, and another way up"

    def __init__(self):
        super().__init__(chans=4, num_pool_layers=2)
        del self.up_conv, self.up_transpose_conv
        self.up = nn.ModuleList([convs(24, 8, 8), convs(12, 4, 4, 1)])

    def forward(self, x):
        kept = []
        for block in self.down_sample_layers:
            kept.append(block(x))
            x = F.avg_pool2d(kept[-1], 2)
        x = self.conv(x)
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2), kept.pop()], 1))
        return x


class Rows(nn.Module):
    "Nothing but linear layers, on the rows of an image"

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*(m for i in (0, 1, 2) for m in (nn.Linear(32, 32), nn.ReLU())), nn.Linear(32, 32))

    def forward(self, x):
        return x + self.body(x)


def half_frozen():
    net = Residual()
    net.body[2].requires_grad_(False)
    return net


def tied():
    net = Residual()
    net.body[4].weight = net.body[2].weight
    return net


NETWORKS = {
    'residual': Residual,
    'attention': Tokens,
    'attention made again': MadeAgain,
    'groups, reflected': lambda: Residual(groups=2, padding_mode='reflect'),
    'unrolled': Unrolled,
    'another decoder': OtherDecoder,
    'linear': Rows,
    'half frozen': half_frozen,
    'tied': tied,
    'parallel': lambda: nn.DataParallel(Residual()),
    'adapted': lambda: adapted(convs(2, 4, 4, 2), takes='two channels'),
}
REFUSED = {  # (network, method) -> what it says
    ('attention', 'bad_teacher'): r"'' \(Tokens\) has weights but no reset_parameters.*made_again",
    ('attention', 'retrain'): 'no reset_parameters',
    ('unrolled', 'bad_teacher'): r"'' \(Unrolled\) has weights but no reset_parameters",
    ('unrolled', 'retrain'): 'no reset_parameters',
    ('unrolled', 'reset_ft'): 'no reset_parameters',
    ('unrolled', 'encoder_match'): 'needs one answer a slice',  # its blocks are given one coil at a time
    ('attention', 'reset_ft'): 'no reset_parameters',
    ('attention', 'proxy'): "has no convolutions: found 6 × linear layer, 2 × attention.*moves='all'",
    ('attention made again', 'proxy'): 'has no convolutions',
    ('linear', 'proxy'): "has no convolutions: found 4 × linear layer.*moves='all'",
}
SETTINGS = dict(proxy=dict(kind='competence'))


@cache
def loaders(input):
    return practice(input).dls


def original(name):
    with seeded(0):
        model = NETWORKS[name]()
    inner = getattr(model, 'input', 'image')
    return recon_learner(loaders(inner if isinstance(inner, str) else 'image'), model)


def run(learn, method, **settings):
    "(what `unlearn` returns, what it warned of)"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        given = dict(rounds=1, steps=1, bs=2) | SETTINGS.get(method, {}) | settings
        student = unlearn(learn, REQUEST, method, 0.5, **given)
    return student, [str(w.message) for w in caught]


def moved(student, learn):
    "Names of the weights that have changed"
    pairs = zip(unwrapped(student.model).named_parameters(), unwrapped(learn.model).parameters(), strict=True)
    return {name for (name, p), q in pairs if not torch.equal(p, q)}


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('method', METHODS)
def test_a_method_works_or_says_what_it_cannot_do(name, method):
    learn = original(name)
    if (name, method) in REFUSED:
        with pytest.raises(DataError, match=REFUSED[name, method]):
            run(learn, method)
        return
    student, said = run(learn, method)
    assert moved(student, learn) and not any('changed nothing' in words for words in said)
    assert all(torch.isfinite(p).all() for p in student.model.parameters())
    assert ('frozen' in ' '.join(said)) == (name == 'half frozen')
    if name == 'half frozen':
        assert not any(n.startswith('body.2') for n in moved(student, learn))
        assert [p.requires_grad for p in student.model.parameters()] == [
            p.requires_grad for p in learn.model.parameters()
        ]
    if name == 'tied':
        assert student.model.body[4].weight is student.model.body[2].weight


@pytest.mark.parametrize('name', ['attention', 'linear'])
def test_the_way_out_that_an_error_names_leads_out(name):
    student, said = run(original(name), 'proxy', moves='all')
    assert len(moved(student, original(name))) == len(list(student.model.parameters()))
    assert any('not spared' in words for words in said) == (name == 'attention')


def test_what_a_network_says_itself_counts():
    class Says(Tokens):
        parts = dict(convolutions=['read', 'layers.0'], middle='layers')

    with seeded(0):
        learn = recon_learner(loaders('image'), Says())
    assert {n.split('.')[0] for n in moved(run(learn, 'proxy')[0], learn)} == {'read', 'layers'}


def test_a_plain_network_moves_all_its_convolutions_and_another_decoder_too():
    for name, count in (('residual', 8), ('another decoder', 16)):
        student, said = run(original(name), 'proxy')
        assert len(moved(student, original(name))) == count and not any('not spared' in words for words in said)


def test_parts_by_structure():
    found = parts_of(Unrolled())
    assert shape_of(Unrolled()) == 'unrolled' and found['middle'] == ['blocks.0.2', 'blocks.1.2']
    found = parts_of(OtherDecoder(), (torch.randn(1, 1, 32, 32),))
    names = ('down_sample_layers.1', 'conv')
    assert all(name.startswith(names) for name in found['middle']) and len(found['middle']) == 4
    assert found['decoder'] == [f'up.{i}.{j}' for i, js in enumerate(((0, 2), (0, 2, 4))) for j in js]


def test_a_compiled_network():
    with seeded(0):
        plain, compiled = (recon_learner(loaders('image'), net) for net in (Residual(), Residual()))
    compiled.model.load_state_dict(plain.model.state_dict())
    compiled.model = torch.compile(compiled.model, backend='eager')
    one, other = (run(learn, 'proxy')[0].model for learn in (plain, compiled))
    for p, q in zip(one.parameters(), unwrapped(other).parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize(
    'work', [dict(rounds=-1), dict(rounds=0), dict(steps=0), dict(bs=0), dict(bs=2.5), dict(steps=True)]
)
def test_work_that_cannot_be_is_refused(work):
    with pytest.raises(DataError, match='expected'):
        run(original('residual'), 'proxy', kind='memory', **work)
