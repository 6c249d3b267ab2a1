"""
Group relative policy optimisation (GRPO): a model learns from rewards of its own answers, each compared with the other
answers to the same prompt.

    python grpo.py config/grpo_tiny.py                             word problems, from the model of config/sft_mixed.py
    python grpo.py config/grpo_tiny.py --rewards=model --reward_model=out/reward    a reward model instead of a grader
    python grpo.py config/grpo_tiny.py --rewards="correct, 0.5*mine.py:politeness"      a function of yours
    python grpo.py config/grpo_smollm2.py                          SmolLM2-135M learns with LoRA
    torchrun --standalone --nproc_per_node=2 grpo.py config/grpo_tiny.py

One training step, in `main`:

    rollout     num_generations answers (the papers' outputs or completions) are sampled to each of prompts_per_step
                prompts; the answers to one prompt are a group
    rewards     each answer gets a number, the sum that `rewards` names (see rollout.py); reward/gold, the true quality
                of answers to word problems, is logged but part of no reward
    advantage   an answer's reward minus the mean of its group, over the group's standard deviation; the same for all
                tokens of the answer, it replaces the critic of PPO
    updates     num_epochs passes over the answers: the loss clips the ratio of new to old probabilities, as PPO does,
                and contains the KL to the model that the run began with

loss_type sets only how the ratio enters the loss and what the sum over tokens is divided by. The papers' full recipes:

    Dr. GRPO    --loss_type=dr_grpo --scale_rewards=none --kl_coef=0
    DAPO        --loss_type=dapo --scale_rewards=group --kl_coef=0 --clip_eps_high=0.28 --dynamic_sampling=4
                --overlong_buffer=32
    GSPO        --loss_type=gspo --scale_rewards=group --kl_coef=0 --clip_eps=3e-4 --clip_eps_high=4e-4

Papers: DeepSeekMath's GRPO (arXiv:2402.03300), the k3 estimator of KL (Schulman 2020), Dr. GRPO (arXiv:2503.20783),
DAPO (arXiv:2503.14476), CISPO (MiniMax-M1, arXiv:2506.13585), GSPO (arXiv:2507.18071), PPO's clip (arXiv:1707.06347).
"""
import math
from typing import NamedTuple

import runtime  # before torch: it sets an OpenMP variable that torch reads when it is imported

import numpy as np
import torch

from dataset import find_dataset
from load import load_to_train
from lora import LoRAConfig
from model import GPTConfig
from optim import lr_factor, make_optimizers
from rollout import (
    SHARED_ROW,
    Rewards,
    Rollout,
    compute_all_logprobs,
    compute_logprobs,
    evaluate_policy,
    forcing,
    generate_rollouts,
    gold_scores,
    join_rollouts,
    kl_terms,
    load_prompt_data,
    to_batch,
)
from rows import is_file_of_rows
from tokenizer import UserError

