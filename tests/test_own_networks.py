"""Networks of one's own: what fits is used as it is, and what does not fit is refused in one sentence, or warned of."""

import pickle
import warnings
from copy import deepcopy

import pandas as pd
import pytest
import torch
from torch import nn

from mri_unlearn.data.loaders import recon_dls
from mri_unlearn.data.slices import Targets
from mri_unlearn.data.volumes import index_volumes
from mri_unlearn.machinery.disk import DataError
from mri_unlearn.network.adapter import Adapter, adapted, check_network, own_network
from mri_unlearn.network.learner import SkipValidation, recon_learner, to_image
from mri_unlearn.network.own_weights import load_weights
from mri_unlearn.network.weights import Wrapper, input_of, new_unet, new_varnet, save_weights, seeded, unwrapped
from mri_unlearn.unlearn.core import unlearn
from mri_unlearn.verdict.evaluate import evaluate


@pytest.fixture(scope='module')
def index(tiny_scans):
    return index_volumes(tiny_scans, cache=False)


@pytest.fixture(scope='module')
def dls(index):
    "Loaders of both kinds, by what the network takes"
    volumes = index[index.organ == index.organ.iloc[0]]
    return {kind: recon_dls(volumes, volumes, bs=2, device='cpu', input=kind) for kind in ('image', 'kspace')}


class Layer(nn.Module):
    "A convolution, and what a function makes of it"

    def __init__(self, odd=lambda self, x, y: y, **further):
        super().__init__()
        with seeded(1):  # of two slices that are alike, another draw may leave hardly any structure
            self.layer, self.odd = nn.Conv2d(1, 1, 3, padding=1), odd
        for name, module in further.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.odd(self, x, self.layer(x))


class Two(nn.Module):
    "Real and imaginary part, in and out"

    def __init__(self, chans=2):
        super().__init__()
        self.layer = nn.Conv2d(2, chans, 3, padding=1)

    def forward(self, x):
        return x + self.layer(x)


class OnKspace(nn.Module):
    "Masked k-space and mask, in and out; what was measured stays"

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, kspace, mask):
        B, coils = kspace.shape[:2]
        pairs = torch.view_as_real(kspace.flatten(0, 1)).permute(0, 3, 1, 2)
        new = torch.view_as_complex(self.layer(pairs).permute(0, 2, 3, 1).contiguous()).view_as(kspace)
        return torch.where(mask, kspace, new)


def in_place(self, x, y):
    x.mul_(2)
    return y


def rounded(self, x, y):
    return y.detach().requires_grad_(True)


def half(network):
    return network.half()


def frozen(network):
    return network.requires_grad_(False)


def diverged(network):
    network.layer.weight.data[0, 0, 0, 0] = float('nan')
    return network


def whole_numbers(network):
    network.layer.weight = nn.Parameter(torch.ones(1, 1, 3, 3, dtype=torch.int8), requires_grad=False)
    return network


