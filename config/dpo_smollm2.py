"""DPO on a real pretrained model, on two cores: SmolLM2-135M-Instruct learns with LoRA to answer as is preferred."""
out_dir = 'out/dpo_smollm2'
init_from = 'smollm2'
dataset = 'instructions'
max_length = 256

lora_rank = 8
lora_alpha = 16.0

batch_size = 4
gradient_accumulation_steps = 2
max_iters = 40
learning_rate = 2e-4
warmup_iters = 4
beta = 0.1

eval_interval = 40
eval_rows = 0
log_interval = 5
max_new_tokens = 64
