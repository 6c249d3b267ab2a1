"""
Reward models: from pairs of answers, of which people preferred one, a model learns to score any answer.

    python reward.py config/reward_tiny.py                         word problems, from the model of config/sft_tiny.py
    python reward.py config/reward_tiny.py --loss_type=margin --margin=1.0
    python reward.py config/reward_tiny.py --causal=False --score_head=mean     the same as a bidirectional encoder
    python reward.py config/reward_smollm2.py --dataset=data/mine               SmolLM2-135M with LoRA learns your pairs
    python reward.py --init_from=out/reward --dataset=wordproblems --check=True        can it be trusted? ten checks
    torchrun --standalone --nproc_per_node=2 reward.py config/reward_tiny.py --gradient_accumulation_steps=2

The model is any that this project can read, with a scalar score in place of the next token, read at the
last token of an answer (score_head='last') or from the mean over all (score_head='mean'). Scores are normalised to mean
0 and variance 1 on held-out answers; the gain and the bias that do so are in the checkpoint.

Papers: InstructGPT (arXiv:2203.02155), learning to summarize (arXiv:2009.01325), fine-tuning from preferences
(arXiv:1909.08593), margins from grades (Llama 2, arXiv:2307.09288), centred rewards (arXiv:2312.09244), calibration
(arXiv:1706.04599).
"""
import math
import random
import re
from pathlib import Path

import runtime  # before torch: it sets an OpenMP variable that torch reads when it is imported

import numpy as np
import torch
import torch.nn.functional as F

from convert import load_to_score
from dataset import (
    answered,
    find_dataset,
    fraction_of,
    interval,
    last_number,
    pad_texts,
    prefs_of,
    visible,
)
from model import GPTConfig
from tokenizer import UserError

# where and what
out_dir = 'out/reward'  # directory of the run: checkpoints, metrics, samples
init_from = 'out/sft'  # the model to start from: sample.py's; or 'scratch', 'resume', 'auto' (resume if there is a run)
base = 'out/sft'  # what 'auto' starts from where there is no run yet; of 'scratch', whose tokenizer and shape it takes
dataset = 'wordproblems'  # folder in data/ (prepared if it is not yet), path of a folder, or a .json or .jsonl file
val_fraction = 0.1  # fraction of the prompts that is held out when dataset is a single file
seed = 1337  # decides the order of the data, dropout and fresh weights
# pairs
max_length = 0  # maximum tokens of prompt and answer; 0 = block_size. Longer ones lose the start of the prompt
strict = True  # stop at a malformed row; False: skip and count it
# loss
loss_type = 'bt'  # 'bt' (Bradley-Terry), 'margin' (ranking) or 'bt_margin' (Bradley-Terry, less the rows' own margins)
margin = 1.0  # 'margin': how far apart the scores of a pair shall be; 'bt_margin': factor on the rows' margins
center_coef = 0.0  # weight of the squared sum of a pair's scores, which keeps them around zero; 0.01 is usual
# batches
batch_size = 16  # pairs per micro-batch, both answers of each
gradient_accumulation_steps = 1  # micro-batches per step, over all processes together
max_iters = 500  # steps
# optimizer
optimizer = 'adamw'  # 'adamw', or 'muon' for the matrices of the blocks and AdamW for the rest
learning_rate = 3e-4  # peak learning rate of AdamW
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
eval_interval = 100  # steps between evaluations, each with a checkpoint
eval_rows = 512  # held-out pairs that are scored, the same every time; 0 = all
eval_only = False  # evaluate init_from and exit, without training
check = False  # put init_from to the checks of a reward model and train nothing
eval_split = 'val'  # split that eval_only evaluates: 'val', 'test' or 'train'
log_interval = 10  # steps between lines of the log
keep_checkpoints = 2  # checkpoints to keep: ckpt.pt, and older ones as ckpt.1.pt …
max_bad_steps = 10  # stop after this many skipped updates in a row (loss or gradient not finite)
tensorboard_log = False  # log to out_dir/tensorboard
wandb_log = False  # log to Weights & Biases
wandb_project = 'flatgpt'  # Weights & Biases: project
wandb_run_name = 'reward'  # Weights & Biases: name of the run
# machine
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'; auto = the best available
dtype = 'auto'  # 'float32', 'bfloat16' or 'float16'; auto = 16 bits if the device is faster at it
compile = False  # torch.compile: slow to start, then faster
activation_checkpointing = False  # recompute each block in the backward pass: less memory, a third more time
fsdp = False  # under torchrun: shard parameters, gradients and optimizer state (FSDP2), not replicate them (DDP)