REFUSED = {  # kind of network -> (network for images, words of the refusal)
    'wrong size': (Layer(lambda self, x, y: y[..., 1:]), 'expected images (2, 64, 64) of a network, found (2, 64, 63)'),
    'one pixel': (Layer(lambda self, x, y: y.mean((-2, -1), keepdim=True)), 'found (2, 1, 1)'),
    'one image for all': (Layer(lambda self, x, y: y[:1]), 'found (1, 64, 64)'),
    'two channels': (Layer(lambda self, x, y: y.repeat(1, 2, 1, 1)), 'network.adapter.adapted(model, takes=, gives=)'),
    'complex': (Layer(lambda self, x, y: y + 0j), 'found torch.complex64'),
    'two outputs': (Layer(lambda self, x, y: (y, x)), 'found tuple'),
    'a dictionary': (Layer(lambda self, x, y: {'image': y}), 'found dict'),
    'nothing': (Layer(lambda self, x, y: None), 'found NoneType'),
    'NaN': (Layer(lambda self, x, y: (y - 100).sqrt()), 'is not finite'),
    'infinite gradient': (Layer(lambda self, x, y: y + (y - y).abs().sqrt()), 'the gradient of layer'),
    'too large': (Layer(lambda self, x, y: 1e4 * y), 'a standard deviation of'),
    'no axis for one slice': (
        Layer(lambda self, x, y: y.squeeze()),
        'answers one slice with [64, 64], two with [2, 64',
    ),
    'random in eval mode': (Layer(lambda self, x, y: y + torch.rand_like(y)), 'it draws random numbers'),
    'no gradient': (Layer(lambda self, x, y: y.detach()), 'its answer has no gradient'),
    'input changed': (Layer(in_place), 'changes its input in place'),
    'other form of input': (nn.Conv2d(2, 2, 3, padding=1), 'say so by takes= (--takes)'),
    'other multiple': (
        Layer(lambda self, x, y: y.view(2, 1, 3, -1)),
        'multiple=16 (--multiple) if it halves its images',
    ),
    'no weights': (nn.Identity(), 'has no weights that can be trained'),
    'frozen weights': (frozen(Layer()), 'has no weights that can be trained'),
    'half precision': (half(Layer()), 'layer.weight is torch.float16; expected single precision'),
    'double precision': (Layer().double(), 'torch.float64; expected single precision'),
    'whole numbers': (whole_numbers(Layer()), 'layer.weight is torch.int8'),
    'weights not finite': (diverged(Layer()), 'weights hold values that are not finite (layer.weight'),
    'takes something else': (type('Own', (Two,), dict(takes='two channels'))(), 'use what mri_unlearn.network.adapter'),
    'other word': (type('Own', (Layer,), dict(input='pictures'))(), "expected 'image' or 'kspace'"),
    'takes k-space': (new_varnet(0, num_cascades=1, chans=2), "needs loaders with input='kspace'"),
}


@pytest.mark.parametrize('kind', REFUSED)
def test_a_network_that_cannot_be_used_is_refused_in_one_sentence(kind, dls):
    network, words = REFUSED[kind]
    before = torch.random.get_rng_state(), deepcopy(network.state_dict())
    with pytest.raises(DataError) as e:
        check_network(network, dls['image'])
    assert words in str(e.value) and '\n' not in str(e.value)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert all(torch.equal(t, before[1][k]) or t.isnan().any() for k, t in network.state_dict().items())


DOUBTFUL = {  # kind of network -> (network for images, words of the warning)
    'batch norm': (Layer(lambda self, x, y: self.norm(y), norm=nn.BatchNorm2d(1)), 'keeps statistics of the slices'),
    'instance norm': (
        Layer(lambda self, x, y: self.norm(y), norm=nn.InstanceNorm2d(1, track_running_stats=True)),
        'keeps statistics of the slices',
    ),
    'batch norm without statistics': (
        Layer(lambda self, x, y: self.norm(y), norm=nn.BatchNorm2d(1, track_running_stats=False)),
        'mixes the slices of a batch',
    ),
    'mean of the batch': (Layer(lambda self, x, y: y - y.mean(0, keepdim=True)), 'mixes the slices of a batch'),
    'unused layer': (Layer(more=nn.Linear(2, 2)), 'these weights never move, for the answer does not depend on them'),
    'constant': (Layer(lambda self, x, y: y * 1e-9), 'hardly any structure'),
}


@pytest.mark.parametrize('kind', DOUBTFUL)
def test_what_is_doubtful_is_warned_of(kind, dls):
    network, words = DOUBTFUL[kind]
    with pytest.warns(UserWarning, match=words):
        said = check_network(network, dls['image'].valid)
    assert [words in sentence for sentence in said] == [True]


def test_what_fits_is_let_through_without_a_word(dls):
    batch = dls['image'].train.one_batch()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for network in (new_unet(0, chans=4, num_pool_layers=2), Layer(), Layer(lambda self, x, y: x + 0 * y)):
            for what in (dls['image'], dls['image'].valid, batch, [t[:1] for t in batch]):
                assert check_network(network, what) == []
        dropout = Layer(lambda self, x, y: self.drop(y), drop=nn.Dropout())
        for network in (new_varnet(0, num_cascades=1, chans=2), adapted(Two(), 'two channels')):
            assert check_network(network, dls['kspace']) == []
        assert check_network(dropout, dls['image']) == []


