"""
One page about a run, for a release: what was trained and on what, with which command and versions, at what cost; its
curves, held-out measures before and after with their intervals, benchmarks if evaluate.py was asked, a sample.

    python report.py out/tiny [out/sft …]    writes report.md into each, and their curves as report.svg (matplotlib)

Every stage writes the page when it ends, without the picture: to import matplotlib takes longer than all else here. It
is made from the files of a run alone, at any time, of older runs, too: what they did not keep is left out.
"""
import functools
import itertools
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import runtime

import card
import grade
import load
import plot
from errors import UserError

LIBRARIES = ('torch', 'numpy', 'tiktoken', 'tokenizers', 'safetensors', 'jinja2', 'gguf')
POINTS = 8  # evaluations in the table of a curve, where there is no picture
# of measures that do not say what they are
NAMES = {'train/eval_loss': 'loss of training text', 'val/accuracy': 'pairs ordered', 'kl': 'KL to the reference'}
SAMPLE = (24, 200)  # lines of a sample that are shown, and letters of each


@functools.cache
def versions():
    """{name: version} of Python, of the libraries in use, and 'commit' where this project is a checkout of git."""
    found = {'python': platform.python_version()}
    found |= {name: str(sys.modules[name].__version__) for name in LIBRARIES
              if hasattr(sys.modules.get(name), '__version__')}
    here = Path(__file__).parent
    if (here / '.git').exists():
        try:
            done = subprocess.run(['git', '-C', here, 'describe', '--always', '--dirty', '--exclude=*', '--abbrev=12'],
                                  capture_output=True, encoding='utf-8', timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return found
        found |= {'commit': done.stdout.strip()} if not done.returncode else {}
    return found


def start_of(run, step, about):
    """What starts.jsonl keeps of a start: the step it goes on from, its command, machine and versions, and in the
    stage's own words its data and its model."""
    held_out = {key: run.config[key] for key in sorted(runtime.HELD_OUT_BY & run.config.keys())}
    return {'iter': step, 'command': run.command(sys.argv), 'about': about, 'dtype': run.dtype, 'held_out': held_out,
            'processor': f'{run.world_size} x {runtime.processor(run.device)}', 'versions': versions()}


def read_json(path, lines=False):
    """What a JSON file holds, or the list of what its lines hold; None, or [], where there is none or it is damaged."""
    try:
        text = Path(path).read_text(encoding='utf-8')
        return [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    except (OSError, ValueError):
        return [] if lines else None


def tokens_of(rows):
    """About how many tokens a run has trained on: the rates that it logged, each by the seconds since the last."""
    logged = plot.points(rows, 'seconds', 'tok_per_sec')
    return sum(rate * (now - before) for (now, rate), (before, _) in zip(logged, [(0, 0), *logged], strict=False))


def facts(rows, summary, starts, state):
    """[(name, text)] of what was trained, on what, and what it took; an empty text for what is not known."""
    config, last = state.get('config') or {}, starts[-1] if starts else {}
    step, steps = summary.get('iter', rows[-1]['iter'] if rows else 0), config.get('max_iters', 0)
    about, data = starts[0]['about'].splitlines() if starts else [], config.get('dataset', '')
    digest = (state.get('base') or state.get('began_with') or {}).get('sha256', '')
    tokens, exact = summary.get('tokens') or tokens_of(rows), 'tokens' in summary
    seen = [f'{state[k]:,} {k}' for k in card.SEEN if k != 'tokens' and type(state.get(k)) is int]
    seen += [f'{"" if exact else "about "}{tokens:,.0f} tokens'] if tokens else []
    flops, count = tokens * summary.get('flops_per_token', 0), summary.get('parameters', 0)
    stage = f'{load.stage_of(state)}.py' if state else ''
    stage += f' as changed in {state["script"]["name"]}' if 'source' in state.get('script', {}) else ''
    return [
        ('stage', f'{stage}, ' * bool(stage) + f'step {step:,}' + f' of {steps:,}' * bool(steps)
         + ', not finished' * (not summary or step < steps)),
        ('data', about[0] if about else ', '.join(data) if isinstance(data, list) else data),
        ('training', '<br>'.join(about[1:])),
        ('base', card.start_of(state) + f', sha256 {digest[:12]}…' * bool(digest)),
        ('parameters', f'{count:,}' * bool(count)
         + f', {summary.get("trainable", count):,} of them trained' * (summary.get('trainable', count) != count)),
        ('trained on', ', '.join(seen)),
        ('compute', f'{flops:.3g} FLOP, forward and backward passes over these tokens; answers, references and '
                    'evaluations not counted' * bool(flops)),
        ('time', f'{summary["total_seconds"] / 3600:.3g} hours, {summary.get("seconds", 0) / 3600:.3g} of them '
                 'training' if 'total_seconds' in summary else ''),
        ('peak memory', f'{summary["peak_memory_mb"]:,.0f} MB' if 'peak_memory_mb' in summary else ''),
        ('processor', f'{last["processor"]}, {last["dtype"]}' if starts else ''),
        ('seeds', ', '.join(f'{k}={v}' for k, v in config.items() if k == 'seed' or k.endswith('_seed'))),
        ('versions', '<br>'.join(dict.fromkeys(', '.join(f'{k} {v}' for k, v in start['versions'].items())
                                               for start in starts)))]


def number(row, name):
    """A measure in a row of metrics with its 95 % interval, if that was logged, as text."""
    low, high = row.get(f'{name}_low'), row.get(f'{name}_high')
    if row.get(name) is None:
        return ''
    return f'{row[name]:.4g}' + (f' ({low:.4g} to {high:.4g})' if None not in (low, high) else '')


def table(head, rows):
    """Lines of a Markdown table."""
    def line(cells):
        return f'| {" | ".join(str(cell).replace("|", chr(92) + "|") for cell in cells)} |'
    return [line(head), line(['---'] * len(head)), *map(line, rows), '']


def draw(folder):
    """Draws a run's losses and held-out measures into report.svg -> whether it did: without matplotlib it does not."""
    rows = plot.logged(folder)
    panels = [panel for panel in plot.panels_of(dict.fromkeys(k for row in rows for k in row)) if any(
        name.startswith(('val/', 'train/loss', 'reward/', 'kl')) for name in panel[1])][:4]
    try:
        figure, axes = plot.new_figure(1, max(1, len(panels)), 3.6, 2.6)
    except UserError:
        return False
    for place, (panel, names) in zip(axes.flat, panels, strict=False):
        plot.draw(place, panel, names, {folder.name: [rows]})
    runtime.write_atomic(folder / 'report.svg', lambda file: figure.savefig(file, format='svg'))
    return bool(panels)


def measures(folder, title, found, picture):
    """Lines on held-out data: the first, the last and the best of the evaluations found, and the curve of all."""
    columns, best = [('before', found[0]), ('after', found[-1])], plot.state_of(folder / 'best.pt').get('iter')
    columns += [('best.pt', row) for row in found[1:-1] if row['iter'] == best]
    names = dict.fromkeys(n for _, row in columns for n in row
                          if n.startswith('val/') or n == 'train/eval_loss' or f'{n}_low' in row)
    names = [n for n in names if not n.endswith(('_low', '_high'))]
    lines = [f'{title} Held-out data', '', *table(
        ['measure', *(f'{name}, step {row["iter"]:,}' for name, row in columns)],
        [[NAMES.get(n, n.removeprefix('val/')), *(number(row, n) for _, row in columns)] for n in names]),
        'In brackets: the 95 % interval, of the measures that have one.', '']
    each = [row['correct_by_prompt'] for _, row in columns[:2] if 'correct_by_prompt' in row]
    if len(each) == 2 and found[0] is not found[-1] and (words := grade.compared(each[1:], each[:1])):
        lines += [f'Correct after less before, on the same prompts: {words}.', '']
    lines += [f'{title} Curves', '']
    if picture:
        return [*lines, f'![curves of {folder.name}]({picture})', '']
    names = ['train/loss', *names][:5]
    picked = sorted({round(i * (len(found) - 1) / (POINTS - 1)) for i in range(POINTS)})
    return lines + table(['step', *names], [[found[i]['iter'], *(number({n: found[i].get(n)}, n) for n in names)]
                                            for i in picked])


def sample(folder, title):
    """Lines with the last sample of a run."""
    text = (folder / 'samples.txt').read_text(encoding='utf-8', errors='replace')
    step, _, text = re.split('^--- step ', text, flags=re.M)[-1].partition('\n')
    shown = [line[:SAMPLE[1]] + '…' * (len(line) > SAMPLE[1]) for line in text.strip('\n').splitlines()]
    fence = '`' * max(3, *(len(ticks) + 1 for ticks in ['', *re.findall('`+', text)]))
    return [f'{title} A sample, step {step}', '', f'{fence}text', *shown[:SAMPLE[0]], *['…'] * (len(shown) > SAMPLE[0]),
            fence, '']


def page(folder, picture='', level=1):
    """The report of a run as Markdown. picture: where its curves are, '' for a table of them; level: of its heading.
    UserError for a directory that is no run."""
    folder, by_step, title = Path(folder), {}, '#' * (level + 1)
    rows, summary = plot.logged(folder), read_json(folder / 'summary.json') or {}
    starts, state = read_json(folder / 'starts.jsonl', lines=True), plot.state_of(folder / 'ckpt.pt')
    for row in rows:
        by_step.setdefault(row['iter'], {}).update(row)
    first = next((late['iter'] for early, late in reversed([*itertools.pairwise(starts)])
                  if 'held_out' in early and early['held_out'] != late.get('held_out')), -1)  # of other rows
    found = [row for row in by_step.values() if row['iter'] > first and any(name.startswith('val/') for name in row)]
    lines = ['#' * level + f' {folder.resolve().name}', '',
             *table(['', ''], [fact for fact in facts(rows, summary, starts, state) if fact[1]])]
    lines += measures(folder, title, found, picture) if found else []
    if benchmarks := read_json(folder / 'evaluate.json'):
        lines += [f'{title} Benchmarks', '', *table(
            ['task', 'metric', 'value and 95 % interval', 'questions', 'chance'],
            [[row['task'], row['metric'], number({'': row['value'], '_low': row['low'], '_high': row['high']}, ''),
              row['n'], number(row, 'chance')] for row in benchmarks])]
    lines += sample(folder, title) if (folder / 'samples.txt').is_file() else []
    typed = [start['command'] + f'  # from step {start["iter"]:,} on' * (start['iter'] > 0) for start in starts]
    full = card.command_of(card.Past(load.stage_of(state), state, {}, card.start_of(state))) if state else ''
    lines += [f'{title} Command', ''] if typed or full else []
    lines += ['```sh', *typed, '```', ''] if typed else []
    lines += ['Every knob that is not at its default:', '', '```sh', full, '```', ''] if full else []
    return '\n'.join(lines)


def write(folder, draws=False):
    """Writes report.md into a run's directory, and with `draws` its curves beside it -> the path of the page."""
    folder = Path(folder)
    text = page(folder, 'report.svg' if draws and draw(folder) else '')
    runtime.write_atomic(folder / 'report.md', lambda file: file.write(text.encode()))
    return folder / 'report.md'


def join(folders, path, head=''):
    """One page of several runs, under what stands at its head; their curves, drawn now, stay in their directories."""
    parts = [page(folder, os.path.relpath(folder / 'report.svg', path.parent).replace(os.sep, '/') if draw(folder)
                  else '', level=2) for folder in map(Path, folders)]
    runtime.write_atomic(path, lambda file: file.write('\n'.join([head, *parts]).encode()))


def main():
    folders = [argument for argument in sys.argv[1:] if not argument.startswith('-')]
    runtime.configure(globals(), argv=[argument for argument in sys.argv[1:] if argument.startswith('-')])
    if not folders:
        raise UserError('give directories of runs: python report.py out/tiny')
    for folder in folders:
        print(write(folder, draws=True))


if __name__ == '__main__':
    runtime.cli(main)
