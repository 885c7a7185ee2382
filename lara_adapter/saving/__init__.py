"""The files an adapter is made of, on disk and on the Hugging Face Hub.

A folder holds `lara_config.json` (settings, and the sha256 of each other file), `lara_adapter.safetensors` (projector,
step), `lam/` (the latent action model), `policy_lora/` in peft's own format where the policy carries LoRA,
`policy_weights/` where its trained weights were asked for, and `README.md` with a picture of the training. Never
`adapter_config.json`: transformers takes that name for a peft adapter. safetensors only; nothing in a folder is ever
executed.
"""
