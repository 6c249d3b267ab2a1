"""Word problems, three in ten solved with the calculator: a model that can do both, to find out which is better."""
out_dir = 'out/sft_mixed'
init_from = 'out/tiny'
dataset = 'wordproblems_mixed'
tools = True

batch_size = 8
max_iters = 2300
optimizer = 'muon'
muon_lr = 0.02
learning_rate = 3e-3
embed_lr = 9e-3
weight_decay = 0.0
beta2 = 0.99
grad_clip = 0.0
lr_schedule = 'wsd'
warmup_iters = 20

eval_interval = 1150
eval_rows = 500
max_new_tokens = 160
