"""
Direct preference optimisation (DPO): a policy is trained on pairs of answers, of which one is preferred, without a
reward model.

    python dpo.py config/dpo_tiny.py                               word problems, from the model of config/sft_tiny.py
    python dpo.py config/dpo_tiny.py --beta=0.5 --loss_type=ipo
    python dpo.py config/dpo_tiny.py --reward_model=out/reward     a reward model scores the answers at evaluations
    python dpo.py config/dpo_smollm2.py --dataset=data/mine        SmolLM2-135M learns your pairs with LoRA
    torchrun --standalone --nproc_per_node=2 dpo.py config/dpo_tiny.py --gradient_accumulation_steps=2

The reference is the model that the run starts from. Its log-probabilities of the answers to train on are computed once
and kept in the checkpoint. An evaluation answers held-out prompts twice: greedy answers are graded, and answers sampled
at temperature 1 estimate how far the policy has moved, as the KL divergence to the reference.

Papers: DPO (arXiv:2305.18290), IPO (arXiv:2310.12036), SLiC's hinge (arXiv:2305.10425), KTO (arXiv:2402.01306), SimPO
(arXiv:2405.14734), ORPO (arXiv:2403.07691), the SFT term (arXiv:2404.19733), cDPO's label smoothing (Mitchell 2023).
"""
import math

import runtime  # before torch: it sets an OpenMP variable that torch reads when it is imported

import numpy as np
import torch
import torch.nn.functional as F

from dataset import find_dataset, pad_texts, prefs_of
from grade import accuracy_by, format_answer, format_metrics, grades, interval, outcomes, quality, summarise
from load import load_to_train
from lora import LoRAConfig
from model import GPTConfig
from optim import lr_factor, make_optimizers
from rollout import divergence, forcing, generate_rollouts, gold_scores, load_scorer
from rows import is_file_of_rows
from tokenizer import UserError

# where and what
out_dir = 'out/dpo'  # directory of the run: checkpoints, metrics, samples
init_from = 'out/sft'  # model to start from, as in sample.py; 'resume'; or 'auto' (resume if out_dir has a run)
base = 'out/sft'  # init_from='auto': the model to start from if out_dir has no run yet
dataset = 'wordproblems'  # folder in data/ (prepared if it is not yet), path of a folder or of a file of rows
val_fraction = 0.1  # fraction of the prompts that is held out when dataset is a single file
seed = 1337  # of the order of the data, dropout, new weights and samples
# pairs
max_length = 0  # maximum tokens of prompt and answer; 0 = block_size. A longer pair loses the start of its prompt
strict = True  # stop at a malformed row; False: skip and count it
# loss
loss_type = 'sigmoid'  # 'sigmoid' (DPO), 'ipo', 'hinge', 'kto_pair'; without a reference: 'simpo', 'orpo'
beta = 0.1  # larger: closer to the reference; 'simpo': scale of the margin; 'orpo': weight of the odds ratio
label_smoothing = 0.0  # 'sigmoid', 'simpo': assumed fraction of flipped labels (cDPO)
length_normalise = False  # log-probabilities per token, not per answer; always so for 'simpo' and 'orpo'
gamma = 0.5  # 'simpo': target margin
sft_coef = 0.0  # weight of the SFT term, the cross-entropy of the chosen answers per token
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
eval_rows = 256  # held-out pairs to evaluate on and prompts to answer, the same every time; 0 = all
eval_only = False  # evaluate init_from and exit, without training
eval_split = 'val'  # split that eval_only evaluates: 'val', 'test', 'train', or 'unseen' (see data/wordproblems)
reward_model = ''  # directory of a run of reward.py that scores the greedy answers; '' = none
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

REFERENCE_FREE = ('simpo', 'orpo')

# allowed values of the knobs, checked in main; runtime.RANGES has those of the knobs that stages share
RANGES = runtime.RANGES | {
    'val_fraction': '> 0 and < 1', 'beta': '> 0', 'label_smoothing': '>= 0 and < 0.5', 'max_new_tokens': '>= 1',
    **dict.fromkeys(('max_length', 'gamma', 'sft_coef', 'eval_rows', 'show_answers'), '>= 0'),
    'loss_type': ('sigmoid', 'ipo', 'hinge', 'kto_pair', 'simpo', 'orpo'),
    'eval_split': ('val', 'test', 'unseen', 'train')}


# ----------------------------------------------------------------------------------------------------------------------
# the maths. Shapes: B pairs of a batch, n held-out pairs

