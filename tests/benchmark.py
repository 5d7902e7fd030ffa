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
from copy import deepcopy
from pathlib import Path

import h5py
import numpy as np
import torch
from torch.nn.functional import l1_loss

from mri_unlearn.data.header import Header
from mri_unlearn.data.loaders import ReconDL
from mri_unlearn.data.pack import pack_file, packing_filter
from mri_unlearn.data.slices import SliceDataset
from mri_unlearn.data.volumes import index_volumes
from mri_unlearn.data.writing import write_volume
from mri_unlearn.network.metrics import paper_loss_slices, volume_scores
from mri_unlearn.network.optimizer import ListAdam
from mri_unlearn.network.unet import UNet, set_precision
from mri_unlearn.network.varnet import VarNet
from mri_unlearn.signal.kspace import center_crop
from mri_unlearn.signal.masks import mask_func

try:
    from fastmri.data.mri_data import SliceDataset as FastMRISlices
    from fastmri.data.subsample import EquiSpacedMaskFunc
    from fastmri.data.transforms import UnetDataTransform
    from fastmri import evaluate as fastmri_evaluate
    from fastmri.losses import SSIMLoss
    from fastmri.models import Unet as FastMRIUnet
    from fastmri.models import VarNet as FastMRIVarNet
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
        header=Header(encoded=(*shape[-2:], 1), recon=(*recon, 1), patient_id=path.stem),
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


STARTS = """# a process of its own, whose memory nobody has used before
import sys, time
import psutil
from mri_unlearn.data.volumes import index_volumes
own = psutil.Process()
for _ in range(int(sys.argv[2])):
    before, start = own.memory_info().rss, time.perf_counter()
    n = len(index_volumes(sys.argv[1], progress=False))
    print(n, time.perf_counter() - start, (own.memory_info().rss - before) / 2**20)
"""


def crowd(root, a):
    "First and second start over many more files: links to those of `root`, in seconds and memory"
    there, files = root.parent / 'crowd', sorted(root.iterdir())
    there.mkdir()
    for i in range(a.crowd):
        os.link(files[i % len(files)], there / f'file_brain_AXT2_201_{i:07d}.h5')
    time.sleep(3)
    found = []
    for repeats in (1, a.repeats):
        done = subprocess.run(
            [sys.executable, '-c', STARTS, str(there), str(repeats)], capture_output=True, text=True, check=True
        )
        lines = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
        assert {n for n, *_ in lines} == {a.crowd}
        found.append((statistics.median(s for _, s, _ in lines), lines[0][2]))
    for (s, mb), which in zip(found, ('first start', 'second start, files checked')):
        goal = '' if which == 'first start' else f'goal 0.5 s: {"met" if s <= 0.5 else "MISSED"}'
        row(f'index of {a.crowd} files, {which}', None, f'{s:.3g} s')
        print(f'   memory grows by {mb:.0f} MB, {1024 * mb / a.crowd:.1f} kB a file; {goal}'.rstrip('; '), flush=True)


def indexing(folder, a):
    "First and second start over a folder of small files, each with a patient and a header of its own"
    root, cache = folder / 'many', folder / 'cache'
    for i in range(a.many):
        write(root / f'file_brain_AXT2_200_{i:07d}.h5', (2, 2, 32, 16), (16, 16), i)
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
    row(f'index of {a.many} files, first start', b * 1e3, o * 1e3, b / o, 4, 'ms')
    row(f'index of {a.many} files, second start, files checked', b * 1e3, s * 1e3, b / s, 20, 'ms')
    row('   fastMRI with its cache file, nothing checked', p * 1e3, s * 1e3, p / s, None, 'ms')
    if a.crowd:
        crowd(root, a)
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
    row('scores of a volume 16×320×320, single precision', b * 1e3, o * 1e3, b / o, 8, 'ms')
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


