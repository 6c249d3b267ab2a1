"""
The whole life of a small model, command by command: pretraining, fine-tuning, preferences, rewards, distillation.

    python pipeline.py                          what is done already is not done again
    python pipeline.py --only=train,sft         some of the stages
    python pipeline.py --flags=--seed=2         another seed; what was made with other flags is made again

It starts the commands that you would type, shows them, and then what each took, what held-out data say of it, and one
sample: printed, in out/pipeline.md and as a figure in out/pipeline.svg; the reports of all stages make out/report.md.
Interrupted, it goes on where it was: every
stage trains with --init_from=auto. Done is what has a summary.json and, by out/pipeline.json, was made by the same
commands from the same models.
"""
import hashlib
import itertools
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import runtime

import plot
import report
from tokenizer import UserError

only = ''  # names of stages, with commas between; empty = all
flags = ''  # added to every command that trains

# the second and the third of the held-out rows: 58 and 17
QUESTIONS = ('Giulia picks 27 strawberries, and Yara picks 4 more than Giulia. How many strawberries do the two of '
             'them pick in all?',
             'Sven has 14 walnuts and 29 markers. Alma has 18 walnuts and 8 markers. How many more items does Sven '
             'have than Alma?')
ASK = 'sample.py --init_from={run} --chat=True --start={question} --temperature=0'
CALCULATE = ASK + ' --tools=True'


class Stage(NamedTuple):
    """One step of the pipeline."""
    name: str
    after: tuple  # the stages whose models it needs
    place: tuple  # column and row in the figure
    commands: tuple  # the last one trains
    run: str  # its directory
    score: tuple  # a metric of summary.json, and how it is written
    sample: str  # the command that shows what came out


STAGES = (
    Stage('train', (), (0, 1), ('train.py config/tiny.py',), 'out/tiny', ('val/bpb', '{:.2f} bits per byte'),
          'sample.py --init_from={run} --start=ROMEO. --max_new_tokens=60'),
    Stage('sft', ('train',), (1, 2), ('sft.py config/sft_tiny.py',), 'out/sft', ('val/correct', '{:.1%} correct'), ASK),
    Stage('reward', ('sft',), (2, 2), ('reward.py config/reward_tiny.py',), 'out/reward',
          ('val/accuracy', '{:.1%} of pairs'),
          ASK.replace('{run}', 'out/sft').replace('--temperature=0', '--best_of=16 --reward_model={run}')),
    Stage('dpo', ('sft', 'reward'), (3, 2), ('dpo.py config/dpo_tiny.py --reward_model=out/reward',), 'out/dpo',
          ('val/correct', '{:.1%} correct'), ASK),
    Stage('sft_mixed', ('train',), (1, 0), ('sft.py config/sft_mixed.py',), 'out/sft_mixed',
          ('val/correct', '{:.1%} correct'), CALCULATE),
    Stage('reward_own', ('sft_mixed',), (2, 1),
          ('sft.py --init_from=out/sft_mixed --dataset=wordproblems --eval_only=True --eval_split=train '
           '--eval_rows=4000 --eval_samples=8 --eval_temperature=1 --tools=True --max_new_tokens=160 '
           '--eval_file=out/answers.jsonl',
           'data/pairs/prepare.py --input=out/answers.jsonl --name=own_pairs', 'reward.py config/reward_own.py'),
          'out/reward_own', ('val/accuracy', '{:.1%} of pairs'),
          CALCULATE.replace('{run}', 'out/sft_mixed').replace('--temperature=0', '--best_of=16 --reward_model={run}')),
    Stage('ppo', ('sft_mixed', 'reward_own'), (3, 1), ('ppo.py config/ppo_tiny.py',), 'out/ppo',
          ('val/correct', '{:.1%} correct'), CALCULATE),
    Stage('grpo', ('sft_mixed',), (2, 0), ('grpo.py config/grpo_tiny.py',), 'out/grpo',
          ('val/correct', '{:.1%} correct'), CALCULATE),
    Stage('distill', ('grpo',), (3, 0), ('distill.py config/distill_words.py',), 'out/distill_words',
          ('val/correct', '{:.1%} correct'), CALCULATE))