# allowed values of the knobs, checked in main; runtime.RANGES has those of the knobs that stages share
RANGES = runtime.RANGES | {
    'val_fraction': '> 0 and < 1',
    **dict.fromkeys(('max_length', 'margin', 'center_coef', 'eval_rows'), '>= 0'),
    'loss_type': ('bt', 'margin', 'bt_margin'), 'eval_split': ('val', 'test', 'train')}


# ----------------------------------------------------------------------------------------------------------------------
# the maths

def bradley_terry(chosen, rejected, margins=0.0):
    """-log sigmoid(r_c - r_r - m): scores (B,), margins (B,) or a number -> losses (B,), in nats (arXiv:2009.01325;
    with margins arXiv:2307.09288, eq. 2)."""
    return -F.logsigmoid(chosen - rejected - margins)


def margin_ranking(chosen, rejected, margin):
    """max(0, margin - (r_c - r_r)): scores (B,) -> losses (B,)."""
    return F.relu(margin - (chosen - rejected))


def pair_loss(chosen, rejected, grades, loss_type, margin, center_coef):
    """What is minimised of pairs of scores (B,) -> losses (B,); grades (B,): how much better each chosen answer is."""
    if loss_type == 'margin':
        losses = margin_ranking(chosen, rejected, margin)
    else:
        losses = bradley_terry(chosen, rejected, margin * grades if loss_type == 'bt_margin' else 0.0)
    return losses + center_coef * (chosen + rejected).square()  # arXiv:2312.09244


