"""
Group relative policy optimisation: a model learns from its own answers which of several to one prompt were the better.

    python grpo.py config/grpo_tiny.py                             word problems, from the model of config/sft_mixed.py
    python grpo.py config/grpo_tiny.py --loss_type=dapo --clip_eps_high=0.28 --dynamic_sampling=4
    python grpo.py config/grpo_tiny.py --rewards=model --reward_model=out/reward    a reward model instead of a grader
    python grpo.py config/grpo_tiny.py --rewards="correct, 0.5*mine.py:politeness"      a function of yours
    python grpo.py config/grpo_smollm2.py                          SmolLM2-135M learns with LoRA
    torchrun --standalone --nproc_per_node=2 grpo.py config/grpo_tiny.py

A step samples num_generations answers to each of prompts_per_step prompts, rewards them, and takes as the advantage of
an answer, all its tokens alike, how far its reward lies above the mean of its group. There is no value model. Rewards
are named in `rewards` (see rollout.py); the true quality of answers to word problems is logged as reward/gold and is
never learnt from.

Papers: DeepSeekMath's GRPO (arXiv:2402.03300), the k3 estimator of KL (Schulman 2020), Dr. GRPO (arXiv:2503.20783),
DAPO (arXiv:2503.14476), CISPO (MiniMax-M1, arXiv:2506.13585), GSPO (arXiv:2507.18071), PPO's clip (arXiv:1707.06347).
"""
import math
from pathlib import Path

import runtime  # before torch: it sets an OpenMP variable that torch reads when it is imported

import numpy as np
import torch

from convert import load_to_train
from dataset import find_dataset
from model import GPTConfig
from rollout import (
    SHARED_ROW,
    Rewards,
    compute_all_logprobs,
    compute_logprobs,
    evaluate_policy,
    forcing,
    generate_rollouts,
    gold_scores,
    join_rollouts,
    kl_terms,
    load_prompt_data,
)
from tokenizer import UserError

# where and what
out_dir = 'out/grpo'  # directory of the run: checkpoints, metrics, samples
init_from = 'out/sft'  # model to start from, as in sample.py; 'resume'; or 'auto' (resume if out_dir has a run)
base = 'out/sft'  # init_from='auto': the model to start from if out_dir has no run yet
dataset = 'wordproblems'  # folder in data/ (prepared if it is not yet), path of a folder, or a .json or .jsonl file
val_fraction = 0.1  # fraction of the prompts that is held out when dataset is a single file
seed = 1337  # of the order of the data, new weights and samples
strict = True  # stop at a malformed row; False: skip and count it
# rewards
rewards = 'correct'  # a sum, as 'correct, 0.2*format, -0.1*length, model, FILE.py:function': see rollout.py
reward_model = ''  # a run of reward.py, for 'model'
max_bad_rewards = 20  # stop once more rewards than this have failed
overlong_buffer = 0  # DAPO: from so many tokens before max_new_tokens on the reward falls, by 1 at the end; 0 = not
# answers
prompts_per_step = 32  # prompts of a step
num_generations = 8  # answers to each
max_new_tokens = 128  # maximum length of an answer, in tokens
tools = False  # run the calculator on <tool>…</tool>; its results are masked out of the loss
max_think_tokens = 0  # close <think> after this many tokens; that </think> is masked out of the loss; 0 = no limit
temperature = 1.0  # of sampling; the log-probabilities in the loss are computed at it, too
mask_truncated = False  # answers that did not end carry no loss
dynamic_sampling = 0  # DAPO: so often at most, groups with equal rewards give way to those of further prompts
# loss
loss_type = 'grpo'  # 'grpo', 'bnpo', 'dr_grpo', 'dapo', 'cispo' or 'gspo'
scale_rewards = 'group'  # advantages over the standard deviation of their 'group', of the 'batch', or 'none'
clip_eps = 0.2  # how far below 1 a ratio of probabilities counts
clip_eps_high = 0.0  # how far above; 0 = clip_eps
kl_coef = 0.04  # weight of KL(policy || reference), estimated by k3, per token; 0 = no reference
entropy_coef = 0.0  # weight of the entropy bonus, per token
# batches
batch_size = 64  # answers per micro-batch
gradient_accumulation_steps = 4  # micro-batches per update, over all processes together
num_epochs = 1  # passes over the answers of a step
max_iters = 100  # steps; each samples prompts_per_step * num_generations answers and learns from them
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
eval_split = 'val'  # split that eval_only evaluates: 'val', 'test' or 'train'
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
# Those whose value and gradient stay the same without the answers that have no advantage, so that these need not be
# read. A loss with a denominator that counts the answers or tokens of its micro-batch, as 'bnpo', must not be here.
SKIPS_ZERO_ADVANTAGE = ('grpo', 'dr_grpo', 'dapo', 'cispo', 'gspo')

