"""
The whole life of a small model, command by command: pretraining, fine-tuning, preferences, rewards, distillation.

    python pipeline.py                          what is done already is not done again
    python pipeline.py --only=train,sft         some of the stages
    python pipeline.py --flags=--seed=2         another seed; what was made with other flags is made again

It starts the commands that you would type, shows them, and then what each took, what held-out data say of it, and one
sample: printed, in out/pipeline.md and as a figure in out/pipeline.svg. Interrupted, it goes on where it was.
"""
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import runtime

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


def forget(log, name):
    """Takes out of the log what was made from a stage that is made anew."""
    stale = {name}
    for stage in STAGES:
        if stale & set(stage.after):
            stale.add(stage.name)
            log.pop(stage.name, None)


def work(stage, log, keep):
    """Runs those commands of a stage that are not done. log: {stage: {command: {began, and when it is done seconds}}},
    kept by keep() as it goes."""
    *_, last = stage.commands
    checkpoint, done = Path(stage.run) / 'ckpt.pt', log.get(stage.name, {})
    whole = all('seconds' in done.get(command, {}) for command in stage.commands)
    if whole and checkpoint.exists():
        return
    before = json.dumps(log)
    done = log[stage.name] = {} if whole else {key: done[key] for key in stage.commands if key in done}
    forget(log, stage.name)
    for command in stage.commands:
        known = done.get(command, {})
        if 'seconds' in known:
            continue
        # what was cut short after its first save
        again = command == last and 'began' in known and checkpoint.exists() and (
            checkpoint.stat().st_mtime > known['began'])
        began, resume = time.time(), ' --init_from=resume' if again else ''
        print(f'\n$ python {command}{resume}', flush=True)
        done[command] = {'began': known['began'] if again else began}
        keep()
        _, status, stop = python(command + resume)
        if not status:
            done[command]['seconds'] = time.time() - began
            keep()
        if status == 2 and not (checkpoint.exists() and checkpoint.stat().st_mtime > began):
            log.clear()  # a mistake, told before anything was touched: what there is stays what it was
            log.update(json.loads(before))
            keep()
        if status or stop:
            goes_on = '' if status == 2 else f'; go on with: {shlex.join(["python", *sys.argv])}'
            print(f'{stage.name} ended with status {status}{goes_on}', file=sys.stderr)
            raise SystemExit(status or 128 + stop)


def told(stage, log):
    """What came out of a stage: {seconds, memory in MB, score in words, sample or answers}."""
    summary = json.loads((Path(stage.run) / 'summary.json').read_text())
    key, form = stage.score
    samples = []
    for question in QUESTIONS if '{question}' in stage.sample else ['']:
        command = stage.sample.format(run=stage.run, question=shlex.quote(question))
        printed, status, stop = python(command, stdout=subprocess.PIPE, text=True)
        if status or stop:
            raise SystemExit(status or 128 + stop)
        samples.append(printed.strip())
    seconds = summary['total_seconds'] + sum(log[stage.name][command]['seconds'] for command in stage.commands[:-1])
    return {'seconds': seconds, 'memory': summary['peak_memory_mb'], 'score': form.format(summary[key]),
            'sample': '\n\n'.join(samples)}


def draw(stages, found, path):
    """The stages as boxes with arrows to those that go on from them, each with what it took and what came out."""
    figure, ((axes,),) = runtime.new_figure(1, 1, 10, 4.4)
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
            raise UserError(f'only={only}: {name!r} is not one of {", ".join(known)}')
    stages = [stage._replace(commands=(*stage.commands[:-1], f'{stage.commands[-1]} {flags}'.rstrip()))
              for stage in STAGES if stage.name in names]
    runtime.new_figure(1, 1, 1, 1)  # what cannot be drawn is better said now
    record = Path('out/pipeline.json')
    try:
        log = json.loads(record.read_text()) if record.exists() else {}
    except ValueError as error:
        raise UserError(f'{record}: {error}: remove it, and all stages are run again') from None
    for stage in stages:
        for parent in set(stage.after) - set(names):
            begun = log.get(parent, {}).values()
            if not Path(known[parent].run, 'ckpt.pt').exists() or not all('seconds' in command for command in begun):
                raise UserError(f'only={only}: {stage.name} needs what {parent} makes: add it')
    record.parent.mkdir(exist_ok=True)

    def keep():
        runtime.write_atomic(record, lambda file: file.write(json.dumps(log, indent=1).encode()))

    found = {}
    for stage in stages:
        work(stage, log, keep)
        found[stage.name] = told(stage, log)

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
    print('written to out/pipeline.md, drawn to out/pipeline.svg')


if __name__ == '__main__':
    runtime.cli(main)