def test_a_check_leaves_the_loaders_where_they_are(dls):
    loader = recon_dls(dls['image'].train_ds.volumes, dls['image'].train_ds.volumes, bs=2, device='cpu').train
    again = recon_dls(dls['image'].train_ds.volumes, dls['image'].train_ds.volumes, bs=2, device='cpu').train
    for _ in range(2):
        check_network(Layer(), loader)
        for a, b in zip(loader, again):
            assert torch.equal(a[0], b[0])


@pytest.mark.parametrize('unit', [1, 1e-6, 1e9])
def test_a_network_that_answers_in_the_other_unit_is_refused(unit, dls):
    batch = dls['image'].train.one_batch()
    y = Targets(*batch[1:])
    own = {name: getattr(y, name) * unit for name in ('target', 'mean', 'std', 'max_value', 'image')}
    y = y._replace(**own)
    in_the_file = Layer(lambda self, x, z: 0 * z + x * y.std[0] + y.mean[0])
    with pytest.raises(DataError, match="look like the file's unit, where normalised"):
        check_network(in_the_file, (batch[0], *y))
    k = dls['kspace'].train.one_batch()
    z = Targets(*k[3:])
    z = z._replace(**{name: getattr(z, name) * unit for name in own})
    normalised = type('Own', (OnKspace,), dict(input='kspace', forward=lambda self, k, *m: image_of(self, k, z)))()
    with pytest.raises(DataError, match="look like normalised images .*, where the file's unit is|are expected"):
        check_network(normalised, (k[0] * unit, *k[1:3], *z))


def image_of(network, kspace, y):
    "A normalised image of the size of k-space"
    return torch.randn(len(kspace), *kspace.shape[-2:]) + 0 * network.layer.weight.sum()


ANSWERS = {  # kind of network for k-space -> (its answer to k-space and mask, gives, words of the refusal)
    'images or k-space': (lambda self, k, mask: self.go(k), None, 'say what it is by gives='),
    'not what it says': (lambda self, k, mask: self.go(k), 'magnitude', "is not what gives='magnitude' says"),
    'two outputs': (lambda self, k, mask: (self.go(k), mask), None, 'answers with tuple; expected one tensor'),
    'nothing': (lambda self, k, mask: None, 'kspace', 'answers with NoneType'),
    'too large': (lambda self, k, mask: self.go(k).abs().sum(1).repeat(1, 1, 2), None, 'images of at most 128 x 74'),
    'smaller than the target': (lambda self, k, mask: self.go(k).abs().sum(1)[:, :20], None, 'cannot crop'),
    'one image for all': (lambda self, k, mask: self.go(k).abs().sum(1)[:1], None, 'expected 2 images'),
    'coil sensitivities wanted': (lambda self, k, mask, maps: k, None, "as 'kspace + mask + maps'"),
    'no mask': (lambda self, k, maps: k, None, "as 'kspace + mask + maps'"),
}


@pytest.mark.parametrize('kind', ANSWERS)
def test_an_answer_to_k_space_is_understood_or_refused(kind, dls):
    forward, gives, words = ANSWERS[kind]
    network = type('Own', (OnKspace,), dict(forward=forward, go=lambda self, k: OnKspace.forward(self, k, k != 0)))()
    with pytest.raises(DataError, match='(?s).*') as e:
        check_network(adapted(network, 'kspace', gives), dls['kspace'])
    assert words in str(e.value)


