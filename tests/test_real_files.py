"""The data set as it is: folders as fastMRI ships them, known oddities, unusable files, a cache that is never stale."""

import json
import multiprocessing
import os
import shutil
import stat
import time
import warnings
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from mri_unlearn.data import volumes
from mri_unlearn.data.files import read_item, read_mask, read_slice, read_target
from mri_unlearn.data.meta import read_header
from mri_unlearn.data.header import Header
from mri_unlearn.data.volumes import index_volumes
from mri_unlearn.data.writing import write_volume
from mri_unlearn.machinery.disk import DataError

XSI = b'xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" xmlns='


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    "The cache of the index, in a folder of this test"
    monkeypatch.setenv('MRI_UNLEARN_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


@pytest.fixture
def opened(monkeypatch):
    "The names of the files that the index opens"
    names, scan = [], volumes._scan

    def noting(path):
        names.append(Path(path).name)
        return scan(path)

    monkeypatch.setattr(volumes, '_scan', noting)
    return names


def volume(path, shape=(2, 4, 32, 20), recon=(16, 16), acquisition='AXT2', patient='p1', seed=0, header=None, **kw):
    "A small file of fastMRI's form with noise as k-space, written an hour ago"
    rng = np.random.default_rng(seed)
    k = (rng.normal(size=shape) + 1j * rng.normal(size=shape)) * 1e-5
    header = header or Header(encoded=(*shape[-2:], 1), recon=(*recon, 1), field_T=1.5, model='Aera', slice_maximum=31)
    path = write_volume(path, k, header=header, acquisition=acquisition, patient_id=patient, **kw)
    with h5py.File(path, 'r+') as f:
        del f.attrs['simulated']  # which real files do not have
    return age(path)


def age(path, seconds=3600):
    "Make a file look older: as if it had been written some time ago"
    s = path.stat()
    os.utime(path, ns=(s.st_atime_ns, s.st_mtime_ns - seconds * 10**9))
    return path


def settle():
    "The time of the entry itself cannot be set; after this, what was written is old enough for the cache"
    time.sleep(0.15)


def change(path, **attrs):
    "Edit attributes in place, or datasets where the value is a function of the file"
    with h5py.File(path, 'r+') as f:
        for k, v in attrs.items():
            if callable(v):
                v(f)
            elif v is None:
                del f.attrs[k]
            else:
                f.attrs[k] = v
    return path


def rename_patient(path, old, new):
    "Change some bytes in place, so that the size stays"
    content = path.read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    path.write_bytes(content.replace(old, new))


def with_xml(edit):
    "Change the text of the header"

    def do(f):
        xml = edit(f['ismrmrd_header'][()])
        del f['ismrmrd_header']
        f['ismrmrd_header'] = xml

    return do


def with_mask(mask):
    def do(f):
        if 'mask' in f:
            del f['mask']
        f['mask'] = mask

    return do


def quietly(*args, **kwargs):
    "The index, and the warnings"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        return index_volumes(*args, **kwargs), [str(w.message) for w in caught]


def same(a, b):
    pd.testing.assert_frame_equal(a, b, check_exact=True)


def only(path, **kwargs):
    return index_volumes(path, cache=False, strict=True, **kwargs).iloc[0]


# Folders


@pytest.fixture
def shipped(tmp_path):
    "fastMRI's folders for brain and knee, with their extremes"
    brain, knee = tmp_path / 'brain', tmp_path / 'knee'
    for i, (coils, H, W, recon) in enumerate(
        [(2, 32, 20, (16, 16)), (24, 40, 22, (20, 20)), (16, 30, 24, (15, 13)), (20, 32, 18, (32, 32))]
    ):
        name = f'file_brain_{"AXFLAIR_203" if i == 3 else "AXT2_200"}_{i:07d}.h5'
        volume(
            brain / ('multicoil_train' if i else 'multicoil_val') / name,
            (2, coils, H, W),
            recon,
            'AXFLAIR' if i == 3 else 'AXT2',
            f'b{i}',
        )
    volume(
        brain / 'multicoil_test' / 'file_brain_AXT1_206_1000001.h5',
        patient='b8',
        acquisition='AXT1',
        target=False,
        mask=np.arange(20) % 2 == 0,
    )
    volume(
        brain / 'multicoil_challenge' / 'file_brain_AXT1POST_201_1000002.h5',
        patient='b9',
        acquisition='AXT1POST',
        target=False,
        mask=np.arange(20) % 3 == 0,
    )
    volume(
        knee / 'multicoil_train' / 'file1000001.h5', (3, 15, 32, 20), acquisition='CORPDFS_FBK', patient='patient k1'
    )
    volume(knee / 'multicoil_val' / 'file1000002.h5', (4, 15, 32, 19), acquisition='CORPD_FBK', patient='k2')
    volume(knee / 'singlecoil_train' / 'file1000001.h5', (3, 32, 20), acquisition='CORPDFS_FBK', patient='patient k1')
    volume(
        knee / 'multicoil_test' / 'file1000003.h5',
        (3, 15, 32, 20),
        acquisition='CORPD_FBK',
        patient='k3',
        target=False,
        mask=np.arange(20) % 4 == 0,
    )
    return tmp_path


def test_folders_as_fastmri_ships_them(shipped):
    index, said = quietly([shipped / 'knee', shipped / 'brain'])
    assert not said and not index.attrs['skipped'] and len(index) == 10
    assert index.path.tolist() == sorted(index.path)
    assert set(index.folder) == {f'multicoil_{s}' for s in ('train', 'val', 'test', 'challenge')} | {'singlecoil_train'}
    assert index.organ.value_counts().to_dict() == {'brain': 6, 'knee': 4}
    assert set(index.coils) == {1, 2, 4, 15, 16, 20, 24}
    tests = index.folder.isin(['multicoil_test', 'multicoil_challenge'])
    assert (
        (index.has_target != tests).all() and (index.has_mask == tests).all() and (index['max'].isna() == tests).all()
    )
    assert set(index.source) == {'measured'} and not index.simulated.any()
    same(quietly(shipped)[0], index)  # one root that holds both
    same(quietly([shipped, shipped / 'brain'])[0], index)  # none twice
    assert (
        index.dtypes.astype(str).to_dict().items()
        >= {
            'slices': 'int64',
            'padding_left': 'int64',
            'max': 'float64',
            'has_mask': 'bool',
            'has_target': 'bool',
        }.items()
    )


def test_what_the_index_says_is_what_is_read(shipped):
    for row in index_volumes(shipped).itertuples():
        item = read_item(row.path, row.slices - 1)
        assert item.kspace.shape == (row.coils, row.rows, row.cols) and item.kspace.dtype == torch.complex64
        assert torch.equal(item.kspace, read_slice(row.path, row.slices - 1))
        assert (item.target is None) != row.has_target and (item.mask is None) != row.has_mask
        if row.has_target:
            assert item.target.shape == (row.recon_rows, row.recon_cols) and item.target.dtype == torch.float32
            assert torch.equal(item.target, read_target(row.path, row.slices - 1)) and read_target(
                row.path
            ).max() == pytest.approx(row.max)
        if row.has_mask:
            assert item.mask.shape == (row.cols,) and item.mask.dtype == torch.bool and 0 < item.mask.sum() < row.cols


# Oddities of single files


@pytest.mark.parametrize('asked', [(512, 512), (432, 432), (424, 424), (408, 408)])
@pytest.mark.parametrize('width', [276, 234, 213])
def test_flair_whose_image_is_wider_than_its_kspace(tmp_path, asked, width):
    header = Header(encoded=(512, width, 1), recon=(*asked, 1))
    path = tmp_path / 'file_brain_AXFLAIR_203_6000001.h5'
    volume(path, (1, 1, 512, width), header=header, acquisition='AXFLAIR')
    row = only(path)
    assert (row.recon_rows, row.recon_cols) == (width, width) == read_target(path).shape[1:]
    change(path, kspace=lambda f: f.pop('reconstruction_rss'))
    assert (only(path).recon_rows, only(path).recon_cols, only(path).has_target) == (width, width, False)
    change(
        path, kspace=lambda f: f.create_dataset('reconstruction_rss', data=np.ones((1, *asked), np.float32))
    )  # stored as large as asked for
    assert (only(path).recon_rows, only(path).recon_cols) == (width, width)


def test_target_decides_the_size_of_the_image(tmp_path):
    path = volume(tmp_path / 'a.h5', target=np.ones((2, 12, 10)))
    assert (only(path).recon_rows, only(path).recon_cols) == (12, 10)


def test_no_image_without_target_has_more_rows_than_its_kspace(tmp_path):
    row = only(volume(tmp_path / 'a.h5', header=Header(encoded=(32, 20, 1), recon=(40, 16, 1)), target=False))
    assert (row.recon_rows, row.recon_cols) == (32, 16)


@pytest.mark.parametrize('target', [(3, 16, 16), (2, 40, 16), (2, 10, 30)])
def test_target_that_cannot_be_met(tmp_path, target):
    path = volume(tmp_path / 'a.h5')
    change(
        path,
        t=lambda f: (
            f.pop('reconstruction_rss'),
            f.create_dataset('reconstruction_rss', data=np.ones(target, np.float32)),
        ),
    )
    with pytest.raises(DataError, match='a.h5.*(target|image of)'):
        only(path)


def test_padding_agrees_with_fastmri_where_the_header_fits(tmp_path):
    header = Header(encoded=(32, 20, 1), recon=(16, 16, 1), enc_center=8, enc_maximum=15)
    row = only(volume(tmp_path / 'a.h5', header=header))
    left = 20 // 2 - 8
    assert (row.padding_left, row.padding_right) == (left, left + 15 + 1) == header.padding


@pytest.mark.parametrize(
    'encoded, center, maximum, padding',
    [
        ((64, 40), 20, 39, (0, 20)),  # the header speaks of twice as much
        ((16, 10), 5, 9, (5, 15)),  # of half as much: the rest must be zeros at both sides
        ((32, 20), 300, 19, (0, 20)),  # of columns that are not there
        ((32, 20), 14, 19, (0, 16)),
    ],
)  # the middle is not where it should be
def test_array_is_right_where_header_and_array_disagree(tmp_path, encoded, center, maximum, padding):
    path = volume(tmp_path / 'a.h5')
    header = Header(encoded=(*encoded, 1), recon=(16, 16, 1), enc_center=center, enc_maximum=maximum, slice_maximum=63)
    change(path, h=with_xml(lambda xml: header.to_xml()))
    row = only(path)
    assert (row.slices, row.rows, row.cols, row.recon_rows) == (2, 32, 20, 16)
    assert (row.padding_left, row.padding_right) == padding


def test_attributes_in_any_type(tmp_path):
    path = volume(tmp_path / 'a.h5')
    row = only(path)
    for text in (np.bytes_, lambda s: s.encode(), lambda s: np.array([s], 'S40'), lambda s: [s], lambda s: f' {s} '):
        change(path, acquisition=text('AXT2'), patient_id=text('p1'))
        pd.testing.assert_series_equal(only(path), row)
    change(path, max=np.float32(2.5), patient_id=12)
    assert (only(path)['max'], only(path).patient_id) == (2.5, '12')
    change(path, max=None, acquisition=None)
    assert np.isnan(only(path)['max']) and only(path).acquisition == 'unknown' and only(path).has_target


def test_patient_from_the_header_or_not_at_all(tmp_path):
    path = volume(tmp_path / 'a.h5')
    change(path, patient_id=None)
    with pytest.raises(DataError, match='whose it is'):
        only(path)
    change(path, h=with_xml(lambda xml: replace(Header.from_xml(xml), patient_id='p9').to_xml()))
    assert only(path).patient_id == 'p9'


@pytest.mark.parametrize('dtype', [bool, np.uint8, np.int32, np.int64, np.float32, np.float64])
def test_mask_of_any_type(tmp_path, dtype):
    path, mask = volume(tmp_path / 'a.h5', target=False), np.arange(20) % 3 == 1
    assert read_mask(path) is None and not only(path).has_mask
    for shape in ((20,), (1, 20)):
        change(path, m=with_mask(mask.astype(dtype).reshape(shape)))
        assert only(path).has_mask and read_item(path, 1).mask.tolist() == read_mask(path).tolist() == mask.tolist()


@pytest.mark.parametrize(
    'mask, reason',
    [
        (np.ones((2, 16, 16)), 'the shape'),  # an outlined organ, say: nobody may take it for none
        (np.ones(19), 'expected 20 columns'),
        (np.zeros(20), 'keeps no column'),
        (np.full(20, np.nan), 'no finite numbers'),
        (np.linspace(0, 1, 20), '20 kinds of numbers'),
        (np.indices((32, 20)).sum(0) % 2, 'single points'),
    ],
)
def test_mask_that_is_not_understood(tmp_path, mask, reason):
    path = change(volume(tmp_path / 'a.h5'), m=with_mask(mask))
    for f in (only, read_mask, lambda p: read_item(p, 0)):
        with pytest.raises(DataError, match=reason):
            f(path)


def test_mask_of_each_slice(tmp_path):
    path, masks = volume(tmp_path / 'a.h5', target=False), np.stack([np.arange(20) % 3 == i for i in range(2)])
    change(path, m=with_mask(masks))
    assert only(path).has_mask
    assert [read_item(path, i).mask.tolist() for i in range(2)] == masks.tolist()


@pytest.mark.parametrize(
    'edit',
    [
        lambda xml: xml.decode(),
        lambda xml: b'  ' + xml.replace(b'<?xml version="1.0" encoding="UTF-8"?>\n', b''),
        lambda xml: xml.replace(b'xmlns=', XSI),
        lambda xml: xml.replace(b'Aera', b'<!-- not <systemModel>Skyra</systemModel> -->Aera'),
        lambda xml: xml.replace(b'Aera', b'A<![CDATA[era]]>'),
        lambda xml: xml.replace(b'Aera', b'<!-- </nothing> -->Aera'),
        lambda xml: xml.replace(b'<systemModel>', b'<systemModel a="b">'),
        lambda xml: xml.replace(b'<systemModel>', b'<systemModel >'),
        lambda xml: (
            xml.replace(b'</', b'</m:')
            .replace(b'<', b'<m:')
            .replace(b'<m:/m:', b'</m:')
            .replace(b'<m:?', b'<?')
            .replace(b'xmlns', b'xmlns:m')
        ),
    ],
)
def test_header_written_by_others(tmp_path, edit):
    path = volume(tmp_path / 'a.h5')
    row, header = only(path), read_header(path)
    change(path, h=with_xml(edit))
    pd.testing.assert_series_equal(only(path), row)
    assert read_header(path) == header and row.site == 'Aera'


def test_source_of_simulated_files(tmp_path):
    header = Header(encoded=(32, 20, 1), recon=(16, 16, 1), simulated=True)
    for source in ('', 'an atlas', 'T1 <of> "Müller & Co"'):
        told = source or 'anatomy'
        h = replace(header, source=source)
        assert Header.from_xml(h.to_xml()) == h
        row = only(volume(tmp_path / 'a.h5', header=h))
        assert (row.simulated, row.source) == (True, told)
    assert only(volume(tmp_path / 'a.h5', header=replace(header, simulated=False))).source == 'measured'


@pytest.mark.parametrize(
    'name, acquisition, body_part, organ, found',
    [
        ('file_brain_AXT2_200_1.h5', 'CORPD_FBK', 'KNEE', 'heart', 'knee'),
        ('file1000001.h5', 'AXT2', '', 'heart', 'heart'),
        ('file1000001.h5', 'AXT2', '', None, 'unknown'),
        ('a.h5', 'AXT1PRE', 'KNEE', None, 'knee'),
        ('file_prostate_AXT2_001.h5', 'AXT2', 'PROSTATE', None, 'prostate'),
        ('a.h5', 'AXT1PRE', '', None, 'brain'),
        ('a.h5', 'SE', ' PROSTATE', 'heart', 'prostate'),
        ('a.h5', 'SE', '', ' Heart ', 'heart'),
        ('a.h5', 'SE', '', None, 'unknown'),
    ],
)
def test_organ(tmp_path, name, acquisition, body_part, organ, found):
    header = Header(encoded=(32, 20, 1), recon=(16, 16, 1), body_part=body_part)
    path = volume(tmp_path / 'x' / name, header=header, acquisition=acquisition)
    for _ in range(2):
        assert index_volumes(path.parent, organ=organ).organ.tolist() == [found]  # the second time from the cache


# Files that cannot be used


def cut(path):
    path.write_bytes(path.read_bytes()[:3000])


def empty(path):
    path.write_bytes(b'')


def no_kspace(path):
    change(path, k=lambda f: f.pop('kspace'))


def no_header(path):
    change(path, k=lambda f: f.pop('ismrmrd_header'))


def broken_header(path):
    change(path, h=with_xml(lambda xml: xml[:-30]))


def nobody(path):
    change(path, patient_id=None)


def real_kspace(path):
    change(path, k=lambda f: (f.pop('kspace'), f.create_dataset('kspace', data=np.ones((2, 4, 32, 20)))))


def prediction(path):
    with h5py.File(path, 'w') as f:
        f['reconstruction'] = np.ones((2, 16, 16))


UNUSABLE = {
    cut: 'damaged or cut short',
    empty: 'cannot be read',
    no_kspace: "no dataset 'kspace'",
    no_header: "no dataset 'ismrmrd_header'",
    broken_header: 'header cannot be used',
    nobody: 'whose it is',
    real_kspace: 'must be complex',
    prediction: "no dataset 'kspace'",
}


def test_unusable_files_are_left_out_with_one_warning(shipped):
    bad = {}
    for i, (how, why) in enumerate(UNUSABLE.items()):
        path = volume(shipped / 'knee' / 'multicoil_train' / f'file1000{i:03d}9.h5', patient=f'x{i}')
        how(path)
        bad[str(path)] = why
    for _ in range(2):  # a failure is not kept: it is said again
        index, said = quietly(shipped)
        assert len(index) == 10 and len(said) == 1 and '8 of 18 files were left out' in said[0]
        assert [p for p, _ in index.attrs['skipped']] == sorted(bad)
        for path, reason in index.attrs['skipped']:
            assert path in reason and bad[path] in reason and reason in said[0]
    with pytest.raises(DataError) as e:
        index_volumes(shipped, strict=True)
    assert sorted(bad)[0] in str(e.value)


def test_a_repaired_file_is_back_at_once(tmp_path):
    good = volume(tmp_path / 'data' / 'a.h5')
    path = volume(tmp_path / 'data' / 'b.h5', patient='p2')
    content = path.read_bytes()
    cut(path)
    assert len(quietly(good.parent)[0]) == 1
    path.write_bytes(content)
    index, said = quietly(good.parent)
    assert (len(index), said, index.attrs['skipped']) == (2, [], [])


def test_no_file_that_can_be_used(tmp_path):
    for name in 'ab':
        empty(volume(tmp_path / 'data' / f'{name}.h5'))
    for strict in (False, True):
        with pytest.raises(DataError, match='a.h5'):
            index_volumes(tmp_path / 'data', strict=strict)


def test_a_missing_one_of_two_roots(shipped):
    with pytest.raises(DataError, match='nowhere: no such folder'):
        index_volumes([shipped, shipped / 'nowhere'])


def test_a_folder_that_cannot_be_read(shipped, monkeypatch):
    scandir = os.scandir

    def refusing(path):
        if 'multicoil_val' in str(path):
            raise PermissionError(13, 'Permission denied')
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refusing)  # permissions would not stop an administrator
    index, said = quietly(shipped)
    assert len(index) == 8 and len(said) == 1 and '2 more things' in said[0] and 'multicoil_val' in said[0]
    assert [Path(p).name for p, _ in index.attrs['skipped']] == ['multicoil_val'] * 2
    with pytest.raises(DataError, match='multicoil_val'):
        index_volumes(shipped, strict=True)


