"""fastMRI 0.3 gives the same: masks, transforms, networks, scores and losses, to the bit or to float32 rounding.

fastMRI itself computes the other side. Where it crashes, the tests say so, and what happens here instead."""

import argparse
import itertools
from functools import partial
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

from mri_unlearn.data.header import Header
from mri_unlearn.data.loaders import ReconDL
from mri_unlearn.data.slices import SliceDataset, Targets, zero_filled
from mri_unlearn.data.volumes import index_volumes
from mri_unlearn.data.writing import rss_target, write_volume
from mri_unlearn.machinery.disk import DataError
from mri_unlearn.network import metrics
from mri_unlearn.network.learner import to_image
from mri_unlearn.network.unet import UNet
from mri_unlearn.network.varnet import VarNet
from mri_unlearn.network.weights import load_network, save_weights
from mri_unlearn.signal import masks
from mri_unlearn.signal.kspace import center_crop, fft2c, ifft2c, rss
from mri_unlearn.signal.masks import apply_mask, file_seed, mask_func
from mri_unlearn.verdict.evaluate import evaluate, write_prediction

pytestmark = pytest.mark.parity

KINDS = 'random', 'equispaced', 'equispaced_fraction', 'magic', 'magic_fraction'
NAMES = 'file1000001.h5', 'file_brain_AXT2_200_2000019.h5', 'file1000000.h5', 'a scan of mine.h5'


def bits(x):
    "What a float or complex tensor consists of: 0 and -0 differ, NaN equals NaN"
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return (
        x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
        if x.is_floating_point()
        else x
    )


def same(what, ours, theirs):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, (
        what,
        ours.shape,
        theirs.shape,
        ours.dtype,
        theirs.dtype,
    )
    assert torch.equal(bits(ours), bits(theirs)), (
        f'{what}: {int((bits(ours) != bits(theirs)).sum())} of {theirs.numel()} values differ'
    )


def close(what, ours, theirs, share=1e-6, top=None):
    "The largest difference is at most `share` of the largest value (or of `top`)"
    ours, theirs = (
        v if torch.is_tensor(v) else torch.as_tensor(np.asarray(v)) for v in (ours, theirs)
    )  # a float stays a double
    assert ours.shape == theirs.shape, (what, ours.shape, theirs.shape)
    top = float(theirs.abs().max()) if top is None else top
    off = float((ours - theirs).abs().max())
    assert top > 0 and off <= share * top, f'{what}: off by {off / top:.1e}, allowed is {share:.1e}'


def pairs(x):
    return torch.view_as_real(x)  # fastMRI's complex numbers: a last axis of two


