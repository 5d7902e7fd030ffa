"""Folders of images as people have them: damaged, mixed, incomplete; and what must not depend on any of that."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

from mri_unlearn.phantom import image_sets as module
from mri_unlearn.phantom.image_files import find_images
from mri_unlearn.phantom.image_pixels import read_image
from mri_unlearn.phantom.images import image_kspace
from mri_unlearn.phantom.image_sets import simulate_from_images
from mri_unlearn.machinery.disk import DataError
from mri_unlearn.data.volumes import index_volumes
from mri_unlearn.data.files import read_slice, read_target
from mri_unlearn.data.meta import read_header
from mri_unlearn.data.writing import rss_target

MM = (5.0, 2.0, 2.0)  # slice, row, column


def head(seed=0, shape=(6, 64, 56)):
    "Something like a head, different in every direction and for every seed: int16 [slices, rows, cols]"
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing='ij')
    body = (x / 0.7) ** 2 + (y / 0.85) ** 2 < 1
    wave = 600 + 150 * np.sin(5 * x + seed) + 150 * np.cos(9 * y + 2 * z) + 80 * (x > 0.2) * (y < -0.1)
    return (body * wave + rng.random(shape) * 20).astype('int16')


def write_nifti(path, image, mm=MM, order=(2, 1, 0), flip=(-1, -1, 1), dtype='int16'):
    "The upright axial volume `image` in any order and direction of the axes of the file"
    path.parent.mkdir(parents=True, exist_ok=True)
    ras, step = image[:, ::-1, ::-1].transpose(2, 1, 0), mm[::-1]
    affine = np.eye(4) * 0
    for j, (t, f) in enumerate(zip(order, flip)):
        affine[t, j] = f * step[t]
    affine[3, 3] = 1
    nib.save(
        nib.Nifti1Image(ras.transpose(order)[tuple(slice(None, None, f) for f in flip)].astype(dtype), affine), path
    )


def write_dicom(folder, image, series='1.2.3', numbers=None, skip=(), **tags):
    "An upright axial series; the files are named by their instance number"
    folder.mkdir(parents=True, exist_ok=True)
    numbers = range(1, len(image) + 1) if numbers is None else numbers
    for i, (plane, number) in enumerate(zip(image, numbers)):
        if i in skip:
            continue
        ds = pydicom.Dataset()
        ds.file_meta = pydicom.dataset.FileMetaDataset()
        ds.file_meta.TransferSyntaxUID, ds.file_meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, MRImageStorage
        ds.SOPClassUID, ds.SOPInstanceUID, ds.SeriesInstanceUID, ds.Modality = (
            MRImageStorage,
            f'{series}.{i + 1}',
            series,
            'MR',
        )
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        ds.PatientID, ds.SeriesDescription, ds.ImageType, ds.InstanceNumber = (
            'P1',
            't2_tse',
            ['ORIGINAL', 'PRIMARY', 'M'],
            number,
        )
        ds.ImageOrientationPatient, ds.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [-56, -64, MM[0] * i - 17.5]
        ds.PixelSpacing, ds.SliceThickness, ds.MagneticFieldStrength, ds.BodyPartExamined = list(MM[1:]), 4, 1.5, 'HEAD'
        ds.Rows, ds.Columns = plane.shape
        (
            ds.SamplesPerPixel,
            ds.PhotometricInterpretation,
            ds.BitsAllocated,
            ds.BitsStored,
            ds.HighBit,
            ds.PixelRepresentation,
        ) = 1, 'MONOCHROME2', 16, 12, 11, 0
        ds.PixelData = plane.astype('<u2').tobytes()
        for k, v in tags.items():
            setattr(ds, k, v)
        ds.save_as(folder / f'{series}_{number}.dcm', enforce_file_format=True)


def make(source, out, **kw):
    return simulate_from_images(
        source, out, **{'recon': 32, 'slices': 2, 'organ': 'brain', 'workers': 1, 'progress': False, **kw}
    )


def content(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob('*') if p.is_file()}


@pytest.fixture(scope='module')
def bids(tmp_path_factory):
    "Five people, two of them with two contrasts"
    root = tmp_path_factory.mktemp('bids')
    for i in range(5):
        for c in ('T1w', 'T2w')[: 1 + (i < 2)]:
            write_nifti(root / f'sub-{i:02d}' / 'anat' / f'sub-{i:02d}_{c}.nii.gz', head(10 * i + len(c)))
    return root


@pytest.fixture(scope='module')
def whole(bids, tmp_path_factory):
    out = tmp_path_factory.mktemp('whole') / 'data'
    make(bids, out)
    return out


# ---- damaged and unusual files


def test_damaged_files_are_named_and_the_rest_is_used(bids, tmp_path):
    root = tmp_path / 'images'
    write_nifti(root / 'p1' / 'good_T2.nii.gz', head())
    (root / 'p2').mkdir()
    (root / 'p2' / 'letter.nii').write_text('Dear colleague, ' * 50)
    packed = (root / 'p1' / 'good_T2.nii.gz').read_bytes()
    (root / 'p2' / 'cut_T2.nii.gz').write_bytes(packed[: len(packed) // 2])  # header fine, pixels missing
    (root / 'p2' / 'empty.nii.gz').write_bytes(gzip.compress(b''))
    (root / 'p2' / 'noise.dcm').write_bytes(b'no dicom at all')
    np.save(root / 'p2' / 'words.npy', np.array(['a', 'b']))
    (root / 'p2' / 'pickle.npy').write_bytes(b'\x93NUMPY nothing')
    with pytest.warns(UserWarning) as caught:
        index = make(root, tmp_path / 'out', val_fraction=0)
    said = ' '.join(str(w.message) for w in caught)
    for name in ('letter.nii', 'cut_T2.nii.gz', 'empty.nii.gz', 'noise.dcm', 'words.npy'):
        assert name in said
    assert str(tmp_path) not in said and len(index) == 1
    record = json.loads((tmp_path / 'out' / 'simulation.json').read_text())
    assert len(record['skipped']) == 6 and str(tmp_path) not in json.dumps(record)
    with pytest.raises(DataError, match='cannot be read as'):
        make(root, tmp_path / 'strict', strict=True)
    for p in ('letter.nii', 'empty.nii.gz', 'noise.dcm', 'words.npy', 'pickle.npy'):
        (root / 'p2' / p).unlink()
    with pytest.raises(DataError, match=r'cut_T2\.nii\.gz: cannot be read .*copy it again'):
        make(root, tmp_path / 'strict', strict=True)


def test_a_damaged_image_that_was_mended_is_taken_up(tmp_path):
    root = tmp_path / 'images'
    for i in range(2):
        write_nifti(root / f'p{i}' / 'T2.nii.gz', head(i))
    good = (root / 'p1' / 'T2.nii.gz').read_bytes()
    (root / 'p1' / 'T2.nii.gz').write_bytes(good[:-2000])
    with pytest.warns(UserWarning, match='p1/T2.nii.gz'):
        assert len(make(root, tmp_path / 'out')) == 1
    (root / 'p1' / 'T2.nii.gz').write_bytes(good)
    assert len(make(root, tmp_path / 'out')) == 2
    make(root, tmp_path / 'fresh')
    assert content(tmp_path / 'out') == content(tmp_path / 'fresh')


@pytest.mark.parametrize(
    'bad, says',
    [
        (np.full((4, 8, 8), 3.0), 'no image in it'),
        (np.where(head() > 500, np.nan, 1.0), 'not finite'),
        (head() * 1.0 - 300, 'negative values'),
        (head()[0], 'expected 3 axes'),
        (np.zeros((0, 8, 8)), 'expected 3 axes'),
        (np.zeros((2, 2, 2, 2, 2)), 'expected 3 axes'),
    ],
)
def test_arrays_that_are_no_image(tmp_path, bad, says):
    np.save(tmp_path / 'x.npy', bad)
    with pytest.raises(DataError, match=says) as e:
        read_image(tmp_path / 'x.npy')
    assert 'x.npy' in str(e.value)


def test_spacing_of_an_array_and_a_bad_json(tmp_path):
    np.save(tmp_path / 'x.npy', head())
    assert read_image(tmp_path / 'x.npy').spacing == (1.0, 1.0, 1.0)
    (tmp_path / 'x.json').write_text('{"spacing_mm": [5, 2, 1.5]}')
    assert read_image(tmp_path / 'x.npy').spacing == (5.0, 2.0, 1.5)
    for text, says in (
        ('{"spacing_mm": [5, 2]}', 'three positive numbers'),
        ('{"spacing_mm"', r'x\.json: cannot be read as JSON'),
    ):
        (tmp_path / 'x.json').write_text(text)
        with pytest.raises(DataError, match=says):
            read_image(tmp_path / 'x.npy')


def test_folders_without_images(tmp_path):
    with pytest.raises(DataError, match='no such folder'):
        find_images(tmp_path / 'nowhere')
    (tmp_path / 'notes.txt').write_text('nothing here')
    with pytest.raises(DataError, match='holds no image volume'):
        find_images(tmp_path)


def test_label_maps_are_left_out(tmp_path):
    write_nifti(tmp_path / 'imagesTr' / 'case_1.nii.gz', head())
    write_nifti(tmp_path / 'labelsTr' / 'case_1.nii.gz', head() > 300)
    write_nifti(tmp_path / 'imagesTr' / 'case_1_brainmask.nii.gz', head() > 300)
    with pytest.warns(UserWarning, match='2 files were left out'):
        found = find_images(tmp_path)
    assert [v.name for v in found] == ['imagesTr/case_1.nii.gz']


def test_a_fourth_axis_holds_volumes_of_one_patient(tmp_path):
    both = np.stack([head(1).T, head(2).T], -1)
    nib.save(nib.Nifti1Image(both, np.diag([*MM[::-1], 1])), tmp_path / 'p_dwi.nii.gz')
    two = find_images(tmp_path)
    assert [(v.name, v.patient) for v in two] == [('p_dwi.nii.gz#0', 'p_dwi'), ('p_dwi.nii.gz#1', 'p_dwi')]
    assert np.array_equal(read_image(two[1], plane='stored').pixels, head(2))


# ---- DICOM


def test_two_series_in_one_folder_and_random_numbers(tmp_path):
    a, b = head(1), head(2)
    write_dicom(tmp_path / 'mix', a, '1.2.3', numbers=[4, 2, 6, 1, 5, 3])
    write_dicom(tmp_path / 'mix', b, '1.2.4', numbers=[16, 15, 14, 13, 12, 11], SeriesDescription='t1_mprage')
    found = find_images(tmp_path, strict=True)
    assert [(v.name, v.contrast, v.patient) for v in found] == [('mix/1.2.3', 'T2', 'P1'), ('mix/1.2.4', 'T1', 'P1')]
    assert all(np.array_equal(read_image(v).pixels, x) for v, x in zip(found, (a, b)))
    index = make(tmp_path, tmp_path / 'out', val_fraction=0, organ=None)
    assert (
        set(index.organ) == {'brain'}
        and set(index.field_T) == {1.5}
        and set(index.site) == {'south'}
        and set(index.acquisition) == {'AXT1', 'AXT2'}
    )


def test_missing_and_foreign_slices(tmp_path):
    write_dicom(tmp_path / 'good', head(), '1.2.1')
    write_dicom(tmp_path / 'gap', head(), '1.2.2', skip=(2,))
    write_dicom(tmp_path / 'sizes', head(), '1.2.3')
    write_dicom(
        tmp_path / 'sizes',
        head(shape=(6, 64, 50))[5:],
        '1.2.3',
        numbers=[99],
        ImagePositionPatient=[-56, -64, 12.5],
        SOPInstanceUID='1.9',
    )
    write_dicom(tmp_path / 'uneven', head(), '1.2.5')
    write_dicom(tmp_path / 'uneven', head()[:1], '1.2.5', numbers=[77], SOPInstanceUID='1.8')
    with pytest.warns(UserWarning) as caught:
        found = find_images(tmp_path)
    said = str(caught[0].message)
    assert [v.name for v in found] == ['good/1.2.1']
    assert (
        'slices are missing, neighbours are 5.00 to 10.00 mm apart' in said
        and 'differ in size' in said
        and 'some places have 1 slices, others 2' in said
    )
    with pytest.raises(DataError, match='1.2.2'):
        find_images(tmp_path / 'gap')


def test_dicom_and_nifti_of_the_same_head_have_the_same_kspace(tmp_path):
    write_dicom(tmp_path / 'd', head(3), numbers=[3, 1, 2, 6, 5, 4])
    write_nifti(tmp_path / 'n' / 'a.nii', head(3), order=(0, 2, 1), flip=(1, -1, 1))
    d, n = (read_image(find_images(tmp_path / x)[0]) for x in 'dn')
    assert (d.spacing, d.plane) == (n.spacing, n.plane) == (MM, 'axial') and np.array_equal(d.pixels, n.pixels)
    assert (
        image_kspace(d.pixels, d.spacing, seed=1).kspace.tobytes()
        == image_kspace(n.pixels, n.spacing, seed=1).kspace.tobytes()
    )


# ---- the data set


def test_what_the_files_say(bids, whole):
    index = index_volumes(whole)
    assert (
        set(index.source) == {'images'}
        and index.simulated.all()
        and set(index.organ) == {'brain'}
        and set(index.acquisition) == {'AXT1', 'AXT2'}
    )
    assert not set(index.patient_id[index.folder == 'multicoil_train']) & set(
        index.patient_id[index.folder == 'multicoil_val']
    )
    assert (
        index.patient_id[index.folder == 'multicoil_val'].nunique() == 1
        and len(index) == 7
        and set(index.site) == {'north', 'south'}
    )
    record = json.loads((whole / 'simulation.json').read_text())
    assert {j['source'] for j in record['files']} == {p.relative_to(bids).as_posix() for p in bids.rglob('*.nii.gz')}
    assert {j['file'] for j in record['files']} == {f'{Path(p).parent.name}/{Path(p).name}' for p in index.path}
    for p in index.path[:2]:
        k = np.stack([read_slice(p, i) for i in range(2)])
        assert (
            read_header(p).source == 'images'
            and np.array_equal(rss_target(k, (32, 32)), read_target(p))
            and 1e-4 < read_target(p).max() < 2e-3
        )


def test_two_workers_write_the_same_bytes(bids, whole, tmp_path):
    make(bids, tmp_path / 'two', workers=2)
    assert content(tmp_path / 'two') == content(whole)


def test_killed_and_started_again(bids, whole, tmp_path):
    out = tmp_path / 'killed'
    code = (
        'import sys\nfrom mri_unlearn.phantom.image_sets import simulate_from_images as s\n'
        's(sys.argv[1], sys.argv[2], recon=32, slices=2, organ="brain", workers=1, progress=False)'
    )
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    command, give_up = [sys.executable, '-c', code, str(bids), str(out)], time.time() + 60
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)

    def finished():
        return [p for p in out.rglob('*.h5') if not p.name.startswith('.')]

    while len(finished()) < 2:
        assert process.poll() is None and time.time() < give_up, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = finished()
    stamps = {p: p.stat().st_mtime_ns for p in done}
    assert 2 <= len(done) < 7
    make(bids, out)
    assert content(out) == content(whole) and all(p.stat().st_mtime_ns == t for p, t in stamps.items())


def test_other_settings_or_images_are_refused(bids, whole, tmp_path):
    before = content(whole)
    for change in (dict(seed=1), dict(recon=40), dict(slices=3), dict(limit=2), dict(patient=r'sub-\d+')):
        with pytest.raises(DataError, match='other settings or images'):
            make(bids, whole, **change)
    (tmp_path / 'measured').mkdir()
    (tmp_path / 'measured' / 'file1000001.h5').write_bytes(b'precious')
    with pytest.raises(DataError, match='were not made here'):
        make(bids, tmp_path / 'measured')
    assert content(whole) == before


def test_one_patient_is_a_warning_and_a_rule_helps(tmp_path):
    for i in range(4):
        write_nifti(tmp_path / 'in' / 'imagesTr' / f'case_{i}.nii.gz', head(i))
    with pytest.warns(UserWarning, match='count as one patient'):
        make(tmp_path / 'in', tmp_path / 'one')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        index = make(tmp_path / 'in', tmp_path / 'four', patient=r'case_(\d+)')
    assert set(index.patient_id) == set('0123') and (index.folder == 'multicoil_val').sum() == 1


def test_other_organs_do_not_pretend(tmp_path):
    write_nifti(tmp_path / 'in' / 'T2.nii', head())
    names = {
        organ: make(tmp_path / 'in', tmp_path / str(organ), organ=organ, val_fraction=0).iloc[0]
        for organ in ('knee', 'prostate', None)
    }
    assert [(r.organ, r.acquisition) for r in names.values()] == [
        ('knee', 'AXT2'),
        ('prostate', 'T2'),
        ('unknown', 'T2'),
    ]
    assert names['knee'].fname == 'file1500001.h5' and names['prostate'].fname.startswith('image_T2_')


def test_too_little_disk_or_memory_is_said_before_work_begins(bids, tmp_path, monkeypatch):
    few = type('Usage', (), dict(free=10_000, available=10_000))
    with monkeypatch.context() as m:
        m.setattr(module.shutil, 'disk_usage', lambda p: few)
        with pytest.raises(DataError, match='GB are free'):
            make(bids, tmp_path / 'a')
    monkeypatch.setattr(module.psutil, 'virtual_memory', lambda: few)
    with pytest.raises(DataError, match='of memory in each of 1 processes'):
        make(bids, tmp_path / 'b')
    assert not list(tmp_path.rglob('*.h5'))


# ---- optional packages


def test_missing_packages_are_named_and_arrays_need_none(tmp_path, monkeypatch):
    write_nifti(tmp_path / 'nifti' / 'a.nii', head())
    write_dicom(tmp_path / 'dicom', head())
    (tmp_path / 'npy').mkdir()
    np.save(tmp_path / 'npy' / 'a_T2.npy', head())
    for name in ('nibabel', 'pydicom'):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails, as if it were not installed
    for folder, package in (('nifti', 'nibabel'), ('dicom', 'pydicom')):
        with pytest.raises(DataError, match=rf'{package}, which is not installed: pip install "mri_unlearn\[images\]"'):
            find_images(tmp_path / folder)
    assert len(make(tmp_path / 'npy', tmp_path / 'out', val_fraction=0)) == 1


def test_the_module_imports_neither_package():
    code = (
        'import sys; import mri_unlearn.phantom.image_sets; '
        'print([m for m in ("nibabel", "pydicom") if m in sys.modules])'
    )
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    assert (
        subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True).stdout.strip()
        == '[]'
    )
