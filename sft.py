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

from convert import start
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
from rollout import forcing, load_scorer
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
# looking at it
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


def loss_on(model, run, arrays, **options):
    """The model's loss on a batch of NumPy arrays: (idx, targets), of packed rows also (positions, segments)."""
    names = ('idx', 'targets', 'positions', 'segments')[:len(arrays)]
    with run.autocast(arrays[0].shape[1]):
        return model(**dict(zip(names, run.to_device(*arrays), strict=True)), **options)


@torch.no_grad()
def losses_of(model, data, rows, run):
    """The summed loss of each of these rows, in nats, and how many targets it has: two float64 arrays."""
    def work(part):
        arrays = data.read(np.asarray(rows)[part])
        losses = loss_on(model, run, arrays, reduction='none').sum(1).cpu().double().numpy()
        return np.stack((losses, (arrays[1] != -100).sum(1)), 1)
    model.eval()
    nats, counts = run.spread(data.lengths[rows], work).T
    model.train()
    return nats, counts


def examine(net, model, data, run, samples=0):
    """Loss on eval_rows of a split, and answers to them -> (nats per target, rows, answers, grades of the first)."""
    chosen = data.fixed(eval_rows)
    nats, counts = losses_of(net, data, chosen, run)
    rows, prompts = [data.rows_kept[i] for i in chosen], [data.prompt(i) for i in chosen]
    force = forcing(data.tokenizer, tools, max_think_tokens)
    ids = run.answers(model, prompts, max_new_tokens, temperature=eval_temperature if samples else 0,
                      stop_ids=data.tokenizer.turn_ids, num_samples=samples or 1, vocab_limit=data.tokenizer.n_vocab,
                      force=force)
    answers = [[data.text(answer) for answer in of] for of in ids]
    marks = [grades(row, texts[0]) for row, texts in zip(rows, answers, strict=True)]
    return float(nats.sum() / counts.sum()), rows, answers, marks


def rows_of(split, tokenizer, length, run, packed=False):
    """A split of the dataset as ChatData; tells what was left out."""
    rows, skipped = load_chats(dataset, split, strict, val_fraction)
    data = ChatData(rows, tokenizer, length, seed, too_long, train_on_prompt, packed)
    if lost := data.left_out(skipped):
        run.say(f'{dataset}, {split}: {lost}')
    return data


def evaluate_only(model, net, tokenizer, length, run):
    """What eval_only prints of a model and writes to eval_file."""
    scorer = load_scorer(reward_model, run, tokenizer) if reward_model else None
    data = rows_of(eval_split, tokenizer, length, run)
    loss, rows, answers, marks = examine(net, model, data, run, eval_samples)
    means, ranges = summarise(marks)
    run.say(f'{init_from} on {len(rows):,} rows of {dataset}, {eval_split}: loss {loss:.4f}, '
            + in_words(means, ranges))
    for key in ('steps', 'kind'):
        if words := by_value(rows, marks, key):
            run.say(f'correct by {key}: {words}')
    if eval_samples and 'correct' in means:
        graded = [(row, texts) for row, texts in zip(rows, answers, strict=True) if 'answer' in row]
        right = [[int(grades(row, text)['correct']) for text in texts] for row, texts in graded]
        votes = [[vote_of(row, text) for text in texts] for row, texts in graded]
        scores = None
        if scorer:
            scores = scorer([(row['messages'][:-1], text) for row, texts in graded for text in texts])
            scores = scores.reshape(-1, eval_samples).tolist()
        for k in [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k < eval_samples] + [eval_samples]:
            shares = {'pass': [pass_at_k(eval_samples, sum(hits), k) for hits in right],
                      'maj': [maj_at_k(of, hits, k) for of, hits in zip(votes, right, strict=True)]}
            if scores:
                shares['best'] = [best_at_k(of, hits, k) for of, hits in zip(scores, right, strict=True)]
            words = []
            for how, values in shares.items():
                low, high = interval(values)
                words.append(f'{how}@{k}: {sum(values) / len(values):.1%} ({low:.1%} to {high:.1%})')
            run.say(', '.join(words))
    for row, texts, mark in list(zip(rows, answers, marks, strict=True))[:show_answers]:
        run.say(shown(row, texts[0], mark))
    if eval_file and run.main:
        lines = [json.dumps({key: row[key] for key in row if key != 'where'} | {'text': text, **grades(row, text)},
                            ensure_ascii=False)
                 for row, texts in zip(rows, answers, strict=True) for text in texts]
        runtime.write_atomic(eval_file, lambda file: file.write('\n'.join([*lines, '']).encode()))


