"""
Supervised fine-tuning: a pretrained model learns to answer chats; only the assistant's tokens are trained on.

    python sft.py config/sft_tiny.py                             word problems, from the model of config/tiny.py
    python sft.py config/sft_smollm2.py --dataset=data/mine      SmolLM2-135M learns your chats with LoRA
    python sft.py config/sft_smollm2.py --quant=nf4              the same with its own weights in 4 bits: QLoRA
    python sft.py config/sft_tiny.py --dataset=wordproblems_tools --tools=True --max_new_tokens=192 \\
        --out_dir=out/sft_tools                                  the same, with a calculator
    python sft.py --init_from=out/sft --dataset=wordproblems --eval_only=True --eval_split=test --eval_samples=4
    torchrun --standalone --nproc_per_node=2 sft.py config/sft_tiny.py --gradient_accumulation_steps=2

Without lora_rank or adapter_dim all weights are trained. With them only LoRA or adapter weights are trained and saved;
they are loaded on top of the base model.

Papers: InstructGPT (arXiv:2203.02155), LoRA (arXiv:2106.09685), QLoRA (arXiv:2305.14314), adapters (arXiv:1902.00751),
competence-based curricula (arXiv:1903.09848), pass@k (arXiv:2107.03374), maj@k (arXiv:2203.11171), the best of k by a
reward model (arXiv:2009.01325), a calculator (arXiv:2110.14168).
"""
import json
import math
from typing import NamedTuple

import runtime  # before torch: it sets an OpenMP variable that torch reads when it is imported

import numpy as np
import torch

from dataset import ChatData, find_dataset, load_chats, real_tokens
from grade import accuracy_by, as_metrics, at_k_lines, format_answer, format_metrics, grades, outcomes, summarise
from load import load_to_train
from lora import LoRAConfig
from model import GPTConfig
from optim import lr_factor, make_optimizers
from rollout import forces, forcing, generate_answers, load_scorer
from rows import is_file_of_rows
from tokenizer import UserError

# where and what
out_dir = 'out/sft'  # directory of the run: checkpoints, metrics, samples
init_from = 'out/tiny'  # model to start from, as in sample.py; 'resume'; 'auto:MODEL': resume if out_dir has a run
dataset = 'wordproblems'  # folder in data/ (prepared if it is not yet), path of a folder or of a file of rows
val_fraction = 0.1  # fraction of the prompts that is held out when dataset is a single file
seed = 1337  # of the order of the data, dropout, new weights and samples
# rows
max_length = 0  # maximum tokens per row; 0 = the model's block_size
too_long = 'drop'  # rows longer than max_length: 'drop', or truncate on the 'left' or 'right'
strict = True  # stop at a malformed row; False: skip and count it
train_on_prompt = False  # also train on the user's tokens
mask_history = False  # train on the last answer of each row only
chat_template = ''  # 'chatml', 'hermes' (has tools), 'gemma', 'alpaca' (plain) or FILE.jinja; '' = the model's, chatml
pack = True  # concatenate conversations up to max_length, attention masked between them; False: one per row, padded
curriculum = 'none'  # order by difficulty, easy first: 'length', 'steps', or 'loss' under the initial model
curriculum_iters = 0  # steps until all rows are in use; 0 = half of max_iters
curriculum_start = 0.2  # fraction of the rows, the easiest, in use at the first step
# batches
batch_size = 8  # rows (packed: of max_length) per micro-batch
gradient_accumulation_steps = 1  # micro-batches per step, over all processes together
max_iters = 500  # steps
# optimizer
optimizer = 'adamw'  # 'adamw', or 'muon' for the matrices of the blocks and AdamW for the rest
learning_rate = 3e-4  # peak learning rate of AdamW
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
eval_interval = 100  # steps between evaluations, each with answers and a checkpoint
eval_rows = 256  # held-out rows for the loss and for generated answers, always the same; 0 = all
eval_only = False  # evaluate init_from and exit, without training
eval_split = 'val'  # split that eval_only evaluates: 'val', 'test', 'train', or 'unseen' (see data/wordproblems)
eval_samples = 0  # eval_only: answers sampled per prompt, for pass@k and maj@k; 0 = one greedy answer
eval_temperature = 0.8  # eval_only: sampling temperature with eval_samples
reward_model = ''  # eval_only: directory of a reward.py run, for best@k with eval_samples
eval_file = ''  # eval_only: file to write every prompt, answer and grade to, as JSON lines
max_new_tokens = 128  # maximum length of an answer, in tokens
tools: bool | str = False  # True: the calculator answers <tool>…</tool>; FILE.py: functions to be called (tools.py)
max_tool_calls = 8  # rounds of calls of functions in an answer, after which its turn ends for good
max_think_tokens = 0  # close <think> after this many tokens; 0 = no limit
num_waits = 0  # the first so many times that an answer would close <think>, `wait` comes instead
wait = 'Wait'  # num_waits: what a thought goes on with
show_answers = 3  # answers printed at each evaluation
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
    'val_fraction': '> 0 and < 1', 'curriculum_start': '> 0 and <= 1', 'max_new_tokens': '>= 1',
    **dict.fromkeys(('max_length', 'curriculum_iters', 'eval_rows', 'eval_samples', 'eval_temperature',
                     'max_think_tokens', 'num_waits', 'max_tool_calls', 'show_answers'), '>= 0'),
    'too_long': ('drop', 'left', 'right'), 'curriculum': ('none', 'length', 'steps', 'loss'),
    'eval_split': ('val', 'test', 'unseen', 'train')}