# where and what
out_dir = 'out/grpo'  # directory of the run: checkpoints, metrics, samples
init_from = 'out/sft'  # model to start from, as in sample.py; 'resume'; or 'auto' (resume if out_dir has a run)
base = 'out/sft'  # init_from='auto': the model to start from if out_dir has no run yet
dataset = 'wordproblems'  # folder in data/ (prepared if it is not yet), path of a folder or of a file of rows
val_fraction = 0.1  # fraction of the prompts that is held out when dataset is a single file
seed = 1337  # of the order of the data, new weights and samples
strict = True  # stop at a malformed row; False: skip and count it
# rewards
rewards = 'correct'  # a weighted sum: 'correct, 0.2*format, -0.1*length, model, FILE.py:function', see rollout.py
reward_model = ''  # directory of a run of reward.py: for 'model' in rewards, and only then
max_bad_rewards = 20  # stop once more rewards than this have failed
overlong_buffer = 0  # DAPO's L_cache: the reward falls, by up to 1, in this many tokens before max_new_tokens; 0 = off
# answers
prompts_per_step = 32  # prompts per step
num_generations = 8  # answers to each prompt: the group size G
max_new_tokens = 128  # maximum length of an answer, in tokens
tools = False  # run the calculator on <tool>…</tool>; its results are masked out of the loss
max_think_tokens = 0  # close <think> after this many tokens; that </think> is masked out of the loss; 0 = no limit
temperature = 1.0  # of sampling; the log-probabilities in the loss are computed at it, too
mask_truncated = False  # True: answers that max_new_tokens has cut off are masked out of the loss
dynamic_sampling = 0  # DAPO: up to this many times a step, replace groups of equal rewards by new prompts; 0 = off
# loss
loss_type = 'grpo'  # 'grpo', 'bnpo', 'dr_grpo', 'dapo', 'cispo' or 'gspo'
scale_rewards = 'group'  # standard deviation that divides advantages: of the 'group', of the 'batch', or 'none'
clip_eps = 0.2  # lower end of the ratio's clip: 1 - clip_eps; 'cispo' has none
clip_eps_high = 0.0  # upper end of the ratio's clip: 1 + clip_eps_high; 0 = clip_eps
kl_coef = 0.04  # beta: weight of KL(policy || reference) in the loss, k3 per token; 0 = no reference model
entropy_coef = 0.0  # weight of the entropy bonus, per token
# batches
batch_size = 64  # answers per micro-batch
gradient_accumulation_steps = 4  # micro-batches per update, over all processes together
num_epochs = 1  # passes over the answers of a step: GRPO's mu
max_iters = 100  # steps; each samples prompts_per_step * num_generations answers and is trained on them
# optimizer
optimizer = 'adamw'  # 'adamw', or 'muon' for the matrices of the blocks and AdamW for the rest
learning_rate = 1e-4  # peak learning rate of AdamW
embed_lr = 0.0  # peak learning rate of the token embedding; 0 = learning_rate
muon_lr = 0.002  # peak learning rate of Muon
muon_momentum = 0.95  # Nesterov momentum of Muon
weight_decay = 0.0  # applied to matrices only
beta1 = 0.9  # AdamW: decay rate of the first moment
beta2 = 0.99  # AdamW: decay rate of the second moment
grad_clip = 1.0  # maximum gradient norm; 0 = no clipping
# schedule
lr_schedule = 'constant'  # after the warmup: 'cosine', 'linear', 'wsd' (constant, then linear) or 'constant'
warmup_iters = 5  # steps of linear warmup
lr_decay_iters = 0  # step at which the learning rate reaches min_lr; 0 = max_iters
min_lr = 0.0  # final learning rate; every group decays by the same factor
decay_frac = 0.5  # 'wsd': fraction of lr_decay_iters that the final decay takes
# evaluation and logging
eval_interval = 25  # steps between evaluations, each with answers and a checkpoint
eval_rows = 256  # held-out prompts per evaluation, always the same; 0 = all
eval_only = False  # evaluate init_from and exit, without training
eval_split = 'val'  # split that eval_only evaluates: 'val', 'test', 'train', or 'unseen' (see data/wordproblems)
show_answers = 3  # answers printed at each evaluation
log_interval = 1  # steps between lines of the log
keep_checkpoints = 2  # checkpoints to keep: ckpt.pt, and older ones as ckpt.1.pt …
max_bad_steps = 10  # stop after this many skipped updates in a row (loss or gradient not finite)
tensorboard_log = False  # log to out_dir/tensorboard
wandb_log = False  # log to Weights & Biases
wandb_project = 'flatgpt'  # Weights & Biases: project
wandb_run_name = 'grpo'  # Weights & Biases: name of the run
# machine
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'; auto = the best available
dtype = 'auto'  # 'float32', 'bfloat16' or 'float16'; auto = 16 bits if the device is faster at it
compile = False  # torch.compile: slow to start, then faster
activation_checkpointing = False  # recompute each block in the backward pass: less memory, a third more time
fsdp = False  # under torchrun: shard parameters, gradients and optimizer state (FSDP2), not replicate them (DDP)

LOSSES = ('grpo', 'bnpo', 'dr_grpo', 'dapo', 'cispo', 'gspo')
# Losses whose value and gradient stay the same when answers with advantage 0 are skipped. A loss that divides by the
# number of answers or tokens in the micro-batch, as 'bnpo' does, must not be listed: skipping changes its denominator.
SKIPS_ZERO_ADVANTAGE = ('grpo', 'dr_grpo', 'dapo', 'cispo', 'gspo')

