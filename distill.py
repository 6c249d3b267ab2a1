"""
Knowledge distillation: a small model learns from what a large one thinks of every token, not from the token alone.

    python distill.py config/distill_tiny.py                     Shakespeare, from a teacher of four times the size
    python distill.py config/distill_tiny.py --top_k=32 --cache=out/cache        the teacher reads everything only once
    python distill.py config/distill_words.py                    word problems: the teacher reads the right answers
    python distill.py config/distill_words.py --answers=teacher --answers_file=out/answers.jsonl --alpha=0
    python distill.py config/distill_words.py --on_policy=1      … over the student's own answers
    torchrun --standalone --nproc_per_node=2 distill.py config/distill_tiny.py --gradient_accumulation_steps=2

The loss at a token is (1 - alpha) * cross-entropy + alpha * t^2 * D(teacher / t, student / t). Neither model's logits
ever exist as a whole.

Papers: Distilling the Knowledge in a Neural Network (arXiv:1503.02531), sequence-level distillation (arXiv:1606.07947),
every other layer (DistilBERT, arXiv:1910.01108), reverse KL (MiniLLM, arXiv:2306.08543), on-policy distillation and the
generalised Jensen-Shannon divergence (arXiv:2306.13649).
"""
import itertools
import json
import math
import os
import re
from dataclasses import asdict
from pathlib import Path

import runtime  # before torch: it sets an OpenMP variable that torch reads when it is imported

import numpy as np
import torch
import torch.nn.functional as F

from convert import fingerprint, load_model, load_to_train
from dataset import (
    ChatData,
    PromptData,
    TokenData,
    as_metrics,
    by_value,
    find_dataset,
    grade,
    grades,
    in_words,
    kind_of,
    load_chats,
    load_prompts,
    real_tokens,
    shown,
    summarise,
)
from model import GPTConfig, check_prompts, chunk_rows
from rollout import forcing, generate_rollouts, lay_out
from tokenizer import UserError

# where and what
out_dir = 'out/distill'  # directory of the run: checkpoints, metrics, samples
teacher = 'out/teacher'  # the model to learn from: sample.py's
init_from = 'scratch'  # the student: 'scratch', 'teacher' (n_layer of its layers), a model; or 'resume', 'auto'
base = 'scratch'  # the student that 'auto' starts from where there is no run yet
dataset = 'shakespeare'  # folder in data/ (prepared if it is not yet), path of a folder, or a .json or .jsonl file
val_fraction = 0.1  # fraction of the prompts that is held out when dataset is a single file
seed = 1337  # of new weights, the order of the data, dropout and samples
# what is learnt from the teacher
alpha = 0.5  # weight of the divergence; that of the data's own tokens is 1 - alpha
temperature = 1.0  # both distributions are softened by it
divergence = 'forward'  # 'forward' KL(teacher || student), 'reverse' KL, or 'jsd': generalised Jensen-Shannon
jsd_beta = 0.5  # of 'jsd': the teacher's part in the mixture
top_k = 0  # the teacher's likeliest tokens, and all others as one; 0 = every token for itself
cache = ''  # directory for these, computed once; '' = computed at every step
answers = 'gold'  # of chats: 'gold', the data's, or 'teacher', which answers every prompt before training
answers_file = ''  # of 'teacher': where its answers are written as JSON lines, or are already
answer_prompts = 0  # of 'teacher': so many prompts, evenly spaced; 0 = all
num_answers = 1  # of 'teacher': to each
answer_temperature = 0.0  # of 'teacher': 0 = the likeliest tokens
correct_only = False  # of 'teacher': leave out answers that the row's grader finds wrong
on_policy = 0.0  # of chats: share of steps on the student's own answers, with the divergence as their only loss
sample_temperature = 1.0  # of those answers
prompts_per_step = 64  # of those answers, over all processes
# rows
max_length = 0  # of chats, tokens of the longest row; 0 = the model's block_size
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
eval_rows = 160  # held-out windows, or rows, whose prompts are answered too, the same every time; 0 = all
max_new_tokens = 128  # maximum length of an answer, in tokens
tools = False  # run the calculator: after <tool>…</tool> its result is inserted into the answer
show_answers = 3  # answers printed at each evaluation
sample_start = '\n'  # of running text: text that the live sample continues
sample_tokens = 100  # of running text: length of the live sample; 0 = none
log_interval = 10  # steps between lines of the log
keep_checkpoints = 2  # checkpoints to keep: ckpt.pt, and older ones as ckpt.1.pt …
max_bad_steps = 10  # stop after this many skipped updates in a row (loss or gradient not finite)
tensorboard_log = False  # log to out_dir/tensorboard
wandb_log = False  # log to Weights & Biases
wandb_project = 'flatgpt'  # Weights & Biases: project
wandb_run_name = 'distill'  # Weights & Biases: name of the run
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
    **dict.fromkeys(('temperature', 'sample_temperature'), '> 0'),
    **dict.fromkeys(('max_new_tokens', 'num_answers', 'prompts_per_step'), '>= 1'),
    **dict.fromkeys(('top_k', 'answer_prompts', 'answer_temperature', 'max_length', 'eval_rows', 'show_answers',
                     'sample_tokens'), '>= 0'),
    'divergence': ('forward', 'reverse', 'jsd'), 'answers': ('gold', 'teacher'), 'too_long': ('drop', 'left', 'right')}


