"""
Measure: speed as a share of what the machine can do, or beside another program in the same run; a table and JSON.

    python bench.py train config/gpt2.py [--key=value …]    tokens/s, where a step's time goes, MFU, memory; the loader
    python bench.py sample --init_from=out/tiny             prefill and decode tokens/s against the memory's bandwidth
    python bench.py sample --init_from=smollm2 --against=transformers    the same generation by transformers, in turn
    python bench.py sample --init_from=smollm2 --draft=out/small    with speculative decoding and without, in turn
    python bench.py stream --init_from=smollm2              loss per token of a stream ten contexts long, in a window
    python bench.py serve --init_from=smollm2               clients of serve.py, one after another and at once
    python bench.py tokenizer                               BPE training and encoding, MB/s
    python bench.py ablate [--what=norm,mlp …]              small variants, three seeds each, their curves with bands
    python bench.py scaling                                 a ladder of models, its scaling law, a larger run foretold
    python bench.py memory                                  bytes per GPU of three models by the sharding used
    python bench.py train config/nanogpt.py --against=DIR   side by side, in turn: DIR is a checkout of nanoGPT, or
    python bench.py loss --against=NANOGPT                  (every mode but memory) another checkout of this project
    torchrun --standalone --nproc_per_node=2 bench.py train config/tiny.py --gradient_accumulation_steps=2 [--fsdp=True]

Every knob of train.py and GPTConfig may be set. nanoGPT is run from a temporary copy, unchanged but for its seed.

MFU is model FLOP/s (arXiv:2204.02311, B) over the FLOP/s of a large matrix product measured in the same precision.
Communication is the time in which a collective of gloo or nccl was under way (from torch.profiler); it may lie inside
the backward pass. The bandwidth floor of decoding is the time to read all weights and the cache once per step; a model
that fits into the processor's cache can be faster.
"""
import contextlib
import difflib
import importlib.util
import json
import math
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import runtime

import numpy as np
import torch
import torch.nn.functional as F

import scaling
from beam import beam_search
from convert import to_hf
from dataset import PairData, TokenData, find_dataset
from generate import RollingCache, check_prompts, generate, pack, state_bytes, stream
from load import load_draft, load_model
from model import GATED, GPT, GPTConfig, on_meta
from optim import make_optimizers
from plot import draw_mean, logged, mean_and_spread, new_figure, points, report
from speculative import Draft
from tokenizer import GPT4_PATTERN, UserError, train_bpe

against = ''  # checkout of nanoGPT or of this project to compare with; mode sample: also 'transformers'
repeats = 3  # runs of each side, in turn; mode loss: each with a seed of its own
steps = 20  # mode train: steps to time, after warming up
profile = False  # mode train: write a torch.profiler trace (Chrome, Perfetto) and print the operators that take longest
memory = True  # mode train: the peak memory of a step beside one with all logits in float32, in processes of their own
batches = [1, 8]  # mode sample: texts at a time; mode serve: clients at a time
contexts = [16, 128, 512]  # mode sample: tokens of context before the new ones; those that fit into block_size
max_new_tokens = 64  # modes sample and serve: tokens to add to each text
num_samples = 1  # mode sample against transformers: above 1, so many continuations of each text, drawn: a rollout
draft = ''  # mode sample: what proposes tokens, as in sample.py, to be measured beside the model alone
draft_tokens = [2, 4]  # mode sample with a draft: tokens that are proposed at a time
chat = False  # mode sample with a draft: ask questions in a chat, the lines of input or eight of ours
quant = ''  # mode sample: 'fp16' or 'int8', weights in 16 or 8 bits on a CPU
what = 'all'  # mode ablate: norm, place, position, mlp, heads, gate, sinks, hybrid, rates, optimizer, smoothing …
seeds = 3  # mode ablate: runs of each variant, of seeds 1, 2, 3 …, or from --seed on
ladder = ['1x32', '1x64', '2x64', '2x96', '3x128']  # mode scaling: sizes, layers x width; heads are 32 wide
larger = '4x160'  # mode scaling: the size whose loss after the longest of lengths is predicted before it is trained
lengths = [109, 218, 437, 874]  # mode scaling: steps of each size; 874 read data/shakespeare once
input = ''  # modes tokenizer, stream, and sample with a draft: text file; default: the works of data/shakespeare
results = 'out/bench'  # where the results and the runs go

TRAIN = Path(__file__).parent / 'train.py'
TRAIN_DEFAULTS = {key: default for key, (default, _) in runtime.knobs_of_file(TRAIN).items()}
MODEL_DEFAULTS = {field.name: field.default for field in fields(GPTConfig)}
OWN_KNOBS = runtime.knobs_of_file(__file__)


# ----------------------------------------------------------------------------------------------------------------------
# what the machine can do

def synchronize(device):
    if device.startswith('cuda'):
        torch.cuda.synchronize(device)


def seconds_of(work, device, times=5):
    """The least seconds that work() takes, of several times after one to warm up."""
    best = float('inf')
    for i in range(times + 1):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - began) if i else best
    return best


def matmul_peak(device, dtype):
    """FLOP/s of a large square matrix product."""
    n = 8192 if device.startswith('cuda') else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n ** 3 / seconds_of(lambda: a @ b, device)


def read_bandwidth(device):
    """Bytes/s at which a tensor far larger than any cache is read."""
    x = torch.ones(1 << (30 if device.startswith('cuda') else 27), device=device)
    return x.nbytes / seconds_of(x.sum, device)


# ----------------------------------------------------------------------------------------------------------------------
# mode train

def training(knobs, model_args):
    """Everything that a step of train.py needs -> (run, data, model, step); step(lap) makes one and returns nothing."""
    if model_args.get('n_encoder_layer'):
        raise UserError(f'n_encoder_layer={model_args["n_encoder_layer"]}: language models on running text are '
                        'measured here; only with --against do encoder-decoders run')
    run = runtime.Run(knobs.out_dir, knobs.device, knobs.dtype, knobs.seed, knobs.fsdp)
    run.check_accumulation(knobs.gradient_accumulation_steps)
    run.on_main(lambda: find_dataset(knobs.dataset))
    block_size = model_args.get('block_size', GPTConfig.block_size)
    data = TokenData(find_dataset(knobs.dataset), 'train', block_size, knobs.seed)
    if model_args.get('vocab_size', data.tokenizer.n_vocab) < data.tokenizer.n_vocab:
        raise UserError(f'vocab_size={model_args["vocab_size"]} is smaller than the {data.tokenizer.n_vocab} tokens of '
                        f'{knobs.dataset}')
    with runtime.user_errors():
        model = GPT(GPTConfig(**{'vocab_size': data.tokenizer.n_vocab} | model_args))
        net = run.wrap(model, knobs.compile, knobs.activation_checkpointing)
        optimizers = make_optimizers(model.named_parameters(), knobs.optimizer, knobs.learning_rate, knobs.weight_decay,
                                     (knobs.beta1, knobs.beta2), knobs.embed_lr, knobs.muon_lr, knobs.muon_momentum)
    for group in optimizers.param_groups:
        group['lr'] *= 1e-3  # however long it is measured, the model stays one that trains
    n = [0]

    def step(lap=lambda part: None):
        micro_steps = knobs.gradient_accumulation_steps // run.world_size
        for number in run.micro_batches(net, knobs.gradient_accumulation_steps):
            index = n[0] * knobs.gradient_accumulation_steps + number
            x, y = run.to_device(*data.batch(index * knobs.batch_size, knobs.batch_size))
            run.seed_dropout(index)
            lap('data')
            with run.autocast(data.block_size):
                loss = net(x, y) / micro_steps
            lap('forward')
            run.backward(loss)
            lap('backward')
        grad_norm = run.clip_grad_norm(model, optimizers, knobs.grad_clip)
        run.skip_if_not_finite(optimizers, grad_norm)
        optimizers.step()
        optimizers.zero_grad()
        lap('optimizer')
        n[0] += 1
    return run, data, model, step


