"""
The process around a stage's loop: knobs from config files and the command line, device and precision, processes under
torchrun, atomic checkpoints, metrics, one progress line, signals.

A stage's knobs are its plain module globals; the comment beside each is its help text. `configure` overrides them from
`config/FILE.py` (plain assignments, never executed) and `--key=value`, in the order given.
"""
import ast
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import functools
import importlib.util
import inspect
import io
import json
import math
import operator
import os
import platform
import re
import shlex
import signal
import sys
import time
import tokenize
import weakref
import zipfile
from pathlib import Path
from typing import NamedTuple

# A waiting thread of libgomp, PyTorch's OpenMP on Linux, spins 300,000 times before it sleeps: two trainings on the
# same two cores then take twenty times as long instead of twice. Ten thousand times bridge the moments between two
# operations and not much more. A thousand leave the processor to others at once, but cost a quarter of the speed where
# waking a thread is slow: only if other programs keep half of the cores busy. torch reads this when it is imported.
if 'OMP_WAIT_POLICY' not in os.environ and 'GOMP_SPINCOUNT' not in os.environ:
    others = []  # threads that run beside this one, in three moments; NumPy, once imported, would start some
    with contextlib.suppress(OSError, ValueError, IndexError):
        for moment in range(3):
            time.sleep(0.005 * (moment > 0))
            others.append(int(Path('/proc/loadavg').read_text(encoding='utf-8').split()[3].partition('/')[0]) - 1)
    os.environ['GOMP_SPINCOUNT'] = '1000' if others and 2 * min(others) >= os.cpu_count() else '10000'

import filelock
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from errors import UserError
from progress import counted, on_line

# ----------------------------------------------------------------------------------------------------------------------
# knobs

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv}


def _evaluate(node, names):
    """The value of a literal, an earlier name or arithmetic on them; ValueError for anything else. Runs no code."""
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_evaluate(node.left, names), _evaluate(node.right, names))
    return ast.literal_eval(node)


class Knob(NamedTuple):
    """What a file says of a knob beside its value."""
    comment: str  # beside it: its help text
    heading: str  # the comment above its group
    annotation: str  # 'float' of 'scale: float = 0', '' where there is none


def _assignments(body):
    """Yields (name, node) for each assignment to a lower-case name in the body of a module or class."""
    for node in body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and target.id.islower():
                yield target.id, node


@functools.cache
def _read_knobs(source):
    """{name: Knob} of a module's or dataclass's source."""
    comments, headings = {}, {0: ''}  # by their lines
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            comments[line] = token.string.lstrip('# ')
            if column == 0 and token.string.startswith('# ') and not comments[line].startswith('-'):
                headings[line] = comments[line]
    tree = ast.parse(source)
    found = {}
    for name, node in _assignments(tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else tree.body):
        if not name.startswith('_'):
            heading = headings[max(line for line in headings if line < node.lineno)]
            annotation = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else ''
            found[name] = Knob(comments.get(node.lineno, ''), heading, annotation)
    return found


@functools.cache
def _source_of(cls):
    """A class's source; to find it the whole file is parsed."""
    return inspect.cleandoc(inspect.getsource(cls))


def _knobs_of(source, defaults):
    """{name: (default, comment)} of the knobs in a module's or dataclass's source."""
    return {name: (defaults[name], knob.comment) for name, knob in _read_knobs(source).items()}


def _convert(key, value, default, where, also_text=False):
    """value as the type of the knob's default; text from the command line is parsed, anything else checked."""
    text = isinstance(value, str)
    if isinstance(default, bool):
        if text and value.lower() in ('true', 'false', '1', '0', 'yes', 'no'):
            return value.lower() in ('true', '1', 'yes')
        if isinstance(value, bool) or text and also_text:
            return value
    elif isinstance(default, (int, float)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            number = float(value)
            if isinstance(default, float) and math.isfinite(number):
                return number
            if isinstance(default, int) and number == int(number):
                with contextlib.suppress(ValueError):
                    return int(value)  # exact, however many digits
                return int(number)  # 1e6
    elif isinstance(default, str):
        if text:
            return value
    elif isinstance(default, (list, tuple)):
        items, kind = value if isinstance(value, (list, tuple)) else [value], default[0] if default else ''
        return type(default)(_convert(key, item, kind, where) for item in items)
    raise UserError(f'{where}: {key}={value!r} must be {_kind(default)}')


def _kind(default):
    for kind, words in ((bool, 'True or False'), (int, f'a whole number, as its default {default} is'),
                        (float, 'a number'), (str, 'text')):
        if isinstance(default, kind):
            return words
    return 'a list (give the option several times)'


def _help(namespace, knobs, headings):
    """Prints the docstring and every knob {name: (value in force, comment)} below the heading of its group."""
    print((namespace.get('__doc__') or '').strip() + '\n\nKnobs (--key=value, or an assignment in a config file), '
          'with the values in force:')
    heading = None
    for name, (value, comment) in knobs.items():
        if headings.get(name, '') != heading:
            heading = headings.get(name, '')
            print(f'\n{heading}'.rstrip(' '))
        text = value if not isinstance(value, str) or value.isprintable() else repr(value)[1:-1]
        print(f'  --{name}={text}'.ljust(38) + f'  {comment}')


def knobs_of_file(path):
    """{name: (default, comment)} of the knobs of a stage's file, which is read but not run."""
    source = Path(path).read_text(encoding='utf-8')
    return _knobs_of(source, _defaults_of(source))


@functools.cache
def _defaults_of(source):
    """{name: value} of a module's knobs, but for those that are more than arithmetic."""
    found = {}
    for name, node in _assignments(ast.parse(source).body):
        with contextlib.suppress(ValueError, TypeError, ArithmeticError):
            found[name] = _evaluate(node.value, found)
    return found


STAGES = ('train.py', 'sft.py', 'reward.py', 'dpo.py', 'ppo.py', 'grpo.py', 'distill.py', 'lora.py', 'reward_model.py')


def script_in_use(config):
    """What a checkpoint keeps of the script that runs: its 'name', its 'source' where it is a copy of a stage, and of
    config the knobs 'given', those not at its defaults; {} where it cannot be read."""
    path = Path(sys.argv[0])
    try:
        source = path.read_text(encoding='utf-8')
        defaults = _defaults_of(source)
    except (OSError, ValueError, SyntaxError):
        return {}
    if not defaults.keys() & config.keys():  # what has started the stage is no script of its kind
        return {}
    given = {key: value for key, value in config.items() if key not in defaults or defaults[key] != value}
    return {'name': path.name, 'given': given} | ({} if path.name in STAGES else {'source': source})


def configure(namespace, *others, argv=None):  # noqa: C901
    """Overrides a stage's globals from config files and --key=value; returns (config, given).

    namespace: the stage's globals(). others: dataclasses whose fields are knobs too (GPTConfig), or paths of stage
    files whose knobs are. config: the value of every global knob; given: those of the others' that somebody set. An
    unknown key, a wrong type or a missing file raises UserError; --help prints every knob and exits with status 0. A
    directory, a .gguf or a .pt file without a key is init_from.
    """
    argv = sys.argv[1:] if argv is None else argv
    source = Path(namespace['__file__']).read_text(encoding='utf-8')
    stage = _knobs_of(source, namespace)
    fields, headings = {}, {}
    for other in others:
        if isinstance(other, (str, Path)):
            found, where = knobs_of_file(other), Path(other).name
        else:
            defaults = {f.name: f.default for f in dataclasses.fields(other)}
            found, where = _knobs_of(_source_of(other), defaults), f'{other.__name__} in {other.__module__}.py'
        fields |= found
        headings |= dict.fromkeys(found, where)
    described = _read_knobs(source)
    knobs, given = stage | {k: v for k, v in fields.items() if k not in stage}, {}

    def assign(key, value, where):
        if key not in knobs:
            hint = suggest(key, knobs, '--help lists the knobs')
            if key == 'base':
                hint = 'init_from=auto starts from what init_from was before: drop it'
            elif owner := _owner_of(key):
                hint = f'it is a knob of {owner}, which this script does not take'
            raise UserError(f'{where}: unknown key {key!r}; {hint}')
        default = knobs[key][0]
        kind = described[key].annotation if key in stage else ''
        value = _convert(key, value, float(default) if kind == 'float' else default, where, kind == 'bool | str')
        if (key, value) == ('init_from', 'auto') and 'max_iters' in knobs:
            value = f'auto:{namespace[key].removeprefix("auto:")}'  # the model is that of the config or the file
        if isinstance(value, list) and key in seen:
            value = namespace[key] + value
        seen.add(key)
        if key in stage:
            namespace[key] = value
        if key in fields:
            given[key] = value

    seen = set()
    for arg in argv:
        if arg in ('--help', '-h'):
            continue
        if arg.startswith('--'):
            key, equals, value = arg[2:].partition('=')
            if not equals and not isinstance(knobs.get(key, ('',))[0], bool):
                raise UserError(f'{arg}: write --{key}=VALUE')
            assign(key, value if equals else True, 'command line')
        elif 'init_from' in knobs and (Path(arg).is_dir() or Path(arg).suffix in ('.gguf', '.pt')):
            assign('init_from', arg, 'command line')
        else:
            for key, value, where in read_config(arg, namespace):
                assign(key, value, where)
    if '--help' in argv or '-h' in argv:
        values = given | {key: namespace[key] for key in stage}
        _help(namespace, {key: (values.get(key, default), comment) for key, (default, comment) in knobs.items()},
              headings | {name: knob.heading for name, knob in described.items()})
        raise SystemExit(0)
    return {k: namespace[k] for k in stage}, given


def suggest(word, known, otherwise=''):
    """What an error says of an unknown word: the nearest known one, else `otherwise` or all of them."""
    near = difflib.get_close_matches(word, known, n=1)
    return f'did you mean {near[0]}?' if near else otherwise or f'give one of {", ".join(known)}'


def _owner_of(key):
    """The first of the files here that has a knob of this name, if any."""
    knob = re.compile(rf'^ *{re.escape(key)}(: [\w |]+)? = .*  # ', re.M)
    files = sorted(Path(__file__).parent.glob('*.py'), key=lambda path: (path.name not in STAGES, path.name))
    return next((path.name for path in files if knob.search(path.read_text(encoding='utf-8'))), '')


def read_config(path, namespace=None):
    """Yields (key, value, where) for each assignment of a config file, which may use the names of a namespace."""
    try:
        tree = ast.parse(Path(path).read_text(encoding='utf-8'))
    except FileNotFoundError:
        files = [*(run.parent for run in Path(path).parent.glob('*/ckpt.pt')), *Path('config').glob('*.py')]
        near = difflib.get_close_matches(Path(path).stem, [file.stem for file in files], n=1)
        files = [str(file) for file in files if file.stem in near]
        hint = f'did you mean {files[0]}?' if files else \
            'give a config file (config/*.py), the directory of a model or --key=value'
        if 'init_from' in (namespace or {}) and Path(path).name == Path(path).stem == str(path):
            hint += f' (a model by its name: --init_from={path})'
        raise UserError(f'{path}: no such config file; {hint}') from None
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError) as error:
        raise UserError(f'{path}: not a config file of plain assignments ({error})') from None
    names = dict(namespace or {})
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        where = f'{path}:{node.lineno}'
        try:
            (target,), value = node.targets, _evaluate(node.value, names)
            key = target.id
        except (AttributeError, ValueError, TypeError, ArithmeticError, RecursionError):
            raise UserError(f'{where}: a config file holds plain assignments only (key = value)') from None
        names[key] = value
        yield key, value, where