# ----------------------------------------------------------------------------------------------------------------------
# the loss

def divergence_of(log_p, log_q, kind='forward', beta=0.5):
    """How far a student's distribution q is from a teacher's p, (…, K) log-probabilities both -> (D (…,) in nats, its
    derivative by the student's logits (…, K)).

    'forward': KL(p || q), whose derivative is q - p (arXiv:1503.02531); 'reverse': KL(q || p) (arXiv:2306.08543);
    'jsd': beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (arXiv:2306.13649).
    """
    p, q = log_p.exp(), log_q.exp()
    if kind == 'forward':
        return (p * (log_p - log_q)).sum(-1), q - p
    if kind == 'reverse':
        log_m, to_teacher, share = log_p, 0.0, 1.0
    else:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        to_teacher, share = beta * (p * (log_p - log_m)).sum(-1), 1 - beta
    ratio = log_q - log_m
    to_student = (q * ratio).sum(-1, keepdim=True)
    return to_teacher + share * to_student[..., 0], share * q * (ratio - to_student)


def bucketed(logprobs, ids):
    """Log-probabilities (…, V) -> those of ids (…, k) and, last, of all other tokens together (…, k + 1)."""
    others = logprobs.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat((logprobs.gather(-1, ids), others.clamp(min=-1e4)), -1)  # of none: no probability, but a number


class Distillation:
    """The loss at each token, a rule of `model.LinearLoss`: (1 - alpha) * cross-entropy + alpha * t^2 * divergence.

    t^2 keeps the gradient of the divergence as large as that of the cross-entropy whatever the temperature t. Of two
    vocabularies padded differently the ids that both have count. given: targets (n,), then what is known of the
    teacher: its hidden states (n, C), with its `head` (V, C), the head's soft-cap and top_k; or the ids (n, k) of its
    likeliest tokens and log-probabilities (n, k + 1) at t. vocab: how many ids both have; 0 = all of the teacher's.
    Its stats of a token: its cross-entropy, its divergence.
    """

    def __init__(self, alpha, temperature=1.0, kind='forward', beta=0.5, top_k=0, vocab=0):
        self.alpha, self.t, self.kind, self.beta, self.top_k, self.vocab = alpha, temperature, kind, beta, top_k, vocab
        self.head, self.cap = None, 0.0

    def expected(self, hidden):
        """What the teacher's hidden states say of the ids of both, at t: log-probabilities (…, vocab)."""
        logits = (hidden @ self.head.T).float()
        logits = self.cap * torch.tanh(logits / self.cap) if self.cap else logits
        logits = logits[..., :self.vocab or None]
        # as the student's are taken: of equal models nothing is left to learn
        return (logits / self.t if self.t != 1 else logits).log_softmax(-1)

    def likeliest(self, hidden):
        """Of `expected` the likeliest top_k ids (…, k), and log-probabilities (…, k + 1), the last of all others."""
        logprobs = self.expected(hidden)
        ids = logprobs.topk(min(self.top_k, logprobs.shape[-1])).indices
        return ids, bucketed(logprobs, ids)

    def __call__(self, logits, learning, targets, *known):
        """What `model.LinearLoss` asks for: losses, stats of each token (n, 2), the derivative by the logits."""
        n = self.vocab or logits.shape[-1]
        if len(known) == 1:
            known = self.likeliest(*known) if self.top_k else (None, self.expected(*known))
        ids, log_p = known
        whole = logits.log_softmax(-1)
        losses = -whole.gather(-1, targets[:, None])[:, 0]
        full = whole if self.t == 1 and n == logits.shape[-1] else (logits[:, :n] / self.t).log_softmax(-1)
        log_q = full if ids is None else bucketed(full, ids)
        distance, slope = divergence_of(log_p, log_q, self.kind, self.beta)
        stats = torch.stack((losses, distance), 1)
        total = (1 - self.alpha) * losses + self.alpha * self.t ** 2 * distance
        if not learning:
            return total, stats, None
        if ids is not None:  # the others share what is theirs as the student has shared it
            shares = (full - log_q[:, -1:]).exp_()  # of the others; what stands at ids is written over
            slope = shares.mul_(slope[:, -1:]).scatter_(-1, ids, slope[:, :-1])
        d = F.pad(slope.mul_(self.alpha * self.t), (0, logits.shape[-1] - n))
        if self.alpha < 1:
            d = d.add_(whole.exp_(), alpha=1 - self.alpha)
            d.scatter_add_(1, targets[:, None], torch.full_like(d[:, :1], self.alpha - 1))
        return total, stats, d


class Teacher:
    """A frozen model that says what it thinks of the targets of a batch, for a Distillation. clock: the seconds that it
    took for what it did before training."""

    def __init__(self, model, run):
        self.model, self.head, self.clock = model.requires_grad_(False).eval(), None, runtime.Clock()
        self.net, self.copies = run.wrap(model), run.fsdp
        self.clock.stop()

    @torch.no_grad()
    def __call__(self, tensors, places, rule):
        """A batch -> hidden states (N, C) at these places of the flattened (B * T,); gives the rule the head."""
        given = {name: tensor for name, tensor in tensors.items() if name != 'targets'}
        hidden = self.net(**given, reduction='hidden').flatten(0, 1)[places]
        hidden, head, _ = self.model.products(hidden)
        if self.head is None or self.head.dtype != hidden.dtype:
            self.head = head.detach().clone() if self.copies else head.detach()  # shards are freed again
        rule.head, rule.cap = self.head, self.model.config.logit_softcap
        return hidden.to(self.head.dtype)