@pytest.mark.skipif(os.name != 'posix', reason='needs links')
def test_links_and_shadows(shipped):
    links = shipped / 'links'
    links.mkdir()
    (links / 'brain').symlink_to(shipped / 'brain')
    (links / 'back').symlink_to(links)
    (links / 'twice.h5').symlink_to(shipped / 'brain' / 'multicoil_val' / 'file_brain_AXT2_200_0000000.h5')
    (links / 'gone.h5').symlink_to(shipped / 'nowhere')
    (links / '.hidden').mkdir()
    for name in ('._a.h5', '.a.part1.h5', '.hidden/a.h5'):
        (links / name).write_bytes(b'no data')
    index, said = quietly(links)
    assert len(index) == 6 and set(index.folder) == {f'multicoil_{s}' for s in ('train', 'val', 'test', 'challenge')}
    assert [Path(p).name for p, _ in index.attrs['skipped']] == ['gone.h5'] and '1 of 7 files' in said[0]


# The cache


@pytest.fixture
def kept(shipped, opened):
    "A folder whose index is in the cache, and what was opened since then"
    settle()
    index_volumes(shipped / 'knee')
    assert len(opened) == 4
    opened.clear()
    return shipped / 'knee'


def agrees(root, **kwargs):
    "The index equals the one that a look at all files gives"
    index, _ = quietly(root, **kwargs)
    same(index, quietly(root, cache=False, **kwargs)[0])
    return index


