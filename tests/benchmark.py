"""How fast are loading, indexing and scoring beside fastMRI 0.3, and does memory stay flat?

Run it: python tests/benchmark.py. Both sides do the same work on the same files, one after the other and again, in one
process; the table gives medians and ratios. Files are made in a temporary folder and read once before the clock
starts, so that they come from memory and not from a disk."""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch

from mri_unlearn.data.header import Header
from mri_unlearn.data.loaders import ReconDL
from mri_unlearn.data.pack import pack_file, packing_filter
from mri_unlearn.data.slices import SliceDataset
from mri_unlearn.data.volumes import index_volumes
from mri_unlearn.data.writing import write_volume
from mri_unlearn.network.metrics import volume_scores
from mri_unlearn.signal.masks import mask_func

try:
    from fastmri.data.mri_data import SliceDataset as FastMRISlices
    from fastmri.data.subsample import EquiSpacedMaskFunc
    from fastmri.data.transforms import UnetDataTransform
    from fastmri import evaluate as fastmri_evaluate
except ImportError as e:
    sys.exit(
        f'{e}. This compares with fastMRI 0.3, which needs none of its heavier dependencies here: '
        f'pip install --no-deps fastmri==0.3.0 runstats && pip install scikit-image'
    )

SIZES = {'knee 15×640×368': (15, 640, 368), 'brain 16×640×320': (16, 640, 320)}
ROW = '{:52}{:>14}{:>14}{:>9}  {}'


def row(what, theirs, ours, ratio=None, goal=None, unit=''):
    "One line of the table; `ratio`: how many times better ours is"
    said = '' if goal is None else f'goal {goal:g}×: {"met" if ratio >= goal else "MISSED"}'
    print(
        ROW.format(
            what,
            *('–' if v is None else v if isinstance(v, str) else f'{v:.3g} {unit}' for v in (theirs, ours)),
            '' if ratio is None else f'{ratio:.2f}×',
            said,
        ),
        flush=True,
    )


def seconds(repeats, *functions):
    "Median time of each, measured in turn"
    times = [[] for _ in functions]
    for _ in range(repeats):
        for f, t in zip(functions, times):
            start = time.perf_counter()
            f()
            t.append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]


def write(path, shape, recon, seed=0):
    "Noise as k-space, and as target: nothing here depends on what is to be seen"
    rng = np.random.default_rng(seed)
    k = rng.standard_normal((*shape, 2), dtype=np.float32).view(np.complex64)[..., 0] * np.float32(1e-5)
    target = np.abs(rng.standard_normal((shape[0], *recon), dtype=np.float32)) * np.float32(1e-4)
    write_volume(
        path,
        k,
        header=Header(encoded=(*shape[-2:], 1), recon=(*recon, 1)),
        acquisition='AXT2',
        patient_id=path.stem,
        target=target,
    )


def stored_again(path, to, **options):
    "A copy of a file in which the k-space is stored in another way"
    to.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path) as f, h5py.File(to, 'w') as g:
        for name in f:
            if name != 'kspace':
                f.copy(name, g)
        g.attrs.update(f.attrs)
        k = f['kspace']
        out = g.create_dataset('kspace', k.shape, k.dtype, **options)
        for i in range(len(k)):
            out[i] = k[i]


def transforms(shape, size):
    "A function that does to numbers in memory what the transforms of one slice are, and nothing else"
    mask, _ = mask_func('equispaced', 0.08, 4)(shape[-1], seed=0)
    columns = torch.randn(*shape[:-1], int(mask.sum()), dtype=torch.complex64)
    rows = torch.randn(shape[0], size[0], shape[-1], dtype=torch.complex64)

    def slice_of_transforms():
        for c, r in zip(columns, rows):
            torch.fft.ifft(c, dim=-2, norm='forward')
            torch.fft.ifft(r, norm='forward')

    return slice_of_transforms


def loader(index, a, workers):
    "Ours, over all slices of an index"
    data = SliceDataset(index, mask_func('equispaced', 0.08, 4))
    return ReconDL(data, bs=a.batch, num_workers=workers, device='cpu')