def distillation_loss(net, run, arrays, rule, teacher, known=()):
    """A batch of NumPy arrays {'idx', 'targets', …} -> (its mean loss, the rule's stats of each target (N, 2), their
    places in the flattened (B * T,)). known: what was cached of the teacher for these targets, else it is asked."""
    places = np.flatnonzero(arrays['targets'].reshape(-1) != -100)
    tensors = dict(zip(arrays, run.to_device(*arrays.values()), strict=True))
    at, targets, *known = run.to_device(places, arrays['targets'].reshape(-1)[places], *known)
    with run.autocast(arrays['idx'].shape[1]):
        known = known or [teacher(tensors, at, rule)]
        loss, stats = net(**tensors, rule=rule, given=(at, targets, *known))
    return loss, stats, places


def thinned(state, n_layer):
    """A checkpoint's dict -> the same with n_layer of its layers, evenly spaced from the first: 0, 3, 6, 9 of 12."""
    args = dict(state['model_args'])
    config = GPTConfig(**args)
    if not 1 <= n_layer <= config.n_layer:
        raise UserError(f"init_from='teacher' takes n_layer={n_layer} of its layers, and the teacher has "
                        f'{config.n_layer}: give fewer')
    taken, after = [i * config.n_layer // n_layer for i in range(n_layer)], GPTConfig(**args | {'n_layer': n_layer})
    for i, old in enumerate(taken):
        if (after.is_local(i), after.is_sparse(i)) != (config.is_local(old), config.is_sparse(old)):
            raise UserError(f"init_from='teacher' with n_layer={n_layer}: layer {old} of the teacher would be layer "
                            f'{i}: one has a window or experts and the other has not: give another n_layer')
    model = {name: tensor for name, tensor in state['model'].items() if not name.startswith('blocks.')}
    for i, old in enumerate(taken):
        start = f'blocks.{old}.'
        model |= {f'blocks.{i}.{name[len(start):]}': tensor.clone() for name, tensor in state['model'].items()
                  if name.startswith(start)}
    return {'model': model, 'model_args': args | {'n_layer': n_layer}, 'tokenizer': state['tokenizer'], 'iter': 0}


# ----------------------------------------------------------------------------------------------------------------------
# what the teacher leaves behind

class Cache:
    """The teacher's likeliest tokens at every target of the training data, on disk, memory-mapped: a directory with
    ids.bin (N, k) uint16 or uint32, logprobs.bin (N, k + 1) float16, done.bin, a byte for each part, and meta.json.

    A target takes 4 k + 2 bytes (6 k + 2 with more than 65,536 tokens). What is there is kept, so that making it goes
    on where it was interrupted. UserError for a directory of another teacher or other data.
    """
    TOKENS = 4096  # of a part, about

    def __init__(self, folder, data, run, about):
        self.folder, self.data, self.run = Path(folder), data, run
        self.items, self.ends = data.fixed(0), np.cumsum(np.concatenate(([0], data.targets_in)))
        meta = {'targets': int(self.ends[-1]), 'data': data.fingerprint(), 'dtype': run.dtype} | about
        length = data.lengths.mean() if isinstance(data, ChatData) else data.block_size
        self.each = max(1, int(self.TOKENS / length))  # items of a part
        wide, k = 'uint16' if meta['vocab'] <= 1 << 16 else 'uint32', meta['top_k']
        self.shapes = {'ids': (wide, (meta['targets'], k)), 'logprobs': ('float16', (meta['targets'], k + 1)),
                       'done': ('uint8', (-(-len(self.items) // self.each),))}
        run.on_main(lambda: self.prepare(meta))
        self.files = {name: np.memmap(self.folder / f'{name}.bin', kind, 'r+', shape=shape)
                      for name, (kind, shape) in self.shapes.items()}

    def prepare(self, meta):
        """Makes the directory ready: files of their full size, so that a full disk shows now."""
        path = self.folder / 'meta.json'
        fresh = not all(file.exists() for file in (path, *(self.folder / f'{name}.bin' for name in self.shapes)))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not fresh:
                found = json.loads(path.read_text())
                if not isinstance(found, dict):
                    raise ValueError('no JSON object')
                if other := next((key for key in meta if found.get(key) != meta[key]), ''):
                    raise UserError(f'cache={self.folder} was made for another {other} ({found.get(other)!s:.20}, not '
                                    f'{meta[other]!s:.20}): give another --cache')
            for name, (kind, shape) in self.shapes.items():
                file, size = self.folder / f'{name}.bin', np.dtype(kind).itemsize * math.prod(shape)
                if fresh:
                    with open(file, 'wb') as f:
                        if hasattr(os, 'posix_fallocate'):
                            os.posix_fallocate(f.fileno(), 0, size)
                        f.truncate(size)
                elif file.stat().st_size != size:
                    raise UserError(f'{file}: {file.stat().st_size:,} bytes, not {size:,}: delete {self.folder}, to '
                                    'have it made again')
            runtime.write_atomic(path, lambda f: f.write(json.dumps(meta, indent=1).encode()))
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f'{path}: malformed ({error}): delete {self.folder}, to have it made again') from None
        except OSError as error:
            size = sum(np.dtype(kind).itemsize * math.prod(shape) for kind, shape in self.shapes.values())
            raise UserError(f'cache={self.folder}: {error.strerror}: it needs {size:,} bytes') from None

    @torch.no_grad()
    def fill(self, teacher, rule):
        """Asks the teacher for what is missing; each process its share of the parts."""
        run, clock = self.run, teacher.clock
        missing = run.on_main(lambda: np.flatnonzero(self.files['done'] == 0))  # before anybody has begun
        clock.start()
        for i in range(-(-len(missing) // run.world_size)):
            number = i * run.world_size + run.rank
            part = missing[number] if number < len(missing) else missing[0]  # a sharded teacher is gathered by all
            first, last = part * self.each, min((part + 1) * self.each, len(self.items))
            names = ('idx', 'targets')
            arrays = dict(zip(names, self.data.read(self.items[first:last]), strict=True))
            places = np.flatnonzero(arrays['targets'].reshape(-1) != -100)
            tensors = dict(zip(names, run.to_device(*arrays.values()), strict=True))
            with run.autocast(arrays['idx'].shape[1]):
                hidden = teacher(tensors, run.to_device(places)[0], rule)
                found = [rule.likeliest(h) for h in hidden.split(chunk_rows(len(rule.head), run.device_type))]
            if number < len(missing):
                rows = slice(self.ends[first], self.ends[last])
                for name, values in zip(('ids', 'logprobs'), zip(*found, strict=True), strict=True):
                    self.files[name][rows] = torch.cat(values).cpu().numpy().astype(self.files[name].dtype)
                    self.files[name].flush()
                self.files['done'][part] = 1
                self.files['done'].flush()
            if i % 10 == 9 or i * run.world_size >= len(missing) - run.world_size:
                done = min(len(missing), (i + 1) * run.world_size)
                run.progress(f'{self.folder}: the teacher has read part {done} of {len(missing)}, {clock.read():.0f} s')
        run.sum(0)  # nobody reads before all have written
        clock.stop()
        if not self.files['done'].all():
            raise UserError(f'cache={self.folder}: other processes wrote elsewhere: give a directory that all of them '
                            'share')

    def batch(self, first, count):
        """What is kept of the targets of this batch of the data: ids (N, k), log-probabilities (N, k + 1)."""
        at = self.data.targets_at(first, count)
        logprobs = self.files['logprobs'][at].astype(np.float32)
        logprobs -= np.log(np.exp(logprobs).sum(1, keepdims=True))  # 16 bits have rounded them
        return self.files['ids'][at].astype(np.int64), logprobs


AT_ONCE = 512  # prompts that the teacher answers before they are written down


def teacher_answers(teacher, data, run, chosen, samples, temperature, path, about):
    """The teacher's answers to these prompts of a PromptData, samples of each, sampled at a temperature -> texts.

    They are appended to the file at path, if it has a name, a few hundred at a time, and what is there is taken from
    there: `about` says in a second file what they are of, UserError where that is something else.
    """
    meta, rows = Path(f'{path}.meta.json'), data.rows_kept

    def read_answers():
        """Those that are in the file already."""
        if not path:
            return []
        try:
            if meta.exists() and json.loads(meta.read_text()) != about:
                raise UserError(f'answers_file={path} has answers of another teacher, to other prompts or sampled in '
                                'another way: give another file')
            if not meta.exists() and Path(path).exists():
                raise UserError(f'answers_file={path} is there without {meta.name}, which says what its answers are '
                                'of: give another file, or learn from it with sft.py')
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            runtime.write_atomic(meta, lambda f: f.write(json.dumps(about, indent=1).encode()))
            text = Path(path).read_text(encoding='utf-8') if Path(path).exists() else ''
            lines = re.findall('[^\n]*\n', text)  # the last may be cut short
            if len(lines) < len(chosen) * samples:  # a call answers so many prompts, with seeds of its own
                lines = lines[:len(lines) // (samples * AT_ONCE) * samples * AT_ONCE]
            found = [json.loads(line)['messages'][-1]['content'] for line in lines]
            if ''.join(lines) != text:
                runtime.write_atomic(path, lambda f: f.write(''.join(lines).encode()))
            return found
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f'answers_file={path}: malformed ({error}): delete it and {meta.name}') from None
    done, force, clock = run.on_main(read_answers), forcing(data.tokenizer, tools), teacher.clock
    clock.start()
    for first in range(len(done) // samples, len(chosen), AT_ONCE):
        part = chosen[first:first + AT_ONCE]
        found = generate_rollouts(teacher.model, data, part, run, max_new_tokens, samples, temperature,
                                  sample_seed=first, force=force)
        done += found.texts
        if path and run.main:
            taught = [with_answer(rows[i], text) for i, text in zip(found.rows, found.texts, strict=True)]
            lines = [json.dumps({key: row[key] for key in row if key not in ('where', 'prompt')}, ensure_ascii=False)
                     for row in taught]
            with open(path, 'ab') as f:
                f.write('\n'.join([*lines, '']).encode())
                f.flush()
                os.fsync(f.fileno())
        run.progress(f'the teacher has answered {first + len(part):,} of {len(chosen):,} prompts, {clock.read():.0f} s')
    clock.stop()
    return done


def with_answer(row, text):
    """A row of `load_prompts` with this answer to its prompt."""
    return row | {'messages': [*row['prompt'], {'role': 'assistant', 'content': text}]}


def chats_of(split, teacher, known_as, tokenizer, length, run, packed=False):
    """A split of the dataset as (ChatData, PromptData); reports what was left out.

    Of training, either is None where no step needs it.

    Where the knobs say so, or nobody has answered, the answers are the teacher's. known_as: its fingerprint.
    """
    training, prompts_only = split == 'train', split == 'train' and on_policy == 1
    load = load_chats if answers == 'gold' and on_policy < 1 else load_prompts
    rows, skipped = load(dataset, split, strict, val_fraction)
    rows, prompts = [{'prompt': row['messages'][:-1]} | row for row in rows], None
    writes = training and answers == 'teacher' and not prompts_only
    silent = [] if training else [row for row in rows if not row['messages'][-1]['content']]
    if writes or silent or training and on_policy:
        prompts = PromptData(silent or rows, tokenizer, length, max_new_tokens, seed)
        if lost := prompts.left_out(skipped):
            run.print0(f'{dataset}, {split}, prompts: {lost}')
    if writes or silent:
        count, samples, temperature = eval_rows, 1, 0.0
        if writes:
            count, samples, temperature = answer_prompts, num_answers, answer_temperature
        graded, chosen = writes and correct_only, prompts.fixed(count)
        path = answers_file if writes else ''
        missing = next((prompts.rows_kept[i]['where'] for i in chosen if 'answer' not in prompts.rows_kept[i]), '')
        if graded and missing:
            raise UserError(f'{missing}: it has no "answer", so correct_only=True cannot tell whether one is right')
        about = {'teacher': known_as, 'data': prompts.fingerprint(), 'prompts': len(chosen),
                 'num_answers': samples, 'answer_temperature': temperature, 'max_new_tokens': max_new_tokens,
                 'tools': tools, 'seed': seed} if path else {}
        texts = teacher_answers(teacher, prompts, run, chosen, samples, temperature, path, about)
        taught = [(prompts.rows_kept[i], text) for i, text in zip(np.repeat(chosen, samples), texts, strict=True)]
        rows = [row for row in rows if not writes and row['messages'][-1]['content']]
        rows += [with_answer(row, text) for row, text in taught if text.strip()
                 and (not graded or grade(text, row['answer'], row.get('grader', 'number')))]
        if not rows:
            raise UserError(f'{dataset}, {split}: the teacher has no answer that says something'
                            + ' and is right (correct_only=True)' * graded)
        run.print0(f'{dataset}, {split}: {len(rows):,} rows, with {len(texts):,} answers of the teacher'
                + ', of which only those that are right are kept' * graded)
    if prompts_only:
        return None, prompts
    data = ChatData(rows, tokenizer, length, seed, too_long, False, packed)
    if lost := data.left_out(skipped):
        run.print0(f'{dataset}, {split}: {lost}')
    return data, prompts if training and on_policy else None


# ----------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def item_losses(net, data, items, run, token_bytes, batch_size, rule=None, teacher=None):
    """Of these windows or rows, float64 (n, 4): summed cross-entropy and divergence, both in nats, targets and their
    bytes. Without a teacher no divergence."""
    block_size = data.block_size

    def work(part):
        arrays = dict(zip(('idx', 'targets'), data.read(np.asarray(items)[part]), strict=True))
        counts = arrays['targets'] != -100
        sums = np.zeros((len(part), 4))
        if teacher is None:
            with run.autocast(arrays['idx'].shape[1]):
                idx, targets = run.to_device(*arrays.values())
                sums[:, 0] = net(idx, targets, reduction='none').double().sum(1).cpu().numpy()
        else:
            _, stats, places = distillation_loss(net, run, arrays, rule, teacher)
            np.add.at(sums, (places // counts.shape[1], slice(2)), stats.cpu().double().numpy())
        sums[:, 2] = counts.sum(1)
        sums[:, 3] = (token_bytes[np.where(counts, arrays['targets'], 0)] * counts).sum(1)
        return sums
    was_training = net.training
    net.eval()
    lengths = data.lengths[items] if isinstance(data, ChatData) else np.full(len(items), block_size)
    found = run.distributed_map(work, lengths, max(batch_size, 4096 // block_size))
    net.train(was_training)
    return found


def evaluate(net, model, teacher, data, chosen, run, rule, chats, token_bytes, force):
    """Loss on held-out windows or rows, how far the student is from the teacher, and a sample, or answers with their
    grades -> (metrics, summary, samples)."""
    nats, divergence_sum, count, n_bytes = item_losses(net, data, chosen, run, token_bytes, batch_size, rule,
                                                       teacher).sum(0)
    loss, kl, tokenizer = nats / count, divergence_sum / count, data.tokenizer
    metrics = {'val/loss': loss, 'val/ppl': math.exp(min(loss, 99)), 'val/kl': kl,
               'val/bpb': nats / math.log(2) / max(1, n_bytes)}
    summary = f'val loss {loss:.4f}, KL from the teacher {kl:.4f}'
    if chats:
        answers = generate_rollouts(model, data, chosen, run, max_new_tokens, temperature=0, force=force)
        rows = [data.rows_kept[i] for i in chosen]
        marks = [grades(row, text) for row, text in zip(rows, answers.texts, strict=True)]
        means, ranges = summarise(marks)
        metrics |= as_metrics(means, ranges)
        summary += f', {in_words(means, ranges)}'
        if by := by_value(rows, marks, 'steps'):
            summary += f', correct by steps: {by}'
        samples = list(map(shown, rows, answers.texts, marks))
        return metrics, summary, samples[:show_answers]
    summary += f', perplexity {metrics["val/ppl"]:.2f}, {metrics["val/bpb"]:.4f} bits per byte'
    if not sample_tokens:
        return metrics, summary, []
    start_ids = tokenizer.encode(sample_start) or [tokenizer.eot]
    with run.unsharded(model):
        new_ids = model.generate([start_ids], sample_tokens, temperature=0.8, stop_ids=(tokenizer.eot,), seed=seed,
                                 vocab_limit=tokenizer.n_vocab)[0]
    return metrics, summary, [sample_start + tokenizer.decode([t for t in new_ids if t != tokenizer.eot])]


def check_knobs():
    """UserError for knobs that do not go together."""
    if num_answers > 1 and not answer_temperature:
        raise UserError(f'num_answers={num_answers} would all be the same: set answer_temperature above 0')
    if cache and not top_k:
        raise UserError(f'cache={cache} keeps the likeliest tokens: set top_k, as --top_k=32 (the size of the '
                        'vocabulary keeps all of them)')
    if cache and not alpha:
        raise UserError(f'cache={cache}: alpha=0 asks the teacher nothing: drop --cache')
    if cache and on_policy == 1:
        raise UserError(f"cache={cache}: on_policy=1 learns from the student's own answers: drop --cache")
    of_answers = {'answers_file': answers_file, 'answer_prompts': answer_prompts,
                  'answer_temperature': answer_temperature, 'correct_only': correct_only,
                  'num_answers': num_answers if num_answers > 1 else 0}
    for name, value in of_answers.items():
        if value and answers != 'teacher':
            raise UserError(f"{name}={value} is about the teacher's answers: add --answers=teacher")
    if on_policy == 1 and answers == 'teacher':
        raise UserError("on_policy=1 learns from the student's own answers alone, so answers='teacher' would be left")
    if on_policy and prompts_per_step < gradient_accumulation_steps:
        raise UserError(f'prompts_per_step={prompts_per_step} is less than gradient_accumulation_steps='
                        f'{gradient_accumulation_steps}: raise it')


def find_data(run, dataset):
    """The folder or file of a dataset, prepared where it is not yet -> (path, whether it holds chats)."""
    if Path(dataset).suffix in ('.json', '.jsonl'):
        return dataset, True
    run.on_main(lambda: find_dataset(dataset))  # one process prepares it, the others wait
    folder = find_dataset(dataset)
    if kind_of(folder) == 'pairs':
        raise UserError(f'{folder} holds pairs of source and target: distill.py learns from running text or chats')
    chats = kind_of(folder) == 'chats'
    if not chats and (answers == 'teacher' or on_policy):
        key = "answers='teacher'" if answers == 'teacher' else f'on_policy={on_policy}'
        raise UserError(f'{key} needs prompts, and {folder} holds running text')
    return folder, chats


def new_students(teacher_model, tokenizer, given):
    """What init_from may say beside models: {'scratch', 'teacher': a function that gives the student's state}.

    UserError where such a student is to be trained by LoRA or the like.
    """
    def new_weights():
        args = {'vocab_size': teacher_model.config.vocab_size}
        return {'model': None, 'model_args': args, 'tokenizer': tokenizer.to_dict(), 'iter': 0}

    def thinned_teacher():
        if 'n_layer' not in given:
            raise UserError(f"init_from='teacher': say how many of the teacher's {teacher_model.config.n_layer} layers "
                            'the student has, as --n_layer=2')
        return thinned({'model': teacher_model.state_dict(), 'model_args': asdict(teacher_model.config),
                        'tokenizer': tokenizer.to_dict()}, given['n_layer'])
    new = {'scratch': new_weights, 'teacher': thinned_teacher}
    names = {init_from, base} & set(new) if init_from == 'auto' else {init_from} & set(new)
    for key in ('lora_rank', 'adapter_dim', 'quant') if names else ():
        if given.get(key):
            raise UserError(f'{key}: a student from {names.pop()!r} learns with all its weights: drop --{key}')
        if getattr(teacher_model.config, key) and 'teacher' in names:
            raise UserError(f'teacher={teacher} has {key}: make a whole model of it first, with convert.py')
    return new


def main():
    # config files and --key=value set the knobs above, and the fields of GPTConfig, a model's shape: those are given
    config, given = runtime.configure(globals(), GPTConfig)
    runtime.check_ranges(config, RANGES)
    check_knobs()
    run = runtime.Run(out_dir, device, dtype, seed, fsdp)
    run.check_accumulation(gradient_accumulation_steps)

    # teacher and student
    teacher_model, tokenizer = load_model(teacher)
    if teacher_model.config.n_encoder_layer or not teacher_model.config.causal:
        raise UserError(f'teacher={teacher} is not a causal decoder alone: it cannot say what comes next')
    folder, chats = find_data(run, dataset)
    resume_from = run.find_checkpoint(init_from)
    start = load_to_train('distill', base if init_from == 'auto' else init_from, resume_from, given, seed,
                          new_students(teacher_model, tokenizer, given))
    model = start.model
    length = start.row_length(max_length if chats else 0)
    if not start.tokenizer.same_as(tokenizer):
        raise UserError(f'{start.origin} has another tokenizer ({start.tokenizer.name}, {start.tokenizer.n_vocab:,} '
                        f'tokens) than teacher={teacher} ({tokenizer.name}, {tokenizer.n_vocab:,}): what one thinks of '
                        'its tokens says nothing about those of the other; give a student with the same')
    if length > teacher_model.config.block_size:
        raise UserError(f'rows of {length} tokens are more than teacher={teacher} reads, '
                        f'{teacher_model.config.block_size}: lower {"max_length" if chats else "block_size"}')
    teacher_sha256 = ''
    if cache or answers_file:
        shape = json.dumps(asdict(teacher_model.config), sort_keys=True)
        teacher_sha256 = fingerprint(teacher_model.state_dict(), shape)
    frozen_teacher = Teacher(teacher_model, run)

    # data
    prompts = None
    if chats:
        train_data, prompts = chats_of('train', frozen_teacher, teacher_sha256, tokenizer, length, run, pack)
        val_data, _ = chats_of('val', frozen_teacher, teacher_sha256, tokenizer, length, run)
    else:
        train_data = TokenData(folder, 'train', length, seed, aligned=bool(cache))
        val_data = TokenData(folder, 'val', length, seed)
        if not train_data.tokenizer.same_as(tokenizer):
            raise UserError(f'{folder} is prepared with another tokenizer ({train_data.tokenizer.name}) than teacher='
                            f'{teacher} has ({tokenizer.name}): prepare the text with that one (README shows how)')
        with runtime.user_errors():
            check_prompts([tokenizer.encode(sample_start) or [tokenizer.eot]], model.config)

    # losses
    vocab = min(model.config.vocab_size, teacher_model.config.vocab_size)  # ids that both have
    rule = Distillation(alpha, temperature, divergence, jsd_beta, top_k, vocab)
    rule_of_samples = Distillation(1.0, temperature, divergence, jsd_beta, top_k, vocab)
    rule_of_evaluation = Distillation(1.0, vocab=vocab)  # the KL of whole distributions, whatever is trained on
    teacher_cache = None
    if cache:
        about = {'teacher': teacher_sha256, 'temperature': temperature, 'top_k': min(top_k, vocab), 'vocab': vocab}
        teacher_cache = Cache(cache, train_data, run, about)
        teacher_cache.fill(frozen_teacher, rule)

    net = run.wrap(model, compile, activation_checkpointing)  # model in DDP, FSDP or torch.compile: call this one
    with runtime.user_errors():
        optimizers = model.configure_optimizers(optimizer, learning_rate, weight_decay, (beta1, beta2), embed_lr,
                                                muon_lr, muon_momentum)

    # resume
    step, items_seen, prompts_seen = 0, 0, 0
    clock = runtime.Clock(frozen_teacher.clock.read())  # what the teacher did for this run is part of its training
    if resume_from:
        own = start.checkpoint
        run.resume(own, start.origin, optimizers, config)
        step, items_seen, prompts_seen = own['iter'], own['rows'], own['prompts']
        clock = runtime.Clock(own['seconds'])
        own = start.checkpoint = None  # frees its memory
    last_eval = step if resume_from else -1  # a resumed run does not repeat the evaluation of its checkpoint

    micro_steps = gradient_accumulation_steps // run.world_size  # micro-batches of this process
    items_per_step = gradient_accumulation_steps * batch_size  # windows, or rows, packed or not
    force = forcing(tokenizer, tools)
    token_bytes = tokenizer.token_bytes()
    chosen = val_data.fixed(eval_rows)
    # the best weights give the most correct answers, where that can be told: the loss on gold rises where a student
    # becomes like its teacher
    best_by = 'correct' if chats and all('answer' in val_data.rows_kept[i] for i in chosen) else 'loss'
    nats, _, count, _ = item_losses(frozen_teacher.net, val_data, chosen, run, token_bytes, batch_size).sum(0)
    teacher_loss = nats / count
    run.open(config, step if resume_from else None, tensorboard_log, wandb_log, wandb_project, wandb_run_name)
    run.catch_signals()
    what = []
    if train_data is not None:
        what.append(f'{train_data.n_rows:,} rows' if chats else f'{train_data.n_tokens:,} tokens')
    if prompts is not None:
        what.append(f'{prompts.n_rows:,} prompts to answer')
    run.print0(
        f'{folder}: {", ".join(what)} ({tokenizer.name})\n'
        f'teacher {teacher}: {teacher_model.num_params():,} parameters, held-out loss {teacher_loss:.4f}\n'
        f'{start.summary()}; on {run.world_size} x {run.device}, {run.dtype}\n{max_iters:,} steps')

    meter = runtime.Meter(run, clock, max_iters, model.flops_per_token(length))
    warmed_up = not run.ddp
    clock.start()
    meter.reset(step)
    while True:
        evaluating = step > last_eval and (step % eval_interval == 0 or step == max_iters)
        score = math.inf  # lower is better; without an evaluation it is never the best
        if evaluating:
            clock.stop()
            metrics, summary, samples = evaluate(net, model, frozen_teacher, val_data, chosen, run, rule_of_evaluation,
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
        lr_scale = runtime.lr_factor(step, lr_schedule, warmup_iters, lr_decay_iters or max_iters,
                                     min_lr / learning_rate, decay_frac)
        for group in optimizers.param_groups:  # AdamW's, the embedding's and Muon's groups have peaks of their own
            group['lr'] = group['peak_lr'] * lr_scale

        # a step on the student's own answers, or on the data; which one is a function of the seed and the step
        answers = None
        if on_policy and np.random.default_rng([seed, step]).random() < on_policy:
            rows = prompts.rows(prompts_seen, prompts_per_step)
            answers = generate_rollouts(model, prompts, rows, run, max_new_tokens, 1, sample_temperature, 1 + step,
                                        force=force)
            order = np.argsort(answers.group_sizes, kind='stable')  # by length: little padding
            micro_batches = np.array_split(order, gradient_accumulation_steps)
            n_targets = answers.response_mask.sum()
            meter.add(response_len=answers.lengths.mean(), ended=answers.ended.mean())
        else:
            n_targets = train_data.n_targets(items_seen, items_per_step)

        # forward and backward, over this process's micro-batches; before the first step DDP's warm-up
        step_loss = 0.0
        warm_up = [] if warmed_up else [run.rank]
        for number in itertools.chain(warm_up, run.micro_batches(net, gradient_accumulation_steps)):
            if answers is not None:
                part = answers.take(micro_batches[number])
                run.seed_dropout(prompts_seen + number)
                share = part.response_mask.sum() / (n_targets / gradient_accumulation_steps)
                loss, stats, _ = distillation_loss(net, run, lay_out(part, length)[0], rule_of_samples, frozen_teacher)
                n_read, means = answers.tokens(micro_batches[number]), {'train/kl_sampled': stats[:, 1].mean() * share}
            else:
                first = items_seen + number * batch_size  # a function of the step alone: a resumed run repeats no row
                names = ('idx', 'targets', 'positions', 'segments')
                arrays = dict(zip(names, train_data.batch(first, batch_size), strict=False))
                run.seed_dropout(first)  # a function of the seed and the place in the data, not of what ran before
                share = train_data.n_targets(first, batch_size) / (n_targets / gradient_accumulation_steps)
                n_read, means = real_tokens(arrays['targets'], arrays.get('segments')), {}
                if alpha:
                    known = teacher_cache.batch(first, batch_size) if teacher_cache else ()
                    loss, stats, _ = distillation_loss(net, run, arrays, rule, frozen_teacher, known)
                    means = dict(zip(('train/ce', 'train/kl'), stats.mean(0) * share, strict=True))
                else:  # what train.py and sft.py do
                    with run.autocast(arrays['idx'].shape[1]):
                        loss = net(**dict(zip(arrays, run.to_device(*arrays.values()), strict=True)))
            if not warmed_up:
                run.warm_up_ddp(net, loss)
                warmed_up = True
                continue
            # a micro-batch with more targets weighs more: the step's loss is the mean over all its tokens
            loss = loss * share / micro_steps
            run.backward(loss)
            step_loss += loss.detach()
            meter.add(n_read, **means)

        # clip and update; a gradient that is not finite skips the update, which the device decides: the host need not
        # wait (float16: clip_grad_norm unscales the gradients, found_inf adapts the loss scale)
        grad_norm = run.clip_grad_norm(model, optimizers, grad_clip)
        optimizers.step(found_inf=run.found_inf(grad_norm))
        optimizers.zero_grad()
        if model.sparse and not start.frozen:  # as in pretraining: a bias for experts with too little load
            model.balance(run.all_reduce(model.routed())[:, :-1])
        step += 1
        if answers is None:
            items_seen += items_per_step
        else:
            prompts_seen += prompts_per_step

        if step % max_bad_steps == 0 or step % log_interval == 0:  # not at every step: the host waits for the device
            run.check_skipped(step, max_bad_steps)
        if step % log_interval == 0 or step == max_iters:
            meter.log(step, step_loss, grad_norm, learning_rate * lr_scale)

    run.finish(step, stop, parameters=model.num_params(), trainable=model.num_params(learning=True))
    run.print0(f'done: best val/{best_by} {abs(run.best):.4f}; loss of the teacher {teacher_loss:.4f}; talk to it: '
               f'python sample.py --init_from={out_dir}{" --chat=True" * chats}{" --tools=True" * tools}')


if __name__ == '__main__':
    runtime.cli(main)
