"""
Draw what runs have logged, and keep the numbers behind it; needs matplotlib.

    python plot.py out/tiny [out/other …]           all that they have logged, a panel for what belongs together
    python plot.py 'out/try_*' --metric=val/loss    learning curves, seeds in one colour, and a table of where they end
    python plot.py out/sft out/dpo --metric=val/correct             … with a paired test on the prompts of both
    python plot.py 'out/ppo_*' --metric=val/reward,val/gold --axis=val/kl

Runs are seeds of one where their names differ in the number at the end and their checkpoints in nothing but the seed:
out/lr_1e-3 and out/lr_1e-4 are not.
"""
import fnmatch
import glob
import json
import re
import statistics
import sys
from pathlib import Path

import runtime

import torch

from grade import compared, t_quantile
from tokenizer import UserError

metric = ''  # what to draw, as 'val/loss'; several, as 'val/reward,val/gold', side by side; empty: everything
axis = 'iter'  # along steps, 'seconds' of training or another metric, as 'kl'
results = 'out/plot'  # where the picture and the table go; without a metric the picture of one run goes to the run

# what is drawn together: the name of a panel, and the names of metrics, * for any ending
PANELS = (('loss', ('train/loss', 'train/eval_loss', 'val/loss', 'teacher/loss', 'value/loss', 'train/ce')),
          ('reward', ('reward/*', 'val/reward*')), ('true quality', ('val/gold*',)),
          ('held-out answers', ('val/correct', 'val/exact', 'val/f1', 'val/rouge_l', 'val/format')),
          ('accuracy', ('val/accuracy*', 'val/truth*', 'train/accuracy')),
          ('KL', ('kl', 'val/kl', 'train/kl*', 'approx_kl', 'kl_coef')), ('entropy', ('entropy', 'router/entropy')),
          ('share clipped', ('*clip_frac',)), ('log-probability', ('*logp*',)),
          ('answer length', ('response_len', 'val/response_len')), ('shares', ('ended', 'zero_spread', 'val/ended')),
          ('learning rate', ('lr',)), ('gradient norm', ('grad_norm',)),
          ('tokens/s', ('tok_per_sec', 'rollout/tok_per_sec')), ('perplexity', ('val/ppl',)),
          ('bits per byte', ('val/bpb',)))
NOT_DRAWN = ('iter', 'seconds', 'router/load', 'skipped', 'correct_by_prompt')
SHARES = ('true quality', 'held-out answers', 'accuracy', 'share clipped', 'shares')  # panels of what is from 0 to 1
# knobs in which seeds of one run may differ
OF_A_SEED = ('out_dir', 'tensorboard_log', 'wandb_log', 'wandb_project', 'wandb_run_name', 'keep_checkpoints')


def new_figure(rows, columns, width, height):
    """A matplotlib figure of so many panels, of width x height inches each -> (figure, [[axes]]); needs no display."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('drawing needs matplotlib: pip install matplotlib') from None
    figure = Figure(figsize=(1 + width * columns, height * rows), layout='constrained')
    return figure, figure.subplots(rows, columns, squeeze=False)


def mean_and_spread(values):
    """The mean, and half of its 95 % interval by Student's t; 0 for a single value."""
    df = len(values) - 1
    if not df:
        return statistics.mean(values), 0.0
    quantile = t_quantile(df)
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 * quantile


def draw_mean(axes, color, label, curves):
    """Curves of seeds, [[(x, y)]] on the same x, as their mean and its 95 % interval -> [(x, mean)]."""
    x = [point[0] for point in curves[0]]
    ys = zip(*([y for _, y in curve] for curve in curves), strict=True)
    means, spreads = zip(*(mean_and_spread(values) for values in ys), strict=True)
    axes.plot(x, means, color=f'C{color}', linewidth=1.2, label=label)
    low, high = zip(*((m - s, m + s) for m, s in zip(means, spreads, strict=True)), strict=True)
    axes.fill_between(x, low, high, color=f'C{color}', alpha=0.2, linewidth=0)
    return list(zip(x, means, strict=True))