def tensors_of(run, arrays):
    """NumPy arrays (idx, targets), for packed rows also (positions, segments) -> keyword arguments of the model.

    targets are -100 on what is not trained on: prompts and padding.
    """
    names = ('idx', 'targets', 'positions', 'segments')[:len(arrays)]
    return dict(zip(names, run.to_device(*arrays), strict=True))


@torch.no_grad()
def row_losses(model, data, rows, run):
    """The summed loss of each of these rows, in nats, and its number of targets: two float64 arrays (n,)."""
    def work(part):
        arrays = data.read(np.asarray(rows)[part])
        with run.autocast(arrays[0].shape[1]):
            losses = model(**tensors_of(run, arrays), reduction='none')
        return np.stack((losses.sum(1).cpu().double().numpy(), (arrays[1] != -100).sum(1)), 1)
    model.eval()
    nats, counts = run.distributed_map(work, data.lengths[rows]).T
    model.train()
    return nats, counts


class Evaluation(NamedTuple):
    loss: float  # nats per target
    rows: list  # held-out rows
    answers: list  # of each row: texts, num_samples or one
    transcripts: list  # the same with the turns of calls and their results before the last one
    grades: list  # of each row: {name: grade} of its first answer


def evaluate(net, model, data, run, n_rows, max_new_tokens, num_samples=0, temperature=0.0, force=None):
    """Loss on held-out rows, and answers to their prompts; num_samples=0: one greedy answer to each."""
    chosen = data.fixed(n_rows)
    rows = [data.rows_kept[i] for i in chosen]
    nats, counts = row_losses(net, data, chosen, run)
    ids = generate_answers(model, [data.prompt(i) for i in chosen], run, max_new_tokens, num_samples or 1,
                           temperature=temperature if num_samples else 0, stop_ids=data.tokenizer.turn_ids,
                           vocab_limit=data.tokenizer.n_vocab, force=forces(force, rows))
    answers, transcripts = ([[read(answer) for answer in samples] for samples in ids]
                            for read in (data.text, data.transcript))
    first_grades = [grades(row, texts[0]) for row, texts in zip(rows, answers, strict=True)]
    return Evaluation(float(nats.sum() / counts.sum()), rows, answers, transcripts, first_grades)


def load_chat_data(run, dataset, split, strict, val_fraction, force, *args, **options):
    """Loads a split of a dataset as ChatData, made with args; prints how many rows were dropped and why."""
    rows, skipped = load_chats(dataset, split, strict, val_fraction)
    data = ChatData(force.tools.rows(rows) if force else rows, *args, strict=strict, **options)
    if lost := data.left_out(skipped):
        run.print0(f'{dataset}, {split}: {lost}')
    return data


def difficulty_of(curriculum, net, data, run):
    """Difficulty of each row: its 'length', its 'steps', or its 'loss' under the current model -> float64 (n_rows,).

    A tensor, because it is saved in the checkpoint.
    """
    if curriculum == 'length':
        return torch.from_numpy(data.lengths.astype(float))
    if curriculum == 'steps':
        missing = next((row['where'] for row in data.rows_kept if 'steps' not in row), None)
        if missing:
            raise UserError(f"{missing}: curriculum='steps' needs a number of 'steps' in every row")
        return torch.tensor([float(row['steps']) for row in data.rows_kept])
    nats, counts = row_losses(net, data, np.arange(data.n_rows), run)
    return torch.from_numpy(nats / counts)


