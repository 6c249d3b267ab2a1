"""Shakespeare again: the student of config/tiny.py's shape learns from a teacher of four times its size.

The teacher: python train.py config/tiny.py --n_layer=5 --n_embd=256 --n_head=4 --max_iters=2500 --out_dir=out/teacher
"""
out_dir = 'out/distill'
teacher = 'out/teacher'
dataset = 'shakespeare'
batch_size = 8
block_size = 256
alpha = 0.9

n_layer = 4
n_head = 2
n_embd = 128
pos = 'rope'
norm = 'rmsnorm'
qk_norm = True
mlp = 'swiglu'
bias = False
tie_weights = False
init_std = 0.0
zero_init = True

max_iters = 900
optimizer = 'muon'
muon_lr = 0.02
learning_rate = 3e-3
embed_lr = 9e-3
weight_decay = 0.0
beta1 = 0.9
beta2 = 0.99
grad_clip = 0.0
lr_schedule = 'wsd'
warmup_iters = 20

eval_interval = 180
eval_rows = 160
