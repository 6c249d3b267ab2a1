"""
Knowledge distillation: a student learns the teacher's distribution over the next token, not only the token itself.

    python distill.py config/distill_tiny.py                     Shakespeare, from a teacher of four times the size
    python distill.py config/distill_tiny.py --top_k=32 --cache=out/cache        the teacher runs over the text once
    python distill.py config/distill_words.py                    word problems, on the data's answers
    python distill.py config/distill_words.py --answers=teacher --answers_file=out/answers.jsonl --alpha=0
                                                                 … on the teacher's answers
    python distill.py config/distill_words.py --on_policy=1      … on the student's answers
    torchrun --standalone --nproc_per_node=2 distill.py config/distill_tiny.py --gradient_accumulation_steps=2

The loss at a token is (1 - alpha) * cross-entropy + alpha * t^2 * D(teacher / t, student / t). The (N, vocab) logits of
neither model are ever held at once: the loss is computed in chunks.

Papers: Distilling the Knowledge in a Neural Network (arXiv:1503.02531), sequence-level distillation (arXiv:1606.07947),
every other layer (DistilBERT, arXiv:1910.01108), reverse KL (MiniLLM, arXiv:2306.08543), on-policy distillation and the
generalised Jensen-Shannon divergence (arXiv:2306.13649).
"""
import json
import math
import os
import re
from dataclasses import asdict
from functools import partial
from pathlib import Path

import runtime  # before torch: it sets an OpenMP variable that torch reads when it is imported

import numpy as np
import torch
import torch.nn.functional as F

from dataset import ChatData, PromptData, TokenData, find_dataset, kind_of, load_chats, load_prompts, real_tokens
from generate import check_prompts, generate
from grade import (
    accuracy_by,
    as_metrics,
    format_answer,
    format_metrics,
    grades,
    is_correct,
    outcomes,
    ratio_interval,
    summarise,
)
from load import VERSION, fingerprint, load_model, load_to_train, state_of
from lora import LoRAConfig, config_of
from model import GPTConfig, chunk_rows, tempered, walk_logits
from optim import lr_factor, make_optimizers
from rollout import forcing, generate_rollouts, lay_out
from rows import is_file_of_rows
from tokenizer import UserError
from tools import load_tools

# where and what
out_dir = 'out/distill'  # directory of the run: checkpoints, metrics, samples
teacher = 'out/teacher'  # model to learn from, as init_from of sample.py
init_from = 'scratch'  # the student: 'scratch', 'teacher' (n_layer of its layers), a model; 'resume'; 'auto:MODEL'
dataset = 'shakespeare'  # folder in data/ (prepared if it is not yet), path of a folder or of a file of rows
val_fraction = 0.1  # fraction of the prompts that is held out when dataset is a single file
seed = 1337  # of new weights, the order of the data, dropout and samples
# distillation
alpha = 0.5  # loss = (1 - alpha) * cross-entropy + alpha * temperature^2 * divergence
temperature = 1.0  # divides the logits of teacher and student in the divergence
divergence = 'forward'  # 'forward' KL(teacher || student), 'reverse' KL, or 'jsd': generalised Jensen-Shannon
jsd_beta = 0.5  # 'jsd': weight of the teacher in the mixture
top_k = 0  # compare the teacher's k most likely tokens, and all others as one bucket; 0 = the full distributions
cache = ''  # directory of the teacher's top_k tokens, computed once before training; '' = computed at every step
answers = 'gold'  # chats: 'gold', the data's answers, or 'teacher', which answers the prompts before training
answers_file = ''  # answers='teacher': JSON lines file to which they are written, or from which they are read
answer_prompts = 0  # answers='teacher': number of prompts, evenly spaced; 0 = all
num_answers = 1  # answers='teacher': answers per prompt
answer_temperature = 0.0  # answers='teacher': sampling temperature; 0 = greedy
correct_only = False  # answers='teacher': drop answers that the row's grader finds wrong
on_policy = 0.0  # chats: fraction of steps on answers that the student samples, with the divergence as their only loss
sample_temperature = 1.0  # on_policy: sampling temperature
prompts_per_step = 64  # on_policy: prompts per step, over all processes together
# rows
max_length = 0  # chats: maximum tokens per row; 0 = the model's block_size
too_long = 'drop'  # rows longer than max_length: 'drop', or truncate on the 'left' or 'right'
strict = True  # stop at a malformed row; False: skip and count it
pack = True  # concatenate conversations up to max_length, attention masked between them; False: one per row, padded
# batches
batch_size = 8  # windows, or rows (packed: of max_length), per micro-batch
gradient_accumulation_steps = 1  # micro-batches per step, over all processes together
max_iters = 900  # steps
# optimizer
optimizer = 'adamw'  # 'adamw', or 'muon' for the matrices of the blocks and AdamW for the rest
learning_rate = 6e-4  # peak learning rate of AdamW
embed_lr = 0.0  # peak learning rate of the token embedding; 0 = learning_rate
lora_lr_ratio = 1.0  # LoRA+: learning rate of LoRA's B over that of A; 16 is usual
muon_lr = 0.02  # peak learning rate of Muon
muon_momentum = 0.95  # Nesterov momentum of Muon
weight_decay = 0.0  # applied to matrices only
beta1 = 0.9  # AdamW: decay rate of the first moment
beta2 = 0.99  # AdamW: decay rate of the second moment
grad_clip = 1.0  # maximum gradient norm; 0 = no clipping
# schedule
lr_schedule = 'cosine'  # after the warmup: 'cosine', 'linear', 'wsd' (constant, then linear) or 'constant'
warmup_iters = 20  # steps of linear warmup
lr_decay_iters = 0  # step at which the learning rate reaches min_lr; 0 = max_iters
min_lr = 0.0  # final learning rate; every group decays by the same factor
decay_frac = 0.5  # 'wsd': fraction of lr_decay_iters that the final decay takes
# evaluation and logging
eval_interval = 250  # steps between evaluations, each with a sample or answers and a checkpoint
eval_rows = 160  # held-out windows, or rows (whose prompts are answered too), the same every time; 0 = all
max_new_tokens = 128  # maximum length of an answer, in tokens
tools: bool | str = False  # True: the calculator answers <tool>…</tool>; FILE.py: functions to be called (tools.py)
max_tool_calls = 8  # rounds of calls of functions in an answer, after which its turn ends for good
show_answers = 3  # answers printed at each evaluation
sample_start = '\n'  # running text: the text that the live sample continues
sample_tokens = 100  # running text: length of the live sample; 0 = none
log_interval = 10  # steps between lines of the log
keep_checkpoints = 2  # checkpoints to keep: ckpt.pt, and older ones as ckpt.1.pt …
max_bad_steps = 10  # stop after this many skipped updates in a row (loss or gradient not finite)
tensorboard_log = False  # log to out_dir/tensorboard
wandb_log = False  # log to Weights & Biases
wandb_project = 'flatgpt'  # Weights & Biases: project
wandb_run_name = ''  # Weights & Biases: name of the run; empty = out_dir
# machine
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'; auto = the best available
dtype = 'auto'  # 'float32', 'bfloat16' or 'float16'; auto = 16 bits if the device is faster at it
compile = False  # torch.compile: slow to start, then faster
activation_checkpointing = False  # recompute each block in the backward pass: less memory, a third more time
fsdp = False  # under torchrun: shard parameters, gradients and optimizer state (FSDP2), not replicate them (DDP)

