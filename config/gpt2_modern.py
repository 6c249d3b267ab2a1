"""The tokens and layers of config/gpt2.py with the recipe of config/tiny.py: rotary positions, QK-norm, SwiGLU, Muon.

    python data/fineweb/prepare.py --num_shards=103
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2_modern.py

The head is not tied to the embedding: 162 million parameters, but as many operations per token.
"""
out_dir = 'out/gpt2_modern'
dataset = 'fineweb'
batch_size = 64
gradient_accumulation_steps = 8
block_size = 1024

n_layer = 12
n_head = 6
n_embd = 768
vocab_size = 50304
pos = 'rope'
norm = 'rmsnorm'
qk_norm = True
mlp = 'swiglu'
bias = False
tie_weights = False
init_std = 0.0
zero_init = True

max_iters = 18865
optimizer = 'muon'
muon_lr = 0.02
learning_rate = 3e-3
embed_lr = 9e-3
weight_decay = 0.0
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0
lr_schedule = 'wsd'
warmup_iters = 250

eval_interval = 250
eval_iters = 20
compile = True