def _report_error(text):
    """Writes a user's mistake as one line, rank 0 alone; torchrun, which has much to say of a process that fails, ends
    with what the first of them has left in its error file."""
    rank, record = os.environ.get('RANK', '0'), os.environ.get('TORCHELASTIC_ERROR_FILE')
    if record:
        about = {'message': f'error: {text}', 'extraInfo': {'timestamp': str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(record).write_text(json.dumps({'message': about}), encoding='utf-8')
    if rank == '0' or not record:  # without torchrun each process says it: it may be the only one that failed
        line = f'error: {text}\n' if rank == '0' else f'rank {rank}: error: {text}\n'
        sys.stderr.write('\n' * sys.stdout.isatty() + line)


def cli(main):
    """Runs a stage's main(): a UserError becomes one line on standard error and exit status 2."""
    status = 0
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='replace')  # a terminal that does not know a letter
    try:
        main()
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # `| head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 128 + 13  # SIGPIPE, which Windows has no name for
        elif isinstance(error, OSError) and not error.filename:
            raise
        else:  # a file that cannot be read or written: the user can fix that
            status = 2
            _report_error(error if isinstance(error, UserError) else f'{error.filename}: {error.strerror}')
    except SystemExit as end:
        status = end.code or 0
    except KeyboardInterrupt:
        print()
        status = 130
    if dist.is_initialized():
        if status != 2:  # after a mistake others may wait in a collective for this process
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # the interpreter's own end, while threads of gloo go on, aborts one process in forty
    if status:
        raise SystemExit(status)


# ----------------------------------------------------------------------------------------------------------------------
# files

def write_atomic(path, write, keep=1):
    """Calls write(file) on a temporary file beside path, flushes it to the disk and renames it: all or nothing.

    keep: number of versions to keep, path and its predecessors (`older`). path is complete at any moment. Raises
    OSError, with nothing changed.
    """
    path = Path(path)
    temporary, link = path.with_name(f'{path.name}.tmp'), path.with_name(f'{path.name}.link.tmp')
    try:
        with open(temporary, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep > 1 and path.exists():
            for i in range(keep - 1, 1, -1):
                if older(path, i - 1).exists():
                    os.replace(older(path, i - 1), older(path, i))
            link.unlink(missing_ok=True)
            try:
                os.link(path, link)  # a second name, so that path itself never misses
                os.replace(link, older(path, 1))
            except OSError:  # a file system without links: for an instant only the older version has a name
                os.replace(path, older(path, 1))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, 'O_DIRECTORY'):  # not on Windows, which opens no folder as a file
        folder = os.open(path.parent, os.O_RDONLY)  # the renames themselves must reach the disk too
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


WINDOWS = sys.platform == 'win32'  # where a folder with an open file in it has to keep its name
LOCKED = weakref.WeakValueDictionary()  # {device and number of a file: that file, as this process has locked it}


def lock_file(file):
    """Locks an open file for this process -> the file whose closing, or the end of the process, unlocks it.

    A lock belongs to a process: a run that begins where an earlier one of this process was goes on with the earlier's.
    BlockingIOError if another process holds it, another OSError if the file system has no locks.
    """
    found = os.fstat(file.fileno())
    place = found.st_dev, found.st_ino
    earlier = LOCKED.get(place)
    if earlier and not earlier.closed:
        return earlier
    if not filelock.lock_descriptor(file.fileno(), blocking=False):
        raise BlockingIOError
    LOCKED[place] = file
    return file


def older(path, i):
    """The name of the i-th version before a file's latest: ckpt.pt -> ckpt.1.pt."""
    return path.with_name(f'{path.stem}.{i}{path.suffix}')


def save_checkpoint(path, state, keep=1):
    """Writes a plain dict of tensors, numbers, strings, lists and dicts that `load_checkpoint` accepts.

    keep: see `write_atomic`. Raises OSError, and the earlier versions are as they were.
    """
    try:
        write_atomic(path, lambda file: torch.save(state, file), keep)
    except RuntimeError as error:  # torch.save says in its own words that its file could not be written
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


class Damaged(UserError):
    """A checkpoint that is incomplete or corrupt; init_from='auto' skips it."""


def load_checkpoint(path, mmap=False):
    """Reads a checkpoint file, or the best (else the latest) checkpoint of a run's directory, without running code.

    mmap: tensors stay in the file until they are used. Raises UserError that names the file when it is missing, damaged
    (a truncated file, a flipped bit) or not a checkpoint of this project.
    """
    path = Path(path)
    if path.is_dir():
        found = [p for p in (path / 'best.pt', path / 'ckpt.pt', older(path / 'ckpt.pt', 1)) if p.is_file()]
        if not found:
            raise UserError(f'{path}: no ckpt.pt in this directory; train a model into it first (--out_dir={path})')
        path = found[0]
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f'the checksum of {damaged} is wrong')
        state = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(f'{path}: no such checkpoint; give the directory of a run (--init_from=out/NAME)') from None
    except (OSError, MemoryError) as error:
        raise UserError(f'{path}: cannot be read ({getattr(error, "strerror", None) or "not enough memory"})') from None
    except Exception as error:  # a damaged zip or pickle can raise nearly anything; none of it is ours
        reason = str(error).strip().split('\n')[0] or type(error).__name__
        raise Damaged(f'{path}: not a whole checkpoint, or not safe to load ({reason[:120]})') from None
    missing = [k for k in ('model', 'model_args', 'tokenizer', 'iter') if not isinstance(state, dict) or k not in state]
    if missing:
        raise Damaged(f'{path}: not a checkpoint of this project (no {missing[0]!r} in it)')
    if not (isinstance(state['model'], dict) and isinstance(state['model_args'], dict)):
        raise Damaged(f"{path}: not a checkpoint of this project ('model' and 'model_args' must be dicts)")
    return state


