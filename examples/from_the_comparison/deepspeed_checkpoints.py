"""Advanced Topics, Checkpoint Management: DeepSpeed checkpointing (save, load, consolidated 16-bit weights).

Edits: the import line; a tiny GPT-2, its data, and the configuration that the original leaves open (ZeRO-3, bf16).
"""

from tiny_gpt2 import dataloader, tiny_gpt2

import unishard.deepspeed as deepspeed

ds_config = {
    "train_micro_batch_size_per_gpu": 4,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
}


def train(model_engine: deepspeed.DeepSpeedEngine, steps: int) -> list[float]:
    losses = []
    for batch in dataloader(batch_size=4, steps=steps):
        loss = model_engine(batch).loss
        model_engine.backward(loss)
        model_engine.step()
        losses.append(loss.item())
    return losses


model_engine, _, _, _ = deepspeed.initialize(model=tiny_gpt2(), config=ds_config)
losses = train(model_engine, 4)

# Save checkpoint (ZeRO format)
model_engine.save_checkpoint("./checkpoints", tag="epoch_1")

# What an uninterrupted run does next
uninterrupted = train(model_engine, 4)

# Load checkpoint
model_engine, _, _, _ = deepspeed.initialize(model=tiny_gpt2(seed=1), config=ds_config)
_, client_state = model_engine.load_checkpoint("./checkpoints", tag="epoch_1")

# Save for inference (consolidate weights)
model_engine.save_16bit_model("./model_final", "model.pt")

resumed = train(model_engine, 4)
print(f"uninterrupted {uninterrupted}, resumed {resumed}")
