"""Questions of a shop: the model of config/sft_lookup.py learns from whether its answers, with two tools, are right."""
out_dir = 'out/grpo_lookup'
init_from = 'out/sft_lookup'
dataset = 'lookup'
rewards = 'correct'
tools = 'data/lookup/shop.py'

prompts_per_step = 16
num_generations = 8
batch_size = 32
gradient_accumulation_steps = 4
max_iters = 12
loss_type = 'dr_grpo'
scale_rewards = 'none'
kl_coef = 0.0
optimizer = 'muon'
muon_lr = 0.001
learning_rate = 1e-3
embed_lr = 1e-4
grad_clip = 0.0
lr_schedule = 'linear'
warmup_iters = 2

eval_interval = 12
eval_rows = 100
max_new_tokens = 320