def full_state(state, keep=True):
    """A nested state with every DTensor gathered on the CPU; keep=False: takes part in the gathering alone."""
    if isinstance(state, dict):
        return {k: full_state(v, keep) for k, v in state.items()}
    if isinstance(state, list):
        return [full_state(v, keep) for v in state]
    if hasattr(state, 'full_tensor'):
        whole = state.full_tensor()
        return whole.cpu() if keep else None
    return state


def not_finite(state, name=''):
    """The name of the first tensor of a nested state that holds inf or nan, or ''."""
    if isinstance(state, torch.Tensor):
        return '' if torch.isfinite(state).all() else name
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return next(filter(None, (not_finite(v, f'{name}.{k}'.lstrip('.')) for k, v in items)), '')


# knobs that say which rows are held out: with others, scores do not compare
HELD_OUT_BY = {'dataset', 'val_fraction', 'eval_rows', 'eval_iters', 'max_length', 'too_long'}


def each(optimizers):
    """A torch optimizer, or a list of them, as a list."""
    return optimizers if isinstance(optimizers, list) else [optimizers]


def optimizer_layout(state):
    """The options and numbers of parameters of an optimizer state's groups; they differ between kinds of optimizer."""
    return [(sorted(key for key in group if key.endswith(('betas', 'momentum'))), len(group['params']))
            for group in state['param_groups']]


@contextlib.contextmanager
def user_errors(where=''):
    """Turns a ValueError of the model (an impossible configuration, a misshapen tensor) into a one-line UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(f'{where}: {error}' if where else str(error)) from None


# ----------------------------------------------------------------------------------------------------------------------
# what all loops have in common

RELATIONS = {'>=': operator.ge, '>': operator.gt, '<=': operator.le, '<': operator.lt}

# of the knobs that stages share: what a value must be, or those it must be one of
RANGES = {
    'seed': '>= 0 and < 2**63',
    **dict.fromkeys(('batch_size', 'gradient_accumulation_steps', 'max_iters', 'eval_interval', 'log_interval',
                     'keep_checkpoints', 'max_bad_steps'), '>= 1'),
    **dict.fromkeys(('learning_rate', 'lora_lr_ratio'), '> 0'),
    **dict.fromkeys(('embed_lr', 'muon_lr', 'min_lr', 'weight_decay', 'grad_clip', 'warmup_iters', 'lr_decay_iters'),
                    '>= 0'),
    **dict.fromkeys(('muon_momentum', 'beta1', 'beta2'), '>= 0 and < 1'),
    'decay_frac': '>= 0 and <= 1',
    'optimizer': ('adamw', 'muon'),
    'lr_schedule': ('cosine', 'linear', 'wsd', 'constant'),
}


def check_ranges(config, ranges):
    """UserError for the first knob in config whose value is outside its range, and for a schedule that would jump.

    ranges: {name: '>= 0 and < 1', or a tuple of the values that are allowed}; names that are not a knob are ignored.
    """
    for name, allowed in ranges.items():
        if name not in config:
            continue
        value = config[name]
        if not isinstance(allowed, str):
            if value not in allowed:
                raise UserError(f'{name}={value!r} is not one of {", ".join(map(repr, allowed))}')
            continue
        for condition in allowed.split(' and '):
            relation, bound = condition.split()
            base, _, power = bound.partition('**')
            if not RELATIONS[relation](value, int(base) ** int(power) if power else float(bound)):
                raise UserError(f'{name}={value} must be {allowed}')
    peak, floor, warmup, decay, steps = (config.get(key, 0) for key in (
        'learning_rate', 'min_lr', 'warmup_iters', 'lr_decay_iters', 'max_iters'))
    if config.get('lr_schedule', 'constant') != 'constant':
        if 0 < peak < floor:
            raise UserError(f'min_lr={floor} must be <= learning_rate={peak}: it is where the decay ends')
        if 0 < decay < warmup < steps:
            raise UserError(f'lr_decay_iters={decay} must be >= warmup_iters={warmup}: the decay follows the warmup')


# ----------------------------------------------------------------------------------------------------------------------
# the processor

def processor(device='cpu'):
    """One line: a GPU's name, or the processor, the instruction set PyTorch runs with, and threads."""
    if device.startswith('cuda'):
        return torch.cuda.get_device_name(device)
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, 'get_capabilities') else {}
    name = found.get('cpu_name') or platform.processor() or platform.machine()
    return f'{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads'


def has_bfloat16(device):
    """Whether a device ('cpu', …) has fast bfloat16 products: True, False, or None where only a timing can tell."""
    kind = device.split(':')[0]
    if kind != 'cpu':
        return kind != 'cuda' or torch.cuda.is_bf16_supported()
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False  # oneDNN multiplies; it also knows of limits that the environment sets (ONEDNN_MAX_CPU_ISA)
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, 'get_capabilities') else {}
    if found.get('amx_bf16'):
        return True
    if found and not found.get('avx512_bf16') and not found.get('bf16'):  # the latter is Arm's
        return False
    return None  # AVX512-BF16 has twice the speed of float32 on one processor, half on another


@functools.cache
def fast_bfloat16(device, rows=512):
    """Whether products of so many rows with a matrix are faster in bfloat16 than in float32 on this device ('cpu', …).

    Most processors have no 16-bit arithmetic: PyTorch converts number by number, and a product takes up to thirty times
    as long. Some multiply 16 bits at half the speed of 32, yet read them twice as fast, which is what counts for the
    few rows of a step of generation. Everything that may choose its precision asks here.

    A timing may come out one way today and the other tomorrow, or in the process beside: a checkpoint keeps the choice.
    """
    known = has_bfloat16(device)
    return _bfloat16_is_faster(rows) if known is None else known


