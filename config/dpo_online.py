"""DPO online on two cores: the model of config/sft_mixed.py learns from pairs of its own answers, right and wrong."""
out_dir = 'out/dpo_online'
init_from = 'out/sft_mixed'
dataset = 'wordproblems'
online = True
rewards = 'correct'
tools = True

num_generations = 8
batch_size = 32
gradient_accumulation_steps = 1
max_iters = 40
beta = 0.1
optimizer = 'muon'
muon_lr = 0.002
learning_rate = 2e-3
embed_lr = 2e-4
grad_clip = 0.0
lr_schedule = 'linear'
warmup_iters = 5

eval_interval = 20
eval_rows = 200
log_interval = 1
max_new_tokens = 160
