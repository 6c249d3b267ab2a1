"""
Direct preference optimisation: a model learns from pairs of answers which to give, without a reward model between.

    python dpo.py config/dpo_tiny.py                               word problems, from the model of config/sft_tiny.py
    python dpo.py config/dpo_tiny.py --beta=0.5 --loss_type=ipo
    python dpo.py config/dpo_tiny.py --reward_model=out/reward     … whose answers a model of reward.py scores, too
    python dpo.py config/dpo_smollm2.py --dataset=data/mine        SmolLM2-135M learns your pairs with LoRA
    torchrun --standalone --nproc_per_node=2 dpo.py config/dpo_tiny.py --gradient_accumulation_steps=2

The reference is the model that the run begins with. Of the pairs that training will draw its log-probabilities are
taken once and kept in the checkpoint. Held-out prompts are answered greedily, to be graded, and by sampling at
temperature 1, to measure how far the policy has moved: the KL divergence to the reference on its own samples.

Papers: DPO (arXiv:2305.18290), IPO (arXiv:2310.12036), SLiC's hinge (arXiv:2305.10425), KTO (arXiv:2402.01306), SimPO
(arXiv:2405.14734), ORPO (arXiv:2403.07691), the SFT term (arXiv:2404.19733), cDPO's label smoothing (Mitchell 2023).
"""
import math
from pathlib import Path

import runtime  # before torch: it sets an OpenMP variable that torch reads when it is imported

import numpy as np
import torch
import torch.nn.functional as F

from convert import load_to_train
from dataset import (
    by_value,
    find_dataset,
    grades,
    in_words,
    interval,
    pad_texts,
    prefs_of,
    quality,
    shown,
    summarise,
)
from model import GPTConfig
from rollout import divergence, forcing, generate_rollouts, gold_scores, load_scorer
from tokenizer import UserError

# where and what
out_dir = 'out/dpo'  # directory of the run: checkpoints, metrics, samples
init_from = 'out/sft'  # model to start from, as in sample.py; 'resume'; or 'auto' (resume if out_dir has a run)
base = 'out/sft'  # init_from='auto': the model to start from if out_dir has no run yet
dataset = 'wordproblems'  # folder in data/ (prepared if it is not yet), path of a folder, or a .json or .jsonl file
val_fraction = 0.1  # fraction of the prompts that is held out when dataset is a single file
seed = 1337  # of the order of the data, dropout, new weights and samples
# pairs
max_length = 0  # maximum tokens of prompt and answer; 0 = block_size. Longer ones lose the start of the prompt
strict = True  # stop at a malformed row; False: skip and count it
# loss
loss_type = 'sigmoid'  # 'sigmoid' (DPO), 'ipo', 'hinge', 'kto_pair'; without a reference: 'simpo', 'orpo'
beta = 0.1  # how hard it is held to the reference; of 'simpo' a factor on its margins, of 'orpo' on its odds ratio
label_smoothing = 0.0  # 'sigmoid', 'simpo': the share of labels that is taken to be flipped (cDPO)
length_normalise = False  # divide log-probabilities by the number of tokens; 'simpo' and 'orpo' always do
gamma = 0.5  # 'simpo': the margin to reach
sft_coef = 0.0  # weight of the cross-entropy of the chosen answers, per token
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
eval_interval = 100  # steps between evaluations, each with answers and a checkpoint
eval_rows = 256  # held-out pairs that are measured, and whose prompts are answered, the same every time; 0 = all
eval_only = False  # evaluate init_from and exit, without training
eval_split = 'val'  # split that eval_only evaluates: 'val', 'test' or 'train'
reward_model = ''  # a run of reward.py, which scores the greedy answers
max_new_tokens = 128  # maximum length of an answer, in tokens
tools = False  # run the calculator: after <tool>…</tool> its result is inserted into the answer
show_answers = 3  # answers printed at each evaluation
log_interval = 10  # steps between lines of the log
keep_checkpoints = 2  # checkpoints to keep: ckpt.pt, and older ones as ckpt.1.pt …
max_bad_steps = 10  # stop after this many skipped updates in a row (loss or gradient not finite)
tensorboard_log = False  # log to out_dir/tensorboard
wandb_log = False  # log to Weights & Biases
wandb_project = 'flatgpt'  # Weights & Biases: project
wandb_run_name = 'dpo'  # Weights & Biases: name of the run
# machine
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'; auto = the best available
dtype = 'auto'  # 'float32', 'bfloat16' or 'float16'; auto = 16 bits if the device is faster at it
compile = False  # torch.compile: slow to start, then faster
activation_checkpointing = False  # recompute each block in the backward pass: less memory, a third more time
fsdp = False  # under torchrun: shard parameters, gradients and optimizer state (FSDP2), not replicate them (DDP)


