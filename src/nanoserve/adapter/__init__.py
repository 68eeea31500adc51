"""LoRA adapters: small fine-tunes of the served model, many of them at once (Hu et al. 2021, arXiv 2106.09685).

    folder ── peft.py ──▶ AdapterWeights ── store.py: in memory, or left on the disk ──▶ a slot of the model side

An adapter is known by its name, and by its revision, which is a digest of its content. The model side has a few slots;
what is in them can be computed with, many in one step.
"""