# allowed values of the knobs, checked in main; runtime.RANGES has those of the knobs that stages share
RANGES = runtime.RANGES | {
    'val_fraction': '> 0 and < 1', 'temperature': '> 0', 'num_generations': '>= 2',
    **dict.fromkeys(('prompts_per_step', 'max_new_tokens', 'num_epochs'), '>= 1'),
    **dict.fromkeys(('dynamic_sampling', 'clip_eps', 'clip_eps_high', 'kl_coef', 'overlong_buffer', 'max_bad_rewards',
                     'max_think_tokens', 'eval_rows', 'show_answers'), '>= 0'),
    'loss_type': LOSSES, 'scale_rewards': ('group', 'batch', 'none'), 'eval_split': ('val', 'test', 'train')}


# ----------------------------------------------------------------------------------------------------------------------
# the maths

def group_advantages(totals, scale='group'):
    """Rewards (P, k) of k answers to each of P prompts, nan where there is none -> advantages (P, k), 0 there.

    A reward less its group's mean (arXiv:2402.03300, 4.1.2), divided by the group's standard deviation ('group'), that
    of the whole batch ('batch') or nothing ('none', arXiv:2503.20783), with 1e-4 added to it. The deviation has k - 1
    in its denominator; a group of one has no spread.
    """
    known = torch.isfinite(totals)
    values, n = totals.nan_to_num(0.0) * known, known.sum(1, keepdim=True)
    centred = (values - values.sum(1, keepdim=True) / n.clamp(min=1)) * known
    if scale == 'group':
        return centred / ((centred.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt() + 1e-4)
    if scale == 'batch':
        return centred / ((totals[known].std() if known.sum() > 1 else 0.0) + 1e-4)
    return centred


def has_spread(totals):
    """Which groups of rewards (P, k) are not all equal: only those teach anything; bool (P,)."""
    known = torch.isfinite(totals)
    high, low = (totals.masked_fill(~known, end) for end in (-math.inf, math.inf))
    return (high.amax(1) > low.amin(1)) & known.any(1)


def overlong(lengths, longest, buffer):
    """DAPO's penalty for long answers (arXiv:2503.14476, eq. 13): 0 up to longest - buffer tokens, then down to -1."""
    return -((lengths - (longest - buffer)) / buffer).clamp(0, 1)


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask, loss_type='grpo', clip_eps=0.2, clip_eps_high=0.2,
              kl_coef=0.0, entropies=None, entropy_coef=0.0, longest=1, tokens=None, n_answers=None):
    """The loss of answers -> (loss, {'clip_frac': share of tokens whose ratio is cut off, 'kl': mean k3 per token}).

    logprobs, old_logprobs (those of the policy that wrote the answers), ref_logprobs (or None), entropies (or None) and
    mask, 1 on the tokens that count: (B, A). advantages: (B,). With the ratio r = exp(logprobs - old_logprobs), for
    'gspo' the geometric mean of its tokens', a token's loss is -min(r a, clip(r, 1 - clip_eps, 1 + clip_eps_high) a),
    for 'cispo' -min(r, 1 + clip_eps_high) a logprob with no gradient through r; plus kl_coef times k3, which is never
    part of the advantage, less entropy_coef times the entropy. 'grpo' and 'gspo' average over each answer, then over
    answers; 'bnpo' over the tokens of the batch; 'dapo' and 'cispo' divide the sum by `tokens`, their number in the
    whole update, per micro-batch; 'dr_grpo' by B * longest, so that long answers weigh as their tokens do. n_answers
    takes the place of B where some were left out because they would add nothing.
    """
    log_ratio = (logprobs - old_logprobs) * mask
    if loss_type == 'gspo':  # one ratio for the whole answer, as the reward is one
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    ratio = log_ratio.exp()
    advantages = advantages[:, None]
    low, high = 1 - clip_eps, 1 + clip_eps_high
    if loss_type == 'cispo':
        losses = -ratio.clamp(max=high).detach() * advantages * logprobs
        clipped = (ratio > high) & (advantages != 0)
    else:
        losses = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
        clipped = (ratio > high) & (advantages > 0) | (ratio < low) & (advantages < 0)
    losses = losses.expand_as(mask)
    n_tokens = mask.sum().clamp(min=1)
    stats = {'clip_frac': (clipped * mask).sum() / n_tokens}
    if ref_logprobs is not None:
        k3 = kl_terms(logprobs, ref_logprobs, 'k3')
        losses = losses + kl_coef * k3
        stats['kl'] = (k3.detach() * mask).sum() / n_tokens
    if entropies is not None and entropy_coef:
        losses = losses - entropy_coef * entropies
    losses = losses * mask
    if loss_type in ('grpo', 'gspo'):
        loss = (losses.sum(1) / mask.sum(1).clamp(min=1)).sum() / (n_answers or len(losses))
    elif loss_type == 'dr_grpo':
        loss = losses.sum() / ((n_answers or len(losses)) * longest)
    else:
        loss = losses.sum() / (n_tokens if loss_type == 'bnpo' or tokens is None else max(1.0, tokens))
    return loss, stats