def python(command, **options):
    """Runs a command of this project's, whose files lie beside this one, where this one is run -> (what it printed,
    where options ask for that, its status, the number of a signal that came meanwhile or 0)."""
    file, *rest = shlex.split(command)
    here, heard = Path(__file__).parent, []
    rest = [str(here / word) if word.startswith('config/') else word for word in rest]

    def hear(number, _):
        heard.append(number)
        if number == signal.SIGTERM:  # Ctrl-C goes to the child by itself; after either it saves, and ends
            child.terminate()

    with subprocess.Popen([sys.executable, str(here / file), *rest], **options) as child:
        before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            printed = child.communicate()[0]
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    status = child.returncode
    return printed, 128 - status if status < 0 else status, heard[0] if heard else 0


def made_of(stage):
    """What a stage's run follows from: its commands, and the summaries of the runs that these read."""
    summaries = {other.name: Path(other.run, 'summary.json') for other in STAGES if other.name in stage.after}
    return {'commands': list(stage.commands),
            'from': {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in summaries.items()}}


def is_done(stage, known):
    """Whether a stage's run is there and, as far as is known of it, all of its commands have ended well."""
    there = all((Path(stage.run) / name).exists() for name in ('ckpt.pt', 'summary.json'))
    return there and (not known or list(known.get('seconds', [])) == known.get('commands'))


def move_aside(run):
    """Makes room for a run, as a stage does that starts anew -> where the earlier one is now, None if there is none."""
    if not any(run.glob('*.pt')):
        return None
    aside = next(path for n in itertools.count(1) if not (path := Path(f'{run}.{n}')).exists())
    run.rename(aside)
    print(f'moved the earlier run in {run} to {aside}')
    return aside


def work(stage, record, keep):
    """Runs those commands of a stage that are not done.

    record: {stage: {'commands' and 'from': see `made_of`, 'seconds': {command: what it took, once it has ended}}}, kept
    by keep() as it goes.
    """
    run, source, before = Path(stage.run), made_of(stage), record.get(stage.name, {})
    same = before.items() >= source.items()
    if same and is_done(stage, before):
        return
    aside = None if same else move_aside(run)
    ended = before['seconds'] if same else {}
    seconds = {} if len(ended) == len(stage.commands) else dict(ended)  # of a run that has been deleted nothing is done
    record[stage.name] = source | {'seconds': seconds}
    keep()
    for command in [c for c in stage.commands if c not in seconds]:
        resumed = f'{command} --init_from=auto' if command == stage.commands[-1] else command
        print(f'\n$ python {resumed}', flush=True)
        began = time.time()
        _, status, stop = python(resumed)
        if not status:
            seconds[command] = time.time() - began
            keep()
        elif status == 2 and aside and not run.exists():  # a mistake, told before anything was written
            record[stage.name] = before
            keep()
            aside.rename(run)
        if status or stop:
            goes_on = '' if status == 2 else f'; go on with: {shlex.join(["python", *sys.argv])}'
            print(f'{stage.name} ended with status {status}{goes_on}', file=sys.stderr)
            raise SystemExit(status or 128 + stop)


def result_of(stage, record):
    """What came out of a stage: {seconds, memory in MB, score in words, sample or answers}."""
    summary = json.loads((Path(stage.run) / 'summary.json').read_text(encoding='utf-8'))
    key, form = stage.score
    samples = []
    for question in QUESTIONS if '{question}' in stage.sample else ['']:
        command = stage.sample.format(run=stage.run, question=shlex.quote(question))
        printed, status, stop = python(command, stdout=subprocess.PIPE, encoding='locale')
        if status or stop:
            raise SystemExit(status or 128 + stop)
        samples.append(printed.strip())
    prepared = [record[stage.name]['seconds'][command] for command in stage.commands[:-1]]
    return {'seconds': summary['total_seconds'] + sum(prepared), 'memory': summary['peak_memory_mb'],
            'score': form.format(summary[key]), 'sample': '\n\n'.join(samples)}