def report(path, rows, result):
    """Prints rows as a table (a single one as lines) and the result, and writes both to path, a JSON file."""
    def text(v):
        if not isinstance(v, float):
            return '-' if v is None else str(v)
        return f'{v:,.0f}' if abs(v) >= 1000 else f'{v:.4g}'
    if len(rows) == 1:
        rows, result = [], rows[0] | result
    else:
        table = [list(rows[0]), *([text(row[key]) for key in rows[0]] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for line in table:
            print('  '.join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    for key, value in result.items():
        print(f'{key}: {text(value)}')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json.dumps({'rows': rows or [result], 'result': result}, indent=1).encode() + b'\n')
    print(f'written to {path}')


def logged(path):
    """The rows that a run has logged; a line cut short by a kill is left out."""
    file, rows = Path(path) / 'metrics.jsonl', []
    if not file.is_file():
        raise UserError(f'{path}: no metrics.jsonl in it: give directories of runs')
    for line in file.read_text(encoding='utf-8', errors='replace').splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def state_of(path):
    """A checkpoint without its tensors, of which none is read; {} where there is none that can be read."""
    try:
        state = torch.load(path, map_location='cpu', mmap=True, weights_only=True)
        return {key: value for key, value in state.items() if key not in ('model', 'optimizers')}
    except Exception:  # a damaged one can raise nearly anything; load.py says what, where it matters
        return {}


def knobs_of(path):
    """All that the checkpoint of a run keeps of its knobs and its model's fields, but for OF_A_SEED."""
    state = state_of(Path(path) / 'ckpt.pt')
    knobs = state.get('config', {}) | {k: v for name in ('model_args', 'lora_args', 'score_args')
                                       for k, v in state.get(name, {}).items()}
    # where the run began, of which a stage after pretraining keeps it
    if knobs.get('init_from', '').startswith(('resume', 'auto')):
        knobs['init_from'] = (state.get('base') or state.get('began_with') or {}).get('init_from', 'scratch')
    # of seed 1, out/tiny_1 is what out/tiny_2 is of seed 2: the model to begin with, a reward model
    own = re.compile(f'(?<=[_-]){knobs.get("seed")}$')
    return {k: own.sub('', v) if isinstance(v, str) else v for k, v in knobs.items() if k not in OF_A_SEED}


def groups_of(paths):
    """Runs, those that are seeds of one together -> {label: their paths}; says which are, and which only look so."""
    named, groups = {}, {}
    for path in paths:
        named.setdefault(re.sub('[_-]?[0-9]+$', '', path), []).append(path)
    for name, alike in named.items():
        known = [knobs_of(path) for path in alike]
        seeds = {knobs.pop('seed', '') for knobs in known}
        differ = sorted({key for knobs in known for key in knobs.keys() | known[0].keys()
                         if knobs.get(key) != known[0].get(key)})
        why = ('a checkpoint is missing' if not all(known) else f'they differ in {", ".join(differ)}' if differ else
               'their seed is the same' if len(seeds) < len(alike) else '')
        if len(alike) > 1:
            print(f'{"not pooled" if why else "seeds of one run"}: {", ".join(alike)}' + (why and f': {why}'))
        groups |= {path: [path] for path in alike} if why or len(alike) == 1 else {name: alike}
    return groups


def points(rows, *names):
    """What rows have under these names, [(value, …)], of those that have all of them."""
    return [tuple(row[name] for name in names) for row in rows if all(row.get(name) is not None for name in names)]


def panels_of(names):
    """Names of metrics -> [(panel, names in it)]; what belongs to none has one of its own."""
    left, found = [n for n in names if not n.endswith(('_low', '_high')) and n not in NOT_DRAWN], []
    for panel, patterns in PANELS:
        inside = list(dict.fromkeys(n for pattern in patterns for n in left if fnmatch.fnmatchcase(n, pattern)))
        left = [n for n in left if n not in inside]
        found += [(panel, inside)] if inside else []
    return found + [(name, [name]) for name in left]


def draw(axes, panel, names, groups):
    """One panel: metrics of runs {name: [rows of each seed]}, a colour for each run or, of one run, for each metric."""
    alone = len(groups) == 1 and not metric
    for i, (path, runs) in enumerate(groups.items()):
        for j, name in enumerate(names):
            label = name if alone else f'{Path(path).name}, {name}' if len(names) > 1 else Path(path).name
            paint = dict(color=f'C{j if alone else i}')
            for rows in runs:
                if not (found := points(rows, axis, name)):
                    continue
                x, y = zip(*found, strict=True)
                axes.plot(x, y, linewidth=1, marker='.' if len(x) < 20 else None, label=label, **paint,
                          linestyle='-' if alone else ('-', '--', ':', '-.')[j % 4])
                label = None  # a colour has one entry in the legend
                band = points(rows, axis, f'{name}_low', f'{name}_high')
                if band and not metric:
                    axes.fill_between(*zip(*band, strict=True), alpha=0.15, linewidth=0, **paint)
    axes.set_title(panel, fontsize=9)
    axes.set_xlabel(axis, fontsize=7)
    axes.tick_params(labelsize=7)
    if axes.lines:
        axes.legend(frameon=False, fontsize=6)
    values = [y for line in axes.lines for y in line.get_ydata()]
    if panel in ('loss', 'gradient norm', 'perplexity') and values and 0 < 20 * min(values) < max(values):
        axes.set_yscale('log')


def ends(groups, names):
    """Where the runs of each group end: a row for each group and metric, with the mean's 95 % interval over seeds."""
    rows = []
    for name in names:
        for label, runs in groups.items():
            last = [points(run, axis, name)[-1] for run in runs]
            mean, spread = mean_and_spread([y for _, y in last])
            low, high = (mean - spread, mean + spread) if len(last) > 1 else (None, None)  # of one run nothing is known
            if len(last) > 1 and panels_of([name])[0][0] in SHARES:
                low, high = max(0.0, low), min(1.0, high)
            rows.append({'runs': label, 'count': len(last), 'metric': name, 'at the end': mean, 'low': low,
                         'high': high, f'{axis} at the end': statistics.mean(x for x, _ in last)})
    return rows


def paired(groups):
    """{name: by how much the last answers of a group's runs are better than those of the first group's, prompt by
    prompt}, of the groups that have answered the same prompts."""
    last = {label: [each[-1][0] for run in runs if (each := points(run, 'correct_by_prompt'))]
            for label, runs in groups.items()}
    last = {label: texts for label, texts in last.items() if texts}
    first = next(iter(last), '')
    return {f'{Path(label).name} less {Path(first).name}, correct': words for label, texts in last.items()
            if label != first and (words := compared(texts, last[first]))}


def paired_by_seed(paths, found, names):
    """{name: by how much the runs of a group end above those of the first group, seed by seed, with a 95 % t-interval},
    of groups {label: paths} that share two seeds at least; found: {path: what it has logged}."""
    groups = {label: {knobs_of(path).get('seed'): path for path in group} for label, group in paths.items()}
    first, *others = groups
    result = {}

    def end(path, name):
        return points(found[path], axis, name)[-1][1]
    for label in others:
        seeds = [seed for seed in groups[label] if seed is not None and seed in groups[first]]
        for name in names if len(seeds) > 1 else ():
            mean, spread = mean_and_spread([
                end(groups[label][seed], name) - end(groups[first][seed], name) for seed in seeds])
            result[f'{Path(label).name} less {Path(first).name}, {name}, {len(seeds)} seeds in pairs'] = (
                f'{mean:+.4f} ± {spread:.4f}')
    return result


def main():
    arguments = [a for a in sys.argv[1:] if not a.startswith('-')]
    runtime.configure(globals(), argv=[a for a in sys.argv[1:] if a.startswith('-')])
    paths = list(dict.fromkeys(path for a in arguments for path in sorted(glob.glob(a)) or [a]))
    if not paths:
        raise UserError('give directories of runs: python plot.py out/tiny')
    names = [name for name in metric.split(',') if name]
    found = {path: logged(path) for path in paths}
    for path, rows in found.items():
        for name in names:
            if not points(rows, axis, name):
                there = sorted({key for row in rows for key in row})
                wrong = next((key for key in (name, axis) if key not in there), '')
                what = f'{wrong!r}; {runtime.suggest(wrong, there)}' if wrong else f'both {name!r} and {axis!r}'
                raise UserError(f'{path}/metrics.jsonl: no row has {what}')
    grouped = groups_of(paths) if names else {path: [path] for path in paths}
    groups = {label: [found[path] for path in group] for label, group in grouped.items()}
    chosen = [(name, [name]) for name in names] or panels_of(dict.fromkeys(
        name for (rows,) in groups.values() for row in rows for name, value in row.items()
        if isinstance(value, (int, float))))
    if not chosen:
        raise UserError(f'{", ".join(paths)}: nothing has been logged yet')
    columns = len(names) or min(4, len(chosen))
    figure, panels = new_figure(-(-len(chosen) // columns), columns, *((5, 4) if names else (3.6, 2.6)))
    for axes, (panel, inside) in zip(panels.flat, chosen, strict=False):
        draw(axes, panel, inside, groups)
    for axes in list(panels.flat)[len(chosen):]:
        axes.set_axis_off()
    folder = Path(paths[0] if len(paths) == 1 and not names else results)
    file = folder / ('curves.svg' if names else 'plot.png')
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    if names:
        result = paired_by_seed(grouped, found, names) | (paired(groups) if 'val/correct' in names else {})
        report(folder / 'curves.json', ends(groups, names), result | {'drawn to': str(file)})
    else:
        print(f'{len(paths)} run{"s" * (len(paths) > 1)}, {len(chosen)} panels: {file}')


if __name__ == '__main__':
    runtime.cli(main)