def preference_loss(chosen, rejected, ref_chosen, ref_rejected, n_chosen, n_rejected, loss_type='sigmoid', beta=0.1,
                    label_smoothing=0.0, length_normalise=False, gamma=0.5):
    """Losses of pairs -> (losses, implicit rewards of the chosen answers, of the rejected answers), (B,) each.

    chosen, rejected: log-probabilities of the answers under the policy, in nats, (B,); ref_chosen, ref_rejected: under
    the reference; n_chosen, n_rejected: tokens of the answers. r_c and r_r are the log-ratios of the two answers, log
    policy - log reference, with length_normalise per token; beta r is the implicit reward. 'simpo' and 'orpo' have no
    reference: their r is the log-probability per token. With h = r_c - r_r, s the logistic function, e label_smoothing:

        'sigmoid'   -(1 - e) log s(beta h) - e log s(-beta h)            DPO; with e > 0 cDPO
        'ipo'       (h - 1 / (2 beta))^2
        'hinge'     max(0, 1 - beta h)
        'kto_pair'  1 - (s(beta (r_c - kl_r)) + s(beta (kl_c - r_r))) / 2    kl_c, kl_r: means of r_c, r_r, at least 0;
                    those of these B pairs alone, so that micro-batches of 1 estimate them worse than larger ones
        'simpo'     'sigmoid' with beta h - gamma in the place of beta h
        'orpo'      -r_c - beta log s(logit(r_c) - logit(r_r))           logit(r) = r - log(1 - exp(r))
    """
    if loss_type in REFERENCE_FREE:
        ref_chosen = ref_rejected = torch.zeros_like(chosen)
    if length_normalise or loss_type in REFERENCE_FREE:
        chosen = chosen / n_chosen
        rejected = rejected / n_rejected
        ref_chosen = ref_chosen / n_chosen
        ref_rejected = ref_rejected / n_rejected
    chosen_logratio = chosen - ref_chosen
    rejected_logratio = rejected - ref_rejected
    h = chosen_logratio - rejected_logratio
    if loss_type in ('sigmoid', 'simpo'):  # Bradley-Terry: s(x) is the probability that the chosen answer is preferred
        x = beta * h - (gamma if loss_type == 'simpo' else 0.0)
        losses = -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)
    elif loss_type == 'ipo':  # a finite target for h, which log s lets grow without end
        losses = (h - 1 / (2 * beta)).square()
    elif loss_type == 'hinge':  # no gradient once the implicit rewards are 1 apart
        losses = F.relu(1 - beta * h)
    elif loss_type == 'kto_pair':  # as in trainers of DPO: the mean of the other answers' log-ratios estimates the KL
        kl_chosen = chosen_logratio.mean().clamp(min=0).detach()
        kl_rejected = rejected_logratio.mean().clamp(min=0).detach()
        chosen_value = torch.sigmoid(beta * (chosen_logratio - kl_rejected))
        rejected_value = torch.sigmoid(beta * (kl_chosen - rejected_logratio))
        losses = (2 - chosen_value - rejected_value) / 2
    else:  # 'orpo': the cross-entropy of the chosen answer, and the log odds ratio of the two
        log_odds_ratio = (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))
        losses = -chosen - beta * F.logsigmoid(log_odds_ratio)
    return losses, beta * chosen_logratio.detach(), beta * rejected_logratio.detach()


def log1mexp(x):
    """log(1 - exp(x)) for x < 0, numerically stable (Mächler 2012)."""
    x = x.clamp(max=-1e-6)  # x = 0, probability 1, would give -inf
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


# ----------------------------------------------------------------------------------------------------------------------
# log-probabilities

def compute_logps(model, run, examples, block_size):
    """Log-probabilities of the answers of a batch of examples (ids, is_answer), summed over tokens: on the device."""
    idx, _, is_answer = pad_texts(examples, block_size)
    targets = np.full(idx.shape, -100)
    targets[:, :-1] = np.where(is_answer[:, 1:], idx[:, 1:], -100)  # the target of position t is token t + 1
    with run.autocast(idx.shape[1]):
        return -model(*run.to_device(idx, targets), reduction='none').sum(1)


@torch.no_grad()
def compute_all_logps(net, run, examples, block_size):
    """As `compute_logps`, of any number of examples, shared by the processes: float64 array (len(examples),)."""
    def work(part):
        logps = compute_logps(net, run, [examples[i] for i in part], block_size)
        return logps.cpu().double().numpy()[:, None]
    net.eval()
    logps = run.distributed_map(work, [len(ids) for ids, _ in examples])
    net.train()
    return logps[:, 0]


