"""
Do the commands of README and docs/ still work?

    python check_docs.py                         runs all of them, made short, in a copy of this tree: half an hour
    python check_docs.py --only=sft.py,dpo.py    those with one of these texts in them, and what they need

The tests check every command's files and flags without running it (`checked_commands`). Exit status 1 if one fails.
"""
import contextlib
import fnmatch
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import runtime

only = ''  # run the commands with one of these texts in them, with commas between; empty = all

ROOT = Path(__file__).parent
# (text in a command, why `check_docs.py` does not run it; test_all.py still checks its flags and files)
NOT_RUN = (
    ('pip install', 'installs packages'), ('-m venv', 'makes an environment'), ('uv run', 'needs uv'),
    ('python -m pytest', 'the tests are run by themselves'),
    ('python faults.py', 'runs the tests once for each fault'), ('python check_docs.py', 'is this command'),
    ('python serve.py', 'serves until it is stopped'), ('--nproc_per_node=8', 'needs 8 GPUs'), ('SLURM', 'needs Slurm'),
    ('train.py config/gpt2.py', 'needs a GPU and FineWeb'),
    ('--init_from=gpt2', 'fetches GPT-2'), ('--init_from=qwen_base', "needs somebody's base"),
    ('tokenizer_folder', 'needs a tokenizer without tokens for chats'), ('out/plain', 'needs a model with that'),
    ('out/chatty', 'needs that model'),
    ('NANOGPT', 'needs a checkout of nanoGPT'), ('lm_eval_adapter.py', 'needs lm-eval and its data'),
    ('data/gsm8k', 'fetches GSM8K from GitHub'))
# (a script and words among its arguments, what is added to make such a command short)
SHORT = (
    ('train.py', '--max_iters=2 --eval_interval=2 --eval_iters=1 --eval_pairs=4 --sample_tokens=8'),
    ('sft.py', '--max_iters=2 --eval_interval=2 --eval_rows=4 --max_new_tokens=8'),
    ('reward.py', '--max_iters=2 --eval_interval=2 --eval_rows=4'),
    ('dpo.py', '--max_iters=2 --eval_interval=2 --eval_rows=4 --max_new_tokens=8'),
    ('mine.py', '--max_iters=2 --eval_interval=2 --eval_rows=4 --max_new_tokens=8'),
    ('grpo.py', '--max_iters=1 --eval_interval=1 --eval_rows=4 --max_new_tokens=8 --prompts_per_step=2 '
                '--num_generations=2 --batch_size=2 --gradient_accumulation_steps=2'),
    ('ppo.py', '--max_iters=1 --eval_interval=1 --eval_rows=4 --max_new_tokens=8 --prompts_per_step=4 --batch_size=4'),
    ('distill.py', '--max_iters=2 --eval_interval=2 --eval_rows=4 --batch_size=2'),
    ('distill.py config/distill_words.py', '--max_new_tokens=8'),
    ('distill.py --answers=teacher', '--answer_prompts=4'), ('distill.py --on_policy=1', '--prompts_per_step=2'),
    ('sample.py', '--max_new_tokens=8'), ('evaluate.py', '--limit=2 --max_new_tokens=4'),
    ('best_of_n.py', '--rows=4 --max_new_tokens=8'), ('best_of_n.py --num_samples=64', '--num_samples=4'),
    ('pipeline.py', '--only=train --flags=--max_iters=2'),
    ('data/pairs/prepare.py', '--val_fraction=0.5'), ('data/reverse/prepare.py', '--train_pairs=200 --val_pairs=20'),
    ('bench.py train', '--steps=1 --repeats=1'), ('bench.py train config/nanogpt.py', '--dataset=shakespeare'),
    ('bench.py sample', '--repeats=1 --max_new_tokens=8'),
    ('bench.py tokenizer', '--repeats=1 --input=book.txt --vocab_size=300'),
    ('bench.py ablate', '--seeds=1 --max_iters=2 --batch_size=2'),
    ('bench.py stream', '--init_from=out/tiny --window=32'))
# what the commands of README and docs read and nobody makes
OWN_FILES = {
    **dict.fromkeys(('text.txt', 'prompt.txt'), 'To be, or not to be: that is the question.\n'),
    **dict.fromkeys(('book.txt', 'input.txt', 'notes/one.txt', 'more/two.txt'), ROOT / 'README.md'),
    **dict.fromkeys(('chats.jsonl', 'prompts.jsonl'), [
        {'messages': [{'role': 'user', 'content': f'What is {n} + {n}?'}, {'role': 'assistant', 'content': f'{2 * n}'}],
         'answer': f'{2 * n}', 'grader': 'number'} for n in range(40)]),
    'pairs.jsonl': [{'prompt': f'What is {n} + {n}?', 'chosen': f'{2 * n}', 'rejected': 'No.'} for n in range(40)],
    **dict.fromkeys(('instruction-data.json', 'instruction-data-with-preference.json'), [
        {'instruction': f'Add {n} and {n}.', 'input': '', 'output': f'{2 * n}', 'chosen': f'{2 * n}, I think.',
         'rejected': f'{2 * n}, you fool.'} for n in range(80)])}