def main():
    config, given = runtime.configure(globals(), GPTConfig)
    runtime.check_loop(config)
    runtime.one_of(config, too_long=('drop', 'left', 'right'), curriculum=('none', 'length', 'steps', 'loss'),
                   eval_split=('val', 'test', 'train'))
    if not 0 < val_fraction < 1 or not 0 < curriculum_start <= 1:
        raise UserError('val_fraction and curriculum_start lie between 0 and 1')
    if max_new_tokens < 1:
        raise UserError(f'max_new_tokens={max_new_tokens}: it starts at 1')
    if reward_model and not (eval_only and eval_samples):
        raise UserError(f'reward_model={reward_model!r} chooses among answers: add --eval_only=True --eval_samples=K')
    run = runtime.Run(config)
    began = start(run, 'sft', base, given)
    model, tokenizer, origin = began.model, began.tokenizer, began.origin
    length = began.row_length(max_length)
    if Path(dataset).suffix not in ('.json', '.jsonl'):
        run.on_main(lambda: find_dataset(dataset))  # one process prepares it, the others wait
    trainable = model.num_params(learning=True)
    if eval_only:
        return evaluate_only(model, run.wrap(model), tokenizer, length, run)
    train_data, val_data = (rows_of(split, tokenizer, length, run, pack and split == 'train')
                            for split in ('train', 'val'))
    net = run.wrap(model)
    with runtime.user_errors():
        optimizers = model.configure_optimizers(optimizer, learning_rate, weight_decay, (beta1, beta2), embed_lr,
                                                muon_lr, muon_momentum)
    step, items_seen, clock, difficulty, resumed = 0, 0, runtime.Clock(), None, began.own is not None
    if resumed:
        run.restore(began.own, origin, optimizers)
        step, items_seen, clock = began.own['iter'], began.own['rows'], runtime.Clock(began.own['seconds'])
        difficulty, began.own = began.own['difficulty'], None

    # the order of the rows
    items_per_step = gradient_accumulation_steps * batch_size
    per_item = length / train_data.lengths.mean() if pack else 1  # rows
    if curriculum != 'none':
        if difficulty is None and curriculum == 'steps':
            missing = next((row['where'] for row in train_data.rows_kept if 'steps' not in row), None)
            if missing:
                raise UserError(f"{missing}: curriculum='steps' needs a number of 'steps' in every row")
            difficulty = torch.tensor([float(row['steps']) for row in train_data.rows_kept])
        elif difficulty is None and curriculum == 'loss':
            nats, counts = losses_of(net, train_data, np.arange(train_data.n_rows), run)
            difficulty = torch.from_numpy(nats / counts)
        elif difficulty is None:
            difficulty = torch.from_numpy(train_data.lengths.astype(float))
        paced = (curriculum_iters or max_iters // 2) * items_per_step
        train_data.pace(difficulty.numpy(), int(paced * per_item), curriculum_start)
    meter = runtime.Meter(run, clock, model.flops_per_token(length))

    def measure():
        """The loss on held-out rows of today's weights, and what their answers are worth."""
        loss, rows, answers, marks = examine(net, model, val_data, run)
        means, ranges = summarise(marks)
        metrics = {'iter': step, 'val/loss': loss, 'val/ppl': math.exp(min(loss, 99)), 'seconds': clock.read()}
        metrics |= as_metrics(means, ranges)
        words = [f'step {step}: val loss {loss:.4f}, {in_words(means, ranges)}, {clock.read():.1f} s of training']
        words += [f'correct by steps: {by}' for by in [by_value(rows, marks, 'steps')] if by]
        samples = [shown(*of) for of in zip(rows[:show_answers], [texts[0] for texts in answers], marks, strict=False)]
        return metrics, '\n'.join(words), samples

    clock.pause()
    measured = None if resumed else measure()  # before anything is written: what is wrong with the data shows here
    run.open(step if resumed else None)
    run.catch_signals()
    epochs = max_iters * items_per_step * per_item / train_data.n_rows
    packed = f' of {length} tokens, packed' if pack else ''
    run.say(f'{dataset}: {train_data.n_rows:,} rows to train on, {val_data.n_rows:,} held out ({tokenizer.name})\n'
            f'{began.words()}; on {run.world_size} x {run.device}, {run.dtype}\n'
            f'{max_iters:,} steps of {items_per_step} rows{packed}: {epochs:.2f} epochs')

    def look(metrics, words, samples):
        """Logs what was measured after `step` steps, shows answers and saves the state."""
        run.log(metrics)
        run.say(words)
        run.sample(step, '\n'.join(samples))
        save(metrics['val/loss'])

    def save(val_loss=math.inf):
        run.checkpoint(began.state() | {'iter': step, 'rows': items_seen, 'seconds': clock.read(),
                                        'difficulty': difficulty}, optimizers, val_loss)

    def micro_loss(number):
        """Of the step's micro-batches, of all processes, that of this number: its mean loss, weighted so that the mean
        over the step is that over its targets."""
        first = items_seen + number * batch_size
        arrays = train_data.batch(first, batch_size)
        meter.add(real_tokens(arrays[1], *arrays[3:]))
        of_step = train_data.n_targets(items_seen, items_per_step) / gradient_accumulation_steps
        run.seed(first)
        return loss_on(net, run, arrays) * (train_data.n_targets(first, batch_size) / of_step)

    if not resumed:
        look(*measured)
    run.settle(net, lambda: micro_loss(run.rank))
    clock.resume()
    meter.begin(step)
    looked, stop = step, 0
    while step < max_iters and not (stop := run.stopping()):
        total, grad_norm = run.step(net, model, optimizers, micro_loss, step)
        step, items_seen = step + 1, items_seen + items_per_step
        if step % max_bad_steps == 0:
            run.check_updates(step)

        if step % log_interval == 0 or step == max_iters:
            meter.report(step, total, grad_norm)
        if step % eval_interval == 0 or step == max_iters:
            clock.pause()
            look(*measure())
            clock.resume()
            looked = step
            meter.begin(step)

    if stop and looked != step:
        clock.pause()
        save()
    run.finish(step, stop, parameters=model.num_params(), trainable=trainable)
    run.say(f'done: best validation loss {run.best:.4f}; talk to it: '
            f'python sample.py --init_from={out_dir} --chat=True{" --tools=True" * tools}')


if __name__ == '__main__':
    runtime.cli(main)
