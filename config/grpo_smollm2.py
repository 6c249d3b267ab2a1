"""GRPO on a real pretrained model, on two cores: SmolLM2-135M-Instruct learns sums in number words, with LoRA."""
out_dir = 'out/grpo_smollm2'
init_from = 'smollm2'
dataset = 'arithmetic'
rewards = 'number'

lora_rank = 16
lora_alpha = 32.0

prompts_per_step = 8
num_generations = 8
batch_size = 32
gradient_accumulation_steps = 2
max_iters = 120
learning_rate = 3e-4
kl_coef = 0.0
scale_rewards = 'group'
warmup_iters = 5
lr_schedule = 'linear'

eval_interval = 60
eval_rows = 250
max_new_tokens = 16