def test_the_shell_hides_in_files_copies_and_pickles(tmp_path, dls):
    shell = adapted(Two(), 'two channels')
    save_weights(shell, tmp_path / 'shell.pt')
    save_weights(unwrapped(shell), tmp_path / 'bare.pt')
    assert (tmp_path / 'shell.pt').read_bytes() == (tmp_path / 'bare.pt').read_bytes()
    other = adapted(Two(), 'two channels')
    load_weights(other, tmp_path / 'bare.pt')
    x = dls['kspace'].train.one_batch()[:3]
    with torch.no_grad():
        answers = [net(*x) for net in (shell, other, deepcopy(shell), pickle.loads(pickle.dumps(shell)))]
        answers += [nn.DataParallel(shell)(*x)]
    assert all(torch.equal(a, answers[0]) for a in answers)
    assert input_of(nn.DataParallel(shell)) == 'kspace' and unwrapped(nn.DataParallel(shell)) is unwrapped(shell)


def test_mixed_precision_leaves_complex_numbers_alone(dls):
    for network in (adapted(Two(), 'two channels'), adapted(OnKspace(), 'kspace', 'kspace')):
        x = dls['kspace'].train.one_batch()[:3]
        plain = network(*x)
        with torch.autocast('cpu', torch.bfloat16):
            mixed = network(*x)
        assert mixed.dtype == plain.dtype == torch.float32
        assert (mixed - plain).abs().mean() < 0.02 * plain.mean()


def test_an_exported_learner_is_loaded_with_its_shell_and_is_no_file_of_weights(tmp_path, dls):
    from fastai.learner import load_learner

    learn = recon_learner(dls['kspace'], adapted(Two(), 'two channels'))
    learn.export(tmp_path / 'learner.pkl')
    assert isinstance(load_learner(tmp_path / 'learner.pkl').model, Adapter)
    torch.save(learn.model, tmp_path / 'whole.pt')
    for name in ('learner.pkl', 'whole.pt'):
        with pytest.raises(DataError, match=r'state_dict\(\)'):
            load_weights(Two(), tmp_path / name)


SHOP = """
from torch import nn

class Net(nn.Conv2d):
    def __init__(self, chans=1):
        super().__init__(chans, chans, 3, padding=1)

number = 3

def nothing():
    pass

def lazy():
    return nn.LazyConv2d(1, 3)

def fails():
    raise KeyError('size')
"""
FACTORIES = {  # kind -> (factory, its arguments, words of the refusal)
    'no colon': ('own_shop', None, 'expected module:name'),
    'a path': ('nets/own_shop.py:Net', None, 'expected module:name'),
    'no such module': ('no_such_shop:Net', None, 'there is no module no_such_shop here'),
    'no such name': ('own_shop:Nets', None, "has no 'Nets'"),
    'not callable': ('own_shop:number', None, 'found a int'),
    'no module': ('own_shop:nothing', None, 'expected a network (torch.nn.Module), found a NoneType'),
    'lazy layers': ('own_shop:lazy', None, 'lazy layers'),
    'it fails': ('own_shop:fails', None, 'raised KeyError'),
    'unknown argument': ('own_shop:Net', dict(width=3), "unexpected keyword argument 'width'"),
    'wrong argument': ('own_shop:Net', dict(chans='many'), 'raised TypeError'),
    'no dictionary': ('own_shop:Net', [3], 'expected arguments as a dictionary'),
    'an instance': (nn.Conv2d(1, 1, 3), None, 'found a Conv2d'),
    'syntax error': ('broken_own_shop:Net', None, 'SyntaxError'),
    'missing package': ('poor_own_shop:Net', None, "No module named 'not_here_at_all'"),
    'a script': ('script_own_shop:Net', None, 'SystemExit'),
}


@pytest.fixture
def shop(tmp_path, monkeypatch):
    "A folder with modules, in which somebody works"
    for name, text in dict(
        own_shop=SHOP, broken_own_shop='class Net(:', poor_own_shop='import not_here_at_all', script_own_shop='exit(3)'
    ).items():
        (tmp_path / f'{name}.py').write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize('kind', FACTORIES)
def test_a_factory_that_cannot_be_used_is_refused(kind, shop):
    factory, arguments, words = FACTORIES[kind]
    with pytest.raises(DataError) as e:
        own_network(factory, arguments)
    assert words in str(e.value)