# allowed values of the knobs, checked in main; runtime.RANGES has those of the knobs that stages share
RANGES = runtime.RANGES | {
    'val_fraction': '> 0 and < 1', 'temperature': '> 0', 'num_generations': '>= 2',
    **dict.fromkeys(('prompts_per_step', 'max_new_tokens', 'num_epochs'), '>= 1'),
    **dict.fromkeys(('dynamic_sampling', 'clip_eps', 'clip_eps_high', 'kl_coef', 'overlong_buffer', 'max_bad_rewards',
                     'max_think_tokens', 'eval_rows', 'show_answers'), '>= 0'),
    'loss_type': LOSSES, 'scale_rewards': ('group', 'batch', 'none'), 'eval_split': ('val', 'test', 'unseen', 'train')}


# ----------------------------------------------------------------------------------------------------------------------
# the maths. Shapes: P prompts, G answers to each; B answers of a micro-batch, the longest of A tokens

def group_advantages(totals, scale='group'):
    """Rewards (P, G), nan where there is none -> advantages (P, G), 0 there.

    A reward minus the mean of its group (arXiv:2402.03300, 4.1.2), divided by the standard deviation plus 1e-4 of the
    group ('group') or of all rewards ('batch'), or by nothing ('none', arXiv:2503.20783). The variance has n - 1 in
    its denominator; a group of one has standard deviation 0.
    """
    valid = torch.isfinite(totals)
    values = totals.nan_to_num(0.0) * valid
    n = valid.sum(1, keepdim=True)
    means = values.sum(1, keepdim=True) / n.clamp(min=1)
    # of equal rewards the mean may round to another number, and Adam would make a full step of the difference
    centred = (values - means) * valid * has_spread(totals)[:, None]
    if scale == 'none':
        return centred
    if scale == 'group':
        std = (centred.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
    else:
        std = totals[valid].std() if valid.sum() > 1 else 0.0
    return centred / (std + 1e-4)


def has_spread(totals):
    """Which groups of rewards (P, G) hold two different ones, bool (P,): the others' advantages are 0."""
    invalid = ~torch.isfinite(totals)
    return totals.masked_fill(invalid, -math.inf).amax(1) > totals.masked_fill(invalid, math.inf).amin(1)


def overlong(lengths, longest, buffer):
    """DAPO's penalty for long answers (arXiv:2503.14476, eq. 13): 0 up to longest - buffer tokens, then down to -1."""
    return -((lengths - (longest - buffer)) / buffer).clamp(0, 1)


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask, loss_type='grpo', clip_eps=0.2, clip_eps_high=0.2,
              kl_coef=0.0, entropies=None, entropy_coef=0.0, longest=1, tokens=None, n_answers=None):
    """The loss of a micro-batch -> (loss, {'clip_frac': fraction of tokens whose ratio is clipped, 'kl': mean k3}).

    logprobs (B, A): of the answers' tokens under the policy
    old_logprobs (B, A): under the policy that sampled them
    ref_logprobs (B, A): under the reference, or None
    advantages (B,): of the answers
    mask (B, A): 1 on the tokens that count
    entropies (B, A): of the policy before each token, or None
    longest: max_new_tokens, for 'dr_grpo'
    tokens: tokens that count in the full update, per micro-batch, for 'dapo' and 'cispo'
    n_answers: answers of the micro-batch before some were skipped; None = B
    """
    n_answers = n_answers or len(logprobs)
    log_ratio = (logprobs - old_logprobs) * mask
    if loss_type == 'gspo':  # one ratio per answer, the geometric mean of its tokens' ratios, as there is one reward
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    ratio = log_ratio.exp()
    advantages = advantages[:, None]
    low, high = 1 - clip_eps, 1 + clip_eps_high
    if loss_type == 'cispo':
        # REINFORCE weighted by the ratio: -min(r, high) A log p, with no gradient through r. It is clipped above only,
        # and tokens that are clipped keep their gradient
        losses = -ratio.clamp(max=high).detach() * advantages * logprobs
        clipped = (ratio > high) & (advantages != 0)
    else:
        # PPO's clipped surrogate: -min(r A, clip(r, low, high) A)
        losses = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
        clipped = ((ratio > high) & (advantages > 0)) | ((ratio < low) & (advantages < 0))
    losses = losses.expand_as(mask)
    n_tokens = mask.sum().clamp(min=1)
    stats = {'clip_frac': (clipped * mask).sum() / n_tokens}
    if ref_logprobs is not None:  # the KL is part of the loss here, of the reward in PPO
        k3 = kl_terms(logprobs * mask, ref_logprobs * mask, 'k3')  # off the mask exp could give inf, and inf * 0 nan
        losses = losses + kl_coef * k3
        stats['kl'] = (k3.detach() * mask).sum() / n_tokens
    if entropies is not None and entropy_coef:
        losses = losses - entropy_coef * entropies
    losses = losses * mask
    if loss_type in ('grpo', 'gspo'):  # the mean over each answer, then over answers: tokens of long ones count less
        loss = (losses.sum(1) / mask.sum(1).clamp(min=1)).sum() / n_answers
    elif loss_type == 'dr_grpo':  # a constant: every token counts the same, however long its answer is
        loss = losses.sum() / (n_answers * longest)
    elif loss_type == 'bnpo' or tokens is None:  # the tokens of this micro-batch
        loss = losses.sum() / n_tokens
    else:  # 'dapo', 'cispo': the tokens of the full update, so that it does not matter how it is cut
        loss = losses.sum() / max(1.0, tokens)
    return loss, stats


