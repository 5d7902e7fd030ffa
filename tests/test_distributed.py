"""Processes that work as one end with the weights and tables of one process, write once, and end together."""

import multiprocessing
import os
import pickle
import socket
import subprocess
import sys

import pandas as pd
import pytest
import torch

TRAIN = '--chans 4 --pools 2 --epochs 2 --batch-size 3'.split()
UNLEARN = ['--forget', "organ == 'knee'", *'--method nl_ft --rounds 1 --steps 4 --lr 1e-4'.split()]
METHODS = (
    'sub_ft',
    'ga_ft',
    'nl_ft',
    'uam',
    'proxy',
)  # plain, with a mean of each side, with noise, with passes of its own


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def places(world):
    "What a launcher says to each of `world` processes"
    both = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port(), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    both |= dict(OMP_NUM_THREADS=1)
    return [{k: str(v) for k, v in (both | dict(RANK=i, LOCAL_RANK=i)).items()} for i in range(world)]


class Double(torch.nn.Module):
    "A U-Net that computes in double precision: what is left of a difference is none of rounding"

    input = 'image'

    def __init__(self):
        from mri_unlearn.network.weights import new_unet

        super().__init__()
        self.net = new_unet(0, chans=4, num_pool_layers=2).double()

    def forward(self, x):
        return self.net(x.double()).float()


def weights_of_all(scans):
    "Train, then let each method work; the weights of each, and the work of the training"
    from mri_unlearn.data.loaders import recon_dls
    from mri_unlearn.data.request import ForgetRequest
    from mri_unlearn.data.volumes import index_volumes
    from mri_unlearn.machinery.ranks import ranks_together
    from mri_unlearn.network.learner import SkipValidation, WorkMeter, recon_learner
    from mri_unlearn.network.spread import spread
    from mri_unlearn.unlearn import core

    core.check_foreign = lambda *_: None  # which would refuse double precision
    torch.set_num_threads(1)
    with ranks_together('cpu'):
        splits = ForgetRequest("organ == 'knee'").split(index_volumes(scans, cache=False))
        train = splits[splits.split.str.endswith('train')]
        dls = recon_dls(train, train.head(1), bs=3, device='cpu')
        learn = recon_learner(dls, Double(), cbs=[SkipValidation(), WorkMeter()])
        how = dict(rounds=1, steps=2, held_out=splits[splits.split == 'retain_test'])
        with learn.no_bar(), learn.no_logging(), spread(learn.model):
            learn.fit_one_cycle(1, 1e-3)
            nets = {m: core.unlearn(learn, train, m, 0.5, bs=3 if m == 'sub_ft' else 4, **how).model for m in METHODS}
        nets['train'] = learn.model
    return {name: net.state_dict() for name, net in nets.items()} | dict(work=learn.work_meter.slices)


def commands(scans, out):
    "The three commands, one after the other; their exit statuses"
    from mri_unlearn.cli import main

    torch.set_num_threads(1)
    net, data = out / 'net.pt', ['--data', str(scans)]
    words = [
        ['train', *data, *TRAIN, '--out', str(net), '--device', 'cpu'],
        ['unlearn', *data, '--model', str(net), *UNLEARN, '--out', str(out / 'forgot.pt'), '--device', 'cpu'],
        ['evaluate', *data, '--model', str(net), str(out / 'forgot.pt'), '--out', str(out / 'scores.csv')],
    ]
    return [main([*w, '--device', 'cpu'] if w[0] == 'evaluate' else w) for w in words]