def test_nothing_is_opened_again(kept, opened):
    index = index_volumes(kept)
    assert opened == []
    same(index, index_volumes(kept, cache=False))
    assert len(opened) == 4 and np.isnan(index['max']).any()


def test_same_size_other_time(kept, opened):
    path = kept / 'multicoil_train' / 'file1000001.h5'
    size = path.stat().st_size
    rename_patient(path, b'patient k1', b'patient k7')
    assert path.stat().st_size == size
    assert 'patient k7' in agrees(kept).patient_id.tolist() and opened[0] == path.name


def test_same_time_other_size(kept, opened):
    path = kept / 'multicoil_train' / 'file1000001.h5'
    before = path.stat()
    volume(path, (5, 15, 32, 20), patient='k1', acquisition='CORPD_FBK')
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_size != before.st_size
    assert 5 in agrees(kept).slices.tolist()


@pytest.mark.skipif(os.name != 'posix', reason='the other time stamp says something else there')
def test_same_time_same_size(kept):
    path = kept / 'multicoil_train' / 'file1000001.h5'
    before = path.stat()
    rename_patient(path, b'patient k1', b'patient k7')
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_mtime_ns, path.stat().st_size) == (before.st_mtime_ns, before.st_size)
    assert 'patient k7' in agrees(kept).patient_id.tolist()