# allowed values of the knobs, checked in main; runtime.RANGES has those of the knobs that stages share
RANGES = runtime.RANGES | {
    **dict.fromkeys(('alpha', 'on_policy'), '>= 0 and <= 1'),
    **dict.fromkeys(('jsd_beta', 'val_fraction'), '> 0 and < 1'),
    'temperature': '> 0 and <= 1000', 'sample_temperature': '> 0',  # the loss has the former's square
    **dict.fromkeys(('max_new_tokens', 'num_answers', 'prompts_per_step'), '>= 1'),
    **dict.fromkeys(('top_k', 'answer_prompts', 'answer_temperature', 'max_length', 'eval_rows', 'show_answers',
                     'max_tool_calls', 'sample_tokens'), '>= 0'),
    'divergence': ('forward', 'reverse', 'jsd'), 'answers': ('gold', 'teacher'), 'too_long': ('drop', 'left', 'right')}


# ----------------------------------------------------------------------------------------------------------------------
# the loss

def divergence_of(log_p, log_q, kind='forward', beta=0.5):
    """The divergence of a student's q from a teacher's p, both as log-probabilities (…, K) -> (D (…,) in nats, its
    gradient by the student's logits (…, K)).

    'forward': KL(p || q), whose gradient is q - p (arXiv:1503.02531); 'reverse': KL(q || p) (arXiv:2306.08543);
    'jsd': beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (arXiv:2306.13649).
    """
    p, q = log_p.exp(), log_q.exp()
    if kind == 'forward':
        return (p * (log_p - log_q)).sum(-1), q - p
    if kind == 'reverse':
        log_ratio = log_q - log_p
        kl_qp = (q * log_ratio).sum(-1, keepdim=True)
        return kl_qp[..., 0], q * (log_ratio - kl_qp)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    kl_pm = (p * (log_p - log_m)).sum(-1)
    log_ratio = log_q - log_m
    kl_qm = (q * log_ratio).sum(-1, keepdim=True)
    return beta * kl_pm + (1 - beta) * kl_qm[..., 0], (1 - beta) * q * (log_ratio - kl_qm)


def top_k_and_rest(logprobs, ids):
    """Log-probabilities (…, V) -> those of ids (…, k) and, last, of all other tokens as one bucket (…, k + 1)."""
    rest = logprobs.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    rest = rest.clamp(min=-1e4)  # no other tokens: log 0 = -inf would give nan
    return torch.cat((logprobs.gather(-1, ids), rest), -1)


class LinearLoss(torch.autograd.Function):
    """The sum of any loss of the logits h @ w.T over rows, a chunk of them at a time, so that (N, V) never exists."""

    @staticmethod
    def forward(ctx, h, w, cap, rule, learning, *given):
        """h (N, C), w (V, C) -> the sum of the losses, and the statistics of each row, (N, m) float32.

        rule(logits (n, V) float32, learning, *rows of given (n, …)) -> (losses (n,), statistics (n, m), the gradient
        of the losses' sum by the logits (n, V), or None without learning); it may overwrite the logits.
        """
        losses, tables = [], []

        def chunk(logits, rows):
            loss, stats, d = rule(logits, learning, *(x[rows] for x in given))
            losses.append(loss.sum())
            tables.append(stats)
            return d
        ctx.save_for_backward(*walk_logits(h, w, cap, chunk, learning, ctx.needs_input_grad[1]))
        ctx.n_given, table = len(given), torch.cat(tables)
        ctx.mark_non_differentiable(table)
        return torch.stack(losses).sum(), table

    @staticmethod
    def backward(ctx, g, _):
        dh, dw = ctx.saved_tensors
        return dh * g, None if dw is None else (dw * g).to(dh.dtype), None, None, None, *[None] * ctx.n_given


def loss_by_rule(model, hidden, _, rule, places, given):
    """An `output` of GPT.forward: the mean of a rule's losses, see `LinearLoss`, at N places of the flattened (B * T,)
    and its statistics of each, (N, m). given: what it takes beside the logits, (N, …) each."""
    def compute(hidden, places, *given):
        h, head, learning = model.products(hidden.flatten(0, 1)[places])
        return LinearLoss.apply(h, head, model.config.logit_softcap, rule, learning, *given)
    if torch.compiler.is_compiling():  # it would be compiled anew for every number of places
        compute = torch.compiler.disable(compute)
    total, stats = compute(hidden, places, *given)
    return total / len(stats), stats