def reference_logps(model, net, reference, run, data, texts, block_size):
    """Log-probabilities of answers under the reference, texts being their indices in data: float64 (len(texts),)."""
    with run.swapped_weights(model, reference):
        return compute_all_logps(net, run, [data.example(text) for text in texts], block_size)


# ----------------------------------------------------------------------------------------------------------------------
# evaluation

def pair_metrics(logps, ref_logps, n_tokens):
    """Metrics of held-out pairs; logps under the policy, ref_logps and n_tokens: (2 n,), in the order of data.texts."""
    chosen, rejected = torch.from_numpy(logps).chunk(2)
    ref_chosen, ref_rejected = torch.from_numpy(ref_logps).chunk(2)
    n_chosen, n_rejected = torch.from_numpy(n_tokens).chunk(2)
    losses, chosen_rewards, rejected_rewards = preference_loss(
        chosen, rejected, ref_chosen, ref_rejected, n_chosen, n_rejected, loss_type, beta, label_smoothing,
        length_normalise, gamma)
    losses = losses - sft_coef * chosen / n_chosen
    margins = chosen_rewards - rejected_rewards
    hits = ((torch.sign(margins) + 1) / 2).tolist()  # a tie counts half
    low, high = interval(hits)  # 95 %
    return {'val/loss': losses.mean().item(), 'val/accuracy': float(np.mean(hits)), 'val/accuracy_low': low,
            'val/accuracy_high': high, 'val/margin': margins.mean().item(),
            'val/logp_chosen': float(chosen.numpy().mean()), 'val/logp_rejected': float(rejected.numpy().mean())}


def grade_answers(data, answers, scorer):
    """Grades of answers (Rollout) to the prompts of pairs -> (rows, grades of each: [{name: number}])."""
    rows = [data.rows_kept[i] for i in answers.rows]
    answer_grades = []
    for row, text in zip(rows, answers.texts, strict=True):
        answer_grades.append((quality(row, text) if 'answer' in row else {}) | grades(row, text))
    if scorer is not None:
        scores = scorer([(row['messages'][:-1], text) for row, text in zip(rows, answers.texts, strict=True)])
        for answer_grade, score in zip(answer_grades, scores, strict=True):
            answer_grade |= {'model': float(score), 'model_share': float(score > 0)}
    return rows, answer_grades


def evaluate(model, net, reference, ref_logps, data, run, scorer):
    """A policy on held-out pairs, and its answers to their prompts -> (metrics, summary, samples).

    model is sampled from, net (the model in DDP, FSDP or torch.compile) is called. reference: {name: tensor} of the
    trained parameters before training, see `Run.swapped_weights`; ref_logps: `reference_logps` of the pairs, (2 n,).
    """
    pairs = data.fixed(eval_rows)
    texts = data.texts(pairs)  # the chosen answers of all pairs, then the rejected ones: hence chunk(2) everywhere
    block_size = model.config.block_size
    logps = compute_all_logps(net, run, [data.example(text) for text in texts], block_size)
    metrics = pair_metrics(logps, ref_logps, data.targets_in[texts].astype(float))

    # answers: sampled ones estimate the KL divergence to the reference, greedy ones are graded
    force = forcing(data.tokenizer, tools)  # with tools, inserts the results of calls into the answers
    sampled = generate_rollouts(model, data, pairs, run, max_new_tokens, temperature=1.0, force=force)
    greedy = generate_rollouts(model, data, pairs, run, max_new_tokens, temperature=0, force=force)
    # log-ratios of the sampled answers, whose mean estimates the KL divergence
    kl = divergence(net, model, reference, run, sampled, block_size).sum(1)
    low, high = interval(kl.tolist())
    metrics |= {'kl': float(kl.mean()), 'kl_low': low, 'kl_high': high, 'response_len': float(greedy.lengths.mean())}
    rows, answer_grades = grade_answers(data, greedy, scorer)
    metrics |= outcomes(rows, answer_grades)
    means, ranges = summarise(answer_grades)
    if 'gold' in means:
        metrics['reward/gold_sampled'] = float(np.nanmean(gold_scores(data, sampled)))
    for name, mean in means.items():
        key = f'reward/{name}' if name in ('gold', 'model', 'model_share') else f'val/{name}'
        metrics |= {key: mean, f'{key}_low': ranges[name][0], f'{key}_high': ranges[name][1]}

    samples = list(map(format_answer, rows[:show_answers], greedy.texts, answer_grades))
    shown_means = {name: means[name] for name in means if name in ('gold', 'correct', 'f1', 'model_share')}
    summary = [f'val loss {metrics["val/loss"]:.4f}', f'accuracy {metrics["val/accuracy"]:.1%}',
               f'margin {metrics["val/margin"]:.2f}',
               f'log-probabilities {metrics["val/logp_chosen"]:.1f} and {metrics["val/logp_rejected"]:.1f}',
               f'KL {metrics["kl"]:.2f} ({metrics["kl_low"]:.2f} to {metrics["kl_high"]:.2f})\n'
               f'greedy answers: {format_metrics(shown_means, ranges)}']
    if scorer is not None:
        summary.append(f'reward {means["model"]:.2f}')
    if by_steps := accuracy_by(rows, answer_grades, 'steps'):
        summary[-1] += f'; correct by steps: {by_steps}'
    return metrics, ', '.join(summary), samples