def other_ways(index, a):
    "The same k-space stored otherwise, beside the plain file: from numbers on the disk to the image, one process"
    ways = {
        f'packed ({packing_filter()[0]})': {},
        'one piece (contiguous)': {},
        'gzip, a slice a chunk': dict(compression='gzip', compression_opts=1, shuffle=True, chunks='slice'),
        'gzip, a coil a chunk': dict(compression='gzip', compression_opts=1, shuffle=True, chunks='coil'),
    }
    for way, options in ways.items():
        root = Path(index.path[0]).parent.with_name('otherwise')
        with h5py.File(index.path[0]) as f:
            coils, shape = f['kspace'].shape[1], f['kspace'].shape
        if 'chunks' in options:
            options['chunks'] = (1, coils if options['chunks'] == 'slice' else 1, *shape[-2:])
        copy = root / Path(index.path[0]).name
        if way.startswith('packed'):
            pack_file(index.path[0], copy)
        else:
            stored_again(index.path[0], copy, **options)
        settled()
        one, other = index[:1], index_volumes(root, cache=False)

        def h5(path=other.path[0]):
            with h5py.File(path) as f:
                k = f['kspace'] if 'kspace' in f else f['kspace_lines']
                for i in range(shape[0]):
                    k[i]

        p, o, h = seconds(a.repeats, lambda: run(loader(one, a, 0)), lambda: run(loader(other, a, 0)), h5)
        n = shape[0]
        row(f'   {way}: h5py alone, here', n / h, n / o, h / o, None, 'slices/s')
        print(f'      plain files {n / p:.3g} slices/s; {root_size(root) / root_size(index.path[0]):.0%} of their size')
        shutil.rmtree(root)


def root_size(path):
    "Bytes of a file, or of all files below a folder"
    path = Path(path)
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob('*.h5'))


def settled():
    "Files that have just changed are read with more doubt"
    time.sleep(0.5)


def run(dl):
    return sum(len(x) for x, *_ in dl)


def loading(folder, a):
    "Slices a second from file to network input"
    for name, shape in SIZES.items():
        root = folder / str(shape)
        for i in range(a.files):
            write(root / f'file_brain_AXT2_200_{i:07d}.h5', (a.slices, *shape), (320, 320), i)
        settled()
        index, n = index_volumes(root, cache=False), a.files * a.slices
        transform = transforms(shape, (320, 320))

        def raw():
            for path in index.path:
                with h5py.File(path) as f:
                    for i in range(a.slices):
                        f['kspace'][i]

        def theirs(workers):
            data = FastMRISlices(root, 'multicoil', UnetDataTransform('multicoil', EquiSpacedMaskFunc([0.08], [4])))
            assert sum(len(b.image) for b in torch.utils.data.DataLoader(data, a.batch, num_workers=workers)) == n

        def ours(workers):
            assert run(loader(index, a, workers)) == n

        def ffts():
            for _ in range(n):
                transform()

        raw()
        for workers in a.workers:
            b, o, r, t = seconds(a.repeats, lambda: theirs(workers), lambda: ours(workers), raw, ffts)
            row(f'{name} → 320×320, {workers} workers', n / b, n / o, b / o, 6, 'slices/s')
            mb = np.prod(shape) * 8e-6 * n
            row(
                '   k-space that goes through, reading alone: ' + f'{mb / r:.0f} MB/s',
                f'{mb / b:.0f} MB/s',
                f'{mb / o:.0f} MB/s',
            )
            print(f'   share of the bandwidth of reading alone: fastMRI {r / b:.0%}, here {r / o:.0%}')
            share = f'   transforms alone, in one process: {n / t:.3g} slices/s; '
            print(share + f'their share of the time: fastMRI {t / b:.0%}, here {t / o:.0%}')
        if a.otherwise:
            other_ways(index, a)
        shutil.rmtree(root)


def indexing(folder, a):
    "First and second start over a folder of small files"
    root, cache = folder / 'many', folder / 'cache'
    write(root / 'file1000000.h5', (2, 2, 32, 16), (16, 16))
    for i in range(1, a.many):
        shutil.copy(root / 'file1000000.h5', root / f'file1{i:06d}.h5')
    os.environ['MRI_UNLEARN_CACHE'] = str(cache)
    time.sleep(3)  # files that have just changed are not kept in the cache

    def theirs():
        assert len(FastMRISlices(root, 'multicoil')) == 2 * a.many

    def kept():
        FastMRISlices(root, 'multicoil', use_dataset_cache=True, dataset_cache_file=folder / 'dataset_cache.pkl')

    def first():
        shutil.rmtree(cache, ignore_errors=True)
        assert len(index_volumes(root)) == a.many

    def second():
        assert len(index_volumes(root)) == a.many

    theirs()
    kept()
    b, o, s, p = seconds(a.repeats, theirs, first, second, kept)
    row(f'index of {a.many} files, first start', b * 1e3, o * 1e3, b / o, 2, 'ms')
    row(f'index of {a.many} files, second start, files checked', b * 1e3, s * 1e3, b / s, 20, 'ms')
    row('   fastMRI with its cache file, nothing checked', p * 1e3, s * 1e3, p / s, None, 'ms')
    shutil.rmtree(root)