POLITENESS = "def politeness(row, text):\n    return float('please' in text)\n\n\n"


class DocError(Exception):
    """A command of README or docs is wrong: says why."""


class Command(NamedTuple):
    """A command of README or docs/: where it stands, and its line for the shell."""
    where: str
    line: str


class Configured(BaseException):
    """A script has read its knobs: (the knobs with their values)."""


def documents():
    return [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]


def commands_in(path):
    """The commands of a Markdown file in their order: the lines of its sh and bash blocks, and code in the text that
    begins with python or torchrun."""
    text, found = Path(path).read_text(encoding='utf-8'), []
    fences = re.compile(r'^```(\w*)\n(.*?)^```$', re.M | re.S)
    for fence in fences.finditer(text):
        if fence[1] in ('sh', 'bash'):
            code = fence[2].replace('\\\n', '  ')
            found += [(fence.start(2) + line.start(), line[0]) for line in re.finditer(r'^.+$', code, re.M)]
    outside = fences.sub(lambda fence: re.sub(r'[^\n]', ' ', fence[0]), text)  # the places stay what they are
    for code in re.finditer(r'`((?:python|torchrun) [^`]+)`', outside):
        found.append((code.start(), code[1]))
    commands = []
    for place, line in sorted(found):
        line = ' '.join(re.sub(r'(^|\s)#.*', '', line).split())
        if line:
            commands.append(Command(f'{Path(path).name}:{text.count(chr(10), 0, place) + 1}', line))
    return commands


