"""A student of 30 M parameters learns a quarter of tinyshakespeare from SmolLM2-135M, which reads it once.

    python convert.py smollm2 out/smollm2 && python convert.py out/smollm2 out/smollm2_hf
    python data/text/prepare.py --input=input.txt --name=quarter --tokenizer=out/smollm2_hf --val_fraction=0.75
"""
out_dir = 'out/distill_smollm2'
teacher = 'smollm2'
dataset = 'quarter'
batch_size = 8
block_size = 256
alpha = 0.9
top_k = 64
cache = 'out/cache_smollm2'

n_layer = 6
n_head = 6
n_embd = 384
pos = 'rope'
norm = 'rmsnorm'
qk_norm = True
mlp = 'swiglu'
bias = False
tie_weights = True
init_std = 0.02
zero_init = True

max_iters = 138
optimizer = 'muon'
muon_lr = 0.02
learning_rate = 3e-3
weight_decay = 0.0
beta1 = 0.9
beta2 = 0.99
grad_clip = 1.0
lr_schedule = 'wsd'
warmup_iters = 20

eval_interval = 23
eval_rows = 32
