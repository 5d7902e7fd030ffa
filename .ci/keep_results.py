"""Take the tables that `nbs/tutorials/results.ipynb` shows over from finished runs into `nbs/results`.

    python .ci/keep_results.py RUNS        RUNS holds the folders tune, full, varnet, varnet4 of that chapter's commands

Of `collateral.csv` only the alarms are kept. A file that a run does not have is an error, before anything is copied.
"""

import argparse
import shutil
from pathlib import Path

import pandas as pd

ALWAYS = ['config.json', 'timing.json']
TABLES = {
    'tune': ['trials.csv', 'tuned.json'],
    'full': [
        'summary.csv',
        'verdicts.csv',
        'over_seeds.csv',
        'hallucination.csv',
        'memory.csv',
        'shared.csv',
        'third.csv',
        'collateral.csv',
    ],
    'varnet': ['summary.csv', 'verdicts.csv', 'shared.csv', 'hallucination.csv', 'table.md'],
    'varnet4': ['summary.csv', 'verdicts.csv', 'shared.csv'],
}


def keep(runs, kept):
    "Copy the tables of the folder `runs` to the folder `kept`"
    names = [Path(run) / name for run, tables in TABLES.items() for name in ALWAYS + tables]
    missing = [str(runs / name) for name in names if not (runs / name).is_file()]
    if missing:
        raise SystemExit(f'error: {missing[0]} is missing ({len(missing)} files in all); nothing was copied')
    for name in names:
        (kept / name).parent.mkdir(parents=True, exist_ok=True)
        if name.name == 'collateral.csv':
            groups = pd.read_csv(runs / name)
            groups[groups.alarm].to_csv(kept / name, index=False)
        else:
            shutil.copy(runs / name, kept / name)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', type=Path, help='folder with the runs')
    keep(parser.parse_args().runs, Path(__file__).parents[1] / 'nbs' / 'results')