def evaluate_only(model, net, data, run, scorer, force):
    """Evaluates without training: prints metrics and answers, and writes eval_file."""
    loss, rows, answers, transcripts, first_grades = evaluate(net, model, data, run, eval_rows, max_new_tokens,
                                                              eval_samples, eval_temperature, force)
    means, ranges = summarise(first_grades)
    run.print0(f'{init_from} on {len(rows):,} rows of {dataset}, {eval_split}: loss {loss:.4f}, '
               + format_metrics(means, ranges))
    for key in ('steps', 'kind'):
        if accuracies := accuracy_by(rows, first_grades, key):
            run.print0(f'correct by {key}: {accuracies}')
    if eval_samples and 'correct' in means:
        for line in at_k_lines(rows, answers, scorer, eval_samples):
            run.print0(line)
    for row, texts, grade in list(zip(rows, transcripts, first_grades, strict=True))[:show_answers]:
        run.print0(format_answer(row, texts[0], grade))
    if eval_file and run.main:
        lines = [json.dumps({key: row[key] for key in row if key != 'where'} | {'text': text, **grades(row, text)}
                            | ({} if whole == text else {'transcript': whole}), ensure_ascii=False)
                 for row, texts, wholes in zip(rows, answers, transcripts, strict=True)
                 for text, whole in zip(texts, wholes, strict=True)]
        runtime.write_atomic(eval_file, lambda file: file.write('\n'.join([*lines, '']).encode()))


