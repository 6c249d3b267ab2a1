"""
Supervised fine-tuning: a model that continues text learns to answer, from chats in which only the answers count.

    python sft.py config/sft_tiny.py                             word problems, from the model of config/tiny.py
    python sft.py config/sft_smollm2.py --dataset=data/mine      SmolLM2-135M learns your chats with LoRA
    python sft.py config/sft_smollm2.py --quant=nf4              the same with its own weights in 4 bits: QLoRA
    python sft.py config/sft_tiny.py --dataset=wordproblems_tools --tools=True --max_new_tokens=192 \\
        --out_dir=out/sft_tools                                  the same, with a calculator
    python sft.py --init_from=out/sft --dataset=wordproblems --eval_only=True --eval_split=test --eval_samples=4
    torchrun --standalone --nproc_per_node=2 sft.py config/sft_tiny.py --gradient_accumulation_steps=2

Without lora_rank or adapter_dim all weights learn; with them those small ones alone do and are saved, to be loaded over
the model that they belong to.

Papers: InstructGPT (arXiv:2203.02155), LoRA (arXiv:2106.09685), QLoRA (arXiv:2305.14314), adapters (arXiv:1902.00751),
competence-based curricula (arXiv:1903.09848), pass@k (arXiv:2107.03374), maj@k (arXiv:2203.11171), the best of k by a
reward model (arXiv:2009.01325), a calculator (arXiv:2110.14168).
"""
import json
import math
from pathlib import Path

import runtime

import numpy as np
import torch

from convert import load_to_train
from dataset import (
    ChatData,
    as_metrics,
    best_at_k,
    by_value,
    find_dataset,
    grades,
    in_words,
    interval,
    load_chats,
    maj_at_k,
    pass_at_k,
    real_tokens,
    shown,
    summarise,
    vote_of,
)
from model import GPTConfig
from rollout import forcing, generate_answers, load_scorer
from tokenizer import UserError