# ----------------------------------------------------------------------------------------------------------------------

def generate_groups(model, data, prompts_seen, step, run, reward, force):
    """num_generations answers to each of the next prompts, and their rewards -> (answers, totals (P, k), their parts,
    the share of groups whose rewards are all equal, prompts_seen).

    With dynamic_sampling groups whose rewards are equal, which teach nothing, give way to those of later prompts.
    """
    kept, totals, parts, zero_spread = [], [], [], 0.0
    for attempt in range(dynamic_sampling + 1):
        missing = prompts_per_step - len(totals)
        sample_seed = 1 + step * (dynamic_sampling + 1) + attempt  # evaluations have 0
        new = generate_rollouts(model, data, data.rows(prompts_seen, missing), run, max_new_tokens, num_generations,
                                temperature, sample_seed, force=force)
        prompts_seen += missing
        values, terms = reward(data, new)
        if overlong_buffer:
            values = values + overlong(torch.from_numpy(new.lengths), max_new_tokens, overlong_buffer).numpy()
        values = torch.from_numpy(values).view(-1, num_generations)
        differ = has_spread(values)
        zero_spread = zero_spread or 1 - differ.double().mean().item()
        last = attempt == dynamic_sampling
        chosen = [i for i in range(missing) if last or differ[i]]
        kept.append(new.take([i * num_generations + k for i in chosen for k in range(num_generations)]))
        totals += [values[i] for i in chosen]
        parts.append({name: x.reshape(-1, num_generations)[chosen].flatten() for name, x in terms.items()})
        if len(totals) == prompts_per_step:
            break
    parts = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return join_rollouts([part for part in kept if len(part)]), torch.stack(totals), parts, zero_spread, prompts_seen