# ----------------------------------------------------------------------------------------------------------------------

class Groups(NamedTuple):
    """The answers of a step, those to one prompt side by side, with their rewards."""
    answers: Rollout  # P * G answers
    totals: torch.Tensor  # (P, G): their rewards, float64, nan where one failed
    terms: dict  # {name: (P * G,)}: the terms of the rewards before their weights
    zero_spread: float  # fraction of the groups sampled first whose rewards are all equal
    prompts_seen: int  # prompts that the run has taken from the data


def generate_groups(model, data, prompts_seen, step, run, reward, force):
    """Samples num_generations answers to each of the next prompts_per_step prompts and rewards them -> Groups.

    With dynamic_sampling, groups whose rewards are all equal are replaced by groups of the prompts that follow.
    """
    parts, totals, terms = [], [], []
    missing = prompts_per_step
    for attempt in range(dynamic_sampling + 1):
        sample_seed = 1 + step * (dynamic_sampling + 1) + attempt  # evaluations have 0
        rows = data.rows(prompts_seen, missing)  # of an endless sequence, shuffled anew in each epoch
        prompts_seen += missing
        answers = generate_rollouts(model, data, rows, run, max_new_tokens, num_generations, temperature, sample_seed,
                                    force=force)
        answer_totals, answer_terms = reward(data, answers)
        if overlong_buffer:
            penalty = overlong(torch.from_numpy(answers.lengths), max_new_tokens, overlong_buffer)
            answer_totals = answer_totals + penalty.numpy()
        group_totals = torch.from_numpy(answer_totals).view(missing, num_generations)

        # this looks at the full reward, length terms and overlong penalty included; DAPO's filter at accuracy alone
        keep = has_spread(group_totals)
        if attempt == 0:
            zero_spread = 1 - keep.double().mean().item()
        if attempt == dynamic_sampling:  # the last attempt keeps all
            keep = torch.ones_like(keep)
        indices = np.flatnonzero(np.repeat(keep.numpy(), num_generations))
        parts.append(answers.take(indices))
        totals.append(group_totals[keep])
        terms.append({name: values[indices] for name, values in answer_terms.items()})
        missing -= int(keep.sum())
        if missing == 0:
            break
    terms = {name: np.concatenate([part[name] for part in terms]) for name in terms[0]}
    return Groups(join_rollouts(parts), torch.cat(totals), terms, zero_spread, prompts_seen)