def split_of(run, step, n):
    """Seconds of n steps by part, the device synchronised between them."""
    parts, last = dict.fromkeys(('data', 'forward', 'backward', 'optimizer'), 0.0), [time.perf_counter()]

    def lap(part):
        synchronize(run.device)
        now = time.perf_counter()
        parts[part] += now - last[0]
        last[0] = now
    for _ in range(n):
        step(lap)
    return parts


def communication(events):
    """Seconds in which at least one collective was under way."""
    spans = sorted((e.time_range.start, e.time_range.end) for e in events if e.name.startswith(('gloo:', 'nccl')))
    total, end = 0.0, 0.0
    for begin, finish in spans:
        total += max(0.0, finish - max(begin, end))
        end = max(end, finish)
    return total / 1e6


def bench_train(knobs, model_args):
    run, data, model, step = training(knobs, model_args)
    for _ in range(3):
        step()
    synchronize(run.device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(run.device)
    seconds = (time.perf_counter() - began) / steps
    parts = split_of(run, step, steps)
    with torch.profiler.profile() if profile or run.world_size > 1 else contextlib.nullcontext() as profiler:
        for _ in range(3 if profiler else 0):
            step()
        synchronize(run.device)
    tokens = knobs.gradient_accumulation_steps * knobs.batch_size * data.block_size
    row = {'tokens/s': tokens / seconds, 'ms/step': seconds * 1000}
    row |= {f'{part} %': 100 * value / sum(parts.values()) for part, value in parts.items()}
    if run.world_size > 1:
        row['communication ms/step'] = communication(profiler.events()) / 3 * 1000
    loader = seconds_of(lambda: [run.to_device(*data.batch(i * knobs.batch_size, knobs.batch_size))
                                 for i in range(50)], run.device)
    row['loader tokens/s'] = 50 * knobs.batch_size * data.block_size / loader
    peak = matmul_peak(run.device, getattr(torch, run.dtype))
    achieved = model.flops_per_token(data.block_size) * tokens / seconds / run.world_size
    row |= {'TFLOP/s': achieved / 1e12, 'matmul peak TFLOP/s': peak / 1e12, 'MFU %': 100 * achieved / peak,
            'peak memory MB': runtime.peak_memory_mb(run.device)}
    if run.main and memory and run.world_size == 1:
        row |= peak_memories(knobs, model.config)
    if not run.main:
        return None
    if profile:
        Path(results).mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(f'{results}/trace.json')
        order = 'self_cuda_time_total' if run.device_type == 'cuda' else 'self_cpu_time_total'
        print(profiler.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=40))
        print(f'trace: {results}/trace.json (open it in ui.perfetto.dev)')
    return [row | {'parameters': model.num_params(), 'device': run.device, 'dtype': run.dtype,
                   'processes': run.world_size}], {}


def peak_memories(knobs, config):
    """Peak MB of a step, and of one whose (B, T, V) logits are a float32 tensor, beyond what the process had before."""
    largest = 4 * knobs.batch_size * config.block_size * config.vocab_size
    if largest > 4e9 and not runtime.pick_device(knobs.device).startswith('cuda'):
        print(f'(memory: all logits in float32 would take {largest / 1e9:.0f} GB several times over: left out)')
        return {}
    if math.isnan(resident_bytes()):
        print('(memory: only Linux tells what a process holds, in /proc: left out)')
        return {}
    found = []
    for full in (0, 1):
        args = [__file__, 'step', *sys.argv[2:], f'--steps={full}', '--memory=False']
        found.append(float(command(args, env=os.environ).split()[-1]))
    return {'step memory MB': found[0], 'with all logits MB': found[1], 'memory ratio': found[0] / found[1]}


def one_step(knobs, model_args):
    """A process of its own for `peak_memories`: prints the MB that one step takes; steps=1: with all logits."""
    resident = resident_bytes()  # before there is a model
    run, _, _, step = training(knobs, model_args)
    forward = GPT.forward
    if steps:
        GPT.forward = lambda self, idx, targets: F.cross_entropy(forward(self, idx).flatten(0, 1), targets.flatten())
    step()
    synchronize(run.device)
    before = 0 if run.device_type == 'cuda' else resident / 2 ** 20
    print(runtime.peak_memory_mb(run.device) - before)


# ----------------------------------------------------------------------------------------------------------------------
# side by side

def command(args, **options):
    """Runs a Python script to its end and returns what it printed; UserError with its last words if it fails."""
    done = subprocess.run([sys.executable, *map(str, args)], capture_output=True, encoding='locale', **options)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [f'status {done.returncode}']
        raise UserError(f'{" ".join(map(str, args[:2]))} failed: {said[-1]}')
    return done.stdout


def absolute(args):
    """Arguments whose paths mean the same in any folder."""
    parts = [arg.rpartition('=') for arg in args]
    return [f'{key}{equals}{Path(value).absolute() if Path(value).exists() and value else value}'
            for key, equals, value in parts]


