"""GPT-2 124M on 10 billion tokens of FineWeb, with the hyper-parameters of its public reproduction.

They are those of llm.c, scripts/run_gpt2_124M.sh.

    python data/fineweb/prepare.py --num_shards=103
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py

524,288 tokens a step over all GPUs: 64 windows x 8 micro-batches. With less memory than 80 GB per GPU halve batch_size
and double gradient_accumulation_steps; with fewer GPUs change nothing.
"""
out_dir = 'out/gpt2'
dataset = 'fineweb'
batch_size = 64
gradient_accumulation_steps = 8
block_size = 1024

n_layer = 12
n_head = 12
n_embd = 768
vocab_size = 50304
mlp = 'gelu_tanh'

max_iters = 18865
learning_rate = 6e-4
min_lr = 0.0
warmup_iters = 700
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

eval_interval = 250
eval_iters = 20
compile = True