LOSSES = ('sigmoid', 'ipo', 'hinge', 'kto_pair', 'simpo', 'orpo')
FREE = ('simpo', 'orpo')  # of these, those that need no reference

# allowed values of the knobs, checked in main; runtime.RANGES has those of the knobs that stages share
RANGES = runtime.RANGES | {
    'val_fraction': '> 0 and < 1', 'beta': '> 0', 'label_smoothing': '>= 0 and < 0.5', 'max_new_tokens': '>= 1',
    **dict.fromkeys(('max_length', 'gamma', 'sft_coef', 'eval_rows', 'show_answers'), '>= 0'),
    'loss_type': LOSSES, 'eval_split': ('val', 'test', 'train')}


# ----------------------------------------------------------------------------------------------------------------------
# the maths

def preference_loss(chosen, rejected, ref_chosen, ref_rejected, n_chosen, n_rejected, loss_type='sigmoid', beta=0.1,
                    label_smoothing=0.0, length_normalise=False, gamma=0.5):
    """Losses of pairs -> (losses (B,), implicit rewards of the chosen answers (B,), of the rejected (B,)).

    chosen, rejected, ref_chosen, ref_rejected: log-probabilities of whole answers under the policy and the reference,
    in nats, (B,); n_chosen, n_rejected: their tokens, (B,). An implicit reward is beta times an answer's log-ratio of
    the two models. With h the difference of the two answers' log-ratios:
    'sigmoid' -log s(beta h), of which label_smoothing eps takes (1 - eps) and eps of -log s(-beta h) (cDPO);
    'ipo' (h - 1 / (2 beta))^2; 'hinge' max(0, 1 - beta h); 'kto_pair' 1 - s of each answer's log-ratio times beta
    against the other answers' mean, at least 0, averaged over the two (arXiv:2402.01306 as DPO trainers have it).
    With log-probabilities per token and no reference: 'simpo' -log s(beta d - gamma), d their difference; 'orpo'
    the chosen answer's cross-entropy per token less beta log s(log odds ratio).
    """
    if length_normalise or loss_type in FREE:
        chosen, ref_chosen, rejected, ref_rejected = (chosen / n_chosen, ref_chosen / n_chosen, rejected / n_rejected,
                                                      ref_rejected / n_rejected)
    if loss_type in FREE:
        ref_chosen = ref_rejected = torch.zeros_like(chosen)
    up, down = chosen - ref_chosen, rejected - ref_rejected
    h = up - down
    if loss_type in ('sigmoid', 'simpo'):
        x = beta * h - (gamma if loss_type == 'simpo' else 0.0)
        losses = -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)
    elif loss_type == 'ipo':
        losses = (h - 1 / (2 * beta)).square()
    elif loss_type == 'hinge':
        losses = F.relu(1 - beta * h)
    elif loss_type == 'kto_pair':
        kl_up, kl_down = up.mean().clamp(min=0).detach(), down.mean().clamp(min=0).detach()
        losses = (2 - torch.sigmoid(beta * (up - kl_down)) - torch.sigmoid(beta * (kl_up - down))) / 2
    else:
        odds = (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))
        losses = -chosen - beta * F.logsigmoid(odds)
    return losses, beta * up.detach(), beta * down.detach()


def log1mexp(x):
    """log(1 - e^x) of x < 0, with all its digits (Mächler 2012)."""
    x = x.clamp(max=-1e-6)
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


