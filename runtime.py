"""
The process around a stage's loop: knobs from config files and the command line, device and precision, processes under
torchrun, checkpoints that are whole at every instant, metrics, one progress line, signals.

A stage's knobs are its plain module globals; the comment beside each is its help text. `configure` overrides them from
`config/FILE.py` (plain assignments, never executed) and `--key=value`, in the order given.
"""
import ast
import contextlib
import ctypes
import dataclasses
import difflib
import inspect
import io
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import tokenize
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokenizer import UserError

# ----------------------------------------------------------------------------------------------------------------------
# knobs

OPERATORS = {ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b, ast.Mult: lambda a, b: a * b,
             ast.Div: lambda a, b: a / b, ast.FloorDiv: lambda a, b: a // b}


def _evaluate(node, names):
    """The value of a literal, an earlier name or arithmetic on them; ValueError for anything else. Runs no code."""
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_evaluate(node.left, names), _evaluate(node.right, names))
    return ast.literal_eval(node)


def _knobs_of(source, defaults):
    """{name: (default, comment)} for the lower-case top-level assignments of a module's or dataclass's source."""
    comments = {tok.start[0]: tok.string.lstrip('# ') for tok in
                tokenize.generate_tokens(io.StringIO(source).readline) if tok.type == tokenize.COMMENT}
    tree = ast.parse(source)
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else tree.body
    knobs = {}
    for node in body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, 'target', None)
        if isinstance(target, ast.Name) and target.id.islower() and not target.id.startswith('_'):
            knobs[target.id] = (defaults[target.id], comments.get(node.lineno, ''))
    return knobs


def _convert(key, value, default, where):
    """value as the type of the knob's default; text from the command line is parsed, anything else checked."""
    text = isinstance(value, str)
    if isinstance(default, bool):
        if text and value.lower() in ('true', 'false', '1', '0', 'yes', 'no'):
            return value.lower() in ('true', '1', 'yes')
        if isinstance(value, bool):
            return value
    elif isinstance(default, (int, float)):
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            if isinstance(value, bool):
                raise ValueError
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
        return type(default)(value) if isinstance(value, (list, tuple)) else type(default)([value])
    raise UserError(f'{where}: {key}={value!r} must be {_kind(default)}')


def _kind(default):
    for kind, words in ((bool, 'True or False'), (int, 'a whole number'), (float, 'a number'), (str, 'text')):
        if isinstance(default, kind):
            return words
    return 'a list (give the option several times)'


def _help(namespace, knobs):
    print((namespace.get('__doc__') or '').strip() + '\n\nKnobs (--key=value, or an assignment in a config file):')
    for name, (default, comment) in knobs.items():
        print(f'  --{name}={default}'.ljust(38) + f'  {comment}')


def configure(namespace, *dataclasses_, argv=None):
    """Overrides a stage's globals from config files and --key=value; returns (config, given).

    namespace: the stage's globals(). dataclasses_: classes whose fields are knobs too (GPTConfig). config: the value of
    every global knob; given: the dataclass fields that somebody set. An unknown key, a wrong type or a missing file
    raises UserError; --help prints every knob and exits with status 0.
    """
    argv = sys.argv[1:] if argv is None else argv
    stage = _knobs_of(Path(namespace['__file__']).read_text(encoding='utf-8'), namespace)
    fields = {}
    for cls in dataclasses_:
        defaults = {f.name: f.default for f in dataclasses.fields(cls)}
        fields |= _knobs_of(inspect.cleandoc(inspect.getsource(cls)), defaults)
    knobs, given = stage | {k: v for k, v in fields.items() if k not in stage}, {}
    if '--help' in argv or '-h' in argv:
        _help(namespace, knobs)
        raise SystemExit(0)

    def assign(key, value, where):
        if key not in knobs:
            near = difflib.get_close_matches(key, knobs, n=1)
            hint = f'did you mean {near[0]}?' if near else '--help lists the knobs'
            raise UserError(f'{where}: unknown key {key!r}; {hint}')
        value = _convert(key, value, knobs[key][0], where)
        if isinstance(value, list) and key in seen:
            value = namespace[key] + value
        seen.add(key)
        if key in stage:
            namespace[key] = value
        if key in fields:
            given[key] = value

    seen = set()
    for arg in argv:
        if arg.startswith('--'):
            key, equals, value = arg[2:].partition('=')
            if not equals:
                raise UserError(f'{arg}: write --{key}=VALUE')
            assign(key, value, 'command line')
        else:
            for key, value, where in _read_config(arg, namespace):
                assign(key, value, where)
    return {k: namespace[k] for k in stage}, given