def scoring(folder, a):
    "NMSE, PSNR and SSIM of a volume"
    rng = np.random.default_rng(0)
    smooth = np.fft.ifft2(
        rng.normal(size=(16, 320, 320))
        / (1 + np.add.outer(np.fft.fftfreq(320, 1 / 320) ** 2, np.fft.fftfreq(320, 1 / 320) ** 2))
    )
    gt = (np.abs(smooth) / np.abs(smooth).max() * 1e-4).astype(np.float32)
    pred = (gt + 3e-6 * rng.normal(size=gt.shape)).astype(np.float32)

    def theirs(gt=gt, pred=pred):
        return [float(np.squeeze(getattr(fastmri_evaluate, k)(gt, pred))) for k in ('nmse', 'psnr', 'ssim')]

    def ours():
        return list(volume_scores(gt, pred).values())

    exact = theirs(gt.astype(float), pred.astype(float))
    b, o = seconds(3 * a.repeats, theirs, ours)
    row('scores of a volume 16×320×320, single precision', b * 1e3, o * 1e3, b / o, 5, 'ms')
    off = [max(abs(s / e - 1) for s, e in zip(f(), exact)) for f in (theirs, ours)]
    row('   furthest from the value in double precision', *(f'{v:.0e}' for v in off))


PEAK = """# what a process says of itself; `ru_maxrss` of a child can be that of its parent
import resource, sys
from pathlib import Path
from mri_unlearn.cli import main
main(sys.argv[1:])
status = Path('/proc/self/status')
own = [line for line in status.read_text().splitlines() if line.startswith('VmHWM')] if status.exists() else []
print('peak', (int(own[0].split()[1]) if own else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)/1024)
"""


def memory(folder, a):
    "Largest memory of the commands, over few files and many"
    root = folder / 'volumes'
    write(root / 'few' / 'file1000000.h5', (6, 2, 256, 192), (192, 192))
    for n, name in ((20, 'few'), (200, 'many')):
        for i in range(n):
            to = root / name / f'file1{i:06d}.h5'
            to.parent.mkdir(exist_ok=True)
            if not to.exists():
                os.link(root / 'few' / 'file1000000.h5', to)
    for command in ('evaluate', 'reconstruct'):
        peak = {}
        for name in ('few', 'many'):
            out = {'evaluate': folder / f'{name}.csv', 'reconstruct': folder / f'{name}_images'}[command]
            done = subprocess.run(
                [sys.executable, '-c', PEAK, command, '--zero-filled', '--data', str(root / name), '--out', str(out)],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                sys.exit(f'mri_unlearn {command}: {done.stderr.strip()[-500:]}')
            peak[name] = float(done.stdout.rsplit('peak', 1)[1])
        more = peak['many'] / peak['few'] - 1
        print(
            f'{f"mri_unlearn {command}, peak memory":52}{peak["few"]:8.0f} MB for 20 files, '
            f'{peak["many"]:.0f} MB for 200 ({more:+.1%}); goal 10 %: {"met" if more < 0.1 else "MISSED"}',
            flush=True,
        )


PARTS = dict(loading=loading, indexing=indexing, scoring=scoring, memory=memory)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('parts', nargs='*', default=list(PARTS), metavar='PART', help=f'of {", ".join(PARTS)}; default: all')
    p.add_argument('--files', type=int, default=2, help='volumes of real size to load, of each kind')
    p.add_argument('--slices', type=int, default=24, help='slices in each (28 MB a slice)')
    p.add_argument('--many', type=int, default=1000, help='small files to index')
    p.add_argument('--otherwise', action='store_true', help='also load files that are stored in other ways')
    p.add_argument('--workers', type=int, nargs='+', default=[0, 2])
    p.add_argument('--batch', type=int, default=4, help='slices in a batch')
    p.add_argument('--repeats', type=int, default=5)
    p.add_argument('--threads', type=int, default=1, help='of torch in the main process')
    p.add_argument('--folder', help='where the temporary files go (about 1.4 GB)')
    a = p.parse_args()
    if set(a.parts) - set(PARTS):
        p.error(f'unknown part {sorted(set(a.parts) - set(PARTS))[0]}: expected some of {", ".join(PARTS)}')
    torch.set_num_threads(a.threads)
    print(f'torch {torch.__version__}, {os.cpu_count()} cores, {a.threads} threads, medians of {a.repeats}\n')
    print(ROW.format('', 'fastMRI', 'mri_unlearn', 'ratio', ''))
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        for name in a.parts:
            PARTS[name](Path(folder), a)


if __name__ == '__main__':
    main()