def simple_commands(line):
    """The commands between a line's pipes and &&, each a list of words, without what sets variables."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars='|&;<>')
    lexer.whitespace_split, lexer.commenters = True, ''
    words = [[]]
    for word in lexer:
        if set(word) <= set('|&;<>'):
            words.append([])
        elif words[-1] or not re.match(r'[A-Za-z_]+=', word):
            words[-1].append(word)
    return [found for found in words if found]


def started(script, args):
    """Runs a script in this process until runtime.configure has read its arguments -> (its knobs as they are set, {}
    of a script without knobs, and what it has printed). DocError where it refuses the arguments."""
    read, argv, folder, out, err = runtime.configure, sys.argv, os.getcwd(), io.StringIO(), io.StringIO()

    def configure(namespace, *others, argv=None):
        config, given = read(namespace, *others, argv=argv)
        raise Configured(config | given)

    try:
        runtime.configure, sys.argv = configure, [script, *args]
        os.chdir(ROOT)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / script), run_name='__main__')
    except Configured as found:
        return found.args[0], out.getvalue()
    except SystemExit as end:
        if end.code:
            raise DocError(err.getvalue().strip().removeprefix('error: ')) from None
    finally:
        runtime.configure, sys.argv = read, argv
        os.chdir(folder)
    return {}, out.getvalue()


def torchrun_parser():
    from torch.distributed.run import get_args_parser
    return get_args_parser()


def flag_names():
    """The flags of all scripts, as their --help prints them, of convert.py and of torchrun."""
    names = {'--help', '--peft'} | {name for action in torchrun_parser()._actions for name in action.option_strings}
    for path in (*ROOT.glob('*.py'), *ROOT.glob('data/*/prepare.py')):
        if 'runtime.configure(globals()' in path.read_text(encoding='utf-8'):
            names |= set(re.findall(r'^  (--\w+)=', started(str(path.relative_to(ROOT)), ['--help'])[1], re.M))
    return names


def check_command(words, copies):  # noqa: C901
    """Checks one simple command without running its work -> (script or cp, arguments, knobs), None of another program.

    copies: {name: script} of the scripts that earlier commands have copied; cp adds to it. DocError says what is wrong.
    """
    program, *args = words
    if program == 'srun':
        program, *args = args
    if program == 'uv':
        program, args = ('python', args[1:]) if args[0] == 'run' else ('pip', args)
    if program == 'cp':
        if not (ROOT / args[0]).exists():
            raise DocError(f'{args[0]}: no such file')
        copies[args[1]] = args[0]
        return program, args, {}
    elif program == 'pip':
        if missing := [name for name in args if name.endswith('.txt') and not (ROOT / name).exists()]:
            raise DocError(f'{missing[0]}: no such file')
    elif program in ('python', 'python3', 'torchrun'):
        if args[:2] == ['-m', 'pytest']:
            return check_tests(args[2:])
        if args[0] == '-m':
            return None
        if program == 'torchrun':
            out = io.StringIO()
            try:
                with contextlib.redirect_stderr(out):
                    asked = torchrun_parser().parse_args(args)
            except SystemExit:
                raise DocError(f'torchrun: {out.getvalue().strip().splitlines()[-1]}') from None
            args = [asked.training_script, *asked.training_script_args]
        name, *args = args
        script = copies.get(name, name)
        if not (ROOT / script).is_file():
            raise DocError(f'{name}: no such file')
        if script == 'convert.py':
            if len([arg for arg in args if arg != '--peft' and not arg.startswith('--type=')]) != 2:
                raise DocError('convert.py takes a source, a target and perhaps --peft or --type')
            return name, args, {}
        if script in ('faults.py', 'lm_eval_adapter.py'):  # of which other programs read the flags
            return name, args, {}
        return name, args, started(script, args)[0]
    elif program not in ('.', 'printf'):
        raise DocError(f'{program}: no command that this check knows')
    return None


def check_tests(args):
    """Checks what pytest is given: a file, and of -k a name that a test has."""
    tests = (ROOT / 'test_all.py').read_text(encoding='utf-8')
    if missing := [arg for arg in args if arg.endswith('.py') and not (ROOT / arg).exists()]:
        raise DocError(f'{missing[0]}: no such file')
    if '-k' in args and not re.search(rf'^def test_\w*{re.escape(args[args.index("-k") + 1].removeprefix("test_"))}',
                                      tests, re.M):
        raise DocError(f'{args[args.index("-k") + 1]}: no test has this name')


def checked_commands(paths):
    """Checks all commands of Markdown files -> [(Command, [(script, arguments, knobs)], problem or '')]."""
    checked, copies = [], {}
    for path in paths:
        for command in commands_in(path):
            found, problem = [], ''
            try:
                if not re.match(r'\w+=\$', command.line):  # a variable of a job's script
                    found = [check_command(words, copies) for words in simple_commands(command.line)]
            except DocError as error:
                problem = str(error)
            checked.append((command, [one for one in found if one], problem))
    return checked


def made_and_needed(script, args, knobs):
    """The files that a command makes, and those that it needs: two sets of paths and patterns."""
    if script in ('cp', 'convert.py'):
        source, target = (arg for arg in args if not arg.startswith('--'))
        return {target}, {source}
    made, needed = set(), {script, *re.findall(r'\w+\.py', knobs.get('rewards', ''))}
    if script.startswith('data/'):
        made.add(f'data/{knobs["name"]}' if knobs.get('name') else str(Path(script).parent))
        needed |= set(knobs['input'] if isinstance(knobs.get('input'), list) else [knobs.get('input', '')])
        needed.add(knobs.get('tokenizer', ''))
    elif script in ('bench.py', 'plot.py', 'sample.py'):
        needed |= {knobs.get('init_from', ''), knobs.get('reward_model', ''), *knobs.get('runs', [])}
    elif script == 'evaluate.py':
        needed |= {knobs[key] for key in ('init_from', 'against', 'judge')} | {knobs['data_dir']}
    elif script not in ('model.py', 'pipeline.py') and 'out_dir' in knobs:
        if not knobs.get('eval_only') and not knobs.get('check'):
            made.add(knobs['out_dir'])
        made |= {knobs.get('eval_file', ''), knobs.get('answers_file', '')}
        needed |= {knobs.get('reference', ''), *knobs.get('reward_models', '').split(',')}
        start = knobs['out_dir'] if knobs['init_from'] == 'resume' else knobs['init_from'].removeprefix('auto:')
        needed |= {start, knobs.get('teacher', ''), knobs.get('reward_model', ''), f'data/{knobs["dataset"]}'}
    return made - {''}, {path for path in needed if '/' in path or path.endswith('.py')}


def short(script, args):
    """The flags that make a command short."""
    return ' '.join(flags for words, flags in SHORT
                    if words.split()[0] == script and set(words.split()) <= {script, *args})


def prepare_copy(folder):
    """Copies this tree, and the datasets that are prepared, into a folder, with small datasets beside them."""
    skipped = shutil.ignore_patterns('.git', '.venv', 'out', 'wandb', '__pycache__', '.*_cache')
    shutil.copytree(ROOT, folder, ignore=skipped, dirs_exist_ok=True)
    for name, content in OWN_FILES.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, list):
            content = ''.join(json.dumps(row) + '\n' for row in content)
        path.write_text(content if isinstance(content, str) else content.read_text(encoding='utf-8'), encoding='utf-8')
    rows = ['--train_rows=400', '--val_rows=40', '--test_rows=20', '--unseen_rows=20']
    for flags in (['--pref_rows=200'], ['--tools=True'], ['--tools=True', '--tool_share=0.3']):
        subprocess.run([sys.executable, 'data/wordproblems/prepare.py', *rows, *flags], cwd=folder, check=True,
                       stdout=subprocess.DEVNULL)


def apply_diffs(folder):
    """Makes the changes of one line that README and docs/ show, in copies of stages; and adds a reward to each."""
    for path in documents():
        for _, target, old, new in diffs_in(path):
            text = (folder / target).read_text(encoding='utf-8').replace(f'{old}\n', f'{new}\n')
            (folder / target).write_text(POLITENESS + text, encoding='utf-8')


def mark_every_other(path):
    """Marks every other graded answer of a file as correct: a model that has learnt for two steps has none."""
    rows = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
    path.write_text(''.join(json.dumps(row | {'correct': i % 2 == 0}) + '\n' for i, row in enumerate(rows)),
                    encoding='utf-8')


def diffs_in(path):
    """The changes of one line in a Markdown file's diff blocks: (file, its copy, the line, what takes its place)."""
    return re.findall(r'^```diff\n--- (\S+)\n\+\+\+ (\S+)\n-(.*)\n\+(.*)\n```$',
                      Path(path).read_text(encoding='utf-8'), re.M)