def test_a_network_by_name_with_weights_that_fit_or_do_not(shop):
    net = own_network('own_shop:Net', dict(chans=1), seed=1)
    assert isinstance(net, Wrapper) and not net.training
    assert torch.equal(net.made_again(1).weight, unwrapped(net).weight)
    assert not torch.equal(net.made_again(2).weight, unwrapped(net).weight)
    save_weights(net, shop / 'net.pt')
    assert torch.equal(
        unwrapped(own_network('own_shop:Net', weights=shop / 'net.pt', seed=5)).weight, net.module.weight
    )
    torch.save({'bias': torch.ones(1)}, shop / 'other.pt')
    for path, arguments, words in (
        ('net.pt', dict(chans=2), 'weight has the shape [1, 1, 3, 3], expected [2, 2, 3, 3]'),
        ('other.pt', None, 'lacks weight'),
        ('own_shop.py', None, 'damaged, or not a file of weights'),
        ('nowhere.pt', None, 'no such file'),
    ):
        with pytest.raises(DataError) as e:
            own_network('own_shop:Net', arguments, weights=shop / path)
        assert words in str(e.value)


@pytest.mark.parametrize('takes', ['two channels', 'kspace'])
def test_from_training_to_scores(takes, index, dls):
    "A network with an adapter is trained, unlearns and is scored, and a check stands before unlearning"
    with seeded(0):
        network = adapted(Two(), takes) if takes == 'two channels' else adapted(OnKspace(), takes, 'kspace')
    volumes = dls['kspace'].train_ds.volumes
    splits = volumes.assign(split=['forget_train' if i == 0 else 'retain_train' for i in range(len(volumes))])
    learn = recon_learner(dls['kspace'], network)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3, cbs=SkipValidation())
    aside = splits.tail(1).assign(patient_id='another', split='retain_test')  # in the table, and not trained on
    done = unlearn(learn, pd.concat([splits, aside]), 'nl_ft', rounds=1, steps=1, bs=2, held_out=aside)
    assert isinstance(done.model, Adapter) and done.model is not network
    assert evaluate(done, dls['kspace'].valid).psnr.notna().all()
    broken = recon_learner(dls['kspace'], adapted(nn.Conv2d(2, 3, 3, padding=1), 'two channels'))
    with pytest.raises(DataError, match='say what it is by gives='):
        unlearn(broken, splits, 'nl_ft', rounds=1, steps=1, bs=2)


def test_deepinv_models_take_its_physics(dls, monkeypatch):
    "With deepinv itself where it can be imported; else with an operator of the same call"
    x = dls['kspace'].train.one_batch()
    try:
        import deepinv  # noqa: F401
    except Exception:
        import mri_unlearn.network.forms as forms
        from mri_unlearn.signal.kspace import fft2c

        class Operator:
            "What deepinv's MultiCoilMRI is called by"

            def __init__(self, scan):
                self.scan = scan

            def A(self, image):
                k = fft2c(self.scan.maps * torch.complex(*image.unbind(1))[:, None]) * self.scan.mask
                return torch.stack((k.real, k.imag), 1)

            def A_adjoint(self, y):
                from mri_unlearn.network.varnet import reduce

                return forms.as_channels(reduce(torch.complex(*y.unbind(1)) * self.scan.mask, self.scan.maps))

        monkeypatch.setitem(forms.FORMS, 'physics', Operator)

    class Gradient(nn.Module):
        "One step of gradient descent, of a length that is learnt"

        takes = 'physics'

        def __init__(self):
            super().__init__()
            self.step = nn.Parameter(torch.full((1,), 0.1))

        def forward(self, y, physics):
            x = physics.A_adjoint(y)
            return x - self.step * physics.A_adjoint(physics.A(x) - y)

    network, y = adapted(Gradient()), Targets(*x[3:])
    image = to_image(network(*x[:3]), y, 'kspace')
    assert (image - y.image).abs().mean() < 0.1 * y.image.mean()
    assert check_network(network, x) == []