class Distillation:
    """The loss of each token, a rule of `LinearLoss`: (1 - alpha) * cross-entropy + alpha * t^2 * divergence.

    The logits come in chunks of n rows and are not kept for a backward pass, so the gradient is written by hand. The
    gradient of the divergence shrinks as 1 / t^2 with the temperature t: the factor t^2 makes up for it
    (arXiv:1503.02531). vocab: only ids below it are compared, those of both models where one is padded further; 0 =
    all. softcap: of the teacher's logits.

    teacher: what is given of the teacher at each target, either hidden states (n, C), from which `head` (V, C), to be
    set before, makes its logits; or, cached, the ids (n, k) of its most likely tokens and their log-probabilities at t
    (n, k + 1), the last of all other tokens. The stats of a token are its cross-entropy and its divergence.
    """

    def __init__(self, alpha, temperature=1.0, kind='forward', beta=0.5, top_k=0, vocab=0, softcap=0.0):
        self.alpha = alpha
        self.t = temperature
        self.kind = kind
        self.beta = beta
        self.top_k = top_k
        self.vocab = vocab
        self.softcap = softcap
        self.head = None

    def soft_logprobs(self, logits):
        """Logits (n, V) of either model -> log-probabilities at t (n, vocab)."""
        # the same operations for both: identical models then have a divergence of exactly 0
        logits = logits[:, :self.vocab or None]
        return tempered(logits, self.t).log_softmax(-1)

    def teacher_logprobs(self, hidden):
        """The teacher's hidden states (n, C) -> its top_k ids (n, k) and their log-probabilities at t (n, k + 1), or
        None and all log-probabilities (n, vocab)."""
        logits = (hidden @ self.head.T).float()
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        logprobs = self.soft_logprobs(logits)
        if not self.top_k:
            return None, logprobs
        ids = logprobs.topk(min(self.top_k, logprobs.shape[-1])).indices
        return ids, top_k_and_rest(logprobs, ids)

    def __call__(self, logits, learning, targets, *teacher):
        """Logits (n, V), targets (n,) -> losses (n,), stats (n, 2), the gradient of the losses' sum by the logits
        (n, V), or None without learning."""
        ids, log_p = teacher if len(teacher) == 2 else self.teacher_logprobs(*teacher)
        student_logprobs = logits.log_softmax(-1)
        cross_entropies = -student_logprobs.gather(-1, targets[:, None])[:, 0]
        n_vocab = self.vocab or logits.shape[-1]
        same = self.t == 1 and n_vocab == logits.shape[-1]
        student_soft = student_logprobs if same else self.soft_logprobs(logits)
        log_q = student_soft if ids is None else top_k_and_rest(student_soft, ids)
        divergences, grad = divergence_of(log_p, log_q, self.kind, self.beta)
        losses = (1 - self.alpha) * cross_entropies + self.alpha * self.t ** 2 * divergences
        stats = torch.stack((cross_entropies, divergences), 1)
        if not learning:
            return losses, stats, None
        if ids is not None:  # the bucket's gradient spreads over its tokens by the student's probabilities
            fractions = (student_soft - log_q[:, -1:]).exp_()  # of the bucket; those at ids are overwritten
            grad = fractions.mul_(grad[:, -1:]).scatter_(-1, ids, grad[:, :-1])
        # alpha t^2 * dD/d(logits / t) * 1/t
        grad = F.pad(grad.mul_(self.alpha * self.t), (0, logits.shape[-1] - n_vocab))
        if self.alpha < 1:  # (1 - alpha) * (softmax - one-hot)
            grad = grad.add_(student_logprobs.exp_(), alpha=1 - self.alpha)
            grad.scatter_add_(1, targets[:, None], torch.full_like(grad[:, :1], self.alpha - 1))
        return losses, stats, grad


class Teacher:
    """A frozen model, and a clock of what it computes before training."""

    def __init__(self, model, run):
        self.model = model.requires_grad_(False).eval()
        self.net = run.wrap(model)
        self.sharded = run.fsdp
        self.clock = runtime.Clock()

    @torch.no_grad()
    def __call__(self, tensors, indices):
        """A batch -> the hidden states (N, C) at these indices of the flattened (B * T,), and the head (V, C)."""
        inputs = {name: tensor for name, tensor in tensors.items() if name != 'targets'}
        hidden = self.net(**inputs, output='hidden').flatten(0, 1)[indices]
        hidden, head, _ = self.model.products(hidden)
        return hidden, head.clone() if self.sharded else head  # FSDP frees the gathered weights again


def distillation_loss(net, run, arrays, rule, teacher, cached=()):
    """NumPy arrays {'idx', 'targets', …}, (B, T) each -> the mean loss of their N targets, and the rule's stats of each
    (N, 2). cached: what a Cache has of the teacher at these targets; without it the teacher runs."""
    targets = arrays['targets'].reshape(-1)
    indices = np.flatnonzero(targets != -100)
    tensors = dict(zip(arrays, run.to_device(*arrays.values()), strict=True))
    indices, targets, *cached = run.to_device(indices, targets[indices], *cached)
    with run.autocast(arrays['idx'].shape[1]):
        if not cached:
            hidden, rule.head = teacher(tensors, indices)
            cached = [hidden]
        return net(**tensors, output=partial(loss_by_rule, rule=rule, places=indices, given=(targets, *cached)))