def _read_config(path, namespace):
    """Yields (key, value, where) for each assignment of a config file."""
    try:
        tree = ast.parse(Path(path).read_text(encoding='utf-8'))
    except FileNotFoundError:
        near = difflib.get_close_matches(path, map(str, Path('config').glob('*.py')), n=1)
        hint = f'did you mean {near[0]}?' if near else 'give a config file (config/*.py) or --key=value'
        raise UserError(f'{path}: no such config file; {hint}') from None
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError) as error:
        raise UserError(f'{path}: not a config file of plain assignments ({error})') from None
    names = dict(namespace)
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        where = f'{path}:{node.lineno}'
        try:
            (target,), value = node.targets, _evaluate(node.value, names)
            key = target.id
        except (AttributeError, ValueError, TypeError, ZeroDivisionError):
            raise UserError(f'{where}: a config file holds plain assignments only (key = value)') from None
        names[key] = value
        yield key, value, where


def cli(main):
    """Runs a stage's main(): a UserError becomes one line on standard error and exit status 2."""
    try:
        main()
    except UserError as error:
        print(f'\nerror: {error}' if sys.stdout.isatty() else f'error: {error}', file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print()
        raise SystemExit(130) from None
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------
# files

def write_atomic(path, write):
    """Calls write(file) on a temporary file beside path, flushes it to the disk and renames it: all or nothing."""
    path = Path(path)
    temporary = path.with_name(f'{path.name}.tmp')
    try:
        with open(temporary, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself must reach the disk too
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_checkpoint(path, state):
    """Writes a plain dict of tensors, numbers, strings, lists and dicts that `load_checkpoint` accepts."""
    write_atomic(path, lambda file: torch.save(state, file))


def load_checkpoint(path, map_location='cpu'):
    """Reads a checkpoint file, or the best (else the latest) checkpoint of a run's directory, without running code.

    Raises UserError that names the file when it is missing, damaged or not a checkpoint of this project.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ('best.pt', 'ckpt.pt') if (path / name).is_file()]
        if not found:
            raise UserError(f'{path}: no ckpt.pt in this directory; train a model into it first (--out_dir={path})')
        path = found[0]
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise UserError(f'{path}: no such checkpoint; give the directory of a run (--init_from=out/NAME)') from None
    except Exception as error:  # a damaged zip or pickle can raise nearly anything; none of it is ours
        reason = str(error).strip().split('\n')[0] or type(error).__name__
        raise UserError(f'{path}: not a whole checkpoint, or not safe to load ({reason[:120]})') from None
    missing = [k for k in ('model', 'model_args', 'tokenizer', 'iter') if not isinstance(state, dict) or k not in state]
    if missing:
        raise UserError(f'{path}: not a checkpoint of this project (no {missing[0]!r} in it)')
    if not (isinstance(state['model'], dict) and isinstance(state['model_args'], dict)):
        raise UserError(f"{path}: not a checkpoint of this project ('model' and 'model_args' must be dicts)")
    return state


@contextlib.contextmanager
def user_errors(where=''):
    """Turns a ValueError of the model (an impossible configuration, a misshapen tensor) into a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(f'{where}: {error}' if where else str(error)) from None


# ----------------------------------------------------------------------------------------------------------------------
# the run

PEAK_FLOPS = {'H200': 989e12, 'H100': 989e12, 'A100': 312e12, 'B200': 2250e12, 'L40S': 362e12, 'RTX 4090': 165e12,
              'RTX 3090': 71e12, 'A10G': 70e12, 'T4': 65e12, 'V100': 125e12}  # dense 16-bit, from the data sheets


def pick_device(name):
    """'auto' -> cuda, else mps, else cpu; UserError where the device that was asked for is not there."""
    if name == 'auto':
        return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError):
        raise UserError(f'device={name!r} is not available here; --device=auto takes the best there is') from None
    return name


def pick_dtype(name, device):
    """'auto' -> 16 bits where the device multiplies them faster, else float32. Returns (name, torch dtype)."""
    dtypes = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
    if name == 'auto':
        name = 'float32'
        if device.startswith('cuda'):
            name = 'bfloat16' if torch.cuda.is_bf16_supported() else 'float16'
        elif device == 'cpu' and hasattr(torch.cpu, 'get_capabilities'):
            found = torch.cpu.get_capabilities()
            name = 'bfloat16' if found.get('avx512_bf16') or found.get('amx_bf16') else 'float32'
    if name not in dtypes:
        raise UserError(f'dtype={name!r} is not one of auto, {", ".join(dtypes)}')
    return name, dtypes[name]


def peak_memory_mb(device='cpu'):
    """The largest memory this process has held, in MiB: on CUDA what was allocated there, else resident memory."""
    if device.startswith('cuda'):
        return torch.cuda.max_memory_allocated() / 2 ** 20
    with contextlib.suppress(OSError):  # Linux: getrusage would count the parent's memory before exec
        for line in Path('/proc/self/status').read_text().splitlines():
            if line.startswith('VmHWM'):
                return int(line.split()[1]) / 1024
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage / (2 ** 20 if sys.platform == 'darwin' else 1024)


def keep_freed_memory():
    """Tells glibc to keep freed memory instead of returning it to the system, which hands it back page by page.

    Training frees and takes the same big tensors at every step: without this a fifth of a step is page faults.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library manages as it likes
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD


class Run:
    """One run of a stage: its place among the processes, its precision, its directory and what it tells the world.

    rank, world_size, main (rank 0); device, device_type, dtype; stop: the signal that asks for an end, or 0.
    """

    def __init__(self, config):
        self.config, self.out_dir = config, Path(config['out_dir'])
        self.rank, self.world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
        self.main, device = self.rank == 0, config['device']
        if 'RANK' in os.environ:  # under torchrun
            device = pick_device(device)
            if device == 'cuda':
                device = f'cuda:{os.environ["LOCAL_RANK"]}'
                torch.cuda.set_device(device)
            dist.init_process_group('cpu:gloo,cuda:nccl' if device.startswith('cuda') else 'gloo')
        self.device = pick_device(device)
        self.device_type = self.device.split(':')[0]
        self.dtype, self._torch_dtype = pick_dtype(config['dtype'], self.device)
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=self.dtype == 'float16')
        if self.device_type == 'cpu':
            keep_freed_memory()
        torch.set_float32_matmul_precision('high')  # TF32 where the device has it
        torch.manual_seed(config['seed'])  # the same initial weights in every process
        self.stop, self.last, self._wandb, self._tensorboard, self._line = 0, {}, None, None, False
        self.began = time.perf_counter()

    def autocast(self, T):
        """The context for forward passes over rows of T tokens: 16-bit matrix products where dtype asks for it."""
        stack = contextlib.ExitStack()
        if self.dtype != 'float32':
            stack.enter_context(torch.autocast(self.device_type, self._torch_dtype))
            if self.device_type == 'cpu' and T <= 128:
                # the fused attention kernel is made for long rows: up to here plain products in 16 bits are faster
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        return stack

    def seed(self, index):
        """Seeds dropout as a function of the seed and the micro-batch's number in the whole run, never of history."""
        state = np.random.SeedSequence([self.config['seed'], index]).generate_state(1)
        torch.manual_seed(int(state[0]))

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

    def on_main(self, work):
        """Calls work() in rank 0 while the others wait; its UserError is raised in all of them."""
        error = [None]
        if self.main:
            try:
                work()
            except UserError as e:
                error = [str(e)]
        if self.world_size > 1:
            dist.broadcast_object_list(error)
        if error[0]:
            raise UserError(error[0])

    def open(self, fresh):
        """Makes the run's directory ready and starts the loggers; fresh: an earlier run there is moved aside first."""
        def work():
            if self.config['wandb_log']:
                import wandb
                try:
                    self._wandb = wandb.init(project=self.config['wandb_project'], config=self.config,
                                             name=self.config['wandb_run_name'])
                except wandb.Error as error:
                    raise UserError(f'wandb_log=True: {str(error).splitlines()[0]}') from None
            if self.config['tensorboard_log']:
                try:
                    from torch.utils.tensorboard import SummaryWriter
                except ImportError:
                    raise UserError('tensorboard_log=True needs TensorBoard: pip install tensorboard') from None
            try:
                if fresh and any((self.out_dir / name).exists() for name in ('ckpt.pt', 'best.pt')):
                    n = next(n for n in range(1, 10 ** 6) if not Path(f'{self.out_dir}.{n}').exists())
                    shutil.move(self.out_dir, f'{self.out_dir}.{n}')
                    self.say(f'moved the earlier run in {self.out_dir} to {self.out_dir}.{n}')
                self.out_dir.mkdir(parents=True, exist_ok=True)
                write_atomic(self.out_dir / '.writable', lambda file: None)
                (self.out_dir / '.writable').unlink()
                if fresh:
                    for name in ('metrics.jsonl', 'samples.txt', 'summary.json'):
                        (self.out_dir / name).unlink(missing_ok=True)
            except OSError as error:
                raise UserError(f'out_dir={self.out_dir}: cannot write there ({error.strerror})') from None
            if self.config['tensorboard_log']:
                self._tensorboard = SummaryWriter(self.out_dir / 'tensorboard')
        self.on_main(work)

    def rewind(self, step):
        """Drops what an interrupted run logged after its last checkpoint, so that no row of metrics occurs twice."""
        path = self.out_dir / 'metrics.jsonl'
        if self.main and path.exists():
            keep = []
            for row in path.read_text().splitlines(keepends=True):
                with contextlib.suppress(ValueError):  # the last line may be cut short
                    if json.loads(row)['iter'] <= step:
                        keep.append(row)
                        self.last |= json.loads(row)
            write_atomic(path, lambda file: file.write(''.join(keep).encode()))

    def log(self, metrics):
        """Appends a row to metrics.jsonl and passes it to wandb and TensorBoard."""
        if not self.main:
            return
        metrics = {k: float(f'{v:.6g}') if isinstance(v, float) else v for k, v in metrics.items()}
        # a value that JSON has no spelling for (nan, inf) becomes null
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        self.last |= row
        with open(self.out_dir / 'metrics.jsonl', 'a', encoding='utf-8') as file:
            file.write(json.dumps(row) + '\n')
        if self._wandb:
            self._wandb.log(metrics, step=metrics['iter'])
        if self._tensorboard:
            for key, value in metrics.items():
                if key != 'iter':
                    self._tensorboard.add_scalar(key, value, metrics['iter'])

    def progress(self, line):
        """Redraws the progress line on a terminal; prints it as a line of its own elsewhere."""
        if self.main and sys.stdout.isatty():
            width = shutil.get_terminal_size().columns - 1
            print(f'\r{line[:width]:<{width}}', end='', flush=True)
            self._line = True
        elif self.main:
            print(line, flush=True)

    def say(self, text):
        """Prints from rank 0, below the progress line."""
        if self.main:
            print(('\n' if self._line else '') + text, flush=True)
            self._line = False

    def sample(self, step, text):
        """Shows a sample of the model and appends it to samples.txt."""
        self.say('\n'.join(f'  | {line}' for line in text.strip('\n').split('\n')))
        with open(self.out_dir / 'samples.txt', 'a', encoding='utf-8') as file:
            file.write(f'--- step {step}\n{text}\n')

    def catch_signals(self):
        """Ctrl-C and SIGTERM set `stop`, so that the loop ends after its step; a second one ends at once."""
        def handle(number, _frame):
            self.stop = number
            signal.signal(number, signal.SIG_DFL)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handle)

    def stopping(self):
        """The signal that asks for an end, or 0, the same in every process."""
        if self.world_size == 1:
            return self.stop
        flag = torch.tensor(self.stop)  # on the CPU, by gloo: a GPU need not wait for the answer
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag)  # self.stop keeps a signal that came meanwhile, for the next step

    def save(self, name, state):
        """Writes a checkpoint into the run's directory, from rank 0."""
        self.on_main(lambda: save_checkpoint(self.out_dir / name, state))

    def finish(self, **final):
        """Writes summary.json: the last value of every metric and the totals given; closes the loggers."""
        if self.main:
            summary = self.last | final | {'total_seconds': round(self.total_seconds(), 1),
                                           'peak_memory_mb': round(peak_memory_mb(self.device), 1)}
            write_atomic(self.out_dir / 'summary.json', lambda f: f.write(json.dumps(summary, indent=1).encode()))
            if self._wandb:
                self._wandb.finish()
            if self._tensorboard:
                self._tensorboard.close()

    def total_seconds(self):
        """Seconds since the run began, everything counted, over all the processes that worked on it in turn."""
        return time.perf_counter() - self.began

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


class Clock:
    """Seconds of training, without what happens between pause() and resume(): evaluations, samples, saves."""

    def __init__(self, seconds=0.0):
        self.seconds, self.started = seconds, time.perf_counter()

    def read(self):
        return self.seconds + (time.perf_counter() - self.started if self.started is not None else 0)

    def pause(self):
        self.seconds, self.started = self.read(), None

    def resume(self):
        self.started = time.perf_counter()