def main():
    # config files and --key=value set the knobs above, and the fields of GPTConfig and LoRAConfig: those are given
    config, given = runtime.configure(globals(), GPTConfig, LoRAConfig)
    runtime.check_ranges(config, RANGES)
    if reward_model and not (eval_only and eval_samples):
        raise UserError(f'reward_model={reward_model!r} chooses among answers: add --eval_only=True --eval_samples=K')
    run = runtime.Run(out_dir, device, dtype, seed, fsdp)
    run.check_accumulation(gradient_accumulation_steps)

    # model: start also has where it is from and, if the run is resumed, the rest of its checkpoint
    resume_from = run.find_checkpoint(init_from, writes=not eval_only)
    start = load_to_train('sft', init_from.removeprefix('auto:'), resume_from, given, seed,
                          chat_template=chat_template)
    model, tokenizer = start.model, start.tokenizer
    length = start.row_length(max_length)
    force = forcing(tokenizer, tools, max_think_tokens, max_tool_calls, num_waits, wait)  # inserts results, </think> …
    if not is_file_of_rows(dataset):
        run.on_main(lambda: find_dataset(dataset))  # one process prepares it, the others wait
    if eval_only:
        scorer = load_scorer(reward_model, run, tokenizer) if reward_model else None
        data = load_chat_data(run, dataset, eval_split, strict, val_fraction, force, tokenizer, length, seed, too_long,
                              train_on_prompt, mask_history=mask_history, calls=tools)
        return evaluate_only(model, run.wrap(model, compile), data, run, scorer, force)

    # data: training rows may be packed; held-out rows are not, so that each has a loss of its own
    train_data, val_data = (load_chat_data(run, dataset, split, strict, val_fraction, force, tokenizer, length, seed,
                                           too_long, train_on_prompt, pack and split == 'train', mask_history, tools)
                            for split in ('train', 'val'))
    net = run.wrap(model, compile, activation_checkpointing)  # model in DDP, FSDP or torch.compile: call this one
    with runtime.user_errors():
        optimizers = make_optimizers(model.named_parameters(), optimizer, learning_rate, weight_decay, (beta1, beta2),
                                     embed_lr, muon_lr, muon_momentum, lora_lr_ratio)

    # resume
    step, items_seen, difficulty, clock = 0, 0, None, runtime.Clock()
    if resume_from:
        run.resume(start.checkpoint, start.origin, optimizers, config)
        step, items_seen = start.checkpoint['iter'], start.checkpoint['rows']
        difficulty, clock = start.checkpoint['difficulty'], runtime.Clock(start.checkpoint['seconds'])
        start.checkpoint = None  # frees its memory
    last_eval = step if resume_from else -1  # a resumed run does not repeat the evaluation of its checkpoint

    # the order of the rows; an item of a batch is a row, or when packed a row of max_length with several rows in it
    items_per_step = gradient_accumulation_steps * batch_size
    rows_per_item = length / train_data.lengths.mean() if pack else 1
    if curriculum != 'none':
        if difficulty is None:
            difficulty = difficulty_of(curriculum, net, train_data, run)
        paced_items = (curriculum_iters or max_iters // 2) * items_per_step
        train_data.set_curriculum(difficulty.numpy(), int(paced_items * rows_per_item), curriculum_start)

    micro_steps = gradient_accumulation_steps // run.world_size  # micro-batches of this process
    run.open(config, step if resume_from else None, tensorboard_log, wandb_log, wandb_project, wandb_run_name)
    run.catch_signals()
    epochs = max_iters * items_per_step * rows_per_item / train_data.n_rows
    packed = f' of {length} tokens, packed' if pack else ''
    run.announce(
        f'{dataset}: {train_data.n_rows:,} training rows, {val_data.n_rows:,} held out ({tokenizer.name})\n'
        f'{start.summary()}; on {run.world_size} x {run.device}, {run.dtype}\n'
        f'{max_iters:,} steps of {items_per_step} rows{packed}: {epochs:.2f} epochs')

    # DDP fixes the order in which it sums gradients in its first backward pass. One whose gradients are dropped makes
    # that order the same in a resumed run as in one that was never stopped
    if run.ddp:
        first = items_seen + run.rank * batch_size
        run.seed_dropout(first)
        with run.autocast(length):
            run.warm_up_ddp(net, net(**tensors_of(run, train_data.batch(first, batch_size))))
    meter = runtime.Meter(run, clock, max_iters, model.flops_per_token(length))
    clock.start()
    meter.reset(step)
    while True:
        evaluating = step > last_eval and (step % eval_interval == 0 or step == max_iters)
        score = math.inf  # lower is better; without an evaluation it is never the best
        if evaluating:
            clock.stop()
            score, rows, _, transcripts, first_grades = evaluate(net, model, val_data, run, eval_rows, max_new_tokens,
                                                                 force=force)
            means, ranges = summarise(first_grades)
            run.log({'iter': step, 'val/loss': score, 'val/ppl': math.exp(min(score, 99)), 'seconds': clock.read()}
                    | as_metrics(means, ranges) | outcomes(rows, first_grades))
            run.print0(f'step {step}: val loss {score:.4f}, {format_metrics(means, ranges)}, {clock.read():.1f} s of '
                       'training')
            if accuracies := accuracy_by(rows, first_grades, 'steps'):
                run.print0(f'correct by steps: {accuracies}')
            first_answers = [texts[0] for texts in transcripts]
            run.sample(step, '\n'.join(map(format_answer, rows[:show_answers], first_answers, first_grades)))
            last_eval = step
        stop = run.stop_signal()
        if evaluating or (stop and step > last_eval):
            clock.stop()
            run.save_checkpoint(start.model_state() | {'iter': step, 'rows': items_seen, 'seconds': clock.read(),
                                                       'difficulty': difficulty}, optimizers, score, keep_checkpoints)
            clock.start()
            meter.reset(step)
        if stop or step >= max_iters:
            break

        # the learning rate of this step
        lr_scale = lr_factor(step, lr_schedule, warmup_iters, lr_decay_iters or max_iters, min_lr / learning_rate,
                             decay_frac)
        for group in optimizers.param_groups:  # the embedding and Muon have peaks of their own
            group['lr'] = group.setdefault('initial_lr', group['lr']) * lr_scale

        # forward and backward, over this process's micro-batches; number counts those of all processes
        step_loss = 0.0
        n_targets = train_data.n_targets(items_seen, items_per_step)
        for number in run.micro_batches(net, gradient_accumulation_steps):
            first = items_seen + number * batch_size  # a function of the step: a resumed run takes the next rows
            arrays = train_data.batch(first, batch_size)
            run.seed_dropout(first)  # a function of the seed and the place in the data, not of what ran before
            with run.autocast(arrays[0].shape[1]):
                loss = net(**tensors_of(run, arrays))
            # answers differ in length: weighted by this micro-batch's part of the step's targets, so that the step's
            # loss is the mean over all of them; divided by micro_steps, because DDP and FSDP average over processes
            weight = train_data.n_targets(first, batch_size) / (n_targets / gradient_accumulation_steps)
            step_loss += loss.detach() * weight / micro_steps
            loss = loss + model.router_loss()  # a mixture of experts: what balances their load; not in the logged loss
            run.backward(loss * weight / micro_steps)
            meter.add(tokens=real_tokens(arrays[1], *arrays[3:]))

        # clip and update; a gradient that is not finite skips the update, which the device decides: the host need not
        # wait (float16: clip_grad_norm unscales the gradients)
        grad_norm = run.clip_grad_norm(model, optimizers, grad_clip)
        run.skip_if_not_finite(optimizers, grad_norm)
        optimizers.step()
        optimizers.zero_grad()
        if model.sparse and not start.frozen:  # as in pretraining: a bias for experts with too little load
            model.balance(run.all_reduce(model.routed())[:, :-1])
        step += 1
        items_seen += items_per_step

        if step % max_bad_steps == 0 or step % log_interval == 0:  # not at every step: the host waits for the device
            run.check_skipped(step, max_bad_steps)
        if step % log_interval == 0 or step == max_iters:
            meter.log(step, step_loss, grad_norm, learning_rate * lr_scale)

    run.finish(step, stop, parameters=model.num_params(), trainable=model.num_params(learning=True))
    run.print0(f'done: best validation loss {run.best:.4f}; talk to it: '
               f'python sample.py --init_from={out_dir} --chat=True{f" --tools={tools}" if tools else ""}')


if __name__ == '__main__':
    runtime.cli(main)