# ----------------------------------------------------------------------------------------------------------------------
# log-probabilities

def compute_logps(model, run, texts, block_size):
    """Log-probabilities of the tokens that count, summed over each of a batch of (ids, counts): (B,) on the device."""
    idx, _, counts = pad_texts(texts, block_size)
    targets = np.full(idx.shape, -100)
    targets[:, :-1][counts[:, 1:]] = idx[:, 1:][counts[:, 1:]]
    with run.autocast(idx.shape[1]):
        return -model(*run.to_device(idx, targets), reduction='none').sum(1)


@torch.no_grad()
def compute_all_logps(net, run, texts, block_size):
    """Of many (ids, counts), shared by the processes: float64 array (n,)."""
    net.eval()
    logps = run.distributed_map(lambda part: compute_logps(
        net, run, [texts[i] for i in part], block_size).cpu().double().numpy()[:, None], [len(ids) for ids, _ in texts])
    net.train()
    return logps[:, 0]


# ----------------------------------------------------------------------------------------------------------------------
# evaluation

def pair_metrics(policy, reference, n_tokens):
    """Of held-out pairs, log-probabilities (2, n) under both models, chosen then rejected -> metrics."""
    tensors = [torch.from_numpy(x) for x in (*policy, *reference, *n_tokens)]
    losses, up, down = preference_loss(*tensors, loss_type, beta, label_smoothing, length_normalise, gamma)
    losses = losses - sft_coef * tensors[0] / tensors[4]
    hits = ((torch.sign(up - down) + 1) / 2).tolist()
    low, high = interval(hits)
    return {'val/loss': losses.mean().item(), 'val/accuracy': float(np.mean(hits)), 'val/accuracy_low': low,
            'val/accuracy_high': high, 'val/margin': (up - down).mean().item(),
            'val/logp_chosen': float(policy[0].mean()), 'val/logp_rejected': float(policy[1].mean())}


def grade_answers(data, answers, scores):
    """Grades of answers (Rollout) to pairs' prompts -> (rows, marks); scores: of the reward model, (n,), or None."""
    rows, marks = [data.rows_kept[i] for i in answers.rows], []
    for i, (row, text) in enumerate(zip(rows, answers.texts, strict=True)):
        marks.append(quality(row, text) | grades(row, text) if 'answer' in row else grades(row, text))
        marks[-1] |= {} if scores is None else {'model': float(scores[i]), 'model_share': float(scores[i] > 0)}
    return rows, marks


def evaluate(model, net, reference, ref_logps, data, run, scorer):
    """A policy on held-out pairs, and its answers to their prompts -> (metrics, summary, samples).

    reference: what learns, as it was in the beginning, which with LoRA is the base alone; ref_logps: a list that keeps
    the log-probabilities of the pairs under it, from the first call on.
    """
    chosen = data.fixed(eval_rows)
    pairs = data.texts(chosen)
    texts = [data.example(text) for text in pairs]
    n_tokens, block_size = data.targets_in[pairs].reshape(2, -1).astype(float), model.config.block_size
    policy = compute_all_logps(net, run, texts, block_size).reshape(2, -1)
    if not ref_logps:
        with run.swapped_weights(model, reference):
            ref_logps.append(compute_all_logps(net, run, texts, block_size).reshape(2, -1))
    force = forcing(data.tokenizer, tools)
    sampled, greedy = (generate_rollouts(model, data, chosen, run, max_new_tokens, 1, t, force=force) for t in (1.0, 0))
    kl = divergence(net, model, reference, run, sampled, block_size).sum(1)
    scores = None
    if scorer is not None:
        prompts = [data.rows_kept[i]['messages'][:-1] for i in chosen]
        scores = scorer(list(zip(prompts, greedy.texts, strict=True)))
    rows, marks = grade_answers(data, greedy, scores)
    means, ranges = summarise(marks)
    half = 1.96 * kl.std() / math.sqrt(max(1, len(kl) - 1))
    low, high = kl.mean() - half, kl.mean() + half
    metrics = pair_metrics(policy, ref_logps[0], n_tokens) | {
        'kl': float(kl.mean()), 'kl_low': float(low), 'kl_high': float(high),
        'response_len': float(greedy.lengths.mean())}
    if 'gold' in means:
        metrics['reward/gold_sampled'] = float(np.nanmean(gold_scores(data, sampled)))
    for name, mean in means.items():
        key = f'reward/{name}' if name in ('gold', 'model', 'model_share') else f'val/{name}'
        metrics |= {key: mean, f'{key}_low': ranges[name][0], f'{key}_high': ranges[name][1]}
    summary = (f'val loss {metrics["val/loss"]:.4f}, accuracy {metrics["val/accuracy"]:.1%}, margin '
             f'{metrics["val/margin"]:.2f}, log-probabilities {metrics["val/logp_chosen"]:.1f} and '
             f'{metrics["val/logp_rejected"]:.1f}, KL {metrics["kl"]:.2f} ({low:.2f} to {high:.2f})\n')
    shown_means = {k: v for k, v in means.items() if k in ('gold', 'correct', 'f1', 'model_share')}
    summary += f'greedy answers: {in_words(shown_means, ranges)}'
    summary += f', reward {means["model"]:.2f}' if scores is not None else ''
    by_steps = by_value(rows, marks, 'steps')
    summary += f'; correct by steps: {by_steps}' if by_steps else ''
    return metrics, summary, [shown(*of) for of in zip(rows[:show_answers], greedy.texts, marks, strict=False)]