def project_run(folder, seed, iters):
    """A checkout's own train.py with the arguments given -> {'seconds', 'ms' per step, 'val' loss}."""
    args = [a for a in absolute(sys.argv[2:]) if a.partition('=')[0][2:] not in OWN_KNOBS]
    print(f'{folder}, seed {seed} …', end=' ', flush=True)
    run = Path(results).absolute() / 'run-to-compare'
    shutil.rmtree(run, ignore_errors=True)
    iters = [f'--max_iters={iters}', f'--eval_interval={iters}', '--eval_iters=1'] if iters else ['--eval_iters=0']
    command([Path(folder).absolute() / 'train.py', *args, *iters, f'--out_dir={run}', f'--seed={seed}',
             '--sample_tokens=0'], cwd=folder)
    rows = [json.loads(line) for line in (run / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]
    summary = json.loads((run / 'summary.json').read_text(encoding='utf-8'))
    rate = statistics.median(row['tok_per_sec'] for row in rows if 'tok_per_sec' in row)
    result = {'seconds': summary['seconds'], 'ms': 1000 * summary['tokens'] / summary['iter'] / rate,
              'val': summary['val/loss']}
    print({k: round(v, 4) for k, v in result.items()}, flush=True)
    return result


def nanogpt_run(knobs, model_args, seed, iters):
    """nanoGPT's own train.py on our tokens -> {'seconds' of training, 'ms' per step, 'val' loss over the whole split}.

    Its time includes printing a line a step and leaves out evaluations: those steps count as a median step.
    """
    dtype = runtime.pick_dtype(knobs.dtype, runtime.pick_device(knobs.device))[0]
    config = GPTConfig(**model_args)
    flags = {k: getattr(config, k) for k in ('block_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias')}
    flags |= {k: getattr(knobs, k) for k in ('batch_size', 'gradient_accumulation_steps', 'compile', 'learning_rate',
                                             'min_lr', 'warmup_iters', 'weight_decay', 'beta1', 'beta2', 'grad_clip')}
    flags |= {'device': runtime.pick_device(knobs.device), 'dtype': dtype, 'max_iters': iters, 'log_interval': 1,
              'lr_decay_iters': knobs.lr_decay_iters or knobs.max_iters, 'eval_interval': 250, 'eval_iters': 20,
              'always_save_checkpoint': True, 'dataset': 'tokens', 'out_dir': 'out'}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / 'nanoGPT'
        shutil.copytree(against, copy, ignore=shutil.ignore_patterns('.git', 'out*', '*.bin'))
        script = (copy / 'train.py').read_text(encoding='utf-8')
        script = script.replace('torch.manual_seed(1337 + ', f'torch.manual_seed({seed} + ')
        (copy / 'train.py').write_text(script, encoding='utf-8')
        tokens = copy / 'data' / 'tokens'
        tokens.mkdir()
        largest = 0
        for split in ('train', 'val'):  # as nanoGPT reads them: uint16 without a header, of at most 20 million tokens
            split_data = TokenData(find_dataset(knobs.dataset), split, 1)
            x, y = split_data.read(np.arange(min(split_data.n_tokens, 20_000_000) - 1))
            np.append(x, y[-1]).astype(np.uint16).tofile(tokens / f'{split}.bin')
            largest = max(largest, int(x.max()), int(y.max()))
        vocab_size = model_args.get('vocab_size', largest + 1)  # by itself it counts the characters
        (tokens / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': vocab_size}))
        print(f'nanoGPT, seed {seed} …', end=' ', flush=True)
        lines = command(['train.py', *(f'--{k}={v}' for k, v in flags.items())], cwd=copy)
        times = {int(i): float(ms) for i, ms in re.findall(r'iter (\d+): .* time ([\d.]+)ms', lines)}
        ms = statistics.median(times.values())
        result = {'seconds': sum(ms if i % 250 == 0 else times[i] for i in range(iters)) / 1000, 'ms': ms,
                  'val': nanogpt_loss(copy, knobs, config)}
    print({k: round(v, 4) for k, v in result.items()}, flush=True)
    return result


@torch.no_grad()
def nanogpt_loss(copy, knobs, config):
    """Loss of nanoGPT's final checkpoint over the windows that our evaluations read."""
    spec = importlib.util.spec_from_file_location('nanogpt_model', copy / 'model.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    device = runtime.pick_device(knobs.device)
    state = torch.load(copy / 'out' / 'ckpt.pt', map_location=device, weights_only=True)
    model = module.GPT(module.GPTConfig(**state['model_args'])).to(device).eval()
    model.load_state_dict({k.removeprefix('_orig_mod.'): v for k, v in state['model'].items()})
    data = TokenData(find_dataset(knobs.dataset), 'val', config.block_size)
    x, y = (torch.from_numpy(a).to(device) for a in data.read(data.fixed(0)))
    rows = max(1, 4096 // config.block_size)
    return sum(model(a, b)[1].item() * len(a) for a, b in zip(x.split(rows), y.split(rows), strict=True)) / len(x)


def pairs(run_a, run_b):
    """Runs A and B in turn, `repeats` times, the order swapped each time -> [(what A returned, what B did), …]."""
    found = {run_a: [], run_b: []}
    for i in range(repeats):
        for run in (run_a, run_b) if i % 2 == 0 else (run_b, run_a):
            found[run].append(run(1337 + i))
    return list(zip(found[run_a], found[run_b], strict=True))


def compare_training(mode, knobs, model_args):
    """Modes train and loss against a checkout: whole runs of train.py on either side."""
    find_dataset(knobs.dataset)
    iters = max(100, 5 * steps) if mode == 'train' else 0
    if (Path(against) / 'configurator.py').is_file():
        if mode == 'loss':  # its recipe for a CPU is the yardstick, whatever ours is
            recipe = {key: value for key, value, _ in runtime.read_config(TRAIN.parent / 'config/nanogpt.py')}
            model_args = {k: v for k, v in recipe.items() if k in MODEL_DEFAULTS}
            knobs = SimpleNamespace(**vars(knobs) | {k: v for k, v in recipe.items() if k in TRAIN_DEFAULTS})
        theirs, name = lambda seed: nanogpt_run(knobs, model_args, seed, iters or knobs.max_iters), 'nanoGPT'
    else:
        theirs, name = lambda seed: project_run(against, seed, iters), against
    rows = [{'ours ms/step': a['ms'], f'{name} ms/step': b['ms'], 'tokens/s ratio': b['ms'] / a['ms'],
             'ours s': a['seconds'], f'{name} s': b['seconds'], 'time ratio': a['seconds'] / b['seconds'],
             'ours val loss': a['val'], f'{name} val loss': b['val']}
            for a, b in pairs(lambda seed: project_run(Path(__file__).parent, seed, iters), theirs)]
    if mode == 'train':  # of runs this short only the speed means something
        rows = [{k: v for k, v in row.items() if 'step' in k or k == 'tokens/s ratio'} for row in rows]
    return rows, {f'{key}, mean': statistics.mean(row[key] for row in rows) for key in rows[0]}


def compare_modes(mode):
    """Any other mode against another checkout of this project: its bench.py and ours, and the ratio of each speed."""
    args = [a for a in absolute(sys.argv[2:]) if not a.startswith('--against=')]

    def run(folder):
        out = command([Path(folder).absolute() / 'bench.py', mode, *args], cwd=folder)
        path = re.findall('written to (.*)', out)[-1]
        return json.loads((Path(folder) / path).read_text(encoding='utf-8'))['rows']
    found = pairs(lambda seed: run(Path(__file__).parent), lambda seed: run(against))
    rows = []
    for i, (a, b) in enumerate(zip(*found[0], strict=False)):
        for key in [k for k in a if k.endswith('/s') and k in b]:
            ratios = [ours[i][key] / theirs[i][key] for ours, theirs in found]
            rows.append({'row': i + 1, 'figure': key, 'ratio': statistics.median(ratios), 'least': min(ratios),
                         'most': max(ratios)})
    if not rows:
        raise UserError(f'--against={against}: its bench.py {mode} has no figure in common with this one')
    return rows, {}


# ----------------------------------------------------------------------------------------------------------------------
# the other modes

def generation_rates(model, prompts, seed, use_cache):
    """Tokens/s of reading prompts of one length, and of writing max_new_tokens to each."""
    synchronize(str(model.tok_emb.weight.device))
    times = [time.perf_counter()]
    for _ in stream(model, prompts, max_new_tokens + 1, seed=seed, use_cache=use_cache):
        times.append(time.perf_counter())  # the ids are on the host: the step is over
    return (len(prompts) * len(prompts[0]) / (times[1] - times[0]),
            len(prompts) * max_new_tokens / (times[-1] - times[1]))


def bench_sample(knobs, model_args):
    """Prefill and decode at several batch sizes and contexts, cached and re-reading, against the bandwidth floor."""
    device = runtime.pick_device(knobs.device)
    if device == 'cpu':
        runtime.keep_freed_memory()
    if knobs.init_from != 'scratch':
        model, tokenizer = load_model(knobs.init_from, **model_args)
    else:
        with runtime.user_errors():
            model, tokenizer = GPT(GPTConfig(**model_args)), None
    if model.config.n_encoder_layer or not model.config.causal:
        raise UserError('mode sample measures language models, and this one has an encoder or is one')
    model = model.to(device, runtime.pick_dtype(knobs.dtype, device, model.num_params())[1]).eval()
    if against:
        return against_transformers(model, tokenizer, device)
    weight_bytes = sum(p.nbytes for n, p in model.named_parameters()
                       if model.config.tie_weights or n != 'tok_emb.weight')
    size = model.tok_emb.weight.itemsize
    with runtime.user_errors():
        pack(model, quant)
    if draft:
        return against_drafted(model, tokenizer, device, knobs.dtype)
    if quant:
        weight_bytes = weight_bytes // size * (2 if quant == 'fp16' else 1)
    config, bandwidth, rows = model.config, read_bandwidth(device), []
    generator = torch.Generator().manual_seed(1)
    for context in [c for c in contexts if c + max_new_tokens <= config.block_size]:
        for batch in batches:
            prompts = torch.randint(config.vocab_size, (batch, context), generator=generator).tolist()
            rates = [generation_rates(model, prompts, i, use_cache) for i in range(repeats + 1)
                     for use_cache in (True, False)][2:]  # the first pair warms up
            prefill, cached = (statistics.median(column) for column in zip(*rates[::2], strict=True))
            again = statistics.median(rate for _, rate in rates[1::2])
            per_token = config.cache_width * size
            kept = per_token * (context + max_new_tokens / 2) + 2 * state_bytes(config, size)  # states are written, too
            floor = batch * bandwidth / (weight_bytes + batch * kept)
            rows.append({'context': context, 'batch': batch, 'prefill tokens/s': prefill, 'decode tokens/s': cached,
                         're-reading tokens/s': again, 'cache gains': cached / again, 'floor tokens/s': floor,
                         'of floor %': 100 * cached / floor, 'cache bytes per token': per_token})
    if not rows:
        raise UserError(f'contexts={contexts} and max_new_tokens={max_new_tokens} do not fit into block_size='
                        f'{config.block_size}')
    return rows, {'bandwidth GB/s': bandwidth / 1e9, 'weights MB': weight_bytes / 1e6}


def against_transformers(model, tokenizer, device):
    """Greedy generation after random prompts of contexts[0] tokens, here and by transformers' generate with its cache;
    with num_samples several continuations of each, drawn at temperature 1, ours with their log-probabilities.

    In turn; tokens/s include the prompt's reading.
    """
    import transformers
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        to_hf(model, Path(folder) / 'model', tokenizer)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / 'model',
                                                                   dtype=model.tok_emb.weight.dtype)
    theirs = theirs.to(device).eval()
    theirs.generation_config.eos_token_id = theirs.generation_config.pad_token_id = None
    with runtime.user_errors():
        pack(model, quant)
    rows, generator, drawn = [], torch.Generator().manual_seed(1), num_samples > 1
    for batch in batches:
        ids = torch.randint(model.config.vocab_size, (batch, contexts[0]), generator=generator)

        def ours(ids=ids):
            return generate(model, ids.tolist(), max_new_tokens, temperature=float(drawn), num_samples=num_samples)

        def hf(ids=ids):
            with torch.inference_mode():
                return theirs.generate(ids.to(device), attention_mask=torch.ones_like(ids).to(device), do_sample=drawn,
                                       **({'top_k': 0} if drawn else {}), num_return_sequences=num_samples,
                                       min_new_tokens=max_new_tokens, max_new_tokens=max_new_tokens)
        times = [(seconds_of(ours, device, 1), seconds_of(hf, device, 1)) for _ in range(repeats)]
        same = sum(a == b for a, b in zip(sum(ours(), []), hf()[:, contexts[0]:].flatten().tolist(), strict=True))
        ratios, n_new = [b / a for a, b in times], batch * num_samples * max_new_tokens
        rows.append({'batch': batch, 'context': contexts[0], 'new': max_new_tokens,
                     'ours tokens/s': n_new / statistics.median(a for a, _ in times),
                     'transformers tokens/s': n_new / statistics.median(b for _, b in times),
                     'ratio': statistics.median(ratios), 'least': min(ratios), 'most': max(ratios),
                     **({} if drawn else {'same tokens %': 100 * same / n_new})})
    return rows, {'dtype': str(model.tok_emb.weight.dtype), 'quant': quant}


def against_drafted(model, tokenizer, device, dtype):
    """Answers to questions, or continuations of texts, one at a time, with a draft and without, in turn: greedily and
    at temperature 0.8. Texts are eight pieces, contexts[0] tokens long, of the last tenth of input."""
    small = load_draft(draft, 1, model, tokenizer, device=device, dtype=dtype, quant=quant).model
    if chat:
        questions = texts_of(input)[0].splitlines() if input else QUESTIONS
        prompts = [tokenizer.chat_ids([{'role': 'user', 'content': q}], generate=True)[0] for q in questions]
    else:
        text = ''.join(texts_of(input))
        tail = text[-len(text) // 10:]
        prompts = [tokenizer.encode(tail[i * len(tail) // 8:])[:contexts[0]] for i in range(8)]
    rows = []

    def answers(temperature, seed, drafted):
        began = time.perf_counter()
        with runtime.user_errors():
            new = [generate(model, [prompt], max_new_tokens, temperature=temperature, seed=seed, draft=drafted,
                            stop_ids=tokenizer.turn_ids, vocab_limit=tokenizer.n_vocab)[0] for prompt in prompts]
        return new, sum(map(len, new)) / (time.perf_counter() - began)
    for temperature in (0.0, 0.8):
        for n in draft_tokens:
            drafted = Draft(small, n)
            runs = [(answers(temperature, i, drafted), answers(temperature, i, None)) for i in range(repeats)]
            ratios = [with_draft[1] / alone[1] for with_draft, alone in runs]
            same = sum(a == b for with_draft, alone in runs for a, b in zip(with_draft[0], alone[0], strict=True))
            rows.append({'temperature': temperature, 'proposed at a time': n,
                         'accepted %': 100 * drafted.accepted / drafted.proposed,
                         'tokens per pass': drafted.tokens / drafted.passes,
                         'tokens/s': statistics.median(r[0][1] for r in runs),
                         'alone': statistics.median(r[1][1] for r in runs),
                         'ratio': statistics.median(ratios), 'least': min(ratios), 'most': max(ratios),
                         'same texts': '' if temperature else f'{same} of {repeats * len(prompts)}'})
    return rows, {'dtype': str(model.tok_emb.weight.dtype), 'quant': quant, 'draft': draft}


QUESTIONS = ('What is the capital of France?', 'Tell me a story about a dragon.', 'Explain photosynthesis.',
             'Write a poem about rain.', 'How do I bake bread?', 'List ten animals.', 'What is gravity?',
             'Why is the sky blue?')


def stream_of(address, question, chat):
    """Asks a server, in a chat or for a text's continuation -> (the answer, its tokens, seconds to the first)."""
    body = {'max_tokens': max_new_tokens, 'temperature': 0, 'stream': True, 'stream_options': {'include_usage': True}}
    body |= {'messages': [{'role': 'user', 'content': question}]} if chat else {'prompt': question}
    path = 'chat/completions' if chat else 'completions'
    request = urllib.request.Request(f'{address}/v1/{path}', json.dumps(body).encode())
    began, first, text = time.perf_counter(), None, ''
    with urllib.request.urlopen(request) as reply:
        for line in reply:
            if line.startswith(b'data: {'):
                chunk = json.loads(line[6:])
                first = first or time.perf_counter() - began
                text += ''.join(choice['delta'].get('content', '') if chat else choice['text']
                                for choice in chunk['choices'])
    return text, chunk['usage']['completion_tokens'], first


def bench_serve(knobs, model_args):
    """Eight questions to serve.py, so many clients at a time, in turn: tokens/s of all, and the wait for the first."""
    serve = [sys.executable, Path(__file__).parent / 'serve.py', f'--init_from={knobs.init_from}', '--port=0',
             f'--dtype={knobs.dtype}', f'--quant={quant or "auto"}', f'--max_rows={max(batches)}',
             '--prefix_cache_tokens=0', *[f'--{key}={value}' for key, value in model_args.items()]]
    rates, waits, texts = ({n: [] for n in batches} for _ in range(3))
    with subprocess.Popen(serve, stdout=subprocess.PIPE, encoding='utf-8') as server:
        try:
            address = re.search(r'http://\S+:\d+', server.stdout.readline())
            if not address:
                raise UserError('serve.py did not start, see above')
            with urllib.request.urlopen(f'{address[0]}/v1/models') as reply:
                chat = json.loads(reply.read())['data'][0]['chat']
            for turn in range(repeats + 1):  # the first warms up
                for clients in batches:
                    began = time.perf_counter()
                    with ThreadPoolExecutor(clients) as pool:
                        found = [*pool.map(lambda question: stream_of(address[0], question, chat), QUESTIONS)]
                    seconds = time.perf_counter() - began
                    texts[clients] = [text for text, _, _ in found]
                    if turn:
                        rates[clients].append(sum(n for _, n, _ in found) / seconds)
                        waits[clients] += [first for _, _, first in found]
        finally:
            server.terminate()
    one = batches[0]
    return [{'clients': n, 'tokens/s': statistics.median(rates[n]),
             'over the first row': statistics.median(b / a for a, b in zip(rates[one], rates[n], strict=True)),
             'seconds to the first token': statistics.median(waits[n]), 'longest': max(waits[n]),
             'same texts': f'{sum(a == b for a, b in zip(texts[one], texts[n], strict=True))} of {len(QUESTIONS)}'}
            for n in batches], {'dtype': knobs.dtype, 'quant': quant or 'auto'}


def resident_bytes():
    """What this process holds in memory; nan where the system does not tell."""
    with contextlib.suppress(OSError):
        return int(Path('/proc/self/statm').read_text(encoding='utf-8').split()[1]) * os.sysconf('SC_PAGESIZE')
    return math.nan


def bench_stream(knobs, model_args):
    """Nats per token along a text ten contexts long, through a ring of the window, with attention sinks and without."""
    device, losses, summary = runtime.pick_device(knobs.device), [], {}
    if device == 'cpu':
        runtime.keep_freed_memory()
    n_sink, window = model_args.pop('n_sink', 4), model_args.pop('window', 0) or 1024
    text = ''.join(texts_of(input))
    for sinks in (n_sink, 0):
        model, tokenizer = load_model(knobs.init_from, **model_args, window=window, n_sink=sinks, window_pattern='L')
        config, dtype = model.config, runtime.pick_dtype(knobs.dtype, device, model.num_params())[1]
        with runtime.user_errors():
            check_prompts([[0]], config)
        if config.pos == 'learned':
            raise UserError(f"{knobs.init_from} has pos='learned': it cannot stream past block_size="
                            f'{config.block_size}')
        model = pack(model.to(device, dtype).eval())
        ids = tokenizer.encode(text[:60 * config.block_size])[:10 * config.block_size + 1]
        if len(ids) <= 10 * config.block_size:
            raise UserError(f'{input or "the works"}: {len(ids):,} tokens are fewer than ten contexts of '
                            f'{config.block_size}: give a longer text (--input=PATH)')
        cache, parts, resident = RollingCache(config, 1, device), [], []
        ids, began = torch.tensor(ids, device=device)[None], time.perf_counter()
        with torch.inference_mode():
            piece = min(128, config.block_size)
            for x, y in zip(ids[:, :-1].split(piece, dim=1), ids[:, 1:].split(piece, dim=1), strict=True):
                parts.append(model.cross_entropy(model.hidden(x, cache=cache), y, 'none')[0])
                resident.append(resident_bytes() / 1e6)
        losses.append(torch.cat(parts))
        summary |= {f'{sinks} sinks, tokens/s': len(losses[-1]) / (time.perf_counter() - began),
                    f'{sinks} sinks, resident MB after a quarter': resident[len(resident) // 4],
                    f'{sinks} sinks, resident MB at the end': resident[-1]}
    # the first segment ends where the window does; then tenths of the stream
    edges = [0, window, *(i * config.block_size for i in range(1, 11))]
    rows = [{'up to token': end, f'nats, {n_sink} sinks': losses[0][begin:end].mean().item(),
             'nats, no sinks': losses[1][begin:end].mean().item()}
            for begin, end in zip(edges, edges[1:], strict=False) if begin < end]
    return rows, summary | {'window': window, 'block_size': config.block_size}


def texts_of(path):
    """A text file, or the works of data/shakespeare, a text each."""
    if path:
        try:
            return [Path(path).read_text(encoding='utf-8')]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f'--input={path}: not a text file ({error})') from None
    splits = [TokenData(find_dataset('shakespeare'), split, 1) for split in ('train', 'val')]
    text = ''.join(s.tokenizer.decode(s.read(np.arange(s.n_tokens - 1))[0][:, 0]) for s in splits)
    return text.split('<|endoftext|>')


def bench_tokenizer(knobs, model_args):
    """BPE training and encoding, beside Hugging Face's library."""
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HFTokenizer
    texts = texts_of(input)  # the works one by one: tokenizers shares them among the cores
    megabytes, rows = sum(len(text.encode()) for text in texts) / 1e6, []
    for _ in range(repeats):
        began = time.perf_counter()
        ours = train_bpe(texts, model_args.get('vocab_size', 4096))
        trained = time.perf_counter()
        ours.encode_batch(texts)
        encoded = time.perf_counter()
        theirs = HFTokenizer(models.BPE())
        theirs.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(GPT4_PATTERN), 'isolated'),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        theirs.train_from_iterator(texts, trainers.BpeTrainer(
            vocab_size=ours.n_vocab, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
        seconds, other = trained - began, time.perf_counter() - encoded
        rows.append({'train MB/s': megabytes / seconds, 'encode MB/s': megabytes / (encoded - trained),
                     'seconds': seconds, 'tokenizers seconds': other, 'time ratio': seconds / other})
    return rows, {f'{key}, median': statistics.median(row[key] for row in rows) for key in rows[0]}


# ----------------------------------------------------------------------------------------------------------------------
# memory, computed

def activation_bytes(config, tokens):
    """Bytes that one block keeps for its backward pass -> (the whole, its input alone).

    Under autocast: the residual stream is float32, what enters a matrix product has 16 bits; attention keeps queries,
    keys and values (rotated or normalised ones beside the plain, which the values keep alive), its output and a float32
    log-sum per head.
    """
    C, H, kv, D, M = config.n_embd, config.n_head, config.n_kv_head, config.head_dim, config.mlp_dim
    statistics_ = 2 if config.norm == 'layernorm' else 1  # mean and deviation, or the deviation alone
    norms = 2 * (4 * C + 4 * statistics_)
    attention = 2 * (C + (2 * H + 2 * kv) * D) + 4 * H
    if config.pos == 'rope':
        attention += 2 * (H + kv) * D
    if config.qk_norm:
        attention += (H + kv) * 4 * (D + statistics_)  # in float32
    mlp = 2 * (2 * C + 4 * M if config.mlp in GATED else C + 2 * M)  # autocast copies the input for each matrix
    masks = 2 * C if config.dropout else 0  # a byte for each number that may be dropped
    return tokens * (norms + attention + mlp + masks), tokens * 4 * C


def memory_per_gpu(config, batch_size, world_size=1, fsdp=False, activation_checkpointing=False, optimizer='adamw'):
    """Bytes that training takes on each of world_size GPUs: {'parameters', 'gradients', 'moments', 'copies',
    'activations', 'total'}.

    Parameters and gradients are float32, moments two float32 per parameter (Muon: one, for the matrices of the
    blocks). Copies: with autocast a 16-bit copy of the matrices; with DDP nothing more (gradients are views of its
    buckets). fsdp divides parameters, gradients and moments by world_size, and its copies are two blocks in 16 bits, as
    many gradients in float32, and the rest of the model in float32. Activations: see `activation_bytes`; with
    checkpointing the inputs of all blocks and one block's whole. What one operation needs for an instant (a chunk of
    logits: 0.5 GB on a GPU) and what the allocator wastes come on top.
    """
    with on_meta():
        model = GPT(config)
    n = model.num_params()
    block = sum(p.numel() for p in model.blocks[0].parameters())
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    shards = world_size if fsdp else 1
    tokens = batch_size * config.block_size
    whole, entry = activation_bytes(config, tokens)
    head = tokens * 2 * (4 + 2) * config.n_embd + 4 * config.vocab_size * config.n_embd  # hidden, and the loss's own
    out = {'parameters': 4 * n / shards, 'gradients': 4 * n / shards,
           'moments': (8 * n - (4 * matrices if optimizer == 'muon' else 0)) / shards,
           'copies': (2 * block * (2 + 4) + 4 * (n - config.n_layer * block) if fsdp
                      else 2 * (matrices + config.vocab_size * config.n_embd)),
           'activations': head + (config.n_layer * entry + whole if activation_checkpointing
                                  else config.n_layer * whole)}
    return out | {'total': sum(out.values())}


LLAMA_8B = dict(block_size=8192, vocab_size=128256, n_layer=32, n_head=32, n_kv_head=8, n_embd=4096, mlp='swiglu',
                mlp_dim=14336, pos='rope', norm='rmsnorm', bias=False, tie_weights=False)
MODELS = {'GPT-2, 124 M': (dict(vocab_size=50304), 16),
          'GPT-2 XL, 1.5 B': (dict(vocab_size=50304, n_layer=48, n_head=25, n_embd=1600), 4),
          'Llama 3, 8 B': (LLAMA_8B, 1)}
SHARDINGS = {'1 GPU': {}, '8 GPUs, DDP': dict(world_size=8), '8 GPUs, FSDP': dict(world_size=8, fsdp=True),
             '8 GPUs, FSDP, checkpointing': dict(world_size=8, fsdp=True, activation_checkpointing=True)}


def bench_memory(knobs, model_args):
    rows = []
    for name, (args, batch_size) in MODELS.items():
        for sharding, options in SHARDINGS.items():
            found = memory_per_gpu(GPTConfig(**args), batch_size, **options)
            rows.append({'model': name, 'windows per GPU': batch_size, 'sharding': sharding}
                        | {f'{key} GB': value / 1e9 for key, value in found.items()})
    return rows, {}


# ----------------------------------------------------------------------------------------------------------------------
# one change at a time

TINY, REVERSE = (str(Path(__file__).parent / f'config/{name}.py') for name in ('tiny', 'reverse'))
BINS = 16  # places in a window that are averaged
CONTEXTS = (256, 1024, 4096)  # tokens before those whose writing is timed
ADAMW = '--optimizer=adamw --grad_clip=1.0'
# what is compared: {variant: flags over TINY}; the sizes of variants are equal where they can be
ABLATIONS = {
    'norm': {'LayerNorm': '--norm=layernorm --bias=True', 'RMSNorm': '--norm=rmsnorm',
             'RMSNorm, no weights': '--norm=rmsnorm --norm_affine=False'},
    'place': {place: f'--norm_place={place}' for place in ('pre', 'post')},
    # beside sinusoids tokens are multiplied by sqrt(128), and with them the step of their embedding
    'position': {'learned': '--pos=learned', 'sinusoidal': '--pos=sinusoidal --embed_lr=0.0008', 'rope': '--pos=rope',
                 'none': '--pos=none'},
    'mlp': {'GELU': '--mlp=gelu --mlp_dim=576', 'SwiGLU': '--mlp=swiglu', 'ReLU^2': '--mlp=relu2 --mlp_dim=576'},
    'heads': {name: f'--n_head=4 --n_kv_head={n}' for name, n in (('MHA', 4), ('GQA', 2), ('MQA', 1))}
             | {'MLA': '--n_head=4 --kv_lora_rank=48 --qk_norm=False'},
    'gate': {'none': '', 'of each head': '--attn_gate=head', 'of each element': '--attn_gate=element'},
    # key of half the width, values of the whole: as many parameters
    'hybrid': {'attention': '', 'DDDA': '--layer_pattern=DDDA --delta_key_dim=32 --delta_value_dim=64'},
    'sinks': {name: f'--window=64 {flag}' for name, flag in (
        ('none', ''), ('four tokens', '--n_sink=4'), ('a learned logit', '--sink_logit=True'))},
    # to choose rates by, on a seed that is not compared afterwards: --what=rates --seeds=1 --seed=4
    'rates': {f'AdamW, {rate}': f'{ADAMW} --learning_rate={rate}' for rate in (0.001, 0.002, 0.004, 0.008, 0.016)}
             | {f'Muon, {rate}': f'--optimizer=muon --muon_lr={rate}' for rate in (0.005, 0.01, 0.02, 0.04, 0.08)},
    'optimizer': {'AdamW': f'{ADAMW} --learning_rate=0.002', 'Muon': '--optimizer=muon'},
    'experts': {'dense': '--n_expert=0', '2 of 8 experts': '--n_expert=8 --expert_dim=192 --router_bias_rate=0.001'},
    'warmup': {f'{n} steps': f'--warmup_iters={n}' for n in (0, 20, 100)},
    'batch': {'16 windows': '--batch_size=16', '4 x 4 windows': '--batch_size=4 --gradient_accumulation_steps=4'},
    'precision': {dtype: f'--dtype={dtype}' for dtype in ('float32', 'bfloat16')},
    'smoothing': {name: f'--label_smoothing={name}' for name in ('0.0', '0.1')}}
BASES = {'smoothing': REVERSE}  # comparisons that change another config than TINY, which they train to its end


def trained(folder, base, flags, init_from='scratch', threads=''):
    """Trains a config with flags, unless that is done already -> its held-out loss. threads: '' = train.py's choice."""
    done = folder / 'flags.json'  # is written when the run is over
    if not done.exists() or json.loads(done.read_text(encoding='utf-8')) != flags:
        command([TRAIN, base, f'--init_from={init_from}', *flags, f'--out_dir={folder}', '--keep_checkpoints=1',
                 '--sample_tokens=0'], env=os.environ | ({'OMP_NUM_THREADS': threads} if threads else {}))
        done.write_text(json.dumps(flags), encoding='utf-8')
    loss = json.loads((folder / 'summary.json').read_text(encoding='utf-8'))['val/loss']
    print(f'{folder}: held-out loss {loss:.4f}', flush=True)
    return loss


def train_all(runs):
    """The held-out losses of runs, each what `trained` takes, one to a processor; on a GPU one after another."""
    on_gpu = torch.cuda.is_available()
    with ThreadPoolExecutor(1 if on_gpu else os.cpu_count()) as pool:
        return [*pool.map(lambda run: trained(*run, threads='' if on_gpu else '1'), runs)]


def run_of_variant(base, changed, seed, steps, given):
    """What `trained` takes of a variant, given and changed flags over the config base: directory, config, flags."""
    words = ' '.join(changed if base == TINY else [Path(base).stem, *changed])
    name = re.sub('[^a-z0-9.]+', '-', words.lower()).strip('-') or 'tiny'
    return Path(results) / 'ablate' / f'{name}_{seed}', base, [
        *(f'--{key}={value}' for key, value in given.items()), *changed, f'--max_iters={steps}',
        f'--eval_interval={max(1, steps // 10)}', f'--seed={seed}']


def layer_gradients(folder, dataset):
    """[(layer, norm of its gradient)] of a run's model, on the same eight held-out windows, in float32."""
    model, _ = load_model(folder / 'ckpt.pt')
    data = TokenData(find_dataset(dataset), 'val', model.config.block_size)
    x, y = map(torch.from_numpy, data.read(data.fixed(8)))
    model.train()(x, y).backward()
    return [(i, sum(p.grad.square().sum().item() for p in block.parameters()) ** 0.5)
            for i, block in enumerate(model.blocks)]


def loss_by_place(folder, dataset):
    """A run's loss by the place in windows of twice its block -> [(place, nats)], means of bins; learned positions end
    where training did."""
    model, _ = load_model(folder / 'ckpt.pt')
    if model.config.pos != 'learned':
        model, _ = load_model(folder / 'ckpt.pt', block_size=2 * model.config.block_size)
    data = TokenData(find_dataset(dataset), 'val', model.config.block_size)
    with torch.no_grad():
        losses = torch.cat([model(*map(torch.from_numpy, data.read(starts)), reduction='none')
                            for starts in np.array_split(data.fixed(96), 12)])
    return [((i + 0.5) * BINS, part.mean().item()) for i, part in enumerate(losses.split(BINS, dim=1))]


def rate_by_context(folder, dataset):
    """Tokens/s that a run's model writes, cached, to eight texts at once, by their length: [(tokens, tokens/s)].

    They are longer than training's: what is in the cache costs the same, whatever it says.
    """
    rates = []
    for context in CONTEXTS:
        model, _ = load_model(folder / 'ckpt.pt', block_size=context + max_new_tokens)
        prompts = torch.randint(model.config.vocab_size, (8, context), generator=torch.Generator().manual_seed(1))
        found = [generation_rates(model, prompts.tolist(), seed, True)[1] for seed in range(repeats)]
        rates.append((context, max(found)))
    return rates


def exact_by_beams(folder, dataset):
    """The share in % of 500 held-out sources whose likeliest text is the target, by the number of beams."""
    model, _ = load_model(folder / 'ckpt.pt')
    data = PairData(find_dataset(dataset), 'val', model.config.block_size)
    sources, targets = zip(*map(data.pair, data.fixed(500)), strict=True)
    eot, shares = data.tokenizer.eot, []
    for beams in (1, 2, 4, 8):
        found = beam_search(model, [[eot]] * len(sources), max(map(len, targets)) + 1, beams, stop_ids=(eot,),
                            vocab_limit=data.tokenizer.n_vocab, sources=sources)
        right = sum(best[0] == [*target, eot] for (best, *_), target in zip(found, targets, strict=True))
        shares.append((beams, 100 * right / len(targets)))
    return shares


# comparisons that have a second panel: what it shows of a run, its title and axes
SECOND = {'norm': (layer_gradients, 'norm: gradients at the end', 'layer', 'norm of its gradient'),
          'smoothing': (exact_by_beams, 'smoothing: beam search', 'beams', 'sources with the right target, %'),
          **{name: (loss_by_place, f'{name}: twice the length', 'place in the text', 'held-out loss')
             for name in ('position', 'sinks')},
          **{name: (rate_by_context, f'{name}: eight texts at once', 'tokens before', 'tokens/s')
             for name in ('heads', 'hybrid')}}


def second_in_words(name, variant, means, block):
    """What the second panel shows of a variant, [(x, mean)] -> {name: text}."""
    if name == 'norm':
        return {f'{variant}: norm of the gradient, layer by layer': ', '.join(f'{norm:.3f}' for _, norm in means)}
    if SECOND[name][0] != loss_by_place:
        _, title, x, y = SECOND[name]
        return {f'{title}, {variant}, {y} by {x}': ', '.join(f'{at}: {value:,.1f}' for at, value in means)}
    found = {}
    for part, low, high in (('as far as in training', 0.5, 1), ('twice as far', 1.5, 2)):
        inside = [nats for place, nats in means if low * block <= place < high * block]
        found[f'{variant}, {part}: loss'] = f'{statistics.mean(inside):.3f}' if inside else 'none'
    return found


def bench_ablate(knobs, model_args):
    """Variants of config/tiny.py (or of BASES), some seeds each, one to a processor: a table, and results/ablate.svg, a
    panel for each comparison with the mean and its 95 % interval. What is trained already is not trained again."""
    names = list(ABLATIONS) if what == 'all' else [name.strip() for name in what.split(',')]
    if unknown := [name for name in names if name not in ABLATIONS]:
        raise UserError(f'what={what}: unknown {unknown[0]!r}; {runtime.suggest(unknown[0], ABLATIONS)}')
    n_panels = len(names) + sum(name in SECOND for name in names)
    figure, panels = new_figure(-(-n_panels // 3), min(3, n_panels), 4, 3)
    panels, table, found = iter(panels.flat), [], {}
    given = dict(knobs.given)
    steps, first_seed = given.pop('max_iters', 0), given.pop('seed', 1)
    all_seeds, variants, bases = range(first_seed, first_seed + seeds), {}, {}
    for name in names:
        base = BASES.get(name, TINY)
        own = {key: value for key, value, _ in runtime.read_config(base)}
        bases[name] = MODEL_DEFAULTS | TRAIN_DEFAULTS | own | given
        n = steps or (400 if base == TINY else bases[name]['max_iters'])
        # what a variant changes: several comparisons have config/tiny.py itself among theirs, which is trained once
        unchanged = {f'--{key}={value}' for key, value in bases[name].items()}
        for variant, flags in ABLATIONS[name].items():
            changed = [flag for flag in flags.split() if flag not in unchanged]
            variants[name, variant] = [run_of_variant(base, changed, seed, n, given) for seed in all_seeds]
    train_all({run[0]: run for runs in variants.values() for run in runs}.values())
    for name in names:
        axes = next(panels)
        axes.set(xlabel='step', ylabel='held-out loss', title=name)
        if name in SECOND:
            curve_of, title, x, y = SECOND[name]
            more = next(panels)
            more.set(xlabel=x, ylabel=y, title=title)
        for color, variant in enumerate(ABLATIONS[name]):
            paths = [folder for folder, *_ in variants[name, variant]]
            curves = [points(logged(path), 'iter', 'val/loss') for path in paths]
            draw_mean(axes, color, variant, [curve[1:] for curve in curves])
            mean, spread = mean_and_spread([curve[-1][1] for curve in curves])
            last = [json.loads((path / 'summary.json').read_text(encoding='utf-8')) for path in paths]
            config = load_model(paths[0] / 'ckpt.pt')[0].config
            table.append({'compared': name, 'variant': variant, 'seeds': seeds, 'held-out loss': mean,
                          'low': mean - spread, 'high': mean + spread, 'parameters': last[0]['parameters'],
                          'tokens/s': statistics.mean(s['tokens'] / s['seconds'] for s in last),
                          'MB': statistics.mean(s['peak_memory_mb'] for s in last),
                          'cache bytes per token': 2 * config.cache_width})
            if name in SECOND:
                means = draw_mean(more, color, variant, [curve_of(path, bases[name]['dataset']) for path in paths])
                found |= second_in_words(name, variant, means, config.block_size)
    for axes in figure.axes:
        if axes.lines:
            axes.legend(frameon=False, fontsize=7)
        else:
            axes.set_axis_off()
    Path(results).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(results) / 'ablate.svg')
    return table, found | {'drawn to': str(Path(results) / 'ablate.svg')}


# ----------------------------------------------------------------------------------------------------------------------
# a ladder of models, and what it predicts

LADDER_SETS = ('n_layer', 'n_head', 'n_embd', 'max_iters', 'out_dir', 'init_from', 'eval_interval')


def rung_of(size, n_steps, knobs, vocab_size):
    """A run of the ladder -> {'size', 'parameters', 'tokens'}, and what `trained` takes of it. Other flags have another
    directory, so one that was interrupted goes on there.

    config/tiny.py is tuned at a width of 128. The rate of head and norms falls with the width, that of the embedding
    stays (arXiv:2203.03466); Muon's is scaled by the shape of its matrices as it is (arXiv:2310.17813). Each length has
    a decay of its own. parameters: all but a token embedding of its own, which takes no part in any product.
    """
    tiny = {key: value for key, value, _ in runtime.read_config(TINY)} | knobs.given
    found = re.fullmatch('([1-9][0-9]*)x([1-9][0-9]*)', size)
    if not found or int(found[2]) % 32:
        raise UserError(f'{size!r} is not a size: write layers x width, the width a multiple of 32, as 4x160')
    depth, width = int(found[1]), int(found[2])
    shape = {'n_layer': depth, 'n_embd': width, 'n_head': width // 32}
    args = {key: value for key, value in tiny.items() if key in MODEL_DEFAULTS} | shape
    with runtime.user_errors(), on_meta():
        model = GPT(GPTConfig(**{'vocab_size': vocab_size} | args))
    values = knobs.given | shape | {
        'learning_rate': tiny['learning_rate'] * 128 / width, 'max_iters': n_steps, 'eval_interval': n_steps,
        'seed': knobs.seed, 'sample_tokens': 0, 'keep_checkpoints': 1, 'eval_iters': knobs.given.get('eval_iters', 40)}
    flags = [f'--{key}={value}' for key, value in values.items()]
    folder = Path(results) / 'scaling' / f'{zlib.crc32(" ".join(flags).encode()):08x}'
    tokens = n_steps * tiny['batch_size'] * tiny.get('gradient_accumulation_steps', 1) * model.config.block_size
    untied = 0 if model.config.tie_weights else model.tok_emb.weight.numel()
    return {'size': size, 'parameters': model.num_params() - untied, 'tokens': tokens}, (folder, TINY, flags, 'auto')


def foretold(made, begun):
    """Writes a prediction, unless it has been written for the same runs -> the one that counts. UserError where the run
    that it is of has begun: no prediction comes before that any more."""
    path = Path(results) / 'scaling' / 'prediction.json'
    before = json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}
    if all(before.get(key) == made[key] for key in ('size', 'tokens', 'runs')):
        return before
    if begun:
        raise UserError(f'{path}: the run of {made["size"]} has begun, and the ladder is another than the prediction '
                        'was made from: give another --results')
    runtime.write_atomic(path, lambda file: file.write(json.dumps(made, indent=1).encode()))
    return made


def bench_scaling(knobs, model_args):
    """Trains a ladder, one run to a processor, fits its law, writes down what that says of a larger run, and then makes
    that one: a table, and results/scaling.svg. What is trained already is not trained again."""
    data = TokenData(find_dataset(knobs.dataset), 'train', 1)
    sizes = [(size, n_steps) for size in ladder for n_steps in sorted(lengths)]
    rungs = [rung_of(*size, knobs, data.tokenizer.n_vocab) for size in sizes]
    target, its_run = rung_of(larger, max(lengths), knobs, data.tokenizer.n_vocab)
    cost = [run['parameters'] * run['tokens'] for run, _ in rungs]
    print(f'{len(rungs)} runs and a larger one, of at most {target["tokens"] / data.n_tokens:.2f} epochs: '
          f'{6 * (sum(cost) + target["parameters"] * target["tokens"]):.1e} FLOP', flush=True)
    order = sorted(range(len(rungs)), key=lambda i: -cost[i])  # the longest first: the processors end together
    losses = dict(zip(order, train_all([rungs[i][1] for i in order]), strict=True))
    runs = [run | {'loss': losses[i]} for i, (run, _) in enumerate(rungs)]
    n, d, losses = (np.array([run[key] for run in runs], float) for key in ('parameters', 'tokens', 'loss'))
    law, _ = scaling.fit(n, d, losses)
    laws, residuals = scaling.bootstrap(n, d, losses, law), np.log(losses / law.loss(n, d))
    low, high = scaling.predict(laws, residuals, target['parameters'], target['tokens'])
    made = foretold(target | {'loss': law.loss(target['parameters'], target['tokens']), 'low': low, 'high': high,
                              'law': law._asdict(), 'runs': runs}, its_run[0].exists())
    print(f'{larger} is predicted to reach {made["loss"]:.4f} ({made["low"]:.4f} to {made["high"]:.4f})', flush=True)
    measured = trained(*its_run)
    scaling.draw(Path(results) / 'scaling.svg', runs, law, laws, made, measured)
    rows = [run | {'law': law.loss(run['parameters'], run['tokens'])} for run in runs]
    rows.append(target | {'loss': measured, 'law': made['loss']})
    result = {name: f'{value:.4g} ({low:.4g} to {high:.4g})' for name, value, (low, high) in (
        *((key, getattr(law, key), scaling.interval([getattr(other, key) for other in laws])) for key in law._fields),
        ('best size, exponent of FLOP', law.share, scaling.interval([other.share for other in laws])),
        ('prediction', made['loss'], (made['low'], made['high'])))}
    inside = 'inside' if made['low'] <= measured <= made['high'] else 'outside'
    return rows, result | {'measured afterwards': f'{measured:.4f}, {inside} the interval',
                           'root mean square residual of log loss': float(np.sqrt(np.mean(residuals ** 2))),
                           'drawn to': f'{results}/scaling.svg'}


# ----------------------------------------------------------------------------------------------------------------------

MODES = {'train': bench_train, 'sample': bench_sample, 'stream': bench_stream, 'tokenizer': bench_tokenizer,
         'serve': bench_serve, 'memory': bench_memory, 'ablate': bench_ablate, 'scaling': bench_scaling,
         'loss': None, 'step': one_step}


def check(mode, knobs):
    """UserError for knobs that mean nothing together."""
    nanogpt, checkout = ((Path(against) / name).is_file() for name in ('configurator.py', 'runtime.py'))
    transformers = against == 'transformers' and mode == 'sample'
    alone = (mode in ('memory', 'ablate', 'scaling', 'step') or nanogpt and mode not in ('train', 'loss')
             or 'RANK' in os.environ)
    taken = next((key for key in LADDER_SETS if key in knobs.given and mode == 'scaling'), '')
    for wrong, message in (
            (min(repeats, max_new_tokens, *batches, *contexts) < 1 or steps < (mode != 'step'),
             'repeats, steps, max_new_tokens, batches and contexts must be >= 1'),
            (min(draft_tokens) < 1, f'draft_tokens={min(draft_tokens)} must be >= 1'),
            (draft and (against or mode != 'sample' or knobs.init_from == 'scratch'),
             f'draft={draft} is for mode sample with --init_from=MODEL and no --against'),
            (min(lengths) < 1, f'lengths={min(lengths)} must be >= 1'),
            (seeds < 1, f'seeds={seeds} must be >= 1'),
            (taken, f'mode scaling sets {taken} from ladder, larger and lengths: drop --{taken}'),
            (min(knobs.batch_size, knobs.gradient_accumulation_steps) < 1 or not 0 <= knobs.seed < 2 ** 63,
             'batch_size and gradient_accumulation_steps must be >= 1, seed >= 0'),
            (mode == 'memory' and knobs.given, f'mode memory takes no knobs: drop {min(knobs.given, default="")}'),
            (mode not in ('train', 'step') and 'RANK' in os.environ,
             f'mode {mode} is for one process: python bench.py {mode}'),
            (Path(results).exists() and not Path(results).is_dir(), f'results={results}: not a directory'),
            (mode == 'loss' and not against, 'mode loss needs --against=DIR, a checkout to compare with'),
            (transformers and (importlib.util.find_spec('transformers') is None or knobs.init_from == 'scratch'),
             '--against=transformers needs --init_from=MODEL and pip install transformers'),
            (against and not (transformers or nanogpt or checkout),
             f'--against={against!r} is a checkout neither of nanoGPT nor of this project'),
            (against and alone, f'--against={against}: mode {mode} has nothing to run there')):
        if wrong:
            raise UserError(message)


def main():
    mode = sys.argv[1] if len(sys.argv) > 1 else ''
    if mode in ('train', 'loss') and all(a.startswith('--') for a in sys.argv[2:]):
        default = 'config/tinyshakespeare.py' if mode == 'loss' else 'config/nanogpt.py'
        sys.argv.insert(2, str(Path(__file__).parent / default))
    modes = [*MODES][:-1]
    if mode not in MODES and mode not in ('--help', '-h'):
        if difflib.get_close_matches(mode, [*modes, 'plot', 'curves'], 1) in (['plot'], ['curves']):
            raise UserError('pictures are drawn by plot.py: python plot.py out/tiny [--metric=val/loss]')
        raise UserError(f'the first argument is a mode, not {mode!r}: {runtime.suggest(mode, modes)}')
    _, given = runtime.configure(globals(), TRAIN, GPTConfig, argv=sys.argv[2 if mode in MODES else 1:])
    train_args = {key: given[key] for key in TRAIN_DEFAULTS if key in given}
    model_args = {key: value for key, value in given.items() if key in MODEL_DEFAULTS}
    knobs = SimpleNamespace(**TRAIN_DEFAULTS | train_args, given=train_args | model_args)
    check(mode, knobs)
    tiny = {key: value for key, value, _ in runtime.read_config(TINY) if mode == 'ablate' and key in MODEL_DEFAULTS}
    with runtime.user_errors():
        GPTConfig(**tiny | model_args)  # a mistake is found before any data is fetched
    if against and mode in ('train', 'loss'):
        found = compare_training(mode, knobs, model_args)
    elif against and against != 'transformers':
        found = compare_modes(mode)
    else:
        found = MODES[mode](knobs, model_args)
    if found:
        rows, result = found
        faster = 'bfloat16' if runtime.fast_bfloat16('cpu') else 'float32'
        result |= {'processor': f'{runtime.processor()}, {faster} products are the faster ones'}
        report(Path(results) / f'{mode}.json', rows, result)


if __name__ == '__main__':
    runtime.cli(main)