def draw(stages, found, path):
    """The stages as boxes with arrows to those that go on from them, each with what it took and what came out."""
    figure, ((axes,),) = plot.new_figure(1, 1, 10, 4.4)
    axes.set_axis_off()
    axes.set(xlim=(-0.45, 3.45), ylim=(-0.45, 2.45))
    boxes = {}
    for stage in stages:
        row = found[stage.name]
        text = (f'{stage.commands[-1].split(" --")[0]}\n{row["score"]}\n'
                f'{runtime.elapsed(row["seconds"])} min, {row["memory"]:,.0f} MB')
        frame = dict(boxstyle='round,pad=0.6', facecolor='white', edgecolor=f'C{stage.place[0]}')
        boxes[stage.name] = axes.text(*stage.place, text, ha='center', va='center', fontsize=8, linespacing=1.5,
                                      bbox=frame)
    figure.draw_without_rendering()  # boxes have their sizes now, from which arrows begin and where they end
    for stage in stages:
        for parent in [known for known in STAGES if known.name in stage.after and known.name in boxes]:
            bend = 0.25 if parent.place[1] == stage.place[1] and stage.place[0] - parent.place[0] > 1 else 0
            axes.annotate('', stage.place, parent.place, zorder=0, arrowprops=dict(
                arrowstyle='-|>', color='0.6', shrinkA=2, shrinkB=2, connectionstyle=f'arc3,rad={-bend}',
                patchA=boxes[parent.name].get_bbox_patch(), patchB=boxes[stage.name].get_bbox_patch()))
    axes.text(-0.45, 2.3, f'{sum(row["seconds"] for row in found.values()) / 60:.0f} minutes in all', fontsize=10)
    figure.savefig(path)


def main():
    runtime.configure(globals())
    try:
        shlex.split(flags)
    except ValueError as error:
        raise UserError(f'flags={flags}: {error}') from None
    known = {stage.name: stage for stage in STAGES}
    names = [name.strip() for name in only.split(',')] if only else list(known)
    for name in names:
        if name not in known:
            raise UserError(f'only={only}: unknown {name!r}; {runtime.suggest(name, known)}')
    stages = [stage._replace(commands=(*stage.commands[:-1], f'{stage.commands[-1]} {flags}'.rstrip()))
              for stage in STAGES if stage.name in names]
    plot.new_figure(1, 1, 1, 1)  # what cannot be drawn is better said now
    path = Path('out/pipeline.json')
    try:
        record = json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}
    except ValueError as error:
        raise UserError(f'{path}: {error}: remove it, and all stages are run again') from None
    for stage in stages:
        for parent in set(stage.after) - set(names):
            if not is_done(known[parent], record.get(parent)):
                raise UserError(f'only={only}: {stage.name} needs what {parent} makes: add it')
    path.parent.mkdir(exist_ok=True)

    def keep():
        runtime.write_atomic(path, lambda file: file.write(json.dumps(record, indent=1).encode()))

    found = {}
    for stage in stages:
        work(stage, record, keep)
        found[stage.name] = result_of(stage, record)

    lines = ['| stage | command | time | memory | held out |', '| --- | --- | --- | --- | --- |']
    for stage in stages:
        row, commands = found[stage.name], ', then '.join(f'`python {command}`' for command in stage.commands)
        took = f'{row["seconds"]:.0f} s | {row["memory"]:,.0f} MB'
        lines.append(f'| {stage.name} | {commands} | {took} | {row["score"]} |')
    lines += ['', *QUESTIONS, '']
    for stage in stages:
        lines += [f'{stage.name}:', '```', found[stage.name]['sample'], '```']
    text = '\n'.join(lines) + '\n'
    print(f'\n{text}')
    runtime.write_atomic('out/pipeline.md', lambda file: file.write(text.encode()))
    draw(stages, found, 'out/pipeline.svg')
    report.join([stage.run for stage in stages], Path('out/report.md'), '\n'.join(
        ['# The pipeline', '', *lines[:2 + len(stages)], '', '![the stages](pipeline.svg)', '']))
    print('written to out/pipeline.md and out/report.md, drawn to out/pipeline.svg')


if __name__ == '__main__':
    runtime.cli(main)