# ----------------------------------------------------------------------------------------------------------------------

def main():
    # config files and --key=value set the knobs above, and the fields of GPTConfig, a model's shape: those are given
    config, given = runtime.configure(globals(), GPTConfig)
    runtime.check_ranges(config, RANGES)
    if label_smoothing and loss_type not in ('sigmoid', 'simpo'):
        raise UserError(f"label_smoothing={label_smoothing} goes with loss_type='sigmoid' or 'simpo', not "
                        f'{loss_type!r}')
    run = runtime.Run(out_dir, device, dtype, seed, fsdp)
    run.check_accumulation(gradient_accumulation_steps)

    # model
    resume_from = run.find_checkpoint(init_from)
    start = load_to_train('dpo', base if init_from == 'auto' else init_from, resume_from, given, seed)
    model, tokenizer = start.model, start.tokenizer
    length = start.row_length(max_length)
    if max_new_tokens >= model.config.block_size:
        raise UserError(f'max_new_tokens={max_new_tokens} leaves no room for a prompt in block_size='
                        f'{model.config.block_size}: lower it')
    scorer = load_scorer(reward_model, run) if reward_model else None
    if Path(dataset).suffix not in ('.json', '.jsonl'):
        run.on_main(lambda: find_dataset(dataset))  # one process prepares it, the others wait
    if eval_only:
        before, net = start.initial_weights(), run.wrap(model, compile)
        data = prefs_of(dataset, eval_split, tokenizer, length, seed, strict, val_fraction, run.print0)
        reference = {name: run.like(p, before[name]) for name, p in model.named_parameters() if name in before}
        _, summary, samples = evaluate(model, net, reference, [], data, run, scorer)
        run.print0(f'{init_from} on {len(data.fixed(eval_rows)):,} pairs of {dataset}, {eval_split}: {summary}')
        return run.print0('\n'.join(samples))

    # data
    train_data, val_data = (prefs_of(dataset, split, tokenizer, length, seed, strict, val_fraction, run.print0)
                            for split in ('train', 'val'))
    net = run.wrap(model, compile, activation_checkpointing)  # model in DDP, FSDP or torch.compile: call this one
    with runtime.user_errors():
        optimizers = model.configure_optimizers(optimizer, learning_rate, weight_decay, (beta1, beta2), embed_lr,
                                                muon_lr, muon_momentum)

    # the reference: the policy as it is before its first step. Only what is trained is kept twice
    reference = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    ref_logps = torch.full((2 * train_data.n_rows,), math.nan, dtype=torch.float64)  # nan where not computed yet
    ref_texts = train_data.fingerprint()

    # resume
    step, pairs_seen, clock = 0, 0, runtime.Clock()
    if resume_from:
        own = start.checkpoint
        run.resume(own, start.origin, optimizers, config)
        step, pairs_seen, clock = own['iter'], own['pairs'], runtime.Clock(own['seconds'])
        for name, tensor in reference.items():
            tensor.copy_(run.like(tensor, own['reference'][name]))
        if own['ref_texts'] == ref_texts:
            ref_logps = own['ref_logps']
        own = start.checkpoint = None  # frees its memory
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

    # the reference never changes, so its log-probabilities are computed once, of the pairs that training comes to
    clock.start()
    texts = train_data.texts(np.unique(train_data.rows(0, max_iters * pairs_per_step)))
    texts = texts[torch.isnan(ref_logps[texts]).numpy()]
    if len(texts) and loss_type not in FREE:
        with run.swapped_weights(model, reference):
            ref_logps[texts] = torch.from_numpy(compute_all_logps(
                net, run, [train_data.example(text) for text in texts], length))
        run.print0(f'log-probabilities of {len(texts):,} answers under the reference, {clock.read():.1f} s')

    if run.ddp:
        first = pairs_seen + run.rank * batch_size
        run.seed_dropout(first)
        examples = [train_data.example(text) for text in train_data.texts(train_data.rows(first, batch_size))]
        run.warm_up_ddp(net, compute_logps(net, run, examples, length).mean())
    meter = runtime.Meter(run, clock, max_iters, model.flops_per_token(length))
    val_ref_logps = []
    meter.reset(step)
    while True:
        evaluating = step > last_eval and (step % eval_interval == 0 or step == max_iters)
        score = math.inf  # lower is better; without an evaluation it is never the best
        if evaluating:
            clock.stop()
            metrics, summary, samples = evaluate(model, net, reference, val_ref_logps, val_data, run, scorer)
            run.log(metrics | {'iter': step, 'seconds': clock.read()})
            run.print0(f'step {step}, {clock.read():.1f} s of training: {summary}')
            run.sample(step, '\n'.join(samples))
            score, last_eval = metrics['val/loss'], step
        stop = run.stop_signal()
        if evaluating or (stop and step > last_eval):
            clock.stop()
            run.save_checkpoint(start.model_state() | {'iter': step, 'pairs': pairs_seen, 'seconds': clock.read()},
                                optimizers, score, keep_checkpoints,
                                {'reference': reference, 'ref_logps': ref_logps, 'ref_texts': ref_texts})
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
            texts = train_data.texts(train_data.rows(first, batch_size))
            examples = [train_data.example(text) for text in texts]
            run.seed_dropout(first)  # a function of the seed and the place in the data, not of what ran before
            # both answers of all pairs in one forward pass: the chosen ones, then the rejected ones
            chosen, rejected = compute_logps(net, run, examples, length).chunk(2)
            n_chosen, n_rejected = run.to_device(train_data.targets_in[texts].astype(np.float32))[0].chunk(2)
            ref_chosen, ref_rejected = run.to_device(ref_logps[texts].float().numpy())[0].chunk(2)
            losses, chosen_rewards, rejected_rewards = preference_loss(
                chosen, rejected, ref_chosen, ref_rejected, n_chosen, n_rejected, loss_type, beta, label_smoothing,
                length_normalise, gamma)
            # a margin can grow while both answers get less likely: this term holds the chosen one up (arXiv:2404.19733)
            loss = (losses - sft_coef * chosen / n_chosen).mean()
            loss = loss / micro_steps
            run.backward(loss)
            step_loss += loss.detach()
            margins = chosen_rewards - rejected_rewards
            meter.add(sum(len(ids) for ids, _ in examples),
                      **{'train/accuracy': (torch.sign(margins).mean() + 1) / 2, 'train/margin': margins.mean(),
                         'train/logp_chosen': chosen.detach().mean(), 'train/logp_rejected': rejected.detach().mean()})

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
    run.print0(f'done: best validation loss {run.best:.4f}; talk to it: '
               f'python sample.py --init_from={out_dir} --chat=True')


if __name__ == '__main__':
    runtime.cli(main)