def test_files_that_come_and_go(kept, opened):
    (kept / 'multicoil_train' / 'file1000001.h5').unlink()
    assert len(index_volumes(kept)) == 3 and opened == []
    volume(kept / 'more' / 'file1000000.h5', patient='k0')
    settle()
    assert len(index_volumes(kept)) == 4 and opened == ['file1000000.h5']
    (kept / 'more').rename(kept / 'other')
    assert set(agrees(kept).folder) >= {'other'}
    text = next((kept.parent / 'cache').glob('*.json')).read_text()
    assert 'k0' in text and 'more' not in text and 'multicoil_train' not in text  # what is gone is not remembered


def test_nothing_is_kept_of_a_file_that_has_not_settled(tmp_path, opened, monkeypatch):
    path = volume(tmp_path / 'data' / 'a.h5')
    monkeypatch.setattr(time, 'time_ns', lambda: path.stat().st_ctime_ns + 10_000_000)
    for _ in range(2):
        index_volumes(path.parent)
    assert opened == ['a.h5'] * 2
    monkeypatch.setattr(time, 'time_ns', lambda: path.stat().st_ctime_ns + 10_000_000_000)
    for _ in range(2):
        index_volumes(path.parent)
    assert opened == ['a.h5'] * 3


def test_organ_is_not_kept(tmp_path, opened):
    for name in 'ab':
        volume(tmp_path / 'data' / f'{name}.h5', acquisition='SE', patient=name)
    settle()
    for organ in ('heart', None, 'Liver', 'heart'):
        assert set(agrees(tmp_path / 'data', organ=organ).organ) == {(organ or 'unknown').lower()}
    assert len(opened) == 2 + 4 * 2  # once for the cache, and for each comparison