def main():
    # config files and --key=value set the knobs above, and the fields of GPTConfig and LoRAConfig: those are given
    config, given = runtime.configure(globals(), GPTConfig, LoRAConfig)
    runtime.check_ranges(config, RANGES)
    if overlong_buffer > max_new_tokens:
        raise UserError(f'overlong_buffer={overlong_buffer} must be <= max_new_tokens={max_new_tokens}')
    if given.get('dropout') or given.get('lora_dropout'):
        raise UserError('dropout and lora_dropout must be 0: their noise would show up in the probability ratios')
    n_answers = prompts_per_step * num_generations
    answers_per_update = batch_size * gradient_accumulation_steps
    if n_answers % answers_per_update:
        raise UserError(f'prompts_per_step * num_generations = {n_answers} answers must be a multiple of batch_size * '
                        f'gradient_accumulation_steps = {answers_per_update}: change one of them')
    updates_per_step = n_answers // answers_per_update * num_epochs
    run = runtime.Run(out_dir, device, dtype, seed, fsdp)
    run.check_accumulation(gradient_accumulation_steps)

    # model and rewards
    resume_from = run.find_checkpoint(init_from)
    start = load_to_train('grpo', base if init_from == 'auto' else init_from, resume_from,
                          given | {'dropout': 0.0, 'lora_dropout': 0.0}, seed)
    model, tokenizer = start.model, start.tokenizer
    block_size = model.config.block_size
    force = forcing(tokenizer, tools, max_think_tokens)  # inserts tool results and </think> while sampling, or None
    reward = Rewards(rewards, tokenizer, run, max_new_tokens, reward_model, max_bad_rewards)
    if not is_file_of_rows(dataset):
        run.on_main(lambda: find_dataset(dataset))  # one process prepares it, the others wait
    if eval_only:
        net = run.wrap(model, compile)
        data = load_prompt_data(run, dataset, eval_split, tokenizer, block_size, max_new_tokens, seed, strict,
                                val_fraction)
        reward.check(data.rows_kept)
        # the reference is the model that init_from was trained from; None where init_from is no run of this stage
        before = start.initial_weights()
        reference = {name: run.like(p, before[name]) for name, p in model.named_parameters() if name in before} or None
        _, summary, samples = evaluate_policy(net, model, reference, data, run, reward, data.fixed(eval_rows),
                                              max_new_tokens, temperature, force)
        run.print0(f'{init_from} on {len(data.fixed(eval_rows)):,} prompts of {dataset}, {eval_split}: {summary}')
        return run.print0('\n'.join(samples[:show_answers]))

    # data
    train_data, val_data = (load_prompt_data(run, dataset, split, tokenizer, block_size, max_new_tokens, seed, strict,
                                             val_fraction) for split in ('train', 'val'))
    for data in (train_data, val_data):
        reward.check(data.rows_kept)
    net = run.wrap(model, compile, activation_checkpointing)  # model in DDP, FSDP or torch.compile: call this one
    with runtime.user_errors():
        optimizers = make_optimizers(model.named_parameters(), optimizer, learning_rate, weight_decay, (beta1, beta2),
                                     embed_lr, muon_lr, muon_momentum)
    # The reference policy is a copy of the trained parameters only, as they are before the first step;
    # run.swapped_weights exchanges it with the model's for a forward pass.
    reference = None
    if kl_coef:
        reference = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    # resume
    step = prompts_seen = 0
    clock = runtime.Clock()
    if resume_from:
        checkpoint = start.checkpoint
        run.resume(checkpoint, start.origin, optimizers, config)
        step = checkpoint['iter']
        prompts_seen = checkpoint['prompts']
        clock = runtime.Clock(checkpoint['seconds'])
        reward.failed = checkpoint['failed']
        if reference is not None and checkpoint['reference'] is None:
            raise UserError(f'{start.origin} was trained with kl_coef=0 and holds no reference: resume with kl_coef=0')
        for name, tensor in (reference or {}).items():
            tensor.copy_(run.like(tensor, checkpoint['reference'][name]))
        checkpoint = start.checkpoint = None  # frees its memory
    last_eval = step if resume_from else -1  # a resumed run does not repeat the evaluation of its checkpoint

    micro_steps = gradient_accumulation_steps // run.world_size  # micro-batches of this process
    run.open(config, step if resume_from else None, tensorboard_log, wandb_log, wandb_project, wandb_run_name)
    run.catch_signals()
    epochs = max_iters * prompts_per_step / train_data.n_rows
    run.announce(
        f'{dataset}: {train_data.n_rows:,} training prompts, {val_data.n_rows:,} held out ({tokenizer.name})\n'
        f'{start.summary()}; on {run.world_size} x {run.device}, {run.dtype}\n'
        f'{max_iters:,} steps of {prompts_per_step} prompts, {num_generations} answers to each and '
        f'{updates_per_step} updates: {epochs:.2f} epochs of the data')

    meter = runtime.Meter(run, clock, max_iters, model.flops_per_token(min(block_size, SHARED_ROW)))
    warmed_up = not run.ddp
    warned = False
    clock.start()
    meter.reset(step)
    while True:
        evaluating = step > last_eval and (step % eval_interval == 0 or step == max_iters)
        score = math.inf  # the lowest is saved as best.pt; this one, without an evaluation, never is
        if evaluating:
            clock.stop()
            metrics, summary, samples = evaluate_policy(net, model, reference, val_data, run, reward,
                                                        val_data.fixed(eval_rows), max_new_tokens, temperature, force)
            run.log(metrics | {'iter': step, 'seconds': clock.read()})
            run.print0(f'step {step}, {clock.read():.1f} s of training: {summary}')
            run.sample(step, '\n'.join(samples[:show_answers]))
            score = -metrics.get('val/reward', -math.inf)  # minus the reward, because the lowest is the best
            last_eval = step
        stop = run.stop_signal()
        if evaluating or (stop and step > last_eval):
            clock.stop()
            run.save_checkpoint(start.model_state() | {'iter': step, 'prompts': prompts_seen, 'seconds': clock.read()},
                                optimizers, score, keep_checkpoints, {'reference': reference, 'failed': reward.failed})
            clock.start()
            meter.reset(step)
        if stop or step >= max_iters:
            break

        # rollouts: a group of answers to each prompt, and their rewards
        rollout_start = clock.read()
        groups = generate_groups(model, train_data, prompts_seen, step, run, reward, force)
        rollout_seconds = clock.read() - rollout_start
        answers = groups.answers
        totals = groups.totals.numpy()
        prompts_seen = groups.prompts_seen
        advantages = group_advantages(groups.totals, scale_rewards).flatten().numpy()

        # answers.response_mask excludes padding and forced tokens (tool results, </think>). The loss also excludes
        # answers whose reward failed (nan) and, with mask_truncated, those that were cut off
        loss_mask = answers.response_mask * np.isfinite(totals).reshape(-1, 1)
        if mask_truncated:
            loss_mask = loss_mask * answers.ended[:, None]

        # The ratio compares with the policy before the first update of the step. Its log-probabilities are computed
        # again, because the sampler rounds differently: with the sampler's the ratio would not start at 1. With a
        # single update per step the pass is unnecessary: the old log-probabilities are the new ones, detached
        old_logprobs = ref_logprobs = None
        if updates_per_step > 1:
            old_logprobs = compute_all_logprobs(net, run, answers, block_size, temperature)[0]
        if reference is not None:
            with run.swapped_weights(model, reference):
                ref_logprobs = compute_all_logprobs(net, run, answers, block_size, temperature)[0]

        if groups.zero_spread == 1 and not warned:
            run.print0(f'step {step}: all answers to each prompt have equal rewards: there is nothing to learn from '
                       'until some differ (zero_spread)')
            warned = True
        # logged: the answers kept after dynamic sampling. reward/mean and reward/std include the overlong penalty;
        # rollout/tok_per_sec is over the seconds of all attempts, with the computation of rewards
        gold = gold_scores(train_data, answers)
        if np.isfinite(totals).any():
            meter.add(**{'reward/mean': np.nanmean(totals), 'reward/std': np.nanstd(totals)})
            meter.add(**{f'reward/{name}': np.nanmean(values) for name, values in groups.terms.items()})
        if np.isfinite(gold).any():
            meter.add(**{'reward/gold': np.nanmean(gold)})
        meter.add(response_len=answers.lengths.mean(), ended=answers.ended.mean(), zero_spread=groups.zero_spread)
        meter.add(**{'rollout/tok_per_sec': answers.lengths.sum() / rollout_seconds})

        # the learning rate of this step, for all its updates
        lr_scale = lr_factor(step, lr_schedule, warmup_iters, lr_decay_iters or max_iters, min_lr / learning_rate,
                             decay_frac)
        for group in optimizers.param_groups:  # the embedding and Muon have peaks of their own
            group['lr'] = group.setdefault('initial_lr', group['lr']) * lr_scale

        # An answer with advantage 0 or without a token in the loss cannot change the gradient: its forward pass is
        # skipped. KL and entropy act on every answer, so with either none is skipped. entropy, clip_frac, rollout/gap
        # and tok_per_sec then describe only the answers that are left
        active = (advantages != 0) & loss_mask.any(1)
        if kl_coef or entropy_coef or loss_type not in SKIPS_ZERO_ADVANTAGE:
            active[:] = True
        if not warmed_up:
            # DDP fixes the order in which it sums gradients at its first backward pass: a discarded one makes that
            # order the same for a new and a resumed run
            logprobs = compute_logprobs(net, run, answers, range(batch_size), block_size, temperature)[0]
            run.warm_up_ddp(net, logprobs.mean())
            warmed_up = True
        group_sizes = answers.group_sizes
        for epoch in range(num_epochs):
            order = np.random.default_rng([seed, step, epoch]).permutation(prompts_per_step)
            order = (order[:, None] * num_generations + np.arange(num_generations)).flatten()  # groups stay together
            for first in range(0, n_answers, answers_per_update):
                in_update = order[first:first + answers_per_update]
                used = in_update[active[in_update]]
                if len(used) < gradient_accumulation_steps:  # every micro-batch needs an answer
                    used = in_update
                # by length, for little padding; group_sizes is equal within a group, so that a stable sort keeps its
                # answers together, which share the forward pass over their prompt
                used = used[np.argsort(group_sizes[used], kind='stable')]
                micro_batches = np.array_split(used, gradient_accumulation_steps)
                # denominators are those of the full update: they count the skipped answers, too
                tokens_per_micro_batch = loss_mask[in_update].sum() / gradient_accumulation_steps

                # forward and backward, over this process's micro-batches
                step_loss = 0.0
                for number in run.micro_batches(net, gradient_accumulation_steps):
                    part = micro_batches[number]
                    logprobs, entropies, _ = compute_logprobs(net, run, answers, part, block_size, temperature)
                    width = logprobs.shape[1]  # tokens of the longest answer of this part
                    mask, sampled, advantage = to_batch(run, part, width, loss_mask, answers.logprobs, advantages)
                    old, ref = to_batch(run, part, width, old_logprobs, ref_logprobs)
                    if old is None:
                        old = logprobs.detach()
                    loss, stats = grpo_loss(
                        logprobs, old, ref, advantage, mask, loss_type, clip_eps=clip_eps,
                        clip_eps_high=clip_eps_high or clip_eps, kl_coef=kl_coef, entropies=entropies,
                        entropy_coef=entropy_coef, longest=max_new_tokens, tokens=tokens_per_micro_batch,
                        n_answers=batch_size)  # of the micro-batch before answers were skipped
                    # the routers of a mixture of experts have a loss of their own, which balances their load
                    run.backward((loss + model.router_loss()) / micro_steps)
                    step_loss += loss.detach() / micro_steps

                    n_tokens = mask.sum().clamp(min=1)
                    entropy = (entropies.detach() * mask).sum() / n_tokens
                    gap = ((sampled - old).abs() * mask).sum() / n_tokens  # the sampler's rounding against training's
                    meter.add(tokens=answers.tokens(part), entropy=entropy, **stats, **{'rollout/gap': gap})

                # update; where the gradient is not finite it is skipped, decided on the device without waiting for it
                grad_norm = run.clip_grad_norm(model, optimizers, grad_clip)
                run.skip_if_not_finite(optimizers, grad_norm)
                optimizers.step()
                optimizers.zero_grad()
        step += 1

        if step % max_bad_steps == 0 or step % log_interval == 0:  # not at every step: the host waits for the device
            run.check_skipped(step, max_bad_steps)
        if step % log_interval == 0 or step == max_iters:
            # loss and grad_norm are those of the step's last update, all else is a mean since the last row
            meter.log(step, step_loss, grad_norm, learning_rate * lr_scale, failed=reward.failed)

    run.finish(step, stop, parameters=model.num_params(), trainable=model.num_params(learning=True))
    run.print0(f'done: best held-out reward {-run.best:.4f}; talk to it: '
               f'python sample.py --init_from={out_dir} --chat=True{" --tools=True" * tools}')


if __name__ == '__main__':
    runtime.cli(main)