# where and what
out_dir = 'out/sft'  # directory of the run: checkpoints, metrics, samples
init_from = 'out/tiny'  # the model to start from: sample.py's; or 'resume', or 'auto' (resume where there is a run)
base = 'out/tiny'  # the model that 'auto' starts from where there is no run yet
dataset = 'wordproblems'  # folder in data/ (prepared if it is not yet), a path to one, or a .json or .jsonl file
val_fraction = 0.1  # of a single file: the share of its prompts that is held out
seed = 1337  # decides the order of the data, dropout, fresh small weights and samples
# rows
max_length = 0  # tokens of the longest row; 0 = the model's block_size
too_long = 'drop'  # rows that are longer: 'drop' them, or cut tokens at their 'left' or 'right' end
strict = True  # a malformed row ends the run; False: it is left out and counted
train_on_prompt = False  # learn what the user says, too
pack = True  # several conversations in a row of max_length, none of which sees another; False: a row each, padded
curriculum = 'none'  # easy rows first, by their 'length', 'steps', or the 'loss' of the model that training starts from
curriculum_iters = 0  # the steps over which the harder rows come in; 0 = half of max_iters
curriculum_start = 0.2  # the share of rows, the easiest, that it begins with
# batches
batch_size = 8  # rows (packed: of max_length) per micro-batch
gradient_accumulation_steps = 1  # micro-batches per step, over all processes together
max_iters = 500  # steps
# optimizer
optimizer = 'adamw'  # 'adamw', or 'muon' for the matrices of the blocks and AdamW for the rest
learning_rate = 3e-4  # peak of AdamW's
embed_lr = 0.0  # peak for the token embedding; 0 = learning_rate
muon_lr = 0.02  # peak of Muon's
muon_momentum = 0.95  # Nesterov momentum of Muon
weight_decay = 0.0  # on matrices only
beta1 = 0.9  # AdamW's decay of the mean
beta2 = 0.99  # AdamW's decay of the variance
grad_clip = 1.0  # largest norm of the gradient; 0 = off
# schedule
lr_schedule = 'cosine'  # after the warmup: 'cosine', 'linear', 'wsd' (constant, then linear) or 'constant'
warmup_iters = 20  # steps of linear warmup
lr_decay_iters = 0  # the step at which the rate reaches min_lr; 0 = max_iters
min_lr = 0.0  # final learning rate, in proportion for every group
decay_frac = 0.5  # 'wsd': the last part of lr_decay_iters that decays
# evaluation and logging
eval_interval = 100  # steps between evaluations, each with answers and a checkpoint
eval_rows = 256  # held-out rows whose loss is taken, and whose prompts are answered, the same every time; 0 = all
eval_only = False  # measure init_from and train nothing
eval_split = 'val'  # what eval_only measures: 'val', 'test' or 'train'
eval_samples = 0  # of eval_only: k answers per prompt at eval_temperature, for pass@k and maj@k; 0 = one, greedy
eval_temperature = 0.8  # of those
reward_model = ''  # of eval_samples: a run of reward.py, for best@k
eval_file = ''  # of eval_only: a file for every prompt, answer and grade, as JSON lines
max_new_tokens = 128  # longest answer
tools = False  # in answers, the calculator answers <tool>…</tool>
max_think_tokens = 0  # in answers, tokens after which <think> is closed; 0 = whenever it likes
show_answers = 3  # answers shown at an evaluation
log_interval = 10  # steps between lines of progress
keep_checkpoints = 2  # ckpt.pt and the versions before it: ckpt.1.pt …
max_bad_steps = 10  # give up after so many updates in a row with a loss or gradient that is not finite
tensorboard_log = False  # write out_dir/tensorboard
wandb_log = False  # report to Weights & Biases
wandb_project = 'flatgpt'  # its project
wandb_run_name = 'sft'  # its name for this run
# machine
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'; auto = the best there is
dtype = 'auto'  # 'float32', 'bfloat16' or 'float16'; auto = 16 bits where the device is faster so
compile = False  # torch.compile: slow to start, then faster
activation_checkpointing = False  # compute each block again in the backward pass: less memory, a third more time
fsdp = False  # under torchrun: shard parameters, gradients and moments over the processes instead of copying them


RANGES = runtime.RANGES | {
    'val_fraction': '> 0 and < 1', 'curriculum_start': '> 0 and <= 1', 'max_new_tokens': '>= 1',
    **dict.fromkeys(('max_length', 'curriculum_iters', 'eval_rows', 'eval_samples', 'eval_temperature',
                     'max_think_tokens', 'show_answers'), '>= 0'),
    'too_long': ('drop', 'left', 'right'), 'curriculum': ('none', 'length', 'steps', 'loss'),
    'eval_split': ('val', 'test', 'train')}


def tensors_of(run, arrays):
    """NumPy arrays (idx, targets), of packed rows also (positions, segments) -> {name: tensor on the device}.

    targets are -100 where nothing is learnt: in prompts and padding.
    """
    names = ('idx', 'targets', 'positions', 'segments')[:len(arrays)]
    return dict(zip(names, run.to_device(*arrays), strict=True))


@torch.no_grad()
def row_losses(model, data, rows, run):
    """The summed loss of each of these rows, in nats, and how many targets it has: two float64 arrays."""
    def work(part):
        arrays = data.read(np.asarray(rows)[part])
        with run.autocast(arrays[0].shape[1]):
            losses = model(**tensors_of(run, arrays), reduction='none')
        return np.stack((losses.sum(1).cpu().double().numpy(), (arrays[1] != -100).sum(1)), 1)
    model.eval()
    nats, counts = run.distributed_map(work, data.lengths[rows]).T
    model.train()
    return nats, counts


