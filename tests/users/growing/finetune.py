"""Fine-tuning of a causal language model of Transformers on instructions of different lengths, padded."""

import argparse

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from distgrow import Controller, Cosine, budget, constant_lr, every, exponential
from distgrow.integrations.transformers import GrowthTrainer

PAD, IGNORED = 0, -100


class Instructions(Dataset):
    """Reversed numbers: the question does not count in the loss, the answer does."""

    def __init__(self, count, seed):
        numbers = torch.Generator().manual_seed(seed)
        lengths = torch.randint(2, 12, (count,), generator=numbers).tolist()
        self.questions = [torch.randint(1, 30, (length,), generator=numbers) for length in lengths]

    def __len__(self):
        return len(self.questions)

    def __getitem__(self, index):
        question = self.questions[index]
        answer = torch.cat([torch.tensor([30]), question.flip(0), torch.tensor([31])])
        labels = torch.cat([torch.full_like(question, IGNORED), answer])
        return {"input_ids": torch.cat([question, answer]), "labels": labels}


def collate(rows):
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key, value):
        return torch.stack([torch.nn.functional.pad(r[key], (0, longest - len(r[key])), value=value) for r in rows])

    ids = padded("input_ids", PAD)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": padded("labels", IGNORED)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", default="finetuned")
    parser.add_argument("--epochs", type=int, default=4)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=PAD, bos_token_id=30, eos_token_id=31,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    training = TrainingArguments(
        output_dir=args.output,
        weight_decay=0.01,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_steps=10,
        report_to=[],
    )
    controller = Controller(
        growth=exponential(16, factor=2, cap=64), stages=every(epochs=1), lr=constant_lr(3e-3, Cosine()),
        budget=budget(epochs=args.epochs), epoch=480, max_micro=8,
    )  # fmt: skip
    trainer = GrowthTrainer(
        model,
        training,
        controller=controller,
        data_collator=collate,
        train_dataset=Instructions(480, seed=0),
        eval_dataset=Instructions(96, seed=1),
    )
    trainer.train()
    trainer.save_model(args.output)


if __name__ == "__main__":
    main()
