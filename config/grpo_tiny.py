"""GRPO on two cores: the model of config/sft_tiny.py learns from whether its answers to word problems are right."""
out_dir = 'out/grpo'
init_from = 'out/sft'
base = 'out/sft'
dataset = 'wordproblems'
rewards = 'correct'

prompts_per_step = 64
num_generations = 8
batch_size = 64
gradient_accumulation_steps = 8
max_iters = 60
optimizer = 'muon'
muon_lr = 0.002
learning_rate = 3e-4
kl_coef = 0.0
grad_clip = 0.0

eval_interval = 20
eval_rows = 500
max_new_tokens = 96