def run_command(command, flags, folder):
    """Runs a command with more flags in a folder and prints how it ended; returns its status, 0 where all is well."""
    env = os.environ | {'WANDB_MODE': 'offline', 'PYTHON': sys.executable}
    shell = 'python() { "$PYTHON" "$@"; }; torchrun() { "$PYTHON" -m torch.distributed.run "$@"; }; set -o pipefail; '
    began = time.perf_counter()
    try:
        ran = subprocess.run(['bash', '-c', f'{shell}{command.line} {flags}'], cwd=folder, env=env, encoding='utf-8',
                             stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=900)
        status, printed = ran.returncode, ran.stdout
    except subprocess.TimeoutExpired:
        status, printed = 'none after 900 s', ''
    took = f'{time.perf_counter() - began:.0f} s'
    print(f'{"failed" if status else "ok":<7}{took:>6}  {command.where:<22} {command.line}', flush=True)
    if status:
        last = '\n'.join(f'       | {line}' for line in printed.strip().splitlines()[-6:])
        print(f'       run with {flags or "no more flags"}: status {status}\n{last}', flush=True)
    return status


def follow_up(command, scripts, folder):
    """What a reader does after a command: changes a line of the copy, or has a model that answers right now and then.
    """
    if command.line == 'cp dpo.py mine.py':
        apply_diffs(folder)
    for _, _, knobs in scripts:
        if knobs.get('eval_file'):
            mark_every_other(folder / knobs['eval_file'])


def makers_of(checked):
    """{path: (command, its scripts)} of the commands that make something."""
    makers = {}
    for command, scripts, _ in checked:
        for path in (path for one in scripts for path in made_and_needed(*one)[0]):
            makers.setdefault(path, (command, scripts))
    return makers


def main():
    """Runs the commands of README and docs/, made short, in a copy of this tree; exit status 1 if one fails."""
    runtime.configure(globals())
    checked, done, not_run, failed = checked_commands(documents()), set(), {}, []
    makers = makers_of(checked)

    def work(command, scripts, folder):
        """Runs a command, after those that make what it needs."""
        if command.line in done:
            return
        if reason := next((reason for text, reason in NOT_RUN if text in command.line), ''):
            not_run[command.line] = reason
            return
        done.add(command.line)
        needed = {path for one in scripts for path in made_and_needed(*one)[1]}
        for path, maker in makers.items():
            if any(fnmatch.fnmatch(path, pattern) for pattern in needed) and not (folder / path).exists():
                work(*maker, folder)
        flags = short(*scripts[-1][:2]) if scripts else ''
        status = run_command(command, flags, folder)
        if status:
            failed.append(command)
        else:
            follow_up(command, scripts, folder)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / 'flatgpt'
        prepare_copy(folder)
        for command, scripts, problem in checked:
            if problem:
                failed.append(command)
                print(f'wrong          {command.where:<22} {command.line}\n       | {problem}', flush=True)
            elif not only or any(text.strip() in command.line for text in only.split(',')):
                work(command, scripts, folder)
    for line, reason in not_run.items():
        print(f'not run: {reason}: {line}')
    print(f'{len(done)} commands run, {len(failed)} of them wrong or failed, {len(not_run)} not run')
    if failed:
        raise SystemExit(1)


if __name__ == '__main__':
    runtime.cli(main)