def keep_layers(state, n_layer):
    """A checkpoint's dict -> the same with n_layer of its layers, evenly spaced from the first (0, 3, 6, 9 of 12), as
    DistilBERT begins (arXiv:1910.01108). UserError where a layer would change its kind."""
    config = GPTConfig(**state['model_args'])
    if not 1 <= n_layer <= config.n_layer:
        raise UserError(f"init_from='teacher' keeps n_layer={n_layer} of its layers, and the teacher has "
                        f'{config.n_layer}: give fewer')
    student_args = state['model_args'] | {'n_layer': n_layer}
    student = GPTConfig(**student_args)
    kept = [i * config.n_layer // n_layer for i in range(n_layer)]
    for i, layer in enumerate(kept):
        kinds = [(c.is_local(j), c.is_sparse(j), c.rotates(j), c.is_delta(j))
                 for c, j in ((student, i), (config, layer))]
        if kinds[0] != kinds[1]:
            raise UserError(f"init_from='teacher' with n_layer={n_layer}: layer {layer} of the teacher would be layer "
                            f'{i}: one has a window, experts, a rotation or a state and the other has not: give '
                            'another n_layer')
    model = {name: tensor for name, tensor in state['model'].items() if not name.startswith('blocks.')}
    for i, layer in enumerate(kept):
        prefix = f'blocks.{layer}.'
        for name, tensor in state['model'].items():
            if name.startswith(prefix):
                model[f'blocks.{i}.{name.removeprefix(prefix)}'] = tensor.clone()
    return {'version': VERSION, 'model': model, 'model_args': student_args, 'tokenizer': state['tokenizer'], 'iter': 0}


# ----------------------------------------------------------------------------------------------------------------------
# what the teacher computes before training

class Cache:
    """The teacher's top_k tokens at every target of the training data, on disk, memory-mapped: a directory with
    ids.bin (N, k) uint16 or uint32; logprobs.bin (N, k + 1) float16, the last of all other tokens as one; done.bin, a
    byte for each part of the data; and meta.json.

    A target takes 4 k + 2 bytes (6 k + 2 with more than 65,536 tokens). `fill` computes the parts that are not done, so
    that it resumes where it was interrupted. UserError for a directory of another teacher or other data.
    """
    TOKENS_PER_PART = 4096  # about

    def __init__(self, folder, data, run, spec):
        self.folder = Path(folder)
        self.data = data
        self.run = run
        self.items = data.fixed(0)  # all windows or rows
        self.begins = np.cumsum(data.targets_in) - data.targets_in  # the first target of each item
        n_targets = int(data.targets_in.sum())
        meta = {'targets': n_targets, 'data': data.fingerprint(), 'dtype': run.dtype} | spec
        item_length = data.lengths.mean() if isinstance(data, ChatData) else data.block_size
        self.items_per_part = max(1, int(self.TOKENS_PER_PART / item_length))
        n_parts = math.ceil(len(self.items) / self.items_per_part)
        id_dtype = 'uint16' if meta['vocab'] <= 1 << 16 else 'uint32'
        self.layout = {'ids': (id_dtype, (n_targets, meta['top_k'])),
                       'logprobs': ('float16', (n_targets, meta['top_k'] + 1)),
                       'done': ('uint8', (n_parts,))}
        run.on_main(lambda: self.prepare(meta))
        self.files = {name: np.memmap(self.folder / f'{name}.bin', kind, 'r+', shape=shape)
                      for name, (kind, shape) in self.layout.items()}

    def prepare(self, meta):
        """Checks the directory, or creates it with files of their full size, so that a full disk shows now."""
        path = self.folder / 'meta.json'
        sizes = {self.folder / f'{name}.bin': np.dtype(kind).itemsize * math.prod(shape)
                 for name, (kind, shape) in self.layout.items()}
        try:
            if all(file.exists() for file in (path, *sizes)):
                return self.check(path, sizes, meta)
            self.folder.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # a directory without it is incomplete
            for file, size in sizes.items():
                with open(file, 'wb') as f:
                    if hasattr(os, 'posix_fallocate'):
                        os.posix_fallocate(f.fileno(), 0, size)
                    f.truncate(size)
            runtime.write_atomic(path, lambda f: f.write(json.dumps(meta, indent=1).encode()))
        except OSError as error:
            raise UserError(f'cache={self.folder}: {error.strerror}: it needs {sum(sizes.values()):,} bytes') from None

    def check(self, path, sizes, meta):
        """UserError where meta.json or the size of a file is not that of this run."""
        try:
            found = {**json.loads(path.read_text(encoding='utf-8'))}
        except (ValueError, TypeError) as error:
            raise UserError(f'{path}: malformed ({error}): delete {self.folder}, to have it made again') from None
        for key in meta:
            if found.get(key) != meta[key]:
                raise UserError(f'cache={self.folder} was made for another {key} ({found.get(key)!s:.20}, not '
                                f'{meta[key]!s:.20}): give another --cache')
        for file, size in sizes.items():
            if file.stat().st_size != size:
                raise UserError(f'{file}: {file.stat().st_size:,} bytes, not {size:,}: delete {self.folder}, to have '
                                'it made again')

    @torch.no_grad()
    def fill(self, teacher, rule):
        """Computes and writes the parts that are not done, the processes in turn."""
        run, clock = self.run, teacher.clock
        missing = run.on_main(lambda: np.flatnonzero(self.files['done'] == 0))  # before any process writes
        n_rounds = math.ceil(len(missing) / run.world_size)
        clock.start()
        for i in range(n_rounds):
            # FSDP: all processes must run each forward pass, so those that have no part left make the first ones again
            part = missing[(i * run.world_size + run.rank) % len(missing)]
            first = part * self.items_per_part
            ids, logprobs = self.compute(self.items[first:first + self.items_per_part], teacher, rule)
            rows = slice(self.begins[first], self.begins[first] + len(ids))
            for name, values in (('ids', ids), ('logprobs', logprobs)):
                self.files[name][rows] = values.cpu().numpy()
                self.files[name].flush()
            self.files['done'][part] = 1  # last: a part that is interrupted is computed again
            self.files['done'].flush()
            if i % 10 == 9 or i == n_rounds - 1:
                count = min(len(missing), (i + 1) * run.world_size)
                run.progress(f'{self.folder}: part {count} of {len(missing)} cached, {clock.read():.0f} s')
        run.sum(0)  # a barrier: all processes have written
        clock.stop()
        if not self.files['done'].all():
            raise UserError(f'cache={self.folder}: other processes wrote elsewhere: give a directory that all of them '
                            'share')

    def compute(self, items, teacher, rule):
        """The teacher's top_k tokens at the N targets of these items: ids (N, k), log-probabilities (N, k + 1)."""
        run = self.run
        idx, targets = self.data.read(items)
        indices = np.flatnonzero(targets.reshape(-1) != -100)
        idx, indices = run.to_device(idx, indices)
        with run.autocast(idx.shape[1]):
            hidden, rule.head = teacher({'idx': idx}, indices)
            chunks = hidden.split(chunk_rows(len(rule.head), run.device_type))
            ids, logprobs = zip(*(rule.teacher_logprobs(chunk) for chunk in chunks), strict=True)
        return torch.cat(ids), torch.cat(logprobs)

    def batch(self, first, count):
        """What is cached for the N targets of a batch of the data: ids (N, k), log-probabilities (N, k + 1)."""
        indices = self.data.targets_at(first, count)
        logprobs = self.files['logprobs'][indices].astype(np.float32)
        logprobs -= np.log(np.exp(logprobs).sum(1, keepdims=True))  # float16 rounded them: normalise again
        return self.files['ids'][indices].astype(np.int64), logprobs


def with_answer(row, text):
    """A row of `load_prompts` with this answer to its prompt."""
    return row | {'messages': [*row['prompt'], {'role': 'assistant', 'content': text}]}


def answer_of(row):
    """The text of a row's last message."""
    return row['messages'][-1]['content']


PROMPTS_PER_WRITE = 512  # the teacher answers this many prompts between two writes of answers_file


def read_answers(path, spec, n_answers, answers_per_write):
    """The texts that the answers_file at path contains already, of n_answers.

    spec, of the teacher, the prompts and the sampling, is in a second file: UserError where it is another.
    """
    meta, path = Path(f'{path}.meta.json'), Path(path)
    try:
        if meta.exists() and json.loads(meta.read_text(encoding='utf-8')) != spec:
            raise UserError(f'answers_file={path} has answers of another teacher, to other prompts or sampled in '
                            'another way: give another file')
        if not meta.exists() and path.exists():
            raise UserError(f'answers_file={path} exists without {meta.name}, which describes its answers: give '
                            'another file, or train on it with sft.py')
        path.parent.mkdir(parents=True, exist_ok=True)
        runtime.write_atomic(meta, lambda f: f.write(json.dumps(spec, indent=1).encode()))
        text = path.read_text(encoding='utf-8') if path.exists() else ''
        lines = re.findall('[^\n]*\n', text)  # without a last line that was cut short
        if len(lines) < n_answers:
            # unfinished: keep complete batches only, since each batch has its own sampling seed
            lines = lines[:len(lines) // answers_per_write * answers_per_write]
        texts = [answer_of(json.loads(line)) for line in lines]
        if ''.join(lines) != text:
            runtime.write_atomic(path, lambda f: f.write(''.join(lines).encode()))
        return texts
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f'answers_file={path}: malformed ({error}): delete it and {meta.name}') from None


def teacher_answers(teacher, data, run, indices, num_samples, sampling_temperature, path='', spec=None):
    """The teacher's answers to prompts of these indices of a PromptData, num_samples to each -> rows of chats.

    path, spec: the answers_file that they are appended to, or read from, see `read_answers`; '' = none.
    """
    rows = []
    if path:
        n_answers = len(indices) * num_samples
        texts = run.on_main(lambda: read_answers(path, spec, n_answers, PROMPTS_PER_WRITE * num_samples))
        prompts = np.repeat(indices, num_samples)  # some may have no answer yet
        rows = [with_answer(data.rows_kept[i], text) for i, text in zip(prompts, texts, strict=False)]
    force = forcing(data.tokenizer, tools, 0, max_tool_calls)
    if force and force.tools.functions:
        raise UserError(f"tools={tools}: the teacher's answers are kept as texts, which have no turns for calls: give "
                        'rows with answers, or --on_policy=1')
    clock = teacher.clock
    clock.start()
    for first in range(len(rows) // num_samples, len(indices), PROMPTS_PER_WRITE):
        batch = indices[first:first + PROMPTS_PER_WRITE]
        rollout = generate_rollouts(teacher.model, data, batch, run, max_new_tokens, num_samples, sampling_temperature,
                                    sample_seed=first, force=force)
        new = [with_answer(data.rows_kept[i], text) for i, text in zip(rollout.rows, rollout.texts, strict=True)]
        rows += new
        if path and run.main:
            lines = [json.dumps({key: row[key] for key in row if key not in ('where', 'prompt')}, ensure_ascii=False)
                     for row in new]
            with open(path, 'ab') as f:
                f.write('\n'.join([*lines, '']).encode())
                f.flush()
                os.fsync(f.fileno())
        run.progress(f'the teacher has answered {first + len(batch):,} of {len(indices):,} prompts, '
                     f'{clock.read():.0f} s')
    clock.stop()
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# data

def find_data(run, dataset):
    """The folder or file of a dataset, prepared if it is not yet -> (path, whether it holds chats)."""
    if is_file_of_rows(dataset):
        return dataset, True
    run.on_main(lambda: find_dataset(dataset))  # one process prepares it, the others wait
    folder = find_dataset(dataset)
    if kind_of(folder) == 'pairs':
        raise UserError(f'{folder} holds pairs of source and target: distill.py trains on running text or chats')
    chats = kind_of(folder) == 'chats'
    if not chats and (answers == 'teacher' or on_policy):
        key = "answers='teacher'" if answers == 'teacher' else f'on_policy={on_policy}'
        raise UserError(f'{key} needs prompts, and {folder} holds running text')
    return folder, chats


def load_rows(split):
    """A split of a dataset of chats -> (rows, each with its 'prompt', and why others were skipped)."""
    load = load_chats if answers == 'gold' and on_policy < 1 else load_prompts  # prompts need no answer in the data
    rows, skipped = load(dataset, split, strict, val_fraction)
    return load_tools(tools).rows([{'prompt': row['messages'][:-1]} | row for row in rows]), skipped


def report_dropped(run, name, data, skipped):
    """Prints how many rows of a file are not in this data, and why."""
    if dropped := data.left_out(skipped):
        run.print0(f'{name}: {dropped}')


def load_train_chats(teacher, teacher_sha256, tokenizer, length, run):
    """The training split -> (ChatData to train on, PromptData to sample answers to), None for what no step needs.

    With answers='teacher' the teacher answers here.
    """
    rows, skipped = load_rows('train')
    train_data = prompt_data = None
    if on_policy or answers == 'teacher':
        prompt_data = PromptData(rows, tokenizer, length, max_new_tokens, seed, strict)
        report_dropped(run, f'{dataset}, train, prompts', prompt_data, skipped)
    if answers == 'teacher':
        indices = prompt_data.fixed(answer_prompts)
        ungraded = [row for row in (prompt_data.rows_kept[i] for i in indices) if 'answer' not in row]
        if correct_only and ungraded:
            raise UserError(f'{ungraded[0]["where"]}: it has no "answer", so correct_only=True cannot grade it')
        spec = {'teacher': teacher_sha256, 'data': prompt_data.fingerprint(), 'prompts': len(indices),
                'num_answers': num_answers, 'answer_temperature': answer_temperature,
                'max_new_tokens': max_new_tokens, 'tools': tools, 'seed': seed}
        answered = teacher_answers(teacher, prompt_data, run, indices, num_answers, answer_temperature, answers_file,
                                   spec)
        rows = [row for row in answered if answer_of(row).strip()]
        if correct_only:
            rows = [row for row in rows if is_correct(row, answer_of(row))]
        if not rows:
            raise UserError(f'{dataset}, train: the teacher gave no usable answer')
        run.print0(f'{dataset}, train: {len(rows):,} rows, with {len(answered):,} answers of the teacher'
                   + ', of which only correct ones are kept' * correct_only)
    if on_policy < 1:
        train_data = ChatData(rows, tokenizer, length, seed, too_long, pack=pack, calls=tools, strict=strict)
        report_dropped(run, f'{dataset}, train', train_data, skipped)
    return train_data, prompt_data if on_policy else None


def load_val_chats(teacher, tokenizer, length, run):
    """The held-out split as ChatData. The teacher answers prompts that have no answer in the data."""
    rows, skipped = load_rows('val')
    unanswered = [row for row in rows if not answer_of(row).strip()]
    if unanswered:
        prompt_data = PromptData(unanswered, tokenizer, length, max_new_tokens, seed, strict)
        report_dropped(run, f'{dataset}, val, prompts', prompt_data, skipped)
        answered = teacher_answers(teacher, prompt_data, run, prompt_data.fixed(eval_rows), 1, 0.0)
        rows = [row for row in rows + answered if answer_of(row).strip()]
        if not rows:
            raise UserError(f'{dataset}, val: the teacher gave no usable answer')
        run.print0(f'{dataset}, val: {len(rows):,} rows, with {len(answered):,} answers of the teacher')
    val_data = ChatData(rows, tokenizer, length, seed, too_long, calls=tools, strict=strict)
    report_dropped(run, f'{dataset}, val', val_data, skipped)
    return val_data


# ----------------------------------------------------------------------------------------------------------------------
# evaluation

@torch.no_grad()
def held_out_metrics(net, data, indices, run, token_bytes, rule=None, teacher=None):
    """Loss of a model on windows or rows of these indices, and its divergence from the teacher, 0 without one."""
    def work(part):
        arrays = dict(zip(('idx', 'targets'), data.read(np.asarray(indices)[part]), strict=True))
        counts = arrays['targets'] != -100
        sums = np.zeros((len(part), 4))  # cross-entropy and divergence in nats, targets and their bytes
        if teacher is None:
            with run.autocast(arrays['idx'].shape[1]):
                losses = net(*run.to_device(*arrays.values()), reduction='none')
            sums[:, 0] = losses.double().sum(1).cpu().numpy()
        else:
            _, stats = distillation_loss(net, run, arrays, rule, teacher)
            row_of_target = np.nonzero(counts)[0]
            np.add.at(sums, (row_of_target, slice(2)), stats.cpu().double().numpy())
        sums[:, 2] = counts.sum(1)
        sums[:, 3] = (token_bytes[np.where(counts, arrays['targets'], 0)] * counts).sum(1)
        return sums
    was_training = net.training
    net.eval()
    lengths = data.lengths[indices] if isinstance(data, ChatData) else np.full(len(indices), data.block_size)
    sums = run.distributed_map(work, lengths, max(batch_size, 4096 // data.block_size))
    net.train(was_training)
    low, high = ratio_interval(sums[:, 0].tolist(), sums[:, 2].tolist())
    nats, divergences, n_targets, n_bytes = sums.sum(0)
    loss = nats / n_targets
    return {'val/loss': loss, 'val/loss_low': low, 'val/loss_high': high, 'val/ppl': math.exp(min(loss, 99)),
            'val/kl': divergences / n_targets, 'val/bpb': nats / math.log(2) / max(1, n_bytes)}


def evaluate(net, model, teacher, data, indices, run, rule, chats, token_bytes, force):
    """Loss on held-out windows or rows, divergence from the teacher, and a sample, or answers with their grades ->
    (metrics, summary, samples)."""
    tokenizer = data.tokenizer
    metrics = held_out_metrics(net, data, indices, run, token_bytes, rule, teacher)
    summary = f'val loss {metrics["val/loss"]:.4f}, KL from the teacher {metrics["val/kl"]:.4f}'
    if chats:
        greedy = generate_rollouts(model, data, indices, run, max_new_tokens, temperature=0, force=force)
        rows = [data.rows_kept[i] for i in indices]
        row_grades = [grades(row, text) for row, text in zip(rows, greedy.texts, strict=True)]
        means, ranges = summarise(row_grades)
        metrics |= as_metrics(means, ranges) | outcomes(rows, row_grades)
        summary += f', {format_metrics(means, ranges)}'
        if by_steps := accuracy_by(rows, row_grades, 'steps'):
            summary += f', correct by steps: {by_steps}'
        transcripts = map(data.transcript, greedy.ids)
        return metrics, summary, list(map(format_answer, rows[:show_answers], transcripts, row_grades))
    summary += f', perplexity {metrics["val/ppl"]:.2f}, {metrics["val/bpb"]:.4f} bits per byte'
    if not sample_tokens:
        return metrics, summary, []
    start_ids = tokenizer.encode(sample_start) or [tokenizer.eot]
    with run.unsharded(model):
        new_ids = generate(model, [start_ids], sample_tokens, temperature=0.8, stop_ids=(tokenizer.eot,), seed=seed,
                           vocab_limit=tokenizer.n_vocab)[0]
    return metrics, summary, [sample_start + tokenizer.decode([i for i in new_ids if i != tokenizer.eot], start=False)]


# ----------------------------------------------------------------------------------------------------------------------

def check_knobs():
    """UserError for knobs that do not go together."""
    if num_answers > 1 and not answer_temperature:
        raise UserError(f'num_answers={num_answers} would all be the same: set answer_temperature above 0')
    if cache and not top_k:
        raise UserError(f"cache={cache} stores the teacher's top_k tokens: set --top_k=32 (the size of the vocabulary "
                        'stores all of them)')
    if cache and (not alpha or on_policy == 1):
        raise UserError(f'cache={cache} would be unused: alpha=0 does not use the teacher, on_policy=1 not the data: '
                        'drop --cache')
    if answers == 'gold':
        changed = {'answers_file': answers_file, 'answer_prompts': answer_prompts, 'correct_only': correct_only,
                   'answer_temperature': answer_temperature, 'num_answers': num_answers if num_answers > 1 else 0}
        for name, value in changed.items():
            if value:
                raise UserError(f'{name}={value} needs --answers=teacher')
    if on_policy == 1 and answers == 'teacher':
        raise UserError("answers='teacher' would be unused: on_policy=1 trains on the student's answers only")
    if on_policy and prompts_per_step < gradient_accumulation_steps:
        raise UserError(f'prompts_per_step={prompts_per_step} must be >= gradient_accumulation_steps='
                        f'{gradient_accumulation_steps}')


def new_student(init_from, teacher_model, tokenizer, given):
    """The state of a student that is no model yet: for 'scratch' new weights, for 'teacher' some of its layers.

    given: fields of GPTConfig that the user set. UserError where not all of the student's weights would be trained.
    """
    for key in ('lora_rank', 'adapter_dim', 'quant'):
        if given.get(key):
            raise UserError(f'{key}: all weights of a student from {init_from!r} are trained: drop --{key}')
        if init_from == 'teacher' and getattr(config_of(teacher_model), key):
            raise UserError(f'teacher={teacher} has {key}: merge it first, with convert.py')
    if init_from == 'scratch':
        args = {'vocab_size': teacher_model.config.vocab_size}
        return {'version': VERSION, 'model': None, 'model_args': args, 'tokenizer': tokenizer.to_dict(), 'iter': 0}
    if 'n_layer' not in given:
        raise UserError(f"init_from='teacher': set how many of the teacher's {teacher_model.config.n_layer} layers the "
                        'student keeps, as --n_layer=2')
    return keep_layers(state_of(teacher_model) | {'tokenizer': tokenizer.to_dict()}, given['n_layer'])


def main():
    # config files and --key=value set the knobs above, and the fields of GPTConfig and LoRAConfig: those are given
    config, given = runtime.configure(globals(), GPTConfig, LoRAConfig)
    runtime.check_ranges(config, RANGES)
    check_knobs()
    run = runtime.Run(out_dir, device, dtype, seed, fsdp)
    run.check_accumulation(gradient_accumulation_steps)

    # teacher and student
    teacher_model, tokenizer = load_model(teacher)
    if teacher_model.config.n_encoder_layer or not teacher_model.config.causal:
        raise UserError(f'teacher={teacher} is not a causal language model')
    folder, chats = find_data(run, dataset)
    resume_from = run.find_checkpoint(init_from)
    new = {name: partial(new_student, name, teacher_model, tokenizer, given) for name in ('scratch', 'teacher')}
    start = load_to_train('distill', init_from.removeprefix('auto:'), resume_from, given, seed, new)
    model = start.model
    length = start.row_length(max_length if chats else 0)
    if not start.tokenizer.same_as(tokenizer):
        raise UserError(f'{start.origin} has another tokenizer ({start.tokenizer.name}, {start.tokenizer.n_vocab:,} '
                        f'tokens) than teacher={teacher} ({tokenizer.name}, {tokenizer.n_vocab:,}): distillation needs '
                        'the same tokenizer')
    if length > teacher_model.config.block_size:
        raise UserError(f'rows of {length} tokens are longer than the block_size={teacher_model.config.block_size} of '
                        f'teacher={teacher}: lower {"max_length" if chats else "block_size"}')
    if chats and max_new_tokens >= model.config.block_size:
        raise UserError(f'max_new_tokens={max_new_tokens} must be < block_size={model.config.block_size}, which needs '
                        'room for the prompt: lower it')
    teacher_sha256 = ''
    if cache or answers_file:
        shape = json.dumps(asdict(teacher_model.config), sort_keys=True)
        teacher_sha256 = fingerprint(teacher_model.state_dict(), shape)
    frozen_teacher = Teacher(teacher_model, run)

    # data
    prompt_data = None
    if chats:
        train_data, prompt_data = load_train_chats(frozen_teacher, teacher_sha256, tokenizer, length, run)
        val_data = load_val_chats(frozen_teacher, tokenizer, length, run)
    else:
        train_data = TokenData(folder, 'train', length, seed, aligned=bool(cache))
        val_data = TokenData(folder, 'val', length, seed)
        if not train_data.tokenizer.same_as(tokenizer):
            raise UserError(f'{folder} is prepared with another tokenizer ({train_data.tokenizer.name}) than teacher='
                            f'{teacher} has ({tokenizer.name}): prepare the text with it (docs/data.md shows how)')
        with runtime.user_errors():
            check_prompts([tokenizer.encode(sample_start) or [tokenizer.eot]], model.config)

    # losses
    vocab = min(model.config.vocab_size, teacher_model.config.vocab_size)  # ids that both have
    softcap = teacher_model.config.logit_softcap
    rule = Distillation(alpha, temperature, divergence, jsd_beta, top_k, vocab, softcap)
    on_policy_rule = Distillation(1.0, temperature, divergence, jsd_beta, top_k, vocab, softcap)
    eval_rule = Distillation(1.0, vocab=vocab, softcap=softcap)  # KL of the full distributions, whatever is trained on
    teacher_cache = None
    if cache:
        spec = {'teacher': teacher_sha256, 'temperature': temperature, 'top_k': min(top_k, vocab), 'vocab': vocab}
        teacher_cache = Cache(cache, train_data, run, spec)
        teacher_cache.fill(frozen_teacher, rule)

    net = run.wrap(model, compile, activation_checkpointing)  # model in DDP, FSDP or torch.compile: call this one
    with runtime.user_errors():
        optimizers = make_optimizers(model.named_parameters(), optimizer, learning_rate, weight_decay, (beta1, beta2),
                                     embed_lr, muon_lr, muon_momentum, lora_lr_ratio)

    # resume
    step, items_seen, prompts_seen = 0, 0, 0
    clock = runtime.Clock(frozen_teacher.clock.read())  # what the teacher computed before is part of the training time
    if resume_from:
        checkpoint = start.checkpoint
        run.resume(checkpoint, start.origin, optimizers, config)
        step, items_seen, prompts_seen = checkpoint['iter'], checkpoint['rows'], checkpoint['prompts']
        clock = runtime.Clock(checkpoint['seconds'])
        checkpoint = start.checkpoint = None  # frees its memory
    last_eval = step if resume_from else -1  # a resumed run does not repeat the evaluation of its checkpoint

    micro_steps = gradient_accumulation_steps // run.world_size  # micro-batches of this process
    items_per_step = gradient_accumulation_steps * batch_size  # windows, or rows, packed or not
    force = forcing(tokenizer, tools, 0, max_tool_calls)
    token_bytes = tokenizer.token_bytes()
    eval_indices = val_data.fixed(eval_rows)
    # a student that imitates its teacher has a higher loss on gold answers: where they can be graded, accuracy picks
    # best.pt
    graded = chats and all('answer' in val_data.rows_kept[i] for i in eval_indices)
    best_by = 'correct' if graded else 'loss'
    teacher_loss = held_out_metrics(frozen_teacher.net, val_data, eval_indices, run, token_bytes)['val/loss']
    run.open(config, step if resume_from else None, tensorboard_log, wandb_log, wandb_project, wandb_run_name)
    run.catch_signals()
    sizes = []
    if train_data is not None:
        sizes.append(f'{train_data.n_rows:,} rows' if chats else f'{train_data.n_tokens:,} tokens')
    if prompt_data is not None:
        sizes.append(f'{prompt_data.n_rows:,} prompts to answer')
    run.announce(
        f'{folder}: {", ".join(sizes)} ({tokenizer.name})\n'
        f'teacher {teacher}: {teacher_model.num_params():,} parameters, held-out loss {teacher_loss:.4f}\n'
        f'{start.summary()}; on {run.world_size} x {run.device}, {run.dtype}\n{max_iters:,} steps')

    if run.ddp:
        # DDP fixes the order in which it sums gradients at its first backward pass: a discarded one, on the same rows
        # in every run, makes that order the same for a new and a resumed run
        idx, targets = val_data.read(eval_indices[:batch_size])
        with run.autocast(idx.shape[1]):
            loss = net(*run.to_device(idx, targets))
        run.warm_up_ddp(net, loss)
    meter = runtime.Meter(run, clock, max_iters, model.flops_per_token(length))
    clock.start()
    meter.reset(step)
    while True:
        evaluating = step > last_eval and (step % eval_interval == 0 or step == max_iters)
        score = math.inf  # lower is better; without an evaluation it is never the best
        if evaluating:
            clock.stop()
            metrics, summary, samples = evaluate(net, model, frozen_teacher, val_data, eval_indices, run, eval_rule,
                                                 chats, token_bytes, force)
            run.log({'iter': step, 'seconds': clock.read(), 'teacher/loss': teacher_loss} | metrics)
            run.print0(f'step {step}: {summary}, {clock.read():.1f} s of training')
            if samples:
                run.sample(step, '\n'.join(samples))
            score = metrics['val/loss'] if best_by == 'loss' else -metrics['val/correct']
            last_eval = step
        stop = run.stop_signal()
        if evaluating or (stop and step > last_eval):
            clock.stop()
            run.save_checkpoint(start.model_state() | {'iter': step, 'rows': items_seen, 'prompts': prompts_seen,
                                                       'seconds': clock.read()}, optimizers, score, keep_checkpoints)
            clock.start()
            meter.reset(step)
        if stop or step >= max_iters:
            break

        # the learning rate of this step
        lr_scale = lr_factor(step, lr_schedule, warmup_iters, lr_decay_iters or max_iters, min_lr / learning_rate,
                             decay_frac)
        for group in optimizers.param_groups:  # the embedding and Muon have peaks of their own
            group['lr'] = group.setdefault('initial_lr', group['lr']) * lr_scale

        # on-policy, the student answers prompts; decided by (seed, step), so that a resumed run agrees
        rollout = None
        if on_policy and np.random.default_rng([seed, step]).random() < on_policy:
            rows = prompt_data.rows(prompts_seen, prompts_per_step)
            rollout = generate_rollouts(model, prompt_data, rows, run, max_new_tokens, 1, sample_temperature,
                                        sample_seed=1 + step, force=force)  # sample_seed 0 seeds the evaluations
            order = np.argsort(rollout.group_sizes, kind='stable')  # by length: micro-batches need little padding
            micro_batches = np.array_split(order, gradient_accumulation_steps)
            step_targets = rollout.response_mask.sum()
            meter.add(response_len=rollout.lengths.mean(), ended=rollout.ended.mean())
        else:
            step_targets = train_data.n_targets(items_seen, items_per_step)

        # forward and backward, over this process's micro-batches
        step_loss = 0.0
        for number in run.micro_batches(net, gradient_accumulation_steps):
            if rollout is not None:
                first = prompts_seen + number
                part = rollout.take(micro_batches[number])
                arrays, _ = lay_out(part, length)
                n_tokens = rollout.tokens(micro_batches[number])
                n_targets = part.response_mask.sum()
            else:
                first = items_seen + number * batch_size  # a function of the step alone: a resumed run repeats no row
                batch = train_data.batch(first, batch_size)
                arrays = dict(zip(('idx', 'targets', 'positions', 'segments'), batch, strict=False))
                n_tokens = real_tokens(arrays['targets'], arrays.get('segments'))
                n_targets = train_data.n_targets(first, batch_size)
            # a micro-batch with more targets counts more, so that the step's loss is the mean over all its tokens
            weight = n_targets / (step_targets / gradient_accumulation_steps)
            run.seed_dropout(first)  # a function of the seed and the position in the data, not of what ran before
            if rollout is not None:
                loss, stats = distillation_loss(net, run, arrays, on_policy_rule, frozen_teacher)
                meter.add(**{'train/kl_sampled': stats[:, 1].mean() * weight})
            elif alpha:
                cached = teacher_cache.batch(first, batch_size) if teacher_cache else ()
                loss, stats = distillation_loss(net, run, arrays, rule, frozen_teacher, cached)
                cross_entropy, kl = stats.mean(0) * weight
                meter.add(**{'train/ce': cross_entropy, 'train/kl': kl})
            else:  # pretraining or fine-tuning, without a teacher
                tensors = dict(zip(arrays, run.to_device(*arrays.values()), strict=True))
                with run.autocast(arrays['idx'].shape[1]):
                    loss = net(**tensors)
            step_loss += loss.detach() * weight / micro_steps
            loss = loss + model.router_loss()  # a mixture of experts: what balances their load; not in the logged loss
            run.backward(loss * weight / micro_steps)
            meter.add(n_tokens)

        # clip and update; a gradient that is not finite skips the update, which the device decides: the host need not
        # wait (float16: clip_grad_norm unscales the gradients)
        grad_norm = run.clip_grad_norm(model, optimizers, grad_clip)
        run.skip_if_not_finite(optimizers, grad_norm)
        optimizers.step()
        optimizers.zero_grad()
        if model.sparse and not start.frozen:  # as in pretraining: a bias for experts with too little load
            model.balance(run.all_reduce(model.routed())[:, :-1])
        step += 1
        if rollout is None:
            items_seen += items_per_step
        else:
            prompts_seen += prompts_per_step

        if step % max_bad_steps == 0 or step % log_interval == 0:  # not at every step: the host waits for the device
            run.check_skipped(step, max_bad_steps)
        if step % log_interval == 0 or step == max_iters:
            meter.log(step, step_loss, grad_norm, learning_rate * lr_scale)

    run.finish(step, stop, parameters=model.num_params(), trainable=model.num_params(learning=True))
    run.print0(f'done: best val/{best_by} {abs(run.best):.4f}; loss of the teacher {teacher_loss:.4f}; talk to it: '
               f'python sample.py --init_from={out_dir}{" --chat=True" * chats}{f" --tools={tools}" if tools else ""}')


if __name__ == '__main__':
    runtime.cli(main)