def evaluate(net, model, data, run, n_rows, max_new_tokens, num_samples=0, temperature=0.0, force=None):
    """Loss on held-out rows, and answers to their prompts -> (nats per target, rows, answers, grades of the first)."""
    chosen = data.fixed(n_rows)
    nats, counts = row_losses(net, data, chosen, run)
    ids = generate_answers(model, [data.prompt(i) for i in chosen], run, max_new_tokens, num_samples or 1,
                           temperature=temperature if num_samples else 0, stop_ids=data.tokenizer.turn_ids,
                           vocab_limit=data.tokenizer.n_vocab, force=force)
    rows = [data.rows_kept[i] for i in chosen]
    answers = [[data.text(answer) for answer in samples] for samples in ids]
    marks = [grades(row, texts[0]) for row, texts in zip(rows, answers, strict=True)]
    return float(nats.sum() / counts.sum()), rows, answers, marks


def load_chat_data(run, dataset, split, tokenizer, length, seed, too_long, train_on_prompt, pack, strict, val_fraction):
    """A split of a dataset as ChatData; says what was left out."""
    rows, skipped = load_chats(dataset, split, strict, val_fraction)
    data = ChatData(rows, tokenizer, length, seed, too_long, train_on_prompt, pack)
    if lost := data.left_out(skipped):
        run.print0(f'{dataset}, {split}: {lost}')
    return data


def difficulty_of(curriculum, net, data, run):
    """How hard each row is: its 'length', its 'steps', or its 'loss' under the model as it is -> float64 (n_rows,)."""
    if curriculum == 'length':
        return torch.from_numpy(data.lengths.astype(float))
    if curriculum == 'steps':
        missing = next((row['where'] for row in data.rows_kept if 'steps' not in row), None)
        if missing:
            raise UserError(f"{missing}: curriculum='steps' needs a number of 'steps' in every row")
        return torch.tensor([float(row['steps']) for row in data.rows_kept])
    nats, counts = row_losses(net, data, np.arange(data.n_rows), run)
    return torch.from_numpy(nats / counts)


def samples_at_k(rows, answers, scorer, num_samples):
    """What k of num_samples answers are worth, k = 1, 2, 4 …: pass@k, maj@k and, with a scorer, best@k, a line each."""
    graded = [(row, texts) for row, texts in zip(rows, answers, strict=True) if 'answer' in row]
    correct = [[int(grades(row, text)['correct']) for text in texts] for row, texts in graded]
    votes = [[vote_of(row, text) for text in texts] for row, texts in graded]
    scores = None
    if scorer:
        scores = scorer([(row['messages'][:-1], text) for row, texts in graded for text in texts])
        scores = scores.reshape(-1, num_samples).tolist()
    lines = []
    for k in [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k < num_samples] + [num_samples]:
        shares = {'pass': [pass_at_k(num_samples, sum(hits), k) for hits in correct],
                  'maj': [maj_at_k(vote, hits, k) for vote, hits in zip(votes, correct, strict=True)]}
        if scores:
            shares['best'] = [best_at_k(score, hits, k) for score, hits in zip(scores, correct, strict=True)]
        words = []
        for name, values in shares.items():
            low, high = interval(values)
            words.append(f'{name}@{k}: {sum(values) / len(values):.1%} ({low:.1%} to {high:.1%})')
        lines.append(', '.join(words))
    return lines


def evaluate_only(model, net, data, run, scorer, force):
    """What eval_only prints of a model and writes to eval_file."""
    loss, rows, answers, marks = evaluate(net, model, data, run, eval_rows, max_new_tokens, eval_samples,
                                          eval_temperature, force)
    means, ranges = summarise(marks)
    run.print0(f'{init_from} on {len(rows):,} rows of {dataset}, {eval_split}: loss {loss:.4f}, '
               + in_words(means, ranges))
    for key in ('steps', 'kind'):
        if words := by_value(rows, marks, key):
            run.print0(f'correct by {key}: {words}')
    if eval_samples and 'correct' in means:
        for line in samples_at_k(rows, answers, scorer, eval_samples):
            run.print0(line)
    for row, texts, mark in list(zip(rows, answers, marks, strict=True))[:show_answers]:
        run.print0(shown(row, texts[0], mark))
    if eval_file and run.main:
        lines = [json.dumps({key: row[key] for key in row if key != 'where'} | {'text': text, **grades(row, text)},
                            ensure_ascii=False)
                 for row, texts in zip(rows, answers, strict=True) for text in texts]
        runtime.write_atomic(eval_file, lambda file: file.write('\n'.join([*lines, '']).encode()))