def networks_of(a):
    "What is trained: name -> (sizes, fastMRI's network, ours, inputs of theirs, inputs of ours, target)"
    device, torch_c = a.device, torch.complex64
    large = device != 'cpu'
    draw = torch.Generator(device).manual_seed(0)

    def noise(*shape):
        return torch.randn(shape, generator=draw, device=device)

    (bs, n, chans), (coils, h, w, cascades, wide) = (
        ((8, 320, 32), (15, 640, 368, 12, 18))
        if large
        else (
            (1, 320, 32),
            (4, 192, 110, 3, 6),
        )
    )
    image, target = noise(bs, 1, n, n), noise(bs, n, n).abs()
    kspace, mask = torch.view_as_complex(noise(1, coils, h, w, 2)), torch.zeros(w, dtype=torch.bool, device=device)
    mask[::4] = mask[w // 2 - w // 24 : w // 2 + w // 24] = True
    kspace, crop = kspace * mask, (min(h, 320), min(w, 320))
    size = dict(num_cascades=cascades, chans=wide, pools=4, sens_chans=8, sens_pools=4)
    unets = [net(in_chans=1, out_chans=1, chans=chans, num_pool_layers=4) for net in (FastMRIUnet, UNet)]
    varnets = [net(**size) for net in (FastMRIVarNet, VarNet)]
    for theirs, ours in (unets, varnets):
        ours.load_state_dict(theirs.state_dict())
        theirs.to(device), ours.to(device)
    about = torch.view_as_real(kspace), mask.view(1, 1, 1, -1, 1), None
    assert kspace.dtype == torch_c
    return {
        f'U-Net {chans} channels, {bs} of {n}×{n}': (*unets, (image,), (image,), target),
        f'VarNet {cascades} cascades, {coils}×{h}×{w}': (
            *varnets,
            about[:2],
            (kspace, mask.view(1, 1, 1, -1)),
            noise(1, *crop).abs(),
        ),
    }


def step_of(net, inputs, target, loss, opt):
    "A step of training as a function without arguments, which waits until a GPU is done"

    def step():
        opt.zero_grad()
        image = net(*inputs)
        image = center_crop(image[:, 0] if image.ndim == 4 else image, target.shape[-2:])
        loss(image, target).backward()
        opt.step()
        if target.is_cuda:
            torch.cuda.synchronize()

    step()
    step()
    return step


def training(folder, a):
    "Steps of training, without loading: network, loss, backward pass and optimiser"
    a.device = 'cuda' if a.gpu else 'cpu'
    if a.gpu:
        print(f'GPU: {torch.cuda.get_device_name()}; fastMRI and ours in float32 as torch computes it by default')
    for name, (theirs, ours, x, z, target) in networks_of(a).items():
        varnet, top = 'VarNet' in name, target.amax((1, 2))
        ssim_loss = SSIMLoss().to(target.device)
        their_loss = (lambda p, t: ssim_loss(p[:, None], t[:, None], data_range=top)) if varnet else l1_loss
        our_loss = (lambda p, t: paper_loss_slices(p, t, top).mean()) if varnet else l1_loss
        their_opt = (torch.optim.Adam if varnet else torch.optim.RMSprop)(theirs.parameters(), lr=1e-6)
        base = step_of(theirs, x, target, their_loss, their_opt)
        ways = {'float32': ours}
        if a.gpu:
            ways |= {'bfloat16 inside of U-Nets': set_precision(deepcopy(ours), torch.bfloat16)}
            ways |= {f'{way}, U-Nets compiled': compiled(net) for way, net in list(ways.items())}
        for way, net in ways.items():
            mine = step_of(net, z, target, our_loss, ListAdam([list(net.parameters())], lr=1e-6))
            b, o = seconds(3 * a.repeats, base, mine)
            row(f'step of {name}, {way}', b * 1e3, o * 1e3, b / o, None, 'ms')


def compiled(net):
    "A copy whose U-Nets are compiled, for one shape"
    net = deepcopy(net)
    for m in net.modules():
        if isinstance(m, UNet):
            m.forward = torch.compile(m.forward, dynamic=False)
    return net


def steps_of_sizes(a):
    "Seconds of a step and of an answer of our U-Net: (channels, side, seconds to train on a slice, seconds to answer)"
    device = 'cuda' if a.gpu else 'cpu'
    found = []
    for chans, side in ((8, 96), (8, 160), (8, 320), (16, 160), (32, 160)):
        net, x = UNet(chans=chans).to(device), torch.randn(1, 1, side, side, device=device)
        step = step_of(net, (x,), x[:, 0], l1_loss, ListAdam([list(net.parameters())], lr=1e-6))

        @torch.no_grad()
        def answer(net=net, x=x):
            net(x)
            if x.is_cuda:
                torch.cuda.synchronize()

        found.append((chans, side, *seconds(3 * a.repeats, step, answer)))
    return found


def scale(folder, a):
    "How time grows: with the size of images and networks, with the number of files"
    print('\n   channels  side   ms to train on a slice   ms to answer')
    found = {(chans, side): times for chans, side, *times in steps_of_sizes(a)}
    for (chans, side), times in found.items():
        print(f'   {chans:8d} {side:5d} {times[0] * 1e3:24.1f} {times[1] * 1e3:14.1f}')

    def power(of, one, other):
        "Exponent of what changed, from two measurements"
        return np.log(found[other][0] / found[one][0]) / np.log(of)

    print(f'   time to train ~ pixels^{power((320 / 96) ** 2, (8, 96), (8, 320)):.2f}', end='')
    print(f', ~ channels^{power(4, (8, 160), (32, 160)):.2f}')


PARTS = dict(loading=loading, indexing=indexing, scoring=scoring, training=training, scale=scale, memory=memory)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('parts', nargs='*', default=list(PARTS), metavar='PART', help=f'of {", ".join(PARTS)}; default: all')
    p.add_argument('--files', type=int, default=2, help='volumes of real size to load, of each kind')
    p.add_argument('--slices', type=int, default=24, help='slices in each (28 MB a slice)')
    p.add_argument('--many', type=int, default=1000, help='small files to index')
    p.add_argument('--otherwise', action='store_true', help='also load files that are stored in other ways')
    p.add_argument('--crowd', type=int, default=20_000, help='links to them to index without fastMRI; 0: none')
    p.add_argument('--workers', type=int, nargs='+', default=[0, 2])
    p.add_argument('--batch', type=int, default=4, help='slices in a batch')
    p.add_argument('--repeats', type=int, default=5)
    p.add_argument('--threads', type=int, default=1, help='of torch in the main process')
    p.add_argument('--gpu', action='store_true', help='train on the GPU, at the sizes of fastMRI')
    p.add_argument('--folder', help='where the temporary files go (about 1.4 GB)')
    a = p.parse_args()
    if set(a.parts) - set(PARTS):
        p.error(f'unknown part {sorted(set(a.parts) - set(PARTS))[0]}: expected some of {", ".join(PARTS)}')
    if a.gpu and not torch.cuda.is_available():
        p.error('--gpu: torch finds no GPU here')
    torch.set_num_threads(a.threads)
    print(f'torch {torch.__version__}, {os.cpu_count()} cores, {a.threads} threads, medians of {a.repeats}\n')
    print(ROW.format('', 'fastMRI', 'mri_unlearn', 'ratio', ''))
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        for name in a.parts:
            PARTS[name](Path(folder), a)


if __name__ == '__main__':
    main()