def at_work(place, log, function, args):
    "In a new process: what `function` returns goes into a file beside `log`, what it prints into `log`"
    os.environ.update(place)
    where = os.open(log, os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(where, 1)
    os.dup2(where, 2)
    log.with_suffix('.pkl').write_bytes(pickle.dumps(function(*args)))


def start(folder, world, function, *args):
    "Processes of one launch, at work on a function of this file; what they return and what they print, in their order"
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload([f'mri_unlearn.{m}' for m in ('cli', 'experiment.study', 'audit.running')])
    folder.mkdir()
    logs = [folder / f'{i}.log' for i in range(world)]
    given = zip(places(world), logs)
    ranks = [context.Process(target=at_work, args=(place, log, function, args)) for place, log in given]
    for rank in ranks:
        rank.start()
    yield
    for rank in ranks:
        rank.join(60)
        rank.kill()
    said = [log.read_text() for log in logs]
    assert [rank.exitcode for rank in ranks] == [0] * world, said
    yield [pickle.loads(log.with_suffix('.pkl').read_bytes()) for log in logs], said


@pytest.fixture(scope='module')
def runs(tiny_scans, tmp_path_factory):
    "World -> what its processes returned and printed, of both functions; all of them at work at the same time"
    out, going = tmp_path_factory.mktemp('ranks'), {}
    for world in (1, 2):
        (out / f'by{world}').mkdir()
        going[world, 'weights'] = start(out / f'w{world}', world, weights_of_all, tiny_scans)
        going[world, 'commands'] = start(out / f'c{world}', world, commands, tiny_scans, out / f'by{world}')
    for processes in going.values():
        next(processes)
    return out, {key: next(processes) for key, processes in going.items()}


@pytest.mark.parametrize('name', ['train', *METHODS])
def test_same_weights_as_one_process(runs, name):
    "In double precision to 1e-9, although batches of three and of two slices are dealt out to two"
    ((one,), _), (two, _) = (runs[1][world, 'weights'] for world in (1, 2))
    for weight, right in one[name].items():
        torch.testing.assert_close(two[0][name][weight], right, rtol=1e-9, atol=1e-12)
        assert torch.equal(two[0][name][weight], two[1][name][weight])
    assert one['train'].keys() == one[name].keys() and [t['work'] for t in two] == [one['work']] * 2
    assert name == 'train' or any(not torch.equal(one[name][k], one['train'][k]) for k in one[name])


def flat(path):
    return torch.cat([w.flatten() for w in torch.load(path, weights_only=True).values()])


def test_commands_end_as_those_of_one_process(runs):
    out, found = runs
    assert found[1, 'commands'][0] == [[0, 0, 0]] and found[2, 'commands'][0] == [[0, 0, 0]] * 2
    one, two = (flat(out / f'by{world}' / 'net.pt') for world in (1, 2))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    way = [flat(out / f'by{world}' / 'forgot.pt') for world in (1, 2)]
    assert (way[0] - way[1]).norm() < 0.05 * (way[0] - one).norm()  # single precision; the test above is the strict one
    tables = [pd.read_csv(out / f'by{world}' / 'scores.csv') for world in (1, 2)]
    keys = ['model', 'volume', 'split', 'slices']
    assert len(tables[0]) and tables[0][keys].equals(tables[1][keys])
    net = [table[table.model == 'net'] for table in tables]
    pd.testing.assert_frame_equal(*(t[['nmse', 'psnr', 'ssim']] for t in net), rtol=1e-5)


def test_one_speaks_and_one_set_of_files_is_written(runs):
    out, found = runs
    files = [sorted(p.name for p in (out / f'by{world}').iterdir()) for world in (1, 2)]
    assert files[0] == files[1] == ['forgot.json', 'forgot.pt', 'net.pt', 'scores.csv']
    (_, (alone,)), (_, (first, second)) = (found[world, 'commands'] for world in (1, 2))
    assert first.count('weights in') == alone.count('weights in') == 2 and second == ''


def torchrun(*words, **kwargs):
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_addr=127.0.0.1']
    command += [f'--master_port={free_port()}', '-m', 'mri_unlearn.cli', *map(str, words)]
    environment = os.environ | dict(OMP_NUM_THREADS='1') | kwargs
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_an_error_of_one_ends_all(tiny_scans, tmp_path):
    "The second process meets a network that fails in it alone, in the middle of the training"
    (tmp_path / 'mynets.py').write_text(
        'import os, torch\n'
        'class Net(torch.nn.Conv2d):\n'
        '    calls = 0\n'
        '    def __init__(self): super().__init__(1, 1, 3, padding=1)\n'
        '    def forward(self, x):\n'
        '        Net.calls += 1\n'
        '        if os.environ["RANK"] == "1" and Net.calls > 40: raise ValueError("only here")\n'
        '        return super().forward(x)\n'
    )
    words = ['train', '--data', tiny_scans, '--network', 'mynets:Net', '--epochs', 50, '--out', tmp_path / 'net.pt']
    path = f'{tmp_path}{os.pathsep}{os.environ.get("PYTHONPATH", "")}'
    done = torchrun(*words, '--device', 'cpu', PYTHONPATH=path)
    assert done.returncode and 'error, process 2 of 2: ' in done.stderr and 'only here' in done.stderr, done.stderr
    assert not (tmp_path / 'net.pt').exists()


def test_what_cannot_be_shared_is_refused(monkeypatch, tiny_scans):
    from conftest import command_here

    monkeypatch.setenv('RANK', '0')
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setattr('os._exit', lambda status: (_ for _ in ()).throw(SystemExit(status)))
    done = command_here('protocol', '--preset', 'tiny')
    assert done.returncode == 1 and 'work of one process' in done.stderr and '--devices' in done.stderr
    done = command_here('train', '--data', tiny_scans, '--out', 'x.pt', '--device', 'cuda:1')
    assert done.returncode == 1 and 'takes a GPU of its own' in done.stderr