# ----------------------------------------------------------------------------------------------------------------------

def main():
    # config files and --key=value set the knobs above, and the fields of GPTConfig and LoRAConfig: those are given
    config, given = runtime.configure(globals(), GPTConfig, LoRAConfig)
    runtime.check_ranges(config, RANGES)
    if label_smoothing and loss_type not in ('sigmoid', 'simpo'):
        raise UserError(f"label_smoothing={label_smoothing} needs loss_type='sigmoid' or 'simpo', not {loss_type!r}")
    run = runtime.Run(out_dir, device, dtype, seed, fsdp)
    run.check_accumulation(gradient_accumulation_steps)

    # model
    resume_from = run.find_checkpoint(init_from)
    start = load_to_train('dpo', base if init_from == 'auto' else init_from, resume_from, given, seed)
    model, tokenizer = start.model, start.tokenizer
    length = start.row_length(max_length)
    if max_new_tokens >= model.config.block_size:
        raise UserError(f'max_new_tokens={max_new_tokens} must be < block_size={model.config.block_size}, which needs '
                        'room for the prompt: lower it')
    scorer = load_scorer(reward_model, run) if reward_model else None
    if not is_file_of_rows(dataset):
        run.on_main(lambda: find_dataset(dataset))  # one process prepares it, the others wait
    if eval_only:
        initial = start.initial_weights()  # {} where no run of this stage has trained it: it is its own reference
        net = run.wrap(model, compile)
        data = prefs_of(dataset, eval_split, tokenizer, length, seed, strict, val_fraction, run.print0, tools)
        reference = {name: run.like(p, initial[name]) for name, p in model.named_parameters() if name in initial}
        pairs = data.fixed(eval_rows)
        ref_logps = reference_logps(model, net, reference, run, data, data.texts(pairs), model.config.block_size)
        _, summary, samples = evaluate(model, net, reference, ref_logps, data, run, scorer)
        run.print0(f'{init_from} on {len(pairs):,} pairs of {dataset}, {eval_split}: {summary}')
        run.print0('\n'.join(samples))
        return

    # data
    train_data, val_data = (prefs_of(dataset, split, tokenizer, length, seed, strict, val_fraction, run.print0, tools)
                            for split in ('train', 'val'))
    net = run.wrap(model, compile, activation_checkpointing)  # model in DDP, FSDP or torch.compile: call this one
    with runtime.user_errors():
        optimizers = make_optimizers(model.named_parameters(), optimizer, learning_rate, weight_decay, (beta1, beta2),
                                     embed_lr, muon_lr, muon_momentum)

    # the reference: the policy before its first step. Only the trained parameters are kept twice, with LoRA the small
    # matrices alone; for a forward pass of the reference they are swapped with the model's
    reference = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    ref_logps = torch.full((2 * train_data.n_rows,), math.nan, dtype=torch.float64)  # of all texts; nan: not computed
    ref_texts = train_data.fingerprint()

    # resume
    step, pairs_seen, clock = 0, 0, runtime.Clock()
    if resume_from:
        checkpoint = start.checkpoint
        run.resume(checkpoint, start.origin, optimizers, config)
        step, pairs_seen, clock = checkpoint['iter'], checkpoint['pairs'], runtime.Clock(checkpoint['seconds'])
        for name, tensor in reference.items():
            tensor.copy_(run.like(tensor, checkpoint['reference'][name]))
        if checkpoint['ref_texts'] == ref_texts:  # else the data have changed, and all are computed again
            ref_logps = checkpoint['ref_logps']
        checkpoint = start.checkpoint = None  # frees its memory
    last_eval = step if resume_from else -1  # a resumed run does not repeat the evaluation of its checkpoint

    micro_steps = gradient_accumulation_steps // run.world_size  # micro-batches of this process
    pairs_per_step = gradient_accumulation_steps * batch_size
    run.open(config, step if resume_from else None, tensorboard_log, wandb_log, wandb_project, wandb_run_name)
    run.catch_signals()
    epochs = max_iters * pairs_per_step / train_data.n_rows
    run.announce(
        f'{dataset}: {train_data.n_rows:,} pairs to train on, {val_data.n_rows:,} held out ({tokenizer.name})\n'
        f'{start.summary()}; on {run.world_size} x {run.device}, {run.dtype}\n'
        f'{max_iters:,} steps of {pairs_per_step} pairs: {epochs:.2f} epochs')

    # the reference never changes: its log-probabilities are computed once, for the held-out pairs and for all pairs
    # that this run trains on; for 'simpo' and 'orpo' the latter stay nan and are not read
    val_texts = val_data.texts(val_data.fixed(eval_rows))
    val_ref_logps = reference_logps(model, net, reference, run, val_data, val_texts, model.config.block_size)
    clock.start()
    texts = train_data.texts(np.unique(train_data.rows(0, max_iters * pairs_per_step)))
    texts = texts[torch.isnan(ref_logps[texts]).numpy()]
    if len(texts) and loss_type not in REFERENCE_FREE:
        ref_logps[texts] = torch.from_numpy(reference_logps(model, net, reference, run, train_data, texts, length))
        run.print0(f'log-probabilities of {len(texts):,} answers under the reference, {clock.read():.1f} s')

    if run.ddp:
        # DDP fixes the order in which it sums gradients at its first backward pass: one that is discarded makes that
        # order the same for a new and a resumed run
        first = pairs_seen + run.rank * batch_size
        run.seed_dropout(first)
        examples = [train_data.example(text) for text in train_data.texts(train_data.rows(first, batch_size))]
        run.warm_up_ddp(net, compute_logps(net, run, examples, length).mean())
    # speed and means of metrics, from one row of the log to the next
    meter = runtime.Meter(run, clock, max_iters, model.flops_per_token(length))
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
        lr_scale = lr_factor(step, lr_schedule, warmup_iters, lr_decay_iters or max_iters, min_lr / learning_rate,
                             decay_frac)
        for group in optimizers.param_groups:  # the embedding and Muon have peaks of their own
            group['lr'] = group.setdefault('initial_lr', group['lr']) * lr_scale

        # forward and backward, over this process's micro-batches
        step_loss = 0.0
        for number in run.micro_batches(net, gradient_accumulation_steps):
            first = pairs_seen + number * batch_size  # a function of the step alone: a resumed run repeats no pair
            texts = train_data.texts(train_data.rows(first, batch_size))
            examples = [train_data.example(text) for text in texts]
            run.seed_dropout(first)  # a function of the seed and the position in the data, not of what ran before
            # one forward pass for both answers, all chosen ones and then all rejected ones: half the calls, and one
            # backward pass per micro-batch, as DDP needs
            chosen, rejected = compute_logps(net, run, examples, length).chunk(2)
            n_chosen, n_rejected = run.to_device(train_data.targets_in[texts].astype(np.float32))[0].chunk(2)
            ref_chosen, ref_rejected = run.to_device(ref_logps[texts].float().numpy())[0].chunk(2)
            losses, chosen_rewards, rejected_rewards = preference_loss(
                chosen, rejected, ref_chosen, ref_rejected, n_chosen, n_rejected, loss_type, beta, label_smoothing,
                length_normalise, gamma)
            # the SFT term: the margin can grow while both answers become less likely; this keeps the chosen one likely
            # (arXiv:2404.19733)
            loss = (losses - sft_coef * chosen / n_chosen).mean()
            # the routers of a mixture of experts have a loss of their own, which balances their load
            run.backward((loss + model.router_loss()) / micro_steps)
            step_loss += loss.detach() / micro_steps
            margins = chosen_rewards - rejected_rewards
            meter.add(sum(len(ids) for ids, _ in examples),
                      **{'train/accuracy': (torch.sign(margins).mean() + 1) / 2, 'train/margin': margins.mean(),
                         'train/logp_chosen': chosen.detach().mean(), 'train/logp_rejected': rejected.detach().mean()})

        # clip and update; a gradient that is not finite skips the update, which the device decides: the host need not
        # wait (float16: clip_grad_norm unscales the gradients)
        grad_norm = run.clip_grad_norm(model, optimizers, grad_clip)
        run.skip_if_not_finite(optimizers, grad_norm)
        optimizers.step()
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