def randn(*shape, seed=0, dtype=torch.complex64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_what_is_close_can_fail():
    x = randn(3, 4)
    for wrong in (x + 1e-3, x.conj(), x[:2], x * float('nan')):
        with pytest.raises(AssertionError, match='x'):
            close('x', wrong, x)
        with pytest.raises(AssertionError, match='x'):
            same('x', wrong, x)
    with pytest.raises(AssertionError, match='zero'):
        same('zero', torch.tensor([-0.0]), torch.tensor([0.0]))


# masks

WIDTHS = 320, 322, 368, 372, 396, 276, 213, 234, 57, 33
RATES = (4, 0.08), (8, 0.04), (2, 0.16), (3, 0.1), (6, 0.06), (10, 0.02), (16, 0.02), (5, 0.0), (1, 0.3)


def no_mask(kind, width, R, fraction):
    "Is this one of the cases in which fastMRI crashes?"
    low, target = round(width * fraction), round(width / R)
    return {
        'random': low == width,
        'equispaced_fraction': low * R >= width or R * (low - width) / (low * R - width) < 0.5,
        'magic_fraction': target <= max(min(low, target), 1),
    }.get(kind, False)


@pytest.mark.parametrize('kind', KINDS)
def test_masks(fastmri, kind):
    "The same columns and number of low frequencies for any width, rate, centre and seed"
    for width, (R, fraction) in itertools.product(WIDTHS, RATES):
        theirs, ours = fastmri.create_mask_for_mask_type(kind, [fraction], [R]), mask_func(kind, fraction, R)
        for seed in (*map(file_seed, NAMES), 0, 1, 12345, (2**31, 7)):
            case = f'{kind}, width {width}, {R}×, centre {fraction}, seed {seed}'
            if no_mask(kind, width, R, fraction):
                with pytest.raises((ZeroDivisionError, ValueError)):
                    theirs((1, width, 2), None, seed)
                continue
            mask, low = theirs((1, width, 2), None, seed)
            mine, my_low = ours(width, seed=seed)
            assert my_low == low, case
            same(case, mine, mask.flatten().bool())
            assert set(mask.flatten().tolist()) <= {0.0, 1.0}, case


@pytest.mark.parametrize('kind', KINDS)
def test_masks_of_several_rates(fastmri, kind):
    "The pair is drawn first, and the rest of the draws depends on it"
    rates, fractions = [4, 8, 6], [0.08, 0.04, 0.05]
    theirs, ours = fastmri.create_mask_for_mask_type(kind, fractions, rates), mask_func(kind, fractions, rates)
    lows = set()
    for width, n in itertools.product((320, 368, 213), range(40)):
        seed = file_seed(f'file1000{n:03d}.h5')
        mask, low = theirs((1, width, 2), None, seed)
        same(f'{kind} {width} {seed}', ours(width, seed=seed)[0], mask.flatten().bool())
        assert ours(width, seed=seed)[1] == low
        lows.add((width, low))
    assert len(lows) == 9, 'not every pair was drawn'


def test_seed_of_a_file(fastmri):
    "fastMRI's transforms seed with the characters of the name, extension included; the folder does not count"
    seen = []

    def spy(shape, offset, seed):
        seen.append(seed)
        return torch.ones(1, shape[-2], 1), 3

    for name in NAMES:
        fastmri.UnetDataTransform('multicoil', spy)(
            np.ones((2, 8, 8), np.complex64), None, np.ones((8, 8), np.float32), {}, name, 0
        )
        assert seen[-1] == file_seed(name) == file_seed(f'/some/where/{name}') == tuple(map(ord, name))


def test_golden_masks():
    "Written down once, so that a change on both sides is noticed too"

    def columns(kind, name, width, R, fraction):
        return mask_func(kind, fraction, R)(width, seed=file_seed(name))

    for name, width, R, fraction, low, pad, offset in (
        (NAMES[0], 368, 8, 0.04, 15, 177, 3),
        (NAMES[1], 320, 8, 0.04, 13, 154, 1),
        (NAMES[2], 368, 4, 0.08, 29, None, 1),
    ):
        mask, n = columns('equispaced', name, width, R, fraction)
        assert n == low and mask.nonzero().flatten()[0] == offset and mask[offset::R].all(), name
        if pad is not None:
            assert mask[pad : pad + low].all() and not (mask[pad - 1] and mask[pad + low]), name
    mask, low = columns('random', NAMES[0], 368, 8, 0.04)
    assert low == 15 and mask.nonzero().flatten()[:6].tolist() == [3, 6, 7, 11, 31, 57]
    drawn = np.random.RandomState(file_seed(NAMES[0])).uniform(size=368) < (368 / 8 - 15) / (368 - 15)
    assert drawn.sum() == 30 and (mask.numpy() | drawn == mask.numpy()).all()


def test_where_fastmri_has_no_mask(fastmri):
    "It divides by zero or draws from nothing. Here: one clear sentence, or the centre alone, where that is a mask"

    def crashes(kind, width, R, fraction):  # with the error that numpy or Python happens to raise
        assert no_mask(kind, width, R, fraction)
        with pytest.raises((ZeroDivisionError, ValueError)):
            fastmri.create_mask_for_mask_type(kind, [fraction], [R])((1, width, 2), None, 1)

    crashes('equispaced_fraction', 320, 4, 0.25)  # n_low·R = W: the centre is all that there is to read
    mask, low = mask_func('equispaced_fraction', 0.25, 4)(320, seed=1)
    assert low == 80 == mask.sum() and mask[120:200].all()
    crashes('equispaced_fraction', 320, 8, 0.25)  # more than all
    with pytest.raises(ValueError, match='80 central columns alone are more than 320/8'):
        mask_func('equispaced_fraction', 0.25, 8)(320, seed=1)
    crashes('magic_fraction', 320, 10, 0.1)  # R' = 0
    mask, low = mask_func('magic_fraction', 0.1, 10)(320, seed=1)
    assert low == 32 == mask.sum() and mask[144:176].all()
    crashes('random', 320, 4, 1.0)
    assert mask_func('random', 1.0, 4)(320, seed=1)[0].all()
    for kind, R in (('equispaced', 2.5), ('magic', 2.5)):
        with pytest.raises((TypeError, ValueError)):
            fastmri.create_mask_for_mask_type(kind, [0.08], [R])((1, 320, 2), None, 3)
        with pytest.raises(ValueError, match='whole numbers'):
            mask_func(kind, 0.08, R)


def test_apply_mask(fastmri):
    "Masked k-space to the bit: no zero keeps its sign, and what lies outside the padding is gone"
    k = randn(3, 12, 40)
    k[0, 0, :5], k[1, :, 20] = -0.0, complex(-0.0, -1.0)
    for padding in (None, (0, 40), (4, 35)):
        for name in NAMES:
            theirs, mask, _ = fastmri.apply_mask(
                pairs(k), fastmri.create_mask_for_mask_type('random', [0.1], [3]), seed=file_seed(name), padding=padding
            )
            mine = mask_func('random', 0.1, 3)(40, seed=file_seed(name))[0]
            same(f'{name} {padding}', apply_mask(k, mine, padding), torch.view_as_complex(theirs))
            same(f'mask {name} {padding}', masks.clip_mask(mine, padding or (0, 40)), mask.flatten().bool())


# Fourier transforms, crops, coils

SHAPES = (640, 368), (20, 20), (33, 20), (20, 33), (33, 35), (1, 7)


def test_fourier(fastmri):
    for shape in SHAPES:
        for dtype, share in ((torch.complex64, 1e-6), (torch.complex128, 1e-14)):
            x = randn(2, *shape, dtype=dtype)
            for name, ours, theirs in (('fft2c', fft2c, fastmri.fft2c), ('ifft2c', ifft2c, fastmri.ifft2c)):
                close(f'{name} {shape} {dtype}', ours(x), torch.view_as_complex(theirs(pairs(x))), share)


def test_crops_and_coils(fastmri):
    x = randn(4, 33, 20)
    for shape in ((33, 20), (32, 20), (20, 19), (7, 3), (1, 1)):
        same(f'center_crop {shape}', center_crop(x.real.clone(), shape), fastmri.center_crop(x.real.clone(), shape))
        same(
            f'complex_center_crop {shape}',
            center_crop(x, shape),
            torch.view_as_complex(fastmri.complex_center_crop(pairs(x), shape)),
        )
        same(
            f'numpy {shape}',
            torch.tensor(center_crop(x.real.numpy(), shape)),
            torch.tensor(fastmri.center_crop(x.real.numpy(), shape)),
        )
    for shape in ((34, 20), (33, 21), (0, 5)):
        for crop in (center_crop, fastmri.center_crop):
            with pytest.raises(ValueError):
                crop(x.real, shape)
    close('rss of complex images', rss(x, 0), fastmri.rss_complex(pairs(x), 0))
    close('rss of magnitudes', rss(x, 0), fastmri.rss(fastmri.complex_abs(pairs(x)), 0))
    close('rss of real images', rss(x.real, 1), fastmri.rss(x.real, 1))


def test_zero_filled(fastmri):
    "The fast way (sampled columns, unshifted, coil by coil) against masking, ifft2c, crop and RSS, one after the other"
    for (H, W), size in (
        ((640, 368), (320, 320)),
        ((37, 33), (21, 20)),
        ((64, 27), (40, 27)),
        ((33, 64), (33, 64)),
        ((35, 35), (35, 35)),
        ((36, 24), (17, 11)),
    ):
        k = randn(3, H, W)
        for R, fraction in ((4, 0.08), (8, 0.04), (1, 0.1)):
            mask = mask_func('equispaced', fraction, R)(W, seed=1)[0]
            image = fastmri.complex_center_crop(fastmri.ifft2c(pairs(k) * mask[:, None] + 0.0), size)
            close(f'{H}×{W} to {size}, {R}×', zero_filled(k, mask, size), fastmri.rss(fastmri.complex_abs(image)))


# files through both loaders


def scan(H, W, coils, seed):
    "Two slices of k-space, complex64 [2, coils, H, W]: something round with a bright vessel, as strong as fastMRI's"
    y, x = torch.meshgrid(
        torch.linspace(-2, 2, H), torch.linspace(-1.1, 1.1, W), indexing='ij'
    )  # oversampled along the rows
    turn = torch.arange(coils)[:, None, None] * 2 * torch.pi / coils
    coil = torch.exp(-((x - turn.cos()) ** 2 + (y - turn.sin()) ** 2) / 3 + 1j * (x * turn.sin() + y))
    body = torch.stack(
        [((x / 0.8) ** 2 + (y / 0.9) ** 2 < 1) + 0.5 * ((x / 0.3) ** 2 + ((y - a) / 0.4) ** 2 < 1) for a in (0.2, 0.4)]
    )
    image = (body + 20 * ((x - 0.4) ** 2 + (y + 0.3) ** 2 < 0.1**2))[:, None] * coil * 2e-4
    return (fft2c(image) + 2e-6 * randn(2, coils, H, W, seed=seed)).numpy()


# name: (coils, H, W, (rows, cols) of the header, measured columns or None)
MULTI = {
    'file1000001.h5': (4, 128, 74, (64, 64), None),
    'file1000002.h5': (3, 640, 372, (320, 320), None),  # real size
    'file_brain_AXT2_200_2000019.h5': (5, 96, 49, (48, 40), None),  # odd width, image higher than wide
    'file_brain_AXT1_201_2010001.h5': (2, 65, 45, (33, 45), None),  # odd everywhere
    'file_brain_AXFLAIR_203_2030001.h5': (4, 96, 53, (96, 96), None),  # the header's image is wider than k-space
    'file_brain_AXT1POST_205_2050001.h5': (4, 96, 64, (48, 48), (9, 52)),  # sides that were never measured
}


def write(folder, name, spec, single=False, target=None, mask=None, signed=0):
    "`signed=-0.`: zeros keep the signs that the measurement had there, as in the test set of 2019"
    coils, H, W, recon, measured = spec
    left, right = measured or (0, W)
    k = scan(H, W, 1 if single else coils, seed=sum(map(ord, name)))
    if measured:
        k[..., :left] = 0
        k[..., right:] = 0
    k[..., 1:3, :] = complex(-0.0, -0.0)
    if mask is not None:
        k = k * mask.numpy() + signed
    header = Header(encoded=(H, W, 1), recon=(*recon, 1), enc_center=W // 2 - left, enc_maximum=right - left - 1)
    path = write_volume(
        folder / name, k[:, 0] if single else k, header=header, acquisition='AXT2', patient_id=name, target=target
    )
    if mask is not None:
        with h5py.File(path, 'r+') as f:
            f['mask'], f.attrs['acceleration'], f.attrs['num_low_frequency'] = mask.numpy(), 4, 7
    return path


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "Files with targets, files without, and files with masks of their own, of several coils and of one"
    root, out = tmp_path_factory.mktemp('files'), {}
    for single, also in itertools.product((False, True), ('', '_no_target', '_test')):
        kind = ('singlecoil' if single else 'multicoil') + also
        out[kind] = root / kind
        for name, spec in MULTI.items():
            if also and name == 'file1000002.h5':
                continue
            mask = mask_func('random', 0.2, 4)(spec[2], seed=3)[0] if also == '_test' else None
            write(out[kind], name, spec, single, False if also else None, mask)
    return out


def our_slices(folder, mask, **kwargs):
    "(file, slice) -> what a batch of one slice holds, out of batches of up to three"
    out, index = {}, index_volumes(folder, cache=False)
    dl = ReconDL(SliceDataset(index, mask, **kwargs), bs=3, device='cpu')
    for b in dl:
        x, y = b[: dl.n_inp], Targets(*b[dl.n_inp :])
        for i, (v, s) in enumerate(zip(y.volume.tolist(), y.slice_num.tolist())):
            out[index.fname[v], s] = [a[i] for a in x], Targets(*(a[i] for a in y))
    return out


def their_slices(fastmri, folder, transform):
    out = {}
    for sample in fastmri.SliceDataset(folder, folder.name.split('_')[0], transform):
        out[sample.fname, sample.slice_num] = sample
    return out


def check_unet(case, ours, theirs):
    "1e-5 of the standard deviation, the unit of the input; float32 keeps 3e-7 of the largest value, 10 of them"
    assert set(ours) == set(theirs) and len(ours), case
    for key, sample in theirs.items():
        (x,), y = ours[key]
        at = f'{case} {key}'
        close(f'{at}: image', x[0], sample.image, 1e-5, top=1)
        close(f'{at}: mean', y.mean, sample.mean, 1e-6)
        close(f'{at}: std', y.std, sample.std, 1e-5)
        if sample.target.ndim == 2:
            target = ((y.target - y.mean) / y.std).clamp(-6, 6)
            close(f'{at}: target', target, sample.target, 2e-5, top=1)
            assert np.isclose(float(y.max_value), sample.max_value, rtol=1e-7), at
        else:
            assert y.target.isnan().all() and y.target.shape == x[0].shape, at
    assert sum(bool((s.image == 6).any()) for s in theirs.values()) > len(theirs) / 2, (
        'nothing is bright enough to be clamped'
    )


@pytest.mark.parametrize('kind', KINDS)
def test_unet_transform(fastmri, folders, kind):
    "Image, target, mean and standard deviation of `UnetDataTransform`, for files of all sizes in one folder"
    for name in (
        ('multicoil', 'singlecoil', 'multicoil_no_target', 'singlecoil_no_target')
        if kind == 'equispaced'
        else ('multicoil',)
    ):
        transform = fastmri.UnetDataTransform(name.split('_')[0], fastmri.create_mask_for_mask_type(kind, [0.08], [4]))
        check_unet(
            f'{kind} {name}',
            our_slices(folders[name], mask_func(kind, 0.08, 4)),
            their_slices(fastmri, folders[name], transform),
        )


def test_unet_transform_of_a_test_file(fastmri, folders):
    "A file with its own mask is masked already: fastMRI's test transform masks nothing, mask functions do not matter"
    for name in ('multicoil_test', 'singlecoil_test'):
        ours = our_slices(folders[name], mask_func('random', 0.08, 8))
        check_unet(name, ours, their_slices(fastmri, folders[name], fastmri.UnetDataTransform(name.split('_')[0])))


def check_varnet(fastmri, case, ours, theirs):
    "Input to the bit; the target as in the file, cropped as fastMRI crops it beside the network's output"
    assert set(ours) == set(theirs) and len(ours), case
    for key, sample in theirs.items():
        (kspace, mask, low), y = ours[key]
        at = f'{case} {key}'
        same(f'{at}: k-space', kspace, torch.view_as_complex(sample.masked_kspace))
        same(f'{at}: mask', mask, sample.mask[..., 0])
        assert int(low) == sample.num_low_frequencies, at
        if sample.target.ndim:
            output = randn(*kspace.shape[-2:], dtype=torch.float32)  # as large as the k-space
            theirs_out, theirs_target = fastmri.center_crop_to_smallest(output[None], sample.target[None])
            same(f'{at}: target', y.target[None], theirs_target)
            same(f'{at}: output', to_image(output[None], Targets(*(a[None] for a in y)), 'kspace'), theirs_out)
            assert np.isclose(float(y.max_value), sample.max_value, rtol=1e-7), at


@pytest.mark.parametrize('kind', KINDS)
def test_varnet_transform(fastmri, folders, kind):
    for name in ('multicoil', 'multicoil_no_target') if kind == 'equispaced' else ('multicoil',):
        theirs = their_slices(
            fastmri, folders[name], fastmri.VarNetDataTransform(fastmri.create_mask_for_mask_type(kind, [0.08], [4]))
        )
        check_varnet(
            fastmri, f'{kind} {name}', our_slices(folders[name], mask_func(kind, 0.08, 4), input='kspace'), theirs
        )


def test_varnet_transform_of_a_test_file(fastmri, folders):
    ours = our_slices(folders['multicoil_test'], mask_func('random', 0.08, 8), input='kspace')
    theirs = their_slices(fastmri, folders['multicoil_test'], fastmri.VarNetDataTransform())
    assert all(s.num_low_frequencies == 0 for s in theirs.values())
    check_varnet(fastmri, 'test', ours, theirs)


def test_signs_of_zeros_in_a_test_file(fastmri, tmp_path):
    "Where a file leaks by its zeros what was left out, fastMRI hands that to the network; here it does not get through"
    mask = mask_func('random', 0.2, 4)(74, seed=3)[0]
    write(
        tmp_path / 'multicoil',
        'file1000001.h5',
        MULTI['file1000001.h5'],
        target=False,
        mask=mask,
        signed=complex(-0.0, -0.0),
    )
    ours = our_slices(tmp_path / 'multicoil', mask_func('random', 0.08, 8), input='kspace')
    for key, sample in their_slices(fastmri, tmp_path / 'multicoil', fastmri.VarNetDataTransform()).items():
        kspace, theirs = ours[key][0][0], torch.view_as_complex(sample.masked_kspace)
        assert (bits(theirs[..., ~mask]) != 0).any() and not (bits(kspace[..., ~mask]) != 0).any()
        same('k-space but for these signs', kspace, theirs + 0.0)


def test_padding(fastmri, folders):
    "Columns that were measured, from the header"
    index = index_volumes(folders['multicoil'], cache=False)
    found = dict(zip(index.fname, zip(index.padding_left, index.padding_right)))
    for path, _, m in fastmri.SliceDataset(folders['multicoil'], 'multicoil').raw_samples:
        assert found[path.name] == (m['padding_left'], m['padding_right']), path.name
    assert found['file_brain_AXT1POST_205_2050001.h5'] == MULTI['file_brain_AXT1POST_205_2050001.h5'][-1]


# networks


def grads(model, loss):
    model.zero_grad()
    loss.backward()
    return {k: p.grad.clone() for k, p in model.named_parameters()}


def check_grads(case, ours, theirs, share):
    assert set(ours) == set(theirs), case
    for k, g in theirs.items():
        close(
            f'{case}: gradient of {k}',
            ours[k],
            g,
            share,
            top=max(float(g.abs().max()), 1e-3 * max(float(t.abs().max()) for t in theirs.values())),
        )


def test_unet(fastmri):
    "Same weights, same image and gradients: 1e-5 in single, 1e-10 in double precision: rounding, not a difference"
    for n_in, n_out, chans, pools, drop in ((1, 1, 8, 4, 0.0), (2, 2, 6, 2, 0.0), (2, 1, 4, 1, 0.2)):
        torch.manual_seed(chans)
        theirs = fastmri.Unet(n_in, n_out, chans, pools, drop).eval()
        ours = UNet(n_in, n_out, chans, pools, drop).eval()
        ours.load_state_dict(theirs.state_dict(), strict=True)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for h, w in ((64, 64), (32, 80), (37, 53), (49, 32)):
            case, x = f'U-Net {n_in}-{n_out}-{chans}-{pools} {h}×{w}', randn(2, n_in, h, w, dtype=torch.float64)
            with torch.no_grad():
                close(case, ours(x.float()), theirs(x.float()), 1e-5)
        ours, theirs = ours.double(), theirs.double()
        a, b = ours(x), theirs(x)
        close(f'{case} double', a.detach(), b.detach(), 1e-10)
        check_grads(case, grads(ours, a.square().sum()), grads(theirs, b.square().sum()), 1e-8)


def test_a_seed_gives_the_same_first_weights(fastmri):
    for ours, theirs in ((UNet, fastmri.Unet), (VarNet, fastmri.VarNet)):
        kwargs = (
            dict(num_cascades=2, sens_chans=2, sens_pools=1, chans=3, pools=2)
            if ours is VarNet
            else dict(in_chans=1, out_chans=1, chans=4, num_pool_layers=2)
        )
        states = []
        for kind in (ours, theirs):
            torch.manual_seed(7)
            states.append(kind(**kwargs).state_dict())
        for k in states[1]:
            same(k, states[0][k], states[1][k])


SMALL = dict(num_cascades=2, sens_chans=2, sens_pools=2, chans=4, pools=2)


def varnets(fastmri, **kwargs):
    torch.manual_seed(3)
    theirs = fastmri.VarNet(**{**SMALL, **kwargs}).eval()
    for c in theirs.cascades:
        torch.nn.init.uniform_(c.dc_weight, 0.5, 1.5)
    ours = VarNet(**{**SMALL, **kwargs}).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    return ours, theirs


def measured(B, C, H, W, seeds, dtype=torch.complex64, R=4, fraction=0.1, padding=None):
    "Masked k-space of images (not noise: sensitivities come from its middle), masks [B, 1, 1, W], low frequencies"
    k = torch.cat([torch.tensor(scan(H, W, C, seed=s))[:1] for s in seeds[:B]]).to(dtype)
    drawn = [mask_func('equispaced', fraction, R)(W, seed=s) for s in seeds[:B]]
    mask = torch.stack([masks.clip_mask(m, padding or (0, W)) for m, _ in drawn])[:, None, None]
    return torch.where(mask, k, 0), mask, drawn[0][1]


def test_varnet(fastmri):
    "Any size, batch and way to say how many low frequencies there are"
    ours, theirs = varnets(fastmri)
    for B, C, H, W in ((1, 4, 64, 36), (2, 3, 45, 33), (3, 1, 32, 47), (1, 2, 50, 64)):
        k, mask, low = measured(B, C, H, W, (5, 11, 23))
        for given in (low, low - 1, 1, None, 0):
            case = f'VarNet {B}×{C}×{H}×{W}, {given} low frequencies'
            with torch.no_grad():
                b = theirs(pairs(k), mask[..., None], given)
                close(case, ours(k, mask, given), b, 1e-5)
                each = torch.full((B,), given or 0)
                close(f'{case}, one number an item', ours(k, mask, each), b, 1e-5)
    with torch.no_grad():
        k, mask, low = measured(2, 3, 40, 36, (5, 11))
        b = torch.cat([theirs(pairs(k[i : i + 1]), mask[i : i + 1, ..., None], n) for i, n in enumerate((low, 0))])
        close(
            'different numbers in a batch, which fastMRI takes one by one',
            ours(k, mask, torch.tensor([low, 0])),
            b,
            1e-5,
        )
        k, mask, _ = measured(2, 3, 40, 36, (5, 11), padding=(7, 30))
        close('padded sides', ours(k, mask), theirs(pairs(k), mask[..., None]), 1e-5)
        whole, mask, _ = measured(2, 3, 40, 36, (5, 11), R=1)
        for few in ((18,), (17, 18), (16, 17, 18)):
            mask = torch.zeros_like(mask)
            mask[..., [3, 9, 24, 31, *few]] = True
            k = torch.where(mask, whole, 0)
            close(f'{few} in the middle', ours(k, mask), theirs(pairs(k), mask[..., None]), 1e-5)
        mask[..., 16:19] = False
        k = torch.where(mask, whole, 0)
        assert theirs(pairs(k), mask[..., None]).isnan().all() and ours(k, mask).isfinite().all(), (
            'no middle at all: fastMRI gives NaN'
        )
        bare, whole = varnets(fastmri, mask_center=False)
        close('no mask_center', bare(k, mask), whole(pairs(k), mask[..., None]), 1e-5)


def test_varnet_in_double_precision(fastmri):
    "Output and all gradients, where rounding is far away; checkpointed, too"
    ours, theirs = (m.double() for m in varnets(fastmri))
    k, mask, low = measured(2, 3, 37, 34, (5, 11), dtype=torch.complex128)
    k, weight = k * 1e4, randn(2, 37, 34, dtype=torch.float64)
    b = theirs(pairs(k), mask[..., None], low)
    want = grads(theirs, (b * weight).sum())
    for ours.checkpoint in (False, True):
        a = ours(k, mask, low)
        close('double', a.detach(), b.detach(), 1e-10)
        check_grads(f'VarNet, checkpoint={ours.checkpoint}', grads(ours, (a * weight).sum()), want, 1e-7)


def test_batches_with_numbers_on_which_fastmri_fails(fastmri):
    "Its own loader makes a tensor of them, whose comparison with 0 has no answer"
    ours, theirs = varnets(fastmri)
    k, mask, low = measured(2, 2, 32, 32, (5, 11))
    with pytest.raises(RuntimeError):
        theirs(pairs(k), mask[..., None], torch.tensor([low, low]))
    with torch.no_grad():
        close('as int', ours(k, mask, torch.tensor([low, low])), theirs(pairs(k), mask[..., None], low), 1e-5)


def lightning(prefix, model):
    "What fastMRI's Lightning modules leave: weights under the module's name, window, metrics, settings, optimizer"
    weights = {f'{prefix}.{k}': v for k, v in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    return {
        'epoch': 49,
        'global_step': 100,
        'pytorch-lightning_version': '1.6.4',
        'loops': {'fit_loop': {'state_dict': {}}},
        'lr_schedulers': [{'gamma': 0.1, 'last_epoch': 50}],
        'state_dict': {
            **weights,
            'loss.w': torch.ones(1, 1, 7, 7) / 49,
            'NMSE.quantity': torch.tensor(0.01),
            'TotExamples.quantity': torch.tensor(7.0),
        },
        'callbacks': {
            'ModelCheckpoint{}': {
                'monitor': 'validation_loss',
                'best_model_score': torch.tensor(0.1),
                'best_model_path': '/a/b.ckpt',
            }
        },
        'optimizer_states': [optimizer.state_dict()],
        'hparams_name': 'kwargs',
        'hyper_parameters': {
            'num_cascades': 2,
            'lr': 3e-4,
            'args': argparse.Namespace(mask_type='equispaced', accelerations=[4]),
        },
    }


@pytest.mark.parametrize('net', ['unet', 'varnet'])
def test_weights_of_fastmri(fastmri, tmp_path, net):
    "Published state_dicts and Lightning checkpoints load without executing anything; the network is the same one"
    ours, theirs = (
        varnets(fastmri, chans=3, sens_pools=1) if net == 'varnet' else (None, fastmri.Unet(1, 1, 6, 3).eval())
    )
    k, mask, low = measured(1, 2, 40, 36, (5,))
    x = (k, mask, low) if net == 'varnet' else (randn(1, 1, 40, 48, dtype=torch.float32),)
    want = theirs(pairs(k), mask[..., None], low) if net == 'varnet' else theirs(*x)
    torch.save(theirs.state_dict(), tmp_path / f'knee_leaderboard_{net}_state_dict.pt')
    torch.save({k: v.half() if v.ndim > 1 else v for k, v in theirs.state_dict().items()}, tmp_path / 'half.pt')
    save_weights(theirs, tmp_path / 'resaved.pt')
    torch.save(lightning(net, theirs), tmp_path / 'epoch=49.ckpt')  # its optimizer has moved the weights of `theirs` on
    for name in (f'knee_leaderboard_{net}_state_dict.pt', 'resaved.pt', 'epoch=49.ckpt'):
        model = load_network(tmp_path / name)
        assert type(model) is {'unet': UNet, 'varnet': VarNet}[net] and not model.training, name
        if name.endswith('ckpt'):
            want = theirs(pairs(k), mask[..., None], low) if net == 'varnet' else theirs(*x)
        with torch.no_grad():
            close(name, model(*x), want.detach(), 1e-5)
    bad = torch.load(tmp_path / f'knee_leaderboard_{net}_state_dict.pt', weights_only=True)
    bad.popitem()
    torch.save(bad, tmp_path / 'part.pt')
    with pytest.raises(DataError, match='part.pt'):
        load_network(tmp_path / 'part.pt')


# scores and losses


def volumes(dtype=np.float32, shape=(4, 60, 60), unit=1e-4, seed=0):
    "A target and something that resembles it, float [slices, rows, cols]"
    rng = np.random.default_rng(seed)
    gt = np.abs(
        np.fft.ifft2(
            rng.normal(size=shape) / (1 + np.add.outer(np.arange(shape[1]) ** 2, np.arange(shape[2]) ** 2)),
            norm='ortho',
        )
    )
    gt *= unit / gt.max()
    return gt.astype(dtype), np.abs(gt + 0.05 * unit * rng.normal(size=shape)).astype(dtype)


def test_scores(fastmri):
    "Double precision: 1e-10 of the value. Single: 1e-5, most of it from fastMRI's NMSE, summed in single precision"
    for unit, shape in itertools.product(
        (1e-4, 1.0, 3e3), ((4, 60, 60), (1, 320, 320), (3, 7, 7), (2, 70, 41), (2, 33, 90))
    ):
        for dtype, share in ((np.float64, 1e-10), (np.float32, 1e-5)):
            gt, pred = volumes(dtype, shape, unit)
            for maxval in (None, 1.3 * unit):
                ours = metrics.volume_scores(gt, pred, maxval)
                for name, f in (
                    ('nmse', lambda g, p, m: fastmri.nmse(g, p)),
                    ('psnr', fastmri.psnr),
                    ('ssim', fastmri.ssim),
                ):
                    theirs, case = (
                        float(np.squeeze(f(gt, pred, maxval))),
                        f'{name} {shape} {dtype.__name__}, unit {unit}, range {maxval}',
                    )
                    assert abs(ours[name] / theirs - 1) < share, (case, ours[name], theirs)
                    assert abs(getattr(metrics, name)(gt, pred, maxval) / theirs - 1) < share, case


def test_evaluate_of_files(fastmri, tmp_path):
    "What fastMRI's evaluate.py says about the files that `write_prediction` leaves, and what `evaluate` says"
    for name in ('file1000001.h5', 'file_brain_AXT2_200_2000019.h5', 'file_brain_AXFLAIR_203_2030001.h5'):
        write(tmp_path / 'target', name, MULTI[name])
    images, dl = (
        {},
        ReconDL(
            SliceDataset(index_volumes(tmp_path / 'target', cache=False), mask_func('equispaced', 0.08, 4)),
            bs=2,
            device='cpu',
        ),
    )
    scores = evaluate(None, dl, images, each=partial(write_prediction, tmp_path / 'predictions'))
    args = SimpleNamespace(
        target_path=tmp_path / 'target', predictions_path=tmp_path / 'predictions', acquisition=None, acceleration=None
    )
    theirs, sizes = fastmri.evaluate(args, 'reconstruction_rss'), {tuple(i.shape[1:]) for i in images.values()}
    assert len(scores) == 3 and (48, 40) in sizes, sizes
    for name in ('nmse', 'psnr', 'ssim'):
        assert abs(scores[name].mean() / float(np.squeeze(theirs.means()[name.upper()])) - 1) < 1e-5, name
        assert abs(scores[name].std(ddof=1) / float(np.squeeze(theirs.stddevs()[name.upper()])) - 1) < 1e-4, name


def test_ssim_loss(fastmri):
    "Value and gradient of fastMRI's SSIMLoss, in double precision to 1e-10, in single to 1e-5"
    for dtype, share in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        for shape in ((3, 40, 40), (2, 33, 64), (1, 7, 9)):
            gt, x = (torch.tensor(v, dtype=dtype) for v in volumes(np.float64, shape, 1.0))
            top, case = gt.amax((1, 2)) * torch.linspace(1, 2, len(gt), dtype=dtype), f'{shape} {dtype}'
            loss, values, gradients = fastmri.SSIMLoss(), [], []
            loss.w = (
                torch.ones(1, 1, 7, 7, dtype=dtype) / 49
            )  # `loss.double()` would keep what single precision makes of 1/49
            for f in (
                lambda p: 1 - metrics.ssim_slices(p, gt, top).mean(),
                lambda p: loss(p[:, None], gt[:, None], top),
            ):
                p = x.clone().requires_grad_()
                values.append(f(p))
                values[-1].backward()
                values[-1] = values[-1].detach()
                gradients.append(p.grad)
            close(f'SSIM loss {case}', *values, share, top=1)
            close(f'its gradient {case}', *gradients, 10 * share)
            close(
                f'its map {case}',
                metrics.ssim_map(x, gt, top),
                1 - loss(x[:, None], gt[:, None], top, reduced=False)[:, 0],
                10 * share,
            )


def test_ssim_of_scikit_image():
    "Slice by slice, whole map included"
    from skimage.metrics import structural_similarity

    gt, pred = volumes(np.float64, (3, 45, 38), 1.0)
    ours = metrics.ssim_map(torch.tensor(pred), torch.tensor(gt), 1.2)
    for i in range(3):
        mean, whole = structural_similarity(gt[i], pred[i], data_range=1.2, full=True)
        close(f'mean {i}', metrics.ssim(gt[i], pred[i], 1.2), mean, 1e-12)
        close(f'map {i}', ours[i], torch.tensor(whole[3:-3, 3:-3]), 1e-11)


def test_target_of_simulated_files(fastmri, folders):
    "The RSS that is written is the one that fastMRI's functions make of the k-space"
    for path in sorted(folders['multicoil'].iterdir()):
        with h5py.File(path) as f:
            k, target = f['kspace'][()], f['reconstruction_rss'][()]
        image = fastmri.complex_center_crop(fastmri.ifft2c(fastmri.to_tensor(k)), target.shape[1:])
        close(path.name, torch.tensor(target), fastmri.rss_complex(image, 1))
        close(f'{path.name} again', rss_target(k, target.shape[1:]), torch.tensor(target))