@pytest.mark.parametrize(
    'damage',
    [
        lambda b: b[: len(b) // 2],
        lambda b: b'',
        lambda b: b'\x80\x04K\x01.',
        lambda b: b.split(b'\n')[0] + b'\n{}',
        lambda b: b.replace(b'patient k1', b'patient k9'),
        lambda b: b.replace(b', 15, ', b', 16, '),
        lambda b: b.split(b'\n')[1],
        lambda b: b'older' + b,
    ],
)
def test_damaged_cache_is_made_again(kept, opened, cache, damage):
    [file] = cache.glob('*.json')
    good = file.read_bytes()
    assert damage(good) != good
    file.write_bytes(damage(good))
    same(index_volumes(kept), index_volumes(kept, cache=False))
    opened.clear()
    index_volumes(kept)
    assert opened == [] and file.read_bytes() == good


def test_cache_of_another_version_is_not_read(kept, opened, monkeypatch):
    volumes._code_key.cache_clear()
    monkeypatch.setattr(volumes.mri_unlearn, '__version__', '99')
    try:
        agrees(kept)
    finally:
        volumes._code_key.cache_clear()
    assert len(opened) == 8


def test_cache_is_text_for_its_owner(kept, cache):
    [file] = cache.iterdir()
    first, root, rows = file.read_text().split('\n', 2)
    assert json.loads(root) == str(kept) and isinstance(json.loads(rows), list)
    if os.name == 'posix':
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not [p for p in kept.rglob('*') if p.is_file() and p.suffix != '.h5']  # and nothing beside the data


def test_cache_can_be_switched_off(shipped, cache):
    settle()
    index_volumes(shipped, cache=False)
    assert not cache.exists()


def test_cache_that_cannot_be_written(shipped, cache):
    settle()
    cache.write_text('a file where a folder should be')
    for _ in range(2):
        assert len(agrees(shipped)) == 10
    assert cache.read_text() == 'a file where a folder should be'


def test_no_home(shipped, monkeypatch):
    def nowhere():
        raise RuntimeError('Could not determine home directory.')

    for name in ('MRI_UNLEARN_CACHE', 'XDG_CACHE_HOME', 'LOCALAPPDATA'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, 'home', nowhere)
    assert len(index_volumes(shipped)) == 10


def test_another_place_under_the_same_name(kept, opened):
    "A folder moved away, another one put in its place: nothing of the first one is used"
    kept.rename(kept.parent / 'old')
    shutil.copytree(kept.parent / 'old', kept)  # copies the times of the files, too
    for path in kept.rglob('*.h5'):
        change(path, patient_id='new')
    assert set(agrees(kept).patient_id) == {'new'}


def index_often(root, n, out):
    for _ in range(n):
        out.put(len(index_volumes(root)))


def test_several_processes_at_once(shipped, cache):
    settle()
    context = multiprocessing.get_context('spawn')
    out = context.Queue()
    other = context.Process(target=index_often, args=(shipped, 20, out))
    other.start()
    found = [out.get(timeout=60)]
    while other.is_alive() and len(found) < 20:
        for file in cache.glob('index-*.json'):
            file.write_bytes(b'rubbish')  # at any moment
        assert len(index_volumes(shipped)) == 10
        while not out.empty():
            found.append(out.get())
    while len(found) < 20:
        found.append(out.get(timeout=60))
    other.join(60)
    assert (found, other.exitcode) == ([10] * 20, 0)
    agrees(shipped)
    assert not [p for p in cache.iterdir() if p.name.startswith('.')]


def test_bar_only_when_it_takes_long(shipped, capsys, monkeypatch):
    for progress, shown in ((None, False), (False, False), (True, True)):
        index_volumes(shipped, cache=False, progress=progress)
        said = capsys.readouterr()
        assert said.out == '' and ('index' in said.err) == shown, (progress, said.err)
    scan = volumes._scan
    monkeypatch.setattr(volumes, '_scan', lambda p: (time.sleep(0.25), scan(p))[1])
    index_volumes(shipped, cache=False)
    assert 'index' in capsys.readouterr().err
