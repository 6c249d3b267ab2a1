"""
Measure: ratios between things that ran side by side, in turn, on this machine; a table, and the same as JSON.

    python bench.py train --against=NANOGPT            training tokens/s at nanoGPT's own configuration
    python bench.py loss --against=NANOGPT             training time and final loss: config/tinyshakespeare.py
    python bench.py loss --against=NANOGPT --config=config/nanogpt.py        the same at nanoGPT's configuration
    python bench.py sample --init_from=out/tiny        generated tokens/s, with the KV cache and re-reading the context
    python bench.py tokenizer                          BPE training and encoding, against Hugging Face tokenizers

NANOGPT is a checkout of github.com/karpathy/nanoGPT. It is run from a temporary copy, unchanged but for its seed.
"""
import importlib.util
import json
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import runtime
from dataset import TokenData, find_dataset
from model import GPT
from tokenizer import UserError, train_bpe

against = ''  # checkout of nanoGPT to compare with
config = 'config/tinyshakespeare.py'  # mode loss: our side of the comparison
init_from = 'out/tiny'  # mode sample: the run whose model generates
repeats = 3  # runs of each side; in mode loss each with a seed of its own
max_iters = 300  # mode train: steps per run
max_new_tokens = 256  # mode sample: tokens per text
vocab_size = 4096  # mode tokenizer: size of the vocabulary to train
input = ''  # mode tokenizer: text file; default: the works of data/shakespeare
out_dir = 'out/bench'  # where the results and our runs go
device = 'auto'  # 'cpu', 'cuda'; auto = the best there is

NANOGPT_ARGS = ('config/train_shakespeare_char.py --compile=False --eval_iters=20 --log_interval=1 --block_size=64 '
                '--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --lr_decay_iters=2000 --dropout=0.0 '
                '--always_save_checkpoint=True').split()


def command(args, **options):
    """Runs a Python script to its end and returns what it printed; UserError with its last words if it fails."""
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, **options)
    if done.returncode:
        raise UserError(f'{args[0]} failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}')
    return done.stdout


def nanogpt_run(seed, iters):
    """nanoGPT's own train.py on our tokens -> {'seconds' of training, 'ms' per step, 'val' loss over the whole split}.

    Its time includes printing a line a step and leaves out evaluations: those steps count as a median step.
    """
    if not (Path(against) / 'configurator.py').is_file():
        raise UserError(f'--against={against!r} is not a checkout of nanoGPT')
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / 'nanoGPT'
        shutil.copytree(against, copy, ignore=shutil.ignore_patterns('.git', 'out*', '*.bin'))
        script = (copy / 'train.py').read_text()
        (copy / 'train.py').write_text(script.replace('torch.manual_seed(1337 + ', f'torch.manual_seed({seed} + '))
        data = copy / 'data' / 'shakespeare_char'
        for split in ('train', 'val'):
            shutil.copy(f'data/tinyshakespeare/{split}.bin', data)
        (data / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 65}))
        print(f'nanoGPT, seed {seed} …', end=' ', flush=True)
        lines = command(['train.py', *NANOGPT_ARGS, f'--device={device}', f'--max_iters={iters}'], cwd=copy)
        times = {int(i): float(ms) for i, ms in re.findall(r'iter (\d+): .* time ([\d.]+)ms', lines)}
        ms = statistics.median(times.values())
        steps = [ms if i % 250 == 0 else times[i] for i in range(iters)]
        result = {'seconds': sum(steps) / 1000, 'ms': ms}
        if (copy / 'out-shakespeare-char' / 'ckpt.pt').exists():
            result['val'] = nanogpt_loss(copy)
    print({k: round(v, 4) for k, v in result.items()}, flush=True)
    return result