def main():
    config, given = runtime.configure(globals(), GPTConfig)
    runtime.check_ranges(config, RANGES)
    if reward_model and not (eval_only and eval_samples):
        raise UserError(f'reward_model={reward_model!r} chooses among answers: add --eval_only=True --eval_samples=K')
    run = runtime.Run(out_dir, device, dtype, seed, fsdp)
    run.check_accumulation(gradient_accumulation_steps)

    # model
    resume_from = run.find_checkpoint(init_from)
    start = load_to_train('sft', base if init_from == 'auto' else init_from, resume_from, given, seed)
    model, tokenizer = start.model, start.tokenizer
    length = start.row_length(max_length)
    force = forcing(tokenizer, tools, max_think_tokens)
    if Path(dataset).suffix not in ('.json', '.jsonl'):
        run.on_main(lambda: find_dataset(dataset))  # one process prepares it, the others wait
    if eval_only:
        scorer = load_scorer(reward_model, run, tokenizer) if reward_model else None
        data = load_chat_data(run, dataset, eval_split, tokenizer, length, seed, too_long, train_on_prompt, False,
                              strict, val_fraction)
        return evaluate_only(model, run.wrap(model, compile), data, run, scorer, force)

    # data: training rows may be packed, held-out rows stand alone, each with its own loss
    train_data, val_data = (load_chat_data(run, dataset, split, tokenizer, length, seed, too_long, train_on_prompt,
                                           pack and split == 'train', strict, val_fraction)
                            for split in ('train', 'val'))
    net = run.wrap(model, compile, activation_checkpointing)  # model with DDP, FSDP or compiled code around it
    with runtime.user_errors():
        optimizers = model.configure_optimizers(optimizer, learning_rate, weight_decay, (beta1, beta2), embed_lr,
                                                muon_lr, muon_momentum)

    # where it goes on
    step, items_seen, difficulty, clock = 0, 0, None, runtime.Clock()
    if resume_from:
        run.resume(start.checkpoint, start.origin, optimizers, config)
        step, items_seen = start.checkpoint['iter'], start.checkpoint['rows']
        difficulty, clock = start.checkpoint['difficulty'], runtime.Clock(start.checkpoint['seconds'])
        start.checkpoint = None  # its memory is free for training
    evaluated = step if resume_from else -1  # the step after which it was evaluated last

    # the order of the rows; an item of a batch is a row, or when packed a row of max_length with several rows in it
    items_per_step = gradient_accumulation_steps * batch_size
    rows_per_item = length / train_data.lengths.mean() if pack else 1
    if curriculum != 'none':
        if difficulty is None:
            difficulty = difficulty_of(curriculum, net, train_data, run)
        paced_items = (curriculum_iters or max_iters // 2) * items_per_step
        train_data.set_curriculum(difficulty.numpy(), int(paced_items * rows_per_item), curriculum_start)

    micro_steps = gradient_accumulation_steps // run.world_size
    run.open(config, step if resume_from else None, tensorboard_log, wandb_log, wandb_project, wandb_run_name)
    run.catch_signals()
    epochs = max_iters * items_per_step * rows_per_item / train_data.n_rows
    packed = f' of {length} tokens, packed' if pack else ''
    run.print0(
        f'{dataset}: {train_data.n_rows:,} rows to train on, {val_data.n_rows:,} held out ({tokenizer.name})\n'
        f'{start.summary()}; on {run.world_size} x {run.device}, {run.dtype}\n'
        f'{max_iters:,} steps of {items_per_step} rows{packed}: {epochs:.2f} epochs')

    if run.ddp:
        first = items_seen + run.rank * batch_size
        run.seed_dropout(first)
        with run.autocast(length):
            run.warm_up_ddp(net, net(**tensors_of(run, train_data.batch(first, batch_size))))
    meter = runtime.Meter(run, clock, max_iters, model.flops_per_token(length))
    clock.resume()
    meter.restart(step)
    while True:
        evaluating = step > evaluated and (step % eval_interval == 0 or step == max_iters)
        score = math.inf
        if evaluating:
            clock.pause()
            score, rows, answers, marks = evaluate(net, model, val_data, run, eval_rows, max_new_tokens, force=force)
            means, ranges = summarise(marks)
            run.log({'iter': step, 'val/loss': score, 'val/ppl': math.exp(min(score, 99)), 'seconds': clock.read()}
                    | as_metrics(means, ranges))
            run.print0(f'step {step}: val loss {score:.4f}, {in_words(means, ranges)}, {clock.read():.1f} s of '
                       'training')
            if words := by_value(rows, marks, 'steps'):
                run.print0(f'correct by steps: {words}')
            first_answers = [texts[0] for texts in answers]
            run.sample(step, '\n'.join(map(shown, rows[:show_answers], first_answers, marks)))
            evaluated = step
        stop = run.stop_signal()
        if evaluating or stop and step > evaluated:
            clock.pause()
            run.save_checkpoint(start.model_state() | {'iter': step, 'rows': items_seen, 'seconds': clock.read(),
                                                       'difficulty': difficulty}, optimizers, score, keep_checkpoints)
            clock.resume()
            meter.restart(step)
        if stop or step >= max_iters:
            break

        # the learning rate of this step
        lr_scale = runtime.lr_factor(step, lr_schedule, warmup_iters, lr_decay_iters or max_iters,
                                     min_lr / learning_rate, decay_frac)
        for group in optimizers.param_groups:
            group['lr'] = group['peak_lr'] * lr_scale

        # forward and backward, over this process's micro-batches
        step_loss = 0.0
        n_targets = train_data.n_targets(items_seen, items_per_step)
        for number in run.micro_batches(net, gradient_accumulation_steps):
            first = items_seen + number * batch_size  # which rows depends on the step alone: a resumed run repeats none
            arrays = train_data.batch(first, batch_size)
            run.seed_dropout(first)
            with run.autocast(arrays[0].shape[1]):
                loss = net(**tensors_of(run, arrays))
            # answers differ in length: a micro-batch with more targets weighs more, so that the step's loss is the mean
            # over all its tokens, whatever micro-batches it is cut into
            loss = loss * (train_data.n_targets(first, batch_size) / (n_targets / gradient_accumulation_steps))
            loss = loss / micro_steps
            run.backward(loss)
            step_loss += loss.detach()
            meter.add(real_tokens(arrays[1], *arrays[3:]))

        # update; where the gradient is not finite it is skipped, which is decided on the device without waiting for it
        grad_norm = run.clip_grad_norm(model, optimizers, grad_clip)
        optimizers.step(skip=run.skips(grad_norm))
        optimizers.zero_grad()
        step += 1
        items_seen += items_per_step

        if step % max_bad_steps == 0 or step % log_interval == 0:
            run.check_skipped(step, max_bad_steps)
        if step % log_interval == 0 or step == max_iters:
            meter.log(step, step_loss, grad_norm, learning_rate * lr_scale)

    run.finish(step, stop, parameters=model.num_params(), trainable=model.num_params(learning=True))
    run.print0(f'done: best validation loss {run.best:.4f}; talk to it: '
               f'python sample.py --init_from={out_dir} --chat=True{" --tools=True" * tools}')


if __name__ == '__main__':
    runtime.cli(main)