@torch.inference_mode()
def _bfloat16_is_faster(rows):
    """Times a product of so many rows with a matrix packed as for generation, in both precisions by turns.

    It is short and repeated, by one thread, and the shortest time counts, so that a busy machine gives the same answer
    as a quiet one.
    """
    from generate import PackedLinear  # what is timed
    products, best, threads = {}, {}, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        n = 1024 if rows < 16 else 512  # few rows are about reading the matrix, many about multiplying
        for dtype in (torch.float32, torch.bfloat16):
            layer = torch.nn.utils.skip_init(torch.nn.Linear, n, n, bias=False, dtype=dtype)  # draws no random numbers
            layer.weight.fill_(1.0)
            products[dtype] = functools.partial(PackedLinear(layer), torch.ones(min(rows, 256), n, dtype=dtype))
            products[dtype]()  # the first call prepares the kernel
            best[dtype] = math.inf
        for _ in range(12):
            for dtype, product in products.items():
                start = time.perf_counter()
                product()
                best[dtype] = min(best[dtype], time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return best[torch.bfloat16] < best[torch.float32]


# ----------------------------------------------------------------------------------------------------------------------
# the run

PEAK_FLOPS = {'H200': 989e12, 'H100': 989e12, 'A100': 312e12, 'B200': 2250e12, 'L40S': 362e12, 'RTX 4090': 165e12,
              'RTX 3090': 71e12, 'A10G': 70e12, 'T4': 65e12, 'V100': 125e12}  # dense 16-bit, from the data sheets


def pick_device(name):
    """'auto' -> cuda, else mps, else cpu; UserError if the device that was asked for is not there."""
    if name == 'auto':
        return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        torch.empty(1, device=name).item()
    except (RuntimeError, AssertionError):
        raise UserError(f'device={name!r} is not available here; --device=auto picks the best available') from None
    return name


LARGE = 1 << 22  # weights of a model that outgrows a CPU's cache


def pick_dtype(name, device, weights=None):
    """'auto' -> 16 bits where the device multiplies them faster, else float32. Returns (name, torch dtype).

    weights: for generation, how many the model has. It reads all of them for each token, so few that stay in a CPU's
    cache are faster as float32, whose products take less preparation.
    """
    dtypes = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
    if name == 'auto':
        name = 'float32'
        if device.startswith('cuda'):
            name = 'bfloat16' if torch.cuda.is_bf16_supported() else 'float16'
        elif device == 'cpu':
            if weights is None:
                fast = fast_bfloat16(device)
            else:
                fast = weights >= LARGE and fast_bfloat16(device, rows=1)
            name = 'bfloat16' if fast else 'float32'
    if name not in dtypes:
        raise UserError(f'dtype={name!r} is not one of auto, {", ".join(dtypes)}')
    return name, dtypes[name]


def pick_quant(name, dtype, device, weights, batch_invariant=False):
    """What `generate.pack` does to the matrices of a model with this many weights, loaded with these knobs: 'auto' ->
    'fp16' where dtype='auto' finds no fast 16-bit arithmetic on a CPU and the model outgrows its cache, else ''.

    float16 has half of float32's bytes to read and costs no measurable perplexity; 'int8' costs up to 1 %, which nobody
    should get unasked. batch_invariant: also where 16-bit arithmetic is fast, see `load.load_to_generate`.
    """
    if name != 'auto':
        return name
    from generate import has_fp16_kernels
    if dtype != 'auto' or device != 'cpu' or weights < LARGE or not has_fp16_kernels():
        return ''
    return 'fp16' if batch_invariant or pick_dtype(dtype, device, weights)[0] == 'float32' else ''


def peak_memory_mb(device='cpu'):
    """The largest memory this process has held, in MiB: on CUDA what was allocated there, else resident memory.

    0.0 on Windows, where Python has no module that knows.
    """
    if device.startswith('cuda'):
        return torch.cuda.max_memory_allocated() / 2 ** 20
    with contextlib.suppress(OSError):  # Linux: getrusage would count the parent's memory before exec
        for line in Path('/proc/self/status').read_text(encoding='utf-8').splitlines():
            if line.startswith('VmHWM'):
                return int(line.split()[1]) / 1024
    try:
        import resource
    except ImportError:
        return 0.0
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage / (2 ** 20 if sys.platform == 'darwin' else 1024)


def keep_freed_memory():
    """Tells glibc to keep freed memory instead of returning it to the system, which hands it back page by page.

    Training and generation free and take the same big tensors at every step: without this a fifth of a training step is
    page faults, and a long stream may leave holes that add up.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library manages as it likes
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD


def join_processes(backend):
    """Joins torchrun's process group, with a key prefix per restart.

    torchrun keeps one store through all restarts, so a process could read the address that a dead one left there and
    wait for it for half an hour. Only the agent of a single node counts restarts as its processes see them; for
    several nodes docs/running.md tells torchrun to take a new store.
    """
    store, rank, world_size = next(dist.rendezvous('env://'))
    if os.environ.get('GROUP_WORLD_SIZE', '1') == '1':
        store = dist.PrefixStore(f'restart_{os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}', store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


class Run:
    """One run of a stage: its place among the processes, its precision, its directory, its log.

    rank, world_size, main (rank 0), ddp: whether `wrap` made the model one of DistributedDataParallel; device,
    device_type, dtype; fsdp; stop: the signal that asks for an end, or 0; skipped, skipped_in_row: updates left out
    because a gradient was not finite (tensors on the device); best: the lowest score of a checkpoint.
    """

    def __init__(self, out_dir, device='auto', dtype='auto', seed=0, fsdp=False):
        self.out_dir, self.seed, self.fsdp = Path(out_dir), seed, fsdp
        self.rank, self.world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
        self.main, self.ddp = self.rank == 0, False
        if fsdp and 'RANK' not in os.environ:
            raise UserError('fsdp=True shards a model over processes: start it with torchrun (see docs/running.md)')
        device = pick_device(device)
        if 'RANK' in os.environ:  # under torchrun
            if device == 'cuda':
                device = pick_device(f'cuda:{os.environ["LOCAL_RANK"]}')
                torch.cuda.set_device(device)
            if not dist.is_initialized():
                join_processes('cpu:gloo,cuda:nccl' if device.startswith('cuda') else 'gloo')
        self.device, self.device_type = device, device.split(':')[0]
        self.dtype_asked = dtype
        # one process chooses for all: where it takes a timing, that may come out otherwise elsewhere
        self._set_dtypes(*self.on_main(lambda: (pick_dtype(dtype, device)[0], pick_dtype(dtype, device, LARGE)[0])))
        if fsdp and self.dtype == 'float16':
            raise UserError('fsdp=True goes with dtype=bfloat16 or float32: float16 would need a loss scale per shard')
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=self.dtype == 'float16')
        if self.device_type == 'cpu':
            keep_freed_memory()
        torch.set_float32_matmul_precision('high')  # TF32 where the device has it
        torch.manual_seed(seed)  # the same initial weights in every process
        self.skipped = self.skipped_in_row = torch.zeros((), device=self.device)
        self.stop = 0
        self.best = math.inf
        self.config = {}
        self.last = {}  # the last value of every metric
        self.failed_saves = {}  # {file: reason}
        self._locked = None  # the file whose lock says that this process writes in out_dir
        self._damaged = []  # checkpoints that were skipped
        self._write_failed = set()  # files of the log that could not be written
        self._wandb = self._tensorboard = self._prepare = self._start = None
        self.flops_per_token = 0  # of training, as far as the stage's Meter knows
        self._on_progress_line = self._recomputes = False
        self.start_time = time.perf_counter()
        if dtype == 'bfloat16' and self.device == 'cpu' and not fast_bfloat16('cpu'):
            self.print0('dtype=bfloat16: this processor multiplies float32 faster; --dtype=auto takes what is fast')

    def _set_dtypes(self, training, decoding):
        self.dtype, self._torch_dtype = pick_dtype(training, self.device)
        self._decode_dtype = decoding

    def decode_dtype(self, weights):
        """The torch dtype in which a model with this many weights generates, the same in every process."""
        return pick_dtype(self._decode_dtype if weights >= LARGE else self.dtype_asked, self.device, weights)[1]

    # ------------------------------------------------------------------------------------------------------------------
    # what a training step needs

    def wrap(self, model, compile=False, activation_checkpointing=False):
        """Moves a model to the device, prepares it for training, and returns what is called in its place.

        compile; activation_checkpointing (arXiv:1604.06174); several processes: DistributedDataParallel, or with
        fsdp=True shards of parameters, gradients and moments (FSDP2, arXiv:2304.11277). A model's blocks are its
        modules that have an attribute `recompute` and a method `sublayers`. Optimizers are made afterwards. A frozen
        model has no gradients to share, so that DDP leaves it alone; fsdp shards it too.
        """
        blocks = [m for m in model.modules() if hasattr(m, 'recompute')]
        self._recomputes = activation_checkpointing
        for block in blocks:
            block.recompute = activation_checkpointing
            if compile and self.world_size > 1:  # one by one: gradients travel while the next block computes its own
                block.sublayers = torch.compile(block.sublayers)
        if self.fsdp:
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # which take a second
            mesh = init_device_mesh(self.device_type, (self.world_size,))
            # Blocks travel in 16 bits; embeddings, head and the residual stream stay float32, as without sharding.
            half = MixedPrecisionPolicy(param_dtype=self._torch_dtype, reduce_dtype=torch.float32,
                                        cast_forward_inputs=False)
            for block in blocks:  # each moves to the device by itself, so that the whole model never has to fit there
                fully_shard(block.to(self.device), mesh=mesh, mp_policy=half)
            for part in model.children():  # a policy beside a critic: each may be called, and gathered, by itself
                if any(block in blocks for block in part.modules()) and not isinstance(part, torch.nn.ModuleList):
                    fully_shard(part.to(self.device), mesh=mesh)
            return fully_shard(model.to(self.device), mesh=mesh)
        model.to(self.device)
        if self.world_size > 1 and any(p.requires_grad for p in model.parameters()):
            known = inspect.signature(DistributedDataParallel).parameters
            buffers = 'forward_sync_buffers' if 'forward_sync_buffers' in known else 'broadcast_buffers'  # before 2.13
            self.ddp = True
            return DistributedDataParallel(model, device_ids=[self.device] if self.device_type == 'cuda' else None,
                                           gradient_as_bucket_view=True, **{buffers: False})
        return torch.compile(model) if compile else model

    def micro_batches(self, net, gradient_accumulation_steps):
        """The numbers of this process's micro-batches among those of the step, which all processes share.

        Under DDP gradients travel between processes with the backward pass of the last one alone.
        """
        count = gradient_accumulation_steps // self.world_size
        for i in range(count):
            if isinstance(net, DistributedDataParallel):
                net.require_backward_grad_sync = i == count - 1
            yield self.rank * count + i

    def check_accumulation(self, gradient_accumulation_steps):
        """UserError if the processes cannot share the micro-batches of a step."""
        if gradient_accumulation_steps % self.world_size:
            raise UserError(f'gradient_accumulation_steps={gradient_accumulation_steps} counts the micro-batches of '
                            f'all processes together: make it a multiple of {self.world_size}')

    def warm_up_ddp(self, net, loss):
        """A backward pass before the first step, whose gradients are forgotten.

        DDP packs gradients in the order in which its first backward pass made them, and where a number lies decides in
        which order three or more processes sum it: so a resumed run sums as the run that was never stopped.
        """
        self.backward(loss)
        for p in net.parameters():
            p.grad = None
        for module in net.modules():
            if hasattr(module, 'router_stats'):  # a mixture of experts has counted this pass, too
                module.router_stats = None

    def backward(self, loss):
        """loss.backward(), scaled for float16.

        A loss that is not finite makes all gradients so, and `clip_grad_norm` sees it in every process.
        """
        self.scaler.scale(loss * (1 + 0 * loss.detach())).backward()

    def clip_grad_norm(self, model, optimizers, max_norm=0.0):
        """Scales gradients down to max_norm (0 = as they are), over all shards; returns the norm before, on the device.
        """
        self.scaler.unscale_(optimizers)
        params = [p for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in params])
        if self.fsdp:
            norm = norm.full_tensor()
        if max_norm:
            torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
        return norm

    def skip_if_not_finite(self, optimizers, grad_norm):
        """Makes the next step() of the optimizers change nothing if grad_norm is not finite; counts such updates.

        Optimizers that know `found_inf`, as PyTorch's fused ones and Muon here, read it on the device, and the host
        need not wait. The others have their gradients dropped, for which it waits.
        """
        found_inf = 1 - torch.isfinite(grad_norm).float()
        self.skipped, self.skipped_in_row = self.skipped + found_inf, (self.skipped_in_row + 1) * found_inf
        self.scaler.update()
        for optimizer in each(optimizers):
            if getattr(optimizer, '_step_supports_amp_scaling', False):
                optimizer.found_inf = found_inf
            elif found_inf:
                optimizer.zero_grad()

    def check_skipped(self, step, max_bad_steps=10):
        """UserError if the last max_bad_steps updates were all skipped; the host waits here for the device."""
        in_row = int(self.skipped_in_row)
        if in_row >= max_bad_steps:
            raise UserError(f'step {step}: the last {in_row} updates were skipped, their loss or gradient was not '
                            f'finite (max_bad_steps={max_bad_steps}); {self.out_dir} keeps its last checkpoint: lower '
                            'learning_rate, set grad_clip or check the data')

    def resume(self, state, origin, optimizers, config):
        """Restores from a checkpoint of this run the optimizer state (each process its shard), the loss scale and the
        counters; prints which of the knobs in config have changed. UserError if it is of another kind of optimizer.
        """
        before, saved = state.get('config', {}), state.get('optimizers') or []
        if list(map(optimizer_layout, saved)) != [optimizer_layout(new.state_dict()) for new in each(optimizers)]:
            ratio = before.get('lora_lr_ratio', 1.0)
            raise UserError(f'{origin} holds no moments of this optimizer, it was trained with optimizer='
                            f'{before.get("optimizer")!r}{f", lora_lr_ratio={ratio}" if ratio != 1 else ""}: resume '
                            f'with that, or take its weights only: --init_from={self.out_dir} and a new --out_dir')
        for optimizer, old in zip(each(optimizers), saved, strict=True):
            params = [p for group in optimizer.param_groups for p in group['params']]
            moments = old['state']
            for i, values in moments.items():  # a wrong shape would end in a crash
                if any(values[k].shape != params[i].shape for k in ('exp_avg', 'momentum_buffer') if k in values):
                    raise UserError(f'{origin} holds moments of other parameters: take its weights only: --init_from='
                                    f'{self.out_dir} and a new --out_dir')
            if self.fsdp:
                moments = {i: {k: self.like(params[i], v) if v.ndim else v for k, v in values.items()}
                           for i, values in moments.items()}
            # rates, decays and betas stay those of today
            optimizer.load_state_dict({'state': moments, 'param_groups': optimizer.state_dict()['param_groups']})
        if state['scaler'] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state['scaler'])
        self.best = state['best']
        self.start_time -= state['total_seconds']
        self.skipped = self.skipped + state.get('skipped', 0)
        changed = [f'{k} {before[k]} -> {v}' for k, v in config.items()
                   if before.get(k, v) != v and k != 'init_from']
        script, earlier = script_in_use(config), state.get('script', {})
        if script and earlier:
            changed += [f'{k}, which is new, {v}' for k, v in script['given'].items() if k not in before]
            changed += [f'script {earlier["name"]} -> {script["name"]}'] * (earlier['name'] != script['name'])
            changed += ['the source of the script'] * (
                earlier['name'] == script['name'] and earlier.get('source') != script.get('source'))
        if changed:
            self.print0(f'changed since the checkpoint: {", ".join(changed)}')
        if any(before.get(k, config[k]) != config[k] for k in HELD_OUT_BY & config.keys()):
            self.best = math.inf  # the best score until now is of other rows

    def like(self, tensor, full):
        """A full tensor of a checkpoint, placed as `tensor` is: on the device, and sharded if that is."""
        full = full.to(self.device)
        if not hasattr(tensor, 'full_tensor'):
            return full
        from torch.distributed.tensor import distribute_tensor
        return distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)

    def shards(self, model):
        """The modules of a model that `wrap` has sharded; without fsdp none."""
        if not self.fsdp:
            return []
        from torch.distributed.fsdp import FSDPModule
        return [m for m in model.modules() if isinstance(m, FSDPModule)]

    @contextlib.contextmanager
    def swapped_weights(self, model, values):
        """Inside, the model and values, {name: tensor placed as the parameter}, have exchanged weights in place, so
        that two models take the memory of one and of the weights in which they differ."""
        def swap():
            for m in self.shards(model):
                m.reshard()
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if name in values:
                        now = p.detach().clone()
                        p.copy_(values[name])
                        values[name].copy_(now)
        swap()
        try:
            yield
        finally:
            swap()

    @contextlib.contextmanager
    def unsharded(self, model):
        """Inside, an FSDP model is gathered in every process, and any of its methods can be called."""
        shards = self.shards(model)
        hooks = [(m, m._forward_pre_hooks, m._forward_hooks) for m in shards]
        for m in shards:
            m.unshard()
            m._forward_pre_hooks, m._forward_hooks = {}, {}  # they would gather and free in step with the others
        try:
            with self.autocast(1) if shards else contextlib.nullcontext():
                yield
        finally:
            for m, before, after in hooks:
                m._forward_pre_hooks, m._forward_hooks = before, after
                m.reshard()

    def autocast(self, T):
        """The context for forward passes over rows of T tokens: 16-bit matrix products where dtype asks for it."""
        stack = contextlib.ExitStack()
        if self.dtype != 'float32':
            stack.enter_context(torch.autocast(self.device_type, self._torch_dtype))
            if self.device_type == 'cpu' and T <= 128 and not self._recomputes:
                # the fused attention kernel is made for long rows: up to here plain products in 16 bits are faster; but
                # what is computed again in a backward pass would not know of this choice
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        return stack

    def seed_dropout(self, index):
        """Makes dropout a function of the seed and of index, that of a micro-batch's first row, not of what ran before.
        """
        state = int(np.random.SeedSequence([self.seed, index]).generate_state(1)[0])
        # torch.manual_seed takes a trace of the stack for each kind of device that is not in use
        (torch.default_generator if self.device_type == 'cpu' else torch).manual_seed(state)

    def to_device(self, *arrays):
        """NumPy arrays -> tensors on the device; the copy to a GPU is asynchronous, from pinned memory."""
        tensors = [torch.from_numpy(a) for a in arrays]
        if self.device_type == 'cuda':
            return [t.pin_memory().to(self.device, non_blocking=True) for t in tensors]
        return [t.to(self.device) for t in tensors]

    def sum(self, *values):
        """Sums of numbers over all processes."""
        total = torch.tensor(values, dtype=torch.float64, device='cpu' if self.device_type == 'mps' else self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def all_reduce(self, tensor):
        """The sum of a tensor over all processes, in place, without waiting for it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def collect(self, items):
        """{key: value} of each process -> that of all of them, in every process."""
        parts = [items]
        if self.world_size > 1:
            parts = [None] * self.world_size
            dist.all_gather_object(parts, items)
        return {key: value for part in parts for key, value in part.items()}

    def distributed_map(self, work, lengths, size=16):
        """work on items 0 … n-1 of these lengths, shared by the processes, those of about one length together.

        work(numbers) of at most about size items gives (len(numbers), k); the result is a float64 array (n, k).
        """
        order = np.argsort(lengths, kind='stable')
        parts = np.array_split(order, max(self.world_size, -(-len(order) // size)))
        found = {}
        for i in self.counted(-(-len(parts) // self.world_size), 'evaluating'):
            # shards are gathered by all processes together, so each makes as many passes
            mine = i * self.world_size + self.rank
            part = parts[mine] if mine < len(parts) else parts[0]
            values = work(part if len(part) else order[:1])
            if mine < len(parts) and len(part):
                found |= dict(zip(part.tolist(), np.asarray(values, np.float64), strict=True))
        found = self.collect(found)
        return np.stack([found[i] for i in range(len(order))])

    def on_main(self, work):
        """Calls work() in rank 0 while the others wait; all of them return its result or raise its UserError."""
        box = [None, None]
        if self.main:
            try:
                box[0] = work()
            except UserError as e:
                box[1] = str(e)
        if self.world_size > 1:
            dist.broadcast_object_list(box, device=torch.device('cpu'))  # by gloo, which has half an hour of patience
        if box[1]:
            raise UserError(box[1])
        return box[0]

    # ------------------------------------------------------------------------------------------------------------------
    # the directory: checkpoints, metrics, samples

    def find_checkpoint(self, init_from, writes=True):
        """The path of the checkpoint that this run resumes from, the same in every process, or None.

        'resume': the latest, UserError if it is missing or damaged. 'auto:MODEL': the latest that is not damaged, None
        if there is none at all; damaged ones are skipped and reported. Anything else: None. UserError if another
        process is writing in the run's directory, unless this run writes nothing there.
        """
        if writes:
            self.on_main(self._lock_earlier_run)
        auto = init_from.startswith('auto:')
        if init_from != 'resume' and not auto:
            return None
        latest = self.out_dir / 'ckpt.pt'
        past = sorted(self.out_dir.glob('ckpt.*.pt'), key=lambda path: (len(path.name), path.name))
        found = [path for path in (latest, *past) if path.exists()]
        if auto and not found:
            return None

        def choose():
            errors = []
            for path in found or [latest]:
                try:
                    state = load_checkpoint(path, mmap=True)
                except Damaged as error:
                    if not auto:
                        hint = f'; --init_from=auto resumes from {found[1]} if that one is whole' if found[1:] else ''
                        raise UserError(f'{error}{hint}') from None
                    errors.append(str(error))
                else:
                    for error in errors:
                        self.print0(f'{error}: resuming from {path}, step {state["iter"]}')
                    return path, found[:len(errors)], state.get('dtypes')
            raise UserError(errors[0])
        path, self._damaged, dtypes = self.on_main(choose)  # all processes resume from the same one, or none does
        if dtypes and self.dtype_asked == 'auto' and has_bfloat16(self.device) is None:
            self._set_dtypes(*dtypes)  # timed again, they could be others than when the run began
        return path

    def open(self, config, step=None, tensorboard_log=False, wandb_log=False, wandb_project='flatgpt',
             wandb_run_name=''):
        """Makes the run's directory ready and starts the loggers.

        config: the knobs, for wandb and for whoever reads a checkpoint. step: of the checkpoint that the run resumes
        from; what was logged later is dropped. Without one the run is new: then all this happens when it first writes,
        so that a mistake that shows in its first evaluation costs nothing, and an earlier run in the same place is
        moved aside. UserError if another process is writing there.
        """
        self.config, self._step, self.script = config, step or 0, script_in_use(config)
        if step is None and any(self.out_dir.glob('*.pt')):
            for key in ('init_from', 'base', 'teacher', 'reward_model'):  # what a run that goes on reads again
                value = str(config.get(key) or '')
                path = value.removeprefix('auto:')
                if path and self.out_dir.resolve() in (Path(path).resolve(), Path(path).resolve().parent):
                    raise UserError(f'{key}={value} is the run in out_dir={self.out_dir}, which would be moved aside: '
                                    'give another --out_dir')

        def work():
            if wandb_log:
                self._start_wandb(wandb_project, wandb_run_name, step is not None)
            if tensorboard_log:
                try:
                    from torch.utils.tensorboard import SummaryWriter
                except ImportError:
                    raise UserError('tensorboard_log=True needs TensorBoard: pip install tensorboard') from None
            try:
                self._make_directory_ready(step)
                if self._wandb:
                    write_atomic(self.out_dir / 'wandb_id', lambda file: file.write(self._wandb.id.encode()))
            except OSError as error:
                raise UserError(f'out_dir={self.out_dir}: cannot write there ({error.strerror})') from None
            if tensorboard_log:
                self._tensorboard = SummaryWriter(self.out_dir / 'tensorboard', purge_step=(step or 0) + 1)
        self._prepare = work
        if step is not None:
            self._before_writing()

    def _before_writing(self):
        """Runs, once, the set-up that `open` postponed, and notes the start; every process must call it."""
        if self._prepare:
            work, self._prepare = self._prepare, None
            self.on_main(work)
        if self._start:
            start, self._start = self._start, None
            self._append('starts.jsonl', json.dumps(start) + '\n')

    def _start_wandb(self, project, name, resumes):
        """Starts a run at Weights & Biases; one that resumes continues there, too."""
        try:
            import wandb
        except ImportError:
            raise UserError('wandb_log=True needs wandb: pip install wandb') from None
        known = self.out_dir / 'wandb_id'
        id = known.read_text(encoding='utf-8') if resumes and known.exists() else None
        try:
            self._wandb = wandb.init(project=project, config=self.config, id=id, resume='allow',
                                     name=name or str(self.out_dir))
        except wandb.Error as error:
            raise UserError(f'wandb_log=True: {str(error).splitlines()[0]}') from None

    def _lock(self):
        """Takes the directory for this process; the system frees it when the process ends, however it ends."""
        self.out_dir.mkdir(parents=True, exist_ok=True)
        file = open(self.out_dir / '.lock', 'ab')
        try:
            self._locked = lock_file(file)
        except BlockingIOError:
            raise UserError(f'out_dir={self.out_dir}: another run is writing there; stop it, or give another '
                            '--out_dir') from None
        except OSError:
            if not self._locked:  # not said yet
                self.print0(f'{self.out_dir} is on a file system without locks: start no second run there')
            self._locked = file

    def _lock_earlier_run(self):
        """As `_lock`, where a run has been: that another one is writing there is said before a model is loaded."""
        if (self.out_dir / '.lock').exists():
            with contextlib.suppress(OSError):  # `open` says that nothing can be written there
                self._lock()

    def _make_directory_ready(self, step):
        """Takes the directory, which must be writable, and clears it of what is not of the run up to this step."""
        self._lock()
        if step is None and any(self.out_dir.glob('*.pt')):
            self._move_aside()
        write_atomic(self.out_dir / '.writable', lambda file: None)
        (self.out_dir / '.writable').unlink()
        for path in self.out_dir.glob('*.tmp'):  # of a save that was killed
            path.unlink()
        for path in self._damaged:
            path.replace(f'{path}.damaged')
        if step is None:
            for name in ('metrics.jsonl', 'samples.txt', 'summary.json', 'starts.jsonl', 'report.md', 'report.svg',
                         'evaluate.json'):
                (self.out_dir / name).unlink(missing_ok=True)
        else:
            self._rewind(step)

    def _move_aside(self):
        """Renames the directory, where an earlier run is, and makes a new one."""
        place = self.out_dir.resolve()  # a link to another disk stays
        n = next(n for n in range(1, 10 ** 6) if not Path(f'{place}.{n}').exists())
        try:
            if WINDOWS:
                self._locked.close()
            place.rename(f'{place}.{n}')
            place.mkdir()
        except OSError as error:  # a mounted disk; nothing is copied, nothing deleted
            raise UserError(f'out_dir={self.out_dir}: the earlier run there cannot be moved aside ({error.strerror}): '
                            'give another --out_dir') from None
        self.print0(f'moved the earlier run in {self.out_dir} to {place}.{n}')
        self._lock()

    def _rewind(self, step):
        """Drops what was logged after a step, so that no row of metrics and no sample occurs twice."""
        path = self.out_dir / 'metrics.jsonl'
        if path.exists():
            keep = []
            for row in path.read_text(encoding='utf-8', errors='replace').splitlines(keepends=True):
                with contextlib.suppress(ValueError, KeyError, TypeError):  # the last line may be cut short
                    if json.loads(row)['iter'] <= step:
                        keep.append(row.rstrip('\n') + '\n')
                        self.last |= json.loads(row)
            write_atomic(path, lambda file: file.write(''.join(keep).encode()))
        path = self.out_dir / 'samples.txt'
        if path.exists():
            parts = re.split('^(?=--- step )', path.read_text(encoding='utf-8', errors='replace'), flags=re.M)
            keep = [part for part in parts if part and int((re.match('--- step ([0-9]+)', part) or [0, 0])[1]) <= step]
            write_atomic(path, lambda file: file.write(''.join(keep).encode()))

    def _append(self, name, text):
        """Appends to a file of the run; a full disk is reported once and costs the text, not the run."""
        path = self.out_dir / name
        try:
            with open(path, 'ab', buffering=0) as file:
                end, data = file.tell(), text.encode(errors='replace')
                if file.write(data) < len(data):
                    file.truncate(end)  # no half line
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._write_failed.discard(name)
        except OSError as error:
            if name not in self._write_failed:
                self.print0(f'{path}: not written ({error.strerror}); training continues')
            self._write_failed.add(name)

    def log(self, metrics):
        """Appends a row to metrics.jsonl and passes it to wandb and TensorBoard; every process calls it."""
        self._before_writing()
        if not self.main:
            return
        metrics = {k: float(f'{v:.6g}') if isinstance(v, float) else v for k, v in metrics.items()}
        # a value that JSON has no spelling for (nan, inf) becomes null
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        self.last |= row
        self._append('metrics.jsonl', json.dumps(row) + '\n')
        if self._wandb:
            self._wandb.log(metrics, step=metrics['iter'])
        if self._tensorboard:
            try:
                for key, value in metrics.items():
                    if key != 'iter' and not isinstance(value, (list, str)):
                        self._tensorboard.add_scalar(key, value, metrics['iter'])
            except OSError as error:
                self.print0(f'{self.out_dir}/tensorboard: not written ({error.strerror}); the run continues without')
                self._tensorboard = None

    def log_step(self, metrics, max_iters, seconds_left):
        """Logs the metrics of a training step and prints the progress line."""
        peak, skipped, step = self.peak_flops(), int(self.skipped), metrics['iter']
        metrics |= {'skipped': skipped} if skipped else {}
        if peak and 'flops' in metrics:
            metrics['mfu'] = metrics['flops'] / peak / self.world_size
        metrics.pop('flops', None)
        self.log(metrics)
        past, left = elapsed(metrics['seconds']), elapsed(seconds_left)
        self.progress(f'step {step}/{max_iters} | {past} elapsed, {left} left | '
                      + (f'reward {metrics["reward/mean"]:.3f} | ' if 'reward/mean' in metrics else '')
                      + f'loss {metrics["train/loss"]:.4f} | lr {metrics["lr"]:.1e} | '
                      + f'{metrics["tok_per_sec"]:,.0f} tok/s'
                      + (f' | mfu {metrics["mfu"]:.1%}' if 'mfu' in metrics else '')
                      + (f' | {skipped} updates skipped' if skipped else ''))

    def progress(self, line):
        """Redraws the progress line on a terminal; prints it as a line of its own elsewhere."""
        if self.main and sys.stdout.isatty():
            self._print(on_line(line), end='')
            self._on_progress_line = True
        else:
            self._print(line)

    def counted(self, count, what):
        """Yields 0 … count-1, the numbers of batches; where that takes long, a progress line says how many are done."""
        return counted(range(count), what, 'batches', show=self.progress)

    def announce(self, text):
        """Prints, after `open`, what the stage is about to do: its data, its model, its steps. report.py finds that in
        starts.jsonl, beside the command and the versions."""
        self.print0(text)
        if self.main:
            import report  # which loads models
            self._start = report.start_of(self, self._step, text)

    def command(self, args):
        """The command of these arguments, as it is typed."""
        program = f'torchrun --nproc_per_node={self.world_size}' if self.world_size > 1 else 'python'
        return f'{program} {shlex.join(args)}'

    def print0(self, text):
        """Prints from rank 0, below the progress line."""
        self._print(('\n' if self._on_progress_line else '') + text)
        self._on_progress_line = False

    def _print(self, text, end='\n'):
        if self.main:
            with contextlib.suppress(OSError):  # a terminal that is gone or a full disk must not end the run
                print(text, end=end, flush=True)

    def sample(self, step, text):
        """Shows a sample of the model and appends it to samples.txt."""
        self.print0('\n'.join(f'  | {line}' for line in text.strip('\n').split('\n')))
        if self.main:
            self._append('samples.txt', f'--- step {step}\n{text}\n')

    def catch_signals(self):
        """Ctrl-C and SIGTERM set `stop`, so that the loop ends after its step; a later Ctrl-C ends at once.

        What comes within seconds is the same request: a terminal and a scheduler signal every process of a job, and
        then torchrun passes on to its processes what it got itself.
        """
        def handle(number, _frame):
            now = time.monotonic()
            if not self.stop:
                self.stop, self._asked = number, now
            elif number == signal.SIGINT and now - self._asked > 5:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handle)

    def stop_signal(self):
        """The signal that asks for an end, or 0, the same in every process."""
        if self.world_size == 1:
            return self.stop
        flag = torch.tensor(self.stop)  # on the CPU, by gloo: a GPU need not wait for the answer
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag)  # self.stop keeps a signal that came meanwhile, for the next step

    def save(self, name, state, keep=1):
        """Writes a checkpoint into the run's directory from rank 0; returns in every process whether it is there.

        state: a nested dict, whose sharded tensors are gathered. keep: number of versions to keep. An error of the disk
        leaves the earlier ones as they are, is reported and added to `failed_saves`; the run continues, and its next
        save tries again. UserError if weights or optimizer state are not finite.
        """
        self._before_writing()
        state = full_state(state, self.main) if self.fsdp else state

        def work():
            bad = not_finite({k: v for k, v in state.items() if k in ('model', 'optimizers')})
            if bad:
                raise UserError(f'step {state["iter"]}: {bad} is not finite and was not saved; {self.out_dir} keeps '
                                'its last checkpoint: lower learning_rate or set grad_clip')
            try:
                save_checkpoint(self.out_dir / name, state, keep)
            except OSError as error:
                return f'{self.out_dir / name}: not saved ({error.strerror})'
            return ''
        error = self.on_main(work)
        if error:
            self.failed_saves[name] = error
            self.print0(f'{error}; training continues, the next save tries again')
        else:
            self.failed_saves.pop(name, None)
        return not error

    def save_checkpoint(self, state, optimizers, score=math.inf, keep=2, resume_state=None):
        """Writes ckpt.pt, and best.pt first where score is the lowest so far: a run that is killed between the two
        writes best.pt again.

        state: what both hold. ckpt.pt also has what only this run needs to go on, as moments, and resume_state. keep:
        how many versions of it stay.
        """
        state = state | {'config': self.config} | ({'script': self.script} if self.script else {})
        score = float(score)  # a NumPy number could not be loaded safely
        if score < self.best and self.save('best.pt', state):
            self.best = score
        self.save('ckpt.pt', state | (resume_state or {}) | {
            'optimizers': [part.state_dict() for part in each(optimizers)], 'scaler': self.scaler.state_dict(),
            'dtypes': [self.dtype, self._decode_dtype], 'best': self.best, 'skipped': int(self.skipped),
            'total_seconds': self.total_seconds()}, keep)

    def finish(self, step, stop=0, **final):
        """Writes summary.json, the last value of every metric and the totals given, and report.md; closes the loggers.

        Ends the process with 128 + stop after a signal, and with 1 where the last save failed.
        """
        self._before_writing()
        if self.main:
            summary = self.last | final | {'total_seconds': round(self.total_seconds(), 1),
                                           'peak_memory_mb': round(peak_memory_mb(self.device), 1),
                                           'flops_per_token': self.flops_per_token}
            try:
                write_atomic(self.out_dir / 'summary.json', lambda f: f.write(json.dumps(summary, indent=1).encode()))
            except OSError as error:
                self.print0(f'{self.out_dir}/summary.json: not written ({error.strerror})')
            self._report()
            if self._wandb:
                self._wandb.finish()
            if self._tensorboard:
                self._tensorboard.close()
        if importlib.util.find_spec('matplotlib'):
            self.print0(f'plot its metrics: python plot.py {self.out_dir}')
        if stop:
            again = [*(a for a in sys.argv if not a.startswith('--init_from=')), '--init_from=resume']
            self.print0(f'stopped at step {step}; resume with: {self.command(again)}')
        for error in self.failed_saves.values():
            if self.main:
                print(f'error: the last save failed: {error}', file=sys.stderr, flush=True)
        if stop or self.failed_saves:
            raise SystemExit(128 + stop if stop else 1)

    def _report(self):
        """Writes report.md. Whatever is wrong with it, the run that it is about has ended well."""
        try:
            import report
            report.write(self.out_dir)
        except Exception as error:
            self.print0(f'{self.out_dir}/report.md: not written ({getattr(error, "strerror", None) or error})')

    def total_seconds(self):
        """Seconds since the run began, everything counted, over all the processes that worked on it in turn."""
        return time.perf_counter() - self.start_time

    def peak_flops(self):
        """The device's peak in FLOP/s at 16 bits, where it is known, else None."""
        if self.device_type == 'cuda' and self.dtype != 'float32':
            name = torch.cuda.get_device_name(self.device)
            return next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
        return None


def elapsed(seconds):
    """1:02:03, or 2:03 under an hour."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


class Meter:
    """Accumulates tokens and weighted means of named values between two lines of a log; tensors stay on the device
    until then.

    flops_per_token: of training, for the fraction of the device's peak (MFU).
    """

    def __init__(self, run, clock, max_iters, flops_per_token):
        self.run, self.clock, self.max_iters, self.flops_per_token = run, clock, max_iters, flops_per_token
        self.pace = None  # seconds of a step, of late
        run.flops_per_token = flops_per_token
        self.reset(0)

    def reset(self, step):
        """Drops what was accumulated: when training begins, after a line of the log and after an evaluation."""
        self.step, self.seconds = step, self.clock.read()
        self.tokens, self.sums, self.weights = 0, {}, {}

    def add(self, tokens=0, weight=1.0, **values):
        """Counts tokens, and values in the means of their names, with this weight: that of a mean over some tokens is
        their number, so that what is logged is the mean over all of them."""
        self.tokens += tokens
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * weight
            self.weights[name] = self.weights.get(name, 0.0) + weight

    def log(self, step, loss, grad_norm, lr, **more):
        """Logs a line for this step, over all processes: mean loss, means of what was added, and more. The host waits
        for the device here."""
        names = sorted(self.sums)  # in the same order in every process
        totals = [float(total[name]) for total in (self.sums, self.weights) for name in names]
        loss, tokens, *totals = self.run.sum(loss.item(), self.tokens, *totals)
        means = {name: totals[i] / totals[i + len(names)] for i, name in enumerate(names)}
        seconds = self.clock.read()
        rate = tokens / (seconds - self.seconds)
        pace = (seconds - self.seconds) / (step - self.step)
        self.pace = pace if self.pace is None else 0.8 * self.pace + 0.2 * pace
        self.run.log_step({'iter': step, 'train/loss': loss / self.run.world_size, 'lr': lr,
                           'grad_norm': grad_norm.item(), **means, **more, 'tok_per_sec': rate, 'seconds': seconds,
                           'flops': rate * self.flops_per_token}, self.max_iters, (self.max_iters - step) * self.pace)
        self.reset(step)


class Clock:
    """Seconds of training, between start() and stop(): without evaluations, samples and checkpoints."""

    def __init__(self, seconds=0.0):
        self.seconds, self.started = seconds, None

    def read(self):
        return self.seconds + (time.perf_counter() - self.started if self.started is not None else 0)

    def stop(self):
        self.seconds, self.started = self.read(), None

    def start(self):
        self.started = time.perf_counter()
