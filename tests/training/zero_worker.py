"""What test_zero.py runs, alone or under torchrun: `zero_worker.py FOLDER MODE:CONFIG:DTYPE...`.

`train` takes four steps, saves its state after the second, tries a step with a gradient that is not
a number, and writes weights and norms. `resume` goes on from the saved state in new processes.
`foreign` loads a state that another number of processes has saved.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

CLIP = 0.05  # below every norm here, so that clipping matters
RATES = (1e-3, 2e-3, 3e-3, 1e-3)
SAVED_AFTER = 2
# Pairs of the three micro-batches of each of the two processes, and how long their sequences are.
PAIRS = ((2, 1, 1), (1, 2, 1))
LENGTHS = ((5, 9, 3), (7, 4, 6))
GLOBAL_PAIRS = 8


class Rewards(torch.nn.Module):
    """A classifier called as the loop calls it: the layout is no tensor."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, ids, positions, layout):
        states = self.classifier.base_model(input_ids=ids, position_ids=positions, use_cache=False)
        ends = [end for _, end in sorted(layout["ends"].items())]
        rows = torch.arange(len(ids))
        return self.classifier.score(states[0][rows, ends]).squeeze(-1).float()


def model():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=1,
        pad_token_id=0,
    )
    classifier = LlamaForSequenceClassification(config)
    classifier.model.layers[0].input_layernorm.weight.requires_grad_(False)  # as under LoRA
    return Rewards(classifier).train()


def optimizer_of(module):
    trained = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1.0, betas=(0.9, 0.95), weight_decay=0.0)


def loss_of(module, step, rank, part):
    """The sum over the pairs of one micro-batch."""
    pairs, length = PAIRS[rank][part], LENGTHS[rank][part]
    draw = torch.Generator().manual_seed(100 * step + 10 * rank + part)
    ids = torch.randint(50, (2 * pairs, length), generator=draw)
    positions = torch.arange(length).expand(2 * pairs, -1)
    rewards = module(ids, positions, {"ends": {row: length - 1 for row in range(2 * pairs)}})
    return torch.nn.functional.softplus(rewards[pairs:] - rewards[:pairs]).sum()


def step(engine, number):
    world, rank = engine.accelerator.num_processes, engine.accelerator.process_index
    mine = [(r, part) for r in range(rank, 2, world) for part in range(3)]
    for index, (r, part) in enumerate(mine):
        loss = loss_of(engine.module, number, r, part) * (world / GLOBAL_PAIRS)
        engine.backward(loss, last=index == len(mine) - 1)
    return engine.finish(RATES[number])


def run(folder, mode, name, dtype):
    from polarctl.errors import UsageError
    from polarctl.training.zero import ZeroEngine, accelerator, config_of

    boss = accelerator(config_of(name, dtype=dtype, clip=CLIP), cpu=True)
    module = model()  # after: transformers must not make an empty one for zero3
    engine = ZeroEngine(boss, module, optimizer_of(module))
    facts = {"processes": boss.num_processes, "norms": []}
    try:
        if mode != "train":
            engine.load(folder / "state")
        for number in range(SAVED_AFTER if mode == "resume" else 0, len(RATES)):
            facts["norms"].append(step(engine, number))
            if mode == "train" and number + 1 == SAVED_AFTER:
                engine.save(folder / "state")
        weights = engine.weights(module.classifier)
        if mode == "train":
            share = torch.nan if boss.is_last_process else 1.0
            engine.backward(loss_of(engine.module, 0, 0, 0) * share, last=True)
            facts["bad_norm"] = str(engine.finish(1e-3))
            after = engine.weights(module.classifier)
        if not boss.is_main_process:
            assert weights is None
        else:
            save_file(weights, folder / f"{mode}.safetensors")
            if mode == "train":
                facts["kept"] = all(torch.equal(weights[n], after[n]) for n in weights)
    except UsageError as error:
        facts["refused"] = str(error)
    if boss.is_main_process:
        (folder / f"{mode}.json").write_text(json.dumps(facts))
    engine.close()


def main():
    folder, *tasks = sys.argv[1:]
    for task in tasks:
        mode, name, dtype = task.split(":")
        target = Path(folder) / f"{Path(name).stem}-{dtype}"
        target.mkdir(exist_ok=True)
        run(target, mode, name, dtype)


if __name__ == "__main__":
    main()