def calibration(margins, bins=10):
    """How sure sigmoid(|r_c - r_r|) is of pairs beside how often it is right: margins (n,) -> (rows, ece).

    rows: (from, to, pairs, mean confidence, share right) of the equal bins of [0.5, 1] that are not empty; ece: the
    expected calibration error, the mean of |confidence - share right| over pairs (arXiv:1706.04599, eq. 3). A tie is
    half right.
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    hits, which = pair_accuracy(margins), np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    rows = []
    for b in range(bins):
        of = which == b
        if of.any():
            ends = 0.5 + b / (2 * bins), 0.5 + (b + 1) / (2 * bins)
            rows.append((*ends, int(of.sum()), confidence[of].mean(), hits[of].mean()))
    return rows, sum(n * abs(sure - share) for _, _, n, sure, share in rows) / len(margins)


def pair_accuracy(margins):
    """Whether pairs are ordered rightly: margins (…) -> 1, 0, or 1/2 for a tie."""
    return (np.sign(margins) + 1) / 2


def quantiles(scores):
    """Mean, standard deviation and quantiles of scores, as text."""
    low, *quarters, high = np.quantile(scores, (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1))
    inner = ', '.join(f'{q:.2f}' for q in quarters)
    return f'mean {scores.mean():.2f}, sd {scores.std():.2f}, {low:.2f} to {high:.2f} (5, 25, 50, 75, 95 %: {inner})'


# ----------------------------------------------------------------------------------------------------------------------
# scoring and evaluation

def compute_scores(model, run, texts, block_size):
    """The model's scores of a batch of (ids, which are the answer's): (B,) float32 on the device."""
    idx, real, answer = run.to_device(*pad_texts(texts, block_size))
    with run.autocast(idx.shape[1]):
        return model(idx, real=real, answer=answer)


@torch.no_grad()
def compute_all_scores(net, run, texts, block_size):
    """Raw scores of many such texts, shared by the processes: float64 array (n,)."""
    net.eval()
    scores = run.distributed_map(lambda part: compute_scores(
        net, run, [texts[i] for i in part], block_size).cpu().double().numpy()[:, None], [len(ids) for ids, _ in texts])
    net.train()
    return scores[:, 0]


def evaluate_pairs(net, run, data, chosen_rows):
    """Scores of the pairs of these numbers, and what they are worth -> (chosen (n,), rejected (n,), rows, metrics)."""
    texts = data.texts(chosen_rows)
    scores = compute_all_scores(net, run, [data.example(text) for text in texts], data.block_size)
    chosen, rejected = scores.reshape(2, -1)
    rows = [data.rows_kept[i] for i in chosen_rows]
    grades = torch.tensor([float(row.get('margin', 0)) for row in rows], dtype=torch.float64)
    losses = pair_loss(torch.from_numpy(chosen), torch.from_numpy(rejected), grades, loss_type, margin, center_coef)
    hits = pair_accuracy(chosen - rejected).tolist()
    low, high = interval(hits)
    metrics = {'val/loss': losses.mean().item(), 'val/accuracy': float(np.mean(hits)), 'val/accuracy_low': low,
               'val/accuracy_high': high, 'val/margin': float((chosen - rejected).mean()),
               'val/ece': calibration(chosen - rejected)[1], 'reward/mean': float(scores.mean()),
               'reward/std': float(scores.std())}
    if any('flipped' in row for row in rows):  # then the truth behind the labels is known
        true = [1 - h if row.get('flipped') else h for h, row in zip(hits, rows, strict=True)]
        metrics |= {'val/true_accuracy': float(np.mean(true)),
                    'val/label_noise': float(np.mean([bool(row.get('flipped')) for row in rows]))}
    return chosen, rejected, rows, metrics


def in_words(metrics):
    summary = (f'val loss {metrics["val/loss"]:.4f}, accuracy {metrics["val/accuracy"]:.1%} '
             f'({metrics["val/accuracy_low"]:.1%} to {metrics["val/accuracy_high"]:.1%})')
    if 'val/true_accuracy' in metrics:
        summary += (f', of the true labels {metrics["val/true_accuracy"]:.1%} '
                  f'({metrics["val/label_noise"]:.1%} of labels are flipped)')
    return summary + f', mean margin {metrics["val/margin"]:.2f}, calibration error {metrics["val/ece"]:.3f}'


def tables(chosen, rejected, rows, gain, bias):
    """For a reader: accuracy by defect, the reliability table and where the normalised scores lie."""
    lines, by = [], {}
    for c, r, row in zip(chosen, rejected, rows, strict=True):
        sign = -1 if row.get('flipped') else 1
        if 'defect' in row:
            by.setdefault(row['defect'], []).append(float(pair_accuracy(sign * (c - r))))
    for defect, hits in sorted(by.items()):
        low, high = interval(hits)
        lines.append(f'{defect:>14}: {np.mean(hits):6.1%} right of {len(hits):,} ({low:.1%} to {high:.1%})')
    lines.append('confidence    pairs   sure  right')
    for begin, end, n, sure, share in calibration(chosen - rejected)[0]:
        lines.append(f'{begin:.2f} to {end:.2f} {n:6,} {sure:6.1%} {share:6.1%}')
    for name, scores in (('chosen', chosen), ('rejected', rejected)):
        lines.append(f'{name}: {quantiles(gain * scores + bias)}')
    return '\n'.join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# can it be trusted?

def checks(reward, rows, tokenizer):
    """Sanity checks of a reward model -> [(name, whether it passes or None, result as text)].

    reward(list of (messages, answer)) gives normalised scores (n,); rows: those of `load_prefs`. What a check compares
    with is the truly better answer of each pair, `flipped` or not.
    """
    pairs = [[(row['prompt'] + row[key][:-1], row[key][-1]['content'])
              for key in ('chosen', 'rejected')[::-1 if row.get('flipped') else 1]] for row in rows]
    gold, bad = (reward([pair[k] for pair in pairs]) for k in (0, 1))
    prompts, better = zip(*(pair[0] for pair in pairs), strict=True)
    found, rng = [], random.Random(0)

    def beats(name, answers, least, which=None):
        which = list(range(len(rows)) if which is None else which)
        if not which:
            return found.append((name, None, 'no row of this data has one'))
        wins = pair_accuracy(gold[which] - reward([(prompts[i], answers[i]) for i in which])).mean()
        return found.append((name, wins >= least, f'the better answer beats it in {wins:.1%} of {len(which):,} '
                                                  f'(at least {least:.0%})'))

    lengths = np.array([len(tokenizer.encode(answer)) for answer in better], float)
    steps = [row.get('steps') for row in rows]
    groups = [np.array([i for i, s in enumerate(steps) if s == step]) for step in dict.fromkeys(steps)]
    inner = [g for g in groups if len(g) > 2]
    if not inner or np.concatenate([lengths[g] - lengths[g].mean() for g in inner]).std() == 0:
        found.append(('length', None, 'all answers have one length'))
    else:  # within problems of as many steps, so that quality and difficulty stay about the same
        x, y = (np.concatenate([v[g] - v[g].mean() for g in inner]) for v in (lengths, gold))
        r = float(np.corrcoef(x, y)[0, 1]) if y.std() > 0 else 0.0
        found.append(('length', abs(r) <= 0.3, f'correlation of score and length of better answers {r:.2f} '
                                               '(within ±0.3)'))
    beats('empty answer', [''] * len(rows), 0.95)
    beats('repeated answer', [f'{answer}\n{answer}' for answer in better], 0.9)
    other = [next((better[(i + k) % len(rows)] for k in range(1, len(rows))
                   if prompts[(i + k) % len(rows)] != prompts[i] and better[(i + k) % len(rows)] != better[i]), '')
             for i in range(len(rows))]
    beats('answer to another question', other, 0.9)
    beats('shuffled words', [' '.join(rng.sample(words, len(words))) for words in map(str.split, better)], 0.95,
          [i for i, answer in enumerate(better) if len(set(answer.split())) > 1])
    changed = [re.sub(r'\d+(?!.*\d)', lambda m: str(int(m[0]) + rng.choice([1, 2, 10])), answer, flags=re.S)
               for answer in better]
    beats('wrong number', changed, 0.9, [i for i, row in enumerate(rows) if row.get('grader', 'number') == 'number'
                                         and 'answer' in row and last_number(visible(better[i])) is not None])
    for name, tail in (('trailing space', ' '), ('trailing newline', '\n')):
        shift = np.abs(reward([(p, answer + tail) for p, answer in zip(prompts, better, strict=True)]) - gold)
        found.append((name, shift.mean() <= 0.1, f'moves a score by {shift.mean():.3f} sd in the mean (at most 0.1)'))
    half = np.array([fraction_of(str(p)) < 0.5 for p in prompts])
    if half.all() or not half.any():
        found.append(('two halves agree', None, 'too few rows'))
    else:
        hits = pair_accuracy(gold - bad)
        (a, spread_a), (b, spread_b) = ((part.mean(), part.var() / len(part)) for part in (hits[half], hits[~half]))
        error = 1.96 * math.sqrt(spread_a + spread_b)
        found.append(('two halves agree', abs(a - b) <= max(error, 1e-9) and min(a, b) > 0.5,
                      f'right {a:.1%} and {b:.1%} (no further apart than {error:.1%}, both above half)'))
    scores = np.concatenate((gold, bad))
    found.append(('drift of the mean', abs(scores.mean()) <= 0.1 and 0.8 <= scores.std() <= 1.25,
                  f'mean {scores.mean():.3f}, sd {scores.std():.3f} (within ±0.1, and 0.8 to 1.25)'))
    return found


def run_checks(net, model, data, tokenizer, length, run):
    gain, bias = model.score_scale.tolist()

    def reward(pairs):
        texts = [answered(tokenizer, messages, answer, length) for messages, answer in pairs]
        return gain * compute_all_scores(net, run, texts, length) + bias
    found = checks(reward, [data.rows_kept[i] for i in data.fixed(eval_rows)], tokenizer)
    for name, ok, figures in found:
        run.print0(f'{"  --" if ok is None else "pass" if ok else "WARN"}  {name:<27} {figures}')
    passed = [bool(ok) for _, ok, _ in found if ok is not None]
    run.print0(f'{sum(passed)} of {len(passed)} checks pass on {dataset}, {eval_split}')


# ----------------------------------------------------------------------------------------------------------------------

def main():
    # config files and --key=value set the knobs above, and the fields of GPTConfig, a model's shape: those are given
    config, given = runtime.configure(globals(), GPTConfig)
    runtime.check_ranges(config, RANGES)
    run = runtime.Run(out_dir, device, dtype, seed, fsdp)
    run.check_accumulation(gradient_accumulation_steps)

    # model
    resume_from = run.find_checkpoint(init_from)
    start = load_to_score('reward', base if init_from == 'auto' else init_from, resume_from, given, seed, base)
    model, tokenizer = start.model, start.tokenizer
    length = start.row_length(max_length)
    if (eval_only or check) and start.new_head:
        raise UserError(f'{start.origin} is not a reward model: train one first, and give its --init_from')
    if Path(dataset).suffix not in ('.json', '.jsonl'):
        run.on_main(lambda: find_dataset(dataset))  # one process prepares it, the others wait
    if eval_only or check:
        net = run.wrap(model, compile)
        data = prefs_of(dataset, eval_split, tokenizer, length, seed, strict, val_fraction, run.print0)
        if eval_only:
            *pairs, metrics = evaluate_pairs(net, run, data, data.fixed(eval_rows))
            run.print0(f'{init_from} on {len(pairs[0]):,} pairs of {dataset}, {eval_split}: {in_words(metrics)}\n'
                       + tables(*pairs, *model.score_scale.tolist()))
        return run_checks(net, model, data, tokenizer, length, run) if check else None

    # data
    train_data, val_data = (prefs_of(dataset, split, tokenizer, length, seed, strict, val_fraction, run.print0)
                            for split in ('train', 'val'))
    missing = next((row['where'] for row in train_data.rows_kept + val_data.rows_kept if 'margin' not in row), None)
    if loss_type == 'bt_margin' and missing:
        raise UserError(f"{missing}: loss_type='bt_margin' needs a number as 'margin' in every row")
    grades = np.array([float(row.get('margin', 0)) for row in train_data.rows_kept], np.float32)

    net = run.wrap(model, compile, activation_checkpointing)  # model in DDP, FSDP or torch.compile: call this one
    with runtime.user_errors():
        optimizers = model.configure_optimizers(optimizer, learning_rate, weight_decay, (beta1, beta2), embed_lr,
                                                muon_lr, muon_momentum)

    # resume
    step, pairs_seen, clock = 0, 0, runtime.Clock()
    if resume_from:
        run.resume(start.checkpoint, start.origin, optimizers, config)
        step, pairs_seen = start.checkpoint['iter'], start.checkpoint['pairs']
        clock = runtime.Clock(start.checkpoint['seconds'])
        start.checkpoint = None  # frees its memory
    last_eval = step if resume_from else -1  # a resumed run does not repeat the evaluation of its checkpoint

    micro_steps = gradient_accumulation_steps // run.world_size  # micro-batches of this process
    pairs_per_step = gradient_accumulation_steps * batch_size
    run.open(config, step if resume_from else None, tensorboard_log, wandb_log, wandb_project, wandb_run_name)
    run.catch_signals()
    epochs = max_iters * pairs_per_step / train_data.n_rows
    run.print0(
        f'{dataset}: {train_data.n_rows:,} pairs to train on, {val_data.n_rows:,} held out ({tokenizer.name})\n'
        f'{start.summary()}; on {run.world_size} x {run.device}, {run.dtype}\n'
        f'{max_iters:,} steps of {pairs_per_step} pairs: {epochs:.2f} epochs')

    if run.ddp:
        first = pairs_seen + run.rank * batch_size
        run.seed_dropout(first)
        texts = [train_data.example(text) for text in train_data.texts(train_data.rows(first, batch_size))]
        run.warm_up_ddp(net, compute_scores(net, run, texts, length).mean())
    meter = runtime.Meter(run, clock, max_iters, model.flops_per_token(length))
    clock.start()
    meter.reset(step)
    stop = 0
    while True:
        # a checkpoint has the gain and the bias that belong to its weights: so it is last_eval before it stops, too
        stop = run.stop_signal()
        if step > last_eval and (stop or step % eval_interval == 0 or step == max_iters):
            clock.stop()
            chosen, rejected, rows, metrics = evaluate_pairs(net, run, val_data, val_data.fixed(eval_rows))
            # rewards are scores with mean 0 and variance 1 on held-out answers, whatever scale training has found
            mean, std = metrics['reward/mean'], max(metrics['reward/std'], 1e-6)
            with torch.no_grad():
                model.score_scale.copy_(torch.tensor([1 / std, -mean / std]))
            run.log(metrics | {'iter': step, 'seconds': clock.read()})
            run.print0(f'step {step}: {in_words(metrics)}, {clock.read():.1f} s of training')
            run.sample(step, tables(chosen, rejected, rows, 1 / std, -mean / std))
            run.save_checkpoint(start.model_state() | {'iter': step, 'pairs': pairs_seen, 'seconds': clock.read()},
                                optimizers, metrics['val/loss'], keep_checkpoints)
            last_eval = step
            clock.start()
            meter.reset(step)
        if stop or step >= max_iters:
            break

        # the learning rate of this step
        lr_scale = runtime.lr_factor(step, lr_schedule, warmup_iters, lr_decay_iters or max_iters,
                                     min_lr / learning_rate, decay_frac)
        for group in optimizers.param_groups:  # AdamW's, the embedding's and Muon's groups have peaks of their own
            group['lr'] = group['peak_lr'] * lr_scale

        # forward and backward, over this process's micro-batches
        step_loss = 0.0
        for number in run.micro_batches(net, gradient_accumulation_steps):
            first = pairs_seen + number * batch_size  # a function of the step alone: a resumed run repeats no pair
            pairs = train_data.rows(first, batch_size)
            texts = [train_data.example(text) for text in train_data.texts(pairs)]
            run.seed_dropout(first)  # a function of the seed and the place in the data, not of what ran before
            # both answers of all pairs in one forward pass: the chosen ones, then the rejected ones
            chosen, rejected = compute_scores(net, run, texts, length).chunk(2)
            loss = pair_loss(chosen, rejected, run.to_device(grades[pairs])[0], loss_type, margin, center_coef).mean()
            loss = loss / micro_steps
            run.backward(loss)
            step_loss += loss.detach()
            meter.add(sum(len(ids) for ids, _ in texts),
                      **{'train/accuracy': (torch.sign(chosen - rejected).mean().detach() + 1) / 2})

        # clip and update; a gradient that is not finite skips the update, which the device decides: the host need not
        # wait (float16: clip_grad_norm unscales the gradients, found_inf adapts the loss scale)
        grad_norm = run.clip_grad_norm(model, optimizers, grad_clip)
        optimizers.step(found_inf=run.found_inf(grad_norm))
        optimizers.zero_grad()
        step += 1
        pairs_seen += pairs_per_step

        if step % max_bad_steps == 0 or step % log_interval == 0:  # not at every step: the host waits for the device
            run.check_skipped(step, max_bad_steps)
        if step % log_interval == 0 or step == max_iters:
            meter.log(step, step_loss, grad_norm, learning_rate * lr_scale)

    run.finish(step, stop, parameters=model.num_params(), trainable=model.num_params(learning=True))
    run.print0(f'done: best validation loss {run.best:.4f}; check it: python reward.py --init_from={out_dir} '
               f'--dataset={dataset} --check=True')


if __name__ == '__main__':
    runtime.cli(main)