@torch.no_grad()
def nanogpt_loss(copy):
    """Loss of nanoGPT's final checkpoint over the windows that our evaluations read."""
    spec = importlib.util.spec_from_file_location('nanogpt_model', copy / 'model.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    state = torch.load(copy / 'out-shakespeare-char' / 'ckpt.pt', map_location=device, weights_only=True)
    model = module.GPT(module.GPTConfig(**state['model_args'])).to(device).eval()
    model.load_state_dict(state['model'])
    data = TokenData('data/tinyshakespeare', 'val', 64)
    x, y = (torch.from_numpy(a).to(device) for a in data.read(data.fixed(0)))
    return sum(model(a, b)[1].item() * len(a) for a, b in zip(x.split(64), y.split(64), strict=True)) / len(x)


def our_run(config, seed, *args):
    """train.py with a config -> the same figures, from its metrics; the last checkpoint is in out_dir/ours."""
    print(f'{config}, seed {seed} …', end=' ', flush=True)
    run = Path(out_dir) / 'ours'
    shutil.rmtree(run, ignore_errors=True)
    command(['train.py', config, f'--out_dir={run}', f'--seed={seed}', f'--device={device}', '--sample_tokens=0',
             *args])
    rows = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
    summary = json.loads((run / 'summary.json').read_text())
    rate = statistics.median(row['tok_per_sec'] for row in rows if 'tok_per_sec' in row)
    result = {'seconds': summary['seconds'], 'ms': 1000 * summary['tokens'] / summary['iter'] / rate,
              'val': summary['val/loss'], 'peak_memory_mb': summary['peak_memory_mb']}
    print({k: round(v, 4) for k, v in result.items()}, flush=True)
    return result


def report(mode, rows, **result):
    """Prints a line per row and the result, and writes both to out_dir/MODE.json."""
    for row in rows:
        print('  '.join(f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}' for k, v in row.items()))
    for key, value in result.items():
        print(f'{key}: {value:.4g}' if isinstance(value, float) else f'{key}: {value}')
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    path = Path(out_dir) / f'{mode}.json'
    path.write_text(json.dumps({'rows': rows, **result}, indent=1) + '\n')
    print(f'written to {path}')


def pairs(run_a, run_b):
    """Runs A and B in turn, `repeats` times, the order swapped each time."""
    out = []
    for i in range(repeats):
        first, second = (run_a, run_b) if i % 2 == 0 else (run_b, run_a)
        results = {first: first(1337 + i)}
        results[second] = second(1337 + i)
        out.append((results[run_a], results[run_b]))
    return out


def bench_train():
    results = pairs(lambda seed: our_run('config/nanogpt.py', seed, f'--max_iters={max_iters}',
                                         f'--eval_interval={max_iters}', '--eval_iters=1'),
                    lambda seed: nanogpt_run(seed, max_iters))
    ratios = [nano['ms'] / ours['ms'] for ours, nano in results]
    report('train', [{'ours ms/step': a['ms'], 'nanoGPT ms/step': b['ms'], 'tokens/s ratio': r}
                     for (a, b), r in zip(results, ratios, strict=True)],
           **{'tokens/s, ours over nanoGPT (median)': statistics.median(ratios)})


def bench_loss():
    results = pairs(lambda seed: our_run(config, seed, '--eval_iters=0'), lambda seed: nanogpt_run(seed, 2000))
    rows = [{'ours seconds': a['seconds'], 'ours val loss': a['val'], 'nanoGPT seconds': b['seconds'],
             'nanoGPT val loss': b['val'], 'time ratio': a['seconds'] / b['seconds']} for a, b in results]
    report('loss', rows, **{key + ' (mean)': statistics.mean(row[key] for row in rows) for key in rows[0]})


def bench_sample():
    state = runtime.load_checkpoint(init_from)
    model, rows = GPT.from_state(state).to(device).eval(), []
    for batch in (1, 8):
        prompts = [[1 + i] for i in range(batch)]
        rates = {True: [], False: []}
        for i in range(repeats + 1):
            for use_cache in (True, False):
                began = time.perf_counter()
                out = model.generate(prompts, max_new_tokens, seed=i, use_cache=use_cache)
                rate = sum(map(len, out)) / (time.perf_counter() - began)
                if i:  # the first pair warms up
                    rates[use_cache].append(rate)
        ratios = [a / b for a, b in zip(rates[True], rates[False], strict=True)]
        rows.append({'batch': batch, 'cached tok/s': statistics.median(rates[True]),
                     're-reading tok/s': statistics.median(rates[False]), 'ratio': statistics.median(ratios)})
    report('sample', rows)


def bench_tokenizer():
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    from tokenizer import GPT4_PATTERN
    if input:
        texts = [Path(input).read_text(encoding='utf-8')]
    else:
        splits = [TokenData(find_dataset('shakespeare'), split, 1) for split in ('train', 'val')]
        text = ''.join(s.tokenizer.decode(s.read(np.arange(s.n_tokens - 1))[0][:, 0]) for s in splits)
        texts = text.split('<|endoftext|>')  # a work each: tokenizers shares them among the cores
    megabytes, rows = sum(len(text.encode()) for text in texts) / 1e6, []
    for _ in range(repeats):
        began = time.perf_counter()
        ours = train_bpe(texts, vocab_size)
        seconds = time.perf_counter() - began
        theirs = Tokenizer(models.BPE())
        theirs.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(GPT4_PATTERN), 'isolated'),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        began = time.perf_counter()
        theirs.train_from_iterator(texts, trainers.BpeTrainer(
            vocab_size=ours.n_vocab, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
        rows.append({'ours s': seconds, 'tokenizers s': time.perf_counter() - began})
        began = time.perf_counter()
        ours.encode_batch(texts)
        rows[-1] |= {'time ratio': seconds / rows[-1]['tokenizers s'],
                     'ours encodes MB/s': megabytes / (time.perf_counter() - began)}
    median = statistics.median(row['time ratio'] for row in rows)
    report('tokenizer', rows, **{'time, ours over tokenizers (median)': median})


MODES = {'train': bench_train, 'loss': bench_loss, 'sample': bench_sample, 'tokenizer': bench_tokenizer}


def main():
    global device
    mode = sys.argv[1] if len(sys.argv) > 1 else ''
    runtime.configure(globals(), argv=sys.argv[2 if mode in MODES else 1:])  # --help needs no mode
    if mode not in MODES:
        raise UserError(f'the first argument is a mode: {", ".join(MODES)}')
    if repeats < 1:
        raise UserError('repeats starts at 1')
    device = runtime.pick_device(device)
    if mode in ('train', 'loss'):
        find_dataset('tinyshakespeare')
    MODES[mode]()


if __name__ == '__main__':
    runtime.cli(main)
