"""GRPO on two cores: the model of config/sft_mixed.py learns from whether its answers to word problems are right."""
out_dir = 'out/grpo'
init_from = 'out/sft_mixed'
dataset = 'wordproblems'
rewards = 'correct'
tools = True

prompts_per_step = 32
num_generations = 8
batch_size = 64
gradient_accumulation_steps = 2
max_iters = 60
loss_type = 'dr_grpo'
scale_rewards = 'none'
kl_coef = 0.0
optimizer = 'muon'
muon_lr = 0.001
learning_rate = 1e-3
embed_lr = 1e-4
grad_clip = 0.0
lr_schedule = 'linear'

eval_interval = 20
eval_rows = 500
max_new_tokens = 160