def main():
    # config files and --key=value set the knobs above, and the fields of GPTConfig, a model's shape: those are given
    config, given = runtime.configure(globals(), GPTConfig)
    runtime.check_ranges(config, RANGES)
    if overlong_buffer > max_new_tokens:
        raise UserError(f'overlong_buffer={overlong_buffer} is more than max_new_tokens={max_new_tokens}')
    if given.get('dropout') or given.get('lora_dropout'):
        raise UserError('dropout and lora_dropout are off here: a ratio of probabilities is to be that of the weights')
    n_answers = prompts_per_step * num_generations
    answers_per_update = batch_size * gradient_accumulation_steps
    if n_answers % answers_per_update:
        raise UserError(f'prompts_per_step * num_generations = {n_answers} answers are not a multiple of batch_size * '
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
    force = forcing(tokenizer, tools, max_think_tokens)
    reward = Rewards(rewards, tokenizer, run, max_new_tokens, reward_model, max_bad_rewards)
    if Path(dataset).suffix not in ('.json', '.jsonl'):
        run.on_main(lambda: find_dataset(dataset))  # one process prepares it, the others wait
    if eval_only:
        net = run.wrap(model, compile)
        data = load_prompt_data(run, dataset, eval_split, tokenizer, block_size, max_new_tokens, seed, strict,
                                val_fraction)
        reward.check(data.rows_kept)
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
        optimizers = model.configure_optimizers(optimizer, learning_rate, weight_decay, (beta1, beta2), embed_lr,
                                                muon_lr, muon_momentum)
    reference = None  # the policy as it is before its first step; only what is trained is kept twice
    if kl_coef:
        reference = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    # resume
    step, prompts_seen, clock = 0, 0, runtime.Clock()
    if resume_from:
        own = start.checkpoint
        run.resume(own, start.origin, optimizers, config)
        step, prompts_seen, clock = own['iter'], own['prompts'], runtime.Clock(own['seconds'])
        reward.failed = own['failed']
        if reference is not None and own['reference'] is None:
            raise UserError(f'{start.origin} was trained with kl_coef=0 and holds no reference: resume with that')
        for name, tensor in (reference or {}).items():
            tensor.copy_(run.like(tensor, own['reference'][name]))
        own = start.checkpoint = None  # frees its memory
    last_eval = step if resume_from else -1  # a resumed run does not repeat the evaluation of its checkpoint

    micro_steps = gradient_accumulation_steps // run.world_size  # micro-batches of this process
    run.open(config, step if resume_from else None, tensorboard_log, wandb_log, wandb_project, wandb_run_name)
    run.catch_signals()
    epochs = max_iters * prompts_per_step / train_data.n_rows
    run.print0(
        f'{dataset}: {train_data.n_rows:,} prompts to learn from, {val_data.n_rows:,} held out ({tokenizer.name})\n'
        f'{start.summary()}; on {run.world_size} x {run.device}, {run.dtype}\n'
        f'{max_iters:,} steps of {prompts_per_step} prompts, {num_generations} answers to each and '
        f'{updates_per_step} updates: {epochs:.2f} epochs')

    meter = runtime.Meter(run, clock, max_iters, model.flops_per_token(min(block_size, SHARED_ROW)))
    warmed_up, told_of_zero_spread = not run.ddp, False
    clock.start()
    meter.reset(step)
    while True:
        evaluating = step > last_eval and (step % eval_interval == 0 or step == max_iters)
        score = math.inf  # lower is better; without an evaluation it is never the best
        if evaluating:
            clock.stop()
            metrics, summary, samples = evaluate_policy(net, model, reference, val_data, run, reward,
                                                      val_data.fixed(eval_rows), max_new_tokens, temperature, force)
            run.log(metrics | {'iter': step, 'seconds': clock.read()})
            run.print0(f'step {step}, {clock.read():.1f} s of training: {summary}')
            run.sample(step, '\n'.join(samples[:show_answers]))
            score = -metrics.get('val/reward', -math.inf)
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
        began = clock.read()
        answers, totals, parts, zero_spread, prompts_seen = generate_groups(model, train_data, prompts_seen, step, run,
                                                                            reward, force)
        seconds = clock.read() - began
        advantages = group_advantages(totals, scale_rewards).flatten().numpy()
        totals = totals.numpy()
        # tokens that were forced on the policy, and answers whose reward failed (nan), carry no loss
        response_mask = answers.response_mask * np.isfinite(totals).reshape(-1, 1)
        if mask_truncated:
            response_mask = response_mask * answers.ended[:, None]

        # A single update is made by the policy that wrote the answers: its ratios are 1, and its own log-probabilities
        # stand for the old ones. Further updates need those from before the first. The training forward computes them
        # again, because the sampler rounds in another way and a ratio would see that.
        old_logprobs = ref_logprobs = None
        if updates_per_step > 1:
            old_logprobs = compute_all_logprobs(net, run, answers, block_size, temperature)[0]
            gap = np.abs(old_logprobs - answers.logprobs)[answers.response_mask].mean()
            meter.add(**{'rollout/gap': gap})
        if reference is not None:
            with run.swapped_weights(model, reference):
                ref_logprobs = compute_all_logprobs(net, run, answers, block_size, temperature)[0]

        if zero_spread == 1 and not told_of_zero_spread:
            run.print0(f'step {step}: all answers to each prompt have equal rewards: there is nothing to learn from '
                       'until some differ (zero_spread)')
            told_of_zero_spread = True
        gold = gold_scores(train_data, answers)
        if np.isfinite(totals).any():
            meter.add(**{'reward/mean': np.nanmean(totals), 'reward/std': np.nanstd(totals),
                         **{f'reward/{name}': np.nanmean(x) for name, x in parts.items()}})
        if np.isfinite(gold).any():
            meter.add(**{'reward/gold': np.nanmean(gold)})
        meter.add(response_len=answers.lengths.mean(), ended=answers.ended.mean(), zero_spread=zero_spread,
                  **{'rollout/tok_per_sec': answers.lengths.sum() / seconds})

        # the learning rate of this step, for all its updates
        lr_scale = runtime.lr_factor(step, lr_schedule, warmup_iters, lr_decay_iters or max_iters,
                                     min_lr / learning_rate, decay_frac)
        for group in optimizers.param_groups:  # AdamW's, the embedding's and Muon's groups have peaks of their own
            group['lr'] = group['peak_lr'] * lr_scale

        # answers that add nothing to the loss are not read: no advantage, and no other term that pulls at them
        matters = (advantages != 0) & response_mask.any(1)
        if kl_coef or entropy_coef or loss_type not in SKIPS_ZERO_ADVANTAGE:
            matters[:] = True
        sizes = answers.group_sizes
        for epoch in range(num_epochs):
            order = np.random.default_rng([seed, step, epoch]).permutation(prompts_per_step)
            order = (order[:, None] * num_generations + np.arange(num_generations)).flatten()  # groups stay together
            for first in range(0, n_answers, answers_per_update):
                chosen = order[first:first + answers_per_update]
                read = chosen[matters[chosen]]
                if len(read) < gradient_accumulation_steps:
                    read = chosen
                read = read[np.argsort(sizes[read], kind='stable')]  # by length: little padding
                micro_batches = np.array_split(read, gradient_accumulation_steps)
                # the denominators are those of the whole update, whatever was left out of it and however it is cut
                tokens_per_micro_batch = response_mask[chosen].sum() / gradient_accumulation_steps
                if not warmed_up:
                    logprobs, _, _ = compute_logprobs(net, run, answers, micro_batches[run.rank], block_size,
                                                      temperature)
                    run.warm_up_ddp(net, logprobs.mean())
                    warmed_up = True

                # forward and backward, over this process's micro-batches
                step_loss = 0.0
                for number in run.micro_batches(net, gradient_accumulation_steps):
                    part = micro_batches[number]
                    logprobs, entropies, _ = compute_logprobs(net, run, answers, part, block_size, temperature)
                    width = logprobs.shape[1]  # tokens of the longest answer of this part
                    mask, sampled, old, ref = (
                        None if x is None else run.to_device(x[part][:, :width].astype(np.float32))[0]
                        for x in (response_mask, answers.logprobs, old_logprobs, ref_logprobs))
                    loss, stats = grpo_loss(
                        logprobs, logprobs.detach() if old is None else old, ref,
                        run.to_device(advantages[part].astype(np.float32))[0], mask, loss_type, clip_eps,
                        clip_eps_high or clip_eps, kl_coef, entropies, entropy_coef, max_new_tokens,
                        tokens_per_micro_batch, batch_size)
                    loss = loss / micro_steps
                    run.backward(loss)
                    step_loss += loss.detach()
                    n_tokens = mask.sum().clamp(min=1)
                    meter.add(answers.tokens(part), entropy=(entropies.detach() * mask).sum() / n_tokens, **stats)
                    if old is None:  # how far the sampler's arithmetic is from that of training
                        gap = ((sampled - logprobs.detach()).abs() * mask).sum() / n_tokens
                        meter.add(**{'rollout/gap': gap})

                # update; where the gradient is not finite it is skipped, decided on the device without waiting for it
                grad_norm = run.clip_grad_norm(model, optimizers, grad_clip)
                optimizers.step(found_inf=run.found_inf(grad_norm))
                optimizers.zero_grad()
        step += 1

        if step % max_bad_steps == 0 or step % log_interval == 0:  # not at every step: the host waits for the device
            run.check_skipped(step, max_bad_steps)
        if step % log_interval == 0 or step == max_iters:
            meter.log(step, step_loss, grad_norm, learning_rate * lr_scale, failed=reward.failed)

    run.finish(step, stop, parameters=model.num_params(), trainable=model.num_params(learning=True))
    run.print0(f'done: best held-out reward {-run.best:.4f}; talk to it: '
               f'python sample.py --init_from={out_dir} --chat=True{" --tools=True" * tools}')


if __name__ == '__main__':
    runtime.cli(main)
